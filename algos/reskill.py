"""ReSkill: Residual Skill Policies (Rana, Xu, Tidd, Milford & Suenderhauf, CoRL 2022), https://arxiv.org/abs/2211.02231

Idea: a bijection f(z; s) = g turns the skills that the data show in a state into N(0, I). A policy that acts in g
begins with what the data show, and can still reach every skill; then a residual policy mends each single action.

    python algos/reskill.py --env-id maze           # data, skills, flow (all are kept), RL, evaluation
    python algos/reskill.py --resume runs/FOLDER    # go on after Ctrl-C or a crash

1. Skills: spirl.py's to the letter, whose models are used, frozen from here on
2. Flow prior: maximise log p(z | s_0) = log N(f(z; s_0); 0, I) + log |det df/dz| for z ~ q of the data; then frozen
3. RL, on-policy. Repeat: T skills in each of E environments, g ~ pi(s), z = f^-1(g; s), H steps each:
   a' = pi_L(s, z), d ~ pi_res(s, z, a'), action a' + w d, where w = 1 / (1 + exp(-k (n - C))) after n env steps
   PPO for pi(g | s) on the sums of H rewards, PPO for pi_res(d | s, z, a') on each reward, each with a value of its own

Run beside the release on the same numbers: flow, roll-outs and PPO are equal but for rounding and the late stop in 8.
DEVIATION n: differences from the authors' release. Why, and scores: algos/docs/reskill.md
1, 2, 3, 6: those of spirl.py. 4. Skills are spirl.py's: larger networks, 10 entries instead of 4, more KL, no tanh.
5. The flow learns after the skills, starts as the identity, is half as wide, with one network for scale and shift of a
coupling; its learning rate decays to zero. Batches are twice as large, of windows drawn once.
7. pi starts as the prior, and the residual's std is smaller. Stds stay within bounds because parameters are put back.
8. Updates take batch_size rows, not all; the early stop comes one update later; roll-outs are shorter, go on where the
last one stopped, and all skills learn by their own advantages (release: the last by an old one); the gate opens
earlier; rewards of maze and CALVIN x .01.
9. Values of both policies see as far: gamma^(1/H) per env step, not gamma. The residual policy learns once w >= .01.
10. A skill ends with its episode. 11. Evaluations draw skills, not their means, and take the w of training, not 1.
--published takes SPiRL's release's side of 2 and of 3 in pre-training, and this one's width of the flow, roll-outs,
batches and gate. It shares no models: spirl.py's are then for actions with tanh.
Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, RELEASE, SkillModel, make_networks, pretrain_loss, pretrain,
Agent, train
Shapes: B batch, T skills of a roll-out, H steps per skill, O observation, F inputs, A action, Z skill, E environments.
"""

import copy
import functools
import gc
import hashlib
import io
import json
import math
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

