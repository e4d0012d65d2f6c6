"""Option-Critic (Bacon et al. 2017), https://arxiv.org/abs/1609.05140: options that are learnt from the reward alone

Idea: an option w is a policy pi_w(a | s) with an end of its own, beta_w(s) in [0, 1]; all options are available
everywhere. Policies and ends follow the gradient of the return; a critic over states and options tells how good they
are, a policy over options prefers the best one.

    python algos/option_critic.py --env-id maze           # RL and evaluation
    python algos/option_critic.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
    python algos/option_critic.py --four-rooms            # the paper's example, in tables: minutes

Repeat, with V(s) the value of choosing an option anew:
   act: a ~ pi_w(s); then w ends with probability beta_w(s'), and another one is chosen
   U(w, s') = (1 - beta_w(s')) Q(s', w) + beta_w(s') V(s') (eq. 3): the value of arriving with an option
   critic: Q(s, w) -> r + gamma U(w, s') (eq. 1, 2)
   policies: up the gradient of log pi_w(a | s) times what a is better than Q(s, w) (theorem 1)
   ends: down the gradient of beta_w(s') times what w is better than V(s') (theorem 2)

Not goal-conditioned; not pre-trained; an option ends itself; on-policy.
Expect about 0 on our tasks: rewards are too rare to follow, and options do not explore by themselves. In tables options
are short by construction: beta begins at .5, and as V is the maximum no option is better than it, so beta only rises.
Four rooms, 20 runs: 10.9 steps (fewest possible: 8.4); 900 episodes after the goal moved 44 steps, one option 573.

On the tasks the options are those of A2OC (Harb et al. 2018, https://arxiv.org/abs/1709.04571): E environments times T
env steps per update, returns over them, and a deliberation cost, which is paid when an option ends by itself and keeps
options alive. Free choices: Gaussians for actions, Adam (A2OC: RMSProp), networks; beta = 0.12 and Q near 0 at first.
In tables: Algorithm 1 of the paper, with the noise of the release: a move is followed by a slip (--paper-slip: a slip
in place of the move); softmax of both levels at 0.01 (paper: 0.001), whose gradient leaves out 1 / 0.01, as there.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, POSITION_PERIODS, rollout, RolloutBuffer, Agent, train, evaluate,
    parse_args, check_args, main
Shapes: B = (E, T) env steps, O observation, A action, W options, E environments, T env steps per update; in tables
R runs side by side, S states.
"""

import argparse
import contextlib
import csv
import functools
import gc
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
import data_tools  # tasks, nothing else


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    cudagraphs: bool = torch.cuda.is_available()  # replay updates as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, without exploration
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # RL
    total_timesteps: int = 300_000  # env steps
    num_envs: int = 8  # environments side by side
    batch_size: int = 256  # env steps per update, of all environments together; each is used once
    num_options: int = 4  # W
    option_epsilon: float = 0.1  # share of options that are chosen at random
    deliberation_cost: float = 0.01  # taken off the scaled reward when an option ends by itself
    entropy_coef: float = 0.01  # weight of the entropy of actions
    learning_rate: float = 7e-4  # of everything
    max_grad_norm: float = 0.5  # a larger gradient is shortened
    gamma: float = 0.99  # discount per env step
    reward_scale: float = 1.0  # factor on the task's reward
    hidden_dim: int = 64  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py

    # Four rooms. The last three do nothing without the first.
    four_rooms: bool = False  # learn the paper's example in tables, and no task
    paper_slip: bool = False  # a slip replaces the move, as in the paper; else it follows it, as in the release
    num_runs: int = 20  # side by side
    num_episodes: int = 2_000  # the goal moves after half of them


# Rewards of 100 are scaled to 1, so that one deliberation cost serves all tasks.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01),
    "kitchen": dict(total_timesteps=200_000),
    "kitchen-misaligned": dict(total_timesteps=200_000),
    "calvin": dict(reward_scale=0.01),
}

# Periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]


# ---------------------------------------------------------------------------------------------------------- four rooms
def arrival_value(own_q, value, beta):
    """U(w, s') (eq. 3): the option goes on, or it ends and one is chosen anew. Arrays or tensors of one shape."""
    return (1 - beta) * own_q + beta * value


FOUR_ROOMS = """
#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############
"""
FIRST_GOAL = 62
LATER_GOALS = [*range(68, 73), *range(78, 83), *range(88, 94), *range(99, 104)]  # the lower right room


