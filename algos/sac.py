"""SAC: Soft Actor-Critic (Haarnoja et al. 2018), https://arxiv.org/abs/1812.05905, flat: no skills, no offline data

Idea: an off-policy actor-critic whose policy maximises reward and entropy: it keeps trying several ways. This is the
reference without hierarchy: it explores by single actions and is expected to find no reward in the maze.

    python algos/sac.py --env-id maze           # RL and evaluation
    python algos/sac.py --resume runs/FOLDER    # go on after Ctrl-C or a crash

Repeat:
   act: a ~ pi(s), kept for `repeat` env steps
   critics: Q(s, a) -> r_1 + .. + gamma^(n-1) r_n + gamma^n (min Q'(s', a') - alpha log pi(a' | s')) (eq. 5, 6)
   policy: maximise min Q(s, a) - alpha log pi(a | s) (eq. 9); tune alpha so that the policy's entropy
      becomes -A nats, A being the number of entries of an action
Ends and time-outs are told apart: only a true end has no future.

Run beside CleanRL's SAC on the same numbers: actions, losses and updates are equal but for rounding.
DEVIATION n from the paper (why, scores: algos/docs/sac.md): 1 several environments side by side, fewer
updates per env step; 2 sines of positions as inputs; 3 rewards of 100 are scaled to 1; 4 --n-step leaves out the
entropies of the steps in between, and is not corrected for the older policy that acted.
Differs from skimo.py in: Args, TASK_DEFAULTS, policy_loss, ReplayBuffer, Agent, rollout, train, evaluate, parse_args
Shapes: B batch, O observation, F inputs, A action, E environments.
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
    total_timesteps: int = 1_000_000  # env steps, warm-up included
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
    eval_interval: int = 100_000  # env steps between evaluations; one more at the end
    eval_episodes: int = 20  # episodes of an evaluation, with the policy's mode

    # RL
    num_envs: int = 8  # environments side by side (DEVIATION 1)
    warmup_steps: int = 10_000  # env steps with uniform actions, before updates start
    updates_per_step: float = 0.5  # gradient updates per env step after the warm-up (DEVIATION 1)
    batch_size: int = 256  # transitions per update
    buffer_size: int = 1_000_000  # transitions kept
    learning_rate: float = 3e-4  # of critics, policy and log alpha
    gamma: float = 0.99  # discount per env step
    tau: float = 0.005  # share of the online weights in a target update, after each update
    n_step: int = 1  # rewards that are added up before the critics take over
    repeat: int = 1  # env steps for which an action is kept while exploring, even if its episode ends before
    reward_scale: float = 1.0  # factor on the task's reward
    hidden_dim: int = 256  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 2)

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, warmup_steps=0, buffer_size=self.num_envs * self.n_step)
        most = dict(gamma=1, tau=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")


# By the name of a task's data. DEVIATION 3: rewards of 100 become 1; else alpha, tuned in nats, would have to grow a
# hundredfold.
TASK_DEFAULTS = {"maze": dict(reward_scale=0.01), "calvin": dict(reward_scale=0.01, total_timesteps=2_000_000)}


# ------------------------------------------------------------------------------------------------------------ networks
def relu_mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with ReLU between them, linear output, PyTorch's default weights."""
    layers = []
    for in_dim, out_dim in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(in_dim, out_dim), nn.ReLU()]
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


# -------------------------------------------------------------------------------------------------------------- losses
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


