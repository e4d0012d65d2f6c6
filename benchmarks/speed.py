"""How fast an algorithm file is: its real updates, planner, acting, environments and whole training loop.

    python benchmarks/speed.py                          # all sizes; needs no data and no pre-trained model
    python benchmarks/speed.py --sizes kitchen --device cuda --out h200.json
    python benchmarks/speed.py --algo algos/spirl.py    # any file of algos/: what it has is timed
    python benchmarks/speed.py --only step --env-id kitchen --step-envs 8       # environments alone, in seconds

Every row is the median of repeated calls after a warm-up, with CUDA synchronisation (torch.utils.benchmark). Networks
and data are random and have the shapes of the task. Updates draw their batch from data set or replay buffer on the
device, as in a run. Skills come from the planner with K = N or, in files without one, from the task policy. The loop is
`train` itself on random networks: all schedules of the real run shrunk to `--loop-steps`, so that plan lengths and
updates have the mix of the real run. tdmpc_skills.py makes 50 times as many updates as the others: give it fewer.
"""

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium
import numpy as np
import torch
import tyro
from torch.utils.benchmark import Timer
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
# Entries of an observation and of an action
DIMS = {"maze": (4, 2), "kitchen": (30, 9), "kitchen-misaligned": (30, 9), "calvin": (21, 7)}

# skimo.py in the authors' code, ms per call, measured at the kitchen's sizes: (on an H200, on two CPU cores).
AUTHORS = {
    ("pre-training update, release batch", "kitchen"): (74.0, None),
    ("RL update", "kitchen"): (196.0, 252.0),
    ("plan, 1 env", "kitchen"): (46.9, None),
}


@dataclass
class Args:
    env_id: str = "maze"  # the task whose environments are stepped and on which the loop runs
    sizes: tuple[Literal["maze", "kitchen", "calvin"], ...] = (
        "maze",
        "kitchen",
        "calvin",
    )  # sizes of networks and batches
    algo: Path = ROOT / "algos" / "skimo.py"  # the algorithm file
    only: tuple[Literal["pretrain", "update", "plan", "act", "step", "loop"], ...] = ()  # what to time (empty: all)
    device: Literal["cpu", "cuda"] = "cuda" if torch.cuda.is_available() else "cpu"  # where to learn and plan
    num_threads: int = 0  # CPU threads of torch (0: one per core)
    compile: bool = torch.cuda.is_available()  # torch.compile, with CUDA graphs
    plan_envs: tuple[int, ...] = (1, 16, 64)  # environments planned and acted for in one call
    step_envs: tuple[int, ...] = (1, 8, 16, 64)  # environments stepped together
    loop_steps: int = 20_000  # env steps of the whole training loop (0: leave it out)
    min_seconds: float = 2.0  # least measuring time of a row, and at least five calls
    quick: bool = False  # a check that everything runs: tiny batches, maze only; the numbers mean nothing
    out: Path = Path("runs/speed.json")  # where the JSON goes


