"""Gymnasium's environments as tasks, and our tasks as Gymnasium's environments."""

import copy
import json
import pickle
import runpy
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

import data_tools
from algos import dads, hiro, sac
from data_tools.files import DataError, NotFiniteError
from tests import golden

ROOT = Path(__file__).resolve().parents[1]
OURS = {"Maze": 2_000, "Kitchen": 280, "KitchenMisaligned": 280, "Calvin": 360}
OURS |= {"MazeFar": 2_000, "Kitchen6": 420, "Calvin6": 540}


class Walk(gymnasium.Env):
    """A point on a line; left of -1 it falls, right of 5 it is cut short. Actions in [-1, 3]."""

    observation_space = Box(-np.inf, np.inf, (1,))
    action_space = Box(-1.0, 3.0, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(size=1).astype(np.float32)
        return self.x, {}

    def step(self, action):
        assert action in self.action_space
        self.x = self.x + action
        return self.x, float(action[0]), bool(self.x < -1), bool(self.x > 5), {}


def walk(**change):  # takes no render_mode, like many a class
    env = Walk()
    assert "render_mode" not in change
    for name, space in change.items():
        setattr(env, name, space)
    return env


gymnasium.register("Walk-v0", walk, max_episode_steps=4, reward_threshold=6.0)
gymnasium.register("Endless-v0", walk)
gymnasium.register("Spoken-v0", walk, max_episode_steps=4, kwargs=dict(observation_space=Dict(x=Box(0, 1))))
gymnasium.register("Stepped-v0", walk, max_episode_steps=4, kwargs=dict(action_space=Box(0, 3, (1,), np.int64)))
gymnasium.register("Unbounded-v0", walk, max_episode_steps=4, kwargs=dict(action_space=Box(-np.inf, np.inf, (1,))))


def pendulums(num_envs):
    """What Task.envs may not be."""
    return SyncVectorEnv([lambda: gymnasium.make("Pendulum-v1")] * num_envs)


def test_an_episode_is_gymnasiums_own():
    envs = data_tools.make_envs("Pendulum-v1", 2)
    env = gymnasium.make("Pendulum-v1")
    obs, _ = envs.reset(seed=4)
    expected, _ = env.reset(seed=int(envs.seeds[1]))
    np.testing.assert_array_equal(obs[1], expected)
    for step in range(200):
        action = np.random.default_rng(step).uniform(-1, 1, (2, 1)).astype(np.float32)
        obs, rewards, terminations, truncations, _ = envs.step(action)
        expected, reward, _, truncated, _ = env.step(2 * action[1])
        np.testing.assert_allclose(obs[1], expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rewards[1], reward, rtol=1e-4, atol=1e-4)
        assert truncations.tolist() == [truncated] * 2 == [step == 199] * 2 and not terminations.any()
    first = envs.reset()[0]
    assert not np.array_equal(first, obs) and not np.array_equal(
        first, data_tools.make_envs("Pendulum-v1", 2).reset()[0]
    )


def test_actions_are_scaled_and_ends_are_told_apart():
    envs = data_tools.make_envs("Walk-v0", 4)
    obs, _ = envs.reset(seed=0)
    actions = np.array([[-1], [1], [-0.5], [0]], np.float32)  # theirs: -1, 3, 0, 1
    after, rewards, *_ = envs.step(actions)
    assert rewards.tolist() == (after - obs)[:, 0].round(5).tolist() == [-1, 3, 0, 1]
    flags = [envs.step(actions)[2:4] for _ in range(3)]
    assert [terminations.tolist() for terminations, _ in flags] == [[True, False, False, False]] * 3
    assert [truncations.tolist() for _, truncations in flags] == [[False, True, False, False]] * 2 + [
        [False] + [True] * 3
    ]
    assert envs.steps.tolist() == [2, 2, 4, 4] and envs.returns.tolist() == [-2, 6, 0, 4]
    assert data_tools.TASKS["Walk-v0"].success(envs.returns) == 0.25  # the threshold is 6
    assert data_tools.TASKS["Pendulum-v1"].success(envs.returns) == 0  # without one


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_an_environment_that_cannot_be_resumed_is_told(drift, monkeypatch, capsys):
    """One that counts its steps through all episodes: its rewards are others when they are played again."""
    counter = iter(range(100))

    def step(env, action):
        env.x = env.x + action + np.float32(drift * next(counter))
        return env.x, float(env.x[0]), False, False, {}

    monkeypatch.setattr(Walk, "step", step)
    envs = data_tools.make_envs("Walk-v0", 2)
    envs.reset(seed=0)
    for _ in range(2):
        obs, *_ = envs.step(np.array([[-0.4], [-0.3]], np.float32))
    found = data_tools.make_envs("Walk-v0", 2).set_state(envs.get_state())
    assert np.array_equal(found, obs) == (drift == 0)
    assert ("warning: Walk-v0 does not repeat" in capsys.readouterr().out) == (drift > 0)


@pytest.mark.parametrize(
    "env_id, words",
    [
        ("wolk", r"no task 'wolk'; known tasks: maze, kitchen, .* registered with Gymnasium \(Environment `wolk`"),
        ("nowhere:Walk-v0", "No module named 'nowhere'"),
        ("CartPole-v1", r"takes actions in Discrete\(2\)"),
        ("Stepped-v0", "takes actions in Box.*int64.*of floats"),
        ("Unbounded-v0", "takes actions in Box.*bounds"),
        ("Spoken-v0", "observes Dict.*FlattenObservation"),
        ("Endless-v0", "no time limit: register it with max_episode_steps"),
        ("pendulums", "pendulums is no MemberVectorEnv: see `Your own task`"),
    ],
)
def test_what_cannot_be_used_is_refused_at_the_start(env_id, words, monkeypatch, tmp_path):
    task = data_tools.Task("test_gym:pendulums", max_return=1.0)
    monkeypatch.setitem(data_tools.TASKS, "pendulums", task)
    with pytest.raises(DataError, match=f"^error: .*{words}"):
        sac.train(sac.parse_args(["--env-id", env_id, "--run-dir", str(tmp_path / "runs")]))
    assert not list(tmp_path.iterdir())


SWING = """
import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

class SwingEnv(PendulumEnv):
    pass

gymnasium.register("Swing-v0", entry_point="swing:SwingEnv", max_episode_steps=200)
"""
FLAGS = """--device cpu --num-envs 3 --hidden-dim 8 --batch-size 8 --warmup-steps 30 --updates-per-step 0.1
    --eval-episodes 2 --checkpoint-interval 300"""


def test_ones_own_environment_and_resume_bit_for_bit(tmp_path, monkeypatch):
    """From a file of its own: in one go through the command line, or in two parts, the first cut amid episodes."""
    (tmp_path / "swing.py").write_text(SWING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        sac.train(sac.parse_args([str(word) for word in words]))

    def folder(name):
        (found,) = (tmp_path / name).iterdir()
        return found

    words = f"sac.py --env-id swing:Swing-v0 {FLAGS} --total-timesteps 900 --run-dir whole"
    monkeypatch.setattr(sys, "argv", words.split())
    runpy.run_path(str(ROOT / "algos" / "sac.py"), run_name="__main__")
    run("--env-id", "swing:Swing-v0", *FLAGS.split(), "--total-timesteps", 450, "--run-dir", "parts")
    run("--resume", folder("parts"), "--total-timesteps", 900)
    whole, parts = (torch.load(folder(name) / "checkpoint.pt") for name in ("whole", "parts"))
    assert len(whole["progress"][3]) == 3 and whole["progress"][1] == 87
    assert [row[:3] for row in whole["progress"][3]] == [row[:3] for row in parts["progress"][3]]
    assert whole["envs"] == parts["envs"] and torch.equal(whole["rng"][0], parts["rng"][0])
    for name, weight in whole["agent"].items():
        assert torch.equal(weight, parts["agent"][name]), name
    for left, right in zip(whole["rb"]["columns"], parts["rb"]["columns"], strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("algo", [dads, hiro], ids=lambda algo: algo.FILE.stem)
def test_files_without_a_log_of_it_run_on_the_pendulum(algo, tmp_path):
    words = f"{golden.TINY} {golden.FLAGS[algo.FILE.stem]} --env-id Pendulum-v1 --run-dir {tmp_path}"
    words += " --total-timesteps 3200 --warmup-steps 800 --updates-per-step 0.02"
    results = algo.train(algo.parse_args(words.split()))
    assert results["updates"] == 48 and -1_800 < results["evaluations"][-1][1] < -100


# ----------------------------------------------------------------------------- our tasks as Gymnasium's environments


@pytest.mark.parametrize("name", OURS)
def test_specs_are_text_and_say_the_limit(name):
    env = gymnasium.make(f"skimo/{name}-v0")
    assert env.spec.max_episode_steps == env.unwrapped.envs.max_episode_steps == OURS[name]
    assert gymnasium.make(f"skimo/{name}-v0", max_episode_steps=3).spec.max_episode_steps == 3
    assert "TimeLimit" not in str(env)
    with pytest.warns(UserWarning, match="infinity"):  # physics bounds observations, the space does not
        check_env(env.unwrapped, skip_render_check="Kitchen" in name)
    spec = json.loads(env.spec.to_json())
    assert spec["entry_point"] == "data_tools.tasks.vector:SingleEnv" and spec["max_episode_steps"] == OURS[name]
    again = gymnasium.make(gymnasium.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    np.testing.assert_array_equal(env.reset(seed=3)[0], again.reset(seed=3)[0])
    assert gymnasium.wrappers.TimeAwareObservation(env).reset(seed=0)[0].shape == (env.observation_space.shape[0] + 1,)


@pytest.mark.parametrize("name", ["Maze", "Kitchen", "Calvin"])
def test_the_limit_is_a_truncation(name):
    envs = gymnasium.make_vec(f"skimo/{name}-v0", 2, vectorization_mode="vector_entry_point")
    envs.reset(seed=0)
    for step in range(1, OURS[name] + 1):
        _, _, terminations, truncations, infos = envs.step(np.zeros(envs.action_space.shape))
        assert not terminations.any() and truncations.tolist() == [step == OURS[name]] * 2
    assert not infos["is_success"].any()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda envs: pickle.loads(pickle.dumps(envs))])
@pytest.mark.parametrize("name", ["maze", "kitchen-6", "calvin-6", "Pendulum-v1"])
def test_copies_go_on_as_the_original(name, copied):
    envs = data_tools.make_envs(name, 2)
    assert copied(envs).rngs is None
    envs.reset(seed=1)
    actions = np.random.default_rng(0).uniform(-1, 1, (5, *envs.action_space.shape))
    for action in actions[:2]:
        envs.step(action)
    other = copied(envs)
    expected = [envs.step(action)[0] for action in actions[2:]]  # the copy stays where it is
    np.testing.assert_array_equal([other.step(action)[0] for action in actions[2:]], expected)
    assert other.get_state() == envs.get_state() and other.flags_stay


@pytest.mark.parametrize("name", ["skimo/Maze-v0", "skimo/Kitchen-v0", "skimo/Calvin-v0"])
def test_no_episode_is_reported_twice(name):
    envs = gymnasium.make_vec(name, 2, vectorization_mode="vector_entry_point", max_episode_steps=3)
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(envs)
    envs.reset(seed=0)
    results = [envs.step(np.zeros(envs.action_space.shape)) for _ in range(6)]
    assert ["episode" in infos for *_, infos in results] == [False, False, True, False, False, False]
    assert results[2][-1]["episode"]["l"].tolist() == [3, 3] and envs.episode_count == 2
    assert [step[3].tolist() for step in results[:3]] == [[False] * 2] * 2 + [[True] * 2]
    np.testing.assert_array_equal(results[5][0], results[2][0])


@pytest.mark.filterwarnings("ignore:.*ERROR")
def test_an_error_reaches_the_caller_from_another_process():
    error = NotFiniteError("NaN")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), NotFiniteError(error)):
        assert str(again) == "error: NaN"
    envs = AsyncVectorEnv([lambda: gymnasium.make("skimo/Maze-v0")] * 2)
    envs.reset(seed=0)
    with pytest.raises(NotFiniteError, match="^error: expected finite numbers of shape"):
        envs.step(np.full((2, 2), np.nan, np.float32))