PRETRAINED = "spirl"  # begins the names of pre-trained models; files with the same pre-training share them
SHIPPED = FILE.parents[1] / "benchmarks" / "results"  # models and agents that come with the code


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin, your own or one of Gymnasium
    total_timesteps: int = 1_000_000  # env steps
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    data: str = "scripted"  # offline data: scripted, d4rl (people's, of the kitchens), release (the authors') or a path
    pretrained: str | None = None  # begin with the flow on this model's skills: a path, or `published`: ours
    published: bool = False  # take the release's settings for this task
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint, or `published`: our agent, if there is one
    capture_video: bool = False  # with --evaluate: record its first episode as MP4

    # Seldom changed
    data_share: float = 1.0  # share of the data's episodes that are used, the first of a fixed permutation
    data_dir: str | None = None  # folder of offline data and pre-trained models (None: SKIMO_DATA_DIR or cache)
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, without noise in the residual
    pretrain_eval_interval: int = 12_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 50  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill (DEVIATION 4; release: 4)
    hidden_dim: int = 128  # width of skill encoder, skill policy and prior
    position_features: bool = True  # sines and cosines of positions as inputs, maze scaled (release: raw)
    squash_actions: bool = False  # tanh on actions, although pi_L is trained without one, as in SPiRL's release

    # Pre-training of skills (release: SPiRL's; with --pretrained only arm_noise and recombine count, for the flow)
    pretrain_updates: int = 48_000  # gradient updates
    pretrain_batch_size: int = 128  # windows of H actions per update
    pretrain_lr: float = 1e-3  # first learning rate
    pretrain_lr_decay: bool = True  # decay to zero (release: constant)
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see data_tools.perturb (release: 0)
    recombine: bool = False  # show demonstrations again among objects moved by others (release: no)
    kl_coef: float = 1e-2  # weight of KL(q || N(0,1)) per dimension (release: 5e-4, maze 1e-3)

    # Downstream RL
    num_envs: int = 8  # environments side by side
    rollout_skills: int = 70  # T: skills of each environment between two rounds of learning
    updates_per_rollout: int = 180  # gradient updates in a round
    batch_size: int = 1_000  # skills, and as many env steps, per update
    policy_dim: int = 64  # width of policies and values
    policy_lr: float = 1e-4  # of both policies
    value_lr: float = 1e-3  # of both values
    clip_ratio: float = 0.3  # how far PPO's ratio may leave 1 and still gain
    gamma: float = 0.99  # discount per skill; per env step its H-th root
    gae_lambda: float = 0.97  # weight of longer returns in the advantages
    residual_std: float = 0.135  # of the residual's noise at the start, in units of actions
    residual_middle: int = 100_000  # C: env steps after which the residual has half its weight
    residual_slope: float = 1.33e-4  # k: from .1 to .9 of its weight in 4.4 / k env steps
    reward_scale: float = 1.0  # factor on the task's reward

    # Flow prior
    flow_dim: int = 256  # width of its networks
    flow_windows: int = 400_000  # windows of the data whose skills it learns
    flow_updates: int = 20_000  # gradient updates
    flow_batch_size: int = 256  # windows per update

    def __post_init__(self):  # refuse what would train wrongly without a word; the flow halves skills
        least = dict(seed=0, threads=0, skill_dim=2, pretrain_batch_size=2, residual_std=0.02)
        most = dict(gamma=1, gae_lambda=1, residual_std=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data. Our own are residual_std (DEVIATION 7), reward_scale, the windows and updates of the
# flow, and the lengths of roll-outs; kl_coef is that of spirl.py. `people`: with people's data, as there.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000, rollout_skills=125, reward_scale=0.01),
    "kitchen": dict(kl_coef=5e-4, flow_windows=100_000, flow_updates=8_000, residual_std=0.05,
                    people=dict(kl_coef=1e-3, arm_noise=0.02, recombine=True)),
    "calvin": dict(total_timesteps=2_000_000, rollout_skills=90, reward_scale=0.01),
}  # fmt: skip
# --published: the values of SPiRL's and ReSkill's releases, of all tasks, and of each.
RELEASE = {
    "all": dict(position_features=False, pretrain_updates=480_000, pretrain_lr_decay=False, arm_noise=0.0,
                recombine=False, kl_coef=5e-4, flow_dim=512, flow_batch_size=128, num_envs=15, rollout_skills=200,
                batch_size=30_000, residual_middle=270_000, residual_slope=6.7e-5),
    "maze": dict(pretrain_updates=530_000, kl_coef=1e-3),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks
class Predictor(nn.Sequential):
    """Linear, LeakyReLU; num_blocks x (Linear, BatchNorm, LeakyReLU); Linear: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, u: int, num_blocks: int, out_dim: int, batch_norm: bool = True):
        layers = [nn.Linear(in_dim, u), nn.LeakyReLU(0.2)]
        for _ in range(num_blocks):
            norm = [nn.BatchNorm1d(u)] if batch_norm else []  # its own bias suffices
            layers += [nn.Linear(u, u, bias=not batch_norm), *norm, nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(u, out_dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, x):
        y = super().forward(x.flatten(0, -2))  # BatchNorm wants one leading axis
        return y.unflatten(0, x.shape[:-1])


def gaussian(x):
    """Network output (..., 2 * Z) -> mean and std, 2 x (..., Z)."""
    mean, log_std = x.chunk(2, -1)
    return mean, log_std.clamp(-10, 2).exp()


def draw(distribution):
    """One reparameterised sample of N(mean, std); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def squash(x):
    """Output x of the task policy -> skill (..., Z) in (-2, 2), where most of N(0, 1) lies."""
    return 2 * torch.tanh(x)


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., Z) -> (...) in nats; a common tanh leaves it as it is."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    square = std_p**2 + (mean_p - mean_q) ** 2
    return ((std_q / std_p).log() + square / (2 * std_q**2) - 0.5).sum(-1)  # DEVIATION 1


class Features(nn.Module):
    """Observations (..., O) -> inputs of the networks (..., F), F = size. DEVIATION 3: sines and cosines of positions
    are inputs, too, and the maze is scaled; see skimo.py's StateEncoder.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        scale, shift, periods = None, None, np.zeros((0, 0))
        if args.position_features:
            scale, shift, periods = task.obs_scale, task.obs_shift, task.position_periods
        self.register_buffer("scale", torch.tensor(scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)
        return torch.cat([obs * self.scale + self.shift, phase.sin(), phase.cos()], -1)  # (..., F)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | s, z)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, Z = args.hidden_dim, args.skill_dim  # u: width
        self.squash_actions = args.squash_actions
        self.features = Features(obs_dim, args)
        F = self.features.size
        self.lstm_input = nn.Linear(action_dim + F, u)
        self.lstm = nn.LSTM(u, u, batch_first=True)
        self.lstm_output = nn.Linear(u, u)
        self.skill_encoder = nn.Linear(u, 2 * Z)
        self.skill_policy = Predictor(F + Z, u, 5, action_dim)
        with torch.no_grad():  # the forget gate starts open
            self.lstm.bias_ih_l0[u : 2 * u] = 1.0
            self.lstm.bias_hh_l0[u : 2 * u] = 1.0

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, H, O) and actions (B, H, A) -> mean and std, 2 x (B, Z)."""
        steps = torch.cat([actions, self.features(obs)], -1)  # (B, H, A + F)
        outputs, _ = self.lstm(self.lstm_input(steps))  # (B, H, u)
        last = self.lstm_output(outputs[:, -1])  # (B, u)
        return gaussian(self.skill_encoder(last))

    def predict(self, obs, z):
        """pi_L as it is trained: observations (..., O) and skills (..., Z) -> actions (..., A)."""
        return self.skill_policy(torch.cat([self.features(obs), z], -1))

    def act(self, obs, z):
        """pi_L as it acts; the environment clips its actions to +-1."""
        action = self.predict(obs, z)  # (..., A)
        return torch.tanh(action) if self.squash_actions else action  # DEVIATION 6


