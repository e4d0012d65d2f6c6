"""D4RL's kitchen data (https://arxiv.org/abs/2004.07219): HDF5, fetched once from their server. Also our own files."""

from pathlib import Path

import numpy as np
import pooch

from data_tools.dataset import check_arrays, read_hdf5
from data_tools.files import DataError
from data_tools.formats import download

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
    "minari": ("Minari's kitchen", False),
    "hdf5": ("data in D4RL's layout", False),
    "d4rl": ("D4RL kitchen-mixed-v0", KITCHEN_SHA256),
    "d4rl-partial": ("D4RL kitchen-partial-v0", "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800"),
    "d4rl-complete": ("D4RL kitchen-complete-v0", "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81"),
}


def fetch_kitchen(folder, progress: bool = True, url: str = KITCHEN_URL, sha256: str = KITCHEN_SHA256) -> Path:
    """Return D4RL's kitchen-mixed-v0 file in `folder`, which is fetched if it is not there. Raises DataError."""
    return download.fetch(url, Path(folder) / url.rpartition("/")[2], sha256, progress)


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    """Return arrays (by KEYS) and attributes of an HDF5 file in D4RL's layout: flat arrays, one row per step.

    Raises DataError for a file without ends of episodes.
    """
    arrays, attributes = read_hdf5(path)
    check_arrays(arrays, str(path))
    if not (arrays["terminals"].any() or arrays["timeouts"].any()):
        cure = "add `timeouts` (R,), True at the last row of each episode"
        raise DataError(f"{path} has no ends of episodes, neither terminals nor timeouts are ever set: {cure}.")
    source = str(attributes.get("source"))
    if source in SOURCES:  # OfflineDataset.save wrote it
        return arrays, {"description": SOURCES[source][0], **attributes}
    checksum = pooch.file_hash(path)
    source = next((name for name, (_, known) in SOURCES.items() if known == checksum), "hdf5")
    attributes |= {"description": SOURCES[source][0], "source": source}
    attributes.pop("note", None)  # somebody else's: ours go into the one line that read_data prints
    if source == "d4rl":
        attributes["note"] = "split where terminals or timeouts are set (the SkiMo paper says 603 episodes)"
    return arrays, attributes
