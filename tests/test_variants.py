"""SkiMo's variants where they differ from skimo.py: losses against NumPy, gradients; that all of them learn.

What they share with skimo.py is tested there; tests/test_copies.py makes sure that it is the same. Runs from the
command line are those of tests/test_runs.py.
"""

import copy
import inspect
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_nets import (
    NO_CURVES,
    NO_SCORES,
    has_gradient,
    noisy_copy,
    np_features,
    np_gaussian,
    np_kl,
    np_net,
    random_obs,
    rl_batch,
    same_weights,
)
from skimo_tools import (
    Windows,
    backward_of_one_term,
    double_networks,
    errors_on_new_windows,
    fill,
    floats,
    np_encode,
    pretraining_batch,
    skill_reward,
    tensors,
    tiny_args,
)

from algos import skimo, skimo_no_cem, skimo_no_joint, skimo_sac, skimo_single_step


# -------------------------------------------------------------------------------------------------------------- helpers
def single_step_batch(args, B=5):
    """rl_batch with the env steps of every skill: obs (B, N*H+1, 4), actions (B, N, H, 2), ..., steps (B, N)."""
    rng = np.random.default_rng(1)
    N = args.num_skills
    H = args.skill_horizon
    obs = random_obs(rng, B, N * H + 1)
    actions = rng.uniform(-1, 1, (B, N, H, 2))
    _, z, rewards, dones = rl_batch(args, B)
    steps = np.full((B, N), H, dtype=np.float64)
    steps[0, -1] = 1  # cut short
    steps[1, -1] = 3
    return obs, actions, z, rewards, dones, steps


def online_encoder(agent):
    return agent.encoder if isinstance(agent, skimo_sac.Agent) else agent.model.encoder


def rl_batch_of(algo, args):
    return single_step_batch(args) if algo is skimo_single_step else rl_batch(args)


# -------------------------------------------------------------------------------------------------------------- updates

FAMILY = [skimo, skimo_no_cem, skimo_single_step, skimo_sac]  # skimo_no_joint.py's RL is skimo.py's


@pytest.mark.parametrize("algo", FAMILY)
def test_rl_begins_with_what_pretraining_has_left(algo):
    """The policy is the prior, the frozen prior's encoder and the slow copies are the online ones."""
    args = tiny_args(algo)
    agent = algo.Agent(args, noisy_copy(algo.make_networks(args)))
    online = agent.critic if algo is skimo_sac else agent.model
    pairs = [(agent.task_policy, agent.skill_prior), (agent.target, online)]
    if hasattr(agent, "prior_encoder"):  # where E learns in RL, too
        pairs.append((agent.prior_encoder, online_encoder(agent)))
    for part, source in pairs:
        weights = [*zip(part.parameters(), source.parameters(), strict=True)]
        assert weights and all(torch.equal(one, other) and one is not other for one, other in weights)


@pytest.mark.parametrize("algo", FAMILY)
def test_the_prior_is_what_the_warm_up_and_validations_draw(algo):
    """tanh of the Gaussian that the prior gives for E of what is seen; these are the scores of the prior in RESULTS."""
    args = tiny_args(algo)
    networks = noisy_copy(algo.make_networks(args))
    obs = random_obs(np.random.default_rng(0), 5).astype(np.float32)
    mean, std = np_gaussian(np_net(networks["prior"], np_encode(networks["model"].encoder, obs)))
    for explore in (True, False):
        torch.manual_seed(0)
        z = algo.Agent(args, networks).choose_skills(obs, None, explore)
        torch.manual_seed(0)
        if algo is skimo_sac:
            algo.Agent(args, networks)  # its critics begin at random
        np.testing.assert_allclose(z, np.tanh(mean + std * torch.randn(5, 3).numpy()), atol=1e-4)


