"""Fetch a published file once: resumed after a break, checked by size and SHA-256, whole or not there at all."""

import hashlib
import os
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from tqdm import tqdm

from data_tools.files import DataError

CONNECT_TIMEOUT = 10.0  # seconds until a server counts as not there
STALL_TIMEOUT = 30.0  # seconds without a byte until a connection counts as dead
WAITS = (1.0, 3.0, 10.0)  # seconds before the next attempt, after 1, 2, 3 failures in a row; then we give up
CHUNK = 2**12  # bytes; a break loses at most this much


class Unreachable(DataError):
    """The file cannot be had right now: no network, server down, or the file is gone there."""


def download(url, path, size: int, sha256: str, accept_any_file: bool = False, progress: bool = True) -> Path:
    """Return `path`, a file of `size` bytes with the given SHA-256 (hex digits), which is fetched if it is not there.

    A broken download stays as `<path>.part` and is continued, by the next attempt or the next call; processes that
    start together fetch once. A file at `path` is checked each time; `accept_any_file` accepts a file that differs.
    Raises Unreachable if the server does not deliver, DataError if the file is not the published one or the disk is
    full.
    """
    path = Path(path)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():  # nobody else fetched it while we waited
                    print(f"Fetching {url} into {path}", flush=True)
                    _fetch(url, path, size, sha256, accept_any_file, progress)
        except OSError as error:
            raise DataError(
                f"cannot write {path} ({error.strerror}); free some space, or choose another folder with --data-dir."
            ) from error
    found_size, found_sha256 = path.stat().st_size, sha256_of(path)
    if (found_size, found_sha256) != (size, sha256):
        difference = (
            f"{path} is not the published file: it has {found_size:,} bytes and SHA-256 {found_sha256}, "
            f"expected were {size:,} bytes and SHA-256 {sha256}"
        )
        if not accept_any_file:
            raise DataError(f"{difference}; delete it to fetch it again, or accept it with --accept-any-data.")
        print(f"Warning: {difference}; used all the same, as --accept-any-data asks.", flush=True)
    return path


def sha256_of(path) -> str:
    """Return the SHA-256 of a file, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url, path, size, sha256, accept_any_file, progress):
    """Fetch the file and give it its name; what has come so far waits in `<path>.part`."""
    part = path.with_name(f"{path.name}.part")
    continued = part.exists()
    _fetch_part(url, part, size, accept_any_file, progress)
    if continued and not accept_any_file and sha256_of(part) != sha256:
        # The older piece may be of another version of the file.
        print("The pieces of the download do not fit together: starting again.", flush=True)
        part.unlink()
        _fetch_part(url, part, size, accept_any_file, progress)
    with open(part, "rb") as file:
        os.fsync(file.fileno())  # on the disk before the name points to it, also after a power cut
    os.replace(part, path)


def _fetch_part(url, part, size, accept_any_file, progress):
    """Attempt until the file `part` is complete. Raises Unreachable after too many attempts without progress."""
    most = have = _bytes_in(part)
    failures, answered = 0, False
    with tqdm(total=size, initial=have, desc=part.stem, unit="B", unit_scale=True, disable=not progress) as bar:
        while True:
            try:
                _attempt(url, part, size, accept_any_file, bar)
                return
            except _Failure as failure:
                reason, answered = str(failure), answered or failure.answered
            have = _bytes_in(part)
            failures = failures + 1 if have <= most else 1
            most = max(most, have)
            # Offline machines should not wait long: a server that never answered gets one more chance.
            if failures > (len(WAITS) if answered else 1):
                kept = f"; the first {have:,} of {size:,} bytes are kept and will be continued" if have else ""
                raise Unreachable(f"{urlsplit(url).netloc} does not deliver {url} ({reason}){kept}.")
            time.sleep(WAITS[failures - 1])


class _Failure(Exception):
    """An attempt that may succeed when it is repeated; `answered`: the server has said something."""

    def __init__(self, reason, answered):
        super().__init__(reason)
        self.answered = answered


def _attempt(url, part, size, accept_any_file, bar):
    """Send one request and append what comes to `part`; return when the file is complete, else raise."""
    have = _bytes_in(part)
    if have == size:
        return  # the process before us was killed just before it gave the file its name
    # No compression on the way: sizes and positions are those of the file.
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    answered = False
    try:
        with requests.get(url, headers=headers, stream=True, timeout=(CONNECT_TIMEOUT, STALL_TIMEOUT)) as response:
            answered = True
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                part.unlink(missing_ok=True)
                raise _Failure("the server has no such part of the file", answered)
            if response.status_code >= 500 or response.status_code in (408, 429):
                raise _Failure(f"the server answered {response.status_code} {response.reason}", answered)
            if response.status_code not in (200, 206):
                raise Unreachable(f"{url} is not there: the server answered {response.status_code} {response.reason}.")
            continues = response.status_code == 206 and _first_byte(response) == have
            if response.status_code == 206 and not continues:
                part.unlink(missing_ok=True)
                raise _Failure("the server sent another part than the one asked for", answered)
            have = have if continues else 0  # a server without ranges sends everything again
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdigit() else None
            if total is not None and total != size and not accept_any_file:
                raise DataError(
                    f"{url} is not the published file: the server announces {total:,} bytes, expected were {size:,}; "
                    "fetch it by hand and give it with --data PATH, or accept it with --accept-any-data."
                )
            bar.total = total or size
            bar.n = have
            with open(part, "ab" if continues else "wb") as file:
                for chunk in response.iter_content(CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    bar.update(len(chunk))
                    if have > size and not accept_any_file:
                        break  # without an announced length; no reason to fill the disk
    except requests.RequestException as error:
        raise _Failure(_reason(error), answered) from error
    if have > size and not accept_any_file:
        part.unlink()
        raise DataError(
            f"{url} is not the published file: it has more than the expected {size:,} bytes; "
            "fetch it by hand and give it with --data PATH, or accept it with --accept-any-data."
        )
    if have != size and total is None and not accept_any_file:
        raise _Failure("the connection broke off", answered)


def _first_byte(response):
    """Return where the answer with status 206 starts in the file, or None."""
    start = response.headers.get("Content-Range", "").removeprefix("bytes ").partition("-")[0]
    return int(start) if start.isdigit() else None


def _reason(error):
    """Return what went wrong in a few words."""
    text = str(error)
    if isinstance(error, requests.ConnectTimeout):
        return f"no connection within {CONNECT_TIMEOUT:g} s"
    if isinstance(error, requests.Timeout) or "Read timed out" in text:
        return f"no data for {STALL_TIMEOUT:g} s"
    if "Failed to resolve" in text:
        return "its name cannot be resolved"
    if "Connection refused" in text:
        return "connection refused"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        return "the connection broke off"
    return type(error).__name__


def _bytes_in(part):
    return part.stat().st_size if part.exists() else 0
