"""Runs of every algorithm file: resume, signals, damaged files, full disks, pre-trained models.

A new file in algos/ is tested as soon as it has an entry in golden.FLAGS. Runs are tiny and stay in this process, on
maze episodes of 90 steps; only real signals need programs of their own. What costs much is tried on skimo.py alone.
"""

import ast
import csv
import dataclasses
import errno
import functools
import importlib
import inspect
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import typing
import zipfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import golden
import numpy as np
import pytest
import torch
from conftest import DATA_FILE
from recording import NUM_ENVS, recording
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

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
)  # fmt: skip


# Relay relabels pairs of rows, drawn for each of its two levels; the others draw windows, once per update.
PAIRS = ("relay",)


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

    def new_data_dir(self) -> Path:
        """A cache with the offline data only."""
        path = self.folder / f"data{len(list(self.folder.iterdir()))}"
        path.mkdir()
        shutil.copy(self.data_file, path / DATA_FILE)
        return path

    def argv(self, flags="", runs=None, data_dir=None) -> list[str]:
        runs = runs or self.folder / f"runs{len(list(self.folder.iterdir()))}"
        places = ["--data-dir", str(data_dir or self.data_dir), "--run-dir", str(runs)]
        words = short_flags(self.module)
        if "--pretrained " in flags:  # a finished model takes no flags of pre-training
            unused = ["--" + name.replace("_", "-") for name in self.module.PRETRAINING.split()]
            words = [word for pair in zip(words[::2], words[1::2]) if pair[0] not in unused for word in pair]
        return [*words, *places, *flags.split()]

    def main(self, argv):
        return self.module.main(self.module.parse_args([str(word) for word in argv]))

    def start(self, flags="", data_dir=None):
        """A new run in this process: its results and its folder."""
        runs = self.folder / f"runs{len(list(self.folder.iterdir()))}"
        results = self.main(self.argv(flags, runs, data_dir))
        return results, only(runs)

    def interrupted(self, match, flags="", data_dir=None) -> Path:
        """A new run that is interrupted: its folder."""
        runs = self.folder / f"runs{len(list(self.folder.iterdir()))}"
        with pytest.raises(SystemExit, match=match):
            self.main(self.argv(flags, runs, data_dir))
        return only(runs)

    def resume(self, run_dir, flags=""):
        return self.main(["--resume", run_dir, *flags.split()])

    def copy_of_run(self) -> Path:
        """The finished run once more, to be damaged."""
        path = self.folder / f"copy{len(list(self.folder.iterdir()))}"
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


every_algo = pytest.mark.parametrize("case", ALGOS, indirect=True)
with_data = pytest.mark.parametrize("case", [name for name in ALGOS if name not in golden.FLAT], indirect=True)
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
    """TensorBoard's curves: name -> [(env step or update, value), ...]."""
    curves = EventAccumulator(str(run_dir), size_guidance=dict(scalars=0)).Reload()
    return {name: [(point.step, point.value) for point in curves.Scalars(name)] for name in curves.Tags()["scalars"]}


def state_of(run_dir):
    """All that the future of a run depends on, from its checkpoint, without clock times."""
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)
    del state["seconds"], state["args"]
    state.get("facts", {}).pop("minutes", None)
    state["episodes"] = [tuple(row[:3]) for row in state["episodes"]]
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
    """An event in place of the one that signals set."""
    event = threading.Event()
    monkeypatch.setattr(case.module, "stop_at_signals", lambda: event)
    return event


@pytest.fixture
def no_data(monkeypatch):
    """Whoever asks for offline data fails."""

    def fail(*args, **kwargs):
        raise AssertionError("needs no offline data")

    return lambda: monkeypatch.setattr(data_tools, "load_dataset", fail)


def refused(call, *words):
    """call() ends with one sentence that holds the words."""
    with pytest.raises(SystemExit) as caught:
        call()
    message = caught.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message, message
    for word in words:
        assert str(word) in message, message


# --------------------------------------------------------------------------------------------------------------- resume
@every_algo
@pytest.mark.parametrize("step", [45, 195], ids=["in the warm-up", "while it learns"])
def test_interrupted_rl_goes_on_bit_for_bit(case, step, stop, no_data, monkeypatch):
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", step, stop.set, in_training)
        part = case.interrupted(r"stopped at env step (180|200|780|800); go on with: .* --resume ")
    assert not (part / "results.json").exists()
    assert (state_of(part)["gradient_step"] > 0) == (step == 195)
    stop.clear()
    no_data()  # the checkpoint holds all networks
    results = case.resume(part)
    assert_same(state_of(part), state_of(case.run_dir))
    assert rows_of(part) == rows_of(case.run_dir)
    for name in ("env_steps", "updates", "last_100_return", "evaluations"):
        assert results[name] == case.results[name], name


@pytest.mark.parametrize("case", ["tdmpc_skills", "dreamer_skills"], indirect=True)
def test_interrupted_run_with_the_releases_defects_goes_on(case, stop, monkeypatch):
    """They store what led into a state: it has to be in the checkpoint."""
    _, whole = case.start("--release-defects")
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", 195, stop.set, in_training)
        part = case.interrupted("stopped at env step", "--release-defects")
    stop.clear()
    case.resume(part)
    assert_same(state_of(part), state_of(whole))


@every_algo
def test_finished_run_can_be_lengthened(case, no_data):
    _, part = case.start("--total-timesteps 600")
    no_data()
    results = case.resume(part, "--total-timesteps 1200")
    a, b = state_of(part), state_of(case.run_dir)
    evaluations = a.pop("evaluations")
    rest = [row for row in evaluations if row[0] != 600]  # the end of before
    assert len(rest) == len(evaluations) - 1 and rest == b.pop("evaluations")
    assert_same(a, b)
    assert rows_of(part) == rows_of(case.run_dir)
    assert results["updates"] == case.results["updates"] > 0


@with_data
@pytest.mark.parametrize("by", ["the same command", "resume"])
def test_interrupted_pretraining_goes_on_bit_for_bit(case, by, stop, monkeypatch):
    data_dir = case.new_data_dir()
    with monkeypatch.context() as patch:
        # In the second update. Before the first one: a draw for validation, and relay's demonstrations.
        before = 4 if case.draws == 2 else 1
        after_calls(patch, data_tools.OfflineDataset, case.sampling, before + case.draws + 1, stop.set)
        part = case.interrupted("stopped in pre-training; the same command goes on", data_dir=data_dir)
    unfinished = only(data_dir / "pretrained")
    updates = torch.load(unfinished, weights_only=True)["updates"]
    assert unfinished.suffix == ".unfinished" and 2 <= updates < 6
    stop.clear()
    draws = after_calls(monkeypatch, data_tools.OfflineDataset, case.sampling, 0, None)
    if by == "the same command":
        _, part = case.start(data_dir=data_dir)
    else:
        case.resume(part)
    assert sum(args[1] == 8 for args in draws) < 9 * case.draws  # not from the start: six updates and three validations
    a = torch.load(only(data_dir / "pretrained"), weights_only=True)
    b = torch.load(case.model, weights_only=True)
    del a["facts"]["minutes"], b["facts"]["minutes"]
    assert_same(a, b)
    assert_same(state_of(part), state_of(case.run_dir))


