"""hiro.py against NumPy, loops over env steps, hand-made targets; it learns where to go and how, in the plane."""

import copy
from unittest import mock

import numpy as np
import pytest
import torch
from test_sac import Constant

import data_tools
from algos import hiro

C = 10


def tiny_args(**changes):
    small = dict(env_id="calvin", device="cpu", hidden_dim=32, num_envs=2, batch_size=16)
    return hiro.Args(**(small | dict(buffer_size=50, position_features=False) | changes))


@pytest.fixture
def agent(monkeypatch):
    """Observations (4,) of which the first three count for goals, actions (2,); a low level that does something."""
    monkeypatch.setitem(hiro.GOAL_RANGE, "calvin", [0.5, 2.0, 1.0])
    monkeypatch.delitem(hiro.GOAL_ENTRIES, "calvin")
    torch.manual_seed(0)
    made = hiro.Agent(tiny_args(), 4, 2)
    made.rewarded |= True
    torch.nn.init.normal_(made.low.actor.net[-1].weight, std=1.0)
    torch.nn.init.normal_(made.high.actor.net[-1].weight, std=1.0)
    return made


def rows_of(agent, number=6, steps=C):
    """Rows in which the low level followed goals without noise, from walks that are not its own doing."""
    obs = torch.randn(number, C + 1, 4).cumsum(1) / 10
    place = agent.place(obs)
    goal = 2 * torch.rand(number, 3) - 1
    with torch.no_grad():
        action = agent.low.actor(obs[:, :-1], place[:, :1] + goal[:, None] - place[:, :-1])
    rest = torch.randn(number), torch.full((number,), float(steps)), torch.zeros(number)
    return obs, place, action, goal, rest


def first_act(agent, obs, **how):
    """In the first env step of all episodes."""
    nothing = torch.zeros(len(obs), agent.goal_dim)
    return agent.act(obs, np.zeros(len(obs), dtype=int), nothing, nothing, **how)


@pytest.mark.parametrize(("env_id", "number"), [("maze", 2), ("kitchen", 30), ("calvin", 18)])
def test_goals_are_changes_of_what_is_observed(env_id, number):
    obs_dim, action_dim = data_tools.env_sizes(env_id)
    agent = hiro.Agent(tiny_args(env_id=env_id), obs_dim, action_dim)
    action, place, goal = first_act(agent, np.ones((5, obs_dim), np.float32), explore=True)
    assert action.shape == (5, action_dim) and place.shape == goal.shape == (5, number)


def test_goals_of_an_own_task_are_the_entries_it_names(monkeypatch):
    monkeypatch.setitem(data_tools.TASKS, "walk", data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0))
    monkeypatch.setitem(hiro.GOAL_RANGE, "walk", [0.5])
    monkeypatch.setitem(hiro.GOAL_ENTRIES, "walk", [1])
    agent = hiro.Agent(tiny_args(env_id="walk"), 2, 2)
    assert agent.place(torch.tensor([3.0, 2.0])).tolist() == [4.0]


def test_a_jump_of_an_angle_is_no_change():
    """CALVIN's tool turns by 0.02 rad about x, and its first Euler angle goes from 3.13 to -3.13."""
    agent = hiro.Agent(tiny_args(env_id="calvin"), 21, 7)
    obs = torch.randn(2, 21).float()
    obs[1] = obs[0]
    obs[:, 3] = torch.tensor([3.13, -3.13])
    obs[1, 7] += 0.39  # an arm joint
    change = (agent.place(obs[1]) - agent.place(obs[0])).tolist()
    assert change == pytest.approx([0] * 4 + [1.0] + [0] * 13, abs=1e-5)


