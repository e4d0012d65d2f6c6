"""SkiMo with single-step dynamics: ablation of SkiMo (Shi, Lim & Lee, CoRL 2022), https://arxiv.org/abs/2207.07560

Idea: skills, prior, R, Q and planner are SkiMo's, but the dynamics predicts one env step instead of a whole skill. A
plan of K skills takes K * H predictions, and each adds its error. The paper says no more: this reading is ours.
Differs from skimo.py in: PRETRAINED, TASK_DEFAULTS, WorldModel, SkillModel, make_networks, pretrain_loss, model_loss,
    ReplayBuffer, Agent, execute_skill, rollout, train

    python algos/skimo_single_step.py --env-id maze             # as skimo.py, with a pre-trained model of its own

1. Pre-training: encode states as h = E(s), chunks of H actions as skills z ~ q. Loss = behavioural cloning
   + KL(q || N(0,1)) (eq. 3) + reconstruction + consistency of each h_{t+1} = D1(h_t, a_t) + KL(q || p(h_i)) (eq. 5)
2. Downstream RL. The task policy pi starts as the prior p. Repeat:
   act: plan skills by CEM with R, Q, D(h, z) = H times {a = mode of pi_L(h, z), h = D1(h, a)}; run the first one
   model update: consistency of D1 from each skill's E(s), reward and TD losses on windows of N skills (eq. 6)
   policy update: maximise Q(h, z) - alpha KL(pi(h) || p(h)) (eq. 7), maze: tune alpha; move the slow target copy

DEVIATION n: differences from the authors' release. Why, and scores: algos/docs/skimo_single_step.md
1. KL divergences are exact, not averages of samples.
2. Maze, own tasks: the skill policy is trained on bc_chunks random chunks of a window, not on all.
3. Short pre-training: small batches (kitchens: and windows), larger kl_coef, falling rate, sines; people's data varied.
4. E environments side by side, a warm-up episode of each. Smaller batches, not on CALVIN; maze: twice as many, N = 5.
5. CEM starts from plans of the task policy, with fewer samples and rounds and less noise: min_std, not a plan's std.
6. The target copy is faster: tau is .05, not .01.
7. Kitchens: alpha is .05, not .5, and Q in eq. 7 sees encoded states.
8. Elsewhere Q sees imagined states, one skill ahead of encoded ones (skimo.py: t skills); in the release h_0 for all t.
9. The target copy of RL starts as the online model, not as the slow copy of pre-training.
--published takes the release's side of 2, 3, 4, 6 and of alpha in 7; Q as in 8.
Shapes: B batch, N skills per window, H steps per skill, O observation, A action, Z skill, d latent state,
E environments, K skills per plan, P plans, C chunks.
"""

import copy
import functools
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

