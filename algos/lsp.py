"""LSP: Latent Skill Planning for Exploration and Transfer (Xie, Bharadhwaj et al. 2021), https://arxiv.org/abs/2011.13897

Idea: Dreamer, whose policy follows a skill z: pi(a | s, h, z). Skills are made distinguishable by a mutual-information
term in imagination; which one comes next is planned by CEM in the same model. No offline data: skills are found online.

    python algos/lsp.py --env-id maze              # RL and evaluation, with the sizes of SkiMo's Dreamer
    python algos/lsp.py --env-id maze --cpu-preset # small, for one core
    python algos/lsp.py --resume runs/FOLDER       # go on after Ctrl-C or a crash
    python algos/lsp.py --evaluate runs/FOLDER/checkpoint.pt --capture-video   # also draws where 16 skills lead

The model is that of dreamer.py, one env step at a time. Repeat:
   act: every K = 10 env steps plan a sequence of skills, keep the first; a ~ pi(s_t, h_t, z) plus noise
   model: explain observations and rewards, make KL(q || p) small, not below free_nats (Dreamer eq. 10)
   imagine: K steps with one z ~ N(0, I) per start; lambda-returns V of their rewards and values (Dreamer eq. 4-6)
   policy: maximise V + c I, I = log q(z | start, state) - log N(z; 0, I), a lower bound on the mutual information
   predictor: q(z | start, state) -> z; critic: v(s, h) -> V (Dreamer eq. 8)

There is no public code; SkiMo's authors had it privately. Six things are known from nowhere and are **our choices**:
(i) c = .1; 1 on CALVIN, where rewards of 100 are found early, and with --cpu-preset; (ii) q sees the first and the
present state of a skill; (iii) v does not see z: it is the value when other skills follow, which a plan's end needs;
(iv) plans of 5 skills; (v) skills are N(0, I), planned ones at most 3 before noise; (vi) in imagination one z per
start, held for one whole skill.
Known from notes on the paper: 3 numbers per skill, held for 10 env steps. Recalled, not verified: CEM of 4 iterations
with 16 plans and 4 elites.

Marked DEVIATION n below, as in dreamer.py: 2. all windows are drawn as often, those of unfinished episodes too; 4. the
encoder sees scaled observations with sines and cosines of positions, raw ones are reconstructed; 5. imagine_starts:
imagination may begin in a random share of the states; 6. --continue-head is a model of the end, off by default:
imagination never ends; 7. the decoder begins at the mean of what was seen.
E environments act side by side.
--skill-dim 0 --random-skills --skill-horizon 15 learns and acts as dreamer.py does with the same rates (a test; bit for
bit, where both draw the same random numbers); --random-skills alone is the paper's ablation: no plans.

Not goal-conditioned. Nothing is pre-trained. A skill lasts K steps. Off-policy: the model learns from the replay,
policy and critic in imagination.
Expect (SkiMo's text): maze 0 and kitchens nearly 0: a plan of 50 steps cannot see 34 cells away. With --cpu-preset
nearly 0 in maze and kitchens, .01 / .42 sub-tasks on CALVIN, where a constant action does more, though skills differ
(2.6, 4.5, 3.3 nats). In its controls, without reward, they differ by 1.4 nats in our maze, 3.2 for a point.
A run's folder holds the same files as skimo.py's.
Differs from skimo.py in: Args, TASK_DEFAULTS, CPU_PRESET, POSITION_PERIODS, kl_divergence, Filter, rollout,
    skill_paths, Agent, train, evaluate, parse_args, check_args, main
Shapes: B batch, L rows per window, O observation, A action, Z skill, s and h their sizes, d = s + h, E environments,
S starts, K steps per skill, M skills per plan, P plans.
"""

import argparse
import contextlib
import csv
import functools
import gc
import importlib
import json
import math
import os
import platform
import signal
import sys
import threading
import time
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal, get_args

# OpenMP's threads wait 1,000 turns for work before they sleep. With torch's default, 300 times that, an update beside
# a busy program takes 1.6 times as long (algos/README.md). Must be set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import tyro
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_tools  # tasks, nothing else


@dataclass
class Args:
    env_id: str = "maze"  # task: maze, kitchen, kitchen-misaligned, calvin or one of your own
    cpu_preset: bool = False  # small sizes for one core; with --help: shows them
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # of networks, sampling and environments
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    cudagraphs: bool = torch.cuda.is_available()  # replay updates and plans as CUDA graphs
    run_dir: str = "runs"  # folder of the run folders
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    checkpoint_interval: int = 100_000  # env steps between checkpoints, which hold all experience
    eval_interval: int = 100_000  # env steps between evaluations (0: only at the end)
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode
    capture_video: bool = False  # at the end, record an evaluation episode (MP4) and draw where skills lead (PNG)
    data_dir: str | None = None  # not used: there are no offline data (the grid runner gives it to all files)

    # Model
    deter_dim: int = 200  # size of h
    stoch_dim: int = 30  # size of s
    encoder_dim: int = 256  # width of encoder and decoder, and size of an encoded observation
    hidden_dim: int = 400  # width of reward model, critic and actor
    position_features: bool = True  # sines and cosines of positions as inputs, as in skimo.py
    continue_head: bool = False  # learn where episodes end, and imagine it

    # Skills
    skill_dim: int = 3  # Z: numbers in a skill (0: none, then this is Dreamer)
    skill_horizon: int = 10  # K: env steps per skill, in imagination as well
    mi_coef: float = 0.1  # c: weight of the mutual-information term, per nat
    predictor_lr: float = 6e-4  # of the predictor of skills

    # Planner
    random_skills: bool = False  # skills are drawn, not planned
    num_skills: int = 5  # M: skills per plan
    num_samples: int = 16  # P: sampled plans per iteration
    num_elites: int = 4  # best plans, which the next distribution is fitted to
    cem_iters: int = 4  # iterations
    skill_noise: float = 0.1  # std of the noise on planned skills in training

    # RL
    total_timesteps: int = 1_000_000  # env steps, warm-up included
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
    continue_coef: float = 10.0  # weight of the continue head's loss
    gamma: float = 0.99  # discount per env step
    td_lambda: float = 0.95  # share of longer returns in the lambda-return
    explore_std: float = 0.3  # std of the noise on actions
    reward_scale: float = 1.0  # factor on the task's reward


# SkiMo's run lengths. CALVIN's rewards of 100 are found early, so the other term has to weigh more.
TASK_DEFAULTS = {
    "maze": dict(total_timesteps=2_000_000),
    "calvin": dict(total_timesteps=2_000_000, mi_coef=1.0),
}

