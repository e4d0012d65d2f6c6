"""benchmarks/report.py: scores against independent versions, and what is published against the logs and the audit."""

import csv
import json
import shutil
from unittest import mock

import numpy as np
import pytest
import torch

import data_tools
from benchmarks import report, scores, suites

HEADER = "env_step,episodic_return,episodic_length,eval_return,eval_success,wall_seconds"
HEADER_OF_RUNS = "env_step,episodic_return,episodic_length,rl_minutes"


def make_run(steps, values, method="skimo", task="kitchen", num_envs=1):
    """A run whose episodes are placed at the given env steps."""
    steps, values = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    facts = dict(args=dict(num_envs=num_envs, eval_episodes=20))
    return scores.Run(task, method, "scripted", 1, steps, values, steps, steps, [], int(steps[-1]), facts)


def write_log(folder, method, seed, value, task="maze", data="scripted", steps=300_000, clean=None, length=1000):
    """A log as benchmarks/run.py writes it: one environment, all episodes alike. Returns its JSON."""
    log = folder / task / method / data / f"seed{seed}.json"
    log.parent.mkdir(parents=True, exist_ok=True)
    unit = scores.TASKS[task].max_return
    rows = [f"{step},{value * unit},{length},,,{step / 100}" for step in range(length, steps + 1, length)]
    log.with_suffix(".csv").write_text("\n".join([HEADER, *rows]) + "\n")
    evaluations = [[steps, unit * (value if clean is None else clean), 0.0]]
    results = dict(env_steps=steps, rl_minutes=steps / 6000, evaluations=evaluations)
    facts = dict(algo=method, env_id=task, seed=seed, commit="abcdef0123", machine="AMD EPYC, 2 cores")
    facts |= dict(args=dict(num_envs=1, eval_episodes=20), results=results)
    log.write_text(json.dumps(facts))
    return log


# ------------------------------------------------------------------------------------------------------------- scores
def lockstep_episodes(rng, num_envs, budget, success, longest):
    """Episodes of an unchanging policy, simulated step by step: env step at the end, success, length."""
    left = np.zeros(num_envs, dtype=int)
    wins = np.zeros(num_envs, dtype=bool)
    lengths = np.zeros(num_envs, dtype=int)
    rows = []
    for env_step in range(0, budget, 10 * num_envs):  # a skill in every environment
        for e in range(num_envs):
            if left[e] == 0:
                if lengths[e]:
                    rows.append((env_step, float(wins[e]), lengths[e]))
                wins[e] = rng.random() < success
                lengths[e] = 10 * rng.integers(60, 120) if wins[e] else longest
                left[e] = lengths[e]
            left[e] -= 10
    return np.array(rows)


@pytest.mark.parametrize("num_envs", [1, 8])
def test_an_unchanging_policy_gives_a_flat_curve(num_envs):
    rng = np.random.default_rng(0)
    placed = []
    as_they_end = []
    for _ in range(150):
        ends, wins, lengths = lockstep_episodes(rng, num_envs, 110_000, 0.5, 2_000).T
        steps = scores.place(ends, lengths, num_envs, 2_000)
        for curves, where in ((placed, steps), (as_they_end, ends)):
            order = np.argsort(where, kind="stable")
            curves.append(scores.curve(make_run(where[order], wins[order], task="maze"), 100_000)[1])
    assert np.abs(np.mean(placed, axis=0) - 0.5).max() < 0.06
    if num_envs == 8:  # the reason for all this
        assert np.mean(as_they_end, axis=0)[0] > 0.57


def test_episodes_are_placed_where_the_longest_would_have_ended():
    ends = np.array([8_000.0, 16_000, 24_000])
    lengths = np.array([1_000.0, 2_000, 1_000])
    assert scores.place(ends, lengths, 8, 2_000).tolist() == [16_000, 16_000, 32_000]
    assert scores.place(np.array([2_000.0]), np.array([2_000.0]), 1, 2_000).tolist() == [2_000]


