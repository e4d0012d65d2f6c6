"""Evaluate the checkpoints that benchmarks/run.py kept, without exploration noise.

    python benchmarks/evaluate.py runs/checkpoints     # of files with skills; the same command goes on after a stop

Each acts as in its own evaluations, a planner plans; SkiMo's files act once more by the mode of the task policy, from
the same starts. So noise, planner and policy can be told apart. Writes a row for each into FOLDER/evaluations.csv.
"""

import csv
import functools
import importlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import data_tools
from benchmarks.run import step_of


@dataclass
class Args:
    folder: Annotated[Path, tyro.conf.Positional] = Path("runs/checkpoints")  # BOARD/NAME/seedN.pt, seedN_STEP.pt
    episodes: int = 20  # of each


def seed_of(name: str) -> str:
    """BOARD/NAME/seedN of BOARD/NAME/seedN.pt and seedN_STEP.pt: the last checkpoint may be an early one, too."""
    return re.sub(r"(_\d+)?\.pt$", "", name)


@torch.no_grad()
def mode(algo, agent, obs, global_step: int, explore: bool):
    """The mode of the task policy for observations (E, O), NumPy -> z (E, Z), in place of agent.choose_skills."""
    mean, _ = algo.gaussian_parameters(agent.task_policy(agent.model.encoder(torch.from_numpy(obs))))
    return torch.tanh(mean)


def evaluations(path: Path, episodes: int) -> list[tuple]:
    """(env step, acts by, episodes, mean return, success) of a checkpoint, by each way of acting. None of files
    without skills, and of dreamer_skills.py, which filters observations beside its agent.
    """
    state = data_tools.read_state(path, ["agent"])
    algo = importlib.import_module(f"algos.{Path(state['script']).stem}")
    if not hasattr(algo, "make_networks") or hasattr(algo, "Filter"):
        return []
    args = algo.Args(**state["args"] | dict(device="cpu", cudagraphs=False))
    agent = algo.Agent(args, algo.make_networks(args))
    agent.load_state_dict(state["agent"])
    plans = hasattr(algo, "plan")
    rows = []
    acts_by_mode = not plans or hasattr(algo, "gaussian_parameters")
    for acts_by in ["plan"] * plans + ["mode"] * acts_by_mode:
        if plans and acts_by == "mode":
            agent.choose_skills = functools.partial(mode, algo, agent)
        scores = algo.rollout(agent, args, episodes, 10_000 + args.seed, state["global_step"])
        rows.append((state["global_step"], acts_by, episodes, scores["episodic_return"], scores["success"]))
    return rows


def main(args: Args):
    torch.set_num_threads(data_tools.fastest_threads())
    paths = sorted(args.folder.rglob("*.pt"))
    if not paths:
        sys.exit(f"error: no checkpoints in {args.folder}")
    table = args.folder / "evaluations.csv"
    rows = csv.DictReader(table.open()) if table.exists() else ()
    done = {(seed_of(row["checkpoint"]), int(row["env_step"]), int(row["episodes"])) for row in rows}
    with table.open("a", buffering=1) as file:
        if not file.tell():
            print("checkpoint,env_step,acts_by,episodes,episodic_return,success", file=file)
        for path in paths:
            name = path.relative_to(args.folder).as_posix()
            if (seed_of(name), step_of(path), args.episodes) not in done:
                done.add((seed_of(name), step_of(path), args.episodes))
                rows = evaluations(path, args.episodes)
                if not rows:
                    print(f"left out: {name}")
                for row in rows:
                    print(f"{name}: {row}")
                file.write("".join(",".join(map(str, (name, *row))) + "\n" for row in rows))  # all, or none


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
