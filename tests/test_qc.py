"""qc.py against independent NumPy versions, hand-made critics and buffers, and toys with known solutions."""

import copy
import dataclasses
import math
import threading

import numpy as np
import pytest
import torch
import toy_walk
from numpy_nets import NO_CURVES, NO_SCORES, has_gradient, noisy_copy, np_features, np_net, random_obs, same_weights
from test_runs import assert_same, state_of

import data_tools
from algos import qc


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", hidden_dim=16, hidden_layers=2, skill_horizon=3, num_envs=2, batch_size=8, buffer_size=80,
        num_samples=5, num_candidates=4, flow_steps=4, warmup_steps=60, offline="none", learning_rate=1e-3,
    )  # fmt: skip
    return qc.Args(**(small | changes))


def make_agent(args, seed=0):
    """An agent whose networks are no longer those of the beginning, slow copies included."""
    torch.manual_seed(seed)
    agent = qc.Agent(args, qc.make_networks(args))
    with torch.no_grad():
        for weight in agent.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return agent


def tensors(arrays, dtype=torch.float32):
    return [torch.as_tensor(x).to(dtype) for x in arrays]


# ------------------------------------------------------------------------------------------------------------ the clone
def test_chunks_are_drawn_by_eulers_steps_from_noise_to_data():
    flow = noisy_copy(qc.make_networks(tiny_args()).double())["flow"]
    obs = random_obs(np.random.default_rng(0), 5)
    torch.manual_seed(1)
    chunks = flow.sample(torch.from_numpy(obs), 7)
    torch.manual_seed(1)
    x = torch.randn(5, 7, 6).numpy().astype(np.float64)
    inputs = np.repeat(np_features(obs)[:, None], 7, 1)
    for time in (0, 0.25, 0.5, 0.75):  # never at 1
        x = x + 0.25 * np_net(flow.net, np.concatenate([inputs, x, np.full((5, 7, 1), time)], -1))
    assert chunks.shape == (5, 7, 6) and np.abs(x).max() > 1
    np.testing.assert_allclose(chunks, np.clip(x, -1, 1), rtol=1e-4, atol=1e-5)  # features are rounded


def test_flow_loss_is_that_of_straight_lines():
    """Actions behind an episode's end count as zeros in the mean."""
    flow = noisy_copy(qc.make_networks(tiny_args()).double())["flow"]
    rng = np.random.default_rng(0)
    obs, chunk = random_obs(rng, 6), rng.uniform(-1, 1, (6, 6))
    alive = np.array([[1, 1, 1]] * 4 + [[1, 1, 0], [1, 0, 0]], dtype=np.float64)
    torch.manual_seed(3)
    loss = qc.flow_loss(flow, *tensors((obs, chunk, alive), torch.float64))
    torch.manual_seed(3)
    noise, time = torch.randn(6, 6, dtype=torch.float64).numpy(), torch.rand(6, 1, dtype=torch.float64).numpy()
    x = (1 - time) * noise + time * chunk
    velocity = np_net(flow.net, np.concatenate([np_features(obs), x, time], -1))
    mask = np.repeat(alive, 2, 1)  # two numbers an action
    assert loss.item() == pytest.approx((mask * (velocity - (chunk - noise)) ** 2).sum() / 36, rel=1e-5)
    loss.backward()
    assert has_gradient(flow)


def fitted(flow, chunks, updates, rate):
    """The flow after so many updates on chunks (n, D), all from the same state."""
    optimizer = torch.optim.Adam(flow.parameters(), lr=rate)
    for k in range(updates):
        optimizer.param_groups[0]["lr"] = rate * (1 - k / updates)
        chunk = chunks[torch.randint(len(chunks), (256,))]
        loss = qc.flow_loss(flow, torch.ones(256, 4), chunk, torch.ones(256, 3))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return flow


def test_of_data_that_are_one_chunk_the_flow_is_known():
    """From x at time t the way to it is (c - x) / (1 - t); any number of steps arrives."""
    torch.manual_seed(0)
    args = tiny_args(hidden_dim=64, flow_steps=10)
    point = torch.tensor([0.5, -0.7, 0.1, 0.9, -0.2, 0.3])
    flow = fitted(qc.make_networks(args)["flow"], point[None], 1000, 3e-3)
    noise, t = torch.randn(500, 6), 0.9 * torch.rand(500, 1)
    x = (1 - t) * noise + t * point
    with torch.no_grad():
        error = flow(torch.ones(500, 4), x, t) - (point - x) / (1 - t)
    assert error.square().mean() < 0.02  # of 1.5
    for flow.num_steps in (1, 10):
        assert (flow.sample(torch.ones(4), 500) - point).square().mean() < 0.05