def test_the_curve_is_the_mean_of_bins_with_their_upper_edge_and_speed_its_area():
    rng = np.random.default_rng(2)
    steps = np.sort(rng.choice(np.arange(1, 60_000), 400, replace=False))
    steps[steps // 10_000 == 2] -= 10_000  # an empty bin
    steps = np.sort(np.append(steps, 40_000))
    values = rng.random(len(steps))
    middles, means = scores.curve(make_run(steps, values), 50_000)
    expected = [
        values[(steps > low) & (steps <= low + 10_000)].mean() if low != 20_000 else np.nan for low in middles - 5_000
    ]
    expected[2] = (expected[1] + expected[3]) / 2
    assert np.allclose(means, expected)
    assert scores.speed(make_run(steps, values), 50_000) == pytest.approx(np.mean(expected))
    assert np.isnan(scores.speed(make_run([9_000], [1.0]), 5_000))
    assert scores.curve(make_run(steps, values), 54_000)[0].tolist() == [5_400, 16_200, 27_000, 37_800, 48_600]
    middles, means = scores.curve(make_run(range(2_000, 16_001, 2_000), range(8)), 16_000)  # a short run: eight bins
    assert means.tolist() == list(range(8)) and middles.tolist() == list(range(1_000, 16_000, 2_000))


def test_means_between_env_steps():
    run = make_run([10, 20, 30, 40], [1.0, 2, 3, 5])
    assert scores.mean_between(run, 10, 30) == 2.5  # without its lower edge, with its upper one
    assert np.isnan(scores.mean_between(run, 40, 50))


def test_steps_to_a_share_of_the_task():
    run = make_run(np.arange(1_000, 101_000, 1_000), np.repeat([0.0, 1.0], 50))
    assert scores.steps_to(run, 0.75) == 80_000  # 30 of the last 40 episodes
    assert scores.steps_to(make_run([1_000], [1.0]), 0.75) == np.inf


def test_the_main_end_is_where_more_than_half_of_the_seeds_got():
    runs = [make_run([steps], [1]) for steps in (60_055, 200_080, 199_990)]
    cell = scores.Cell(runs)
    assert cell.main_end == 200_000
    assert cell.reaching(200_000) == runs[1:]
    cell.append(make_run([2_000_050], [1]))  # one seed to the paper's end
    assert cell.main_end == 200_000
    assert len(cell.reaching(60_000)) == 4
    cell.append(make_run([60_000], [1]))
    cell.append(make_run([60_000], [1]))  # half of the six got to 200,000
    assert cell.main_end == 60_000


# -------------------------------------------------------------------------------------------------------- comparisons
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([3.0, 3.2], [2.0, 2.9], ">"),
        ([2.0, 2.9], [3.0, 3.2], "<"),
        ([3.0, 3.2], [2.0, 3.1], "?"),  # seeds overlap
        ([3.0, 3.2], [3.05, 3.1], "="),
        ([0.0], [0.1], "="),
    ],
)
def test_relations(first, second, expected):
    assert scores.relation(first, second, 0.1) == expected


def with_models(values, models):
    runs = [make_run(np.arange(1_000, 51_000, 1_000), np.full(50, value)) for value in values]
    for run, model in zip(runs, models):
        run.facts["results"] = dict(pretraining=dict(valid_kl_loss=model))
    return runs


def test_seeds_are_paired_where_each_has_a_model_of_its_own():
    first, second = [0.5, 0.7, 0.9], [0.4, 0.6, 0.8]

    def lead(*cells):
        return scores.lead(*(with_models(*cell) for cell in cells), scores.level, 50_000)

    middle, low, high, paired = lead((first, (1, 2, 3)), (second, (1, 2, 3)))
    assert paired and np.allclose([middle, low, high], 0.1)
    middle, low, high, paired = lead((first, (1, 1, 1)), (second, (1, 1, 1)))
    assert not paired and middle == pytest.approx(0.1) and low < -0.1 and high > 0.3
    middle, low, _, paired = lead(([0.5], (2,)), (second, (1, 2, 3)))
    assert paired and middle == pytest.approx(-0.1) and np.isnan(low)  # the only model that both have


def test_cells_are_compared_at_the_env_steps_that_both_have(tmp_path):
    """SkiMo's episodes are lost until 200,000 env steps, then won; SPiRL ended there, with half of them won."""
    for seed in (1, 2):
        write_log(tmp_path, "spirl", seed, 0.5, steps=200_000)
        write_log(tmp_path, "skimo_sac", seed, 1.0)
        path = write_log(tmp_path, "skimo", seed, 1.0).with_suffix(".csv")
        header, *rows = path.read_text().splitlines()
        rows[:200] = [row.replace(",100.0,", ",0.0,") for row in rows[:200]]
        path.write_text("\n".join([header, *rows]))
    cells = scores.read_cells(tmp_path)
    assert scores.board_end(cells, "maze", "scripted") == 300_000
    assert report.three(cells, "maze", "spirl", "scripted")[:2] == [".50\\*", ".50\\*"]
    assert report.verdicts(cells, report.Claim("", "spirl", "skimo", ""), "level").startswith("1 of 1 (1 ap")


def test_the_probability_of_a_better_run():
    better, low, high = scores.improvement([([1.0, 2.0], [0.0, 1.0]), ([0.0], [3.0])])
    assert better == pytest.approx((3.5 / 4 + 0) / 2)  # a tie counts half
    assert low == 0.25 and high == 0.5  # of the first board at least half, at most all
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=30), rng.normal(size=30)) for _ in range(8)]
    better, low, high = scores.improvement(pairs)
    assert low < 0.5 < high and better == pytest.approx(0.5, abs=0.08) and high - low < 0.15


