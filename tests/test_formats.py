"""Readers of other people's data, on small files in their formats; the download, from a server on this machine."""

import gzip
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import data_tools
from data_tools import DataError, OfflineDataset
from data_tools.__main__ import convert
from data_tools.formats import calvin, d4rl, download, minari, read_data

LENGTHS = (7, 4, 9)  # steps of the episodes in most files here
WIDTHS = {"maze": (4, 2), "kitchen": (30, 9), "calvin": (21, 7)}
WIDER = {"maze": None, "kitchen": 60, "calvin": 39}


def read(task, path):
    """Read data as a task does."""
    return read_data(path, *WIDTHS[task], WIDER[task], progress=False)


def make_episodes(task, obs_width=None, extra_rows=0, lengths=LENGTHS, dtype=np.float32):
    """Return [(observations (T + extra_rows, O), actions (T, A)), ...] of random numbers."""
    rng = np.random.default_rng(0)
    episodes = []
    for length in lengths:
        observations = rng.uniform(-1, 1, (length + extra_rows, obs_width or WIDTHS[task][0])).astype(dtype)
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
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    check(read("kitchen", path), episodes, "hdf5", width=30)
    assert f"SHA-256 {found}" in capsys.readouterr().out
    monkeypatch.setitem(d4rl.SOURCES, "d4rl", ("D4RL kitchen-mixed-v0", found))
    check(read("kitchen", str(path)), episodes, "d4rl", width=30)
    line = capsys.readouterr().out
    assert line.startswith(f"Data: D4RL kitchen-mixed-v0 from {path}: 3 episodes, 20 steps; split where terminals")
    assert "603" in line and line.count("\n") == 1 and "SHA" not in line


def test_files_in_d4rls_layout(tmp_path):
    episodes = make_episodes("kitchen")
    dataset = read("kitchen", write_hdf5(tmp_path / "a.hdf5", flat(episodes)))
    check(dataset, episodes, "hdf5")
    dataset.save(tmp_path / "saved.hdf5")
    assert read("kitchen", tmp_path / "saved.hdf5").attributes == dataset.attributes  # the source stays known
    for task in ("maze", "calvin"):
        check(read(task, write_hdf5(tmp_path / task, flat(make_episodes(task)))), make_episodes(task), "hdf5")
    wide = make_episodes("kitchen", obs_width=60)
    path = write_hdf5(tmp_path / "b.hdf5", flat(wide), seed=3)
    dataset = read("kitchen", path)
    check(dataset, wide, "hdf5", width=30)
    assert dataset.attributes["seed"] == 3


def test_our_own_maze_file(tiny_data_file):
    dataset = read("maze", tiny_data_file)
    assert dataset.fingerprint == OfflineDataset.load(tiny_data_file).fingerprint
    assert dataset.source == "scripted"


