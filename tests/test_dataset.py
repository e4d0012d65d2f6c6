"""Data files and the window sampler, on small data made by hand."""

import dataclasses
import multiprocessing
import os
import pickle
import resource
import signal
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data_tools
from data_tools import DataError, OfflineDataset, cache_dir, load_dataset
from data_tools.files import check_writable, write_atomically
from data_tools.formats import d4rl
from data_tools.scripted import kitchen, maze

LENGTHS = [5, 12, 3, 30, 12]  # the last episode has no flag at its end


def make_arrays(lengths=tuple(LENGTHS)):
    """Rows that tell where they come from: observation (episode, step), action (episode, step, row)."""
    episode = np.repeat(np.arange(len(lengths)), lengths)
    step = np.concatenate([np.arange(n) for n in lengths])
    ends = np.cumsum(lengths) - 1
    terminals, timeouts = np.zeros((2, len(step)), dtype=bool)
    terminals[ends[:-1:2]] = True
    timeouts[ends[1:-1:2]] = True
    return {
        "observations": np.stack([episode, step], axis=1).astype(np.float32),
        "actions": np.stack([episode, step, np.arange(len(step))], axis=1).astype(np.float32),
        "terminals": terminals,
        "timeouts": timeouts,
    }


def make_dataset():
    return OfflineDataset(**make_arrays(), attributes={"seed": 3, "noise": 0.5, "generator": "hand"})


def maze_data():
    """Two episodes of the maze's sizes."""
    rng = np.random.default_rng(0)
    return OfflineDataset(rng.normal(size=(20, 4)), rng.normal(size=(20, 2)), np.zeros(20), np.arange(20) % 10 == 9)


def write(path, arrays):
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value


# ------------------------------------------------------------------------------------------------- episodes and windows


def test_episodes_end_at_terminals_and_timeouts():
    dataset = make_dataset()
    assert dataset.episode_lengths.tolist() == LENGTHS
    assert dataset.episode_starts.tolist() == [0, 5, 17, 20, 50]
    assert dataset.observations.dtype == dataset.actions.dtype == torch.float32
    assert dataset.terminals.dtype == dataset.timeouts.dtype == torch.bool
    assert dataset.episode_starts.dtype == dataset.episode_lengths.dtype == torch.int64
    assert len(dataset) == sum(LENGTHS) and dataset.device == torch.device("cpu")


def test_windows_stay_within_their_episode_and_are_aligned():
    obs, actions = make_dataset().sample_windows(4000, 10)
    assert obs.shape == (4000, 10, 2) and actions.shape == (4000, 9, 3)
    assert (obs[:, :, 0] == obs[:, :1, 0]).all()  # one episode
    assert (obs[:, 1:, 1] - obs[:, :-1, 1] == 1).all()  # successive steps
    assert torch.equal(actions[:, :, :2], obs[:, :-1])  # action t belongs to state t


def test_windows_are_uniform_over_episodes_then_over_starts():
    generator = torch.Generator().manual_seed(0)
    batch_size = 60_000
    obs, _ = make_dataset().sample_windows(batch_size, 10, generator)
    episodes = obs[:, 0, 0].int()
    assert set(episodes.tolist()) == {1, 3, 4}  # those with at least 10 rows
    for episode in (1, 3, 4):
        chosen = obs[episodes == episode, 0, 1].long()
        # Five standard deviations of the binomial counts.
        assert abs(len(chosen) - batch_size / 3) < 5 * np.sqrt(batch_size * 2 / 9)
        counts = torch.bincount(chosen)
        num_starts = LENGTHS[episode] - 10 + 1
        assert len(counts) == num_starts  # the first and the last start both occur
        expected = len(chosen) / num_starts
        assert (counts - expected).abs().max() < 5 * np.sqrt(expected)