def test_agreement_beside_chance(tmp_path):
    """Three methods whose order is the paper's: one of the six shufflings of their names agrees as often."""
    for method, value in (("skimo", 0.9), ("skimo_no_cem", 0.9), ("skimo_sac", 0.5)):
        for seed in (1, 2):
            write_log(tmp_path, method, seed, value, clean=0.5)
    cells = scores.read_cells(tmp_path)
    found = scores.agreement(cells, "level", "scripted", scores.paper_final)
    assert (found["pairs"], found["hold"]) == (3, 3)  # .97 and .99 are tied in the paper, .20 is below
    assert found["p"] == pytest.approx(2 / 6) and found["chance"] == pytest.approx((2 * 3 + 4 * 0) / 6, abs=0.7)
    assert scores.agreement(cells, "without noise", "scripted", scores.paper_final)["hold"] == 1
    claim = report.Claim("", "skimo", "skimo_sac", "")
    assert report.verdicts(cells, claim, "level") == "1 of 1 (1 apart)<br>*P* 1.00 [1.00, 1.00]"
    claim = report.Claim("", "skimo_sac", "skimo", "")
    assert report.verdicts(cells, claim, "level") == "0 of 1, 1 reversed (1 apart)<br>*P* .00 [.00, .00]"
    assert report.verdicts(cells, claim, "without noise") == "0 of 1, 1 tied<br>*P* .50 [.50, .50]"
    assert "| 1/0/0 | 1/0/0 | 0/1/0 |" in report.claims_overview(cells)


def test_commits_of_a_run():
    run = make_run([1_000], [1.0])
    run.facts["commit"] = "abcdef0123"  # by hand: the commit is known, though not that of every start
    run.facts["attempts"] = [dict(command="python algos/skimo.py")]
    assert report.commits(run) == ["abcdef0"]
    run.facts["attempts"] = [dict(commit="1111111222"), dict(commit="3333333444", changed=True)]
    assert report.commits(run) == ["1111111", "3333333+"]
    run.facts = dict(attempts=[dict(command="python algos/skimo.py")])
    assert report.commits(run) == ["no log"]


def test_the_papers_curves_are_whole():
    with scores.PAPER_CURVES.open() as file:
        rows = list(csv.DictReader(file))
    assert len({(row["task"], row["method"], row["env_step"]) for row in rows}) == len(rows)
    assert len(scores.PAPER) == 36
    for (task, method), curve in scores.PAPER.items():
        facts = scores.TASKS[task]
        assert scores.METHODS[method].paper
        assert (np.diff(curve[:, 0]) > 0).all()
        assert (curve[:, 1] >= 0).all() and (curve[:, 1] <= 1).all()
        if (task, method) != ("kitchen-misaligned", "tdmpc"):
            assert curve[-1, 0] == (1_000_000 if facts.max_return == 4 else 2_000_000)
    assert scores.paper_final("kitchen", "skimo_no_joint") == 3.81 / 4
    assert scores.paper_at("calvin", "spirl", 450_000) == pytest.approx((1.45 + 1.54) / 8)
    assert np.isnan(scores.paper_at("calvin", "spirl", 50_000))
    assert np.isnan(scores.paper_at("maze", "skimo_single_step", 500_000))


def test_facts_about_the_tasks_are_those_of_data_tools():
    for name in ("maze", "kitchen", "kitchen-misaligned", "calvin", "kitchen-6", "maze-far", "calvin-6"):
        task = scores.TASKS[name]
        assert data_tools.TASKS[name].max_return == task.max_return
        env = data_tools.make_envs(name, 1)
        assert env.max_episode_steps == task.longest
        env.close()


# --------------------------------------------------------------------------------------------------- the published logs
@pytest.fixture(scope="module")
def cells():
    return scores.read_cells(scores.RESULTS)


def test_every_log_is_where_the_rule_says():
    logs = sorted(scores.RESULTS.rglob("*/seed*.json"))
    for path in logs:
        facts = json.loads(path.read_text())
        folder = path.relative_to(scores.RESULTS).parts[:-1]
        assert path.stem == f"seed{facts['seed']}"
        assert path.with_suffix(".csv").exists()
        assert facts["attempts"][-1]["command"]
        assert facts["machine"]
        assert "commit" in facts
        if folder[0] == "held-out":
            assert folder[2:] == (facts["algo"],)
            assert suites.HELD_OUT[folder[1]].env_id == facts["env_id"]
        elif folder[0] == "studies":
            assert len(folder) == 3
            assert (scores.RESULTS / "studies" / folder[1] / "study.json").exists()
        else:
            assert folder[:2] == (facts["env_id"], facts["algo"])
            assert folder[2] in (*scores.DATA, "none")
    assert {path.with_suffix(".json") for path in scores.RESULTS.rglob("*/seed*.csv")} == set(logs)