def test_data_of_another_task_are_refused(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", flat(make_episodes("kitchen")))
    with pytest.raises(DataError, match="a.hdf5 has 30 numbers per observation and 9 per action, the task has 4 and 2"):
        read("maze", path)
    arrays = flat(make_episodes("kitchen")) | {"terminals": np.zeros(20, dtype=[("end", bool), ("step", int)])}
    with pytest.raises(DataError, match="b.hdf5: terminals are .*, expected True and False"):
        read("kitchen", write_hdf5(tmp_path / "b.hdf5", arrays))


def test_an_attribute_called_source_does_not_make_a_file_ours(tmp_path, capsys):
    episodes = make_episodes("kitchen")
    no_ends = flat(episodes) | {"terminals": np.zeros(20), "timeouts": np.zeros(20)}
    with pytest.raises(DataError, match="has no ends of episodes"):
        read("kitchen", write_hdf5(tmp_path / "no_ends.hdf5", no_ends, source="scripted"))
    for attributes in ({"source": "my robot\nof May"}, {"source": [1.0, 2.0], "note": "two\nlines"}):
        path = write_hdf5(tmp_path / "a.hdf5", flat(episodes), **attributes)
        check(read("kitchen", path), episodes, "hdf5")
        line = capsys.readouterr().out
        assert line.startswith("Data: data in D4RL's layout from") and line.count("\n") == 1 and "SHA-256" in line


def test_files_that_were_read_and_saved_keep_their_source(tmp_path, capsys):
    for source, (description, known) in d4rl.SOURCES.items():
        path = write_hdf5(tmp_path / "a.hdf5", flat(make_episodes("kitchen")), source=source, note="kept")
        assert read("kitchen", path).attributes == {"source": source, "note": "kept", "description": description}
        assert ("SHA-256" in capsys.readouterr().out) == (not known)


@pytest.mark.parametrize(
    ("largest", "line"),
    [
        (1.0, None),
        (1.05, r"warning: actions reach 1.05, beyond the \[-1, 1\] of the policies: .*a.hdf5"),
        (0.01, "warning: actions reach only 0.01: are they scaled"),
        (2.0, DataError),
        (100.0, DataError),
    ],
)
def test_actions_beyond_the_policies(tmp_path, capsys, largest, line):
    path = write_hdf5(tmp_path / "a.hdf5", flat(make_episodes("kitchen")) | {"actions": np.full((20, 9), largest)})
    if line is DataError:
        with pytest.raises(DataError, match=rf"a.hdf5: actions reach {largest:g}: scale actions to \[-1, 1\]"):
            read("kitchen", path)
        return
    read("kitchen", path)
    said = capsys.readouterr().out
    assert re.match(line, said) if line else "warning" not in said


def test_one_kind_of_ends_is_enough(tmp_path):
    whole = flat(make_episodes("kitchen"))
    ends = whole["terminals"] | whole["timeouts"]
    for kind in ("terminals", "timeouts"):
        arrays = {"observations": whole["observations"], "actions": whole["actions"], kind: ends.astype(np.float32)}
        dataset = read("kitchen", write_hdf5(tmp_path / "a.hdf5", arrays))
        assert dataset.episode_lengths.tolist() == list(LENGTHS)
        assert torch.equal(getattr(dataset, kind), torch.tensor(ends))
    arrays = {"observations": whole["observations"], "actions": whole["actions"], "terminals": 0 * ends}
    with pytest.raises(DataError, match="has no ends of episodes, .*: add `timeouts` .*True at the last row"):
        read("kitchen", write_hdf5(tmp_path / "a.hdf5", arrays))


def without(arrays, *keys, **more):
    return {key: value for key, value in arrays.items() if key not in keys} | more


SOUND = flat(make_episodes("kitchen"))
OWN = "; give other data, or write it with OfflineDataset.from_episodes"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (without(SOUND, "terminals", "timeouts", dones=np.zeros(20)), "has actions, dones, observations, but no term"),
        (without(SOUND, "observations", obs=np.zeros((20, 30))), "has actions, obs, .*, but no observations: give"),
        ({"data/demo_0/actions": np.zeros((20, 9))}, "has data, but no observations, no actions, no terminals or time"),
        ({}, "has nothing, but no observations"),
        (without(SOUND, observations=np.zeros((5, 4, 30))), r"observations have shape \(5, 4, 30\), expected 2"),
        (without(SOUND, observations=np.ones((20, 59))), "60 are read, too.*columns 0-8 and 18-38 are the 30"),
        (without(SOUND, observations=np.ones((20, 31))), r"31 numbers .* 30 and 9 \(60 are read, too.*of this task"),
        (without(SOUND, actions=np.ones((20, 9), int)), "actions are int64, expected floating-point"),
    ],
)
def test_sound_files_of_another_kind_say_what_they_have(tmp_path, arrays, message):
    """Nobody is told to fetch or to delete a file whose bytes are sound."""
    with pytest.raises(DataError, match=message) as refused:
        read("kitchen", write_hdf5(tmp_path / "a.hdf5", arrays))
    assert not re.search("fetch|damaged|delete", str(refused.value))


