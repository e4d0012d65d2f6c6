"""Minari's kitchen (https://minari.farama.org, D4RL/kitchen/mixed-v2 and others): the folder of one data set.

The same demonstrations as D4RL's, played again in Gymnasium-Robotics' FrankaKitchen-v1, so other numbers than theirs.
"""

import json

import h5py
import numpy as np

from data_tools.dataset import KEYS
from data_tools.files import CURE, DataError, listed, reading

ENV_ID = "FrankaKitchen-v1"
COLUMNS = [*range(9), *range(18, 39)]  # joints, objects; not the 9 and 20 velocities of its 59 numbers
HINT = f"of the 59 numbers of {ENV_ID} columns 0-8 and 18-38 are the 30"


def folder_of(path):
    """Return the folder with metadata.json that a path means, or None: itself, its folder `data`, that of its file."""
    places = [path, path / "data"] if path.is_dir() else [path.parent] if path.name == "main_data.hdf5" else []
    return next((place for place in places if (place / "metadata.json").is_file()), None)


def read(folder) -> tuple[dict[str, np.ndarray], dict]:
    """Return arrays (by KEYS) and attributes of a data set of the kitchen. Raises DataError for any other."""
    with reading(folder / "metadata.json"):
        facts = json.loads((folder / "metadata.json").read_text())
        env_id = json.loads(facts.get("env_spec") or "{}").get("id", "an environment without a name")
    if env_id != ENV_ID:
        raise DataError(f"{folder} holds data of {env_id}; of Minari's data sets only those of {ENV_ID} are read.")
    path = folder / "main_data.hdf5"
    if not path.is_file():
        kept = facts.get("data_format", "hdf5")
        raise DataError(f"{folder} has no main_data.hdf5 (data_format {kept!r}): only Minari's format hdf5 is read.")
    episodes = []
    with reading(path), h5py.File(path) as file:
        names = sorted((name for name in file if name.startswith("episode_")), key=lambda name: int(name[8:]))
        expected = facts.get("total_episodes", len(names))
        if len(names) != expected:
            raise DataError(f"{path} has {len(names):,} of {expected:,} episodes: fetch it again.")
        for name in names:
            keys = ("observations/observation", "actions", "terminations")
            missing = [key for key in keys if not isinstance(file[name].get(key), h5py.Dataset)]
            if missing:
                raise DataError(f"{path}: {name} has {listed(file[name])}, but no {', no '.join(missing)}: {CURE}.")
            episodes.append(_episode(f"{path}: {name}", *(np.asarray(file[name][key]) for key in keys)))
    if not any(len(episode["actions"]) for episode in episodes):
        raise DataError(f"{path} has no episodes: {CURE}.")
    arrays = {key: np.concatenate([episode[key] for episode in episodes]) for key in KEYS}
    name = facts.get("dataset_id") or folder.parent.name
    return arrays, {"description": f"Minari's {name} (not D4RL's own numbers)", "source": "minari"}


def _episode(where, observations, actions, terminals):
    """Return arrays (by KEYS, T rows) of an episode: observations (T+1, 59), of which the last has no action."""
    T = len(actions) if actions.ndim else 0
    if observations.shape != (T + 1, 59) or actions.shape != (T, 9) or terminals.shape != (T,):
        shapes = f"observations {observations.shape}, actions {actions.shape}, terminations {terminals.shape}"
        raise DataError(f"{where} has {shapes}, expected (T+1, 59), (T, 9), (T,): {CURE}.")
    timeouts = np.zeros(T, dtype=bool)
    timeouts[-1:] = terminals[-1:] == 0
    return dict(zip(KEYS, (observations[:-1, COLUMNS], actions, terminals, timeouts)))
