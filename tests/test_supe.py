"""supe.py against independent NumPy versions, separate networks, and toys with known solutions."""

import copy
import math

import numpy as np
import pytest
import torch
from numpy_nets import NO_SCORES, has_gradient, noisy_copy, np_features, np_kl, np_net, random_obs, same_weights
from test_spirl import np_prior
from torch.nn.utils import parameters_to_vector

import data_tools
from algos import supe

# -------------------------------------------------------------------------------------------------------------- helpers


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", hidden_dim=16, critic_dim=16, skill_dim=3, skill_horizon=5, num_envs=2, batch_size=8,
        buffer_size=500, num_critics=4, target_critics=2, alpha=0.3,
    )  # fmt: skip
    return supe.Args(**(small | changes))


def numbered_data(episodes=6, length=12):
    """Maze observations of which every row is another: x the episode, y the env step; and random actions."""
    rng = np.random.default_rng(0)
    obs = np.zeros((episodes, length, 4))
    obs[..., 0] = 1 + np.arange(episodes)[:, None]
    obs[..., 1] = 1 + np.arange(length)
    ends = np.tile(np.arange(length) == length - 1, episodes)
    actions = rng.uniform(-1, 1, (episodes * length, 2))
    return data_tools.OfflineDataset(obs.reshape(-1, 4), actions, ends & False, ends)


def random_agent(args, seed=0):
    torch.manual_seed(seed)
    networks = noisy_copy(supe.make_networks(args), seed)
    agent = supe.Agent(args, networks)
    with torch.no_grad():
        for value in [*agent.critics.parameters(), *agent.target.parameters(), *agent.outcome.parameters()]:
            value += 0.1 * torch.randn_like(value)
    return agent


def filled(args, data=None, rows=60):
    """A buffer with random transitions, of which every third one ends."""
    rb = supe.ReplayBuffer(4, args, data)
    rng = np.random.default_rng(1)
    for k in range(rows // 2):
        u = torch.from_numpy(rng.uniform(-1, 1, (2, args.skill_dim)))
        rb.add(random_obs(rng, 2), u, rng.normal(size=2), np.full(2, k % 3 == 0), random_obs(rng, 2))
    return rb


def rl_batch(args, B=5):
    """Transitions in NumPy: obs, u, rewards, ends, next_obs."""
    rng = np.random.default_rng(2)
    u = rng.uniform(-1, 1, (B, args.skill_dim))
    return random_obs(rng, B), u, 3 * rng.normal(size=B), rng.random(B), random_obs(rng, B)


def tensors(arrays):
    return [torch.from_numpy(np.asarray(x)).double() for x in arrays]


def np_ensemble(ensemble, obs, u):
    """Each network by itself: Linear, LayerNorm without weights, ReLU."""
    found = []
    for i in range(len(ensemble.weights[0])):
        x = np.concatenate([np_features(obs), u], -1)
        for layer, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases)):
            x = x @ weight[i].detach().numpy() + bias[i].detach().numpy()
            if layer < 3:
                x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
                x = np.maximum(x, 0)
        found.append(x[:, 0])
    return np.stack(found)  # (n, B)


# ------------------------------------------------------------------------------------------------------------ skills


