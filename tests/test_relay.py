"""relay.py: relabelled pairs by enumeration, losses in NumPy, a line world that is crossed, PPO on a small problem."""

import copy
import types

import numpy as np
import pytest
import torch

import data_tools
from algos import relay
from data_tools.tasks import calvin, kitchen, maze

WALK = 25  # env steps of an episode in the line world


def tiny_args(**changes):
    small = dict(
        env_id="maze", device="cpu", hidden_dim=32, num_envs=2, batch_size=64, skill_horizon=5, low_window=5,
        high_window=40, demo_rows=50, position_features=False,
    )  # fmt: skip
    return relay.Args(**(small | changes))


def trace_of(obs, action, next_obs):
    """As `collect` returns it, without rewards and ends."""
    none = torch.zeros(obs.shape[:2], dtype=torch.bool)
    return obs, action, next_obs, none.float(), none, none, ~none


def episodes(*lengths, obs_dim=1):
    """Data whose observations and actions are the numbers of their rows."""
    rows = np.arange(sum(lengths), dtype=np.float32)
    ends = np.isin(rows, np.cumsum(lengths) - 1)
    obs = np.repeat(1 + rows[:, None], obs_dim, 1)
    return data_tools.OfflineDataset(obs, 1 + rows[:, None], np.zeros_like(ends), ends)


# ---------------------------------------------------------------------------------------------------------- relabelling
@pytest.mark.parametrize("window", [1, 3, 100])
def test_all_pairs_of_an_episode_are_equally_likely_and_no_others(window):
    lengths = 2, 5, 1, 4
    data = episodes(*lengths)
    starts = np.cumsum([0, *lengths[:-1]])
    pairs = {
        (start + t, w)
        for start, length in zip(starts, lengths)
        for t in range(length)
        for w in range(1, window + 1)
        if t + w < length
    }
    torch.manual_seed(0)
    draws = 2_000 * len(pairs)
    t, w = data.sample_pairs(draws, window)
    found, counts = np.unique(torch.stack([t, w], 1).numpy(), axis=0, return_counts=True)
    assert {tuple(pair) for pair in found.tolist()} == pairs
    chi_square = ((counts - 2_000) ** 2 / 2_000).sum()
    assert chi_square < len(pairs) + 5 * np.sqrt(2 * len(pairs))


def test_pairs_need_two_rows():
    for lengths, window in (((1, 1, 1), 5), ((5,), 0)):
        with pytest.raises(data_tools.DataError, match="no two rows"):
            episodes(*lengths).sample_pairs(3, window)


def test_subgoals_are_goals_cut_at_the_low_window():
    torch.manual_seed(0)
    data = episodes(30, 50)
    batches = relay.relabel(data, 4_000, tiny_args())
    obs, goal, action = (x.squeeze(1).numpy() for x in batches["low"])
    assert np.array_equal(obs, action) and set((goal - obs).tolist()) == {1, 2, 3, 4, 5}
    obs, goal, subgoal = (x.squeeze(1).numpy() for x in batches["high"])
    assert (goal - obs).max() == 40 and np.array_equal(subgoal, np.minimum(goal, obs + 5))
    flat = relay.relabel(data, 4_000, tiny_args(flat=True))
    obs, goal, action = (x.squeeze(1).numpy() for x in flat["low"])
    assert flat.keys() == {"low"} and (goal - obs).max() == 40 and np.array_equal(obs, action)


def test_an_angle_that_jumps_has_hardly_turned():
    """CALVIN's tool hangs upside down: its roll is about pi, and goes from 3.13 to -3.13 by a turn of .02 rad."""
    torch.manual_seed(0)
    args = tiny_args(env_id="calvin", low_window=3, demo_rows=20)
    obs = torch.randn(40, 21)
    obs[:, 3] = torch.tensor([3.13, -3.13]).repeat(20)
    ended = np.arange(40) == 39
    data = data_tools.OfflineDataset(obs.numpy(), np.zeros((40, 7), np.float32), ended, ended)
    start, _, subgoal = relay.relabel(data, 200, args)["high"]
    assert (subgoal - start)[:, 3].abs().max() < 0.03 and (subgoal - start)[:, 6].abs().max() > 0.5

    networks = relay.make_networks(args)
    relay.prepare(networks, data, args)
    for level in ("low", "high"):
        net = networks[level].net
        assert net.std[3] == pytest.approx(0.02) and net.std[6] > 0.5
        turned = obs.clone()
        turned[:, 3:6] -= 2 * np.pi  # the same state
        torch.testing.assert_close(net(turned, obs), net(obs, turned), atol=1e-3, rtol=1e-3)

    agent = relay.Agent(args, networks)
    trace = trace_of(obs.view(5, 8, 21), torch.zeros(5, 8, 7), turned.view(5, 8, 21))
    _, share = agent.rows(obs.view(5, 8, 21)[2], trace)  # one state of the five is the subgoal itself
    assert share == 1


