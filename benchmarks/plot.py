"""Draw learning curves from the raw logs of runs: python benchmarks/plot.py RUN_DIR [RUN_DIR ...] --out curves.png

Each run folder holds episodes.csv (training episodes with exploration: the paper's protocol), results.json (clean
evaluations) and args.json. The paper's curves were read off the figures of its web page (benchmarks/paper_curves.csv,
reading error 0.01 in the maze) and are drawn dashed. Prints a table of the runs in Markdown.
"""

import csv
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data_tools


@dataclass
class Args:
    run_dirs: Annotated[list[Path], tyro.conf.Positional]  # folders of finished or unfinished runs of one task
    out: Path = Path("curves.png")  # the picture
    window: int = 20  # training episodes in a point of the curves


def read_run(run_dir: Path):
    """Return arguments, training episodes (n, 4: env step, return, length, minutes) and results or None of a run."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
        rows = list(csv.reader((run_dir / "episodes.csv").open()))[1:]
    except (OSError, ValueError) as error:
        sys.exit(f"error: {run_dir} is no run folder ({error}); give folders that hold args.json and episodes.csv")
    results = run_dir / "results.json"
    episodes = np.array(rows, dtype=float).reshape(-1, 4)
    return args, episodes, json.loads(results.read_text()) if results.exists() else None


def main(args: Args) -> None:
    """Draw the curves of all runs and print their table."""
    runs = [(run_dir, *read_run(run_dir)) for run_dir in args.run_dirs]
    tasks = {run_args["env_id"] for _, run_args, _, _ in runs}
    if len(tasks) != 1:
        sys.exit(f"error: the runs are of different tasks ({', '.join(sorted(tasks))}); plot one task at a time")
    (task,) = tasks
    best = data_tools.MAX_RETURN[task]

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    print(
        "| run | env steps | last 100 training episodes | first env step with 95 of 100 | clean evaluation | RL min |"
    )
    print("|---|---|---|---|---|---|")
    for index, (run_dir, _, episodes, results) in enumerate(runs):
        success = (episodes[:, 1] >= best).astype(float)
        mean = np.convolve(success, np.ones(args.window) / args.window, "valid")
        label = "/".join(run_dir.resolve().parts[-2:])
        axes.plot(episodes[args.window - 1 :, 0], mean, color=f"C{index}", lw=1.5, label=label)
        if results:
            steps, _, evaluated = zip(*results["evaluations"])
            axes.plot(steps, evaluated, "o", color=f"C{index}", ms=4)
        hundred = np.convolve(success, np.ones(100) / 100, "valid")
        reached = np.flatnonzero(hundred >= 0.95)
        first = f"{episodes[99 + reached[0], 0]:,.0f}" if len(reached) else "not reached"
        evaluation = f"{results['evaluations'][-1][2]:.2f}" if results else "unfinished"
        print(
            f"| {label} | {episodes[-1, 0]:,.0f} | {success[-100:].mean():.2f} | {first} | {evaluation} "
            f"| {episodes[-1, 3]:.0f} |"
        )
    curves = {}
    for row in csv.DictReader((ROOT / "benchmarks" / "paper_curves.csv").open()):
        if row["task"] == task:
            curves.setdefault(row["method"], []).append((float(row["env_step"]), float(row["value"])))
    for grey, (method, points) in zip(("0.2", "0.6"), curves.items()):
        axes.plot(*zip(*points), "--", color=grey, lw=1.2, label=f"paper: {method}")
    axes.set(xlabel="env steps", ylabel=f"success, mean of {args.window} training episodes", ylim=(-0.03, 1.03))
    axes.set_xlim(0, max(episodes[-1, 0] for _, _, episodes, _ in runs) * 1.15)
    axes.set_title(f"{task} (dots: clean evaluation)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    data_tools.write_atomically(args.out, lambda part: figure.savefig(part, dpi=120, bbox_inches="tight"))
    print(f"\nwrote {args.out}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
