"""The CALVIN task of SkiMo (https://arxiv.org/abs/2207.07560): a table with drawer, switch, slider and button.

A MuJoCo port of scene D of the CALVIN simulator (https://arxiv.org/abs/2112.03227, PyBullet). It follows the
simulator's control law step by step; its numbers were measured on the original.
Units: metres, radians, seconds; x right, y away from the robot, z up. One step is 1/30 s, eight steps of physics.
Shapes: E members of a vector environment.
"""

import os
from functools import cache

import mujoco
import numpy as np
import torch
from mujoco.batch import Batch

from data_tools.tasks import calvin_scene as scene
from data_tools.tasks.calvin_arm import MOTOR_FORCE, OPENING_FORCE, SUBSTEPS, InverseKinematics, euler_angles
from data_tools.tasks.rendering import Painter
from data_tools.tasks.vector import MemberVectorEnv

MAX_EPISODE_STEPS = 360
SUBTASK_REWARD = 100.0
SUBTASKS = ("drawer", "bulb", "slider", "led")  # in the order in which they count
CLOSED = 0.05  # m from where it began: drawer and slider are back
GRIPPER, SLIDE, DRAWER, BUTTON, SWITCH, BULB, LED = range(14, 21)  # entries of an observation

# -------------------------------------------------------------------------------------------------------------- physics

MOTOR_RATE = 24.0  # 1/s: a motor moves its joint by a tenth of the error per step of physics
MAX_JOINT_SPEED = np.array([2.0] * 7 + [1.0] * 2)  # rad/s, m/s for the fingers