def four_rooms(paper_slip: bool):
    """P(s' | s, a) of the four rooms, (S, 4, S). With probability 1/3 one slips to a random free neighbour."""
    free = np.array([[cell == " " for cell in row] for row in FOUR_ROOMS.strip("\n").split("\n")])
    cells = np.argwhere(free)  # (S, 2)
    number = np.full(free.shape, -1)
    number[free] = np.arange(len(cells))
    rows, columns = cells.T
    up_down = [number[rows - 1, columns], number[rows + 1, columns]]
    left_right = [number[rows, columns - 1], number[rows, columns + 1]]
    neighbours = np.stack([*up_down, *left_right], 1)  # (S, 4), -1 for a wall
    certain = np.eye(len(cells))
    slip = np.stack([certain[row[row >= 0]].mean(0) for row in neighbours])  # (S, S)
    blocked = neighbours < 0
    moved = np.where(blocked, np.arange(len(cells))[:, None], neighbours)  # (S, 4)
    if paper_slip:
        return (2 * certain[moved] + slip[:, None]) / 3
    slipped = (2 * certain[moved] + slip[moved]) / 3
    return np.where(blocked[..., None], certain[moved], slipped)  # who runs into a wall does not slip


def fewest_steps(transitions, goal: int):
    """Expected steps (S,) to the goal at best, by value iteration: nobody can do better."""
    steps = np.zeros(len(transitions))
    for _ in range(1_000):
        steps = 1 + (transitions @ steps).min(-1)
        steps[goal] = 0
    return steps


