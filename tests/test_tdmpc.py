"""tdmpc.py against NumPy versions of its losses, a known optimum, its schedules, and a toy."""

import copy

import numpy as np
import pytest
import torch
from numpy_nets import np_net
from test_dreamer import learn_toy

from algos import dreamer, lsp, tdmpc
from data_tools.tasks.maze import MazeVectorEnv


def tiny_args(**changes):
    small = dict(
        env_id="calvin", device="cpu", cudagraphs=False, position_features=False, num_envs=2, encoder_dim=16,
        latent_dim=8, hidden_dim=16, num_steps=3, batch_size=6, num_samples=16, num_policy_trajs=4, num_elites=6,
        cem_iters=2, policy_std=1e-9,
    )  # fmt: skip
    return tdmpc.Args(**(small | changes))


def tiny_batch(args, seed=0):
    """A batch as SequenceBuffer gives it: rows with what led to them."""
    generator = torch.Generator().manual_seed(seed)
    B, L = args.batch_size, args.num_steps + 1
    obs = torch.randn(B, L, 3, generator=generator)
    action = torch.rand(B, L, 2, generator=generator) * 2 - 1
    terminals = torch.zeros(B, L)
    terminals[::2, -1] = 1
    return obs, action, 3 * torch.randn(B, L, generator=generator), terminals


def new_agent(args, seed=0):
    """An agent whose slow copy and heads have weights of their own."""
    torch.manual_seed(seed)
    agent = tdmpc.Agent(args, 3, 2)
    with torch.no_grad():
        for module in (agent.model, agent.target):
            for weight in module.parameters():
                weight += 0.1 * torch.randn_like(weight)
    return agent


# ------------------------------------------------------------------------------------------------ losses against NumPy
class NpModel:
    def __init__(self, model):
        self.model = model

    def encode(self, obs):
        return np_net(self.model.encoder[1:], obs)  # the first layer makes features: there are none

    def next(self, h, a):
        return np_net(self.model.dynamics, np.concatenate([h, a], -1))

    def reward(self, h, a):
        return np_net(self.model.reward_model, np.concatenate([h, a], -1))[..., 0]

    def q(self, h, a):
        ha = np.concatenate([h, a], -1)
        return np_net(self.model.qf1, ha)[..., 0], np_net(self.model.qf2, ha)[..., 0]


@pytest.mark.parametrize("size", [1, 200])  # of rewards: the greater ones exceed the bound
def test_losses_are_those_of_td_mpc(size):
    args = tiny_args()
    agent = new_agent(args)
    obs, action, rewards, terminals = tiny_batch(args)
    action, rewards, terminals = action[:, 1:], size * rewards[:, 1:], terminals[:, 1:]
    loss, metrics, h = tdmpc.model_loss(agent.model, agent.target, agent.policy, obs, action, rewards, terminals, args)

    online, slow = NpModel(agent.model), NpModel(agent.target)
    o, a, r, end = (x.numpy().astype(np.float64) for x in (obs, action, rewards, terminals))
    state = online.encode(o[:, 0])
    consistency = reward_error = value_error = 0.0
    states = [state]
    for t in range(3):
        next_real = online.encode(o[:, t + 1])
        pi = np.tanh(np_net(agent.policy, next_real))
        future = np.minimum(*slow.q(next_real, pi)) * (1 - end[:, t])
        target = r[:, t] + 0.99 * future
        q1, q2 = online.q(state, a[:, t])
        value_error = value_error + 0.5**t * ((q1 - target) ** 2 + (q2 - target) ** 2)
        reward_error = reward_error + 0.5**t * (online.reward(state, a[:, t]) - r[:, t]) ** 2
        state = online.next(state, a[:, t])
        states.append(state)
        consistency = consistency + 0.5**t * ((state - slow.encode(o[:, t + 1])) ** 2).mean(-1)
    parts = [np.minimum(x, 1e5) for x in (consistency, reward_error, value_error)]
    assert ((reward_error > 1e5) | (value_error > 1e5)).any() == (size == 200)
    expected = (2 * parts[0] + 0.5 * parts[1] + 0.1 * parts[2]).mean() / 3
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(h, np.stack(states, 1), rtol=1e-3, atol=1e-4)
    assert not h.requires_grad
    loss.backward()
    assert all(w.grad is None for net in (agent.target, agent.policy) for w in net.parameters())
    for part in ("encoder", "dynamics", "reward_model", "qf1", "qf2"):
        assert any(w.grad is not None and w.grad.abs().sum() > 0 for w in getattr(agent.model, part).parameters())

    # Eq. 11: all N+1 states count, and the loss is not divided by N
    loss, _ = tdmpc.policy_loss(agent.model.requires_grad_(False), agent.policy, h, args)
    expected = 0.0
    for t, state in enumerate(states):
        q = np.minimum(*online.q(state, np.tanh(np_net(agent.policy, state))))
        expected -= 0.5**t * q.mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    loss.backward()
    assert all(w.grad.abs().sum() > 0 for w in agent.policy.parameters())