class Physics:
    """Scene, joint motors, button and lights of E members."""

    def __init__(self, num_envs, num_threads):
        model = scene.scene_model()
        # persistent: a step continues from the mass matrix and forces that the motor law has read.
        self.batch = Batch(model, num_envs, num_threads, persistent=True)
        self.state = self.batch.state  # (E, S), all that MuJoCo needs to continue
        self.qpos = self.batch.bind("qpos")  # (E, 34), the views below follow the simulation
        self.qvel = self.batch.bind("qvel")  # (E, 31)
        self.ctrl = self.batch.bind("ctrl")  # (E, 10)
        self.bias = self.batch.bind("qfrc_bias")[:, scene.ROBOT]  # gravity, Coriolis and centrifugal forces
        self.mass = self.batch.bind("M")  # (E, M), the mass matrix in sparse rows
        self.mass_index = _dense_index(model)
        self.dense_mass = np.empty((num_envs, 9, 9))  # that of the robot
        self.tool = self.batch.bind("site_xpos")[:, model.site("tcp").id]  # (E, 3)
        self.tool_matrix = self.batch.bind("site_xmat")[:, model.site("tcp").id].reshape(num_envs, 3, 3)
        self.kinematics = InverseKinematics(num_envs)

        self.tool_position = np.zeros((num_envs, 3))  # as observed
        self.tool_angles = np.zeros((num_envs, 3))
        self.target = np.zeros((num_envs, 6))  # pose that the actions move: position, Euler angles (never wrapped)
        self.gripper = np.ones(num_envs)  # last command: 1 open, -1 closed
        self.joint_target = np.zeros((num_envs, 9))
        self.max_force = np.full((num_envs, 9), MOTOR_FORCE)
        self.pressed = np.zeros(num_envs, dtype=bool)
        self.bulb = np.zeros(num_envs, dtype=bool)
        self.led = np.zeros(num_envs, dtype=bool)

    def reset(self, members, rngs, fixtures=None):
        """Put the members (n,) int into a start state, with the lights off and the blocks drawn from rngs (n).

        fixtures (n, 4): where slide, drawer, button and switch are put; None: all at 0.
        """
        self.batch.reset(members, stage=mujoco.mjtStage.mjSTAGE_NONE)
        self.qpos[members, scene.ARM] = scene.HOME
        self.qpos[members, scene.FINGERS] = scene.FINGER_OPEN
        if fixtures is not None:
            self.qpos[members, scene.FIXTURES] = fixtures
        for i, rng in zip(members, rngs, strict=True):
            self.qpos[i, scene.BLOCKS] = scene.place_blocks(rng)
        self.ctrl[members, -1] = scene.BUTTON_WEIGHT
        self.batch.forward(members, stage=mujoco.mjtStage.mjSTAGE_VEL)
        self.joint_target[members] = self.qpos[members, scene.ROBOT]
        self.max_force[members] = MOTOR_FORCE
        self._run(1, members)
        self.target[members] = np.concatenate([self.tool_position, self.tool_angles], axis=1)[members]
        self.pressed[members] = False
        self.led[members] = False
        self.bulb[members] = self.qpos[members, scene.FIXTURES.stop - 1] > scene.SWITCH_THRESHOLD

    def step(self, actions, members=None):
        """Apply actions (E, 7) for 1/30 s, to the members (n,) int (None: all).

        A member whose physics diverge is put back to where it was. Returns which did, (E,) bool.
        """
        chosen = slice(None) if members is None else members
        before = [array[chosen].copy() for array in self._arrays()]
        self.target[chosen] += (actions[:, :6] * np.repeat([scene.POSITION_SCALE, scene.ANGLE_SCALE], 3))[chosen]
        self.gripper[chosen] = np.where(actions[:, 6] >= 0, 1.0, -1.0)[chosen]
        is_open = self.gripper[:, None] > 0
        position, angles = self.target[:, :3], self.target[:, 3:]
        self.joint_target[:, scene.ARM] = self.kinematics.solve(self.qpos[:, scene.ARM], position, angles)
        self.joint_target[:, scene.FINGERS] = np.where(is_open, scene.FINGER_OPEN, 0.0)
        self.max_force[:, scene.FINGERS] = np.where(is_open, OPENING_FORCE, MOTOR_FORCE)
        self._run(SUBSTEPS, members)
        scene.switch_lights(self, chosen)

        unstable = np.zeros(len(self.state), dtype=bool)
        unstable[chosen] = ~np.isfinite(self.state).all(axis=1)[chosen]
        if unstable.any():
            for array, values in zip(self._arrays(), before, strict=True):
                array[unstable] = values[unstable[chosen]]
            self.refresh(np.flatnonzero(unstable))
        return unstable

    def _run(self, substeps, members=None):
        """Let the motors move the joints towards their targets, of the members (n,) int (None: all).

        Bullet's motors aim at a joint velocity: v* = clip(24/s (target - q), +- greatest speed). The force that reaches
        it within one step of physics is M (v* - v) / dt plus the bias forces, as far as the motor is strong enough.
        """
        q = self.qpos[:, scene.ROBOT]
        v = self.qvel[:, scene.ROBOT]
        mass = self.dense_mass
        forces = self.ctrl[:, :9]
        for substep in range(substeps):
            # `take` gives the same memory layout for every E; that of indexing depends on E, and with it the rounding.
            self.mass.take(self.mass_index, axis=1, out=mass)
            mass[:, 7, 8] = mass[:, 8, 7] = 0.0  # the fingers, which are not coupled
            change = _clip(MOTOR_RATE * (self.joint_target - q), MAX_JOINT_SPEED) - v
            force = (mass @ change[:, :, None])[:, :, 0] / scene.TIME_STEP + self.bias
            forces[:] = _clip(force, self.max_force)
            if substep == substeps - 1:
                # The original observes the tool's pose one step of physics late, the joints without delay.
                chosen = slice(None) if members is None else members
                self.tool_position[chosen] = self.tool[chosen]
                self.tool_angles[chosen] = euler_angles(self.tool_matrix)[chosen]
            self.batch.step(members, stage=mujoco.mjtStage.mjSTAGE_VEL)

    def refresh(self, members=None):
        """Compute what the motor law reads from a state that was written, of the members (n,) int (None: all)."""
        self.batch.forward(members, stage=mujoco.mjtStage.mjSTAGE_VEL)

    observations = scene.observations

    def _arrays(self):
        """Return the arrays (E, ...) that make up the state; motor targets and forces follow from them."""
        lights = (self.pressed, self.bulb, self.led)
        return (self.state, self.tool_position, self.tool_angles, self.target, self.gripper, *lights)

    def get_state(self):
        """Return the state (E, S + 16) as nested lists of numbers."""
        return np.concatenate([array.reshape(len(self.state), -1) for array in self._arrays()], axis=1).tolist()

    def set_state(self, state):
        """Continue from what `get_state` returned. Raises ValueError for a state that is none of this physics."""
        try:
            state = np.array(state, dtype=np.float64)
        except TypeError:
            raise ValueError("the state is that of another simulator") from None
        sizes = [array[0].size for array in self._arrays()]
        expected = (len(self.state), sum(sizes))
        if state.shape != expected:
            whose = f"{len(state)} members, this environment has {expected[0]}, or of another version of the scene"
            raise ValueError(f"the state is that of {whose}: shape {state.shape}, expected {expected}")
        if not np.isfinite(state).all():
            raise ValueError("the physics of the state contain NaN or infinity")
        for array, values in zip(self._arrays(), np.split(state, np.cumsum(sizes)[:-1], axis=1)):
            array[:] = values.reshape(array.shape)
        self.refresh()


