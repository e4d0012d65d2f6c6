"""SPiRL: Accelerating RL with Learned Skill Priors (Pertsch, Lee & Lim, CoRL 2020), https://arxiv.org/abs/2010.11944

Idea: learn skills of H = 10 actions and a prior over them from task-agnostic data; then SAC chooses skills, held to the
prior by a KL instead of the entropy. This is the closed-loop version of SkiLD, the model-free baseline of SkiMo.

    python algos/spirl.py --env-id maze             # offline data, pre-training (both are kept), RL, evaluation
    python algos/spirl.py --resume runs/FOLDER      # go on after Ctrl-C or a crash
    python algos/spirl.py --env-id maze --published # with the values of the authors' release

1. Pre-training: encode chunks of H actions as skills z ~ q (LSTM). Loss = behavioural cloning by the skill policy
   + KL(q || N(0,1)) - log p(z | s_0) of the prior p, z without gradient
2. Downstream RL on transitions (s, z, sum of H rewards, s'). The task policy pi starts as the prior p. Repeat:
   act: z = 2 tanh(x), x ~ pi(s), for H steps of the frozen skill policy pi_L
   tune alpha so that KL(pi(s) || p(s)) is target_kl
   critics: Q(s, z) -> r + gamma (min Q'(s', z') - alpha KL(pi(s') || p(s'))), Q' slow copies
   policy: maximise min Q(s, z) - alpha KL(pi(s) || p(s))

Differences from the release, marked DEVIATION n below.
1. KL divergences are exact (both sides are Gaussian). The release averages 10 samples. As there, x ~ pi is compared
   with p, which was learnt for z, although z = 2 tanh(x) is executed: x = 1 gives z = 1.52. So a policy equal to p does
   not act quite like p, and this KL is not that of tdmpc_skills.py and dreamer_skills.py.
2. Pre-training is shorter, with a decaying learning rate and, in the maze and on CALVIN, a larger KL weight.
3. Sines and cosines of positions are inputs as well, and the maze is scaled, as in skimo.py. On people's data arms are
   shifted, objects recombined and skills hold less (--arm-noise, --recombine, --kl-coef).
4. E environments act side by side, E updates after E skills. The warm-up counts as env steps (release: it does not).
5. Kitchen: 30 observations, not 60; the others are a constant goal. CALVIN's pre-training was not released.
6. Actions are those that pi_L was trained for. The release acts with their tanh (--squash-actions), which halves what
   the prior reaches: the maze's goal in .110 of 200 roll-outs instead of .230.
7. Transitions are (s_0, z_0, s_10), (s_10, z_10, s_20), ... The release's sampler pairs skills with states one env step
   late, (s_0, z_0, s_11), (s_11, z_10, s_21), although z_10 was chosen and begun in s_10.
8. Evaluations take the mode of the policy; the release's take samples.
9. Maze: the policy stays within 3 nats of the prior (release: 10). At 10 the critic runs away, to Q 235 where no return
   exceeds 100 (seed 3), and success falls to 0.
--published takes the release's side of 2, 3, 6 and 9, and of the E environments in 4.
Checked against the release with the same weights, batches and noise, in double precision: the losses and gradients of
pre-training are equal to 1e-12, those of SAC to 5e-8 (of 3,700). The order of an update was read there, not run.

Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, PEOPLE, RELEASE, PUBLISHED, SkillModel, make_networks,
pretrain_loss, prior_rollouts, ReplayBuffer, pretrain_lr, find_pretrained, pretrain, Agent, train, evaluate, check_args.
A run's folder holds what skimo.py names.
Score: maze, share of training episodes that reach the goal in the last 50,000 of 300,000 env steps: .90 / .00 / .58
(prior: .23). Seed 2 loses what it had, .70 at 200,000. With the release's 10 nats, older code: .04 / .00 / .00.
Sub-tasks in the last 25,000 env steps: Kitchen 3.5 / 3.6 / 3.4 and Mis-aligned 3.9 / 3.8 / 3.8 of 200,000 (prior: .84),
CALVIN 4 / 4 / 3 of 300,000 (.155).
Shapes: B batch, H steps per skill, O observation, F inputs, A action, Z skill, E environments.
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

PRETRAINED = "spirl"  # begins the names of pre-trained models; algorithms with the same pre-training share them
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
    eval_episodes: int = 20  # episodes of an evaluation, with the mode of the policy
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
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

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    warmup_skills: int = 5_000  # skills before the updates start
    updates_per_skill: float = 1.0  # gradient updates per skill after the warm-up
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    critic_dim: int = 256  # width of the critics
    critic_blocks: int = 5  # hidden layers of the critics behind the first
    learning_rate: float = 3e-4  # of critics, policy and log alpha
    alpha: float = 1.0  # first weight of the prior KL
    target_kl: float = 5.0  # nats between task policy and prior, by which alpha is tuned
    gamma: float = 0.99  # discount per skill
    tau: float = 0.005  # share of the online weights in a target update
    reward_scale: float = 1.0  # factor on the task's reward


# The release's values where they differ from Args. Our own are both kl_coef (DEVIATION 2) and the maze's target_kl
# (DEVIATION 9); total_timesteps is the paper's.
TASK_DEFAULTS = {
    "maze": dict(
        kl_coef=1e-2, total_timesteps=2_000_000, batch_size=128, buffer_size=100_000, critic_blocks=2, target_kl=3.0
    ),
    "calvin": dict(kl_coef=1e-2, total_timesteps=2_000_000),
}

# With people's demonstrations (--dataset d4rl, and all of --data) skills hold less, the arm is shifted, and objects
# are recombined (DEVIATION 3). Chosen with skimo.py, kl_coef with spirl.py; reskill.py, tdmpc_skills.py and
# dreamer_skills.py were not run with them (FINDINGS.md).
PEOPLE = {"kitchen": dict(kl_coef=1e-3, arm_noise=0.02, recombine=True)}
PEOPLE["kitchen-misaligned"] = PEOPLE["kitchen"]

# --published: what changes to give the release's values, on all tasks and on each.
RELEASE = dict(
    position_features=False, arm_noise=0.0, recombine=False, pretrain_updates=480_000, pretrain_lr_decay=False,
    kl_coef=5e-4, num_envs=1, squash_actions=True,
)  # fmt: skip
PUBLISHED = {
    "maze": dict(RELEASE, pretrain_updates=530_000, kl_coef=1e-3, target_kl=10.0),
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


class Critics(nn.Module):
    """Q_1 and Q_2 of observations (..., O) and skills (..., Z) -> 2 x (...)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        sizes = self.features.size + args.skill_dim, args.critic_dim, args.critic_blocks, 1
        self.qf1 = Predictor(*sizes, batch_norm=False)
        self.qf2 = Predictor(*sizes, batch_norm=False)

    def forward(self, obs, z):
        inputs = torch.cat([self.features(obs), z], -1)
        return self.qf1(inputs).squeeze(-1), self.qf2(inputs).squeeze(-1)


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


