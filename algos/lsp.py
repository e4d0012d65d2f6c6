"""LSP: Latent Skill Planning for Exploration and Transfer (Xie et al. 2021), https://arxiv.org/abs/2011.13897

Idea: Dreamer, whose policy follows a skill z: pi(a | s, h, z). Skills are made distinguishable by a mutual-information
term in imagination; which one comes next is planned by CEM in the same model. No offline data: skills are found online.

    python algos/lsp.py --env-id maze --cpu-preset    # RL and evaluation, with small sizes, for one core
    python algos/lsp.py --resume runs/FOLDER          # go on after Ctrl-C or a crash
    python algos/lsp.py --evaluate runs/FOLDER/checkpoint.pt --capture-video   # also draws where 16 skills lead

The model is that of dreamer.py, one env step at a time. Repeat:
   act: every K = 10 env steps plan a sequence of skills, keep the first; a ~ pi(s_t, h_t, z) plus noise
   model: explain observations and rewards, make KL(q || p) small, not below free_nats (Dreamer eq. 10)
   imagine: K steps with one z ~ N(0, I) per start; lambda-returns V of their rewards and values (Dreamer eq. 4-6)
   policy: maximise V + c b, b = log q(z | start, state) - log N(z; 0, I), whose mean bounds the mutual information
   predictor: q(z | start, state) -> z; critic: v(s, h) -> V (Dreamer eq. 8)

There is no public code. **Our choices** (why, scores: algos/docs/lsp.md): (i) c; (ii) q sees the first and
the present state of a skill; (iii) v does not see z: it is the value when other skills follow, which a plan's end
needs; (iv) plans of 5 skills; (v) skills are N(0, I), planned ones at most 3 before noise; (vi) in imagination one z
per start, held for one whole skill. Z = 3 and K = 10 are the paper's; sizes of CEM are recalled, not verified.
--random-skills is the paper's ablation: no plans.
Plans use the policy's mean action; the bound stays out of V; imagination is one skill long, K steps (Dreamer: 15).
DEVIATION n: 1 to 8 of dreamer.py, which its page explains.
Differs from skimo.py in: Args, TASK_DEFAULTS, CPU_PRESET, kl_divergence, skill_paths, Agent, rollout, train, evaluate,
    parse_args
Shapes: B batch, L rows per window, O observation, F inputs, e encoded, A action, Z skill, s and h the sizes of
these states, d = s + h, E environments, S starts, K steps per skill, N skills per plan, P plans.
"""

import functools
import gc
import io
import json
import math
import os
import pkgutil
import sys
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
import data_tools  # tasks and chores; nothing of a method


# ----------------------------------------------------------------------------------------------------------- arguments
@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin, your own or one of Gymnasium
    total_timesteps: int = 1_000_000  # env steps, warm-up included
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    cpu_preset: bool = False  # small sizes for one core; with --help: shows them
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4, draw where skills lead (PNG)

    # Seldom changed
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates and plans as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 100_000  # env steps between checkpoints, which hold all experience
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode

    # Model
    deter_dim: int = 200  # size of h
    stoch_dim: int = 30  # size of s
    encoder_dim: int = 256  # width of encoder and decoder, and size of an encoded observation
    hidden_dim: int = 400  # width of reward model, critic and actor
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 4)
    continue_head: bool = False  # learn where episodes end, and imagine it (DEVIATION 6)

    # Skills
    skill_dim: int = 3  # Z: numbers in a skill (0: none)
    skill_horizon: int = 10  # K: env steps per skill, in imagination as well
    mi_coef: float = 0.1  # c: weight of the mutual-information term, per nat
    predictor_lr: float = 6e-4  # of the predictor of skills

    # Planner
    random_skills: bool = False  # skills are drawn, not planned
    num_skills: int = 5  # N: skills per plan (choice iv)
    num_samples: int = 16  # P: sampled plans per iteration
    num_elites: int = 4  # best plans, which the next distribution is fitted to
    cem_iters: int = 4  # iterations

    # RL
    num_envs: int = 8  # environments side by side
    warmup_steps: int = 2_500  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.2  # gradient updates per env step after the warm-up
    batch_size: int = 50  # windows per update
    batch_length: int = 50  # L: rows of a window
    imagine_starts: int = 2_500  # S: states of an update's windows from which imagination starts, at most all
    learning_rate: float = 6e-4  # of the model
    actor_lr: float = 8e-5  # of the actor
    critic_lr: float = 8e-5  # of the critic: there is no slow copy, so it must not be fast
    max_grad_norm: float = 100.0  # bound of the gradient's norm, for each of the four
    free_nats: float = 3.0  # a mean KL below this is not reduced
    gamma: float = 0.99  # discount per env step
    td_lambda: float = 0.95  # share of longer returns in the lambda-return
    explore_std: float = 0.3  # std of the noise on actions
    reward_scale: float = 1.0  # factor on the task's reward

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, skill_dim=0, batch_length=2, skill_horizon=2)
        most = dict(gamma=1, td_lambda=1, num_elites=self.num_samples)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data: SkiMo's run lengths. CALVIN's rewards of 100 are found early, so c has to weigh more.
