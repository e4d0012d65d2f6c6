"""DIAYN: Diversity Is All You Need (Eysenbach et al. 2019), https://arxiv.org/abs/1802.06070, then a controller

Idea: learn skills without any task. A discriminator q(z | s) guesses from a state which skill led there; a skill is
paid for states that give it away. What comes out is a set of skills that go to different places. A controller then
learns a task by choosing skills: soft Q-learning with an exact soft maximum, as there are only Z of them.

    python algos/diayn.py --env-id maze           # discovery, control and evaluation
    python algos/diayn.py --resume runs/FOLDER    # go on after Ctrl-C or a crash

Discovery, for discover_steps env steps; the task's reward is not looked at. Repeat:
   act: z ~ p(z), uniform, at the beginning of an episode; a ~ pi(s, z)
   discriminator: maximise log q(z | s)
   reward: r = log q(z | s) - log p(z) (eq. 3), a lower bound of I(S; Z) <= log Z nats
   SAC with (s, z) as its state, r as its reward and a fixed alpha, which is the term H[A | S, Z] (eq. 2)
Control, skills do not change any more. Repeat:
   act: every skill_horizon env steps z ~ softmax(Q(s, .) / alpha); a ~ pi(s, z)
   Q(s, z) -> R + gamma V(s'), R the task's reward in that time, V(s) = alpha log mean_z exp(Q(s, z) / alpha)

Why - log p(z) (--no-subtract-log-p-z leaves it out): it is a constant, but without it each reward is negative, and
where an episode can end early, skills learn to end it. Why not just a high entropy: random actions are not various
states, and what is random cannot be controlled. p(z) stays uniform: a learnt one collapses to a few skills.
Not goal-conditioned; pre-trained, without data; a skill lasts a fixed time; off-policy.
Expect about 0 on our tasks: skills that differ are not skills that help. In the maze they go some cells far and the
goal is 34 away; in the Kitchen an arm that moves by chance rarely moves an object. On CALVIN training episodes do .4
sub-tasks, by exploration.

Free choices: sac.py's tanh Gaussian, two critics and weights to start from (release: a mixture of 4 Gaussians, one
critic and a value network, Xavier); the discriminator sees where things are (DISC_ENTRIES; the paper's "DIAYN+prior");
how far apart positions look to it (DISC_SCALE); episodes of 400 and skills of 100 env steps in the maze; all of
control, which the paper tells little about: batch, updates, gamma and tau are those of discovery. Only true ends have
no future, time-outs have one.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, POSITION_PERIODS, Inputs, policy_loss, rollout, ReplayBuffer, Agent,
    train, evaluate, parse_args, check_args, main
Shapes: B batch, O observation, F inputs, A action, Z skills (z is one-hot), E environments.
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
    eval_episodes: int = 20  # episodes of an evaluation, without exploration
    capture_video: bool = False  # record an evaluation episode as MP4 at the end
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # Discovery of skills
    discover_steps: int = 200_000  # env steps without the task's reward, warm-up included; control has the rest
    discover_length: int = 1_000  # env steps of an episode in discovery, at most; then another skill begins
    skill_dim: int = 20  # number of skills Z (release: 50)
    subtract_log_p_z: bool = True  # - log p(z) = log Z in the reward
    disc_obs: Literal["positions", "all"] = "positions"  # what the discriminator sees: DISC_ENTRIES or all of s
    disc_next_obs: bool = False  # it sees s_{t+1}, as in the paper's Algorithm 1, and not s_t as in the release
    alpha: float = 0.1  # weight of the entropy of actions

    # Control
    skill_horizon: int = 10  # env steps per skill
    controller_alpha: float = 0.1  # weight of the entropy of skills, in scaled rewards
    controller_dim: int = 256  # width of hidden layers of the controller
    reward_scale: float = 1.0  # factor on the task's reward

    # Both
    total_timesteps: int = 300_000  # env steps of discovery and control
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 1_000  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.5  # gradient updates per env step after the warm-up (release: 1)
    batch_size: int = 128  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    learning_rate: float = 3e-4  # of all networks
    gamma: float = 0.99  # discount per env step in discovery, per skill in control
    tau: float = 0.01  # share of the online weights in a target update, after each update
    hidden_dim: int = 300  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py


# Rewards of 100 are scaled to 1, so that one controller_alpha serves all tasks.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, discover_length=400, skill_horizon=100),
    "kitchen": dict(total_timesteps=200_000, discover_steps=130_000),
    "kitchen-misaligned": dict(total_timesteps=200_000, discover_steps=130_000),
    "calvin": dict(reward_scale=0.01),
}

# First entry of an observation that the discriminator sees, and one past the last. Joints and velocities would let it
# tell skills apart by how an arm trembles.
DISC_ENTRIES = {
    "maze": (0, 2),  # position
    "kitchen": (9, 30),  # objects
    "kitchen-misaligned": (9, 30),
    "calvin": (15, 21),  # slider, drawer, button, switch, bulb, LED
}

# Factor on these entries: what is far apart must look so, 5 cells in the maze, .2 m of slider and drawer on CALVIN.
DISC_SCALE = {"maze": 8.0, "calvin": 5.0}

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
    """Observations (..., O), scaled, with sines and cosines of positions -> inputs (..., F) of networks, F = size.

    Observations may end in a one-hot skill, which stays as it is; then O counts both.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = np.zeros((0, 0))
        if args.position_features:
            periods = POSITION_PERIODS.get(args.env_id, periods)
        frequency = torch.tensor(2 * np.pi / periods, dtype=torch.float32)
        known = len(task.obs_scale or [])
        scale = [*(task.obs_scale or []), *[1.0] * (obs_dim - known)]
        shift = [*(task.obs_shift or []), *[0.0] * (obs_dim - known)]
        self.register_buffer("scale", torch.tensor(scale))  # (O,)
        self.register_buffer("shift", torch.tensor(shift))  # (O,)
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


