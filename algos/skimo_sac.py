"""SkiMo + SAC: SkiMo's skills, model-free RL (ablation of Shi, Lim & Lee, CoRL 2022), https://arxiv.org/abs/2207.07560

Idea: skills, prior and state encoder are pre-trained as in SkiMo, skill dynamics included, but RL has no model: SAC on
skills, with the KL to the prior in place of the entropy, as in SPiRL. It shows what planning in the model is worth.

    python algos/skimo_sac.py --env-id maze                         # as skimo.py, with its pre-trained model
    python algos/skimo_sac.py --env-id maze --pretrained published  # start at RL, from skimo.py's published model

Differs from skimo.py in: Args, TASK_DEFAULTS, Critic, model_loss, critic_loss, policy_loss, plan, Planner,
    act, evaluate, Learner, train
No planner, no loss on dynamics and reward, windows of one skill downstream. Critics see the state encoder's inputs, not
the latent state (the release's see no sines and cosines: so did ours, and fell from the prior's .25 to 0 in the maze).
The prior KL is a cost in their target; the policy loss trains the state encoder as well. The networks are SkiMo's so
that its pre-trained models fit; D, R and Q of WorldModel lie idle in RL.
Paper: benchmarks/paper_curves.csv, "SkiMo+SAC": a fraction of SkiMo's success on every task.

1. Pre-training: encode chunks of H actions as skills z ~ q; loss = behavioural cloning + KL(q || N(0,1)) (eq. 3)
   + reconstruction + consistency of h_{i+1} = D(h_i, z_i) (eq. 4) + prior KL(q || p(h_i)) (eq. 5)
2. Downstream RL (the task policy pi starts as the prior p), repeat:
   act: run a skill z ~ pi(E(s)) for H steps with the frozen skill policy pi_L
   critic update: Q(s, z) -> r + gamma (min Q'(s', z') - alpha KL(pi(E(s')) || p(s'))), z' ~ pi(E(s'))
   policy update of pi and E: maximise Q(s, z) - alpha KL(pi(E(s)) || p(s)); tune alpha; move the slow critics

Deviations from paper and release, marked DEVIATION n below, with skimo.py's numbers (its header says more):
1. closed-form KL; 2. behavioural cloning on bc_chunks random chunks; 3. fewer, smaller updates with a learning rate
schedule, kitchens 5 skills, larger KL weight, noisy data, periodic features; 4. environments in lockstep; 6. tau 0.05;
7. kitchens: alpha 0.05. Logged as in skimo.py. Score: maze, last 100 training episodes at 300,000 env steps: 1.00 each.
Shapes: B batch, N skills per window, H steps per skill, O observation, A action, Z skill, d latent state,
E environments. Batch first.
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
PRETRAINED = "skimo"  # name of the pre-trained models; files with the same pre-training share them


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned or calvin
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    num_threads: int = 0  # CPU threads of torch (0: one per core that may be used)
    compile: bool = torch.cuda.is_available()  # torch.compile, with CUDA graphs, of the losses
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
    warmup_steps: int = 5_000  # env steps with skills from the prior, before updates start
    batch_size: int = 256  # skills per update
    updates_per_step: float = 10 / 500  # gradient updates per env step, the warm-up's included
    learning_rate: float = 1e-3  # of critics, task policy and state encoder
    alpha: float = 0.5  # weight of the prior KL (its first value if autotune)
    autotune: bool = False  # tune alpha so that the prior KL is target_kl
    target_kl: float = 3.0  # nats between task policy and prior
    alpha_lr: float = 3e-4  # learning rate of log alpha
    gamma: float = 0.99  # discount per skill
    rho: float = 0.5  # weight rho^t of the t-th skill of a window
    tau: float = 0.05  # share of the online weights in a target update (release: 0.01)
    target_update_interval: int = 2  # updates between target updates
    consistency_coef: float = 2.0  # weight of the latent consistency in pre-training
    value_coef: float = 0.1  # weight of the TD loss
    reward_scale: float = 1.0  # factor on the task's reward
    max_grad_norm: float = 100.0  # bound of the gradient's global norm

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    num_skills: Literal[1] = 1  # N: skills per window of RL, which needs no sequences without a model
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of hidden layers
    latent_dim: int = 256  # d: size of a latent state
    skill_encoder: Literal["mlp", "lstm"] = "lstm"  # architecture of q


# The release's values where they differ from Args, but for total_timesteps, pre-training (DEVIATION 3) and the
# kitchen's alpha (release: 0.5).
TASK_DEFAULTS = {
    "maze": dict(
        latent_dim=128, skill_encoder="mlp", kl_coef=3e-3, total_timesteps=300_000, warmup_steps=50_000, batch_size=128,
        alpha=1.0, autotune=True,
    ),
    "kitchen": dict(  # alpha: DEVIATION 7
        pretrain_updates=10_000, pretrain_skills=5, bc_chunks=5, pretrain_batch_size=64, kl_coef=3e-3, alpha=0.05,
    ),
    "calvin": dict(
        hidden_dim=256, num_skills=1, pretrain_updates=10_000, pretrain_skills=1, bc_chunks=1, pretrain_batch_size=256,
        kl_coef=1e-2, alpha=0.1, reward_scale=0.01, total_timesteps=2_000_000,
    ),
}  # fmt: skip
TASK_DEFAULTS["kitchen-misaligned"] = TASK_DEFAULTS["kitchen"]

# What a pre-trained model and a run must share, what else shapes the model (key of the cache) and a run that goes on
MODEL_ARGS = "hidden_dim latent_dim skill_dim skill_horizon skill_encoder position_features".split()
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
    """State encoder E, skill dynamics D, reward R, critics Q, observation decoder."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u, d, dz = args.hidden_dim, args.latent_dim, args.latent_dim + args.skill_dim
        self.encoder = StateEncoder(obs_dim, args)
        self.dynamics = mlp(dz, u, u, u, u, d)
        self.reward_model, self.qf1, self.qf2 = scalar_head(dz, u), scalar_head(dz, u), scalar_head(dz, u)
        self.decoder = mlp(d, u, u, 2 * obs_dim)

    def next(self, h, z):  # D(h, z): the latent state after the whole skill
        return self.dynamics(torch.cat([h, z], -1))  # (..., d)

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
    """Skill encoder q(z | s, a) and skill policy pi_L(a | s, z), on a state encoder E_L of their own."""

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


