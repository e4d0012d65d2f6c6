"""reskill.py against autograd's Jacobians, numerical integrals, loops over paths in NumPy, and small known problems."""

import copy
import dataclasses
import inspect
import itertools
import math
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from numpy_nets import np_features, random_obs, same_weights

import data_tools
from algos import reskill, spirl
from data_tools.tasks.maze import MazeVectorEnv


# -------------------------------------------------------------------------------------------------------------- helpers
def tiny_args(**changes):
    small = dict(
        device="cpu", cudagraphs=False, hidden_dim=16, skill_dim=4, skill_horizon=3, flow_dim=16, policy_dim=16,
        num_envs=2, rollout_skills=4, batch_size=50, eval_episodes=1,
    )  # fmt: skip
    return reskill.Args(**(small | changes))


def noisy(module, size=0.3, seed=1):
    """The module with other weights."""
    torch.manual_seed(seed)
    for value in module.parameters():
        value.data += size * torch.randn_like(value)
    return module


def noisy_flow(args):
    return noisy(reskill.FlowPrior(4, args).double())


def maze_obs(*shape, seed=0):
    return torch.from_numpy(random_obs(np.random.default_rng(seed), *shape))


def noisy_agent(args, action_dim=2):
    """An agent in float64 in which nothing is at its start, and BatchNorm has seen data."""
    agent = noisy(reskill.Agent(args, reskill.make_networks(args, 4, action_dim)).double(), 0.1)
    for learner in agent.learners.values():
        learner.log_std.data.clamp_(*learner.log_bounds)
    return agent


def random_skill(args, seed, action_dim=2):
    """What collect_skill might return of one skill, every number different, without ends."""
    rng = np.random.default_rng(seed)
    E, H = args.num_envs, args.skill_horizon
    obs = random_obs(rng, E, H + 1)
    z = torch.from_numpy(rng.normal(size=(E, args.skill_dim)))
    actions = rng.normal(size=(E, H, action_dim))
    no = np.zeros(E, dtype=bool)
    steps = np.full(E, H)
    return [obs[:, :-1], z, actions, rng.normal(size=actions.shape), rng.normal(size=(E, H)), no, no, steps, obs[:, -1]]


def filled_buffer(args, agent):
    """T skills of two environments: the first has a true end after 2 steps of its skill 1, the second a time-out at
    the end of its skill 2; both go on at the roll-out's end.
    """
    rb = reskill.RolloutBuffer(4, 2, args)
    rb.columns = {name: column.double() for name, column in rb.columns.items()}
    skills = [random_skill(args, t) for t in range(args.rollout_skills)]
    skills[1][5] = np.array([True, False])
    skills[1][7] = np.array([2, args.skill_horizon])
    skills[1][4][0, 2:] = 0.0
    skills[2][6] = np.array([False, True])
    skills[1][6] = np.array([True, False])  # at its time limit, too
    for before, after in itertools.pairwise(skills):
        running = ~(before[5] | before[6])
        after[0][running, 0] = before[8][running]
    with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.double()):
        for skill in skills:
            rb.add(*skill)
        rb.prepare(agent)
    return rb, skills


# ----------------------------------------------------------------------------------------------------------- flow prior
@pytest.mark.parametrize("Z", [2, 5, 10])
def test_inverse_is_exact_and_the_determinant_is_autograds(Z):
    args = tiny_args(skill_dim=Z)
    flow = noisy_flow(args)
    z = torch.randn(6, Z, dtype=torch.float64)
    obs = maze_obs(6)
    g, log_det = flow(z, obs)
    assert (g - z).abs().max() > 0.1  # no longer the identity
    torch.testing.assert_close(flow.inverse(g, obs), z, atol=1e-10, rtol=0)
    for b in range(6):
        jacobian = torch.autograd.functional.jacobian(lambda x: flow(x, obs[b])[0], z[b])  # noqa: B023
        assert torch.linalg.slogdet(jacobian)[1].item() == pytest.approx(log_det[b].item(), abs=1e-9)
    assert (log_det.abs() <= Z * args.flow_couplings / 2 + 1).all()
    small = copy.deepcopy(flow).float()
    torch.testing.assert_close(
        small.inverse(small(z.float(), obs.float())[0], obs.float()), z.float(), atol=1e-5, rtol=0
    )