# --------------------------------------------------------------------------------------------------------------- losses
def normal_log_prob(mean, std, x):
    return (-0.5 * ((x - mean) / std) ** 2 - np.log(std) - 0.5 * np.log(2 * np.pi)).sum(-1)


def random_networks(args):
    """Networks with scales and widths other than 1."""
    networks = relay.make_networks(args)
    for level in networks.keys() - {"demonstrations"}:
        torch.nn.init.uniform_(networks[level].log_std, -1, 1)
        networks[level].net.mean.uniform_(-1, 1)
        networks[level].net.std.uniform_(0.5, 2)
    return networks.double()


def test_imitation_is_the_gaussian_likelihood_of_each_level_and_separate():
    torch.manual_seed(0)
    networks = random_networks(tiny_args(position_features=True))
    sizes = dict(low=2, high=4)
    batches = {level: [torch.randn(6, n, dtype=torch.float64) for n in (4, 4, size)] for level, size in sizes.items()}
    periods = 2.0 ** torch.arange(6, dtype=torch.float64)  # cells
    loss, metrics = relay.pretrain_loss(networks, batches)
    loss.backward()
    expected = 0.0
    for level, (obs, goal, target) in batches.items():
        policy = networks[level]
        net = policy.net
        way = ((goal - obs) / net.std)[:, :2] if level == "high" else (goal - obs) / net.std  # maze: position is seen
        phase = (2 * np.pi * obs[:, :2, None] / periods).flatten(1)
        out = net.net(torch.cat([(obs - net.mean) / net.std, phase.sin(), phase.cos(), way], -1)).detach()
        std = policy.log_std.detach().exp()
        if level == "high":  # in standard deviations, from where it is
            out = obs + out * net.std
            std = std * net.std
        value = -normal_log_prob(out.numpy(), std.numpy(), target.numpy()).mean()
        assert metrics[f"{level}_loss"].item() == pytest.approx(value)
        expected += value
        alone = copy.deepcopy(networks)
        alone.zero_grad()
        relay.pretrain_loss(alone, {level: batches[level]})[0].backward()
        for name, parameter in alone[level].named_parameters():
            assert torch.allclose(parameter.grad, networks[level].get_parameter(name).grad)
        others = [p for key in alone.keys() - {level} for p in alone[key].parameters()]
        assert others and all(p.grad is None or not p.grad.any() for p in others)
    assert loss.item() == pytest.approx(expected)


def test_ppo_loss_is_the_clipped_one_plus_imitation():
    torch.manual_seed(1)
    args = tiny_args()
    networks = random_networks(args)
    low = networks["low"]
    value = relay.GoalNetwork(4, slice(0, 4), 1, args).double()
    obs, z = torch.randn(2, 40, 4, dtype=torch.float64)
    action = torch.randn(40, 2, dtype=torch.float64)
    returns, advantages = torch.randn(2, 40, dtype=torch.float64)
    new = relay.log_probability(low(obs, z), action).detach()
    old = new - torch.linspace(-1, 1, 40, dtype=torch.float64)  # ratios from 1/e to e
    demo = [torch.randn(9, n, dtype=torch.float64) for n in (4, 4, 2)]
    demo_std = torch.tensor([0.5, 2.0], dtype=torch.float64)
    rows = obs, z, action, old, advantages, returns
    loss, metrics = relay.ppo_loss(low, value, *rows, demo, demo_std, torch.tensor(0.3))
    ratio = (new - old).exp().numpy()
    a = advantages.numpy()
    a = (a - a.mean()) / (a.std(ddof=1) + 0.01)
    gain = np.where(a > 0, np.minimum(ratio, 1.2), np.maximum(ratio, 0.8)) * a
    error = 0.5 * np.mean((value(obs, z).squeeze(1).detach().numpy() - returns.numpy()) ** 2)
    mean, _ = low(*demo[:2])
    imitation = -normal_log_prob(mean.detach().numpy(), demo_std.numpy(), demo[2].numpy()).mean()
    assert metrics["policy_loss"].item() == pytest.approx(-gain.mean())
    assert loss.item() == pytest.approx(-gain.mean() + error + 0.3 * imitation)