def test_demonstrations_are_chunks_of_the_data_with_skills_of_the_encoder():
    args = tiny_args(relabel="pred")
    agent, data = random_agent(args), numbered_data()
    torch.manual_seed(1)
    windows, actions = data.sample_windows(50, args.skill_horizon + 1)
    noise = []  # of the samples, in standard deviations
    obs, u, rewards, ends, next_obs = supe.demonstrations(agent.encoder, agent.outcome, windows, actions, args)
    assert torch.equal(next_obs[:, 0], obs[:, 0])  # the same episode
    assert torch.equal(next_obs[:, 1], obs[:, 1] + args.skill_horizon)
    for i in range(50):
        row = int(12 * (obs[i, 0] - 1) + obs[i, 1] - 1)
        chunk = slice(row, row + args.skill_horizon)
        mean, std = agent.encoder.encode_skill(data.observations[None, chunk], data.actions[None, chunk])
        noise.append((torch.atanh(u[i]) - mean[0]) / std[0])
    noise = torch.stack(noise)
    assert noise.mean().abs() < 0.2 and 0.8 < noise.std() < 1.2
    outcome = np_ensemble(agent.outcome.double(), obs.double().numpy(), u.double().numpy())
    np.testing.assert_allclose(rewards, outcome[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ends, 1 / (1 + np.exp(-outcome[1])), rtol=1e-4, atol=1e-5)
    assert not any(x.requires_grad for x in (u, rewards, ends))


def test_a_label_of_zero_ends_nothing():
    """Rewards are never below 0: with a learnt end it would say that the goal is worthless."""
    args = tiny_args(relabel="zero")
    agent = random_agent(args)
    windows = numbered_data().sample_windows(50, args.skill_horizon + 1)
    _, _, rewards, ends, _ = supe.demonstrations(agent.encoder, agent.outcome, *windows, args)
    assert not rewards.any() and not ends.any()


@pytest.mark.parametrize(("ratio", "own", "demos"), [(0.5, 12, 12), (0.25, 18, 6), (0.0, 24, 0)])
def test_a_batch_has_its_share_of_demonstrations(ratio, own, demos):
    args = tiny_args(offline_ratio=ratio, critic_steps=3)
    batch = filled(args, numbered_data()).sample(8)
    assert [len(x) for x in batch] == [own] * 5 + [demos] * 2 * bool(demos)
    if demos:
        assert batch[5].shape == (demos, 6, 4) and batch[6].shape == (demos, 5, 2)
    batches = []

    def noted(*inputs):
        batches.append([len(x) for x in inputs[3:8]])
        return inputs[0](*inputs[3:5]).mean(), {}

    agent = random_agent(args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supe, "critic_loss", noted)
        agent.update(*batch)
    assert batches == [[8] * 5] * 3  # each critic step has a batch of its own


def test_a_small_batch_keeps_an_own_row():
    """Without one the models of reward and end would learn from nothing: NaN."""
    args = tiny_args(offline_ratio=0.9, critic_steps=1)
    assert len(filled(args, numbered_data()).sample(4)[0]) == 1


def test_replay_is_a_ring_of_transitions():
    args = tiny_args(buffer_size=5)
    rb = supe.ReplayBuffer(4, args, None)
    for k in range(4):
        obs = np.stack([np.full(4, k), np.full(4, k + 100)])
        rb.add(obs, torch.full((2, 3), k / 10), np.array([k, -k]), np.array([k == 2, False]), obs + 1)
    assert len(rb) == 5 and rb.added == 8
    obs, u, rewards, ends, next_obs = rb.columns
    assert obs[:, 0].tolist() == [102, 3, 103, 101, 2] and torch.equal(next_obs, obs + 1)
    assert rewards.tolist() == [-2, 3, -3, -1, 2] and ends.tolist() == [0, 0, 0, 0, 1]
    other = supe.ReplayBuffer(4, args, None)
    other.load_state_dict(rb.state_dict())
    assert all(map(torch.equal, rb.columns, other.columns)) and other.added == 8


# ----------------------------------------------------------------------------------------------------------- networks


def test_an_ensemble_is_so_many_separate_networks():
    args = tiny_args()
    torch.manual_seed(0)
    ensemble = noisy_copy(supe.Ensemble(4, 4, args).double())
    obs, u, *_ = rl_batch(args)
    together = ensemble(*tensors((obs, u)))
    np.testing.assert_allclose(
        together.detach(), np_ensemble(ensemble, obs, u), rtol=1e-3, atol=1e-4
    )  # features are float32
    assert len({round(q, 6) for q in together[:, 0].tolist()}) == 4
    together[2].sum().backward()  # the others get no gradient
    assert [bool(w.grad[i].any()) for w in ensemble.weights for i in range(4)] == [False, False, True, False] * 4


def test_xavier_weights_of_every_network_of_an_ensemble():
    args = tiny_args(critic_dim=200, num_critics=3)
    for weight in supe.Ensemble(4, 3, args).weights:
        bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        for one in weight:
            assert 0.9 * bound < one.abs().max() <= 1.0001 * bound


def test_the_policy_begins_as_the_prior_or_anew():
    for target_kl, same in ((3.0, True), (0.0, False)):
        agent = random_agent(tiny_args(target_kl=target_kl))
        assert same_weights(agent.task_policy, agent.skill_prior) == same
        assert all(weight.requires_grad for weight in agent.task_policy.parameters())
        assert agent.task_policy(torch.zeros(5, 4))[0].shape == (5, 3)


# ------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("m", [1, 2, 4])
def test_critic_loss(m):
    """The target's critics are distinct; no entropy; ends may be probabilities."""
    args = tiny_args(gamma=0.9, target_critics=m)
    agent = random_agent(args).double()
    obs, u, rewards, ends, next_obs = batch = rl_batch(args)
    torch.manual_seed(5)
    parts = agent.critics, agent.target, agent.task_policy
    loss, metrics = supe.critic_loss(*parts, *tensors(batch), args)
    torch.manual_seed(5)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()
    drawn = np.argsort(-torch.rand(4).numpy())[:m]
    mean, std = np_prior(agent.task_policy, next_obs)
    next_u = np.tanh(mean + std * noise)
    next_q = np_ensemble(agent.target, next_obs, next_u)[drawn].min(0)
    td_target = rewards + 0.9 * (1 - ends) * next_q
    expected = np.square(np_ensemble(agent.critics, obs, u) - td_target).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-4)
    assert metrics["td_target"].item() == pytest.approx(td_target.mean(), rel=1e-4)
    loss.backward()
    assert has_gradient(agent.critics) and not has_gradient(agent.target) and not has_gradient(agent.task_policy)


