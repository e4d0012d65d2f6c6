"""The parts of benchmarks/gpu_check.sh: tests on the GPU, speed of all files, training with several seeds.

tests: replayed CUDA graphs = eager, no waits in updates, resume, memory (tests/test_cuda.py)
speed: updates and planner of all files, eager and as CUDA graphs (speed.py)
train: maze and kitchen from the published models, several seeds at once on one GPU, with their minutes (run.py)
"""

import contextlib
import csv
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import speed

OUT = Path(os.environ.get("OUT", "gpu_check"))
PARTS = ("tests", "speed", "train")
ON_GPU = "cuda and not second_device and not one_device and not overwrote"  # the others play a GPU on the CPU
# For the rehearsal: a few episodes of a few skills' training.
TINY = "--num-envs 2 --num-samples 8 --num-policy-trajs 4 --num-elites 4 --cem-iters 1 --batch-size 8 --eval-episodes 1"


def runner_works() -> bool:
    """Whether benchmarks/run.py can be used: it needs Ray, and a commit to name in its results."""
    command = ["git", "-C", ROOT, "rev-parse", "--verify", "-q", "HEAD"]
    committed = shutil.which("git") is not None and subprocess.run(command, capture_output=True).returncode == 0
    return committed and importlib.util.find_spec("ray") is not None


@dataclass
class Args:
    part: tyro.conf.Positional[Literal["all", "tests", "speed", "train"]] = "all"  # what to check
    cpu: bool = False  # rehearsal at tiny sizes; the numbers mean nothing
    algos: tuple[str, ...] = tuple(sorted(path.stem for path in (ROOT / "algos").glob("*.py")))  # files to check
    seeds: tuple[int, ...] = (1, 2, 3)  # of the trained runs, each task
    ray: bool = field(default_factory=runner_works)  # train by benchmarks/run.py, else by plain commands
    part_seconds: float = 530.0  # a part ends within this time: it fits a limit of ten minutes for a command


STARTED = []  # programs


class Deadline:
    """The time that a part has left."""

    def __init__(self, args: Args):
        self.end = time.time() + args.part_seconds

    def left(self) -> float:
        return max(0.0, self.end - time.time())


def start(command: list, log: Path, **environment) -> subprocess.Popen:
    """Start a program in a process group of its own; its output is appended to the log."""
    with log.open("a") as file:
        file.write(f"\n=== {shlex.join(map(str, command))}\n")
        file.flush()
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    STARTED.append(process)
    return process


def wait(process: subprocess.Popen, seconds: float, signal_number=signal.SIGTERM) -> str:
    """Wait for a program, stop it after that time; returns "ok" or a few words on what happened."""
    try:
        code = process.wait(seconds)
        return "ok" if code == 0 else f"exit code {code}"
    except subprocess.TimeoutExpired:
        stop(process, signal_number=signal_number)
        return f"stopped after {seconds:.0f} s"


