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

DEVIATION n: differences from the paper, whose learning code was not released. Why, and scores: algos/docs/relay.md
1. PPO in place of the natural gradient. Its demonstrations are 20,000 relabelled pairs, kept in the model's file; own
   roll-outs never join them (the paper's DAPG variant).
2. Only the low level is fine-tuned. With --flat the reward is the task's.
3. The high level sees the objects' entries of a goal only. The user's goal: the present state, the task's objects done.
4. Widths, step sizes and the like are ours, and sines of positions as inputs. PPO explores with a small, fixed std, and
   advantages are divided by their std + .01 (Spinning Up, otherwise equal: by their std).
5. When the task ends while a subgoal is pursued, the value of the last state still counts. With --flat it does not.
Differs from skimo.py in: PRETRAINED, Args, TASK_DEFAULTS, GOAL_ENTRIES, make_networks, pretrain_loss, pretrain,
ppo_loss, RolloutBuffer, Agent, rollout, train, parse_args
Shapes: B batch, O observation, A action, E environments, H steps per subgoal, T env steps, X entries of an
output. A goal or subgoal z is a state (O,).
"""

import copy
import gc
import hashlib
import io
import json
import os
import sys
import threading
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
import data_tools  # tasks, offline data, chores; nothing of a method

PRETRAINED = "relay"  # begins the names of pre-trained models


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin; others need entries in GOALS, GOAL_ENTRIES
    total_timesteps: int = 200_000  # env steps of fine-tuning
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    data: str = "scripted"  # offline data: scripted, d4rl (people's, of the kitchens), release (the authors') or a path
    pretrained: str | None = None  # start RRF from this model
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4

    # Seldom changed
    data_share: float = 1.0  # share of the data's episodes that are used, the first of a fixed permutation
    data_dir: str | None = None  # folder of offline data and pre-trained models (None: SKIMO_DATA_DIR or cache)
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with the means of both levels
    pretrain_eval_interval: int = 5_000  # updates between validations with roll-outs
    pretrain_eval_episodes: int = 20  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 30  # H: env steps for which a subgoal is kept
    flat: bool = False  # one level: actions for the user's goal, no subgoals
    hidden_dim: int = 256  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 4)

    # Pre-training (with --pretrained windows and rows have to fit, the rest does not count)
    low_window: int = 30  # W_l: farthest goal of the low level, and farthest subgoal, in env steps
    high_window: int = 260  # W_h: farthest goal of the high level
    pretrain_updates: int = 5_000  # gradient updates
    pretrain_batch_size: int = 256  # pairs of rows per update and level
    pretrain_lr: float = 1e-3  # first learning rate; it falls to zero
    demo_rows: int = 20_000  # relabelled pairs that fine-tuning goes on to imitate

    # Downstream RL
    num_envs: int = 8  # environments side by side
    rollout_skills: int = 50  # subgoals per environment between two rounds of updates
    epochs: float = 3.0  # updates of a round, as passes through what was collected (rows are drawn at random)
    batch_size: int = 256  # env steps per update
    learning_rate: float = 3e-5  # of the low level
    value_lr: float = 1e-3  # of its value
    gamma: float = 0.99  # discount per env step
    max_std: float = 0.03  # the low level explores with the std of RIL, but no more than this (DEVIATION 4)
    subgoal_eps: float = 0.3  # a subgoal is reached within this distance (root mean square, in standard deviations)
    demo_coef: float = 0.1  # lambda: weight of imitation, times .999 after each round
    reward_scale: float = 1.0  # factor on the task's reward (only --flat learns from it)

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, total_timesteps=0, batch_size=2, max_std=0.007)  # policies have no smaller std
        most = dict(gamma=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")
        if self.env_id not in GOALS:
            sys.exit(f"error: --env-id {self.env_id} has no goal here; add it to GOALS and GOAL_ENTRIES")


# By the name of a task's data
TASK_DEFAULTS = {
    "maze": dict(high_window=460, reward_scale=0.01, subgoal_eps=0.05),  # .3 would pay for standing still
    "calvin": dict(high_window=360, reward_scale=0.01),
}
# What the user wants, by task: entries of an observation, and their values.
GOALS = {
    "maze": {0: 18.0, 1: 8.0},
    # Microwave, kettle, bottom burner, light switch
    "kitchen": {22: -0.75, 23: -0.23, 24: 0.75, 25: 1.62, 26: 0.99, 27: 0.0, 28: 0.0, 29: -0.06,
                11: -0.88, 12: -0.01, 17: -0.69, 18: -0.05},
    # Microwave, light switch, slide and hinge cabinet
    "kitchen-misaligned": {22: -0.75, 17: -0.69, 18: -0.05, 19: 0.37, 20: 0.0, 21: 1.45},
    "calvin": {16: 0.2, 18: 0.088, 19: 1.0, 15: 0.25, 20: 1.0},  # drawer, switch and bulb, slider, LED
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks
# By the name of a task's data or the task's own. DEVIATION 3: the high level sees only these of a goal.
GOAL_ENTRIES = {"maze": slice(0, 2), "kitchen": slice(9, 30), "calvin": slice(15, 21)}
# First and last + 1 of the entries that jump by 2 pi: the Euler angles of CALVIN's tool.
ANGLE_ENTRIES = {"calvin": (3, 6)}


def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def unwrap(obs, near, args: Args):
    """obs (..., O) with its angles as the numbers nearest to those of near (..., O), for they jump by 2 pi."""
    first, last = ANGLE_ENTRIES.get(data_tools.TASKS[args.env_id].data, (0, 0))
    obs = obs.clone()
    turns = (obs - near)[..., first:last] / (2 * np.pi)
    obs[..., first:last] -= 2 * np.pi * turns.round()
    return obs


class GoalNetwork(nn.Module):
    """Observations (..., O) and goals (..., O), of which it sees the entries `seen` -> (..., out_dim)."""

    def __init__(self, obs_dim: int, seen: slice, out_dim: int, args: Args):
        super().__init__()
        self.args, self.seen = args, seen
        task = data_tools.TASKS[args.env_id]
        periods = task.position_periods if args.position_features else np.zeros((0, 0))
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.register_buffer("mean", torch.zeros(obs_dim))  # (O,) of the offline data
        self.register_buffer("std", torch.ones(obs_dim))  # (O,)
        in_dim = obs_dim + 2 * periods.size + seen.stop - seen.start
        self.net = relu_mlp(in_dim, args.hidden_dim, args.hidden_dim, out_dim)

    def forward(self, obs, goal):
        obs = unwrap(obs, self.mean, self.args)
        goal = unwrap(goal, obs, self.args)
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)  # (..., places * periods)
        state = (obs - self.mean) / self.std  # (..., O)
        way = (goal - obs) / self.std  # (..., O)
        return self.net(torch.cat([state, phase.sin(), phase.cos(), way[..., self.seen]], -1))


class GoalPolicy(nn.Module):
    """pi(x | s, g): a Gaussian over x, which is an action (low level) or a subgoal (high level)."""

    def __init__(self, obs_dim: int, seen: slice, out_dim: int, args: Args):
        super().__init__()
        self.net = GoalNetwork(obs_dim, seen, out_dim, args)
        self.log_std = nn.Parameter(torch.zeros(out_dim))  # DEVIATION 4: of all states

    def forward(self, obs, goal):  # mean (..., X) and std (X,)
        return self.net(obs, goal), self.log_std.clamp(-5, 2).exp()

    def act(self, obs, z):  # the environment clips actions to +-1
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
        for name, size in dict(obs=obs_dim, goal=obs_dim, action=action_dim).items():
            self.register_buffer(name, torch.zeros(args.demo_rows, size))

    def sample(self, batch_size: int):
        """Uniform pairs: obs (B, O), goal (B, O), action (B, A)."""
        rows = torch.randint(len(self.obs), (batch_size,), device=self.obs.device)
        return self.obs[rows], self.goal[rows], self.action[rows]


def make_networks(args: Args) -> nn.ModuleDict:
    """The networks of pre-training: low level, high level (not with --flat), and what is kept of the demonstrations."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    objects = GOAL_ENTRIES[data_tools.TASKS[args.env_id].data or args.env_id]
    seen = objects if args.flat else slice(0, obs_dim)
    networks = dict(low=GoalPolicy(obs_dim, seen, action_dim, args))
    if not args.flat:
        networks["high"] = HighPolicy(obs_dim, objects, obs_dim, args)
    networks["demonstrations"] = Demonstrations(obs_dim, action_dim, args)
    return nn.ModuleDict(networks).to(args.device)


# -------------------------------------------------------------------------------------------------------- pre-training
def relabel(data, batch_size: int, args: Args) -> dict:
    """Relay data relabelling (RPL algorithms 2 and 3): whatever a demonstration reached later was its goal.

    Returns for each level what its policy sees and should say: obs, goal (B, O), action (B, A) or subgoal (B, O).
    All pairs (t, w) of an episode are equally likely. The high level's subgoal is the goal itself where that is near.
    """
    t, w = data.sample_pairs(batch_size, args.high_window if args.flat else args.low_window)  # 2 x (B,)
    batches = dict(low=(data.observations[t], data.observations[t + w], data.actions[t]))
    if not args.flat:
        t, w = data.sample_pairs(batch_size, args.high_window)
        subgoal = unwrap(data.observations[t + w.clamp(max=args.low_window)], data.observations[t], args)
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


@torch.no_grad()
def prepare(networks, data, args: Args):
    """Before pre-training: scales of observations, and the pairs that fine-tuning will imitate (DEVIATION 1)."""
    observations = unwrap(data.observations, data.observations[0], args)
    for level in networks.keys() - {"demonstrations"}:
        network = networks[level].net
        network.mean.copy_(observations.mean(0))
        network.std.copy_(observations.std(0).clamp(min=0.02))  # what hardly moves: ours (DEVIATION 4)
    pairs = relabel(data, args.demo_rows, args)["low"]
    for kept, drawn in zip(networks["demonstrations"].buffers(), pairs):  # obs, goal, action
        kept.copy_(drawn)


def pretrain(args: Args, networks: nn.ModuleDict, data, writer: SummaryWriter, stop: threading.Event) -> dict:
    """Phase 1, RIL: both levels imitate the relabelled offline data; returns facts about them.

    A model is found again by its data, seed and task, by the arguments from skill_horizon up to num_envs, and by the
    code of these sections and of what draws batches: whoever changes one of them gets a new one.
    """
    task = data_tools.TASKS[args.env_id]
    family = f"{PRETRAINED}_{task.data or args.env_id}"  # both kitchens share their data
    names, settings = list(vars(args)), list(vars(args).items())
    first, middle, end = (names.index(name) for name in ("skill_horizon", "pretrain_updates", "num_envs"))
    made_by = dict(method=PRETRAINED, data=task.data or args.env_id) | dict(settings[first:middle])
    path = Path(args.pretrained or "")
    if not args.pretrained:
        code = FILE.read_text().split("- networks\n")[1].split("- downstream RL\n")[0]
        made_from = [data.fingerprint, args.seed, settings[first:end], data_tools.code_of(code), task.arm, task.objects]
        made_from += [task.obs_scale, task.obs_shift, task.position_periods.tolist()]
        key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
        path = data_tools.cache_dir(args.data_dir) / "pretrained" / f"{family}_{key}.pt"
    if args.pretrained or path.exists():
        print(f"pre-trained model: {path}")
        return load(path, dict(networks=networks), made_by=made_by)["facts"]

    train_data, valid_data = data.to(args.device).split(0.99, 2)
    prepare(networks, train_data, args)
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, fused=True)
    parts = dict(networks=networks, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    updates, seconds = 0, 0.0
    if unfinished.exists():  # go on where an earlier command was stopped
        updates, seconds = load(unfinished, parts)["progress"]
    data_tools.cut_curves(writer, updates, "pretrain/")  # what a crash has cut off is drawn anew
    start_time = time.time() - seconds

    def gradients(*tensors):  # obs, goal, target of the low level, then of the high one
        batches = dict(low=tensors[:3]) if args.flat else dict(low=tensors[:3], high=tensors[3:])
        loss, metrics = pretrain_loss(networks, batches)
        optimizer.zero_grad()
        loss.backward()
        return metrics

    gradients = Recorded(gradients, args)
    total = args.pretrain_updates
    with tqdm(desc="pre-training", total=total, initial=updates, unit="update") as bar:
        while updates < total:
            optimizer.param_groups[0]["lr"] = args.pretrain_lr * (1 - updates / total)
            batches = relabel(train_data, args.pretrain_batch_size, args)
            metrics = gradients(*[x for batch in batches.values() for x in batch])
            metrics["grad_norm"] = nn.utils.get_total_norm([weight.grad for weight in networks.parameters()])
            optimizer.step()
            updates += 1
            bar.update()

            finished = updates == total
            if finished or updates % 100 == 0:
                bar.set_postfix_str(", ".join(log(writer, "pretrain", metrics, updates).split(", ")[:2]))
            if finished or updates % args.pretrain_eval_interval == 0:
                with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []), torch.no_grad():
                    _, losses = pretrain_loss(networks, relabel(valid_data, args.pretrain_batch_size, args))
                    # Losses do not tell whether the policies are any good: let them act in the task
                    agent = Agent(args, copy.deepcopy(networks))  # a copy: Agent freezes parts of them
                    scores = rollout(agent, args, args.pretrain_eval_episodes * (4 if finished else 1), args.seed)
                facts = dict(prior_return=scores["episodic_return"], prior_success=scores["success"])
                facts |= {f"valid_{name}": float(value) for name, value in losses.items()}
                bar.write(f"update {updates}: {log(writer, 'pretrain', facts, updates)}")
            if not finished and (stop.is_set() or updates % 2_500 == 0):
                save(unfinished, dict(progress=(updates, time.time() - start_time)), parts)
            if stop.is_set() and not finished:
                sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {writer.log_dir}")
    facts |= dict(updates=updates, minutes=(time.time() - start_time) / 60, data=data.source)
    save(path, dict(facts=facts, made_by=made_by), dict(networks=networks))
    unfinished.unlink(missing_ok=True)
    print(f"pre-trained model: {path}")
    return facts


