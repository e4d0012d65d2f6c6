"""benchmarks/value_front.py against a replay buffer whose distances and returns are known."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

import data_tools
from algos import skimo
from benchmarks import value_front
from data_tools.tasks import maze

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """A run's folder: three episodes in the replay buffer, critics that are 7 everywhere."""
    args = skimo.Args(env_id="maze", hidden_dim=8, latent_dim=6, skill_encoder="mlp", gamma=0.5, num_skills=1)
    learner = skimo.Learner(args, skimo.make_networks(args, 4, 2, "cpu"))
    for head in (learner.model.qf1, learner.model.qf2):
        torch.nn.init.zeros_(head[-1].weight)
    torch.nn.init.constant_(learner.model.qf1[-1].bias, 7.0)
    torch.nn.init.constant_(learner.model.qf2[-1].bias, 8.0)
    layout = maze.make_layout()
    distance = maze.geodesic_distance(layout, maze.GOAL)
    far = np.argwhere(distance == 30)[0]
    near = np.argwhere(distance == 1)[0]
    wall = np.argwhere(np.isinf(distance))[0]

    def episode(*steps):  # the last row holds the final observation
        rows = torch.zeros(len(steps), 4 + args.skill_dim + 2)
        for row, (cell, reward) in zip(rows, steps):
            row[:2], row[-2] = torch.tensor(cell), reward
        return rows

    first = episode((near, 100.0), (near, 0.0))  # not among the last two
    second = episode((far, 0.0), (wall, 0.0), (near, 100.0), (near, 0.0))
    third = episode((far, 0.0), (far, 0.0))  # does not reach the goal
    rb = dict(rows=torch.cat([first, second, third]), episodes=torch.tensor([[0, 1], [2, 3], [6, 1]]))
    state = dict(learner=dict(weights=learner.state_dict()), rb=rb)
    data_tools.save_checkpoint(tmp_path / "checkpoint.pt", state, dict(env_id="maze", kind="skimo run"))
    (tmp_path / "args.json").write_text(json.dumps(asdict(args)))
    return tmp_path


def test_distances_values_and_discounted_returns(run):
    distance, value, returns = value_front.values_by_distance(run, skimo, num_episodes=2)
    assert distance.tolist() == [30, np.inf, 1, 30]
    assert np.allclose(value, 7.0)  # the smaller critic
    assert np.allclose(returns, [25.0, 50.0, 100.0, np.nan], equal_nan=True)


def test_command_prints_the_table(run):
    command = [sys.executable, ROOT / "benchmarks" / "value_front.py", run, "--episodes", "2"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout.splitlines()
    assert printed == [
        "| cells | states | value | to be had |",
        "|---|---|---|---|",
        "| 0-4 | 1 | 7.0 | 100.0 |",
        "| 28-32 | 2 | 7.0 | 25.0 |",
    ]
    refused = subprocess.run([*command, "--algo", "skimo_no_cem"], capture_output=True, text=True, timeout=120)
    assert refused.returncode == 1 and "kind 'skimo run' but this run needs 'skimo_no_cem run'" in refused.stderr
    assert "Traceback" not in refused.stderr
