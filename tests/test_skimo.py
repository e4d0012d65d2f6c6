"""skimo.py against independent NumPy versions, known optima, interruptions, bad input and its own command line."""

import copy
import csv
import dataclasses
import errno
import functools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DATA_FILE
from torch import nn

import data_tools
import data_tools.calvin
import data_tools.kitchen
import data_tools.maze
from algos import skimo
from data_tools.runs import get_state, set_state

# -------------------------------------------------------------------------------------------------------------- helpers


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", compile=False, num_threads=1, hidden_dim=16, latent_dim=8, skill_dim=3, skill_horizon=5,
        num_skills=3, pretrain_skills=3, bc_chunks=3, skill_encoder="mlp",
        num_envs=2, batch_size=8, num_samples=16, num_policy_trajs=4,
        num_elites=6, cem_iters=2, pretrain_batch_size=8, pretrain_updates=6, pretrain_eval_episodes=1, eval_episodes=2,
        total_timesteps=1200, warmup_steps=400, horizon_steps=1000, std_steps=1000, alpha=1.0, autotune=True,
        plan_start="wide", explore_std=0.5, tau=0.01,
    )  # fmt: skip
    return skimo.Args(**(small | changes))


def elu(x):
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def np_net(net, x):
    """An nn.Sequential evaluated with NumPy in float64."""
    for layer in net:
        weights = {name: value.detach().cpu().numpy().astype(np.float64) for name, value in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            x = x @ weights["weight"].T + weights["bias"]
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * weights["weight"] + weights["bias"]
        elif isinstance(layer, nn.ELU):
            x = elu(x)
        elif isinstance(layer, nn.Tanh):
            x = np.tanh(x)
        else:
            raise AssertionError(f"no {layer} in the paper")
    return x


def np_scaled(obs, maze=True):
    return np.concatenate([obs[..., :2] / 40 - 0.5, obs[..., 2:] / 10], -1) if maze else obs


def np_features(obs, maze=True):
    """Inputs: in the maze with sines of both coordinates in all periods, then the cosines."""
    x = [np_scaled(obs, maze)]
    if maze:
        for wave in (np.sin, np.cos):
            for k in (0, 1):
                x += [wave(2 * np.pi * obs[..., k, None] / period) for period in (1, 2, 4, 8, 16, 32)]
    return np.concatenate(x, -1)


def np_encode(encoder, obs, maze=True):
    """E or E_L."""
    return np_net(encoder.net, np_features(obs, maze))


def np_tanh_normal(x):
    mean, log_std = np.split(x, 2, -1)
    return 5 * np.tanh(mean / 5), np.exp(np.clip(log_std, -10, 2)) + 1e-4


def np_kl(p, q):
    """KL of diagonal Gaussians by cross-entropy minus entropy, summed over the last axis."""
    cross_entropy = 0.5 * np.log(2 * np.pi * q[1] ** 2) + (p[1] ** 2 + (p[0] - q[0]) ** 2) / (2 * q[1] ** 2)
    return (cross_entropy - 0.5 * np.log(2 * np.pi * np.e * p[1] ** 2)).sum(-1)


def np_lstm(lstm, x):
    """Last hidden state of a one-layer LSTM: x (B, T, I) -> (B, 128); gates in the order i, f, g, o."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    W, R, b, c = (getattr(lstm, name).detach().numpy() for name in names)

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    hidden = cell = np.zeros((len(x), R.shape[1]))
    for t in range(x.shape[1]):
        i, f, g, o = np.split(x[:, t] @ W.T + b + hidden @ R.T + c, 4, -1)
        cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
        hidden = sigmoid(o) * np.tanh(cell)
    return hidden


def np_q(model, h, z):
    hz = np.concatenate([h, z], -1)
    return np_net(model.qf1, hz)[..., 0], np_net(model.qf2, hz)[..., 0]


def random_obs(rng, *shape):
    return np.concatenate([rng.uniform(0, 40, (*shape, 2)), rng.uniform(-5, 5, (*shape, 2))], -1)


def double_networks(args, obs_dim=4, action_dim=2, seed=0):
    """Networks in float64 with all weights random, last layers and biases included."""
    torch.manual_seed(seed)
    networks = skimo.make_networks(args, obs_dim, action_dim, "cpu").double()
    for value in networks.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return networks


def noisy_copy(module, seed=1):
    torch.manual_seed(seed)
    module = copy.deepcopy(module)
    for value in module.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return module


def has_gradient(module):
    return any(value.grad is not None and value.grad.abs().sum() > 0 for value in module.parameters())


def gradients(module):
    return [0 if value.grad is None else value.grad.clone() for value in module.parameters()]


class Recorder:
    """In place of a TensorBoard writer."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars.setdefault(name, []).append((step, float(value)))

    def add_image(self, *args, **kwargs):
        pass


# --------------------------------------------------------------------------------------------------------------- losses


def pretraining_batch(args, maze=True, obs_dim=4, action_dim=2, B=6):
    rng = np.random.default_rng(0)
    steps = args.num_skills * args.skill_horizon
    obs = random_obs(rng, B, steps + 1) if maze else rng.normal(size=(B, steps + 1, obs_dim))
    return obs, rng.uniform(-1, 1, (B, steps, action_dim))


@pytest.mark.parametrize("skill_encoder", ["mlp", "lstm"])
def test_pretrain_loss_is_eq_3_to_5(skill_encoder):
    maze = skill_encoder == "mlp"
    coefs = dict(bc_coef=1.7, kl_coef=0.3, prior_coef=0.9, recon_coef=1.3, consistency_coef=2.3, rho=0.6)
    args = tiny_args(env_id="maze" if maze else "kitchen", skill_encoder=skill_encoder, position_features=maze, **coefs)
    N, H, Z = args.num_skills, args.skill_horizon, args.skill_dim
    obs_dim, action_dim = (4, 2) if maze else (7, 3)
    networks = double_networks(args, obs_dim, action_dim)
    model, skills, prior = networks["model"], networks["skills"], networks["prior"]
    target = noisy_copy(model)
    obs, actions = pretraining_batch(args, maze, obs_dim, action_dim)
    torch.manual_seed(3)
    loss, metrics = skimo.pretrain_loss(
        model, skills, prior, target, torch.from_numpy(obs), torch.from_numpy(actions), args
    )
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
        q = np_tanh_normal(np_net(skills.skill_encoder, x))
        z = np.tanh(q[0] + q[1] * noise[:, i])
        for t in range(i * H, (i + 1) * H):
            mean, _ = np_tanh_normal(np_net(skills.skill_policy, np.concatenate([e[:, t], z], -1)))
            bc += np.square(np.tanh(mean) - actions[:, t]).mean() / (N * H)
        kl += np.clip(np_kl(q, (np.zeros(Z), np.ones(Z))), -100, 100).mean() / N
        prior_kl += np_kl(q, np_tanh_normal(np_net(prior, h[:, i]))).mean() / N
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
    total = 1.7 * bc + 0.3 * kl + 0.9 * prior_kl + (1.3 * recon + 2.3 * consistency.mean()) / N
    assert loss.item() == pytest.approx(total, rel=1e-5)


def test_few_bc_chunks_give_the_same_loss_on_average():
    args = tiny_args(bc_chunks=3)
    networks = double_networks(args)
    batch = [torch.from_numpy(x) for x in pretraining_batch(args, B=64)]
    nets = networks["model"], networks["skills"], networks["prior"], networks["model"]
    few, one = [], dataclasses.replace(args, bc_chunks=1)
    with torch.no_grad():
        torch.manual_seed(0)
        for _ in range(40):
            few.append(skimo.pretrain_loss(*nets, *batch, one)[1]["bc_loss"].item())
        every = np.mean([skimo.pretrain_loss(*nets, *batch, args)[1]["bc_loss"].item() for _ in range(20)])
    assert np.std(few) > 0  # other chunks each time
    assert np.mean(few) == pytest.approx(every, abs=4 * np.std(few) / math.sqrt(40))


@pytest.mark.parametrize(
    ("only", "reached", "not_reached"),
    [
        ("bc_coef", "encoder_l skill_encoder skill_policy", "encoder dynamics prior decoder"),
        ("kl_coef", "encoder_l skill_encoder", "skill_policy encoder dynamics prior decoder"),
        ("prior_coef", "encoder prior", "encoder_l skill_encoder skill_policy dynamics decoder"),
        ("recon_coef", "encoder decoder", "encoder_l skill_encoder skill_policy dynamics prior"),
        ("consistency_coef", "encoder dynamics encoder_l skill_encoder", "skill_policy prior decoder"),
    ],
)
def test_gradients_of_pretraining_go_where_the_paper_sends_them(only, reached, not_reached):
    zero = dict(bc_coef=0.0, kl_coef=0.0, prior_coef=0.0, recon_coef=0.0, consistency_coef=0.0)
    args = tiny_args(**(zero | {only: 1.0}))
    networks = double_networks(args)
    model, skills = networks["model"], networks["skills"]
    target = noisy_copy(model)
    batch = [torch.from_numpy(x) for x in pretraining_batch(args)]
    skimo.pretrain_loss(model, skills, networks["prior"], target, *batch, args)[0].backward()
    parts = dict(encoder=model.encoder, dynamics=model.dynamics, decoder=model.decoder, prior=networks["prior"])
    parts |= dict(encoder_l=skills.encoder, skill_encoder=skills.skill_encoder, skill_policy=skills.skill_policy)
    assert {name for name in reached.split() if not has_gradient(parts[name])} == set()
    assert {name for name in not_reached.split() if has_gradient(parts[name])} == set()
    for module in (model.reward_model, model.qf1, model.qf2, target):
        assert not has_gradient(module)


def rl_batch(args, B=5):
    rng = np.random.default_rng(1)
    N = args.num_skills
    obs, z = random_obs(rng, B, N + 1), rng.uniform(-1, 1, (B, N, args.skill_dim))
    rewards, dones = 3 * rng.normal(size=(B, N)), (rng.random((B, N)) < 0.3).astype(np.float64)
    return obs, z, rewards, dones


def test_model_loss_is_eq_6():
    args = tiny_args(gamma=0.9, rho=0.6, consistency_coef=1.9, reward_coef=0.35, value_coef=0.15)
    N, Z = args.num_skills, args.skill_dim
    networks = double_networks(args)
    model, policy = networks["model"], networks["prior"]
    target = noisy_copy(model)
    obs, z, rewards, dones = rl_batch(args)
    tensors = [torch.from_numpy(x) for x in (obs, z, rewards, dones)]
    torch.manual_seed(5)
    loss, metrics, h_out, h_pred_out = skimo.model_loss(model, target, policy, *tensors, args)
    torch.manual_seed(5)
    noise = torch.randn(len(obs), N, Z, dtype=torch.float64).numpy()

    h, h_target = np_encode(model.encoder, obs), np_encode(target.encoder, obs)
    h_pred = [h[:, 0]]
    consistency, reward_error, value_error = np.zeros((3, len(obs)))
    td_targets, q_values = [], []
    for t in range(N):
        mean, std = np_tanh_normal(np_net(policy, h[:, t + 1]))
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
    total = (1.9 * consistency + 0.35 * reward_error + 0.15 * value_error).mean() / N
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
    args = tiny_args(consistency_coef=0.0, value_coef=0.0, reward_coef=1.0)
    networks = double_networks(args)
    obs, z, rewards, dones = rl_batch(args)
    rewards[:] = 1e6
    tensors = [torch.from_numpy(x) for x in (obs, z, rewards, dones)]
    loss = skimo.model_loss(networks["model"], networks["model"], networks["prior"], *tensors, args)[0]
    assert loss.item() == pytest.approx(1e5 / args.num_skills)


@pytest.mark.parametrize("policy_latents", ["imagined", "h0", "encoded"])
def test_policy_loss_is_eq_7(policy_latents):
    args = tiny_args(rho=0.6, policy_latents=policy_latents)
    N, Z = args.num_skills, args.skill_dim
    networks = double_networks(args)
    model, prior = networks["model"], networks["prior"]
    policy, prior_encoder = noisy_copy(prior, 2), noisy_copy(model.encoder, 3)
    rng = np.random.default_rng(2)
    obs, B = random_obs(rng, 5, N + 1), 5
    h, h_pred = rng.normal(size=(2, B, N + 1, args.latent_dim))
    tensors = [torch.from_numpy(x) for x in (obs, h, h_pred)]
    alpha = torch.tensor(0.7, dtype=torch.float64)
    torch.manual_seed(6)
    loss, metrics = skimo.policy_loss(model, policy, prior_encoder, prior, *tensors, alpha, args)
    torch.manual_seed(6)
    noise = torch.randn(B, N, Z, dtype=torch.float64).numpy()

    total, kls, qs = 0, [], []
    for t in range(N):
        latent = {"imagined": h_pred[:, t], "h0": h[:, 0], "encoded": h[:, t]}[policy_latents]
        mean, std = np_tanh_normal(np_net(policy, latent))
        qs.append(np.minimum(*np_q(model, latent, np.tanh(mean + std * noise[:, t]))))
        frozen = np_tanh_normal(np_net(prior, np_encode(prior_encoder, obs[:, t])))
        kls.append(np.clip(np_kl(np_tanh_normal(np_net(policy, h[:, t])), frozen), -100, 100))
        total += 0.6**t * (0.7 * kls[-1] - qs[-1]).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-5)
    assert metrics["prior_kl"].item() == pytest.approx(np.mean(kls), rel=1e-5)
    assert metrics["policy_q"].item() == pytest.approx(np.mean(qs), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- distributions


def test_kl_divergence_is_that_of_the_squashed_variables():
    torch.manual_seed(0)
    p = torch.randn(4, 3, dtype=torch.float64), 0.3 + torch.rand(4, 3, dtype=torch.float64)
    q = torch.randn(4, 3, dtype=torch.float64), 0.3 + torch.rand(4, 3, dtype=torch.float64)
    kl = skimo.kl_divergence(p, q)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(*p), normal(*q)).sum(-1)
    torch.testing.assert_close(kl, exact)
    x = p[0] + p[1] * torch.randn(200_000, 4, 3, dtype=torch.float64)
    log_jacobian = torch.log1p(-torch.tanh(x).square())  # of z = tanh(x)
    ratio = (normal(*p).log_prob(x) - log_jacobian - (normal(*q).log_prob(x) - log_jacobian)).sum(-1)
    deviation = (ratio.mean(0) - kl).abs() / (ratio.std(0) / math.sqrt(len(x)))
    assert deviation.max() < 5
    assert torch.all(skimo.kl_divergence(p, p).abs() < 1e-12)


