"""DADS: Dynamics-Aware Discovery of Skills (Sharma et al. 2020), https://arxiv.org/abs/1907.01657, off-policy form

Idea: without any reward, learn skills whose outcome can be predicted: a model q(x' | x, z) of the next state must gain
much from knowing the skill z, and the policy is rewarded for going where it does. A task comes later: plan which skills
to use in this model; the policy learns no more.

    python algos/dads.py --env-id maze           # both phases and evaluation
    python algos/dads.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
    python algos/dads.py --evaluate runs/FOLDER/checkpoint.pt --capture-video   # also draws where the skills lead
Sizes of the release (Ant; D'Kitty had 500000 env steps of phase A): --hidden-dim 512 --learning-rate 3e-4
    --num-prior-samples 100 --discover-steps 5000000 --total-timesteps 5150000

Phase A, discover_steps env steps, repeat:
   act: z ~ U[-1, 1]^Z, held for hold_steps; a ~ pi(a | s, z)
   skill dynamics: maximise log q(x' | x, z)
   policy, by SAC: r = log q(x' | x, z) - log 1/(L+1) sum_i q(x' | x, z_i), z_i ~ U[-1, 1]^Z and the true z: an
      estimate of the mutual information I(x'; z | x) = H(x' | x) - H(x' | x, z): many outcomes, each foreseeable
Phase B, the rest; the policy is frozen, its dynamics and the rewards go on being learnt:
   plan: z_1..z_K by MPPI in q, so that the sum of predicted rewards R(x_t, x_t+H) is highest; execute z_1 for H steps

Run beside the release, with 1 and the scale in 6 alike: log q, reward and MPPI are equal but for rounding.
DEVIATION n from the release (arxiv.org/abs/2004.12974; why, scores: algos/docs/dads.md): 1 x and its change are
normalised by the replay, not by batch norm; 2 q, policy and critics see positions; 3 the replay has 300,000 env steps,
weighed alike in q's loss; 4 sac.py's smaller networks; 5 environments act side by side, updates come one at a time,
evaluations take means; 6 MPPI begins at mean 0, and returns are divided by their std; 7 R is learnt from what was seen:
our rewards are sparse. While the replay holds none, phase B's skills are random; q learns on there (release: not).
Differs from skimo.py in: Args, TASK_DEFAULTS, Inputs, policy_loss, plan, ReplayBuffer, Agent, rollout, train,
    evaluate, parse_args
Shapes: B batch, O observation, D entries of x, F inputs, A action, Z skill, E environments, K skills per plan, P plans,
L other skills, G Gaussians of the mixture, T rows of the replay.
"""

import copy
import functools
import gc
import io
import json
import math
import os
import pkgutil
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
    total_timesteps: int = 300_000  # env steps of both phases
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4, draw where skills lead (PNG)

    # Seldom changed
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates and plans as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with planned skills and the policy's mode

    # Skills
    discover_steps: int = 150_000  # env steps of phase A, in which skills are learnt
    skill_dim: int = 5  # Z: numbers of a skill
    hold_steps: int = 360  # env steps for which a random skill is kept, at most until the episode ends
    dynamics_obs: int = 30  # D: x is so many first entries of an observation
    num_prior_samples: int = 16  # L: other skills that the reward compares with (release: 100)

    # RL
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 2_000  # env steps of the untrained policy, before updates start
    updates_per_step: float = 0.016  # updates of the dynamics per env step, in both phases
    policy_updates: int = 8  # updates of policy and critics after each of the dynamics, in phase A
    batch_size: int = 256  # transitions per update
    buffer_size: int = 300_000  # transitions kept (release: 10,000; DEVIATION 3)
    learning_rate: float = 1e-3  # of all networks and log alpha (release: 3e-4)
    gamma: float = 0.99  # discount per env step
    tau: float = 0.005  # share of the online weights in a target update, after each update
    reward_scale: float = 1.0  # factor on the task's reward, which the planner uses
    hidden_dim: int = 128  # width of hidden layers (release: 512; DEVIATION 4)
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 2)

    # Planner
    skill_horizon: int = 10  # H: env steps per planned skill
    plan_skills: int = 1  # K: skills per plan
    num_samples: int = 50  # P: sampled plans per iteration
    mppi_iters: int = 10  # iterations
    temperature: float = 10.0  # factor on the plans' normalised returns in the softmax

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, buffer_size=self.num_envs * self.skill_horizon)
        most = dict(gamma=1, tau=1, warmup_steps=self.discover_steps - 1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data. Rewards of 100 become 1.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, skill_dim=2, hold_steps=200, dynamics_obs=2),
    "kitchen": dict(total_timesteps=200_000, discover_steps=100_000),
    "calvin": dict(reward_scale=0.01, dynamics_obs=21),
}
ANGLES = {"calvin": (3, 4, 5)}  # entries of x that jump by 2 pi: the Euler angles of the tool


