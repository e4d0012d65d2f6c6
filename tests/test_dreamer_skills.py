"""dreamer_skills.py: what it shares with spirl.py and dreamer.py, the scale of skills, the KL, and small problems."""

import math

import numpy as np
import pytest
import torch
from numpy_nets import same_weights
from test_spirl import noisy_copy

from algos import dreamer, dreamer_skills, tdmpc_skills


def tiny_args(**changes):
    small = dict(
        device="cpu", hidden_dim=16, model_dim=16, deter_dim=12, stoch_dim=4, encoder_dim=16,
        skill_dim=3, skill_horizon=5, num_envs=2, batch_size=6, batch_length=5, imagine_starts=20, imagine_steps=3,
        pretrain_updates=6, eval_episodes=2, total_timesteps=1200, warmup_steps=400,
    )  # fmt: skip
    return dreamer_skills.Args(**(small | changes))


def new_agent(args):
    torch.manual_seed(0)
    return dreamer_skills.Agent(args, noisy_copy(dreamer_skills.make_networks(args)))


def tiny_batch(args, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B, L = args.batch_size, args.batch_length
    obs = torch.randn(B, L, 4, generator=generator)
    u = torch.rand(B, L, args.skill_dim, generator=generator) * 2 - 1
    return obs, u, torch.randn(B, L, generator=generator), torch.zeros(B, L)


# ------------------------------------------------------------------------------------------- what is that of the others
@pytest.mark.parametrize("position_features", [False, True])
def test_the_model_sees_what_that_of_dreamer_sees(position_features):
    obs = torch.rand(5, 4) * 30
    one, two = (
        file.Inputs(4, file.Args(position_features=position_features))(obs) for file in (dreamer, dreamer_skills)
    )
    assert torch.equal(one, two)


# --------------------------------------------------------------------------------------------------------------- the KL
def test_squashed_kl_is_right_from_narrow_to_very_wide_policies():
    """By a fine sum over x; at std 5 the 9 Gauss-Hermite nodes of tdmpc_skills.py, made for .05, are not enough."""
    rng = np.random.default_rng(0)
    grid = np.linspace(-9, 9, 40_001)[:, None]
    density = np.exp(-0.5 * grid**2) / np.exp(-0.5 * grid**2).sum()
    for scale in (0.05, 0.5, 5.0):
        p = rng.uniform(-3, 3, 40), np.full(40, scale)
        q = rng.uniform(-1, 1, 40), rng.uniform(0.3, 1.0, 40)
        x = p[0] + scale * grid
        log_slope = math.log(8) - 2 * x - 2 * np.logaddexp(0, -2 * x)
        log_q = -0.5 * ((2 * np.tanh(x) - q[0]) / q[1]) ** 2 - np.log(q[1]) - 0.5 * math.log(2 * math.pi)
        exact = -np.log(scale) - 0.5 * math.log(2 * math.pi * math.e) - (density * (log_slope + log_q)).sum(0)
        miss = (2 * np.tanh(x) - q[0]) / q[1] ** 2 * 2 / np.cosh(x) ** 2  # of log q's derivative in x, negative
        slopes = (density * (2 * np.tanh(x) + miss)).sum(0)  # d KL / d mean
        pairs = [[torch.from_numpy(v)[:, None] for v in pair] for pair in (p, q)]
        pairs[0][0].requires_grad_()
        kl = dreamer_skills.squashed_kl(*pairs)
        np.testing.assert_allclose(kl.detach(), exact, rtol=2e-3)
        kl.sum().backward()
        np.testing.assert_allclose(pairs[0][0].grad[:, 0], slopes, atol=5e-3 * np.abs(slopes).max())
        if scale == 5:
            assert np.abs(tdmpc_skills.squashed_kl(*pairs).detach().numpy() / exact - 1).max() > 0.05


def actor_parts(args, prior_std=0.5):
    agent = new_agent(args)
    torch.manual_seed(0)
    h, s, obs = torch.randn(6, 5, 12), torch.randn(6, 5, 4), torch.randn(6, 5, 4)
    agent.skill_prior.forward = lambda obs: (obs[..., :3], torch.full_like(obs[..., :3], prior_std))
    agent.model.requires_grad_(False)
    agent.critic.requires_grad_(False)
    return agent, h, s, obs


def call_actor_loss(agent, h, s, obs, args):
    torch.manual_seed(3)
    return dreamer_skills.actor_loss(agent.model, agent.actor, agent.critic, agent.skill_prior, h, s, obs, args)


def test_actor_loss_adds_the_kl_on_real_states():
    args = tiny_args(alpha=0.7)
    agent, h, s, obs = actor_parts(args)
    torch.manual_seed(3)
    without, _, *_ = dreamer_skills.behaviour_loss(agent.model, agent.actor, agent.critic, h, s, args)
    loss, metrics, feature, returns, weight = call_actor_loss(agent, h, s, obs, args)
    pi = agent.actor(torch.cat([s, h], -1))
    kl = dreamer_skills.squashed_kl(pi, (obs[..., :3], torch.full((6, 5, 3), 0.5))).mean()
    assert metrics["prior_kl"].item() == pytest.approx(kl.item(), rel=1e-5)
    assert loss.item() == pytest.approx(without.item() + 0.7 * kl.item(), rel=1e-5)
    assert feature.shape == (2, 20, 16) and returns.shape == weight.shape == (2, 20)
    loss.backward()
    assert all(p.grad is None for m in (agent.model, agent.critic, agent.skill_prior) for p in m.parameters())
    assert all(p.grad.abs().sum() > 0 for p in agent.actor.parameters())


def test_policy_far_from_a_sharp_prior_comes_back():
    """Imagination without actions has no gradient: what remains is the KL, which is not bounded."""
    args = tiny_args()
    agent, h, s, obs = actor_parts(args, prior_std=0.1)
    with torch.no_grad():
        agent.model.cell_input[0].weight[:, 4:] = 0
    loss, metrics, *_ = call_actor_loss(agent, h, s, obs, args)
    loss.backward()
    assert sum(p.grad.square().sum() for p in agent.actor.parameters()) > 0 and metrics["prior_kl"] > 100


# ------------------------------------------------------------------------------------------------------- acting, replay
def train(args, tmp_path, monkeypatch):
    """Runs RL from random networks; returns results, checkpoint, networks, and the skills and rewards of training."""
    executed, rewards, ends, found = [], [], [], []
    real = dreamer_skills.execute_skill

    def execute_skill(envs, skills, obs, z, args):
        result = real(envs, skills, obs, z, args)
        if len(obs) == 2:  # training
            executed.append(z.clone())
            rewards.append(np.float32([len(rewards), -1]))
            envs.terminations[:] = result[2] & (np.arange(2) == 0)  # the episodes of the second one time out
            ends.append(envs.terminations.copy())
            result = result[0], rewards[-1], result[2]
        return result

    def pretrain(args, networks, data, writer, stop):
        networks.load_state_dict(noisy_copy(networks).state_dict())
        return found.append(networks) or {}

    monkeypatch.setattr(dreamer_skills, "execute_skill", execute_skill)
    monkeypatch.setattr(dreamer_skills, "pretrain", pretrain)
    args.run_dir, args.pretrained = str(tmp_path), "any"  # so that no data are loaded
    results = dreamer_skills.train(args)
    state = torch.load(next(tmp_path.glob("*/checkpoint.pt")), weights_only=True)
    return results, state, found[0], torch.stack(executed, 1), np.array(rewards), np.array(ends)


def test_replay_holds_the_executed_skills_at_the_models_scale(tmp_path, monkeypatch, short_episodes):
    args = tiny_args(updates_per_step=0.02, eval_episodes=3, reward_scale=0.5)
    results, state, _, executed, rewards, ends = train(args, tmp_path, monkeypatch)  # executed (E, skills, Z)
    for e in range(2):
        rows = state["rb"]["rows"][e::2][: state["rb"]["filled"][e]]
        stored = rows[:, 4:7]
        first = (stored == 0).all(1)  # of an episode
        assert torch.allclose(2 * stored[~first], executed[e])
        assert torch.equal(rows[~first, 7], 0.5 * torch.from_numpy(rewards[:, e]))
        assert torch.equal(rows[~first, 8].bool(), torch.from_numpy(ends[:, e]))
        assert ends[:, e].any() == (e == 0) and not rows[first, 7:].any()
    # after the warm-up all skills are 2 tanh or its noise, clipped
    warmup = 400 // (2 * 5)
    assert executed[:, warmup:].abs().max() <= 2 and executed[:, warmup:].abs().max() > 1
    # one update for 50 env steps behind the warm-up
    assert results["updates"] == (results["env_steps"] - 400) // 50


def test_warmup_follows_the_prior_as_it_is():
    agent = new_agent(tiny_args())
    obs = torch.rand(5, 4) * 30
    torch.manual_seed(0)
    z = dreamer_skills.Filter(agent, 5).choose_skills(obs.numpy(), None, explore=True)
    torch.manual_seed(0)
    mean, std = agent.skill_prior(obs)
    assert torch.equal(z, mean + std * torch.randn(5, 3))


def test_filter_sees_what_training_sees(tmp_path, monkeypatch, short_episodes):
    """The states of the last skills, filtered while acting, against `observe` on the rows of the replay buffer."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    args = tiny_args(warmup_steps=0, updates_per_step=0.0, total_timesteps=330)
    _, state, networks, *_ = train(args, tmp_path, monkeypatch)
    agent = dreamer_skills.Agent(args, networks)
    agent.load_state_dict(state["agent"])
    rows = state["rb"]["rows"].unflatten(0, (-1, 2)).transpose(0, 1)  # (E, rows, ...)
    rows = rows[:, 19:]  # without the warm-up, an episode of 18 skills each
    h, s, _ = agent.model.observe(rows[:, :-1, :4], rows[:, :-1, 4:7])  # the filter has not seen the last row yet
    assert torch.allclose(h[:, -1], state["memory"][0], atol=1e-5)
    assert torch.allclose(s[:, -1], state["memory"][1], atol=1e-5)


def test_evaluations_take_the_mode():
    args = tiny_args()
    agent = new_agent(args)
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias[:3] = torch.tensor([0.3, -0.2, 0.0])
    z = dreamer_skills.Filter(agent, 4).choose_skills(np.zeros((4, 4), np.float32), 0, explore=False)
    expected = 2 * torch.tanh(5 * torch.tanh(torch.tensor([0.06, -0.04, 0.0])))
    assert torch.allclose(z, expected.expand(4, 3), atol=1e-6)
    # In training noise joins the policy's samples, here without a std, and the model sees both
    agent.actor.raw_std = -50.0
    filter = dreamer_skills.Filter(agent, 2_000)
    z = filter.choose_skills(np.zeros((2_000, 4), np.float32), 0, explore=True)
    assert z[:, 2].std().item() == pytest.approx(2 * 0.3, rel=0.05) and torch.equal(2 * filter.memory[2], z)


# ------------------------------------------------------------------------------------------------------------- learning
def test_an_update_moves_model_actor_and_critic_only():
    args = tiny_args()
    agent = new_agent(args)
    start = new_agent(args)
    agent.update(*tiny_batch(args))
    for name in ("skills", "skill_prior"):
        assert same_weights(getattr(agent, name), getattr(start, name)), name
        assert not getattr(agent, name).training  # BatchNorm
    for name in ("model", "actor", "critic"):
        assert not same_weights(getattr(agent, name), getattr(start, name)), name


@pytest.mark.parametrize("alpha", [0.0, 30.0])
def test_actor_finds_the_rewarded_skill_or_stays_at_the_prior(alpha):
    """Windows of random skills, reward 10 u; the prior's mean is at u = -.5."""
    args = tiny_args(alpha=alpha, learning_rate=6e-3, actor_lr=6e-3, skill_dim=1, gamma=0.5)
    agent = new_agent(args)
    agent.actor.raw_std = math.log(math.e - 1)  # it begins with a std of 1
    agent.skill_prior.forward = lambda obs: (torch.full_like(obs[..., :1], -1.0), torch.ones_like(obs[..., :1]))
    for k in range(50):
        obs, u, _, terminals = tiny_batch(args, seed=k)
        metrics = agent.update(0 * obs, u, 10 * u[..., 0], terminals)
    acting = dreamer_skills.Filter(agent, 1)
    mode = acting.choose_skills(np.zeros((1, 4), np.float32), 0, explore=False).item() / 2
    if alpha == 0:
        assert mode > 0.9
    else:
        assert -0.8 < mode < 0 and metrics["prior_kl"] < 1