def _clip(values, limit):
    """Clip to +- limit; np.clip takes several times as long for small arrays."""
    return np.minimum(np.maximum(values, -limit), limit)


def _dense_index(model):
    """Return where in MuJoCo's sparse mass matrix the robot's entries are, (9, 9) int; 0 for those that are none."""
    index = np.zeros((9, 9), dtype=int)
    for row in range(9):
        for k in range(model.M_rownnz[row]):
            address = model.M_rowadr[row] + k
            column = model.M_colind[address]
            index[row, column] = index[column, row] = address
    return index


# ---------------------------------------------------------------------------------------------------------- environment


def subtask_conditions(obs, start, order=SUBTASKS) -> np.ndarray:
    """Return which of the n sub-tasks named in `order` hold, (..., n) bool, in `obs` (..., 21).

    `start` (..., 21): the first observation of the episode.
    """
    moved = obs - start
    holds = dict(
        drawer=moved[..., DRAWER] > 0.12,
        bulb=(start[..., BULB] == 0) & (obs[..., BULB] == 1),
        slider=moved[..., SLIDE] > 0.15,
        led=(start[..., LED] == 0) & (obs[..., LED] == 1),
        slider_back=moved[..., SLIDE] < CLOSED,
        drawer_shut=moved[..., DRAWER] < CLOSED,
    )
    return np.stack([holds[name] for name in order], axis=-1)


def facts(obs) -> dict:
    """Return what is known of observations (R, 21), for data_tools.formats.check_values; the margins are wide."""
    low = [-1, -1, 0.2, *[-3.2] * 3, -0.1, *[-3.9] * 7, -1.01, *[-0.1] * 4, 0, 0]
    high = [1, 1, 1.2, *[3.2] * 3, 0.2, *[3.9] * 7, 1.01, 0.4, 0.4, 0.1, 0.2, 1, 1]
    names = [f"tool {name}" for name in ("x", "y", "z", "roll", "pitch", "yaw")] + ["gripper width"]
    names += [f"arm joint {i}" for i in range(7)] + ["gripper command"]
    names += ["slide", "drawer", "button", "switch", "light bulb", "LED"]
    return {name: (obs[:, i], low[i], high[i]) for i, name in enumerate(names)}