# --cpu-preset: that of dreamer.py, with plans of two skills, a larger c and a fast predictor. As there the actor must
# not be fast: at 1e-3 two of seven ended in the corners of the tanh, where all skills do the same (study actor_rate).
CPU_PRESET = dict(
    deter_dim=128, stoch_dim=16, encoder_dim=128, hidden_dim=128, batch_size=16, batch_length=32, imagine_starts=128,
    updates_per_step=0.05, num_skills=2, mi_coef=1.0, learning_rate=1e-3, predictor_lr=3e-3,
)  # fmt: skip

# Periods of the sines and cosines of an observation's first entries, a row for each entry.
POSITION_PERIODS = {
    "maze": np.outer([1.0] * 2, [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),  # position, in cells
    "kitchen": np.outer([1.0] * 7 + [0.1] * 2, [0.25, 0.5, 1.0, 2.0, 4.0]),  # arm joints in rad, fingers in m
    "calvin": np.outer([0.25] * 3 + [1.0] * 11, [0.25, 0.5, 1.0, 2.0, 4.0]),  # tool in m; angles, grip, joints in rad
}
POSITION_PERIODS["kitchen-misaligned"] = POSITION_PERIODS["kitchen"]


# ------------------------------------------------------------------------------------------------------------ networks
def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with orthogonal weights, ELU between them, linear output."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        linear = nn.Linear(in_dim, out_dim)
        nn.init.orthogonal_(linear.weight)
        nn.init.zeros_(linear.bias)
        layers += [linear, nn.ELU()]
    return nn.Sequential(*layers[:-1])


class Inputs(nn.Module):
    """Observations (..., O), scaled, with sines and cosines of positions -> inputs (..., F) of networks, F = size."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = np.zeros((0, 0))
        if args.position_features:
            periods = POSITION_PERIODS.get(args.env_id, periods)
        frequency = torch.tensor(2 * np.pi / periods, dtype=torch.float32)
        self.register_buffer("scale", torch.tensor(task.obs_scale or [1.0] * obs_dim))  # (O,)
        self.register_buffer("shift", torch.tensor(task.obs_shift or [0.0] * obs_dim))  # (O,)
        self.register_buffer("frequency", frequency)
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., P, 1)
        phase = (position * self.frequency).flatten(-2)
        scaled = obs * self.scale + self.shift
        return torch.cat([scaled, phase.sin(), phase.cos()], -1)  # (..., F)


def sample_gaussian(distribution):
    """One reparameterised sample of N(mean, std); distribution is (mean, std), each (..., D)."""
    mean, std = distribution
    return mean + std * torch.randn_like(mean)


def kl_divergence(p, q):
    """KL(p || q) of Gaussians (mean, std), each (..., D) -> (...) in nats."""
    mean_p, std_p = p
    mean_q, std_q = q
    square = std_p**2 + (mean_p - mean_q) ** 2
    kl = (std_q / std_p).log() + square / (2 * std_q**2) - 0.5
    return kl.sum(-1)


class RSSM(nn.Module):
    """Recurrent state-space model: what happens next, and what is seen and rewarded there.

    Its state is s (..., s), random, and h (..., h), which remembers; networks see both as a feature (..., d).
    """

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        deter = args.deter_dim
        stoch = args.stoch_dim
        embed = args.encoder_dim
        width = args.hidden_dim
        self.deter_dim = deter
        self.stoch_dim = stoch
        inputs = Inputs(obs_dim, args)  # DEVIATION 4
        self.encoder = nn.Sequential(inputs, *mlp(inputs.size, embed, embed, embed))
        self.cell_input = mlp(stoch + action_dim, deter)
        self.gates_x = nn.Linear(deter, 3 * deter)
        self.gates_h = nn.Linear(deter, 3 * deter)
        self.prior_net = mlp(deter, deter, 2 * stoch)
        self.posterior_net = mlp(deter + embed, deter, 2 * stoch)
        self.decoder = mlp(stoch + deter, embed, embed, 2 * obs_dim)
        self.reward_model = mlp(stoch + deter, width, width, 1)
        self.continue_model = mlp(stoch + deter, width, width, width, 1) if args.continue_head else None

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
        return mean, nn.functional.softplus(raw) + 0.1

    def posterior(self, h, embedding):
        """q(s | h, o), mean and std, 2 x (..., s): after the observation, encoded (..., e), is seen."""
        x = torch.cat([h, embedding], -1)
        mean, raw = self.posterior_net(x).chunk(2, -1)
        return mean, nn.functional.softplus(raw) + 0.1

    def observe(self, obs, action):
        """States of windows: obs (B, L, O), action (B, L, A), the one before each observation.

        Returns h (B, L, h), s (B, L, s) and the posterior that s is drawn from, 2 x (B, L, s).
        """
        embedding = self.encoder(obs)  # (B, L, e)
        h = obs.new_zeros(len(obs), self.deter_dim)
        s = obs.new_zeros(len(obs), self.stoch_dim)
        steps = []
        for t in range(obs.shape[1]):
            h = self.step(h, s, action[:, t])
            mean, std = self.posterior(h, embedding[:, t])
            s = sample_gaussian((mean, std))
            steps.append((h, s, mean, std))
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
        return mean, 0.1 + 0.7 * (torch.tanh(raw_std) + 1)

    def reward(self, feature):
        """The reward for coming here: (..., d) -> (...)."""
        return self.reward_model(feature).squeeze(-1)


class SkillActor(nn.Module):
    """Policy pi(a | s, h, z): the tanh of a Gaussian, at first so wide that most actions are extreme."""

    def __init__(self, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim
        d = args.stoch_dim + args.deter_dim
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
        u = args.hidden_dim
        d = args.stoch_dim + args.deter_dim
        self.net = mlp(2 * d, u, u, 2 * args.skill_dim)

    def forward(self, start, feature):
        """Features (S, d) of starts and (K, S, d) later -> mean and std of z, 2 x (K, S, Z)."""
        both = torch.cat([start.expand_as(feature), feature], -1)
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
        loss = loss + args.continue_coef * continue_loss
        metrics |= dict(continue_loss=continue_loss)
    metrics["model_loss"] = loss
    metrics = {name: value.detach() for name, value in metrics.items()}
    return loss, metrics, h.detach(), s.detach()


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
    features = [torch.cat([s, h], -1)]
    actions = []
    for _ in range(steps):
        feature = features[-1].detach()
        action = torch.tanh(sample_gaussian(actor(feature, z)))
        h = model.step(h, s, action)
        s = sample_gaussian(model.prior(h))
        features.append(torch.cat([s, h], -1))
        actions.append(action)
    return torch.stack(features), torch.stack(actions)


def skill_information(predictor, start, feature, z):
    """log q(z | f_0, f_t) - log N(z; 0, I) in nats: its mean is a lower bound on what states tell about the skill.

    start (S, d), feature (K, S, d), z (S, Z). Returns (K, S).
    """
    mean, std = predictor(start, feature)  # 2 x (K, S, Z)
    log_q = -0.5 * ((z - mean) / std).square() - std.log()
    log_p = -0.5 * z.square()
    return (log_q - log_p).sum(-1)


def skill_loss(model, actor, critic, predictor, h, s, args):
    """Policy: high returns in imagination (Dreamer eq. 3-7) by skills that can be told apart. All else is frozen.

    h (B, L, h), s (B, L, s). Returns the loss, metrics, for the critic as dreamer.py: features (K-1, S, d), their
    lambda-returns and weights (K-1, S), and for the predictor: starts (S, d), features (K, S, d), z (S, Z), detached.
    """
    if args.continue_head:  # the last state of a window may be an end, from which nothing starts
        h = h[:, :-1]
        s = s[:, :-1]
    h = h.flatten(0, 1)
    s = s.flatten(0, 1)
    if args.imagine_starts < len(h):  # DEVIATION 5
        order = torch.rand(len(h), device=h.device)
        chosen = order.topk(args.imagine_starts).indices  # (S,)
        h = h[chosen]
        s = s[chosen]
    z = torch.randn(len(h), args.skill_dim, device=h.device)  # (S, Z), one for the whole imagination
    imagined = imagine_skill(model, actor, h, s, z, args.skill_horizon)
    features, actions = imagined  # (K+1, S, d), (K, S, A)
    start = features[0]
    feature = features[1:]
    rewards = model.reward(feature)  # (K, S)
    values = critic(feature).squeeze(-1)  # (K, S)
    discount = torch.full_like(rewards, args.gamma)
    if args.continue_head:
        discount = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
    returns = lambda_return(rewards[:-1], values, discount[:-1], args.td_lambda)  # (K-1, S)
    # State k comes k - 1 steps after the first imagined one: its return weighs gamma^(k - 1).
    weight = torch.cat([torch.ones_like(discount[:1]), discount[:-2]])
    weight = weight.cumprod(0).detach()  # (K-1, S)

    # Mutual information: where a skill leads must say which one it was. It is kept out of V, which outlives the skill.
    information = skill_information(predictor, start, feature, z).mean()

    loss = -(weight * returns).mean() - args.mi_coef * information
    metrics = dict(
        actor_loss=loss,
        imagined_return=returns.mean(),
        imagined_reward=rewards.mean(),
        value=values.mean(),
        extreme_actions=(actions.abs() > 0.999).float().mean(),
        skill_information=information,
    )
    metrics = {name: value.detach() for name, value in metrics.items()}
    for_critic = feature[:-1].detach(), returns.detach(), weight
    return loss, metrics, for_critic, (start.detach(), feature.detach(), z)


def predictor_loss(predictor, start, feature, z):
    """Predictor: recognise the skill, so that the bound is close (its gradient is that of -log q)."""
    return -skill_information(predictor, start, feature, z).mean()


def imagined_value_loss(critic, feature, returns, weight):
    """Critic: predict the lambda-returns (Dreamer eq. 8), so that what lies beyond imagination counts as well.

    feature (J-1, S, d), returns and weight (J-1, S).
    """
    error = (critic(feature).squeeze(-1) - returns).square()
    return (weight * (0.5 * error + 0.5 * math.log(2 * math.pi))).mean()


# -------------------------------------------------------------------------------------------------------------- acting
@torch.no_grad()
def plan_skills(model, actor, critic, h, s, mean, noise_scale: float, args):
    """CEM over sequences of M skills in the model, without its noise, for all environments at once.

    h (E, h), s (E, s); mean (E, M, Z): zeros or the last plan, moved on by one skill; noise_scale 1 to explore, 0 to
    evaluate. Returns the first skill (E, Z) and the fitted mean (E, M, Z).
    """
    E, M, Z = mean.shape
    P = args.num_samples
    std = torch.ones_like(mean)
    h0 = h[:, None].expand(-1, P, -1)  # (E, P, h)
    s0 = s[:, None].expand(-1, P, -1)  # (E, P, s)
    for _ in range(args.cem_iters):
        noise = torch.randn(E, P, M, Z, device=h.device)
        plans = mean[:, None] + std[:, None] * noise
        plans = plans.clamp(-3, 3)  # (E, P, M, Z)

        # Return of each plan: the rewards of M K steps. The last state's critic holds its reward and all that follows
        h = h0
        s = s0
        value = 0.0
        discount = 1.0
        steps = M * args.skill_horizon
        for t in range(steps):
            z = plans[:, :, t // args.skill_horizon]  # (E, P, Z)
            mode, _ = actor(torch.cat([s, h], -1), z)
            h = model.step(h, s, torch.tanh(mode))
            s, _ = model.prior(h)
            feature = torch.cat([s, h], -1)  # (E, P, d)
            if t == steps - 1:
                break
            value = value + discount * model.reward(feature)
            goes_on = args.gamma
            if args.continue_head:
                goes_on = torch.sigmoid(model.continue_model(feature)).squeeze(-1)
            discount = discount * goes_on
        value = value + discount * critic(feature).squeeze(-1)  # (E, P)

        # Fit the next distribution to the best plans
        best = value.topk(args.num_elites, 1).indices  # (E, elites)
        best = best[..., None, None].expand(-1, -1, M, Z)
        elites = plans.gather(1, best)  # (E, elites, M, Z)
        mean = elites.mean(1)
        std = elites.std(1, correction=0)
    z = mean[:, 0]
    z = z + noise_scale * args.skill_noise * torch.randn_like(z)
    return z, mean


class Filter:
    """Acts in E environments at once. Keeps the states h, s of their episodes, which begin with zeros, and skills."""

    def __init__(self, agent, num_envs: int, action_dim: int, explore: bool):
        args = agent.args
        self.agent = agent
        self.explore = explore
        self.h = torch.zeros(num_envs, args.deter_dim, device=args.device)  # (E, h)
        self.s = torch.zeros(num_envs, args.stoch_dim, device=args.device)  # (E, s)
        self.action = torch.zeros(num_envs, action_dim, device=args.device)  # (E, A), the last one
        self.z = torch.zeros(num_envs, args.skill_dim, device=args.device)  # (E, Z)
        self.mean = torch.zeros(num_envs, args.num_skills, args.skill_dim, device=args.device)  # (E, M, Z), last plans
        self.graph = None  # of planning
        self.age = np.zeros(num_envs, dtype=np.int64)  # (E,) env steps of the skill so far; at 0 a new one is chosen

    @torch.no_grad()
    def __call__(self, obs):
        """A noisy sample of the policy or its mode: obs (E, O) -> actions (E, A), both NumPy."""
        args = self.agent.args
        model = self.agent.model
        embedding = model.encoder(torch.from_numpy(obs).to(args.device))
        self.h = model.step(self.h, self.s, self.action)
        self.s = sample_gaussian(model.posterior(self.h, embedding))
        if (self.age == 0).any():
            self.choose_skills(self.age == 0)
        self.age = (self.age + 1) % args.skill_horizon
        mean, std = self.agent.actor(torch.cat([self.s, self.h], -1), self.z)
        self.action = torch.tanh(mean)
        if self.explore:
            action = torch.tanh(sample_gaussian((mean, std)))
            noise = args.explore_std * torch.randn_like(action)
            self.action = (action + noise).clamp(-1, 1)  # the model must see what is executed
        return self.action.cpu().numpy()

    def choose_skills(self, due):
        """New skills for the environments in due (E,) bool, where the last one is over."""
        args = self.agent.args
        if args.random_skills:
            z = torch.randn_like(self.z)
            mean = self.mean
        else:
            moved = torch.cat([self.mean[:, 1:], torch.zeros_like(self.mean[:, :1])], 1)  # a skill has passed
            nets = self.agent.model, self.agent.actor, self.agent.critic

            def plan(h, s, mean):
                return plan_skills(*nets, h, s, mean, float(self.explore), args)

            inputs = self.h, self.s, moved
            if self.explore and self.graph is None:  # an evaluation is too short to record
                self.graph = recorded(plan, args)
            z, mean = (self.graph or plan)(*inputs)
        due = torch.from_numpy(due).to(self.z.device)
        self.z = torch.where(due[:, None], z, self.z)
        self.mean = torch.where(due[:, None, None], mean, self.mean)

    def forget(self, ended):
        """States, skills and plans of episodes that ended, (E,) bool, mean nothing to the next ones."""
        goes_on = torch.from_numpy(~ended)[:, None].to(self.h.device)
        self.h = self.h * goes_on
        self.s = self.s * goes_on
        self.action = self.action * goes_on
        self.mean = self.mean * goes_on[:, None]
        self.age[ended] = 0


def rollout(choose_action, num_episodes: int, args: Args, seed: int, video: Path | None = None):
    """An episode in each of num_episodes environments, with actions (E, A) = choose_action(obs (E, O)).

    Returns returns (E,) and lengths in env steps (E,). The random numbers of training stay as they were.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    returns = np.zeros(num_episodes)
    lengths = np.zeros(num_episodes, dtype=np.int64)
    ended = np.zeros(num_episodes, dtype=bool)
    with kept_random_state(args):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        while not ended.all():
            obs, rewards, terminations, truncations, _ = envs.step(choose_action(obs))
            returns += np.where(ended, 0.0, rewards)
            lengths += ~ended
            ended = terminations | truncations
    envs.close()
    return returns, lengths


def success(returns, args: Args) -> float:
    """Share of episodes in which everything was done."""
    best = data_tools.TASKS[args.env_id].max_return
    reached = np.asarray(returns) >= best - 1e-5 * abs(best)  # rewards are float32
    return float(reached.mean()) if len(returns) else 0.0


# ------------------------------------------------------------------------------------------------------------ pictures
def skill_paths(agent, z, num_steps: int, args: Args, seed: int):
    """Observations (T+1, N, O) of N skills z (N, Z) from one start, until all have ended; NaN after a member's end.

    A skill lasts K env steps; here it is chosen again and again, for ways that are long enough to be seen.
    """
    envs = data_tools.make_envs(args.env_id, len(z))
    policy_mode = Filter(agent, len(z), envs.single_action_space.shape[0], explore=False)
    policy_mode.z = torch.from_numpy(z).to(args.device)
    ended = np.zeros(len(z), dtype=bool)
    with kept_random_state(args):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=[seed] * len(z))
        path = [obs]
        for _ in range(num_steps):
            policy_mode.age[:] = 1  # no skill is over
            obs, _, terminations, truncations, _ = envs.step(policy_mode(obs))
            path.append(np.where(ended[:, None], np.nan, obs))
            ended |= terminations | truncations
            if ended.all():
                break
    envs.close()
    return np.stack(path)


