"""Make RESULTS.md, all learning curves and the README's table from the logs in benchmarks/results.

    python benchmarks/report.py                  # this repository's results
    python benchmarks/report.py runs/results     # results of your own from benchmarks/run.py
    python benchmarks/report.py runs/FOLDER      # one run of an algorithm file

A log is TASK/METHOD/seedN.csv and .json, as benchmarks/run.py writes them. In this repository a folder DATA (scripted,
human, none: the offline data of the pre-training) stands between the two. studies/NAME/VARIANT/seedN.* are comparisons
of settings, explained in NAME/study.json. How scores are computed stands in scores.py; plot.py draws the curves.
"""

import csv
import json
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plot import SHOWN, enlarged, overview, save
from benchmarks.scores import (
    DATA,
    LAST,
    METHODS,
    PAPER,
    RESULTS,
    ROOT,
    TASKS,
    Cell,
    Ordering,
    Run,
    boards,
    coverage,
    evaluation_at,
    kinds,
    label,
    last_episodes,
    mean_between,
    minutes_at,
    orderings,
    paper_at,
    paper_final,
    prior_alone,
    read_cells,
    read_run,
    relation,
    score_at,
)
from data_tools.files import write_atomically

BEGIN = "<!-- results -->"  # the README's table stands between these two lines
END = "<!-- /results -->"

INTRODUCTION = """
# Results

Made by `python benchmarks/report.py` from the logs in [results/](results/README.md). Do not edit it: a test fails when
it differs from what the logs give. How the numbers are made: [README](README.md#how-the-numbers-are-made).

- **Score**: training episodes, with exploration, smoothed as in the paper. First the mean over seeds, then each seed.
  *Paper, same step*: the paper's value at our env steps, smoothed in the same way, read off its figures (five seeds).
- **Data** for pre-training. The authors' data were not to be had. *Scripted*: demonstrations by our own controllers.
  *Human (187 episodes)*: people's demonstrations, 30 % of the paper's, put together from public copies (of 120 the
  objects' states are simulated again; the file is not in this repository), with shifted arms and recombined objects in
  pre-training, which the paper does not have. So compare the order of methods, not heights.
- **Clean evaluation**: without exploration noise. **On CALVIN 20 episodes are not 20 samples**: all start in the same
  state, without noise, and most policies are deterministic up to a planner's samples (of 20 such episodes by the mode
  of SkiMo's published prior, 18 stayed within 1 mm of each other; no log kept). How many differ in each cell was not
  logged. They begin with an open gripper, training episodes with the last one's command, often closed
  ([more](../data_tools/README.md#calvin)): the two are not alike. In the maze every episode starts elsewhere. In the
  kitchens all start in the same state, and what is observed has noise of its own in each.
- **Prior alone**: roll-outs of the pre-trained prior, where RL begins. Those of the Mis-aligned Kitchen's models were
  mostly in the Kitchen, so it shows none. On human data SkiMo's first in the Kitchen, .32, was measured in the
  Mis-aligned one, for which that model was made.
- **RL minutes**: without pre-training, mostly one thread beside other jobs on two shared cores: upper bounds.
- **Commit**: of each start of a run; a + says that files were changed since. **To make a run again**: its command is in
  `results/TASK/METHOD/DATA/seedN.json` under `attempts`. Leave out the folders and, in older ones, `--num-threads 1`
  (now the environment variable `OMP_NUM_THREADS=1`).
- **Length of plans**: CEM plans 1 skill ahead on CALVIN and up to 10 in the kitchens. In the maze plans grow by the
  release's schedule, made for 2M env steps: 1 skill up to 111,000 env steps, 2 up to 222,000, 3 at 300,000, 6 at
  610,000, where two seeds went, and 10 beyond 1M, where one went. The others test long plans only in the kitchens.
- **Seeds of a cell share a pre-trained model**, so their spread is that of RL alone. Relay's seeds, those of
  SkiMo, of SkiMo without CEM and of SkiMo + SAC on human data, and one seed of SkiMo without joint training in the
  maze have models of their own. On human data SkiMo without joint training has two models, SPiRL one.
- Hyper-parameters were chosen with SkiMo on these tasks, partly on these seeds. Its ablations inherit them.
"""

OWN_INTRODUCTION = """
# Results

Made by `python benchmarks/report.py`. **Score**: training episodes, with exploration, smoothed as in the paper. First
the mean over seeds, then each seed. *Paper, same step*: the paper's value at these env steps, smoothed in the same way,
read off its figures (five seeds). **Clean evaluation**: without exploration noise. **Prior alone**: roll-outs of the
pre-trained prior, where RL begins. **RL minutes**: without pre-training.
"""

