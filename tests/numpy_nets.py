"""The networks' formulas in NumPy and float64, and small things that tests of several algorithms need."""

import copy
import math
import tempfile
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

NO_SCORES = dict(episodic_return=0.0, episodic_length=1.0, success=0.0)  # in place of roll-outs
FOLDER = tempfile.TemporaryDirectory()
NO_CURVES = SimpleNamespace(add_scalar=lambda *values: None, log_dir=FOLDER.name)  # in place of TensorBoard's writer


def np_net(net, x, training=False):
    """Layers one after the other, (..., in) -> (..., out); training: BatchNorm by the batch's own statistics."""
    for layer in net:
        weights = {name: value.detach().cpu().numpy().astype(np.float64) for name, value in layer.named_parameters()}
        if isinstance(layer, nn.Linear):
            x = x @ weights["weight"].T + weights.get("bias", 0.0)
        elif isinstance(layer, nn.BatchNorm1d):
            axes = tuple(range(x.ndim - 1))
            mean, var = (x.mean(axes), x.var(axes)) if training else (layer.running_mean, layer.running_var)
            x = (x - np.asarray(mean)) / np.sqrt(np.asarray(var) + 1e-5) * weights["weight"] + weights["bias"]
        elif isinstance(layer, nn.ReLU):
            x = np.maximum(x, 0)
        elif isinstance(layer, nn.LeakyReLU):
            x = np.where(x > 0, x, 0.2 * x)
        elif isinstance(layer, nn.LayerNorm):
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
            x = x * weights["weight"] + weights["bias"]
        elif isinstance(layer, nn.ELU):
            x = np.where(x > 0, x, np.expm1(np.minimum(x, 0)))
        elif isinstance(layer, nn.GELU):
            x = x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2
        elif isinstance(layer, nn.Tanh):
            x = np.tanh(x)
        else:
            raise AssertionError(f"no {layer} in the papers")
    return x


def np_features(obs):
    """Inputs of the maze: scaled observations, then sines of both coordinates in all periods, then cosines."""
    x = [obs[..., :2] / 40 - 0.5, obs[..., 2:] / 10]
    for wave in (np.sin, np.cos):
        for k in (0, 1):
            x += [wave(2 * np.pi * obs[..., k, None] / period) for period in (1, 2, 4, 8, 16, 32)]
    return np.concatenate(x, -1)


def np_gaussian(x):
    """Mean and std of the Gaussian whose tanh is the variable."""
    mean, log_std = np.split(x, 2, -1)
    return 5 * np.tanh(mean / 5), np.exp(np.clip(log_std, -10, 2)) + 1e-4


def np_kl(p, q):
    """KL of diagonal Gaussians by cross-entropy minus entropy, summed over the last axis."""
    cross_entropy = 0.5 * np.log(2 * np.pi * q[1] ** 2) + (p[1] ** 2 + (p[0] - q[0]) ** 2) / (2 * q[1] ** 2)
    return (cross_entropy - 0.5 * np.log(2 * np.pi * np.e * p[1] ** 2)).sum(-1)


def random_obs(rng, *shape):
    """Observations of the maze."""
    return np.concatenate([rng.uniform(0, 40, (*shape, 2)), rng.uniform(-5, 5, (*shape, 2))], -1)


def noisy_copy(module, seed=1):
    torch.manual_seed(seed)
    module = copy.deepcopy(module)
    for value in module.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return module


def has_gradient(module):
    return any(value.grad is not None and value.grad.abs().sum() > 0 for value in module.parameters())


def same_weights(a, b):
    a, b = list(a.parameters()), list(b.parameters())
    return 0 < len(a) == len(b) and all(map(torch.equal, a, b))


def np_lstm(lstm, x):
    """Last hidden state of a one-layer LSTM: x (B, T, I) -> (B, u); gates in the order i, f, g, o."""
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


def rl_batch(args, B=5):
    """Windows of N skills: observations, skills, rewards, dones, NumPy."""
    rng = np.random.default_rng(1)
    N = args.num_skills
    obs = random_obs(rng, B, N + 1)
    z = rng.uniform(-1, 1, (B, N, args.skill_dim))
    rewards = 3 * rng.normal(size=(B, N))
    dones = (rng.random((B, N)) < 0.3).astype(np.float64)
    return obs, z, rewards, dones