def tool_position(obs, args: Args):
    """Where the thing that moves is: the point mass (..., 2), or the hand (..., 3) in metres."""
    if not args.env_id.startswith("kitchen"):
        return obs[..., : 2 if data_tools.TASKS[args.env_id].draw_map else 3]
    # The Franka arm's geometry (Denavit-Hartenberg, Craig's form) takes its seven joints to the point between fingers.
    lengths = [0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088]
    offsets = [0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0]
    twists = [0.0, -1.0, 1.0, 1.0, -1.0, 1.0, 1.0]  # quarter turns
    point = np.array([0.0, 0.0, 0.21])
    point = np.broadcast_to(point, (*obs.shape[:-1], 3))
    for i in reversed(range(7)):
        angle = obs[..., i] + (np.pi / 2 if i == 5 else 0.0)
        x = np.cos(angle) * point[..., 0] - np.sin(angle) * point[..., 1]
        y = np.sin(angle) * point[..., 0] + np.cos(angle) * point[..., 1]
        h = point[..., 2] + offsets[i]
        t = twists[i] * np.pi / 2
        new_x = x + lengths[i]
        new_y = np.cos(t) * y - np.sin(t) * h
        new_h = np.sin(t) * y + np.cos(t) * h
        point = np.stack([new_x, new_y, new_h], -1)
    return point


