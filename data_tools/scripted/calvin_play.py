"""Scripted play on the CALVIN table: behaviours as way-points of the tool's target pose, and who chooses among them.

Everything that acts is a Python generator: it is sent a `View` after each step and yields the next action (7,), so that
many of them can be stepped together. Units: metres and radians in the table's frame; actions as in tasks/calvin.py.
"""

from collections.abc import Generator
from typing import NamedTuple

import numpy as np

from data_tools.tasks import calvin_scene as scene
from data_tools.tasks.calvin import DRAWER, GRIPPER, SLIDE, SWITCH, subtask_conditions

TRAJECTORY_STEPS = 490
OPEN, CLOSED = 1.0, -1.0
DOWN = np.array([3.09, -0.03, 1.5])  # Euler angles of the tool: it points down, the fingers open along x
FIXTURE_SHARE = 0.35  # of the behaviours in play that move drawer, slider, switch or button
BEHAVIOUR_LIMIT = 220  # steps


class View(NamedTuple):
    """What a script sees of its table."""

    obs: np.ndarray  # (21,)
    target: np.ndarray  # (6,) pose that the actions move: position, Euler angles
    blocks: np.ndarray  # (3, 7) position and quaternion of the blocks


class Waypoint(NamedTuple):
    """A target pose to go to, with the gripper open or closed, and how many steps to stay there."""

    position: np.ndarray  # (3,)
    angles: np.ndarray  # (3,)
    gripper: float
    settle: int = 0


Script = Generator[np.ndarray, View, View]

# ----------------------------------------------------------------------------------------------------------- behaviours


class _Style:
    """The way one behaviour is carried out: where it touches, how the tool is held. Without rng always the same."""

    def __init__(self, rng):
        self.rng = rng
        spread = np.zeros(3) if rng is None else rng.normal([0.02, 0.0, 0.05], [0.08, 0.04, 0.1])
        self.down = DOWN + spread
        lean = -0.5 if rng is None else rng.uniform(-0.7, -0.25)
        self.tilt = np.array([self.down[0] + 0.03, lean, 1.55])  # towards the slanted front
        self.gripper = CLOSED if rng is None else (OPEN if rng.random() < 0.7 else CLOSED)  # where either will do

    def shift(self, *spread):
        """Return an offset (3,) drawn from +- spread."""
        return np.zeros(3) if self.rng is None else self.rng.uniform(-1.0, 1.0, 3) * spread


def open_drawer(view: View, rng=None) -> list[Waypoint]:
    """Hook the tool behind the handle and pull."""
    style = _Style(rng)
    x = 0.18 + style.shift(0.05, 0, 0)[0]
    y = -0.213 - view.obs[DRAWER]  # between the handle and the drawer's front
    return [
        Waypoint(np.array([x, y - 0.02, 0.50]), style.down, style.gripper),
        Waypoint(np.array([x, y, 0.372]), style.down, style.gripper, 1),
        Waypoint(np.array([x, -0.218 - scene.DRAWER_RANGE, 0.372]), style.down, style.gripper, 2),
        Waypoint(np.array([x, -0.43, 0.50]), style.down, style.gripper),
    ]


def close_drawer(view: View, rng=None) -> list[Waypoint]:
    """Push the handle from in front."""
    style = _Style(rng)
    x = 0.18 + style.shift(0.05, 0, 0)[0]
    y = -0.31 - view.obs[DRAWER]
    return [
        Waypoint(np.array([x, y, 0.50]), style.down, style.gripper),
        Waypoint(np.array([x, y, 0.365]), style.down, style.gripper, 1),
        Waypoint(np.array([x, -0.252, 0.365]), style.down, style.gripper, 3),
        Waypoint(np.array([x, -0.31, 0.48]), style.down, style.gripper),
    ]


def _move_slider(view, rng, x_end):
    """Straddle the slider's handle with the open gripper and take it along to x_end."""
    style = _Style(rng)
    handle = np.array([0.04 - view.obs[SLIDE], 0.002, 0.53]) + style.shift(0.008, 0.006, 0.008)
    end = np.array([x_end, handle[1], handle[2]])
    before = np.array([0.0, -0.07, 0.02])
    return [
        Waypoint(handle + before, style.down, OPEN),
        Waypoint(handle, style.down, OPEN, 1),
        Waypoint(end, style.down, OPEN, 2),
        Waypoint(end + [0.0, -0.08, 0.02], style.down, OPEN),
    ]


def slide_left(view: View, rng=None) -> list[Waypoint]:
    return _move_slider(view, rng, 0.04 - scene.SLIDE_RANGE - 0.035)


def slide_right(view: View, rng=None) -> list[Waypoint]:
    return _move_slider(view, rng, 0.04 + 0.035)


def _at_switch(style, stops):
    """Way-points in the switch's frame: (y, z, settle), y out of the slanted front, z down along it."""
    shift = style.shift(0.03, 0, 0)
    waypoints = []
    for y, z, settle in stops:
        place = scene.SWITCH_ORIGIN + y * scene.SWITCH_Y + z * scene.SWITCH_Z + shift
        waypoints.append(Waypoint(place, style.tilt, style.gripper, settle))
    return waypoints