# ------------------------------------------------------------------------------------------------------- downstream RL
def ppo_loss(low, value, obs, z, action, log_prob, advantages, returns, demo, demo_std, demo_coef):
    """RRF of the low level (RPL eq. 2): PPO on the reward of subgoals, and imitation.

    obs, z (B, O), action (B, A), log_prob, advantages, returns (B,), demo as `relabel` gives it, demo_std (A,),
    demo_coef (). Returns the loss and metrics, scalars.
    """
    # Actions that did better than expected become more likely, but not by more than a fifth (PPO eq. 7).
    change = log_probability(low(obs, z), action) - log_prob  # (B,)
    ratio = change.exp()
    clipped = ratio.clamp(0.8, 1.2)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 0.01)  # DEVIATION 4: noise stays little
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()

    # The value is what to expect; the advantages are what exceeded it.
    value_loss = 0.5 * (value(obs, z).squeeze(-1) - returns).square().mean()

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
    """Generalised advantage estimates (GAE eq. 16) and what the value should be, 2 x (T, E); time-first.

    rewards, values, next_values (T, E); bootstrap (T, E): whether the next value counts; goes_on
    (T, E): whether row t + 1 follows on row t.
    """
    advantages = rewards + args.gamma * bootstrap * next_values - values  # (T, E), one-step errors at first
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += args.gamma * 0.95 * goes_on[t] * advantages[t + 1]  # GAE's lambda, ours (DEVIATION 4)
    return advantages, advantages + values