@skimo_only
def test_unfinished_pretraining_serves_runs_with_other_rl_arguments(case, stop, monkeypatch):
    data_dir = case.new_data_dir()
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.OfflineDataset, "sample_windows", 4, stop.set)
        case.interrupted("stopped in pre-training", data_dir=data_dir)
    unfinished = only(data_dir / "pretrained")
    state = torch.load(unfinished, weights_only=True)
    torch.save(state | dict(seconds=6000.0), unfinished)
    stop.clear()
    calls = after_calls(monkeypatch, case.module, "pretrain_lr", 0, None)
    flags = "--num-envs 3 --alpha 0.3 --no-autotune --num-samples 8 --total-timesteps 450"
    results, _ = case.start(flags, data_dir)
    assert [args[0] for args in calls] == list(range(state["updates"], 6))
    assert 100 <= results["pretraining"]["minutes"] < 101  # those of the first command count


@with_data
def test_rl_does_not_depend_on_where_the_model_comes_from(case, capsys):
    _, again = case.start()
    assert f"pre-trained model: {case.model}" in capsys.readouterr().out
    assert_same(state_of(again), state_of(case.run_dir))
    assert rows_of(again) == rows_of(case.run_dir)


@pytest.mark.parametrize("case", ["skimo", "skimo_no_joint", "spirl", "relay"], indirect=True)
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
    assert files == ["args.json", "checkpoint.pt", "episodes.csv", "results.json"]


@every_algo
def test_run_that_is_too_short_to_learn_says_so(case, capsys):
    results, _ = case.start("--total-timesteps 120")
    assert results["updates"] == 0
    assert "no update" in capsys.readouterr().out
    case.resume(case.copy_of_run())
    assert "no update" not in capsys.readouterr().out


SKIMOS = ["skimo", "skimo_no_cem", "skimo_no_joint", "skimo_sac", "skimo_single_step"]
WARM_UP_OF_SKILLS = [*SKIMOS, "dreamer_skills", "tdmpc_skills"]


@pytest.mark.parametrize("case", WARM_UP_OF_SKILLS, indirect=True)
def test_nothing_is_learnt_before_every_environment_has_finished_an_episode(case):
    """Four environments have finished an episode of 90 env steps each after 360; .05 updates are due per env step."""
    assert case.start("--total-timesteps 320 --warmup-steps 40")[0]["updates"] == 0
    results, run_dir = case.start("--total-timesteps 400 --warmup-steps 40")
    assert results["updates"] > 0 and results["args"]["warmup_steps"] == 360
    assert len(rows_of(run_dir)) == 4


@pytest.mark.parametrize("case", ["skimo", "skimo_no_cem", "skimo_single_step"], indirect=True)
def test_from_episodes_that_are_too_short_nothing_is_learnt(case, monkeypatch):
    """All end at the goal after two skills; a window has three."""
    maze = data_tools.tasks.maze.MazeVectorEnv
    advance = maze.advance

    def early(envs, actions, running):
        rewards, _ = advance(envs, actions, running)
        return rewards, running & (envs.steps >= 19)

    monkeypatch.setattr(maze, "advance", early)
    results, run_dir = case.start("--total-timesteps 480")
    assert results["updates"] == 0
    assert {row[2] for row in rows_of(run_dir)} == {"20"}


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
    expected = [(10_003, 10_003)] * (3 - case.unlearnt)
    assert [(of.torch_seed, of.seed) for of in case.notes.evaluations] == expected


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in ("relay", "diayn")], indirect=True)
def test_replay_holds_what_the_environments_gave(case):
    """A row is an env step or the ten of a skill. relay stores advantages, diayn has two buffers and its own test."""
    first = 0
    for last, row in case.notes.rows:
        steps = case.notes.training.steps[first:last]
        before, action, after, rewards, ends, time_outs = (np.stack(of, 1) for of in zip(*steps))  # (E, n, ...)
        ended = ends | time_outs
        expected = dict(next_obs=after[:, -1], rewards=0.5 * rewards.sum(1), step_rewards=rewards, actions=action)
        expected |= dict(terminations=ends[:, -1], truncations=time_outs[:, -1], ended=ended[:, -1])
        expected["steps"] = np.full(4, last - first)
        expected["obs"] = before if "actions" in row else before[:, 0]
        if last - first == 1:
            expected["action"] = action[:, 0]
        if "residuals" in row:
            del expected["actions"]  # before the residual
        for name in row.keys() & expected.keys():
            np.testing.assert_allclose(row[name], expected[name], rtol=1e-5, err_msg=name)
        first = last
    assert first == len(case.notes.training.steps) == 300
    assert {"rewards", "step_rewards"} & row.keys()


@every_algo
def test_scores_and_minutes_go_on_where_a_run_is_resumed(case):
    """150 episodes took 100 minutes and have returns 0 to 149, of which the maze's 100 and more are successes; four new
    ones are none.
    """
    run = case.copy_of_run()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state |= dict(episodes=[(k, float(k), 90, 0.0) for k in range(150)], seconds=6000.0)
    torch.save(state, run / "checkpoint.pt")
    results = case.resume(run, "--total-timesteps 1440")
    last_100 = [float(row[1]) for row in rows_of(run)[-100:]]
    assert last_100[:96] == list(range(54, 150)) and max(last_100[96:]) < 100
    assert results["last_100_return"] == pytest.approx(np.mean(last_100))
    assert results["last_100_success"] == 0.5
    assert [share for _, share in curves_of(run)["charts/success"][-4:]] == [0.5] * 4
    with (run / "episodes.csv").open() as file:
        minutes = [float(row["rl_minutes"]) for row in csv.DictReader(file)][-4:]
    minutes += [results["rl_minutes"], torch.load(run / "checkpoint.pt", weights_only=True)["seconds"] / 60]
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
    for name in (name for name in facts if name.startswith(("valid_", "prior_"))):
        assert curves[f"pretrain/{name}"][-1] == (6, pytest.approx(facts[name], rel=1e-5)), name
    if not case.flat:
        assert {step for step, _ in curves["pretrain/prior_return"]} == {2, 4, 6}
        assert {step for step, _ in curves["pretrain/grad_norm"]} == {6}


@pytest.mark.parametrize("case", SKIMOS, indirect=True)
def test_every_100th_updates_losses_are_drawn(case, monkeypatch):
    """At the env step; the run goes on as if 98 updates had been made, with four more due in the next 40 env steps."""
    run = case.copy_of_run()
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    torch.save(state | dict(gradient_step=98), run / "checkpoint.pt")
    args = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(args | dict(updates_per_step=102.5 / 1240)))
    metrics = []
    update = case.module.Agent.update

    def noted(*inputs, **how):
        metrics.append(update(*inputs, **how))
        return metrics[-1]

    monkeypatch.setattr(case.module.Agent, "update", noted)
    assert case.resume(run, "--total-timesteps 1240 --eval-interval 0")["updates"] == 102
    curves = {name: points for name, points in curves_of(run).items() if name.startswith("losses/")}
    assert len(metrics) == 4 and curves.keys() == {f"losses/{name}" for name in metrics[1]}
    for name, value in metrics[1].items():
        assert curves[f"losses/{name}"] == [(1240, pytest.approx(float(value), rel=1e-5))], name


