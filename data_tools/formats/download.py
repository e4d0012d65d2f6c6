"""Published data, fetched once: over plain http or from Google Drive, so a checksum is the protection."""

import html
import logging
import re
from pathlib import Path
from urllib.parse import urlencode, urljoin

import pooch
import requests

from data_tools.files import DataError, locked, reading, write_atomically

DRIVE = "https://drive.google.com/uc?export=download&id="
TIMEOUT = 10  # seconds without an answer or a byte until the server counts as not there
WAYS = (
    "try again later, or fetch it by hand and give it with --data PATH. Other ways: --data scripted; --data release "
    '(all tasks); --data d4rl (kitchens); for the kitchens also `pip install "minari[hf]"`, `minari download '
    "D4RL/kitchen/mixed-v2` and --data ~/.minari/datasets/D4RL/kitchen/mixed-v2"
)


def fetch(url, path, sha256: str | None = None, progress: bool = True, drive: bool = False) -> Path:
    """Return the file `path`, which is fetched from `url` if it is not there.

    sha256: that of the published file. None: none is published; once there is a note, another file is refused.
    drive: the server is Google Drive.
    Raises DataError if the server does not deliver, or if the file is not the right one or cannot be written.
    """
    path = Path(path)
    note = path.with_name(f"{path.name}.sha256")
    if _is_there(path, sha256, note):  # before the lock: the folder may be read-only
        return path
    pooch.get_logger().setLevel(logging.WARNING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with locked(path):  # processes that start together fetch it once
            if _is_there(path, sha256, note):
                return path
            print(f"Fetching {url} into {path}", flush=True)
            downloader = (_Drive if drive else pooch.HTTPDownloader)(progressbar=progress, timeout=TIMEOUT)
            pooch.retrieve(url, sha256 or _noted(note), path.name, path.parent, downloader=downloader)
            path.chmod(0o644)  # for others, too, who share the folder
    except requests.RequestException as error:
        raise DataError(f"{url} cannot be fetched ({type(error).__name__}): {WAYS}.") from error
    except ValueError as error:  # pooch: another checksum; nothing is kept
        first = "the published file" if sha256 else f"the file of the first fetch, which {note} names"
        cure = "fetch it by hand and give it with --data PATH"
        raise DataError(f"{url} is not {first} (SHA-256 differs): {cure}.") from error
    except OSError as error:
        cure = "free some space, or choose another folder with --data-dir"
        raise DataError(f"cannot write {path} ({error.strerror}); {cure}.") from error
    return path


def write_note(path) -> None:
    """Note the SHA-256 of a file that was read beside it, unless one is noted."""
    note = path.with_name(f"{path.name}.sha256")
    if not note.exists():
        found = pooch.file_hash(path)
        print(f"{path}: SHA-256 {found}, noted in {note.name}", flush=True)
        write_atomically(note, lambda part: part.write_text(f"{found}  {path.name}\n"))


def _noted(note):
    """Return the SHA-256 in the file `note`, or None if there is none yet."""
    with reading(note, "delete it"):
        return note.read_text().split()[0] if note.exists() else None


def _is_there(path, sha256, note):
    """Tell whether the right file is there. Raises DataError for another, which pooch would replace."""
    with reading(path):
        if not path.exists():
            return False
        found = pooch.file_hash(path)
    known = sha256 or _noted(note)
    if known not in (None, found):  # it may be the user's own
        which = "the published file" if sha256 else f"the file that was fetched first, which {note.name} names"
        raise DataError(f"{path} is not {which} (SHA-256 differs): delete it, or move it.")
    return True


class _Drive(pooch.HTTPDownloader):
    """Before a large file Google Drive asks, on a page with a form, whether to go on without a scan for viruses."""

    def __call__(self, url, output_file, pooch, check_only=False):
        with requests.get(url, timeout=TIMEOUT, stream=True) as page:
            page.raise_for_status()
            if "html" in page.headers.get("Content-Type", ""):
                form = re.search(r'<form[^>]* action="([^"]+)"', page.text)
                fields = re.findall(r'<input[^>]* name="([^"]+)"[^>]* value="([^"]*)"', page.text)
                if form is None:
                    raise _no_file(url, page.text)
                url = f"{urljoin(page.url, html.unescape(form[1]))}?{urlencode(fields)}"
        super().__call__(url, output_file, pooch)
        with open(output_file, "rb") as file:
            head = file.read(2000)
        if not head.startswith(b"\x1f\x8b"):
            raise _no_file(url, head.decode(errors="replace"))


def _no_file(url, text):
    title = re.search(r"<title>(.*?)</title>", text)
    return DataError(f"{url} gave a page instead of the file ({title[1] if title else text[:60]!r}): {WAYS}.")
