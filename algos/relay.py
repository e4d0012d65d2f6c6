"""Relay Policy Learning (Gupta, Kumar, Lynch, Levine & Hausman, CoRL 2019), https://arxiv.org/abs/1910.11956

Idea: two levels of goal-conditioned policies. The high level looks at the goal and sets a subgoal, which is a state;
the low level has H = 30 steps to get there. Both first imitate demonstrations in which every state that was reached
later counts as a goal (RIL); then the low level goes on by RL (RRF). Subgoals take the place of SkiMo's skills.

    python algos/relay.py --env-id kitchen          # offline data, RIL (minutes), RRF, evaluation
    python algos/relay.py --env-id kitchen --flat   # the control: one level, which looks at the goal itself
    python algos/relay.py --resume runs/FOLDER      # go on after Ctrl-C or a crash

1. RIL, on all pairs (t, w) of rows of one episode:
   low:  maximise log pi_l(a_t | s_t, goal s_{t+w}), w <= W_l                         (algorithm 2, eq. 1)
   high: maximise log pi_h(s_{t+min(w, W_l)} | s_t, goal s_{t+w}), w <= W_h           (algorithm 3, eq. 1)
2. RRF. Repeat:
   act: subgoal z = mean of pi_h(s, g), kept for H steps of pi_l(s, z)
   update pi_l by PPO on the reward 1 while s is within subgoal_eps of z, plus demo_coef times eq. 1 (eq. 2)
Goal-conditioned; pre-trained on demonstrations; subgoals have a fixed length; fine-tuning is on-policy.

The authors released environment and demonstrations, no learning code. DEVIATIONs from the paper and free choices:
1. PPO in place of the natural gradient. Its demonstrations are 20,000 relabelled pairs, kept in the model's file.
2. Only the low level is fine-tuned, which the paper found to be enough. With --flat the reward is the task's.
3. The high level looks at the objects' entries of a goal only: where the robot ends up nobody knows in advance. The
   user's goal is the present state with the objects of the task where they should be.
4. Widths, step sizes and the like are not published: 256-256 ReLU, std independent of the state, Adam, sines and
   cosines of positions as inputs as in skimo.py (they are what makes it work, see algos/README.md). PPO explores with
   a small, fixed std: with that of RIL, .1, the arm reaches next to nothing.
5. When the task ends while a subgoal is pursued, the value of the last state still counts, as after a time-out: else
   finishing would cost the reward of a subgoal that is nearly reached. With --flat, whose reward is the task's, nothing
   comes after a true end.
What to expect: RIL does most of it, and 200,000 env steps of RRF keep that. An episode of the kitchens has 280 env
steps, and goals of the high level lie up to 260 ahead. The maze's path takes 700 env steps or more, no trajectory has
more than 500; yet RIL alone gets there in .03 to .59 of the episodes (five seeds): what comes out of RIL varies much.

Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, POSITION_PERIODS, make_networks, pretrain_loss,
    ppo_loss, prior_rollouts, RolloutBuffer, find_pretrained, pretrain, Agent, train, evaluate, PRETRAINING, parse_args,
    check_args.
A run's folder holds what skimo.py names.
Score: RIL alone, scripted data, three seeds, sub-tasks of 4: Kitchen 3.2 (--flat: 2.6), Mis-aligned Kitchen 2.1 (2.2),
17 demonstrated sets, in any order, 3.1 (2.7). The paper has 2.4 (2.2) there, on its own choice of 17.
Shapes: B batch, O observation, A action, E environments, H steps per subgoal. A goal or subgoal z is a state (O,).
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
import itertools
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

PRETRAINED = "relay"  # begins the names of pre-trained models


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn
    cudagraphs: bool = torch.cuda.is_available()  # replay updates as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, with the means of both levels
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # folder of offline data and pre-trained models (None: the user's cache)
    dataset: Literal["scripted", "d4rl"] = "scripted"  # made by a script, or people's, fetched from D4RL (kitchens)
    data: str | None = None  # offline data of your own instead: a file or a folder
    pretrained: str | None = None  # start RRF from this model
    pretrain_eval_interval: int = 5_000  # updates between validations with roll-outs
    pretrain_eval_episodes: int = 20  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 30  # H: env steps for which a subgoal is kept
    flat: bool = False  # one level: actions for the user's goal, no subgoals
    hidden_dim: int = 256  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py
    min_scale: float = 0.02  # least standard deviation by which an entry of an observation is divided

    # Pre-training
    low_window: int = 30  # W_l: farthest goal of the low level, and farthest subgoal, in env steps
    high_window: int = 260  # W_h: farthest goal of the high level
    pretrain_updates: int = 5_000  # gradient updates
    pretrain_batch_size: int = 256  # pairs of rows per update and level
    pretrain_lr: float = 1e-3  # first learning rate; it falls to zero
    demo_rows: int = 20_000  # relabelled pairs that fine-tuning goes on to imitate

    # Downstream RL
    total_timesteps: int = 200_000  # env steps of fine-tuning
    num_envs: int = 8  # environments side by side
    rollout_skills: int = 50  # subgoals per environment between two rounds of updates
    epochs: float = 3.0  # updates of a round, as passes through what was collected (rows are drawn at random)
    batch_size: int = 256  # env steps per update
    learning_rate: float = 3e-5  # of the low level
    value_lr: float = 1e-3  # of its value
    gamma: float = 0.99  # discount per env step
    gae_lambda: float = 0.95  # weight of longer returns in the advantage
    clip: float = 0.2  # beyond new / old probability = 1 +- this the gradient stops
    max_std: float = 0.03  # the low level explores with the std of RIL, but no more than this
    subgoal_eps: float = 0.3  # a subgoal is reached within this distance (root mean square, in standard deviations)
    demo_coef: float = 0.1  # lambda: weight of imitation
    demo_decay: float = 0.999  # factor on that weight after each round
    reward_scale: float = 1.0  # factor on the task's reward (only --flat learns from it)


TASK_DEFAULTS = {
    "maze": dict(high_window=460, reward_scale=0.01, subgoal_eps=0.05),  # .3 would pay for standing still
    "calvin": dict(high_window=360, reward_scale=0.01),
}

# What the user wants: entries of an observation, and their values.
GOALS = {
    "maze": {0: 18.0, 1: 8.0},
    "kitchen": {
        22: -0.75, 23: -0.23, 24: 0.75, 25: 1.62, 26: 0.99, 27: 0.0, 28: 0.0, 29: -0.06, 11: -0.88, 12: -0.01,
        17: -0.69, 18: -0.05,
    },  # microwave, kettle, bottom burner, light switch
    "kitchen-misaligned": {22: -0.75, 17: -0.69, 18: -0.05, 19: 0.37, 20: 0.0, 21: 1.45},  # then slide and hinge
    "calvin": {16: 0.2, 18: 0.088, 19: 1.0, 15: 0.25, 20: 1.0},  # drawer, switch and bulb, slider, LED
}  # fmt: skip
# DEVIATION 3: first and last + 1 of the entries of a goal that the high level looks at: the objects'.
GOAL_ENTRIES = {"maze": (0, 2), "kitchen": (9, 30), "kitchen-misaligned": (9, 30), "calvin": (15, 21)}
# First and last + 1 of the entries that jump by 2 pi: the Euler angles of CALVIN's tool.
ANGLE_ENTRIES = {"calvin": (3, 6)}

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


def unwrap(obs, near, env_id: str):
    """obs (..., O) with its angles as the numbers nearest to those of near (..., O), for they jump by 2 pi."""
    first, last = ANGLE_ENTRIES.get(env_id, (0, 0))
    obs = obs.clone()
    turns = (obs - near)[..., first:last] / (2 * np.pi)
    obs[..., first:last] -= 2 * np.pi * turns.round()
    return obs


class GoalNetwork(nn.Module):
    """Observations (..., O) and goals (..., O), of which it sees the entries `seen` -> (..., out_dim)."""

    def __init__(self, obs_dim: int, seen: tuple[int, int], out_dim: int, args: Args):
        super().__init__()
        periods = np.zeros((0, 0))
        if args.position_features:
            periods = POSITION_PERIODS.get(args.env_id, periods)
        self.env_id = args.env_id
        self.seen = slice(*seen)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))
        self.register_buffer("mean", torch.zeros(obs_dim))  # (O,) of the offline data
        self.register_buffer("std", torch.ones(obs_dim))  # (O,)
        u = args.hidden_dim
        in_dim = obs_dim + 2 * periods.size + len(range(*seen))
        self.net = relu_mlp(in_dim, u, u, out_dim)

    def forward(self, obs, goal):
        obs = unwrap(obs, self.mean, self.env_id)
        goal = unwrap(goal, obs, self.env_id)
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)
        state = (obs - self.mean) / self.std
        way = (goal - obs) / self.std  # (..., O)
        return self.net(torch.cat([state, phase.sin(), phase.cos(), way[..., self.seen]], -1))


class GoalPolicy(nn.Module):
    """pi(x | s, g): a Gaussian over x, which is an action (low level) or a subgoal (high level)."""

    def __init__(self, obs_dim: int, seen: tuple[int, int], out_dim: int, args: Args):
        super().__init__()
        self.net = GoalNetwork(obs_dim, seen, out_dim, args)
        self.log_std = nn.Parameter(torch.zeros(out_dim))  # DEVIATION 4: of all states

    def forward(self, obs, goal):
        """Mean (..., X) and std (X,)."""
        return self.net(obs, goal), self.log_std.clamp(-5, 2).exp()

    def act(self, obs, z):
        """The low level as it acts; the environment clips its actions to +-1."""
        return self(obs, z)[0]

    def explore(self, obs, z):
        mean, std = self(obs, z)
        return mean + std * torch.randn_like(mean)


class HighPolicy(GoalPolicy):
    """pi_h(z | s, g): subgoals as states; the network gives the way there in standard deviations."""

    def forward(self, obs, goal):
        way, std = super().forward(obs, goal)
        return obs + way * self.net.std, std * self.net.std


def log_probability(distribution, x):
    """Log-density (...) of x (..., X) under independent Gaussians (mean, std)."""
    normal = torch.distributions.Normal(*distribution, validate_args=False)
    return normal.log_prob(x).sum(-1)


class Demonstrations(nn.Module):
    """Relabelled pairs of the low level, which fine-tuning goes on to imitate: RRF then needs no offline data."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.register_buffer("obs", torch.zeros(args.demo_rows, obs_dim))
        self.register_buffer("goal", torch.zeros(args.demo_rows, obs_dim))
        self.register_buffer("action", torch.zeros(args.demo_rows, action_dim))

    def sample(self, batch_size: int):
        """Uniform pairs: obs (B, O), goal (B, O), action (B, A)."""
        rows = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return self.obs[rows], self.goal[rows], self.action[rows]


