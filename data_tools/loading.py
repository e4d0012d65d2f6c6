"""Where offline data come from: a file of the user's, the network, or a script."""

from data_tools.dataset import OfflineDataset, made_once
from data_tools.files import DataError, cache_dir, imported


def load(
    task,
    env_id: str,
    sizes: tuple[int, int],
    data_dir=None,
    dataset: str = "scripted",
    data=None,
    noise: float | None = None,
    seed: int = 0,
    device="cpu",
    progress: bool = True,
) -> OfflineDataset:
    """Do what data_tools.load_dataset says, for an entry of data_tools.TASKS and its numbers (O, A).

    noise: size of the disturbances in scripted data (None: the task's); seed: their random seed. Raises DataError.
    """
    if dataset not in ("scripted", "d4rl"):
        raise DataError(f"--dataset {dataset} is unknown: use scripted or d4rl.")
    if data is not None:
        return _read(data, task, sizes, progress).to(device)
    if dataset == "d4rl":
        if task.download is None:
            raise DataError(f"D4RL has no data for {env_id}: use --dataset scripted.")
        path = imported(task.download)(cache_dir(data_dir), progress)
        return _read(path, task, sizes, progress).to(device)
    if task.collect is None:
        raise DataError(f"{env_id} has no scripted data: give a file with --data PATH.")
    noise = task.noise if noise is None else noise
    path = cache_dir(data_dir) / f"{task.data or env_id}_noise{float(noise)}_seed{seed}_v1.hdf5"
    scripted = made_once(path, lambda: imported(task.collect)(noise=noise, seed=seed, progress=progress))
    found = scripted.observations.shape[1], scripted.actions.shape[1]
    if found not in (sizes, (task.data_obs_dim, sizes[1])):
        raise DataError(f"{path} has {found} numbers per observation and action, {env_id} {sizes}: delete the file.")
    return scripted.narrowed(sizes[0]).to(device)


def _read(path, task, sizes, progress):
    """Read a file in one of the formats of others."""
    from data_tools import formats  # not needed by runs on scripted data

    return formats.read_data(path, *sizes, task.data_obs_dim, progress)
