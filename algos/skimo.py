"""SkiMo: Skill-based Model-based Reinforcement Learning (Shi, Lim & Lee, CoRL 2022), https://arxiv.org/abs/2207.07560

Idea: learn skills of H = 10 actions, and a dynamics model that jumps a whole skill ahead, jointly from task-agnostic
data; then plan over skills in that model (CEM) while a task policy, reward and value are learnt by online RL.

    python algos/skimo.py --env-id maze                      # data, pre-training (cached), RL, evaluation, pictures
    python algos/skimo.py --env-id maze --pretrained published          # start at RL from the model that we ship

1. Pre-training (offline): encode chunks of H actions as skills z_i ~ q; loss = BC + KL(q || N(0,1)) (eq. 3)
   + reconstruction + consistency of h_{i+1} = D(h_i, z_i) (eq. 4) + prior KL(q || p(h_i)) (eq. 5).
2. Downstream RL (task policy pi starts as the prior p): repeat
   a. act: plan skills with CEM in (D, R, Q), execute H steps with the frozen skill policy pi_L;
   b. model update: consistency, reward and TD losses on N-skill windows (eq. 6);
   c. policy update: max Q(h, z) - alpha KL(pi(h) || p(h)) (eq. 7); adapt alpha; move the slow target copy.

Deviations from paper and release (DEVIATION n in the code)
 1. KL divergences in closed form (tanh of Gaussians with the same squash), not from 100 samples.
 2. The skill policy is trained on `bc_chunks` random chunks of a window, not on all N: same gradient on average.
 3. Pre-training has a warm-up and decay of the learning rate, and fewer, smaller updates; maze networks see periodic
    features of the position; the maze data contain action noise (README, "Pre-training that explores").
 4. E environments act in lockstep; the ratio of updates to env steps and all schedules stay those of the release.

Logged: charts/{episodic_return,episodic_length,success,SPS}, losses/*, pretrain/*, eval/*, time/*; episodes.csv has
one row per training episode, results.json the summary. Score and seeds: README, "Maze".
Shapes: B batch, N skills per window, H steps per skill, O observation, A action, Z skill, d latent, E environments,
K plan horizon, P plans. Batch first.
"""

import argparse
import copy
import csv
import functools
import hashlib
import json
import os
import pickle
import platform
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data_tools, from any working directory
import data_tools

FILE_VERSION = 1  # raised when a change makes older checkpoints or pre-trained models unusable


@dataclass
class Args:
    env_id: str = "maze"  # the task: maze, kitchen, kitchen-misaligned or calvin
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of networks, sampling and environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to learn and plan; auto takes CUDA where there is one
    num_threads: int = 0  # CPU threads of torch (0: one per core)
    compile: bool | None = None  # torch.compile of losses and planner (None: on CUDA only)
    run_dir: str = "runs"  # folder in which this run's own folder is made
    data_dir: str | None = None  # folder of offline data and pre-trained models (default: $SKIMO_DATA_DIR, else the user's cache folder)
    resume: str | None = None  # go on with the run in this folder; its arguments become the defaults
    log_every: int = 100  # gradient updates between two logged averages of the losses
    checkpoint_interval: int = 50_000  # env steps between two checkpoints
    eval_interval: int = 100_000  # env steps between two clean evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of a clean evaluation (no exploration noise)
    capture_video: bool = False  # record one evaluation episode as MP4 at the end

    # Pre-training
    pretrained: str | None = None  # start RL from this pre-trained model: a path, or `published` for the one in benchmarks/results
    retrain: bool = False  # pre-train again although the cache has this model
    data_noise: float = 0.5  # std of the action noise under which the maze data are collected
    pretrain_updates: int = 10_000  # gradient updates (release: 700,000 for the maze, 425,000 elsewhere)
    pretrain_batch_size: int = 256  # windows of N skills per update (release: 512)
    bc_chunks: int = 2  # chunks of each window on which the skill policy is trained (release: all N)
    pretrain_lr: float = 1e-3  # peak learning rate of Adam
    pretrain_lr_decay: bool = True  # 500 updates of warm-up, then decay as sqrt(1 - progress) (release: constant)
    bc_coef: float = 2.0  # weight of the skill policy's squared error
    kl_coef: float = 1e-4  # weight of KL(q || N(0,1)) (release: 1e-4)
    prior_coef: float = 1.0  # weight of KL(q || p)
    recon_coef: float = 1.0  # weight of the observation reconstruction
    position_features: bool = True  # maze: sines and cosines of the position as further inputs (release: none)
    pretrain_eval_interval: int = 2_500  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 100  # roll-outs of the prior in a validation; four times as many at the end

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments stepped in lockstep
    warmup_steps: int = 5_000  # env steps with skills from the prior before planner and updates start
    batch_size: int = 256  # windows of N skills per update
    updates_per_step: float = 10 / 500  # gradient updates per env step, those of the warm-up included
    learning_rate: float = 1e-3  # of model and task policy
    alpha_lr: float = 3e-4  # of the weight of the prior KL
    alpha: float = 0.5  # weight of the prior KL, or its start if tuned
    autotune: bool = False  # tune alpha to keep the prior KL at target_kl
    target_kl: float = 3.0  # nats between task policy and prior, if alpha is tuned
    policy_latents: Literal["imagined", "h0", "encoded"] = "imagined"  # states of the policy loss: imagined (paper, eq. 7), only the first (release), or encoded observations
    gamma: float = 0.99  # discount per skill
    rho: float = 0.5  # weight rho^t of the t-th skill of a window
    tau: float = 0.01  # share of the online weights in each target update
    target_update_interval: int = 2  # updates between target updates
    consistency_coef: float = 2.0  # weight of the latent consistency
    reward_coef: float = 0.25  # weight of the reward loss
    value_coef: float = 0.1  # weight of the TD loss
    reward_scale: float = 1.0  # factor on the task's reward
    max_grad_norm: float = 100.0  # clip of the gradient's global norm

    # Planner
    num_samples: int = 512  # sampled plans per iteration
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 64  # plans that the next distribution is fitted to
    cem_iters: int = 6  # iterations of CEM
    temperature: float = 0.5  # factor on the values in the elites' softmax
    momentum: float = 0.1  # share of the old mean in the new
    plan_std: float = 2.0  # first and largest std of the plans
    explore_std_start: float = 0.5  # floor of the plans' std at the start
    explore_std_end: float = 0.01  # floor of the plans' std after std_steps
    horizon_steps: int = 25_000  # env steps over which the plan grows from 1 to N skills
    std_steps: int = 25_000  # env steps over which the floor of the std falls

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    num_skills: int = 10  # N: skills per window and in the longest plan
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of all hidden layers
    latent_dim: int = 256  # d: size of a latent state
    skill_encoder: Literal["mlp", "lstm"] = "lstm"  # architecture of q


