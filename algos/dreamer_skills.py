"""SPiRL + Dreamer: SkiMo's baseline (https://arxiv.org/abs/2207.07560) that imagines skills in a model from scratch

Idea: skills and prior of spirl.py, frozen; Dreamer (https://arxiv.org/abs/1912.01603) chooses skills instead of
actions, its policy held to the prior by a KL. Nobody plans: the policy learns by gradients through imagined skills.

    python algos/dreamer_skills.py --env-id kitchen                   # pre-training as spirl.py (shared), RL, evaluate
    python algos/dreamer_skills.py --env-id kitchen --release-defects # with the defects below
    python algos/dreamer_skills.py --resume runs/FOLDER               # go on after Ctrl-C or a crash

The model keeps h_t (deterministic) and s_t (random) as in dreamer.py, but a step is a whole skill: u_t in (-1, 1),
executed as z = 2 u for H steps of the skill policy; its reward is the sum of theirs. Repeat:
   act: u ~ pi(s_t, h_t) plus noise; model: explain observations and rewards at the ends of skills (Dreamer eq. 10)
   imagine: 5 skills from states of the batch (eq. 3); lambda-returns V of their rewards and values (eq. 4-6)
   actor: maximise V through the model (eq. 7) - alpha KL(2 u || p(z | o)); critic: v(s, h) -> V (eq. 8)

--release-defects: (a) 2 u is stored, but imagination and the filter (theirs on a GPU only) feed the model with u, half
of what it learnt from; (b) maze: the warm-up executes random actions and stores skills of the prior beside them; (c)
the KL is too large by Z ln 2 = 6.9 nats (it leaves out the slope of 2 u) and bounded by 100: where the policy is
farther from a sharp prior, the gradient is zero and it never comes back; (d) actions are tanh of what the skill policy
was trained to give (--squash-actions). With and without it the actor begins with a std of 5 before the tanh, although
there is a prior (--actor-std).

Differences from the release, marked DEVIATION n below
1. KL divergences without sampling: exact, or quadrature for the policy's tanh. The release averages 100 samples.
2. Pre-training is shorter, with a decaying learning rate and, in the maze and on CALVIN, a larger KL weight.
3. Sines and cosines of positions are inputs of skills and prior as well, and the maze is scaled, as in skimo.py. On
   people's data arms are shifted, objects recombined and skills hold less (--arm-noise, --recombine, --kl-coef).
4. The model's encoder gets them, too. Raw observations are reconstructed; the release's maze is scaled, where the
   decoder's least std of 0.1 means 4 cells. Kitchens: 30 observations, not 60; the others are a constant goal.
5. imagine_starts: imagination may begin in a random share of the states. The default is all, as in the release.
6. Actions are those that pi_L was trained for, see (d). --continue-head, as in dreamer.py, adds a model of where
   episodes end, from Dreamer's own code. It is off by default: imagination never ends.
7. E environments act side by side (release: 1), with its updates per env step. Windows are any 15 rows of an episode,
   unfinished ones included, each as often (release: finished ones; an episode, then a start in it, so that those of
   short episodes come more often). Shorter episodes are never drawn, there and here.
8. The maze's warm-up has skills of the prior, as all tasks (release: (b)), and 50,000 env steps (release: 5,000), so
   that it finishes episodes. Skills are not clipped there: the model takes any u.
9. The decoder begins at the mean of what was seen (release: at 0).
10. reward_scale is applied; the release only logs it (100 in its kitchens and on CALVIN, without effect).
--published takes the release's side of 2, 3, the inputs in 4, the actions in 6, the E environments in 7 and the 50,000
env steps in 8.
Written from a description of the release's code; not run beside it.

Not goal-conditioned. Skills are pre-trained, the rest learns in RL. A skill lasts H steps. Off-policy: the model
learns from the replay, actor and critic in imagination.
Expect (paper, training episodes): maze 0; Kitchen .83 and 1.36 sub-tasks at .2 and .4 million env steps, Mis-aligned
.49 and .70; CALVIN .04, then 0. The model has to learn from nothing what SkiMo's knows from the data.

Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, PEOPLE, RELEASE, PUBLISHED, QUADRATURE, SkillModel,
sample_gaussian, make_networks, RSSM, ActionModel, pretrain_loss, prior_rollouts, pretrain_lr, find_pretrained,
pretrain, Agent, train, evaluate, check_args.
A run's folder holds what skimo.py names. Its prior_return is of skills 2 tanh(x); the warm-up draws them as they are.
With --release-defects it is of actions without the tanh, as they were trained.
Score, sub-tasks per training episode in the last 25,000 of 200,000 env steps: Kitchen 2.7 / 2.3 / 2.0
(prior: .84), Mis-aligned 2.2 / 2.3. In the last 50,000 of 300,000: CALVIN 0 / .84 (prior: .155), maze 0 / 0
(prior: .23).
In the maze and in CALVIN's seed 1 values run away. No CPU preset: the maze takes 49 and 78 minutes, on a core and
beside another run, the others 15 to 35.
Shapes: B batch, L rows per window, O observation, F inputs, A action, Z skill, s and h their sizes, d = s + h,
E environments, S starts, J imagined skills. Actions of dreamer.py's parts (..., A) are here skills u (..., Z).
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

    # World model
    deter_dim: int = 100  # size of h
    stoch_dim: int = 15  # size of s
    encoder_dim: int = 256  # width of encoder and decoder, and size of an encoded observation
    model_dim: int = 128  # width of reward model, critic and actor
    continue_head: bool = False  # learn where episodes end, and imagine it

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 5_000  # env steps with the prior's skills before updates; at least an episode per environment
    updates_per_step: float = 0.02  # gradient updates per env step after the warm-up: one for five skills
    batch_size: int = 50  # windows per update
    batch_length: int = 15  # L: rows of a window, one per skill
    imagine_starts: int = 750  # S: states of an update's windows from which imagination starts, at most all
    imagine_steps: int = 5  # J: imagined skills
    learning_rate: float = 6e-4  # of the model
    actor_lr: float = 8e-5  # of the actor
    critic_lr: float = 8e-5  # of the critic: there is no slow copy, so it must not be fast
    max_grad_norm: float = 100.0  # bound of the gradient's norm, for each of the three
    free_nats: float = 3.0  # a mean KL below this is not reduced
    continue_coef: float = 10.0  # weight of the continue head's loss
    alpha: float = 0.01  # weight of the KL to the prior, per nat
    actor_std: float = 5.0  # std of the actor before training, before the tanh
    release_defects: bool = False  # do what the authors' code does in (a) to (d) above
    gamma: float = 0.99  # discount per skill
    td_lambda: float = 0.95  # share of longer returns in the lambda-return
    explore_std: float = 0.3  # std of the noise on skills
    reward_scale: float = 1.0  # factor on the task's reward


# The release's values where they differ from Args. Our own are both kl_coef (DEVIATION 2) and the maze's warm-up
# (DEVIATION 8), since the goal is some 700 env steps away or more. total_timesteps is the paper's.
TASK_DEFAULTS = {
    "maze": dict(
        kl_coef=1e-2, total_timesteps=2_000_000, warmup_steps=50_000, deter_dim=200, stoch_dim=30, model_dim=400
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
    "maze": dict(RELEASE, pretrain_updates=530_000, kl_coef=1e-3, warmup_steps=5_000),
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


# ------------------------------------------------------------------------------------------------------------- networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(in_dim, out_dim)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ELU()]
    return nn.Sequential(*layers[:-1])


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


# E f(x) for x ~ N(0, 1) is nearly the sum of weight * f(node). The policy's std begins at 5: its tanh is nearly a step,
# which nodes of Gauss and Hermite miss: with 33 of theirs the KL is 7 % off. 33 at equal distances are right to .2 %,
# but the gradient for the mean is 6 % off. With 65 both are right to .1 %; at a std of 10 it is 6 to 20 % off.
NODES = np.linspace(-4, 4, 65)
QUADRATURE = [(float(x), float(w)) for x, w in zip(NODES, np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum())]


def squashed_kl(p, q):
    """KL(law of squash(x) with x ~ p || q) of Gaussians p, q = (mean, std), each (..., Z) -> (...) in nats."""
    mean_p, std_p = p
    mean_q, std_q = q
    kl = -std_p.log() - 0.5 * math.log(2 * math.pi * math.e)  # E log p(x), the negative entropy
    for node, weight in QUADRATURE:  # DEVIATION 1
        x = mean_p + node * std_p
        log_slope = math.log(8) - 2 * x - 2 * nn.functional.softplus(-2 * x)  # of squash: log(2 - 2 tanh(x)^2)
        square = ((squash(x) - mean_q) / std_q).square()
        log_q = -0.5 * square - std_q.log() - 0.5 * math.log(2 * math.pi)
        kl = kl - weight * (log_slope + log_q)
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


def make_networks(args: Args, obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """The networks of pre-training: skills, and the prior p(z | s)."""
    skills = SkillModel(obs_dim, action_dim, args)
    prior = SkillPrior(obs_dim, args)
    networks = nn.ModuleDict(dict(skills=skills, prior=prior))
    return networks.to(args.device)


sample_gaussian = draw  # its name in dreamer.py, whose parts follow


class RSSM(nn.Module):
    """Recurrent state-space model: what happens next, and what is seen and rewarded there.

    Its state is s (..., s), random, and h (..., h), which remembers; networks see both as a feature (..., d).
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        deter = args.deter_dim
        stoch = args.stoch_dim
        embed = args.encoder_dim
        width = args.model_dim
        self.deter_dim = deter
        self.stoch_dim = stoch
        inputs = Features(obs_dim, args, always_scaled=True)  # DEVIATION 4
        self.encoder = nn.Sequential(inputs, *mlp(inputs.size, embed, embed, embed))
        self.cell_input = mlp(stoch + action_dim, deter)
        self.gates_x = nn.Linear(deter, 3 * deter)
        self.gates_h = nn.Linear(deter, 3 * deter)
        self.prior_net = mlp(deter, deter, 2 * stoch)
        self.posterior_net = mlp(deter + embed, deter, 2 * stoch)
        self.decoder = mlp(stoch + deter, embed, embed, 2 * obs_dim)
        self.reward_model = mlp(stoch + deter, width, width, 1)
        self.continue_model = mlp(stoch + deter, width, width, width, 1) if args.continue_head else None

    def step(self, h, s, action):
        """The next h, by a GRU cell: h (..., h), s (..., s), action (..., A) -> (..., h)."""
        x = nn.functional.elu(self.cell_input(torch.cat([s, action], -1)))
        x_reset, x_update, x_new = self.gates_x(x).chunk(3, -1)
        h_reset, h_update, h_new = self.gates_h(h).chunk(3, -1)
        reset = torch.sigmoid(x_reset + h_reset)
        update = torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + reset * h_new)
        return (1 - update) * new + update * h

    def prior(self, h):
        """p(s | h), mean and std, 2 x (..., s): what is expected before the observation is seen."""
        mean, raw = self.prior_net(h).chunk(2, -1)
        return mean, nn.functional.softplus(raw) + 0.1

    def posterior(self, h, embedding):
        """q(s | h, o), mean and std, 2 x (..., s): after the observation, encoded (..., e), is seen."""
        x = torch.cat([h, embedding], -1)
        mean, raw = self.posterior_net(x).chunk(2, -1)
        return mean, nn.functional.softplus(raw) + 0.1

    def observe(self, obs, action):
        """States of windows: obs (B, L, O), action (B, L, A), the one before each observation.

        Returns h (B, L, h), s (B, L, s) and the posterior that s is drawn from, 2 x (B, L, s).
        """
        embedding = self.encoder(obs)  # (B, L, e)
        h = obs.new_zeros(len(obs), self.deter_dim)
        s = obs.new_zeros(len(obs), self.stoch_dim)
        steps = []
        for t in range(obs.shape[1]):
            h = self.step(h, s, action[:, t])
            mean, std = self.posterior(h, embedding[:, t])
            s = sample_gaussian((mean, std))
            steps.append((h, s, mean, std))
        h, s, mean, std = [torch.stack(values, 1) for values in zip(*steps)]
        return h, s, (mean, std)

    @torch.no_grad()
    def start_decoder(self, obs):
        """Before learning: whatever the state, expect the mean of what was seen, obs (B, L, O).

        From 0 a decoder needs hundreds of updates until it predicts positions of 10 or 24 cells. Meanwhile states hold
        nothing else, and what is imagined does not depend on actions.
        """
        self.decoder[-1].bias[: obs.shape[-1]] = obs.mean((0, 1))

    def decode(self, feature):
        """Mean and std, in [0.1, 1.5], of the raw observation: (..., d) -> 2 x (..., O)."""
        mean, raw_std = self.decoder(feature).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)

    def reward(self, feature):
        """The reward for coming here: (..., d) -> (...)."""
        return self.reward_model(feature).squeeze(-1)


