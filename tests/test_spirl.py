"""spirl.py against independent NumPy versions and toys with known solutions."""

import copy
import dataclasses
import math
import threading
from types import SimpleNamespace

import numpy as np
import numpy_nets
import pytest
import torch
from numpy_nets import NO_CURVES, NO_SCORES, has_gradient, np_features, np_kl, np_lstm, np_net, random_obs, same_weights
from torch import nn

import data_tools
from algos import spirl

# -------------------------------------------------------------------------------------------------------------- helpers


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", hidden_dim=16, critic_dim=16, critic_blocks=2, skill_dim=3,
        skill_horizon=5, num_envs=2, batch_size=8, buffer_size=500, pretrain_batch_size=8, pretrain_updates=6,
        pretrain_eval_episodes=1, eval_episodes=2, total_timesteps=1200, warmup_skills=80,
    )  # fmt: skip
    return spirl.Args(**(small | changes))


def np_gaussian(x):
    mean, log_std = np.split(x, 2, -1)
    return mean, np.exp(np.clip(log_std, -10, 2))


def np_log_prob(x, p):
    return (-0.5 * ((x - p[0]) / p[1]) ** 2 - np.log(p[1]) - 0.5 * np.log(2 * np.pi)).sum(-1)


def np_inputs(obs, maze=True):
    return np_features(obs) if maze else obs


def np_prior(prior, obs, maze=True, training=False):
    return np_gaussian(np_net(prior.net, np_inputs(obs, maze), training))


def noisy_copy(module, seed=1):
    """With other statistics of BatchNorm, too."""
    module = numpy_nets.noisy_copy(module, seed)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            layer.running_mean.copy_(torch.randn_like(layer.running_mean))
            layer.running_var.copy_(0.5 + torch.rand_like(layer.running_var))
    return module


def double_networks(args, seed=0):
    torch.manual_seed(seed)
    return noisy_copy(spirl.make_networks(args).double(), seed)


# --------------------------------------------------------------------------------------------------------- pre-training


def pretraining_batch(args, B=6):
    rng = np.random.default_rng(0)
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    H = args.skill_horizon
    obs = random_obs(rng, B, H + 1) if obs_dim == 4 else rng.normal(size=(B, H + 1, obs_dim))
    return obs, rng.uniform(-1, 1, (B, H, action_dim))


@pytest.mark.parametrize("env_id", ["maze", "kitchen"])
def test_pretrain_loss_is_that_of_spirl(env_id):
    maze = env_id == "maze"
    args = tiny_args(env_id=env_id, kl_coef=0.3, position_features=maze)
    skills, prior = double_networks(args).train().values()
    obs, actions = pretraining_batch(args)
    torch.manual_seed(3)
    loss, metrics = spirl.pretrain_loss(skills, prior, torch.from_numpy(obs), torch.from_numpy(actions), args)
    torch.manual_seed(3)
    noise = torch.randn(len(obs), 3, dtype=torch.float64).numpy()

    x = np_net([skills.lstm_input], np.concatenate([actions, np_inputs(obs[:, :-1], maze)], -1))
    q = np_gaussian(np_net([skills.lstm_output, skills.skill_encoder], np_lstm(skills.lstm, x)))
    z = q[0] + q[1] * noise
    inputs = [np.concatenate([np_inputs(obs[:, t], maze), z], -1) for t in range(args.skill_horizon)]
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
    skills, prior = double_networks(args).values()
    batch = [torch.from_numpy(x) for x in pretraining_batch(args)]

    def gradients(skills, prior):
        torch.manual_seed(0)
        skills, prior = copy.deepcopy(skills), copy.deepcopy(prior)
        loss, metrics = spirl.pretrain_loss(skills, prior, *batch, args)
        loss.backward()
        assert not any(value.requires_grad for value in metrics.values())
        return [[value.grad for value in module.parameters()] for module in (skills, prior)]

    of_skills, of_prior = gradients(skills, prior)
    assert all(value.abs().sum() > 0 for value in [*of_skills[:2], *of_prior[:2]])
    without_prior = gradients(skills, noisy_copy(prior))[0]
    assert all(map(torch.equal, without_prior, of_skills))  # the prior's likelihood does not reach q
    other = copy.deepcopy(skills)
    other.skill_policy = noisy_copy(skills.skill_policy)
    assert all(map(torch.equal, gradients(other, prior)[1], of_prior))


