"""Pictures and statistics of a run: where it has been, what its model predicts, what its policy does in the task.

    python benchmarks/pictures.py runs/FOLDER                     # of a run or a checkpoint
    python benchmarks/pictures.py --pretrained MODEL.pt --env-id kitchen --algo skimo

Acts in the task for some episodes and prints their statistics: sub-tasks of kitchen and CALVIN, goal share of the maze.
Of a run its agent acts, without noise, of a model the prior. Writes into the run's folder, or next to the model:

  visited.png     states that the run has visited, early to late (paper, fig. 9); not of a pre-trained model
  prediction.png  what the world model predicts from the first state alone, skill after skill (paper, fig. 10); only of
                  files with a world model. Beside its error stands that of the guess that everything stays as it is.
  statistics.json what was printed

Shapes: E roll-outs of T steps, O observation, Z skill, d latent. A trace is what roll-outs leave: arrays obs
(T+1, E, O) and ended (T+1, E), which members had finished before the step.
"""

import importlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import data_tools
from benchmarks.plot import save
from data_tools import TASKS, DataError
from data_tools.files import imported, write_atomically
from data_tools.tasks.calvin import SUBTASKS, subtask_conditions
from data_tools.tasks.kitchen import elements_complete
from data_tools.tasks.maze import GOAL, GOAL_REWARD, cell_of, geodesic_distance, make_layout


@dataclass
class Args:
    run: tyro.conf.Positional[Path | None] = None  # run folder or checkpoint
    pretrained: Path | None = None  # a pre-trained model instead
    algo: str | None = None  # the file that made it, without .py (None: what the run says, else skimo)
    env_id: str = "maze"  # task, with --pretrained
    episodes: int = 100  # roll-outs for the statistics
    seed: int = 1  # of the roll-outs


# ----------------------------------------------------------------------------------------------- what the files give us
def load_run(path: Path, name: str | None):
    """A run's folder or checkpoint -> (algorithm file, arguments, agent on the CPU, its env step, observations)."""
    checkpoint = path if path.is_file() else path / "checkpoint.pt"
    state = data_tools.read_state(checkpoint, ["agent"])
    algo = importlib.import_module(f"algos.{name or Path(state['script']).stem}")
    replay = state.get("rb", {})
    has_skills = hasattr(algo, "make_networks") and hasattr(algo.Agent, "choose_skills")
    if not has_skills or hasattr(algo, "RolloutBuffer") or "columns" not in replay:
        found = f"runs of {algo.FILE.stem}.py hold no skills in a replay buffer of observations"
        raise DataError(f"{found}; give another run")
    args = algo.Args(**state["args"] | dict(device="cpu", cudagraphs=False))
    agent = algo.Agent(args, algo.make_networks(args))
    agent.load_state_dict(state["agent"])
    columns = replay["columns"]
    obs = columns["obs"] if isinstance(columns, dict) else columns[0]
    obs = np.roll(obs[: replay.get("rows")].numpy(), -replay.get("added", 0), axis=0)  # a full ring: its oldest first
    return algo, args, agent, state["global_step"], obs


def load_pretrained(path: Path, name: str | None, env_id: str):
    """A pre-trained model -> (algorithm file, arguments, agent on the CPU that acts by the prior)."""
    algo = importlib.import_module(f"algos.{name or 'skimo'}")
    args = algo.parse_args(["--env-id", env_id, "--device", "cpu"])
    networks = algo.make_networks(args)
    algo.load(path, dict(networks=networks))
    agent = algo.PriorAgent(networks) if hasattr(algo, "PriorAgent") else algo.Agent(args, networks)
    return algo, args, agent


# ------------------------------------------------------------------------------------------------------------ roll-outs
def traced_rollout(algo, agent, args, num_episodes: int, seed: int, global_step: int | None = None):
    """The file's own roll-out. Returns returns (E,), skills (E, T / H, Z) and the trace."""
    envs = data_tools.make_envs(args.env_id, num_episodes)
    observations, choose = envs.observations, agent.choose_skills
    skills, trace = [], []

    def observe_and_keep():  # called once by reset and by each step
        trace.append((np.array(observations(), dtype=np.float32), envs.waiting.copy()))
        return trace[-1][0]

    def choose_and_keep(*inputs, **named):
        skills.append(choose(*inputs, **named))
        return skills[-1]

    with (
        mock.patch.object(data_tools, "make_envs", return_value=envs),
        mock.patch.object(envs, "observations", observe_and_keep),
        mock.patch.object(agent, "choose_skills", choose_and_keep),
    ):
        algo.rollout(agent, args, num_episodes, seed, global_step)
    obs, ended = zip(*trace)
    return envs.returns, torch.stack(skills, 1), (np.stack(obs), np.stack(ended))


