"""Draw learning curves: of a grid that benchmarks/run.py has run, over the paper's, or of single run folders.

    python benchmarks/plot.py runs/results --out curves.png         # IQM and 95 % intervals over seeds, per task
    python benchmarks/plot.py RUN_DIR [RUN_DIR ...] --out runs.png  # every run on its own, one task

The grid is drawn twice. Above, the paper's protocol: returns of training episodes (with exploration), averaged in
windows of env steps, gaps filled with the value before, exponentially smoothed per seed. Below, clean evaluations.
Lines are interquartile means over seeds (with fewer than four seeds that is the mean), bands are bootstrap intervals.
The paper's curves are dashed; they were read off the figures of its web page (benchmarks/paper_curves.csv). The tables
that are printed are Markdown; a last paragraph names the cells of the grid that are missing.
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
from matplotlib.ticker import EngFormatter
from scipy.stats import bootstrap, trim_mean

PAPER_CURVES = Path(__file__).resolve().parent / "paper_curves.csv"
PAPER = "Shi, Lim & Lee, CoRL 2022, fig. 4 and 5, read off the pictures of the paper's web page"

# Algorithm file -> name in the paper's figures; the order gives the colours.
METHODS = {
    "skimo": "SkiMo", "skimo_no_cem": "SkiMo w/o CEM", "skimo_sac": "SkiMo+SAC",
    "skimo_no_joint": "SkiMo w/o joint training", "spirl": "SPiRL", "tdmpc_skills": "SPiRL+TD-MPC",
    "dreamer_skills": "SPiRL+Dreamer", "dreamer": "Dreamer", "tdmpc": "TD-MPC",
    "skimo_single_step": "SkiMo w/ single-step dynamics",
}  # fmt: skip
BEST = {"maze": 100.0, "kitchen": 4.0, "kitchen-misaligned": 4.0, "calvin": 400.0}  # return when everything was done
UNIT = {"maze": 100.0, "calvin": 100.0}  # return that counts as 1 in the paper's figures, where not 1
LOG_INTERVAL = {"spirl": 100}  # env steps between points of the paper's curves before smoothing, if not 500
SMOOTHING = 0.99  # weight of the old value
RESAMPLES = 2_000  # of the bootstrap


@dataclass
class Args:
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (Path("runs/results"),)  # results, or run folders
    out: Path = Path("curves.png")  # the picture
    algos: tuple[str, ...] = ()  # the grid, for the list of what is missing (empty: all that were found)
    env_ids: tuple[str, ...] = ()  # the same; with any of the three, nothing else is drawn
    seeds: tuple[int, ...] = ()  # the same
    window: int = 20  # run folders: training episodes in a point of the curves


def save_figure(figure: Figure, path: Path):
    """Write the picture whole or not at all."""
    part = path.with_name(f"part_{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=120, bbox_inches="tight")
        part.replace(path)
    except (OSError, ValueError) as error:
        part.unlink(missing_ok=True)
        sys.exit(f"error: --out {path} cannot be written ({error})")
    print(f"\nwrote {path}")


def paper_curves(task: str) -> dict[str, np.ndarray]:
    """The paper's curves of a task: method -> (n, 2) env steps and score."""
    curves = {}
    with PAPER_CURVES.open() as file:
        for row in csv.DictReader(file):
            if row["task"] == task:
                curves.setdefault(row["method"], []).append((float(row["env_step"]), float(row["value"])))
    return {method: np.array(points) for method, points in curves.items()}


# ------------------------------------------------------------------------------------------------- results of run.py


@dataclass
class Run:
    """A finished run: training and evaluation hold (n, 3) env steps, return in the paper's unit, seconds of RL."""

    env_id: str
    algo: str
    seed: int
    training: np.ndarray
    evaluation: np.ndarray


