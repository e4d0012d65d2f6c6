"""benchmarks/run.py on Ray: a node lost, the runner killed, runs that fail; one real run; bad input.

Most tests run a stand-in that behaves like an algorithm file (folders, checkpoints, --resume) and takes milliseconds.
"""

import csv
import dataclasses
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import tyro

from benchmarks import run

ROOT = Path(__file__).resolve().parents[1]

# The runner with a pause of 10 seconds instead of 30 before a lost run is started again
IMPATIENT = """
import sys, ray
from benchmarks import run
ray.cloudpickle.register_pickle_by_value(run)
run.PAUSE = 10
run.main(run.parse_args(sys.argv[1:]))
"""

STAND_IN = '''
"""Adds up random numbers; what it leaves depends on the seed alone, however often it is stopped and resumed."""
import argparse, json, os, random, signal, sys, time
from pathlib import Path

PRETRAINED = "skimo"
parser = argparse.ArgumentParser()
for name in ("env-id", "device", "run-dir", "data-dir", "resume", "crash-once", "crash-always"):
    parser.add_argument("--" + name)
parser.add_argument("--seed", type=int)
parser.add_argument("--total-timesteps", type=int, default=4000)
parser.add_argument("--delay", type=float, default=0.04)
parser.add_argument("--graceful", action="store_true")
args = parser.parse_args()
if args.resume:
    before = json.loads((Path(args.resume) / "args.json").read_text())
    for name in ("run_dir", "data_dir"):  # as the algorithm files, which refuse other flags
        if getattr(args, name) not in (None, before[name]):
            sys.exit(f"{name} cannot change with --resume")
        setattr(args, name, before[name])
data_dir, name = Path(args.data_dir), f"{args.env_id}__{Path(__file__).stem}__{args.seed}"
run_dir = Path(args.resume or Path(args.run_dir) / f"{name}__{time.time_ns() // 10**6}")
assert os.environ["OMP_NUM_THREADS"] == "1"
if (run_dir / "results.json").exists():
    sys.exit("finished runs must not be resumed")
run_dir.mkdir(parents=True, exist_ok=bool(args.resume))

def write(path, content):
    path.with_suffix(".part").write_text(json.dumps(content))
    path.with_suffix(".part").replace(path)

def note(line):
    with (data_dir / "notes.txt").open("a") as file:
        file.write(line + "\\n")

def stop(number, frame):
    save()
    note(f"saved {name}")
    sys.exit(1)

def save():
    write(run_dir / "checkpoint.pt", [step, rng.getstate(), episodes, minutes])

write(run_dir / "args.json", vars(args))
model = data_dir / f"skimo_{args.env_id}_{args.seed}.model"  # skimo_no_cem shares it
if not model.exists():
    time.sleep(5 * args.delay)
    note(f"pretrained {model.stem}")
    write(model, {})
rng, step, minutes, episodes = random.Random(args.seed), 0, 0.0, []
if (run_dir / "checkpoint.pt").exists():  # not yet, if it was stopped in pre-training
    step, state, episodes, minutes = json.loads((run_dir / "checkpoint.pt").read_text())
    rng.setstate((state[0], tuple(state[1]), state[2]))
if args.graceful:
    signal.signal(signal.SIGTERM, stop)
with (run_dir / "episodes.csv").open("w") as log:
    print("env_step,episodic_return,episodic_length,rl_minutes", *(",".join(map(str, e)) for e in episodes),
          sep="\\n", file=log, flush=True)
    while step < args.total_timesteps:
        time.sleep(args.delay)
        step, minutes = step + 100, minutes + args.delay / 60
        episodes.append([step, rng.random(), 100, minutes])
        print(*episodes[-1], sep=",", file=log, flush=True)
        once = str(args.seed) == args.crash_once and step == 1500 and not args.resume
        if str(args.seed) == args.crash_always or once:
            sys.exit(f"the stand-in fails at step {step}")
        if step % 500 == 0:
            save()
save()
total = sum(episode[1] for episode in episodes)
write(run_dir / "results.json", dict(evaluations=[[step // 2, total / 2, 0.0], [step, total, 1.0]], rl_minutes=minutes))
note(f"finished {name}")
'''


