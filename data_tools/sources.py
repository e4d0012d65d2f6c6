"""Offline data of others: D4RL's kitchen file from its server, and whatever `--data PATH` names.

The format is recognised by content, not by name:
- all tasks: HDF5 in D4RL's layout (what OfflineDataset.save writes, too); the SkiMo release's pickle, on request
- kitchen: a Minari data set (its folder or main_data.hdf5)
- maze: SPiRL roll-outs (rollout_N.h5, a file or a folder of them)
- calvin: the extracted CALVIN folder; its numbers alone as text tables (D-training.tsv.gz, ...); cut .h5 files

Shapes: R rows, T steps of an episode, O observation, A action, F frames.

    python -m data_tools.sources --task calvin --data task_D_D --out calvin.hdf5    # 611,099 small files, read once
"""

import gzip
import itertools
import json
import pickle
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import tyro
from tqdm import tqdm

from data_tools.dataset import OfflineDataset, cache_dir
from data_tools.download import Unreachable, download, sha256_of
from data_tools.files import DataError

DIMENSIONS = {"maze": (4, 2), "kitchen": (30, 9), "kitchen-misaligned": (30, 9), "calvin": (21, 7)}  # O, A
# Wider observations whose first O numbers are the task's: D4RL's kitchen with its goal block, CALVIN with its blocks.
WIDER = {"kitchen": 60, "kitchen-misaligned": 60, "calvin": 39}
EXPECTED = {
    "maze": "an HDF5 file in D4RL's layout, a folder of SPiRL roll-outs (rollout_N.h5) or SkiMo's maze.gz",
    "kitchen": "D4RL's HDF5 file, a Minari data set (its folder, with data/main_data.hdf5) or SkiMo's kitchen.gz",
    "calvin": "the extracted CALVIN folder task_D_D (with training/ep_start_end_ids.npy), the text tables "
    "D-training.tsv and D-validation.tsv, an HDF5 file in D4RL's layout or SkiMo's calvin.gz",
}

KITCHEN_URL = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
)
KITCHEN_SIZE = 19_560_760  # bytes
KITCHEN_SHA256 = "a30382a50278fdaea2e2d88e5f2836a95bcf9b581d252617872fd6537302721b"
# Sums of D4RL's kitchen files, as stated by third parties: name, source, SHA-256.
D4RL_KITCHEN = {
    KITCHEN_SHA256: ("D4RL kitchen-mixed-v0", "d4rl"),
    "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800": ("D4RL kitchen-partial-v0", "d4rl-partial"),
    "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81": ("D4RL kitchen-complete-v0", "d4rl-complete"),
}

KEYS = ("observations", "actions", "terminals", "timeouts")
# What h5py raises for files that are cut or overwritten, or that have something else under a name.
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError)


def fetch_d4rl_kitchen(
    data_dir=None, accept_any_file: bool = False, url: str = KITCHEN_URL, progress: bool = True
) -> Path:
    """Return D4RL's kitchen-mixed-v0 HDF5 file in `cache_dir(data_dir)`, which is fetched if it is not there.

    Raises Unreachable if the server does not deliver, DataError if the file is not the published one (unless
    `accept_any_file`) or cannot be written.
    """
    path = cache_dir(data_dir) / KITCHEN_URL.rpartition("/")[2]
    try:
        return download(url, path, KITCHEN_SIZE, KITCHEN_SHA256, accept_any_file, progress)
    except Unreachable as error:
        raise Unreachable(
            f"{str(error).rstrip('.')}: try again later, fetch the file by hand and give it with --data PATH, "
            "or use --dataset scripted."
        ) from error