# What the release's configurations say per task; the maze's pre-training is ours (DEVIATION 3).
TASK_DEFAULTS = {
    "maze": dict(
        latent_dim=128, skill_encoder="mlp", batch_size=128, warmup_steps=50_000, alpha=1.0, autotune=True,
        horizon_steps=1_000_000, std_steps=1_000_000, total_timesteps=650_000, kl_coef=1e-3,
    ),
    "kitchen": dict(alpha=0.5, pretrain_updates=425_000),
    "kitchen-misaligned": dict(alpha=0.5, pretrain_updates=425_000),
    "calvin": dict(
        hidden_dim=256, num_skills=1, bc_chunks=1, alpha=0.1, reward_scale=0.01, total_timesteps=2_000_000,
        pretrain_updates=425_000,
    ),
}  # fmt: skip


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args; the defaults are those of the chosen task, or of the run that is resumed."""
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default="maze")
    first.add_argument("--resume")
    chosen, _ = first.parse_known_args(argv)
    if chosen.env_id not in TASK_DEFAULTS:
        sys.exit(f"error: --env-id {chosen.env_id} is not a task; choose one of {', '.join(TASK_DEFAULTS)}")
    default = Args(env_id=chosen.env_id, **TASK_DEFAULTS[chosen.env_id])
    if chosen.resume:
        try:
            default = Args(**json.loads((Path(chosen.resume) / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"error: --resume {chosen.resume} is not a run folder of this file ({error})")
    args = tyro.cli(Args, args=argv, default=default, description=__doc__.split("\n")[0])
    check_args(args)
    return args


def check_args(args: Args):
    """Refuse arguments that cannot work, in one sentence that names the flag and the cure."""
    if args.env_id not in data_tools.TASKS:
        sys.exit(f"error: --env-id {args.env_id} is not built yet; choose one of {', '.join(data_tools.TASKS)}")
    if not 1 <= args.bc_chunks <= args.num_skills:
        sys.exit(f"error: --bc-chunks {args.bc_chunks} must lie between 1 and --num-skills {args.num_skills}")
    if not 1 <= args.num_elites <= args.num_samples + args.num_policy_trajs:
        sys.exit(f"error: --num-elites {args.num_elites} exceeds --num-samples + --num-policy-trajs; lower it")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device; use --device cpu")
    for field in fields(args):
        value = getattr(args, field.name)
        if field.type is int and value < 0:
            sys.exit(f"error: --{field.name.replace('_', '-')} {value} is negative; give 0 or more")


# ---------------------------------------------------------------------------------------------------------------------
# Networks (ELU everywhere, orthogonal weights)


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers of the given sizes with ELU between them; linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(in_dim, out_dim)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ELU()]
    return nn.Sequential(*layers[:-1])


def scalar_head(in_dim: int, hidden_dim: int) -> nn.Sequential:
    """Reward and Q: a normalised first layer, then an MLP whose last layer starts near 0."""
    u = hidden_dim
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


class ObsFeatures(nn.Module):
    """Raw observations (..., O) -> what networks see (..., F); its first O entries are the scaled observation.

    Maze: (q / 40 - 0.5, v / 10) and, DEVIATION 3, sines and cosines of the position with periods of 1 to 32 cells: the
    walls repeat with period 1, a fortieth of the input range, which a plain MLP learns very slowly. Others: raw.
    """

    def __init__(self, env_id: str, obs_dim: int, position_features: bool):
        super().__init__()
        maze = env_id == "maze"
        scale = [1 / 40, 1 / 40, 1 / 10, 1 / 10] if maze else [1.0] * obs_dim
        shift = [-0.5, -0.5, 0.0, 0.0] if maze else [0.0] * obs_dim
        periods = [1, 2, 4, 8, 16, 32] if maze and position_features else []  # cells
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("angular_frequency", 2 * torch.pi / torch.tensor(periods).float())
        self.obs_dim = obs_dim
        self.dim = obs_dim + 2 * 2 * len(periods)

    def forward(self, obs):
        scaled = obs * self.scale + self.shift  # (..., O)
        if self.dim == self.obs_dim:
            return scaled
        phase = (obs[..., :2, None] * self.angular_frequency).flatten(-2)  # (..., 2 * periods)
        return torch.cat([scaled, phase.sin(), phase.cos()], -1)  # (..., F)


class WorldModel(nn.Module):
    """State encoder E, skill dynamics D, reward R, critics Q and observation decoder."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u, d = args.hidden_dim, args.latent_dim
        self.features = ObsFeatures(args.env_id, obs_dim, args.position_features)
        self.encoder_net = mlp(self.features.dim, u, d)
        self.dynamics = mlp(d + args.skill_dim, u, u, u, u, d)
        self.reward_model = scalar_head(d + args.skill_dim, u)
        self.qf1 = scalar_head(d + args.skill_dim, u)
        self.qf2 = scalar_head(d + args.skill_dim, u)
        self.decoder = mlp(d, u, u, 2 * obs_dim)

    def encoder(self, obs):  # h = E(o)
        return self.encoder_net(self.features(obs))  # (..., d)

    def next(self, h, z):  # D(h, z): the latent state after a whole skill
        return self.dynamics(torch.cat([h, z], -1))  # (..., d)

    def reward(self, h, z):  # R(h, z)
        return self.reward_model(torch.cat([h, z], -1)).squeeze(-1)  # (...)

    def q(self, h, z):  # Q_1(h, z), Q_2(h, z)
        hz = torch.cat([h, z], -1)
        return self.qf1(hz).squeeze(-1), self.qf2(hz).squeeze(-1)  # 2 x (...)

    def decode(self, h):
        """Latent (..., d) -> mean and std of the scaled observation, each (..., O), std in [0.1, 1.5]."""
        mean, raw = self.decoder(h).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw) + 1)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | s, z), on a state encoder E_L of their own."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, d, H = args.hidden_dim, args.latent_dim, args.skill_horizon
        self.features = ObsFeatures(args.env_id, obs_dim, args.position_features)
        self.encoder_net = mlp(self.features.dim, u, d)
        self.skill_policy = mlp(d + args.skill_dim, u, u, u, u, 2 * action_dim)
        self.uses_lstm = args.skill_encoder == "lstm"
        if self.uses_lstm:
            self.skill_encoder = nn.LSTM(action_dim + d, 128, batch_first=True)
            self.skill_head = mlp(128, 2 * args.skill_dim)
        else:
            self.skill_encoder = mlp(H * action_dim + d, u, u, u, u, 2 * args.skill_dim)

    def encoder(self, obs):  # E_L(s)
        return self.encoder_net(self.features(obs))  # (..., d)

    def encode_skill(self, obs, actions):
        """Chunks of observations (B, N, H, O) and actions (B, N, H, A) -> q(z): mean and std, each (B, N, Z)."""
        if not self.uses_lstm:
            return tanh_normal(self.skill_encoder(torch.cat([actions.flatten(2), self.encoder(obs[:, :, 0])], -1)))
        steps = torch.cat([actions, self.encoder(obs)], -1).flatten(0, 1)  # (B * N, H, A + d)
        last = self.skill_encoder(steps)[0][:, -1]  # (B * N, 128)
        return tanh_normal(self.skill_head(last).unflatten(0, actions.shape[:2]))

    def act(self, obs, z):
        """Mode of the skill policy: observations (..., O) and skills (..., Z) -> actions (..., A) in (-1, 1)."""
        mean, _ = tanh_normal(self.skill_policy(torch.cat([self.encoder(obs), z], -1)))
        return torch.tanh(mean)


