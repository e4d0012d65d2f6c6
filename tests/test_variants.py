"""SkiMo's variants where they differ from skimo.py: losses against NumPy, gradients, all four tasks, resume.

What they share with skimo.py is tested there; tests/test_copies.py makes sure that it is the same.
"""

import copy
import dataclasses
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from test_skimo import (
    DEVICES,
    assert_same,
    csv_rows,
    final_state,
    has_gradient,
    noisy_copy,
    np_encode,
    np_features,
    np_kl,
    np_net,
    np_tanh_normal,
    only_run,
    random_obs,
    refused,
    rl_batch,
    same_weights,
)

import data_tools
from algos import skimo, skimo_no_cem, skimo_no_joint, skimo_sac, skimo_single_step
from data_tools.runs import get_state, set_state

VARIANTS = [skimo_no_cem, skimo_sac, skimo_no_joint, skimo_single_step]
TASKS = {
    "maze": (4, 2),
    "kitchen": (60, 9),
    "kitchen-misaligned": (60, 9),
    "calvin": (21, 7),
}  # sizes in the data files


def tiny_args(algo, **changes):
    """Arguments with networks and batches so small that an update takes milliseconds; those that the variant has."""
    small = dict(
        device="cpu", compile=False, num_threads=1, hidden_dim=16, latent_dim=8, skill_dim=3, skill_horizon=5,
        num_skills=3, pretrain_skills=3, bc_chunks=3, skill_encoder="mlp", num_envs=2, batch_size=8,
        num_samples=16, num_policy_trajs=4, num_elites=6, cem_iters=2, pretrain_batch_size=8, pretrain_updates=6,
        alpha=1.0, autotune=True,
    )  # fmt: skip
    small |= dict(num_skills=1) if algo is skimo_sac else {}
    names = {field.name for field in dataclasses.fields(algo.Args)}
    return algo.Args(**{name: value for name, value in (small | changes).items() if name in names})


def double_networks(algo, args, seed=0):
    """Networks of the maze in float64 with all weights random, last layers and biases included."""
    torch.manual_seed(seed)
    networks = algo.make_networks(args, 4, 2, "cpu").double()
    for value in networks.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return networks


def pretraining_batch(args, B=6):
    """Windows of the maze: observations, actions."""
    rng, steps = np.random.default_rng(0), args.pretrain_skills * args.skill_horizon
    return random_obs(rng, B, steps + 1), rng.uniform(-1, 1, (B, steps, 2))


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


# --------------------------------------------------------------------------------------------------------- without CEM


@pytest.mark.parametrize("algo", [skimo_no_cem, skimo_sac])
def test_task_policy_acts_by_samples_or_its_mode(algo):
    networks = double_networks(algo, tiny_args(algo)).float()
    obs = random_obs(np.random.default_rng(0), 5).astype(np.float32)
    mean, std = np_tanh_normal(np_net(networks["prior"], np_encode(networks["model"].encoder, obs)))
    torch.manual_seed(4)
    sampled = algo.act(networks["model"].encoder, networks["prior"], obs, explore=True)
    torch.manual_seed(4)
    noise = torch.randn(5, 3).numpy()
    np.testing.assert_allclose(sampled.numpy(), np.tanh(mean + std * noise), atol=1e-4)
    mode = algo.act(networks["model"].encoder, networks["prior"], obs, explore=False)
    np.testing.assert_allclose(mode.numpy(), np.tanh(mean), atol=1e-4)


# ------------------------------------------------------------------------------------------------------------------ SAC


def sac_parts(seed=0):
    args = tiny_args(skimo_sac, gamma=0.9, value_coef=0.15)
    networks = double_networks(skimo_sac, args, seed)
    critic = noisy_copy(skimo_sac.Critic(28, args).double())
    encoder, prior = networks["model"].encoder, networks["prior"]
    parts = dict(critic=critic, target=noisy_copy(critic), encoder=noisy_copy(encoder, 2))
    parts |= dict(task_policy=noisy_copy(prior, 3), prior_encoder=encoder, skill_prior=prior)
    return args, parts


def np_critic(critic, obs, z):
    sz = np.concatenate([np_features(obs), z], -1)
    return np_net(critic.qf1, sz)[..., 0], np_net(critic.qf2, sz)[..., 0]


def np_policy(parts, obs, noise):
    """Sampled skills and the KL to the prior."""
    policy = np_tanh_normal(np_net(parts["task_policy"], np_encode(parts["encoder"], obs)))
    prior = np_tanh_normal(np_net(parts["skill_prior"], np_encode(parts["prior_encoder"], obs)))
    return np.tanh(policy[0] + policy[1] * noise), np.clip(np_kl(policy, prior), -100, 100)