# --------------------------------------------------------------------------------------------------------------- acting
def test_goals_stay_where_they_are_for_c_steps(agent):
    """phi(s) + g is constant under h (eq. 2), in each environment from its own start on."""
    unit = np.array([0.5, 2.0, 1.0])
    for explore in (False, True):
        obs = np.random.default_rng(0).normal(size=(47, 3, 4)).astype(np.float32)
        ends = {13: [1], 30: [0, 1]}  # before these steps an episode ended
        steps = np.zeros(3, dtype=int)
        place = goal = torch.zeros(3, 3)
        target = np.zeros((3, 3))
        for t in range(47):
            steps[ends.get(t, [])] = 0
            with torch.no_grad():
                fresh = agent.high.actor(torch.from_numpy(obs[t]), torch.zeros(3, 0)).numpy()
            action, place, goal = agent.act(obs[t], steps, place, goal, explore)
            g = goal.numpy()
            for e in np.flatnonzero(steps % C == 0):
                target[e] = obs[t, e, :3] / unit + g[e]
                assert np.abs(g[e]).max() <= 1
                assert np.allclose(g[e], fresh[e], atol=1e-6) != explore
            np.testing.assert_allclose(obs[t, :, :3] / unit + g, target, atol=1e-4)
            with torch.no_grad():
                expected = agent.low.actor(torch.from_numpy(obs[t]), goal).numpy()
            assert np.allclose(action, expected, atol=1e-6) != explore
            assert np.abs(action).max() <= 1
            steps += 1
    torch.nn.init.zeros_(agent.low.actor.net[-1].weight)
    with torch.no_grad():
        noise = agent.low.choose(torch.zeros(4_000, 4), torch.zeros(4_000, 3), 0.1, uniform=False)
    assert noise.std().item() == pytest.approx(0.1, rel=0.1)


# ----------------------------------------------------------------------------------------------------------- correction
def test_the_goal_that_was_given_explains_what_was_done(agent):
    obs, place, action, goal, (_, steps, _) = rows_of(agent)
    candidates = hiro.goal_candidates(place, goal)
    with torch.no_grad():
        scores = hiro.goal_scores(agent.low.actor, obs, place, action, candidates, steps)
    assert scores[:, 9].abs().max() < 1e-8 and (scores[:, :9] < -1e-4).all()
    assert torch.equal(hiro.corrected_goal(agent.low.actor, obs, place, action, goal, steps), goal)
    # Other rows' goals are worse, and another low level may prefer another goal
    with torch.no_grad():
        other = hiro.goal_scores(agent.low.actor, obs, place, action, goal.roll(1, 0)[:, None], steps)
    assert (other < -1e-4).all()
    torch.nn.init.normal_(agent.low.actor.net[0].weight, std=1.0)
    assert not torch.equal(hiro.corrected_goal(agent.low.actor, obs, place, action, goal, steps), goal)


def test_candidates_are_the_change_the_goal_and_eight_around_the_change():
    torch.manual_seed(0)
    place = torch.randn(4_000, C + 1, 2) / 10
    goal = 2 * torch.rand(4_000, 2) - 1
    candidates = hiro.goal_candidates(place, goal)
    assert candidates.shape == (4_000, 10, 2)
    change = place[:, C] - place[:, 0]
    assert torch.equal(candidates[:, 8], change.clamp(-1, 1)) and torch.equal(candidates[:, 9], goal)
    assert candidates.abs().max() == 1
    away = candidates[:, :8] - change[:, None]
    quartile = 0.5 * 0.6745  # of a normal distribution of std 0.5, which no clipping moves
    assert away.median().item() == pytest.approx(0, abs=0.01)
    assert away.abs().median().item() == pytest.approx(quartile, abs=0.01)


def test_scores_against_a_loop_over_the_steps_that_happened(agent):
    obs, place, action, goal, _ = rows_of(agent)
    action = 2 * torch.rand_like(action) - 1
    steps = torch.tensor([10.0, 3.0, 1.0, 10.0, 7.0, 9.0])
    candidates = hiro.goal_candidates(place, goal)
    with torch.no_grad():
        scores = hiro.goal_scores(agent.low.actor, obs, place, action, candidates, steps)
        for b in range(6):
            for n in range(10):
                left = candidates[b, n]
                expected = 0.0
                for t in range(int(steps[b])):
                    error = action[b, t] - agent.low.actor(obs[b, t], left)
                    expected -= 0.5 * float(error @ error)
                    left = place[b, t] + left - place[b, t + 1]
                assert scores[b, n].item() == pytest.approx(expected, rel=1e-4)
        # What follows the end of an episode does not count
        action[1, 3:] = 100.0
        obs[1, 4:] = 100.0
        again = hiro.goal_scores(agent.low.actor, obs, place, action, candidates, steps)
        torch.testing.assert_close(again, scores)