def tanh_normal(x):
    """Network output (..., 2 * K) -> mean and std (..., K) of the Gaussian whose tanh is the variable."""
    mean, log_std = x.chunk(2, -1)
    return 5 * torch.tanh(mean / 5), log_std.clamp(-10, 2).exp() + 1e-4


def sample_tanh(mean, std):
    """One reparameterised sample of tanh(N(mean, std)), same shape."""
    return torch.tanh(mean + std * torch.randn_like(mean))


def kl_divergence(p, q):
    """KL(p || q) of diagonal Gaussians (mean, std) (..., Z) -> (...); exact under a common tanh. DEVIATION 1."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    return ((std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5).sum(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Losses


def pretrain_loss(model, skills, prior, target, obs, actions, args):
    """Joint loss of skills and skill dynamics on windows of the offline data (SkiMo eq. 3-5).

    obs (B, N*H+1, O) raw, actions (B, N*H, A); target is the slow copy of model. Returns the loss and metrics, scalars.
    """
    B, N, H = len(obs), args.num_skills, args.skill_horizon
    chunk_obs = obs[:, :-1].unflatten(1, (N, H))  # (B, N, H, O)
    chunk_actions = actions.unflatten(1, (N, H))  # (B, N, H, A)
    q = skills.encode_skill(chunk_obs, chunk_actions)  # 2 x (B, N, Z)
    z = sample_tanh(*q)  # (B, N, Z)

    # eq. 3: behavioural cloning by the skill policy, on some chunks of each window (DEVIATION 2), and KL(q || N(0, 1))
    chosen = torch.rand(B, N, device=obs.device).topk(args.bc_chunks, 1).indices  # (B, C)
    row = torch.arange(B, device=obs.device)[:, None]  # (B, 1)
    z_steps = z[row, chosen].unsqueeze(2).expand(-1, -1, H, -1)  # (B, C, H, Z)
    bc_loss = (skills.act(chunk_obs[row, chosen], z_steps) - chunk_actions[row, chosen]).square().mean()
    standard_normal = (torch.zeros_like(q[0]), torch.ones_like(q[1]))
    kl_loss = kl_divergence(q, standard_normal).clamp(-100, 100).mean()

    # Reconstruction: Gaussian likelihood of the scaled states at skill boundaries
    skill_obs = obs[:, ::H]  # (B, N+1, O)
    h = model.encoder(skill_obs)  # (B, N+1, d)
    mean, std = model.decode(h)  # 2 x (B, N+1, O)
    scaled_obs = model.features(skill_obs)[..., : obs.shape[-1]]
    recon_loss = -torch.distributions.Normal(mean, std, validate_args=False).log_prob(scaled_obs).sum(-1).mean()

    # eq. 4: h_{i+1} = D(h_i, z_i), rolled out from h_0 through time, agrees with the slow encoder
    with torch.no_grad():
        h_target = target.encoder(skill_obs)  # (B, N+1, d)
    h_pred, consistency = h[:, 0], 0.0
    for i in range(N):
        h_pred = model.next(h_pred, z[:, i])  # (B, d)
        consistency = consistency + args.rho**i * (h_pred - h_target[:, i + 1]).square().mean(-1)  # (B,)
    consistency_loss = consistency.clamp(max=1e4).mean()

    # eq. 5: the prior p(z | h) follows q; its gradient reaches the state encoder, not q
    prior_loss = kl_divergence((q[0].detach(), q[1].detach()), tanh_normal(prior(h[:, :-1]))).mean()

    model_loss = args.recon_coef * recon_loss + args.consistency_coef * consistency_loss
    loss = args.bc_coef * bc_loss + args.kl_coef * kl_loss + args.prior_coef * prior_loss + model_loss / N
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss)
    metrics |= dict(recon_loss=recon_loss, consistency_loss=consistency_loss)
    return loss, {name: value.detach() for name, value in metrics.items()}


def model_loss(model, target, task_policy, obs, z, rewards, dones, args):
    """World model and critics on windows of skills from the replay buffer (SkiMo eq. 6).

    obs (B, N+1, O), z (B, N, Z), rewards and dones (B, N). Returns the loss, metrics, and detached latents for the
    policy: h = E(o) and h_pred rolled out from h_0, both (B, N+1, d).
    """
    N = z.shape[1]
    h = model.encoder(obs)  # (B, N+1, d)
    with torch.no_grad():
        h_target = target.encoder(obs)  # (B, N+1, d)
        next_z = sample_tanh(*tanh_normal(task_policy(h[:, 1:])))  # (B, N, Z)
        td_target = rewards + (1 - dones) * args.gamma * torch.min(*target.q(h[:, 1:], next_z))  # (B, N)
    h_pred = [h[:, 0]]
    for t in range(N):
        h_pred.append(model.next(h_pred[-1], z[:, t]))
    h_pred = torch.stack(h_pred, 1)  # (B, N+1, d)

    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    consistency = (rho * (h_pred[:, 1:] - h_target[:, 1:]).square().mean(-1)).sum(1)  # (B,)
    # Reward and value learn on imagined states, weighted by rho^t, and on encoded ones, weight 1.
    reward_error = (rho * (model.reward(h_pred[:, :-1], z) - rewards).square()).sum(1)
    reward_error = reward_error + (model.reward(h[:, :-1], z) - rewards).square().sum(1)  # (B,)
    q1, q2 = model.q(h_pred[:, :-1], z)  # 2 x (B, N)
    value_error = (rho * ((q1 - td_target).square() + (q2 - td_target).square())).sum(1)
    q1_encoded, q2_encoded = model.q(h[:, :-1], z)
    value_error = value_error + ((q1_encoded - td_target).square() + (q2_encoded - td_target).square()).sum(1)  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5) + args.reward_coef * reward_error.clamp(max=1e5)
    loss = (loss + args.value_coef * value_error.clamp(max=1e5)).mean() / N
    metrics = dict(consistency_loss=consistency.mean(), reward_loss=reward_error.mean(), value_loss=value_error.mean())
    metrics |= dict(q_value=q1_encoded.mean(), td_target=td_target.mean())
    return loss, {name: value.detach() for name, value in metrics.items()}, h.detach(), h_pred.detach()


def policy_loss(model, task_policy, prior_model, skill_prior, obs, h, h_pred, alpha, args):
    """Task policy: maximise Q, stay close to the frozen prior (SkiMo eq. 7).

    obs (B, N+1, O), h and h_pred (B, N+1, d) detached, alpha (); prior_model is frozen after pre-training and keeps its own E.
    Returns the loss and metrics; metrics["prior_kl"] is the mean KL in nats.
    """
    N = obs.shape[1] - 1
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    latents = {"imagined": h_pred, "h0": h[:, :1].expand_as(h), "encoded": h}[args.policy_latents][:, :N]  # (B, N, d)
    z = sample_tanh(*tanh_normal(task_policy(latents)))  # (B, N, Z)
    q_value = torch.min(*model.q(latents, z))  # (B, N)
    with torch.no_grad():
        prior = tanh_normal(skill_prior(prior_model.encoder(obs[:, :-1])))  # 2 x (B, N, Z)
    prior_kl = kl_divergence(tanh_normal(task_policy(h[:, :-1])), prior).clamp(-100, 100)  # (B, N)
    loss = ((rho * (alpha * prior_kl - q_value)).sum(1)).mean() / N
    return loss, dict(policy_loss=loss.detach(), policy_q=q_value.detach().mean(), prior_kl=prior_kl.detach().mean())


# ---------------------------------------------------------------------------------------------------------------------
# Planner and acting


@torch.no_grad()
def plan(model, task_policy, obs, mean, std_floor, noise_scale, args):
    """CEM over sequences of K skills in the skill dynamics, for all environments at once (SkiMo section 3.4).

    obs (E, O); mean (E, K, Z) first mean, zeros or the shifted last plan; std_floor () least std of the plans;
    noise_scale () 1 to explore, 0 to evaluate. Returns the first skill (E, Z) and the fitted mean (E, K, Z).
    """
    E, K, Z = mean.shape
    h0 = model.encoder(obs)  # (E, d)

    h, policy_plans = h0[:, None].expand(-1, args.num_policy_trajs, -1), []
    for _ in range(K):
        policy_plans.append(sample_tanh(*tanh_normal(task_policy(h))))  # (E, 25, Z)
        h = model.next(h, policy_plans[-1])
    policy_plans = torch.stack(policy_plans, 2)  # (E, 25, K, Z)

    std = torch.full_like(mean, args.plan_std)
    for _ in range(args.cem_iters):
        noise = torch.randn(E, args.num_samples, K, Z, device=obs.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-0.999, 0.999)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, Z)

        # Return of each plan: K predicted rewards, then the value of going on with the task policy
        h, value = h0[:, None].expand(-1, plans.shape[1], -1), 0.0
        for t in range(K):
            value = value + args.gamma**t * model.reward(h, plans[:, :, t])  # (E, P)
            h = model.next(h, plans[:, :, t])
        last_z = sample_tanh(*tanh_normal(task_policy(h)))
        value = value + args.gamma**K * torch.min(*model.q(h, last_z))  # (E, P)

        elite_value, elite_index = value.topk(args.num_elites, 1)  # (E, 64)
        elites = plans.gather(1, elite_index[..., None, None].expand(-1, -1, K, Z))  # (E, 64, K, Z)
        weight = torch.softmax(args.temperature * elite_value, 1)[..., None, None]  # (E, 64, 1, 1)
        elite_mean = (weight * elites).sum(1)  # (E, K, Z)
        variance = (weight * (elites - elite_mean[:, None]).square()).sum(1)
        std = variance.sqrt().maximum(std_floor).clamp(max=args.plan_std)
        mean = args.momentum * mean + (1 - args.momentum) * elite_mean

    # One elite at random, with probability `weight`: exponential races draw from it without a host round trip.
    picked = (weight[..., 0, 0] / torch.empty_like(elite_value).exponential_()).argmax(1)  # (E,)
    first_skill = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, Z)
    first_skill = first_skill + noise_scale * std[:, 0] * torch.randn_like(first_skill)
    return first_skill.clamp(-0.999, 0.999), mean


class Planner:
    """Calls `plan` for E environments by the schedules, and keeps the last plan to start the next one from."""

    def __init__(self, model, task_policy, args: Args, device, compile: bool):
        self.model, self.task_policy, self.args, self.device = model, task_policy, args, device
        self.plan = torch.compile(plan, mode="reduce-overhead") if compile else plan
        self.last_mean = None  # (E, K, Z)

    def __call__(self, obs, episode_start, global_step: int, explore: bool):
        """obs (E, O) and episode_start (E,) bool, NumPy -> skills (E, Z) on the CPU."""
        args = self.args
        plan_horizon = int(1 + min(1.0, global_step / max(args.horizon_steps, 1)) * (args.num_skills - 1))
        mean = torch.zeros(len(obs), plan_horizon, args.skill_dim, device=self.device)
        if self.last_mean is not None and plan_horizon == self.last_mean.shape[1] > 1:
            keep = torch.from_numpy(~episode_start).to(self.device)[:, None, None]
            mean[:, :-1] = self.last_mean[:, 1:] * keep
        progress = min(1.0, global_step / max(args.std_steps, 1))
        std_floor = args.explore_std_start + progress * (args.explore_std_end - args.explore_std_start)
        scalars = torch.tensor([std_floor, float(explore)], device=self.device)
        torch.compiler.cudagraph_mark_step_begin()
        z, mean = self.plan(
            self.model, self.task_policy, torch.from_numpy(obs).to(self.device), mean, scalars[0], scalars[1], args
        )
        self.last_mean = mean.clone()
        return z.cpu()


@torch.no_grad()
def execute_skill(envs, skills, obs, z, ended, args, trace: list | None = None):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O); ended (E,) bool: members that wait for their reset. Returns next_obs (E, O), the rewards' sum (E,),
    the new ended (E,) and the env steps taken (E,). Each step's (obs, action, ended) is appended to trace.
    """
    rewards, steps = np.zeros(len(obs), dtype=np.float32), np.zeros(len(obs), dtype=np.int64)
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        if trace is not None:
            trace.append((obs, action, ended))
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += np.where(ended, 0.0, reward)
        steps += ~ended
        ended = terminations | truncations
        if ended.all():
            break
    return obs, rewards, ended, steps