def switch_on(view: View, rng=None) -> list[Waypoint]:
    """Push the switch up the slant, with the tip of the tool under its bar."""
    z = 0.03 - view.obs[SWITCH]
    end = 0.01 - scene.SWITCH_RANGE
    return _at_switch(_Style(rng), [(0.13, z + 0.02, 0), (0.043, z + 0.004, 1), (0.046, end, 2), (0.15, -0.05, 0)])


def switch_off(view: View, rng=None) -> list[Waypoint]:
    """Push the switch down the slant, with the tip of the tool above its bar."""
    z = -0.042 - view.obs[SWITCH]
    return _at_switch(_Style(rng), [(0.13, z - 0.03, 0), (0.045, z, 1), (0.047, -0.02, 2), (0.15, -0.04, 0)])


def press_button(view: View, rng=None) -> list[Waypoint]:
    """Press the button with the closed gripper; an open one would miss it."""
    style = _Style(rng)
    place = np.array([-0.12, -0.12, 0.0]) + style.shift(0.015, 0.015, 0)
    return [
        Waypoint(place + [0, 0, 0.53], style.down, CLOSED),
        Waypoint(place + [0, 0, 0.472], style.down, CLOSED, 2),
        Waypoint(place + [0, 0, 0.54], style.down, CLOSED),
    ]


def reach(view: View, rng) -> list[Waypoint]:
    """Move freely above the table."""
    style = _Style(rng)
    position = rng.uniform([-0.32, -0.3, 0.47], [0.3, -0.04, 0.62])
    return [Waypoint(position, style.down + rng.uniform(-1, 1, 3) * [0.1, 0.2, 0.7], style.gripper)]


def _block_yaw(quaternion):
    """Return the direction of a block's long side."""
    w, x, y, z = quaternion
    return np.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def lift_block(view: View, rng, block: int) -> list[Waypoint]:
    """Grasp a block across its short side and raise it, now and then turning it."""
    position, quaternion = view.blocks[block, :3], view.blocks[block, 3:]
    symmetry = np.pi / 2 if scene.BLOCK_NAMES[block] == "blue" else np.pi  # the blue one is a cube
    turn = (_block_yaw(quaternion) + np.pi - DOWN[2] + symmetry / 2) % symmetry - symmetry / 2
    angles = DOWN + [0, 0, turn]
    grasp = position + [0, 0, -0.002]
    above = grasp + [0, 0, 0.09]
    carried = angles + [0, 0, rng.uniform(-0.6, 0.6) if rng.random() < 0.4 else 0.0]
    return [
        Waypoint(above, angles, OPEN),
        Waypoint(grasp, angles, OPEN, 2),
        Waypoint(grasp, angles, CLOSED, 6),
        Waypoint(above, carried, CLOSED),
    ]


def _place_block(view, rng, block, place):
    """Lift a block and put it down at `place` (3,)."""
    above = place + [0, 0, 0.09]
    angles = DOWN + [0, 0, rng.uniform(-0.2, 0.2)]
    return lift_block(view, rng, block) + [
        Waypoint(above, angles, CLOSED),
        Waypoint(place, angles, CLOSED, 1),
        Waypoint(place, angles, OPEN, 3),
        Waypoint(above, angles, OPEN),
    ]


def place_on_table(view: View, rng, block: int) -> list[Waypoint]:
    x, y = rng.uniform([0.02, -0.13], [0.3, -0.05])
    return _place_block(view, rng, block, np.array([x, y, view.blocks[block, 2] + 0.004]))


def place_in_drawer(view: View, rng, block: int) -> list[Waypoint]:
    return _place_block(view, rng, block, np.array([rng.uniform(0.08, 0.28), -0.06 - view.obs[DRAWER], 0.50]))


def push_block(view: View, rng, block: int) -> list[Waypoint]:
    """Push a block sideways with the closed gripper."""
    side = 1.0 if rng.random() < 0.5 else -1.0
    beside = view.blocks[block, :3] + [-0.075 * side, 0, 0]
    return [
        Waypoint(beside + [0, 0, 0.08], DOWN, CLOSED),
        Waypoint(beside, DOWN, CLOSED, 1),
        Waypoint(beside + [0.175 * side, 0, 0], DOWN, CLOSED, 1),
        Waypoint(beside + [0.17 * side, 0, 0.1], DOWN, CLOSED),
    ]


def retreat(view: View) -> list[Waypoint]:
    """Raise the tool and take it back from the cabinet, before anything else is begun."""
    x, y, z = view.target[:3]
    return [Waypoint(np.array([x, min(y, -0.12), max(z, 0.52)]), view.target[3:], view.obs[GRIPPER])]


# -------------------------------------------------------------------------------------------------------------- motions