# ------------------------------------------------------------------------------------------------------------ networks
def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Inputs(nn.Module):
    """States with their skill (..., O + Z) -> inputs (..., F) of policy and critics, F = size.

    Observations are scaled and get sines and cosines of positions; the skill stays as it is. Where policy and critics
    say O, it counts both.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = task.position_periods if args.position_features else np.zeros((0, 0))
        self.register_buffer("scale", torch.tensor(task.obs_scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(task.obs_shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.size = obs_dim + 2 * periods.size + args.skill_dim

    def forward(self, state):
        obs, z = state.tensor_split([len(self.scale)], -1)
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)
        return torch.cat([obs * self.scale + self.shift, phase.sin(), phase.cos(), z], -1)  # (..., F)


class Actor(nn.Module):
    """Policy pi(a | s): the tanh of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
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
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + action_dim
        self.qf1 = relu_mlp(in_dim, u, u, 1)
        self.qf2 = relu_mlp(in_dim, u, u, 1)

    def forward(self, obs, action):
        x = torch.cat([self.inputs(obs), action], -1)
        return self.qf1(x).squeeze(-1), self.qf2(x).squeeze(-1)


class SkillDynamics(nn.Module):
    """q(x' | x, z): G Gaussians of std 1 over the normalised change of x; and the task's reward R(x, x_later)."""

    def __init__(self, dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.dim, self.G = dim, 4
        self.net = relu_mlp(dim + args.skill_dim, u, u, self.G + self.G * dim)
        self.reward_net = relu_mlp(2 * dim, u, u, 1)
        for name in ("x", "change"):
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        angles = ANGLES.get(data_tools.TASKS[args.env_id].data, ())
        self.register_buffer("is_angle", torch.tensor([i in angles for i in range(dim)]))  # (D,)

    def change(self, x, next_x):
        """x' - x, (..., D); an angle takes the short way."""
        change = next_x - x
        short = torch.remainder(change + math.pi, 2 * math.pi) - math.pi
        return torch.where(self.is_angle, short, change)

    @torch.no_grad()
    def set_scale(self, x, next_x):
        """Normalise by these transitions (n, D); what never moves keeps std 1 (DEVIATION 1)."""
        change = self.change(x, next_x)
        for values, mean, std in ((x, self.x_mean, self.x_std), (change, self.change_mean, self.change_std)):
            mean.copy_(values.mean(0))
            spread = values.std(0, correction=0)
            std.copy_(torch.where(spread < 1e-6, 1.0, spread))

    def forward(self, x, z):
        """x (..., D), z (..., Z) -> log-weights (..., G) and means (..., G, D) of the normalised change."""
        scaled = (x - self.x_mean) / self.x_std  # DEVIATION 2
        out = self.net(torch.cat([scaled, z], -1))
        logits, means = out.tensor_split([self.G], -1)
        return logits.log_softmax(-1), means.unflatten(-1, (self.G, self.dim))

    def log_prob(self, x, z, next_x):
        """log q(x' | x, z), (...), per unit of the normalised change."""
        log_weights, means = self(x, z)
        change = (self.change(x, next_x) - self.change_mean) / self.change_std  # (..., D)
        error = (change[..., None, :] - means).square().sum(-1)  # (..., G)
        constant = 0.5 * self.dim * math.log(2 * math.pi)
        return torch.logsumexp(log_weights - 0.5 * error, -1) - constant

    def predict(self, x, z):
        """Mean of x' (..., D)."""
        log_weights, means = self(x, z)
        change = (log_weights.exp()[..., None] * means).sum(-2)  # (..., D)
        return x + self.change_mean + self.change_std * change

    def reward(self, x, x_later):
        """R: the task's reward on the way from x to x_later, which is skill_horizon env steps later, (...)."""
        before = (x - self.x_mean) / self.x_std
        after = (x_later - self.x_mean) / self.x_std
        return self.reward_net(torch.cat([before, after], -1)).squeeze(-1)


# -------------------------------------------------------------------------------------------------------------- losses
def dynamics_loss(dynamics, x, z, next_x, start, later, rewards):
    """Skill dynamics by maximum likelihood, -log q(x' | x, z): they have to know what each skill does. And R.

    x, next_x (B, D), z (B, Z) one env step; start, later (B, D), rewards (B,) a skill's duration: R learns what is won
    on such a way, by squared errors. Returns the loss and metrics.
    """
    log_q = dynamics.log_prob(x, z, next_x)  # (B,)
    error = dynamics.reward(start, later) - rewards  # DEVIATION 7
    loss = error.square().mean() - log_q.mean()
    metrics = dict(log_q=log_q, reward_error=error.abs())
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


@torch.no_grad()
def intrinsic_reward(dynamics, x, z, next_x, num_samples: int):
    """How much better z explains the step than other skills do, (B,): at most log(L+1), 0 if q ignores the skill.

    log q(x' | x, z) - log of the mean of q over z itself and L other skills. It makes skills differ in what they do.
    """
    B, Z = z.shape
    other_z = 2 * torch.rand(B, num_samples, Z, device=z.device) - 1  # (B, L, Z)
    here = x[:, None].expand(-1, num_samples, -1)  # (B, L, D)
    log_q = dynamics.log_prob(x, z, next_x)  # (B,)
    gap = dynamics.log_prob(here, other_z, next_x[:, None]) - log_q[:, None]  # (B, L)
    return math.log(num_samples + 1) - torch.log1p(gap.clamp(-50, 50).exp().sum(1))


def soft_critic_loss(critics, target, actor, obs, action, rewards, next_obs, discount, alpha):
    """TD loss of both critics (SAC eq. 5, 6): a state is worth its reward plus the soft value of where it leads.

    obs, next_obs (B, O), action (B, A), rewards (B,) on the way to next_obs, discount (B,) of its value, 0 at a true
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


# ------------------------------------------------------------------------------------------------------------------ RL
@torch.no_grad()
def plan(dynamics, score, x, args):
    """MPPI over K skills for all environments at once: x (E, D) -> mean of the last plans (E, K, Z).

    score(x, x_later) is the reward that is expected on the way of one skill.
    """
    E, P, K = len(x), args.num_samples, args.plan_skills
    mean = torch.zeros(E, K, args.skill_dim, device=x.device)  # DEVIATION 6
    for _ in range(args.mppi_iters):
        noise = torch.randn(E, P, K, args.skill_dim, device=x.device)
        plans = (mean[:, None] + math.sqrt(1.5) * noise).clamp(-1, 1)  # (E, P, K, Z)
        skills = [plans[:, :, 0]]
        for k in range(1, K):  # the next skill is much like the one before
            skills.append(0.9 * skills[-1] + 0.1 * plans[:, :, k])

        # Return of each plan: the dynamics are rolled out env step by env step, rewards are those of whole skills
        x_later = x[:, None].expand(-1, P, -1)  # (E, P, D)
        returns = 0.0
        for z in skills:
            start = x_later
            for _ in range(args.skill_horizon):
                x_later = dynamics.predict(x_later, z)
            returns = returns + score(start, x_later)  # (E, P)

        # A plan whose states overflow, far from all that was seen, is as bad as the worst of the others. All are alike
        # if all do. 1e6 is beyond any return
        overflowed = ~returns.isfinite()
        worst = returns.masked_fill(overflowed, math.inf).amin(1, keepdim=True)
        returns = torch.where(overflowed, worst, returns).clamp(-1e6, 1e6)  # (E, P)

        # All plans count, the better the more. Equal returns: the mean of all
        advantage = returns - returns.amax(1, keepdim=True)
        advantage = advantage / (returns.std(1, correction=0, keepdim=True) + 1e-6)
        weight = torch.softmax(args.temperature * advantage, 1)  # (E, P)
        mean = (weight[..., None, None] * torch.stack(skills, 2)).sum(1)
    return mean


class ReplayBuffer:
    """The last env steps of E environments, in a ring of T rows on the device; buffer_size is T times E."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.args = args
        self.num_rows = args.buffer_size // args.num_envs  # T
        sizes = dict(obs=[obs_dim], action=[action_dim], z=[args.skill_dim], next_obs=[obs_dim])
        sizes |= dict(discount=[], rewards=[], ended=[])
        room = self.num_rows, args.num_envs
        self.columns = {name: torch.zeros(*room, *size, device=args.device) for name, size in sizes.items()}
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, self.num_rows)

    def add(self, obs, action, z, rewards, terminations, truncations, next_obs):
        """One env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), z (E, Z), the others (E,).

        A time-out is no end: the value of next_obs counts.
        """
        discount = self.args.gamma * ~terminations
        values = obs, action, z, next_obs, discount, rewards, terminations | truncations
        for column, value in zip(self.columns.values(), values):
            column[self.added % self.num_rows] = torch.as_tensor(value)
        self.added += 1

    def random_rows(self, batch_size: int):
        """Rows and environments (B,) of uniform env steps."""
        t = torch.randint(len(self), (batch_size,), device=self.args.device)
        e = torch.randint(self.args.num_envs, (batch_size,), device=self.args.device)
        return t, e

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), z (B, Z), next_obs (B, O), discount (B,)."""
        t, e = self.random_rows(batch_size)
        return [self.columns[name][t, e] for name in ("obs", "action", "z", "next_obs", "discount")]

    def sample_rewards(self, batch_size: int):
        """What R learns: start (B, O), end (B, O) and sum of rewards (B,) of H env steps, cut where an episode ends.

        Half of them are drawn around a reward, if the buffer has any; an end before it may cut it off.
        """
        args, rewards = self.args, self.columns["rewards"][: len(self)]
        H, half = min(args.skill_horizon, len(self)), batch_size // 2
        age, e = self.random_rows(batch_size)  # 0 is the oldest row
        oldest = self.added % len(self)
        # Some rewarded env step: the n-th, n at random, at one of the H places of its window
        count = (rewards != 0).flatten().cumsum(0)  # (rows * E,) rewarded ones so far
        n = 1 + (torch.rand(half, device=args.device) * count[-1]).long()
        found = torch.searchsorted(count, n).clamp(max=len(count) - 1)
        found_age = (found // args.num_envs - oldest) % len(self)
        found_age = found_age - torch.randint(H, (half,), device=args.device)
        age[:half] = torch.where(count[-1] > 0, found_age, age[:half])
        e[:half] = torch.where(count[-1] > 0, found % args.num_envs, e[:half])

        first = age.clamp(0, len(self) - H)[:, None]  # (B, 1)
        t = (first + torch.arange(H, device=args.device) + oldest) % len(self)  # (B, H)
        ended = self.columns["ended"][t, e[:, None]]
        running = ended.cumsum(1) - ended == 0  # (B, H), not behind an end
        last = t.gather(1, running.sum(1, keepdim=True) - 1)[:, 0]  # (B,)
        rewards = (rewards[t, e[:, None]] * running).sum(1)
        return self.columns["obs"][t[:, 0], e], self.columns["next_obs"][last, e], rewards

    def rewarded(self) -> bool:
        """Whether R has a reward to learn from."""
        return bool((self.columns["rewards"][: len(self)] != 0).any())

    def positions(self, dim: int):
        """x and x', 2 x (rows * E, D), of all rows."""
        return [self.columns[name][: len(self), :, :dim].flatten(0, 1) for name in ("obs", "next_obs")]

    def state_dict(self) -> dict:
        filled = {name: column[: len(self)].clone() for name, column in self.columns.items()}
        return dict(filled, added=self.added)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for name, column in self.columns.items():
            column[: len(self)] = state[name]


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
    """Skill dynamics; policy, critics with their slow copies and alpha, which see a state with its skill."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.dynamics = SkillDynamics(min(args.dynamics_obs, obs_dim), args)
        self.actor = Actor(obs_dim, action_dim, args)
        self.critics = TwinQ(obs_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = -0.5 * action_dim  # nats
        self.to(args.device)
        self.register_buffer("rewarded", torch.tensor(False))  # as the replay; on the CPU: asked at each env step
        options = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.dynamics_optimizer = torch.optim.Adam(self.dynamics.parameters(), **options)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.actor.parameters(), **options)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], **options)
        self.update = Recorded(self.update, args)
        self.update_dynamics = Recorded(self.update_dynamics, args)
        self.planner = None  # the recorded plan

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """A sample of the policy or its mode: states with their skill (E, O + Z) -> actions (E, A), both NumPy."""
        mean, std = self.actor(torch.from_numpy(obs).to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    def choose_skills(self, obs, planned: bool, explore: bool):
        """Observations (E, O) -> skills (E, Z), both NumPy: the first ones of plans, or random ones."""
        args = self.args
        if not planned:
            return 2 * torch.rand(len(obs), args.skill_dim).numpy() - 1
        x = torch.from_numpy(obs).to(args.device)[:, : self.dynamics.dim]
        planner = functools.partial(plan, self.dynamics, self.dynamics.reward, args=args)
        if explore:  # an evaluation is too short to record
            self.planner = self.planner or Recorded(planner, args)
            planner = self.planner
        return planner(x)[:, 0].cpu().numpy()

    def update_dynamics(self, obs, z, next_obs, start, later, rewards) -> dict:
        """One step of the skills' dynamics and R on observations (B, O), of q's batch and of R's; returns metrics."""
        x, next_x, start, later = (values[:, : self.dynamics.dim] for values in (obs, next_obs, start, later))
        loss, metrics = dynamics_loss(self.dynamics, x, z, next_x, start, later, rewards)
        self.dynamics_optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.get_total_norm([weight.grad for weight in self.dynamics.parameters()])
        self.dynamics_optimizer.step()
        return dict(metrics, grad_norm=norm)

    def update(self, obs, action, z, next_obs, discount) -> dict:
        """One step of critics, policy, alpha and the slow copies on a batch of transitions; returns metrics."""
        alpha = self.log_alpha.exp().detach()
        # The reward is that of today's dynamics. The skill is a part of the state, and stays the same in the next one.
        x, next_x = obs[:, : self.dynamics.dim], next_obs[:, : self.dynamics.dim]  # (B, D)
        reward = intrinsic_reward(self.dynamics, x, z, next_x, self.args.num_prior_samples)  # (B,)
        obs, next_obs = torch.cat([obs, z], 1), torch.cat([next_obs, z], 1)  # (B, O + Z)
        batch = obs, action, 10 * reward, next_obs, discount  # the factor weighs it against the entropy
        loss, metrics = soft_critic_loss(self.critics, self.target, self.actor, *batch, alpha)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = nn.utils.get_total_norm([weight.grad for weight in self.critics.parameters()])
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(self.critics, self.actor, obs, alpha)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = nn.utils.get_total_norm([weight.grad for weight in self.actor.parameters()])
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)

        # Alpha rises while the policy is less random than target_entropy.
        self.alpha_optimizer.zero_grad()
        (self.log_alpha * (policy_metrics["entropy"] - self.target_entropy)).backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critics.parameters()), self.args.tau)
        metrics |= dict(intrinsic_reward=reward.mean(), alpha=alpha, grad_norm=critic_norm + policy_norm)
        return dict(metrics, **policy_metrics)


