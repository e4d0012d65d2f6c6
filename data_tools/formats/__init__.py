"""Readers of files that others made, whatever `--data PATH` names; nothing here knows tasks or scripts.

The format is recognised by content, not by name:
- d4rl.py: HDF5 in D4RL's layout, which is also that of our own files
- skimo_release.py: the archives of the SkiMo release (maze.gz, kitchen.gz, calvin.gz)
- calvin.py: the extracted folder of CALVIN's recordings
"""

import hashlib
import os
from pathlib import Path

import numpy as np

from data_tools.dataset import OfflineDataset, check_not_zero
from data_tools.files import DataError, check_regular, reading
from data_tools.formats import calvin, d4rl, skimo_release

EXPECTED = "an HDF5 file in D4RL's layout, an archive of the SkiMo release, or CALVIN's extracted folder task_D_D"


def read_data(path, obs_dim: int, action_dim: int, data_obs_dim: int | None = None, progress=True) -> OfflineDataset:
    """Read the data that `--data PATH` names for a task with O and A numbers, and print what they are.

    data_obs_dim: the file's observations may also have this many numbers; then those after the first O are left out.
    attributes["source"] is a short name, which the results record: see d4rl.SOURCES.
    Raises DataError if nothing of the task can be read from `path`, or what is there is damaged or incomplete.
    """
    path = Path(os.path.expanduser(path))
    arrays, attributes = _read(path, progress)
    observations = arrays["observations"]
    if observations.ndim == 2 and observations.shape[1] == data_obs_dim:
        arrays["observations"] = observations[:, :obs_dim]
    dataset = OfflineDataset(**arrays, attributes=attributes, name=str(path))
    check_not_zero(dataset, str(path))
    sizes = dataset.observations.shape[1], dataset.actions.shape[1]
    if sizes != (obs_dim, action_dim):
        raise DataError(
            f"{path} has {sizes[0]} numbers per observation and {sizes[1]} per action, the task has {obs_dim} and "
            f"{action_dim}: give data of this task."
        )
    notes = [attributes["note"]] if "note" in attributes else []
    if path.is_file() and not d4rl.SOURCES[attributes["source"]][1]:
        with open(path, "rb") as file:
            notes.append(f"SHA-256 {hashlib.file_digest(file, 'sha256').hexdigest()}")
    largest = float(np.abs(arrays["actions"]).max())
    if largest > 1.001:
        notes.append(f"actions reach {largest:.2f}, beyond the [-1, 1] of the policies")
    print(
        f"Data: {attributes['description']} from {path}: {len(dataset.episode_starts):,} episodes, "
        f"{len(dataset):,} steps{''.join(f'; {note}' for note in notes)}",
        flush=True,
    )
    return dataset


def _read(path, progress):
    """Return arrays (by KEYS) and attributes of a file or folder."""
    if os.path.isdir(path):  # pathlib's raises an error in a folder that may not be entered
        if calvin.is_calvin(path):
            return calvin.read(path, progress)
        raise DataError(f"--data {path} holds no data that we know; expected was {EXPECTED}.")
    check_regular(path)
    with reading(path, "fetch or copy it again"):
        with open(path, "rb") as file:
            is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
        is_pickle = skimo_release.is_pickle(path)
    if is_hdf5:
        return d4rl.read(path)
    if is_pickle:
        return skimo_release.read(path)
    raise DataError(f"--data {path} is in no format that we know; expected was {EXPECTED}.")
