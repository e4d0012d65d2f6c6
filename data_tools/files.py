"""Files that are whole or not there at all: atomic writing, and checkpoints that are checked before they are used."""

import contextlib
import os
import pickle
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

# What NumPy arrays in a checkpoint are rebuilt from; weights_only=True admits tensors and plain values only.
NUMPY_ARRAYS = [np._core.multiarray._reconstruct, np.ndarray, np.dtype]
NUMPY_ARRAYS += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.bool_)]


class DataError(Exception):
    """A file or data set that cannot be used or made; the message is one sentence that names it and the cure."""


class NotFiniteError(DataError, ValueError):
    """Learning has diverged: a number that counts is NaN or infinite."""


def write_atomically(path, write: Callable[[Path], None], flag: str = "") -> None:
    """Call `write(temporary path)` in the folder of `path`, then rename; on failure nothing is left behind.

    Raises DataError when the disk is full or the folder cannot be written; an older file at `path` stays as it was.
    `flag`: that names the folder.
    """
    path = Path(path)
    part = path.with_name(f"part_{uuid.uuid4().hex}_{path.name}")  # keeps the suffix, which tells writers the format
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())  # on the disk before the name points to it, also after a power cut
        os.replace(part, path)
    except (torch.AcceleratorError, torch.OutOfMemoryError):  # of the GPU, which met it while the file was written
        raise
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        reason = " ".join(str(error).split())[:200]
        message = f"cannot write {path} ({reason}); free some space or choose another {flag or 'folder'}"
        raise DataError(message) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never begun
            part.unlink()


def save_checkpoint(path, state: dict, meta: dict) -> None:
    """Write `state` (tensors, arrays, plain values) and `meta`, what must agree before it may be used, atomically."""
    write_atomically(path, lambda part: torch.save(state | {"meta": meta}, part))


def load_checkpoint(path, meta: dict, device) -> dict:
    """Read a checkpoint onto a device, without running any code from it.

    Raises DataError for a missing or damaged file and where its `meta` differs from the expected one.
    """
    try:
        with torch.serialization.safe_globals(NUMPY_ARRAYS):
            state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; check the path") from error
    except (OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise DataError(f"{path} is damaged or no checkpoint; give another file (in the cache: delete it)") from error
    stored = state.get("meta") if isinstance(state, dict) else None
    if not isinstance(stored, dict):
        raise DataError(f"{path} is no checkpoint of this project; give another file")
    for name, value in meta.items():
        if stored.get(name) != value:
            is_argument = name not in ("kind", "file_version", "checkpoint_version", "env_id")
            cure = f"leave --{name.replace('_', '-')} as it was" if is_argument else "give another file"
            raise DataError(f"{path} has {name} {stored.get(name)!r} but this run needs {value!r}; {cure}")
    return state