class Executor:
    """Executes skills in E environments: chooses one when the one before is over, and acts by it."""

    def __init__(self, agent: Agent, num_envs: int, explore: bool):
        self.agent, self.explore = agent, explore
        self.z = np.zeros((num_envs, agent.args.skill_dim), dtype=np.float32)
        self.left = np.zeros(num_envs, dtype=np.int64)  # env steps that each skill still has

    def act(self, obs, global_step: int):
        """Observations (E, O) -> actions (E, A), both NumPy."""
        agent, args = self.agent, self.agent.args
        planned = global_step >= args.discover_steps and bool(agent.rewarded)  # DEVIATION 7
        duration = args.skill_horizon if planned else args.hold_steps
        self.left = np.minimum(self.left, duration)  # a random skill of before gives way to plans
        due = self.left == 0
        if due.any():
            z = agent.choose_skills(obs, planned, self.explore)  # for all: shapes stay the same
            self.z = np.where(due[:, None], z, self.z)
            self.left[due] = duration
        self.left -= 1
        return agent.act(np.concatenate([obs, self.z], 1), self.explore)

    def forget(self, ended):
        """Members (E,) bool begin a new episode, and so a new skill."""
        self.left[ended] = 0


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, as in phase B, but with the policy's mode and random
    numbers of its own.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    executor = Executor(agent, num_episodes, explore=False)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            obs, _, terminations, truncations, _ = envs.step(executor.act(obs, args.discover_steps))
            ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """Both phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    if 0 < args.total_timesteps <= args.discover_steps:
        print("warning: the run ends in phase A, --discover-steps: only evaluations will plan.", flush=True)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    sizes = obs.shape[1], envs.action_space.shape[1]
    agent = Agent(args, *sizes)
    rb = ReplayBuffer(*sizes, args)
    executor = Executor(agent, args.num_envs, explore=True)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, dynamics=agent.dynamics_optimizer, critics=agent.critic_optimizer)
    parts |= dict(policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts)
        executor.z, executor.left = state["z"].numpy(), state["left"].numpy()
        obs = envs.set_state(state["envs"])
        global_step, gradient_step, seconds, episodes, evaluations = state["progress"]
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
            # ALGO LOGIC: put action logic here. A skill is kept for hold_steps, a planned one for H env steps
            action = executor.act(obs, global_step)  # (E, A)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            rb.add(obs, action, executor.z, args.reward_scale * rewards, terminations, truncations, next_obs)
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
                executor.forget(ended)

            # ALGO LOGIC: training. The dynamics in both phases; policy and critics only in phase A (DEVIATION 5)
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            while gradient_step < updates_due:
                if gradient_step % 10 == 0:
                    agent.dynamics.set_scale(*rb.positions(agent.dynamics.dim))
                state, _, z, next_state, _ = rb.sample(args.batch_size)
                ways = rb.sample_rewards(args.batch_size)
                metrics = dict(dynamics=agent.update_dynamics(state, z, next_state, *ways))
                gradient_step += 1
                if global_step <= args.discover_steps:
                    for _ in range(args.policy_updates):
                        metrics["losses"] = agent.update(*rb.sample(args.batch_size))
                if gradient_step % 100 == 0:
                    for group, values in metrics.items():
                        log(writer, group, values, global_step)
                if gradient_step == updates_due:  # acting waits for the device anyway
                    agent.rewarded.fill_(rb.rewarded())

            # Evaluate with planned skills and the policy's mode
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                skills = dict(z=torch.from_numpy(executor.z), left=torch.from_numpy(executor.left))
                save(checkpoint, state | skills | dict(progress=progress), parts)
    for part in (envs, episodes_csv, writer):
        part.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {run_dir}")
    last_100 = [row[1] for row in episodes[-100:]]
    minutes = (time.time() - start_time) / 60
    results = dict(env_steps=global_step, updates=gradient_step, rl_minutes=minutes)
    results["last_100_return"] = float(np.mean(last_100)) if last_100 else None
    results["last_100_success"] = task.success(last_100)
    results |= dict(evaluations=evaluations, args=asdict(args))
    save(run_dir / "results.json", results)
    print(f"finished: {run_dir}; curves: tensorboard --logdir {run_dir}")
    return results


# ------------------------------------------------------------------------------------------------------------ pictures
def skill_paths(agent: Agent, z, num_steps: int, args: Args, seed: int):
    """Observations (T+1, n, O) of n skills z (n, Z) from one start, at most num_steps; NaN after a member's end."""
    envs = data_tools.make_envs(args.env_id, len(z))
    obs, _ = envs.reset(seed=[seed] * len(z))
    path = [obs]
    ended = np.zeros(len(z), dtype=bool)
    while len(path) <= num_steps and not ended.all():
        action = agent.act(np.concatenate([obs, z], 1), explore=False)
        obs, _, terminations, truncations, _ = envs.step(action)
        path.append(np.where(ended[:, None], np.nan, obs))
        ended |= terminations | truncations
    envs.close()
    return np.stack(path)


