"""A task of one's own, whole: a point that walks to a goal, and data of walks to random places. An example to copy."""

import numpy as np

from data_tools import OfflineDataset
from data_tools.tasks.vector import MemberVectorEnv

GOAL = np.array([0.8, 0.8])


class WalkVectorEnv(MemberVectorEnv):
    """E points; observation: position (2,), action: step / 0.1 (2,). Reward 10 within 0.2 of the goal, the end."""

    saved = {"position": np.float64}

    def __init__(self, num_envs=1, max_episode_steps=60, render_mode=None):
        super().__init__(num_envs, 2, 2, max_episode_steps, render_mode)
        self.position = np.zeros((num_envs, 2))

    def begin(self, members):
        self.position[members] = [self.rngs[i].uniform(-1, 0, 2) for i in members]

    def advance(self, actions, running):
        self.position = self.position + 0.1 * actions * running[:, None]
        arrived = running & (np.linalg.norm(self.position - GOAL, axis=1) < 0.2)
        return 10.0 * arrived, arrived

    def observations(self):
        return self.position.astype(np.float32)


def collect(noise, seed, progress, num_episodes=40):
    """Walks towards random places, each step disturbed by `noise`, of 30 steps or to the goal."""
    envs = WalkVectorEnv(num_episodes)
    rng = np.random.default_rng(seed)
    places = rng.uniform(-1, 1, (num_episodes, 2))
    obs = [envs.reset(seed=seed)[0]]
    actions = []
    for _ in range(30):
        actions.append(np.clip(3 * (places - obs[-1]) + noise * rng.normal(size=(num_episodes, 2)), -1, 1))
        obs.append(envs.step(actions[-1])[0])
    obs, actions = np.array(obs), np.array(actions)  # (31, episodes, 2), (30, episodes, 2)
    walks = [(obs[: n + 1, i], actions[:n, i], envs.terminations[i]) for i, n in enumerate(envs.steps)]
    return OfflineDataset.from_episodes(walks)