def rollout(envs, skills, choose_skill, args: Args, seed: int, max_skills: int | None = None):
    """One episode (at most max_skills long) in every environment, with skills z = choose_skill(obs, episode_start).

    Returns returns (E,), lengths in env steps (E,), and the trace of execute_skill with the last observation.
    The random state outside is left as it was.
    """
    skills = copy.deepcopy(skills).cpu()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        E, trace, num_skills = len(obs), [], 0
        ended, episode_start = np.zeros(E, dtype=bool), np.ones(E, dtype=bool)
        returns, lengths = np.zeros(E), np.zeros(E, dtype=np.int64)
        while not ended.all() and num_skills != max_skills:
            z = choose_skill(obs, episode_start)
            obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, ended, args, trace)
            returns, lengths, num_skills = returns + rewards, lengths + steps, num_skills + 1
            episode_start = np.zeros(E, dtype=bool)
    envs.close()
    return returns, lengths, [*trace, (obs, trace[-1][1], ended)]


def prior_rollouts(model, skills, prior, args: Args, num_episodes: int, max_skills: int | None = None):
    """Episodes of skills drawn from the prior: what a fresh task policy explores. Returns as `rollout`, and the skills."""
    model, prior, drawn = copy.deepcopy(model).cpu(), copy.deepcopy(prior).cpu(), []

    @torch.no_grad()
    def choose_skill(obs, episode_start):
        drawn.append(sample_tanh(*tanh_normal(prior(model.encoder(torch.from_numpy(obs))))))
        return drawn[-1]

    envs = data_tools.make_envs(args.env_id, num_episodes)
    return *rollout(envs, skills, choose_skill, args, args.seed, max_skills), torch.stack(drawn, 1)  # (E, skills, Z)


