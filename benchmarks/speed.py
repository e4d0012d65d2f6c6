"""How fast algorithm files are: their real updates, planner, acting, environments and whole training loop.

    python benchmarks/speed.py                                    # skimo.py at the maze's sizes; needs no data
    python benchmarks/speed.py --algos skimo spirl --sizes kitchen --modes eager graphs
    python benchmarks/speed.py --only step --env-id kitchen       # environments alone, in seconds

Networks and data are random. A pre-training update is one of the file's own loop, with sampling, logs and target
updates. For an RL update the file's own `train` fills its replay buffer; each draws a batch from it. Skills come from
the planner with K = N or, in files without one, from the policy. Files without skills choose actions: by a planner (row
`plan`) or the policy (row `act`). The training loop is `train` from random networks: all schedules of the real run are
shrunk to --loop-steps, so that plan lengths and updates have the mix of the real run; where a warm-up waits for whole
episodes, these are short.
All numbers but the loop's are medians of repeated calls after a warm-up, with CUDA synchronisation. Threads are
torch's: OMP_NUM_THREADS sets them.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import itertools
import json
import math
import os
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_tools
from benchmarks.provenance import provenance
from data_tools.files import write_atomically
from data_tools.tasks.vector import num_cores

PARTS = ("pretrain", "update", "plan", "act", "step", "loop")


@dataclass
class Args:
    algos: tuple[str, ...] = ("skimo",)  # names of files in algos/, without .py
    sizes: tuple[Literal[*data_tools.TASKS], ...] = ("maze",)  # tasks whose networks and batches are timed
    modes: tuple[Literal["eager", "graphs"], ...] = (
        ("eager", "graphs") if torch.cuda.is_available() else ("eager",)
    )  # graphs: updates and plans are replayed as CUDA graphs
    only: tuple[Literal[PARTS], ...] = PARTS  # what to time
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    env_id: Literal[*data_tools.TASKS] = "maze"  # the task whose environments are stepped and on which the loop runs
    plan_envs: tuple[int, ...] = (1, 8, 64)  # environments planned and acted for in one call
    step_envs: tuple[int, ...] = (1, 8, 64)  # environments stepped together
    loop_steps: int = 20_000  # env steps of the whole training loop
    min_seconds: float = 2.0  # least measuring time of a row, and at least five calls
    quick: bool = False  # a check that everything runs: tiny batches and networks; the numbers mean nothing
    out: Path = Path("runs/speed.json")  # where the JSON goes


def size_args(algo, size: str, mode: str, args: Args):
    """The algorithm's own arguments for a task."""
    result = replaced(algo.parse_args(["--env-id", size, "--device", args.device]), dict(cudagraphs=mode == "graphs"))
    if args.quick:
        small = dict(pretrain_batch_size=8, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=4, cem_iters=1)
        small |= dict(updates_per_step=0.02, updates_per_skill=0.2, num_skills=min(3, getattr(result, "num_skills", 1)))
        small |= dict(batch_length=8, imagine_starts=16, mppi_iters=1, imagine_steps=4, demo_rows=100, epochs=0.2)
        small |= dict(rollout_skills=10, updates_per_rollout=10)
        small |= dict(hidden_dim=32, model_dim=32, deter_dim=32, encoder_dim=32, latent_dim=32)
        result = replaced(result, small)
    return result


