"""Runs of every algorithm file: resume, signals, damaged files, full disks, pre-trained models.

A new file in algos/ is tested as soon as it has an entry in golden.FLAGS. Runs are tiny and stay in this process, on
maze episodes of 90 steps; only real signals need programs of their own. What all files have as one text
(tests/test_copies.py) is tried on skimo.py alone.
"""

import copy
import csv
import dataclasses
import errno
import functools
import importlib
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import typing
import zipfile
from pathlib import Path

import golden
import h5py
import numpy as np
import pytest
import torch
import tyro
from conftest import DATA_FILE, refused
from numpy_nets import NO_CURVES, NO_SCORES
from recording import NUM_ENVS, recording
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_copies import definitions

import data_tools
import data_tools.tasks.maze

ROOT = Path(__file__).resolve().parents[1]
ALGOS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
# Of these each file takes what it has.
SHORT = dict(
    pretrain_updates=6, pretrain_eval_interval=2, pretrain_eval_episodes=1, total_timesteps=1200, eval_interval=500,
    warmup_steps=400, updates_per_step=0.05, horizon_steps=800, std_steps=800,
    warmup_skills=40, updates_per_skill=0.5, discover_steps=600, reward_scale=0.5, learning_rate=1e-3, actor_lr=2e-4,
    critic_lr=3e-4, predictor_lr=4e-4, alpha_lr=5e-4, policy_lr=6e-4, value_lr=7e-4, tau=0.1, max_grad_norm=0.01,
    checkpoint_interval=500,
)  # fmt: skip


# Relay relabels pairs of rows, drawn for each of its two levels; the others draw windows, once per update.
PAIRS = ("relay",)
DATA_IN_RL = ("supe",)  # half of their batches are demonstrations


# -------------------------------------------------------------------------------------------------------------- helpers
def algo_module(name: str):
    return importlib.import_module(f"algos.{name}")


def short_flags(module) -> list[str]:
    """Tiny networks; 300 steps of four environments, the first 100 of them without updates."""
    names = {field.name for field in dataclasses.fields(module.Args)}
    flags = f"{golden.TINY} {golden.FLAGS[module.__name__.removeprefix('algos.')]}".split()
    for name, value in SHORT.items():
        if name in names:
            flags += [f"--{name.replace('_', '-')}", str(value)]
    return flags


class Case:
    """One algorithm file, a cache that holds its pre-trained model, and one finished run."""

    def __init__(self, name: str, folder: Path, data_file: Path):
        self.module = algo_module(name)
        self.script = ROOT / "algos" / f"{name}.py"
        self.folder = folder
        self.data_file = data_file
        self.data_dir = self.new_data_dir()
        self.results, self.run_dir = self.start()
        self.flat = name in golden.FLAT  # without skills and offline data
        self.unlearnt = int(name == "diayn")  # evaluations that are not made, as the controller does not learn yet
        self.sampling = "sample_pairs" if name in PAIRS else "sample_windows"
        self.draws = 2 if name in PAIRS else 1  # per update
        self.model = None if self.flat else only(self.data_dir / "pretrained")

    def new(self, kind: str) -> Path:
        """A path that nobody uses."""
        return self.folder / f"{kind}{len(list(self.folder.iterdir()))}"

    def new_data_dir(self) -> Path:
        """A cache with the offline data only."""
        path = self.new("data")
        path.mkdir()
        shutil.copy(self.data_file, path / DATA_FILE)
        return path

    def argv(self, flags="", runs=None, data_dir=None) -> list[str]:
        places = ["--run-dir", str(runs or self.new("runs"))]
        if hasattr(self.module.Args, "data_dir"):
            places += ["--data-dir", str(data_dir or self.data_dir)]
        return [*short_flags(self.module), *places, *flags.split()]

    def main(self, argv):
        args = self.module.parse_args([str(word) for word in argv])
        return self.module.evaluate(args) if args.evaluate else self.module.train(args)

    def start(self, flags="", data_dir=None):
        """A new run in this process: its results and its folder."""
        runs = self.new("runs")
        results = self.main(self.argv(flags, runs, data_dir))
        return results, only(runs)

    def resume(self, run_dir, flags=""):
        return self.main(["--resume", run_dir, *flags.split()])

    def copy_of_run(self) -> Path:
        """The finished run once more, to be damaged."""
        path = self.new("copy")
        shutil.copytree(self.run_dir, path)
        return path


@pytest.fixture(scope="module")
def case(request, tiny_data_file, tmp_path_factory):
    """Parametrised by the name of an algorithm file; case.notes are what its first run did (recording.py)."""
    maze = data_tools.tasks.maze.MazeVectorEnv
    init, advance = maze.__init__, maze.advance

    def short(self, num_envs=1, max_episode_steps=90, *args, **kwargs):
        init(self, num_envs, 90, *args, **kwargs)

    def rewarded(self, actions, running):  # the maze's own reward is 0 here
        _, successes = advance(self, actions, running)
        return running * self.observations()[:, 0] / 40, successes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maze, "__init__", short)
        patch.setattr(maze, "advance", rewarded)
        with pytest.MonkeyPatch.context() as first:
            notes = recording(algo_module(request.param), first)
            case = Case(request.param, tmp_path_factory.mktemp(request.param), tiny_data_file)
        case.notes = notes
        yield case


def one_of_each(*names: str) -> pytest.MarkDecorator:
    """Of files in which these definitions are the same text the first one; files that lack the first are left out."""
    found = {}
    for algo in sorted(ALGOS, key=lambda algo: (algo not in ("skimo", "spirl", "sac"), algo)):
        own = definitions((ROOT / "algos" / f"{algo}.py").read_text())
        if names[0] in own:
            found.setdefault(tuple(own[name] for name in names), algo)
    return pytest.mark.parametrize("case", list(found.values()), indirect=True)


every_algo = pytest.mark.parametrize("case", ALGOS, indirect=True)
skimo_only = pytest.mark.parametrize("case", ["skimo"], indirect=True)


def only(folder) -> Path:
    (path,) = Path(folder).iterdir()
    return path


def rows_of(run_dir):
    """episodes.csv without the minutes."""
    with (run_dir / "episodes.csv").open() as file:
        header, *rows = csv.reader(file)
    assert header == ["env_step", "episodic_return", "episodic_length", "rl_minutes"]
    return [row[:3] for row in rows]


def curves_of(run_dir) -> dict[str, list]:
    """TensorBoard's curves: name -> [(env step or update, value), ...], by steps: names of two files of one second
    sort 10 before 9.
    """
    curves = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0)).Reload()
    points = {name: sorted(curves.Scalars(name), key=lambda point: point.step) for name in curves.Tags()["scalars"]}
    return {name: [(point.step, point.value) for point in curve] for name, curve in points.items()}


