"""What the algorithm files need of a task besides its environments: vectors that freeze, roll-out statistics, pictures.

Pictures are written as PNG and, with a TensorBoard writer, logged under `pictures/`. Maze tasks get maps, the others
curves of the observation's entries.
"""

import copy
import math
from pathlib import Path

import gymnasium
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from data_tools.dataset import TASKS
from data_tools.files import write_atomically

# Return of an episode in which everything was done
MAX_RETURN = {"maze": 100.0, "kitchen": 4.0, "kitchen-misaligned": 4.0, "calvin": 400.0}


def obs_scale(env_id: str, obs_dim: int) -> tuple[list[float], list[float]]:
    """Scale and shift, O numbers each, that the networks of SkiMo apply: maze (q/40 - 0.5, v/10), others raw."""
    if env_id == "maze":
        return [1 / 40, 1 / 40, 1 / 10, 1 / 10], [-0.5, -0.5, 0.0, 0.0]
    return [1.0] * obs_dim, [0.0] * obs_dim


def position_frequency(env_id: str) -> np.ndarray:
    """Radians per unit at which sines and cosines of the first P entries of an observation are taken, (P, F).

    maze: position, periods of 1 to 32 cells. kitchen: arm joints, periods of 0.25 to 4 rad, and fingers, 25 to 400 mm.
    calvin: tool position, 62 mm to 1 m; tool angles, width of the grip, arm joints, 0.25 to 4 rad or m.
    """
    if env_id == "maze":
        return 2 * np.pi / np.repeat([[1.0, 2.0, 4.0, 8.0, 16.0, 32.0]], 2, 0)
    unit = np.repeat([1.0, 0.1], [7, 2]) if env_id.startswith("kitchen") else np.repeat([0.25, 1.0], [3, 11])
    return 2 * np.pi / (unit[:, None] * [0.25, 0.5, 1.0, 2.0, 4.0])


def make_envs(env_id: str, num_envs: int, video: Path | None = None) -> gymnasium.vector.VectorEnv:
    """E environments of a task stepped as one; a member freezes when its episode ends, until it is reset by mask.

    With `video`, the first member's episode is recorded into that MP4 file when the environments are closed.
    """
    disabled = gymnasium.vector.AutoresetMode.DISABLED
    if video is not None:
        kwargs = {"render_mode": "rgb_array", "vector_kwargs": {"autoreset_mode": disabled}}
        envs = gymnasium.make_vec(TASKS[env_id], num_envs, vectorization_mode="sync", **kwargs)
        return VideoRecorder(envs, Path(video))
    # As many threads as torch has, so that runs side by side do not fight; the maze is too quick for threads.
    threads = None if env_id == "maze" else min(torch.get_num_threads(), num_envs)
    kwargs = {"autoreset_mode": disabled, "num_threads": threads}
    return gymnasium.make_vec(TASKS[env_id], num_envs, vectorization_mode="vector_entry_point", **kwargs)


def env_sizes(env_id: str) -> tuple[int, int]:
    """Numbers in an observation and in an action, O and A."""
    envs = make_envs(env_id, 1)
    envs.close()
    return envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


class VideoRecorder(gymnasium.vector.VectorWrapper):
    """Records the first member's pictures in real time, at most 50 per second; written when closed."""

    def __init__(self, envs, path: Path):
        super().__init__(envs)
        self.path, self.frames, self.steps = path, [], 0
        self.every = max(1, round(self.metadata["render_fps"] / 50))  # steps per picture

    def step(self, actions):
        result = self.env.step(actions)
        if self.steps % self.every == 0:
            self.frames.append(self.env.render()[0])
        self.steps += 1
        return result

    def close(self, **kwargs):
        import imageio.v2 as imageio  # ffmpeg is started only for videos

        if self.frames:
            options = {"fps": self.metadata["render_fps"] / self.every, "macro_block_size": 1}
            write_atomically(self.path, lambda part: imageio.mimwrite(part, self.frames, **options))
            self.frames = []
        return super().close(**kwargs)


def cuda_devices() -> list[int]:
    """The GPU that this process uses, if any: torch's defaults for random states would occupy all of the machine's."""
    return [torch.cuda.current_device()] if torch.cuda.is_initialized() else []


def fork_rng():
    """Context that leaves torch's random state as it was, on the CPU and on the GPU of this process."""
    return torch.random.fork_rng(cuda_devices())


@torch.no_grad()
def rollout(execute_skill, envs, skills, choose_skill, args, seed: int, max_skills: int | None = None):
    """One episode, at most max_skills long, in every environment, with skills z = choose_skill(obs, episode_start).

    execute_skill is the algorithm file's own. Returns returns (E,), lengths in env steps (E,), the trace of
    execute_skill closed by the last observation, and the skills (E, skills, Z). The random state outside is left as it
    was, the environments are closed.
    """
    skills, trace, zs = copy.deepcopy(skills).cpu(), [], []
    bar = tqdm(desc="roll-outs", total=max_skills, unit="skill", leave=False, disable=max_skills is None)
    with fork_rng(), bar:
        torch.manual_seed(seed)
        obs, _ = envs.reset(seed=seed)
        ended, returns, lengths = np.zeros(len(obs), dtype=bool), 0.0, 0
        while not ended.all() and len(zs) != max_skills:
            zs.append(choose_skill(obs, np.full(len(obs), not zs)))
            obs, rewards, ended, steps = execute_skill(envs, skills, obs, zs[-1], ended, args, trace)
            returns, lengths = returns + rewards.astype(np.float64), lengths + steps
            bar.update()
    envs.close()
    return returns, lengths, [*trace, (obs, trace[-1][1], ended)], torch.stack(zs, 1)