class RolloutBuffer:
    """The env steps since the last round of updates, as rows on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        room = args.num_envs * args.rollout_skills * args.skill_horizon
        sizes = [obs_dim], [obs_dim], [action_dim], [], [], []  # as `sample` returns them
        self.columns = [torch.zeros(room, *size, device=args.device) for size in sizes]
        self.rows = 0  # filled so far
        self.skills = 0  # subgoals per environment so far

    def add(self, *rows):
        """Rows of one subgoal, as `sample` returns them."""
        for column, values in zip(self.columns, rows):
            column[self.rows : self.rows + len(values)] = values
        self.rows += len(rows[0])
        self.skills += 1

    def sample(self, batch_size: int):
        """Uniform rows: obs, z (B, O), action (B, A), log_prob, advantages, returns (B,)."""
        index = torch.randint(self.rows, (batch_size,), device=self.columns[0].device)
        return [column[index] for column in self.columns]

    def state_dict(self) -> dict:
        filled = [column[: self.rows].clone() for column in self.columns]
        return dict(columns=filled, rows=self.rows, skills=self.skills)

    def load_state_dict(self, state: dict):
        self.rows, self.skills = state["rows"], state["skills"]
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


class Agent(nn.Module):
    """Both levels, the low level's value, and one step of PPO."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.networks = networks
        self.low = networks["low"]
        self.value = GoalNetwork(len(self.low.net.mean), self.low.net.seen, 1, args).to(args.device)
        self.value.mean.copy_(self.low.net.mean)
        self.value.std.copy_(self.low.net.std)
        nn.init.zeros_(self.value.net[-1].weight)  # nothing is expected before something was reached
        nn.init.zeros_(self.value.net[-1].bias)
        self.register_buffer("demo_coef", torch.tensor(args.demo_coef, device=args.device))
        self.register_buffer("demo_std", self.low.log_std.detach().exp())
        with torch.no_grad():
            self.low.log_std.clamp_(max=float(np.log(args.max_std)))
        self.low.log_std.requires_grad_(False)
        groups = [dict(params=self.low.net.parameters(), lr=args.learning_rate)]  # DEVIATION 2: the low level alone
        groups += [dict(params=self.value.parameters(), lr=args.value_lr)]
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=True)
        self.update = Recorded(self.update, args)

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> subgoals z (E, O) on the CPU: always the mean of pi_h(z | s, g), with --flat g itself.

        DEVIATION 3: the user's goal g is the present state with the task's objects where they should be.
        """
        obs = torch.from_numpy(obs)
        goal = obs.clone()
        for entry, value in GOALS[self.args.env_id].items():
            goal[:, entry] = value
        if self.args.flat:
            return goal
        return self.networks["high"](obs.to(self.args.device), goal.to(self.args.device))[0].cpu()

    @torch.no_grad()
    def rows(self, z, trace):
        """The env steps of one subgoal as rows of the buffer, without those after an episode's end.

        z (E, O), trace as `collect` returns it. Returns the rows and the share of environments that got there, ().
        """
        args = self.args
        trace = [values.to(args.device) for values in trace]
        obs, action, next_obs, rewards, terminations, truncations, running = trace
        z = z.to(args.device).expand_as(obs)  # (T, E, O)
        ended = terminations | truncations  # (T, E)
        way = unwrap(z, next_obs, args) - next_obs
        distance = (way / self.low.net.std).square().mean(-1).sqrt()
        reached = distance < args.subgoal_eps  # (T, E)
        if args.flat:
            rewards = args.reward_scale * rewards
            bootstrap = ~terminations
        else:
            rewards = reached.float()
            bootstrap = torch.ones_like(ended)  # DEVIATION 5
            if len(obs) == args.skill_horizon:
                bootstrap[-1] = False  # after its last step a subgoal pays nothing
        values = self.value(obs, z).squeeze(-1)  # (T, E)
        next_values = self.value(next_obs, z).squeeze(-1)
        advantages, returns = advantages_and_returns(rewards, values, next_values, bootstrap, ~ended, args)
        columns = obs, z, action, log_probability(self.low(obs, z), action), advantages, returns
        return [column[running] for column in columns], reached.any(0).float().mean()

    def update(self, obs, z, action, log_prob, advantages, returns) -> dict:
        """One gradient step of low level and value on rows of the roll-outs; returns metrics."""
        demo = self.networks["demonstrations"].sample(len(obs))
        batch = obs, z, action, log_prob, advantages, returns
        loss, metrics = ppo_loss(self.low, self.value, *batch, demo, self.demo_std, self.demo_coef)
        self.optimizer.zero_grad()
        loss.backward()
        parts = self.low.net, self.value
        norms = [nn.utils.get_total_norm([weight.grad for weight in part.parameters()]) for part in parts]
        self.optimizer.step()
        return dict(metrics, demo_coef=self.demo_coef, grad_norm=sum(norms))


@torch.no_grad()
def collect(envs, act, obs, z, args: Args):
    """H env steps towards subgoals z (E, O) by act, a method of the low level, on the CPU next to the simulator.

    Returns next_obs (E, O), ended (E,) and the steps, time-first tensors: obs (T, E, O), action (T, E, A), next_obs,
    rewards, terminations, truncations (T, E) and whether the episode had not ended before (T, E).
    """
    running = np.ones(len(obs), dtype=bool)
    steps = []
    for _ in range(args.skill_horizon):
        action = act(torch.from_numpy(obs), z).numpy()  # (E, A)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        steps.append((obs, action, next_obs, rewards, terminations, truncations, running))
        obs = next_obs
        running = ~(terminations | truncations)
        if not running.any():
            break
    return obs, ~running, [torch.from_numpy(np.stack(values)) for values in zip(*steps)]


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, global_step=None, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, without exploration noise and with random numbers of
    its own, at any global_step.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    low = copy.deepcopy(agent.low).cpu()  # acts next to the simulator
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            z = agent.choose_skills(obs, global_step, explore=False)
            obs, ended, _ = collect(envs, low.act, obs, z, args)
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """Both phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.num_envs * args.rollout_skills * args.skill_horizon)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if not (args.pretrained or checkpoint.exists()):  # before there is a folder: data may be refused
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    networks = make_networks(args)
    facts = {} if checkpoint.exists() else pretrain(args, networks, data, writer, stop)

    # Phase 2, RRF: fine-tuning of the low level
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = RolloutBuffer(obs.shape[1], envs.single_action_space.shape[0], args)
    global_step, new_steps, gradient_step, seconds = 0, 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, optimizer=agent.optimizer)
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        obs = envs.set_state(state["envs"])
        global_step, gradient_step, seconds, episodes, evaluations, facts = state["progress"]
    (run_dir / "results.json").unlink(missing_ok=True)  # of a shorter run
    data_tools.cut_curves(writer, global_step)  # what a crash has cut off is drawn anew
    start_time = time.time() - seconds
    low = copy.deepcopy(agent.low).cpu()  # acts next to the simulator

    episodes_csv = (run_dir / "episodes.csv").open("w", buffering=1)  # written line by line
    print("env_step,episodic_return,episodic_length,rl_minutes", file=episodes_csv)
    for row in episodes:
        print(*row, sep=",", file=episodes_csv)
    with tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step") as bar:
        while True:
            # Save all that the future of the run depends on; with --total-timesteps 0 what RIL has learnt
            stopping = global_step >= args.total_timesteps or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations, facts
                save(checkpoint, state | dict(progress=progress), parts)
            if stopping:
                break

            # ALGO LOGIC: put action logic here. One subgoal for each environment, then H env steps
            z = agent.choose_skills(obs, global_step, explore=True)  # (E, O)
            steps_before = envs.steps.sum()
            next_obs, ended, trace = collect(envs, low.explore, obs, z, args)
            rows, reached = agent.rows(z, trace)
            rb.add(*rows)
            new_steps = int(envs.steps.sum() - steps_before)
            global_step += new_steps
            bar.update(new_steps)
            if not args.flat:
                log(writer, "charts", dict(subgoals_reached=reached), global_step)

            # TRY NOT TO MODIFY: record the episodes that ended
            for e in np.flatnonzero(ended):
                minutes = (time.time() - start_time) / 60
                row = (global_step, float(envs.returns[e]), int(envs.steps[e]), round(minutes, 3))
                episodes.append(row)
                print(*row, sep=",", file=episodes_csv)
                last_100 = [row[1] for row in episodes[-100:]]  # the paper shows training episodes
                curves = dict(episodic_return=row[1], episodic_length=row[2])
                curves |= dict(success=task.success(last_100), SPS=global_step / minutes / 60)
                log(writer, "charts", curves, global_step)
                bar.set_postfix(updates=gradient_step, **{f"last_{len(last_100)}": f"{np.mean(last_100):.3g}"})
            # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
            obs = next_obs
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))

            # ALGO LOGIC: training. On-policy: what was collected is used for one round and thrown away
            if rb.skills == args.rollout_skills:
                for _ in range(max(1, int(args.epochs * rb.rows / args.batch_size))):
                    metrics = agent.update(*rb.sample(args.batch_size))
                    gradient_step += 1
                    if gradient_step % 100 == 0:
                        log(writer, "losses", metrics, global_step)
                agent.demo_coef *= 0.999
                rb.rows = rb.skills = 0
                low = copy.deepcopy(agent.low).cpu()

            # Evaluate without exploration noise
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, global_step)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")
    for part in (envs, episodes_csv, writer):
        part.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {run_dir}")
    last_100 = [row[1] for row in episodes[-100:]]
    minutes = (time.time() - start_time) / 60
    results = dict(env_steps=global_step, updates=gradient_step, rl_minutes=minutes)
    results["last_100_return"] = float(np.mean(last_100)) if last_100 else None
    results["last_100_success"] = task.success(last_100)
    results |= dict(evaluations=evaluations, pretraining=facts, args=asdict(args))
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
    """Print the scores of a trained agent, acting as in a run's evaluations; needs neither data nor training."""
    agent = Agent(args, make_networks(args))
    state = load(Path(args.evaluate), dict(agent=agent))
    video = Path(args.run_dir) / f"{args.env_id}__{FILE.stem}.mp4" if args.capture_video else None
    trained = [row[1] for row in state["progress"][3][-100:]] if "progress" in state else []  # published: no rows
    if trained:
        print(f"to expect: {np.mean(trained):.3g} in training, in its last {len(trained)} episodes")
    scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, state["global_step"], video)
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
