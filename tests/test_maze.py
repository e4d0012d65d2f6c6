"""The maze against its specification: printed grid, equations of motion, its offline data."""

import functools

import gymnasium
import numpy as np
import pytest
import torch

import data_tools
from data_tools.scripted import maze as scripted
from data_tools.scripted.maze import collect
from data_tools.tasks.maze import GOAL, START, MazeVectorEnv, Physics, cell_of, geodesic_distance, make_layout
from data_tools.tasks.vector import SingleEnv

# The maze as printed in the specification, written down independently of the generator.
GRID = """
##########################################
#..............#................#........#
#..#...........#...##.#.........#...#....#
#..#...#.......#.####.#########.#...#....#
#..#...#.......#...##.#.........#..###...#
#..#..###......#...#............#........#
#..#...........#...#.......#....#..###...#
#.###.###......#...##.#....#....#...#....#
#......#....#########.####.#....#...#....#
#.###..#.......#...##.#....#....#...#....#
#..#...#..#....#...#....S..#....#...#....#
#..#...#..#....#...#.......#....#.#.#....#
#..#...#..#...###..#..###########.###....#
#..#...#..#.......###......#....#.#.#....#
#..#...#..#...###..........#....#...#.#..#
#..#...#..#....#..###......#...###....#..#
#..#...#..#........#.#.#...#..........#..#
#..#.....#############.###.#...###....#..#
#.......G.#........#.#.#..###...#.....#..#
#.........#........#..................#..#
#........###.#............###.........#..#
#..........#.###########...#.........###.#
#...#....###.#.................#.........#
#...#.....#....................#.....###.#
#...#.....#....................#......#..#
##.##.....#...#................#......#..#
##.#################...........#......#..#
##.###...#.#################...#......#..#
#........#.#..#................#......#..#
#..###........#..#.#...........#......#..#
#...#.......######.###########.#......#..#
#...#.........#..#.#...........#.........#
#...#.........#....#.#.........#.........#
#...#.......########.#######..###........#
#...#........###...#.#...................#
#...#.........................###........#
#...#........###..........#.#..#.........#
#.......#.#...#..##########.####.........#
#.#######.###########.....#.#..#.........#
#.......#.#...#................#.........#
#..............................#.........#
##########################################
"""

MASS = 1000 * 4 / 3 * np.pi * 0.1**3  # kg
TIME_STEP = 0.01  # s


MazeEnv = functools.partial(SingleEnv, MazeVectorEnv)


def place(env, position, velocity=(0.0, 0.0)):
    """Put a single environment's point mass somewhere in the middle of an episode."""
    env.envs.physics[0, 1:] = (*position, *velocity)


# ------------------------------------------------------------------------------------------------------------- geometry


def test_layout_is_the_printed_grid():
    rows = GRID.split()
    walls = np.array([[cell == "#" for cell in row] for row in rows])
    assert walls.shape == (42, 42)
    assert np.array_equal(make_layout(), walls)
    assert make_layout().sum() == 582
    assert (rows[START[0]][START[1]], rows[GOAL[0]][GOAL[1]]) == ("S", "G")
    with pytest.raises(ValueError):  # nobody can change the maze of everybody else
        make_layout()[1, 1] = True


def test_geodesic_distance():
    layout = make_layout()
    to_goal = geodesic_distance(layout, GOAL)
    assert to_goal[START] == 34
    assert np.isfinite(to_goal).sum() == 1181
    assert np.argwhere(np.isinf(to_goal) & ~layout).tolist() == [[16, 20]]
    assert np.isinf(to_goal[layout]).all()
    assert to_goal[GOAL] == 0
    # A distance field: every other reachable cell has a neighbour that is one move closer, and none that is two.
    for i, j in np.argwhere(np.isfinite(to_goal) & (to_goal > 0)):
        neighbours = to_goal[[i - 1, i + 1, i, i], [j, j, j - 1, j + 1]]
        assert neighbours.min() == to_goal[i, j] - 1
    distances = np.array([geodesic_distance(layout, cell) for cell in np.argwhere(np.isfinite(to_goal))[::5]])
    finite = distances[np.isfinite(distances)]
    assert finite.max() in (84, 85, 86)  # of a fifth of the goals; 86 over all
    assert finite.mean() == pytest.approx(36.6, abs=0.5)


