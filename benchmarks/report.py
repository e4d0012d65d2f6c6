"""Make RESULTS.md, the pictures of all learning curves, and the tables of the other pages from the logs.

    python benchmarks/report.py                            # this repository's results
    python benchmarks/report.py runs/results               # results of your own from benchmarks/run.py
    python benchmarks/report.py runs/FOLDER [runs/OTHER]   # runs of algorithm files, beside the published SkiMo

A log is TASK/METHOD/seedN.csv and .json, as benchmarks/run.py writes them. In this repository a folder DATA (scripted,
human, none: the offline data of the pre-training) stands before seedN. held-out/BOARD/METHOD/seedN.* are runs of the
held-out suite, evaluations.csv beside them is of evaluate.py. studies/NAME/VARIANT/seedN.* are comparisons of settings,
explained in NAME/study.json. Sentences are in results/notes.md. scores.py computes, plot.py draws.
"""

import csv
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import plot, scores
from benchmarks.scores import DATA, MAIN, MEASURES, RESULTS, ROOT, TASKS, Cell, Run, board_label, label, paper_at
from benchmarks.suites import HELD_OUT
from data_tools.files import write_atomically

COMPARED = ("skimo", "skimo_no_joint", "skimo_no_cem", "skimo_sac", "skimo_single_step", "spirl", "dreamer_skills")
# Sentences of the pages: name of the section -> text
_, *parts = re.split(r"<!-- (.+) -->\n", (RESULTS / "notes.md").read_text())
NOTES = {name: text.strip("\n") for name, text in zip(parts[::2], parts[1::2])}
ALL = ("maze", "kitchen", "kitchen-misaligned", "calvin")
FAR = ("kitchen-6", "maze-far")


@dataclass(frozen=True)
class Claim:
    """What the paper says of two methods: the first is better."""

    text: str
    first: str
    second: str
    verdict: str
    tasks: tuple[str, ...] = ALL


CLAIMS = (
    Claim("a model pays: SkiMo > no model (SAC)", "skimo", "skimo_sac", "by speed; without noise only on CALVIN"),
    Claim(
        "planning pays: SkiMo > no planner", "skimo", "skimo_no_cem", "in training; without noise on CALVIN", ALL[1:]
    ),
    Claim("but the maze is faster without", "skimo_no_cem", "skimo", "open; the release's planner is slower", ALL[:1]),
    Claim("joint training pays", "skimo", "skimo_no_joint", "in the maze, partly by its prior", (ALL[0], *ALL[2:])),
    Claim("but not in the Kitchen", "skimo_no_joint", "skimo", "not shown: no difference", ALL[1:2]),
    Claim("a skill-level model > a single-step one", "skimo", "skimo_single_step", "likely; single-step learns too"),
    Claim("SkiMo > SPiRL", "skimo", "spirl", "faster on half; without noise mostly behind"),
    Claim("naive combinations fail: > SPiRL + Dreamer", "skimo", "dreamer_skills", "yes: far behind, zero in the maze"),
    Claim("without skills nothing is learned: > Dreamer", "skimo", "dreamer", "yes, but ours were smaller"),
    Claim("the same: > TD-MPC", "skimo", "tdmpc", "yes, but ours were smaller"),
    Claim("longer plans pay: two held-out boards", "longer", "shorter", "not shown; slower in the far maze", FAR),
)
# SkiMo with plans of ten skills and of one on a board, of five and of one or two on the other -> logs
PLANS = {
    ("kitchen-6", "longer"): "held-out/kitchen-6/skimo",
    ("kitchen-6", "shorter"): "studies/kitchen6_plans/one_skill",
    ("maze-far", "longer"): "studies/mazefar_plans/five_skills",
    ("maze-far", "shorter"): "held-out/maze-far/skimo",
}
# One setting of one method: what is changed, study/variant with the other value
SETTINGS = (
    ("inputs of SAC's critics: raw → with sines of positions", "maze_tau/skimo_sac_raw_inputs"),
    ("tau .01 → .05", "maze_tau/skimo_sac_tau0.01"),
    ("tau .01 → .05", "maze_tau/skimo_tau0.01"),
    ("tau .005 → .05", "slow_copies/maze_spirl_tau0.005"),
    ("alpha .5 → .05", "kitchen_sac_alpha/alpha0.5"),
    ("alpha .5, imagined states → .05, encoded; another model", "kitchen_policy_loss/alpha0.5_imagined"),
    ("four times the updates", "calvin_updates/skimo_0.08"),
    ("alpha from 1, warm-up 50,000 → .05, 5,000", "spirl_alpha/kitchen_from_1"),
    ("people's data: KL weight 5e-4 → 1e-3", "kitchen_human_kl/kitchen_spirl_5e-4"),
    ("people's data: KL weight 5e-4 → 1e-3", "kitchen_human_kl/misaligned_spirl_5e-4"),
    ("10% of scripted data: as recorded → shifted arms, recombined objects", "kitchen60_settings/skimo_aids"),
)

