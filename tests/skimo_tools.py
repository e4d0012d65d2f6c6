"""What the tests of skimo.py share: tiny arguments, batches, and its networks' formulas in NumPy."""

import numpy as np
import torch
from numpy_nets import np_net, random_obs, rl_batch

from algos import skimo


def tiny_args(**changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds."""
    small = dict(
        device="cpu", cudagraphs=False, hidden_dim=16, latent_dim=8, skill_dim=3, skill_horizon=5, num_skills=3,
        pretrain_skills=3, bc_chunks=3, skill_encoder="mlp", num_envs=2, batch_size=8, num_samples=16,
        num_policy_trajs=4, num_elites=6, cem_iters=2, pretrain_batch_size=8, pretrain_updates=6,
        pretrain_eval_episodes=1, eval_episodes=2, horizon_steps=1000, std_steps=1000, alpha=1.0, autotune=True,
        min_std=0.5, tau=0.01,
    )  # fmt: skip
    return skimo.Args(**(small | changes))


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


def np_q(model, h, z):
    """Both critics."""
    hz = np.concatenate([h, z], -1)
    return np_net(model.qf1, hz)[..., 0], np_net(model.qf2, hz)[..., 0]


def double_networks(args, obs_dim=4, action_dim=2, seed=0):
    """Networks in float64 with all weights random, last layers and biases included."""
    torch.manual_seed(seed)
    networks = skimo.make_networks(args, obs_dim, action_dim).double()
    for value in networks.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return networks


def pretraining_batch(args, maze=True, obs_dim=4, action_dim=2, B=6):
    """Observations (B, N*H+1, O) and actions (B, N*H, A), NumPy."""
    rng = np.random.default_rng(0)
    steps = args.num_skills * args.skill_horizon
    obs = random_obs(rng, B, steps + 1) if maze else rng.normal(size=(B, steps + 1, obs_dim))
    return obs, rng.uniform(-1, 1, (B, steps, action_dim))


def float_batch(args, B=8):
    """The same as tensors in single precision."""
    return [torch.from_numpy(x).float() for x in rl_batch(args, B)]
