"""DADS: Dynamics-Aware Discovery of Skills (Sharma et al. 2020), https://arxiv.org/abs/1907.01657; off-policy form:
https://arxiv.org/abs/2004.12974

Idea: without any reward, learn skills whose outcome can be predicted: a model q(x' | x, z) of the next state must gain
much from knowing the skill z, and the policy is rewarded for going where it does. Skills then differ from each other
and each does one thing reliably. A task comes later: plan which skills to use in this model; the policy learns no more.

    python algos/dads.py --env-id maze           # both phases and evaluation
    python algos/dads.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
    python algos/dads.py --evaluate runs/FOLDER/checkpoint.pt --capture-video   # also draws where the skills lead

Phase A, discover_steps env steps, repeat:
   act: z ~ U[-1, 1]^Z, held for hold_steps; a ~ pi(a | s, z)
   skill dynamics: maximise log q(x' | x, z)
   policy, by SAC: r = log q(x' | x, z) - log 1/(L+1) sum_i q(x' | x, z_i), z_i ~ U[-1, 1]^Z and the true z: an
      estimate of the mutual information I(x'; z | x) = H(x' | x) - H(x' | x, z): many outcomes, each foreseeable
Phase B, the rest; the policy is frozen, its dynamics and the rewards go on being learnt:
   plan: z_1..z_K by MPPI in q, so that the sum of predicted rewards R(x_k, x_k+H) is highest; execute z_1 for H steps

Not goal-conditioned: a skill is a code without a meaning. Pre-trained, without reward, in the task itself. A skill ends
after a fixed number of env steps. Off-policy: SAC, with rewards of today's q for all that is in the replay.

Differences from the release (google-research/dads), marked DEVIATION n below
1. x and its change are normalised by mean and std of the replay; the release's batch norm has an eps that hides slow
   objects (CALVIN, Kitchen), and for its first 43,000 env steps the skills' reward is nearly 0. The price of ours: an
   entry that has hardly ever moved has a tiny std, so q is surprised when it moves, and the reward falls to as little
   as -50 nats until q has seen more of it.
2. q sees the position as well, as walls depend on it, and so do policy and critics (release on Ant: q z alone, the
   others no position). x: position (maze), all (others).
3. Replay of 300,000 steps (10,000), all of a default run, as R forgets a reward that is dropped; not weighted by
   pi_now / pi_then, which the release does in some configurations.
4. Policy and critics are those of sac.py: sines and cosines of positions, its log std and weights; 128 units (512) and
   a learning rate of 1e-3 (3e-4), as updates are few; L = 16 (100). They are meant for one core.
5. Updates come one at a time: one of q, then eight of SAC (8, then 64, every 500 env steps).
6. MPPI begins at mean 0 each time (N(0, I), then what is left of the last plan), and returns are divided by their std
   over the plans, so that a temperature means the same for all rewards. Where R knows nothing its small errors are
   divided, too, and choose the skill. Evaluation takes the policy's mode (release: samples).
7. The release plans with a known dense reward. Our tasks' rewards are sparse, so R is learnt from what was seen, in
   both phases, and so is q; nothing in the papers says how (release: q is that of phase A). While the replay holds
   none, phase B executes random skills as phase A does. --task-reward known tells the planner the task's success test:
   a labelled control, not the method, and no upper bound. Where no sampled plan succeeds, as nearly everywhere in the
   maze, all plans weigh the same, and their mean, a skill near 0, is executed.
A time-out is no end for SAC, which counts the next state's value.
Free choices: Z, hold_steps, the share of phase A. R cannot see which sub-tasks are done, which the reward depends on.

Expect nearly no reward: plans look K x H = 10 env steps ahead, the maze's goal is 700 away; SkiMo's authors report the
same. That it works where a goal is near is shown by `python benchmarks/skill_control.py --out dads.csv`.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, POSITION_PERIODS, Inputs, policy_loss, plan, Planner, rollout,
    ReplayBuffer, Agent, train, evaluate, parse_args, check_args, main
Shapes: B batch, O observation, D entries of x, F inputs, A action, Z skill, E environments, K skills per plan, P plans,
L other skills, M Gaussians of the mixture.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gc
import importlib
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
import data_tools  # tasks, nothing else


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    cudagraphs: bool = torch.cuda.is_available()  # replay updates and plans as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode
    capture_video: bool = False  # at the end, record an evaluation episode (MP4) and draw where skills lead (PNG)
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # Skills
    discover_steps: int = 150_000  # env steps of phase A, in which skills are learnt
    skill_dim: int = 5  # Z: numbers of a skill
    hold_steps: int = 360  # env steps for which a random skill is kept, at most until the episode ends
    dynamics_obs: int = 30  # D: x is so many first entries of an observation
    num_components: int = 4  # M: Gaussians in the skills' dynamics
    num_prior_samples: int = 16  # L: other skills that the reward compares with (release: 100)
    intrinsic_scale: float = 10.0  # factor on the reward of skills

    # Learning
    total_timesteps: int = 300_000  # env steps of both phases
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 2_000  # env steps of the untrained policy, before updates start
    updates_per_step: float = 0.016  # updates of the dynamics per env step, in both phases
    policy_updates: int = 8  # updates of policy and critics after each of the dynamics, in phase A
    batch_size: int = 256  # transitions per update
    buffer_size: int = 300_000  # transitions kept (release: 10,000; DEVIATION 3)
    learning_rate: float = 1e-3  # of all networks and log alpha (release: 3e-4)
    gamma: float = 0.99  # discount per env step
    tau: float = 0.005  # share of the online weights in a target update, after each update
    reward_scale: float = 1.0  # factor on the task's reward, which the planner uses
    hidden_dim: int = 128  # width of hidden layers (release: 512; DEVIATION 4)
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py

    # Planner
    task_reward: Literal["learned", "known"] = "learned"  # known: the task's success test; a control, not the method
    skill_horizon: int = 10  # H: env steps per planned skill
    plan_skills: int = 1  # K: skills per plan
    num_samples: int = 50  # P: sampled plans per iteration
    mppi_iters: int = 10  # iterations
    plan_variance: float = 1.5  # of sampled skills around the mean, before they are clipped to [-1, 1]
    plan_smoothing: float = 0.9  # share of the skill before in the next one of a plan, where plan_skills is above 1
    temperature: float = 10.0  # factor on the plans' normalised returns in the softmax


TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, skill_dim=2, hold_steps=200, dynamics_obs=2),
    "kitchen": dict(total_timesteps=200_000, discover_steps=100_000),
    "kitchen-misaligned": dict(total_timesteps=200_000, discover_steps=100_000),
    "calvin": dict(reward_scale=0.01, dynamics_obs=21),
}

# Sub-tasks, for --task-reward known only: done if entries of x are nearer to these values than a radius.
MICROWAVE = ({22: -0.75}, 0.3)
KETTLE = ({23: -0.23, 24: 0.75, 25: 1.62, 26: 0.99, 27: 0.0, 28: 0.0, 29: -0.06}, 0.3)
LIGHT = ({17: -0.69, 18: -0.05}, 0.3)
SUBTASK_GOALS = {
    "maze": [({0: 18.0, 1: 8.0}, 2.0)],
    "kitchen": [MICROWAVE, KETTLE, ({11: -0.88, 12: -0.01}, 0.3), LIGHT],
    "kitchen-misaligned": [MICROWAVE, LIGHT, ({19: 0.37}, 0.3), ({20: 0.0, 21: 1.45}, 0.3)],
    "calvin": [({16: 0.22}, 0.1), ({19: 1.0}, 0.5), ({15: 0.28}, 0.13), ({20: 1.0}, 0.5)],  # drawer, bulb, slide, LED
}

# Entries of x that jump by 2 pi: the Euler angles of CALVIN's tool.
ANGLES = {"calvin": (3, 4, 5)}

# Periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]


# ------------------------------------------------------------------------------------------------------------ networks
def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Inputs(nn.Module):
    """States with their skill (..., O + Z) -> inputs (..., F) of policy and critics, F = size.

    Observations are scaled and get sines and cosines of positions; the skill stays as it is. Where policy and critics
    say O, it counts both.
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
        self.register_buffer("frequency", frequency)
        self.obs_dim = obs_dim
        self.size = obs_dim + 2 * periods.size + args.skill_dim

    def forward(self, state):
        obs = state[..., : self.obs_dim]
        z = state[..., self.obs_dim :]
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)
        scaled = obs * self.scale + self.shift
        return torch.cat([scaled, phase.sin(), phase.cos(), z], -1)  # (..., F)