def test_advantages_are_sums_of_weighted_errors_up_to_each_end():
    rng = np.random.default_rng(0)
    args = tiny_args(gamma=0.9)
    T, E = 7, 3
    rewards, values, next_values = rng.normal(size=(3, T, E))
    bootstrap, goes_on = (rng.random((2, T, E)) < 0.7).astype(float)
    inputs = [torch.tensor(x) for x in (rewards, values, next_values, bootstrap, goes_on)]
    advantages, returns = relay.advantages_and_returns(*inputs, args)
    for e in range(E):
        for t in range(T):
            expected = 0.0
            weight = 1.0
            for k in range(t, T):
                expected += weight * (rewards[k, e] + 0.9 * bootstrap[k, e] * next_values[k, e] - values[k, e])
                if not goes_on[k, e]:
                    break
                weight *= 0.9 * 0.95
            assert advantages[t, e].item() == pytest.approx(expected)
            assert returns[t, e].item() == pytest.approx(expected + values[t, e])


# ----------------------------------------------------------------------------------------------------------- line world
class Line:
    """E points on a line, s' = s + 0.1 a, for the vector environments' interface. Time-outs, or true ends for some."""

    def __init__(self, starts, steps=WALK):
        self.s = np.array(starts, dtype=np.float32)
        self.left = np.full(len(self.s), steps)
        self.finishes = np.zeros(len(self.s), dtype=bool)  # whose ends are true ones

    def step(self, actions):
        self.s = (self.s + 0.1 * actions.clip(-1, 1)).astype(np.float32)
        self.left -= 1
        ended = self.left <= 0
        return self.s, np.ones(len(self.s), np.float32), ended & self.finishes, ended & ~self.finishes, {}


def walks():
    """300 walks of 60 steps to a random place, where they stay."""
    rng = np.random.default_rng(0)
    s, target = rng.uniform(-3, 3, (2, 300, 1))
    obs, actions = [], []
    for _ in range(60):
        action = np.clip(10 * (target - s) + 0.1 * rng.normal(size=s.shape), -1, 1)
        obs.append(s)
        actions.append(action)
        s = s + 0.1 * action
    ends = np.tile(np.arange(60) == 59, 300)
    rows = [np.stack(part, 1).reshape(-1, 1) for part in (obs, actions)]
    return data_tools.OfflineDataset(*rows, np.zeros_like(ends), ends)


def line_networks(args):
    low = relay.GoalPolicy(1, slice(0, 1), 1, args)
    high = relay.HighPolicy(1, slice(0, 1), 1, args)
    demonstrations = relay.Demonstrations(1, 1, args)
    return torch.nn.ModuleDict(dict(low=low, high=high, demonstrations=demonstrations))


def test_imitation_reaches_goals_that_are_five_low_windows_away():
    torch.manual_seed(0)
    args = tiny_args()
    networks = line_networks(args)
    data = walks()
    relay.prepare(networks, data, args)
    optimizer = torch.optim.Adam(networks.parameters(), lr=2e-3)
    for _ in range(600):
        loss, _ = relay.pretrain_loss(networks, relay.relabel(data, 256, args))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    starts = np.array([[-1.5], [1.5], [0.0]])
    goal = torch.tensor([[1.0], [-1.0], [2.5]])  # 25 steps of 0.1, five subgoals of five steps
    envs = Line(starts, 100)
    obs = envs.s
    for _ in range(9):
        z = networks["high"](torch.from_numpy(obs), goal)[0].detach()
        assert (np.abs(z.numpy() - obs) < 0.8).all()  # as far as five steps lead, not farther
        obs, _, trace = relay.collect(envs, networks["low"].act, obs, z, args)
        assert len(trace[0]) == 5
    assert np.abs(obs - goal.numpy()).max() < 0.15