def test_what_a_study_names_is_there():
    for path in sorted((scores.RESULTS / "studies").glob("*/study.json")):
        facts = json.loads(path.read_text())
        assert facts["question"] and facts["answer"]
        for name, file in facts.get("files", {}).items():
            assert (path.parent / name).exists()
            assert file["command"]
        compare = facts.get("compare", [])
        if isinstance(compare, dict):
            assert all((path.parent / variant).is_dir() for variant in compare)
            compare = compare.values()
        for name in compare:
            assert (scores.RESULTS / name).is_dir() or (path.parents[1] / name).is_dir()
        for name in facts.get("variants", {}):
            assert (path.parent / name).is_dir()
    models = json.loads((scores.RESULTS / "models.json").read_text())
    assert set(models) == {path.name for path in scores.RESULTS.glob("*_pretrained.pt")}


# The audit's own numbers (shared/design/evidence_audit.md, 3.1): speed, level, without noise, number of seeds
AUDIT = {
    ("maze", "skimo", "scripted"): (0.72, 1.00, 1.00, 5),
    ("maze", "skimo_no_joint", "scripted"): (0.01, 0.00, 0.00, 3),
    ("maze", "spirl", "scripted"): (0.40, 0.49, 0.10, 3),
    ("kitchen", "skimo", "scripted"): (0.89, 0.96, 0.91, 5),
    ("kitchen", "skimo_no_cem", "scripted"): (0.85, 0.90, 0.97, 3),
    ("kitchen", "spirl", "scripted"): (0.49, 0.87, 0.99, 3),
    ("kitchen-misaligned", "skimo", "scripted"): (0.87, 0.93, 0.96, 4),
    ("kitchen-misaligned", "dreamer_skills", "scripted"): (0.43, 0.56, 0.77, 2),
    ("calvin", "skimo_sac", "scripted"): (0.08, 0.13, 0.25, 3),
    ("calvin", "spirl", "scripted"): (0.48, 0.92, 0.92, 3),
    ("kitchen", "skimo", "human"): (0.91, 0.98, 0.95, 3),
    ("kitchen-misaligned", "skimo_sac", "human"): (0.67, 0.85, 0.97, 3),
}


@pytest.fixture(scope="module")
def audited(cells):
    """The audit's logs: some of its cells are variants of studies since."""
    former = {
        ("maze", "spirl", "scripted"): "slow_copies/maze_spirl_tau0.005",
        ("kitchen", "spirl", "scripted"): "spirl_alpha/kitchen_from_1",
        ("kitchen-misaligned", "spirl", "scripted"): "spirl_alpha/misaligned_from_1",
        ("kitchen", "spirl", "human"): "spirl_alpha_people/kitchen_from_1",
        ("kitchen-misaligned", "spirl", "human"): "spirl_alpha_people/misaligned_from_1",
    }
    before = ("skimo", "skimo_no_joint", "skimo_no_cem", "skimo_sac")
    former |= {("maze", name, "scripted"): f"maze_before/{name}" for name in before}
    studies = scores.RESULTS / "studies"
    found = cells | {cell: report.read_variant(studies / name) for cell, name in former.items()}
    # Seeds from 4000 on were run after it
    return {cell: scores.Cell(run for run in runs if run.seed < 4000) for cell, runs in found.items()}


@pytest.mark.parametrize("cell", AUDIT, ids="/".join)
def test_the_audits_numbers_come_out(audited, cell):
    found = [scores.measured(audited, *cell, measure) for measure in scores.MEASURES]
    assert tuple(float(f"{values.mean():.2f}") for values in found) == AUDIT[cell][:3]
    assert len(found[0]) == AUDIT[cell][3]