def make_networks(args: Args, obs_dim: int, action_dim: int) -> nn.ModuleDict:
    """The networks of pre-training: low level, high level (not with --flat), and what is kept of the demonstrations."""
    everything = 0, obs_dim
    objects = GOAL_ENTRIES[args.env_id]
    seen = objects if args.flat else everything
    networks = nn.ModuleDict(dict(low=GoalPolicy(obs_dim, seen, action_dim, args)))
    if not args.flat:
        networks["high"] = HighPolicy(obs_dim, objects, obs_dim, args)
    networks["demonstrations"] = Demonstrations(obs_dim, action_dim, args)
    return networks.to(args.device)


# -------------------------------------------------------------------------------------------------------------- losses
def relabel(data, batch_size: int, args: Args) -> dict:
    """Relay data relabelling (RPL algorithms 2 and 3): whatever a demonstration reached later was its goal.

    Returns for each level what its policy sees and should say: obs, goal (B, O), action (B, A) or subgoal (B, O).
    All pairs (t, w) of an episode are equally likely. The high level's subgoal is the goal itself where that is near.
    """
    t, w = data.sample_pairs(batch_size, args.high_window if args.flat else args.low_window)  # 2 x (B,)
    batches = dict(low=(data.observations[t], data.observations[t + w], data.actions[t]))
    if not args.flat:
        t, w = data.sample_pairs(batch_size, args.high_window)
        subgoal = data.observations[t + w.clamp(max=args.low_window)]
        subgoal = unwrap(subgoal, data.observations[t], args.env_id)
        batches["high"] = data.observations[t], data.observations[t + w], subgoal
    return batches