def test_the_prior_depends_on_the_state_and_is_a_density():
    args = tiny_args(skill_dim=2)
    flow = noisy(reskill.FlowPrior(4, args).double(), 0.2)
    axis = torch.arange(-25, 25, 0.2, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    densities = [flow.log_prob(z, maze_obs(1, seed=s)[0].expand(len(z), -1)).exp() for s in (0, 1)]
    for density in densities:
        assert density.sum().item() * 0.2**2 == pytest.approx(1, abs=5e-3)
    assert (densities[0] - densities[1]).abs().max() > 0.01


def test_flow_learns_two_modes_that_no_gaussian_has():
    """z is at (1, -1) or (-1, 1), or with the other sign of the state, at (1, 1) or (-1, -1); noise .3."""
    args = tiny_args(skill_dim=2, flow_dim=64, position_features=False, env_id="calvin")  # observations as they are
    torch.manual_seed(0)
    flow = reskill.FlowPrior(1, args)
    optimizer = torch.optim.Adam(flow.parameters(), lr=3e-3)

    def batch(n):
        state = 2.0 * torch.randint(2, (n, 1)) - 1
        side = 2.0 * torch.randint(2, (n, 1)) - 1
        return torch.cat([side, side * state], 1) + 0.3 * torch.randn(n, 2), state

    z, state = batch(2000)
    before = reskill.flow_loss(flow, z, state).item()
    for _ in range(500):
        loss = reskill.flow_loss(flow, *batch(256))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(2) + 2 * math.log(0.3) + math.log(2 * math.pi * math.e)
    gaussian = 0.5 * math.log((1.09**2 - 1) * (2 * math.pi * math.e) ** 2)  # of the true mean and covariance
    after = reskill.flow_loss(flow, z, state).item()
    assert before > gaussian > entropy + 0.3
    assert entropy - 0.05 < after < gaussian - 0.2
    samples = flow.inverse(torch.randn(500, 2), torch.ones(500, 1))  # at state 1 both entries have the same sign
    assert (samples.prod(1) > 0).float().mean() > 0.9 and 0.3 < (samples[:, 0] > 0).float().mean() < 0.7


def test_at_step_0_the_policy_is_the_prior():
    args = tiny_args()
    networks = reskill.make_networks(args, 4, 2)
    networks["flow"] = noisy(reskill.FlowPrior(4, args))
    agent = reskill.Agent(args, networks)
    obs = maze_obs(300).float()
    torch.manual_seed(5)
    z = agent.sample_policy(obs.numpy())
    torch.manual_seed(5)
    expected = networks["flow"].inverse(torch.randn(300, args.skill_dim), obs)
    assert torch.equal(z, expected)


def test_skills_and_their_models_are_those_of_spirl():
    ours = reskill.parse_args(["--device", "cpu", "--pretrained", "published"])
    theirs = spirl.parse_args(["--device", "cpu", "--pretrained", "published"])
    path, data = reskill.find_pretrained(ours)
    assert (path, data) == spirl.find_pretrained(theirs) and data is None
    reskill.load(path, dict(networks=reskill.make_networks(ours, 4, 2)))
    data = mock.MagicMock(fingerprint="of some data")
    for env_id in ("maze", "kitchen", "calvin"):
        with mock.patch.object(data_tools, "load_dataset", return_value=data):
            names = [file.find_pretrained(file.parse_args(["--env-id", env_id]))[0] for file in (reskill, spirl)]
        assert names[0] == names[1]


# ------------------------------------------------------------------------------------------------------------------ PPO
def np_advantages(rewards, values, bootstrap, gamma, lam):
    """Generalised advantages of one path by the double sum of their definition; bootstrap is the value behind it."""
    values = np.append(values, bootstrap)
    errors = rewards + gamma * values[1:] - values[:-1]
    n = len(rewards)
    return np.array([sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)])