def test_sac_losses_agree_with_numpy():
    args, parts = sac_parts()
    obs, z, rewards, dones = rl_batch(args, 7)
    obs, next_obs = obs[:, :1], obs[:, 1:]
    dones[:2] = [[0], [1]]
    alpha = torch.tensor(0.3, dtype=torch.float64)
    batch = tensors(obs, z, rewards, dones, next_obs)
    torch.manual_seed(5)
    loss, metrics = skimo_sac.critic_loss(*parts.values(), *batch, alpha, args)
    torch.manual_seed(5)
    next_z, kl = np_policy(parts, next_obs, torch.randn(7, 1, 3, dtype=torch.float64).numpy())
    td_target = rewards + np.where(
        dones, 0, 0.9 * (np.minimum(*np_critic(parts["target"], next_obs, next_z)) - 0.3 * kl)
    )
    q1, q2 = np_critic(parts["critic"], obs, z)
    errors = 2 * ((q1 - td_target) ** 2 + (q2 - td_target) ** 2)
    assert loss.item() == pytest.approx(0.15 * errors.mean(), rel=1e-5)
    for name, value in dict(value_loss=errors, td_target=td_target, q_value=q1).items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-5), name
    loss.backward()
    assert [name for name, part in parts.items() if has_gradient(part)] == ["critic"]

    parts.pop("target")
    parts["critic"].requires_grad_(False).zero_grad()
    torch.manual_seed(6)
    loss, metrics = skimo_sac.policy_loss(*parts.values(), batch[0], alpha, args)
    torch.manual_seed(6)
    new_z, kl = np_policy(parts, obs, torch.randn(7, 1, 3, dtype=torch.float64).numpy())
    q = np.minimum(*np_critic(parts["critic"], obs, new_z))
    assert loss.item() == pytest.approx((0.3 * kl - q).mean(), rel=1e-5)
    assert metrics["prior_kl"].item() == pytest.approx(kl.mean(), rel=1e-5)
    assert metrics["policy_q"].item() == pytest.approx(q.mean(), rel=1e-5)
    loss.backward()
    assert [name for name, part in parts.items() if has_gradient(part)] == ["encoder", "task_policy"]


def test_sac_is_skimo_without_a_model_at_one_skill_per_window():
    """With Q on latent states, alpha 0 in the target and equal networks, the TD loss would be that of skimo.py."""
    args, parts = sac_parts()
    batch = tensors(*rl_batch(args, 7))
    model = double_networks(skimo, tiny_args(skimo, num_skills=1, gamma=0.9))["model"]
    target = noisy_copy(model)
    args.value_coef = 1.0
    skimo_args = tiny_args(skimo, num_skills=1, gamma=0.9, value_coef=1.0, reward_coef=0.0, consistency_coef=0.0)
    torch.manual_seed(0)
    expected = skimo.model_loss(model, target, parts["task_policy"], *batch, skimo_args)[0]

    class Latent:  # a critic and an encoder that look at E(s)
        def __init__(self, critics):
            self.critics = critics

        def __call__(self, h, z):
            return self.critics.q(h, z)

    class Encoder:
        features = staticmethod(model.encoder)

        def __call__(self, obs):
            return model.encoder(obs)

    obs, z, rewards, dones = batch
    torch.manual_seed(0)
    policy = Encoder(), parts["task_policy"], parts["prior_encoder"], parts["skill_prior"]
    batch = obs[:, :1], z, rewards, dones, obs[:, 1:]
    loss, _ = skimo_sac.critic_loss(Latent(model), Latent(target), *policy, *batch, torch.tensor(0.0), args)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)


def test_sac_update_moves_critics_policy_and_encoder_only():
    args = tiny_args(skimo_sac, tau=0.1)
    networks = skimo_sac.make_networks(args, 4, 2, "cpu")
    model = copy.deepcopy(networks["model"])
    learner = skimo_sac.Learner(args, networks)
    start = copy.deepcopy(learner)
    batch = [torch.from_numpy(x).float() for x in rl_batch(args, 8)]
    for _ in range(2):
        metrics = learner.update(*batch)
    for name in ("critic", "encoder", "task_policy", "target"):
        assert not same_weights(getattr(learner, name), getattr(start, name)), name
    for name in ("skills", "skill_prior", "prior_encoder"):
        assert same_weights(getattr(learner, name), getattr(start, name)), name
    for name in ("dynamics", "reward_model", "decoder"):
        assert same_weights(getattr(networks["model"], name), getattr(model, name)), name
    for now, old, online in zip(learner.target.parameters(), start.target.parameters(), learner.critic.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), atol=1e-7, rtol=1e-5)
    assert {"value_loss", "policy_loss", "prior_kl", "alpha", "td_target", "q_value"} <= set(metrics)


