"""SPiRL: Accelerating RL with Learned Skill Priors (Pertsch, Lee & Lim, CoRL 2020), https://arxiv.org/abs/2010.11944

Idea: learn skills of H = 10 actions and a prior over them from task-agnostic data; then SAC chooses skills, held to the
prior by a KL instead of the entropy. This is the closed-loop version of SkiLD, the model-free baseline of SkiMo.

    python algos/spirl.py --env-id maze                         # data, pre-training (cached), RL, evaluation, picture
    python algos/spirl.py --resume runs/<folder>                # goes on after Ctrl-C or a crash

1. Pre-training: encode chunks of H actions as skills z ~ q (LSTM); loss = behavioural cloning by the skill policy
   + KL(q || N(0,1)) - log p(z | s_0) of the prior p, z without gradient
2. Downstream RL on transitions (s, z, sum of H rewards, s'); the task policy pi starts as the prior, repeat:
   act: z = 2 tanh(x), x ~ pi(s), for H steps of the frozen skill policy pi_L
   critics: Q(s, z) -> r + gamma (min Q'(s', z') - alpha KL(pi(s') || p(s'))), Q' slow copies
   policy: maximise min Q(s, z) - alpha KL(pi(s) || p(s)); tune alpha so that the KL is target_kl

Deviations from the release, marked DEVIATION n below
1. KL divergences in closed form (both sides are Gaussian, before the tanh) instead of 10 samples.
2. Fewer updates of pre-training with a decaying learning rate; maze: larger KL weight, noisy data.
3. Sines and cosines of positions and joint angles as inputs, the maze scaled, as in skimo.py.
4. E environments act in lockstep, E updates after E skills. Warm-up counts as env steps (release: it does not).
5. Kitchen: 30 observations, not 60; the others are a constant goal. CALVIN's pre-training, not released: as kitchen's.

Differs from skimo.py in: Args, FILE_VERSION, PRETRAINED, TASK_DEFAULTS, MODEL_ARGS, PRETRAIN_ARGS, RUN_ARGS,
SkillModel, make_networks, pretrain_loss, policy_loss, evaluate, prior_rollouts, ReplayBuffer, Pretrainer,
pretrain, Learner, train, main.
Score: maze, last 100 training episodes that reach the goal, at 300,000 env steps: .16 / .27 / .05 (seeds 1-3).
Logged: as skimo.py. Shapes: B batch, H steps per skill, O observation, F inputs, A action, Z skill, E environments.
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

FILE_VERSION = 1  # raised when a change makes older checkpoints or pre-trained models unusable
PRETRAINED = "spirl"  # name of the pre-trained models; files with the same pre-training share them


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned or calvin
    exp_name: str = Path(__file__).stem  # name of the experiment, part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn
    num_threads: int = 0  # CPU threads of torch (0: one per core that may be used)
    compile: bool = torch.cuda.is_available()  # torch.compile, with CUDA graphs, of the losses
    run_dir: str = "runs"  # folder in which the run makes its own folder
    resume: str | None = None  # run folder to go on with; its arguments become the defaults
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between clean evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of a clean evaluation (mode of the policy)
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
    warmup_skills: int = 5_000  # skills before the updates start
    updates_per_skill: float = 1.0  # gradient updates per skill after the warm-up
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    learning_rate: float = 3e-4  # of critics, policy and log alpha
    alpha: float = 1.0  # first weight of the prior KL
    target_kl: float = 5.0  # nats between task policy and prior, by which alpha is tuned
    gamma: float = 0.99  # discount per skill
    tau: float = 0.005  # share of the online weights in a target update
    reward_scale: float = 1.0  # factor on the task's reward

    # Model
    skill_horizon: int = 10  # H: env steps per skill
    skill_dim: int = 10  # Z: size of a skill
    hidden_dim: int = 128  # width of skill encoder, skill policy and prior
    critic_dim: int = 256  # width of the critics
    critic_blocks: int = 5  # hidden layers of the critics behind the first


# The release's values where they differ from Args (total_timesteps: the paper's), but for the maze's kl_coef (1e-3).
TASK_DEFAULTS = {
    "maze": dict(
        kl_coef=1e-2, total_timesteps=2_000_000, batch_size=128, buffer_size=100_000, target_kl=10.0, critic_blocks=2
    ),
    "kitchen": dict(),
    "kitchen-misaligned": dict(),
    "calvin": dict(total_timesteps=2_000_000),  # DEVIATION 5
}

# What a pre-trained model and a run must share, what else shapes the model (key of the cache) and a run that goes on
MODEL_ARGS = "hidden_dim skill_dim skill_horizon position_features".split()
PRETRAIN_ARGS = (
    "seed pretrain_updates pretrain_batch_size pretrain_lr pretrain_lr_decay clip_updates clip_norm kl_coef"
).split()
RUN_ARGS = ["num_envs", "critic_dim", "critic_blocks", "buffer_size"]

parse_args = functools.partial(data_tools.parse_args, Args, TASK_DEFAULTS, __doc__)  # list of words -> Args


# ------------------------------------------------------------------------------------------------------------ networks
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


class Critics(nn.Module):
    """Q_1 and Q_2 of observations (..., O) and skills (..., Z) -> 2 x (...)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        sizes = self.features.size + args.skill_dim, args.critic_dim, args.critic_blocks, 1
        self.qf1, self.qf2 = Predictor(*sizes, batch_norm=False), Predictor(*sizes, batch_norm=False)

    def forward(self, obs, z):
        inputs = torch.cat([self.features(obs), z], -1)
        return self.qf1(inputs).squeeze(-1), self.qf2(inputs).squeeze(-1)


