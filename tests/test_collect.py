"""The program: `python -m data_tools collect` and `convert`."""

import re
import runpy
import sys
from pathlib import Path

import h5py
import matplotlib.image
import numpy as np
import pytest
import toy_walk  # noqa: F401 (a task of one's own)

import data_tools
from algos import skimo
from data_tools import DataError, OfflineDataset
from data_tools.__main__ import collect, convert
from data_tools.scripted import calvin, kitchen, maze


def test_a_variant_is_written_and_drawn(tmp_path, monkeypatch, capsys):
    out, plot = tmp_path / "few.hdf5", tmp_path / "few.png"
    flags = ["--num-episodes", 12, "--noise", 0, "--out", out, "--plot", plot]
    monkeypatch.setattr(sys, "argv", ["data_tools", "collect", "--env-id", "maze", *map(str, flags)])
    monkeypatch.delitem(sys.modules, "data_tools.__main__")
    runpy.run_module("data_tools", run_name="__main__")
    said = capsys.readouterr().out
    assert "OfflineDataset(12 episodes" in said and "mean length" in said
    made = OfflineDataset.load(out)
    assert len(made.episode_starts) == 12 and made.attributes["noise"] == 0
    image = matplotlib.image.imread(plot)
    assert image.shape[0] > 500 and image.std() > 0.05
    with pytest.raises(DataError, match="^error: --num-episodes needs --out"):
        collect("maze", num_episodes=12)


@pytest.mark.parametrize(
    ("env_id", "num_episodes", "share"),
    [("kitchen", 1, "all as planned"), ("calvin", 2, "real mean slide")],  # one: without processes of their own
)
def test_the_other_tasks_data(env_id, num_episodes, share, tmp_path, capsys):
    out = tmp_path / "few.hdf5"
    collect(env_id, num_episodes=num_episodes, seed=1, out=out)
    assert share in capsys.readouterr().out
    made = OfflineDataset.load(out)
    assert len(made.episode_starts) == num_episodes and made.attributes["seed"] == 1
    assert made.attributes["noise"] == data_tools.TASKS[env_id].noise and made.source == "scripted"


def test_skimo_goes_through_both_phases_on_calvin(tmp_path):
    """From two episodes, with the task's defaults but for sizes."""
    out = tmp_path / "few.hdf5"
    calvin.collect(2, progress=False).save(out)
    flags = f"--env-id calvin --data {out} --run-dir {tmp_path} --data-dir {tmp_path} --device cpu --num-envs 1"
    flags += " --pretrain-updates 2 --pretrain-batch-size 8 --pretrain-eval-episodes 1"
    flags += " --warmup-steps 0 --batch-size 16 --eval-episodes 1 --total-timesteps 600"
    results = skimo.train(skimo.parse_args(flags.split()))
    assert results["env_steps"] >= 600 and results["updates"] == int(results["env_steps"] * 10 / 500)


@pytest.mark.parametrize("script", [maze, kitchen, calvin], ids=lambda script: script.__name__)
def test_senseless_numbers_are_refused(script):
    for arguments in ((0, 0.5, 0), (10, -1.0, 0), (10, float("nan"), 0), (10, 0.5, -1), (10, 0.5, 2**64)):
        with pytest.raises(DataError, match="--num-episodes"):
            script.collect(*arguments, progress=False)


def test_the_expert_solves_the_task(capsys):
    collect("calvin", expert=2)
    assert "all done in 2 of 2 episodes" in capsys.readouterr().out


def test_a_task_of_ones_own(tmp_path, monkeypatch, capsys):
    task = data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect")
    monkeypatch.setitem(data_tools.TASKS, "walk", task)
    collect("walk", data_dir=tmp_path)
    made = data_tools.load_dataset("walk", tmp_path)
    assert str(made) in capsys.readouterr().out and len(made.episode_starts) == 40
    for flags in ({"plot": tmp_path / "walk.png"}, {"expert": 3}):
        with pytest.raises(DataError, match=f"--{[*flags][0]}: toy_walk has no function {[*flags][0]}"):
            collect("walk", data_dir=tmp_path, **flags)
    monkeypatch.setitem(data_tools.TASKS, "bare", data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0))
    with pytest.raises(DataError, match="bare has no scripted data"):
        collect("bare")


def test_convert_does_not_overwrite_what_it_reads(tmp_path, monkeypatch):
    path = tmp_path / "mine.hdf5"
    rng = np.random.default_rng(0)
    observations, actions = np.ones((20, 4)), rng.uniform(-1, 1, (20, 2))  # between the maze's walls
    OfflineDataset(observations, actions, np.zeros(20), np.arange(20) % 10 == 9).save(path)
    with h5py.File(path, "a") as file:
        file["rewards"][:] = 1.0  # would be lost
    before = path.read_bytes()
    (tmp_path / "link.hdf5").symlink_to(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for data, out in [(path, path), (Path("~/mine.hdf5"), path), (path, tmp_path / "link.hdf5")]:
        with pytest.raises(DataError, match=f"--out {re.escape(str(out))} is the file of --data"):
            convert("maze", data, out)
    with pytest.raises(DataError, match="nothing.hdf5 does not exist"):
        convert("maze", tmp_path / "nothing.hdf5", path)
    convert("maze", path, tmp_path / "new.hdf5")
    assert path.read_bytes() == before
    with h5py.File(tmp_path / "new.hdf5") as file:  # rewards are 0, as the README says
        assert file["rewards"].shape == (20,) and not file["rewards"][()].any()
