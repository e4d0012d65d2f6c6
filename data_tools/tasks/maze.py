"""The maze task of SkiMo (https://arxiv.org/abs/2207.07560): a point mass in a 40 x 40 maze.

Layout, physics and controller follow the D4RL fork and the SPiRL scripts that the authors' release uses.
Coordinates: cell (row, column) of the 42 x 42 layout; q = position in cells, first coordinate = row axis; time in steps
of 0.01 s. Wall cell (i, j) covers q in [i - 0.7, i + 0.3] x [j - 0.7, j + 0.3].
Shapes: E members of a vector environment, N point masses, T steps.
"""

import itertools
from functools import cache, partial

import mujoco
import numpy as np
from mujoco.rollout import Rollout
from numpy.lib.stride_tricks import sliding_window_view

from data_tools.tasks.vector import MemberVectorEnv

START = (10, 24)  # an episode starts at q = START + U(-2, 2)^2
FAR_START = (36, 37)  # of the task maze-far, 61 cells from the goal
GOAL = (18, 8)
GOAL_RADIUS = 2.0  # cells; 2.0 is the value of SkiLD and SkiMo, D4RL itself has 0.5
GOAL_REWARD = 100.0
MAX_EPISODE_STEPS = 2000
MAX_SPEED = 5.0  # cells / s and axis, enforced before each physics step

# ------------------------------------------------------------------------------------------------------------- geometry


@cache
def make_layout() -> np.ndarray:
    """Return the walls of the maze, (42, 42) bool, True = wall: D4RL's random-wall generator with seed 0.

    Walls are added until they fill a quarter of the 40 x 40 interior, preferably where there are few so far. Each has a
    door. Later walls may close earlier doors; nothing is repaired, so cell (16, 20) is sealed. The array is read-only.
    """
    size = 40
    box_width = 5
    rng = np.random.default_rng(0)
    grid = np.zeros((size, size), dtype=bool)
    while grid.mean() < 0.25:
        along_rows = rng.random() < 0.5
        n = int(0.2 * size * rng.random() + 0.3 * size)  # length of the wall, 12..19
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


def facts(obs) -> dict:
    """Return what is known of observations (R, 4), for data_tools.formats.check_values."""
    in_walls = make_layout()[tuple(cell_of(obs).T)].mean(keepdims=True)
    speeds = {f"v_{axis}": (obs[:, i], -MAX_SPEED - 1, MAX_SPEED + 1) for i, axis in ((2, "x"), (3, "y"))}
    return {"the share of positions inside walls": (in_walls, 0.0, 0.1), **speeds}


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
    # warmstart off: from where the contact solver starts. Each call of `Rollout` starts the solver anew, so any member
    #   can go on anywhere; the flag only fixes from where.
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


class Physics:
    """Steps N point masses at once. A row of `state` is MuJoCo's full state (time, q_x, q_y, v_x, v_y), float64."""

    def __init__(self):
        # On the calling thread: a step takes 7 microseconds, waking others made every N from 8 to 256 slower.
        self.rollout = Rollout(nthread=0)
        self.data = [mujoco.MjData(_model())]

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


# ------------------------------------------------------------------------------------------------------------ rendering

PIXELS_PER_CELL = 12  # 504 x 504 frames


def _pixel(position):
    """Return the pixel (row, column), int, of positions (..., 2) in cells; wall cell (i, j) spans 12 x 12 pixels."""
    return np.clip((np.asarray(position) + 0.7) * PIXELS_PER_CELL, 0, 42 * PIXELS_PER_CELL - 1).astype(int)


@cache
def _background(start):
    """Return the frame without the agent, (504, 504, 3) uint8; start (2,): the cell around which episodes start."""
    axis = (np.arange(42 * PIXELS_PER_CELL) + 0.5) / PIXELS_PER_CELL - 0.7  # q of each pixel row (and column)
    distance = np.hypot(axis[:, None] - GOAL[0], axis[None, :] - GOAL[1])
    walls = np.kron(make_layout(), np.ones((PIXELS_PER_CELL, PIXELS_PER_CELL), dtype=bool))
    from_start = np.maximum(abs(axis[:, None] - start[0]), abs(axis[None, :] - start[1]))
    frame = np.full((*walls.shape, 3), 255, dtype=np.uint8)
    frame[from_start <= 2.0] = (222, 235, 247)  # where episodes start
    frame[distance <= GOAL_RADIUS] = (186, 228, 179)
    frame[walls] = (189, 189, 189)
    frame[(distance <= GOAL_RADIUS) & walls] = (150, 180, 145)
    frame[distance <= 0.4] = (35, 139, 69)
    return frame