def pretrain_loss(policies, batches: dict):
    """RIL (RPL eq. 1): each level imitates its own relabelled data; no gradient goes from one to the other.

    policies and batches by level, batches as `relabel` gives them. Returns the loss and metrics, scalars.
    """
    metrics = {}
    for level, (obs, goal, target) in batches.items():
        # A likelihood, not a squared error: std tells which entries the demonstrations control precisely.
        log_prob = log_probability(policies[level](obs, goal), target)  # (B,)
        metrics[f"{level}_loss"] = -log_prob.mean()
    return sum(metrics.values()), {name: value.detach() for name, value in metrics.items()}


def ppo_loss(low, value, obs, z, action, log_prob, advantages, returns, demo, demo_std, demo_coef, args):
    """RRF of the low level (RPL eq. 2): PPO on the reward of subgoals, and imitation.

    obs, z (B, O), action (B, A), log_prob, advantages, returns (B,), demo as `relabel` gives it, demo_std (A,),
    demo_coef (). Returns the loss and metrics, scalars.
    """
    # Actions that did better than expected become more likely, but not by more than `clip` (PPO eq. 7).
    change = log_probability(low(obs, z), action) - log_prob  # (B,)
    ratio = change.exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 0.01)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    # The value is what to expect.
    predicted = value(obs, z).squeeze(-1)  # (B,)
    value_loss = 0.5 * (predicted - returns).square().mean()

    # Imitation keeps what RL does not visit. Its std is that of RIL: with the small one of exploration it would weigh
    # ten times as much and hold everything where it is.
    demo_obs, demo_goal, demo_action = demo
    mean, _ = low(demo_obs, demo_goal)
    demo_loss = -log_probability((mean, demo_std), demo_action).mean()

    loss = policy_loss + value_loss + demo_coef * demo_loss
    metrics = dict(policy_loss=policy_loss, value_loss=value_loss, demo_loss=demo_loss)
    metrics |= dict(policy_change=change.abs().mean(), returns=returns.mean())
    return loss, {name: number.detach() for name, number in metrics.items()}