def test_fine_tuning_learns_to_reach_subgoals():
    """From a low level that knows nothing: without demonstrations, PPO finds out how to get 0.3 away."""
    torch.manual_seed(0)
    args = tiny_args(
        num_envs=32, rollout_skills=5, epochs=4, learning_rate=1e-2, demo_coef=0.0, max_std=1.0, subgoal_eps=0.1
    )
    agent = relay.Agent(args, line_networks(args))
    rng = np.random.default_rng(0)
    shares = []
    for _ in range(12):
        rb = relay.RolloutBuffer(1, 1, args)
        for _ in range(args.rollout_skills):
            starts = rng.uniform(-1, 1, (32, 1)).astype(np.float32)
            z = torch.from_numpy(starts + 0.3 * rng.choice([-1, 1], (32, 1)).astype(np.float32))
            _, _, trace = relay.collect(Line(starts), agent.low.explore, starts, z, args)
            rows, reached = agent.rows(z, trace)
            rb.add(*rows)
            shares.append(reached.item())
        for _ in range(int(args.epochs * rb.rows / args.batch_size)):
            agent.update(*rb.sample(args.batch_size))
    assert np.mean(shares[:5]) < 0.5 and np.mean(shares[-5:]) > 0.9


@pytest.mark.parametrize("finishes", [False, True], ids=["time-out", "true end"])
@pytest.mark.parametrize("flat", [False, True], ids=["subgoals", "flat"])
def test_what_comes_after_a_subgoal_and_after_an_episode(flat, finishes):
    """Two members, the second one's episode ends after two of five steps. A subgoal that is cut short keeps its value,
    one that is over has none; the task (--flat, reward 1 per step) has none after its true end."""
    torch.manual_seed(0)
    args = tiny_args(gamma=0.9, subgoal_eps=0.25, flat=flat, reward_scale=0.5)
    agent = relay.Agent(args, line_networks(args))
    torch.nn.init.constant_(agent.value.net[-1].bias, 7.0)  # what the value says everywhere: its last weights are 0

    def returns_of(paid, later):  # backwards: the rest is worth .95 of what came and .05 of what the value says
        rest, returns = later, []
        for reward in reversed(paid):
            returns.append((0.5 if flat else 1) * reward + 0.9 * rest)
            rest = 0.95 * returns[-1] + 0.05 * 7
        return returns[::-1]

    envs = Line([[0.0], [0.0]])
    envs.left[1] = 2
    envs.finishes[1] = finishes
    walk = lambda obs, z: torch.tensor([[1.0], [0.5]])  # noqa: E731
    z = torch.tensor([[0.6], [5.0]])
    obs, ended, trace = relay.collect(envs, walk, envs.s, z, args)
    assert ended.tolist() == [False, True]
    rows, reached = agent.rows(z, trace)
    s, goal, action, _, _, returns = (x.squeeze(-1).numpy() for x in rows)
    first = goal == np.float32(0.6)
    assert first.sum() == 5 and len(s) == 7  # three steps of the second member came after its end
    np.testing.assert_allclose(s[first], [0, 0.1, 0.2, 0.3, 0.4], atol=1e-6)
    # Within .25 of .6 after the fourth and fifth step
    expected = returns_of([1] * 5, 7) if flat else returns_of([0, 0, 0, 1, 1], 0)
    np.testing.assert_allclose(returns[first], expected, rtol=1e-5)
    expected = returns_of([1, 1], 0 if finishes else 7) if flat else returns_of([0, 0], 7)
    np.testing.assert_allclose(returns[~first], expected, rtol=1e-5)
    assert reached.item() == 0.5

    # All episodes end before the subgoal is over: it is cut short for both
    envs = Line([[0.0], [0.0]], 2)
    envs.finishes[:] = finishes
    _, ended, trace = relay.collect(envs, walk, envs.s, z, args)
    assert ended.all() and len(trace[0]) == 2
    np.testing.assert_allclose(agent.rows(z, trace)[0][-1].view(2, 2), np.tile(expected, (2, 1)).T, rtol=1e-5)


# ------------------------------------------------------------------------------------------------------ the user's goal
def test_low_level_gets_one_subgoal_for_all_its_steps(monkeypatch):
    monkeypatch.setitem(data_tools.TASKS["maze"].env_kwargs, "max_episode_steps", 40)
    seen = []
    subgoals = iter(torch.arange(100.0)[:, None, None].expand(100, 3, 4))

    class Low(torch.nn.Module):
        def act(self, obs, z):
            seen.append(z)
            return torch.zeros(3, 2)

    agent = types.SimpleNamespace(low=Low(), choose_skills=lambda obs, global_step, explore: next(subgoals))
    relay.rollout(agent, tiny_args(skill_horizon=15), 3, seed=0)
    assert [int(z[0, 0]) for z in seen] == [0] * 15 + [1] * 15 + [2] * 10