def test_a_file_that_is_in_use_or_compressed_in_an_unknown_way_is_not_damaged(tmp_path):
    arrays = flat(make_episodes("kitchen"))
    path = write_hdf5(tmp_path / "a.hdf5", without(arrays, "actions"))
    fork = multiprocessing.get_context("fork")  # a copy of this process, for the import of torch takes seconds
    is_open = fork.Event()

    def read_elsewhere():
        assert is_open.wait(60)
        with pytest.raises(DataError, match="is open in another program .*: close it there"):
            data_tools.load_dataset("kitchen", data=path)

    reader = fork.Process(target=read_elsewhere)
    reader.start()
    with h5py.File(path, "a") as file:
        options = dict(chunks=(20, 9), compression=32001, allow_unknown_filter=True)  # blosc
        file.create_dataset("actions", (20, 9), "f4", **options).id.write_direct_chunk((0, 0), b"blosc's bytes")
        is_open.set()
        reader.join(120)
    assert reader.exitcode == 0
    with pytest.raises(DataError, match="is compressed in a way that h5py does not know .*: write it with gzip"):
        read("kitchen", path)


# ------------------------------------------------------------------------------------------------- what tasks know

REAL = np.load(
    Path(__file__).parent / "data" / "kitchen_real_demo.npz"
)  # 9 joints, velocities, 21 of objects, velocities


@pytest.mark.parametrize(
    ("task", "change", "wrong", "refused"),
    [
        ("kitchen", lambda x: x[:, minari.COLUMNS], None, False),
        ("kitchen", lambda x: x[:, :30], "the kettle's height", True),
        ("kitchen", lambda x: x[:, 9:39], "arm joint 3", False),  # velocities first
        ("kitchen", lambda x: np.degrees(x[:, minari.COLUMNS]), "quaternion", True),
        ("kitchen", lambda x: np.roll(x[:, minari.COLUMNS], 21, 1), "the kettle's height", True),  # objects first
        ("kitchen", lambda x: x[:, minari.COLUMNS] / x[:, minari.COLUMNS].std(0), "the kettle's height", True),
        ("maze", lambda x: x, None, False),
        ("maze", lambda x: x / 40, "inside walls", True),
        ("maze", lambda x: x[:, [2, 3, 0, 1]], "inside walls", True),
        ("maze", lambda x: x[:, [1, 0, 2, 3]], "inside walls", True),
        ("maze", lambda x: x * [1, 1, 100, 100], "v_x", False),
        ("calvin", lambda x: x, None, False),
        ("calvin", lambda x: x[:, ::-1], "expected", True),
        ("calvin", lambda x: np.degrees(x), "tool z", True),
    ],
)
def test_observations_that_cannot_be_the_tasks(tmp_path, capsys, tiny_data_file, task, change, wrong, refused):
    if task == "kitchen":
        observations = REAL["observations"]
    elif task == "maze":
        observations = OfflineDataset.load(tiny_data_file).observations.numpy()
    else:
        envs = data_tools.make_envs("calvin", 1)
        observations = np.repeat(envs.reset(seed=0)[0], 20, 0)
        envs.close()
    rows = len(observations)
    actions = np.random.default_rng(0).uniform(-1, 1, (rows, WIDTHS[task][1]))
    arrays = {"observations": change(observations), "actions": actions, "timeouts": np.arange(1, rows + 1) % 10 == 0}
    path = write_hdf5(tmp_path / "a.hdf5", arrays)
    try:
        data_tools.load_dataset(task, data=path)
        said = capsys.readouterr().out
    except DataError as error:
        said = str(error)
    if wrong is None:
        assert said.startswith("Data: ") and said.count("\n") == 1
    else:
        assert wrong in said and ("has other observations" in said or said.startswith("warning: are these"))
    assert ("has other observations" in said) == refused


def test_observations_that_are_partly_wrong_are_told(tmp_path, capsys):
    observations = REAL["observations"][:, minari.COLUMNS].copy()
    observations[:50, 25] = 0.0
    arrays = {"observations": observations, "actions": REAL["actions"], "timeouts": np.arange(212) % 106 == 105}
    data_tools.load_dataset("kitchen", data=write_hdf5(tmp_path / "a.hdf5", arrays))
    assert re.match(
        r"warning: .*kettle's height .* is 0 to 1.\d+, .*\(24% are not\): .*a.hdf5\n", capsys.readouterr().out
    )


# --------------------------------------------------------------------------------------------------------------- Minari


