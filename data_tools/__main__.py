"""Make the offline data of a task, or write data of any known format as one file that loads in seconds.

python -m data_tools collect --env-id maze --plot maze.png
python -m data_tools convert --env-id calvin --data task_D_D --out calvin.hdf5    # 611,099 small files, read once
"""

import os
import sys
from pathlib import Path

import tyro

import data_tools
from data_tools.files import DataError, check_writable, imported


def collect(
    env_id: str,
    num_episodes: int | None = None,
    noise: float | None = None,
    seed: int = 0,
    data_dir: str | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    expert: int = 0,
) -> None:
    """Make the scripted data of a task, unless they are there already, and print their statistics.

    Args:
        env_id: task: maze, kitchen, kitchen-misaligned, calvin or one of your own
        num_episodes: how many to make, into --out (None: as many as the paper has)
        noise: size of the disturbances of the actions (None: the task's)
        seed: random seed
        data_dir: folder of the data files (None: $SKIMO_DATA_DIR, else the user's cache folder)
        out: write to this file instead of the data folder, collecting anew
        plot: draw some of the data into this picture; kitchens: the first episode into this MP4 file
        expert: instead of all that, let the scripted expert do this many episodes
    """
    task = data_tools.TASKS[env_id]
    if task.collect is None:
        raise DataError(f"{env_id} has no scripted data.")
    make = imported(task.collect)
    script = sys.modules[task.collect.partition(":")[0]]
    noise = task.noise if noise is None else noise
    for flag, wanted in (("plot", plot is not None), ("expert", expert > 0)):
        if wanted and not hasattr(script, flag):
            raise DataError(f"--{flag}: {script.__name__} has no function {flag}().")
    if expert > 0:
        returns, lengths = script.expert(expert, noise, seed, **task.env_kwargs)
        found = f"mean return {returns.mean():.2f}, mean length {lengths.mean():.0f} steps"
        print(f"scripted expert: {found}, all done in {task.success(returns) * expert:.0f} of {expert} episodes")
        return
    for path in filter(None, (out, plot)):
        check_writable(path)
    if out is not None:
        how_many = {} if num_episodes is None else {"num_episodes": num_episodes}
        dataset = make(noise=noise, seed=seed, progress=True, **how_many)
        dataset.save(out)
        print(f"Wrote {out}")
    elif num_episodes is not None:
        raise DataError("--num-episodes needs --out: the data folder holds complete data only.")
    else:
        dataset = data_tools.load_dataset(env_id, data_dir, noise=noise, seed=seed)
    print(dataset)
    for name, value in script.statistics(dataset).items() if hasattr(script, "statistics") else ():
        print(f"{name:>32}  {value:,}" if isinstance(value, int) else f"{name:>32}  {value:.4f}")
    if plot is not None:
        script.plot(dataset, plot)
        print(f"Wrote {plot}")


def convert(env_id: str, data: Path, out: Path) -> None:
    """Read data of any known format and write them as one HDF5 file, which loads in seconds (--data FILE).

    Its rewards are 0: no method here needs those of the data.

    Args:
        env_id: task: maze, kitchen, kitchen-misaligned, calvin or one of your own
        data: file or folder to read
        out: HDF5 file to write
    """
    data = Path(os.path.expanduser(data))
    out = Path(os.path.expanduser(out))
    if os.path.exists(data) and os.path.exists(out) and os.path.samefile(data, out):
        raise DataError(f"--out {out} is the file of --data, which would be lost: give another path.")
    check_writable(out)
    data_tools.load_dataset(env_id, data=data).save(out)
    print(f"Wrote {out}")


if __name__ == "__main__":
    commands = {"collect": collect, "convert": convert}
    tyro.extras.subcommand_cli_from_dict(commands, prog="python -m data_tools", description=__doc__)
