"""skimo.py's losses, distributions and networks against NumPy versions of the paper's equations."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from numpy_nets import has_gradient, noisy_copy, np_gaussian, np_kl, np_lstm, np_net, random_obs, rl_batch
from skimo_tools import (
    backward_of_one_term,
    double_networks,
    np_encode,
    np_q,
    np_scaled,
    pretraining_batch,
    tensors,
    tiny_args,
)
from torch import nn

import data_tools
from algos import skimo


@pytest.mark.parametrize("skill_encoder", ["mlp", "lstm"])
def test_pretrain_loss_is_eq_3_to_5(skill_encoder):
    maze = skill_encoder == "mlp"
    env_id, coefs = "maze" if maze else "kitchen", dict(kl_coef=0.3, consistency_coef=2.3, rho=0.6)
    args = tiny_args(env_id=env_id, skill_encoder=skill_encoder, position_features=maze, **coefs)
    N, H, Z = args.num_skills, args.skill_horizon, args.skill_dim
    model, skills, prior = double_networks(args).values()
    target = noisy_copy(model)
    obs, actions = pretraining_batch(args)
    torch.manual_seed(3)
    loss, metrics = skimo.pretrain_loss(model, skills, prior, target, *tensors(obs, actions), args)
    torch.manual_seed(3)
    torch.rand(len(obs), N)  # the chunks
    noise = torch.randn(len(obs), N, Z, dtype=torch.float64).numpy()

    e = np_encode(skills.encoder, obs[:, :-1], maze)  # E_L of every step
    bc, kl, prior_kl, recon, consistency = 0, 0, 0, 0, np.zeros(len(obs))
    h = np_encode(model.encoder, obs[:, ::H], maze)
    h_target = np_encode(target.encoder, obs[:, ::H], maze)
    h_pred = h[:, 0]
    for i in range(N):
        chunk = slice(i * H, (i + 1) * H)
        if maze:
            x = np.concatenate([actions[:, chunk].reshape(len(obs), -1), e[:, i * H]], -1)
        else:
            x = np_lstm(skills.lstm, np.concatenate([actions[:, chunk], e[:, chunk]], -1))
        q = np_gaussian(np_net(skills.skill_encoder, x))
        z = np.tanh(q[0] + q[1] * noise[:, i])
        for t in range(i * H, (i + 1) * H):
            mean, _ = np_gaussian(np_net(skills.skill_policy, np.concatenate([e[:, t], z], -1)))
            bc += np.square(np.tanh(mean) - actions[:, t]).mean() / (N * H)
        kl += np.clip(np_kl(q, (np.zeros(Z), np.ones(Z))), -100, 100).mean() / N
        prior_kl += np_kl(q, np_gaussian(np_net(prior, h[:, i]))).mean() / N
        h_pred = np_net(model.dynamics, np.concatenate([h_pred, z], -1))
        consistency += 0.6**i * np.square(h_pred - h_target[:, i + 1]).mean(-1)
    for i in range(N + 1):
        mean, raw = np.split(np_net(model.decoder, h[:, i]), 2, -1)
        std = 0.1 + 0.7 * (np.tanh(raw) + 1)
        error = (np_scaled(obs[:, i * H], maze) - mean) / std
        recon += (0.5 * error**2 + np.log(std) + 0.5 * np.log(2 * np.pi)).sum(-1).mean() / (N + 1)
    expected = dict(bc_loss=bc, kl_loss=kl, prior_loss=prior_kl, recon_loss=recon, consistency_loss=consistency.mean())
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-5), name
    total = 2 * bc + 0.3 * kl + prior_kl + (recon + 2.3 * consistency.mean()) / N
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_losses_of_one_bad_window_are_bounded_in_pretraining():
    args = tiny_args()
    networks = double_networks(args)
    target = noisy_copy(networks["model"])
    target.encoder.net[-1].bias.data += 1e6  # no predicted state is near its own
    networks["skills"].skill_encoder[-1].bias.data += 1e6  # the largest mean and std
    _, metrics = skimo.pretrain_loss(*networks.values(), target, *tensors(*pretraining_batch(args)), args)
    assert (metrics["consistency_loss"].item(), metrics["kl_loss"].item()) == (1e4, 100)


def test_few_bc_chunks_give_the_same_loss_on_average():
    args = tiny_args(bc_chunks=3)
    networks = double_networks(args)
    batch = tensors(*pretraining_batch(args, B=64))
    batch[1][:, : args.skill_horizon] *= 3  # the first chunk is harder than the others
    nets = *networks.values(), networks["model"]
    few, one = [], dataclasses.replace(args, bc_chunks=1)
    with torch.no_grad():
        torch.manual_seed(0)
        for _ in range(40):
            few.append(skimo.pretrain_loss(*nets, *batch, one)[1]["bc_loss"].item())
        every = np.mean([skimo.pretrain_loss(*nets, *batch, args)[1]["bc_loss"].item() for _ in range(20)])
    assert np.mean(few) == pytest.approx(every, abs=4 * np.std(few) / math.sqrt(40))


@pytest.mark.parametrize(
    ("only", "reached"),
    [
        ("bc", "encoder_l skill_encoder skill_policy"),
        ("kl", "encoder_l skill_encoder"),
        ("prior", "encoder prior"),
        ("recon", "encoder decoder"),
        ("consistency", "encoder dynamics encoder_l skill_encoder"),
    ],
)
def test_gradients_of_pretraining_go_where_the_paper_sends_them(only, reached):
    parts = backward_of_one_term(only, skimo, tiny_args())
    assert {name for name, part in parts.items() if has_gradient(part)} == set(reached.split())


def test_model_loss_is_eq_6():
    args = tiny_args(gamma=0.9, rho=0.6, consistency_coef=1.9)
    N, Z = args.num_skills, args.skill_dim
    model, _, policy = double_networks(args).values()
    target = noisy_copy(model)
    batch = obs, z, rewards, dones = rl_batch(args)
    torch.manual_seed(5)
    loss, metrics, h_out, h_pred_out = skimo.model_loss(model, target, policy, *tensors(*batch), args)
    torch.manual_seed(5)
    noise = torch.randn(len(obs), N, Z, dtype=torch.float64).numpy()

    h, h_target = np_encode(model.encoder, obs), np_encode(target.encoder, obs)
    h_pred = [h[:, 0]]
    consistency, reward_error, value_error = np.zeros((3, len(obs)))
    td_targets, q_values = [], []
    for t in range(N):
        mean, std = np_gaussian(np_net(policy, h[:, t + 1]))
        next_q = np.minimum(*np_q(target, h[:, t + 1], np.tanh(mean + std * noise[:, t])))
        td_target = rewards[:, t] + 0.9 * np.where(dones[:, t], 0, next_q)
        for latent, weight in ((h_pred[-1], 0.6**t), (h[:, t], 1)):
            hz = np.concatenate([latent, z[:, t]], -1)
            reward_error += weight * (np_net(model.reward_model, hz)[:, 0] - rewards[:, t]) ** 2
            q1, q2 = np_q(model, latent, z[:, t])
            value_error += weight * ((q1 - td_target) ** 2 + (q2 - td_target) ** 2)
        h_pred.append(np_net(model.dynamics, np.concatenate([h_pred[-1], z[:, t]], -1)))
        consistency += 0.6**t * np.square(h_pred[-1] - h_target[:, t + 1]).mean(-1)
        td_targets.append(td_target)
        q_values.append(q1)  # on the encoded state
    total = (1.9 * consistency + 0.25 * reward_error + 0.1 * value_error).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-5)
    expected = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    for name, value in (expected | dict(td_target=np.array(td_targets), q_value=np.array(q_values))).items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-5), name
    np.testing.assert_allclose(h_out.numpy(), h, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(h_pred_out.numpy(), np.stack(h_pred, 1), rtol=1e-5, atol=1e-5)
    assert not h_out.requires_grad and not h_pred_out.requires_grad

    loss.backward()
    for module in (model.encoder, model.dynamics, model.reward_model, model.qf1, model.qf2):
        assert has_gradient(module)
    for module in (target, policy, model.decoder):
        assert not has_gradient(module)


def test_errors_of_one_bad_window_are_bounded():
    args = tiny_args(consistency_coef=1.9)
    networks = double_networks(args)
    obs, z, rewards, dones = rl_batch(args)
    rewards[:] = 1e6
    target = noisy_copy(networks["model"])
    target.encoder.net[-1].bias.data += 1e6  # no predicted state is near its own
    batch = tensors(obs, z, rewards, dones)
    loss = skimo.model_loss(networks["model"], target, networks["prior"], *batch, args)[0]
    assert loss.item() == pytest.approx((1.9 + 0.25 + 0.1) * 1e5 / args.num_skills)


def test_kl_of_a_policy_far_from_the_prior_is_bounded():
    args = tiny_args()
    networks = double_networks(args)
    policy = noisy_copy(networks["prior"])
    for network, far in ((policy, 1e3), (networks["prior"], -1e3)):
        network[-1].bias.data[: args.skill_dim] += far
        network[-1].bias.data[args.skill_dim :] -= 1e3  # next to no std
    obs = torch.from_numpy(rl_batch(args)[0])
    model = networks["model"]
    h = model.encoder(obs).detach()
    inputs = model, policy, model.encoder, networks["prior"], obs, h, h, torch.tensor(0.5)
    _, metrics = skimo.policy_loss(*inputs, args)
    assert metrics["prior_kl"].item() == 100


@pytest.mark.parametrize("latents", ["imagined", "encoded"])
def test_policy_loss_is_eq_7(latents):
    args = tiny_args(rho=0.6, policy_latents=latents)
    N, Z = args.num_skills, args.skill_dim
    model, _, prior = double_networks(args).values()
    policy, prior_encoder = noisy_copy(prior, 2), noisy_copy(model.encoder, 3)
    rng = np.random.default_rng(2)
    obs, B = random_obs(rng, 5, N + 1), 5
    h, h_pred = rng.normal(size=(2, B, N + 1, args.latent_dim))
    alpha = torch.tensor(0.7, dtype=torch.float64)
    torch.manual_seed(6)
    loss, metrics = skimo.policy_loss(model, policy, prior_encoder, prior, *tensors(obs, h, h_pred), alpha, args)
    torch.manual_seed(6)
    noise = torch.randn(B, N, Z, dtype=torch.float64).numpy()

    total, kls, qs = 0, [], []
    for t in range(N):
        latent = {"imagined": h_pred, "encoded": h}[latents][:, t]
        mean, std = np_gaussian(np_net(policy, latent))
        qs.append(np.minimum(*np_q(model, latent, np.tanh(mean + std * noise[:, t]))))
        frozen = np_gaussian(np_net(prior, np_encode(prior_encoder, obs[:, t])))
        kls.append(np.clip(np_kl(np_gaussian(np_net(policy, h[:, t])), frozen), -100, 100))
        total += 0.6**t * (0.7 * kls[-1] - qs[-1]).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["prior_kl"].item() == pytest.approx(np.mean(kls), rel=1e-5)
    assert metrics["policy_q"].item() == pytest.approx(np.mean(qs), rel=1e-5)
    loss.backward()
    assert has_gradient(policy) and not has_gradient(prior) and not has_gradient(prior_encoder)


def test_kl_divergence_is_exact():
    torch.manual_seed(0)
    p = torch.randn(4, 3, dtype=torch.float64), 0.3 + torch.rand(4, 3, dtype=torch.float64)
    q = torch.randn(4, 3, dtype=torch.float64), 0.3 + torch.rand(4, 3, dtype=torch.float64)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(*p), normal(*q)).sum(-1)
    torch.testing.assert_close(skimo.kl_divergence(p, q), exact)
    assert torch.all(skimo.kl_divergence(p, p).abs() < 1e-12)


def test_gaussian_parameters_bound_mean_and_std():
    x = torch.tensor([[-1e6, -2.0, 0.0, 1.0, 1e6, -1e6, -11.0, 0.5, 2.0, 1e6]])
    mean, std = skimo.gaussian_parameters(x)
    expected_mean = [-5, 5 * math.tanh(-0.4), 0, 5 * math.tanh(0.2), 5]
    assert mean[0].tolist() == pytest.approx(expected_mean, abs=1e-6)
    low, high = math.exp(-10) + 1e-4, math.exp(2) + 1e-4
    assert std[0].tolist() == pytest.approx([low, low, math.exp(0.5) + 1e-4, high, high], rel=1e-5)


def linear_sizes(net):
    return [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "kitchen-misaligned", "calvin"])
def test_networks_have_the_sizes_of_the_release(env_id):
    args = skimo.parse_args(["--env-id", env_id, "--device", "cpu"])
    obs_dim, action_dim = data_tools.env_sizes(env_id)
    u, d = {"maze": (128, 128), "calvin": (256, 256)}.get(env_id, (128, 256))
    model, skills, prior = skimo.make_networks(args).values()
    inputs = obs_dim + {"maze": 24, "calvin": 140}.get(env_id, 90)
    for encoder in (model.encoder, skills.encoder):
        assert linear_sizes(encoder.net) == [(inputs, u), (u, d)]
    assert linear_sizes(model.dynamics) == [(d + 10, u), (u, u), (u, u), (u, u), (u, d)]
    assert linear_sizes(model.decoder) == [(d, u), (u, u), (u, 2 * obs_dim)]
    assert linear_sizes(prior) == [(d, u), (u, u), (u, u), (u, u), (u, 20)]
    assert linear_sizes(skills.skill_policy) == [(d + 10, u), (u, u), (u, u), (u, u), (u, 2 * action_dim)]
    for head in (model.reward_model, model.qf1, model.qf2):
        assert linear_sizes(head) == [(d + 10, u), (u, u), (u, u), (u, u), (u, 1)]
        kinds = ["Linear", "LayerNorm", "Tanh", "Linear", "ELU", "Linear", "ELU", "Linear", "ELU", "Linear"]
        assert [type(layer).__name__ for layer in head] == kinds
        assert head[-1].weight.norm().item() == pytest.approx(0.01, rel=1e-4)
        assert not torch.equal(head[0].bias, torch.zeros(u))  # torch's own initialisation
    if env_id == "maze":
        assert skills.lstm is None
        assert linear_sizes(skills.skill_encoder) == [(20 + d, u), (u, u), (u, u), (u, u), (u, 20)]
    else:
        assert (skills.lstm.input_size, skills.lstm.hidden_size, skills.lstm.num_layers) == (action_dim + d, 128, 1)
        assert linear_sizes(skills.skill_encoder) == [(128, 20)]
        std = skills.skill_encoder[0].weight.std().item()
        assert std == pytest.approx((1 / 3 / 128) ** 0.5, rel=0.05)  # torch's own
        assert skills.skill_encoder[0].bias.any()
    orthogonal = [model.encoder.net, model.dynamics, model.decoder, prior, skills.skill_policy]
    if env_id == "maze":
        orthogonal.append(skills.skill_encoder)
    for net in orthogonal:
        for layer in net[::2]:
            W = layer.weight.detach()
            product = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
            torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-4, rtol=0)
            assert not layer.bias.any()
        assert all(isinstance(layer, nn.ELU) for layer in net[1::2])
    assert not torch.equal(model.qf1[0].weight, model.qf2[0].weight)
    assert not torch.equal(model.encoder.net[0].weight, skills.encoder.net[0].weight)


def first_inputs(encoder, obs):
    """What the first linear layer of a state encoder sees."""
    seen = []
    hook = encoder.net[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    encoder(obs)
    hook.remove()
    return seen[0]


def test_maze_positions_enter_with_periods_of_1_to_32_cells():
    encoder = skimo.StateEncoder(4, tiny_args()).double()
    obs = torch.from_numpy(random_obs(np.random.default_rng(0), 50) * [0.2, 0.2, 1, 1])
    before = first_inputs(encoder, obs)
    assert before.shape == (50, 28)
    torch.testing.assert_close(before[:, :4], torch.from_numpy(np_scaled(obs.numpy())), atol=1e-6, rtol=0)
    same = []  # number of sines and cosines that a shift of both coordinates leaves alone: two of each per period
    for shift in (0.5, 1, 2, 4, 8, 16, 32):
        after = first_inputs(encoder, obs + torch.tensor([shift, shift, 0, 0]))
        same.append(int(((after - before)[:, 4:].abs().max(0).values < 1e-4).sum()))
    assert same == [0, 4, 8, 12, 16, 20, 24]
    faster = obs + torch.tensor([0, 0, 3.0, 3.0])
    torch.testing.assert_close(first_inputs(encoder, faster)[:, 4:], before[:, 4:])


@pytest.mark.parametrize(("env_id", "unit"), [("kitchen", [1] * 7 + [0.1] * 2), ("calvin", [0.25] * 3 + [1] * 11)])
def test_joints_and_tool_enter_with_five_periods(env_id, unit):
    obs = np.random.default_rng(0).normal(size=(5, 30))
    encoder = skimo.StateEncoder(30, tiny_args(env_id=env_id))
    expected = [obs]
    for wave in (np.sin, np.cos):
        for k, period in enumerate(unit):
            expected += [wave(2 * np.pi * obs[:, k, None] / (period * factor)) for factor in (0.25, 0.5, 1, 2, 4)]
    inputs = first_inputs(encoder, torch.from_numpy(obs).float())
    np.testing.assert_allclose(inputs.numpy(), np.concatenate(expected, -1), atol=2e-4)


def test_observations_enter_raw_without_features():
    obs = torch.randn(5, 30)
    encoder = skimo.StateEncoder(30, tiny_args(env_id="kitchen", position_features=False))
    assert torch.equal(first_inputs(encoder, obs), obs)
    obs = torch.randn(5, 4)
    inputs = first_inputs(skimo.StateEncoder(4, tiny_args(position_features=False)), obs)
    np.testing.assert_allclose(inputs.numpy(), np_scaled(obs.numpy()), atol=1e-6)
