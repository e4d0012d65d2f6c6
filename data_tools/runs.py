"""What every run needs and no method is about: its folder, its logs, the wish to stop, the state of random numbers.

A run's folder holds `args.json`, TensorBoard events, `episodes.csv` (one row per training episode), `checkpoint.pt`,
`results.json` (once finished), pictures and videos. Its name is {task}__{experiment}__{data}__{seed}__{milliseconds}.
"""

import argparse
import csv
import json
import os
import platform
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from data_tools.dataset import TASKS
from data_tools.files import DataError, write_atomically

EPISODE_COLUMNS = ("env_step", "episodic_return", "episodic_length", "rl_minutes")


def parse_args(Args, task_defaults: dict[str, dict], description: str, argv: list[str] | None = None):
    """Command line -> Args, whose defaults are those of the chosen --env-id, or of the run that --resume names.

    So `--help` shows the values of the task. Exits with one sentence for an unknown task or a folder without a run.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--env-id", "--env_id", default="maze")
    first.add_argument("--resume")
    chosen, _ = first.parse_known_args(argv)
    if chosen.env_id not in TASKS:
        sys.exit(f"error: --env-id {chosen.env_id} is no task; choose one of {', '.join(TASKS)}")
    default = Args(env_id=chosen.env_id, **task_defaults[chosen.env_id])
    if chosen.resume:
        try:
            default = Args(**json.loads((Path(chosen.resume) / "args.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"error: --resume {chosen.resume} is no run folder of this file ({error}); check the path")
    return tyro.cli(Args, args=argv, default=default, description=description)


def random_state() -> list[torch.Tensor]:
    """State of torch's random numbers, on the CPU and on every CUDA device."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(state: list[torch.Tensor]):
    torch.set_rng_state(state[0])
    if len(state) == 1 + torch.cuda.device_count():  # a run may go on with other devices, then not bit for bit
        torch.cuda.set_rng_state_all(state[1:])


class StopSignal:
    """Ctrl-C or SIGTERM asks for a stop at the next safe point, where everything is saved; a second one kills."""

    def __init__(self):
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def __call__(self, number, frame):
        self.requested = True
        tqdm.write("stopping: saves at the next safe point (once more: stops at once)")
        signal.signal(number, signal.SIG_DFL)


class Run:
    """The folder of one run, new or that of `args.resume`, and what is written into it.

    `source` names the offline data (part of the folder's name and of the table of arguments).
    Raises DataError if the folder cannot be written.
    """

    def __init__(self, args, source: str):
        name = f"{args.env_id}__{args.exp_name}__{source}__{args.seed}__{time.time_ns() // 10**6}"
        self.args, self.dir = args, Path(args.resume or Path(args.run_dir) / name)
        self.checkpoint, self.stop = self.dir / "checkpoint.pt", StopSignal()
        if args.resume and not self.checkpoint.exists():
            print(f"{self.dir} has no checkpoint yet: RL starts at env step 0", flush=True)
        try:
            self.dir.mkdir(parents=True, exist_ok=bool(args.resume))
        except OSError as error:
            message = f"{self.dir} cannot be written ({error.strerror}); choose another folder with --run-dir"
            raise DataError(message) from error
        write_atomically(self.dir / "args.json", lambda part: part.write_text(json.dumps(asdict(args), indent=1)))
        self.writer = SummaryWriter(self.dir)
        rows = "\n".join(f"|{key}|{value}|" for key, value in {"offline data": source, **asdict(args)}.items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")

    def log(self, group: str, values: dict, step: int):
        """Write scalars to TensorBoard as group/name."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def log_means(self, group: str, history: list[dict], step: int) -> dict[str, float]:
        """Log each metric's mean over the updates in history, and empty it; one synchronisation with the device."""
        means = torch.stack([torch.stack(list(metrics.values())) for metrics in history]).mean(0).tolist()
        means = dict(zip(history[0], means))
        self.log(group, means, step)
        history.clear()
        return means

    def start_episodes(self, episodes: list):
        """Begin episodes.csv with the episodes that a resumed run has had already: (n, 4) rows of EPISODE_COLUMNS."""
        self._episodes_file = (self.dir / "episodes.csv").open("w", newline="")
        self._episodes = csv.writer(self._episodes_file)
        self._episodes.writerows([EPISODE_COLUMNS, *episodes])
        self._episodes_file.flush()

    def log_episode(self, episode: tuple, values: dict):
        """Append a row of EPISODE_COLUMNS to episodes.csv; log it and further values under charts/."""
        self._episodes.writerow(episode)
        self._episodes_file.flush()
        step, episodic_return, episodic_length, _ = episode
        self.log("charts", dict(episodic_return=episodic_return, episodic_length=episodic_length, **values), step)

    def finish(self, results: dict) -> dict:
        """Write results.json, print the summary; returns all of it."""
        args = self.args
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {args.device}, torch {torch.__version__}"
        results = results | dict(machine=machine, args=asdict(args))
        write_atomically(self.dir / "results.json", lambda part: part.write_text(json.dumps(results, indent=1)))
        self._episodes_file.close()
        self.writer.close()
        _, eval_return, eval_success = results["evaluations"][-1]
        print(
            f"{args.env_id}: clean evaluation: return {eval_return:.4g}, success {eval_success:.0%}; last 100 training "
            f"episodes: return {results['last_100_return'] or 0:.4g}, success {results['last_100_success']:.0%}; "
            f"{results['env_steps']} env steps in {results['rl_minutes']:.1f} min.\n"
            f"Pictures, episodes.csv, results.json and checkpoint: {self.dir}; curves: tensorboard --logdir {self.dir}"
        )
        return results