def read_result(path: Path) -> Run:
    """A run from its JSON and the CSV next to it."""
    try:
        facts = json.loads(path.read_text())
        unit, points = UNIT.get(facts["env_id"], 1.0), {"episodic_return": [], "eval_return": []}
        with path.with_suffix(".csv").open() as file:
            for row in csv.DictReader(file):
                for kind, values in points.items():
                    if row[kind]:
                        values.append((float(row["env_step"]), float(row[kind]) / unit, float(row["wall_seconds"])))
        arrays = [np.array(values).reshape(-1, 3) for values in points.values()]
        return Run(facts["env_id"], facts["algo"], facts["seed"], *arrays)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        sys.exit(
            f"error: {path} and its CSV are no result of benchmarks/run.py ({reason}); delete both and run it again"
        )


def smooth(run: Run) -> np.ndarray:
    """The paper's protocol: training episodes of a run -> (n, 2) env steps and smoothed score.

    A point is the mean of the episodes that ended in a window. The release takes their maximum, of at most two or
    three from its one environment; ours step in lockstep, so that eight end at once, and a maximum would flatter them.
    """
    interval = LOG_INTERVAL.get(run.algo, 500)
    window = np.ceil(run.training[:, 0] / interval).astype(int) - 1  # of each episode
    count = np.bincount(window)
    filled = np.flatnonzero(count)
    means = np.bincount(window, weights=run.training[:, 1])[filled] / count[filled]
    points = np.arange(filled[0], filled[-1] + 1)
    values = means[np.searchsorted(filled, points, side="right") - 1]  # an empty window repeats the one before
    smoothed, value = [], values[:10].mean()
    for new in values:
        value = SMOOTHING * value + (1 - SMOOTHING) * new
        smoothed.append(value)
    return np.column_stack([(points + 1.0) * interval, smoothed])


def iqm(*samples, axis=-1):
    """Interquartile mean over the seeds of all samples."""
    return trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def iqm_interval(*samples: np.ndarray):
    """IQM and its 95 % percentile bootstrap interval; a sample is a stratum (a task), seeds first: (S, ...).

    Seeds are resampled within their stratum only. A stratum of a single seed has no interval: NaN.
    """
    point = iqm(*samples, axis=0)
    if min(len(sample) for sample in samples) < 2:
        return point, np.full_like(point, np.nan), np.full_like(point, np.nan)
    options = dict(n_resamples=RESAMPLES, confidence_level=0.95, method="percentile", vectorized=True, rng=0)
    low, high = bootstrap(samples, iqm, axis=0, **options).confidence_interval
    return point, low, high


def on_common_steps(curves: list[np.ndarray], points: int = 100):
    """Curves (n_i, 2+) of seeds -> env steps (G,) that all of them cover, and scores (S, G) interpolated there."""
    first, last = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    steps = np.linspace(first, last, points) if first < last else np.array([last])
    return steps, np.stack([np.interp(steps, curve[:, 0], curve[:, 1]) for curve in curves])


def show(value, low, high) -> str:
    return f"{value:.2f}" if np.isnan(low) else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def time_to_reach(runs: list[Run], target: float) -> tuple[str, str]:
    """Env steps and RL minutes from which on the smoothed training score stays at target: median of the seeds that do.

    Not the first time that it is there: episodes that succeed end first, so that curves begin high and fall.
    """
    steps, minutes = [], []
    for run in runs:
        curve = smooth(run)
        start = np.flatnonzero(np.append(True, curve[:, 1] < target))[-1]  # behind the last point below target
        if start < len(curve):
            steps.append(curve[start, 0])
            minutes.append(np.interp(steps[-1], run.training[:, 0], run.training[:, 2]) / 60)
    if not steps:
        return "not reached", "not reached"
    share = "" if len(steps) == len(runs) else f" ({len(steps)} of {len(runs)} seeds)"
    return f"{np.median(steps):,.0f}{share}", f"{np.median(minutes):.0f}{share}"