def draw_skills(agent, args: Args, num_steps: int, path: Path):
    """Where 16 skills lead from the start, a colour for each: those around a circle in their first two numbers."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure  # only pictures need it

    angles = 2 * np.pi * np.arange(16) / 16
    z = np.zeros((16, args.skill_dim), dtype=np.float32)
    z[:, :2] = np.stack([np.cos(angles), np.sin(angles)], 1)[:, : args.skill_dim]
    paths = skill_paths(agent, z, num_steps, args, args.seed)
    position = tool_position(paths, args)  # (T+1, 16, 1 to 3)
    if position.shape[-1] == 1:
        return print("no picture of the skills: the task observes one number")
    # From above; from above and from the front. The kitchen's x points away from the robot, others' y does
    front = 1 if args.env_id.startswith("kitchen") else 0
    views = [(1, 0)] if position.shape[-1] == 2 else [(0, 1), (front, 2)]
    figure = Figure(figsize=(6 * len(views), 6))
    draw_map = data_tools.TASKS[args.env_id].draw_map
    for ax, (across, up) in zip(figure.subplots(1, len(views), squeeze=False)[0], views):
        if draw_map:
            module, name = draw_map.split(":")
            getattr(importlib.import_module(module), name)(ax)
        for n, angle in enumerate(angles):
            colour = colormaps["hsv"](angle / 2 / np.pi)
            ax.plot(position[:, n, across], position[:, n, up], color=colour)
        ax.set(aspect="equal", xlabel="xyz"[across], ylabel="xyz"[up])
    figure.suptitle(f"{args.env_id}: {len(paths) - 1} env steps of 16 skills, coloured by the angle of z")
    part = path.with_suffix(".part")
    figure.savefig(part, dpi=100, format="png")
    part.replace(path)
    print(f"picture of the skills: {path}")


# -------------------------------------------------------------------------------------------------------------- replay
class SequenceBuffer:
    """All rows that were ever added, on the device, from which windows of L rows are drawn.

    A row is an observation and what led to it: action, reward, and whether the episode really ended here (a time-out is
    no end); zeros for the first observation of an episode. The i-th row of environment e is row i * E + e. Each window
    inside one episode, finished or not, is drawn with the same probability. Nothing is ever dropped.
    """

    def __init__(self, obs_dim: int, action_dim: int, window: int, args: Args):
        E = args.num_envs
        self.sizes = [obs_dim, action_dim, 1, 1]
        self.window = window
        self.rows = torch.zeros(1_000 * E, sum(self.sizes), device=args.device)  # doubled when full
        self.starts = torch.zeros(1_000 * E, dtype=torch.long, device=args.device)  # first rows of all windows
        self.num_starts = 0
        self.filled = np.zeros(E, dtype=np.int64)  # rows of each environment
        self.age = np.zeros(E, dtype=np.int64)  # rows of its episode so far

    def begin(self, obs, members):
        """First rows of the episodes that begin in members (E,) bool: obs (E, O) NumPy."""
        zeros = np.zeros(len(obs))
        nothing = np.zeros((len(obs), self.sizes[1]))
        self.age[members] = 0
        self.add_rows(obs, nothing, zeros, zeros, members)

    def add(self, next_obs, action, rewards, terminations):
        """One step of every environment, NumPy: next_obs (E, O), action (E, A), rewards, terminations (E,)."""
        everyone = np.ones(len(next_obs), dtype=bool)
        self.add_rows(next_obs, action, rewards, terminations, everyone)

    def add_rows(self, obs, action, rewards, terminals, members):
        E = len(members)
        device = self.rows.device
        if self.filled.max() * E == len(self.rows):
            self.rows = torch.cat([self.rows, torch.zeros_like(self.rows)])
            self.starts = torch.cat([self.starts, torch.zeros_like(self.starts)])
        rows = [obs, action, rewards[:, None], terminals[:, None]]
        rows = np.concatenate(rows, 1)[members].astype(np.float32)  # (n, O + A + 2)
        index = (self.filled * E + np.arange(E))[members]  # (n,)
        self.rows[torch.from_numpy(index).to(device)] = torch.from_numpy(rows).to(device)
        self.filled[members] += 1
        self.age[members] += 1

        # Each row ends one more window, as soon as its episode has L rows
        complete = self.age[members] >= self.window
        starts = (index - (self.window - 1) * E)[complete]
        last = self.num_starts + len(starts)
        self.starts[self.num_starts : last] = torch.from_numpy(starts).to(device)
        self.num_starts = last

    def sample(self, batch_size: int):
        """Uniform windows: obs (B, L, O), action (B, L, A), rewards and terminals (B, L)."""
        device = self.rows.device
        index = torch.randint(self.num_starts, (batch_size,), device=device)
        steps = len(self.filled) * torch.arange(self.window, device=device)
        rows = self.rows[self.starts[index, None] + steps]  # (B, L, O + A + 2)
        obs, action, rewards, terminals = rows.split(self.sizes, -1)
        return obs, action, rewards.squeeze(-1), terminals.squeeze(-1)

    def state_dict(self) -> dict:
        used = self.filled.max() * len(self.filled)
        return dict(
            rows=self.rows[:used].clone(),
            starts=self.starts[: self.num_starts].clone(),
            filled=torch.from_numpy(self.filled.copy()),
            age=torch.from_numpy(self.age.copy()),
        )

    def load_state_dict(self, state: dict):
        if state["rows"].shape[1] != sum(self.sizes) or not state["rows"].isfinite().all():
            raise ValueError("the replay buffer has rows of another size or is not finite")
        self.filled[:] = state["filled"].numpy()
        self.age[:] = state["age"].numpy()
        self.rows = state["rows"].to(self.rows.device)
        self.num_starts = len(state["starts"])
        self.starts = torch.zeros_like(self.rows[:, 0], dtype=torch.long)
        self.starts[: self.num_starts] = state["starts"]


# --------------------------------------------------------------------------------------------------- logs, checkpoints
def kept_random_state(args: Args):
    """Context that leaves torch's random numbers as they were, also those of the GPU that is used."""
    return torch.random.fork_rng([torch.cuda.current_device()] if args.device == "cuda" else [])