@every_algo
def test_losses_are_given_the_parts_that_they_name(case):
    """A slow copy, a frozen encoder, a policy cannot stand for another."""
    wrong = [of for of, right in case.notes.inputs.items() if not right]
    assert not wrong and (case.notes.inputs or case.module.__name__.endswith(("relay", "reskill")))


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in ("relay", "reskill")], indirect=True)
def test_every_part_has_its_learning_rate(case):
    """All optimizers take steps; Adam's first moves a weight by the rate. relay and reskill have one for two rates."""
    args = json.loads((case.run_dir / "args.json").read_text())
    assert case.notes.moved.keys() == case.notes.optimizers
    for name, moved in case.notes.moved.items():
        rate = args.get(name.replace("optimizer", "lr"), args.get("learning_rate"))
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
    """In six updates, without joint training those of each of three optimizers."""
    steps = 18 if case.module.__name__.endswith("no_joint") else 6
    assert case.notes.pretraining_norms == pytest.approx([0.01] * steps, rel=1e-3)


REMEMBER = ["tdmpc_skills", "dreamer_skills", "tdmpc", "dreamer", "lsp", "dads", "hiro"]


@pytest.mark.parametrize("case", REMEMBER, indirect=True)
def test_new_episodes_know_nothing_of_the_old_ones(case):
    """Plans, states of the model, skills and goals are forgotten as soon as the four episodes of 90 env steps end."""
    assert case.notes.forgotten == [(steps, True, True, True, True) for steps in (90, 180, 270)]


@pytest.mark.parametrize("case", ["dreamer", "dreamer_skills", "lsp"], indirect=True)
def test_decoder_begins_with_the_first_batch(case):
    assert case.notes.decoder_starts == [True]


# Each file with a slow copy: what it follows
SLOW = dict.fromkeys(["skimo", "skimo_no_cem", "skimo_no_joint", "skimo_single_step", "tdmpc", "tdmpc_skills"], "model")
SLOW |= dict(skimo_sac="critic", spirl="critics", sac="critics", dads="critics", diayn="critics")


@pytest.mark.parametrize("case", SLOW, indirect=True)
def test_the_slow_copy_follows(case):
    """Against the weights after every update: it goes a share tau of the way to them, in some files not every time."""
    args = json.loads((case.run_dir / "args.json").read_text())
    every = args.get("target_update_interval", 1)
    name = SLOW[case.module.__name__.removeprefix("algos.")]
    expected = case.notes.slow_start
    for k, networks in enumerate(case.notes.online, 1):
        if k % every == 0:
            expected = 0.9 * expected + 0.1 * networks[name]
    found = torch.nn.utils.parameters_to_vector(case.notes.slow.parameters()).detach().double()
    assert k > 8 and not torch.allclose(expected, networks[name], rtol=1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# Each file with a policy over skills: how 30 skills of training, ten of them in the warm-up, and 27 of evaluations are
# chosen, if not by a planner
CHOICES = dict.fromkeys(["spirl", "skimo_sac", "skimo_no_cem"], dict(sample_policy=30, policy_mode=27))
CHOICES |= dict.fromkeys(["skimo", "skimo_no_joint", "skimo_single_step"], dict(sample_policy=10))
CHOICES |= dict(tdmpc_skills=dict(sample_prior=10))


@pytest.mark.parametrize("case", CHOICES, indirect=True)
def test_training_draws_skills_and_evaluation_does_not(case):
    assert case.notes.choices == CHOICES[case.module.__name__.removeprefix("algos.")]


@every_algo
def test_it_explores_in_training_and_in_no_evaluation(case):
    if not case.notes.explored:
        pytest.skip("it chooses by samples of its policy or by their mode: see CHOICES")
    assert case.notes.explored == {(NUM_ENVS, True), (2, False)}


@pytest.mark.parametrize(
    "case", ["skimo", "skimo_no_joint", "skimo_single_step", "tdmpc_skills", "tdmpc"], indirect=True
)
def test_planners_know_the_env_step(case):
    """Their plans grow and their noise falls with it."""
    told, true = zip(*case.notes.planned_at)
    assert told == true and told[0] == SHORT["warmup_steps"] and told[-1] > 1100


@every_algo
def test_nothing_is_learnt_in_the_warm_up(case):
    if "warmup_steps" not in {field.name for field in dataclasses.fields(case.module.Args)}:
        pytest.skip("it has none that is counted in env steps")
    first = case.notes.updated_at[0]
    assert first >= SHORT["warmup_steps"]
    if case.script.stem in SKIMOS:  # many updates are due at once
        assert first == SHORT["warmup_steps"]


@skimo_only
def test_updates_keep_step_with_the_environments(case):
    results, run_dir = case.start("--updates-per-step 0.0133 --eval-interval 0")
    assert results["updates"] == int(1200 * 0.0133)
    assert [row[0] for row in results["evaluations"]] == [1200]


# ----------------------------------------------------------------------------------------------------------- evaluation
@every_algo
def test_evaluation_of_a_checkpoint_acts_as_the_one_at_the_runs_end(case, no_data, monkeypatch, capsys, tmp_path):
    """And so do the videos of both, which here are only asked for: tests/test_vector.py looks at one."""
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
    if case.script.stem == "reskill":  # its other pictures show the data
        monkeypatch.setattr(case.module, "draw_pictures", lambda *inputs: None)
    run = case.copy_of_run()
    case.resume(run, "--total-timesteps 1240 --eval-interval 0 --eval-episodes 1 --capture-video")
    no_data()
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    runs.mkdir()
    case.main(["--evaluate", run / "checkpoint.pt", "--run-dir", runs, "--capture-video"])
    assert videos == [run / "evaluation.mp4", runs / f"maze__{case.script.stem}__3__evaluation.mp4"]
    episodes = np.reshape(actions, (4, 90, 2))  # the run's evaluation and its video, then both once more
    assert np.array_equal(episodes, np.broadcast_to(episodes[0], episodes.shape))
    assert "maze: 1 episodes of" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [runs]


@every_algo
def test_an_agent_from_another_machine_is_evaluated_with_what_this_one_has(case, tmp_path):
    path = tmp_path / "agent.pt"
    state = torch.load(case.run_dir / "checkpoint.pt", weights_only=True)
    has = case.module.Args
    other = "cpu" if has.device == "cuda" else "cuda"
    state["args"] |= dict(device=other, cudagraphs=not has.cudagraphs, capture_video=True)
    torch.save(state, path)
    args = case.module.parse_args(["--evaluate", str(path)])
    assert (args.device, args.cudagraphs, args.capture_video) == (has.device, has.cudagraphs, False)
    assert args.gamma == state["args"]["gamma"] and args.hidden_dim == 16


# ----------------------------------------------------------------------------------------------------- damaged files
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


def edited(change):
    """A damage of the contents: change(state) before it is written again."""

    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


def weights_of(state) -> dict:
    """The weights in a file: the first dict of tensors."""
    return next(value for value in state.values() if is_weights(value))


def is_weights(value):
    return isinstance(value, dict) and len(value) > 3 and all(isinstance(v, torch.Tensor) for v in value.values())


def first_matrix(state):
    weights = weights_of(state)
    return weights, next(name for name, value in weights.items() if value.ndim == 2)


def drop_weight(state):
    weights, name = first_matrix(state)
    del weights[name]


def cut_weight(state):
    weights, name = first_matrix(state)
    weights[name] = weights[name][:-1].clone()


def nan_weight(state):
    weights, name = first_matrix(state)
    weights[name][0, 0] = torch.nan


def largest_replay_column(state):
    columns = {name: value for name, value in state["rb"].items() if isinstance(value, torch.Tensor)}
    return state["rb"], max(columns, key=lambda name: columns[name].numel() * columns[name].is_floating_point())


def nan_replay(state):
    columns, name = largest_replay_column(state)
    if len(columns[name]) == 0:  # a roll-out that was just used: nothing in it may be lost
        return stack_replay(state)
    columns[name].view(-1)[-1] = torch.nan


def stack_replay(state):
    """One row for many: torch would spread it over all of them without a word."""
    columns, name = largest_replay_column(state)
    columns[name] = torch.zeros(1, *columns[name].shape[1:])


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("no checkpoint")


def other_type(path):
    torch.save([1, 2, 3], path)


CORE = {"bit": flip_bit, "key": edited(drop_weight), "shape": edited(cut_weight), "NaN": edited(nan_weight)}
EXPERIENCE = {"replay NaN": edited(nan_replay), "replay shape": edited(stack_replay)}
BYTES = dict(truncated=truncate, empty=empty, text=text, type=other_type)


@pytest.fixture
def damaged(case, stop, monkeypatch):
    """For each kind of file: a whole one, and what reads it."""
    run_dir = case.copy_of_run()
    checkpoint = run_dir / "checkpoint.pt", lambda: case.resume(run_dir, "--total-timesteps 1240")
    if case.flat:
        return {"checkpoint": checkpoint}
    data_dir = case.new_data_dir()
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.OfflineDataset, case.sampling, 2, stop.set)
        case.interrupted("stopped in pre-training", data_dir=data_dir)
    stop.clear()
    unfinished = only(data_dir / "pretrained")
    model_dir = case.new_data_dir()
    model = model_dir / "pretrained" / case.model.name
    model.parent.mkdir()
    shutil.copy(case.model, model)
    runs = case.folder / f"runs{len(list(case.folder.iterdir()))}"
    return {
        "checkpoint": checkpoint,
        "model": (model, lambda: case.main(case.argv(runs=runs, data_dir=model_dir))),
        "unfinished": (unfinished, lambda: case.main(case.argv(runs=runs, data_dir=data_dir))),
    }


