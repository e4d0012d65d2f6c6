"""Learning curves beside the paper's; drawn by report.py."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks import scores
from benchmarks.scores import MAIN, METHODS, TASKS, board, board_end, board_label, boards, curve, label
from data_tools.files import write_atomically

OTHERS = ("black", "#00a896", "#7b2cbf", "#588157")  # colours of a user's own methods and runs


def colours(methods) -> dict[str, str]:
    """Colour of each method; those of a user's own take the others in turn."""
    own = [name for name in methods if name not in METHODS]
    return {name: METHODS[name].colour if name in METHODS else OTHERS[own.index(name) % 4] for name in methods}


def style(axes, task: str, end: int, title: str):
    facts = TASKS[task]
    span = facts.best - facts.worst
    axes.set_xlim(0, end / 1000)
    axes.set_ylim(facts.worst - 0.02 * span, facts.best + 0.04 * span)
    axes.set_title(title, fontsize=11)
    axes.set_xlabel("env steps / 1,000", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def draw_seeds(axes, cell, end: int, colour: str, width: float = 2.2):
    """Every seed thin, their mean thick; a shorter cell to its own end."""
    end = min(end, cell.main_end)
    curves = [curve(run, end) for run in cell.reaching(end)]
    curves = [(x, y) for x, y in curves if len(x)]
    for x, y in curves if len(curves) > 1 else []:
        axes.plot(x / 1000, y, color=colour, lw=0.6, alpha=0.35)
    if curves:
        axes.plot(curves[0][0] / 1000, np.mean([y for _, y in curves], axis=0), color=colour, lw=width)


def draw_paper(axes, task: str, method: str, end: int, colour: str):
    """The paper's curve, dotted, up to an env step; True if there is one."""
    points = scores.PAPER.get((task, method))
    if points is None or points[0, 0] >= end:
        return False
    steps = np.append(points[points[:, 0] < end, 0], min(end, points[-1, 0]))
    axes.plot(steps / 1000, np.interp(steps, *points.T), ":", color=colour, lw=1.4)
    return True


def legend(figure, found: dict[str, str], columns: int, paper: bool):
    """One legend on top: names with their colours, and the paper."""
    lines = [Line2D([], [], color=colour, lw=2.2, label=name) for name, colour in found.items()]
    lines += [Line2D([], [], color="black", ls=":", lw=1.4, label="the paper (other data)")] * paper
    figure.legend(handles=lines, loc="upper center", ncol=columns, frameon=False, fontsize=9.5, handlelength=1.8)


def overview(cells, published: bool) -> Figure:
    """A panel for each board, over the env steps that were run; of published methods the main ones."""
    panels = boards(cells)
    rows = -(-len(panels) // 3)
    columns = min(3, len(panels))
    height = 2.75 * rows + 0.4
    figure = Figure(figsize=(max(3.25 * columns, 7), height))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    found = dict.fromkeys(method for _, method, _ in cells)
    shown = [name for name in MAIN if name in found]
    shown += [] if published else [name for name in found if name not in MAIN]
    colour, paper = colours(shown), False
    for axes, (task, data) in zip(grid.flat, panels):
        end = board_end(cells, task, data)
        style(axes, task, end, board_label(task, data))
        for name in [name for name in shown if (task, name, data) in cells]:
            draw_seeds(axes, cells[task, name, data], end, colour[name])
            if scores.SHARE not in data:
                paper |= draw_paper(axes, task, name, end, colour[name])
    for axes, (task, _) in zip(grid[:, 0], panels[::columns]):
        axes.set_ylabel("share of the task" if TASKS[task].max_return > 1 else "return", fontsize=9)
    beside = min(6 if columns == 3 else 3, len(shown) + 1)  # entries in a line; the paper's is one more
    legend(figure, {label(name): colour[name] for name in shown}, beside, paper)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 * (1 + len(shown) // beside) / height))
    return figure


def enlarged(cells, task: str) -> Figure:
    """All methods on a task: training, and evaluations without noise; a row for each kind of data."""
    kinds = [data for t, data in boards(cells) if t == task]
    names = list(dict.fromkeys(method for t, method, _ in cells if t == task))
    colour = colours(names)
    height = 3.6 * len(kinds) + 0.21 * (1 + (len(names) - 1) // 6)
    figure = Figure(figsize=(10.5, height))
    for (training, clean), data in zip(figure.subplots(len(kinds), 2, squeeze=False), kinds):
        end = board_end(cells, task, data)
        style(training, task, end, f"{board_label(task, data)}: training")
        style(clean, task, end * 1.02, "without noise")
        for name, cell in board(cells, task, data).items():
            runs = cell.reaching(min(end, cell.main_end))
            draw_seeds(training, cell, end, colour[name], 1.8)
            steps = [step for step, _ in runs[0].evaluations if step <= end * 1.02]  # where the picture ends
            values = np.array([[scores.without_noise(run, step) for run in runs] for step in steps])
            kept = [i for i, row in enumerate(values) if not np.isnan(row).any()]
            if kept:
                x = np.array(steps)[kept] / 1000
                clean.plot(x, values[kept], "o", color=colour[name], ms=3, alpha=0.4)
                clean.plot(x, values[kept].mean(1), "o-", color=colour[name], lw=1.6, ms=5)
    legend(figure, {label(name): colour[name] for name in names}, 6, paper=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.21 * (1 + (len(names) - 1) // 6) / height))
    return figure


def beside_published(runs, published) -> Figure:
    """A user's runs with the published ones of SkiMo and of their methods, and the paper's; a panel for each board."""
    panels = list(dict.fromkeys(scores.published_board(run) for run in runs))
    figure = Figure(figsize=(6.5 * len(panels), 4.6))
    lines, paper = {}, False
    for axes, (task, data) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        here = {number: run for number, run in enumerate(runs) if scores.published_board(run) == (task, data)}
        end = max(run.end for run in here.values())
        style(axes, task, end, board_label(task, data))
        for name in dict.fromkeys(["skimo", *(run.method for run in here.values())]):
            if (task, name, data) in published:
                draw_seeds(axes, published[task, name, data], end, METHODS[name].colour)
                lines[f"published: {label(name)}"] = METHODS[name].colour
            if scores.SHARE not in data and name in METHODS:
                paper |= draw_paper(axes, task, name, end, METHODS[name].colour)
        for number, run in here.items():
            x, y = curve(run, run.end)
            axes.plot(x / 1000, y, color=OTHERS[number % 4], lw=1.8, marker="o" if len(x) < 3 else None)
            lines[f"{number + 1}: {label(run.method)}, seed {run.seed}"] = OTHERS[number % 4]
    legend(figure, lines, 3, paper)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.05 * (1 + len(lines) // 3)))
    return figure


def save(figure: Figure, path: Path, **options):
    """Write a picture whole or not at all, with the same bytes for the same logs."""
    options |= dict(dpi=96, metadata={"Software": None}, pil_kwargs={"optimize": True})
    write_atomically(path, lambda part: figure.savefig(part, **options))
    print(f"wrote {path}")
