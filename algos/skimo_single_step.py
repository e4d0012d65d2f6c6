"""SkiMo with single-step dynamics: ablation of SkiMo (Shi, Lim & Lee, CoRL 2022), https://arxiv.org/abs/2207.07560

Idea: skills, prior, R, Q and planner are SkiMo's, but the dynamics predicts one env step instead of a whole skill. A
plan of K skills takes K * H predictions, and each of them adds its error: what SkiMo's skill dynamics avoids.

    python algos/skimo_single_step.py --env-id maze             # as skimo.py, with a pre-trained model of its own
    python algos/skimo_single_step.py --env-id maze --published # with the settings of SkiMo's release

Differs from skimo.py in: PRETRAINED, TASK_DEFAULTS, PEOPLE, Args, WorldModel, SkillModel, make_networks,
    pretrain_loss, model_loss, execute_skill, rollout, ReplayBuffer, Agent, train
Paper: no curve; its text says that it fails at long-horizon planning.

1. Pre-training: encode chunks of H actions as skills z ~ q. Loss = behavioural cloning + KL(q || N(0,1)) (eq. 3)
   + reconstruction + consistency of h_{t+1} = D1(h_t, a_t) at each env step + prior KL(q || p(h_i)) (eq. 5)
2. Downstream RL. The task policy pi starts as the prior p. Repeat:
   act: plan skills by CEM with R, Q and D(h, z) = H times {a = mode of pi_L(h, z), h = D1(h, a)};
        run the first one for H steps with the frozen skill policy pi_L
   model update: consistency of D1 at each env step, reward and TD losses on windows of N skills (eq. 6)
   policy update: maximise Q(h, z) - alpha KL(pi(h) || p(h)) (eq. 7); tune alpha; move the slow target copy

The authors did not release this variant and the paper says no more than the idea, so this reading is ours:
- pi_L acts on predicted states. So world model and pi_L share one encoder E, which is frozen in RL: so is pi_L, and it
  would misread states that move.
- D1 learns from real actions, which the replay holds. The error of env step t = 0, 1, ... has weight rho^(t/H)/H, so
  that a skill counts about as much as in SkiMo.
- Pre-training rolls D1 out through the window. RL begins anew from E(s) at each skill: over N * H = 100 steps states
  and gradients grew beyond float32.
- --dynamics-input skill is a variant: D1(h, z) H times, without pi_L.
- The Kitchen's kl_coef is 5e-4: with skimo.py's 3e-3 skills held .07 nats, as good as nothing.
Otherwise SkiMo's differences from the release hold, marked DEVIATION n below and explained in the header of skimo.py.

A run's folder is like skimo.py's.
Score: maze, share of the last 100 training episodes that reach the goal after 300,000 env steps: .84 / .72 / .35.
Sub-tasks of 4, smoothed as in the paper: Kitchen 3.40 at 200,000 env steps (one seed), CALVIN 2.24 / 2.71 / 2.88 at
300,000.
Shapes: B batch, N skills per window, H steps per skill, O observation, A action, Z skill, d latent state,
E environments, K skills per plan, P plans, C chunks. Of inputs: P positions, F periods of each.
"""

import argparse
import ast
import contextlib
import copy
import csv
import functools
import gc
import hashlib
import inspect
import json
import os
import platform
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

# OpenMP's threads wait 1,000 turns for work before they sleep. With torch's default, 300 times that, an update beside
# a busy program takes 1.6 times as long (algos/README.md). Must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_tools  # tasks and offline data, nothing else

PRETRAINED = "skimo_single_step"  # begins the names of pre-trained models
SHIPPED = Path(__file__).resolve().parents[1] / "benchmarks" / "results"  # models and agents that come with the code


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    published: bool = False  # take the release's values for this task, as the header says
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    cudagraphs: bool = torch.cuda.is_available()  # replay updates and plans as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint, or `published`: our agent, if there is one
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, without exploration noise
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # folder of offline data and pre-trained models (None: the user's cache)
    dataset: Literal["scripted", "d4rl"] = "scripted"  # made by a script, or people's, fetched from D4RL (kitchens)
    data: str | None = None  # offline data of your own instead: a file or a folder
    pretrained: str | None = None  # start RL from this model: a path, or `published`: ours, if there is one
    pretrain_eval_interval: int = 3_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 100  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of hidden layers
    latent_dim: int = 256  # d: size of a latent state
    skill_encoder: Literal["mlp", "lstm"] = "lstm"  # architecture of q
    dynamics_input: Literal["action", "skill"] = "action"  # D1(h, a), a by the skill policy, or D1(h, z)
    position_features: bool = True  # sines and cosines of positions as inputs (release: none)

    # Pre-training
    pretrain_updates: int = 12_000  # gradient updates
    pretrain_skills: int = 10  # skills per window (release: num_skills)
    pretrain_batch_size: int = 128  # windows per update (release: 512)
    bc_chunks: int = 4  # chunks of each window that the skill policy is trained on (release: all)
    pretrain_lr: float = 1e-3  # peak learning rate
    pretrain_lr_decay: bool = True  # warm-up, then decay to zero (release: constant)
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see `perturb` (release: 0)
    recombine: bool = False  # show demonstrations again among objects moved by others (release: no)
    pretrain_tau: float = 0.01  # share of the online weights in a target update of pre-training
    bc_coef: float = 2.0  # weight of the skill policy's squared error
    kl_coef: float = 1e-4  # weight of KL(q || N(0,1))
    prior_coef: float = 1.0  # weight of KL(q || p)
    recon_coef: float = 1.0  # weight of the observation's log-likelihood
    consistency_coef: float = 2.0  # weight of the latent consistency, in both phases
    rho: float = 0.5  # weight rho^t of the t-th skill of a window, in both phases
    target_update_interval: int = 2  # updates between target updates, in both phases
    max_grad_norm: float = 100.0  # bound of the gradient's norm, in both phases

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    num_skills: int = 10  # N: skills per window and in the longest plan
    warmup_steps: int = 5_000  # env steps with the prior's skills before updates; at least an episode per environment
    batch_size: int = 256  # windows of N skills per update
    updates_per_step: float = 10 / 500  # gradient updates per env step, the warm-up's included
    learning_rate: float = 1e-3  # of world model and task policy
    alpha: float = 0.5  # weight of the prior KL (its first value if autotune)
    autotune: bool = False  # tune alpha so that the prior KL is target_kl
    target_kl: float = 3.0  # nats between task policy and prior
    alpha_lr: float = 3e-4  # learning rate of log alpha
    policy_latents: Literal["imagined", "encoded"] = "imagined"  # states of Q in eq. 7: D's (paper) or E's
    release_defects: bool = False  # Q in eq. 7 on h_0 for all t, as in the authors' code, whatever policy_latents says
    gamma: float = 0.99  # discount per skill
    tau: float = 0.05  # share of the online weights in a target update (release: 0.01)
    reward_coef: float = 0.25  # weight of the reward loss
    value_coef: float = 0.1  # weight of the TD loss
    reward_scale: float = 1.0  # factor on the task's reward

    # Planner
    num_samples: int = 128  # sampled plans per iteration (release: 512)
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 32  # best plans, which the next distribution is fitted to (release: 64)
    cem_iters: int = 3  # iterations (release: 6)
    temperature: float = 0.5  # factor on the values in the elites' softmax
    momentum: float = 0.1  # share of the old mean in the new one
    min_std: float = 0.05  # least std, and exploration noise, at the start of the schedule (release: 0.5)
    min_std_end: float = 0.01  # the same after std_steps
    std_steps: int = 25_000  # env steps over which min_std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N skills


