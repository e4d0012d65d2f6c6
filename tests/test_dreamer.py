"""dreamer.py against hand-made numbers, NumPy, and a toy whose observations tell what led to them."""

import copy
import math

import numpy as np
import pytest
import torch

from algos import dreamer


def tiny_args(**changes):
    small = dict(
        env_id="calvin", device="cpu", cudagraphs=False, position_features=False, num_envs=2, deter_dim=12, stoch_dim=4,
        encoder_dim=16, hidden_dim=16, batch_size=6, batch_length=5, imagine_starts=20, imagine_steps=4,
    )  # fmt: skip
    return dreamer.Args(**(small | changes))


def tiny_batch(args, obs_dim=3, action_dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, L = args.batch_size, args.batch_length
    obs = torch.randn(B, L, obs_dim, generator=generator)
    action = torch.rand(B, L, action_dim, generator=generator) * 2 - 1
    return obs, action, torch.randn(B, L, generator=generator), torch.zeros(B, L)


@pytest.fixture
def no_noise(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)


# -------------------------------------------------------------------------------------------------------------- replay
def fill(rb, steps: int, seed: int = 0, state=None):
    """A stub task o' = (a, r, episode, age) of unequal lengths, in two environments; time-outs and ends by turns."""
    rng = np.random.default_rng(seed)
    episode, age, length = state or (np.array([0, 1]), np.zeros(2), np.array([7, 12]))

    def observe(action, rewards):
        return np.column_stack([action, rewards, episode, age]).astype(np.float32)

    if state is None:
        rb.begin(observe(np.zeros((2, 1)), np.zeros(2)), np.ones(2, bool))
    for _ in range(steps):
        action = rng.uniform(-1, 1, (2, 1)).astype(np.float32)
        rewards = rng.normal(size=2).astype(np.float32)
        age = age + 1
        ended = age == length
        rb.add(observe(action, rewards), action, rewards, ended & (episode % 2 == 0))
        if ended.any():
            episode = np.where(ended, episode + 2 + (age % 3).astype(int), episode)
            length = np.where(ended, rng.integers(3, 15, 2), length)
            age = np.where(ended, 0, age)
            first = observe(np.zeros((2, 1)), np.zeros(2))
            rb.begin(first, ended)
    return episode, age, length


def test_windows_are_aligned_and_stay_inside_an_episode():
    rb = dreamer.SequenceBuffer(4, 1, 5, tiny_args())
    state = fill(rb, 700)
    obs, action, rewards, terminals = rb.sample(4_000)
    assert obs.shape == (4_000, 5, 4) and action.shape == (4_000, 5, 1)
    assert rewards.shape == terminals.shape == (4_000, 5)
    # A row's action and reward are those that led to its observation; the first row of an episode has none
    assert torch.equal(obs[..., 0], action[..., 0])
    assert torch.equal(obs[..., 1], rewards)
    assert (action[obs[..., 3] == 0] == 0).all()
    # One episode, step by step
    assert (obs[..., 2] == obs[:, :1, 2]).all()
    assert (obs[:, 1:, 3] == obs[:, :-1, 3] + 1).all()
    # Ends stand in last rows only, and only true ones are marked
    assert (terminals[:, :-1] == 0).all() and terminals[:, -1].any()
    assert (obs[terminals == 1][:, 2] % 2 == 0).all()
    # A resumed buffer goes on alike, through growth
    other = dreamer.SequenceBuffer(4, 1, 5, tiny_args())
    saved = copy.deepcopy(rb.state_dict())
    other.load_state_dict(saved)
    for buffer in (rb, other):
        fill(buffer, 900, seed=1, state=state)
    assert all(torch.equal(a, b) for a, b in zip(rb.state_dict().values(), other.state_dict().values()))
    old = saved["rows"][:600]
    assert torch.equal(old, rb.rows[:600])
    # Every window is there once, also those of unfinished episodes: one of n rows has n - L + 1
    found = set()
    for e in range(2):
        rows = rb.rows[e::2][: rb.filled[e]]
        found |= {e + i * 2 for i in range(len(rows) - 4) if (rows[i : i + 5, 2] == rows[i, 2]).all()}
    starts = rb.starts[: rb.num_starts].tolist()
    assert len(starts) == len(set(starts)) and set(starts) == found


# -------------------------------------------------------------------------------------------------------------- losses
def test_lambda_return_against_a_double_loop():
    rng = np.random.default_rng(0)
    n, share = 6, 0.95
    rewards, discount, values = rng.normal(size=n), rng.uniform(0.5, 1, n), rng.normal(size=n + 1)

    def m_step(k, m):  # m rewards, then the value
        total, weight = 0.0, 1.0
        for j in range(k, k + m):
            total += weight * rewards[j]
            weight *= discount[j]
        return total + weight * values[k + m]

    expected = []
    for k in range(n):
        longest = n - k
        total = sum((1 - share) * share ** (m - 1) * m_step(k, m) for m in range(1, longest))
        expected.append(total + share ** (longest - 1) * m_step(k, longest))
    got = dreamer.lambda_return(*(torch.tensor(x) for x in (rewards, values, discount)), share)
    np.testing.assert_allclose(got, expected, rtol=1e-10)


@pytest.mark.parametrize(("second", "loss"), [(8.0, 4.0), (4.0, 3.0)])
def test_free_nats_hold_for_the_mean(second, loss, monkeypatch):
    """KL 0 and 8: 4, with gradient. KL 0 and 4: 3, without; clipped per state it would be 3.5."""
    kl = torch.tensor([0.0, second], requires_grad=True)
    monkeypatch.setattr(dreamer, "kl_divergence", lambda p, q: kl)
    total, metrics, _, _ = dreamer.rssm_loss(dreamer.RSSM(3, 2, tiny_args()), *tiny_batch(tiny_args()), tiny_args())
    rest = metrics["recon_loss"] + metrics["reward_loss"]
    assert metrics["kl"] == second / 2 and (total - rest).item() == pytest.approx(loss, rel=1e-5)
    total.backward()
    assert (kl.grad.abs().sum() > 0) == (second == 8)


def test_step_and_observe_against_numpy(no_noise):
    torch.manual_seed(0)
    args = tiny_args()
    model = dreamer.RSSM(3, 2, args).double()
    obs, action, _, _ = (x.double() for x in tiny_batch(args))
    weights = {name: value.detach().numpy() for name, value in model.named_parameters()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def elu(x):
        return np.where(x > 0, x, np.expm1(x))

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    h, s = np.zeros((6, 12)), np.zeros((6, 4))
    got_h, got_s, (mean, std) = model.observe(obs, action)
    for t in range(5):
        x = elu(linear(np.concatenate([s, action[:, t].numpy()], 1), "cell_input.0"))
        xr, xu, xn = np.split(linear(x, "gates_x"), 3, 1)
        hr, hu, hn = np.split(linear(h, "gates_h"), 3, 1)
        update = sigmoid(xu + hu)
        h = (1 - update) * np.tanh(xn + sigmoid(xr + hr) * hn) + update * h
        embedding = elu(linear(elu(linear(obs[:, t].numpy(), "encoder.1")), "encoder.3"))
        embedding = linear(embedding, "encoder.5")
        q = linear(elu(linear(np.concatenate([h, embedding], 1), "posterior_net.0")), "posterior_net.2")
        s = q[:, :4]
        np.testing.assert_allclose(got_h[:, t].detach(), h, rtol=1e-9)
        np.testing.assert_allclose(mean[:, t].detach(), s, rtol=1e-8, atol=1e-12)
        np.testing.assert_allclose(std[:, t].detach(), np.log1p(np.exp(q[:, 4:])) + 0.1, rtol=1e-9)
        assert torch.equal(got_s, mean)
    assert model.gates_x.weight.abs().max() <= 1 / math.sqrt(12)  # a GRU's first weights


def test_sizes_are_those_of_the_release():
    """Numbers of weights in the Kitchen, counted in the authors' code (its networks see raw observations)."""
    args = dreamer.Args(env_id="kitchen", device="cpu", position_features=False)
    agent = dreamer.Agent(args, 30, 9)

    def count(*parts):
        return sum(weights.numel() for part in parts for weights in part.parameters())

    model = agent.model
    assert count(model.encoder) == 139_520
    assert count(model.decoder) == 140_348
    assert count(model.reward_model) == 253_201
    assert count(model) - count(model.encoder, model.decoder, model.reward_model) == 404_920
    assert count(agent.actor) == 580_818
    assert count(agent.critic) == 413_601


def test_the_decoder_begins_at_the_mean_of_what_was_seen():
    torch.manual_seed(0)
    model = dreamer.RSSM(3, 2, tiny_args())
    feature = torch.randn(4, 16)
    before, std = model.decode(feature)
    obs = torch.tensor([10.0, 24.0, -5.0]) + torch.randn(6, 5, 3)
    model.start_decoder(obs)
    after, same_std = model.decode(feature)
    torch.testing.assert_close(after, before + torch.from_numpy(obs.numpy().reshape(30, 3).mean(0)))
    assert torch.equal(std, same_std)


def test_the_models_loss_is_a_sum_of_likelihoods():
    """Of all numbers of an observation, of the reward for coming here, and the KL of Gaussians; by torch's own."""
    torch.manual_seed(0)
    args = tiny_args(free_nats=0.01)
    model = dreamer.RSSM(3, 2, args)
    obs, action, rewards, terminals = tiny_batch(args)
    torch.manual_seed(1)
    loss, metrics, h, s = dreamer.rssm_loss(model, obs, action, rewards, terminals, args)
    torch.manual_seed(1)
    same_h, same_s, posterior = model.observe(obs, action)
    assert torch.equal(h, same_h) and torch.equal(s, same_s)
    with torch.no_grad():
        prior = model.prior(h)
        feature = torch.cat([s, h], -1)
        decoder = model.decoder(feature)
        predicted = model.reward_model(feature)[..., 0]
    q = torch.distributions.Normal(*posterior)
    p = torch.distributions.Normal(*prior)
    assert (posterior[1] - prior[1]).abs().max() > 0.01
    kl = torch.distributions.kl_divergence(q, p).sum(-1).mean().item()
    assert kl > 0.01 and metrics["kl"].item() == pytest.approx(kl, rel=1e-4)

    mean, raw = (x.numpy() for x in decoder.chunk(2, -1))
    std = 0.1 + 0.7 * (np.tanh(raw) + 1)
    error = (obs.numpy() - mean) / std
    recon = (0.5 * error**2 + np.log(std) + 0.5 * np.log(2 * np.pi)).sum(-1).mean()
    reward = 0.5 * np.mean((rewards - predicted).numpy() ** 2) + 0.5 * np.log(2 * np.pi)
    assert metrics["recon_loss"].item() == pytest.approx(recon, rel=1e-4)
    assert metrics["reward_loss"].item() == pytest.approx(reward, rel=1e-4)
    assert loss.item() == pytest.approx(kl + recon + reward, rel=1e-4)


def test_posterior_that_ignores_the_observation_is_the_prior():
    torch.manual_seed(0)
    args = tiny_args()
    model = dreamer.RSSM(3, 2, args)
    with torch.no_grad():
        model.posterior_net[0].weight[:, 12:] = 0
        model.posterior_net[0].weight[:, :12] = model.prior_net[0].weight
        model.posterior_net[2].weight[:] = model.prior_net[2].weight
    obs, action, _, _ = tiny_batch(args)
    h, _, posterior = model.observe(1e3 * obs, action)
    prior = model.prior(h)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(posterior, prior))
    assert dreamer.kl_divergence(posterior, prior).abs().max() < 1e-4


def test_actor_starts_wide_and_bounded_and_extreme_actions_are_seen():
    torch.manual_seed(0)
    args = tiny_args(imagine_steps=15, imagine_starts=10_000)
    agent = dreamer.Agent(args, 3, 2)
    states = torch.randn(20, 5, 12), torch.randn(20, 5, 4)
    last = agent.actor.net[-1]
    with torch.no_grad():
        last.weight.zero_()
    mean, std = agent.actor(torch.randn(50, 16))
    assert mean.abs().max() == 0 and torch.allclose(std, torch.tensor(5.0001))
    share = behave(agent, args, *states)[1]["extreme_actions"].item()
    beyond = 1 - math.erf(math.atanh(0.999) / 5.0001 / 2**0.5)  # a Gaussian of std 5
    assert share == pytest.approx(beyond, abs=0.04)
    with torch.no_grad():
        last.bias[:] = torch.tensor([1e6, 0.0, -1e6, -1e6])  # one of two actions in its corner, no noise
    mean, _ = agent.actor(torch.randn(50, 16))
    assert torch.allclose(mean[:, 0], torch.tensor(5.0))
    assert behave(agent, args, *states)[1]["extreme_actions"].item() == 0.5


def gradients(module):
    return [weight.grad for weight in module.parameters()]


def behave(agent, args, h, s):
    agent.model.requires_grad_(False)
    agent.critic.requires_grad_(False)
    return dreamer.behaviour_loss(agent.model, agent.actor, agent.critic, h, s, args)


def test_each_loss_moves_its_own_network_only():
    torch.manual_seed(0)
    args = tiny_args()
    agent = dreamer.Agent(args, 3, 2)
    h = torch.randn(6, 5, 12)
    s = torch.randn(6, 5, 4)
    loss, _, feature, returns, weight = behave(agent, args, h, s)
    loss.backward()
    assert all(g is None for module in (agent.model, agent.critic) for g in gradients(module))
    assert all(g.abs().sum() > 0 for g in gradients(agent.actor))
    agent.actor_optimizer.zero_grad()
    agent.model.requires_grad_(True)
    agent.critic.requires_grad_(True)
    dreamer.imagined_value_loss(agent.critic, feature, returns, weight).backward()
    assert all(g is None for module in (agent.model, agent.actor) for g in gradients(module))
    assert all(g is not None for g in gradients(agent.critic))

    # Actions that change nothing in the model have no gradient: it comes through the dynamics alone, and not through
    # what the actor looks at
    agent.critic_optimizer.zero_grad()
    forward = agent.actor.forward
    looked_at = []
    agent.actor.forward = lambda feature: looked_at.append(feature.requires_grad) or forward(feature)
    with torch.no_grad():
        agent.model.cell_input[0].weight[:, 4:] = 0
    behave(agent, args, h, s)[0].backward()
    assert all(g.abs().sum() == 0 for g in gradients(agent.actor))
    assert looked_at == [False] * args.imagine_steps


@pytest.mark.parametrize("continue_head", [False, True])
def test_behaviour_loss_against_a_double_loop(continue_head, no_noise):
    """Rewards, values and discounts differ from state to state: whoever shifts one of them is found out."""
    torch.manual_seed(0)
    args = tiny_args(imagine_steps=7, imagine_starts=10_000, continue_head=continue_head, gamma=0.9, td_lambda=0.8)
    agent = dreamer.Agent(args, 3, 2)
    for module in (agent.model, agent.actor, agent.critic):
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.5)
    h, s = torch.randn(3, 5, 12), torch.randn(3, 5, 4)
    loss, _, feature, returns, weight = behave(agent, args, h, s)
    starts = h[:, : 4 if continue_head else 5].reshape(-1, 12), s[:, : 4 if continue_head else 5].reshape(-1, 4)

    states = []  # (s, h) after 1, 2, ... actions, without noise
    h, s = starts
    with torch.no_grad():
        for _ in range(7):
            action = torch.tanh(agent.actor(torch.cat([s, h], -1))[0])
            h = agent.model.step(h, s, action)
            s = agent.model.prior(h)[0]
            states.append(torch.cat([s, h], -1))
        states = torch.stack(states)
        rewards = agent.model.reward(states).numpy()
        values = agent.critic(states).squeeze(-1).numpy()
        discount = np.full(rewards.shape, 0.9)
        if continue_head:
            discount = 1 / (1 + np.exp(-agent.model.continue_model(states).squeeze(-1).numpy()))
    torch.testing.assert_close(feature, states[:-1])
    expected, weights = np.zeros((6, len(rewards[0]))), np.ones((6, len(rewards[0])))
    for k in range(6):
        for n in range(1, 7 - k):  # n rewards, then the value: (Dreamer eq. 5, 6)
            total = np.prod(discount[k : k + n], 0) * values[k + n]
            for i in range(n):
                total = total + np.prod(discount[k : k + i], 0) * rewards[k + i]
            expected[k] += total * (0.8 ** (n - 1) * (0.2 if n < 6 - k else 1.0))
        weights[k] = np.prod(discount[:k], 0)
    assert rewards.std() > 0.1 and values.std() > 0.1 and (discount.std() > 0.01 or not continue_head)
    np.testing.assert_allclose(returns, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(weight, weights, rtol=1e-3)
    assert loss.item() == pytest.approx(-(weights * expected).mean(), rel=1e-3)
    value_loss = dreamer.imagined_value_loss(agent.critic, feature, returns, weight)
    terms = weights * (0.5 * (values[:-1] - expected) ** 2 + 0.5 * math.log(2 * math.pi))
    assert value_loss.item() == pytest.approx(terms.mean(), rel=1e-3)


def test_imagination_starts_from_states_of_the_batch(monkeypatch):
    args = tiny_args(imagine_starts=7)
    agent = dreamer.Agent(args, 3, 2)
    h = torch.arange(30.0).reshape(6, 5, 1).expand(-1, -1, 12)
    s = -torch.arange(30.0).reshape(6, 5, 1).expand(-1, -1, 4)
    seen = []
    real = dreamer.imagine
    monkeypatch.setattr(dreamer, "imagine", lambda m, a, h, s, n: seen.append((h, s)) or real(m, a, h, s, n))
    behave(agent, args, h, s)
    ((first_h, first_s),) = seen
    assert first_h.shape == (7, 12) and len(first_h[:, 0].unique()) == 7
    assert torch.equal(first_h[:, 0], -first_s[:, 0])  # h and s of one state


def test_loss_of_the_continue_head_is_a_cross_entropy():
    args = tiny_args(continue_head=True)
    torch.manual_seed(0)
    agent = dreamer.Agent(args, 3, 2)
    obs, action, rewards, terminals = tiny_batch(args)
    terminals[:3, -1] = 1
    torch.manual_seed(1)
    h, s, _ = agent.model.observe(obs, action)
    logits = agent.model.continue_model(torch.cat([s, h], -1)).squeeze(-1)
    goes_on = 0.99 * (1 - terminals)
    expected = -(goes_on * logits.sigmoid().log() + (1 - goes_on) * (1 - logits.sigmoid()).log()).mean()
    torch.manual_seed(1)
    loss, metrics, _, _ = dreamer.rssm_loss(agent.model, obs, action, rewards, terminals, args)
    assert metrics["continue_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    others = max(metrics["kl"].item(), args.free_nats) + metrics["recon_loss"].item() + metrics["reward_loss"].item()
    assert loss.item() == pytest.approx(others + 10 * expected.item(), rel=1e-5)
    assert metrics["model_loss"].item() == loss.item()


# -------------------------------------------------------------------------------------------------------------- acting
class Acting:
    """Actions of training, with the memory of the call before."""

    def __init__(self, agent, num_envs: int):
        self.agent, self.memory = agent, agent.new_memory(num_envs)

    def __call__(self, obs, step=None):
        action, self.memory = self.agent.act(obs, self.memory, explore=True)
        return action

    def forget(self, ended):
        self.memory = [x * torch.from_numpy(~ended)[:, None] for x in self.memory]


def test_acting_filters_as_training_does(no_noise):
    """Observations, with the actions that were executed, through the buffer and `observe`: the same states."""
    torch.manual_seed(0)
    agent = dreamer.Agent(tiny_args(), 3, 2)
    acting = Acting(agent, 2)
    rb = dreamer.SequenceBuffer(3, 2, 6, tiny_args())
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2, 3)).astype(np.float32)
    rb.begin(obs, np.ones(2, bool))
    states = []
    for t in range(14):
        action = acting(obs)
        states.append(acting.memory)
        obs = rng.normal(size=(2, 3)).astype(np.float32)
        rb.add(obs, action, np.zeros(2), np.zeros(2))
        if t == 7:  # the second episode of member 1 begins; it lasts to the end
            obs[1] = rng.normal(size=3)
            ended = np.array([False, True])
            rb.begin(obs, ended)
            acting.forget(ended)
    for e, first_row, first_step in ((0, 0, 0), (1, 9, 8)):
        rows = rb.rows[e::2][first_row : first_row + 6]
        h, s, _ = agent.model.observe(rows[None, :, :3], rows[None, :, 3:5])
        for i in range(6):
            assert torch.allclose(h[0, i], states[first_step + i][0][e], atol=1e-6)
            assert torch.allclose(s[0, i], states[first_step + i][1][e], atol=1e-6)