def test_tanh_normal_bounds_mean_and_std():
    x = torch.tensor([[-1e6, -2.0, 0.0, 1.0, 1e6, -1e6, -11.0, 0.5, 2.0, 1e6]])
    mean, std = skimo.tanh_normal(x)
    expected_mean = [-5, 5 * math.tanh(-0.4), 0, 5 * math.tanh(0.2), 5]
    assert mean[0].tolist() == pytest.approx(expected_mean, abs=1e-6)
    low, high = math.exp(-10) + 1e-4, math.exp(2) + 1e-4
    assert std[0].tolist() == pytest.approx([low, low, math.exp(0.5) + 1e-4, high, high], rel=1e-5)


def test_samples_are_those_of_a_squashed_gaussian():
    torch.manual_seed(0)
    mean = torch.tensor([-0.5, 0.0, 1.0]).expand(100_000, 3)
    std = torch.tensor([0.2, 1.0, 0.5]).expand(100_000, 3)
    z = skimo.sample((mean, std))
    assert z.abs().max() < 1
    x = torch.atanh(z)
    torch.testing.assert_close(x.mean(0), mean[0], atol=0.02, rtol=0)
    torch.testing.assert_close(x.std(0), std[0], atol=0.02, rtol=0)
    mean = torch.zeros(3, requires_grad=True)
    skimo.sample((mean, torch.ones(3))).sum().backward()
    assert torch.all(mean.grad > 0)  # reparameterised


# ------------------------------------------------------------------------------------------------------------- networks


def linear_sizes(net):
    return [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "kitchen-misaligned", "calvin"])
def test_networks_have_the_sizes_of_the_release(env_id):
    args = skimo.Args(env_id=env_id, **skimo.TASK_DEFAULTS[env_id])
    obs_dim, action_dim = {"maze": (4, 2), "calvin": (21, 7)}.get(env_id, (30, 9))
    u, d = {"maze": (128, 128), "calvin": (256, 256)}.get(env_id, (128, 256))
    networks = skimo.make_networks(args, obs_dim, action_dim, "cpu")
    model, skills, prior = networks["model"], networks["skills"], networks["prior"]
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
    for net in (model.encoder.net, model.dynamics, model.decoder, prior, skills.skill_policy, skills.skill_encoder):
        for layer in net[::2]:
            W = layer.weight.detach()
            product = W @ W.T if W.shape[0] <= W.shape[1] else W.T @ W
            torch.testing.assert_close(product, torch.eye(len(product)), atol=1e-4, rtol=0)
            assert not layer.bias.any()
        assert all(isinstance(layer, nn.ELU) for layer in net[1::2])
    assert not torch.equal(model.qf1[0].weight, model.qf2[0].weight)
    assert not torch.equal(model.encoder.net[0].weight, skills.encoder.net[0].weight)


def test_decoder_std_stays_between_its_bounds():
    torch.manual_seed(0)
    model = skimo.WorldModel(4, tiny_args())
    mean, std = model.decode(100 * torch.randn(1000, 8))
    assert mean.shape == std.shape == (1000, 4)
    assert std.min().item() == pytest.approx(0.1, abs=1e-3) and std.max().item() == pytest.approx(1.5, abs=1e-3)


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
    for args in (
        tiny_args(env_id="kitchen", position_features=False),
        tiny_args(env_id="calvin", position_features=False),
    ):
        obs = torch.randn(5, 21)
        assert torch.equal(first_inputs(skimo.StateEncoder(21, args), obs), obs)
    obs = torch.randn(5, 4)
    inputs = first_inputs(skimo.StateEncoder(4, tiny_args(position_features=False)), obs)
    np.testing.assert_allclose(inputs.numpy(), np_scaled(obs.numpy()), atol=1e-6)


# -------------------------------------------------------------------------------------------------------- replay buffer


def filled_buffer(lengths, num_envs=2, num_skills=3, device="cpu"):
    """Episodes one after the other in each environment; row t of episode k holds numbers made of (k, t)."""
    args = tiny_args(num_envs=num_envs, num_skills=num_skills)
    rb, added = skimo.ReplayBuffer(4, args, torch.device(device)), []
    clocks, upcoming = [[None, 0] for _ in range(num_envs)], iter(enumerate(lengths))
    for clock in clocks:
        clock[0] = next(upcoming)
    while any(clock[0] for clock in clocks):
        obs, next_obs = np.zeros((2, num_envs, 4), dtype=np.float32)
        z, rewards = np.zeros((num_envs, 3), dtype=np.float32), np.zeros(num_envs, dtype=np.float32)
        ended = np.zeros(num_envs, dtype=bool)
        for e, clock in enumerate(clocks):
            if clock[0] is None:
                obs[e] = -1
                continue
            (k, T), t = clock
            obs[e], next_obs[e], z[e], rewards[e] = (
                100 * k + t,
                100 * k + t + 1,
                (100 * k + t) / 1e4,
                1000 + 100 * k + t,
            )
            ended[e] = t == T - 1
            clock[1] += 1
            if ended[e]:
                added.append((k, T))
                clock[:] = next(upcoming, None), 0
        rb.add(obs, torch.from_numpy(z), rewards, ended, next_obs)
    return rb, added


def test_windows_hold_what_was_added_and_never_cross_episodes():
    lengths = [5, 3, 2, 7, 1, 4, 12, 3]
    rb, added = filled_buffer(lengths)
    assert sorted(added) == list(enumerate(lengths))
    kept = [(k, T) for k, T in added if T >= 3]
    assert rb.episodes[:, 1].tolist() == [T for _, T in kept]
    assert len(rb.rows) == sum(T + 1 for _, T in kept)
    torch.manual_seed(0)
    obs, z, rewards, dones = rb.sample(5000)
    assert obs.shape == (5000, 4, 4) and z.shape == (5000, 3, 3) and rewards.shape == dones.shape == (5000, 3)
    assert all(x.dtype == torch.float32 for x in (obs, z, rewards, dones))
    number = obs[:, :, 0]
    assert torch.equal(number[:, 1:], number[:, :-1] + 1)  # consecutive, final observation included
    assert torch.equal(obs, number[..., None].expand_as(obs))
    torch.testing.assert_close(z, (number[:, :-1, None] / 1e4).expand_as(z))
    assert torch.equal(rewards, 1000 + number[:, :-1])
    episode, t = number[:, :-1] // 100, number[:, :-1] % 100
    T = torch.tensor(lengths)[episode.long()]
    assert torch.equal(dones, (t == T - 1).float()) and torch.all(t < T)
    assert set(episode[:, 0].tolist()) == {float(k) for k, _ in kept}
    counts = torch.bincount(episode[:, 0].long(), minlength=len(lengths))[[k for k, _ in kept]]
    expected = 5000 / len(kept)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)  # episodes are uniform


def test_last_window_is_drawn_more_often():
    rb, _ = filled_buffer([10], num_envs=1)
    torch.manual_seed(0)
    start = rb.sample(20_000)[0][:, 0, 0]
    shares = torch.bincount(start.long(), minlength=10) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1] * 7 + [0.3] + [0.0] * 2), atol=0.015, rtol=0)


