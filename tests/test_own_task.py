"""A stranger's task (toy_walk.py) needs one entry in TASKS, and everything serves it."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_walk
from numpy_nets import NO_SCORES

import data_tools
from algos import hiro
from benchmarks.controls import constant_actions

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def walk(monkeypatch):
    """The toy task, registered under this name for one test."""
    task = data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect", noise=0.2)
    monkeypatch.setitem(data_tools.TASKS, "walk", task)  # in a program: data_tools.TASKS["walk"] = task
    return "walk"


def test_returns_of_constant_actions_against_straight_lines(walk):
    """A constant action goes straight on: it scores if the line passes the goal, once."""
    actions = constant_actions.corners(2)
    assert sorted(map(tuple, actions)) == [(-1, -1), (-1, 1), (1, -1), (1, 1)]
    many = actions.repeat(50, 0)
    found = constant_actions.constant_returns(walk, many, 0.0, seed=3)
    start, _ = data_tools.make_envs(walk, 200).reset(seed=3)
    line = start[:, None] + 0.1 * many[:, None] * np.arange(1, 61)[:, None]
    near = np.linalg.norm(line - toy_walk.GOAL, axis=-1) < 0.2
    assert np.array_equal(found, 10.0 * near.any(1)) and 0 < near.any(1).sum() < 50
    noisy = constant_actions.constant_returns(walk, many, 1.0, seed=3)
    assert not np.array_equal(noisy, found)


def test_what_it_lacks_is_one_sentence(walk, tmp_path, monkeypatch):
    with pytest.raises(data_tools.DataError, match="^error: D4RL has no data for walk: use --data scripted"):
        data_tools.load_dataset(walk, tmp_path, "d4rl")
    monkeypatch.setitem(data_tools.TASKS, "bare", data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0))
    with pytest.raises(data_tools.DataError, match="bare has no scripted data: give a file with --data PATH"):
        data_tools.load_dataset("bare", tmp_path)
    envs = data_tools.make_envs(walk, 1, video=tmp_path / "walk.mp4")
    with pytest.raises(data_tools.DataError, match=r"WalkVectorEnv has no pictures: write its method draw\(member\)"):
        envs.reset(seed=0)


PROGRAM = """
import data_tools

data_tools.TASKS["walk"] = data_tools.Task(envs="toy_walk:WalkVectorEnv", max_return=10.0, collect="toy_walk:collect")

import skimo  # the copy