def constant_direction_data(seed, episodes=60, skills=12, H=5):
    """Each chunk of H actions pushes into one random direction, which is what a skill has to encode."""
    rng = np.random.default_rng(seed)
    actions = np.repeat(rng.uniform(-0.9, 0.9, (episodes, skills, 2)), H, 1)
    position = 20 + np.concatenate([np.zeros((episodes, 1, 2)), actions.cumsum(1)[:, :-1]], 1)
    obs = np.concatenate([position, np.zeros_like(position)], -1)
    ends = np.tile(np.arange(skills * H) == skills * H - 1, episodes)
    return data_tools.OfflineDataset(obs.reshape(-1, 4), actions.reshape(-1, 2), ends, np.zeros_like(ends))


def pretrain(args, data, folder, monkeypatch):
    """spirl.pretrain without roll-outs; returns the networks and what is noted at every step of the optimizer."""
    steps = []
    step = torch.optim.RAdam.step

    def noted(self, closure=None):
        weights = [value for group in self.param_groups for value in group["params"]]
        norm = torch.stack([value.grad.square().sum() for value in weights]).sum().sqrt().item()
        steps.append((norm, self.param_groups[0]["lr"]))
        return step(self, closure)

    monkeypatch.setattr(torch.optim.RAdam, "step", noted)
    monkeypatch.setattr(spirl, "rollout", lambda *given: NO_SCORES)
    args.data_dir = str(folder)
    torch.manual_seed(0)
    networks = spirl.make_networks(args)
    spirl.pretrain(args, networks, data, NO_CURVES, threading.Event())
    return networks, steps


@pytest.mark.parametrize("decay", [True, False])
def test_gradient_is_bounded_in_the_first_updates_and_the_rate_decays(decay, tmp_path, monkeypatch):
    args = tiny_args(pretrain_updates=104, pretrain_lr_decay=decay)
    _, steps = pretrain(args, constant_direction_data(0), tmp_path, monkeypatch)
    norms, rates = zip(*steps)
    assert norms[:100] == pytest.approx([0.001] * 100, rel=1e-2) and min(norms[100:]) > 0.1
    assert rates == pytest.approx([1e-3 * (math.sqrt(1 - k / 104) if decay else 1) for k in range(104)])


def test_pretraining_learns_skills_and_what_the_prior_can_know_of_them(tmp_path, monkeypatch):
    args = tiny_args(
        hidden_dim=32, pretrain_updates=500, pretrain_lr=3e-3, pretrain_batch_size=64, kl_coef=1e-3,
        position_features=False,
    )  # fmt: skip
    networks, _ = pretrain(args, aligned_windows(constant_direction_data(0)), tmp_path, monkeypatch)
    test = constant_direction_data(100)
    row = torch.arange(60)[:, None] * 60 + torch.arange(args.skill_horizon + 1)
    batch = test.observations[row], test.actions[row[:, :-1]]
    with torch.no_grad():
        _, metrics = spirl.pretrain_loss(*networks.eval().values(), *batch, args)
    assert metrics["bc_loss"] < 0.1 * test.actions.var()
    assert metrics["prior_kl"] < metrics["kl_loss"] + 1  # directions are uniform: no better than the standard normal


def aligned_windows(data, H=5):
    """The data with windows that begin where a direction begins."""

    def sample_windows(batch_size, window):
        first = torch.randint(60, (batch_size, 1)) * 60 + H * torch.randint(11, (batch_size, 1))
        row = first + torch.arange(window)
        return data.observations[row], data.actions[row[:, :-1]]

    windows = SimpleNamespace(sample_windows=sample_windows, source="a test", fingerprint="of a test")
    windows.to = lambda device: windows
    windows.split = lambda share, length: (windows, windows)
    return windows


def test_tanh_of_actions_is_for_acting_only():
    obs, z = torch.from_numpy(random_obs(np.random.default_rng(0), 7)).float(), torch.randn(7, 3)
    for squash_actions in (False, True):
        skills = noisy_copy(spirl.make_networks(tiny_args(squash_actions=squash_actions))).eval()["skills"]
        raw = skills.skill_policy(torch.cat([skills.features(obs), z], -1))
        torch.testing.assert_close(skills.act(obs, z), raw.tanh() if squash_actions else raw)
        torch.testing.assert_close(skills.predict(obs, z), raw)  # what pre-training compares with the data


# -------------------------------------------------------------------------------------------------------- downstream RL


