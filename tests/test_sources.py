"""Readers of other people's data, on small files in their formats."""

import gzip
import json
import os
import pickle
import re
import runpy
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch

from data_tools import DataError, OfflineDataset, maze, sources
from data_tools.sources import read_data, sha256_of

LENGTHS = (7, 4, 9)  # steps of the episodes in most files here
WIDTHS = {"maze": (4, 2), "kitchen": (30, 9), "calvin": (21, 7)}


def make_episodes(task, obs_width=None, extra_rows=0, lengths=LENGTHS, dtype=np.float32):
    """Return [(observations (T + extra_rows, O), actions (T, A)), ...] of random numbers, in free cells of the maze."""
    rng = np.random.default_rng(0)
    episodes = []
    for length in lengths:
        observations = rng.uniform(-1, 1, (length + extra_rows, obs_width or WIDTHS[task][0])).astype(dtype)
        if task == "maze":
            free = np.argwhere(~maze.make_layout())
            observations[:, :2] = free[rng.integers(len(free), size=len(observations))] - 0.2
        episodes.append((observations, rng.uniform(-1, 1, (length, WIDTHS[task][1])).astype(dtype)))
    return episodes


def flat(episodes):
    """Return D4RL's arrays; the episodes end with a terminal and a timeout in turn."""
    ends = np.cumsum([len(actions) for _, actions in episodes]) - 1
    terminals, timeouts = np.zeros((2, ends[-1] + 1), dtype=bool)
    terminals[ends[::2]] = True
    timeouts[ends[1::2]] = True
    observations = np.concatenate([observations[: len(actions)] for observations, actions in episodes])
    actions = np.concatenate([actions for _, actions in episodes])
    return {"observations": observations, "actions": actions, "terminals": terminals, "timeouts": timeouts}


def write_hdf5(path, arrays, **attributes):
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, value in arrays.items():
            file[key] = value
        file.attrs.update(attributes)
    return path


def check(dataset, episodes, source, width=None):
    """Compare a data set with the episodes it was made of."""
    lengths = [len(actions) for _, actions in episodes]
    assert dataset.episode_lengths.tolist() == lengths and dataset.attributes["source"] == source
    expected = flat(episodes)
    np.testing.assert_array_equal(dataset.observations.numpy(), expected["observations"][:, :width].astype(np.float32))
    np.testing.assert_array_equal(dataset.actions.numpy(), expected["actions"].astype(np.float32))


# ----------------------------------------------------------------------------------------------------------------- D4RL


def test_d4rl_kitchen_file(tmp_path, capsys, monkeypatch):
    episodes = make_episodes("kitchen", obs_width=60)
    path = write_hdf5(tmp_path / "any_name", flat(episodes) | {"infos": np.arange(20), "rewards": np.zeros(20)})
    with pytest.raises(DataError, match=f"SHA-256 {sha256_of(path)}, expected was a30382.*--accept-any-data"):
        read_data("kitchen", path)
    check(read_data("kitchen", path, accept_any_file=True), episodes, "d4rl-unverified", width=30)
    capsys.readouterr()
    monkeypatch.setitem(sources.D4RL_KITCHEN, sha256_of(path), ("D4RL kitchen-mixed-v0", "d4rl"))
    for task in ("kitchen", "kitchen-misaligned"):
        check(read_data(task, str(path)), episodes, "d4rl", width=30)
        line = capsys.readouterr().out
        assert line.startswith(f"Data: D4RL kitchen-mixed-v0 from {path}: 3 episodes, 20 steps; split where terminals")
        assert "603" in line and line.count("\n") == 1


def test_files_in_d4rls_layout(tmp_path):
    episodes = make_episodes("kitchen")
    path = write_hdf5(tmp_path / "a.hdf5", flat(episodes))
    dataset = read_data("kitchen", path)
    check(dataset, episodes, "hdf5")
    dataset.save(tmp_path / "saved.hdf5")
    assert read_data("kitchen", tmp_path / "saved.hdf5").attributes == dataset.attributes  # the source stays known
    for task in ("maze", "calvin"):
        check(read_data(task, write_hdf5(tmp_path / task, flat(make_episodes(task)))), make_episodes(task), "hdf5")
    wide = make_episodes("kitchen", obs_width=60)
    path = write_hdf5(tmp_path / "b.hdf5", flat(wide), generator="data_tools.kitchen.collect", seed=3)
    dataset = read_data("kitchen", path)
    check(dataset, wide, "scripted", width=30)
    assert dataset.attributes["seed"] == 3


