"""HIRO (Nachum et al. 2018), https://arxiv.org/abs/1805.08296: two levels of TD3, no offline data

Idea: the high level says every c env steps by how much the state should change; the low level is rewarded for making
that change. While the low level learns, old goals no longer lead where they led. So the high level learns from goals
that are relabelled: with which goal would today's low level do what was done then?

    python algos/hiro.py --env-id maze          # RL and evaluation
    python algos/hiro.py --resume runs/FOLDER   # go on after Ctrl-C or a crash

phi(s) is a state's place: G entries of an observation, in units of GOAL_RANGE. Repeat:
   act: every c env steps a goal g ~ high(s); between, h(s, g, s') = phi(s) + g - phi(s') (eq. 2); a ~ low(s, g)
   low: TD3 with the goal as an input (eq. 4) and reward -|phi(s) + g - phi(s')| (eq. 3)
   high: TD3 on (s_0, g~, sum of c rewards, s_c), where g~ is the best of ten goals (eq. 5): the one that was given, the
      change that happened, phi(s_c) - phi(s_0), and eight random ones around it

Goal-conditioned: yes, goals are changes of the state. Pre-trained: no, learnt end to end. Goals end after c env steps,
not by themselves. Off-policy, with relabelled goals.

The numbers are those of `DEVIATION n` in the code:
1. Environments act side by side, with fewer updates (paper: low one per env step, high one per c).
2. At the c-th env step the next goal is h's, as in the paper; the release stores the high level's next goal.
3. For the high level a true end has no future; in the release nothing ends. For the low level nothing ends in both.
4. Both levels learn from the same rows, c env steps under a goal; the release has two buffers.
5. Noise is in units of an action's or goal's range and target actions are clipped to it; the warm-up is uniform.
6. Networks see sines and cosines of positions, as in skimo.py; goals they see as they are.
7. Until a first reward is seen, goals are uniform, in evaluations as well, and the high level does not learn: it would
   only follow the random first values of its critics, soon to a goal in a wall (one try, no log; in the paper's tasks
   the distance is rewarded, or a reward comes soon).
8. The high level's rewards are times reward_scale (release: .1), the time is not observed, and the low level sees its
   position (release: not Ant's).
Free choices: GOAL_RANGE, and all numbers on our tasks, where the paper has none.

Expect about 0 on our tasks: the high level sees no reward before the first success, and most goals in the space of
all joints and objects cannot be reached. What the low level learns is charts/goal_progress: the share of |g| covered,
.69 in our maze after 300,000 env steps (--hidden-dim 128 --updates-per-step 0.1 --actor-lr 1e-3).
In an open maze with a reward for coming nearer it learns to reach random goals in 200 of 200 episodes, with two seeds
(benchmarks/controls_hiro.py; uniform actions: 3 and 6).
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, POSITION_PERIODS, GOAL_ENTRIES, rollout, ReplayBuffer, Agent, train,
    evaluate, parse_args, check_args, main
Shapes: B batch, O observation, F inputs, A action, G goal, c env steps per goal, E environments.
"""

import argparse
import contextlib
import copy
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
    eval_episodes: int = 20  # episodes of an evaluation, with the policies' modes (before a first reward: DEVIATION 7)
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 10_000  # env steps with uniform actions and goals, before updates start
    updates_per_step: float = 0.25  # of the low level, after the warm-up (DEVIATION 1; paper: 1)
    batch_size: int = 100  # rows per update
    buffer_size: int = 100_000  # rows kept, each the env steps of one goal
    actor_lr: float = 1e-4  # learning rate of both levels' policies
    critic_lr: float = 1e-3  # learning rate of both levels' critics
    gamma: float = 0.99  # discount, of the low level per env step, of the high one per goal
    tau: float = 0.005  # share of the online weights in a target update, after every second update
    goal_steps: int = 10  # c, env steps per goal; the high level learns once per so many updates of the low one
    explore_std: float = 0.1  # noise on actions and goals while exploring, in units of their range
    correction: bool = True  # relabel goals for the high level (eq. 5)
    reward_scale: float = 1.0  # factor on the task's reward
    hidden_dim: int = 300  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 6)


