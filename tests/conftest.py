"""Shared fixtures: a small maze data set, so that no test collects the full one."""

import functools
import inspect
import os
import shutil
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # algos and data_tools, also for a plain `pytest`
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

inspect.getsource = functools.cache(inspect.getsource)  # tyro asks for it at every parsing

DATA_FILE = "maze_noise0.5_seed0_v1.hdf5"  # the name under which load_dataset looks for it


def pytest_collection_modifyitems(items):
    """With pytest -n 3, tests of one file and one algorithm share a process, and so what is costly to make."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        item.add_marker(pytest.mark.xdist_group(f"{item.path.stem} {params.get('case', '')}"))


def refused(call, *words) -> str:
    """call() ends with one sentence that holds the words; returns it."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert str(word) in message, message
    return message


@pytest.fixture(scope="session")
def tiny_data_file(tmp_path_factory):
    """60 maze trajectories as a data file; do not write to it."""
    from data_tools.scripted import maze

    path = tmp_path_factory.mktemp("data") / DATA_FILE
    maze.collect(60, progress=False).save(path)
    return path


@pytest.fixture
def data_dir(tiny_data_file, tmp_path):
    """A data folder of the test's own, with a copy of the small data set and no pre-trained model."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(tiny_data_file, folder / DATA_FILE)
    return folder


@pytest.fixture
def short_episodes(monkeypatch):
    """Maze episodes of 90 steps instead of 2,000."""
    from data_tools.tasks.maze import MazeVectorEnv

    init = MazeVectorEnv.__init__
    monkeypatch.setattr(MazeVectorEnv, "__init__", lambda self, num_envs=1, **how: init(self, num_envs, 90, **how))


@pytest.fixture(autouse=True)
def restored_process_state():
    """Signal handlers and the number of threads, which main() sets, are put back after each test. Random numbers do not
    depend on the tests before.
    """
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        if handler is not signal.getsignal(number):
            signal.signal(number, handler)
