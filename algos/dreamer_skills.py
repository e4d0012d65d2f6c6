"""SPiRL + Dreamer: SkiMo's baseline (https://arxiv.org/abs/2207.07560) that imagines skills in a model from scratch

Idea: skills and prior of spirl.py, frozen; Dreamer (https://arxiv.org/abs/1912.01603) chooses skills instead of
actions, its policy held to the prior by a KL. Nobody plans: the policy learns by gradients through imagined skills.

    python algos/dreamer_skills.py --env-id kitchen     # pre-training as spirl.py (shared), RL, evaluation
    python algos/dreamer_skills.py --resume runs/FOLDER # go on after Ctrl-C or a crash

The model keeps h_t (deterministic) and s_t (random) as in dreamer.py, but a step is a whole skill: u_t in (-1, 1),
executed as z = 2 u for H steps of the skill policy; its reward is the sum of theirs. Repeat:
   act: u ~ pi(s_t, h_t) plus noise; model: explain observations and rewards at the ends of skills (Dreamer eq. 10)
   imagine: J skills from states of the batch (eq. 3); lambda-returns V of their rewards and values (eq. 4-6)
   actor: maximise V through the model (eq. 7) - alpha KL(2 u || p(z | o)); critic: v(s, h) -> V (eq. 8)

DEVIATION n: differences from the authors' release. Why, and scores: algos/docs/dreamer_skills.md
1. KL divergences without bound (release: 100) or sampling (100 draws): exact, or quadrature for the policy's tanh, with
   its whole slope (release: not that of 2 u, and atanh is cut at 8.7: 4 nats more at the start).
2. Pre-training: shorter, with a learning rate that decays; in the maze and on CALVIN a larger kl_coef.
3. Sines of positions as inputs, the maze scaled; in people's data arms shifted, objects recombined, larger kl_coef.
4. The model's encoder sees them, too; raw observations are reconstructed. Kitchens: 30 observations, without the goal.
5. imagine_starts, by default all states, as there.
6. Actions are those that pi_L was trained for, not their tanh. --continue-head, a model of the end, is off, as there.
7. E environments act side by side; windows are any L rows of an episode, unfinished ones too, each drawn as often.
8. Maze: a longer warm-up, with skills of the prior as in all tasks. The model learns from u, as it imagines, not 2 u.
9. The decoder begins at the mean of what was seen. 10. reward_scale is applied.
--published takes the release's side of 2, 3, the actions in 6, the E environments in 7 and the warm-up's length in 8.
Differs from skimo.py in: Args, PRETRAINED, TASK_DEFAULTS, RELEASE, SkillModel, make_networks, pretrain_loss,
pretrain, Inputs, sample_gaussian, Agent, train, evaluate
Shapes: B batch, L rows per window, O observation, F inputs, e encoded, A action, Z skill, s and h their sizes,
d = s + h, E environments, S starts, J imagined skills. Actions (..., A) of dreamer.py's parts are here skills (..., Z).
"""

