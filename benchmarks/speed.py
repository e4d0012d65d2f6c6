"""How fast algorithm files are: their real updates, planner, acting, environments and whole training loop.

    python benchmarks/speed.py                                    # skimo.py at the maze's sizes; needs no data
    python benchmarks/speed.py --algos skimo spirl --sizes kitchen --modes eager graphs
    python benchmarks/speed.py --only step --env-id kitchen       # environments alone, in seconds

Networks and data are random and have the shapes of the task. Pre-training is the file's own loop, with its sampling,
logs and target updates. An RL update draws its batch from the file's replay buffer. Skills come from the planner with
K = N or, in files without one, from the task policy. Files without skills have no pre-training, and choose actions: by
the planner (row `plan`) or the policy (row `act`). The training loop is `train` itself on random networks: all
schedules of the real run are shrunk to --loop-steps, so that plan lengths and updates have the mix of the real run;
where a warm-up waits for whole episodes, these are short.
Every number is the median of repeated calls after a warm-up, with CUDA synchronisation. Threads are torch's:
OMP_NUM_THREADS sets them.
"""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import json
import math
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import gymnasium
import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import describe_code, load_algorithm
from data_tools.files import write_atomically

# Entries of an observation and of an action
DIMS = {"maze": (4, 2), "kitchen": (30, 9), "kitchen-misaligned": (30, 9), "calvin": (21, 7)}
RELEASE = ", release's sizes"  # ends the name of a row with the batch or the planner of the authors' release


@dataclass
class Args:
    algos: tuple[str, ...] = ("skimo",)  # names of files in algos/, without .py
    sizes: tuple[Literal["maze", "kitchen", "calvin"], ...] = ("maze",)  # sizes of networks and batches
    modes: tuple[Literal["eager", "graphs"], ...] = (
        ("eager", "graphs") if torch.cuda.is_available() else ("eager",)
    )  # graphs: updates and plans are replayed as CUDA graphs
    only: tuple[Literal["pretrain", "update", "plan", "act", "step", "loop"], ...] = ()  # what to time (empty: all)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    env_id: str = "maze"  # the task whose environments are stepped and on which the loop runs
    plan_envs: tuple[int, ...] = (1, 8, 64)  # environments planned and acted for in one call
    step_envs: tuple[int, ...] = (1, 8, 64)  # environments stepped together
    loop_steps: int = 20_000  # env steps of the whole training loop
    min_seconds: float = 2.0  # least measuring time of a row, and at least five calls
    quick: bool = False  # a check that everything runs: tiny batches and networks; the numbers mean nothing
    out: Path = Path("runs/speed.json")  # where the JSON goes


def check_args(args: Args):
    """End the program with a sentence where arguments cannot work."""
    for name in args.algos:
        if not (ROOT / "algos" / f"{name}.py").is_file():
            known = ", ".join(sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
            sys.exit(f"error: --algos {name} is no file in algos/; there are: {known}")
    if args.env_id not in DIMS:
        sys.exit(f"error: --env-id {args.env_id} is no task; choose one of {', '.join(DIMS)}")
    for name in ("plan_envs", "step_envs"):
        if min(getattr(args, name), default=1) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} needs numbers of at least 1")
    if args.loop_steps < 1:
        sys.exit(f"error: --loop-steps {args.loop_steps} does not work; give at least 1")
    if not 0 < args.min_seconds < math.inf:
        sys.exit(f"error: --min-seconds {args.min_seconds} does not work; give more than 0")
    if not args.algos or not args.modes:
        sys.exit("error: nothing to time; give at least one of --algos and of --modes")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; use --device cpu")