results = skimo.train(skimo.parse_args())
print("RESULTS", results["pretraining"]["prior_success"], results["evaluations"][-1][2])
"""
TINY = """--env-id walk --device cpu --no-cudagraphs --run-dir runs --data-dir data --skill-horizon 5 --skill-dim 2
    --hidden-dim 32 --latent-dim 16 --skill-encoder mlp --pretrain-skills 3 --bc-chunks 3 --pretrain-updates 150
    --pretrain-lr 3e-3 --no-pretrain-lr-decay --kl-coef 1e-4 --pretrain-batch-size 32
    --pretrain-eval-interval 150 --pretrain-eval-episodes 25
    --num-skills 3 --num-envs 8 --total-timesteps 4800 --warmup-steps 2400 --updates-per-step 0.06 --batch-size 64
    --alpha 0.01 --num-samples 32 --num-policy-trajs 8 --num-elites 8 --horizon-steps 1 --eval-interval 100000
    --eval-episodes 100"""


def test_copy_of_skimo_alone_learns_it(tmp_path):
    """The file in an empty folder, data_tools on the path, one entry in TASKS: both phases, and it learns."""
    (tmp_path / "program.py").write_text(PROGRAM)
    shutil.copy(ROOT / "algos" / "skimo.py", tmp_path)
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "data_tools").symlink_to(ROOT / "data_tools")
    shutil.copy(ROOT / "tests" / "toy_walk.py", tmp_path / "modules")
    environment = os.environ | dict(PYTHONPATH=str(tmp_path / "modules"), OMP_NUM_THREADS="1")
    command = [sys.executable, "program.py", *TINY.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    prior, learned = (float(word) for word in done.stdout.rpartition("RESULTS")[2].split())
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert [path.name.split("_")[0] for path in (tmp_path / "data").glob("*.hdf5")] == ["walk"]
    with (run_dir / "episodes.csv").open() as file:
        lengths = [int(row[2]) for row in list(csv.reader(file))[1:]]
    assert len(lengths) > 70 and max(lengths) == 60 > min(lengths)
    assert learned > prior + 0.2


def test_hiros_rows_are_what_happened_under_a_goal(walk, monkeypatch, tmp_path):
    """Against a loop over the recorded env steps: a row has up to five of them, and episodes do not share one."""
    monkeypatch.setattr(toy_walk, "GOAL", np.array([-0.5, -0.5]))
    given, goals, buffers, knew = [], [], [], []
    step = toy_walk.WalkVectorEnv.step
    act = hiro.Agent.act
    add = hiro.ReplayBuffer.add

    def record_step(envs, action):
        before = envs.observations()
        result = step(envs, action)
        given.append((before, action.copy(), *result[:4]))
        return result

    def record_goal(agent, *inputs, **how):
        action, place, goal = act(agent, *inputs, **how)
        goals.append(goal.numpy().copy())
        knew.append(agent.rewarded.item())
        return action, place, goal

    monkeypatch.setattr(toy_walk.WalkVectorEnv, "step", record_step)
    monkeypatch.setattr(hiro.Agent, "act", record_goal)
    monkeypatch.setattr(hiro.ReplayBuffer, "add", lambda rb, *inputs: buffers.append(rb) or add(rb, *inputs))
    monkeypatch.setattr(hiro, "rollout", lambda *args: NO_SCORES)
    flags = "--device cpu --num-envs 2 --warmup-steps 600 --total-timesteps 600 --reward-scale 0.5"
    args = hiro.parse_args([*flags.split(), "--goal-steps", "5", "--run-dir", str(tmp_path)])
    args.env_id = walk
    hiro.train(args)
    rewarded = np.cumsum([rewards.any() for _, _, _, rewards, *_ in given]) > 0
    assert knew == [False, *rewarded[:-1]] and not rewarded[3]  # the high level waits for a first reward
    expected = []
    running = [[], []]
    for t, (before, action, after, rewards, ends, time_outs) in enumerate(given):
        for e in range(2):
            running[e].append((before[e], action[e], after[e], rewards[e], goals[t][e]))
            if len(running[e]) == 5 or ends[e] or time_outs[e]:
                expected.append((running[e], ends[e]))
                running[e] = []
    rb = buffers[0]
    assert len(rb) == len(expected) and 2 < sum(end for _, end in expected) < len(expected) - 2
    names = ("obs", "action", "goal", "rewards", "steps", "terminations")
    columns = {name: column[: len(rb)].numpy() for name, column in zip(names, rb.columns)}
    for i, (steps, end) in enumerate(expected):
        n = len(steps)
        assert columns["steps"][i] == n and columns["terminations"][i] == end
        np.testing.assert_allclose(columns["obs"][i, :n], [first for first, *_ in steps], rtol=1e-6)
        np.testing.assert_allclose(columns["obs"][i, n], steps[-1][2], rtol=1e-6)
        np.testing.assert_allclose(columns["action"][i, :n], [a for _, a, *_ in steps], rtol=1e-6)
        np.testing.assert_allclose(columns["goal"][i], steps[0][4], rtol=1e-6)
        assert columns["rewards"][i] == pytest.approx(0.5 * sum(reward for *_, reward, _ in steps))
        # It is one goal: it stays where it is in the plane, whatever the steps leave of it
        places = np.array([first + goal for first, *_, goal in steps])
        np.testing.assert_allclose(places, places[:1].repeat(n, 0), atol=1e-5)