def state_of(run_dir):
    """All that the future of a run depends on, from its checkpoint, without clock times."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    del state["args"]
    progress = state["progress"]  # global_step, gradient_step, seconds, episodes, evaluations, facts ...
    state["gradient_step"], state["evaluations"] = progress[1], progress[4]
    state["episodes"] = [tuple(row[:3]) for row in progress[3]]
    rest = [value if not isinstance(value, dict) else value | dict(minutes=0) for value in progress[5:]]
    state["progress"] = [progress[0], progress[1], *rest]
    return state


def assert_same(a, b, path="state"):
    """Nested states are equal, bit for bit."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def after_calls(monkeypatch, owner, name, number, then, counts=lambda *args: True):
    """Run then() within call `number` of owner.name, of those that count."""
    original = getattr(owner, name)
    calls = []

    @functools.wraps(original)  # inspect.getsource finds the original: the model's key stays
    def wrapper(*args, **kwargs):
        if counts(*args):
            calls.append(args)
            if len(calls) == number:
                then()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    return calls


def in_training(envs, *args):
    """Whether an env step is one of training: evaluations have two environments."""
    return envs.num_envs == NUM_ENVS


@pytest.fixture
def stop(case, monkeypatch):
    """The event that signals set."""
    event = threading.Event()
    monkeypatch.setattr(data_tools, "stop_event", lambda: event)
    return event


@pytest.fixture
def no_data(monkeypatch):
    """Whoever asks for offline data fails."""

    def fail(*args, **kwargs):
        raise AssertionError("needs no offline data")

    return lambda: monkeypatch.setattr(data_tools, "load_dataset", fail)


@pytest.mark.parametrize(("name", "flags"), [
    ("skimo", "--env-id maze --pretrain-skills 3"),  # --bc-chunks is 4, in the maze 1
    ("skimo", "--env-id calvin --num-elites 100"),  # of 89 plans, on CALVIN of 153
    ("supe", "--published --target-critics 8"),  # of 5 critics, published 10
    ("qc", "--published --bc-online"),  # needs --num-candidates 0
])  # fmt: skip
def test_flags_are_checked_beside_the_tasks_defaults(name, flags):
    parse = algo_module(name).parse_args
    args = vars(parse(flags.split()))
    assert all(str(args[flag.replace("-", "_")]) == value for flag, value in re.findall(r"--(\S+) (\w+)", flags))
    refused(lambda: parse([*flags.split(), "--gamma", "2"]), "--gamma 2")


@pytest.mark.parametrize("name", ALGOS)
def test_no_file_refuses_its_own_defaults(name):
    ways = [[], ["--published"] * ("published" in vars(algo_module(name).Args))]
    ways += [["--data", "d4rl"] * ("data" in vars(algo_module(name).Args))]
    for env_id in ("maze", "kitchen", "kitchen-misaligned", "calvin"):
        for way in ways:
            assert algo_module(name).parse_args(["--env-id", env_id, *way]).env_id == env_id


def test_what_an_older_version_did_not_know_gets_the_tasks_default(tmp_path):
    """A Kitchen's run that was begun before there were these flags."""
    skimo = algo_module("skimo")
    known = dataclasses.asdict(skimo.parse_args(["--env-id", "kitchen"])) | dict(script="skimo.py")
    kitchen = {name: known.pop(name) for name in ("num_skills", "autotune", "alpha")}
    (tmp_path / "args.json").write_text(json.dumps(known))
    args = vars(skimo.parse_args(["--resume", str(tmp_path)]))
    assert {name: args[name] for name in kitchen} == kitchen != {name: getattr(skimo.Args, name) for name in kitchen}


# --------------------------------------------------------------------------------------------------------------- resume
@every_algo
def test_a_run_in_pieces_ends_as_one_without_a_break(case, stop, no_data, monkeypatch, capsys):
    """Stopped in the warm-up, finished, lengthened, stopped while it learns: the same to the last bit.

    With the pre-trained model that the first run left: RL does not depend on where the model comes from.
    """

    def stopped(at, run):
        """run() is stopped at this env step of each environment, counted from now."""
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped; go on with: .* --resume "):
            after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", at, stop.set, in_training)
            run()
        stop.clear()

    runs = case.new("runs")
    stopped(45, lambda: case.main(case.argv("--total-timesteps 600", runs)))
    part = only(runs)
    assert case.flat or f"pre-trained model: {case.model}" in capsys.readouterr().out
    assert not (part / "results.json").exists()
    assert state_of(part)["global_step"] in (180, 200) and state_of(part)["gradient_step"] == 0
    if case.script.stem not in DATA_IN_RL:
        no_data()  # the checkpoint holds all networks
    case.resume(part)
    stopped(50, lambda: case.resume(part, "--total-timesteps 1200"))
    assert state_of(part)["global_step"] in (800, 840) and state_of(part)["gradient_step"] > 0
    results = case.resume(part)
    a, b = state_of(part), state_of(case.run_dir)
    at_600 = [row for row in a["evaluations"] if row[0] == 600]  # the end of before
    assert len(at_600) == 1
    a["evaluations"].remove(*at_600)
    assert_same(a, b)
    assert rows_of(part) == rows_of(case.run_dir)
    for name in ("env_steps", "updates", "last_100_return"):
        assert results[name] == case.results[name], name
    assert [row for row in results["evaluations"] if row[0] != 600] == case.results["evaluations"]


@pytest.mark.parametrize("case", ["skimo", "reskill", "sac"], indirect=True)
def test_what_a_crash_cut_off_is_drawn_once(case, monkeypatch):
    """Episodes and TensorBoard's curves, after crashes in pre-training and between two checkpoints of RL, are those
    without any.
    """
    original, writers = case.module.SummaryWriter, []
    monkeypatch.setattr(case.module, "SummaryWriter", lambda path: writers.append(original(path)) or writers[-1])
    runs = case.new("runs")
    flags = case.argv("--checkpoint-interval 500", runs, case.data_dir if case.flat else case.new_data_dir())

    def crash():
        writers[-1].close()  # the curves are written, and its thread ends
        raise ZeroDivisionError

    if not case.flat:
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            after_calls(patch, data_tools.OfflineDataset, case.sampling, 5, crash)
            case.main(flags)
        flags = ["--resume", only(runs)]
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        steps = 330 if case.script.stem == "reskill" else 240  # with roll-outs of prior and flow
        after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", steps, crash, in_training)
        case.main(flags)
    case.resume(only(runs) / "checkpoint.pt")
    found, expected = curves_of(only(runs)), curves_of(case.run_dir)
    for curves in (found, expected):
        curves.pop("charts/SPS")
    assert found == expected
    assert rows_of(only(runs)) == rows_of(case.run_dir)


@one_of_each("pretrain", "make_networks")
def test_interrupted_pretraining_goes_on_bit_for_bit(case, stop, monkeypatch):
    """First by the same command, then by --resume."""
    data_dir = case.new_data_dir()

    def stopped(at):
        """A new run that is stopped at this draw of data: how far pre-training is."""
        runs = case.new("runs")
        with monkeypatch.context() as patch, pytest.raises(SystemExit, match="stopped; go on with: .* --resume "):
            after_calls(patch, data_tools.OfflineDataset, case.sampling, at, stop.set)
            case.main(case.argv("", runs, data_dir))
        stop.clear()
        unfinished = only(data_dir / "pretrained")
        assert unfinished.suffix == ".unfinished"
        return only(runs), torch.load(unfinished, weights_only=True)["progress"][0]

    before = 4 if case.draws == 2 else 1  # draws ahead of the first update: a validation's, and relay's demonstrations
    _, updates = stopped(before + case.draws + 1)
    assert 2 <= updates < 4
    part, later = stopped(before + 1)
    assert updates < later < 6
    draws = after_calls(monkeypatch, data_tools.OfflineDataset, case.sampling, 0, None)
    case.resume(part)
    assert sum(args[1] == 8 for args in draws) < 9 * case.draws  # not from the start: six updates and three validations
    a = torch.load(only(data_dir / "pretrained"), weights_only=True)
    b = torch.load(case.model, weights_only=True)
    del a["facts"]["minutes"], b["facts"]["minutes"]
    assert_same(a, b)
    assert_same(state_of(part), state_of(case.run_dir))