ORDERINGS = """
## The paper's orderings

Every pair of methods of which the paper's figures show curves on a task, ordered by the paper's last scores. `>` means
better, `=` means that no difference can be read (up to 0.03 in the maze, 0.1 sub-tasks elsewhere). A pair **holds**
here if our scores have the same relation. For `>` the means must differ by more than that, and every seed of one method
must be above every seed of the other. It must be so at the env steps that both reached, at the end of each, and
unsmoothed in the last 50,000 env steps before the first. Anything else **fails**, ties too. *Paper then* is the paper's
own relation at our env steps, far from its end.
"""

NOT_FAIR = """
**Dreamer and TD-MPC ran here with smaller networks and fewer updates than the paper's** ([what
exactly](results/README.md)): where they lose, that may be why.
"""

COVERAGE = """
The paper's figures have {curves} curves that can be read: nine methods on four tasks, five seeds each. Runs of a method
without such a curve (single-step dynamics, for instance) count as runs only; those without offline data stand beside
scripted data. Runs of studies do not count.
"""

STUDIES = """
## Studies

Comparisons of settings. They do not count in the tables above.
"""

MISALIGNED = """
\\* slide -> hinge, which it needs, is done in 102 of our 603 demonstrations; in 6 of 187 human ones.
"""

UNFAIR = {
    "dreamer": "Dreamer (smaller networks, fewer updates)",
    "tdmpc": "TD-MPC (likewise)",
    "skimo_no_joint": "SkiMo without joint training (of its pre-training only the Kitchen's KL weight was chosen)",
}
SMALLER = (
    "SAC, Dreamer, TD-MPC, DIAYN, HIRO and LSP with fewer updates or smaller networks than by default, or other rates "
    "([what exactly](benchmarks/results/README.md))."
)

UNDER_TABLE = """
Mean over seeds (each seed) of training episodes, smoothed as in the paper (over some 50,000 env steps, SPiRL's over
10,000), beside its value at the same env step and at its end. **The offline data are not the paper's: compare the order
of methods, not heights.** On human data pre-training shifts arms and recombines objects, the paper's does not. Plans:
up to 3 skills in the maze, 1 on CALVIN, 10 in the Kitchen. **With scripted data seeds differ in RL alone**: those of a
cell start from one pre-trained model, but for Relay's, one of SkiMo without joint training on each task, and one of
single-step dynamics each in the maze and on CALVIN. On human data cells of `skimo*.py` come from three models (without
joint training: two), SPiRL's from one.
"""


@dataclass
class Args:
    path: Annotated[Path, tyro.conf.Positional] = RESULTS  # folder of logs, or a run folder


# ---------------------------------------------------------------------------------------------------------- markdown
def number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def per_seed(function: Callable, runs: list[Run], form: Callable = number) -> str:
    return " / ".join(form(function(run)) for run in runs)


def distinct(values) -> str:
    return ", ".join(dict.fromkeys(values))


