"""SPiRL + TD-MPC: the baseline of SkiMo (https://arxiv.org/abs/2207.07560) that plans with a world model from scratch

Idea: skills and prior of spirl.py, frozen; TD-MPC (https://arxiv.org/abs/2203.04955) chooses skills instead of actions,
its policy held to the prior by a KL. Its model does not know the offline data, unlike that of SkiMo.

    python algos/tdmpc_skills.py --env-id maze           # pre-training as spirl.py (shared), RL, evaluation
    python algos/tdmpc_skills.py --resume runs/FOLDER    # go on after Ctrl-C or a crash

1. Pre-training: that of spirl.py, whose models are shared
2. Downstream RL over skills u in (-1, 1), executed as z = 2 u (warm-up: any z ~ p). Repeat:
   act: plan by CEM with D, R, Q; execute the first skill for H steps of the frozen skill policy pi_L
   model: h_0 = E(s_0), h_{t+1} = D(h_t, u_t) on windows of N skills; consistency, reward and TD losses (eq. 7-10)
   policy: maximise the sum of rho^t min Q(h_t, u), u ~ pi(h_t), over imagined states h_t, less alpha times the sum of
      KL(2 u || p(s_t)) over encoded ones (eq. 11, with a KL); move the slow target copy

DEVIATION n: differences from the authors' release. Why, and scores: algos/docs/tdmpc_skills.md
1. KL divergences: exact, or quadrature for the policy's tanh (release: 100 samples, whose prior sees a scaled maze).
2. Pre-training: shorter, with a learning rate that decays; in the maze and on CALVIN a larger kl_coef.
3. Sines of positions as inputs, the maze scaled; in people's data arms shifted, objects recombined, larger kl_coef.
4. E environments act side by side. After ends and time-outs nothing counts (release: both are ignored).
5. Warm-up: 50,000 env steps in the maze, skills of the prior; the planner's schedules begin at its end.
6. Actions are those that pi_L was trained for, not their tanh. Kitchens: 30 observations, without the goal.
7. Windows of 5 skills, not 4, pair a state with the skill that follows, not with the one before; u is stored, not 2 u.
8. The planner knows the env step; plans worth NaN count as bad. 9. A window's errors are cut at 1e5, not 1e4.
--published takes the release's side of 2, 3, the actions in 6, the E environments in 4 and the 50,000 env steps in 5.
Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, RELEASE, SkillModel, make_networks, pretrain_loss, pretrain,
sample_skill, scalar_head, WorldModel, model_loss, policy_loss, plan, ReplayBuffer, Agent, rollout, train, QUADRATURE
Shapes: B batch, N skills per window, H steps per skill, O observation, F inputs, A action, Z skill, d latent state,
E environments, K skills per plan, P plans.
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
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    data: str = "scripted"  # offline data: scripted, d4rl (people's, of the kitchens), release (the authors') or a path
    pretrained: str | None = None  # begin with RL from this model: a path, or `published`: ours
    published: bool = False  # take the release's settings for this task
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
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
    eval_episodes: int = 20  # episodes of an evaluation, without exploration noise
    pretrain_eval_interval: int = 12_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 50  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of skill encoder, skill policy and prior
    position_features: bool = True  # sines and cosines of positions as inputs, maze scaled (release: raw)
    squash_actions: bool = False  # tanh on actions, although pi_L is trained without one, as in the release

    # Pre-training (nothing of it counts with --pretrained)
    pretrain_updates: int = 48_000  # gradient updates
    pretrain_batch_size: int = 128  # windows of H actions per update
    pretrain_lr: float = 1e-3  # first learning rate
    pretrain_lr_decay: bool = True  # decay to zero (release: constant)
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see data_tools.perturb (release: 0)
    recombine: bool = False  # show demonstrations again among objects moved by others (release: no)
    kl_coef: float = 1e-2  # weight of KL(q || N(0,1)) per dimension (release: 5e-4, maze 1e-3)

    # Downstream RL
    num_envs: int = 8  # environments side by side
    num_skills: int = 5  # N: skills per window and in the longest plan
    warmup_steps: int = 5_000  # env steps with the prior's skills before updates; at least an episode per environment
    batch_size: int = 128  # windows of N skills per update
    updates_per_step: float = 1.0  # gradient updates per env step after the warm-up
    model_dim: int = 512  # width of dynamics, reward, critics and task policy
    latent_dim: int = 50  # d: size of a latent state
    learning_rate: float = 1e-3  # of world model and task policy
    policy_std: float = 0.05  # std of the task policy, before the tanh
    alpha: float = 1.0  # weight of the prior KL
    gamma: float = 0.99  # discount per skill
    rho: float = 0.5  # weight rho^t of the t-th skill of a window
    tau: float = 0.01  # share of the online weights in a target update, after every second update
    max_grad_norm: float = 10.0  # bound of the gradient's norm
    consistency_coef: float = 2.0  # weight of the latent consistency
    reward_scale: float = 1.0  # factor on the task's reward

    # Planner
    num_samples: int = 512  # sampled plans per iteration
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 64  # best plans, which the next distribution is fitted to
    cem_iters: int = 6  # iterations
    temperature: float = 0.5  # factor on the values in the elites' softmax
    min_std: float = 0.5  # least std of sampled skills, at the start of the schedule
    min_std_end: float = 0.05  # the same after std_steps
    std_steps: int = 25_000  # env steps after the warm-up over which min_std falls
    horizon_steps: int = 25_000  # env steps after the warm-up over which plans grow from 1 to N skills

    def __post_init__(self):  # refuse what would train wrongly without a word; BatchNorm needs two windows
        least = dict(seed=0, threads=0, warmup_steps=0, pretrain_batch_size=2, policy_std=1e-6)
        plans = self.num_samples + self.num_policy_trajs
        most = dict(gamma=1, tau=1, rho=1, num_elites=plans, policy_std=1)  # beyond 1 the quadrature is wrong
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: the release's values where they differ from Args, and our own warm-up (DEVIATION 5);
# total_timesteps is the paper's. `people`: with people's data (--data other than scripted), DEVIATION 3.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000, warmup_steps=50_000),
    "kitchen": dict(kl_coef=5e-4, people=dict(kl_coef=1e-3, arm_noise=0.02, recombine=True)),
    "calvin": dict(total_timesteps=2_000_000),
}
# --published: the release's values of all tasks, and of each.
RELEASE = {
    "all": dict(position_features=False, squash_actions=True, pretrain_updates=480_000, pretrain_lr_decay=False,
                arm_noise=0.0, recombine=False, kl_coef=5e-4, num_envs=1),
    "maze": dict(pretrain_updates=530_000, kl_coef=1e-3, warmup_steps=5_000),
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
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ELU()]
        nn.init.orthogonal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


def scalar_head(in_dim: int, u: int) -> nn.Sequential:
    """Reward and Q: a normalised first layer, then an MLP of width u whose output starts near 0."""
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


# Gauss-Hermite quadrature: E f(x) for x ~ N(0, 1) is the sum of weight * f(node)
QUADRATURE = [(float(x), float(w) / math.sqrt(2 * math.pi)) for x, w in zip(*np.polynomial.hermite_e.hermegauss(9))]


def squashed_kl(p, q):
    """KL(law of squash(x) with x ~ p || q) of Gaussians p, q = (mean, std), each (..., Z) -> (...) in nats."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    kl = -std_p.log() - 0.5 * math.log(2 * math.pi * math.e)  # E log p(x), the negative entropy
    for node, weight in QUADRATURE:  # DEVIATION 1
        x = mean_p + node * std_p
        log_slope = math.log(8) - 2 * x - 2 * nn.functional.softplus(-2 * x)  # of squash: log(2 - 2 tanh(x)^2)
        square = ((squash(x) - mean_q) / std_q).square()
        log_q = -0.5 * square - std_q.log() - 0.5 * math.log(2 * math.pi)
        kl = kl - weight * (log_slope + log_q)
    return kl.sum(-1)