def size_args(algo, size: str, mode: str, args: Args):
    """The algorithm's own arguments at the sizes of a task."""
    result = algo.Args(env_id=size, **algo.TASK_DEFAULTS.get(size, {}))
    result = dataclasses.replace(result, cudagraphs=mode == "graphs", device=args.device)
    if args.quick:
        small = dict(pretrain_batch_size=8, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=4, cem_iters=1)
        small |= dict(updates_per_step=0.02, updates_per_skill=0.2, num_skills=min(3, getattr(result, "num_skills", 1)))
        small |= dict(batch_length=8, imagine_starts=16, mppi_iters=1, imagine_steps=4, demo_rows=100, epochs=0.2)
        small |= dict(hidden_dim=32, model_dim=32, deter_dim=32, encoder_dim=32, latent_dim=32)
        result = replaced(result, small)
    return result


def release_args(algo, config, size: str, args: Args):
    """The same arguments with the release's batch of pre-training and its planner."""
    values = algo.PUBLISHED.get(size, algo.RELEASE)
    values = {name: values[name] for name in ("pretrain_batch_size", "pretrain_skills", "bc_chunks") if name in values}
    values |= dict(num_samples=512, num_elites=64, cem_iters=6)  # in its planner
    if args.quick:
        values |= dict(pretrain_batch_size=8, num_samples=16, num_elites=4)
    return replaced(config, values)


def replaced(config, values: dict):
    """Arguments with those of the values that they have."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if hasattr(config, name)})


# ----------------------------------------------------------------------------------------------- random networks, data
def random_obs(size: str, *shape: int):
    """Observations (*shape, O) in the range of the task."""
    obs = torch.rand(*shape, DIMS[size][0])
    return obs * torch.tensor([40.0, 40.0, 10.0, 10.0]) if size == "maze" else obs


def random_actions(size: str, *shape: int):
    """Actions (*shape, A) in [-1, 1]."""
    return torch.rand(*shape, DIMS[size][1]) * 2 - 1


def has_skills(algo) -> bool:
    """Whether the file is one with skills and pre-training; the flat ones have neither."""
    return hasattr(algo, "make_networks")


def chosen_dim(algo, size: str, config) -> int:
    """Entries of what a filter chooses: of a skill in files with skills, else of an action."""
    return config.skill_dim if has_skills(algo) and hasattr(algo, "Filter") else DIMS[size][1]


def make_networks(algo, size: str, config):
    torch.manual_seed(0)
    return algo.make_networks(config, *DIMS[size])


def make_agent(algo, size: str, config):
    if has_skills(algo):
        return algo.Agent(config, make_networks(algo, size, config))
    torch.manual_seed(0)
    agent = algo.Agent(config, *DIMS[size])
    if hasattr(agent, "rewarded"):  # from then on dads.py plans, and hiro.py's high level learns
        agent.rewarded.fill_(1)
    return agent


def skill_size(size: str, config) -> int:
    """Numbers in a skill; in relay.py, where a subgoal takes its place, in an observation."""
    return getattr(config, "skill_dim", DIMS[size][0])


def call_by_name(function, **inputs):
    """Call with those inputs that the function has parameters for: the files' replay buffers store different things."""
    return function(**{name: inputs[name] for name in inspect.signature(function).parameters})


def random_dataset(algo, size: str, window: int):
    """Offline data of 32 episodes, each twice as long as a window."""
    rows = 32 * 2 * window
    obs = random_obs(size, rows).numpy()
    actions = random_actions(size, rows).numpy()
    timeouts = np.arange(1, rows + 1) % (2 * window) == 0
    return algo.data_tools.OfflineDataset(obs, actions, np.zeros_like(timeouts), timeouts)


