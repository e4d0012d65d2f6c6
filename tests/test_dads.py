"""dads.py against NumPy, closed forms, brute force, loops over the replay and MuJoCo."""

import itertools
import math
from types import SimpleNamespace

import mujoco
import numpy as np
import pytest
import torch
from numpy_nets import NO_SCORES

import data_tools.tasks.maze
from algos import dads
from data_tools.tasks import kitchen


def tiny_args(**changes):
    small = dict(device="cpu", warmup_steps=0, hidden_dim=32, num_envs=2, batch_size=16, buffer_size=60)
    return dads.Args(**(dads.TASK_DEFAULTS["maze"] | small | changes))


def dynamics_of(args, dim=2, seed=0):
    """Random skill dynamics with a scale of their own."""
    torch.manual_seed(seed)
    dynamics = dads.SkillDynamics(dim, args)
    x = torch.randn(50, dim) * 3 + 1
    dynamics.set_scale(x, x + 0.1 * torch.randn(50, dim) + 0.05)
    return dynamics


# -------------------------------------------------------------------------------------------- dynamics and reward
@pytest.mark.parametrize("rows", [1, 3])
def test_entries_that_never_move_keep_a_scale_of_one(rows):
    dynamics = dads.SkillDynamics(2, tiny_args())
    x = torch.tensor([[1.0, 5.0], [2.0, 5.0], [4.0, 5.0]])[:rows]
    change = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])[:rows]
    dynamics.set_scale(x, x + change)
    moving = [1, 1] if rows == 1 else [np.std([1, 2, 4]), np.std([1, 2, 3])]
    assert dynamics.x_std.tolist() == pytest.approx([moving[0], 1.0])
    assert dynamics.change_std.tolist() == pytest.approx([moving[1], 1.0])
    assert dynamics.x_mean.tolist() == pytest.approx(x.mean(0).tolist())
    assert dynamics.change_mean.tolist() == pytest.approx(change.mean(0).tolist())


def numpy_log_q(dynamics, x, z, next_x):
    """log q by NumPy, from the network's outputs alone."""
    x_mean, x_std, change_mean, change_std = (
        getattr(dynamics, name).numpy() for name in ("x_mean", "x_std", "change_mean", "change_std")
    )
    inputs = np.concatenate([(x - x_mean) / x_std, z], -1)
    with torch.no_grad():
        out = dynamics.net(torch.from_numpy(inputs)).numpy()
    logits = out[..., :4]
    means = out[..., 4:].reshape(*out.shape[:-1], 4, x.shape[-1])
    change = (next_x - x - change_mean) / change_std
    normal = -0.5 * (change[..., None, :] - means) ** 2 - 0.5 * np.log(2 * np.pi)
    weights = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    return np.logaddexp.reduce(weights + normal.sum(-1), axis=-1)


def test_log_q_is_that_of_the_mixture():
    dynamics = dynamics_of(tiny_args())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 2)).astype(np.float32)
    z = rng.uniform(-1, 1, (7, 2)).astype(np.float32)
    next_x = (x + 0.2 * rng.normal(size=(7, 2))).astype(np.float32)
    found = dynamics.log_prob(*map(torch.from_numpy, (x, z, next_x)))
    np.testing.assert_allclose(found.detach().numpy(), numpy_log_q(dynamics, x, z, next_x), rtol=1e-4, atol=1e-4)
    # And its mean, with weights that differ
    with torch.no_grad():
        dynamics.net[-1].bias[:4] = torch.tensor([0.0, 2.0, -3.0, 1.0])
        inputs = (x - dynamics.x_mean.numpy()) / dynamics.x_std.numpy(), z
        out = dynamics.net(torch.from_numpy(np.concatenate(inputs, 1)))
        predicted = dynamics.predict(torch.from_numpy(x), torch.from_numpy(z)).numpy()
    weights = np.exp(out[:, :4].numpy())
    weights /= weights.sum(1, keepdims=True)
    change = (weights[..., None] * out[:, 4:].numpy().reshape(7, 4, 2)).sum(1)
    expected = x + dynamics.change_mean.numpy() + dynamics.change_std.numpy() * change
    np.testing.assert_allclose(predicted, expected, rtol=1e-4, atol=1e-5)