def test_update_pairs_a_state_with_what_follows(monkeypatch):
    """Rows hold what led to them: action, reward and end of step t stand in row t + 1."""
    args = tiny_args()
    agent = new_agent(args)
    seen = []
    real = tdmpc.model_loss
    monkeypatch.setattr(tdmpc, "model_loss", lambda *inputs: seen.append(inputs) or real(*inputs))
    obs, action, rewards, terminals = tiny_batch(args)
    before = copy.deepcopy(agent.state_dict())
    agent.update(obs, action, rewards, terminals)
    _, _, _, o, a, r, end, _ = seen[0]
    assert torch.equal(o, obs) and torch.equal(a, action[:, 1:])
    assert torch.equal(r, rewards[:, 1:]) and torch.equal(end, terminals[:, 1:])
    moved = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"model", "policy"}
    assert all(weight.requires_grad for weight in agent.model.parameters())


# ------------------------------------------------------------------------------------------------------------- planning
class Counting:
    """A model whose state counts up: in state (t, ...) the reward is highest where action = best[t]."""

    def __init__(self, best):
        self.best = torch.tensor(best)  # (K+1, A)

    def encoder(self, obs):
        return torch.zeros(len(obs), 1)

    def next(self, h, action):
        return h + 1

    def reward(self, h, action):
        return -10 * (action - self.best[h[..., 0].long()]).square().sum(-1)

    def q(self, h, action):
        return self.reward(h, action), self.reward(h, action) + 1


def constant(value):
    """A policy."""
    return lambda h: torch.full((*h.shape[:-1], 2), value)


@pytest.mark.parametrize("K", [1, 3])
def test_plan_finds_the_best_action_of_every_step(K):
    torch.manual_seed(0)
    args = tiny_args(num_samples=512, num_elites=32, cem_iters=8)
    best = [[0.3, -0.6], [-0.8, 0.1], [0.5, 0.9], [0.0, 0.0]]
    inputs = torch.zeros(2, 3), torch.zeros(2, K, 2), torch.tensor(0.02), 0.0, args
    action, fitted = tdmpc.plan(Counting(best), constant(0.0), *inputs)
    np.testing.assert_allclose(fitted, torch.tensor(best[:K]).expand(2, -1, -1), atol=0.06)
    np.testing.assert_allclose(action, torch.tensor(best[:1]).expand(2, -1), atol=0.12)


def test_plan_against_numpy():
    """Every part of it: proposals, discount, value at the end, weights, deviations, means, bounds, noise."""
    args = tiny_args(
        num_samples=12, num_policy_trajs=3, num_elites=5, cem_iters=3, gamma=0.8, temperature=0.7, policy_std=0.3,
    )  # fmt: skip
    agent = new_agent(args)
    model = NpModel(agent.model)
    obs = torch.randn(2, 3)
    start = torch.rand(2, 3, 2) - 0.5
    torch.manual_seed(5)
    inputs = agent.model, agent.policy, obs, start, torch.tensor(0.3), torch.tensor(1.0), args
    action, fitted = tdmpc.plan(*inputs)

    torch.manual_seed(5)

    def sample(h):
        mean = np_net(agent.policy, h)
        return np.tanh(mean + 0.3 * torch.randn(mean.shape).numpy())

    h0 = model.encode(obs.numpy())[:, None]
    h = np.repeat(h0, 3, 1)
    proposed = []
    for _ in range(3):
        proposed.append(sample(h))
        h = model.next(h, proposed[-1])
    mean, std = start.numpy(), np.full((2, 3, 2), 2.0)
    spreads = []
    for _ in range(3):
        plans = mean[:, None] + std[:, None] * torch.randn(2, 12, 3, 2).numpy()
        plans = np.concatenate([plans.clip(-1, 1), np.stack(proposed, 2)], 1)
        h = np.repeat(h0, 15, 1)
        value = 0.0
        for t in range(3):
            value = value + 0.8**t * model.reward(h, plans[:, :, t])
            h = model.next(h, plans[:, :, t])
        value = value + 0.8**3 * np.minimum(*model.q(h, sample(h)))
        index = np.argsort(-value, 1)[:, :5]
        elites = np.take_along_axis(plans, index[..., None, None], 1)
        weight = np.exp(0.7 * np.take_along_axis(value, index, 1))
        weight /= weight.sum(1, keepdims=True)
        w = weight[..., None, None]
        centre = (w * elites).sum(1)
        spread = np.sqrt((w * (elites - centre[:, None]) ** 2).sum(1))
        std = spread.clip(0.3)
        spreads.append(spread)
        mean = 0.1 * mean + 0.9 * centre
    np.testing.assert_allclose(fitted, mean, atol=1e-5)
    assert np.min(spreads) < 0.3 < np.max(spreads)
    race = weight / torch.empty(2, 5).exponential_().numpy()
    chosen = elites[np.arange(2), race.argmax(1), 0]
    expected = chosen + std[:, 0] * torch.randn(2, 2).numpy()
    np.testing.assert_allclose(action, expected.clip(-1, 1), atol=1e-5)