def test_cell_of_agrees_with_the_walls_in_position_space():
    # Wall cell (w, h) covers q in [w - 0.7, w + 0.3] x [h - 0.7, h + 0.3].
    rng = np.random.default_rng(0)
    q = rng.uniform(0, 41, (5000, 2))
    inside = np.zeros(len(q), dtype=bool)
    for w, h in np.argwhere(make_layout()):
        inside |= (abs(q[:, 0] - (w - 0.2)) < 0.5) & (abs(q[:, 1] - (h - 0.2)) < 0.5)
    cells = cell_of(np.concatenate([q, rng.normal(size=q.shape)], axis=1))
    assert cells.shape == (5000, 2) and cells.dtype.kind == "i"
    assert np.array_equal(make_layout()[cells[:, 0], cells[:, 1]], inside)
    assert cell_of([-3.0, 50.0]).tolist() == [0, 41]


# -------------------------------------------------------------------------------------------------------------- physics


def test_free_flight_follows_the_equation_of_motion():
    env = MazeEnv()
    env.reset(seed=0)
    place(env, (22.8, 17.8))  # a hall without walls around
    rng = np.random.default_rng(0)
    for _ in range(60):
        q, v = env.envs.physics[0, 1:3].copy(), env.envs.physics[0, 3:].copy()
        action = rng.uniform(-1, 1, 2)
        env.step(action)
        v_next = np.clip(v, -5, 5)
        v_next = v_next + TIME_STEP * (100 * action - v_next) / (MASS + TIME_STEP)
        assert np.allclose(env.envs.physics[0, 3:], v_next, atol=1e-9)
        assert np.allclose(env.envs.physics[0, 1:3], q + TIME_STEP * v_next, atol=1e-9)


def test_actions_are_clipped_and_speed_is_limited():
    env = MazeEnv()
    env.reset(seed=0)
    speeds = []
    for action in ((0.0, 1.0), (0.0, 7.0)):
        place(env, (22.8, 14.8))
        speeds.append([env.step(action)[0][3] for _ in range(150)])
    assert speeds[0] == speeds[1]
    assert max(speeds[0]) == pytest.approx(5 + TIME_STEP * (100 - 5) / (MASS + TIME_STEP), abs=1e-3)  # 5.226


def test_a_wall_stops_the_mass_at_its_radius():
    physics, state = Physics(), np.array([[0.0, 18.8, 5.0, 0.0, 0.0]])  # wall cell (18, 10) begins at q_y = 9.3
    for _ in range(300):
        state = physics.step(state, [[0.0, 1.0]])
    _, row, column, _, speed = state[0]
    assert column == pytest.approx(9.3 - 0.1, abs=0.02)  # contacts are a little soft
    assert speed == pytest.approx(0.0, abs=0.05)
    assert row == pytest.approx(18.8, abs=1e-3)  # no friction, no push sideways
    for _ in range(200):
        state = physics.step(state, [[1.0, 1.0]])
    assert state[0, 1] > 18.9 and state[0, 2] < 9.31  # slides along walls, never through


def test_a_start_inside_a_wall_can_be_left():
    def in_wall(obs):
        cells = cell_of(obs)
        return make_layout()[cells[:, 0], cells[:, 1]]

    env = MazeVectorEnv(200)
    obs, _ = env.reset(seed=0)
    begin = in_wall(obs)
    rng = np.random.default_rng(0)
    for step in range(300):
        if step % 30 == 0:
            actions = np.sign(rng.uniform(-1, 1, (200, 2)))
        obs = env.step(actions)[0]
    assert begin.sum() > 30 and in_wall(obs)[begin].mean() < 0.15
    assert not in_wall(obs)[~begin].any()  # and nobody gets into a wall from outside


# ------------------------------------------------------------------------------------------------------------- episodes


