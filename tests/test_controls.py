"""benchmarks/controls/: those of flat files, DIAYN and Q-chunking run, whole; the committed logs are what they say."""

import csv
import importlib
import json
import sys

import numpy as np
import pytest

from benchmarks import report
from benchmarks.controls import diayn, flat, frame, hiro, qc, supe  # noqa: F401, which makes the task open-maze
from benchmarks.scores import RESULTS

LOGS = RESULTS / "studies" / "controls"


@pytest.mark.parametrize("algo", list(flat.SETTINGS))
def test_a_short_run(algo, tmp_path, monkeypatch):
    monkeypatch.setitem(flat.COMMON, "warmup_steps", 150)
    monkeypatch.setitem(flat.SETTINGS[algo], "updates_per_step", 0.05)
    out = tmp_path / "log.csv"
    monkeypatch.setattr(sys, "argv", ["flat.py", algo, "--out", str(out), "--env-steps", "420"])
    flat.main()
    facts = json.loads(out.with_suffix(".json").read_text())
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["env_step"] for row in rows] == ["200", "400"]  # the pendulum's episodes have 200 steps
    assert all(-2_000 < float(row["episodic_return"]) < 0 for row in rows)
    assert facts["passed"] is False and facts["args"]["seed"] == 1


@pytest.mark.parametrize("algo", list(flat.SETTINGS))
def test_the_committed_log_has_passed(algo):
    facts = json.loads((LOGS / f"{algo}_seed1.json").read_text())
    with (LOGS / f"{algo}_seed1.csv").open() as file:
        returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    assert len(returns) == 75 and np.mean(returns[:5]) < -800
    assert np.mean(returns[-20:]) == pytest.approx(facts["last_20_return"], abs=0.1)
    assert facts["last_20_return"] > facts["gate"] == flat.GATE and facts["passed"]


@pytest.mark.parametrize("name", list(frame.REPORTED))
def test_reported_settings_are_those_of_the_logged_runs(name):
    algo = importlib.import_module(f"algos.{name}")
    logs = sorted(RESULTS.glob(f"*/{name}/none/seed*.json"))
    assert len(logs) >= 4  # one a task
    free = "run_dir resume cudagraphs threads cpu_preset checkpoint_interval eval_interval eval_episodes".split()
    for log in logs:
        logged = json.loads(log.read_text())["args"]
        args = vars(frame.reported_args(algo, logged["env_id"], logged["seed"], logged["total_timesteps"]))
        assert {key: value for key, value in args.items() if key not in free and logged.get(key, value) != value} == {}


@pytest.mark.parametrize("name", list(report.WITHOUT_DATA))
def test_the_table_of_rates_has_the_defaults_of_the_files(name):
    default, published, width, _ = report.WITHOUT_DATA[name]
    args = importlib.import_module(f"algos.{name}").Args()
    if default:
        assert args.updates_per_step == default <= published
    if name in ("tdmpc", "dreamer", "lsp", "hiro", "diayn", "sac"):  # where published sizes are the default
        assert args.hidden_dim == width


REPORTED_LOGS = sorted((LOGS.parent / "controls_reported").glob("*_seed1.json"))


@pytest.mark.parametrize("log", REPORTED_LOGS, ids=lambda log: log.stem)
def test_a_reported_control_had_the_reported_settings(log):
    facts = json.loads(log.read_text())
    args, name = facts["args"], log.stem.removesuffix("_seed1")
    algo = importlib.import_module(f"algos.{name}")
    expected = vars(frame.reported_args(algo, args["env_id"], args["seed"], args["total_timesteps"]))
    free = "run_dir eval_interval eval_episodes".split()
    assert {key: value for key, value in expected.items() if key not in free and args.get(key, value) != value} == {}
    if args["env_id"] == "Pendulum-v1":
        with log.with_suffix(".csv").open() as file:
            returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
        assert np.mean(returns[-20:]) == pytest.approx(facts["last_20_return"], abs=0.1)
        assert facts["passed"] == (facts["last_20_return"] > flat.GATE)