@pytest.mark.parametrize("loss", ["of the model or the critics", "of the policy"])
@pytest.mark.parametrize("algo", FAMILY)
def test_the_norm_tells_of_a_gradient_that_is_no_number(algo, loss, monkeypatch):
    args = tiny_args(algo)
    agent = algo.Agent(args, algo.make_networks(args))
    first = "critic_loss" if algo is skimo_sac else "model_loss"
    name = "policy_loss" if loss == "of the policy" else first
    original = getattr(algo, name)

    def broken(*inputs):
        value, *others = original(*inputs)
        return value * torch.nan, *others

    monkeypatch.setattr(algo, name, broken)
    metrics = agent.update(*floats(*rl_batch_of(algo, args)))
    assert not metrics["grad_norm"].isfinite()


@pytest.mark.parametrize("algo", FAMILY)
def test_an_update_gives_the_policy_the_states_where_skills_begin(algo, monkeypatch):
    """In the second update, when E has left its frozen copy: h is E of these states, h_pred begins with it, too."""
    args = tiny_args(algo)
    agent = algo.Agent(args, algo.make_networks(args))
    batch = floats(*rl_batch_of(algo, args))
    obs = batch[0][:, :: args.skill_horizon] if algo is skimo_single_step else batch[0]
    agent.update(*batch)
    given = {}

    def noted(name):
        loss = getattr(algo, name)

        def wrapper(*inputs):
            given[name] = inspect.signature(loss).bind(*inputs).arguments
            return loss(*inputs)

        return wrapper

    first = "critic_loss" if algo is skimo_sac else "model_loss"
    for name in (first, "policy_loss"):
        monkeypatch.setattr(algo, name, noted(name))
    with torch.no_grad():
        h = online_encoder(agent)(obs)
    alpha = agent.log_alpha.exp().item()
    agent.update(*batch)
    policy = given["policy_loss"]
    assert policy["alpha"].item() == alpha
    for name, value in zip(list(inspect.signature(algo.Agent.update).parameters)[1:], batch):
        if (algo, name) != (skimo_sac, "obs"):
            assert torch.equal(given[first][name], value), name
    if algo is skimo_sac:
        assert torch.equal(given[first]["obs"], obs[:, :1]) and torch.equal(given[first]["next_obs"], obs[:, 1:])
        assert torch.equal(policy["obs"], obs[:, :1])
    else:
        assert torch.equal(policy["obs"], obs)
        torch.testing.assert_close(policy["h"], h)
        torch.testing.assert_close(policy["h_pred"][:, 0], h[:, 0])
        assert not torch.allclose(policy["h_pred"][:, 1], h[:, 1])