@torch.no_grad()
def open_loop_prediction(model, skills, prior, args: Args, num_skills: int = 50):
    """50 skills of the prior in the simulator, and what the skill dynamics foretells from the first state alone.

    Returns observations at the skill boundaries, real and predicted, each (num_skills + 1, O) raw (paper, fig. 10).
    """
    _, lengths, trace, z = prior_rollouts(model, skills, prior, args, 1, num_skills)
    real = np.concatenate([obs for obs, _, _ in trace[:: args.skill_horizon]])
    model = copy.deepcopy(model).cpu()
    h = [model.encoder(torch.from_numpy(real[:1]))]
    for t in range(len(real) - 1):
        h.append(model.next(h[-1], z[:, t]))
    mean, _ = model.decode(torch.cat(h))  # (num_skills + 1, O) scaled
    return real, ((mean - model.features.shift) / model.features.scale).numpy()


def evaluate(skills, args: Args, planner: Planner, global_step: int, video: Path | None = None):
    """Clean evaluation: planner without exploration noise, one episode in each of eval_episodes environments.

    Returns returns (E,) and lengths in env steps (E,). With video, one episode is rendered into that MP4 instead.
    """
    envs = data_tools.make_envs(args.env_id, 1 if video else args.eval_episodes, video)
    planner = Planner(planner.model, planner.task_policy, args, planner.device, False)
    choose_skill = functools.partial(planner, global_step=global_step, explore=False)
    return rollout(envs, skills, choose_skill, args, seed=10_000 + args.seed)[:2]


# ---------------------------------------------------------------------------------------------------------------------
# Replay buffer and checkpoints


class ReplayBuffer:
    """Finished episodes of at least N skills, back to back in flat tensors on the device; nothing is ever dropped.

    An episode of T skills takes T + 1 rows; the last one holds its final observation.
    """

    def __init__(self, obs_dim: int, args: Args, device):
        self.num_skills, self.device = args.num_skills, device
        self.rows = torch.zeros(0, obs_dim + args.skill_dim + 2, device=device)  # obs, z, reward, done
        self.split_sizes = [obs_dim, args.skill_dim, 1, 1]
        self.episodes = torch.zeros(0, 2, dtype=torch.long, device=device)  # first row, skills
        self.running = [[] for _ in range(args.num_envs)]  # rows of the unfinished episodes

    def add(self, obs, z, rewards, ended, next_obs):
        """One skill of every environment: obs, next_obs (E, O) NumPy, z (E, Z), rewards, ended (E,) NumPy.

        A time-out is stored as a true end, as in the release.
        """
        rewards, dones = torch.from_numpy(rewards)[:, None], torch.from_numpy(ended).float()[:, None]
        rows = torch.cat([torch.from_numpy(obs), z, rewards, dones], 1)  # (E, O + Z + 2)
        for e, running in enumerate(self.running):
            running.append(rows[e])
            if ended[e]:
                last = torch.zeros_like(rows[e])
                last[: self.split_sizes[0]] = torch.from_numpy(next_obs[e])
                if len(running) >= self.num_skills:
                    episode = torch.tensor([[len(self.rows), len(running)]], device=self.device)
                    self.episodes = torch.cat([self.episodes, episode])
                    self.rows = torch.cat([self.rows, torch.stack([*running, last]).to(self.device)])
                running.clear()

    def sample(self, batch_size: int):
        """Windows of N skills: obs (B, N+1, O), z (B, N, Z), rewards and dones (B, N).

        Episodes are uniform; the start is min(uniform{0..T-1}, T-N), so that the last window is drawn more often.
        """
        index = torch.randint(len(self.episodes), (batch_size,), device=self.device)  # (B,)
        first, T = self.episodes[index].unbind(1)
        start = (torch.rand(batch_size, device=self.device) * T).long().minimum(T - self.num_skills)
        steps = torch.arange(self.num_skills + 1, device=self.device)
        obs, z, rewards, dones = self.rows[(first + start)[:, None] + steps].split(self.split_sizes, -1)  # (B, N+1, .)
        return obs, z[:, :-1], rewards[:, :-1, 0], dones[:, :-1, 0]

    def state_dict(self) -> dict:
        return dict(rows=self.rows.cpu(), episodes=self.episodes.cpu(), running=self.running)

    def load_state_dict(self, state: dict):
        self.rows, self.episodes = state["rows"].to(self.device), state["episodes"].to(self.device)
        self.running = state["running"]