# Rewards of 100 are scaled to 1, about the size of the low level's.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, goal_steps=30),
    "kitchen": dict(),
    "kitchen-misaligned": dict(),
    "calvin": dict(reward_scale=0.01, total_timesteps=2_000_000),
}

# Periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]

# Goals ask for changes of up to so much within c env steps, (G,). Maze: cells; 30 steps of full force go one.
# Others: 95 % of the changes within 10 env steps in the scripted data are smaller; at least .02.
GOAL_RANGE = {
    "maze": [1.0, 1.0],
    "kitchen": [  # arm joints in rad, fingers in m, objects
        0.58, 0.29, 0.49, 0.55, 0.33, 0.47, 0.43, 0.034,
        0.032, 0.02, 0.02, 0.24, 0.02, 0.02, 0.02, 0.059,
        0.02, 0.02, 0.02, 0.02, 0.02, 0.3, 0.15, 0.02,
        0.12, 0.02, 0.02, 0.02, 0.02, 0.032,
    ],
    "calvin": [  # tool, grip, arm joints, grip command, objects
        0.15, 0.11, 0.087, 0.078, 0.39, 0.21, 0.3, 0.48,
        0.19, 0.19, 0.38, 2.0, 0.02, 0.02, 0.02, 0.02,
        0.02, 0.02,
    ],
}  # fmt: skip
GOAL_RANGE["kitchen-misaligned"] = GOAL_RANGE["kitchen"]

# Where a goal's numbers stand in an observation, if they are not its first ones, (G,). CALVIN: without the tool's Euler
# angles, which jump by 2 pi; the arm's joints hold the same.
GOAL_ENTRIES = {"calvin": [0, 1, 2, *range(6, 21)]}


# ------------------------------------------------------------------------------------------------------------ networks
def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
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