@one_of_each("pretrain")
def test_validation_changes_nothing_that_is_learnt(case):
    """A model is found again whatever pretrain_eval_interval is: here after every update instead of every second."""
    data_dir = case.new_data_dir()
    case.start("--pretrain-eval-interval 1 --total-timesteps 40", data_dir)
    a = torch.load(only(data_dir / "pretrained"), weights_only=True)
    b = torch.load(case.model, weights_only=True)
    assert a["facts"]["updates"] == b["facts"]["updates"]
    assert_same(a["networks"], b["networks"])


@every_algo
def test_run_leaves_its_results(case):
    rows = rows_of(case.run_dir)
    assert [[row[0], row[2]] for row in rows] == [[str(360 * k), "90"] for k in range(1, 4) for _ in range(4)]
    assert len({row[1] for row in rows}) == 12
    assert case.results["last_100_return"] == pytest.approx(np.mean([float(row[1]) for row in rows]))
    first = 500 if case.flat else 520  # four environments, skills of ten steps
    expected = [first, 1000, 1200][case.unlearnt :]
    assert [row[0] for row in case.results["evaluations"]] == expected
    assert case.results["env_steps"] == 1200 and case.results["updates"] > 0
    results = json.loads((case.run_dir / "results.json").read_text())
    assert results["updates"] == case.results["updates"]
    assert case.flat or results["pretraining"]["updates"] == 6
    args = json.loads((case.run_dir / "args.json").read_text())
    assert args["total_timesteps"] == 1200 and args["seed"] == 3
    files = sorted(path.name for path in case.run_dir.iterdir() if "tfevents" not in path.name)
    assert files == ["args.json", "checkpoint.pt", "episodes.csv", "lock", "results.json"]


SKIMOS = ["skimo", "skimo_no_cem", "skimo_no_joint", "skimo_sac", "skimo_single_step"]
SKIMO_LOOPS = ["skimo", "skimo_sac", "skimo_single_step"]  # whose `train` is another text


@pytest.mark.parametrize("case", [*SKIMO_LOOPS, "tdmpc_skills"], indirect=True)
def test_nothing_is_learnt_before_every_environment_has_finished_an_episode(case):
    """Four environments have finished an episode of 90 env steps each after 360; .05 updates are due per env step."""
    assert case.start("--total-timesteps 320 --warmup-steps 40")[0]["updates"] == 0
    results, run_dir = case.start("--total-timesteps 400 --warmup-steps 40")
    assert results["updates"] > 0 and results["args"]["warmup_steps"] == 360
    assert len(rows_of(run_dir)) == 4


@pytest.mark.parametrize("case", ["skimo", "skimo_single_step"], indirect=True)
def test_from_episodes_that_are_too_short_nothing_is_learnt(case, monkeypatch, capsys):
    """And it says so. All end at the goal after two skills; a window has three."""
    maze = data_tools.tasks.maze.MazeVectorEnv
    advance = maze.advance

    def early(envs, actions, running):
        rewards, _ = advance(envs, actions, running)
        return rewards, running & (envs.steps >= 19)

    monkeypatch.setattr(maze, "advance", early)
    results, run_dir = case.start("--total-timesteps 480")
    assert results["updates"] == 0
    assert {row[2] for row in rows_of(run_dir)} == {"20"}
    assert f"no window (--num-skills) fits into {len(rows_of(run_dir))} episodes" in capsys.readouterr().out


@every_algo
def test_episodes_are_what_the_environments_gave(case):
    """Returns are sums of the task's rewards, without reward_scale; 300 env steps hold three episodes of 90."""
    rewards = np.array([step[3] for step in case.notes.training.steps])  # (300, E)
    returns = rewards[:270].reshape(3, 90, 4).sum(1)
    np.testing.assert_allclose([float(row[1]) for row in rows_of(case.run_dir)], returns.flatten(), rtol=1e-5)
    evaluated = [np.sum([step[3] for step in of.steps], 0).mean() for of in case.notes.evaluations]
    assert [mean for _, mean, _ in case.results["evaluations"]] == pytest.approx(evaluated, rel=1e-5)


@every_algo
def test_seeds_of_a_run(case):
    """Torch and the environments begin with the run's seed; evaluations have other starts, always the same."""
    of = case.notes.training
    assert (of.torch_seed, of.seed) == (3, 3)
    assert [of.seed for of in case.notes.evaluations] == [10_003] * (3 - case.unlearnt)
    if case.script.stem not in ("sac", "diayn"):  # whose evaluations draw nothing
        assert {of.torch_seed for of in case.notes.evaluations} == {10_003}


@one_of_each("pretrain")
def test_the_prior_is_tried_in_the_environment(case):
    """In an episode after two and four of six updates, in four after the last."""
    returns = [np.sum([step[3] for step in of.steps], 0).mean() for of in case.notes.tried]
    assert case.results["pretraining"]["prior_return"] == pytest.approx(returns[2], rel=1e-5)
    drawn = [value for _, value in curves_of(case.run_dir)["pretrain/prior_return"]]
    assert drawn == pytest.approx(returns, rel=1e-5) and len(set(drawn)) > 1


@every_algo
def test_checkpoints_are_saved_in_time(case):
    """Every 500 env steps and at the end."""
    first = 500 if case.flat else 520
    assert case.notes.saved_at == [first, 1000, 1200]


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in ("relay", "diayn")], indirect=True)
def test_replay_holds_what_the_environments_gave(case):
    """A row is an env step or the ten of a skill. relay stores advantages, diayn has two buffers and its own test."""
    compare_rows(case.notes)
    assert len(case.notes.training.steps) == 300


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in ("relay", "diayn")], indirect=True)
def test_members_end_and_begin_apart(case, monkeypatch):
    """Two of four arrive, after 37 and 60 env steps, the others' time is out after 90: true ends are told from that, a
    skill counts until the end, and only who has ended begins anew.
    """
    maze = data_tools.tasks.maze.MazeVectorEnv
    advance = maze.advance

    def early(envs, actions, running):
        rewards, _ = advance(envs, actions, running)
        return rewards, running & (envs.steps == np.resize([36, 59, -1, -1], envs.num_envs))

    monkeypatch.setattr(maze, "advance", early)
    notes = recording(case.module, monkeypatch)
    case.start("--total-timesteps 700 --eval-interval 9999")
    ends = compare_rows(notes)
    assert len({int(last) for last in ends}) > 2


