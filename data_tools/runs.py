"""What runs need beside their method: files of the right sort, an end that loses nothing, a word before hours pass."""

import contextlib
import inspect
import io
import json
import os
import re
import signal
import sys
import threading
import zipfile
from dataclasses import field, make_dataclass, replace
from pathlib import Path
from typing import Annotated, get_type_hints

import numpy as np
import torch
import tyro
from filelock import FileLock, Timeout
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from data_tools.files import DataError, check_regular, listed, reading, write_atomically

SIGNALS = "SIGINT SIGTERM SIGHUP SIGXCPU SIGUSR1 SIGUSR2 SIGBREAK".split()  # of terminals and of schedulers


def command_line(Args, argv: list[str] | None, defaults=None, description: str = ""):
    """tyro.cli(Args, ...), where --help has a box for each comment `# Name` after an empty line between fields of Args.

    As with tyro, a comment behind a field is its help. defaults: an Args, or None for a first look: without --help, and
    without the checks of Args, which might refuse what suits the task's defaults. Returns an Args.
    """
    if defaults is None:
        unchecked = type("Args", (Args,), dict(__post_init__=lambda self: None))
        argv = sys.argv[1:] if argv is None else argv
        return tyro.cli(unchecked, args=[word for word in argv if word not in ("-h", "--help")])
    hints = get_type_hints(Args, include_extras=True)

    def fields(text):  # name, type, default
        for name, words in re.findall(r"^    (\w+): (?:.*?  # (.*))?", text, re.MULTILINE):
            default = field(default=getattr(defaults, name))
            yield name, Annotated[hints[name], tyro.conf.arg(help=words or None)], default

    top, *sections = inspect.getsource(Args).split("\n\n    # ")
    top = list(fields(top))
    for i, section in enumerate(sections):
        title, words = re.match(r"\W*(.*?)(?:[.:(] *(.*?)\W*)?\n", section).groups()
        box = make_dataclass(f"box{i}", fields(section))
        hint = Annotated[box, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name=title.strip(), help=words or None)]
        top.append((f"box{i}", hint, field(default_factory=box)))
    given = vars(tyro.cli(make_dataclass("Args", top), args=argv, description=description))
    for i in range(len(sections)):
        given |= vars(given.pop(f"box{i}"))
    return replace(defaults, **given)


def read_state(path, parts=(), device="cpu", made_by: dict | None = None) -> dict:
    """Return what an algorithm file saved as `path`: a checkpoint, an agent, a model.

    parts: names of what is to be loaded from it; made_by: by name what a model has to agree in. Raises DataError, which
    says what the file is where it is whole, but another one is needed.
    """
    path = Path(os.path.expanduser(path))
    if path.is_dir() and (path / "checkpoint.pt").is_file():
        path = path / "checkpoint.pt"
    if not os.path.exists(path) and path.parent.is_dir():
        others = sorted(name for name in os.listdir(path.parent) if name.endswith(path.suffix))
        raise DataError(f"{path} does not exist; its folder has: {listed(others)}.")
    check_regular(path)
    with reading(path, "copy it again, or make it anew", "is damaged, or no model or checkpoint"):
        _check_zip(path)
        state = torch.load(path, map_location=device, weights_only=True)
        needed = [*parts, "made_by"] if made_by else parts
        missing = [name for name in needed if name not in state]
    if missing and "agent" in parts and "agent" in state:
        raise DataError(f"{path} has no {listed(missing)}: another version of this program saved it.")
    if missing:
        raise DataError(f"{path} is {_described(state)}.")
    if made_by:
        _check_made_by(path, made_by, state["made_by"])
    return state


def _check_zip(path):
    """torch does not look at checksums."""
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            head = file.read(8)
        kinds = {b"\x89HDF": "an HDF5 file: if it holds offline data, give it to --data", b"{": "JSON: give a .pt file"}
        kind = next((kinds[begin] for begin in kinds if head.startswith(begin)), "damaged, or no .pt file")
        raise DataError(f"{path} is {kind}.")
    with zipfile.ZipFile(path) as archive:
        if archive.testzip():
            raise ValueError("its checksums are wrong")


def _described(state) -> str:
    """What a file of ours is, and what fits."""
    if not isinstance(state, dict):
        return f"no file of this program, but holds: {type(state).__name__}"
    if "agent" in state and isinstance(state.get("args"), dict):
        also = "--resume its run folder, or " if "progress" in state else ""
        return f"an agent that {state.get('script')} trained on {state['args'].get('env_id')}: {also}--evaluate it"
    if "networks" in state and "optimizer" in state:
        return "an unfinished pre-training: give the command that began it once more"
    if "made_by" in state:
        return f"a pre-trained model ({_words(state['made_by'])}), no agent: give it to --pretrained"
    if "flow" in state:
        return "the flow prior that reskill.py finds by itself: give the pre-trained model"
    return f"no file of this program, it holds: {listed(state)}"