def table(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def starred(task: str, data: str) -> str:
    """Name of a task; with a star where its data are not what its name says."""
    star = "\\*" if (task, data) == ("kitchen-misaligned", "scripted") else ""
    return TASKS[task].label + star


def note(text: str) -> str:
    """The note that belongs to the stars of a text."""
    return MISALIGNED if "\\*" in text else ""


RESULT_HEADER = [
    "method",
    "seeds",
    "env steps",
    "score",
    "paper, same step",
    "paper, its end",
    "last 50,000 env steps",
    "last 100 episodes",
    "clean evaluation (episodes)",
    "prior alone",
    "RL minutes",
    "machine",
    "commit",
]


def commits(run: Run) -> list[str]:
    """Short names of the commits that a run ran at, with a + where files were changed since."""
    starts = run.facts.get("attempts") or [run.facts]
    known = [start if start.get("commit") else run.facts for start in starts]  # of runs by hand the JSON says it once
    return [(start.get("commit") or "no log")[:7] + "+" * bool(start.get("changed")) for start in known]


def result_row(name: str, runs: list[Run], end: int, paper: bool = True) -> list[str]:
    """What all runs that got to an env step have there."""
    task = runs[0].task
    scores = [score_at(run, end) for run in runs]
    clean = per_seed(lambda run: evaluation_at(run, end), runs)
    if not np.isnan([evaluation_at(run, end) for run in runs]).all():
        count = runs[0].facts["args"]["eval_episodes"]
        clean += f" ({count} from one state)" if TASKS[task].one_start else f" ({count})"
    row = [
        name,
        ", ".join(str(run.seed) for run in runs),
        f"{end:,}",
        f"**{number(np.mean(scores))}** ({' / '.join(map(number, scores))})",
    ]
    if paper:
        row.append(number(paper_at(task, runs[0].method, end)))
        row.append(number(paper_final(task, runs[0].method)))
    row += [
        per_seed(lambda run: mean_between(run, end - LAST, end), runs),
        per_seed(lambda run: last_episodes(run, end), runs),
        clean,
        per_seed(prior_alone, runs),
        per_seed(lambda run: minutes_at(run, end), runs, lambda value: "–" if np.isnan(value) else f"{value:.0f}"),
        distinct(run.machine for run in runs),
        distinct(commit for run in runs for commit in commits(run)),
    ]
    return row


def bin_edges(last: int, width: int) -> list[int]:
    """Edges of the bins of training means up to an env step: eight bins of a width, then bins four times as wide.

    There is no wide bin of which less than half was run.
    """
    edges = list(range(0, min(last, 8 * width), width))
    edges.append(edges[-1] + width)
    wide = range(8 * width, last - 2 * width + 1, 4 * width)
    return [*edges, *(low + 4 * width for low in wide)]


def board_section(cells, task: str, data: str) -> str:
    """Results of a task: a table of scores, and one of training means along the way."""
    facts = TASKS[task]
    here = {method: cell for (t, method, d), cell in cells.items() if (t, d) == (task, data)}
    shared = shown_end(cells, task, data)
    rows = []
    for name, cell in here.items():
        ends = {*cell.ends, shared} if cell.ends[-1] >= shared else cell.ends
        rows += [result_row(label(name), cell.reaching(end), end) for end in sorted(ends)]
    text = f"## {starred(task, data)}, {DATA.get(data, data)} data\n\n"
    best = "" if facts.measure == "return" else f", at best {facts.best:g}"  # not known of a user's own task
    text += f"Score: {facts.measure}{best}.\n\n" + table(RESULT_HEADER, rows)
    text += "\nTraining episodes, unsmoothed mean between two env steps:\n\n"
    edges = bin_edges(max(end for cell in here.values() for end in cell.ends), facts.bin)
    bins = list(zip(edges, edges[1:]))
    header = ["method", "seed", *(f"{low // 1000}-{high // 1000}k" for low, high in bins)]
    rows = []
    for name, cell in here.items():
        for run in cell:
            means = [mean_between(run, low, high) for low, high in bins]
            half = [run.end >= (low + high) / 2 for low, high in bins]  # of a bin, or more, was run
            values = [number(mean) if there and not np.isnan(mean) else "" for mean, there in zip(means, half)]
            rows.append([label(name), run.seed, *values])
    text += table(header, rows)
    return text + note(text) + "\n"


def count_orderings(pairs: list[Ordering]) -> str:
    tested = [pair for pair in pairs if pair.training]
    holds = [pair for pair in tested if pair.training == "holds"]
    fails = [pair for pair in tested if pair.training == "fails"]
    clean = [pair for pair in holds if pair.clean == "fails"]
    early = Counter(pair.training for pair in tested if pair.paper_then not in ("", pair.expected))
    single = [pair for pair in holds if min(map(len, pair.scores)) == 1]
    return (
        f"Of {len(pairs)} orderings of the paper, {len(tested)} were tested: **{len(holds)} hold, {len(fails)} fail**, "
        f"{len(pairs) - len(tested)} are untested. Of those that hold in training, {len(clean)} fail in clean "
        f"evaluation, and {len(single)} have a method with a single seed. At our env steps the paper's own curves do "
        f"not show {early['fails']} of those that fail and {early['holds']} of those that hold."
    )


def fair_text(pairs: list[Ordering]) -> str:
    """A sentence on the orderings of those methods only that had a fair chance here."""
    tested = [pair for pair in pairs if pair.training]
    fair = [pair for pair in tested if not {pair.first, pair.second} & UNFAIR.keys()]
    holds = [pair for pair in fair if pair.training == "holds"]
    clean = [pair for pair in holds if pair.clean == "holds"]
    left_out = [why for name, why in UNFAIR.items() if any(name in (pair.first, pair.second) for pair in tested)]
    return (
        f"Without {', '.join(left_out)}, {len(fair)} pairs remain; as in the paper: {len(holds)}, also without "
        f"noise: {len(clean)}."
    )


def ordering_row(cells, pair: Ordering, data: str) -> list[str]:
    scores = " vs ".join(number(part.mean()) for part in pair.scores)
    ends = [cells[pair.task, name, data].main_end for name in (pair.first, pair.second)]
    if ends[0] != ends[1]:
        scores += "; at the end of each " + " vs ".join(number(part.mean()) for part in pair.at_ends)
    margin = TASKS[pair.task].margin
    if relation(*pair.unsmoothed, margin) != relation(*pair.scores, margin):
        scores += "; unsmoothed " + " vs ".join(" / ".join(map(number, part)) for part in pair.unsmoothed)
    return [
        starred(pair.task, data),
        f"{label(pair.first)} {pair.expected} {label(pair.second)}",
        f"{number(paper_final(pair.task, pair.first))} vs {number(paper_final(pair.task, pair.second))}",
        pair.paper_then or "–",
        f"{pair.end:,}",
        scores,
        f"**{pair.training}**",
        pair.clean or "–",
    ]


def orderings_section(cells) -> str:
    header = [
        "task",
        "paper's order",
        "its last scores",
        "paper then",
        "env steps",
        "ours",
        "training",
        "clean evaluation",
    ]
    parts = []
    for data in kinds(cells):
        pairs = orderings(cells, data)
        text = f"\n### With {DATA.get(data, data)} data\n\n"
        text += paragraph(count_orderings(pairs)) + "\n"
        rows = [ordering_row(cells, pair, data) for pair in pairs if pair.training]
        text += table(header, rows) if rows else ""
        text += note(text)
        counts = []
        for task, facts in TASKS.items():
            here = [pair for pair in pairs if pair.task == task]
            untested = [pair for pair in here if not pair.training]
            counts.append(f"{facts.label} {len(untested)} of {len(here)}")
        text += f"\nUntested: {', '.join(counts)}.\n"
        parts.append(text)
    return "".join(parts)


def coverage_section(cells) -> str:
    rows = []
    for data in kinds(cells):
        found = coverage(cells, data)
        pairs = orderings(cells, data)
        tested = [pair for pair in pairs if pair.training]
        share = f"{found['done'] / 1e6:.1f}M of {found['whole'] / 1e6:.1f}M ({found['done'] / found['whole']:.1%})"
        rows.append(
            [
                DATA.get(data, data),
                found["runs"],
                f"{found['begun']} of {len(PAPER)}",
                found["ended"],
                found["five"],
                share,
                f"{len(tested)} of {len(pairs)}",
                sum(pair.training == "holds" for pair in tested),
            ]
        )
    header = [
        "data",
        "runs",
        "paper's curves begun",
        "run to the paper's end",
        "with 5 seeds",
        "paper's seeds x env steps",
        "orderings tested",
        "orderings that hold",
    ]
    return "\n## Coverage\n\n" + table(header, rows) + COVERAGE.format(curves=len(PAPER)) + "\n"


def study_rows(study: Path, facts: dict, cells) -> list[list[str]]:
    """The cells to compare with, then every variant; each at its own ends and those of the others."""
    variants = {}
    for path in sorted(study.glob("*/seed*.json")):
        variants.setdefault(path.parent.name, Cell()).append(read_run(path))
    compared = []
    for name in facts.get("compare", []):
        task, method, data = name.split("/")
        data = "scripted" if data == "none" else data  # runs without data stand beside all others
        if (task, method, data) not in cells:
            sys.exit(f"error: {study / 'study.json'} compares with {name}, which has no logs; correct the name")
        compared.append((task, method, cells[task, method, data]))
    several = len({task for task, _, _ in compared}) > 1
    rows = []
    for task, method, cell in compared:
        ends = {end for other in variants.values() if other[0].task == task for end in other.ends}
        ends |= {other.main_end for t, _, other in compared if t == task}
        text = f"{label(method)}, {TASKS[task].label}, default" if several else f"{label(method)}, default"
        for end in sorted(end for end in ends if end <= cell.main_end):
            rows.append(result_row(text, cell.reaching(end), end, paper=False))
    for name, cell in variants.items():
        text = name.replace("_", " ")
        if name in facts.get("variants", {}):
            text += f": {facts['variants'][name]}"
        main_ends = {other.main_end for task, _, other in compared if task == cell[0].task}
        for end in sorted({*cell.ends, *(end for end in main_ends if end <= cell.ends[-1])}):
            rows.append(result_row(text, cell.reaching(end), end, paper=False))
    return rows


def pretraining_row(path: Path) -> list[str] | None:
    """Of a log of pre-training: what roll-outs of the prior did at each validation."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("prior_return")]
    if not rows:
        return None
    unit = TASKS[path.parent.name.split("_")[0]].unit  # the folder is TASK_..._pretraining

    def series(name: str, unit: float = 1.0, digits: int = 2) -> str:
        return " / ".join(f"{float(row[name]) / unit:.{digits}f}" for row in rows) if rows[0].get(name) else "–"

    updates = " / ".join(f"{int(row['update']):,}" for row in rows)
    return [
        f"`{path.name}`",
        updates,
        series("prior_return", unit),
        series("any_order"),
        series("valid_kl_loss", digits=1),
    ]


def studies_section(folder: Path, cells) -> str:
    text = STUDIES
    header = [name for name in RESULT_HEADER if not name.startswith("paper")]
    for path in sorted((folder / "studies").glob("*/study.json")):
        facts = json.loads(path.read_text())
        text += f"\n### {path.parent.name}\n\n" + paragraph(f"{facts['question']} {facts['note']}") + "\n"
        rows = study_rows(path.parent, facts, cells)
        text += table(header, rows) if rows else ""
        files = []
        for name, file in facts.get("files", {}).items():
            commit = file.get("commit", "in the JSON")
            files.append([f"`{name}`", f"`{file['command']}`", commit, file["machine"], file.get("note", "")])
        text += "\n" + table(["file", "command", "commit", "machine", "note"], files) if files else ""
        if path.parent.name.endswith("_pretraining"):
            header_of_logs = ["file", "updates", "prior alone", "in any order", "KL(q, N(0,1)), nats"]
            logs = [pretraining_row(log) for log in sorted(path.parent.glob("*.csv"))]
            text += "\n" + table(header_of_logs, [row for row in logs if row])
        for log in sorted(path.parent.glob("*.txt")):
            text += f"\n`{log.name}`:\n\n```\n{log.read_text().rstrip()}\n```\n"
    return text


def results_text(folder: Path, cells) -> str:
    """RESULTS.md."""
    ours = folder.resolve() == RESULTS
    text = INTRODUCTION.lstrip() + coverage_section(cells) if ours else OWN_INTRODUCTION.lstrip() + "\n"
    for task, data in boards(cells):
        text += board_section(cells, task, data)
    if ours or any(pair.training for data in kinds(cells) for pair in orderings(cells, data)):
        text += ORDERINGS
        if ours:
            text += NOT_FAIR + paragraph(fair_text(orderings(cells, "scripted")))
        text += orderings_section(cells)
    if (folder / "studies").is_dir():
        text += studies_section(folder, cells)
    return text.rstrip() + "\n"


def readme_cell(cells, task: str, method: str, data: str) -> str:
    cell = cells.get((task, method, data))
    if cell is None:
        final = paper_final(task, method)
        return "not run" + ("" if np.isnan(final) else f"<br>paper's end: {number(final)}")
    end = min(cell.main_end, shown_end(cells, task, data))
    scores = [score_at(run, end) for run in cell.reaching(end)]
    lines = [f"**{number(np.mean(scores))}** ({' / '.join(map(number, scores))})"]
    final = paper_final(task, method)
    if np.isnan(final):
        lines.append("paper: no curve")
    else:
        lines.append(f"paper: {number(paper_at(task, method, end))}, its end: {number(final)}")
    if end != shown_end(cells, task, data):
        lines.append(f"(at {end:,})")
    return "<br>".join(lines)


def shown_end(cells, task: str, data: str) -> int:
    """Env steps in the README's table: SkiMo's if it was run."""
    ends = [cell.main_end for (t, _, d), cell in cells.items() if (t, d) == (task, data)]
    return cells[task, "skimo", data].main_end if (task, "skimo", data) in cells else max(ends)


def without_data(cells) -> list[str]:
    """Methods that have no offline data."""
    found = {method for (_, method, _), cell in cells.items() if all(run.without_data for run in cell)}
    return [name for name in METHODS if name in found]


def without_data_text(cells) -> str:
    """A sentence with the scores of methods without offline data, where SkiMo's are shown."""
    values = []
    counts = set()
    for name in without_data(cells):
        scores = []
        for task in TASKS:
            cell = cells.get((task, name, "scripted"))
            runs = cell.reaching(cell.main_end) if cell else []
            counts |= {len(runs)} - {0}
            scores.append(number(np.mean([score_at(run, cell.main_end) for run in runs])) if runs else "–")
        values.append(f"{label(name)} {' / '.join(scores)}")
    if not values:
        return ""
    seeds = "one seed each" if counts == {1} else f"{min(counts)} to {max(counts)} seeds"
    tasks = " / ".join(facts.label for facts in TASKS.values())
    return "\n" + paragraph(f"**Without offline data**, {seeds}, {tasks}: {'; '.join(values)}. {SMALLER}")


def no_joint_text(cells) -> str:
    """A warning: where SkiMo without joint training ends at 0 as in the paper, that is no agreement."""
    cell = cells.get(("maze", "skimo_no_joint", "scripted"))
    if not cell:
        return ""
    return "\n" + paragraph(
        "**The 0.00 of SkiMo without joint training in the maze does not confirm the paper's**: its prior alone does "
        f"{per_seed(prior_alone, cell)} (each seed), so RL had next to nothing to begin with. With three times the "
        "updates of pre-training RL learns there (study `maze_no_joint` in RESULTS.md, one seed)."
    )


def readme_text(cells) -> str:
    """The README's table: a row for every method with offline data, a column for every task and kind of data."""
    run = {method for _, method, _ in cells} - set(without_data(cells))
    methods = [name for name in METHODS if name in SHOWN or name in run]
    header = ["method"]
    for task, data in boards(cells):
        facts = TASKS[task]
        header.append(
            f"{starred(task, data)}, {DATA.get(data, data)} data<br>{facts.measure}<br>"
            f"{shown_end(cells, task, data):,} env steps"
        )
    rows = []
    for name in methods:
        row = [readme_cell(cells, task, name, data) for task, data in boards(cells)]
        rows.append([f"{label(name)}<br>`{name}.py`", *row])
    text = table(header, rows)
    text += UNDER_TABLE + no_joint_text(cells) + without_data_text(cells) + note(text)
    words = "**How far this is from the paper.**"
    for data in kinds(cells):
        found = coverage(cells, data)
        every = orderings(cells, data)
        pairs = [pair for pair in every if pair.training]
        holds = sum(pair.training == "holds" for pair in pairs)
        both = sum(pair.training == pair.clean == "holds" for pair in pairs)
        tested = "no pair of methods compared"
        if pairs:
            tested = (
                f"of its {len(every)} pairs of methods (one better, or both alike) we could compare {len(pairs)}: "
                f"{holds} stand as in the paper in training, {both} of these also without noise"
            )
        words += (
            f" {DATA.get(data, data).capitalize()} data: {found['begun']} of its {len(PAPER)} curves begun, "
            f"{found['ended']} run to their end; {tested}."
        )
        if any({pair.first, pair.second} & UNFAIR.keys() for pair in pairs):
            words += f" {fair_text(pairs)}"
    return text + "\n" + paragraph(words)


def with_table(readme: str, text: str) -> str:
    """The README with the text between its two markers; as it is if it does not have both."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, rest = readme.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n{text}{END}{after}"


# -------------------------------------------------------------------------------------------------------------- main
def write(path: Path, text: str):
    write_atomically(path, lambda part: part.write_text(text))
    print(f"wrote {path}")


def main(args: Args):
    """Write tables and figures, and print the coverage."""
    cells = read_cells(args.path)
    if not cells:
        sys.exit(f"error: no logs in {args.path}; it should hold TASK/METHOD/seedN.json or a run's args.json")
    ours = args.path.resolve() == RESULTS
    if ours:
        print(coverage_section(cells))
    write(RESULTS.parent / "RESULTS.md" if ours else args.path / "RESULTS.md", results_text(args.path, cells))
    save(overview(cells), args.path / "curves.png")
    for task in dict.fromkeys(task for task, _ in boards(cells)):
        folder = args.path / task
        save(enlarged(cells, task), folder / "curves.png" if folder.is_dir() else args.path / f"curves_{task}.png")
    if not ours:
        return
    readme = ROOT / "README.md"
    text = readme.read_text()
    if BEGIN in text and END in text:
        write(readme, with_table(text, readme_text(cells)))
    else:
        print(f"README.md has no lines {BEGIN} and {END}: its table was not written")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