# --------------------------------------------------------------------------------------------------------- without CEM
@pytest.mark.parametrize("algo", [skimo_no_cem, skimo_sac])
def test_task_policy_acts_by_samples_or_its_mode(algo):
    args = tiny_args(algo)
    agent = algo.Agent(args, double_networks(args, algo).float())
    agent.task_policy = noisy_copy(agent.task_policy)
    obs = random_obs(np.random.default_rng(0), 5).astype(np.float32)
    mean, std = np_gaussian(np_net(agent.task_policy, np_encode(online_encoder(agent), obs)))
    torch.manual_seed(4)
    sampled = agent.choose_skills(obs, 10**6, explore=True)
    torch.manual_seed(4)
    noise = torch.randn(5, 3).numpy()
    np.testing.assert_allclose(sampled.numpy(), np.tanh(mean + std * noise), atol=1e-4)
    np.testing.assert_allclose(agent.choose_skills(obs, 0, explore=False).numpy(), np.tanh(mean), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------ SAC
def sac_parts():
    """Arguments, critic, its slow copy, and what acts: encoder, task_policy, prior_encoder, skill_prior."""
    args = tiny_args(skimo_sac, gamma=0.9)
    model, _, prior = double_networks(args, skimo_sac).values()
    critic = noisy_copy(skimo_sac.Critic(28, args).double())
    policy = noisy_copy(model.encoder, 2), noisy_copy(prior, 3), model.encoder, prior
    return args, critic, noisy_copy(critic), policy


def np_critic(critic, obs, z):
    sz = np.concatenate([np_features(obs), z], -1)
    return np_net(critic.qf1, sz)[..., 0], np_net(critic.qf2, sz)[..., 0]


def np_policy(policy, obs, noise):
    """Sampled skills and the KL to the prior."""
    encoder, task_policy, prior_encoder, skill_prior = policy
    mean, std = np_gaussian(np_net(task_policy, np_encode(encoder, obs)))
    prior = np_gaussian(np_net(skill_prior, np_encode(prior_encoder, obs)))
    return np.tanh(mean + std * noise), np.clip(np_kl((mean, std), prior), -100, 100)


def test_sac_critics_learn_the_return_less_the_prior_kl():
    args, critic, target, policy = sac_parts()
    obs, z, rewards, dones = rl_batch(args, 7)
    dones[:2] = [[0], [1]]
    next_obs = obs[:, 1:]
    obs = obs[:, :1]
    alpha = torch.tensor(0.3, dtype=torch.float64)
    torch.manual_seed(5)
    batch = tensors(obs, z, rewards, dones, next_obs)
    loss, metrics = skimo_sac.critic_loss(critic, target, policy, *batch, alpha, args)
    torch.manual_seed(5)
    next_z, kl = np_policy(policy, next_obs, torch.randn(7, 1, 3, dtype=torch.float64).numpy())
    next_q = np.minimum(*np_critic(target, next_obs, next_z))
    td_target = rewards + np.where(dones, 0, 0.9 * (next_q - 0.3 * kl))
    q1, q2 = np_critic(critic, obs, z)
    errors = 2 * ((q1 - td_target) ** 2 + (q2 - td_target) ** 2)
    assert loss.item() == pytest.approx(0.1 * errors.mean(), rel=1e-5)
    for name, value in dict(value_loss=errors, td_target=td_target, q_value=q1).items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-5), name
    loss.backward()
    assert has_gradient(critic) and not any(has_gradient(part) for part in (target, *policy))


def test_sac_policy_and_encoder_follow_the_critics_and_the_prior():
    args, critic, _, policy = sac_parts()
    obs = rl_batch(args, 7)[0][:, :1]
    critic.requires_grad_(False)
    torch.manual_seed(6)
    alpha = torch.tensor(0.3, dtype=torch.float64)
    loss, metrics = skimo_sac.policy_loss(critic, policy, *tensors(obs), alpha)
    torch.manual_seed(6)
    new_z, kl = np_policy(policy, obs, torch.randn(7, 1, 3, dtype=torch.float64).numpy())
    q = np.minimum(*np_critic(critic, obs, new_z))
    assert loss.item() == pytest.approx((0.3 * kl - q).mean(), rel=1e-5)
    assert metrics["prior_kl"].item() == pytest.approx(kl.mean(), rel=1e-5)
    assert metrics["policy_q"].item() == pytest.approx(q.mean(), rel=1e-5)
    loss.backward()
    assert [has_gradient(part) for part in policy] == [True, True, False, False]


def test_sac_update_moves_critics_policy_and_encoder_only():
    args = tiny_args(skimo_sac)
    networks = skimo_sac.make_networks(args)
    model = copy.deepcopy(networks["model"])
    agent = skimo_sac.Agent(args, networks)
    start = copy.deepcopy(agent)
    for _ in range(2):
        agent.update(*floats(*rl_batch(args, 8)))
    for name in ("critic", "encoder", "task_policy"):
        assert not same_weights(getattr(agent, name), getattr(start, name)), name
    for name in ("target", "skills", "skill_prior", "prior_encoder"):
        assert same_weights(getattr(agent, name), getattr(start, name)), name
    for name in ("dynamics", "reward_model", "decoder"):
        assert same_weights(getattr(networks["model"], name), getattr(model, name)), name
    assert agent.log_alpha != start.log_alpha


