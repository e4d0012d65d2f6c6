"""skimo.py's planner on problems with known optima and against a NumPy planner; acting and roll-outs."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_nets import np_gaussian, np_net, random_obs
from skimo_tools import double_networks, np_encode, np_q, tensors, tiny_args

from algos import skimo


# -------------------------------------------------------------------------------------------------------------- planner
class Stub:
    """A model whose latent state is (position, skills done); `reward` and `q` are given functions of (h, z)."""

    def __init__(self, reward=None, q=None):
        self._reward, self._q = reward, q

    def encoder(self, obs):
        return torch.cat([obs, torch.zeros(len(obs), 1)], -1)

    def next(self, h, z):
        return torch.cat([h[..., :-1] + z, h[..., -1:] + 1], -1)

    def reward(self, h, z):
        return self._reward(h, z) if self._reward else torch.zeros(h.shape[:-1])

    def q(self, h, z):
        value = self._q(h, z) if self._q else torch.zeros(h.shape[:-1])
        return value, value + 1  # the smaller one counts


def gaussian_policy(z, log_std):
    """A task policy whose skill is z in every state, give or take."""
    raw = 5 * math.atanh(math.atanh(z) / 5)
    return lambda h: torch.tensor([raw] * 2 + [log_std] * 2).expand(*h.shape[:-1], 4)


def plan_args(**changes):
    sizes = dict(num_samples=400, num_policy_trajs=10, num_elites=40, cem_iters=12, skill_dim=2)
    return tiny_args(**(sizes | changes))


def run_plan(model, obs, K, args, policy=None, min_std=0.01, noise_scale=0.0, seed=0):
    torch.manual_seed(seed)
    obs = torch.as_tensor(obs, dtype=torch.float32)
    policy = policy or gaussian_policy(0.0, 0.0)
    stds = torch.tensor(min_std), torch.tensor(min_std * noise_scale)
    return skimo.plan(model, policy, obs, *stds, K, args)


@pytest.mark.parametrize("K", [1, 3])
def test_plan_finds_the_best_skill_of_every_step(K):
    best = torch.tensor([[0.6, -0.4], [-0.7, 0.2], [0.1, 0.8]])

    def reward(h, z):
        return -20 * (z - best[h[..., -1].long()]).square().sum(-1)

    args = plan_args(num_samples=2000, num_elites=100)
    first, mean = run_plan(Stub(reward), [[0.0, 0.0], [3.0, 1.0]], K, args)
    torch.testing.assert_close(mean, best[:K].expand(2, K, 2), atol=0.08, rtol=0)
    torch.testing.assert_close(first, best[:1].expand(2, 2), atol=0.2, rtol=0)


@pytest.mark.parametrize("K", [1, 3])
def test_plan_follows_the_critic_behind_the_last_skill(K):
    goal = torch.tensor([0.5, -0.3]) * K

    def q(h, z):
        assert torch.all(h[..., -1] == K)
        return -100 * (h[..., :2] - goal).square().sum(-1) - 30 * (z[..., 0] - 0.5).square()

    def policy(h):  # proposes anything, but goes on with 0.5
        return torch.where(h[..., -1:] < K, gaussian_policy(0.0, 0.0)(h), gaussian_policy(0.5, -10.0)(h))

    _, mean = run_plan(Stub(q=q), [[0.0, 0.0]], K, plan_args(), policy=policy)
    torch.testing.assert_close(mean.sum(1), goal[None], atol=0.1, rtol=0)


def test_plans_whose_states_overflow_are_never_elite():
    def reward(h, z):  # best at 0.5, beyond it the model breaks
        value = -20 * (z - 0.5).square().sum(-1)
        return torch.where((z > 0.6).any(-1), torch.full_like(value, torch.nan), value)

    args = plan_args(num_samples=2000, num_elites=50)
    first, mean = run_plan(Stub(reward), torch.zeros(2, 2), 1, args)
    torch.testing.assert_close(mean, torch.full((2, 1, 2), 0.5), atol=0.08, rtol=0)
    assert first.isfinite().all()


def test_one_overflown_plan_of_the_policy_does_not_spoil_the_search():
    """The policy proposes NaN for the second skill of one plan in ten, as it does in a state that overflowed."""

    def policy(h):
        out = torch.zeros(*h.shape[:-1], 4)
        if h.shape[1] == 10 and h[0, 0, -1] == 1:
            out[:, 3] = torch.nan
        return out

    def reward(h, z):
        return -20 * (z - 0.5).square().sum(-1)

    first, mean = run_plan(Stub(reward), [[0.0, 0.0]], 2, plan_args(), policy=policy)
    torch.testing.assert_close(mean, torch.full((1, 2, 2), 0.5), atol=0.1, rtol=0)
    assert first.isfinite().all()


def test_plans_stay_inside_the_skills_range():
    def reward(h, z):
        return 100 * z.sum(-1)  # the further the better

    args = plan_args()
    first, mean = run_plan(Stub(reward), [[0.0, 0.0]], 2, args, noise_scale=1.0, min_std=0.5)
    torch.testing.assert_close(mean, torch.full((1, 2, 2), 0.999), atol=1e-3, rtol=0)
    firsts = torch.cat([run_plan(Stub(reward), [[0.0, 0.0]], 2, args, None, 0.5, 1.0, s)[0] for s in range(20)])
    assert firsts.abs().max() <= 0.999 + 1e-6
    assert (firsts < 0.99).any() and (firsts > 0.998).any()


@pytest.mark.parametrize("min_std", [0.05, 0.5])
def test_least_std_is_kept_and_explored_with(min_std):
    def reward(h, z):
        return -1e4 * z.square().sum(-1)  # elites collapse to 0

    args = plan_args(cem_iters=6)
    obs = torch.zeros(300, 2)
    quiet = run_plan(Stub(reward), obs, 1, args, min_std=min_std, noise_scale=0.0)[0]
    noisy = run_plan(Stub(reward), obs, 1, args, min_std=min_std, noise_scale=1.0)[0]
    assert quiet.std().item() < 0.4 * min_std
    clipped = torch.randn(100_000) * min_std
    assert noisy.std().item() == pytest.approx(clipped.clamp(-0.999, 0.999).std().item(), rel=0.15)


def test_elite_is_drawn_with_the_softmax_of_its_value():
    args = plan_args(num_samples=1, num_policy_trajs=2, num_elites=3, cem_iters=1, temperature=0.5)
    draws = 4000
    firsts, _ = run_plan(Stub(lambda h, z: 2 * z[..., 0]), torch.zeros(draws, 2), 1, args)
    torch.manual_seed(0)
    policy = torch.tanh((1 + 1e-4) * torch.randn(draws, 2, 2))
    mean, std = policy.mean(1), policy.std(1).maximum(torch.tensor(0.01))
    sample = (mean + std * torch.randn(draws, 1, 1, 2)[:, 0, 0]).clamp(-0.999, 0.999)
    plans = torch.cat([sample[:, None], policy], 1)  # (draws, 3, 2)
    weight = torch.softmax(plans[..., 0], 1)  # 0.5 * 2 z
    picked = (plans.clamp(-0.999, 0.999) - firsts[:, None]).abs().sum(-1)
    assert picked.min(1).values.max() < 1e-5
    picked = picked.argmin(1)
    for rank in range(3):  # how often the k-th plan is taken, against the sum of its probabilities
        expected, variance = weight[:, rank].sum(), (weight[:, rank] * (1 - weight[:, rank])).sum()
        assert abs((picked == rank).sum() - expected) < 4.5 * variance.sqrt()


def test_plan_agrees_with_a_numpy_planner():
    args = tiny_args(num_samples=12, num_policy_trajs=3, num_elites=5, cem_iters=3, gamma=0.8, temperature=0.7)
    E, K, Z, P = 2, 3, args.skill_dim, 15
    model, _, policy = double_networks(args).values()
    obs = random_obs(np.random.default_rng(4), E)
    torch.manual_seed(9)
    stds = torch.tensor([0.3, 0.2], dtype=torch.float64)
    skill, mean_out = skimo.plan(model, policy, *tensors(obs), *stds, K, args)
    torch.manual_seed(9)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=dtype).numpy().astype(np.float64)

    h0 = np_encode(model.encoder, obs)
    h, proposals = np.repeat(h0[:, None], 3, 1), []
    for _ in range(K):
        m, s = np_gaussian(np_net(policy, h))
        proposals.append(np.tanh(m + s * normal(E, 3, Z)))
        h = np_net(model.dynamics, np.concatenate([h, proposals[-1]], -1))
    proposed = np.stack(proposals, 2)
    mean, std = proposed.mean(1), np.maximum(proposed.std(1, ddof=1), 0.3)
    for _ in range(3):
        plans = mean[:, None] + std[:, None] * normal(E, 12, K, Z, dtype=torch.float32)
        plans = np.concatenate([np.clip(plans, -0.999, 0.999), proposed], 1)
        h, value = np.repeat(h0[:, None], P, 1), np.zeros((E, P))
        for t in range(K):
            hz = np.concatenate([h, plans[:, :, t]], -1)
            value += 0.8**t * np_net(model.reward_model, hz)[..., 0]
            h = np_net(model.dynamics, hz)
        m, s = np_gaussian(np_net(policy, h))
        value += 0.8**K * np.minimum(*np_q(model, h, np.tanh(m + s * normal(E, P, Z))))
        new_mean, new_std = np.zeros_like(mean), np.zeros_like(std)
        elites, weights = [], []
        for e in range(E):
            best = np.argsort(-value[e])[:5]
            w = np.exp(0.7 * value[e][best])
            w /= w.sum()
            elite = plans[e][best]
            centre = np.average(elite, axis=0, weights=w)
            new_std[e] = np.sqrt(np.average((elite - centre) ** 2, axis=0, weights=w))
            new_mean[e] = 0.1 * mean[e] + 0.9 * centre
            elites.append(elite)
            weights.append(w)
        mean, std = new_mean, np.maximum(new_std, 0.3)
    np.testing.assert_allclose(mean_out.numpy(), mean, atol=1e-5)
    race = torch.empty(E, 5, dtype=torch.float64).exponential_().numpy()
    picked = [np.argmax(weights[e] / race[e]) for e in range(E)]
    expected = np.stack([elites[e][picked[e]][0] for e in range(E)]) + 0.2 * normal(E, Z)
    np.testing.assert_allclose(skill.numpy(), np.clip(expected, -0.999, 0.999), atol=1e-5)


@pytest.fixture
def logged(monkeypatch):
    """An agent whose plans are only noted, and the notes."""
    calls = []

    def plan(model, task_policy, obs, min_std, noise_std, K, args):
        calls.append(SimpleNamespace(K=K, min_std=min_std.item(), noise=noise_std.item()))
        return torch.zeros(len(obs), args.skill_dim), None

    monkeypatch.setattr(skimo, "plan", plan)
    args = tiny_args(num_skills=10, horizon_steps=25_000, std_steps=50_000)
    return skimo.Agent(args, skimo.make_networks(args)), calls


def test_plans_follow_their_schedules(logged):
    agent, calls = logged
    obs = np.zeros((2, 4), dtype=np.float32)
    for step in (0, 2777, 2778, 12_500, 24_999, 25_000, 50_000, 10**6):
        agent.choose_skills(obs, step, explore=True)
    assert [call.K for call in calls] == [1, 1, 2, 5, 9, 10, 10, 10]
    stds = [0.5, 0.4727854, 0.4727756, 0.3775, 0.2550098, 0.255, 0.01, 0.01]
    assert [call.min_std for call in calls] == pytest.approx(stds, rel=1e-5)
    assert [call.noise for call in calls] == [call.min_std for call in calls]
    agent.choose_skills(obs, 0, explore=False)
    assert (calls[-1].min_std, calls[-1].noise) == (0.5, 0)


def test_plans_are_recorded_once_for_each_length_and_number_of_environments(logged):
    """A graph has fixed shapes."""
    agent, calls = logged
    obs = np.zeros((2, 4), dtype=np.float32)
    for step in (0, 100, 24_999, 24_999, 25_000, 10**6):
        agent.choose_skills(obs, step, explore=True)
        agent.choose_skills(obs[:1], 0, explore=False)
    assert list(agent.planners) == [(2, 1), (1, 1), (2, 9), (2, 10)]
    assert [call.K for call in calls[::2]] == [1, 1, 9, 9, 10, 10]


# ------------------------------------------------------------------------------------------------- acting and roll-outs
class FakeEnvs:
    """Members that end after given numbers of steps and then stand still; obs counts steps, reward is member + 1."""

    def __init__(self, lengths):
        self.lengths, self.closed, self.actions = np.array(lengths), False, []

    def reset(self, seed=None, options=None):
        self.steps, self.returns = np.zeros((2, len(self.lengths)))
        torch.rand(3)  # an environment may draw, too
        return self._obs(), {}

    def _obs(self):
        return np.repeat(self.steps[:, None], 4, 1).astype(np.float32)

    def step(self, action):
        running = self.steps < self.lengths
        self.actions.append(action)
        self.steps += running
        reward = running * (np.arange(len(self.lengths)) + 1.0)
        self.returns += reward
        ended, even = self.steps >= self.lengths, np.arange(len(self.lengths)) % 2 == 0
        return self._obs(), reward, ended & even, ended & ~even, {}

    def close(self):
        self.closed = True


def test_execute_skill_sums_rewards_until_all_have_ended():
    args = tiny_args(skill_horizon=5)
    skills = skimo.make_networks(args)["skills"]
    envs = FakeEnvs([3, 20, 1, 20])
    obs, _ = envs.reset()
    z = torch.rand(4, 3)
    obs, rewards, ended = skimo.execute_skill(envs, skills, obs, z, args)
    assert rewards.tolist() == [3, 10, 3, 20] and rewards.dtype == np.float32
    assert ended.tolist() == [True, False, True, False]
    assert obs[:, 0].tolist() == [3, 5, 1, 5]
    for action, seen in zip(envs.actions, [[0] * 4, [1] * 4, [2, 2, 1, 2], [3, 3, 1, 3], [3, 4, 1, 4]], strict=True):
        x = np.repeat(np.array(seen, dtype=np.float64)[:, None], 4, 1)
        inputs = np.concatenate([np_encode(skills.encoder, x), z.numpy()], -1)
        expected = np.tanh(np_gaussian(np_net(skills.skill_policy, inputs))[0])
        np.testing.assert_allclose(action, expected, atol=1e-5)  # the mode of pi_L
    _, rewards, _ = skimo.execute_skill(envs, skills, obs, z, args)  # who waits earns nothing
    assert rewards.tolist() == [0, 10, 0, 20]


@pytest.mark.parametrize("global_step", [7, None])
def test_rollout_scores_whole_episodes_and_leaves_the_random_state_alone(global_step, monkeypatch):
    args = tiny_args(skill_horizon=5)
    made, chosen = [], []

    def make_envs(env_id, num_envs, video):
        made.append(FakeEnvs([7, 50]))
        return made[-1]

    def choose_skills(obs, step, explore):
        assert step == global_step and not explore
        chosen.append(torch.rand(2, 3))
        return chosen[-1]

    agent = SimpleNamespace(skills=skimo.make_networks(args)["skills"], choose_skills=choose_skills)
    monkeypatch.setattr(skimo.data_tools, "make_envs", make_envs)
    before = torch.get_rng_state()
    scores = skimo.rollout(agent, args, 2, seed=4, global_step=global_step)
    assert torch.equal(torch.get_rng_state(), before)
    assert scores == dict(episodic_return=(7 + 100) / 2, episodic_length=57 / 2, success=0.5)  # 100 is the goal
    assert made[0].closed and len(made[0].actions) == 50 and len(chosen) == 10
    for seed in (4, 5):
        skimo.rollout(agent, args, 2, seed=seed, global_step=global_step)
    assert torch.equal(torch.stack(chosen[10:20]), torch.stack(chosen[:10]))
    assert not torch.equal(torch.stack(chosen[20:]), torch.stack(chosen[:10]))