# --------------------------------------------------------------------------------------------------------------- replay
def test_rows_against_a_loop_over_episodes():
    """Two environments in turn: episodes of 23 steps (an end), 10 (a time-out), 14 (an end), and what still runs."""
    args = tiny_args(num_envs=2, env_id="maze", goal_steps=C)
    rb = hiro.ReplayBuffer(4, 2, args)
    rng = np.random.default_rng(0)
    plans = [[(23, "end"), (10, "time-out"), (14, "end")], [(10, "time-out"), (14, "end"), (23, "running")]]
    steps = [[], []]  # of each environment
    expected = []
    for e, plan in enumerate(plans):
        for length, how in plan:
            obs = rng.normal(size=(length + 1, 4)).astype(np.float32)
            action = rng.normal(size=(length, 2)).astype(np.float32)
            goal = rng.normal(size=(length, 2)).astype(np.float32)
            rewards = rng.normal(size=length).astype(np.float32)
            for t in range(length):
                last = t == length - 1
                flags = last and how == "end", last and how == "time-out"
                steps[e].append((obs[t], action[t], goal[t], rewards[t], *flags, obs[t + 1]))
            for t in range(0, length, C):
                n = min(C, length - t)
                if how == "running" and n < C:
                    continue
                path = np.concatenate([obs[t : t + n + 1], np.repeat(obs[t + n : t + n + 1], C - n, 0)])
                actions = np.concatenate([action[t : t + n], np.zeros((C - n, 2))])
                ends = float(how == "end" and t + n == length)
                row = path.ravel(), actions.ravel(), goal[t], [rewards[t : t + n].sum(dtype=float), n, ends]
                expected.append(np.concatenate(row))
    assert len(steps[0]) == len(steps[1]) == 47
    for both in zip(*steps):
        obs, action, goal, rewards, terminations, truncations, next_obs = map(np.stack, zip(*both))
        rb.add(obs, action, torch.from_numpy(goal), rewards, terminations, truncations, next_obs)
    assert len(rb) == len(expected) == 6 + 5
    found = torch.cat([column[: len(rb)].reshape(len(rb), -1) for column in rb.columns], 1).numpy()
    wanted = np.array(expected)
    np.testing.assert_allclose(found[found[:, 0].argsort()], wanted[wanted[:, 0].argsort()], rtol=1e-5)


def test_ring_keeps_the_last_rows_and_survives_a_checkpoint():
    args = tiny_args(buffer_size=5, env_id="maze")
    rb, other = hiro.ReplayBuffer(4, 2, args), hiro.ReplayBuffer(4, 2, args)
    no = np.zeros(2, dtype=bool)

    def step(buffer, t):
        obs, action, rewards = np.full((2, 4), t, np.float32), np.full((2, 2), t, np.float32), np.ones(2, np.float32)
        buffer.add(obs, action, torch.zeros(2, 2), rewards, no, no, obs + 1)

    for t in range(47):
        step(rb, t)
    assert len(rb) == 5 and rb.columns[0][:, 0, 0].tolist() == [20, 30, 30, 10, 20]
    assert rb.newest(4)[0][:, 0, 0].tolist() == [20, 20, 30, 30]
    assert rb.newest(100)[0][:, 0, 0].tolist() == [10, 20, 20, 30, 30]
    other.load_state_dict(copy.deepcopy(rb.state_dict()))
    for t in range(47, 50):
        step(rb, t)
        step(other, t)
    assert rb.columns[0][:, 0, 0].tolist() == [20, 30, 30, 40, 40]
    assert all(torch.equal(column, same) for column, same in zip(rb.columns, other.columns))


