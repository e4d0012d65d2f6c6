"""benchmarks/report.py: scores against independent versions, and what is published against the logs."""

import csv
import json
from collections import Counter

import numpy as np
import pytest
import torch

from benchmarks import plot, report, scores

HEADER = "env_step,episodic_return,episodic_length,eval_return,eval_success,wall_seconds"
HEADER_OF_RUNS = "env_step,episodic_return,episodic_length,rl_minutes"


def make_run(steps, values, method="skimo", task="kitchen", num_envs=1):
    """A run whose episodes are placed at the given env steps."""
    steps = np.asarray(steps, dtype=float)
    values = np.asarray(values, dtype=float)
    return scores.Run(
        task=task,
        method=method,
        data="scripted",
        seed=1,
        steps=steps,
        scores=values,
        ended=values,
        minutes=steps,
        end_steps=steps,
        evaluations=[],
        env_steps=int(steps[-1]),
        facts=dict(args=dict(num_envs=num_envs, eval_episodes=20)),
    )


def write_log(folder, method, seed, value, task="maze", data="scripted", steps=300_000, clean=None, length=1000):
    """A log as benchmarks/run.py writes it: one environment, all episodes alike."""
    path = folder / task / method / data / f"seed{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    unit = scores.TASKS[task].unit
    rows = [f"{step},{value * unit},{length},,,{step / 100}" for step in range(length, steps + 1, length)]
    path.with_suffix(".csv").write_text("\n".join([HEADER, *rows]) + "\n")
    evaluations = [[steps, unit * (value if clean is None else clean), 0.0]]
    results = dict(env_steps=steps, rl_minutes=steps / 6000, evaluations=evaluations)
    facts = dict(algo=method, env_id=task, seed=seed, commit="abcdef0123", machine="AMD EPYC, 2 cores")
    facts |= dict(args=dict(num_envs=1, eval_episodes=20), results=results)
    path.with_suffix(".json").write_text(json.dumps(facts))


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
    grid = np.array([2_500 * num_envs, 5_000 * num_envs, 50_000, 100_000])
    placed = []
    as_they_end = []
    for _ in range(150):
        ends, wins, lengths = lockstep_episodes(rng, num_envs, 110_000, 0.5, 2_000).T
        steps = scores.place(ends, lengths, num_envs, 2_000)
        for curves, where in ((placed, steps), (as_they_end, ends)):
            order = np.argsort(where, kind="stable")
            run = make_run(where[order], wins[order])
            curves.append(np.interp(grid, *scores.smooth(run).T))
    assert np.abs(np.mean(placed, axis=0) - 0.5).max() < 0.06  # the standard error is 0.03 at the beginning
    if num_envs == 8:  # the reason for all this
        assert np.mean(as_they_end, axis=0)[0] > 0.8


def test_episodes_are_placed_where_the_longest_would_have_ended():
    ends = np.array([8_000.0, 16_000, 24_000])
    lengths = np.array([1_000.0, 2_000, 1_000])
    assert scores.place(ends, lengths, 8, 2_000).tolist() == [16_000, 16_000, 32_000]
    assert scores.place(np.array([2_000.0]), np.array([2_000.0]), 1, 2_000).tolist() == [2_000]


@pytest.mark.parametrize(("method", "interval"), [("skimo", 500), ("spirl", 100)])
def test_with_an_episode_in_each_window_the_smoothing_is_the_papers(method, interval):
    values = np.random.default_rng(1).random(300)
    run = make_run(interval * np.arange(3, 303), values, method)
    average = sum(values[:10]) / 10
    expected = []
    for value in values:
        average = 0.99 * average + 0.01 * value
        expected.append(average)
    curve = scores.smooth(run)
    assert np.array_equal(curve[:, 0], interval * np.arange(3, 303))
    assert np.allclose(curve[:, 1], expected)
    assert scores.score_at(run, 100 * interval) == pytest.approx(expected[97])
    assert np.isnan(scores.score_at(run, interval))