# ----------------------------------------------------------------------------------------------- without joint training


def test_without_joint_training_the_loss_is_skimos():
    args = tiny_args(skimo_no_joint)
    networks = double_networks(skimo_no_joint, args)
    target, batch = noisy_copy(networks["model"]), tensors(*pretraining_batch(args))
    losses = []
    for algo in (skimo, skimo_no_joint):
        torch.manual_seed(3)
        losses.append(algo.pretrain_loss(*networks.values(), target, *batch, args)[0].item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("only", "reached"),
    [
        ("bc_coef", "encoder_l skill_encoder skill_policy"),
        ("kl_coef", "encoder_l skill_encoder"),
        ("prior_coef", "prior"),  # not the encoder, as in SkiMo
        ("recon_coef", "encoder decoder"),
        ("consistency_coef", "encoder dynamics"),  # not the skills, as in SkiMo
    ],
)
def test_without_joint_training_every_term_has_its_own_networks(only, reached):
    zero = dict(bc_coef=0.0, kl_coef=0.0, prior_coef=0.0, recon_coef=0.0, consistency_coef=0.0)
    args = tiny_args(skimo_no_joint, **(zero | {only: 1.0}))
    networks = double_networks(skimo_no_joint, args)
    model, skills = networks["model"], networks["skills"]
    batch = tensors(*pretraining_batch(args))
    skimo_no_joint.pretrain_loss(*networks.values(), noisy_copy(model), *batch, args)[0].backward()
    parts = dict(encoder=model.encoder, dynamics=model.dynamics, decoder=model.decoder, prior=networks["prior"])
    parts |= dict(encoder_l=skills.encoder, skill_encoder=skills.skill_encoder, skill_policy=skills.skill_policy)
    assert {name for name, part in parts.items() if has_gradient(part)} == set(reached.split())


def test_without_joint_training_three_optimizers_clip_apart():
    args = tiny_args(skimo_no_joint, pretrain_updates=1000, pretrain_lr=0.02, max_grad_norm=1e-3)
    trainer = skimo_no_joint.Pretrainer(args, skimo_no_joint.make_networks(args, 4, 2, "cpu"))
    batch = [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    start = copy.deepcopy(trainer.networks)
    trainer.update(*batch)
    for part, optimizer, before in zip(trainer.networks.values(), trainer.optimizers, start.values()):
        (group,) = optimizer.param_groups
        assert {id(value) for value in group["params"]} == {id(value) for value in part.parameters()}
        assert group["lr"] == pytest.approx(0.02 / 500) and group["eps"] == 1e-7
        norms = [value.grad.norm() for value in part.parameters() if value.grad is not None]
        assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-2)
        assert not same_weights(part, before)
    state, other = get_state(trainer), skimo_no_joint.Pretrainer(args, start)
    set_state(other, copy.deepcopy(state))
    assert_same(get_state(other), state)


# ------------------------------------------------------------------------------------------------- single-step dynamics


def np_roll_out(model, h, inputs, re_encode):
    """One env step after the other, window by window: h (B, N+1, d), inputs (B, N, H, I) -> (B, N, H, d)."""
    B, N, H = inputs.shape[:3]
    h_pred = np.zeros((B, N, H, h.shape[-1]))
    for b in range(B):
        state = h[b, 0]
        for i in range(N):
            state = h[b, i] if re_encode else state
            for k in range(H):
                state = np_net(model.dynamics, np.concatenate([state, inputs[b, i, k]]))
                h_pred[b, i, k] = state
    return h_pred


def np_weight(N, H, rho):
    return np.array([[rho ** ((i * H + k) / H) / H for k in range(H)] for i in range(N)])


def np_action(model, h, z):
    return np.tanh(np_tanh_normal(np_net(model.skill_policy, np.concatenate([h, z], -1)))[0])


SINGLE_STEP = pytest.mark.parametrize("dynamics_input", ["action", "skill"])