def test_an_angle_that_jumps_has_not_moved():
    """A tool that turns through pi has the likelihood and the scale of one that turns elsewhere."""
    dynamics = dynamics_of(tiny_args(env_id="calvin"), dim=6)
    x = torch.zeros(2, 6)
    x[:, 3] = torch.tensor([3.12, -3.13])
    next_x = x.clone()
    next_x[:, 3] = torch.tensor([-3.13, 3.12])
    np.testing.assert_allclose(dynamics.change(x, next_x)[:, 3], [0.0332, -0.0332], atol=1e-4)
    x[:, 0] = next_x[:, 0] = 3.5  # a position may be as large, and move by more than pi
    next_x[0, 0] = -3.5
    assert dynamics.change(x, next_x)[:, 0].tolist() == [-7, 0]
    dynamics.set_scale(x, next_x)
    assert 0.03 < dynamics.change_std[3] < 0.06


def test_reward_is_the_gain_of_knowing_the_skill(monkeypatch):
    dynamics = dynamics_of(tiny_args())
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 2)).astype(np.float32)
    z = rng.uniform(-1, 1, (5, 2)).astype(np.float32)
    next_x = (x + 0.3 * rng.normal(size=(5, 2))).astype(np.float32)
    drawn = torch.rand(5, 8, 2)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: drawn)
    found = dads.intrinsic_reward(dynamics, *map(torch.from_numpy, (x, z, next_x)), 8).numpy()
    others = np.stack(
        [numpy_log_q(dynamics, x, 2 * drawn[:, i].numpy() - 1, next_x) for i in range(8)]
        + [numpy_log_q(dynamics, x, z, next_x)]
    )
    expected = others[-1] - (np.logaddexp.reduce(others, axis=0) - np.log(9))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_reward_is_zero_without_the_skill_and_bounded_with_it():
    dynamics = dynamics_of(tiny_args())
    x = torch.randn(64, 2)
    z = 2 * torch.rand(64, 2) - 1
    with torch.no_grad():
        dynamics.net[0].weight[:, 2:] = 0.0  # the skill is not looked at
        reward = dads.intrinsic_reward(dynamics, x, z, x + 0.1, 16)
        assert reward.abs().max() < 1e-5
    sharp = Gaussian(1e-3)
    best = dads.intrinsic_reward(sharp, x, z, x + z, 16)
    assert best.max() <= math.log(17) + 1e-5 and best.mean() > math.log(17) - 0.05
    worst = dads.intrinsic_reward(sharp, x, z, x - z, 16)
    assert worst.min() >= -50 - 1e-4 and worst.min() < -45


class Gaussian:
    """In place of the dynamics: x' ~ N(x + z, std)."""

    def __init__(self, std):
        self.std = std

    def log_prob(self, x, z, next_x):
        return -0.5 * ((next_x - x - z) / self.std).square().sum(-1)

    def predict(self, x, z):
        return x + z


