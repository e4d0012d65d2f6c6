"""What the controls share: arguments, a run of an algorithm file in a folder, CSV, JSON."""

import argparse
import contextlib
import csv
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.provenance import provenance
from data_tools import env_sizes
from data_tools.files import check_writable, write_atomically

# Flags of the runs in results/TASK/NAME/none, but for their length: all else was as by default
REPORTED = {
    "sac": "",
    "tdmpc": "--cpu-preset --updates-per-step 0.1",
    "dreamer": "--cpu-preset",
    "lsp": "--cpu-preset",
    "dads": "",
    "diayn": "",
    "hiro": "",
    "option_critic": "",
}


def parser(doc: str, reported: bool = False) -> argparse.ArgumentParser:
    """The arguments of every control, and --reported where settings are the control's own else."""
    result = argparse.ArgumentParser(description=doc.split("\n")[0])
    result.add_argument("--out", type=Path, required=True, help="csv; JSON and pictures are put beside it")
    result.add_argument("--seed", type=int, default=1)
    if reported:
        result.add_argument("--reported", action="store_true", help="take the settings of the runs in RESULTS")
    return result


def reported_args(algo, env_id: str, seed: int, env_steps: int | None = None):
    """Args of a file as in the reported runs, for another task, with one evaluation at the end."""
    words = f"--env-id {env_id} --seed {seed} --device cpu --no-cudagraphs --total-timesteps {env_steps or 300_000}"
    words += f" --eval-interval {10**9} --eval-episodes 1 {REPORTED[algo.FILE.stem]}"
    return algo.parse_args(words.split())


@contextlib.contextmanager
def record(out: Path):
    """Give a dict for facts, which gets where they come from and how long they took, and is written beside `out`."""
    check_writable(out)
    torch.set_num_threads(1)
    facts = provenance()
    start, cpu_start = time.time(), time.process_time()
    yield facts
    facts |= dict(minutes=(time.time() - start) / 60, cpu_minutes=(time.process_time() - cpu_start) / 60)
    text = json.dumps(facts, indent=1) + "\n"
    write_atomically(out.with_suffix(".json"), lambda part: part.write_text(text))


def write_csv(path: Path, header, rows):
    def write(part: Path):
        with part.open("w", newline="") as file:
            csv.writer(file).writerows([header, *rows])

    write_atomically(path, write)


def train(algo, args):
    """A whole run of a file. Returns its results, the trained agent, training episodes (n, 4) as in episodes.csv, and
    curves, name -> {step: value}.
    """
    with tempfile.TemporaryDirectory() as folder:
        args.run_dir = folder
        results = algo.train(args)
        args.run_dir = "(temporary)"
        (run,) = Path(folder).iterdir()
        pretrained = hasattr(algo, "make_networks")
        parts = [algo.make_networks(args)] if pretrained else env_sizes(args.env_id)
        agent = algo.Agent(args, *parts)
        algo.load(run / "checkpoint.pt", dict(agent=agent))
        episodes = np.loadtxt(run / "episodes.csv", delimiter=",", skiprows=1).reshape(-1, 4)
        events = EventAccumulator(str(run), dict(scalars=0)).Reload()
        names = events.Tags()["scalars"]
        curves = {name: {event.step: event.value for event in events.Scalars(name)} for name in names}
    return results, agent, episodes, curves