PRETRAINED = "skimo_single_step"  # begins the names of pre-trained models
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
    pretrain_eval_interval: int = 3_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 50  # roll-outs in a validation; four times as many at the end

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of hidden layers
    latent_dim: int = 256  # d: size of a latent state
    skill_encoder: Literal["mlp", "lstm"] = "lstm"  # architecture of q
    position_features: bool = True  # sines and cosines of positions as inputs (release: none)

    # Pre-training (with --pretrained only what is "in both phases" counts)
    pretrain_updates: int = 12_000  # gradient updates
    pretrain_skills: int = 10  # skills per window (release: 10, CALVIN 1)
    pretrain_batch_size: int = 128  # windows per update (release: 512)
    bc_chunks: int = 4  # chunks of each window that the skill policy is trained on (release: all)
    pretrain_lr: float = 1e-3  # peak learning rate (release: 1e-3)
    pretrain_lr_decay: bool = True  # warm-up, then decay to zero (release: constant)
    arm_noise: float = 0.0  # std in rad of shifts of the demonstrated arm, see data_tools.perturb (release: 0)
    recombine: bool = False  # show demonstrations again among objects moved by others (release: no)
    kl_coef: float = 3e-3  # weight of KL(q || N(0,1)) (release: 1e-4)
    consistency_coef: float = 2.0  # weight of the latent consistency, in both phases
    rho: float = 0.5  # weight rho^t of the t-th skill of a window, in both phases
    max_grad_norm: float = 100.0  # bound of the gradient's norm, in both phases

    # Downstream RL
    num_envs: int = 8  # environments side by side
    num_skills: int = 10  # N: skills per window and in the longest plan
    warmup_steps: int = 5_000  # env steps with the prior's skills before updates; at least an episode per environment
    batch_size: int = 64  # windows of N skills per update (release: 256, maze 128)
    updates_per_step: float = 10 / 500  # gradient updates per env step, the warm-up's included
    learning_rate: float = 1e-3  # of world model and task policy
    alpha: float = 0.5  # weight of the prior KL (its first value if autotune)
    autotune: bool = False  # tune alpha so that the prior KL is target_kl
    target_kl: float = 3.0  # nats between task policy and prior
    policy_latents: Literal["imagined", "encoded"] = "imagined"  # states of Q in eq. 7: predicted (paper) or encoded
    gamma: float = 0.99  # discount per skill
    tau: float = 0.05  # share of the online weights in a target update (release: 0.01)
    reward_scale: float = 1.0  # factor on the task's reward

    # Planner
    num_samples: int = 64  # sampled plans per iteration (release: 512)
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 32  # best plans, which the next distribution is fitted to (release: 64)
    cem_iters: int = 2  # iterations (release: 6)
    temperature: float = 0.5  # factor on the values in the elites' softmax
    min_std: float = 0.05  # least std, and exploration noise, at the start of the schedule (release: 0.5)
    min_std_end: float = 0.01  # the same after std_steps
    std_steps: int = 25_000  # env steps over which min_std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N skills

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, num_policy_trajs=2, alpha=1e-6)
        plans = self.num_samples + self.num_policy_trajs
        most = dict(gamma=1, tau=1, rho=1, bc_chunks=self.pretrain_skills, num_elites=plans)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: the release's values where they differ from Args, and our own for pre-training
