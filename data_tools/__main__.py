"""Read data of any known format and write them as one HDF5 file, which loads in seconds (--data FILE).

python -m data_tools --env-id calvin --data task_D_D --out calvin.hdf5    # 611,099 small files, read once
"""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

import data_tools
from data_tools.files import DataError, check_writable


@dataclass
class Args:
    """Read data of any known format and write them as one HDF5 file, which loads in seconds (--data FILE)."""

    env_id: str
    """task: maze, kitchen, kitchen-misaligned, calvin or one of your own"""
    data: Path
    """file or folder to read"""
    out: Path
    """HDF5 file to write"""


def main(args: Args) -> None:
    """Read and write. Raises DataError."""
    data = Path(os.path.expanduser(args.data))
    out = Path(os.path.expanduser(args.out))
    if os.path.exists(data) and os.path.exists(out) and os.path.samefile(data, out):
        raise DataError(f"--out {out} is the file of --data, which would be lost: give another path.")
    check_writable(out)
    data_tools.load_dataset(args.env_id, data=args.data).save(out)
    print(f"Wrote {out}")


if __name__ == "__main__":
    main(tyro.cli(Args, prog="python -m data_tools"))
