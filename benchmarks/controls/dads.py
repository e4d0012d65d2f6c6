"""Positive control of algos/dads.py: in an open hall its skills go all ways, and plans over them reach near goals.

    python benchmarks/controls/dads.py --out benchmarks/results/studies/dads/hall_seed1.csv

Phase A is the file's own `train`, in a maze without its inner walls. Then nothing is learnt any more, and goals 3 cells
away, which nothing had told it, are reached by its planner with minus the distance as score. The csv has what was
logged in training, a JSON beside it the measurements and the verdict:

  resultant_over_skills   |mean of headings| over skills: 0 if they cover the circle, 1 if all go the same way
  resultant_of_a_skill    the same over starts of one skill: 1 if it does the same thing everywhere
  cells, cells_uniform    different cells visited by 64 episodes of 200 env steps, skills and uniform actions
  reached, ...            share of 16 goals that came nearer than half a cell within 200 env steps
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import dads
from benchmarks.controls import frame
from data_tools import make_envs
from data_tools.tasks import maze

MIDDLE = (20, 20)
STEPS = 200  # env steps of an episode
DISTANCE = 3.0  # of goals, in cells
NEAR = 0.5  # cells


def circle(n: int):
    """n unit vectors around the circle, (n, 2)."""
    angle = 2 * np.pi * np.arange(n) / n
    return np.stack([np.cos(angle), np.sin(angle)], 1).astype(np.float32)


def headings(agent, args) -> dict:
    """How 16 skills from 8 starts leave them, after 60 env steps."""
    z = circle(16)
    paths = [dads.skill_paths(agent, z, 60, args, seed)[:, :, :2] for seed in range(100, 108)]
    way = np.stack([path[-1] - path[0] for path in paths])  # (starts, skills, 2)
    direction = way / np.linalg.norm(way, axis=-1, keepdims=True)
    of_a_skill = np.linalg.norm(direction.mean(0), axis=-1)  # (skills,)
    return dict(
        resultant_over_skills=float(np.linalg.norm(direction.mean((0, 1)))),
        resultant_of_a_skill=float(of_a_skill.mean()),
        cells_in_60_steps=float(np.linalg.norm(way, axis=-1).mean()),
    )


def visited(choose_action, seed: int) -> int:
    """Different cells visited by 64 episodes."""
    envs = make_envs("maze", 64)
    obs, _ = envs.reset(seed=seed)
    cells = set()
    for _ in range(STEPS):
        cells |= set(map(tuple, maze.cell_of(obs)))
        obs, *_ = envs.step(choose_action(obs))
    envs.close()
    return len(cells)


def reached(agent, args, seed: int, plans: bool) -> float:
    """Share of 16 goals around the starts that came near; skills last skill_horizon env steps."""
    envs = make_envs("maze", 16)
    obs, _ = envs.reset(seed=seed)
    goal = torch.from_numpy(obs[:, :2] + DISTANCE * circle(16))[:, None]  # (E, 1, 2)

    def score(x, x_later):
        return -(x_later - goal).norm(dim=-1)

    nearest = np.full(16, np.inf)
    for t in range(STEPS):
        if t % args.skill_horizon == 0:
            z = 2 * torch.rand(16, 2).numpy() - 1
            if plans:
                z = dads.plan(agent.dynamics, score, torch.from_numpy(obs[:, :2]), args)[:, 0].numpy()
        obs, *_ = envs.step(agent.act(np.concatenate([obs, z], 1), explore=False))
        nearest = np.minimum(nearest, np.linalg.norm(obs[:, :2] - goal[:, 0].numpy(), axis=1))
    envs.close()
    return float((nearest < NEAR).mean())


def measure(agent, args) -> dict:
    torch.manual_seed(args.seed)
    uniform = np.random.default_rng(args.seed)
    z = 2 * torch.rand(64, 2).numpy() - 1
    return dict(
        **headings(agent, args),
        cells=visited(lambda obs: agent.act(np.concatenate([obs, z], 1), explore=False), 200),
        cells_uniform=visited(lambda obs: uniform.uniform(-1, 1, (64, 2)), 200),
        reached=reached(agent, args, 300, plans=True),
        reached_by_random_skills=reached(agent, args, 300, plans=False),
    )


def verdict(facts: dict) -> bool:
    return (
        facts["resultant_over_skills"] < 0.3
        and facts["resultant_of_a_skill"] > 0.7
        and facts["cells"] > facts["cells_uniform"]
        and facts["reached"] > 0.8 > facts["reached_by_random_skills"]
    )


def main():
    parser = frame.parser(__doc__)
    parser.add_argument("--env-steps", type=int, default=150_000)
    given = parser.parse_args()
    hall = np.pad(np.zeros((40, 40), dtype=bool), 1, constant_values=True)
    maze.make_layout = lambda: hall
    maze.START = MIDDLE
    args = dads.parse_args(["--env-id", "maze", "--seed", str(given.seed), "--device", "cpu"])
    args.total_timesteps = args.discover_steps = given.env_steps
    args.eval_interval = 10**9
    args.eval_episodes = 1
    with frame.record(given.out) as facts:
        _, agent, _, curves = frame.train(dads, args)
        facts |= measure(agent, args)
        columns = sorted(name for name in curves if not name.startswith(("charts", "eval")))
        rows = []
        for step in sorted({step for name in columns for step in curves[name]}):
            values = [curves[name].get(step) for name in columns]
            rows.append([step, *("" if value is None else f"{value:.4g}" for value in values)])
        frame.write_csv(given.out, ("env_step", *columns), rows)
        rewards = list(curves.get("losses/intrinsic_reward", {}).values())
        facts |= dict(intrinsic_reward=rewards[-1] if rewards else None, passed=verdict(facts), args=asdict(args))
    print(json.dumps({name: value for name, value in facts.items() if name != "args"}, indent=1))


if __name__ == "__main__":
    main()