class Critic(nn.Module):
    """Q_1(s, z) and Q_2(s, z): features of observations (..., F) and skills (..., Z) -> 2 x (...)."""

    def __init__(self, num_features: int, args: Args):
        super().__init__()
        sizes = num_features + args.skill_dim, args.hidden_dim
        self.qf1, self.qf2 = scalar_head(*sizes), scalar_head(*sizes)

    def forward(self, features, z):
        sz = torch.cat([features, z], -1)
        return self.qf1(sz).squeeze(-1), self.qf2(sz).squeeze(-1)


def make_networks(args: Args, obs_dim: int, action_dim: int, device) -> nn.ModuleDict:
    """The networks of pre-training: world model, skills, and the prior p(z | h), (..., d) -> (..., 2 * Z)."""
    prior = mlp(args.latent_dim, *[args.hidden_dim] * 4, 2 * args.skill_dim)
    networks = dict(model=WorldModel(obs_dim, args), skills=SkillModel(obs_dim, action_dim, args), prior=prior)
    return nn.ModuleDict(networks).to(device)


# -------------------------------------------------------------------------------------------------------------- losses
def pretrain_loss(model, skills, prior, target, obs, actions, args):
    """Joint loss of skills and skill dynamics on windows of the offline data (SkiMo eq. 3-5).

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

    # eq. 4: h_{i+1} = D(h_i, z_i), rolled out from h_0 through time, agrees with the slow encoder
    with torch.no_grad():
        h_target = target.encoder(skill_obs)  # (B, N+1, d)
    h_pred, consistency = h[:, 0], 0.0
    for i in range(N):
        h_pred = model.next(h_pred, z[:, i])  # (B, d)
        consistency = consistency + args.rho**i * (h_pred - h_target[:, i + 1]).square().mean(-1)  # (B,)
    consistency_loss = consistency.clamp(max=1e4).mean()

    # eq. 5: the prior p(z | h) follows q; its gradient reaches the state encoder, not q
    prior_loss = kl_divergence((q[0].detach(), q[1].detach()), tanh_normal(prior(h[:, :-1]))).mean()

    loss = args.bc_coef * bc_loss + args.kl_coef * kl_loss + args.prior_coef * prior_loss
    loss = loss + (args.recon_coef * recon_loss + args.consistency_coef * consistency_loss) / N
    metrics = dict(bc_loss=bc_loss, kl_loss=kl_loss, prior_loss=prior_loss)
    metrics |= dict(recon_loss=recon_loss, consistency_loss=consistency_loss)
    return loss, {name: value.detach() for name, value in metrics.items()}


def critic_loss(
    critic, target, encoder, task_policy, prior_encoder, skill_prior, obs, z, rewards, dones, next_obs, alpha, args
):
    """Critics on single skills from the replay buffer; in the target, the next state's prior KL is a cost.

    obs and next_obs (B, 1, O), z (B, 1, Z), rewards and dones (B, 1), alpha (). Returns the loss and metrics.
    """
    with torch.no_grad():
        policy = tanh_normal(task_policy(encoder(next_obs)))  # 2 x (B, 1, Z)
        prior = tanh_normal(skill_prior(prior_encoder(next_obs)))  # 2 x (B, 1, Z)
        next_value = torch.min(*target(encoder.features(next_obs), sample(policy)))  # (B, 1)
        next_value = next_value - alpha * kl_divergence(policy, prior).clamp(-100, 100)
        td_target = rewards + (1 - dones) * args.gamma * next_value  # (B, 1)
    q1, q2 = critic(encoder.features(obs), z)  # (B, 1)
    # Twice: SkiMo's errors on imagined and on encoded states are the same one where a window has but one skill.
    value_error = 2 * ((q1 - td_target).square() + (q2 - td_target).square())  # (B, 1)
    loss = args.value_coef * value_error.clamp(max=1e5).mean()
    metrics = dict(value_loss=value_error, td_target=td_target, q_value=q1)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def policy_loss(critic, encoder, task_policy, prior_encoder, skill_prior, obs, alpha, args):
    """Task policy and state encoder: maximise Q, stay close to the frozen prior (SkiMo eq. 7, without a model).

    obs (B, 1, O), alpha (); prior_encoder is the E of pre-training, frozen.
    Returns the loss and metrics; metrics["prior_kl"] is the mean KL in nats.
    """
    policy = tanh_normal(task_policy(encoder(obs)))  # 2 x (B, 1, Z)
    q_value = torch.min(*critic(encoder.features(obs), sample(policy)))  # (B, 1)
    with torch.no_grad():
        prior = tanh_normal(skill_prior(prior_encoder(obs)))  # 2 x (B, 1, Z)
    prior_kl = kl_divergence(policy, prior).clamp(-100, 100)  # (B, 1)
    loss = (alpha * prior_kl - q_value).mean()
    return loss, dict(policy_loss=loss.detach(), policy_q=q_value.detach().mean(), prior_kl=prior_kl.detach().mean())


# -------------------------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def act(encoder, task_policy, obs, explore: bool):
    """Skills of the task policy, samples to explore or else its mode: obs (E, O) NumPy -> z (E, Z) on the CPU."""
    h = encoder(torch.from_numpy(obs).to(encoder.scale.device))  # (E, d)
    distribution = tanh_normal(task_policy(h))  # 2 x (E, Z)
    return (sample(distribution) if explore else torch.tanh(distribution[0])).cpu()


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


def evaluate(learner, args: Args, video: Path | None = None):
    """Clean evaluation: the task policy's mode, one episode in each of eval_episodes environments.

    Returns returns (E,) and lengths in env steps (E,). With video, one episode is rendered into that MP4 instead.
    """
    envs = data_tools.make_envs(args.env_id, 1 if video else args.eval_episodes, video)

    def choose_skill(obs, episode_start):
        return act(learner.encoder, learner.task_policy, obs, explore=False)  # (E, Z)

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
        self.encoder, self.skills, self.skill_prior = networks["model"].encoder, networks["skills"], networks["prior"]
        self.device = self.encoder.scale.device
        self.critic = Critic(self.encoder.net[0].in_features, args).to(self.device)
        self.task_policy, self.target = copy.deepcopy(self.skill_prior), copy.deepcopy(self.critic)
        self.prior_encoder = copy.deepcopy(self.encoder)  # the frozen prior keeps the E that it was trained with
        for frozen in (self.skills, self.skill_prior, self.prior_encoder, self.target):
            frozen.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=self.device).log())
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.learning_rate)
        self.policy_parameters = [*self.task_policy.parameters(), *self.encoder.parameters()]
        self.policy_optimizer = adam(self.policy_parameters, lr=args.learning_rate)
        self.alpha_optimizer = adam([self.log_alpha], lr=args.alpha_lr)
        self.optimizers = self.critic_optimizer, self.policy_optimizer, self.alpha_optimizer
        compiled = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False, disable=not args.compile)
        self.critic_loss, self.policy_loss = compiled(critic_loss), compiled(policy_loss)

    def update(self, obs, z, rewards, dones) -> dict:
        """One step of critics, task policy, alpha and target on windows of one skill; returns metrics."""
        args, critic, alpha = self.args, self.critic, self.log_alpha.exp().detach()
        policy = self.encoder, self.task_policy, self.prior_encoder, self.skill_prior
        obs, next_obs = obs.split(1, 1)  # (B, 1, O)
        torch.compiler.cudagraph_mark_step_begin()
        batch = obs, z, rewards, dones, next_obs
        loss, metrics = self.critic_loss(critic, self.target, *policy, *batch, alpha, args)
        self.critic_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
        self.critic_optimizer.step()

        critic.requires_grad_(False)  # its weights need no gradient of the policy loss
        loss, policy_metrics = self.policy_loss(critic, *policy, obs, alpha, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.policy_parameters, args.max_grad_norm)
        self.policy_optimizer.step()
        critic.requires_grad_(True)

        if args.autotune:  # alpha rises while the KL exceeds its target
            self.alpha_optimizer.zero_grad()
            (self.log_alpha.exp() * (args.target_kl - policy_metrics["prior_kl"])).backward()
            self.alpha_optimizer.step()
        self.num_updates += 1
        if self.num_updates % args.target_update_interval == 0:
            update_target(self.target, critic, args.tau)  # DEVIATION 6
        return metrics | policy_metrics | dict(alpha=alpha)


def train(args: Args, run: data_tools.Run, networks: nn.ModuleDict) -> dict:
    """Phase 2: online RL over skills, from the pre-trained networks or, with --resume, from the run's checkpoint.

    Returns the results; they, pictures and checkpoints are in the run's folder.
    """
    torch.manual_seed(args.seed)  # RL is the same whether the model comes from this run or from a file
    learner = Learner(args, networks)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    rb = ReplayBuffer(obs.shape[1], args, learner.device)
    parts = dict(learner=learner, rb=rb, envs=envs)
    (obs,) = run.start_rl(parts, obs=obs)
    skills = copy.deepcopy(learner.skills).cpu()  # acts next to the simulator
    while True:
        # ALGO LOGIC: training. As many updates as all env steps so far are worth, but none in the warm-up.
        updates_due = int(run.global_step * args.updates_per_step) if run.global_step >= args.warmup_steps else 0
        while learner.num_updates < updates_due and len(rb.episodes) > 0 and not run.stop.requested:
            run.log_update("losses", learner.update(*rb.sample(args.batch_size)), run.global_step)
        run.lap("update")
        if not run.goes_on(parts, obs=obs):
            break
        if run.evaluation_is_due():
            run.log_evaluation(*evaluate(learner, args))

        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4).
        z = act(learner.encoder, learner.task_policy, obs, explore=True)  # (E, Z), the prior's in the warm-up
        run.lap("plan")
        next_obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, np.zeros(len(obs), dtype=bool), args, [])
        rb.add(obs, z, args.reward_scale * rewards, ended, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = envs.reset(options={"reset_mask": ended})[0] if ended.any() else next_obs
        run.lap("env")
        run.log_skill(rewards, steps, ended, learner.num_updates)

    run.log_evaluation(*evaluate(learner, args))
    envs.close()
    data_tools.plot_visited(args.env_id, rb.rows[:, : obs.shape[1]].cpu().numpy(), run.dir / "visited.png", run.writer)
    if args.capture_video:
        evaluate(learner, args, run.dir / "evaluation.mp4")
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
