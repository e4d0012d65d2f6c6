"""Offline trajectories for pre-training: one HDF5 file per data set, all of it in memory on one device.

File layout is that of D4RL (https://arxiv.org/abs/2004.07219): flat arrays `observations (R, O)`, `actions (R, A)`,
`rewards (R,)`, `terminals (R,)`, `timeouts (R,)`; row t holds the state *before* action t.
Shapes: R rows, M episodes, B batch, O observation, A action.
"""

import copy
import hashlib
import importlib
import io
import os
from pathlib import Path

import h5py
import numpy as np
import platformdirs
import torch
from filelock import FileLock

from data_tools.files import DataError, write_atomically

TASKS = {  # short name -> Gymnasium id
    "maze": "skimo/Maze-v0",
    "kitchen": "skimo/Kitchen-v0",
    "kitchen-misaligned": "skimo/KitchenMisaligned-v0",
    "calvin": "skimo/Calvin-v0",
}


class OfflineDataset:
    """Episodes in flat tensors on one device.

    observations (R, O) float32, actions (R, A) float32, terminals (R,) bool, timeouts (R,) bool;
    episode_starts (M,) int64 is the first row of each episode, episode_lengths (M,) int64 its number of rows.
    An episode ends at a terminal or a timeout; rows after the last flag form an episode too.
    `attributes` says how the data were made, `fingerprint` is a hash of the content (for checkpoints and logs).
    """

    def __init__(self, observations, actions, terminals, timeouts, attributes=None, device="cpu", name="the data"):
        """Take array-likes of the shapes above. Raises DataError, which calls the data `name`, if they do not fit."""
        arrays = {"observations": observations, "actions": actions, "terminals": terminals, "timeouts": timeouts}
        arrays = {key: np.asarray(value) for key, value in arrays.items()}
        _check(arrays, name)
        observations = np.ascontiguousarray(arrays["observations"], dtype=np.float32)  # (R, O)
        actions = np.ascontiguousarray(arrays["actions"], dtype=np.float32)  # (R, A)
        terminals = arrays["terminals"].astype(bool)  # (R,)
        timeouts = arrays["timeouts"].astype(bool)  # (R,)

        ends = np.flatnonzero(terminals | timeouts) + 1  # one past the last row of each episode
        if len(ends) == 0 or ends[-1] != len(observations):
            ends = np.append(ends, len(observations))
        starts = np.concatenate([[0], ends[:-1]])  # (M,)

        digest = hashlib.sha256()
        for array in (observations, actions, terminals, timeouts):
            digest.update(str(array.shape).encode())
            digest.update(array.tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        self.attributes = dict(attributes or {})
        self.observations = torch.tensor(observations, device=device)
        self.actions = torch.tensor(actions, device=device)
        self.terminals = torch.tensor(terminals, device=device)
        self.timeouts = torch.tensor(timeouts, device=device)
        self.episode_starts = torch.tensor(starts, dtype=torch.int64, device=device)
        self.episode_lengths = torch.tensor(ends - starts, dtype=torch.int64, device=device)
        self._windows = {}  # window length -> first row and number of starts of each episode that is long enough

    def __len__(self):
        """Return the number of rows R."""
        return len(self.observations)

    def __repr__(self):
        return f"OfflineDataset({len(self.episode_starts)} episodes, {len(self)} rows, fingerprint {self.fingerprint})"

    @property
    def source(self) -> str:
        """Return the short name of where the data come from: scripted, d4rl, minari, ..."""
        return str(self.attributes.get("source", "scripted"))

    @property
    def device(self) -> torch.device:
        return self.observations.device

    def to(self, device) -> "OfflineDataset":
        """Return the data set on `device`; this one stays as it is."""
        moved = copy.copy(self)
        moved._windows = {}
        for key in ("observations", "actions", "terminals", "timeouts", "episode_starts", "episode_lengths"):
            setattr(moved, key, getattr(self, key).to(device))
        return moved

    def split(self, fraction: float = 0.99) -> tuple["OfflineDataset", "OfflineDataset"]:
        """Return (train, validation): the first `fraction` of the episodes in file order, and the rest.

        Each side has at least one episode. Raises DataError if there are fewer than two.
        """
        num_episodes = len(self.episode_starts)
        if num_episodes < 2:
            raise DataError(f"{self!r} cannot be split: collect at least two episodes.")
        cut = min(max(int(fraction * num_episodes), 1), num_episodes - 1)
        row = int(self.episode_starts[cut])
        parts = []
        for rows in (slice(None, row), slice(row, None)):
            arrays = [x[rows].cpu() for x in (self.observations, self.actions, self.terminals, self.timeouts)]
            parts.append(OfflineDataset(*arrays, attributes=self.attributes, device=self.device))
        return parts[0], parts[1]

    def sample_windows(
        self, batch_size: int, length: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw windows of consecutive rows of one episode: obs (B, length, O), actions (B, length - 1, A).

        Uniform over the episodes with at least `length` rows, then uniform over the start rows within the episode.
        `generator` must live on the data set's device. Nothing here waits for the device, so the call can be captured
        in a CUDA graph, once the first call for a `length` has built its table of episodes.
        Raises DataError if no episode is long enough.
        """
        if length not in self._windows:
            self._windows[length] = self._window_table(length)
        first_rows, num_starts = self._windows[length]

        # The remainder of a 62-bit integer: uniform to 1e-15, and never outside, unlike floor(uniform * n) in float32.
        draws = torch.randint(2**62, (2, batch_size), generator=generator, device=self.device)
        episode = draws[0] % len(first_rows)  # (B,)
        start = first_rows[episode] + draws[1] % num_starts[episode]  # (B,)
        rows = start[:, None] + torch.arange(length, device=self.device)  # (B, length)
        return self.observations[rows], self.actions[rows[:, :-1]]

    def _window_table(self, length):
        """Return the first row and the number of possible starts of each episode with at least `length` rows."""
        if length < 1:
            raise DataError(f"A window needs at least one row, not {length}.")
        eligible = self.episode_lengths >= length
        if not eligible.any():
            longest = int(self.episode_lengths.max())
            raise DataError(
                f"No episode of {self!r} has {length} rows, the longest has {longest}: "
                "use a shorter window or other data."
            )
        return self.episode_starts[eligible], self.episode_lengths[eligible] - length + 1

    def save(self, path) -> None:
        """Write the D4RL file `path`. An existing file is replaced in one step, or left intact if anything fails.

        Raises DataError if the file cannot be written (disk full, folder read-only).
        """
        # Built in memory first: HDF5 cannot close a file cleanly once the disk is full.
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            for key in ("observations", "actions", "terminals", "timeouts"):
                file.create_dataset(key, data=getattr(self, key).cpu().numpy(), compression="gzip")
            # D4RL readers expect rewards. Pre-training has none: SkiMo learns skills from task-agnostic data.
            file.create_dataset("rewards", data=np.zeros(len(self), dtype=np.float32), compression="gzip")
            file.attrs.update(self.attributes)

        write_atomically(path, lambda part: part.write_bytes(image.getbuffer()))

    @classmethod
    def load(cls, path, device="cpu") -> "OfflineDataset":
        """Read a D4RL file (`rewards` are not needed). Raises DataError if it is missing, damaged or does not fit."""
        path = Path(path)
        cure = "delete it, so that it is made again, or give other data"
        if not path.is_file():
            raise DataError(f"{path} does not exist: check the path.")
        try:
            with h5py.File(path, "r") as file:
                attributes = {key: _plain(value) for key, value in file.attrs.items()}
                keys = ("observations", "actions", "terminals", "timeouts")
                missing = [key for key in keys if not isinstance(file.get(key), h5py.Dataset)]
                if missing:
                    raise DataError(f"{path} has no {', '.join(missing)}: {cure}.")
                arrays = [file[key][()] for key in keys]
        except PermissionError as error:
            raise DataError(f"{path} may not be read: change its permissions or use another --data-dir.") from error
        except (OSError, RuntimeError, KeyError) as error:  # what h5py raises for files that are cut or overwritten
            raise DataError(f"{path} is not a complete HDF5 file: {cure}.") from error
        return cls(*arrays, attributes=attributes, device=device, name=str(path))


def _check(arrays, name):
    """Raise DataError unless the four arrays (by key) belong together and hold finite numbers."""
    cure = "delete it, so that it is made again, or give other data"
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{name}: {key} are not numbers ({array.dtype}): {cure}.")
        dimensions = 2 if key in ("observations", "actions") else 1
        if array.ndim != dimensions:
            raise DataError(f"{name}: {key} have shape {array.shape}, expected {dimensions} dimension(s): {cure}.")
        if not np.isfinite(array).all():
            raise DataError(f"{name}: {key} contain NaN or infinity: {cure}.")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{name}: the numbers of rows disagree, {lengths}: {cure}.")
    if any(array.size == 0 for array in arrays.values()):
        raise DataError(f"{name} is empty: {cure}.")


def _plain(value):
    """Return an HDF5 attribute as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


def cache_dir(data_dir=None) -> Path:
    """Return the folder of the data files: `data_dir`, else $SKIMO_DATA_DIR, else the user's cache folder."""
    return Path(data_dir or os.environ.get("SKIMO_DATA_DIR") or platformdirs.user_cache_dir("skimo")).expanduser()


NOISE = {"maze": 0.5, "kitchen": 0.05, "calvin": 0.25}  # of scripted data: the size of their disturbances by task


def load_dataset(
    task: str,
    data_dir=None,
    dataset: str = "auto",
    data=None,
    noise: float | None = None,
    allow_pickle: bool = False,
    accept_any_data: bool = False,
    seed: int = 0,
    device="cpu",
    progress: bool = True,
) -> OfflineDataset:
    """Return the offline data of `task`: maze, kitchen (of both kitchen tasks) or calvin.

    data: a file or folder in one of the formats of data_tools.sources; else
    dataset "scripted": made on first use, then kept in `cache_dir(data_dir)`; "d4rl", kitchen only: D4RL's file, from
    the cache or the network; "auto": D4RL's file where there is one and it can be had, else scripted.
    noise is the size of the disturbances in scripted data (None: NOISE[task]), seed their random seed. Processes that
    start together make the file once: one collects, the others wait for it. Raises DataError.
    """
    if task not in NOISE:
        raise DataError(f"There are no data for task {task!r}; known tasks: {', '.join(NOISE)}.")
    if data is not None:
        from data_tools import sources  # builds on this module

        return sources.read_data(task, data, allow_pickle=allow_pickle, accept_any_file=accept_any_data).to(device)
    if dataset == "d4rl" and task != "kitchen":
        raise DataError(f"D4RL has no data for {task}: use --dataset auto or scripted.")
    if dataset != "scripted" and task == "kitchen":
        from data_tools import sources

        try:
            path = sources.fetch_d4rl_kitchen(cache_dir(data_dir), accept_any_file=accept_any_data, progress=progress)
            return sources.read_data(task, path, accept_any_file=accept_any_data).to(device)
        except sources.Unreachable as error:
            if dataset == "d4rl":
                raise
            print(f"NOTE: {error}\nNOTE: goes on with SCRIPTED demonstrations instead of D4RL's", flush=True)
    scripted = _scripted(task, cache_dir(data_dir), NOISE[task] if noise is None else noise, seed, progress)
    if task == "kitchen":
        scripted.observations = scripted.observations[
            :, :30
        ].contiguous()  # without the constant goal, as SkiMo uses it
    return scripted.to(device)


def _scripted(task: str, folder: Path, noise: float, seed: int, progress: bool) -> OfflineDataset:
    """Read scripted data, after making them if need be."""
    path = folder / f"{task}_noise{float(noise)}_seed{seed}_v1.hdf5"
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(f"{path}.lock")
            lock.acquire()
        except OSError as error:
            raise DataError(
                f"Could not write to {path.parent} ({error.strerror}): "
                "choose another folder with --data-dir or SKIMO_DATA_DIR."
            ) from error
        try:
            if not path.exists():  # nobody else made it while we waited
                for leftover in path.parent.glob(f"part_*_{path.name}"):  # of a process that was killed while writing
                    leftover.unlink(missing_ok=True)
                # Imported here because the tasks' modules build on this one, and reading a file needs no simulator.
                collect = importlib.import_module(f"data_tools.{task}").collect
                print(f"Collecting the {task} data (noise {noise}, seed {seed}), once, into {path}", flush=True)
                collect(noise=noise, seed=seed, progress=progress).save(path)
        finally:
            lock.release()
    return OfflineDataset.load(path)