def write_minari(folder, lengths=(7, 12, 1, 4), env_id="FrankaKitchen-v1", extra=None, **changes):
    """Write a data set as Minari 0.5.4 does; returns what should be read. extra: changes of episode_1."""
    facts = {"total_episodes": len(lengths), "data_format": "hdf5", "dataset_id": "test/kitchen-v0"}
    facts |= {"env_spec": json.dumps({"id": env_id, "kwargs": {}})} | changes
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "metadata.json").write_text(json.dumps(facts))
    rng = np.random.default_rng(0)
    episodes = []
    with h5py.File(folder / "data" / "main_data.hdf5", "w") as file:
        for i, length in enumerate(lengths):
            arrays = {
                "observations/observation": rng.uniform(-1, 1, (length + 1, 59)),
                "observations/achieved_goal/kettle": rng.normal(size=(length + 1, 7)),
                "actions": rng.uniform(-1, 1, (length, 9)),
                "terminations": np.arange(length) == length - 1 if i % 2 == 0 else np.zeros(length, bool),
                "truncations": np.arange(length) == length - 1,
                "rewards": np.zeros(length),
            } | ((extra or {}) if i == 1 else {})
            for key, value in arrays.items():
                file[f"episode_{i}/{key}"] = value
            observations = arrays["observations/observation"]
            episodes.append((np.concatenate([observations[:-1, :9], observations[:-1, 18:39]], 1), arrays["actions"]))
    return episodes


def test_minaris_kitchen(tmp_path, capsys):
    episodes = write_minari(tmp_path / "mixed-v2", lengths=(7, 12, 1, 4) + (2,) * 8)  # episode_10 follows episode_9
    for path in ("mixed-v2", "mixed-v2/data", "mixed-v2/data/main_data.hdf5"):
        dataset = read("kitchen", tmp_path / path)
        check(dataset, episodes, "minari")
        assert "Data: Minari's test/kitchen-v0" in capsys.readouterr().out
    assert dataset.terminals.sum() == dataset.timeouts.sum() == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(env_id="PointMaze_UMaze-v3"),
            "holds data of PointMaze_UMaze-v3; of Minari's data sets only those of Fra",
        ),
        (dict(env_id="FrankaKitchen-v2"), "holds data of FrankaKitchen-v2"),
        (dict(env_spec=None), "holds data of an environment without a name"),
        (dict(total_episodes=9), "has 4 of 9 episodes: fetch it again"),
        (dict(extra={"observations/observation": np.zeros((13, 60))}), r"episode_1 has observations \(13, 60\)"),
        (dict(extra={"observations/observation": np.zeros((12, 59))}), r"episode_1 has observations \(12, 59\)"),
        (dict(extra={"actions": np.full((12, 9), np.nan)}), "actions contain NaN"),
        (dict(lengths=()), "has no episodes"),
    ],
)
def test_other_data_sets_of_minari(tmp_path, changes, message):
    write_minari(tmp_path / "x", **changes)
    with pytest.raises(DataError, match=message):
        read("kitchen", tmp_path / "x")


def test_broken_folders_of_minari(tmp_path):
    data = tmp_path / "x" / "data"
    write_minari(tmp_path / "x", data_format="arrow")
    with h5py.File(data / "main_data.hdf5", "a") as file:
        del file["episode_2/terminations"]
    with pytest.raises(DataError, match="episode_2 has actions, observations, .*, but no terminations"):
        read("kitchen", data)
    (data / "main_data.hdf5").write_bytes(b"half")
    with pytest.raises(DataError, match="main_data.hdf5 is damaged .*: delete it, then fetch or copy it again"):
        read("kitchen", data)
    (data / "main_data.hdf5").unlink()
    with pytest.raises(DataError, match="has no main_data.hdf5 .data_format 'arrow'.: only Minari's format hdf5 is"):
        read("kitchen", data)
    (data / "metadata.json").write_text("{")
    with pytest.raises(DataError, match="metadata.json is damaged"):
        read("kitchen", data)