def test_the_audits_counts_and_marks_come_out(cells, audited):
    today = cells | {cell: runs for cell, runs in audited.items() if cell[1] == "spirl"}  # as RESULTS says
    speed = [scores.agreement(today, "speed", data, scores.paper_speed) for data in ("scripted", "human")]
    assert [(found["hold"], round(found["p"], 3)) for found in speed] == [(25, 0.017), (13, 0.033)]
    speed = [scores.agreement(audited, "speed", data, scores.paper_speed) for data in ("scripted", "human")]
    assert [(found["hold"], found["pairs"]) for found in speed] == [(23, 40), (13, 20)]
    assert [round(found["chance"], 1) for found in speed] == [14.4, 6.5] and speed[1]["p"] == 4 / 120
    assert report.three(audited, "kitchen-misaligned", "spirl", "scripted") == [".55°", ".96\\*", ".99"]
    assert report.three(audited, "kitchen", "skimo_sac", "human") == [".82°", ".98", "1.00\\*"]
    for method, expected in (("skimo_sac", 0.95), ("skimo_no_cem", 0.86), ("skimo_no_joint", 0.58), ("spirl", 1.0)):
        boards = [
            [scores.measured(audited, task, name, data, "speed") for name in ("skimo", method)]
            for task, data in scores.boards(audited)
        ]
        better, low, high = scores.improvement(boards)
        assert better == pytest.approx(expected, abs=0.02) and low <= better <= high
    to = [scores.steps_to(run, 0.75) for run in audited["kitchen", "spirl", "scripted"]]
    assert (round(min(to), -3), round(max(to), -3)) == (179_000, 184_000)
    runs = [audited["kitchen-misaligned", name, "human"] for name in ("skimo", "skimo_no_cem")]
    middle, low, _, paired = scores.lead(*runs, scores.speed, 200_000)
    assert paired and low > 0.07 and middle == pytest.approx(0.09, abs=0.005)  # +.10, +.08, +.08


def test_of_times_graphs_count_before_eager_code_and_planners_before_policies(tmp_path, monkeypatch):
    times = [("RL update", "kitchen", "graphs", 4.0), ("RL update", "kitchen", "eager", 9.0)]
    times += [("plan, 8 envs", "kitchen", "eager", 30.0), ("act, 8 envs", "kitchen", "eager", 1.0)]
    times += [("plan, 1 env", "kitchen", "graphs", 5.0), ("RL update", "maze", "graphs", 2.0)]
    rows = [dict(zip(("name", "size", "mode", "ms"), time), algo="skimo") for time in times]
    (tmp_path / "log.json").write_text(json.dumps(dict(rows=rows)))
    monkeypatch.setitem(report.TIMED, "H100", (tmp_path / "log.json", "kitchen"))
    found = report.timed("H100")["skimo"]
    assert (found["RL update"], found["choice"]) == (4.0, 30.0)


def test_pages_are_what_the_logs_give(cells):
    """RESULTS.md, tables of README, FINDINGS and SPEED, the blocks of the methods' pages, the pages beside the logs."""
    pages = report.pages(cells, scores.read_cells(scores.RESULTS / "held-out"))
    assert len(pages) == 10 + len(scores.METHODS)
    for path, text in pages.items():
        assert path.read_text() == text, f"run python benchmarks/report.py: {path}"
    assert "| [SkiMo](algos/docs/skimo.md) | .81/.98/1.00 (5) |" in pages[scores.ROOT / "README.md"]
    blocks = [text for path, text in pages.items() if path.parent.name == "docs"]
    assert all(report.CORNER in text or "No run of its own yet" in text for text in blocks)


def test_the_pictures_are_small_enough():
    assert (scores.RESULTS / "curves.png").stat().st_size < 300_000
    assert (scores.RESULTS / "kitchen" / "evaluation.gif").stat().st_size < 2_000_000


@pytest.mark.parametrize("last", [30_000, 200_000, 300_000, 450_000, 1_000_000, 1_010_000, 2_000_000])
def test_bins_of_training_means_cover_a_run_without_gaps_and_stay_few(last):
    edges = report.bin_edges(last, 50_000)
    assert edges[0] == 0 and edges[-2] < last
    assert last <= edges[-1] + 100_000  # what is left would fill less than half of a bin
    assert (np.diff(edges) > 0).all() and len(edges) <= 18
    assert set(np.diff(edges[:9])) == {50_000}


# --------------------------------------------------------------------------------------------------- text and figures
def test_text_stands_between_its_markers():
    page = "above\n<!-- result sac -->\nold\n<!-- /result -->\nbelow\n"
    new = report.filled(page, "result sac", "table\n")
    assert new == "above\n<!-- result sac -->\ntable\n<!-- /result -->\nbelow\n"
    assert report.filled(new, "result sac", "table\n") == new
    assert report.filled("no markers", "results", "table\n") == "no markers"


def test_numbers_of_a_table():
    numbers = {0.724: ".72", 1.0: "1.00", -0.05: "-.05", -0.001: ".00", np.nan: "–", 50: "50.00"}
    assert {value: report.number(value) for value in numbers} == numbers
    assert report.table([{"a": "x|y"}]) == "| a |\n|---|\n| x\\|y |\n"