def softmax(x):
    """Probabilities (..., n) of preferences."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def draw_index(rng, probabilities):
    """An index (...) by probabilities (..., n)."""
    u = rng.random((*probabilities.shape[:-1], 1))
    return (probabilities.cumsum(-1) < u).sum(-1).clip(max=probabilities.shape[-1] - 1)


class Tables:
    """Options and critics of R runs in tables, and a step of learning (Algorithm 1)."""

    critic_lr = 0.5
    policy_lr = 0.25
    beta_lr = 0.25
    temperature = 0.01  # of both softmaxes

    def __init__(self, num_runs: int, num_states: int, num_options: int, num_actions: int, gamma: float):
        sizes = num_runs, num_states, num_options
        self.gamma = gamma
        self.runs = np.arange(num_runs)
        self.q = np.zeros(sizes)  # Q(s, w)
        self.q_action = np.zeros((*sizes, num_actions))  # Q_U(s, w, a)
        self.preference = np.zeros((*sizes, num_actions))  # of actions
        self.beta_logit = np.zeros(sizes)

    def policy(self, s, w):
        """pi_w(. | s), (R, A)."""
        return softmax(self.preference[self.runs, s, w] / self.temperature)

    def beta(self, s, w):
        """beta_w(s), (R,)."""
        return sigmoid(self.beta_logit[self.runs, s, w])

    def choose_option(self, rng, s):
        """Options (R,), nearly always the best ones."""
        return draw_index(rng, softmax(self.q[self.runs, s] / self.temperature))

    def learn(self, s, w, a, rewards, next_s, ends):
        """From a step of each run; all (R,). ends: the goal is reached, and nothing follows."""
        here = self.runs, s, w
        acted = *here, a
        there = self.runs, next_s, w
        going_on = 1 - ends
        beta = self.beta(next_s, w)
        own_q = self.q[there]
        value = self.q[self.runs, next_s].max(-1)  # V(s') of the greedy policy over options
        arrival = arrival_value(own_q, value, beta)
        target = rewards + self.gamma * going_on * arrival  # eq. 2
        self.q_action[acted] += self.critic_lr * (target - self.q_action[acted])
        self.q[here] += self.critic_lr * (target - self.q[here])  # eq. 1, from samples
        # Theorem 1; Q(s, w) as a baseline
        slope = -self.policy(s, w)  # (R, A), of log softmax
        slope[self.runs, a] += 1
        advantage = self.q_action[acted] - self.q[here]
        self.preference[here] += self.policy_lr * advantage[:, None] * slope
        # Theorem 2: options end where another one is better
        slope = beta * (1 - beta)
        advantage = own_q - value
        self.beta_logit[there] -= self.beta_lr * going_on * slope * advantage


def learn_four_rooms(args: Args, num_options: int):
    """R runs side by side: steps of each episode (R, episodes), and how often an option was chosen in it."""
    rng = np.random.default_rng(args.seed)
    transitions = four_rooms(args.paper_slip)
    num_states = len(transitions)
    tables = Tables(args.num_runs, num_states, num_options, 4, args.gamma)
    runs = tables.runs
    steps = np.zeros((args.num_runs, args.num_episodes + 1), dtype=int)  # the last column is for those that are done
    choices = np.zeros_like(steps)
    episode = np.zeros(args.num_runs, dtype=int)
    goal = np.full(args.num_runs, FIRST_GOAL)
    w = np.zeros(args.num_runs, dtype=int)
    s = rng.integers(num_states, size=args.num_runs)
    over = np.ones(args.num_runs, dtype=bool)
    stops = np.ones(args.num_runs, dtype=bool)
    bar = tqdm(desc=f"four rooms, {num_options} options", total=args.num_episodes, unit="episode")
    while episode.min() < args.num_episodes:
        if over.any():  # begin an episode anywhere but at the goal
            begun = rng.integers(num_states - 1, size=args.num_runs)
            begun += begun >= goal
            s = np.where(over, begun, s)
        w = np.where(stops | over, tables.choose_option(rng, s), w)
        choices[runs, episode] += stops | over
        a = draw_index(rng, tables.policy(s, w))
        next_s = draw_index(rng, transitions[s, a])
        ends = next_s == goal
        tables.learn(s, w, a, ends.astype(float), next_s, ends)
        steps[runs, episode] += 1
        stops = rng.random(args.num_runs) < tables.beta(next_s, w)
        over = ends | (steps[runs, episode] == 1_000)
        episode = np.minimum(episode + over, args.num_episodes)
        steps[runs, episode] *= episode < args.num_episodes
        moves = over & (episode == args.num_episodes // 2)
        goal = np.where(moves, rng.choice(LATER_GOALS, args.num_runs), goal)
        s = next_s
        bar.update(int(episode.min()) - bar.n)
    bar.close()
    return steps[:, :-1], choices[:, :-1]


def mean_fewest_steps(transitions, goal: int) -> float:
    """Of the best policy, over all starts."""
    return fewest_steps(transitions, goal).sum() / (len(transitions) - 1)


def report_four_rooms(args: Args) -> dict:
    """--four-rooms: learn, print the steps of episodes beside the fewest possible, write them as csv."""
    steps, choices = learn_four_rooms(args, args.num_options)
    transitions = four_rooms(args.paper_slip)
    later = np.mean([mean_fewest_steps(transitions, goal) for goal in LATER_GOALS])
    half = args.num_episodes // 2
    last = max(1, half // 10)
    results = dict(
        before_the_move=steps[:, half - last : half].mean(),
        fewest_before=mean_fewest_steps(transitions, FIRST_GOAL),
        after_the_move=steps[:, half : half + last].mean(),
        at_the_end=steps[:, -last:].mean(),
        fewest_at_the_end=later,
        option_length=steps.sum() / choices.sum(),
    )
    slip = "_paper_slip" if args.paper_slip else ""
    name = f"four_rooms__{args.exp_name}__{args.seed}__{args.num_options}_options{slip}.csv"
    path = Path(args.run_dir) / name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(("episode", "steps", "option_length"))
            rows.writerows(zip(range(args.num_episodes), steps.mean(0), steps.sum(0) / choices.sum(0)))
    except OSError as error:
        sys.exit(f"error: cannot write {path} ({error}); free some space or choose another --run-dir")
    print(f"steps per episode, mean over {args.num_runs} runs of {args.num_options} options:")
    for name, value in results.items():
        print(f"{name.replace('_', ' '):18} {value:.1f}")
    print(f"written: {path}")
    return {name: float(value) for name, value in results.items()}


# ------------------------------------------------------------------------------------------------------------ networks
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


class OptionModel(nn.Module):
    """Q(s, w), beta_w(s) and the mean of pi_w(a | s), a Gaussian, of all options."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        first = [nn.Linear(self.inputs.size, u), nn.Tanh()]
        self.net = nn.Sequential(*first, nn.Linear(u, u), nn.Tanh())
        self.q = nn.Linear(u, args.num_options)
        self.beta = nn.Linear(u, args.num_options)
        self.mean = nn.Linear(u, args.num_options * action_dim)
        self.log_std = nn.Parameter(torch.full((args.num_options, action_dim), -0.5))
        gains = {self.net[0]: 2**0.5, self.net[2]: 2**0.5, self.q: 0.01, self.beta: 0.01, self.mean: 0.01}
        for layer, gain in gains.items():
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.beta.bias, -2.0)  # options last 8 env steps to begin with

    def forward(self, obs):
        """Observations (..., O) -> Q (..., W), beta (..., W), means (..., W, A)."""
        h = self.net(self.inputs(obs))
        beta = torch.sigmoid(self.beta(h.detach()))  # ends follow the critic, they do not shape what it sees
        mean = self.mean(h).unflatten(-1, self.log_std.shape)
        return self.q(h), beta, mean


