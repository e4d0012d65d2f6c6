"""What the three vector environments share, on each of them: Gymnasium's rules, single environments, states."""

import copy
import io
from collections.abc import Callable
from typing import NamedTuple

import gymnasium
import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from test_calvin import put
from test_kitchen import place as place_elements

import data_tools
from data_tools.tasks.calvin import CalvinVectorEnv
from data_tools.tasks.kitchen import SUBTASKS, KitchenVectorEnv
from data_tools.tasks.maze import GOAL, MazeVectorEnv
from data_tools.tasks.vector import MemberVectorEnv, SingleEnv
from data_tools.threads import fastest_threads

# ------------------------------------------------------------------------------------- how each task is nearly solved


def vector_of(env):
    """Return the vector of one in a single environment, or the vector itself."""
    return env.envs if isinstance(env, SingleEnv) else env


def solve_maze(env, member, partly=False):
    """Put the mass 1.9 cells from the goal or, partly, 2.3 cells from it and on its way: it arrives after 6 steps."""
    position, velocity = ((GOAL[0], GOAL[1] - 2.3), (0.0, 5.0)) if partly else ((GOAL[0], GOAL[1] - 1.9), (0.0, 0.0))
    vector_of(env).physics[member, 1:] = (*position, *velocity)


def solve_kitchen(env, member, partly=False):
    """Complete the sub-tasks or, partly, the first and the last."""
    place_elements(vector_of(env).kitchens[member], *(("microwave", "light_switch") if partly else SUBTASKS["kitchen"]))


def solve_calvin(env, member, partly=False):
    """Complete the sub-tasks, which count one by one, or, partly, the first."""
    if partly:
        put(env, drawer=0.2, member=member)
    else:
        put(env, slide=0.2, drawer=0.2, switch=0.07, member=member)
        vector_of(env).physics.led[member] = True


def break_maze(envs, patch):
    """In the next step the speed of member 1 is no number."""
    step, wrong = envs.simulator.step, np.zeros((envs.num_envs, 5))
    wrong[1, 3] = np.nan
    patch.setattr(envs.simulator, "step", lambda state, action: step(state + wrong, action))


def break_kitchen(envs, patch):
    envs.kitchens[1].data.qvel[0] = np.nan


def break_calvin(envs, patch):
    run = envs.physics._run

    def diverge(substeps, members=None):
        run(substeps, members)
        envs.physics.qvel[1, 3] = np.nan

    patch.setattr(envs.physics, "_run", diverge)


class Task(NamedTuple):
    vector: type
    action_dim: int
    solve: Callable  # (environment, member, partly): by hand
    diverge: Callable  # (environments, patch): the physics of member 1, while the patch lasts
    unstable: float  # the reward of that
    drift: tuple  # added to random actions: into walls, counters, table and blocks
    start_width: float  # of the observations at the start of an episode
    steps: int  # of the longest comparison, in which episodes have a twelfth of them

    def single(self, **arguments):
        return SingleEnv(self.vector, **arguments)