def _draw_frame(trail, start):
    """Return (504, 504, 3) uint8: the maze from above with the positions (T, 2) of an episode; no OpenGL needed."""
    frame = _background(start).copy()
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


def draw_maze(ax, start=START) -> None:
    """Draw walls, start and goal on matplotlib axes `ax`, row axis down: plot positions q as `ax.plot(q_y, q_x)`."""
    from matplotlib.patches import Circle  # only plots need matplotlib

    edges = (-0.7, 41.3)
    ax.imshow(make_layout(), cmap="Greys", vmin=0, vmax=3, extent=(*edges, *edges[::-1]), interpolation="none")
    ax.add_patch(Circle(GOAL[::-1], GOAL_RADIUS, facecolor="tab:green", alpha=0.25, edgecolor="none", zorder=2))
    ax.plot(*start[::-1], "o", color="tab:blue", markersize=8, markeredgecolor="white", zorder=4, label="start")
    ax.plot(*GOAL[::-1], "*", color="tab:green", markersize=14, markeredgecolor="white", zorder=4, label="goal")
    ax.set(xlim=edges, ylim=edges[::-1], aspect="equal", xticks=[], yticks=[])


draw_far_maze = partial(draw_maze, start=FAR_START)


# ---------------------------------------------------------------------------------------------------------- environment


class MazeVectorEnv(MemberVectorEnv):
    """E mazes: find the goal, 34 cells away, within 2,000 steps. Resets, infos and states: see MemberVectorEnv.

    Observation (4,) float32: (q_x, q_y) in cells, (v_x, v_y) in cells / s, not normalised. Action (2,) in [-1, 1],
    clipped: force / 100 N per axis. Reward 100 within 2 cells of the goal, which ends the episode (terminated), else 0;
    truncated after `max_episode_steps`. `info["is_success"]`: the goal was reached. `info["unstable"]`: the
    physics diverged; the episode ends (terminated, reward 0) with the last finite observation. `far`: it starts
    around FAR_START, 61 cells away.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 100}
    saved = {"physics": np.float64}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        far: bool = False,
    ):
        """Raises ValueError for arguments out of range."""
        super().__init__(num_envs, 4, 2, max_episode_steps, render_mode)
        self.start = FAR_START if far else START
        self.simulator = Physics()
        self.physics = np.zeros((num_envs, 5))  # (time, q_x, q_y, v_x, v_y)
        self.trails = [[] for _ in range(num_envs)]  # positions of the episode, for pictures

    def begin(self, members):
        # A quarter of these positions is inside a wall, as in D4RL, which does not draw again. Without a force most
        # of them stay there, wedged between two boxes; nearly any movement sets them free (tests/test_maze.py).
        start = np.zeros((len(members), 5))
        start[:, 1:3] = [self.start + self.rngs[i].uniform(-2.0, 2.0, 2) for i in members]
        # The first observation follows one step with zero action.
        self.physics[members] = self.simulator.step(start, np.zeros((len(members), 2)))
        for i in members:
            self.trails[i] = [self.physics[i, 1:3].copy()]

    def advance(self, actions, running):
        after = self.simulator.step(self.physics, actions)
        diverged = running & ~np.isfinite(after).all(axis=1)
        self.unstable |= diverged
        self.physics = np.where((running & ~diverged)[:, None], after, self.physics)
        offset = self.physics[:, 1:3] - GOAL
        successes = running & ~diverged & (np.hypot(offset[:, 0], offset[:, 1]) <= GOAL_RADIUS)
        if self.render_mode is not None:
            for i in np.flatnonzero(running):
                self.trails[i].append(self.physics[i, 1:3].copy())
        return GOAL_REWARD * successes, successes

    def observations(self):
        return self.physics[:, 1:].astype(np.float32)  # (E, 4)

    def set_state(self, state):
        observations = super().set_state(state)
        self.trails = [[position.copy()] for position in self.physics[:, 1:3]]
        return observations

    def draw(self, member):
        """Return (504, 504, 3) uint8 with the path of the episode so far; needs no OpenGL."""
        return _draw_frame(self.trails[member], self.start)