def stop(*processes: subprocess.Popen, signal_number=signal.SIGTERM):
    """A signal to all, upon which runs save side by side; after 25 seconds SIGKILL to what is left and its children."""
    for process in processes:
        process.send_signal(signal_number)
    enough = time.time() + 25
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.1, enough - time.time()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ------------------------------------------------------------------------------------------------------------ the parts
def check_tests(args: Args) -> dict:
    """Results of tests/test_cuda.py: counts, names of what failed, measured facts."""
    deadline = Deadline(args)
    log = OUT / "tests.log"
    command = [sys.executable, "-m", "pytest", "-v", "-rA", "--tb=short", "-p", "no:cacheprovider"]
    command += ["tests/test_cuda.py", "tests/test_dataset.py", "-k", ON_GPU, "--continue-on-collection-errors"]
    if importlib.util.find_spec("xdist") and not args.cpu:
        command += ["-n", str(min(12, os.cpu_count())), "--maxschedchunk", "1"]
    facts = OUT / "facts.jsonl"
    facts.unlink(missing_ok=True)
    environment = dict(GPU_CHECK_ALGOS=" ".join(args.algos), GPU_CHECK_FACTS=str(facts))
    environment["GPU_CHECK_DEVICE"] = "cpu" if args.cpu else "cuda"
    enough = deadline.left() - 30  # upon SIGINT pytest says what failed
    status = wait(start(command, log, **environment), enough, signal.SIGINT)
    measured = [json.loads(line) for line in facts.read_text().splitlines()] if facts.exists() else []
    outcomes = {}
    for line in log.read_text().splitlines():
        name = re.search(r"tests/\w+\.py(::\S+)?", line)
        outcome = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if name and outcome:
            outcomes[name[0]] = outcome[1]
    failed = sorted(name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR"))
    passed = sum(outcome == "PASSED" for outcome in outcomes.values())
    return dict(status=status, passed=passed, failed=failed, measured=measured)


def check_speed(args: Args) -> dict:
    """Rows of speed.py, of all files."""
    deadline = Deadline(args)
    log = OUT / "speed.log"
    base = [sys.executable, "benchmarks/speed.py", "--only", "pretrain", "update", "plan", "act"]
    base += ["--plan-envs", "1", "8", "--device", "cpu" if args.cpu else "cuda"]
    base += ["--sizes", "maze" if args.cpu else "kitchen", "--modes", "eager"]
    base += ["--quick"] if args.cpu else ["graphs", "--min-seconds", "0.5"]
    first = sorted(args.algos, key=lambda name: name != "skimo")  # should time run out
    rows = []
    problems = []
    machine = None
    with tempfile.TemporaryDirectory() as folder:
        for name in first:
            out = Path(folder) / f"{name}.json"
            command = [*base, "--algos", name, "--out", out]
            status = wait(start(command, log), deadline.left()) if deadline.left() > 5 else "no time left"
            if out.exists():
                written = json.loads(out.read_text())
                rows += written["rows"]
                machine = written["machine"]
                speed.write_json(OUT / "speed_rows.json", dict(machine=machine, rows=rows))
            if status != "ok":
                problems.append(f"{name}: {status}")
    return dict(status="; ".join(problems) or "ok", rows=rows, machine=machine)


def training_flags(env_id: str, args: Args) -> list[str]:
    flags = ["--pretrained", "published"]
    if args.cpu:
        steps = {"maze": (5_000, 4_000), "kitchen": (1_200, 560)}[env_id]
        flags += ["--total-timesteps", str(steps[0]), "--warmup-steps", str(steps[1]), *TINY.split()]
    elif env_id == "kitchen":
        flags += ["--total-timesteps", "200000"]
    return flags


def check_training(args: Args) -> dict:
    """SkiMo on maze and kitchen, all seeds of both at once; what each run reached within the time."""
    deadline = Deadline(args)
    log = OUT / "train.log"
    seeds = args.seeds[:1] if args.cpu else args.seeds
    device = "cpu" if args.cpu else "cuda"
    folder = Path(tempfile.mkdtemp(prefix="gpu_check"))
    programs = []
    try:
        for env_id in ("maze", "kitchen"):
            flags = training_flags(env_id, args)
            if args.ray:
                places = [f"--run-dir={folder}/runs", f"--results-dir={folder}/results"]
                places += [f"--checkpoints-dir={folder}/kept", f"--data-dir={folder}/data"]
                command = [sys.executable, "benchmarks/run.py", "--algos", "skimo", "--env-ids", env_id]
                command += ["--seeds", *map(str, seeds), "--device", device, "--runs-per-gpu", str(len(seeds))]
                command += [*places, "--max-retries", "0", "--args", shlex.join(flags)]
                programs.append((f"run.py, {env_id}", start(command, log)))
                continue
            for seed in seeds:  # the same without Ray
                command = [sys.executable, "algos/skimo.py", "--env-id", env_id, "--seed", str(seed)]
                command += ["--device", device, "--run-dir", f"{folder}/runs/{env_id}/skimo/seed{seed}", *flags]
                programs.append((f"{env_id}, seed {seed}", start(command, log)))
        while deadline.left() > 60 and any(process.poll() is None for _, process in programs):
            time.sleep(2)
            speed.write_json(OUT / "train_runs.json", dict(runs=runs_in(folder, device)))
        late = [process for _, process in programs if process.poll() is None]
        for process in late:  # all at once: they save side by side
            process.send_signal(signal.SIGTERM)
        for process in late:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(1.0, deadline.left() - 30))
        ended = [(name, process) for name, process in programs if process not in late]
        problems = [f"{name}: exit code {process.returncode}" for name, process in ended if process.returncode]
        runs = runs_in(folder, device)
    finally:
        stop(*[process for _, process in programs if process.poll() is None])
        shutil.rmtree(folder, ignore_errors=True)
    if len(runs) < 2 * len(seeds):
        problems.append(f"{len(runs)} of {2 * len(seeds)} runs started")
    how = f"{2 * len(seeds)} runs at once by {'benchmarks/run.py' if args.ray else 'plain commands'}"
    return dict(status="; ".join(problems) or "ok", how=how, runs=runs)


