"""Sets of runs by name: `python benchmarks/run.py --suite held-out`.

The settings of the held-out suite are frozen. Each method runs with what its file has for maze, kitchen or calvin,
which was chosen on the paper's four tasks, with all of their data. None of these boards was or will be used to choose a
setting. They make scarce what those tasks have plenty of: data, or short ways. tests/test_suites.py compares.
"""

from dataclasses import dataclass

from benchmarks.scores import MAIN


@dataclass(frozen=True)
class Board:
    """A task, a share of its data, and the env steps of a run (None: what the file has for the task)."""

    env_id: str
    env_steps: int | None = None
    data_share: float = 1.0


@dataclass(frozen=True)
class Suite:
    """What a suite runs; `keep`: env steps at which checkpoints are kept, beside the last one."""

    algos: tuple[str, ...]
    boards: dict[str, Board]
    seeds: tuple[int, ...]
    keep: tuple[int, ...] = ()


PAPER = {
    "maze": Board("maze", 2_000_000),
    "kitchen": Board("kitchen", 1_000_000),
    "kitchen-misaligned": Board("kitchen-misaligned", 1_000_000),
    "calvin": Board("calvin", 2_000_000),
}
QUICK = {name: Board(name, 100_000) for name in PAPER}
HELD_OUT = {
    "kitchen-60": Board("kitchen", 100_000, 0.1),  # of 603 demonstrations
    "kitchen-20": Board("kitchen", 100_000, 0.033),
    "kitchen-6": Board("kitchen-6", 100_000),
    "maze-far": Board("maze-far", 300_000),
    "maze-150": Board("maze", 300_000, 0.0493),  # of 3,046 trajectories
    "calvin-6": Board("calvin-6", 300_000),
}
SEEDS = (1000, 2000, 3000, 4000, 5000)  # environment i has the run's seed + i: these share no random numbers
EARLY = (25_000, 50_000, 100_000)
FIGURE_4 = ("skimo", "spirl", "tdmpc_skills", "dreamer_skills", "dreamer", "tdmpc", "dads", "lsp")
SUITES = {
    "figure-4": Suite(FIGURE_4, PAPER, SEEDS),
    "figure-5": Suite((*MAIN[:4], "skimo_single_step"), PAPER, SEEDS),
    "held-out": Suite(MAIN, HELD_OUT, SEEDS[:3], EARLY),
    "quick": Suite(MAIN, QUICK, SEEDS[:3], EARLY),
}
