"""What a constant action does in a task: the control that a score has to beat before it tells of planning or skills.

    python benchmarks/controls/constant_actions.py --env-id calvin --out calvin.csv    # 11 minutes on one core

Tries all corners of the action box, 2^A actions (A numbers of -1 or 1), each for ten whole episodes: five as it is and
five with the noise that Dreamer and LSP explore with. Writes a row per episode.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data_tools
from benchmarks.controls import frame

NOISE = 0.3  # std of Dreamer's and LSP's, for half of the episodes
EPISODES = 5  # per action and noise


def corners(action_dim: int) -> np.ndarray:
    """All vectors of -1 and 1, (2^A, A)."""
    return np.array(list(itertools.product([-1.0, 1.0], repeat=action_dim)), dtype=np.float32)


def constant_returns(env_id: str, actions: np.ndarray, noise: float, seed: int) -> np.ndarray:
    """Returns (N,) of an episode for each of the actions (N, A), with Gaussian noise of this std on each env step."""
    envs = data_tools.make_envs(env_id, len(actions))
    envs.reset(seed=seed)
    rng = np.random.default_rng(seed)
    while not envs.waiting.all():
        noisy = actions + noise * rng.normal(size=actions.shape)
        envs.step(noisy.clip(-1, 1).astype(np.float32))
    envs.close()
    return envs.returns


def main():
    parser = frame.parser(__doc__)
    parser.add_argument("--env-id", default="calvin", choices=("maze", "kitchen", "kitchen-misaligned", "calvin"))
    args = parser.parse_args()
    actions = corners(data_tools.env_sizes(args.env_id)[1])
    names = ["".join("+" if number > 0 else "-" for number in action) for action in actions]
    rows = []
    rounds = list(itertools.product((0.0, NOISE), range(args.seed, args.seed + EPISODES)))
    with frame.record(args.out):
        for noise, seed in tqdm(rounds, desc="an episode of each action"):
            returns = constant_returns(args.env_id, actions, noise, seed)
            rows += [(name, noise, seed, value) for name, value in zip(names, returns.tolist())]
        frame.write_csv(args.out, ("action", "noise", "seed", "episodic_return"), rows)
    for noise in (0.0, NOISE):
        mean = {name: np.mean([row[3] for row in rows if row[:2] == (name, noise)]) for name in names}
        best = sorted(names, key=mean.get, reverse=True)[:5]
        words = ", ".join(f"{name} {mean[name]:.3g}" for name in best)
        print(f"noise {noise}: mean of all {np.mean(list(mean.values())):.3g}; best {words}")


if __name__ == "__main__":
    main()