WHOLE = object()  # the first half of a real file


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (WHOLE, "is damaged .*: delete it, then fetch or copy it again"),
        (b"<html>404</html>", "is in no format that we know, its content begins with b'<html>40'"),
        (b"", "is in no format that we know, it is empty; expected was an HDF5 file .*give other data"),
        (gzip.compress(b"\x89HDF\r\n", mtime=0), r"is in no format that we know, its content begins with b'.x89HDF"),
        (b"\x1f\x8b\x08", "is damaged .*: delete it, then fetch or copy it again"),
    ],
)
def test_files_that_are_nothing_we_know(tmp_path, content, message):
    path = tmp_path / "x.hdf5"
    if content is WHOLE:
        content = write_hdf5(path, flat(make_episodes("kitchen", lengths=(900,)))).read_bytes()
        content = content[: len(content) // 2]
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"x.hdf5 {message}"):
        read("kitchen", path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "holds no data that we know, but nothing; expected"),
        ("nothing", "does not exist"),
        ("/dev/zero", "is not a regular file"),
    ],
)
def test_paths_that_are_no_files(tmp_path, name, message):
    with pytest.raises(DataError, match=message):
        read("calvin", tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- download

CONTENT = np.random.default_rng(0).bytes(2**18)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers with server.body, which may be a function of the path, or with an error status."""

    def do_GET(self):
        self.server.asked += 1
        if isinstance(self.server.body, int):
            self.send_error(self.server.body)
            return
        body = self.server.body
        if callable(body):
            body = body(self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8" if body[:1] == b"<" else "application/octet-stream")
        self.send_header("Content-Length", str(len(CONTENT) if body == CONTENT[:1000] else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.body = 0, CONTENT
    server.url = f"http://127.0.0.1:{server.server_port}/file.hdf5"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def fetch(server, folder):
    return d4rl.fetch_kitchen(folder, progress=False, url=server.url, sha256=SHA256)


def test_fetched_once_by_all_who_start_together(server, tmp_path, capsys):
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: fetch(server, tmp_path / "new"), range(3)))
    assert paths == [tmp_path / "new" / "file.hdf5"] * 3
    assert paths[0].read_bytes() == CONTENT and server.asked == 1
    assert capsys.readouterr().out.count("Fetching") == 1


def test_a_file_in_a_read_only_folder_needs_no_lock(server, tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(download, "locked", refuse)
    with pytest.raises(DataError, match=r"cannot write .*file.hdf5 \(Permission denied\)"):
        fetch(server, tmp_path)
    path = tmp_path / "file.hdf5"
    path.write_bytes(CONTENT)
    assert fetch(server, tmp_path) == path and server.asked == 0
    path.write_bytes(b"another")
    with pytest.raises(DataError, match="file.hdf5 is not the published file .*: delete it, or move it"):
        fetch(server, tmp_path)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (CONTENT[:-1] + b"x", "is not the published file .*--data PATH"),
        (
            404,
            "cannot be fetched .*: try again later, .*--data PATH.*--data release.*minari download D4RL/kitchen/mixed",
        ),
        (CONTENT[:1000], "cannot be fetched"),  # it breaks off
        (None, "cannot be fetched"),  # there is no server
    ],
)
def test_what_a_server_does_not_deliver(server, tmp_path, body, message):
    server.body = body
    if body is None:
        server.url = "http://127.0.0.1:9/file.hdf5"
    with pytest.raises(DataError, match=message):
        fetch(server, tmp_path)
    assert not (tmp_path / "file.hdf5").exists()


PAGE = """<!DOCTYPE html><html><head><title>Google Drive - Virus scan warning</title></head><body>
<form id="download-form" action="/download" method="get"><input type="submit" value="Download anyway"/>
<input type="hidden" name="id" value="{id}"><input type="hidden" name="export" value="download">
<input type="hidden" name="confirm" value="t"><input type="hidden" name="uuid" value="12-ab"></form></body></html>"""
QUOTA = b"<html><head><title>Google Drive - Quota exceeded</title></head><body>Too many users</body></html>"


@pytest.fixture
def drive(server, tmp_path, monkeypatch):
    """Google Drive with the release's archive of the maze; returns the server."""
    content = write_pickle(tmp_path / "published", archive(maze_episodes())).read_bytes()

    def answer(path):
        if path.startswith("/uc?export=download&id=1GWo8Vr8Xqj7CfJs7TaDsUA6ELno4grKJ"):
            return PAGE.format(id="1GWo8").encode()
        assert path == "/download?id=1GWo8&export=download&confirm=t&uuid=12-ab"
        return server.content

    server.content, server.body = content, answer
    url = f"http://127.0.0.1:{server.server_port}/uc?export=download&id="
    monkeypatch.setattr(download, "DRIVE", url)
    return server


def maze_episodes():
    """Episodes at a place between the maze's walls."""
    return [(np.float32([1, 1, 0, 0]) + 0 * observations, actions) for observations, actions in make_episodes("maze")]


def test_the_authors_archive_by_one_word(drive, tmp_path, capsys):
    folder = tmp_path / "cache"
    checksum = hashlib.sha256(drive.content).hexdigest()
    check(data_tools.load_dataset("maze", folder, "release", progress=False), maze_episodes(), "skimo-release")
    assert f"maze.gz: SHA-256 {checksum}" in capsys.readouterr().out and drive.asked == 2
    assert (folder / "maze.gz.sha256").read_text() == f"{checksum}  maze.gz\n"
    again = data_tools.load_dataset("maze", folder, "release", progress=False)
    check(again, maze_episodes(), "skimo-release")
    assert drive.asked == 2 and "release_maze.hdf5: 3 episodes" in capsys.readouterr().out
    (folder / "maze.gz").unlink()  # the HDF5 file is enough
    assert data_tools.load_dataset("maze", folder, "release").fingerprint == again.fingerprint and drive.asked == 2
    (folder / "release_maze.hdf5").unlink()
    drive.content = write_pickle(tmp_path / "other", archive(maze_episodes()[:2])).read_bytes()
    with pytest.raises(DataError, match="is not the file of the first fetch, which .*maze.gz.sha256 names"):
        data_tools.load_dataset("maze", folder, "release")
    (folder / "maze.gz").write_bytes(drive.content)
    with pytest.raises(DataError, match="maze.gz is not the file that was fetched first, .*: delete it, or move it"):
        data_tools.load_dataset("maze", folder, "release")
    assert {path.suffix for path in folder.iterdir()} == {".gz", ".sha256", ".lock"}


def test_an_archive_that_broke_off_is_not_the_first(drive, tmp_path):
    whole, drive.content = drive.content, drive.content[:-30]
    for _ in range(2):
        with pytest.raises(DataError, match="maze.gz is damaged .*: delete it, then fetch or copy it again"):
            data_tools.load_dataset("maze", tmp_path, "release", progress=False)
    (tmp_path / "maze.gz").unlink()
    drive.content = whole
    check(data_tools.load_dataset("maze", tmp_path, "release", progress=False), maze_episodes(), "skimo-release")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (QUOTA, r"gave a page instead of the file \('Google Drive - Quota exceeded'\): try again later"),
        (lambda path: PAGE.encode() if "/uc" in path else QUOTA, "gave a page .*Quota"),
        (b"text", "gave a page instead of the file .'text'.: .*--data d4rl"),
        (503, r"cannot be fetched \(HTTPError\): try again later"),
    ],
)
def test_what_drive_does_not_deliver(drive, tmp_path, body, message):
    drive.body = body
    with pytest.raises(DataError, match=message):
        data_tools.load_dataset("maze", tmp_path / "cache", "release", progress=False)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} <= {".lock"}


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
    dataset = read("maze", path)
    check(dataset, episodes, "skimo-release")
    assert dataset.terminals.sum() == 3