def test_start_distribution():
    env = MazeVectorEnv(400)
    obs, _ = env.reset(seed=0)
    low, high = obs[:, :2].min(0), obs[:, :2].max(0)
    assert obs.dtype == np.float32 and obs.shape == (400, 4)
    # One step has passed: contacts may already move a mass, by less than 0.1.
    assert (low > np.subtract(START, 2.1)).all() and (high < np.add(START, 2.1)).all()
    assert np.allclose(obs[:, :2].mean(0), START, atol=0.25)  # standard error 1.15 / sqrt(400) = 0.06
    assert np.allclose(obs[:, :2].std(0), 4 / np.sqrt(12), atol=0.12)
    cells = cell_of(obs)
    assert 0.15 < make_layout()[cells[:, 0], cells[:, 1]].mean() < 0.35  # about a quarter begins inside a wall
    free = ~make_layout()[cells[:, 0], cells[:, 1]]
    assert np.mean(obs[free, 2:] == 0) > 0.8  # at rest, unless a wall touches


def test_maze_far_begins_61_moves_from_the_same_goal():
    far = (36, 37)
    assert geodesic_distance(make_layout(), GOAL)[far] == 61
    envs = data_tools.make_envs("maze-far", 400)
    obs, _ = envs.reset(seed=0)
    assert np.abs(obs[:, :2] - far).max() < 2.1 and np.allclose(obs[:, :2].mean(0), far, atol=0.25)
    assert np.isfinite(geodesic_distance(make_layout(), GOAL)[tuple(cell_of(obs).T)]).all()  # no start is cut off
    envs.physics[:, 1:3] = GOAL
    _, rewards, terminations, _, _ = envs.step(np.zeros((400, 2)))
    assert (rewards == 100).all() and terminations.all() and envs.max_episode_steps == 2000


def test_an_episode_begins_one_step_without_force_after_its_draw():
    """A quarter of the draws lie in walls, which push them."""
    obs, _ = MazeVectorEnv(50).reset(seed=7)
    drawn = np.zeros((50, 5))
    for i in range(50):
        rng, _ = gymnasium.utils.seeding.np_random(7 + i)
        drawn[i, 1:3] = START + rng.uniform(-2, 2, 2)
    first = Physics().step(drawn, np.zeros((50, 2)))[:, 1:]
    np.testing.assert_allclose(obs, first, rtol=1e-6)
    assert np.abs(first[:, :2] - drawn[:, 1:3]).max() > 0.01


def test_success_within_the_goal_radius():
    env = MazeEnv()
    env.reset(seed=0)
    for offset, success in ((2.001, False), (1.999, True)):
        place(env, (GOAL[0], GOAL[1] - offset))
        _, reward, terminated, truncated, info = env.step((0.0, 0.0))
        assert (reward, terminated, truncated) == (100.0 * success, success, False)
        assert info["is_success"] is success and isinstance(reward, float)


# ------------------------------------------------------------------------------------------------------------ rendering


def test_frames_show_maze_and_agent():
    env = gymnasium.make("skimo/Maze-v0", render_mode="rgb_array")
    env.reset(seed=0)
    place(env.unwrapped, (24.8, 19.8))
    env.step((0.0, 0.0))
    frame = env.render()
    assert frame.shape == (504, 504, 3) and frame.dtype == np.uint8
    centres = frame[6::12, 6::12].astype(int)  # (42, 42, 3), one pixel per cell, row axis down
    grey = np.ptp(centres, axis=2) < 10
    assert np.all((centres.sum(2) < 600)[make_layout()])
    assert (grey & (centres.min(2) == 255))[~make_layout()].mean() > 0.9
    assert centres[25, 20].tolist() == [203, 24, 29]  # the agent at q + 0.2 = cell (25, 20)
    for _ in range(40):
        env.step((1.0, 0.0))
    later = env.render()[6::12, 6::12]
    assert later[25, 20].tolist() != [203, 24, 29] and later[26, 20].tolist() != [255, 255, 255]  # moved down the rows
    assert MazeEnv().render() is None

    vector_env = MazeVectorEnv(2, render_mode="rgb_array")
    vector_env.reset(seed=0)
    frames = vector_env.render()
    single = MazeEnv(render_mode="rgb_array")
    single.reset(seed=1)
    assert len(frames) == 2 and np.array_equal(frames[1], single.render())


# --------------------------------------------------------------------------------------------------------- offline data