# -------------------------------------------------------------------------------------------------------------- losses
def of_option(values, option):
    """The entry of the option that acts: values (..., W), option (...) -> (...)."""
    return values.gather(-1, option[..., None]).squeeze(-1)


def option_returns(rewards, terminations, truncations, begins, arrival, chosen, gamma: float):
    """Returns G (E, T): the rewards that came while the option acted, and then what is expected. All (E, T).

    arrival: U(w, s'), which counts at the batch's end and by a time-out; chosen: V(s') less the deliberation cost,
    which counts where the option ended by itself: then the next step begins another one. After a true end: nothing.
    """
    rest = arrival[:, -1]
    returns = []
    for t in reversed(range(rewards.shape[1])):
        rest = torch.where(truncations[:, t], arrival[:, t], rest)
        rest = torch.where(terminations[:, t], 0.0, rest)
        value = rewards[:, t] + gamma * rest  # (E,) of step t
        returns.append(value)
        rest = torch.where(begins[:, t], chosen[:, t - 1], value)  # for step t - 1
    return torch.stack(returns[::-1], 1)


def option_critic_loss(model, obs, action, option, begins, rewards, terminations, truncations, next_obs, args: Args):
    """Critic, policies and ends (A2OC): E environments, T env steps; obs, next_obs (E, T, O), action (E, T, A), the
    others (E, T); begins: the option was chosen at this step. Returns the loss and metrics, scalars.
    """
    q, _, mean = model(obs)  # (E, T, W), _, (E, T, W, A)
    next_q, next_beta, _ = model(next_obs)
    next_q = next_q.detach()
    own_q = of_option(q, option)  # (E, T)
    next_own_q = of_option(next_q, option)
    next_own_beta = of_option(next_beta, option)
    with torch.no_grad():
        best = next_q.max(-1).values
        next_value = best + args.option_epsilon * (next_q.mean(-1) - best)  # V(s') of who chooses epsilon-greedily
        chosen = next_value - args.deliberation_cost
        arrival = arrival_value(next_own_q, chosen, next_own_beta)  # eq. 3
        returns = option_returns(rewards, terminations, truncations, begins, arrival, chosen, args.gamma)
        advantage = returns - own_q

    # Critic: Q(s, w) is the mean of the returns (eq. 1, 2)
    critic_loss = 0.5 * (own_q - returns).square().mean()

    # Policies: prefer actions that brought more than Q(s, w) (theorem 1), and stay random
    index = option[..., None, None].expand(*option.shape, 1, mean.shape[-1])
    own_mean = mean.gather(-2, index).squeeze(-2)  # (E, T, A)
    policy = torch.distributions.Normal(own_mean, model.log_std.exp()[option], validate_args=False)
    policy_loss = -(advantage * policy.log_prob(action).sum(-1)).mean()
    entropy = policy.entropy().sum(-1).mean()

    # Ends: an option goes on where it is better than a new choice, whose cost counts for it (theorem 2)
    going_on = next_own_q - next_value + args.deliberation_cost
    beta_loss = (next_own_beta * going_on * ~terminations).mean()
    loss = critic_loss + policy_loss - args.entropy_coef * entropy + beta_loss
    metrics = dict(value_loss=critic_loss, policy_loss=policy_loss, beta_loss=beta_loss, entropy=entropy)
    metrics |= dict(q_value=own_q.mean(), beta=next_own_beta.mean())
    metrics |= dict(choices_per_step=begins.float().mean())
    return loss, {name: value.detach() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------------------- acting
class OptionActor:
    """Acts in the task, without exploration: options end by chance, the best one follows and acts by its mean."""

    def __init__(self, agent):
        self.agent = agent
        self.option = None

    def __call__(self, obs):
        """Observations (E, O) -> actions (E, A), both NumPy; the episodes have begun together."""
        first = np.full(len(obs), self.option is None)
        option = np.zeros(len(obs), dtype=np.int64) if self.option is None else self.option
        action, self.option, _ = self.agent.act(obs, option, first, explore=False)
        return action


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
class RolloutBuffer:
    """The last T env steps of every environment, on the CPU; on-policy: they go to the device once, for one update."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        E = args.num_envs
        T = args.batch_size // args.num_envs
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(E, T, obs_dim),
            action=torch.zeros(E, T, action_dim),
            option=torch.zeros(E, T, dtype=torch.long),
            begins=torch.zeros(E, T, dtype=torch.bool),
            rewards=torch.zeros(E, T),
            terminations=torch.zeros(E, T, dtype=torch.bool),
            truncations=torch.zeros(E, T, dtype=torch.bool),
            next_obs=torch.zeros(E, T, obs_dim),
        )
        self.added = 0  # env steps of each environment, ever

    def add(self, obs, action, option, begins, rewards, terminations, truncations, next_obs):
        """An env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), the others (E,)."""
        values = obs, action, option, begins, rewards, terminations, truncations, next_obs
        for column, value in zip(self.columns.values(), values):
            t = self.added % column.shape[1]
            column[:, t] = torch.from_numpy(value)
        self.added += 1

    def sample(self, batch_size: int):
        """All T env steps, in order once T were added: obs (E, T, O), action (E, T, A), the others (E, T) or as obs."""
        T = batch_size // len(self.columns["obs"])
        return [column[:, :T].to(self.device) for column in self.columns.values()]

    def state_dict(self) -> dict:
        return dict(self.columns, added=torch.tensor(self.added))

    def load_state_dict(self, state: dict):
        self.added = int(state["added"])
        for name, column in self.columns.items():
            saved = state[name]
            if saved.shape != column.shape or not saved.isfinite().all():
                raise ValueError(f"{name} of the roll-out does not fit")
            column.copy_(saved)


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


class Agent(nn.Module):
    """Options with their critic, and one gradient step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.model = OptionModel(obs_dim, action_dim, args)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, eps=1e-5, fused=True, capturable=True)
        self.optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.update = recorded(self.update, args)

    @torch.no_grad()
    def act(self, obs, option, begins, explore: bool):
        """Options end or go on, then act: obs (E, O), option (E,) of before, begins (E,): an episode does.

        Returns actions (E, A), options (E,), and which were chosen now (E,); all are NumPy.
        """
        q, beta, mean = [x.cpu() for x in self.model(torch.from_numpy(obs).to(self.args.device))]
        option = torch.from_numpy(option)
        begins = torch.from_numpy(begins) | (torch.rand(len(obs)) < of_option(beta, option))
        chosen = q.argmax(-1)
        if explore:
            other = torch.randint(q.shape[-1], chosen.shape)
            chosen = torch.where(torch.rand(len(obs)) < self.args.option_epsilon, other, chosen)
        option = torch.where(begins, chosen, option)
        action = mean[torch.arange(len(obs)), option]
        if explore:
            std = self.model.log_std.exp().cpu()[option]
            action = action + std * torch.randn_like(action)
        return action.numpy(), option.numpy(), begins.numpy()

    def update(self, obs, action, option, begins, rewards, terminations, truncations, next_obs) -> dict:
        """One step of everything on the last env steps; returns metrics."""
        batch = obs, action, option, begins, rewards, terminations, truncations, next_obs
        loss, metrics = option_critic_loss(self.model, *batch, self.args)
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        return dict(metrics, grad_norm=grad_norm)


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Online RL from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    rb = RolloutBuffer(obs.shape[1], action_dim, args)
    option = np.zeros(args.num_envs, dtype=np.int64)  # (E,) those that act
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
            option = state["option"].numpy()
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
        # ALGO LOGIC: put action logic here
        action, option, begins = agent.act(obs, option, running_length == 0, explore=True)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        scaled = (args.reward_scale * rewards).astype(np.float32)
        rb.add(obs, action, option, begins, scaled, terminations, truncations, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))

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

        # ALGO LOGIC: training
        if global_step % args.batch_size == 0:
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % 10 == 0:
                log(writer, "losses", metrics, global_step)
            check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without exploration
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            returns, lengths = rollout(OptionActor(agent), args.eval_episodes, args, 10_000 + args.seed)
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
                option=torch.from_numpy(option),
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
        rollout(OptionActor(agent), 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    """--evaluate: episodes of a trained agent without exploration; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    returns, lengths = rollout(OptionActor(agent), args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(OptionActor(agent), 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")


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
        if type(value) is int and value == 0 and name not in ("seed", "eval_interval"):
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("option_epsilon", "gamma") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.batch_size % args.num_envs:
        sys.exit(f"error: --batch-size must be a multiple of --num-envs, that is of {args.num_envs}")
    if args.num_episodes < 2:
        sys.exit("error: --num-episodes 1 does not work, the goal moves after half of them; give at least 2")
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
    if args.four_rooms:
        return report_four_rooms(args)

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
