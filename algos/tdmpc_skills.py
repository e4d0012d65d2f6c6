"""SPiRL + TD-MPC: the baseline of SkiMo (https://arxiv.org/abs/2207.07560) that plans with a world model from scratch

Idea: skills and prior of spirl.py, frozen; TD-MPC (https://arxiv.org/abs/2203.04955) chooses skills, not actions,
its policy held to the prior by a KL. Its model does not know the offline data, unlike that of SkiMo.

    python algos/tdmpc_skills.py --env-id maze                    # pre-training as (cached by) spirl.py, RL, pictures
    python algos/tdmpc_skills.py --env-id maze --release-defects  # what the authors' code does

Repeat: plan skills u in (-1, 1) by CEM, execute z = 2 u for H steps of the skill policy; on windows of N skills fit the
model h_0 = E(s_0), h_{i+1} = D(h_i, u_i), R, Q (consistency, reward, TD losses); policy: maximise on the imagined h_t
rho^t min Q(h_t, u) - alpha KL(2 u || p(s_t)); move the slow target copy.

--release-defects: (a) windows pair state t with the skill and reward that led *into* it, so that the reward at an
episode's end is never learnt; (b) 2 u is stored, but planner, policy loss and targets evaluate the model at u; (c) the
planner does not see the step: one skill ahead, std floor 0.5, for ever; (d) maze: the prior gets scaled states but was
trained on raw ones. It also ignores true ends, as TD-MPC does by design.
Deviations from the release, marked DEVIATION n below
1. KL divergences without sampling: closed form, or quadrature for the policy's tanh (release: 100 samples).
2. Fewer updates of pre-training with a decaying learning rate; maze: larger KL weight, noisy data.
3. Sines and cosines of positions and joint angles as inputs, the maze scaled, as in skimo.py.
4. E environments in lockstep. Windows of 5 transitions (release: 5 stored items, 4 transitions); true ends are used.
5. Kitchen, CALVIN: as in spirl.py. Maze: warm-up with skills of the prior (release: random low-level actions).
Differs from skimo.py in: Args, FILE_VERSION, PRETRAINED, TASK_DEFAULTS, MODEL_ARGS, PRETRAIN_ARGS, RUN_ARGS,
scalar_head, WorldModel, SkillModel, make_networks, pretrain_loss, model_loss, policy_loss, plan,
prior_rollouts, Pretrainer, pretrain, Learner, train, main.
Score: maze, 300,000 env steps at small sizes (README): no training episode reaches the goal (seeds 1-2).
Shapes: B batch, N skills per window, H steps per skill, O, A, Z, d sizes of observation, action, skill, latent state.
"""

import copy
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data_tools, from any working directory
import data_tools