@pytest.mark.parametrize("target_kl", [3.0, 0.0])
def test_policy_loss(target_kl):
    """KL to the prior in closed form, or the density of a tanh of a Gaussian."""
    args = tiny_args(target_kl=target_kl)
    agent = random_agent(args).double()
    obs, *_ = rl_batch(args)
    nets = agent.critics, noisy_copy(agent.task_policy), agent.skill_prior
    torch.manual_seed(6)
    loss, metrics = supe.policy_loss(*nets, torch.from_numpy(obs), torch.tensor(0.7, dtype=torch.float64), args)
    torch.manual_seed(6)
    noise = torch.randn(5, 3, dtype=torch.float64).numpy()
    mean, std = np_prior(nets[1], obs)
    u = np.tanh(mean + std * noise)
    distance = np.log(np.exp(-0.5 * noise**2) / (std * np.sqrt(2 * np.pi)) / (1 - u**2)).sum(-1)
    if target_kl:
        distance = np_kl((mean, std), np_prior(agent.skill_prior, obs))
    q = np_ensemble(agent.critics, obs, u).mean(0)
    assert loss.item() == pytest.approx((0.7 * distance - q).mean(), rel=1e-4)
    assert metrics["prior_kl"].item() == pytest.approx(distance.mean(), rel=1e-4)
    loss.backward()
    assert has_gradient(nets[1]) and not has_gradient(agent.skill_prior)


def test_outcome_loss():
    args = tiny_args()
    outcome = noisy_copy(supe.Ensemble(4, 2, args).double())
    obs, u, rewards, *_ = rl_batch(args)
    ends = np.array([1.0, 0, 0, 1, 0])
    loss, metrics = supe.outcome_loss(outcome, *tensors((obs, u, rewards, ends)))
    reward, logit = np_ensemble(outcome, obs, u)
    p = 1 / (1 + np.exp(-logit))
    cross_entropy = -(ends * np.log(p) + (1 - ends) * np.log(1 - p)).mean()
    assert metrics["reward_loss"].item() == pytest.approx(np.square(reward - rewards).mean(), rel=1e-4)
    assert metrics["end_loss"].item() == pytest.approx(cross_entropy, rel=1e-4)
    assert loss.item() == pytest.approx(sum(metrics.values()).item(), rel=1e-9)


# -------------------------------------------------------------------------------------------------------------- update


def test_bonus_falls_where_the_agent_has_been_and_nowhere_else():
    """Two corners of the maze; the agent stays in one of them."""
    args = tiny_args(critic_dim=64, learning_rate=1e-3)
    agent = random_agent(args)
    rng = np.random.default_rng(0)

    def corner(low, rows=8):
        obs = np.concatenate([rng.uniform(low, low + 5, (rows, 2)), rng.uniform(-5, 5, (rows, 2))], -1)
        return torch.from_numpy(obs).float(), torch.from_numpy(rng.uniform(-1, 1, (rows, 3))).float()

    here, there = corner(1, 200), corner(34, 200)
    before = [agent.novelty(*place).mean().item() for place in (here, there)]
    random_net = copy.deepcopy(agent.novelty.random_net)
    for _ in range(300):
        supe.descend(agent.novelty_optimizer, agent.novelty(*corner(1)).mean())
    after = [agent.novelty(*place).mean().item() for place in (here, there)]
    assert after[0] < 0.1 * before[0] and after[1] > 0.25 * before[1]
    assert same_weights(random_net, agent.novelty.random_net)


def test_novelty_is_an_error_of_scaled_observations_without_sines():
    args = tiny_args()
    novelty = supe.Novelty(4, args).double()
    obs, u, *_ = rl_batch(args)
    x = np.concatenate([np_features(obs)[:, :4], u], -1)
    expected = np.square(np_net(novelty.net, x) - np_net(novelty.random_net, x)).mean(-1)
    np.testing.assert_allclose(novelty(*tensors((obs, u))).detach(), expected, rtol=1e-4)
    assert expected.shape == (5,) and (expected > 0).all()


