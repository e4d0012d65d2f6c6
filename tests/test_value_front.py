"""benchmarks/value_front.py against a replay buffer whose distances and returns are known."""

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from algos import skimo
from benchmarks import value_front
from data_tools.tasks import maze

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run(tmp_path):
    """A run's folder: three episodes in the replay buffer, critics that are 7 everywhere."""
    args = skimo.Args(env_id="maze", hidden_dim=8, latent_dim=6, skill_encoder="mlp", gamma=0.5, num_skills=1)
    agent = skimo.Agent(args, skimo.make_networks(args, 4, 2))
    for head in (agent.model.qf1, agent.model.qf2):
        torch.nn.init.zeros_(head[-1].weight)
    torch.nn.init.constant_(agent.model.qf1[-1].bias, 7.0)
    torch.nn.init.constant_(agent.model.qf2[-1].bias, 8.0)
    layout = maze.make_layout()
    distance = maze.geodesic_distance(layout, maze.GOAL)
    far = np.argwhere(distance == 30)[0]
    near = np.argwhere(distance == 1)[0]
    wall = np.argwhere(np.isinf(distance))[0]

    def add_episode(rb, *steps):  # (cell, reward), and at last the cell where it ends
        z = torch.zeros(args.skill_dim)
        rows = [
            (torch.tensor([*cell, 0, 0]), z, torch.tensor(reward), torch.tensor(0.0)) for cell, reward in steps[:-1]
        ]
        rb.add_episode(rows, torch.tensor([*steps[-1], 0, 0]))

    rb = skimo.ReplayBuffer(4, args)
    add_episode(rb, (near, 100.0), near)  # not among the last two
    add_episode(rb, (far, 0.0), (wall, 0.0), (near, 100.0), near)
    add_episode(rb, (far, 0.0), far)  # does not reach the goal
    skimo.save(tmp_path / "checkpoint.pt", dict(agent=agent, rb=rb), args=asdict(args))
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


def test_other_runs_are_refused_in_a_sentence(run, tmp_path):
    with pytest.raises(SystemExit, match="error: .*nowhere.checkpoint.pt does not exist"):
        value_front.values_by_distance(tmp_path / "nowhere", skimo, num_episodes=2)
    state = torch.load(run / "checkpoint.pt")
    state["args"]["env_id"] = "kitchen"
    torch.save(state, run / "checkpoint.pt")
    with pytest.raises(SystemExit, match="is a run of kitchen, not of the maze"):
        value_front.values_by_distance(run, skimo, num_episodes=2)
    with pytest.raises(SystemExit, match="--episodes and --bin"):
        value_front.main(value_front.Args(run, episodes=0))