FILE_VERSION = 1  # raised when a change makes older checkpoints or pre-trained models unusable
PRETRAINED = "spirl"  # name of the pre-trained models; files with the same pre-training share them


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned or calvin
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    num_threads: int = 0  # CPU threads of torch (0: one per core that may be used)
    compile: bool = torch.cuda.is_available()  # torch.compile, with CUDA graphs, of losses and longest plans
    run_dir: str = "runs"  # folder in which the run makes its own folder
    resume: str | None = None  # run folder to go on with; its arguments become the defaults
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between clean evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of a clean evaluation (no exploration noise)
    capture_video: bool = False  # record one evaluation episode as MP4 at the end

    # Offline data
    data_dir: str | None = None  # folder of data and pre-trained models (None: $SKIMO_DATA_DIR, else the user's cache)
    dataset: Literal["auto", "d4rl", "scripted"] = "auto"  # auto: D4RL's file (kitchen) if it can be had, else scripted
    data: str | None = None  # other offline data: an HDF5 file or a folder (README, "Your own data")
    data_noise: float | None = None  # size of the disturbances in scripted data (None: the task's)
    allow_pickle: bool = False  # let --data be a pickle of the SkiMo release, read without running its code
    accept_any_data: bool = False  # take D4RL's file although its checksum differs

    # Pre-training
    pretrained: str | None = None  # start at RL from this model: a path, or `published` for benchmarks/results
    retrain: bool = False  # pre-train again although the cache holds this model
    pretrain_updates: int = 48_000  # gradient updates (release: about 530,000 in the maze, 480,000 in the kitchen)
    pretrain_batch_size: int = 128  # windows of H actions per update
    pretrain_lr: float = 1e-3  # first learning rate
    pretrain_lr_decay: bool = True  # sqrt(1 - progress) (release: constant rate)
    clip_updates: int = 100  # updates at the start with the gradient's norm bounded by clip_norm
    clip_norm: float = 0.001
    kl_coef: float = 5e-4  # weight of KL(q || N(0,1)) per dimension
    position_features: bool = True  # sines and cosines of positions and joint angles as inputs (release: raw)
    pretrain_eval_interval: int = 12_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 100  # roll-outs in a validation; four times as many at the end

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments in lockstep
    warmup_steps: int = 5_000  # env steps with skills from the prior, before planner and updates start
    batch_size: int = 128  # windows of N skills per update
    updates_per_step: float = 1.0  # gradient updates per env step, the warm-up's included
    learning_rate: float = 1e-3  # of world model and task policy
    alpha: float = 1.0  # weight of the prior KL
    gamma: float = 0.99  # discount per skill
    rho: float = 0.5  # weight rho^t of the t-th skill of a window
    tau: float = 0.01  # share of the online weights in a target update
    target_update_interval: int = 2  # updates between target updates
    consistency_coef: float = 2.0  # weight of the latent consistency
    reward_coef: float = 0.5  # weight of the reward loss
    value_coef: float = 0.1  # weight of the TD loss
    reward_scale: float = 1.0  # factor on the task's reward
    max_grad_norm: float = 10.0  # bound of the gradient's global norm
    policy_std: float = 0.05  # std of the task policy, before the tanh
    release_defects: bool = False  # do what the authors' code does, see above

    # Planner
    num_samples: int = 512  # sampled plans per iteration
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 64  # plans that the next distribution is fitted to
    cem_iters: int = 6  # iterations
    temperature: float = 0.5  # factor on the values in the elites' softmax
    momentum: float = 0.1  # share of the old mean in the new one
    plan_std: float = 2.0  # largest std of the sampled skills
    explore_std: float = 0.5  # least std, at the start of the schedule
    explore_std_end: float = 0.05  # least std after std_steps
    std_steps: int = 25_000  # env steps over which the least std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N skills

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    num_skills: int = 5  # N: skills per window and in the longest plan
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of skill encoder, skill policy and prior
    model_dim: int = 512  # width of dynamics, reward, critics and task policy
    latent_dim: int = 50  # d: size of a latent state


# The paper's total_timesteps; for the maze's kl_coef see spirl.py.
TASK_DEFAULTS = {
    "maze": dict(kl_coef=1e-2, total_timesteps=2_000_000),
    "kitchen": dict(),
    "kitchen-misaligned": dict(),
    "calvin": dict(total_timesteps=2_000_000),
}

# What a pre-trained model and a run must share, what else shapes the model (key of the cache) and a run that goes on
MODEL_ARGS = "hidden_dim skill_dim skill_horizon position_features".split()
PRETRAIN_ARGS = (
    "seed pretrain_updates pretrain_batch_size pretrain_lr pretrain_lr_decay clip_updates clip_norm kl_coef"
).split()
RUN_ARGS = ["num_envs", "num_skills", "model_dim", "latent_dim", "release_defects"]

parse_args = functools.partial(data_tools.parse_args, Args, TASK_DEFAULTS, __doc__)  # list of words -> Args


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
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


class Predictor(nn.Sequential):
    """Linear, LeakyReLU; num_blocks x (Linear, BatchNorm, LeakyReLU); Linear: (..., in_dim) -> (..., out_dim)."""

    def __init__(self, in_dim: int, u: int, num_blocks: int, out_dim: int, batch_norm: bool = True):
        layers = [nn.Linear(in_dim, u), nn.LeakyReLU(0.2)]
        for _ in range(num_blocks):
            layers += [nn.Linear(u, u), *[nn.BatchNorm1d(u)] * batch_norm, nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Linear(u, out_dim))
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_normal_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x):  # BatchNorm wants one leading axis
        return super().forward(x.flatten(0, -2)).unflatten(0, x.shape[:-1])


def tanh_normal(x):
    """Network output (..., 2 * Z) -> mean and std (..., Z) of the Gaussian whose tanh is the variable."""
    mean, log_std = x.chunk(2, -1)
    return 5 * torch.tanh(mean / 5), log_std.clamp(-10, 2).exp() + 1e-4