def filled_replay(algo, size: str, config):
    """The file's own replay buffer with an episode of every environment, twice as long as a window."""
    E = config.num_envs
    H = getattr(config, "skill_horizon", 1)
    skill_dim = skill_size(size, config)
    action_dim = chosen_dim(algo, size, config)
    goal_dim = len(getattr(algo, "GOAL_RANGE", {}).get(size, ()))  # of HIRO
    window = getattr(config, "batch_length", getattr(config, "num_steps", 9) + 1)  # env steps, in files without skills
    T = 2 * (getattr(config, "num_skills", 10) if has_skills(algo) else window)  # skills or env steps per episode
    names = ("SequenceBuffer", "RolloutBuffer", "ReplayBuffer")
    make = next(getattr(algo, name) for name in names if hasattr(algo, name))
    sizes = dict(obs_dim=DIMS[size][0], action_dim=action_dim, env_action_dim=DIMS[size][1], window=window)
    rb = call_by_name(make, **sizes, args=config)
    if hasattr(rb, "begin"):
        rb.begin(random_obs(size, E).numpy(), np.ones(E, dtype=bool))
    stores_env_steps = "actions" in inspect.signature(rb.add).parameters
    for t in range(T):
        call_by_name(
            rb.add,
            obs=(random_obs(size, E, H) if stores_env_steps else random_obs(size, E)).numpy(),
            actions=random_actions(size, E, H).numpy(),
            action=(torch.rand(E, action_dim) * 2 - 1).numpy(),
            z=torch.rand(E, skill_dim) * 2 - 1,
            goal=torch.rand(E, goal_dim) * 2 - 1,
            option=np.zeros(E, dtype=np.int64),
            begins=np.full(E, t == 0),
            u=torch.rand(E, skill_dim) * 2 - 1,
            rewards=torch.rand(E).numpy(),
            step_rewards=torch.rand(E, H).numpy(),
            residuals=random_actions(size, E, H).numpy(),
            terminations=np.zeros(E, dtype=bool),
            truncations=np.full(E, t == T - 1),
            ended=np.full(E, t == T - 1),
            steps=np.full(E, H),
            log_prob=torch.zeros(E),
            advantages=torch.rand(E),
            returns=torch.rand(E),
            next_obs=random_obs(size, E).numpy(),
        )
    if hasattr(rb, "prepare"):  # on-policy: advantages of a policy
        rb.prepare(make_agent(algo, size, config))
    return rb


# ------------------------------------------------------------------------------------------------------ what is timed
# Each function returns a callable; `measure` calls it again and again.


def rl_update(algo, size: str, config):
    """One gradient step of everything that RL trains, on a batch from the replay buffer."""
    agent = make_agent(algo, size, config)
    rb = filled_replay(algo, size, config)
    return lambda: agent.update(*rb.sample(config.batch_size))


def planning(algo, size: str, config, num_envs: int):
    """The planner with K = N, observations on the CPU in, skills or actions on the CPU out."""
    planner = algo.Planner(make_agent(algo, size, config), config, explore=True)
    obs = random_obs(size, num_envs).numpy()
    names = ("horizon_steps", "std_steps", "discover_steps")
    step = max(getattr(config, name, 0) for name in names)  # all schedules are over
    return lambda: planner(obs, step)


def choosing(algo, size: str, config, num_envs: int):
    """Skills by the task policy alone, observations on the CPU in, skills on the CPU out."""
    if hasattr(algo, "Filter"):
        return flat_policy(algo, size, config, num_envs)
    agent = make_agent(algo, size, config)
    obs = random_obs(size, num_envs).numpy()
    choose = getattr(agent, chooser(algo)[1])
    return lambda: choose(obs)


def acting(algo, size: str, config, num_envs: int):
    """The policy for one env step, observations and actions on the CPU; the skill policy is there itself."""
    if not has_skills(algo):
        return flat_policy(algo, size, config, num_envs)
    networks = make_networks(algo, size, config)
    skills = copy.deepcopy(networks["skills" if "skills" in networks else "low"]).cpu().eval()
    obs = random_obs(size, num_envs).numpy()
    z = torch.rand(num_envs, skill_size(size, config)) * 2 - 1

    @torch.no_grad()
    def act():
        skills.act(torch.from_numpy(obs), z).numpy()

    return act


