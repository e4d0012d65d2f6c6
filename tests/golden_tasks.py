"""Print hashes of what the tasks and the scripted data are made of: run it before and after a change, and compare.

    python tests/golden_tasks.py > before.txt

Each line is a name and a hash. The trajectories are 60 random actions of a vector of three members (observations,
rewards, flags, the state at the end) and of a single environment (observations, rewards, flags, infos). The data sets
are the first few trajectories of the default ones. Physics depend on the versions in requirements.txt and a little on
the processor, so no hashes are kept.
"""

import hashlib
import importlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gymnasium
import numpy as np

import data_tools  # noqa: F401 (registers the tasks)

GYM_IDS = ("skimo/Maze-v0", "skimo/Kitchen-v0", "skimo/KitchenMisaligned-v0", "skimo/Calvin-v0")
COLLECTORS = {
    "data_tools.scripted.maze": 20,
    "data_tools.scripted.kitchen": 2,
    "data_tools.scripted.calvin": 3,
}  # number


def digest(*parts) -> str:
    """Return a hash of arrays and plain values."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.tobytes() if isinstance(part, np.ndarray) else json.dumps(part, sort_keys=True).encode())
    return total.hexdigest()[:16]


def vector_trajectory(gym_id: str) -> str:
    """Three members, episodes of at most 25 steps, so that resets are part of it."""
    envs = gymnasium.make_vec(gym_id, 3, vectorization_mode="vector_entry_point", max_episode_steps=25)
    rng = np.random.default_rng(0)
    parts = [envs.reset(seed=7)[0]]
    for _ in range(60):
        result = envs.step(rng.uniform(-1, 1, envs.action_space.shape).astype(np.float32))
        parts += result[:4]
        ended = result[2] | result[3]
        if ended.any():
            parts.append(envs.reset(options={"reset_mask": ended})[0])
    parts.append(envs.get_state())
    envs.close()
    return digest(*parts)


def single_trajectory(gym_id: str) -> str:
    """One environment through three episodes, of which only the first gets a seed."""
    env = gymnasium.make(gym_id, max_episode_steps=20)
    rng = np.random.default_rng(0)
    parts = [env.reset(seed=7)[0]]
    for _ in range(60):
        obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, env.action_space.shape))
        parts += [obs, reward, terminated, truncated, info]
        if terminated or truncated:
            parts.append(env.reset()[0])
    env.close()
    return digest(*parts)


if __name__ == "__main__":
    for gym_id in GYM_IDS:
        print(gym_id, "vector", vector_trajectory(gym_id), flush=True)
        print(gym_id, "single", single_trajectory(gym_id), flush=True)
    for module, number in COLLECTORS.items():
        dataset = importlib.import_module(module).collect(number, progress=False)
        print(module.split(".")[-1], dataset, flush=True)