def test_a_short_run_as_reported(tmp_path, monkeypatch):
    out = tmp_path / "log.csv"
    monkeypatch.setattr(sys, "argv", ["flat.py", "option_critic", "--out", str(out), "--env-steps", "3200"])
    flat.main()
    facts = json.loads(out.with_suffix(".json").read_text())
    with out.open() as file:
        assert [row["env_step"] for row in csv.DictReader(file)] == 8 * ["1600"] + 8 * ["3200"]
    assert facts["args"]["num_envs"] == 8 and facts["updates"] == 12  # of 256 env steps
    assert facts["passed"] is False


def test_a_short_run_of_diayn(tmp_path, monkeypatch):
    monkeypatch.setitem(diayn.COMMON, "updates_per_step", 0.02)
    monkeypatch.setitem(diayn.SETTINGS, "box", dict(discover_steps=1_200, total_timesteps=1_500))
    monkeypatch.setattr(sys, "argv", ["diayn.py", "box", "--out", str(tmp_path / "box.csv")])
    diayn.main()
    facts = json.loads((tmp_path / "box.json").read_text())
    with (tmp_path / "box.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10 * 101 and rows[0]["x"] == rows[0]["y"] == "0.5"  # a path of each skill, from the middle
    assert facts["passed"] is False and len(facts["first_returns_in_control"]) == 3
    assert (tmp_path / "box.png").stat().st_size > 5_000


@pytest.mark.parametrize(("task", "rows"), [("walk", 1), ("corridor", 2)])
def test_a_short_run_of_supe(task, rows, tmp_path, monkeypatch):
    monkeypatch.setitem(supe.SETTINGS[task], "pretrain_updates", 10)
    monkeypatch.setitem(supe.SETTINGS[task], "warmup_steps", 480)
    out = tmp_path / "log.csv"
    monkeypatch.setattr(sys, "argv", ["supe.py", task, "--out", str(out), "--env-steps", "1000", "--seeds", "1"])
    supe.main()
    with out.open() as file:
        assert len(list(csv.DictReader(file))) == rows
    assert json.loads(out.with_suffix(".json").read_text())["args"]["env_id"] == task


def test_the_committed_walk_of_supe_has_passed():
    facts = json.loads((LOGS / "supe_walk_seed1.json").read_text())
    with (LOGS / "supe_walk_seed1.csv").open() as file:
        returns = [float(row["mean_return"]) for row in csv.DictReader(file)]
    assert max(returns[:3]) < 1 and returns[-1] == facts["last_return"] > facts["gate"] == supe.GATE and facts["passed"]


@pytest.mark.parametrize("task", list(qc.SETTINGS))
def test_a_short_run_of_qc(task, tmp_path, monkeypatch):
    monkeypatch.setitem(qc.SETTINGS[task], "pretrain_updates", 20)
    monkeypatch.setitem(qc.SETTINGS[task], "total_timesteps", 2_400)
    monkeypatch.setitem(qc.SETTINGS[task], "updates_per_step", 0.02)
    monkeypatch.setattr(sys, "argv", ["qc.py", task, "--offline", "pred", "--out", str(tmp_path / "log.csv")])
    qc.main()
    facts = json.loads((tmp_path / "log.json").read_text())
    with (tmp_path / "log.csv").open() as file:
        returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    assert np.mean(returns[-50:]) == pytest.approx(facts["last_50_return"])
    assert facts["passed"] is False and facts["args"]["offline"] == "pred" and facts["pretraining"]["updates"] == 20


@pytest.mark.parametrize("task", list(qc.SETTINGS))
def test_the_committed_log_of_qc_has_passed(task):
    facts = json.loads((LOGS / f"qc_{task}_seed1.json").read_text())
    with (LOGS / f"qc_{task}_seed1.csv").open() as file:
        returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    assert np.mean(returns[-50:]) == pytest.approx(facts["last_50_return"], abs=0.01)
    assert facts["last_50_return"] > facts["gate"] == qc.GATES[task] and facts["passed"]
    assert np.mean(returns[:16]) < 0.5 * facts["gate"]  # not before it has learnt