def sample(distribution):
    """One reparameterised sample of tanh(N(mean, std)); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return torch.tanh(mean + std * torch.randn_like(mean))


def gaussian(x):
    """Network output (..., 2 * Z) -> mean and std (..., Z)."""
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
    (mean_p, std_p), (mean_q, std_q) = p, q  # DEVIATION 1
    return ((std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5).sum(-1)


# Gauss-Hermite quadrature: E f(x) for x ~ N(0, 1) is the sum of weight * f(node)
QUADRATURE = [(float(x), float(w) / math.sqrt(2 * math.pi)) for x, w in zip(*np.polynomial.hermite_e.hermegauss(9))]


def squashed_kl(p, q):
    """KL(law of squash(x) with x ~ p || q) of Gaussians p, q = (mean, std), each (..., Z) -> (...) in nats."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    kl = -std_p.log() - 0.5 * math.log(2 * math.pi * math.e)  # E log p(x), the negative entropy
    for node, weight in QUADRATURE:  # DEVIATION 1
        x = mean_p + node * std_p
        log_slope = math.log(8) - 2 * x - 2 * nn.functional.softplus(-2 * x)  # of squash: log(2 - 2 tanh(x)^2)
        log_q = -0.5 * ((squash(x) - mean_q) / std_q).square() - std_q.log() - 0.5 * math.log(2 * math.pi)
        kl = kl - weight * (log_slope + log_q)
    return kl.sum(-1)


class Features(nn.Module):
    """Observations (..., O) -> inputs of the networks (..., F), F = size (DEVIATION 3): the observation, in the maze
    scaled, and sines and cosines of positions and joint angles, as in skimo.py; without position_features the raw one.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        scale, shift, frequency = [1.0] * obs_dim, [0.0] * obs_dim, np.zeros((0, 0))
        if args.position_features:
            scale, shift = data_tools.obs_scale(args.env_id, obs_dim)
            frequency = data_tools.position_frequency(args.env_id)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.float32))  # (P, .)
        self.size = obs_dim + 2 * frequency.size

    def forward(self, obs):
        phase = (obs[..., : len(self.frequency), None] * self.frequency).flatten(-2)
        return torch.cat([obs * self.scale + self.shift, phase.sin(), phase.cos()], -1)  # (..., F)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | s, z)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, Z = args.hidden_dim, args.skill_dim
        self.features = Features(obs_dim, args)
        self.lstm_input = nn.Linear(action_dim + self.features.size, u)
        self.lstm = nn.LSTM(u, u, batch_first=True)
        self.lstm_output, self.skill_encoder = nn.Linear(u, u), nn.Linear(u, 2 * Z)
        self.skill_policy = Predictor(self.features.size + Z, u, 5, action_dim)
        with torch.no_grad():
            for bias, value in ((self.lstm.bias_ih_l0, 1.0), (self.lstm.bias_hh_l0, 0.0)):
                bias[u : 2 * u] = value  # the forget gate starts open

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, H, O) and actions (B, H, A) -> mean and std, 2 x (B, Z)."""
        steps = self.lstm_input(torch.cat([actions, self.features(obs)], -1))  # (B, H, u)
        return gaussian(self.skill_encoder(self.lstm_output(self.lstm(steps)[0][:, -1])))

    def act(self, obs, z):
        """pi_L: observations (..., O) and skills (..., Z) -> actions (..., A), not squashed."""
        return self.skill_policy(torch.cat([self.features(obs), z], -1))


class SkillPrior(nn.Module):
    """Prior p(z | s), and task policy: (..., O) -> mean and std, 2 x (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        self.net = Predictor(self.features.size, args.hidden_dim, 6, 2 * args.skill_dim)

    def forward(self, obs):
        return gaussian(self.net(self.features(obs)))


def make_networks(args: Args, obs_dim: int, action_dim: int, device) -> nn.ModuleDict:
    """The networks of pre-training: skills, and the prior p(z | s)."""
    networks = dict(skills=SkillModel(obs_dim, action_dim, args), prior=SkillPrior(obs_dim, args))
    return nn.ModuleDict(networks).to(device)


class WorldModel(nn.Module):
    """State encoder E, skill dynamics D, reward R, critics Q of TD-MPC."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u, d, dz = args.model_dim, args.latent_dim, args.latent_dim + args.skill_dim
        features = Features(obs_dim, args)
        features.scale, features.shift = map(torch.tensor, data_tools.obs_scale(args.env_id, obs_dim))  # always
        self.encoder = nn.Sequential(features, *mlp(features.size, 256, d))
        self.dynamics = mlp(dz, u, u, d)
        self.reward_model, self.qf1, self.qf2 = scalar_head(dz, u), scalar_head(dz, u), scalar_head(dz, u)

    def next(self, h, u):  # D(h, u): the latent state after the whole skill
        return self.dynamics(torch.cat([h, u], -1))  # (..., d)

    def reward(self, h, u):  # R(h, u)
        return self.reward_model(torch.cat([h, u], -1)).squeeze(-1)  # (...)

    def q(self, h, u):  # Q_1(h, u), Q_2(h, u)
        hu = torch.cat([h, u], -1)
        return self.qf1(hu).squeeze(-1), self.qf2(hu).squeeze(-1)  # 2 x (...)