class GoalActor(nn.Module):
    """Deterministic policy of one level: obs (..., O), goal (..., G) -> action (..., A), of the high level a goal."""

    def __init__(self, obs_dim: int, goal_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + goal_dim
        self.net = relu_mlp(in_dim, u, u, action_dim)
        start_small(self.net)

    def forward(self, obs, goal):
        x = torch.cat([self.inputs(obs), goal], -1)
        return torch.tanh(self.net(x))


class GoalCritics(nn.Module):
    """Q_1 and Q_2 of one level: obs (..., O), goal (..., G), action (..., A) -> 2 x (...)."""

    def __init__(self, obs_dim: int, goal_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + goal_dim + action_dim
        self.qf1 = relu_mlp(in_dim, u, u, 1)
        self.qf2 = relu_mlp(in_dim, u, u, 1)
        start_small(self.qf1)
        start_small(self.qf2)

    def forward(self, obs, goal, action):
        x = torch.cat([self.inputs(obs), goal, action], -1)
        return self.qf1(x).squeeze(-1), self.qf2(x).squeeze(-1)


def start_small(net: nn.Sequential):
    """Outputs near 0 at first, as in the release: no tanh begins saturated."""
    for weight in net[-1].parameters():
        nn.init.uniform_(weight, -0.003, 0.003)


# --------------------------------------------------------------------------------------------------------------- goals
def goal_transition(place, goal, next_place):
    """h (eq. 2): after a step the goal is what is left of it, so that place + goal stays. All (..., G)."""
    return place + goal - next_place


def goal_candidates(place, goal):
    """Ten goals that may explain what happened: place (B, c+1, G), goal (B, G) -> (B, 10, G) within their range."""
    change = (place[:, -1] - place[:, 0])[:, None]  # (B, 1, G)
    noise = 0.5 * torch.randn_like(change.expand(-1, 8, -1))
    candidates = [change + noise, change, goal[:, None]]
    return torch.cat(candidates, 1).clamp(-1, 1)


def goal_scores(actor, obs, place, action, candidates, steps):
    """Log-likelihood of the actions that were taken, were the goal another one (eq. 5), up to a constant.

    obs (B, c+1, O), place (B, c+1, G), action (B, c, A), candidates (B, N, G), steps (B,): of the c env steps only the
    first ones happened where an episode ended. Returns (B, N).
    """
    start = place[:, None, :1]  # (B, 1, 1, G)
    now = place[:, None, :-1]  # (B, 1, c, G)
    goals = goal_transition(start, candidates[:, :, None], now)  # (B, N, c, G)
    states = obs[:, None, :-1].expand(-1, goals.shape[1], -1, -1)  # (B, N, c, O)
    error = action[:, None] - actor(states, goals)  # (B, N, c, A)
    count = torch.arange(action.shape[1], device=steps.device)
    happened = count < steps[:, None]  # (B, c)
    return -0.5 * (error.square().sum(-1) * happened[:, None]).sum(-1)


@torch.no_grad()
def corrected_goal(actor, obs, place, action, goal, steps):
    """The goals (B, G) with which today's low level most likely does what was done then (eq. 5)."""
    candidates = goal_candidates(place, goal)  # (B, 10, G)
    scores = goal_scores(actor, obs, place, action, candidates, steps)  # (B, 10)
    best = scores.argmax(1)[:, None, None].expand(-1, 1, goal.shape[1])
    return candidates.gather(1, best).squeeze(1)


# -------------------------------------------------------------------------------------------------------------- losses
def td3_critic_loss(critics, critics_target, actor_target, obs, goal, action, rewards, next_obs, next_goal, discount):
    """TD loss of both critics (TD3, algorithm 1): a state is worth its reward plus the value of where the policy leads.

    The smaller critic counts, and noise on the action keeps the policy from living on a critic's narrow peaks. obs,
    next_obs (B, O), goal, next_goal (B, G), action (B, A), rewards, discount (B,), 0 at a true end. Returns the loss
    and metrics, scalars.
    """
    with torch.no_grad():
        next_action = actor_target(next_obs, next_goal)  # (B, A)
        noise = 0.2 * torch.randn_like(next_action)  # .2 and its bound .5 are TD3's
        next_action = (next_action + noise.clamp(-0.5, 0.5)).clamp(-1, 1)  # DEVIATION 5
        next_q = torch.min(*critics_target(next_obs, next_goal, next_action))  # (B,)
        td_target = rewards + discount * next_q  # (B,)
    q1, q2 = critics(obs, goal, action)
    huber = nn.functional.huber_loss  # as HIRO's release; TD3 has squares
    loss = huber(q1, td_target) + huber(q2, td_target)
    metrics = dict(value_loss=loss, q_value=q1, td_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def td3_policy_loss(critics, actor, obs, goal):
    """Policy (TD3, algorithm 1): do what the first critic likes best. obs (B, O), goal (B, G). Returns the loss ()."""
    q1, _ = critics(obs, goal, actor(obs, goal))
    return -q1.mean()


# -------------------------------------------------------------------------------------------------------------- acting
class TwoLevels:
    """Acts in E environments at once: the high level gives a goal every c env steps, the low level follows it."""

    def __init__(self, agent, num_envs: int, action_dim: int, explore: bool):
        self.agent = agent
        self.std = agent.args.explore_std if explore else 0.0
        self.goal = torch.zeros(num_envs, agent.goal_dim, device=agent.args.device)  # (E, G)
        self.place = torch.zeros_like(self.goal)  # (E, G) of the observation before
        self.action = torch.zeros(num_envs, action_dim, device=self.goal.device)  # (E, A)
        self.age = torch.zeros_like(self.goal[:, 0])  # (E,) env steps in the episode

    @torch.no_grad()
    def __call__(self, obs, uniform: bool = False):
        """obs (E, O) -> actions (E, A), both NumPy; uniform: both levels choose at random."""
        obs = torch.from_numpy(obs).to(self.goal.device)
        place = self.agent.place(obs)
        old_goal = goal_transition(self.place, self.goal, place)
        guess = uniform or not self.agent.rewarded  # DEVIATION 7
        no_goal = obs[:, :0]  # the high level has none itself
        new_goal = self.choose(self.agent.high.actor, obs, no_goal, self.goal, guess)
        is_due = self.age % self.agent.args.goal_steps == 0  # (E,)
        self.goal = torch.where(is_due[:, None], new_goal, old_goal)
        self.action = self.choose(self.agent.low.actor, obs, self.goal, self.action, uniform)
        self.place = place
        self.age += 1
        return self.action.cpu().numpy()

    def choose(self, actor, obs, goal, like, uniform: bool):
        """An action or goal of one level; like (E, n): the last one."""
        if uniform:
            return 2 * torch.rand_like(like) - 1
        action = actor(obs, goal)
        return (action + self.std * torch.randn_like(action)).clamp(-1, 1)

    def forget(self, ended):
        """Episodes that ended, (E,) bool: the next ones begin with a new goal."""
        self.age[torch.from_numpy(ended).to(self.age.device)] = 0


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
class ReplayBuffer:
    """The last buffer_size goals with their env steps, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        c = args.goal_steps
        shapes = dict(
            obs=(c + 1, obs_dim),
            action=(c, action_dim),
            goal=(len(goal_range(obs_dim, args)),),
            rewards=(),  # their sum
            steps=(),  # how many of the c env steps happened
            terminations=(),
        )
        self.goal_steps = c
        self.device = args.device
        self.columns = {}
        self.running = {}  # the row of each environment that is not complete yet, on the CPU
        for name, shape in shapes.items():
            self.columns[name] = torch.zeros(args.buffer_size, *shape, device=args.device)
            self.running[name] = torch.zeros(args.num_envs, *shape)
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, len(self.columns["obs"]))

    def add(self, obs, action, goal, rewards, terminations, truncations, next_obs):
        """One env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), goal (E, G), the others (E,).

        A row is complete after c env steps or where the episode ends; then the last observation fills what is left.
        """
        running = self.running
        for e, step in enumerate(running["steps"].int().tolist()):
            if step == 0:
                running["obs"][e, 0] = torch.from_numpy(obs[e])
                running["action"][e] = 0
                running["goal"][e] = goal[e]
                running["rewards"][e] = 0
            running["obs"][e, step + 1 :] = torch.from_numpy(next_obs[e])
            running["action"][e, step] = torch.from_numpy(action[e])
        running["rewards"] += torch.from_numpy(rewards)
        running["terminations"][:] = torch.from_numpy(terminations)
        running["steps"] += 1
        complete = (running["steps"] == self.goal_steps) | torch.from_numpy(terminations | truncations)
        number = int(complete.sum())
        if number == 0:
            return
        index = torch.arange(self.added, self.added + number, device=self.device) % len(self.columns["obs"])
        for name, column in self.columns.items():
            column[index] = running[name][complete].to(self.device)
        running["steps"][complete] = 0
        self.added += number

    def sample(self, batch_size: int):
        """Uniform rows: obs (B, c+1, O), action (B, c, A), goal (B, G), rewards, steps, terminations (B,)."""
        index = torch.randint(len(self), (batch_size,), device=self.device)
        return [column[index] for column in self.columns.values()]

    def newest(self, count: int):
        """The last rows that were added, as `sample` returns them."""
        first = self.added - min(count, len(self))
        index = torch.arange(first, self.added, device=self.device) % len(self.columns["obs"])
        return [column[index] for column in self.columns.values()]

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added, running=self.running)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for name, column in self.columns.items():
            filled = column[: len(self)]
            saved = state[name]
            if saved.shape != filled.shape or not saved.isfinite().all():
                raise ValueError(f"{name} of the replay buffer does not fit")
            filled.copy_(saved)
            self.running[name][:] = state["running"][name]


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


class TD3(nn.Module):
    """Policy and critics of one level with their slow copies, and one gradient step."""

    def __init__(self, obs_dim: int, goal_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.tau = args.tau
        self.actor = GoalActor(obs_dim, goal_dim, action_dim, args)
        self.critics = GoalCritics(obs_dim, goal_dim, action_dim, args)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critics_target = copy.deepcopy(self.critics).requires_grad_(False)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, fused=True, capturable=True)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_optimizer = adam(self.critics.parameters(), lr=args.critic_lr)
        self.steps = [recorded(functools.partial(self.step, kind), args) for kind in (False, True)]  # by with_policy

    def update(self, *batch, with_policy: bool) -> dict:
        """One step on obs, goal, action, rewards, next_obs, next_goal, discount, with or without the policy."""
        return self.steps[with_policy](*batch)

    def step(self, with_policy: bool, obs, goal, action, rewards, next_obs, next_goal, discount) -> dict:
        """One step of the critics and, with the policy, of that and the slow copies; returns metrics."""
        targets = self.critics_target, self.actor_target
        before = obs, goal, action, rewards
        after = next_obs, next_goal, discount
        loss, metrics = td3_critic_loss(self.critics, *targets, *before, *after)
        self.critic_optimizer.zero_grad()
        loss.backward()
        metrics["grad_norm"] = gradient_norm(self.critics)
        self.critic_optimizer.step()
        if with_policy:
            self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
            loss = td3_policy_loss(self.critics, self.actor, obs, goal)
            self.actor_optimizer.zero_grad()
            loss.backward()
            metrics["policy_loss"] = loss.detach()
            metrics["grad_norm"] = metrics["grad_norm"] + gradient_norm(self.actor)
            self.actor_optimizer.step()
            self.critics.requires_grad_(True)
            update_target(self.critics_target, self.critics, self.tau)
            update_target(self.actor_target, self.actor, self.tau)
        return metrics


def goal_range(obs_dim: int, args: Args) -> list[float]:
    """Of a task; where nothing is known, goals are changes of the whole observation by up to 1."""
    return GOAL_RANGE.get(args.env_id, [1.0] * obs_dim)


class Agent(nn.Module):
    """Both levels, and one gradient step of the low one; every c-th time one of the high one, too."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        goal_unit = torch.tensor(goal_range(obs_dim, args), device=args.device)
        self.register_buffer("goal_unit", goal_unit)  # (G,)
        self.goal_dim = len(goal_unit)
        entries = GOAL_ENTRIES.get(args.env_id, range(self.goal_dim))
        self.register_buffer("goal_entries", torch.tensor(list(entries), device=args.device))  # (G,)
        self.low = TD3(obs_dim, self.goal_dim, action_dim, args)
        self.high = TD3(obs_dim, 0, self.goal_dim, args)  # its actions are goals; it has no goal itself
        self.register_buffer("rewarded", torch.tensor(False))  # on the CPU: asked at each env step
        self.updates = 0  # of the low level
        self.corrected_goal = recorded(functools.partial(corrected_goal, self.low.actor), args)

    def place(self, obs):
        """phi: obs (..., O) -> (..., G) in units of the goals' range."""
        return obs[..., self.goal_entries] / self.goal_unit

    def update(self, obs, action, goal, rewards, steps, terminations) -> dict:
        """One step of learning on rows of the replay; returns metrics."""
        args = self.args
        self.updates += 1
        place = self.place(obs)  # (B, c+1, G)
        # Low level: a random env step t of each row (DEVIATION 4)
        row = torch.arange(len(obs), device=obs.device)
        t = (torch.rand_like(steps) * steps).long()  # (B,)
        goal_t = goal_transition(place[:, 0], goal, place[row, t])  # (B, G)
        next_goal = goal_transition(place[row, t], goal_t, place[row, t + 1])  # (B, G), DEVIATION 2
        low_rewards = -next_goal.norm(dim=-1)  # eq. 3
        discount = torch.full_like(rewards, args.gamma)  # it never ends
        before = obs[row, t], goal_t, action[row, t], low_rewards
        after = obs[row, t + 1], next_goal, discount
        even = self.updates % 2 == 0
        low_metrics = self.low.update(*before, *after, with_policy=even)
        metrics = {f"low_{name}": value for name, value in low_metrics.items()}
        grad_norm = low_metrics["grad_norm"]

        # High level: the whole row
        if self.rewarded and self.updates % args.goal_steps == 0:
            if args.correction:
                goal = self.corrected_goal(obs, place, action, goal, steps)
            nothing = obs[:, 0, :0]  # (B, 0)
            discount = args.gamma * (1 - terminations)  # DEVIATION 3
            before = obs[:, 0], nothing, goal, rewards
            after = obs[:, -1], nothing, discount
            even = self.updates // args.goal_steps % 2 == 0
            high_metrics = self.high.update(*before, *after, with_policy=even)
            metrics |= {f"high_{name}": value for name, value in high_metrics.items()}
            grad_norm = grad_norm + high_metrics["grad_norm"]
        return dict(metrics, grad_norm=grad_norm)

    def progress(self, obs, action, goal, rewards, steps, terminations) -> float:
        """Share of the way to the goal that rows of the replay cover: 1 - |phi(s_0) + g - phi(s_c)| / |g|."""
        place = self.place(obs)
        left = goal_transition(place[:, 0], goal, place[:, -1]).norm(dim=-1)
        return float(1 - left.sum() / goal.norm(dim=-1).sum())


def gradient_norm(module):
    """Norm of a module's gradient, (), which stays as it is; what check_finite looks at."""
    gradients = [weight.grad for weight in module.parameters() if weight.grad is not None]
    return nn.utils.get_total_norm(gradients)


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Online RL from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    choose_action = TwoLevels(agent, args.num_envs, action_dim, explore=True)
    rb = ReplayBuffer(obs.shape[1], action_dim, args)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    for name, level in dict(low=agent.low, high=agent.high).items():
        parts[f"{name}_actor"] = level.actor_optimizer
        parts[f"{name}_critics"] = level.critic_optimizer
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            for name in ("goal", "place", "action", "age"):
                getattr(choose_action, name)[:] = state[name]
            global_step = int(state["global_step"])
            gradient_step = int(state["gradient_step"])
            agent.updates = gradient_step
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
        # ALGO LOGIC: put action logic here. One action for all environments at once
        action = choose_action(obs, uniform=global_step < args.warmup_steps)
        goal = choose_action.goal.cpu()
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(obs, action, goal, args.reward_scale * rewards, terminations, truncations, next_obs)
        agent.rewarded |= bool(rewards.any())
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
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

        # ALGO LOGIC: training, as soon as there are rows
        updates_due = 0
        if len(rb) > 0:
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
        while gradient_step < updates_due:
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without noise
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            both_levels = TwoLevels(agent, args.eval_episodes, action_dim, explore=False)
            returns, lengths = rollout(both_levels, args.eval_episodes, args, 10_000 + args.seed)
            evaluations.append((global_step, float(returns.mean()), success(returns, args)))
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), global_step)
            writer.add_scalar("eval/success", success(returns, args), global_step)
            if len(rb):
                progress = agent.progress(*rb.newest(1_000))
                writer.add_scalar("charts/goal_progress", progress, global_step)
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
                goal=choose_action.goal,
                place=choose_action.place,
                action=choose_action.action,
                age=choose_action.age,
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
        both_levels = TwoLevels(agent, 1, action_dim, explore=False)
        rollout(both_levels, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
    last_100 = [row[1] for row in episodes[-100:]]
    return dict(
        env_steps=global_step,
        updates=gradient_step,
        rl_minutes=rl_minutes,
        last_100_return=float(np.mean(last_100)) if last_100 else None,
        last_100_success=success(last_100, args),
        evaluations=evaluations,
        goal_progress=agent.progress(*rb.newest(1_000)),
    )


def evaluate(args: Args):
    """--evaluate: episodes of a trained agent without noise; needs no training."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    agent = Agent(args, obs_dim, action_dim)
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    both_levels = TwoLevels(agent, args.eval_episodes, action_dim, explore=False)
    returns, lengths = rollout(both_levels, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        both_levels = TwoLevels(agent, 1, action_dim, explore=False)
        rollout(both_levels, 1, args, 10_000 + args.seed, video)
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
        if type(value) is int and value == 0 and name not in ("seed", "eval_interval", "warmup_steps"):
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("tau", "gamma") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.total_timesteps < args.num_envs * args.goal_steps:
        sys.exit("error: --total-timesteps is less than one goal in each environment; raise it")
    if args.buffer_size < args.num_envs:
        sys.exit("error: --buffer-size is smaller than --num-envs; raise it")
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