# What the orderings compare: name, our measure, the paper's at an env step
ORDERINGS = (
    ("speed", "speed", scores.paper_speed),
    ("level, paper at the same step", "level", paper_at),
    ("level, paper at its end", "level", scores.paper_final),
    ("without noise, paper at its end", "without noise", scores.paper_final),
)
# Methods without offline data: updates per env step by default and as published (0: none, Option-Critic's are per
# roll-out), hidden width as published (LSP's is Dreamer's), and the control with the sizes and rates of the runs
WITHOUT_DATA = {
    "sac": (0.5, 1.0, 256, "controls_reported/sac_seed1"),
    "tdmpc": (1.0, 1.0, 512, "controls_reported/tdmpc_seed1"),
    "dreamer": (0.2, 0.2, 400, "controls_reported/dreamer_seed1"),
    "lsp": (0.2, 0.2, 400, "controls_reported/lsp_seed1"),
    "dads": (0.016, 0.016, 512, "dads/hall_seed1"),
    "diayn": (0.5, 1.0, 300, "controls_reported/diayn_seed1"),
    "hiro": (0.25, 1.0, 300, "controls_reported/hiro_seed1"),
    "option_critic": (0, 0, 0, "controls_reported/option_critic_seed1"),
}
# What acts in RL, without and with the demonstrations -> logs of the tasks
RIVALS = {
    "skills: SPiRL": [f"{task}/spirl/scripted" for task in ALL],
    "skills: SUPE [without demonstrations](results/studies/supe_demonstrations)": [
        "studies/supe_demonstrations/maze_without",
        "studies/supe_demonstrations/kitchen_without",
        "studies/supe_demonstrations/misaligned_without",
    ],
    "the same, demonstrations kept: SUPE": [f"{task}/supe/scripted" for task in ALL],
    "chunks: Q-chunking": [
        "maze/qc/scripted",
        "studies/kitchen_qc_demonstrations/kitchen_none_4",
        "studies/kitchen_qc_demonstrations/misaligned_none_4",
    ],
    "the same, demonstrations kept": [None, *(f"{task}/qc/scripted" for task in ALL[1:])],
    "the same, kitchens best of [32](results/studies/qc_samples), not 4": [
        None,
        "studies/qc_samples/kitchen_32",
        "studies/qc_samples/misaligned_32",
    ],
    "skills, planned: SkiMo": [f"{task}/skimo/scripted" for task in ALL],
}
# Machines of the speed tables: log of speed.py, and the task whose sizes count
TIMED = {"CPU": ("speed/all_files_xeon.json", "maze"), "H100": ("gpu/speed_graphs.json", "kitchen")}
# What a control's JSON tells
CONTROLS = {
    "last_20_return": "pendulum {:.0f}, asked -250",
    "last_success": "open maze, success {:.2f}, asked .80",
    "accuracy": "box, {:.0%} of states told apart, asked 90%",
    "reached": "hall, {:.0%} of goals reached, asked 80%",
}


@dataclass
class Args:
    paths: Annotated[tuple[Path, ...], tyro.conf.Positional] = (RESULTS,)  # folder of logs, or run folders


# ---------------------------------------------------------------------------------------------------------- markdown
def number(value: float) -> str:
    """A score: two digits, without the zero before the point."""
    return "–" if np.isnan(value) else re.sub(r"^(-?)0\.", r"\1.", f"{value:z.2f}")


def signed(value: float) -> str:
    return ("+" if round(value, 2) > 0 else "") + number(value)


def change(before: float, after: float) -> str:
    return f"{number(before)} → {number(after)}, {signed(after - before)}"


def mean_and_seeds(values) -> str:
    mean = number(np.mean(values))
    if mean == "–":
        return mean
    return f"**{mean}**" + (f" ({' '.join(map(number, values))})" if len(values) > 1 else "")


def table(rows: list[dict]) -> str:
    """Rows, column -> value, as Markdown."""
    lines = [" | ".join(str(cell).replace("|", "\\|") for cell in line) for line in (rows[0], *map(dict.values, rows))]
    lines = [f"| {line} |" for line in lines]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]) + "\n"