def make_task_policy(args: Args) -> nn.Sequential:
    """pi(u | h), of fixed std: latent states (..., d) -> input of tanh_normal (..., 2 * Z)."""
    append_log_std = nn.ConstantPad1d((0, args.skill_dim), math.log(args.policy_std - 1e-4))
    return nn.Sequential(*mlp(args.latent_dim, args.model_dim, args.model_dim, args.skill_dim), append_log_std)


# -------------------------------------------------------------------------------------------------------------- losses
def pretrain_loss(skills, prior, obs, actions, args):
    """Skills by behavioural cloning and KL(q || N(0,1)), the prior by the likelihood of their samples (SPiRL eq. 1, 2).

    obs (B, H+1, O) raw, actions (B, H, A). Returns the loss and metrics, scalars.
    """
    H = args.skill_horizon
    q = skills.encode_skill(obs[:, :-1], actions)  # 2 x (B, Z)
    z = draw(q)  # (B, Z)
    bc_loss = (skills.act(obs[:, :-1], z[:, None].expand(-1, H, -1)) - actions).square().mean()
    kl_loss = kl_divergence(q, (torch.zeros_like(q[0]), torch.ones_like(q[1]))).mean()
    p = prior(obs[:, 0])  # 2 x (B, Z)
    likelihood = torch.distributions.Normal(*p, validate_args=False)
    prior_loss = -likelihood.log_prob(z.detach()).sum(-1).mean()
    # Gaussian likelihood of unit variance, up to a constant: half the squared error
    loss = 0.5 * bc_loss + args.kl_coef * kl_loss / args.skill_dim + prior_loss
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss, prior_kl=kl_divergence(q, p).mean())
    return loss, {name: value.detach() for name, value in metrics.items()}


def model_loss(model, target, task_policy, obs, u, rewards, dones, args):
    """World model and critics on windows of skills from the replay buffer (TD-MPC eq. 7-10).

    obs (B, N+1, O), u (B, N, Z), rewards and dones (B, N). Returns the loss, metrics, and the latents (B, N+1, d)
    rolled out from h_0, detached, for the policy.
    """
    N = u.shape[1]
    with torch.no_grad():
        next_h, h_target = model.encoder(obs[:, 1:]), target.encoder(obs[:, 1:])  # (B, N, d)
        next_q = torch.min(*target.q(next_h, sample(tanh_normal(task_policy(next_h)))))  # (B, N)
        goes_on = 1.0 if args.release_defects else 1 - dones  # DEVIATION 4
        td_target = rewards + goes_on * args.gamma * next_q  # (B, N)
    h_pred = [model.encoder(obs[:, 0])]
    for t in range(N):
        h_pred.append(model.next(h_pred[-1], u[:, t]))
    h_pred = torch.stack(h_pred, 1)  # (B, N+1, d)

    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    (q1, q2), reward = model.q(h_pred[:, :-1], u), model.reward(h_pred[:, :-1], u)  # (B, N)
    consistency = (rho * (h_pred[:, 1:] - h_target).square().mean(-1)).sum(1)  # (B,)
    reward_error = (rho * (reward - rewards).square()).sum(1)  # (B,)
    value_error = (rho * ((q1 - td_target).square() + (q2 - td_target).square())).sum(1)  # (B,)
    loss = args.consistency_coef * consistency.clamp(max=1e5) + args.reward_coef * reward_error.clamp(max=1e5)
    loss = (loss + args.value_coef * value_error.clamp(max=1e5)).mean() / N
    metrics = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    metrics |= dict(td_target=td_target, q_value=q1)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}, h_pred.detach()


def policy_loss(model, task_policy, skill_prior, obs, h_pred, args):
    """Task policy: maximise Q on imagined states, stay close to the frozen prior (TD-MPC eq. 11, with a KL).

    obs (B, N+1, O), h_pred (B, N+1, d) detached. Returns the loss and metrics; metrics["prior_kl"] is in nats.
    """
    N = obs.shape[1] - 1
    rho = args.rho ** torch.arange(N + 1, device=obs.device)  # (N+1,)
    pi = tanh_normal(task_policy(h_pred))  # 2 x (B, N+1, Z)
    q_value = torch.min(*model.q(h_pred, sample(pi)))  # (B, N+1)
    prior_kl = squashed_kl(pi, skill_prior(obs)).clamp(-100, 100)  # (B, N+1), the prior is frozen
    loss = (args.alpha * prior_kl - rho * q_value).sum(1).mean() / N
    return loss, dict(policy_loss=loss.detach(), policy_q=q_value.detach().mean(), prior_kl=prior_kl.detach().mean())


