"""Suites of runs: settings of held-out ones are those of the paper's tasks; seeds, data, estimates, checkpoints."""

import importlib
import json
import os
from dataclasses import asdict

import numpy as np
import pytest
import torch

from benchmarks import run, scores, suites
from data_tools import TASKS, OfflineDataset

PLACES = {"env_id", "seed", "device", "run_dir", "data_dir", "resume", "pretrained", "cudagraphs", "threads"}
CHOSEN = {"total_timesteps", "data_share"}  # what makes a board
MODEL = {"kl_coef"}  # of pre-training: says nothing of a run from a published model, see models.json
LOGGING = {"checkpoint_interval", "eval_interval", "eval_episodes", "capture_video", "evaluate"}


def cells_of(suite, tmp_path, *more):
    folders = [f"--{name}-dir={tmp_path / name}" for name in ("run", "results", "checkpoints")]
    return run.make_cells(run.parse_args(["--suite", suite, *folders, *more]))


def defaults(algo, env_id):
    return asdict(importlib.import_module(f"algos.{algo}").parse_args(["--env-id", env_id]))


@pytest.mark.parametrize("algo", suites.MAIN)
def test_held_out_runs_have_the_settings_of_the_papers_tasks(algo, tmp_path):
    cells = cells_of("held-out", tmp_path, "--algos", algo, "--seeds", "1000")  # a seed changes no setting
    assert [cell.env_id for cell in cells] == list(suites.HELD_OUT)
    module = importlib.import_module(f"algos.{algo}")
    of_family = {family: defaults(algo, family) for family in suites.PAPER}
    for cell in cells:
        board = suites.HELD_OUT[cell.env_id]
        family = TASKS[board.env_id].data
        assert family in suites.PAPER and cell.env_id not in suites.PAPER
        args = asdict(module.parse_args(cell.command[2:]))
        assert suites.Board(args["env_id"], args["total_timesteps"], args["data_share"]) == board
        different = {name for name in args if args[name] != of_family[family][name]}
        assert different <= PLACES | CHOSEN | {"checkpoint_interval"}


def test_held_out_logs_have_the_settings_of_the_files_today():
    """Whoever changes a default of maze, kitchen or calvin runs the suite again."""
    for path in sorted((scores.RESULTS / "held-out").glob("*/*/seed*.json")):
        facts = json.loads(path.read_text())
        board = suites.HELD_OUT[path.parts[-3]]
        args = facts["args"]
        assert (args["env_id"], args["data_share"]) == (board.env_id, board.data_share), path
        theirs = defaults(facts["algo"], TASKS[board.env_id].data)
        settings = args.keys() & theirs.keys() - PLACES - CHOSEN - LOGGING
        if args["pretrained"] == "published":
            settings -= MODEL
        assert {name: args[name] for name in settings} == {name: theirs[name] for name in settings}, path


def test_runs_of_a_suite_share_no_random_numbers():
    """Environment i has the run's seed + i; so have the prior's roll-outs, and from 10,000 on the evaluations."""
    for suite in suites.SUITES.values():
        used = [first + i for seed in suite.seeds for first in (seed, 10_000 + seed) for i in range(400)]
        assert len(used) == len(set(used))


def test_shares_are_the_numbers_of_episodes_that_boards_are_called_by():
    for board, episodes in (("kitchen-60", 603), ("kitchen-20", 603), ("maze-150", 3046)):
        rows = np.ones((2 * episodes, 1))
        ends = np.arange(2 * episodes) % 2 == 1
        data = OfflineDataset(rows, rows, ends, ends).share(suites.HELD_OUT[board].data_share)
        assert len(data.episode_starts) == int(board.split("-")[1])


