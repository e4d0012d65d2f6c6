"""Positive control of algos/hiro.py: a point learns to reach random goals in an open maze; and pictures of goals.

    python benchmarks/controls_hiro.py --out benchmarks/results/studies/hiro/open_maze_seed1.csv --seed 1
    python benchmarks/controls_hiro.py --checkpoint runs/FOLDER/checkpoint.pt --out goals.png     # of a run in our maze

The file's own `train` runs on a task of 20 lines. The csv has a row per evaluation: 200 episodes without noise, with
the same starts and goals each time. The JSON beside it tells command, commit, machine, arguments, the best and the last
evaluation, and what uniform actions reach on the same episodes. The picture beside it shows the goals that the high
level gave along the way: arrows start where the point was and end where it was sent.
"""

import argparse
import csv
import json
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import data_tools
from algos import hiro
from benchmarks.provenance import provenance
from data_tools.files import imported
from data_tools.tasks.vector import MemberVectorEnv

GATE = 0.8  # success that the last policy needs
SETTINGS = dict(
    env_id="open-maze", device="cpu", cudagraphs=False, hidden_dim=64, total_timesteps=40_000, warmup_steps=5_000,
    updates_per_step=0.5, actor_lr=1e-3, eval_interval=4_000, eval_episodes=200, checkpoint_interval=10**9,
)  # fmt: skip


class OpenMazeVectorEnv(MemberVectorEnv):
    """E points in a square of 10 x 10 without walls; each episode has a random start and a random goal.

    Observation: position and goal, divided by 5, (4,); action: step / 0.2 (2,). Reward: how much nearer the step came,
    divided by 15, and 1 for arriving within 0.5 of the goal, which ends the episode; else it ends after 100 steps. So a
    return of 1 or more is a success, and 50 steps lead along an edge.
    """

    saved = {"position": np.float64, "target": np.float64, **MemberVectorEnv.saved}

    def __init__(self, num_envs=1, max_episode_steps=100, render_mode=None, autoreset_mode="NextStep"):
        super().__init__(num_envs, 4, 2, max_episode_steps, render_mode, autoreset_mode)
        self.position = np.zeros((num_envs, 2))
        self.target = np.zeros((num_envs, 2))

    def begin(self, members):
        for i in members:
            self.position[i] = self.rngs[i].uniform(-5, 5, 2)
            self.target[i] = self.rngs[i].uniform(-5, 5, 2)
            while np.linalg.norm(self.target[i] - self.position[i]) < 1:
                self.target[i] = self.rngs[i].uniform(-5, 5, 2)

    def advance(self, actions, running):
        before = np.linalg.norm(self.target - self.position, axis=1)
        self.position = np.clip(self.position + 0.2 * actions * running[:, None], -5, 5)
        after = np.linalg.norm(self.target - self.position, axis=1)
        arrived = running & (after < 0.5)
        return arrived + (before - after) / 15, arrived

    def observations(self):
        return np.concatenate([self.position, self.target], 1).astype(np.float32) / 5


# Ten steps at full speed go 2.0, that is 0.4 in the observation
data_tools.TASKS["open-maze"] = data_tools.Task(envs="benchmarks.controls_hiro:OpenMazeVectorEnv", max_return=1.0)
hiro.GOAL_RANGE["open-maze"] = [0.4, 0.4]


class Scalars:
    """In place of TensorBoard's writer: keeps the last value of each curve."""

    def __init__(self):
        self.last = {}

    def add_scalar(self, name, value, step):
        self.last[name] = float(value)


def record_goals(agent, args, seed: int, episodes: int):
    """Episodes without noise. Returns observations (T+1, E, O), goals (T, E, G) in their units, and lengths (E,)."""
    envs = data_tools.make_envs(args.env_id, episodes)
    levels = hiro.TwoLevels(agent, episodes, envs.single_action_space.shape[0], explore=False)
    obs, _ = envs.reset(seed=seed)
    path = [obs]
    goals = []
    lengths = np.zeros(episodes, dtype=int)
    ended = np.zeros(episodes, dtype=bool)
    while not ended.all():
        obs, _, terminations, truncations, _ = envs.step(levels(obs))
        path.append(obs)
        goals.append((levels.goal * agent.goal_unit).cpu().numpy())
        lengths += ~ended
        ended = terminations | truncations
    envs.close()
    return np.stack(path), np.stack(goals), lengths