# --------------------------------------------------------------------------------------------------------------- losses
def test_targets_take_the_smaller_critic_and_the_loss_is_hubers():
    critics = Constant(torch.tensor([1.0, 5.3]), torch.tensor([2.0, 5.0]))
    target = Constant(torch.tensor([10.0, 10.0]), torch.tensor([12.0, 8.0]))
    discount = torch.tensor([0.9, 0.0])  # the second row ends
    obs, goal, action, next_obs, next_goal = torch.rand(5, 2, 1)
    batch = obs, goal, action, torch.tensor([3.0, 5.0]), next_obs, next_goal, discount
    actor_target, actor = Constant(torch.zeros(2, 1)), Constant(-action)
    loss, metrics = hiro.td3_critic_loss(critics, target, actor_target, *batch)
    assert all(map(torch.equal, critics.inputs, (obs, goal, action)))
    assert all(map(torch.equal, target.inputs[:2], (next_obs, next_goal)))
    assert all(map(torch.equal, actor_target.inputs, (next_obs, next_goal)))
    errors = np.array([[1.0 - 12.0, 5.3 - 5.0], [2.0 - 12.0, 0.0]])
    huber = np.where(np.abs(errors) < 1, 0.5 * errors**2, np.abs(errors) - 0.5)
    assert loss.item() == pytest.approx(huber.mean(1).sum())
    assert metrics["td_target"].item() == pytest.approx(8.5)
    # The policy climbs the first critic, whatever the second one says
    assert hiro.td3_policy_loss(critics, actor, obs, goal).item() == pytest.approx(-3.15)
    assert all(map(torch.equal, critics.inputs, (obs, goal, -action)))
    assert all(map(torch.equal, actor.inputs, (obs, goal)))


def test_target_actions_are_noisy_within_bounds():
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, obs, goal, action):
            seen.append(action)
            return action[:, 0], action[:, 0]

    torch.manual_seed(0)
    obs = torch.zeros(20_000, 1)
    for mean in (0.0, 0.95):
        batch = obs, obs, obs, obs[:, 0], obs, obs, obs[:, 0]
        hiro.td3_critic_loss(Spy(), Spy(), Constant(torch.full_like(obs, mean)), *batch)
    noise, near_the_edge = seen[0], seen[2]
    assert noise.std().item() == pytest.approx(0.2, abs=0.01) and noise.abs().max().item() == pytest.approx(0.5)
    assert near_the_edge.max() == 1 and near_the_edge.min().item() == pytest.approx(0.45)


def test_both_levels_learn_from_the_right_transitions(agent):
    """What TD3 gets, against NumPy: r = -|phi(s) + g - phi(s')| and g' = h(s, g, s') below, sums and ends above."""
    obs, place, action, goal, (rewards, _, _) = rows_of(agent, 40)
    steps = torch.arange(40) % C + 1.0
    terminations = (torch.arange(40) % 3 == 0).float()
    agent.updates = C - 1  # the next one is one of both levels
    with mock.patch.object(hiro.TD3, "update", return_value=dict(grad_norm=0.0)) as update:
        agent.update(obs, action, goal, rewards, steps, terminations)
    low, high = [[part.numpy() for part in call.args] for call in update.call_args_list]
    path, phi, g = obs.numpy(), obs.numpy()[..., :3] / np.array([0.5, 2.0, 1.0]), goal.numpy()
    seen = set()
    last = []
    for b in range(40):
        t = int(np.flatnonzero((path[b] == low[0][b]).all(-1))[0])
        assert t < steps[b]
        seen.add(t)
        last.append(steps[b] > 1 and t == steps[b] - 1)
        np.testing.assert_allclose(low[1][b], phi[b, 0] + g[b] - phi[b, t], atol=1e-5)  # g_t
        assert np.array_equal(low[2][b], action[b, t])
        left = low[1][b] + phi[b, t] - phi[b, t + 1]  # h
        assert low[3][b] == pytest.approx(-np.sqrt(np.sum(left**2)), rel=1e-4)
        assert np.array_equal(low[4][b], path[b, t + 1])
        np.testing.assert_allclose(low[5][b], left, atol=1e-5)
    assert len(seen) > 5 and any(last)  # up to the last one that happened
    assert np.allclose(low[6], 0.99)  # the low level never ends
    assert np.array_equal(high[0], path[:, 0]) and np.array_equal(high[4], path[:, C])
    assert high[1].shape == high[5].shape == (40, 0)  # no goals above
    assert np.allclose(high[2], g)  # the low level is the one that acted: nothing to relabel
    assert np.array_equal(high[3], rewards) and np.allclose(high[6], 0.99 * (1 - terminations.numpy()))