@every_algo
def test_damaged_files_are_refused_with_a_sentence(case, damaged):
    for kind, (path, read) in damaged.items():
        whole = path.read_bytes()
        for damage in (CORE | EXPERIENCE if kind == "checkpoint" else CORE).values():
            damage(path)
            broken = path.read_bytes()
            cure = "give another" if kind == "checkpoint" else "delete it to make it again"
            refused(read, path, "damaged or does not fit", cure)
            assert path.read_bytes() == broken
            path.write_bytes(whole)


@skimo_only
def test_files_of_another_kind_are_refused_with_a_sentence(case, damaged):
    contents = {name: path.read_bytes() for name, (path, _) in damaged.items()}
    for name, (path, read) in damaged.items():
        for damage in BYTES.values():
            damage(path)
            refused(read, path, "damaged or does not fit")
        for other in contents.keys() - {name}:
            path.write_bytes(contents[other])
            if (name, other) != ("model", "unfinished"):  # which holds a model as well, but for the facts
                refused(read, path, "damaged or does not fit")
        path.unlink()
        path.mkdir()
        if name != "unfinished":
            refused(read, path)
        path.rmdir()
        path.write_bytes(contents[name])


@skimo_only
def test_whatever_is_missing_or_of_another_type_is_refused(case, damaged):
    unused = {("model", "rng"), ("checkpoint", "args"), ("checkpoint", "script")}  # --resume reads these in args.json
    for kind, (path, read) in damaged.items():
        whole = path.read_bytes()
        for name in torch.load(path, weights_only=True):
            if (kind, name) in unused:
                continue
            for damage in (lambda s: s.pop(name), lambda s: s.update({name: None}), lambda s: s.update({name: "text"})):  # noqa: B023
                edited(damage)(path)
                print(kind, name)  # says which one was accepted
                refused(read, path, "damaged or does not fit")
                path.write_bytes(whole)


def optimizer_moment(change, moment):
    """Change a moment of the last weight of each optimizer."""

    def damage(state):
        for value in state.values():
            if isinstance(value, dict) and "param_groups" in value:
                last = list(value["state"].values())[-1]
                last[moment] = change(last[moment])

    return damage


def replay_column(change):
    def damage(state):
        state["rb"]["rewards"] = change(state["rb"]["rewards"])

    return damage


def with_nan(x):
    x = x.clone()
    x.view(-1)[0] = torch.nan
    return x


def longer(x):
    return torch.stack([x, x])


@skimo_only
@pytest.mark.parametrize(
    "damage",
    [
        *(optimizer_moment(change, name) for change in (longer, with_nan) for name in ("exp_avg", "exp_avg_sq")),
        replay_column(longer),
        replay_column(with_nan),
        replay_column(lambda x: x[:, None]),
        lambda state: state["rb"].update(episodes=state["rb"]["episodes"] + 1),
        lambda state: state["rb"].update(unfinished=state["rb"]["unfinished"][:2]),
        lambda state: state.update(rng=[state["rng"][0][:-1]]),
        lambda state: state.update(running_return=torch.zeros(3)),
        lambda state: state.update(running_length=torch.zeros(3, dtype=torch.int64)),
        lambda state: state.update(episodes=[1, 2]),
        lambda state: state.update(evaluations=5),
        lambda state: state.update(envs=dict(state["envs"], steps=[0])),
        lambda state: state.update(envs=dict(state["envs"], rng=state["envs"]["rng"][:1])),
        lambda state: state.update(global_step=float("nan")),
    ],
    ids=lambda damage: "",
)
def test_checkpoint_that_does_not_fit_is_refused(case, damage):
    run_dir = case.copy_of_run()
    edited(damage)(run_dir / "checkpoint.pt")
    refused(
        lambda: case.resume(run_dir, "--total-timesteps 1240"), run_dir / "checkpoint.pt", "damaged or does not fit"
    )


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
            with case.module.reading(path):
                found = case.module.load(path, {})
            assert_same(found, expected)  # the bit is in nothing that is read
        except SystemExit as error:
            assert str(error.code).startswith(f"error: {path} is damaged") and "\n" not in str(error.code)
            noticed += 1
    assert noticed > 40


@skimo_only
def test_evaluation_of_what_is_no_checkpoint_is_refused(case, tmp_path):
    path = tmp_path / "agent.pt"
    evaluate = ["--evaluate", path]
    refused(lambda: case.main(evaluate), path, "does not exist")
    for damage in (*CORE.values(), *BYTES.values()):
        shutil.copy(case.run_dir / "checkpoint.pt", path)
        damage(path)
        refused(lambda: case.main(evaluate), path, "damaged or does not fit")
    for changes in (dict(hidden_dim=None), dict(hidden_dim=[1]), dict(colour=1), dict(env_id=None)):
        shutil.copy(case.run_dir / "checkpoint.pt", path)
        edited(lambda state: state["args"].update(changes))(path)  # noqa: B023
        refused(lambda: case.main(evaluate), path, "damaged or does not fit")
    shutil.copy(case.model, path)
    refused(lambda: case.main(evaluate), path, "args")