def paths_of(T, H):
    """(environment, skills, how it ends) of the four paths in filled_buffer, and their env steps (skill, step)."""
    yield 0, range(0, 2), "end", [(0, h) for h in range(H)] + [(1, 0), (1, 1)]
    yield 0, range(2, T), "goes on", [(t, h) for t in range(2, T) for h in range(H)]
    yield 1, range(0, 3), "time-out", [(t, h) for t in range(3) for h in range(H)]
    yield 1, range(3, T), "goes on", [(t, h) for t in range(3, T) for h in range(H)]


def test_advantages_of_skills_and_env_steps_are_those_of_their_paths():
    args = tiny_args(gamma=0.9, gae_lambda=0.8, reward_scale=0.5)
    agent = noisy_agent(args)
    rb, skills = filled_buffer(args, agent)
    T, E, H = args.rollout_skills, args.num_envs, args.skill_horizon
    step_gamma = 0.9 ** (1 / H)

    def value(learner, *parts):
        return learner.value(torch.cat([torch.as_tensor(part) for part in parts], -1)).item()

    high, residual = {}, {}  # (t, e) -> advantage, return; (t, h, e) -> the same
    for e, members, how, steps in paths_of(T, H):
        obs, z, actions, _, rewards, *_, next_obs = zip(*(skills[t] for t in members))
        alive = 0.0 if how == "end" else 1.0
        last_action = agent.skills.act(torch.from_numpy(next_obs[-1]), z[-1])[e].detach()
        behind = alive * value(agent.high, next_obs[-1][e])
        values = [value(agent.high, o[e, 0]) for o in obs]
        sums = 0.5 * np.array([r[e].sum() for r in rewards])
        for lam in (0.8, 1.0):
            for t, a, v in zip(members, np_advantages(sums, values, behind, 0.9, lam), values):
                high.setdefault((t, e), []).append(a + (v if lam == 1 else 0))
        behind = alive * value(agent.residual, next_obs[-1][e], z[-1][e], last_action)
        values = [value(agent.residual, skills[t][0][e, h], skills[t][1][e], skills[t][2][e, h]) for t, h in steps]
        single = 0.5 * np.array([skills[t][4][e, h] for t, h in steps])
        for lam in (0.8, 1.0):
            for (t, h), a, v in zip(steps, np_advantages(single, values, behind, step_gamma, lam), values):
                residual.setdefault((t, h, e), []).append(a + (v if lam == 1 else 0))

    orders = list(itertools.product(range(T), range(E))), list(itertools.product(range(T), range(H), range(E)))
    for table, expected, order in zip((rb.high, rb.residual), (high, residual), orders):
        x, actions, log_probs, advantages, returns, weights = (column.detach().numpy() for column in table)
        used = np.array([key in expected for key in order])
        assert np.array_equal(weights > 0, used) and set(weights) <= {0.0, 1.0}
        wanted = np.array([expected[key] for key in order if key in expected])
        np.testing.assert_allclose(returns[used], wanted[:, 1], rtol=1e-8)
        normal = (wanted[:, 0] - wanted[:, 0].mean()) / wanted[:, 0].std()
        np.testing.assert_allclose(advantages[used], normal, rtol=1e-6)
    # Both levels see the same rewards; each env step is there once
    assert rb.residual[5].sum() == sum(skill[7].sum() for skill in skills)
    for k, (t, e) in enumerate(orders[0]):  # g is what the flow makes of the skill; inputs are those of the row
        obs, z = skills[t][0][e, 0], skills[t][1][e]
        torch.testing.assert_close(agent.flow.inverse(rb.high[1][k], torch.from_numpy(obs)), z, atol=1e-9, rtol=0)
        assert np.array_equal(rb.high[0][k], obs)
    for k, (t, h, e) in enumerate(orders[1]):
        row = [skills[t][0][e, h], skills[t][1][e], skills[t][2][e, h]]
        assert np.array_equal(rb.residual[0][k], np.concatenate(row))
        assert np.array_equal(rb.residual[1][k], skills[t][3][e, h])


