"""Offline data that are made here, by scripts that act in the environments of data_tools.tasks.

`python -m data_tools collect` calls a script's `collect(noise, seed, progress)`, with `num_episodes` if the user gives
it. It also asks for these, which a script may have: `statistics(dataset)`, figures by their names; `plot(dataset,
path)`; `expert(num_episodes, noise, seed, **Task.env_kwargs)`, returns and lengths of episodes of the task.
"""

import numpy as np

from data_tools.files import DataError


def attributes_of(generator: str, num_episodes: int, noise: float, seed: int) -> dict:
    """Return what a data file says about its origin. Raises DataError for arguments without meaning."""
    if num_episodes < 1 or not 0.0 <= noise < np.inf or not 0 <= seed < 2**63:
        needed = "--num-episodes >= 1, --noise >= 0 and 0 <= --seed < 2**63"
        raise DataError(f"collecting needs {needed}, got {num_episodes}, {noise} and {seed}.")
    return {"source": "scripted", "generator": generator, "version": 1, "seed": seed, "noise": float(noise)}


def stream(seed: int, episode: int) -> np.random.Generator:
    """Return an episode's own random numbers: the data do not depend on what else is made, or in which order."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(episode,)))
