"""The maze task of SkiMo (https://arxiv.org/abs/2207.07560): a point mass in a 40 x 40 maze, and its offline data.

Layout, physics and controller follow the D4RL fork and the SPiRL scripts that the authors' release uses.
Coordinates: cell (row, column) of the 42 x 42 layout; q = position in cells, first coordinate = row axis; time in steps
of 0.01 s. Wall cell (i, j) covers q in [i - 0.7, i + 0.3] x [j - 0.7, j + 0.3].
Shapes: E members of a vector environment, N point masses, B trajectories of a chunk.

    python -m data_tools.maze --help                     # collect the offline data, print their statistics
    python -m data_tools.maze --plot trajectories.png    # and draw some of them
"""

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from mujoco.rollout import Rollout
from numpy.lib.stride_tricks import sliding_window_view
from tqdm import tqdm

from data_tools.dataset import DataError, OfflineDataset, load_dataset
from data_tools.vector import MemberVectorEnv, check_render_mode, checked_action

START = (10, 24)  # an episode starts at q = START + U(-2, 2)^2
GOAL = (18, 8)
GOAL_RADIUS = 2.0  # cells; 2.0 is the value of SkiLD and SkiMo, D4RL itself has 0.5
GOAL_REWARD = 100.0
MAX_EPISODE_STEPS = 2000
MAX_SPEED = 5.0  # cells / s and axis, enforced before each physics step
NUM_TRAJECTORIES = 3046  # paper, section 4.1

# ------------------------------------------------------------------------------------------------------------- geometry


@cache
def make_layout() -> np.ndarray:
    """Return the walls of the maze, (42, 42) bool, True = wall: D4RL's random-wall generator with seed 0.

    Walls are added until they fill a quarter of the 40 x 40 interior, preferably where there are few so far. Each has a
    door. Later walls may close earlier doors; nothing is repaired, so cell (16, 20) is sealed. The array is read-only.
    """
    size, box_width = 40, 5
    rng = np.random.default_rng(0)
    grid = np.zeros((size, size), dtype=bool)
    while grid.mean() < 0.25:
        along_rows = rng.random() < 0.5
        n = int(max(0.2 * size * rng.random() + 0.3 * size, 3))  # length of the wall, 12..19
        door = rng.choice(np.arange(1, n - 1))
        # Draw the place of an n x 5 box with probability softmax(-20 density); the wall is the middle line of the box.
        walls = grid if along_rows else grid.T  # a view: what follows always builds along the first axis
        density = sliding_window_view(walls, (n, box_width)).mean(axis=(2, 3))
        density = density if along_rows else density.T  # back to the grid's axes, the order of the draw
        weights = np.exp(-20 * density)
        place = rng.choice(density.size, p=(weights / weights.sum()).ravel())
        i, j = np.unravel_index(place, density.shape)
        i, j = (i, j + 2) if along_rows else (j, i + 2)
        walls[i : i + n, j] = True
        walls[i + door, j] = False
        for jamb in (door - 1, door + 1):  # a door is a passage three cells deep
            walls[i + jamb, [j - 1, j + 1]] = True
    layout = np.pad(grid, 1, constant_values=True)
    layout.flags.writeable = False  # the cached array is shared
    return layout


def cell_of(obs) -> np.ndarray:
    """Return the cell (row, column), (..., 2) int, of observations (or positions) (..., 2 or more).

    The free space of cell c is centred at q = c - 0.2 (see the module docstring). The result lies within the layout.
    """
    cells = np.rint(np.asarray(obs)[..., :2] + 0.2).astype(int)
    return np.clip(cells, 0, make_layout().shape[0] - 1)


def geodesic_distance(layout: np.ndarray, goal: tuple[int, int]) -> np.ndarray:
    """Return the number of moves between 4-connected free cells from each cell to cell `goal`.

    layout (42, 42) bool, True = wall. Result (42, 42) float, infinite for walls and cells that are cut off.
    """
    distance = np.full(layout.shape, np.inf)
    frontier = np.zeros(layout.shape, dtype=bool)
    frontier[tuple(goal)] = True
    frontier &= ~layout
    for moves in itertools.count():
        if not frontier.any():
            return distance
        distance[frontier] = moves
        grown = np.zeros_like(frontier)
        grown[1:] |= frontier[:-1]
        grown[:-1] |= frontier[1:]
        grown[:, 1:] |= frontier[:, :-1]
        grown[:, :-1] |= frontier[:, 1:]
        frontier = grown & ~layout & np.isinf(distance)