class Actor(nn.Module):
    """Policy pi(a | s): the tanh of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        self.net = relu_mlp(self.inputs.size, u, u, 2 * action_dim)

    def forward(self, obs):
        """Observations (..., O) -> mean and std before the tanh, 2 x (..., A); the std lies within e^-5 to e^2."""
        mean, raw = self.net(self.inputs(obs)).chunk(2, -1)
        log_std = -5 + 3.5 * (torch.tanh(raw) + 1)
        return mean, log_std.exp()

    def sample(self, obs):
        """A reparameterised action (..., A) in (-1, 1) and its log-probability (...)."""
        mean, std = self(obs)
        noise = torch.randn_like(mean)
        x = mean + std * noise
        log_prob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
        # The tanh squeezes: minus log(1 - tanh(x)^2), in a form that does not overflow
        log_slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return torch.tanh(x), (log_prob - log_slope).sum(-1)


class TwinQ(nn.Module):
    """Q_1 and Q_2 of observations (..., O) and actions (..., A) -> 2 x (...)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + action_dim
        self.qf1 = relu_mlp(in_dim, u, u, 1)
        self.qf2 = relu_mlp(in_dim, u, u, 1)

    def forward(self, obs, action):
        x = torch.cat([self.inputs(obs), action], -1)
        return self.qf1(x).squeeze(-1), self.qf2(x).squeeze(-1)


