"""Positive controls of algos/qc.py: a bandit of chunks, a corridor and tests/toy_walk.py, with data that go all ways.

    python benchmarks/controls/qc.py walk --out benchmarks/results/studies/controls/qc_walk_seed1.csv
    python benchmarks/controls/qc.py walk --num-samples 1 --out FILE.csv     # negative: the clone alone does not learn

The whole file runs, both phases. The csv has a row per training episode; a JSON beside it tells command, commit,
machine, arguments, and the verdict: the mean return of the last 50 episodes must exceed the task's gate. In the bandit
chunks of the clone are judged as well: two modes, and less than 2 % of its chunks between them.
"""

import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data_tools
from algos import qc
from benchmarks.controls import frame
from data_tools.tasks.vector import MemberVectorEnv


class BanditVectorEnv(MemberVectorEnv):
    """Two steps and a true end; reward 1 if both actions are about -.8. There is one state."""

    def __init__(self, num_envs=1, max_episode_steps=2, render_mode=None):
        super().__init__(num_envs, 1, 1, max_episode_steps, render_mode)
        self.right = np.ones(num_envs)

    saved = {"right": np.float64}

    def begin(self, members):
        self.right[members] = 1

    def advance(self, actions, running):
        self.right *= np.abs(actions[:, 0] + 0.8) < 0.3
        last = running & (self.steps == 1)
        self.terminations = self.terminations | last
        return self.right * last, last & (self.right > 0)

    def observations(self):
        return np.ones((self.num_envs, 1), dtype=np.float32)


class CorridorVectorEnv(MemberVectorEnv):
    """60 cells, from the middle; an action moves by up to one. Reward 1 at the right end, which is the end."""

    saved = {"place": np.float64}

    def __init__(self, num_envs=1, max_episode_steps=100, render_mode=None):
        super().__init__(num_envs, 1, 1, max_episode_steps, render_mode)
        self.place = np.zeros(num_envs)

    def begin(self, members):
        self.place[members] = 30.0

    def advance(self, actions, running):
        self.place = np.clip(self.place + actions[:, 0] * running, 0, 60)
        arrived = running & (self.place > 59)
        return 1.0 * arrived, arrived

    def observations(self):
        return (self.place[:, None] / 60).astype(np.float32)


def collect_bandit(noise, seed, progress):
    """Both actions about .8 or both about -.8; rows beyond the second make whole windows."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(400):
        actions = rng.choice([-0.8, 0.8]) + 0.02 * rng.normal(size=(3, 1))
        episodes.append((np.ones((3, 1)), actions, False))
    return data_tools.OfflineDataset.from_episodes(episodes)


def collect_corridor(noise, seed, progress):
    """Twenty steps to either side from anywhere, each action disturbed."""
    rng = np.random.default_rng(seed)
    episodes = []
    for _ in range(400):
        actions = np.clip(rng.choice([-0.8, 0.8]) + 0.2 * rng.normal(size=(20, 1)), -1, 1)
        places = rng.uniform(0, 60) + np.concatenate([[[0]], actions.cumsum(0)])
        episodes.append((np.clip(places, 0, 60) / 60, actions, False))
    return data_tools.OfflineDataset.from_episodes(episodes)


# Sizes for a minute on one core. offline "pred" is the file's own choice but for the maze.
COMMON = dict(
    device="cpu", cudagraphs=False, hidden_dim=64, hidden_layers=2, num_envs=8, batch_size=128, pretrain_updates=2_500,
    pretrain_eval_interval=10**9, pretrain_eval_episodes=25, eval_interval=10**9, learning_rate=1e-3, gamma=0.98,
)  # fmt: skip
SETTINGS = {
    "bandit": dict(skill_horizon=2, total_timesteps=3_000, warmup_steps=400, updates_per_step=0.2, flow_steps=20,
                   pretrain_updates=6_000),
    "corridor": dict(skill_horizon=5, total_timesteps=20_000, warmup_steps=2_000, updates_per_step=0.2),
    "walk": dict(skill_horizon=5, total_timesteps=12_000, warmup_steps=2_000, updates_per_step=0.2),
}  # fmt: skip
GATES = {"bandit": 0.99, "corridor": 0.9, "walk": 9.0}  # of the highest return: 1, 1, 10
TASKS = {
    "bandit": data_tools.Task(f"{__name__}:BanditVectorEnv", 1.0, collect=f"{__name__}:collect_bandit"),
    "corridor": data_tools.Task(f"{__name__}:CorridorVectorEnv", 1.0, collect=f"{__name__}:collect_corridor"),
    "walk": data_tools.Task("tests.toy_walk:WalkVectorEnv", 10.0, collect="tests.toy_walk:collect", noise=0.2),
}


def main():
    parser = frame.parser(__doc__)
    parser.add_argument("task", choices=list(SETTINGS))
    parser.add_argument("--offline", default="none", choices=["none", "zero", "pred"])
    parser.add_argument("--num-samples", type=int, default=32)
    given = parser.parse_args()
    settings = COMMON | SETTINGS[given.task] | dict(offline=given.offline, num_samples=given.num_samples)
    with frame.record(given.out) as facts, tempfile.TemporaryDirectory() as folder, patch.dict(data_tools.TASKS, TASKS):
        args = qc.Args(env_id=given.task, seed=given.seed, **settings, data_dir=folder)
        results, agent, episodes, _ = frame.train(qc, args)
        rows = [(int(step), value, int(length), minutes) for step, value, length, minutes in episodes]
        frame.write_csv(given.out, ("env_step", "episodic_return", "episodic_length", "minutes"), rows)
        last = float(episodes[-50:, 1].mean())
        facts |= dict(pretraining=results["pretraining"], last_50_return=last, evaluations=results["evaluations"])
        facts |= dict(gate=GATES[given.task], passed=last > GATES[given.task], args=asdict(args))
        if given.task == "bandit":
            torch.manual_seed(0)
            chunks = agent.flow.sample(torch.ones(1, 1), 5_000)[0]  # (N, 2)
            facts["first_mode"] = float((chunks > 0).all(1).float().mean())
            facts["between"] = float((chunks.abs() < 0.3).any(1).float().mean())
            facts["passed"] &= facts["between"] < 0.02 and 0.4 < facts["first_mode"] < 0.6
    print(f"{given.task}: mean of the last 50 episodes {last:.2f}; {'learnt' if facts['passed'] else 'NOT learnt'}")


if __name__ == "__main__":
    main()
