"""Tasks and offline data of SkiMo (https://arxiv.org/abs/2207.07560); the import registers the tasks with Gymnasium.

`gymnasium.make("skimo/Maze-v0")` gives one environment,
`gymnasium.make_vec("skimo/Maze-v0", num_envs=E, vectorization_mode="vector_entry_point")` gives E stepped together.
"""

import gymnasium

from data_tools.dataset import TASKS, DataError, OfflineDataset, cache_dir, load_dataset
from data_tools.diagnostics import (
    MAX_RETURN,
    make_envs,
    obs_scale,
    plot_prediction,
    plot_visited,
    rollout_statistics,
)
from data_tools.files import load_checkpoint, save_checkpoint, write_atomically

__all__ = [
    "MAX_RETURN",
    "TASKS",
    "DataError",
    "OfflineDataset",
    "cache_dir",
    "load_checkpoint",
    "load_dataset",
    "make_envs",
    "obs_scale",
    "plot_prediction",
    "plot_visited",
    "rollout_statistics",
    "save_checkpoint",
    "write_atomically",
]

# No `max_episode_steps` here: both environments truncate by themselves, so that they behave the same when they are
# built without `gymnasium.make`, and `make` adds no second time limit around them.
gymnasium.register(
    id=TASKS["maze"],
    entry_point="data_tools.maze:MazeEnv",
    vector_entry_point="data_tools.maze:MazeVectorEnv",
)