# The release's values where they differ from Args. Our own are the pre-training (DEVIATION 3), std_steps (DEVIATION 5),
# the kitchen's alpha and policy_latents (DEVIATION 7), and the maze's total_timesteps. --published takes the release's
# values, except for the planner (ours) and policy_latents (the paper's).
TASK_DEFAULTS = {
    "maze": dict(
        latent_dim=128, skill_encoder="mlp", kl_coef=3e-3, total_timesteps=300_000, warmup_steps=50_000,
        batch_size=128, alpha=1.0, autotune=True, horizon_steps=1_000_000, std_steps=300_000,
    ),
    "kitchen": dict(
        pretrain_updates=10_000, pretrain_skills=5, bc_chunks=5, pretrain_batch_size=64, kl_coef=5e-4,
        alpha=0.05, policy_latents="encoded",
    ),
    "calvin": dict(
        hidden_dim=256, num_skills=1, pretrain_updates=10_000, pretrain_skills=1, bc_chunks=1,
        pretrain_batch_size=256, kl_coef=1e-2, alpha=0.1, reward_scale=0.01, total_timesteps=2_000_000,
    ),
}  # fmt: skip
TASK_DEFAULTS["kitchen-misaligned"] = TASK_DEFAULTS["kitchen"]

# With people's demonstrations (--dataset d4rl, and all of --data) the arm is shifted, and objects are recombined
# (DEVIATION 3).
PEOPLE = {"kitchen": dict(arm_noise=0.02, recombine=True)}
PEOPLE["kitchen-misaligned"] = PEOPLE["kitchen"]

# --published: what changes to give the release's values, on all tasks and on each.
RELEASE = dict(
    position_features=False, pretrain_updates=425_000, pretrain_skills=10, pretrain_batch_size=512, bc_chunks=10,
    pretrain_lr_decay=False, arm_noise=0.0, recombine=False, kl_coef=1e-4, num_envs=1, policy_latents="imagined",
    tau=0.01,
)  # fmt: skip
PUBLISHED = {
    "maze": dict(RELEASE, pretrain_updates=700_000, total_timesteps=2_000_000),
    "kitchen": dict(RELEASE, alpha=0.5),
    "calvin": dict(RELEASE, pretrain_skills=1, bc_chunks=1),
}
PUBLISHED["kitchen-misaligned"] = PUBLISHED["kitchen"]

# DEVIATION 3: periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]

# DEVIATION 3: number of joints J that observations and actions begin with, and how far in rad an action of 1 asks each
# to move from where it is observed.
ARM = {"kitchen": (7, 0.16)}
ARM["kitchen-misaligned"] = ARM["kitchen"]


# ------------------------------------------------------------------------------------------------------------ networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(in_dim, out_dim)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ELU()]
    return nn.Sequential(*layers[:-1])