@torch.no_grad()
def advantages_and_returns(rewards, values, next_values, bootstrap, goes_on, args):
    """Generalised advantage estimates and what the value should be, 2 x (T, E); time-first.

    rewards, values, next_values (T, E); bootstrap (T, E): whether the next value counts, 0 at a true end; goes_on
    (T, E): whether row t + 1 follows on row t.
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[0])  # (E,)
    errors = rewards + args.gamma * bootstrap * next_values - values  # (T, E)
    for t in reversed(range(len(rewards))):
        following = errors[t] + args.gamma * args.gae_lambda * goes_on[t] * following
        advantages[t] = following
    return advantages, advantages + values


# -------------------------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def choose_subgoal(networks, obs, args: Args):
    """Mean of pi_h(z | s, g) for the user's goal g: obs (E, O) NumPy -> z (E, O) on the CPU. With --flat g itself.

    DEVIATION 3: g is the present state with the task's objects where they should be.
    """
    obs = torch.from_numpy(obs)
    goal = obs.clone()
    for entry, value in GOALS[args.env_id].items():
        goal[:, entry] = value
    if args.flat:
        return goal
    z = networks["high"](obs.to(args.device), goal.to(args.device))[0]
    return z.cpu()


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


@torch.no_grad()
def collect(envs, low, obs, z, args: Args):
    """H env steps of the exploring low level towards subgoals z (E, O), on the CPU next to the simulator.

    Returns next_obs (E, O), ended (E,) and the steps, time-first tensors: obs, next_obs (T, E, O), action (T, E, A),
    rewards, terminations, truncations (T, E) and `running` (T, E): whether the episode had not ended before.
    """
    running = np.ones(len(obs), dtype=bool)
    steps = []
    for _ in range(args.skill_horizon):
        action = low.explore(torch.from_numpy(obs), z).numpy()  # (E, A)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        steps.append((obs, action, next_obs, rewards, terminations, truncations, running))
        obs = next_obs
        running = ~(terminations | truncations)
        if not running.any():
            break
    names = "obs action next_obs rewards terminations truncations running".split()
    trace = {name: torch.from_numpy(np.stack(values)) for name, values in zip(names, zip(*steps))}
    return obs, ~running, trace


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
    """Returns (E,) of episodes with the means of both levels: what RIL alone can do."""
    choose_skill = functools.partial(choose_subgoal, networks, args=args)
    low = copy.deepcopy(networks["low"]).cpu()
    return rollout(choose_skill, low, num_episodes, args, args.seed)[0]


def success(returns, args: Args) -> float:
    """Share of episodes in which everything was done."""
    best = data_tools.TASKS[args.env_id].max_return
    reached = np.asarray(returns) >= best - 1e-5 * abs(best)  # rewards are float32
    return float(reached.mean()) if len(returns) else 0.0


# -------------------------------------------------------------------------------------------------------------- replay
class RolloutBuffer:
    """The env steps since the last round of updates, as rows on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        rows = args.num_envs * args.rollout_skills * args.skill_horizon
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(rows, obs_dim, device=args.device),
            z=torch.zeros(rows, obs_dim, device=args.device),
            action=torch.zeros(rows, action_dim, device=args.device),
            log_prob=torch.zeros(rows, device=args.device),
            advantages=torch.zeros(rows, device=args.device),
            returns=torch.zeros(rows, device=args.device),
        )
        self.skills = 0  # subgoals per environment so far
        self.added = 0  # rows

    def __len__(self):
        return self.added

    def add(self, obs, z, action, log_prob, advantages, returns):
        """Rows of one subgoal: obs, z (n, O), action (n, A), the others (n,)."""
        rows = slice(self.added, self.added + len(obs))
        for column, values in zip(self.columns.values(), (obs, z, action, log_prob, advantages, returns)):
            column[rows] = torch.as_tensor(values).to(self.device)
        self.added += len(obs)
        self.skills += 1

    def clear(self):
        self.skills = 0
        self.added = 0

    def sample(self, batch_size: int):
        """Uniform rows: obs, z (B, O), action (B, A), log_prob, advantages, returns (B,)."""
        rows = torch.randint(len(self), (batch_size,), device=self.device)
        return tuple(column[rows] for column in self.columns.values())

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added, skills=self.skills)

    def load_state_dict(self, state: dict):
        self.added = int(state["added"])
        self.skills = int(state["skills"])
        for name, column in self.columns.items():
            filled = column[: len(self)]
            saved = state[name]
            if saved.shape != filled.shape or not saved.isfinite().all():
                raise ValueError(f"{name} of the roll-outs does not fit")
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
    if args.pretrained:
        return Path(args.pretrained), None
    data = data_tools.load_dataset(args.env_id, args.data_dir, args.dataset, args.data)
    names = [field.name for field in fields(Args)]
    names = names[names.index("skill_horizon") : names.index("demo_rows") + 1]
    code = code_of(make_networks, relabel, pretrain_loss, prepare) | {"pretrain": inspect.getsource(pretrain)}
    code["data"] = inspect.getsource(data_tools.OfflineDataset)
    made_from = [data.fingerprint, args.seed]
    made_from += [ast.dump(ast.parse(source)) for _, source in sorted(code.items())]
    made_from += [GOAL_ENTRIES[args.env_id], ANGLE_ENTRIES.get(args.env_id)]
    made_from += [[name, getattr(args, name)] for name in names]
    made_from += [np.asarray(POSITION_PERIODS.get(args.env_id, ())).tolist()]
    key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:12]
    path = data_tools.cache_dir(args.data_dir) / "pretrained" / f"{family}_{key}.pt"
    return path, None if os.path.exists(path) else data


