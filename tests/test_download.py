"""The downloader against a local server that stalls, breaks off, lies and refuses; nothing here uses the internet."""

import hashlib
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from data_tools import DataError, sources
from data_tools import download as download_module
from data_tools.download import Unreachable, download, sha256_of

CONTENT = np.random.default_rng(0).bytes(2**18)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request as the n-th word of server.script says; the last word holds for all later ones."""

    def do_GET(self):
        server = self.server
        asked = self.headers.get("Range")
        number = len(server.asked)
        server.asked.append(asked)
        word = server.script[min(number, len(server.script) - 1)]
        if isinstance(word, int):
            self.send_error(word)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and word != "ignores ranges" else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        if word == "wrong bytes":
            body = bytes(len(body))
        elif word == "shorter":
            body = body[: len(body) // 3]
        elif word == "longer":
            body = body + b"more"
        self.send_response(206 if start else 200)
        if start:
            first = 0 if word == "other part" else start
            self.send_header("Content-Range", f"bytes {first}-{len(CONTENT) - 1}/{len(CONTENT)}")
        if word not in ("no length", "no length, longer", "no length, breaks off"):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if word in ("breaks off", "no length, breaks off"):
            self.wfile.write(body[: len(body) // 2])
        elif word == "no length, longer":
            self.wfile.write(body * 3)
        elif word == "stalls":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            server.released.wait(20)
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # the client went away, as it should


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download_module, "WAITS", (0.01, 0.01, 0.01))
    monkeypatch.setattr(download_module, "STALL_TIMEOUT", 0.5)
    monkeypatch.setenv("NO_PROXY", "*")
    server = Server(("127.0.0.1", 0), Handler)
    server.script, server.asked, server.released = ["works"], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/kitchen.hdf5"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def get(server, path, **changes):
    return download(server.url, path, **{"size": len(CONTENT), "sha256": SHA256, "progress": False} | changes)


def test_fetched_once_then_from_the_cache(server, tmp_path, capsys):
    path = tmp_path / "new" / "kitchen.hdf5"
    assert get(server, path) == path and path.read_bytes() == CONTENT
    assert f"Fetching {server.url} into {path}" in capsys.readouterr().out
    assert get(server, path) == path
    assert server.asked == [None] and capsys.readouterr().out == ""
    assert {file.name for file in path.parent.iterdir()} <= {"kitchen.hdf5", "kitchen.hdf5.lock"}


@pytest.mark.parametrize("fault", ["breaks off", "stalls", "no length, breaks off"])
def test_continued_after_a_break(server, tmp_path, fault):
    server.script = [fault, fault, "works"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked[0] is None and len(server.asked) == 3
    first, second = (int(asked.removeprefix("bytes=").removesuffix("-")) for asked in server.asked[1:])
    assert 100_000 < first < second < len(CONTENT)


def test_any_number_of_breaks_as_long_as_bytes_come(server, tmp_path):
    server.script = ["breaks off"] * 8 + ["works"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert len(server.asked) == 9


def test_continued_by_the_next_call(server, tmp_path):
    path = tmp_path / "file"
    server.script = ["breaks off", 503]
    with pytest.raises(Unreachable, match=r"503 Service Unavailable.*the first 131,072 of 262,144 bytes are kept"):
        get(server, path)
    assert not path.exists()
    server.script = ["works"]
    server.asked.clear()
    assert get(server, path).read_bytes() == CONTENT
    assert server.asked == ["bytes=131072-"]
    assert not (tmp_path / "file.part").exists()


def test_server_without_ranges_sends_everything_again(server, tmp_path):
    server.script = ["breaks off", "ignores ranges"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=131072-"]


def test_another_part_than_asked_for_is_not_appended(server, tmp_path):
    server.script = ["breaks off", "other part", "works"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=131072-", None]


@pytest.mark.parametrize("size", [len(CONTENT), len(CONTENT) + 7])
def test_a_piece_as_long_as_the_file_or_longer(server, tmp_path, size):
    # Killed just before the file got its name; or left by something else, which the server refuses to continue.
    (tmp_path / "file.part").write_bytes((CONTENT + b"1234567")[:size])
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ([] if size == len(CONTENT) else [f"bytes={size}-", None])


def test_a_piece_of_another_file_starts_again(server, tmp_path, capsys):
    (tmp_path / "file.part").write_bytes(bytes(1000))
    assert get(server, tmp_path / "file").read_bytes() == CONTENT
    assert server.asked == ["bytes=1000-", None] and "starting again" in capsys.readouterr().out


def test_wrong_bytes_are_an_error_until_accepted(server, tmp_path, capsys):
    path, wrong = tmp_path / "file", hashlib.sha256(bytes(len(CONTENT))).hexdigest()
    server.script = ["wrong bytes"]
    for _ in range(2):  # fetched, then from the cache
        with pytest.raises(DataError, match=f"{wrong}, expected .*{SHA256}; delete it .* --accept-any-data") as error:
            get(server, path)
        assert not isinstance(error.value, Unreachable)
    assert len(server.asked) == 1
    assert get(server, path, accept_any_file=True) == path
    assert "Warning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("shorter", "announces 87,381 bytes, expected were 262,144"),
        ("longer", "announces 262,148 bytes, expected were 262,144"),
        ("no length, longer", "more than the expected 262,144 bytes"),
    ],
)
def test_wrong_size(server, tmp_path, lie, message):
    server.script = [lie]
    with pytest.raises(DataError, match=f"not the published file.*{message}; .*--accept-any-data") as error:
        get(server, tmp_path / "file")
    assert not isinstance(error.value, Unreachable) and not (tmp_path / "file").exists()
    found = get(server, tmp_path / "file", accept_any_file=True).stat().st_size
    assert found == {"shorter": 87_381, "longer": 262_148, "no length, longer": 3 * 262_144}[lie]


def test_no_announced_length(server, tmp_path):
    server.script = ["no length"]
    assert get(server, tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("script", "attempts", "message"),
    [
        ([404], 1, "404 Not Found"),
        ([500], 4, "500 Internal Server Error"),
        (["stalls", 503], 4, "503"),
        ([429, 500, "works"], 3, None),
    ],
)
def test_refusals(server, tmp_path, script, attempts, message):
    server.script = script
    if message is None:
        assert get(server, tmp_path / "file").read_bytes() == CONTENT
    else:
        with pytest.raises(Unreachable, match=message):
            get(server, tmp_path / "file")
        assert not (tmp_path / "file").exists()
    assert len(server.asked) == attempts


def test_a_connection_that_stalls_for_good(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "STALL_TIMEOUT", 0.1)
    (tmp_path / "file.part").write_bytes(CONTENT[:-1])  # so that it stalls at once, each time
    server.script = ["stalls"]
    with pytest.raises(Unreachable, match=r"\(no data for 0.1 s\); the first 262,143 of 262,144 bytes are kept"):
        get(server, tmp_path / "file")
    assert len(server.asked) == 4


def test_no_server_is_noticed_soon(server, tmp_path, monkeypatch):
    with pytest.raises(Unreachable, match=r"127.0.0.1:9 does not deliver .*\(connection refused\)"):
        download("http://127.0.0.1:9/x", tmp_path / "x", 1, SHA256, progress=False)
    lookups = []

    def no_name_server(host, *args, **kwargs):
        lookups.append(host)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", no_name_server)
    with pytest.raises(Unreachable, match=r"d4rl.example does not deliver .*\(its name cannot be resolved\)"):
        download("http://d4rl.example/x", tmp_path / "x", 1, SHA256, progress=False)
    assert lookups == ["d4rl.example"] * 2


def test_disk_full(server, tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(DataError, match=r"cannot write .*file \(No space left on device\)") as error:
        get(server, tmp_path / "file")
    assert not isinstance(error.value, Unreachable) and not (tmp_path / "file").exists()
    (tmp_path / "no_folder").write_text("")
    with pytest.raises(DataError, match="--data-dir"):
        get(server, tmp_path / "no_folder" / "file")


def test_callers_that_start_together_fetch_once(server, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: get(server, tmp_path / "file"), range(4)))
    assert len(set(paths)) == 1 and len(server.asked) == 1


def test_progress_bar(server, tmp_path, capsys):
    server.script = ["breaks off", "works"]
    get(server, tmp_path / "kitchen.hdf5", progress=True)
    bar = capsys.readouterr().err
    assert "kitchen.hdf5: 100%" in bar and "262k/262k" in bar


def test_fetch_d4rl_kitchen(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "KITCHEN_SIZE", len(CONTENT))
    monkeypatch.setattr(sources, "KITCHEN_SHA256", SHA256)
    path = sources.fetch_d4rl_kitchen(tmp_path, url=server.url, progress=False)
    assert path == tmp_path / "kitchen_microwave_kettle_bottomburner_light-v0.hdf5" and sha256_of(path) == SHA256
    path.unlink()
    server.script = [404]
    with pytest.raises(Unreachable, match=r"404 Not Found: try again later, .* --data PATH, or use --dataset scripted"):
        sources.fetch_d4rl_kitchen(tmp_path, url=server.url, progress=False)