def save_checkpoint(path: Path, state: dict):
    """Write a checkpoint atomically; a full disk ends the program with a sentence and keeps the old file."""
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        part.unlink(missing_ok=True)
        sys.exit(f"error: cannot write {path} ({error}); free some space, the last checkpoint is intact")


def load_checkpoint(path: Path, kind: str, args: Args, device) -> dict:
    """Read a checkpoint of this file; anything else ends the program with a sentence that says what is wrong."""
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        sys.exit(f"error: {path} does not exist; check the path")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        sys.exit(f"error: cannot read {path}, it is damaged or no checkpoint ({type(error).__name__}); delete it")
    meta = state.get("meta", {}) if isinstance(state, dict) else {}
    expected = checkpoint_meta(kind, args)
    for name, value in expected.items():
        if meta.get(name) != value:
            sys.exit(f"error: {path} has {name} {meta.get(name)!r}, this run needs {value!r}; give another file")
    return state


def checkpoint_meta(kind: str, args: Args) -> dict:
    """What must agree before a checkpoint is used: its kind, this file's version, the task and the networks' sizes."""
    sizes = ("hidden_dim", "latent_dim", "skill_dim", "skill_horizon", "skill_encoder", "position_features")
    meta = dict(kind=f"skimo {kind}", version=FILE_VERSION, env_id=args.env_id)
    return meta | {name: getattr(args, name) for name in sizes}


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop at the next safe point, where everything is saved; a second one kills."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.requested = True
        tqdm.write("stopping: saving at the next safe point (once more to kill)")
        signal.signal(number, signal.SIG_DFL)


class Averages:
    """Means of metrics on the device; read out, with one synchronisation, every `log_every` updates."""

    def __init__(self):
        self.sums, self.count = {}, 0

    def add(self, metrics: dict):
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
        self.count += 1

    def pop(self) -> dict:
        means = {name: (value / self.count).item() for name, value in self.sums.items()}
        self.sums, self.count = {}, 0
        return means


# ---------------------------------------------------------------------------------------------------------------------
# Pre-training


PRETRAIN_FIELDS = [field.name for field in fields(Args) if field.name.startswith(("pretrain_", "data_noise"))] + [
    "seed", "bc_chunks", "bc_coef", "kl_coef", "prior_coef", "recon_coef", "consistency_coef", "rho", "tau",
    "target_update_interval", "max_grad_norm", "position_features", "skill_horizon", "num_skills", "skill_dim",
    "hidden_dim", "latent_dim", "skill_encoder",
]  # fmt: skip


