"""Run a grid of algorithms x tasks x seeds on Ray, on this machine or a cluster; the same command goes on after a stop.

    python benchmarks/run.py --algos skimo spirl --env-ids maze kitchen --seeds 1 2 3 4 5
    python benchmarks/run.py --suite held-out                                  # a set of runs by name: suites.py
    python benchmarks/run.py --algos skimo --env-ids maze --dry-run            # print the commands, run nothing
    python benchmarks/run.py --address auto --device cuda --runs-per-gpu 4     # on a node of a running Ray cluster

A cell of the grid is one plain command, `python algos/NAME.py --env-id TASK --seed SEED ...`. It works in a folder of
its own, RUN_DIR/TASK/NAME/seedSEED, which holds the algorithm's run folder, `log.txt` and `attempts.jsonl` (time,
commit and machine of every start). A run that fails, is killed or loses its node is started again from its checkpoint.
What a finished run leaves is small: RESULTS_DIR/TASK/NAME/seedSEED.csv and .json, which benchmarks/report.py reads; a
cell that has them is never run again. Its last checkpoint is kept as CHECKPOINTS_DIR/TASK/NAME/seedSEED.pt, which the
JSON names; `python algos/NAME.py --evaluate THAT` evaluates it again. It is large: keep it outside git.
"""

import contextlib
import csv
import fcntl
import importlib
import json
import math
import os
import pickletools
import platform
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal

import tyro

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # sends nothing to anybody
os.environ.setdefault("RAY_worker_niceness", "0")  # runs get the priority of the command typed by hand

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import provenance, scores
from benchmarks.provenance import describe_code, describe_machine
from benchmarks.suites import HELD_OUT, SEEDS, SUITES, Board
from data_tools import TASKS
from data_tools.files import check_writable, write_atomically
from data_tools.tasks.vector import num_cores

LOCK_TIMEOUT = 300  # seconds to wait until a run whose runner or node was lost has saved and ended
STOP_TIMEOUT = 600  # seconds that runs get to save when the runner is stopped: a block of updates can take minutes
PAUSE = 30  # seconds times the try, before a run is started again that was killed or lost, as for want of memory

# Flags of a run that the runner alone sets
OURS = "--env-id --seed --device --run-dir --data-dir --resume --evaluate".split()

# Starts the command with SIGTERM (save and stop) as its fate when the Ray worker above it dies; only Linux can do that.
LAUNCH = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 15)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the Ray worker is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


@dataclass
class Args:
    suite: Literal[*SUITES] | None = None  # take methods, tasks, seeds and env steps from suites.py
    algos: tuple[str, ...] = ("skimo",)  # names of files in --algos-dir, without .py
    env_ids: tuple[str, ...] = ("maze",)  # tasks, Gymnasium's as well, or boards of benchmarks/suites.py
    seeds: tuple[int, ...] = SEEDS  # one run each
    data: str = "scripted"  # offline data of the methods that have some: scripted, d4rl, release or a path
    args: str = ""  # more flags for every run, as one string: --args "--total-timesteps 100000"
    results_dir: Path = Path("runs/results")  # CSV and JSON of finished runs; small
    run_dir: Path = Path("runs")  # run folders with checkpoints and logs; on a cluster, on a shared file system
    checkpoints_dir: Path = Path("runs/checkpoints")  # last checkpoints of finished runs, as shared as run_dir
    keep: tuple[int, ...] = ()  # env steps at which a checkpoint is kept there, too
    data_dir: str | None = os.environ.get("SKIMO_DATA_DIR")  # offline data and pre-trained models (None: user's cache)
    algos_dir: Path = ROOT / "algos"  # where the algorithm files are
    dry_run: bool = False  # print the commands and stop

    address: str | None = None  # of a running Ray cluster: host:port, or auto (None: this machine alone)
    num_cpus: int = num_cores()  # cores to use (without --address)
    threads_per_run: int = 1  # CPU threads of a run, and cores that Ray sets aside for it
    device: Literal["cpu", "cuda"] | None = None  # where runs learn and plan (None: on a GPU if Ray finds any)
    runs_per_gpu: int = 1  # runs that share a GPU
    max_retries: int = 3  # how often a run is started again before it counts as failed

    def __post_init__(self):
        for name in ("results_dir", "run_dir", "checkpoints_dir", "algos_dir"):
            setattr(self, name, getattr(self, name).expanduser())  # a shell leaves --run-dir=~/runs as it is
        if self.data not in ("scripted", "d4rl", "release"):
            self.data = os.path.abspath(os.path.expanduser(self.data))  # workers run elsewhere