def test_tables_and_figures_of_a_grid_are_written_and_are_the_same_again(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path, "skimo", seed, 0.9)
        write_log(tmp_path, "own_method", seed, 0.8)
    write_log(tmp_path, "skimo", 1, 0.75, task="calvin", length=300)
    report.main(report.Args((tmp_path,)))
    names = ["RESULTS.md", "curves.png", "maze/curves.png", "calvin/curves.png"]
    first = [(tmp_path / name).read_bytes() for name in names]
    assert all(len(content) > 1_000 for content in first)
    assert "| own_method | 2 | 300k | **.80** (.80 .80) | **.80** (.80 .80) |" in first[0].decode()
    report.main(report.Args((tmp_path,)))
    assert first == [(tmp_path / name).read_bytes() for name in names]
    assert "## What the paper claims" not in first[0].decode()


def test_held_out_boards_have_their_own_page(tmp_path, monkeypatch):
    for board, share, skimo, sac in (("kitchen-60", 0.1, 0.9, 0.5), ("kitchen-20", 0.033, 0.5, 0.5)):
        for method, value in (("skimo", skimo), ("skimo_sac", sac)):
            for seed in (1000, 2000):
                log = write_log(tmp_path / "own", method, seed, value, task="kitchen", steps=100_000, length=200)
                facts = json.loads(log.read_text())
                facts["args"] |= dict(data="scripted", data_share=share)
                facts["results"]["pretraining"] = dict(data="scripted", valid_kl_loss=float(seed))
                log.write_text(json.dumps(facts))
            shutil.move(log.parent, tmp_path / "held-out" / board / method)
    rows = ["checkpoint,env_step,acts_by,episodes,episodic_return,success"]
    for seed, plan, mode in ((1000, 2.0, 3.0), (2000, 3.0, 4.0)):
        rows.append(f"kitchen-60/skimo/seed{seed}.pt,100040,plan,20,{plan},0")
        rows.append(f"kitchen-60/skimo/seed{seed}.pt,100040,mode,20,{mode},1")
        rows.append(f"kitchen-60/skimo/seed{seed}_25000.pt,25010,plan,20,1.0,0")
        rows.append(f"kitchen-60/skimo_sac/seed{seed}.pt,100010,mode,20,1,0")
    (tmp_path / "held-out" / "evaluations.csv").write_text("\n".join(rows))

    assert scores.read_cells(tmp_path) == {}
    held = scores.read_cells(tmp_path / "held-out")
    names = ["10% of scripted data", "3.3% of scripted data"]
    assert list(held) == [("kitchen", method, name) for name in names for method in ("skimo", "skimo_sac")]
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    page = report.held_out_text(held)
    assert "## Kitchen, 10% of scripted data\n" in page
    assert f"| SkiMo | 2 | 100k |{3 * ' **.90** (.90 .90) |'} 17 |" in page  # no paper, no prior
    assert "| no model in RL (SAC) | never | +.40 [+.40, +.40] p | +.40 [+.40, +.40] p |" in page  # by common model
    assert "| board | method | 25k | 100k |\n|---|---|---|---|\n| kitchen-60 | SkiMo | .25 | .62 / .88 |\n" in page
    assert page.count("\n| kitchen-60 |") == 1  # SAC has no planner
    whole = scores.read_cells(scores.RESULTS)
    monkeypatch.undo()
    text = report.results_text(whole, held)
    assert "| [SkiMo](../algos/docs/skimo.md) | .90/.90/.90 (2) | .50/.50/.50 (2) |" in text
    assert "| .50°/.50°/.50° (2) | .50/.50/.50 (2) |" in text


def run_folder(folder, steps=120_000, task="maze"):
    """As an algorithm file leaves it, since long without exp_name."""
    folder.mkdir()
    args = dict(script="skimo.py", env_id=task, seed=1, num_envs=8, eval_episodes=20, data="scripted")
    (folder / "args.json").write_text(json.dumps(args))
    rows = [f"{step},100.0,1000,{step / 1e4}" for step in range(8_000, steps + 1, 8_000)]
    (folder / "episodes.csv").write_text("\n".join([HEADER_OF_RUNS, *rows]))
    results = dict(env_steps=steps, rl_minutes=9.0, evaluations=[[steps, 90.0, 0.9]], pretraining=dict(data="scripted"))
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_run_folders_are_compared_with_what_is_published(tmp_path, capsys):
    folders = run_folder(tmp_path / "a"), run_folder(tmp_path / "b", 16_000)
    report.main(report.Args(folders))
    text = capsys.readouterr().out
    assert "| this run: SkiMo, seed 1 | 120,000 | 1.00 | 1.00 | .90 |" in text
    assert "| published SkiMo, 5 seeds | 120,000 | .54 |" in text and "| the paper's SkiMo | 120,000 | .0" in text
    assert (folders[0] / "curves.png").stat().st_size > 10_000
    assert sorted(path.name for path in folders[1].iterdir()) == ["args.json", "episodes.csv", "results.json"]
    report.main(report.Args((run_folder(tmp_path / "short", 8_000),)))
    assert "no score before env step 16,000" in capsys.readouterr().out  # eight mazes of 2,000 env steps
    with pytest.raises(SystemExit, match="error: several folders are compared only if each is a run folder"):
        report.main(report.Args((tmp_path, tmp_path)))