def filled(page: str, name: str, text: str) -> str:
    """The page with the text between its markers <!-- NAME --> and <!-- /... -->; as it is without them."""
    between = rf"(?s)(?<=<!-- {name} -->\n).*?(?=<!-- /{name.split()[0]} -->)"
    return re.sub(between, lambda _: text, page)


def thousands(steps: int) -> str:
    return f"{steps // 1000}k"


# ------------------------------------------------------------------------------------------------------------- boards
def three(cells, task: str, method: str, data: str) -> list[str]:
    """The means of the three measures; * where every seed, of two or more, is above each of SkiMo's, ° where below."""
    found = []
    end = scores.common_end(cells, task, data, method, "skimo")
    for measure in MEASURES:
        text = number(scores.measured(cells, task, method, data, measure).mean())
        values, skimo = (scores.measured(cells, task, name, data, measure, end) for name in (method, "skimo"))
        if min(len(values), len(skimo)) > 1 and not np.isnan([*values, *skimo]).any():
            text += {">": "\\*", "<": "°"}.get(scores.relation(values, skimo, 0.0), "")
        found.append(text)
    return found


def smaller(method: str, runs) -> bool:
    """Whether runs without offline data had narrower networks than the authors'."""
    width = WITHOUT_DATA[method][2] if method in WITHOUT_DATA else 0
    return width > 0 and min(run.facts["args"]["hidden_dim"] for run in runs) < width


def board_row(cells, task: str, method: str, data: str) -> dict[str, str]:
    end = scores.cell_end(cells, task, method, data)
    runs = cells[task, method, data].reaching(end)
    row = {"method": label(method) + "³" * smaller(method, runs), "seeds": len(runs), "env steps": thousands(end)}
    for measure in MEASURES:
        row[measure] = mean_and_seeds(scores.measured(cells, task, method, data, measure))
    paper = np.nan if scores.SHARE in data else paper_at(task, method, end)
    row["paper, same step"] = number(paper) + "²" * (method == "spirl" and not np.isnan(paper))
    priors = [value for value in map(scores.prior_alone, runs) if not np.isnan(value)]
    row["prior alone"] = number(np.mean(priors)) if priors else "–"
    minutes = [value for value in (scores.minutes_at(run, end) for run in runs) if not np.isnan(value)]
    row["minutes"] = f"{np.mean(minutes):.0f}" if minutes else "–"
    return row


def lead_row(cells, task: str, method: str, data: str) -> dict[str, str]:
    """Steps to three quarters of the task, and SkiMo's lead in each measure with its interval."""
    cell = cells[task, method, data]
    end = scores.cell_end(cells, task, method, data)
    row = {"method": label(method)}
    common = scores.common_end(cells, task, data, method, "skimo")
    steps = sorted(scores.steps_to(run, 0.75) for run in cell.reaching(end))
    known = TASKS[task].best == 1  # or there is no highest return
    steps = ["–" if not known else "never" if step > end else f"{step / 1000:.0f}" for step in steps]
    row["thousand env steps to .75"] = steps[0] if steps[0] == steps[-1] else f"{steps[0]} to {steps[-1]}"
    for name, measure in MEASURES.items():
        runs = cells[task, "skimo", data].reaching(common), cell.reaching(common)
        middle, low, high, paired = scores.lead(*runs, measure, common)
        row[f"SkiMo's lead: {name}"] = "–" if method == "skimo" else signed(middle)
        if not np.isnan(low) and method != "skimo":
            row[f"SkiMo's lead: {name}"] += f" [{signed(low)}, {signed(high)}]" + " p" * paired
    return row


def board_section(cells, task: str, data: str, ours: bool) -> str:
    """Results of a task with one kind of data. Of our own logs only the main methods are compared with SkiMo."""
    here = scores.board(cells, task, data)
    rows = [board_row(cells, task, name, data) for name in here]
    filled_in = [name for name in rows[0] if any(row[name] != "–" for row in rows)]
    text = f"## {board_label(task, data)}\n" + table([{name: row[name] for name in filled_in} for row in rows])
    if "skimo" in here and len(here) > 1:
        text += "\n" + table([lead_row(cells, task, name, data) for name in here if name in COMPARED or not ours])
    return text + "\n"