@pytest.mark.parametrize("env_id", list(relay.GOALS))
def test_goal_of_the_user_is_the_tasks(env_id):
    """With --flat the goal itself comes back: everything is done in it, and what the task does not name stays."""
    envs = data_tools.make_envs(env_id, 2)
    obs, _ = envs.reset(seed=0)
    envs.close()
    args = tiny_args(env_id=env_id, flat=True)
    goal = relay.Agent(args, relay.make_networks(args)).choose_skills(obs, None, explore=False).numpy()
    kept = [k for k in range(obs.shape[1]) if k not in relay.GOALS[env_id]]
    assert np.array_equal(goal[:, kept], obs[:, kept])
    if env_id == "maze":
        assert (goal[:, :2] == maze.GOAL).all()
    elif env_id == "calvin":
        assert calvin.subtask_conditions(goal[None], obs[None]).all()
    else:
        done = kitchen.elements_complete(goal)
        assert {name for name, values in done.items() if values.all()} == set(kitchen.SUBTASKS[env_id])


def test_who_looks_at_the_users_goal_sees_objects_only():
    torch.manual_seed(0)
    networks = random_networks(tiny_args(env_id="kitchen"))
    flat = random_networks(tiny_args(env_id="kitchen", flat=True))
    obs, goal = torch.randn(2, 3, 30, dtype=torch.float64)
    for policy, sees_arm in ((networks["high"], False), (networks["low"], True), (flat["low"], False)):
        for entry in (0, 8, 9, 29):  # the arm's, then objects'
            other = goal.clone()
            other[:, entry] += 1
            assert torch.equal(policy(obs, goal)[0], policy(obs, other)[0]) == (entry < 9 and not sees_arm)


def test_subgoals_are_where_the_high_level_goes_from_here():
    args = tiny_args()
    networks = relay.make_networks(args)
    torch.nn.init.zeros_(networks["high"].net.net[-1].weight)
    torch.nn.init.zeros_(networks["high"].net.net[-1].bias)  # it does not go anywhere
    obs = np.random.default_rng(0).uniform(5, 35, (3, 4)).astype(np.float32)
    agent = relay.Agent(args, networks)
    np.testing.assert_array_equal(agent.choose_skills(obs, None, explore=False), obs)
    # Towards the user's goal, seen from here
    torch.nn.init.normal_(networks["high"].net.net[-1].weight)
    subgoal, goal = agent.choose_skills(obs, None, explore=False), torch.from_numpy(obs).clone()
    goal[:, :2] = torch.tensor(maze.GOAL)
    torch.testing.assert_close(subgoal, networks["high"](torch.from_numpy(obs), goal)[0])


def test_an_advantage_is_what_came_and_what_comes_less_what_was_expected():
    torch.manual_seed(0)
    args = tiny_args(gamma=0.9)
    agent = relay.Agent(args, line_networks(args))
    torch.nn.init.normal_(agent.value.net[-1].weight)
    obs, next_obs, z = torch.randn(3, 1, 6, 1)
    rows, _ = agent.rows(z[0], trace_of(obs, obs, next_obs))
    later, before = agent.value(next_obs, z)[0, :, 0], agent.value(obs, z)[0, :, 0]
    assert (later - before).abs().min() > 0.01
    reached = ((z - next_obs)[0, :, 0].abs() < args.subgoal_eps).float()
    torch.testing.assert_close(rows[4], reached + 0.9 * later - before)


def test_distances_to_a_subgoal_are_in_standard_deviations():
    """Root mean square over the entries: sqrt((d_1^2 / 4 + d_2^2 / .25) / 4) for the stds 2, .5, 1 and 1."""
    args = tiny_args(subgoal_eps=0.3)
    agent = relay.Agent(args, relay.make_networks(args))
    agent.low.net.std.copy_(torch.tensor([2.0, 0.5, 1.0, 1.0]))
    ways = torch.zeros(6, 4)
    ways[:, :2] = torch.tensor([[1.19, 0.0], [1.21, 0.0], [0.0, 0.29], [0.0, 0.31], [0.9, 0.19], [0.9, 0.21]])
    _, share = agent.rows(ways, trace_of(torch.zeros(1, 6, 4), torch.zeros(1, 6, 2), torch.zeros(1, 6, 4)))
    inside = [(d1**2 / 4 + d2**2 / 0.25) / 4 < 0.09 for d1, d2, _, _ in ways.tolist()]
    assert share.item() == pytest.approx(np.mean(inside)) and inside == [True, False] * 3