@pytest.fixture(scope="module")
def module_ray_dir():
    """A short folder for Ray (its sockets' names must not be long); at the end no process may be left in it."""
    path = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    yield path
    deadline = time.time() + 60  # after a SIGKILL some wait a while before they look for their parent
    while left := processes_in(path):
        assert time.time() < deadline, f"Ray left processes: {left}"
        time.sleep(0.2)
    shutil.rmtree(path)


@pytest.fixture
def ray_dir(module_ray_dir, monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", module_ray_dir)


@pytest.fixture(scope="module")
def cluster(module_ray_dir):
    """A Ray cluster of one node with two cores, which the tests share because its start takes seconds."""
    from ray.cluster_utils import Cluster

    quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_TMPDIR", module_ray_dir)
        head = dict(num_cpus=2, include_dashboard=False, object_store_memory=80 * 2**20, _system_config=quick)
        # As in `nohup ... &` of a script: what a background job starts ignores Ctrl-C, and its workers inherit that.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        cluster = Cluster(initialize_head=True, head_node_args=head)
        signal.signal(signal.SIGINT, handler)
        yield cluster
        cluster.shutdown()


def processes_in(*folders):
    """Processes that have a file of the folders open, other than this one; zombies have none."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            try:
                files = [os.readlink(file) for file in (process / "fd").iterdir()]
            except OSError:
                continue
            if any(file.startswith(f"{folder}/") for file in files for folder in folders):
                found.append(int(process.name))
    return found


@pytest.fixture
def grid(tmp_path):
    """Folders with the stand-in as skimo.py and skimo_no_cem.py, and the runner's arguments that name them."""
    (tmp_path / "algos").mkdir()
    (tmp_path / "data").mkdir()
    for name in ("skimo", "skimo_no_cem"):
        (tmp_path / "algos" / f"{name}.py").write_text(STAND_IN)
    return tmp_path


def command(folder, arguments, flags=""):
    """Command line of the runner in a folder of the fixture above."""
    places = [f"--{name}-dir={folder / name}" for name in ("algos", "data", "results", "run", "checkpoints")]
    return [sys.executable, ROOT / "benchmarks/run.py", *places, *arguments.split(), "--device", "cpu", "--args", flags]


def execute(arguments):
    return subprocess.run(arguments, capture_output=True, text=True, timeout=120)


def expected(folder, algo, seed, flags=""):
    """(env step, return) of all episodes of a cell, by the stand-in itself without Ray or interruption."""
    own = folder / "expected"
    arguments = f"--env-id maze --seed {seed} --run-dir {own / str(seed)} --data-dir {own} --delay 0 {flags}"
    own.mkdir(exist_ok=True)
    (own / f"skimo_maze_{seed}.model").touch()
    subprocess.run(
        [sys.executable, folder / "algos" / f"{algo}.py", *shlex.split(arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, timeout=60,
    )  # fmt: skip
    (episodes,) = (own / str(seed)).glob("*/episodes.csv")
    rows = [(row["env_step"], row["episodic_return"]) for row in csv.DictReader(episodes.open())]
    shutil.rmtree(own)
    return rows


def episodes_of(result):
    """(env step, return) of the training episodes in a CSV of the runner."""
    rows = list(csv.DictReader(result.open()))
    assert all(None not in row and None not in row.values() for row in rows)
    return [(row["env_step"], row["episodic_return"]) for row in rows if row["episodic_return"]]


def check_finished(folder, algos, seeds, flags=""):
    """Every cell finished once, pre-trained once per seed, with the numbers of an undisturbed run."""
    notes = (folder / "data" / "notes.txt").read_text().splitlines()
    assert len(notes) == len(set(notes)), notes
    assert {line for line in notes if line.startswith("pretrained")} == {f"pretrained skimo_maze_{s}" for s in seeds}
    for algo in algos:
        for seed in seeds:
            result = folder / "results" / "maze" / algo / f"seed{seed}.csv"
            assert episodes_of(result) == expected(folder, algo, seed, flags)
            facts = json.loads(result.with_suffix(".json").read_text())
            assert (facts["algo"], facts["env_id"], facts["seed"]) == (algo, "maze", seed)
            assert len(facts["commit"]) == 40 and "cores" in facts["machine"] and facts["args"]["seed"] == seed
            (checkpoint,) = (folder / "run" / "maze" / algo / f"seed{seed}").glob("*/checkpoint.pt")
            assert Path(facts["checkpoint"]).read_text() == checkpoint.read_text()
            evaluations = [row for row in csv.DictReader(result.open()) if row["eval_return"]]
            assert [float(row["eval_return"]) for row in evaluations] == [e[1] for e in facts["results"]["evaluations"]]
    logs = [path.read_text() for path in folder.glob("run/maze/*/*/log.txt")]
    assert len(logs) == len(algos) * len(seeds) and not any("must not be resumed" in log for log in logs)
    names = {path.name for path in (folder / "results").rglob("*") if path.is_file()}
    assert names == {f"seed{seed}.{kind}" for seed in seeds for kind in ("csv", "json")}


def started(folder):
    """How often runs were started so far."""
    return sum(len(run.read_attempts(path.parent)) for path in folder.glob("run/maze/*/*/attempts.jsonl"))


def test_a_torn_line_of_attempts_takes_no_other_with_it(tmp_path):
    (tmp_path / "attempts.jsonl").write_text('{"time": "2026')
    command = ["python", "-c", "import os; raise SystemExit(int(os.environ['OMP_NUM_THREADS']))"]
    outcome = run.run_cell(command, ["--seed"], tmp_path, tmp_path / "checkpoint.pt", 3)
    assert outcome["exit_code"] == 3
    assert [(one["flags"], one["threads"]) for one in run.read_attempts(tmp_path)] == [(["--seed"], 3)]


def cells_under(ancestor):
    """Folders of the cells whose runs descend from a process."""
    parents, folders = {}, {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = int((process / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if "--run-dir" in words:
            folders[int(process.name)] = Path(words[words.index("--run-dir") + 1])
    found = []
    for pid, folder in folders.items():
        while pid in parents and pid != ancestor:
            pid = parents[pid]
        found += [folder] if pid == ancestor else []
    return found


def wait_until(condition, process, seconds=60):
    deadline = time.time() + seconds
    while not condition():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.05)


# --------------------------------------------------------------------------------------------------------- disturbances


def test_the_killed_runner_goes_on(grid, cluster, ray_dir):
    """First of all: what a killed Ray leaves takes a minute to end, for which module_ray_dir would wait."""
    own_ray = command(grid, "--algos skimo skimo_no_cem --seeds 1 2 --num-cpus 2", "--delay 0.06")
    shared = command(grid, f"--algos skimo skimo_no_cem --seeds 1 2 --address {cluster.address}", "--delay 0.06")
    moments, before = random.Random(0), {}
    for kill in range(3):  # at any time while the runner starts Ray itself and works; then, with Ray there, in the work
        starts = started(grid)
        arguments = own_ray if kill < 1 else shared
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if kill >= 1:
            wait_until(lambda: started(grid) > starts, process)  # noqa: B023
        time.sleep(moments.uniform(0, 1.5 if kill >= 1 else 6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (grid / "results").rglob("seed*.json"):  # whole, and never written again
            state = (path.stat().st_mtime_ns, path.read_text(), path.with_suffix(".csv").read_text())
            assert json.loads(state[1]) and before.setdefault(path, state) == state
    result = execute(shared)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "4 of 4 runs are finished" in result.stdout
    for path, state in before.items():
        assert (path.stat().st_mtime_ns, path.read_text(), path.with_suffix(".csv").read_text()) == state
    check_finished(grid, ["skimo", "skimo_no_cem"], [1, 2])
    again = execute(own_ray)
    assert again.returncode == 0 and "4 runs, 4 of them finished before" in again.stdout


def test_a_lost_node_costs_nothing_but_time(grid, cluster, ray_dir):
    node = cluster.add_node(num_cpus=2, object_store_memory=80 * 2**20)
    arguments = command(grid, f"--algos skimo skimo_no_cem --seeds 1 2 --address {cluster.address}", "--delay 0.06")
    impatient = [sys.executable, "-c", IMPATIENT, *arguments[2:]]
    process = subprocess.Popen(impatient, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        raylet = node.all_processes["raylet"][0].process.pid
        wait_until(lambda: any(list(cell.glob("*/checkpoint.pt")) for cell in cells_under(raylet)), process)
        cluster.remove_node(node, allow_graceful=False)
        output, _ = process.communicate(timeout=180)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "4 of 4 runs are finished" in output
    assert "queued, try 2 (" in output
    assert "Raylet is terminated" not in output  # Ray's messages go to ray.txt
    check_finished(grid, ["skimo", "skimo_no_cem"], [1, 2])
    attempts = [run.read_attempts(path.parent) for path in grid.glob("run/maze/*/*/attempts.jsonl")]
    assert max(map(len, attempts)) == 2, attempts
    begun = [[time.mktime(time.strptime(one["time"], "%Y-%m-%d %H:%M:%S")) for one in cell] for cell in attempts]
    assert all(cell[-1] - cell[0] >= 10 for cell in begun if len(cell) == 2), attempts
    assert "--resume" in "".join(path.read_text() for path in grid.glob("run/maze/*/*/log.txt"))


@pytest.mark.parametrize("end, code", [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", None)])
def test_a_killed_run_is_told_from_one_that_failed(tmp_path, end, code):
    """The runner waits before it starts a killed one again."""
    program = [sys.executable, "-c", f"import os, sys; {end}"]
    outcome = run.run_cell(program, [], tmp_path / "cell", tmp_path / "kept.pt", 1)
    assert outcome == dict(problem=f"ended with exit code {code or -9}", exit_code=code)


def test_failures_are_retried_then_reported_and_a_stop_saves(grid, cluster):
    flags = "--crash-once 1 --crash-always 2 --graceful --delay 0.1"
    arguments = command(grid, f"--seeds 1 2 --max-retries 1 --address {cluster.address}", flags)
    result = execute(arguments)
    assert result.returncode == 1 and "Traceback" not in result.stdout + result.stderr
    assert "maze/skimo/seed1: queued, try 2" in result.stdout and "maze/skimo/seed1: finished" in result.stdout
    assert "maze/skimo/seed2 failed 2 times: ended with exit code 1." in result.stdout
    assert "    the stand-in fails at step 100" in result.stdout
    assert result.stderr.startswith("error: 1 runs failed;")
    assert not (grid / "results" / "maze" / "skimo" / "seed2.json").exists()

    other = execute(command(grid, "--seeds 1 2"))
    assert other.returncode == 1 and "was made with --args" in other.stderr
    mistyped = execute(command(grid, f"--seeds 3 --address {cluster.address}", "--gracefull"))
    assert mistyped.returncode == 1 and "maze/skimo/seed3 failed 1 times: ended with exit code 2." in mistyped.stdout
    shutil.rmtree(grid / "run" / "maze" / "skimo" / "seed3")

    mended = (grid / "algos" / "skimo.py").read_text().replace("args.crash_always", "'nobody'")
    (grid / "algos" / "skimo.py").write_text(mended)
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_until(lambda: list(grid.glob("run/maze/skimo/seed2/*/checkpoint.pt")), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped; the same command goes on" in output and "Traceback" not in output
    assert "saved maze__skimo__2" in (grid / "data" / "notes.txt").read_text()
    assert processes_in(grid) == []  # the run itself has ended, too

    result = execute(arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    check_finished(grid, ["skimo"], [1, 2])


def test_a_real_run(data_dir, tmp_path, cluster):
    flags = (
        "--hidden-dim 16 --latent-dim 8 --skill-dim 3 --num-envs 1 --batch-size 8 --num-samples 16 "
        "--num-policy-trajs 4 --num-elites 6 --cem-iters 2 --pretrain-batch-size 8 --pretrain-updates 6 "
        "--pretrain-eval-episodes 1 --eval-episodes 1 --total-timesteps 2100 --warmup-steps 1000"
    )
    places = ["--results-dir", tmp_path / "results", "--run-dir", tmp_path / "runs", "--data-dir", data_dir]
    places += ["--checkpoints-dir", tmp_path / "kept"]
    arguments = [*places, "--seeds", "3", "--device", "cpu", "--address", cluster.address, "--max-retries", "0"]
    arguments += ["--keep", "2000"]
    result = execute([sys.executable, ROOT / "benchmarks" / "run.py", *arguments, "--args", flags])
    assert result.returncode == 0, result.stdout + result.stderr
    (run_dir,) = (tmp_path / "runs" / "maze" / "skimo" / "seed3").glob("maze__skimo__*")
    rows = list(csv.DictReader((run_dir / "episodes.csv").open()))
    table = tmp_path / "results" / "maze" / "skimo" / "seed3.csv"
    seconds = [float(row["wall_seconds"]) for row in csv.DictReader(table.open()) if row["episodic_return"]]
    assert seconds == pytest.approx([60 * float(row["rl_minutes"]) for row in rows], abs=0.06)
    own = [(row["env_step"], row["episodic_return"]) for row in rows]
    assert episodes_of(table) == own and len(own) > 0
    facts = json.loads(table.with_suffix(".json").read_text())
    assert facts["flags"][2:] == shlex.split(flags) and facts["args"]["seed"] == 3
    kept = tmp_path / "kept" / "maze" / "skimo" / "seed3.pt"
    assert facts["checkpoint"] == str(kept) and kept.read_bytes() == (run_dir / "checkpoint.pt").read_bytes()
    assert 2000 <= torch.load(kept.with_stem("seed3_2000"), weights_only=True)["global_step"] <= 2100
    assert facts["results"]["evaluations"] == json.loads((run_dir / "results.json").read_text())["evaluations"]


# --------------------------------------------------------------------------------------------- without a cluster


def test_a_grid_whose_folders_moved_goes_on(tmp_path):
    """By the arguments of a real file: it takes what the runner says, and keeps the folders of its start."""
    from algos import sac

    def cell(place):
        args = run.Args(algos=("sac",), seeds=(1,), run_dir=tmp_path / place, data_dir=str(tmp_path / place))
        (only,) = run.make_cells(args)
        return only

    before = sac.parse_args(cell("old").command[2:])
    run_dir = tmp_path / "new" / "maze__sac__1__1"
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(dict(dataclasses.asdict(before), script="sac.py")))
    with pytest.raises((SystemExit, AssertionError), match="run.dir"):
        sac.parse_args([*cell("new").command[2:], "--resume", str(run_dir)])
    resumed = sac.parse_args(run.resumed(cell("new").command, run_dir)[2:])
    assert dataclasses.replace(resumed, resume=None) == before and resumed.resume == str(run_dir)


def test_the_home_folder_is_found_behind_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = "--run-dir=~/runs --results-dir=~/results --data-dir=~/data --data mine.hdf5"
    args = tyro.cli(run.Args, args=flags.split())
    (cell, *_) = run.make_cells(args)
    assert cell.folder == tmp_path / "runs/maze/skimo/seed1000"
    assert cell.result == tmp_path / "results/maze/skimo/seed1000"
    assert cell.command[cell.command.index("--data-dir") + 1] == str(tmp_path / "data")
    assert cell.command[cell.command.index("--data") + 1] == str(Path.cwd() / "mine.hdf5")  # workers run elsewhere


def test_there_is_a_checkpoint_at_every_mark_to_keep():
    (cell, *_) = run.make_cells(run.Args(keep=(30_000, 50_000)))
    interval = int(cell.command[cell.command.index("--checkpoint-interval") + 1])
    assert interval > 1_000 and 30_000 % interval == 50_000 % interval == 0


def test_dry_run_prints_commands_that_a_user_could_type(tmp_path, capsys):
    arguments = command(
        tmp_path, "--env-ids Pendulum-v1 calvin --seeds 1 2 --threads-per-run 3 --dry-run", "--tau 0.01 --data 'a b'"
    )
    arguments = [argument for argument in arguments if not str(argument).startswith("--algos-dir")]
    run.main(run.parse_args([str(argument) for argument in arguments[2:]]))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and list(tmp_path.iterdir()) == []
    assert lines[4].endswith("; not known: Pendulum-v1/skimo")
    tokens = shlex.split(lines[3])
    assert tokens[:3] == ["OMP_NUM_THREADS=3", "python", str(ROOT / "algos" / "skimo.py")]
    given = dict(zip(tokens[3::2], tokens[4::2]))
    assert given["--env-id"] == "calvin" and given["--seed"] == "2"
    assert given["--run-dir"] == str(tmp_path / "run" / "calvin" / "skimo" / "seed2")
    assert given["--tau"] == "0.01" and given["--data"] == "a b"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(args="--tau 0.1 --seed 7"), "--seed in --args would mix up the grid"),
        (dict(args="--env_id=kitchen"), "--env-id in --args would mix up the grid"),
        (dict(env_ids=("kitchen-60",), args="--data-share .5"), "kitchen-60 has a share of the data"),
        (dict(threads_per_run=0), "--threads-per-run 0 is too small"),
        (dict(num_cpus=-2), "--num-cpus -2 is too small"),
        (dict(max_retries=-1), "--max-retries -1 is too small"),
        (dict(threads_per_run=99), "no machine that Ray knows has 99 CPU cores (--threads-per-run)"),
        (dict(address="127.0.0.1:9"), "no Ray cluster can be joined at --address 127.0.0.1:9"),
        (dict(address="nonsense"), "no Ray cluster can be joined at --address nonsense"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(changes, words, tmp_path, ray_dir):
    arguments = dict(num_cpus=2, run_dir=tmp_path / "runs", results_dir=tmp_path / "results") | changes
    with pytest.raises(SystemExit) as error:
        run.main(run.Args(**arguments))
    assert str(error.value).startswith("error: ") and words in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_results_must_name_their_code(monkeypatch, tmp_path):
    monkeypatch.setattr(run.provenance, "ROOT", tmp_path)
    with pytest.raises(SystemExit, match="is no git checkout"):
        run.main(run.Args(run_dir=tmp_path / "runs", results_dir=tmp_path / "results"))


def cell_of(algo="skimo", seed=1, state="waiting", **changes):
    family = ("skimo" if algo == "skimo_no_cem" else algo, "maze", seed)
    paths = Path("runs"), Path("results"), Path("checkpoint.pt")
    return run.Cell(algo, "maze", seed, [], *paths, [], family, state=state, **changes)


def test_one_run_of_a_family_pretrains_for_the_others():
    first, second, other_seed, other = cell_of(), cell_of("skimo_no_cem"), cell_of(seed=2), cell_of("spirl")
    cells = [first, second, other_seed, other]
    assert [run.may_start(cell, cells) for cell in cells] == [True, False, True, True]
    first.state = "failed"
    assert run.may_start(second, cells)
    first.state, first.pretrained = "RL", True
    assert run.may_start(second, cells)


def test_nobody_waits_where_a_model_is_given(tmp_path):
    folders = dict(run_dir=tmp_path / "runs", results_dir=tmp_path / "results")
    for flags, waits in (("--pretrained published", False), ("--pretrained=model.pt", False), ("--tau 0.1", True)):
        cells = run.make_cells(run.Args(algos=("skimo", "skimo_no_cem"), seeds=(1,), args=flags, **folders))
        assert run.may_start(cells[0], cells) and run.may_start(cells[1], cells) != waits


def test_families_are_what_the_files_say(tmp_path):
    algos = ("skimo", "skimo_no_cem", "skimo_no_joint", "spirl")
    folders = dict(run_dir=tmp_path / "runs", results_dir=tmp_path / "results")
    cells = run.make_cells(run.Args(algos=algos, env_ids=("kitchen", "kitchen-misaligned"), seeds=(1, 2), **folders))
    assert len(cells) == 16 and len({cell.command[1] for cell in cells}) == 4
    assert {cell.family for cell in cells} == {
        (model, "kitchen", 1.0, seed) for model in ("skimo", "skimo_no_joint", "spirl") for seed in (1, 2)
    }
    assert all(cell.family[0] == "skimo" for cell in cells if cell.algo == "skimo_no_cem")


def test_runs_share_a_gpu_as_asked(monkeypatch):
    import ray

    resources = dict(CPU=4.0, GPU=1.0)
    monkeypatch.setattr(ray, "init", lambda **how: None)
    monkeypatch.setattr(ray, "nodes", lambda: [dict(Alive=True, Resources=resources)])
    assert run.connect(run.Args(runs_per_gpu=4)) == 0.25
    assert run.connect(run.Args(runs_per_gpu=4, device="cpu")) == 0
    del resources["GPU"]
    assert run.connect(run.Args(runs_per_gpu=4)) == 0


def test_the_table_shows_what_needs_attention_first():
    cells = [cell_of(seed=i, state="finished") for i in range(5)] + [cell_of(seed=9, state="failed", tries=4)]
    cells.append(cell_of(seed=8, state="RL", step="1,000 / 2,000", episodic_return="0.50", eta="1:02 h"))
    lines = run.table(cells, max_rows=4)
    assert lines[1].split() == ["maze/skimo/seed9", "failed", "4"]
    assert lines[2].split() == ["maze/skimo/seed8", "RL", "1,000", "/", "2,000", "0.50", "1:02", "h", "0"]
    assert len(lines) == 5 and lines[-1] == "and 4 finished"


def test_progress_is_read_from_the_run_folder(tmp_path):
    cell = dataclasses.replace(cell_of(state="queued"), folder=tmp_path)
    run.observe(cell)
    assert cell.state == "queued"
    run_dir = tmp_path / "my" / "Maze-v0__skimo__1__17"  # of a task with a slash in its name
    run_dir.mkdir(parents=True)
    (run_dir / "args.json").write_text(json.dumps(dict(total_timesteps=100_000)))
    (tmp_path / "log.txt").write_text("pre-training:   0%|\rpre-training:  42%|####")
    run.observe(cell)
    assert (cell.state, cell.step, cell.pretrained) == ("pre-training", "42 %", False)
    rows = [f"{1000 * i},{i},50,{i / 10}" for i in range(1, 41)]  # a tenth of a minute for 1,000 steps
    header = "env_step,episodic_return,episodic_length,rl_minutes"
    (run_dir / "episodes.csv").write_text("\n".join([header, *rows]) + "\n41000,4")  # a line half written
    run.observe(cell)
    assert (cell.state, cell.step, cell.eta, cell.pretrained) == ("RL", "40,000 / 100,000", "0:06 h", True)
    assert cell.episodic_return == "30.50"
