"""Q-chunking: Reinforcement Learning with Action Chunking (Li, Zhou & Levine, NeurIPS 2025), arxiv.org/abs/2507.07969

Idea: no skills. An action of RL is a chunk of H actions, carried out blindly. A flow clones the data's chunks: it turns
noise into a chunk and keeps several ways of acting apart. RL draws N chunks from it and takes the one of highest Q.

    python algos/qc.py --env-id maze             # offline data, pre-training (both are kept), RL, evaluation
    python algos/qc.py --resume runs/FOLDER      # go on after Ctrl-C or a crash

1. Pre-training: chunk c, noise x_0, x = (1 - t) x_0 + t c, t uniform in [0, 1]. The flow f learns the way from noise to
   chunk: |f(s, x, t) - (c - x_0)|^2. Draw a chunk: from x = x_0 on, K times x += f(s, x, k / K) / K
2. Downstream RL. No policy is trained. Repeat:
   act: the best of N chunks, by the mean of both critics, for H steps; kitchens: for one (7)
   critics: Q(s, c) -> r_0 + .. + gamma^(H-1) r_(H-1) + gamma^H Q'(s_H, c*), on windows that begin at every env step;
      c* is the best of N' chunks by Q, and Q', the slow copy, says what it is worth

DEVIATION n: differences from the authors' code. Why, and scores: algos/docs/qc.md
1. Our data have no rewards. Phase 1 trains the flow alone; critics start in phase 2, after a warm-up of single chunks.
2. The flow is frozen in RL, and N' chunks are drawn once for each own env step. The authors train it on, and draw anew.
3. A window in which an episode truly ends counts, with the rewards until there. Theirs: only at its end.
4. Half of a batch (maze: none) are offline windows, by episode, labelled: --offline. Theirs begin the replay, paid.
5. Smaller networks, K = 5, H = 10 (kitchens 5), a rate from 1e-3 to zero, 8 environments, fewer updates; gamma 0.999;
maze: batches of 128; maze, CALVIN: 50,000 env steps of warm-up; the last 300,000 are kept. N' = 2: with 8 values drift
up, the goal is forgotten. 6. Sines of positions as inputs, the maze scaled (--published, too), rewards of 100 scaled to
10 or 1; kitchens: arms shifted; people's objects recombined.
7. Kitchens: N = 4, as the best of 32 is often an error; after one action the next chunk is chosen, not blindly.
--published takes their side of 2, 5 and 6 (buffer, rewards stay), 7; maze: half offline. No distilled policy.
Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, RELEASE, make_networks, pretrain_loss, pretrain,
critic_loss, outcome_loss, demonstrations, ReplayBuffer, Agent, rollout, train
Shapes: B batch, H steps per chunk, N chunks drawn, O observation, F inputs, A action, D = H A, E environments.
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

PRETRAINED = "qc"  # begins the names of pre-trained models
SHIPPED = FILE.parents[1] / "benchmarks" / "results"  # models and agents that come with the code


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin, your own or one of Gymnasium
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    data: str = "scripted"  # offline data: scripted, d4rl (people's, of the kitchens), release (the authors') or a path
    pretrained: str | None = None  # begin with RL from this model
    published: bool = False  # take the settings of the authors' code; needs a GPU
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and choose
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
    eval_episodes: int = 20  # episodes of an evaluation; chunks are drawn there as well
    pretrain_eval_interval: int = 20_000  # updates between validations with roll-outs of the clone
    pretrain_eval_episodes: int = 50  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: actions in a chunk
    hidden_dim: int = 256  # width of flow and critics
    hidden_layers: int = 3  # their hidden layers
    flow_steps: int = 5  # K: steps from noise to a chunk
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 6)

    # Pre-training (nothing of it counts with --pretrained)
    pretrain_updates: int = 100_000  # gradient updates
    pretrain_batch_size: int = 256  # chunks per update
    pretrain_lr: float = 1e-3  # first learning rate
    pretrain_lr_decay: bool = True  # decay to zero
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see data_tools.perturb
    recombine: bool = False  # show demonstrations again among objects moved by others

    # Downstream RL
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 5_000  # env steps with single chunks of the clone, before updates start
    updates_per_step: float = 0.1  # gradient updates per env step after the warm-up
    num_samples: int = 32  # N: chunks of which the best one acts
    act_steps: int = 0  # env steps of that chunk that are carried out (0: all)
    num_candidates: int = 2  # N': chunks kept with each env step for the targets; 0: N are drawn anew in every update
    bc_online: bool = False  # train the flow on, on the chunks of each batch
    offline: Literal["none", "zero", "pred"] = "pred"  # offline half of a batch: none, reward 0, or a learnt reward
    batch_size: int = 256  # windows per update
    buffer_size: int = 300_000  # env steps kept
    learning_rate: float = 3e-4  # of all that RL trains
    gamma: float = 0.999  # discount per env step
    tau: float = 0.005  # share of the online weights in a target update
    reward_scale: float = 1.0  # factor on the task's reward

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, act_steps=0, num_candidates=0, warmup_steps=0)
        least |= dict(buffer_size=self.num_envs * self.skill_horizon)
        most = dict(gamma=1, tau=1, act_steps=self.skill_horizon)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")
        if self.bc_online and self.num_candidates:
            sys.exit("error: --bc-online needs --num-candidates 0: kept chunks are the old clone's")


# By the name of a task's data. `people`: with people's data (--data other than scripted), DEVIATION 6.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000, warmup_steps=50_000, offline="none", batch_size=128, reward_scale=0.1),
    "kitchen": dict(skill_horizon=5, act_steps=1, num_samples=4, arm_noise=0.02, people=dict(recombine=True)),
    "calvin": dict(total_timesteps=2_000_000, warmup_steps=50_000, reward_scale=0.01),
}  # fmt: skip
# --published: the settings of the authors' code for all tasks.
RELEASE = {
    "all": dict(skill_horizon=5, hidden_dim=512, hidden_layers=4, flow_steps=10, position_features=False,
                pretrain_updates=1_000_000, pretrain_lr=3e-4, pretrain_lr_decay=False, arm_noise=0.0, recombine=False,
                num_envs=1, warmup_steps=5_000, updates_per_step=1.0, act_steps=0, num_samples=32, num_candidates=0,
                bc_online=True, offline="pred", batch_size=256, gamma=0.99),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks
def gelu_mlp(in_dim: int, out_dim: int, args: Args, layer_norm: bool = False) -> nn.Sequential:
    """Hidden layers of Linear, GELU and, if asked for, LayerNorm; then Linear. Xavier-uniform weights, zero biases."""
    u = args.hidden_dim
    layers = []
    for k in range(args.hidden_layers):
        norm = [nn.LayerNorm(u)] if layer_norm else []
        layers += [nn.Linear(u if k else in_dim, u), nn.GELU(), *norm]
    net = nn.Sequential(*layers, nn.Linear(u, out_dim))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


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


class Flow(nn.Module):
    """The clone: a velocity f(s, x, t) that carries noise (t = 0) to a chunk of the data (t = 1)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.num_steps = args.flow_steps
        self.chunk_dim = D = args.skill_horizon * action_dim
        self.inputs = Inputs(obs_dim, args)
        self.net = gelu_mlp(self.inputs.size + D + 1, D, args)

    def forward(self, obs, x, t):
        """Observations (..., O), places x (..., D) and times t (..., 1) -> velocity (..., D)."""
        return self.net(torch.cat([self.inputs(obs), x, t], -1))

    @torch.no_grad()
    def sample(self, obs, num_samples: int):
        """Observations (..., O) -> chunks (..., N, D) in [-1, 1]: Euler steps at the times 0, 1/K, .., (K-1)/K."""
        inputs = self.inputs(obs)[..., None, :].expand(*obs.shape[:-1], num_samples, -1)  # (..., N, F)
        x = torch.randn(*inputs.shape[:-1], self.chunk_dim, device=obs.device)
        for k in range(self.num_steps):
            t = torch.full_like(x[..., :1], k / self.num_steps)
            x = x + self.net(torch.cat([inputs, x, t], -1)) / self.num_steps
        return x.clamp(-1, 1)