@dataclass
class Cell:
    """One run of the grid and what the runner knows about it."""

    algo: str
    env_id: str  # or board
    seed: int
    command: list[str]
    folder: Path  # run folder, log.txt, attempts.jsonl, lock
    result: Path  # of the finished run, without suffix
    checkpoint: Path  # where the finished run's checkpoint is kept
    flags: list[str]  # that set it apart from a plain run of the file
    family: tuple  # cells of a family use the same pre-trained model: one of them makes it, then the others start
    state: str = "waiting"  # waiting (for the family's pre-training), queued, pre-training, RL, finished, failed
    tries: int = 0
    not_before: float = 0.0  # when it may be started again, by time.monotonic()
    log_size: int = 0  # of log.txt when it was queued; the log grows as soon as a worker has taken it
    pretrained: bool = False  # its pre-trained model has been made
    step: str = ""
    episodic_return: str = ""
    eta: str = ""
    problem: str = ""

    @property
    def name(self) -> str:
        return f"{self.env_id}/{self.algo}/seed{self.seed}"


# ----------------------------------------------------------------------------------------------------------- one cell
def find_run_dir(folder: Path) -> Path | None:
    """The algorithm's run folder in a cell's folder, or None; the newest, should there be several."""
    return max((path.parent for path in folder.rglob("args.json")), default=None)  # names of tasks may have a slash


def parsed(text: str):
    """What JSON says, or None if it is not whole."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_json(path: Path):
    """Content of a JSON file, or None if it is not there or not whole."""
    return parsed(path.read_text()) if path.is_file() else None


def read_attempts(folder: Path) -> list[dict]:
    """Starts of a cell so far; a line that a power cut tore is left out."""
    path = folder / "attempts.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [attempt for attempt in map(parsed, lines) if attempt]


def log_tail(folder: Path, lines: int = 8) -> str:
    """Last lines of a cell's log; of a progress bar, its last state."""
    path = folder / "log.txt"
    text = path.read_bytes()[-8192:].decode(errors="replace") if path.exists() else ""
    text = [line.split("\r")[-1] for line in text.rstrip("\r\n").split("\n")]
    return "\n".join([line for line in text if line.strip()][-lines:])