class CalvinVectorEnv(MemberVectorEnv):
    """E tables: open the drawer, turn on the light bulb, move the slider left, turn on the LED, within 360 steps.

    Resets, infos and states: see MemberVectorEnv.
    Observation (21,) float32, not normalised: tool position 3 and Euler angles 3, gripper width, arm joints 7, last
    gripper command (1 open, -1 closed), joints of slide, drawer, button and switch, light bulb and LED (0 or 1). The
    three blocks are simulated but not observed.
    Action (7,) in [-1, 1], clipped: moves the target pose of the tool by 0.02 m per unit along x, y, z and 0.05 rad per
    unit of Euler angle; the gripper opens for a last entry >= 0, else closes. The target pose is a state of its own,
    which starts at the tool's pose and is never read back from the robot.
    Reward 100 when the next sub-task in the order holds, at most one per step; the last ends the episode
    (terminated); truncated after `max_episode_steps`. `info["num_subtasks"]`: sub-tasks done; `info["is_success"]`:
    all of them; `info["unstable"]`: the physics diverged; the episode ends (terminated, reward 0) with the
    last finite observation. The last gripper command outlives an episode, as in the original, unless `reset` gets a
    seed.
    `order`: other sub-tasks; `slider_back` and `drawer_shut` are the ways back.
    As many threads as torch has step the physics; the result does not depend on their number.
    `simulator="pybullet"` runs the original's physics instead, one member after the other: see
    data_tools.tasks.calvin_pybullet for what it needs. `calvin_env_root`: where (None: $CALVIN_ENV_ROOT).
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    saved = {"start": np.float64, "subtasks": np.int64}
    info_names = {**MemberVectorEnv.info_names, "num_subtasks": "subtasks"}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        simulator: str = "mujoco",
        calvin_env_root: str | os.PathLike | None = None,
        order: tuple[str, ...] = SUBTASKS,
    ):
        """Raises ValueError for arguments out of range; for PyBullet also DependencyNotInstalled and DataError."""
        super().__init__(num_envs, 21, 7, max_episode_steps, render_mode)
        if simulator not in ("mujoco", "pybullet"):
            raise ValueError(f"simulator must be 'mujoco' or 'pybullet', got {simulator!r}")
        if simulator == "pybullet":
            from data_tools.tasks.calvin_pybullet import BulletPhysics  # PyBullet is optional

            self.physics = BulletPhysics(num_envs, calvin_env_root)
        else:
            self.physics = Physics(num_envs, min(torch.get_num_threads(), num_envs))
        self.order = tuple(order)
        self.start = np.zeros((num_envs, 21))  # the first observation of the episode
        self.subtasks = np.zeros(num_envs, dtype=np.int64)  # how many were done

    def seeded(self, member):
        self.physics.gripper[member] = 1.0

    def begin(self, members):
        self.physics.reset(members, [self.rngs[i] for i in members])
        self.start[members] = self.physics.observations()[members]
        self.subtasks[members] = 0

    def advance(self, actions, running):
        if running.any():
            self.unstable |= self.physics.step(actions, None if running.all() else np.flatnonzero(running))
        # The next sub-task in the order counts if it holds now, one per step; what was done early counts later if it
        # still holds then.
        holds = subtask_conditions(self.physics.observations(), self.start, self.order)  # (E, n)
        following = np.minimum(self.subtasks, len(self.order) - 1)
        counts = holds[np.arange(self.num_envs), following] & running & ~self.unstable
        self.subtasks += counts
        return SUBTASK_REWARD * counts, counts & (self.subtasks == len(self.order))

    def observations(self):
        return self.physics.observations().astype(np.float32)  # (E, 21)

    def draw(self, member):
        """Return (400, 400, 3) uint8."""
        return draw(self.physics.qpos[member], self.physics.bulb[member], self.physics.led[member])

    def get_state(self):
        return {**super().get_state(), "physics": self.physics.get_state()}

    def set_state(self, state):
        self.check_state(state)
        self.physics.set_state(state.get("physics", ()))
        return super().set_state(state)


# ------------------------------------------------------------------------------------------------------------ rendering

FRAME_SHAPE = (400, 400, 3)
LIT = {"bulb": (1.0, 0.86, 0.25, 1.0), "led": (0.25, 0.95, 0.35, 1.0)}
DARK_LAMP = (0.86, 0.86, 0.84, 1.0)


@cache
def _painter():
    camera = dict(lookat=(-0.02, -0.1, 0.45), distance=1.5, azimuth=122, elevation=-36)
    return Painter(scene.display_model(), FRAME_SHAPE, **camera)


def draw(qpos, bulb: bool = False, led: bool = False) -> np.ndarray:
    """Return a picture (400, 400, 3) uint8 of the scene with joint positions (34,) and lights on or off.

    Always call it from the same thread. Raises DataError where OpenGL is missing.
    """
    painter = _painter()  # made when first needed, since most runs draw nothing
    for name, lit in (("bulb", bulb), ("led", led)):
        painter.model.geom(name).rgba = LIT[name] if lit else DARK_LAMP
    return painter(qpos)
