"""benchmarks/speed.py runs end to end for every algorithm file and writes what it measured."""

import importlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import speed
from tests.golden import FLAT

ROOT = Path(__file__).resolve().parents[1]
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
CPU = dict(device="cpu", modes=("eager",))


def check_rows(written, printed):
    """Every row is positive and printed, no row is there twice."""
    keys = [(row["algo"], row["name"], row["size"], row["mode"]) for row in written["rows"]]
    assert len(keys) == len(set(keys))
    for row in written["rows"]:
        assert math.isfinite(row["ms"]) and row["ms"] > 0, row
        assert row["calls"] > 0, row
        assert row["name"] in printed
        if row["name"].startswith(("step", "training")):
            assert math.isfinite(row["per_second"]) and row["per_second"] > 0, row
    assert {"machine", "torch", "threads", "load", "commit"} <= set(written)
    assert written["args"]["quick"] is True
    return [row["name"] for row in written["rows"]]


KINDS = "skimo spirl dreamer_skills qc relay sac tdmpc dads hiro option_critic".split()  # what speed.py tells apart


@pytest.mark.parametrize("name", KINDS)
def test_quick_run_writes_every_row(name, tmp_path, capsys):
    out = tmp_path / "folder" / "speed.json"
    speed.main(speed.Args(algos=(name,), quick=True, **CPU, out=out))
    assert [path.name for path in out.parent.iterdir()] == ["speed.json"]  # no half-written file left
    written = json.loads(out.read_text())
    names = check_rows(written, capsys.readouterr().out)

    text = (ROOT / "algos" / f"{name}.py").read_text()
    plans = "\ndef plan(" in text
    choice = "plan" if plans else "policy"
    expected = ["step, 1 env, 1 thread", "step, 2 envs, 1 thread", "step, 2 envs, 2 threads"]
    expected += ["pre-training update"] * (f'PRETRAINED = "{name}"' in text)
    expected += ["RL update"]
    expected += [f"{choice}, 1 env", f"{choice}, 2 envs"] * (plans or name not in FLAT)
    expected += ["act, 1 env", "act, 2 envs"] * (not plans or name not in FLAT)
    assert names == [*expected, "training loop"]
    shares = written["rows"][-1]["shares"]
    assert set(shares) == {"env", "choose", "update"}
    assert all(0 < share < 1 for share in shares.values()) and sum(shares.values()) < 1


def test_command_line_writes_into_the_working_directory_only(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--device", "cpu", "--modes", "eager"]
    command += ["--only", "act", "--sizes", "kitchen", "--out", "folder/speed.json"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    written = json.loads((tmp_path / "folder" / "speed.json").read_text())
    assert check_rows(written, result.stdout) == ["act, 1 env", "act, 2 envs"]


@pytest.mark.parametrize("env_id", ["kitchen", "maze-far", "calvin"])
def test_environments_alone_with_one_thread_and_two(env_id, tmp_path, capsys):
    out = tmp_path / "speed.json"
    speed.main(speed.Args(env_id=env_id, only=("step",), quick=True, **CPU, out=out))
    written = json.loads(out.read_text())
    names = check_rows(written, capsys.readouterr().out)
    assert names == ["step, 1 env, 1 thread", "step, 2 envs, 1 thread", "step, 2 envs, 2 threads"]
    assert {row["size"] for row in written["rows"]} == {env_id}


@pytest.mark.parametrize("name", ALGOS)
def test_inputs_are_those_of_a_run(name):
    """A batch as the file's first update draws it, as many choices as environments; graphs where they are asked for."""
    algo = importlib.import_module(f"algos.{name}")
    args = speed.Args(quick=True, **CPU)
    assert speed.size_args(algo, "maze", "graphs", args).cudagraphs
    config = speed.size_args(algo, "maze", "eager", args)
    assert not config.cudagraphs
    obs, *others = [tuple(values.shape) for values in speed.filled_replay(algo, config)()]
    assert obs[0] == 8 and obs[-1] == 4
    if name in FLAT:
        assert others[0] == ((8, obs[1] - 1, 2) if name == "hiro" else (*obs[:-1], 2))  # actions
    chosen = speed.choosing(algo, config, 5)()
    assert len(chosen[0] if isinstance(chosen, tuple) else chosen) == 5


def test_time_is_taken_from_update_to_update():
    """The first updates, which record, do not count; a block is long enough for the clock."""
    clock = speed.Clock(speed.Args(min_seconds=0.3, **CPU))
    with pytest.raises(speed.Enough):
        for k in range(10_000):
            clock()
            time.sleep(0.1 if k < 4 else 0.005)
    assert clock.block > 1 and len(clock.times) >= 5
    assert 0.005 <= min(clock.times) and sorted(clock.times)[len(clock.times) // 2] < 0.05


def test_per_second_are_env_steps_of_all_members():
    """Four members stepped in 20 ms are 200 env steps a second; a loop of 600 env steps in .1 minutes does 100."""
    args = speed.Args(only=("step",), step_envs=(4,), env_id="calvin", quick=True, **CPU)
    ms = {1: 20.0, 2: 16.0}  # by threads
    with mock.patch.object(speed, "time_stepping", lambda args, E, threads: dict(ms=ms[threads])):
        one, two = speed.time_everything(args)
    assert (one["per_second"], two["per_second"]) == (200, 250)

    algo = importlib.import_module("algos.sac")
    config = speed.size_args(algo, "maze", "eager", args)
    with mock.patch.object(algo, "train", return_value=dict(updates=1, rl_minutes=0.1, env_steps=600)):
        row = speed.time_training(algo, config, args)
    assert row["per_second"] == pytest.approx(100) and row["ms"] == pytest.approx(10)


def test_a_call_is_timed_whole():
    row = speed.measure(lambda: time.sleep(0.02), speed.Args(quick=True, **CPU))
    assert row["ms"] >= 20 and row["calls"] >= 1


def test_the_table_has_eager_beside_graphs():
    row = dict(algo="skimo", name="RL update", size="kitchen", num_envs=None, iqr_ms=1.0, calls=9)
    rows = [dict(row, mode="eager", ms=50.0), dict(row, mode="graphs", ms=9.8)]
    lines = speed.table(rows).splitlines()
    assert len(lines) == 2
    assert lines[1].split() == ["skimo", "RL", "update", "kitchen", "50", "1", "9.8", "1"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (dict(sizes=(), only=("plan",)), "nothing to time"),
        (dict(loop_steps=100, only=("loop",)), "ends before the first update is due"),
    ],
)
def test_senseless_flags_are_refused_in_a_sentence(args, words, tmp_path):
    with pytest.raises(SystemExit, match=f"^error: .*{words}"):
        speed.main(speed.Args(**CPU | args, out=tmp_path / "speed.json"))
