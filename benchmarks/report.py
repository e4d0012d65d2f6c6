"""Make RESULTS.md, all learning curves and the README's table from the logs in benchmarks/results.

    python benchmarks/report.py                  # this repository's results
    python benchmarks/report.py runs/results     # results of your own from benchmarks/run.py
    python benchmarks/report.py runs/FOLDER      # one run of an algorithm file

A log is TASK/METHOD/seedN.csv and .json, as benchmarks/run.py writes them. In this repository a folder DATA (scripted,
human, none: the offline data of the pre-training) stands between the two. studies/NAME/VARIANT/seedN.* are comparisons
of settings, explained in NAME/study.json. Sentences about these runs are in results/notes.md. How scores are computed
stands in scores.py; plot.py draws the curves.
"""

import csv
import json
import re
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

from benchmarks import plot, scores
from benchmarks.scores import DATA, METHODS, PAPER, RESULTS, TASKS, Cell, Ordering, Run, label, paper_at, paper_final
from data_tools.files import write_atomically

BEGIN = "<!-- results -->"  # the README's table stands between these two lines
END = "<!-- /results -->"


def read_notes() -> dict[str, str]:
    """Sentences about single runs, from notes.md: name of the section -> text."""
    _, *parts = re.split(r"<!-- (.+) -->\n", (RESULTS / "notes.md").read_text())
    return {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2])}


NOTES = read_notes()
# Methods that had no fair chance here: why
UNFAIR = dict(line.removeprefix("- ").split(": ", 1) for line in NOTES["unfair"].splitlines())


@dataclass
class Args:
    path: Annotated[Path, tyro.conf.Positional] = RESULTS  # folder of logs, or a run folder


# ---------------------------------------------------------------------------------------------------------- markdown
def number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def numbers(values, separator: str = " / ") -> str:
    return separator.join(map(number, values))


def distinct(values) -> str:
    return ", ".join(dict.fromkeys(values))


def table(rows: list[dict]) -> str:
    """Rows, column -> value, as Markdown; nothing without rows."""
    if not rows:
        return ""
    lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def paragraph(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False) + "\n"


def note(name: str) -> str:
    """A section of notes.md, after an empty line."""
    return f"\n{NOTES[name]}\n"


def of_data(data: str) -> str:
    return f"{DATA.get(data, data)} data"


def starred(task: str, data: str) -> str:
    """Name of a task; with a star where its data are not what its name says."""
    star = "\\*" if (task, data) == ("kitchen-misaligned", "scripted") else ""
    return TASKS[task].label + star


def under_star(text: str) -> str:
    """The note that belongs to the stars of a text."""
    return note("misaligned") if "\\*" in text else ""


def commits(run: Run) -> list[str]:
    """Short names of the commits that a run ran at, with a + where files were changed since."""
    starts = run.facts.get("attempts") or [run.facts]
    known = [start if start.get("commit") else run.facts for start in starts]  # of runs by hand the JSON says it once
    return [(start.get("commit") or "no log")[:7] + "+" * bool(start.get("changed")) for start in known]


def result_row(name: str, runs: list[Run], end: int, paper: bool = True) -> dict[str, str]:
    """What all runs that got to an env step have there."""
    task = runs[0].task

    def each(function: Callable, *inputs) -> list[float]:
        return [function(run, *inputs) for run in runs]

    clean = each(scores.evaluation_at, end)
    episodes = ""
    if not np.isnan(clean).all():
        count = runs[0].facts["args"]["eval_episodes"]
        episodes = f" ({count} from one state)" if TASKS[task].one_start else f" ({count})"
    minutes = each(scores.minutes_at, end)
    score = each(scores.score_at, end)
    row = {"method": name, "seeds": ", ".join(str(run.seed) for run in runs), "env steps": f"{end:,}"}
    row["score"] = f"**{number(np.mean(score))}** ({numbers(score)})"
    if paper:
        row["paper, same step"] = number(paper_at(task, runs[0].method, end))
        row["paper, its end"] = number(paper_final(task, runs[0].method))
    row["last 50,000 env steps"] = numbers(each(scores.mean_between, end - scores.LAST, end))
    row["last 100 episodes"] = numbers(each(scores.last_episodes, end))
    row["clean evaluation (episodes)"] = numbers(clean) + episodes
    row["prior alone"] = numbers(each(scores.prior_alone))
    row["RL minutes"] = " / ".join("–" if np.isnan(value) else f"{value:.0f}" for value in minutes)
    row["machine"] = distinct(run.machine for run in runs)
    row["commit"] = distinct(commit for run in runs for commit in commits(run))
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
    text = f"## {starred(task, data)}, {of_data(data)}\n\n"
    best = "" if facts.measure == "return" else f", at best {facts.best:g}"  # not known of a user's own task
    text += f"Score: {facts.measure}{best}.\n\n" + table(rows)
    text += "\nTraining episodes, unsmoothed mean between two env steps:\n\n"
    edges = bin_edges(max(end for cell in here.values() for end in cell.ends), facts.bin)
    rows = []
    for run in [run for cell in here.values() for run in cell]:
        row = {"method": label(run.method), "seed": run.seed}
        for low, high in zip(edges, edges[1:]):
            mean = scores.mean_between(run, low, high)
            there = run.end >= (low + high) / 2 and not np.isnan(mean)  # half of a bin, or more, was run
            row[f"{low // 1000}-{high // 1000}k"] = number(mean) if there else ""
        rows.append(row)
    text += table(rows)
    return text + under_star(text) + "\n"


