"""Where SkiMo's episodes end that miss the maze's goal, without and with exploration noise.

    python benchmarks/results/studies/maze_evaluations/corners.py CHECKPOINT...     # a minute or two each

Checkpoints are those of the run every_10000, copied after each evaluation. 20 episodes from the evaluation's starts.
"""

import collections
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "algos"))
import skimo

EPISODES = 20


def episodes(agent, args, global_step: int, explore: bool):
    """Returns (E,) and positions (T, E, 2) before each of T skills."""
    planner = skimo.Planner(agent, args, explore)
    positions = []

    def choose_skill(obs):
        positions.append(obs[:, :2])
        return planner(obs, global_step)

    returns, _ = skimo.rollout(choose_skill, agent.skills, EPISODES, args, 10_000 + args.seed)
    return returns, np.stack(positions)


args = skimo.Args(env_id="maze", device="cpu", seed=2, **skimo.TASK_DEFAULTS["maze"])
for path in sys.argv[1:]:
    agent = skimo.Agent(args, skimo.make_networks(args, 4, 2))
    global_step = skimo.load(Path(path), dict(agent=agent))["global_step"]
    for explore in (False, True):
        returns, positions = episodes(agent, args, global_step, explore)
        missed = positions[:, returns <= 0]  # (T, M, 2)
        moved = np.linalg.norm(missed[-1] - missed[-21], axis=1)  # (M,) in 200 env steps
        ends = collections.Counter(f"({x:.0f}, {y:.0f})" for x, y in missed[-1]).most_common(4)
        print(
            f"env step {global_step}, {'with' if explore else 'without'} noise:",
            f"{(returns > 0).sum()} of {EPISODES} at the goal,",
            f"{(moved < 0.2).sum()} of {len(moved)} others moved less than .2 cells in the last 200 env steps;",
            f"the others end at {', '.join(f'{place} {n}' for place, n in ends) or '-'}",
            flush=True,
        )