def _words(settings: dict) -> str:
    """Settings as flags, and what is no flag by its name."""

    def word(name, value):
        flag = name if name in ("method", "data") else f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            return flag if value else flag.replace("--", "--no-")
        return f"{flag} {value}"

    return ", ".join(word(*setting) for setting in settings.items())


def _check_made_by(path, wanted: dict, found: dict):
    differing = {name: value for name, value in found.items() if name in wanted and value != wanted[name]}
    if differing:
        cure = "give one of this method and task" if {"method", "data"} & differing.keys() else "give its flags"
        here = _words({name: wanted[name] for name in differing})
        raise DataError(f"{path} was made with {_words(differing)}; here: {here}. It is whole: {cure}.")


def saved_run(path) -> tuple[str, dict]:
    """Return the run folder that a path means, also that of a file in it, and its arguments. Raises DataError."""
    path = Path(os.path.expanduser(path))
    folder = path.parent if path.is_file() else path
    if not (folder / "args.json").is_file():
        if path.is_file():
            read_state(path, ["progress", "args"])
        found = listed(sorted(os.listdir(folder))) if folder.is_dir() else "nothing"
        raise DataError(f"--resume {path} is no run folder: no args.json there, but {found}.")
    _locked(folder).release()
    for leftover in folder.glob("part_*"):  # of a program that was killed while writing
        leftover.unlink(missing_ok=True)
    with reading(folder / "args.json", "give another run folder"):
        return str(folder), dict(json.loads((folder / "args.json").read_text()))


def _locked(folder) -> FileLock:
    """The lock of a run folder, acquired: two programs in one would overwrite each other's files."""
    lock = FileLock(Path(folder) / "lock", is_singleton=True)  # the same program may go on with its own run
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DataError(f"the run in {folder} still goes on: wait for it, or stop it first") from None
    return lock


def stop_event() -> threading.Event:
    """Return an event that is set by Ctrl-C, a scheduler's signal or a closed terminal, so that a run saves and ends.

    Ctrl-C once more ends it at once. What nohup ignores stays ignored.
    """
    stop = threading.Event()
    screens = [number for number in (1, 2) if os.isatty(number)]

    def stop_soon(number, frame):
        gone = number == getattr(signal, "SIGHUP", None)
        repeats = gone or number == getattr(signal, "SIGXCPU", None)  # told by a shell twice, by Linux every second
        signal.signal(number, signal.SIG_IGN if repeats else signal.SIG_DFL)
        stop.set()  # waits for ever if the same signal comes in between
        if gone:  # whatever is written to it would be an error
            null = os.open(os.devnull, os.O_WRONLY)
            for screen in screens:
                os.dup2(null, screen)
        with contextlib.suppress(OSError):  # print may not interrupt a print
            os.write(2, b"\nstopping: saves first (once more: stops at once)\n")

    for name in SIGNALS:
        number = getattr(signal, name, None)  # not all systems have all
        if number and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
            signal.signal(number, stop_soon)
    return stop


def cut_curves(writer, step: int, phase: str = "") -> None:
    """Take what lies after `step` out of TensorBoard's older files in the writer's folder: it will be written again.

    phase: how the names of a phase's curves begin, "pretrain/..." with steps in updates, or "" for RL's: TensorBoard's
    purge_step knows one kind of step only. From here on no other program can resume the run; raises DataError if one
    works in its folder.
    """
    writer.lock = _locked(writer.log_dir)  # as long as there is the writer
    logs = Path(writer.log_dir).glob("events.out.tfevents.*")
    for path in sorted(logs, key=lambda path: path.stat().st_ctime_ns)[:-1]:
        kept = io.BytesIO()
        records = RecordWriter(kept)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            ours = [tag.startswith(phase) if phase else not tag.startswith("pretrain/") for tag in tags]
            if event.step <= step or not any(ours):
                records.write(record)
        write_atomically(path, lambda part: part.write_bytes(kept.getvalue()))  # noqa: B023


def check_settings(args, warmup: int, rate: float = np.inf) -> None:
    """Say at the start, not after hours, what a run with these arguments cannot do.

    warmup: env steps before the first update; rate: updates per env step after them.
    """
    if args.capture_video:
        print("warning: --capture-video works with --evaluate only.", flush=True)
    first = warmup + (1 / rate if rate else np.inf)  # env step
    if 0 < args.total_timesteps < first:
        when = f"the first update would come at env step {first:,.0f}, the run ends at {args.total_timesteps:,}"
        print(f"warning: nothing will be learned from rewards: {when}.", flush=True)
