"""TD-MPC (Hansen, Wang & Su 2022), https://arxiv.org/abs/2203.04955, flat, on states: no skills, no offline data

Idea: learn a latent dynamics model, rewards and values by looking a few steps ahead; act by planning that far in the
model, with the value of what comes later. It explores by single noisy actions.

    python algos/tdmpc.py --env-id calvin                 # RL and evaluation, with the sizes of SkiMo's release
    python algos/tdmpc.py --env-id calvin --cpu-preset    # small, for one core
    python algos/tdmpc.py --resume runs/FOLDER            # go on after Ctrl-C or a crash

Repeat:
   act: plan by CEM with D, R, Q at each env step; execute the first action, plus noise
   model: h_0 = E(o_0), h_{t+1} = D(h_t, a_t) on windows of N steps. Losses: consistency of h_{t+1} with the slow
      E'(o_{t+1}), R(h_t, a_t) -> r_t, Q(h_t, a_t) -> r_t + gamma min Q'(E(o_{t+1}), pi) (eq. 7-10)
   policy: maximise min Q(h_t, pi(h_t)) on the same h_t (eq. 11); move the slow target copy

Run beside SkiMo's library and Hansen's code, settings alike: losses, updates and plans are equal but for rounding.
SkiMo's library, and so this file, differs from Hansen's code in: R has a normalised layer (there plain); R's and
Q's last weights begin small, their first as PyTorch's (0, orthogonal); the policy's noise is before the tanh (after it,
within +-.3), windows are drawn evenly (prioritised), Adam's eps is 1e-7.
DEVIATION n: differences from SkiMo's release, whose TD-MPC this is (why, scores: algos/docs/tdmpc.md)
1. E environments act side by side; planner and updates see each env step at once, the warm-up's updates are spread.
2. A window is any N steps of an episode, unfinished ones included.
3. Each of a window's three losses is cut at 1e5, not 1e4, above which a reward of 100 would not be learnt.
4. A true end has no future, a time-out has one. The release ignores both.
5. The encoder sees scaled observations with sines and cosines of positions. --reward-scale acts (there: not).
6. Plans whose value is no number count as bad (TD-MPC's own code: as 0).
Differs from skimo.py in: Args, TASK_DEFAULTS, CPU_PRESET, scalar_head, WorldModel, model_loss, policy_loss, plan,
    Agent, rollout, train, evaluate, parse_args
Shapes: B batch, N steps per window, O observation, F inputs, A action, d latent state, E environments, K steps per
plan, P plans; in the replay L = N + 1 rows per window.
"""

import copy
import functools
import gc
import io
import json
import math
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
    cpu_preset: bool = False  # small sizes for one core; with --help: shows them
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4

    # Seldom changed
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 100_000  # env steps between checkpoints, which hold all experience
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, without exploration noise

    # Model
    encoder_dim: int = 256  # width of the encoder
    latent_dim: int = 50  # d: size of a latent state
    hidden_dim: int = 512  # width of dynamics, reward model, critics and policy
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 5)

    # RL
    num_envs: int = 8  # environments side by side (DEVIATION 1)
    num_steps: int = 5  # N: env steps per window and in the longest plan
    warmup_steps: int = 5_000  # env steps with uniform actions, before planning and updates start
    updates_per_step: float = 1.0  # gradient updates per env step, the warm-up's included
    batch_size: int = 512  # windows per update
    learning_rate: float = 1e-3  # of model and policy
    gamma: float = 0.99  # discount per env step
    rho: float = 0.5  # weight rho^t of the t-th step of a window
    tau: float = 0.01  # share of the online weights in a target update, after every second update
    consistency_coef: float = 2.0  # weight of the latent consistency
    max_grad_norm: float = 10.0  # bound of the gradient's norm
    policy_std: float = 0.05  # std of the policy, before the tanh
    reward_scale: float = 1.0  # factor on the task's reward

    # Planner
    num_samples: int = 512  # sampled plans per iteration
    num_policy_trajs: int = 25  # plans proposed by the policy
    num_elites: int = 64  # best plans, which the next distribution is fitted to
    cem_iters: int = 6  # iterations
    temperature: float = 0.5  # factor on the values in the elites' softmax
    min_std: float = 0.5  # least std of sampled actions, at the start of the schedule
    min_std_end: float = 0.05  # the same after std_steps
    std_steps: int = 25_000  # env steps over which min_std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N steps

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0)
        most = dict(gamma=1, tau=1, rho=1, num_elites=self.num_samples + self.num_policy_trajs)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: SkiMo's run lengths; all else is the same for all tasks.