def scalar_head(in_dim: int, u: int) -> nn.Sequential:
    """Reward and Q: a normalised first layer, then an MLP of width u whose output starts near 0."""
    first = [nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh()]
    head = nn.Sequential(*first, *mlp(u, u, u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


def gaussian_parameters(x):
    """Network output (..., 2 * Z) -> mean and std (..., Z) of the Gaussian whose tanh is the variable.

    The mean stays within +-5, where tanh is saturated, and the std within e^-10 to e^2, as in the release.
    """
    mean, log_std = x.chunk(2, -1)
    return 5 * torch.tanh(mean / 5), log_std.clamp(-10, 2).exp() + 1e-4


def sample_skill(distribution):
    """One reparameterised sample of tanh(N(mean, std)); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return torch.tanh(mean + std * torch.randn_like(mean))


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., Z) -> (...) in nats; a common tanh leaves it as it is."""
    mean_p, std_p = p
    mean_q, std_q = q
    square = std_p**2 + (mean_p - mean_q) ** 2
    kl = (std_q / std_p).log() + square / (2 * std_q**2) - 0.5  # DEVIATION 1
    return kl.sum(-1)


class StateEncoder(nn.Module):
    """Raw observations (..., O) -> latent states (..., d).

    DEVIATION 3: sines and cosines of positions are inputs as well. What matters, a wall of the maze or a centimetre at
    a handle, is less than a fortieth of the input's range, and a plain MLP needs very long to resolve that.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = np.zeros((0, 0))
        if args.position_features:
            periods = POSITION_PERIODS.get(args.env_id, periods)
        frequency = torch.tensor(2 * np.pi / periods, dtype=torch.float32)
        self.register_buffer("scale", torch.tensor(task.obs_scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(task.obs_shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", frequency)  # (P, F)
        self.net = mlp(obs_dim + 2 * periods.size, args.hidden_dim, args.latent_dim)

    def scaled(self, obs):  # what the decoder reconstructs
        return obs * self.scale + self.shift  # (..., O)

    def features(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)  # (..., P * F)
        return torch.cat([self.scaled(obs), phase.sin(), phase.cos()], -1)  # (..., O + 2 * P * F)

    def forward(self, obs):
        return self.net(self.features(obs))  # (..., d)


class WorldModel(nn.Module):
    """One-step dynamics D1, reward R, critics Q, observation decoder; state encoder E and pi_L are those of skills."""

    def __init__(self, obs_dim: int, action_dim: int, skills: nn.Module, args: Args):
        super().__init__()
        u = args.hidden_dim
        d = args.latent_dim
        dz = d + args.skill_dim
        self.skill_horizon = args.skill_horizon
        self.takes_actions = args.dynamics_input == "action"
        self.encoder = skills.encoder
        self.skill_policy = skills.skill_policy
        self.dynamics = mlp(d + action_dim if self.takes_actions else dz, u, u, u, u, d)
        self.reward_model = scalar_head(dz, u)
        self.qf1 = scalar_head(dz, u)
        self.qf2 = scalar_head(dz, u)
        self.decoder = mlp(d, u, u, 2 * obs_dim)

    def step(self, h, x):  # D1(h, a) or D1(h, z): the latent state after one env step
        return self.dynamics(torch.cat([h, x], -1))  # (..., d)

    def next(self, h, z):  # D(h, z): the latent state after the whole skill, step by step
        x = z
        for _ in range(self.skill_horizon):
            if self.takes_actions:
                mean, _ = gaussian_parameters(self.skill_policy(torch.cat([h, z], -1)))
                x = torch.tanh(mean)  # (..., A)
            h = self.step(h, x)
        return h  # (..., d)

    def next_steps(self, h, actions, z):
        """The latent states after each env step of a window, (B, N, H, d).

        h (B, 1, d) is the state where the window begins or, (B, N, d), where each of its skills does; actions
        (B, N, H, A); skills z (B, N, Z), which count with dynamics_input skill only.
        """
        B, N, H = actions.shape[:3]
        inputs = actions if self.takes_actions else z[:, :, None].expand(-1, -1, H, -1)
        inputs = inputs.reshape(B, h.shape[1], -1, inputs.shape[-1])  # (B, 1, N * H, A or Z) or (B, N, H, A or Z)
        h_pred = []
        for x in inputs.unbind(2):
            h = self.step(h, x)
            h_pred.append(h)
        return torch.stack(h_pred, 2).reshape(B, N, H, -1)

    def reward(self, h, z):  # R(h, z): the sum of rewards during the skill
        return self.reward_model(torch.cat([h, z], -1)).squeeze(-1)  # (...)

    def q(self, h, z):  # Q_1(h, z), Q_2(h, z)
        hz = torch.cat([h, z], -1)
        return self.qf1(hz).squeeze(-1), self.qf2(hz).squeeze(-1)  # 2 x (...)

    def decode(self, h):
        """Mean and std, in [0.1, 1.5], of the scaled observation: (..., d) -> 2 x (..., O)."""
        mean, raw_std = self.decoder(h).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | h, z), on the state encoder E of the world model."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        d = args.latent_dim
        Z = args.skill_dim
        chunk = args.skill_horizon * action_dim
        self.encoder = StateEncoder(obs_dim, args)
        self.skill_policy = mlp(d + Z, u, u, u, u, 2 * action_dim)
        self.lstm = None
        if args.skill_encoder == "lstm":
            self.lstm = nn.LSTM(action_dim + d, 128, batch_first=True)
            self.skill_encoder = nn.Sequential(nn.Linear(128, 2 * Z))  # PyTorch's own weights, as in the release
        else:
            self.skill_encoder = mlp(chunk + d, u, u, u, u, 2 * Z)

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, N, H, O) and actions (B, N, H, A) -> mean and std, 2 x (B, N, Z)."""
        if self.lstm is None:
            first = self.encoder(obs[:, :, 0])  # (B, N, d)
            x = torch.cat([actions.flatten(2), first], -1)  # (B, N, H * A + d)
        else:
            steps = torch.cat([actions, self.encoder(obs)], -1)  # (B, N, H, A + d)
            outputs, _ = self.lstm(steps.flatten(0, 1))  # (B * N, H, 128)
            x = outputs[:, -1].unflatten(0, actions.shape[:2])  # (B, N, 128)
        return gaussian_parameters(self.skill_encoder(x))

    def act(self, obs, z):
        """Mode of pi_L: observations (..., O) and skills (..., Z) -> actions (..., A) in (-1, 1)."""
        x = torch.cat([self.encoder(obs), z], -1)
        mean, _ = gaussian_parameters(self.skill_policy(x))
        return torch.tanh(mean)


def make_networks(args: Args, obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """The networks of pre-training: world model, skills, and the prior p(z | h), (..., d) -> (..., 2 * Z)."""
    hidden = [args.hidden_dim] * 4
    prior = mlp(args.latent_dim, *hidden, 2 * args.skill_dim)
    skills = SkillModel(obs_dim, action_dim, args)
    model = WorldModel(obs_dim, action_dim, skills, args)
    networks = nn.ModuleDict(dict(model=model, skills=skills, prior=prior))
    return networks.to(args.device)


# -------------------------------------------------------------------------------------------------------------- losses
def pretrain_loss(model, skills, prior, target, obs, actions, args):
    """Joint loss of skills and one-step dynamics on windows of the offline data (SkiMo eq. 3-5).

    obs (B, N*H+1, O) raw, actions (B, N*H, A); target is the slow copy of model. Returns the loss and metrics, scalars.
    """
    B = len(obs)
    N = args.pretrain_skills
    H = args.skill_horizon
    chunk_obs = obs[:, :-1].unflatten(1, (N, H))  # (B, N, H, O)
    chunk_actions = actions.unflatten(1, (N, H))  # (B, N, H, A)
    order = torch.rand(B, N, device=obs.device)
    chosen = order.topk(args.bc_chunks, 1).indices  # (B, C), DEVIATION 2
    q_mean, q_std = skills.encode_skill(chunk_obs, chunk_actions)  # (B, N, Z)
    z = sample_skill((q_mean, q_std))  # (B, N, Z)

    # Eq. 3, behavioural cloning: a skill has to hold all that is needed to repeat its actions.
    row = torch.arange(B, device=obs.device)[:, None]  # (B, 1)
    z_chosen = z[row, chosen]  # (B, C, Z)
    z_steps = z_chosen[:, :, None].expand(-1, -1, H, -1)  # (B, C, H, Z)
    predicted = skills.act(chunk_obs[row, chosen], z_steps)  # (B, C, H, A)
    bc_loss = (predicted - chunk_actions[row, chosen]).square().mean()

    # Eq. 3, KL to N(0, 1): keeps skills in one region without gaps, so that a z between two skills is a skill, too.
    normal = torch.zeros_like(q_mean), torch.ones_like(q_std)
    kl_loss = kl_divergence((q_mean, q_std), normal).clamp(-100, 100).mean()

    # Reconstruction of the states where skills begin and end: latent states must not forget the observation.
    skill_obs = obs[:, ::H]  # (B, N+1, O)
    h = model.encoder(skill_obs)  # (B, N+1, d)
    mean, std = model.decode(h)
    likelihood = torch.distributions.Normal(mean, std, validate_args=False)
    log_prob = likelihood.log_prob(model.encoder.scaled(skill_obs))  # (B, N+1, O)
    recon_loss = -log_prob.sum(-1).mean()

    # In place of eq. 4: h_{t+1} = D1(h_t, a_t), rolled out from h_0, agrees with the slow encoder after each env step,
    # so that the model can predict where skills lead.
    with torch.no_grad():
        h_target = target.encoder(obs[:, 1:])  # (B, N*H, d)
        h_target = h_target.unflatten(1, (N, H))  # (B, N, H, d)
    h_pred = model.next_steps(h[:, :1], chunk_actions, z)  # (B, N, H, d)
    t = torch.arange(N * H, device=obs.device).view(N, H)
    weight = args.rho ** (t / H) / H  # (N, H)
    error = (h_pred - h_target).square().mean(-1)  # (B, N, H)
    consistency = (weight * error).sum((1, 2))  # (B,)
    consistency_loss = consistency.clamp(max=1e4).mean()

    # Eq. 5: the prior says which skills the data show in a state. Its gradient reaches the state encoder, not q.
    p = gaussian_parameters(prior(h[:, :-1]))  # 2 x (B, N, Z)
    prior_loss = kl_divergence((q_mean.detach(), q_std.detach()), p).mean()

    skill_loss = args.bc_coef * bc_loss + args.kl_coef * kl_loss + args.prior_coef * prior_loss
    world_loss = args.recon_coef * recon_loss + args.consistency_coef * consistency_loss
    loss = skill_loss + world_loss / N
    metrics = dict(
        bc_loss=bc_loss,
        kl_loss=kl_loss,
        prior_loss=prior_loss,
        recon_loss=recon_loss,
        consistency_loss=consistency_loss,
    )
    return loss, {name: value.detach() for name, value in metrics.items()}


def model_loss(model, target, task_policy, obs, actions, z, rewards, dones, steps, args):
    """World model and critics on windows of skills from the replay buffer (SkiMo eq. 6).

    obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps, how many env steps a skill took,
    (B, N). Returns the loss, metrics, and detached latents where skills begin and end for the policy: h = E(o) and
    h_pred, predicted from E(o) one skill before, both (B, N+1, d).
    """
    N, H = actions.shape[1:3]
    with torch.no_grad():  # E is frozen, so that its states need no slow copy
        h_steps = model.encoder(obs)  # (B, N*H+1, d)
        h = h_steps[:, ::H]  # (B, N+1, d)
        h_target = h_steps[:, 1:].unflatten(1, (N, H))  # (B, N, H, d)
        pi = gaussian_parameters(task_policy(h[:, 1:]))
        next_z = sample_skill(pi)  # (B, N, Z)
        next_q = torch.min(*target.q(h[:, 1:], next_z))  # (B, N)
        td_target = rewards + (1 - dones) * args.gamma * next_q  # (B, N)
    h_pred = model.next_steps(h[:, :-1], actions, z)  # (B, N, H, d)

    # Consistency: predicted latent states agree with encoded ones, so that imagined states can be trusted. After an
    # early end there is nothing to predict.
    t = torch.arange(N * H, device=obs.device).view(N, H)
    weight = args.rho ** (t / H) / H  # (N, H)
    happened = torch.arange(H, device=obs.device) < steps[..., None]  # (B, N, H)
    error = (h_pred - h_target).square().mean(-1)  # (B, N, H)
    consistency = (weight * happened * error).sum((1, 2))  # (B,)

    # Reward and value learn on imagined states, where they are used (0 on axis 1, weight rho^t), and on encoded ones
    # (1 on axis 1, weight 1).
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    h_pred = torch.cat([h[:, :1], h_pred[:, :, -1]], 1)  # (B, N+1, d)
    states = torch.stack([h_pred[:, :-1], h[:, :-1]], 1)  # (B, 2, N, d)
    both_z = z[:, None].expand(-1, 2, -1, -1)  # (B, 2, N, Z)
    weight = torch.stack([rho, torch.ones_like(rho)])  # (2, N)
    reward = model.reward(states, both_z)  # (B, 2, N)
    q1, q2 = model.q(states, both_z)  # (B, 2, N)
    td = td_target[:, None]  # (B, 1, N)
    reward_error = (reward - rewards[:, None]).square()
    reward_error = (weight * reward_error).sum((1, 2))  # (B,)
    value_error = (q1 - td).square() + (q2 - td).square()
    value_error = (weight * value_error).sum((1, 2))  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5)
    loss = loss + args.reward_coef * reward_error.clamp(max=1e5)
    loss = loss + args.value_coef * value_error.clamp(max=1e5)
    loss = loss.mean() / N
    metrics = dict(
        consistency_loss=consistency,
        reward_loss=reward_error,
        value_loss=value_error,
        td_target=td_target,
        q_value=q1[:, 1],
    )
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    return loss, metrics, h.detach(), h_pred.detach()


def policy_loss(model, task_policy, prior_encoder, skill_prior, obs, h, h_pred, alpha, args):
    """Task policy: maximise Q, stay close to the frozen prior (SkiMo eq. 7).

    obs (B, N+1, O), h and h_pred (B, N+1, d) detached, alpha (); prior_encoder is the E of pre-training, frozen.
    Returns the loss and metrics; metrics["prior_kl"] is the mean KL in nats.
    """
    N = obs.shape[1] - 1
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    latents = h_pred if args.policy_latents == "imagined" else h  # DEVIATIONs 7 and 8
    if args.release_defects:
        latents = h[:, :1].expand_as(h)
    latents = latents[:, :N]  # (B, N, d)

    # Maximise Q: choose the skills that the critics like best.
    z = sample_skill(gaussian_parameters(task_policy(latents)))  # (B, N, Z)
    q_value = torch.min(*model.q(latents, z))  # (B, N)

    # Stay close to the prior, on encoded states: the task is solved by skills that the data show.
    with torch.no_grad():
        prior = gaussian_parameters(skill_prior(prior_encoder(obs[:, :-1])))  # 2 x (B, N, Z)
    pi = gaussian_parameters(task_policy(h[:, :-1]))  # 2 x (B, N, Z)
    prior_kl = kl_divergence(pi, prior).clamp(-100, 100)  # (B, N)

    loss = (rho * (alpha * prior_kl - q_value)).sum(1)  # (B,)
    loss = loss.mean() / N
    metrics = dict(policy_loss=loss, policy_q=q_value, prior_kl=prior_kl)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------- planner and acting
@torch.no_grad()
def plan(model, task_policy, obs, K, min_std, noise_scale, args):
    """CEM over sequences of K skills in the model, for all environments at once (SkiMo, section 3.4).

    obs (E, O); K skills per plan; min_std () least std of samples; noise_scale () 1 to explore, 0 to evaluate. Returns
    the first skill (E, Z) and the fitted mean of all (E, K, Z).
    """
    E = len(obs)
    Z = args.skill_dim
    h0 = model.encoder(obs)  # (E, d)

    # Plans that the task policy proposes: they begin the search (DEVIATION 5) and compete with its samples
    h = h0[:, None].expand(-1, args.num_policy_trajs, -1)  # (E, trajs, d)
    policy_plans = []
    for _ in range(K):
        pi = gaussian_parameters(task_policy(h))
        policy_plans.append(sample_skill(pi))  # (E, trajs, Z)
        h = model.next(h, policy_plans[-1])
    policy_plans = torch.stack(policy_plans, 2).nan_to_num(0.0)  # (E, trajs, K, Z); NaN: a state overflowed
    mean = policy_plans.mean(1)  # (E, K, Z)
    std = policy_plans.std(1).maximum(min_std)  # (E, K, Z)

    for _ in range(args.cem_iters):
        # Sample plans
        noise = torch.randn(E, args.num_samples, K, Z, device=obs.device)
        plans = mean[:, None] + std[:, None] * noise
        plans = plans.clamp(-0.999, 0.999)  # (E, num_samples, K, Z)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, Z)

        # Return of each plan: K predicted rewards, then the value of going on with the task policy
        h = h0[:, None].expand(-1, plans.shape[1], -1)  # (E, P, d)
        value = 0.0
        for t in range(K):
            reward = model.reward(h, plans[:, :, t])  # (E, P)
            value = value + args.gamma**t * reward
            h = model.next(h, plans[:, :, t])
        last_z = sample_skill(gaussian_parameters(task_policy(h)))
        last_q = torch.min(*model.q(h, last_z))  # (E, P)
        value = value + args.gamma**K * last_q
        value = value.nan_to_num(-1e6)  # NaN: a state overflowed

        # Fit the next distribution to the best plans, weighted by their value
        elite_value, index = value.topk(args.num_elites, 1)  # (E, elites)
        index = index[..., None, None].expand(-1, -1, K, Z)
        elites = plans.gather(1, index)  # (E, elites, K, Z)
        weight = torch.softmax(args.temperature * elite_value, 1)  # (E, elites)
        w = weight[..., None, None]
        elite_mean = (w * elites).sum(1)  # (E, K, Z)
        deviation = elites - elite_mean[:, None]
        variance = (w * deviation.square()).sum(1)  # (E, K, Z)
        std = variance.sqrt().maximum(min_std)
        mean = args.momentum * mean + (1 - args.momentum) * elite_mean

    # First skill of an elite: weight / Exp(1) is largest at elite i with probability weight_i. So this draws like
    # torch.multinomial, without its wait for the GPU.
    race = weight / torch.empty_like(weight).exponential_()
    picked = race.argmax(1)  # (E,)
    z = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, Z)
    z = z + noise_scale * min_std * torch.randn_like(z)
    return z.clamp(-0.999, 0.999), mean


class Planner:
    """Chooses skills for E environments at once; follows the schedules."""

    def __init__(self, agent, args: Args, explore: bool):
        self.agent = agent
        self.args = args
        self.explore = explore
        self.graphs = {}  # of the last shape alone

    def __call__(self, obs, global_step: int):
        """Observations (E, O), NumPy -> skills (E, Z) on the CPU."""
        args = self.args
        agent = self.agent
        growth = min(1.0, global_step / args.horizon_steps)
        K = int(1 + growth * (args.num_skills - 1))  # skills per plan
        progress = min(1.0, global_step / args.std_steps)
        min_std = args.min_std + progress * (args.min_std_end - args.min_std)
        min_std = torch.full((), min_std, device=args.device)  # made there: torch.tensor would wait for the device
        noise_scale = torch.full((), float(self.explore), device=args.device)

        inputs = torch.from_numpy(obs).to(args.device), min_std, noise_scale

        def plan_skills(obs, min_std, noise_scale):
            return plan(agent.model, agent.task_policy, obs, K, min_std, noise_scale, args)

        shape = K, len(obs)
        if self.explore and shape not in self.graphs:  # an evaluation is too short to record
            self.graphs = {shape: recorded(plan_skills, args)}
        z, _ = self.graphs.get(shape, plan_skills)(*inputs)
        return z.cpu()


@torch.no_grad()
def execute_skill(envs, skills, obs, z, ended, args: Args):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O); ended (E,) bool: environments that wait for their reset. Returns next_obs (E, O), the rewards' sum (E,),
    the new ended (E,), the env steps taken (E,), and the H env steps themselves: observations (E, H, O) and actions
    (E, H, A), filled up with the last observation and zeros when all environments ended early.
    """
    rewards = np.zeros(len(obs), dtype=np.float32)
    steps = np.zeros(len(obs), dtype=np.int64)
    skill_obs = []
    actions = []
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        skill_obs.append(obs)
        actions.append(action)
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += np.where(ended, 0.0, reward)
        steps += ~ended
        ended = terminations | truncations
        if ended.all():
            break
    while len(actions) < args.skill_horizon:
        skill_obs.append(obs)
        actions.append(np.zeros_like(action))
    return obs, rewards, ended, steps, np.stack(skill_obs, 1), np.stack(actions, 1)


def rollout(choose_skill, skills, num_episodes: int, args: Args, seed: int, video: Path | None = None):
    """An episode in each of num_episodes environments, with skills z (E, Z) = choose_skill(obs (E, O)), on the CPU.

    Returns returns (E,) and lengths in env steps (E,). The random numbers of training stay as they were.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    returns = np.zeros(num_episodes)
    lengths = np.zeros(num_episodes, dtype=np.int64)
    ended = np.zeros(num_episodes, dtype=bool)
    with kept_random_state(args):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while not ended.all():
            z = choose_skill(obs)
            obs, rewards, ended, steps, _, _ = execute_skill(envs, skills, obs, z, ended, args)
            returns += rewards
            lengths += steps
    envs.close()
    return returns, lengths