def critic_loss(critics, target, task_policy, skill_prior, obs, z, rewards, dones, next_obs, alpha, args):
    """TD loss of both critics, the prior KL in place of SAC's entropy (SPiRL algorithm 1).

    obs, next_obs (B, O), z (B, Z), rewards and dones (B,), alpha (). Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        pi = task_policy(next_obs)  # 2 x (B, Z)
        prior_kl = kl_divergence(pi, skill_prior(next_obs)).clamp(-100, 100)  # (B,)
        next_q = torch.min(*target(next_obs, squash(draw(pi))))  # (B,)
        next_value = next_q - alpha * prior_kl  # (B,)
        td_target = rewards + (1 - dones) * args.gamma * next_value  # (B,)

    # A skill is worth its reward and the value of the state where it ends.
    q1, q2 = critics(obs, z)  # 2 x (B,)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * error.mean()
    metrics = dict(value_loss=loss, q_value=q1.mean(), td_target=td_target.mean())
    return loss, {name: value.detach() for name, value in metrics.items()}


def policy_terms(critics, task_policy, skill_prior, obs):
    """KL(pi || p) in nats and Q of the task policy, whose loss is alpha KL - Q (SPiRL algorithm 1): means, 2 x ().

    obs (B, O). Alpha comes later, because it is tuned by this KL first.
    """
    pi = task_policy(obs)  # 2 x (B, Z)

    # Maximise Q: choose the skills that the critics like best.
    q_value = torch.min(*critics(obs, squash(draw(pi))))  # (B,)

    # Stay close to the prior: the task is solved by skills that the data show.
    with torch.no_grad():
        prior = skill_prior(obs)  # 2 x (B, Z)
    prior_kl = kl_divergence(pi, prior).clamp(-100, 100)  # (B,)
    return prior_kl.mean(), q_value.mean()


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
class ReplayBuffer:
    """The last buffer_size transitions over one skill, in a ring of rows on the device."""

    def __init__(self, obs_dim: int, args: Args):
        size = args.buffer_size
        self.size = size
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(size, obs_dim, device=args.device),
            z=torch.zeros(size, args.skill_dim, device=args.device),
            rewards=torch.zeros(size, device=args.device),
            dones=torch.zeros(size, device=args.device),
            next_obs=torch.zeros(size, obs_dim, device=args.device),
        )
        self.added = 0  # transitions ever added

    def __len__(self):
        return min(self.added, self.size)

    def add(self, obs, z, rewards, ended, next_obs):
        """One skill of every environment: obs, next_obs (E, O) NumPy, z (E, Z), rewards, ended (E,) NumPy.

        A time-out is stored as a true end, as in the release. DEVIATION 7: obs is where the skill was chosen.
        """
        obs = torch.from_numpy(obs)
        next_obs = torch.from_numpy(next_obs)
        rewards = torch.from_numpy(rewards)
        dones = torch.from_numpy(ended).float()
        rows = torch.arange(self.added, self.added + len(obs), device=self.device) % self.size
        for column, values in zip(self.columns.values(), (obs, z, rewards, dones, next_obs)):
            column[rows] = values.to(self.device)
        self.added += len(obs)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), z (B, Z), rewards and dones (B,), next_obs (B, O)."""
        rows = torch.randint(len(self), (batch_size,), device=self.device)
        return tuple(column[rows] for column in self.columns.values())

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added)

    def load_state_dict(self, state: dict):
        self.added = int(state["added"])
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


