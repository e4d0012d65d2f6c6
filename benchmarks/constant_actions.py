"""What a constant action does in a task: the control that a score has to beat before it tells of planning or skills.

    python benchmarks/constant_actions.py --env-id calvin --out FILE.csv    # 11 minutes on one core

Tries all corners of the action box, 2^A actions (A numbers of -1 or 1), each for whole episodes: once as it is and once
with the noise that Dreamer and LSP explore with. Writes a row per episode, and FILE.json with command and machine.
"""

import csv
import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data_tools
from benchmarks.provenance import provenance
from data_tools.files import check_writable, write_atomically


@dataclass
class Args:
    out: Path  # CSV to write
    env_id: Literal["maze", "kitchen", "kitchen-misaligned", "calvin"] = "calvin"  # task
    seeds: int = 5  # episodes per action and noise
    explore_std: float = 0.3  # std of the noise on actions, for half of the episodes


def corners(action_dim: int) -> np.ndarray:
    """All vectors of -1 and 1, (2^A, A)."""
    return np.array(list(itertools.product([-1.0, 1.0], repeat=action_dim)), dtype=np.float32)


def constant_returns(env_id: str, actions: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Returns (N,) of an episode for each of the actions (N, A), with Gaussian noise of this std on each env step."""
    envs = data_tools.make_envs(env_id, len(actions))
    envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    returns = np.zeros(len(actions))
    ended = np.zeros(len(actions), dtype=bool)
    while not ended.all():
        noisy = actions + noise * rng.normal(size=actions.shape)
        _, rewards, terminations, truncations, _ = envs.step(noisy.clip(-1, 1).astype(np.float32))
        returns += np.where(ended, 0.0, rewards)
        ended |= terminations | truncations
    envs.close()
    return returns


def write_rows(path: Path, rows: list):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("action", "noise", "seed", "episodic_return"))
        writer.writerows(rows)


def main(args: Args):
    try:
        check_writable(args.out)
    except data_tools.DataError as error:
        sys.exit(str(error))
    origin = provenance()
    actions = corners(data_tools.env_sizes(args.env_id)[1])
    names = ["".join("+" if number > 0 else "-" for number in action) for action in actions]
    rows = []
    rounds = list(itertools.product((0.0, args.explore_std), range(1, args.seeds + 1)))
    for noise, seed in tqdm(rounds, desc="an episode of each action"):
        returns = constant_returns(args.env_id, actions, noise, seed)
        rows += [(name, noise, seed, value) for name, value in zip(names, returns.tolist())]
    write_atomically(args.out, lambda path: write_rows(path, rows))
    args.out.with_suffix(".json").write_text(json.dumps(origin, indent=1) + "\n")
    for noise in (0.0, args.explore_std):
        mean = {name: np.mean([row[3] for row in rows if row[:2] == (name, noise)]) for name in names}
        best = sorted(names, key=mean.get, reverse=True)[:5]
        words = ", ".join(f"{name} {mean[name]:.3g}" for name in best)
        print(f"noise {noise}: mean of all {np.mean(list(mean.values())):.3g}; best {words}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