# ----------------------------------------------------------------------------------------------- without joint training
def test_without_joint_training_the_loss_is_skimos():
    args = tiny_args(skimo_no_joint)
    networks = double_networks(args)
    target = noisy_copy(networks["model"], 2)
    batch = tensors(*pretraining_batch(args))
    losses = []
    for algo in (skimo, skimo_no_joint):
        torch.manual_seed(3)
        losses.append(algo.pretrain_loss(*networks.values(), target, *batch, args)[0].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("only", "reached"),
    [
        ("bc", "encoder_l skill_encoder skill_policy"),
        ("kl", "encoder_l skill_encoder"),
        ("prior", "prior"),  # not the encoder, as in SkiMo
        ("recon", "encoder decoder"),
        ("consistency", "encoder dynamics"),  # not the skills, as in SkiMo
    ],
)
def test_without_joint_training_every_term_has_its_own_networks(only, reached):
    parts = backward_of_one_term(only, skimo_no_joint, tiny_args(skimo_no_joint))
    assert {name for name, part in parts.items() if has_gradient(part)} == set(reached.split())


@pytest.fixture
def pretrained(monkeypatch, tmp_path):
    """pretrained(algo, args) trains networks on Windows, without roll-outs of the prior."""

    def train(algo, args):
        monkeypatch.setattr(algo, "rollout", lambda *inputs: NO_SCORES)
        args.data_dir = str(tmp_path)
        torch.manual_seed(0)
        networks = algo.make_networks(args)
        algo.pretrain(args, networks, Windows(args.skill_horizon, 0), NO_CURVES, threading.Event())
        return networks

    return train


# ------------------------------------------------------------------------------------------------- single-step dynamics
def np_roll_out(model, h, inputs, re_encode):
    """One env step after the other, window by window: h (B, N+1, d), inputs (B, N, H, I) -> (B, N, H, d)."""
    B, N, H = inputs.shape[:3]
    h_pred = np.zeros((B, N, H, h.shape[-1]))
    for b in range(B):
        state = h[b, 0]
        for i in range(N):
            if re_encode:
                state = h[b, i]
            for k in range(H):
                state = np_net(model.dynamics, np.concatenate([state, inputs[b, i, k]]))
                h_pred[b, i, k] = state
    return h_pred


def np_weight(N, H, rho):
    return np.array([[rho ** ((i * H + k) / H) / H for k in range(H)] for i in range(N)])


def np_action(model, h, z):
    mean, _ = np_gaussian(np_net(model.skill_policy, np.concatenate([h, z], -1)))
    return np.tanh(mean)


def test_a_skill_is_imagined_by_single_steps():
    args = tiny_args(skimo_single_step)
    model = double_networks(args, skimo_single_step)["model"]
    rng = np.random.default_rng(0)
    h = rng.normal(size=(4, 8))
    z = rng.uniform(-1, 1, (4, 3))
    state = h
    for _ in range(args.skill_horizon):
        state = np_net(model.dynamics, np.concatenate([state, np_action(model, state, z)], -1))
    np.testing.assert_allclose(model.next(*tensors(h, z)).detach().numpy(), state, atol=1e-4)


def test_skill_policy_and_world_model_share_an_encoder():
    args = tiny_args(skimo_single_step)
    networks = copy.deepcopy(double_networks(args, skimo_single_step))  # to a device, say, or into a file
    model = networks["model"]
    skills = networks["skills"]
    assert model.encoder is skills.encoder
    assert model.skill_policy is skills.skill_policy
    rng = np.random.default_rng(0)
    obs = random_obs(rng, 4)
    z = rng.uniform(-1, 1, (4, 3))
    action = np_action(model, np_encode(model.encoder, obs), z)
    np.testing.assert_allclose(skills.act(*tensors(obs, z)).detach().numpy(), action, atol=1e-4)


