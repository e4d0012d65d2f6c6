"""TD-MPC (Hansen, Wang & Su 2022), https://arxiv.org/abs/2203.04955, flat, on states: no skills, no offline data

Idea: learn a latent dynamics model, rewards and values by looking a few steps ahead; act by planning that far in the
model, with the value of what comes later. It explores by single noisy actions.

    python algos/tdmpc.py --env-id calvin              # RL and evaluation, with the sizes of SkiMo's release
    python algos/tdmpc.py --env-id calvin --cpu-preset --total-timesteps 300000 # small: 45 minutes on one core
    python algos/tdmpc.py --resume runs/FOLDER         # go on after Ctrl-C or a crash

Repeat:
   act: plan by CEM with D, R, Q at each env step; execute the first action, plus noise
   model: h_0 = E(o_0), h_{t+1} = D(h_t, a_t) on windows of N steps. Losses: consistency of h_{t+1} with the slow
      E'(o_{t+1}), R(h_t, a_t) -> r_t, Q(h_t, a_t) -> r_t + gamma min Q'(E(o_{t+1}), pi) (eq. 7-10)
   policy: maximise min Q(h_t, pi(h_t)) on the same h_t (eq. 11); move the slow copy

Differences from SkiMo's release, whose TD-MPC this is, marked DEVIATION n below
1. E environments act side by side (release: 1), and planner and updates see each env step at once (release: in blocks
   of 500). The updates that the warm-up is worth are spread over some steps after it, so that a run can be stopped in
   between.
2. A window is any N steps of an episode, unfinished ones included (release: an episode, then a start in it). So the
   warm-up need not finish an episode.
3. loss_bound is 1e5, as in skimo.py (release: 1e4). Each of a window's three losses is cut at it, and has no gradient
   beyond: at 1e4 a reward of 100 in a window's first step is not learnt while R predicts less than 0.
4. A true end has no future, a time-out has one. The release ignores both (--no-true-ends).
5. The encoder sees scaled observations with sines and cosines of positions, as skimo.py's.
6. reward_scale is applied; the release only logs it. With its value, 1, this is the same.
7. Plans whose value is no number count as bad (TD-MPC's own code: as 0).
8. --cpu-preset: hidden width 128, 128 windows, 128 sampled plans, 32 elites, 3 iterations, .1 updates per env step
   (release: 512, 512, 512, 64, 6, 1).
Written from a description of the release's code; not run beside it.

Not goal-conditioned; not pre-trained; decides at each env step; off-policy.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, CPU_PRESET, POSITION_PERIODS, scalar_head, WorldModel, model_loss,
    policy_loss, plan, Planner, rollout, Agent, train, evaluate, parse_args, check_args, main
Score with --cpu-preset, sub-tasks per training episode in the last 50,000 of 300,000 env steps: CALVIN .26 / .52;
maze 0 / 0; Kitchen, 200,000 env steps, 0 / 0. Its control, Gymnasium's pendulum: -130 (algos/README.md).
Shapes: B batch, N steps per window, O observation, A action, d latent state, E environments, K steps per plan, P plans.
"""