def read_data(
    task: str,
    path,
    allow_pickle: bool = False,
    accept_any_file: bool = False,
    progress: bool = True,
    device="cpu",
) -> OfflineDataset:
    """Read the data that `--data PATH` names, whatever their format (table above), and print what they are.

    Observations come out as the task's (maze 4, kitchen 30, calvin 21 numbers). attributes["source"] is a short name
    for run names: d4rl (d4rl-partial, -complete, -unverified), minari, skimo-release, spirl, calvin, scripted, hdf5.
    `allow_pickle` admits a pickle, `accept_any_file` a file whose checksum or maze is another than expected.
    Raises DataError if nothing of the task can be read from `path`, or what is there is damaged or incomplete.
    """
    path = Path(path).expanduser()
    if task not in DIMENSIONS:
        raise DataError(f"There are no data for task {task!r}; known tasks: {', '.join(DIMENSIONS)}.")
    if path.is_dir():
        arrays, attributes = _read_folder(task, path, accept_any_file, progress)
    elif path.is_file():
        arrays, attributes = _read_file(task, path, allow_pickle, accept_any_file, progress)
    else:
        raise DataError(f"--data {path} does not exist; expected was {EXPECTED[_short(task)]}.")
    _fit(task, path, arrays)
    if task == "maze" and not accept_any_file:
        _check_walls(path, arrays["observations"])

    dataset = OfflineDataset(**arrays, attributes=attributes, device=device, name=str(path))
    notes = [attributes["note"]] if "note" in attributes else []
    largest = float(np.abs(arrays["actions"]).max())
    if largest > 1.001:
        notes.append(f"actions reach {largest:.2f}, beyond the [-1, 1] of the policies")
    print(
        f"Data: {attributes['description']} from {path}: {len(dataset.episode_starts):,} episodes, "
        f"{len(dataset):,} steps{''.join(f'; {note}' for note in notes)}",
        flush=True,
    )
    return dataset


def _short(task):
    """Return the task that shares its data: both kitchens are one."""
    return task.removesuffix("-misaligned")


def _read_folder(task, path, accept_any_file, progress):
    """Return arrays by KEYS and attributes of a folder, recognised by the files in it."""
    for file in (path / "data" / "main_data.hdf5", path / "main_data.hdf5"):
        if file.is_file():
            return _read_hdf5(task, file, accept_any_file, progress)
    if any((path / name / "ep_start_end_ids.npy").is_file() for name in ("", "training", "validation")):
        return _read_calvin_folder(task, path, accept_any_file, progress)
    tables = [path / f"D-{part}.tsv{suffix}" for part in ("training", "validation") for suffix in ("", ".gz")]
    tables = [table for table in tables if table.is_file()]
    if tables:
        return _read_tables(task, tables, progress)
    files = sorted(path.rglob("*.h5"), key=lambda file: [int(n) for n in re.findall(r"\d+", file.name)])
    if files:
        return _read_rollouts(sorted(files, key=lambda file: file.parent), progress)
    reason = "holds no data that we know"
    if (path / "data" / "metadata.json").is_file():
        reason = "is a Minari data set without data/main_data.hdf5 (only its HDF5 format can be read)"
    elif any(path.glob("episode_*.npz")):
        reason = "has frames of CALVIN but no ep_start_end_ids.npy, which says where the recordings end"
    raise DataError(f"--data {path} {reason}; expected was {EXPECTED[_short(task)]}.")


def _read_file(task, path, allow_pickle, accept_any_file, progress):
    """Return arrays by KEYS and attributes of a file, recognised by its first bytes."""
    try:
        with _open(path) as file:
            head = file.read(2**16)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or incomplete, or may not be read ({error}).") from error
    if head[:8] == b"\x89HDF\r\n\x1a\n":
        return _read_hdf5(task, path, accept_any_file, progress)
    if head[:1] == b"\x80":  # the first byte of every pickle since Python 2.3's protocol 2
        if not allow_pickle:
            raise DataError(
                f"{path} is a pickle, a format that can hold programs: give --allow-pickle if you want it read "
                "(with NumPy arrays and plain values only, everything else is refused)."
            )
        return _read_pickle(path)
    if len(head.split(b"\n")[0].split(b"\t")) == TABLE_COLUMNS:
        return _read_tables(task, [path], progress)
    reason = "is neither an HDF5 file nor a pickle nor a table of CALVIN's numbers"
    if path.suffix in (".hdf5", ".h5"):
        reason = "is not an HDF5 file (a broken download?)"
    elif head[:4] == b"PK\x03\x04":
        reason = "is a zip archive, which has to be extracted first"
    raise DataError(f"--data {path} {reason}; expected was {EXPECTED[_short(task)]}.")