def compare_rows(notes) -> list[int]:
    """Rows against what the environments gave; returns the env steps at which a member had ended."""
    first, found, begins = 0, [], {0: np.ones(NUM_ENVS, bool)}
    skills = notes.training.skills or [None] * len(notes.rows)  # reskill.py executes them in its own way
    for (last, row), z in zip(notes.rows, skills, strict=True):
        steps = notes.training.steps[first:last]
        before, action, after, rewards, ends, time_outs = (np.stack(of, 1) for of in zip(*steps))  # (E, n, ...)
        ended = ends | time_outs
        expected = dict(next_obs=after[:, -1], rewards=0.5 * rewards.sum(1), step_rewards=rewards, actions=action)
        expected |= dict(terminations=ends[:, -1], truncations=time_outs[:, -1], dones=ended[:, -1])
        expected["steps"] = 1 + (~ended[:, :-1]).sum(1)
        if z is not None:
            expected |= dict(z=z, u=np.tanh(z))
        expected["obs"] = before if "actions" in row else before[:, 0]
        if last - first == 1:
            expected["action"] = action[:, 0]
        if "candidates" in row:  # ten rows: those of a chunk
            expected |= dict(next_obs=after, rewards=0.5 * rewards, terminations=ends, truncations=time_outs)
        if "residuals" in row:
            del expected["actions"]  # before the residual
        for name in row.keys() & expected.keys():
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, err_msg=name)
        if last < len(notes.training.steps):
            begun = (notes.training.steps[last][0] != after[:, -1]).any(1)
            np.testing.assert_array_equal(begun, ended[:, -1])
        if ended[:, -1].any():
            found.append(last)
            begins[last] = ended[:, -1]
        first = last
    assert first == len(notes.training.steps)
    for step, members, obs in notes.begun:
        np.testing.assert_array_equal(members, begins.pop(step))
        for before, *_ in notes.training.steps[step : step + 1]:  # none where the run ends
            np.testing.assert_allclose(obs[members], before[members], rtol=1e-5)
    assert not (notes.begun and begins)
    assert {"rewards", "step_rewards"} & row.keys() and {"terminations", "dones"} & row.keys()
    return found


@one_of_each("train")
def test_scores_and_minutes_go_on_where_a_run_is_resumed(case):
    """150 episodes took 100 minutes and have returns 0 to 149, of which the maze's 100 and more are successes; four new
    ones are none.
    """
    run = case.copy_of_run()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    episodes = [(k, float(k), 90, 0.0) for k in range(150)]
    progress = state["progress"]
    state["progress"] = (*progress[:2], 6000.0, episodes, *progress[4:])
    torch.save(state, run / "checkpoint.pt")
    results = case.resume(run, "--total-timesteps 1440")
    last_100 = [float(row[1]) for row in rows_of(run)[-100:]]
    assert last_100[:96] == list(range(54, 150)) and max(last_100[96:]) < 100
    assert results["last_100_return"] == pytest.approx(np.mean(last_100))
    assert results["last_100_success"] == 0.5
    assert [share for _, share in curves_of(run)["charts/success"][-4:]] == [0.5] * 4
    with (run / "episodes.csv").open() as file:
        minutes = [float(row["rl_minutes"]) for row in csv.DictReader(file)][-4:]
    assert curves_of(run)["charts/SPS"][-1][1] == pytest.approx(1440 / 6000, rel=0.01)
    minutes += [results["rl_minutes"], torch.load(run / "checkpoint.pt", weights_only=True)["progress"][2] / 60]
    assert all(100 <= value < 101 for value in minutes)


@every_algo
def test_curves_are_those_of_the_results(case):
    """TensorBoard's, against episodes.csv and results.json, which other tests compare with the environments."""
    curves = curves_of(case.run_dir)
    rows = np.array(rows_of(case.run_dir), dtype=float)  # env step, return, length
    evaluations = np.array(case.results["evaluations"])  # env step, return, success
    expected = {"charts/episodic_return": rows[:, :2], "charts/episodic_length": rows[:, ::2]}
    expected |= {"eval/episodic_return": evaluations[:, :2], "eval/success": evaluations[:, ::2]}
    expected["eval/episodic_length"] = [(step, 90) for step in evaluations[:, 0]]
    for name, points in expected.items():
        np.testing.assert_allclose(curves[name], points, rtol=1e-5, err_msg=name)
    facts = case.results["pretraining"] if not case.flat else {}
    drawn = ("valid_", "flow_return", "flow_success") if "flow_return" in facts else ("valid_", "prior_")
    for name in (name for name in facts if name.startswith(drawn)):
        assert curves[f"pretrain/{name}"][-1] == (6, pytest.approx(facts[name], rel=1e-5)), name
    if not case.flat:
        assert {step for step, _ in curves["pretrain/prior_return"]} == {2, 4, 6}
        assert {step for step, _ in curves["pretrain/grad_norm"]} == {6}


# Whose updates follow the env steps to the run's end
COUNTED = [name for name in ALGOS if name not in ("dads", "diayn", "option_critic", "relay", "reskill")]


@pytest.mark.parametrize("case", COUNTED, indirect=True)
def test_every_100th_updates_losses_are_drawn(case, monkeypatch):
    """At the env step; the run goes on as if 98 updates had been made, with four more due in the next 40 env steps."""
    run = case.copy_of_run()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    step, _, *rest = state["progress"]
    torch.save(state | dict(progress=(step, 98, *rest)), run / "checkpoint.pt")
    args = json.loads((run / "args.json").read_text())
    from_start = case.script.stem in (*SKIMOS, "tdmpc")  # the warm-up's updates are made after it
    rates = dict(updates_per_step=102.5 / (1240 - (0 if from_start else args.get("warmup_steps", 0))))
    rates |= dict(updates_per_skill=102.5 / (124 - 40))
    (run / "args.json").write_text(json.dumps(args | {name: rates[name] for name in rates if name in args}))
    metrics = []
    update = case.module.Agent.update

    def noted(*inputs, **how):
        metrics.append(update(*inputs, **how))
        return metrics[-1]

    monkeypatch.setattr(case.module.Agent, "update", noted)
    assert case.resume(run, "--total-timesteps 1240")["updates"] == 102
    curves = {name: points for name, points in curves_of(run).items() if name.startswith("losses/")}
    assert len(metrics) == 4 and curves.keys() == {f"losses/{name}" for name in metrics[1]}
    for name, value in metrics[1].items():
        ((step, drawn),) = curves[f"losses/{name}"]
        assert 1200 < step <= 1240 and drawn == pytest.approx(float(value), rel=1e-5), name


@every_algo
def test_losses_are_given_the_parts_that_they_name(case):
    """A slow copy, a frozen encoder, a policy cannot stand for another."""
    wrong = [of for of, right in case.notes.inputs.items() if not right]
    assert not wrong and (case.notes.inputs or case.script.stem in ("relay", "reskill"))


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in ("relay", "reskill")], indirect=True)
def test_every_part_has_its_learning_rate(case):
    """All optimizers take steps; Adam's first moves a weight by the rate. relay and reskill have one for two rates."""
    args = json.loads((case.run_dir / "args.json").read_text())
    assert case.notes.moved.keys() == case.notes.optimizers
    for name, moved in case.notes.moved.items():
        usual = 3e-4 if name == "alpha_optimizer" and case.script.stem in SKIMOS else args.get("learning_rate")
        rate = args.get(name.replace("optimizer", "lr"), usual)
        assert moved == pytest.approx(rate, rel=0.02), name