def prior_rollouts(networks, args: Args, num_episodes: int):
    """Returns (E,) of episodes with skills from the prior: what a fresh task policy explores."""
    cpu = copy.deepcopy(networks).cpu()

    @torch.no_grad()
    def choose_skill(obs):
        h = cpu["model"].encoder(torch.from_numpy(obs))  # (E, d)
        return sample_skill(gaussian_parameters(cpu["prior"](h)))  # (E, Z)

    return rollout(choose_skill, cpu["skills"], num_episodes, args, args.seed)[0]


def success(returns, args: Args) -> float:
    """Share of episodes in which everything was done."""
    best = data_tools.TASKS[args.env_id].max_return
    reached = np.asarray(returns) >= best - 1e-5 * abs(best)  # rewards are float32
    return float(reached.mean()) if len(returns) else 0.0


# -------------------------------------------------------------------------------------------------------------- replay
class ReplayBuffer:
    """Finished episodes of at least N skills, back to back in flat tensors on the device; none is ever dropped.

    A row holds a skill and its H env steps. An episode of T skills takes T + 1 rows; the last one begins with its final
    observation.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        H = args.skill_horizon
        self.num_skills = args.num_skills
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(0, H, obs_dim, device=args.device),
            actions=torch.zeros(0, H, action_dim, device=args.device),
            z=torch.zeros(0, args.skill_dim, device=args.device),
            rewards=torch.zeros(0, device=args.device),
            dones=torch.zeros(0, device=args.device),
            steps=torch.zeros(0, device=args.device),
        )
        self.episodes = torch.zeros(0, 2, dtype=torch.long, device=args.device)  # first row, skills
        self.running = [[] for _ in range(args.num_envs)]  # rows of the unfinished episodes

    def add(self, obs, actions, z, rewards, ended, steps, next_obs):
        """One skill of every environment: obs (E, H, O) and actions (E, H, A) of its env steps, NumPy; z (E, Z);
        rewards, ended and steps, how many env steps it took, (E,) NumPy; next_obs (E, O) NumPy.

        A time-out is stored as a true end, as in the release.
        """
        obs = torch.from_numpy(obs)
        actions = torch.from_numpy(actions)
        next_obs = torch.from_numpy(next_obs)
        rewards = torch.from_numpy(rewards)
        dones = torch.from_numpy(ended).float()
        steps = torch.from_numpy(steps).float()
        for e, running in enumerate(self.running):
            running.append((obs[e], actions[e], z[e], rewards[e], dones[e], steps[e]))
            if ended[e]:
                if len(running) >= self.num_skills:
                    self.add_episode(running, next_obs[e])
                self.running[e] = []

    def add_episode(self, rows: list, last_obs):
        """Rows (obs, actions, z, reward, done, steps) of an episode and its final observation (O,) go to the device."""
        first = len(self.columns["obs"])
        episode = torch.tensor([[first, len(rows)]], device=self.device)
        self.episodes = torch.cat([self.episodes, episode])
        last_row = [torch.zeros_like(value) for value in rows[0]]
        last_row[0][0] = last_obs
        rows = [*rows, last_row]
        for name, values in zip(self.columns, zip(*rows)):
            new = torch.stack(values).to(self.device)
            self.columns[name] = torch.cat([self.columns[name], new])

    def sample(self, batch_size: int):
        """Windows of N skills: obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps (B, N).

        Episodes are uniform; the start is min(uniform{0..T-1}, T-N), so that the last window is drawn more often.
        """
        N = self.num_skills
        index = torch.randint(len(self.episodes), (batch_size,), device=self.device)  # (B,)
        first, T = self.episodes[index].unbind(1)  # (B,)
        offset = (torch.rand(batch_size, device=self.device) * T).long()
        start = first + offset.minimum(T - N)  # (B,)
        rows = start[:, None] + torch.arange(N + 1, device=self.device)  # (B, N+1)
        obs, *others = (column[rows] for column in self.columns.values())
        H = obs.shape[2]
        obs = obs.flatten(1, 2)[:, : N * H + 1]  # (B, N*H+1, O)
        actions, z, rewards, dones, steps = (values[:, :-1] for values in others)
        return obs, actions, z, rewards, dones, steps

    def state_dict(self) -> dict:
        unfinished = [list(map(torch.stack, zip(*rows))) for rows in self.running]
        return dict(self.columns, episodes=self.episodes, unfinished=unfinished)

    def load_state_dict(self, state: dict):
        rows = int((state["episodes"][:, 1] + 1).sum())
        for name, column in self.columns.items():
            if state[name].shape != (rows, *column.shape[1:]) or not state[name].isfinite().all():
                raise ValueError(f"{name} of the replay buffer has another shape or is not finite")
        if len(state["unfinished"]) != len(self.running):
            raise ValueError("the replay buffer is that of another number of environments")
        self.running = [list(zip(*columns)) for columns in state["unfinished"]]
        self.episodes = state["episodes"].to(self.device)
        self.columns = {name: state[name].to(self.device) for name in self.columns}


# --------------------------------------------------------------------------------------------------- logs, checkpoints
def kept_random_state(args: Args):
    """Context that leaves torch's random numbers as they were, also those of the GPU that is used."""
    return torch.random.fork_rng([torch.cuda.current_device()] if args.device == "cuda" else [])