def keep(source: Path, target: Path):
    """Copy a file; the copy has its name when it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_suffix(".part")
    shutil.copyfile(source, part)
    with part.open("r+b") as file:
        os.fsync(file)  # before the log says that this cell is done
    part.replace(target)


def step_of(checkpoint: Path) -> int:
    """The env step of a checkpoint, read from its pickle without torch, which takes seconds and hundreds of MB."""
    with zipfile.ZipFile(checkpoint) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        ops = pickletools.genops(archive.read(name))
    found = ((op.name, value) for op, value, _ in ops if "PUT" not in op.name)
    return next(next(found)[1] for _, value in found if value == "global_step")


def keep_early(run_dir: Path | None, checkpoint: Path, marks: tuple[int, ...], seen: list):
    """Copy a new checkpoint, if it is the first behind one of the marks, to seedN_MARK.pt; seen: its time and size."""
    source = run_dir and run_dir / "checkpoint.pt"
    if not source or not source.exists():
        return
    state = [source.stat().st_mtime_ns, source.stat().st_size]
    if state != seen:
        seen[:] = state
        step = step_of(source)
        mark = max((mark for mark in marks if mark <= step), default=None)
        target = checkpoint.with_stem(f"{checkpoint.stem}_{mark}")
        if mark and step < 1.1 * mark and not target.exists():
            keep(source, target)


def run_cell(command: list[str], flags: list[str], folder: Path, checkpoint: Path, threads: int, marks=()) -> dict:
    """On a Ray worker: run a cell to its end, from its last checkpoint if there is one, and return what it left.

    The last checkpoint is copied to `checkpoint`, those of `marks` (env steps) beside it. Returns `episodes` (text of
    episodes.csv), `results`, `args` and `attempts`, or `problem`, a sentence, with `exit_code`. The content and not the
    path is returned, so that it arrives without a shared file system, too.
    """
    # ray.cancel comes as SIGINT, which all processes under a background job of a shell script ignore (nohup ... &).
    signal.signal(signal.SIGINT, signal.default_int_handler)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock, (folder / "log.txt").open("ab") as log:
        # The run inherits the lock, so it is held until the run itself has ended, whatever became of its worker.
        deadline = time.time() + LOCK_TIMEOUT
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.time() > deadline:
                    return dict(problem=f"another process works in {folder}; end it and start again", exit_code=None)
                time.sleep(0.2)

        run_dir = find_run_dir(folder)
        if run_dir is None or read_json(run_dir / "results.json") is None:
            if run_dir is not None:  # keeps the curves of pre-training
                command = resumed(command, run_dir)
            attempt = dict(time=time.strftime("%Y-%m-%d %H:%M:%S"), flags=flags, command=shlex.join(command))
            attempt |= dict(**describe_code(), machine=describe_machine(), threads=threads)
            with (folder / "attempts.jsonl").open("a") as file:
                file.write("\n" + json.dumps(attempt) + "\n")  # a new line, even after one that was torn
            log.write(f"\n=== {attempt['time']} on {platform.node()}: {attempt['command']}\n".encode())
            log.flush()

            variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
            environment = os.environ | dict.fromkeys(variables, str(threads)) | dict(TQDM_MININTERVAL="5")
            process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), sys.executable, *command[1:]],
                env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()],
            )  # fmt: skip
            seen = []
            try:
                while process.poll() is None:
                    time.sleep(0.1)
                    keep_early(marks and find_run_dir(folder), checkpoint, marks, seen)
            except BaseException:  # ray.cancel, as the runner is being stopped, or a full disk
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except subprocess.TimeoutExpired:
                    process.kill()
                raise
            run_dir = find_run_dir(folder)
            if process.returncode:
                code = process.returncode if process.returncode > 0 else None  # None: killed from outside
                return dict(problem=f"ended with exit code {process.returncode}", exit_code=code)
        results = run_dir and read_json(run_dir / "results.json")
        if not results:
            return dict(problem="ended without a whole results.json", exit_code=0)
        keep(run_dir / "checkpoint.pt", checkpoint)
        outcome = dict(episodes=(run_dir / "episodes.csv").read_text(), results=results)
        return outcome | dict(args=read_json(run_dir / "args.json"), attempts=read_attempts(folder))


def write_results(cell: Cell, outcome: dict):
    """CSV of a finished run, then its JSON, whose presence says that both are whole.

    A row of the CSV is a training episode (with exploration) or a clean evaluation, by env step; wall_seconds are those
    of RL so far, without pre-training.
    """
    rows = []
    for row in csv.DictReader(outcome["episodes"].splitlines()):
        seconds = f"{60 * float(row['rl_minutes']):.1f}"
        rows.append([int(row["env_step"]), row["episodic_return"], row["episodic_length"], "", "", seconds])
    for env_step, eval_return, eval_success in outcome["results"]["evaluations"]:
        seconds = max((float(row[5]) for row in rows if row[0] <= env_step), default=0.0)
        rows.append([int(env_step), "", "", eval_return, eval_success, f"{seconds:.1f}"])
    rows.sort(key=lambda row: row[0])
    header = ["env_step", "episodic_return", "episodic_length", "eval_return", "eval_success", "wall_seconds"]
    table = "\n".join(",".join(str(value) for value in row) for row in [header, *rows]) + "\n"
    last = outcome["attempts"][-1]
    facts = dict(algo=cell.algo, env_id=outcome["args"]["env_id"], seed=cell.seed)
    facts |= {name: last[name] for name in ("flags", "commit", "changed", "machine")}
    facts |= dict(attempts=outcome["attempts"], args=outcome["args"], checkpoint=str(cell.checkpoint))
    facts |= dict(results={name: value for name, value in outcome["results"].items() if name != "args"})
    for suffix, text in ((".csv", table), (".json", json.dumps(facts, indent=1))):
        write_atomically(cell.result.with_suffix(suffix), lambda part, text=text: part.write_text(text))


# --------------------------------------------------------------------------------------------------------- the display
def observe(cell: Cell):
    """Read a started cell's state, step, return and time left from its files."""
    run_dir, log = find_run_dir(cell.folder), cell.folder / "log.txt"
    if cell.state == "queued" and log.exists() and log.stat().st_size > cell.log_size:
        cell.state = "pre-training"
    if cell.state not in ("pre-training", "RL") or run_dir is None:
        return
    try:
        lines = (run_dir / "episodes.csv").read_text().split("\n")[1:-1][-100:]  # whole ones, without the header
    except OSError:
        percent = re.findall(r"(\d+)%\|", log_tail(cell.folder, 1))
        cell.step = f"{percent[-1]} %" if percent else ""
        return
    cell.state, cell.pretrained = "RL", True
    episodes = [[float(value) for value in line.split(",")] for line in lines if line.count(",") == 3]
    total = (read_json(run_dir / "args.json") or {}).get("total_timesteps")
    if episodes and total:
        (first, _, _, start), (step, _, _, minutes) = episodes[0], episodes[-1]
        cell.step = f"{step:,.0f} / {total:,.0f}"
        cell.episodic_return = f"{sum(row[1] for row in episodes[-20:]) / len(episodes[-20:]):.2f}"
        if step > first:
            left = max(0.0, total - step) * (minutes - start) / (step - first)
            cell.eta = f"{int(left // 60)}:{int(left % 60):02d} h"