def test_windows_as_long_as_the_episode_and_of_one_row():
    obs, actions = make_dataset().sample_windows(50, 30)
    assert (obs[:, 0, 0] == 3).all() and (obs[:, 0, 1] == 0).all()
    obs, actions = make_dataset().sample_windows(5000, 1)
    assert obs.shape == (5000, 1, 2) and actions.shape == (5000, 0, 3)
    assert len(torch.unique(obs, dim=0)) == sum(LENGTHS)


def test_windows_follow_the_generator():
    dataset = make_dataset()
    first, again, other = (dataset.sample_windows(20, 5, torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_windows_too_long():
    with pytest.raises(DataError, match=r"31 rows, the longest has 30"):
        make_dataset().sample_windows(4, 31)
    with pytest.raises(DataError, match="at least one row"):
        make_dataset().sample_windows(4, 0)


def test_an_episode_at_rest_may_be_all_there_is_to_validate():
    arrays = make_arrays((30, 32))
    arrays["actions"][30:] = 0.0
    train, valid = OfflineDataset(**arrays).split(0.5)
    assert len(train) == 30 and len(valid) == 32 and not valid.actions.any()


def test_refusals_name_the_users_path_and_the_systems_reason(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    path = tmp_path / "out.hdf5"
    for write in (check_writable, lambda path: write_atomically(path, Path.touch)):
        with pytest.raises(DataError) as refused:
            write(path)
        assert str(refused.value).startswith(f"error: cannot write {path} ([Errno 30] Read-only file system: '{path}')")


def test_outputs_that_cannot_be_written_are_refused_before_the_work(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="is a folder: give the path of a file"):
        check_writable(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot write .*; free some space or choose another path"):
        check_writable(tmp_path / "file" / "out.hdf5")
    check_writable(tmp_path / "out.hdf5")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match="file/out.hdf5"):  # the folder of ~ is meant
        check_writable("~/out.hdf5")
    longest = "x" * 212 + ".h5"  # with the 38 characters of a temporary name: 253 of at most 255
    check_writable(tmp_path / longest)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    data = OfflineDataset(**make_arrays())
    with pytest.raises(DataError, match=r"cannot write .*a\.foo"):
        maze.plot(data, tmp_path / "a.foo")


def test_numbers_of_numpy_scale_observations_in_single_precision():
    task = data_tools.Task(envs="x:y", max_return=1.0, obs_scale=np.ones(2) / 2, obs_shift=tuple(np.zeros(2)))
    for values in (task.obs_scale, task.obs_shift):
        assert torch.tensor(values).dtype == torch.float32


def test_split_is_by_file_order():
    dataset = make_dataset()
    train, validation = dataset.split(0.6)
    assert train.episode_lengths.tolist() == LENGTHS[:3] and validation.episode_lengths.tolist() == LENGTHS[3:]
    assert torch.equal(torch.cat([train.actions, validation.actions]), dataset.actions)
    assert train.attributes == dataset.attributes
    assert len(dataset.split(0.99)[1].episode_starts) == 1 and len(dataset.split(0.0)[0].episode_starts) == 1
    many = OfflineDataset(**make_arrays((3,) * 3046))
    assert [len(part.episode_starts) for part in many.split()] == [3015, 31]
    with pytest.raises(DataError, match="at least two"):
        OfflineDataset(**make_arrays((7,))).split()


def test_split_counts_the_episodes_that_are_long_enough(capsys):
    """Both sides have one of them, wherever short ones stand in the file."""
    dataset = OfflineDataset(**make_arrays((2, 9, 2, 9, 9, 2)))
    for fraction, train, validation in ((0.99, [2, 9, 2, 9], [9, 2]), (0.4, [2, 9, 2], [9, 9, 2])):
        parts = dataset.split(fraction, 9)
        assert [part.episode_lengths.tolist() for part in parts] == [train, validation]
        assert "3 of 6 episodes have the 9 rows of a window; the others" in capsys.readouterr().out
    dataset.split(0.5, 2)
    assert capsys.readouterr().out == ""
    with pytest.raises(DataError, match="0 of 6 episodes have the 10 rows of a window, the longest has 9"):
        dataset.split(0.99, 10)


def test_episodes_of_any_kind_are_joined():
    rng = np.random.default_rng(0)
    episodes = [(rng.normal(size=(n + more, 3)), rng.normal(size=(n, 2)), done) for n, more, done in
                ((4, 0, True), (2, 1, False), (5, 1, True))]  # fmt: skip
    dataset = OfflineDataset.from_episodes(episodes, {"seed": 3})
    assert dataset.episode_lengths.tolist() == [4, 2, 5] and dataset.attributes == {"seed": 3}
    assert dataset.terminals.nonzero().flatten().tolist() == [3, 10]
    assert dataset.timeouts.nonzero().flatten().tolist() == [5]
    empty = np.empty((0, 3)), np.empty((0, 2)), True
    with_empty = OfflineDataset.from_episodes([empty, episodes[0], empty, *episodes[1:]])
    assert with_empty.fingerprint == dataset.fingerprint
    for wrong in ([], [empty], [(np.zeros((6, 3)), np.zeros((4, 2)), False)]):
        with pytest.raises(DataError, match="episodes need rows, and an observation for each action"):
            OfflineDataset.from_episodes(wrong)
    rows = [np.float32(obs[: len(actions)]) for obs, actions, _ in episodes]
    assert np.array_equal(dataset.observations.numpy(), np.concatenate(rows))
    assert np.array_equal(dataset.actions.numpy(), np.concatenate([np.float32(x) for _, x, _ in episodes]))


@pytest.mark.parametrize(("share", "number"), [(0.5, 5), (0.26, 3), (0.25, 2), (0.001, 1)])
def test_a_share_is_the_first_episodes_of_one_permutation(share, number):
    lengths = np.arange(3, 13)  # they tell which episode it is
    terminals = np.zeros(lengths.sum(), dtype=bool)
    terminals[np.cumsum(lengths)[:-1] - 1] = True  # the last episode ends without a flag
    obs = np.arange(1.0, len(terminals) + 1)[:, None]
    whole = OfflineDataset(obs, obs, terminals, ~terminals & False, {"seed": 3})
    part = whole.share(share)
    order = np.random.default_rng(0).permutation(10)[:number]
    rows = np.concatenate([np.split(obs[:, 0], np.cumsum(lengths)[:-1])[i] for i in order])
    assert part.episode_lengths.tolist() == lengths[order].tolist() and part.attributes == whole.attributes
    assert part.observations[:, 0].tolist() == part.actions[:, 0].tolist() == rows.tolist()
    assert part.terminals.sum() == (order != 9).sum() and (part.terminals | part.timeouts).sum() == number
    assert part.fingerprint == whole.share(share).fingerprint != whole.fingerprint


def test_the_whole_share_is_the_data_and_no_share_is_refused():
    dataset = make_dataset()
    assert dataset.share(1.0) is dataset
    for share in (0.0, -1, 1.5, 60, float("nan")):
        with pytest.raises(DataError, match="--data-share"):
            load_dataset("maze", share=share)  # before data are made


def test_fingerprint_depends_on_content_alone():
    dataset = make_dataset()
    assert dataset.fingerprint == OfflineDataset(**make_arrays()).fingerprint == dataset.to("cpu").fingerprint
    for key in ("observations", "actions", "terminals", "timeouts"):
        arrays = make_arrays()
        arrays[key][2] = 1 - arrays[key][2]
        assert OfflineDataset(**arrays).fingerprint != dataset.fingerprint


# ---------------------------------------------------------------------------------------------------------------- files


def test_save_and_load(tmp_path):
    dataset, path = make_dataset(), tmp_path / "new" / "data.hdf5"
    dataset.save(path)
    loaded = OfflineDataset.load(path)
    for key in ("observations", "actions", "terminals", "timeouts", "episode_starts", "episode_lengths"):
        assert torch.equal(getattr(loaded, key), getattr(dataset, key))
        assert getattr(loaded, key).dtype == getattr(dataset, key).dtype
    assert loaded.fingerprint == dataset.fingerprint
    assert loaded.attributes == {"seed": 3, "noise": 0.5, "generator": "hand"}
    assert os.listdir(path.parent) == ["data.hdf5"]
    with h5py.File(path) as file:  # as a D4RL reader sees it
        assert set(file) == {"observations", "actions", "rewards", "terminals", "timeouts"}
        assert len(file["rewards"]) == len(dataset) and file["observations"].compression == "gzip"


def test_a_d4rl_file_of_others_loads(tmp_path):
    arrays = make_arrays()
    arrays["observations"] = arrays["observations"].astype(np.float64)
    arrays["terminals"] = arrays["terminals"].astype(np.uint8)
    arrays["timeouts"] = arrays["timeouts"].astype(np.float32)
    write(tmp_path / "d4rl.hdf5", {**arrays, "rewards": np.ones(62), "infos/goal": np.zeros((62, 2))})
    loaded = OfflineDataset.load(tmp_path / "d4rl.hdf5")
    assert loaded.attributes == {} and loaded.fingerprint == make_dataset().fingerprint


def broken(**changes):
    return {key: value for key, value in {**make_arrays(), **changes}.items() if value is not None}


NAN_ROW, INF_ROW, HUGE_ROW = np.ones((62, 2)), np.ones((62, 3)), np.ones((62, 3))
NAN_ROW[7, 1], INF_ROW[7, 1], HUGE_ROW[7, 1] = np.nan, np.inf, 1e38


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (broken(actions=None), "has observations, .*, but no actions"),
        (broken(terminals=None, timeouts=None), "has actions, observations, but no terminals or timeouts"),
        (broken(observations=NAN_ROW), "observations contain NaN or infinity, first in row 7"),
        (broken(actions=INF_ROW), "actions contain NaN or infinity"),
        (broken(actions=np.zeros((61, 3))), "numbers of rows disagree"),
        (broken(timeouts=np.zeros(63)), "numbers of rows disagree"),
        (broken(observations=np.zeros(62)), r"observations have shape \(62,\)"),
        (broken(terminals=np.zeros((62, 1))), r"terminals have shape \(62, 1\)"),
        (broken(actions=np.zeros((62, 0))), r"actions are empty, shape \(62, 0\)"),
        ({key: value[:0] for key, value in make_arrays().items()}, "are empty"),
        (broken(actions=np.full((62, 3), b"left")), r"actions are \|S4, expected floating-point numbers"),
        (broken(actions=HUGE_ROW), r"actions reach 1e\+38, which cannot be"),
        (broken(observations=np.ones((62, 2), int)), "observations are int64, expected floating-point numbers"),
        (broken(actions=np.ones((62, 3), bool)), "actions are bool, expected floating-point numbers"),
        (broken(observations=np.zeros((62, 2))), "observations are all zero"),
        (broken(actions=np.zeros((62, 3))), "actions are all zero"),
        (broken(terminals=np.full(62, 0.5)), "terminals are float64, expected True and False, or 1 and 0"),
        (broken(terminals=np.zeros(62, [("a", "i4")])), "terminals are .*expected True and False"),
        (broken(timeouts=np.full(62, b"x")), "timeouts are .S1, expected True and False"),
        (broken(actions=h5py.Empty("f4")), r"actions have shape \(\)"),
        (broken(actions=np.float32(1.0)), r"actions have shape \(\), expected 2 dimension"),
    ],
)
def test_bad_content(tmp_path, arrays, message):
    path = tmp_path / "bad.hdf5"
    write(path, arrays)
    with pytest.raises(DataError, match=message) as error:
        OfflineDataset.load(path)
    assert str(path) in str(error.value) and "give other data" in str(error.value)


def test_a_file_that_was_not_written_to_its_end(tmp_path):
    """HDF5 gives zeros for rows that nobody wrote."""
    arrays = make_arrays()
    arrays["timeouts"][-1] = True
    unwritten = {
        key: np.concatenate([value, np.zeros((9, *value.shape[1:]), value.dtype)]) for key, value in arrays.items()
    }
    write(tmp_path / "part.hdf5", unwritten)
    with pytest.raises(DataError, match="the last episode is all zero, so the file was not written to its end"):
        OfflineDataset.load(tmp_path / "part.hdf5")
    unwritten["actions"][-1] = 0.1
    write(tmp_path / "rest.hdf5", unwritten)
    assert len(OfflineDataset.load(tmp_path / "rest.hdf5")) == 71


def test_bad_files(tmp_path):
    path = tmp_path / "data.hdf5"
    with pytest.raises(DataError, match=r"data\.hdf5 does not exist: check"):
        OfflineDataset.load(path)
    with pytest.raises(DataError, match="is not a regular file"):
        OfflineDataset.load(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    with pytest.raises(DataError, match="pipe is not a regular file: check"):
        OfflineDataset.load(tmp_path / "pipe")
    OfflineDataset(**make_arrays((400,) * 5)).save(path)
    image = path.read_bytes()
    for damaged in (b"", b"not HDF5 at all", image[: len(image) // 2], image[:-10]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"data\.hdf5 is damaged .*: delete it, then fetch or copy it again"):
            OfflineDataset.load(path)


def test_flipped_bits_in_our_own_files_are_noticed(tmp_path):
    """Compressed arrays have a checksum, so that no bit of a value can change unnoticed."""
    path = tmp_path / "data.hdf5"
    rng = np.random.default_rng(0)
    OfflineDataset(rng.normal(size=(500, 4)), rng.normal(size=(500, 2)), *np.zeros((2, 500), bool)).save(path)
    with h5py.File(path) as file:
        chunks = [file[key].id.get_chunk_info(0) for key in ("observations", "actions", "terminals", "timeouts")]
    image, fingerprint = path.read_bytes(), OfflineDataset.load(path).fingerprint
    noticed = unchanged = 0
    for chunk in chunks:
        for position in rng.integers(chunk.byte_offset, chunk.byte_offset + chunk.size, size=5):
            damaged = bytearray(image)
            damaged[position] ^= 1 << rng.integers(8)
            path.write_bytes(damaged)
            try:
                unchanged += OfflineDataset.load(path).fingerprint == fingerprint  # a bit that means nothing
            except DataError as error:
                assert "data.hdf5 is damaged" in str(error) and "delete it, then fetch or copy it again" in str(error)
                noticed += 1
    assert noticed + unchanged == 20 and noticed >= 15


def test_a_file_that_announces_more_than_any_memory_holds(tmp_path):
    path = tmp_path / "huge.hdf5"
    with h5py.File(path, "w") as file:
        for key in ("observations", "actions"):
            file.create_dataset(key, (10**12, 4), "f4", chunks=(1000, 4))
        for key in ("terminals", "timeouts"):
            file.create_dataset(key, (10**12,), bool, chunks=(1000,))
    with pytest.raises(DataError, match="huge.hdf5 is too large"):
        OfflineDataset.load(path)


def test_two_writers_of_one_file_do_not_disturb_each_other(tmp_path):
    path = tmp_path / "file"

    def write(part):
        part.write_bytes(b"mine")
        data_tools.write_atomically(path, lambda other: other.write_bytes(b"the other's"))
        assert part.read_bytes() == b"mine"

    data_tools.write_atomically(path, write)
    assert path.read_bytes() == b"mine" and list(tmp_path.iterdir()) == [path]


def process(function, *args):
    """Start a process that calls a function: a copy of this one, for the import of torch takes seconds."""
    started = multiprocessing.get_context("fork").Process(target=function, args=args)
    started.start()
    return started


def test_write_refused_by_the_system(tmp_path):
    """A real failure in the middle of the file, from the limit on file sizes."""

    def save():
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))
        with pytest.raises(DataError, match="cannot write .*new.hdf5"):
            make_dataset().save(tmp_path / "new.hdf5")

    make_dataset().save(tmp_path / "old.hdf5")
    saving = process(save)
    saving.join(60)
    assert saving.exitcode == 0 and os.listdir(tmp_path) == ["old.hdf5"]


def test_killed_while_writing_leaves_the_old_file(tmp_path):
    def save():
        os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        OfflineDataset(**make_arrays((9, 9))).save(path)

    path = tmp_path / "data.hdf5"
    make_dataset().save(path)
    before = path.read_bytes()
    saving = process(save)
    saving.join(60)
    assert saving.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert OfflineDataset.load(path).fingerprint == make_dataset().fingerprint


# ---------------------------------------------------------------------------------------------------------------- cache


def test_cache_dir(tmp_path, monkeypatch):
    monkeypatch.delenv("SKIMO_DATA_DIR", raising=False)
    assert cache_dir().name == "skimo" and cache_dir().is_absolute()
    monkeypatch.setenv("SKIMO_DATA_DIR", str(tmp_path / "from_environment"))
    assert cache_dir() == tmp_path / "from_environment"
    assert cache_dir(tmp_path / "given") == tmp_path / "given"
    assert cache_dir("~/x") == Path.home() / "x"


def test_load_dataset_makes_the_file_once(tmp_path, monkeypatch, capsys):
    calls = []

    def collect(noise, seed, progress):
        calls.append((noise, seed))
        return maze_data()

    monkeypatch.setattr(maze, "collect", collect)
    leftover = tmp_path / f"part_{'0123' * 8}_maze_noise0.5_seed0_v1.hdf5"  # of a process that was killed
    leftover.write_bytes(b"half a file")
    others = tmp_path / f"part_{'0123' * 8}_my_maze_noise0.5_seed0_v1.hdf5"  # of one that makes another file
    others.write_bytes(b"half a file")
    first = load_dataset("maze", tmp_path, progress=False)
    said = capsys.readouterr().out
    assert str(tmp_path / "maze_noise0.5_seed0_v1.hdf5") in said
    assert f"actions reach {first.actions.abs().max():.2f}, beyond" in said
    again = load_dataset("maze", tmp_path, progress=False)
    assert capsys.readouterr().out == ""
    assert calls == [(0.5, 0)] and first.fingerprint == again.fingerprint == maze_data().fingerprint
    assert not leftover.exists() and others.exists()
    load_dataset("maze", tmp_path, noise=0, seed=2, progress=False)
    assert calls[1:] == [(0, 2)] and (tmp_path / "maze_noise0.0_seed2_v1.hdf5").exists()


@pytest.mark.parametrize("name", ["nowhere.maze:collect", "data_tools.scripted.maze:nothing"])
def test_a_wrong_name_in_a_task_is_an_error(name, tmp_path, monkeypatch):
    monkeypatch.setitem(data_tools.TASKS, "maze", dataclasses.replace(data_tools.TASKS["maze"], collect=name))
    with pytest.raises((ModuleNotFoundError, AttributeError), match="nowhere|nothing"):
        load_dataset("maze", tmp_path, progress=False)


def test_load_dataset_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="--data-dir or SKIMO_DATA_DIR"):
        load_dataset("maze", tmp_path / "file")
    # A damaged file is reported, not replaced behind the user's back.
    (tmp_path / "maze_noise0.5_seed0_v1.hdf5").write_bytes(b"damaged")
    with pytest.raises(DataError, match="signature not found.*: delete it; data_tools made it"):
        load_dataset("maze", tmp_path)


def test_processes_that_start_together_collect_once(tmp_path):
    outputs = [tmp_path / "first", tmp_path / "second"]

    def collect(noise, seed, progress):
        print("collecting")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not any("Waiting" in output.read_text() for output in outputs):
            time.sleep(0.05)  # until the other has arrived
        return maze_data()

    def load(output):
        maze.collect = collect
        with output.open("w", buffering=1) as sys.stdout:
            print(load_dataset("maze", tmp_path, progress=False).fingerprint)

    for output in outputs:
        output.touch()
    processes = [process(load, output) for output in outputs]
    for each in processes:
        each.join(120)
    assert [each.exitcode for each in processes] == [0, 0]
    lines = [output.read_text().splitlines() for output in outputs]
    assert sum("collecting" in output for output in lines) == 1
    assert sum("Waiting for another program" in line for output in lines for line in output) == 1
    assert {output[-1] for output in lines} == {maze_data().fingerprint}


def test_load_dataset_after_a_failed_collection_starts_again(tmp_path, monkeypatch):
    def interrupted(noise, seed, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(maze, "collect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_dataset("maze", tmp_path, progress=False)
    monkeypatch.setattr(maze, "collect", lambda noise, seed, progress: maze_data())
    assert load_dataset("maze", tmp_path, progress=False).fingerprint == maze_data().fingerprint


# -------------------------------------------------------------------------------------------------------------- sources


def kitchen_data(seed=0):
    """Three episodes of the kitchen's sizes, 60 numbers per observation, as D4RL and the scripted set have them."""
    rng = np.random.default_rng(seed)
    timeouts = np.zeros(90, dtype=bool)
    timeouts[29::30] = True
    observations, actions = rng.normal(size=(90, 60)), rng.uniform(-1, 1, (90, 9))
    return OfflineDataset(observations, actions, np.zeros(90, dtype=bool), timeouts)


@pytest.fixture
def offline(monkeypatch):
    """D4RL's host cannot be reached; the scripted generator makes three episodes. Returns the downloads tried."""
    tried = []

    def fetch(folder, progress=True):
        tried.append(folder)
        raise DataError("the host of D4RL's data cannot be reached: try later")

    monkeypatch.setattr(d4rl, "fetch_kitchen", fetch)
    monkeypatch.setattr(kitchen, "collect", lambda noise, seed, progress: kitchen_data(seed))
    return tried


@pytest.mark.parametrize("env_id", ["kitchen", "kitchen-misaligned"])
def test_both_kitchens_have_scripted_data_by_default(env_id, tmp_path, offline):
    dataset = load_dataset(env_id, tmp_path, progress=False)
    assert dataset.source == "scripted" and dataset.observations.shape == (90, 30)  # the constant goal is cut
    assert torch.equal(dataset.observations, kitchen_data().observations[:, :30])
    assert dataset.fingerprint == kitchen_data().fingerprint  # that of the file
    assert (tmp_path / "kitchen_noise0.05_seed0_v1.hdf5").exists()
    assert offline == []  # no network for scripted data


def test_d4rl_never_falls_back(tmp_path, offline):
    with pytest.raises(DataError, match="cannot be reached"):
        load_dataset("kitchen", tmp_path, "d4rl")


def test_data_of_the_users_own(tmp_path, offline):
    path = tmp_path / "mine.hdf5"
    kitchen_data(3).save(path)
    dataset = load_dataset("kitchen", tmp_path, data=path, progress=False)
    assert torch.equal(dataset.observations, kitchen_data(3).observations[:, :30])
    assert dataset.source == "hdf5" and offline == []
    part = load_dataset("kitchen", tmp_path, data=path, share=0.4, progress=False)
    assert len(part) == 30 and part.fingerprint == dataset.share(0.4).fingerprint
    scripted = load_dataset("kitchen", tmp_path, share=0.6, progress=False)
    assert len(scripted) == 60 and scripted.observations.shape[1] == 30


def test_scripted_data_of_other_sizes_are_refused(tmp_path):
    make_dataset().save(tmp_path / "maze_noise0.5_seed0_v1.hdf5")  # 2 and 3 numbers
    with pytest.raises(DataError, match=r"v1.hdf5 has \(2, 3\) numbers .* maze \(4, 2\): delete the file"):
        load_dataset("maze", tmp_path)


def test_an_error_keeps_its_sentence_from_process_to_process():
    assert str(pickle.loads(pickle.dumps(DataError("no disk")))) == "error: no disk"
