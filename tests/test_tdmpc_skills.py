"""tdmpc_skills.py against independent NumPy versions and known optima."""

import copy
import dataclasses
import functools
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_nets import NO_SCORES, has_gradient, np_features, np_net, random_obs, rl_batch, same_weights
from skimo_tools import fill, floats, np_q, skill_reward, tensors
from test_spirl import noisy_copy, np_log_prob, np_prior, same_statistics

from algos import dreamer_skills, reskill, spirl, supe
from algos import tdmpc as flat
from algos import tdmpc_skills as tdmpc


def tiny_args(**changes):
    small = dict(
        device="cpu", cudagraphs=False, hidden_dim=16, model_dim=16, latent_dim=8, skill_dim=3,
        skill_horizon=5, num_skills=3, num_envs=2, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=6,
        cem_iters=2, pretrain_batch_size=8, pretrain_updates=6, pretrain_eval_episodes=1, eval_episodes=2,
        total_timesteps=1200, warmup_steps=400,
    )  # fmt: skip
    return tdmpc.Args(**(small | changes))


def new_agent(args, double=False, seed=0):
    """An agent with all weights random, and a target and a prior of their own."""
    torch.manual_seed(seed)
    agent = tdmpc.Agent(args, noisy_copy(tdmpc.make_networks(args), seed + 1))
    if double:
        for k, name in enumerate(("model", "target", "task_policy", "skill_prior")):
            setattr(agent, name, noisy_copy(getattr(agent, name).double(), seed + 2 + k).eval())
    return agent


# ------------------------------------------------------------------------------------------------ what is spirl.py's


@functools.cache
def model_path(file, flags=""):
    """Where pre-training with these flags looks for its model."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: True)
        patch.setattr(file, "load", lambda path, parts, **how: dict(facts=dict(path=path)))
        args = file.parse_args([*flags.split(), "--data-dir", "anywhere"])
        return file.pretrain(args, None, SimpleNamespace(fingerprint="data"), None, None)["path"]


@pytest.mark.parametrize("file", [dreamer_skills, reskill, supe, tdmpc])
def test_model_is_shared_with_spirl_and_found_by_what_shaped_it(file):
    """The model's key holds all flags that shape it and the code."""
    for env_id in ("maze", "kitchen", "kitchen-misaligned", "calvin"):
        for more in ("", " --data file", *[" --published"] * (file is not reskill)):  # its release squashes no actions
            assert model_path(file, f"--env-id {env_id}{more}") == model_path(spirl, f"--env-id {env_id}{more}")
    path = model_path(file, "--env-id maze")
    assert path == model_path(file, "--gamma 0.9") == model_path(spirl, "--critic-dim 7")
    changes = ["--kl-coef 0.5", "--pretrain-lr 1", "--seed 2", "--hidden-dim 9", "--no-position-features"]
    if file is tdmpc:  # the others' pretrain is the same text
        assert len({path, *(model_path(file, flags) for flags in changes)}) == 1 + len(changes)


@pytest.mark.parametrize(
    ("file", "env_id"),
    [
        (spirl, "maze"),
        (spirl, "kitchen"),
        (spirl, "calvin"),
        *[(f, "kitchen") for f in (dreamer_skills, reskill, supe, tdmpc)],
    ],
)
def test_published_models_of_spirl_fit(file, env_id):
    args = file.parse_args(["--env-id", env_id, "--pretrained", "published", "--device", "cpu"])
    assert file.pretrain(args, file.make_networks(args), None, None, None)["prior_return"] > 0  # of its roll-outs


# --------------------------------------------------------------------------------------------------------------- losses