def _open(path):
    """Open a file for reading bytes, those of the content if it is compressed with gzip."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


# -------------------------------------------------------------------------------------------------- checks and assembly


def _fit(task, path, arrays):
    """Cut the observations to those of the task, in place. Raises DataError if the arrays are no data of the task."""
    wanted = dict(zip(("observations", "actions"), DIMENSIONS[task]))
    for key, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {key} are not numbers ({array.dtype}).")
        if array.ndim != (2 if key in wanted else 1):
            raise DataError(
                f"{path}: {key} have shape {array.shape}, expected {2 if key in wanted else 1} dimension(s)."
            )
    if arrays["observations"].shape[1] == WIDER.get(task):
        arrays["observations"] = arrays["observations"][:, : DIMENSIONS[task][0]]
    for key, width in wanted.items():
        if arrays[key].shape[1] != width:
            also = f" (or {WIDER[task]})" if key == "observations" and task in WIDER else ""
            raise DataError(
                f"{path} is no data of {task}: {key} have {arrays[key].shape[1]} numbers, expected {width}{also}."
            )
        bad = np.flatnonzero(~np.isfinite(arrays[key]).all(axis=1))
        if len(bad):
            raise DataError(f"{path}: {key} contain NaN or infinity, first in row {bad[0]:,} ({len(bad):,} rows).")
    lengths = {key: len(array) for key, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{path}: the numbers of rows disagree, {lengths}.")
    if lengths["actions"] == 0:
        raise DataError(f"{path} is empty.")
    if not (arrays["terminals"].any() or arrays["timeouts"].any()):
        raise DataError(f"{path}: neither terminals nor timeouts are ever set, so where episodes end is unknown.")


def _check_walls(path, observations):
    """Raise DataError if the positions are those of another maze: SPiRL published roll-outs of thousands of them."""
    from data_tools.maze import cell_of, make_layout  # reading other data needs no simulator

    cells = cell_of(observations)  # (R, 2)
    share = make_layout()[cells[:, 0], cells[:, 1]].mean()
    if share > 0.01:
        raise DataError(
            f"{path} comes from another maze: {share:.0%} of its positions are inside the walls of this task's maze; "
            "accept it with --accept-any-data if that is what you want."
        )


def _episode(where, observations, actions, dones):
    """Return one episode as (observations (T, O), actions (T, A), terminals (T,)), or None for fewer states than steps.

    A last observation without an action is left out. SkiMo's loader drops episodes with too few states as well.
    """
    observations, actions, dones = (np.asarray(x) for x in (observations, actions, dones))
    if observations.ndim != 2 or actions.ndim != 2 or dones.shape != actions.shape[:1]:
        raise DataError(
            f"{where} has observations {observations.shape}, actions {actions.shape} and ends {dones.shape}, "
            "expected (T, O), (T, A) and (T,)."
        )
    if len(observations) > len(actions) + 1:
        raise DataError(f"{where} has {len(observations)} observations for {len(actions)} actions.")
    if len(observations) < len(actions):
        return None
    return observations[: len(actions)], actions, dones.astype(bool)


def _join(path, episodes):
    """Return arrays by KEYS of episodes as returned by `_episode`, and how many of them were dropped."""
    kept = [episode for episode in episodes if episode is not None and len(episode[1])]
    if not kept:
        raise DataError(f"{path} has no episodes.")
    widths = {(obs.shape[1], actions.shape[1]) for obs, actions, _ in kept}
    if len(widths) > 1:
        raise DataError(f"{path}: the numbers per observation and action differ between episodes, {sorted(widths)}.")
    observations, actions, terminals = (np.concatenate(parts) for parts in zip(*kept))
    last_rows = np.cumsum([len(actions) for _, actions, _ in kept]) - 1
    timeouts = np.zeros(len(terminals), dtype=bool)
    timeouts[last_rows] = ~terminals[last_rows]
    return dict(zip(KEYS, (observations, actions, terminals, timeouts))), sum(x is None for x in episodes)


def _attributes(description, source, dropped=0):
    attributes = {"description": description, "source": source}
    if dropped:
        attributes["note"] = f"{dropped} episode(s) with fewer states than steps left out"
    return attributes


# -------------------------------------------------------------------------------------------- HDF5: D4RL, Minari, SPiRL


def _read_hdf5(task, path, accept_any_file, progress):
    """Return arrays by KEYS and attributes of an HDF5 file of one of the three layouts."""
    try:
        with h5py.File(path, "r") as file:
            if "episode_0" in file:
                return _read_minari(task, path, file, progress)
            if "traj0" not in file:
                return _read_d4rl(task, path, file, accept_any_file)
    except UNREADABLE as error:
        raise DataError(f"{path} is not a complete HDF5 file ({error}): fetch or copy it again.") from error
    return _read_rollouts([path], progress)


def _read_d4rl(task, path, file, accept_any_file):
    """Return arrays and attributes of a file in D4RL's layout: flat arrays, one row per step."""
    missing = [key for key in KEYS if not isinstance(file.get(key), h5py.Dataset)]
    if missing:
        raise DataError(f"{path} has no {', '.join(missing)}; expected was {EXPECTED[_short(task)]}.")
    arrays = {key: file[key][()] for key in KEYS}
    attributes = {key: value.tolist() if hasattr(value, "tolist") else value for key, value in file.attrs.items()}
    if "source" in attributes:  # written by OfflineDataset.save after we read it
        return arrays, {"description": f"{attributes['source']} data", **attributes}
    if str(attributes.get("generator", "")).startswith("data_tools."):
        return arrays, {"description": "scripted data", "source": "scripted", **attributes}
    if _short(task) != "kitchen" or arrays["observations"].shape[1:] != (60,):
        return arrays, {**attributes, **_attributes("data in D4RL's layout", "hdf5")}

    found = sha256_of(path)
    if found not in D4RL_KITCHEN and not accept_any_file:
        raise DataError(
            f"{path} is not D4RL's published kitchen-mixed-v0 file: it has SHA-256 {found}, expected was "
            f"{KITCHEN_SHA256}; fetch it again, or accept it with --accept-any-data."
        )
    description, source = D4RL_KITCHEN.get(found, ("D4RL kitchen data with an unknown checksum", "d4rl-unverified"))
    note = "split where terminals or timeouts are set"
    if source == "d4rl":
        note += " (the SkiMo paper says 603 episodes)"
    return arrays, _attributes(description, source) | {"note": note}


