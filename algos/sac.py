"""SAC: Soft Actor-Critic (Haarnoja et al. 2018), https://arxiv.org/abs/1812.05905, flat: no skills, no offline data

Idea: an off-policy actor-critic whose policy maximises reward and entropy: it keeps trying several ways. This is the
reference without hierarchy: it explores by single actions and is expected to find no reward in the maze.

    python algos/sac.py --env-id maze           # RL and evaluation
    python algos/sac.py --resume runs/FOLDER    # go on after Ctrl-C or a crash

Repeat:
   act: a ~ pi(s), kept for `repeat` env steps
   critics: Q(s, a) -> r_1 + .. + gamma^(n-1) r_n + gamma^n (min Q'(s', a') - alpha log pi(a' | s')) (eq. 5, 6)
   policy: maximise min Q(s, a) - alpha log pi(a | s) (eq. 9); tune alpha so that the policy's entropy
      becomes -A nats, A being the number of entries of an action

Why hierarchy may help (Nachum et al. 2019, https://arxiv.org/abs/1909.10618): it trains over longer times, which n-step
targets do as well (--n-step 3), and it explores over longer times, which repeated actions do as well (--repeat 10).
Soft Q-learning (Haarnoja et al. 2017) is the same idea with a soft maximum over actions in place of the policy.
Not goal-conditioned; not pre-trained; decides at each env step; off-policy.

Free choices, where the paper's versions differ: log std in [-5, 2] by a tanh, min of both critics in the policy loss.
Differences from the paper, marked DEVIATION n below
1. 8 environments side by side (paper: 1), with .5 updates per env step (paper: 1; our results: .1, --updates-per-step).
2. Observations are scaled, with sines and cosines of positions, as in skimo.py (--no-position-features: scaled only).
3. Rewards are scaled: by .01 in the maze and on CALVIN, where the goal and each sub-task give 100.
Ends and time-outs are told apart: only a true end has no future.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, POSITION_PERIODS, policy_loss, rollout, ReplayBuffer, Agent, train,
    evaluate, parse_args, check_args, main
Score with --updates-per-step 0.1, two seeds: 0 in the maze and both kitchens; CALVIN 0 in the last 50,000 of 300,000
env steps. Its control, Gymnasium's pendulum: -119 (algos/README.md). No CPU preset: on two threads of a Xeon an update
takes 6 ms, so those of 300,000 env steps should take 15 minutes (not run).
Shapes: B batch, O observation, F inputs, A action, E environments.
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
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    cudagraphs: bool = torch.cuda.is_available()  # replay updates as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments side by side (DEVIATION 1)
    warmup_steps: int = 10_000  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.5  # gradient updates per env step after the warm-up (DEVIATION 1)
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    learning_rate: float = 3e-4  # of critics, policy and log alpha
    gamma: float = 0.99  # discount per env step
    tau: float = 0.005  # share of the online weights in a target update, after each update
    n_step: int = 1  # rewards that are added up before the critics take over
    repeat: int = 1  # env steps for which an action is kept while exploring, even if its episode ends before
    reward_scale: float = 1.0  # factor on the task's reward
    hidden_dim: int = 256  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 2)


# DEVIATION 3: rewards of 100 become 1; else alpha, which is tuned in nats, would have to grow a hundredfold.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01),
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


# -------------------------------------------------------------------------------------------------------------- losses
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


# -------------------------------------------------------------------------------------------------------------- acting
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
    """The last buffer_size transitions over n env steps, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        rows = args.buffer_size
        self.n_step = args.n_step
        self.gamma = args.gamma
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(rows, obs_dim, device=args.device),
            action=torch.zeros(rows, action_dim, device=args.device),
            rewards=torch.zeros(rows, device=args.device),
            next_obs=torch.zeros(rows, obs_dim, device=args.device),
            discount=torch.zeros(rows, device=args.device),
        )
        self.added = 0  # rows ever added
        self.running = [[] for _ in range(args.num_envs)]  # the last steps, whose n rewards are not complete yet

    def __len__(self):
        return min(self.added, len(self.columns["obs"]))

    def add(self, obs, action, rewards, terminations, truncations, next_obs):
        """One env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), the others (E,).

        A time-out is no end: the value of next_obs counts. n steps are cut short where an episode ends.
        """
        rows = []
        ended = terminations | truncations
        for e, running in enumerate(self.running):
            running.append([obs[e], action[e], 0.0, 1.0])  # the sum of rewards so far, and the next one's discount
            for step in running:
                step[2] += step[3] * float(rewards[e])
                step[3] *= self.gamma
            complete = len(running) if ended[e] else max(0, len(running) - self.n_step + 1)
            for o, a, reward, discount in running[:complete]:
                discount = 0.0 if terminations[e] else discount
                rows.append((o, a, np.float32(reward), next_obs[e], np.float32(discount)))
            self.running[e] = running[complete:]
        if rows:
            index = torch.arange(self.added, self.added + len(rows), device=self.device) % len(self.columns["obs"])
            for name, values in zip(self.columns, zip(*rows)):
                values = torch.from_numpy(np.stack(values).astype(np.float32))
                self.columns[name][index] = values.to(self.device)
            self.added += len(rows)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), rewards (B,), next_obs (B, O), discount (B,)."""
        index = torch.randint(len(self), (batch_size,), device=self.device)
        return [column[index] for column in self.columns.values()]

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        running = [
            [(torch.from_numpy(obs), torch.from_numpy(action), *numbers) for obs, action, *numbers in steps]
            for steps in self.running
        ]
        return dict(filled, added=self.added, running=running)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        self.running = [
            [[obs.numpy(), action.numpy(), *numbers] for obs, action, *numbers in steps] for steps in state["running"]
        ]
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
    """Policy, critics with their slow copies, alpha, and one gradient step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args)
        self.critics = TwinQ(obs_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = -float(action_dim)  # nats
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = adam(self.critics.parameters())
        self.policy_optimizer = adam(self.actor.parameters())
        self.alpha_optimizer = adam([self.log_alpha])
        self.update = recorded(self.update, args)

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """A sample of the policy or its mode: obs (E, O) -> actions (E, A), both NumPy."""
        mean, std = self.actor(torch.from_numpy(obs).to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    def update(self, obs, action, rewards, next_obs, discount) -> dict:
        """One step of critics, policy, alpha and the slow copies on a batch of transitions; returns metrics."""
        alpha = self.log_alpha.exp().detach()
        batch = obs, action, rewards, next_obs, discount
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

        # Alpha rises while the policy is less random than target_entropy (eq. 18).
        self.alpha_optimizer.zero_grad()
        (self.log_alpha.exp() * (policy_metrics["entropy"] - self.target_entropy)).backward()
        self.alpha_optimizer.step()
        update_target(self.target, self.critics, self.args.tau)
        return dict(metrics, **policy_metrics, alpha=alpha, grad_norm=critic_norm + policy_norm)


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
    rb = ReplayBuffer(obs.shape[1], action_dim, args)
    action = np.zeros((args.num_envs, action_dim), dtype=np.float32)
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(critics=agent.critic_optimizer, policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            action = state["action"].numpy()
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
        # ALGO LOGIC: put action logic here. One action for all environments at once, kept for `repeat` env steps
        if (global_step // args.num_envs) % args.repeat == 0:
            if global_step < args.warmup_steps:
                action = 2 * torch.rand(action.shape).numpy() - 1  # (E, A)
            else:
                action = agent.act(obs, explore=True)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(obs, action, args.reward_scale * rewards, terminations, truncations, next_obs)
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
        updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
        while len(rb) > 0 and gradient_step < updates_due:  # with n_step the first rows come later
            metrics = agent.update(*rb.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate with the policy's mode
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            choose_action = functools.partial(agent.act, explore=False)
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
                action=torch.from_numpy(action),
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
        choose_action = functools.partial(agent.act, explore=False)
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
    """--evaluate: episodes of a trained agent with the policy's mode; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    choose_action = functools.partial(agent.act, explore=False)
    returns, lengths = rollout(choose_action, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(choose_action, 1, args, 10_000 + args.seed, video)
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
    if args.buffer_size < args.num_envs * args.n_step:
        sys.exit("error: --buffer-size is smaller than --num-envs times --n-step; raise it")
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
