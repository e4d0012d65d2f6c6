"""Relay's policies on compound goals of the kitchen: sub-tasks in order and in any order, and a picture of subgoals.

    python benchmarks/controls/relay.py RUN_OR_MODEL --out runs/goals.json     # a checkpoint.pt or a model

Goals are the two tasks and, of the 24 sets of four sub-tasks that people demonstrated, 17 that a fixed seed draws, as
many as in the paper's table 1 (which ones it took is not known). Each goal is a task of its own for the simulator: what
counts in order is that of the demonstrations. RUN_OR_MODEL was trained in one of the kitchens; its arguments come from
the checkpoint or, for a pre-trained model, are the file's defaults with --flat.
"""

import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import data_tools
from algos import relay
from benchmarks.controls import frame
from benchmarks.pictures import traced_rollout
from benchmarks.plot import save
from data_tools.scripted.kitchen import LETTERS, PLANS
from data_tools.tasks import kitchen

DEMONSTRATED = list(dict.fromkeys(PLANS))  # two of the 25 folders hold one set
TASKS = {name: kitchen.SUBTASKS[name] for name in ("kitchen", "kitchen-misaligned")}


def compound_goals() -> dict[str, tuple[str, ...]]:
    """The tasks and 17 demonstrated sets: name -> sub-tasks in order."""
    chosen = np.random.default_rng(0).permutation(len(DEMONSTRATED))[:17]
    return TASKS | {DEMONSTRATED[k]: tuple(LETTERS[letter] for letter in DEMONSTRATED[k]) for k in sorted(chosen)}


def entries(subtasks) -> dict[int, float]:
    """A goal as relay.GOALS has it."""
    return dict(pair for name in subtasks for pair in zip(*kitchen.ELEMENTS[name]))


def load(path: Path, flat: bool):
    """Agent on the CPU and its arguments."""
    state = relay.load(path, {})
    args = relay.Args(**state.get("args", dict(env_id="kitchen", flat=flat)) | dict(device="cpu", cudagraphs=False))
    networks = relay.make_networks(args)
    if "agent" not in state:
        relay.load(path, dict(networks=networks))
    agent = relay.Agent(args, networks)
    if "agent" in state:
        relay.load(path, dict(agent=agent))
    return agent, args


def episodes(agent, args, subtasks, number: int, seed: int):
    """Roll-outs of the file itself: sub-tasks in order (E,), in any order (E,), subgoals (E, n, O), trace."""
    task = replace(data_tools.TASKS[args.env_id], env_kwargs=dict(task=subtasks))
    with (
        mock.patch.dict(data_tools.TASKS, {args.env_id: task}),
        mock.patch.dict(relay.GOALS, {args.env_id: entries(subtasks)}),
    ):
        returns, subgoals, trace = traced_rollout(relay, agent, args, number, seed)
    done = kitchen.elements_complete(trace[0])  # frozen members repeat their last observation
    any_order = sum(done[name].any(0) for name in subtasks)
    return returns, any_order, subgoals.numpy(), trace


def draw_subgoals(z, obs, subtasks, H: int, path: Path):
    """One episode: above, what the high level asked for and what was there H steps later; below, how far each element
    of the goal was from done, and in the subgoals. z (n, O), obs (T+1, O).
    """
    figure = Figure(figsize=(2 * len(z), 7.2))
    grid = figure.add_gridspec(4, len(z), height_ratios=(1.5, 1.5, 0.25, 3), hspace=0.06, wspace=0.03)
    for k in range(len(z)):
        end = min((k + 1) * H, len(obs) - 1)
        for row, state in enumerate((z[k], obs[end])):
            axes = figure.add_subplot(grid[row, k])
            axes.imshow(kitchen.draw(state.astype(np.float64)))
            axes.set(xticks=[], yticks=[])
            if k == 0:
                axes.set_ylabel(("subgoal", f"{H} steps later")[row])
            if row == 0:
                axes.set_title(f"step {k * H}", fontsize="small")
    axes = figure.add_subplot(grid[3, :])
    for colour, name in enumerate(subtasks):
        indices, goal = kitchen.ELEMENTS[name]
        way = np.linalg.norm(obs[:, indices] - np.array(goal), axis=-1)
        asked = np.linalg.norm(z[:, indices] - np.array(goal), axis=-1)
        axes.plot(way, color=f"C{colour}", label=name.replace("_", " "))
        axes.hlines(asked, np.arange(len(z)) * H, (np.arange(len(z)) + 1) * H, f"C{colour}", "dashed")
    axes.axhline(kitchen.COMPLETE_DISTANCE, color="0.6", lw=0.8)
    axes.text(2, kitchen.COMPLETE_DISTANCE, "done below", va="bottom", fontsize="small", color="0.4")
    axes.set(xlim=(0, len(z) * H), xlabel="env step", ylabel="distance from done")
    axes.legend(title="solid: reached\ndashed: subgoal", fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path, bbox_inches="tight")


def main():
    parser = frame.parser(__doc__)
    parser.set_defaults(seed=1_000)  # of the episodes
    parser.add_argument("path", type=Path, help="checkpoint or pre-trained model")
    parser.add_argument("--flat", action="store_true", help="the pre-trained model has one level")
    parser.add_argument("--task-episodes", type=int, default=40, help="of each task")
    parser.add_argument("--episodes", type=int, default=4, help="of each of the 17 goals (0: the tasks only)")
    given = parser.parse_args()
    with frame.record(given.out) as facts:
        agent, args = load(given.path, given.flat)
        scores = {}
        for name, subtasks in compound_goals().items():
            number = given.task_episodes if name in TASKS else given.episodes
            if number == 0:
                continue
            in_order, any_order, z, trace = episodes(agent, args, subtasks, number, given.seed)
            scores[name] = dict(in_order=float(in_order.mean()), any_order=float(any_order.mean()), episodes=number)
            scores[name]["std_in_order"] = float(in_order.std())
            scores[name]["all_done_any_order"] = float((any_order == 4).mean())
            print(f"{name:20}", " ".join(f"{key} {value:.2f}" for key, value in scores[name].items()), flush=True)
            if name == "kitchen":
                middle = int(np.argsort(in_order)[len(in_order) // 2])  # an episode of middling return
                picture = given.out.with_suffix(".png")
                draw_subgoals(z[middle], trace[0][:, middle], subtasks, args.skill_horizon, picture)
        demonstrated = [scores[name] for name in scores if name not in TASKS]
        keys = ("in_order", "any_order", "all_done_any_order") if demonstrated else ()
        means = {key: float(np.mean([score[key] for score in demonstrated])) for key in keys}
        facts |= dict(flat=args.flat, trained=vars(args), demonstrated=means, goals=scores)
    print("17 demonstrated sets:", " ".join(f"{key} {value:.2f}" for key, value in means.items()))


if __name__ == "__main__":
    main()