def test_other_forms_of_the_same_archive(tmp_path):
    episodes = make_episodes("kitchen", obs_width=60, extra_rows=1)  # with the last state of each episode
    entries = archive(episodes)
    entries[0]["obs"] = list(entries[0]["obs"])  # rows one by one
    entries[0]["dones"] = [bool(done) for done in entries[0]["dones"]]
    entries[1]["dones"] = list(np.zeros(4, np.float32))  # NumPy scalars; it ends without being done
    entries[1]["actions"] = np.asfortranarray(entries[1]["actions"])
    entries[2]["actions"] = entries[2]["actions"].astype(">f8")
    entries.append({"obs": np.zeros((2, 60)), "actions": np.zeros((3, 9)), "dones": np.zeros(3)})  # dropped by SkiMo
    entries[0]["extra"] = {"set": {1, 2}, "complex": 1j, "bytes": bytearray(b"x"), "none": None}
    for protocol in (2, 5):
        path = write_pickle(tmp_path / "kitchen.gz", entries, protocol)
        check(read("kitchen", path), episodes, "skimo-release", width=30)
    path.write_bytes(pickle.dumps(entries))  # not compressed
    check(read("kitchen", path), episodes, "skimo-release", width=30)


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
        (getattr, r"(builtins|__builtin__)\.getattr"),
        (np.load, r"numpy\.load"),
        (torch.load, r"torch\.serialization\.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_programs_in_pickles_are_refused(tmp_path, function, name, protocol):
    proof = tmp_path / "it_ran"
    argument = f"open({str(proof)!r}, 'w')" if function is eval else f"touch {proof}"
    path = write_pickle(tmp_path / "bad.gz", [*archive(make_episodes("maze")), Runs(function, argument)], protocol)
    with pytest.raises(DataError, match=rf"asks for {name}, which .* nothing of it was run"):
        read("maze", path)
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
            read("maze", path)


ENTRY, OTHER = archive(make_episodes("maze"))[:2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"obs": 1}, rf"what it holds is: dict of obs\): a list of dict\(obs, actions, dones\), .* was expected{OWN}"),
        ([], rf"what it holds is: an empty list\): a list of dict\(obs, actions, dones\), .* was expected{OWN}"),
        (np.zeros((3, 4)), rf"what it holds is: array\): a list .*{OWN}"),
        ([np.zeros((3, 4))], rf"trajectory 0 is: array\): a list .*{OWN}"),
        (
            [{"observations": 1, "actions": 2}],
            rf"no archive .*trajectory 0 is: dict of observations, actions\): a list .*{OWN}",
        ),
        ([ENTRY, {**OTHER, "actions": [[1.0], [1.0, 2.0]]}], rf"maze.gz is no archive of the release .*{OWN}"),
        ([{**ENTRY, "obs": "seven"}], rf"maze.gz is no archive of the release .*an array was expected, not str.*{OWN}"),
        ([{**ENTRY, "obs": np.array([[None] * 4])}], "asks for an array of 'O8'"),
        ([{**ENTRY, "obs": np.zeros((9, 4))}], r"trajectory 0 has observations \(9, 4\), actions \(7, 2\)"),
        ([{**ENTRY, "actions": np.zeros((7, 3))}, OTHER], "maze.gz is no archive of the release"),
        ([{**ENTRY, "obs": np.ones((7, 4), int)}], "observations are int64, expected floating-point"),
        ([{**ENTRY, "dones": np.array([0, 0, np.nan, 0, 0, 0, 1.0])}, OTHER], "terminals are float64, expect"),
        ([{**ENTRY, "dones": np.array([0, 0, 0, 0, 0, 0, 0.3])}, OTHER], "terminals are float64, expect"),
    ],
)
def test_bad_pickles(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read("maze", write_pickle(tmp_path / "maze.gz", content))


def test_cut_and_nested_pickles(tmp_path):
    path = write_pickle(tmp_path / "maze.gz", [ENTRY, OTHER])
    nest = b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b"."  # a list in a list in a list ...
    messages = (
        "maze.gz is damaged .*: delete it, then fetch or copy it again",
        "maze.gz is no archive .*trajectory 0 is: list",
    )
    for content, message in zip((path.read_bytes()[:-40], nest), messages):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read("maze", path)


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
            read("maze", path)
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
    check(read("calvin", folder), expected_calvin(recordings, 500), "calvin")
    line = capsys.readouterr().out
    assert "CALVIN play data (training and validation)" in line and "4 episodes, 34 steps; 4 recordings" in line
    monkeypatch.setattr(calvin, "PIECE", 4)
    dataset = read("calvin", folder)
    check(dataset, expected_calvin(recordings, 4), "calvin")
    assert dataset.episode_lengths.tolist() == [4, 4, 4, 4, 4, 4, 3, 4, 3]
    check(read("calvin", folder / "training"), expected_calvin(FRAMES["training"], 4), "calvin")


# First frame of each recording of split D, from the folders' ep_start_end_ids.npy as printed in
# https://github.com/denizyuret/calvin-scripts.
RECORDING_STARTS = (
    *(0, 37683, 53819, 63234, 84216, 103126, 122177, 147554, 166339, 197178, 219635, 244285, 272719, 298926, 308070),
    *(331367, 342790, 349364, 358482, 361253, 370058, 381897, 399946, 420499, 438873, 465068, 477460, 497303, 517044),
    *(539755, 553567, 555242, 578258, 589067, 593879),
)


def test_real_recordings_give_the_papers_number_of_trajectories():
    lengths = np.diff([*RECORDING_STARTS, calvin.LAST_FRAME + 1])
    assert len(lengths) == 35 and lengths.sum() == 512_077 + 99_022
    arrays, attributes = calvin._cut(np.zeros((611_099, 1)), np.zeros((611_099, 1)), lengths.tolist(), "D")
    assert arrays["timeouts"].sum() == 1239  # the paper's
    assert attributes["note"] == "35 recordings cut into pieces of 500 steps"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rel_actions": np.zeros(6)}, r"0000004.npz: rel_actions is float64 \(6,\), expected 7 floats: give"),
        ({"robot_obs": np.full(15, np.nan)}, "D: observations contain NaN or infinity, first in row 4"),
        ({"scene_obs": np.array([{}] * 24)}, "0000004.npz is damaged .*allow_pickle"),
        (b"PK", "0000004.npz is damaged .*: extract it again"),
        (None, "training lacks some of the frames 0 to 9: extract the archive again"),
    ],
)
def test_bad_frames(tmp_path, change, message):
    folder = write_calvin(tmp_path / "D", {"training": [(0, 9)]}, images=False)
    frame = folder / "training" / "episode_0000004.npz"
    if change is None:
        frame.unlink()
    elif isinstance(change, bytes):
        frame.write_bytes(change)
    else:
        np.savez(frame, **make_frame(4) | change)
    with pytest.raises(DataError, match=message):
        read("calvin", folder)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        (np.arange(4), r"is not CALVIN's .*it has shape \(4,\)"),
        (np.zeros((1, 2)), r"is not CALVIN's .*it has shape \(1, 2\) \(float64\)"),
        (np.array([[5, 2]]), "a recording ends before it starts"),
        (np.array([[{}, {}]]), "is damaged .*allow_pickle"),
        (np.array([[0, 10**18]]), "lacks some of the frames"),  # at once
        (np.array([[0, 9], [5, 9]]), "has frame 5 in two recordings"),
    ],
)
def test_bad_lists_of_recordings(tmp_path, ranges, message):
    folder = write_calvin(tmp_path / "D", {"training": [(0, 9)]}, images=False)
    np.save(folder / "training" / "ep_start_end_ids.npy", ranges)
    with pytest.raises(DataError, match=message):
        read("calvin", folder)