def rl_batch(B=5):
    rng = np.random.default_rng(1)
    rewards, dones = 3 * rng.normal(size=B), (rng.random(B) < 0.4).astype(np.float64)
    return random_obs(rng, B), rng.uniform(-2, 2, (B, 3)), rewards, dones, random_obs(rng, B)


def double_agent(args):
    agent = spirl.Agent(args, double_networks(args))
    agent.task_policy, agent.critics, agent.target = (
        noisy_copy(module.double(), seed).eval()
        for seed, module in ((2, agent.task_policy), (3, agent.critics), (4, agent.critics))
    )
    return agent


def near_the_prior(agent):
    """A task policy some tenths of a nat away from the prior: no KL gets to its bound."""
    agent.task_policy = copy.deepcopy(agent.skill_prior)
    with torch.no_grad():
        for weight in agent.task_policy.parameters():
            weight += 0.01 * torch.randn_like(weight)
    agent.task_policy.requires_grad_(True)
    return agent


def far_from_the_prior(agent):
    """Some KLs are beyond their bound."""
    with torch.no_grad():
        agent.task_policy.net[-1].weight.mul_(10)
    return agent


def np_critics(critics, obs, z):
    inputs = np.concatenate([np_features(obs), z], -1)
    return np_net(critics.qf1, inputs)[:, 0], np_net(critics.qf2, inputs)[:, 0]


@pytest.mark.parametrize("near", [True, False])
def test_critic_loss_holds_the_policy_to_the_prior_in_its_target(near):
    args = tiny_args(gamma=0.9)
    torch.manual_seed(4)
    agent = (near_the_prior if near else far_from_the_prior)(double_agent(args))
    obs, z, rewards, dones, next_obs = batch = rl_batch()
    torch.manual_seed(5)
    nets = agent.critics, agent.target, agent.task_policy, agent.skill_prior
    alpha = torch.tensor(0.7, dtype=torch.float64)
    loss, metrics = spirl.critic_loss(*nets, *(torch.from_numpy(x) for x in batch), alpha, args)
    torch.manual_seed(5)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()

    pi = np_prior(agent.task_policy, next_obs)
    kl = np_kl(pi, np_prior(agent.skill_prior, next_obs))
    assert ((kl > 0.01) & (kl < 100)).all() if near else (kl > 100).any()
    kl = np.clip(kl, -100, 100)
    next_q = np.minimum(*np_critics(agent.target, next_obs, 2 * np.tanh(pi[0] + pi[1] * noise)))
    td_target = rewards + 0.9 * np.where(dones, 0, next_q - 0.7 * kl)
    q1, q2 = np_critics(agent.critics, obs, z)
    expected = 0.5 * np.square(q1 - td_target).mean() + 0.5 * np.square(q2 - td_target).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert metrics["td_target"].item() == pytest.approx(td_target.mean(), rel=1e-5)
    loss.backward()
    assert has_gradient(agent.critics.qf1) and has_gradient(agent.critics.qf2)
    for module in (agent.target, agent.task_policy, agent.skill_prior):
        assert not has_gradient(module)


@pytest.mark.parametrize("near", [True, False])
def test_policy_terms_are_prior_kl_and_value(near):
    args = tiny_args()
    torch.manual_seed(4)
    agent = (near_the_prior if near else far_from_the_prior)(double_agent(args))
    obs = rl_batch()[0]
    agent.critics.requires_grad_(False)
    torch.manual_seed(6)
    prior_kl, q_value = spirl.policy_terms(agent.critics, agent.task_policy, agent.skill_prior, torch.from_numpy(obs))
    torch.manual_seed(6)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()
    pi = np_prior(agent.task_policy, obs)
    kl = np_kl(pi, np_prior(agent.skill_prior, obs))
    assert ((kl > 0.01) & (kl < 100)).all() if near else (kl > 100).any()
    kl = np.clip(kl, -100, 100)
    q = np.minimum(*np_critics(agent.critics, obs, 2 * np.tanh(pi[0] + pi[1] * noise)))
    assert prior_kl.item() == pytest.approx(kl.mean(), rel=1e-5)
    assert q_value.item() == pytest.approx(q.mean(), rel=1e-5)
    prior_kl.backward(retain_graph=True)
    assert has_gradient(agent.task_policy) == near  # none beyond the bound
    (-q_value).backward()
    assert has_gradient(agent.task_policy)
    assert not has_gradient(agent.critics) and not has_gradient(agent.skill_prior)