# -------------------------------------------------------------------------------------------------------------- physics


@cache
def _model() -> mujoco.MjModel:
    """Return D4RL's point-mass model for the layout: force control, 100 N per unit action, frictionless walls."""
    # The body frame is at world (1.2, 1.2) and cell (i, j) at world (i + 1, j + 1): that is the offset of 0.2 in q.
    walls = "".join(
        f'<geom type="box" pos="{i + 1} {j + 1} 0" size="0.5 0.5 0.2" contype="1" conaffinity="1"/>'
        for i, j in np.argwhere(make_layout())
    )
    # warmstart off: the contact solver must not start from the forces of the step before, which are no part of
    #   (position, velocity). Only then can any thread continue any member, and a checkpoint is exact.
    # autoreset off: MuJoCo must not put a diverged state silently back to the origin; the environments check for it.
    xml = f"""
    <mujoco model="skimo_maze">
      <compiler inertiafromgeom="true" angle="radian"/>
      <option timestep="0.01" gravity="0 0 0" iterations="20" integrator="Euler">
        <flag warmstart="disable" autoreset="disable"/>
      </option>
      <default>
        <joint damping="1" limited="false"/>
        <geom friction="0.5 0.1 0.1" density="1000" margin="0.002" condim="1" contype="2" conaffinity="1"/>
      </default>
      <worldbody>
        {walls}
        <body name="particle" pos="1.2 1.2 0">
          <geom type="sphere" size="0.1" contype="1" conaffinity="1"/>
          <joint name="row" type="slide" axis="1 0 0"/>
          <joint name="column" type="slide" axis="0 1 0"/>
        </body>
      </worldbody>
      <actuator>
        <motor joint="row" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
        <motor joint="column" ctrlrange="-1 1" ctrllimited="true" gear="100"/>
      </actuator>
    </mujoco>"""
    return mujoco.MjModel.from_xml_string(xml)


class _Physics:
    """Steps N point masses at once. A row of `state` is MuJoCo's full state (time, q_x, q_y, v_x, v_y), float64."""

    def __init__(self, num_threads):
        """num_threads 0 works on the calling thread."""
        self.rollout = Rollout(nthread=num_threads)
        self.data = [mujoco.MjData(_model()) for _ in range(max(num_threads, 1))]

    def step(self, state, action):
        """Return the state (N, 5) after one step of 0.01 s with actions (N, 2) in [-1, 1]."""
        state = state.copy()
        np.clip(state[:, 3:], -MAX_SPEED, MAX_SPEED, out=state[:, 3:])
        after = np.empty((len(state), 1, 5))
        self.rollout.rollout(
            [_model()] * len(state),
            self.data,
            initial_state=state,
            control=np.ascontiguousarray(action, dtype=np.float64)[:, None],
            nstep=1,
            state=after,
            control_spec=mujoco.mjtState.mjSTATE_CTRL.value,
            skip_checks=True,  # the checks copy and tile the arrays, which costs more than the physics
        )
        return after[:, 0]

    def close(self):
        self.rollout.close()


# ------------------------------------------------------------------------------------------------------------ rendering

PIXELS_PER_CELL = 12  # 504 x 504 frames


def _pixel(position):
    """Return the pixel (row, column), int, of positions (..., 2) in cells; wall cell (i, j) spans 12 x 12 pixels."""
    return np.clip((np.asarray(position) + 0.7) * PIXELS_PER_CELL, 0, 42 * PIXELS_PER_CELL - 1).astype(int)


@cache
def _background():
    """Return the frame without the agent, (504, 504, 3) uint8."""
    axis = (np.arange(42 * PIXELS_PER_CELL) + 0.5) / PIXELS_PER_CELL - 0.7  # q of each pixel row (and column)
    distance = np.hypot(axis[:, None] - GOAL[0], axis[None, :] - GOAL[1])
    walls = np.kron(make_layout(), np.ones((PIXELS_PER_CELL, PIXELS_PER_CELL), dtype=bool))
    start = np.maximum(abs(axis[:, None] - START[0]), abs(axis[None, :] - START[1]))
    frame = np.full((*walls.shape, 3), 255, dtype=np.uint8)
    frame[start <= 2.0] = (222, 235, 247)  # where episodes start
    frame[distance <= GOAL_RADIUS] = (186, 228, 179)
    frame[walls] = (189, 189, 189)
    frame[(distance <= GOAL_RADIUS) & walls] = (150, 180, 145)
    frame[distance <= 0.4] = (35, 139, 69)
    return frame