def test_unfinished_episodes_wait_and_survive_a_checkpoint(tmp_path):
    lengths = [4, 5, 6, 3]
    whole, _ = filled_buffer(lengths, num_envs=1)
    args = tiny_args(num_envs=1)
    rb = skimo.ReplayBuffer(4, args, torch.device("cpu"))
    for k, T in enumerate(lengths):
        for t in range(T):
            row = np.full((1, 4), 100 * k + t, dtype=np.float32)
            before = len(rb.episodes)
            z = torch.full((1, 3), (100 * k + t) / 1e4)
            rb.add(row, z, np.array([1000 + row[0, 0]]), np.array([t == T - 1]), row + 1)
            assert len(rb.episodes) == before + (t == T - 1)
            torch.save(get_state(rb), tmp_path / "rb.pt")  # as a checkpoint is written and read
            rb = skimo.ReplayBuffer(4, args, torch.device("cpu"))
            set_state(rb, torch.load(tmp_path / "rb.pt", weights_only=True))
    torch.testing.assert_close(rb.rows, whole.rows, atol=0, rtol=0)
    assert torch.equal(rb.episodes, whole.episodes)


# -------------------------------------------------------------------------------------------------------------- planner


class Stub:
    """A model whose latent state is (position, skills done); `reward` and `q` are given functions of (h, z)."""

    def __init__(self, reward=None, q=None):
        self._reward, self._q = reward, q

    def encoder(self, obs):
        return torch.cat([obs, torch.zeros(len(obs), 1)], -1)

    def next(self, h, z):
        return torch.cat([h[..., :-1] + z, h[..., -1:] + 1], -1)

    def reward(self, h, z):
        return self._reward(h, z) if self._reward else torch.zeros(h.shape[:-1])

    def q(self, h, z):
        value = self._q(h, z) if self._q else torch.zeros(h.shape[:-1])
        return value, value + 1  # the smaller one counts


def gaussian_policy(z, log_std):
    """A task policy whose skill is z in every state, give or take."""
    raw = 5 * math.atanh(math.atanh(z) / 5)
    return lambda h: torch.tensor([raw] * 2 + [log_std] * 2).expand(*h.shape[:-1], 4)


def plan_args(**changes):
    sizes = dict(num_samples=400, num_policy_trajs=10, num_elites=40, cem_iters=12, skill_dim=2)
    return tiny_args(**(sizes | changes))


def run_plan(model, obs, K, args, policy=None, std_floor=0.01, noise_scale=0.0, mean=None, seed=0):
    torch.manual_seed(seed)
    obs = torch.as_tensor(obs, dtype=torch.float32)
    mean = torch.zeros(len(obs), K, 2) if mean is None else mean
    policy = policy or gaussian_policy(0.0, 0.0)
    return skimo.plan(model, policy, obs, mean, torch.tensor(std_floor), torch.tensor(noise_scale), args)


@pytest.mark.parametrize("K", [1, 3])
def test_plan_finds_the_best_skill_of_every_step(K):
    best = torch.tensor([[0.6, -0.4], [-0.7, 0.2], [0.1, 0.8]])

    def reward(h, z):
        return -20 * (z - best[h[..., -1].long()]).square().sum(-1)

    args = plan_args(num_samples=2000, num_elites=100)
    first, mean = run_plan(Stub(reward), [[0.0, 0.0], [3.0, 1.0]], K, args)
    torch.testing.assert_close(mean, best[:K].expand(2, K, 2), atol=0.08, rtol=0)
    torch.testing.assert_close(first, best[:1].expand(2, 2), atol=0.2, rtol=0)


@pytest.mark.parametrize("K", [1, 3])
def test_plan_follows_the_critic_behind_the_last_skill(K):
    goal = torch.tensor([0.5, -0.3]) * K

    def q(h, z):
        assert torch.all(h[..., -1] == K)
        return -100 * (h[..., :2] - goal).square().sum(-1) - 30 * (z[..., 0] - 0.5).square()

    _, mean = run_plan(Stub(q=q), [[0.0, 0.0]], K, plan_args(), policy=gaussian_policy(0.5, -10.0))
    torch.testing.assert_close(mean.sum(1), goal[None], atol=0.1, rtol=0)


def test_each_environment_gets_its_own_plan():
    def reward(h, z):
        return -100 * (h[..., :2] + z).square().sum(-1)  # back to the origin

    obs = torch.tensor([[0.6, -0.4], [-0.5, -0.7], [0.0, 0.3], [0.8, 0.8]])
    first, mean = run_plan(Stub(reward), obs, 1, plan_args())
    torch.testing.assert_close(mean[:, 0], -obs, atol=0.06, rtol=0)
    torch.testing.assert_close(first, -obs, atol=0.2, rtol=0)


def test_plans_whose_states_overflow_are_never_elite():
    def reward(h, z):  # best at 0.5, beyond it the model breaks
        value = -20 * (z - 0.5).square().sum(-1)
        return torch.where((z > 0.6).any(-1), torch.full_like(value, torch.nan), value)

    args = tiny_args(num_samples=2000, num_policy_trajs=10, num_elites=50, cem_iters=10, skill_dim=2)
    torch.manual_seed(0)
    scalars = torch.tensor(0.01), torch.tensor(0.0)
    policy = gaussian_policy(0.0, 0.0)
    first, mean = skimo.plan(Stub(reward), policy, torch.zeros(2, 2), torch.zeros(2, 1, 2), *scalars, args)
    torch.testing.assert_close(mean, torch.full((2, 1, 2), 0.5), atol=0.08, rtol=0)
    assert first.isfinite().all()


def test_plans_stay_inside_the_skills_range():
    def reward(h, z):
        return 100 * z.sum(-1)  # the further the better

    args = plan_args()
    first, mean = run_plan(Stub(reward), [[0.0, 0.0]], 2, args, noise_scale=1.0, std_floor=0.5)
    torch.testing.assert_close(mean, torch.full((1, 2, 2), 0.999), atol=1e-3, rtol=0)
    firsts = torch.cat([run_plan(Stub(reward), [[0.0, 0.0]], 2, args, None, 0.5, 1.0, None, s)[0] for s in range(20)])
    assert firsts.abs().max() <= 0.999 + 1e-6
    assert (firsts < 0.99).any() and (firsts > 0.998).any()


@pytest.mark.parametrize("std_floor", [0.05, 0.5])
def test_least_std_is_kept_and_explored_with(std_floor):
    def reward(h, z):
        return -1e4 * z.square().sum(-1)  # elites collapse to 0

    args = plan_args(cem_iters=6)
    obs = torch.zeros(300, 2)
    quiet = run_plan(Stub(reward), obs, 1, args, std_floor=std_floor, noise_scale=0.0)[0]
    noisy = run_plan(Stub(reward), obs, 1, args, std_floor=std_floor, noise_scale=1.0)[0]
    assert quiet.std().item() < 0.4 * std_floor
    clipped = torch.randn(100_000) * std_floor
    assert noisy.std().item() == pytest.approx(clipped.clamp(-0.999, 0.999).std().item(), rel=0.15)


def test_plans_of_the_policy_win_where_samples_are_useless():
    def reward(h, z):
        return 100.0 * ((z - 0.3).abs().max(-1).values < 2e-3)  # nobody hits that by chance

    args = plan_args(num_elites=10, cem_iters=3)
    first, _ = run_plan(Stub(reward), torch.zeros(20, 2), 2, args, policy=gaussian_policy(0.3, -10.0))
    torch.testing.assert_close(first, torch.full((20, 2), 0.3), atol=2e-3, rtol=0)


def test_elite_is_drawn_with_the_softmax_of_its_value():
    args = plan_args(num_samples=2, num_policy_trajs=1, num_elites=3, cem_iters=1, temperature=0.5)
    draws = 4000
    firsts, _ = run_plan(Stub(lambda h, z: 2 * z[..., 0]), torch.zeros(draws, 2), 1, args)
    torch.manual_seed(0)
    policy = torch.tanh((1 + 1e-4) * torch.randn(draws, 1, 2))
    samples = (2 * torch.randn(draws, 2, 1, 2)[:, :, 0]).clamp(-0.999, 0.999)
    plans = torch.cat([samples, policy], 1)  # (draws, 3, 2)
    weight = torch.softmax(plans[..., 0], 1)  # 0.5 * 2 z
    picked = (plans - firsts[:, None]).abs().sum(-1)
    assert picked.min(1).values.max() < 1e-5
    picked = picked.argmin(1)
    for rank in range(3):  # how often the k-th plan is taken, against the sum of its probabilities
        expected, variance = weight[:, rank].sum(), (weight[:, rank] * (1 - weight[:, rank])).sum()
        assert abs((picked == rank).sum() - expected) < 4.5 * variance.sqrt()


@pytest.mark.parametrize("plan_start", ["wide", "policy"])
def test_plan_agrees_with_a_numpy_planner(plan_start):
    args = tiny_args(num_samples=12, num_policy_trajs=3, num_elites=5, cem_iters=3, gamma=0.8, momentum=0.2)
    args.temperature, args.plan_std, args.plan_start = 0.7, 1.5, plan_start
    E, K, Z, P = 2, 3, args.skill_dim, 15
    networks = double_networks(args)
    model, policy = networks["model"], networks["prior"]
    rng = np.random.default_rng(4)
    obs, first_mean = random_obs(rng, E), rng.uniform(-0.5, 0.5, (E, K, Z))
    torch.manual_seed(9)
    mean_in = torch.from_numpy(first_mean)
    scalars = torch.tensor([0.3, 1.0], dtype=torch.float64)
    skill, mean_out = skimo.plan(model, policy, torch.from_numpy(obs), mean_in, *scalars, args)
    torch.manual_seed(9)

    def normal(*shape, dtype=torch.float64):
        return torch.randn(*shape, dtype=dtype).numpy().astype(np.float64)

    h0 = np_encode(model.encoder, obs)
    h, proposals = np.repeat(h0[:, None], 3, 1), []
    for _ in range(K):
        m, s = np_tanh_normal(np_net(policy, h))
        proposals.append(np.tanh(m + s * normal(E, 3, Z)))
        h = np_net(model.dynamics, np.concatenate([h, proposals[-1]], -1))
    mean, std = first_mean, np.full((E, K, Z), 1.5)
    if plan_start == "policy":
        proposed = np.stack(proposals, 2)
        mean, std = proposed.mean(1), np.maximum(proposed.std(1, ddof=1), 0.3)
    for _ in range(3):
        plans = mean[:, None] + std[:, None] * normal(E, 12, K, Z, dtype=torch.float32)
        plans = np.concatenate([np.clip(plans, -0.999, 0.999), np.stack(proposals, 2)], 1)
        h, value = np.repeat(h0[:, None], P, 1), np.zeros((E, P))
        for t in range(K):
            hz = np.concatenate([h, plans[:, :, t]], -1)
            value += 0.8**t * np_net(model.reward_model, hz)[..., 0]
            h = np_net(model.dynamics, hz)
        m, s = np_tanh_normal(np_net(policy, h))
        value += 0.8**K * np.minimum(*np_q(model, h, np.tanh(m + s * normal(E, P, Z))))
        new_mean, new_std = np.zeros_like(mean), np.zeros_like(std)
        elites, weights = [], []
        for e in range(E):
            best = np.argsort(-value[e])[:5]
            w = np.exp(0.7 * value[e][best])
            w /= w.sum()
            elite = plans[e][best]
            centre = np.average(elite, axis=0, weights=w)
            new_std[e] = np.sqrt(np.average((elite - centre) ** 2, axis=0, weights=w))
            new_mean[e] = 0.2 * mean[e] + 0.8 * centre
            elites.append(elite)
            weights.append(w)
        mean, std = new_mean, np.clip(new_std, 0.3, 1.5)
    np.testing.assert_allclose(mean_out.numpy(), mean, atol=1e-5)
    race = torch.empty(E, 5, dtype=torch.float64).exponential_().numpy()
    picked = [np.argmax(weights[e] / race[e]) for e in range(E)]
    noise_std = 0.3 if plan_start == "policy" else std[:, 0]
    expected = np.stack([elites[e][picked[e]][0] for e in range(E)]) + noise_std * normal(E, Z)
    np.testing.assert_allclose(skill.numpy(), np.clip(expected, -0.999, 0.999), atol=1e-5)


