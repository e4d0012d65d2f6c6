"""ReSkill: Residual Skill Policies (Rana, Xu, Tidd, Milford & Suenderhauf, CoRL 2022), https://arxiv.org/abs/2211.02231

Idea: a bijection f(z; s) = g turns the skills that the data show in a state into N(0, I). A policy that acts in g
begins with what the data show, and can still reach every skill; then a residual policy mends each single action.

    python algos/reskill.py --env-id maze           # data, skills, flow (all are kept), RL, evaluation
    python algos/reskill.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
    python algos/reskill.py --evaluate CHECKPOINT --capture-video   # a video; a picture of prior and residual

1. Skills: spirl.py's to the letter, whose models are used, frozen from here on
2. Flow prior: maximise log p(z | s_0) = log N(f(z; s_0); 0, I) + log |det df/dz| for z ~ q of the data; then frozen
3. RL, on-policy. Repeat: T skills in each of E environments, g ~ pi(s), z = f^-1(g; s), H steps each:
   a' = pi_L(s, z), d ~ pi_res(s, z, a'), action a' + w d, where w = 1 / (1 + exp(-k (n - C))) after n env steps
   PPO for pi(g | s) on the sums of H rewards, PPO for pi_res(d | s, z, a') on each reward, each with a value of its own

Not goal-conditioned. Skills and prior are pre-trained from data. A skill ends after H steps, a fixed rate. On-policy.

Differences from the release, marked DEVIATION n below. 1 and 6 are spirl.py's and differ from SPiRL's release only.
2. Pre-training is shorter. 3. Sines and cosines are inputs. Both as in spirl.py.
4. Skills are spirl.py's. The release's encoder and decoder are smaller, skills have 4 entries, KL next to no weight;
   its decoder ends in a tanh, in training as in acting.
5. The flow learns after the skills, not beside them (no gradient goes from one to the other). It starts as the
   identity, is 256 wide (512), and one network gives both scale and shift of a coupling. Its batches are 256 (128), and
   its rate decays to zero.
7. pi starts as N(0, I), that is as the prior (release: std .61), pi_res with std .14 (.61); kitchens .05, as with .14
   one seed lost all once the residual came in. Stds stay in .2 to 1 and .02 to 1 (release: both .2 to 1) because
   parameters are put back; the release clips values, which have no gradient from there on.
8. An update has batch_size rows of the roll-out (release: all). The early stop comes one update later. Roll-outs are
   5,600 to 10,000 env steps (30,000), the residual's gate opens at 100,000 (270,000); rewards of maze and CALVIN x .01.
9. Values of pi_res see as far as those of pi: their discount is gamma^(1/H), not gamma. pi_res learns once w >= .01.
10. A skill ends with its episode (release: goes on). Time-outs are bootstrapped, as there.
11. Evaluations draw skills (release: means), with w of training (release: 1). Kitchen: 30 observations, see spirl.py.
The release's last skill of a roll-out enters PPO with the advantage of an older roll-out; here no row can be stale.
--published takes SPiRL's release's side of 2 and 3 (not of 3 for pi and pi_res), and this one's width of the flow,
roll-outs, batches and gate. All is checked against formulas, not beside the release.

Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, PEOPLE, RELEASE, PUBLISHED, SkillModel, make_networks,
pretrain_loss, prior_rollouts, pretrain_lr, find_pretrained, pretrain, Agent, train, evaluate, PRETRAINING, check_args,
main.
A run's folder holds what skimo.py names.
It needs many env steps, 300,000 are 30 roll-outs, each used once, but they are cheap: 2M in the maze take 7 minutes.
Score: maze, last 100 training episodes at 300,000 env steps: .33 / .30 / .51 (prior: .20 and .23), at 2M
.94 / .85 / .98; Kitchen, sub-tasks of 4 at 200,000: 2.27 / 2.79 / 2.18 (prior: .81). The release takes 24M env steps.
Shapes: B batch, T skills of a roll-out, H steps per skill, O observation, F inputs, A action, Z skill, E environments.
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
import math
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

PRETRAINED = "spirl"  # DEVIATION 4: skills and prior are those of spirl.py, and so are the models
SHIPPED = Path(__file__).resolve().parents[1] / "benchmarks" / "results"  # models and agents that come with the code


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    published: bool = False  # take the values of the authors' release for this task
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn
    cudagraphs: bool = torch.cuda.is_available()  # replay updates as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint, or `published`: our agent, if there is one
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, without noise in the residual
    capture_video: bool = False  # at the end: an episode as MP4, and prior and residual as PNG (with the data)
    data_dir: str | None = None  # folder of offline data and pre-trained models (None: the user's cache)
    dataset: Literal["scripted", "d4rl"] = "scripted"  # made by a script, or people's, fetched from D4RL (kitchens)
    data: str | None = None  # offline data of your own instead: a file or a folder
    pretrained: str | None = None  # start RL from this model: a path, or `published`: ours, if there is one
    pretrain_eval_interval: int = 12_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 100  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of skill encoder, skill policy and prior
    position_features: bool = True  # sines and cosines of positions as inputs, maze scaled (release: raw)
    squash_actions: bool = False  # tanh on actions, although pi_L is trained without one, as in the release

    # Pre-training
    pretrain_updates: int = 48_000  # gradient updates
    pretrain_batch_size: int = 128  # windows of H actions per update
    pretrain_lr: float = 1e-3  # first learning rate
    pretrain_lr_decay: bool = True  # decay to zero (release: constant)
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see `perturb` (release: 0)
    recombine: bool = False  # show demonstrations again among objects moved by others (release: no)
    kl_coef: float = 5e-4  # weight of KL(q || N(0,1)) per dimension
    clip_updates: int = 100  # updates at the start with a bound on the gradient's norm
    clip_norm: float = 0.001  # that bound

    # Flow prior
    flow_dim: int = 256  # width of its networks
    flow_couplings: int = 4  # each changes half of a skill
    flow_windows: int = 400_000  # windows of the data whose skills it learns
    flow_updates: int = 20_000  # gradient updates
    flow_batch_size: int = 256  # windows per update
    flow_lr: float = 1e-3  # first learning rate; decays to zero

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps
    num_envs: int = 8  # environments side by side
    rollout_skills: int = 70  # T: skills of each environment between two rounds of learning
    updates_per_rollout: int = 180  # gradient updates in a round
    batch_size: int = 1_000  # skills, and as many env steps, per update
    policy_dim: int = 64  # width of policies and values
    policy_lr: float = 1e-4  # of both policies
    value_lr: float = 1e-3  # of both values
    clip_ratio: float = 0.3  # how far PPO's ratio may leave 1 and still gain
    high_kl: float = 0.3  # nats; beyond 1.5 times that the policy of skills rests until the next round
    residual_kl: float = 0.9  # the same for the residual policy
    gamma: float = 0.99  # discount per skill; per env step its H-th root
    gae_lambda: float = 0.97  # weight of longer returns in the advantages
    residual_std: float = 0.135  # of the residual's noise at the start, in units of actions
    residual_middle: int = 100_000  # C: env steps after which the residual has half its weight
    residual_slope: float = 1.33e-4  # k: from .1 to .9 of its weight in 4.4 / k env steps
    reward_scale: float = 1.0  # factor on the task's reward


# Our own are kl_coef (as in spirl.py), residual_std (DEVIATION 7), reward_scale, the windows and updates of the flow,
# and the lengths of roll-outs.
TASK_DEFAULTS = {
    "maze": dict(kl_coef=1e-2, total_timesteps=2_000_000, rollout_skills=125, reward_scale=0.01),
    "kitchen": dict(flow_windows=100_000, flow_updates=8_000, residual_std=0.05),  # 603 demonstrations: 150,000 windows
    "calvin": dict(kl_coef=1e-2, total_timesteps=2_000_000, rollout_skills=90, reward_scale=0.01),
}
TASK_DEFAULTS["kitchen-misaligned"] = TASK_DEFAULTS["kitchen"]

# With people's demonstrations (--dataset d4rl, and all of --data) skills hold less, the arm is shifted, and objects
# are recombined (DEVIATION 3). Chosen with skimo.py, kl_coef with spirl.py; reskill.py, tdmpc_skills.py and
# dreamer_skills.py were not run with them (FINDINGS.md).
PEOPLE = {"kitchen": dict(kl_coef=1e-3, arm_noise=0.02, recombine=True)}
PEOPLE["kitchen-misaligned"] = PEOPLE["kitchen"]

# --published: what changes to give the values of SPiRL's and ReSkill's releases, on all tasks and on each.
RELEASE = dict(
    position_features=False, arm_noise=0.0, recombine=False, pretrain_updates=480_000, pretrain_lr_decay=False,
    kl_coef=5e-4, flow_dim=512, num_envs=15, rollout_skills=200, batch_size=30_000, residual_middle=270_000,
    residual_slope=6.7e-5, flow_batch_size=128,
)  # fmt: skip
PUBLISHED = {
    "maze": dict(RELEASE, pretrain_updates=530_000, kl_coef=1e-3),
}

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
class Predictor(nn.Sequential):
    """Linear, LeakyReLU; num_blocks x (Linear, BatchNorm, LeakyReLU); Linear: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, u: int, num_blocks: int, out_dim: int, batch_norm: bool = True):
        layers = [nn.Linear(in_dim, u), nn.LeakyReLU(0.2)]
        for _ in range(num_blocks):
            layers.append(nn.Linear(u, u))
            if batch_norm:
                layers.append(nn.BatchNorm1d(u))
            layers.append(nn.LeakyReLU(0.2))
        super().__init__(*layers, nn.Linear(u, out_dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):
        y = super().forward(x.flatten(0, -2))  # BatchNorm wants one leading axis
        return y.unflatten(0, x.shape[:-1])


def gaussian(x):
    """Network output (..., 2 * Z) -> mean and std (..., Z)."""
    mean, log_std = x.chunk(2, -1)
    return mean, log_std.clamp(-10, 2).exp()


def draw(distribution):
    """One reparameterised sample of N(mean, std); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def squash(x):
    """Output x of the task policy -> skill (..., Z) in (-2, 2), where most of N(0, 1) lies."""
    return 2 * torch.tanh(x)


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., Z) -> (...) in nats; a common tanh leaves it as it is."""
    mean_p, std_p = p
    mean_q, std_q = q
    square = std_p**2 + (mean_p - mean_q) ** 2
    kl = (std_q / std_p).log() + square / (2 * std_q**2) - 0.5  # DEVIATION 1
    return kl.sum(-1)


class Features(nn.Module):
    """Observations (..., O) -> inputs of the networks (..., F), F = size.

    DEVIATION 3: sines and cosines of positions are inputs as well, and the maze is scaled; see skimo.py's StateEncoder.
    Without position_features they are the raw observations, but scaled with always_scaled.
    """

    def __init__(self, obs_dim: int, args: Args, always_scaled: bool = False):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = np.zeros((0, 0))
        scale = [1.0] * obs_dim
        shift = [0.0] * obs_dim
        if args.position_features:
            periods = POSITION_PERIODS.get(args.env_id, periods)
        if args.position_features or always_scaled:
            scale = task.obs_scale or scale
            shift = task.obs_shift or shift
        frequency = torch.tensor(2 * np.pi / periods, dtype=torch.float32)
        self.register_buffer("scale", torch.tensor(scale))  # (O,)
        self.register_buffer("shift", torch.tensor(shift))  # (O,)
        self.register_buffer("frequency", frequency)  # (P, .)
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)
        scaled = obs * self.scale + self.shift  # (..., O)
        return torch.cat([scaled, phase.sin(), phase.cos()], -1)  # (..., F)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | s, z)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        Z = args.skill_dim
        self.squash_actions = args.squash_actions
        self.features = Features(obs_dim, args)
        F = self.features.size
        self.lstm_input = nn.Linear(action_dim + F, u)
        self.lstm = nn.LSTM(u, u, batch_first=True)
        self.lstm_output = nn.Linear(u, u)
        self.skill_encoder = nn.Linear(u, 2 * Z)
        self.skill_policy = Predictor(F + Z, u, 5, action_dim)
        with torch.no_grad():  # the forget gate starts open
            self.lstm.bias_ih_l0[u : 2 * u] = 1.0
            self.lstm.bias_hh_l0[u : 2 * u] = 1.0

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, H, O) and actions (B, H, A) -> mean and std, 2 x (B, Z)."""
        steps = torch.cat([actions, self.features(obs)], -1)  # (B, H, A + F)
        outputs, _ = self.lstm(self.lstm_input(steps))  # (B, H, u)
        last = self.lstm_output(outputs[:, -1])  # (B, u)
        return gaussian(self.skill_encoder(last))

    def predict(self, obs, z):
        """pi_L as it is trained: observations (..., O) and skills (..., Z) -> actions (..., A)."""
        return self.skill_policy(torch.cat([self.features(obs), z], -1))

    def act(self, obs, z):
        """pi_L as it acts; the environment clips its actions to +-1."""
        action = self.predict(obs, z)
        return torch.tanh(action) if self.squash_actions else action  # DEVIATION 6


class SkillPrior(nn.Module):
    """Prior p(z | s), in spirl.py the task policy as well: (..., O) -> mean and std, 2 x (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        self.net = Predictor(self.features.size, args.hidden_dim, 6, 2 * args.skill_dim)

    def forward(self, obs):
        return gaussian(self.net(self.features(obs)))


def zero_net(in_dim: int, u: int, out_dim: int, activation) -> nn.Sequential:
    """Two hidden layers of width u; its outputs start at 0."""
    last = nn.Linear(u, out_dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    first = nn.Linear(in_dim, u)
    second = nn.Linear(u, u)
    return nn.Sequential(first, activation(), second, activation(), last)


class FlowPrior(nn.Module):
    """Prior p(z | s): a bijection f between skills z and g ~ N(0, I) for every state s (R-NVP)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        Z = args.skill_dim
        self.features = Features(obs_dim, args)
        first_half = (torch.arange(Z) < Z // 2).float()
        kept = [first_half if k % 2 == 0 else 1 - first_half for k in range(args.flow_couplings)]
        self.register_buffer("kept", torch.stack(kept))  # (couplings, Z): 1 where a coupling leaves z alone
        in_dim = self.features.size + Z
        nets = [zero_net(in_dim, args.flow_dim, 2 * Z, nn.LeakyReLU) for _ in kept]  # f starts as the identity
        self.nets = nn.ModuleList(nets)

    def coupling(self, k: int, z, features):
        """Log scale and shift (..., Z) of the half that coupling k changes, from the half that it keeps."""
        kept = self.kept[k]
        S, T = self.nets[k](torch.cat([kept * z, features], -1)).chunk(2, -1)
        return (1 - kept) * torch.tanh(S), (1 - kept) * T

    def forward(self, z, obs):
        """f: skills (..., Z), states (..., O) -> g (..., Z) and log |det df/dz| (...)."""
        features = self.features(obs)
        g = z
        log_det = torch.zeros_like(z[..., 0])
        for k in range(len(self.nets)):
            S, T = self.coupling(k, g, features)
            g = g * S.exp() + T
            log_det = log_det + S.sum(-1)
        return g, log_det

    def log_prob(self, z, obs):
        """log p(z | s) = log N(f(z; s); 0, I) + log |det df/dz| in nats: (..., Z), (..., O) -> (...)."""
        g, log_det = self(z, obs)
        return log_density(g, (torch.zeros_like(g), torch.ones_like(g))) + log_det

    def inverse(self, g, obs):
        """f^-1: g (..., Z), states (..., O) -> skills (..., Z)."""
        features = self.features(obs)
        z = g
        for k in reversed(range(len(self.nets))):
            S, T = self.coupling(k, z, features)
            z = (z - T) * (-S).exp()
        return z


class ActorCritic(nn.Module):
    """Gaussian policy and value of PPO for inputs (..., O + more). There is one for skills and one for residuals."""

    def __init__(self, obs_dim, more, out_dim, std, min_std, args: Args):
        super().__init__()
        self.obs_dim = obs_dim
        self.features = Features(obs_dim, args, always_scaled=True)  # DEVIATION 3, with --published, too
        F = self.features.size + more
        self.policy = zero_net(F, args.policy_dim, out_dim, nn.Tanh)
        self.value_net = zero_net(F, args.policy_dim, 1, nn.Tanh)
        self.log_std = nn.Parameter(torch.full((out_dim,), math.log(std)))
        self.log_bounds = math.log(min_std), 0.0

    def inputs(self, x):
        obs, more = x.split([self.obs_dim, x.shape[-1] - self.obs_dim], -1)
        return torch.cat([self.features(obs), more], -1)

    def forward(self, x):
        """Mean and std of the policy, 2 x (..., out_dim)."""
        mean = self.policy(self.inputs(x))
        return mean, self.log_std.exp().expand_as(mean)

    def value(self, x):
        return self.value_net(self.inputs(x)).squeeze(-1)


class SkilledActor(nn.Module):
    """What acts in the simulator: the skill policy plus w times the residual."""

    def __init__(self, skills: SkillModel, residual: ActorCritic):
        super().__init__()
        self.skills = skills
        self.residual = residual
        self.weight = 0.0  # w

    def propose(self, obs, z):
        """Actions a' of the skill policy (E, A), and the residual's mean and std, 2 x (E, A)."""
        action = self.skills.act(obs, z)
        return action, self.residual(torch.cat([obs, z, action], -1))

    def act(self, obs, z):
        """Actions (E, A) without noise, for evaluations."""
        action, (mean, _) = self.propose(obs, z)
        return action + self.weight * mean


def make_networks(args: Args, obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """The networks of pre-training: skills, and the prior p(z | s)."""
    skills = SkillModel(obs_dim, action_dim, args)
    prior = SkillPrior(obs_dim, args)
    networks = nn.ModuleDict(dict(skills=skills, prior=prior))
    return networks.to(args.device)


# -------------------------------------------------------------------------------------------------------------- losses
def pretrain_loss(skills, prior, obs, actions, args):
    """Loss of skills and prior on windows of the offline data (SPiRL eq. 1, 2).

    obs (B, H+1, O) raw, actions (B, H, A). Returns the loss and metrics, scalars.
    """
    H = args.skill_horizon
    q = skills.encode_skill(obs[:, :-1], actions)  # 2 x (B, Z)
    z = draw(q)  # (B, Z)

    # Behavioural cloning: a skill has to hold all that is needed to repeat its actions.
    z_steps = z[:, None].expand(-1, H, -1)  # (B, H, Z)
    predicted = skills.predict(obs[:, :-1], z_steps)  # (B, H, A)
    bc_loss = (predicted - actions).square().mean()

    # KL to N(0, 1): keeps skills close together, so that those between two of them mean something as well.
    normal = torch.zeros_like(q[0]), torch.ones_like(q[1])
    kl_loss = kl_divergence(q, normal).mean()

    # The prior says which skills the data show in a state. It learns from samples, and its gradient does not reach q.
    p = prior(obs[:, 0])  # 2 x (B, Z)
    likelihood = torch.distributions.Normal(*p, validate_args=False)
    log_prob = likelihood.log_prob(z.detach())  # (B, Z)
    prior_loss = -log_prob.sum(-1).mean()

    # The likelihood of actions has unit variance: up to a constant it is half the squared error
    loss = 0.5 * bc_loss + args.kl_coef * kl_loss / args.skill_dim + prior_loss
    prior_kl = kl_divergence(q, p).mean()
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss, prior_kl=prior_kl)
    return loss, {name: value.detach() for name, value in metrics.items()}


def log_density(x, distribution):
    """log N(x; mean, std) of x (..., n), summed over its last axis: (...)."""
    mean, std = distribution
    error = (x - mean) / std
    normaliser = std.log() + 0.5 * math.log(2 * math.pi)
    return (-0.5 * error.square() - normaliser).sum(-1)


def flow_loss(flow, z, obs):
    """Negative log-likelihood (R-NVP eq. 3) of skills z (B, Z) of the data that begin in obs (B, O), ()."""
    # A prior is good if what was done next in the data is likely under it.
    return -flow.log_prob(z, obs).mean()


def gae(rewards, values, next_values, cut, discount: float, gae_lambda: float):
    """Generalised advantages (GAE eq. 16), (T, E), time-first.

    next_values are 0 after a true end, cut is 1 where a path ends. With gae_lambda 1 they are the discounted rewards up
    to there, plus next_values, less values.
    """
    errors = rewards + discount * next_values - values  # (T, E)
    keep = discount * gae_lambda * (1 - cut)
    advantages = torch.zeros_like(errors)
    following = torch.zeros_like(errors[0])
    for t in reversed(range(len(errors))):
        following = errors[t] + keep[t] * following
        advantages[t] = following
    return advantages


def ppo_loss(learner, x, actions, log_probs, advantages, returns, weights, args):
    """PPO's losses of a policy and its value on rows x (B, .), actions (B, .) and four columns (B,).

    log_probs are those of the policy that acted. Returns the loss and metrics, scalars.
    """
    # (B,) without env steps after an episode's end; a small batch may hold nothing else
    share = weights / weights.sum().clamp(min=1)
    log_ratio = log_density(actions, learner(x)) - log_probs
    ratio = log_ratio.exp()

    # Make likelier what was better than expected, but gain nothing far from the policy that acted (PPO eq. 7).
    clipped = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
    gain = torch.min(ratio * advantages, clipped * advantages)
    policy_loss = -(share * gain).sum()

    # The value is what is expected in a state.
    error = learner.value(x) - returns
    value_loss = (share * error.square()).sum()

    # Policy and value share no weights, so their sum trains each alone.
    kl = -(share * log_ratio).sum()
    metrics = dict(kl=kl, policy_loss=policy_loss, value_loss=value_loss)
    metrics |= dict(std=learner.log_std.exp().mean())
    metrics = {name: value.detach() for name, value in metrics.items()}
    return policy_loss + value_loss, metrics


# -------------------------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def execute_skill(envs, skills, obs, z, ended, args: Args):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O); ended (E,) bool: environments that wait for their reset. Returns next_obs (E, O), the rewards' sum (E,),
    the new ended (E,) and the env steps taken (E,).
    """
    rewards = np.zeros(len(obs), dtype=np.float32)
    steps = np.zeros(len(obs), dtype=np.int64)
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += np.where(ended, 0.0, reward)
        steps += ~ended
        ended = terminations | truncations
        if ended.all():
            break
    return obs, rewards, ended, steps


def residual_weight(global_step: int, args: Args) -> float:
    """w, the sigmoid gate: 0 while the skills alone are tuned, 1/2 after C env steps, then 1."""
    x = args.residual_slope * (global_step - args.residual_middle)
    return 0.5 + 0.5 * math.tanh(x / 2)  # 1 / (1 + exp(-x)), without overflow


@torch.no_grad()
def collect_skill(envs, actor: SkilledActor, obs, z, args: Args):
    """H env steps with skills z (E, Z) and noisy residuals, on the CPU next to the simulator. obs (E, O).

    Returns what the buffer keeps of them, NumPy but for z: obs (E, H, O), z (E, Z), actions of the skill policy and
    residuals (E, H, A), rewards (E, H), terminations, truncations, steps (E,) and next_obs (E, O).
    """
    ended = np.zeros(len(obs), dtype=bool)
    steps = np.zeros(len(obs), dtype=np.int64)
    rows = []
    for _ in range(args.skill_horizon):
        action, distribution = actor.propose(torch.from_numpy(obs), z)
        residual = draw(distribution)  # (E, A)
        command = action + actor.weight * residual
        next_obs, reward, terminations, truncations, _ = envs.step(command.numpy())
        rows.append((obs, action.numpy(), residual.numpy(), reward))  # which is 0 after the end
        steps += ~ended  # DEVIATION 10
        ended = terminations | truncations
        obs = next_obs
    all_obs, actions, residuals, rewards = (np.stack(column, 1) for column in zip(*rows))
    return all_obs, z, actions, residuals, rewards, terminations, truncations, steps, obs


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
            obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, ended, args)
            returns += rewards
            lengths += steps
    envs.close()
    return returns, lengths


def prior_rollouts(networks, args: Args, num_episodes: int):
    """Returns (E,) of episodes with squashed skills of the prior: what spirl.py's task policy begins with."""
    cpu = copy.deepcopy(networks).cpu().eval()

    @torch.no_grad()
    def choose_skill(obs):
        return squash(draw(cpu["prior"](torch.from_numpy(obs))))  # (E, Z)

    return rollout(choose_skill, cpu["skills"], num_episodes, args, args.seed)[0]


def success(returns, args: Args) -> float:
    """Share of episodes in which everything was done."""
    best = data_tools.TASKS[args.env_id].max_return
    reached = np.asarray(returns) >= best - 1e-5 * abs(best)  # rewards are float32
    return float(reached.mean()) if len(returns) else 0.0


# -------------------------------------------------------------------------------------------------------------- replay
class RolloutBuffer:
    """T skills of E environments, which PPO learns from once: rows (T E, ...) on the device, t E + e is row t of e."""

    def __init__(self, obs_dim: int, env_action_dim: int, args: Args):
        self.args = args
        self.size = args.rollout_skills * args.num_envs
        H = args.skill_horizon
        A = env_action_dim
        shapes = dict(obs=(H, obs_dim), z=(args.skill_dim,), actions=(H, A), residuals=(H, A))
        shapes |= dict(rewards=(H,), terminations=(), truncations=(), steps=(), next_obs=(obs_dim,))
        self.columns = {}
        for key, shape in shapes.items():
            self.columns[key] = torch.zeros(self.size, *shape, device=args.device)
        self.filled = 0

    @property
    def full(self) -> bool:
        return self.filled == self.size

    def add(self, obs, z, actions, residuals, step_rewards, terminations, truncations, steps, next_obs):
        """One skill of every environment, as collect_skill returns it. A full buffer begins anew: no row is stale."""
        first = 0 if self.full else self.filled
        self.filled = first + len(obs)
        values = obs, z, actions, residuals, step_rewards, terminations, truncations, steps, next_obs
        for column, value in zip(self.columns.values(), values):
            column[first : self.filled] = torch.as_tensor(value).float().to(self.args.device)

    @torch.no_grad()
    def prepare(self, agent):
        """Tables of rows for the updates: of skills, and of env steps. Each has the columns of ppo_loss."""
        args = self.args
        H = args.skill_horizon
        E = args.num_envs
        T = self.filled // E
        columns = [column[: self.filled] for column in self.columns.values()]
        obs, z, actions, residuals, rewards, terminations, truncations, steps, next_obs = columns
        ended = torch.maximum(terminations, truncations)  # both may come at once

        # Skills. f is a bijection: g is what the policy drew. Beyond a time-out the task goes on, so its value counts
        first = obs[:, 0]
        g, _ = agent.flow(z, first)
        values = agent.high.value(first)
        next_values = agent.high.value(next_obs) * (1 - terminations)
        rows = first, g, rewards.sum(1), values, next_values, ended, torch.ones_like(ended)
        rows = [column.unflatten(0, (T, E)) for column in rows]
        self.high = self.table(agent.high, *rows, args.gamma)

        # Env steps. A path is cut where its episode or the roll-out ends
        def paths(column):
            """(T E, H, ...) -> (T H, E, ...), time-first."""
            return column.unflatten(0, (T, E)).transpose(1, 2).flatten(0, 1)

        z_steps = z[:, None].expand(-1, H, -1)
        x = torch.cat([obs, z_steps, actions], -1)  # (T E, H, O + Z + A)
        # What follows the last row is not known yet: the value of going on with its skill stands for it
        next_action = agent.skills.act(next_obs, z)
        last = torch.cat([next_obs, z, next_action], -1)  # (T E, O + Z + A)
        last_values = agent.residual.value(last) * (1 - terminations)
        step = torch.arange(H, device=obs.device)
        final = torch.arange(T * E, device=obs.device) >= (T - 1) * E
        stops = ended.bool() | final  # (T E,)
        cut = (step == steps[:, None] - 1) & stops[:, None]  # (T E, H)
        values = paths(agent.residual.value(x))  # (T H, E)
        behind = paths(last_values[:, None].expand(-1, H))
        next_values = torch.where(paths(cut), behind, values.roll(-1, 0))
        taken = step < steps[:, None]  # (T E, H)
        rows = [paths(x), paths(residuals), paths(rewards), values, next_values]
        rows += [paths(cut.float()), paths(taken.float())]
        gamma = args.gamma ** (1 / H)  # DEVIATION 9
        self.residual = self.table(agent.residual, *rows, gamma)

        # How much the residual does, without its noise, which is as large however little was learnt
        mean, _ = agent.residual(x)  # (T E, H, A)
        self.action_size = actions[taken].abs().mean().item()
        self.residual_size = mean[taken].abs().mean().item()

    def table(self, learner, x, actions, rewards, values, next_values, cut, weights, discount: float):
        """Rows of paths (T, E, ...): inputs, actions, log-probabilities, advantages, returns, weights."""
        path = self.args.reward_scale * rewards, values, next_values, cut, discount
        advantages = gae(*path, self.args.gae_lambda)
        returns = values + gae(*path, 1.0)
        share = weights / weights.sum()
        centred = advantages - (share * advantages).sum()
        variance = (share * centred.square()).sum()
        advantages = centred / (variance.sqrt() + 1e-8)
        log_probs = log_density(actions, learner(x))
        columns = x, actions, log_probs, advantages, returns, weights
        return [column.flatten(0, 1) for column in columns]

    def sample(self, batch_size: int):
        """Rows of both tables, no row twice: 2 x 6 columns (B, ...), all rows if there are fewer (DEVIATION 8)."""
        batch = []
        for table in (self.high, self.residual):
            rows = torch.randperm(len(table[0]), device=self.args.device)[:batch_size]
            batch += [column[rows] for column in table]
        return batch

    def residual_share(self, weight: float) -> float:
        """Size of w times the mean of d in the roll-out just prepared, as a share of the sizes of a' and of it."""
        change = weight * self.residual_size
        return change / (self.action_size + change)

    def state_dict(self) -> dict:
        filled = {name: column[: self.filled].clone() for name, column in self.columns.items()}
        return dict(filled, filled=self.filled)

    def load_state_dict(self, state: dict):
        self.filled = int(state["filled"])
        for name, column in self.columns.items():
            filled = column[: self.filled]
            saved = state[name]
            if saved.shape != filled.shape or not saved.isfinite().all():
                raise ValueError(f"{name} of the roll-out does not fit")
            filled.copy_(saved)


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
def gradient_norm(module):
    """Norm of a module's gradient, (), which stays as it is; what check_finite looks at."""
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return nn.utils.get_total_norm(gradients)


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


def pretrain_lr(updates: int, args: Args) -> float:
    """Down to zero as sqrt(1 - progress) (DEVIATION 2)."""
    if not args.pretrain_lr_decay:
        return args.pretrain_lr
    return args.pretrain_lr * (1 - updates / args.pretrain_updates) ** 0.5


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
    names = names[names.index("skill_horizon") : names.index("clip_norm") + 1]
    code = code_of(make_networks, pretrain_loss, pretrain_lr, perturb) | {"pretrain": inspect.getsource(pretrain)}
    code["data"] = inspect.getsource(data_tools.OfflineDataset)
    made_from = [data.fingerprint, args.seed]
    made_from += [ast.dump(ast.parse(source)) for _, source in sorted(code.items())]
    made_from += [[name, getattr(args, name)] for name in names]
    made_from += [np.asarray(POSITION_PERIODS.get(args.env_id, ())).tolist(), ARM.get(args.env_id)]
    made_from += [task.obs_scale, task.obs_shift, task.objects]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    path = data_tools.cache_dir(args.data_dir) / "pretrained" / f"{family}_{key}.pt"
    return path, None if os.path.exists(path) else data


def pretrain(args: Args, networks: nn.ModuleDict, path: Path, data, writer, stop: threading.Event):
    """Phase 1: learn skills and prior from the offline data; writes them to path."""
    window = args.skill_horizon + 1
    train_data, valid_data = data.to(args.device).split(0.99, window)
    if args.recombine:
        train_data = train_data.recombined(data_tools.TASKS[args.env_id].objects, args.seed)  # DEVIATION 3
    networks.train()  # BatchNorm's statistics move in pre-training only
    optimizer = torch.optim.RAdam(networks.parameters(), lr=args.pretrain_lr)

    def gradients(obs, actions):
        loss, metrics = pretrain_loss(*networks.values(), obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        return metrics

    gradients = recorded(gradients, args)
    updates = 0
    seconds = 0.0  # of earlier commands

    parts = dict(networks=networks, optimizer=optimizer)
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
        max_norm = args.clip_norm if updates < args.clip_updates else float("inf")
        metrics["grad_norm"] = nn.utils.clip_grad_norm_(networks.parameters(), max_norm)
        optimizer.step()
        updates += 1
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
            networks.eval()
            with kept_random_state(args), torch.no_grad():
                obs, actions = valid_data.sample_windows(args.pretrain_batch_size, window)
                _, metrics = pretrain_loss(*networks.values(), obs, actions, args)
            networks.train()
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


# ----------------------------------------------------------------------------------------------------------- flow prior
@torch.no_grad()
def encode_windows(skills, data, num_windows: int, args: Args):
    """First observations (n, O) of random windows of the data, and q of their skills, 2 x (n, Z)."""
    parts = []
    for _ in range(-(-num_windows // 1_000)):
        obs, actions = data.sample_windows(1_000, args.skill_horizon + 1)
        obs, actions = perturb(obs, actions, args)
        parts.append((obs[:, 0], *skills.encode_skill(obs[:, :-1], actions)))
    return [torch.cat(column) for column in zip(*parts)]


def find_flow(args: Args, model: Path, data) -> Path:
    """The file of the flow prior for a pre-trained model; found again by task, model, data, arguments, code."""
    task = data_tools.TASKS[args.env_id]
    names = [field.name for field in fields(Args) if field.name.startswith("flow_")]
    names = ["skill_horizon", "position_features", "squash_actions", "recombine", "arm_noise", *names]
    code = code_of(FlowPrior, flow_loss, draw, perturb, encode_windows) | {"learn_flow": inspect.getsource(learn_flow)}
    code["data"] = inspect.getsource(data_tools.OfflineDataset)
    model_hash = hashlib.sha256(model.read_bytes()).hexdigest()
    made_from = [args.env_id, model_hash, data.fingerprint]
    made_from += [ast.dump(ast.parse(source)) for _, source in sorted(code.items())]
    made_from += [[name, getattr(args, name)] for name in names]
    made_from += [np.asarray(POSITION_PERIODS.get(args.env_id, ())).tolist(), ARM.get(args.env_id)]
    made_from += [task.obs_scale, task.obs_shift, task.objects]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    return data_tools.cache_dir(args.data_dir) / "flows" / f"{model.stem}_{key}.pt"


def learn_flow(args: Args, networks, path: Path, data, writer, stop):
    """Between the phases: learn the flow prior of the frozen skills (DEVIATION 5); writes it to path."""
    window = args.skill_horizon + 1
    train_data, valid_data = data.to(args.device).split(0.99, window)
    if args.recombine:
        train_data = train_data.recombined(data_tools.TASKS[args.env_id].objects)  # DEVIATION 3
    networks.eval()
    flow = networks["flow"]
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.flow_lr, fused=True)

    def gradients(z, obs):
        loss = flow_loss(flow, z, obs)
        optimizer.zero_grad()
        loss.backward()
        return loss.detach()

    gradients = recorded(gradients, args)
    torch.manual_seed(0)  # belongs to the model, whatever the seed of RL is
    obs, *q = encode_windows(networks["skills"], train_data, args.flow_windows, args)
    updates = 0
    parts = dict(flow=flow, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    if unfinished.exists():
        with reading(unfinished):
            state = load(unfinished, parts)
            updates = int(state["updates"])
            set_random_state(state["rng"])
    save(unfinished, parts, updates=updates)  # a folder that cannot be written is noticed now
    bar = tqdm(desc="flow prior", total=args.flow_updates, initial=updates, unit="update")
    while updates < args.flow_updates:
        optimizer.param_groups[0]["lr"] = args.flow_lr * (1 - updates / args.flow_updates) ** 0.5
        rows = torch.randint(len(obs), (args.flow_batch_size,), device=args.device)
        z = draw([part[rows] for part in q])  # (B, Z)
        loss = gradients(z, obs[rows])
        grad_norm = gradient_norm(flow)
        optimizer.step()
        updates += 1
        bar.update()
        stopping = stop.is_set() and updates < args.flow_updates
        if stopping or updates % 100 == 0 or updates == args.flow_updates:
            check_finite(dict(grad_norm=grad_norm))
            metrics = dict(flow_loss=loss.detach(), flow_grad_norm=grad_norm)
            log(writer, "pretrain", metrics, updates)
            bar.set_postfix(flow_loss=f"{loss.item():.3g}")
        if stopping or updates % 2_500 == 0:
            save(unfinished, parts, updates=updates)
        if stopping:
            bar.close()
            sys.exit("stopped while the flow prior learnt; the same command goes on")
    bar.close()

    # Both priors on the same skills of windows that neither has seen; and what the flow does in the task
    obs, *q = encode_windows(networks["skills"], valid_data, 4_000, args)
    with torch.no_grad():
        z = draw(q)
        flow_nll = float(flow_loss(flow, z, obs))
        gaussian_nll = float(-log_density(z, networks["prior"](obs)).mean())
    agent = Agent(args, networks)  # whose policy is the prior
    num_episodes = 4 * args.pretrain_eval_episodes
    actor = agent.actor()
    returns, _ = rollout(agent.sample_policy, actor, num_episodes, args, args.seed)
    facts = dict(flow_nll=flow_nll, gaussian_nll=gaussian_nll, flow_updates=updates)
    facts |= dict(prior_return=float(returns.mean()), prior_success=success(returns, args))
    log(writer, "pretrain", facts, updates)
    words = ", ".join(f"{name} {value:.4g}" for name, value in facts.items())
    print(f"flow prior: {words}")
    save(path, dict(flow=flow), facts=facts)
    unfinished.unlink(missing_ok=True)


def add_flow(args: Args, networks, model: Path, facts: dict, writer, stop):
    """Put the flow prior for the pre-trained model into networks, from the cache or learnt now; complete the facts."""
    data = data_tools.load_dataset(args.env_id, args.data_dir, args.dataset, args.data)
    torch.manual_seed(0)
    networks["flow"] = FlowPrior(data.observations.shape[1], args).to(args.device)
    path = find_flow(args, model, data)
    if not path.exists():
        learn_flow(args, networks, path, data, writer, stop)
    with reading(path):
        found = dict(load(path, dict(flow=networks["flow"]))["facts"])
    print(f"flow prior: {path}")
    facts["gaussian_return"] = facts.get("prior_return")
    facts |= found  # prior_return is now the flow's


# -------------------------------------------------------------------------------------------------------- downstream RL
class Agent(nn.Module):
    """The policies and values that PPO trains, the frozen flow and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.skills = networks["skills"]
        obs_dim = len(self.skills.features.scale)
        A = self.skills.skill_policy[-1].out_features
        Z = args.skill_dim
        # A run that is resumed or evaluated has its flow in the checkpoint
        self.flow = networks["flow"] if "flow" in networks else FlowPrior(obs_dim, args)
        self.high = ActorCritic(obs_dim, 0, Z, 1.0, 0.2, args)  # DEVIATION 7: N(0, I), so it starts as the prior
        self.residual = ActorCritic(obs_dim, Z + A, A, args.residual_std, 0.02, args)
        self.learners = dict(high=self.high, residual=self.residual)
        self.to(args.device)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        self.skills.requires_grad_(False)
        self.flow.requires_grad_(False)
        policies = [*self.policy_weights("high"), *self.policy_weights("residual")]
        values = [*self.high.value_net.parameters(), *self.residual.value_net.parameters()]
        groups = dict(params=policies, lr=args.policy_lr), dict(params=values, lr=args.value_lr)
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=True)
        self.steps = {}  # by the policies that are learning

    def policy_weights(self, name: str) -> list:
        learner = self.learners[name]
        return [*learner.policy.parameters(), learner.log_std]

    def actor(self) -> SkilledActor:
        """A copy of what acts, on the CPU next to the simulator."""
        return copy.deepcopy(SkilledActor(self.skills, self.residual)).cpu()

    @torch.no_grad()
    def sample_policy(self, obs):
        """Skills of the policy, at first the prior's: obs (E, O) NumPy -> z (E, Z) on the CPU."""
        obs = torch.from_numpy(obs).to(self.args.device)
        return self.flow.inverse(draw(self.high(obs)), obs).cpu()

    def update(self, *batch, learning=("high", "residual")) -> dict:
        """One step of both values, and of those policies that are learning, on a batch of RolloutBuffer.sample."""
        learning = tuple(learning)
        if learning not in self.steps:
            self.steps[learning] = recorded(functools.partial(self.step, learning), self.args)
        return self.steps[learning](*batch)

    def step(self, learning: tuple, *batch) -> dict:
        loss = 0.0
        metrics = {}
        for name, rows in (("high", batch[:6]), ("residual", batch[6:])):
            part, facts = ppo_loss(self.learners[name], *rows, self.args)
            loss = loss + part
            metrics |= {f"{name}_{key}": value for key, value in facts.items()}
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = gradient_norm(self.high) + gradient_norm(self.residual)  # of all: a NaN must not hide
        for name in self.learners:
            if name not in learning:
                for weight in self.policy_weights(name):
                    weight.grad = None  # so that Adam leaves it alone
        self.optimizer.step()
        for learner in self.learners.values():
            learner.log_std.data.clamp_(*learner.log_bounds)  # DEVIATION 7
        return dict(metrics, grad_norm=grad_norm)


def train(args: Args, networks: nn.ModuleDict, facts: dict, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Phase 2: online RL over skills, from pre-trained networks or, where there is one, from the run's checkpoint.

    facts about the pre-training go into the results, which are returned.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = RolloutBuffer(obs.shape[1], envs.single_action_space.shape[0], args)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    residuals = []  # (env step, w, share of the residual) of each roll-out
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb, optimizer=agent.optimizer)
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
            residuals = [(step, weight, share) for step, weight, share in state["residuals"]]
            facts = dict(state["facts"])
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
    start_time = time.time() - seconds

    actor = agent.actor()
    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    while not stopping:
        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps
        z = agent.sample_policy(obs)  # (E, Z)
        actor.weight = residual_weight(global_step, args)
        rows = collect_skill(envs, actor, obs, z, args)
        rb.add(*rows)
        *_, all_rewards, terminations, truncations, steps, next_obs = rows
        rewards = all_rewards.sum(1)
        ended = terminations | truncations
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

        # ALGO LOGIC: training. A policy that has left the one that acted rests: the one look at the device
        if rb.full:
            rb.prepare(agent)
            bounds = dict(high=args.high_kl, residual=args.residual_kl)
            if actor.weight < 0.01:  # DEVIATION 9
                del bounds["residual"]
            for _ in range(args.updates_per_rollout):
                metrics = agent.update(*rb.sample(args.batch_size), learning=bounds)
                gradient_step += 1
                bounds = {name: kl for name, kl in bounds.items() if metrics[f"{name}_kl"] <= 1.5 * kl}
            check_finite(metrics)
            share = rb.residual_share(actor.weight)
            residuals.append((global_step, actor.weight, share))
            log(writer, "losses", metrics, global_step)
            charts = dict(residual_weight=actor.weight, residual_share=share)
            log(writer, "charts", charts, global_step)
            actor = agent.actor()

        # Evaluate without noise in the residual. Skills are drawn: the mean of two good ones need not be good
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            actor.weight = residual_weight(global_step, args)
            returns, lengths = rollout(agent.sample_policy, actor, args.eval_episodes, args, 10_000 + args.seed)
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
                residuals=residuals,
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
        actor.weight = residual_weight(global_step, args)
        rollout(agent.sample_policy, actor, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
        draw_pictures(args, agent, residuals, run_dir / "evaluation.png")
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


def draw_pictures(args: Args, agent: Agent, residuals: list, path: Path):
    """PNG: the next H env steps in four states, of the data and of the flow prior's skills; the residual over time.

    Motion is that of the first two entries of an observation. Each state's cloud begins in the 100 nearest ones.
    """
    from matplotlib.figure import Figure  # not needed for learning

    data = data_tools.load_dataset(args.env_id, args.data_dir, args.dataset, args.data)
    seen = []

    @torch.no_grad()
    def choose_skill(obs):
        seen.append(torch.from_numpy(obs).clone())
        g = torch.randn(len(obs), args.skill_dim, device=args.device)
        return agent.flow.inverse(g, seen[-1].to(args.device)).cpu()

    rollout(choose_skill, agent.actor().skills, 100, args, args.seed)
    before = torch.stack(seen[:-1]).flatten(0, 1)  # (n, O)
    after = torch.stack(seen[1:]).flatten(0, 1)  # (n, O)
    alive = (before != after).any(1)  # members that ended stand still
    windows, _ = data.sample_windows(50_000, args.skill_horizon + 1)
    if windows.shape[-1] == 1:
        return print("no picture: the task observes one number")
    sets = (windows[:, 0], windows[:, -1]), (before[alive], after[alive])
    looks = ("grey", "data"), ("tab:orange", "flow prior")
    scale = windows[:, 0].std(0) + 1e-6

    def nearest(begin, state):
        """Distances of the 100 states in begin (n, O) that are nearest to state (O,), and their rows."""
        distances = ((begin - state) / scale).square().sum(1)
        return distances.topk(100, largest=False)

    def variety(state):
        """How much the data's motion from a state varies; counts less where the data have no state nearby."""
        begin, end = sets[0]
        distances, rows = nearest(begin, state)
        return float((end - begin)[rows, :2].std(0).sum() / (0.1 + distances[-1]))

    figure = Figure(figsize=(18, 3.6), layout="tight")
    *panels, last = figure.subplots(1, 5)
    candidates = before[alive][:: max(1, int(alive.sum()) // 200)]
    for axes, group in zip(panels, candidates.chunk(4)):  # early to late; of each, a state where data often differ
        state = max(group, key=variety)
        for (begin, end), (colour, label) in zip(sets, looks):
            _, rows = nearest(begin, state)
            x, y = (end - begin)[rows, :2].T
            axes.scatter(x, y, s=14, alpha=0.6, color=colour, label=label, linewidths=0)
        axes.set_title(f"from ({state[0]:.2f}, {state[1]:.2f})")
        axes.set_xlabel("change of obs[0]")
        axes.axis("equal")
    panels[0].set_ylabel("change of obs[1]")
    panels[0].legend()
    steps, weights, shares = np.array(residuals).reshape(-1, 3).T  # none in a run without a whole roll-out
    last.plot(steps, weights, label="w")
    last.plot(steps, shares, label="share of the sizes of both")
    last.set_title("residual")
    last.set_xlabel("env step")
    last.legend()
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=80, format="png")
    part.replace(path)
    print(f"picture of prior and residual: {path}")


def evaluate(args: Args):
    """--evaluate: episodes of a trained agent without noise in the residual (DEVIATION 11); needs no training."""
    networks = make_networks(args, *data_tools.env_sizes(args.env_id))
    agent = Agent(args, networks)
    path = Path(args.evaluate)
    with reading(path):
        state = load(path, dict(agent=agent))
        residuals = state["residuals"]
        global_step = int(state["global_step"])
    actor = agent.actor()
    actor.weight = residual_weight(global_step, args)
    seed = 10_000 + args.seed
    returns, lengths = rollout(agent.sample_policy, actor, args.eval_episodes, args, seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(agent.sample_policy, actor, 1, args, seed, video)
        print(f"video: {video}")
        draw_pictures(args, agent, residuals, video.with_suffix(".png"))


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"
# With --pretrained, whose model is finished, these would do nothing. The flow is learnt all the same.
PRETRAINING = """pretrain_updates pretrain_skills pretrain_batch_size pretrain_lr pretrain_lr_decay pretrain_tau
    bc_chunks bc_coef kl_coef prior_coef recon_coef clip_updates clip_norm pretrain_eval_interval"""


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
    may_be_zero = "seed", "eval_interval", "clip_updates"
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in may_be_zero:
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("gamma", "gae_lambda") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.skill_dim < 2:
        sys.exit("error: --skill-dim 1 does not work, the flow prior halves skills; give at least 2")
    if not 0.02 <= args.residual_std <= 1:
        sys.exit(f"error: --residual-std {args.residual_std} does not work; give 0.02 to 1")
    if args.pretrain_batch_size == 1:
        sys.exit("error: --pretrain-batch-size 1 does not work, BatchNorm needs two windows; give at least 2")
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
    if args.capture_video and not args.evaluate:
        envs = data_tools.make_envs(args.env_id, 1)
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
    if args.capture_video:
        data_tools.load_dataset(args.env_id, args.data_dir, args.dataset, args.data)  # missing ones are noticed now

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
                add_flow(args, networks, path, facts, writer, stop)
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