def load_algorithm(path: Path):
    """Import an algorithm file by its path."""
    if not path.is_file():
        sys.exit(f"error: --algo {path} does not exist; give an algorithm file such as algos/skimo.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def size_args(algo, size: str, args: Args):
    """The algorithm's own arguments at the sizes of a task."""
    result = algo.Args(env_id=size, **algo.TASK_DEFAULTS[size])
    result = dataclasses.replace(result, compile=args.compile, device=args.device)
    if args.quick:
        small = dict(pretrain_batch_size=8, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=4, cem_iters=1)
        small |= dict(updates_per_step=0.02, updates_per_skill=0.2, num_skills=min(3, getattr(result, "num_skills", 1)))
        result = dataclasses.replace(result, **{name: small[name] for name in small if hasattr(result, name)})
    return result


def release_pretraining(config, size: str, args: Args):
    """The same arguments with the release's batch: N skills and all chunks for SkiMo, one skill for SPiRL."""
    if not hasattr(config, "pretrain_skills"):
        return config if args.quick else dataclasses.replace(config, pretrain_batch_size=128)
    N = 1 if size == "calvin" else 10
    batch_size = config.pretrain_batch_size if args.quick else 512
    return dataclasses.replace(config, pretrain_batch_size=batch_size, pretrain_skills=N, bc_chunks=N)


def random_obs(size: str, *shape: int):
    """Observations (*shape, O) in the range of the task."""
    obs = torch.rand(*shape, DIMS[size][0])
    return obs * torch.tensor([40.0, 40.0, 10.0, 10.0]) if size == "maze" else obs


# ---------------------------------------------------------------------------------------------------------------------
# What is timed: each function returns a callable; `measure` calls it again and again.


def call_by_name(function, **inputs):
    """Call with those inputs that the function has parameters for: the files' replay buffers store different things."""
    return function(**{name: inputs[name] for name in inspect.signature(function).parameters})


def random_dataset(algo, size, window: int, device):
    """Offline data of 32 episodes, each twice as long as a window."""
    rows = 32 * 2 * window
    obs, actions = random_obs(size, rows).numpy(), (torch.rand(rows, DIMS[size][1]) * 2 - 1).numpy()
    timeouts = np.arange(1, rows + 1) % (2 * window) == 0
    return algo.data_tools.OfflineDataset(obs, actions, np.zeros_like(timeouts), timeouts, device=device)


def filled_replay(algo, size, config, device):
    """The file's own replay buffer with an episode of every environment, twice as long as a window."""
    (obs_dim, action_dim), E, H = DIMS[size], config.num_envs, config.skill_horizon
    rb = call_by_name(algo.ReplayBuffer, obs_dim=obs_dim, action_dim=action_dim, args=config, device=device)
    T = 2 * getattr(config, "num_skills", 10)
    for t in range(T):
        obs, next_obs = random_obs(size, 2, E).numpy()  # (E, O)
        z, actions = torch.rand(E, config.skill_dim) * 2 - 1, (torch.rand(E, action_dim) * 2 - 1).numpy()
        ended, rewards = np.full(E, t == T - 1), np.random.default_rng(t).random(E, dtype=np.float32)
        skill = dict(obs=obs, z=z, rewards=rewards, ended=ended, next_obs=next_obs)
        trace = [(obs, actions, np.zeros(E, dtype=bool))] * H
        call_by_name(rb.add, **skill, trace=trace, steps=np.full(E, H))
    return rb


def make_learner(algo, size, config, device):
    return algo.Learner(config, algo.make_networks(config, *DIMS[size], device))


def pretrain_update(algo, size, config, device):
    """One gradient step of pre-training on a batch of windows: of one skill, where a file has no --pretrain-skills."""
    trainer = algo.Pretrainer(config, algo.make_networks(config, *DIMS[size], device))
    window = getattr(config, "pretrain_skills", 1) * config.skill_horizon + 1
    data = random_dataset(algo, size, window, device)
    return lambda: trainer.update(*data.sample_windows(config.pretrain_batch_size, window))


def rl_update(algo, size, config, device):
    """One gradient step of everything that RL trains, on a batch from the replay buffer."""
    learner, rb = make_learner(algo, size, config, device), filled_replay(algo, size, config, device)
    return lambda: learner.update(*rb.sample(config.batch_size))


def planning(algo, size, config, device, num_envs: int):
    """The planner with K = N, observations on the CPU in, skills on the CPU out."""
    learner = make_learner(algo, size, config, device)
    planner = algo.Planner(learner.model, learner.task_policy, config, device)
    obs, episode_start = random_obs(size, num_envs).numpy(), np.zeros(num_envs, dtype=bool)
    step = max(config.horizon_steps, config.std_steps)
    return lambda: planner(obs, episode_start, step, explore=True)


def choosing(algo, size, config, device, num_envs: int):
    """Skills by the task policy alone, observations on the CPU in, skills on the CPU out."""
    learner, obs = make_learner(algo, size, config, device), random_obs(size, num_envs).numpy()
    if hasattr(algo, "act"):
        encoder = learner.model.encoder if hasattr(learner, "model") else learner.encoder
        return lambda: algo.act(encoder, learner.task_policy, obs, explore=True)

    @torch.no_grad()
    def draw():  # the policy of spirl.py takes observations; these lines are in its `train`
        return algo.squash(algo.draw(learner.task_policy(torch.from_numpy(obs).to(device)))).cpu()

    return draw


def acting(algo, size, config, device, num_envs: int):
    """The skill policy for one env step, on the CPU as in the loop."""
    skills = make_learner(algo, size, config, torch.device("cpu")).skills
    obs, z = random_obs(size, num_envs).numpy(), torch.rand(num_envs, config.skill_dim) * 2 - 1

    @torch.no_grad()
    def act():
        skills.act(torch.from_numpy(obs), z).numpy()

    return act


def stepping(algo, env_id, num_envs: int, num_threads: int):
    """One step of E environments under random actions, nothing else; members that end are reset.

    num_threads 0 is the maze without threads.
    """
    envs = gymnasium.make_vec(
        algo.data_tools.TASKS[env_id],
        num_envs,
        vectorization_mode="vector_entry_point",
        autoreset_mode=gymnasium.vector.AutoresetMode.DISABLED,
        num_threads=num_threads,
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
            envs.reset(options={"reset_mask": ended})

    return step


def measure(call, args: Args) -> dict:
    """Warm up, then time repeated calls: median and inter-quartile range in ms, and how many calls that took."""
    metrics = call()  # compiles, fills caches
    for _ in range(3):
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


def synchronize(args: Args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def training_loop(algo, args: Args, device) -> dict:
    """`train` in miniature: env steps/s and the shares of time, without compilation and the final evaluation."""
    config = size_args(algo, args.env_id, args)
    factor = args.loop_steps / config.total_timesteps
    schedules = ("total_timesteps", "warmup_steps", "warmup_skills", "horizon_steps", "std_steps")
    scaled = {name: int(factor * getattr(config, name)) for name in schedules if hasattr(config, name)}
    config = dataclasses.replace(config, **scaled)
    config = dataclasses.replace(config, eval_interval=0, eval_episodes=1, checkpoint_interval=10**9)
    if args.quick:
        config = dataclasses.replace(config, num_envs=1)
    for _ in range(2 if args.compile else 1):  # the first run fills the caches of the compiler
        networks = algo.make_networks(config, *DIMS[args.env_id], device)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):  # no second bar
            config = dataclasses.replace(config, run_dir=folder)
            run = algo.data_tools.Run(config, algo.FILE_VERSION, algo.MODEL_ARGS, algo.RUN_ARGS)
            run.open("none")
            with contextlib.redirect_stdout(io.StringIO()):  # its summary
                results = algo.train(config, run, networks)
    if results["updates"] == 0:
        sys.exit(f"error: --loop-steps {args.loop_steps} ends before the first episode does; give more")
    seconds = 60 * results["rl_minutes"]
    shares = {name: value / seconds for name, value in results["seconds"].items()}
    rate = results["env_steps"] / seconds
    return dict(ms=1e3 / rate, calls=results["env_steps"], per_second=rate, num_envs=config.num_envs, shares=shares)


# ---------------------------------------------------------------------------------------------------------------------


def loop_threads(env_id: str, num_envs: int) -> int:
    """Threads that step the environments in `train`, where `data_tools.make_envs` makes them; 0 in the maze."""
    return 0 if env_id == "maze" else min(torch.get_num_threads(), num_envs)


def jobs(algo, args: Args, device) -> list:
    """All rows as (part, name, size, environments per call or None, function that gives the callable and its inputs).

    What the file does not have is left out, and so is the release's batch where it is our default.
    """
    rows = []
    for size in args.sizes:
        config = size_args(algo, size, args)
        if hasattr(algo, "Pretrainer"):
            release = release_pretraining(config, size, args)
            if release != config:
                row = ("pretrain", "pre-training update, release batch", size, None)
                rows.append((*row, pretrain_update, (size, release, device)))
            rows.append(("pretrain", "pre-training update", size, None, pretrain_update, (size, config, device)))
        rows.append(("update", "RL update", size, None, rl_update, (size, config, device)))
        choice = ("plan", planning) if hasattr(algo, "Planner") else ("policy", choosing)
        for part, name, function in (("plan", *choice), ("act", "act", acting)):
            for E in args.plan_envs:
                label = f"{name}, {E} env{'s' * (E > 1)}"
                rows.append((part, label, size, E, function, (size, config, device, E)))
    one_core = 0 if args.env_id == "maze" else 1
    for E in args.step_envs:
        # One core first, then two threads, all cores, and what the loop has; more threads than members do nothing.
        counts = {2, loop_threads(args.env_id, E)} | (set() if args.quick else {os.cpu_count()})
        for threads in [one_core, *sorted(count for count in counts if one_core < count <= E)]:
            label = f"step, {E} env{'s' * (E > 1)}, {threads or 'no'} thread{'s' * (threads != 1)}"
            rows.append(("step", label, args.env_id, E, stepping, (args.env_id, E, threads)))
    return [row for row in rows if not args.only or row[0] in args.only]


def table(rows: list[dict], device: str) -> str:
    """Aligned text; the last columns are the authors' code, with the ratio to it on the same kind of device."""
    titles = ["", "size", "ms", "+-", "ms/env", "env steps/s", "vs one core"]
    cells = [[*titles, "authors H200", "ratio", "authors CPU", "ratio"]]
    for row in rows:
        E, gpu, cpu = row["num_envs"], row["authors_h200_ms"], row["authors_cpu_ms"]
        cells.append([row["name"], row["size"], f"{row['ms']:.3g}", f"{row['iqr_ms']:.2g}" if "iqr_ms" in row else ""])
        cells[-1] += [f"{row['ms'] / E:.3g}" if E and "per_second" not in row else ""]
        cells[-1] += [f"{row['per_second']:,.0f}" if "per_second" in row else ""]
        cells[-1] += [f"{row['speedup']:.2f}x" if "speedup" in row else ""]
        for authors, same_device in ((gpu, device == "cuda"), (cpu, device == "cpu")):
            ratio = f"{authors / row['ms']:.2g}x" if authors and same_device else ""  # above 1x: faster than theirs
            cells[-1] += [f"{authors:g}" if authors else "", ratio]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    aligned = [[text.ljust(w) if i < 2 else text.rjust(w) for i, (text, w) in enumerate(zip(c, widths))] for c in cells]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def machine(device) -> dict:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        info = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), cpu)
    commit = "unknown"
    with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or no repository
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    facts = dict(cpu=cpu, cores=os.cpu_count(), gpu=gpu, load=os.getloadavg(), system=platform.platform())
    facts |= dict(python=platform.python_version(), torch=torch.__version__, device=device.type)
    return facts | dict(threads=torch.get_num_threads(), commit=commit, date=time.strftime("%Y-%m-%d %H:%M:%S"))