def test_the_high_level_is_relabelled_unless_switched_off(agent):
    obs, _, action, goal, rest = rows_of(agent)
    for correction in (True, False):
        agent.args.correction = correction
        agent.updates = C - 1
        with mock.patch.object(hiro.TD3, "update", return_value=dict(grad_norm=0.0)) as update:
            agent.update(obs, -action, goal, *rest)  # as if another low level had acted
        assert torch.equal(update.call_args_list[1].args[2], goal) != correction


def test_an_update_learns_from_the_slow_copies_which_follow_by_tau(agent):
    """TD3's targets are those of slow critics and policy; every second time these go a tenth of the way."""
    level = agent.low
    level.tau = 0.1
    for part in (level.critics_target, level.actor_target):
        for weight in part.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    obs, _, action, goal, (rewards, _, _) = rows_of(agent, 40)
    batch = obs[:, 0], goal, action[:, 0], rewards, obs[:, 1], -goal, torch.full((40,), 0.9)
    online, slow = [level.critics, level.actor], [level.critics_target, level.actor_target]
    vector = lambda parts: torch.nn.utils.parameters_to_vector(p for part in parts for p in part.parameters())  # noqa: E731
    for with_policy in (False, True):
        old = vector(slow).clone()
        torch.manual_seed(1)
        expected, _ = hiro.td3_critic_loss(level.critics, level.critics_target, level.actor_target, *batch)
        torch.manual_seed(1)
        metrics = level.update(*batch, with_policy=with_policy)
        assert metrics["value_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        share = 0.1 if with_policy else 0.0
        torch.testing.assert_close(vector(slow), (1 - share) * old + share * vector(online))


def test_schedule_of_both_levels(agent):
    """Over 40 updates of the low level: 20 of its policy and slow copies, 4 of the high level, 2 of its policy."""
    obs, _, action, goal, rest = rows_of(agent)
    weights = dict(
        low=agent.low.critics.qf1, low_policy=agent.low.actor.net, low_slow=agent.low.critics_target.qf1,
        high=agent.high.critics.qf1, high_policy=agent.high.actor.net, high_slow=agent.high.actor_target.net,
    )  # fmt: skip
    changed = dict.fromkeys(weights, 0)
    for _ in range(40):
        before = {name: part[0].weight.clone() for name, part in weights.items()}
        agent.update(obs, action, goal, *rest)
        for name, part in weights.items():
            changed[name] += not torch.equal(part[0].weight, before[name])
    assert changed == dict(low=40, low_policy=20, low_slow=20, high=4, high_policy=2, high_slow=2)


# ------------------------------------------------------------------------------------------------------------- learning
def test_it_learns_to_go_where_it_is_sent_and_where_to_send(monkeypatch):
    """Rows of random walks in the plane, and a reward for being near (1, -1): goals are reached, and lead there."""
    monkeypatch.setitem(hiro.GOAL_RANGE, "calvin", [1.0, 1.0])
    monkeypatch.delitem(hiro.GOAL_ENTRIES, "calvin")
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    args = tiny_args(
        num_envs=16, hidden_dim=64, actor_lr=2e-3, critic_lr=2e-3, buffer_size=2_000, batch_size=100, goal_steps=3
    )  # fmt: skip
    agent = hiro.Agent(args, 2, 2)
    rb = hiro.ReplayBuffer(2, 2, args)
    no = np.zeros(16, dtype=bool)
    best = np.array([1.0, -1.0], np.float32)
    for _ in range(120):
        place = goal = torch.zeros(16, 2)
        obs = rng.uniform(-2, 2, (16, 2)).astype(np.float32)
        for step in range(3):
            action, place, goal = agent.act(obs, np.full(16, step), place, goal, explore=True, uniform=True)
            next_obs = obs + 0.4 * action
            rewards = -0.1 * np.linalg.norm(next_obs - best, axis=1)
            rb.add(obs, action, goal, rewards, no, no, next_obs)
            obs = next_obs
    agent.rewarded |= True
    for _ in range(600):
        metrics = agent.update(*rb.sample(args.batch_size))
    assert all(value.isfinite() for value in metrics.values())

    # The low level, sent from random places to random ones
    obs = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    goal = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    end = obs + goal
    with torch.no_grad():
        for _ in range(3):
            obs = obs + 0.4 * agent.low.actor(torch.from_numpy(obs), torch.from_numpy(end - obs)).numpy()
    assert 1 - np.linalg.norm(end - obs, axis=1).mean() / np.linalg.norm(goal, axis=1).mean() > 0.6
    # Both levels together
    obs = rng.uniform(-1, 1, (200, 2)).astype(np.float32)
    distance = np.linalg.norm(obs - best, axis=1).mean()
    place = goal = torch.zeros(200, 2)
    for step in range(12):
        action, place, goal = agent.act(obs, np.full(200, step), place, goal, explore=False)
        obs = obs + 0.4 * action
    assert np.linalg.norm(obs - best, axis=1).mean() < 0.5 * distance


def test_high_level_waits_for_a_first_reward_and_the_warm_up_is_uniform(agent):
    """Before it goals are uniform in [-1, 1], also without exploration, and the high level does not change."""
    agent.rewarded &= False
    obs, _, action, goal, rest = rows_of(agent)
    weights = copy.deepcopy(agent.high.state_dict())
    for _ in range(2 * C):
        agent.update(obs, action, goal, *rest)
    assert all(torch.equal(weights[name], value) for name, value in agent.high.state_dict().items())
    same = np.zeros((4_000, 4), np.float32)
    uniform(first_act(agent, same, explore=False)[2].numpy())
    agent.rewarded |= True
    for _ in range(2 * C):
        agent.update(obs, action, goal, *rest)
    assert not all(torch.equal(weights[name], value) for name, value in agent.high.state_dict().items())
    _, _, goals = first_act(agent, same[:2], explore=False)
    assert torch.equal(goals[0], goals[1])
    # In the warm-up both levels choose at random, whatever was rewarded
    action, _, goals = first_act(agent, same, explore=True, uniform=True)
    uniform(action)
    uniform(goals.numpy())


def test_without_waiting_the_high_level_acts_and_learns_before_a_first_reward(agent):
    """The published side of DEVIATION 7: goals are the policy's and critics learn that nothing is won."""
    torch.manual_seed(0)
    agent = hiro.Agent(tiny_args(wait_for_reward=False), 4, 2)
    obs, _, action, goal, (rewards, *rest) = rows_of(agent)
    same = np.zeros((50, 4), np.float32)
    _, _, goals = first_act(agent, same, explore=False)
    with torch.no_grad():
        torch.testing.assert_close(goals, agent.high.actor(torch.zeros(50, 4), torch.zeros(50, 0)))
    weights = copy.deepcopy(agent.high.critics.state_dict())
    for _ in range(C):
        agent.update(obs, action, goal, torch.zeros_like(rewards), *rest)
    assert not all(torch.equal(weights[name], value) for name, value in agent.high.critics.state_dict().items())


def uniform(numbers):
    assert np.abs(numbers).max() <= 1
    np.testing.assert_allclose(numbers.mean(0), 0, atol=0.05)
    np.testing.assert_allclose(numbers.std(0), 1 / np.sqrt(3), atol=0.02)


def test_progress_is_the_share_of_the_way(agent):
    obs, place, action, goal, rest = rows_of(agent)
    left = np.linalg.norm((place[:, 0] + goal - place[:, C]).numpy(), axis=1)
    share = 1 - left.sum() / np.linalg.norm(goal.numpy(), axis=1).sum()
    assert agent.progress(obs, action, goal, *rest) == pytest.approx(share, rel=1e-4)
