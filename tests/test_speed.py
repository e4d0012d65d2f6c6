"""benchmarks/speed.py runs end to end for every algorithm file and writes what it measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speed

ROOT = Path(__file__).resolve().parents[1]
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))


def run(*flags, cwd):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--device", "cpu", "--no-compile", *flags]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def check_rows(written, printed):
    """Every row is positive and printed, no name is there twice."""
    names = [row["name"] for row in written["rows"]]
    assert len(names) == len(set(names))
    for row in written["rows"]:
        assert math.isfinite(row["ms"]) and row["ms"] > 0, row
        assert row["calls"] > 0, row
        assert row["name"] in printed
        if row["name"].startswith(("step", "training")):
            assert math.isfinite(row["per_second"]) and row["per_second"] > 0, row
    assert {"cpu", "gpu", "torch", "device", "threads", "commit"} <= set(written["machine"])
    assert written["args"]["quick"] is True
    return names


@pytest.mark.parametrize("name", ALGOS)
def test_quick_run_of_every_file_writes_every_row(name, tmp_path, capsys):
    path, out = ROOT / "algos" / f"{name}.py", tmp_path / "folder" / "speed.json"
    speed.main(speed.Args(algo=path, quick=True, device="cpu", compile=False, out=out))
    assert [path.name for path in out.parent.iterdir()] == ["speed.json"]  # no half-written file left
    written, printed = json.loads(out.read_text()), capsys.readouterr().out
    names = check_rows(written, printed)
    assert f"{name}.py on " in printed

    plans = "class Planner" in path.read_text()
    skimo = "pretrain_skills:" in path.read_text()  # the other files' batch is the release's
    expected = ["pre-training update, release batch"] * skimo + ["pre-training update", "RL update"]
    expected += [f"{'plan' if plans else 'policy'}, 1 env", f"{'plan' if plans else 'policy'}, 2 envs"]
    expected += ["act, 1 env", "act, 2 envs"]
    expected += ["step, 1 env, no threads", "step, 2 envs, no threads", "step, 2 envs, 2 threads", "training loop"]
    assert names == expected
    shares = written["rows"][-1]["shares"]
    assert set(shares) == {"env", "plan", "update"}
    assert all(0 < share < 1 for share in shares.values())
    assert 0 < written["rows"][-1]["share_of_env_only_rate"] < 1
    has_authors = [row["name"] for row in written["rows"] if row["authors_h200_ms"]]
    assert has_authors == []  # theirs were measured at the kitchen's sizes


def test_command_line_writes_into_the_working_directory_only(tmp_path):
    result = run("--only", "act", "loop", "--out", "folder/speed.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    written = json.loads((tmp_path / "folder" / "speed.json").read_text())
    assert check_rows(written, result.stdout) == ["act, 1 env", "act, 2 envs", "training loop"]
    assert "share_of_env_only_rate" not in written["rows"][-1]


@pytest.mark.parametrize("env_id", ["kitchen", "kitchen-misaligned", "calvin"])
def test_environments_alone_with_one_thread_and_two(env_id, tmp_path, capsys):
    args = dict(only=("step",), quick=True, device="cpu", compile=False, out=tmp_path / "speed.json")
    speed.main(speed.Args(env_id=env_id, **args))
    written, printed = json.loads((tmp_path / "speed.json").read_text()), capsys.readouterr().out
    names = check_rows(written, printed)
    assert names == ["step, 1 env, 1 thread", "step, 2 envs, 1 thread", "step, 2 envs, 2 threads"]
    assert {row["size"] for row in written["rows"]} == {env_id}
    one, two = written["rows"][1:]
    assert two["speedup"] == pytest.approx(two["per_second"] / one["per_second"])
    assert f"{two['speedup']:.2f}x" in printed


@pytest.mark.parametrize("name", ALGOS)
def test_inputs_have_the_shapes_of_a_run(name):
    """Windows as long as the file's pre-training draws them, batches with the replay buffer's own fields."""
    algo = speed.load_algorithm(ROOT / "algos" / f"{name}.py")
    config = speed.size_args(algo, "kitchen", speed.Args(quick=True, device="cpu", compile=False))
    seen = []
    pretrainer, learner = algo.Pretrainer.update, algo.Learner.update
    algo.Pretrainer.update = lambda self, *batch: seen.append([tuple(x.shape) for x in batch])
    algo.Learner.update = lambda self, *batch: seen.append([tuple(x.shape) for x in batch])
    try:
        for make in (speed.pretrain_update, speed.rl_update):
            make(algo, "kitchen", config, torch.device("cpu"))()
    finally:
        algo.Pretrainer.update, algo.Learner.update = pretrainer, learner
    steps = 10 * getattr(config, "pretrain_skills", 1)
    assert seen[0] == [(8, steps + 1, 30), (8, steps, 9)]
    obs, *others = seen[1]
    assert obs[0] == 8 and obs[-1] == 30
    assert (8, 10) in others or (8, config.num_skills, 10) in others  # the skills


def test_release_batch_is_skimos_and_left_out_where_it_is_the_default():
    args = speed.Args(device="cpu", compile=False)
    for name, expected in (("skimo_sac", (512, 10, 10)), ("spirl", (128, 1, 1))):
        algo = speed.load_algorithm(ROOT / "algos" / f"{name}.py")
        release = speed.release_pretraining(speed.size_args(algo, "kitchen", args), "kitchen", args)
        sizes = [getattr(release, field, 1) for field in ("pretrain_batch_size", "pretrain_skills", "bc_chunks")]
        assert tuple(sizes) == expected
        names = [row[1] for row in speed.jobs(algo, args, torch.device("cpu"))]
        assert ("pre-training update, release batch" in names) == (name == "skimo_sac")


def test_missing_algorithm_file_is_refused_with_a_sentence(tmp_path):
    result = run("--algo", "nothing.py", cwd=tmp_path)
    assert result.returncode == 1
    assert "--algo nothing.py does not exist" in result.stderr


def test_nothing_to_time_is_refused_with_a_sentence(tmp_path):
    args = dict(sizes=(), only=("plan",), device="cpu", compile=False, out=tmp_path / "speed.json")
    with pytest.raises(SystemExit, match="nothing to time"):
        speed.main(speed.Args(**args))