def pretrain(args: Args, writer: SummaryWriter, device, stop: StopSignal):
    """Phase 1: learn E, D, O_dec, E_L, pi_L, q and p from the offline data, or load them from the cache.

    Returns the networks (model, skills, prior) and a dict of facts for results.json.
    """
    envs = data_tools.make_envs(args.env_id, 1)
    (obs_dim,), (action_dim,) = envs.single_observation_space.shape, envs.single_action_space.shape
    envs.close()
    model, skills = WorldModel(obs_dim, args).to(device), SkillModel(obs_dim, action_dim, args).to(device)
    u, prior_sizes = args.hidden_dim, (args.latent_dim, *[args.hidden_dim] * 4, 2 * args.skill_dim)
    prior = mlp(*prior_sizes).to(device)
    networks = nn.ModuleDict(dict(model=model, skills=skills, prior=prior))
    if args.pretrained:
        published = Path(__file__).parents[1] / "benchmarks" / "results" / f"skimo_{args.env_id}_pretrained.pt"
        path = published if args.pretrained == "published" else Path(args.pretrained)
        state = load_checkpoint(path, "pretrained", args, device)
        networks.load_state_dict(state["networks"])
        return networks, dict(state["facts"], pretrained=str(path))

    dataset = data_tools.load_dataset(args.env_id, args.data_dir, noise=args.data_noise)
    key = json.dumps([dataset.fingerprint, FILE_VERSION, *(getattr(args, name) for name in PRETRAIN_FIELDS)])
    name = f"skimo_{args.env_id}_{hashlib.sha256(key.encode()).hexdigest()[:12]}.pt"
    path = data_tools.cache_dir(args.data_dir) / "pretrained" / name
    if path.exists() and not args.retrain:
        print(f"pre-trained model from the cache: {path} (--retrain makes it anew)")
        state = load_checkpoint(path, "pretrained", args, device)
        networks.load_state_dict(state["networks"])
        return networks, dict(state["facts"], pretrained=str(path))

    train_data, valid_data = dataset.to(device).split(0.99)
    window = args.num_skills * args.skill_horizon + 1
    target = copy.deepcopy(model)
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, eps=1e-7, fused=True)
    loss_fn = torch.compile(pretrain_loss, mode="reduce-overhead") if args.compile else pretrain_loss
    first_update, minutes, part = 0, 0.0, path.with_suffix(".unfinished.pt")
    if part.exists() and not args.retrain:
        state = load_checkpoint(part, "pretraining", args, "cpu")
        for module, name in ((networks, "networks"), (target, "target"), (optimizer, "optimizer")):
            module.load_state_dict(state[name])
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1])
        first_update, minutes = state["update"], state["minutes"]
        print(f"pre-training goes on at update {first_update}: {part}")

    start_time, averages, facts = time.time() - 60 * minutes, Averages(), {}
    bar = tqdm(range(first_update, args.pretrain_updates), "pre-training", args.pretrain_updates, initial=first_update)
    for update in bar:
        obs, actions = train_data.sample_windows(args.pretrain_batch_size, window)
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = loss_fn(model, skills, prior, target, obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(networks.parameters(), args.max_grad_norm)
        if args.pretrain_lr_decay:  # DEVIATION 3
            progress = update / args.pretrain_updates
            optimizer.param_groups[0]["lr"] = args.pretrain_lr * min(1.0, (update + 1) / 500) * (1 - progress) ** 0.5
        optimizer.step()
        if update % args.target_update_interval == args.target_update_interval - 1:
            update_target(target, model, args.tau)
        averages.add(metrics)

        if (update + 1) % args.log_every == 0:
            for name, value in (means := averages.pop()).items():
                writer.add_scalar(f"pretrain/{name}", value, update + 1)
            bar.set_postfix({name.removesuffix("_loss"): f"{value:.3g}" for name, value in means.items()})
        last = update + 1 == args.pretrain_updates
        if (update + 1) % args.pretrain_eval_interval == 0 or last:
            with torch.random.fork_rng(), torch.no_grad():
                torch.manual_seed(args.seed)
                batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                _, metrics = pretrain_loss(model, skills, prior, target, *batch, args)
            episodes = args.pretrain_eval_episodes * (4 if last else 1)
            returns, _, trace, _ = prior_rollouts(model, skills, prior, args, episodes)
            facts = data_tools.rollout_statistics(args.env_id, returns, trace)
            facts |= {f"valid_{name}": value.item() for name, value in metrics.items()}
            for name, value in facts.items():
                writer.add_scalar(f"pretrain/{name}", value, update + 1)
            bar.write(f"update {update + 1}: " + ", ".join(f"{name} {value:.3g}" for name, value in facts.items()))
        minutes = (time.time() - start_time) / 60
        if stop.requested or (update + 1) % 5000 == 0:
            state = dict(networks=networks.state_dict(), target=target.state_dict(), optimizer=optimizer.state_dict())
            state |= dict(random=(torch.get_rng_state(), torch.cuda.get_rng_state_all()), update=update + 1, minutes=minutes)
            save_checkpoint(part, dict(state, meta=checkpoint_meta("pretraining", args)))
        if stop.requested:
            sys.exit("stopped in pre-training; the same command goes on where it was")
    facts = dict(facts, data=dataset.attributes, data_fingerprint=dataset.fingerprint, pretrain_minutes=minutes)
    facts["pretrain_updates"] = args.pretrain_updates
    meta = checkpoint_meta("pretrained", args)
    save_checkpoint(path, dict(networks=networks.state_dict(), facts=facts, meta=meta))
    part.unlink(missing_ok=True)
    return networks, dict(facts, pretrained=str(path))


@torch.no_grad()
def update_target(target, online, tau: float):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


# ---------------------------------------------------------------------------------------------------------------------
# Downstream RL


def train(args: Args, run_dir: Path, writer: SummaryWriter, networks, device, stop: StopSignal) -> dict:
    """Phase 2: online RL over skills, from the pre-trained networks or from the checkpoint in run_dir.

    Returns a dict of results: training returns, clean evaluation, time shares.
    """
    model, skills, skill_prior = networks["model"], networks["skills"].requires_grad_(False), networks["prior"]
    task_policy, prior_model = copy.deepcopy(skill_prior), copy.deepcopy(model)  # the frozen prior keeps its own E
    target = copy.deepcopy(model)
    for frozen in (skill_prior, prior_model, target):
        frozen.requires_grad_(False)
    low_level = copy.deepcopy(skills).cpu()  # acts next to the simulator
    log_alpha = torch.tensor(float(np.log(args.alpha)), device=device, requires_grad=True)
    adam = dict(eps=1e-7, fused=True)
    model_optimizer = torch.optim.Adam(model.parameters(), lr=args.learning_rate, **adam)
    policy_optimizer = torch.optim.Adam(task_policy.parameters(), lr=args.learning_rate, **adam)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.alpha_lr, **adam)
    compiled = (lambda f: torch.compile(f, mode="reduce-overhead")) if args.compile else (lambda f: f)
    model_loss_fn, policy_loss_fn = compiled(model_loss), compiled(policy_loss)
    planner = Planner(model, task_policy, args, device, args.compile)

    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)
    rb = ReplayBuffer(obs.shape[1], args, device)
    ended, episode_start = np.zeros(args.num_envs, dtype=bool), np.ones(args.num_envs, dtype=bool)
    episodic_return, episodic_length = np.zeros(args.num_envs), np.zeros(args.num_envs, dtype=np.int64)
    global_step, gradient_step, minutes = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return)

    modules = dict(model=model, target=target, task_policy=task_policy, skill_prior=skill_prior, skills=skills)
    modules |= dict(prior_model=prior_model, model_optimizer=model_optimizer, policy_optimizer=policy_optimizer)
    modules |= dict(alpha_optimizer=alpha_optimizer, rb=rb)
    if args.resume:
        state = load_checkpoint(run_dir / "checkpoint.pt", "run", args, "cpu")
        for name, module in modules.items():
            module.load_state_dict(state[name])
        low_level.load_state_dict(skills.state_dict())
        log_alpha.data.copy_(state["log_alpha"])
        torch.set_rng_state(state["random"][0])
        torch.cuda.set_rng_state_all(state["random"][1])
        envs.unwrapped.set_state({name: to_numpy(value) for name, value in state["envs"].items()})
        obs, ended, episode_start, episodic_return, episodic_length = map(to_numpy, state["episode"])
        planner.last_mean = None if state["last_mean"] is None else state["last_mean"].to(device)
        global_step, gradient_step, minutes = state["global_step"], state["gradient_step"], state["minutes"]
        episodes, evaluations = state["episodes"], state["evaluations"]

    def save():
        state = {name: module.state_dict() for name, module in modules.items()}
        state |= dict(log_alpha=log_alpha.detach(), random=(torch.get_rng_state(), torch.cuda.get_rng_state_all()), last_mean=planner.last_mean)
        state["envs"] = {name: to_tensor(value) for name, value in envs.unwrapped.get_state().items()}
        state["episode"] = list(map(to_tensor, (obs, ended, episode_start, episodic_return, episodic_length)))
        state |= dict(global_step=global_step, gradient_step=gradient_step, minutes=minutes)
        state |= dict(episodes=episodes, evaluations=evaluations, meta=checkpoint_meta("run", args))
        save_checkpoint(run_dir / "checkpoint.pt", state)

    def update():
        """One gradient step of model, task policy and alpha, in the order of the release."""
        batch = rb.sample(args.batch_size)
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics, h, h_pred = model_loss_fn(model, target, task_policy, *batch, args)
        model_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        model_optimizer.step()

        model.requires_grad_(False)  # no gradient of the critics' weights
        alpha = log_alpha.exp().detach()
        loss, policy_metrics = policy_loss_fn(
            model, task_policy, prior_model, skill_prior, batch[0], h, h_pred, alpha, args
        )
        policy_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(task_policy.parameters(), args.max_grad_norm)
        policy_optimizer.step()
        model.requires_grad_(True)

        if args.autotune:  # alpha rises while the KL exceeds its target
            alpha_loss = log_alpha.exp() * (args.target_kl - policy_metrics["prior_kl"])
            alpha_optimizer.zero_grad()
            alpha_loss.backward()
            alpha_optimizer.step()
        if gradient_step % args.target_update_interval == args.target_update_interval - 1:
            update_target(target, model, args.tau)
        averages.add(metrics | policy_metrics | dict(alpha=alpha))

    log_file = (run_dir / "episodes.csv").open("w", newline="")
    log = csv.writer(log_file)
    log.writerows([("env_step", "episodic_return", "episodic_length", "rl_minutes"), *episodes])
    averages, start_time, shares = Averages(), time.time() - 60 * minutes, dict(env=0.0, plan=0.0, update=0.0)
    first_step, first_time = global_step, time.time()
    next_save = (global_step // args.checkpoint_interval + 1) * args.checkpoint_interval
    max_return = data_tools.MAX_RETURN[args.env_id]
    bar = tqdm(total=args.total_timesteps, desc="RL", initial=global_step, unit="step")
    while True:
        # ALGO LOGIC: training. As many updates as the env steps so far are worth, none before the warm-up is over.
        clock = time.time()
        if global_step >= args.warmup_steps and len(rb.episodes) > 0:
            while gradient_step < int(global_step * args.updates_per_step) and not stop.requested:
                update()
                gradient_step += 1
                if gradient_step % args.log_every == 0:
                    for name, value in averages.pop().items():
                        writer.add_scalar(f"losses/{name}", value, global_step)
                    bar.set_postfix(updates=gradient_step, success=success_rate(episodes, max_return))
        shares["update"] += time.time() - clock
        minutes = (time.time() - start_time) / 60

        finished = global_step >= args.total_timesteps
        if finished or stop.requested or global_step >= next_save:
            save()
            next_save += args.checkpoint_interval
        if finished or stop.requested:
            break
        evaluated = evaluations[-1][0] if evaluations else 0
        if args.eval_interval and global_step // args.eval_interval > evaluated // args.eval_interval:
            returns, lengths = evaluate(skills, args, planner, global_step)
            evaluations.append((global_step, float(returns.mean())))
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), global_step)
            bar.write(f"step {global_step}: evaluation return {returns.mean():.3g}")

        # ALGO LOGIC: put action logic here. One skill for every environment at once, then H env steps.
        clock = time.time()
        if global_step < args.warmup_steps:
            with torch.no_grad():
                h = model.encoder(torch.from_numpy(obs).to(device))
                z = sample_tanh(*tanh_normal(task_policy(h))).cpu()  # (E, Z), still the prior
        else:
            z = planner(obs, episode_start, global_step, explore=True)
        shares["plan"] += time.time() - clock
        clock = time.time()
        next_obs, rewards, ended, steps = execute_skill(envs, low_level, obs, z, ended, args)
        rb.add(obs, z, args.reward_scale * rewards, ended, next_obs)
        obs, episode_start = next_obs, ended
        global_step += int(steps.sum())
        bar.update(int(steps.sum()))
        episodic_return, episodic_length = episodic_return + rewards, episodic_length + steps
        for e in np.flatnonzero(ended):
            episodes.append((global_step, float(episodic_return[e]), int(episodic_length[e]), round(minutes, 3)))
            log.writerow(episodes[-1])
            writer.add_scalar("charts/episodic_return", episodic_return[e], global_step)
            writer.add_scalar("charts/episodic_length", episodic_length[e], global_step)
            writer.add_scalar("charts/success", success_rate(episodes, max_return), global_step)
        if ended.any():
            log_file.flush()
            episodic_return, episodic_length = episodic_return * ~ended, episodic_length * ~ended
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            ended = np.zeros_like(ended)
            elapsed = time.time() - first_time
            writer.add_scalar("charts/SPS", (global_step - first_step) / elapsed, global_step)
            for name, seconds in shares.items():
                writer.add_scalar(f"time/{name}", seconds / elapsed, global_step)
        shares["env"] += time.time() - clock
    bar.close()
    log_file.close()
    envs.close()
    if stop.requested:
        sys.exit(f"stopped at env step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")

    returns, lengths = evaluate(skills, args, planner, global_step)
    visited = rb.rows[:, : obs.shape[1]].cpu().numpy()
    if args.capture_video:
        evaluate(skills, args, planner, global_step, run_dir / "evaluation.mp4")
    return dict(
        env_steps=global_step, gradient_steps=gradient_step, rl_minutes=minutes, time_shares=shares,
        last_100_success=success_rate(episodes, max_return), last_100_return=float(np.mean([x[1] for x in episodes[-100:]])),
        eval_return=float(returns.mean()), eval_success=float((returns >= max_return).mean()),
        eval_length=float(lengths.mean()), eval_episodes=len(returns), evaluations=evaluations,
    ), visited  # fmt: skip