class ActionModel(nn.Module):
    """Policy pi(a | s, h): the tanh of a Gaussian, at first so wide that most actions are extreme."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        width = args.model_dim
        d = args.stoch_dim + args.deter_dim
        self.net = mlp(d, width, width, width, width, 2 * action_dim)
        self.raw_std = math.log(math.exp(args.actor_std) - 1)  # softplus of this is actor_std

    def forward(self, feature):
        """Feature (..., d) -> mean and std before the tanh, 2 x (..., A)."""
        mean, raw = self.net(feature).chunk(2, -1)
        std = nn.functional.softplus(raw + self.raw_std) + 1e-4
        return 5 * torch.tanh(mean / 5), std


# --------------------------------------------------------------------------------------------------------------- losses
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


def rssm_loss(model, obs, action, rewards, terminals, args):
    """The model explains what was seen (Dreamer eq. 10), on windows of the replay buffer.

    obs (B, L, O); action (B, L, A), rewards and terminals (B, L) are those that led to the observation beside them.
    Returns the loss, metrics, and the states h (B, L, h) and s (B, L, s), detached.
    """
    h, s, posterior = model.observe(obs, action)
    feature = torch.cat([s, h], -1)  # (B, L, d)

    # KL: what the observation adds must be little, so that the model can go on without it. Both sides move. A mean
    # below free_nats is not reduced: else the model would put nothing into s.
    kl = kl_divergence(posterior, model.prior(h)).mean()
    kl_loss = kl.clamp(min=args.free_nats)

    # Observation: states must hold what is seen.
    mean, std = model.decode(feature)
    likelihood = torch.distributions.Normal(mean, std, validate_args=False)
    recon_loss = -likelihood.log_prob(obs).sum(-1).mean()  # DEVIATION 4

    # Reward: what imagination is for. A Gaussian of std 1.
    reward_error = (model.reward(feature) - rewards).square()
    reward_loss = (0.5 * reward_error + 0.5 * math.log(2 * math.pi)).mean()

    loss = kl_loss + recon_loss + reward_loss
    metrics = dict(kl=kl, recon_loss=recon_loss, reward_loss=reward_loss)
    if args.continue_head:  # DEVIATION 6. A time-out is no end
        logits = model.continue_model(feature).squeeze(-1)  # (B, L)
        goes_on = args.gamma * (1 - terminals)
        continue_loss = nn.functional.binary_cross_entropy_with_logits(logits, goes_on)
        loss = loss + args.continue_coef * continue_loss
        metrics |= dict(continue_loss=continue_loss)
    metrics["model_loss"] = loss
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss, metrics, h.detach(), s.detach()


def lambda_return(rewards, values, discount, share: float):
    """V_k = r_k + discount_k ((1 - share) v_{k+1} + share V_{k+1}), with V_{n+1} = v_{n+1} (Dreamer eq. 6).

    rewards and discount (n, ...), values (n+1, ...); time-first. Returns (n, ...). share is the paper's lambda.
    """
    result = values[-1]
    results = []
    for k in reversed(range(len(rewards))):
        result = (1 - share) * values[k + 1] + share * result
        result = rewards[k] + discount[k] * result
        results.append(result)
    return torch.stack(results[::-1])


def imagine(model, actor, h, s, steps: int):
    """What the model expects when the actor acts from h (S, h) and s (S, s).

    Returns features (J, S, d) and actions (J, S, A), time-first. The start is not among them. Gradients reach the
    actor through all states, but not through what it looks at.
    """
    features = []
    actions = []
    for _ in range(steps):
        feature = torch.cat([s, h], -1).detach()
        action = torch.tanh(sample_gaussian(actor(feature)))
        h = model.step(h, s, action)
        s = sample_gaussian(model.prior(h))
        features.append(torch.cat([s, h], -1))
        actions.append(action)
    return torch.stack(features), torch.stack(actions)


def behaviour_loss(model, actor, critic, h, s, args):
    """Actor: choose what leads to the highest return in imagination (Dreamer eq. 3-7). model and critic are frozen.

    h (B, L, h), s (B, L, s). Returns the loss, metrics, and for the critic: features (J-1, S, d), their lambda-returns
    and weights (J-1, S), detached.
    """
    if args.continue_head:  # the last state of a window may be an end, from which nothing starts
        h = h[:, :-1]
        s = s[:, :-1]
    h = h.flatten(0, 1)
    s = s.flatten(0, 1)
    if args.imagine_starts < len(h):  # DEVIATION 5
        order = torch.rand(len(h), device=h.device)
        chosen = order.topk(args.imagine_starts).indices  # (S,)
        h = h[chosen]
        s = s[chosen]
    feature, actions = imagine(model, actor, h, s, args.imagine_steps)  # (J, S, d), (J, S, A)
    rewards = model.reward(feature)  # (J, S)
    values = critic(feature).squeeze(-1)  # (J, S)
    discount = torch.full_like(rewards, args.gamma)
    if args.continue_head:
        discount = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
    returns = lambda_return(rewards[:-1], values, discount[:-1], args.td_lambda)  # (J-1, S)
    # State k comes k - 1 steps after the first imagined one: its return weighs gamma^(k - 1).
    weight = torch.cat([torch.ones_like(discount[:1]), discount[:-2]])
    weight = weight.cumprod(0).detach()  # (J-1, S)
    loss = -(weight * returns).mean()
    metrics = dict(
        actor_loss=loss,
        imagined_return=returns.mean(),
        imagined_reward=rewards.mean(),
        value=values.mean(),
        extreme_actions=(actions.abs() > 0.999).float().mean(),
    )
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss, metrics, feature[:-1].detach(), returns.detach(), weight


def actor_loss(model, actor, critic, skill_prior, h, s, obs, args):
    """Actor: high returns in imagination, by skills that the data show. model, critic and skill_prior are frozen.

    h (B, L, h), s (B, L, s), obs (B, L, O). Returns what behaviour_loss returns, with the KL in loss and metrics.
    """
    loss, metrics, *imagined = behaviour_loss(model, actor, critic, h, s, args)

    # Stay close to the prior in the states of the batch, for imagination cannot tell what p says: it has no raw o.
    pi = actor(torch.cat([s, h], -1))  # 2 x (B, L, Z)
    prior_kl = squashed_kl(pi, skill_prior(obs))  # (B, L), of the executed 2 u
    if args.release_defects:  # (c)
        constant = args.skill_dim * math.log(2)
        prior_kl = (prior_kl + constant).clamp(-100, 100)
    prior_kl = prior_kl.mean()

    loss = loss + args.alpha * prior_kl
    metrics |= dict(actor_loss=loss.detach(), prior_kl=prior_kl.detach())
    return loss, metrics, *imagined


def imagined_value_loss(critic, feature, returns, weight):
    """Critic: predict the lambda-returns (Dreamer eq. 8), so that what lies beyond imagination counts as well.

    feature (J-1, S, d), returns and weight (J-1, S).
    """
    error = (critic(feature).squeeze(-1) - returns).square()
    return (weight * (0.5 * error + 0.5 * math.log(2 * math.pi))).mean()


# --------------------------------------------------------------------------------------------------------------- acting
class Filter:
    """Acts in E environments at once. Keeps the states h, s of their episodes, which begin with zeros."""

    def __init__(self, agent, num_envs: int, action_dim: int, explore: bool):
        args = agent.args
        self.agent = agent
        self.explore = explore
        self.h = torch.zeros(num_envs, args.deter_dim, device=args.device)  # (E, h)
        self.s = torch.zeros(num_envs, args.stoch_dim, device=args.device)  # (E, s)
        self.action = torch.zeros(num_envs, action_dim, device=args.device)  # (E, A), the last one

    @torch.no_grad()
    def __call__(self, obs):
        """A noisy sample of the policy or its mode: obs (E, O) -> actions (E, A), both NumPy."""
        args = self.agent.args
        model = self.agent.model
        embedding = model.encoder(torch.from_numpy(obs).to(args.device))
        self.h = model.step(self.h, self.s, self.action)
        self.s = sample_gaussian(model.posterior(self.h, embedding))
        mean, std = self.agent.actor(torch.cat([self.s, self.h], -1))
        self.action = torch.tanh(mean)
        if self.explore:
            action = torch.tanh(sample_gaussian((mean, std)))
            noise = args.explore_std * torch.randn_like(action)
            self.action = (action + noise).clamp(-1, 1)  # the model must see what is executed
        return self.action.cpu().numpy()

    def forget(self, ended):
        """The states of episodes that ended, (E,) bool, mean nothing to the next ones."""
        goes_on = torch.from_numpy(~ended)[:, None].to(self.h.device)
        self.h = self.h * goes_on
        self.s = self.s * goes_on
        self.action = self.action * goes_on


class UniformActions:
    """Random actions in place of the skill policy, whatever the skill: defect (b) of the release."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def act(self, obs, z):
        return 2 * torch.rand(len(obs), self.action_dim) - 1


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