@torch.no_grad()
def update_target(target, online, tau: float):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


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


# -------------------------------------------------------------------------------------------------------- downstream RL
class Agent(nn.Module):
    """What downstream RL trains, the frozen prior and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.skills = networks["skills"]
        self.skill_prior = networks["prior"]
        self.task_policy = copy.deepcopy(self.skill_prior)
        obs_dim = len(self.skill_prior.features.scale)
        self.critics = Critics(obs_dim, args).to(args.device)
        self.target = copy.deepcopy(self.critics)
        self.eval()  # BatchNorm keeps the statistics of pre-training, as the policy starts from them
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=args.device).log())
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = adam(self.critics.parameters())
        self.policy_optimizer = adam(self.task_policy.parameters())
        self.alpha_optimizer = adam([self.log_alpha])
        self.update = recorded(self.update, args)

    @torch.no_grad()
    def sample_policy(self, obs):
        """Skills of the task policy, in the warm-up still the prior: obs (E, O) NumPy -> z (E, Z) on the CPU."""
        pi = self.task_policy(torch.from_numpy(obs).to(self.args.device))  # 2 x (E, Z)
        return squash(draw(pi)).cpu()

    @torch.no_grad()
    def policy_mode(self, obs):
        """The same without noise, for evaluations (DEVIATION 8)."""
        mean, _ = self.task_policy(torch.from_numpy(obs).to(self.args.device))
        return squash(mean).cpu()

    def update(self, obs, z, rewards, dones, next_obs) -> dict:
        """One step of alpha, critics and task policy on transitions from the replay buffer; returns metrics.

        As in the release, both losses take the new alpha, but policy and critics of before the step.
        """
        args = self.args
        critics = self.critics
        policies = self.task_policy, self.skill_prior
        transitions = obs, z, rewards, dones, next_obs
        critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        prior_kl, q_value = policy_terms(critics, *policies, obs)

        # Alpha rises while the KL exceeds its target
        excess = prior_kl.detach() - args.target_kl
        self.alpha_optimizer.zero_grad()
        (-self.log_alpha.exp() * excess).backward()
        self.alpha_optimizer.step()
        alpha = self.log_alpha.exp().detach()

        policy_loss = alpha * prior_kl - q_value
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_norm = gradient_norm(self.task_policy)
        critics.requires_grad_(True)

        loss, metrics = critic_loss(critics, self.target, *policies, *transitions, alpha, args)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = gradient_norm(critics)
        self.critic_optimizer.step()
        self.policy_optimizer.step()
        metrics |= dict(policy_loss=policy_loss.detach(), policy_q=q_value.detach(), prior_kl=prior_kl.detach())
        return dict(metrics, alpha=alpha, grad_norm=critic_norm + policy_norm)


def train(args: Args, networks: nn.ModuleDict, facts: dict, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Phase 2: online RL over skills, from pre-trained networks or, where there is one, from the run's checkpoint.

    facts about the pre-training go into the results, which are returned.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = ReplayBuffer(obs.shape[1], args)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(critic=agent.critic_optimizer, policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
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
        z = agent.sample_policy(obs)  # (E, Z)
        next_obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, none_ended, args)
        rb.add(obs, z, args.reward_scale * rewards, ended, next_obs)
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

        # ALGO LOGIC: training. One update per skill that followed the warm-up
        updates_due = int((rb.added - args.warmup_skills) * args.updates_per_skill)
        while gradient_step < updates_due:
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            update_target(agent.target, agent.critics, args.tau)
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without exploration noise
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            returns, lengths = rollout(agent.policy_mode, skills, args.eval_episodes, args, 10_000 + args.seed)
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
        rollout(agent.policy_mode, skills, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
        load(path, dict(agent=agent))
    skills = copy.deepcopy(agent.skills).cpu()
    returns, lengths = rollout(agent.policy_mode, skills, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(agent.policy_mode, skills, 1, args, 10_000 + args.seed, video)
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
    may_be_zero = "seed", "eval_interval", "warmup_skills", "clip_updates"
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in may_be_zero:
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("tau", "gamma") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.alpha == 0:
        sys.exit("error: --alpha 0 does not work, its logarithm is tuned; give a small number")
    if args.buffer_size < args.num_envs:
        sys.exit("error: --buffer-size is smaller than --num-envs; raise it")
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
