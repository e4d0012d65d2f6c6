"""Tasks and offline data of SkiMo (https://arxiv.org/abs/2207.07560); the import registers the tasks with Gymnasium.

`gymnasium.make("skimo/Maze-v0")` gives one environment,
`gymnasium.make_vec("skimo/Maze-v0", num_envs=E, vectorization_mode="vector_entry_point")` gives E stepped together.
"""

import gymnasium

from data_tools.dataset import TASKS, DataError, OfflineDataset, cache_dir, load_dataset
from data_tools.diagnostics import (
    MAX_RETURN,
    env_sizes,
    fork_rng,
    make_envs,
    obs_scale,
    open_loop_prediction,
    plot_prediction,
    plot_visited,
    position_frequency,
    rollout,
    rollout_statistics,
)
from data_tools.files import load_checkpoint, save_checkpoint
from data_tools.runs import Run, errors_in_one_line, parse_args

__all__ = [
    "MAX_RETURN",
    "TASKS",
    "DataError",
    "OfflineDataset",
    "Run",
    "cache_dir",
    "env_sizes",
    "errors_in_one_line",
    "fork_rng",
    "load_checkpoint",
    "load_dataset",
    "make_envs",
    "obs_scale",
    "open_loop_prediction",
    "parse_args",
    "plot_prediction",
    "plot_visited",
    "position_frequency",
    "rollout",
    "rollout_statistics",
    "save_checkpoint",
]

# No `max_episode_steps` here: the environments truncate by themselves, so that they behave the same when they are built
# without `gymnasium.make`, and `make` adds no second time limit around them.
for task, name in {"maze": "maze:Maze", "calvin": "calvin:Calvin"}.items():
    gymnasium.register(
        id=TASKS[task],
        entry_point=f"data_tools.{name}Env",
        vector_entry_point=f"data_tools.{name}VectorEnv",
    )
for task in ("kitchen", "kitchen-misaligned"):
    gymnasium.register(
        id=TASKS[task],
        entry_point="data_tools.kitchen:KitchenEnv",
        vector_entry_point="data_tools.kitchen:KitchenVectorEnv",
        kwargs={"task": task},
    )