@mock.patch.dict(scores.TASKS)
def test_runs_of_a_task_of_ones_own_share_one_scale(tmp_path, capsys):
    long, short = run_folder(tmp_path / "a", 240_000, "moon"), run_folder(tmp_path / "b", 16_000, "moon")
    told = []
    for folders in ((long, short), (short, long)):
        report.main(report.Args(folders))
        told.append({line for line in capsys.readouterr().out.splitlines() if "this run" in line})
    assert told[0] == told[1] and len(told[0]) == 2


def test_logs_as_the_runner_and_the_algorithm_files_write_them(tmp_path):
    """Without a folder DATA: the results say which data, or have none of it."""
    for method, pretraining in (("skimo", dict(data="scripted")), ("spirl", dict(data="d4rl")), ("sac", None)):
        log = write_log(tmp_path, method, 1, 0.5, data="")
        facts = json.loads(log.read_text())
        if pretraining:
            facts["results"]["pretraining"] = pretraining
            facts["args"]["data"] = "scripted"
        log.write_text(json.dumps(facts))
    cells = scores.read_cells(tmp_path)
    assert set(cells) == {("maze", "skimo", "scripted"), ("maze", "spirl", "d4rl"), ("maze", "sac", "scripted")}


@pytest.mark.parametrize("model", sorted(scores.RESULTS.glob("*_pretrained.pt")), ids=lambda path: path.stem)
def test_runs_from_the_models_of_this_repository_name_their_data(model, tmp_path):
    data = torch.load(model, weights_only=True)["facts"]["data"]
    facts = dict(algo="skimo", args=dict(data="scripted"), results=dict(pretraining=dict(data=data)))
    assert scores.offline_data(facts, tmp_path / "args.json") == "scripted"


def test_numbers_that_are_missing_and_shares_that_are_nearly_all(tmp_path):
    assert report.mean_and_seeds([np.nan, 0.5]) == "–" and report.mean_and_seeds([0.25, 0.75]).startswith("**.50**")
    facts = dict(algo="skimo", args=dict(data="scripted", data_share=0.996))
    assert scores.offline_data(facts, tmp_path / "args.json").startswith("99.6%")


def test_a_run_that_still_pretrains_is_left_alone(tmp_path, capsys):
    young = tmp_path / "young" / "args.json"
    young.parent.mkdir()
    young.write_text(json.dumps(dict(script="skimo.py", env_id="maze", seed=1, num_envs=8)))
    with pytest.raises(SystemExit, match="young no episode of RL has ended yet"):
        scores.read_cells(tmp_path)
    (young.parent / "episodes.csv").write_text(HEADER_OF_RUNS + "\n")
    write_log(tmp_path, "skimo", 1, 0.5)
    evaluated = write_log(tmp_path, "sac", 1, 0.5).with_suffix(".csv")  # it ended before its first episode did
    evaluated.write_text(f"{HEADER}\n9000,,,100,1.0,3\n")
    assert set(scores.read_cells(tmp_path)) == {("maze", "skimo", "scripted")}
    assert capsys.readouterr().out.count("left out: ") == 2


def test_leads_are_taken_where_both_methods_have_been(tmp_path):
    write_log(tmp_path, "skimo", 1, 0.8, steps=100_000)
    write_log(tmp_path, "skimo_sac", 1, 0.3, steps=300_000)
    cells = scores.read_cells(tmp_path)
    assert report.lead_row(cells, "maze", "skimo_sac", "scripted")["SkiMo's lead: speed"].startswith("+.50")


def test_nothing_is_reported_beyond_a_runs_end(tmp_path):
    """Only episodes that ended early are placed there: successes."""
    write_log(tmp_path, "skimo", 1, 1.0, steps=205_000)
    (run,) = scores.read_runs(tmp_path)
    assert run.steps.max() > 205_000
    assert scores.mean_between(run, 150_000, 200_000) == 1.0
    assert np.isnan(scores.mean_between(run, 205_000, 250_000))


@pytest.mark.parametrize(
    ("env_steps", "end"),
    [(999, 999), (60_055, 60_000), (99_980, 100_000), (300_068, 300_000), (345_151, 340_000), (199_990, 200_000)],
)
def test_ends_are_rounded_down(env_steps, end):
    assert make_run([env_steps], [1.0]).end == end