def log(writer: SummaryWriter, group: str, values: dict, step: int):
    """Scalars to TensorBoard as group/name."""
    for name, value in values.items():
        writer.add_scalar(f"{group}/{name}", value, step)


def stop_at_signals() -> threading.Event:
    """Ctrl-C or SIGTERM asks for a stop where everything can be saved; the same once more ends the program at once."""
    stop = threading.Event()

    def ask(number, frame):
        stop.set()
        os.write(2, b"\nstopping: saves first (once more: stops at once)\n")  # print may not interrupt a print
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGINT, ask)
    signal.signal(signal.SIGTERM, ask)
    return stop


def write_json(path: Path, values: dict):
    """Values as JSON. The file is renamed when it is whole, so that a crash never leaves half of it."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(values, indent=1))
    part.replace(path)


def passed(interval: int, step: int, new_steps: int) -> bool:
    """Whether the last new_steps reached or passed a multiple of interval (0: never)."""
    return interval > 0 and step // interval > (step - new_steps) // interval


def save(path: Path, parts: dict, **values):
    """Write the state of modules, optimizers and replay, plain values, and torch's random numbers.

    The file is renamed when it is whole, so that a crash while writing leaves the one of before.
    """
    temporary = path.with_suffix(f".{os.getpid()}.part")  # another program may write the same file
    state = {name: part.state_dict() for name, part in parts.items()}
    rng = [torch.get_rng_state()]
    if torch.cuda.is_initialized():
        rng.append(torch.cuda.get_rng_state())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(state, **values, rng=rng), temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it, also after a power cut
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        temporary.unlink(missing_ok=True)
        reason = str(error).split("\n")[0]
        sys.exit(f"error: cannot write {path} ({reason}); free some space or choose another folder")


@contextlib.contextmanager
def reading(path: Path):
    """A file that is missing, damaged or of other sizes ends the program with a sentence."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        sys.exit(f"error: {path} does not exist; give another path")
    except (IsADirectoryError, PermissionError) as error:
        reason = error.strerror
        sys.exit(f"error: {path} cannot be read ({reason}); check the path")
    except torch.OutOfMemoryError:
        sys.exit(f"error: no memory for {path}; end other programs")
    except Exception as error:
        kind = type(error).__name__
        reason = " ".join(str(error).split())[:200]
        problem = f"{path} is damaged or does not fit this file and task ({kind}: {reason})"
        made = Path(path).parent.name in ("pretrained", "flows")
        cure = "delete it to make it again" if made else "give another"
        sys.exit(f"error: {problem}; {cure}")