def make_networks(args: Args) -> nn.ModuleDict:
    """The network of pre-training."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    return nn.ModuleDict(dict(flow=Flow(obs_dim, action_dim, args))).to(args.device)


# -------------------------------------------------------------------------------------------------------- pre-training
def as_chunk(actions):
    """Actions (B, H, A) of the data -> chunks (B, D) in the range of those that are drawn."""
    return actions.flatten(1).clamp(-1 + 1e-5, 1 - 1e-5)


def flow_loss(flow, obs, chunk, alive):
    """Flow matching: from anywhere on the straight line between noise and chunk, go the line's way. obs (B, O), chunk
    (B, D), alive (B, H): 0 for actions behind an episode's end, which teach nothing. Scalar.
    """
    noise = torch.randn_like(chunk)  # (B, D)
    t = torch.rand_like(chunk[:, :1])  # (B, 1)
    x = (1 - t) * noise + t * chunk
    error = (flow(obs, x, t) - (chunk - noise)).square()  # (B, D)
    return (error.unflatten(1, (alive.shape[1], -1)) * alive[..., None]).mean()


def pretrain_loss(flow, obs, actions, args):
    """Loss of the clone and metrics, on windows of data: obs (B, .., O) raw, the first counts, actions (B, H, A)."""
    loss = flow_loss(flow, obs[:, 0], as_chunk(actions), torch.ones_like(actions[..., 0]))
    return loss, dict(bc_loss=loss.detach())


def pretrain(args: Args, networks: nn.ModuleDict, data, writer: SummaryWriter, stop: threading.Event) -> dict:
    """Phase 1: clone the chunks of the offline data; returns facts about the clone.

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

    window = args.skill_horizon + 1
    train_data, valid_data = data.to(args.device).split(0.99, window)
    if args.recombine:
        train_data = data_tools.recombined(train_data, task.objects, args.seed)  # DEVIATION 6
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, fused=True)
    parts = dict(networks=networks, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    updates, seconds = 0, 0.0
    if unfinished.exists():  # go on where an earlier command was stopped
        updates, seconds = load(unfinished, parts)["progress"]
    data_tools.cut_curves(writer, updates, "pretrain/")  # what a crash has cut off is drawn anew
    start_time = time.time() - seconds

    def gradients(obs, actions):
        loss, metrics = pretrain_loss(*networks.values(), obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        return metrics

    gradients = Recorded(gradients, args)
    total = args.pretrain_updates
    with tqdm(desc="pre-training", total=total, initial=updates, unit="update") as bar:
        while updates < total:
            if args.pretrain_lr_decay:  # down to zero (DEVIATION 5)
                optimizer.param_groups[0]["lr"] = args.pretrain_lr * (1 - updates / total) ** 0.5
            obs, actions = train_data.sample_windows(args.pretrain_batch_size, window)
            # DEVIATION 6: a chunk begins beside the path, and its first action leads back
            obs, first = data_tools.perturb(obs[:, :2], actions[:, :1], task.arm, args.arm_noise)
            metrics = gradients(obs, torch.cat([first, actions[:, 1:]], 1))
            metrics["grad_norm"] = nn.utils.get_total_norm([weight.grad for weight in networks.parameters()])
            optimizer.step()
            updates += 1
            bar.update()

            finished = updates == total
            if finished or updates % 100 == 0:
                bar.set_postfix_str(", ".join(log(writer, "pretrain", metrics, updates).split(", ")[:2]))
            if finished or updates % args.pretrain_eval_interval == 0:
                # The loss does not tell whether the clone is any good: let it act in the task
                num_episodes = args.pretrain_eval_episodes * (4 if finished else 1)
                with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []), torch.no_grad():
                    agent = Agent(args, copy.deepcopy(networks))  # a copy: Agent freezes parts of them
                    scores = rollout(agent, args, num_episodes, args.seed)
                    batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                    _, losses = pretrain_loss(*networks.values(), *batch, args)
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
class Heads(nn.Module):
    """Two numbers of observations (..., O) and chunks (..., D) -> 2 x (...): Q_1 and Q_2, or reward and end."""

    def __init__(self, obs_dim: int, chunk_dim: int, args: Args, layer_norm: bool):
        super().__init__()
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + chunk_dim
        self.first = gelu_mlp(in_dim, 1, args, layer_norm)
        self.second = gelu_mlp(in_dim, 1, args, layer_norm)

    def forward(self, obs, chunk):
        x = torch.cat([self.inputs(obs), chunk], -1)
        return self.first(x).squeeze(-1), self.second(x).squeeze(-1)


@torch.no_grad()
def best_chunk(critics, obs, candidates):
    """The candidate of highest Q: obs (B, O), candidates (B, N, D) -> (B, D)."""
    obs = obs[:, None].expand(-1, candidates.shape[1], -1)  # (B, N, O)
    best = sum(critics(obs, candidates)).argmax(1)  # (B,), by the mean of both
    return candidates.take_along_dim(best[:, None, None], 1).squeeze(1)


def counting(ends, alive):
    """Which windows count (B,): not those with a time-out before the last step, for the rest is not known."""
    return torch.maximum(alive[:, -1], ends)


def critic_loss(critics, target, obs, chunk, rewards, ends, alive, next_obs, candidates, args):
    """TD loss of both critics: a chunk is worth its rewards and the best chunk that can follow. The critics choose it
    and their slow copies judge it: no value too high by chance is taken twice. Windows are ReplayBuffer.sample's.
    """
    with torch.no_grad():
        next_chunk = best_chunk(critics, next_obs, candidates)  # (B, D)
        next_q = sum(target(next_obs, next_chunk)) / 2  # (B,): the mean, not the minimum
        td_target = rewards + (1 - ends) * args.gamma**args.skill_horizon * next_q  # (B,)
    q1, q2 = critics(obs, chunk)  # 2 x (B,)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * (counting(ends, alive) * error).mean()  # DEVIATION 3
    metrics = dict(value_loss=loss, q_value=q1, td_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def outcome_loss(outcome, obs, chunk, rewards, ends, alive):
    """Squared error of the reward and cross-entropy of the end's logit on online windows: the loss and metrics."""
    reward, logit = outcome(obs, chunk)  # 2 x (B,)
    counts = counting(ends, alive)
    reward_loss = (counts * (reward - rewards).square()).mean()
    end_loss = nn.functional.binary_cross_entropy_with_logits(logit, ends, counts)
    return reward_loss + end_loss, dict(reward_loss=reward_loss.detach(), end_loss=end_loss.detach())


@torch.no_grad()
def demonstrations(flow, outcome, obs, actions, args):
    """Windows of the data, obs (B, H+1, O) and actions (B, H, A), in the form of online ones (DEVIATION 4)."""
    first, last = obs[:, 0], obs[:, -1]  # (B, O)
    chunk = as_chunk(actions)  # (B, D)
    alive = torch.ones_like(actions[..., 0])  # (B, H)
    rewards = ends = torch.zeros_like(alive[:, 0])  # (B,): 0 at an end would say that the goal is worthless
    if args.offline == "pred":
        rewards, logit = outcome(first, chunk)  # 2 x (B,)
        ends = logit.sigmoid()
    return first, chunk, rewards, ends, alive, last, flow.sample(last, args.num_candidates)


class ReplayBuffer:
    """The last env steps of every environment, each in its own ring: a window never changes the environment."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args, data=None):
        self.args, self.data = args, data
        self.size = args.buffer_size // args.num_envs
        room = args.num_envs, self.size
        chunks = args.num_candidates, args.skill_horizon * action_dim  # of next_obs
        shapes = (obs_dim,), (action_dim,), (), (), (), (obs_dim,)  # obs, actions, rewards, ends, time-outs, next_obs
        self.columns = [torch.zeros(*room, *shape, device=args.device) for shape in shapes]
        self.columns.append(torch.zeros(*room, *chunks, dtype=torch.float16, device=args.device))
        self.added = torch.zeros(args.num_envs, dtype=torch.int64, device=args.device)  # rows ever added to each ring

    def add(self, obs, actions, rewards, terminations, truncations, next_obs, candidates, steps):
        """A chunk of every environment, (E, H, ...), of which the first `steps` (E,) happened."""
        happened = torch.arange(actions.shape[1]) < torch.from_numpy(steps)[:, None]  # (E, H)
        e, h = (index.to(self.args.device) for index in happened.nonzero(as_tuple=True))
        rows = (self.added[e] + h) % self.size
        given = obs, actions, rewards, terminations, truncations, next_obs, candidates
        for column, values in zip(self.columns, given):
            column[e, rows] = torch.as_tensor(values).to(column)[e, h]
        self.added += torch.from_numpy(steps).to(self.args.device)

    def sample(self, batch_size: int):
        """Windows of H env steps, uniform over where they begin: obs (B, O), chunk (B, D), rewards (B,) until an end,
        discounted, ends (B,): true ones, alive (B, H): 0 behind any end, next_obs (B, O), candidates (B, N', D). With
        offline data half of them are windows of those: obs (B, H+1, O), actions (B, H, A).
        """
        H, device = self.args.skill_horizon, self.args.device
        windows = []
        if self.data is not None:
            windows = self.data.sample_windows(batch_size // 2, H + 1)
            batch_size -= batch_size // 2
        rows = self.added.clamp(max=self.size)  # (E,) in each ring
        starts = (rows - H + 1).clamp(min=0)  # (E,) of which windows can begin
        total = starts.cumsum(0)
        number = torch.randint(2**62, (batch_size,), device=device) % total[-1]
        e = torch.searchsorted(total, number, right=True)  # (B,)
        first = (self.added - rows - total + starts)[e] + number  # (B,), counted from the first row ever added
        index = (first[:, None] + torch.arange(H, device=device)) % self.size  # (B, H)
        obs, *steps, next_obs, candidates = self.columns
        actions, rewards, terminations, truncations = (column[e[:, None], index] for column in steps)

        running = 1 - torch.maximum(terminations, truncations)  # (B, H)
        alive = torch.cat([torch.ones_like(running[:, :1]), running[:, :-1].cumprod(1)], 1)
        discounts = self.args.gamma ** torch.arange(H, device=device)
        rewards = (alive * discounts * rewards).sum(1)
        ends = (alive * terminations).amax(1)
        last = e, index[:, -1]
        chunk = actions.flatten(1)  # (B, D)
        chunks = candidates[last].float()  # (B, N', D)
        return obs[e, index[:, 0]], chunk, rewards, ends, alive, next_obs[last], chunks, *windows

    def state_dict(self) -> dict:
        filled = min(int(self.added.max()), self.size)
        return dict(columns=[column[:, :filled].clone() for column in self.columns], added=self.added)

    def load_state_dict(self, state: dict):
        self.added.copy_(state["added"])
        for column, filled in zip(self.columns, state["columns"]):
            column[:, : filled.shape[1]] = filled


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
    """The clone, critics and slow copies, what labels offline data; how chunks are chosen, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.flow = networks["flow"].requires_grad_(args.bc_online)  # DEVIATION 2
        sizes = len(self.flow.inputs.scale), self.flow.chunk_dim, args
        self.critics = Heads(*sizes, layer_norm=True)  # it bounds Q of unseen chunks
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.outcome = Heads(*sizes, layer_norm=False) if args.offline == "pred" else None
        self.to(args.device)
        self.trained = [weight for weight in self.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=args.learning_rate, fused=True, capturable=True)
        self.update = Recorded(self.update, args)

    @torch.no_grad()
    def choose_chunks(self, obs, global_step: int | None):
        """obs (E, O) -> chunks (E, H or act_steps, A), NumPy: the best of N, before the critics learn a single one."""
        obs = torch.from_numpy(obs).to(self.args.device)
        single = global_step is None or global_step < self.args.warmup_steps  # DEVIATION 1
        candidates = self.flow.sample(obs, 1 if single else self.args.num_samples)  # (E, N, D)
        chunk = best_chunk(self.critics, obs, candidates)
        return chunk.unflatten(1, (self.args.skill_horizon, -1))[:, : self.args.act_steps or None].cpu().numpy()

    def update(self, *batch) -> dict:
        """One step of all that RL trains and of the slow copies, on what ReplayBuffer.sample gives; returns metrics."""
        args = self.args
        own, windows = batch[:7], batch[7:]
        if windows:
            labelled = demonstrations(self.flow, self.outcome, *windows, args)
            batch = [torch.cat(column) for column in zip(own, labelled)]
        obs, chunk, _, _, alive, next_obs, candidates = batch
        if args.num_candidates == 0:
            candidates = self.flow.sample(next_obs, args.num_samples)
        loss, metrics = critic_loss(self.critics, self.target, *batch[:6], candidates, args)
        if self.outcome:
            model_loss, model_metrics = outcome_loss(self.outcome, *own[:5])
            loss, metrics = loss + model_loss, metrics | model_metrics
        if args.bc_online:
            bc_loss = flow_loss(self.flow, obs, chunk, alive)
            loss, metrics = loss + bc_loss, metrics | dict(bc_loss=bc_loss.detach())
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in self.trained])
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critics.parameters()), args.tau)
        return dict(metrics, grad_norm=grad_norm)