def test_a_chunk_beside_the_path_is_led_back_by_its_first_action(monkeypatch, tmp_path):
    """The position that it asks for, observed + reach * action, stays; later actions are those of the path.

    The learning rate falls to zero.
    """
    args = qc.parse_args("--env-id kitchen --device cpu --hidden-dim 8 --pretrain-updates 4".split())
    args.data_dir = str(tmp_path)
    networks, seen, rates = qc.make_networks(args), [], []
    ends = np.arange(1, 401) % 100 == 0
    data = data_tools.OfflineDataset(np.ones((400, 30)), np.zeros((400, 9)), ends & False, ends)

    def loss(flow, obs, actions, args):
        seen.append((obs[:, 0, :9], actions))
        return sum(weight.sum() for weight in flow.parameters()), {}

    def step(optimizer, original=torch.optim.Adam.step):
        rates.append(optimizer.param_groups[0]["lr"])
        original(optimizer)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    monkeypatch.setattr(qc, "pretrain_loss", loss)
    monkeypatch.setattr(qc, "rollout", lambda *inputs: NO_SCORES)
    qc.pretrain(args, networks, data, NO_CURVES, threading.Event())
    np.testing.assert_allclose(rates, args.pretrain_lr * np.sqrt([1, 0.75, 0.5, 0.25]))
    arm, actions = seen[0]
    J, reach = data_tools.TASKS["kitchen"].arm
    assert 0.01 < (arm[:, :J] - 1).std() < 0.03 and actions.shape == (256, 5, 9)
    torch.testing.assert_close(arm[:, :J] + reach * actions[:, 0, :J], torch.ones(256, J))
    assert not actions[:, 1:].any() and not actions[:, 0, J:].any()


def test_two_ways_of_acting_stay_apart_and_the_critics_choose_theirs():
    """Half of the data's chunks are all .8, half all -.8; only the second pays. A Gaussian would be in between."""
    torch.manual_seed(0)
    args = tiny_args(hidden_dim=64, flow_steps=20, num_samples=32, learning_rate=6e-3)
    modes = 0.8 * torch.tensor([[1.0], [-1.0]]).expand(2, 6)
    networks = qc.make_networks(args)
    fitted(networks["flow"], modes.repeat(50, 1) + 0.02 * torch.randn(100, 6), 700, 6e-3)
    agent = qc.Agent(args, networks)
    drawn = agent.flow.sample(torch.ones(4), 5_000)
    assert (drawn.abs() < 0.3).any(1).float().mean() < 0.02
    assert 0.4 < (drawn < 0).all(1).float().mean() < 0.6
    candidates = drawn[:, None].expand(-1, args.num_candidates, -1)
    for _ in range(150):
        rows = torch.randint(5_000, (128,))
        chunk, ones = drawn[rows], torch.ones(128)
        pays = (chunk < 0).all(1).float()
        agent.update(torch.ones(128, 4), chunk, pays, ones, torch.ones(128, 3), torch.ones(128, 4), candidates[rows])
    chosen = agent.choose_chunks(np.ones((500, 4), dtype=np.float32), args.warmup_steps)
    assert (chosen < -0.5).all((1, 2)).mean() > 0.99
    single = agent.choose_chunks(np.ones((500, 4), dtype=np.float32), args.warmup_steps - 1)
    assert 0.35 < (single < -0.5).all((1, 2)).mean() < 0.65  # in the warm-up it is the clone


def test_published_sizes():
    args = qc.parse_args(["--env-id", "kitchen", "--published", "--device", "cpu"])
    assert args.bc_online  # the clone learns on in RL
    agent = qc.Agent(args, qc.make_networks(args))
    obs_dim, action_dim = data_tools.env_sizes("kitchen")
    D = 5 * action_dim
    assert (agent.flow.net[0].in_features, agent.flow.net[-1].out_features) == (obs_dim + D + 1, D)
    assert (agent.critics.first[0].in_features, agent.critics.first[0].out_features) == (obs_dim + D, 512)
    bound = math.sqrt(6 / (512 + 512))  # Xavier's uniform weights
    assert agent.flow.net[2].weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert not agent.flow.net[2].bias.any()
    kinds = [[type(layer).__name__ for layer in net[:3]] for net in (agent.critics.second, agent.flow.net)]
    assert kinds == [["Linear", "GELU", "LayerNorm"], ["Linear", "GELU", "Linear"]]  # it bounds Q of unseen chunks


