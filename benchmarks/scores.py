"""Read the logs of runs and give each three scores, as shares of the task: 1 is the goal, or all sub-tasks.

- Learning speed: area under the training curve, from 0 to an env step. The curve is the mean of each bin.
- Level: mean of the training episodes in the last env steps before it.
- Without noise: the last clean evaluation.

When an episode counts. With E environments side by side the first episodes all begin together, and those that succeed
end first: placed where they end, they make every curve begin too high. So an episode is placed where it would have
ended at the latest: at the env step of its start plus E times the longest episode. Then a policy that does not change
gives a flat curve.
"""

import csv
import json
import re
import sys
from dataclasses import dataclass
from itertools import combinations, permutations
from pathlib import Path

import numpy as np

import data_tools  # the tasks of a user's own
from data_tools.files import reading

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER_CURVES = ROOT / "benchmarks" / "paper_curves.csv"
NO_LOG = "move both elsewhere", "and its CSV are no whole log"


@dataclass(frozen=True)
class Task:
    """Facts about a task. Scores are shares of it; of a task without a highest return they are returns."""

    label: str
    max_return: float  # of an episode in which everything was done: a score of 1
    longest: int  # env steps of an episode that nothing ends
    margin: float  # error of reading the paper's curves: smaller differences count as none
    bin: int  # env steps of a bin of the training curve
    last: int  # env steps of the level
    best: float = 1.0  # highest and
    worst: float = 0.0  # least score


@dataclass(frozen=True)
class Method:
    """An algorithm file; `paper` is its name in the paper's figures (None: it has no curve there)."""

    label: str
    colour: str
    paper: str | None = None


TASKS = {
    "maze": Task("Maze", 100, 2_000, 0.03, 25_000, 50_000),
    "kitchen": Task("Kitchen", 4, 280, 0.025, 10_000, 25_000),
    "kitchen-misaligned": Task("Mis-aligned Kitchen", 4, 280, 0.025, 10_000, 25_000),
    "calvin": Task("CALVIN", 400, 360, 0.025, 10_000, 25_000),
    "kitchen-6": Task("Kitchen-6", 6, 420, 0.025, 10_000, 25_000),
    "maze-far": Task("Maze, far", 100, 2_000, 0.03, 25_000, 50_000),
    "calvin-6": Task("CALVIN-6", 600, 540, 0.025, 10_000, 25_000),
}
METHODS = {
    "skimo": Method("SkiMo", "#d62728", "SkiMo"),
    "skimo_no_joint": Method("no joint training", "#9467bd", "SkiMo w/o joint training"),
    "skimo_no_cem": Method("no planner", "#1f77b4", "SkiMo w/o CEM"),
    "skimo_sac": Method("no model in RL (SAC)", "#2ca02c", "SkiMo+SAC"),
    "skimo_single_step": Method("single-step model", "#7f7f7f"),
    "spirl": Method("SPiRL", "#ff7f0e", "SPiRL"),
    "tdmpc_skills": Method("SPiRL + TD-MPC", "#8c564b", "SPiRL+TD-MPC"),
    "dreamer_skills": Method("SPiRL + Dreamer", "#e377c2", "SPiRL+Dreamer"),
    "supe": Method("SUPE", "#ad494a"),
    "qc": Method("Q-chunking", "#5254a3"),
    "reskill": Method("ReSkill", "#e7ba52"),
    "relay": Method("Relay", "#8c6d31"),
    "sac": Method("SAC", "#393b79"),
    "tdmpc": Method("TD-MPC", "#bcbd22", "TD-MPC"),
    "dreamer": Method("Dreamer", "#17becf", "Dreamer"),
    "diayn": Method("DIAYN", "#ce6dbd"),
    "dads": Method("DADS", "#637939"),
    "lsp": Method("LSP", "#843c39"),
    "hiro": Method("HIRO", "#8ca252"),
    "option_critic": Method("Option-Critic", "#a55194"),
}
KNOWN = frozenset(TASKS)  # the others are users' own
MAIN = ("skimo", "skimo_no_joint", "skimo_no_cem", "skimo_sac", "spirl")  # methods in figures and orderings
DATA = {"scripted": "scripted data", "human": "people's data"}
SHARE = "% of "  # in the name of data that are not whole
PAPER_SEEDS = 5


