"""The CALVIN task of SkiMo (https://arxiv.org/abs/2207.07560): a table with drawer, switch, slider and button.

A MuJoCo port of scene D of the CALVIN simulator (https://arxiv.org/abs/2112.03227, PyBullet), and play data recorded
on it by scripts. The port follows the simulator's control law step by step; its numbers were measured on the original.
Units: metres, radians, seconds; x right, y away from the robot, z up. One step is 1/30 s, eight steps of physics.
Shapes: E members of a vector environment, B trajectories recorded together.

    python -m data_tools.calvin --help                  # record the play data, print their statistics
    python -m data_tools.calvin --plot play.png         # and draw the scene and some of the data
    python -m data_tools.calvin --expert 100            # how many of 100 episodes the scripted expert solves
"""

import itertools
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import gymnasium
import mujoco
import numpy as np
import tyro
from gymnasium.vector import AutoresetMode
from mujoco.batch import Batch
from tqdm import tqdm

from data_tools import calvin_play
from data_tools.calvin_scene import (
    ANGLE_SCALE,
    ARM,
    BLOCK_HEIGHT,
    BLOCK_NAMES,
    BLOCKS,
    BUTTON_RANGE,
    BUTTON_WEIGHT,
    FINGER_OPEN,
    FINGERS,
    FIXTURES,
    HOME,
    POSITION_SCALE,
    ROBOT,
    SURFACES,
    SWITCH_RANGE,
    TIME_STEP,
    arm_model,
    display_model,
    scene_model,
)
from data_tools.dataset import DataError, OfflineDataset, load_dataset
from data_tools.rendering import Painter
from data_tools.vector import MemberVectorEnv, checked_action, num_cores

MAX_EPISODE_STEPS = 360
SUBTASK_REWARD = 100.0
SUBTASKS = ("drawer", "bulb", "slider", "led")  # in the order in which they count
SUBSTEPS = 8  # steps of physics per step
NUM_TRAJECTORIES = 1239  # paper, section 4.1

# What the entries of an observation are.
TOOL_POSITION, TOOL_ANGLES, WIDTH, JOINTS, GRIPPER = slice(0, 3), slice(3, 6), 6, slice(7, 14), 14
SLIDE, DRAWER, BUTTON, SWITCH, BULB, LED = range(15, 21)

# -------------------------------------------------------------------------------------------------- inverse kinematics


def rotation_matrix(angles) -> np.ndarray:
    """Return Rz(c) Ry(b) Rx(a), (E, 3, 3), of Euler angles (a, b, c), (E, 3)."""
    (sa, sb, sc), (ca, cb, cc) = np.sin(angles).T, np.cos(angles).T
    matrix = np.empty((len(angles), 3, 3))
    matrix[:, 0, 0], matrix[:, 0, 1], matrix[:, 0, 2] = cc * cb, cc * sb * sa - sc * ca, cc * sb * ca + sc * sa
    matrix[:, 1, 0], matrix[:, 1, 1], matrix[:, 1, 2] = sc * cb, sc * sb * sa + cc * ca, sc * sb * ca - cc * sa
    matrix[:, 2, 0], matrix[:, 2, 1], matrix[:, 2, 2] = -sb, cb * sa, cb * ca
    return matrix


def euler_angles(matrix) -> np.ndarray:
    """Return the Euler angles (E, 3) of rotations (E, 3, 3), the inverse of `rotation_matrix`; a, c in [-pi, pi]."""
    angles = np.empty((len(matrix), 3))
    angles[:, 0] = np.arctan2(matrix[:, 2, 1], matrix[:, 2, 2])
    angles[:, 1] = -np.arcsin(np.clip(matrix[:, 2, 0], -1.0, 1.0))
    angles[:, 2] = np.arctan2(matrix[:, 1, 0], matrix[:, 0, 0])
    return angles


def _rotation_vector(matrix):
    """Return axis times angle, (E, 3), of rotations (E, 3, 3)."""
    vector = np.empty((len(matrix), 3))
    vector[:, 0] = matrix[:, 2, 1] - matrix[:, 1, 2]
    vector[:, 1] = matrix[:, 0, 2] - matrix[:, 2, 0]
    vector[:, 2] = matrix[:, 1, 0] - matrix[:, 0, 1]
    sine = np.sqrt(np.square(vector).sum(axis=1)) / 2
    angle = np.arctan2(sine, (matrix[:, 0, 0] + matrix[:, 1, 1] + matrix[:, 2, 2] - 1) / 2)
    return vector * (angle / np.maximum(2 * sine, 1e-9))[:, None]


JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])