def test_evaluations_of_a_stopped_run_are_those_of_its_table(tmp_path):
    """Its JSON has no results; the runner's table has a row for each clean evaluation."""
    log = write_log(tmp_path, "skimo", 1, 0.5, task="calvin", steps=210_000)
    log.write_text(json.dumps(json.loads(log.read_text()) | dict(results=None)))
    with log.with_suffix(".csv").open("a") as file:
        file.write("100040,,,300.0,0.0,1000.4\n200080,,,400.0,1.0,2000.8\n")
    (run,) = scores.read_runs(tmp_path)
    assert run.end == 210_000
    assert scores.without_noise(run, 100_000) == 0.75 and scores.without_noise(run, 200_000) == 1
    assert np.isnan(scores.without_noise(run, 210_000))
    assert scores.level(run, 210_000) == 0.5  # they are not among the training episodes


def test_evaluations_of_a_short_run_are_not_mixed():
    run = make_run(np.arange(100, 8_001, 100), np.repeat([0.0, 1.0], 40))
    run.evaluations = [(4_016, 0.1), (8_000, 0.9)]
    assert [scores.without_noise(run, end) for end in (4_000, 8_000)] == [0.1, 0.9]
    assert np.isnan(scores.without_noise(run, 6_000))


@pytest.mark.parametrize("env_steps", [2_500, 59_960, 126_008, 200_055])
def test_the_last_evaluation_counts_where_the_end_is_rounded(env_steps):
    run = make_run([env_steps], [1.0])
    run.env_steps, run.evaluations = env_steps, [(env_steps // 2, 0.1), (env_steps, 0.9)]
    assert scores.without_noise(run, run.end) == 0.9


def test_runs_of_which_one_stopped_before_the_others_first_episode(tmp_path):
    write_log(tmp_path, "skimo", 1, 1.0, steps=7_200, length=900)
    write_log(tmp_path, "skimo", 2, 1.0, steps=160_000, length=16_000)
    report.main(report.Args((tmp_path,)))
    assert "| SkiMo | 2 | 7k | **1.00** (1.00 1.00) |" in (tmp_path / "RESULTS.md").read_text()


# ------------------------------------------------------------------------------------------------------------ bad input
DAMAGES = [
    lambda log: log.write_text('{"algo": "sk'),
    lambda log: log.with_suffix(".csv").write_text("step,return\n1,2\n"),
    lambda log: log.with_suffix(".csv").unlink(),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_logs_are_refused(damage, tmp_path):
    damage(write_log(tmp_path, "skimo", 1, 0.0))
    with pytest.raises(SystemExit, match="error: .*seed1.json and its CSV are no whole log"):
        report.main(report.Args((tmp_path,)))
    assert [path.name for path in tmp_path.iterdir()] == ["maze"]


def test_a_torn_log_of_a_users_own_task_is_refused(tmp_path):
    log = write_log(tmp_path, "skimo", 1, 0.0)
    log.write_text(log.read_text().replace('"env_id": "maze"', '"env_id": "puck"'))
    log.with_suffix(".csv").write_text(HEADER + "\n1000,0.0,1000,,,1\n2000,-1")
    with pytest.raises(SystemExit, match="error: .*puck.* no whole log"):
        report.main(report.Args((tmp_path,)))


def test_other_bad_input_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: no logs in"):
        report.main(report.Args((tmp_path,)))
    log = write_log(tmp_path, "skimo", 1, 0.0)
    log.with_name("seed01.json").write_text(log.read_text())
    log.with_name("seed01.csv").write_text(log.with_suffix(".csv").read_text())
    with pytest.raises(SystemExit, match="error: seed 1 of maze/skimo/scripted is in .* twice; give the folder"):
        report.main(report.Args((tmp_path,)))


@mock.patch.dict(scores.TASKS)
def test_a_task_of_ones_own_has_tables_and_curves(tmp_path, monkeypatch):
    for name, value, length in (("mine", 0.5, 60), ("other", -2.0, 400)):
        log = write_log(tmp_path, name, 1, value, steps=4_800, length=length)
        log.write_text(log.read_text().replace('"env_id": "maze"', '"env_id": "moon"'))
    report.main(report.Args((tmp_path,)))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## moon\n" in text
    assert "\n| mine | 1 | 5k | **50.00** |" in text
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    moon = scores.TASKS["moon"]  # of all runs
    assert (moon.worst, moon.best, moon.longest) == (-200, 50, 400)
    (run,) = scores.read_cells(tmp_path)["moon", "mine", "scripted"]
    assert run.steps[0] == 400  # as late as an episode of the other could end
    scores.TASKS.pop("moon")
    monkeypatch.setitem(data_tools.TASKS, "moon", data_tools.Task("moon:MoonVectorEnv", 200.0))
    (run,) = scores.read_cells(tmp_path)["moon", "mine", "scripted"]
    assert set(run.scores) == {0.25}  # with a highest return: shares of it