# --------------------------------------------------------------------------------------------------------------- replay
class SequenceBuffer:
    """All rows that were ever added, on the device, from which windows of L rows are drawn.

    A row is an observation and what led to it: action, reward, and whether the episode really ended here (a time-out is
    no end); zeros for the first observation of an episode. The i-th row of environment e is row i * E + e. Each window
    inside one episode, finished or not, is drawn with the same probability. Nothing is ever dropped.
    """

    def __init__(self, obs_dim: int, action_dim: int, window: int, args: Args):
        E = args.num_envs
        self.sizes = [obs_dim, action_dim, 1, 1]
        self.window = window
        self.rows = torch.zeros(1_000 * E, sum(self.sizes), device=args.device)  # doubled when full
        self.starts = torch.zeros(1_000 * E, dtype=torch.long, device=args.device)  # first rows of all windows
        self.num_starts = 0
        self.filled = np.zeros(E, dtype=np.int64)  # rows of each environment
        self.age = np.zeros(E, dtype=np.int64)  # rows of its episode so far

    def begin(self, obs, members):
        """First rows of the episodes that begin in members (E,) bool: obs (E, O) NumPy."""
        zeros = np.zeros(len(obs))
        nothing = np.zeros((len(obs), self.sizes[1]))
        self.age[members] = 0
        self.add_rows(obs, nothing, zeros, zeros, members)

    def add(self, next_obs, action, rewards, terminations):
        """One step of every environment, NumPy: next_obs (E, O), action (E, A), rewards, terminations (E,)."""
        everyone = np.ones(len(next_obs), dtype=bool)
        self.add_rows(next_obs, action, rewards, terminations, everyone)

    def add_rows(self, obs, action, rewards, terminals, members):
        E = len(members)
        device = self.rows.device
        if self.filled.max() * E == len(self.rows):
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
            self.starts = torch.cat([self.starts, torch.zeros_like(self.starts)])
        rows = [obs, action, rewards[:, None], terminals[:, None]]
        rows = np.concatenate(rows, 1)[members].astype(np.float32)  # (n, O + A + 2)
        index = (self.filled * E + np.arange(E))[members]  # (n,)
        self.rows[torch.from_numpy(index).to(device)] = torch.from_numpy(rows).to(device)
        self.filled[members] += 1
        self.age[members] += 1

        # Each row ends one more window, as soon as its episode has L rows
        complete = self.age[members] >= self.window
        starts = (index - (self.window - 1) * E)[complete]
        last = self.num_starts + len(starts)
        self.starts[self.num_starts : last] = torch.from_numpy(starts).to(device)
        self.num_starts = last

    def sample(self, batch_size: int):
        """Uniform windows: obs (B, L, O), action (B, L, A), rewards and terminals (B, L)."""
        device = self.rows.device
        index = torch.randint(self.num_starts, (batch_size,), device=device)
        steps = len(self.filled) * torch.arange(self.window, device=device)
        rows = self.rows[self.starts[index, None] + steps]  # (B, L, O + A + 2)
        obs, action, rewards, terminals = rows.split(self.sizes, -1)
        return obs, action, rewards.squeeze(-1), terminals.squeeze(-1)

    def state_dict(self) -> dict:
        used = self.filled.max() * len(self.filled)
        return dict(
            rows=self.rows[:used].clone(),
            starts=self.starts[: self.num_starts].clone(),
            filled=torch.from_numpy(self.filled.copy()),
            age=torch.from_numpy(self.age.copy()),
        )

    def load_state_dict(self, state: dict):
        if state["rows"].shape[1] != sum(self.sizes) or not state["rows"].isfinite().all():
            raise ValueError("the replay buffer has rows of another size or is not finite")
        self.filled[:] = state["filled"].numpy()
        self.age[:] = state["age"].numpy()
        self.rows = state["rows"].to(self.rows.device)
        self.num_starts = len(state["starts"])
        self.starts = torch.zeros_like(self.rows[:, 0], dtype=torch.long)
        self.starts[: self.num_starts] = state["starts"]