def test_noise_is_added_in_training_only_and_the_model_sees_it():
    agent = dreamer.Agent(tiny_args(), 3, 2)
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.raw_std = -50.0  # no std of the policy's own
    obs = np.zeros((2_000, 3), np.float32)
    noisy = Acting(agent, 2_000)
    action = noisy(obs)
    assert action.std() == pytest.approx(0.3, rel=0.05) and np.abs(action).max() <= 1
    assert np.array_equal(noisy.memory[2].numpy(), action)
    assert np.abs(agent.act(obs[:5], agent.new_memory(5), explore=False)[0]).max() == 0
    agent.actor.raw_std = math.log(math.expm1(0.5))  # now the policy has a std of .5, before its tanh
    agent.args.explore_std = 0.0
    action = Acting(agent, 2_000)(obs)
    assert np.arctanh(action).std() == pytest.approx(0.5, rel=0.05)


# --------------------------------------------------------------------------------------------------------------- whole
def learn_toy(args, agent, choose_action, forget, rb, env_steps: int, reward, update_hook=lambda updates: None):
    """v <- .9 v + .1 a, x <- clip(x + .5 v, +-1.5), 50 steps. Returns mean returns of the episodes, and metrics."""
    E, everyone = args.num_envs, np.ones(args.num_envs, bool)
    rng = np.random.default_rng(0)
    returns, metrics = [], []
    updates = 0

    def observe():
        return np.stack([x, v], 1).astype(np.float32)

    for step in range(0, env_steps, E):
        if step % (50 * E) == 0:
            x, v = rng.uniform(-1.2, 1.2, E), np.zeros(E)
            rb.begin(observe(), everyone)
            forget(everyone)
            returns.append(0.0)
        action = 2 * torch.rand(E, 1).numpy() - 1
        if step >= args.warmup_steps:
            action = choose_action(observe(), step)
        v = 0.9 * v + 0.1 * action[:, 0]
        x = np.clip(x + 0.5 * v, -1.5, 1.5)
        rb.add(observe(), action, reward(x), np.zeros(E))
        returns[-1] += reward(x).mean()
        while updates < (step - args.warmup_steps) * args.updates_per_step:
            metrics.append(agent.update(*rb.sample(args.batch_size)))
            updates += 1
            update_hook(updates)
    return returns, metrics