def _draw_frame(trail):
    """Return (504, 504, 3) uint8: the maze from above with the positions (T, 2) of an episode; no OpenGL needed."""
    frame = _background().copy()
    size = frame.shape[0]
    pixels = _pixel(trail)  # (T, 2)
    line = np.mgrid[-1:2, -1:2].reshape(2, -1)  # a dot of 3 x 3 pixels; successive dots overlap at any legal speed
    rows, columns = (np.clip(pixels[:, k, None] + line[k], 0, size - 1) for k in range(2))
    frame[rows, columns] = (107, 174, 214)
    disc = np.mgrid[-6:7, -6:7].reshape(2, -1)
    disc = disc[:, (disc**2).sum(0) <= 30]
    for pixel, colour in ((pixels[0], (8, 81, 156)), (pixels[-1], (203, 24, 29))):  # start, agent
        frame[np.clip(pixel[0] + disc[0], 0, size - 1), np.clip(pixel[1] + disc[1], 0, size - 1)] = colour
    return frame


def draw_maze(ax) -> None:
    """Draw walls, start and goal on matplotlib axes `ax`, row axis down: plot positions q as `ax.plot(q_y, q_x)`."""
    edges = (-0.7, 41.3)
    ax.imshow(make_layout(), cmap="Greys", vmin=0, vmax=3, extent=(*edges, *edges[::-1]), interpolation="none")
    ax.add_patch(_circle(GOAL[::-1], GOAL_RADIUS))
    ax.plot(*START[::-1], "o", color="tab:blue", markersize=8, markeredgecolor="white", zorder=4, label="start")
    ax.plot(*GOAL[::-1], "*", color="tab:green", markersize=14, markeredgecolor="white", zorder=4, label="goal")
    ax.set(xlim=edges, ylim=edges[::-1], aspect="equal", xticks=[], yticks=[])


def _circle(centre, radius):
    from matplotlib.patches import Circle  # only plots need matplotlib

    return Circle(centre, radius, facecolor="tab:green", alpha=0.25, edgecolor="none", zorder=2)


# --------------------------------------------------------------------------------------------------------- environments

OBSERVATION_SPACE = gymnasium.spaces.Box(-np.inf, np.inf, (4,), np.float32)
ACTION_SPACE = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)