def runs_in(folder: Path, device: str) -> list[dict]:
    return [reached(path, device) for path in sorted(folder.glob("runs/*/skimo/*/*/args.json"))]


def reached(args_file: Path, device: str) -> dict:
    """How far a run came: env steps, minutes, return of the last 20 training episodes."""
    args = json.loads(args_file.read_text())
    episodes = args_file.with_name("episodes.csv")
    rows = list(csv.DictReader(episodes.open())) if episodes.exists() else []
    results = args_file.with_name("results.json")
    rows = [row for row in rows if row["rl_minutes"]]  # the last line may be half written
    curve = [[int(row["env_step"]), float(row["episodic_return"]), float(row["rl_minutes"])] for row in rows]
    returns = [value for _, value, _ in curve]
    return dict(
        env_id=args["env_id"],
        seed=args["seed"],
        device=device,
        env_steps=curve[-1][0] if curve else 0,
        rl_minutes=curve[-1][2] if curve else 0.0,
        last_20_return=sum(returns[-20:]) / len(returns[-20:]) if returns else None,
        finished=results.exists(),
        evaluations=json.loads(results.read_text())["evaluations"] if results.exists() else [],
        curve=curve,
    )


# ---------------------------------------------------------------------------------------------------------- the report
def report(found: dict) -> str:
    """The table of what was found, part -> result."""
    lines = [f"{part}: {result['status']} ({result['minutes']:.1f} minutes)" for part, result in found.items()]
    if "passed" in found.get("tests", {}):
        tests = found["tests"]
        lines += ["", f"TESTS: {tests['passed']} passed, {len(tests['failed'])} failed"]
        lines += [f"  failed: {name}" for name in tests["failed"]]
        lines += [f"  {fact['algo']}: {fact['fact']} {fact['value']:.3g}" for fact in tests["measured"]]
    if found.get("speed", {}).get("rows"):
        lines += ["", "SPEED", speed.table(found["speed"]["rows"])]
    if "runs" in found.get("train", {}):
        lines += ["", f"TRAINING: {found['train']['how']}"]
        for run in found["train"]["runs"]:
            score = "none" if run["last_20_return"] is None else f"{run['last_20_return']:.2f}"
            words = f"  {run['env_id']}, seed {run['seed']}: {run['env_steps']:,} env steps"
            words += f" in {run['rl_minutes']:.1f} minutes, return of the last 20 episodes {score}"
            lines.append(words + ("" if run["finished"] else " (stopped)"))
    return "\n".join(lines)


def main(args: Args):
    """All parts, or one; whatever ends it, nothing that it started goes on."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped"))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # programs behind nohup would ignore it
    try:
        check(args)
    finally:
        stop(*[process for process in STARTED if process.poll() is None])


def check(args: Args):
    if not args.cpu and not torch.cuda.is_available():
        sys.exit("error: torch finds no CUDA device; --cpu is a rehearsal without one")
    OUT.mkdir(parents=True, exist_ok=True)
    device = "cpu" if args.cpu else "cuda"
    checks = dict(tests=check_tests, speed=check_speed, train=check_training)
    machine = speed.machine(speed.Args(device=device))
    print(f"{machine['gpu'] or machine['cpu']}, {machine['cores']} cores, torch {machine['torch']}", flush=True)
    found = {}
    if args.part != "all" and (OUT / "gpu_check.json").exists():  # parts that were run before
        old = json.loads((OUT / "gpu_check.json").read_text())
        if old["rehearsal"] == args.cpu and old["machine"]["gpu"] == machine["gpu"]:
            found = old["parts"]
    for part in PARTS if args.part == "all" else (args.part,):
        print(f"{time.strftime('%H:%M:%S')} {part}: see {OUT / part}.log", flush=True)
        (OUT / f"{part}.log").unlink(missing_ok=True)
        began = time.time()
        try:
            result = checks[part](args)
        except Exception:  # the other parts still run
            traceback.print_exc()
            result = dict(status=f"failed: {traceback.format_exc().splitlines()[-1]}")
        found[part] = dict(result, minutes=(time.time() - began) / 60)
        speed.write_json(OUT / "gpu_check.json", dict(machine=machine, rehearsal=args.cpu, parts=found))
        (OUT / "gpu_check.txt").write_text(report(found) + "\n")
    print(report(found))
    print(f"written: {OUT / 'gpu_check.json'}, {OUT / 'gpu_check.txt'}")
    bad = [part for part, result in found.items() if result["status"] != "ok"]
    if bad:
        sys.exit(f"error: {', '.join(bad)} failed")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