# ---------------------------------------------------------------------------------------------------- logs, checkpoints
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
    """Model, actor and critic of RL, the frozen prior and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        width = args.model_dim
        self.skills = networks["skills"]
        self.skills.squash_actions |= args.release_defects  # (d)
        self.skill_prior = networks["prior"]
        obs_dim = len(self.skill_prior.features.scale)
        self.model = RSSM(obs_dim, args.skill_dim, args)
        self.actor = ActionModel(args.skill_dim, args)
        self.critic = mlp(args.stoch_dim + args.deter_dim, width, width, width, 1)
        self.to(args.device)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        for frozen in (self.skills, self.skill_prior):
            frozen.requires_grad_(False)
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr)
        self.update = recorded(self.update, args)

    @torch.no_grad()
    def sample_prior(self, obs):
        """Skills of the prior for the warm-up: obs (E, O) NumPy -> z (E, Z) on the CPU."""
        obs = torch.from_numpy(obs).to(self.args.device)
        return draw(self.skill_prior(obs)).cpu()

    def update(self, obs, u, rewards, terminals) -> dict:
        """One step of the model on a batch of windows, then of actor and critic in imagination; returns metrics."""
        args = self.args
        loss, metrics, h, s = rssm_loss(self.model, obs, u, rewards, terminals, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = clip_gradients(self.model, args)
        self.model_optimizer.step()

        self.model.requires_grad_(False)  # their weights need no gradient of the actor's loss
        self.critic.requires_grad_(False)
        nets = self.model, self.actor, self.critic, self.skill_prior
        loss, actor_metrics, feature, returns, weight = actor_loss(*nets, h, s, obs, args)
        self.actor_optimizer.zero_grad()
        loss.backward()
        actor_norm = clip_gradients(self.actor, args)
        self.actor_optimizer.step()
        self.model.requires_grad_(True)
        self.critic.requires_grad_(True)

        loss = imagined_value_loss(self.critic, feature, returns, weight)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = clip_gradients(self.critic, args)
        self.critic_optimizer.step()
        grad_norm = model_norm + actor_norm + critic_norm
        return dict(metrics, **actor_metrics, critic_loss=loss.detach(), grad_norm=grad_norm)


class SkillMode:
    """The policy's mode as skills z = 2 u for evaluations: obs (E, O) -> z (E, Z) on the CPU."""

    def __init__(self, agent, num_envs: int):
        self.filter = Filter(agent, num_envs, agent.args.skill_dim, explore=False)

    def __call__(self, obs):
        return 2 * torch.from_numpy(self.filter(obs))