def success_rate(episodes: list, max_return: float) -> float:
    """Share of the last 100 training episodes that earned everything."""
    return float(np.mean([episode[1] >= max_return for episode in episodes[-100:]])) if episodes else 0.0


def to_tensor(value):
    return torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value


def to_numpy(value):
    return value.numpy() if isinstance(value, torch.Tensor) else value


# ---------------------------------------------------------------------------------------------------------------------


def main(args: Args) -> dict:
    """Both phases, pictures and results.json; returns the results."""
    check_args(args)
    stop = StopSignal()
    torch.set_num_threads(args.num_threads or os.cpu_count())
    torch.manual_seed(args.seed)
    cuda = args.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    args.compile = cuda if args.compile is None else args.compile
    run_dir = Path(args.resume or Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time():.0f}")
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "args.json").write_text(json.dumps(asdict(args), indent=1))
    writer = SummaryWriter(run_dir)
    table = "".join(f"|{name}|{value}|\n" for name, value in vars(args).items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}")
    try:
        networks, facts = pretrain(args, writer, device, stop)
        real, predicted = open_loop_prediction(networks["model"], networks["skills"], networks["prior"], args)
        data_tools.plot_prediction(args.env_id, real, predicted, run_dir / "prediction.png", writer)
        torch.manual_seed(args.seed)  # RL is the same whether the model was trained now or comes from the cache
        results, visited = train(args, run_dir, writer, networks, device, stop)
    except data_tools.DataError as error:
        sys.exit(f"error: {error}")
    data_tools.plot_visited(args.env_id, visited, run_dir / "visited.png", writer)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {device.type}, torch {torch.__version__}"
    results = dict(results, machine=machine, pretraining=facts, args=asdict(args))
    (run_dir / "results.json").write_text(json.dumps(results, indent=1))
    writer.close()
    print(
        f"{args.env_id}: evaluation return {results['eval_return']:.4g} (success {results['eval_success']:.0%}), last 100 "
        f"training episodes {results['last_100_success']:.0%} success, {results['env_steps']} env steps in "
        f"{results['rl_minutes']:.0f} min.\nCurves, pictures and checkpoint: {run_dir} (tensorboard --logdir {run_dir})"
    )
    return results


if __name__ == "__main__":
    main(parse_args())