def main(args: Args) -> dict:
    """Time everything, print the table, write the JSON; returns what it holds."""
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but torch finds no CUDA device; use --device cpu")
    if args.quick:
        quick = dict(sizes=("maze",), plan_envs=(1, 2), step_envs=(1, 2), loop_steps=2_200, min_seconds=0.02)
        # One thread: on a busy machine two would wait for each other far longer than such tiny batches take.
        args = dataclasses.replace(args, **quick, num_threads=args.num_threads or 1)
    torch.set_num_threads(args.num_threads or os.cpu_count())
    torch.manual_seed(0)
    algo, device = load_algorithm(args.algo), torch.device(args.device)
    if args.env_id not in algo.data_tools.TASKS:
        sys.exit(f"error: --env-id {args.env_id} is not built; choose one of {', '.join(algo.data_tools.TASKS)}")
    torch._dynamo.config.recompile_limit = 64  # the planner has one graph per size and number of environments
    facts, rows, env_only = machine(device), [], {}
    planned, times_loop = jobs(algo, args, device), args.loop_steps and (not args.only or "loop" in args.only)
    if not planned and not times_loop:
        sys.exit("error: nothing to time; give --sizes and --plan-envs or --step-envs for the parts in --only")

    bar = tqdm(planned, "timing", unit="row")
    for _, name, size, num_envs, make, inputs in bar:
        bar.set_postfix_str(f"{name} ({size})")
        rows.append(dict(name=name, size=size, num_envs=num_envs, **measure(make(algo, *inputs), args)))
        if make is stepping:
            rate, threads = 1e3 * num_envs / rows[-1]["ms"], inputs[-1]
            rows[-1] |= dict(per_second=rate, num_threads=threads)
            if num_envs in env_only:
                rows[-1]["speedup"] = rate / next(iter(env_only[num_envs].values()))  # one core is the first row
            env_only.setdefault(num_envs, {})[threads] = rate
    if times_loop:
        print(f"training loop: {args.loop_steps} env steps", file=sys.stderr)
        row = dict(name="training loop", size=args.env_id, **training_loop(algo, args, device))
        env_rate = env_only.get(row["num_envs"], {}).get(loop_threads(args.env_id, row["num_envs"]))
        rows.append(row | (dict(share_of_env_only_rate=row["per_second"] / env_rate) if env_rate else {}))
    for row in rows:
        authors = AUTHORS if args.algo.stem == "skimo" else {}
        row["authors_h200_ms"], row["authors_cpu_ms"] = authors.get((row["name"], row["size"]), (None, None))

    hardware = f"{facts['gpu'] or facts['cpu']}, {facts['threads']} CPU threads"
    print(f"{args.algo.name} on {hardware}, torch {facts['torch']}, commit {facts['commit']}")
    print(table(rows, device.type))
    if times_loop:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in rows[-1]["shares"].items())
        share = rows[-1].get("share_of_env_only_rate")
        print(f"training loop: {shares}" + (f"; {share:.1%} of the env-only rate" if share else ""))
    result = dict(machine=facts, args=asdict(args), rows=rows)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(args.out.name + ".part")
    part.write_text(json.dumps(result, indent=1, default=str) + "\n")
    os.replace(part, args.out)
    print(f"written: {args.out}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
