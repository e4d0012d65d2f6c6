"""DIAYN: Diversity Is All You Need (Eysenbach et al. 2019), https://arxiv.org/abs/1802.06070, then a controller

Idea: learn skills without any task. A discriminator q(z | s) guesses from a state which skill led there; a skill is
paid for states that give it away. What comes out is a set of skills that go to different places. A controller then
learns a task by choosing skills: soft Q-learning with an exact soft maximum, as there are only Z of them.

    python algos/diayn.py --env-id maze           # discovery, control and evaluation
    python algos/diayn.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
Sizes of the release (locomotion): --skill-dim 50 --discover-steps 10000000 --total-timesteps 10100000
    --updates-per-step 1 --num-envs 1 --disc-obs all --discover-length 1000

Discovery, for discover_steps env steps; the task's reward is not looked at. Repeat:
   act: z ~ p(z), uniform, at the beginning of an episode; a ~ pi(s, z)
   discriminator: maximise log q(z | s)
   reward: r = log q(z | s) - log p(z) (eq. 3), its mean a lower bound of I(S; Z) <= log Z nats. Without - log p(z), a
      constant, each reward is negative, and where an episode can end early, skills learn to end it
   SAC with (s, z) as its state, r as its reward and a fixed alpha, the weight of H[A | S, Z] (eq. 2)
Control, skills do not change any more. Repeat:
   act: every skill_horizon env steps z ~ softmax(Q(s, .) / alpha); a ~ pi(s, z)
   Q_i(s, z) -> R + gamma V(s'), R the task's reward in that time, V(s) = alpha log mean_z exp(min_i Q_i(s, z) / alpha)
Only true ends have no future, time-outs have one.

DEVIATION n from paper and release, whose loss and reward come out equal (why, scores: algos/docs/diayn.md): 1 sac.py's
tanh Gaussian, two critics and weights to start from (release: a mixture of 4 Gaussians, one critic and a value network,
Xavier); 2 E environments, fewer updates; 3 the discriminator sees where things are (the paper's "DIAYN+prior"); s_t as
in the release, not s_{t+1} as in Algorithm 1; 4 shorter episodes in the maze's discovery, a skill for each (release:
epoch), uniform actions at first; 5 sines of positions; 6 control: 5 updates per choice (maze: 50).
Differs from skimo.py in: Args, TASK_DEFAULTS, Inputs, policy_loss, ReplayBuffer, Agent, rollout, train, evaluate,
    parse_args
Shapes: B batch, O observation, F inputs, A action, Z skills (z is one-hot), E environments.
"""

import copy
import gc
import io
import json
import math
import os
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
    total_timesteps: int = 300_000  # env steps of discovery and control
    seed: int = 1  # of networks, sampling and environments (the i-th: seed + i)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and act
    resume: str | None = None  # run folder to go on with, with its arguments
    evaluate: str | None = None  # only evaluate this checkpoint
    capture_video: bool = False  # with --evaluate: record its first episode as MP4

    # Seldom changed
    run_dir: str = "runs"  # folder of the run folders
    cudagraphs: bool = True  # on a GPU, replay updates as CUDA graphs: one launch in place of hundreds
    threads: int = 0  # of PyTorch on the CPU (0: one or up to eight, whichever is faster at first)
    checkpoint_interval: int = 50_000  # env steps between checkpoints
    eval_interval: int = 100_000  # env steps between evaluations, in control; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode

    # Discovery of skills
    discover_steps: int = 200_000  # env steps without the task's reward, warm-up included; control has the rest
    discover_length: int = 1_000  # env steps of an episode in discovery, at most (DEVIATION 4)
    skill_dim: int = 20  # number of skills Z (release: 50)
    subtract_log_p_z: bool = True  # - log p(z) = log Z in the reward
    disc_obs: Literal["positions", "all"] = "positions"  # what the discriminator sees: DISC_ENTRIES or all of s
    alpha: float = 0.1  # weight of the entropy of actions

    # Control
    skill_horizon: int = 10  # env steps per skill
    controller_alpha: float = 0.1  # weight of the entropy of skills, in scaled rewards
    controller_dim: int = 256  # width of hidden layers of the controller
    reward_scale: float = 1.0  # factor on the task's reward

    # Both
    num_envs: int = 8  # environments side by side (DEVIATION 2)
    warmup_steps: int = 1_000  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.5  # gradient updates per env step after the warm-up (release: 1)
    batch_size: int = 128  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept of each phase
    learning_rate: float = 3e-4  # of all networks
    gamma: float = 0.99  # discount per env step in discovery, per skill in control
    tau: float = 0.01  # share of the online weights in a target update, after each update
    hidden_dim: int = 300  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 5)

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, controller_alpha=1e-6, buffer_size=self.num_envs)
        most = dict(gamma=1, tau=1, warmup_steps=self.discover_steps - 1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data. Rewards of 100 become 1, so that one controller_alpha serves all tasks.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01, discover_length=400, skill_horizon=100),
    "kitchen": dict(total_timesteps=200_000, discover_steps=130_000),
    "calvin": dict(reward_scale=0.01),
}
# DEVIATION 3: first entry of an observation that the discriminator sees, and one past the last: the maze's position,
# the kitchen's objects, CALVIN's slider, drawer, button, switch and lights. Joints and velocities would let it tell
# skills apart by how an arm trembles.
DISC_ENTRIES = {"maze": (0, 2), "kitchen": (9, 30), "calvin": (15, 21)}
# Factor on these entries: what is far apart must look so, 5 cells in the maze, .2 m of slider and drawer on CALVIN.
DISC_SCALE = {"maze": 8.0, "calvin": 5.0}