def _read_minari(task, path, file, progress):
    """Return arrays and attributes of a Minari file of the kitchen: one group per episode, T + 1 observations each.

    Minari's observation has 59 numbers: 9 joints, 9 joint velocities, 21 object positions, 20 object velocities.
    """
    metadata = dict(file.attrs)  # of Minari before 0.5; later a file of its own
    try:
        metadata |= json.loads((path.parent / "metadata.json").read_text())
    except FileNotFoundError:
        pass
    name = str(metadata.get("dataset_id", "a Minari data set without a name"))
    if _short(task) != "kitchen" or ("dataset_id" in metadata and "kitchen" not in name):
        raise DataError(f"{path} is {name}, which is no data of {task}; expected was {EXPECTED[_short(task)]}.")
    numbers = sorted(int(key.removeprefix("episode_")) for key in file if re.fullmatch(r"episode_\d+", key))
    expected = int(metadata.get("total_episodes", len(numbers)))
    if len(numbers) != expected:
        raise DataError(f"{path} has {len(numbers)} of the {expected} episodes that its metadata announce.")
    episodes = []
    for number in tqdm(numbers, desc=name, unit="episode", disable=not progress):
        group, where = file[f"episode_{number}"], f"{path}, episode {number},"
        observations = group["observations"]
        if isinstance(observations, h5py.Group):  # next to the goals
            observations = observations["observation"]
        observations = observations[()]
        if observations.ndim != 2 or observations.shape[1] != 59:
            raise DataError(f"{where} has observations {observations.shape}, the kitchen's are (T + 1, 59).")
        observations = np.concatenate([observations[:, 0:9], observations[:, 18:39]], axis=1)  # (T + 1, 30)
        episodes.append(_episode(where, observations, group["actions"][()], group["terminations"][()]))
        if episodes[-1] is None:
            raise DataError(f"{where} has {len(observations)} observations for {len(group['actions'])} actions.")
    arrays, _ = _join(path, episodes)
    variant = next((f"-{part}" for part in ("partial", "complete") if part in name), "")
    attributes = _attributes(f"Minari's {name}", f"minari{variant}")
    return arrays, attributes | {"note": "re-simulated, so not the data of the paper", "dataset_id": name}