# ------------------------------------------------------------------------------------------------------------- claims
def outcomes(cells, claim: Claim, measure: str) -> tuple[list[str], list[tuple]]:
    """What scores.relation says on each board of a claim ("ahead", "behind" for "?"), and the values of the two."""
    found, pairs = [], []
    for task, data in scores.boards(cells):
        names = claim.first, claim.second
        end = scores.common_end(cells, task, data, *names)
        values = [scores.measured(cells, task, name, data, measure, end) for name in names]
        if task in claim.tasks and all(map(len, values)) and not np.isnan(np.concatenate(values)).any():
            stands = scores.relation(*values, TASKS[task].margin)
            stands = "?" if stands != "=" and min(map(len, values)) < 2 else stands  # one seed is not all seeds
            found.append(stands if stands != "?" else "ahead" if values[0].mean() > values[1].mean() else "behind")
            pairs.append(values)
    return found, pairs


def counts(found: list[str]) -> tuple[int, int, int]:
    """Boards on which a claim holds, is tied, is reversed."""
    return tuple(sum(found.count(stands) for stands in ways) for ways in ((">", "ahead"), "=", ("<", "behind")))


def verdicts(cells, claim: Claim, measure: str) -> str:
    """On how many boards a claim holds (with all seeds apart), is tied or reversed; how probably a run is better."""
    found, pairs = outcomes(cells, claim, measure)
    holds, tied, reversed_ = counts(found)
    apart = {stands: f" ({found.count(stands)} apart)" * (stands in found) for stands in "<>"}
    words = [f"{holds} of {len(found)}{apart['>']}"]
    words += [f"{tied} tied"] if tied else []
    words += [f"{reversed_} reversed{apart['<']}"] if reversed_ else []
    better, low, high = map(number, scores.improvement(pairs))
    return f"{', '.join(words)}<br>*P* {better} [{low}, {high}]"


def claims_overview(cells) -> str:
    """README's: what the paper says of SkiMo beside the methods compared there."""
    rows = []
    for claim in CLAIMS:
        if claim.first == "skimo" and claim.second in COMPARED:
            row = {"[claims](benchmarks/RESULTS.md#what-the-paper-claims),<br>boards: holds/tied/reversed": claim.text}
            for measure in MEASURES:
                row[measure] = "/".join(map(str, counts(outcomes(cells, claim, measure)[0])))
            rows.append(row | {"verdict": claim.verdict})
    return table(rows)


def claims_table(cells) -> str:
    cells = cells | {(*place, "scripted"): read_variant(RESULTS / folder) for place, folder in PLANS.items()}
    rows = []
    for claim in CLAIMS:
        row = {"claim": claim.text} | {measure: verdicts(cells, claim, measure) for measure in MEASURES}
        rows.append(row | {"verdict": claim.verdict})
    return table(rows)


def orderings_table(cells) -> str:
    rows = []
    for data in DATA:
        for name, measure, paper in ORDERINGS:
            found = scores.agreement(cells, measure, data, paper)
            row = {"data": DATA[data], "measure": name, "pairs": found["pairs"], "as in the paper": found["hold"]}
            rows.append(row | {"by chance": f"{found['chance']:.1f}", "p": f"{found['p']:.3f}".lstrip("0")})
    return table(rows)


def settings_table(cells) -> str:
    """What one setting changes in the level of one method; the last row: what the choice of method does."""
    rows = []
    for text, variant in SETTINGS:
        cell, other, end = effect(RESULTS / "studies" / variant)
        if variant.endswith(("skimo_0.08", "skimo_aids")):  # the other way round: the cell has the old setting
            cell, other = other, cell
        study = variant.split("/")[0]
        row = {"setting": text, "method, task": f"{label(cell[0].method)}, {TASKS[cell[0].task].label}"}
        row["to"] = thousands(end)
        before, after = scores.mean_scores(other, end), scores.mean_scores(cell, end)
        row |= {measure: change(before[measure], after[measure]) for measure in ("speed", "level")}
        rows.append(row | {"seeds": f"{len(other)}, {len(cell)}", "study": f"[{study}](results/studies/{study})"})
    for task, data in scores.boards(cells):
        row = {"setting": "*worst to best of the five methods*", "method, task": board_label(task, data)}
        row["to"] = thousands(scores.board_end(cells, task, data))
        for measure in ("speed", "level"):
            means = [scores.measured(cells, task, name, data, measure).mean() for name in MAIN]
            row[measure] = change(min(means), max(means))
        rows.append(row | {"seeds": "", "study": ""})
    return table(rows)