def test_dynamics_learn_a_linear_system_in_its_own_units():
    """x' = x + W z + noise, in entries of sizes 0.01 to 100: predict gives x + W z, whatever the unit of an entry."""
    torch.manual_seed(0)
    agent = dads.Agent(tiny_args(learning_rate=3e-3, dynamics_obs=3), 4, 2)
    unit = torch.tensor([0.01, 1.0, 100.0])
    W = torch.tensor([[1.0, 0.0], [0.5, -0.5], [0.0, 2.0]]) * unit[:, None]
    x = torch.randn(2_000, 3) * unit
    z = 2 * torch.rand(2_000, 2) - 1
    next_x = x + z @ W.T + 0.1 * unit * torch.randn(2_000, 3)
    agent.dynamics.set_scale(x, next_x)
    nothing = torch.zeros(64)
    for _ in range(400):
        i = torch.randint(2_000, (64,))
        metrics = agent.update_dynamics(x[i], z[i], next_x[i], x[i], x[i], nothing)
    assert metrics["reward_error"] < 0.05
    new_x = torch.randn(100, 3) * unit
    new_z = 2 * torch.rand(100, 2) - 1
    error = (agent.dynamics.predict(new_x, new_z) - new_x - new_z @ W.T) / unit
    assert error.square().mean((0, 1)).sqrt() < 0.12  # of changes of size 0.6 to 1.2
    # And the reward that follows from it is near the closed form's, with q's std, which is 1 of the normalised change
    std = (next_x - x).std(0)
    closed = -0.5 * ((next_x - x - z @ W.T) / std).square().sum(-1)
    log_q = agent.dynamics.log_prob(x, z, next_x) + 1.5 * math.log(2 * math.pi)
    assert (log_q - closed).mean().abs() < 0.05


def test_r_learns_which_ways_are_paid():
    """1 for ways that lead to a larger first number, else 0."""
    torch.manual_seed(0)
    agent = dads.Agent(tiny_args(learning_rate=3e-3, dynamics_obs=2), 4, 2)
    x = torch.randn(2_000, 2)
    agent.dynamics.set_scale(x, x + torch.randn(2_000, 2))
    for _ in range(400):
        start, later = x[torch.randint(2_000, (2, 64))]
        rewards = (later[:, 0] > start[:, 0]).float()
        agent.update_dynamics(start, torch.rand(64, 2), start, start, later, rewards)
    low, high = torch.randn(2, 200, 2).sort(0).values
    far = high[:, 0] - low[:, 0] > 0.3
    assert agent.dynamics.reward(low, high)[far].mean() > 0.9
    assert agent.dynamics.reward(high, low)[far].mean() < 0.1


def test_r_sees_ways_in_units_of_the_data():
    """The same positions in another unit are paid the same."""
    dynamics = dynamics_of(tiny_args())
    x, later = torch.randn(2, 50, 2) * 3 + 1
    paid = []
    for unit in (1.0, 100.0):
        dynamics.set_scale(unit * x, unit * later)
        paid.append(dynamics.reward(unit * x, unit * later))
    torch.testing.assert_close(*paid, rtol=1e-3, atol=1e-4)
    assert paid[0].std() > 0.01


# -------------------------------------------------------------------------------------------------------- planner
@pytest.mark.parametrize("plan_skills", [1, 2])
def test_plans_find_the_best_skills(plan_skills):
    """Rewards for being near a point; against all skills on a grid."""
    torch.manual_seed(0)
    args = tiny_args(plan_skills=plan_skills, skill_horizon=3, num_samples=2_000, temperature=40.0)
    goals = torch.tensor([[[1.2, -2.1]], [[-0.3, 0.6]], [[9.0, 9.0]]])  # (E, 1, 2); the last is out of reach
    goals = goals * plan_skills

    ways = []

    def score(x, x_later):
        ways.append((x, x_later))
        return -(x_later - goals).square().sum(-1)

    def value(plans):  # (n, K, 2) -> (E, n)
        way = 3 * plans.cumsum(1)
        return -(way[None] - goals[:, :, None]).square().sum((-1, -2))

    found = dads.plan(Gaussian(1.0), score, torch.zeros(3, 2), args)  # (E, K, 2)
    grid = torch.tensor(list(itertools.product(np.linspace(-1, 1, 21), repeat=2)), dtype=torch.float32)
    plans = grid[torch.tensor(list(itertools.product(range(441), repeat=plan_skills)))]
    plans[:, 1:] = 0.9 * plans[:, :1] + 0.1 * plans[:, 1:]  # the next skill of a plan is much like the one before
    values = value(plans)
    lost = values.amax(1) - value(found).diagonal()
    assert (lost / (values.amax(1) - values.mean(1))).max() < 0.02
    for k, (start, _) in enumerate(ways):  # each skill begins where the one before ends
        assert torch.equal(start, ways[k - 1][1] if k % plan_skills else torch.zeros_like(start))