def flat_policy(algo, size: str, config, num_envs: int):
    """The policy of a file without skills or with a filter of observations."""
    agent = make_agent(algo, size, config)
    obs = random_obs(size, num_envs).numpy()
    acting = getattr(algo, "Filter", getattr(algo, "TwoLevels", None))
    if acting:
        choose_action = acting(agent, num_envs, chosen_dim(algo, size, config), explore=True)
    else:
        z = np.zeros((num_envs, getattr(config, "skill_dim", 0)), dtype=np.float32)
        none = np.zeros(num_envs, dtype=np.int64)
        inputs = dict(z=z, option=none, begins=none > 0, explore=True)
        inputs = {name: inputs[name] for name in inspect.signature(agent.act).parameters if name != "obs"}
        choose_action = functools.partial(agent.act, **inputs)
    return lambda: choose_action(obs)


def stepping(env_id: str, num_envs: int, num_threads: int):
    """One step of E environments under random actions, nothing else; members that end are reset.

    num_threads is 0 in the maze, which has none.
    """
    options = dict(num_threads=num_threads) if num_threads else {}
    envs = gymnasium.make_vec(
        f"skimo/{env_id.title().replace('-', '')}-v0",
        num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
        **options,
    )
    envs.reset(seed=0)
    envs.action_space.seed(0)
    actions = [envs.action_space.sample() for _ in range(100)]
    count = 0

    def step():
        nonlocal count
        count += 1
        _, _, terminations, truncations, _ = envs.step(actions[count % len(actions)])
        ended = terminations | truncations
        if ended.any():
            envs.reset(options=dict(reset_mask=ended))

    return step