class SkillDynamics(nn.Module):
    """q(x' | x, z): M Gaussians of std 1 over the normalised change of x; and the task's reward R(x, x_later)."""

    def __init__(self, dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        M = args.num_components
        self.dim = dim
        self.num_components = M
        self.net = relu_mlp(dim + args.skill_dim, u, u, M + M * dim)
        self.reward_net = relu_mlp(2 * dim, u, u, 1)
        self.register_buffer("x_mean", torch.zeros(dim))
        self.register_buffer("x_std", torch.ones(dim))
        self.register_buffer("change_mean", torch.zeros(dim))
        self.register_buffer("change_std", torch.ones(dim))
        angles = ANGLES.get(args.env_id, ())
        self.register_buffer("is_angle", torch.tensor([i in angles for i in range(dim)]))  # (D,)

    def change(self, x, next_x):
        """x' - x, (..., D); an angle takes the short way."""
        change = next_x - x
        short = torch.remainder(change + math.pi, 2 * math.pi) - math.pi
        return torch.where(self.is_angle, short, change)

    @torch.no_grad()
    def set_scale(self, x, next_x):
        """Normalise by these transitions (n, D); what never moves keeps std 1. DEVIATION 1"""
        change = self.change(x, next_x)
        of_x = (x, self.x_mean, self.x_std)
        of_change = (change, self.change_mean, self.change_std)
        for values, mean, std in (of_x, of_change):
            mean.copy_(values.mean(0))
            spread = values.std(0, correction=0)
            std.copy_(torch.where(spread < 1e-6, 1.0, spread))

    def forward(self, x, z):
        """x (..., D), z (..., Z) -> log-weights (..., M) and means (..., M, D) of the normalised change."""
        scaled = (x - self.x_mean) / self.x_std  # DEVIATION 2
        out = self.net(torch.cat([scaled, z], -1))
        logits = out[..., : self.num_components]
        means = out[..., self.num_components :].unflatten(-1, (self.num_components, self.dim))
        return logits.log_softmax(-1), means

    def log_prob(self, x, z, next_x):
        """log q(x' | x, z), (...), per unit of the normalised change."""
        log_weights, means = self(x, z)
        change = (self.change(x, next_x) - self.change_mean) / self.change_std  # (..., D)
        error = (change[..., None, :] - means).square().sum(-1)  # (..., M)
        constant = 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(log_weights - 0.5 * error, -1) - constant

    def predict(self, x, z):
        """Mean of x' (..., D)."""
        log_weights, means = self(x, z)
        change = (log_weights.exp()[..., None] * means).sum(-2)  # (..., D)
        return x + self.change_mean + self.change_std * change

    def reward(self, x, x_later):
        """R: the task's reward on the way from x to x_later, which is skill_horizon env steps later, (...)."""
        before = (x - self.x_mean) / self.x_std
        after = (x_later - self.x_mean) / self.x_std
        return self.reward_net(torch.cat([before, after], -1)).squeeze(-1)


# -------------------------------------------------------------------------------------------------------------- losses
def dynamics_loss(dynamics, x, z, next_x, start, later, rewards):
    """Skill dynamics by maximum likelihood, -log q(x' | x, z): they have to know what each skill does. And R.

    x, next_x (B, D), z (B, Z) one env step; start, later (B, D), rewards (B,) a skill's duration: R learns what is won
    on such a way, by squared errors. Returns the loss and metrics.
    """
    log_q = dynamics.log_prob(x, z, next_x)  # (B,)
    error = dynamics.reward(start, later) - rewards  # DEVIATION 7
    loss = error.square().mean() - log_q.mean()
    metrics = dict(log_q=log_q, reward_error=error.abs())
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


@torch.no_grad()
def intrinsic_reward(dynamics, x, z, next_x, num_samples: int):
    """How much better z explains the step than other skills do, (B,): at most log(L+1), 0 if q ignores the skill.

    log q(x' | x, z) - log of the mean of q over z itself and L other skills. It makes skills differ in what they do.
    """
    B, Z = z.shape
    other_z = 2 * torch.rand(B, num_samples, Z, device=z.device) - 1  # (B, L, Z)
    here = x[:, None].expand(-1, num_samples, -1)  # (B, L, D)
    there = next_x[:, None].expand(-1, num_samples, -1)  # (B, L, D)
    log_q = dynamics.log_prob(x, z, next_x)  # (B,)
    gap = dynamics.log_prob(here, other_z, there) - log_q[:, None]  # (B, L)
    gap = gap.clamp(-50, 50)
    return math.log(num_samples + 1) - torch.log1p(gap.exp().sum(1))


def soft_critic_loss(critics, target, actor, obs, action, rewards, next_obs, discount, alpha):
    """TD loss of both critics (SAC eq. 5, 6): a state is worth its reward plus the soft value of where it leads.

    obs, next_obs (B, O), action (B, A), rewards (B,) summed over n steps, discount (B,) of next_obs' value, 0 at a true
    end, alpha (). Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        next_action, log_prob = actor.sample(next_obs)
        next_q = torch.min(*target(next_obs, next_action))  # (B,)
        td_target = rewards + discount * (next_q - alpha * log_prob)  # (B,)
    q1, q2 = critics(obs, action)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * error.mean()
    metrics = dict(value_loss=loss, q_value=q1, td_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def policy_loss(critics, actor, obs, alpha):
    """Policy (SAC eq. 9): prefer actions that the critics like, but stay as random as that allows.

    obs (B, O), alpha (). Returns the loss and metrics; metrics["entropy"] is the mean entropy in nats.
    """
    action, log_prob = actor.sample(obs)  # (B, A), (B,)
    q_value = torch.min(*critics(obs, action))  # (B,)
    loss = (alpha * log_prob - q_value).mean()
    metrics = dict(policy_loss=loss, policy_q=q_value, entropy=-log_prob)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------- planner and acting
def known_goals(args: Args):
    """Of each sub-task: entries (n,) of x, their values (n,), radius. Made before plans are recorded, on the device."""
    goals = []
    for values, radius in SUBTASK_GOALS[args.env_id]:
        entries = torch.tensor(list(values), device=args.device)
        goal = torch.tensor(list(values.values()), device=args.device)
        goals.append((entries, goal, radius))
    return goals


def known_reward(x, x_later, goals):
    """How many more sub-tasks are done at x_later than at x, by the task's own test: (..., D) twice -> (...)."""
    gained = 0.0
    for entries, goal, radius in goals:
        before = (x[..., entries] - goal).norm(dim=-1) < radius
        after = (x_later[..., entries] - goal).norm(dim=-1) < radius
        gained = gained + after.float() - before.float()
    return gained


@torch.no_grad()
def plan(dynamics, score, x, args):
    """MPPI over K skills for all environments at once: x (E, D) -> mean of the last plans (E, K, Z).

    score(x, x_later) is the reward that is expected on the way of one skill.
    """
    E = len(x)
    mean = torch.zeros(E, args.plan_skills, args.skill_dim, device=x.device)  # DEVIATION 6
    for _ in range(args.mppi_iters):
        noise = torch.randn(E, args.num_samples, *mean.shape[1:], device=x.device)
        plans = mean[:, None] + math.sqrt(args.plan_variance) * noise
        plans = plans.clamp(-1, 1)  # (E, P, K, Z)
        skills = [plans[:, :, 0]]
        for k in range(1, args.plan_skills):
            fresh = (1 - args.plan_smoothing) * plans[:, :, k]
            skills.append(args.plan_smoothing * skills[-1] + fresh)

        # Return of each plan: the dynamics are rolled out env step by env step, rewards are those of whole skills
        x_later = x[:, None].expand(-1, args.num_samples, -1)  # (E, P, D)
        returns = 0.0
        for z in skills:
            start = x_later
            for _ in range(args.skill_horizon):
                x_later = dynamics.predict(x_later, z)
            returns = returns + score(start, x_later)  # (E, P)

        # A plan whose states overflow, far from all that was seen, is as bad as the worst of the others. All are alike
        # if all do. 1e6 is beyond any return
        overflowed = ~returns.isfinite()
        worst = returns.masked_fill(overflowed, math.inf).amin(1, keepdim=True)
        returns = torch.where(overflowed, worst, returns).clamp(-1e6, 1e6)  # (E, P)

        # All plans count, the better the more. Equal returns: the mean of all
        advantage = returns - returns.amax(1, keepdim=True)
        advantage = advantage / (returns.std(1, correction=0, keepdim=True) + 1e-6)
        weight = torch.softmax(args.temperature * advantage, 1)  # (E, P)
        mean = (weight[..., None, None] * torch.stack(skills, 2)).sum(1)
    return mean


class Planner:
    """Chooses skills for E environments at once: at random while skills are learnt, by plans afterwards."""

    def __init__(self, agent, args: Args, explore: bool):
        self.agent = agent
        self.args = args
        self.explore = explore
        self.graphs = {}  # of the last shape alone

    def plans(self, global_step: int) -> bool:
        """Whether skills are planned: in phase B, as soon as there is a reward to plan for."""
        has_reward = self.args.task_reward == "known" or bool(self.agent.rewarded)
        return global_step >= self.args.discover_steps and has_reward

    @torch.no_grad()
    def __call__(self, obs, global_step: int):
        """Observations (E, O) -> skills (E, Z), both NumPy."""
        args = self.args
        agent = self.agent
        if not self.plans(global_step):
            return 2 * torch.rand(len(obs), args.skill_dim).numpy() - 1
        x = torch.from_numpy(obs).to(args.device)[:, : args.dynamics_obs]

        def plan_skills(x):
            return plan(agent.dynamics, agent.score, x, args)

        shape = x.shape
        if self.explore and shape not in self.graphs:  # an evaluation is too short to record
            self.graphs = {shape: recorded(plan_skills, args)}
        mean = self.graphs.get(shape, plan_skills)(x)
        return mean[:, 0].cpu().numpy()


class Executor:
    """Executes skills in E environments: chooses one when the one before is over, and acts by it."""

    def __init__(self, planner: Planner, num_envs: int):
        self.planner = planner
        self.z = np.zeros((num_envs, planner.args.skill_dim), dtype=np.float32)
        self.left = np.zeros(num_envs, dtype=np.int64)  # env steps that each skill still has

    def __call__(self, obs, global_step: int):
        """Observations (E, O) -> actions (E, A), both NumPy."""
        planner = self.planner
        if planner.plans(global_step):  # a random skill of before gives way to plans
            self.left = np.minimum(self.left, planner.args.skill_horizon)
        due = self.left == 0
        if due.any():
            z = planner(obs, global_step)  # for all: shapes stay the same
            self.z = np.where(due[:, None], z, self.z)
            planned = planner.plans(global_step)
            self.left[due] = planner.args.skill_horizon if planned else planner.args.hold_steps
        self.left -= 1
        return planner.agent.act(np.concatenate([obs, self.z], 1), planner.explore)

    def forget(self, ended):
        """Members (E,) bool begin a new episode, and so a new skill."""
        self.left[ended] = 0


def planned_actions(agent, args: Args, num_envs: int):
    """Function obs (E, O) -> actions (E, A) of an evaluation: planned skills and the policy's mode."""
    executor = Executor(Planner(agent, args, explore=False), num_envs)
    return functools.partial(executor, global_step=args.discover_steps)


def rollout(choose_action, num_episodes: int, args: Args, seed: int, video: Path | None = None):
    """An episode in each of num_episodes environments, with actions (E, A) = choose_action(obs (E, O)).

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
            obs, rewards, terminations, truncations, _ = envs.step(choose_action(obs))
            returns += np.where(ended, 0.0, rewards)
            lengths += ~ended
            ended = terminations | truncations
    envs.close()
    return returns, lengths


def success(returns, args: Args) -> float:
    """Share of episodes in which everything was done."""
    best = data_tools.TASKS[args.env_id].max_return
    reached = np.asarray(returns) >= best - 1e-5 * abs(best)  # rewards are float32
    return float(reached.mean()) if len(returns) else 0.0


# ------------------------------------------------------------------------------------------------------------ pictures
def skill_paths(agent, z, num_steps: int, args: Args, seed: int):
    """Observations (T+1, N, O) of N skills z (N, Z) from one start, until all have ended; NaN after a member's end."""
    envs = data_tools.make_envs(args.env_id, len(z))
    obs, _ = envs.reset(seed=[seed] * len(z))
    path = [obs]
    ended = np.zeros(len(z), dtype=bool)
    for _ in range(num_steps):
        action = agent.act(np.concatenate([obs, z], 1), explore=False)
        obs, _, terminations, truncations, _ = envs.step(action)
        path.append(np.where(ended[:, None], np.nan, obs))
        ended |= terminations | truncations
        if ended.all():
            break
    envs.close()
    return np.stack(path)


def tool_position(obs, args: Args):
    """Where the thing that moves is: the point mass (..., 2), or the hand (..., 3) in metres."""
    if not args.env_id.startswith("kitchen"):
        return obs[..., : 2 if data_tools.TASKS[args.env_id].draw_map else 3]
    # The Franka arm's geometry (Denavit-Hartenberg, Craig's form) takes its seven joints to the point between fingers.
    lengths = [0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088]
    offsets = [0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0]
    twists = [0.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]  # quarter turns
    point = np.array([0.0, 0.0, 0.21])
    point = np.broadcast_to(point, (*obs.shape[:-1], 3))
    for i in reversed(range(7)):
        angle = obs[..., i] + (np.pi / 2 if i == 5 else 0.0)
        x = np.cos(angle) * point[..., 0] - np.sin(angle) * point[..., 1]
        y = np.sin(angle) * point[..., 0] + np.cos(angle) * point[..., 1]
        h = point[..., 2] + offsets[i]
        t = twists[i] * np.pi / 2
        new_x = x + lengths[i]
        new_y = np.cos(t) * y - np.sin(t) * h
        new_h = np.sin(t) * y + np.cos(t) * h
        point = np.stack([new_x, new_y, new_h], -1)
    return point


def draw_skills(agent, args: Args, num_steps: int, path: Path):
    """Where 16 skills lead from the start, a colour for each: those around a circle in their first two numbers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # only pictures need it

    angles = 2 * np.pi * np.arange(16) / 16
    z = np.zeros((16, args.skill_dim), dtype=np.float32)
    z[:, :2] = np.stack([np.cos(angles), np.sin(angles)], 1)[:, : args.skill_dim]
    paths = skill_paths(agent, z, num_steps, args, args.seed)
    position = tool_position(paths, args)  # (T+1, 16, 1 to 3)
    if position.shape[-1] == 1:
        return print("no picture of the skills: the task observes one number")
    # From above; from above and from the front. The kitchen's x points away from the robot, others' y does
    front = 1 if args.env_id.startswith("kitchen") else 0
    views = [(1, 0)] if position.shape[-1] == 2 else [(0, 1), (front, 2)]
    figure = Figure(figsize=(6 * len(views), 6))
    draw_map = data_tools.TASKS[args.env_id].draw_map
    for ax, (across, up) in zip(figure.subplots(1, len(views), squeeze=False)[0], views):
        if draw_map:
            module, name = draw_map.split(":")
            getattr(importlib.import_module(module), name)(ax)
        for n, angle in enumerate(angles):
            colour = colormaps["hsv"](angle / 2 / np.pi)
            ax.plot(position[:, n, across], position[:, n, up], color=colour)
        ax.set(aspect="equal", xlabel="xyz"[across], ylabel="xyz"[up])
    figure.suptitle(f"{args.env_id}: {len(paths) - 1} env steps of 16 skills, coloured by the angle of z")
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=100, format="png")
    part.replace(path)
    print(f"picture of the skills: {path}")


# -------------------------------------------------------------------------------------------------------------- replay
class ReplayBuffer:
    """The last env steps of E environments, in a ring of T rows on the device; buffer_size is T times E."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        T = args.buffer_size // args.num_envs
        self.args = args
        make = functools.partial(torch.zeros, T, args.num_envs, device=args.device)
        self.columns = dict(
            obs=make(obs_dim),
            action=make(action_dim),
            z=make(args.skill_dim),
            next_obs=make(obs_dim),
            discount=make(),
            rewards=make(),
            ended=make(),
        )
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, len(self.columns["obs"]))

    def add(self, obs, action, z, rewards, terminations, truncations, next_obs):
        """One env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), z (E, Z), the others (E,).

        A time-out is no end: the value of next_obs counts.
        """
        discount = self.args.gamma * ~terminations
        values = obs, action, z, next_obs, discount, rewards, terminations | truncations
        row = self.added % len(self.columns["obs"])
        for column, value in zip(self.columns.values(), values):
            column[row] = torch.as_tensor(value).to(self.args.device)
        self.added += 1

    def random_rows(self, batch_size: int):
        """Rows and environments (B,) of uniform env steps."""
        t = torch.randint(len(self), (batch_size,), device=self.args.device)
        e = torch.randint(self.args.num_envs, (batch_size,), device=self.args.device)
        return t, e

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), z (B, Z), next_obs (B, O), discount (B,)."""
        t, e = self.random_rows(batch_size)
        return [self.columns[name][t, e] for name in ("obs", "action", "z", "next_obs", "discount")]

    def sample_rewards(self, batch_size: int):
        """What R learns: start (B, O), end (B, O) and sum of rewards (B,) of H env steps, cut where an episode ends.

        Half of them are drawn around a reward, if the buffer has any; an end before it may cut it off.
        """
        H = min(self.args.skill_horizon, len(self))
        E = self.args.num_envs
        half = batch_size // 2
        age, e = self.random_rows(batch_size)  # 0 is the oldest row
        oldest = (self.added - len(self)) % len(self)
        # Some rewarded env step: the n-th, n at random, at one of the H places of its window
        count = (self.columns["rewards"][: len(self)] != 0).flatten().cumsum(0)  # (rows * E,) rewarded ones so far
        n = 1 + (torch.rand(half, device=count.device) * count[-1]).long()
        found = torch.searchsorted(count, n).clamp(max=len(count) - 1)
        place = torch.randint(H, (half,), device=count.device)
        found_age = (found // E - oldest) % len(self) - place
        age[:half] = torch.where(count[-1] > 0, found_age, age[:half])
        e[:half] = torch.where(count[-1] > 0, found % E, e[:half])

        first = age.clamp(0, len(self) - H)
        offset = torch.arange(H, device=count.device)
        t = (first[:, None] + offset + oldest) % len(self)  # (B, H)
        e = e[:, None]
        ended = self.columns["ended"][t, e]
        running = ended.cumsum(1) - ended == 0  # (B, H), not behind an end
        last = t.gather(1, running.sum(1, keepdim=True) - 1)  # (B, 1)
        rewards = (self.columns["rewards"][t, e] * running).sum(1)
        obs = self.columns["obs"][t[:, 0], e[:, 0]]
        next_obs = self.columns["next_obs"][last, e][:, 0]
        return obs, next_obs, rewards

    def rewarded(self) -> bool:
        """Whether R has a reward to learn from."""
        return bool((self.columns["rewards"][: len(self)] != 0).any())

    def positions(self, dim: int):
        """x and x' (rows * E, D) of all rows."""
        obs = self.columns["obs"][: len(self), :, :dim]
        next_obs = self.columns["next_obs"][: len(self), :, :dim]
        return obs.flatten(0, 1), next_obs.flatten(0, 1)

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for name, column in self.columns.items():
            filled = column[: len(self)]
            saved = state[name]
            if saved.shape != filled.shape or not saved.isfinite().all():
                raise ValueError(f"{name} of the replay buffer does not fit")
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