@every_algo
def test_damaged_arguments_are_refused(case):
    run_dir = case.copy_of_run()
    path = run_dir / "args.json"
    whole = json.loads(path.read_text())
    changes = [dict(hidden_dim=[16]), dict(hidden_dim=None), dict(hidden_dim="16"), dict(hidden_dim=16.5)]
    changes += [dict(cudagraphs=None), dict(env_id=3), dict(seed=True), dict(colour="red")]
    texts = [json.dumps(whole | change) for change in changes]
    missing = {name: value for name, value in whole.items() if name != "gamma"}
    texts += [json.dumps(missing), json.dumps([whole]), "null", "", json.dumps(whole)[:100]]
    for content in texts:
        path.write_text(content)
        refused(lambda: case.resume(run_dir), run_dir, "damaged or does not fit")
        assert path.read_text() == content
    path.write_text(json.dumps(whole | dict(env_id="nowhere")))
    refused(lambda: case.resume(run_dir), "there is no task 'nowhere'")
    path.unlink()
    refused(lambda: case.resume(run_dir), path, "does not exist")


@every_algo
def test_a_run_goes_on_with_its_own_file_only(case, tmp_path, monkeypatch):
    """Another file whose arguments have the same names, a copy of it for instance, would mix two methods in one run."""
    run_dir = case.copy_of_run()
    monkeypatch.setattr(case.module, "__file__", str(tmp_path / "copied.py"))
    refused(lambda: case.resume(run_dir), run_dir, f"was made by {case.script.name}")
    path = run_dir / "checkpoint.pt"
    refused(lambda: case.main(["--evaluate", path]), path, f"was made by {case.script.name}")


@every_algo
def test_a_finished_run_that_was_stopped_later_is_not_finished(case, stop, monkeypatch):
    """Else its results would be those of fewer env steps than its curve."""
    run_dir = case.copy_of_run()
    with monkeypatch.context() as patch:
        after_calls(patch, data_tools.tasks.maze.MazeVectorEnv, "step", 5, stop.set, in_training)
        with pytest.raises(SystemExit, match="stopped at env step"):
            case.resume(run_dir, "--total-timesteps 2400")
    assert (run_dir / "checkpoint.pt").exists() and not (run_dir / "results.json").exists()


@every_algo
def test_a_finished_run_without_its_checkpoint_keeps_its_curve(case):
    run_dir = case.copy_of_run()
    (run_dir / "checkpoint.pt").unlink()
    before = rows_of(run_dir)
    refused(lambda: case.resume(run_dir, "--total-timesteps 2400"), run_dir, "has no checkpoint.pt any more")
    assert rows_of(run_dir) == before


@every_algo
def test_an_agent_of_another_task_is_refused(case):
    path = case.run_dir / "checkpoint.pt"
    refused(lambda: case.main(["--evaluate", path, "--env-id", "calvin"]), path, "is an agent of maze")


@skimo_only
def test_arguments_of_a_run_cannot_change(case):
    run_dir = case.copy_of_run()
    before = (run_dir / "args.json").read_text()
    for flag in ("--gamma 0.5", "--seed 7", "--hidden-dim 32", "--kl-coef 1", "--published", "--pretrained published"):
        refused(lambda flag=flag: case.resume(run_dir, flag), flag.split()[0], "--resume")
    assert (run_dir / "args.json").read_text() == before


@skimo_only
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resume nowhere", ["nowhere", "does not exist"]),
        ("--pretrained missing.pt", ["missing.pt", "does not exist"]),
        ("--evaluate missing.pt", ["missing.pt", "does not exist"]),
        ("--bc-chunks 4", ["--bc-chunks", "--pretrain-skills"]),
        ("--num-elites 21", ["--num-elites", "--num-samples"]),
        ("--num-policy-trajs 1", ["--num-policy-trajs"]),
        ("--num-envs 0", ["--num-envs 0 does not work; give at least 1"]),
        ("--seed 99999999999999999999", ["--seed 99999999999999999999 does not work; give a smaller number"]),
        ("--batch-size 0", ["--batch-size"]),
        ("--hidden-dim -1", ["--hidden-dim"]),
        ("--seed -1", ["--seed -1"]),
        ("--alpha 0", ["--alpha"]),
        ("--tau 2", ["--tau 2.0"]),
        ("--gamma 1.5", ["--gamma 1.5"]),
        ("--learning-rate -1", ["--learning-rate"]),
        ("--updates-per-step nan", ["--updates-per-step"]),
        ("--reward-scale inf", ["--reward-scale"]),
        ("--pretrain-skills 200", ["rows", "longest"]),
        ("--num-skills 10", ["at most 9 skills", "fewer than a window", "--num-skills"]),
        ("--pretrained published --data x.hdf5", ["--pretrained published", "our settings"]),
        ("--pretrained published --dataset d4rl", ["--pretrained published", "our settings"]),
        ("--pretrained published --skill-horizon 5", ["--pretrained published", "our settings"]),
        ("--run-dir=", ["--run-dir is empty: give a value"]),
        ("--pretrained=", ["--pretrained is empty"]),
        ("--evaluate=", ["--evaluate is empty"]),
        ("--pretrained model.pt --recombine", ["--recombine does nothing", "--pretrained"]),
        pytest.param(
            "--device cuda",
            ["--device cpu"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA"),
        ),
    ],
)
def test_senseless_flags_are_refused_with_a_sentence(case, flags, words):
    refused(lambda: case.main(case.argv(flags)), *words)


@skimo_only
@pytest.mark.parametrize("flags", ["--num-skills 9", "--num-skills 9 --skill-horizon 11", "--seed 0 --warmup-steps 0"])
def test_flags_at_the_bounds_are_accepted(case, flags):
    """Episodes of 90 env steps have nine skills of ten, or eight of eleven and one that is cut short."""
    case.module.check_args(case.module.parse_args(case.argv(flags)))


@skimo_only
def test_a_run_on_another_device_has_graphs_only_if_that_is_cuda(case):
    parse = case.module.parse_args
    run_dir = case.copy_of_run()
    path = run_dir / "args.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(device="cuda", cudagraphs=True)))
    resume = ["--resume", str(run_dir)]
    assert not parse(["--device", "cpu"]).cudagraphs and parse(["--device", "cuda"]).cudagraphs
    assert parse(resume).cudagraphs and not parse([*resume, "--device", "cpu"]).cudagraphs
    assert parse([*resume, "--device", "cpu", "--cudagraphs"]).cudagraphs


@with_data
def test_what_cannot_work_is_noticed_before_pretraining(case, monkeypatch):
    monkeypatch.setattr(case.module, "pretrain", None)
    no_pictures = mock.Mock(side_effect=data_tools.DataError("no pictures here"))
    monkeypatch.setattr(data_tools.tasks.maze.MazeVectorEnv, "draw", no_pictures)
    refused(lambda: case.main(case.argv("--capture-video", data_dir=case.new_data_dir())), "no pictures here")


@skimo_only
def test_task_that_is_unknown_is_refused(case, capsys):
    with pytest.raises(SystemExit):
        case.main(["--env-id", "labyrinth"])
    assert "labyrinth" in capsys.readouterr().err