class _InverseKinematics:
    """Bullet's damped least squares for E arms at once, with CALVIN's settings.

    Bullet makes up to 20 updates dq = J^T (J J^T + 0.36 I)^-1 (e - J n) + n, with e the error of the tool's pose (6)
    and n = 0.001 (home - q), which pulls towards the home pose. The damping is heavy: near the edge of reach the tool
    visibly stays behind its target, and that belongs to the task.
    Here J and n are kept for 5, 5 and 10 updates, so that only the error is iterated: with P = 0.36 (J J^T + 0.36 I)^-1
    an update turns e into P (e - J n). The result is within 0.011 rad of Bullet's, 0.001 on average.
    """

    BLOCKS = (5, 5, 10)
    DAMPING = 0.36
    PULL = 0.001
    TOLERANCE = 1e-4  # m; an update that starts closer than this is the last

    def __init__(self, num_envs):
        # One thread: an arm takes 2 microseconds, waking a second thread up to 100.
        self.batch = Batch(arm_model(), num_envs, 1)
        self.qpos = self.batch.bind("qpos")  # (E, 9), the fingers stay at 0
        self.tool = self.batch.bind("site_xpos")[:, 0]  # (E, 3)
        self.tool_matrix = self.batch.bind("site_xmat").reshape(num_envs, 3, 3)
        self.anchor = self.batch.bind("xanchor")[:, ARM]  # (E, 7, 3) points on the joints' axes
        self.axis = self.batch.bind("xaxis")[:, ARM]  # (E, 7, 3)
        self.jacobian = np.empty((num_envs, 7, 6))  # transposed
        self.error = np.empty((num_envs, 6, 1))

    def solve(self, q, position, angles):
        """Return joint targets (E, 7) for tool positions (E, 3) and Euler angles (E, 3), from joints q (E, 7)."""
        q = q.copy()
        rotation = rotation_matrix(angles)
        searching = np.ones(len(q), dtype=bool)
        for updates in self.BLOCKS:
            self._linearise(q, position, rotation)
            near = np.square(self.error[:, :3, 0]).sum(axis=1) < self.TOLERANCE**2
            jacobian, transposed = self.jacobian.transpose(0, 2, 1), self.jacobian
            pull = self.PULL * (HOME - q)  # (E, 7)
            inverse = np.linalg.inv(jacobian @ transposed + self.DAMPING * np.eye(6))  # (E, 6, 6)
            keep = self.DAMPING * inverse  # P
            offset = jacobian @ pull[:, :, None]  # J n, (E, 6, 1)
            first = residual = self.error - offset
            total = first
            for _ in range(updates - 1):
                residual = keep @ residual - offset
                total = total + residual
            total = np.where(near[:, None, None], first, total)
            count = np.where(near, 1, updates)
            change = (transposed @ (inverse @ total))[:, :, 0] + count[:, None] * pull
            q = np.where(searching[:, None], q + change, q)
            searching &= ~near
        return np.clip(q, JOINT_LOW, JOINT_HIGH)

    def _linearise(self, q, position, rotation):
        """Compute Jacobian and error of the tool's pose at joints q (E, 7)."""
        self.qpos[:, ARM] = q
        self.batch.forward(stage=mujoco.mjtStage.mjSTAGE_POS)
        axis, arm = self.axis, self.tool[:, None] - self.anchor  # (E, 7, 3)
        # The cross product axis x arm; np.cross takes five times as long.
        self.jacobian[:, :, 0] = axis[:, :, 1] * arm[:, :, 2] - axis[:, :, 2] * arm[:, :, 1]
        self.jacobian[:, :, 1] = axis[:, :, 2] * arm[:, :, 0] - axis[:, :, 0] * arm[:, :, 2]
        self.jacobian[:, :, 2] = axis[:, :, 0] * arm[:, :, 1] - axis[:, :, 1] * arm[:, :, 0]
        self.jacobian[:, :, 3:] = axis
        self.error[:, :3, 0] = position - self.tool
        self.error[:, 3:, 0] = _rotation_vector(rotation @ self.tool_matrix.transpose(0, 2, 1))


# -------------------------------------------------------------------------------------------------------------- physics

MOTOR_RATE = 24.0  # 1/s: a motor moves its joint by a tenth of the error per step of physics
MAX_JOINT_SPEED = np.array([2.0] * 7 + [1.0] * 2)  # rad/s, m/s for the fingers
MOTOR_FORCE = 200.0  # N m, N for the fingers when they close
OPENING_FORCE = 4.0  # N
BUTTON_THRESHOLD = BUTTON_RANGE / 2
SWITCH_THRESHOLD = SWITCH_RANGE / 2


