"""Option-Critic (Bacon et al. 2017), https://arxiv.org/abs/1609.05140: options that are learnt from the reward alone

Idea: an option w is a policy pi_w(a | s) with an end of its own, beta_w(s) in [0, 1]; all options are available
everywhere. Policies and ends follow the gradient of the return; a critic over states and options tells how good they
are, a policy over options prefers the best one.

    python algos/option_critic.py --env-id maze           # RL and evaluation
    python algos/option_critic.py --resume runs/FOLDER    # go on after Ctrl-C or a crash
    python algos/option_critic.py --four-rooms            # the paper's example, in tables: minutes

Repeat, with V(s) the value of choosing an option anew:
   act: a ~ pi_w(s); then w ends with probability beta_w(s'), and one is chosen anew
   U(w, s') = (1 - beta_w(s')) Q(s', w) + beta_w(s') V(s') (eq. 3): the value of arriving with an option
   critic: Q(s, w) -> r + gamma U(w, s') (eq. 1, 2)
   policies: up the gradient of log pi_w(a | s) times what a is better than Q(s, w) (theorem 1)
   ends: down the gradient of beta_w(s') times what w is better than V(s') (theorem 2)
In tables this is Algorithm 1. On the tasks it is A2OC (Harb et al. 2018, https://arxiv.org/abs/1709.04571):
E environments times T env steps per update, returns over them, and a deliberation cost, which is paid when an option
ends by itself and keeps options alive.

DEVIATION n from paper and A2OC (why, scores: algos/docs/option_critic.md): 1 Gaussians for actions, Adam (A2OC:
RMSProp), networks, beta = .12 and Q near 0 at first; 2 sines of positions as inputs; 3 in tables the noise of the
release: a move is followed by a slip (--paper-slip: a slip in place of the move); 4 softmax of both levels at .01
(paper: .001), whose gradient leaves out 1 / .01, as there; 5 policy and end move with the option that acted, as in
Algorithm 1 (release: with the next option and action); 6 gamma discounts the deliberation cost (A2OC: it does not); 7
own ends cut returns at once (A2OC: after 5 steps), time limits are no ends, a constant rate, gradients <= .5 (40).
In the release's four rooms, its learners called in Algorithm 1's order, all tables were equal but for rounding.
Differs from skimo.py in: Args, TASK_DEFAULTS, RolloutBuffer, Agent, rollout, train, evaluate, parse_args
Shapes: B = (E, T) env steps, O observation, F inputs, A action, W options, E environments, T env steps per update; in
tables R runs side by side, S states.
"""

import gc
import io
import json
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
    total_timesteps: int = 300_000  # env steps
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
    eval_episodes: int = 20  # episodes of an evaluation: options end by chance, actions are means

    # RL
    num_envs: int = 8  # environments side by side
    batch_size: int = 256  # env steps per update, of all environments together; each is used once
    num_options: int = 4  # W: number of options
    option_epsilon: float = 0.1  # share of options that are chosen at random
    deliberation_cost: float = 0.01  # price of an option's own end, in scaled reward (DEVIATION 6)
    entropy_coef: float = 0.01  # weight of the entropy of actions
    learning_rate: float = 7e-4  # of the networks
    max_grad_norm: float = 0.5  # a larger gradient is shortened
    gamma: float = 0.99  # discount per env step
    reward_scale: float = 1.0  # factor on the task's reward
    hidden_dim: int = 64  # width of hidden layers
    position_features: bool = True  # sines and cosines of positions as inputs (DEVIATION 2)

    # Four rooms. Of the arguments above only seed, gamma, num_options and run_dir count.
    four_rooms: bool = False  # learn the paper's example in tables, and no task
    paper_slip: bool = False  # a slip replaces the move, as in the paper; else it follows it (DEVIATION 3)
    num_runs: int = 20  # side by side
    num_episodes: int = 2_000  # the goal moves after half of them

    def __post_init__(self):  # refuse what would train wrongly without a word
        least = dict(seed=0, threads=0, num_episodes=2)
        most = dict(gamma=1, option_epsilon=1)
        for name, value in vars(self).items():
            low = least.get(name, 1 if type(value) is int else 0)
            high = most.get(name, 2**31)
            if type(value) in (int, float) and not low <= value <= high:  # nor NaN
                sys.exit(f"error: --{name} {value} does not work: give {low} to {high}")
        if self.batch_size % self.num_envs:
            sys.exit("error: --batch-size is no multiple of --num-envs")


