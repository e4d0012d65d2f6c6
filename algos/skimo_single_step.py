"""SkiMo with single-step dynamics: ablation of SkiMo (Shi, Lim & Lee, CoRL 2022), https://arxiv.org/abs/2207.07560

Idea: skills, prior, R, Q and planner are SkiMo's, but the dynamics predicts one env step instead of a whole skill. A
plan of K skills takes K * H predictions, and each of them adds its error: what SkiMo's skill dynamics avoids.

    python algos/skimo_single_step.py --env-id maze    # data, pre-training (cached), RL, evaluation, pictures

Differs from skimo.py in: PRETRAINED, Args, MODEL_ARGS, WorldModel, SkillModel, make_networks, predict_steps,
    pretrain_loss, model_loss, ReplayBuffer, Learner, train
The paper says no more, so this reading is ours: D1(h, a) takes actions, which the skill policy chooses on predicted
states, D(h, z) = H times {a = mode of pi_L(h, z), h = D1(h, a)}. So pi_L and the world model share one encoder E,
frozen in RL: so is pi_L, which would misread states that move. R and Q still look at skills. D1 learns from real
actions, which the replay holds: consistency at each env step, weight rho^(t/H)/H, rolled out through the window, but
in RL from E(s) at each skill, because over N * H = 100 steps states and gradients grew beyond float32. It stands in
place of eq. 4 and of its part in eq. 6; all else, and what is marked DEVIATION n below, is skimo.py's. Variant:
--dynamics-input skill, D1(h, z) H times without pi_L. Paper: no curve; its text: clearly worse than SkiMo.
Score: maze, last 100 training episodes that reach the goal, at 300,000 env steps: .84 / .72 (seeds 1-2).
Shapes: B batch, N skills per window, H steps per skill, O observation, A action, Z skill, d latent state,
E environments, K plan horizon, P plans. Batch first.
"""

import copy
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data_tools, from any working directory
import data_tools

FILE_VERSION = 2  # raised when a change makes older checkpoints or pre-trained models unusable
PRETRAINED = "skimo_single_step"  # name of the pre-trained models; files with the same pre-training share them


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
    pretrain_updates: int = 12_000  # gradient updates (release: 700,000 in the maze, 425,000 elsewhere)
    pretrain_skills: int = 10  # skills per window (release: num_skills)
    pretrain_batch_size: int = 128  # windows per update (release: 512)
    bc_chunks: int = 4  # chunks of each window that the skill policy is trained on (release: all)
    pretrain_lr: float = 1e-3  # peak learning rate
    pretrain_lr_decay: bool = True  # 500 updates of warm-up, then sqrt(1 - progress) (release: constant rate)
    bc_coef: float = 2.0  # weight of the skill policy's squared error
    kl_coef: float = 1e-4  # weight of KL(q || N(0,1)) (release: 1e-4)
    prior_coef: float = 1.0  # weight of KL(q || p)
    recon_coef: float = 1.0  # weight of the observation's log-likelihood
    pretrain_tau: float = 0.01  # tau of pre-training
    position_features: bool = True  # sines and cosines of positions and joint angles as inputs (release: none)
    pretrain_eval_interval: int = 3_000  # updates between validations with roll-outs of the prior
    pretrain_eval_episodes: int = 100  # roll-outs in a validation; four times as many at the end

    # Downstream RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    num_envs: int = 8  # environments in lockstep
    warmup_steps: int = 5_000  # env steps with skills from the prior, before planner and updates start
    batch_size: int = 256  # windows of N skills per update
    updates_per_step: float = 10 / 500  # gradient updates per env step, the warm-up's included
    learning_rate: float = 1e-3  # of world model and task policy
    alpha: float = 0.5  # weight of the prior KL (its first value if autotune)
    autotune: bool = False  # tune alpha so that the prior KL is target_kl
    target_kl: float = 3.0  # nats between task policy and prior
    alpha_lr: float = 3e-4  # learning rate of log alpha
    policy_latents: Literal["imagined", "h0", "encoded"] = "imagined"  # of Q in eq. 7: paper, release (first), E(o_t)
    gamma: float = 0.99  # discount per skill
    rho: float = 0.5  # weight rho^t of the t-th skill of a window
    tau: float = 0.05  # share of the online weights in a target update (release: 0.01)
    target_update_interval: int = 2  # updates between target updates
    consistency_coef: float = 2.0  # weight of the latent consistency, in both phases
    reward_coef: float = 0.25  # weight of the reward loss
    value_coef: float = 0.1  # weight of the TD loss
    reward_scale: float = 1.0  # factor on the task's reward
    max_grad_norm: float = 100.0  # bound of the gradient's global norm

    # Planner
    num_samples: int = 128  # sampled plans per iteration (release: 512)
    num_policy_trajs: int = 25  # plans proposed by the task policy
    num_elites: int = 32  # plans that the next distribution is fitted to (release: 64)
    cem_iters: int = 3  # iterations (release: 6)
    temperature: float = 0.5  # factor on the values in the elites' softmax
    momentum: float = 0.1  # share of the old mean in the new one
    plan_start: Literal["policy", "wide"] = "policy"  # first: the policy's plans, or N(last mean, plan_std) as released
    plan_std: float = 2.0  # largest std of the sampled skills
    explore_std: float = 0.05  # least std, at the start of the schedule (release: 0.5)
    explore_std_end: float = 0.01  # least std after std_steps
    std_steps: int = 25_000  # env steps over which the least std falls
    horizon_steps: int = 25_000  # env steps over which plans grow from 1 to N skills

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    num_skills: int = 10  # N: skills per window and in the longest plan
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of hidden layers
    latent_dim: int = 256  # d: size of a latent state
    skill_encoder: Literal["mlp", "lstm"] = "lstm"  # architecture of q
    dynamics_input: Literal["action", "skill"] = "action"  # D1(h, a), a by the skill policy, or D1(h, z)