def test_it_learns_the_toy():
    """Random actions get about 5 of 47."""
    torch.manual_seed(0)
    args = tiny_args(
        num_envs=4, deter_dim=64, stoch_dim=8, encoder_dim=64, hidden_dim=64, batch_size=16, batch_length=10,
        imagine_starts=64, imagine_steps=10, learning_rate=3e-3, critic_lr=3e-3, actor_lr=3e-4, warmup_steps=600,
    )  # fmt: skip
    agent = dreamer.Agent(args, 2, 1)
    acting = Acting(agent, 4)
    rb = dreamer.SequenceBuffer(2, 1, args.batch_length, args)
    returns, metrics = learn_toy(args, agent, acting, acting.forget, rb, 2_000, lambda x: 1 - np.abs(x))
    assert metrics[-1]["recon_loss"] < -2 < metrics[0]["recon_loss"]  # the bound is -2.8
    assert metrics[-1]["reward_loss"] < 0.94 < metrics[0]["reward_loss"]  # the bound is 0.919
    assert np.mean(returns[-3:]) > np.mean(returns[:3]) + 8  # seeds 0 to 2: +35, +31, +14


def test_flags_beat_the_cpu_preset():
    args = dreamer.parse_args(["--env-id", "calvin", "--cpu-preset", "--imagine-starts", "100"])
    assert args.deter_dim == dreamer.CPU_PRESET["deter_dim"] and args.imagine_starts == 100
