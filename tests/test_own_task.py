"""A stranger's task (toy_walk.py) needs one entry in TASKS, and everything serves it."""

import io

import numpy as np
import pytest
import torch

import data_tools


@pytest.fixture
def walk(monkeypatch):
    """The toy task, registered under this name for one test."""
    task = data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect", noise=0.2)
    monkeypatch.setitem(data_tools.TASKS, "walk", task)  # in a program: data_tools.TASKS["walk"] = task
    return "walk"


def test_its_environments_are_stepped_frozen_and_saved(walk):
    assert data_tools.env_sizes(walk) == (2, 2)
    envs = data_tools.make_envs(walk, 3)
    obs, _ = envs.reset(seed=0)
    assert obs.shape == (3, 2) and obs.dtype == np.float32
    total = np.zeros(3)
    for step in range(60):
        goal_directions = np.array([[1, 1], [1, 1], [-1, -1]]) * np.clip(3 * (0.8 - obs), 0, 1)
        obs, rewards, terminations, truncations, infos = envs.step(goal_directions)
        total += rewards
        if step == 9:
            file = io.BytesIO()
            torch.save(envs.get_state(), file)
    assert total.tolist() == [10, 10, 0]
    assert terminations.tolist() == infos["is_success"].tolist() == [True, True, False]
    assert truncations.tolist() == [False, False, True]
    file.seek(0)
    state = torch.load(file, weights_only=True)
    first = data_tools.make_envs(walk, 3).set_state(state)
    again = data_tools.make_envs(walk, 3)
    assert np.array_equal(again.set_state(state), first)
    with pytest.raises(ValueError, match="of 3 members"):
        data_tools.make_envs(walk, 2).set_state(state)


def test_its_data_are_made_once_and_read(walk, tmp_path, capsys):
    dataset = data_tools.load_dataset(walk, tmp_path, progress=False)
    assert (tmp_path / "walk_noise0.2_seed0_v1.hdf5").exists() and dataset.source == "scripted"
    assert dataset.episode_lengths.tolist() == [30] * 40
    obs, actions = dataset.sample_windows(100, 11)
    moved = (obs[:, 1:] - obs[:, :-1]).abs().sum(-1) > 0  # not yet arrived
    assert torch.allclose(obs[:, 1:][moved], (obs[:, :-1] + 0.1 * actions)[moved], atol=1e-6)
    capsys.readouterr()
    assert data_tools.load_dataset(walk, tmp_path).fingerprint == dataset.fingerprint
    assert capsys.readouterr().out == ""
    path = tmp_path / "mine.hdf5"
    dataset.save(path)
    assert data_tools.load_dataset(walk, data=path, progress=False).fingerprint == dataset.fingerprint


def test_what_it_lacks_is_one_sentence(walk, tmp_path, monkeypatch):
    with pytest.raises(data_tools.DataError, match="^error: D4RL has no data for walk: use --dataset auto or scripted"):
        data_tools.load_dataset(walk, tmp_path, "d4rl")
    monkeypatch.setitem(data_tools.TASKS, "bare", data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0))
    with pytest.raises(data_tools.DataError, match="bare has no scripted data: give a file with --data PATH"):
        data_tools.load_dataset("bare", tmp_path)
    with pytest.raises(data_tools.DataError, match="no task 'wolk'; known tasks: maze, kitchen, .*walk"):
        data_tools.make_envs("wolk", 1)
    envs = data_tools.make_envs(walk, 1, video=tmp_path / "walk.mp4")
    envs.reset(seed=0)
    with pytest.raises(NotImplementedError, match=r"WalkVectorEnv has no pictures: write its method draw\(member\)"):
        envs.step(np.zeros((1, 2)))