def test_fine_tuning_imitates_pairs_of_the_low_level():
    torch.manual_seed(0)
    args = tiny_args()
    networks = line_networks(args)
    relay.prepare(networks, episodes(30, 50), args)
    obs, goal, action = networks["demonstrations"].sample(200)
    assert torch.equal(obs, action) and set((goal - obs).flatten().tolist()) == {1, 2, 3, 4, 5}
    # With the std of RIL, while exploration is small
    torch.nn.init.constant_(networks["low"].log_std, float(np.log(0.2)))
    agent = relay.Agent(args, networks)
    assert agent.demo_std.item() == pytest.approx(0.2) and agent.low.log_std.exp().item() == pytest.approx(0.03)
    # The value sees states as the low level does, in standard deviations of the data
    given = []
    for net in (agent.low.net, agent.value):
        net.net.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0]))
        net(obs, goal)
    assert torch.equal(*given) and given[0].std(0).max() < 2


# ----------------------------------------------------------------------------------------------------------------- runs
def test_imitation_alone_leaves_an_agent_that_can_be_fine_tuned(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(data_tools.TASKS["maze"].env_kwargs, "max_episode_steps", 40)
    flags = "--pretrain-updates 3 --pretrain-eval-episodes 1 --eval-episodes 2 --device cpu --hidden-dim 16"
    flags += f" --epochs 1 --batch-size 64 --rollout-skills 1 --total-timesteps 0 --data-dir {data_dir}"
    flags += f" --run-dir {tmp_path / 'runs'}"
    results = relay.train(relay.parse_args(flags.split()))
    assert results["env_steps"] == results["updates"] == 0 and results["pretraining"]["updates"] == 3
    (run,) = (tmp_path / "runs").iterdir()
    relay.evaluate(relay.parse_args(["--evaluate", str(run / "checkpoint.pt")]))
    assert "maze: 2 episodes of" in capsys.readouterr().out
    agent = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    assert agent["demo_coef"].item() == pytest.approx(relay.Args.demo_coef)
    updated, acted = [], []
    update, collect = relay.Agent.update, relay.collect

    def noted_update(agent, *batch):
        metrics = update(agent, *batch)
        updated.append(agent.low.net.net[0].weight.detach().clone())
        return metrics

    def noted_collect(envs, act, *args):
        if updated:
            latest = torch.equal(updated[-1], act.__self__.net.net[0].weight)
            acted.append((act.__name__, len(args[0]), latest))
        return collect(envs, act, *args)

    monkeypatch.setattr(relay.Agent, "update", noted_update)
    monkeypatch.setattr(relay, "collect", noted_collect)
    results = relay.train(relay.parse_args(["--resume", str(run), "--total-timesteps", "300"]))
    assert set(acted) == {("explore", 8, True), ("act", 2, True)}  # by the policy of the last round
    assert results["env_steps"] == 320 and results["updates"] == 240 // 64 + 80 // 64  # of each roll-out's rows
    agent = torch.load(run / "checkpoint.pt", weights_only=True)["agent"]
    expected = relay.Args.demo_coef * 0.999**2  # two roll-outs
    assert agent["demo_coef"].item() == pytest.approx(expected) != relay.Args.demo_coef


def test_task_without_a_goal_is_refused():
    with pytest.raises(SystemExit, match="error: --env-id walk has no goal here"):
        tiny_args(env_id="walk")


def test_own_task_has_networks_once_it_has_a_goal(monkeypatch):
    task = data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect")
    monkeypatch.setitem(data_tools.TASKS, "walk", task)
    monkeypatch.setitem(relay.GOALS, "walk", {0: 0.8, 1: 0.8})
    monkeypatch.setitem(relay.GOAL_ENTRIES, "walk", slice(1, 2))
    high = relay.make_networks(tiny_args(env_id="walk"))["high"]
    subgoal = lambda *goal: high(torch.zeros(1, 2), torch.tensor([goal]))[0]  # noqa: E731
    assert torch.equal(subgoal(0.0, 1.0), subgoal(5.0, 1.0))  # it looks at the entry of `walk` alone
    assert not torch.equal(subgoal(0.0, 1.0), subgoal(0.0, 5.0))