def test_single_step_pretraining_agrees_with_numpy():
    args = tiny_args(skimo_single_step, rho=0.6, consistency_coef=2.3)
    N = args.num_skills
    H = args.skill_horizon
    networks = double_networks(args, skimo_single_step)
    model = networks["model"]
    skills = networks["skills"]
    target = noisy_copy(model, 2)
    obs, actions = pretraining_batch(args)
    torch.manual_seed(3)
    loss, metrics = skimo_single_step.pretrain_loss(*networks.values(), target, *tensors(obs, actions), args)
    torch.manual_seed(3)
    torch.rand(len(obs), N)  # the chunks
    noise = torch.randn(len(obs), N, 3, dtype=torch.float64).numpy()
    h = np_encode(model.encoder, obs)
    chunks = actions.reshape(len(obs), N, H, 2)
    x = np.concatenate([chunks.reshape(len(obs), N, -1), h[:, :-1:H]], -1)
    q = np_gaussian(np_net(skills.skill_encoder, x))
    z = np.tanh(q[0] + q[1] * noise)
    h_pred = np_roll_out(model, h[:, ::H], chunks, re_encode=False)
    h_target = np_encode(target.encoder, obs[:, 1:]).reshape(h_pred.shape)
    error = np.square(h_pred - h_target).mean(-1)
    consistency = (np_weight(N, H, 0.6) * error).sum((1, 2)).mean()
    assert metrics["consistency_loss"].item() == pytest.approx(consistency, rel=1e-5)
    bc = np.square(np_action(model, h[:, :-1], np.repeat(z, H, 1)) - actions).mean()
    assert metrics["bc_loss"].item() == pytest.approx(bc, rel=1e-5)
    prior_kl = np_kl(q, np_gaussian(np_net(networks["prior"], h[:, :-1:H]))).mean()
    assert metrics["prior_loss"].item() == pytest.approx(prior_kl, rel=1e-5)
    others = 2 * bc + args.kl_coef * metrics["kl_loss"].item() + prior_kl + metrics["recon_loss"].item() / N
    assert loss.item() == pytest.approx(others + 2.3 * consistency / N, rel=1e-5)


def test_single_step_consistency_reaches_dynamics_and_the_encoder_alone():
    parts = backward_of_one_term("consistency", skimo_single_step, tiny_args(skimo_single_step))
    assert {name for name, part in parts.items() if has_gradient(part)} == {"dynamics", "encoder", "encoder_l"}