# --------------------------------------------------------------------------------------------------------- orderings
def count_orderings(pairs: list[Ordering]) -> str:
    tested = [pair for pair in pairs if pair.training]
    holds = [pair for pair in tested if pair.training == "holds"]
    clean = [pair for pair in holds if pair.clean == "fails"]
    early = Counter(pair.training for pair in tested if pair.paper_then not in ("", pair.expected))
    single = [pair for pair in holds if min(map(len, pair.scores)) == 1]
    return (
        f"Of {len(pairs)} orderings of the paper, {len(tested)} were tested: **{len(holds)} hold, "
        f"{len(tested) - len(holds)} fail**, {len(pairs) - len(tested)} are untested. Of those that hold in training, "
        f"{len(clean)} fail in clean evaluation, and {len(single)} have a method with a single seed. At our env steps "
        f"the paper's own curves do not show {early['fails']} of those that fail and {early['holds']} of those that "
        "hold."
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


def ordering_row(cells, pair: Ordering, data: str) -> dict[str, str]:
    def means(parts) -> str:
        return numbers([part.mean() for part in parts], " vs ")

    names = pair.first, pair.second
    ours = means(pair.scores)
    if len({cells[pair.task, name, data].main_end for name in names}) > 1:
        ours += f"; at the end of each {means(pair.at_ends)}"
    margin = TASKS[pair.task].margin
    if scores.relation(*pair.unsmoothed, margin) != scores.relation(*pair.scores, margin):
        ours += f"; unsmoothed {' vs '.join(map(numbers, pair.unsmoothed))}"
    return {
        "task": starred(pair.task, data),
        "paper's order": f"{label(pair.first)} {pair.expected} {label(pair.second)}",
        "its last scores": numbers([paper_final(pair.task, name) for name in names], " vs "),
        "paper then": pair.paper_then or "–",
        "env steps": f"{pair.end:,}",
        "ours": ours,
        "training": f"**{pair.training}**",
        "clean evaluation": pair.clean or "–",
    }


def orderings_section(cells) -> str:
    text = ""
    for data in scores.kinds(cells):
        pairs = scores.orderings(cells, data)
        text += f"\n### With {of_data(data)}\n\n" + paragraph(count_orderings(pairs)) + "\n"
        found = table([ordering_row(cells, pair, data) for pair in pairs if pair.training])
        counts = []
        for task, facts in TASKS.items():
            here = [pair for pair in pairs if pair.task == task]
            counts.append(f"{facts.label} {sum(not pair.training for pair in here)} of {len(here)}")
        text += found + under_star(found) + f"\nUntested: {', '.join(counts)}.\n"
    return text


def coverage_section(cells) -> str:
    rows = []
    for data in scores.kinds(cells):
        found = scores.coverage(cells, data)
        pairs = scores.orderings(cells, data)
        tested = [pair for pair in pairs if pair.training]
        done, whole = found["done"], found["whole"]
        row = {"data": DATA.get(data, data), "runs": found["runs"]}
        row["paper's curves begun"] = f"{found['begun']} of {len(PAPER)}"
        row["run to the paper's end"] = found["ended"]
        row["with 5 seeds"] = found["five"]
        row["paper's seeds x env steps"] = f"{done / 1e6:.1f}M of {whole / 1e6:.1f}M ({done / whole:.1%})"
        row["orderings tested"] = f"{len(tested)} of {len(pairs)}"
        row["orderings that hold"] = sum(pair.training == "holds" for pair in tested)
        rows.append(row)
    return "\n## Coverage\n\n" + table(rows) + note("coverage").format(curves=len(PAPER)) + "\n"


# ----------------------------------------------------------------------------------------------------------- studies
def study_rows(study: Path, facts: dict, cells) -> list[dict[str, str]]:
    """The cells to compare with, then every variant; each at its own ends and those of the others."""
    variants = {}
    for path in sorted(study.glob("*/seed*.json")):
        variants.setdefault(path.parent.name, Cell()).append(scores.read_run(path))
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


def pretraining_rows(study: Path) -> list[dict[str, str]]:
    """Of each log of pre-training: what roll-outs of the prior did at each validation."""
    unit = TASKS[study.name.split("_")[0]].unit  # the folder is TASK_..._pretraining

    def series(name: str, unit: float = 1.0, digits: int = 2) -> str:
        return " / ".join(f"{float(row[name]) / unit:.{digits}f}" for row in rows) if rows[0].get(name) else "–"

    found = []
    for path in sorted(study.glob("*.csv")):
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("prior_return")]
        if rows:
            updates = " / ".join(f"{int(row['update']):,}" for row in rows)
            found.append({"file": f"`{path.name}`", "updates": updates, "prior alone": series("prior_return", unit)})
            found[-1]["in any order"] = series("any_order")
            found[-1]["KL(q, N(0,1)), nats"] = series("valid_kl_loss", digits=1)
    return found


