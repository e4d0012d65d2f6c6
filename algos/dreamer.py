"""Dreamer (Hafner et al. 2020), https://arxiv.org/abs/1912.01603, flat, on states: no skills, no offline data

Idea: a recurrent model learns from experience what happens; the policy learns in episodes that the model imagines, by
gradients through the model. It explores by single noisy actions.

    python algos/dreamer.py --env-id calvin              # RL and evaluation, with the sizes of SkiMo's release
    python algos/dreamer.py --env-id calvin --cpu-preset --total-timesteps 300000 # small: 25 minutes on one core
    python algos/dreamer.py --resume runs/FOLDER         # go on after Ctrl-C or a crash

The model keeps h_t (deterministic) and s_t (random): h_t = GRU(h_{t-1}, s_{t-1}, a_{t-1}), s_t ~ q(s_t | h_t, o_t)
where o_t is seen, s_t ~ p(s_t | h_t) where it is imagined. Repeat:
   act: a ~ pi(s_t, h_t) plus noise, with h_t, s_t updated by each observation
   model: explain observations and rewards; make KL(q || p) small, but not below free_nats (eq. 10)
   imagine: 15 steps from states of the batch (eq. 3); lambda-returns V of their rewards and values (eq. 4-6)
   actor: maximise V through the model (eq. 7); critic: v(s, h) -> V (eq. 8)

Differences from SkiMo's release, whose Dreamer this is, marked DEVIATION n below
1. E environments act side by side (release: 1), with its updates per env step, which are not done in blocks of 100.
2. A window is any batch_length steps of an episode, unfinished ones included. The release cuts its stream at every
   500th step and can never draw the pieces that are too short. So the warm-up need not finish an episode. All windows
   are drawn as often; the release draws a piece, then a start in it, so that those of short pieces come more often.
3. reward_scale is applied; the release only logs it. With its value, 1, this is the same.
4. The encoder sees scaled observations with sines and cosines of positions, as skimo.py's. Raw ones are reconstructed.
5. imagine_starts: imagination may begin in a random share of the states. The default is all, as in the release.
6. --continue-head: a model of the end, from Dreamer's own code; off by default, as there: imagination never ends.
7. The decoder begins at the mean of what was seen (release: at 0).
8. --cpu-preset: h of 128, s of 16, widths of 128, 16 windows of 32 rows, 128 starts, .05 updates per env step, the
   model's learning rate 1e-3 (release: 200, 30, 256 and 400, 50 windows of 50, all 2,500 starts, .2, 6e-4).
v(s, h) counts the reward for arriving in this state, then the later ones. (Later Dreamers leave out the first.)
Written from a description of the release's code; not run beside it.

Not goal-conditioned; not pre-trained; decides at each env step; off-policy.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, CPU_PRESET, POSITION_PERIODS, kl_divergence, rollout, Agent, train,
    evaluate, parse_args, check_args, main
Score with --cpu-preset, sub-tasks per training episode in the last 50,000 of 300,000 env steps: CALVIN .47 / .35 (two
seeds); Kitchen, 200,000 env steps, 0 (two seeds); maze 0 (two seeds). Its control, Gymnasium's pendulum: -131
(algos/README.md).
Shapes: B batch, L rows per window, O observation, A action, s and h the sizes of these states, d = s + h,
E environments, S starts, J steps.
"""

import argparse
import contextlib
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
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    cudagraphs: bool = torch.cuda.is_available()  # replay updates as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 100_000  # env steps between checkpoints, which hold all experience
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # Model
    deter_dim: int = 200  # size of h
    stoch_dim: int = 30  # size of s
    encoder_dim: int = 256  # width of encoder and decoder, and size of an encoded observation
    hidden_dim: int = 400  # width of reward model, critic and actor
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py
    continue_head: bool = False  # learn where episodes end, and imagine it

    # RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 2_500  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.2  # gradient updates per env step after the warm-up
    batch_size: int = 50  # windows per update
    batch_length: int = 50  # L: rows of a window
    imagine_starts: int = 2_500  # S: states of an update's windows from which imagination starts, at most all
    imagine_steps: int = 15  # J: imagined steps
    learning_rate: float = 6e-4  # of the model
    actor_lr: float = 8e-5  # of the actor
    critic_lr: float = 8e-5  # of the critic: there is no slow copy, so it must not be fast
    max_grad_norm: float = 100.0  # bound of the gradient's norm, for each of the three
    free_nats: float = 3.0  # a mean KL below this is not reduced
    continue_coef: float = 10.0  # weight of the continue head's loss
    gamma: float = 0.99  # discount per env step
    td_lambda: float = 0.95  # share of longer returns in the lambda-return
    explore_std: float = 0.3  # std of the noise on actions
    reward_scale: float = 1.0  # factor on the task's reward


# The paper's run lengths; all else is the same for all tasks.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000),
    "kitchen": dict(),
    "kitchen-misaligned": dict(),
    "calvin": dict(total_timesteps=2_000_000),
}