def test_calvins_halves_are_whole_and_of_this_task(tmp_path):
    folder = write_calvin(tmp_path / "D", {"training": [(0, 9)], "validation": [(20, 29)]}, images=False)
    with pytest.raises(DataError, match="has 21 numbers per observation and 7 per action, the task has 30 and 9"):
        read("kitchen", folder)
    (folder / "training" / "ep_start_end_ids.npy").unlink()
    with pytest.raises(DataError, match="training/ep_start_end_ids.npy is missing"):
        read("calvin", folder)
    with pytest.raises(DataError, match="has frames of CALVIN but no ep_start_end_ids.npy"):
        read("calvin", folder / "training")


def test_recordings_of_other_scenes(tmp_path):
    folder = write_calvin(tmp_path / "ABC", {"training": [(700_000, 700_003)]}, images=False)
    with pytest.raises(DataError, match="has frame 700003, but split D, whose scene is the task's, ends at 611098"):
        read("calvin", folder)


# -------------------------------------------------------------------------------------------------------------- program


def test_convert_writes_one_file(tmp_path, capsys):
    folder = write_calvin(tmp_path / "D")
    out = tmp_path / "calvin.hdf5"
    convert("calvin", folder, out)
    assert f"Wrote {out}" in capsys.readouterr().out
    written, direct = read("calvin", out), read("calvin", folder)
    assert written.fingerprint == direct.fingerprint and written.attributes == direct.attributes


def test_an_error_ends_the_program_in_one_sentence(tmp_path):
    paths = ["--out", str(tmp_path / "calvin.hdf5"), "--data", str(tmp_path / "x")]
    command = [sys.executable, "-m", "data_tools", "convert", "--env-id", "calvin", *paths]
    done = subprocess.run(command, cwd=Path(data_tools.__file__).parents[1], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: {tmp_path / 'x'} does not exist: check the path.\n"