def test_squashed_kl_is_the_mean_of_the_releases_estimate():
    """The release draws 100 samples of the policy and scores them, scaled by 2, under the prior."""
    rng = np.random.default_rng(0)
    for scale in (0.05, 0.5):
        p = rng.normal(size=(4, 3)), np.full((4, 3), scale)
        q = rng.normal(size=(4, 3)), rng.uniform(0.3, 1.3, (4, 3))
        x = p[0] + p[1] * rng.normal(size=(100_000, 4, 3))
        log_slope = np.log(2 * (1 - np.tanh(x) ** 2)).sum(-1)
        estimates = np_log_prob(x, p) - log_slope - np_log_prob(2 * np.tanh(x), q)
        kl = tdmpc.squashed_kl(*([torch.from_numpy(v) for v in pair] for pair in (p, q))).numpy()
        assert np.all(np.abs(estimates.mean(0) - kl) < 5 * estimates.std(0) / math.sqrt(len(x)))
    far = torch.full((1, 3), 5.0), torch.full((1, 3), 0.05)  # where 1 - tanh(x)^2 would round to 0
    near = torch.zeros(1, 3), torch.ones(1, 3)
    assert torch.isfinite(tdmpc.squashed_kl(far, near)).all()


def np_encode(model, obs):
    return np_net(list(model.encoder)[1:], np_features(obs))


def np_policy(policy, h, std=0.05):
    mean = np_net(policy, h)
    return mean, np.full_like(mean, std)


def test_model_loss_is_that_of_td_mpc():
    args = tiny_args(gamma=0.9, rho=0.6, consistency_coef=1.9)
    agent, N = new_agent(args, double=True), args.num_skills
    model, target, policy = agent.model, agent.target, agent.task_policy
    batch = obs, u, rewards, dones = rl_batch(args)
    torch.manual_seed(5)
    loss, metrics, h, h_out = tdmpc.model_loss(model, target, policy, *tensors(*batch), args)
    torch.manual_seed(5)
    noise = torch.randn(5, N, 3, dtype=torch.float64).numpy()

    h_pred = [np_encode(model, obs[:, 0])]
    consistency, reward_error, value_error = np.zeros((3, 5))
    for t in range(N):
        next_h = np_encode(model, obs[:, t + 1])
        mean, std = np_policy(policy, next_h)
        next_q = np.minimum(*np_q(target, next_h, np.tanh(mean + std * noise[:, t])))
        td_target = rewards[:, t] + 0.9 * np.where(dones[:, t], 0, next_q)
        hu = np.concatenate([h_pred[t], u[:, t]], -1)
        reward_error += 0.6**t * (np_net(model.reward_model, hu)[:, 0] - rewards[:, t]) ** 2
        value_error += 0.6**t * sum((q - td_target) ** 2 for q in np_q(model, h_pred[t], u[:, t]))
        h_pred.append(np_net(model.dynamics, hu))
        consistency += 0.6**t * np.square(h_pred[-1] - np_encode(target, obs[:, t + 1])).mean(-1)
    expected = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-4), name
    total = (1.9 * consistency + 0.5 * reward_error + 0.1 * value_error).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-4)
    np.testing.assert_allclose(h_out.numpy(), np.stack(h_pred, 1), atol=1e-4)
    np.testing.assert_allclose(h.numpy(), np_encode(model, obs), atol=1e-4)
    loss.backward()
    for module in (model.encoder, model.dynamics, model.reward_model, model.qf1, model.qf2):
        assert has_gradient(module)
    assert not has_gradient(target) and not has_gradient(policy) and not h_out.requires_grad and not h.requires_grad


def test_a_reward_of_100_is_learnt():
    """The release's bound of 1e4 on a window's error would be exceeded, without a gradient beyond."""
    args = tiny_args(consistency_coef=0.0)
    agent = new_agent(args)
    obs, u, rewards, dones = floats(*rl_batch(args, 8))
    rewards[:] = 0
    rewards[:, 0] = 105
    loss, *_ = tdmpc.model_loss(agent.model, agent.target, agent.task_policy, obs, u, rewards, dones, args)
    loss.backward()
    assert has_gradient(agent.model.reward_model) and loss <= 1e5