def test_what_an_update_moves_and_what_each_part_learns_from(monkeypatch):
    """R and M: own transitions without bonus. Critics: both halves with it. g: nothing. Skills: nothing."""
    args = tiny_args(critic_steps=2, offline_ratio=0.5)
    agent, rb = random_agent(args), filled(args, numbered_data())
    agent.bonus_scale.fill_(7.0)
    agent.log_alpha.data.fill_(0.5)
    batch = rb.sample(8)
    before = copy.deepcopy(agent)
    seen = dict(outcome_loss=[], critic_loss=[], policy_loss=[])
    weights = []  # critics and slow copies, when a loss is called
    for name, calls in seen.items():
        original = getattr(supe, name)

        def noted(*inputs, original=original, calls=calls):
            calls.append([x.clone() for x in inputs if isinstance(x, torch.Tensor)])
            weights.append([parameters_to_vector(net.parameters()) for net in (agent.critics, agent.target)])
            return original(*inputs)

        monkeypatch.setattr(supe, name, noted)
    monkeypatch.setattr(supe, "draw", lambda distribution: distribution[0])
    metrics = agent.update(*batch)

    (own,) = seen["outcome_loss"]
    assert all(map(torch.equal, own, batch[:4])) and len(own[0]) == 8
    assert len(seen["critic_loss"]) == 2
    # Labels are those of R and M after their step
    demos = supe.demonstrations(agent.encoder, agent.outcome, *batch[5:], args)
    for i, found in enumerate(seen["critic_loss"]):
        rows = slice(4 * i, 4 * i + 4)
        obs, u, rewards, ends, next_obs = (torch.cat([a[rows], b[rows]]) for a, b in zip(batch[:5], demos))
        bonus = 7 * agent.novelty(obs, u)
        for value, expected in zip(found, (obs, u, rewards + bonus, ends, next_obs)):
            torch.testing.assert_close(value, expected)
    ((policy_obs, alpha),) = seen["policy_loss"]
    assert torch.equal(policy_obs, seen["critic_loss"][-1][0]) and alpha == before.log_alpha.exp()
    for (_, slow), (critics, slower) in zip(weights[1:-1], weights[2:]):  # after each step of the critics
        torch.testing.assert_close(slower, torch.lerp(slow, critics, args.tau))
    assert len(weights) == 4 and not torch.equal(weights[1][0], weights[2][0])
    assert metrics["bonus"] > 0
    for name in ("critics", "target", "task_policy", "outcome"):
        assert not same_weights(getattr(agent, name), getattr(before, name)), name
    for name in ("novelty", "encoder", "skills", "skill_prior"):
        assert same_weights(getattr(agent, name), getattr(before, name)), name
    assert agent.log_alpha != before.log_alpha and all(w.requires_grad for w in agent.critics.parameters())


@pytest.mark.parametrize(("target_kl", "std", "direction"), [(1e-3, 1, 1), (1e9, 1, -1), (0, 0.13, 1), (0, 0.17, -1)])
def test_alpha_rises_while_the_policy_is_farther_from_the_prior_than_wanted(target_kl, std, direction):
    """Without a prior: while its entropy is below -Z / 2 nats, which is that of a Gaussian of std .147."""
    args = tiny_args(offline_ratio=0.0, target_kl=float(target_kl), skill_dim=200)
    agent = random_agent(args)
    last = agent.task_policy.net[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:] = torch.tensor([0.0, math.log(std)]).repeat_interleave(200)
    agent.update(*filled(args).sample(8))
    assert np.sign(agent.log_alpha.item() - math.log(0.3)) == direction


def test_warm_up_takes_skills_of_the_prior_and_evaluations_the_mode():
    args = tiny_args(warmup_steps=100)
    agent = random_agent(args)
    obs = random_obs(np.random.default_rng(0), 5).astype(np.float32)
    for step, explore, net in ((0, True, "skill_prior"), (99, False, "skill_prior"), (100, True, "task_policy")):
        torch.manual_seed(0)
        z = agent.choose_skills(obs, step, explore)
        torch.manual_seed(0)
        mean, std = getattr(agent, net)(torch.from_numpy(obs))
        torch.testing.assert_close(z, mean + std * torch.randn(5, 3))
    torch.testing.assert_close(
        agent.choose_skills(obs, 100, explore=False), agent.task_policy(torch.from_numpy(obs))[0]
    )