def _read_rollouts(files, progress):
    """Return arrays and attributes of SPiRL's roll-outs: groups traj0, ... of states, actions and pad_mask.

    pad_mask is 1 up to the end of an episode. SkiMo's own cuts of CALVIN, which were not published, look the same.
    """
    episodes = []
    for path in tqdm(files, desc="roll-outs", unit="file", disable=not progress):
        try:
            with h5py.File(path, "r") as file:
                for number in itertools.count():
                    if f"traj{number}" not in file:
                        break
                    group, where = file[f"traj{number}"], f"{path}, traj{number},"
                    states, actions, pad_mask = (group[key][()] for key in ("states", "actions", "pad_mask"))
                    ends = np.flatnonzero(pad_mask == 0)
                    steps = ends[0] + 1 if len(ends) else len(actions)  # what follows the first end is padding
                    episodes.append(_episode(where, states[:steps], actions[:steps], pad_mask[:steps] == 0))
                expected = int(file["traj_per_file"][()]) if "traj_per_file" in file else max(number, 1)
            if number != expected:
                raise DataError(f"{path} has {number} of {expected} trajectories: it is damaged, or no roll-out file.")
        except UNREADABLE as error:
            raise DataError(f"{path} is not a complete roll-out file ({error}): copy or extract it again.") from error
    arrays, dropped = _join(files[0].parent, episodes)
    return arrays, _attributes("SPiRL roll-outs", "spirl", dropped)


# ------------------------------------------------------------------------------------------------------ SkiMo's pickles


def _read_pickle(path):
    """Return arrays and attributes of the SkiMo release's archive: a list of dict(obs, actions, dones)."""
    try:
        with _open(path) as file:
            content = _ArrayUnpickler(file).load()
    except _Refused as error:
        raise DataError(
            f"{path} asks for {error}, which is neither a NumPy array nor a plain value; nothing of it was run. "
            "Do not use this file."
        ) from None
    except (  # what a damaged pickle raises, by Python's documentation and by experience
        *(pickle.UnpicklingError, EOFError, zlib.error, OSError, MemoryError, OverflowError),
        *(AttributeError, IndexError, KeyError, TypeError, ValueError),
    ) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}): fetch or copy it again.") from error
    if not isinstance(content, list) or not all(
        isinstance(entry, dict) and {"obs", "actions", "dones"} <= entry.keys() for entry in content
    ):
        raise DataError(f"{path} is no archive of the SkiMo release: a list of dict(obs, actions, dones) was expected.")
    episodes = []
    for number, entry in enumerate(content):
        where = f"{path}, trajectory {number},"
        try:
            columns = [_array(entry[key]) for key in ("obs", "actions", "dones")]
        except (ValueError, TypeError) as error:
            raise DataError(f"{where} holds something else than arrays of numbers ({error}).") from error
        episodes.append(_episode(where, *columns))
    arrays, dropped = _join(path, episodes)
    return arrays, _attributes("archive of the SkiMo release", "skimo-release", dropped)