# The release's values where they differ from Args, but for total_timesteps, pre-training (DEVIATION 3), the kitchen's
# alpha (release: 0.5) and the maze's std_steps (release: 1,000,000).
TASK_DEFAULTS = {
    "maze": dict(
        latent_dim=128, skill_encoder="mlp", kl_coef=3e-3, total_timesteps=300_000, warmup_steps=50_000, batch_size=128,
        alpha=1.0, autotune=True, horizon_steps=1_000_000, std_steps=300_000,
    ),
    "kitchen": dict(
        pretrain_updates=10_000, pretrain_skills=5, bc_chunks=5, pretrain_batch_size=64, kl_coef=3e-3, alpha=0.05,
        policy_latents="encoded",  # this and alpha: DEVIATION 7
    ),
    "calvin": dict(
        hidden_dim=256, num_skills=1, pretrain_updates=10_000, pretrain_skills=1, bc_chunks=1, pretrain_batch_size=256,
        kl_coef=1e-2, alpha=0.1, reward_scale=0.01, total_timesteps=2_000_000,
    ),
}  # fmt: skip
TASK_DEFAULTS["kitchen-misaligned"] = TASK_DEFAULTS["kitchen"]

# What a pre-trained model and a run must share, what else shapes the model (key of the cache) and a run that goes on
MODEL_ARGS = "hidden_dim latent_dim skill_dim skill_horizon skill_encoder position_features dynamics_input".split()
PRETRAIN_ARGS = (
    "seed pretrain_updates pretrain_skills pretrain_batch_size bc_chunks pretrain_lr pretrain_lr_decay bc_coef kl_coef "
    "prior_coef recon_coef consistency_coef rho pretrain_tau target_update_interval max_grad_norm"
).split()
RUN_ARGS = ["num_envs", "num_skills"]

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
    head = nn.Sequential(nn.Linear(in_dim, u), nn.LayerNorm(u), nn.Tanh(), *mlp(u, u, u, u, 1))
    nn.init.orthogonal_(head[-1].weight, 0.01)
    return head


def tanh_normal(x):
    """Network output (..., 2 * Z) -> mean and std (..., Z) of the Gaussian whose tanh is the variable."""
    mean, log_std = x.chunk(2, -1)
    return 5 * torch.tanh(mean / 5), log_std.clamp(-10, 2).exp() + 1e-4