def studies_section(folder: Path, cells) -> str:
    text = note("studies")
    for path in sorted((folder / "studies").glob("*/study.json")):
        study = path.parent
        facts = json.loads(path.read_text())
        text += f"\n### {study.name}\n\n" + paragraph(f"{facts['question']} {facts['note']}") + "\n"
        text += table(study_rows(study, facts, cells))
        files = []
        for name, file in facts.get("files", {}).items():
            row = dict(file=f"`{name}`", command=f"`{file['command']}`", commit=file.get("commit", "in the JSON"))
            files.append(row | dict(machine=file["machine"], note=file.get("note", "")))
        text += "\n" + table(files) if files else ""
        text += "\n" + table(pretraining_rows(study)) if study.name.endswith("_pretraining") else ""
        for log in sorted(study.glob("*.txt")):
            text += f"\n`{log.name}`:\n\n```\n{log.read_text().rstrip()}\n```\n"
    return text


def results_text(folder: Path, cells) -> str:
    """RESULTS.md."""
    ours = folder.resolve() == RESULTS
    text = note("introduction") + coverage_section(cells) if ours else note("introduction of other results") + "\n"
    for task, data in scores.boards(cells):
        text += board_section(cells, task, data)
    if ours or any(pair.training for data in scores.kinds(cells) for pair in scores.orderings(cells, data)):
        text += note("orderings")
        text += note("fair") + paragraph(fair_text(scores.orderings(cells, "scripted"))) if ours else ""
        text += orderings_section(cells)
    if (folder / "studies").is_dir():
        text += studies_section(folder, cells)
    return text.strip() + "\n"


# --------------------------------------------------------------------------------------------------- README's table
def shown_end(cells, task: str, data: str) -> int:
    """Env steps in the README's table: SkiMo's if it was run."""
    ends = [cell.main_end for (t, _, d), cell in cells.items() if (t, d) == (task, data)]
    return cells[task, "skimo", data].main_end if (task, "skimo", data) in cells else max(ends)


def readme_cell(cells, task: str, method: str, data: str) -> str:
    cell = cells.get((task, method, data))
    final = paper_final(task, method)
    if cell is None:
        return "not run" + ("" if np.isnan(final) else f"<br>paper's end: {number(final)}")
    end = min(cell.main_end, shown_end(cells, task, data))
    score = [scores.score_at(run, end) for run in cell.reaching(end)]
    text = f"**{number(np.mean(score))}** ({numbers(score)})<br>"
    same = number(paper_at(task, method, end))
    text += "paper: no curve" if np.isnan(final) else f"paper: {same}, its end: {number(final)}"
    return text if end == shown_end(cells, task, data) else f"{text}<br>(at {end:,})"


