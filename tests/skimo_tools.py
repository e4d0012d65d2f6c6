"""What the tests of skimo.py and its variants share: tiny arguments, batches, networks with random weights."""

import dataclasses

import numpy as np
import torch
from numpy_nets import noisy_copy, np_features, np_net, random_obs

import data_tools
from algos import skimo


def tiny_args(algo=skimo, **changes):
    """Maze arguments with networks and batches so small that an update takes milliseconds; those that the file has."""
    small = dict(
        device="cpu", hidden_dim=16, latent_dim=8, skill_dim=3, skill_horizon=5, num_skills=3, pretrain_skills=3,
        bc_chunks=3, skill_encoder="mlp", num_envs=2, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=6,
        cem_iters=2, pretrain_batch_size=8, pretrain_updates=6, pretrain_eval_episodes=1, eval_episodes=2,
        horizon_steps=1000, std_steps=1000, alpha=1.0, autotune=True, min_std=0.5, tau=0.01,
    )  # fmt: skip
    if hasattr(algo, "Critic"):
        changes["num_skills"] = 1
    names = {field.name for field in dataclasses.fields(algo.Args)}
    return algo.Args(**{name: value for name, value in (small | changes).items() if name in names})


def np_scaled(obs, maze=True):
    return np_features(obs)[..., :4] if maze else obs


def np_encode(encoder, obs, maze=True):
    """E or E_L."""
    return np_net(encoder.net, np_features(obs) if maze else obs)


def np_q(model, h, z):
    """Both critics."""
    hz = np.concatenate([h, z], -1)
    return np_net(model.qf1, hz)[..., 0], np_net(model.qf2, hz)[..., 0]


def double_networks(args, algo=skimo):
    """Networks in float64 with all weights random, last layers and biases included."""
    torch.manual_seed(0)
    return noisy_copy(algo.make_networks(args).double(), 0)


def pretraining_batch(args, B=6):
    """Windows of the offline data: observations (B, N*H+1, O) and actions (B, N*H, A), NumPy."""
    rng = np.random.default_rng(0)
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    steps = args.pretrain_skills * args.skill_horizon
    obs = random_obs(rng, B, steps + 1) if obs_dim == 4 else rng.normal(size=(B, steps + 1, obs_dim))
    return obs, rng.uniform(-1, 1, (B, steps, action_dim))


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


def floats(*arrays):
    """The same in single precision."""
    return [torch.from_numpy(array).float() for array in arrays]


def backward_of_one_term(term, algo, args):
    """Gradients of only one of the five terms of pretrain_loss; returns name -> part of the networks, and the target.

    The others get constants: what the skill policy does, what the prior and the decoder say.
    """
    args.kl_coef, args.consistency_coef = float(term == "kl"), float(term == "consistency")
    networks = double_networks(args, algo)
    model, skills, prior = networks.values()
    target = noisy_copy(model)
    parts = dict(encoder=model.encoder, dynamics=model.dynamics, decoder=model.decoder, prior=prior)
    parts |= dict(encoder_l=skills.encoder, skill_encoder=skills.skill_encoder, skill_policy=skills.skill_policy)
    parts |= dict(reward_model=model.reward_model, qf1=model.qf1, qf2=model.qf2, target=target)
    if term != "bc":
        skills.act = lambda obs, z: torch.zeros(*obs.shape[:-1], 2)
    if term != "recon":
        model.decode = lambda h: (torch.zeros(*h.shape[:-1], 4), torch.ones(()))
    said = prior if term == "prior" else lambda h: torch.zeros(*h.shape[:-1], 2 * args.skill_dim)
    algo.pretrain_loss(model, skills, said, target, *tensors(*pretraining_batch(args)), args)[0].backward()
    return parts


class Windows:
    """Offline data in which each chunk of H actions pushes into one random direction: what a skill has to encode.

    Windows begin with a chunk, so that its direction is one skill's business. Pushes are strong and chunks few: where
    one ends is soon told from where it begins.
    """

    source, fingerprint = "made up", "0"

    def __init__(self, H: int, seed: int, episodes: int = 60, chunks: int = 4):
        rng = np.random.default_rng(seed)
        actions = np.repeat(rng.uniform(-0.9, 0.9, (episodes, chunks, 2)), H, 1)  # (episodes, T, 2)
        position = 20 + 2.5 * np.concatenate([np.zeros((episodes, 1, 2)), actions.cumsum(1)[:, :-1]], 1)
        self.obs, self.actions = floats(np.concatenate([position, np.zeros_like(position)], -1), actions)
        self.H = H

    def to(self, device):
        return self

    def split(self, fraction, length):
        return self, self

    def sample_windows(self, batch_size: int, length: int):
        episodes, T = self.obs.shape[:2]
        e = torch.randint(episodes, (batch_size, 1))
        first = self.H * torch.randint((T - length) // self.H + 1, (batch_size, 1))
        t = first + torch.arange(length)
        return self.obs[e, t], self.actions[e, t[:, :-1]]


def errors_on_new_windows(networks, args):
    """Squared error of imitated actions and of the predicted end of N skills, as shares of those without learning."""
    N, H = args.pretrain_skills, args.skill_horizon
    obs, actions = Windows(H, seed=100).sample_windows(60, N * H + 1)
    chunks, chunk_actions = obs[:, :-1].unflatten(1, (N, H)), actions.unflatten(1, (N, H))
    model, skills, _ = networks.values()
    with torch.no_grad():
        z = torch.tanh(skills.encode_skill(chunks, chunk_actions)[0])
        imitated = skills.act(chunks, z[:, :, None].expand(-1, -1, H, -1))
        h = model.encoder(obs[:, 0])
        for i in range(N):
            h = model.next(h, z[:, i])
        predicted = model.decode(h)[0][:, :2]
    position = model.encoder.scaled(obs)[..., :2]
    still = (position[:, 0] - position[:, -1]).square().mean()
    miss = (predicted - position[:, -1]).square().mean()
    return (imitated - chunk_actions).square().mean() / actions.var(), miss / still


def skill_reward(z):
    """Best, 1, for the skill (0.8, -0.6); falls with the distance."""
    return 1 - np.square(z - [0.8, -0.6]).sum(-1)


def fill(rb, args, single_step=False, episodes=300, seed=0):
    """A buffer with episodes of four random skills that lead from anywhere to anywhere."""
    rng = np.random.default_rng(seed)
    E, H = args.num_envs, args.skill_horizon
    for _ in range(episodes // E):
        obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
        for t in range(4):
            z = rng.uniform(-1, 1, (E, 2)).astype(np.float32)
            next_obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
            window = dict(obs=obs)
            if single_step:
                window = dict(obs=np.repeat(obs[:, None], H, 1), actions=np.zeros((E, H, 2)), steps=np.full(E, H))
            rb.add(**window, z=z, rewards=skill_reward(z), dones=np.full(E, t == 3), next_obs=next_obs)
            obs = next_obs