def test_value_without_a_number_is_the_worst():
    """Also of a policy's plans: as elites of weight 0 they would still make every action NaN."""
    torch.manual_seed(0)

    class Overflow(Counting):
        def reward(self, h, action):
            value = -action.square().sum(-1)
            return torch.where(action[..., 0] > 0, torch.full_like(value, float("nan")), value)

    inputs = torch.zeros(2, 3), torch.zeros(2, 1, 2), torch.tensor(0.05), 0.0
    args = tiny_args(num_elites=4, cem_iters=3)
    action, mean = tdmpc.plan(Overflow([[0.0, 0.0]]), constant(-1.0), *inputs, args)
    assert action.isfinite().all() and mean.isfinite().all() and (action[:, 0] <= 0).all()
    args = tiny_args(num_samples=4, num_policy_trajs=4, num_elites=8)  # all are elites
    action, mean = tdmpc.plan(Counting([[0.3, -0.2]] * 3), constant(float("nan")), *inputs, args)
    assert action.isfinite().all() and mean.isfinite().all()


def test_schedules_and_the_last_plan(monkeypatch):
    args = tiny_args(num_steps=5, horizon_steps=25_000, std_steps=50_000)
    agent = new_agent(args)
    calls = []

    def plan(model, policy, obs, mean, min_std, noise_scale, args):
        calls.append((mean.clone(), float(min_std), float(noise_scale)))
        fitted = torch.arange(1.0, mean.shape[1] + 1)[None, :, None].expand_as(mean)
        return torch.zeros(len(obs), 2), fitted.clone()

    monkeypatch.setattr(tdmpc, "plan", plan)
    obs = np.zeros((2, 3), np.float32)
    last = torch.zeros(2, 0)
    for step, K, std in (
        (0, 1, 0.5), (6_249, 1, 0.443759), (6_250, 2, 0.44375), (12_500, 3, 0.3875), (18_750, 4, 0.33125),
        (24_999, 4, 0.275009), (25_000, 5, 0.275), (10**6, 5, 0.05),
    ):  # fmt: skip
        action, last = agent.act(obs, last, step, explore=True)
        mean, min_std, noise_scale = calls[-1]
        assert action.shape == (2, 2) and mean.shape == (2, K, 2) and noise_scale == 1
        assert min_std == pytest.approx(std, abs=1e-6)
        if step not in (24_999, 10**6):
            assert (mean == 0).all()  # a plan of another length means nothing
    assert mean[0, :, 0].tolist() == [2, 3, 4, 5, 0]  # the last one, moved on by one step
    agent.act(obs, last, 0, explore=False)
    assert calls[-1][2] == 0


def test_noise_is_the_std_of_the_plan_in_training_only():
    torch.manual_seed(0)
    args = tiny_args(num_elites=8, cem_iters=4, num_samples=64)
    inputs = Counting([[0.0, 0.0]] * 2), constant(0.0), torch.zeros(500, 3), torch.zeros(500, 1, 2), torch.tensor(0.3)
    wide = [tdmpc.plan(*inputs, noise_scale, args)[0] for noise_scale in (0.0, 1.0)]
    assert wide[0].std() < 0.15
    assert wide[1].std() == pytest.approx((wide[0].var().item() + 0.3**2) ** 0.5, rel=0.1)
    assert wide[1].abs().max() <= 1


# --------------------------------------------------------------------------------------------------------------- whole