# ------------------------------------------------------------------------------------------------------------ studies
def effect(variant: Path) -> tuple[list[Run], list[Run], int]:
    """The runs of the cell that a study's variant is compared with, if there is one, the variant's, and the env steps
    both have.
    """
    other = read_variant(variant)
    names = json.loads((variant.parent / "study.json").read_text()).get("compare", [])
    if isinstance(names, dict):  # by variant; else the first of the variant's task and method
        names = [names[variant.name]] if variant.name in names else []
    for name in names:
        cell = read_variant(variant.parents[1] / name) or read_variant(RESULTS / name)  # a variant, or TASK/METHOD/DATA
        if (cell[0].task, cell[0].method) == (other[0].task, other[0].method):
            end = min(cell.main_end, other.main_end)
            return cell.reaching(end), other.reaching(end), end
    return [], other, other.main_end


def read_variant(folder: Path) -> Cell:
    return Cell(scores.read_runs(folder))


def studies_text() -> str:
    """The page of all studies."""
    rows, variants = [], []
    for path in sorted((RESULTS / "studies").glob("*/study.json")):
        study, facts = path.parent, json.loads(path.read_text())
        link = f"[{study.name}]({study.name})"
        logs = Counter(log.parent for log in study.glob("*/seed*.json"))
        changes = {}  # of the level, by variant
        for variant in sorted(logs):
            cell, runs, end = effect(variant)
            found, others = scores.mean_scores(runs, end), scores.mean_scores(cell, end)
            row = {"study": link, "variant": variant.name}
            row |= {"method, task": f"{label(runs[0].method)}, {TASKS[runs[0].task].label}"}
            row |= {"seeds": len(runs), "env steps": thousands(end)}
            for measure, value in found.items():
                row[measure] = number(value) + (f" ({number(others[measure])})" if cell else "")
            variants.append(row)
            if not np.isnan(found["level"] - others["level"]):
                changes[variant.name] = found["level"] - others["level"]
        row = {"study": link, "question": facts["question"], "answer": facts["answer"]}
        largest = max(changes, key=lambda name: abs(changes[name]), default=None)
        row["effect on the level"] = f"{signed(changes[largest])}, {largest}" if largest else "–"
        seeds = sorted(logs.values())
        row["seeds"] = "–" if not seeds else f"{seeds[0]} to {seeds[-1]}" if seeds[0] < seeds[-1] else seeds[0]
        rows.append(row)
    return f"{NOTES['studies']}\n\n{table(rows)}\n## Variants\n{NOTES['variants']}\n\n{table(variants)}"


# ------------------------------------------------------------------------------------------------------ pages of tasks
def commits(run: Run) -> list[str]:
    """Short names of a run's commits (by hand: the JSON has one for all), with a + where files were changed since."""
    known = [start if start.get("commit") else run.facts for start in run.facts["attempts"]]
    return [(start.get("commit") or "no log")[:7] + "+" * bool(start.get("changed")) for start in known]


def bin_edges(last: int, width: int) -> list[int]:
    """Edges of bins up to an env step: eight of a width, then four times as wide while half of a bin was run."""
    edges = list(range(0, min(last, 8 * width), width))
    edges.append(edges[-1] + width)
    wide = range(8 * width, last - 2 * width + 1, 4 * width)
    return [*edges, *(low + 4 * width for low in wide)]


def task_text(cells, task: str) -> str:
    """Every run of a task: machine, commit, and means of training episodes along the way."""
    text = f"# Every run: {TASKS[task].label}\n{NOTES['runs']}\n"
    for data in [data for t, data in scores.boards(cells) if t == task]:
        runs = [run for cell in scores.board(cells, task, data).values() for run in cell]
        edges = bin_edges(max(run.end for run in runs), TASKS[task].last)
        facts, bins = [], []
        for run in runs:
            name = {"method": label(run.method), "seed": run.seed}
            row = name | {"env steps": f"{run.env_steps:,}", "minutes": f"{scores.minutes_at(run, run.end):.0f}"}
            evaluations = [f"{step // 1000}: {number(value)}" for step, value in run.evaluations]
            row["evaluations, thousand env steps: score"] = ", ".join(evaluations)
            row["machine"] = run.machine
            facts.append(row | {"commit": ", ".join(dict.fromkeys(commits(run)))})
            bins.append(name)
            for low, high in zip(edges, edges[1:]):
                mean = scores.mean_between(run, low, high)
                there = run.end >= (low + high) / 2 and not np.isnan(mean)  # half of a bin, or more, was run
                bins[-1][f"{low // 1000}-{high // 1000}k"] = number(mean) if there else ""
        text += f"\n## With {DATA.get(data, data)}\n{table(facts)}\n{NOTES['bins']}\n\n{table(bins)}"
    return text + planner_text(RESULTS / task / "evaluations.csv")