# --------------------------------------------------------------------------------------------------------------- replay
def filled_buffer(args, chunks=20, seed=0):
    """A buffer with numbered rows of two environments, and the rows of each as it was told: (number, reward, ends)."""
    rng = np.random.default_rng(seed)
    H = args.skill_horizon
    rb = qc.ReplayBuffer(4, 2, args)
    told = [[], []]
    for _ in range(chunks):
        steps = rng.integers(1, H + 1, 2)
        shape = (2, H)
        obs, next_obs = np.zeros((*shape, 4)), np.zeros((*shape, 4))
        actions, rewards = rng.uniform(-1, 1, (*shape, 2)), rng.normal(size=shape)
        ends, time_outs = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
        candidates = np.zeros((*shape, args.num_candidates, 2 * H))
        for e in range(2):
            for h in range(H):
                number = 1_000 * e + len(told[e]) + 0.5 * (h >= steps[e])  # the latter do not happen
                obs[e, h], next_obs[e, h], candidates[e, h] = number, number + 0.25, 0.01 * (number % 1_000)
                if h < steps[e]:
                    last = h == steps[e] - 1 and (steps[e] < H or rng.random() < 0.3)
                    ends[e, h] = last and rng.random() < 0.5
                    time_outs[e, h] = last and (not ends[e, h] or rng.random() < 0.2)
                    told[e].append((number, actions[e, h], rewards[e, h], ends[e, h], time_outs[e, h]))
        given = (obs, actions, rewards, ends, time_outs, next_obs, candidates)
        rb.add(*(x.astype(bool if x.dtype == bool else np.float32) for x in given), steps)
    return rb, told


@pytest.mark.parametrize("chunks", [3, 60])
def test_windows_against_a_loop(chunks):
    """Of one environment, in a row, none over the place where the ring is written; 60 chunks go around it."""
    args = tiny_args(gamma=0.9)
    H = args.skill_horizon
    rb, told = filled_buffer(args, chunks)
    kept = [rows[-40:] for rows in told]
    torch.manual_seed(0)
    sample = [x.numpy() for x in rb.sample(6_000)]
    seen, kinds = {}, set()
    for obs, chunk, rewards, ends, alive, next_obs, candidates in zip(*sample):
        number = obs[0]
        e = int(number // 1_000)
        first = int(number - 1_000 * e) - (len(told[e]) - len(kept[e]))
        window = kept[e][first : first + H]
        assert len(window) == H  # it is in the buffer, whole
        expected, going, end = 0.0, 1.0, False
        living = []
        for k, (_, _, reward, ended, time_out) in enumerate(window):
            living.append(going)
            expected += going * 0.9**k * reward
            end |= bool(going and ended)
            going *= not (ended or time_out)
        assert rewards == pytest.approx(expected, abs=1e-5)
        assert ends == end and alive.tolist() == living
        np.testing.assert_allclose(chunk, np.concatenate([row[1] for row in window]), rtol=1e-6)
        last = window[-1][0]
        assert (obs == number).all() and (next_obs == last + 0.25).all()
        np.testing.assert_allclose(candidates, 0.01 * (last % 1_000), rtol=1e-3)  # halves
        assert candidates.shape == (args.num_candidates, 2 * H)
        counts = float(qc.counting(torch.tensor([ends]), torch.from_numpy(alive[None]))[0])
        cut = any(t and not d and living[k] for k, (*_, d, t) in enumerate(window[:-1]))
        assert counts == (not cut)
        kinds.add((bool(ends), bool(alive[-1]), counts))
        seen[number] = seen.get(number, 0) + 1
    starts = sum(max(len(rows) - H + 1, 0) for rows in kept)
    assert len(seen) == starts  # each begins somewhere, equally often
    assert chunks == 3 or (min(seen.values()) > 40 and max(seen.values()) < 130)
    if chunks == 60:  # cut by an end, cut by a time-out, whole with and without an end
        assert kinds == {(True, False, 1.0), (False, False, 0.0), (True, True, 1.0), (False, True, 1.0)}


def test_half_of_a_batch_are_windows_of_the_data():
    args = tiny_args(offline="pred")
    rb, _ = filled_buffer(args)
    rng = np.random.default_rng(0)
    ends = np.arange(200) % 20 == 19
    obs = np.arange(200)[:, None] * np.ones(4)
    rb.data = data_tools.OfflineDataset(obs, rng.uniform(-1, 1, (200, 2)), np.zeros_like(ends), ends)
    *own, windows, actions = rb.sample(9)
    assert {len(x) for x in own} == {5} and windows.shape == (4, 4, 4) and actions.shape == (4, 3, 2)
    first = windows[:, 0, 0].long()
    assert torch.equal(windows[..., 0].long(), first[:, None] + torch.arange(4))
    assert torch.equal(actions, rb.data.actions[first[:, None] + torch.arange(3)])
    assert (first % 20 + 3 < 20).all()  # of one episode


# --------------------------------------------------------------------------------------------------------------- losses
def rows(args, B=6, seed=1):
    """Windows, as arrays: whole, with an end on the last step, cut by an end, cut by a time-out."""
    rng = np.random.default_rng(seed)
    H, D = args.skill_horizon, 2 * args.skill_horizon
    ends = np.array([0, 1, 1, 0, 0, 0.0])
    alive = np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 1, 1.0]])
    assert H == 3
    chunk, candidates = rng.uniform(-1, 1, (B, D)), rng.uniform(-1, 1, (B, args.num_candidates, D))
    return random_obs(rng, B), chunk, rng.normal(size=B), ends, alive, random_obs(rng, B), candidates


