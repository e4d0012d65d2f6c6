"""How far the value has spread back from the maze's goal: the critics against what was to be had, by distance.

    python benchmarks/value_front.py runs/FOLDER                      # a run of skimo.py on the maze
    python benchmarks/value_front.py runs/FOLDER --algo skimo_no_cem

Looks at the states of the last training episodes in the replay buffer of the run's checkpoint. Value: min(Q1, Q2) of a
skill of the task policy. To be had: the discounted return that followed, in the episodes that reached the goal.
Prints a Markdown table. Beyond the front the value is 0 and the policy still the prior.
"""

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
import data_tools
from data_tools.tasks import maze

OBS_DIM, ACTION_DIM = 4, 2


@dataclass
class Args:
    run: tyro.conf.Positional[Path]  # the run's folder
    algo: Literal["skimo", "skimo_no_cem", "skimo_no_joint"] = "skimo"  # the file that made it
    episodes: int = 60  # how many of the last training episodes
    bin: int = 4  # cells per row of the table


@torch.no_grad()
def values_by_distance(run: Path, algo, num_episodes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the goal in cells, value, and discounted return (NaN where the goal was not reached), (n,) each.

    Where the ball touches a wall, the nearest cell may be the wall's, at an infinite distance.
    Raises DataError for a folder without a checkpoint, and for a checkpoint of another task or file.
    """
    meta = dict(env_id="maze", kind=f"{Path(algo.__file__).stem} run")
    state = data_tools.load_checkpoint(run / "checkpoint.pt", meta, "cpu")
    args = algo.Args(**json.loads((run / "args.json").read_text()) | dict(device="cpu", compile=False))
    learner = algo.Learner(args, algo.make_networks(args, OBS_DIM, ACTION_DIM, "cpu"))
    learner.load_state_dict(state["learner"]["weights"])
    obs, _, rewards, _ = state["rb"]["rows"].split([OBS_DIM, args.skill_dim, 1, 1], 1)
    chosen, returns = [], []
    for first, num_skills in state["rb"]["episodes"][-num_episodes:].tolist():
        reward = rewards[first : first + num_skills, 0].tolist()
        ahead = [0.0]
        for r in reversed(reward):
            ahead.append(r + args.gamma * ahead[-1])
        returns += ahead[:0:-1] if sum(reward) > 0 else [np.nan] * num_skills
        chosen += range(first, first + num_skills)
    obs = obs[chosen]  # (n, O)
    h = learner.model.encoder(obs)  # (n, d)
    torch.manual_seed(0)
    value = torch.min(*learner.model.q(h, algo.sample(algo.tanh_normal(learner.task_policy(h)))))  # (n,)
    cells = maze.cell_of(obs.numpy())  # (n, 2)
    distance = maze.geodesic_distance(maze.make_layout(), maze.GOAL)[cells[:, 0], cells[:, 1]]  # (n,)
    return distance, value.numpy(), np.array(returns)


def main(args: Args):
    distance, value, returns = values_by_distance(args.run, importlib.import_module(args.algo), args.episodes)
    print("| cells | states | value | to be had |\n|---|---|---|---|")
    for low in range(0, int(distance[np.isfinite(distance)].max()) + 1, args.bin):
        chosen = (low <= distance) & (distance < low + args.bin)
        if chosen.any():
            reached = returns[chosen & ~np.isnan(returns)]
            to_be_had = f"{reached.mean():.1f}" if len(reached) else ""
            print(f"| {low}-{low + args.bin} | {chosen.sum()} | {value[chosen].mean():.1f} | {to_be_had} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