@torch.no_grad()
def prepare(networks, data, args: Args):
    """Before pre-training: scales of observations, and the pairs that fine-tuning will imitate."""
    observations = unwrap(data.observations, data.observations[0], args.env_id)
    for level in networks.keys() - {"demonstrations"}:
        network = networks[level].net
        network.mean.copy_(observations.mean(0))
        network.std.copy_(observations.std(0).clamp(min=args.min_scale))
    kept = networks["demonstrations"]
    obs, goal, action = relabel(data, args.demo_rows, args)["low"]
    kept.obs.copy_(obs)
    kept.goal.copy_(goal)
    kept.action.copy_(action)


def pretrain(args: Args, networks: nn.ModuleDict, path: Path, data, writer, stop: threading.Event):
    """Phase 1, RIL: both levels imitate the relabelled offline data; writes them to path."""
    train_data, valid_data = data.to(args.device).split(0.99)
    with kept_random_state(args):
        relabel(valid_data, 1, args)  # episodes that are too short for a validation are noticed now
    prepare(networks, train_data, args)
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, fused=True)

    def gradients(*batches):  # obs, goal, target of the low level, then of the high one
        batches = dict(low=batches[:3], high=batches[3:])
        loss, metrics = pretrain_loss(networks, {level: batch for level, batch in batches.items() if batch})
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
        optimizer.param_groups[0]["lr"] = args.pretrain_lr * (1 - updates / args.pretrain_updates)
        batches = relabel(train_data, args.pretrain_batch_size, args)
        metrics = gradients(*itertools.chain(*batches.values()))
        metrics["grad_norm"] = gradient_norm(networks)
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

        # Losses do not tell whether the policies are any good: let them act in the task
        if finished or updates % args.pretrain_eval_interval == 0:
            num_episodes = args.pretrain_eval_episodes * (4 if finished else 1)
            returns = prior_rollouts(networks, args, num_episodes)
            facts = dict(prior_return=float(returns.mean()), prior_success=success(returns, args))
            with kept_random_state(args), torch.no_grad():
                _, metrics = pretrain_loss(networks, relabel(valid_data, args.pretrain_batch_size, args))
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
    save(path, dict(networks=networks), facts=facts)
    unfinished.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------------------- downstream RL