def replaced(config, values: dict):
    """Arguments with those of the values that they have."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if hasattr(config, name)})


# ----------------------------------------------------------------------------------------------- what is in the files
def has_skills(algo) -> bool:
    """Whether the file is one with skills and pre-training; the flat ones have neither."""
    return hasattr(algo, "make_networks")


def make_agent(algo, config):
    """A fresh agent, from random networks."""
    torch.manual_seed(0)
    sizes = [algo.make_networks(config)] if has_skills(algo) else data_tools.env_sizes(config.env_id)
    agent = algo.Agent(config, *sizes)
    if hasattr(agent, "rewarded"):  # from then on hiro.py's high level learns
        agent.rewarded.fill_(1)
    return agent


def chooser(algo) -> tuple:
    """Owner and name of the method that chooses skills or, in files without them, actions."""
    names = ("choose_skills", "choose_chunks", "act") if has_skills(algo) or hasattr(algo, "plan") else ("act",)
    owners = [getattr(algo, name) for name in ("Filter", "Agent") if hasattr(algo, name)]
    return next((owner, name) for name in names for owner in owners if hasattr(owner, name))


def random_dataset(env_id: str, window: int):
    """Offline data of 32 episodes, each twice as long as a window."""
    rows = 32 * 2 * window
    obs_dim, action_dim = data_tools.env_sizes(env_id)
    rng = np.random.default_rng(0)
    obs = rng.random((rows, obs_dim), dtype=np.float32)
    actions = rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32)
    timeouts = np.arange(1, rows + 1) % (2 * window) == 0
    return data_tools.OfflineDataset(obs, actions, np.zeros_like(timeouts), timeouts)


def window_of(config) -> int:
    """Skills or, in files without them, env steps in a window of the replay buffer."""
    return max(10, *(getattr(config, name, 0) for name in ("num_skills", "batch_length", "num_steps")))


@contextlib.contextmanager
def in_passing(algo, length: int | None = None):
    """Context for the file's own loops: a folder, no pre-training, roll-outs, curves, bars; nothing catches Ctrl-C.

    length: env steps of an episode, whose rewards are random: on-policy files learn nothing from zeros (None: the
    task's, as they are).
    """
    rng = np.random.default_rng(0)
    make = data_tools.make_envs
    scores = dict(episodic_return=0.0, episodic_length=0.0, success=0.0)

    def make_envs(*inputs):
        envs = make(*inputs)
        if length:
            envs.max_episode_steps = length
            advance = envs.advance
            envs.advance = lambda *inputs: (rng.random(envs.num_envs), advance(*inputs)[1])
        return envs

    skipped = {name: mock.Mock(return_value={}) for name in ("pretrain", "learn_flow") if hasattr(algo, name)}
    skipped |= dict(rollout=mock.Mock(return_value=scores), SummaryWriter=mock.MagicMock())
    with (
        mock.patch.multiple(algo, **skipped),
        mock.patch.multiple(data_tools, make_envs=make_envs, load_dataset=lambda name, *_: random_dataset(name, 50)),
        mock.patch("signal.signal"),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory() as folder,
    ):
        algo.SummaryWriter.return_value.log_dir = folder
        yield folder


# ------------------------------------------------------------------------------------------------------ what is timed
class Enough(Exception):
    """A loop has run long enough."""


def first_call(algo, config, owner, name: str) -> inspect.BoundArguments:
    """The inputs with which the file's own `train` first calls a method, from random networks, in short episodes."""
    E, H = config.num_envs, getattr(config, "skill_horizon", 1)
    length = window_of(config) * (H if has_skills(algo) else 2)
    soon = dict(warmup_steps=2 * E * length, warmup_skills=2 * E * window_of(config), total_timesteps=10**9)
    soon |= dict(updates_per_step=1.0, updates_per_skill=1.0, eval_interval=10**9, checkpoint_interval=10**9)
    method = getattr(owner, name)
    found = []

    def keep(*inputs, **named):
        found.append(inspect.signature(method).bind(*inputs, **named))
        raise Enough

    torch.manual_seed(0)
    with in_passing(algo, length) as folder, mock.patch.object(owner, name, keep), contextlib.suppress(Enough):
        algo.train(replaced(config, dict(soon, run_dir=folder)))
    return found[0]


def filled_replay(algo, config):
    """Function that draws a batch as the file's first update does."""
    names = ("SequenceBuffer", "RolloutBuffer", "ReplayBuffer")
    buffer = next(getattr(algo, name) for name in names if hasattr(algo, name))
    inputs = first_call(algo, config, buffer, "sample")
    return lambda: buffer.sample(*inputs.args, **inputs.kwargs)


# Each of the next functions returns a callable; `measure` calls it again and again.
def rl_update(algo, config):
    """One gradient step of everything that RL trains, on a batch from the replay buffer."""
    agent = make_agent(algo, config)
    draw = filled_replay(algo, config)
    return lambda: agent.update(*draw())


def choosing(algo, config, num_envs: int):
    """Skills or actions for E environments: by the planner with K = N, by the policy without one; CPU to CPU."""
    multiple = num_envs * config.batch_size  # option_critic.py asks for one
    config = dataclasses.replace(config, num_envs=num_envs, batch_size=multiple)
    owner, name = chooser(algo)
    inputs = first_call(algo, config, owner, name)
    for schedule, value in dict(global_step=10**9, planned=True, uniform=False).items():  # all are over
        if schedule in inputs.arguments:
            inputs.arguments[schedule] = value
    if hasattr(inputs.args[0], "rewarded"):  # else hiro.py's high level guesses
        inputs.args[0].rewarded.fill_(1)
    choose = getattr(owner, name)
    return lambda: choose(*inputs.args, **inputs.kwargs)


def acting(algo, config, num_envs: int):
    """The policy for one env step, observations and actions on the CPU; the skill policy is there itself."""
    if not has_skills(algo) or hasattr(algo.Agent, "choose_chunks"):  # a chunk is all of its actions
        return choosing(algo, config, num_envs)
    agent = make_agent(algo, config)
    skills = getattr(agent, "skills", None) or agent.low.cpu()
    obs_dim, _ = data_tools.env_sizes(config.env_id)
    obs = np.zeros((num_envs, obs_dim), dtype=np.float32)
    z = torch.rand(num_envs, getattr(config, "skill_dim", obs_dim)) * 2 - 1

    @torch.no_grad()
    def act():
        skills.act(torch.from_numpy(obs), z).numpy()

    return act


def stepping(env_id: str, num_envs: int):
    """One step of E environments under random actions, nothing else; members that end are reset."""
    envs = data_tools.make_envs(env_id, num_envs)
    envs.reset(seed=0)
    envs.action_space.seed(0)
    actions = itertools.cycle([envs.action_space.sample() for _ in range(100)])

    def step():
        _, _, terminations, truncations, _ = envs.step(next(actions))
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


class Clock:
    """Called at each update: takes the time between them, and ends their loop when it was long enough."""

    def __init__(self, args: Args):
        self.args = args
        self.calls = 0
        self.block = 1  # updates between two looks at the clock, which wait for the device
        self.next = 5  # the update after which the next look is due; the first ones record CUDA graphs
        self.times = []  # seconds per update of each block

    def __call__(self):
        self.calls += 1
        if self.calls < self.next:
            return
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


def run_pretraining(algo, config, networks, clock, writer=None):
    """The file's own pre-training on random data; the clock is called in place of the bar's update, and may end it."""
    data = random_dataset(config.env_id, getattr(config, "pretrain_skills", 1) * config.skill_horizon + 1)
    pretrain = algo.pretrain
    bar = mock.MagicMock(update=clock)
    bar.__enter__.return_value = bar
    with in_passing(algo) as folder, mock.patch.object(algo, "tqdm", return_value=bar), contextlib.suppress(Enough):
        config = dataclasses.replace(config, data_dir=folder, pretrain_eval_interval=10**9)
        writer = writer or algo.SummaryWriter()
        writer.log_dir = folder
        pretrain(config, networks, data, writer, threading.Event())


def time_pretraining(algo, config, args: Args) -> dict:
    """Median and inter-quartile range of an update in the file's own loop, in ms."""
    torch.manual_seed(0)
    clock = Clock(args)
    run_pretraining(algo, config, algo.make_networks(config), clock)
    first, median, third = 1e3 * np.quantile(clock.times, [0.25, 0.5, 0.75])
    return dict(ms=median, iqr_ms=third - first, calls=clock.block * len(clock.times))


def time_training(algo, config, args: Args) -> dict:
    """`train` in miniature: env steps/s and the shares of time, without evaluations."""
    factor = args.loop_steps / config.total_timesteps
    schedules = ("total_timesteps", "warmup_steps", "warmup_skills", "horizon_steps", "std_steps", "discover_steps")
    scaled = {name: max(1, int(factor * getattr(config, name))) for name in schedules if hasattr(config, name)}
    scaled |= dict(num_envs=1) if args.quick else {}
    config = dataclasses.replace(config, **scaled, eval_interval=10**9, checkpoint_interval=10**9)
    seconds = dict(env=0.0, choose=0.0, update=0.0)
    waits = has_skills(algo) and hasattr(config, "warmup_steps")  # for whole episodes: they shrink as well
    length = window_of(config) * config.skill_horizon if waits else None
    vector_class = data_tools.imported(data_tools.TASKS[config.env_id].envs)
    init = algo.Agent.__init__

    def timed_init(agent, *inputs):  # its updates are timed from outside, as a CUDA graph holds no clock
        init(agent, *inputs)
        agent.update = timer(agent.update, "update", seconds, args)

    with in_passing(algo, length) as folder, contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(algo.Agent, "__init__", timed_init))
        for label, owner, name in (("env", vector_class, "step"), ("choose", *chooser(algo))):
            patches.enter_context(mock.patch.object(owner, name, timer(getattr(owner, name), label, seconds, args)))
        results = algo.train(dataclasses.replace(config, run_dir=folder))
    if results["updates"] == 0:
        sys.exit(f"error: --loop-steps {args.loop_steps} ends before the first update is due; give more")
    total = 60 * results["rl_minutes"]
    rate = results["env_steps"] / total
    shares = {name: value / total for name, value in seconds.items()}
    return dict(ms=1e3 / rate, calls=results["env_steps"], per_second=rate, shares=shares)


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
def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def time_stepping(args: Args, num_envs: int, num_threads: int) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    result = measure(stepping(args.env_id, num_envs), args)
    torch.set_num_threads(before)
    return result | dict(num_threads=num_threads)