def test_single_step_model_loss_agrees_with_numpy():
    args = tiny_args(skimo_single_step, gamma=0.9, rho=0.6, consistency_coef=1.9)
    N = args.num_skills
    H = args.skill_horizon
    networks = double_networks(args, skimo_single_step)
    model = networks["model"]
    policy = networks["prior"]
    target = noisy_copy(model, 2)
    networks["skills"].requires_grad_(False)
    batch = obs, actions, z, rewards, dones, steps = single_step_batch(args)
    torch.manual_seed(5)
    loss, metrics, h_out, h_pred_out = skimo_single_step.model_loss(model, target, policy, *tensors(*batch), args)
    torch.manual_seed(5)
    noise = torch.randn(len(obs), N, 3, dtype=torch.float64).numpy()

    h_steps = np_encode(model.encoder, obs)
    h = h_steps[:, ::H]
    h_pred = np_roll_out(model, h, actions, re_encode=True)
    error = np.square(h_pred - h_steps[:, 1:].reshape(h_pred.shape)).mean(-1)
    consistency = np.zeros(len(obs))
    for b, i, k in np.ndindex(*error.shape):
        consistency[b] += np_weight(N, H, 0.6)[i, k] * error[b, i, k] * (k < steps[b, i])
    boundaries = np.concatenate([h[:, :1], h_pred[:, :, -1]], 1)
    np.testing.assert_allclose(h_out.numpy(), h, atol=1e-4)
    np.testing.assert_allclose(h_pred_out.numpy(), boundaries, atol=1e-4)

    mean, std = np_gaussian(np_net(policy, h[:, 1:]))
    next_hz = np.concatenate([h[:, 1:], np.tanh(mean + std * noise)], -1)
    next_q = np.minimum(np_net(target.qf1, next_hz), np_net(target.qf2, next_hz))[..., 0]
    td_target = rewards + 0.9 * (1 - dones) * next_q
    reward_error = 0
    value_error = 0
    for latent, weight in ((boundaries[:, :-1], 0.6 ** np.arange(N)), (h[:, :-1], np.ones(N))):
        hz = np.concatenate([latent, z], -1)
        reward_error = reward_error + (weight * (np_net(model.reward_model, hz)[..., 0] - rewards) ** 2).sum(1)
        for q in (model.qf1, model.qf2):
            value_error = value_error + (weight * (np_net(q, hz)[..., 0] - td_target) ** 2).sum(1)
    expected = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error, td_target=td_target)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-5), name
    total = (1.9 * consistency + 0.25 * reward_error + 0.1 * value_error).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert all(has_gradient(part) for part in (model.dynamics, model.reward_model, model.qf1, model.qf2))
    assert not any(has_gradient(part) for part in (model.encoder, model.skill_policy, policy, target))


def test_single_step_update_leaves_the_skills_and_their_encoder_alone():
    args = tiny_args(skimo_single_step)
    agent = skimo_single_step.Agent(args, skimo_single_step.make_networks(args))
    start = copy.deepcopy(agent)
    for _ in range(2):
        agent.update(*floats(*single_step_batch(args)))
    for name in ("dynamics", "reward_model", "qf1", "qf2"):
        assert not same_weights(getattr(agent.model, name), getattr(start.model, name)), name
    assert not same_weights(agent.task_policy, start.task_policy)
    assert same_weights(agent.skills, start.skills)
    assert same_weights(agent.model.encoder, agent.skills.encoder)
    assert same_weights(agent.model.skill_policy, agent.skills.skill_policy)
    assert same_weights(agent.skill_prior, start.skill_prior)


class Counter:
    """Environments whose observation counts env steps; e ends after lengths[e] of them."""

    def __init__(self, lengths):
        self.lengths = np.array(lengths)
        self.steps = np.zeros(len(lengths), dtype=np.int64)

    def obs(self):
        numbers = 100 * np.arange(len(self.steps)) + self.steps
        return np.repeat(numbers[:, None], 4, 1).astype(np.float32)

    def step(self, action):
        np.testing.assert_array_equal(action, self.obs()[:, :2] + 0.5)
        rewards = (self.steps < self.lengths).astype(np.float64)
        self.steps = np.minimum(self.steps + 1, self.lengths)
        ended = self.steps == self.lengths
        return self.obs(), rewards, ended, np.zeros_like(ended), {}