TASK_DEFAULTS = {"maze": dict(total_timesteps=2_000_000), "calvin": dict(total_timesteps=2_000_000, mi_coef=1.0)}
# That of dreamer.py, with plans of two skills, a larger c and a fast predictor. As there the actor must not be fast: at
# 1e-3 two of seven ended in the corners of the tanh, where all skills do the same.
CPU_PRESET = dict(deter_dim=128, stoch_dim=16, encoder_dim=128, hidden_dim=128, batch_size=16, batch_length=32,
                  imagine_starts=128, updates_per_step=0.05, learning_rate=1e-3, num_skills=2, mi_coef=1.0,
                  predictor_lr=3e-3)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ELU()]
        nn.init.orthogonal_(layers[-2].weight)
        nn.init.zeros_(layers[-2].bias)
    return nn.Sequential(*layers[:-1])


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


def sample_gaussian(distribution):
    """One reparameterised sample of N(mean, std); distribution is (mean, std), each (..., n)."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., n) -> (...) in nats."""
    (mean_p, std_p), (mean_q, std_q) = p, q
    square = std_p**2 + (mean_p - mean_q) ** 2
    return ((std_q / std_p).log() + square / (2 * std_q**2) - 0.5).sum(-1)


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


class SkillActor(nn.Module):
    """Policy pi(a | s, h, z): the tanh of a Gaussian, at first so wide that most actions are extreme."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        u, d = args.hidden_dim, args.stoch_dim + args.deter_dim  # u: width
        self.net = mlp(d + args.skill_dim, u, u, u, u, 2 * action_dim)
        self.raw_std = math.log(math.exp(5) - 1)  # softplus of this is 5

    def forward(self, feature, z):
        """Feature (..., d) and skill (..., Z) -> mean and std before the tanh, 2 x (..., A)."""
        mean, raw = self.net(torch.cat([feature, z], -1)).chunk(2, -1)
        std = nn.functional.softplus(raw + self.raw_std) + 1e-4
        return 5 * torch.tanh(mean / 5), std


class SkillPredictor(nn.Module):
    """q(z | f_0, f_t): which skill has led from the start to this state?"""

    def __init__(self, args: Args):
        super().__init__()
        u, d = args.hidden_dim, args.stoch_dim + args.deter_dim  # u: width
        self.net = mlp(2 * d, u, u, 2 * args.skill_dim)

    def forward(self, start, feature):
        """Features (S, d) of starts and (K, S, d) later -> mean and std of z, 2 x (K, S, Z)."""
        both = torch.cat([start.expand_as(feature), feature], -1)  # choice ii
        mean, log_std = self.net(both).chunk(2, -1)
        return mean, log_std.clamp(-5, 2).exp()


# -------------------------------------------------------------------------------------------------------------- losses
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


def imagine_skill(model, actor, h, s, z, steps: int):
    """What the model expects from h (S, h) and s (S, s) while z (S, Z) lasts.

    Returns features (K+1, S, d), the first of the start, and actions (K, S, A), time-first.
    Gradients reach the actor through all states, but not through what it looks at.
    """
    features = [torch.cat([s, h], -1)]  # (S, d)
    actions = []
    for _ in range(steps):
        action = torch.tanh(sample_gaussian(actor(features[-1].detach(), z)))  # (S, A)
        h = model.step(h, s, action)  # (S, h)
        s = sample_gaussian(model.prior(h))  # (S, s)
        features.append(torch.cat([s, h], -1))
        actions.append(action)
    return torch.stack(features), torch.stack(actions)


def skill_information(predictor, start, feature, z):
    """log q(z | f_0, f_t) - log N(z; 0, I) in nats: its mean is a lower bound on what states tell about the skill, that
    of LSP's objective: I(z; states | start) >= E log q + H(z). Numbers of LSP's equations could not be checked.

    start (S, d), feature (K, S, d), z (S, Z). Returns (K, S).
    """
    mean, std = predictor(start, feature)  # 2 x (K, S, Z)
    log_q = -0.5 * ((z - mean) / std).square() - std.log()
    log_p = -0.5 * z.square()
    return (log_q - log_p).sum(-1)  # the constants of both cancel


def skill_loss(model, actor, critic, predictor, h, s, args):
    """Policy: high returns in imagination (Dreamer eq. 3-7) by skills that can be told apart. All else is frozen.

    h (B, L, h), s (B, L, s). Returns the loss, metrics, for the critic as dreamer.py: features (K-1, S, d), their
    lambda-returns and weights (K-1, S), and for the predictor: starts (S, d), features (K, S, d), z (S, Z), detached.
    """
    if args.continue_head:  # the last state of a window may be an end, from which nothing starts
        h, s = h[:, :-1], s[:, :-1]
    h = h.flatten(0, 1)  # (B L, h)
    s = s.flatten(0, 1)  # (B L, s)
    if args.imagine_starts < len(h):  # DEVIATION 5
        chosen = torch.rand(len(h), device=h.device).topk(args.imagine_starts).indices  # (S,)
        h, s = h[chosen], s[chosen]  # (S, h), (S, s)
    z = torch.randn(len(h), args.skill_dim, device=h.device)  # (S, Z), one for the whole imagination (choice vi)
    features, actions = imagine_skill(model, actor, h, s, z, args.skill_horizon)  # (K+1, S, d), (K, S, A)
    start, feature = features[0], features[1:]  # (S, d), (K, S, d)
    rewards = model.reward(feature)  # (K, S)
    values = critic(feature).squeeze(-1)  # (K, S), choice iii
    discount = torch.full_like(rewards, args.gamma)
    if args.continue_head:
        discount = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
    returns = lambda_return(rewards[:-1], values, discount[:-1], args.td_lambda)  # (K-1, S)
    # State k comes k - 1 steps after the first imagined one: its return weighs gamma^(k - 1).
    weight = torch.cat([torch.ones_like(discount[:1]), discount[:-2]]).cumprod(0).detach()  # (K-1, S)

    # Mutual information: where a skill leads must say which one it was. It is kept out of V, which outlives the skill.
    information = skill_information(predictor, start, feature, z).mean()

    loss = -(weight * returns).mean() - args.mi_coef * information  # choice i
    extreme = (actions.abs() > 0.999).float()  # where the tanh has no gradient
    metrics = dict(actor_loss=loss, imagined_return=returns, imagined_reward=rewards, value=values)
    metrics |= dict(extreme_actions=extreme, skill_information=information)
    metrics = {name: value.detach().mean() for name, value in metrics.items()}
    for_critic = feature[:-1].detach(), returns.detach(), weight
    return loss, metrics, for_critic, (start.detach(), feature.detach(), z)


def predictor_loss(predictor, start, feature, z):
    """Predictor: recognise the skill, so that the bound is close (its gradient is that of -log q)."""
    return -skill_information(predictor, start, feature, z).mean()


def imagined_value_loss(critic, feature, returns, weight):
    """Critic: predict the lambda-returns (Dreamer eq. 8), so that what lies beyond imagination counts as well.

    feature (n, S, d) of n imagined steps, returns and weight (n, S).
    """
    error = (critic(feature).squeeze(-1) - returns).square()
    return (weight * (0.5 * error + 0.5 * math.log(2 * math.pi))).mean()


# ------------------------------------------------------------------------------------------------------------------ RL
@torch.no_grad()
def plan_skills(model, actor, critic, h, s, mean, noise_scale: float, args):
    """Cross-entropy method (CEM) over sequences of N skills in the model, without its noise, all environments at once.

    h (E, h), s (E, s); mean (E, N, Z): zeros or the last plan, moved on by one skill; noise_scale is 1 to explore,
    0 to evaluate. Returns the first skill (E, Z) and the fitted mean (E, N, Z).
    """
    E, N, Z = mean.shape
    P, K = args.num_samples, args.skill_horizon
    std = torch.ones_like(mean)
    h0 = h[:, None].expand(-1, P, -1)  # (E, P, h)
    s0 = s[:, None].expand(-1, P, -1)  # (E, P, s)
    for _ in range(args.cem_iters):
        noise = torch.randn(E, P, N, Z, device=h.device)
        plans = (mean[:, None] + std[:, None] * noise).clamp(-3, 3)  # (E, P, N, Z), choice v

        # Return of each plan: the rewards of N K steps. The last state's critic holds its reward and all that follows
        h, s = h0, s0
        value, discount = 0.0, 1.0
        for t in range(N * K):
            mode, _ = actor(torch.cat([s, h], -1), plans[:, :, t // K])  # (E, P, A)
            h = model.step(h, s, torch.tanh(mode))  # (E, P, h)
            s, _ = model.prior(h)  # (E, P, s)
            feature = torch.cat([s, h], -1)  # (E, P, d)
            if t == N * K - 1:
                break
            value = value + discount * model.reward(feature)  # (E, P)
            goes_on = args.gamma
            if args.continue_head:
                goes_on = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
            discount = discount * goes_on
        value = value + discount * critic(feature).squeeze(-1)  # (E, P)

        # Fit the next distribution to the best plans
        best = value.topk(args.num_elites, 1).indices  # (E, elites)
        elites = plans.gather(1, best[..., None, None].expand(-1, -1, N, Z))  # (E, elites, N, Z)
        mean = elites.mean(1)  # (E, N, Z)
        std = elites.std(1, correction=0)  # (E, N, Z)
    z = mean[:, 0]  # (E, Z)
    return z + noise_scale * 0.1 * torch.randn_like(z), mean  # std 0.1: recalled, as the sizes of CEM


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
    """Model, actor, critic and predictor of skills; how it acts, and one gradient step of each."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        u = args.hidden_dim  # width
        self.model = RSSM(obs_dim, action_dim, args)
        self.actor = SkillActor(action_dim, args)
        self.critic = mlp(args.stoch_dim + args.deter_dim, u, u, u, 1)
        self.predictor = SkillPredictor(args)
        self.memory_sizes = args.deter_dim, args.stoch_dim, action_dim, args.skill_dim
        self.memory_sizes += args.num_skills * args.skill_dim, 1
        self.to(args.device)
        options = dict(eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = torch.optim.Adam(self.model.parameters(), args.learning_rate, **options)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **options)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.critic_lr, **options)
        self.predictor_optimizer = torch.optim.Adam(self.predictor.parameters(), args.predictor_lr, **options)
        self.update = Recorded(self.update, args)
        self.planner = None  # the recorded plan

    def new_memory(self, num_envs: int) -> list:
        """What the agent knows of E episodes that begin, all zero: h (E, h), s (E, s), the last action (E, A), skill
        (E, Z) and plan (E, N * Z), and the env steps of the skill so far (E, 1).
        """
        return [torch.zeros(num_envs, size, device=self.args.device) for size in self.memory_sizes]

    @torch.no_grad()
    def act(self, obs, memory, explore: bool):
        """A noisy sample of the policy or its mode: obs (E, O) -> actions (E, A), both NumPy, and the next memory."""
        h, s, action, z, plan, age = memory
        embedding = self.model.encoder(torch.from_numpy(obs).to(self.args.device))  # (E, e)
        h = self.model.step(h, s, action)
        s = sample_gaussian(self.model.posterior(h, embedding))
        due = age == 0  # (E, 1): the last skill is over
        if due.any():
            new_z, new_plan = self.choose_skills(h, s, plan, explore)  # for all: shapes stay the same
            z = torch.where(due, new_z, z)  # (E, Z)
            plan = torch.where(due, new_plan, plan)  # (E, N * Z)
        age = (age + 1) % self.args.skill_horizon
        mean, std = self.actor(torch.cat([s, h], -1), z)
        action = torch.tanh(mean)
        if explore:
            action = torch.tanh(sample_gaussian((mean, std)))
            noise = self.args.explore_std * torch.randn_like(action)
            action = (action + noise).clamp(-1, 1)  # the model must see what is executed
        return action.cpu().numpy(), [h, s, action, z, plan, age]

    def choose_skills(self, h, s, plan, explore: bool):
        """Skills z (E, Z) and the plans (E, N * Z) that they begin, in h (E, h) and s (E, s) after the last plans."""
        args, Z = self.args, self.args.skill_dim
        if args.random_skills or Z == 0:
            return torch.randn(len(h), Z, device=h.device), plan
        moved = torch.cat([plan[:, Z:], torch.zeros_like(plan[:, :Z])], 1)  # a skill has passed
        nets = self.model, self.actor, self.critic
        planner = functools.partial(plan_skills, *nets, noise_scale=float(explore), args=args)
        if explore:  # an evaluation is too short to record
            self.planner = self.planner or Recorded(planner, args)
            planner = self.planner
        z, mean = planner(h, s, moved.unflatten(1, (args.num_skills, Z)))
        return z, mean.flatten(1)

    def update(self, obs, action, rewards, terminals) -> dict:
        """One step of the model on a batch of windows, then of all others in imagination; returns metrics."""
        args, model, actor, critic, predictor = self.args, self.model, self.actor, self.critic, self.predictor
        loss, metrics, h, s = rssm_loss(model, obs, action, rewards, terminals, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        self.model_optimizer.step()

        for frozen in (model, critic, predictor):  # their weights need no gradient of the actor's loss
            frozen.requires_grad_(False)
        loss, actor_metrics, for_critic, for_predictor = skill_loss(model, actor, critic, predictor, h, s, args)
        self.actor_optimizer.zero_grad()
        loss.backward()
        actor_norm = nn.utils.clip_grad_norm_(actor.parameters(), args.max_grad_norm)
        self.actor_optimizer.step()
        for frozen in (model, critic, predictor):
            frozen.requires_grad_(True)

        loss = imagined_value_loss(critic, *for_critic)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm)
        self.critic_optimizer.step()
        metrics |= dict(actor_metrics, critic_loss=loss.detach())

        loss = predictor_loss(predictor, *for_predictor)
        self.predictor_optimizer.zero_grad()
        loss.backward()
        predictor_norm = nn.utils.clip_grad_norm_(predictor.parameters(), args.max_grad_norm)
        self.predictor_optimizer.step()
        return dict(metrics, grad_norm=model_norm + actor_norm + critic_norm + predictor_norm)


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments: the policy's mode, random numbers of its own."""
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        memory = agent.new_memory(num_episodes)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            action, memory = agent.act(obs, memory, explore=False)
            obs, _, terminations, truncations, _ = envs.step(action)
            ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """A run, or the rest of it; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    if envs.max_episode_steps + 1 < args.batch_length:
        sys.exit("error: --batch-length: a window is longer than an episode")
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    memory = agent.new_memory(args.num_envs)
    rb = SequenceBuffer(obs.shape[1], action_dim, args.batch_length, args)  # DEVIATION 2
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, model=agent.model_optimizer)
    parts |= dict(actor=agent.actor_optimizer, critic=agent.critic_optimizer, predictor=agent.predictor_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts, args.device)
        memory = state["memory"]
        obs = envs.set_state(state["envs"])
        global_step, gradient_step, seconds, episodes, evaluations = state["progress"]
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
            # ALGO LOGIC: put action logic here. One action for all environments at once
            if global_step < args.warmup_steps:
                action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
            else:
                action, memory = agent.act(obs, memory, explore=True)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            rb.add(next_obs, action, args.reward_scale * rewards, terminations)
            ended = terminations | truncations
            new_steps = args.num_envs
            global_step += new_steps
            bar.update(new_steps)

            # TRY NOT TO MODIFY: record the episodes that ended
            for e in np.flatnonzero(ended):
                minutes = (time.time() - start_time) / 60
                row = (global_step, float(envs.returns[e]), int(envs.steps[e]), round(minutes, 3))
                episodes.append(row)
                print(*row, sep=",", file=episodes_csv)
                last_100 = [row[1] for row in episodes[-100:]]
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
                memory = [x * goes_on for x in memory]

            # ALGO LOGIC: training, after the warm-up; never more than ten times the updates of one step
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            updates_due = min(updates_due, gradient_step + math.ceil(10 * new_steps * args.updates_per_step))
            while rb.num_starts > 0 and gradient_step < updates_due:
                batch = rb.sample(args.batch_size)
                if gradient_step == 0:
                    agent.model.start_decoder(batch[0])  # DEVIATION 7
                metrics = agent.update(*batch)
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate with the policy's mode
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")
                too_short = sum(row[2] + 1 < args.batch_length for row in episodes)
                if too_short:
                    bar.write(f"no window (--batch-length) fits into {too_short} episodes: nothing is learnt from them")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                save(checkpoint, state | dict(memory=memory, progress=progress), parts)
    for part in (envs, episodes_csv, writer):
        part.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped; go on with: python {sys.argv[0]} --resume {run_dir}")
    last_100 = [row[1] for row in episodes[-100:]]
    minutes = (time.time() - start_time) / 60
    results = dict(env_steps=global_step, updates=gradient_step, rl_minutes=minutes)
    results["last_100_return"] = float(np.mean(last_100)) if last_100 else None
    results["last_100_success"] = task.success(last_100)
    results |= dict(evaluations=evaluations, args=asdict(args))
    save(run_dir / "results.json", results)
    print(f"finished: {run_dir}; curves: tensorboard --logdir {run_dir}")
    return results


# ------------------------------------------------------------------------------------------------------------ pictures
def skill_paths(agent: Agent, z, num_steps: int, args: Args, seed: int):
    """Observations (T+1, n, O) of n skills z (n, Z) from one start, at most num_steps; NaN after a member's end.

    A skill lasts K env steps; here it is chosen again and again, for ways that are long enough to be seen.
    """
    envs = data_tools.make_envs(args.env_id, len(z))
    z = torch.from_numpy(z).to(args.device)
    age = torch.ones(len(z), 1, device=args.device)  # no skill is over
    memory = agent.new_memory(len(z))
    ended = np.zeros(len(z), dtype=bool)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=[seed] * len(z))
        path = [obs]
        while len(path) <= num_steps and not ended.all():
            h, s, action, _, plan, _ = memory
            action, memory = agent.act(obs, [h, s, action, z, plan, age], explore=False)
            obs, _, terminations, truncations, _ = envs.step(action)
            path.append(np.where(ended[:, None], np.nan, obs))
            ended |= terminations | truncations
    envs.close()
    return np.stack(path)


def tool_position(obs, args: Args):
    """Where the point mass (..., 2) or the hand (..., 3) is, in metres; in other tasks the first three numbers."""
    task = data_tools.TASKS[args.env_id]
    if task.data != "kitchen":
        return obs[..., : 2 if task.draw_map else 3]
    # The Franka arm's geometry (Denavit-Hartenberg, Craig's form) takes its seven joints to the point between fingers.
    lengths = 0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088
    offsets = 0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0
    twists = 0, -1, 1, 1, -1, 1, 1  # quarter turns
    x, y, h = 0.0, 0.0, 0.21
    for i in reversed(range(7)):
        angle = obs[..., i] + (np.pi / 2 if i == 5 else 0.0)
        turned_x = np.cos(angle) * x - np.sin(angle) * y
        turned_y = np.sin(angle) * x + np.cos(angle) * y
        cos, sin = int(twists[i] == 0), twists[i]
        h = h + offsets[i]
        x, y, h = turned_x + lengths[i], cos * turned_y - sin * h, sin * turned_y + cos * h
    return np.stack([x, y, h], -1)


def draw_skills(agent: Agent, args: Args, num_steps: int, path: Path):
    """Where 16 skills lead from the start, a colour for each: those around a circle in their first two numbers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # only pictures need it

    task = data_tools.TASKS[args.env_id]
    angles = 2 * np.pi * np.arange(16) / 16
    z = np.zeros((16, args.skill_dim), dtype=np.float32)
    z[:, :2] = np.stack([np.cos(angles), np.sin(angles)], 1)[:, : args.skill_dim]
    position = tool_position(skill_paths(agent, z, num_steps, args, args.seed), args)  # (T+1, 16, 2 or 3)
    # From above; from above and from the front. The kitchen's x points away from the robot, others' y does
    views = [(1, 0)] if position.shape[-1] == 2 else [(0, 1), (int(task.data == "kitchen"), 2)]
    figure = Figure(figsize=(6 * len(views), 6))
    for ax, (across, up) in zip(figure.subplots(1, len(views), squeeze=False)[0], views):
        if task.draw_map:
            pkgutil.resolve_name(task.draw_map)(ax)
        for n, angle in enumerate(angles):
            ax.plot(position[:, n, across], position[:, n, up], color=colormaps["hsv"](angle / 2 / np.pi))
        ax.set(aspect="equal", xlabel="xyz"[across], ylabel="xyz"[up])
    figure.suptitle(f"{args.env_id}: {len(position) - 1} env steps of 16 skills, coloured by the angle of z")
    path = path.expanduser()  # ~ is the home folder
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    print(f"picture of the skills: {path}")


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
    """Print the scores of a trained agent with the policy's mode; needs no training."""
    agent = Agent(args, *data_tools.env_sizes(args.env_id))
    state = load(Path(args.evaluate), dict(agent=agent))
    video = Path(args.run_dir) / f"{args.env_id}__{FILE.stem}.mp4" if args.capture_video else None
    trained = [row[1] for row in state["progress"][3][-100:]] if "progress" in state else []  # published: no rows
    if trained:
        print(f"to expect: {np.mean(trained):.3g} in training, in its last {len(trained)} episodes")
    scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed, video)
    words = ", ".join(f"{name} {value:.3g}" for name, value in scores.items())
    print(f"{args.env_id}: {args.eval_episodes} episodes of {args.evaluate}: {words}")
    if video and args.skill_dim:
        draw_skills(agent, args, 10 * args.skill_horizon, video.with_suffix(".png"))


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, of --cpu-preset, or of the run or agent given."""
    given = data_tools.command_line(Args, argv)  # unchecked: the task's defaults are to come
    saved = {}
    if given.resume:
        given.resume, saved = data_tools.saved_run(given.resume)
    if given.evaluate:
        state = data_tools.read_state(given.evaluate, ["agent"])
        saved = state["args"] | dict(script=state["script"], threads=0)
        saved |= dict(device=Args.device, run_dir=Args.run_dir)
    if (script := saved.pop("script", FILE.name)) != FILE.name:
        sys.exit(f"error: this is a run of another file: give it to {script}")
    task = data_tools.TASKS[saved.get("env_id", given.env_id)]
    defaults = dict(env_id=given.env_id, **TASK_DEFAULTS.get(task.data, {}))
    if given.cpu_preset:
        defaults |= CPU_PRESET
    args = data_tools.command_line(Args, argv, Args(**defaults | saved), str(__doc__).split("\n")[0])
    args.resume = given.resume
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