def step_rows(args: Args):
    """Yields (part, name, environments, function that gives the numbers)."""
    for E in args.step_envs:
        counts = {1, 2, 1 if args.quick else num_cores()}
        for threads in sorted(count for count in counts if count <= E):
            make = functools.partial(time_stepping, args, E, threads)
            yield "step", f"step, {counted(E, 'env')}, {counted(threads, 'thread')}", E, make


def algorithm_rows(algo, size: str, mode: str, args: Args):
    """Yields the same of one file at one size, environments per call or None. Pre-training is timed in the file that it
    belongs to.
    """
    config = size_args(algo, size, mode, args)
    plans = hasattr(algo, "plan")

    def repeated(make, *inputs):
        return lambda: measure(make(algo, config, *inputs), args)

    if has_skills(algo) and algo.PRETRAINED == algo.FILE.stem:
        yield "pretrain", "pre-training update", None, lambda: time_pretraining(algo, config, args)
    yield "update", "RL update", None, repeated(rl_update)
    if plans or has_skills(algo):
        for E in args.plan_envs:
            yield "plan", f"{'plan' if plans else 'policy'}, {counted(E, 'env')}", E, repeated(choosing, E)
    if mode == "eager" and (has_skills(algo) or not plans):  # never recorded
        for E in args.plan_envs:
            yield "act", f"act, {counted(E, 'env')}", E, repeated(acting, E)


