"""Errors that end a program in one sentence, and files that are whole or not there at all."""

import contextlib
import os
import pkgutil
import uuid
from collections.abc import Callable
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

AGAIN = "delete it, then fetch or copy it again"  # damaged bytes
# Sound, but not what is needed:
CURE = 'give other data, or write it with OfflineDataset.from_episodes (data_tools/README.md, "A file of your own")'


class DataError(SystemExit):
    """A file or data set that cannot be used or made; the message is one sentence that names it and the cure.

    Nobody has to catch it: like `sys.exit("error: ...")` it ends the program with that sentence and exit code 1.
    """

    def __init__(self, message: str):
        # Made anew when it travels between processes, by Python from its text, by Gymnasium from itself.
        super().__init__("error: " + str(message).removeprefix("error: "))


class NotFiniteError(DataError, ValueError):
    """Learning has diverged: an action is NaN or infinite. A ValueError too, which Gymnasium's processes pass on."""


def cache_dir(data_dir=None) -> Path:
    """Return the folder of the data files: `data_dir`, else $SKIMO_DATA_DIR, else the user's cache folder."""
    folder = data_dir or os.environ.get("SKIMO_DATA_DIR") or platformdirs.user_cache_dir("skimo")
    return Path(os.path.expanduser(folder))


def imported(name: str):
    """Return what "module:name" names."""
    try:
        return pkgutil.resolve_name(name)
    except Exception:  # mujoco wants the OpenGL that MUJOCO_GL names, though only pictures need it
        if "MUJOCO_GL" not in os.environ:
            raise
        wanted, os.environ["MUJOCO_GL"] = os.environ["MUJOCO_GL"], "disable"
        try:
            return pkgutil.resolve_name(name)
        finally:
            os.environ["MUJOCO_GL"] = wanted


@contextlib.contextmanager
def reading(path, cure: str = AGAIN, fault: str = "is damaged"):
    """Whatever goes wrong inside is the fault of the file `path`: raise DataError, one sentence with the cure.

    This is the one place for it, because readers of damaged files raise nearly everything: OSError, KeyError,
    MemoryError for sizes that cannot be, RecursionError for nests of lists, ... A DataError passes as it is.
    """
    try:
        yield
    except PermissionError as error:
        raise DataError(f"{path} may not be read: change its permissions or give another file.") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if "out of memory" in reason:  # the GPU's
            raise
        if isinstance(error, BlockingIOError):
            fault, cure = "is open in another program", "close it there"
        elif "plugin" in reason or "is not registered" in reason:  # HDF5's words
            fault, cure = "is compressed in a way that h5py does not know", "write it with gzip, or without compression"
        raise DataError(f"{path} {fault} ({reason}): {cure}.") from error


def listed(names) -> str:
    """Return names as text, at most eight of them."""
    names = list(map(str, names))
    return ", ".join(names[:8]) + (f" and {len(names) - 8:,} more" if len(names) > 8 else "") or "nothing"


def locked(path):
    """Wait until no other program makes the file `path`; the others wait until the `with` block of this has ended."""
    lock = FileLock(f"{path}.lock", mode=0o666)  # other users of a shared folder wait, too
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        print(f"Waiting for another program, which makes {path}", flush=True)
        return lock.acquire()


def check_regular(path: Path) -> None:
    """Raise DataError unless `path` is a regular file: reading a pipe or a device might never end."""
    if not os.path.exists(path):  # pathlib's raises an error in a folder that may not be entered
        raise DataError(f"{path} does not exist: check the path.")
    if not path.is_file():
        raise DataError(f"{path} is not a regular file: check the path.")


def write_atomically(path, write: Callable[[Path], None]) -> None:
    """Call `write(temporary path)` in the folder of `path`, then rename; on failure nothing is left behind.

    Raises DataError when the disk is full or the folder cannot be written; an older file at `path` stays as it was.
    """
    path = Path(os.path.expanduser(path))
    part = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        with open(part, "r+b") as file:  # Windows asks for one that may be written
            os.fsync(file.fileno())  # on the disk before the name points to it, also after a power cut
        os.replace(part, path)
    except (OSError, RuntimeError, ValueError) as error:  # ValueError: a picture's suffix that nobody knows
        raise _not_written(path, part, error) from error
    finally:
        with contextlib.suppress(OSError):  # renamed, or never begun
            part.unlink()


def check_writable(path) -> None:
    """Raise DataError now, before hours of work, if a file cannot be written to `path`."""
    path = Path(os.path.expanduser(path))
    if os.path.isdir(path):  # pathlib's raises an error in a folder that may not be entered
        raise DataError(f"{path} is a folder: give the path of a file.")
    trial = _part_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise _not_written(path, trial, error) from error


def _part_of(path):
    """Return a new temporary path beside `path`. It keeps the suffix, which tells writers the format."""
    return path.parent / f"part_{uuid.uuid4().hex}_{path.name}"


def _not_written(path, part, error):
    """Return the DataError for an error in writing `part`, a name that the user never gave."""
    reason = " ".join(str(error).replace(part.name, path.name).split())[:200]
    return DataError(f"cannot write {path} ({reason}); free some space or choose another path")