class _Refused(pickle.UnpicklingError):
    """A pickle asks for something that is not on the list."""


class _DType:
    """Stands for a pickled np.dtype: plain numbers only."""

    def __init__(self, code, *_):
        if not isinstance(code, str) or not re.fullmatch(r"[biuf]\d{1,2}", code):
            raise _Refused(f"an array of {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1]) if state[1] in ("<", ">") else self.dtype


class _Array:
    """Stands for a pickled array, rebuilt from its bytes: no function of NumPy gets arguments of the file's choice."""

    def __init__(self, *_):
        self.array = None

    def __setstate__(self, state):
        _, shape, dtype, by_columns, content = state
        self.array = _numbers(content, dtype).reshape(shape, order="F" if by_columns else "C")

    @classmethod
    def from_buffer(cls, content, dtype, shape, order):
        """Make one from the arguments of NumPy's function for protocol 5."""
        made = cls()
        made.__setstate__((1, shape, dtype, order == "F", content))
        return made


def _numbers(content, dtype):
    """Return bytes as an array of one dimension; a copy, as the file could still change a bytearray."""
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"an array made of {type(content).__name__}")
    return np.frombuffer(bytes(content), dtype.dtype)


def _scalar(dtype, content):
    return _numbers(content, dtype)[0]


def _latin1(text, encoding):
    """Stand for codecs.encode, by which old protocols write bytes."""
    if encoding != "latin1":
        raise _Refused(f"the codec {encoding!r}")
    return text.encode("latin1")


ADMITTED = {
    ("numpy", "ndarray"): _Array,  # only as an argument of _reconstruct
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
}
for kind in (list, dict, tuple, set, frozenset, bytearray, bytes, str, complex, int, float, bool):
    ADMITTED["builtins", kind.__name__] = ADMITTED["__builtin__", kind.__name__] = kind  # the latter up to protocol 2
for numpy_core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
    ADMITTED[f"{numpy_core}.multiarray", "_reconstruct"] = _Array
    ADMITTED[f"{numpy_core}.multiarray", "scalar"] = _scalar
    ADMITTED[f"{numpy_core}.numeric", "_frombuffer"] = _Array.from_buffer


class _ArrayUnpickler(pickle.Unpickler):
    """Reads arrays of numbers, lists, dicts and plain values; imports nothing, whatever the pickle asks for."""

    def find_class(self, module, name):
        if (module, name) not in ADMITTED:
            raise _Refused(f"{module}.{name}")
        return ADMITTED[module, name]


def _array(value):
    """Return what was unpickled as an array: an array, a number, or nested lists of them."""
    if isinstance(value, _Array):
        if value.array is None:
            raise ValueError("an array without content")
        return value.array
    if isinstance(value, list | tuple):
        return np.asarray([_array(x) for x in value])
    if not isinstance(value, bool | int | float | np.generic):
        raise TypeError(type(value).__name__)
    return np.asarray(value)


# --------------------------------------------------------------------------------------------------------------- CALVIN