# ------------------------------------------------------------------------------------------------------------ networks
def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Inputs(nn.Module):
    """Observations (..., O), scaled, with sines and cosines of positions -> inputs (..., F) of networks, F = size.

    Observations may end in a one-hot skill, which stays as it is; then O counts both.
    """

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        task = data_tools.TASKS[args.env_id]
        periods = task.position_periods if args.position_features else np.zeros((0, 0))
        scale, shift = torch.ones(obs_dim), torch.zeros(obs_dim)
        for vector, known in ((scale, task.obs_scale or ()), (shift, task.obs_shift or ())):
            vector[: len(known)] = torch.tensor(known)
        self.register_buffer("scale", scale)  # (O,)
        self.register_buffer("shift", shift)  # (O,)
        self.register_buffer("frequency", torch.tensor(2 * np.pi / periods, dtype=torch.float32))  # (places, periods)
        self.size = obs_dim + 2 * periods.size

    def forward(self, obs):
        position = obs[..., : len(self.frequency), None]  # (..., places, 1)
        phase = (position * self.frequency).flatten(-2)
        return torch.cat([obs * self.scale + self.shift, phase.sin(), phase.cos()], -1)  # (..., F)


class Actor(nn.Module):
    """Policy pi(a | s): the tanh of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        self.net = relu_mlp(self.inputs.size, u, u, 2 * action_dim)

    def forward(self, obs):
        """Observations (..., O) -> mean and std before the tanh, 2 x (..., A); the std lies within e^-5 to e^2."""
        mean, raw = self.net(self.inputs(obs)).chunk(2, -1)
        log_std = -5 + 3.5 * (torch.tanh(raw) + 1)
        return mean, log_std.exp()

    def sample(self, obs):
        """A reparameterised action (..., A) in (-1, 1) and its log-probability (...)."""
        mean, std = self(obs)
        noise = torch.randn_like(mean)
        x = mean + std * noise
        log_prob = -0.5 * noise.square() - std.log() - 0.5 * math.log(2 * math.pi)
        # The tanh squeezes: minus log(1 - tanh(x)^2), in a form that does not overflow
        log_slope = 2 * (math.log(2) - x - nn.functional.softplus(-2 * x))
        return torch.tanh(x), (log_prob - log_slope).sum(-1)


class TwinQ(nn.Module):
    """Q_1 and Q_2 of observations (..., O) and actions (..., A) -> 2 x (...)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        in_dim = self.inputs.size + action_dim
        self.qf1 = relu_mlp(in_dim, u, u, 1)
        self.qf2 = relu_mlp(in_dim, u, u, 1)

    def forward(self, obs, action):
        x = torch.cat([self.inputs(obs), action], -1)
        return self.qf1(x).squeeze(-1), self.qf2(x).squeeze(-1)