# -------------------------------------------------------------------------------------------------------- other pages
CORNER = "speed/level/without noise,<br>to env steps"  # of boards_table


def boards_table(cells, names, docs: str, boards=()) -> list[dict]:
    """Speed / level / without noise of some methods on some boards or all, each with a link into the folder docs."""
    rows = []
    for name in names:
        row = {CORNER: f"[{label(name)}]({docs}/{name}.md)"}
        for task, data in boards or scores.boards(cells):
            board_steps = scores.board_end(cells, task, data)
            scored = "–"
            if (task, name, data) in cells:
                end = scores.cell_end(cells, task, name, data)
                runs = cells[task, name, data].reaching(end)
                scored = f"{'/'.join(three(cells, task, name, data))} ({len(runs)})"
                scored += f" to {thousands(end)}" * (end < board_steps) + "³" * smaller(name, runs)
            row[f"{board_label(task, data).replace(', ', '<br>')}<br>{thousands(board_steps)}"] = scored
        rows.append(row)
    return rows


def planner_text(path: Path) -> str:
    """Without noise, planner / mode of the task policy along the way: mean of seeds, from evaluate.py's CSV, if any."""
    if not path.exists():
        return ""
    found = {}
    for row in csv.DictReader(path.open()):
        board, algo, name = row["checkpoint"].split("/")
        step = int(row["env_step"]) // 5_000 * 5_000
        task = HELD_OUT[board].env_id if board in HELD_OUT else board
        score = float(row["episodic_return"]) / TASKS[task].max_return
        seed = name.removesuffix(".pt").split("_")[0]  # the last checkpoint may be one of the early ones
        found.setdefault((board, algo, step, row["acts_by"]), {})[seed] = score
    rows = []
    for board, algo in dict.fromkeys((board, algo) for board, algo, _, way in found if way == "plan"):
        row = {"board": board, "method": label(algo)}
        for step in sorted({step for _, _, step, _ in found}):
            ways = [found.get((board, algo, step, way)) for way in ("plan", "mode")]
            row[thousands(step)] = " / ".join(number(np.mean([*seeds.values()])) for seeds in ways if seeds) or "–"
        rows.append(row)
    return f"\n{NOTES['planner or policy']}\n\n{table(rows)}"


def held_out_text(held) -> str:
    """The page beside the held-out logs."""
    boards = "".join(board_section(held, task, data, ours=True) for task, data in scores.boards(held))
    planner = planner_text(RESULTS / "held-out" / "evaluations.csv")
    return f"{NOTES['held-out runs']}\n\n{boards.rstrip()}\n{planner}"


def method_text(cells, name: str) -> str:
    """The table of a method's page: beside SkiMo, and the paper's level at the same env steps."""
    ran = [(task, data) for task, method, data in cells if method == name]
    if ran:
        rows = boards_table(cells, dict.fromkeys((name, "skimo")), ".", ran)
        paper = [paper_at(task, name, scores.cell_end(cells, task, name, data)) for task, data in ran]
        if not np.isnan(paper).all():
            rows.append(dict(zip(rows[0], ["the paper's level", *map(number, paper)])))
        notes = [NOTES["under a method"], *[NOTES["warm-up"]] * (name == "spirl")]
        notes[0] += f" {NOTES['smaller']}" * ("³" in str(rows))
        return table(rows) + "\n".join(notes) + "\n"
    logs = sorted((RESULTS / "studies").glob("*/*/seed*.json"))
    studies = dict.fromkeys(path.parts[-3] for path in logs if json.loads(path.read_text())["algo"] == name)
    links = [f"[{study}](../../benchmarks/results/studies/{study})" for study in studies]
    found = f"; studies: {', '.join(links)}" if links else ""
    return f"No run of its own yet{found}\n"


def control_words(log: Path) -> str:
    """What a control came to, linked with its folder."""
    facts = json.loads(log.read_text())
    words = next(text.format(facts[name]) for name, text in CONTROLS.items() if name in facts)
    verdict = "passed" if facts["passed"] else "**not a fair test**"
    steps = facts["args"]["total_timesteps"] // 1000
    return f"{verdict}: [{words}](results/studies/{log.parent.name}), {steps}k env steps"