import copy
import gc
import hashlib
import io
import json
import math
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
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
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
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
    warmup_steps: int = 5_000  # env steps with the prior's skills before updates
    updates_per_step: float = 0.02  # gradient updates per env step after the warm-up: one for five skills
    batch_size: int = 50  # windows per update
    batch_length: int = 15  # L: rows of a window, one per skill
    imagine_starts: int = 750  # S: states of an update's windows from which imagination starts, at most all
    imagine_steps: int = 5  # J: imagined skills
    learning_rate: float = 6e-4  # of the model
    actor_lr: float = 8e-5  # of the actor
    critic_lr: float = 8e-5  # of the critic: there is no slow copy, so it must not be fast
    max_grad_norm: float = 100.0  # bound of the gradient's norm, for each of the three
    free_nats: float = 3.0  # a mean KL below this is not reduced
    alpha: float = 0.01  # weight of the KL to the prior, per nat
    gamma: float = 0.99  # discount per skill
    td_lambda: float = 0.95  # share of longer returns in the lambda-return
    explore_std: float = 0.3  # std of the noise on skills
    reward_scale: float = 1.0  # factor on the task's reward

    # World model and actor
    deter_dim: int = 100  # size of h
    stoch_dim: int = 15  # size of s
    encoder_dim: int = 256  # width of encoder and decoder, and size of an encoded observation
    model_dim: int = 128  # width of reward model, critic and actor
    continue_head: bool = False  # learn where episodes end, and imagine it

    def __post_init__(self):  # refuse what would train wrongly without a word; BatchNorm needs two windows
        least = dict(seed=0, threads=0, warmup_steps=0, pretrain_batch_size=2, batch_length=2, imagine_steps=2)
        most = dict(gamma=1, td_lambda=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: the release's values where they differ from Args, and our own warm-up (DEVIATION 8);
# total_timesteps is the paper's. `people`: with people's data (--data other than scripted), DEVIATION 3.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000, warmup_steps=50_000, deter_dim=200, stoch_dim=30, model_dim=400),
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


class Inputs(Features):
    """What the model sees: as in dreamer.py observations are scaled without position_features, too (DEVIATION 4)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__(obs_dim, args)
        task = data_tools.TASKS[args.env_id]
        self.scale = torch.tensor(task.obs_scale or [1.0] * obs_dim)  # (O,)
        self.shift = torch.tensor(task.obs_shift or [0.0] * obs_dim)  # (O,)


sample_gaussian = draw  # its name in dreamer.py, whose parts these are


class RSSM(nn.Module):
    """Recurrent state-space model: what happens next, and what is seen and rewarded there.

    Its state is s (..., s), random, and h (..., h), which remembers; networks see both as a feature (..., d).
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        deter, stoch, embed = args.deter_dim, args.stoch_dim, args.encoder_dim  # h, s, e
        u, d = args.hidden_dim, stoch + deter  # u: width
        self.deter_dim, self.stoch_dim = deter, stoch
        inputs = Inputs(obs_dim, args)  # DEVIATION 4
        self.encoder = nn.Sequential(inputs, *mlp(inputs.size, embed, embed, embed))
        self.cell_input = mlp(stoch + action_dim, deter)
        self.gates_x = nn.Linear(deter, 3 * deter)
        self.gates_h = nn.Linear(deter, 3 * deter)
        self.prior_net = mlp(deter, deter, 2 * stoch)
        self.posterior_net = mlp(deter + embed, deter, 2 * stoch)
        self.decoder = mlp(d, embed, embed, 2 * obs_dim)
        self.reward_model = mlp(d, u, u, 1)
        self.continue_model = mlp(d, u, u, u, 1) if args.continue_head else None

    def step(self, h, s, action):
        """The next h, by a GRU cell: h (..., h), s (..., s), action (..., A) -> (..., h)."""
        x = nn.functional.elu(self.cell_input(torch.cat([s, action], -1)))
        x_reset, x_update, x_new = self.gates_x(x).chunk(3, -1)
        h_reset, h_update, h_new = self.gates_h(h).chunk(3, -1)
        reset = torch.sigmoid(x_reset + h_reset)
        update = torch.sigmoid(x_update + h_update)
        new = torch.tanh(x_new + reset * h_new)
        return (1 - update) * new + update * h

    def prior(self, h):
        """p(s | h), mean and std, 2 x (..., s): what is expected before the observation is seen."""
        mean, raw = self.prior_net(h).chunk(2, -1)
        return mean, nn.functional.softplus(raw) + 0.1  # as Dreamer's

    def posterior(self, h, embedding):
        """q(s | h, o), mean and std, 2 x (..., s): after the observation, encoded (..., e), is seen."""
        mean, raw = self.posterior_net(torch.cat([h, embedding], -1)).chunk(2, -1)
        return mean, nn.functional.softplus(raw) + 0.1

    def observe(self, obs, action):
        """States of windows: obs (B, L, O), action (B, L, A), the one before each observation.

        Returns h (B, L, h), s (B, L, s) and the posterior that s is drawn from, 2 x (B, L, s).
        """
        embedding = self.encoder(obs)  # (B, L, e)
        h = obs.new_zeros(len(obs), self.deter_dim)  # (B, h)
        s = obs.new_zeros(len(obs), self.stoch_dim)  # (B, s)
        steps = []
        for t in range(obs.shape[1]):
            h = self.step(h, s, action[:, t])  # (B, h)
            distribution = self.posterior(h, embedding[:, t])  # 2 x (B, s)
            s = sample_gaussian(distribution)  # (B, s)
            steps.append((h, s, *distribution))
        h, s, mean, std = [torch.stack(values, 1) for values in zip(*steps)]
        return h, s, (mean, std)

    @torch.no_grad()
    def start_decoder(self, obs):
        """Before learning: whatever the state, expect the mean of what was seen, obs (B, L, O).

        From 0 a decoder needs hundreds of updates until it predicts positions of 10 or 24 cells. Meanwhile states hold
        nothing else, and what is imagined does not depend on actions.
        """
        self.decoder[-1].bias[: obs.shape[-1]] = obs.mean((0, 1))

    def decode(self, feature):
        """Mean and std, in [0.1, 1.5], of the raw observation: (..., d) -> 2 x (..., O)."""
        mean, raw_std = self.decoder(feature).chunk(2, -1)
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)  # SkiMo's library; Dreamer: std 1

    def reward(self, feature):
        """The reward for coming here: (..., d) -> (...)."""
        return self.reward_model(feature).squeeze(-1)