class _Physics:
    """Scene, joint motors, button and lights of E members."""

    def __init__(self, num_envs, num_threads):
        model = scene_model()
        # persistent: a step continues from the mass matrix and forces that the motor law has read.
        self.batch = Batch(model, num_envs, num_threads, persistent=True)
        self.state = self.batch.state  # (E, S), all that MuJoCo needs to continue
        self.qpos = self.batch.bind("qpos")  # (E, 34), the views below follow the simulation
        self.qvel = self.batch.bind("qvel")  # (E, 31)
        self.ctrl = self.batch.bind("ctrl")  # (E, 10)
        self.bias = self.batch.bind("qfrc_bias")[:, ROBOT]  # gravity, Coriolis and centrifugal forces
        self.mass = self.batch.bind("M")  # (E, M), the mass matrix in sparse rows
        self.mass_index = _dense_index(model)
        self.dense_mass = np.empty((num_envs, 9, 9))  # that of the robot
        self.tool = self.batch.bind("site_xpos")[:, model.site("tcp").id]  # (E, 3)
        self.tool_matrix = self.batch.bind("site_xmat")[:, model.site("tcp").id].reshape(num_envs, 3, 3)
        self.kinematics = _InverseKinematics(num_envs)

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

        fixtures (n, 4): positions of slide, drawer, button and switch other than 0.
        """
        self.batch.reset(members, stage=mujoco.mjtStage.mjSTAGE_NONE)
        self.qpos[members, ARM] = HOME
        self.qpos[members, FINGERS] = FINGER_OPEN
        if fixtures is not None:
            self.qpos[members, FIXTURES] = fixtures
        for i, rng in zip(members, rngs, strict=True):
            self.qpos[i, BLOCKS] = _place_blocks(rng)
        self.ctrl[members, -1] = BUTTON_WEIGHT
        self.batch.forward(members, stage=mujoco.mjtStage.mjSTAGE_VEL)
        self.joint_target[members] = self.qpos[members, ROBOT]
        self.max_force[members] = MOTOR_FORCE
        self._run(1, members)
        self.target[members] = np.concatenate([self.tool_position, self.tool_angles], axis=1)[members]
        self.pressed[members] = False
        self.led[members] = False
        self.bulb[members] = self.qpos[members, FIXTURES.stop - 1] > SWITCH_THRESHOLD

    def step(self, actions, members=None):
        """Apply actions (E, 7) for 1/30 s, to the members (n,) int (None: all).

        A member whose physics diverge is put back to where it was. Returns which did, (E,) bool.
        """
        chosen = slice(None) if members is None else members
        before = [array[chosen].copy() for array in self._arrays()]
        self.target[chosen] += (actions[:, :6] * np.repeat([POSITION_SCALE, ANGLE_SCALE], 3))[chosen]
        self.gripper[chosen] = np.where(actions[:, 6] >= 0, 1.0, -1.0)[chosen]
        is_open = self.gripper[:, None] > 0
        self.joint_target[:, ARM] = self.kinematics.solve(self.qpos[:, ARM], self.target[:, :3], self.target[:, 3:])
        self.joint_target[:, FINGERS] = np.where(is_open, FINGER_OPEN, 0.0)
        self.max_force[:, FINGERS] = np.where(is_open, OPENING_FORCE, MOTOR_FORCE)
        self._run(SUBSTEPS, members)
        switch_lights(self, chosen)

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
        q, v, mass, forces = self.qpos[:, ROBOT], self.qvel[:, ROBOT], self.dense_mass, self.ctrl[:, :9]
        for substep in range(substeps):
            # `take` gives the same memory layout for every E; that of indexing depends on E, and with it the rounding.
            self.mass.take(self.mass_index, axis=1, out=mass)
            mass[:, 7, 8] = mass[:, 8, 7] = 0.0  # the fingers, which are not coupled
            change = _clip(MOTOR_RATE * (self.joint_target - q), MAX_JOINT_SPEED) - v
            force = (mass @ change[:, :, None])[:, :, 0] / TIME_STEP + self.bias
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

    def observations(self):
        """Return the observations (E, 21) float64."""
        return observations(self)

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
        expected = (len(self.state), sum(array[0].size for array in self._arrays()))
        if state.shape != expected:
            raise ValueError(
                f"the state is that of {len(state)} members, this environment has {expected[0]}, "
                f"or of another version of the scene: shape {state.shape}, expected {expected}"
            )
        if not np.isfinite(state).all():
            raise ValueError("the physics of the state contain NaN or infinity")
        first = 0
        for array in self._arrays():
            size = int(np.prod(array.shape[1:]))
            array[:] = state[:, first : first + size].reshape(array.shape)
            first += size
        self.refresh()


def switch_lights(physics, chosen) -> None:
    """Let button and switch set the lights at the end of a step, of the chosen members (index or slice).

    `physics` has qpos (E, 34) and pressed, led, bulb (E,) bool. Both are looked at once per step, as in the original:
    the LED toggles when the button goes down, the bulb is on while the switch is beyond the middle.
    """
    button, switch = physics.qpos[:, FIXTURES][:, 2:].T
    pressed = button > BUTTON_THRESHOLD
    physics.led[chosen] ^= (pressed & ~physics.pressed)[chosen]
    physics.pressed[chosen] = pressed[chosen]
    physics.bulb[chosen] = (switch > SWITCH_THRESHOLD)[chosen]


def observations(physics) -> np.ndarray:
    """Return the observations (E, 21) float64 of a physics, this one or that of data_tools.calvin_pybullet."""
    return np.concatenate(
        [
            physics.tool_position,
            physics.tool_angles,
            physics.qpos[:, FINGERS].sum(axis=1, keepdims=True),
            physics.qpos[:, ARM],
            physics.gripper[:, None],
            physics.qpos[:, FIXTURES],
            physics.bulb[:, None],
            physics.led[:, None],
        ],
        axis=1,
    )


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


@cache
def _placement():
    """Return an MjData to try out places of blocks, and the blocks' bodies."""
    return mujoco.MjData(scene_model()), [scene_model().body(name).id for name in BLOCK_NAMES]


def _place_blocks(rng):
    """Draw the poses of the three blocks, (21,): on random surfaces, again until no two touch each other."""
    model, (data, bodies) = scene_model(), _placement()
    poses = np.zeros((3, 7))
    while True:
        for pose in poses:
            low, high = SURFACES[rng.integers(len(SURFACES))]
            pose[:2] = rng.uniform(low, high)
            pose[2] = BLOCK_HEIGHT
            half_yaw = rng.uniform(-np.pi, np.pi) / 2
            pose[3], pose[6] = np.cos(half_yaw), np.sin(half_yaw)
        data.qpos[BLOCKS] = poses.ravel()
        mujoco.mj_kinematics(model, data)
        mujoco.mj_collision(model, data)
        touching = np.isin(model.geom_bodyid[data.contact.geom], bodies).all(axis=1)
        if not touching.any():
            return poses.ravel()


