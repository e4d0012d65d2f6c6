"""How far the value has spread back from the maze's goal: the critics against what was to be had, by distance.

    python benchmarks/value_front.py runs/FOLDER                      # a run of skimo.py on the maze
    python benchmarks/value_front.py runs/FOLDER --algo skimo_no_cem

Looks at the states of the last training episodes in the replay buffer of the run's checkpoint. Value: min(Q1, Q2) of a
skill of the task policy. To be had: the discounted return that followed, in the episodes that reached the goal.
Prints a Markdown table. Beyond the front the value is 0 and the policy still the prior.
"""

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
from data_tools import env_sizes
from data_tools.tasks import maze


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
    """
    checkpoint = run / "checkpoint.pt"
    with algo.reading(checkpoint):
        args = algo.load(checkpoint, {})["args"]
    if args["env_id"] != "maze":
        sys.exit(f"error: {run} is a run of {args['env_id']}, not of the maze; give another")
    with algo.reading(checkpoint):
        args = algo.Args(**args | dict(device="cpu", cudagraphs=False))
        agent = algo.Agent(args, algo.make_networks(args, *env_sizes("maze")))
        replay = algo.load(checkpoint, dict(agent=agent))["rb"]
    chosen = []
    returns = []
    for first, num_skills in replay["episodes"][-num_episodes:].tolist():
        reward = replay["rewards"][first : first + num_skills].tolist()
        ahead = [0.0]
        for r in reversed(reward):
            ahead.append(r + args.gamma * ahead[-1])
        returns += ahead[:0:-1] if sum(reward) > 0 else [np.nan] * num_skills
        chosen += range(first, first + num_skills)
    obs = replay["obs"][chosen]  # (n, O)
    h = agent.model.encoder(obs)  # (n, d)
    torch.manual_seed(0)
    z = algo.sample_skill(algo.gaussian_parameters(agent.task_policy(h)))  # (n, Z)
    value = torch.min(*agent.model.q(h, z))  # (n,)
    cells = maze.cell_of(obs.numpy())  # (n, 2)
    distance = maze.geodesic_distance(maze.make_layout(), maze.GOAL)[cells[:, 0], cells[:, 1]]  # (n,)
    return distance, value.numpy(), np.array(returns)


def main(args: Args):
    if args.episodes < 1 or args.bin < 1:
        sys.exit("error: --episodes and --bin need numbers of at least 1")
    distance, value, returns = values_by_distance(args.run, importlib.import_module(args.algo), args.episodes)
    print("| cells | states | value | to be had |\n|---|---|---|---|")
    for low in range(0, int(distance[np.isfinite(distance)].max()) + 1, args.bin):
        chosen = (low <= distance) & (distance < low + args.bin)
        if chosen.any():
            reached = returns[chosen & ~np.isnan(returns)]
            to_be_had = f"{reached.mean():.1f}" if len(reached) else ""
            print(f"| {low}-{low + args.bin} | {chosen.sum()} | {value[chosen].mean():.1f} | {to_be_had} |")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