@every_algo
def test_underscores_in_flags_are_hyphens(case):
    """tyro takes both: the task's defaults must come with either."""
    hyphens = case.module.parse_args(["--env-id", "kitchen"])
    assert case.module.parse_args(["--env_id", "kitchen"]) == hyphens
    assert case.module.parse_args(["--env_id=kitchen"]) == hyphens
    if hasattr(case.module, "CPU_PRESET"):
        assert case.module.parse_args(["--cpu_preset"]) == case.module.parse_args(["--cpu-preset"])


# ------------------------------------------------------------------------------------------------ full disks, diverging
@every_algo
def test_learning_that_diverges_ends_with_a_sentence_and_keeps_the_checkpoint(case, monkeypatch):
    original = torch.Tensor.backward
    bad = threading.Event()
    after_calls(monkeypatch, data_tools.tasks.maze.MazeVectorEnv, "step", 170, bad.set, in_training)
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: original(loss * torch.nan if bad.is_set() else loss))
    runs = case.folder / f"runs{len(list(case.folder.iterdir()))}"
    argv = case.argv("--checkpoint-interval 10 --eval-interval 0", runs)
    refused(lambda: case.main(argv), "no number any more", "learning rate")
    state = state_of(only(runs))
    assert 600 <= state["global_step"] < 800
    weights = [value for part in state.values() if is_weights(part) for value in part.values()]
    assert len(weights) > 20 and all(value.isfinite().all() for value in weights)


@skimo_only
def test_pretraining_that_diverges_leaves_no_model(case, monkeypatch):
    original = data_tools.OfflineDataset.sample_windows
    draws = []

    def sample(*args):
        obs, actions = original(*args)
        draws.append(1)
        return (obs * torch.nan if len(draws) == 4 else obs), actions

    monkeypatch.setattr(data_tools.OfflineDataset, "sample_windows", sample)
    data_dir = case.new_data_dir()
    refused(lambda: case.main(case.argv("--pretrain-eval-interval 100", data_dir=data_dir)), "no number any more")
    state = torch.load(only(data_dir / "pretrained"), weights_only=True)
    assert all(value.isfinite().all() for value in state["networks"].values())


def full_disk(monkeypatch, number, error):
    """Write half of the file in call `number` of torch.save, then fail."""
    original = torch.save
    calls = []

    def save(state, path):
        calls.append(path)
        if len(calls) == number:
            Path(path).write_bytes(b"half a checkpoint")
            raise error
        original(state, path)

    monkeypatch.setattr(torch, "save", save)


