"""reskill.py against autograd's Jacobians, numerical integrals, loops over paths in NumPy, and small known problems."""

import copy
import itertools
import math
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from numpy_nets import np_features, random_obs, same_weights

import data_tools
from algos import reskill


# -------------------------------------------------------------------------------------------------------------- helpers
def tiny_args(**changes):
    small = dict(
        device="cpu", hidden_dim=16, skill_dim=4, skill_horizon=3, flow_dim=16, policy_dim=16,
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


def noisy_agent(args):
    """An agent in float64 in which nothing is at its start, and BatchNorm has seen data."""
    agent = noisy(reskill.Agent(args, reskill.make_networks(args)).double(), 0.1)
    for learner in agent.learners.values():
        learner.log_std.data.clamp_(*learner.log_bounds)
    agent.skills = reskill.SkilledActor(agent)
    return agent


def random_skill(args, seed):
    """What collect_skill might return of one skill, every number different, without ends."""
    rng = np.random.default_rng(seed)
    E, H = args.num_envs, args.skill_horizon
    obs = random_obs(rng, E, H + 1)
    skill = dict(obs=obs[:, :-1], z=torch.from_numpy(rng.normal(size=(E, args.skill_dim))), next_obs=obs[:, -1])
    skill |= dict(actions=rng.normal(size=(E, H, 2)), residuals=rng.normal(size=(E, H, 2)))
    skill |= dict(step_rewards=rng.normal(size=(E, H)), steps=np.full(E, H))
    return skill | dict(terminations=np.zeros(E, dtype=bool), truncations=np.zeros(E, dtype=bool))


def filled_buffer(args, agent):
    """T skills of two environments: the first has a true end after 2 steps of its skill 1, at its time limit as well,
    the second a time-out at the end of its skill 2; both go on at the roll-out's end.
    """
    rb = reskill.RolloutBuffer(4, 2, args)
    rb.columns = {name: column.double() for name, column in rb.columns.items()}
    skills = [random_skill(args, t) for t in range(args.rollout_skills)]
    first = np.array([True, False])
    skills[1] |= dict(terminations=first, truncations=first, steps=np.array([2, args.skill_horizon]))
    skills[1]["step_rewards"][0, 2:] = 0.0
    skills[2]["truncations"] = ~first
    for before, after in itertools.pairwise(skills):
        running = ~(before["terminations"] | before["truncations"])
        after["obs"][running, 0] = before["next_obs"][running]
    for skill in skills:
        rb.add(**skill)
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
    assert (log_det.abs() <= 2 * Z + 1).all()
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
    optimizer = torch.optim.Adam(flow.parameters(), lr=6e-3)

    def batch(n):
        state = 2.0 * torch.randint(2, (n, 1)) - 1
        side = 2.0 * torch.randint(2, (n, 1)) - 1
        return torch.cat([side, side * state], 1) + 0.3 * torch.randn(n, 2), state

    z, state = batch(2000)
    before = -flow.log_prob(z, state).mean().item()
    for _ in range(250):
        loss = -flow.log_prob(*batch(256)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = math.log(2) + 2 * math.log(0.3) + math.log(2 * math.pi * math.e)
    gaussian = 0.5 * math.log((1.09**2 - 1) * (2 * math.pi * math.e) ** 2)  # of the true mean and covariance
    after = -flow.log_prob(z, state).mean().item()
    assert before > gaussian > entropy + 0.3
    assert entropy - 0.05 < after < gaussian - 0.2
    samples = flow.inverse(torch.randn(500, 2), torch.ones(500, 1))  # at state 1 both entries have the same sign
    assert (samples.prod(1) > 0).float().mean() > 0.9 and 0.3 < (samples[:, 0] > 0).float().mean() < 0.7


def test_at_step_0_the_policy_is_the_prior():
    args = tiny_args()
    networks = reskill.make_networks(args)
    networks["flow"] = noisy(reskill.FlowPrior(4, args))
    agent = reskill.Agent(args, networks)
    obs = maze_obs(300).float()
    torch.manual_seed(5)
    z = agent.choose_skills(obs.numpy(), 0, explore=True)
    torch.manual_seed(5)
    expected = networks["flow"].inverse(torch.randn(300, args.skill_dim), obs)
    assert torch.equal(z, expected)


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

    def inputs(skill, h, e):  # of the residual policy
        return skill["obs"][e, h], skill["z"][e], skill["actions"][e, h]

    def value(learner, *parts):
        return learner.value(torch.cat([torch.as_tensor(part) for part in parts], -1)).item()

    high, residual = {}, {}  # (t, e) -> advantage, return; (t, h, e) -> the same
    for e, members, how, steps in paths_of(T, H):
        alive = 0.0 if how == "end" else 1.0
        last = {name: skills[members[-1]][name][e] for name in ("next_obs", "z")}
        last_action = agent.skill_model.act(torch.from_numpy(last["next_obs"])[None], last["z"][None])[0].detach()
        behind = alive * value(agent.high, last["next_obs"])
        values = [value(agent.high, skills[t]["obs"][e, 0]) for t in members]
        sums = 0.5 * np.array([skills[t]["step_rewards"][e].sum() for t in members])
        for lam in (0.8, 1.0):
            for t, a, v in zip(members, np_advantages(sums, values, behind, 0.9, lam), values):
                high.setdefault((t, e), []).append(a + (v if lam == 1 else 0))
        behind = alive * value(agent.residual, last["next_obs"], last["z"], last_action)
        values = [value(agent.residual, *inputs(skills[t], h, e)) for t, h in steps]
        single = 0.5 * np.array([skills[t]["step_rewards"][e, h] for t, h in steps])
        for lam in (0.8, 1.0):
            for (t, h), a, v in zip(steps, np_advantages(single, values, behind, step_gamma, lam), values):
                residual.setdefault((t, h, e), []).append(a + (v if lam == 1 else 0))

    orders = list(itertools.product(range(T), range(E))), list(itertools.product(range(T), range(H), range(E)))
    for table, expected, order in zip((rb.high, rb.residual), (high, residual), orders):
        x, actions, log_probs, advantages, returns, weights = (column.detach().numpy() for column in table)
        used = np.array([key in expected for key in order])
        assert np.array_equal(weights > 0, used) and set(weights) <= {0.0, 1.0}
        wanted = np.array([expected[key] for key in order if key in expected])
        np.testing.assert_allclose(returns[used], wanted[:, 1], rtol=1e-5)
        normal = (wanted[:, 0] - wanted[:, 0].mean()) / wanted[:, 0].std()
        np.testing.assert_allclose(advantages[used], normal, rtol=1e-5)
    # Both levels see the same rewards; each env step is there once
    assert rb.residual[5].sum() == sum(skill["steps"].sum() for skill in skills)
    for k, (t, e) in enumerate(orders[0]):  # g is what the flow makes of the skill; inputs are those of the row
        obs, z = skills[t]["obs"][e, 0], skills[t]["z"][e]
        torch.testing.assert_close(agent.flow.inverse(rb.high[1][k], torch.from_numpy(obs)), z, atol=1e-9, rtol=0)
        assert np.array_equal(rb.high[0][k], obs)
    for k, (t, h, e) in enumerate(orders[1]):
        assert np.array_equal(rb.residual[0][k], np.concatenate(inputs(skills[t], h, e)))
        assert np.array_equal(rb.residual[1][k], skills[t]["residuals"][e, h])


def test_no_row_is_of_an_older_rollout():
    args = tiny_args()
    agent = noisy_agent(args).float()
    rb, fresh, half = (reskill.RolloutBuffer(4, 2, args) for _ in range(3))
    for t in range(2 * args.rollout_skills):
        rb.add(**random_skill(args, t))
        if t >= args.rollout_skills:
            fresh.add(**random_skill(args, t))
    rb.prepare(agent)
    fresh.prepare(agent)
    assert all(map(torch.equal, (*rb.high, *rb.residual), (*fresh.high, *fresh.residual)))
    # A batch that is larger than the tables holds each row once
    batch = rb.sample(10_000)
    for column, of_table in ((batch[4], rb.high[4]), (batch[10], rb.residual[4])):
        assert torch.equal(column.sort().values, of_table.sort().values) and len(of_table.unique()) > 1
    # A full buffer begins anew, also one from a checkpoint
    half.load_state_dict(rb.state_dict())
    half.add(**random_skill(args, 99))
    rb.add(**random_skill(args, 99))
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
        rb.add(**random_skill(args, t))
    return agent, rb


def test_an_update_moves_what_learns_and_nothing_else():
    agent, rb = agent_with_rollout()
    state = agent.state_dict()
    frozen = {name: value.clone() for name, value in state.items() if name.startswith(("skill_model", "flow"))}
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


def test_ppo_finds_the_best_skill():
    """The reward is the first entry of the skill's g near 0.7: the policy goes there, through any flow."""
    args = tiny_args(num_envs=64, rollout_skills=2, skill_horizon=2, policy_lr=3e-3, value_lr=1e-2, batch_size=128)
    torch.manual_seed(0)
    networks = reskill.make_networks(args)
    networks["flow"] = noisy(reskill.FlowPrior(4, args), 0.1)
    agent = reskill.Agent(args, networks)
    rb = reskill.RolloutBuffer(4, 2, args)
    obs = maze_obs(64).float()
    for _ in range(40):
        for _ in range(2):
            skill = random_skill(args, 0)
            z = agent.choose_skills(obs.numpy(), 0, explore=True)
            g, _ = agent.flow(z, obs)
            rewards = (-(g[:, :1] - 0.7).square()).detach().expand(-1, 2)
            skill |= dict(obs=obs[:, None].expand(-1, 2, -1), z=z, step_rewards=rewards, terminations=np.ones(64))
            rb.add(**skill)
        rb.prepare(agent)
        for _ in range(10):
            agent.update(*rb.sample(128))
    assert (agent.high(obs)[0][:, 0] - 0.7).abs().mean() < 0.15
    assert agent.high.log_std[0].exp() < 0.7 < agent.high.log_std[1:].exp().mean()  # sure where it matters


# ---------------------------------------------------------------------------------------------------- learning the flow
def flow_data():
    """100 episodes of 30 random rows."""
    rng = np.random.default_rng(0)
    ends = np.arange(3_000) % 30 == 29
    obs = random_obs(rng, 3_000).astype(np.float32)
    return data_tools.OfflineDataset(obs, rng.uniform(-1, 1, (3_000, 2)).astype(np.float32), ends & False, ends)


def learn_flow(folder, monkeypatch, stop_at=None, **changes):
    """Its facts, its networks, and the learning rates of its updates, which are eight, or fewer with stop_at."""
    small = dict(flow_windows=1_000, flow_updates=8, flow_batch_size=16, pretrain_eval_episodes=1)
    args = tiny_args(**small | dict(data_dir=str(folder)) | changes)
    monkeypatch.setattr(reskill, "rollout", lambda *given: dict(episodic_return=1.0, success=0.0))
    torch.manual_seed(0)
    networks = noisy(reskill.make_networks(args), 0.1)
    rates, stop = [], threading.Event()

    def step(optimizer, original=torch.optim.Adam.step):
        rates.append(optimizer.param_groups[0]["lr"])
        if len(rates) == stop_at:
            stop.set()
        return original(optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", step)
        facts = reskill.learn_flow(args, networks, flow_data(), mock.Mock(log_dir=folder), stop)
    return facts, networks, rates


def test_a_flow_is_found_again_only_for_what_made_it(tmp_path, monkeypatch):
    def made(**changes):
        return len(learn_flow(tmp_path, monkeypatch, **changes)[2])

    assert made() == 8
    assert made(seed=7, policy_lr=1.0) == 0  # of RL
    assert made(flow_batch_size=5) == made(skill_horizon=5) == made(hidden_dim=17) == 8
    monkeypatch.setattr(data_tools, "code_of", lambda code: "other")
    assert made() == 8


def test_an_interrupted_flow_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    """Stopped in the third of eight updates: the same command goes on, and gets to the same weights and facts."""
    facts, whole, rates = learn_flow(tmp_path / "whole", monkeypatch)
    np.testing.assert_allclose(rates, 1e-3 * np.sqrt(1 - np.arange(8) / 8))
    with pytest.raises(SystemExit, match="stopped; go on with"):
        learn_flow(tmp_path, monkeypatch, stop_at=3)
    torch.rand(7)  # other random numbers in between
    again, resumed, rates = learn_flow(tmp_path, monkeypatch)
    assert len(rates) == 5 and not list(tmp_path.rglob("*.unfinished"))
    assert again == facts and same_weights(resumed["flow"], whole["flow"])


def test_the_flow_learns_skills_beside_the_states_they_were_chosen_in(tmp_path, monkeypatch):
    """Skills that are their first observation, but for noise, so that every pair can be checked."""
    first = lambda self, obs, actions: (obs[:, 0], torch.full_like(obs[:, 0], 0.1))  # noqa: E731
    monkeypatch.setattr(reskill.SkillModel, "encode_skill", first)
    pairs, log_prob = [], reskill.FlowPrior.log_prob
    noted = lambda flow, z, obs: pairs.append((z, obs)) or log_prob(flow, z, obs)  # noqa: E731
    monkeypatch.setattr(reskill.FlowPrior, "log_prob", noted)
    _, networks, _ = learn_flow(tmp_path, monkeypatch)
    counts = [value for name, value in networks.state_dict().items() if "num_batches" in name]
    assert counts and not any(counts)  # BatchNorm's statistics stay
    assert len(pairs) == 9  # the last one are windows that it has not seen
    held_out = flow_data().observations[-30:, 0]  # the last of 100 episodes
    for k, (z, states) in enumerate(pairs):
        torch.testing.assert_close(z, states, atol=0.6, rtol=0)
        assert (z - states).std().item() == pytest.approx(0.1, rel=0.4)  # drawn anew
        assert len(states.unique(dim=0)) > 10
        unseen = torch.isin(states[:, 0], held_out)
        assert unseen.all() if k == 8 else not unseen.any()


# --------------------------------------------------------------------------------------------------------------- acting
def test_the_share_of_the_residual_is_that_of_its_mean():
    """Nothing at first, however large the noise; then w |mean d| beside |a'|, over the env steps that happened."""
    args = tiny_args()
    torch.manual_seed(0)
    agent = noisy_agent(args)
    agent.skills.weight = 0.5
    torch.nn.init.zeros_(agent.residual.policy[-1].weight)
    torch.nn.init.zeros_(agent.residual.policy[-1].bias)
    rb, _ = filled_buffer(args, agent)
    assert rb.residual_share == 0
    agent.residual.policy[-1].bias.data[:] = torch.tensor([0.3, -0.5])
    rb.prepare(agent)
    rows = [action[: int(steps)] for action, steps in zip(rb.columns["actions"], rb.columns["steps"])]
    size = torch.cat(rows).abs().mean().item()
    assert rb.residual_share.item() == pytest.approx(0.2 / (size + 0.2), rel=1e-5)


def test_the_flow_sees_arms_that_are_shifted():
    """As skills and prior do in pre-training, see data_tools.perturb: here by 0.05 rad, seven joints."""
    args = reskill.Args(env_id="kitchen", device="cpu", hidden_dim=16, arm_noise=0.05)
    skills = reskill.make_networks(args)["skills"].eval()
    ends = np.arange(1, 2001) % 200 == 0
    data = data_tools.OfflineDataset(np.ones((2000, 30)), np.full((2000, 9), 0.1), ends & False, ends)
    torch.manual_seed(0)
    obs, _, _ = reskill.encode_windows(skills, data, 3000, args)
    shift = (obs - 1).std(0)
    np.testing.assert_allclose(shift[:7], 0.05, rtol=0.1)
    assert (shift[7:] == 0).all()


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
    actor = agent.skills = reskill.SkilledActor(agent)
    envs = data_tools.make_envs("maze", 3)
    envs.max_episode_steps = 25
    taken = []

    def noted(actions, step=envs.step):
        result = step(actions)
        taken.append((actions, *result[:2]))
        return result

    envs.step = noted
    obs, _ = envs.reset(seed=0)
    for t, weight in enumerate((0.0, 0.4, 1.0)):
        actor.weight = weight
        z = torch.randn(3, args.skill_dim)
        start = obs
        skill = reskill.collect_skill(envs, actor, obs, z, args)
        obs = skill["next_obs"]
        for k in range(10):
            acted, seen, reward = taken[10 * t + k]
            before = start if k == 0 else taken[10 * t + k - 1][1]
            assert np.array_equal(skill["obs"][:, k], before)
            plain = agent.skill_model.act(torch.from_numpy(before), z).detach().numpy()
            assert np.array_equal(skill["actions"][:, k], plain)
            if weight == 0:
                assert np.array_equal(acted, plain)  # bit for bit
            np.testing.assert_allclose(acted, plain + weight * skill["residuals"][:, k], rtol=1e-6)
            assert np.array_equal(skill["step_rewards"][:, k], reward)
        assert np.array_equal(obs, seen) and not skill["terminations"].any()
        assert skill["truncations"].all() == (t == 2) and (skill["steps"] == (5 if t == 2 else 10)).all()
    action = agent.skill_model.act(torch.from_numpy(obs), z)
    mean, _ = agent.residual(torch.cat([torch.from_numpy(obs), z, action], -1))
    torch.testing.assert_close(actor.act(torch.from_numpy(obs), z), action + 1.0 * mean)


def test_a_policy_rests_once_it_is_too_far(tmp_path, monkeypatch):
    """The residual while w < .01, then both until their KL; every round begins anew."""
    args = tiny_args(
        total_timesteps=480, skill_horizon=10, rollout_skills=4, updates_per_rollout=6, run_dir=str(tmp_path),
        residual_middle=240, residual_slope=0.1,
    )  # fmt: skip
    kls = iter([(0.44, 0.0), (0.46, 0.0), (0.1, 1.34), (9.0, 1.36), (0.0, 0.0), (0.0, 0.0)] * 6)
    called, evaluated, acted = [], [], []
    collect_skill = reskill.collect_skill

    def update(agent, *batch, learning):
        called.append(set(learning))
        agent.residual.policy[-1].bias.data += 0.001
        high, residual = (torch.tensor(value) for value in next(kls))
        return dict(high_kl=high, residual_kl=residual)

    def rollout(agent, *given):
        evaluated.append(given[-1])
        return dict(episodic_return=0.0, success=0.0)

    def collect(envs, actor, *given):
        acted.append((actor.weight, actor.residual.policy[-1].bias[0].item()))
        return collect_skill(envs, actor, *given)

    monkeypatch.setattr(reskill.data_tools, "load_dataset", lambda *given: None)
    monkeypatch.setattr(reskill, "pretrain", lambda *given: {})
    monkeypatch.setattr(reskill, "learn_flow", lambda *given: {})
    monkeypatch.setattr(reskill, "rollout", rollout)
    monkeypatch.setattr(reskill, "collect_skill", collect)
    monkeypatch.setattr(reskill.Agent, "update", update)
    reskill.train(args)
    one = [{"high"}] * 2 + [set()] * 4
    two = [{"high", "residual"}] * 2 + [{"residual"}] * 2 + [set()] * 2
    # Rounds at 80, 160, ... env steps, whose last skills began 20 env steps before: w < .01 up to 194
    assert [called[6 * k : 6 * k + 6] for k in range(6)] == [one] * 2 + [two] * 4
    assert evaluated == [480]
    weights, biases = zip(*acted)
    assert weights == tuple(reskill.residual_weight(20 * k, args) for k in range(24))
    np.testing.assert_allclose(biases, np.repeat(0.006 * np.arange(6), 4), atol=1e-6)  # by the policy of the last round
