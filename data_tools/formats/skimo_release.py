"""The SkiMo release's archives (maze.gz, kitchen.gz, calvin.gz): compressed pickles, which could hold programs.

They are read without running anything: an unpickler that admits arrays of numbers and plain values only.
"""

import gzip
import pickle
import re

import numpy as np

from data_tools.dataset import KEYS
from data_tools.files import CURE, DataError, listed, reading


def opened(path):
    """Open a file for reading bytes, those of the content if it is compressed with gzip."""
    with open(path, "rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if compressed else open(path, "rb")


NEEDED = f"a list of dict(obs, actions, dones), one for each episode, was expected; {CURE}"


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    """Return arrays (by KEYS) and attributes of an archive: a list of dict(obs, actions, dones).

    Raises DataError for damage, and for a pickle that asks for anything else than arrays and plain values.
    """
    with reading(path), opened(path) as file:
        try:
            content = _ArrayUnpickler(file).load()
        except _Refused as error:
            found = f"{error}, which is neither a NumPy array nor a plain value; nothing of it was run"
            raise DataError(f"{path} asks for {found}. Do not use this file, or {CURE}.") from None
    with reading(path, NEEDED, "is no archive of the release"):
        if not isinstance(content, list) or not content:
            raise ValueError(f"what it holds is: {_kind(content)}")
        episodes = [_episode(f"trajectory {number}", entry) for number, entry in enumerate(content)]
        kept = [episode for episode in episodes if episode is not None and len(episode["actions"])]
        if not kept:
            raise ValueError("it has no episodes")
        arrays = {key: np.concatenate([episode[key] for episode in kept]) for key in KEYS}
    attributes = {"description": "archive of the SkiMo release", "source": "skimo-release"}
    dropped = sum(episode is None for episode in episodes)
    if dropped:
        attributes["note"] = f"{dropped} episode(s) with fewer states than steps left out"
    return arrays, attributes


def _episode(where, entry):
    """Return arrays (by KEYS, T rows) of one dict(obs, actions, dones), or None for fewer states than steps.

    A last observation without an action is left out. SkiMo's loader drops episodes with too few states as well.
    """
    if not isinstance(entry, dict) or not {"obs", "actions", "dones"} <= entry.keys():
        raise ValueError(f"{where} is: {_kind(entry)}")
    observations = _array(entry["obs"])
    actions = _array(entry["actions"])
    dones = _array(entry["dones"])
    steps = len(actions)
    if dones.shape != (steps,) or len(observations) > steps + 1:
        shapes = f"observations {observations.shape}, actions {actions.shape} and ends {dones.shape}"
        raise ValueError(f"{where} has {shapes}, expected (T, O), (T, A) and (T,)")
    if len(observations) < steps:
        return None
    timeouts = np.zeros(steps, dtype=bool)
    timeouts[-1:] = dones[-1:] == 0
    return dict(zip(KEYS, (observations[:steps], actions, dones, timeouts)))  # not bool yet: NaN would be True


def _kind(value):
    if isinstance(value, dict):
        return f"dict of {listed(value)}"
    return "an empty list" if value == [] else type(value).__name__.strip("_").lower()


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
        raise TypeError(f"an array was expected, not {type(value).__name__}")
    return np.asarray(value)