@SINGLE_STEP
def test_a_skill_is_imagined_by_single_steps(dynamics_input):
    args = tiny_args(skimo_single_step, dynamics_input=dynamics_input)
    networks = double_networks(skimo_single_step, args)
    model, rng = networks["model"], np.random.default_rng(0)
    h, z = rng.normal(size=(4, 8)), rng.uniform(-1, 1, (4, 3))
    state = h
    for _ in range(args.skill_horizon):
        x = np_action(model, state, z) if dynamics_input == "action" else z
        state = np_net(model.dynamics, np.concatenate([state, x], -1))
    np.testing.assert_allclose(model.next(*tensors(h, z)).detach().numpy(), state, atol=1e-4)
    obs = random_obs(rng, 4)
    action = np_action(model, np_encode(model.encoder, obs), z)
    np.testing.assert_allclose(networks["skills"].act(*tensors(obs, z)).detach().numpy(), action, atol=1e-4)
    assert model.encoder is networks["skills"].encoder and model.skill_policy is networks["skills"].skill_policy
    moved = copy.deepcopy(networks)  # to a device, say, or into a file
    assert moved["model"].encoder is moved["skills"].encoder is not model.encoder


@SINGLE_STEP
def test_single_step_pretraining_agrees_with_numpy(dynamics_input):
    args = tiny_args(skimo_single_step, dynamics_input=dynamics_input, rho=0.6, consistency_coef=2.3)
    N, H = args.num_skills, args.skill_horizon
    networks = double_networks(skimo_single_step, args)
    model, skills, prior = networks["model"], networks["skills"], networks["prior"]
    target = noisy_copy(model)
    obs, actions = pretraining_batch(args)
    torch.manual_seed(3)
    loss, metrics = skimo_single_step.pretrain_loss(model, skills, prior, target, *tensors(obs, actions), args)
    torch.manual_seed(3)
    torch.rand(len(obs), N)  # the chunks
    noise = torch.randn(len(obs), N, 3, dtype=torch.float64).numpy()
    h, chunks = np_encode(model.encoder, obs), actions.reshape(len(obs), N, H, 2)
    q = np_tanh_normal(np_net(skills.skill_encoder, np.concatenate([chunks.reshape(len(obs), N, -1), h[:, :-1:H]], -1)))
    z = np.tanh(q[0] + q[1] * noise)
    inputs = chunks if dynamics_input == "action" else np.repeat(z[:, :, None], H, 2)
    h_pred = np_roll_out(model, h[:, ::H], inputs, re_encode=False)
    h_target = np_encode(target.encoder, obs[:, 1:]).reshape(h_pred.shape)
    consistency = (np_weight(N, H, 0.6) * np.square(h_pred - h_target).mean(-1)).sum((1, 2)).mean()
    assert metrics["consistency_loss"].item() == pytest.approx(consistency, rel=1e-5)
    bc = np.square(np_action(model, h[:, :-1], np.repeat(z, H, 1)) - actions).mean()
    assert metrics["bc_loss"].item() == pytest.approx(bc, rel=1e-5)
    prior_kl = np_kl(q, np_tanh_normal(np_net(prior, h[:, :-1:H]))).mean()
    assert metrics["prior_loss"].item() == pytest.approx(prior_kl, rel=1e-5)
    others = 2 * bc + 1e-4 * metrics["kl_loss"].item() + prior_kl + metrics["recon_loss"].item() / N
    assert loss.item() == pytest.approx(others + 2.3 * consistency / N, rel=1e-5)


@pytest.mark.parametrize(("dynamics_input", "joint"), [("action", False), ("skill", True)])
def test_single_step_consistency_reaches_the_skills_only_through_z(dynamics_input, joint):
    zero = dict(bc_coef=0.0, kl_coef=0.0, prior_coef=0.0, recon_coef=0.0)
    args = tiny_args(skimo_single_step, dynamics_input=dynamics_input, **zero)
    networks = double_networks(skimo_single_step, args)
    model = networks["model"]
    batch = tensors(*pretraining_batch(args))
    skimo_single_step.pretrain_loss(*networks.values(), noisy_copy(model), *batch, args)[0].backward()
    assert has_gradient(model.dynamics) and has_gradient(model.encoder)
    assert has_gradient(networks["skills"].skill_encoder) == joint
    assert not any(has_gradient(part) for part in (model.skill_policy, networks["prior"], model.decoder))


def single_step_batch(args, B=5):
    rng = np.random.default_rng(1)
    N, H = args.num_skills, args.skill_horizon
    obs, actions = random_obs(rng, B, N * H + 1), rng.uniform(-1, 1, (B, N, H, 2))
    _, z, rewards, dones = rl_batch(args, B)
    steps = np.full((B, N), H, dtype=np.float64)
    steps[:2, -1] = [1, 3]  # cut short
    return obs, actions, z, rewards, dones, steps