def np_heads(heads, obs, chunk):
    inputs = np.concatenate([np_features(obs), chunk], -1)
    return np_net(heads.first, inputs)[..., 0], np_net(heads.second, inputs)[..., 0]


def test_critics_choose_what_follows_and_the_slow_copies_judge_it():
    args = tiny_args(gamma=0.9)
    agent = make_agent(args).double()
    agent.target = noisy_copy(agent.target, 5)
    batch = obs, chunk, rewards, ends, alive, next_obs, candidates = rows(args)
    loss, metrics = qc.critic_loss(agent.critics, agent.target, *tensors(batch, torch.float64), args)

    each = np.repeat(next_obs[:, None], args.num_candidates, 1)
    best = np.mean(np_heads(agent.critics, each, candidates), 0).argmax(1)
    of_slow = np.mean(np_heads(agent.target, each, candidates), 0)
    assert (best != of_slow.argmax(1)).any()  # else both would give the same
    td_target = rewards + (1 - ends) * 0.9**3 * of_slow[np.arange(6), best]
    counts = np.array([1, 1, 1, 0, 1, 1])  # not the time-out with unknown rest
    q1, q2 = np_heads(agent.critics, obs, chunk)
    expected = (counts * ((q1 - td_target) ** 2 + (q2 - td_target) ** 2)).sum() / (2 * 6)
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["td_target"].item() == pytest.approx(td_target.mean(), rel=1e-4)
    loss.backward()
    assert has_gradient(agent.critics.first) and has_gradient(agent.critics.second)
    assert not has_gradient(agent.target) and not has_gradient(agent.flow)


def test_outcomes_are_learnt_from_windows_that_count():
    args = tiny_args(offline="pred")
    agent = make_agent(args).double()
    obs, chunk, rewards, ends, alive, *_ = batch = rows(args)
    loss, metrics = qc.outcome_loss(agent.outcome, *tensors(batch[:5], torch.float64))
    reward, logit = np_heads(agent.outcome, obs, chunk)
    counts = np.array([1, 1, 1, 0, 1, 1])
    end = 1 / (1 + np.exp(-logit))
    entropy = -(ends * np.log(end) + (1 - ends) * np.log(1 - end))
    assert metrics["reward_loss"].item() == pytest.approx((counts * (reward - rewards) ** 2).mean(), rel=1e-4)
    assert metrics["end_loss"].item() == pytest.approx((counts * entropy).mean(), rel=1e-4)
    assert loss.item() == pytest.approx(sum(value.item() for value in metrics.values()))