def train(args: Args, networks: nn.ModuleDict, facts: dict, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Phase 2: online RL over skills, from pre-trained networks or, where there is one, from the run's checkpoint.

    facts about the pre-training go into the results, which are returned.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    # Episodes that succeed end first, and an agent that learns from those alone fails. So the warm-up lasts until every
    # environment has finished an episode, or longer.
    args.warmup_steps = max(args.warmup_steps, args.num_envs * envs.max_episode_steps)
    choose_skill = Filter(agent, args.num_envs, args.skill_dim, explore=True)
    rb = SequenceBuffer(obs.shape[1], args.skill_dim, args.batch_length, args)  # DEVIATION 7
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(model=agent.model_optimizer, actor=agent.actor_optimizer, critic=agent.critic_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            choose_skill.h[:] = state["h"]
            choose_skill.s[:] = state["s"]
            choose_skill.action[:] = state["action"]
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
    warmup_actor = skills
    if args.release_defects and args.env_id == "maze":
        warmup_actor = UniformActions(envs.single_action_space.shape[0])  # (b); DEVIATION 8
    none_ended = np.zeros(args.num_envs, dtype=bool)
    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    while not stopping:
        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 7)
        if global_step < args.warmup_steps:
            actor = warmup_actor
            z = agent.sample_prior(obs)  # (E, Z)
        else:
            actor = skills
            z = 2 * torch.from_numpy(choose_skill(obs))
        next_obs, rewards, ended, steps = execute_skill(envs, actor, obs, z, none_ended, args)
        stored = z.numpy() if args.release_defects else z.numpy() / 2  # defect (a): z, everywhere else u
        rb.add(next_obs, stored, args.reward_scale * rewards, envs.terminations)  # DEVIATION 10
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            rb.begin(obs, ended)
            choose_skill.forget(ended)

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

        # ALGO LOGIC: training, as soon as there are windows; never more than ten times the updates of one step
        updates_due = 0
        if rb.num_starts > 0:
            at_once = math.ceil(10 * new_steps * args.updates_per_step)
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            updates_due = min(updates_due, gradient_step + at_once)
        while gradient_step < updates_due:
            batch = rb.sample(args.batch_size)
            if gradient_step == 0:
                agent.model.start_decoder(batch[0])  # DEVIATION 9
            metrics = agent.update(*batch)
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate with the policy's mode
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            policy_mode = SkillMode(agent, args.eval_episodes)
            returns, lengths = rollout(policy_mode, skills, args.eval_episodes, args, 10_000 + args.seed)
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
                h=choose_skill.h,
                s=choose_skill.s,
                action=choose_skill.action,
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
        rollout(SkillMode(agent, 1), skills, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    """--evaluate: episodes of a trained agent with the policy's mode; needs neither data nor training."""
    networks = make_networks(args, *data_tools.env_sizes(args.env_id))
    agent = Agent(args, networks)
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    skills = copy.deepcopy(agent.skills).cpu()
    policy_mode = SkillMode(agent, args.eval_episodes)
    returns, lengths = rollout(policy_mode, skills, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(SkillMode(agent, 1), skills, 1, args, 10_000 + args.seed, video)
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
    may_be_zero = "seed", "eval_interval", "warmup_steps", "clip_updates"
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in may_be_zero:
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("gamma", "td_lambda") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if not 0.01 <= args.actor_std <= 10:  # beyond, the gradient of the KL is off by a third
        sys.exit(f"error: --actor-std {args.actor_std} does not work; give .01 to 10")
    if args.batch_length < 2 or args.imagine_steps < 2:
        sys.exit("error: --batch-length and --imagine-steps must be at least 2; raise them")
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
    if args.evaluate:
        return
    envs = data_tools.make_envs(args.env_id, 1)
    longest = -(-envs.max_episode_steps // args.skill_horizon) + 1  # rows of an episode that does not end early
    if longest < args.batch_length:
        sys.exit(f"error: episodes have at most {longest} rows, fewer than a window; lower --batch-length")
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