def test_policy_loss_takes_value_on_imagined_and_kl_on_encoded_states():
    args = tiny_args(rho=0.6, alpha=0.7, policy_std=0.2)
    agent, N = new_agent(args, double=True), args.num_skills
    rng = np.random.default_rng(2)
    obs, h, h_pred = random_obs(rng, 5, N + 1), rng.normal(size=(5, N + 1, 8)), rng.normal(size=(5, N + 1, 8))
    agent.model.requires_grad_(False)
    torch.manual_seed(6)
    nets = agent.model, agent.task_policy, agent.skill_prior
    loss, metrics = tdmpc.policy_loss(*nets, *tensors(obs, h, h_pred), args)
    torch.manual_seed(6)
    noise = torch.randn(5, N + 1, 3, dtype=torch.float64).numpy()
    total, kls, samples = 0, [], rng.normal(size=(20_000, 5, 3))
    for t in range(N + 1):
        pi = np_policy(agent.task_policy, h_pred[:, t], std=0.2)
        q = np.minimum(*np_q(agent.model, h_pred[:, t], np.tanh(pi[0] + pi[1] * noise[:, t])))
        pi = np_policy(agent.task_policy, h[:, t], std=0.2)
        x, p = pi[0] + pi[1] * samples, np_prior(agent.skill_prior, obs[:, t])
        log_pi = np_log_prob(x, pi) - np.log(2 * (1 - np.tanh(x) ** 2)).sum(-1)
        kls.append(np.clip((log_pi - np_log_prob(2 * np.tanh(x), p)).mean(0), -100, 100))
        total += (0.7 * kls[-1] - 0.6**t * q).mean()  # a sum over the window
    assert metrics["prior_kl"].item() == pytest.approx(np.mean(kls), rel=0.02)
    assert loss.item() == pytest.approx(total, rel=0.03)
    loss.backward()
    assert has_gradient(agent.task_policy)
    assert not has_gradient(agent.model) and not has_gradient(agent.skill_prior)


# -------------------------------------------------------------------------------------------------------------- planner


def test_plan_is_that_of_flat_tdmpc_over_skills():
    """tdmpc.py's planner is compared with NumPy in tests/test_tdmpc.py; what it calls an action is u here, z = 2 u."""
    args = tiny_args(num_samples=40, cem_iters=3, temperature=0.7, gamma=0.8)
    known = {field.name for field in dataclasses.fields(flat.Args)}
    theirs = flat.Args(**{name: value for name, value in vars(args).items() if name in known})
    agent = new_agent(args)
    obs, mean = torch.rand(2, 4) * 30, torch.rand(2, 3, 3) - 0.5
    inputs = agent.model, agent.task_policy, obs, mean, torch.tensor(0.05), torch.tensor(1.0)
    torch.manual_seed(0)
    z, fitted = tdmpc.plan(*inputs, args)
    torch.manual_seed(0)
    action, expected = flat.plan(*inputs, theirs)
    assert torch.equal(z, 2 * action) and torch.equal(fitted, expected)


def test_networks_have_the_sizes_of_td_mpc():
    args = tdmpc.Args(env_id="kitchen", device="cpu", position_features=False)
    agent = tdmpc.Agent(args, tdmpc.make_networks(args))
    model = agent.model

    def sizes(net):
        return [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, torch.nn.Linear)]

    assert sizes(model.encoder) == [(30, 256), (256, 50)]
    assert sizes(agent.task_policy) == [(50, 512), (512, 512), (512, 10)]
    assert sizes(model.dynamics) == [(60, 512), (512, 512), (512, 50)]
    for head in (model.reward_model, model.qf1, model.qf2):
        assert sizes(head) == [(60, 512), (512, 512), (512, 1)]
    raw = tdmpc.WorldModel(4, tdmpc.Args(position_features=False)).encoder[0]
    torch.testing.assert_close(raw(torch.tensor([[40.0, 0, 10, -10]])), torch.tensor([[0.5, -0.5, 1, -1]]))


# ---------------------------------------------------------------------------------------------------------------- agent