@pytest.mark.parametrize("case", ["relay", "reskill"], indirect=True)
def test_policies_and_values_in_one_optimizer_have_their_rates(case):
    args = json.loads((case.run_dir / "args.json").read_text())
    assert case.notes.moved["optimizer"] > 0
    assert case.notes.value_lr == {args["value_lr"]}
    assert case.notes.other_lr == {args.get("policy_lr", args.get("learning_rate"))}


BOUNDED = [name for name in ALGOS if hasattr(algo_module(name).Args, "max_grad_norm")]


@pytest.mark.parametrize("case", BOUNDED, indirect=True)
def test_gradients_are_shortened_to_the_bound(case):
    """Of every optimizer but alpha's, whose gradient has one number."""
    norms = {name: max(of) for name, of in case.notes.norms.items() if name != "alpha_optimizer"}
    assert norms == pytest.approx(dict.fromkeys(norms, 0.01), rel=1e-3) and norms


@pytest.mark.parametrize("case", SKIMOS, indirect=True)
def test_gradients_of_pretraining_are_shortened_to_the_bound(case):
    """In six updates; without joint training each of three parts has its own bound."""
    parts = 3 if case.script.stem == "skimo_no_joint" else 1
    assert case.notes.pretraining_norms == pytest.approx([0.01 * parts**0.5] * 6, rel=1e-3)


@pytest.mark.parametrize(("case", "power"), [("qc", 0.5), ("relay", 1)], indirect=["case"])
def test_the_learning_rate_of_pretraining_falls_to_zero(case, power):
    expected = [case.module.Args.pretrain_lr * (1 - k / 6) ** power for k in range(6)]
    assert case.notes.pretraining_lr == pytest.approx(expected)


REMEMBER = ["tdmpc_skills", "dreamer_skills", "tdmpc", "dreamer", "lsp", "dads"]


@pytest.mark.parametrize("case", REMEMBER, indirect=True)
def test_new_episodes_know_nothing_of_the_old_ones(case):
    """Plans, states of the model and skills are forgotten as soon as the four episodes of 90 env steps end."""
    remembered = case.notes.remembered
    assert not remembered.get(90) and remembered[180] == remembered[270] == 0  # 90: actions may be uniform yet
    assert max(remembered.values()) > 0


@pytest.mark.parametrize("case", [*REMEMBER, "hiro"], indirect=True)
def test_evaluations_remember_their_episode(case):
    assert case.notes.kept > 0


@pytest.mark.parametrize("case", ["dreamer", "dreamer_skills", "lsp"], indirect=True)
def test_decoder_begins_with_the_first_batch(case):
    assert case.notes.decoder_starts == [True]


# Each file with a slow copy: what it follows
SLOW = dict.fromkeys(["skimo", "skimo_no_cem", "skimo_no_joint", "skimo_single_step", "tdmpc", "tdmpc_skills"], "model")
SLOW |= dict(skimo_sac="critic", spirl="critics", supe="critics", sac="critics", dads="critics", diayn="critics")
SLOW |= dict(qc="critics")