# (DEVIATION 2, 3), the maze's updates, windows (4), planners (5), total_timesteps, kitchens' alpha, policy_latents (7).
# `people`: with people's data (--data other than scripted) arms are shifted, objects recombined (3).
TASK_DEFAULTS = {
    "maze": dict(latent_dim=128, skill_encoder="mlp", pretrain_updates=8_000, pretrain_batch_size=64, bc_chunks=1,
                 pretrain_lr=1.5e-3, total_timesteps=200_000, warmup_steps=50_000, updates_per_step=20 / 500,
                 num_skills=5, alpha=1.0, autotune=True, horizon_steps=1_000_000, std_steps=300_000),
    "kitchen": dict(pretrain_updates=10_000, pretrain_skills=5, bc_chunks=5, pretrain_batch_size=64, kl_coef=5e-4,
                    alpha=0.05, policy_latents="encoded",
                    people=dict(arm_noise=0.02, recombine=True)),
    "calvin": dict(hidden_dim=256, num_skills=1, pretrain_updates=10_000, pretrain_skills=1, bc_chunks=1,
                   pretrain_batch_size=256, kl_coef=1e-2, alpha=0.1, reward_scale=0.01, total_timesteps=2_000_000,
                   batch_size=256, num_samples=128, cem_iters=3),
}  # fmt: skip
# --published: the release's values, but for the planner's (DEVIATION 5); of all tasks, and of each.
RELEASE = {
    "all": dict(position_features=False, pretrain_updates=425_000, pretrain_skills=10, pretrain_batch_size=512,
                bc_chunks=10, pretrain_lr_decay=False, arm_noise=0.0, recombine=False, kl_coef=1e-4, num_envs=1,
                batch_size=256, policy_latents="imagined", tau=0.01),
    "maze": dict(pretrain_updates=700_000, pretrain_lr=1e-3, total_timesteps=2_000_000, batch_size=128,
                 updates_per_step=10 / 500, num_skills=10),
    "kitchen": dict(alpha=0.5),
    "calvin": dict(pretrain_skills=1, bc_chunks=1),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks
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
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


def gaussian_parameters(x):
    """Outputs (..., 2 * Z) -> mean in +-5, std in 1e-4 + [e^-10, e^2] of the Gaussian under a tanh, 2 x (..., Z)."""
    mean, log_std = x.chunk(2, -1)
    return 5 * torch.tanh(mean / 5), log_std.clamp(-10, 2).exp() + 1e-4


def sample_skill(distribution):
    """One reparameterised sample of tanh(N(mean, std)); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return torch.tanh(mean + std * torch.randn_like(mean))


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., Z) -> (...) in nats; a common tanh leaves it as it is."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    square = std_p**2 + (mean_p - mean_q) ** 2
    return ((std_q / std_p).log() + square / (2 * std_q**2) - 0.5).sum(-1)  # DEVIATION 1


class StateEncoder(nn.Module):
    """Raw observations (..., O) -> latent states (..., d). DEVIATION 3: sines and cosines of positions are inputs, too:
    what matters, a wall or a centimetre, is less than a fortieth of their range, and plain MLPs are slow to resolve it.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = task.position_periods if args.position_features else np.zeros((0, 0))
        self.register_buffer("scale", torch.tensor(task.obs_scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(task.obs_shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.net = mlp(obs_dim + 2 * periods.size, args.hidden_dim, args.latent_dim)

    def scaled(self, obs):  # what the decoder reconstructs
        return obs * self.scale + self.shift  # (..., O)

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)  # (..., places * periods)
        return self.net(torch.cat([self.scaled(obs), phase.sin(), phase.cos()], -1))  # (..., d)


class WorldModel(nn.Module):
    """One-step dynamics D1, reward R, critics Q, observation decoder; state encoder E and pi_L are those of skills."""

    def __init__(self, obs_dim: int, action_dim: int, skills: nn.Module, args: Args):
        super().__init__()
        u, d, dz = args.hidden_dim, args.latent_dim, args.latent_dim + args.skill_dim  # u: width
        self.skill_horizon = args.skill_horizon
        self.encoder = skills.encoder
        self.skill_policy = skills.skill_policy
        self.dynamics = mlp(d + action_dim, u, u, u, u, d)
        self.reward_model = scalar_head(dz, u)
        self.qf1 = scalar_head(dz, u)
        self.qf2 = scalar_head(dz, u)
        self.decoder = mlp(d, u, u, 2 * obs_dim)

    def next(self, h, z):  # D(h, z): the latent state after the whole skill, step by step
        for _ in range(self.skill_horizon):
            mean, _ = gaussian_parameters(self.skill_policy(torch.cat([h, z], -1)))
            h = self.dynamics(torch.cat([h, torch.tanh(mean)], -1))
        return h  # (..., d)

    def next_steps(self, h, actions):  # D1: the latent states after each of T actions (..., T, A)
        h_pred = []
        for action in actions.unbind(-2):
            h = self.dynamics(torch.cat([h, action], -1))
            h_pred.append(h)
        return torch.stack(h_pred, -2)  # (..., T, d)

    def reward(self, h, z):  # R(h, z): the sum of rewards during the skill
        return self.reward_model(torch.cat([h, z], -1)).squeeze(-1)  # (...)

    def q(self, h, z):  # Q_1(h, z), Q_2(h, z)
        hz = torch.cat([h, z], -1)
        return self.qf1(hz).squeeze(-1), self.qf2(hz).squeeze(-1)  # 2 x (...)

    def decode(self, h):  # mean and std, in [0.1, 1.5], of the scaled observation
        mean, raw_std = self.decoder(h).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)  # 2 x (..., O)

    @torch.no_grad()
    def follow(self, online, tau: float):  # move this slow copy towards the online model
        torch._foreach_lerp_(list(self.parameters()), list(online.parameters()), tau)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | h, z), on the state encoder E of the world model."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, d, Z = args.hidden_dim, args.latent_dim, args.skill_dim  # u: width
        self.encoder = StateEncoder(obs_dim, args)
        self.skill_policy = mlp(d + Z, u, u, u, u, 2 * action_dim)  # as in the release; its std has no use
        self.lstm = None
        if args.skill_encoder == "lstm":
            self.lstm = nn.LSTM(action_dim + d, 128, batch_first=True)
            self.skill_encoder = nn.Sequential(nn.Linear(128, 2 * Z))  # PyTorch's own weights, as in the release
        else:
            self.skill_encoder = mlp(args.skill_horizon * action_dim + d, u, u, u, u, 2 * Z)

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, N, H, O) and actions (B, N, H, A) -> mean and std, 2 x (B, N, Z)."""
        if self.lstm is None:
            first = self.encoder(obs[:, :, 0])  # (B, N, d)
            x = torch.cat([actions.flatten(2), first], -1)  # (B, N, H * A + d)
        else:
            steps = torch.cat([actions, self.encoder(obs)], -1)  # (B, N, H, A + d)
            outputs, _ = self.lstm(steps.flatten(0, 1))  # (B * N, H, 128)
            x = outputs[:, -1].unflatten(0, actions.shape[:2])  # (B, N, 128)
        return gaussian_parameters(self.skill_encoder(x))

    def act(self, obs, z):
        """Mode of pi_L: observations (..., O) and skills (..., Z) -> actions (..., A) in (-1, 1)."""
        mean, _ = gaussian_parameters(self.skill_policy(torch.cat([self.encoder(obs), z], -1)))
        return torch.tanh(mean)


def make_networks(args: Args) -> nn.ModuleDict:
    """The networks of pre-training: world model, skills, and the prior p(z | h), (..., d) -> (..., 2 * Z)."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    prior = mlp(args.latent_dim, *[args.hidden_dim] * 4, 2 * args.skill_dim)
    skills = SkillModel(obs_dim, action_dim, args)
    networks = dict(model=WorldModel(obs_dim, action_dim, skills, args), skills=skills, prior=prior)
    return nn.ModuleDict(networks).to(args.device)