@torch.no_grad()
def open_loop_prediction(model, trace: list, z, skill_horizon: int, num_paths: int = 4) -> list:
    """The first of E roll-outs, and what the dynamics foretells of each from its first state alone (paper, fig. 10).

    model has encoder (..., O) -> (..., d) and next (..., d), (..., Z) -> (..., d); trace and z (E, skills, Z) are what
    `rollout` returns. A predicted latent state is read as the state of the *other* roll-outs whose encoding is nearest:
    decoders are trained on encoded states only and misread what lies beside them. Returns, for each path, observations
    at the boundaries of its skills, real and predicted, each (skills + 1, O).
    """
    model, paths = copy.deepcopy(model).cpu(), []
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
    """Statistics of E roll-outs of the skill prior.

    returns (E,); trace: one (obs (E, O), action (E, A), ended (E,) bool) per env step, ended telling which members
    had finished before the step; the last entry holds the final observation.

    Kitchen, CALVIN: share of roll-outs that did each sub-task at some time, in any order, and how many on average.
    Maze: `goal` share that reached it; `approach` least geodesic distance to it in cells (10, 25 and 50 % quantiles;
    34 at the start); `cells` mean number of different cells visited; `lateral` std of the distance to the cells'
    centre line while moving along it (cells); `wall` share of env steps that deviate from free flight, i.e. touch a
    wall.
    """
    statistics = {"prior_return": float(returns.mean())}
    obs, actions, ended = (np.stack(part) for part in zip(*trace))  # (T+1, E, O), (T+1, E, A), (T+1, E)
    if env_id.startswith("kitchen"):
        from data_tools import kitchen

        return statistics | kitchen.subtask_statistics(obs, ended)
    if env_id == "calvin":
        from data_tools import calvin

        return statistics | calvin.subtask_statistics(obs, ended)
    from data_tools import maze  # here, so that `python -m data_tools.maze` does not meet itself imported

    cells = maze.cell_of(obs)  # (T+1, E, 2)
    distance = maze.geodesic_distance(maze.make_layout(), maze.GOAL)[cells[..., 0], cells[..., 1]]  # (T+1, E)
    goal = returns >= MAX_RETURN["maze"]
    approach = np.where(goal, 0.0, distance.min(0))  # (E,)
    cell_index = cells[..., 0] * 42 + cells[..., 1]
    visited = [len(np.unique(cell_index[:, e])) for e in range(obs.shape[1])]

    # Free flight: v' = v + dt (100 a - v) / (m + dt), from the velocity clipped to [-5, 5]
    velocity = obs[:-1, :, 2:].clip(-5, 5)
    free = velocity + 0.01 * (100 * actions[:-1] - velocity) / (4.18879 + 0.01)
    touches = np.abs(obs[1:, :, 2:] - free).max(-1) > 1e-3  # (T, E)
    running = ~ended[:-1]
    along_first = (np.abs(obs[:-1, :, 2]) > 3.5) & running
    offset = obs[:-1, :, 1] + 0.1
    lateral = (offset - np.round(offset))[along_first]
    quantiles = np.quantile(approach, [0.1, 0.25, 0.5])
    statistics |= {"goal": float(goal.mean())}
    statistics |= {f"approach_{q}": float(value) for q, value in zip((10, 25, 50), quantiles)}
    return statistics | {
        "cells": float(np.mean(visited)),
        "lateral": float(lateral.std()) if len(lateral) else 0.0,
        "wall": float(touches[running].mean()),
    }


def save_figure(figure: Figure, path: Path, writer=None):
    """Write a figure as PNG, atomically, and log it under pictures/NAME."""
    write_atomically(path, lambda part: figure.savefig(part, dpi=110, bbox_inches="tight"))
    if writer is not None:
        writer.add_image(f"pictures/{path.stem}", matplotlib.image.imread(path)[..., :3], dataformats="HWC")


def plot_visited(env_id: str, obs: np.ndarray, path: Path, writer=None):
    """States visited in training, early to late, obs (n, O) in the order of collection (paper, fig. 9)."""
    figure = Figure(figsize=(7, 6))
    axes = figure.subplots()
    colour = np.linspace(0, 100, len(obs))
    if env_id == "maze":
        from data_tools import maze

        maze.draw_maze(axes)
        points = axes.scatter(obs[:, 1], obs[:, 0], c=colour, s=1.5, cmap="viridis", linewidths=0)
    else:
        centred = obs - obs.mean(0) if len(obs) else obs  # none if the run was shorter than an episode
        plane = centred @ np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]  # along the two principal axes
        points = axes.scatter(plane[:, 0], plane[:, 1], c=colour, s=1.5, cmap="viridis", linewidths=0)
    figure.colorbar(points, ax=axes, label="% of training")
    axes.set_title("states visited in training")
    save_figure(figure, path, writer)


def plot_prediction(env_id: str, paths: list, path: Path, writer=None):
    """Open-loop predictions of skill after skill against the simulator (paper, fig. 10).

    paths: of each, observations real and predicted, both (skills + 1, O).
    """
    columns = math.ceil(len(paths) ** 0.5)
    figure = Figure(figsize=(5 * columns, 5.2 * math.ceil(len(paths) / columns)), layout="tight")
    all_axes = figure.subplots(math.ceil(len(paths) / columns), columns, squeeze=False).flat
    for axes, (real, predicted) in zip(all_axes, paths):
        title = f"{len(real) - 1} skills from the first state alone"
        if env_id == "maze":
            from data_tools import maze

            maze.draw_maze(axes)
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