@pytest.mark.parametrize("case", SLOW, indirect=True)
def test_the_slow_copy_follows(case):
    """Against the weights after every update: it goes a share tau of the way to them, in some files not every time."""
    every = 2 if case.script.stem.startswith(("skimo", "tdmpc")) else 1
    name = SLOW[case.script.stem]
    expected = case.notes.slow_start
    assert torch.equal(expected, case.notes.online_start[name])  # it begins as a copy
    for k, networks in enumerate(case.notes.online, 1):
        if k % every == 0:
            expected = 0.9 * expected + 0.1 * networks[name]
    found = torch.nn.utils.parameters_to_vector(case.notes.slow.parameters()).detach().double()
    assert k > 8 and not torch.allclose(expected, networks[name], rtol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", [name for name in ALGOS if name != "qc"], indirect=True)
def test_it_explores_in_training_and_in_no_evaluation(case):
    """qc.py draws chunks everywhere."""
    assert {E for E, explored in case.notes.explored if explored} == {NUM_ENVS}
    assert (2, False) in case.notes.explored


@pytest.mark.parametrize(
    "case", ["skimo", "skimo_no_joint", "skimo_single_step", "tdmpc_skills", "tdmpc", "supe", "qc"], indirect=True
)
def test_planners_know_the_env_step(case):
    """Plans grow and their noise falls with it, and the warm-up ends; in evaluations, too."""
    told, true = zip(*case.notes.planned_at)
    first = 0 if case.script.stem in ("supe", "qc") else SHORT["warmup_steps"]
    assert told == true and told[0] == first and told[-1] > 1100
    assert case.notes.evaluated_at >= {row[0] for row in case.results["evaluations"]}


WARM_UP = [name for name in ALGOS if hasattr(algo_module(name).Args, "warmup_steps")]  # in env steps


@pytest.mark.parametrize("case", WARM_UP, indirect=True)
def test_nothing_is_learnt_in_the_warm_up(case):
    first = case.notes.updated_at[0]
    assert first >= SHORT["warmup_steps"]
    if case.script.stem in SKIMOS:  # many updates are due at once
        assert first == SHORT["warmup_steps"]


@skimo_only
def test_updates_keep_step_with_the_environments(case):
    results, run_dir = case.start("--updates-per-step 0.0133 --eval-interval 100000")
    assert results["updates"] == int(1200 * 0.0133)
    assert [row[0] for row in results["evaluations"]] == [1200]


# ----------------------------------------------------------------------------------------------------------- evaluation
@one_of_each("evaluate", "rollout")
def test_evaluation_of_a_checkpoint_acts_as_the_one_at_the_runs_end(case, no_data, monkeypatch, capsys, tmp_path):
    """And so does its video, which here is only asked for: tests/test_vector.py looks at one."""
    actions, videos = [], []
    original = data_tools.tasks.maze.MazeVectorEnv.step
    make_envs = data_tools.make_envs

    def step(envs, action):
        if envs.num_envs == 1:
            actions.append(np.array(action))
        return original(envs, action)

    def without_video(env_id, num_envs, video=None):
        videos.extend([video] if video else [])
        return make_envs(env_id, num_envs)

    monkeypatch.setattr(data_tools.tasks.maze.MazeVectorEnv, "step", step)
    monkeypatch.setattr(data_tools, "make_envs", without_video)
    run = case.copy_of_run()
    case.resume(run, "--total-timesteps 1240 --eval-episodes 1")
    no_data()
    runs = tmp_path / "runs"
    flags = ["--evaluate", run / "checkpoint.pt", "--run-dir", runs, "--capture-video", "--threads", 1]
    monkeypatch.setattr(sys, "argv", [str(word) for word in (case.script, *flags)])
    runpy.run_path(str(case.script), run_name="__main__")  # as a user types it
    assert videos == [runs / f"maze__{case.script.stem}.mp4"]
    episodes = np.reshape(actions, (2, 90, 2))
    assert np.array_equal(episodes[0], episodes[1])
    told = capsys.readouterr().out
    assert "to expect: " in told and "maze: 1 episodes of" in told


@skimo_only
def test_an_agent_from_another_machine_is_evaluated_with_what_this_one_has(case, tmp_path):
    path = tmp_path / "agent.pt"
    state = torch.load(case.run_dir / "checkpoint.pt", weights_only=True)
    has = case.module.Args
    state["args"] |= dict(device="cpu" if has.device == "cuda" else "cuda")
    torch.save(state, path)
    args = case.module.parse_args(["--evaluate", str(path)])
    assert (args.device, args.run_dir) == (has.device, has.run_dir)
    assert args.gamma == state["args"]["gamma"] and args.hidden_dim == 16


# ------------------------------------------------------------------------------------------ what would go on wrongly
def flip_bit(path):
    """One bit in the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(path.read_bytes())
    header = largest.header_offset
    names = int.from_bytes(data[header + 26 : header + 28], "little")
    extra = int.from_bytes(data[header + 28 : header + 30], "little")
    data[header + 30 + names + extra + largest.file_size // 2] ^= 16
    path.write_bytes(data)


@every_algo
def test_a_flipped_bit_is_refused_and_nothing_overwritten(case, tmp_path):
    run_dir = case.copy_of_run()
    files = {run_dir / "checkpoint.pt": lambda: case.resume(run_dir, "--total-timesteps 1240")}
    agent = tmp_path / "agent.pt"
    shutil.copy(case.run_dir / "checkpoint.pt", agent)
    files[agent] = lambda: case.main(["--evaluate", agent])
    if not case.flat:
        model = tmp_path / "model.pt"
        shutil.copy(case.model, model)
        files[model] = lambda: case.start(f"--pretrained {model}")
    for path, read in files.items():
        flip_bit(path)
        broken = path.read_bytes()
        refused(read, path, "damaged")
        assert path.read_bytes() == broken and (run_dir / "results.json").exists()


@skimo_only
def test_no_flipped_bit_is_accepted_silently(case, tmp_path):
    path = tmp_path / "checkpoint.pt"
    whole = (case.run_dir / "checkpoint.pt").read_bytes()
    path.write_bytes(whole)
    expected = case.module.load(path, {})
    noticed = 0
    for position in np.linspace(0, len(whole) - 1, 60).astype(int):
        data = bytearray(whole)
        data[position] ^= 4
        path.write_bytes(data)
        try:
            found = case.module.load(path, {})
        except (Exception, SystemExit):
            noticed += 1
        else:
            assert_same(found, expected)  # the bit is in nothing that is read
    assert noticed > 40


@skimo_only
def test_a_run_goes_on_with_its_own_file_only(case, tmp_path, monkeypatch):
    """Another file whose arguments have the same names, a copy of it for instance, would mix two methods in one run."""
    run_dir = case.copy_of_run()
    monkeypatch.setattr(case.module, "FILE", tmp_path / "copied.py")
    refused(lambda: case.resume(run_dir), "another file")
    refused(lambda: case.main(["--evaluate", run_dir / "checkpoint.pt"]), "another file")


@one_of_each("train")
def test_a_finished_run_is_left_as_it_is(case):
    run = case.copy_of_run()
    results = case.resume(run)
    assert_same(state_of(run), state_of(case.run_dir))
    assert rows_of(run) == rows_of(case.run_dir)
    assert {name: results[name] for name in results if name not in ("rl_minutes", "args")} == {
        name: case.results[name] for name in case.results if name not in ("rl_minutes", "args")
    }


@every_algo
def test_a_finished_run_that_was_stopped_later_is_not_finished(case, stop, monkeypatch):
    """Else its results would be those of fewer env steps than its curve."""
    run_dir = case.copy_of_run()
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", 5, stop.set, in_training)
        with pytest.raises(SystemExit, match="stopped; go on with"):
            case.resume(run_dir, "--total-timesteps 2400")
    assert (run_dir / "checkpoint.pt").exists() and not (run_dir / "results.json").exists()


@skimo_only
def test_arguments_of_a_run_cannot_change(case):
    run_dir = case.copy_of_run()
    before = (run_dir / "args.json").read_text()
    for flag in ("--gamma 0.5", "--seed 7", "--hidden-dim 32", "--kl-coef 1", "--published", "--pretrained published"):
        name = flag.split()[0].removeprefix("--").replace("-", "_")
        refused(lambda flag=flag: case.resume(run_dir, flag), name, "--resume")
    assert (run_dir / "args.json").read_text() == before


NUMBERS = """--batch-size 0|--skill-dim 0|--total-timesteps 0|--checkpoint-interval 0|--num-envs 0|--pretrain-updates 0
    |--pretrain-skills 0|--skill-horizon 0|--horizon-steps 0|--hidden-dim -1|--seed -1|--seed 99999999999999999999
    |--gamma 1.5|--tau nan|--tau 2|--rho 1.1|--alpha 0|--learning-rate -1|--updates-per-step nan|--reward-scale inf
    |--num-policy-trajs 1|--num-elites 21|--bc-chunks 4"""


@skimo_only
@pytest.mark.parametrize("flags", [flags.strip() for flags in NUMBERS.split("|")])
def test_numbers_that_mean_nothing_are_refused(case, flags):
    name = flags.split()[0].removeprefix("--").replace("-", "_")
    refused(lambda: case.main(case.argv(flags)), name)


@pytest.mark.parametrize(("name", "flags"), [
    ("dads", "--buffer-size 79"), ("dads", "--warmup-steps 150000"), ("dads", "--discover-steps 0"),
    ("supe", "--offline-ratio 0.95"), ("supe", "--rnd-coef -1"), ("supe", "--target-critics 6"),
    ("supe", "--critic-steps 0"), ("lsp", "--batch-length 1"), ("lsp", "--skill-horizon 1"),
    ("lsp", "--num-elites 17"), ("lsp", "--num-skills 0"), ("diayn", "--warmup-steps 200000"),
    ("diayn", "--controller-alpha 0"), ("diayn", "--buffer-size 1"), ("option_critic", "--batch-size 13"),
    ("option_critic", "--option-epsilon 1.5"), ("option_critic", "--num-episodes 1"),
    ("dreamer_skills", "--batch-length 1"), ("dreamer_skills", "--imagine-steps 1"),
    ("dreamer_skills", "--pretrain-batch-size 1"), ("tdmpc_skills", "--num-elites 999"),
    ("tdmpc_skills", "--num-skills 0"), ("tdmpc_skills", "--policy-std 0"), ("tdmpc_skills", "--policy-std 2"),
    ("tdmpc", "--num-elites 21 --num-samples 16 --num-policy-trajs 4"), ("dreamer", "--batch-length 1"),
    ("qc", "--bc-online"),
])  # fmt: skip
def test_numbers_that_mean_nothing_to_one_file_are_refused(name, flags):
    flag = flags.split()[0].removeprefix("--")
    with pytest.raises(SystemExit, match=f"^error: --({flag}|{flag.replace('-', '_')})"):
        algo_module(name).parse_args(flags.split())


@every_algo
def test_every_file_refuses_such_numbers(case):
    fields = {field.name for field in dataclasses.fields(case.module.Args)}
    for name, value in dict(total_timesteps=-1, num_envs=0, gamma=1.5, tau=float("nan"), learning_rate=-1.0).items():
        if name in fields:
            refused(lambda: case.module.Args(**{name: value}), name)  # noqa: B023


@skimo_only
def test_windows_must_fit_into_episodes(case):
    """Episodes of 90 env steps have nine skills of ten, or eight of eleven and one that is cut short."""
    refused(lambda: case.main(case.argv("--num-skills 10")), "--num-skills")
    for flags in ("--num-skills 9", "--num-skills 9 --skill-horizon 11", "--seed 0 --warmup-steps 0"):
        case.start(f"{flags} --total-timesteps 40", case.new_data_dir())
    refused(lambda: case.main(case.argv("--pretrain-skills 200", data_dir=case.new_data_dir())), "rows", "longest")


@skimo_only
def test_a_task_without_objects_or_arm_takes_no_changed_data(case):
    for flag, word in (("--recombine", "objects"), ("--arm-noise 0.1", "arm")):
        refused(lambda flag=flag: case.main(case.argv(flag, data_dir=case.new_data_dir())), word)


@skimo_only
def test_the_command_line_is_tyros(case, capsys):
    """Values, choices and errors."""
    Args, flags = case.module.Args, ["--seed", "7", "--no-cudagraphs", "--eval-episodes", "3"]
    assert data_tools.command_line(Args, flags, Args(), "") == tyro.cli(Args, args=flags)
    for wrong in (["--device", "abacus"], ["--seed", "x"], ["--no-such-flag", "1"]):
        said = []
        for parse in (functools.partial(data_tools.command_line, Args, wrong, Args(), ""),
                      functools.partial(tyro.cli, Args, args=wrong)):  # fmt: skip
            with pytest.raises(SystemExit):
                parse()
            said.append(re.sub(r"\W+", " ", capsys.readouterr().err))
        assert said[0] == said[1] != ""


@every_algo
def test_help_has_boxes(case, capsys):
    """Each field is there, --run-dir in the box of its comment in Args."""
    Args = case.module.Args
    with pytest.raises(SystemExit):
        data_tools.command_line(Args, ["--help"], Args(), "")
    options, seldom = capsys.readouterr().out.split("Seldom changed options", 1)
    assert "--env-id" in options and "--run-dir" not in options and "--run-dir" in seldom
    names = [field.name.replace("_", "-") for field in dataclasses.fields(Args)]
    assert [name for name in names if f"--{name} " in options + seldom or f"--{name}," in options + seldom] == names


@one_of_each("parse_args")
def test_underscores_in_flags_are_hyphens(case):
    """tyro takes both: the task's defaults must come with either."""
    hyphens = case.module.parse_args(["--env-id", "kitchen"])
    assert case.module.parse_args(["--env_id", "kitchen"]) == hyphens
    assert case.module.parse_args(["--env_id=kitchen"]) == hyphens


@every_algo
def test_learning_that_diverges_ends_with_a_sentence_and_keeps_the_checkpoint(case, monkeypatch):
    original = torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: original(loss * torch.nan))
    run = case.copy_of_run()
    refused(lambda: case.resume(run, "--total-timesteps 1600 --checkpoint-interval 10"), "learning rate")
    state = state_of(run)
    assert 1200 <= state["global_step"] < 1600
    tensors = [value for part in state.values() if isinstance(part, dict) for value in part.values()]
    weights = [value for value in tensors if isinstance(value, torch.Tensor)]
    assert len(weights) > 20 and all(value.isfinite().all() for value in weights)