def test_our_own_maze_file(tiny_data_file):
    dataset = read_data("maze", tiny_data_file)
    assert dataset.fingerprint == OfflineDataset.load(tiny_data_file).fingerprint
    assert dataset.attributes["source"] == "scripted"


def test_another_maze_is_noticed(tmp_path):
    arrays = flat(make_episodes("maze"))
    arrays["observations"][::3, :2] = np.argwhere(maze.make_layout())[:7] - 0.2
    path = write_hdf5(tmp_path / "maze.hdf5", arrays)
    with pytest.raises(DataError, match=r"another maze: 35% of its positions .* --accept-any-data"):
        read_data("maze", path)
    assert len(read_data("maze", path, accept_any_file=True)) == 20


def changed(**changes):
    arrays = flat(make_episodes("kitchen")) | changes
    return {key: value for key, value in arrays.items() if value is not None}


NAN = flat(make_episodes("kitchen"))["observations"].copy()
NAN[[5, 9], 2] = np.nan


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (changed(actions=None), r"has no actions; expected was D4RL's HDF5 file, a Minari"),
        (changed(observations=np.zeros((20, 11))), r"observations have 11 numbers, expected 30 \(or 60\)"),
        (changed(actions=np.zeros((20, 8))), "actions have 8 numbers, expected 9"),
        (changed(observations=NAN), r"observations contain NaN or infinity, first in row 5 \(2 rows\)"),
        (changed(actions=np.zeros((19, 9))), "numbers of rows disagree"),
        (changed(terminals=np.zeros((20, 1))), r"terminals have shape \(20, 1\)"),
        (changed(actions=np.full((20, 9), b"x")), "actions are not numbers"),
        (changed(terminals=np.zeros(20), timeouts=np.zeros(20)), "where episodes end is unknown"),
        ({key: value[:0] for key, value in changed().items()}, "is empty"),
    ],
)
def test_bad_hdf5_content(tmp_path, arrays, message):
    path = write_hdf5(tmp_path / "bad.hdf5", arrays)
    with pytest.raises(DataError, match=message) as error:
        read_data("kitchen", path)
    assert str(path) in str(error.value)


def test_actions_beyond_the_policies_are_told(tmp_path, capsys):
    read_data("kitchen", write_hdf5(tmp_path / "a.hdf5", changed(actions=np.full((20, 9), 1.5))))
    assert "actions reach 1.50, beyond the [-1, 1] of the policies" in capsys.readouterr().out