def sample(distribution):
    """One reparameterised sample of tanh(N(mean, std)); distribution is (mean, std), each (..., Z)."""
    mean, std = distribution
    return torch.tanh(mean + std * torch.randn_like(mean))


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., Z) -> (...) in nats; a common tanh leaves it as it is."""
    (mean_p, std_p), (mean_q, std_q) = p, q  # DEVIATION 1
    return ((std_q / std_p).log() + (std_p**2 + (mean_p - mean_q) ** 2) / (2 * std_q**2) - 0.5).sum(-1)


class StateEncoder(nn.Module):
    """Raw observations (..., O) -> latent states (..., d).

    DEVIATION 3: sines and cosines of positions and joint angles are inputs, too. What matters, a wall of the maze or a
    centimetre at a handle, is a fortieth of the input's range or less, which a plain MLP needs very long to resolve.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        scale, shift = data_tools.obs_scale(args.env_id, obs_dim)
        frequency = data_tools.position_frequency(args.env_id) if args.position_features else np.zeros((0, 0))
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("shift", torch.tensor(shift))
        self.register_buffer("frequency", torch.tensor(frequency, dtype=torch.float32))  # (P, F)
        self.net = mlp(obs_dim + 2 * frequency.size, args.hidden_dim, args.latent_dim)

    def scaled(self, obs):  # what the decoder reconstructs
        return obs * self.scale + self.shift  # (..., O)

    def features(self, obs):
        phase = (obs[..., : len(self.frequency), None] * self.frequency).flatten(-2)  # (..., P * F)
        return torch.cat([self.scaled(obs), phase.sin(), phase.cos()], -1)  # (..., O + 2 * P * F)

    def forward(self, obs):
        return self.net(self.features(obs))  # (..., d)


class WorldModel(nn.Module):
    """One-step dynamics D1, reward R, critics Q, observation decoder; state encoder E and pi_L belong to `skills`."""

    def __init__(self, obs_dim: int, action_dim: int, skills: "SkillModel", args: Args):
        super().__init__()
        u, d, dz = args.hidden_dim, args.latent_dim, args.latent_dim + args.skill_dim
        self.skill_horizon, self.takes_actions = args.skill_horizon, args.dynamics_input == "action"
        self.encoder, self.skill_policy = skills.encoder, skills.skill_policy
        self.dynamics = mlp(d + action_dim if self.takes_actions else dz, u, u, u, u, d)
        self.reward_model, self.qf1, self.qf2 = scalar_head(dz, u), scalar_head(dz, u), scalar_head(dz, u)
        self.decoder = mlp(d, u, u, 2 * obs_dim)

    def step(self, h, x):  # D1(h, a) or D1(h, z): the latent state after one env step
        return self.dynamics(torch.cat([h, x], -1))  # (..., d)

    def next(self, h, z):
        """The latent state after the whole skill: H times the skill policy's action and D1; h (..., d), z (..., Z)."""
        for _ in range(self.skill_horizon):
            mean, _ = tanh_normal(self.skill_policy(torch.cat([h, z], -1)))  # (..., A)
            h = self.step(h, torch.tanh(mean) if self.takes_actions else z)
        return h  # (..., d)

    def reward(self, h, z):  # R(h, z)
        return self.reward_model(torch.cat([h, z], -1)).squeeze(-1)  # (...)

    def q(self, h, z):  # Q_1(h, z), Q_2(h, z)
        hz = torch.cat([h, z], -1)
        return self.qf1(hz).squeeze(-1), self.qf2(hz).squeeze(-1)  # 2 x (...)

    def decode(self, h):
        """Mean and std, in [0.1, 1.5], of the scaled observation: (..., d) -> 2 x (..., O)."""
        mean, raw_std = self.decoder(h).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)


