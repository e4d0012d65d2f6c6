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

Run beside a PyTorch port (TD3) and the release's formulas (eq. 5) on the same numbers: equal but for rounding.
DEVIATION n: differences from paper or release. Why, and scores: algos/docs/hiro.md
1. Environments act side by side, with fewer updates (paper: low one per env step, high one per c).
2. At the c-th env step the next goal is h's, as in the paper; the release stores the high level's next goal.
3. For the high level a true end has no future; in the release nothing ends. For the low level nothing ends in both.
4. Both levels learn from the same rows, c env steps under a goal; the release has two, of 200,000 each.
5. Noise (.1; release, Ant: 1 of 30) and low rewards (there m and rad as they are) are in units of an action's or
   goal's range; target actions are clipped to it; the warm-up is uniform and has 10,000 env steps (2,500).
6. Networks see sines and cosines of positions; goals they see as they are.
7. Until a first reward is seen, goals are uniform, also in evaluations, and the high level, which would follow the
   random first values of its critics, does not learn. --no-wait-for-reward: it always learns, as published.
8. High rewards are times reward_scale (release: .1), time is not observed, the low level sees positions (not Ant's).
9. A critic sees the action once; in the release again after its first layer. c is 30 in the maze.
Differs from skimo.py in: Args, TASK_DEFAULTS, ReplayBuffer, Agent, rollout, train, evaluate, parse_args
Shapes: B batch, O observation, F inputs, A action, G goal, c env steps per goal, E environments.
"""

import copy
import functools
import gc
import io
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: updates beside other programs are 1.6 times as fast

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

FILE = Path(__file__).resolve()
sys.path.insert(0, str(FILE.parents[1]))
import data_tools  # tasks and chores; nothing of a method


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin, your own or one of Gymnasium
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4

    # Seldom changed
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode

    # RL
    num_envs: int = 8  # environments side by side (DEVIATION 1)
    warmup_steps: int = 10_000  # env steps with uniform actions and goals, before updates start
    updates_per_step: float = 0.25  # low-level updates per env step after the warm-up (DEVIATION 1)
    batch_size: int = 100  # rows per update
    buffer_size: int = 100_000  # rows kept, each the env steps of one goal
    actor_lr: float = 1e-4  # learning rate of both levels' policies
    critic_lr: float = 1e-3  # learning rate of both levels' critics
    gamma: float = 0.99  # discount, of the low level per env step, of the high one per goal
    tau: float = 0.005  # share of the online weights in a target update, after every second update
    goal_steps: int = 10  # c, env steps per goal; the high level learns once per so many updates of the low one
    explore_std: float = 0.1  # noise on actions and goals while exploring, in units of their range
    correction: bool = True  # relabel goals for the high level (eq. 5)
    wait_for_reward: bool = True  # random goals until a first reward, and the high level rests (DEVIATION 7)
    reward_scale: float = 1.0  # factor on the task's reward (DEVIATION 8)
    hidden_dim: int = 300  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 6)

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, buffer_size=self.num_envs)
        most = dict(gamma=1, tau=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data. Rewards of 100 are scaled to 1, about the size of the low level's.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, goal_steps=30),
    "calvin": dict(reward_scale=0.01, total_timesteps=2_000_000),
}
# Goals ask for changes of up to so much within c env steps, (G,). Maze: cells; 30 steps of full force go one.
# Others: 95 % of the changes within 10 env steps in the scripted data are smaller; at least .02.
GOAL_RANGE = {
    "maze": [1.0, 1.0],
    # Arm joints in rad, fingers in m, objects
    "kitchen": [0.58, 0.29, 0.49, 0.55, 0.33, 0.47, 0.43, 0.034, 0.032, 0.02, 0.02, 0.24, 0.02, 0.02, 0.02, 0.059,
                0.02, 0.02, 0.02, 0.02, 0.02, 0.3, 0.15, 0.02, 0.12, 0.02, 0.02, 0.02, 0.02, 0.032],
    # Tool, grip, arm joints, grip command, objects
    "calvin": [0.15, 0.11, 0.087, 0.078, 0.39, 0.21, 0.3, 0.48, 0.19, 0.19, 0.38, 2.0, 0.02, 0.02, 0.02, 0.02,
               0.02, 0.02],
}  # fmt: skip
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
        periods = task.position_periods if args.position_features else np.zeros((0, 0))
        self.register_buffer("scale", torch.tensor(task.obs_scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(task.obs_shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)
        return torch.cat([obs * self.scale + self.shift, phase.sin(), phase.cos()], -1)  # (..., F)


class GoalActor(nn.Module):
    """Deterministic policy of one level: obs (..., O), goal (..., G) -> action (..., A), of the high level a goal."""

    def __init__(self, obs_dim: int, goal_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        self.net = relu_mlp(self.inputs.size + goal_dim, u, u, action_dim)
        start_small(self.net)

    def forward(self, obs, goal):
        x = torch.cat([self.inputs(obs), goal], -1)
        return torch.tanh(self.net(x))


class GoalCritics(nn.Module):
    """Q_1 and Q_2 of one level: obs (..., O), goal (..., G), action (..., A) -> 2 x (...)."""

    def __init__(self, obs_dim: int, goal_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
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


# ------------------------------------------------------------------------------------------------------------------ RL
def goal_range(obs_dim: int, args: Args) -> list[float]:
    """Of a task, (G,); where nothing is known, goals are changes of the whole observation by up to 1."""
    return GOAL_RANGE.get(data_tools.TASKS[args.env_id].data or args.env_id, [1.0] * obs_dim)


def goal_transition(place, goal, next_place):
    """h (eq. 2): after a step the goal is what is left of it, so that place + goal stays. All (..., G)."""
    return place + goal - next_place


def goal_candidates(place, goal):
    """Ten goals that may explain what happened: place (B, c+1, G), goal (B, G) -> (B, 10, G) within their range."""
    change = (place[:, -1] - place[:, 0])[:, None]  # (B, 1, G)
    noise = 0.5 * torch.randn_like(change.expand(-1, 8, -1))
    return torch.cat([change + noise, change, goal[:, None]], 1).clamp(-1, 1)


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
    happened = torch.arange(action.shape[1], device=steps.device) < steps[:, None]  # (B, c)
    return -0.5 * (error.square().sum(-1) * happened[:, None]).sum(-1)


@torch.no_grad()
def corrected_goal(actor, obs, place, action, goal, steps):
    """The goals (B, G) with which today's low level most likely does what was done then (eq. 5)."""
    candidates = goal_candidates(place, goal)  # (B, 10, G)
    scores = goal_scores(actor, obs, place, action, candidates, steps)  # (B, 10)
    row = torch.arange(len(goal), device=goal.device)
    return candidates[row, scores.argmax(1)]


class ReplayBuffer:
    """The last buffer_size goals with their env steps, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.args = args
        c, G = args.goal_steps, len(goal_range(obs_dim, args))
        sizes = (c + 1, obs_dim), (c, action_dim), (G,), (), (), ()  # as `sample` returns them
        self.columns = [torch.zeros(args.buffer_size, *size, device=args.device) for size in sizes]
        self.added = 0  # rows ever added
        self.running = [torch.zeros(args.num_envs, *size) for size in sizes]  # rows not complete yet, on the CPU

    def __len__(self):
        return min(self.added, self.args.buffer_size)

    def add(self, obs, action, goal, rewards, terminations, truncations, next_obs):
        """One env step of every environment: obs, next_obs (E, O), action (E, A), the others (E,), NumPy; goal (E, G).

        A row is complete after c env steps or where the episode ends; then the last observation fills what is left.
        """
        path, actions, goals, total, steps, ends = self.running
        for e, step in enumerate(steps.int().tolist()):
            if step == 0:
                path[e, 0] = torch.from_numpy(obs[e])
                actions[e] = 0
                goals[e] = goal[e]
                total[e] = 0
            path[e, step + 1 :] = torch.from_numpy(next_obs[e])
            actions[e, step] = torch.from_numpy(action[e])
        total += torch.from_numpy(rewards)
        ends[:] = torch.from_numpy(terminations)
        steps += 1
        complete = (steps == self.args.goal_steps) | torch.from_numpy(terminations | truncations)  # (E,)
        number = int(complete.sum())
        index = torch.arange(self.added, self.added + number, device=self.args.device) % self.args.buffer_size
        for column, running in zip(self.columns, self.running):
            column[index] = running[complete].to(self.args.device)
        self.added += number
        steps[complete] = 0

    def sample(self, batch_size: int):
        """Uniform rows: obs (B, c+1, O), action (B, c, A), goal (B, G), sum of rewards (B,), how many of the c env
        steps happened (B,), terminations (B,).
        """
        index = torch.randint(len(self), (batch_size,), device=self.args.device)
        return [column[index] for column in self.columns]

    def newest(self, count: int):
        """The last rows that were added, as `sample` returns them."""
        first = self.added - min(count, len(self))
        index = torch.arange(first, self.added, device=self.args.device) % self.args.buffer_size
        return [column[index] for column in self.columns]

    def state_dict(self) -> dict:
        filled = [column[: len(self)].clone() for column in self.columns]
        return dict(columns=filled, added=self.added, running=self.running)

    def load_state_dict(self, state: dict):
        self.added, self.running = state["added"], state["running"]
        for column, filled in zip(self.columns, state["columns"]):
            column[: len(filled)] = filled


class Recorded:
    """A function of tensors as a CUDA graph: one launch in place of hundreds. The first call is an ordinary one, the
    second is recorded: shapes stay, Python decides nothing anew, and a call overwrites what the one before returned.
    """

    def __init__(self, function, args: Args):
        self.function, self.recording = function, args.cudagraphs and args.device == "cuda"
        self.inputs = self.outputs = None

    def __call__(self, *inputs):
        if not self.recording:
            return self.function(*inputs)
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
            self.stream = torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.outputs is None:
            gc.collect()  # an old graph that Python deletes meanwhile would break this one
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


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
        options = dict(fused=True, capturable=True)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **options)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), args.critic_lr, **options)
        self.steps = [Recorded(functools.partial(self.step, kind), args) for kind in (False, True)]  # by with_policy

    def choose(self, obs, goal, std: float, uniform: bool):
        """Actions (E, A), of the high level goals: the policy's with noise of a std, or uniform ones."""
        action = self.actor(obs, goal)
        if uniform:  # DEVIATION 5
            return 2 * torch.rand_like(action) - 1
        return (action + std * torch.randn_like(action)).clamp(-1, 1)

    def update(self, *batch, with_policy: bool) -> dict:
        """One step on obs, goal, action, rewards, next_obs, next_goal, discount, with or without the policy."""
        return self.steps[with_policy](*batch)

    def step(self, with_policy: bool, obs, goal, *rest) -> dict:
        """One step of the critics and, with the policy, of that and the slow copies; returns metrics."""
        loss, metrics = td3_critic_loss(self.critics, self.critics_target, self.actor_target, obs, goal, *rest)
        self.critic_optimizer.zero_grad()
        loss.backward()
        metrics["grad_norm"] = nn.utils.get_total_norm([weight.grad for weight in self.critics.parameters()])
        self.critic_optimizer.step()
        if with_policy:
            self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
            loss = td3_policy_loss(self.critics, self.actor, obs, goal)
            self.actor_optimizer.zero_grad()
            loss.backward()
            metrics["policy_loss"] = loss.detach()
            metrics["grad_norm"] += nn.utils.get_total_norm([weight.grad for weight in self.actor.parameters()])
            self.actor_optimizer.step()
            self.critics.requires_grad_(True)
            for slow, online in ((self.critics_target, self.critics), (self.actor_target, self.actor)):
                with torch.no_grad():
                    torch._foreach_lerp_(list(slow.parameters()), list(online.parameters()), self.tau)
        return metrics


class Agent(nn.Module):
    """Both levels, and one gradient step of the low one; every c-th time one of the high one, too."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        unit = goal_range(obs_dim, args)
        self.goal_dim = len(unit)  # G
        task = data_tools.TASKS[args.env_id]
        entries = GOAL_ENTRIES.get(task.data or args.env_id, range(self.goal_dim))
        self.register_buffer("goal_unit", torch.tensor(unit, device=args.device))  # (G,)
        self.register_buffer("goal_entries", torch.tensor(list(entries), device=args.device))  # (G,)
        self.low = TD3(obs_dim, self.goal_dim, action_dim, args)
        self.high = TD3(obs_dim, 0, self.goal_dim, args)  # its actions are goals; it has no goal itself
        self.register_buffer("rewarded", torch.tensor(not args.wait_for_reward))  # on the CPU: asked at each env step
        self.updates = 0  # of the low level
        self.corrected_goal = Recorded(functools.partial(corrected_goal, self.low.actor), args)

    def place(self, obs):
        """phi: obs (..., O) -> (..., G) in units of the goals' range."""
        return obs[..., self.goal_entries] / self.goal_unit

    @torch.no_grad()
    def act(self, obs, steps, last_place, goal, explore: bool, uniform: bool = False):
        """The high level gives a goal every c env steps of an episode, the low level follows it.

        obs (E, O), env steps in the episode so far (E,), NumPy; place and goal of the env step before (E, G);
        uniform: both levels choose at random. Returns actions (E, A), NumPy, and the new place and goal (E, G).
        """
        std = self.args.explore_std if explore else 0.0
        obs = torch.from_numpy(obs).to(self.args.device)
        place = self.place(obs)
        is_due = torch.from_numpy(steps % self.args.goal_steps == 0).to(self.args.device)  # (E,)
        new_goal = self.high.choose(obs, obs[:, :0], std, uniform or not self.rewarded)  # DEVIATION 7
        goal = torch.where(is_due[:, None], new_goal, goal_transition(last_place, goal, place))
        action = self.low.choose(obs, goal, std, uniform)
        return action.cpu().numpy(), place, goal

    def update(self, obs, action, goal, rewards, steps, terminations) -> dict:
        """One step of learning on rows of the replay; returns metrics."""
        args = self.args
        self.updates += 1
        place = self.place(obs)  # (B, c+1, G)
        # Low level (eq. 4): a random env step t of each row (DEVIATION 4)
        row = torch.arange(len(obs), device=obs.device)
        t = (torch.rand_like(steps) * steps).long()  # (B,)
        goal_t = goal_transition(place[:, 0], goal, place[row, t])  # (B, G)
        next_goal = goal_transition(place[row, t], goal_t, place[row, t + 1])  # (B, G), DEVIATION 2
        low_rewards = -next_goal.norm(dim=-1)  # eq. 3
        discount = torch.full_like(rewards, args.gamma)  # it never ends
        before = obs[row, t], goal_t, action[row, t], low_rewards
        even = self.updates % 2 == 0
        low_metrics = self.low.update(*before, obs[row, t + 1], next_goal, discount, with_policy=even)
        metrics = {f"low_{name}": value for name, value in low_metrics.items()}
        metrics["grad_norm"] = low_metrics["grad_norm"]

        # High level: a goal is worth what the whole row brought, were today's low level at work (eq. 5)
        if self.rewarded and self.updates % args.goal_steps == 0:
            if args.correction:
                goal = self.corrected_goal(obs, place, action, goal, steps)
            nothing = obs[:, 0, :0]  # (B, 0)
            discount = args.gamma * (1 - terminations)  # DEVIATION 3
            before = obs[:, 0], nothing, goal, rewards
            even = self.updates // args.goal_steps % 2 == 0
            high_metrics = self.high.update(*before, obs[:, -1], nothing, discount, with_policy=even)
            metrics |= {f"high_{name}": value for name, value in high_metrics.items()}
            metrics["grad_norm"] = low_metrics["grad_norm"] + high_metrics["grad_norm"]
        return metrics

    def progress(self, obs, action, goal, rewards, steps, terminations) -> float:
        """Share of the way to the goal that rows of the replay cover: 1 - |phi(s_0) + g - phi(s_c)| / |g|."""
        place = self.place(obs)
        left = goal_transition(place[:, 0], goal, place[:, -1]).norm(dim=-1)
        return float(1 - left.sum() / goal.norm(dim=-1).sum())


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, without noise and with random numbers of its own."""
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        place = goal = torch.zeros(num_episodes, agent.goal_dim, device=args.device)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            action, place, goal = agent.act(obs, envs.steps, place, goal, explore=False)
            obs, _, terminations, truncations, _ = envs.step(action)
            ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """A run, or the rest of it; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    place = goal = torch.zeros(args.num_envs, agent.goal_dim, device=args.device)  # (E, G) of the env step before
    rb = ReplayBuffer(obs.shape[1], action_dim, args)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb)
    parts |= dict(low_actor=agent.low.actor_optimizer, low_critics=agent.low.critic_optimizer)
    parts |= dict(high_actor=agent.high.actor_optimizer, high_critics=agent.high.critic_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts)
        place, goal = [values.to(args.device) for values in state["levels"]]
        obs = envs.set_state(state["envs"])
        global_step, gradient_step, seconds, episodes, evaluations = state["progress"]
        agent.updates = gradient_step
    (run_dir / "results.json").unlink(missing_ok=True)  # of a shorter run
    data_tools.cut_curves(writer, global_step)  # what a crash has cut off is drawn anew
    start_time = time.time() - seconds

    episodes_csv = (run_dir / "episodes.csv").open("w", buffering=1)  # written line by line
    print("env_step,episodic_return,episodic_length,rl_minutes", file=episodes_csv)
    for row in episodes:
        print(*row, sep=",", file=episodes_csv)
    stopping = global_step >= args.total_timesteps
    with tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step") as bar:
        while not stopping:
            # ALGO LOGIC: put action logic here. One action for all environments at once
            uniform = global_step < args.warmup_steps
            action, place, goal = agent.act(obs, envs.steps, place, goal, explore=True, uniform=uniform)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            rb.add(obs, action, goal.cpu(), args.reward_scale * rewards, terminations, truncations, next_obs)
            agent.rewarded |= bool(rewards.any())
            ended = terminations | truncations
            new_steps = args.num_envs
            global_step += new_steps
            bar.update(new_steps)

            # TRY NOT TO MODIFY: record the episodes that ended
            for e in np.flatnonzero(ended):
                minutes = (time.time() - start_time) / 60
                row = (global_step, float(envs.returns[e]), int(envs.steps[e]), round(minutes, 3))
                episodes.append(row)
                print(*row, sep=",", file=episodes_csv)
                last_100 = [row[1] for row in episodes[-100:]]
                curves = dict(episodic_return=row[1], episodic_length=row[2])
                curves |= dict(success=task.success(last_100), SPS=global_step / minutes / 60)
                log(writer, "charts", curves, global_step)
                bar.set_postfix(updates=gradient_step, **{f"last_{len(last_100)}": f"{np.mean(last_100):.3g}"})
            # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
            obs = next_obs
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))

            # ALGO LOGIC: training
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            while len(rb) > 0 and gradient_step < updates_due:  # the first rows come after c env steps
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without noise
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")
                log(writer, "charts", dict(goal_progress=agent.progress(*rb.newest(1_000))), global_step)

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                save(checkpoint, state | dict(levels=[place, goal], progress=progress), parts)
    for part in (envs, episodes_csv, writer):
        part.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {run_dir}")
    last_100 = [row[1] for row in episodes[-100:]]
    minutes = (time.time() - start_time) / 60
    results = dict(env_steps=global_step, updates=gradient_step, rl_minutes=minutes)
    results["last_100_return"] = float(np.mean(last_100)) if last_100 else None
    results["last_100_success"] = task.success(last_100)
    results["goal_progress"] = agent.progress(*rb.newest(1_000))
    results |= dict(evaluations=evaluations, args=asdict(args))
    save(run_dir / "results.json", results)
    print(f"finished: {run_dir}; curves: tensorboard --logdir {run_dir}")
    return results