def test_no_row_is_of_an_older_rollout():
    args = tiny_args()
    agent = noisy_agent(args).float()
    rb = reskill.RolloutBuffer(4, 2, args)
    for t in range(2 * args.rollout_skills):
        assert not rb.full or t == args.rollout_skills
        rb.add(*random_skill(args, t))
    rb.prepare(agent)
    first = [column.clone() for column in (*rb.high, *rb.residual)]
    fresh = reskill.RolloutBuffer(4, 2, args)
    for t in range(args.rollout_skills, 2 * args.rollout_skills):
        fresh.add(*random_skill(args, t))
    fresh.prepare(agent)
    assert all(map(torch.equal, first, (*fresh.high, *fresh.residual)))
    # A batch that is larger than the tables holds each row once
    batch = rb.sample(10_000)
    for column, of_table in ((batch[4], rb.high[4]), (batch[10], rb.residual[4])):
        assert torch.equal(column.sort().values, of_table.sort().values) and len(of_table.unique()) > 1
    # Nothing beyond what is filled is read, and a checkpoint holds it all
    half = reskill.RolloutBuffer(4, 2, args)
    half.load_state_dict(rb.state_dict())
    half.add(*random_skill(args, 99))
    rb.add(*random_skill(args, 99))
    assert half.filled == rb.filled == args.num_envs
    assert all(torch.equal(column[:2], rb.columns[name][:2]) for name, column in half.columns.items())


def test_ppo_loss_is_the_clipped_one():
    args = tiny_args(clip_ratio=0.2)
    learner = noisy(reskill.ActorCritic(4, 3, 2, 0.5, 0.1, args).double(), 0.05)
    rng = np.random.default_rng(0)
    B = 40
    x = torch.cat([maze_obs(B), torch.from_numpy(rng.normal(size=(B, 3)))], -1)
    actions, old, advantages, returns = (torch.from_numpy(rng.normal(size=s)) for s in ((B, 2), B, B, B))
    weights = torch.from_numpy((rng.random(B) < 0.7).astype(np.float64))
    mean, std = (part.detach().numpy() for part in learner(x))
    now = (-0.5 * ((actions.numpy() - mean) / std) ** 2 - np.log(std * np.sqrt(2 * np.pi))).sum(-1)
    old = torch.from_numpy(now + 0.5 * rng.normal(size=B))  # ratios on both sides of the bounds
    expected = np.concatenate([np_features(x[:, :4].numpy()), x[:, 4:].numpy()], -1)
    np.testing.assert_allclose(learner.inputs(x), expected, atol=1e-5)
    loss, metrics = reskill.ppo_loss(learner, x, actions, old, advantages, returns, weights, args)
    ratio = np.exp(now - old.numpy())
    assert (ratio > 1.2).sum() > 3 and (ratio < 0.8).sum() > 3
    gain = np.minimum(ratio * advantages.numpy(), np.clip(ratio, 0.8, 1.2) * advantages.numpy())
    used = weights.numpy() > 0
    values = learner.value(x).detach().numpy()
    expected = -gain[used].mean() + np.square(values - returns.numpy())[used].mean()
    assert loss.item() == pytest.approx(expected)
    assert metrics["kl"].item() == pytest.approx((old.numpy() - now)[used].mean())
    # At first the ratio is 1: the loss is that of the value, its gradient the plain policy gradient
    advantages = advantages - (weights * advantages).sum() / weights.sum()
    _, metrics = reskill.ppo_loss(learner, x, actions, torch.from_numpy(now), advantages, returns, weights, args)
    assert metrics["policy_loss"].item() == pytest.approx(0, abs=1e-12) and metrics["kl"].item() == pytest.approx(
        0, abs=1e-12
    )
    # A batch of nothing but env steps after an episode's end changes nothing
    loss, _ = reskill.ppo_loss(learner, x, actions, old, advantages, returns, 0 * weights, args)
    loss.backward()
    assert loss == 0 and all(p.grad is None or (p.grad == 0).all() for p in learner.parameters())


def agent_with_rollout():
    """An agent with other weights and a full buffer of made-up skills."""
    args = tiny_args()
    agent = noisy_agent(args).float()
    rb = reskill.RolloutBuffer(4, 2, args)
    for t in range(args.rollout_skills):
        rb.add(*random_skill(args, t))
    return agent, rb