def timed(machine: str) -> dict[str, dict[str, float]]:
    """By file the ms of its updates and of choosing for eight environments, on a GPU as CUDA graphs where there are."""
    path, size = TIMED[machine]
    rows = json.loads((RESULTS / "studies" / path).read_text())["rows"]
    found = {}
    for row in sorted(rows, key=lambda row: (row["mode"] == "graphs", "act" not in row["name"])):  # the last counts
        part = "choice" if row["name"].endswith(", 8 envs") else row["name"]
        if row["size"] == size:
            found.setdefault(row["algo"], {})[part] = row["ms"]
    return found


def speed_table() -> str:
    """Milliseconds of all files; an empty field where there is nothing to time, or it was not."""
    columns = [("CPU", "pre-training update")]
    columns += [(machine, part) for machine in TIMED for part in ("RL update", "choice")]
    times = {machine: timed(machine) for machine in TIMED}
    rows = []
    for name in [name for name in scores.METHODS if name in times["CPU"]]:
        row = {"file": f"`{name}`"}
        for machine, part in columns:
            ms = times[machine].get(name, {}).get(part, np.nan)
            row[f"{machine}: {part}"] = "" if np.isnan(ms) else f"{ms:,.0f}" if ms >= 10 else f"{ms:.1f}"
        rows.append(row)
    return table(rows)


def hours(method: str, rate: float, machine: str) -> str:
    """Of updates and choices in 300,000 env steps of eight environments, at the file's default sizes."""
    ms = timed(machine)[method]
    return f"{300_000 * (rate * ms['RL update'] + ms['choice'] / 8) / 3.6e6:.2g}"


def without_data_table() -> str:
    """Of methods without offline data: how much their runs learnt, whether that suffices for a small task, and what
    the published settings would cost.
    """
    rows = []
    for method, (default, published, width, control) in WITHOUT_DATA.items():
        logs = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"*/{method}/none/seed*.json"))]
        (used,) = {log["args"]["hidden_dim"] for log in logs}
        done = np.mean([log["results"]["updates"] / log["results"]["env_steps"] for log in logs])
        rates = [f"{rate:.2g}".removeprefix("0") for rate in (done, default, published)]
        row = {"method": label(method), "updates per env step": rates[0]}
        row |= {"by default, published": ", ".join(rates[1:]) if default else "the same"}
        row |= {"width, published": f"{used}, {width or '–'}"}
        row |= {"control at these settings": control_words(RESULTS / "studies" / f"{control}.json")}
        known = method != "dads"  # whose default sizes are not the published ones
        row["hours, CPU"] = hours(method, published or done, "CPU") if known else "–"
        row["H100"] = hours(method, published or done, "H100") if known else "–"
        rows.append(row)
    return table(rows)


def rivals_table() -> str:
    """Skills or chunks, demonstrations thrown away or kept: the three measures to the env steps that all have."""
    rows = [{"speed/level/without noise (seeds)": text} for text in RIVALS]
    for task, folders in zip(ALL, zip_longest(*RIVALS.values())):
        cells = [read_variant(RESULTS / folder) if folder else Cell() for folder in folders]
        end = min(cell.main_end for cell in cells if cell)
        for row, cell in zip(rows, cells):
            runs = cell.reaching(end)
            means = "/".join(map(number, scores.mean_scores(runs, end).values()))
            row[f"{TASKS[task].label}, {thousands(end)}"] = f"{means} ({len(runs)})" if runs else "–"
    return table(rows)


def coverage_text(cells) -> str:
    """How much of the paper's figures there is here, and the levels of the main methods where its curves end."""
    text = ""
    for data in DATA:
        found = scores.coverage(cells, data)
        text += f"With {DATA[data]} {found['begun']} of {len(scores.PAPER)} curves are begun, {found['ended']} run to "
        text += f"their end by a seed, {found['done'] / found['whole']:.0%} of its seeds x env steps done.\n"
    rows = []
    for name in MAIN:
        row = {"level (the paper's) at its end, one seed": label(name)}
        for task in ALL:
            end = scores.PAPER[task, name][-1, 0]
            runs = cells.get((task, name, "scripted"), Cell()).reaching(end)
            levels = scores.mean_scores(runs, end)["level"], scores.paper_final(task, name)
            row[TASKS[task].label] = f"{number(levels[0])} ({number(levels[1])})" if runs else "–"
        rows += [row] if set(row.values()) != {label(name), "–"} else []
    return f"{text}\n{table(rows)}"


