"""Read the logs of runs, compute scores as the paper does, and compare them with the paper's.

When an episode counts. With E environments side by side the first episodes all begin together, and those that succeed
end first: placed where they end, they make every curve begin too high. So an episode is placed where it would have
ended at the latest: at the env step of its start plus E times the longest episode. Then a policy that does not change
gives a flat curve.

Score. The paper smooths returns in windows of 500 env steps (SPiRL: 100) exponentially, with weight 0.99, beginning at
the mean of the first ten windows. Here the same weights are given to episodes: the score at an env step is the mean of
all episodes so far, each weighted by 0.99 per window of age. With one episode in each window this is the paper's
smoothing. The paper repeats the last return in windows without an episode, and takes the maximum of a window; from
environments side by side, the first would give failures, which last longer, more weight, and the second would flatter.
"""

import csv
import json
import re
import sys
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAPER_CURVES = ROOT / "benchmarks" / "paper_curves.csv"


@dataclass(frozen=True)
class Task:
    """Facts about a task. Scores are returns divided by `unit`, as in the paper's figures."""

    label: str
    measure: str  # what a score counts
    best: float  # score of an episode in which everything was done
    unit: float  # return that counts as 1
    longest: int  # env steps of an episode that nothing ends
    paper_end: int  # env steps of the paper's curves
    margin: float  # error of reading the paper's curves: smaller differences count as none
    bin: int  # env steps of a bin in the tables
    one_start: bool = False  # all clean evaluations begin with the same observation: they are no independent samples
    worst: float = 0.0  # least score

    @property
    def span(self) -> float:
        return self.best - self.worst


@dataclass(frozen=True)
class Method:
    """An algorithm file; `paper` is its name in the paper's figures (None: it has no curve there)."""

    label: str
    short: str  # in figures
    colour: str
    paper: str | None = None


TASKS = {
    "maze": Task("Maze", "success rate", 1, 100, 2_000, 2_000_000, 0.03, 50_000),
    "kitchen": Task("Kitchen", "sub-tasks of 4", 4, 1, 280, 1_000_000, 0.1, 25_000),
    "kitchen-misaligned": Task("Mis-aligned Kitchen", "sub-tasks of 4", 4, 1, 280, 1_000_000, 0.1, 25_000),
    "calvin": Task("CALVIN", "sub-tasks of 4", 4, 100, 360, 2_000_000, 0.1, 50_000, one_start=True),
}
METHODS = {
    "skimo": Method("SkiMo", "SkiMo", "#d62728", "SkiMo"),
    "skimo_no_cem": Method("SkiMo without CEM", "without CEM", "#1f77b4", "SkiMo w/o CEM"),
    "skimo_sac": Method("SkiMo + SAC", "SAC", "#2ca02c", "SkiMo+SAC"),
    "skimo_no_joint": Method(
        "SkiMo without joint training", "no joint training", "#9467bd", "SkiMo w/o joint training"
    ),
    "skimo_single_step": Method("SkiMo, single-step dynamics", "single-step", "#7f7f7f"),
    "spirl": Method("SPiRL", "SPiRL", "#ff7f0e", "SPiRL"),
    "reskill": Method("ReSkill", "ReSkill", "#e7ba52"),
    "tdmpc_skills": Method("SPiRL + TD-MPC", "SPiRL+TD-MPC", "#8c564b", "SPiRL+TD-MPC"),
    "dreamer_skills": Method("SPiRL + Dreamer", "SPiRL+Dreamer", "#e377c2", "SPiRL+Dreamer"),
    "dreamer": Method("Dreamer", "Dreamer", "#17becf", "Dreamer"),
    "tdmpc": Method("TD-MPC", "TD-MPC", "#bcbd22", "TD-MPC"),
    "sac": Method("SAC without skills", "flat SAC", "#393b79"),
    "diayn": Method("DIAYN with a controller", "DIAYN", "#ce6dbd"),
    "option_critic": Method("Option-Critic", "Option-Critic", "#a55194"),
    "relay": Method("Relay Policy Learning", "Relay", "#8c6d31"),
    "hiro": Method("HIRO", "HIRO", "#8ca252"),
    "dads": Method("DADS", "DADS", "#637939"),
    "lsp": Method("LSP", "LSP", "#843c39"),
}
DATA = {"scripted": "scripted", "human": "human (187 episodes)"}  # label of a kind of offline data, in tables
PAPER_SEEDS = 5
SMOOTHING = 0.99  # weight that is left after
INTERVAL = {"spirl": 100}  # so many env steps, 500 if the method is not named
LAST = 50_000  # env steps of the unsmoothed mean