def test_single_step_replay_holds_every_env_step():
    args = tiny_args(skimo_single_step, num_skills=2, skill_horizon=3)
    rb = skimo_single_step.ReplayBuffer(4, 2, args)
    envs = Counter([8, 7])  # env steps: three skills each, the last ones are cut after two and one
    skills = SimpleNamespace(act=lambda obs, z: obs[:, :2] + 0.5)
    obs = envs.obs()
    for skill in range(3):
        z = torch.tensor([[10.0 + skill] * 3, [20.0 + skill] * 3])
        next_obs, rewards, ended, window = skimo_single_step.execute_skill(envs, skills, obs, z, args)
        rb.add(**window, z=z, rewards=rewards, dones=ended, next_obs=next_obs)
        obs = next_obs
    torch.manual_seed(0)
    obs, actions, z, rewards, dones, steps = rb.sample(500)
    assert obs.shape == (500, 7, 4)
    assert actions.shape == (500, 2, 3, 2)
    episode = (obs[:, 0, 0] // 100).long()
    first = obs[:, 0, 0] % 100
    assert set(episode.tolist()) == {0, 1}
    assert set(first.tolist()) == {0, 3}
    time = first[:, None] + torch.arange(7)
    length = torch.tensor(envs.lengths)[episode]
    torch.testing.assert_close(obs[..., 0], 100 * episode[:, None] + time.minimum(length[:, None]))
    torch.testing.assert_close(actions.flatten(1, 2), obs[:, :-1, :2] + 0.5)
    skill = first[:, None] / 3 + torch.arange(2)
    torch.testing.assert_close(z, (10 * (episode[:, None] + 1) + skill)[..., None].expand(-1, -1, 3))
    torch.testing.assert_close(dones, (skill == 2).float())
    torch.testing.assert_close(steps, (length[:, None] - 3 * skill).clamp(max=3))
    torch.testing.assert_close(rewards, steps)  # 1 per env step


# -------------------------------------------------------------------------------------------------------- it does learn
@pytest.mark.parametrize("algo", [skimo, skimo_no_joint, skimo_single_step])
def test_pretraining_learns_skills_and_their_dynamics(algo, pretrained):
    args = tiny_args(
        algo, hidden_dim=32, latent_dim=16, num_skills=2, pretrain_skills=2, bc_chunks=2, pretrain_updates=400,
        pretrain_batch_size=64, pretrain_lr=3e-3, pretrain_lr_decay=False, position_features=False,
    )  # fmt: skip
    imitation, prediction = errors_on_new_windows(pretrained(algo, args), args)
    assert imitation < 0.1  # of always predicting the mean action
    assert prediction < 0.3  # of predicting that nothing moves


@pytest.mark.parametrize("algo", [skimo, skimo_no_cem, skimo_sac, skimo_single_step])
def test_task_policy_finds_the_skills_that_pay(algo):
    args = tiny_args(
        algo, skill_dim=2, num_skills=2, num_envs=10, batch_size=64, hidden_dim=32, alpha=0.01, autotune=False,
        gamma=0.5, learning_rate=4e-3, position_features=False, num_samples=64, num_elites=16, cem_iters=4,
        temperature=5.0,
    )  # fmt: skip
    single_step = algo is skimo_single_step
    torch.manual_seed(0)
    agent = algo.Agent(args, algo.make_networks(args))
    rb = algo.ReplayBuffer(4, 2, args) if single_step else algo.ReplayBuffer(4, args)
    fill(rb, args, single_step)
    obs = np.random.default_rng(9).uniform(5, 35, (200, 4)).astype(np.float32)
    assert skill_reward(agent.choose_skills(obs, None, explore=True).numpy()).mean() < 0.2
    for updates in range(300):
        agent.update(*rb.sample(args.batch_size))
        if updates % 2:
            online = agent.critic if algo is skimo_sac else agent.model
            agent.target.follow(online, args.tau)
    assert skill_reward(agent.choose_skills(obs, None, explore=True).numpy()).mean() > 0.8
    assert skill_reward(agent.choose_skills(obs, 10**6, explore=False).numpy()).mean() > 0.85


# --------------------------------------------------------------------------------------------------- pre-trained models
def test_files_with_the_same_pretraining_share_its_model(pretrained, monkeypatch, tmp_path):
    pretrained(skimo, tiny_args(skimo))
    monkeypatch.setattr(skimo_sac, "pretrain_loss", None)
    monkeypatch.setattr(skimo_no_cem, "pretrain_loss", None)
    for algo in (skimo_no_cem, skimo_sac, skimo_no_joint, skimo_single_step):
        pretrained(algo, tiny_args(algo))
    assert len(list((tmp_path / "pretrained").iterdir())) == 3