class ActionModel(nn.Module):
    """Policy pi(a | s, h): the tanh of a Gaussian, at first so wide that most actions are extreme."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        u, d = args.hidden_dim, args.stoch_dim + args.deter_dim  # u: width
        self.net = mlp(d, u, u, u, u, 2 * action_dim)
        self.raw_std = math.log(math.exp(5) - 1)  # softplus of this is 5

    def forward(self, feature):
        """Feature (..., d) -> mean and std before the tanh, 2 x (..., A)."""
        mean, raw = self.net(feature).chunk(2, -1)
        std = nn.functional.softplus(raw + self.raw_std) + 1e-4
        return 5 * torch.tanh(mean / 5), std


# E f(x) for x ~ N(0, 1) is nearly the sum of weight * f(node). The policy's std begins at 5: its tanh is nearly a step,
# which the nodes of Gauss and Hermite miss. With 65 at equal distances the KL and its gradient are right to .1 %.
NODES = np.linspace(-4, 4, 65)
QUADRATURE = [(float(x), float(w)) for x, w in zip(NODES, np.exp(-0.5 * NODES**2) / np.exp(-0.5 * NODES**2).sum())]


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


def rssm_loss(model, obs, action, rewards, terminals, args):
    """The model explains what was seen (Dreamer eq. 10), on windows of the replay buffer.

    obs (B, L, O); action (B, L, A), rewards and terminals (B, L) are those that led to the observation beside them.
    Returns the loss, metrics, and the states h (B, L, h) and s (B, L, s), detached.
    """
    h, s, posterior = model.observe(obs, action)
    feature = torch.cat([s, h], -1)  # (B, L, d)

    # KL: what the observation adds must be little, so that the model can go on without it. Both sides move. A mean
    # below free_nats is not reduced: else the model would put nothing into s.
    kl = kl_divergence(posterior, model.prior(h)).mean()
    kl_loss = kl.clamp(min=args.free_nats)

    # Observation: states must hold what is seen.
    mean, std = model.decode(feature)
    likelihood = torch.distributions.Normal(mean, std, validate_args=False)
    recon_loss = -likelihood.log_prob(obs).sum(-1).mean()  # DEVIATION 4

    # Reward: what imagination is for. A Gaussian of std 1.
    reward_error = (model.reward(feature) - rewards).square()
    reward_loss = (0.5 * reward_error + 0.5 * math.log(2 * math.pi)).mean()

    loss = kl_loss + recon_loss + reward_loss
    metrics = dict(kl=kl, recon_loss=recon_loss, reward_loss=reward_loss)
    if args.continue_head:  # DEVIATION 6. A time-out is no end
        logits = model.continue_model(feature).squeeze(-1)  # (B, L)
        goes_on = args.gamma * (1 - terminals)
        continue_loss = nn.functional.binary_cross_entropy_with_logits(logits, goes_on)
        loss = loss + 10 * continue_loss
        metrics["continue_loss"] = continue_loss
    metrics["model_loss"] = loss
    return loss, {name: value.detach() for name, value in metrics.items()}, h.detach(), s.detach()


def lambda_return(rewards, values, discount, share: float):
    """V_k = r_k + discount_k ((1 - share) v_{k+1} + share V_{k+1}), with V_{n+1} = v_{n+1} (Dreamer eq. 6).

    rewards and discount (n, ...), values (n+1, ...); time-first. Returns (n, ...). share is the paper's lambda.
    """
    result = values[-1]
    results = []
    for k in reversed(range(len(rewards))):
        result = (1 - share) * values[k + 1] + share * result
        result = rewards[k] + discount[k] * result
        results.append(result)
    return torch.stack(results[::-1])


def imagine(model, actor, h, s, steps: int):
    """What the model expects when the actor acts from h (S, h) and s (S, s).

    Returns features (J, S, d) and actions (J, S, A), time-first. The start is not among them. Gradients reach the
    actor through all states, but not through what it looks at.
    """
    features, actions = [], []
    for _ in range(steps):
        feature = torch.cat([s, h], -1).detach()  # (S, d)
        action = torch.tanh(sample_gaussian(actor(feature)))  # (S, A)
        h = model.step(h, s, action)  # (S, h)
        s = sample_gaussian(model.prior(h))  # (S, s)
        features.append(torch.cat([s, h], -1))
        actions.append(action)
    return torch.stack(features), torch.stack(actions)


def behaviour_loss(model, actor, critic, h, s, args):
    """Actor: choose what leads to the highest return in imagination (Dreamer eq. 3-7). model and critic are frozen.

    h (B, L, h), s (B, L, s). Returns the loss, metrics, and for the critic: features (J-1, S, d), their lambda-returns
    and weights (J-1, S), detached.
    """
    if args.continue_head:  # the last state of a window may be an end, from which nothing starts
        h, s = h[:, :-1], s[:, :-1]
    h = h.flatten(0, 1)  # (B L, h)
    s = s.flatten(0, 1)  # (B L, s)
    if args.imagine_starts < len(h):  # DEVIATION 5
        chosen = torch.rand(len(h), device=h.device).topk(args.imagine_starts).indices  # (S,)
        h, s = h[chosen], s[chosen]  # (S, h), (S, s)
    feature, actions = imagine(model, actor, h, s, args.imagine_steps)  # (J, S, d), (J, S, A)
    rewards = model.reward(feature)  # (J, S)
    values = critic(feature).squeeze(-1)  # (J, S)
    discount = torch.full_like(rewards, args.gamma)
    if args.continue_head:
        discount = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
    returns = lambda_return(rewards[:-1], values, discount[:-1], args.td_lambda)  # (J-1, S)
    # State k comes k - 1 steps after the first imagined one: its return weighs gamma^(k - 1).
    weight = torch.cat([torch.ones_like(discount[:1]), discount[:-2]]).cumprod(0).detach()  # (J-1, S)
    loss = -(weight * returns).mean()
    metrics = dict(actor_loss=loss, imagined_return=returns, imagined_reward=rewards, value=values)
    metrics["extreme_actions"] = (actions.abs() > 0.999).float()  # where the tanh has no gradient
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    return loss, metrics, feature[:-1].detach(), returns.detach(), weight


def actor_loss(model, actor, critic, skill_prior, h, s, obs, args):
    """Actor: high returns in imagination, by skills that the data show. model, critic and skill_prior are frozen.

    h (B, L, h), s (B, L, s), obs (B, L, O). Returns what behaviour_loss returns, with the KL in loss and metrics.
    """
    loss, metrics, *imagined = behaviour_loss(model, actor, critic, h, s, args)

    # Stay close to the prior in the states of the batch, for imagination cannot tell what p says: it has no raw o.
    pi = actor(torch.cat([s, h], -1))  # 2 x (B, L, Z)
    prior_kl = squashed_kl(pi, skill_prior(obs)).mean()  # of the executed 2 u
    loss = loss + args.alpha * prior_kl
    metrics |= dict(actor_loss=loss.detach(), prior_kl=prior_kl.detach())
    return loss, metrics, *imagined


def imagined_value_loss(critic, feature, returns, weight):
    """Critic: predict the lambda-returns (Dreamer eq. 8), so that what lies beyond imagination counts as well.

    feature (n, S, d) of n imagined steps, returns and weight (n, S).
    """
    error = (critic(feature).squeeze(-1) - returns).square()
    return (weight * (0.5 * error + 0.5 * math.log(2 * math.pi))).mean()


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
    """Model, actor and critic of RL, the frozen prior and skills, and one gradient step of each that learns."""

    def __init__(self, args: Args, networks: nn.ModuleDict):
        super().__init__()
        self.args = args
        u, Z = args.model_dim, args.skill_dim  # u: width
        self.skills = networks["skills"].cpu()  # acts next to the simulator
        self.skill_prior = networks["prior"]
        obs_dim = len(self.skill_prior.features.scale)
        widths = replace(args, hidden_dim=u)  # dreamer.py's parts have no other
        self.model = RSSM(obs_dim, Z, widths).to(args.device)
        self.actor = ActionModel(Z, widths).to(args.device)
        self.critic = mlp(args.stoch_dim + args.deter_dim, u, u, u, 1).to(args.device)
        self.eval()  # BatchNorm keeps the statistics of pre-training
        networks.requires_grad_(False)
        options = dict(eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), args.learning_rate, **options)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **options)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **options)
        self.update = Recorded(self.update, args)

    def update(self, obs, u, rewards, terminals) -> dict:
        """One step of the model on a batch of windows, then of actor and critic in imagination; returns metrics."""
        args, model, actor, critic = self.args, self.model, self.actor, self.critic
        loss, metrics, h, s = rssm_loss(model, obs, u, rewards, terminals, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        model.requires_grad_(False)  # their weights need no gradient of the actor's loss
        critic.requires_grad_(False)
        imagined = actor_loss(model, actor, critic, self.skill_prior, h, s, obs, args)
        loss, actor_metrics, feature, returns, weight = imagined
        self.actor_optimizer.zero_grad()
        loss.backward()
        actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        self.actor_optimizer.step()
        model.requires_grad_(True)
        critic.requires_grad_(True)

        loss = imagined_value_loss(critic, feature, returns, weight)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
        self.critic_optimizer.step()
        metrics |= dict(actor_metrics, critic_loss=loss.detach())
        return dict(metrics, grad_norm=model_norm + actor_norm + critic_norm)


class Filter:
    """Chooses skills in E environments at once. Keeps the states h, s of their episodes, which begin with zeros."""

    def __init__(self, agent: Agent, num_envs: int):
        self.agent, self.args, self.skills = agent, agent.args, agent.skills
        sizes = self.args.deter_dim, self.args.stoch_dim, self.args.skill_dim
        self.memory = [torch.zeros(num_envs, size, device=self.args.device) for size in sizes]  # h, s, the last u

    @torch.no_grad()
    def choose_skills(self, obs, global_step: int | None, explore: bool):
        """obs (E, O), NumPy -> z (E, Z) on the CPU: noisy samples of the policy or its mode, or without global_step
        samples of the prior.
        """
        agent = self.agent
        obs = torch.from_numpy(obs).to(self.args.device)
        if global_step is None:  # the warm-up
            return draw(agent.skill_prior(obs)).cpu()  # DEVIATION 8
        h, s, u = self.memory
        h = agent.model.step(h, s, u)
        s = sample_gaussian(agent.model.posterior(h, agent.model.encoder(obs)))
        mean, std = agent.actor(torch.cat([s, h], -1))
        u = torch.tanh(mean)
        if explore:
            u = torch.tanh(sample_gaussian((mean, std)))
            noise = self.args.explore_std * torch.randn_like(u)
            u = (u + noise).clamp(-1, 1)  # the model must see what is executed
        self.memory = [h, s, u]
        return 2 * u.cpu()


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
    if math.ceil(envs.max_episode_steps / args.skill_horizon) + 1 < args.batch_length:
        sys.exit("error: --batch-length: a window is longer than an episode")
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    checkpoint = run_dir / "checkpoint.pt"
    data = None
    if not (args.pretrained or checkpoint.exists()):  # before there is a folder: data may be refused
        data = data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
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
    acting = Filter(agent, args.num_envs)
    rb = SequenceBuffer(obs.shape[1], args.skill_dim, args.batch_length, args)  # DEVIATION 7
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, model=agent.model_optimizer)
    parts |= dict(actor=agent.actor_optimizer, critic=agent.critic_optimizer)
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        acting.memory = state["memory"]
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
            # ALGO LOGIC: put action logic here. One skill for all environments at once, then H env steps (DEVIATION 7)
            warming_up = global_step < args.warmup_steps
            z = acting.choose_skills(obs, None if warming_up else global_step, explore=True)  # (E, Z)
            steps_before = envs.steps.sum()
            next_obs, rewards, ended = execute_skill(envs, agent.skills, obs, z, args)
            rb.add(next_obs, z / 2, args.reward_scale * rewards, envs.terminations)  # DEVIATIONs 8 and 10
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
                rb.begin(obs, ended)
                goes_on = torch.from_numpy(~ended)[:, None].to(args.device)
                acting.memory = [x * goes_on for x in acting.memory]

            # ALGO LOGIC: training, after the warm-up; never more than ten times the updates of one step
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            updates_due = min(updates_due, gradient_step + math.ceil(10 * new_steps * args.updates_per_step))
            while rb.num_starts > 0 and gradient_step < updates_due:
                batch = rb.sample(args.batch_size)
                if gradient_step == 0:
                    agent.model.start_decoder(batch[0])  # DEVIATION 9
                metrics = agent.update(*batch)
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without exploration noise
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                policy = Filter(agent, args.eval_episodes)
                scores = rollout(policy, args, args.eval_episodes, 10_000 + args.seed, global_step)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")
                too_short = sum(row[2] <= args.skill_horizon * (args.batch_length - 2) for row in episodes)
                if too_short:
                    bar.write(f"no window (--batch-length) fits into {too_short} episodes: nothing is learnt from them")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations, facts
                save(checkpoint, state | dict(memory=acting.memory, progress=progress), parts)
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
    policy = Filter(agent, args.eval_episodes)
    scores = rollout(policy, args, args.eval_episodes, 10_000 + args.seed, state["global_step"], video)
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