def table(cells: list[Cell], max_rows: int) -> list[str]:
    """Lines of the table: what runs or failed comes first; what does not fit is counted."""
    order = ["failed", "RL", "pre-training", "queued", "waiting", "finished"]
    cells = sorted(cells, key=lambda cell: order.index(cell.state))
    shown = cells if len(cells) <= max_rows else cells[: max(max_rows - 1, 0)]
    rows = [("run", "state", "step", "return (last 20)", "time left", "tries")]
    for cell in shown:
        eta = cell.eta if cell.state == "RL" else ""
        rows.append((cell.name, cell.state, cell.step, cell.episodic_return, eta, str(cell.tries)))
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(value.ljust(width) for value, width in zip(row, widths)).rstrip() for row in rows]
    if len(shown) < len(cells):
        hidden = [cell.state for cell in cells[len(shown) :]]
        lines.append("and " + ", ".join(f"{hidden.count(state)} {state}" for state in order if state in hidden))
    return lines


class Display:
    """The live table in a terminal; elsewhere, a line whenever a run changes its state."""

    def __init__(self):
        self.terminal, self.height, self.states = sys.stdout, 0, {}

    def show(self, cells: list[Cell]):
        if self.terminal.isatty():
            columns, rows = shutil.get_terminal_size()
            lines = [line[: columns - 1] for line in table(cells, rows - 4)]
            up = f"\x1b[{self.height}F" if self.height else ""
            self.terminal.write(up + "\x1b[J" + "\n".join(lines) + "\n")
            self.height = len(lines)
        else:
            for cell in cells:
                if self.states.get(cell.name) != (cell.state, cell.tries):
                    problem = f" ({cell.problem})" if cell.problem and cell.state in ("queued", "failed") else ""
                    line = f"{time.strftime('%H:%M:%S')} {cell.name}: {cell.state}, try {cell.tries}{problem}"
                    print(line, file=self.terminal)
                self.states[cell.name] = (cell.state, cell.tries)
        self.terminal.flush()


# ------------------------------------------------------------------------------------------------------------ the grid
def resumed(command: list[str], run_dir: Path) -> list[str]:
    """The command that goes on with a run. Where folders were, the run itself has noted: they may have moved."""
    command = list(command)
    for flag in ("--run-dir", "--data-dir"):
        if flag in command:
            at = command.index(flag)
            del command[at : at + 2]
    return [*command, "--resume", str(run_dir)]