# ----------------------------------------------------------------------------------------------------------------- run
def log(writer: SummaryWriter, group: str, values: dict, step: int) -> str:
    """Scalars to TensorBoard as group/name; returns them as text for the screen."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def save(path: Path, values: dict, parts: dict | None = None):
    """Write JSON, or with parts their states and torch's random numbers as well.

    The file is renamed when it is whole: a crash, a full disk or NaN in a network leaves the one of before.
    """
    if parts is None:
        content = json.dumps(values, indent=1).encode()
    else:
        weights = [w for part in parts.values() if isinstance(part, nn.Module) for w in part.parameters()]
        if not all(w.isfinite().all() for w in weights):
            sys.exit(f"error: learning has diverged, {path} is not written: lower the learning rate")
        states = {name: part.state_dict() for name, part in parts.items()}
        rng = [torch.get_rng_state()]
        if torch.cuda.is_initialized():
            rng.append(torch.cuda.get_rng_state())
        buffer = io.BytesIO()
        torch.save(values | states | dict(rng=rng), buffer)
        content = buffer.getbuffer()
    data_tools.write_atomically(path, lambda part: part.write_bytes(content))


def load(path: Path, parts: dict, device="cpu", made_by: dict | None = None) -> dict:
    """Put what `save` wrote into parts and torch's random numbers; returns everything."""
    state = data_tools.read_state(path, parts, device, made_by)  # refuses other files
    for name, part in parts.items():
        part.load_state_dict(state[name])
    for set_state, numbers in zip((torch.set_rng_state, torch.cuda.set_rng_state), state.get("rng", ())):
        set_state(numbers.cpu())
    return state