def test_boards_with_other_data_do_not_share_models(tmp_path):
    cells = cells_of("held-out", tmp_path, "--algos", "skimo", "skimo_sac", "--seeds", "1000")
    families = {cell.env_id: cell.family for cell in cells}
    assert len(set(families.values())) == 6
    whole = cells_of("quick", tmp_path, "--env-ids", "kitchen")[0].family
    assert families["kitchen-6"] == whole == ("skimo", "kitchen", 1.0, 1000)
    for cell in cells:
        assert cell.folder == (tmp_path / "run" / cell.env_id / cell.algo / "seed1000")
    with pytest.raises(SystemExit, match="kitchen-60 has a share of the data"):
        cells_of("held-out", tmp_path, "--args", "--pretrained published")
    chosen = dict(algos=("spirl",), env_ids=("kitchen-60",), seeds=(1,), run_dir=tmp_path, data="d4rl")
    (cell,) = run.make_cells(run.Args(**chosen))
    found = dict(zip(cell.command[2::2], cell.command[3::2]))
    assert (found["--data"], found["--data-share"]) == ("d4rl", "0.1")
    with pytest.raises(SystemExit, match="kitchen-60 has a share of the data, sac none"):
        run.make_cells(run.Args(**chosen | dict(algos=("sac",))))
    (cell,) = run.make_cells(run.Args(**chosen | dict(algos=("sac",), env_ids=("kitchen-6",))))
    assert "--data" not in cell.command


def test_an_estimate_is_the_rate_of_the_logs_times_the_env_steps(tmp_path):
    paths = (scores.RESULTS / "kitchen" / "skimo" / "scripted").glob("seed*.json")
    facts = [json.loads(path.read_text())["results"] for path in paths]
    rate = np.mean([fact["rl_minutes"] / fact["env_steps"] for fact in facts]) / 60
    model = max(fact["pretraining"]["minutes"] for fact in facts) / 60
    cells = cells_of("held-out", tmp_path, "--algos", "skimo", "--env-ids", "kitchen-6", "kitchen-20")
    assert len(cells) == 6
    expected = f"# at the rates of our logs: {6 * 100_000 * rate:.1f} core-hours of RL, {6 * model:.1f} of pre-training"
    assert run.estimate(cells) == f"{expected}, if none of 6 models is there"
    cells[0].state = "finished"
    assert f" {5 * 100_000 * rate:.1f} core-hours" in run.estimate(cells)
    cells = cells_of("quick", tmp_path, "--algos", "skimo", "--args", "--pretrained published")
    assert "of pre-training" not in run.estimate(cells)
    (cell,) = cells_of("figure-4", tmp_path, "--algos", "tdmpc_skills", "--env-ids", "maze", "--seeds", "1")
    assert run.estimate([cell]).endswith("not known: maze/tdmpc_skills")
    default, given = (
        run.estimate(run.make_cells(run.Args(algos=("spirl",), env_ids=("calvin",), run_dir=tmp_path, args=flags)))
        for flags in ("", "--total-timesteps 2000000")
    )
    assert default == given and "not known" not in default


def test_checkpoints_behind_a_mark_are_kept_once(tmp_path):
    run_dir, target, seen = tmp_path / "run", tmp_path / "kept" / "seed7.pt", []
    run_dir.mkdir()
    run.keep_early(run_dir, target, (50, 100), seen)
    for step in (40, 53, 99, 101, 109, 140):
        state = dict(script="x.py", args=dict(env_id="maze", seed=3), global_step=step, agent=torch.ones(3))
        torch.save(state, run_dir / "checkpoint.pt")
        os.utime(run_dir / "checkpoint.pt", ns=(step, step))  # a clock may be too coarse
        assert run.step_of(run_dir / "checkpoint.pt") == step
        run.keep_early(run_dir, target, (50, 100), seen)
    kept = {path.name: torch.load(path, weights_only=True)["global_step"] for path in target.parent.iterdir()}
    assert kept == {"seed7_50.pt": 53, "seed7_100.pt": 101}


def test_step_of_a_real_checkpoint():
    agent = scores.RESULTS / "agents" / "skimo_maze.pt"
    assert run.step_of(agent) == torch.load(agent, weights_only=True)["global_step"] > 100_000
