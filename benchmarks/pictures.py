"""Pictures and statistics of a trained model's roll-outs: visited states, open-loop prediction, sub-tasks.

Pictures are written as PNG and, with a TensorBoard writer, logged under `pictures/`. Tasks with a map get it, the
others curves of the observation's entries. Shapes: E roll-outs of T steps, O observation, A action, Z skill, d latent.
A trace is what roll-outs leave: one (obs (E, O), action (E, A), ended (E,) bool) per env step, `ended` telling which
members had finished before the step; the last entry holds the final observation.
"""

import copy
import math
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data_tools import TASKS
from data_tools.files import imported, write_atomically


@torch.no_grad()
def open_loop_prediction(model, trace: list, z, skill_horizon: int, num_paths: int = 4) -> list:
    """The first of E roll-outs, and what the dynamics foretells of each from its first state alone (paper, fig. 10).

    model has encoder (..., O) -> (..., d) and next (..., d), (..., Z) -> (..., d); z (E, skills, Z) are the skills of
    the trace. A predicted latent state is read as the state of the *other* roll-outs whose encoding is nearest:
    decoders are trained on encoded states only and misread what lies beside them. Returns, for each path, observations
    at the boundaries of its skills, real and predicted, each (skills + 1, O).
    """
    model = copy.deepcopy(model).cpu()
    paths = []
    obs, _, ended = (np.stack(part) for part in zip(*trace))  # (T+1, E, O), ..., (T+1, E)
    encoded = model.encoder(torch.from_numpy(obs))  # (T+1, E, d)
    for e in range(min(num_paths, len(z))):
        steps = int((~ended[:-1, e]).sum())
        real = obs[np.minimum(np.arange(0, steps + skill_horizon, skill_horizon), steps), e]  # (skills + 1, O)
        h = [encoded[0, e][None]]
        for t in range(len(real) - 1):
            h.append(model.next(h[-1], z[e, t][None]))
        others = ~ended & (np.arange(len(z)) != e)  # (T+1, E)
        nearest = torch.cdist(torch.cat(h), encoded[torch.from_numpy(others)]).argmin(1)
        paths.append((real, obs[others][nearest.numpy()]))
    return paths


def rollout_statistics(env_id: str, returns: np.ndarray, trace: list) -> dict[str, float]:
    """Mean return of E roll-outs, returns (E,), and the task's own statistics of them (TASKS[env_id].statistics)."""
    figures = {"prior_return": float(returns.mean())}
    statistics = TASKS[env_id].statistics
    if statistics is None:
        return figures
    obs, actions, ended = (np.stack(part) for part in zip(*trace))  # (T+1, E, O), (T+1, E, A), (T+1, E)
    return figures | imported(statistics)(returns, obs, actions, ended)


def save_figure(figure: Figure, path: Path, writer=None):
    """Write a figure as PNG, atomically, and log it under pictures/NAME. Raises DataError if it cannot be written."""
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, bbox_inches="tight"))
    if writer is not None:
        writer.add_image(f"pictures/{path.stem}", matplotlib.image.imread(path)[..., :3], dataformats="HWC")


def plot_visited(env_id: str, obs: np.ndarray, path: Path, writer=None):
    """States visited in training, early to late, obs (n, O) in the order of collection (paper, fig. 9)."""
    figure = Figure(figsize=(7, 6))
    axes = figure.subplots()
    colour = np.linspace(0, 100, len(obs))
    draw_map = TASKS[env_id].draw_map
    if draw_map is not None:
        imported(draw_map)(axes)
        across, down = obs[:, 1], obs[:, 0]
    else:
        centred = obs - obs.mean(0) if len(obs) else obs  # none if the run was shorter than an episode
        plane = centred @ np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # along the two principal axes
        across, down = plane[:, 0], plane[:, 1]
    points = axes.scatter(across, down, c=colour, s=1.5, cmap="viridis", linewidths=0)
    figure.colorbar(points, ax=axes, label="% of training")
    axes.set_title("states visited in training")
    save_figure(figure, path, writer)


def plot_prediction(env_id: str, paths: list, path: Path, writer=None):
    """Open-loop predictions of skill after skill against the simulator (paper, fig. 10).

    paths: of each, observations real and predicted, both (skills + 1, O).
    """
    columns = math.ceil(len(paths) ** 0.5)
    rows = math.ceil(len(paths) / columns)
    figure = Figure(figsize=(5 * columns, 5.2 * rows), layout="tight")
    draw_map = TASKS[env_id].draw_map
    for axes, (real, predicted) in zip(figure.subplots(rows, columns, squeeze=False).flat, paths):
        title = f"{len(real) - 1} skills from the first state alone"
        if draw_map is not None:
            imported(draw_map)(axes)
            axes.plot(real[:, 1], real[:, 0], "o-", ms=3, lw=1.5, color="tab:blue", label="simulator")
            axes.plot(predicted[:, 1], predicted[:, 0], "x--", ms=4, lw=1, color="tab:red", label="predicted")
            axes.legend(loc="lower right")
            distance = np.linalg.norm((predicted - real)[1:, :2], axis=1)  # cells
            title += f": median {np.median(distance):.1f} cells off"
        else:
            for k in range(real.shape[1]):
                axes.plot(real[:, k], color=f"C{k % 10}", lw=1)
                axes.plot(predicted[:, k], "--", color=f"C{k % 10}", lw=1)
            title += ": simulator (solid), predicted (dashed)"
        axes.set_title(title, fontsize="medium")
    save_figure(figure, path, writer)