class Discriminator(nn.Module):
    """log q(z | s) of all skills: observations (..., O) -> (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        data = data_tools.TASKS[args.env_id].data if args.disc_obs == "positions" else None
        first, last = DISC_ENTRIES.get(data, (0, obs_dim))
        self.scale = DISC_SCALE.get(data, 1.0)
        self.seen = slice(first, last)
        self.net = relu_mlp(last - first, u, u, args.skill_dim)

    def forward(self, obs):
        scaled = self.inputs(obs)[..., self.seen]  # without sines: the first O of F inputs
        return self.net(self.scale * scaled).log_softmax(-1)


class TwinSkillQ(nn.Module):
    """Q_1 and Q_2 of all skills, the controller: observations (..., O) -> 2 x (..., Z)."""

    def __init__(self, obs_dim: int, args: Args):
        super().__init__()
        u = args.controller_dim  # width
        self.inputs = Inputs(obs_dim, args)
        self.qf1 = relu_mlp(self.inputs.size, u, u, args.skill_dim)
        self.qf2 = relu_mlp(self.inputs.size, u, u, args.skill_dim)

    def forward(self, obs):
        x = self.inputs(obs)
        return self.qf1(x), self.qf2(x)


# -------------------------------------------------------------------------------------------------------------- losses
def discriminator_loss(discriminator, obs, z, subtract_log_p_z: bool):
    """Discriminator: guess from a state which skill led there; the better it can, the more is the skill paid (eq. 3).

    obs (B, O), z (B, Z) one-hot. Returns the loss, the skills' rewards (B,) by the discriminator as it is now, and
    metrics. With log p(z) taken off, a perfect guess gives log Z, a blind one 0.
    """
    log_q = discriminator(obs)  # (B, Z)
    log_q_z = (log_q * z).sum(-1)  # (B,)
    loss = -log_q_z.mean()
    rewards = log_q_z.detach()
    if subtract_log_p_z:
        rewards = rewards + math.log(z.shape[-1])  # p(z) = 1 / Z
    correct = log_q.argmax(-1) == z.argmax(-1)
    metrics = dict(discriminator_loss=loss, discriminator_accuracy=correct.float(), skill_reward=rewards)
    return loss, rewards, {name: value.detach().mean() for name, value in metrics.items()}


def soft_critic_loss(critics, target, actor, obs, action, rewards, next_obs, discount, alpha):
    """TD loss of both critics (SAC eq. 5, 6): a state is worth its reward plus the soft value of where it leads.

    obs, next_obs (B, O), action (B, A), rewards (B,) on the way to next_obs, discount (B,) of its value, 0 at a true
    end, alpha (). Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        next_action, log_prob = actor.sample(next_obs)
        next_q = torch.min(*target(next_obs, next_action))  # (B,)
        td_target = rewards + discount * (next_q - alpha * log_prob)  # (B,)
    q1, q2 = critics(obs, action)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * error.mean()
    metrics = dict(value_loss=loss, q_value=q1, td_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def policy_loss(critics, actor, obs, alpha):
    """Policy (SAC eq. 9): prefer actions that the critics like, but stay as random as that allows.

    obs (B, O), alpha (). Returns the loss and metrics; metrics["entropy"] is the mean entropy in nats.
    """
    action, log_prob = actor.sample(obs)  # (B, A), (B,)
    q_value = torch.min(*critics(obs, action))  # (B,)
    loss = (alpha * log_prob - q_value).mean()
    metrics = dict(policy_loss=loss, policy_q=q_value, entropy=-log_prob)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


def soft_value(q, alpha: float):
    """V = alpha log mean_z exp(Q / alpha): Q (..., Z) -> (...). The mean, not the sum: entropy is counted from that of
    a uniform choice, so that skills which are all alike are worth as much as one of them.
    """
    return alpha * (torch.logsumexp(q / alpha, -1) - math.log(q.shape[-1]))


def controller_loss(controller, target, obs, z, rewards, next_obs, discount, alpha: float):
    """TD loss of the controller: soft Q-learning. Q-learning with a soft maximum tries all skills that may be best.

    obs, next_obs (B, O) k env steps apart, z (B, Z) one-hot, rewards (B,) summed over these, discount (B,), 0 at a
    true end. Of two Q the smaller counts: a maximum believes what one overrates, and values of one Q alone ran away.
    Returns the loss and metrics, scalars.
    """
    with torch.no_grad():
        next_q = torch.min(*target(next_obs))  # (B, Z)
        td_target = rewards + discount * soft_value(next_q, alpha)  # (B,)
    q1, q2 = [(q * z).sum(-1) for q in controller(obs)]  # (B,)
    error = (q1 - td_target).square() + (q2 - td_target).square()
    loss = 0.5 * error.mean()
    metrics = dict(controller_loss=loss, controller_q=q1, controller_target=td_target)
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------------ RL
class ReplayBuffer:
    """The last buffer_size transitions, over an env step or over a skill, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.args = args
        sizes = (obs_dim,), (action_dim,), (args.skill_dim,), (), (obs_dim,), ()  # as `sample` returns them
        self.columns = [torch.zeros(args.buffer_size, *size, device=args.device) for size in sizes]
        self.added = 0  # rows ever added

    def __len__(self):
        return min(self.added, self.args.buffer_size)

    def add(self, obs, action, z, rewards, terminations, next_obs):
        """Transitions of n environments, NumPy: obs, next_obs (n, O), action (n, A), z (n, Z), the others (n,).

        A time-out is no end: the value of next_obs counts.
        """
        discount = self.args.gamma * (1.0 - terminations)
        index = torch.arange(self.added, self.added + len(obs), device=self.args.device) % self.args.buffer_size
        for column, values in zip(self.columns, (obs, action, z, rewards, next_obs, discount)):
            column[index] = torch.as_tensor(values, dtype=torch.float32, device=self.args.device)
        self.added += len(obs)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), z (B, Z), rewards (B,), next_obs (B, O), discount (B,)."""
        index = torch.randint(len(self), (batch_size,), device=self.args.device)
        return [column[index] for column in self.columns]

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
    """Skills, their critics with slow copies, discriminator, controller with its slow copy, and gradient steps."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim + args.skill_dim, action_dim, args)
        self.critics = TwinQ(obs_dim + args.skill_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.discriminator = Discriminator(obs_dim, args)
        self.controller = TwinSkillQ(obs_dim, args)
        self.controller_target = copy.deepcopy(self.controller).requires_grad_(False)
        self.to(args.device)
        options = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.actor.parameters(), **options)
        self.discriminator_optimizer = torch.optim.Adam(self.discriminator.parameters(), **options)
        self.controller_optimizer = torch.optim.Adam(self.controller.parameters(), **options)
        self.update = Recorded(self.update, args)
        self.update_controller = Recorded(self.update_controller, args)

    @torch.no_grad()
    def choose_skills(self, obs, explore: bool):
        """The controller's choice, z ~ softmax(Q / alpha) or the best: obs (E, O) -> z (E, Z), both NumPy."""
        q = torch.min(*self.controller(torch.from_numpy(obs).to(self.args.device)))  # (E, Z)
        choice = q.argmax(-1)
        if explore:
            choice = (q / self.args.controller_alpha).softmax(-1).multinomial(1).squeeze(-1)
        return np.eye(self.args.skill_dim, dtype=np.float32)[choice.cpu().numpy()]

    @torch.no_grad()
    def act(self, obs, z, explore: bool):
        """A sample of skills or their mode: obs (E, O), z (E, Z) -> actions (E, A), all NumPy."""
        state = torch.from_numpy(np.concatenate([obs, z], -1))
        mean, std = self.actor(state.to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    def update(self, obs, action, z, rewards, next_obs, discount) -> dict:
        """Discovery: one step of discriminator, critics, policy and slow copies on a batch; returns metrics.

        The task's rewards play no part. Those of the skills come from the discriminator of now: it changes, so they
        must not be kept in the replay.
        """
        args = self.args
        loss, rewards, metrics = discriminator_loss(self.discriminator, obs, z, args.subtract_log_p_z)
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()

        state = torch.cat([obs, z], -1)  # (B, O + Z)
        next_state = torch.cat([next_obs, z], -1)  # the skill stays
        batch = state, action, rewards, next_state, discount
        loss, critic_metrics = soft_critic_loss(self.critics, self.target, self.actor, *batch, args.alpha)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(self.critics, self.actor, state, args.alpha)
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)

        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critics.parameters()), args.tau)
        parts = self.discriminator, self.critics, self.actor
        norms = [nn.utils.get_total_norm([weight.grad for weight in part.parameters()]) for part in parts]
        return dict(metrics, **critic_metrics, **policy_metrics, grad_norm=sum(norms))

    def update_controller(self, obs, action, z, rewards, next_obs, discount) -> dict:
        """Control: one step of the controller and its slow copy on a batch of transitions over skills.

        Their actions are not kept, (B, 0). Returns metrics.
        """
        args, batch = self.args, (obs, z, rewards, next_obs, discount)
        loss, metrics = controller_loss(self.controller, self.controller_target, *batch, args.controller_alpha)
        self.controller_optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.get_total_norm([weight.grad for weight in self.controller.parameters()])
        self.controller_optimizer.step()
        with torch.no_grad():
            weights = list(self.controller_target.parameters()), list(self.controller.parameters())
            torch._foreach_lerp_(*weights, args.tau)
        return dict(metrics, grad_norm=grad_norm)


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, with the best skills and their mode."""
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    obs, _ = envs.reset(seed=seed)
    ended = np.zeros(num_episodes, dtype=bool)
    while not ended.all():
        if envs.steps.max() % args.skill_horizon == 0:  # all that have not ended are as far
            z = agent.choose_skills(obs, explore=False)
        obs, _, terminations, truncations, _ = envs.step(agent.act(obs, z, explore=False))
        ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """A run, or the rest of it; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.discover_steps, args.updates_per_step)  # of the controller
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
    rb = ReplayBuffer(obs.shape[1], action_dim, args)  # env steps of discovery
    choices = ReplayBuffer(obs.shape[1], 0, args)  # skills that the controller chose, without the actions
    z = np.zeros((args.num_envs, args.skill_dim), dtype=np.float32)  # (E, Z) skills that run
    first_obs = obs.copy()  # (E, O) where they began
    skill_rewards = np.zeros(args.num_envs)  # (E,) of the task, since then
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, choices=choices)
    parts |= dict(critics=agent.critic_optimizer, policy=agent.policy_optimizer)
    parts |= dict(discriminator=agent.discriminator_optimizer, controller=agent.controller_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts)
        z, first_obs, skill_rewards = [values.numpy() for values in state["running"]]
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
            # ALGO LOGIC: put action logic here. In discovery a skill lasts an episode, then skill_horizon env steps
            discovering = global_step < args.discover_steps
            begins = envs.steps % args.skill_horizon == 0  # (E,)
            first_obs[begins] = obs[begins]
            skill_rewards[begins] = 0
            if discovering:
                begins = envs.steps == 0
                chosen = torch.randint(args.skill_dim, (args.num_envs,)).numpy()
                z[begins] = np.eye(args.skill_dim)[chosen[begins]]
            elif begins.any():
                z[begins] = agent.choose_skills(obs, explore=True)[begins]
            if global_step < args.warmup_steps:
                action = 2 * torch.rand(args.num_envs, action_dim).numpy() - 1  # (E, A)
            else:
                action = agent.act(obs, z, explore=True)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            skill_rewards += args.reward_scale * rewards
            if discovering:
                truncations = truncations | (envs.steps >= args.discover_length)
                rb.add(obs, action, z, rewards, terminations, next_obs)
            else:
                ends = terminations | truncations | (envs.steps % args.skill_horizon == 0)  # (E,)
                columns = first_obs, action[:, :0], z, skill_rewards, terminations, next_obs
                choices.add(*[column[ends] for column in columns])
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

            # ALGO LOGIC: training
            updates_due = int((global_step - args.warmup_steps) * args.updates_per_step)
            while gradient_step < updates_due and (discovering or len(choices)):
                if discovering:
                    metrics = agent.update(*rb.sample(args.batch_size))
                else:
                    metrics = agent.update_controller(*choices.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without exploration; in discovery there is no controller yet
            finished = global_step >= args.total_timesteps
            if finished or (not discovering and global_step % args.eval_interval < new_steps):
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                running = [torch.from_numpy(values) for values in (z, first_obs, skill_rewards)]
                save(checkpoint, state | dict(running=running, progress=progress), parts)
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


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, whose defaults are those of the task, or of the run or agent given."""
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