def test_an_update_moves_what_learns_and_nothing_else():
    agent, rb = agent_with_rollout()
    state = agent.state_dict()
    frozen = {name: value.clone() for name, value in state.items() if name.startswith(("skills", "flow"))}
    rb.prepare(agent)
    agent.learners["high"].log_std.data[:] = 0.0  # at its bound
    for learning in (("high", "residual"), ("high",), ()):  # Adam remembers the first: what rests must rest
        before = copy.deepcopy(agent)
        for _ in range(3):
            agent.update(*rb.sample(100), learning=learning)
        for name in ("high", "residual"):
            now, then = agent.learners[name], getattr(before, name)
            assert same_weights(now.policy, then.policy) == (name not in learning)
            assert torch.equal(now.log_std, then.log_std) == (name not in learning)
            assert not same_weights(now.value_net, then.value_net)
            assert now.log_bounds[0] <= now.log_std.min() and now.log_std.max() <= now.log_bounds[1]
        assert all(torch.equal(agent.state_dict()[name], value) for name, value in frozen.items())


def test_a_nan_of_a_policy_that_rests_is_noticed():
    agent, rb = agent_with_rollout()
    rb.prepare(agent)
    with torch.no_grad():
        agent.high.policy[0].weight[0, 0] = torch.nan
    metrics = agent.update(*rb.sample(100), learning=())
    with pytest.raises(SystemExit, match="no number"):
        reskill.check_finite(metrics)


def test_ppo_finds_the_best_skill():
    """The reward is the first entry of the skill's g near 0.7: the policy goes there, through any flow."""
    args = tiny_args(num_envs=64, rollout_skills=2, skill_horizon=2, policy_lr=3e-3, value_lr=1e-2, batch_size=128)
    torch.manual_seed(0)
    networks = reskill.make_networks(args, 4, 2)
    networks["flow"] = noisy(reskill.FlowPrior(4, args), 0.1)
    agent = reskill.Agent(args, networks)
    rb = reskill.RolloutBuffer(4, 2, args)
    obs = maze_obs(64).float()
    for _ in range(40):
        while True:
            skill = random_skill(args, 0)
            skill[0] = obs[:, None].expand(-1, 2, -1)
            skill[1] = agent.sample_policy(obs.numpy())
            g, _ = agent.flow(skill[1], obs)
            skill[4] = (-(g[:, :1] - 0.7).square()).detach().expand(-1, 2)
            skill[5] = np.ones(64, dtype=bool)
            rb.add(*skill)
            if rb.full:
                break
        rb.prepare(agent)
        for _ in range(10):
            agent.update(*rb.sample(128))
    assert (agent.high(obs)[0][:, 0] - 0.7).abs().mean() < 0.15
    assert agent.high.log_std[0].exp() < 0.7 < agent.high.log_std[1:].exp().mean()  # sure where it matters


def test_a_flow_is_found_again_only_for_what_made_it(tmp_path):
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    data = mock.Mock(fingerprint="data")

    def key(**changes):
        return reskill.find_flow(tiny_args(data_dir=str(tmp_path), **changes), model, data).name

    same = key()
    assert key(seed=7, policy_lr=1.0) == same  # of RL
    others = dict(skill_horizon=5), dict(env_id="kitchen"), dict(flow_lr=1.0), dict(arm_noise=0.5), dict(recombine=True)
    assert len({same, *(key(**change) for change in (*others, dict(squash_actions=True)))}) == 7
    for change in dict(obs_scale=(1, 2, 3, 4)), dict(obs_shift=(1, 2, 3, 4)), dict(objects=((2,), (3,))):
        task = dataclasses.replace(data_tools.TASKS["maze"], **change)
        with mock.patch.dict(data_tools.TASKS, maze=task):
            assert key() != same
    data.fingerprint = "other"
    assert key() != same


@pytest.mark.parametrize("name", "learn_flow encode_windows draw perturb flow_loss FlowPrior zero_net Features".split())
def test_a_flow_of_other_code_is_not_found(name, tmp_path, monkeypatch):
    model = tmp_path / "model.pt"
    model.write_bytes(b"weights")
    args = tiny_args(data_dir=str(tmp_path))
    path = reskill.find_flow(args, model, mock.Mock(fingerprint="data"))
    source = inspect.getsource
    edited = getattr(reskill, name)
    monkeypatch.setattr(inspect, "getsource", lambda part: source(part) + "\nx = 1\n" * (part is edited))
    assert reskill.find_flow(args, model, mock.Mock(fingerprint="data")) != path