def float_batch(B=8):
    return [torch.from_numpy(x).float() for x in rl_batch(B)]


def random_agent(args, seed=0):
    torch.manual_seed(seed)
    agent = spirl.Agent(args, noisy_copy(spirl.make_networks(args), seed))
    with torch.no_grad():
        for value in [*agent.critics.parameters(), *agent.task_policy.parameters()]:
            value += 0.01 * torch.randn_like(value)
    return agent


def test_update_moves_what_it_should():
    agent = random_agent(tiny_args())
    start = copy.deepcopy(agent)
    agent.update(*float_batch())
    assert same_weights(agent.skills, start.skills) and same_weights(agent.skill_prior, start.skill_prior)
    for part in ("qf1", "qf2"):
        assert not same_weights(getattr(agent.critics, part), getattr(start.critics, part))
    changed = [not torch.equal(a, b) for a, b in zip(agent.task_policy.parameters(), start.task_policy.parameters())]
    assert all(changed)  # BatchNorm's scales and shifts, too
    assert all(value.requires_grad for value in agent.critics.parameters())


def test_update_takes_the_new_alpha_but_policy_and_critics_of_before():
    """The order of the release: alpha, then both losses, then both steps."""
    args = tiny_args(alpha=0.5, learning_rate=0.03, target_kl=0.0)
    agent, batch = random_agent(args), float_batch()
    critics, target, policy = map(copy.deepcopy, (agent.critics, agent.target, agent.task_policy))
    torch.manual_seed(4)
    metrics = agent.update(*batch)

    torch.manual_seed(4)
    prior_kl, q_value = spirl.policy_terms(critics, policy, agent.skill_prior, batch[0])
    alpha = (torch.tensor(0.5).log() + 0.03).exp()  # Adam's first step is as long as its learning rate
    assert metrics["alpha"].item() == pytest.approx(alpha.item(), rel=1e-5)
    (alpha * prior_kl - q_value).backward()
    critics.zero_grad()
    loss, _ = spirl.critic_loss(critics, target, policy, agent.skill_prior, *batch, alpha, args)
    loss.backward()
    for now, module in ((agent.critics, critics), (agent.task_policy, policy)):
        torch.optim.Adam(module.parameters(), lr=0.03, fused=True).step()
        for a, b in zip(now.parameters(), module.parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def statistics(module):
    return {name: value for name, value in module.state_dict().items() if "running" in name or "num_batches" in name}


def same_statistics(a, b):
    a, b = statistics(a), statistics(b)
    return len(a) > 0 and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_batch_norm_statistics_move_in_pretraining_only(tmp_path, monkeypatch):
    args = tiny_args(pretrain_updates=2, pretrain_eval_interval=1)
    networks, _ = pretrain(args, constant_direction_data(0), tmp_path, monkeypatch)
    counts = [value.item() for name, value in statistics(networks).items() if "num_batches" in name]
    assert counts == [2] * (5 + 6)  # two updates; validations leave them alone
    before = copy.deepcopy(networks)
    agent = spirl.Agent(args, networks)  # although the networks are still in training mode
    for _ in range(3):
        agent.update(*float_batch())
    assert same_statistics(agent.task_policy, before["prior"]) and same_statistics(agent.skill_prior, before["prior"])
    assert same_statistics(agent.skills, before["skills"])
    one, many = torch.randn(1, 4), torch.randn(7, 4)
    alone = agent.task_policy(one)[0]
    torch.testing.assert_close(agent.task_policy(torch.cat([one, many]))[0][:1], alone)


@pytest.mark.parametrize(("target_kl", "direction"), [(1e3, -1), (-1.0, 1)])
def test_alpha_rises_while_the_kl_exceeds_its_target(target_kl, direction):
    args = tiny_args(alpha=0.5)
    args.target_kl = target_kl
    agent = spirl.Agent(args, spirl.make_networks(args))
    for _ in range(3):
        agent.update(*float_batch())
    assert np.sign(round(agent.log_alpha.exp().item() - 0.5, 6)) == direction


def test_replay_is_a_ring_of_transitions():
    args = tiny_args(buffer_size=5)
    rb = spirl.ReplayBuffer(4, args)

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
    other = spirl.ReplayBuffer(4, args)
    other.load_state_dict(rb.state_dict())
    assert rb.added == other.added == 8 and all(map(torch.equal, rb.columns, other.columns))


def test_sac_finds_the_skill_that_pays_within_reach_of_the_prior():
    """One-step episodes; the best skill is (1, -1, 0). The further the KL may go, the better it is reached."""
    best, returns = torch.tensor([1.0, -1.0, 0.0]), {}
    for target_kl in (0.05, 8.0):
        args = tiny_args(hidden_dim=32, critic_dim=32, target_kl=target_kl, learning_rate=6e-3, num_envs=100)
        torch.manual_seed(1)
        agent = spirl.Agent(args, spirl.make_networks(args))
        with torch.no_grad():
            agent.task_policy.net[-1].weight.mul_(0.01)
        rb = spirl.ReplayBuffer(4, dataclasses.replace(args, buffer_size=2000))
        rng = np.random.default_rng(1)
        for k in range(300):
            obs = random_obs(rng, 100).astype(np.float32)
            if k % 5 == 0:
                z = agent.choose_skills(obs, 0, explore=True)
                reward = 10 - 5 * (z - best).square().sum(-1)
                rb.add(obs, z, reward.numpy(), np.ones(100, dtype=bool), obs)
            metrics = agent.update(*rb.sample(64))
        returns[target_kl] = reward.mean().item()
    assert metrics["prior_kl"].item() < 20
    assert returns[8.0] > 4 and returns[8.0] > returns[0.05] + 3


# ---------------------------------------------------------------------------------------------------- acting, training


def test_the_policy_samples_in_training_and_evaluations_take_its_mode():
    """z = 2 tanh of its Gaussian, with BatchNorm's statistics of pre-training, not of those who act. In pre-training
    the prior samples.
    """
    obs = random_obs(np.random.default_rng(0), 5).astype(np.float32)
    networks = noisy_copy(spirl.make_networks(tiny_args())).train()
    for agent, policy in ((random_agent(tiny_args()), "task_policy"), (spirl.PriorAgent(networks), None)):
        mean, std = np_prior(getattr(agent, policy) if policy else networks["prior"], obs)
        if policy:
            z = agent.choose_skills(obs, 0, explore=False)
            np.testing.assert_allclose(z, 2 * np.tanh(mean), rtol=1e-4, atol=1e-4)
        for members in (slice(5), slice(1)):
            torch.manual_seed(0)
            z = agent.choose_skills(obs[members], None, explore=bool(policy))
            torch.manual_seed(0)
            x = mean[members] + std[members] * torch.randn(z.shape).numpy()
            np.testing.assert_allclose(z, 2 * np.tanh(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ratio", [1.0, 0.3])
def test_updates_keep_step_with_the_skills(ratio, short_episodes, tmp_path, monkeypatch):
    """1,200 env steps are 240 skills of 5 steps, 120 in each of two environments; 80 are warm-up.

    The buffer holds 100.
    """
    order = []
    for owner, name in ((spirl.Agent, "update"), (spirl.ReplayBuffer, "add")):
        original = getattr(owner, name)

        def noted(*args, original=original, name=name, **kwargs):
            order.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)
    monkeypatch.setattr(spirl, "pretrain", lambda *given: {})
    args = tiny_args(updates_per_skill=ratio, buffer_size=100, run_dir=str(tmp_path))
    args.pretrained = "any"  # so that no data are loaded
    results = spirl.train(args)
    assert results["env_steps"] == 1200 and results["updates"] == int((240 - 80) * ratio)
    if ratio == 1.0:  # the warm-up, then two updates after every two skills
        assert order == ["add"] * 40 + ["add", "update", "update"] * 80


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "calvin"])
def test_networks_have_the_sizes_of_the_release(env_id):
    args = spirl.parse_args(["--env-id", env_id, "--device", "cpu"])
    obs_dim, action_dim = data_tools.env_sizes(env_id)
    networks = spirl.make_networks(args)
    inputs = obs_dim + 2 * data_tools.TASKS[env_id].position_periods.size

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
    assert prior[2].weight.std().item() == pytest.approx(std, rel=0.05) and not prior[-1].bias.any()
    for net in (policy, prior):  # in RL, where BatchNorm is still, a bias before it would learn a shift twice
        for layer, after in zip(net, list(net)[1:]):
            assert not isinstance(after, nn.BatchNorm1d) or layer.bias is None
    lstm = networks["skills"].lstm
    assert (lstm.input_size, lstm.hidden_size) == (128, 128)
    assert torch.all((lstm.bias_ih_l0 + lstm.bias_hh_l0)[128:256] == 2)