# ------------------------------------------------------------------------------------------------------------- logs
@dataclass
class Run:
    """A log. Episodes (n,) in the order in which they are placed: env step, score. Evaluations: (env step, score)."""

    task: str
    method: str
    data: str
    seed: int
    steps: np.ndarray
    scores: np.ndarray
    ended: np.ndarray  # (n,) scores in the order in which the episodes ended
    minutes: np.ndarray  # (n,) of RL, without pre-training, when each episode ended
    end_steps: np.ndarray  # (n,) env step at which each episode ended
    evaluations: list
    env_steps: int  # of the whole run
    facts: dict  # the JSON
    without_data: bool = False  # of a method that has no offline data

    @property
    def end(self) -> int:
        """Env steps of the run, rounded down, or up by less than a fifth: runs end with a skill or an episode."""
        if self.env_steps < 1_000:
            return self.env_steps
        unit = 10_000 if self.env_steps >= 98_000 else 1_000
        return (self.env_steps + unit // 5) // unit * unit

    @property
    def machine(self) -> str:
        """Processor and, if it was used, GPU."""
        text = self.facts.get("machine") or "not known"
        processors = {"AMD EPYC": "AMD EPYC", "Xeon": "Intel Xeon"}
        processor = next((label for name, label in processors.items() if name in text), text.split(",")[0])
        gpu = re.search(r"NVIDIA \w+", text)
        return f"{processor}, {gpu[0]}" if gpu and self.facts["args"].get("device") == "cuda" else processor


def place(end_steps, lengths, num_envs: int, longest: int) -> np.ndarray:
    """Env step at which each episode would have ended at the latest."""
    starts = np.maximum(end_steps - num_envs * lengths, 0)
    return starts + num_envs * longest


def offline_data(facts: dict, path: Path) -> str:
    """The name of the log's folder, TASK/METHOD/DATA. A log elsewhere says itself: "none" without offline data."""
    folder = path.parent.name
    if path.name != "args.json" and folder != facts["algo"]:  # the runner writes TASK/METHOD
        return folder
    if "data" not in facts["args"]:
        return "none"
    if not facts.get("results"):  # it still runs, and only its results name the source of a file
        given = facts["args"]["data"]
        names = {"scripted": "scripted", "d4rl": "d4rl", "release": "skimo-release"}
        return names.get(given, "data of its own")
    pretraining = facts["results"].get("pretraining") or {}
    data = pretraining.get("data", "not known")
    return data["source"] if isinstance(data, dict) else data  # of the models that are in this repository


def own_task(env_id: str, rows: list[dict]) -> Task:
    """A task that is not the paper's, from the episodes of all its runs."""
    returns, lengths, steps = (
        [float(row[name]) for row in rows if row["episodic_return"]]
        for name in ("episodic_return", "episodic_length", "env_step")
    )
    worst = min([0.0, *returns])
    best = max(returns, default=1.0)
    best = best if best > worst else worst + 1.0
    end = int(max(steps, default=1))
    width = 1_000 * -(-end // 8_000)  # eight bins in a table
    longest = int(max(lengths, default=1))
    return Task(env_id, "return", best, 1.0, longest, end, 0.0, width, worst=worst)


def has_begun(path: Path) -> bool:
    """Whether a log has episodes: not that of a run that still pre-trains or did not get so far."""
    return path.name != "args.json" or path.with_name("episodes.csv").exists()


def read_log(path: Path) -> tuple[str, dict, list[dict]]:
    """Task, facts and table of a run, from its JSON and the CSV next to it, or from the args.json of a run folder."""
    try:
        if path.name == "args.json":
            args = json.loads(path.read_text())
            algo = args["script"].removesuffix(".py")
            facts = dict(algo=algo, env_id=args["env_id"], seed=args["seed"], args=args)
            results = path.with_name("results.json")
            facts["results"] = json.loads(results.read_text()) if results.exists() else None
            table = path.with_name("episodes.csv")
        else:
            facts = json.loads(path.read_text())
            table = path.with_suffix(".csv")
        with table.open() as file:
            rows = list(csv.DictReader(file))
        if not any(row["episodic_return"] for row in rows):
            sys.exit(f"error: in {table} no episode has ended yet")
        return facts["env_id"], facts, rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {path} and its CSV are no whole log ({type(error).__name__}: {error}); move both elsewhere")


def read_run(path: Path) -> Run:
    """A run of one of the paper's tasks from its log."""
    return run_of(path, *read_log(path))


def run_of(path: Path, env_id: str, facts: dict, rows: list[dict]) -> Run:
    """A run from what read_log(path) returned; its task is in TASKS."""
    try:
        task = TASKS[env_id]
        results = facts.get("results") or {}
        evaluations = [(int(step), value / task.unit) for step, value, _ in results.get("evaluations", [])]
        if not evaluations:  # of a stopped run
            found = [row for row in rows if row.get("eval_return")]
            evaluations = [(int(row["env_step"]), float(row["eval_return"]) / task.unit) for row in found]
        rows = [row for row in rows if row["episodic_return"]]
        end_steps = np.array([float(row["env_step"]) for row in rows])
        lengths = np.array([float(row["episodic_length"]) for row in rows])
        scores = np.array([float(row["episodic_return"]) for row in rows]) / task.unit
        if "rl_minutes" in rows[0]:
            minutes = np.array([float(row["rl_minutes"]) for row in rows])
        else:
            minutes = np.array([float(row["wall_seconds"]) for row in rows]) / 60
        data = offline_data(facts, path)
        steps = place(end_steps, lengths, facts["args"].get("num_envs", 1), task.longest)
        order = np.argsort(steps, kind="stable")
        env_steps = results.get("env_steps", end_steps[-1])
        return Run(
            task=env_id,
            method=facts["algo"],
            data="scripted" if data == "none" else data,  # they stand beside each other
            seed=facts["seed"],
            steps=steps[order],
            scores=scores[order],
            ended=scores,
            minutes=minutes,
            end_steps=end_steps,
            evaluations=evaluations,
            env_steps=int(env_steps),
            facts=facts,
            without_data=data == "none",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {path} and its CSV are no whole log ({type(error).__name__}: {error}); move both elsewhere")


def smooth(run: Run) -> np.ndarray:
    """The run's curve: (n, 2) env steps and score, from the first window with an episode to the last."""
    interval = INTERVAL.get(run.method, 500)
    window = np.ceil(run.steps / interval).astype(int) - 1  # of each episode
    begin = window[0]
    counts = np.bincount(window - begin)
    sums = np.bincount(window - begin, weights=run.scores)
    first = sums[:10].sum() / counts[:10].sum()
    weight = 1.0  # of `first`
    total = 0.0
    episodes = 0.0
    curve = []
    for count, returns in zip(counts, sums):
        total = SMOOTHING * total + returns
        episodes = SMOOTHING * episodes + count
        weight = SMOOTHING * weight
        curve.append(weight * first + (1 - weight) * total / episodes)
    return np.column_stack([(begin + 1.0 + np.arange(len(curve))) * interval, curve])


def score_at(run: Run, step: float) -> float:
    """The score of a run at an env step; NaN before its first episode counts."""
    return float(np.interp(step, *smooth(run).T, left=np.nan))


def mean_between(run: Run, low: float, high: float) -> float:
    """Unsmoothed mean of the episodes placed in (low, high]; NaN if there are none.

    Beyond the run's end only episodes are placed that ended early, as successes do: they count for nothing.
    """
    inside = (run.steps > low) & (run.steps <= min(high, run.end))
    return run.scores[inside].mean() if inside.any() else np.nan


def last_episodes(run: Run, end: int, count: int = 100) -> float:
    """Mean of the last episodes that ended up to an env step; NaN if there are none."""
    ended = run.ended[run.end_steps <= end + min(1_000, end // 8)]
    return ended[-count:].mean() if len(ended) else np.nan


def minutes_at(run: Run, end: int) -> float:
    """Minutes of RL up to an env step; NaN before the first episode's end."""
    if run.end <= end and run.facts.get("results"):
        return run.facts["results"]["rl_minutes"]
    minutes = run.minutes[run.end_steps <= end + min(1_000, end // 8)]
    return minutes[-1] if len(minutes) else np.nan


def prior_alone(run: Run) -> float:
    """Score of the pre-trained prior's roll-outs, where RL begins; NaN if it was not logged.

    The Mis-aligned Kitchen mostly has the Kitchen's models, whose roll-outs are in the Kitchen: it shows none.
    """
    pretraining = (run.facts.get("results") or {}).get("pretraining") or {}
    if run.task == "kitchen-misaligned":
        return np.nan
    return pretraining.get("prior_return", np.nan) / TASKS[run.task].unit


def evaluation_at(run: Run, end: int) -> float:
    """Clean evaluation at an env step; NaN if there was none."""
    step, value = min(run.evaluations, key=lambda evaluation: abs(evaluation[0] - end), default=(np.inf, np.nan))
    return value if abs(step - end) <= min(5_000, end // 8) else np.nan


# ------------------------------------------------------------------------------------------------------------ cells
class Cell(list):
    """Runs of one method on one task with one kind of data, by seed."""

    @property
    def ends(self) -> list[int]:
        """Env steps at which runs ended, ascending; at each, all runs that got there can be compared."""
        return sorted({run.end for run in self})

    def reaching(self, end: int) -> list[Run]:
        return [run for run in self if run.end >= end]

    @property
    def main_end(self) -> int:
        """The most env steps that more than half of the seeds reached."""
        return max(end for end in self.ends if 2 * len(self.reaching(end)) > len(self))


def read_cells(folder: Path) -> dict[tuple[str, str, str], Cell]:
    """All runs in a folder but for those of studies: (task, method, data) -> runs, in the order of the tables."""
    paths = sorted([*folder.rglob("seed*.json"), *folder.rglob("args.json")])
    paths = [path for path in paths if "studies" not in path.relative_to(folder).parts]
    waiting = [path for path in paths if not has_begun(path)]
    if waiting and waiting == paths:
        sys.exit(f"error: in {waiting[0].parent} RL has not begun yet; wait for its pre-training")
    for path in waiting:
        print(f"left out: {path.parent}, whose RL has not begun")
    logs = [(path, *read_log(path)) for path in paths if path not in waiting]
    own = {}
    for _, env_id, _, rows in logs:
        if env_id not in TASKS:
            own.setdefault(env_id, []).extend(rows)
    TASKS.update({env_id: own_task(env_id, rows) for env_id, rows in own.items()})
    runs = [run_of(*log) for log in logs]
    cells = {}
    for run in runs:
        cell = cells.setdefault((run.task, run.method, run.data), Cell())
        if run.seed in [other.seed for other in cell]:
            name = f"seed {run.seed} of {run.task}/{run.method}/{run.data}"
            sys.exit(f"error: {name} is in {folder} twice; give the folder of one of these runs, or move one elsewhere")
        cell.append(run)
    return dict(sorted(cells.items(), key=lambda item: order_of(*item[0])))


def order_of(task: str, method: str, data: str) -> tuple:
    """Sorts cells by task, data, method; unknown names come last."""

    def rank(name, names):
        return [*names, name].index(name), name

    return rank(task, TASKS), rank(data, DATA), rank(method, METHODS)


def boards(cells) -> list[tuple[str, str]]:
    """Tasks with a kind of data for which there are runs."""
    return list(dict.fromkeys((task, data) for task, _, data in cells))


def label(method: str) -> str:
    return METHODS[method].label if method in METHODS else method


def kinds(cells) -> list[str]:
    """Kinds of data for which there are runs."""
    return list(dict.fromkeys(data for _, data in boards(cells)))


# ------------------------------------------------------------------------------------------------- the paper's curves
def paper_curves() -> dict[tuple[str, str], np.ndarray]:
    """(task, the paper's name of the method) -> (n, 2) env steps and score."""
    curves = {}
    with PAPER_CURVES.open() as file:
        for row in csv.DictReader(file):
            point = (float(row["env_step"]), float(row["value"]))
            curves.setdefault((row["task"], row["method"]), []).append(point)
    return {key: np.array(points) for key, points in curves.items()}


PAPER = paper_curves()


def paper_at(task: str, method: str, step: float) -> float:
    """The paper's score at an env step, linear between the points that were read; NaN outside of them."""
    curve = PAPER.get((task, METHODS[method].paper if method in METHODS else None))
    if curve is None:
        return np.nan
    return float(np.interp(step, *curve.T, left=np.nan, right=np.nan))


def paper_final(task: str, method: str) -> float:
    """The paper's last score; NaN if it has no curve."""
    curve = PAPER.get((task, METHODS[method].paper if method in METHODS else None))
    return np.nan if curve is None else float(curve[-1, 1])


# ---------------------------------------------------------------------------------------------------------- orderings
def relation(first, second, margin: float) -> str:
    """How two sets of scores, one per seed, stand: > or < if all seeds agree, = if the means are within the margin."""
    first = np.asarray(first)
    second = np.asarray(second)
    if abs(first.mean() - second.mean()) <= margin:
        return "="
    if first.min() > second.max():
        return ">"
    if first.max() < second.min():
        return "<"
    return "?"


@dataclass
class Ordering:
    """A pair of methods that the paper orders by its final scores, and what is found here."""

    task: str
    first: str  # the better one in the paper
    second: str
    expected: str  # > or =
    end: int = 0  # env steps at which both are compared here (0: untested)
    training: str = ""  # holds, fails
    clean: str = ""
    paper_then: str = ""  # the paper's relation at the same env step
    scores: tuple = ()  # of both methods' seeds at `end`
    at_ends: tuple = ()  # the same, each method at its own end
    unsmoothed: tuple = ()  # plain means of the last env steps before `end`


def orderings(cells, data: str) -> list[Ordering]:
    """All pairs of the paper's curves in the four tasks."""
    found = []
    for task, facts in TASKS.items():
        curves = [name for name, method in METHODS.items() if (task, method.paper) in PAPER]
        curves.sort(key=lambda name: -paper_final(task, name))
        for first, second in combinations(curves, 2):
            expected = relation([paper_final(task, first)], [paper_final(task, second)], facts.margin)
            pair = Ordering(task, first, second, expected)
            found.append(pair)
            if (task, first, data) not in cells or (task, second, data) not in cells:
                continue
            pair.end = min(cells[task, name, data].main_end for name in (first, second))
            runs = [cells[task, name, data].reaching(pair.end) for name in (first, second)]
            pair.scores = tuple(np.array([score_at(run, pair.end) for run in part]) for part in runs)
            # A method that loses what it had must not count as better because the other one's runs are shorter.
            pair.at_ends = tuple(final_scores(cells[task, name, data]) for name in (first, second))
            # Smoothing remembers how a run began: the plain means of what came last must agree.
            pair.unsmoothed = tuple(
                np.array([mean_between(run, pair.end - LAST, pair.end) for run in part]) for part in runs
            )
            three = pair.scores, pair.at_ends, pair.unsmoothed
            relations = {relation(*scores, facts.margin) for scores in three}
            pair.training = "holds" if relations == {expected} else "fails"
            clean = [[evaluation_at(run, pair.end) for run in part] for part in runs]
            if not np.isnan(np.concatenate(clean)).any():
                pair.clean = "holds" if relation(*clean, facts.margin) == expected else "fails"
            then = [[paper_at(task, name, pair.end)] for name in (first, second)]
            if not np.isnan(then).any():
                pair.paper_then = relation(*then, facts.margin)
    return found


def final_scores(cell: Cell) -> np.ndarray:
    """Scores of the seeds that reached the cell's main end."""
    return np.array([score_at(run, cell.main_end) for run in cell.reaching(cell.main_end)])


def coverage(cells, data: str) -> dict:
    """How much of the paper's figures there is here: runs, curves, seeds x env steps."""
    whole = 0
    done = 0
    begun = 0
    ended = 0
    five = 0
    for task in TASKS:
        for name, method in METHODS.items():
            if (task, method.paper) not in PAPER:
                continue
            end = PAPER[task, method.paper][-1, 0]
            whole += PAPER_SEEDS * end
            cell = cells.get((task, name, data), Cell())
            steps = sorted((min(run.env_steps, end) for run in cell), reverse=True)[:PAPER_SEEDS]
            done += sum(steps)
            begun += bool(cell)
            ended += any(run.end >= end for run in cell)
            five += len(cell) >= PAPER_SEEDS
    runs = sum(len(cell) for (_, _, d), cell in cells.items() if d == data)
    return dict(runs=runs, begun=begun, ended=ended, five=five, done=done, whole=whole)