class PlannerLog:
    """In place of `plan`: notes its arguments, answers with a mean that counts the calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, model, task_policy, obs, mean, std_floor, noise_scale, args):
        self.calls.append(SimpleNamespace(mean=mean.clone(), std_floor=std_floor.item(), noise=noise_scale.item()))
        steps = torch.arange(1.0, mean.shape[1] + 1)[None, :, None]
        return torch.zeros(len(obs), args.skill_dim), 100.0 * len(self.calls) + steps.expand_as(mean)


def logged_planner(monkeypatch, **changes):
    """A planner, and the log of its plans."""
    args = tiny_args(**(dict(num_skills=10, horizon_steps=25_000, std_steps=50_000) | changes))
    planner = skimo.Planner(None, None, args, torch.device("cpu"))
    planner.compiled_plan = PlannerLog()
    monkeypatch.setattr(skimo, "plan", planner.compiled_plan)
    return planner, planner.compiled_plan.calls


def test_planner_follows_its_schedules(monkeypatch):
    planner, calls = logged_planner(monkeypatch)
    obs, start = np.zeros((2, 4), dtype=np.float32), np.ones(2, dtype=bool)
    for step in (0, 2777, 2778, 12_500, 24_999, 25_000, 50_000, 10**6):
        planner(obs, start, step, explore=True)
    assert [call.mean.shape[1] for call in calls] == [1, 1, 2, 5, 9, 10, 10, 10]
    floors = [0.5, 0.4727854, 0.4727756, 0.3775, 0.2550098, 0.255, 0.01, 0.01]
    assert [call.std_floor for call in calls] == pytest.approx(floors, rel=1e-5)
    planner(obs, start, 0, explore=False)
    assert [call.noise for call in calls] == [1.0] * 8 + [0.0]


def test_only_the_longest_plans_of_training_are_compiled(monkeypatch):
    """Compiling takes minutes for every horizon and number of environments; a horizon that grows is soon gone."""
    planner, calls = logged_planner(monkeypatch)
    planner.compiled_plan = PlannerLog()
    obs, start = np.zeros((2, 4), dtype=np.float32), np.ones(2, dtype=bool)
    for step, explore in ((0, True), (24_999, True), (25_000, False)):
        planner(obs, start, step, explore)
    assert (len(calls), len(planner.compiled_plan.calls)) == (3, 0)
    for step in (25_000, 10**6):
        planner(obs, start, step, explore=True)
    assert (len(calls), len(planner.compiled_plan.calls)) == (3, 2)


def test_planner_starts_from_its_last_plan_moved_on_by_one_skill(monkeypatch):
    planner, calls = logged_planner(monkeypatch)
    obs = np.zeros((2, 4), dtype=np.float32)
    planner(obs, np.ones(2, dtype=bool), 6000, True)  # K = 3
    assert not calls[0].mean.any()
    planner(obs, np.array([False, True]), 6010, True)
    assert calls[1].mean[0, :, 0].tolist() == [102, 103, 0]
    assert not calls[1].mean[1].any()  # a new episode
    planner(obs, np.array([False, False]), 6020, True)
    assert calls[2].mean[:, :, 1].tolist() == [[202, 203, 0]] * 2
    planner(obs, np.array([False, False]), 9000, True)  # K = 4
    assert calls[3].mean.shape[1] == 4 and not calls[3].mean.any()
    planner, calls = logged_planner(monkeypatch, num_skills=1)
    for _ in range(2):
        planner(obs, np.array([False, False]), 10**6, True)
    assert not calls[1].mean.any()


# ------------------------------------------------------------------------------------------------- acting and roll-outs


class FakeEnvs:
    """Members that end after given numbers of steps; obs counts steps, reward is member + 1, and 99 once frozen."""

    def __init__(self, lengths):
        self.lengths, self.closed, self.actions = np.array(lengths), False, []

    def reset(self, seed=None, options=None):
        self.clock = np.zeros(len(self.lengths), dtype=int)
        torch.rand(3)  # an environment may draw, too
        return self._obs(), {}

    def _obs(self):
        return np.repeat(self.clock[:, None], 4, 1).astype(np.float32)

    def step(self, action):
        frozen = self.clock >= self.lengths
        self.actions.append(action)
        self.clock = np.where(frozen, self.clock, self.clock + 1)
        reward = np.where(frozen, 99.0, np.arange(len(self.lengths)) + 1.0)
        ended, even = self.clock >= self.lengths, np.arange(len(self.lengths)) % 2 == 0
        return self._obs(), reward, ended & even, ended & ~even, {}

    def close(self):
        self.closed = True


def test_execute_skill_sums_rewards_and_counts_steps_until_the_end():
    args = tiny_args(skill_horizon=5)
    skills = skimo.make_networks(args, 4, 2, "cpu")["skills"]
    envs = FakeEnvs([3, 20, 1, 20])
    obs, _ = envs.reset()
    z, trace = torch.zeros(4, 3), []
    obs, rewards, ended, steps = skimo.execute_skill(envs, skills, obs, z, np.zeros(4, dtype=bool), args, trace)
    assert rewards.tolist() == [3, 10, 3, 20] and rewards.dtype == np.float32
    assert steps.tolist() == [3, 5, 1, 5]
    assert ended.tolist() == [True, False, True, False]
    assert obs[:, 0].tolist() == [3, 5, 1, 5]
    assert [o[:, 0].tolist() for o, _, _ in trace][:3] == [[0] * 4, [1] * 4, [2, 2, 1, 2]]
    assert [e.tolist() for _, _, e in trace][:2] == [[False] * 4, [False, False, True, False]]
    action = np.tanh(np_tanh_normal(np_net(skills.skill_policy, np_input(skills, trace[1][0], z)))[0])
    np.testing.assert_allclose(trace[1][1], action, atol=1e-5)
    np.testing.assert_array_equal(trace[1][1], envs.actions[1])
    obs, rewards, ended, steps = skimo.execute_skill(envs, skills, obs, z, ended, args, [])  # who waits earns nothing
    assert rewards.tolist() == [0, 10, 0, 20] and steps.tolist() == [0, 5, 0, 5]

    envs = FakeEnvs([2, 3])
    obs, _ = envs.reset()
    skimo.execute_skill(envs, skills, obs, z[:2], np.zeros(2, dtype=bool), args, [])
    assert len(envs.actions) == 3  # nobody is left


def np_input(skills, obs, z):
    return np.concatenate([np_encode(skills.encoder, obs.astype(np.float64)), z.numpy()], -1)


def test_rollout_returns_whole_episodes_and_leaves_the_random_state_alone():
    args = tiny_args(skill_horizon=5)
    networks = skimo.make_networks(args, 4, 2, "cpu")
    starts = []

    def choose_skill(obs, episode_start):
        starts.append(episode_start.tolist())
        return torch.rand(2, 3)

    envs, before = FakeEnvs([7, 12]), torch.get_rng_state()

    def rollout(envs, *rest, **named):
        return skimo.data_tools.rollout(
            skimo.execute_skill, envs, networks["skills"], choose_skill, args, *rest, **named
        )

    returns, lengths, trace, z = rollout(envs, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert returns.tolist() == [7, 24] and lengths.tolist() == [7, 12] and envs.closed
    assert len(trace) == 13 and trace[-1][0][:, 0].tolist() == [7, 12] and trace[-1][2].all()
    assert z.shape == (2, 3, 3) and starts == [[True, True], [False, False], [False, False]]
    again = rollout(FakeEnvs([7, 12]), seed=4)[3]
    assert torch.equal(z, again)
    assert not torch.equal(z, rollout(FakeEnvs([7, 12]), seed=5)[3])
    assert rollout(FakeEnvs([70, 70]), seed=4, max_skills=2)[1].tolist() == [10] * 2


@pytest.fixture
def short_episodes(monkeypatch):
    """Maze episodes of 90 steps instead of 2,000."""
    real = data_tools.maze.MazeVectorEnv.__init__

    def short(self, num_envs=1, max_episode_steps=90, *args, **kwargs):
        real(self, num_envs, 90, *args, **kwargs)

    monkeypatch.setattr(data_tools.maze.MazeVectorEnv, "__init__", short)


def test_evaluation_leaves_the_random_state_and_the_learner_alone(short_episodes):
    args = tiny_args()
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    state, before = copy.deepcopy(learner.state_dict()), torch.get_rng_state()
    returns, lengths = skimo.evaluate(learner, args, 500)
    assert returns.shape == (2,) and lengths.tolist() == [90, 90]
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(learner.state_dict(), state)


# -------------------------------------------------------------------------------------------------------------- learner


def assert_same(a, b, path="state"):
    """Nested states are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        np.testing.assert_array_equal(a, b, path)
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def float_batch(args, B=8):
    return [torch.from_numpy(x).float() for x in rl_batch(args, B)]