def draw_goals(agent, args, path: Path, seed: int):
    """The three longest of twelve episodes: an arrow from each place where a goal was given to where it sent the agent.

    Returns the share of the way to the goals that all episodes covered, without noise.
    """
    obs, goals, lengths = record_goals(agent, args, seed, 12)
    draw_map = data_tools.TASKS[args.env_id].draw_map
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, e in zip(figure.subplots(1, 3), np.argsort(-lengths, kind="stable")):
        if draw_map:
            imported(draw_map)(axes)
        starts = np.arange(0, lengths[e], args.goal_steps)
        y, x = obs[: lengths[e] + 1, e, :2].T
        axes.plot(x, y, color="#1f77b4", lw=1.2)
        axes.plot(x[0], y[0], "o", color="#1f77b4", ms=5)
        up, right = goals[starts, e, :2].T
        axes.quiver(
            x[starts], y[starts], right, up, angles="xy", scale_units="xy", scale=1, width=0.005, color="#d62728"
        )
        if args.env_id == "open-maze":
            axes.plot(obs[0, e, 3], obs[0, e, 2], "*", color="#2ca02c", ms=12)
            axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1))
        else:
            reach = max(np.ptp(x), np.ptp(y), 2.0) / 2 + 1
            axes.set_xlim((x.max() + x.min()) / 2 - reach, (x.max() + x.min()) / 2 + reach)
            axes.set_ylim((y.max() + y.min()) / 2 + reach, (y.max() + y.min()) / 2 - reach)
        axes.set_aspect("equal")
        axes.set_title(f"{lengths[e]} env steps, {len(starts)} goals")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)

    given = 0.0
    left = 0.0
    for e, length in enumerate(lengths):
        for t in range(0, length, args.goal_steps):
            end = min(t + args.goal_steps, length)
            goal = goals[t, e]
            unit = agent.goal_unit.cpu().numpy()
            entries = agent.goal_entries.cpu().numpy()
            change = (obs[end, e] - obs[t, e])[entries]
            given += np.linalg.norm(goal / unit)
            left += np.linalg.norm((goal - change) / unit)
    return float(1 - left / given)


def uniform_success(args, action_dim: int = 2) -> float:
    """What uniform actions reach on the episodes of the evaluations."""
    returns, _ = hiro.rollout(
        lambda obs: 2 * torch.rand(len(obs), action_dim).numpy() - 1, args.eval_episodes, args, 10_000 + args.seed
    )
    return hiro.success(returns, args)


def control(given):
    """Train, and write csv, JSON and picture."""
    args = hiro.Args(**SETTINGS, seed=given.seed, correction=given.correction)
    if given.env_steps:
        args.total_timesteps = given.env_steps
    origin = provenance()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    scalars = Scalars()
    start = time.time()
    cpu_start = time.process_time()
    rows = []
    rollout = hiro.rollout

    def logged(*inputs):
        returns, lengths = rollout(*inputs)
        minutes = (time.process_time() - cpu_start) / 60
        rows.append([hiro.success(returns, args), returns.mean(), scalars.last.get("charts/success"), minutes])
        return returns, lengths

    hiro.rollout = logged
    with tempfile.TemporaryDirectory() as folder:
        results = hiro.train(args, Path(folder), scalars, threading.Event())
        hiro.rollout = rollout
        agent = hiro.Agent(args, 4, 2)
        hiro.load(Path(folder) / "checkpoint.pt", dict(agent=agent))
    steps = [step for step, _, _ in results["evaluations"]]
    with given.out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("env_step", "success", "mean_return", "training_success", "cpu_minutes"))
        for step, row in zip(steps, rows):
            writer.writerow((step, *("" if value is None else round(float(value), 4) for value in row)))
    successes = [row[0] for row in rows]
    facts = dict(
        **origin,
        env="open maze, 10 x 10, random starts and goals",
        best_success=max(successes),
        last_success=successes[-1],
        uniform_success=uniform_success(args),
        goal_progress=results["goal_progress"],  # with exploration
        gate=GATE,
        passed=successes[-1] > GATE,
        minutes=(time.time() - start) / 60,
        cpu_minutes=(time.process_time() - cpu_start) / 60,
        args=asdict(args),
    )
    given.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    draw_goals(agent, args, given.out.with_suffix(".png"), 10_000 + args.seed)
    words = "learnt" if facts["passed"] else "NOT learnt"
    print(
        f"success: best {max(successes):.2f}, last {successes[-1]:.2f}, random {facts['uniform_success']:.2f}; {words}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="csv; JSON and picture are put beside it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--env-steps", type=int, help="instead of 40,000")
    parser.add_argument("--no-correction", dest="correction", action="store_false", help="without eq. 5")
    parser.add_argument("--checkpoint", type=Path, help="only draw the goals of this agent, into --out (png)")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if not given.checkpoint:
        return control(given)
    with hiro.reading(given.checkpoint):
        args = hiro.Args(**hiro.load(given.checkpoint, {})["args"] | dict(device="cpu", cudagraphs=False))
        agent = hiro.Agent(args, *data_tools.env_sizes(args.env_id))
        hiro.load(given.checkpoint, dict(agent=agent))
    share = draw_goals(agent, args, given.out, 10_000 + given.seed)
    print(f"{args.env_id}: without noise {share:.2f} of the way to the goals is covered, in twelve episodes")


if __name__ == "__main__":
    main()