def log(writer: SummaryWriter, group: str, values: dict, step: int):
    """Scalars to TensorBoard as group/name."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)


def stop_at_signals() -> threading.Event:
    """Ctrl-C or SIGTERM asks for a stop where everything can be saved; the same once more ends the program at once."""
    stop = threading.Event()

    def ask(number, frame):
        stop.set()
        os.write(2, b"\nstopping: saves first (once more: stops at once)\n")  # print may not interrupt a print
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def write_json(path: Path, values: dict):
    """Values as JSON. The file is renamed when it is whole, so that a crash never leaves half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1))
    part.replace(path)


def passed(interval: int, step: int, new_steps: int) -> bool:
    """Whether the last new_steps reached or passed a multiple of interval (0: never)."""
    return interval > 0 and step // interval > (step - new_steps) // interval


def save(path: Path, parts: dict, **values):
    """Write the state of modules, optimizers and replay, plain values, and torch's random numbers.

    The file is renamed when it is whole, so that a crash while writing leaves the one of before.
    """
    temporary = path.with_suffix(f".{os.getpid()}.part")  # another program may write the same file
    state = {name: part.state_dict() for name, part in parts.items()}
    rng = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        rng.append(torch.cuda.get_rng_state())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state, **values, rng=rng), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it, also after a power cut
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        sys.exit(f"error: cannot write {path} ({reason}); free some space or choose another folder")