def time_everything(args: Args):
    """Yields all rows: environments, then each file in each mode at each size, then its training loop."""
    rows = [("environment", args.env_id, "eager", *row) for row in step_rows(args)]
    algos = [importlib.import_module(f"algos.{name}") for name in dict.fromkeys(args.algos)]
    for algo, mode in itertools.product(algos, dict.fromkeys(args.modes)):
        for size in dict.fromkeys(args.sizes):
            rows += [(algo.FILE.stem, size, mode, *row) for row in algorithm_rows(algo, size, mode, args)]
        config = size_args(algo, args.env_id, mode, args)
        make = functools.partial(time_training, algo, config, args)
        rows.append((algo.FILE.stem, args.env_id, mode, "loop", "training loop", config.num_envs, make))
    bar = tqdm([row for row in rows if row[3] in args.only], desc="timing", unit="row")  # row[3]: the part
    for algo, size, mode, part, name, E, make in bar:
        bar.set_postfix_str(f"{algo} {name} ({size}, {mode})")
        torch.manual_seed(0)
        row = dict(algo=algo, name=name, size=size, mode=mode, num_envs=E, **make())
        if part == "step":
            row["per_second"] = 1e3 * E / row["ms"]
        yield row


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
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[text.ljust(w) if i < 3 else text.rjust(w) for i, (text, w) in enumerate(zip(c, widths))] for c in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def main(args: Args):
    """Time everything, print the table, write the JSON."""
    if args.quick:
        args = dataclasses.replace(args, plan_envs=(1, 2), step_envs=(1, 2), loop_steps=800, min_seconds=0.02)
    facts = provenance() | dict(date=time.strftime("%Y-%m-%d %H:%M:%S"), load=os.getloadavg())
    facts |= dict(threads=torch.get_num_threads(), torch=torch.__version__)
    rows = []
    for row in time_everything(args):
        rows.append(row)
        text = json.dumps(facts | dict(args=asdict(args), rows=rows), indent=1, default=str) + "\n"
        write_atomically(args.out, lambda part, text=text: part.write_text(text))  # so far
    if not rows:
        sys.exit("error: nothing to time; no file has this --only with such --sizes, --modes, --plan-envs, --step-envs")
    print(f"{facts['machine']}, commit {facts['commit']}")
    print(f"torch {facts['torch']} on {args.device}, {facts['threads']} CPU threads, load {facts['load'][0]:.1f}")
    print(table(rows))
    for row in rows:
        if "shares" in row:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row["shares"].items())
            print(f"training loop of {row['algo']}, {row['mode']}: {shares}")
    print(f"written: {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