@SINGLE_STEP
def test_single_step_model_loss_agrees_with_numpy(dynamics_input):
    coefs = dict(gamma=0.9, rho=0.6, consistency_coef=1.9, reward_coef=0.35, value_coef=0.15)
    args = tiny_args(skimo_single_step, dynamics_input=dynamics_input, **coefs)
    N, H = args.num_skills, args.skill_horizon
    networks = double_networks(skimo_single_step, args)
    model, policy = networks["model"], networks["prior"]
    target = noisy_copy(model)
    networks["skills"].requires_grad_(False)
    batch = obs, actions, z, rewards, dones, steps = single_step_batch(args)
    torch.manual_seed(5)
    loss, metrics, h_out, h_pred_out = skimo_single_step.model_loss(model, target, policy, *tensors(*batch), args)
    torch.manual_seed(5)
    noise = torch.randn(len(obs), N, 3, dtype=torch.float64).numpy()

    h_steps = np_encode(model.encoder, obs)
    h = h_steps[:, ::H]
    inputs = actions if dynamics_input == "action" else np.repeat(z[:, :, None], H, 2)
    h_pred = np_roll_out(model, h, inputs, re_encode=True)
    error = np.square(h_pred - h_steps[:, 1:].reshape(h_pred.shape)).mean(-1)
    consistency = np.zeros(len(obs))
    for b, i, k in np.ndindex(*error.shape):
        consistency[b] += np_weight(N, H, 0.6)[i, k] * error[b, i, k] * (k < steps[b, i])
    boundaries = np.concatenate([h[:, :1], h_pred[:, :, -1]], 1)
    np.testing.assert_allclose(h_out.numpy(), h, atol=1e-4)
    np.testing.assert_allclose(h_pred_out.numpy(), boundaries, atol=1e-4)

    mean, std = np_tanh_normal(np_net(policy, h[:, 1:]))
    next_hz = np.concatenate([h[:, 1:], np.tanh(mean + std * noise)], -1)
    next_q = np.minimum(np_net(target.qf1, next_hz), np_net(target.qf2, next_hz))[..., 0]
    td_target = rewards + 0.9 * (1 - dones) * next_q
    reward_error = value_error = 0
    for latent, weight in ((boundaries[:, :-1], 0.6 ** np.arange(N)), (h[:, :-1], np.ones(N))):
        hz = np.concatenate([latent, z], -1)
        reward_error = reward_error + (weight * (np_net(model.reward_model, hz)[..., 0] - rewards) ** 2).sum(1)
        for q in (model.qf1, model.qf2):
            value_error = value_error + (weight * (np_net(q, hz)[..., 0] - td_target) ** 2).sum(1)
    expected = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error, td_target=td_target)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-5), name
    total = (1.9 * consistency + 0.35 * reward_error + 0.15 * value_error).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert all(has_gradient(part) for part in (model.dynamics, model.reward_model, model.qf1, model.qf2))
    assert not any(has_gradient(part) for part in (model.encoder, model.skill_policy, policy, target))


def test_single_step_update_leaves_the_skills_and_their_encoder_alone():
    args = tiny_args(skimo_single_step, target_update_interval=1)
    learner = skimo_single_step.Learner(args, skimo_single_step.make_networks(args, 4, 2, "cpu"))
    start = copy.deepcopy(learner)
    batch = [torch.from_numpy(x).float() for x in single_step_batch(args)]
    for _ in range(2):
        learner.update(*batch)
    for name in ("dynamics", "reward_model", "qf1", "qf2"):
        assert not same_weights(getattr(learner.model, name), getattr(start.model, name)), name
        assert name == "dynamics" or not same_weights(getattr(learner.target, name), getattr(start.target, name)), name
    assert not same_weights(learner.task_policy, start.task_policy)
    assert same_weights(learner.skills, start.skills) and same_weights(learner.skill_prior, start.skill_prior)
    assert learner.model.encoder is learner.skills.encoder and learner.model.skill_policy is learner.skills.skill_policy
    other = skimo_single_step.Learner(args, skimo_single_step.make_networks(args, 4, 2, "cpu"))
    set_state(other, copy.deepcopy(get_state(learner)))
    assert_same(get_state(other), get_state(learner))