# ------------------------------------------------------------------------------------------------------------ learning
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


class Agent(nn.Module):
    """Skill dynamics; policy, critics with their slow copies and alpha, which see a state with its skill."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        dim = min(args.dynamics_obs, obs_dim)
        self.dynamics = SkillDynamics(dim, args)
        self.actor = Actor(obs_dim, action_dim, args)
        self.critics = TwinQ(obs_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = -0.5 * action_dim  # nats
        self.to(args.device)
        self.register_buffer("rewarded", torch.tensor(False))  # as the replay; on the CPU: asked at each env step
        self.score = self.dynamics.reward  # what plans are for
        if args.task_reward == "known":
            self.score = functools.partial(known_reward, goals=known_goals(args))
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.dynamics_optimizer = adam(self.dynamics.parameters())
        self.critic_optimizer = adam(self.critics.parameters())
        self.policy_optimizer = adam(self.actor.parameters())
        self.alpha_optimizer = adam([self.log_alpha])
        self.update = recorded(self.update, args)
        self.update_dynamics = recorded(self.update_dynamics, args)

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """A sample of the policy or its mode: states with their skill (E, O + Z) -> actions (E, A), both NumPy."""
        mean, std = self.actor(torch.from_numpy(obs).to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    def update_dynamics(self, obs, z, next_obs, start, later, rewards) -> dict:
        """One step of the skills' dynamics and R on observations (B, O), of q's batch and of R's; returns metrics."""
        D = self.dynamics.dim
        x, next_x, start, later = (values[:, :D] for values in (obs, next_obs, start, later))
        loss, metrics = dynamics_loss(self.dynamics, x, z, next_x, start, later, rewards)
        self.dynamics_optimizer.zero_grad()
        loss.backward()
        norm = gradient_norm(self.dynamics)
        self.dynamics_optimizer.step()
        return dict(metrics, grad_norm=norm)

    def update(self, obs, action, z, next_obs, discount) -> dict:
        """One step of critics, policy, alpha and the slow copies on a batch of transitions; returns metrics."""
        alpha = self.log_alpha.exp().detach()
        # The reward is that of today's dynamics. The skill is a part of the state, and stays the same in the next one.
        x = obs[:, : self.dynamics.dim]
        next_x = next_obs[:, : self.dynamics.dim]
        reward = intrinsic_reward(self.dynamics, x, z, next_x, self.args.num_prior_samples)  # (B,)
        obs = torch.cat([obs, z], 1)  # (B, O + Z)
        next_obs = torch.cat([next_obs, z], 1)
        batch = obs, action, self.args.intrinsic_scale * reward, next_obs, discount
        loss, metrics = soft_critic_loss(self.critics, self.target, self.actor, *batch, alpha)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = gradient_norm(self.critics)
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(self.critics, self.actor, obs, alpha)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = gradient_norm(self.actor)
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)

        # Alpha rises while the policy is less random than target_entropy.
        self.alpha_optimizer.zero_grad()
        (self.log_alpha * (policy_metrics["entropy"] - self.target_entropy)).backward()
        self.alpha_optimizer.step()
        update_target(self.target, self.critics, self.args.tau)
        norm = critic_norm + policy_norm
        metrics |= dict(intrinsic_reward=reward.mean(), alpha=alpha, grad_norm=norm)
        return dict(metrics, **policy_metrics)


