"""SPiRL: Accelerating RL with Learned Skill Priors (Pertsch, Lee & Lim, CoRL 2020), https://arxiv.org/abs/2010.11944

Idea: learn skills of H = 10 actions and a prior over them from task-agnostic data; then SAC chooses skills, held to the
prior by a KL instead of the entropy. Closed-loop skills as in the paper SkiLD: SkiMo's model-free baseline.

    python algos/spirl.py --env-id maze             # offline data, pre-training (both are kept), RL, evaluation
    python algos/spirl.py --resume runs/FOLDER      # go on after Ctrl-C or a crash

1. Pre-training: encode chunks of H actions as skills z ~ q (LSTM). Loss = behavioural cloning by the skill policy
   + KL(q || N(0,1)) - log p(z | s_0) of the prior p, z without gradient (eq. 1, 2)
2. Downstream RL on transitions (s, z, sum of H rewards, s'). The task policy pi starts as the prior p. Repeat:
   act: z = 2 tanh(x), x ~ pi(s), for H steps of the frozen skill policy pi_L
   tune alpha so that KL(pi(s) || p(s)) is target_kl
   critics: Q(s, z) -> r + gamma (min Q'(s', z') - alpha KL(pi(s') || p(s'))), Q' slow copies (algorithm 1)
   policy: maximise min Q(s, z) - alpha KL(pi(s) || p(s)) (algorithm 1)

DEVIATION n: differences from the authors' release. Why, and scores: algos/docs/spirl.md
1. KL divergences are exact, not averages of samples. As there, they are those of x, although z = 2 tanh(x) acts.
2. Pre-training: shorter, with a learning rate that decays; in the maze and on CALVIN a larger kl_coef.
3. Sines of positions as inputs, the maze scaled; in people's data arms shifted, objects recombined, larger kl_coef.
4. E environments act side by side, and the warm-up counts as env steps.
5. Kitchens: observations of 30 numbers, without the goal, which is constant. CALVIN: the release has no pre-training.
6. Actions are those that pi_L was trained for, not their tanh. 7. Skills are stored with the state they were chosen in,
not with the next one. 8. Evaluations take the mode of the policy, not samples. 9. Maze: target_kl 3, not 10; tau .05.
Kitchens: alpha begins at .05, after 500 skills of the prior, not at 1 after 5,000.
--published takes the release's side of 2, 3, 6 and 9, and of the E environments in 4.
Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, RELEASE, SkillModel, make_networks, pretrain_loss, pretrain,
ReplayBuffer, Agent, train
Shapes: B batch, H steps per skill, O observation, F inputs, A action, Z skill, E environments.
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
    eval_episodes: int = 20  # episodes of an evaluation, with the mode of the policy
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
    warmup_skills: int = 5_000  # skills before the updates start
    updates_per_skill: float = 1.0  # gradient updates per skill after the warm-up
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    critic_dim: int = 256  # width of the critics
    critic_blocks: int = 5  # hidden layers of the critics behind the first
    learning_rate: float = 3e-4  # of critics, policy and log alpha
    alpha: float = 1.0  # first weight of the prior KL
    target_kl: float = 5.0  # nats between task policy and prior, by which alpha is tuned
    gamma: float = 0.99  # discount per skill
    tau: float = 0.005  # share of the online weights in a target update
    reward_scale: float = 1.0  # factor on the task's reward

    def __post_init__(self):  # refuse what would train wrongly without a word; BatchNorm needs two windows
        least = dict(seed=0, threads=0, warmup_skills=0, alpha=1e-6, pretrain_batch_size=2, buffer_size=self.num_envs)
        most = dict(gamma=1, tau=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: the release's values where they differ from Args, and our own target_kl, tau, alpha and
# warm-up (DEVIATION 9); total_timesteps is the paper's. `people`: with people's data (--data other than scripted), 3.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000, batch_size=128, buffer_size=100_000, critic_blocks=2,
                 target_kl=3.0, tau=0.05),
    "kitchen": dict(kl_coef=5e-4, alpha=0.05, warmup_skills=500,
                    people=dict(kl_coef=1e-3, arm_noise=0.02, recombine=True)),
    "calvin": dict(total_timesteps=2_000_000),
}  # fmt: skip
# --published: the release's values of all tasks, and of each.
RELEASE = {
    "all": dict(position_features=False, squash_actions=True, pretrain_updates=480_000, pretrain_lr_decay=False,
                arm_noise=0.0, recombine=False, kl_coef=5e-4, num_envs=1),
    "maze": dict(pretrain_updates=530_000, kl_coef=1e-3, target_kl=10.0, tau=0.005),
    "kitchen": dict(alpha=1.0, warmup_skills=5_000),
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
class Critics(nn.Module):
    """Q_1 and Q_2 of observations (..., O) and skills (..., Z) -> 2 x (...)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        self.features = Features(obs_dim, args)
        sizes = self.features.size + args.skill_dim, args.critic_dim, args.critic_blocks, 1
        self.qf1 = Predictor(*sizes, batch_norm=False)
        self.qf2 = Predictor(*sizes, batch_norm=False)

    def forward(self, obs, z):
        inputs = torch.cat([self.features(obs), z], -1)
        return self.qf1(inputs).squeeze(-1), self.qf2(inputs).squeeze(-1)