# --------------------------------------------------------------------------------------------------------- environments

OBSERVATION_SPACE = gymnasium.spaces.Box(-np.inf, np.inf, (21,), np.float32)
ACTION_SPACE = gymnasium.spaces.Box(-1.0, 1.0, (7,), np.float32)


def subtask_conditions(obs, start) -> np.ndarray:
    """Return which sub-tasks (drawer, bulb, slider, led) hold, (..., 4) bool, in `obs` (..., 21).

    `start` (..., 21): the first observation of the episode.
    """
    return np.stack(
        [
            obs[..., DRAWER] - start[..., DRAWER] > 0.12,
            (start[..., BULB] == 0) & (obs[..., BULB] == 1),
            obs[..., SLIDE] - start[..., SLIDE] > 0.15,
            (start[..., LED] == 0) & (obs[..., LED] == 1),
        ],
        axis=-1,
    )


class CalvinVectorEnv(MemberVectorEnv):
    """E tables stepped together, each exactly as CalvinEnv: observations (E, 21) float32, actions (E, 7).

    Resets, infos and states: see MemberVectorEnv.
    `num_threads` threads, the calling one among them, step the physics (None: one per core that this process may use,
    for at least four members each); their number does not change the result.
    `simulator="pybullet"` runs the original's physics instead, one member after the other: see
    data_tools.calvin_pybullet for what it needs. `calvin_env_root`: where (None: $CALVIN_ENV_ROOT).
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}
    saved: ClassVar[dict] = {"start": np.float64, "subtasks": np.int64, **MemberVectorEnv.saved}
    info_names: ClassVar[dict] = {**MemberVectorEnv.info_names, "num_subtasks": "_subtasks"}

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        num_threads: int | None = None,
        simulator: str = "mujoco",
        calvin_env_root: str | os.PathLike | None = None,
    ):
        """Raises ValueError for arguments out of range; for PyBullet also DependencyNotInstalled and DataError."""
        super().__init__(OBSERVATION_SPACE, ACTION_SPACE, num_envs, max_episode_steps, render_mode, autoreset_mode)
        if simulator not in ("mujoco", "pybullet"):
            raise ValueError(f"simulator must be 'mujoco' or 'pybullet', got {simulator!r}")
        if simulator == "pybullet":
            from data_tools.calvin_pybullet import BulletPhysics  # which imports this file

            self._physics = BulletPhysics(num_envs, calvin_env_root)
        else:
            if num_threads is None:
                num_threads = max(min(num_cores(), num_envs // 4), 1)
            self._physics = _Physics(num_envs, num_threads)
        self._start = np.zeros((num_envs, 21))  # the first observation of the episode
        self._subtasks = np.zeros(num_envs, dtype=np.int64)  # how many were done

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one frame (400, 400, 3) uint8 per member, or None without a render mode; errors as in CalvinEnv."""
        if self.render_mode is None:
            return None
        physics = self._physics
        return tuple(draw(physics.qpos[i], physics.bulb[i], physics.led[i]) for i in range(self.num_envs))

    def _seeded(self, member):
        self._physics.gripper[member] = 1.0

    def _begin(self, members):
        self._physics.reset(members, [self._rngs[i] for i in members])
        self._start[members] = self._physics.observations()[members]
        self._subtasks[members] = 0

    def _advance(self, actions, running):
        unstable = np.zeros(self.num_envs, dtype=bool)
        if running.any():
            unstable = self._physics.step(actions, None if running.all() else np.flatnonzero(running))
        # The next sub-task in the order counts if it holds now, one per step; what was done early counts later if it
        # still holds then.
        holds = subtask_conditions(self._physics.observations(), self._start)  # (E, 4)
        counts = holds[np.arange(self.num_envs), np.minimum(self._subtasks, 3)] & running & ~unstable
        self._subtasks += counts
        rewards = np.where(counts, np.float32(SUBTASK_REWARD), np.float32(0.0))
        return rewards, counts & (self._subtasks == len(SUBTASKS)), unstable

    def _observations(self):
        return self._physics.observations().astype(np.float32)  # (E, 21)

    def _get_physics(self):
        return self._physics.get_state()

    def _set_physics(self, state):
        self._physics.set_state(state)


