"""CALVIN's recordings (https://arxiv.org/abs/2112.03227): the extracted folder task_D_D, one npz file per frame."""

import os
import re
from itertools import pairwise

import numpy as np
from tqdm import tqdm

from data_tools.dataset import KEYS
from data_tools.files import DataError, listed, reading

# The paper has 1,239 trajectories, but not how they were cut. The 35 recordings of split D (training and validation),
# cut into pieces of 500 steps with the remainders kept, are exactly 1,239.
PIECE = 500
LAST_FRAME = 611_098  # of split D
FRAME_ARRAYS = {"rel_actions": 7, "robot_obs": 15, "scene_obs": 24}
PUBLISHED = "give the folder task_D_D as it was published"


def is_calvin(folder) -> bool:
    """Tell whether a folder holds extracted recordings."""
    return bool(_parts(folder)) or any(folder.glob("episode_*.npz"))


def _parts(folder):
    """Return the folders with recordings: the folder itself, or its training and validation."""
    parts = [folder / name for name in ("", "training", "validation")]
    return [part for part in parts if os.path.isfile(part / "ep_start_end_ids.npy")]


def read(path, progress: bool = True) -> tuple[dict[str, np.ndarray], dict]:
    """Return arrays (by KEYS) and attributes of extracted frames: one npz per frame, of which only numbers are read.

    Raises DataError for missing or damaged frames.
    """
    folders = _parts(path)
    if not folders:
        raise DataError(f"{path} has frames of CALVIN but no ep_start_end_ids.npy: extract the archive again.")
    for half in (path / "training", path / "validation"):
        if os.path.isdir(half) and half not in folders:
            raise DataError(f"{half}/ep_start_end_ids.npy is missing or may not be read: extract the archive again.")
    recordings = []  # (first frame, last frame, {frame: file})
    for folder in folders:
        with reading(folder):
            found = [(re.fullmatch(r"episode_(\d+)\.npz", file.name), file) for file in folder.iterdir()]
        files = {int(match[1]): file for match, file in found if match}
        for first, last in _recordings_of(folder):
            # A damaged list may name more frames than there are in the world: count before looking for each.
            if last - first >= len(files) or any(n not in files for n in range(first, last + 1)):
                raise DataError(f"{folder} lacks some of the frames {first} to {last}: extract the archive again.")
            recordings.append((first, last, files))
    recordings.sort(key=lambda recording: recording[0])
    for (_, end, _), (start, _, _) in pairwise(recordings):
        if start <= end:
            raise DataError(f"{path} has frame {start} in two recordings: extract the archive again.")
    if recordings[-1][1] > LAST_FRAME:
        found = f"{path} has frame {recordings[-1][1]}, but split D, whose scene is the task's, ends at {LAST_FRAME}"
        raise DataError(f"{found}: give the folder task_D_D.")
    frames = [files[n] for first, last, files in recordings for n in range(first, last + 1)]
    if len(frames) > 10_000:
        command = f"python -m data_tools convert --env-id calvin --data {path} --out calvin.hdf5"
        print(f"Reading {len(frames):,} small files; to do so only once, write them as one file: {command}", flush=True)
    observations = np.empty((len(frames), 21), dtype=np.float32)
    actions = np.empty((len(frames), 7), dtype=np.float32)
    for row, file in enumerate(tqdm(frames, desc="CALVIN frames", unit="frame", disable=not progress)):
        with reading(file, "extract it again"), np.load(file, allow_pickle=False) as frame:
            numbers = {key: frame[key] for key in FRAME_ARRAYS if key in frame}
            if len(numbers) < len(FRAME_ARRAYS):
                raise DataError(f"{file} has {listed(frame)}, but not all of {listed(FRAME_ARRAYS)}: {PUBLISHED}.")
        for key, size in FRAME_ARRAYS.items():
            array = numbers[key]
            if array.shape != (size,) or array.dtype.kind != "f":
                raise DataError(f"{file}: {key} is {array.dtype} {array.shape}, expected {size} floats: {PUBLISHED}.")
        observations[row] = np.concatenate([numbers["robot_obs"], numbers["scene_obs"][:6]])
        actions[row] = numbers["rel_actions"]
    names = " and ".join(folder.name for folder in folders) if folders != [path] else path.name
    return _cut(observations, actions, [last - first + 1 for first, last, _ in recordings], names)


def _recordings_of(folder):
    """Return [(first frame, last frame), ...] from ep_start_end_ids.npy."""
    file = folder / "ep_start_end_ids.npy"
    with reading(file, "extract it again"):
        ranges = np.load(file, allow_pickle=False)
    with reading(file, PUBLISHED, "is not CALVIN's"):
        if ranges.ndim != 2 or ranges.shape[1] != 2 or len(ranges) == 0 or ranges.dtype.kind not in "iu":
            raise ValueError(f"it has shape {ranges.shape} ({ranges.dtype}), expected pairs of frame numbers")
        if (ranges[:, 0] > ranges[:, 1]).any():
            raise ValueError("a recording ends before it starts")
    return [(int(first), int(last)) for first, last in ranges]


def _cut(observations, actions, lengths, names):
    """Return arrays and attributes: recordings of the given lengths, cut into pieces of 500 steps and a remainder."""
    ends = np.cumsum(lengths)
    timeouts = np.zeros(len(actions), dtype=bool)
    for length, end in zip(lengths, ends):
        timeouts[end - length + PIECE - 1 : end : PIECE] = True
        timeouts[end - 1] = True
    note = f"{len(lengths)} recordings cut into pieces of {PIECE} steps"
    if len(actions) != LAST_FRAME + 1:
        note += f", {len(actions) / (LAST_FRAME + 1):.1%} of split D"
    terminals = np.zeros_like(timeouts)
    attributes = {"description": f"CALVIN play data ({names})", "source": "calvin", "note": note}
    return dict(zip(KEYS, (observations, actions, terminals, timeouts))), attributes