def load(path: Path, parts: dict) -> dict:
    """Put what `save` wrote into parts; returns everything. Raises an error if a single bit is wrong."""
    if zipfile.ZipFile(path).testzip() is not None:
        raise ValueError("its checksum is wrong")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state[name])
        if isinstance(part, nn.Module):
            for key, value in part.state_dict().items():
                if not value.isfinite().all():
                    raise ValueError(f"{key} is not finite")
        if isinstance(part, torch.optim.Optimizer):
            for weight, moments in part.state.items():
                for moment in (moments["exp_avg"], moments["exp_avg_sq"]):
                    if moment.shape != weight.shape or not moment.isfinite().all():
                        raise ValueError("an optimizer's state has another shape or is not finite")
    return state


def set_random_state(rng: list):
    """Go on with the random numbers of a checkpoint; without its GPU not bit for bit."""
    torch.set_rng_state(rng[0])
    if torch.cuda.is_available() and len(rng) > 1:
        torch.cuda.set_rng_state(rng[1])


# ------------------------------------------------------------------------------------------------------------ learning
def clip_gradients(module, args: Args):
    """Bound the gradient's norm; returns it, ()."""
    return nn.utils.clip_grad_norm_(module.parameters(), args.max_grad_norm)


class Recorded:
    """A function of tensors as a CUDA graph: the GPU repeats what it did, with one launch in place of hundreds.

    The first call is an ordinary one, in which optimizers make what they need. The second is recorded. This one and
    all that follow replay it: inputs keep their shapes, Python decides nothing anew, nothing may wait for the GPU, and
    optimizers in it are capturable. A call overwrites what the one before returned.
    """

    def __init__(self, function):
        self.function = function
        self.stream = torch.cuda.Stream()
        self.graph = torch.cuda.CUDAGraph()
        self.inputs = None
        self.outputs = None

    def __call__(self, *inputs):
        if self.inputs is None:
            self.inputs = [x.clone() for x in inputs]
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                outputs = self.function(*inputs)
            torch.cuda.current_stream().wait_stream(self.stream)
            return outputs
        if self.outputs is None:
            gc.collect()  # an old graph that Python deletes meanwhile would break this one
            with torch.cuda.graph(self.graph, stream=self.stream):
                self.outputs = self.function(*self.inputs)
        for mine, given in zip(self.inputs, inputs):
            mine.copy_(given)
        self.graph.replay()
        return self.outputs


def recorded(function, args: Args):
    """The function itself on a CPU and with --no-cudagraphs."""
    return Recorded(function) if args.cudagraphs and args.device == "cuda" else function


def check_finite(metrics: dict):
    """End the program before NaN gets into a checkpoint. After a NaN all gradients are NaN, so one look now and then
    finds it; a look at every update would make the CPU wait for the GPU.
    """
    if not metrics["grad_norm"].isfinite():
        sys.exit("error: the gradient is no number any more: lower the learning rate; the last checkpoint is kept")