# -------------------------------------------------------------------------------------------------------- pre-training
def pretrain_loss(model, skills, prior, target, obs, actions, args):
    """Joint loss of skills and one-step dynamics on windows of the offline data (SkiMo eq. 3, 5; one-step eq. 4).

    obs (B, N*H+1, O) raw, actions (B, N*H, A); target is the slow copy of model. Returns the loss and metrics, scalars.
    """
    B, N, H = len(obs), args.pretrain_skills, args.skill_horizon
    chunk_obs = obs[:, :-1].unflatten(1, (N, H))  # (B, N, H, O)
    chunk_actions = actions.unflatten(1, (N, H))  # (B, N, H, A)
    chosen = torch.rand(B, N, device=obs.device).topk(args.bc_chunks, 1).indices  # (B, C), DEVIATION 2
    q_mean, q_std = skills.encode_skill(chunk_obs, chunk_actions)  # (B, N, Z)
    z = sample_skill((q_mean, q_std))  # (B, N, Z)

    # Eq. 3, behavioural cloning: a skill has to hold all that is needed to repeat its actions.
    row = torch.arange(B, device=obs.device)[:, None]  # (B, 1)
    z_steps = z[row, chosen][:, :, None].expand(-1, -1, H, -1)  # (B, C, H, Z)
    predicted = skills.act(chunk_obs[row, chosen], z_steps)  # (B, C, H, A)
    bc_loss = (predicted - chunk_actions[row, chosen]).square().mean()

    # Eq. 3, KL to N(0, 1): keeps skills in one region without gaps, so that a z between two skills is a skill, too.
    normal = torch.zeros_like(q_mean), torch.ones_like(q_std)
    kl_loss = kl_divergence((q_mean, q_std), normal).clamp(-100, 100).mean()

    # Reconstruction of the states where skills begin and end: latent states must not forget the observation.
    skill_obs = obs[:, ::H]  # (B, N+1, O)
    h = model.encoder(skill_obs)  # (B, N+1, d)
    likelihood = torch.distributions.Normal(*model.decode(h), validate_args=False)
    recon_loss = -likelihood.log_prob(model.encoder.scaled(skill_obs)).sum(-1).mean()

    # In place of eq. 4: h_{t+1} = D1(h_t, a_t), rolled out from h_0, agrees with the slow encoder after each env step,
    # so that the model can predict where skills lead. With weight rho^(t/H) / H a skill counts about as in SkiMo.
    with torch.no_grad():
        h_target = target.encoder(obs[:, 1:])  # (B, N*H, d)
    h_pred = model.next_steps(h[:, 0], actions)  # (B, N*H, d)
    weight = args.rho ** (torch.arange(N * H, device=obs.device) / H) / H  # (N*H,)
    consistency = (weight * (h_pred - h_target).square().mean(-1)).sum(1)  # (B,)
    consistency_loss = consistency.clamp(max=1e4).mean()

    # Eq. 5: the prior says which skills the data show in a state. Its gradient reaches the state encoder, not q.
    p = gaussian_parameters(prior(h[:, :-1]))  # 2 x (B, N, Z)
    prior_loss = kl_divergence((q_mean.detach(), q_std.detach()), p).mean()

    skill_loss = 2.0 * bc_loss + args.kl_coef * kl_loss + prior_loss  # 2 and 1 as in the release
    world_loss = recon_loss + args.consistency_coef * consistency_loss
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss, recon_loss=recon_loss)
    metrics["consistency_loss"] = consistency_loss
    # 1 / N as in the release: neither loss grows much with N, so shorter windows weigh the model more
    return skill_loss + world_loss / N, {name: value.detach() for name, value in metrics.items()}