@every_algo
def test_full_disk_keeps_the_old_checkpoint(case, monkeypatch):
    runs = case.folder / f"runs{len(list(case.folder.iterdir()))}"
    argv = case.argv("--checkpoint-interval 500", runs)
    with monkeypatch.context() as patch:
        full_disk(patch, 2, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        refused(lambda: case.main(argv), "checkpoint.pt", "No space left", "free some space")
    run_dir = only(runs)
    assert state_of(run_dir)["global_step"] == (500 if case.flat else 520)
    assert not list(run_dir.glob("*.part"))
    case.resume(run_dir)
    assert_same(state_of(run_dir), state_of(case.run_dir))


@every_algo
def test_full_memory_is_a_sentence_and_other_errors_of_torch_are_not(case, monkeypatch):
    def full_gpu(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of\nmuch more")

    monkeypatch.setattr(case.module, "train", full_gpu)
    refused(case.start, "no memory left (CUDA out of memory", "end other programs")
    monkeypatch.setattr(case.module, "train", lambda *inputs: torch.empty(10**16))
    refused(case.start, "no memory left", "can't allocate memory", "end other programs")
    monkeypatch.setattr(case.module, "train", lambda *inputs: np.empty(10**17))
    refused(case.start, "no memory left", "Unable to allocate", "end other programs")
    monkeypatch.setattr(case.module, "train", lambda *inputs: bytearray(2**62))  # Python itself gives no reason
    refused(case.start, "no memory left (MemoryError)", "end other programs")
    monkeypatch.setattr(case.module, "train", lambda *inputs: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        case.start()
    if hasattr(case.module, "make_networks"):
        with monkeypatch.context() as patch:
            patch.setattr(case.module.nn, "Linear", lambda *inputs: torch.empty(10**16))
            refused(case.start, "no memory left", "can't allocate memory", "end other programs")

    def read():
        with case.module.reading(case.run_dir):
            full_gpu()

    refused(read, f"no memory for {case.run_dir}", "end other programs")


@skimo_only
@pytest.mark.parametrize("name", ["add_scalar", "episodes.csv", "results.json"])
def test_full_disk_elsewhere_is_a_sentence(case, name, monkeypatch):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*args, **kwargs):
        raise error

    if name == "add_scalar":
        monkeypatch.setattr(case.module.SummaryWriter, "add_scalar", fail)
    else:
        original = Path.open if name == "episodes.csv" else Path.write_text
        function = original.__name__

        def some(path, *args, **kwargs):
            if path.stem == Path(name).stem:
                raise error
            return original(path, *args, **kwargs)

        monkeypatch.setattr(Path, function, some)
    refused(case.start, "No space left", "free some space")


@skimo_only
@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # TensorBoard's thread fails as well
def test_run_folder_that_is_deleted_meanwhile_is_a_sentence(case, monkeypatch):
    runs = case.folder / f"runs{len(list(case.folder.iterdir()))}"
    remove = functools.partial(shutil.rmtree, runs)
    after_calls(monkeypatch, data_tools.OfflineDataset, "sample_windows", 3, remove)
    refused(lambda: case.main(case.argv(runs=runs, data_dir=case.new_data_dir())), "cannot write to", runs)


@skimo_only
def test_places_that_cannot_be_written_are_refused(case, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    refused(lambda: case.main(case.argv(runs=file / "runs")), file, "cannot write", "--run-dir")
    refused(lambda: case.main(case.argv(f"--exp-name {'x' * 300}", runs=tmp_path)), "too long", "--run-dir")
    refused(lambda: case.main(case.argv(data_dir=file / "data")), file, "--data-dir")
    data_dir = case.new_data_dir()
    (data_dir / "pretrained").write_text("no folder")
    refused(lambda: case.main(case.argv(data_dir=data_dir)), data_dir / "pretrained", "cannot write")


@skimo_only
def test_a_crash_never_leaves_half_of_a_json_file(case, tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    case.module.write_json(path, dict(run=1))
    write = Path.write_text

    def crash(path, text):
        write(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", crash)
    with pytest.raises(KeyboardInterrupt):
        case.module.write_json(path, dict(run=2))
    assert json.loads(path.read_text()) == dict(run=1)


@skimo_only
def test_two_programs_that_save_the_same_file_do_not_disturb_each_other(case, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    original = torch.save

    def save(state, part):
        with monkeypatch.context() as patch:  # another program begins and ends while this one writes
            patch.setattr(torch, "save", original)
            patch.setattr(os, "getpid", lambda: 1)
            case.module.save(path, {}, by="the other")
        original(state, part)

    monkeypatch.setattr(torch, "save", save)
    case.module.save(path, {}, by="this one")
    assert torch.load(path, weights_only=True)["by"] == "this one"
    assert list(tmp_path.iterdir()) == [path]


# --------------------------------------------------------------------------------------------------- pre-trained models
class SpyArgs:
    """Notes which arguments are read."""

    def __init__(self, args):
        self.args = args
        self.seen = set()

    def __getattr__(self, name):
        value = getattr(self.args, name)
        self.seen.add(name)
        return value


def another(field, value):
    """Another value of an argument."""
    if typing.get_origin(field.type) is typing.Literal:
        return next(choice for choice in typing.get_args(field.type) if choice != value)
    if isinstance(value, bool):
        return not value
    return 2 * value + 1


# What `pretrain` calls to save, record, watch and stop
NO_LEARNING = {"reading", "load", "save", "log", "set_random_state", "kept_random_state", "check_finite", "recorded"}
NO_LEARNING |= {"prior_rollouts", "success", "gradient_norm", "train"}  # train: of networks, not the file's


def used_by(module, *names):
    """Names of a file's functions and classes that these ones use, themselves included, and of its tables of facts."""
    tree = ast.parse(inspect.getsource(module))
    nodes = {node.name: node for node in tree.body if hasattr(node, "name") and node.name != "Args"}
    found, new = set(), nodes.keys() & names
    while new:
        found |= new
        parts = [part for name in found for part in ast.walk(nodes[name]) if isinstance(part, ast.Name)]
        own = {part.id for part in parts if isinstance(part.ctx, ast.Store)}  # local variables
        words = {part.id for part in parts} - own
        new = (words & nodes.keys()) - found
    return found, words & {"POSITION_PERIODS", "ARM", "GOAL_ENTRIES"}


def edited_source(original, edited, part):
    """Source code of a part of a file, one of which somebody edited, the others got a comment."""
    return original(part) + ("\nx = 1\n" if part is edited else "\n# a comment\n")


@with_data
def test_pretrained_model_is_found_by_all_that_shaped_it(case, tmp_path, monkeypatch):
    module = case.module
    # To read the source of a class its whole file is parsed, each time anew: a minute in all files together.
    monkeypatch.setattr(inspect, "getsource", functools.cache(inspect.getsource))
    args = module.parse_args(case.argv())
    path, data = module.find_pretrained(args)
    assert path == case.model and data is None

    # Whatever pre-training reads makes another model when it changes.
    spy = SpyArgs(args)
    networks = module.make_networks(spy, 4, 2)
    data = data_tools.load_dataset("maze", case.data_dir)
    writer = module.SummaryWriter(tmp_path)
    module.pretrain(spy, networks, tmp_path / "model.pt", data, writer, threading.Event())
    writer.close()
    # where it runs, how it acts and is measured, and the task, which is in the file's name
    spy.seen -= {"device", "cudagraphs", "pretrain_eval_interval", "pretrain_eval_episodes", "squash_actions", "env_id"}
    fields = {field.name: field for field in dataclasses.fields(module.Args)}
    assert len(spy.seen) > 10 and "seed" in spy.seen
    paths = {path}
    with monkeypatch.context() as patch:
        patch.setattr(data_tools, "load_dataset", lambda *args: data)
        for name in sorted(spy.seen):
            changed = dataclasses.replace(args, **{name: another(fields[name], getattr(args, name))})
            found, made_from = module.find_pretrained(changed)
            assert found not in paths and made_from is data, name
            paths.add(found)

        # What belongs to RL does not.
        for name in {"gamma", "learning_rate", "num_envs", "warmup_steps", "total_timesteps"} & fields.keys():
            changed = dataclasses.replace(args, **{name: another(fields[name], getattr(args, name))})
            assert module.find_pretrained(changed) == (path, None), name

    # Other data or other code make another model as well.
    other = case.new_data_dir()
    import h5py

    with h5py.File(other / DATA_FILE, "r+") as file:
        file["actions"][5, 0] = 0.25
    shutil.copytree(case.data_dir / "pretrained", other / "pretrained")
    assert module.find_pretrained(dataclasses.replace(args, data_dir=str(other)))[0].name != path.name
    monkeypatch.setattr(data_tools, "load_dataset", lambda *args: data)
    original = inspect.getsource
    parts, tables = used_by(module, "make_networks", *set(module.pretrain.__code__.co_names) - NO_LEARNING)
    assert len(parts) >= 8 and "POSITION_PERIODS" in tables
    for name in parts:
        with monkeypatch.context() as patch:
            part = getattr(module, name)
            patch.setattr(inspect, "getsource", functools.partial(edited_source, original, part))
            assert module.find_pretrained(args)[0] not in paths, name
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.partial(edited_source, original, data_tools.OfflineDataset))
        assert module.find_pretrained(args)[0] not in paths  # how data are split and drawn
    with monkeypatch.context() as patch:
        patch.setattr(inspect, "getsource", functools.partial(edited_source, original, None))
        assert module.find_pretrained(args)[0] == path
    for name in tables:
        with monkeypatch.context() as patch:
            patch.setitem(getattr(module, name), "maze", [[1, 2.5]])
            assert module.find_pretrained(args)[0] not in paths, name
    if "obs_scale" in original(module):
        for change in (dict(obs_scale=(0.5, 1, 1, 1)), dict(obs_shift=(0.5, 0, 0, 0)), dict(objects=((2, 3),))):
            with monkeypatch.context() as patch:
                patch.setitem(data_tools.TASKS, "maze", dataclasses.replace(data_tools.TASKS["maze"], **change))
                assert module.find_pretrained(args)[0] not in paths, change


@pytest.mark.parametrize(
    ("name", "phase"),
    [
        (name, phase)
        for name in ALGOS
        for phase in ("pretrain", "learn_flow")
        if hasattr(algo_module(name), phase) and hasattr(algo_module(name).Args, "recombine")
    ],
)
def test_recombined_demonstrations_are_learnt_from(name, phase, monkeypatch, tmp_path):
    """With --recombine windows are drawn from what recombined returns, without the validation's episodes."""
    module = algo_module(name)
    args = module.Args(env_id="kitchen", device="cpu", cudagraphs=False, seed=3, hidden_dim=16)
    rng = np.random.default_rng(0)
    ends = np.arange(1, 12001) % 120 == 0
    data = data_tools.OfflineDataset(rng.normal(size=(12000, 30)), rng.normal(size=(12000, 9)), ends & False, ends)
    networks = module.make_networks(args, 30, 9)
    if phase == "learn_flow":
        networks["flow"] = module.FlowPrior(30, args)
    recombine = data_tools.OfflineDataset.recombined
    recombined, drawn_from = [], []

    class Drawn(Exception):
        pass

    def remember(self, objects, seed=0):
        recombined.append((len(self), objects, seed, recombine(self, objects, seed)))
        return recombined[-1][-1]

    def draw(self, *args, **kwargs):
        drawn_from.append(self)
        raise Drawn

    monkeypatch.setattr(data_tools.OfflineDataset, "recombined", remember)
    monkeypatch.setattr(data_tools.OfflineDataset, "sample_windows", draw)
    for args.recombine in (False, True):
        with pytest.raises(Drawn):
            getattr(module, phase)(args, networks, tmp_path / "model.pt", data, None, threading.Event())
    plain, again = drawn_from
    ((rows, objects, seed, result),) = recombined
    assert len(plain) == rows == 99 * 120
    assert seed == (0 if phase == "learn_flow" else 3)  # a flow serves runs of all seeds
    assert again is result and len(again) == 2 * rows
    assert objects == data_tools.TASKS["kitchen"].objects


@pytest.mark.parametrize("name", [name for name in ALGOS if hasattr(algo_module(name), "perturb")])
def test_pretraining_learns_from_shifted_arms_and_is_judged_without(name, monkeypatch, tmp_path):
    """Four updates on what `perturb` returns; after the second and fourth a look at the held-out episode as it is, and
    roll-outs.
    """
    module = algo_module(name)
    flags = "--env-id kitchen --device cpu --hidden-dim 16 --pretrain-updates 4 --pretrain-eval-interval 2"
    args = module.parse_args([*flags.split(), "--pretrain-batch-size", "4", "--pretrain-eval-episodes", "3"])
    networks = module.make_networks(args, 30, 9)
    ends = np.arange(1, 40_001) % 400 == 0
    obs = np.where(np.arange(40_000) < 39_600, 1, 2)[:, None] * np.ones(30)  # the last of 100 episodes is held out
    data = data_tools.OfflineDataset(obs, np.zeros((40_000, 9)), ends & False, ends)
    seen = []

    def loss(*inputs):
        obs = inputs[-3]
        seen.append((obs.min().item(), obs.max().item()))
        return sum(weight.sum() for weight in networks.parameters()), {}

    monkeypatch.setattr(module, "pretrain_loss", loss)
    monkeypatch.setattr(module, "perturb", lambda obs, actions, args: (obs + 10, actions))
    rolled_out = []
    monkeypatch.setattr(module, "prior_rollouts", lambda *inputs: rolled_out.append(inputs[-1]) or np.zeros(1))
    writer = SimpleNamespace(add_scalar=lambda *values: None)
    module.pretrain(args, networks, tmp_path / "model.pt", data, writer, threading.Event())
    learnt, judged = (11, 11), (2, 2)
    assert seen == [learnt, learnt, judged] * 2
    assert rolled_out == [3, 12]  # four times as many episodes at the end


@with_data
def test_kitchens_share_a_pretrained_model(case, tmp_path):
    golden.make_data(tmp_path / "kitchen.hdf5", 30, 9)
    paths = set()
    for env_id in ("kitchen", "kitchen-misaligned"):  # which share their data
        flags = f"--env-id {env_id} --data {tmp_path / 'kitchen.hdf5'}"
        path, data = case.module.find_pretrained(case.module.parse_args(case.argv(flags)))
        assert data is not None
        paths.add(path)
    assert len(paths) == 1


@skimo_only
def test_model_given_by_its_path_needs_no_data(case, no_data):
    no_data()
    _, run_dir = case.start(f"--pretrained {case.model}")
    assert_same(state_of(run_dir), state_of(case.run_dir))


@pytest.mark.parametrize("case", [name for name in ALGOS if name not in {*golden.FLAT, "relay"}], indirect=True)
def test_model_of_other_skills_is_refused(case, tmp_path):
    state = torch.load(case.model, weights_only=True)
    horizon = case.module.parse_args(case.argv()).skill_horizon + 2
    assert state["facts"]["skill_horizon"] == horizon - 2
    state["facts"]["skill_horizon"] = horizon
    path = tmp_path / "model.pt"
    torch.save(state, path)
    refused(lambda: case.start(f"--pretrained {path}"), f"{horizon} env steps", f"--skill-horizon {horizon}")


@pytest.mark.parametrize("case", SKIMOS, indirect=True)
def test_a_new_flag_of_pretraining_makes_a_new_model(case, monkeypatch):
    """One that a reader adds as the last of `# Pre-training`."""
    module = case.module
    args = module.parse_args(case.argv())
    names = list(dataclasses.fields(module.Args))
    last = [field.name for field in names].index("total_timesteps")
    names.insert(last, SimpleNamespace(name="smooth_coef"))
    monkeypatch.setattr(module, "fields", lambda cls: names)
    models = set()
    for args.smooth_coef in (0.1, 50.0):
        models.add(module.find_pretrained(args)[0])
    assert len(models | {case.model}) == 3


# -------------------------------------------------------------------------------------------------------- real signals
@skimo_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_before_the_run_has_a_folder_is_a_sentence(case, number, monkeypatch, tmp_path):
    monkeypatch.setattr(case.module, "find_pretrained", lambda args: os.kill(os.getpid(), number))
    with pytest.raises(SystemExit, match="stopped before there was anything to save"):
        case.main(case.argv(runs=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@every_algo
@pytest.mark.parametrize("where", ["check_args", "evaluate"])
def test_signal_in_an_evaluation_is_a_sentence(case, where, monkeypatch):
    monkeypatch.setattr(case.module, where, lambda args: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(SystemExit, match="stopped before there was anything to save"):
        case.main(["--evaluate", case.run_dir / "checkpoint.pt"])


@skimo_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_ends_the_program_at_once(case, number):
    stop = case.module.stop_at_signals()
    assert not stop.is_set()
    os.kill(os.getpid(), number)
    assert stop.is_set()
    assert signal.getsignal(number) == signal.SIG_DFL


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
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_signalled_program_saves_and_goes_on(case, first, tmp_path):
    data_dir = case.new_data_dir()
    flags = "--pretrain-updates 400 --pretrain-eval-interval 1000 --total-timesteps 1000000 --eval-interval 0"
    command = [sys.executable, str(case.script), *case.argv(flags, tmp_path / "runs", data_dir)]
    written = signalled(command, tmp_path, "pre-training:", first)
    assert "stopping: saves first" in written and "stopped in pre-training; the same command goes on" in written
    updates = torch.load(only(data_dir / "pretrained"), weights_only=True)["updates"]
    assert 0 < updates < 400

    second = signal.SIGTERM if first == signal.SIGINT else signal.SIGINT
    shutil.rmtree(tmp_path / "runs")
    written = signalled(command, tmp_path, "RL:", second)
    assert f"pre-training goes on at update {updates}" in written
    run_dir = only(tmp_path / "runs")
    assert f"--resume {run_dir}" in written
    step = state_of(run_dir)["global_step"]
    assert 0 < step < 1_000_000
    case.resume(run_dir, f"--total-timesteps {step + 40}")
    assert step + 40 <= state_of(run_dir)["global_step"] < step + 80


@skimo_only
def test_kill_while_writing_keeps_the_old_checkpoint(case, tmp_path):
    script = """
        import os, signal, sys, torch
        from pathlib import Path
        from algos import skimo
        original = torch.save
        def save(state, path):
            original(state, path)
            with open(path, "r+b") as file:
                file.truncate(os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        path = Path(sys.argv[1])
        skimo.save(path, {}, step=1)
        torch.save = save
        skimo.save(path, {}, step=2)
    """
    path = tmp_path / "checkpoint.pt"
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert case.module.load(path, {})["step"] == 1


@skimo_only
@pytest.mark.parametrize("size", [40_000, 5_000])
def test_disk_that_fills_up_is_reported(case, size, tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # no file may grow larger

    data_dir = case.new_data_dir()
    flags = "" if size > 10_000 else f"--pretrained {case.model}"  # then TensorBoard's file cannot be written either
    command = [sys.executable, str(case.script), *case.argv(flags, tmp_path / "runs", data_dir)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, preexec_fn=limit)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr, result.stderr
    assert "error: cannot write" in result.stderr and "free some space" in result.stderr
    assert not list(tmp_path.rglob("*.part")) and not list(data_dir.rglob("*.part"))