class Agent(nn.Module):
    """Model, actor, critic and predictor of skills, and one gradient step of each."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        u = args.hidden_dim
        self.model = RSSM(obs_dim, action_dim, args)
        self.actor = SkillActor(action_dim, args)
        self.critic = mlp(args.stoch_dim + args.deter_dim, u, u, u, 1)
        self.predictor = SkillPredictor(args)
        self.to(args.device)
        adam = functools.partial(torch.optim.Adam, eps=1e-7, fused=True, capturable=True)
        self.model_optimizer = adam(self.model.parameters(), lr=args.learning_rate)
        self.actor_optimizer = adam(self.actor.parameters(), lr=args.actor_lr)
        self.critic_optimizer = adam(self.critic.parameters(), lr=args.critic_lr)
        self.predictor_optimizer = adam(self.predictor.parameters(), lr=args.predictor_lr)
        self.update = recorded(self.update, args)

    def update(self, obs, action, rewards, terminals) -> dict:
        """One step of the model on a batch of windows, then of all others in imagination; returns metrics."""
        args = self.args
        loss, metrics, h, s = rssm_loss(self.model, obs, action, rewards, terminals, args)
        self.model_optimizer.zero_grad()
        loss.backward()
        model_norm = clip_gradients(self.model, args)
        self.model_optimizer.step()

        for frozen in (self.model, self.critic, self.predictor):  # need no gradient of the actor's loss
            frozen.requires_grad_(False)
        nets = self.model, self.actor, self.critic, self.predictor
        loss, actor_metrics, for_critic, for_predictor = skill_loss(*nets, h, s, args)
        self.actor_optimizer.zero_grad()
        loss.backward()
        actor_norm = clip_gradients(self.actor, args)
        self.actor_optimizer.step()
        for frozen in (self.model, self.critic, self.predictor):
            frozen.requires_grad_(True)

        loss = imagined_value_loss(self.critic, *for_critic)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = clip_gradients(self.critic, args)
        self.critic_optimizer.step()
        metrics |= dict(actor_metrics, critic_loss=loss.detach())

        loss = predictor_loss(self.predictor, *for_predictor)
        self.predictor_optimizer.zero_grad()
        loss.backward()
        predictor_norm = clip_gradients(self.predictor, args)
        self.predictor_optimizer.step()
        return dict(metrics, grad_norm=model_norm + actor_norm + critic_norm + predictor_norm)


def train(args: Args, run_dir: Path, writer, stop: threading.Event) -> dict:
    """Online RL from nothing or, where there is one, from the run's checkpoint. Returns the results."""
    torch.manual_seed(args.seed)
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    if args.capture_video:
        envs.draw(0)  # a task or a machine without pictures is noticed now
    longest = envs.max_episode_steps + 1  # rows of an episode that does not end early
    if longest < args.batch_length:
        sys.exit(f"error: episodes have at most {longest} rows, fewer than a window; lower --batch-length")
    action_dim = envs.single_action_space.shape[0]
    agent = Agent(args, obs.shape[1], action_dim)
    choose_action = Filter(agent, args.num_envs, action_dim, explore=True)
    rb = SequenceBuffer(obs.shape[1], action_dim, args.batch_length, args)  # DEVIATION 2
    rb.begin(obs, np.ones(args.num_envs, dtype=bool))
    global_step = 0
    gradient_step = 0
    running_return = np.zeros(args.num_envs)  # (E,) of the episodes that have not ended yet
    running_length = np.zeros(args.num_envs, dtype=np.int64)  # (E,)
    episodes = []  # (env step, return, length, minutes) of those that have
    evaluations = []  # (env step, mean return, success)
    seconds = 0.0  # of earlier commands

    parts = dict(agent=agent, rb=rb)
    parts |= dict(model=agent.model_optimizer, actor=agent.actor_optimizer, critic=agent.critic_optimizer)
    parts |= dict(predictor=agent.predictor_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        with reading(checkpoint):
            state = load(checkpoint, parts)
            obs = envs.set_state(state["envs"])
            choose_action.h[:] = state["h"]
            choose_action.s[:] = state["s"]
            choose_action.action[:] = state["action"]
            choose_action.z[:] = state["z"]
            choose_action.mean[:] = state["mean"]
            choose_action.age[:] = state["age"].numpy()
            global_step = int(state["global_step"])
            gradient_step = int(state["gradient_step"])
            running_return[:] = state["running_return"].numpy()
            running_length[:] = state["running_length"].numpy()
            episodes = [(step, ret, length, minutes) for step, ret, length, minutes in state["episodes"]]
            evaluations = [(step, ret, share) for step, ret, share in state["evaluations"]]
            seconds = float(state["seconds"])
            set_random_state(state["rng"])
    start_time = time.time() - seconds

    episodes_file = (run_dir / "episodes.csv").open("w", buffering=1, newline="")  # written line by line
    episodes_csv = csv.writer(episodes_file)
    episodes_csv.writerow(("env_step", "episodic_return", "episodic_length", "rl_minutes"))
    episodes_csv.writerows(episodes)
    bar = tqdm(desc="RL", total=args.total_timesteps, initial=global_step, unit="step")
    stopping = global_step >= args.total_timesteps
    while not stopping:
        # ALGO LOGIC: put action logic here. One action for all environments at once
        if global_step < args.warmup_steps:
            action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
        else:
            action = choose_action(obs)
        next_obs, rewards, terminations, truncations, _ = envs.step(action)
        rb.add(next_obs, action, args.reward_scale * rewards, terminations)
        # TRY NOT TO MODIFY: CRUCIAL step easy to overlook
        obs = next_obs
        ended = terminations | truncations
        if ended.any():
            obs, _ = envs.reset(options=dict(reset_mask=ended))
            rb.begin(obs, ended)
            choose_action.forget(ended)

        # TRY NOT TO MODIFY: record the episodes that ended
        new_steps = args.num_envs
        global_step += new_steps
        running_return += rewards
        running_length += 1
        for e in np.flatnonzero(ended):
            seconds = time.time() - start_time
            row = (global_step, float(running_return[e]), int(running_length[e]), round(seconds / 60, 3))
            episodes.append(row)
            episodes_csv.writerow(row)
            last_100 = np.array([row[1] for row in episodes[-100:]])
            writer.add_scalar("charts/episodic_return", row[1], global_step)
            writer.add_scalar("charts/episodic_length", row[2], global_step)
            writer.add_scalar("charts/success", success(last_100, args), global_step)
            writer.add_scalar("charts/SPS", global_step / seconds, global_step)
            bar.set_postfix(updates=gradient_step, last_100=f"{last_100.mean():.3g}")
        running_return[ended] = 0
        running_length[ended] = 0
        bar.update(new_steps)

        # ALGO LOGIC: training, as soon as there are windows; never more than ten times the updates of one step
        updates_due = 0
        if rb.num_starts > 0:
            at_once = math.ceil(10 * new_steps * args.updates_per_step)
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            updates_due = min(updates_due, gradient_step + at_once)
        while gradient_step < updates_due:
            batch = rb.sample(args.batch_size)
            if gradient_step == 0:
                agent.model.start_decoder(batch[0])  # DEVIATION 7
            metrics = agent.update(*batch)
            gradient_step += 1
            if gradient_step % 100 == 0:
                log(writer, "losses", metrics, global_step)
            if gradient_step == updates_due:
                check_finite(metrics)  # acting waits for the device anyway

        # Evaluate with the policy's mode
        finished = global_step >= args.total_timesteps
        if finished or passed(args.eval_interval, global_step, new_steps):
            policy_mode = Filter(agent, args.eval_episodes, action_dim, explore=False)
            returns, lengths = rollout(policy_mode, args.eval_episodes, args, 10_000 + args.seed)
            evaluations.append((global_step, float(returns.mean()), success(returns, args)))
            writer.add_scalar("eval/episodic_return", returns.mean(), global_step)
            writer.add_scalar("eval/episodic_length", lengths.mean(), global_step)
            writer.add_scalar("eval/success", success(returns, args), global_step)
            bar.write(f"env step {global_step}: evaluation {returns.mean():.4g}, success {success(returns, args):.0%}")

        # Save all that the future of the run depends on
        stopping = finished or stop.is_set()
        if stopping or passed(args.checkpoint_interval, global_step, new_steps):
            save(
                checkpoint,
                parts,
                script=Path(__file__).name,
                args=asdict(args),
                envs=envs.get_state(),
                h=choose_action.h,
                s=choose_action.s,
                action=choose_action.action,
                z=choose_action.z,
                mean=choose_action.mean,
                age=torch.from_numpy(choose_action.age),
                global_step=global_step,
                gradient_step=gradient_step,
                running_return=torch.from_numpy(running_return),
                running_length=torch.from_numpy(running_length),
                episodes=episodes,
                evaluations=evaluations,
                seconds=time.time() - start_time,
            )

    bar.close()
    envs.close()
    episodes_file.close()
    if global_step < args.total_timesteps:
        sys.exit(f"stopped at env step {global_step}; go on with: python {sys.argv[0]} --resume {run_dir}")
    rl_minutes = (time.time() - start_time) / 60
    if args.capture_video:
        policy_mode = Filter(agent, 1, action_dim, explore=False)
        rollout(policy_mode, 1, args, 10_000 + args.seed, run_dir / "evaluation.mp4")
        if args.skill_dim:
            draw_skills(agent, args, 10 * args.skill_horizon, run_dir / "skills.png")
    last_100 = [row[1] for row in episodes[-100:]]
    return dict(
        env_steps=global_step,
        updates=gradient_step,
        rl_minutes=rl_minutes,
        last_100_return=float(np.mean(last_100)) if last_100 else None,
        last_100_success=success(last_100, args),
        evaluations=evaluations,
    )


def evaluate(args: Args):
    """--evaluate: episodes of a trained agent with the policy's mode; needs no training."""
    obs_dim, action_dim = data_tools.env_sizes(args.env_id)
    agent = Agent(args, obs_dim, action_dim)
    path = Path(args.evaluate)
    with reading(path):
        load(path, dict(agent=agent))
    policy_mode = Filter(agent, args.eval_episodes, action_dim, explore=False)
    returns, lengths = rollout(policy_mode, args.eval_episodes, args, 10_000 + args.seed)
    words = f"return {returns.mean():.4g}, success {success(returns, args):.0%}, {lengths.mean():.0f} env steps"
    print(f"{args.env_id}: {args.eval_episodes} episodes of {path}: {words} on average")
    if args.capture_video:
        video = Path(args.run_dir) / f"{args.env_id}__{args.exp_name}__{args.seed}__evaluation.mp4"
        policy_mode = Filter(agent, 1, action_dim, explore=False)
        rollout(policy_mode, 1, args, 10_000 + args.seed, video)
        print(f"video: {video}")
        if args.skill_dim:
            picture = video.with_name(video.name.replace("evaluation.mp4", "skills.png"))
            draw_skills(agent, args, 10 * args.skill_horizon, picture)


# ----------------------------------------------------------------------------------------------------------------- main
# With --resume all other flags stay as they were.
MAY_CHANGE = "resume device cudagraphs checkpoint_interval eval_interval eval_episodes capture_video total_timesteps"


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, of --cpu-preset, or of the run or agent given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", choices=list(data_tools.TASKS), default="maze")
    first.add_argument("--cpu-preset", "--cpu_preset", action="store_true")
    first.add_argument("--device")
    first.add_argument("--resume")
    first.add_argument("--evaluate")
    given, _ = first.parse_known_args(argv)

    env_id = given.env_id
    defaults = dict(env_id=env_id, **TASK_DEFAULTS.get(env_id, {}))
    if given.cpu_preset:
        defaults |= CPU_PRESET
    if given.evaluate:
        with reading(given.evaluate):
            state = load(given.evaluate, {})
            check_script(state, given.evaluate)
            defaults = state["args"]
            check_types(defaults)
        defaults |= dict(capture_video=False, device=Args.device, cudagraphs=Args.cudagraphs, run_dir=Args.run_dir)
    if given.resume:
        path = Path(os.path.expanduser(given.resume)) / "args.json"
        with reading(path):
            defaults = json.loads(path.read_text())
            check_script(defaults, given.resume)
            check_types(defaults)
            names = {field.name for field in fields(Args)}
            missing = names - defaults.keys()
            if missing:
                raise ValueError(f"it has no {missing}")
    if given.device:
        defaults["cudagraphs"] = given.device == "cuda"
    args = tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n")[0])
    if given.evaluate and args.env_id != defaults["env_id"]:
        task = defaults["env_id"]
        sys.exit(f"error: {given.evaluate} is an agent of {task}: leave out --env-id")
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if value == "":
            sys.exit(f"error: {flag} is empty: give a value, or leave it out")
        if given.resume and name not in MAY_CHANGE.split() and value != defaults[name]:
            sys.exit(f"error: {flag} cannot change with --resume: leave it out, or begin a new run")
    return args


def check_script(saved: dict, source: str):
    """End the program if a run or an agent was made by another file; the oldest do not say by which."""
    this = Path(__file__).name
    script = saved.pop("script", this)
    if script != this:
        sys.exit(f"error: {source} was made by {script}: use that file")


def check_types(values: dict):
    """Raise an error if saved arguments are not those of this file."""
    types = {field.name: field.type for field in fields(Args)}
    for name, value in values.items():
        kind = float if type(value) is int and types[name] is float else type(value)
        choices = get_args(types[name])  # values of a Literal, types of `str | None`
        if kind is not types[name] and kind not in choices and value not in choices:
            raise ValueError(f"{name} cannot be {value!r}")


def check_args(args: Args):
    """End the program with a sentence where arguments cannot work."""
    may_be_zero = "seed", "eval_interval", "warmup_steps", "skill_dim"
    for name, value in asdict(args).items():
        flag = f"--{name.replace('_', '-')}"
        if type(value) in (int, float) and not 0 <= value < float("inf"):
            sys.exit(f"error: {flag} {value} does not work; give a number that is not negative")
        if type(value) is int and value >= 2**31:
            sys.exit(f"error: {flag} {value} does not work; give a smaller number")
        if type(value) is int and value == 0 and name not in may_be_zero:
            sys.exit(f"error: {flag} 0 does not work; give at least 1")
        if name in ("gamma", "td_lambda") and value > 1:
            sys.exit(f"error: {flag} {value} does not work; give at most 1")
    if args.batch_length < 2 or args.skill_horizon < 2:
        sys.exit("error: --batch-length and --skill-horizon must be at least 2; raise them")
    if args.num_elites > args.num_samples:
        sys.exit("error: --num-elites is larger than --num-samples; raise --num-samples")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; use --device cpu")


def main(args: Args) -> dict:
    """A run; returns its results."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit("stopped before there was anything to save"))
    check_args(args)
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # more do not help networks of this size
    if args.evaluate:
        return evaluate(args)

    run_name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 10**6}"
    run_dir = Path(os.path.expanduser(args.resume or f"{args.run_dir}/{run_name}"))
    finished = os.path.exists(run_dir / "results.json")  # pathlib's raises an error in a closed folder
    if finished and not os.path.exists(run_dir / "checkpoint.pt"):
        sys.exit(f"error: {run_dir} has no checkpoint.pt any more: begin a new run")
    rows = "\n".join(f"|{key}|{value}|" for key, value in asdict(args).items())
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, torch {torch.__version__}"
    try:
        run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
        saved = dict(asdict(args), script=Path(__file__).name)
        write_json(run_dir / "args.json", saved)
        with SummaryWriter(run_dir) as writer:
            writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
            stop = stop_at_signals()
            (run_dir / "results.json").unlink(missing_ok=True)  # of fewer env steps
            results = train(args, run_dir, writer, stop)
        results |= dict(machine=machine, args=asdict(args))
        write_json(run_dir / "results.json", results)
    except (MemoryError, RuntimeError) as error:
        reason = str(error).split("\n")[0][:120] or "MemoryError"
        full = isinstance(error, MemoryError) or "allocate" in reason  # what torch says of full memory
        if not full:
            raise
        sys.exit(f"error: no memory left ({reason}); end other programs or choose smaller sizes")
    except OSError as error:  # while logs, episodes.csv or results.json were written
        sys.exit(f"error: cannot write to {run_dir} ({error}); free some space or choose another --run-dir")
    if results["updates"] == 0:
        print("RL made no update: it ended too early")
    print(f"finished: {run_dir}; curves: tensorboard --logdir {run_dir}")
    return results


if __name__ == "__main__":
    main(parse_args())