@skimo_only
def test_pretraining_that_diverges_leaves_no_model(case, monkeypatch):
    original = data_tools.OfflineDataset.sample_windows
    draws = []

    @functools.wraps(original)
    def sample(*args):
        obs, actions = original(*args)
        draws.append(1)
        return (obs * torch.nan if len(draws) == 4 else obs), actions

    monkeypatch.setattr(data_tools.OfflineDataset, "sample_windows", sample)
    data_dir = case.new_data_dir()
    refused(lambda: case.main(case.argv("--pretrain-eval-interval 100", data_dir=data_dir)), "learning rate")
    assert not list((data_dir / "pretrained").glob("*"))


@skimo_only
def test_full_disk_keeps_the_old_checkpoint(case, monkeypatch):
    runs = case.new("runs")
    written = []

    def fsync(number, original=os.fsync):
        original(number)
        written.append(number)
        if len(written) == 3:  # args.json, the first checkpoint, the second one
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(lambda: case.main(case.argv("--checkpoint-interval 500", runs)), "No space left", "free some space")
    run_dir = only(runs)
    assert not list(run_dir.glob("part_*"))
    assert state_of(run_dir)["global_step"] == 520
    case.resume(run_dir)
    assert_same(state_of(run_dir), state_of(case.run_dir))


# --------------------------------------------------------------------------------------------------- pre-trained models
def another(field, value):
    """Another value of an argument."""
    if typing.get_origin(field.type) is typing.Literal:
        return next(choice for choice in typing.get_args(field.type) if choice != value)
    if isinstance(value, bool):
        return not value
    return 2 * value + 1


class Found(Exception):
    """Pre-training begins: no model was found."""


def load_data(args):
    return data_tools.load_dataset(args.env_id, args.data_dir, args.data, args.data_share)


def is_found(case, args, monkeypatch) -> bool:
    """Whether pre-training finds its model in the cache."""
    module = case.module

    def begin(*inputs):
        raise Found

    with monkeypatch.context() as patch:
        patch.setattr(data_tools.OfflineDataset, "split", functools.wraps(data_tools.OfflineDataset.split)(begin))
        try:
            module.pretrain(args, module.make_networks(args), load_data(args), None, threading.Event())
        except Found:
            return False
    return True


@one_of_each("pretrain")
def test_pretrained_model_is_found_by_all_that_shaped_it(case, tmp_path, monkeypatch):
    monkeypatch.setattr(data_tools, "code_of", functools.cache(data_tools.code_of))
    module = case.module
    args = module.parse_args(case.argv())
    find = functools.partial(is_found, case, monkeypatch=monkeypatch)
    assert find(args)
    fields = {field.name: field for field in dataclasses.fields(module.Args)}
    names = list(fields)
    shaping = names[names.index("skill_horizon") : names.index("num_envs")]
    assert len(shaping) >= 10
    for name in ["seed", *shaping]:
        changed = copy.copy(args)  # without the checks: a number may be senseless
        setattr(changed, name, another(fields[name], getattr(args, name)))
        with monkeypatch.context() as patch:
            patch.setattr(module, "load", lambda *inputs: pytest.fail("found"))
            assert not find(changed), name
    for name in {"gamma", "learning_rate", "num_envs", "warmup_steps", "total_timesteps", "device"} & fields.keys():
        changed = copy.copy(args)
        setattr(changed, name, another(fields[name], getattr(args, name)) if name != "device" else "cpu")
        assert find(changed), name

    # Other data, another task, other code make another model, comments and docstrings do not.
    other = case.new_data_dir()
    with h5py.File(other / DATA_FILE, "r+") as file:
        file["actions"][5, 0] = 0.25
    shutil.copytree(case.data_dir / "pretrained", other / "pretrained")
    assert not find(dataclasses.replace(args, data_dir=str(other)))
    for change in (dict(obs_scale=(0.5, 1, 1, 1)), dict(obs_shift=(0.5, 0, 0, 0)), dict(objects=((2, 3),))):
        with monkeypatch.context() as patch:
            patch.setitem(data_tools.TASKS, "maze", dataclasses.replace(data_tools.TASKS["maze"], **change))
            assert not find(args), change
    source = case.script.read_text()
    for section in ("networks", "pre-training"):
        head = f"- {section}\n"
        for added, same in (("# a comment\n", True), ("x = 1\n", False)):
            edited = tmp_path / "edited.py"
            edited.write_text(source.replace(head, head + added, 1))
            with monkeypatch.context() as patch:
                patch.setattr(module, "FILE", edited)
                assert find(args) == same, (section, added)


