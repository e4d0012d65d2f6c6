"""Positive control of algos/hiro.py: a point learns to reach random goals in an open maze.

    python benchmarks/controls/hiro.py --out benchmarks/results/studies/hiro/open_maze_seed1.csv --seed 1
    python benchmarks/controls/hiro.py --reported --out hiro.csv    # with the settings of the runs in RESULTS

The file's own `train` runs on a task of 20 lines. The csv has a row per evaluation: 200 episodes without noise, with
the same starts and goals each time. The JSON beside it tells command, commit, machine, arguments, the best and the last
evaluation, and what uniform actions reach on the same episodes. The picture beside it shows the goals that the high
level gave along the way: arrows start where the point was and end where it was sent.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import hiro
from benchmarks.controls import frame
from benchmarks.plot import save
from data_tools import TASKS, Task, make_envs
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

    saved = {"position": np.float64, "target": np.float64}

    def __init__(self, num_envs: int, max_episode_steps: int = 100, **options):
        super().__init__(num_envs, 4, 2, max_episode_steps, **options)
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
TASKS["open-maze"] = Task(envs="benchmarks.controls.hiro:OpenMazeVectorEnv", max_return=1.0)
hiro.GOAL_RANGE["open-maze"] = [0.4, 0.4]


def record_goals(agent, args, seed: int, episodes: int):
    """Episodes without noise. Returns observations (T+1, E, O), goals (T, E, G) in their units, and lengths (E,)."""
    envs = make_envs(args.env_id, episodes)
    obs, _ = envs.reset(seed=seed)
    path = [obs]
    goals = []
    place = goal = torch.zeros(episodes, agent.goal_dim)
    while not envs.waiting.all():
        action, place, goal = agent.act(obs, envs.steps, place, goal, explore=False)
        obs, *_ = envs.step(action)
        path.append(obs)
        goals.append((goal * agent.goal_unit).numpy())
    envs.close()
    return np.stack(path), np.stack(goals), envs.steps


def draw_goals(agent, args, path: Path, seed: int):
    """The three longest of twelve episodes; an arrow leads from where a goal was given to where it sent the agent."""
    obs, goals, lengths = record_goals(agent, args, seed, 12)
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, e in zip(figure.subplots(1, 3), np.argsort(-lengths, kind="stable")):
        starts = np.arange(0, lengths[e], args.goal_steps)
        y, x = obs[: lengths[e] + 1, e, :2].T
        axes.plot(x, y, color="#1f77b4", lw=1.2)
        axes.plot(x[0], y[0], "o", color="#1f77b4", ms=5)
        up, right = goals[starts, e, :2].T
        axes.quiver(
            x[starts], y[starts], right, up, angles="xy", scale_units="xy", scale=1, width=0.005, color="#d62728"
        )
        axes.plot(obs[0, e, 3], obs[0, e, 2], "*", color="#2ca02c", ms=12)
        axes.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal")
        axes.set_title(f"{lengths[e]} env steps, {len(starts)} goals")
    save(figure, path)


def uniform_success(args) -> float:
    """What uniform actions reach on the episodes of the evaluations."""
    envs = make_envs(args.env_id, args.eval_episodes)
    envs.reset(seed=10_000 + args.seed)
    rng = np.random.default_rng(args.seed)
    while not envs.waiting.all():
        envs.step(rng.uniform(-1, 1, envs.action_space.shape))
    return TASKS[args.env_id].success(envs.returns)


def main():
    parser = frame.parser(__doc__, reported=True)
    parser.add_argument("--env-steps", type=int, help="instead of 40,000, as reported 300,000")
    parser.add_argument("--no-correction", dest="correction", action="store_false", help="without eq. 5")
    given = parser.parse_args()
    settings = SETTINGS | (dict(total_timesteps=given.env_steps) if given.env_steps else {})
    args = hiro.Args(**settings, seed=given.seed)
    if given.reported:
        args = frame.reported_args(hiro, "open-maze", given.seed, given.env_steps)
        args.eval_interval, args.eval_episodes = 20_000, SETTINGS["eval_episodes"]
    args.correction = given.correction
    with frame.record(given.out) as facts:
        results, agent, episodes, _ = frame.train(hiro, args)
        rows = []
        for step, mean, success in results["evaluations"]:
            training = TASKS[args.env_id].success(episodes[episodes[:, 0] <= step, 1][-100:])
            rows.append((step, round(success, 4), round(mean, 4), round(training, 4)))
        frame.write_csv(given.out, ("env_step", "success", "mean_return", "training_success"), rows)
        successes = [row[1] for row in rows]
        facts |= dict(env="open maze, 10 x 10, random starts and goals", uniform_success=uniform_success(args))
        facts |= dict(best_success=max(successes), last_success=successes[-1], gate=GATE, passed=successes[-1] > GATE)
        facts |= dict(goal_progress=results["goal_progress"])  # with exploration
        facts |= dict(updates=results["updates"], args=asdict(args))
    draw_goals(agent, args, given.out.with_suffix(".png"), 10_000 + args.seed)
    words = f"best {max(successes):.2f}, last {successes[-1]:.2f}, random {facts['uniform_success']:.2f}"
    print(f"success: {words}; {'learnt' if facts['passed'] else 'NOT learnt'}")


if __name__ == "__main__":
    main()