class WorldModel(nn.Module):
    """State encoder E, skill dynamics D, reward R, critics Q of TD-MPC."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        width, d, du = args.model_dim, args.latent_dim, args.latent_dim + args.skill_dim
        task = data_tools.TASKS[args.env_id]
        features = Features(obs_dim, args)
        features.scale = torch.tensor(task.obs_scale or [1.0] * obs_dim)  # also without position_features
        features.shift = torch.tensor(task.obs_shift or [0.0] * obs_dim)
        self.encoder = nn.Sequential(features, *mlp(features.size, 256, d))
        self.dynamics = mlp(du, width, width, d)
        self.reward_model = scalar_head(du, width)
        self.qf1 = scalar_head(du, width)
        self.qf2 = scalar_head(du, width)

    def next(self, h, u):  # D(h, u): the latent state after the whole skill
        return self.dynamics(torch.cat([h, u], -1))  # (..., d)

    def reward(self, h, u):  # R(h, u): the sum of rewards during the skill
        return self.reward_model(torch.cat([h, u], -1)).squeeze(-1)  # (...)

    def q(self, h, u):  # Q_1(h, u), Q_2(h, u)
        hu = torch.cat([h, u], -1)
        return self.qf1(hu).squeeze(-1), self.qf2(hu).squeeze(-1)  # 2 x (...)

    @torch.no_grad()
    def follow(self, online, tau: float):  # move this slow copy towards the online model
        torch._foreach_lerp_(list(self.parameters()), list(online.parameters()), tau)


def sample_skill(policy, h, args):
    """A reparameterised skill u of the policy, of fixed std before the tanh: h (..., d) -> (..., Z) in (-1, 1)."""
    mean = policy(h)
    return torch.tanh(mean + args.policy_std * torch.randn_like(mean))


def model_loss(model, target, task_policy, obs, u, rewards, dones, args):
    """World model and critics on windows of skills from the replay buffer (TD-MPC eq. 7-10).

    obs (B, N+1, O), u (B, N, Z), rewards and dones (B, N). Returns the loss, metrics, and detached latents for the
    policy: h = E(s) and h_pred rolled out from h_0, both (B, N+1, d).
    """
    N = u.shape[1]
    # TD target: the skill's reward, then the value of going on with the task policy. The slow copy keeps it steady.
    with torch.no_grad():
        next_h = model.encoder(obs[:, 1:])  # (B, N, d)
        h_target = target.encoder(obs[:, 1:])  # (B, N, d)
        next_q = torch.min(*target.q(next_h, sample_skill(task_policy, next_h, args)))  # (B, N)
        td_target = rewards + (1 - dones) * args.gamma * next_q  # (B, N), DEVIATION 4
    h_pred = [model.encoder(obs[:, 0])]
    for t in range(N):
        h_pred.append(model.next(h_pred[-1], u[:, t]))
    h_pred = torch.stack(h_pred, 1)  # (B, N+1, d)
    q1, q2 = model.q(h_pred[:, :-1], u)  # (B, N)
    reward = model.reward(h_pred[:, :-1], u)  # (B, N)

    # Consistency: predicted latent states agree with encoded ones, so that imagined states can be trusted.
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    error = (h_pred[:, 1:] - h_target).square().mean(-1)  # (B, N)
    consistency = (rho * error).sum(1)  # (B,)

    # Reward and value learn on imagined states, where they are used.
    reward_error = (rho * (reward - rewards).square()).sum(1)  # (B,)
    value_error = (q1 - td_target).square() + (q2 - td_target).square()  # (B, N)
    value_error = (rho * value_error).sum(1)  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5)  # DEVIATION 9
    loss = loss + 0.5 * reward_error.clamp(max=1e5)
    loss = loss + 0.1 * value_error.clamp(max=1e5)
    metrics = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    metrics |= dict(td_target=td_target, q_value=q1)
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    h = torch.cat([h_pred[:, :1], next_h], 1)  # (B, N+1, d)
    return loss.mean() / N, metrics, h.detach(), h_pred.detach()


def policy_loss(model, task_policy, skill_prior, obs, h, h_pred, args):
    """Task policy: maximise Q, stay close to the frozen prior (TD-MPC eq. 11, with a KL).

    obs (B, N+1, O), h and h_pred (B, N+1, d) detached. Returns the loss and metrics; metrics["prior_kl"] is in nats.
    """
    rho = args.rho ** torch.arange(obs.shape[1], device=obs.device)  # (N+1,)

    # Maximise Q on imagined states, where plans need the policy: choose the skills that the critics like best.
    q_value = torch.min(*model.q(h_pred, sample_skill(task_policy, h_pred, args)))  # (B, N+1)

    # Stay close to the prior on encoded states: the task is solved by skills that the data show. The prior is frozen.
    mean = task_policy(h)  # (B, N+1, Z)
    pi = mean, torch.full_like(mean, args.policy_std)
    prior_kl = squashed_kl(pi, skill_prior(obs)).clamp(max=100)  # (B, N+1); beyond no pull back, as in the release

    loss = (args.alpha * prior_kl - rho * q_value).sum(1).mean()  # a sum, as in the release: the gradient is bounded
    metrics = dict(policy_loss=loss, policy_q=q_value, prior_kl=prior_kl)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


@torch.no_grad()
def plan(model, task_policy, obs, mean, min_std, noise_scale, args):
    """Cross-entropy method (CEM) over sequences of K skills in the model, for all environments (TD-MPC, algorithm 1).

    obs (E, O); mean (E, K, Z): zeros or the last plan, moved on by one skill; min_std () least std of samples;
    noise_scale () 1 to explore, 0 to evaluate. Returns the first skill z = 2 u (E, Z) and the fitted mean (E, K, Z).
    """
    E, K, Z = mean.shape
    h0 = model.encoder(obs)  # (E, d)

    # Plans that the task policy proposes: they compete with the samples
    h = h0[:, None].expand(-1, args.num_policy_trajs, -1)  # (E, trajs, d)
    policy_plans = []
    for _ in range(K):
        policy_plans.append(sample_skill(task_policy, h, args))  # (E, trajs, Z)
        h = model.next(h, policy_plans[-1])  # (E, trajs, d)
    policy_plans = torch.stack(policy_plans, 2).nan_to_num(0.0)  # (E, trajs, K, Z); NaN: a state overflowed

    std = torch.full_like(mean, 2.0)
    for _ in range(args.cem_iters):
        # Sample plans
        noise = torch.randn(E, args.num_samples, K, Z, device=obs.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-1, 1)  # (E, num_samples, K, Z)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, Z)

        # Return of each plan: K predicted rewards, then the value of going on with the task policy
        h = h0[:, None].expand(-1, plans.shape[1], -1)  # (E, P, d)
        value = 0.0
        for t in range(K):
            value = value + args.gamma**t * model.reward(h, plans[:, :, t])  # (E, P)
            h = model.next(h, plans[:, :, t])  # (E, P, d)
        last_q = torch.min(*model.q(h, sample_skill(task_policy, h, args)))  # (E, P)
        value = (value + args.gamma**K * last_q).nan_to_num(-1e6)  # (E, P), NaN: a state overflowed

        # Fit the next distribution to the best plans, weighted by their value
        elite_value, index = value.topk(args.num_elites, 1)  # (E, elites)
        elites = plans.gather(1, index[..., None, None].expand(-1, -1, K, Z))  # (E, elites, K, Z)
        weight = torch.softmax(args.temperature * elite_value, 1)  # (E, elites)
        w = weight[..., None, None]  # (E, elites, 1, 1)
        elite_mean = (w * elites).sum(1)  # (E, K, Z)
        variance = (w * (elites - elite_mean[:, None]).square()).sum(1)  # (E, K, Z)
        std = variance.sqrt().maximum(min_std)  # (E, K, Z)
        mean = 0.1 * mean + 0.9 * elite_mean  # (E, K, Z)

    # First skill of an elite: weight / Exp(1) is largest at elite i with probability weight_i. So this draws like
    # torch.multinomial, without its wait for the GPU.
    picked = (weight / torch.empty_like(weight).exponential_()).argmax(1)  # (E,)
    u = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, Z)
    u = u + noise_scale * std[:, 0] * torch.randn_like(u)
    return 2 * u.clamp(-1, 1), mean


def with_room(x, rows: int):
    """The tensor x, twice as long with zeros if it has fewer rows: growing costs little however often it happens."""
    return x if rows <= len(x) else torch.cat([x, torch.zeros_like(x)])


class ReplayBuffer:
    """All skills of E environments, a row each, in flat tensors on the device; row r is followed by r + E.

    Learning sees finished episodes of at least N skills. z here is u, skills over 2 (DEVIATION 7).
    """

    def __init__(self, obs_dim: int, args: Args):
        self.num_skills = args.num_skills
        sizes = dict(obs=[obs_dim], z=[args.skill_dim], rewards=[], dones=[], next_obs=[obs_dim])
        room = 1024 * args.num_envs
        self.columns = {name: torch.zeros(room, *size, device=args.device) for name, size in sizes.items()}
        self.rows = 0  # filled so far
        self.episodes = torch.zeros(1024, 2, dtype=torch.long, device=args.device)  # first row, skills
        self.num_episodes = 0
        self.running = [0] * args.num_envs  # skills in each unfinished episode

    def add(self, **skill):
        """One skill of every environment: obs, next_obs (E, O), z (E, Z), rewards, dones (E,)."""
        E = len(self.running)
        for name, column in self.columns.items():
            self.columns[name] = with_room(column, self.rows + E)
            self.columns[name][self.rows : self.rows + E] = torch.as_tensor(skill[name])
        self.rows += E
        self.running = [T + 1 for T in self.running]
        for e in np.flatnonzero(skill["dones"]):
            T = self.running[e]
            self.running[e] = 0
            if T >= self.num_skills:
                self.episodes = with_room(self.episodes, self.num_episodes + 1)
                self.episodes[self.num_episodes] = torch.tensor([self.rows - E * T + e, T])
                self.num_episodes += 1

    def sample(self, batch_size: int):
        """Windows of N skills: obs (B, N+1, O), z (B, N, Z), rewards and dones (B, N).

        Episodes are uniform, and so is the start in an episode.
        """
        N, E, device = self.num_skills, len(self.running), self.episodes.device
        index = torch.randint(self.num_episodes, (batch_size,), device=device)  # (B,)
        first, T = self.episodes[index].unbind(1)  # (B,)
        start = (torch.rand(batch_size, device=device) * (T - N + 1)).long()  # (B,)
        rows = first[:, None] + E * (start[:, None] + torch.arange(N, device=device))  # (B, N)
        obs, z, rewards, dones = (self.columns[name][rows] for name in ("obs", "z", "rewards", "dones"))
        last = self.columns["next_obs"][rows[:, -1:]]  # (B, 1, O)
        return torch.cat([obs, last], 1), z, rewards, dones


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
    """What downstream RL trains, the frozen prior and skills; how skills are chosen, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        self.skills = networks["skills"].cpu()  # acts next to the simulator
        self.skill_prior = networks["prior"]
        obs_dim = len(self.skill_prior.features.scale)
        self.model = WorldModel(obs_dim, args).to(args.device)
        sizes = args.latent_dim, args.model_dim, args.model_dim, args.skill_dim
        self.task_policy = mlp(*sizes).to(args.device)  # pi(u | h): mean before the tanh, (..., d) -> (..., Z)
        self.target = copy.deepcopy(self.model)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)
        options = dict(lr=args.learning_rate, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.task_policy.parameters(), **options)
        self.update = Recorded(self.update, args)
        self.planners = {}  # recorded, by the number of environments and of skills
        self.last_mean = torch.zeros(args.num_envs, 0, device=args.device)  # (E, K, Z) of the last plans, none yet

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z) on the CPU: planned as after global_step, or without it the prior's."""
        args = self.args
        obs = torch.from_numpy(obs).to(args.device)
        if global_step is None:  # the warm-up
            return draw(self.skill_prior(obs)).cpu()  # DEVIATION 5
        steps = max(0, global_step - args.warmup_steps)  # since the first plan, DEVIATIONs 5 and 8
        growth = min(1.0, steps / args.horizon_steps)
        K = int(1 + growth * (args.num_skills - 1))  # skills per plan
        progress = min(1.0, steps / args.std_steps)
        min_std = args.min_std + progress * (args.min_std_end - args.min_std)
        min_std = torch.full((), min_std, device=args.device)  # made there: torch.tensor would wait for the device
        noise_scale = torch.full((), float(explore), device=args.device)
        mean = torch.zeros(len(obs), K, args.skill_dim, device=args.device)
        if self.last_mean.shape == mean.shape:
            mean[:, :-1] = self.last_mean[:, 1:]
        planner = functools.partial(plan, self.model, self.task_policy, args=args)
        planner = self.planners.setdefault((len(obs), K), Recorded(planner, args))
        z, mean = planner(obs, mean, min_std, noise_scale)
        self.last_mean = mean.clone()  # the next call overwrites what was recorded
        return z.cpu()

    def update(self, obs, u, rewards, dones) -> dict:
        """One step of model and task policy on windows from the replay buffer; returns metrics."""
        args, model = self.args, self.model
        loss, metrics, h, h_pred = model_loss(model, self.target, self.task_policy, obs, u, rewards, dones, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(model, self.task_policy, self.skill_prior, obs, h, h_pred, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = nn.utils.clip_grad_norm_(self.task_policy.parameters(), args.max_grad_norm)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        return dict(metrics, **policy_metrics, grad_norm=model_norm + policy_norm)


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
    agent = copy.copy(agent)  # with plans of its own, none yet
    agent.last_mean = torch.zeros(0)
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
    """Both phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    if envs.max_episode_steps <= args.skill_horizon * (args.num_skills - 1):
        sys.exit("error: --num-skills: a window is longer than an episode")
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if not (args.pretrained or checkpoint.exists()):  # before there is a folder: data may be refused
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    # Episodes that succeed end first, and an agent that learns from those alone fails. So the warm-up lasts until every
    # environment has finished an episode, or longer.
    args.warmup_steps = max(args.warmup_steps, args.num_envs * envs.max_episode_steps)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    networks = make_networks(args)
    facts = {} if checkpoint.exists() else pretrain(args, networks, data, writer, stop)

    # Phase 2: online RL over skills
    torch.manual_seed(args.seed)  # RL is the same whether the model was trained just now or comes from a file
    agent = Agent(args, networks)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = ReplayBuffer(obs.shape[1], args)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, model=agent.model_optimizer, policy=agent.policy_optimizer)
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        vars(rb).update(state["rb"])
        agent.last_mean = state["last_mean"]
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
            # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4)
            warming_up = global_step < args.warmup_steps
            z = agent.choose_skills(obs, None if warming_up else global_step, explore=True)  # (E, Z)
            steps_before = envs.steps.sum()
            next_obs, rewards, ended = execute_skill(envs, agent.skills, obs, z, args)
            rb.add(obs=obs, z=z / 2, rewards=args.reward_scale * rewards, dones=ended, next_obs=next_obs)
            new_steps = int(envs.steps.sum() - steps_before)
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
            obs = next_obs
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))
                agent.last_mean[torch.from_numpy(ended).to(args.device)] = 0  # plans of these episodes are over

            # ALGO LOGIC: training. As many updates as the env steps after the warm-up are worth
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            while rb.num_episodes > 0 and gradient_step < updates_due:
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
                too_short = len(episodes) - rb.num_episodes
                if too_short:
                    bar.write(f"no window (--num-skills) fits into {too_short} episodes: nothing is learnt from them")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations, facts
                save(checkpoint, state | dict(rb=vars(rb), last_mean=agent.last_mean, progress=progress), parts)
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
