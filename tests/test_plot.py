"""benchmarks/plot.py: means and intervals against independent versions, the grid's gaps, the paper's curves, bad input.

The curves of plain run folders are tested in test_diagnostics.py.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from benchmarks import plot

HEADER = "env_step,episodic_return,episodic_length,eval_return,eval_success,wall_seconds"


def write_result(folder, algo, seed, returns, evaluations, task="maze", length=1000):
    """A result as benchmarks/run.py writes it: an episode every `length` env steps, which take a second each."""
    path = folder / task / algo / f"seed{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{length * (i + 1)},{value},{length},,,{i + 1}" for i, value in enumerate(returns)]
    rows += [f"{step},,,{value},1.0,{step / length}" for step, value in evaluations]
    path.with_suffix(".csv").write_text("\n".join([HEADER, *rows]) + "\n")
    path.with_suffix(".json").write_text(json.dumps(dict(algo=algo, env_id=task, seed=seed)))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved."""
    saved, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), savefig(figure, *a, **k)))
    return saved


def table(text):
    """Rows of the first table: task, algorithm -> cells."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n\n")[0].splitlines()]
    return {tuple(row[:2]): dict(zip(rows[0], row)) for row in rows[2:]}


# ----------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize(("seeds", "kept"), [(1, 1), (3, 3), (4, 2), (5, 3), (8, 4), (10, 6)])
def test_iqm_is_the_mean_without_the_outer_quarters(seeds, kept):
    values = np.random.default_rng(seeds).normal(size=(seeds, 6))
    cut = (seeds - kept) // 2
    independent = np.sort(values, axis=0)[cut : seeds - cut].mean(0)
    assert np.allclose(plot.iqm_interval(values)[0], independent)


def test_intervals_resample_seeds_within_their_task():
    rng = np.random.default_rng(1)
    samples = [rng.normal(0, 1, 8), rng.normal(5, 1, 6)]  # across strata, resampling would give far wider intervals
    _, low, high = plot.iqm_interval(*samples)
    statistics = []
    for _ in range(20_000):
        drawn = np.sort(np.concatenate([rng.choice(sample, len(sample)) for sample in samples]))
        statistics.append(drawn[3:-3].mean())  # 14 values: a quarter is 3.5
    assert np.allclose([low, high], np.percentile(statistics, [2.5, 97.5]), atol=0.06)
    pooled = [np.sort(rng.choice(np.concatenate(samples), 14))[3:-3].mean() for _ in range(20_000)]
    assert np.ptp(np.percentile(pooled, [2.5, 97.5])) > 1.5 * (high - low)


def test_intervals_of_curves_and_of_a_single_seed():
    values = np.random.default_rng(2).normal(size=(5, 7))
    score, low, high = plot.iqm_interval(values)
    assert score.shape == low.shape == high.shape == (7,) and (low <= score).all() and (score <= high).all()
    for g in range(7):  # a curve's interval is that of each of its points, up to the resampling
        assert np.allclose([low[g], high[g]], [x for x in plot.iqm_interval(values[:, g])[1:]], atol=0.15)
    score, low, high = plot.iqm_interval(values[:1])
    assert np.array_equal(score, values[0]) and np.isnan(low).all() and np.isnan(high).all()


@pytest.mark.parametrize(("algo", "interval"), [("skimo", 500), ("spirl", 100)])
def test_smoothing_follows_the_papers_protocol(algo, interval):
    rng = np.random.default_rng(3)
    steps = np.sort(rng.choice(np.arange(1, 60_000), 90, replace=False)).astype(float)
    returns = rng.random(90)
    run = plot.Run("kitchen", algo, 1, np.column_stack([steps, returns, steps]), np.zeros((0, 3)))

    points, values, last = [], [], None  # window by window, in words of the specification
    for end in range(interval, 60_000 + interval, interval):
        inside = [value for step, value in zip(steps, returns) if end - interval < step <= end]
        last = sum(inside) / len(inside) if inside else last
        if last is not None and end - interval < steps[-1]:
            points.append(end)
            values.append(last)
    average, smoothed = sum(values[:10]) / 10, []
    for value in values:
        average = 0.99 * average + 0.01 * value
        smoothed.append(average)
    curve = plot.smooth(run)
    assert np.array_equal(curve[:, 0], points) and np.allclose(curve[:, 1], smoothed)


def test_seeds_are_compared_where_all_of_them_have_values():
    first, second = np.array([[0, 0], [100, 10.0]]), np.array([[50, 1], [200, 1.0]])
    steps, values = plot.on_common_steps([first, second], points=3)
    assert steps.tolist() == [50, 75, 100] and values.tolist() == [[5, 7.5, 10], [1, 1, 1]]
    steps, values = plot.on_common_steps([first[:1], first[:1]])
    assert steps.tolist() == [0] and values.tolist() == [[0], [0]]


def test_a_score_counts_as_reached_from_where_it_stays():
    steps = 500.0 * np.arange(1, 3001)
    returns = np.repeat([1.0, 0.0, 1.0], 1000)  # the first successes count for nothing
    run = plot.Run("maze", "skimo", 1, np.column_stack([steps, returns, steps]), np.zeros((0, 3)))
    curve = plot.smooth(run)
    assert curve[:1000, 1].min() > 0.97 > curve[2000, 1]
    reached = steps[2000:][curve[2000:, 1] >= 0.9][0]
    assert plot.time_to_reach([run], 0.9) == (f"{reached:,.0f}", f"{reached / 60:,.0f}".replace(",", ""))
    run.training[2500:, 1] = 0.0
    assert plot.time_to_reach([run], 0.9) == ("not reached", "not reached")


# ---------------------------------------------------------------------------------------------------- figure and tables


def test_a_grid_is_drawn_and_its_gaps_are_named(tmp_path, capsys, figures):
    results = tmp_path / "results"
    for seed in (1, 2, 3):
        evaluations = [(100_000, 50), (200_000, 90 + 2 * seed)]
        write_result(results, "skimo", seed, [0.0] * 50 + [100.0] * 2_000, evaluations)
        write_result(results, "spirl", seed, [0.0] * 200, evaluations)
    write_result(results, "skimo", 2, [3.0] * 300, [(100_000, 2.0)], task="kitchen")
    write_result(results, "own_method", 2, [3.0] * 300, [(100_000, 4.0)], task="kitchen")
    plot.main(plot.Args(paths=(results,), out=tmp_path / "curves.png"))
    text = capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 20_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "results"]

    missing = next(line for line in text.splitlines() if line.startswith("Missing: "))
    assert missing.removeprefix("Missing: ").rstrip(".").split("; ") == [
        "maze/own_method (seeds 1, 2, 3)",
        "kitchen/skimo (seeds 1, 3)",
        "kitchen/spirl (seeds 1, 2, 3)",
        "kitchen/own_method (seeds 1, 3)",
    ]
    rows = table(text)
    skimo = rows["maze", "skimo"]
    assert (skimo["seeds"], skimo["env steps"]) == ("3", "2,050,000")
    assert skimo["final training score"] == "1.00 [1.00, 1.00]"
    assert skimo["final clean evaluation"] == "0.94 [0.92, 0.96]" and skimo["paper's final score"] == "0.97 at 2M"
    # 1 - .99^n >= .97 after n = 349 windows of 500 env steps; episode 51, the first good one, ends at 51,000.
    assert skimo["env steps to it"] == "225,000" and skimo["RL minutes to it"] == f"{225 / 60:.0f}"
    assert rows["maze", "spirl"]["env steps to it"] == "not reached"
    kitchen = rows["kitchen", "skimo"]
    assert kitchen["final training score"] == "3.00" and kitchen["paper's final score"] == "3.61 at 1M"
    assert rows["kitchen", "own_method"]["paper's final score"] == "not known"
    assert "| skimo | 2 | 0.93 |" in text  # of .92, .94, .96 and, of the kitchen's four sub-tasks, .5

    (figure,) = figures
    labels = [label.get_text() for label in figure.legends[0].get_texts()]
    assert labels == ["skimo", "paper: SkiMo", "spirl", "paper: SPiRL", "own_method"]
    assert any("Shi, Lim & Lee" in label.get_text() for label in figure.texts)
    training = figure.axes[0]
    dashed = {line.get_label(): line.get_xydata() for line in training.lines if line.get_linestyle() == "--"}
    assert set(dashed) == {"paper: SkiMo", "paper: SPiRL"}
    assert [1_000_000, 0.57] in dashed["paper: SkiMo"].tolist()


def test_the_grid_can_be_named(tmp_path, capsys, figures):
    for algo in ("skimo", "spirl"):
        write_result(tmp_path / "results", algo, 1, [100.0] * 50, [(50_000, 100.0)])
    grid = dict(algos=("skimo", "dreamer"), env_ids=("maze",), seeds=(1, 2))
    plot.main(plot.Args(paths=(tmp_path / "results",), out=tmp_path / "curves.png", **grid))
    text = capsys.readouterr().out
    assert "Missing: maze/skimo (seeds 2); maze/dreamer (seeds 1, 2)." in text
    assert list(table(text)) == [("maze", "skimo")]


def test_the_papers_curves_are_whole():
    with plot.PAPER_CURVES.open() as file:
        rows = list(csv.DictReader(file))
    assert len({(row["task"], row["method"], row["env_step"]) for row in rows}) == len(rows)
    for task, (end, methods) in dict(maze=(2e6, 9), kitchen=(1e6, 9), calvin=(2e6, 9)).items():
        curves = plot.paper_curves(task)
        assert len(curves) == methods and set(curves) <= set(plot.METHODS.values())
        best = plot.BEST[task] / plot.UNIT.get(task, 1)
        for curve in curves.values():
            assert (np.diff(curve[:, 0]) > 0).all() and curve[-1, 0] == end
            assert (curve[:, 1] >= 0).all() and (curve[:, 1] <= best).all()
    misaligned = plot.paper_curves("kitchen-misaligned")
    assert len(misaligned) == 9 and misaligned["TD-MPC"].tolist() == [[50_000, 0], [100_000, 0.02]]
    assert plot.paper_curves("kitchen")["SkiMo w/o joint training"][-1].tolist() == [1e6, 3.81]
    assert plot.paper_curves("calvin")["SPiRL"][3].tolist() == [500_000, 1.54]


def test_the_best_returns_are_those_of_the_tasks():
    import data_tools

    assert plot.BEST == data_tools.MAX_RETURN


# ------------------------------------------------------------------------------------------------------------ bad input


def break_csv(results):
    (results / "maze" / "skimo" / "seed1.csv").write_text("step,return\n1,2\n")


def cut_json(results):
    (results / "maze" / "skimo" / "seed1.json").write_text('{"algo": "sk')


def drop_csv(results):
    (results / "maze" / "skimo" / "seed1.csv").unlink()


@pytest.mark.parametrize("damage", [break_csv, cut_json, drop_csv])
def test_damaged_results_are_refused(damage, tmp_path):
    write_result(tmp_path / "results", "skimo", 1, [0.0], [(1000, 0)])
    damage(tmp_path / "results")
    with pytest.raises(SystemExit) as error:
        plot.main(plot.Args(paths=(tmp_path / "results",), out=tmp_path / "curves.png"))
    message = str(error.value)
    assert message.startswith("error: ") and "seed1.json and its CSV are no result of benchmarks/run.py" in message
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(paths=(Path("nowhere"),)), "nowhere holds no results of benchmarks/run.py and is no run folder"),
        (dict(paths=(Path("results"), Path("nowhere"))), "plot one kind at a time"),
        (dict(paths=(Path("results"), Path("results/maze"))), "maze/skimo/seed1 is there twice"),
        (dict(seeds=(7,)), "no result belongs to the grid"),
        (dict(out=Path("curves.nonsense")), "--out curves.nonsense cannot be written"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(changes, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_result(Path("results"), "skimo", 1, [0.0], [(1000, 0)])
    with pytest.raises(SystemExit) as error:
        plot.main(plot.Args(**(dict(paths=(Path("results"),), out=Path("curves.png")) | changes)))
    assert str(error.value).startswith("error: ") and words in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results"]
