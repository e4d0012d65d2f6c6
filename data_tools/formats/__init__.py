"""Readers of files that others made, whatever `--data PATH` names; nothing here knows tasks or scripts.

The format is recognised by content, not by name:
- d4rl.py: HDF5 in D4RL's layout, which is also that of our own files
- skimo_release.py: the archives of the SkiMo release (maze.gz, kitchen.gz, calvin.gz)
- minari.py: the folder of a kitchen data set of Minari
- calvin.py: the extracted folder of CALVIN's recordings

download.py fetches published files.
"""

import os
from pathlib import Path

import pooch

from data_tools.dataset import OfflineDataset, check_not_zero, made_once
from data_tools.files import CURE, DataError, check_regular, listed, reading
from data_tools.formats import calvin, d4rl, download, minari, skimo_release

EXPECTED = "an HDF5 file in D4RL's layout, an archive of the SkiMo release, the folder of a Minari data set, or"
EXPECTED += f" CALVIN's extracted folder task_D_D; {CURE}"
LARGEST_ACTION = 1.5  # policies act within [-1, 1]; what is a little beyond can still be learned from


def read_data(
    path, obs_dim: int, action_dim: int, data_obs_dim: int | None = None, progress: bool = True, facts=None
) -> OfflineDataset:
    """Read the data that `--data PATH` names for a task with O and A numbers, and print what they are.

    data_obs_dim: the file's observations may also have this many numbers; then those after the first O are left out.
    facts: what the task knows of its observations, see `check_values`.
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
        found = f"{path} has {sizes[0]} numbers per observation and {sizes[1]} per action"
        also = f" ({data_obs_dim} are read, too: the first {obs_dim} of them)" if data_obs_dim else ""
        cure = f"cut them; {minari.HINT}" if (sizes[0], obs_dim) == (59, 30) else "give data of this task"
        raise DataError(f"{found}, the task has {obs_dim} and {action_dim}{also}: {cure}.")
    check_values(dataset, facts, str(path))
    notes = [attributes["note"]] if "note" in attributes else []
    if path.is_file() and not d4rl.SOURCES[attributes["source"]][1]:
        notes.append(f"SHA-256 {pooch.file_hash(path)}")
    size = f"{len(dataset.episode_starts):,} episodes, {len(dataset):,} steps"
    print("; ".join([f"Data: {attributes['description']} from {path}: {size}", *notes]), flush=True)
    return dataset


def check_values(dataset: OfflineDataset, facts, name: str) -> None:
    """Compare data, called `name`, with what their task knows: equal widths are no proof. Prints what looks wrong.

    facts: function of observations (R, O): what -> (values (n,), lowest, highest), or None. Raises DataError where
    nearly all values of one lie outside, as other numbers stand there then, and for actions far beyond [-1, 1].
    """
    largest = float(dataset.actions.abs().max())
    if largest > LARGEST_ACTION:
        raise DataError(f"{name}: actions reach {largest:.3g}: scale actions to [-1, 1], the range of the policies.")
    if largest > 1.001:
        print(f"warning: actions reach {largest:.3g}, beyond the [-1, 1] of the policies: {name}", flush=True)
    elif largest < 0.1:
        print(f"warning: actions reach only {largest:.3g}: are they scaled to [-1, 1]? {name}", flush=True)
    problems = []
    for what, (values, low, high) in facts(dataset.observations.numpy()).items() if facts else ():
        share = float(((values < low) | (values > high)).mean())
        if share > 0.01:
            found = f"{values.min():.3g} to {values.max():.3g}" if len(values) > 1 else f"{values[0]:.3g}"
            problems.append((share, f"{what} is {found}, expected {low:.3g} to {high:.3g} ({share:.0%} are not)"))
    problems.sort(reverse=True)
    text = "; ".join(problem for _, problem in problems[:3])
    text += f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    if problems and problems[0][0] > 0.99:
        raise DataError(f"{name} has other observations than the task: {text}: {CURE}.")
    if problems:
        print(f"warning: are these the task's observations? {text}: {name}", flush=True)


def fetch_release(drive_id: str, path: Path, read, progress=True) -> Path:
    """Return our own HDF5 file beside `path`, made once with `read` from the authors' archive, fetched to `path`."""
    written = path.with_name(f"release_{path.stem}.hdf5")
    if path.exists() or not written.exists():
        download.fetch(download.DRIVE + drive_id, path, None, progress, drive=True)

    def make():
        data = read(path)
        download.write_note(path)  # of a whole archive
        return data

    made_once(written, make)
    return written


def _read(path, progress):
    """Return arrays (by KEYS) and attributes of a file or folder."""
    with reading(path):
        folder = minari.folder_of(path)
    if folder is not None:
        return minari.read(folder)
    if os.path.isdir(path):  # pathlib's raises an error in a folder that may not be entered
        if calvin.is_calvin(path):
            return calvin.read(path, progress)
        with reading(path):
            found = listed(sorted(os.listdir(path)))
        raise DataError(f"--data {path} holds no data that we know, but {found}; expected was {EXPECTED}.")
    check_regular(path)
    with reading(path):
        with open(path, "rb") as file:
            is_hdf5 = file.read(8) == b"\x89HDF\r\n\x1a\n"
        with skimo_release.opened(path) as file:
            head = file.read(8)  # of the content, if it is compressed
    if is_hdf5:
        return d4rl.read(path)
    if head[:1] == b"\x80":  # every pickle since Python 2.3
        return skimo_release.read(path)
    begins = f"its content begins with {head!r}" if head else "it is empty"
    raise DataError(f"--data {path} is in no format that we know, {begins}; expected was {EXPECTED}.")