TASK_DEFAULTS = {"maze": dict(total_timesteps=2_000_000), "calvin": dict(total_timesteps=2_000_000)}
# One core: smaller networks and plans, fewer updates.
CPU_PRESET = dict(hidden_dim=128, batch_size=128, num_samples=128, num_elites=32, cem_iters=3, updates_per_step=0.1)


# ------------------------------------------------------------------------------------------------------------ networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ELU()]
        nn.init.orthogonal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
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


def scalar_head(in_dim: int, u: int) -> nn.Sequential:
    """Reward and Q: a normalised first layer, then an MLP of width u whose output starts near 0."""
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


class WorldModel(nn.Module):
    """State encoder E, dynamics D, reward R, critics Q."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, d, da = args.hidden_dim, args.latent_dim, args.latent_dim + action_dim  # u: width
        inputs = Inputs(obs_dim, args)  # DEVIATION 5
        self.encoder = nn.Sequential(inputs, *mlp(inputs.size, args.encoder_dim, d))
        self.dynamics = mlp(da, u, u, d)
        self.reward_model = scalar_head(da, u)
        self.qf1 = scalar_head(da, u)
        self.qf2 = scalar_head(da, u)

    def next(self, h, action):  # D(h, a): the next latent state
        return self.dynamics(torch.cat([h, action], -1))  # (..., d)

    def reward(self, h, action):  # R(h, a)
        return self.reward_model(torch.cat([h, action], -1)).squeeze(-1)  # (...)

    def q(self, h, action):  # Q_1(h, a), Q_2(h, a)
        ha = torch.cat([h, action], -1)
        return self.qf1(ha).squeeze(-1), self.qf2(ha).squeeze(-1)  # 2 x (...)

    @torch.no_grad()
    def follow(self, online, tau: float):  # move this slow copy towards the online model
        torch._foreach_lerp_(list(self.parameters()), list(online.parameters()), tau)


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
        next_q = torch.min(*target.q(next_h, sample_action(policy, next_h, args)))  # (B, N)
        td_target = rewards + args.gamma * (1 - terminals) * next_q  # (B, N), DEVIATION 4
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
    value_error = (q1 - td_target).square() + (q2 - td_target).square()  # (B, N)
    value_error = (rho * value_error).sum(1)  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5)  # DEVIATION 3
    loss = loss + 0.5 * reward_error.clamp(max=1e5)  # weights as in the release
    loss = loss + 0.1 * value_error.clamp(max=1e5)
    metrics = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    metrics |= dict(td_target=td_target, q_value=q1)
    metrics["latent_std"] = h_target.std((0, 1))  # 0: all states look alike, which happens without rewards
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    return loss.mean() / N, metrics, h.detach()


def policy_loss(model, policy, h, args):
    """Policy: do what the critics like best (TD-MPC eq. 11). It proposes plans, and tells what follows the last step.

    h (B, N+1, d) detached. Returns the loss and metrics.
    """
    rho = args.rho ** torch.arange(h.shape[1], device=h.device)  # (N+1,)
    q_value = torch.min(*model.q(h, sample_action(policy, h, args)))  # (B, N+1)
    loss = -(rho * q_value).sum(1).mean()
    metrics = dict(policy_loss=loss, policy_q=q_value)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------------ RL
@torch.no_grad()
def plan(model, policy, obs, mean, min_std, noise_scale, args):
    """Cross-entropy method (CEM) over sequences of K actions in the model, for all environments (TD-MPC, algorithm 1).

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
        h = model.next(h, policy_plans[-1])  # (E, trajs, d)
    policy_plans = torch.stack(policy_plans, 2).nan_to_num(0.0)  # (E, trajs, K, A); NaN: a state overflowed

    std = torch.full_like(mean, 2.0)
    for _ in range(args.cem_iters):
        # Sample plans
        noise = torch.randn(E, args.num_samples, K, A, device=obs.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # (E, num_samples, K, A)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, A)

        # Return of each plan: K predicted rewards, then the value of going on with the policy
        h = h0[:, None].expand(-1, plans.shape[1], -1)  # (E, P, d)
        value = 0.0
        for t in range(K):
            value = value + args.gamma**t * model.reward(h, plans[:, :, t])  # (E, P)
            h = model.next(h, plans[:, :, t])  # (E, P, d)
        last_q = torch.min(*model.q(h, sample_action(policy, h, args)))  # (E, P)
        value = (value + args.gamma**K * last_q).nan_to_num(-1e6)  # (E, P), DEVIATION 6. NaN: a state overflowed

        # Fit the next distribution to the best plans, weighted by their value
        elite_value, index = value.topk(args.num_elites, 1)  # (E, elites)
        elites = plans.gather(1, index[..., None, None].expand(-1, -1, K, A))  # (E, elites, K, A)
        weight = torch.softmax(args.temperature * elite_value, 1)  # (E, elites)
        w = weight[..., None, None]  # (E, elites, 1, 1)
        elite_mean = (w * elites).sum(1)  # (E, K, A)
        variance = (w * (elites - elite_mean[:, None]).square()).sum(1)  # (E, K, A)
        std = variance.sqrt().maximum(min_std)  # (E, K, A)
        mean = 0.1 * mean + 0.9 * elite_mean  # (E, K, A)

    # First action of an elite: weight / Exp(1) is largest at elite i with probability weight_i. So this draws like
    # torch.multinomial, without its wait for the GPU.
    picked = (weight / torch.empty_like(weight).exponential_()).argmax(1)  # (E,)
    action = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, A)
    action = action + noise_scale * std[:, 0] * torch.randn_like(action)
    return action.clamp(-1, 1), mean