def without_data(cells) -> list[str]:
    """Methods that have no offline data."""
    found = {method for (_, method, _), cell in cells.items() if all(run.without_data for run in cell)}
    return [name for name in METHODS if name in found]


def without_data_text(cells) -> str:
    """A sentence with the scores of methods without offline data, where SkiMo's are shown."""
    values = []
    counts = set()
    for name in without_data(cells):
        found = [cells.get((task, name, "scripted"), Cell()) for task in TASKS]
        final = [scores.final_scores(cell) if cell else np.array([np.nan]) for cell in found]
        counts |= {len(score) for score in final if not np.isnan(score).any()}
        values.append(f"{label(name)} {numbers([score.mean() for score in final])}")
    if not values:
        return ""
    seeds = "one seed each" if counts == {1} else f"{min(counts)} to {max(counts)} seeds"
    tasks = " / ".join(facts.label for facts in TASKS.values())
    return f"**Without offline data**, {seeds}, {tasks}: {'; '.join(values)}. {NOTES['smaller']}"


def distance_text(cells) -> str:
    """How far this is from the paper."""
    words = "**How far this is from the paper.**"
    for data in scores.kinds(cells):
        found = scores.coverage(cells, data)
        every = scores.orderings(cells, data)
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
            f" {of_data(data).capitalize()}: {found['begun']} of its {len(PAPER)} curves begun, "
            f"{found['ended']} run to their end; {tested}."
        )
        if any({pair.first, pair.second} & UNFAIR.keys() for pair in pairs):
            words += f" {fair_text(pairs)}"
    return words


def readme_text(cells) -> str:
    """The README's table: a row for every method with offline data, a column for every task and kind of data."""
    run = {method for _, method, _ in cells} - set(without_data(cells))
    rows = []
    for name in [name for name in METHODS if name in plot.SHOWN or name in run]:
        row = {"method": f"{label(name)}<br>`{name}.py`"}
        for task, data in scores.boards(cells):
            steps = f"{shown_end(cells, task, data):,} env steps"
            column = f"{starred(task, data)}, {of_data(data)}<br>{TASKS[task].measure}<br>{steps}"
            row[column] = readme_cell(cells, task, name, data)
        rows.append(row)
    text = table(rows) + note("under the table")
    cell = cells.get(("maze", "skimo_no_joint", "scripted"))
    if cell:
        prior = numbers(map(scores.prior_alone, cell))
        text += "\n" + paragraph(NOTES["no joint training"].format(prior=prior))
    for words in (without_data_text(cells), under_star(text).strip(), distance_text(cells)):
        text += "\n" + paragraph(words) if words else ""
    return text


def with_table(readme: str, text: str) -> str:
    """The README with the text between its two markers; as it is if it does not have both."""
    if BEGIN not in readme or END not in readme:
        return readme
    before, rest = readme.split(BEGIN, 1)
    return f"{before}{BEGIN}\n{text}{END}{rest.split(END, 1)[1]}"


# -------------------------------------------------------------------------------------------------------------- main
def write(path: Path, text: str):
    write_atomically(path, lambda part: part.write_text(text))
    print(f"wrote {path}")


def main(args: Args):
    """Write tables and figures, and print the coverage."""
    cells = scores.read_cells(args.path)
    if not cells:
        sys.exit(f"error: no logs in {args.path}; it should hold TASK/METHOD/seedN.json or a run's args.json")
    ours = args.path.resolve() == RESULTS
    if ours:
        print(coverage_section(cells))
    write(RESULTS.parent / "RESULTS.md" if ours else args.path / "RESULTS.md", results_text(args.path, cells))
    plot.save(plot.overview(cells), args.path / "curves.png")
    for task in dict.fromkeys(task for task, _ in scores.boards(cells)):
        folder = args.path / task
        picture = folder / "curves.png" if folder.is_dir() else args.path / f"curves_{task}.png"
        plot.save(plot.enlarged(cells, task), picture)
    if ours:
        readme = scores.ROOT / "README.md"
        write(readme, with_table(readme.read_text(), readme_text(cells)))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