@pytest.mark.parametrize(
    ("module", "num_envs", "warmup", "total"),
    [(file, 1, 1_200, 1_700) for file in (dreamer, lsp, tdmpc)]
    + [(dreamer, 128, 2_500, 4_480), (lsp, 128, 2_500, 4_480), (tdmpc, 128, 5_000, 6_400)],  # their own warm-ups
)
def test_updates_keep_step_with_the_environments(module, num_envs, warmup, total, monkeypatch, tmp_path):
    """Dreamer: 0.2 per env step after the warm-up. TD-MPC: 1 per env step, the warm-up's caught up soon after it.
    With 128 environments Dreamer's first window of 32 rows comes later than the warm-up's end.

    In the warm-up actions are uniform and nobody plans or filters. Plans of an episode that has ended are forgotten.
    """
    ticks, acted, calls, moved = [], [], [], []  # ticks: updates after each env step
    begun = np.ones(num_envs, bool)  # episodes, at the latest env step
    step = MazeVectorEnv.step

    def take(envs, action):
        ticks.append(0)
        acted.append(action)
        result = step(envs, action)
        begun[:] = result[2] | result[3]
        return result

    def act(self, obs, memory, *_, explore):
        calls.append(len(ticks))
        if module is tdmpc:
            assert (memory.flatten(1).sum(1) > 0).tolist() == [len(calls) > 1 and not new for new in begun]
            memory = torch.ones(num_envs, 1, 2)
        return np.zeros((len(obs), 2), np.float32), memory

    def update(self, obs, action, rewards, terminals):
        ticks[-1] += 1
        return {}

    monkeypatch.setattr(MazeVectorEnv, "step", take)
    monkeypatch.setattr(module.Agent, "act", act)
    monkeypatch.setattr(module.Agent, "update", update)
    monkeypatch.setattr(module, "rollout", lambda *args: dict(episodic_return=0.0, success=0.0))
    monkeypatch.setattr(tdmpc.WorldModel, "follow", lambda *args: moved.append(args))
    flags = f"--device cpu --num-envs {num_envs} --total-timesteps {total} --cpu-preset --run-dir {tmp_path}"
    flags += f" --warmup-steps {warmup}" * (num_envs == 1)
    ratio = 1.0 if module is tdmpc else 0.2
    results = module.train(module.parse_args([*flags.split(), "--updates-per-step", str(ratio)]))
    done = np.cumsum(ticks)
    steps = num_envs * np.arange(1, len(ticks) + 1)
    assert results["env_steps"] == steps[-1] == total
    assert (done[steps < warmup] == 0).all()
    uniform = np.concatenate(acted[: warmup // num_envs])
    assert np.abs(uniform).max() <= 1 and np.abs(uniform.mean(0)).max() < 0.06
    np.testing.assert_allclose(uniform.std(0), 1 / np.sqrt(3), atol=0.03)
    assert calls == list(range(-(-warmup // num_envs), len(ticks)))
    due = np.maximum(0, (steps - warmup) * 0.2 + 1e-9).astype(int)
    if module is not tdmpc and num_envs == 128:
        first = list(steps).index(31 * 128)
        assert done[first] == 256 < due[first]  # ten times the updates of one step
        np.testing.assert_array_equal(done[:first], 0)
        np.testing.assert_array_equal(done[first + 1 :], due[first + 1 :])
    elif module is not tdmpc:
        np.testing.assert_array_equal(done, due)
    else:
        late = steps > warmup + warmup / 9 + num_envs
        assert max(ticks) == 10 * num_envs and (done[late] == steps[late]).all()
        assert len(moved) == done[-1] // 2 and all(tau == 0.01 for _, _, tau in moved)  # every second update
    assert results["updates"] == done[-1]


def test_it_learns_the_toy():
    """Random actions get about 8 of 47, a proportional-derivative controller 45."""
    torch.manual_seed(0)
    args = tiny_args(
        num_envs=4, encoder_dim=64, latent_dim=16, hidden_dim=64, num_steps=5, batch_size=64, num_samples=64,
        num_policy_trajs=8, num_elites=16, cem_iters=3, warmup_steps=400, updates_per_step=0.5, std_steps=1_000,
        horizon_steps=1_000, policy_std=0.05, learning_rate=2e-3,
    )  # fmt: skip
    agent = tdmpc.Agent(args, 2, 1)
    rb = tdmpc.SequenceBuffer(2, 1, 6, args)
    mean = torch.zeros(4, 0)

    def plan(obs, step):
        nonlocal mean
        action, mean = agent.act(obs, mean, step, explore=True)
        return action

    def forget(ended):
        mean[ended] = 0

    def move_target(updates):
        if updates % 2 == 0:
            agent.target.follow(agent.model, args.tau)

    reward = lambda x: np.maximum(0, 1 - 2 * np.abs(x))  # noqa: E731
    returns, metrics = learn_toy(args, agent, plan, forget, rb, 1_000, reward, move_target)
    assert np.mean(returns[:2]) < 20
    assert np.mean(returns[-2:]) > 35
    assert metrics[-1]["reward_loss"] < 0.2 * metrics[0]["reward_loss"]