def plot_grid(args: Args, files: list[Path]):
    """Figure and tables of the results of benchmarks/run.py."""
    runs = [read_result(path) for path in files]
    algos = args.algos or sorted({run.algo for run in runs}, key=lambda algo: ([*METHODS, algo].index(algo), algo))
    tasks = args.env_ids or [task for task in BEST if any(run.env_id == task for run in runs)]
    seeds = args.seeds or sorted({run.seed for run in runs})
    cells, missing = {}, []
    for run in runs:
        if run.env_id in tasks and run.algo in algos and run.seed in seeds:
            if run.seed in [other.seed for other in cells.get((run.env_id, run.algo), [])]:
                sys.exit(f"error: {run.env_id}/{run.algo}/seed{run.seed} is there twice; give folders of one grid")
            cells.setdefault((run.env_id, run.algo), []).append(run)
    for task in tasks:
        for algo in algos:
            absent = [seed for seed in seeds if seed not in [run.seed for run in cells.get((task, algo), [])]]
            if absent:
                missing.append(f"{task}/{algo} (seeds {', '.join(map(str, absent))})")
    if not cells:
        sys.exit(
            f"error: no result belongs to the grid of --algos, --env-ids and --seeds; missing: {', '.join(missing)}"
        )

    figure = Figure(figsize=(1.5 + 4 * len(tasks), 6.5))
    axes, handles = figure.subplots(2, len(tasks), squeeze=False), {}
    print(
        "| task | algorithm | seeds | env steps | final training score | final clean evaluation | paper's final score "
        "| env steps to it | RL minutes to it |\n|---|---|---|---|---|---|---|---|---|"
    )
    finals = {algo: [] for algo in algos}  # clean evaluations of each task's seeds as a share of the best return
    for column, task in enumerate(tasks):
        paper, end = paper_curves(task), 0
        for algo in algos:
            cell, color = cells.get((task, algo), []), f"C{[*METHODS, algo].index(algo) % 10}"
            scores = {}
            curves = {"training": [smooth(run) for run in cell if len(run.training)]}
            curves["evaluation"] = [run.evaluation for run in cell if len(run.evaluation)]
            for row, (kind, seeds_curves) in enumerate(curves.items()):
                if seeds_curves:
                    steps, values = on_common_steps(seeds_curves)
                    score, low, high = iqm_interval(values)
                    marker = "o" if len(steps) == 1 else None
                    handles[algo], *_ = axes[row, column].plot(steps, score, color=color, marker=marker, label=algo)
                    axes[row, column].fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
                    scores[kind], end = show(score[-1], low[-1], high[-1]), max(end, steps[-1])
            if not cell:
                continue
            if curves["evaluation"]:
                best = BEST[task] / UNIT.get(task, 1.0)
                finals[algo].append(np.array([curve[-1, 1] for curve in curves["evaluation"]]) / best)
            method, published, reach = METHODS.get(algo), "not known", ("–", "–")
            if method in paper:
                handles[f"paper: {method}"], *_ = axes[0, column].plot(
                    *paper[method].T, "--", color=color, lw=1.2, label=f"paper: {method}"
                )
                (last_step, final) = paper[method][-1]
                published = f"{final:.2f} at {last_step / 1e6:g}M"
                if final > 0:
                    reach = time_to_reach([run for run in cell if len(run.training)], final)
            last = min(run.training[-1, 0] if len(run.training) else 0 for run in cell)
            print(
                f"| {task} | {algo} | {len(cell)} | {last:,.0f} | {scores.get('training', '–')} "
                f"| {scores.get('evaluation', '–')} | {published} | {reach[0]} | {reach[1]} |"
            )
        for row, kind in enumerate(("training, with exploration (paper's protocol)", "clean evaluation")):
            best = BEST[task] / UNIT.get(task, 1.0)
            axes[row, column].set(xlim=(0, 1.05 * max(end, 1)), ylim=(-0.03 * best, 1.03 * best), xlabel="env steps")
            axes[row, column].xaxis.set_major_formatter(EngFormatter(sep=""))  # 100k
            axes[row, column].set_title(f"{task}: {kind}", fontsize=9)
            axes[row, column].set_ylabel("success" if task == "maze" else "sub-tasks")
            axes[row, column].grid(alpha=0.3)
    figure.tight_layout()
    figure.legend(handles.values(), handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=8)
    figure.text(0.5, 1.0, f"dashed: {PAPER}", ha="center", fontsize=7)

    if any(len(strata) > 1 for strata in finals.values()):
        print(
            "\n| algorithm | tasks | final clean evaluation over all tasks, share of the best return |\n|---|---|---|"
        )
        for algo, strata in finals.items():
            if len(strata) > 1:
                print(f"| {algo} | {len(strata)} | {show(*iqm_interval(*strata))} |")
    print("\nIQM over seeds, 95 % stratified bootstrap interval. Paper: " + PAPER + ".")
    print("Missing: " + ("; ".join(missing) or "nothing") + ".")
    save_figure(figure, args.out)