@contextlib.contextmanager
def reading(path: Path):
    """A file that is missing, damaged or of other sizes ends the program with a sentence."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"error: {path} does not exist; give another path")
    except (IsADirectoryError, PermissionError) as error:
        reason = error.strerror
        sys.exit(f"error: {path} cannot be read ({reason}); check the path")
    except torch.OutOfMemoryError:
        sys.exit(f"error: no memory for {path}; end other programs")
    except Exception as error:
        kind = type(error).__name__
        reason = " ".join(str(error).split())[:200]
        problem = f"{path} is damaged or does not fit this file and task ({kind}: {reason})"
        made = Path(path).parent.name in ("pretrained", "flows")
        cure = "delete it to make it again" if made else "give another"
        sys.exit(f"error: {problem}; {cure}")


def load(path: Path, parts: dict) -> dict:
    """Put what `save` wrote into parts; returns everything. Raises an error if a single bit is wrong."""
    if zipfile.ZipFile(path).testzip() is not None:
        raise ValueError("its checksum is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, nn.Module):
            for key, value in part.state_dict().items():
                if not value.isfinite().all():
                    raise ValueError(f"{key} is not finite")
        if isinstance(part, torch.optim.Optimizer):
            for weight, moments in part.state.items():
                for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
                    if moment.shape != weight.shape or not moment.isfinite().all():
                        raise ValueError("an optimizer's state has another shape or is not finite")
    return state


def set_random_state(rng: list):
    """Go on with the random numbers of a checkpoint; without its GPU not bit for bit."""
    torch.set_rng_state(rng[0])
    if torch.cuda.is_available() and len(rng) > 1:
        torch.cuda.set_rng_state(rng[1])


# --------------------------------------------------------------------------------------------------------- pre-training
def clip_gradients(module, args: Args):
    """Bound the gradient's norm; returns it, ()."""
    return nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)


class Recorded:
    """A function of tensors as a CUDA graph: the GPU repeats what it did, with one launch in place of hundreds.

    The first call is an ordinary one, in which optimizers make what they need. The second is recorded. This one and
    all that follow replay it: inputs keep their shapes, Python decides nothing anew, nothing may wait for the GPU, and
    optimizers in it are capturable. A call overwrites what the one before returned.
    """

    def __init__(self, function):
        self.function = function
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.inputs = None
        self.outputs = None

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.outputs is None:
            gc.collect()  # an old graph that Python deletes meanwhile would break this one
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


def recorded(function, args: Args):
    """The function itself on a CPU and with --no-cudagraphs."""
    return Recorded(function) if args.cudagraphs and args.device == "cuda" else function


def check_finite(metrics: dict):
    """End the program before NaN gets into a checkpoint. After a NaN all gradients are NaN, so one look now and then
    finds it; a look at every update would make the CPU wait for the GPU.
    """
    if not metrics["grad_norm"].isfinite():
        sys.exit("error: the gradient is no number any more: lower the learning rate; the last checkpoint is kept")


@torch.no_grad()
def update_target(target, online, tau: float):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def pretrain_lr(updates: int, args: Args) -> float:
    """500 updates of warm-up, then down to zero as sqrt(1 - progress) (DEVIATION 3)."""
    if not args.pretrain_lr_decay:
        return args.pretrain_lr
    decay = (1 - updates / args.pretrain_updates) ** 0.5
    return args.pretrain_lr * min(1.0, (updates + 1) / 500) * decay


def perturb(obs, actions, args: Args):
    """DEVIATION 3: put the arm a little beside where it was shown, with the actions that lead back to what was shown.

    obs (B, T+1, O), actions (B, T, A). An action asks for a joint position relative to the observed one, so a shift of
    that has a known correction. Without it the skill policy learns people's paths, but not how to stay on them.
    """
    if args.arm_noise == 0:
        return obs, actions
    J, reach = ARM[args.env_id]
    shift = args.arm_noise * torch.randn_like(obs[..., :J])  # (B, T+1, J)
    shifted = obs[..., :J] + shift
    corrected = actions[..., :J] - shift[:, :-1] / reach
    obs = torch.cat([shifted, obs[..., J:]], -1)
    actions = torch.cat([corrected.clamp(-1, 1), actions[..., J:]], -1)
    return obs, actions


def code_of(*parts) -> dict:
    """Source of functions and classes of this file, and of those that they use in turn, by name."""
    code = {}
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        code[part.__name__] = inspect.getsource(part)
        names = [node for node in ast.walk(ast.parse(code[part.__name__])) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        for name in {node.id for node in names} - own - {"Args", *code}:
            used = globals().get(name)
            if getattr(used, "__module__", None) == __name__:
                waiting.append(used)
    return code


def find_pretrained(args: Args):
    """Returns the file of the pre-trained model and, where it has to be trained first, the offline data or else None.

    A model is found again by the data, the seed, the arguments under `# Model` and `# Pre-training`, and the code
    of networks and pre-training: whoever changes one of them gets a new one. Constants, and what only pretrain()
    calls, are not seen: delete the model after a change there.
    """
    task = data_tools.TASKS[args.env_id]
    family = f"{PRETRAINED}_{task.data or args.env_id}"  # both kitchens share their data
    if args.pretrained == "published":
        return SHIPPED / f"{family}_pretrained.pt", None
    if args.pretrained:
        return Path(args.pretrained), None
    data = data_tools.load_dataset(args.env_id, args.data_dir, args.dataset, args.data)
    names = [field.name for field in fields(Args)]
    names = names[names.index("skill_horizon") : names.index("total_timesteps")]
    code = code_of(make_networks, pretrain_loss, pretrain_lr, perturb, clip_gradients, update_target)
    code["pretrain"] = inspect.getsource(pretrain)
    code["data"] = inspect.getsource(data_tools.OfflineDataset)  # what else they use shapes no model
    made_from = [data.fingerprint, args.seed]
    made_from += [ast.dump(ast.parse(source)) for _, source in sorted(code.items())]
    made_from += [[name, getattr(args, name)] for name in names]
    made_from += [np.asarray(POSITION_PERIODS.get(args.env_id, ())).tolist(), ARM.get(args.env_id)]
    made_from += [task.obs_scale, task.obs_shift, task.objects]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    path = data_tools.cache_dir(args.data_dir) / "pretrained" / f"{family}_{key}.pt"
    return path, None if os.path.exists(path) else data


def pretrain(args: Args, networks: nn.ModuleDict, path: Path, data, writer, stop: threading.Event):
    """Phase 1: learn skills, skill dynamics and prior from the offline data; writes them to path."""
    window = args.pretrain_skills * args.skill_horizon + 1
    train_data, valid_data = data.to(args.device).split(0.99, window)
    if args.recombine:
        train_data = train_data.recombined(data_tools.TASKS[args.env_id].objects, args.seed)  # DEVIATION 3
    target = copy.deepcopy(networks["model"])
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, eps=1e-7, fused=True)

    def gradients(obs, actions):
        loss, metrics = pretrain_loss(*networks.values(), target, obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        return metrics

    gradients = recorded(gradients, args)
    updates = 0
    seconds = 0.0  # of earlier commands

    parts = dict(networks=networks, target=target, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    if unfinished.exists():  # go on where an earlier command was stopped
        with reading(unfinished):
            state = load(unfinished, parts)
            updates = int(state["updates"])
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
        print(f"pre-training goes on at update {updates}: {unfinished}")
    start_time = time.time() - seconds
    save(unfinished, parts, updates=updates, seconds=seconds)  # a folder that cannot be written is noticed now
    bar = tqdm(desc="pre-training", total=args.pretrain_updates, initial=updates, unit="update")

    while updates < args.pretrain_updates:
        optimizer.param_groups[0]["lr"] = pretrain_lr(updates, args)
        obs, actions = train_data.sample_windows(args.pretrain_batch_size, window)
        obs, actions = perturb(obs, actions, args)
        metrics = gradients(obs, actions)
        metrics["grad_norm"] = clip_gradients(networks, args)
        optimizer.step()
        updates += 1
        if updates % args.target_update_interval == 0:
            update_target(target, networks["model"], args.pretrain_tau)
        bar.update()

        finished = updates == args.pretrain_updates
        stopping = stop.is_set()
        saving = stopping or updates % 2_500 == 0
        if finished or saving or updates % 100 == 0:
            check_finite(metrics)
            log(writer, "pretrain", metrics, updates)
            bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()})

        # Losses do not tell whether skills are any good: let the prior act in the task
        if finished or updates % args.pretrain_eval_interval == 0:
            num_episodes = args.pretrain_eval_episodes * (4 if finished else 1)
            returns = prior_rollouts(networks, args, num_episodes)
            facts = dict(prior_return=float(returns.mean()), prior_success=success(returns, args))
            with kept_random_state(args), torch.no_grad():
                obs, actions = valid_data.sample_windows(args.pretrain_batch_size, window)
                _, metrics = pretrain_loss(*networks.values(), target, obs, actions, args)
            facts |= {f"valid_{name}": float(value) for name, value in metrics.items()}
            log(writer, "pretrain", facts, updates)
            words = ", ".join(f"{name} {value:.3g}" for name, value in facts.items())
            bar.write(f"update {updates}: {words}")

        if saving and not finished:
            save(unfinished, parts, updates=updates, seconds=time.time() - start_time)
        if stopping and not finished:
            bar.close()
            sys.exit("stopped in pre-training; the same command goes on")
    bar.close()
    facts |= dict(updates=updates, minutes=(time.time() - start_time) / 60, data=data.source)
    facts["skill_horizon"] = args.skill_horizon
    save(path, dict(networks=networks), facts=facts)
    unfinished.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- downstream RL