# ------------------------------------------------------------------------------------------------------------------ RL
class ReplayBuffer:
    """The last buffer_size transitions over n env steps, as rows of a ring on the device."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.args = args
        sizes = (obs_dim,), (action_dim,), (), (obs_dim,), ()  # obs, action, rewards, next_obs, discount
        self.columns = [torch.zeros(args.buffer_size, *size, device=args.device) for size in sizes]
        self.added = 0  # rows ever added
        self.running = [[] for _ in range(args.num_envs)]  # the last steps, whose n rewards are not complete yet

    def __len__(self):
        return min(self.added, self.args.buffer_size)

    def add(self, obs, action, rewards, terminations, truncations, next_obs):
        """One env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), the others (E,).

        A time-out is no end: the value of next_obs counts. n steps are cut short where an episode ends.
        """
        rows = []
        for e, running in enumerate(self.running):
            running.append([obs[e].tolist(), action[e].tolist(), 0.0, 1.0])  # sum of rewards, the next one's discount
            for step in running:
                step[2] += step[3] * float(rewards[e])
                step[3] *= self.args.gamma
            ended = terminations[e] or truncations[e]
            complete = len(running) if ended else max(0, len(running) - self.args.n_step + 1)
            for o, a, reward, discount in running[:complete]:
                rows.append((o, a, reward, next_obs[e].tolist(), 0.0 if terminations[e] else discount))
            del running[:complete]
        index = torch.arange(self.added, self.added + len(rows), device=self.args.device) % self.args.buffer_size
        for column, values in zip(self.columns, zip(*rows)):
            column[index] = torch.tensor(values, device=self.args.device)
        self.added += len(rows)

    def sample(self, batch_size: int):
        """Uniform transitions: obs (B, O), action (B, A), rewards (B,), next_obs (B, O), discount (B,)."""
        index = torch.randint(len(self), (batch_size,), device=self.args.device)
        return [column[index] for column in self.columns]

    def state_dict(self) -> dict:
        filled = [column[: len(self)].clone() for column in self.columns]
        return dict(columns=filled, added=self.added, running=self.running)

    def load_state_dict(self, state: dict):
        self.added, self.running = state["added"], state["running"]
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
    """Policy, critics with their slow copies, alpha, and one gradient step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.actor = Actor(obs_dim, action_dim, args)
        self.critics = TwinQ(obs_dim, action_dim, args)
        self.target = copy.deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.target_entropy = -float(action_dim)  # nats
        self.to(args.device)
        options = dict(lr=args.learning_rate, fused=True, capturable=True)
        self.critic_optimizer = torch.optim.Adam(self.critics.parameters(), **options)
        self.policy_optimizer = torch.optim.Adam(self.actor.parameters(), **options)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], **options)
        self.update = Recorded(self.update, args)

    @torch.no_grad()
    def act(self, obs, explore: bool):
        """A sample of the policy or its mode: obs (E, O) -> actions (E, A), both NumPy."""
        mean, std = self.actor(torch.from_numpy(obs).to(self.args.device))
        x = mean + std * torch.randn_like(mean) if explore else mean
        return torch.tanh(x).cpu().numpy()

    def update(self, obs, action, rewards, next_obs, discount) -> dict:
        """One step of critics, policy, alpha and the slow copies on a batch of transitions; returns metrics."""
        alpha = self.log_alpha.exp().detach()
        batch = obs, action, rewards, next_obs, discount
        loss, metrics = soft_critic_loss(self.critics, self.target, self.actor, *batch, alpha)
        self.critic_optimizer.zero_grad()
        loss.backward()
        critic_norm = nn.utils.get_total_norm([weight.grad for weight in self.critics.parameters()])
        self.critic_optimizer.step()

        self.critics.requires_grad_(False)  # their weights need no gradient of the policy loss
        loss, policy_metrics = policy_loss(self.critics, self.actor, obs, alpha)
        self.policy_optimizer.zero_grad()
        loss.backward()
        policy_norm = nn.utils.get_total_norm([weight.grad for weight in self.actor.parameters()])
        self.policy_optimizer.step()
        self.critics.requires_grad_(True)

        # Alpha rises while the policy is less random than target_entropy (eq. 18).
        self.alpha_optimizer.zero_grad()
        (self.log_alpha.exp() * (policy_metrics["entropy"] - self.target_entropy)).backward()
        self.alpha_optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(self.target.parameters()), list(self.critics.parameters()), self.args.tau)
        return dict(metrics, **policy_metrics, alpha=alpha, grad_norm=critic_norm + policy_norm)


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, with the policy's mode."""
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    obs, _ = envs.reset(seed=seed)
    ended = np.zeros(num_episodes, dtype=bool)
    while not ended.all():
        obs, _, terminations, truncations, _ = envs.step(agent.act(obs, explore=False))
        ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """A run, or the rest of it; returns its results."""
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.warmup_steps, args.updates_per_step)
    run_name = f"{args.env_id}__{FILE.stem}__{args.seed}__{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    run_dir = Path(args.resume or f"{args.run_dir}/{run_name}").expanduser()
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))  # two runs never share one
    save(run_dir / "args.json", dict(asdict(args), script=FILE.name))
    writer = SummaryWriter(run_dir)
    stop = data_tools.stop_event()  # Ctrl-C and the like: where all can be saved
    torch.manual_seed(args.seed)
    obs, _ = envs.reset(seed=args.seed)  # (E, O)
    action = np.zeros(envs.action_space.shape, dtype=np.float32)  # (E, A)
    agent = Agent(args, obs.shape[1], action.shape[1])
    rb = ReplayBuffer(obs.shape[1], action.shape[1], args)
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, critics=agent.critic_optimizer)
    parts |= dict(policy=agent.policy_optimizer, alpha=agent.alpha_optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts)
        action = state["action"].numpy()
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
            # ALGO LOGIC: put action logic here. One action for all environments at once, kept for `repeat` env steps
            if (global_step // args.num_envs) % args.repeat == 0:
                if global_step < args.warmup_steps:
                    action = 2 * torch.rand(action.shape).numpy() - 1  # (E, A)
                else:
                    action = agent.act(obs, explore=True)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            rb.add(obs, action, args.reward_scale * rewards, terminations, truncations, next_obs)
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
            while len(rb) > 0 and gradient_step < updates_due:  # with n_step the first rows come later
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 100 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate with the policy's mode
            finished = global_step >= args.total_timesteps
            if finished or global_step % args.eval_interval < new_steps:
                scores = rollout(agent, args, args.eval_episodes, 10_000 + args.seed)
                evaluations.append((global_step, scores["episodic_return"], scores["success"]))
                bar.write(f"env step {global_step}: {log(writer, 'eval', scores, global_step)}")

            # Save all that the future of the run depends on
            stopping = finished or stop.is_set()
            if stopping or global_step % args.checkpoint_interval < new_steps:
                state = dict(script=FILE.name, args=asdict(args), global_step=global_step, envs=envs.get_state())
                progress = global_step, gradient_step, time.time() - start_time, episodes, evaluations
                save(checkpoint, state | dict(action=torch.from_numpy(action), progress=progress), parts)
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
