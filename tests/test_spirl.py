"""spirl.py against independent NumPy versions, toys with known solutions, interruptions and its own command line."""

import copy
import dataclasses
import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_skimo import (
    DEVICES,
    Stop,
    assert_same,
    count_calls,
    csv_rows,
    final_state,
    has_gradient,
    np_kl,
    only_run,
    random_obs,
    same_weights,
    stop,
)
from torch import nn

import data_tools
import data_tools.maze
from algos import spirl

__all__ = ["stop"]  # a fixture

# -------------------------------------------------------------------------------------------------------------- helpers


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", compile=False, num_threads=1, hidden_dim=16, critic_dim=16, critic_blocks=2, skill_dim=3,
        skill_horizon=5, num_envs=2, batch_size=8, buffer_size=500, pretrain_batch_size=8, pretrain_updates=6,
        pretrain_eval_episodes=1, eval_episodes=2, total_timesteps=1200, warmup_skills=80,
    )  # fmt: skip
    return spirl.Args(**(small | changes))


def np_net(net, x, training=False):
    """An nn.Sequential evaluated with NumPy in float64, (..., in) -> (..., out)."""
    for layer in net:
        weights = {name: value.detach().numpy().astype(np.float64) for name, value in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            x = x @ weights["weight"].T + weights["bias"]
        elif isinstance(layer, nn.BatchNorm1d):
            axes = tuple(range(x.ndim - 1))
            mean, var = (x.mean(axes), x.var(axes)) if training else (layer.running_mean, layer.running_var)
            x = (x - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5) * weights["weight"] + weights["bias"]
        elif isinstance(layer, nn.LeakyReLU):
            x = np.where(x > 0, x, 0.2 * x)
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * weights["weight"] + weights["bias"]
        elif isinstance(layer, nn.ELU):
            x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        elif isinstance(layer, nn.Tanh):
            x = np.tanh(x)
        else:
            raise AssertionError(f"no {layer} in the papers")
    return x


def np_features(obs, maze=True):
    """Scaled observations, then the sines of both coordinates in all periods, then the cosines; others raw."""
    if not maze:
        return obs
    x = [obs[..., :2] / 40 - 0.5, obs[..., 2:] / 10]
    for wave in (np.sin, np.cos):
        for k in (0, 1):
            x += [wave(2 * np.pi * obs[..., k, None] / period) for period in (1, 2, 4, 8, 16, 32)]
    return np.concatenate(x, -1)


def np_gaussian(x):
    mean, log_std = np.split(x, 2, -1)
    return mean, np.exp(np.clip(log_std, -10, 2))


def np_log_prob(x, p):
    return (-0.5 * ((x - p[0]) / p[1]) ** 2 - np.log(p[1]) - 0.5 * np.log(2 * np.pi)).sum(-1)


def np_lstm(lstm, x):
    """Last hidden state of a one-layer LSTM: x (B, T, I) -> (B, u); gates in the order i, f, g, o."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    W, R, b, c = (getattr(lstm, name).detach().numpy() for name in names)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    hidden = cell = np.zeros((len(x), R.shape[1]))
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ W.T + b + hidden @ R.T + c, 4, -1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
    return hidden


def np_prior(prior, obs, maze=True, training=False):
    return np_gaussian(np_net(prior.net, np_features(obs, maze), training))


def noisy_copy(module, seed=1):
    """A copy with other weights and other statistics of BatchNorm."""
    torch.manual_seed(seed)
    module = copy.deepcopy(module)
    for value in module.parameters():
        value.data += 0.1 * torch.randn_like(value)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.copy_(torch.randn_like(layer.running_mean))
            layer.running_var.copy_(0.5 + torch.rand_like(layer.running_var))
    return module


def double_networks(args, obs_dim=4, action_dim=2, seed=0):
    torch.manual_seed(seed)
    return noisy_copy(spirl.make_networks(args, obs_dim, action_dim, "cpu").double(), seed)


# --------------------------------------------------------------------------------------------------------- pre-training


def pretraining_batch(args, maze=True, obs_dim=4, action_dim=2, B=6):
    rng = np.random.default_rng(0)
    H = args.skill_horizon
    obs = random_obs(rng, B, H + 1) if maze else rng.normal(size=(B, H + 1, obs_dim))
    return obs, rng.uniform(-1, 1, (B, H, action_dim))


@pytest.mark.parametrize("env_id", ["maze", "kitchen"])
def test_pretrain_loss_is_that_of_spirl(env_id):
    maze = env_id == "maze"
    args = tiny_args(env_id=env_id, kl_coef=0.3, position_features=maze)
    sizes = (4, 2) if maze else (7, 3)
    networks = double_networks(args, *sizes).train()
    skills, prior = networks["skills"], networks["prior"]
    obs, actions = pretraining_batch(args, maze, *sizes)
    torch.manual_seed(3)
    loss, metrics = spirl.pretrain_loss(skills, prior, torch.from_numpy(obs), torch.from_numpy(actions), args)
    torch.manual_seed(3)
    noise = torch.randn(len(obs), 3, dtype=torch.float64).numpy()

    x = np_net([skills.lstm_input], np.concatenate([actions, np_features(obs[:, :-1], maze)], -1))
    q = np_gaussian(np_net([skills.lstm_output, skills.skill_encoder], np_lstm(skills.lstm, x)))
    z = q[0] + q[1] * noise
    inputs = [np.concatenate([np_features(obs[:, t], maze), z], -1) for t in range(args.skill_horizon)]
    imitated = np_net(skills.skill_policy, np.stack(inputs, 1), training=True)
    bc = np.square(imitated - actions).mean()
    kl = np_kl(q, (np.zeros(3), np.ones(3))).mean()
    p = np_prior(prior, obs[:, 0], maze, training=True)
    expected = dict(bc_loss=bc, kl_loss=kl, prior_loss=-np_log_prob(z, p).mean(), prior_kl=np_kl(q, p).mean())
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-4), name  # BatchNorm amplifies rounded features
    # The Gaussian likelihood of unit variance is half the squared error up to a constant; KL: mean over dimensions
    assert loss.item() == pytest.approx(0.5 * bc + 0.3 * kl / 3 + expected["prior_loss"], rel=1e-4)


def test_prior_and_skills_do_not_train_each_other():
    args = tiny_args()
    networks = double_networks(args)
    batch = [torch.from_numpy(x) for x in pretraining_batch(args)]

    def gradients(skills, prior):
        torch.manual_seed(0)
        skills, prior = copy.deepcopy(skills), copy.deepcopy(prior)
        spirl.pretrain_loss(skills, prior, *batch, args)[0].backward()
        return [[value.grad for value in module.parameters()] for module in (skills, prior)]

    skills, prior = networks["skills"], networks["prior"]
    of_skills, of_prior = gradients(skills, prior)
    assert all(value.abs().sum() > 0 for value in [*of_skills[:2], *of_prior[:2]])
    assert_same(gradients(skills, noisy_copy(prior))[0], of_skills)  # the prior's likelihood does not reach q
    other = copy.deepcopy(skills)
    other.skill_policy = noisy_copy(skills.skill_policy)
    assert_same(gradients(other, prior)[1], of_prior)
    networks["skills"].zero_grad()
    _, metrics = spirl.pretrain_loss(skills, prior, *batch, args)
    assert not any(value.requires_grad for value in metrics.values())


def test_gradient_is_bounded_in_the_first_updates_and_the_rate_decays(monkeypatch):
    args = tiny_args(pretrain_updates=1000, clip_updates=3, clip_norm=0.001)
    trainer = spirl.Pretrainer(args, spirl.make_networks(args, 4, 2, "cpu"))
    norms, batch = [], [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    step = trainer.optimizers[0].step

    def measured():
        norms.append(sum(value.grad.square().sum() for value in trainer.networks.parameters()).sqrt().item())
        step()

    monkeypatch.setattr(trainer.optimizers[0], "step", measured)
    rates = []
    for _ in range(5):
        trainer.update(*batch)
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
    assert norms[:3] == pytest.approx([0.001] * 3, rel=1e-3) and min(norms[3:]) > 0.1
    assert rates == pytest.approx([1e-3 * math.sqrt(1 - k / 1000) for k in range(5)])
    assert isinstance(trainer.optimizers[0], torch.optim.RAdam)
    args = dataclasses.replace(args, pretrain_lr_decay=False)
    trainer = spirl.Pretrainer(args, trainer.networks)
    trainer.num_updates = 500
    trainer.update(*batch)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 1e-3
    defaults = spirl.Args()
    assert (defaults.clip_updates, defaults.clip_norm, defaults.pretrain_lr) == (100, 0.001, 1e-3)


def constant_direction_data(seed, episodes=60, skills=12, H=5):
    """Each chunk of H actions pushes into one random direction, which is what a skill has to encode."""
    rng = np.random.default_rng(seed)
    actions = np.repeat(rng.uniform(-0.9, 0.9, (episodes, skills, 2)), H, 1)
    position = 20 + np.concatenate([np.zeros((episodes, 1, 2)), actions.cumsum(1)[:, :-1]], 1)
    obs = np.concatenate([position, np.zeros_like(position)], -1)
    ends = np.tile(np.arange(skills * H) == skills * H - 1, episodes)
    return data_tools.OfflineDataset(obs.reshape(-1, 4), actions.reshape(-1, 2), ends, np.zeros_like(ends))


def test_pretraining_learns_skills_that_the_prior_foretells():
    H = 5
    args = tiny_args(hidden_dim=32, pretrain_updates=600, pretrain_lr=3e-3, kl_coef=1e-3, position_features=False)
    data = constant_direction_data(0)
    torch.manual_seed(0)
    trainer = spirl.Pretrainer(args, spirl.make_networks(args, 4, 2, "cpu"))
    for _ in range(args.pretrain_updates):
        row = torch.randint(60, (64, 1)) * 60 + H * torch.randint(11, (64, 1)) + torch.arange(H + 1)
        metrics = trainer.update(data.observations[row], data.actions[row[:, :-1]])
    networks, test = trainer.networks.eval(), constant_direction_data(100)
    row = torch.arange(60)[:, None] * 60 + torch.arange(H + 1)
    with torch.no_grad():
        _, metrics = spirl.pretrain_loss(*networks.values(), test.observations[row], test.actions[row[:, :-1]], args)
    assert metrics["bc_loss"] < 0.1 * test.actions.var()
    assert metrics["prior_kl"] < metrics["kl_loss"] + 1  # directions are uniform: no better than the standard normal


# -------------------------------------------------------------------------------------------------------- downstream RL


def rl_batch(B=5):
    rng = np.random.default_rng(1)
    rewards, dones = 3 * rng.normal(size=B), (rng.random(B) < 0.4).astype(np.float64)
    return random_obs(rng, B), rng.uniform(-2, 2, (B, 3)), rewards, dones, random_obs(rng, B)


def double_learner(args):
    learner = spirl.Learner(args, double_networks(args))
    learner.task_policy, learner.critics, learner.target = (
        noisy_copy(module.double(), seed).eval()
        for seed, module in ((2, learner.task_policy), (3, learner.critics), (4, learner.critics))
    )
    return learner


def np_critics(critics, obs, z):
    inputs = np.concatenate([np_features(obs), z], -1)
    return np_net(critics.qf1, inputs)[:, 0], np_net(critics.qf2, inputs)[:, 0]


def test_critic_loss_holds_the_policy_to_the_prior_in_its_target():
    args = tiny_args(gamma=0.9)
    learner = double_learner(args)
    obs, z, rewards, dones, next_obs = batch = rl_batch()
    torch.manual_seed(5)
    nets = learner.critics, learner.target, learner.task_policy, learner.skill_prior
    alpha = torch.tensor(0.7, dtype=torch.float64)
    loss, metrics = spirl.critic_loss(*nets, *(torch.from_numpy(x) for x in batch), alpha, args)
    torch.manual_seed(5)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()

    pi = np_prior(learner.task_policy, next_obs)
    kl = np.clip(np_kl(pi, np_prior(learner.skill_prior, next_obs)), -100, 100)
    next_q = np.minimum(*np_critics(learner.target, next_obs, 2 * np.tanh(pi[0] + pi[1] * noise)))
    td_target = rewards + 0.9 * np.where(dones, 0, next_q - 0.7 * kl)
    q1, q2 = np_critics(learner.critics, obs, z)
    expected = 0.5 * np.square(q1 - td_target).mean() + 0.5 * np.square(q2 - td_target).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["td_target"].item() == pytest.approx(td_target.mean(), rel=1e-5)
    loss.backward()
    assert has_gradient(learner.critics.qf1) and has_gradient(learner.critics.qf2)
    for module in (learner.target, learner.task_policy, learner.skill_prior):
        assert not has_gradient(module)


def test_policy_loss_weighs_value_against_prior_kl():
    args = tiny_args()
    learner = double_learner(args)
    obs = rl_batch()[0]
    learner.critics.requires_grad_(False)
    torch.manual_seed(6)
    alpha = torch.tensor(0.7, dtype=torch.float64)
    nets = learner.critics, learner.task_policy, learner.skill_prior
    loss, metrics = spirl.policy_loss(*nets, torch.from_numpy(obs), alpha, args)
    torch.manual_seed(6)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()
    pi = np_prior(learner.task_policy, obs)
    kl = np.clip(np_kl(pi, np_prior(learner.skill_prior, obs)), -100, 100)
    q = np.minimum(*np_critics(learner.critics, obs, 2 * np.tanh(pi[0] + pi[1] * noise)))
    assert loss.item() == pytest.approx((0.7 * kl - q).mean(), rel=1e-5)
    assert metrics["prior_kl"].item() == pytest.approx(kl.mean(), rel=1e-5)
    loss.backward()
    assert has_gradient(learner.task_policy)
    assert not has_gradient(learner.critics) and not has_gradient(learner.skill_prior)


def test_closed_form_kl_is_the_mean_of_the_releases_estimate():
    """The release draws 10 samples x of the policy and averages log pi(x) - log p(x), both before the tanh."""
    rng = np.random.default_rng(0)
    p, q = ((rng.normal(size=(4, 3)), rng.uniform(0.3, 1.3, (4, 3))) for _ in range(2))
    x = p[0] + p[1] * rng.normal(size=(20_000, 10, 4, 3))
    estimates = (np_log_prob(x, p) - np_log_prob(x, q)).mean(1)  # (20000, 4)
    kl = spirl.kl_divergence(*([torch.from_numpy(v) for v in pair] for pair in (p, q))).numpy()
    assert np.all(np.abs(estimates.mean(0) - kl) < 5 * estimates.std(0) / math.sqrt(len(estimates)))


def float_batch(B=8):
    return [torch.from_numpy(x).float() for x in rl_batch(B)]


def test_learner_update_moves_what_it_should():
    args = tiny_args(tau=0.1)
    learner = spirl.Learner(args, noisy_copy(spirl.make_networks(args, 4, 2, "cpu")))
    for name, value in learner.skill_prior.state_dict().items():
        assert torch.equal(value, learner.task_policy.state_dict()[name])  # where the policy starts
    with torch.no_grad():
        for value in learner.critics.parameters():
            value += 0.01 * torch.randn_like(value)
    start = copy.deepcopy(learner)
    learner.update(*float_batch())
    assert same_weights(learner.skills, start.skills) and same_weights(learner.skill_prior, start.skill_prior)
    for part in ("qf1", "qf2"):
        assert not same_weights(getattr(learner.critics, part), getattr(start.critics, part))
    changed = [not torch.equal(a, b) for a, b in zip(learner.task_policy.parameters(), start.task_policy.parameters())]
    assert all(changed)  # BatchNorm's scales and shifts, too
    for now, old, online in zip(learner.target.parameters(), start.target.parameters(), learner.critics.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), atol=1e-7, rtol=1e-5)
    assert learner.num_updates == 1 and all(value.requires_grad for value in learner.critics.parameters())
    assert [o.param_groups[0]["lr"] for o in learner.optimizers] == [3e-4] * 3
    assert [o.param_groups[0]["betas"] for o in learner.optimizers] == [(0.9, 0.999)] * 3


def statistics(module):
    return {name: value for name, value in module.state_dict().items() if "running" in name or "num_batches" in name}


def test_batch_norm_statistics_move_in_pretraining_only():
    args = tiny_args()
    networks = spirl.make_networks(args, 4, 2, "cpu")
    before = copy.deepcopy(statistics(networks))
    trainer = spirl.Pretrainer(args, networks)
    trainer.update(*(torch.from_numpy(x).float() for x in pretraining_batch(args)))
    after = statistics(networks)
    assert len(after) == 3 * (5 + 6) and all(not torch.equal(after[name], before[name]) for name in after)
    before = copy.deepcopy(after)
    learner = spirl.Learner(args, networks)  # although the networks were still in training mode
    for _ in range(3):
        learner.update(*float_batch())
    for module in (learner.task_policy, learner.skill_prior, learner.skills):
        assert len(statistics(module)) > 0 and not module.training
        prefix = "skills." if module is learner.skills else "prior."
        assert_same({prefix + name: value for name, value in statistics(module).items()},
                    {name: value for name, value in before.items() if name.startswith(prefix)})  # fmt: skip
    one, many = torch.randn(1, 4), torch.randn(7, 4)
    alone = learner.task_policy(one)[0]
    torch.testing.assert_close(learner.task_policy(torch.cat([one, many]))[0][:1], alone)


@pytest.mark.parametrize(("target_kl", "direction"), [(1e3, -1), (-1.0, 1)])
def test_alpha_rises_while_the_kl_exceeds_its_target(target_kl, direction):
    args = tiny_args(target_kl=target_kl, alpha=0.5)
    learner = spirl.Learner(args, spirl.make_networks(args, 4, 2, "cpu"))
    for _ in range(3):
        metrics = learner.update(*float_batch())
    assert np.sign(round(learner.log_alpha.exp().item() - 0.5, 6)) == direction
    assert metrics["alpha"].item() == pytest.approx(0.5, rel=1e-2)


def test_replay_is_a_ring_of_transitions():
    args = tiny_args(buffer_size=5)
    rb = spirl.ReplayBuffer(4, args, torch.device("cpu"))

    def add(rb, k):
        obs = np.stack([np.full(4, k), np.full(4, k + 100)]).astype(np.float32)
        z, ended = torch.full((2, 3), k / 10), np.array([k % 3 == 0, False])
        rb.add(obs, z, np.array([k + 0.5, k - 0.5], dtype=np.float32), ended, obs + 1)

    for k in range(4):
        add(rb, k)
        assert len(rb) == min(2 * (k + 1), 5)
    torch.manual_seed(0)
    obs, z, rewards, dones, next_obs = rb.sample(4000)
    assert [x.shape for x in (obs, z, rewards, dones, next_obs)] == [(4000, 4), (4000, 3), (4000,), (4000,), (4000, 4)]
    number = obs[:, 0]
    counts = {k: int((number == k).sum()) for k in (101, 2, 102, 3, 103)}
    assert sum(counts.values()) == 4000 and min(counts.values()) > 700  # the last five, uniformly
    k, second = number % 100, number >= 100
    assert torch.equal(next_obs, obs + 1)
    torch.testing.assert_close(z, (k[:, None] / 10).expand(-1, 3))
    assert torch.equal(rewards, k + torch.where(second, -0.5, 0.5))
    assert torch.equal(dones, ((k % 3 == 0) & ~second).float())
    other = spirl.ReplayBuffer(4, args, torch.device("cpu"))
    other.set_state(copy.deepcopy(rb.get_state()))
    add(rb, 9), add(other, 9)
    assert torch.equal(rb.rows, other.rows) and rb.added == other.added == 10


def test_sac_finds_the_skill_that_pays_within_reach_of_the_prior(seed=0):
    """One-step episodes; the best skill is (1, -1, 0). The further the KL may go, the better it is reached."""
    best, returns = torch.tensor([1.0, -1.0, 0.0]), {}
    for target_kl in (0.05, 8.0):
        args = tiny_args(hidden_dim=32, critic_dim=32, target_kl=target_kl, learning_rate=3e-3, num_envs=100)
        torch.manual_seed(seed)
        learner = spirl.Learner(args, spirl.make_networks(args, 4, 2, "cpu"))
        with torch.no_grad():
            learner.task_policy.net[-1].weight.mul_(0.01)
        rb = spirl.ReplayBuffer(4, dataclasses.replace(args, buffer_size=2000), torch.device("cpu"))
        rng = np.random.default_rng(seed)
        for k in range(500):
            obs = random_obs(rng, 100).astype(np.float32)
            if k % 5 == 0:
                with torch.no_grad():
                    z = spirl.squash(spirl.draw(learner.task_policy(torch.from_numpy(obs))))
                reward = 10 - 5 * (z - best).square().sum(-1)
                rb.add(obs, z, reward.numpy(), np.ones(100, dtype=bool), obs)
            metrics = learner.update(*rb.sample(64))
        returns[target_kl] = reward.mean().item()
    assert metrics["prior_kl"].item() < 20
    assert returns[8.0] > 4 and returns[8.0] > returns[0.05] + 3


# --------------------------------------------------------------------------------------------- runs within this process

SMALL = (
    "--device cpu --no-compile --num-threads 1 --hidden-dim 16 --skill-dim 3 --num-envs 2 --batch-size 8 "
    "--eval-episodes 2 --pretrain-batch-size 8 --pretrain-updates 6 --pretrain-eval-episodes 1"
)
QUICK = f"{SMALL} --critic-dim 16 --skill-horizon 5 --total-timesteps 1200 --warmup-skills 80 --eval-interval 500"


@pytest.fixture
def short_episodes(monkeypatch):
    """Maze episodes of 90 steps instead of 2,000; no pictures."""
    real = data_tools.maze.MazeVectorEnv.__init__

    def short(self, num_envs=1, max_episode_steps=90, *args, **kwargs):
        real(self, num_envs, 90, *args, **kwargs)

    monkeypatch.setattr(data_tools.maze.MazeVectorEnv, "__init__", short)
    for name in ("plot_prediction", "plot_visited"):
        monkeypatch.setattr(data_tools, name, lambda *args: None)


@pytest.fixture
def run(short_episodes, data_dir, tmp_path):
    """run(flags, folder) starts main() on short episodes; returns results and run folder."""

    def start(flags="", folder="runs", data=data_dir):
        argv = [*QUICK.split(), "--data-dir", str(data), "--run-dir", str(tmp_path / folder), *flags.split()]
        results = spirl.main(spirl.parse_args(argv))
        return results, only_run(tmp_path / folder)

    return start


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_updates_keep_step_with_the_skills(run, monkeypatch, ratio):
    """1,200 env steps are 240 skills of 5 steps, 120 in each of two environments; 80 are warm-up."""
    order = []
    for owner, name in ((spirl.Learner, "update"), (spirl.ReplayBuffer, "add")):
        original = getattr(owner, name)

        def noted(*args, original=original, name=name, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    results, run_dir = run(f"--updates-per-skill {ratio}")
    assert results["env_steps"] == 1200 and results["updates"] == int((240 - 80) * ratio)
    if ratio == 1.0:  # the warm-up, then two updates after every two skills
        assert order == ["add"] * 40 + ["add", "update", "update"] * 80
    assert csv_rows(run_dir) == [[str(180 * k), "0.0", "90"] for k in range(1, 7) for _ in range(2)]
    assert [step for step, _, _ in results["evaluations"]] == [500, 1000, 1200]
    assert json.loads((run_dir / "results.json").read_text())["pretraining"]["updates"] == 6


def test_evaluation_takes_the_mode_and_leaves_the_random_state_alone(short_episodes, monkeypatch):
    args = tiny_args()
    learner = spirl.Learner(args, spirl.make_networks(args, 4, 2, "cpu"))
    calls, before = count_calls(monkeypatch, spirl, "execute_skill"), torch.get_rng_state()
    returns, lengths = spirl.evaluate(learner, args)
    assert returns.shape == (2,) and lengths.tolist() == [90, 90] and torch.equal(torch.get_rng_state(), before)
    for _, _, obs, z, *_ in calls:
        mean = np_prior(learner.task_policy, obs.astype(np.float64))[0]
        np.testing.assert_allclose(z.numpy(), 2 * np.tanh(mean), atol=1e-5)


@pytest.mark.parametrize("interrupt", ["in the warm-up", "between updates", "by its length"])
def test_resumed_run_equals_an_uninterrupted_one(run, monkeypatch, stop, interrupt):
    results, whole = run("--buffer-size 150", "whole")
    if interrupt == "by its length":
        _, part = run("--buffer-size 150 --total-timesteps 600", "part")
        resumed = spirl.main(spirl.parse_args(["--resume", str(part), "--total-timesteps", "1200"]))
    else:
        if interrupt == "between updates":
            count_calls(monkeypatch, spirl.Learner, "update", at=51, then=stop)
        else:
            count_calls(monkeypatch, spirl.ReplayBuffer, "add", at=17, then=stop)
        with pytest.raises(SystemExit, match="stopped at env step .* go on with: .*--resume"):
            run("--buffer-size 150", "part")
        part = only_run(whole.parents[1] / "part")
        updates = final_state(part)["learner"]["num_updates"]
        assert updates == (51 if interrupt == "between updates" else 0)
        Stop.requested = False
        resumed = spirl.main(spirl.parse_args(["--resume", str(part)]))
    a, b = final_state(whole), final_state(part)
    if interrupt == "by its length":
        a["run"].pop("evaluations"), b["run"].pop("evaluations")
    assert_same(b, a)
    assert csv_rows(part) == csv_rows(whole)
    assert resumed["evaluations"][-1] == results["evaluations"][-1]


def test_interrupted_pretraining_goes_on_bit_for_bit(run, data_dir, tmp_path, tiny_data_file, monkeypatch, stop):
    flags = "--total-timesteps 400 --warmup-skills 40 --pretrain-eval-interval 2"
    whole_data = tmp_path / "whole_data"
    whole_data.mkdir()
    shutil.copy(tiny_data_file, whole_data)
    run(flags, "whole", data=whole_data)
    calls = count_calls(monkeypatch, spirl.Pretrainer, "update", at=3, then=stop)
    with pytest.raises(SystemExit, match="stopped in pre-training; the same command, or --resume"):
        run(flags, "part")
    Stop.requested = False
    _, again = run(flags, "rest")
    (name,) = (path.name for path in (data_dir / "pretrained").iterdir())
    assert name.startswith("spirl_maze_scripted_") and name.endswith(".pt") and len(calls) == 6
    states = [torch.load(folder / "pretrained" / name, weights_only=True) for folder in (data_dir, whole_data)]
    for state in states:
        state["facts"].pop("minutes")
    assert_same(*states)
    assert_same(final_state(again), final_state(only_run(tmp_path / "whole")))
    cached = run(flags, "cached")[1]
    assert len(calls) == 6
    assert_same(final_state(cached), final_state(again))  # RL does not depend on where the model comes from


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-envs 0", ["--num-envs"]),
        ("--buffer-size 1", ["--buffer-size", "--num-envs"]),
        ("--warmup-skills 0", ["--warmup-skills"]),
        ("--pretrained missing.pt", ["missing.pt", "does not exist"]),
        ("--skill-horizon 5000", ["5000 env steps", "lower --skill-horizon"]),
    ],
)
def test_senseless_flags_are_refused_with_a_sentence(run, flags, words):
    with pytest.raises(SystemExit) as caught:
        run(flags)
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message


def test_foreign_checkpoints_are_refused(run):
    _, run_dir = run("--total-timesteps 400")
    refused = {"--hidden-dim 32": "hidden_dim", "--num-envs 3": "num_envs", "--critic-dim 32": "critic"}
    refused |= {"--buffer-size 2000": "buffer_size"}  # rows of a ring that is not full yet would be zeros
    for flags, word in refused.items():
        with pytest.raises(SystemExit, match=word):
            spirl.main(spirl.parse_args(["--resume", str(run_dir), *flags.split()]))


# ------------------------------------------------------------------------------------------- runs as a user starts them

SIZES = {"maze": (4, 2), "kitchen": (30, 9), "kitchen-misaligned": (30, 9), "calvin": (21, 7)}


def small_data(env_id, path):
    """Random episodes of the task's sizes as a data file."""
    obs_dim, action_dim = SIZES[env_id]
    rng = np.random.default_rng(0)
    ends = np.tile(np.arange(60) == 59, 4)
    arrays = rng.normal(size=(240, obs_dim)), rng.uniform(-1, 1, (240, action_dim)), ends, np.zeros_like(ends)
    data_tools.OfflineDataset(*arrays, attributes=dict(source="random")).save(path)
    return path


def run_command(module, env_id, flags, tmp_path, data_dir, capsys):
    """Both phases with the flags of a command line, for the maze in a process of their own; returns the run folder."""
    data = ["--data-dir", str(data_dir)]
    if env_id != "maze":
        data = ["--data", str(small_data(env_id, tmp_path / "data.hdf5")), "--data-dir", str(tmp_path / "cache")]
    argv = ["--env-id", env_id, *SMALL.split(), *data, "--run-dir", str(tmp_path / "runs"), *flags.split()]
    if env_id == "maze":
        command = [sys.executable, module.__file__, *argv]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
        out = result.stdout
    else:
        module.main(module.parse_args(argv))
        out = capsys.readouterr().out
    assert "clean evaluation" in out
    return only_run(tmp_path / "runs")


@pytest.mark.parametrize("env_id", list(SIZES))
def test_command_line_on_every_task(env_id, data_dir, tmp_path, capsys):
    steps = {"maze": 4200, "calvin": 800}.get(env_id, 600)
    flags = f"--critic-dim 16 --total-timesteps {steps} --warmup-skills 20"
    run_dir = run_command(spirl, env_id, flags, tmp_path, data_dir, capsys)
    assert run_dir.name.startswith(f"{env_id}__spirl__")
    names = [path.name for path in run_dir.iterdir() if "tfevents" not in path.name]
    assert sorted(names) == ["args.json", "checkpoint.pt", "episodes.csv", "results.json", "visited.png"]
    results = json.loads((run_dir / "results.json").read_text())
    assert results["env_steps"] >= steps and results["updates"] > 0 and len(csv_rows(run_dir)) >= 2
    assert np.isfinite(results["pretraining"]["valid_bc_loss"])


def test_defaults_are_those_of_the_release():
    maze, kitchen, calvin = (spirl.parse_args(["--env-id", name]) for name in ("maze", "kitchen", "calvin"))
    for name, values in dict(
        batch_size=(128, 256, 256), buffer_size=(10**5, 10**6, 10**6), target_kl=(10, 5, 5), critic_blocks=(2, 5, 5),
        critic_dim=(256,) * 3, learning_rate=(3e-4,) * 3, tau=(0.005,) * 3, gamma=(0.99,) * 3, alpha=(1.0,) * 3,
        warmup_skills=(5000,) * 3, updates_per_skill=(1.0,) * 3, hidden_dim=(128,) * 3, pretrain_batch_size=(128,) * 3,
    ).items():  # fmt: skip
        assert (getattr(maze, name), getattr(kitchen, name), getattr(calvin, name)) == values, name
    assert kitchen.kl_coef == calvin.kl_coef == 5e-4


@pytest.mark.parametrize("env_id", list(SIZES))
def test_networks_have_the_sizes_of_the_release(env_id):
    args = spirl.Args(env_id=env_id, **spirl.TASK_DEFAULTS[env_id])
    obs_dim, action_dim = SIZES[env_id]
    networks = spirl.make_networks(args, obs_dim, action_dim, "cpu")
    inputs = obs_dim + 2 * data_tools.position_frequency(env_id).size

    def kinds(net):
        return [type(layer).__name__ for layer in net]

    block = ["Linear", "BatchNorm1d", "LeakyReLU"]
    policy, prior = networks["skills"].skill_policy, networks["prior"].net
    assert kinds(policy) == ["Linear", "LeakyReLU", *block * 5, "Linear"]
    assert kinds(prior) == ["Linear", "LeakyReLU", *block * 6, "Linear"]
    assert (policy[0].in_features, policy[-1].out_features) == (inputs + 10, action_dim)
    assert (prior[0].in_features, prior[-1].out_features) == (inputs, 20)
    critic = spirl.Critics(obs_dim, args).qf1
    blocks = 2 if env_id == "maze" else 5
    assert kinds(critic) == ["Linear", "LeakyReLU"] * (1 + blocks) + ["Linear"]
    assert (critic[0].in_features, critic[0].out_features, critic[-1].out_features) == (inputs + 10, 256, 1)
    std = math.sqrt(2 / (128 + 128))
    assert prior[2].weight.std().item() == pytest.approx(std, rel=0.05) and not prior[2].bias.any()
    lstm = networks["skills"].lstm
    assert (lstm.input_size, lstm.hidden_size) == (128, 128)
    assert torch.all((lstm.bias_ih_l0 + lstm.bias_hh_l0)[128:256] == 1)


BOOLS = {"compile", "capture_video", "retrain", "pretrain_lr_decay", "position_features"}
BOOLS |= {"allow_pickle", "accept_any_data"}  # tests/test_sources.py


def test_bool_flags_go_both_ways():
    assert {field.name for field in dataclasses.fields(spirl.Args) if field.type is bool} == BOOLS
    for name in BOOLS:
        for given, value in ((f"--{name}", True), (f"--no-{name}", False)):
            assert getattr(spirl.parse_args([given.replace("_", "-")]), name) is value


def test_variants_run(run, data_dir, monkeypatch):
    results, _ = run("--no-position-features --no-pretrain-lr-decay --total-timesteps 600 --retrain")
    assert results["updates"] == 40
    names = [path.name for path in (data_dir / "pretrained").iterdir()]
    run("--position-features --total-timesteps 400 --eval-interval 0", "other")
    assert len(list((data_dir / "pretrained").iterdir())) == len(names) + 1


# ---------------------------------------------------------------------------------------------------------- compilation


def optimizer_state(optimizer):
    state = [s for s in optimizer.state.values()]
    return {f"{i} {k}": v.cpu().clone() for i, s in enumerate(state) for k, v in s.items() if k == "exp_avg"}


def few_updates(args, device):
    """Four steps of each phase (two, and a CUDA graph is never replayed); returns all numbers, and gradients' means."""
    torch.manual_seed(0)
    networks = spirl.make_networks(args, 4, 2, device)
    pretrainer, numbers = spirl.Pretrainer(args, networks), {}
    window = [torch.from_numpy(x).float().to(device) for x in pretraining_batch(args)]
    for k in range(4):
        torch.manual_seed(k)
        numbers |= {f"pretrain {name} {k}": value.cpu() for name, value in pretrainer.update(*window).items()}
    numbers |= {f"statistics {name}": value.cpu().float() for name, value in statistics(networks).items()}
    numbers |= {f"pretrain {name}": value for name, value in optimizer_state(pretrainer.optimizers[0]).items()}
    learner = spirl.Learner(args, networks)
    for k in range(4):
        torch.manual_seed(k)
        metrics = learner.update(*(x.to(device) for x in float_batch(4)))
        numbers |= {f"learner {name} {k}": value.cpu() for name, value in metrics.items()}
    for part, optimizer in zip(("critics", "policy"), learner.optimizers):
        numbers |= {f"{part} {name}": value for name, value in optimizer_state(optimizer).items()}
    return numbers


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_gives_the_numbers_of_eager_code(device, monkeypatch, eager_random):
    args = tiny_args(hidden_dim=8, critic_dim=8, pretrain_lr_decay=False, clip_updates=0)
    eager = few_updates(args, device)
    compiled_functions = []
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled_functions.append(f) or compile_function(f, **kw))
    compiled = few_updates(dataclasses.replace(args, compile=True), device)
    assert set(compiled_functions) == {spirl.pretrain_loss, spirl.critic_loss, spirl.policy_loss}
    assert compiled.keys() == eager.keys() and len(eager) > 100
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