def results_text(cells, held=None) -> str:
    """RESULTS.md with the held-out cells; of a user's logs (None) the boards alone."""
    boards = "".join(board_section(cells, *board, ours=held is not None) for board in scores.boards(cells))
    if held is None:
        return f"{NOTES['other results']}\n\n{boards}".strip() + "\n"
    parts = [NOTES["introduction"], NOTES["claims"], claims_table(cells), NOTES["orderings"], orderings_table(cells)]
    parts += [NOTES["held-out"], table(boards_table(held, (*MAIN, "supe", "qc"), "../algos/docs"))]
    parts += [NOTES["settings"], settings_table(cells), f"{NOTES['coverage']}\n{coverage_text(cells)}"]
    parts += [NOTES["without data"], without_data_table(), NOTES["boards"], boards]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def pages(cells, held) -> dict[Path, str]:
    """All pages that are made, or in part made, from the published logs; held: of the held-out suite."""
    made = {RESULTS.parent / "RESULTS.md": results_text(cells, held)}
    made[RESULTS / "held-out" / "README.md"] = held_out_text(held)
    made[RESULTS / "studies" / "README.md"] = studies_text()
    made |= {RESULTS / task / "README.md": task_text(cells, task) for task in ALL}
    overview = table(boards_table(cells, MAIN, "algos/docs"))
    findings = RESULTS.parent / "FINDINGS.md"
    made[findings] = filled(findings.read_text(), "rivals", rivals_table())
    speed = RESULTS.parent / "SPEED.md"
    made[speed] = filled(speed.read_text(), "updates", speed_table())
    readme = filled((ROOT / "README.md").read_text(), "results", overview)
    made[ROOT / "README.md"] = filled(readme, "claims", claims_overview(cells))
    for path in sorted((ROOT / "algos" / "docs").glob("*.md")):
        made[path] = filled(path.read_text(), f"result {path.stem}", method_text(cells, path.stem))
    return made


# --------------------------------------------------------------------------------------------------------------- main
def run_rows(run: Run, published) -> list[dict[str, str]]:
    """A user's run, and at its env steps the published SkiMo and the paper's curves of its task."""
    end = run.end
    found = {f"this run: {label(run.method)}, seed {run.seed}": scores.mean_scores([run], end)}
    task, data = scores.published_board(run)
    for name in dict.fromkeys(("skimo", run.method)):
        runs = published.get((task, name, data), Cell()).reaching(end)
        if runs:
            part = "" if data == run.data else ", 187 of the 603 episodes"
            found[f"published {label(name)}, {len(runs)} seeds{part}"] = scores.mean_scores(runs, end)
        if scores.SHARE not in data and not np.isnan(paper_at(task, name, end)):
            values = scores.paper_speed(task, name, end), paper_at(task, name, end), np.nan
            found[f"the paper's {label(name)}"] = dict(zip(MEASURES, values))
    steps = {"env steps": f"{end:,}"}
    return [{"": who, **steps, **{name: number(values[name]) for name in values}} for who, values in found.items()]


def write(path: Path, text: str):
    write_atomically(path, lambda part: part.write_text(text))
    print(f"wrote {path}")


def main(args: Args):
    """Write pages and figures, or compare runs with what is published."""
    first = args.paths[0]
    if all((path / "args.json").exists() for path in args.paths):
        runs = scores.read_runs(*args.paths)
        published = scores.read_cells(RESULTS) | scores.read_cells(RESULTS / "held-out")
        for run in runs:
            print(table(run_rows(run, published)))
            if not len(scores.curve(run, run.end)[0]):
                latest = f"{int(run.steps.min()):,}"  # episodes beside each other: placed where the longest would end
                print(f"no score before env step {latest}: an episode counts where it would end at the latest")
        plot.save(plot.beside_published(runs, published), first / "curves.png")
        return
    if len(args.paths) > 1:
        sys.exit("error: several folders are compared only if each is a run folder, with an args.json")
    cells = scores.read_cells(first)
    if not cells:
        sys.exit(f"error: no logs in {first}; it should hold TASK/METHOD/seedN.json or a run's args.json")
    ours = first.resolve() == RESULTS
    if ours:
        held = scores.read_cells(RESULTS / "held-out")
        plot.save(plot.overview(held, ours), RESULTS / "held-out" / "curves.png")
        for path, text in pages(cells, held).items():
            write(path, text)
    else:
        write(first / "RESULTS.md", results_text(cells))
    plot.save(plot.overview(cells, ours), first / "curves.png")
    for task in dict.fromkeys(task for task, _ in scores.boards(cells)):
        if (first / task).is_dir():
            plot.save(plot.enlarged(cells, task), first / task / "curves.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__.split("\n")[0]))