class CalvinEnv(gymnasium.Env):
    """One table: open the drawer, turn on the light bulb, move the slider left, turn on the LED, within 360 steps.

    Observation (21,) float32, not normalised: tool position 3 and Euler angles 3, gripper width, arm joints 7, last
    gripper command (1 open, -1 closed), joints of slide, drawer, button and switch, light bulb and LED (0 or 1). The
    three blocks are simulated but not observed.
    Action (7,) in [-1, 1], clipped: moves the target pose of the tool by 0.02 m per unit along x, y, z and 0.05 rad per
    unit of Euler angle; the gripper opens for a last entry >= 0, else closes. The target pose is a state of its own,
    which starts at the tool's pose and is never read back from the robot.
    Reward 100 when the next sub-task in the order holds, at most one per step; the fourth ends the episode
    (terminated); truncated after `max_episode_steps`. `info["num_subtasks"]`: sub-tasks done; `info["is_success"]`:
    this step did the fourth; `info["unstable"]`: the physics diverged; the episode ends (terminated, reward 0) with the
    last finite observation. The last gripper command outlives an episode, as in the original, unless `reset` gets a
    seed.
    `simulator="pybullet"`: the original's physics instead of the port's, all else the same (as in CalvinVectorEnv).
    """

    metadata: ClassVar[dict] = {"render_modes": ["rgb_array"], "render_fps": 30}
    observation_space = OBSERVATION_SPACE
    action_space = ACTION_SPACE

    def __init__(
        self,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
        simulator: str = "mujoco",
        calvin_env_root: str | os.PathLike | None = None,
    ):
        """Raises ValueError for arguments out of range; for PyBullet also DependencyNotInstalled and DataError."""
        self.render_mode = render_mode
        # A vector of one: the two cannot differ.
        self._envs = CalvinVectorEnv(
            1, max_episode_steps, render_mode, AutoresetMode.DISABLED, 1, simulator, calvin_env_root
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; `options` are not used."""
        super().reset(seed=seed)
        envs = self._envs
        if seed is not None:
            envs._physics.gripper[0] = 1.0
        envs._rngs = [self.np_random]  # the generator that Gymnasium seeds
        observations, infos = envs.reset()
        return observations[0], self._info(infos)

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply one action for 1/30 s. Raises ValueError for an action of wrong shape or with NaN."""
        action = checked_action(action, (7,))
        observations, rewards, terminations, truncations, infos = self._envs.step(action[None])
        flags = bool(terminations[0]), bool(truncations[0])
        return observations[0], float(rewards[0]), *flags, self._info(infos)

    def render(self) -> np.ndarray | None:
        """Return (400, 400, 3) uint8, or None without a render mode. Raises DataError where OpenGL is missing."""
        frames = self._envs.render()
        return None if frames is None else frames[0]

    def close(self):
        self._envs.close()

    def _info(self, infos):
        return {key: infos[key][0].item() for key in ("is_success", "num_subtasks", "unstable")}


# ------------------------------------------------------------------------------------------------------------ rendering

FRAME_SHAPE = (400, 400, 3)
LIT = {"bulb": (1.0, 0.86, 0.25, 1.0), "led": (0.25, 0.95, 0.35, 1.0)}
DARK_LAMP = (0.86, 0.86, 0.84, 1.0)


@cache
def _painter():
    return Painter(display_model(), FRAME_SHAPE, lookat=(-0.02, -0.1, 0.45), distance=1.5, azimuth=122, elevation=-36)


def draw(qpos, bulb: bool = False, led: bool = False) -> np.ndarray:
    """Return a picture (400, 400, 3) uint8 of the scene with joint positions (34,) and lights on or off.

    Always call it from the same thread. Raises DataError where OpenGL is missing.
    """
    painter = _painter()  # made when first needed, since most runs draw nothing
    for name, lit in (("bulb", bulb), ("led", led)):
        painter.model.geom(name).rgba = LIT[name] if lit else DARK_LAMP
    return painter(qpos)


# --------------------------------------------------------------------------------------------------------- offline data

LOCKSTEP = 32  # trajectories recorded together
NOISE = 0.25  # of the default data, in units of action
MAX_SKIPPED = 100  # attempts, and as many as trajectories


def _view(physics, member):
    """Return what a script sees of a member."""
    blocks = physics.qpos[member, BLOCKS].reshape(3, 7).copy()
    return calvin_play.View(physics.observations()[member], physics.target[member].copy(), blocks)


def _generator(seed, attempt):
    # A stream of its own for each attempt: the data do not depend on what else is recorded.
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(attempt,)))


class _Recorder:
    """Records attempts at a trajectory, up to E at a time; an attempt depends on seed, noise and its number alone."""

    def __init__(self, num_envs, num_threads):
        self.physics = _Physics(num_envs, num_threads)

    def _begin(self, member, rng):
        """Put a member into the start state of an attempt."""
        fixtures, led = calvin_play.draw_fixtures(rng)
        self.physics.gripper[member] = calvin_play.OPEN
        self.physics.reset(np.array([member]), [rng], fixtures[None])
        self.physics.led[member] = led

    def record(self, seed, attempts, noise, bar=None):
        """Yield (attempt, obs (490, 21), actions (490, 7)) of the attempts (iterable of int), in any order.

        An attempt whose physics diverge gives (attempt, None, None). `bar` counts the steps.
        """
        physics, waiting = self.physics, iter(attempts)
        num_envs = len(physics.state)
        current = [None] * num_envs  # the attempt of each member
        scripts, rows = [None] * num_envs, [None] * num_envs
        actions = np.zeros((num_envs, 7))
        free = list(range(num_envs))
        while True:
            for member in free:
                current[member] = next(waiting, None)
                if current[member] is not None:
                    rng = _generator(seed, current[member])
                    self._begin(member, rng)
                    rows[member] = []
                    view = _view(physics, member)
                    scripts[member] = self._script(view, rng, noise, rows[member])
                    actions[member] = next(scripts[member])
            running = np.array([member for member in range(num_envs) if current[member] is not None], dtype=int)
            if len(running) == 0:
                return
            unstable = physics.step(actions, running if len(running) < num_envs else None)
            observations = physics.observations()
            if bar is not None:
                bar.update(sum(len(rows[member]) > 0 for member in running))
            free = []
            for member in running:
                if unstable[member] or len(rows[member]) == calvin_play.TRAJECTORY_STEPS:
                    attempt, recorded = current[member], rows[member]
                    free.append(int(member))
                    if unstable[member]:
                        yield attempt, None, None
                    else:
                        yield attempt, np.stack([row[0] for row in recorded]), np.stack([row[1] for row in recorded])
                    continue
                blocks = physics.qpos[member, BLOCKS].reshape(3, 7).copy()
                view = calvin_play.View(observations[member], physics.target[member].copy(), blocks)
                actions[member] = scripts[member].send(view)

    def _script(self, view, rng, noise, rows):
        """Play, and append (observation, action) to rows once the warm-up is over."""
        view = yield from calvin_play.warm_up(view, rng)
        player = calvin_play.play(view, rng, noise)
        action = next(player)
        while True:
            # Applied as stored (float32), so that the file can be replayed.
            action = action.astype(np.float32)
            rows.append((view.obs.astype(np.float32), action))
            view = yield action
            action = player.send(view)

    def replay(self, seed, attempt, actions):
        """Return obs (T + 1, 21) float32 of actions (T, 7) from the start state of an attempt (with one member)."""
        rng = _generator(seed, attempt)
        self._begin(0, rng)
        warm_up = calvin_play.warm_up(_view(self.physics, 0), rng)
        try:
            action = next(warm_up)
            while True:
                self.physics.step(action[None])
                action = warm_up.send(_view(self.physics, 0))
        except StopIteration:
            pass
        observations = [self.physics.observations()[0]]
        for action in actions:
            self.physics.step(np.asarray(action, dtype=np.float64)[None])
            observations.append(self.physics.observations()[0])
        return np.stack(observations).astype(np.float32)