def flow_data():
    """100 episodes of 30 random rows."""
    rng = np.random.default_rng(0)
    ends = np.arange(3_000) % 30 == 29
    obs = random_obs(rng, 3_000).astype(np.float32)
    return data_tools.OfflineDataset(obs, rng.uniform(-1, 1, (3_000, 2)).astype(np.float32), ends & False, ends)


def test_an_interrupted_flow_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Stopped in the third of eight updates: the same command goes on, and gets to the same weights and facts."""
    args = tiny_args(flow_windows=1_000, flow_updates=8, flow_batch_size=16, pretrain_eval_episodes=1)
    data = flow_data()
    monkeypatch.setattr(reskill, "rollout", lambda *inputs: (np.ones(4), None))
    norm = reskill.gradient_norm
    stop = threading.Event()

    def learn(name, stop_at=0):
        torch.manual_seed(0)
        networks = noisy(reskill.make_networks(args, 4, 2), 0.1)
        networks["flow"] = noisy(reskill.FlowPrior(4, args))
        seen = []

        def gradient_norm(flow):
            seen.append(flow)
            if len(seen) == stop_at:
                stop.set()
            return norm(flow)

        monkeypatch.setattr(reskill, "gradient_norm", gradient_norm)
        reskill.learn_flow(args, networks, tmp_path / f"{name}.pt", data, mock.Mock(), stop)
        return torch.load(tmp_path / f"{name}.pt", weights_only=True), len(seen)

    whole, updates = learn("whole")
    assert updates == 8
    with pytest.raises(SystemExit, match="goes on"):
        learn("parts", stop_at=3)
    assert not (tmp_path / "parts.pt").exists() and (tmp_path / "parts.unfinished").exists()
    stop.clear()
    torch.rand(7)  # other random numbers in between
    resumed, updates = learn("parts")
    assert updates == 5 and not (tmp_path / "parts.unfinished").exists()
    assert resumed["facts"] == whole["facts"]
    for name, weight in whole["flow"].items():
        assert torch.equal(resumed["flow"][name], weight), name


def test_the_flow_learns_skills_beside_the_states_they_were_chosen_in(tmp_path, monkeypatch):
    """Skills that are their first observation, so that every pair can be checked; and the rate falls to 0."""
    args = tiny_args(flow_windows=1_000, flow_updates=8, flow_batch_size=16, pretrain_eval_episodes=1)
    data = flow_data()
    networks = noisy(reskill.make_networks(args, 4, 2), 0.1)
    networks["flow"] = noisy(reskill.FlowPrior(4, args))
    Z = args.skill_dim
    first = lambda obs, actions: (obs[:, 0, :Z], torch.full_like(obs[:, 0, :Z], 1e-6))  # noqa: E731
    monkeypatch.setattr(networks["skills"], "encode_skill", first)
    monkeypatch.setattr(reskill, "rollout", lambda *inputs: (np.ones(4), None))
    pairs, rates = [], []
    loss, step = reskill.flow_loss, torch.optim.Adam.step
    monkeypatch.setattr(reskill, "flow_loss", lambda flow, z, obs: pairs.append((z, obs)) or loss(flow, z, obs))
    noted = lambda optimizer: rates.append(optimizer.param_groups[0]["lr"]) or step(optimizer)  # noqa: E731
    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    before = copy.deepcopy(networks["prior"].state_dict())
    reskill.learn_flow(args, networks, tmp_path / "flow.pt", data, mock.Mock(), threading.Event())
    after = networks["prior"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())  # BatchNorm's statistics, too
    assert len(pairs) == 9  # the last one are windows that it has not seen
    held_out = data.observations[-30:, 0]  # the last of 100 episodes
    for k, (z, states) in enumerate(pairs):
        torch.testing.assert_close(z, states[:, :Z], atol=1e-4, rtol=0)
        assert len(states.unique(dim=0)) > 10
        unseen = torch.isin(states[:, 0], held_out)
        assert unseen.all() if k == 8 else not unseen.any()
    np.testing.assert_allclose(rates, args.flow_lr * np.sqrt(1 - np.arange(8) / 8))


# --------------------------------------------------------------------------------------------------------------- acting
def test_the_share_of_the_residual_is_that_of_its_mean():
    """Nothing at first, however large the noise; then w |mean d| beside |a'|, over the env steps that happened."""
    args = tiny_args()
    torch.manual_seed(0)
    agent = noisy_agent(args)
    rb, _ = filled_buffer(args, agent)
    torch.nn.init.zeros_(agent.residual.policy[-1].weight)
    torch.nn.init.zeros_(agent.residual.policy[-1].bias)
    with mock.patch.object(torch.Tensor, "float", lambda tensor: tensor.double()):
        rb.prepare(agent)
        assert rb.residual_share(1.0) == 0
        agent.residual.policy[-1].bias.data[:] = torch.tensor([0.3, -0.5])
        rb.prepare(agent)
    actions = rb.columns["actions"][: rb.filled]  # (T E, H, A)
    rows = [action[: int(steps)] for action, steps in zip(actions, rb.columns["steps"])]
    size = torch.cat(rows).abs().mean().item()
    assert rb.residual_share(0.5) == pytest.approx(0.2 / (size + 0.2), rel=1e-5)