def tool_position(obs, args: Args):
    """Where the point mass (..., 2) or the hand (..., 3) is, in metres; in other tasks the first three numbers."""
    task = data_tools.TASKS[args.env_id]
    if task.data != "kitchen":
        return obs[..., : 2 if task.draw_map else 3]
    # The Franka arm's geometry (Denavit-Hartenberg, Craig's form) takes its seven joints to the point between fingers.
    lengths = 0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088
    offsets = 0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0
    twists = 0, -1, 1, 1, -1, 1, 1  # quarter turns
    x, y, h = 0.0, 0.0, 0.21
    for i in reversed(range(7)):
        angle = obs[..., i] + (np.pi / 2 if i == 5 else 0.0)
        turned_x = np.cos(angle) * x - np.sin(angle) * y
        turned_y = np.sin(angle) * x + np.cos(angle) * y
        cos, sin = int(twists[i] == 0), twists[i]
        h = h + offsets[i]
        x, y, h = turned_x + lengths[i], cos * turned_y - sin * h, sin * turned_y + cos * h
    return np.stack([x, y, h], -1)


def draw_skills(agent: Agent, args: Args, num_steps: int, path: Path):
    """Where 16 skills lead from the start, a colour for each: those around a circle in their first two numbers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # only pictures need it

    task = data_tools.TASKS[args.env_id]
    angles = 2 * np.pi * np.arange(16) / 16
    z = np.zeros((16, args.skill_dim), dtype=np.float32)
    z[:, :2] = np.stack([np.cos(angles), np.sin(angles)], 1)[:, : args.skill_dim]
    position = tool_position(skill_paths(agent, z, num_steps, args, args.seed), args)  # (T+1, 16, 2 or 3)
    # From above; from above and from the front. The kitchen's x points away from the robot, others' y does
    views = [(1, 0)] if position.shape[-1] == 2 else [(0, 1), (int(task.data == "kitchen"), 2)]
    figure = Figure(figsize=(6 * len(views), 6))
    for ax, (across, up) in zip(figure.subplots(1, len(views), squeeze=False)[0], views):
        if task.draw_map:
            pkgutil.resolve_name(task.draw_map)(ax)
        for n, angle in enumerate(angles):
            ax.plot(position[:, n, across], position[:, n, up], color=colormaps["hsv"](angle / 2 / np.pi))
        ax.set(aspect="equal", xlabel="xyz"[across], ylabel="xyz"[up])
    figure.suptitle(f"{args.env_id}: {len(position) - 1} env steps of 16 skills, coloured by the angle of z")
    path = path.expanduser()  # ~ is the home folder
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"picture of the skills: {path}")


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
    """Print the scores of a trained agent with planned skills and the policy's mode; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    state = load(Path(args.evaluate), dict(agent=agent))
    video = Path(args.run_dir) / f"{args.env_id}__{FILE.stem}.mp4" if args.capture_video else None
    trained = [row[1] for row in state["progress"][3][-100:]] if "progress" in state else []  # published: no rows
    if trained:
        print(f"to expect: {np.mean(trained):.3g} in training, in its last {len(trained)} episodes")
    scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, video)
    words = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    print(f"{args.env_id}: {args.eval_episodes} episodes of {args.evaluate}: {words}")
    if video:
        draw_skills(agent, args, args.hold_steps, video.with_suffix(".png"))


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