@pytest.mark.parametrize("offline", ["zero", "pred"])
def test_labels_of_the_data(offline):
    args = tiny_args(offline=offline)
    agent = make_agent(args).double()
    rng = np.random.default_rng(0)
    obs, actions = random_obs(rng, 5, 4), rng.uniform(-1.5, 1.5, (5, 3, 2))
    torch.manual_seed(2)
    labelled = qc.demonstrations(agent.flow, agent.outcome, *tensors((obs, actions), torch.float64), args)
    first, chunk, rewards, ends, alive, last, candidates = (x.numpy() for x in labelled)
    assert np.array_equal(first, obs[:, 0]) and np.array_equal(last, obs[:, 3]) and alive.all()
    np.testing.assert_allclose(chunk, np.clip(actions.reshape(5, 6), -1, 1), atol=2e-5)  # in the critics' range
    torch.manual_seed(2)
    assert np.array_equal(candidates, agent.flow.sample(torch.from_numpy(obs[:, 3]), args.num_candidates))
    if offline == "zero":
        assert not rewards.any() and not ends.any()  # an end would say that the goal is worth nothing
    else:
        reward, logit = np_heads(agent.outcome, first, chunk)
        np.testing.assert_allclose(rewards, reward, rtol=1e-4)
        np.testing.assert_allclose(ends, 1 / (1 + np.exp(-logit)), rtol=1e-4)