def test_weights_of_plans():
    """Temperature 0 or equal returns: the mean of all samples. A huge temperature: the best one."""

    def planned(unit, **changes):  # paid for the first number
        torch.manual_seed(0)
        args = tiny_args(**changes)
        return dads.plan(Gaussian(1.0), lambda x, x_later: unit * x_later[..., 0], torch.zeros(2, 2), args)

    many = dict(num_samples=5_000, mppi_iters=1)
    assert planned(1, **many, temperature=0.0).abs().max() < 0.06
    assert planned(0, **many, temperature=1e6).abs().max() < 0.06
    assert planned(1, **many, temperature=1e6)[..., 0].min() == 1.0
    # The unit of rewards does not matter
    few = dict(num_samples=20, mppi_iters=2)
    assert torch.allclose(planned(0.01, **few), planned(100, **few), atol=1e-3)


@pytest.mark.parametrize("overflow", [math.nan, math.inf, -math.inf])
def test_plans_that_overflow_are_bad_ones(overflow):
    """The more of the first entry the better, but beyond 0.5 per skill states are no numbers."""
    torch.manual_seed(0)
    args = tiny_args(num_samples=2_000, temperature=1e3, skill_horizon=1)

    def score(x, x_later):
        return torch.where(x_later[..., 0] > limit, overflow, x_later[..., 0])

    x = torch.zeros(2, 2)
    limit = 0.5
    best = dads.plan(Gaussian(1.0), score, x, args)[..., 0]
    assert (best > 0.4).all() and (best <= 0.5).all()
    limit = -2.0  # all do
    assert dads.plan(Gaussian(1.0), score, x, args).abs().max() < 0.2


def test_later_skills_of_a_plan_follow_the_first():
    """Smoothing 0.9: with one sample, a plan's skills are 0.9 of the one before plus 0.1 of a new one."""
    args = tiny_args(num_samples=1, mppi_iters=1, plan_skills=4)
    torch.manual_seed(0)
    found = dads.plan(Gaussian(1.0), lambda x, x_later: x_later[..., 0], torch.zeros(1, 2), args)[0]
    torch.manual_seed(0)
    raw = (math.sqrt(1.5) * torch.randn(1, 1, 4, 2)).clamp(-1, 1)[0, 0]
    smooth = [raw[0]]
    for k in range(1, 4):
        smooth.append(0.9 * smooth[-1] + 0.1 * raw[k])
    assert torch.allclose(found, torch.stack(smooth))


def test_skills_are_kept_and_change_with_the_episode(monkeypatch):
    torch.manual_seed(0)
    agent = dads.Agent(tiny_args(hold_steps=3, discover_steps=100), 4, 2)
    executor = dads.Executor(agent, 2, explore=True)
    obs = np.zeros((2, 4), np.float32)
    seen = []
    for t in range(7):
        executor.act(obs, 0)
        seen.append(executor.z.copy())
        if t == 3:
            executor.forget(np.array([True, False]))
    seen = np.stack(seen)  # (7, 2, 2)
    changes = (seen[1:] != seen[:-1]).all(-1)
    assert np.flatnonzero(changes[:, 1]).tolist() == [2, 5]
    assert np.flatnonzero(changes[:, 0]).tolist() == [2, 3]
    # Plans begin with phase B and the first reward, and last skill_horizon env steps
    asked = []
    planned = np.array([[0.1, 0.2], [0.3, 0.4]], np.float32)
    monkeypatch.setattr(agent, "choose_skills", lambda obs, plans, explore: asked.append(plans) or planned)
    for rewarded, step in itertools.product((0, 1), (99, 100)):
        agent.rewarded.fill_(rewarded)
        dads.Executor(agent, 2, explore=True).act(obs, step)
    assert asked == [False, False, False, True]
    executor.left[:] = 70, 0  # a random skill that has begun ends within skill_horizon env steps
    random_skill = executor.z.copy()
    executor.act(obs, 100)
    assert executor.left.tolist() == [9, 9]
    assert np.array_equal(executor.z, [random_skill[0], planned[1]])
    for _ in range(10):
        executor.act(obs, 100)
    assert np.array_equal(executor.z, planned)