def test_episodes_are_weighted_by_age_and_not_by_the_gaps_between_them():
    rng = np.random.default_rng(2)
    steps = np.sort(rng.choice(np.arange(1, 60_000), 90, replace=False))
    values = rng.random(90)
    window = -(-steps // 500)
    first = values[window < window[0] + 10].mean()
    for step in (20_000, 55_000):
        age = step // 500 - window
        weights = np.where(age >= 0, 0.99 ** np.maximum(age, 0), 0)
        forgotten = 0.99 ** (step // 500 - window[0] + 1)
        expected = forgotten * first + (1 - forgotten) * (weights * values).sum() / weights.sum()
        assert scores.score_at(make_run(steps, values), step) == pytest.approx(expected)


def test_bins_and_last_episodes():
    run = make_run([10, 20, 30, 40], [1.0, 2, 3, 5])
    assert scores.mean_between(run, 10, 30) == 2.5  # without its lower edge, with its upper one
    assert np.isnan(scores.mean_between(run, 40, 50))
    assert scores.last_episodes(run, 40, count=2) == 4


def test_the_main_end_is_where_more_than_half_of_the_seeds_got():
    runs = [make_run([steps], [1]) for steps in (60_055, 200_080, 199_990)]
    cell = scores.Cell(runs)
    assert cell.ends == [60_000, 200_000]
    assert cell.main_end == 200_000
    assert cell.reaching(200_000) == runs[1:]
    cell.append(make_run([2_000_050], [1]))  # one seed to the paper's end
    assert cell.ends == [60_000, 200_000, 2_000_000]
    assert cell.main_end == 200_000
    assert len(cell.reaching(60_000)) == 4
    cell.append(make_run([60_000], [1]))
    cell.append(make_run([60_000], [1]))  # half of the six got to 200,000
    assert cell.main_end == 60_000


# ---------------------------------------------------------------------------------------------------------- orderings
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


def test_orderings_of_a_small_grid(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path, "skimo", seed, 0.9, clean=0.5)
        write_log(tmp_path, "skimo_no_cem", seed, 0.91, clean=0.5)
        write_log(tmp_path, "skimo_sac", seed, 0.5, clean=0.5)
    cells = scores.read_cells(tmp_path)
    pairs = scores.orderings(cells, "scripted")
    assert len(pairs) == 4 * 36
    tested = {(pair.first, pair.second): pair for pair in pairs if pair.training}
    assert set(tested) == {("skimo_no_cem", "skimo"), ("skimo_no_cem", "skimo_sac"), ("skimo", "skimo_sac")}
    assert {pair.training for pair in tested.values()} == {"holds"}
    assert tested["skimo_no_cem", "skimo"].expected == "="  # .99 and .97 in the paper
    assert tested["skimo", "skimo_sac"].expected == ">"
    assert tested["skimo", "skimo_sac"].clean == "fails"
    assert tested["skimo", "skimo_sac"].paper_then == "<"  # .04 and .17 at 300,000
    text = report.count_orderings(pairs)
    assert "3 were tested: **3 hold, 0 fail**, 141 are untested" in text
    assert "2 fail in clean evaluation" in text
    assert not any(pair.training for pair in scores.orderings(cells, "human"))


def test_a_collapse_is_no_agreement(tmp_path):
    write_log(tmp_path, "skimo_no_joint", 1, 0.0, steps=200_000)
    write_log(tmp_path, "spirl", 1, 0.5)
    cells = scores.read_cells(tmp_path)

    def verdict():
        pairs = scores.orderings(cells, "scripted")
        pairs = [pair for pair in pairs if pair.task == "maze"]
        (pair,) = [pair for pair in pairs if {pair.first, pair.second} == {"spirl", "skimo_no_joint"}]
        return pair.training

    assert verdict() == "holds"
    (run,) = cells["maze", "spirl", "scripted"]
    run.scores[run.steps > 200_000] = 0.0  # still above at 200,000 env steps, gone at its end
    assert verdict() == "fails"


def test_a_lead_that_only_smoothing_remembers_does_not_hold(tmp_path):
    write_log(tmp_path, "skimo", 1, 0.9)
    write_log(tmp_path, "skimo_sac", 1, 0.9)
    cells = scores.read_cells(tmp_path)
    (run,) = cells["maze", "skimo_sac", "scripted"]
    run.scores[run.steps <= 240_000] = 0.0  # as good as SkiMo since, which its smoothed score does not show yet
    (pair,) = [pair for pair in scores.orderings(cells, "scripted") if pair.training]
    assert (pair.first, pair.second, pair.expected) == ("skimo", "skimo_sac", ">")
    assert pair.scores[0][0] - pair.scores[1][0] > 0.2
    assert [part.tolist() for part in pair.unsmoothed] == [[pytest.approx(0.9)]] * 2
    assert pair.training == "fails"
    assert "; unsmoothed 0.90 vs 0.90" in report.ordering_row(cells, pair, "scripted")["ours"]


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
    names = {method.paper for method in scores.METHODS.values()} - {None}
    assert len(scores.PAPER) == 36
    for (task, method), curve in scores.PAPER.items():
        facts = scores.TASKS[task]
        assert method in names
        assert (np.diff(curve[:, 0]) > 0).all()
        assert (curve[:, 1] >= 0).all() and (curve[:, 1] <= facts.best).all()
        if (task, method) != ("kitchen-misaligned", "TD-MPC"):
            assert curve[-1, 0] == facts.paper_end
    assert scores.paper_final("kitchen", "skimo_no_joint") == 3.81
    assert scores.paper_at("calvin", "spirl", 450_000) == pytest.approx((1.45 + 1.54) / 2)
    assert np.isnan(scores.paper_at("calvin", "spirl", 50_000))
    assert np.isnan(scores.paper_at("maze", "skimo_single_step", 500_000))


def test_the_paper_reaches_95_percent_without_cem_at_720_thousand():
    steps = np.arange(600_000, 800_000, 1_000)
    reached = [step for step in steps if scores.paper_at("maze", "skimo_no_cem", step) >= 0.95 - 1e-9]
    assert reached[0] == 720_000


def test_facts_about_the_tasks_are_those_of_data_tools():
    import data_tools

    for name, task in scores.TASKS.items():
        assert data_tools.TASKS[name].max_return == task.best * task.unit
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
        if folder[0] == "studies":
            assert len(folder) == 3
            assert (scores.RESULTS / "studies" / folder[1] / "study.json").exists()
        else:
            assert folder[:2] == (facts["env_id"], facts["algo"])
            assert folder[2] in (*scores.DATA, "none")
    assert {path.with_suffix(".json") for path in scores.RESULTS.rglob("*/seed*.csv")} == set(logs)


def test_what_a_study_names_is_there():
    for path in sorted((scores.RESULTS / "studies").glob("*/study.json")):
        facts = json.loads(path.read_text())
        for name, file in facts.get("files", {}).items():
            assert (path.parent / name).exists()
            assert file["command"]
        for name in facts.get("compare", []):
            assert (scores.RESULTS / name).is_dir()
        for name in facts.get("variants", {}):
            assert (path.parent / name).is_dir()
    models = json.loads((scores.RESULTS / "models.json").read_text())
    assert set(models) == {path.name for path in scores.RESULTS.glob("*_pretrained.pt")}


def test_results_are_what_the_logs_give(cells):
    published = (scores.RESULTS.parent / "RESULTS.md").read_text()
    assert published == report.results_text(scores.RESULTS, cells), "run python benchmarks/report.py"


def test_the_readmes_table_is_what_the_logs_give(cells):
    readme = (scores.ROOT / "README.md").read_text()
    assert report.BEGIN in readme and report.END in readme
    assert readme == report.with_table(readme, report.readme_text(cells)), "run python benchmarks/report.py"


def test_a_study_that_compares_with_a_cell_without_logs_ends_in_a_sentence(tmp_path):
    write_log(tmp_path / "studies", "skimo", 1, 0.5)
    study = tmp_path / "studies" / "maze"
    with pytest.raises(SystemExit, match="error: .*study.json compares with maze/sac/none"):
        report.study_rows(study, dict(compare=["maze/sac/none"]), scores.read_cells(tmp_path))


@pytest.mark.parametrize("last", [30_000, 200_000, 300_000, 450_000, 1_000_000, 1_010_000, 2_000_000])
def test_bins_of_training_means_cover_a_run_without_gaps_and_stay_few(last):
    edges = report.bin_edges(last, 50_000)
    assert edges[0] == 0 and edges[-2] < last
    assert last <= edges[-1] + 100_000  # what is left would fill less than half of a bin
    assert (np.diff(edges) > 0).all() and len(edges) <= 18
    assert set(np.diff(edges[:9])) == {50_000}


def test_the_coverage_is_that_of_the_logs(cells):
    found = scores.coverage(cells, "scripted")
    seeds = Counter()
    steps = 0
    for path in [*scores.RESULTS.glob("*/*/scripted/seed*.json"), *scores.RESULTS.glob("*/*/none/seed*.json")]:
        facts = json.loads(path.read_text())
        if scores.METHODS[facts["algo"]].paper:  # it has curves there
            seeds[facts["env_id"], facts["algo"]] += 1
            curve = scores.PAPER[facts["env_id"], scores.METHODS[facts["algo"]].paper]
            table = path.with_suffix(".csv").read_text().splitlines()
            last = facts["results"]["env_steps"] if facts["results"] else int(table[-1].split(",")[0])  # it was stopped
            steps += min(last, curve[-1, 0])
    assert found["begun"] == len(seeds)
    if max(seeds.values()) <= 5:
        assert found["done"] == steps
    assert found["whole"] == 5 * (9 * (2e6 + 1e6 + 1e6 + 2e6) - 0.9e6)  # one curve of 36 ends at 100,000


# --------------------------------------------------------------------------------------------------- text and figures
def test_the_readmes_table_stands_between_its_markers():
    readme = f"above\n{report.BEGIN}\nold\n{report.END}\nbelow\n"
    new = report.with_table(readme, "table\n")
    assert new == f"above\n{report.BEGIN}\ntable\n{report.END}\nbelow\n"
    assert report.with_table(new, "table\n") == new
    assert report.with_table("no markers", "table\n") == "no markers"


def test_methods_without_data_stand_beside_those_with_scripted_data(tmp_path):
    write_log(tmp_path, "skimo", 1, 3.0, task="kitchen", length=200)
    write_log(tmp_path, "sac", 1, 0.0, task="kitchen", data="none", length=200)
    write_log(tmp_path, "sac", 2, 1.0, task="kitchen", data="none", length=200)
    cells = scores.read_cells(tmp_path)
    header, _, *rows = report.board_section(cells, "kitchen", "scripted").split("| method |")[1].splitlines()
    values = {row.split(" | ")[0]: row.split(" | ")[3] for row in rows if row.startswith("| S")}
    assert "3.00" in values["| SkiMo"] and "0.50" in values["| SAC without skills"]
    text = report.readme_text(cells)
    assert "| SAC without skills" not in text and text.splitlines()[0].count("Kitchen, ") == 1
    assert "SAC without skills – / 0.50 / – / –" in text.replace("\n", " ")


def test_human_data_are_a_column_of_their_own(tmp_path):
    write_log(tmp_path, "skimo", 1, 3.0, task="kitchen", length=200)
    write_log(tmp_path, "skimo", 1, 2.0, task="kitchen", data="human", length=200)
    write_log(tmp_path, "skimo", 1, 2.0, task="kitchen-misaligned", data="human", length=200)
    cells = scores.read_cells(tmp_path)
    header, _, row = report.readme_text(cells).splitlines()[:3]
    assert [cell.split("<br>")[0].strip() for cell in header.split("|")[2:-1]] == [
        "Kitchen, scripted data",
        "Kitchen, human (187 episodes) data",
        "Mis-aligned Kitchen, human (187 episodes) data",
    ]
    assert [cell.split("**")[1] for cell in row.split("|")[2:-1]] == ["3.00", "2.00", "2.00"]
    text = report.results_text(tmp_path, cells)
    assert "## Kitchen, human (187 episodes) data" in text
    assert "demonstrations" not in text  # the note on scripted data


def test_labels_are_moved_apart():
    moved = plot.spread([0.0, 0.01, 0.5, 0.99, 1.0], 0.1, 0.0, 1.0)
    assert np.allclose(moved, [0.0, 0.1, 0.5, 0.9, 1.0])
    moved = plot.spread([0.5, 0.5, 0.5], 0.1, 0.0, 1.0)
    assert np.allclose(sorted(moved), [0.4, 0.5, 0.6])


def test_tables_and_figures_of_a_grid_are_written_and_are_the_same_again(tmp_path):
    for seed in (1, 2):
        write_log(tmp_path, "skimo", seed, 0.9)
        write_log(tmp_path, "own_method", seed, 0.8)
    write_log(tmp_path, "skimo", 1, 3.0, task="calvin", length=300)
    report.main(report.Args(tmp_path))
    names = ["RESULTS.md", "curves.png", "maze/curves.png", "calvin/curves.png"]
    first = [(tmp_path / name).read_bytes() for name in names]
    assert all(len(content) > 1_000 for content in first)
    assert "| own_method | 1, 2 | 300,000 | **0.80** (0.80 / 0.80) | – | – |" in first[0].decode()
    report.main(report.Args(tmp_path))
    assert first == [(tmp_path / name).read_bytes() for name in names]
    assert "## Coverage" not in first[0].decode()  # that is of the paper's figures


def test_a_run_folder_is_drawn(tmp_path):
    folder = tmp_path / "maze__skimo__1"
    folder.mkdir()
    args = dict(script="skimo.py", env_id="maze", seed=1, num_envs=8, eval_episodes=20)
    (folder / "args.json").write_text(json.dumps(args))
    rows = [f"{step},100.0,1000,{step / 1e4}" for step in range(8_000, 120_001, 8_000)]
    (folder / "episodes.csv").write_text("\n".join([HEADER_OF_RUNS, *rows]))
    report.main(report.Args(folder))  # unfinished: without results.json
    assert "| SkiMo | 1 | 120,000 | **1.00** (1.00) |" in (folder / "RESULTS.md").read_text()
    assert (folder / "curves_maze.png").exists()
    (folder / "episodes.csv").write_text("\n".join([HEADER_OF_RUNS, rows[0]]))  # its one episode counts at 16,000
    report.main(report.Args(folder))
    assert "| SkiMo | 1 | 8,000 | **–** (–) |" in (folder / "RESULTS.md").read_text()


def test_logs_as_the_runner_and_the_algorithm_files_write_them(tmp_path):
    """Without a folder DATA: the results say which data, or have none of it."""
    for method, pretraining in (
        ("skimo", dict(data="scripted")),
        ("spirl", dict(data="d4rl")),
        ("sac", None),
    ):
        write_log(tmp_path, method, 1, 0.5)
        for path in list((tmp_path / "maze" / method / "scripted").iterdir()):
            path.rename(tmp_path / "maze" / method / path.name)
        (tmp_path / "maze" / method / "scripted").rmdir()
        path = tmp_path / "maze" / method / "seed1.json"
        facts = json.loads(path.read_text())
        if pretraining:
            facts["results"]["pretraining"] = pretraining
            facts["args"]["data"] = "scripted"
        path.write_text(json.dumps(facts))
    cells = scores.read_cells(tmp_path)
    assert set(cells) == {("maze", "skimo", "scripted"), ("maze", "spirl", "d4rl"), ("maze", "sac", "scripted")}
    assert [cells[key][0].without_data for key in sorted(cells)] == [True, False, False]


@pytest.mark.parametrize("model", sorted(scores.RESULTS.glob("*_pretrained.pt")), ids=lambda path: path.stem)
def test_runs_from_the_models_of_this_repository_name_their_data(model, tmp_path):
    data = torch.load(model, weights_only=True)["facts"]["data"]
    facts = dict(algo="skimo", args=dict(data="scripted"), results=dict(pretraining=dict(data=data)))
    assert scores.offline_data(facts, tmp_path / "args.json") == "scripted"


def test_a_run_that_still_pretrains_is_left_alone(tmp_path, capsys):
    young = tmp_path / "young" / "args.json"
    young.parent.mkdir()
    young.write_text(json.dumps(dict(script="skimo.py", env_id="maze", seed=1, num_envs=8)))
    with pytest.raises(SystemExit, match="young RL has not begun yet"):
        scores.read_cells(tmp_path)
    write_log(tmp_path, "skimo", 1, 0.5)
    assert set(scores.read_cells(tmp_path)) == {("maze", "skimo", "scripted")}
    assert "left out: " in capsys.readouterr().out


def test_nothing_is_reported_beyond_a_runs_end(tmp_path):
    """Only episodes that ended early are placed there: successes."""
    write_log(tmp_path, "skimo", 1, 1.0, steps=205_000)
    (run,) = scores.read_cells(tmp_path)["maze", "skimo", "scripted"]
    assert run.steps.max() > 205_000
    assert scores.mean_between(run, 150_000, 200_000) == 1.0
    assert np.isnan(scores.mean_between(run, 205_000, 250_000))


@pytest.mark.parametrize(
    ("env_steps", "end"),
    [(999, 999), (60_055, 60_000), (99_980, 100_000), (300_068, 300_000), (345_151, 340_000), (199_990, 200_000)],
)
def test_ends_are_rounded_down(env_steps, end, tmp_path):
    write_log(tmp_path, "skimo", 1, 1.0)
    (run,) = scores.read_cells(tmp_path)["maze", "skimo", "scripted"]
    run.env_steps = env_steps
    assert run.end == end


def test_evaluations_of_a_stopped_run_are_those_of_its_table(tmp_path):
    """Its JSON has no results; the runner's table has a row for each clean evaluation."""
    write_log(tmp_path, "skimo", 1, 2.0, task="calvin", steps=210_000)
    log = tmp_path / "calvin" / "skimo" / "scripted" / "seed1.json"
    log.write_text(json.dumps(json.loads(log.read_text()) | dict(results=None)))
    with log.with_suffix(".csv").open("a") as file:
        file.write("100040,,,300.0,0.0,1000.4\n200080,,,400.0,1.0,2000.8\n")
    run = scores.read_run(log)
    assert run.end == 210_000
    assert scores.evaluation_at(run, 100_000) == 3 and scores.evaluation_at(run, 200_000) == 4
    assert np.isnan(scores.evaluation_at(run, 210_000))
    assert scores.last_episodes(run, run.end) == 2  # not among the training episodes


def test_evaluations_of_a_short_run_are_not_mixed():
    run = make_run(np.arange(100, 8_001, 100), np.repeat([0.0, 10.0], 40))
    run.evaluations = [(4_016, 1.0), (8_000, 9.0)]
    assert [scores.evaluation_at(run, end) for end in (4_000, 8_000)] == [1, 9]
    assert np.isnan(scores.evaluation_at(run, 6_000))
    assert scores.last_episodes(run, 4_000) < 2  # at most 1.1 for the five later ones, not 2.0


def test_runs_of_which_one_stopped_before_the_others_first_episode(tmp_path):
    write_log(tmp_path, "skimo", 1, 1.0, steps=7_200, length=900)
    write_log(tmp_path, "skimo", 2, 1.0, steps=160_000, length=16_000)
    report.main(report.Args(tmp_path))
    row = next(line for line in (tmp_path / "RESULTS.md").read_text().splitlines() if "| 7,000 |" in line)
    assert "1.00 / –" in row


# ------------------------------------------------------------------------------------------------------------ bad input
def cut_json(log):
    log.write_text('{"algo": "sk')


def break_csv(log):
    log.with_suffix(".csv").write_text("step,return\n1,2\n")


def drop_csv(log):
    log.with_suffix(".csv").unlink()


@pytest.mark.parametrize("damage", [cut_json, break_csv, drop_csv])
def test_damaged_logs_are_refused(damage, tmp_path):
    write_log(tmp_path, "skimo", 1, 0.0)
    damage(tmp_path / "maze" / "skimo" / "scripted" / "seed1.json")
    with pytest.raises(SystemExit, match="error: .*seed1.json and its CSV are no whole log"):
        report.main(report.Args(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["maze"]


def test_other_bad_input_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(SystemExit, match="error: no logs in"):
        report.main(report.Args(tmp_path))
    write_log(tmp_path, "skimo", 1, 0.0)
    log = tmp_path / "maze" / "skimo" / "scripted" / "seed1.json"
    log.with_name("seed01.json").write_text(log.read_text())
    log.with_name("seed01.csv").write_text(log.with_suffix(".csv").read_text())
    with pytest.raises(SystemExit, match="error: seed 1 of maze/skimo/scripted is in .* twice; give the folder"):
        report.main(report.Args(tmp_path))


def test_a_task_of_ones_own_has_tables_and_curves(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "TASKS", dict(scores.TASKS))
    for module in (plot, report):
        monkeypatch.setattr(module, "TASKS", scores.TASKS)
    for name, value, length in (("mine", 0.5, 60), ("other", -2.0, 400)):
        write_log(tmp_path, name, 1, value, steps=4_800, length=length)
        log = tmp_path / "maze" / name / "scripted" / "seed1.json"
        log.write_text(log.read_text().replace('"env_id": "maze"', '"env_id": "moon"'))
    report.main(report.Args(tmp_path))
    text = (tmp_path / "RESULTS.md").read_text()
    assert "## moon, scripted data" in text and "Score: return.\n" in text
    row = next(line for line in text.splitlines() if line.startswith("| mine | 1 |"))
    assert "**50.00** (50.00)" in row
    assert (tmp_path / "curves_moon.png").stat().st_size > 10_000
    moon = scores.TASKS["moon"]  # of all runs
    assert (moon.worst, moon.best, moon.longest) == (-200, 50, 400)
    (run,) = scores.read_cells(tmp_path)["moon", "mine", "scripted"]
    assert run.steps[0] == 400  # as late as an episode of the other could end