def test_the_flow_sees_arms_that_are_shifted():
    """As skills and prior do in pre-training, see `perturb`: here by 0.05 rad, seven joints."""
    args = reskill.Args(env_id="kitchen", device="cpu", cudagraphs=False, hidden_dim=16, arm_noise=0.05)
    skills = reskill.make_networks(args, 30, 9)["skills"].eval()
    ends = np.arange(1, 2001) % 200 == 0
    data = reskill.data_tools.OfflineDataset(np.ones((2000, 30)), np.full((2000, 9), 0.1), ends & False, ends)
    torch.manual_seed(0)
    obs, _, _ = reskill.encode_windows(skills, data, 3000, args)
    shift = (obs - 1).std(0)
    J, _ = reskill.ARM["kitchen"]
    np.testing.assert_allclose(shift[:J], 0.05, rtol=0.1)
    assert (shift[J:] == 0).all()


def test_the_residual_opens_smoothly():
    args = tiny_args(residual_middle=50_000, residual_slope=1e-4)
    steps = np.arange(0, 200_001, 1_000)
    weights = np.array([reskill.residual_weight(int(n), args) for n in steps])
    np.testing.assert_allclose(weights, 1 / (1 + np.exp(-1e-4 * (steps - 50_000))), rtol=1e-9)
    assert reskill.residual_weight(50_000, args) == 0.5
    args.residual_middle = 10**12
    assert reskill.residual_weight(10**6, args) == 0.0  # and no overflow


def test_collected_rows_are_what_happened():
    args = tiny_args(skill_horizon=10, num_envs=3)
    agent = noisy_agent(args).float()
    actor = agent.actor()
    envs = MazeVectorEnv(3, 25)
    taken = []
    step = envs.step

    def noted(actions):
        result = step(actions)
        taken.append((actions, *result[:2]))
        return result

    envs.step = noted
    obs, _ = envs.reset(seed=0)
    for t, weight in enumerate((0.0, 0.4, 1.0)):
        actor.weight = weight
        z = torch.randn(3, args.skill_dim)
        start = obs
        all_obs, _, actions, residuals, rewards, terminations, truncations, steps, obs = reskill.collect_skill(
            envs, actor, obs, z, args
        )
        for k in range(10):
            acted, seen, reward = taken[10 * t + k]
            before = start if k == 0 else taken[10 * t + k - 1][1]
            assert np.array_equal(all_obs[:, k], before)
            plain = agent.skills.act(torch.from_numpy(before), z).detach().numpy()
            assert np.array_equal(actions[:, k], plain)
            if weight == 0:
                assert np.array_equal(acted, plain)  # bit for bit
            np.testing.assert_allclose(acted, plain + weight * residuals[:, k], rtol=1e-6)
            assert np.array_equal(rewards[:, k], reward)
        assert np.array_equal(obs, seen) and not terminations.any()
        assert truncations.all() == (t == 2) and (steps == (5 if t == 2 else 10)).all()
    mean = agent.residual(torch.cat([torch.from_numpy(obs), z, agent.skills.act(torch.from_numpy(obs), z)], -1))[0]
    expected = agent.skills.act(torch.from_numpy(obs), z) + 1.0 * mean
    torch.testing.assert_close(actor.act(torch.from_numpy(obs), z), expected)