def test_learner_update_moves_what_it_should():
    args = tiny_args(tau=0.1, target_update_interval=2)
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in learner.model.parameters():
            value += 0.01 * torch.randn_like(value)  # online and target differ
    start, batch = copy.deepcopy(learner), float_batch(args)
    learner.update(*batch)
    for name in ("skills", "skill_prior", "prior_encoder", "target"):
        assert same_weights(getattr(learner, name), getattr(start, name)), name
    assert not same_weights(learner.task_policy, start.task_policy)
    for part in ("encoder", "dynamics", "reward_model", "qf1", "qf2"):
        assert not same_weights(getattr(learner.model, part), getattr(start.model, part)), part
    assert same_weights(learner.model.decoder, start.model.decoder)  # no loss on it downstream
    learner.update(*batch)
    for now, old, online in zip(learner.target.parameters(), start.target.parameters(), learner.model.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), atol=1e-7, rtol=1e-5)
    assert learner.num_updates == 2
    assert same_weights(learner.skills, start.skills) and same_weights(learner.skill_prior, start.skill_prior)
    assert all(value.requires_grad for value in learner.model.parameters())


def test_policy_loss_reaches_the_policy_only():
    args = tiny_args()
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    obs, *_ = batch = float_batch(args)
    loss, _, h, h_pred = skimo.model_loss(learner.model, learner.target, learner.task_policy, *batch, args)
    learner.model.requires_grad_(False)
    parts = learner.model, learner.task_policy, learner.prior_encoder, learner.skill_prior
    skimo.policy_loss(*parts, obs, h, h_pred, learner.log_alpha.exp().detach(), args)[0].backward()
    assert has_gradient(learner.task_policy)
    for module in (learner.model, learner.prior_encoder, learner.skill_prior, learner.skills, learner.target):
        assert not has_gradient(module)
    assert learner.log_alpha.grad is None


def test_optimizers_are_those_of_the_release():
    args = tiny_args(learning_rate=2e-3, alpha_lr=3e-5)
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in learner.optimizers]
    assert rates == [2e-3, 2e-3, 3e-5]
    for optimizer in learner.optimizers:
        group = optimizer.param_groups[0]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.999), 1e-7, 0)
    sizes = [sum(p.numel() for p in optimizer.param_groups[0]["params"]) for optimizer in learner.optimizers]
    modules = learner.model, learner.task_policy
    assert sizes == [*(sum(p.numel() for p in module.parameters()) for module in modules), 1]


@pytest.mark.parametrize(("autotune", "target_kl", "direction"), [(True, 1e3, -1), (True, -1.0, 1), (False, 1e3, 0)])
def test_alpha_rises_while_the_kl_exceeds_its_target(autotune, target_kl, direction):
    args = tiny_args(autotune=autotune, target_kl=target_kl, alpha=0.5)
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    for _ in range(3):
        metrics = learner.update(*float_batch(args))
    assert np.sign(round(learner.log_alpha.exp().item() - 0.5, 6)) == direction
    assert metrics["alpha"].item() == pytest.approx(0.5, rel=1e-2)


def test_pretrainer_follows_its_learning_rate_and_moves_the_target():
    args = tiny_args(pretrain_updates=2000, pretrain_lr=0.01, pretrain_tau=0.1, tau=0.7)
    trainer = skimo.Pretrainer(args, skimo.make_networks(args, 4, 2, "cpu"))
    start = copy.deepcopy(trainer.target)
    batch = [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    trainer.update(*batch)
    assert same_weights(trainer.target, start)
    trainer.update(*batch)
    for now, old, online in zip(
        trainer.target.parameters(), start.parameters(), trainer.networks["model"].parameters()
    ):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), atol=1e-7, rtol=1e-5)
    rates = {}
    for update in (0, 249, 499, 999, 1999):
        trainer.num_updates = update
        trainer.update(*batch)
        rates[update] = trainer.optimizers[0].param_groups[0]["lr"]
    expected = {0: 0.01 / 500, 249: 0.005 * math.sqrt(1751 / 2000), 499: 0.01 * math.sqrt(1501 / 2000)}
    assert rates == pytest.approx(expected | {999: 0.01 * math.sqrt(1001 / 2000), 1999: 0.01 * math.sqrt(1 / 2000)})
    args = tiny_args(pretrain_lr_decay=False, pretrain_lr=0.01)
    trainer = skimo.Pretrainer(args, skimo.make_networks(args, 4, 2, "cpu"))
    trainer.update(*batch)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.01


# -------------------------------------------------------------------------------------------------------- it does learn


def constant_direction_data(seed, episodes=60, skills=12, H=5):
    """Each chunk of H actions pushes into one random direction, which is what a skill has to encode."""
    rng = np.random.default_rng(seed)
    length = skills * H
    actions = np.repeat(rng.uniform(-0.9, 0.9, (episodes, skills, 2)), H, 1)
    position = 20 + np.concatenate([np.zeros((episodes, 1, 2)), actions.cumsum(1)[:, :-1]], 1)
    obs = np.concatenate([position, np.zeros_like(position)], -1)
    ends = np.tile(np.arange(length) == length - 1, episodes)
    arrays = obs.reshape(-1, 4), actions.reshape(-1, 2), ends, np.zeros_like(ends)
    return data_tools.OfflineDataset(*(np.asarray(x) for x in arrays))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pretraining_learns_skills_and_their_dynamics(seed):
    H, N = 5, 2
    args = tiny_args(
        hidden_dim=32, latent_dim=16, skill_dim=3, num_skills=N, pretrain_skills=N, bc_chunks=N,
        pretrain_updates=700, kl_coef=1e-4,
        pretrain_batch_size=64, pretrain_lr=3e-3, position_features=False,
    )  # fmt: skip
    data = constant_direction_data(seed, H=H)
    torch.manual_seed(seed)
    trainer = skimo.Pretrainer(args, skimo.make_networks(args, 4, 2, "cpu"))
    for _ in range(args.pretrain_updates):
        # windows that start with a chunk, so that its direction is one skill's business
        row = torch.randint(60, (64, 1)) * 60 + H * torch.randint(10, (64, 1)) + torch.arange(N * H + 1)
        trainer.update(data.observations[row], data.actions[row[:, :-1]])
    networks = trainer.networks
    test = constant_direction_data(seed + 100, H=H)
    row = torch.arange(60)[:, None] * 60 + torch.arange(N * H + 1)
    obs, actions = test.observations[row], test.actions[row[:, :-1]]
    with torch.no_grad():
        chunks = obs[:, :-1].unflatten(1, (N, H))
        q = networks["skills"].encode_skill(chunks, actions.unflatten(1, (N, H)))
        z = torch.tanh(q[0])
        imitated = networks["skills"].act(chunks, z[:, :, None].expand(-1, -1, H, -1))
        bc_error = (imitated - actions.unflatten(1, (N, H))).square().mean().item()
        h = networks["model"].encoder(obs[:, 0])
        for i in range(N):
            h = networks["model"].next(h, z[:, i])
        predicted = networks["model"].decode(h)[0]
        scaled = networks["model"].encoder.scaled(obs)
        miss = (predicted - scaled[:, -1])[:, :2].square().mean().item()
        still = (scaled[:, 0] - scaled[:, -1])[:, :2].square().mean().item()
    assert bc_error < 0.1 * actions.var().item()  # of predicting the mean action
    assert miss < 0.3 * still  # of predicting that nothing moves