def pretrained_name(file: Path) -> str:
    """What an algorithm file says about its pre-trained model, PRETRAINED = "...", or its own name."""
    said = re.search(r'^PRETRAINED = "(.+)"', file.read_text(), re.MULTILINE)
    return said[1] if said else file.stem


def make_cells(args: Args) -> list[Cell]:
    """All cells of the grid with their commands; those with results are marked as finished."""
    flags = shlex.split(args.args)
    names = [flag.split("=")[0].replace("_", "-") for flag in flags]
    for name in names:
        if name in OURS:
            sys.exit(f"error: {name} in --args would mix up the grid; leave it out")
    tasks = {name: Board(name) for name in args.env_ids if name in TASKS or name not in HELD_OUT}
    boards = SUITES[args.suite].boards if args.suite else HELD_OUT | tasks
    for name in args.env_ids:
        if name not in boards:
            sys.exit(f"error: {name} is no board of --suite {args.suite}: {', '.join(boards)}")
    places = args.run_dir, args.results_dir, args.checkpoints_dir
    cells = []
    for env_id, seed, algo in product(*map(dict.fromkeys, (args.env_ids, args.seeds, args.algos))):
        folder, result, kept = ((place / env_id / algo / f"seed{seed}").resolve() for place in places)
        file = (args.algos_dir / f"{algo}.py").resolve()
        board = boards[env_id]
        task = board.env_id
        family = pretrained_name(file), TASKS[task].data or task, board.data_share, seed  # kitchens share one
        command = ["python", str(file), "--env-id", task, "--seed", str(seed), "--run-dir", str(folder)]
        with_data = "data_dir" in file.read_text()  # a file without offline data has no such flag
        if args.data_dir and with_data:
            command += ["--data-dir", os.path.abspath(os.path.expanduser(args.data_dir))]
        command += ["--device", args.device] if args.device else []
        own = ["--total-timesteps", str(board.env_steps)] if board.env_steps else []
        own += ["--data", args.data] if with_data and args.data != "scripted" else []
        own += ["--data-share", str(board.data_share)] if with_data and board.data_share < 1 else []
        own += ["--checkpoint-interval", str(math.gcd(*args.keep))] if args.keep else []
        own += flags
        cell = Cell(algo, env_id, seed, command + own, folder, result, kept.with_suffix(".pt"), own, family)
        cell.pretrained = "--pretrained" in names
        if board.data_share < 1 and not with_data:
            sys.exit(f"error: {env_id} has a share of the data, {algo} none: leave one out")
        if board.data_share < 1 and {"--pretrained", "--data-share"} & set(names):
            sys.exit(f"error: {env_id} has a share of the data: leave --pretrained and --data-share out of --args")
        check_flags(cell)
        cells.append(cell)
    return cells


def estimate(cells: list[Cell]) -> str:
    """What unfinished cells would take, at the rates of published logs: of their task, or of the one it comes from."""
    published, models, hours, unknown = scores.read_cells(scores.RESULTS), {}, 0.0, {}
    for cell in [cell for cell in cells if cell.state != "finished"]:
        task = cell.command[cell.command.index("--env-id") + 1]
        found = [published.get((name, cell.algo, "scripted")) for name in (task, TASKS[task].data)]
        runs = [run for run in next(filter(None, found), []) if run.facts["args"].get("device") != "cuda"]
        small = "--cpu-preset" in cell.command  # then smaller networks, fewer updates
        runs = [run for run in runs if run.facts["args"].get("cpu_preset", False) == small]
        if not runs:
            unknown[f"{cell.env_id}/{cell.algo}"] = True
            continue
        given = re.findall(r"--total.timesteps[= ]([\d_]+)", " ".join(cell.command))
        algo = importlib.import_module(f"algos.{cell.algo}")
        steps = given[-1] if given else algo.parse_args(cell.command[2:]).total_timesteps
        rates = [scores.minutes_at(run, run.end) / run.env_steps for run in runs]
        hours += int(steps) * sum(rates) / len(rates) / 60
        minutes = max(run.pretraining.get("minutes", 0) for run in runs)
        models |= {cell.family: minutes / 60} if minutes and not cell.pretrained else {}
    text = f"# at the rates of our logs: {hours:.1f} core-hours of RL"
    text += f", {sum(models.values()):.1f} of pre-training, if none of {len(models)} models is there" if models else ""
    return text + (f"; not known: {', '.join(unknown)}" if unknown else "")