TASKS = {
    "maze": Task(MazeVectorEnv, 2, solve_maze, break_maze, 0, (0, 0.6), 4.3, 360),
    "kitchen": Task(KitchenVectorEnv, 9, solve_kitchen, break_kitchen, -100, (0, 0.6, 0, 0, 0, 0, 0, 0, 0), 0.03, 60),
    "calvin": Task(CalvinVectorEnv, 7, solve_calvin, break_calvin, 0, (0, 0.3, -0.5, 0, 0, 0, 0), 1e-3, 120),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def random_actions(task, num_envs, step):
    """Actions (E, A) that keep their direction for twelve steps; only those of the maze would go on for ever."""
    phase = np.random.default_rng(step // 12).uniform(-1, 1, (num_envs, task.action_dim)) + task.drift
    noise = np.random.default_rng(step).normal(0, 0.2, phase.shape)
    return np.clip(phase + noise, -1, 1).astype(np.float32)


# --------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("action", ["nan", "inf", "short", 0.0, "left", None])
def test_bad_actions(task, action):
    envs, A = task.vector(3), task.action_dim
    envs.reset(seed=0)
    special = {"nan": [0.0] * (A - 1) + [np.nan], "inf": [np.inf] * A, "short": [0.0] * (A - 1)}
    message = "could not convert string" if action == "left" else "expected finite numbers of shape"  # NumPy's own
    with pytest.raises(ValueError, match=message):
        envs.step([special.get(action, action)] * 3)


def test_bad_arguments(task):
    with pytest.raises(ValueError, match="render_mode"):
        task.vector(render_mode="human")
    for sizes in ((0, 5), (2, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            task.vector(sizes[0], max_episode_steps=sizes[1])
    envs = task.vector(2)
    for too_early in (lambda: envs.step(np.zeros((2, task.action_dim))), envs.get_state):
        with pytest.raises(gymnasium.error.ResetNeeded):
            too_early()
    with pytest.raises(gymnasium.error.ResetNeeded):
        envs.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(ValueError, match="seed"):
        envs.reset(seed=[1, 2, 3])
    with pytest.raises(gymnasium.error.Error):
        envs.reset(seed=[0, -1])
    with pytest.raises(gymnasium.error.ResetNeeded):  # nobody has begun
        envs.step(np.zeros((2, task.action_dim)))
    envs.reset(seed=0)
    for mask in (np.zeros(2, bool), np.ones(3, bool), np.ones(2)):
        with pytest.raises(ValueError, match="reset_mask"):
            envs.reset(options={"reset_mask": mask})


def test_equals_gymnasiums_vector_of_single_envs(task):
    # Terminations (two members), truncations (all), resets and infos, with later unseeded resets.
    num_envs, limit = 4, task.steps // 12 + 5
    torch.set_num_threads(2)
    envs = task.vector(num_envs, max_episode_steps=limit)
    make = [lambda: task.single(max_episode_steps=limit)] * num_envs
    reference = SyncVectorEnv(make, autoreset_mode=AutoresetMode.DISABLED)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.DISABLED
    assert envs.observation_space == reference.observation_space
    assert envs.action_space == reference.action_space
    np.testing.assert_equal(envs.reset(seed=7), reference.reset(seed=7))
    ended = []
    for step in range(task.steps):
        if step in (2, task.steps // 2):
            for i in (1, 3):
                for env, member in ((envs, i), (reference.envs[i].unwrapped, 0)):
                    task.solve(env, member, partly=i == 3)
        actions = random_actions(task, num_envs, step)
        result = envs.step(actions)
        np.testing.assert_equal(result, reference.step(actions))
        assert result[0].dtype == result[1].dtype == np.float32
        assert all(result[i].dtype == bool for i in (2, 3))
        done = result[2] | result[3]
        ended.append((result[2].sum(), result[3].sum()))
        if done.any():
            reset = envs.reset(options={"reset_mask": done})
            # Gymnasium takes the mask out of the options, hence a dictionary of its own.
            np.testing.assert_equal(reset, reference.reset(options={"reset_mask": done.copy()}))
    assert (np.sum(ended, axis=0) >= (1, 8)).all()
    np.testing.assert_equal(envs.reset(), reference.reset())
    np.testing.assert_equal(envs.reset(seed=[3, None, 4, 5]), reference.reset(seed=[3, None, 4, 5]))
    envs.close()


@pytest.mark.parametrize("name", ["kitchen", "calvin"])
def test_threads_do_not_change_the_result(name):
    task, made = TASKS[name], []
    for num_threads in (1, 2, 3):
        torch.set_num_threads(num_threads)
        made.append(task.vector(9))
    plain, *threaded = made
    expected = plain.reset(seed=0)
    for envs in threaded:
        np.testing.assert_equal(expected, envs.reset(seed=0))
    for step in range(task.steps // 2):
        actions = random_actions(task, 9, step)
        expected = plain.step(actions)
        for envs in threaded:
            np.testing.assert_equal(expected, envs.step(actions))
    for envs in threaded:
        envs.close()


def test_finished_members_freeze(task):
    envs = task.vector(3)
    envs.flags_stay = True
    first, _ = envs.reset(seed=0)
    task.solve(envs, 1)
    actions, total = np.full((3, task.action_dim), 0.2), np.zeros(3)
    for _ in range(4):  # CALVIN's sub-tasks count one by one
        obs, rewards, terminations, _, infos = envs.step(actions)
        total += rewards
    assert total[1] > 0 and total[[0, 2]].tolist() == [0, 0] and terminations.tolist() == [False, True, False]
    for _ in range(3):
        later, rewards, terminations, truncations, infos = envs.step(actions)
        assert np.array_equal(later[1], obs[1]) and not np.array_equal(later[0], obs[0])
        assert rewards.tolist() == [0, 0, 0]
        assert terminations.tolist() == infos["is_success"].tolist() == [False, True, False]
        assert infos.get("num_subtasks", np.array([0, 4, 0])).tolist() == [0, 4, 0]
        assert not truncations.any()
    after, infos = envs.reset(options={"reset_mask": np.array([False, True, False])})
    assert np.array_equal(after[[0, 2]], later[[0, 2]])
    assert np.abs(after[1] - first[1]).max() < task.start_width
    assert infos["_is_success"].tolist() == [False, True, False] and not infos["is_success"].any()
    assert not envs.step(actions)[2].any()


def test_diverged_physics_end_the_episode_of_their_member(task, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo may write its warnings to a file here
    envs, healthy = task.vector(3), task.vector(3)
    before, _ = envs.reset(seed=0)
    healthy.reset(seed=0)
    actions = np.full((3, task.action_dim), 0.3)
    with monkeypatch.context() as patch:
        task.diverge(envs, patch)
        obs, rewards, terminations, truncations, infos = envs.step(actions)
    expected = healthy.step(actions)[0]
    assert np.array_equal(obs, [expected[0], before[1], expected[2]])
    assert rewards.tolist() == [0, task.unstable, 0]
    assert terminations.tolist() == infos["unstable"].tolist() == [False, True, False]
    assert not truncations.any() and not infos["is_success"].any()
    envs.reset(options={"reset_mask": terminations})
    obs, *_, infos = envs.step(actions)  # the others are as if nothing had happened
    assert np.array_equal(obs[[0, 2]], healthy.step(actions)[0][[0, 2]]) and not infos["unstable"].any()


def test_state_round_trip_continues_exactly(task):
    def run(envs, first, last):
        results = []
        for step in range(first, last):
            results.append(envs.step(random_actions(task, 3, step)))
            if step == 5:
                task.solve(envs, 2, partly=True)
            done = results[-1][2] | results[-1][3]
            if step % 7 == 0 and done.any():
                results.append(envs.reset(options={"reset_mask": done}))
        return results

    envs = task.vector(3, max_episode_steps=20)
    envs.reset(seed=3)
    for cut in (12, 20, 21):  # in an episode, at its end, after it
        last_obs = run(envs, 0, cut)[-1][0]
        file = io.BytesIO()
        torch.save(envs.get_state(), file)
        expected = run(envs, cut, cut + 30)
        file.seek(0)
        torch.set_num_threads(2)
        other = task.vector(3, max_episode_steps=20)
        assert np.array_equal(other.set_state(torch.load(file, weights_only=True)), last_obs)
        for left, right in zip(expected, run(other, cut, cut + 30), strict=True):
            np.testing.assert_equal(left, right)
        envs.reset(seed=3)


def test_states_are_checked(task):
    """One that does not fit is refused before anything has changed."""
    envs = task.vector(3)
    envs.reset(seed=0)
    state = envs.get_state()
    envs.step(np.zeros(envs.action_space.shape))
    moved = envs.get_state()
    with pytest.raises(ValueError, match="3 members"):
        task.vector(2).set_state(state)
    physics = copy.deepcopy(state["physics"])
    physics[1][3] = float("nan")
    for change, message in [
        ({"waiting": [False] * 2}, "waiting has shape"),
        ({"steps": [0] * 4}, "steps has shape"),
        ({"rng": state["rng"][:2]}, "random numbers for 2 members"),
        ({"physics": physics}, "NaN"),
        ({"physics": [[0.0] * 3] * 3}, "shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            envs.set_state({**state, **change})
    for name in ("rng", *envs.saved):
        with pytest.raises(ValueError, match=f"has no {name}: another version"):
            envs.set_state({key: value for key, value in state.items() if key != name})
    assert envs.get_state() == moved
    envs.set_state(state)
    assert envs.get_state() == state


def test_a_kitchen_that_diverged_stays_so_in_a_restored_state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings to a file here
    envs = KitchenVectorEnv(2)
    envs.reset(seed=0)
    sound = envs.get_state()
    envs.kitchens[1].data.qvel[0] = 1e12
    envs.step(np.zeros((2, 9)))
    other = KitchenVectorEnv(2)
    other.set_state(envs.get_state())
    envs.flags_stay = other.flags_stay = True
    for _ in range(2):
        result = envs.step(np.full((2, 9), 0.3))
        np.testing.assert_equal(result, other.step(np.full((2, 9), 0.3)))
        assert result[4]["unstable"].tolist() == result[2].tolist() == [False, True]
    started = {"reset_mask": np.array([False, True])}
    np.testing.assert_equal(envs.reset(options=started), other.reset(options=started))
    np.testing.assert_equal(envs.step(np.full((2, 9), 0.3)), other.step(np.full((2, 9), 0.3)))
    envs.step(np.zeros((2, 9)))
    envs.kitchens[1].data.qvel[0] = 1e12
    assert envs.step(np.zeros((2, 9)))[2].tolist() == [False, True]
    envs.set_state(sound)
    assert not envs.step(np.zeros((2, 9)))[2].any()


def test_a_video_is_recorded_when_the_environments_close(tmp_path):
    envs = data_tools.make_envs("maze", 2, tmp_path / "episode.mp4")
    plain = data_tools.make_envs("maze", 2)
    np.testing.assert_equal(envs.reset(seed=0), plain.reset(seed=0))
    drawn = []  # the pictures, as the environment draws them
    for _ in range(7):
        np.testing.assert_equal(envs.step(np.ones((2, 2))), plain.step(np.ones((2, 2))))
        drawn.append(envs.env.draw(0))
    kept = sum(len(frame) for frame in envs.frames)
    envs.close()
    assert [path.name for path in tmp_path.iterdir()] == ["episode.mp4"]
    with imageio.get_reader(tmp_path / "episode.mp4") as video:
        frames = list(video.iter_data())
        fps = video.get_meta_data()["fps"]
    # The maze has 100 steps per second: of steps 0 to 6 every second one is shown.
    assert len(frames) == 4 and fps == 50
    for frame, picture in zip(frames, drawn[::2], strict=True):
        assert frame.shape == picture.shape
        assert np.abs(frame.astype(int) - picture).mean() < 1  # but for the video's compression
    assert kept < 0.1 * 4 * drawn[0].nbytes


def test_a_video_ends_with_its_episode_though_others_go_on(tmp_path):
    envs = data_tools.make_envs("maze", 2, tmp_path / "episode.mp4")
    envs.reset(seed=0)
    envs.unwrapped.physics[0, 1:3] = GOAL
    for _ in range(9):
        _, _, terminations, _, _ = envs.step(np.zeros((2, 2)))
    assert terminations.tolist() == [True, False] and len(envs.frames) == 1
    envs.close()


def test_a_video_of_odd_pictures_gets_a_row_and_a_column(tmp_path):
    envs = data_tools.make_envs("maze", 1, tmp_path / "odd.mp4")
    picture = np.zeros((31, 45, 3), np.uint8)
    picture[:, :20] = 200
    envs.env.draw = lambda member: picture
    envs.reset(seed=0)
    envs.step(np.ones((1, 2)))
    envs.close()
    with imageio.get_reader(tmp_path / "odd.mp4") as video:
        (frame,) = video.iter_data()
    assert frame.shape == (32, 46, 3)
    assert np.abs(frame[:31, :45].astype(int) - picture).mean() < 3  # but for the video's compression


class Rail(MemberVectorEnv):
    """Counts its steps; `reached` is what advance() returns beside the rewards, `seen` the size of an observation."""

    def __init__(self, num_envs, max_episode_steps=5, reached=lambda running: running & False, seen=1):
        super().__init__(num_envs, 1, 1, max_episode_steps)
        self.position = np.zeros((num_envs, seen))
        self.reached = reached

    def begin(self, members):
        self.position[members] = 0

    def advance(self, actions, running):
        self.position += 1
        return np.ones(len(running)), self.reached(running)

    def observations(self):
        return self.position


@pytest.mark.parametrize("kind", [bool, float, list])
def test_goals_may_be_told_as_numbers(kind):
    def reached(running):
        goals = running & (envs.position[:, 0] == [2, 9])
        return goals.tolist() if kind is list else goals.astype(kind)

    envs = Rail(2, reached=reached)
    envs.flags_stay = True
    envs.reset(seed=0)
    flags = []
    for _ in range(7):
        _, _, terminations, truncations, _ = envs.step(np.zeros((2, 1)))
        flags.append([*terminations.tolist(), *truncations.tolist()])
    assert envs.returns.tolist() == [2, 5]  # advance() pays those that stand still, too
    assert flags == [[False] * 4] + [[True, False, False, False]] * 3 + [[True, False, False, True]] * 3


def test_an_environment_made_from_another_keeps_its_state():
    class Warm(Rail):
        saved = dict(heat=np.float64)

    class Braked(Warm):
        saved = dict(force=np.float64)

    assert Braked.saved.keys() == MemberVectorEnv.saved.keys() | {"heat", "force"}


def test_what_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match=r"observations\(\) must have shape \(2, 1\), they have \(2, 4\)"):
        Rail(2, seen=4).reset(seed=0)
    envs = Rail(2, reached=lambda running: running[:, None])
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"rewards and successes \(2,\), they are \(2,\) and \(2, 1\)"):
        envs.step(np.zeros((2, 1)))


def test_observations_are_copies():
    """An environment of the user's may hand out the array that it moves in place, of another type."""
    envs = Rail(2)
    seen = [envs.reset(seed=0)[0], *(envs.step(np.zeros((2, 1)))[0] for _ in range(3))]
    assert [obs.tolist() for obs in seen] == [[[k], [k]] for k in range(4)] and seen[0].dtype == np.float32


@pytest.mark.parametrize("seconds, fastest", [({1: 2.0, 2: 1.5}, 2), ({1: 0.02, 2: 0.6}, 1)])
def test_torch_gets_the_faster_number_of_threads(monkeypatch, seconds, fastest):
    ticks = []
    clock = lambda: ticks.append(seconds[torch.get_num_threads()]) or sum(ticks)  # noqa: E731
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    assert fastest_threads() == fastest
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    torch.set_num_threads(9)
    assert fastest_threads() == 9