def q_iteration(goal):
    """The planner as the public script has it: 200 sweeps, discount 0.99, reward 1 in the goal cell."""
    free = ~make_layout()
    moves = [(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)]
    value, reward = np.zeros(free.shape), np.zeros(free.shape)
    reward[goal] = 1.0
    for _ in range(200):
        q = []
        for di, dj in moves:
            target_free, target_value = (np.roll(x, (-di, -dj), axis=(0, 1)) for x in (free, value))
            q.append(reward + 0.99 * np.where(target_free, target_value, value))
        value = np.max(q, axis=0)
    return np.argmax(q, axis=0)


@pytest.mark.parametrize("goal", [(18, 8), (1, 1), (40, 40), (3, 16), (16, 20)])
def test_policy_equals_q_iteration(goal):
    free = ~make_layout()
    assert np.array_equal(scripted._policy(goal)[free], q_iteration(goal)[free])


@pytest.fixture(scope="module")
def dataset():
    return collect(300, seed=0, progress=False)


def test_collected_data_have_the_known_statistics(dataset):
    # Standard error of the mean length of 300 trajectories: 88 / sqrt(300) = 5.
    noisy = scripted.statistics(dataset)
    assert noisy["trajectories"] == 300
    assert noisy["mean length"] == pytest.approx(469, abs=15)
    assert noisy["mean |a|"] == pytest.approx(0.637, abs=0.01)
    plain = scripted.statistics(collect(300, noise=0.0, seed=1, progress=False))
    assert plain["mean length"] == pytest.approx(464, abs=15)
    assert plain["mean |a|"] == pytest.approx(0.571, abs=0.01)
    assert plain["saturated share"] == pytest.approx(0.45, abs=0.015)
    assert plain["mean speed"] == pytest.approx(3.83, abs=0.07)
    for figures in (noisy, plain):
        assert 50 < figures["shortest"] < 150 and 0.7 < figures["share at cap"] < 0.95


def test_trajectories_are_what_they_claim(dataset):
    starts, lengths = dataset.episode_starts.numpy(), dataset.episode_lengths.numpy()
    observations, actions = dataset.observations.numpy(), dataset.actions.numpy()
    terminals, timeouts = dataset.terminals.numpy(), dataset.timeouts.numpy()
    ends = starts + lengths - 1
    assert lengths.min() > 50 and lengths.max() == 500
    assert not (terminals & timeouts).any()
    assert np.array_equal(np.flatnonzero(terminals | timeouts), ends)
    assert np.all(lengths[timeouts[ends]] == 500)
    assert np.allclose(actions * 100, np.rint(actions * 100), atol=1e-4) and np.abs(actions).max() == 1.0
    assert np.abs(observations[starts, 2:]).max() < 0.6  # N(0, 0.1^2)
    layout = make_layout()
    first = np.rint(observations[starts, :2]).astype(int)
    assert np.abs(observations[starts, :2] - first).max() <= 0.1 + 1e-6  # centre index of a cell + U(-0.1, 0.1)
    assert not layout[first[:, 0], first[:, 1]].any()
    # Successive rows belong together: replaying the stored actions from the first row meets all the others.
    physics = Physics()
    for start in starts[:10]:
        state = np.concatenate([[0.0], observations[start]])[None]
        for row in range(start, start + 50):  # every trajectory has more than 50 rows
            state = physics.step(state, actions[row : row + 1])
            assert np.allclose(state[0, 1:], observations[row + 1], atol=1e-3)
    # A terminal means arrival: one step later the mass is within 0.1 of the centre index of a free cell.
    for end in ends[terminals[ends]]:
        position = physics.step(np.concatenate([[0.0], observations[end]])[None], actions[end : end + 1])[0, 1:3]
        assert np.linalg.norm(position - np.rint(position)) < 0.1 + 1e-3


def test_collection_depends_on_the_seed_alone(dataset):
    fewer = collect(10, seed=0, progress=False)  # the beginning of the same stream
    assert torch.equal(fewer.observations, dataset.observations[: len(fewer)])
    assert collect(10, seed=1, progress=False).fingerprint != fewer.fingerprint
    assert fewer.attributes["seed"] == 0 and fewer.attributes["noise"] == 0.5