def evaluate(args: Args):
    """Print the scores of a trained agent with the policy's mode; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    state = load(Path(args.evaluate), dict(agent=agent))
    video = Path(args.run_dir) / f"{args.env_id}__{FILE.stem}.mp4" if args.capture_video else None
    trained = [row[1] for row in state["progress"][3][-100:]] if "progress" in state else []  # published: no rows
    if trained:
        print(f"to expect: {np.mean(trained):.3g} in training, in its last {len(trained)} episodes")
    scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, video)
    words = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    print(f"{args.env_id}: {args.eval_episodes} episodes of {args.evaluate}: {words}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, or of the run or agent given."""
    given = data_tools.command_line(Args, argv)  # unchecked: the task's defaults are to come
    saved = {}
    if given.resume:
        given.resume, saved = data_tools.saved_run(given.resume)
    if given.evaluate:
        state = data_tools.read_state(given.evaluate, ["agent"])
        saved = state["args"] | dict(script=state["script"], threads=0)
        saved |= dict(device=Args.device, run_dir=Args.run_dir)
    if (script := saved.pop("script", FILE.name)) != FILE.name:
        sys.exit(f"error: this is a run of another file: give it to {script}")
    task = data_tools.TASKS[saved.get("env_id", given.env_id)]
    defaults = dict(env_id=given.env_id, **TASK_DEFAULTS.get(task.data, {}))
    args = data_tools.command_line(Args, argv, Args(**defaults | saved), str(__doc__).split("\n")[0])
    args.resume = given.resume
    free = "resume device cudagraphs threads total_timesteps".split()
    free += "checkpoint_interval eval_interval eval_episodes".split()
    for name, value in vars(args).items():
        if given.resume and name not in free and value != saved.get(name, value):
            sys.exit(f"error: with --resume {name} cannot change")
    return args


if __name__ == "__main__":
    args = parse_args()
    args.threads = args.threads or data_tools.fastest_threads()
    torch.set_num_threads(args.threads)
    evaluate(args) if args.evaluate else train(args)