def test_files_that_are_nothing_we_know(tmp_path):
    whole = write_hdf5(tmp_path / "whole.hdf5", flat(make_episodes("kitchen", lengths=(900,)))).read_bytes()
    path = tmp_path / "x.hdf5"
    for content, message in [
        (whole[: len(whole) // 2], "x.hdf5 is not a complete HDF5 file .* fetch or copy it again"),
        (b"<html>404</html>", "x.hdf5 is not an HDF5 file"),
        (b"", "is not an HDF5 file"),
        (b"\x1f\x8b\x08", "is damaged or incomplete"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_data("kitchen", path)
    path = path.rename(tmp_path / "x")
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(DataError, match="is a zip archive, which has to be extracted first"):
        read_data("calvin", path)
    path.write_text("some text")
    with pytest.raises(DataError, match="is neither an HDF5 file nor a pickle nor a table"):
        read_data("calvin", path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError, match="folder holds no data that we know; expected was the extracted CALVIN folder"):
        read_data("calvin", tmp_path / "folder")
    with pytest.raises(DataError, match="nothing does not exist; expected was an HDF5 file in D4RL's layout, a folder"):
        read_data("maze", tmp_path / "nothing")
    with pytest.raises(DataError, match="'cooking'; known tasks: maze, kitchen"):
        read_data("cooking", path)


# --------------------------------------------------------------------------------------------------------------- Minari


def write_minari(folder, dataset_id="D4RL/kitchen/mixed-v2", width=59, lengths=LENGTHS, **metadata):
    """Write a Minari data set as version 0.5 does; return the episodes as the task sees them."""
    episodes = make_episodes("kitchen", obs_width=width, extra_rows=1, lengths=lengths, dtype=np.float64)
    arrays = {}
    for number, (observations, actions) in enumerate(episodes):
        group = f"episode_{number}"
        arrays[f"{group}/observations/observation"] = observations
        arrays[f"{group}/observations/desired_goal/kettle"] = np.zeros((len(observations), 7))
        arrays[f"{group}/actions"] = actions
        arrays[f"{group}/terminations"] = np.zeros(len(actions), dtype=bool)
        arrays[f"{group}/truncations"] = np.arange(len(actions)) == len(actions) - 1
        arrays[f"{group}/rewards"] = np.zeros(len(actions))
    write_hdf5(folder / "data" / "main_data.hdf5", arrays)
    metadata = {"dataset_id": dataset_id, "total_episodes": len(lengths)} | metadata
    (folder / "data" / "metadata.json").write_text(json.dumps(metadata))
    return [(np.concatenate([obs[:, :9], obs[:, 18:39]], axis=1), actions) for obs, actions in episodes]


def test_minari(tmp_path, capsys):
    lengths = (3, 1, *[2] * 10)  # more than ten: "episode_10" must not come before "episode_2"
    episodes = write_minari(tmp_path / "mixed", lengths=lengths)
    for path in (tmp_path / "mixed", tmp_path / "mixed" / "data", tmp_path / "mixed" / "data" / "main_data.hdf5"):
        dataset = read_data("kitchen", path, progress=False)
        check(dataset, episodes, "minari")
    line = capsys.readouterr().out
    assert "Minari's D4RL/kitchen/mixed-v2" in line and "12 episodes, 24 steps; re-simulated" in line
    assert dataset.attributes["dataset_id"] == "D4RL/kitchen/mixed-v2" and dataset.timeouts.sum() == 12
    write_minari(tmp_path / "partial", "D4RL/kitchen/partial-v2")
    assert read_data("kitchen", tmp_path / "partial").attributes["source"] == "minari-partial"


def test_bad_minari(tmp_path):
    write_minari(tmp_path / "maze", "D4RL/pointmaze/large-v2")
    for task in ("kitchen", "maze"):
        with pytest.raises(DataError, match=f"is D4RL/pointmaze/large-v2, which is no data of {task}"):
            read_data(task, tmp_path / "maze")
    write_minari(tmp_path / "narrow", width=58)
    with pytest.raises(DataError, match=r"episode 0, has observations \(8, 58\), the kitchen's are \(T \+ 1, 59\)"):
        read_data("kitchen", tmp_path / "narrow")
    write_minari(tmp_path / "few", total_episodes=621)
    with pytest.raises(DataError, match="has 3 of the 621 episodes"):
        read_data("kitchen", tmp_path / "few")
    write_minari(tmp_path / "cut")
    with h5py.File(tmp_path / "cut" / "data" / "main_data.hdf5", "a") as file:
        del file["episode_1/actions"]
    with pytest.raises(DataError, match="is not a complete HDF5 file .*actions"):
        read_data("kitchen", tmp_path / "cut")
    (tmp_path / "cut" / "data" / "main_data.hdf5").unlink()
    with pytest.raises(DataError, match="only its HDF5 format can be read"):
        read_data("kitchen", tmp_path / "cut")


# ---------------------------------------------------------------------------------------------------------------- SPiRL


def write_rollout(path, observations, actions, padding=0, **changes):
    """Write one roll-out: pad_mask is 0 in the last step of the episode and in the padding after it."""
    arrays = {
        "states": np.concatenate([observations, np.zeros((padding, observations.shape[1]), np.float32)]),
        "actions": np.concatenate([actions, np.zeros((padding, actions.shape[1]), np.float32)]),
        "pad_mask": (np.arange(len(actions) + padding) < len(actions) - 1).astype(np.float64),
        "images": np.zeros((len(actions) + padding, 4, 4, 3), np.uint8),
    } | changes
    arrays = {f"traj0/{key}": value for key, value in arrays.items() if value is not None}
    return write_hdf5(path, arrays | {"traj_per_file": 1})


def test_spirl_rollouts(tmp_path, capsys):
    lengths = tuple(range(3, 15))
    episodes = make_episodes("maze", lengths=lengths)
    for number, episode in enumerate(episodes):  # rollout_10 comes after rollout_9
        write_rollout(tmp_path / "maze" / f"rollout_{number}.h5", *episode, padding=3 * (number % 2))
    dataset = read_data("maze", tmp_path / "maze", progress=False)
    check(dataset, episodes, "spirl")
    assert dataset.terminals.sum() == 12 and not dataset.timeouts.any()
    assert "SPiRL roll-outs" in capsys.readouterr().out
    check(read_data("maze", tmp_path / "maze" / "rollout_7.h5"), episodes[7:8], "spirl")


def test_skimos_cuts_of_calvin(tmp_path, capsys):
    episodes = make_episodes("calvin", obs_width=39)
    for number, (observations, actions) in enumerate(episodes):
        write_rollout(tmp_path / "training" / f"{number}.h5", observations, actions)
    write_rollout(tmp_path / "training" / "3.h5", episodes[0][0][:-2], episodes[0][1])  # SkiMo drops these as well
    check(read_data("calvin", tmp_path, progress=False), episodes, "spirl", width=21)
    assert "1 episode(s) with fewer states than steps left out" in capsys.readouterr().out


def test_bad_rollouts(tmp_path):
    path, (episode, *_) = tmp_path / "rollout_0.h5", make_episodes("maze")
    for changes, message in [
        ({"pad_mask": None}, "rollout_0.h5 is not a complete roll-out file .*pad_mask"),
        ({"states": np.zeros(7)}, r"traj0, has observations \(7,\), actions \(7, 2\)"),
        ({"pad_mask": np.ones(6)}, r"traj0, has observations .* and ends \(6,\)"),
    ]:
        write_rollout(path, *episode, **changes)
        with pytest.raises(DataError, match=message):
            read_data("maze", tmp_path, progress=False)
    write_rollout(path, *episode)
    with h5py.File(path, "a") as file:
        file["traj_per_file"][()] = 2
    with pytest.raises(DataError, match="has 1 of 2 trajectories"):
        read_data("maze", path)
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(DataError, match="is not a complete roll-out file"):
        read_data("maze", tmp_path)
    write_rollout(path, *episode)
    write_rollout(tmp_path / "rollout_1.h5", np.zeros((5, 3)), np.zeros((5, 2)))
    with pytest.raises(DataError, match="differ between episodes"):
        read_data("maze", tmp_path)


# -------------------------------------------------------------------------------------------------------------- pickles


def write_pickle(path, content, protocol=4, numpy_1=False):
    data = pickle.dumps(content, protocol)
    if numpy_1:  # protocol 2 writes names without their length
        assert protocol == 2 and b"numpy._core" in data
        data = data.replace(b"numpy._core", b"numpy.core")
    path.write_bytes(gzip.compress(data))
    return path


def archive(episodes):
    """Return the content of the SkiMo release's archives."""
    dones = [(np.arange(len(actions)) == len(actions) - 1).astype(np.float32) for _, actions in episodes]
    return [{"obs": obs, "actions": actions, "dones": done} for (obs, actions), done in zip(episodes, dones)]


@pytest.mark.parametrize(("protocol", "numpy_1"), [(2, False), (2, True), (3, False), (4, False), (5, False)])
def test_skimos_archives(tmp_path, protocol, numpy_1):
    episodes = make_episodes("maze")
    path = write_pickle(tmp_path / "maze.gz", archive(episodes), protocol, numpy_1)
    dataset = read_data("maze", path, allow_pickle=True)
    check(dataset, episodes, "skimo-release")
    assert dataset.terminals.sum() == 3
    with pytest.raises(DataError, match="maze.gz is a pickle, a format that can hold programs: give --allow-pickle"):
        read_data("maze", path)


def test_other_forms_of_the_same_archive(tmp_path):
    episodes = make_episodes("kitchen", obs_width=60, extra_rows=1)  # with the last state of each episode
    entries = archive(episodes)
    entries[0]["obs"] = list(entries[0]["obs"])  # rows one by one
    entries[0]["dones"] = [bool(done) for done in entries[0]["dones"]]
    entries[1]["dones"] = list(entries[1]["dones"])  # NumPy scalars
    entries[1]["actions"] = np.asfortranarray(entries[1]["actions"])
    entries[2]["actions"] = entries[2]["actions"].astype(">f8")
    entries.append({"obs": np.zeros((2, 60)), "actions": np.zeros((3, 9)), "dones": np.zeros(3)})  # dropped by SkiMo
    entries[0]["extra"] = {"set": {1, 2}, "complex": 1j, "bytes": bytearray(b"x"), "none": None}
    for protocol in (2, 5):
        path = write_pickle(tmp_path / "kitchen.gz", entries, protocol)
        check(read_data("kitchen", path, allow_pickle=True), episodes, "skimo-release", width=30)
    path.write_bytes(pickle.dumps(entries))  # not compressed
    check(read_data("kitchen", path, allow_pickle=True), episodes, "skimo-release", width=30)


class Runs:
    """Pickles into a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, r"posix\.system"),
        (subprocess.check_output, r"(subprocess|commands)\.\w+"),
        (eval, r"(builtins|__builtin__)\.eval"),
        (exec, r"(builtins|__builtin__)\.exec"),
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (__import__, r"(builtins|__builtin__)\.__import__"),
        (open, r"_?io\.open"),
        (np.load, r"numpy\.load"),
        (np.fromfile, r"numpy.*\.fromfile"),
        (pickle.loads, r"_?pickle\.loads"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_programs_in_pickles_are_refused(tmp_path, function, name, protocol):
    proof = tmp_path / "it_ran"
    argument = f"open({str(proof)!r}, 'w')" if function in (eval, exec) else f"touch {proof}"
    path = write_pickle(tmp_path / "bad.gz", [*archive(make_episodes("maze")), Runs(function, argument)], protocol)
    with pytest.raises(DataError, match=rf"asks for {name}, which .* nothing of it was run"):
        read_data("maze", path, allow_pickle=True)
    assert os.listdir(tmp_path) == ["bad.gz"]


def test_dotted_names_and_foreign_codecs_are_refused(tmp_path):
    path = tmp_path / "bad.pickle"
    for program, message in [
        (b"\x80\x04\x8c\x08builtins\x8c\x0dstr.__class__\x93.", r"asks for builtins\.str\.__class__"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x04\x00\x00\x00zlib\x86R.", "asks for the codec 'zlib'"),
        (b"\x80\x02c__builtin__\neval\nX\x01\x00\x00\x001\x85R.", r"asks for __builtin__\.eval"),
        (b"\x80\x02X\x01\x00\x00\x00aQ.", "is damaged"),  # a persistent id
    ]:
        path.write_bytes(program)
        with pytest.raises(DataError, match=message):
            read_data("maze", path, allow_pickle=True)


def test_bad_pickles(tmp_path):
    entries = archive(make_episodes("maze"))
    path = write_pickle(tmp_path / "maze.gz", entries)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="maze.gz is damaged or incomplete"):
        read_data("maze", path, allow_pickle=True)
    for content, message in [
        ({"obs": 1}, r"a list of dict\(obs, actions, dones\) was expected"),
        ([{"obs": np.zeros((3, 4))}], r"a list of dict\(obs, actions, dones\) was expected"),
        ([], "has no episodes"),
        ([entries[0], {**entries[1], "actions": [[1.0], [1.0, 2.0]]}], "trajectory 1, holds something else"),
        ([{**entries[0], "obs": "seven"}], r"trajectory 0, holds something else than arrays of numbers \(str\)"),
        ([{**entries[0], "obs": np.array([[None] * 4])}], "asks for an array of 'O8'"),
        ([{**entries[0], "obs": np.array(["a"])}], "asks for an array of 'U1'"),
        ([{**entries[0], "obs": np.zeros((9, 4))}], "has 9 observations for 7 actions"),
    ]:
        with pytest.raises(DataError, match=message):
            read_data("maze", write_pickle(path, content), allow_pickle=True)


def test_damaged_pickles_never_raise_anything_else(tmp_path):
    whole = pickle.dumps(archive(make_episodes("maze", lengths=(2, 2))), 4)
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.pickle"
    outcomes = []
    for _ in range(300):
        damaged = bytearray(whole)
        for position in rng.integers(2, len(whole), size=3):
            damaged[position] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_data("maze", path, allow_pickle=True, accept_any_file=True)
        except DataError as error:
            outcomes.append(str(error))
    assert len(outcomes) > 200 and all(str(path) in outcome for outcome in outcomes)


# --------------------------------------------------------------------------------------------------------------- CALVIN

FRAMES = {"training": [(53_819, 53_829), (63_234, 63_240)], "validation": [(37_683, 37_690), (37_675, 37_682)]}


def make_frame(number):
    rng = np.random.default_rng(number)
    sizes = {"actions": 7, "rel_actions": 7, "robot_obs": 15, "scene_obs": 24}
    return {key: rng.uniform(-1, 1, size) for key, size in sizes.items()}


def write_calvin(folder, ranges=None, images=True):
    """Write the two folders of a split."""
    for name, recordings in (ranges or FRAMES).items():
        (folder / name).mkdir(parents=True)
        np.save(folder / name / "ep_start_end_ids.npy", np.array(recordings))
        for first, last in recordings:
            for number in range(first, last + 1):
                more = {"rgb_static": np.zeros((20, 20, 3), np.uint8)} if images else {}
                np.savez(folder / name / f"episode_{number:07d}.npz", **make_frame(number), **more)
    return folder


def expected_calvin(recordings, piece):
    """Return the episodes that the recordings should give."""
    episodes = []
    for first, last in sorted(recordings):
        frames = [make_frame(number) for number in range(first, last + 1)]
        observations = np.array([np.concatenate([f["robot_obs"], f["scene_obs"][:6]]) for f in frames])
        actions = np.array([f["rel_actions"] for f in frames])
        episodes += [(observations[i : i + piece], actions[i : i + piece]) for i in range(0, len(frames), piece)]
    return episodes


def test_calvin_folder(tmp_path, capsys, monkeypatch):
    folder = write_calvin(tmp_path / "task_D_D")
    recordings = FRAMES["training"] + FRAMES["validation"]
    check(read_data("calvin", folder, progress=False), expected_calvin(recordings, 500), "calvin")
    line = capsys.readouterr().out
    assert "CALVIN play data (training and validation)" in line and "4 episodes, 34 steps; 4 recordings" in line
    monkeypatch.setattr(sources, "PIECE", 4)
    dataset = read_data("calvin", folder, progress=True)
    check(dataset, expected_calvin(recordings, 4), "calvin")
    assert dataset.episode_lengths.tolist() == [4, 4, 4, 4, 4, 4, 3, 4, 3]
    assert "CALVIN frames: 100%" in capsys.readouterr().err
    check(read_data("calvin", folder / "training"), expected_calvin(FRAMES["training"], 4), "calvin")


def write_table(path, recordings, compressed=True):
    """Write the frames as the public script prints them."""
    lines = []
    for number in (number for first, last in recordings for number in range(first, last + 1)):
        lines.append(
            "\t".join([f"{number:07d}", *map(str, np.concatenate(list(make_frame(number).values())).tolist())])
        )
    text = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(text) if compressed else text)
    return path


def test_tables_are_the_same_as_the_frames(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "PIECE", 4)
    frames = read_data("calvin", write_calvin(tmp_path / "frames"), progress=False)
    (tmp_path / "tables").mkdir()
    # One of them not compressed, and the recordings (which follow each other directly) in one run.
    training = write_table(tmp_path / "tables" / "D-training.tsv", FRAMES["training"], compressed=False)
    write_table(tmp_path / "tables" / "D-validation.tsv.gz", sorted(FRAMES["validation"]))
    tables = read_data("calvin", tmp_path / "tables", progress=False)
    assert tables.fingerprint == frames.fingerprint and tables.attributes["source"] == "calvin"
    assert "D-training.tsv and D-validation.tsv.gz" in capsys.readouterr().out
    training = training.rename(tmp_path / "any_name")
    check(read_data("calvin", training), expected_calvin(FRAMES["training"], 4), "calvin")


def test_real_recordings_give_the_papers_number_of_trajectories():
    lengths = np.diff([*sources.RECORDING_STARTS, sources.LAST_FRAME + 1])
    assert len(lengths) == 35 and lengths.sum() == 512_077 + 99_022
    arrays, attributes = sources._cut(np.zeros((611_099, 1)), np.zeros((611_099, 1)), lengths.tolist(), "D")
    assert arrays["timeouts"].sum() == 1239  # the paper's
    assert attributes["note"] == "35 recordings cut into pieces of 500 steps"


def test_bad_calvin_folders(tmp_path):
    folder = write_calvin(tmp_path / "D", {"training": [(0, 9)]})
    frame = folder / "training" / "episode_0000004.npz"
    with pytest.raises(DataError, match="is CALVIN's, but the task is kitchen; expected was D4RL's"):
        read_data("kitchen", folder)
    for change, message in [
        ({"rel_actions": np.zeros(6)}, r"0000004.npz: rel_actions is float64 \(6,\), expected were 7 floating"),
        ({"robot_obs": np.full(15, np.nan)}, "0000004.npz: robot_obs contains NaN"),
        ({"scene_obs": np.array([{}] * 24)}, "0000004.npz is damaged or no CALVIN frame .*allow_pickle"),
    ]:
        np.savez(frame, **make_frame(4) | change)
        with pytest.raises(DataError, match=message):
            read_data("calvin", folder, progress=False)
    np.savez(frame, rel_actions=np.zeros(7))
    with pytest.raises(DataError, match="0000004.npz is damaged or no CALVIN frame .*robot_obs"):
        read_data("calvin", folder, progress=False)
    frame.write_bytes(frame.read_bytes()[:100])
    with pytest.raises(DataError, match="0000004.npz is damaged"):
        read_data("calvin", folder, progress=False)
    frame.unlink()
    (folder / "training" / "episode_0000007.npz").unlink()
    with pytest.raises(DataError, match=r"training lacks 2 of the 10 frames .* \(4, 7\): extract the archive again"):
        read_data("calvin", folder)

    ids = folder / "training" / "ep_start_end_ids.npy"
    for ranges, message in [
        (np.arange(4), r"has shape \(4,\)"),
        (np.zeros((1, 2)), r"has shape \(1, 2\) \(float64\)"),
        (np.array([[5, 2]]), "has a recording that ends before it starts"),
        (np.array([[{}, {}]]), "is damaged .*allow_pickle"),
    ]:
        np.save(ids, ranges)
        with pytest.raises(DataError, match=f"ep_start_end_ids.npy {message}"):
            read_data("calvin", folder)
    ids.unlink()
    with pytest.raises(DataError, match="has frames of CALVIN but no ep_start_end_ids.npy"):
        read_data("calvin", folder / "training")


def test_recordings_of_other_scenes(tmp_path):
    folder = write_calvin(tmp_path / "ABC", {"training": [(700_000, 700_003)]}, images=False)
    table = write_table(tmp_path / "ABC-training.tsv.gz", [(700_000, 700_003)])
    for path in (folder, table):
        with pytest.raises(DataError, match="has frame 700003, but split D, whose scene is the task's, ends at 611098"):
            read_data("calvin", path)
    assert len(read_data("calvin", folder, accept_any_file=True, progress=False)) == 4


def test_bad_tables(tmp_path):
    path = tmp_path / "D-training.tsv.gz"
    write_table(path, [(0, 3), (6, 9)])
    with pytest.raises(DataError, match="lacks the frames 4 to 5: fetch it again"):
        read_data("calvin", path, progress=False)
    write_table(path, [(0, 3), (2, 5)])
    with pytest.raises(DataError, match="has frame 2 more than once"):
        read_data("calvin", path, progress=False)
    with pytest.raises(DataError, match="is CALVIN's, but the task is maze"):
        read_data("maze", path)
    write_table(path, [(0, 3)], compressed=False)
    text = path.read_bytes()
    for content, message in [
        (text[:-400], "a line has other than 54 columns"),
        (re.sub(rb"(?m)^0000002\t", b"two\t", text), "damaged or no table of CALVIN's numbers .*two"),
        (gzip.compress(text)[:-30], "is damaged"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_data("calvin", path, progress=False)


# -------------------------------------------------------------------------------------------------------------- program


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_program_writes_one_file(tmp_path, monkeypatch, capsys):
    folder = write_calvin(tmp_path / "D")
    command = ["sources.py", "--task", "calvin", "--out", str(tmp_path / "calvin.hdf5"), "--data"]
    monkeypatch.setattr(sys, "argv", [*command, str(folder)])
    runpy.run_module("data_tools.sources", run_name="__main__")
    assert f"Wrote {tmp_path / 'calvin.hdf5'}" in capsys.readouterr().out
    written, direct = read_data("calvin", tmp_path / "calvin.hdf5"), read_data("calvin", folder, progress=False)
    assert written.fingerprint == direct.fingerprint and written.attributes == direct.attributes
    monkeypatch.setattr(sys, "argv", [*command, str(tmp_path / "x")])
    with pytest.raises(SystemExit, match="error: --data .*x does not exist"):
        runpy.run_module("data_tools.sources", run_name="__main__")