def pretrain(args: Args, networks: nn.ModuleDict, data, writer: SummaryWriter, stop: threading.Event) -> dict:
    """Phase 1: learn skills, dynamics and prior from the offline data; returns facts about them.

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

    window = args.pretrain_skills * args.skill_horizon + 1
    train_data, valid_data = data.to(args.device).split(0.99, window)
    if args.recombine:
        train_data = data_tools.recombined(train_data, task.objects, args.seed)  # DEVIATION 3
    target = copy.deepcopy(networks["model"])
    optimizer = torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, eps=1e-7, fused=True)
    parts = dict(networks=networks, target=target, optimizer=optimizer)
    unfinished = path.with_suffix(".unfinished")
    updates, seconds = 0, 0.0
    if unfinished.exists():  # go on where an earlier command was stopped
        updates, seconds = load(unfinished, parts)["progress"]
    data_tools.cut_curves(writer, updates, "pretrain/")  # what a crash has cut off is drawn anew
    start_time = time.time() - seconds

    def gradients(obs, actions):
        loss, metrics = pretrain_loss(*networks.values(), target, obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        return metrics

    gradients = Recorded(gradients, args)
    total = args.pretrain_updates
    with tqdm(desc="pre-training", total=total, initial=updates, unit="update") as bar:
        while updates < total:
            if args.pretrain_lr_decay:  # 500 updates of warm-up, then down to zero (DEVIATION 3)
                decay = (1 - updates / total) ** 0.5
                optimizer.param_groups[0]["lr"] = args.pretrain_lr * min(1.0, (updates + 1) / 500) * decay
            batch = train_data.sample_windows(args.pretrain_batch_size, window)
            batch = data_tools.perturb(*batch, task.arm, args.arm_noise)  # DEVIATION 3
            metrics = gradients(*batch)
            metrics["grad_norm"] = nn.utils.clip_grad_norm_(networks.parameters(), args.max_grad_norm)
            optimizer.step()
            updates += 1
            if updates % 2 == 0:  # as in the release
                target.follow(networks["model"], 0.01)
            bar.update()

            finished = updates == total
            if finished or updates % 100 == 0:
                bar.set_postfix_str(", ".join(log(writer, "pretrain", metrics, updates).split(", ")[:2]))
            if finished or updates % args.pretrain_eval_interval == 0:
                with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []), torch.no_grad():
                    batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                    _, losses = pretrain_loss(*networks.values(), target, *batch, args)
                    # Losses do not tell whether skills are any good: let the prior act in the task
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
def model_loss(model, target, task_policy, obs, actions, z, rewards, dones, steps, args):
    """World model and critics on windows of skills from the replay buffer (SkiMo eq. 6).

    obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps, how many env steps a skill took,
    (B, N). Returns the loss, metrics, and detached latents where skills begin and end for the policy: h = E(obs) and
    h_pred, predicted from E(o) one skill before, both (B, N+1, d).
    """
    N, H = actions.shape[1:3]
    with torch.no_grad():  # E is frozen, so that its states need no slow copy
        h_steps = model.encoder(obs)  # (B, N*H+1, d)
        h = h_steps[:, ::H]  # (B, N+1, d)
        h_target = h_steps[:, 1:].unflatten(1, (N, H))  # (B, N, H, d)
        next_z = sample_skill(gaussian_parameters(task_policy(h[:, 1:])))  # (B, N, Z)
        next_q = torch.min(*target.q(h[:, 1:], next_z))  # (B, N); the online states, as in the release
        td_target = rewards + (1 - dones) * args.gamma * next_q  # (B, N)
    h_pred = model.next_steps(h[:, :-1], actions)  # (B, N, H, d); over N * H steps states overflow

    # Consistency: predicted latent states agree with encoded ones, so that imagined states can be trusted. After an
    # early end there is nothing to predict.
    weight = args.rho ** (torch.arange(N * H, device=obs.device).view(N, H) / H) / H  # (N, H)
    happened = torch.arange(H, device=obs.device) < steps[..., None]  # (B, N, H)
    error = (h_pred - h_target).square().mean(-1)  # (B, N, H)
    consistency = (weight * happened * error).sum((1, 2))  # (B,)

    # Reward and value learn on imagined states, where they are used (0 on axis 1, weight rho^t), and on encoded ones
    # (1 on axis 1, weight 1).
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    h_pred = torch.cat([h[:, :1], h_pred[:, :, -1]], 1)  # (B, N+1, d)
    states = torch.stack([h_pred[:, :-1], h[:, :-1]], 1)  # (B, 2, N, d)
    both_z = z[:, None].expand(-1, 2, -1, -1)  # (B, 2, N, Z)
    weight = torch.stack([rho, torch.ones_like(rho)])  # (2, N)
    q1, q2 = model.q(states, both_z)  # (B, 2, N)
    td = td_target[:, None]  # (B, 1, N)
    reward_error = (model.reward(states, both_z) - rewards[:, None]).square()  # (B, 2, N)
    reward_error = (weight * reward_error).sum((1, 2))  # (B,)
    value_error = (q1 - td).square() + (q2 - td).square()  # (B, 2, N)
    value_error = (weight * value_error).sum((1, 2))  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5)
    loss = loss + 0.25 * reward_error.clamp(max=1e5)  # weights and bounds as in the release
    loss = loss + 0.1 * value_error.clamp(max=1e5)
    metrics = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    metrics |= dict(td_target=td_target, q_value=q1[:, 1])
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    return loss.mean() / N, metrics, h.detach(), h_pred.detach()


def policy_loss(model, task_policy, prior_encoder, skill_prior, obs, h, h_pred, alpha, args):
    """Task policy: maximise Q, stay close to the frozen prior (SkiMo eq. 7).

    obs (B, N+1, O), h and h_pred (B, N+1, d) detached, alpha (); prior_encoder is the encoder of pre-training, frozen.
    Returns the loss and metrics; metrics["prior_kl"] is the mean KL in nats.
    """
    latents = h_pred if args.policy_latents == "imagined" else h  # DEVIATIONs 7 and 8
    latents = latents[:, :-1]  # (B, N, d)
    N = latents.shape[1]
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)

    # Maximise Q: choose the skills that the critics like best.
    z = sample_skill(gaussian_parameters(task_policy(latents)))  # (B, N, Z)
    q_value = torch.min(*model.q(latents, z))  # (B, N)

    # Stay close to the prior, on encoded states: the task is solved by skills that the data show.
    with torch.no_grad():
        p = gaussian_parameters(skill_prior(prior_encoder(obs[:, :-1])))  # 2 x (B, N, Z)
    pi = gaussian_parameters(task_policy(h[:, :-1]))  # 2 x (B, N, Z)
    prior_kl = kl_divergence(pi, p).clamp(max=100)  # (B, N); beyond no pull back, as in the release

    loss = (rho * (alpha * prior_kl - q_value)).sum(1).mean() / N
    metrics = dict(policy_loss=loss, policy_q=q_value, prior_kl=prior_kl)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


@torch.no_grad()
def plan(model, task_policy, obs, min_std, noise_std, K, args):
    """Cross-entropy method (CEM) over sequences of K skills in the model, for all environments (SkiMo, section 3.4).

    obs (E, O); min_std () least std of samples, noise_std () of the exploration noise. Returns the first skill (E, Z)
    and the fitted mean of all (E, K, Z).
    """
    E, Z = len(obs), args.skill_dim
    h0 = model.encoder(obs)  # (E, d)

    # Plans that the task policy proposes: they begin the search (DEVIATION 5) and compete with its samples
    h = h0[:, None].expand(-1, args.num_policy_trajs, -1)  # (E, trajs, d)
    policy_plans = []
    for _ in range(K):
        policy_plans.append(sample_skill(gaussian_parameters(task_policy(h))))  # (E, trajs, Z)
        h = model.next(h, policy_plans[-1])  # (E, trajs, d)
    policy_plans = torch.stack(policy_plans, 2).nan_to_num(0.0)  # (E, trajs, K, Z); NaN: a state overflowed
    mean = policy_plans.mean(1)  # (E, K, Z)
    std = policy_plans.std(1).maximum(min_std)  # (E, K, Z)

    for _ in range(args.cem_iters):
        # Sample plans
        noise = torch.randn(E, args.num_samples, K, Z, device=obs.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-0.999, 0.999)  # (E, num_samples, K, Z)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, Z)

        # Return of each plan: K predicted rewards, then the value of going on with the task policy
        h = h0[:, None].expand(-1, plans.shape[1], -1)  # (E, P, d)
        value = 0.0
        for t in range(K):
            value = value + args.gamma**t * model.reward(h, plans[:, :, t])  # (E, P)
            h = model.next(h, plans[:, :, t])  # (E, P, d)
        last_z = sample_skill(gaussian_parameters(task_policy(h)))  # (E, P, Z)
        last_q = torch.min(*model.q(h, last_z))  # (E, P)
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
    z = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, Z)
    z = z + noise_std * torch.randn_like(z)
    return z.clamp(-0.999, 0.999), mean


def with_room(x, rows: int):
    """The tensor x, twice as long with zeros if it has fewer rows: growing costs little however often it happens."""
    return x if rows <= len(x) else torch.cat([x, torch.zeros_like(x)])


class ReplayBuffer:
    """All skills of E environments, a row of H env steps each, in flat tensors on the device; r is followed by r + E.

    As in the release, learning sees finished episodes of at least N skills, and a time-out is a true end.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.num_skills = args.num_skills
        H = args.skill_horizon
        sizes = dict(obs=[H, obs_dim], actions=[H, action_dim], z=[args.skill_dim])
        sizes |= dict(rewards=[], dones=[], steps=[])
        sizes["next_obs"] = [obs_dim]
        room = 1024 * args.num_envs
        self.columns = {name: torch.zeros(room, *size, device=args.device) for name, size in sizes.items()}
        self.rows = 0  # filled so far
        self.episodes = torch.zeros(1024, 2, dtype=torch.long, device=args.device)  # first row, skills
        self.num_episodes = 0
        self.running = [0] * args.num_envs  # skills in each unfinished episode

    def add(self, **skill):
        """One skill of every environment: obs (E, H, O), actions (E, H, A) of its env steps, z (E, Z), rewards, dones,
        steps (E,), next_obs (E, O).
        """
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
        """Windows of N skills: obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps (B, N).

        Episodes are uniform; of T skills the start is min(uniform{0..T-1}, T-N): the last window is drawn more often.
        """
        N, E, device = self.num_skills, len(self.running), self.episodes.device
        index = torch.randint(self.num_episodes, (batch_size,), device=device)  # (B,)
        first, T = self.episodes[index].unbind(1)  # (B,)
        start = (torch.rand(batch_size, device=device) * T).long().minimum(T - N)  # (B,)
        rows = first[:, None] + E * (start[:, None] + torch.arange(N, device=device))  # (B, N)
        obs, *others = (column[rows] for name, column in self.columns.items() if name != "next_obs")
        last = self.columns["next_obs"][rows[:, -1:]]  # (B, 1, O)
        return torch.cat([obs.flatten(1, 2), last], 1), *others


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
        self.model = networks["model"]
        self.skills = copy.deepcopy(networks["skills"]).cpu()  # acts next to the simulator, a copy
        self.skill_prior = networks["prior"]
        self.task_policy = copy.deepcopy(self.skill_prior)
        self.target = copy.deepcopy(self.model)  # DEVIATION 9
        # E is frozen, too: pi_L acts on its states and would misread others
        for frozen in (self.skills, self.skill_prior, self.target, self.model.encoder, self.model.skill_policy):
            frozen.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=args.device).log())
        options = dict(eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), args.learning_rate, **options)
        self.policy_optimizer = torch.optim.Adam(self.task_policy.parameters(), args.learning_rate, **options)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], 3e-4, **options)
        self.update = Recorded(self.update, args)
        self.planners = {}  # recorded, by the number of environments and of skills

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z) on the CPU: planned as after global_step, or without it the task policy's."""
        args = self.args
        obs = torch.from_numpy(obs).to(args.device)
        if global_step is None:  # in the warm-up it is still the prior
            return sample_skill(gaussian_parameters(self.task_policy(self.model.encoder(obs)))).cpu()
        growth = min(1.0, global_step / args.horizon_steps)
        K = int(1 + growth * (args.num_skills - 1))  # skills per plan
        progress = min(1.0, global_step / args.std_steps)
        min_std = args.min_std + progress * (args.min_std_end - args.min_std)
        min_std = torch.full((), min_std, device=args.device)  # made there: torch.tensor would wait for the device
        noise_std = min_std if explore else torch.zeros_like(min_std)
        planner = functools.partial(plan, self.model, self.task_policy, K=K, args=args)
        planner = self.planners.setdefault((len(obs), K), Recorded(planner, args))
        z, _ = planner(obs, min_std, noise_std)
        return z.cpu()

    def update(self, obs, actions, z, rewards, dones, steps) -> dict:
        """One step of model, task policy and alpha on windows from the replay buffer; returns metrics."""
        args, model = self.args, self.model
        batch = obs, actions, z, rewards, dones, steps
        loss, metrics, h, h_pred = model_loss(model, self.target, self.task_policy, *batch, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        alpha = self.log_alpha.exp().detach()
        prior = model.encoder, self.skill_prior
        obs = obs[:, :: args.skill_horizon]  # (B, N+1, O)
        loss, policy_metrics = policy_loss(model, self.task_policy, *prior, obs, h, h_pred, alpha, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = nn.utils.clip_grad_norm_(self.task_policy.parameters(), args.max_grad_norm)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        model.encoder.requires_grad_(False)
        model.skill_policy.requires_grad_(False)

        if args.autotune:  # alpha rises while the KL exceeds its target
            excess = policy_metrics["prior_kl"] - args.target_kl
            self.alpha_optimizer.zero_grad()
            (-self.log_alpha.exp() * excess).backward()
            self.alpha_optimizer.step()
        return dict(metrics, **policy_metrics, alpha=alpha, grad_norm=model_norm + policy_norm)


@torch.no_grad()
def execute_skill(envs, skills, obs, z, args: Args):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O). Returns next_obs (E, O), the rewards' sum (E,), whose episodes have ended (E,): they stand still; and of
    the env steps obs (E, H, O), actions (E, H, A) and steps (E,), how many of them each environment took.
    """
    rewards = np.zeros(len(obs), dtype=np.float32)
    steps_before = envs.steps.copy()
    window = []
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        window.append((obs, action))
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += reward
        ended = terminations | truncations
    skill_obs, actions = (np.stack(rows, 1) for rows in zip(*window))
    return obs, rewards, ended, dict(obs=skill_obs, actions=actions, steps=envs.steps - steps_before)


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
            obs, _, ended, _ = execute_skill(envs, agent.skills, obs, z, args)
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
    args.warmup_steps = max(args.warmup_steps, args.num_envs * envs.max_episode_steps)  # DEVIATION 4
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
    rb = ReplayBuffer(*data_tools.env_sizes(args.env_id), args)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, model=agent.model_optimizer, policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        vars(rb).update(state["rb"])
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
    total_updates = int(args.total_timesteps * args.updates_per_step)  # they take the time, so the bar counts them
    with tqdm(desc="RL", total=total_updates, initial=gradient_step, unit="update") as bar:
        while not stopping:
            # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4)
            warming_up = global_step < args.warmup_steps
            z = agent.choose_skills(obs, None if warming_up else global_step, explore=True)  # (E, Z)
            steps_before = envs.steps.sum()
            next_obs, rewards, ended, window = execute_skill(envs, agent.skills, obs, z, args)
            rb.add(**window, z=z, rewards=args.reward_scale * rewards, dones=ended, next_obs=next_obs)
            new_steps = int(envs.steps.sum() - steps_before)
            global_step += new_steps

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
                bar.set_postfix(env_steps=global_step, **{f"last_{len(last_100)}": f"{np.mean(last_100):.3g}"})
            # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
            obs = next_obs
            if ended.any():
                obs, _ = envs.reset(options=dict(reset_mask=ended))

            # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up
            ready = global_step >= args.warmup_steps and rb.num_episodes > 0
            updates_due = int(global_step * args.updates_per_step) if ready else 0
            while gradient_step < updates_due:
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                bar.update()
                if gradient_step % 2 == 0:  # as in the release
                    agent.target.follow(agent.model, args.tau)  # DEVIATION 6
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
                save(checkpoint, state | dict(rb=vars(rb), progress=progress), parts)
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
