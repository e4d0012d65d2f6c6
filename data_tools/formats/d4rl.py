"""D4RL's kitchen data (https://arxiv.org/abs/2004.07219): HDF5, fetched once from their server. Also our own files.

The server is plain http: the checksum is the protection.
"""

import logging
from pathlib import Path

import numpy as np
import pooch
import requests

from data_tools.dataset import read_hdf5
from data_tools.files import DataError, locked, reading

KITCHEN_URL = (
    "http://rail.eecs.berkeley.edu/datasets/offline_rl/kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
)
KITCHEN_SHA256 = "a30382a50278fdaea2e2d88e5f2836a95bcf9b581d252617872fd6537302721b"
# Short name of a source -> what its data are, and whether they are known without a checksum in the logs: made or read
# by us, or the one published file with this SHA-256, as third parties state it.
SOURCES = {
    "scripted": ("scripted data", True),
    "calvin": ("CALVIN play data", True),
    "human": ("human data", False),
    "skimo-release": ("archive of the SkiMo release", False),
    "hdf5": ("data in D4RL's layout", False),
    "d4rl": ("D4RL kitchen-mixed-v0", KITCHEN_SHA256),
    "d4rl-partial": ("D4RL kitchen-partial-v0", "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800"),
    "d4rl-complete": ("D4RL kitchen-complete-v0", "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81"),
}
TIMEOUT = 10  # seconds without an answer or a byte until the server counts as not there


def fetch_kitchen(folder, progress: bool = True, url: str = KITCHEN_URL, sha256: str = KITCHEN_SHA256) -> Path:
    """Return D4RL's kitchen-mixed-v0 file in `folder`, which is fetched if it is not there.

    Raises DataError if the server does not deliver, or if the file is not the published one or cannot be written.
    """
    path = Path(folder) / url.rpartition("/")[2]
    if _is_there(path, sha256):  # before the lock: the folder may be read-only
        return path
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):  # processes that start together fetch it once
            if _is_there(path, sha256):
                return path
            print(f"Fetching {url} into {path}", flush=True)
            downloader = pooch.HTTPDownloader(progressbar=progress, timeout=TIMEOUT)
            pooch.retrieve(url, sha256, path.name, path.parent, downloader=downloader)
    except requests.RequestException as error:
        raise DataError(
            f"{url} cannot be fetched ({type(error).__name__}): try again later, fetch it by hand and give it with "
            "--data PATH, or use --data scripted."
        ) from error
    except ValueError as error:  # pooch: another checksum; nothing is kept
        raise DataError(
            f"{url} is not D4RL's published file (SHA-256 differs): fetch it by hand and give it with --data PATH."
        ) from error
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror}); free some space, or choose another folder with --data-dir."
        ) from error
    return path


def _is_there(path, sha256):
    """Tell whether the published file is there. Raises DataError for another file, which pooch would replace."""
    with reading(path):
        if not path.exists():
            return False
        if pooch.file_hash(path) != sha256:  # it may be the user's own
            raise DataError(f"{path} is not D4RL's published file (SHA-256 differs): delete it, or move it.")
    return True


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    """Return arrays (by KEYS) and attributes of an HDF5 file in D4RL's layout: flat arrays, one row per step.

    Raises DataError for a file without ends of episodes.
    """
    arrays, attributes = read_hdf5(path)
    with reading(path):  # they may be of any type
        ends = arrays["terminals"].any() or arrays["timeouts"].any()
    if not ends:
        raise DataError(
            f"{path} has no ends of episodes, neither terminals nor timeouts are ever set: give other data."
        )
    source = str(attributes.get("source"))
    if source in SOURCES:  # OfflineDataset.save wrote it
        return arrays, {"description": SOURCES[source][0], **attributes}
    if str(attributes.get("generator", "")).startswith("data_tools."):  # older ones of ours
        return arrays, {**attributes, "description": "scripted data", "source": "scripted"}
    checksum = pooch.file_hash(path)
    source = next((name for name, (_, known) in SOURCES.items() if known == checksum), "hdf5")
    attributes |= {"description": SOURCES[source][0], "source": source}
    attributes.pop("note", None)  # somebody else's: ours go into the one line that read_data prints
    if source == "d4rl":
        attributes["note"] = "split where terminals or timeouts are set (the SkiMo paper says 603 episodes)"
    return arrays, attributes