# --cpu-preset: 15,000 updates in 300,000 env steps, of about 0.1 s each on one core; those of the release take seconds.
# They are a quarter of the release's, so the model's learning rate is higher. The actor's must not be: at 1e-3 it ends
# in the corners of the action space, where the tanh has no gradient, and stays there whatever is found.
CPU_PRESET = dict(
    deter_dim=128, stoch_dim=16, encoder_dim=128, hidden_dim=128, batch_size=16, batch_length=32, imagine_starts=128,
    updates_per_step=0.05, learning_rate=1e-3,
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


def sample_gaussian(distribution):
    """One reparameterised sample of N(mean, std); distribution is (mean, std), each (..., D)."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., D) -> (...) in nats."""
    mean_p, std_p = p
    mean_q, std_q = q
    square = std_p**2 + (mean_p - mean_q) ** 2
    kl = (std_q / std_p).log() + square / (2 * std_q**2) - 0.5
    return kl.sum(-1)


class RSSM(nn.Module):
    """Recurrent state-space model: what happens next, and what is seen and rewarded there.

    Its state is s (..., s), random, and h (..., h), which remembers; networks see both as a feature (..., d).
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        deter = args.deter_dim
        stoch = args.stoch_dim
        embed = args.encoder_dim
        width = args.hidden_dim
        self.deter_dim = deter
        self.stoch_dim = stoch
        inputs = Inputs(obs_dim, args)  # DEVIATION 4
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
        width = args.hidden_dim
        d = args.stoch_dim + args.deter_dim
        self.net = mlp(d, width, width, width, width, 2 * action_dim)
        self.raw_std = math.log(math.exp(5) - 1)  # softplus of this is 5

    def forward(self, feature):
        """Feature (..., d) -> mean and std before the tanh, 2 x (..., A)."""
        mean, raw = self.net(feature).chunk(2, -1)
        std = nn.functional.softplus(raw + self.raw_std) + 1e-4
        return 5 * torch.tanh(mean / 5), std


# -------------------------------------------------------------------------------------------------------------- losses
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


def imagined_value_loss(critic, feature, returns, weight):
    """Critic: predict the lambda-returns (Dreamer eq. 8), so that what lies beyond imagination counts as well.

    feature (J-1, S, d), returns and weight (J-1, S).
    """
    error = (critic(feature).squeeze(-1) - returns).square()
    return (weight * (0.5 * error + 0.5 * math.log(2 * math.pi))).mean()


# -------------------------------------------------------------------------------------------------------------- acting
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


class Agent(nn.Module):
    """Model, actor and critic, and one gradient step of each."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        u = args.hidden_dim
        self.model = RSSM(obs_dim, action_dim, args)
        self.actor = ActionModel(action_dim, args)
        self.critic = mlp(args.stoch_dim + args.deter_dim, u, u, u, 1)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr)
        self.update = recorded(self.update, args)

    def update(self, obs, action, rewards, terminals) -> dict:
        """One step of the model on a batch of windows, then of actor and critic in imagination; returns metrics."""
        args = self.args
        loss, metrics, h, s = rssm_loss(self.model, obs, action, rewards, terminals, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = clip_gradients(self.model, args)
        self.model_optimizer.step()

        self.model.requires_grad_(False)  # their weights need no gradient of the actor's loss
        self.critic.requires_grad_(False)
        imagined = behaviour_loss(self.model, self.actor, self.critic, h, s, args)
        loss, actor_metrics, feature, returns, weight = imagined
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


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Online RL from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    longest = envs.max_episode_steps + 1  # rows of an episode that does not end early
    if longest < args.batch_length:
        sys.exit(f"error: episodes have at most {longest} rows, fewer than a window; lower --batch-length")
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    choose_action = Filter(agent, args.num_envs, action_dim, explore=True)
    rb = SequenceBuffer(obs.shape[1], action_dim, args.batch_length, args)  # DEVIATION 2
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
            choose_action.h[:] = state["h"]
            choose_action.s[:] = state["s"]
            choose_action.action[:] = state["action"]
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
            action = choose_action(obs)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(next_obs, action, args.reward_scale * rewards, terminations)  # DEVIATION 3
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            rb.begin(obs, ended)
            choose_action.forget(ended)

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

        # ALGO LOGIC: training, as soon as there are windows; never more than ten times the updates of one step
        updates_due = 0
        if rb.num_starts > 0:
            at_once = math.ceil(10 * new_steps * args.updates_per_step)
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            updates_due = min(updates_due, gradient_step + at_once)
        while gradient_step < updates_due:
            batch = rb.sample(args.batch_size)
            if gradient_step == 0:
                agent.model.start_decoder(batch[0])  # DEVIATION 7
            metrics = agent.update(*batch)
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate with the policy's mode
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            policy_mode = Filter(agent, args.eval_episodes, action_dim, explore=False)
            returns, lengths = rollout(policy_mode, args.eval_episodes, args, 10_000 + args.seed)
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
                h=choose_action.h,
                s=choose_action.s,
                action=choose_action.action,
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
        policy_mode = Filter(agent, 1, action_dim, explore=False)
        rollout(policy_mode, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    """--evaluate: episodes of a trained agent with the policy's mode; needs no training."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    agent = Agent(args, obs_dim, action_dim)
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    policy_mode = Filter(agent, args.eval_episodes, action_dim, explore=False)
    returns, lengths = rollout(policy_mode, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        policy_mode = Filter(agent, 1, action_dim, explore=False)
        rollout(policy_mode, 1, args, 10_000 + args.seed, video)
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
        if name in ("gamma", "td_lambda") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.batch_length < 2 or args.imagine_steps < 2:
        sys.exit("error: --batch-length and --imagine-steps must be at least 2; raise them")
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