def test_an_update_gives_the_policy_encoded_and_imagined_states(monkeypatch):
    args = tiny_args()
    agent = new_agent(args)
    obs, u, rewards, dones = floats(*rl_batch(args, 8))
    with torch.no_grad():
        h = agent.model.encoder(obs)
        second = agent.model.next(h[:, 0], u[:, 0])
    given = []
    loss = tdmpc.policy_loss
    monkeypatch.setattr(tdmpc, "policy_loss", lambda *inputs: given.append(inputs) or loss(*inputs))
    agent.update(obs, u, rewards, dones)
    *_, encoded, imagined, _ = given[0]
    torch.testing.assert_close(encoded, h)
    torch.testing.assert_close(imagined[:, :2], torch.stack([h[:, 0], second], 1))


def test_agent_update_moves_what_it_should():
    args = tiny_args()
    agent = new_agent(args)
    with torch.no_grad():
        for value in agent.model.parameters():
            value += 0.01 * torch.randn_like(value)
    start, batch = copy.deepcopy(agent), floats(*rl_batch(args, 8))
    agent.update(*batch)
    for name in ("skills", "skill_prior", "target"):
        assert same_weights(getattr(agent, name), getattr(start, name)), name
    for part in ("encoder", "dynamics", "reward_model", "qf1", "qf2"):
        assert not same_weights(getattr(agent.model, part), getattr(start.model, part)), part
    assert not same_weights(agent.task_policy, start.task_policy)
    for module, before in ((agent.skill_prior, start.skill_prior), (agent.skills, start.skills)):
        assert same_statistics(module, before) and not module.training  # BatchNorm


def test_warmup_explores_with_the_priors_samples_as_they_are():
    agent = new_agent(tiny_args())
    obs = torch.rand(5, 4) * 30
    torch.manual_seed(0)
    z = agent.choose_skills(obs.numpy(), None, explore=True)
    torch.manual_seed(0)
    mean, std = agent.skill_prior(obs)
    assert torch.equal(z, mean + std * torch.randn(5, 3))


def test_planner_starts_from_its_last_plan_moved_on_by_one_skill(short_episodes, monkeypatch):
    means, noise = [], []

    def plan(model, task_policy, obs, mean, min_std, noise_scale, args):
        means.append(mean.clone())
        noise.append(noise_scale.item())
        numbers = 1 + torch.arange(float(mean.shape[1]))[None, :, None].expand_as(mean)
        return torch.zeros(len(obs), 3), numbers  # skills 1, 2, 3 of the plan

    monkeypatch.setattr(tdmpc, "plan", plan)
    agent = new_agent(tiny_args())
    agent.choose_skills(np.zeros((2, 4), dtype=np.float32), 10**6, explore=True)
    agent.last_mean[1] = 0  # the second one begins a new episode
    tdmpc.rollout(agent, tiny_args(), 2, seed=0, global_step=10**6)  # has plans of its own
    agent.choose_skills(np.zeros((2, 4), dtype=np.float32), 10**6, explore=True)
    assert not means[0].any() and means[-1][:, :, 0].tolist() == [[2, 3, 0], [0, 0, 0]]
    assert not means[1].any() and means[2][:, :, 0].tolist() == [[2, 3, 0]] * 2
    assert noise[0] == noise[-1] == 1 and set(noise[1:-1]) == {0}  # in training only