# --------------------------------------------------------------------------------------------------------- run folders


def read_run(run_dir: Path):
    """Return arguments, training episodes (n, 4: env step, return, length, minutes) and results or None of a run."""
    try:
        args = json.loads((run_dir / "args.json").read_text())
        with (run_dir / "episodes.csv").open() as file:
            rows = list(csv.reader(file))[1:]
        results = run_dir / "results.json"
        results = json.loads(results.read_text()) if results.exists() else None
        return args, np.array(rows, dtype=float).reshape(-1, 4), results
    except (OSError, ValueError) as error:
        sys.exit(
            f"error: {run_dir} holds no results of benchmarks/run.py and is no run folder ({error}); "
            "a run folder holds args.json and episodes.csv"
        )


def plot_runs(args: Args):
    """Figure and table of single runs of one task."""
    runs = [(run_dir, *read_run(run_dir)) for run_dir in args.paths]
    tasks = {run_args["env_id"] for _, run_args, _, _ in runs}
    if len(tasks) != 1:
        sys.exit(f"error: the runs are of different tasks ({', '.join(sorted(tasks))}); plot one task at a time")
    (task,) = tasks

    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
    print(
        "| run | env steps | last 100 training episodes | first env step with 95 of 100 | clean evaluation | RL min |"
    )
    print("|---|---|---|---|---|---|")
    for index, (run_dir, _, episodes, results) in enumerate(runs):
        label = "/".join(run_dir.resolve().parts[-2:])
        if not len(episodes):
            print(f"| {label} | 0 | no episode has ended | | | |")
            continue
        score = episodes[:, 1] / UNIT.get(task, 1.0)  # maze: reached the goal; elsewhere: sub-tasks
        if len(score) >= args.window:
            mean = np.convolve(score, np.ones(args.window) / args.window, "valid")
            axes.plot(episodes[args.window - 1 :, 0], mean, color=f"C{index}", lw=1.5, label=label)
        if results:
            steps, evaluated, _ = zip(*results["evaluations"])
            axes.plot(steps, np.array(evaluated) / UNIT.get(task, 1.0), "o", color=f"C{index}", ms=4)
        success = (episodes[:, 1] >= BEST[task]).astype(float)
        hundred = np.convolve(success, np.ones(100) / 100, "valid") if len(success) >= 100 else np.zeros(1)
        reached = np.flatnonzero(hundred >= 0.95)
        first = f"{episodes[99 + reached[0], 0]:,.0f}" if len(reached) else "not reached"
        evaluation = f"{results['evaluations'][-1][1] / UNIT.get(task, 1.0):.2f}" if results else "unfinished"
        print(
            f"| {label} | {episodes[-1, 0]:,.0f} | {score[-100:].mean():.2f} | {first} | {evaluation} "
            f"| {episodes[-1, 3]:.0f} |"
        )
    for grey, method in (("0.2", "SkiMo"), ("0.6", "SkiMo w/o CEM")):
        axes.plot(*paper_curves(task)[method].T, "--", color=grey, lw=1.2, label=f"paper: {method}")
    name, best = ("success", 1) if task == "maze" else ("sub-tasks", 4)
    axes.set(
        xlabel="env steps", ylabel=f"{name}, mean of {args.window} training episodes", ylim=(-0.03 * best, 1.03 * best)
    )
    axes.set_xlim(0, max((episodes[-1, 0] for _, _, episodes, _ in runs if len(episodes)), default=1) * 1.15)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title(f"{task} (dots: clean evaluation)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, args.out)


def main(args: Args):
    """Draw what the folders hold: results of a grid, or single runs."""
    files = [sorted(path.rglob("seed*.json")) for path in args.paths]
    if any(files) and not all(files):
        sys.exit("error: some folders hold results of benchmarks/run.py and some do not; plot one kind at a time")
    if any(files):
        plot_grid(args, [path for found in files for path in found])
    else:
        plot_runs(args)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
