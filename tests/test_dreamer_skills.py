"""dreamer_skills.py: what it shares with spirl.py and dreamer.py, the scale of skills, the KL, and small problems."""

import dataclasses
import inspect
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_nets import same_weights
from test_spirl import noisy_copy, np_log_prob, short_episodes

import data_tools
from algos import dreamer, dreamer_skills, spirl, tdmpc_skills

__all__ = ["short_episodes"]  # a fixture


def tiny_args(**changes):
    small = dict(
        device="cpu", cudagraphs=False, hidden_dim=16, model_dim=16, deter_dim=12, stoch_dim=4, encoder_dim=16,
        skill_dim=3, skill_horizon=5, num_envs=2, batch_size=6, batch_length=5, imagine_starts=20, imagine_steps=3,
        pretrain_updates=6, eval_episodes=2, total_timesteps=1200, warmup_steps=400,
    )  # fmt: skip
    return dreamer_skills.Args(**(small | changes))


def new_agent(args, obs_dim=4, action_dim=2, seed=0):
    torch.manual_seed(seed)
    networks = dreamer_skills.make_networks(args, obs_dim, action_dim)
    return dreamer_skills.Agent(args, noisy_copy(networks, seed + 1))


def tiny_batch(args, obs_dim=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    B = args.batch_size
    L = args.batch_length
    obs = torch.randn(B, L, obs_dim, generator=generator)
    u = torch.rand(B, L, args.skill_dim, generator=generator) * 2 - 1
    return obs, u, torch.randn(B, L, generator=generator), torch.zeros(B, L)


# ------------------------------------------------------------------------------------------- what is that of the others
def test_pretraining_is_that_of_spirl(tmp_path, monkeypatch):
    """test_copies.py compares the code; here what it is shaped by, and where it is found."""
    for env_id in data_tools.TASKS:
        for flags in (["--env-id", env_id], ["--env-id", env_id, "--published"]):
            ours, theirs = (vars(file.parse_args(flags)) for file in (dreamer_skills, spirl))
            fields = list(theirs)
            shaping = fields[fields.index("skill_horizon") : fields.index("clip_norm") + 1]
            assert {name: ours[name] for name in shaping} == {name: theirs[name] for name in shaping}
    monkeypatch.setattr(data_tools, "load_dataset", lambda *args: SimpleNamespace(fingerprint="data"))
    paths = set()
    for file, flags in ((spirl, "--critic-dim 7"), (tdmpc_skills, "--model-dim 7"), (dreamer_skills, "--deter-dim 7")):
        paths.add(file.find_pretrained(file.parse_args([*flags.split(), "--data-dir", str(tmp_path)]))[0])
    assert len(paths) == 1


def test_model_and_actor_are_those_of_dreamer_but_for_their_sizes():
    """The line in the header takes them out of test_copies.py."""
    theirs = inspect.getsource(dreamer.RSSM)
    theirs = theirs.replace("args.hidden_dim", "args.model_dim")
    theirs = theirs.replace("Inputs(obs_dim, args)", "Features(obs_dim, args, always_scaled=True)")
    assert inspect.getsource(dreamer_skills.RSSM) == theirs
    theirs = inspect.getsource(dreamer.ActionModel).replace("args.hidden_dim", "args.model_dim")
    theirs = theirs.replace("math.exp(5)", "math.exp(args.actor_std)").replace("this is 5", "this is actor_std")
    assert inspect.getsource(dreamer_skills.ActionModel) == theirs
    for position_features in (False, True):
        args = dreamer.Args(position_features=position_features)
        obs = torch.rand(5, 4) * 30
        one = dreamer.Inputs(4, args)(obs)
        assert torch.equal(dreamer_skills.Features(4, args, always_scaled=True)(obs), one)


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


def test_releases_estimate_is_larger_by_the_log_of_two():
    rng = np.random.default_rng(1)
    p = rng.normal(size=10), np.full(10, 0.3)
    q = rng.uniform(-1, 1, 10), rng.uniform(0.3, 1.0, 10)
    x = p[0] + p[1] * rng.normal(size=(200_000, 10))
    estimates = np_log_prob(x, p) - np.log(1 - np.tanh(x) ** 2).sum(-1) - np_log_prob(2 * np.tanh(x), q)
    exact = dreamer_skills.squashed_kl(*([torch.from_numpy(v) for v in pair] for pair in (p, q))).item()
    assert estimates.mean() - exact == pytest.approx(10 * math.log(2), abs=0.05)


def actor_parts(args, prior_std=0.5):
    agent = new_agent(args)
    torch.manual_seed(0)
    h = torch.randn(6, 5, 12)
    s = torch.randn(6, 5, 4)
    obs = torch.randn(6, 5, 4)
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


@pytest.mark.parametrize("release_defects", [False, True])
def test_policy_far_from_a_sharp_prior_comes_back_but_in_the_release(release_defects):
    """Imagination without actions has no gradient: what remains is the KL, which the release bounds by 100."""
    args = tiny_args(release_defects=release_defects)
    agent, h, s, obs = actor_parts(args, prior_std=0.1)
    with torch.no_grad():
        agent.model.cell_input[0].weight[:, 4:] = 0
    loss, metrics, *_ = call_actor_loss(agent, h, s, obs, args)
    loss.backward()
    norm = sum(p.grad.square().sum() for p in agent.actor.parameters()).sqrt()
    assert (norm == 0) == release_defects
    assert (metrics["prior_kl"] == 100) == release_defects


def test_the_releases_kl_is_larger_by_a_constant():
    kls = []
    for release_defects in (False, True):
        args = tiny_args(release_defects=release_defects)
        parts = actor_parts(args, prior_std=1.0)
        kls.append(call_actor_loss(*parts, args)[1]["prior_kl"].item())
    assert kls[1] - kls[0] == pytest.approx(3 * math.log(2), abs=1e-4)


# ------------------------------------------------------------------------------------------------------- acting, replay
class SkillNotes:
    """Notes the skills that training executes, and by what."""

    def __init__(self, monkeypatch):
        self.executed = []
        self.actors = []
        self.rewards = []
        self.ends = []
        real = dreamer_skills.execute_skill

        def execute_skill(envs, skills, obs, z, ended, args):
            if len(obs) == 2:  # training
                self.executed.append(z.clone())
                self.actors.append(skills)
            result = real(envs, skills, obs, z, ended, args)
            if len(obs) == 2:
                next_obs, _, over, steps = result
                rewards = np.float32([len(self.rewards), -1])
                envs.terminations[:] = over & (np.arange(2) == 0)  # the episodes of the second one time out
                self.rewards.append(rewards)
                self.ends.append(envs.terminations.copy())
                result = next_obs, rewards, over, steps
            return result

        monkeypatch.setattr(dreamer_skills, "execute_skill", execute_skill)


def train(args, tmp_path):
    torch.manual_seed(0)
    networks = noisy_copy(dreamer_skills.make_networks(args, 4, 2))
    writer = SimpleNamespace(add_scalar=lambda *args: None)
    results = dreamer_skills.train(args, networks, {}, tmp_path, writer, threading.Event())
    return results, torch.load(tmp_path / "checkpoint.pt", weights_only=True), networks


@pytest.mark.parametrize("release_defects", [False, True])
def test_replay_holds_the_executed_skills_at_the_models_scale(release_defects, tmp_path, monkeypatch, short_episodes):
    notes = SkillNotes(monkeypatch)
    args = tiny_args(release_defects=release_defects, updates_per_step=0.02, eval_episodes=3, reward_scale=0.5)
    results, state, _ = train(args, tmp_path)
    executed = torch.stack(notes.executed, 1)  # (E, skills, Z)
    for e in range(2):
        rows = state["rb"]["rows"][e::2][: state["rb"]["filled"][e]]
        stored = rows[:, 4:7]
        first = (stored == 0).all(1)  # of an episode
        assert torch.allclose(stored[~first] * (1 if release_defects else 2), executed[e])
        rewards, ends = rows[~first, 7:].T
        assert torch.equal(rewards, 0.5 * torch.tensor(np.array(notes.rewards)[:, e]))
        assert torch.equal(ends.bool(), torch.tensor(np.array(notes.ends)[:, e]))
        assert ends.any() == (e == 0) and not rows[first, 7:].any()
    # after the warm-up all skills are 2 tanh or its noise, clipped
    warmup = 400 // (2 * 5)
    assert executed[:, warmup:].abs().max() <= 2 and executed[:, warmup:].abs().max() > 1
    # (b) random actions in the maze's warm-up; skills with actions as they are, in the release (e) their tanh
    kinds = [isinstance(actor, dreamer_skills.UniformActions) for actor in notes.actors]
    assert kinds == [release_defects and k < warmup for k in range(len(kinds))]
    assert notes.actors[-1].squash_actions == release_defects
    # one update for 50 env steps behind the warm-up
    assert results["updates"] == (results["env_steps"] - 400) // 50


def test_warmup_follows_the_prior_as_it_is():
    agent = new_agent(tiny_args())
    obs = torch.rand(5, 4) * 30
    torch.manual_seed(0)
    z = agent.sample_prior(obs.numpy())
    torch.manual_seed(0)
    mean, std = agent.skill_prior(obs)
    assert torch.equal(z, mean + std * torch.randn(5, 3))


@pytest.mark.parametrize("release_defects", [False, True])
def test_filter_sees_what_training_sees_but_in_the_release(release_defects, tmp_path, monkeypatch, short_episodes):
    """The states of the last skills, filtered while acting, against `observe` on the rows of the replay buffer."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    args = tiny_args(
        warmup_steps=0, updates_per_step=0.0, total_timesteps=330, release_defects=release_defects, eval_interval=0
    )
    _, state, networks = train(args, tmp_path)
    agent = dreamer_skills.Agent(args, networks)
    agent.load_state_dict(state["agent"])
    rows = state["rb"]["rows"].unflatten(0, (-1, 2)).transpose(0, 1)  # (E, rows, ...)
    rows = rows[:, 19:]  # without the warm-up, an episode of 18 skills each
    h, s, _ = agent.model.observe(rows[:, :-1, :4], rows[:, :-1, 4:7])  # the filter has not seen the last row yet
    assert torch.allclose(h[:, -1], state["h"], atol=1e-5) != release_defects
    assert torch.allclose(s[:, -1], state["s"], atol=1e-5) != release_defects


def test_evaluations_take_the_mode():
    args = tiny_args()
    agent = new_agent(args)
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias[:3] = torch.tensor([0.3, -0.2, 0.0])
    z = dreamer_skills.SkillMode(agent, 4)(np.zeros((4, 4), np.float32))
    expected = 2 * torch.tanh(5 * torch.tanh(torch.tensor([0.06, -0.04, 0.0])))
    assert torch.allclose(z, expected.expand(4, 3), atol=1e-6)


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
    args = tiny_args(alpha=alpha, learning_rate=3e-3, actor_lr=3e-3, actor_std=1.0, skill_dim=1, gamma=0.5)
    agent = new_agent(args)
    agent.skill_prior.forward = lambda obs: (torch.full_like(obs[..., :1], -1.0), torch.ones_like(obs[..., :1]))
    for k in range(100):
        obs, u, _, terminals = tiny_batch(args, seed=k)
        metrics = agent.update(0 * obs, u, 10 * u[..., 0], terminals)
    mode = dreamer_skills.SkillMode(agent, 1)(np.zeros((1, 4), np.float32)).item() / 2
    if alpha == 0:
        assert mode > 0.9
    else:
        assert -0.8 < mode < 0 and metrics["prior_kl"] < 1


@pytest.mark.parametrize(
    "flags",
    [dict(actor_std=0.0), dict(batch_length=1), dict(imagine_steps=1), dict(gamma=2.0), dict(pretrain_batch_size=1)],
)
def test_senseless_arguments_are_refused(flags):
    with pytest.raises(SystemExit, match="error: --"):
        dreamer_skills.check_args(dataclasses.replace(tiny_args(), **flags))