class SkillPrior(nn.Module):
    """Prior p(z | s), in spirl.py the task policy as well: (..., O) -> mean and std, 2 x (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        self.net = Predictor(self.features.size, args.hidden_dim, 6, 2 * args.skill_dim)

    def forward(self, obs):
        return gaussian(self.net(self.features(obs)))


def make_networks(args: Args) -> nn.ModuleDict:
    """The networks of pre-training: skills and prior."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    networks = dict(skills=SkillModel(obs_dim, action_dim, args), prior=SkillPrior(obs_dim, args))
    return nn.ModuleDict(networks).to(args.device)


# -------------------------------------------------------------------------------------------------------- pre-training
def pretrain_loss(skills, prior, obs, actions, args):
    """Loss of skills and prior on windows of the offline data (SPiRL eq. 1, 2).

    obs (B, H+1, O) raw, actions (B, H, A). Returns the loss and metrics, scalars.
    """
    H = args.skill_horizon
    q = skills.encode_skill(obs[:, :-1], actions)  # 2 x (B, Z)
    z = draw(q)  # (B, Z)

    # Behavioural cloning: a skill has to hold all that is needed to repeat its actions.
    z_steps = z[:, None].expand(-1, H, -1)  # (B, H, Z)
    predicted = skills.predict(obs[:, :-1], z_steps)  # (B, H, A)
    bc_loss = (predicted - actions).square().mean()

    # KL to N(0, 1): keeps skills close together, so that those between two of them mean something as well.
    normal = torch.zeros_like(q[0]), torch.ones_like(q[1])
    kl_loss = kl_divergence(q, normal).mean()

    # The prior says which skills the data show in a state. It learns from samples, and its gradient does not reach q.
    p = prior(obs[:, 0])  # 2 x (B, Z)
    likelihood = torch.distributions.Normal(*p, validate_args=False)
    prior_loss = -likelihood.log_prob(z.detach()).sum(-1).mean()

    # The likelihood of actions has unit variance: up to a constant it is half the squared error
    loss = 0.5 * bc_loss + args.kl_coef * kl_loss / args.skill_dim + prior_loss
    prior_kl = kl_divergence(q, p).mean()
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss, prior_kl=prior_kl)
    return loss, {name: value.detach() for name, value in metrics.items()}