# ----------------------------------------------------------------------------------------------------------- statistics
def maze_statistics(returns, obs, ended) -> dict[str, float]:
    """Of E roll-outs, returns (E,): how near to the goal, and where.

    `goal` share that reached it; `approach` least geodesic distance to it in cells (10, 25 and 50 % quantiles; 34 at
    the start); `cells` mean number of different cells visited.
    """
    cells = cell_of(obs)  # (T+1, E, 2)
    distance = geodesic_distance(make_layout(), GOAL)[cells[..., 0], cells[..., 1]]  # (T+1, E)
    goal = returns >= GOAL_REWARD
    nearest = np.where(goal, 0.0, distance.min(0))
    figures = {"goal": float(goal.mean())}
    figures |= {f"approach_{percent}": float(np.percentile(nearest, percent)) for percent in (10, 25, 50)}
    visited = [len(np.unique(path, axis=0)) for path in cells.swapaxes(0, 1)]
    return figures | {"cells": float(np.mean(visited))}


def shares(done: dict, ended) -> dict[str, float]:
    """Share of E episodes in which each of done (T+1, E) was True at some time, and `any_order`: how many were."""
    counts = np.ones_like(ended)
    counts[1:] = ~ended[:-1]  # the first row with `ended` holds an episode's last observation, and counts
    figures = {name: float((values & counts).any(0).mean()) for name, values in done.items()}
    return figures | {"any_order": float(sum(figures.values()))}


def kitchen_statistics(returns, obs, ended) -> dict[str, float]:
    """How often each of the seven elements was complete at some time."""
    return shares(elements_complete(obs), ended)


def calvin_statistics(returns, obs, ended) -> dict[str, float]:
    """How often the four sub-tasks happen, in any order."""
    happened = subtask_conditions(obs, obs[:1])  # (T+1, E, 4)
    return shares({name: happened[..., k] for k, name in enumerate(SUBTASKS)}, ended)


STATISTICS = {"maze": maze_statistics, "kitchen": kitchen_statistics, "calvin": calvin_statistics}  # by Task.data


def rollout_statistics(env_id: str, returns, trace) -> dict[str, float]:
    """Mean return of E roll-outs, returns (E,), and what STATISTICS has for the task."""
    task = TASKS[env_id]
    figures = {"mean_return": float(returns.mean()), "success": task.success(returns)}
    return figures | (STATISTICS[task.data](returns, *trace) if task.data in STATISTICS else {})


# ----------------------------------------------------------------------------------------------------------- prediction
@torch.no_grad()
def open_loop_prediction(model, trace, z, skill_horizon: int) -> list:
    """The first of E roll-outs, and what the dynamics predicts for each from its first state alone (paper, fig. 10).

    model has encoder (..., O) -> (..., d) and next (..., d), (..., Z) -> (..., d); z (E, skills, Z) are the skills of
    the trace. A predicted latent state is read as the state of the *other* roll-outs whose encoding is nearest:
    decoders are trained on encoded states only and misread what lies beside them. Returns, for each path, observations
    at the boundaries of its skills, real and predicted, each (skills + 1, O).
    """
    obs, ended = trace  # (T+1, E, O), (T+1, E)
    encoded = model.encoder(torch.from_numpy(obs))  # (T+1, E, d)
    paths = []
    for e in range(len(z)):
        steps = int((~ended[:-1, e]).sum())
        real = obs[np.minimum(np.arange(0, steps + skill_horizon, skill_horizon), steps), e]  # (skills + 1, O)
        h = [encoded[0, e][None]]
        for t in range(len(real) - 1):
            h.append(model.next(h[-1], z[e, t][None]))
        others = ~ended & (np.arange(len(z)) != e)  # (T+1, E)
        nearest = torch.cdist(torch.cat(h), encoded[torch.from_numpy(others)]).argmin(1)
        paths.append((real, obs[others][nearest.numpy()]))
    return paths