class Agent(nn.Module):
    """What downstream RL trains, the frozen prior and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.model = networks["model"]
        self.skills = networks["skills"]
        self.skill_prior = networks["prior"]
        self.task_policy = copy.deepcopy(self.skill_prior)
        self.target = copy.deepcopy(self.model)  # DEVIATION 9
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)  # with the skills also E, which the model shares
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=args.device).log())
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.policy_optimizer = adam(self.task_policy.parameters(), lr=args.learning_rate)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        self.update = recorded(self.update, args)

    @torch.no_grad()
    def sample_policy(self, obs):
        """Skills of the task policy, in the warm-up still the prior: obs (E, O) NumPy -> z (E, Z) on the CPU."""
        h = self.model.encoder(torch.from_numpy(obs).to(self.args.device))  # (E, d)
        return sample_skill(gaussian_parameters(self.task_policy(h))).cpu()

    def update(self, obs, actions, z, rewards, dones, steps) -> dict:
        """One step of model, task policy and alpha on windows from the replay buffer; returns metrics."""
        args = self.args
        model = self.model
        batch = obs, actions, z, rewards, dones, steps
        loss, metrics, h, h_pred = model_loss(model, self.target, self.task_policy, *batch, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = clip_gradients(model, args)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        alpha = self.log_alpha.exp().detach()
        prior = model.encoder, self.skill_prior
        skill_obs = obs[:, :: args.skill_horizon]  # (B, N+1, O)
        loss, policy_metrics = policy_loss(model, self.task_policy, *prior, skill_obs, h, h_pred, alpha, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = clip_gradients(self.task_policy, args)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        self.skills.requires_grad_(False)  # E and pi_L again

        if args.autotune:  # alpha rises while the KL exceeds its target
            excess = policy_metrics["prior_kl"] - args.target_kl
            self.alpha_optimizer.zero_grad()
            (-self.log_alpha.exp() * excess).backward()
            self.alpha_optimizer.step()
        return dict(metrics, **policy_metrics, alpha=alpha, grad_norm=model_norm + policy_norm)


def train(args: Args, networks: nn.ModuleDict, facts: dict, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Phase 2: online RL over skills, from pre-trained networks or, where there is one, from the run's checkpoint.

    facts about the pre-training go into the results, which are returned.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    planner = Planner(agent, args, explore=True)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    # Episodes that succeed end first, and an agent that learns from those alone fails. So the warm-up lasts until every
    # environment has finished an episode, or longer.
    args.warmup_steps = max(args.warmup_steps, args.num_envs * envs.max_episode_steps)
    rb = ReplayBuffer(obs.shape[1], envs.single_action_space.shape[0], args)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(model=agent.model_optimizer, policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            global_step = int(state["global_step"])
            gradient_step = int(state["gradient_step"])
            running_return[:] = state["running_return"].numpy()
            running_length[:] = state["running_length"].numpy()
            episodes = [(step, ret, length, minutes) for step, ret, length, minutes in state["episodes"]]
            evaluations = [(step, ret, share) for step, ret, share in state["evaluations"]]
            facts = dict(state["facts"])
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
    start_time = time.time() - seconds

    skills = copy.deepcopy(agent.skills).cpu()  # acts next to the simulator
    none_ended = np.zeros(args.num_envs, dtype=bool)
    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    while not stopping:
        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4)
        if global_step < args.warmup_steps:
            z = agent.sample_policy(obs)  # (E, Z)
        else:
            z = planner(obs, global_step)
        next_obs, rewards, ended, steps, *window = execute_skill(envs, skills, obs, z, none_ended, args)
        rb.add(*window, z, args.reward_scale * rewards, ended, steps, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))

        # TRY NOT TO MODIFY: record the episodes that ended
        new_steps = int(steps.sum())
        global_step += new_steps
        running_return += rewards
        running_length += steps
        for e in np.flatnonzero(ended):
            seconds = time.time() - start_time
            row = (global_step, float(running_return[e]), int(running_length[e]), round(seconds / 60, 3))
            episodes.append(row)
            episodes_csv.writerow(row)
            last_100 = np.array([row[1] for row in episodes[-100:]])  # the paper shows training episodes
            writer.add_scalar("charts/episodic_return", row[1], global_step)
            writer.add_scalar("charts/episodic_length", row[2], global_step)
            writer.add_scalar("charts/success", success(last_100, args), global_step)
            writer.add_scalar("charts/SPS", global_step / seconds, global_step)
            bar.set_postfix(updates=gradient_step, last_100=f"{last_100.mean():.3g}")
        running_return[ended] = 0
        running_length[ended] = 0
        bar.update(new_steps)

        # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up
        updates_due = 0
        if global_step >= args.warmup_steps and len(rb.episodes) > 0:
            updates_due = int(global_step * args.updates_per_step)
        while gradient_step < updates_due:
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % args.target_update_interval == 0:
                update_target(agent.target, agent.model, args.tau)  # DEVIATION 6
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
                bar.set_postfix(updates=f"{gradient_step} of {updates_due}")
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without exploration noise
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            choose_skill = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
            returns, lengths = rollout(choose_skill, skills, args.eval_episodes, args, 10_000 + args.seed)
            evaluations.append((global_step, float(returns.mean()), success(returns, args)))
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), global_step)
            writer.add_scalar("eval/success", success(returns, args), global_step)
            bar.write(f"env step {global_step}: evaluation {returns.mean():.4g}, success {success(returns, args):.0%}")

        # Save all that the future of the run depends on
        stopping = finished or stop.is_set()
        if stopping or passed(args.checkpoint_interval, global_step, new_steps):
            save(
                checkpoint,
                parts,
                script=Path(__file__).name,
                args=asdict(args),
                envs=envs.get_state(),
                global_step=global_step,
                gradient_step=gradient_step,
                running_return=torch.from_numpy(running_return),
                running_length=torch.from_numpy(running_length),
                episodes=episodes,
                evaluations=evaluations,
                facts=facts,
                seconds=time.time() - start_time,
            )

    bar.close()
    envs.close()
    episodes_file.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped at env step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        choose_skill = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
        rollout(choose_skill, skills, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
    last_100 = [row[1] for row in episodes[-100:]]
    return dict(
        env_steps=global_step,
        updates=gradient_step,
        rl_minutes=rl_minutes,
        last_100_return=float(np.mean(last_100)) if last_100 else None,
        last_100_success=success(last_100, args),
        evaluations=evaluations,
        pretraining=facts,
    )


def evaluate(args: Args):
    """--evaluate: episodes of a trained agent without exploration noise; needs neither data nor training."""
    networks = make_networks(args, *data_tools.env_sizes(args.env_id))
    agent = Agent(args, networks)
    path = Path(args.evaluate)
    with reading(path):
        state = load(path, dict(agent=agent))
        global_step = int(state["global_step"])
    choose_skill = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
    skills = copy.deepcopy(agent.skills).cpu()
    returns, lengths = rollout(choose_skill, skills, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        choose_skill = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
        rollout(choose_skill, skills, 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"
# With --pretrained, whose model is finished, these would do nothing.
PRETRAINING = """pretrain_updates pretrain_skills pretrain_batch_size pretrain_lr pretrain_lr_decay pretrain_tau
    bc_chunks arm_noise recombine bc_coef kl_coef prior_coef recon_coef clip_updates clip_norm
    pretrain_eval_interval pretrain_eval_episodes"""


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, of --published, or of the run or agent given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", choices=list(data_tools.TASKS), default="maze")
    first.add_argument("--published", action="store_true")
    first.add_argument("--data")
    first.add_argument("--dataset")
    first.add_argument("--device")
    first.add_argument("--resume")
    first.add_argument("--evaluate")
    given, _ = first.parse_known_args(argv)

    env_id = given.env_id
    defaults = dict(env_id=env_id, **TASK_DEFAULTS.get(env_id, {}))
    if given.data or given.dataset == "d4rl":
        defaults |= PEOPLE.get(env_id, {})
    if given.published:
        defaults |= PUBLISHED.get(env_id, RELEASE)
    if given.evaluate == "published":
        given.evaluate = str(SHIPPED / "agents" / f"{Path(__file__).stem}_{env_id}.pt")
    if given.evaluate:
        with reading(given.evaluate):
            state = load(given.evaluate, {})
            check_script(state, given.evaluate)
            defaults = state["args"]
            check_types(defaults)
        defaults |= dict(capture_video=False, device=Args.device, cudagraphs=Args.cudagraphs, run_dir=Args.run_dir)
    if given.resume:
        path = Path(os.path.expanduser(given.resume)) / "args.json"
        with reading(path):
            defaults = json.loads(path.read_text())
            check_script(defaults, given.resume)
            check_types(defaults)
            names = {field.name for field in fields(Args)}
            missing = names - defaults.keys()
            if missing:
                raise ValueError(f"it has no {missing}")
    if given.device:
        defaults["cudagraphs"] = given.device == "cuda"
    args = tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n")[0])
    args.evaluate = given.evaluate
    if given.evaluate and args.env_id != defaults["env_id"]:
        task = defaults["env_id"]
        sys.exit(f"error: {given.evaluate} is an agent of {task}: leave out --env-id")
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        before = defaults.get(name, getattr(Args, name))
        if value == "":
            sys.exit(f"error: {flag} is empty: give a value, or leave it out")
        if given.resume and name not in MAY_CHANGE.split() and value != before:
            sys.exit(f"error: {flag} cannot change with --resume: leave it out, or begin a new run")
        if args.pretrained and name in PRETRAINING.split() and value != before:
            sys.exit(f"error: {flag} does nothing to the finished model of --pretrained: leave out one of them")
    return args


def check_script(saved: dict, source: str):
    """End the program if a run or an agent was made by another file; the oldest do not say by which."""
    this = Path(__file__).name
    script = saved.pop("script", this)
    if script != this:
        sys.exit(f"error: {source} was made by {script}: use that file")


def check_types(values: dict):
    """Raise an error if saved arguments are not those of this file."""
    types = {field.name: field.type for field in fields(Args)}
    for name, value in values.items():
        kind = float if type(value) is int and types[name] is float else type(value)
        choices = get_args(types[name])  # values of a Literal, types of `str | None`
        if kind is not types[name] and kind not in choices and value not in choices:
            raise ValueError(f"{name} cannot be {value!r}")


def check_args(args: Args):
    """End the program with a sentence where arguments cannot work."""
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in ("seed", "eval_interval", "warmup_steps"):
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("tau", "pretrain_tau", "gamma", "rho", "momentum") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.alpha == 0:
        sys.exit("error: --alpha 0 does not work, its logarithm is tuned; give a small number")
    if args.num_policy_trajs == 1:
        sys.exit("error: --num-policy-trajs 1 does not work, one plan has no std; give at least 2")
    if args.num_elites > args.num_samples + args.num_policy_trajs:
        sys.exit("error: --num-elites exceeds --num-samples + --num-policy-trajs; lower it")
    if args.bc_chunks > args.pretrain_skills:
        sys.exit("error: --bc-chunks exceeds --pretrain-skills; lower it")
    if args.arm_noise > 0 and args.env_id not in ARM:
        sys.exit(f"error: --arm-noise does not work on {args.env_id}, which has no entry in ARM; leave it out")
    if args.recombine and not data_tools.find_task(args.env_id).objects:
        sys.exit(f"error: --recombine does not work on {args.env_id}, whose Task names no objects; leave it out")
    others = args.published or args.data or args.dataset != "scripted"
    others = others or args.skill_horizon != Args.skill_horizon
    if args.pretrained == "published" and others:
        sys.exit("error: --pretrained published needs scripted data and our settings; leave out the other flag")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; use --device cpu")
    if args.evaluate:
        return
    envs = data_tools.make_envs(args.env_id, 1)
    longest = -(-envs.max_episode_steps // args.skill_horizon)  # skills in an episode that does not end early
    if longest < args.num_skills:
        sys.exit(f"error: episodes have at most {longest} skills, fewer than a window; lower --num-skills")
    if args.capture_video:
        envs.reset(seed=args.seed)
        envs.draw(0)  # a task or a machine without pictures is noticed now, before pre-training
    envs.close()


def main(args: Args) -> dict:
    """Both phases of a run; returns its results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit("stopped before there was anything to save"))
    check_args(args)
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # more do not help networks of this size
    if args.evaluate:
        return evaluate(args)

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = Path(os.path.expanduser(args.resume or f"{args.run_dir}/{run_name}"))
    finished = os.path.exists(run_dir / "results.json")  # pathlib's raises an error in a closed folder
    if finished and not os.path.exists(run_dir / "checkpoint.pt"):
        sys.exit(f"error: {run_dir} has no checkpoint.pt any more: begin a new run")
    resumed = os.path.exists(run_dir / "checkpoint.pt")  # it holds all networks
    path, data = (None, None) if resumed else find_pretrained(args)
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, torch {torch.__version__}"
    facts = {}
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        saved = dict(asdict(args), script=Path(__file__).name)
        write_json(run_dir / "args.json", saved)
        torch.manual_seed(args.seed)
        networks = make_networks(args, *data_tools.env_sizes(args.env_id))
        with SummaryWriter(run_dir) as writer:
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            stop = stop_at_signals()
            if data is not None:
                pretrain(args, networks, path, data, writer, stop)
            if not resumed:
                with reading(path):
                    facts = dict(load(path, dict(networks=networks))["facts"])
                horizon = facts.get("skill_horizon", args.skill_horizon)  # older models do not say
                if horizon != args.skill_horizon:
                    sys.exit(f"error: the model's skills have {horizon} env steps; use --skill-horizon {horizon}")
                print(f"pre-trained model: {path}")
            (run_dir / "results.json").unlink(missing_ok=True)  # of fewer env steps
            results = train(args, networks, facts, run_dir, writer, stop)
        results |= dict(machine=machine, args=asdict(args))
        write_json(run_dir / "results.json", results)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:120] or "MemoryError"
        full = isinstance(error, MemoryError) or "allocate" in reason  # what torch says of full memory
        if not full:
            raise
        sys.exit(f"error: no memory left ({reason}); end other programs or choose smaller sizes")
    except OSError as error:  # while logs, episodes.csv or results.json were written
        sys.exit(f"error: cannot write to {run_dir} ({error}); free some space or choose another --run-dir")
    if results["updates"] == 0:
        print("RL made no update: it ended too early")
    print(f"finished: {run_dir}; curves: tensorboard --logdir {run_dir}")
    return results


if __name__ == "__main__":
    main(parse_args())