class SkillModel(nn.Module):
    """Skill encoder q(z | s, a) and skill policy pi_L(a | h, z), on the state encoder E of the world model."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u, d, Z, self.uses_lstm = args.hidden_dim, args.latent_dim, args.skill_dim, args.skill_encoder == "lstm"
        self.encoder = StateEncoder(obs_dim, args)
        self.skill_policy = mlp(d + Z, u, u, u, u, 2 * action_dim)
        self.lstm = nn.LSTM(action_dim + d, 128, batch_first=True) if self.uses_lstm else None
        sizes = (128,) if self.uses_lstm else (args.skill_horizon * action_dim + d, u, u, u, u)
        self.skill_encoder = mlp(*sizes, 2 * Z)

    def encode_skill(self, obs, actions):
        """q: chunks of observations (B, N, H, O) and actions (B, N, H, A) -> mean and std, 2 x (B, N, Z)."""
        if self.uses_lstm:
            steps = torch.cat([actions, self.encoder(obs)], -1).flatten(0, 1)  # (B * N, H, A + d)
            return tanh_normal(self.skill_encoder(self.lstm(steps)[0][:, -1]).unflatten(0, actions.shape[:2]))
        return tanh_normal(self.skill_encoder(torch.cat([actions.flatten(2), self.encoder(obs[:, :, 0])], -1)))

    def act(self, obs, z):
        """Mode of pi_L: observations (..., O) and skills (..., Z) -> actions (..., A) in (-1, 1)."""
        mean, _ = tanh_normal(self.skill_policy(torch.cat([self.encoder(obs), z], -1)))
        return torch.tanh(mean)


def make_networks(args: Args, obs_dim: int, action_dim: int, device) -> nn.ModuleDict:
    """The networks of pre-training: world model, skills, and the prior p(z | h), (..., d) -> (..., 2 * Z)."""
    prior = mlp(args.latent_dim, *[args.hidden_dim] * 4, 2 * args.skill_dim)
    skills = SkillModel(obs_dim, action_dim, args)
    networks = dict(model=WorldModel(obs_dim, action_dim, skills, args), skills=skills, prior=prior)
    return nn.ModuleDict(networks).to(device)


# -------------------------------------------------------------------------------------------------------------- losses
def predict_steps(model, h, actions, z, args):
    """Roll out D1 from h through windows of actions (B, N, H, A), or of the skills z (B, N, Z).

    h (B, 1, d) is where the window starts or, (B, N, d), where each of its skills does. Returns the states after each
    env step (B, N, H, d) and the weights rho^(t/H)/H of their errors (N, H).
    """
    N, H = actions.shape[1:3]
    inputs = actions if args.dynamics_input == "action" else z.unsqueeze(2).expand(-1, -1, H, -1)
    h_pred = []
    for x in inputs.reshape(len(h), h.shape[1], -1, inputs.shape[-1]).unbind(2):  # (B, 1 or N, A or Z) of each step
        h = model.step(h, x)
        h_pred.append(h)
    weight = args.rho ** (torch.arange(N * H, device=h.device).view(N, H) / H) / H  # (N, H)
    return torch.stack(h_pred, 2).reshape(len(h), N, H, -1), weight


def pretrain_loss(model, skills, prior, target, obs, actions, args):
    """Joint loss of skills and one-step dynamics on windows of the offline data (SkiMo eq. 3-5).

    obs (B, N*H+1, O) raw, actions (B, N*H, A); target is the slow copy of model. Returns the loss and metrics, scalars.
    """
    B, N, H = len(obs), args.pretrain_skills, args.skill_horizon
    chunk_obs, chunk_actions = obs[:, :-1].unflatten(1, (N, H)), actions.unflatten(1, (N, H))  # (B, N, H, O), ... A)
    chosen = torch.rand(B, N, device=obs.device).topk(args.bc_chunks, 1).indices  # (B, C) chunks, DEVIATION 2
    q = skills.encode_skill(chunk_obs, chunk_actions)  # 2 x (B, N, Z)
    z = sample(q)  # (B, N, Z)

    # eq. 3: behavioural cloning by the skill policy, on the chosen chunks of each window, and KL(q || N(0, 1))
    row = torch.arange(B, device=obs.device)[:, None]  # (B, 1); compiled, z[row, chosen] would lose its gradient
    z_steps = (nn.functional.one_hot(chosen, N).to(z) @ z).unsqueeze(2).expand(-1, -1, H, -1)  # (B, C, H, Z)
    bc_loss = (skills.act(chunk_obs[row, chosen], z_steps) - chunk_actions[row, chosen]).square().mean()
    kl_loss = kl_divergence(q, (torch.zeros_like(q[0]), torch.ones_like(q[1]))).clamp(-100, 100).mean()

    # Reconstruction: Gaussian likelihood of the scaled states at skill boundaries
    skill_obs = obs[:, ::H]  # (B, N+1, O)
    h = model.encoder(skill_obs)  # (B, N+1, d)
    likelihood = torch.distributions.Normal(*model.decode(h), validate_args=False)
    recon_loss = -likelihood.log_prob(model.encoder.scaled(skill_obs)).sum(-1).mean()

    # In place of eq. 4: h_{t+1} = D1(h_t, a_t), rolled out through time, agrees with the slow encoder at every env step
    with torch.no_grad():
        h_target = target.encoder(obs[:, 1:]).unflatten(1, (N, H))  # (B, N, H, d)
    h_pred, weight = predict_steps(model, h[:, :1], chunk_actions, z, args)  # (B, N, H, d), (N, H)
    consistency = (weight * (h_pred - h_target).square().mean(-1)).sum((1, 2))  # (B,)
    consistency_loss = consistency.clamp(max=1e4).mean()

    # eq. 5: the prior p(z | h) follows q; its gradient reaches the state encoder, not q
    prior_loss = kl_divergence((q[0].detach(), q[1].detach()), tanh_normal(prior(h[:, :-1]))).mean()

    loss = args.bc_coef * bc_loss + args.kl_coef * kl_loss + args.prior_coef * prior_loss
    loss = loss + (args.recon_coef * recon_loss + args.consistency_coef * consistency_loss) / N
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss)
    metrics |= dict(recon_loss=recon_loss, consistency_loss=consistency_loss)
    return loss, {name: value.detach() for name, value in metrics.items()}


def model_loss(model, target, task_policy, obs, actions, z, rewards, dones, steps, args):
    """World model and critics on windows of skills from the replay buffer (SkiMo eq. 6).

    obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps, the env steps that a skill lasted,
    (B, N). Returns the loss, metrics, and detached latents at the skills' boundaries for the policy: h = E(o) and
    h_pred, where the skill before leads by D1 and its real actions, both (B, N+1, d).
    """
    N, H = actions.shape[1:3]
    with torch.no_grad():  # E is frozen, so that its states need no slow copy
        h_steps = model.encoder(obs)  # (B, N*H+1, d)
        h, h_target = h_steps[:, ::H], h_steps[:, 1:].unflatten(1, (N, H))  # (B, N+1, d), (B, N, H, d)
        next_z = sample(tanh_normal(task_policy(h[:, 1:])))  # (B, N, Z)
        td_target = rewards + (1 - dones) * args.gamma * torch.min(*target.q(h[:, 1:], next_z))  # (B, N)
    h_pred, weight = predict_steps(model, h[:, :-1], actions, z, args)  # (B, N, H, d), (N, H)
    weight = weight * (torch.arange(H, device=obs.device) < steps[..., None])  # (B, N, H): nothing after an early end
    consistency = (weight * (h_pred - h_target).square().mean(-1)).sum((1, 2))  # (B,)
    h_pred = torch.cat([h[:, :1], h_pred[:, :, -1]], 1)  # (B, N+1, d)

    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    # Reward and value learn on imagined states, weighted by rho^t, and on encoded ones, weight 1.
    both, both_z = torch.stack([h_pred[:, :-1], h[:, :-1]], 1), z[:, None].expand(-1, 2, -1, -1)  # (B, 2, N, d), ... Z)
    weight = torch.stack([rho, torch.ones_like(rho)])  # (2, N)
    (q1, q2), reward, td = model.q(both, both_z), model.reward(both, both_z), td_target[:, None]  # (B, 2, N)
    reward_error = (weight * (reward - rewards[:, None]).square()).sum((1, 2))  # (B,)
    value_error = (weight * ((q1 - td).square() + (q2 - td).square())).sum((1, 2))  # (B,)

    loss = args.consistency_coef * consistency.clamp(max=1e5) + args.reward_coef * reward_error.clamp(max=1e5)
    loss = (loss + args.value_coef * value_error.clamp(max=1e5)).mean() / N
    metrics = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error, td_target=td_target)
    metrics = {name: value.detach().mean() for name, value in metrics.items()} | dict(q_value=q1[:, 1].detach().mean())
    return loss, metrics, h, h_pred.detach()


def policy_loss(model, task_policy, prior_encoder, skill_prior, obs, h, h_pred, alpha, args):
    """Task policy: maximise Q, stay close to the frozen prior (SkiMo eq. 7).

    obs (B, N+1, O), h and h_pred (B, N+1, d) detached, alpha (); prior_encoder is the E of pre-training, frozen.
    Q is on policy_latents, the KL on encoded states, as in the release. Returns the loss and metrics;
    metrics["prior_kl"] is the mean KL in nats.
    """
    N = obs.shape[1] - 1
    rho = args.rho ** torch.arange(N, device=obs.device)  # (N,)
    latents = {"imagined": h_pred, "h0": h[:, :1].expand_as(h), "encoded": h}[args.policy_latents][:, :N]  # (B, N, d)
    q_value = torch.min(*model.q(latents, sample(tanh_normal(task_policy(latents)))))  # (B, N)
    with torch.no_grad():
        prior = tanh_normal(skill_prior(prior_encoder(obs[:, :-1])))  # 2 x (B, N, Z)
    prior_kl = kl_divergence(tanh_normal(task_policy(h[:, :-1])), prior).clamp(-100, 100)  # (B, N)
    loss = ((rho * (alpha * prior_kl - q_value)).sum(1)).mean() / N
    return loss, dict(policy_loss=loss.detach(), policy_q=q_value.detach().mean(), prior_kl=prior_kl.detach().mean())


# -------------------------------------------------------------------------------------------------- planner and acting
@torch.no_grad()
def plan(model, task_policy, obs, mean, std_floor, noise_scale, args):
    """CEM over sequences of K skills in the skill dynamics, for all environments at once (SkiMo, section 3.4).

    obs (E, O); mean (E, K, Z): zeros or the last plan, moved on (for plan_start wide); std_floor (): least std of
    samples; noise_scale (): 1 to explore, 0 to evaluate. Returns the first skill (E, Z) and the fitted mean (E, K, Z).
    """
    E, K, Z = mean.shape
    h0 = model.encoder(obs)  # (E, d)

    h, policy_plans = h0[:, None].expand(-1, args.num_policy_trajs, -1), []
    for _ in range(K):
        policy_plans.append(sample(tanh_normal(task_policy(h))))  # (E, 25, Z)
        h = model.next(h, policy_plans[-1])
    policy_plans = torch.stack(policy_plans, 2)  # (E, 25, K, Z)

    std = torch.full_like(mean, args.plan_std)
    if args.plan_start == "policy":  # DEVIATION 5
        mean, std = policy_plans.mean(1), policy_plans.std(1).maximum(std_floor)  # (E, K, Z)
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
    noise_std = std_floor if args.plan_start == "policy" else std[:, 0]  # DEVIATION 5: the policy's std stays wide
    first_skill = first_skill + noise_scale * noise_std * torch.randn_like(first_skill)
    return first_skill.clamp(-0.999, 0.999), mean


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


def prior_rollouts(networks, args: Args, num_episodes: int, max_skills: int | None = None):
    """Episodes with skills from the prior, what a fresh task policy explores; returns what data_tools.rollout does."""
    cpu = copy.deepcopy(networks).cpu()

    def choose_skill(obs, episode_start):
        return sample(tanh_normal(cpu["prior"](cpu["model"].encoder(torch.from_numpy(obs)))))  # (E, Z)

    envs = data_tools.make_envs(args.env_id, num_episodes)
    return data_tools.rollout(execute_skill, envs, cpu["skills"], choose_skill, args, args.seed, max_skills)


# -------------------------------------------------------------------------------------------------------------- replay
class ReplayBuffer:
    """Finished episodes of at least N skills, back to back in flat tensors on the device; nothing is ever dropped.

    An episode of T skills takes T + 1 rows of H env steps; the last one begins with its final observation.
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args, device):
        self.num_skills, self.skill_horizon = args.num_skills, args.skill_horizon
        self.split_sizes = [args.skill_horizon * obs_dim, args.skill_horizon * action_dim, args.skill_dim, 1, 1, 1]
        self.rows = torch.zeros(0, sum(self.split_sizes), device=device)  # H obs, H actions, z, reward, done, env steps
        self.episodes = torch.zeros(0, 2, dtype=torch.long, device=device)  # first row, skills
        self.running = [[] for _ in range(args.num_envs)]  # rows of the unfinished episodes

    def add(self, trace, z, rewards, ended, steps, next_obs):
        """One skill of every environment: its trace, z (E, Z), rewards, ended, steps (E,) and next_obs (E, O) NumPy.

        A time-out is stored as a true end, as in the release.
        """
        unused = [(next_obs, np.zeros_like(trace[0][1]), ended)] * (self.skill_horizon - len(trace))  # all ended early
        obs, actions, _ = zip(*trace, *unused)  # H x (E, O), H x (E, A)
        numbers = torch.from_numpy(np.stack([rewards, ended, steps], 1).astype(np.float32))  # (E, 3)
        rows = torch.cat([torch.from_numpy(np.concatenate([*obs, *actions], 1)), z, numbers], 1)
        last = torch.cat([torch.from_numpy(next_obs), torch.zeros_like(rows[:, next_obs.shape[1] :])], 1)
        for e, running in enumerate(self.running):
            running.append(rows[e])
            if ended[e]:
                if len(running) >= self.num_skills:
                    episode = torch.tensor([[len(self.rows), len(running)]], device=self.rows.device)
                    self.episodes = torch.cat([self.episodes, episode])
                    self.rows = torch.cat([self.rows, torch.stack([*running, last[e]]).to(self.rows.device)])
                running.clear()

    def sample(self, batch_size: int):
        """Windows of N skills: obs (B, N*H+1, O), actions (B, N, H, A), z (B, N, Z), rewards, dones and steps (B, N).

        Episodes are uniform; the start is min(uniform{0..T-1}, T-N), so that the last window is drawn more often.
        """
        index = torch.randint(len(self.episodes), (batch_size,), device=self.rows.device)  # (B,)
        first, T = self.episodes[index].unbind(1)
        start = (torch.rand(batch_size, device=self.rows.device) * T).long().minimum(T - self.num_skills)
        rows = self.rows[(first + start)[:, None] + torch.arange(self.num_skills + 1, device=self.rows.device)]
        obs, actions, *others = rows.split(self.split_sizes, -1)  # (B, N+1, .)
        obs = obs.unflatten(-1, (self.skill_horizon, -1)).flatten(1, 2)[:, : self.num_skills * self.skill_horizon + 1]
        actions, z, rewards, dones, steps = (x[:, :-1] for x in (actions, *others))
        return obs, actions.unflatten(-1, (self.skill_horizon, -1)), z, rewards[..., 0], dones[..., 0], steps[..., 0]