# By the name of a task's data. Rewards of 100 are scaled to 1, so that one deliberation cost serves all tasks.
TASK_DEFAULTS = {
    "maze": dict(reward_scale=0.01),
    "kitchen": dict(total_timesteps=200_000),
    "calvin": dict(reward_scale=0.01),
}


# ------------------------------------------------------------------------------------------------------------ networks
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


class OptionModel(nn.Module):
    """Q(s, w), beta_w(s) and the mean of pi_w(a | s), a Gaussian, of all options (DEVIATION 1)."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        u = args.hidden_dim  # width
        self.inputs = Inputs(obs_dim, args)
        self.net = nn.Sequential(nn.Linear(self.inputs.size, u), nn.Tanh(), nn.Linear(u, u), nn.Tanh())
        self.q = nn.Linear(u, args.num_options)
        self.beta = nn.Linear(u, args.num_options)
        self.mean = nn.Linear(u, args.num_options * action_dim)
        self.log_std = nn.Parameter(torch.full((args.num_options, action_dim), -0.5))
        gains = {self.net[0]: 2**0.5, self.net[2]: 2**0.5, self.q: 0.01, self.beta: 0.01, self.mean: 0.01}
        for layer, gain in gains.items():
            nn.init.orthogonal_(layer.weight, gain)
            nn.init.zeros_(layer.bias)
        nn.init.constant_(self.beta.bias, -2.0)  # options last 8 env steps to begin with

    def forward(self, obs):
        """Observations (..., O) -> Q (..., W), beta (..., W), means (..., W, A)."""
        h = self.net(self.inputs(obs))
        beta = torch.sigmoid(self.beta(h.detach()))  # ends follow the critic, they do not shape what it sees
        mean = self.mean(h).unflatten(-1, self.log_std.shape)
        return self.q(h), beta, mean


# -------------------------------------------------------------------------------------------------------------- losses
def arrival_value(own_q, value, beta):
    """U(w, s') (eq. 3): the option goes on, or it ends and one is chosen anew. Arrays or tensors of one shape."""
    return (1 - beta) * own_q + beta * value


def of_option(values, option):
    """The entry of the option that acts: values (..., W), option (...) -> (...)."""
    return values.gather(-1, option[..., None]).squeeze(-1)


def option_returns(rewards, terminations, truncations, begins, arrival, chosen, gamma: float):
    """Returns G (E, T): the rewards that came while the option acted, and then what is expected. All (E, T).

    arrival: U(w, s'), which counts at the batch's end and by a time-out; chosen: V(s') less the deliberation cost,
    which counts where the option ended by itself: the next step chose one anew. After a true end: nothing.
    """
    rest = arrival[:, -1]
    returns = []
    for t in reversed(range(rewards.shape[1])):
        rest = torch.where(truncations[:, t], arrival[:, t], rest)
        rest = torch.where(terminations[:, t], 0.0, rest)
        value = rewards[:, t] + gamma * rest  # (E,) of step t
        returns.append(value)
        rest = torch.where(begins[:, t], chosen[:, t - 1], value)  # for step t - 1
    return torch.stack(returns[::-1], 1)


def option_critic_loss(model, obs, action, option, begins, rewards, terminations, truncations, next_obs, args: Args):
    """Critic, policies and ends (A2OC): E environments, T env steps; obs, next_obs (E, T, O), action (E, T, A), the
    others (E, T); begins: the option was chosen at this step. Returns the loss and metrics, scalars.
    """
    q, _, mean = model(obs)  # (E, T, W), _, (E, T, W, A)
    next_q, next_beta, _ = model(next_obs)
    next_q = next_q.detach()
    own_q = of_option(q, option)  # (E, T)
    next_own_q = of_option(next_q, option)
    next_own_beta = of_option(next_beta, option)
    with torch.no_grad():
        best = next_q.max(-1).values
        next_value = best + args.option_epsilon * (next_q.mean(-1) - best)  # V(s') of who chooses epsilon-greedily
        chosen = next_value - args.deliberation_cost  # DEVIATION 6: what is discounted
        arrival = arrival_value(next_own_q, chosen, next_own_beta)  # eq. 3
        returns = option_returns(rewards, terminations, truncations, begins, arrival, chosen, args.gamma)
        advantage = returns - own_q

    # Critic: Q(s, w) is the mean of the returns (eq. 1, 2)
    critic_loss = 0.5 * (own_q - returns).square().mean()

    # Policies: prefer actions that brought more than Q(s, w) (theorem 1), and stay random
    own_mean = mean.take_along_dim(option[..., None, None], -2).squeeze(-2)  # (E, T, A)
    policy = torch.distributions.Normal(own_mean, model.log_std.exp()[option], validate_args=False)
    policy_loss = -(advantage * policy.log_prob(action).sum(-1)).mean()
    entropy = policy.entropy().sum(-1).mean()

    # Ends: an option goes on where it is better than a new choice, whose cost counts for it (theorem 2)
    going_on = next_own_q - next_value + args.deliberation_cost
    beta_loss = (next_own_beta * going_on * ~terminations).mean()
    loss = critic_loss + policy_loss - args.entropy_coef * entropy + beta_loss
    metrics = dict(value_loss=critic_loss, policy_loss=policy_loss, beta_loss=beta_loss, entropy=entropy)
    metrics |= dict(q_value=own_q.mean(), beta=next_own_beta.mean(), choices_per_step=begins.float().mean())
    return loss, {name: value.detach() for name, value in metrics.items()}


# ------------------------------------------------------------------------------------------------------------------ RL
class RolloutBuffer:
    """The last T env steps of every environment, on the CPU; on-policy: they go to the device once, for one update."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        self.device = args.device
        E, T = args.num_envs, args.batch_size // args.num_envs
        sizes = dict(obs=[obs_dim], action=[action_dim], option=[], begins=[], rewards=[])
        sizes |= dict(terminations=[], truncations=[], next_obs=[obs_dim])
        kinds = dict(option=torch.long, begins=torch.bool, terminations=torch.bool, truncations=torch.bool)
        self.columns = {name: torch.zeros(E, T, *size, dtype=kinds.get(name)) for name, size in sizes.items()}
        self.added = 0  # env steps of each environment, ever

    def add(self, **step):
        """An env step of every environment, NumPy: obs, next_obs (E, O), action (E, A), the others (E,)."""
        for name, column in self.columns.items():
            column[:, self.added % column.shape[1]] = torch.from_numpy(step[name])
        self.added += 1

    def sample(self, batch_size: int):
        """All T env steps, in order once T were added: obs (E, T, O), action (E, T, A), the others (E, T) or as obs."""
        T = batch_size // len(self.columns["obs"])
        return [column[:, :T].to(self.device) for column in self.columns.values()]

    def state_dict(self) -> dict:
        return dict(self.columns, added=torch.tensor(self.added))

    def load_state_dict(self, state: dict):
        self.added = int(state["added"])
        self.columns = {name: state[name] for name in self.columns}


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
    """Options with their critic, and one gradient step."""

    def __init__(self, args: Args, obs_dim: int, action_dim: int):
        super().__init__()
        self.args = args
        self.model = OptionModel(obs_dim, action_dim, args)
        self.to(args.device)
        options = dict(lr=args.learning_rate, eps=1e-5, fused=True, capturable=True)
        self.optimizer = torch.optim.Adam(self.model.parameters(), **options)
        self.update = Recorded(self.update, args)

    @torch.no_grad()
    def act(self, obs, option, begins, explore: bool):
        """Options end or go on, then act: obs (E, O), option (E,) of before, begins (E,): an episode does.

        Returns actions (E, A), options (E,), and which were chosen now (E,); all are NumPy.
        """
        q, beta, mean = [x.cpu() for x in self.model(torch.from_numpy(obs).to(self.args.device))]
        option = torch.from_numpy(option)
        begins = torch.from_numpy(begins) | (torch.rand(len(obs)) < of_option(beta, option))
        chosen = q.argmax(-1)
        if explore:
            other = torch.randint(q.shape[-1], chosen.shape)
            chosen = torch.where(torch.rand(len(obs)) < self.args.option_epsilon, other, chosen)
        option = torch.where(begins, chosen, option)
        action = mean[torch.arange(len(obs)), option]
        if explore:
            std = self.model.log_std.exp().cpu()[option]
            action = action + std * torch.randn_like(action)
        return action.numpy(), option.numpy(), begins.numpy()

    def update(self, obs, action, option, begins, rewards, terminations, truncations, next_obs) -> dict:
        """One step of everything on the last env steps; returns metrics."""
        batch = obs, action, option, begins, rewards, terminations, truncations, next_obs
        loss, metrics = option_critic_loss(self.model, *batch, self.args)
        self.optimizer.zero_grad()
        loss.backward()
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
        self.optimizer.step()
        return dict(metrics, grad_norm=grad_norm)


def rollout(agent: Agent, args: Args, num_episodes: int, seed: int, video: Path | None = None):
    """Scores of an episode in each of num_episodes environments, with random numbers of its own: options end by chance,
    the best one follows and acts by its mean.
    """
    envs = data_tools.make_envs(args.env_id, num_episodes, video)
    with torch.random.fork_rng(["cuda"] if args.device == "cuda" else []):
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        option = np.zeros(num_episodes, dtype=np.int64)
        ended = np.zeros(num_episodes, dtype=bool)
        while not ended.all():
            action, option, _ = agent.act(obs, option, envs.steps == 0, explore=False)
            obs, _, terminations, truncations, _ = envs.step(action)
            ended = terminations | truncations
    envs.close()
    success = data_tools.TASKS[args.env_id].success(envs.returns)
    return dict(episodic_return=float(envs.returns.mean()), episodic_length=float(envs.steps.mean()), success=success)


def train(args: Args) -> dict:
    """A run, or the rest of it; returns its results."""
    if args.four_rooms:
        return report_four_rooms(args)
    task = data_tools.TASKS[args.env_id]
    envs = data_tools.make_envs(args.env_id, args.num_envs)
    data_tools.check_settings(args, args.batch_size)
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
    rb = RolloutBuffer(obs.shape[1], action_dim, args)
    option = np.zeros(args.num_envs, dtype=np.int64)  # (E,) those that act
    global_step, gradient_step, seconds = 0, 0, 0.0
    episodes, evaluations = [], []  # (env step, return, length, minutes), (env step, mean return, success)
    parts = dict(agent=agent, rb=rb, optimizer=agent.optimizer)
    checkpoint = run_dir / "checkpoint.pt"
    if checkpoint.exists():
        state = load(checkpoint, parts)
        option = state["option"].numpy()
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
            # ALGO LOGIC: put action logic here
            action, option, begins = agent.act(obs, option, envs.steps == 0, explore=True)
            next_obs, rewards, terminations, truncations, _ = envs.step(action)
            step = dict(obs=obs, action=action, option=option, begins=begins, rewards=args.reward_scale * rewards)
            rb.add(**step, terminations=terminations, truncations=truncations, next_obs=next_obs)
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
            if global_step % args.batch_size == 0:
                metrics = agent.update(*rb.sample(args.batch_size))
                gradient_step += 1
                if gradient_step % 10 == 0:
                    log(writer, "losses", metrics, global_step)

            # Evaluate without exploration
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
                save(checkpoint, state | dict(option=torch.from_numpy(option), progress=progress), parts)
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


# ---------------------------------------------------------------------------------------------------------- four rooms
FOUR_ROOMS = """
#############
#     #     #
#     #     #
#           #
#     #     #
#     #     #
## ####     #
#     ### ###
#     #     #
#     #     #
#           #
#     #     #
#############
"""
FIRST_GOAL = 62
LATER_GOALS = [*range(68, 73), *range(78, 83), *range(88, 94), *range(99, 104)]  # the lower right room


def four_rooms(paper_slip: bool):
    """P(s' | s, a) of the four rooms, (S, 4, S). With probability 1/3 one slips to a random free neighbour."""
    free = np.array([[cell == " " for cell in row] for row in FOUR_ROOMS.strip("\n").split("\n")])
    cells = np.argwhere(free)  # (S, 2)
    number = np.full(free.shape, -1)
    number[free] = np.arange(len(cells))
    moves = (-1, 0), (1, 0), (0, -1), (0, 1)  # up, down, left, right
    neighbours = np.stack([number[tuple((cells + move).T)] for move in moves], 1)  # (S, 4), -1 for a wall
    certain = np.eye(len(cells))
    slip = np.stack([certain[row[row >= 0]].mean(0) for row in neighbours])  # (S, S)
    blocked = neighbours < 0
    moved = np.where(blocked, np.arange(len(cells))[:, None], neighbours)  # (S, 4)
    if paper_slip:
        return (2 * certain[moved] + slip[:, None]) / 3
    slipped = (2 * certain[moved] + slip[moved]) / 3  # DEVIATION 3
    return np.where(blocked[..., None], certain[moved], slipped)  # who runs into a wall does not slip


def mean_fewest_steps(transitions, goal: int) -> float:
    """Expected steps to the goal of the best policy, mean over all starts, by value iteration: nobody can do better."""
    steps = np.zeros(len(transitions))
    for _ in range(1_000):
        steps = 1 + (transitions @ steps).min(-1)
        steps[goal] = 0
    return steps.sum() / (len(transitions) - 1)


def softmax(x):
    """Probabilities (..., n) of preferences."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw_index(rng, probabilities):
    """An index (...) by probabilities (..., n)."""
    u = rng.random((*probabilities.shape[:-1], 1))
    return (probabilities.cumsum(-1) < u).sum(-1).clip(max=probabilities.shape[-1] - 1)


class Tables:
    """Options and critics of R runs in tables, and a step of learning (Algorithm 1)."""

    critic_lr = 0.5
    policy_lr = 0.25
    beta_lr = 0.25
    temperature = 0.01  # of both softmaxes (DEVIATION 4)

    def __init__(self, num_runs: int, num_states: int, num_options: int, num_actions: int, gamma: float):
        sizes = num_runs, num_states, num_options
        self.gamma = gamma
        self.runs = np.arange(num_runs)
        self.q = np.zeros(sizes)  # Q(s, w)
        self.q_action = np.zeros((*sizes, num_actions))  # Q_U(s, w, a)
        self.preference = np.zeros((*sizes, num_actions))  # of actions
        self.beta_logit = np.zeros(sizes)

    def policy(self, s, w):
        """pi_w(. | s), (R, A)."""
        return softmax(self.preference[self.runs, s, w] / self.temperature)

    def beta(self, s, w):
        """beta_w(s), (R,)."""
        return 1 / (1 + np.exp(-self.beta_logit[self.runs, s, w]))

    def choose_option(self, rng, s):
        """Options (R,), nearly always the best ones."""
        return draw_index(rng, softmax(self.q[self.runs, s] / self.temperature))

    def learn(self, s, w, a, rewards, next_s, ends):
        """From a step of each run; all (R,). ends: the goal is reached, and nothing follows."""
        here = self.runs, s, w
        acted = *here, a
        there = self.runs, next_s, w
        going_on = 1 - ends
        beta = self.beta(next_s, w)
        own_q = self.q[there]
        value = self.q[self.runs, next_s].max(-1)  # V(s') of the greedy policy over options
        arrival = arrival_value(own_q, value, beta)
        target = rewards + self.gamma * going_on * arrival  # eq. 2
        self.q_action[acted] += self.critic_lr * (target - self.q_action[acted])
        self.q[here] += self.critic_lr * (target - self.q[here])  # eq. 1, from samples
        # Theorem 1; Q(s, w) as a baseline
        slope = -self.policy(s, w)  # (R, A), of log softmax
        slope[self.runs, a] += 1
        advantage = self.q_action[acted] - self.q[here]
        self.preference[here] += self.policy_lr * advantage[:, None] * slope
        # Theorem 2: options end where another one is better
        slope = beta * (1 - beta)
        advantage = own_q - value
        self.beta_logit[there] -= self.beta_lr * going_on * slope * advantage


def learn_four_rooms(args: Args, num_options: int):
    """R runs side by side: steps of each episode (R, episodes), and how often an option was chosen in it."""
    rng = np.random.default_rng(args.seed)
    transitions = four_rooms(args.paper_slip)
    num_states = len(transitions)
    tables = Tables(args.num_runs, num_states, num_options, 4, args.gamma)
    runs = tables.runs
    steps = np.zeros((args.num_runs, args.num_episodes + 1), dtype=int)  # the last column is for those that are done
    choices = np.zeros_like(steps)
    episode = np.zeros(args.num_runs, dtype=int)
    goal = np.full(args.num_runs, FIRST_GOAL)
    w = np.zeros(args.num_runs, dtype=int)
    s = rng.integers(num_states, size=args.num_runs)
    over = np.ones(args.num_runs, dtype=bool)
    stops = np.ones(args.num_runs, dtype=bool)
    bar = tqdm(desc=f"four rooms, {num_options} options", total=args.num_episodes, unit="episode")
    while episode.min() < args.num_episodes:
        if over.any():  # begin an episode anywhere but at the goal
            begun = rng.integers(num_states - 1, size=args.num_runs)
            begun += begun >= goal
            s = np.where(over, begun, s)
        w = np.where(stops | over, tables.choose_option(rng, s), w)
        choices[runs, episode] += stops | over
        a = draw_index(rng, tables.policy(s, w))
        next_s = draw_index(rng, transitions[s, a])
        ends = next_s == goal
        tables.learn(s, w, a, ends.astype(float), next_s, ends)
        steps[runs, episode] += 1
        stops = rng.random(args.num_runs) < tables.beta(next_s, w)
        over = ends | (steps[runs, episode] == 1_000)
        episode = np.minimum(episode + over, args.num_episodes)
        steps[runs, episode] *= episode < args.num_episodes
        moves = over & (episode == args.num_episodes // 2)
        goal = np.where(moves, rng.choice(LATER_GOALS, args.num_runs), goal)
        s = next_s
        bar.update(int(episode.min()) - bar.n)
    bar.close()
    return steps[:, :-1], choices[:, :-1]


def report_four_rooms(args: Args) -> dict:
    """--four-rooms: learn, print the steps of episodes beside the fewest possible, write them as csv."""
    steps, choices = learn_four_rooms(args, args.num_options)
    transitions = four_rooms(args.paper_slip)
    half = args.num_episodes // 2
    last = max(1, half // 10)
    results = dict(
        before_the_move=steps[:, half - last : half].mean(),
        fewest_before=mean_fewest_steps(transitions, FIRST_GOAL),
        after_the_move=steps[:, half : half + last].mean(),
        at_the_end=steps[:, -last:].mean(),
        fewest_at_the_end=np.mean([mean_fewest_steps(transitions, goal) for goal in LATER_GOALS]),
        option_length=steps.sum() / choices.sum(),
    )
    slip = "_paper_slip" if args.paper_slip else ""
    path = Path(args.run_dir) / f"four_rooms__{args.seed}__{args.num_options}_options{slip}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [np.arange(args.num_episodes), steps.mean(0), steps.sum(0) / choices.sum(0)]
    np.savetxt(path, np.stack(columns, 1), "%.6g", ",", header="episode,steps,option_length", comments="")
    print(f"steps per episode, mean over {args.num_runs} runs of {args.num_options} options:")
    for name, value in results.items():
        print(f"{name.replace('_', ' '):18} {value:.1f}")
    print(f"written: {path}")
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