class Agent(nn.Module):
    """Both levels, the low level's value, and one step of PPO."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.networks = networks
        self.low = networks["low"]
        obs_dim = len(self.low.net.mean)
        seen = self.low.net.seen
        self.value = GoalNetwork(obs_dim, (seen.start, seen.stop), 1, args).to(args.device)
        self.value.mean.copy_(self.low.net.mean)
        self.value.std.copy_(self.low.net.std)
        nn.init.zeros_(self.value.net[-1].weight)  # nothing is expected before something was reached
        nn.init.zeros_(self.value.net[-1].bias)
        self.register_buffer("demo_coef", torch.tensor(args.demo_coef, device=args.device))
        self.register_buffer("demo_std", self.low.log_std.detach().exp())
        with torch.no_grad():
            self.low.log_std.clamp_(max=float(np.log(args.max_std)))
        self.low.log_std.requires_grad_(False)
        groups = [dict(params=self.low.net.parameters(), lr=args.learning_rate)]
        groups += [dict(params=self.value.parameters(), lr=args.value_lr)]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=True)
        self.update = recorded(self.update, args)

    def choose_subgoal(self, obs):
        """obs (E, O) NumPy -> subgoals (E, O) on the CPU."""
        return choose_subgoal(self.networks, obs, self.args)

    @torch.no_grad()
    def rows(self, z, trace: dict):
        """The env steps of one subgoal as rows of the buffer, without those after an episode's end.

        z (E, O), trace as `collect` returns it. Returns the rows and the share of environments that got there, ().
        """
        args = self.args
        trace = {name: values.to(args.device) for name, values in trace.items()}
        obs = trace["obs"]  # (T, E, O)
        next_obs = trace["next_obs"]
        z = z.to(args.device).expand_as(obs)  # (T, E, O)
        running = trace["running"]
        ended = trace["terminations"] | trace["truncations"]  # (T, E)
        way = unwrap(z, next_obs, args.env_id) - next_obs
        distance = (way / self.low.net.std).square().mean(-1).sqrt()
        reached = distance < args.subgoal_eps  # (T, E)
        if args.flat:
            rewards = args.reward_scale * trace["rewards"]
            bootstrap = ~trace["terminations"]
        else:
            rewards = reached.float()
            bootstrap = torch.ones_like(ended)  # DEVIATION 5
            if len(obs) == args.skill_horizon:
                bootstrap[-1] = False  # after its last step a subgoal pays nothing
        values = self.value(obs, z).squeeze(-1)  # (T, E)
        next_values = self.value(next_obs, z).squeeze(-1)
        advantages, returns = advantages_and_returns(
            rewards, values, next_values, bootstrap.float(), (~ended).float(), args
        )
        action = trace["action"]
        log_prob = log_probability(self.low(obs, z), action)  # (T, E)
        columns = obs, z, action, log_prob, advantages, returns
        return [column[running] for column in columns], reached.any(0).float().mean()

    def update(self, obs, z, action, log_prob, advantages, returns) -> dict:
        """One gradient step of low level and value on rows of the roll-outs; returns metrics."""
        args = self.args
        demo = self.networks["demonstrations"].sample(len(obs))
        batch = obs, z, action, log_prob, advantages, returns
        loss, metrics = ppo_loss(self.low, self.value, *batch, demo, self.demo_std, self.demo_coef, args)
        self.optimizer.zero_grad()
        loss.backward()
        norm = gradient_norm(self.low.net) + gradient_norm(self.value)
        self.optimizer.step()
        return dict(metrics, demo_coef=self.demo_coef, grad_norm=norm)


def train(args: Args, networks: nn.ModuleDict, facts: dict, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Phase 2, RRF: fine-tuning of pre-trained networks or, where there is one, of the run's checkpoint.

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
            facts = dict(state["facts"])
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
    start_time = time.time() - seconds

    def save_run():
        """All that the future of the run depends on."""
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

    low = copy.deepcopy(agent.low).cpu()  # acts next to the simulator
    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    if stopping and not checkpoint.exists():
        save_run()  # --total-timesteps 0: RIL alone
    while not stopping:
        # ALGO LOGIC: put action logic here. One subgoal for each environment, then H env steps
        z = agent.choose_subgoal(obs)  # (E, O)
        obs, ended, trace = collect(envs, low, obs, z, args)
        rows, reached = agent.rows(z, trace)
        rb.add(*rows)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))

        # TRY NOT TO MODIFY: record the episodes that ended
        running = trace["running"].numpy()  # (T, E)
        new_steps = int(running.sum())
        global_step += new_steps
        running_return += (running * trace["rewards"].numpy()).sum(0)
        running_length += running.sum(0)
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
        if not args.flat:
            writer.add_scalar("charts/subgoals_reached", reached, global_step)
        running_return[ended] = 0
        running_length[ended] = 0
        bar.update(new_steps)

        # ALGO LOGIC: training. On-policy: what was collected is used for one round and thrown away
        if rb.skills == args.rollout_skills:
            for _ in range(max(1, int(args.epochs * len(rb) / args.batch_size))):
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)
            check_finite(metrics)
            agent.demo_coef *= args.demo_decay
            rb.clear()
            low = copy.deepcopy(agent.low).cpu()

        # Evaluate without exploration noise
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            cpu = copy.deepcopy(agent.low).cpu()
            returns, lengths = rollout(agent.choose_subgoal, cpu, args.eval_episodes, args, 10_000 + args.seed)
            evaluations.append((global_step, float(returns.mean()), success(returns, args)))
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), global_step)
            writer.add_scalar("eval/success", success(returns, args), global_step)
            bar.write(f"env step {global_step}: evaluation {returns.mean():.4g}, success {success(returns, args):.0%}")

        stopping = finished or stop.is_set()
        if stopping or passed(args.checkpoint_interval, global_step, new_steps):
            save_run()

    bar.close()
    envs.close()
    episodes_file.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped at env step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        low = copy.deepcopy(agent.low).cpu()
        rollout(agent.choose_subgoal, low, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    low = copy.deepcopy(agent.low).cpu()
    returns, lengths = rollout(agent.choose_subgoal, low, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(agent.choose_subgoal, low, 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"
# With --pretrained, whose model is finished, these would do nothing.
PRETRAINING = """min_scale low_window high_window pretrain_updates pretrain_batch_size pretrain_lr
    pretrain_eval_interval pretrain_eval_episodes"""


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
    may_be_zero = "seed", "eval_interval", "total_timesteps"
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in may_be_zero:
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("gamma", "gae_lambda", "demo_decay") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
        if name == "min_scale" and value == 0:
            sys.exit(f"error: {flag} 0 does not work; give a small number")
        if name == "max_std" and value < 0.007:  # policies have no smaller std
            sys.exit(f"error: {flag} {value} does not work; give at least .007")
    if args.batch_size < 2:
        sys.exit("error: --batch-size 1 does not work, one advantage has no std; give at least 2")
    if args.env_id in data_tools.TASKS and not (args.env_id in GOALS and args.env_id in GOAL_ENTRIES):
        sys.exit(f"error: --env-id {args.env_id} has no goal here; add it to GOALS and GOAL_ENTRIES")
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
