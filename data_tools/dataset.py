"""Offline trajectories for pre-training: one HDF5 file per data set, all of it in memory on one device.

File layout is that of D4RL (https://arxiv.org/abs/2004.07219): flat arrays `observations (R, O)`, `actions (R, A)`,
`rewards (R,)`, `terminals (R,)`, `timeouts (R,)`; row t holds the state *before* action t.
Shapes: R rows, M episodes, B batch, O observation, A action.
"""

import contextlib
import copy
import hashlib
import io
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from data_tools.files import AGAIN, CURE, DataError, check_regular, listed, locked, reading, write_atomically

KEYS = ("observations", "actions", "terminals", "timeouts")
LARGEST = 1e6  # an observation or action beyond this is damage
MAX_BYTES = 2**34  # of all arrays of a file; all real ones are below 2**30


class OfflineDataset:
    """Episodes in flat tensors on one device.

    observations (R, O) float32, actions (R, A) float32, terminals (R,) bool, timeouts (R,) bool;
    episode_starts (M,) int64 is the first row of each episode, episode_lengths (M,) int64 its number of rows.
    An episode ends at a terminal or a timeout; rows after the last flag form an episode too.
    `attributes` says how the data were made, `fingerprint` is a hash of the content (for checkpoints and logs).
    """

    def __init__(self, observations, actions, terminals, timeouts, attributes=None, device="cpu", name="the data"):
        """Take array-likes of the shapes above. Raises DataError, which calls the data `name`, if they do not fit."""
        arrays = {key: np.asarray(x) for key, x in zip(KEYS, (observations, actions, terminals, timeouts))}
        check_arrays(arrays, name)
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
        self._pairs = {}  # window -> of each row, how many later ones there are within it, and their running sum

    @classmethod
    def from_episodes(cls, episodes, attributes=None) -> "OfflineDataset":
        """Join [(obs (T, O), actions (T, A), done), ...]; their last rows are terminals if done, else timeouts.

        A last observation, which no action follows, is left out: obs may have T + 1 rows. So are empty episodes.
        Raises DataError.
        """
        episodes = [episode for episode in episodes if len(episode[1])]
        if not episodes or any(len(obs) - len(actions) not in (0, 1) for obs, actions, _ in episodes):
            raise DataError("episodes need rows, and an observation for each action, or one more.")
        lengths = [len(actions) for _, actions, _ in episodes]
        done = np.array([done for _, _, done in episodes], dtype=bool)
        last_rows = np.cumsum(lengths) - 1
        terminals, timeouts = np.zeros((2, sum(lengths)), dtype=bool)
        terminals[last_rows] = done
        timeouts[last_rows] = ~done
        observations = np.concatenate([obs[:length] for (obs, _, _), length in zip(episodes, lengths)])
        actions = np.concatenate([actions for _, actions, _ in episodes])
        return cls(observations, actions, terminals, timeouts, attributes)

    def __len__(self):
        """Return the number of rows R."""
        return len(self.observations)

    def __repr__(self):
        return f"OfflineDataset({len(self.episode_starts)} episodes, {len(self)} rows, fingerprint {self.fingerprint})"

    @property
    def source(self) -> str:
        """Return the short name of where the data come from: scripted, d4rl, skimo-release, calvin, hdf5, ..."""
        return str(self.attributes.get("source", "scripted"))

    @property
    def device(self) -> torch.device:
        return self.observations.device

    def to(self, device) -> "OfflineDataset":
        """Return the data set on `device`; this one stays as it is."""
        moved = copy.copy(self)
        moved._windows = {}
        moved._pairs = {}
        for key in (*KEYS, "episode_starts", "episode_lengths"):
            setattr(moved, key, getattr(self, key).to(device))
        return moved

    def narrowed(self, obs_dim: int) -> "OfflineDataset":
        """Return the data with the first `obs_dim` numbers of each observation; the fingerprint stays the file's."""
        narrowed = copy.copy(self)
        narrowed.observations = self.observations[:, :obs_dim].contiguous()
        return narrowed

    def share(self, share: float) -> "OfflineDataset":
        """Return this share of the episodes, at least one: the first of a fixed permutation. Of all, the data as is.

        So a smaller share is a part of a larger one. The fingerprint is that of what is left.
        """
        if share == 1:
            return self
        lengths = self.episode_lengths.tolist()
        chosen = np.random.default_rng(0).permutation(len(lengths))[: max(round(share * len(lengths)), 1)]
        obs, actions, ended = (x.cpu().split(lengths) for x in (self.observations, self.actions, self.terminals))
        episodes = [(obs[i], actions[i], bool(ended[i][-1])) for i in chosen]
        return OfflineDataset.from_episodes(episodes, self.attributes).to(self.device)

    def split(self, fraction: float = 0.99, length: int = 1) -> tuple["OfflineDataset", "OfflineDataset"]:
        """Return (train, validation): the first `fraction` of the episodes in file order, and the rest.

        Only episodes of at least `length` rows count, and each side has one; says so if a tenth are shorter. Raises
        DataError if there are fewer than two.
        """
        lengths = self.episode_lengths
        usable = (lengths >= length).nonzero().flatten()  # numbers of the episodes
        found = f"{len(usable):,} of {len(lengths):,} episodes have the {length:,} rows of a window"
        if len(usable) < 2:
            raise DataError(f"{found}, the longest has {int(lengths.max()):,}: use at least two, or shorter windows.")
        if len(usable) < 0.9 * len(lengths):
            print(f"{found}; the others are left out", flush=True)
        cut = int(usable[min(max(int(fraction * len(usable)), 1), len(usable) - 1)])
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
        `generator` must live on the data set's device. Nothing here waits for the device.
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

    def sample_pairs(
        self, batch_size: int, window: int, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw pairs of rows t and t + w of one episode, w = 1..window: returns t (B,) and w (B,).

        Uniform over all such pairs: a goal for the action of row t is any state that was reached soon after it.
        Nothing here waits for the device once the first call for a `window` has built its table.
        Raises DataError if no episode has two rows.
        """
        if window not in self._pairs:
            ends = (self.episode_starts + self.episode_lengths).repeat_interleave(self.episode_lengths)  # (R,)
            later = (ends - 1 - torch.arange(len(self), device=self.device)).clamp(max=window)  # (R,)
            if window < 1 or not later.any():
                raise DataError(f"{self!r} has no two rows of an episode that are at most {window} steps apart.")
            self._pairs[window] = later, later.cumsum(0), int(later.sum())
        later, total, num_pairs = self._pairs[window]
        pair = torch.randint(num_pairs, (batch_size,), generator=generator, device=self.device)  # (B,)
        row = torch.searchsorted(total, pair, right=True)
        return row, total[row] - pair

    def save(self, path) -> None:
        """Write the D4RL file `path`. An existing file is replaced in one step, or left intact if anything fails.

        Raises DataError if the file cannot be written (disk full, folder read-only).
        """
        # Built in memory first: HDF5 cannot close a file cleanly once the disk is full.
        image = io.BytesIO()
        with h5py.File(image, "w") as file:
            for key in KEYS:
                file.create_dataset(key, data=getattr(self, key).cpu().numpy(), compression="gzip")
            # D4RL readers expect rewards. Pre-training has none: SkiMo learns skills from task-agnostic data.
            file.create_dataset("rewards", data=np.zeros(len(self), dtype=np.float32), compression="gzip")
            file.attrs.update(self.attributes)

        write_atomically(path, lambda part: part.write_bytes(image.getbuffer()))

    @classmethod
    def load(cls, path) -> "OfflineDataset":
        """Read a D4RL file (`rewards` are not needed). Raises DataError if it is missing, damaged or does not fit."""
        arrays, attributes = read_hdf5(path)
        dataset = cls(**arrays, attributes=attributes, name=str(path))
        check_not_zero(dataset, str(path))
        return dataset


def read_hdf5(path) -> tuple[dict[str, np.ndarray], dict]:
    """Return the arrays (by KEYS) and the attributes of a file in D4RL's layout, as they are: unchecked.

    Of `terminals` and `timeouts` one may be missing: it is never set. Raises DataError if the file is missing, damaged,
    or of another layout.
    """
    path = Path(path)
    check_regular(path)
    with reading(path), h5py.File(path, "r") as file:
        attributes = {key: _plain(value) for key, value in file.attrs.items()}
        present = [key for key in KEYS if isinstance(file.get(key), h5py.Dataset)]
        missing = [key for key in KEYS[:2] if key not in present]
        if not set(present) & set(KEYS[2:]):
            missing.append("terminals or timeouts")
        if missing:
            raise DataError(f"{path} has {listed(file)}, but no {', no '.join(missing)}: {CURE}.")
        size = sum(file[key].nbytes for key in present)
        if size > MAX_BYTES:  # a damaged header; reading would fill the memory with nothing
            raise DataError(f"{path} is too large, it announces {size:,} bytes of data: {AGAIN}.")
        arrays = {key: np.asarray(file[key][()]) for key in present}
    never = np.zeros(arrays["actions"].shape[:1], dtype=bool)
    return {key: arrays.get(key, never) for key in KEYS}, attributes


def check_arrays(arrays: dict[str, np.ndarray], name: str) -> None:
    """Raise DataError, which calls the data `name`, unless the arrays (by KEYS) can be offline data, of any task."""

    def require(condition, problem):
        if not condition:
            raise DataError(f"{name}: {problem}: {CURE}.")

    for key, array in arrays.items():
        dimensions = 2 if key in ("observations", "actions") else 1
        require(array.ndim == dimensions, f"{key} have shape {array.shape}, expected {dimensions} dimension(s)")
        require(array.size > 0, f"{key} are empty, shape {array.shape}")
    lengths = {key: len(array) for key, array in arrays.items()}
    require(len(set(lengths.values())) == 1, f"the numbers of rows disagree, {lengths}")
    for key in ("observations", "actions"):
        array = arrays[key]
        require(array.dtype.kind == "f", f"{key} are {array.dtype}, expected floating-point numbers")
        finite = np.isfinite(array).all(axis=1)
        require(finite.all(), f"{key} contain NaN or infinity, first in row {finite.argmin():,}")
        largest = float(np.abs(array).max())
        require(largest <= LARGEST, f"{key} reach {largest:.3g}, which cannot be")
    for key in ("terminals", "timeouts"):
        array = arrays[key]
        flags = array.dtype.kind in "biuf" and np.isin(array, (0, 1)).all()
        require(flags, f"{key} are {array.dtype}, expected True and False, or 1 and 0")


def check_not_zero(dataset: OfflineDataset, name: str) -> None:
    """Raise DataError for a file, called `name`, of zeros only. A part of good data may be that: whoever rests."""
    for key in ("observations", "actions"):
        if not getattr(dataset, key).any():
            raise DataError(f"{name}: {key} are all zero: {CURE}.")
    last = slice(int(dataset.episode_starts[-1]), None)
    if not (dataset.observations[last].any() or dataset.actions[last].any()):
        raise DataError(f"{name}: the last episode is all zero, so the file was not written to its end: {AGAIN}.")


def _plain(value):
    """Return an HDF5 attribute as a plain Python value."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return value


def made_once(path, make: Callable[[], OfflineDataset]) -> OfflineDataset:
    """Read the data file `path`, after `make()` has made the data if need be.

    Processes that start together make them once: one does, the others wait for it. Raises DataError.
    """
    path = Path(path)
    if not os.path.exists(path):  # pathlib's raises an error in a folder that may not be entered
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = locked(path)
        except OSError as error:
            cure = "choose another folder with --data-dir or SKIMO_DATA_DIR"
            raise DataError(f"cannot write to {path.parent} ({error.strerror}): {cure}.") from error
        with lock:
            if not path.exists():  # nobody else made it while we waited
                leftovers = f"part_{'?' * 32}_{path.name}"  # of processes that were killed while writing
                for leftover in path.parent.glob(leftovers):
                    with contextlib.suppress(OSError):  # another user's
                        leftover.unlink()
                print(f"Making the data, once: {path}", flush=True)
                made = make()
                made.save(path)
                if (largest := float(made.actions.abs().max())) > 1.001:
                    print(f"note: actions reach {largest:.2f}, beyond the [-1, 1] of the policies", flush=True)
    try:
        return OfflineDataset.load(path)
    except DataError as error:
        found = str(error).removesuffix(f": {AGAIN}.").removesuffix(f": {CURE}.")
        if found == str(error):  # it is sound, but may not be read now
            raise
        raise DataError(f"{found}: delete it; data_tools made it, and makes it again.") from error