def execute_chunks(envs, obs, chunks):
    """Env steps of chunks (E, H, A): obs, actions, rewards, terminations, truncations, next_obs, each (E, H, ...)."""
    steps = []
    for action in chunks.swapaxes(0, 1):  # time-first
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        steps.append((obs, action, rewards, terminations, truncations, next_obs))
        obs = next_obs
    return [np.stack(column, 1) for column in zip(*steps)]


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, global_step=None, video: Path | None = None):
    """Scores of episodes with random numbers of their own. Chunks: as after global_step, without it single ones."""
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            chunks = agent.choose_chunks(obs, global_step)
            *_, terminations, truncations, next_obs = execute_chunks(envs, obs, chunks)
            obs, ended = next_obs[:, -1], (terminations | truncations)[:, -1]
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """Both phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if args.offline != "none" or not (args.pretrained or checkpoint.exists()):  # before there is a folder
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    networks = make_networks(args)
    facts = {} if checkpoint.exists() else pretrain(args, networks, data, writer, stop)

    # Phase 2: online RL over chunks
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    windows = None if args.offline == "none" else data.to(args.device)
    rb = ReplayBuffer(obs.shape[1], envs.action_space.shape[1], args, windows)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, optimizer=agent.optimizer)
    if checkpoint.exists():
        state = load(checkpoint, parts)
        obs = envs.set_state(state["envs"])
        global_step, gradient_step, seconds, episodes, evaluations, facts = state["progress"]
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
            # ALGO LOGIC: put action logic here. A chunk for each environment; here H is act_steps (DEVIATION 7)
            chunks = agent.choose_chunks(obs, global_step)  # (E, H, A)
            steps = -envs.steps
            *rows, next_obs = execute_chunks(envs, obs, chunks)  # (E, H, ...)
            steps = steps + envs.steps  # (E,): fewer than H where the episode ended
            rows[2] = args.reward_scale * rows[2]
            ended = (rows[3] | rows[4])[:, -1]
            candidates = agent.flow.sample(torch.from_numpy(next_obs).to(args.device), args.num_candidates)
            rb.add(*rows, next_obs, candidates, steps)
            new_steps = int(steps.sum())
            global_step += new_steps
            bar.update(new_steps)

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
            obs = next_obs[:, -1]
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))

            # ALGO LOGIC: training
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            if rb.added.min() < args.skill_horizon:  # a ring has no window yet
                updates_due = 0
            while gradient_step < updates_due:
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, global_step)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations, facts
                save(checkpoint, state | dict(progress=progress), parts)
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
    """Command line -> Args, whose defaults are those of the task and its data, or of the run or agent given."""
    given = data_tools.command_line(Args, argv)  # unchecked: the task's defaults are to come
    saved = {}
    if given.resume:
        given.resume, saved = data_tools.saved_run(given.resume)
    if given.evaluate == "published":
        given.evaluate = str(SHIPPED / "agents" / f"{FILE.stem}_{given.env_id}.pt")
    if given.evaluate:
        state = data_tools.read_state(given.evaluate, ["agent"])
        saved = state["args"] | dict(script=state["script"], threads=0)
        saved |= dict(device=Args.device, run_dir=Args.run_dir)
    if (script := saved.pop("script", FILE.name)) != FILE.name:
        sys.exit(f"error: this is a run of another file: give it to {script}")
    family = data_tools.TASKS[saved.get("env_id", given.env_id)].data
    defaults = dict(env_id=given.env_id, **TASK_DEFAULTS.get(family, {}))
    people = defaults.pop("people", {})
    if given.data != "scripted":
        defaults |= people
    if given.published:
        defaults |= RELEASE["all"] | RELEASE.get(family, {})
    args = data_tools.command_line(Args, argv, Args(**defaults | saved), str(__doc__).split("\n")[0])
    args.evaluate, args.resume = given.evaluate, given.resume
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