@pytest.mark.parametrize("online", [False, True], ids=["frozen clone", "bc_online"])
@pytest.mark.parametrize("offline", ["none", "zero", "pred"])
def test_update_moves_what_it_should(online, offline):
    args = tiny_args(offline=offline, bc_online=online, num_candidates=0 if online else 4, tau=0.25)
    agent = make_agent(args)
    before = copy.deepcopy(agent)
    rng = np.random.default_rng(0)
    batch = tensors(rows(args))
    if offline != "none":
        batch += tensors((random_obs(rng, 6, 4), rng.uniform(-1, 1, (6, 3, 2))))
    torch.manual_seed(4)
    metrics = agent.update(*batch)

    # The same by hand: the sum of the losses, of which no part is another's business
    torch.manual_seed(4)
    own, obs = batch[:7], batch[0]
    if offline != "none":
        labels = qc.demonstrations(before.flow, before.outcome, *batch[7:], args)
        own = [torch.cat(pair) for pair in zip(own, labels)]
    if online:
        own[6] = before.flow.sample(own[5], args.num_samples)
        assert own[6].shape[1] == args.num_samples
    losses = [qc.critic_loss(before.critics, before.target, *own, args)[0]]
    if offline == "pred":
        losses.append(qc.outcome_loss(before.outcome, *batch[:5])[0])
    if online:
        losses.append(qc.flow_loss(before.flow, own[0], own[1], own[4]))
    slow = [weight.clone() for weight in before.target.parameters()]
    trained = [before.critics] + [before.outcome] * (offline == "pred") + [before.flow] * online
    for part, loss in zip(trained, losses):
        optimizer = torch.optim.Adam(part.parameters(), lr=1e-3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pairs = [(agent.critics, before.critics), (agent.flow, before.flow)]
    pairs += [(agent.outcome, before.outcome)] * (offline == "pred")
    for now, expected in pairs:
        for a, b in zip(now.parameters(), expected.parameters()):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    for old, a, b in zip(slow, agent.target.parameters(), agent.critics.parameters()):
        torch.testing.assert_close(a, 0.75 * old + 0.25 * b)
    assert len(obs) == 6 and all(value.ndim == 0 and value.isfinite() for value in metrics.values())
    assert same_weights(agent.flow, make_agent(args).flow) != online


def test_best_of_n_by_the_mean_of_both_critics():
    args = tiny_args()
    agent = make_agent(args)
    obs = random_obs(np.random.default_rng(0), 6).astype(np.float32)
    for step, n in ((None, 1), (args.warmup_steps - 1, 1), (args.warmup_steps, 5)):
        torch.manual_seed(1)
        chosen = agent.choose_chunks(obs, step)
        torch.manual_seed(1)
        candidates = agent.flow.sample(torch.from_numpy(obs), n).numpy()
        q = np.mean(np_heads(agent.critics, np.repeat(obs[:, None], n, 1), candidates), 0)
        assert np.array_equal(chosen, candidates[np.arange(6), q.argmax(1)].reshape(6, 3, 2))
    args.act_steps = 2
    torch.manual_seed(1)
    assert np.array_equal(agent.choose_chunks(obs, step), chosen[:, :2])


# ----------------------------------------------------------------------------------------------------- runs on the walk
@pytest.fixture
def walk(monkeypatch):
    """The toy task, with a goal that random walks often reach."""
    task = data_tools.Task("toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect", noise=0.2)
    monkeypatch.setitem(data_tools.TASKS, "walk", task)
    monkeypatch.setattr(toy_walk, "GOAL", np.array([-0.3, -0.3]))
    return task


def walk_args(folder, **changes):
    small = dict(
        env_id="walk", skill_horizon=7, total_timesteps=900, pretrain_updates=30, pretrain_eval_episodes=1,
        pretrain_eval_interval=1_000, eval_episodes=2, updates_per_step=0.1, buffer_size=400, reward_scale=0.5,
        run_dir=str(folder / "runs"), data_dir=str(folder), eval_interval=10_000,
    )  # fmt: skip
    return tiny_args(**(small | changes))


def test_rings_hold_what_happened(walk, tmp_path, monkeypatch):
    """Against the recorded env steps: episodes end within chunks of 7, by the goal or after 60 steps; then no row."""
    given, buffers, drawn = [], [], []
    step, add, sample = toy_walk.WalkVectorEnv.step, qc.ReplayBuffer.add, qc.Flow.sample

    def record(envs, action):
        frozen = envs.terminations | envs.truncations
        before = envs.observations()
        result = step(envs, action)
        given.append((frozen, before, np.array(action), *result[:4]))
        return result

    def noted(flow, obs, n):
        drawn.append((obs, sample(flow, obs, n)))
        return drawn[-1][1]

    monkeypatch.setattr(toy_walk.WalkVectorEnv, "step", record)
    monkeypatch.setattr(qc.ReplayBuffer, "add", lambda rb, *rest: buffers.append(rb) or add(rb, *rest))
    monkeypatch.setattr(qc, "rollout", lambda *args: NO_SCORES)
    monkeypatch.setattr(qc, "pretrain", lambda *args: {})
    monkeypatch.setattr(qc.Flow, "sample", noted)
    results = qc.train(walk_args(tmp_path, warmup_steps=900))
    rb = buffers[0]
    assert results["updates"] == 0 and rb.added.sum() == results["env_steps"] >= 900
    candidates = {}
    for obs, chunks in drawn:
        for place, of in zip(obs.flatten(0, 1).tolist(), chunks.flatten(0, 1).half()) if obs.ndim == 3 else ():
            candidates.setdefault(tuple(place), []).append(of)  # places may be visited twice
    kinds = set()
    for e in range(2):
        expected = [[x[e] for x in row[1:]] for row in given if not row[0][e]][-200:]
        n = int(rb.added[e])
        assert n > 250  # the ring of 200 has gone around
        order = torch.arange(n - 200, n) % 200
        mine = [column[e, order] for column in rb.columns]
        for i, (obs, action, next_obs, reward, end, time_out) in enumerate(expected):
            for column, value in zip(mine, (obs, action, 0.5 * reward, end, time_out, next_obs)):
                np.testing.assert_allclose(column[i].numpy(), value, rtol=1e-6)
            assert any(torch.equal(mine[6][i], of) for of in candidates[tuple(mine[5][i].tolist())])
            kinds.add((bool(end), bool(time_out)))
    assert kinds == {(False, False), (True, False), (False, True)}


@pytest.mark.parametrize(
    "changes",
    [
        dict(offline="pred", act_steps=2, warmup_steps=0, updates_per_step=0.5),  # due before a ring has a window
        dict(bc_online=True, num_candidates=0, offline="zero"),
    ],
)
def test_resumed_runs_with_offline_data_go_on_bit_for_bit(changes, walk, tmp_path, monkeypatch):
    parts, update = set(), qc.Agent.update
    monkeypatch.setattr(qc.Agent, "update", lambda agent, *batch: parts.add(len(batch)) or update(agent, *batch))
    whole = walk_args(tmp_path, **changes)
    results = qc.train(whole)
    (run,) = (tmp_path / "runs").iterdir()
    halves = dataclasses.replace(whole, run_dir=str(tmp_path / "halves"))
    qc.train(dataclasses.replace(halves, total_timesteps=400))
    (part,) = (tmp_path / "halves").iterdir()
    assert 0 < state_of(part)["gradient_step"] < results["updates"]
    again = qc.train(dataclasses.replace(halves, resume=str(part)))
    one, two = state_of(run), state_of(part)
    for state in (one, two):
        state.pop("evaluations")  # the first half has one more
    assert_same(one, two)
    assert again["updates"] == results["updates"] and parts == {7 + 2}  # the last two are windows of the data