def check_flags(cell: Cell):
    """Mark a finished cell; refuse one that was begun with other flags, whose numbers would be mixed with ours."""
    where, begun = cell.folder, read_attempts(cell.folder)
    facts = read_json(cell.result.with_suffix(".json"))
    if facts is not None:
        cell.state, cell.pretrained = "finished", True
        where, begun = cell.result.with_suffix(".json"), [facts]
    if begun and begun[-1]["flags"] != cell.flags:
        made, given = shlex.join(begun[-1]["flags"]), shlex.join(cell.flags)
        sys.exit(
            f"error: {where} was made with --args {made!r}, not {given!r}; give the same flags, or other folders with "
            "--run-dir, --results-dir and --checkpoints-dir"
        )


def connect(args: Args) -> float:
    """Join the cluster at --address, or start Ray on this machine; returns the share of a GPU that a run gets.

    Refuses a cluster that cannot run a single cell.
    """
    import ray  # 2 seconds and 240 MB: only where cells run

    if args.address is None:
        where = dict(address="local", num_cpus=args.num_cpus, include_dashboard=False, object_store_memory=80 * 2**20)
        fault, cure = "Ray does not start", "end others, or set RAY_raylet_start_wait_time_s=170"
    else:
        where, fault = dict(address=args.address), f"no Ray cluster can be joined at --address {args.address}"
        cure = "start Ray there (`ray start --head`), run this on one of the cluster's nodes, or leave --address out"
    try:
        if args.address not in (None, "auto"):  # Ray itself tries for minutes
            host, _, port = args.address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(**where, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # on a very busy machine: a plain Exception
        sys.exit(f"error: {fault} ({' '.join(str(error).split())[:200]}); {cure}")
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = args.device == "cuda" or (args.device is None and any(node.get("GPU") for node in nodes))
    nodes = [node for node in nodes if node.get("GPU") or not gpus]
    if max((node.get("CPU", 0) for node in nodes), default=0) < args.threads_per_run:
        kind = "a GPU and " if gpus else ""
        ray.shutdown()
        sys.exit(f"error: no machine that Ray knows has {kind}{args.threads_per_run} CPU cores (--threads-per-run)")
    return 1 / args.runs_per_gpu if gpus else 0


def may_start(cell: Cell, cells: list[Cell]) -> bool:
    """Whether the family's model is there, or the cell is the one to pre-train it: the family's first that can."""
    family = [other for other in cells if other.family == cell.family]
    able = [other for other in family if other.state != "failed"]
    return any(other.pretrained for other in family) or cell is able[0]


def run_grid(args: Args, cells: list[Cell], gpus: float, display: Display):
    """Run what is not finished until every cell is finished or failed. Raises KeyboardInterrupt when stopped."""
    import ray

    ray.cloudpickle.register_pickle_by_value(provenance)  # Ray's workers do not find the folder benchmarks/
    remote = ray.remote(run_cell).options(num_cpus=args.threads_per_run, num_gpus=gpus, max_retries=0)
    running = {}
    try:
        while any(cell.state not in ("finished", "failed") for cell in cells):
            for cell in cells:
                rested = time.monotonic() >= cell.not_before
                if cell.state == "waiting" and rested and may_start(cell, cells):
                    cell.state, cell.tries = "queued", cell.tries + 1
                    log = cell.folder / "log.txt"
                    cell.log_size = log.stat().st_size if log.exists() else 0
                    inputs = cell.command, cell.flags, cell.folder, cell.checkpoint, args.threads_per_run, args.keep
                    running[remote.remote(*inputs)] = cell
            display.show(cells)
            if not running:
                time.sleep(1.0)
            done, _ = ray.wait(list(running), timeout=1.0)
            for cell in running.values():
                observe(cell)
            for ref in done:
                cell = running.pop(ref)
                try:
                    outcome = ray.get(ref)
                except ray.exceptions.RayTaskError as error:  # raised in the worker, as by a full disk
                    outcome = dict(problem=str(error).strip().split("\n")[-1], exit_code=None)
                except ray.exceptions.RayError as error:  # the worker or its node died
                    outcome = dict(problem=str(error).strip().split(". ")[0], exit_code=None)
                if outcome.get("exit_code", 0) is None:
                    cell.not_before = time.monotonic() + PAUSE * cell.tries  # memory may be free again then
                if "problem" not in outcome:
                    try:
                        write_results(cell, outcome)
                        cell.state, cell.pretrained = "finished", True
                    except (LookupError, TypeError, ValueError) as error:
                        cell.problem = f"results.json or episodes.csv is not as benchmarks/README.md says ({error!r})"
                        cell.state = "failed"
                else:
                    cell.problem = outcome["problem"]
                    hopeless = outcome["exit_code"] == 2  # the command line is wrong
                    cell.state = "failed" if hopeless or cell.tries > args.max_retries else "waiting"
        display.show(cells)
    except KeyboardInterrupt:
        print("stopping: runs save (once more: stops at once)", file=display.terminal, flush=True)
        for ref in running:
            ray.cancel(ref)
        ray.wait(list(running), num_returns=len(running), timeout=STOP_TIMEOUT + 10)
        raise
    finally:
        ray.shutdown()


def main(args: Args):
    """The grid from the check of its arguments to the summary; exit code 1 if a run failed for good."""
    for name, least in dict(threads_per_run=1, runs_per_gpu=1, num_cpus=1, max_retries=0).items():
        if getattr(args, name) < least:
            sys.exit(f"error: --{name.replace('_', '-')} {getattr(args, name)} is too small; give at least {least}")
    cells = make_cells(args)
    if args.dry_run:
        for cell in cells:
            note = "  # has results" if cell.state == "finished" else ""
            print(f"OMP_NUM_THREADS={args.threads_per_run} {shlex.join(cell.command)}{note}")
        print(estimate(cells))
        return
    if describe_code()["commit"] is None:
        sys.exit(f"error: {ROOT} is no git checkout with a commit, so results could not name their code")
    todo = sum(cell.state != "finished" for cell in cells)
    print(f"{len(cells)} runs, {len(cells) - todo} of them finished before")
    if todo:
        gpus, display = connect(args), Display()
        for path in (args.run_dir / "ray.txt", args.results_dir / "seed", args.checkpoints_dir / "seed"):
            check_writable(path)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
        # Ray's own threads print pages about lost nodes, which would tear the table.
        with (args.run_dir / "ray.txt").open("a") as messages, contextlib.redirect_stdout(messages):
            try:
                run_grid(args, cells, gpus, display)
            except KeyboardInterrupt:
                sys.exit("stopped; the same command goes on from here")
    failed = [cell for cell in cells if cell.state == "failed"]
    for cell in failed:
        print(f"\n{cell.name} failed {cell.tries} times: {cell.problem}. The end of {cell.folder / 'log.txt'}:")
        print("    " + log_tail(cell.folder).replace("\n", "\n    "))
    print(f"{len(cells) - len(failed)} of {len(cells)} runs are finished; results: {args.results_dir}")
    if failed:
        sys.exit(f"error: {len(failed)} runs failed; mend what their logs name and start the same command again")


def parse_args(argv: list[str]) -> Args:
    """Command line -> Args, whose defaults are those of the suite; the value of --args may begin with dashes."""
    if "--args" in argv[:-1]:
        place = argv.index("--args")
        argv[place : place + 2] = ["--args=" + argv[place + 1]]
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    suite = SUITES.get(given.suite)
    chosen = dict(algos=suite.algos, env_ids=tuple(suite.boards), seeds=suite.seeds, keep=suite.keep) if suite else {}
    default = Args(**chosen)
    return tyro.cli(Args, args=argv, default=default, description=__doc__.split("\n")[0])


if __name__ == "__main__":
    main(parse_args(sys.argv[1:]))