def gradient_norm(module):
    """Norm of a module's gradient, (), which stays as it is; what check_finite looks at."""
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return nn.utils.get_total_norm(gradients)


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Both phases, from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    rb = ReplayBuffer(obs.shape[1], action_dim, args)
    executor = Executor(Planner(agent, args, explore=True), args.num_envs)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(dynamics=agent.dynamics_optimizer)
    parts |= dict(critics=agent.critic_optimizer, policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            executor.z = state["z"].numpy()
            executor.left = state["left"].numpy()
            global_step = int(state["global_step"])
            gradient_step = int(state["gradient_step"])
            running_return[:] = state["running_return"].numpy()
            running_length[:] = state["running_length"].numpy()
            episodes = [(step, ret, length, minutes) for step, ret, length, minutes in state["episodes"]]
            evaluations = [(step, ret, share) for step, ret, share in state["evaluations"]]
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
    start_time = time.time() - seconds

    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    while not stopping:
        # ALGO LOGIC: put action logic here. A skill is kept for hold_steps (phase A) or H env steps (B)
        action = executor(obs, global_step)  # (E, A)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(obs, action, executor.z, args.reward_scale * rewards, terminations, truncations, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            executor.forget(ended)

        # TRY NOT TO MODIFY: record the episodes that ended
        new_steps = args.num_envs
        global_step += new_steps
        running_return += rewards
        running_length += 1
        for e in np.flatnonzero(ended):
            seconds = time.time() - start_time
            row = (global_step, float(running_return[e]), int(running_length[e]), round(seconds / 60, 3))
            episodes.append(row)
            episodes_csv.writerow(row)
            last_100 = np.array([row[1] for row in episodes[-100:]])
            writer.add_scalar("charts/episodic_return", row[1], global_step)
            writer.add_scalar("charts/episodic_length", row[2], global_step)
            writer.add_scalar("charts/success", success(last_100, args), global_step)
            writer.add_scalar("charts/SPS", global_step / seconds, global_step)
            bar.set_postfix(updates=gradient_step, last_100=f"{last_100.mean():.3g}")
        running_return[ended] = 0
        running_length[ended] = 0
        bar.update(new_steps)

        # ALGO LOGIC: training. The dynamics in both phases; policy and critics only in phase A. DEVIATION 5
        policy_updates = args.policy_updates if global_step <= args.discover_steps else 0
        updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
        while gradient_step < updates_due:
            if gradient_step % 10 == 0:
                agent.dynamics.set_scale(*rb.positions(args.dynamics_obs))
            obs_q, _, z, next_obs_q, _ = rb.sample(args.batch_size)
            reward_batch = rb.sample_rewards(args.batch_size)
            model_metrics = agent.update_dynamics(obs_q, z, next_obs_q, *reward_batch)
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "dynamics", model_metrics, global_step)
            for _ in range(policy_updates):
                metrics = agent.update(*rb.sample(args.batch_size))
            if gradient_step % 100 == 0 and policy_updates:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:  # acting waits for the device anyway
                check_finite(model_metrics)
                if policy_updates:
                    check_finite(metrics)
                agent.rewarded.fill_(rb.rewarded())

        # Evaluate with planned skills and the policy's mode
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            choose_action = planned_actions(agent, args, args.eval_episodes)
            returns, lengths = rollout(choose_action, args.eval_episodes, args, 10_000 + args.seed)
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
                z=torch.from_numpy(executor.z),
                left=torch.from_numpy(executor.left),
                global_step=global_step,
                gradient_step=gradient_step,
                running_return=torch.from_numpy(running_return),
                running_length=torch.from_numpy(running_length),
                episodes=episodes,
                evaluations=evaluations,
                seconds=time.time() - start_time,
            )

    bar.close()
    envs.close()
    episodes_file.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped at env step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
    if global_step <= args.discover_steps:
        print("RL ended in phase A: no skill was planned; give more --total-timesteps")
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        choose_action = planned_actions(agent, args, 1)
        rollout(choose_action, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
        draw_skills(agent, args, args.hold_steps, run_dir / "skills.png")
    last_100 = [row[1] for row in episodes[-100:]]
    return dict(
        env_steps=global_step,
        updates=gradient_step,
        rl_minutes=rl_minutes,
        last_100_return=float(np.mean(last_100)) if last_100 else None,
        last_100_success=success(last_100, args),
        evaluations=evaluations,
    )


def evaluate(args: Args):
    """--evaluate: episodes of a trained agent, with planned skills and the policy's mode; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    choose_action = planned_actions(agent, args, args.eval_episodes)
    returns, lengths = rollout(choose_action, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(planned_actions(agent, args, 1), 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")
        picture = video.with_name(video.name.replace("evaluation.mp4", "skills.png"))
        draw_skills(agent, args, args.hold_steps, picture)


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, or of the run or agent given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", choices=list(data_tools.TASKS), default="maze")
    first.add_argument("--device")
    first.add_argument("--resume")
    first.add_argument("--evaluate")
    given, _ = first.parse_known_args(argv)

    env_id = given.env_id
    defaults = dict(env_id=env_id, **TASK_DEFAULTS.get(env_id, {}))
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
    if given.evaluate and args.env_id != defaults["env_id"]:
        task = defaults["env_id"]
        sys.exit(f"error: {given.evaluate} is an agent of {task}: leave out --env-id")
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value == "":
            sys.exit(f"error: {flag} is empty: give a value, or leave it out")
        if given.resume and name not in MAY_CHANGE.split() and value != defaults[name]:
            sys.exit(f"error: {flag} cannot change with --resume: leave it out, or begin a new run")
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
        if name in ("tau", "gamma") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.warmup_steps >= args.discover_steps:
        sys.exit("error: --warmup-steps leaves nothing of --discover-steps; lower it")
    if args.buffer_size < args.num_envs * args.skill_horizon:
        sys.exit("error: --buffer-size is smaller than --num-envs times --skill-horizon; raise it")
    if args.task_reward == "known" and args.env_id not in SUBTASK_GOALS:
        sys.exit(f"error: --task-reward known needs {args.env_id} in SUBTASK_GOALS; add it, or use learned")
    if args.task_reward == "known":
        goals = SUBTASK_GOALS[args.env_id]
        least = 1 + max(max(entries) for entries, _ in goals)
        if args.dynamics_obs < least:
            given = f"--dynamics-obs {args.dynamics_obs}"
            sys.exit(f"error: {given} is too small for --task-reward known; give at least {least}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; use --device cpu")


def main(args: Args) -> dict:
    """A run; returns its results."""
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
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, torch {torch.__version__}"
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        saved = dict(asdict(args), script=Path(__file__).name)
        write_json(run_dir / "args.json", saved)
        with SummaryWriter(run_dir) as writer:
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            stop = stop_at_signals()
            (run_dir / "results.json").unlink(missing_ok=True)  # of fewer env steps
            results = train(args, run_dir, writer, stop)
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