import argparse
import contextlib
import copy
import csv
import functools
import gc
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
    cpu_preset: bool = False  # small sizes for one core; with --help: shows them
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    cudagraphs: bool = torch.cuda.is_available()  # replay updates and plans as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 100_000  # env steps between checkpoints, which hold all experience
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, without exploration noise
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # Model
    encoder_dim: int = 256  # width of the encoder
    latent_dim: int = 50  # d: size of a latent state
    hidden_dim: int = 512  # width of dynamics, reward model, critics and policy
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py

    # RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    num_steps: int = 5  # N: env steps per window and in the longest plan
    warmup_steps: int = 5_000  # env steps with uniform actions, before planning and updates start
    updates_per_step: float = 1.0  # gradient updates per env step, the warm-up's included
    batch_size: int = 512  # windows per update
    learning_rate: float = 1e-3  # of model and policy
    gamma: float = 0.99  # discount per env step
    rho: float = 0.5  # weight rho^t of the t-th step of a window
    tau: float = 0.01  # share of the online weights in a target update
    target_update_interval: int = 2  # updates between target updates
    consistency_coef: float = 2.0  # weight of the latent consistency
    reward_coef: float = 0.5  # weight of the reward loss
    value_coef: float = 0.1  # weight of the TD loss
    loss_bound: float = 1e5  # bound of each loss of a window (release: 1e4)
    true_ends: bool = True  # a true end has no future (release: it has)
    max_grad_norm: float = 10.0  # bound of the gradient's norm
    policy_std: float = 0.05  # std of the policy, before the tanh
    reward_scale: float = 1.0  # factor on the task's reward

    # Planner
    num_samples: int = 512  # sampled plans per iteration
    num_policy_trajs: int = 25  # plans proposed by the policy
    num_elites: int = 64  # best plans, which the next distribution is fitted to
    cem_iters: int = 6  # iterations
    temperature: float = 0.5  # factor on the values in the elites' softmax
    momentum: float = 0.1  # share of the old mean in the new one
    max_std: float = 2.0  # largest std of the sampled actions
    min_std: float = 0.5  # least std, at the start of the schedule
    min_std_end: float = 0.05  # the same after std_steps
    std_steps: int = 25_000  # env steps over which min_std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N steps


# The paper's run lengths; all else is the same for all tasks.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000),
    "kitchen": dict(),
    "kitchen-misaligned": dict(),
    "calvin": dict(total_timesteps=2_000_000),
}

# --cpu-preset: on one core 24 ms per update and 7 ms per env step of planning; the release's sizes take half a second
# for each of the two. There are 30,000 updates in 300,000 env steps, a tenth of the release's.
CPU_PRESET = dict(
    hidden_dim=128, batch_size=128, num_samples=128, num_elites=32, cem_iters=3, updates_per_step=0.1,
)  # fmt: skip

# Periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]


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


class Inputs(nn.Module):
    """Observations (..., O), scaled, with sines and cosines of positions -> inputs (..., F) of networks, F = size."""

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
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)
        scaled = obs * self.scale + self.shift
        return torch.cat([scaled, phase.sin(), phase.cos()], -1)  # (..., F)