# -------------------------------------------------------------------------------------------------- planner and acting
@torch.no_grad()
def plan(model, task_policy, obs, mean, std_floor, noise_scale, args):
    """CEM over sequences of K skills in the skill dynamics, for all environments at once (SkiMo, section 3.4).

    obs (E, O); mean (E, K, Z): zeros or the last plan, moved on; std_floor (): least std of the sampled skills;
    noise_scale (): 1 to explore, 0 to evaluate. Returns the first skill z = 2 u (E, Z) and the fitted mean (E, K, Z).
    """
    E, K, Z = mean.shape
    h0 = model.encoder(obs)  # (E, d)

    h, policy_plans = h0[:, None].expand(-1, args.num_policy_trajs, -1), []
    for _ in range(K):
        policy_plans.append(sample(tanh_normal(task_policy(h))))  # (E, 25, Z)
        h = model.next(h, policy_plans[-1])
    policy_plans = torch.stack(policy_plans, 2)  # (E, 25, K, Z)

    std = torch.full_like(mean, args.plan_std)
    for _ in range(args.cem_iters):
        noise = torch.randn(E, args.num_samples, K, Z, device=obs.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-0.999, 0.999)
        plans = torch.cat([plans, policy_plans], 1)  # (E, P, K, Z)

        # Return of each plan: K predicted rewards, then the value of going on with the task policy
        h, value = h0[:, None].expand(-1, plans.shape[1], -1), 0.0
        for t in range(K):
            value = value + args.gamma**t * model.reward(h, plans[:, :, t])  # (E, P)
            h = model.next(h, plans[:, :, t])
        last_z = sample(tanh_normal(task_policy(h)))
        value = value + args.gamma**K * torch.min(*model.q(h, last_z))  # (E, P)

        elite_value, elite_index = value.nan_to_num(-1e6).topk(args.num_elites, 1)  # (E, elites); NaN: h overflowed
        elites = plans.gather(1, elite_index[..., None, None].expand(-1, -1, K, Z))  # (E, elites, K, Z)
        weight = torch.softmax(args.temperature * elite_value, 1)[..., None, None]  # (E, elites, 1, 1)
        elite_mean = (weight * elites).sum(1)  # (E, K, Z)
        variance = (weight * (elites - elite_mean[:, None]).square()).sum(1)
        std = variance.sqrt().maximum(std_floor).clamp(max=args.plan_std)
        mean = args.momentum * mean + (1 - args.momentum) * elite_mean

    # One elite at random, with probability `weight`: exponential races draw from it without a host round trip.
    picked = (weight[..., 0, 0] / torch.empty_like(elite_value).exponential_()).argmax(1)  # (E,)
    first_skill = elites[torch.arange(E, device=obs.device), picked, 0]  # (E, Z)
    first_skill = first_skill + noise_scale * std[:, 0] * torch.randn_like(first_skill)
    return 2 * first_skill.clamp(-0.999, 0.999), mean


class Planner:
    """Plans for E environments at once, by the schedules; gives `plan` the last one, moved on by one skill."""

    def __init__(self, model, task_policy, args: Args, device):
        self.model, self.task_policy, self.args, self.device = model, task_policy, args, device
        self.compiled_plan = torch.compile(plan, mode="reduce-overhead", dynamic=False, disable=not args.compile)
        self.last_mean = None  # (E, K, Z)

    def __call__(self, obs, episode_start, global_step: int, explore: bool):
        """obs (E, O) and episode_start (E,) bool, NumPy -> skills (E, Z) on the CPU."""
        args = self.args
        plan_horizon = int(1 + min(1.0, global_step / max(args.horizon_steps, 1)) * (args.num_skills - 1))  # K
        mean = torch.zeros(len(obs), plan_horizon, args.skill_dim, device=self.device)  # (E, K, Z)
        if self.last_mean is not None and self.last_mean.shape[1] == plan_horizon > 1:
            goes_on = torch.from_numpy(~episode_start)[:, None, None].to(self.device)
            mean[:, :-1] = goes_on * self.last_mean[:, 1:].to(self.device)
        progress = min(1.0, global_step / max(args.std_steps, 1))
        std_floor = args.explore_std + progress * (args.explore_std_end - args.explore_std)
        std_floor, noise_scale = torch.tensor([std_floor, float(explore)], device=self.device)
        torch.compiler.cudagraph_mark_step_begin()
        obs = torch.from_numpy(obs).to(self.device)
        # Each horizon and number of environments would be compiled anew, for a minute or so: only what stays is.
        plan_skills = self.compiled_plan if explore and plan_horizon == args.num_skills else plan
        z, mean = plan_skills(self.model, self.task_policy, obs, mean, std_floor, noise_scale, args)
        self.last_mean = mean.clone()  # a CUDA graph overwrites its outputs
        return z.cpu()


