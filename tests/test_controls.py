"""benchmarks/controls/: short runs, whole; the committed logs are what they say."""

import csv
import importlib
import json
import re
import sys

import numpy as np
import pytest

from benchmarks import report
from benchmarks.controls import dads, diayn, flat, frame, hiro, lsp, qc, supe
from benchmarks.scores import RESULTS

LOGS = RESULTS / "studies" / "controls"


def logged(out):
    """What a control wrote: the JSON and the rows of the CSV."""
    return json.loads(out.with_suffix(".json").read_text()), list(csv.DictReader(out.read_text().splitlines()))


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Runs a control with flags and returns what it wrote, as log.* in tmp_path."""

    def run(control, flags):
        monkeypatch.setattr(sys, "argv", ["control.py", *flags.split(), "--out", str(tmp_path / "log.csv")])
        control.main()
        return logged(tmp_path / "log.csv")

    return run


@pytest.mark.parametrize("algo", list(flat.SETTINGS))
def test_a_short_run(algo, outcome, monkeypatch):
    monkeypatch.setitem(flat.COMMON, "warmup_steps", 150)
    monkeypatch.setitem(flat.SETTINGS[algo], "updates_per_step", 0.05)
    facts, rows = outcome(flat, f"{algo} --env-steps 420")
    assert [row["env_step"] for row in rows] == ["200", "400"]  # the pendulum's episodes have 200 steps
    assert all(-2_000 < float(row["episodic_return"]) < 0 for row in rows)
    assert facts["passed"] is False and facts["args"]["seed"] == 1


@pytest.mark.parametrize("algo", list(flat.SETTINGS))
def test_the_committed_log_has_passed(algo):
    facts, rows = logged(LOGS / f"{algo}_seed1.csv")
    returns = [float(row["episodic_return"]) for row in rows]
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


@pytest.mark.parametrize("name", [name for name, (default, *_) in report.WITHOUT_DATA.items() if default])
def test_the_table_of_rates_has_the_defaults_of_the_files(name):
    default, published, width, _ = report.WITHOUT_DATA[name]
    args = importlib.import_module(f"algos.{name}").Args()
    assert args.updates_per_step == default <= published
    if name != "dads":  # where published sizes are the default
        assert args.hidden_dim == width


REPORTED_LOGS = sorted((LOGS.parent / "controls_reported").glob("*_seed1.csv"))


@pytest.mark.parametrize("log", REPORTED_LOGS, ids=lambda log: log.stem)
def test_a_reported_control_had_the_reported_settings(log):
    facts, rows = logged(log)
    args, name = facts["args"], log.stem.removesuffix("_seed1")
    algo = importlib.import_module(f"algos.{name}")
    expected = vars(frame.reported_args(algo, args["env_id"], args["seed"], args["total_timesteps"]))
    free = "run_dir eval_interval eval_episodes".split()
    assert {key: value for key, value in expected.items() if key not in free and args.get(key, value) != value} == {}
    if args["env_id"] == "Pendulum-v1":
        returns = [float(row["episodic_return"]) for row in rows]
        assert np.mean(returns[-20:]) == pytest.approx(facts["last_20_return"], abs=0.1)
        assert facts["passed"] == (facts["last_20_return"] > flat.GATE)


def test_the_committed_pendulum_of_sacs_page_has_passed():
    results = json.loads((LOGS / "sac_as_typed_seed1.json").read_text())
    typed = dict(env_id="Pendulum-v1", num_envs=1, updates_per_step=1, warmup_steps=1_000)
    assert results["args"] | typed == results["args"]
    assert results["env_steps"] == 5_000 and results["evaluations"][-1][1] > -158


def test_a_short_run_as_reported(outcome):
    facts, rows = outcome(flat, "option_critic --env-steps 3200")
    assert [row["env_step"] for row in rows] == 8 * ["1600"] + 8 * ["3200"]
    assert facts["args"]["num_envs"] == 8 and facts["updates"] == 12  # of 256 env steps
    assert facts["passed"] is False


def test_a_short_run_of_diayn(outcome, tmp_path, monkeypatch):
    monkeypatch.setitem(diayn.COMMON, "updates_per_step", 0.02)
    monkeypatch.setitem(diayn.SETTINGS, "box", dict(discover_steps=1_200, total_timesteps=1_500))
    facts, rows = outcome(diayn, "box")
    assert len(rows) == 10 * 101 and rows[0]["x"] == rows[0]["y"] == "0.5"  # a path of each skill, from the middle
    assert facts["passed"] is False and len(facts["first_returns_in_control"]) == 3
    assert (tmp_path / "log.png").stat().st_size > 5_000


@pytest.mark.parametrize(("task", "rows"), [("walk", 1), ("corridor", 2)])
def test_a_short_run_of_supe(task, rows, outcome, monkeypatch, capsys):
    monkeypatch.setitem(supe.SETTINGS[task], "pretrain_updates", 10)
    monkeypatch.setitem(supe.SETTINGS[task], "warmup_steps", 480)
    facts, written = outcome(supe, f"{task} --env-steps 1000 --seeds 1")
    assert facts["args"]["env_id"] == task and len(written) == rows
    first_bonus = [float(word) for word in re.findall(r"first bonus: (\S+),", capsys.readouterr().out)]
    assert len(first_bonus) == rows and first_bonus[0] > 0
    assert task == "walk" or first_bonus[1] == pytest.approx(facts["args"]["rnd_coef"])  # of own ones alone


def test_the_committed_walk_of_supe_has_passed():
    facts, rows = logged(LOGS / "supe_walk_seed1.csv")
    returns = [float(row["mean_return"]) for row in rows]
    assert max(returns[:2]) < 1 and returns[-1] == facts["last_return"] > facts["gate"] == supe.GATE and facts["passed"]


@pytest.mark.parametrize("task", list(qc.SETTINGS))
def test_a_short_run_of_qc(task, outcome, monkeypatch):
    small = dict(pretrain_updates=20, total_timesteps=2_400, updates_per_step=0.02)
    monkeypatch.setitem(qc.SETTINGS, task, qc.SETTINGS[task] | small)
    facts, rows = outcome(qc, f"{task} --offline pred")
    returns = [float(row["episodic_return"]) for row in rows]
    assert np.mean(returns[-50:]) == pytest.approx(facts["last_50_return"])
    assert facts["passed"] is False and facts["args"]["offline"] == "pred" and facts["pretraining"]["updates"] == 20


@pytest.mark.parametrize("task", list(qc.SETTINGS))
def test_the_committed_log_of_qc_has_passed(task):
    facts, rows = logged(LOGS / f"qc_{task}_seed1.csv")
    returns = [float(row["episodic_return"]) for row in rows]
    assert np.mean(returns[-50:]) == pytest.approx(facts["last_50_return"], abs=0.01)
    assert facts["last_50_return"] > facts["gate"] == qc.GATES[task] and facts["passed"]
    assert np.mean(returns[:50]) < 0.7 * facts["gate"]  # not before it has learnt


def test_a_short_run_of_hiro(outcome, tmp_path, monkeypatch):
    small = dict(warmup_steps=200, eval_interval=400, eval_episodes=3, updates_per_step=0.02)
    monkeypatch.setattr(hiro, "SETTINGS", hiro.SETTINGS | small)
    facts, rows = outcome(hiro, "--env-steps 800")
    assert [row["env_step"] for row in rows] == ["400", "800"] and (tmp_path / "log.png").stat().st_size > 1_000
    assert facts["last_success"] == float(rows[-1]["success"]) and facts["passed"] is False


def test_open_maze_is_what_its_docstring_says():
    envs = hiro.OpenMazeVectorEnv(50)
    envs.flags_stay = True  # as make_envs sets it
    obs, _ = envs.reset(seed=0)
    returns = np.zeros(50)
    first = np.linalg.norm(5 * obs[:, 2:] - 5 * obs[:, :2], axis=1)
    for _ in range(100):
        action = np.clip((obs[:, 2:] - obs[:, :2]) * 25, -1, 1)  # straight to the goal
        action[:5] = 0
        obs, rewards, terminations, truncations, _ = envs.step(action)
        returns += rewards
    left = np.linalg.norm(5 * obs[:, 2:] - 5 * obs[:, :2], axis=1)
    assert terminations[5:].all() and not terminations[:5].any() and truncations[:5].all()
    assert (left[5:] < 0.5).all() and (first > 1).all()
    np.testing.assert_allclose(returns, (first - left) / 15 + terminations, atol=1e-5)
    assert (returns >= 1).tolist() == terminations.tolist()


@pytest.mark.parametrize("seed", [1, 2])
def test_the_committed_open_maze_of_hiro_has_passed(seed):
    facts, rows = logged(LOGS.parent / "hiro" / f"open_maze_seed{seed}.csv")
    success = [float(row["success"]) for row in rows]
    assert (max(success), success[-1]) == (facts["best_success"], facts["last_success"])
    assert facts["last_success"] > facts["gate"] == hiro.GATE and facts["passed"]
    assert facts["uniform_success"] < 0.1 and success[0] < 0.1


@pytest.mark.parametrize("task", ["point", "maze"])
def test_a_short_run_of_lsp(task, outcome, tmp_path):
    outcome(lsp, f"--task {task} --updates 2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", "log.json", "log.png"]


def test_explained_is_the_share_between_skills():
    rng = np.random.default_rng(0)
    ends = rng.normal(size=(500, 400, 2)) + 2 * rng.normal(size=(500, 1, 2))
    assert lsp.explained(ends) == pytest.approx(4 / 5, abs=0.03)


@pytest.mark.parametrize("task", ["point", "maze"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_committed_logs_of_lsp_have_passed(task, seed):
    facts, rows = logged(LOGS / f"lsp_{task}_seed{seed}.csv")
    values = np.array([float(row["skill_information"]) for row in rows])
    assert len(values) == 600 and values[:20].mean() < 0.1
    assert values[-20:].mean() == pytest.approx(facts["last_20_nats"], abs=1e-3)
    assert facts["gate"] == lsp.GATE and facts["passed"] and facts["last_20_nats"] > facts["gate"]
    assert facts["explained"] > 3 * facts["explained_before"]


def test_the_committed_hall_of_dads_has_passed():
    facts, rows = logged(LOGS.parent / "dads" / "hall_seed1.csv")
    rewards = [float(row["losses/intrinsic_reward"]) for row in rows]
    assert facts["passed"] and dads.verdict(facts)
    assert rewards[-1] == pytest.approx(facts["intrinsic_reward"], rel=1e-3) and rewards[-1] > 2 * rewards[0]