def test_single_step_replay_holds_every_env_step():
    args = tiny_args(skimo_single_step, num_skills=2, skill_horizon=3, num_envs=2)
    rb = skimo_single_step.ReplayBuffer(4, 2, args, torch.device("cpu"))
    lengths = [8, 9]  # env steps: three skills each, the first episode's last one is cut after two

    def observation(t):
        return np.array([[100 * e + min(t, lengths[e])] * 4 for e in range(2)], dtype=np.float32)

    for skill in range(3):
        trace = [(observation(t), observation(t)[:, :2] + 0.5, None) for t in range(3 * skill, 3 * skill + 3)]
        steps = np.minimum(3, np.array(lengths) - 3 * skill)
        numbers = np.array([10.0 + skill, 20.0 + skill], dtype=np.float32)
        z = torch.from_numpy(np.repeat(numbers[:, None], 3, 1))
        rb.add(trace, z, numbers, np.array([skill == 2] * 2), steps, observation(3 * skill + 3))
    torch.manual_seed(0)
    obs, actions, z, rewards, dones, steps = rb.sample(500)
    assert obs.shape == (500, 7, 4) and actions.shape == (500, 2, 3, 2) and z.shape == (500, 2, 3)
    assert rewards.shape == dones.shape == steps.shape == (500, 2)
    episode, first = obs[:, 0, 0] // 100, obs[:, 0, 0] % 100
    assert set(episode.tolist()) == {0, 1} and set(first.tolist()) == {0, 3}
    time = (first[:, None] + torch.arange(7)).minimum(torch.tensor(lengths)[episode.long()][:, None])
    torch.testing.assert_close(obs[..., 0], 100 * episode[:, None] + time)
    torch.testing.assert_close(actions.flatten(1, 2), obs[:, :-1, :2] + 0.5)
    expected = 10 * (episode[:, None] + 1) + first[:, None] / 3 + torch.arange(2)
    assert torch.equal(rewards, expected) and torch.equal(z, expected[..., None].expand(-1, -1, 3))
    assert torch.equal(dones, torch.stack([torch.zeros(500), (first == 3).float()], 1))
    assert torch.equal(steps, torch.where((dones == 1) & (episode == 0)[:, None], 2.0, 3.0))

    early = skimo_single_step.ReplayBuffer(4, 2, args, torch.device("cpu"))  # all end early: the trace is shorter
    for t, ended in ((0, False), (3, True)):
        trace = [(observation(t + k), observation(t + k)[:, :2], None) for k in range(3 - 2 * ended)]
        numbers = np.zeros(2, dtype=np.float32)
        arrays = numbers, np.array([ended] * 2), np.full(2, len(trace)), observation(t + len(trace))
        early.add(trace, torch.zeros(2, 3), *arrays)
    obs, *_, steps = early.sample(20)
    assert torch.equal(obs[:, :, 0] % 100, torch.tensor([0.0, 1, 2, 3, 4, 4, 4]).expand(20, -1))
    assert torch.equal(steps, torch.tensor([3.0, 1.0]).expand(20, -1))


# ------------------------------------------------------------------------------------------------ all tasks, end to end

QUICK = (
    "--device cpu --no-compile --num-threads 1 --hidden-dim 8 --latent-dim 4 --skill-dim 3 --pretrain-skills 2 "
    "--bc-chunks 1 --skill-horizon 5 --num-envs 2 --batch-size 4 --eval-episodes 1 --eval-interval 0 "
    "--pretrain-batch-size 4 --pretrain-updates 4 --pretrain-eval-episodes 1 --dataset scripted --total-timesteps 160 "
    "--warmup-steps 80 --updates-per-step 0.05"
)
PLANNER = " --num-samples 8 --num-policy-trajs 3 --num-elites 4 --cem-iters 1 --horizon-steps 100 --std-steps 100"


@pytest.fixture(scope="session")
def random_data(tmp_path_factory):
    """A folder with a small file of random numbers in place of each task's scripted data."""
    folder, rng = tmp_path_factory.mktemp("random_data"), np.random.default_rng(0)
    for task in ("maze", "kitchen", "calvin"):
        obs_dim, action_dim = TASKS[task]
        obs = random_obs(rng, 200) if task == "maze" else rng.normal(size=(200, obs_dim))
        ends = np.arange(200) % 40 == 39
        dataset = data_tools.OfflineDataset(obs, rng.uniform(-1, 1, (200, action_dim)), ends, np.zeros_like(ends))
        dataset.save(folder / f"{task}_noise{float(data_tools.dataset.NOISE[task])}_seed0_v1.hdf5")
    return folder