def transitions(obs) -> list[tuple[int, int]]:
    """Return when sub-tasks happen in a trajectory obs (T, 21): (row, index of the sub-task), in order.

    A drawer opens beyond 0.12, a slider moves left beyond 0.15, bulb and LED light up.
    """
    holds = np.stack([obs[:, DRAWER] > 0.12, obs[:, BULB] > 0.5, obs[:, SLIDE] > 0.15, obs[:, LED] > 0.5], axis=1)
    rows, subtasks = np.nonzero(holds[1:] & ~holds[:-1])
    return list(zip((rows + 1).tolist(), subtasks.tolist(), strict=True))


def _does_the_task(obs):
    """Return whether the four sub-tasks happen in their order, whatever else happens in between."""
    done = 0
    for _, subtask in transitions(obs):
        done += done < len(SUBTASKS) and subtask == done
    return done == len(SUBTASKS)


def collect(
    num_trajectories: int = NUM_TRAJECTORIES,
    noise: float = NOISE,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> OfflineDataset:
    """Record scripted play: trajectories of 490 steps, each of about a dozen behaviours in random order.

    `noise` is the greatest standard deviation of the disturbances of an action (calvin_play.follow); each behaviour has
    its own, uniform from 0. `num_workers` threads step the physics (None: one per core that this process may use); the
    result depends on `num_trajectories`, `noise` and `seed` only. The data must not contain the task: an attempt in
    which the four sub-tasks happen in their order is left out, and the next one takes its place.
    `attributes["skipped"]` lists the attempts left out. Raises DataError for arguments without meaning.
    """
    if num_trajectories < 1 or not 0.0 <= noise < np.inf or seed < 0:
        raise DataError(
            "Recording needs --num-trajectories >= 1, --noise >= 0 and --seed >= 0, "
            f"got {num_trajectories}, {noise} and {seed}."
        )
    recorder = _Recorder(min(LOCKSTEP, num_trajectories), num_workers or num_cores())
    kept, skipped, first = {}, [], 0
    total = num_trajectories * calvin_play.TRAJECTORY_STEPS
    with tqdm(total=total, desc="calvin play", unit="step", unit_scale=True, disable=not progress) as bar:
        while len(kept) < num_trajectories:
            missing = num_trajectories - len(kept)
            for attempt, observations, actions in recorder.record(seed, range(first, first + missing), noise, bar):
                if observations is None or _does_the_task(observations):
                    skipped.append(attempt)
                    bar.total += calvin_play.TRAJECTORY_STEPS  # another takes its place
                else:
                    kept[attempt] = (observations, actions)
            first += missing
            if len(skipped) > MAX_SKIPPED + num_trajectories:
                raise DataError(f"Recording with noise {noise} fails too often: use less --noise.")
    trajectories = [kept[attempt] for attempt in sorted(kept)]
    timeouts = np.zeros((num_trajectories, calvin_play.TRAJECTORY_STEPS), dtype=bool)
    timeouts[:, -1] = True
    return OfflineDataset(
        observations=np.concatenate([observations for observations, _ in trajectories]),
        actions=np.concatenate([actions for _, actions in trajectories]),
        terminals=np.zeros(timeouts.size, dtype=bool),
        timeouts=timeouts.ravel(),
        attributes={
            "generator": "data_tools.calvin.collect",
            "version": 1,
            "seed": seed,
            "noise": float(noise),
            "skipped": sorted(skipped),
        },
    )


def replay(dataset: OfflineDataset, trajectory: int) -> np.ndarray:
    """Apply the actions of a trajectory of a complete data set from its start state; return obs (T + 1, 21) float32.

    The first T rows equal the recorded ones bit for bit. The start state is not in the file (observations leave out
    blocks, speeds and target pose): it follows from the seed. Raises DataError for data that `collect` did not make.
    """
    attributes = dataset.attributes
    if attributes.get("generator") != "data_tools.calvin.collect":
        raise DataError(f"{dataset!r} was not recorded by data_tools.calvin and cannot be replayed.")
    if not 0 <= trajectory < len(dataset.episode_starts):
        raise DataError(f"{dataset!r} has no trajectory {trajectory}.")
    kept = (attempt for attempt in itertools.count() if attempt not in attributes["skipped"])
    attempt = next(itertools.islice(kept, trajectory, None))
    start, length = int(dataset.episode_starts[trajectory]), int(dataset.episode_lengths[trajectory])
    actions = dataset.actions[start : start + length].cpu().numpy()
    return _Recorder(1, 1).replay(attributes["seed"], attempt, actions)


# Means and standard deviations of the real data: published as constants of a public evaluation script.
REAL_DATA = {
    "x": (0, 0.04, 0.15), "y": (1, -0.12, 0.11), "z": (2, 0.51, 0.063), "roll": (3, 1.08, 2.88),
    "pitch": (4, -0.08, 0.13), "yaw": (5, 1.58, 0.38), "width": (6, 0.055, 0.030),
    "joint 1": (7, -0.74, 0.33), "joint 2": (8, 1.02, 0.17), "joint 3": (9, 1.79, 0.24), "joint 4": (10, -2.10, 0.38),
    "joint 5": (11, -0.99, 0.20), "joint 6": (12, 1.79, 0.16), "joint 7": (13, 0.59, 0.35),
    "gripper": (GRIPPER, 0.10, 1.0), "slide": (SLIDE, 0.151, 0.126), "drawer": (DRAWER, 0.120, 0.097),
    "switch": (SWITCH, 0.042, 0.042), "bulb": (BULB, 0.49, 0.50), "led": (LED, 0.47, 0.50),
}  # fmt: skip


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Return the figures by which play data are compared.

    `mean NAME` and `std NAME` of the entries of an observation; `NAME` how often a sub-task happens per trajectory;
    `NAME then NEXT` the share of pairs of successive sub-tasks, or of their opposites, that are these two;
    `task` the number of trajectories in which the four sub-tasks happen in their order.
    """
    observations = dataset.observations.cpu().numpy()
    starts, lengths = dataset.episode_starts.tolist(), dataset.episode_lengths.tolist()
    figures = {"trajectories": len(lengths), "rows": len(observations), "mean length": float(np.mean(lengths))}
    for name, (entry, _, _) in REAL_DATA.items():
        values = observations[:, entry].astype(np.float64)
        figures |= {f"mean {name}": float(values.mean()), f"std {name}": float(values.std())}
    count, pairs, num_pairs, in_order = np.zeros(4), np.zeros(3), 0, 0
    for start, length in zip(starts, lengths, strict=True):
        obs = observations[start : start + length]
        done = transitions(obs)
        count += np.bincount([subtask for _, subtask in done], minlength=4)
        # Opposites (closing the drawer, ...) are numbered 4 to 7.
        mirrored = obs.copy()
        mirrored[:, [DRAWER, SLIDE, BULB, LED]] *= -1
        mirrored[:, [DRAWER, SLIDE, BULB, LED]] += [2 * 0.12, 2 * 0.15, 1, 1]
        everything = sorted(done + [(row, subtask + 4) for row, subtask in transitions(mirrored)])
        order = [subtask for _, subtask in everything]
        num_pairs += max(len(order) - 1, 0)
        pairs += [sum(pair == (k, k + 1) for pair in itertools.pairwise(order)) for k in range(3)]
        in_order += _does_the_task(obs)
    figures |= {name: float(number) for name, number in zip(SUBTASKS, count / len(lengths), strict=True)}
    for k in range(3):
        figures[f"{SUBTASKS[k]} then {SUBTASKS[k + 1]}"] = float(pairs[k] / max(num_pairs, 1))
    return figures | {"task": in_order}


def subtask_statistics(obs, ended) -> dict[str, float]:
    """Return how often the sub-tasks happen in E episodes, in any order.

    obs (T + 1, E, 21) and ended (T + 1, E) bool: which members had ended before the step; their rows do not count.
    Result: the share of episodes in which the condition of `drawer`, `bulb`, `slider`, `led` holds at some time, and
    `any_order`, how many different ones per episode.
    """
    obs, ended = np.asarray(obs), np.asarray(ended, dtype=bool)
    # The row at which `ended` is first True is the last observation of the episode, and counts.
    counts = ~np.concatenate([np.zeros_like(ended[:1]), ended[:-1]])
    happened = (subtask_conditions(obs, obs[:1]) & counts[:, :, None]).any(axis=0)  # (E, 4)
    shares = {name: float(share) for name, share in zip(SUBTASKS, happened.mean(axis=0), strict=True)}
    return shares | {"any_order": float(happened.sum(axis=1).mean())}


def run_expert(num_episodes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Let the scripted expert play episodes with seeds seed, seed + 1, ...; return (returns (N,), lengths (N,))."""
    envs = CalvinVectorEnv(num_episodes, autoreset_mode=AutoresetMode.DISABLED)
    envs.reset(seed=seed)
    scripts = [calvin_play.expert(_view(envs._physics, i)) for i in range(num_episodes)]
    actions = np.stack([next(script) for script in scripts])
    returns, lengths = np.zeros(num_episodes), np.zeros(num_episodes, dtype=int)
    running = np.ones(num_episodes, dtype=bool)
    while running.any():
        _, rewards, terminations, truncations, _ = envs.step(actions)
        returns += rewards
        lengths += running
        running = ~(terminations | truncations)
        for i in np.flatnonzero(running):
            actions[i] = scripts[i].send(_view(envs._physics, i))
    envs.close()
    return returns, lengths


def plot_play(dataset: OfflineDataset, path, num_trajectories: int = 40) -> None:
    """Draw the scene and the tool's paths, from above and from the side, into the image file `path`.

    Raises DataError where OpenGL is missing.
    """
    from matplotlib.figure import Figure  # only plots need matplotlib; no pyplot, so no display either

    physics = _Physics(1, 1)
    physics.reset(np.array([0]), [np.random.default_rng(0)], np.array([[0.14, 0.1, 0.0, 0.05]]))
    scene = draw(physics.qpos[0], bulb=True, led=True)
    figure = Figure(figsize=(14, 5), layout="constrained")
    picture, above, side = figure.subplots(1, 3, width_ratios=(1, 1.35, 1))
    picture.imshow(scene)
    picture.set(xticks=[], yticks=[], title="the scene")
    starts, lengths = dataset.episode_starts.tolist(), dataset.episode_lengths.tolist()
    chosen = np.unique(np.linspace(0, len(starts) - 1, num_trajectories).astype(int))
    positions = dataset.observations[:, TOOL_POSITION].cpu().numpy()
    for i in chosen:
        x, y, z = positions[starts[i] : starts[i] + lengths[i]].T
        above.plot(x, y, linewidth=0.7, alpha=0.6)
        side.plot(y, z, linewidth=0.7, alpha=0.6)
    table = {"color": "0.75", "zorder": 0}
    above.fill_between([-0.44, 0.44], -0.18, 0.18, **table)
    side.fill_between([-0.18, 0.18], 0.30, 0.44, **table)
    side.plot([0.02, 0.14], [0.44, 0.648], color="0.6", linewidth=4, zorder=0)  # the slanted front
    marks = {"drawer": (0.18, -0.21, 0.36), "switch": (0.3, 0.03, 0.55), "slider": (0.04, 0.0, 0.53)}
    for name, (x, y, z) in (marks | {"button": (-0.12, -0.12, 0.47)}).items():
        for axes, place in ((above, (x, y)), (side, (y, z))):
            axes.plot(*place, "o", color="black", markersize=4)
            axes.annotate(name, place, textcoords="offset points", xytext=(5, 5), fontweight="bold")
    above.set(title=f"tool, {len(chosen)} of {len(starts)} trajectories, from above", xlabel="x (m)", ylabel="y (m)")
    side.set(title="from the side", xlabel="y (m)", ylabel="z (m)")
    above.set_aspect("equal")
    side.set_aspect("equal")
    figure.savefig(path, dpi=110)


@dataclass
class Args:
    """Record the play data of CALVIN, unless they are there already, and print their statistics."""

    num_trajectories: int = NUM_TRAJECTORIES
    """trajectories to record (paper: 1,239); any other number needs --out"""
    noise: float = NOISE
    """greatest standard deviation of the disturbances of an action"""
    seed: int = 0
    """random seed"""
    data_dir: str | None = None
    """folder of the data files (default: $SKIMO_DATA_DIR, else the user's cache folder)"""
    out: Path | None = None
    """write to this file instead of the data folder, recording anew"""
    plot: Path | None = None
    """draw the scene and some of the tool's paths into this image file"""
    expert: int = 0
    """instead of all that, count how many of this many episodes the scripted expert solves"""


def main(args: Args) -> None:
    if args.expert > 0:
        returns, lengths = run_expert(args.expert, args.seed)
        solved = returns == SUBTASK_REWARD * len(SUBTASKS)
        print(f"{solved.sum()} of {args.expert} episodes earn 400; mean length {lengths.mean():.0f} steps")
        return
    if args.out is not None:
        dataset = collect(args.num_trajectories, args.noise, args.seed)
        dataset.save(args.out)
        print(f"Wrote {args.out}")
    elif args.num_trajectories != NUM_TRAJECTORIES:
        raise DataError("--num-trajectories other than 1239 needs --out: the data folder holds complete data only.")
    else:
        dataset = load_dataset("calvin", args.data_dir, noise=args.noise, seed=args.seed)
    figures = statistics(dataset)
    print(f"{'entry':>20}  {'mean':>7} {'(real)':>8}  {'std':>6} {'(real)':>7}")
    for name, (_, mean, std) in REAL_DATA.items():
        ours = figures.pop(f"mean {name}"), figures.pop(f"std {name}")
        print(f"{name:>20}  {ours[0]:7.3f} {f'({mean:.3g})':>8}  {ours[1]:6.3f} {f'({std:.3g})':>7}")
    units = dict.fromkeys(SUBTASKS, "per trajectory") | {"task": "trajectories in which all four happen in order"}
    for name, value in figures.items():
        unit = units.get(name, "of pairs of successive sub-tasks" if " then " in name else "")
        print(f"{name:>20}  {f'{value:,}' if isinstance(value, int) else f'{value:.4f}'} {unit}".rstrip())
    if args.plot is not None:
        plot_play(dataset, args.plot)
        print(f"Wrote {args.plot}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, prog="python -m data_tools.calvin"))
    except DataError as error:
        raise SystemExit(f"error: {error}") from None