def test_random_skills_are_uniform_and_evaluations_plan(monkeypatch):
    torch.manual_seed(0)
    agent = dads.Agent(tiny_args(), 4, 2)
    z = agent.choose_skills(np.zeros((4_000, 4), np.float32), planned=False, explore=True)
    assert np.abs(z).max() <= 1
    np.testing.assert_allclose(z.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(z.std(0), 1 / np.sqrt(3), atol=0.02)

    agent.rewarded.fill_(1)
    planned = torch.tensor([[0.1, 0.2], [0.3, -0.4]])
    asked = []
    monkeypatch.setattr(dads, "plan", lambda *inputs, args: asked.append(inputs) or planned[:, None])
    obs = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
    action = dads.Executor(agent, 2, explore=False).act(obs, agent.args.discover_steps)
    ((dynamics, score, x),) = asked
    assert dynamics is agent.dynamics and score == agent.dynamics.reward and np.array_equal(x, obs[:, :2])
    with torch.no_grad():
        mode, other = (
            torch.tanh(agent.actor(torch.cat([torch.from_numpy(obs), z], 1))[0]) for z in (planned, -planned)
        )
    np.testing.assert_allclose(action, mode, atol=1e-6)
    assert not np.allclose(action, other, atol=1e-3)  # the policy is told its skill


# --------------------------------------------------------------------------------------------------------- replay
def filled(args, steps):
    """Observations count the env steps; episodes of member 0 end truly after 7, those of member 1 by time after 5."""
    rb = dads.ReplayBuffer(1, 1, args)
    rng = np.random.default_rng(0)
    kept = []
    for t in range(steps):
        obs = np.array([[t], [1000 + t]], np.float32)
        rewards = (rng.random(2) < 0.1).astype(np.float32)
        ends = np.array([t % 7 == 6, False])
        times = np.array([False, t % 5 == 4])
        rb.add(obs, obs, np.zeros((2, 2), np.float32), rewards, ends, times, obs + 0.5)
        kept.append((rewards, ends | times))
    return rb, kept


@pytest.mark.parametrize("steps", [6, 25, 83])  # fewer than a window, not full, overwritten
def test_windows_of_rewards_against_a_loop(steps):
    torch.manual_seed(0)
    args = tiny_args(buffer_size=60, skill_horizon=8)
    rb, kept = filled(args, steps)
    first, second = rb.positions(1)  # of the rows that there are, all once
    assert len(first.unique()) == 2 * min(steps, 30) and torch.equal(second, first + 0.5)
    start, end, rewards = rb.sample_rewards(400)
    H = min(8, steps)
    oldest = max(0, steps - 30)
    for s, x, r in zip(start.flatten().tolist(), end.flatten().tolist(), rewards.tolist()):
        e, t = divmod(int(s), 1000)
        assert oldest <= t <= steps - H
        total = 0.0
        for last in range(t, t + H):
            total += kept[last][0][e]
            if kept[last][1][e]:
                break
        assert (x, r) == (1000 * e + last + 0.5, total)
    if steps > 8:
        around, anywhere = (rewards > 0).float().view(2, 200).mean(1)  # half are drawn around a reward
        assert around > 0.4 and around > anywhere
        assert len(set(start.flatten().tolist())) > 10


def test_a_reward_counts_as_long_as_the_replay_holds_it():
    args = tiny_args(buffer_size=60)  # 30 rows of 2 environments
    rb = dads.ReplayBuffer(4, 2, args)
    row = [np.zeros((2, 4)), np.zeros((2, 2)), np.zeros((2, 2)), np.zeros(2), *np.zeros((2, 2), bool), np.zeros((2, 4))]
    held = []
    for t in range(36):
        row[3] = np.array([0.0, t == 4])
        rb.add(*row)
        held.append(rb.rewarded())
    assert held == [4 <= t < 34 for t in range(36)]


def test_only_true_ends_have_no_future():
    """Targets of the critics from rows of the buffer: reward of the skills, plus what comes later unless it ended."""
    args = tiny_args(gamma=0.9)
    rb, _ = filled(args, 30)
    torch.manual_seed(0)
    obs, action, z, next_obs, discount = rb.sample(500)
    ended = (obs[:, 0] < 1000) & (obs[:, 0] % 7 == 6)
    assert torch.equal(discount == 0, ended) and (discount[~ended] == np.float32(0.9)).all()
    assert torch.equal(next_obs, obs + 0.5)


def test_critics_see_the_same_skill_before_and_after(monkeypatch):
    torch.manual_seed(0)
    agent = dads.Agent(tiny_args(), 4, 2)
    seen, original = [], dads.soft_critic_loss
    monkeypatch.setattr(dads, "soft_critic_loss", lambda *inputs: seen.append(inputs) or original(*inputs))
    obs, next_obs = torch.randn(2, 16, 4)
    z = 2 * torch.rand(16, 2) - 1
    torch.manual_seed(1)
    expected = dads.intrinsic_reward(agent.dynamics, obs[:, :2], z, next_obs[:, :2], agent.args.num_prior_samples)
    torch.manual_seed(1)
    agent.update(obs, torch.zeros(16, 2), z, next_obs, torch.full((16,), 0.9))
    state, _, reward, next_state = seen[0][3:7]
    assert torch.equal(state, torch.cat([obs, z], 1)) and torch.equal(next_state, torch.cat([next_obs, z], 1))
    assert torch.allclose(reward, 10 * expected)
    learnt, dynamics_loss = [], dads.dynamics_loss
    monkeypatch.setattr(dads, "dynamics_loss", lambda *inputs: learnt.extend(inputs[1:]) or dynamics_loss(*inputs))
    agent.update_dynamics(obs, z, next_obs, next_obs, obs, torch.zeros(16))
    assert all(map(torch.equal, learnt[:5], (obs[:, :2], z, next_obs[:, :2], next_obs[:, :2], obs[:, :2])))


# ----------------------------------------------------------------------------------------------------------- runs
FLAGS = "--env-id maze --device cpu --hidden-dim 16 --num-envs 4 --batch-size 16 --warmup-steps 100"


def test_phase_b_leaves_the_policy(tmp_path, monkeypatch):
    envs = data_tools.tasks.maze.MazeVectorEnv
    advance = envs.advance
    dense = lambda self, *inputs: (0.01 * self.observations()[:, 0], advance(self, *inputs)[1])  # noqa: E731
    monkeypatch.setattr(envs, "advance", dense)
    flags = f"{FLAGS} --hold-steps 40 --updates-per-step 0.05 --discover-steps 480 --mppi-iters 2 --policy-updates 2"
    monkeypatch.setattr(dads, "rollout", lambda *inputs: NO_SCORES)

    def run(*more):
        dads.train(dads.parse_args([*flags.split(), *more]))
        return torch.load(next((tmp_path / more[1]).iterdir()) / "checkpoint.pt", weights_only=True)

    scaled, set_scale = [], dads.SkillDynamics.set_scale
    noted = lambda dynamics, x, next_x: scaled.append(len(x)) or set_scale(dynamics, x, next_x)  # noqa: E731
    monkeypatch.setattr(dads.SkillDynamics, "set_scale", noted)
    updated, update = [], dads.Agent.update
    monkeypatch.setattr(dads.Agent, "update", lambda agent, *batch: updated.append(1) or update(agent, *batch))
    monkeypatch.chdir(tmp_path)
    whole = run("--run-dir", "whole", "--total-timesteps", "800")
    assert len(updated) == 2 * 19  # two of the policy for each of the dynamics, in phase A
    assert scaled == [120, 320, 520, 720]  # by all rows so far: at every tenth update, one for 20 env steps after 100
    part = run("--run-dir", "part", "--total-timesteps", "520")
    for name, value in whole["agent"].items():
        if not name.startswith(("dynamics", "rewarded")):
            assert torch.equal(value, part["agent"][name]), name
        if name.startswith(("dynamics.net", "dynamics.reward_net")):
            assert not torch.equal(value, part["agent"][name]), name
    # Skills of phase A are held for 40 env steps, planned ones for 10
    z = whole["rb"]["z"]  # (T, E, Z)
    changes = (z[1:] != z[:-1]).any(-1)[:, 0].nonzero().flatten() + 1
    assert changes.tolist() == [40, 80, *range(120, 200, 10)]


# --------------------------------------------------------------------------------------------- pictures
def test_hand_is_where_mujoco_puts_it():
    model = kitchen.compile_model()
    data = mujoco.MjData(model)
    rng = np.random.default_rng(0)
    obs = np.tile(kitchen.INITIAL_QPOS, (5, 1))
    obs[:, :7] += 0.3 * rng.normal(size=(5, 7))
    expected = []
    for row in obs:
        data.qpos[: len(row)] = row
        mujoco.mj_kinematics(model, data)
        base = data.body("panda0_link0")
        expected.append(base.xmat.reshape(3, 3).T @ (data.site("end_effector").xpos - base.xpos))
    found = dads.tool_position(obs, dads.Args(env_id="kitchen"))
    np.testing.assert_allclose(found, expected, atol=2e-3)  # the model's numbers are rounded


@pytest.mark.parametrize("task", ["maze", "kitchen", "calvin"])
def test_picture_of_skills(task, tmp_path):
    args = dads.Args(env_id=task, device="cpu", hidden_dim=16, **dads.TASK_DEFAULTS[task])
    agent = dads.Agent(args, *dads.data_tools.env_sizes(task))
    dads.draw_skills(agent, args, 5, tmp_path / "skills.png")
    z = np.zeros((3, args.skill_dim), np.float32)
    paths = dads.skill_paths(agent, z, 5, args, seed=1)
    assert len(paths) == 6 and np.array_equal(paths[0, 0], paths[0, 1])  # the same start for all skills
    assert (tmp_path / "skills.png").stat().st_size > 5_000


def test_paths_of_skills_stop_at_their_own_ends(monkeypatch):
    class Counters:
        """Observes the env step; member 0 ends at step 2, member 1 at step 4. The flag falls again."""

        def reset(self, seed):
            self.t = 0
            return np.zeros((2, 1), np.float32), {}

        def step(self, action):
            self.t += 1
            ended = np.array([self.t == 2, self.t == 4])
            return np.full((2, 1), self.t, np.float32), np.zeros(2), ended, np.zeros(2, bool), {}

        def close(self):
            pass

    monkeypatch.setattr(dads.data_tools, "make_envs", lambda env_id, num_envs: Counters())
    still = SimpleNamespace(act=lambda inputs, explore: np.zeros((2, 2)))
    paths = dads.skill_paths(still, np.zeros((2, 1), np.float32), 9, dads.Args(), seed=0)[..., 0]
    nan = np.nan
    np.testing.assert_array_equal(paths.T, [[0, 1, 2, nan, nan], [0, 1, 2, 3, 4]])