def with_room(x, rows: int):
    """The tensor x, twice as long with zeros if it has fewer rows: growing costs little however often it happens."""
    return x if rows <= len(x) else torch.cat([x, torch.zeros_like(x)])


class SequenceBuffer:
    """All rows ever added, on the device. Windows of L rows are drawn from episodes, unfinished ones included.

    A row is an observation and what led to it: action, reward, and whether the episode really ended here (a time-out is
    no end); zeros for the first observation of an episode. Row i of environment e stands at i * E + e.
    """

    def __init__(self, obs_dim: int, action_dim: int, window: int, args: Args):
        E = args.num_envs
        self.sizes = [obs_dim, action_dim, 1, 1]
        self.window = window  # L
        self.rows = torch.zeros(1024 * E, sum(self.sizes), device=args.device)
        self.starts = torch.zeros(1024 * E, dtype=torch.long, device=args.device)  # first rows of all windows
        self.num_starts = 0
        self.filled = torch.zeros(E, dtype=torch.long)  # rows of each environment
        self.age = torch.zeros(E, dtype=torch.long)  # rows of its episode so far

    def begin(self, obs, members):
        """First rows of the episodes that begin in members (E,) bool: obs (E, O) NumPy."""
        nothing = np.zeros((len(obs), self.sizes[1]))
        self.age[members] = 0
        self.add(obs, nothing, nothing[:, 0], nothing[:, 0], members)

    def add(self, obs, action, rewards, terminations, members=slice(None)):
        """One step of the members, NumPy: the obs (E, O) that it led to, action (E, A), rewards, terminations (E,)."""
        E, device = len(self.filled), self.rows.device
        room = E * (int(self.filled.max()) + 1)
        self.rows = with_room(self.rows, room)
        self.starts = with_room(self.starts, room)
        rows = np.column_stack([obs, action, rewards, terminations])[members]  # (n, O + A + 2)
        index = (E * self.filled + torch.arange(E))[members]  # (n,)
        self.rows[index.to(device)] = torch.tensor(rows, dtype=torch.float32, device=device)
        self.filled[members] += 1
        self.age[members] += 1
        # Each row ends one more window, as soon as its episode has L rows
        starts = (index - E * (self.window - 1))[self.age[members] >= self.window]
        self.starts[self.num_starts : self.num_starts + len(starts)] = starts.to(device)
        self.num_starts += len(starts)

    def sample(self, batch_size: int):
        """Uniform windows: obs (B, L, O), action (B, L, A), rewards and terminals (B, L)."""
        device = self.rows.device
        index = torch.randint(self.num_starts, (batch_size,), device=device)
        steps = len(self.filled) * torch.arange(self.window, device=device)
        rows = self.rows[self.starts[index, None] + steps]  # (B, L, O + A + 2)
        obs, action, rewards, terminals = rows.split(self.sizes, -1)
        return obs, action, rewards.squeeze(-1), terminals.squeeze(-1)

    def state_dict(self) -> dict:
        rows = self.rows[: len(self.filled) * self.filled.max()].clone()
        return dict(rows=rows, starts=self.starts[: self.num_starts].clone(), filled=self.filled, age=self.age)

    def load_state_dict(self, state: dict):
        self.rows, self.filled, self.age = state["rows"], state["filled"].cpu(), state["age"].cpu()
        self.num_starts = len(state["starts"])
        self.starts = nn.functional.pad(state["starts"], (0, len(self.rows) - self.num_starts))


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
    """World model with its slow copy, policy; how actions are planned, and one gradient step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.action_dim = action_dim
        u = args.hidden_dim  # width
        self.model = WorldModel(obs_dim, action_dim, args)
        self.policy = mlp(args.latent_dim, u, u, action_dim)
        self.target = copy.deepcopy(self.model).requires_grad_(False)
        self.to(args.device)
        options = dict(lr=args.learning_rate, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.policy.parameters(), **options)
        self.update = Recorded(self.update, args)
        self.planners = {}  # recorded, by the number of environments and of steps

    @torch.no_grad()
    def act(self, obs, last_mean, global_step: int, explore: bool):
        """obs (E, O) -> actions (E, A), both NumPy, planned as after global_step, and the plans' mean (E, K, A).

        last_mean is the mean of the call before: the search goes on from there, if plans are as long as then.
        """
        args = self.args
        obs = torch.from_numpy(obs).to(args.device)
        growth = min(1.0, global_step / args.horizon_steps)
        K = int(1 + growth * (args.num_steps - 1))  # steps per plan
        progress = min(1.0, global_step / args.std_steps)
        min_std = args.min_std + progress * (args.min_std_end - args.min_std)
        min_std = torch.full((), min_std, device=args.device)  # made there: torch.tensor would wait for the device
        noise_scale = torch.full((), float(explore), device=args.device)
        mean = torch.zeros(len(obs), K, self.action_dim, device=args.device)
        if last_mean.shape == mean.shape:
            mean[:, :-1] = last_mean[:, 1:]
        planner = functools.partial(plan, self.model, self.policy, args=args)
        planner = self.planners.setdefault((len(obs), K), Recorded(planner, args))
        action, mean = planner(obs, mean, min_std, noise_scale)
        return action.cpu().numpy(), mean.clone()  # the next call overwrites what was recorded

    def update(self, obs, action, rewards, terminals) -> dict:
        """One step of model and policy on windows as SequenceBuffer has them, N+1 rows each; returns metrics."""
        args, model = self.args, self.model
        # What happened between two observations stands beside the later one.
        transitions = action[:, 1:], rewards[:, 1:], terminals[:, 1:]
        loss, metrics, h = model_loss(model, self.target, self.policy, obs, *transitions, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(model, self.policy, h, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = nn.utils.clip_grad_norm_(self.policy.parameters(), args.max_grad_norm)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        return dict(metrics, **policy_metrics, grad_norm=model_norm + policy_norm)


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, global_step: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, without exploration noise and with random numbers of
    its own. Actions are planned as after global_step.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        mean = torch.zeros(0)  # of the last plans, none yet
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            action, mean = agent.act(obs, mean, global_step, explore=False)
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
    if envs.max_episode_steps < args.num_steps:
        sys.exit("error: --num-steps: a window is longer than an episode")
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
    mean = torch.zeros(args.num_envs, 0, device=args.device)  # (E, K, A) of the last plans, none yet
    rb = SequenceBuffer(obs.shape[1], action_dim, args.num_steps + 1, args)  # DEVIATION 2
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, model=agent.model_optimizer, policy=agent.policy_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        mean = state["mean"]
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
            # ALGO LOGIC: put action logic here. One action for all environments at once (DEVIATION 1)
            if global_step < args.warmup_steps:
                action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
            else:
                action, mean = agent.act(obs, mean, global_step, explore=True)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            rb.add(next_obs, action, args.reward_scale * rewards, terminations)
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
                rb.begin(obs, ended)
                mean[torch.from_numpy(ended).to(args.device)] = 0  # plans of these episodes are over

            # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up, and
            # never more than ten times those of one step (DEVIATION 1)
            updates_due = int(global_step * args.updates_per_step) if global_step >= args.warmup_steps else 0
            updates_due = min(updates_due, gradient_step + math.ceil(10 * new_steps * args.updates_per_step))
            while rb.num_starts > 0 and gradient_step < updates_due:
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 2 == 0:  # as in the release
                    agent.target.follow(agent.model, args.tau)
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without exploration noise
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, global_step)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")
                too_short = sum(row[2] < args.num_steps for row in episodes)
                if too_short:
                    bar.write(f"no window (--num-steps) fits into {too_short} episodes: nothing is learnt from them")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                save(checkpoint, state | dict(mean=mean, progress=progress), parts)
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
    """Print the scores of a trained agent without exploration noise; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    state = load(Path(args.evaluate), dict(agent=agent))
    video = Path(args.run_dir) / f"{args.env_id}__{FILE.stem}.mp4" if args.capture_video else None
    trained = [row[1] for row in state["progress"][3][-100:]] if "progress" in state else []  # published: no rows
    if trained:
        print(f"to expect: {np.mean(trained):.3g} in training, in its last {len(trained)} episodes")
    scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, state["global_step"], video)
    words = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    print(f"{args.env_id}: {args.eval_episodes} episodes of {args.evaluate}: {words}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, of --cpu-preset, or of the run or agent given."""
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
    if given.cpu_preset:
        defaults |= CPU_PRESET
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