def test_novelty_learns_only_where_the_agent_is_after_the_warm_up(monkeypatch, tmp_path):
    """A step of g per skill that was just added; none before the first update, whose bonus sets the scale."""
    events, agents = [], []
    forward, add, agent_class = supe.Novelty.forward, supe.ReplayBuffer.add, supe.Agent
    descend, outcome_loss = supe.descend, supe.outcome_loss

    def noted_add(rb, obs, u, *rest):
        events.append(("add", torch.from_numpy(obs), u))
        add(rb, obs, u, *rest)

    def noted_forward(novelty, *inputs):
        novelty.seen = inputs
        return forward(novelty, *inputs)

    def noted_descend(optimizer, loss):
        if optimizer is agents[0].novelty_optimizer:
            events.append(("g", *agents[0].novelty.seen))
        descend(optimizer, loss)

    def noted_loss(outcome, obs, u, *rest):
        bonus = agents[0].bonus_scale * forward(agents[0].novelty, obs, u)
        events.append(("update", agents[0].bonus_scale.item(), bonus.mean().item()))
        return outcome_loss(outcome, obs, u, *rest)

    monkeypatch.setattr(supe.ReplayBuffer, "add", noted_add)
    monkeypatch.setattr(supe.Novelty, "forward", noted_forward)
    monkeypatch.setattr(supe, "Agent", lambda *inputs: agents.append(agent_class(*inputs)) or agents[0])
    monkeypatch.setattr(supe, "descend", noted_descend)
    monkeypatch.setattr(supe, "outcome_loss", noted_loss)
    monkeypatch.setattr(supe, "pretrain", lambda *inputs: {})
    monkeypatch.setattr(data_tools, "load_dataset", lambda *inputs: numbered_data())
    monkeypatch.setattr(supe, "rollout", lambda *inputs: NO_SCORES)
    flags = "--env-id maze --hidden-dim 16 --critic-dim 16 --num-envs 4 --batch-size 8 --updates-per-step 0.025"
    flags += f" --warmup-steps 200 --total-timesteps 600 --device cpu --run-dir {tmp_path}"
    args = supe.parse_args(flags.split())
    supe.train(args)

    scales, bonuses = zip(*(event[1:] for event in events if event[0] == "update"))
    assert len(scales) == 10 and len(set(scales)) == 1 and bonuses[0] == pytest.approx(args.rnd_coef)
    kinds = [kind for kind, *_ in events]
    first = kinds.index("update")
    assert kinds[:first] == ["add"] * 6  # 200 env steps of warm-up, and the 40 that the first update is due for
    adds = [i for i, kind in enumerate(kinds) if kind == "add" and i > first]
    assert len(adds) == 9 and kinds.count("g") == 9 * 4
    for i in adds:
        rows = zip(*(columns[1:] for columns in events[i + 1 : i + 5]))  # of four environments, one after the other
        assert all(torch.equal(torch.cat(seen), expected) for seen, expected in zip(rows, events[i][1:]))


@pytest.mark.parametrize(("ratio", "target_kl"), [(0.5, 0.0), (0.5, 5.0)])
def test_it_finds_the_skill_that_pays(ratio, target_kl):
    """Episodes of one skill; the best is tanh^-1 of (0.6, -0.6, 0). Demonstrations are anything."""
    best = torch.tensor([0.6, -0.6, 0.0])
    args = tiny_args(
        critic_dim=32, learning_rate=6e-3, num_envs=50, critic_steps=1, batch_size=64, offline_ratio=ratio,
        alpha=0.05, alpha_lr=3e-4, target_kl=target_kl, warmup_steps=0, buffer_size=5000,
    )  # fmt: skip
    agent = random_agent(args)
    agent.bonus_scale.fill_(0.0)
    rb = supe.ReplayBuffer(4, args, numbered_data())
    rng = np.random.default_rng(0)
    for k in range(200):
        obs = random_obs(rng, 50).astype(np.float32)
        if k % 2 == 0:
            u = torch.tanh(agent.choose_skills(obs, 0, explore=True))
            reward = 1 - (u - best).square().sum(-1)
            rb.add(obs, u, reward.numpy(), np.ones(50, dtype=bool), obs)
        agent.update(*rb.sample(64))
    mode = torch.tanh(agent.choose_skills(obs, 0, explore=False))  # samples stay random: alpha keeps -Z/2 nats
    assert (mode - best).square().sum(-1).mean() < 0.3 and reward.mean() > 0.4  # uniform ones get -0.7