@pytest.mark.parametrize("case", ["skimo", "skimo_no_joint", "skimo_single_step", "spirl", "qc"], indirect=True)
def test_pretraining_learns_from_shifted_arms_and_recombined_objects_and_is_judged_without(case, monkeypatch, tmp_path):
    """Updates see what `recombined` and `perturb` return; the held-out episode stays as it is."""
    module = case.module
    flags = "--env-id kitchen --device cpu --hidden-dim 16 --pretrain-updates 4 --pretrain-eval-interval 2 --recombine"
    flags += f" --pretrain-batch-size 4 --pretrain-eval-episodes 2 --arm-noise 0.1 --data-dir {tmp_path}"
    args = module.parse_args(flags.split())
    networks = module.make_networks(args)
    ends = np.arange(1, 40_001) % 400 == 0
    obs = np.where(np.arange(40_000) < 39_600, 1, 2)[:, None] * np.ones(30)  # the last of 100 episodes is held out
    data = data_tools.OfflineDataset(obs, np.zeros((40_000, 9)), ends & False, ends)
    seen, recombined = [], []

    def loss(*inputs):
        obs = inputs[-3]
        seen.append((obs.min().item(), obs.max().item()))
        return sum(weight.sum() for weight in networks.parameters()), {}

    def recombine(data, objects, seed):
        recombined.append((len(data), objects, seed))
        return data

    monkeypatch.setattr(module, "pretrain_loss", loss)
    monkeypatch.setattr(data_tools, "recombined", recombine)
    monkeypatch.setattr(data_tools, "perturb", lambda obs, actions, arm, std: (obs + 10, actions))
    monkeypatch.setattr(module, "rollout", lambda *inputs, **how: NO_SCORES)
    module.pretrain(args, networks, data, NO_CURVES, threading.Event())
    learnt, judged = (11, 11), (2, 2)
    assert seen == [learnt, learnt, judged] * 2
    assert recombined == [(99 * 400, data_tools.TASKS["kitchen"].objects, 1)]


@one_of_each("pretrain")
def test_kitchens_share_a_pretrained_model(case, tmp_path, monkeypatch):
    golden.make_data(tmp_path / "kitchen.hdf5", 30, 9)
    args = []
    for env_id in ("kitchen", "kitchen-misaligned"):  # which share their data
        flags = f"--env-id {env_id} --data {tmp_path / 'kitchen.hdf5'} --pretrain-updates 1"
        args.append(case.module.parse_args(case.argv(flags, data_dir=tmp_path)))
    monkeypatch.setattr(case.module, "rollout", lambda *inputs, **how: NO_SCORES)
    case.module.pretrain(args[0], case.module.make_networks(args[0]), load_data(args[0]), NO_CURVES, threading.Event())
    assert is_found(case, args[1], monkeypatch)


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in golden.FLAT], indirect=True)
def test_the_data_are_those_asked_for_and_refused_ones_leave_no_run_folder(case, tmp_path, monkeypatch):
    def refuse(*asked):
        assert asked == ("maze", str(tmp_path), "mine.hdf5", 0.5)
        raise data_tools.DataError("refused")

    monkeypatch.setattr(data_tools, "load_dataset", refuse)
    flags = case.argv("--data mine.hdf5 --data-share 0.5", tmp_path / "runs", tmp_path)
    refused(lambda: case.main(flags), "refused")
    assert not list(tmp_path.iterdir())


@skimo_only
def test_model_given_by_its_path_needs_no_data(case, no_data):
    no_data()
    _, run_dir = case.start(f"--pretrained {case.model}")
    assert_same(state_of(run_dir), state_of(case.run_dir))


@one_of_each("pretrain")
def test_only_a_model_of_this_method_with_these_settings_is_taken(case, tmp_path):
    """Also where shapes agree: the model says what made it. tests/test_states.py tries files of other sorts."""
    module, path = case.module, tmp_path / "model.pt"
    refused(lambda: case.start(f"--pretrained {case.model} --skill-horizon 12"), case.model, "--skill-horizon")
    state = torch.load(case.model, weights_only=True)
    assert state["made_by"]["method"] == module.PRETRAINED and state["made_by"]["data"] == "maze"
    torch.save(state | dict(made_by=state["made_by"] | dict(method="another")), path)
    refused(lambda: case.start(f"--pretrained {path}"), path, "another", module.PRETRAINED)
    refused(lambda: case.start(f"--pretrained {case.run_dir / 'checkpoint.pt'}"), "--resume", "--evaluate")
    refused(lambda: case.main(["--evaluate", case.model]), case.model, "--pretrained")


# -------------------------------------------------------------------------------------------------------- real signals
def wait_for(process, log, words, seconds=300):
    """Until the program has written the words into the file log."""
    limit = time.time() + seconds
    while words not in log.read_text():
        assert process.poll() is None, log.read_text()
        assert time.time() < limit, log.read_text()
        time.sleep(0.05)


def signalled(command, cwd, words, number):
    """What a program wrote that got a signal soon after it wrote the words."""
    log = cwd / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=file)
    with process:
        wait_for(process, log, words)
        time.sleep(0.3)
        process.send_signal(number)
        process.wait(timeout=300)
    assert process.returncode == 1, log.read_text()
    assert "Traceback" not in log.read_text()
    return log.read_text()


@skimo_only
def test_signalled_program_saves_and_goes_on(case, tmp_path):
    """Ctrl-C in pre-training, the signal of a cluster in RL."""
    data_dir = case.new_data_dir()
    flags = "--pretrain-updates 400 --pretrain-eval-interval 1000 --total-timesteps 1000000 --eval-interval 10000000"
    command = [sys.executable, str(case.script), *case.argv(flags, tmp_path / "runs", data_dir)]
    written = signalled(command, tmp_path, "pre-training:", signal.SIGINT)
    assert "stopping: saves first" in written and f"--resume {tmp_path / 'runs'}" in written
    updates = torch.load(only(data_dir / "pretrained"), weights_only=True)["progress"][0]
    assert 0 < updates < 400

    shutil.rmtree(tmp_path / "runs")
    written = signalled(command, tmp_path, "RL:", signal.SIGTERM)
    run_dir = only(tmp_path / "runs")
    assert f"--resume {run_dir}" in written
    step = state_of(run_dir)["global_step"]
    assert 0 < step < 1_000_000
    case.resume(run_dir, f"--total-timesteps {step + 40}")
    assert step + 40 <= state_of(run_dir)["global_step"] < step + 80
