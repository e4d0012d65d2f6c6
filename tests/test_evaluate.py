"""benchmarks/evaluate.py: kept checkpoints by planner and by the policy's mode."""

import csv
import shutil

import numpy as np
import pytest
import torch

from algos import skimo, skimo_no_cem
from benchmarks import evaluate, scores

FLAGS = "--env-id kitchen --hidden-dim 16 --latent-dim 8 --skill-dim 3 --device cpu --seed 2".split()


def agent_of(algo):
    torch.manual_seed(0)
    args = algo.parse_args(FLAGS)
    return args, algo.Agent(args, algo.make_networks(args))


def test_the_mode_is_what_the_file_without_a_planner_does():
    (_, planner), (_, policy) = agent_of(skimo), agent_of(skimo_no_cem)
    obs = np.random.default_rng(0).normal(size=(5, 30)).astype(np.float32)
    expected = policy.choose_skills(obs, 10**6, explore=False)
    np.testing.assert_array_equal(evaluate.mode(skimo, planner, obs, 10**6, False), expected)
    assert not torch.equal(planner.choose_skills(obs, 10**6, explore=False), expected)


def test_checkpoints_of_a_grid_are_evaluated_once(tmp_path):
    for board, algo, name in (("kitchen", skimo, "seed2.pt"), ("kitchen-60", skimo_no_cem, "seed2_25000.pt")):
        args, agent = agent_of(algo)
        state = dict(script=algo.FILE.name, args=vars(args), global_step=25_007)
        algo.save(tmp_path / board / algo.FILE.stem / name, state, dict(agent=agent))
    evaluate.main(evaluate.Args(tmp_path, episodes=1))
    first = (tmp_path / "evaluations.csv").read_text()
    evaluate.main(evaluate.Args(tmp_path, episodes=1))
    assert (tmp_path / "evaluations.csv").read_text() == first
    # The same checkpoint by more episodes, or further on, is another line
    evaluate.main(evaluate.Args(tmp_path / "kitchen-60", episodes=1))
    state["global_step"] = 50_002
    algo.save(tmp_path / "kitchen-60" / algo.FILE.stem / name, state, dict(agent=agent))
    for episodes in (1, 2, 2):
        evaluate.main(evaluate.Args(tmp_path / "kitchen-60", episodes=episodes))
    rows = csv.DictReader((tmp_path / "kitchen-60" / "evaluations.csv").open())
    found = [(row["env_step"], row["episodes"]) for row in rows]
    assert found == [("25007", "1"), ("50002", "1"), ("50002", "2")]
    rows = list(csv.DictReader(first.splitlines()))
    assert [(row["checkpoint"], row["acts_by"], row["env_step"]) for row in rows] == [
        ("kitchen/skimo/seed2.pt", "plan", "25007"),
        ("kitchen/skimo/seed2.pt", "mode", "25007"),
        ("kitchen-60/skimo_no_cem/seed2_25000.pt", "mode", "25007"),
    ]


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="error: no checkpoints in"):
        evaluate.main(evaluate.Args(tmp_path))
    assert not list(tmp_path.iterdir())


def test_planned_scores_are_those_of_the_file_itself(tmp_path, capsys):
    shutil.copy(scores.RESULTS / "agents" / "skimo_kitchen.pt", tmp_path / "seed1.pt")
    flags = ["--evaluate", str(tmp_path / "seed1.pt"), "--eval-episodes", "1", "--device", "cpu"]
    skimo.evaluate(skimo.parse_args(flags))
    said = capsys.readouterr().out
    plan, by_mode = evaluate.evaluations(tmp_path / "seed1.pt", 1)
    assert f"episodic_return {plan[3]:.3g}," in said and plan[1:3] == ("plan", 1)
    assert by_mode[1] == "mode" and by_mode[3] >= 2  # a trained policy does most of the Kitchen by itself