class Discriminator(nn.Module):
    """log q(z | s) of all skills: observations (..., O) -> (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        self.inputs = Inputs(obs_dim, args)
        self.first, self.last = 0, obs_dim
        if args.disc_obs == "positions":
            self.first, self.last = DISC_ENTRIES.get(args.env_id, (0, obs_dim))
        self.scale = DISC_SCALE.get(args.env_id, 1.0)
        self.net = relu_mlp(self.last - self.first, u, u, args.skill_dim)

    def forward(self, obs):
        scaled = self.inputs(obs)  # (..., F), of which the first O are without sines
        return self.net(self.scale * scaled[..., self.first : self.last]).log_softmax(-1)


class SkillQ(nn.Module):
    """Q of the controller for all skills: observations (..., O) -> (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u = args.controller_dim
        self.inputs = Inputs(obs_dim, args)
        self.net = relu_mlp(self.inputs.size, u, u, args.skill_dim)

    def forward(self, obs):
        return self.net(self.inputs(obs))


# -------------------------------------------------------------------------------------------------------------- losses
def discriminator_loss(discriminator, obs, z, subtract_log_p_z: bool):
    """Discriminator: guess from a state which skill led there; the better it can, the more is the skill paid (eq. 3).

    obs (B, O), z (B, Z) one-hot. Returns the loss, the skills' rewards (B,) by the discriminator as it is now, and
    metrics. A perfect guess gives log Z, a blind one 0.
    """
    log_q = discriminator(obs)  # (B, Z)
    log_q_z = (log_q * z).sum(-1)  # (B,)
    loss = -log_q_z.mean()
    rewards = log_q_z.detach()
    if subtract_log_p_z:
        rewards = rewards + math.log(z.shape[-1])  # p(z) = 1 / Z
    correct = log_q.argmax(-1) == z.argmax(-1)
    metrics = dict(discriminator_loss=loss, discriminator_accuracy=correct.float(), skill_reward=rewards)
    return loss, rewards, {name: value.detach().mean() for name, value in metrics.items()}


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


def soft_value(q, alpha: float):
    """V = alpha log mean_z exp(Q / alpha): Q (..., Z) -> (...). The mean, not the sum: entropy is counted from that of
    a uniform choice, so that skills which are all alike are worth as much as one of them.
    """
    return alpha * (torch.logsumexp(q / alpha, -1) - math.log(q.shape[-1]))


def controller_loss(controller, target, obs, z, rewards, next_obs, discount, alpha: float):
    """TD loss of the controller: soft Q-learning. Q-learning with a soft maximum tries all skills that may be best.

    obs, next_obs (B, O) k env steps apart, z (B, Z) one-hot, rewards (B,) summed over these, discount (B,), 0 at a
    true end. Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        td_target = rewards + discount * soft_value(target(next_obs), alpha)  # (B,)
    q_value = (controller(obs) * z).sum(-1)  # (B,)
    loss = 0.5 * (q_value - td_target).square().mean()
    metrics = dict(controller_loss=loss, controller_q=q_value, controller_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# -------------------------------------------------------------------------------------------------------------- acting
class Controller:
    """Acts in the task, without exploration: every skill_horizon env steps the skill with the highest Q, its mode."""

    def __init__(self, agent):
        self.agent = agent
        self.steps = 0

    def __call__(self, obs):
        """Observations (E, O) -> actions (E, A), both NumPy; the episodes have begun together."""
        if self.steps % self.agent.args.skill_horizon == 0:
            self.z = self.agent.choose_skill(obs, explore=False)
        self.steps += 1
        return self.agent.act(obs, self.z, explore=False)


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
    """The last buffer_size transitions, over an env step or over a skill, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        rows = args.buffer_size
        self.gamma = args.gamma
        self.device = args.device
        self.columns = dict(
            obs=torch.zeros(rows, obs_dim, device=args.device),
            action=torch.zeros(rows, action_dim, device=args.device),
            z=torch.zeros(rows, args.skill_dim, device=args.device),
            rewards=torch.zeros(rows, device=args.device),
            next_obs=torch.zeros(rows, obs_dim, device=args.device),
            discount=torch.zeros(rows, device=args.device),
        )
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, len(self.columns["obs"]))

    def add(self, obs, action, z, rewards, terminations, next_obs):
        """Transitions of n environments, NumPy: obs, next_obs (n, O), action (n, A), z (n, Z), the others (n,).

        A time-out is no end: the value of next_obs counts.
        """
        discount = self.gamma * (1.0 - terminations)
        index = torch.arange(self.added, self.added + len(obs), device=self.device) % len(self.columns["obs"])
        for name, values in zip(self.columns, (obs, action, z, rewards, next_obs, discount)):
            values = torch.from_numpy(np.asarray(values, dtype=np.float32))
            self.columns[name][index] = values.to(self.device)
        self.added += len(obs)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), z (B, Z), rewards (B,), next_obs (B, O), discount (B,)."""
        index = torch.randint(len(self), (batch_size,), device=self.device)
        return [column[index] for column in self.columns.values()]

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
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
    """Skills, their critics with slow copies, discriminator, controller with its slow copy, and gradient steps."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim + args.skill_dim, action_dim, args)
        self.critics = TwinQ(obs_dim + args.skill_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.discriminator = Discriminator(obs_dim, args)
        self.controller = SkillQ(obs_dim, args)
        self.controller_target = copy.deepcopy(self.controller).requires_grad_(False)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = adam(self.critics.parameters())
        self.policy_optimizer = adam(self.actor.parameters())
        self.discriminator_optimizer = adam(self.discriminator.parameters())
        self.controller_optimizer = adam(self.controller.parameters())
        self.update = recorded(self.update, args)
        self.update_controller = recorded(self.update_controller, args)

    @torch.no_grad()
    def act(self, obs, z, explore: bool):
        """A sample of skills or their mode: obs (E, O), z (E, Z) -> actions (E, A), all NumPy."""
        state = np.concatenate([obs, z], -1)
        mean, std = self.actor(torch.from_numpy(state).to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    @torch.no_grad()
    def choose_skill(self, obs, explore: bool):
        """The controller's choice, z ~ softmax(Q / alpha) or the best: obs (E, O) -> z (E, Z), both NumPy."""
        q = self.controller(torch.from_numpy(obs).to(self.args.device))  # (E, Z)
        if explore:
            choice = (q / self.args.controller_alpha).softmax(-1).multinomial(1).squeeze(-1)
        else:
            choice = q.argmax(-1)
        return one_hot(choice.cpu(), self.args)

    def update(self, obs, action, z, rewards, next_obs, discount) -> dict:
        """Discovery: one step of discriminator, critics, policy and slow copies on a batch; returns metrics.

        The task's rewards play no part. Those of the skills come from the discriminator of now: it changes, so they
        must not be kept in the replay.
        """
        args = self.args
        seen = next_obs if args.disc_next_obs else obs
        loss, rewards, metrics = discriminator_loss(self.discriminator, seen, z, args.subtract_log_p_z)
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        discriminator_norm = gradient_norm(self.discriminator)
        self.discriminator_optimizer.step()

        state = torch.cat([obs, z], -1)  # (B, O + Z)
        next_state = torch.cat([next_obs, z], -1)  # the skill stays
        batch = state, action, rewards, next_state, discount
        loss, critic_metrics = soft_critic_loss(self.critics, self.target, self.actor, *batch, args.alpha)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = gradient_norm(self.critics)
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(self.critics, self.actor, state, args.alpha)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = gradient_norm(self.actor)
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)
        update_target(self.target, self.critics, args.tau)
        grad_norm = discriminator_norm + critic_norm + policy_norm
        return dict(metrics, **critic_metrics, **policy_metrics, grad_norm=grad_norm)

    def update_controller(self, obs, action, z, rewards, next_obs, discount) -> dict:
        """Control: one step of the controller and its slow copy on a batch of transitions over skills.

        Their actions are not kept, (B, 0). Returns metrics.
        """
        args = self.args
        batch = obs, z, rewards, next_obs, discount
        networks = self.controller, self.controller_target
        loss, metrics = controller_loss(*networks, *batch, args.controller_alpha)
        self.controller_optimizer.zero_grad()
        loss.backward()
        grad_norm = gradient_norm(self.controller)
        self.controller_optimizer.step()
        update_target(self.controller_target, self.controller, args.tau)
        return dict(metrics, grad_norm=grad_norm)


def one_hot(index, args: Args):
    """Numbers of skills (E,) on the CPU -> z (E, Z), NumPy."""
    return np.eye(args.skill_dim, dtype=np.float32)[index.numpy()]


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
    rb = ReplayBuffer(obs.shape[1], action_dim, args)  # env steps of discovery
    choices = ReplayBuffer(obs.shape[1], 0, args)  # skills that the controller chose, without the actions
    z = np.zeros((args.num_envs, args.skill_dim), dtype=np.float32)  # (E, Z) skills that run
    first_obs = obs.copy()  # (E, O) where they began
    skill_rewards = np.zeros(args.num_envs)  # (E,) of the task, since then
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb, choices=choices)
    parts |= dict(critics=agent.critic_optimizer, policy=agent.policy_optimizer)
    parts |= dict(discriminator=agent.discriminator_optimizer, controller=agent.controller_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            z[:] = state["z"].numpy()
            first_obs[:] = state["first_obs"].numpy()
            skill_rewards[:] = state["skill_rewards"].numpy()
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
        # ALGO LOGIC: put action logic here. In discovery a skill lasts an episode, then skill_horizon env steps
        discovering = global_step < args.discover_steps
        begins = running_length % args.skill_horizon == 0  # (E,)
        first_obs[begins] = obs[begins]
        skill_rewards[begins] = 0
        if discovering:
            begins = running_length == 0
            z[begins] = one_hot(torch.randint(args.skill_dim, (args.num_envs,)), args)[begins]
        elif begins.any():
            z[begins] = agent.choose_skill(obs, explore=True)[begins]
        if global_step < args.warmup_steps:
            action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
        else:
            action = agent.act(obs, z, explore=True)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        if discovering:
            truncations = truncations | (running_length + 1 >= args.discover_length)
        skill_rewards += args.reward_scale * rewards
        if discovering:
            rb.add(obs, action, z, rewards, terminations, next_obs)
        else:
            ends = terminations | truncations | ((running_length + 1) % args.skill_horizon == 0)  # (E,)
            none = action[ends, :0]
            choices.add(first_obs[ends], none, z[ends], skill_rewards[ends], terminations[ends], next_obs[ends])
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
        while gradient_step < updates_due and (discovering or len(choices)):
            if discovering:
                metrics = agent.update(*rb.sample(args.batch_size))
            else:
                metrics = agent.update_controller(*choices.sample(args.batch_size))
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate without exploration; in discovery there is no controller yet
        finished = global_step >= args.total_timesteps
        if finished or (not discovering and passed(args.eval_interval, global_step, new_steps)):
            returns, lengths = rollout(Controller(agent), args.eval_episodes, args, 10_000 + args.seed)
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
                z=torch.from_numpy(z),
                first_obs=torch.from_numpy(first_obs),
                skill_rewards=torch.from_numpy(skill_rewards),
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
    if global_step <= args.discover_steps:
        print("RL ended in discovery: nothing was learnt of the task; give more --total-timesteps")
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        rollout(Controller(agent), 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
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
    returns, lengths = rollout(Controller(agent), args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        rollout(Controller(agent), 1, args, 10_000 + args.seed, video)
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
    if args.controller_alpha == 0:
        sys.exit("error: --controller-alpha 0 does not work; give more than 0")
    if args.warmup_steps >= args.discover_steps:
        sys.exit("error: --warmup-steps leaves nothing of --discover-steps; lower it")
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