@torch.no_grad()
def execute_skill(envs, skills, obs, z, ended, args: Args, trace: list):
    """H env steps of the skill policy with skills z (E, Z), on the CPU next to the simulator.

    obs (E, O); ended (E,) bool: members that wait for their reset. Returns next_obs (E, O), the rewards' sum (E,),
    the new ended (E,) and the env steps taken (E,). Each step's (obs, action, ended) is appended to trace.
    """
    rewards, steps = np.zeros(len(obs), dtype=np.float32), np.zeros(len(obs), dtype=np.int64)
    for _ in range(args.skill_horizon):
        action = skills.act(torch.from_numpy(obs), z).numpy()  # (E, A)
        trace.append((obs, action, ended))
        obs, reward, terminations, truncations, _ = envs.step(action)
        rewards += np.where(ended, 0.0, reward)
        steps += ~ended
        ended = terminations | truncations
        if ended.all():
            break
    return obs, rewards, ended, steps


def evaluate(learner, args: Args, global_step: int, video: Path | None = None):
    """Clean evaluation: planner without exploration noise, one episode in each of eval_episodes environments.

    Returns returns (E,) and lengths in env steps (E,). With video, one episode is rendered into that MP4 instead.
    """
    envs = data_tools.make_envs(args.env_id, 1 if video else args.eval_episodes, video)
    planner = Planner(learner.model, learner.task_policy, args, learner.device)
    choose_skill = functools.partial(planner, global_step=global_step, explore=False)
    return data_tools.rollout(execute_skill, envs, learner.skills, choose_skill, args, 10_000 + args.seed)[:2]


def prior_rollouts(networks, args: Args, num_episodes: int):
    """Episodes with skills from the prior, what a fresh task policy explores; returns what data_tools.rollout does."""
    cpu = copy.deepcopy(networks).cpu().eval()

    def choose_skill(obs, episode_start):
        return squash(draw(cpu["prior"](torch.from_numpy(obs))))  # (E, Z)

    envs = data_tools.make_envs(args.env_id, num_episodes)
    returns, lengths, trace, z = data_tools.rollout(execute_skill, envs, cpu["skills"], choose_skill, args, args.seed)
    return returns, lengths, [(obs, action.clip(-1, 1), ended) for obs, action, ended in trace], z  # as environments do


# -------------------------------------------------------------------------------------------------------------- replay
class ReplayBuffer:
    """Finished episodes of at least N skills, back to back in flat tensors on the device; nothing is ever dropped.

    An episode of T skills takes T + 1 rows; the last one holds its final observation.
    """

    def __init__(self, obs_dim: int, args: Args, device):
        self.num_skills = args.num_skills
        self.split_sizes = [obs_dim, args.skill_dim, 1, 1]
        self.rows = torch.zeros(0, sum(self.split_sizes), device=device)  # obs, z, reward, done
        self.episodes = torch.zeros(0, 2, dtype=torch.long, device=device)  # first row, skills
        self.running = [[] for _ in range(args.num_envs)]  # rows of the unfinished episodes

    def add(self, obs, z, rewards, ended, next_obs):
        """One skill of every environment: obs, next_obs (E, O) NumPy, z (E, Z), rewards, ended (E,) NumPy.

        A time-out is stored as a true end, as in the release.
        """
        rewards, dones = torch.from_numpy(rewards)[:, None], torch.from_numpy(ended).float()[:, None]
        rows = torch.cat([torch.from_numpy(obs), z, rewards, dones], 1)  # (E, O + Z + 2)
        last = torch.cat([torch.from_numpy(next_obs), torch.zeros_like(rows[:, obs.shape[1] :])], 1)
        for e, running in enumerate(self.running):
            running.append(rows[e])
            if ended[e]:
                if len(running) >= self.num_skills:
                    episode = torch.tensor([[len(self.rows), len(running)]], device=self.rows.device)
                    self.episodes = torch.cat([self.episodes, episode])
                    self.rows = torch.cat([self.rows, torch.stack([*running, last[e]]).to(self.rows.device)])
                running.clear()

    def sample(self, batch_size: int):
        """Windows of N skills: obs (B, N+1, O), z (B, N, Z), rewards and dones (B, N).

        Episodes are uniform; the start is min(uniform{0..T-1}, T-N), so that the last window is drawn more often.
        """
        index = torch.randint(len(self.episodes), (batch_size,), device=self.rows.device)  # (B,)
        first, T = self.episodes[index].unbind(1)
        start = (torch.rand(batch_size, device=self.rows.device) * T).long().minimum(T - self.num_skills)
        steps = torch.arange(self.num_skills + 1, device=self.rows.device)
        obs, z, rewards, dones = self.rows[(first + start)[:, None] + steps].split(self.split_sizes, -1)  # (B, N+1, .)
        return obs, z[:, :-1], rewards[:, :-1, 0], dones[:, :-1, 0]