# The paper has 1,239 trajectories, but not how they were cut. The 35 recordings of split D (training and validation),
# cut into pieces of 500 steps with the remainders kept, are exactly 1,239.
PIECE = 500
# First frame of each recording of split D; the tables do not say, and most recordings follow each other directly.
# From the folders' ep_start_end_ids.npy as printed in https://github.com/denizyuret/calvin-scripts.
RECORDING_STARTS = (
    *(0, 37683, 53819, 63234, 84216, 103126, 122177, 147554, 166339, 197178, 219635, 244285, 272719, 298926, 308070),
    *(331367, 342790, 349364, 358482, 361253, 370058, 381897, 399946, 420499, 438873, 465068, 477460, 497303, 517044),
    *(539755, 553567, 555242, 578258, 589067, 593879),
)
LAST_FRAME = 611_098  # of split D
FRAME_ARRAYS = {"rel_actions": 7, "robot_obs": 15, "scene_obs": 24}
TABLE_COLUMNS = 54  # frame, 7 actions, 7 rel_actions, 15 robot_obs, 24 scene_obs


def _read_calvin_folder(task, path, accept_any_file, progress):
    """Return arrays and attributes of extracted CALVIN frames: one npz per frame, of which only numbers are read."""
    _check_calvin(task, path)
    folders = [
        path / name for name in ("", "training", "validation") if (path / name / "ep_start_end_ids.npy").is_file()
    ]
    recordings = []  # (first frame, last frame, {frame: file})
    for folder in folders:
        ranges = _recordings_of(folder)
        files = {}
        for file in folder.iterdir():
            if match := re.fullmatch(r"episode_(\d+)\.npz", file.name):
                files[int(match[1])] = file
        missing = [n for first, last in ranges for n in range(first, last + 1) if n not in files]
        if missing:
            some = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            total = sum(last - first + 1 for first, last in ranges)
            raise DataError(
                f"{folder} lacks {len(missing):,} of the {total:,} frames that ep_start_end_ids.npy names "
                f"({some}): extract the archive again."
            )
        recordings += [(first, last, files) for first, last in ranges]
    recordings.sort(key=lambda recording: recording[0])
    if recordings[-1][1] > LAST_FRAME and not accept_any_file:
        raise DataError(
            f"{path} has frame {recordings[-1][1]}, but split D, whose scene is the task's, ends at {LAST_FRAME}: "
            "give the folder task_D_D, or accept other recordings with --accept-any-data."
        )
    frames = [files[n] for first, last, files in recordings for n in range(first, last + 1)]
    if len(frames) > 10_000:
        print(
            f"Reading {len(frames):,} small files; to do so only once, write them as one file: "
            f"python -m data_tools.sources --task calvin --data {path} --out calvin.hdf5",
            flush=True,
        )
    observations = np.empty((len(frames), 21), dtype=np.float32)
    actions = np.empty((len(frames), 7), dtype=np.float32)
    for row, file in enumerate(tqdm(frames, desc="CALVIN frames", unit="frame", disable=not progress)):
        try:
            with np.load(file, allow_pickle=False) as frame:
                numbers = {key: frame[key] for key in FRAME_ARRAYS}
        except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{file} is damaged or no CALVIN frame ({error}): extract it again.") from error
        for key, size in FRAME_ARRAYS.items():
            if numbers[key].shape != (size,) or numbers[key].dtype.kind != "f":
                found = f"{numbers[key].dtype} {numbers[key].shape}"
                raise DataError(f"{file}: {key} is {found}, expected were {size} floating-point numbers.")
            if not np.isfinite(numbers[key]).all():
                raise DataError(f"{file}: {key} contains NaN or infinity.")
        observations[row] = np.concatenate([numbers["robot_obs"], numbers["scene_obs"][:6]])
        actions[row] = numbers["rel_actions"]
    names = " and ".join(folder.name for folder in folders) if folders != [path] else path.name
    return _cut(observations, actions, [last - first + 1 for first, last, _ in recordings], names)