# --------------------------------------------------------------------------------------------------------- pre-training
class Pretrainer(nn.Module):
    """The networks of pre-training with their slow copy and optimizer, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args, self.networks, self.num_updates = args, networks, 0
        self.target = copy.deepcopy(networks["model"])
        self.optimizers = [torch.optim.Adam(networks.parameters(), lr=args.pretrain_lr, eps=1e-7, fused=True)]
        self.loss = torch.compile(pretrain_loss, mode="reduce-overhead", dynamic=False, disable=not args.compile)

    def update(self, obs, actions) -> dict:
        """One step on windows obs (B, N*H+1, O), actions (B, N*H, A); returns metrics."""
        args, (optimizer,) = self.args, self.optimizers
        if args.pretrain_lr_decay:  # DEVIATION 3
            decay = max(0.0, 1 - self.num_updates / args.pretrain_updates) ** 0.5
            optimizer.param_groups[0]["lr"] = args.pretrain_lr * min(1.0, (self.num_updates + 1) / 500) * decay
        torch.compiler.cudagraph_mark_step_begin()
        loss, metrics = self.loss(*self.networks.values(), self.target, obs, actions, args)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.networks.parameters(), args.max_grad_norm)
        optimizer.step()
        self.num_updates += 1
        if self.num_updates % args.target_update_interval == 0:
            update_target(self.target, self.networks["model"], args.pretrain_tau)
        return metrics


@torch.no_grad()
def update_target(target, online, tau: float):
    """target <- (1 - tau) target + tau online"""
    torch._foreach_lerp_(list(target.parameters()), list(online.parameters()), tau)


def pretrain(args: Args, run: data_tools.Run) -> nn.ModuleDict:
    """Phase 1: networks that --pretrained or the cache holds or, first, that are learnt from the offline data."""
    torch.manual_seed(args.seed)
    networks = make_networks(args, *data_tools.env_sizes(args.env_id), run.device)
    if run.load_pretrained(networks):
        return networks
    train_data, valid_data = run.data.to(run.device).split(0.99)
    window = args.pretrain_skills * args.skill_horizon + 1
    trainer = Pretrainer(args, networks)
    for update in run.pretraining(trainer):  # goes on where it was interrupted
        batch = train_data.sample_windows(args.pretrain_batch_size, window)
        run.log_update("pretrain", trainer.update(*batch), update)
        finished = update == args.pretrain_updates
        if finished or update % args.pretrain_eval_interval == 0:
            with data_tools.fork_rng(), torch.no_grad():
                torch.manual_seed(args.seed)
                batch = valid_data.sample_windows(args.pretrain_batch_size, window)
                _, metrics = pretrain_loss(*networks.values(), trainer.target, *batch, args)
            returns, _, trace, _ = prior_rollouts(networks, args, args.pretrain_eval_episodes * (4 if finished else 1))
            facts = run.log_validation(metrics, returns, trace, update)
    run.save_pretrained(networks, facts)
    return networks


# -------------------------------------------------------------------------------------------------------- downstream RL
class Learner(nn.Module):
    """Everything that downstream RL trains, the frozen prior and skills, and one gradient step."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args, self.num_updates = args, 0
        self.model, self.skills, self.skill_prior = networks["model"], networks["skills"], networks["prior"]
        self.task_policy, self.target = copy.deepcopy(self.skill_prior), copy.deepcopy(self.model)
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)  # with the skills E, which the model shares with them
        self.device = next(self.model.parameters()).device
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=self.device).log())
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True)
        self.model_optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.policy_optimizer = adam(self.task_policy.parameters(), lr=args.learning_rate)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        self.optimizers = self.model_optimizer, self.policy_optimizer, self.alpha_optimizer
        compiled = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False, disable=not args.compile)
        self.model_loss, self.policy_loss = compiled(model_loss), compiled(policy_loss)

    def update(self, obs, actions, z, rewards, dones, steps) -> dict:
        """One step of model, task policy, alpha and target on windows from the replay buffer; returns metrics."""
        args, model = self.args, self.model
        torch.compiler.cudagraph_mark_step_begin()
        batch = obs, actions, z, rewards, dones, steps
        loss, metrics, h, h_pred = self.model_loss(model, self.target, self.task_policy, *batch, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # the critics' weights need no gradient of the policy loss
        alpha, prior = self.log_alpha.exp().detach(), (model.encoder, self.skill_prior)
        skill_obs = obs[:, :: args.skill_horizon]  # (B, N+1, O)
        loss, policy_metrics = self.policy_loss(model, self.task_policy, *prior, skill_obs, h, h_pred, alpha, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.task_policy.parameters(), args.max_grad_norm)
        self.policy_optimizer.step()
        model.requires_grad_(True)
        self.skills.requires_grad_(False)

        if args.autotune:  # alpha rises while the KL exceeds its target
            self.alpha_optimizer.zero_grad()
            (self.log_alpha.exp() * (args.target_kl - policy_metrics["prior_kl"])).backward()
            self.alpha_optimizer.step()
        self.num_updates += 1
        if self.num_updates % args.target_update_interval == 0:
            update_target(self.target, model, args.tau)  # DEVIATION 6
        return metrics | policy_metrics | dict(alpha=alpha)


def train(args: Args, run: data_tools.Run, networks: nn.ModuleDict) -> dict:
    """Phase 2: online RL over skills, from the pre-trained networks or, with --resume, from the run's checkpoint.

    Returns the results; they, pictures and checkpoints are in the run's folder.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model comes from this run or from a file
    learner = Learner(args, networks)
    planner = Planner(learner.model, learner.task_policy, args, learner.device)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = ReplayBuffer(obs.shape[1], envs.single_action_space.shape[0], args, learner.device)
    parts, ended = dict(learner=learner, rb=rb, envs=envs), np.ones(args.num_envs, dtype=bool)
    obs, ended, planner.last_mean = run.start_rl(parts, obs=obs, ended=ended, last_mean=None)
    skills = copy.deepcopy(learner.skills).cpu()  # acts next to the simulator
    while True:
        # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up.
        updates_due = int(run.global_step * args.updates_per_step) if run.global_step >= args.warmup_steps else 0
        while learner.num_updates < updates_due and len(rb.episodes) > 0 and not run.stop.requested:
            run.log_update("losses", learner.update(*rb.sample(args.batch_size)), run.global_step)
        run.lap("update")
        if not run.goes_on(parts, obs=obs, ended=ended, last_mean=planner.last_mean):
            break
        if run.evaluation_is_due():
            run.log_evaluation(*evaluate(learner, args, run.global_step))

        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4).
        if run.global_step < args.warmup_steps:
            with torch.no_grad():
                h = learner.model.encoder(torch.from_numpy(obs).to(learner.device))  # (E, d)
                z = sample(tanh_normal(learner.task_policy(h))).cpu()  # (E, Z), the prior: no update yet
        else:
            z = planner(obs, ended, run.global_step, explore=True)
        run.lap("plan")
        none_ended, trace = np.zeros(len(obs), dtype=bool), []  # (obs, action, ended) of every env step
        next_obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, none_ended, args, trace)
        rb.add(trace, z, args.reward_scale * rewards, ended, steps, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = envs.reset(options={"reset_mask": ended})[0] if ended.any() else next_obs
        run.lap("env")
        run.log_skill(rewards, steps, ended, learner.num_updates)

    run.log_evaluation(*evaluate(learner, args, run.global_step))
    envs.close()
    data_tools.plot_visited(args.env_id, rb.rows[:, : obs.shape[1]].cpu().numpy(), run.dir / "visited.png", run.writer)
    if args.capture_video:
        evaluate(learner, args, run.global_step, run.dir / "evaluation.mp4")
    return run.finish(learner.num_updates)


# ----------------------------------------------------------------------------------------------------------------- main
@data_tools.errors_in_one_line()
def main(args: Args) -> dict:
    """Both phases; pictures, results.json and a summary. Returns the results."""
    run = data_tools.Run(args, FILE_VERSION, MODEL_ARGS, RUN_ARGS)
    run.find_pretrained(PRETRAINED, PRETRAIN_ARGS)
    networks = pretrain(args, run)
    if not run.resumed:
        _, _, trace, z = prior_rollouts(networks, args, 1 + args.pretrain_eval_episodes, max_skills=50)
        paths = data_tools.open_loop_prediction(networks["model"], trace, z, args.skill_horizon)
        data_tools.plot_prediction(args.env_id, paths, run.dir / "prediction.png", run.writer)
    return train(args, run, networks)


if __name__ == "__main__":
    main(parse_args())