def critic_loss(critics, target, task_policy, skill_prior, obs, z, rewards, dones, next_obs, alpha, args):
    """TD loss of both critics, the prior KL in place of SAC's entropy (SPiRL algorithm 1): a skill is worth its reward
    and the value of the state where it ends.

    obs, next_obs (B, O), z (B, Z), rewards and dones (B,), alpha (). Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        pi = task_policy(next_obs)  # 2 x (B, Z)
        prior_kl = kl_divergence(pi, skill_prior(next_obs)).clamp(max=100)  # (B,)
        next_q = torch.min(*target(next_obs, squash(draw(pi))))  # (B,)
        next_value = next_q - alpha * prior_kl  # (B,)
        td_target = rewards + (1 - dones) * args.gamma * next_value  # (B,)
    q1, q2 = critics(obs, z)  # 2 x (B,)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * error.mean()
    metrics = dict(value_loss=loss, q_value=q1, td_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def policy_terms(critics, task_policy, skill_prior, obs):
    """KL(pi || p) in nats and Q of the task policy, whose loss is alpha KL - Q (SPiRL algorithm 1): means, 2 x ().

    obs (B, O). Alpha comes later, because it is tuned by this KL first.
    """
    pi = task_policy(obs)  # 2 x (B, Z)

    # Maximise Q: choose the skills that the critics like best.
    q_value = torch.min(*critics(obs, squash(draw(pi))))  # (B,)

    # Stay close to the prior: the task is solved by skills that the data show.
    with torch.no_grad():
        prior = skill_prior(obs)  # 2 x (B, Z)
    prior_kl = kl_divergence(pi, prior).clamp(max=100)  # (B,); beyond no pull back, as in the release
    return prior_kl.mean(), q_value.mean()


class ReplayBuffer:
    """The last buffer_size transitions over one skill, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, args: Args):
        self.args = args
        sizes = (obs_dim,), (args.skill_dim,), (), (), (obs_dim,)  # obs, z, rewards, dones, next_obs
        self.columns = [torch.zeros(args.buffer_size, *size, device=args.device) for size in sizes]
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, self.args.buffer_size)

    def add(self, obs, z, rewards, dones, next_obs):
        """One skill of every environment: obs, next_obs (E, O), z (E, Z), rewards, dones (E,).

        A time-out is stored as a true end, as in the release. DEVIATION 7: obs is where the skill was chosen.
        """
        rows = torch.arange(self.added, self.added + len(obs), device=self.args.device) % self.args.buffer_size
        for column, values in zip(self.columns, (obs, z, rewards, dones, next_obs)):
            column[rows] = torch.as_tensor(values).float().to(self.args.device)
        self.added += len(obs)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), z (B, Z), rewards and dones (B,), next_obs (B, O)."""
        rows = torch.randint(len(self), (batch_size,), device=self.args.device)
        return [column[rows] for column in self.columns]

    def state_dict(self) -> dict:
        return dict(columns=[column[: len(self)].clone() for column in self.columns], added=self.added)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for column, filled in zip(self.columns, state["columns"]):
            column[: len(filled)] = filled


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
        self.task_policy = copy.deepcopy(self.skill_prior)
        obs_dim = len(self.skill_prior.features.scale)  # DEVIATION 5: in the kitchens without the goal
        self.critics = Critics(obs_dim, args).to(args.device)
        self.target = copy.deepcopy(self.critics)
        self.eval()  # BatchNorm keeps the statistics of pre-training, as the policy starts from them
        for frozen in (self.skills, self.skill_prior, self.target):
            frozen.requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(args.alpha, device=args.device).log())
        options = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.task_policy.parameters(), **options)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], **options)
        self.update = Recorded(self.update, args)

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z) on the CPU: samples of the task policy, in the evaluations of RL its mode."""
        pi = self.task_policy(torch.from_numpy(obs).to(self.args.device))  # 2 x (E, Z)
        x = draw(pi) if explore else pi[0]  # DEVIATION 8
        return squash(x).cpu()

    def update(self, obs, z, rewards, dones, next_obs) -> dict:
        """One step of alpha, critics, task policy and the slow copies on a batch of transitions; returns metrics.

        As in the release, both losses take the new alpha, but policy and critics of before the step.
        """
        args, critics = self.args, self.critics
        policies = self.task_policy, self.skill_prior
        critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        prior_kl, q_value = policy_terms(critics, *policies, obs)

        # Alpha rises while the KL exceeds its target
        self.alpha_optimizer.zero_grad()
        (-self.log_alpha.exp() * (prior_kl.detach() - args.target_kl)).backward()
        self.alpha_optimizer.step()
        alpha = self.log_alpha.exp().detach()

        policy_loss = alpha * prior_kl - q_value
        self.policy_optimizer.zero_grad()
        policy_loss.backward()
        policy_norm = nn.utils.get_total_norm([weight.grad for weight in self.task_policy.parameters()])
        critics.requires_grad_(True)

        transitions = obs, z, rewards, dones, next_obs
        loss, metrics = critic_loss(critics, self.target, *policies, *transitions, alpha, args)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = nn.utils.get_total_norm([weight.grad for weight in critics.parameters()])
        self.critic_optimizer.step()
        self.policy_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(critics.parameters()), args.tau)
        metrics |= dict(policy_loss=policy_loss.detach(), policy_q=q_value.detach(), prior_kl=prior_kl.detach())
        return dict(metrics, alpha=alpha, grad_norm=critic_norm + policy_norm)


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
    """Both phases of a run, or the rest of them; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    rate = args.updates_per_skill / args.skill_horizon
    data_tools.check_settings(args, args.warmup_skills * args.skill_horizon, rate)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if not (args.pretrained or checkpoint.exists()):  # before there is a folder: data may be refused
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
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
    parts = dict(agent=agent, rb=rb, critics=agent.critic_optimizer)
    parts |= dict(policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
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
            # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 4)
            z = agent.choose_skills(obs, global_step, explore=True)  # (E, Z)
            steps_before = envs.steps.sum()
            next_obs, rewards, ended = execute_skill(envs, agent.skills, obs, z, args)
            rb.add(obs, z, args.reward_scale * rewards, ended, next_obs)
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

            # ALGO LOGIC: training. updates_per_skill for each skill after the warm-up
            updates_due = int((rb.added - args.warmup_skills) * args.updates_per_skill)
            while gradient_step < updates_due:
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without exploration noise
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