def test_a_policy_rests_once_it_is_too_far(tmp_path, monkeypatch):
    """The residual while w < .01, then both until their KL; every round begins anew."""
    args = tiny_args(
        total_timesteps=480, skill_horizon=10, rollout_skills=4, updates_per_rollout=6, eval_interval=0,
        residual_middle=240, residual_slope=0.1, high_kl=0.3, residual_kl=0.9,
    )  # fmt: skip
    kls = iter([(0.44, 0.0), (0.46, 0.0), (0.1, 0.0), (9.0, 9.0), (0.0, 0.0), (0.0, 0.0)] * 6)
    called = []

    def update(agent, *batch, learning):
        called.append(set(learning))
        agent.residual.policy[-1].bias.data += 0.001
        high, residual = (torch.tensor(value) for value in next(kls))
        return dict(high_kl=high, residual_kl=residual, grad_norm=torch.tensor(1.0))

    def rollout(choose_skill, actor, *inputs):
        evaluated.append(actor.weight)
        return np.zeros(1), np.zeros(1)

    def collect(envs, actor, *inputs):
        acted.append(actor.residual.policy[-1].bias[0].item())
        return collect_skill(envs, actor, *inputs)

    evaluated, acted = [], []
    collect_skill = reskill.collect_skill
    monkeypatch.setattr(reskill, "rollout", rollout)
    monkeypatch.setattr(reskill, "collect_skill", collect)
    monkeypatch.setattr(reskill.Agent, "update", update)
    networks = reskill.make_networks(args, 4, 2)
    reskill.train(args, networks, {}, tmp_path, mock.MagicMock(), threading.Event())
    one = [{"high"}] * 2 + [set()] * 4
    two = [{"high", "residual"}] * 2 + [{"residual"}] * 2 + [set()] * 2
    # Rounds at 80, 160, ... env steps, whose last skills began 20 env steps before: w < .01 up to 194
    assert [called[6 * k : 6 * k + 6] for k in range(6)] == [one] * 2 + [two] * 4
    assert evaluated == [reskill.residual_weight(480, args)] and evaluated[0] > 0.99  # with the residual of then
    np.testing.assert_allclose(acted, np.repeat(0.006 * np.arange(6), 4), atol=1e-6)  # by the policy of the last round


def test_pictures_and_senseless_flags(data_dir, tmp_path, monkeypatch):
    init = MazeVectorEnv.__init__
    monkeypatch.setattr(
        MazeVectorEnv, "__init__", lambda self, n=1, steps=40, *rest, **kw: init(self, n, 40, *rest, **kw)
    )
    args = tiny_args(skill_horizon=10, data_dir=str(data_dir), dataset="scripted")
    agent = reskill.Agent(args, reskill.make_networks(args, 4, 2))
    for name, residuals in (("whole", [(100, 0.1, 0.01), (200, 0.9, 0.2)]), ("early", [])):
        reskill.draw_pictures(args, agent, residuals, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))
    for changes, words in (
        (dict(skill_dim=1), "--skill-dim 1"),
        (dict(pretrain_batch_size=1), "--pretrain-batch-size 1"),
        (dict(gae_lambda=2.0), "--gae-lambda"),
        (dict(rollout_skills=0), "--rollout-skills 0"),
        (dict(residual_std=0.0), "--residual-std 0.0"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {words}"):
            reskill.check_args(tiny_args(**changes))


def test_with_a_finished_model_the_flow_takes_its_flags():
    given = ["--env-id", "kitchen", "--data", "d.hdf5", "--pretrained", "model.pt"]
    args = reskill.parse_args([*given, "--arm-noise", "0", "--no-recombine", "--pretrain-eval-episodes", "5"])
    assert (args.arm_noise, args.recombine, args.pretrain_eval_episodes) == (0, False, 5)
    with pytest.raises(SystemExit, match="--kl-coef does nothing to the finished model"):
        reskill.parse_args([*given, "--kl-coef", "1"])