def synchronize(args: Args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def measure(call, args: Args) -> dict:
    """Warm up, then time repeated calls: median and inter-quartile range in ms, and how many calls that took."""
    metrics = call()  # fills caches
    for _ in range(3):  # records CUDA graphs
        call()
    synchronize(args)
    start = time.perf_counter()
    call()
    synchronize(args)
    once = time.perf_counter() - start
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    result = timer.blocked_autorange(min_run_time=max(args.min_seconds, (1 if args.quick else 5) * once))
    if isinstance(metrics, dict) and not all(math.isfinite(float(value)) for value in call().values()):
        raise FloatingPointError("the timed update gives losses that are not finite")
    calls = result.number_per_run * len(result.times)
    return dict(ms=1e3 * result.median, iqr_ms=1e3 * result.iqr, calls=calls)


class Enough(Exception):
    """The loop of pre-training was timed long enough."""


class TimedData:
    """Offline data for `pretrain` that take the time from batch to batch, and stop the loop in the end."""

    def __init__(self, data, args: Args):
        self.data = data
        self.args = args
        self.calls = 0
        self.block = 1  # updates between two looks at the clock, which wait for the device
        self.next = 5  # the call at which the next look is due; the first updates record CUDA graphs
        self.start = 0.0
        self.times = []  # seconds per update of each block
        self.window = None  # of the pairs that are drawn first in an update

    def to(self, device):
        self.data = self.data.to(device)
        return self

    def split(self, fraction, length=1):
        return self, self

    def __getattr__(self, name):  # what relay.py reads
        return getattr(self.data, name)

    def sample_windows(self, batch_size, length):
        self.count()
        return self.data.sample_windows(batch_size, length)

    def sample_pairs(self, batch_size, window):
        self.window = self.window or window
        if window == self.window:  # the first of both levels' draws
            self.count()
        return self.data.sample_pairs(batch_size, window)

    def count(self):
        self.calls += 1
        if self.calls == self.next:
            self.look()

    def look(self):
        synchronize(self.args)
        now = time.perf_counter()
        if self.calls > 6:
            self.times.append((now - self.start) / self.block)
        elif self.calls == 6:
            self.block = max(1, int(0.05 / (now - self.start)))
        if sum(self.times) * self.block >= self.args.min_seconds and len(self.times) >= (1 if self.args.quick else 5):
            raise Enough
        self.start = now
        self.next = self.calls + self.block


def time_pretraining(algo, size: str, config, args: Args) -> dict:
    """Median and inter-quartile range of an update in the file's own loop, in ms."""
    config = dataclasses.replace(config, pretrain_eval_interval=10**9)
    window = getattr(config, "pretrain_skills", 1) * config.skill_horizon + 1
    data = TimedData(random_dataset(algo, size, window), args)
    networks = make_networks(algo, size, config)
    with tempfile.TemporaryDirectory() as folder, silence(), contextlib.suppress(Enough):
        with algo.SummaryWriter(folder) as writer:
            algo.pretrain(config, networks, Path(folder) / "model.pt", data, writer, threading.Event())
    first, median, third = 1e3 * np.quantile(data.times, [0.25, 0.5, 0.75])
    return dict(ms=median, iqr_ms=third - first, calls=data.block * len(data.times))


@contextlib.contextmanager
def silence():
    """Without the bars and summaries of the algorithm files."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        yield


def time_training(algo, env_id: str, config, args: Args) -> dict:
    """`train` in miniature: env steps/s and the shares of time, without the final evaluation."""
    factor = args.loop_steps / config.total_timesteps
    schedules = ("total_timesteps", "warmup_steps", "warmup_skills", "horizon_steps", "std_steps", "discover_steps")
    scaled = {name: int(factor * getattr(config, name)) for name in schedules if hasattr(config, name)}
    config = dataclasses.replace(config, **scaled, eval_interval=0, checkpoint_interval=10**9)
    if args.quick:
        config = dataclasses.replace(config, num_envs=1)
    seconds = dict(env=0.0, choose=0.0, update=0.0)
    networks = (make_networks(algo, env_id, config), {}) if has_skills(algo) else ()
    envs = algo.data_tools.make_envs(env_id, config.num_envs)
    if has_skills(algo) and hasattr(config, "warmup_steps"):  # it waits for whole episodes: they shrink as well
        longest = max(10, getattr(config, "num_skills", 0), getattr(config, "batch_length", 0))  # in skills
        envs.max_episode_steps = longest * config.skill_horizon
    with (
        tempfile.TemporaryDirectory() as folder,
        silence(),
        mock.patch.object(algo.data_tools, "make_envs", return_value=envs),
        timed(*stepper(algo, envs), "env", seconds, args),
        timed(*chooser(algo), "choose", seconds, args),
        mock.patch.object(algo.Agent, "__init__", timed_agent(algo, seconds, args)),
        mock.patch.object(algo, "rollout", return_value=(np.zeros(1), np.zeros(1))),  # the final evaluation
        algo.SummaryWriter(folder) as writer,
    ):
        results = algo.train(config, *networks, Path(folder), writer, threading.Event())
    if results["updates"] == 0:
        sys.exit(f"error: --loop-steps {args.loop_steps} ends before the first episode does; give more")
    total = 60 * results["rl_minutes"]
    rate = results["env_steps"] / total
    shares = {name: value / total for name, value in seconds.items()}
    return dict(ms=1e3 / rate, calls=results["env_steps"], per_second=rate, shares=shares)


def stepper(algo, envs):
    """Owner and name of the function that steps the environments."""
    for name in ("collect_skill", "collect"):
        if hasattr(algo, name):
            return algo, name
    return (algo, "execute_skill") if has_skills(algo) else (envs, "step")


def chooser(algo):
    """Owner and name of the method that chooses skills or, in files without them, actions."""
    for owner in ("Planner", "Filter", "TwoLevels"):
        if hasattr(algo, owner):
            return getattr(algo, owner), "__call__"
    names = ("sample_policy", "choose_subgoal", "act")
    return algo.Agent, next(name for name in names if hasattr(algo.Agent, name))


def timed(owner, name: str, label: str, seconds: dict, args: Args):
    """Context in which the time of a function is added to seconds[label]."""
    return mock.patch.object(owner, name, timer(getattr(owner, name), label, seconds, args))


def timed_agent(algo, seconds: dict, args: Args):
    """The agent's __init__, and its updates are timed: from outside, as a CUDA graph holds no clock."""
    init = algo.Agent.__init__

    def wrapper(self, *inputs):
        init(self, *inputs)
        self.update = timer(self.update, "update", seconds, args)

    return wrapper


def timer(function, label: str, seconds: dict, args: Args):
    """The function, which adds its time to seconds[label]."""

    def wrapper(*inputs, **named):
        start = time.perf_counter()
        result = function(*inputs, **named)
        synchronize(args)
        seconds[label] += time.perf_counter() - start
        return result

    return wrapper


# ------------------------------------------------------------------------------------------------------------ the rows
def algorithm_rows(algo, size: str, mode: str, args: Args) -> list:
    """(part, name, environments per call or None, function that gives the numbers) of one file at one size.

    Pre-training is timed in the file that it belongs to, the release's sizes in skimo.py.
    """
    config = size_args(algo, size, mode, args)
    rows = []

    def pretraining(config):
        return lambda: time_pretraining(algo, size, config, args)

    def repeated(make, config, *inputs):
        return lambda: measure(make(algo, size, config, *inputs), args)

    if algo.__name__ == "skimo":
        release = release_args(algo, config, size, args)
        rows.append(("pretrain", "pre-training update" + RELEASE, None, pretraining(release)))
    if has_skills(algo) and algo.PRETRAINED == algo.__name__:
        rows.append(("pretrain", "pre-training update", None, pretraining(config)))
    rows.append(("update", "RL update", None, repeated(rl_update, config)))
    if algo.__name__ == "skimo":
        rows.append(("plan", "plan, 1 env" + RELEASE, 1, repeated(planning, release, 1)))
    plans = hasattr(algo, "Planner")
    if plans or has_skills(algo):
        name, make = ("plan", planning) if plans else ("policy", choosing)
        for E in args.plan_envs:
            rows.append(("plan", f"{name}, {E} env{'s' * (E > 1)}", E, repeated(make, config, E)))
    if mode == "eager" and (has_skills(algo) or not plans):  # never recorded
        for E in args.plan_envs:
            rows.append(("act", f"act, {E} env{'s' * (E > 1)}", E, repeated(acting, config, E)))
    return rows


def loop_threads(env_id: str, num_envs: int) -> int:
    """Threads that step the environments in `train`; 0 in the maze."""
    return 0 if env_id == "maze" else min(torch.get_num_threads(), num_envs)


def time_stepping(args: Args, num_envs: int, num_threads: int) -> dict:
    return measure(stepping(args.env_id, num_envs, num_threads), args)


def step_rows(args: Args) -> list:
    """(name, environments, threads, function that gives the numbers); one core comes first."""
    rows = []
    for E in args.step_envs:
        counts = {1, 2, loop_threads(args.env_id, E)} | (set() if args.quick else {os.cpu_count()})
        counts = {0} if args.env_id == "maze" else counts
        for threads in sorted(count for count in counts if count <= E):
            name = f"step, {E} env{'s' * (E > 1)}, {threads or 'no'} thread{'s' * (threads != 1)}"
            rows.append((name, E, threads, functools.partial(time_stepping, args, E, threads)))
    return rows


def time_everything(args: Args):
    """Yields all rows: environments, then each file in each mode at each size, then its training loop."""
    wanted = args.only or ("pretrain", "update", "plan", "act", "step", "loop")
    algos = [load_algorithm(name) for name in dict.fromkeys(args.algos)]
    bar = tqdm(desc="timing", unit="row")

    def timed_row(algo: str, name: str, size: str, mode: str, num_envs, make, **facts) -> dict:
        bar.set_postfix_str(f"{algo} {name} ({size}, {mode})")
        torch.manual_seed(0)
        row = dict(algo=algo, name=name, size=size, mode=mode, num_envs=num_envs, **make(), **facts)
        bar.update()
        return row

    if "step" in wanted:
        first = {}  # env steps per second on one core
        for name, E, threads, make in step_rows(args):
            row = timed_row("environment", name, args.env_id, "eager", E, make, num_threads=threads)
            row["per_second"] = 1e3 * E / row["ms"]
            row["speedup"] = row["per_second"] / first.setdefault(E, row["per_second"])
            yield row
    for algo in algos:
        for mode in dict.fromkeys(args.modes):
            for size in dict.fromkeys(args.sizes):
                for part, name, E, make in algorithm_rows(algo, size, mode, args):
                    if part in wanted:
                        yield timed_row(algo.__name__, name, size, mode, E, make)
            if "loop" in wanted:
                yield timed_row(*training_row(algo, mode, args))
    bar.close()


def training_row(algo, mode: str, args: Args):
    config = size_args(algo, args.env_id, mode, args)
    make = functools.partial(time_training, algo, args.env_id, config, args)
    return algo.__name__, "training loop", args.env_id, mode, config.num_envs, make


# ---------------------------------------------------------------------------------------------------------- the report
def table(rows: list[dict]) -> str:
    """Aligned text, eager and CUDA graphs side by side."""
    lines = [["file", "", "size", "eager ms", "+-", "graphs ms", "+-", "env steps/s"]]
    found = {}
    for row in rows:
        found.setdefault((row["algo"], row["name"], row["size"]), {})[row["mode"]] = row
    for (algo, name, size), modes in found.items():
        line = [algo, name, size]
        for mode in ("eager", "graphs"):
            row = modes.get(mode, {})
            line.append(f"{row['ms']:.3g}" if row else "")
            line.append(f"{row['iqr_ms']:.2g}" if "iqr_ms" in row else "")
        best = min(modes.values(), key=lambda row: row["ms"])
        line.append(f"{best['per_second']:,.0f}" if "per_second" in best else "")
        lines.append(line)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    aligned = [[text.ljust(w) if i < 3 else text.rjust(w) for i, (text, w) in enumerate(zip(c, widths))] for c in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def machine(args: Args) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if args.device == "cuda" else None
    facts = dict(cpu=cpu, cores=os.cpu_count(), gpu=gpu, load=os.getloadavg(), system=platform.platform())
    facts |= dict(python=platform.python_version(), torch=torch.__version__, device=args.device)
    facts |= dict(threads=torch.get_num_threads(), date=time.strftime("%Y-%m-%d %H:%M:%S"))
    return facts | describe_code(ROOT)


def write_json(path: Path, values: dict):
    """Values as JSON, in a file that is whole at any time."""
    text = json.dumps(values, indent=1, default=str) + "\n"
    write_atomically(path, lambda part: part.write_text(text))


def main(args: Args) -> dict:
    """Time everything, print the table, write the JSON; returns what it holds."""
    check_args(args)
    if args.quick:
        args = dataclasses.replace(args, plan_envs=(1, 2), step_envs=(1, 2), loop_steps=2_200, min_seconds=0.02)
    facts = machine(args)
    rows = []
    for row in time_everything(args):
        rows.append(row)
        write_json(args.out, dict(machine=facts, args=asdict(args), rows=rows))  # so far
    if not rows:
        sys.exit("error: nothing to time; no file has this --only with such --sizes, --modes, --plan-envs, --step-envs")
    print(f"{facts['gpu'] or facts['cpu']}, {facts['threads']} CPU threads, load {facts['load'][0]:.1f} of", end=" ")
    print(f"{facts['cores']} cores, torch {facts['torch']}, commit {facts['commit']}")
    print(table(rows))
    for row in rows:
        if "shares" in row:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
            print(f"training loop of {row['algo']}, {row['mode']}: {shares}")
    print(f"written: {args.out}")
    return dict(machine=facts, args=asdict(args), rows=rows)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