def _recordings_of(folder):
    """Return [(first frame, last frame), ...] from ep_start_end_ids.npy."""
    file = folder / "ep_start_end_ids.npy"
    try:
        ranges = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is damaged ({error}): extract it again.") from error
    if ranges.ndim != 2 or ranges.shape[1] != 2 or len(ranges) == 0 or ranges.dtype.kind not in "iu":
        raise DataError(f"{file} has shape {ranges.shape} ({ranges.dtype}), expected pairs of frame numbers.")
    if (ranges[:, 0] > ranges[:, 1]).any():
        raise DataError(f"{file} has a recording that ends before it starts.")
    return [(int(first), int(last)) for first, last in ranges]


def _read_tables(task, files, progress):
    """Return arrays and attributes of tables of CALVIN's numbers: tab-separated text, one line per frame.

    They are published at https://github.com/denizyuret/calvin-scripts (release v0.0.1) and spare the 166 GB archive.
    """
    _check_calvin(task, files[0])
    columns = [0, *range(8, 15), *range(15, 36)]  # frame, rel_actions, robot_obs and the first 6 of scene_obs
    blocks = []
    with tqdm(desc="CALVIN frames", unit="frame", disable=not progress) as bar:
        for path in files:
            try:
                with _open(path) as file:
                    while lines := list(itertools.islice(file, 10_000)):
                        if any(line.count(b"\t") != TABLE_COLUMNS - 1 for line in lines):
                            raise DataError(f"{path}: a line has other than {TABLE_COLUMNS} columns: fetch it again.")
                        blocks.append(np.loadtxt(lines, delimiter="\t", usecols=columns, ndmin=2))
                        bar.update(len(lines))
            except (OSError, ValueError, EOFError, zlib.error) as error:
                raise DataError(
                    f"{path} is damaged or no table of CALVIN's numbers ({error}): fetch it again."
                ) from error
    rows = np.concatenate(blocks)
    rows = rows[np.argsort(rows[:, 0], kind="stable")]
    frames = rows[:, 0].astype(int)
    where = " and ".join(str(file) for file in files)
    if frames[-1] > LAST_FRAME:
        raise DataError(
            f"{where} has frame {frames[-1]}, but split D, whose scene is the task's, ends at {LAST_FRAME}."
        )
    steps = np.diff(frames)
    if (steps == 0).any():
        raise DataError(f"{where} has frame {frames[np.argmin(steps)]} more than once.")
    starts = np.isin(frames, RECORDING_STARTS)
    starts[0] = True
    gaps = np.flatnonzero((steps > 1) & ~starts[1:])
    if len(gaps):
        first, last = frames[gaps[0]] + 1, frames[gaps[0] + 1] - 1
        raise DataError(f"{where} lacks the frames {first} to {last}: fetch it again.")
    lengths = np.diff(np.append(np.flatnonzero(starts), len(frames)))
    return _cut(rows[:, 8:], rows[:, 1:8], lengths.tolist(), " and ".join(file.name for file in files))


def _check_calvin(task, path):
    if task != "calvin":
        raise DataError(f"--data {path} is CALVIN's, but the task is {task}; expected was {EXPECTED[_short(task)]}.")


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
    attributes = _attributes(f"CALVIN play data ({names})", "calvin") | {"note": note}
    return dict(zip(KEYS, (observations, actions, terminals, timeouts))), attributes


# -------------------------------------------------------------------------------------------------------------- program


@dataclass
class Args:
    """Read data of any known format and write them as one HDF5 file, which loads in seconds (--data FILE)."""

    task: str
    """maze, kitchen, kitchen-misaligned or calvin"""
    data: Path
    """file or folder to read"""
    out: Path
    """HDF5 file to write"""
    allow_pickle: bool = False
    """read a pickle (arrays of numbers and plain values only)"""
    accept_any_data: bool = False
    """accept a file whose checksum or maze is another than expected"""


def main(args: Args) -> None:
    read_data(args.task, args.data, args.allow_pickle, args.accept_any_data).save(args.out)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