def follow(view: View, waypoints: list[Waypoint], speed: float = 1.0, noise: float = 0.0, rng=None) -> Script:
    """Drive the target pose through the way-points at `speed` (share of the fastest), at most 220 steps.

    `noise` is the standard deviation of two disturbances of the action, one new in every step and one that lasts for
    about ten steps. Each action aims from where the target pose really is, so it corrects the disturbances so far.
    """
    steps = 0
    drift = np.zeros(6)
    for waypoint in waypoints:
        waited = 0
        while waited <= waypoint.settle and steps < BEHAVIOUR_LIMIT:
            way = (waypoint.position - view.target[:3]) / scene.POSITION_SCALE
            turn = (waypoint.angles - view.target[3:]) / scene.ANGLE_SCALE
            shrink = max(np.sqrt(way @ way) / speed, np.abs(turn).max() / speed, 1.0)
            action = np.concatenate([way, turn]) / shrink
            if noise > 0:
                drift = 0.9 * drift + np.sqrt(1 - 0.9**2) * noise * rng.normal(size=6)
                action += drift + noise * rng.normal(size=6)
            view = yield np.append(action.clip(-1.0, 1.0), waypoint.gripper)
            steps += 1
            near = abs(waypoint.position - view.target[:3]).max() < 0.006
            if shrink <= 1.0 + 1e-6 or (near and abs(waypoint.angles - view.target[3:]).max() < 0.06):
                waited += 1
    return view


def pause(view: View, steps: int, noise: float, rng) -> Script:
    """Hold the tool still, more or less."""
    for _ in range(steps):
        view = yield np.append((0.5 * noise * rng.normal(size=6)).clip(-1.0, 1.0), view.obs[GRIPPER])
    return view


# ----------------------------------------------------------------------------------------------------------------- play


def _choose(view, rng):
    """Draw one of the behaviours that make sense now."""
    slide, drawer, _, switch = view.obs[SLIDE : SWITCH + 1]
    if rng.random() < FIXTURE_SHARE:
        fixtures = (
            open_drawer if drawer < 0.08 else close_drawer,
            slide_left if slide < scene.SLIDE_RANGE / 2 else slide_right,
            switch_on if switch < scene.SWITCH_RANGE / 2 else switch_off,
            press_button,
        )
        return fixtures[rng.integers(len(fixtures))](view, rng)
    others = [(reach, ())]
    for block, (x, y, z) in enumerate(view.blocks[:, :3]):
        if -0.02 < x < 0.36 and -0.16 < y < 0.0 and 0.44 < z < 0.48:  # on the table, within reach
            others += [(lift_block, (block,)), (push_block, (block,)), (push_block, (block,))]
            others += [(place_on_table, (block,))] + ([(place_in_drawer, (block,))] if drawer > 0.15 else [])
    behaviour, arguments = others[rng.integers(len(others))]
    return behaviour(view, rng, *arguments)


def play(view: View, rng, noise: float) -> Script:
    """Play without end: behaviours at random, with pauses, detours and things left half done."""
    while True:
        speed = rng.uniform(0.45, 1.0)
        disturbance = noise * rng.uniform()
        waypoints = _choose(view, rng)
        if rng.random() < 0.06:
            waypoints = waypoints[: max(len(waypoints) - 2, 1)]  # gives up half-way
        if rng.random() < 0.15:  # makes a detour
            via = waypoints[0]._replace(position=rng.uniform([-0.25, -0.3, 0.5], [0.25, -0.12, 0.62]))
            waypoints = [via, *waypoints]
        if rng.random() < 0.1:  # hesitates somewhere
            k = rng.integers(len(waypoints))
            waypoints[k] = waypoints[k]._replace(settle=waypoints[k].settle + int(rng.integers(3, 12)))
        view = yield from follow(view, retreat(view) + waypoints, speed, disturbance, rng)
        if rng.random() < 0.15:
            view = yield from pause(view, int(rng.integers(4, 20)), disturbance, rng)


def warm_up(view: View, rng) -> Script:
    """Move twice before the recording begins, except in one trajectory of five, which begins where the arm starts."""
    if rng.random() < 0.2:
        return view
    for _ in range(2):
        view = yield from follow(view, reach(view, rng))
    return view


def draw_fixtures(rng) -> tuple[np.ndarray, bool]:
    """Draw the start of a trajectory: slide, drawer, button and switch (4,), each at one of its ends, and the LED."""
    ends = np.array([scene.SLIDE_RANGE, scene.DRAWER_RANGE, 0.0, scene.SWITCH_RANGE])
    return np.where(rng.random(4) < 0.5, ends, 0.0), bool(rng.random() < 0.5)


# --------------------------------------------------------------------------------------------------------------- expert


def expert(view: View) -> Script:
    """Do the sub-tasks in order, the six of calvin-6, each again until it holds; then stay."""
    start = view.obs
    plan = dict(drawer=open_drawer, bulb=switch_on, slider=slide_left, led=press_button)
    plan |= dict(slider_back=slide_right, drawer_shut=close_drawer)
    for subtask, behaviour in plan.items():
        while not subtask_conditions(view.obs, start, [subtask])[0]:
            view = yield from follow(view, retreat(view) + behaviour(view))
    while True:
        view = yield np.append(np.zeros(6), view.obs[GRIPPER])