@pytest.fixture
def run(monkeypatch, random_data, tmp_path):
    """run(algo, task, flags, folder) starts main() on episodes of 40 env steps, without pictures."""
    for name in ("plot_prediction", "plot_visited"):
        monkeypatch.setattr(data_tools, name, lambda *args: None)

    def shorten(module, name):
        owner = getattr(module, name)
        monkeypatch.setattr(owner, "__init__", functools.partialmethod(owner.__init__, max_episode_steps=40))

    def start(algo, task="maze", flags="", folder="runs"):
        module, name = {"maze": ("maze", "Maze"), "calvin": ("calvin", "Calvin")}.get(task, ("kitchen", "Kitchen"))
        module = __import__(f"data_tools.{module}", fromlist=["_"])
        if (module, name) not in shortened:
            shortened.append((module, name))
            shorten(module, f"{name}VectorEnv")
        planner = (PLANNER if hasattr(algo, "Planner") else "") + ("" if algo is skimo_sac else " --num-skills 2")
        places = ["--data-dir", str(random_data), "--run-dir", str(tmp_path / folder)]
        argv = ["--env-id", task, *f"{QUICK}{planner} {flags}".split(), *places]
        return algo.main(algo.parse_args(argv)), only_run(tmp_path / folder)

    shortened = []
    return start


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("algo", VARIANTS, ids=lambda algo: algo.__name__.removeprefix("algos."))
def test_both_phases_run_on_every_task(algo, task, run, random_data):
    results, run_dir = run(algo, task)
    assert results["env_steps"] == 160 and results["updates"] == 8
    assert len(csv_rows(run_dir)) == 4 and len(results["evaluations"]) == 1
    assert results["pretraining"]["updates"] == 4
    assert run_dir.name.startswith(f"{task}__{algo.__name__.removeprefix('algos.')}__scripted__1__")
    (model,) = (random_data / "pretrained").glob(f"{algo.PRETRAINED}_{task.removesuffix('-misaligned')}_*.pt")
    state = data_tools.load_checkpoint(model, {}, "cpu")
    assert state["meta"]["kind"] == f"{algo.PRETRAINED} pretrained"


def test_files_with_the_same_pretraining_share_its_model(run, random_data, capsys):
    """Whichever file makes it: skimo.py, without CEM, with SAC."""
    models = []
    for k, maker in enumerate((skimo, skimo_no_cem, skimo_sac)):
        seed = f"--seed {11 + k} --total-timesteps 20 --warmup-steps 0"
        run(maker, flags=seed, folder=f"maker{k}")
        capsys.readouterr()
        user = (skimo_no_cem, skimo_sac, skimo)[k]
        run(user, flags=seed, folder=f"user{k}")
        assert "pre-trained model: " in capsys.readouterr().out
        models.append(len(list((random_data / "pretrained").glob("skimo_maze_*.pt"))))
    assert models == [models[0], models[0] + 1, models[0] + 2]
    assert {algo.PRETRAINED for algo in (skimo, *VARIANTS)} == {"skimo", "skimo_no_joint", "skimo_single_step"}


@pytest.mark.parametrize("algo", [skimo_no_joint, skimo_single_step])
def test_models_of_another_pretraining_are_refused(algo, run, random_data, capsys, tmp_path):
    run(skimo_no_cem, flags="--seed 21 --total-timesteps 20 --warmup-steps 0")
    model = max((random_data / "pretrained").glob("skimo_maze_*.pt"), key=lambda path: path.stat().st_mtime)
    refused(capsys, lambda: run(algo, flags=f"--pretrained {model}", folder="other"), "kind", algo.PRETRAINED)
    refused(
        capsys, lambda: run(algo, flags="--pretrained published", folder="none"), f"{algo.PRETRAINED}_maze_pretrained"
    )


@pytest.mark.parametrize("algo", VARIANTS, ids=lambda algo: algo.__name__.removeprefix("algos."))
def test_resumed_run_equals_an_uninterrupted_one(algo, run):
    _, whole = run(algo, folder="whole")
    _, part = run(algo, flags="--total-timesteps 100", folder="part")
    resumed = algo.main(algo.parse_args(["--resume", str(part), "--total-timesteps", "160"]))
    a, b = final_state(whole), final_state(part)
    a["run"].pop("evaluations"), b["run"].pop("evaluations")
    assert_same(b, a)
    assert csv_rows(part) == csv_rows(whole)
    results = json.loads((whole / "results.json").read_text())
    assert resumed["evaluations"][-1] == tuple(results["evaluations"][-1])


@pytest.mark.parametrize("flags", ["--dynamics-input skill --skill-encoder lstm", "--policy-latents h0"])
def test_flags_of_single_step_run(run, flags):
    results, _ = run(skimo_single_step, flags=flags)
    assert results["updates"] == 8