# ------------------------------------------------------------------------------------------------------------- logs
@dataclass
class Run:
    """A log. Episodes (n,): steps and scores in the order of their places, minutes and end_steps as they ended."""

    task: str
    method: str
    data: str
    seed: int
    steps: np.ndarray
    scores: np.ndarray
    minutes: np.ndarray  # (n,) of RL, without pre-training, when each episode ended
    end_steps: np.ndarray  # (n,) env step at which each episode ended
    evaluations: list  # (env step, score)
    env_steps: int  # of the whole run
    facts: dict  # the JSON

    @property
    def end(self) -> int:
        """Env steps of the run, rounded down, or up by less than a fifth: runs end with a skill or an episode."""
        if self.env_steps < 1_000:
            return self.env_steps
        unit = 10_000 if self.env_steps >= 98_000 else 1_000
        return (self.env_steps + unit // 5) // unit * unit

    @property
    def pretraining(self) -> dict:
        """Results of pre-training; empty without them."""
        return (self.facts.get("results") or {}).get("pretraining") or {}

    @property
    def machine(self) -> str:
        """Processor and, if it was used, GPU."""
        processor = re.sub(r"\(R\)| Processor.*", "", self.facts["machine"].split(",")[0])
        gpu = re.search(r"NVIDIA \w+", self.facts["machine"])
        return f"{processor}, {gpu[0]}" if gpu and self.facts["args"]["device"] == "cuda" else processor


def place(end_steps, lengths, num_envs: int, longest: int) -> np.ndarray:
    """Env step at which each episode would have ended at the latest."""
    starts = np.maximum(end_steps - num_envs * lengths, 0)
    return starts + num_envs * longest


def offline_data(facts: dict, path: Path) -> str:
    """What a run learned from before RL, with the share of its episodes where it is not all of them."""
    share = facts["args"].get("data_share", 1)
    name = data_name(facts, path)
    return name if share == 1 else f"{round(100 * share, 1):g}{SHARE}{DATA.get(name, name)}"


def data_name(facts: dict, path: Path) -> str:
    """The name of the log's folder, TASK/METHOD/DATA. A log elsewhere says itself: "none" without offline data."""
    folder = path.parent.name
    if path.name != "args.json" and folder != facts["algo"]:  # the runner writes TASK/METHOD
        return folder
    if "data" not in facts["args"]:
        return "none"
    names = {"scripted": "scripted", "d4rl": "d4rl", "release": "skimo-release"}
    asked = names.get(facts["args"]["data"], "data of its own")
    pretraining = (facts.get("results") or {}).get("pretraining") or {}  # these alone name the source of a file
    data = pretraining.get("data", asked)
    return data["source"] if isinstance(data, dict) else data  # of the models that are in this repository


def own_task(env_id: str, rows: list[dict]) -> Task:
    """A task that is not the paper's, from the episodes of all its runs: shares of its max_return, if that is known."""
    known = data_tools.TASKS.get(env_id)
    most = known.max_return if known and 0 < known.max_return < np.inf else None
    names = "episodic_return", "episodic_length", "env_step"
    returns, lengths, steps = ([float(row[name]) for row in rows if row["episodic_return"]] for name in names)
    worst = min([0.0, *returns]) / (most or 1)
    best = 1.0 if most else max(returns, default=1.0)
    best = best if best > worst else worst + 1.0
    width = 1_000 * -(-int(max(steps, default=1)) // 16_000)  # sixteen bins in a figure
    return Task(env_id, most or 1, int(max(lengths, default=1)), 0.0, width, 2 * width, best, worst)


def read_log(path: Path) -> tuple[str, dict, list[dict]]:
    """Task, facts and table of a run, from its JSON and the CSV next to it, or from the args.json of a run folder.

    The table is empty where no episode has ended yet.
    """
    with reading(path, *NO_LOG):
        if path.name == "args.json":
            args = json.loads(path.read_text())
            algo = args["script"].removesuffix(".py")
            facts = dict(algo=algo, env_id=args["env_id"], seed=args["seed"], args=args)
            results = path.with_name("results.json")
            facts["results"] = json.loads(results.read_text()) if results.exists() else None
            table = path.with_name("episodes.csv")
            text = table.read_text() if table.exists() else ""  # it still pre-trains
        else:
            facts = json.loads(path.read_text())
            text = path.with_suffix(".csv").read_text()
        rows = list(csv.DictReader(text.splitlines()))
        return facts["env_id"], facts, rows if any(row["episodic_return"] for row in rows) else []


def run_of(path: Path, env_id: str, facts: dict, rows: list[dict]) -> Run:
    """A run from what read_log(path) returned; its task is in TASKS."""
    with reading(path, *NO_LOG):
        task = TASKS[env_id]
        results = facts.get("results") or {}
        evaluations = [(int(step), value / task.max_return) for step, value, _ in results.get("evaluations", [])]
        if not evaluations:  # of a stopped run
            found = [row for row in rows if row.get("eval_return")]
            evaluations = [(int(row["env_step"]), float(row["eval_return"]) / task.max_return) for row in found]
        episodes = [row for row in rows if row["episodic_return"]]

        def column(name):
            return np.array([float(row[name]) for row in episodes])

        end_steps = column("env_step")
        steps = place(end_steps, column("episodic_length"), facts["args"]["num_envs"], task.longest)
        order = np.argsort(steps, kind="stable")
        data = offline_data(facts, path)
        return Run(
            task=env_id,
            method=facts["algo"],
            data="scripted" if data == "none" else data,  # they stand beside each other
            seed=facts["seed"],
            steps=steps[order],
            scores=column("episodic_return")[order] / task.max_return,
            minutes=column("rl_minutes") if "rl_minutes" in rows[0] else column("wall_seconds") / 60,
            end_steps=end_steps,
            evaluations=evaluations,
            env_steps=int(results.get("env_steps", end_steps[-1])),
            facts=facts,
        )


def curve(run: Run, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Middles of the bins up to an env step, and the mean of each; a bin without an episode lies between others."""
    bins = end / TASKS[run.task].bin
    count = round(bins) if bins >= 2 else 8  # of a short run
    width = max(end, 1) / count
    index = np.ceil(run.steps / width).astype(int) - 1  # of each episode: bins have their upper edge
    inside = index < count
    episodes = np.bincount(index[inside], minlength=count)
    sums = np.bincount(index[inside], weights=run.scores[inside], minlength=count)
    filled = np.flatnonzero(episodes)
    if not len(filled):
        return np.array([]), np.array([])
    means = np.interp(np.arange(count), filled, sums[filled] / episodes[filled])
    return (np.arange(count) + 0.5) * width, means


def speed(run: Run, end: int) -> float:
    """Learning speed: area under the training curve from 0 to an env step; NaN before the first episode counts."""
    means = curve(run, end)[1]
    return float(means.mean()) if len(means) else np.nan


def mean_between(run: Run, low: float, high: float) -> float:
    """Mean of the episodes placed in (low, high]; NaN if there are none.

    Beyond the run's end only episodes are placed that ended early, as successes do: they count for nothing.
    """
    inside = (run.steps > low) & (run.steps <= min(high, run.end))
    return float(run.scores[inside].mean()) if inside.any() else np.nan


def level(run: Run, end: int) -> float:
    """Mean of the training episodes in the last env steps before an env step."""
    return mean_between(run, end - TASKS[run.task].last, end)


def without_noise(run: Run, end: int) -> float:
    """Clean evaluation at an env step, which may be rounded as Run.end is; NaN if there was none."""
    step, value = min(run.evaluations, key=lambda evaluation: abs(evaluation[0] - end), default=(np.inf, np.nan))
    return value if abs(step - end) <= min(8_000, max(800, end // 8)) else np.nan


MEASURES = {"speed": speed, "level": level, "without noise": without_noise}


def mean_scores(runs: list[Run], end: int) -> dict[str, float]:
    """The mean of each measure over runs, up to an env step; NaN without runs."""
    return {name: np.mean([measure(run, end) for run in runs] or np.nan) for name, measure in MEASURES.items()}


def steps_to(run: Run, share: float, episodes: int = 40) -> float:
    """Env step at which the mean of the last 40 episodes first is a share of the task; infinite if it never is."""
    if len(run.scores) < episodes:
        return np.inf
    means = np.convolve(run.scores, np.ones(episodes) / episodes, "valid")
    reached = np.flatnonzero(means >= share - 1e-9)
    return float(run.steps[reached[0] + episodes - 1]) if len(reached) else np.inf


def minutes_at(run: Run, end: int) -> float:
    """Minutes of RL up to an env step; NaN before the first episode's end."""
    results = run.facts.get("results") or {}
    if run.end <= end and "rl_minutes" in results:
        return results["rl_minutes"]
    minutes = run.minutes[run.end_steps <= end + min(1_000, end // 8)]
    return minutes[-1] if len(minutes) else np.nan


def prior_alone(run: Run) -> float:
    """Score of the pre-trained prior's roll-outs, where RL begins; NaN if it was not logged.

    Tasks that take others' models show none, for the roll-outs were mostly in the others.
    """
    known = data_tools.TASKS.get(run.task)
    if known and known.data not in (None, run.task):
        return np.nan
    return run.pretraining.get("prior_return", np.nan) / TASKS[run.task].max_return


def model_of(run: Run) -> str | None:
    """A mark of the pre-trained model that a run started from; None if it is not known."""
    held = run.pretraining.get("valid_kl_loss")  # what its skills hold: no two models agree in three digits
    return None if held is None else f"{held:.3f}"


# ------------------------------------------------------------------------------------------------------------ cells
class Cell(list):
    """Runs of one method on one task with one kind of data, by seed."""

    def reaching(self, end: int) -> list[Run]:
        return [run for run in self if run.end >= end]

    @property
    def main_end(self) -> int:
        """The most env steps that more than half of the seeds reached."""
        return max(run.end for run in self if 2 * len(self.reaching(run.end)) > len(self))


def read_runs(*folders: Path) -> list[Run]:
    """All runs in folders but for studies and held-out ones; a task of a user's own has one scale for all of them."""
    paths = [(folder, path) for folder in folders for path in folder.rglob("*.json")]
    paths = [path for folder, path in paths if not {"studies", "held-out"} & {*path.relative_to(folder).parts}]
    paths = sorted(path for path in paths if path.match("seed*.json") or path.name == "args.json")
    read = [(path, *read_log(path)) for path in paths]
    logs = [log for log in read if log[-1]]
    if read and not logs:
        sys.exit(f"error: in {paths[0].parent} no episode of RL has ended yet")
    for path in [path for path, *_, rows in read if not rows]:
        print(f"left out: {path.parent}, in which no episode of RL has ended yet")
    for own in dict.fromkeys(env_id for _, env_id, *_ in logs if env_id not in KNOWN):
        with reading(f"a log of {own}", *NO_LOG):
            TASKS[own] = own_task(own, [row for _, env_id, _, rows in logs if env_id == own for row in rows])
    return [run_of(*log) for log in logs]


def read_cells(folder: Path) -> dict[tuple[str, str, str], Cell]:
    """The runs in a folder: (task, method, data) -> runs, in the tables' order."""
    cells = {}
    for run in read_runs(folder):
        cell = cells.setdefault((run.task, run.method, run.data), Cell())
        if run.seed in [other.seed for other in cell]:
            name = f"seed {run.seed} of {run.task}/{run.method}/{run.data}"
            sys.exit(f"error: {name} is in {folder} twice; give the folder of one of these runs, or move one elsewhere")
        cell.append(run)

    def rank(name, names):  # unknown ones come last
        return [*names, name].index(name), name

    order = sorted(cells, key=lambda cell: (rank(cell[2], DATA), rank(cell[0], TASKS), rank(cell[1], METHODS)))
    return {cell: cells[cell] for cell in order}


def boards(cells) -> list[tuple[str, str]]:
    """Tasks with a kind of data for which there are runs."""
    return list(dict.fromkeys((task, data) for task, _, data in cells))


def board(cells, task: str, data: str) -> dict[str, Cell]:
    """Method -> its runs on a board."""
    return {method: cell for (t, method, d), cell in cells.items() if (t, d) == (task, data)}


def label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def board_label(task: str, data: str) -> str:
    return TASKS[task].label + ("" if data == "scripted" else f", {DATA.get(data, data)}")


def published_board(run: Run) -> tuple[str, str]:
    """The board that a user's run belongs to."""
    return run.task, {"d4rl": "human"}.get(run.data, run.data)


def board_end(cells, task: str, data: str) -> int:
    """The env steps to which methods of a board are compared: those that most of the main ones ran."""
    here = board(cells, task, data)
    ends = [cell.main_end for method, cell in here.items() if method in MAIN]
    ends = ends or [cell.main_end for cell in here.values()]
    return max(sorted(set(ends)), key=ends.count)


def cell_end(cells, task: str, method: str, data: str) -> int:
    """The env steps to which a cell is scored: its board's, or its own if it was not run so far."""
    return min(board_end(cells, task, data), cells[task, method, data].main_end)


def common_end(cells, task: str, data: str, *methods: str) -> int:
    """The env steps to which cells are compared with each other."""
    return min([cell_end(cells, task, name, data) for name in methods if (task, name, data) in cells], default=0)


def measured(cells, task: str, method: str, data: str, measure: str, end: int | None = None) -> np.ndarray:
    """A measure of every seed of a cell, up to an env step or its own end; empty without runs."""
    if (task, method, data) not in cells:
        return np.array([])
    end = end or cell_end(cells, task, method, data)
    return np.array([MEASURES[measure](run, end) for run in cells[task, method, data].reaching(end)])


# ------------------------------------------------------------------------------------------------- the paper's curves
def paper_curves() -> dict[tuple[str, str], np.ndarray]:
    """(task, method) -> (n, 2) env steps and score."""
    names = {method.paper: name for name, method in METHODS.items()}
    curves = {}
    for row in csv.DictReader(PAPER_CURVES.read_text().splitlines()):
        point = (float(row["env_step"]), float(row["value"]) / (1 if row["task"] == "maze" else 4))  # of its sub-tasks
        curves.setdefault((row["task"], names[row["method"]]), []).append(point)
    return {key: np.array(points) for key, points in curves.items()}


PAPER = paper_curves()


def paper_at(task: str, method: str, step: float) -> float:
    """The paper's score at an env step, linear between the points that were read; NaN outside of them."""
    points = PAPER.get((task, method))
    return np.nan if points is None else float(np.interp(step, *points.T, left=np.nan, right=np.nan))


def paper_final(task: str, method: str, end: int = 0) -> float:
    """The paper's last score, whatever the env step; NaN if it has no curve."""
    points = PAPER.get((task, method))
    return np.nan if points is None else float(points[-1, 1])


def paper_speed(task: str, method: str, end: int) -> float:
    """Area under the paper's curve up to an env step; before the first point that was read it counts as 0."""
    return float(np.interp(np.arange(0, end + 1, 1_000), *PAPER[task, method].T, left=0.0).mean())


# -------------------------------------------------------------------------------------------------------- comparisons
def relation(first, second, margin: float) -> str:
    """How two sets of scores, one per seed, stand: > or < if all seeds agree, = if the means are within the margin."""
    if abs(np.mean(first) - np.mean(second)) <= margin + 1e-9:
        return "="
    if np.min(first) > np.max(second):
        return ">"
    return "<" if np.max(first) < np.min(second) else "?"


def improvement(boards: list[tuple]) -> tuple[float, float, float]:
    """Probability that a run of the first method beats one of the second, mean over boards, and its 95 % interval.

    boards: scores of both, (n,) and (m,), a pair for each board. Ties count half; seeds are bootstrapped on each board.
    """
    rng = np.random.default_rng(0)

    def wins(first, second):  # (..., n), (..., m) -> (...)
        difference = first[..., :, None] - second[..., None, :]
        return ((np.sign(difference) + 1) / 2).mean((-2, -1))

    draws = [[rng.choice(values, (2_000, len(values))) for values in pair] for pair in boards]
    low, high = np.quantile(np.mean([wins(*pair) for pair in draws], 0), [0.025, 0.975])
    return float(np.mean([wins(*map(np.asarray, pair)) for pair in boards])), low, high


def lead(first: list[Run], second: list[Run], measure, end: int) -> tuple[float, float, float, bool]:
    """Mean lead of the first runs, its 95 % interval by bootstrap over seeds, and whether seeds were paired.

    Seeds are paired where each started from a pre-trained model of its own; then only models that both cells have
    count, if they are all of one cell. No interval of a single run.
    """
    models = [{model_of(run): measure(run, end) for run in runs} for runs in (first, second)]
    rng = np.random.default_rng(0)
    shared = models[0].keys() & models[1].keys()
    pairs = None not in shared and len(models[0]) == len(first) and len(models[1]) == len(second)
    pairs = pairs and len(shared) == min(len(first), len(second)) > 0
    if pairs:
        parts = [[models[0][name] - models[1][name] for name in sorted(shared)]]
    else:
        parts = [[measure(run, end) for run in first], [-measure(run, end) for run in second]]
    draws = sum(rng.choice(part, (2_000, len(part))).mean(1) for part in parts)
    interval = np.quantile(draws, [0.025, 0.975]) if min(map(len, parts)) > 1 else (np.nan, np.nan)
    return sum(map(np.mean, parts)), *interval, pairs


def agreement(cells, measure: str, data: str, paper) -> dict:
    """How many orderings of pairs of the main methods are the paper's, and what chance would give.

    A pair is compared at the env steps that both have, the paper's by paper(task, method, env step). Chance: the names
    of our methods are shuffled, all ways, alike on all boards; p is the share of shufflings with as many or more.
    """
    total, shufflings = 0, list(permutations(MAIN))
    holds = np.zeros(len(shufflings), int)  # orderings that hold in each; the first leaves the names
    for task in [task for task, d in boards(cells) if d == data]:
        ours = {name: measured(cells, task, name, data, measure) for name in MAIN}
        names = [name for name, values in ours.items() if len(values) and not np.isnan(values).any()]
        margin = TASKS[task].margin
        pairs = list(combinations(names, 2))
        found, expected = {}, {}
        for pair in permutations(names, 2):
            end = common_end(cells, task, data, *pair)
            found[pair] = relation(*(measured(cells, task, name, data, measure, end) for name in pair), margin)
            expected[pair] = relation(*([paper(task, name, end)] for name in pair), margin)
        pairs = [pair for pair in pairs if expected[pair] != "?"]  # before the paper's curve begins
        for i, shuffled in enumerate(shufflings):
            called = dict(zip(names, sorted(names, key=shuffled.index)))
            holds[i] += sum(found[called[a], called[b]] == expected[a, b] for a, b in pairs)
        total += len(pairs)
    return dict(pairs=total, hold=int(holds[0]), chance=float(holds.mean()), p=float((holds >= holds[0]).mean()))


def coverage(cells, data: str) -> dict:
    """How much of the paper's figures there is here: curves begun, run to their end; seeds x env steps."""
    whole, done, begun, ended = 0, 0, 0, 0
    for (task, method), points in PAPER.items():
        end = points[-1, 0]
        cell = cells.get((task, method, data), Cell())
        whole += PAPER_SEEDS * end
        done += sum(sorted((min(run.env_steps, end) for run in cell), reverse=True)[:PAPER_SEEDS])
        begun += bool(cell)
        ended += bool(cell.reaching(end))
    return dict(begun=begun, ended=ended, done=done, whole=whole)