def skill_mdp(args, rb, episodes, seed):
    """Fill a buffer by random skills; the reward is best, 1, for the skill (0.8, -0.6) and falls with its distance."""
    rng = np.random.default_rng(seed)
    E = args.num_envs
    for _ in range(episodes // E):
        obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
        for t in range(4):
            z = rng.uniform(-1, 1, (E, 2)).astype(np.float32)
            next_obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
            rb.add(obs, torch.from_numpy(z), skill_reward(z).astype(np.float32), np.full(E, t == 3), next_obs)
            obs = next_obs


def skill_reward(z):
    return 1 - np.square(z - [0.8, -0.6]).sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_learner_and_planner_find_the_skills_that_pay(seed):
    args = tiny_args(
        skill_dim=2, num_skills=2, bc_chunks=2, num_envs=10, batch_size=64, hidden_dim=32, latent_dim=8, alpha=0.01,
        autotune=False, gamma=0.5, num_samples=64, num_elites=16, cem_iters=4, temperature=5.0, learning_rate=3e-3,
        position_features=False, skill_horizon=5,
    )  # fmt: skip
    torch.manual_seed(seed)
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    rb = skimo.ReplayBuffer(4, args, torch.device("cpu"))
    skill_mdp(args, rb, 300, seed)
    for _ in range(400):
        metrics = learner.update(*rb.sample(args.batch_size))
    assert metrics["reward_loss"].item() / args.num_skills < 0.2  # 0.8 is what predicting the mean reward costs
    obs = np.random.default_rng(seed + 9).uniform(5, 35, (200, 4)).astype(np.float32)
    with torch.no_grad():
        h = learner.model.encoder(torch.from_numpy(obs))
        prior = skimo.sample(skimo.tanh_normal(learner.skill_prior(learner.prior_encoder(torch.from_numpy(obs)))))
        policy = skimo.sample(skimo.tanh_normal(learner.task_policy(h)))
    planner = skimo.Planner(learner.model, learner.task_policy, args, learner.device)
    planned = planner(obs, np.ones(200, dtype=bool), 10**6, explore=False)
    assert skill_reward(prior.numpy()).mean() < 0.2
    assert skill_reward(policy.numpy()).mean() > 0.8
    assert skill_reward(planned.numpy()).mean() > 0.85


# --------------------------------------------------------------------------------------------- runs within this process

SMALL = (
    "--device cpu --no-compile --num-threads 1 --hidden-dim 16 --latent-dim 8 --skill-dim 3 --num-skills 3 "
    "--pretrain-skills 3 "
    "--bc-chunks 2 --num-envs 2 --batch-size 8 --num-samples 16 --num-policy-trajs 4 --num-elites 6 --cem-iters 2 "
    "--eval-episodes 2 --pretrain-batch-size 8 --pretrain-updates 6 --pretrain-eval-episodes 1"
)
QUICK = (
    f"{SMALL} --skill-horizon 5 --total-timesteps 1200 --warmup-steps 400 --updates-per-step 0.05 --eval-interval 500 "
    "--horizon-steps 800 --std-steps 800 --plan-start wide"  # plans of several skills, that start from the last one
)


@pytest.fixture
def run(short_episodes, monkeypatch, data_dir, tmp_path):
    """run(flags, folder) starts main() on short episodes and without pictures; returns results and run folder."""
    for name in ("plot_prediction", "plot_visited"):
        monkeypatch.setattr(data_tools, name, lambda *args: None)

    def start(flags="", folder="runs", data=data_dir):
        argv = [*QUICK.split(), "--data-dir", str(data), "--run-dir", str(tmp_path / folder), *flags.split()]
        results = skimo.main(skimo.parse_args(argv))
        return results, only_run(tmp_path / folder)

    return start


def only_run(folder):
    (run_dir,) = Path(folder).iterdir()
    return run_dir


def resume(run_dir, flags=""):
    return skimo.main(skimo.parse_args(["--resume", str(run_dir), *flags.split()]))


def count_calls(monkeypatch, owner, name, counts=lambda *args, **kwargs: True, at=None, then=None):
    """Wrap owner.name: the list returned gets an entry per call that counts; call number `at` runs then() as well."""
    original, calls = getattr(owner, name), []

    def wrapper(*args, **kwargs):
        if counts(*args, **kwargs):
            calls.append(args)
            if len(calls) == at:
                then()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def test_logged_losses_are_means_over_100_updates_of_copies():
    run, logged = object.__new__(data_tools.Run), []
    run.history, run.log = {}, lambda *facts: logged.append(facts)
    value = torch.zeros(())
    for update in range(250):
        value.fill_(update)  # in place, as a CUDA graph does
        run.log_update("losses", dict(a=value, b=-value), 10 * update)
        run.log_update("pretrain", dict(c=value), update) if update < 50 else None  # another group, never full
    assert logged == [("losses", dict(a=49.5, b=-49.5), 990), ("losses", dict(a=149.5, b=-149.5), 1990)]


def test_losses_that_are_no_numbers_end_the_run_with_a_sentence(tmp_path):
    run = object.__new__(data_tools.Run)
    run.history, run.log, run.dir = {}, lambda *facts: None, tmp_path
    metrics = dict(a=torch.tensor(1.0), b=torch.tensor(torch.nan))
    for _ in range(99):
        run.log_update("losses", metrics, 0)
    with pytest.raises(data_tools.DataError, match="losses/b is no number .* --resume "):
        run.log_update("losses", metrics, 0)


@pytest.mark.parametrize("saves", [True, False])
def test_learning_that_diverges_is_one_sentence_and_keeps_the_checkpoint(run, capsys, monkeypatch, tmp_path, saves):
    def poison():
        updates[-1][0].task_policy[0].weight.data[0, 0] = torch.nan

    updates = count_calls(monkeypatch, skimo.Learner, "update", at=27, then=poison)  # at 540 env steps
    message = "is no number any more" if saves else "expected finite numbers of shape (2, 2)"
    flags = f"--eval-interval 0 --checkpoint-interval {10 if saves else 500}"
    refused(capsys, lambda: run(flags), message, "lower", "learning rate", "--resume")
    kept = final_state(only_run(tmp_path / "runs"))
    assert all(weight.isfinite().all() for weight in kept["learner"]["weights"].values())
    assert kept["run"]["global_step"] == (530 if saves else 500)


class Stop:
    """In place of StopSignal; all of them stop when `requested` is set on the class."""

    requested = False


@pytest.fixture
def stop(monkeypatch):
    monkeypatch.setattr(Stop, "requested", False)
    monkeypatch.setattr(data_tools.runs, "StopSignal", Stop)
    return lambda: setattr(Stop, "requested", True)


def csv_rows(run_dir):
    with (run_dir / "episodes.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["env_step", "episodic_return", "episodic_length", "rl_minutes"]
    return [row[:3] for row in rows]


@pytest.mark.parametrize("ratio", [0.05, 0.0133])
def test_updates_keep_step_with_the_environments(run, monkeypatch, ratio):
    steps_of_plans = []
    original = skimo.Planner.__call__

    def planned(self, obs, episode_start, global_step, explore):
        steps_of_plans.extend([global_step] * explore)
        return original(self, obs, episode_start, global_step, explore)

    monkeypatch.setattr(skimo.Planner, "__call__", planned)
    results, run_dir = run(f"--updates-per-step {ratio}")
    assert results["env_steps"] == 1200  # two environments, skills of 5 steps
    assert results["updates"] == int(1200 * ratio)
    assert steps_of_plans == list(range(400, 1200, 10))  # the prior acts before
    assert csv_rows(run_dir) == [[str(180 * k), "0.0", "90"] for k in range(1, 7) for _ in range(2)]
    assert [step for step, _, _ in results["evaluations"]] == [500, 1000, 1200]
    assert results["pretraining"]["updates"] == 6 and json.loads((run_dir / "results.json").read_text())["updates"] > 0


def final_state(run_dir):
    """All that the future of a run depends on, from its checkpoint; clock times left out."""
    state = data_tools.load_checkpoint(run_dir / "checkpoint.pt", {}, "cpu")
    run = state["run"]
    del run["seconds"]
    run["facts"].pop("minutes", None)
    return state | dict(run=run | dict(episodes=[row[:3] for row in run["episodes"]]))


@pytest.mark.parametrize("interrupt", ["in the warm-up", "while planning", "between updates", "by its length"])
def test_resumed_run_equals_an_uninterrupted_one(run, monkeypatch, stop, interrupt):
    results, whole = run("", "whole")

    def no_data(*args):  # the checkpoint holds all networks
        raise AssertionError

    if interrupt == "by its length":
        _, part = run("--total-timesteps 600", "part")
        monkeypatch.setattr(data_tools.runs, "load_dataset", no_data)
        resumed = resume(part, "--total-timesteps 1200")
    else:
        if interrupt == "between updates":
            count_calls(monkeypatch, skimo.Learner, "update", at=27, then=stop)
        else:
            at = 17 if interrupt == "in the warm-up" else 77
            count_calls(monkeypatch, skimo.ReplayBuffer, "add", at=at, then=stop)
        with pytest.raises(SystemExit, match="stopped at env step .* go on with: .*--resume"):
            run("", "part")
        part = only_run(whole.parents[1] / "part")
        assert not (part / "results.json").exists()
        stopped = final_state(part)
        steps, updates = {"in the warm-up": (170, 0), "while planning": (770, 38)}.get(interrupt, (540, 27))
        assert stopped["learner"]["num_updates"] == updates
        assert stopped["run"]["global_step"] == steps or interrupt == "between updates"
        Stop.requested = False
        monkeypatch.setattr(data_tools.runs, "load_dataset", no_data)
        resumed = resume(part)
    a, b = final_state(whole), final_state(part)
    if interrupt == "by its length":
        a["run"].pop("evaluations"), b["run"].pop("evaluations")
    assert_same(b, a)
    assert csv_rows(part) == csv_rows(whole)
    for key in ("env_steps", "updates", "last_100_return"):
        assert resumed[key] == results[key]
    assert resumed["evaluations"][-1] == results["evaluations"][-1]


def test_rl_does_not_depend_on_where_the_model_comes_from(run, capsys):
    _, fresh = run("", "fresh")
    assert "pre-trained model:" not in capsys.readouterr().out
    _, cached = run("", "cached")
    assert "pre-trained model:" in capsys.readouterr().out
    assert_same(final_state(cached), final_state(fresh))


def pretrained_files(data_dir):
    return sorted(path.name for path in (data_dir / "pretrained").iterdir())


def test_pretrained_models_are_found_by_what_shaped_them(run, data_dir, tmp_path, monkeypatch, capsys):
    updates = count_calls(monkeypatch, skimo.Pretrainer, "update")
    short = "--total-timesteps 400 --eval-interval 0 --eval-episodes 1"
    run(short, "first")
    (first,) = pretrained_files(data_dir)
    assert len(updates) == 6
    run(f"{short} --warmup-steps 300 --alpha 0.3 --no-autotune --exp-name other", "same")  # nothing of phase 1
    assert len(updates) == 6 and pretrained_files(data_dir) == [first]
    run(f"{short} --retrain --no-capture-video", "again")
    assert len(updates) == 12 and pretrained_files(data_dir) == [first]
    for k, changed in enumerate(("--seed 2", "--kl-coef 0.5", "--no-pretrain-lr-decay", "--no-position-features")):
        run(f"{short} --no-retrain {changed}", f"changed{k}")
        assert len(updates) == 18 + 6 * k and len(pretrained_files(data_dir)) == 2 + k
    empty = tmp_path / "empty"
    run(f"{short} --pretrained {data_dir / 'pretrained' / first}", "path", data=empty)  # needs no data
    assert len(updates) == 36 and not empty.exists()
    assert str(data_dir / "pretrained" / first) in capsys.readouterr().out


@pytest.mark.parametrize("by", ["the same command", "resume"])
def test_interrupted_pretraining_goes_on_bit_for_bit(by, run, data_dir, tmp_path, tiny_data_file, monkeypatch, stop):
    flags = "--total-timesteps 400 --pretrain-eval-interval 2"
    whole_data = tmp_path / "whole_data"
    whole_data.mkdir()
    shutil.copy(tiny_data_file, whole_data / DATA_FILE)
    run(flags, "whole", data=whole_data)
    calls = count_calls(monkeypatch, skimo.Pretrainer, "update", at=3, then=stop)
    with pytest.raises(SystemExit, match="stopped in pre-training; the same command, or --resume"):
        run(flags, "part")
    (unfinished,) = pretrained_files(data_dir)
    assert unfinished.endswith(".unfinished") and len(calls) == 3
    Stop.requested = False
    if by == "the same command":
        run(flags, "rest")
    else:
        resume(only_run(tmp_path / "part"))
    (name,) = pretrained_files(data_dir)
    assert name.endswith(".pt") and len(calls) == 6
    states = [torch.load(folder / "pretrained" / name, weights_only=True) for folder in (data_dir, whole_data)]
    for state in states:
        state["facts"].pop("minutes")
    assert_same(*states)
    assert_same(
        final_state(only_run(tmp_path / ("rest" if by == "the same command" else "part"))),
        final_state(only_run(tmp_path / "whole")),
    )


def test_interrupted_pretraining_serves_runs_with_other_arguments(run, tmp_path, monkeypatch, stop):
    """Its file is found by what shapes the model; it knows nothing of the environments and of when to evaluate."""
    calls = count_calls(monkeypatch, skimo.Pretrainer, "update", at=3, then=stop)
    with pytest.raises(SystemExit, match="stopped in pre-training"):
        run("--total-timesteps 600 --eval-interval 0", "part")
    Stop.requested = False
    results, _ = run("--total-timesteps 600 --num-envs 3 --eval-interval 300", "rest")
    assert len(calls) == 6 and results["seconds"]["env"] > 0
    assert [step for step, _, _ in results["evaluations"]] == [300, 600]


# ----------------------------------------------------------------------------------------------------- the other tasks


@pytest.fixture
def manipulation(run, monkeypatch, tmp_path):
    """manipulation(env_id, flags, folder): run() on 60-step episodes of another task, with random data."""
    sizes = {"kitchen": (60, 9), "calvin": (21, 7)}
    rng = np.random.default_rng(0)
    timeouts = np.arange(1, 241) % 60 == 0
    for task, (obs_dim, action_dim) in sizes.items():
        arrays = rng.normal(size=(240, obs_dim)), rng.uniform(-1, 1, (240, action_dim)), np.zeros(240, bool), timeouts
        path = tmp_path / "random" / f"{task}_noise{data_tools.dataset.NOISE[task]}_seed0_v1.hdf5"
        data_tools.OfflineDataset(*arrays).save(path)
    for cls in (data_tools.kitchen.KitchenVectorEnv, data_tools.calvin.CalvinVectorEnv):
        real = cls.__init__
        monkeypatch.setattr(cls, "__init__", functools.partialmethod(real, max_episode_steps=60))
    return lambda env_id, flags, folder: run(
        f"--env-id {env_id} --dataset scripted --total-timesteps 900 --warmup-steps 300 {flags}",
        folder,
        tmp_path / "random",
    )


def test_kitchen_tasks_share_a_model(manipulation, capsys, tmp_path):
    results, run_dir = manipulation("kitchen", "", "kitchen")
    assert "__scripted__" in run_dir.name and results["pretraining"]["data"]["source"] == "scripted"
    assert {"prior_return", "microwave", "any_order"} <= results["pretraining"].keys()
    assert results["env_steps"] == 900 and results["updates"] > 0 and csv_rows(run_dir)[0][1:] == ["0.0", "60"]
    capsys.readouterr()
    results, _ = manipulation("kitchen-misaligned", "", "misaligned")
    (model,) = pretrained_files(tmp_path / "random")
    assert f"pre-trained model: {tmp_path / 'random' / 'pretrained' / model}" in capsys.readouterr().out
    assert resume(run_dir, "--total-timesteps 1000")["env_steps"] == 1000
    path = tmp_path / "random" / "pretrained" / model
    refused(capsys, lambda: manipulation("kitchen", f"--pretrained {path} --dataset d4rl", "other"), "scripted data")
    refused(capsys, lambda: manipulation("maze", f"--pretrained {path}", "maze"), "env_id 'kitchen'", "'maze'")


def test_calvin_runs_with_one_skill_windows(manipulation):
    results, run_dir = manipulation("calvin", "--num-skills 1 --pretrain-skills 1 --bc-chunks 1", "calvin")
    assert {"prior_return", "drawer", "any_order"} <= results["pretraining"].keys()
    assert results["env_steps"] == 900 and csv_rows(run_dir)[0][1:] == ["0.0", "60"]


# ------------------------------------------------------------------------------------------------------------ bad input


def refused(capsys, call, *words):
    """call() ends with exit code 1 and one sentence that holds the words."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--env-id labyrinth", ["labyrinth", "maze"]),
        ("--resume nowhere", ["nowhere", "no run folder"]),
        ("--bc-chunks 4", ["--bc-chunks", "--pretrain-skills"]),
        ("--num-elites 21", ["--num-elites", "--num-samples"]),
        ("--num-envs 0", ["--num-envs 0 does not work; give at least 1"]),
        ("--batch-size 0", ["--batch-size"]),
        ("--pretrain-eval-episodes 0", ["--pretrain-eval-episodes"]),
        ("--cem-iters 0", ["--cem-iters"]),
        ("--hidden-dim -1", ["--hidden-dim"]),
        ("--seed -1", ["--seed -1 does not work; give at least 0"]),
        ("--alpha 0", ["--alpha"]),
        ("--learning-rate -1", ["--learning-rate"]),
        ("--updates-per-step nan", ["--updates-per-step"]),
        ("--reward-scale inf", ["--reward-scale"]),
        ("--tau 2", ["--tau 2.0 is too large"]),
        ("--num-skills 401", ["2005 env steps", "--num-skills", "--skill-horizon"]),
        ("--pretrained published --retrain", ["--pretrained", "--retrain"]),
        ("--pretrained missing.pt", ["missing.pt", "does not exist"]),
        ("--pretrain-skills 200 --skill-horizon 10", ["rows", "shorter"]),
    ],
)
def test_senseless_flags_are_refused_with_a_sentence(run, capsys, flags, words):
    refused(capsys, lambda: run(flags), *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none(run, capsys):
    refused(capsys, lambda: run("--device cuda"), "--device cuda", "--device cpu")


def test_damaged_or_foreign_checkpoints_are_refused(run, capsys, data_dir):
    _, run_dir = run("--total-timesteps 400")
    path = run_dir / "checkpoint.pt"
    whole = path.read_bytes()
    (model,) = (data_dir / "pretrained").iterdir()

    def again():
        return resume(run_dir)

    for part in (len(whole) // 2, 10, 0):
        path.write_bytes(whole[:part])
        refused(capsys, again, "checkpoint.pt", "damaged")
        assert path.read_bytes() == whole[:part]
    path.write_bytes(whole)
    for name, value in (("env_id", "kitchen"), ("file_version", 0), ("latent_dim", 64)):
        state = data_tools.load_checkpoint(path, {}, "cpu")
        state["meta"][name] = value
        torch.save(state, path)
        refused(capsys, again, name, repr(value))
        path.write_bytes(whole)
    path.write_bytes(model.read_bytes())
    refused(capsys, again, "kind", "skimo pretrained")
    torch.save({"weights": torch.zeros(3)}, path)
    refused(capsys, again, "no checkpoint of this project")
    path.write_bytes(whole)
    refused(capsys, lambda: resume(run_dir, "--hidden-dim 32"), "hidden_dim")
    refused(capsys, lambda: resume(run_dir, "--num-envs 3"), "num_envs")
    refused(capsys, lambda: resume(run_dir, "--num-skills 4"), "num_skills")
    assert len(list((data_dir / "pretrained").iterdir())) == 1  # refused before other networks are pre-trained
    assert again()["env_steps"] == 400  # and the folder's own arguments are still there
    cut = model.read_bytes()[:1000]
    model.write_bytes(cut)
    refused(capsys, lambda: run("", "cut"), str(model), "damaged")


def test_damaged_data_are_refused(run, capsys, data_dir):
    import h5py

    path = data_dir / DATA_FILE
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    refused(capsys, run, DATA_FILE, "HDF5")
    path.write_bytes(whole)
    with h5py.File(path, "r+") as file:
        file["observations"][7, 1] = np.nan
    refused(capsys, lambda: run("", "nan"), DATA_FILE, "NaN")


def test_places_that_cannot_be_written_are_refused(run, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    refused(capsys, lambda: run("", "file/runs"), "--run-dir")
    refused(capsys, lambda: run("", data=tmp_path / "file" / "data"), "--data-dir")


def test_model_that_could_not_be_written_is_not_begun(run, capsys, monkeypatch, data_dir):
    (data_dir / "pretrained").write_text("no folder")
    updates = count_calls(monkeypatch, skimo.Pretrainer, "update")
    refused(capsys, run, "cannot write", "--data-dir")
    assert not updates


def test_resumed_run_keeps_its_model_and_an_old_log(run, capsys):
    _, run_dir = run("--total-timesteps 400")
    for flags, word in (
        ("--seed 7", "--seed"),
        ("--pretrained published", "--pretrained"),
        ("--kl-coef 1", "--kl-coef"),
    ):
        refused(capsys, lambda flags=flags: resume(run_dir, flags), word, "--resume")
    before = csv_rows(run_dir)
    (run_dir / "checkpoint.pt").unlink()
    resume(run_dir)
    assert csv_rows(run_dir) == before
    assert (run_dir / "episodes_before.csv").read_text().count("\n") == 1 + len(before)


def test_full_disk_keeps_the_old_checkpoint(run, capsys, monkeypatch, tmp_path):
    run_dir, original, saves = tmp_path / "runs", torch.save, []

    def save(state, path):
        saves.append(Path(path).name)
        if len(saves) == 3:  # the model, then the first and the second checkpoint
            Path(path).write_bytes(b"half a checkpoint")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(state, path)

    monkeypatch.setattr(torch, "save", save)
    refused(capsys, lambda: run("--checkpoint-interval 500"), "checkpoint.pt", "No space left", "free some space")
    run_dir = only_run(run_dir)
    assert final_state(run_dir)["run"]["global_step"] == 500
    assert not list(run_dir.glob("part_*"))
    monkeypatch.setattr(torch, "save", original)
    assert resume(run_dir)["env_steps"] == 1200


# ------------------------------------------------------------------------------------------- runs as a user starts them

SKIMO = Path(skimo.__file__)


def command(data_dir, tmp_path, flags="", folder="runs"):
    places = ["--data-dir", str(data_dir), "--run-dir", str(tmp_path / folder)]
    return [sys.executable, str(SKIMO), *SMALL.split(), "--skill-horizon", "10", *places, *flags.split()]


def finish(arguments, cwd, **kwargs):
    return subprocess.run(arguments, cwd=cwd, capture_output=True, text=True, timeout=600, **kwargs)


def test_command_line_from_another_folder(data_dir, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--pretrain-updates 100 --total-timesteps 4200 --warmup-steps 1000 --updates-per-step 0.03 --capture-video"
    cwd = tmp_path / "elsewhere"
    cwd.mkdir()
    result = finish(command(data_dir, tmp_path, flags), cwd)
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr and "clean evaluation" in result.stdout
    assert list(cwd.iterdir()) == []
    run_dir = only_run(tmp_path / "runs")
    assert run_dir.name.startswith("maze__skimo__scripted__1__")
    files = "args.json checkpoint.pt episodes.csv evaluation.mp4 prediction.png results.json visited.png"
    assert sorted(path.name for path in run_dir.iterdir() if "tfevents" not in path.name) == files.split()
    assert (run_dir / "evaluation.mp4").read_bytes()[4:8] == b"ftyp"
    for name in ("prediction.png", "visited.png"):
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")
    assert json.loads((run_dir / "args.json").read_text())["total_timesteps"] == 4200
    results = json.loads((run_dir / "results.json").read_text())
    assert results["env_steps"] == 4200 and results["updates"] == 126
    assert csv_rows(run_dir) == [["4000", "0.0", "2000"]] * 2

    log = EventAccumulator(str(run_dir))
    log.Reload()
    scalars = set(log.Tags()["scalars"])
    names = "charts/{episodic_return,episodic_length,success,SPS} eval/{episodic_return,episodic_length,success} "
    names += "losses/{consistency_loss,reward_loss,value_loss,policy_loss,prior_kl,alpha,q_value,td_target,policy_q} "
    names += "pretrain/{bc_loss,kl_loss,prior_loss,recon_loss,consistency_loss,valid_bc_loss,goal} "
    names += "time/{plan,env,update}"
    for group in names.split():
        group, members = group.rstrip("}").split("{")
        assert {group + member for member in members.split(",")} <= scalars
    assert log.Scalars("charts/episodic_return")[0].step == 4000
    assert {"pictures/prediction", "pictures/visited"} <= set(log.Tags()["images"])

    result = finish(command(data_dir, tmp_path, f"{flags} --no-capture-video", "second"), cwd)
    assert result.returncode == 0, result.stderr
    assert "pre-trained model:" in result.stdout and "pre-training:" not in result.stderr
    again = only_run(tmp_path / "second")
    assert not (again / "evaluation.mp4").exists()
    assert_same(final_state(again), final_state(run_dir))  # the same seed, the same run


def wait_for(process, log, text, seconds=400):
    """Until the process has written text, in its error stream log."""
    limit = time.time() + seconds
    while text not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.time() < limit, log.read_text()
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_program_saves_and_goes_on(data_dir, tmp_path, number):
    log = tmp_path / "stderr"
    flags = "--pretrain-updates 6" if number == signal.SIGINT else "--pretrain-updates 400"
    arguments = command(data_dir, tmp_path, f"{flags} --total-timesteps 100000 --warmup-steps 4000")
    with log.open("w") as file:
        process = subprocess.Popen(arguments, cwd=tmp_path, stdout=subprocess.PIPE, stderr=file, text=True)
    with process:
        phase = "episodic_return" if number is None else ("RL:" if number == signal.SIGINT else "pre-training:")
        wait_for(process, log, phase)
        time.sleep(0.3)
        process.send_signal(number)
        out, _ = process.communicate(timeout=400)
    assert process.returncode == 1 and "Traceback" not in log.read_text()
    assert "stopping: saves at the next safe point" in out
    run_dir = only_run(tmp_path / "runs")
    if number == signal.SIGTERM:
        assert "stopped in pre-training; the same command, or --resume" in log.read_text()
        assert len(pretrained_files(data_dir)) == 1 and pretrained_files(data_dir)[0].endswith(".unfinished")
        result = finish([*arguments, "--total-timesteps", "400", "--run-dir", str(tmp_path / "rest")], tmp_path)
        assert "pre-training goes on at update" in result.stdout
    else:
        assert f"--resume {run_dir}" in log.read_text()
        step = final_state(run_dir)["run"]["global_step"]
        assert 0 < step < 100_000
        resumed = [sys.executable, str(SKIMO), "--resume", str(run_dir), "--total-timesteps", str(step + 100)]
        result = finish(resumed, tmp_path)
        assert final_state(run_dir)["run"]["global_step"] == step + 100
    assert result.returncode == 0, result.stderr
    assert "clean evaluation" in result.stdout


def test_disk_that_fills_up_is_reported(data_dir, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))  # no file may grow larger

    result = finish(command(data_dir, tmp_path, "--total-timesteps 400"), tmp_path, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "error: cannot write" in result.stderr and "free some space" in result.stderr
    assert not list(tmp_path.rglob("part_*"))


def test_kill_while_writing_keeps_the_old_checkpoint(tmp_path):
    script = """
        import os, signal, sys, torch
        import data_tools
        original = torch.save
        def save(state, path):
            original(state, path)
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        data_tools.save_checkpoint(sys.argv[1], dict(step=torch.tensor(1)), dict(kind="test"))
        torch.save = save
        data_tools.save_checkpoint(sys.argv[1], dict(step=torch.tensor(2)), dict(kind="test"))
    """
    path = tmp_path / "checkpoint.pt"
    environment = os.environ | {"PYTHONPATH": str(SKIMO.parents[1])}
    result = finish([sys.executable, "-c", textwrap.dedent(script), str(path)], tmp_path, env=environment)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert data_tools.load_checkpoint(path, dict(kind="test"), "cpu")["step"] == 1


# --------------------------------------------------------------------------------------------------------- command line


def test_compilation_follows_the_device(tmp_path):
    (tmp_path / "args.json").write_text(json.dumps(dict(device="cuda", compile=True)))
    for flags, value in {"--device cuda": True, "--device cpu": False, "--device cpu --compile": True}.items():
        for more in ("", f"--resume {tmp_path}"):
            assert skimo.parse_args([*flags.split(), *more.split()]).compile is value
    assert skimo.parse_args(["--device", "cuda", "--no-compile"]).compile is False


def test_defaults_are_those_of_the_task(monkeypatch):
    monkeypatch.setitem(data_tools.TASKS, "calvin", "none")
    monkeypatch.setitem(data_tools.TASKS, "kitchen", "none")
    table = {name: skimo.parse_args(["--env-id", name]) for name in ("maze", "kitchen", "calvin")}

    def row(name):
        return [getattr(table[task], name) for task in ("maze", "kitchen", "calvin")]

    assert row("hidden_dim") == [128, 128, 256] and row("latent_dim") == [128, 256, 256]
    assert row("num_skills") == [10, 10, 1] and row("skill_encoder") == ["mlp", "lstm", "lstm"]
    assert row("batch_size") == [128, 256, 256] and row("warmup_steps") == [50_000, 5_000, 5_000]
    assert row("alpha") == [1, 0.05, 0.1] and row("autotune") == [True, False, False]
    assert row("policy_latents") == ["imagined", "encoded", "imagined"]  # calvin: N = 1, no difference
    assert row("horizon_steps") == [1_000_000, 25_000, 25_000]
    assert row("std_steps") == [300_000, 25_000, 25_000] and row("reward_scale") == [1, 1, 0.01]
    for name, value in dict(
        num_policy_trajs=25, momentum=0.1, plan_std=2.0, temperature=0.5, tau=0.05, plan_start="policy",
        num_samples=128, num_elites=32, cem_iters=3, explore_std=0.05,
        explore_std_end=0.01, gamma=0.99, rho=0.5, pretrain_tau=0.01, target_update_interval=2, bc_coef=2.0,
        consistency_coef=2.0, reward_coef=0.25, value_coef=0.1, learning_rate=1e-3, alpha_lr=3e-4, max_grad_norm=100.0,
        target_kl=3.0, skill_horizon=10, skill_dim=10, updates_per_step=0.02,
    ).items():  # fmt: skip
        assert row(name) == [value] * 3, name
    assert skimo.parse_args(["--env_id=maze", "--batch-size", "7"]).batch_size == 7


BOOLS = [field.name for field in dataclasses.fields(skimo.Args) if field.type in (bool, bool | None)]


@pytest.mark.parametrize("name", BOOLS)
def test_bool_flags_go_both_ways(name):
    flag = name.replace("_", "-")
    for given, value in ((f"--{flag}", True), (f"--no-{flag}", False)):
        try:
            args = skimo.parse_args([given])
        except SystemExit:
            args = skimo.parse_args([f"--{flag}", str(value)])  # how tyro spells a switch that may also be None
        assert getattr(args, name) is value


def test_every_bool_flag_is_known_to_the_runs_above():
    known = {"compile", "capture_video", "retrain", "pretrain_lr_decay", "autotune", "position_features"}
    known |= {"allow_pickle", "accept_any_data"}  # tests/test_dataset.py
    assert set(BOOLS) == known


@pytest.mark.parametrize(
    "flags",
    [
        "--skill-encoder lstm --policy-latents h0",
        "--policy-latents encoded --num-skills 1 --pretrain-skills 1 --bc-chunks 1",
    ],
)
def test_variants_run(run, flags):
    results, _ = run(f"{flags} --total-timesteps 600")
    assert results["updates"] == 30


# ---------------------------------------------------------------------------------------------------------- compilation

needs_compiler = pytest.mark.skipif(not shutil.which("g++") and not shutil.which("clang++"), reason="no C++ compiler")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DEVICES = [pytest.param("cpu", marks=needs_compiler), pytest.param("cuda", marks=needs_cuda)]


def few_updates(args, device):
    """Four rounds of pre-training, RL and planner; returns all numbers and the gradients' running means of the first.

    Four, as a CUDA graph is warmed up in the first, recorded in the second, and only replayed from then on.
    """
    torch.manual_seed(0)
    networks = skimo.make_networks(args, 4, 2, device)
    pretrainer, learner = skimo.Pretrainer(args, copy.deepcopy(networks)), skimo.Learner(args, networks)
    planner = skimo.Planner(learner.model, learner.task_policy, args, learner.device)
    window = [torch.from_numpy(x).float().to(device) for x in pretraining_batch(args)]
    batch, numbers = [x.to(device) for x in float_batch(args, 4)], {}
    obs = random_obs(np.random.default_rng(0), 3).astype(np.float32)
    for k in range(4):
        torch.manual_seed(k)
        for phase, metrics in (("pretrain", pretrainer.update(*window)), ("learner", learner.update(*batch))):
            numbers |= {f"{phase} {name} {k}": value.cpu() for name, value in metrics.items()}
        for optimizer in (*pretrainer.optimizers, *learner.optimizers[:2]):
            for group in optimizer.param_groups:
                for i, value in enumerate(group["params"]):
                    if k == 0 and value in optimizer.state:
                        numbers[f"gradient {len(group['params'])} {i}"] = (
                            optimizer.state[value]["exp_avg"].cpu().clone()
                        )
        torch.manual_seed(k)
        numbers[f"skill {k}"] = planner(obs, np.array([False, True, False]), 10**6, explore=True)
        numbers[f"plan {k}"] = planner.last_mean.cpu().clone()
    return numbers


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_gives_the_numbers_of_eager_code(device, monkeypatch, eager_random):
    args = tiny_args(
        num_skills=2, pretrain_skills=2, bc_chunks=1, hidden_dim=8, latent_dim=4, cem_iters=1, pretrain_lr_decay=False
    )
    eager = few_updates(args, device)
    compiled_functions = []
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled_functions.append(f) or compile_function(f, **kw))
    compiled = few_updates(dataclasses.replace(args, compile=True), device)
    assert set(compiled_functions) == {skimo.pretrain_loss, skimo.model_loss, skimo.policy_loss, skimo.plan}
    assert compiled.keys() == eager.keys() and len(eager) > 60
    planned = () if torch.torch_version.TorchVersion(torch.__version__) >= "2.13" else ("skill", "plan")
    for name in (name for name in eager if not name.startswith(planned)):
        value = eager[name]
        torch.testing.assert_close(
            compiled[name], value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert eager["learner reward_loss 0"] != eager["learner reward_loss 1"]


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_loss_serves_another_size_in_the_same_process(device, eager_random):
    """benchmarks/speed.py does that; left to itself, dynamo then looks for symbolic shapes and fails in the LSTM."""
    for B, N in ((6, 4), (3, 2)):
        losses, window = {}, (torch.rand(B, 5 * N + 1, 30, device=device), torch.rand(B, 5 * N, 9, device=device))
        for compiled in (True, False):
            args = tiny_args(env_id="kitchen", skill_encoder="lstm", pretrain_skills=N, bc_chunks=N, compile=compiled)
            torch.manual_seed(0)
            pretrainer = skimo.Pretrainer(args, skimo.make_networks(args, 30, 9, device))
            losses[compiled] = {name: value.cpu() for name, value in pretrainer.update(*window).items()}
        torch.testing.assert_close(losses[True], losses[False], atol=1e-3, rtol=1e-3)
