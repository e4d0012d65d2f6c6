"""Positive controls of algos/supe.py: a point that walks to a goal, and a corridor where demonstrations show the way.

    python benchmarks/controls/supe.py walk --out benchmarks/results/studies/controls/supe_walk_seed1.csv
    python benchmarks/controls/supe.py corridor --out benchmarks/results/studies/controls/supe_corridor_seed1.csv

`walk` is the task of tests/toy_walk.py; most of its data end elsewhere. The csv has the mean return of the training
episodes in each 1,000 env steps, at most 10. In `corridor` the data go both ways at random, and only one end pays. The
csv has a row per seed and share of demonstrations in a batch: the training episodes until the first success, counted
after the warm-up. The JSON beside it tells command, commit, machine, arguments, and whether the gate was passed.
"""

import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import supe
from benchmarks.controls import frame
from data_tools import TASKS, OfflineDataset, Task
from data_tools.tasks.vector import MemberVectorEnv

COMMON = dict(
    device="cpu", cudagraphs=False, hidden_dim=64, critic_dim=64, skill_horizon=5, critic_steps=1, alpha=0.05,
    updates_per_step=0.2, pretrain_eval_interval=10**9, pretrain_eval_episodes=20,
    rnd_coef=1.0,  # a tenth of what the goal pays
    eval_interval=10**9, checkpoint_interval=10**9,
)  # fmt: skip
SETTINGS = {
    "walk": dict(skill_dim=4, pretrain_updates=1_500, warmup_steps=1_000, total_timesteps=12_000),
    "corridor": dict(skill_dim=2, pretrain_updates=500, warmup_steps=480, total_timesteps=4_000, batch_size=64,
                     learning_rate=1e-3, tau=0.02),
}  # fmt: skip
GATE = 8.0  # mean return of a walk that is needed in the last 1,000 env steps
SEEDS = 5  # corridors
LENGTH = 60  # cells of a corridor; the point begins at the tenth and has 60 steps of at most one cell


class CorridorVectorEnv(MemberVectorEnv):
    """E points between 0 and LENGTH; observation: position / 10 - 3 (1,), action: the step (1,).

    The far end pays 10.
    """

    saved = {"position": np.float64}

    def __init__(self, num_envs: int, max_episode_steps: int = 60, **options):
        super().__init__(num_envs, 1, 1, max_episode_steps, **options)
        self.position = np.zeros(num_envs)

    def begin(self, members):
        self.position[members] = 10

    def advance(self, actions, running):
        self.position = np.clip(self.position + actions[:, 0] * running, 0, LENGTH)
        arrived = running & (self.position >= LENGTH - 0.5)
        return 10.0 * arrived, arrived

    def observations(self):
        return self.position.astype(np.float32)[:, None] / 10 - 3


def corridor_data(noise, seed, progress):
    """Sixty walks of 40 steps from anywhere, half of them to each side."""
    rng = np.random.default_rng(seed)
    episodes = []
    for k in range(60):
        actions = np.clip((-1) ** k + noise * rng.normal(size=40), -1, 1)
        start = rng.uniform(0, LENGTH)
        path = np.clip(start + np.concatenate([[0], actions.cumsum()]), 0, LENGTH)
        episodes.append((path[:, None] / 10 - 3, actions[:, None], False))
    return OfflineDataset.from_episodes(episodes)


TASKS["walk"] = Task("tests.toy_walk:WalkVectorEnv", max_return=10.0, collect="tests.toy_walk:collect", noise=0.2)
TASKS["corridor"] = Task(
    "benchmarks.controls.supe:CorridorVectorEnv", 10.0, collect="benchmarks.controls.supe:corridor_data", noise=0.3
)


def walk(args, given) -> dict:
    _, _, episodes, _ = frame.train(supe, args)
    rows = []
    for end in range(1_000, args.total_timesteps + 1, 1_000):
        inside = (episodes[:, 0] > end - 1_000) & (episodes[:, 0] <= end)
        rows.append((end, round(float(episodes[inside, 1].mean()), 2)))
    frame.write_csv(given.out, ("env_step", "mean_return"), rows)
    return dict(gate=GATE, last_return=rows[-1][1], passed=rows[-1][1] > GATE)


def corridor(args, given) -> dict:
    rows = []
    for seed in range(given.seed, given.seed + given.seeds):
        for ratio in (0.5, 0.0):
            _, _, episodes, _ = frame.train(supe, replace(args, seed=seed, offline_ratio=ratio))
            late = episodes[episodes[:, 0] > args.warmup_steps, 1] > 0
            first = int(late.argmax()) + 1 if late.any() else len(late) + 1
            rows.append((seed, ratio, first, round(float(late.mean()), 3)))
            frame.write_csv(given.out, ("seed", "offline_ratio", "first_success", "success"), rows)
    firsts = {ratio: [row[2] for row in rows if row[1] == ratio] for ratio in (0.5, 0.0)}
    earlier = [one < other for one, other in zip(firsts[0.5], firsts[0.0])]
    return dict(first_success=firsts, passed=2 * sum(earlier) > len(earlier))


def main():
    parser = frame.parser(__doc__)
    parser.add_argument("task", choices=list(SETTINGS))
    parser.add_argument("--env-steps", type=int, help="instead of the control's; walk: 1,000 at least")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="corridors")
    given = parser.parse_args()
    settings = COMMON | SETTINGS[given.task]
    settings |= dict(total_timesteps=given.env_steps) if given.env_steps else {}
    with frame.record(given.out) as facts, tempfile.TemporaryDirectory() as folder:
        args = supe.Args(env_id=given.task, seed=given.seed, **settings, data_dir=folder)
        facts |= {"walk": walk, "corridor": corridor}[given.task](args, given)
        facts |= dict(args=asdict(args))
    print(f"{given.task}: {'learnt' if facts['passed'] else 'NOT learnt'}")


if __name__ == "__main__":
    main()