# --------------------------------------------------------------------------------------------------------- pre-training
class Pretrainer(nn.Module):
    """The networks of pre-training with their optimizer, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args, self.networks, self.num_updates = args, networks.train(), 0
        self.optimizers = [torch.optim.RAdam(networks.parameters(), lr=args.pretrain_lr)]
        self.loss = torch.compile(pretrain_loss, mode="reduce-overhead", dynamic=False, disable=not args.compile)

    def update(self, obs, actions) -> dict:
        """One step on windows obs (B, H+1, O), actions (B, H, A); returns metrics."""
        args, (optimizer,) = self.args, self.optimizers
        if args.pretrain_lr_decay:  # DEVIATION 2
            decay = max(0.0, 1 - self.num_updates / args.pretrain_updates) ** 0.5
            optimizer.param_groups[0]["lr"] = args.pretrain_lr * decay
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = self.loss(*self.networks.values(), obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        if self.num_updates < args.clip_updates:
            nn.utils.clip_grad_norm_(self.networks.parameters(), args.clip_norm)
        optimizer.step()
        self.num_updates += 1
        return metrics


@torch.no_grad()
def update_target(target, online, tau: float):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def pretrain(args: Args, run: data_tools.Run) -> nn.ModuleDict:
    """Phase 1: networks that --pretrained or the cache holds or, first, that are learnt from the offline data.

    They are in evaluation mode: BatchNorm's statistics move in pre-training only.
    """
    torch.manual_seed(args.seed)
    networks = make_networks(args, *data_tools.env_sizes(args.env_id), run.device)
    if run.load_pretrained(networks):
        return networks.eval()
    train_data, valid_data = run.data.to(run.device).split(0.99)
    window = args.skill_horizon + 1
    trainer = Pretrainer(args, networks)
    for update in run.pretraining(trainer):  # goes on where it was interrupted
        batch = train_data.sample_windows(args.pretrain_batch_size, window)
        run.log_update("pretrain", trainer.update(*batch), update)
        finished = update == args.pretrain_updates
        if finished or update % args.pretrain_eval_interval == 0:
            networks.eval()
            with data_tools.fork_rng(), torch.no_grad():
                torch.manual_seed(args.seed)
                batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                _, metrics = pretrain_loss(*networks.values(), *batch, args)
            networks.train()
            returns, _, trace, _ = prior_rollouts(networks, args, args.pretrain_eval_episodes * (4 if finished else 1))
            facts = run.log_validation(metrics, returns, trace, update)
    run.save_pretrained(networks, facts)
    return networks.eval()


# -------------------------------------------------------------------------------------------------------- downstream RL
class Learner(nn.Module):
    """Everything that downstream RL trains, the frozen prior and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args, self.num_updates = args, 0
        self.skills, self.skill_prior = networks["skills"], networks["prior"]
        self.device = self.skill_prior.features.scale.device
        self.model = WorldModel(len(self.skill_prior.features.scale), args).to(self.device)
        self.task_policy, self.target = make_task_policy(args).to(self.device), copy.deepcopy(self.model)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, eps=1e-7, fused=True)
        self.model_optimizer, self.policy_optimizer = adam(self.model.parameters()), adam(self.task_policy.parameters())
        self.optimizers = self.model_optimizer, self.policy_optimizer
        compiled = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False, disable=not args.compile)
        self.model_loss, self.policy_loss = compiled(model_loss), compiled(policy_loss)

    def prior_input(self, obs):
        """Observations (..., O) as the prior gets them; scaled ones are a defect of the release."""
        features = self.model.encoder[0]
        return obs * features.scale + features.shift if self.args.release_defects else obs

    @torch.no_grad()
    def sample_prior(self, obs, episode_start=None):
        """Skills z = 2 u (E, Z), on the CPU, of the prior: obs (E, O) NumPy; as spirl.py explores at first."""
        obs = self.prior_input(torch.from_numpy(obs).to(self.device))
        return squash(draw(self.skill_prior(obs))).cpu()

    def update(self, obs, u, rewards, dones) -> dict:
        """One step of model, task policy and target on windows from the replay buffer; returns metrics."""
        args, model = self.args, self.model
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics, h_pred = self.model_loss(model, self.target, self.task_policy, obs, u, rewards, dones, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        prior_obs = self.prior_input(obs)
        loss, policy_metrics = self.policy_loss(model, self.task_policy, self.skill_prior, prior_obs, h_pred, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.task_policy.parameters(), args.max_grad_norm)
        self.policy_optimizer.step()
        model.requires_grad_(True)

        self.num_updates += 1
        if self.num_updates % args.target_update_interval == 0:
            update_target(self.target, model, args.tau)
        return metrics | policy_metrics


def train(args: Args, run: data_tools.Run, networks: nn.ModuleDict) -> dict:
    """Phase 2: online RL over skills, from the pre-trained networks or, with --resume, from the run's checkpoint.

    Returns the results; they, pictures and checkpoints are in the run's folder.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model comes from this run or from a file
    learner = Learner(args, networks)
    planner = Planner(learner.model, learner.task_policy, args, learner.device)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = ReplayBuffer(obs.shape[1], args, learner.device)
    parts, ended = dict(learner=learner, rb=rb, envs=envs), np.ones(args.num_envs, dtype=bool)
    last = torch.zeros(args.num_envs, args.skill_dim), np.zeros(args.num_envs, np.float32)  # z, rewards: defect (a)
    obs, ended, planner.last_mean, last = run.start_rl(parts, obs=obs, ended=ended, last_mean=None, last=last)
    skills = copy.deepcopy(learner.skills).cpu()  # acts next to the simulator
    while True:
        # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up.
        updates_due = int(run.global_step * args.updates_per_step) if run.global_step >= args.warmup_steps else 0
        while learner.num_updates < updates_due and len(rb.episodes) > 0 and not run.stop.requested:
            run.log_update("losses", learner.update(*rb.sample(args.batch_size)), run.global_step)
        run.lap("update")
        planner_step = 0 if args.release_defects else run.global_step  # defect (c)
        if not run.goes_on(parts, obs=obs, ended=ended, last_mean=planner.last_mean, last=last):
            break
        if run.evaluation_is_due():
            run.log_evaluation(*evaluate(learner, args, planner_step))

        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4).
        if run.global_step < args.warmup_steps:
            z = learner.sample_prior(obs)  # (E, Z), DEVIATION 5
        else:
            z = planner(obs, ended, planner_step, explore=True)
        run.lap("plan")
        next_obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, np.zeros(len(obs), dtype=bool), args, [])
        stored = z / 2, args.reward_scale * rewards  # u
        if args.release_defects:  # (a) what led into obs instead of what follows, (b) at the scale of z
            keep = np.float32(~ended)
            stored, last = last, (z * torch.from_numpy(keep)[:, None], stored[1] * keep)
        rb.add(obs, *stored, ended, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = envs.reset(options={"reset_mask": ended})[0] if ended.any() else next_obs
        run.lap("env")
        run.log_skill(rewards, steps, ended, learner.num_updates)

    run.log_evaluation(*evaluate(learner, args, planner_step))
    envs.close()
    envs, prior = data_tools.make_envs(args.env_id, 1 + args.pretrain_eval_episodes), learner.sample_prior
    _, _, trace, z = data_tools.rollout(execute_skill, envs, learner.skills, prior, args, args.seed, max_skills=50)
    u = z if args.release_defects else z / 2  # defect (b)
    paths = data_tools.open_loop_prediction(learner.model, trace, u, args.skill_horizon)
    data_tools.plot_prediction(args.env_id, paths, run.dir / "prediction.png", run.writer)
    data_tools.plot_visited(args.env_id, rb.rows[:, : obs.shape[1]].cpu().numpy(), run.dir / "visited.png", run.writer)
    if args.capture_video:
        evaluate(learner, args, planner_step, run.dir / "evaluation.mp4")
    return run.finish(learner.num_updates)


# ----------------------------------------------------------------------------------------------------------------- main
@data_tools.errors_in_one_line()
def main(args: Args) -> dict:
    """Both phases; pictures, results.json and a summary. Returns the results."""
    run = data_tools.Run(args, FILE_VERSION, MODEL_ARGS, RUN_ARGS)
    run.find_pretrained(PRETRAINED, PRETRAIN_ARGS)
    networks = pretrain(args, run)
    return train(args, run, networks)


if __name__ == "__main__":
    main(parse_args())