def prediction_errors(env_id: str, real, predicted) -> tuple[float, float]:
    """Median distance of a path from the prediction, and from the guess that everything stays where it began.

    Distances in cells where the task has a map, else in standard deviations of the path's own entries.
    """
    scale = real.std(0) + 1e-6
    if TASKS[env_id].draw_map is not None:
        real, predicted, scale = real[:, :2], predicted[:, :2], 1.0
    distance = np.linalg.norm((predicted - real)[1:] / scale, axis=1)
    yardstick = np.linalg.norm((real[:1] - real)[1:] / scale, axis=1)
    return float(np.median(distance)), float(np.median(yardstick))


# ------------------------------------------------------------------------------------------------------------- pictures
def plot_visited(env_id: str, obs: np.ndarray, path: Path):
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
    save(figure, path, bbox_inches="tight")


def plot_prediction(env_id: str, paths: list, path: Path):
    """Open-loop predictions of skill after skill against the simulator (paper, fig. 10).

    paths: of each, observations real and predicted, both (skills + 1, O).
    """
    columns = math.ceil(len(paths) ** 0.5)
    rows = math.ceil(len(paths) / columns)
    figure = Figure(figsize=(5 * columns, 5.2 * rows + 0.4), layout="constrained")
    draw_map = TASKS[env_id].draw_map
    for axes, (real, predicted) in zip(figure.subplots(rows, columns, squeeze=False).flat, paths):
        error, yardstick = prediction_errors(env_id, real, predicted)
        if draw_map is not None:
            imported(draw_map)(axes)
            axes.plot(real[:, 1], real[:, 0], "o-", ms=3, lw=1.5, color="tab:blue", label="simulator")
            axes.plot(predicted[:, 1], predicted[:, 0], "x--", ms=4, lw=1, color="tab:red", label="predicted")
            unit = "cells off"
        else:
            for k in range(real.shape[1]):
                axes.plot(real[:, k], color=f"C{k % 10}", lw=1)
                axes.plot(predicted[:, k], "--", color=f"C{k % 10}", lw=1)
            unit = "std off; solid: simulator, dashed: predicted"
        title = f"{len(real) - 1} skills from the first state alone\nmedian {error:.1f} {unit}"
        axes.set_title(f"{title}\n(it stays where it is: {yardstick:.1f})", fontsize="medium")
    if draw_map is not None:
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    save(figure, path, bbox_inches="tight")


# ----------------------------------------------------------------------------------------------------------------- main
def main(args: Args) -> dict:
    """Roll-outs, statistics, pictures; returns the statistics."""
    if (args.run is None) == (args.pretrained is None):
        raise DataError("give a run's folder or checkpoint, or --pretrained MODEL")
    if args.episodes < 2:
        raise DataError("--episodes needs at least 2")
    if args.run is not None:
        algo, config, agent, global_step, visited = load_run(args.run, args.algo)
        folder = args.run if args.run.is_dir() else args.run.parent
        plot_visited(config.env_id, visited, folder / "visited.png")
    else:
        algo, config, agent = load_pretrained(args.pretrained, args.algo, args.env_id)
        global_step = None  # the prior's skills
        folder = args.pretrained.parent

    print(f"{config.env_id}: {args.episodes} episodes", flush=True)
    returns, z, trace = traced_rollout(algo, agent, config, args.episodes, args.seed, global_step)
    statistics = rollout_statistics(config.env_id, returns, trace)
    model = getattr(agent, "model", None)
    if hasattr(model, "decoder"):  # a world model of pre-training
        paths = open_loop_prediction(model, trace, z, config.skill_horizon)
        errors = np.array([prediction_errors(config.env_id, *path) for path in paths])
        statistics["prediction_error"], statistics["stays_where_it_is"] = np.median(errors, axis=0).tolist()
        plot_prediction(config.env_id, paths[:4], folder / "prediction.png")
    for name, value in statistics.items():
        print(f"  {name:20} {value:.3g}")
    write_atomically(folder / "statistics.json", lambda part: part.write_text(json.dumps(statistics, indent=1)))
    print(f"wrote {folder / 'statistics.json'}")
    return statistics


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