class PriorAgent:
    """Acts with squashed skills of the prior, as spirl.py's task policy does at first. It is a copy, on the CPU."""

    def __init__(self, networks: nn.ModuleDict):
        self.networks = copy.deepcopy(networks).cpu().eval()
        self.skills = self.networks["skills"]

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z): always samples."""
        return squash(draw(self.networks["prior"](torch.from_numpy(obs))))


def pretrain(args: Args, networks: nn.ModuleDict, data, writer: SummaryWriter, stop: threading.Event) -> dict:
    """Phase 1: learn skills and prior from the offline data; returns facts about them.

    A model is found again by its data, seed and task, by the arguments from skill_horizon up to num_envs, and by the
    code of these sections and of what draws batches: whoever changes one of them gets a new one.
    """
    task = data_tools.TASKS[args.env_id]
    family = f"{PRETRAINED}_{task.data or args.env_id}"  # both kitchens share their data
    names, settings = list(vars(args)), list(vars(args).items())
    first, middle, end = (names.index(name) for name in ("skill_horizon", "pretrain_updates", "num_envs"))
    made_by = dict(method=PRETRAINED, data=task.data or args.env_id) | dict(settings[first:middle])
    path = Path(args.pretrained or "")
    if args.pretrained == "published":
        path = SHIPPED / f"{family}_pretrained.pt"
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
        train_data = data_tools.recombined(train_data, task.objects, args.seed)  # DEVIATION 3
    networks.train()  # BatchNorm's statistics move in pre-training only
    optimizer = torch.optim.RAdam(networks.parameters(), lr=args.pretrain_lr)
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
            if args.pretrain_lr_decay:  # down to zero (DEVIATION 2)
                optimizer.param_groups[0]["lr"] = args.pretrain_lr * (1 - updates / total) ** 0.5
            batch = train_data.sample_windows(args.pretrain_batch_size, window)
            batch = data_tools.perturb(*batch, task.arm, args.arm_noise)  # DEVIATION 3
            metrics = gradients(*batch)
            max_norm = 0.001 if updates < 100 else float("inf")  # as in the release
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(networks.parameters(), max_norm)
            optimizer.step()
            updates += 1
            bar.update()

            finished = updates == total
            if finished or updates % 100 == 0:
                bar.set_postfix_str(", ".join(log(writer, "pretrain", metrics, updates).split(", ")[:2]))
            if finished or updates % args.pretrain_eval_interval == 0:
                # Losses do not tell whether skills are any good: let the prior act in the task
                num_episodes = args.pretrain_eval_episodes * (4 if finished else 1)
                scores = rollout(PriorAgent(networks), args, num_episodes, args.seed)
                networks.eval()
                with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []), torch.no_grad():
                    batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                    _, losses = pretrain_loss(*networks.values(), *batch, args)
                networks.train()
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
def zero_net(in_dim: int, u: int, out_dim: int, activation) -> nn.Sequential:
    """Two hidden layers of width u; its outputs start at 0."""
    last = nn.Linear(u, out_dim)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(in_dim, u), activation(), nn.Linear(u, u), activation(), last)


def log_density(x, distribution):
    """log N(x; mean, std) of x (..., n), summed over its last axis: (...)."""
    mean, std = distribution
    error = (x - mean) / std
    return (-0.5 * error.square() - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)


class FlowPrior(nn.Module):
    """Prior p(z | s): a bijection f between skills z and g ~ N(0, I) for every state s, of four couplings (R-NVP).

    Each scales and shifts one half of z by what it makes of the other half and the state, which can be undone.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        Z = args.skill_dim
        self.features = Features(obs_dim, args)
        half = (torch.arange(Z) < Z // 2).float()
        self.register_buffer("kept", torch.stack([half, 1 - half] * 2))  # (4, Z): 1 where a coupling leaves z alone
        sizes = self.features.size + Z, args.flow_dim, 2 * Z
        self.nets = nn.ModuleList([zero_net(*sizes, nn.LeakyReLU) for _ in range(4)])  # f starts as the identity

    def coupling(self, k: int, z, features):
        """Log scale and shift (..., Z) of the half that coupling k changes, from the half that it keeps."""
        kept = self.kept[k]
        S, T = self.nets[k](torch.cat([kept * z, features], -1)).chunk(2, -1)  # 2 x (..., Z)
        return (1 - kept) * torch.tanh(S), (1 - kept) * T

    def forward(self, z, obs):
        """f: skills (..., Z), states (..., O) -> g (..., Z) and log |det df/dz| (...)."""
        features = self.features(obs)
        g, log_det = z, torch.zeros_like(z[..., 0])
        for k in range(4):
            S, T = self.coupling(k, g, features)
            g = g * S.exp() + T
            log_det = log_det + S.sum(-1)
        return g, log_det

    def log_prob(self, z, obs):
        """log p(z | s) = log N(f(z; s); 0, I) + log |det df/dz| in nats: (..., Z), (..., O) -> (...) (R-NVP eq. 3)."""
        g, log_det = self(z, obs)
        return log_density(g, (torch.zeros_like(g), torch.ones_like(g))) + log_det

    def inverse(self, g, obs):
        """f^-1: g (..., Z), states (..., O) -> skills (..., Z)."""
        features = self.features(obs)
        z = g
        for k in reversed(range(4)):
            S, T = self.coupling(k, z, features)
            z = (z - T) * (-S).exp()
        return z


@torch.no_grad()
def encode_windows(skills, data, num_windows: int, args: Args):
    """First observations (n, O) of random windows of the data, and q of their skills, 2 x (n, Z)."""
    parts = []
    for _ in range(-(-num_windows // 1_000)):
        batch = data.sample_windows(1_000, args.skill_horizon + 1)
        obs, actions = data_tools.perturb(*batch, data_tools.TASKS[args.env_id].arm, args.arm_noise)  # DEVIATION 3
        parts.append((obs[:, 0], *skills.encode_skill(obs[:, :-1], actions)))
    return [torch.cat(column) for column in zip(*parts)]


def learn_flow(args: Args, networks: nn.ModuleDict, data, writer: SummaryWriter, stop: threading.Event) -> dict:
    """Phase 2: add the flow prior of the frozen skills to networks (DEVIATION 5); returns facts about it.

    A flow is found again by task, data, skills, the arguments of pre-training and flow, and the code down to here:
    whoever changes one of them gets a new one.
    """
    task = data_tools.TASKS[args.env_id]
    names, settings = list(vars(args)), list(vars(args).items())
    settings = settings[names.index("skill_horizon") : names.index("num_envs")]
    settings += [(name, value) for name, value in vars(args).items() if name.startswith("flow_")]
    code = FILE.read_text().split("- networks\n")[1].split("- PPO\n")[0]
    weights = [weight.cpu().numpy().tobytes() for weight in networks.state_dict().values()]
    made_from = [data.fingerprint, settings, data_tools.code_of(code), task.arm, task.objects, weights]
    key = hashlib.sha256(repr(made_from).encode()).hexdigest()[:12]
    path = data_tools.cache_dir(args.data_dir) / "flows" / f"{args.env_id}_{key}.pt"
    torch.manual_seed(0)  # the flow belongs to the skills, whatever the seed of RL is
    flow = FlowPrior(data.observations.shape[1], args).to(args.device)
    networks["flow"] = flow
    if path.exists():
        print(f"flow prior: {path}")
        return load(path, dict(flow=flow))["facts"]

    train_data, valid_data = data.to(args.device).split(0.99, args.skill_horizon + 1)
    if args.recombine:
        train_data = data_tools.recombined(train_data, task.objects)  # DEVIATION 3
    networks.eval()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, fused=True)
    torch.manual_seed(0)
    obs, *q = encode_windows(networks["skills"], train_data, args.flow_windows, args)
    parts = dict(flow=flow, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    updates, total = 0, args.flow_updates
    if unfinished.exists():  # go on where an earlier command was stopped
        updates = load(unfinished, parts)["updates"]
    data_tools.cut_curves(writer, updates, "pretrain/flow")  # what a crash has cut off is drawn anew

    def gradients(z, obs):
        loss = -flow.log_prob(z, obs).mean()  # a prior is good if what was done next in the data is likely under it
        optimizer.zero_grad()
        loss.backward()
        return dict(flow_loss=loss.detach())

    gradients = Recorded(gradients, args)
    with tqdm(desc="flow prior", total=total, initial=updates, unit="update") as bar:
        while updates < total:
            optimizer.param_groups[0]["lr"] = 1e-3 * (1 - updates / total) ** 0.5
            rows = torch.randint(len(obs), (args.flow_batch_size,), device=args.device)
            z = draw([part[rows] for part in q])  # (B, Z)
            metrics = gradients(z, obs[rows])
            metrics["flow_grad_norm"] = nn.utils.get_total_norm([weight.grad for weight in flow.parameters()])
            optimizer.step()
            updates += 1
            bar.update()
            if updates == total or updates % 100 == 0:
                bar.set_postfix_str(", ".join(log(writer, "pretrain", metrics, updates).split(", ")[:2]))
            if updates < total and (stop.is_set() or updates % 2_500 == 0):
                save(unfinished, dict(updates=updates), parts)
            if stop.is_set() and updates < total:
                sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {writer.log_dir}")

    # Both priors on the same skills of windows that the flow has not seen; and what the flow does in the task
    obs, *q = encode_windows(networks["skills"], valid_data, 4_000, args)
    with torch.no_grad():
        z = draw(q)
        facts = dict(flow_nll=-flow.log_prob(z, obs), gaussian_nll=-log_density(z, networks["prior"](obs)))
    facts = {name: float(value.mean()) for name, value in facts.items()}
    scores = rollout(Agent(args, networks), args, 4 * args.pretrain_eval_episodes, args.seed)
    facts |= dict(flow_return=scores["episodic_return"], flow_success=scores["success"])
    print(f"flow prior: {log(writer, 'pretrain', facts, updates)}")
    # In RL this is the prior: its return takes the place of the Gaussian's among the results
    facts |= dict(prior_return=scores["episodic_return"], prior_success=scores["success"], flow_updates=updates)
    save(path, dict(facts=facts), dict(flow=flow))
    unfinished.unlink(missing_ok=True)
    return facts


# ----------------------------------------------------------------------------------------------------------------- PPO
class ActorCritic(nn.Module):
    """Gaussian policy and value of PPO for inputs x (..., O + more). There is one for skills and one for residuals."""

    def __init__(self, obs_dim: int, more: int, out_dim: int, std: float, min_std: float, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        self.obs_dim = obs_dim
        self.features = Features(obs_dim, args)
        self.features.scale[:] = torch.tensor(task.obs_scale or 1.0)  # DEVIATION 3, with --published, too
        self.features.shift[:] = torch.tensor(task.obs_shift or 0.0)
        sizes = self.features.size + more, args.policy_dim
        self.policy = zero_net(*sizes, out_dim, nn.Tanh)
        self.value_net = zero_net(*sizes, 1, nn.Tanh)
        self.log_std = nn.Parameter(torch.full((out_dim,), math.log(std)))
        self.log_bounds = math.log(min_std), 0.0

    def inputs(self, x):
        obs, more = x[..., : self.obs_dim], x[..., self.obs_dim :]
        return torch.cat([self.features(obs), more], -1)  # (..., F + more)

    def forward(self, x):
        """Mean and std of the policy, 2 x (..., out_dim)."""
        mean = self.policy(self.inputs(x))
        return mean, self.log_std.exp().expand_as(mean)

    def value(self, x):
        return self.value_net(self.inputs(x)).squeeze(-1)  # (...)


def gae(rewards, values, next_values, cut, discount: float, gae_lambda: float):
    """Generalised advantages (GAE eq. 16), (T, E), time-first.

    next_values are 0 after a true end, cut is 1 where a path ends. With gae_lambda 1: the discounted rewards up to the
    path's end and the value behind it, less values.
    """
    advantages = rewards + discount * next_values - values  # (T, E), one-step errors at first
    keep = discount * gae_lambda * (1 - cut)
    for t in reversed(range(len(advantages) - 1)):
        advantages[t] += keep[t] * advantages[t + 1]
    return advantages


def ppo_loss(learner, x, actions, log_probs, advantages, returns, weights, args):
    """PPO's losses of a policy and its value on rows x (B, .), actions (B, .) and four columns (B,).

    log_probs are those of the policy that acted; weights are 0 for env steps after an episode's end, and a small batch
    may hold nothing else. Returns the loss and metrics, scalars.
    """
    share = weights / weights.sum().clamp(min=1)  # (B,)
    log_ratio = log_density(actions, learner(x)) - log_probs  # (B,)
    ratio = log_ratio.exp()  # (B,)

    # Make likelier what was better than expected, but gain nothing far from the policy that acted (PPO eq. 7).
    clipped = ratio.clamp(1 - args.clip_ratio, 1 + args.clip_ratio)
    gain = torch.min(ratio * advantages, clipped * advantages)  # (B,)
    policy_loss = -(share * gain).sum()

    # The value is what is expected in a state.
    value_loss = (share * (learner.value(x) - returns).square()).sum()

    # Policy and value share no weights, so their sum trains each alone.
    kl = -(share * log_ratio).sum()
    metrics = dict(kl=kl, policy_loss=policy_loss, value_loss=value_loss, std=learner.log_std.exp().mean())
    return policy_loss + value_loss, {name: value.detach() for name, value in metrics.items()}


class RolloutBuffer:
    """T skills of E environments, which PPO learns from once: rows (T E, ...) on the device, t E + e is row t of e."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.args = args
        H, A = args.skill_horizon, action_dim
        shapes = dict(obs=(H, obs_dim), z=(args.skill_dim,), actions=(H, A), residuals=(H, A), step_rewards=(H,))
        shapes |= dict(terminations=(), truncations=(), steps=(), next_obs=(obs_dim,))
        self.size = args.rollout_skills * args.num_envs
        self.columns = {name: torch.zeros(self.size, *shape, device=args.device) for name, shape in shapes.items()}
        self.filled = 0

    def add(self, **skill):
        """One skill of every environment, as collect_skill returns it. A full buffer begins anew: no row is stale."""
        first = self.filled % self.size
        self.filled = first + self.args.num_envs
        for name, column in self.columns.items():
            column[first : self.filled] = torch.as_tensor(skill[name])

    @torch.no_grad()
    def prepare(self, agent):
        """Tables of rows of a full buffer for the updates: of skills, and of env steps, with ppo_loss's columns."""
        T, E, H = self.args.rollout_skills, self.args.num_envs, self.args.skill_horizon
        obs, z, actions, residuals, rewards, terminations, truncations, steps, next_obs = self.columns.values()
        ended = torch.maximum(terminations, truncations)  # (T E,); both may come at once

        # Skills. f is a bijection: g is what the policy drew. Beyond a time-out the task goes on, so its value counts
        first = obs[:, 0]  # (T E, O)
        g, _ = agent.flow(z, first)  # (T E, Z)
        values = agent.high.value(first)  # (T E,)
        next_values = agent.high.value(next_obs) * (1 - terminations)  # (T E,)
        rows = first, g, rewards.sum(1), values, next_values, ended, torch.ones_like(ended)
        rows = [column.unflatten(0, (T, E)) for column in rows]  # (T, E, ...), time-first
        self.high = self.table(agent.high, *rows, self.args.gamma)

        # Env steps. A path is cut where its episode or the roll-out ends
        def paths(column):
            """(T E, H, ...) -> (T H, E, ...), time-first."""
            return column.unflatten(0, (T, E)).transpose(1, 2).flatten(0, 1)

        z_steps = z[:, None].expand(-1, H, -1)  # (T E, H, Z)
        x = torch.cat([obs, z_steps, actions], -1)  # (T E, H, O + Z + A)
        # What follows the last row is not known yet: the value of going on with its skill stands for it
        next_action = agent.skill_model.act(next_obs, z)  # (T E, A)
        last = torch.cat([next_obs, z, next_action], -1)  # (T E, O + Z + A)
        last_values = agent.residual.value(last) * (1 - terminations)  # (T E,)
        step = torch.arange(H, device=obs.device)
        stops = ended.bool()  # (T E,)
        stops[-E:] = True
        cut = (step == steps[:, None] - 1) & stops[:, None]  # (T E, H)
        values = paths(agent.residual.value(x))  # (T H, E)
        behind = paths(last_values[:, None].expand(-1, H))  # (T H, E)
        next_values = torch.where(paths(cut), behind, values.roll(-1, 0))  # (T H, E)
        taken = step < steps[:, None]  # (T E, H)
        rows = paths(x), paths(residuals), paths(rewards), values, next_values, paths(cut.float()), paths(taken.float())
        self.residual = self.table(agent.residual, *rows, self.args.gamma ** (1 / H))  # DEVIATION 9

        # How much the residual does, without its noise, which is as large however little was learnt
        mean, _ = agent.residual(x)  # (T E, H, A)
        change = agent.skills.weight * mean[taken].abs().mean()
        self.residual_share = change / (actions[taken].abs().mean() + change)

    def table(self, learner, x, actions, rewards, values, next_values, cut, weights, discount: float):
        """Rows of paths (T, E, ...): inputs, actions, log-probabilities, advantages, returns, weights."""
        path = self.args.reward_scale * rewards, values, next_values, cut, discount
        advantages = gae(*path, self.args.gae_lambda)  # (T, E)
        returns = values + gae(*path, 1.0)  # (T, E)
        share = weights / weights.sum()
        centred = advantages - (share * advantages).sum()
        variance = (share * centred.square()).sum()
        advantages = centred / (variance.sqrt() + 1e-8)
        log_probs = log_density(actions, learner(x))
        return [column.flatten(0, 1) for column in (x, actions, log_probs, advantages, returns, weights)]

    def sample(self, batch_size: int):
        """Rows of both tables, no row twice: 2 x 6 columns (B, ...), all rows if there are fewer (DEVIATION 8)."""
        batch = []
        for table in (self.high, self.residual):
            rows = torch.randperm(len(table[0]), device=self.args.device)[:batch_size]
            batch += [column[rows] for column in table]
        return batch

    def state_dict(self) -> dict:
        filled = {name: column[: self.filled].clone() for name, column in self.columns.items()}
        return dict(filled, filled=self.filled)

    def load_state_dict(self, state: dict):
        self.filled = state["filled"]
        for name, column in self.columns.items():
            column[: self.filled] = state[name]


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


class SkilledActor:
    """What acts next to the simulator, a copy on the CPU: the skill policy plus w times the residual."""

    def __init__(self, agent: "Agent"):
        self.skills = copy.deepcopy(agent.skill_model).cpu()
        self.residual = copy.deepcopy(agent.residual).cpu()
        self.weight = 0.0  # w

    def propose(self, obs, z):
        """Actions a' of the skill policy (E, A), and the residual's mean and std, 2 x (E, A)."""
        action = self.skills.act(obs, z)
        return action, self.residual(torch.cat([obs, z, action], -1))

    def act(self, obs, z):
        """Actions (E, A) without noise, for evaluations."""
        action, (mean, _) = self.propose(obs, z)
        return action + self.weight * mean


class Agent(nn.Module):
    """The policies and values that PPO trains, the frozen flow and skills; how skills are chosen, one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        obs_dim, A = data_tools.env_sizes(args.env_id)
        Z = args.skill_dim
        self.skill_model = networks["skills"]
        # A run that is resumed or evaluated has its flow in the checkpoint
        self.flow = networks["flow"] if "flow" in networks else FlowPrior(obs_dim, args)
        self.high = ActorCritic(obs_dim, 0, Z, 1.0, 0.2, args)  # DEVIATION 7: N(0, I), so it starts as the prior
        self.residual = ActorCritic(obs_dim, Z + A, A, args.residual_std, 0.02, args)
        self.learners = dict(high=self.high, residual=self.residual)
        self.to(args.device)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        for frozen in (self.skill_model, self.flow):
            frozen.requires_grad_(False)
        self.skills = SkilledActor(self)
        policies = [*self.policy_weights("high"), *self.policy_weights("residual")]
        values = [*self.high.value_net.parameters(), *self.residual.value_net.parameters()]
        groups = dict(params=policies, lr=args.policy_lr), dict(params=values, lr=args.value_lr)
        self.optimizer = torch.optim.Adam(groups, fused=True, capturable=True)
        self.steps = {}  # by the policies that are learning

    def policy_weights(self, name: str) -> list:
        return [*self.learners[name].policy.parameters(), self.learners[name].log_std]

    def load_state_dict(self, state: dict):
        super().load_state_dict(state)
        self.skills = SkilledActor(self)

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z) on the CPU: samples of the policy, also in evaluations (DEVIATION 11). Sets the
        weight of the residual to that of global_step; without it to 0.
        """
        self.skills.weight = 0.0 if global_step is None else residual_weight(global_step, self.args)
        obs = torch.from_numpy(obs).to(self.args.device)
        return self.flow.inverse(draw(self.high(obs)), obs).cpu()

    def update(self, *batch, learning=("high", "residual")) -> dict:
        """One step of both values, and of those policies that are learning, on a batch of RolloutBuffer.sample."""
        if learning not in self.steps:
            self.steps[learning] = Recorded(functools.partial(self.step, learning), self.args)
        return self.steps[learning](*batch)

    def step(self, learning: tuple, *batch) -> dict:
        loss, metrics = 0.0, {}
        for name, rows in (("high", batch[:6]), ("residual", batch[6:])):
            part, facts = ppo_loss(self.learners[name], *rows, self.args)
            loss = loss + part
            metrics |= {f"{name}_{key}": value for key, value in facts.items()}
        self.optimizer.zero_grad()
        loss.backward()
        gradients = [[weight.grad for weight in learner.parameters()] for learner in self.learners.values()]
        metrics["grad_norm"] = sum(nn.utils.get_total_norm(part) for part in gradients)
        for name in self.learners.keys() - learning:
            for weight in self.policy_weights(name):
                weight.grad = None  # so that Adam leaves it alone
        self.optimizer.step()
        for learner in self.learners.values():
            learner.log_std.data.clamp_(*learner.log_bounds)  # DEVIATION 7
        return metrics


def residual_weight(global_step: int, args: Args) -> float:
    """w, the sigmoid gate: 0 while the skills alone are tuned, 1/2 after C env steps, then 1."""
    x = args.residual_slope * (global_step - args.residual_middle)
    return 0.5 + 0.5 * math.tanh(x / 2)  # 1 / (1 + exp(-x)), without overflow


@torch.no_grad()
def collect_skill(envs, actor: SkilledActor, obs, z, args: Args) -> dict:
    """H env steps with skills z (E, Z) and noisy residuals, on the CPU next to the simulator. obs (E, O).

    Returns what the buffer keeps of them, NumPy but for z: obs (E, H, O), z (E, Z), actions of the skill policy and
    residuals (E, H, A), step_rewards (E, H), 0 after the end, terminations, truncations, steps (E,), next_obs (E, O).
    """
    steps_before = envs.steps.copy()
    rows = []
    for _ in range(args.skill_horizon):
        action, distribution = actor.propose(torch.from_numpy(obs), z)  # (E, A), 2 x (E, A)
        residual = draw(distribution)  # (E, A)
        command = action + actor.weight * residual  # (E, A)
        next_obs, reward, terminations, truncations, _ = envs.step(command.numpy())
        rows.append(dict(obs=obs, actions=action.numpy(), residuals=residual.numpy(), step_rewards=reward))
        obs = next_obs
    skill = {name: np.stack([row[name] for row in rows], 1) for name in rows[0]}
    skill |= dict(z=z, terminations=terminations, truncations=truncations, next_obs=obs)
    return dict(skill, steps=envs.steps - steps_before)  # DEVIATION 10


@torch.no_grad()
def execute_skill(envs, skills, obs, z, args: Args):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O). Returns next_obs (E, O), the rewards' sum (E,), and whose episodes have ended (E,): they stand still.
    """
    rewards = np.zeros(len(obs), dtype=np.float32)
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += reward
        ended = terminations | truncations  # stays true: these environments wait to be reset
    return obs, rewards, ended


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, global_step=None, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, with explore=False and with random numbers of its
    own. Skills are chosen as after global_step; without it they are those of the warm-up, the prior's.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            z = agent.choose_skills(obs, global_step, explore=False)
            obs, _, ended = execute_skill(envs, agent.skills, obs, z, args)
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """All phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.num_envs * args.rollout_skills * args.skill_horizon)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if not checkpoint.exists():  # before there is a folder: data may be refused
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    networks = make_networks(args)
    facts = {}
    if not checkpoint.exists():
        facts = pretrain(args, networks, data, writer, stop)
        facts |= learn_flow(args, networks, data, writer, stop)

    # Phase 3: online RL over skills and residuals
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = RolloutBuffer(obs.shape[1], envs.single_action_space.shape[0], args)
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
            # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps
            z = agent.choose_skills(obs, global_step, explore=True)  # (E, Z)
            skill = collect_skill(envs, agent.skills, obs, z, args)
            rb.add(**skill)
            ended = skill["terminations"] | skill["truncations"]
            new_steps = int(skill["steps"].sum())
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
            obs = skill["next_obs"]
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))

            # ALGO LOGIC: training. A policy rests once it is so many nats from the one that acted
            if rb.filled == rb.size:
                rb.prepare(agent)
                bounds = dict(high=0.45, residual=1.35)  # as in the release: 1.5 times .3 and .9
                if agent.skills.weight < 0.01:  # DEVIATION 9
                    del bounds["residual"]
                for _ in range(args.updates_per_rollout):
                    metrics = agent.update(*rb.sample(args.batch_size), learning=tuple(bounds))
                    gradient_step += 1
                    bounds = {name: kl for name, kl in bounds.items() if metrics[f"{name}_kl"] <= kl}  # DEVIATION 8
                log(writer, "losses", metrics, global_step)
                curves = dict(residual_weight=agent.skills.weight, residual_share=rb.residual_share)
                log(writer, "charts", curves, global_step)
                agent.skills = SkilledActor(agent)

            # Evaluate without noise in the residual. Skills are drawn: the mean of two good ones need not be good
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