def make_networks(args: Args, obs_dim: int, action_dim: int, device) -> nn.ModuleDict:
    """The networks of pre-training: skills, and the prior p(z | s)."""
    networks = dict(skills=SkillModel(obs_dim, action_dim, args), prior=SkillPrior(obs_dim, args))
    return nn.ModuleDict(networks).to(device)


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


def critic_loss(critics, target, task_policy, skill_prior, obs, z, rewards, dones, next_obs, alpha, args):
    """TD loss of both critics, the prior KL in place of SAC's entropy (SPiRL algorithm 1).

    obs, next_obs (B, O), z (B, Z), rewards and dones (B,), alpha (). Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        pi = task_policy(next_obs)  # 2 x (B, Z)
        prior_kl = kl_divergence(pi, skill_prior(next_obs)).clamp(-100, 100)  # (B,)
        next_value = torch.min(*target(next_obs, squash(draw(pi)))) - alpha * prior_kl
        td_target = rewards + (1 - dones) * args.gamma * next_value  # (B,)
    q1, q2 = critics(obs, z)
    loss = 0.5 * ((q1 - td_target).square() + (q2 - td_target).square()).mean()
    return loss, dict(value_loss=loss.detach(), q_value=q1.detach().mean(), td_target=td_target.mean())


def policy_loss(critics, task_policy, skill_prior, obs, alpha, args):
    """Task policy: maximise Q, stay close to the frozen prior (SPiRL algorithm 1). obs (B, O), alpha ().

    Returns the loss and metrics; metrics["prior_kl"] is the mean KL in nats.
    """
    pi = task_policy(obs)  # 2 x (B, Z)
    q_value = torch.min(*critics(obs, squash(draw(pi))))  # (B,)
    with torch.no_grad():
        prior = skill_prior(obs)
    prior_kl = kl_divergence(pi, prior).clamp(-100, 100)  # (B,)
    loss = (alpha * prior_kl - q_value).mean()
    return loss, dict(policy_loss=loss.detach(), policy_q=q_value.detach().mean(), prior_kl=prior_kl.detach().mean())


# -------------------------------------------------------------------------------------------------------------- acting
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
    """Clean evaluation: mode of the task policy, one episode in each of eval_episodes environments.

    Returns returns (E,) and lengths in env steps (E,). With video, one episode is rendered into that MP4 instead.
    """
    envs = data_tools.make_envs(args.env_id, 1 if video else args.eval_episodes, video)
    policy = copy.deepcopy(learner.task_policy).cpu()

    def choose_skill(obs, episode_start):
        return squash(policy(torch.from_numpy(obs))[0])  # (E, Z)

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
    """The last buffer_size transitions over one skill, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, args: Args, device):
        self.device, self.split_sizes = device, [obs_dim, args.skill_dim, 1, 1, obs_dim]
        # obs, z, reward, done, next_obs
        self.rows = torch.zeros(args.buffer_size, sum(self.split_sizes), device=device)
        self.added = 0  # transitions ever added

    def __len__(self):
        return min(self.added, len(self.rows))

    def add(self, obs, z, rewards, ended, next_obs):
        """One skill of every environment: obs, next_obs (E, O) NumPy, z (E, Z), rewards, ended (E,) NumPy.

        A time-out is stored as a true end, as in the release.
        """
        rewards, dones = torch.from_numpy(rewards)[:, None], torch.from_numpy(ended).float()[:, None]
        rows = torch.cat([torch.from_numpy(obs), z, rewards, dones, torch.from_numpy(next_obs)], 1)
        self.rows[torch.arange(self.added, self.added + len(obs)) % len(self.rows)] = rows.to(self.device)
        self.added += len(obs)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), z (B, Z), rewards and dones (B,), next_obs (B, O)."""
        rows = self.rows[torch.randint(len(self), (batch_size,), device=self.device)]
        obs, z, rewards, dones, next_obs = rows.split(self.split_sizes, -1)
        return obs, z, rewards[:, 0], dones[:, 0], next_obs

    def get_state(self) -> dict:
        return dict(rows=self.rows[: len(self)].clone(), added=self.added)

    def set_state(self, state: dict):
        self.rows[: len(state["rows"])] = state["rows"].to(self.device)
        self.added = state["added"]


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
    """Everything that downstream RL trains, the frozen prior and skills, and one gradient step of everything.

    All networks are in evaluation mode: BatchNorm keeps the statistics of pre-training, as the policy starts from them.
    """

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args, self.num_updates = args, 0
        self.skills, self.skill_prior = networks["skills"], networks["prior"]
        self.device = self.skill_prior.features.scale.device
        self.task_policy = copy.deepcopy(self.skill_prior)
        self.critics = Critics(len(self.skill_prior.features.scale), args).to(self.device)
        self.target = copy.deepcopy(self.critics)
        self.eval()
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=self.device).log())
        adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
        self.critic_optimizer = adam(self.critics.parameters())
        self.policy_optimizer = adam(self.task_policy.parameters())
        self.alpha_optimizer = adam([self.log_alpha])
        self.optimizers = self.critic_optimizer, self.policy_optimizer, self.alpha_optimizer
        compiled = functools.partial(torch.compile, mode="reduce-overhead", dynamic=False, disable=not args.compile)
        self.critic_loss, self.policy_loss = compiled(critic_loss), compiled(policy_loss)

    def update(self, obs, z, rewards, dones, next_obs) -> dict:
        """One step of critics, task policy, alpha and target on transitions from the replay buffer; returns metrics."""
        args, alpha = self.args, self.log_alpha.exp().detach()
        torch.compiler.cudagraph_mark_step_begin()
        batch, nets = (obs, z, rewards, dones, next_obs), (self.task_policy, self.skill_prior)
        loss, metrics = self.critic_loss(self.critics, self.target, *nets, *batch, alpha, args)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = self.policy_loss(self.critics, *nets, obs, alpha, args)
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)

        self.alpha_optimizer.zero_grad()  # alpha rises while the KL exceeds its target
        (self.log_alpha.exp() * (args.target_kl - policy_metrics["prior_kl"])).backward()
        self.alpha_optimizer.step()
        update_target(self.target, self.critics, args.tau)
        self.num_updates += 1
        return metrics | policy_metrics | dict(alpha=alpha)


def train(args: Args, run: data_tools.Run, networks: nn.ModuleDict) -> dict:
    """Phase 2: online RL over skills, from the pre-trained networks or, with --resume, from the run's checkpoint.

    Returns the results; they, picture and checkpoints are in the run's folder.
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
        # ALGO LOGIC: training. One update per skill that followed the warm-up (DEVIATION 4).
        updates_due = int((rb.added - args.warmup_skills) * args.updates_per_skill)
        while learner.num_updates < updates_due and not run.stop.requested:
            run.log_update("losses", learner.update(*rb.sample(args.batch_size)), run.global_step)
        run.lap("update")
        if not run.goes_on(parts, obs=obs):
            break
        if run.evaluation_is_due():
            run.log_evaluation(*evaluate(learner, args))

        # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps. In the warm-up
        # the task policy is still the prior.
        with torch.no_grad():
            z = squash(draw(learner.task_policy(torch.from_numpy(obs).to(learner.device)))).cpu()  # (E, Z)
        run.lap("plan")
        next_obs, rewards, ended, steps = execute_skill(envs, skills, obs, z, np.zeros(len(obs), dtype=bool), args, [])
        rb.add(obs, z, args.reward_scale * rewards, ended, next_obs)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = envs.reset(options={"reset_mask": ended})[0] if ended.any() else next_obs
        run.lap("env")
        run.log_skill(rewards, steps, ended, learner.num_updates)

    run.log_evaluation(*evaluate(learner, args))
    envs.close()
    visited = rb.rows[: len(rb), : obs.shape[1]].roll(-rb.added if rb.added > len(rb) else 0, 0)  # oldest first
    data_tools.plot_visited(args.env_id, visited.cpu().numpy(), run.dir / "visited.png", run.writer)
    if args.capture_video:
        evaluate(learner, args, run.dir / "evaluation.mp4")
    return run.finish(learner.num_updates)


# ----------------------------------------------------------------------------------------------------------------- main
@data_tools.errors_in_one_line()
def main(args: Args) -> dict:
    """Both phases; picture, results.json and a summary. Returns the results."""
    run = data_tools.Run(args, FILE_VERSION, MODEL_ARGS, RUN_ARGS)
    run.find_pretrained(PRETRAINED, PRETRAIN_ARGS)
    networks = pretrain(args, run)
    return train(args, run, networks)


if __name__ == "__main__":
    main(parse_args())
