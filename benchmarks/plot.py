"""Learning curves over the paper's; drawn by report.py."""

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.scores import (
    DATA,
    METHODS,
    PAPER,
    TASKS,
    Cell,
    boards,
    evaluation_at,
    kinds,
    smooth,
)
from data_tools.files import write_atomically

SHOWN = ("skimo", "skimo_no_cem", "skimo_sac", "skimo_no_joint", "spirl")  # methods in the overview
LABEL = 0.2  # inches between names beside curves


def thousands(value: float, _=None) -> str:
    if value == 0:
        return "0"
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k"


def spread(values: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart so that neighbours are at least gap apart, all between low and high; their order stays."""
    order = np.argsort(values, kind="stable")
    groups = []  # of labels that touch

    def middle(labels) -> float:
        half = gap * (len(labels) - 1) / 2
        return float(np.clip(np.mean([values[index] for index in labels]), low + half, high - half))

    for index in order:
        groups.append([index])
        while len(groups) > 1:
            distance = gap * (len(groups[-1]) + len(groups[-2])) / 2
            if middle(groups[-1]) - middle(groups[-2]) >= distance - 1e-9:
                break
            groups[-2:] = [groups[-2] + groups[-1]]
    moved = np.empty(len(values))
    for labels in groups:
        moved[labels] = middle(labels) + gap * (np.arange(len(labels)) - (len(labels) - 1) / 2)
    return list(moved)


def label_ends(axes, ends: list[tuple], gap: float, size: int = 11):
    """Write names to the right of the axes, at the heights of the lines' ends: (x, y, text, colour)."""
    right = axes.get_xlim()[1]
    heights = spread([y for _, y, _, _ in ends], gap, *axes.get_ylim())
    for (x, y, text, colour), height in zip(ends, heights):
        axes.plot([x, right, right * 1.03], [y, y, height], ":", color=colour, lw=0.6, alpha=0.6, clip_on=False)
        axes.text(right * 1.04, height, text, color=colour, va="center", clip_on=False, size=size)


def look(method: str) -> tuple[str, str]:
    """Short name and colour; a method of a user's own is black."""
    if method in METHODS:
        return METHODS[method].short, METHODS[method].colour
    return method, "black"


def draw_training(axes, cells, task: str, data: str, end: int, methods, large: bool) -> list[tuple]:
    """Our curves, their mean thick up to the main end, and the paper's dashed. Returns the lines' ends.

    large: every seed, too, and our ends are labelled.
    """
    ends = []
    for name in methods:
        short, colour = look(name)
        cell = cells.get((task, name, data))
        if cell:
            for run in cell:
                if large or run.end > cell.main_end:
                    curve = smooth(run)
                    curve = curve[curve[:, 0] <= run.end]
                    thin = dict(lw=0.7, alpha=0.35) if large else dict(lw=1.1, alpha=0.7)
                    axes.plot(*curve.T, color=colour, **thin)
            last = cell.main_end
            reaching = [smooth(run) for run in cell.reaching(last)]
            grid = np.arange(max(curve[0, 0] for curve in reaching), last + 1, 500)
            mean = np.mean([np.interp(grid, *curve.T) for curve in reaching], axis=0)
            axes.plot(grid, mean, color=colour, lw=2.2)
            if large and len(grid) > 0:  # a young run has no score yet
                seeds = f"{len(reaching)} seed" + "s" * (len(reaching) > 1)
                ends.append((grid[-1], mean[-1], f"{short}, {seeds}", colour))
        curve = PAPER.get((task, METHODS[name].paper if name in METHODS else None))
        if curve is not None and cell:
            axes.plot(*curve.T, "--", color=colour, lw=1.3, dashes=(4, 2))
            x = min(end, curve[-1, 0])
            y = np.interp(x, *curve.T)
            ends.append((x, y, f"{short}{', paper' if large else ''}", colour))
    return ends


def style(axes, task: str, end: int, size: int = 11):
    facts = TASKS[task]
    axes.set_xlim(0, end)
    axes.set_ylim(facts.worst - 0.03 * facts.span, facts.best + 0.05 * facts.span)
    axes.set_yticks(np.linspace(facts.worst, facts.best, 5))
    axes.xaxis.set_major_formatter(FuncFormatter(thousands))
    axes.set_xlabel("env steps", fontsize=size)
    axes.tick_params(labelsize=size)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def overview(cells) -> Figure:
    """All tasks in a row, to the ends of the paper's curves; a row for each kind of data."""
    panels = boards(cells)
    tasks = list(dict.fromkeys(task for task, _ in panels))
    data_kinds = kinds(cells)
    height = 5.8 + 5.3 * (len(data_kinds) - 1)  # in inches
    figure = Figure(figsize=(4.2 * len(tasks), height))
    figure.subplots_adjust(left=0.18 / len(tasks), right=1 - 0.38 / len(tasks), wspace=0.85, hspace=1.28)
    figure.subplots_adjust(top=1 - 1.16 / height, bottom=2.32 / height)
    rows = figure.subplots(len(data_kinds), len(tasks), squeeze=False)
    for data, task in itertools.product(data_kinds, tasks):
        axes = rows[data_kinds.index(data), tasks.index(task)]
        if (task, data) not in panels:
            axes.remove()
            continue
        facts = TASKS[task]
        present = [name for t, name, d in cells if (t, d) == (task, data)]
        names = [name for name in SHOWN if name in present] or present  # runs of a user's own
        style(axes, task, facts.paper_end, 13)
        ends = draw_training(axes, cells, task, data, facts.paper_end, names, large=False)
        label_ends(axes, ends, 0.09 * facts.span, 13)
        axes.set_title(f"{facts.label}\n{DATA.get(data, data)} data", fontsize=15)
        axes.set_ylabel(facts.measure, fontsize=13)
        axes.set_xticks([0, facts.paper_end / 2, facts.paper_end])
        axes.text(0, -0.34, "Seeds run here:", transform=axes.transAxes, va="center", weight="bold", size=13)
        for line, name in enumerate(names, 1):
            cell = cells[task, name, data]
            short, colour = look(name)
            text = f"{short}: {len(cell.reaching(cell.main_end))} to {thousands(cell.main_end)}"
            further = Counter(run.end for run in cell if run.end > cell.main_end)
            longer = [f"{n} to {thousands(end)}" for end, n in sorted(further.items())]
            text += f" ({', '.join(longer)})" if longer else ""
            at = dict(transform=axes.transAxes, va="center", size=13)
            axes.text(0, -0.34 - 0.115 * line, text, color=colour, **at)
    text = "Solid: our runs (mean of seeds; thin: those that went on). Dashed: the paper's (other data, five seeds)."
    figure.text(0.5, 1 - 0.26 / height, text, ha="center", va="center", fontsize=15)
    return figure


def count_labels(task: str, here: dict[str, Cell]) -> int:
    """How many lines of ours and of the paper have their names beside the curves of a task."""
    return len(here) + sum(name in METHODS and (task, METHODS[name].paper) in PAPER for name in here)


def enlarged(cells, task: str) -> Figure:
    """The part of a task's curves that was run here, and clean evaluations; a row for each kind of data."""
    boards_here = {}
    for (t, method, data), cell in cells.items():
        if t == task:
            boards_here.setdefault(data, {})[method] = cell
    facts = TASKS[task]
    heights = [max(3.75, LABEL * count_labels(task, here)) for here in boards_here.values()]  # of axes, in inches
    height = sum(heights) + 1.3 * len(heights) - 0.25
    figure = Figure(figsize=(13.5, height))
    figure.subplots_adjust(left=0.055, right=0.875, wspace=0.56, hspace=1.3 * len(heights) / sum(heights))
    figure.subplots_adjust(top=1 - 0.45 / height, bottom=0.6 / height)
    rows = figure.subplots(len(heights), 2, squeeze=False, gridspec_kw=dict(height_ratios=heights))
    for (training, clean), inches, (data, here) in zip(rows, heights, boards_here.items()):
        gap = LABEL / inches * 1.08 * facts.span
        end = max(cell.main_end for cell in here.values())
        style(training, task, end)
        ends = draw_training(training, cells, task, data, end, here, large=True)
        label_ends(training, ends, gap)
        training.set_ylabel(facts.measure, fontsize=11)
        training.set_title(f"{facts.label}, {DATA.get(data, data)} data: training (thin: a seed)", fontsize=12)
        style(clean, task, 1.03 * end)
        ends = [draw_evaluations(clean, name, cell) for name, cell in here.items()]
        label_ends(clean, [end for end in ends if end], gap)
        episodes = ", all episodes from one state" if facts.one_start else ""
        clean.set_title(f"clean evaluation{episodes} (small: a seed)", fontsize=12)
    return figure


def draw_evaluations(axes, name: str, cell: Cell) -> tuple | None:
    """Clean evaluations of every seed, and the mean of those that reached the main end. Returns the line's end."""
    short, colour = look(name)
    for run in cell:
        for step, value in run.evaluations:
            axes.plot(step, value, "o", color=colour, ms=3.5, alpha=0.5)
    runs = cell.reaching(cell.main_end)
    steps = [step for step, _ in runs[0].evaluations]
    steps = [step for step in steps if not np.isnan([evaluation_at(run, step) for run in runs]).any()]
    if not steps:
        return None
    means = [np.mean([evaluation_at(run, step) for run in runs]) for step in steps]
    axes.plot(steps, means, "o-", color=colour, lw=1.8, ms=6)
    return steps[-1], means[-1], short, colour


def save(figure: Figure, path: Path):
    """Write a picture whole or not at all, with the same bytes for the same logs."""
    write_atomically(
        path, lambda part: figure.savefig(part, dpi=76, metadata={"Software": None}, pil_kwargs={"optimize": True})
    )
    print(f"wrote {path}")