def test_windows_hold_skills_in_order_with_their_ends():
    """Two members, whose episodes of 3 and 5 skills end at other times; 1 and 2 skills are no window of 3."""
    args = tiny_args()
    rb = tdmpc.ReplayBuffer(1, args)
    ends = [[3, 4, 9], [5, 7, 12]]  # skills after which an episode ends
    for t in range(12):
        obs = np.array([[t], [100 + t]], dtype=np.float32)
        ended = np.array([t + 1 in ends[0], t + 1 in ends[1]])
        z = torch.from_numpy(obs).expand(2, 3)
        rb.add(obs=obs, z=z, rewards=obs[:, 0] + 1000, dones=ended, next_obs=obs + 1)
    torch.manual_seed(0)
    obs, u, rewards, dones = rb.sample(3_000)
    first = obs[:, 0, 0]
    assert set(first.tolist()) == {0, 4, 5, 6, 100, 101, 102, 107, 108, 109}
    assert torch.equal(obs[..., 0], first[:, None] + torch.arange(4))
    assert torch.equal(u, obs[:, :3].expand(-1, -1, 3)) and torch.equal(rewards, obs[:, :3, 0] + 1000)
    last = torch.tensor([3, 9, 105, 112]) - 1
    assert torch.equal(dones.bool(), torch.isin(obs[:, :3, 0], last.float()))


def test_windows_start_uniformly():
    args = tiny_args(num_envs=1)
    rb = tdmpc.ReplayBuffer(1, args)
    for t in range(7):  # windows of 3 skills begin at 0 to 4
        obs = np.full((1, 1), t, dtype=np.float32)
        rb.add(obs=obs, z=torch.zeros(1, 3), rewards=np.zeros(1), dones=np.array([t == 6]), next_obs=obs + 1)
    torch.manual_seed(0)
    obs, *_ = rb.sample(10_000)
    assert torch.equal(obs[:, -1, 0], obs[:, 0, 0] + 3)
    counts = torch.bincount(obs[:, 0, 0].long())
    assert len(counts) == 5 and torch.all((counts - 2000).abs() < 5 * math.sqrt(1600))


def test_agent_and_planner_find_the_skills_that_pay():
    args = tiny_args(
        skill_dim=2, num_skills=2, num_envs=10, batch_size=64, model_dim=32, alpha=0.0, gamma=0.5, num_samples=64,
        num_elites=16, cem_iters=4, temperature=5.0, learning_rate=3e-3, position_features=False, policy_std=0.3,
    )  # fmt: skip
    agent = new_agent(args)
    rb = tdmpc.ReplayBuffer(4, args)
    fill(rb, args)
    for k in range(400):
        agent.update(*rb.sample(args.batch_size))
        if k % 2 == 0:
            agent.target.follow(agent.model, args.tau)
    obs = np.random.default_rng(9).uniform(5, 35, (200, 4)).astype(np.float32)
    with torch.no_grad():
        h = agent.model.encoder(torch.from_numpy(obs))
        policy = torch.tanh(agent.task_policy(h))
    planned = agent.choose_skills(obs, 10**6, explore=False) / 2  # u
    assert skill_reward(policy.numpy()).mean() > 0.7
    assert skill_reward(planned.numpy()).mean() > 0.8


# ------------------------------------------------------------------------------------------------------------- training


def test_plans_and_updates_keep_step_with_the_environments(short_episodes, tmp_path, monkeypatch):
    """Schedules of 400 and 600 env steps from the warm-up's end, 400, on."""
    horizons, plan = [], tdmpc.plan

    def noted_plan(model, task_policy, obs, mean, min_std, *rest, **given):
        horizons.append((mean.shape[1], min_std.item()))
        return plan(model, task_policy, obs, mean, min_std, *rest, **given)

    monkeypatch.setattr(tdmpc, "pretrain", lambda *args: {})
    monkeypatch.setattr(tdmpc, "rollout", lambda *args: NO_SCORES)
    monkeypatch.setattr(tdmpc, "plan", noted_plan)
    args = tiny_args(updates_per_step=0.0333, horizon_steps=400, std_steps=600, run_dir=str(tmp_path))
    args.pretrained = "any"  # so that no data are loaded
    results = tdmpc.train(args)
    assert [K for K, _ in horizons] == [1 + int(2 * min(1, step / 400)) for step in range(0, 800, 10)]
    assert horizons[0][1] == pytest.approx(0.5) and horizons[20][1] == pytest.approx(0.35)
    assert horizons[-1][1] == pytest.approx(0.05)
    assert results["env_steps"] == 1200 and results["updates"] == int(800 * 0.0333)