class MazeEnv(gymnasium.Env):
    """One maze: find the goal 34 cells away within 2,000 steps.

    Observation (4,) float32: (q_x, q_y) in cells, (v_x, v_y) in cells / s, not normalised. Action (2,) in [-1, 1],
    clipped: force / 100 N per axis. Reward 100 within 2 cells of the goal, which ends the episode (terminated), else 0;
    truncated after `max_episode_steps`. `info["is_success"]`: this step reached the goal. `info["unstable"]`: the
    physics diverged; the episode ends (terminated, reward 0) with the last finite observation.
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 100}
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def __init__(self, max_episode_steps: int = MAX_EPISODE_STEPS, render_mode: str | None = None):
        check_render_mode(render_mode)
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self._data = mujoco.MjData(_model())

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; `options` are not used. The first observation follows one step with zero action."""
        super().reset(seed=seed)
        mujoco.mj_resetData(_model(), self._data)
        # A quarter of these positions is inside a wall, as in D4RL, which does not draw again. Without a force most
        # of them stay there, wedged between two boxes; nearly any movement sets them free (tests/test_maze.py).
        self._data.qpos[:] = START + self.np_random.uniform(-2.0, 2.0, 2)
        mujoco.mj_step(_model(), self._data)
        self._steps = 0
        self._trail = [self._data.qpos.copy()]
        return self._observation(), {"is_success": False, "unstable": False}

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply one action for 0.01 s. Raises ValueError for an action of wrong shape or with NaN."""
        action = checked_action(action, (2,))
        data = self._data
        before = data.time, data.qpos.copy(), data.qvel.copy()
        data.qvel[:] = np.clip(data.qvel, -MAX_SPEED, MAX_SPEED)
        data.ctrl[:] = action
        mujoco.mj_step(_model(), data)
        unstable = not (np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all())
        if unstable:
            data.time, data.qpos[:], data.qvel[:] = before
        self._steps += 1
        if self.render_mode is not None:
            self._trail.append(data.qpos.copy())
        is_success = not unstable and bool(np.hypot(*(data.qpos - GOAL)) <= GOAL_RADIUS)
        reward = GOAL_REWARD if is_success else 0.0
        truncated = self._steps >= self.max_episode_steps
        info = {"is_success": is_success, "unstable": unstable}
        return self._observation(), reward, is_success or unstable, truncated, info

    def render(self) -> np.ndarray | None:
        """Return (504, 504, 3) uint8 with the path of the episode so far, or None without a render mode."""
        return None if self.render_mode is None else _draw_frame(self._trail)

    def _observation(self):
        return np.concatenate([self._data.qpos, self._data.qvel]).astype(np.float32)


class MazeVectorEnv(MemberVectorEnv):
    """E mazes stepped together, each as MazeEnv, bit for bit: observations (E, 4) float32, actions (E, 2).

    Resets, infos and states: see MemberVectorEnv.
    `num_threads` threads step the physics; 0, the default, is the calling one: a step takes 7 microseconds, and on two
    cores waking a pool made every E from 8 to 256 slower (64 members: 128,000 steps/s without it, 103,000 with two).
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 100}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
    ):
        """Raises ValueError for arguments out of range."""
        super().__init__(OBSERVATION_SPACE, ACTION_SPACE, num_envs, max_episode_steps, render_mode, autoreset_mode)
        self._physics = _Physics(num_threads or 0)
        self._state = np.zeros((num_envs, 5))  # (time, q_x, q_y, v_x, v_y)
        self._trails = [[] for _ in range(num_envs)]

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one frame (504, 504, 3) uint8 per member, or None without a render mode."""
        return None if self.render_mode is None else tuple(_draw_frame(trail) for trail in self._trails)

    def close_extras(self, **kwargs):
        """Stop the threads."""
        self._physics.close()

    def _begin(self, members):
        start = np.zeros((len(members), 5))
        start[:, 1:3] = [START + self._rngs[i].uniform(-2.0, 2.0, 2) for i in members]
        self._state[members] = self._physics.step(start, np.zeros((len(members), 2)))
        for i in members:
            self._trails[i] = [self._state[i, 1:3].copy()]

    def _advance(self, actions, running):
        after = self._physics.step(self._state, actions)
        unstable = running & ~np.isfinite(after).all(axis=1)
        self._state = np.where((running & ~unstable)[:, None], after, self._state)
        offset = self._state[:, 1:3] - GOAL
        successes = running & ~unstable & (np.hypot(offset[:, 0], offset[:, 1]) <= GOAL_RADIUS)
        if self.render_mode is not None:
            for i in np.flatnonzero(running):
                self._trails[i].append(self._state[i, 1:3].copy())
        return np.where(successes, np.float32(GOAL_REWARD), np.float32(0.0)), successes, unstable

    def _observations(self):
        return self._state[:, 1:].astype(np.float32)  # (E, 4)

    def _get_physics(self):
        return self._state.tolist()

    def _set_physics(self, state):
        physics = np.array(state, dtype=np.float64)
        if physics.shape != (self.num_envs, 5):
            raise ValueError(f"the state is that of {len(physics)} members, this environment has {self.num_envs}")
        if not np.isfinite(physics).all():
            raise ValueError("the physics of the state contain NaN or infinity")
        self._state = physics
        self._trails = [[position.copy()] for position in self._state[:, 1:3]]


# --------------------------------------------------------------------------------------------------------- offline data

MAX_TRAJECTORY_STEPS = 500  # cap of the public collector when it also records images, as for the published data
MIN_TRAJECTORY_STEPS = 50  # shorter (or equal) ones are dropped
MAX_WAYPOINTS = 100
MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # the planner's actions; the first of equals is taken
CHUNK = 128  # trajectories simulated together


@cache
def _policy(goal):
    """Return the planner's move (index into MOVES) in each cell on the way to cell `goal`, (42, 42) int.

    SPiRL's script runs 200 Q-iterations (discount 0.99, reward 1 in the goal cell). Values then depend on the path
    length alone, exactly, so their greedy policy is the first move that shortens the path; no-op if there is none.
    """
    layout = make_layout()
    distance = geodesic_distance(layout, goal)
    after = []  # distance after each move; bumping into a wall keeps the place
    for row, column in MOVES:
        blocked = np.roll(layout, (-row, -column), axis=(0, 1))
        after.append(np.where(blocked, distance, np.roll(distance, (-row, -column), axis=(0, 1))))
    return np.argmin(after, axis=0)


def _plan(seed, attempt):
    """Draw start and way-points of one trajectory: state (5,), way-points (W, 2), generator for its action noise."""
    # A stream of its own for each attempt: the data do not depend on chunks, threads or the number of trajectories.
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(attempt,)))
    free = np.argwhere(~make_layout())
    start, goal = free[rng.integers(len(free), size=2)]
    state = np.zeros(5)
    state[1:3] = start + rng.uniform(-0.1, 0.1, 2)
    state[3:5] = rng.normal(0.0, 0.1, 2)
    cell, cells = start, []
    while len(cells) < MAX_WAYPOINTS and tuple(cell) != tuple(goal):
        cell = cell + MOVES[_policy(tuple(goal))[tuple(cell)]]
        cells.append(cell)
    waypoints = np.array(cells, dtype=np.float64).reshape(-1, 2)
    # Half of the time towards the centre of the free space, which is at c - 0.2; the goal cell itself is not shifted.
    shift = 0.2 * rng.uniform(0.0, 1.0, waypoints.shape)
    shift[np.all(waypoints == goal, axis=1)] = 0.0
    return state, waypoints - shift, rng


def _simulate(physics, seed, attempts, noise):
    """Follow the way-points of the given attempts together; return [(obs (T, 4), actions (T, 2), reached), ...]."""
    plans = [_plan(seed, attempt) for attempt in attempts]
    size = len(plans)
    state = np.stack([plan[0] for plan in plans])  # (B, 5)
    num_waypoints = np.array([len(plan[1]) for plan in plans])
    waypoints = np.zeros((size, MAX_WAYPOINTS, 2))
    for i, plan in enumerate(plans):
        waypoints[i, : num_waypoints[i]] = plan[1]
    noises = noise * np.stack([plan[2].normal(size=(MAX_TRAJECTORY_STEPS, 2)) for plan in plans])

    observations = np.zeros((size, MAX_TRAJECTORY_STEPS, 4), dtype=np.float32)
    actions = np.zeros((size, MAX_TRAJECTORY_STEPS, 2), dtype=np.float32)
    lengths = np.full(size, MAX_TRAJECTORY_STEPS)
    reached = num_waypoints == 0  # started in the goal cell: an empty trajectory
    lengths[reached] = 0
    current = np.zeros(size, dtype=int)
    for t in range(MAX_TRAJECTORY_STEPS + 1):
        # The public script also asks for a move of less than 0.1 in the last step, which holds at any legal speed.
        near = np.square(waypoints[np.arange(size), current] - state[:, 1:3]).sum(axis=1) < 0.1**2
        arrived = near & (current == num_waypoints - 1) & ~reached
        reached |= arrived
        lengths[arrived] = t
        current += near & ~reached
        running = np.flatnonzero(~reached)
        if t == MAX_TRAJECTORY_STEPS or len(running) == 0:
            break
        position, velocity = state[running, 1:3], state[running, 3:5]
        action = np.clip(10.0 * (waypoints[running, current[running]] - position) - velocity, -1.0, 1.0)
        action = np.clip(action + noises[running, t], -1.0, 1.0)
        # Two decimals as in SPiRL's public roll-outs; applied as stored (float32), so that the file can be replayed.
        actions[running, t] = np.round(action, 2)
        observations[running, t] = state[running, 1:]
        state[running] = physics.step(state[running], actions[running, t])
    return [(observations[i, :n], actions[i, :n], bool(reached[i])) for i, n in enumerate(lengths)]


def collect(
    num_trajectories: int = NUM_TRAJECTORIES,
    noise: float = 0.5,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> OfflineDataset:
    """Collect trajectories between random cells with a planner and a way-point controller (SPiRL's script).

    `noise` is the standard deviation of Gaussian action noise (then clipped); without it the data show no recovery and
    skills learned from them drift into walls. `num_workers` threads step the physics (None: the calling one, as fast as
    two); the result depends on `num_trajectories`, `noise` and `seed` only. A trajectory has 51..500 steps; its last
    row has `terminals` if it reached its goal, else `timeouts`. Raises DataError for arguments without meaning.
    """
    if num_trajectories < 1 or not 0.0 <= noise < np.inf or seed < 0:
        raise DataError(
            "Collecting needs --num-trajectories >= 1, --noise >= 0 and --seed >= 0, "
            f"got {num_trajectories}, {noise} and {seed}."
        )
    # Chunks in lockstep, not processes: 3,046 trajectories take 15 s on one core, and a script that calls this needs no
    # `__main__` guard and may already have started torch's threads.
    physics = _Physics(0 if num_workers is None or num_workers <= 1 else num_workers)
    kept = []
    with tqdm(total=num_trajectories, desc="maze trajectories", unit="traj", disable=not progress) as bar:
        for first in itertools.count(step=CHUNK):
            for trajectory in _simulate(physics, seed, range(first, first + CHUNK), noise):
                if len(trajectory[1]) > MIN_TRAJECTORY_STEPS and len(kept) < num_trajectories:
                    kept.append(trajectory)
                    bar.update()
            if len(kept) == num_trajectories:
                break
    physics.close()

    last_rows = np.cumsum([len(actions) for _, actions, _ in kept]) - 1
    reached = np.array([reached for _, _, reached in kept])
    terminals, timeouts = np.zeros((2, last_rows[-1] + 1), dtype=bool)
    terminals[last_rows[reached]] = True
    timeouts[last_rows[~reached]] = True
    return OfflineDataset(
        observations=np.concatenate([observations for observations, _, _ in kept]),
        actions=np.concatenate([actions for _, actions, _ in kept]),
        terminals=terminals,
        timeouts=timeouts,
        attributes={"generator": "data_tools.maze.collect", "version": 1, "seed": seed, "noise": float(noise)},
    )


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Return the figures by which maze data are compared: lengths in steps, speed in cells / s, shares in [0, 1]."""
    lengths = dataset.episode_lengths.cpu().numpy()
    actions = dataset.actions.cpu().numpy()
    velocity = dataset.observations[:, 2:].cpu().numpy()
    return {
        "trajectories": len(lengths),
        "rows": int(lengths.sum()),
        "mean length": float(lengths.mean()),
        "shortest": int(lengths.min()),
        "share at cap": float((lengths == MAX_TRAJECTORY_STEPS).mean()),
        "mean |a|": float(np.abs(actions).mean()),
        "saturated share": float((np.abs(actions) >= 0.995).mean()),
        "mean speed": float(np.hypot(velocity[:, 0], velocity[:, 1]).mean()),
    }


def plot_trajectories(dataset: OfflineDataset, path, num_trajectories: int = 60) -> None:
    """Draw evenly chosen trajectories into the image file `path`."""
    from matplotlib.figure import Figure  # only plots need matplotlib; no pyplot, so no display either

    figure = Figure(figsize=(8, 8.6), layout="constrained")
    ax = figure.subplots()
    draw_maze(ax)
    starts, lengths = dataset.episode_starts.tolist(), dataset.episode_lengths.tolist()
    chosen = np.unique(np.linspace(0, len(starts) - 1, num_trajectories).astype(int))
    positions = dataset.observations[:, :2].cpu().numpy()
    for i in chosen:
        rows = positions[starts[i] : starts[i] + lengths[i]]
        (line,) = ax.plot(rows[:, 1], rows[:, 0], linewidth=1.2, alpha=0.8)
        ax.plot(rows[0, 1], rows[0, 0], ".", color=line.get_color(), markersize=7)
    ax.set_title(f"{len(chosen)} of {len(starts)} maze trajectories (dots: starts)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


@dataclass
class Args:
    """Collect the offline maze data, unless they are there already, and print their statistics."""

    num_trajectories: int = NUM_TRAJECTORIES
    """trajectories to collect (paper: 3,046); any other number needs --out"""
    noise: float = 0.5
    """standard deviation of the action noise"""
    seed: int = 0
    """random seed"""
    data_dir: str | None = None
    """folder of the data files (default: $SKIMO_DATA_DIR, else the user's cache folder)"""
    out: Path | None = None
    """write to this file instead of the data folder, collecting anew"""
    plot: Path | None = None
    """draw some trajectories into this image file"""


def main(args: Args) -> None:
    if args.out is not None:
        dataset = collect(args.num_trajectories, args.noise, args.seed)
        dataset.save(args.out)
        print(f"Wrote {args.out}")
    elif args.num_trajectories != NUM_TRAJECTORIES:
        raise DataError("--num-trajectories other than 3046 needs --out: the data folder holds complete data only.")
    else:
        dataset = load_dataset("maze", args.data_dir, noise=args.noise, seed=args.seed)
    for key, value in statistics(dataset).items():
        print(f"{key:>16}  {value:,}" if isinstance(value, int) else f"{key:>16}  {value:.3f}")
    if args.plot is not None:
        plot_trajectories(dataset, args.plot)
        print(f"Wrote {args.plot}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, prog="python -m data_tools.maze"))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