def test_removed_arguments_are_gone_and_the_others_keep_their_defaults():
    planner = "num_samples num_policy_trajs num_elites cem_iters temperature momentum plan_start plan_std explore_std "
    planner = set(f"{planner} explore_std_end std_steps horizon_steps".split())
    removed = {skimo_no_cem: planner, skimo_sac: planner | {"policy_latents", "reward_coef"}}
    added = {skimo_single_step: {"dynamics_input"}}
    for algo in VARIANTS:
        names = {field.name for field in dataclasses.fields(algo.Args)}
        base = {field.name for field in dataclasses.fields(skimo.Args)}
        assert names == base - removed.get(algo, set()) | added.get(algo, set())
        for task in TASKS:
            ours, theirs = (vars(module.parse_args(["--env-id", task])) for module in (algo, skimo))
            other = {"exp_name"} | ({"num_skills"} if algo is skimo_sac and task != "calvin" else set())
            assert {name for name in names & base if ours[name] != theirs[name]} == other
            assert set(algo.TASK_DEFAULTS[task]) == set(skimo.TASK_DEFAULTS[task]) - removed.get(algo, set())
        shaping = {*algo.MODEL_ARGS, *algo.PRETRAIN_ARGS}  # a pre-trained model
        assert shaping - {*skimo.MODEL_ARGS, *skimo.PRETRAIN_ARGS} == added.get(algo, set())


# ---------------------------------------------------------------------------------------------------------- compilation


def few_updates(algo, args, device):
    """Two steps of the phases that the variant changes; all numbers on the way."""
    torch.manual_seed(0)
    networks, numbers = algo.make_networks(args, 4, 2, device), {}
    steps = {}
    if algo is not skimo_sac:
        window = [torch.from_numpy(x).float().to(device) for x in pretraining_batch(args)]
        steps["pretrain"] = functools.partial(algo.Pretrainer(args, copy.deepcopy(networks)).update, *window)
    if algo is not skimo_no_joint:
        batch = single_step_batch(args) if algo is skimo_single_step else rl_batch(args, 4)
        batch = [torch.from_numpy(x).float().to(device) for x in batch]
        steps["learner"] = functools.partial(algo.Learner(args, networks).update, *batch)
    for name, step in steps.items():
        torch.manual_seed(0)
        numbers |= {f"{name} {metric}": value.cpu() for metric, value in step().items()}
        owner = step.func.__self__  # the gradients, as Adam's running means have them after one step
        optimizers = owner.optimizers if isinstance(getattr(owner, "optimizers", None), list) else []
        optimizers = optimizers or [value for value in vars(owner).values() if isinstance(value, torch.optim.Optimizer)]
        for i, optimizer in enumerate(optimizers):
            for j, state in enumerate(optimizer.state.values()):
                numbers[f"{name} gradient {i} {j}"] = state["exp_avg"].cpu().clone()
    return numbers


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("algo", [skimo_sac, skimo_single_step, skimo_no_joint])
def test_compiled_losses_give_the_numbers_of_eager_ones(algo, device, monkeypatch, eager_random):
    sizes = dict(
        num_skills=1,
        pretrain_skills=1,
        bc_chunks=1,
        skill_horizon=2,
        hidden_dim=8,
        latent_dim=4,
        pretrain_lr_decay=False,
    )
    args = tiny_args(algo, **sizes)
    eager = few_updates(algo, args, device)
    compiled = few_updates(algo, dataclasses.replace(args, compile=True), device)
    assert compiled.keys() == eager.keys() and sum("gradient" in name for name in eager) >= 20
    for name, value in eager.items():
        torch.testing.assert_close(
            compiled[name], value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
@pytest.mark.parametrize("algo", [skimo_no_joint, skimo_single_step])
def test_inductor_gives_the_gradients_of_pretraining(algo, eager_random):
    sizes = dict(num_skills=2, pretrain_skills=2, bc_chunks=1, skill_horizon=2, hidden_dim=8, latent_dim=4)
    args, gradients = tiny_args(algo, **sizes), []
    torch.manual_seed(0)
    networks = algo.make_networks(args, 4, 2, "cpu")
    window = [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    for loss in (algo.pretrain_loss, torch.compile(algo.pretrain_loss)):
        networks.zero_grad()
        torch.manual_seed(0)
        loss(*networks.values(), copy.deepcopy(networks["model"]), *window, args)[0].backward()
        gradients.append([p.grad.clone() for p in networks["skills"].parameters() if p.grad is not None])
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_plan_imagines_skills_by_single_steps(device):
    torch._dynamo.reset()
    sizes = dict(num_skills=2, skill_horizon=2, hidden_dim=8, latent_dim=4, cem_iters=1, num_samples=4)
    args = tiny_args(skimo_single_step, **sizes)
    networks = skimo_single_step.make_networks(args, 4, 2, device)
    torch.manual_seed(0)
    h, z = torch.randn(3, 4, device=device), torch.rand(3, 2, 3, device=device)

    def imagine(model, h, z):
        for t in range(2):
            h = model.next(h, z[:, t])
        return h

    with torch.no_grad():
        expected = imagine(networks["model"], h, z)
        compiled = torch.compile(imagine, mode="reduce-overhead")(networks["model"], h, z)
    torch.testing.assert_close(compiled, expected, atol=1e-4, rtol=1e-4)