def scalar_head(in_dim: int, u: int) -> nn.Sequential:
    """Reward and Q: a normalised first layer, then an MLP of width u whose output starts near 0."""
    first = [nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh()]
    head = nn.Sequential(*first, *mlp(u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


class WorldModel(nn.Module):
    """State encoder E, dynamics D, reward R, critics Q."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        d = args.latent_dim
        inputs = Inputs(obs_dim, args)  # DEVIATION 5
        self.encoder = nn.Sequential(inputs, *mlp(inputs.size, args.encoder_dim, d))
        self.dynamics = mlp(d + action_dim, u, u, d)
        self.reward_model = scalar_head(d + action_dim, u)
        self.qf1 = scalar_head(d + action_dim, u)
        self.qf2 = scalar_head(d + action_dim, u)

    def next(self, h, action):  # D(h, a): the next latent state
        return self.dynamics(torch.cat([h, action], -1))  # (..., d)

    def reward(self, h, action):  # R(h, a)
        ha = torch.cat([h, action], -1)
        return self.reward_model(ha).squeeze(-1)  # (...)

    def q(self, h, action):  # Q_1(h, a), Q_2(h, a)
        ha = torch.cat([h, action], -1)
        return self.qf1(ha).squeeze(-1), self.qf2(ha).squeeze(-1)  # 2 x (...)


def sample_action(policy, h, args):
    """A reparameterised action of the policy, of fixed std before the tanh: h (..., d) -> (..., A)."""
    mean = policy(h)
    return torch.tanh(mean + args.policy_std * torch.randn_like(mean))


# -------------------------------------------------------------------------------------------------------------- losses
def model_loss(model, target, policy, obs, action, rewards, terminals, args):
    """World model and critics on windows from the replay buffer (TD-MPC eq. 7-10).

    obs (B, N+1, O), action (B, N, A), rewards and terminals (B, N). Returns the loss, metrics, and the latents
    (B, N+1, d) rolled out from h_0, detached, for the policy.
    """
    N = action.shape[1]
    # TD target of eq. 9: the reward, then the value of going on with the policy. The slow copy keeps it steady.
    with torch.no_grad():
        next_h = model.encoder(obs[:, 1:])  # (B, N, d)
        next_action = sample_action(policy, next_h, args)
        next_q = torch.min(*target.q(next_h, next_action))  # (B, N)
        goes_on = 1 - terminals if args.true_ends else 1.0  # DEVIATION 4
        td_target = rewards + args.gamma * goes_on * next_q  # (B, N)
        h_target = target.encoder(obs[:, 1:])  # (B, N, d)

    # All is learnt on imagined states, where plans need it; the gradient flows back through the dynamics.
    h = [model.encoder(obs[:, 0])]
    for t in range(N):
        h.append(model.next(h[-1], action[:, t]))
    h = torch.stack(h, 1)  # (B, N+1, d)
    reward = model.reward(h[:, :-1], action)  # (B, N)
    q1, q2 = model.q(h[:, :-1], action)  # (B, N)

    # Eq. 7-10: imagined states agree with encoded ones, rewards and values with what was seen; the near future counts
    # most, because errors of the model grow.
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    error = (h[:, 1:] - h_target).square().mean(-1)  # (B, N)
    consistency = (rho * error).sum(1)  # (B,)
    reward_error = (rho * (reward - rewards).square()).sum(1)  # (B,)
    value_error = (q1 - td_target).square() + (q2 - td_target).square()
    value_error = (rho * value_error).sum(1)  # (B,)

    bound = args.loss_bound  # DEVIATION 3
    loss = args.consistency_coef * consistency.clamp(max=bound)
    loss = loss + args.reward_coef * reward_error.clamp(max=bound)
    loss = loss + args.value_coef * value_error.clamp(max=bound)
    loss = loss.mean() / N
    metrics = dict(
        consistency_loss=consistency,
        reward_loss=reward_error,
        value_loss=value_error,
        td_target=td_target,
        q_value=q1,
        latent_std=h_target.std((0, 1)),  # 0: all states look alike, which happens without rewards
    )
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    return loss, metrics, h.detach()


def policy_loss(model, policy, h, args):
    """Policy: do what the critics like best (TD-MPC eq. 11). It proposes plans, and tells what follows the last step.

    h (B, N+1, d) detached. Returns the loss and metrics.
    """
    rho = args.rho ** torch.arange(h.shape[1], device=h.device)  # (N+1,)
    q_value = torch.min(*model.q(h, sample_action(policy, h, args)))  # (B, N+1)
    loss = -(rho * q_value).sum(1).mean()
    metrics = dict(policy_loss=loss, policy_q=q_value)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------- planner and acting
@torch.no_grad()
def plan(model, policy, obs, mean, min_std, noise_scale, args):
    """CEM over sequences of K actions in the model, for all environments at once (TD-MPC, algorithm 1).

    obs (E, O); mean (E, K, A): zeros or the last plan, moved on by one step; min_std () least std of samples;
    noise_scale () 1 to explore, 0 to evaluate. Returns the first action (E, A) and the fitted mean (E, K, A).
    """
    E, K, A = mean.shape
    h0 = model.encoder(obs)  # (E, d)

    # Plans that the policy proposes: they compete with the samples
    h = h0[:, None].expand(-1, args.num_policy_trajs, -1)  # (E, trajs, d)
    policy_plans = []
    for _ in range(K):
        policy_plans.append(sample_action(policy, h, args))  # (E, trajs, A)
        h = model.next(h, policy_plans[-1])
    policy_plans = torch.stack(policy_plans, 2).nan_to_num(0.0)  # (E, trajs, K, A); NaN: a state overflowed

    std = torch.full_like(mean, args.max_std)
    for _ in range(args.cem_iters):
        # Sample plans
        noise = torch.randn(E, args.num_samples, K, A, device=obs.device)
        plans = mean[:, None] + std[:, None] * noise
        plans = plans.clamp(-1, 1)  # (E, num_samples, K, A)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, A)

        # Return of each plan: K predicted rewards, then the value of going on with the policy
        h = h0[:, None].expand(-1, plans.shape[1], -1)  # (E, P, d)
        value = 0.0
        for t in range(K):
            reward = model.reward(h, plans[:, :, t])  # (E, P)
            value = value + args.gamma**t * reward
            h = model.next(h, plans[:, :, t])
        last_action = sample_action(policy, h, args)
        last_q = torch.min(*model.q(h, last_action))  # (E, P)
        value = value + args.gamma**K * last_q
        value = value.nan_to_num(-1e6)  # DEVIATION 7. NaN: a state overflowed

        # Fit the next distribution to the best plans, weighted by their value
        elite_value, index = value.topk(args.num_elites, 1)  # (E, elites)
        index = index[..., None, None].expand(-1, -1, K, A)
        elites = plans.gather(1, index)  # (E, elites, K, A)
        weight = torch.softmax(args.temperature * elite_value, 1)  # (E, elites)
        w = weight[..., None, None]
        elite_mean = (w * elites).sum(1)  # (E, K, A)
        deviation = elites - elite_mean[:, None]
        variance = (w * deviation.square()).sum(1)  # (E, K, A)
        std = variance.sqrt().maximum(min_std)
        std = std.clamp(max=args.max_std)
        mean = args.momentum * mean + (1 - args.momentum) * elite_mean

    # First action of an elite: weight / Exp(1) is largest at elite i with probability weight_i. So this draws like
    # torch.multinomial, without its wait for the GPU.
    race = weight / torch.empty_like(weight).exponential_()
    picked = race.argmax(1)  # (E,)
    action = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, A)
    action = action + noise_scale * std[:, 0] * torch.randn_like(action)
    return action.clamp(-1, 1), mean


class Planner:
    """Chooses actions for E environments at once; follows the schedules and keeps the last plans."""

    def __init__(self, agent, args: Args, explore: bool):
        self.agent = agent
        self.args = args
        self.explore = explore
        self.graphs = {}  # of the last shape alone
        self.last_mean = torch.zeros(0, 0, 0, device=args.device)  # (E, K, A)

    def __call__(self, obs, global_step: int):
        """Observations (E, O) -> actions (E, A), both NumPy."""
        args = self.args
        agent = self.agent
        growth = min(1.0, global_step / args.horizon_steps)
        K = int(1 + growth * (args.num_steps - 1))  # steps per plan
        progress = min(1.0, global_step / args.std_steps)
        min_std = args.min_std + progress * (args.min_std_end - args.min_std)
        min_std = torch.full((), min_std, device=args.device)  # made there: torch.tensor would wait for the device
        noise_scale = torch.full((), float(self.explore), device=args.device)
        mean = torch.zeros(len(obs), K, agent.action_dim, device=args.device)
        if self.last_mean.shape == mean.shape:
            mean[:, :-1] = self.last_mean[:, 1:]

        inputs = torch.from_numpy(obs).to(args.device), mean, min_std, noise_scale

        def plan_actions(obs, mean, min_std, noise_scale):
            return plan(agent.model, agent.policy, obs, mean, min_std, noise_scale, args)

        shape = mean.shape
        if self.explore and shape not in self.graphs:  # an evaluation is too short to record
            self.graphs = {shape: recorded(plan_actions, args)}
        action, mean = self.graphs.get(shape, plan_actions)(*inputs)
        self.last_mean = mean.clone()  # a CUDA graph overwrites its outputs
        return action.cpu().numpy()

    def forget(self, ended):
        """Plans of episodes that ended, (E,) bool, mean nothing to the next ones."""
        if len(self.last_mean) > 0:
            goes_on = torch.from_numpy(~ended)[:, None, None]
            self.last_mean = self.last_mean * goes_on.to(self.args.device)


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


# -------------------------------------------------------------------------------------------------------------- replay
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


class Agent(nn.Module):
    """World model with its slow copy, policy, and one gradient step of both."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        u = args.hidden_dim
        self.model = WorldModel(obs_dim, action_dim, args)
        self.policy = mlp(args.latent_dim, u, u, action_dim)
        self.target = copy.deepcopy(self.model).requires_grad_(False)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = adam(self.model.parameters())
        self.policy_optimizer = adam(self.policy.parameters())
        self.update = recorded(self.update, args)

    def update(self, obs, action, rewards, terminals) -> dict:
        """One step of model and policy on a batch of windows, obs (B, N+1, O), action (B, N+1, A), rewards and
        terminals (B, N+1), as SequenceBuffer has them; returns metrics.
        """
        args = self.args
        model = self.model
        # What happened between two observations stands beside the later one.
        transitions = action[:, 1:], rewards[:, 1:], terminals[:, 1:]
        loss, metrics, h = model_loss(model, self.target, self.policy, obs, *transitions, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = clip_gradients(model, args)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(model, self.policy, h, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = clip_gradients(self.policy, args)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        return dict(metrics, **policy_metrics, grad_norm=model_norm + policy_norm)


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Online RL from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    longest = envs.max_episode_steps + 1  # rows of an episode that does not end early
    if longest <= args.num_steps:
        sys.exit(f"error: episodes have at most {longest} rows, fewer than a window; lower --num-steps")
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    planner = Planner(agent, args, explore=True)
    rb = SequenceBuffer(obs.shape[1], action_dim, args.num_steps + 1, args)  # DEVIATION 2
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(model=agent.model_optimizer, policy=agent.policy_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            planner.last_mean = state["last_mean"].to(args.device)
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
        # ALGO LOGIC: put action logic here. One action for all environments at once (DEVIATION 1)
        if global_step < args.warmup_steps:
            action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
        else:
            action = planner(obs, global_step)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(next_obs, action, args.reward_scale * rewards, terminations)  # DEVIATION 6
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            rb.begin(obs, ended)
            planner.forget(ended)

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

        # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up, and never
        # more than ten times those of one step (DEVIATION 1)
        updates_due = 0
        if global_step >= args.warmup_steps and rb.num_starts > 0:
            at_once = math.ceil(10 * new_steps * args.updates_per_step)
            updates_due = min(int(global_step * args.updates_per_step), gradient_step + at_once)
        while gradient_step < updates_due:
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % args.target_update_interval == 0:
                update_target(agent.target, agent.model, args.tau)
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without exploration noise
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            choose_action = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
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
                last_mean=planner.last_mean,
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
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        choose_action = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
        rollout(choose_action, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    """--evaluate: episodes of a trained agent without exploration noise; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    path = Path(args.evaluate)
    with reading(path):
        state = load(path, dict(agent=agent))
        global_step = int(state["global_step"])
    choose_action = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
    returns, lengths = rollout(choose_action, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        choose_action = functools.partial(Planner(agent, args, explore=False), global_step=global_step)
        rollout(choose_action, 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, of --cpu-preset, or of the run or agent given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", choices=list(data_tools.TASKS), default="maze")
    first.add_argument("--cpu-preset", "--cpu_preset", action="store_true")
    first.add_argument("--device")
    first.add_argument("--resume")
    first.add_argument("--evaluate")
    given, _ = first.parse_known_args(argv)

    env_id = given.env_id
    defaults = dict(env_id=env_id, **TASK_DEFAULTS.get(env_id, {}))
    if given.cpu_preset:
        defaults |= CPU_PRESET
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
        if name in ("tau", "gamma", "rho", "momentum") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.num_elites > args.num_samples + args.num_policy_trajs:
        sys.exit("error: --num-elites exceeds --num-samples + --num-policy-trajs; lower it")
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
