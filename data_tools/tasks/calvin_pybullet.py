"""The physics of CALVIN's own simulator (https://arxiv.org/abs/2112.03227) for `skimo/Calvin-v0`, as an option.

    gymnasium.make("skimo/Calvin-v0", simulator="pybullet", calvin_env_root="PATH")

drives PyBullet directly with the URDF files and meshes of a checkout of the simulator's repository, which the user
brings: PATH, or the environment variable CALVIN_ENV_ROOT. All else (rules, rewards, lights, where the blocks start,
seeds, pictures) is that of data_tools.tasks.calvin. What is done in which order follows the original: scene D, loading,
reset, inverse kinematics, motors. One difference: the original lets time run while it looks for places of the blocks.
Units and frames as in calvin.py; E members, one PyBullet server in this process for each.
"""

import base64
import importlib
import os
import tempfile
import zlib
from pathlib import Path

import gymnasium
import numpy as np

from data_tools.files import DataError
from data_tools.tasks import calvin_scene as scene
from data_tools.tasks.calvin_arm import JOINT_HIGH, JOINT_LOW, MOTOR_FORCE, SUBSTEPS

REPOSITORY = "https://github.com/mees/calvin_env"
PYBULLET = "pybullet==3.2.7"  # the version that was measured

# Files of the checkout, below its folder data/.
ROBOT_FILE = "franka_panda/panda_longer_finger.urdf"
BLOCK_FILES = ("blocks/block_red_middle.urdf", "blocks/block_blue_small.urdf", "blocks/block_pink_big.urdf")
TABLE_FILE = "calvin_table_D/urdf/calvin_table_D.urdf"
PLANE_FILE = "plane/plane.urdf"
FILES = (ROBOT_FILE, *BLOCK_FILES, TABLE_FILE, PLANE_FILE)

ARM_JOINTS = tuple(f"panda_joint{i}" for i in range(1, 8))
FINGER_JOINTS = ("panda_finger_joint1", "panda_finger_joint2")
TOOL_JOINT = "tcp_joint"  # PyBullet numbers a link as the joint above it
FIXTURE_JOINTS = ("base__slide", "base__drawer", "base__button", "base__switch")  # in the order of the observation
BASE = -1  # PyBullet's number of a body's first link

ROBOT_BASE = (-0.34, -0.46, 0.24)  # m
SCALE = 0.8  # of table and blocks
GRAVITY = -9.8  # m/s^2
ARM_SPEED, FINGER_SPEED = 2.0, 1.0  # rad/s, m/s
FINGER_FORCE = 2.0  # N, to open
FIXTURE_FORCE = 4.0  # N, dry friction; the most that the button's spring can do
MIN_SIZE = 0.005  # m; an unreadable mesh becomes a shape of 0.002 m, all real ones are larger
NULL_SPACE = 7.0  # rad; the original gives every joint the limits -7 and 7 and the range 7 for its inverse kinematics
CONSTRAINT_ERP, CONSTRAINT_FORCE = 0.1, 50.0  # of what keeps the fingers symmetric


def _pybullet():
    """Return the module pybullet, which is optional. Raises DependencyNotInstalled where it is missing."""
    try:
        return importlib.import_module("pybullet")
    except ImportError as error:
        message = f"simulator='pybullet' needs PyBullet ({error}): pip install {PYBULLET} for this Python."
        raise gymnasium.error.DependencyNotInstalled(message) from error


def _data_folder(root):
    """Return the folder data/ of a checkout of the simulator. Raises DataError for one that is missing or incomplete.

    root: the checkout; None: $CALVIN_ENV_ROOT.
    """
    root = root or os.environ.get("CALVIN_ENV_ROOT")
    cure = f"git clone {REPOSITORY}, then pass calvin_env_root=FOLDER or set CALVIN_ENV_ROOT=FOLDER"
    if not root:
        raise DataError(f"simulator='pybullet' needs the URDF files and meshes of CALVIN's simulator: {cure}.")
    data = Path(os.path.expanduser(root)).absolute() / "data"
    missing = [name for name in FILES if not (data / name).is_file()]
    if missing:
        raise DataError(f"{root} is no checkout of CALVIN's simulator, {missing[0]} is not in its folder data: {cure}.")
    return data


class _World:
    """One PyBullet server with robot, blocks, table and floor."""

    def __init__(self, bullet, data):
        """`data`: the folder of the URDF files. Raises DataError for files that PyBullet cannot use."""
        self.bullet = bullet
        self.data = data
        # Its functions are PyBullet's, for this server. Other users of PyBullet belong into another process: its own
        # functions use server 0 unless they are told another.
        self.client = importlib.import_module("pybullet_utils.bullet_client").BulletClient(bullet.DIRECT)
        self.load()

    def load(self):
        """Empty the server and load everything."""
        client = self.client
        data = self.data
        client.resetSimulation()
        client.setTimeStep(scene.TIME_STEP)
        client.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        client.setGravity(0, 0, GRAVITY)
        client.setAdditionalSearchPath(str(data))
        self.robot = self._load(data / ROBOT_FILE, basePosition=ROBOT_BASE, useFixedBase=True)
        joints = self._joints(self.robot, (*ARM_JOINTS, *FINGER_JOINTS, TOOL_JOINT))
        self.arm = joints[:7]
        self.fingers = joints[7:9]
        self.tool = joints[9]
        left, right = self.fingers
        ends = self.robot, left, self.robot, right
        zero = [0, 0, 0]
        constraint = client.createConstraint(*ends, self.bullet.JOINT_GEAR, [1, 0, 0], zero, zero)
        client.changeConstraint(constraint, gearRatio=-1, erp=CONSTRAINT_ERP, maxForce=CONSTRAINT_FORCE)
        self.blocks = [self._load(data / name, globalScaling=SCALE) for name in BLOCK_FILES]
        self.table = self._load(data / TABLE_FILE, globalScaling=SCALE)
        self.fixtures = self._joints(self.table, FIXTURE_JOINTS)
        self._load(data / PLANE_FILE)
        slide, drawer, button, switch = self.fixtures
        for joint in (slide, drawer, switch):  # a motor that wants to stand still: friction
            client.setJointMotorControl2(self.table, joint, self.bullet.VELOCITY_CONTROL, force=FIXTURE_FORCE)
        spring = dict(targetPosition=0.0, force=FIXTURE_FORCE)
        client.setJointMotorControl2(self.table, button, self.bullet.POSITION_CONTROL, **spring)
        self._check_shapes(self.table, (BASE, *self.fixtures), data / TABLE_FILE)
        self._check_shapes(self.robot, (*self.arm, *self.fingers), data / ROBOT_FILE)
        for block, name in zip(self.blocks, BLOCK_FILES):
            self._check_shapes(block, (BASE,), data / name)

    def _load(self, path, **arguments):
        """Return the body of a URDF file."""
        try:
            return self.client.loadURDF(str(path), **arguments)
        except self.bullet.error as error:
            raise DataError(f"PyBullet cannot load {path} ({error}): clone {REPOSITORY} anew.") from error

    def _joints(self, body, names):
        """Return the numbers of a body's joints."""
        infos = [self.client.getJointInfo(body, i) for i in range(self.client.getNumJoints(body))]
        numbers = {info[1].decode(): i for i, info in enumerate(infos)}
        return [numbers[name] for name in names]

    def _check_shapes(self, body, links, path):
        """Raise DataError where a link has no shape: PyBullet takes meshes that it cannot read for empty ones."""
        for link in links:
            size = np.subtract(*self.client.getAABB(body, link)[::-1])  # m
            if not self.client.getCollisionShapeData(body, link) or size.max() < MIN_SIZE:
                cure = f"clone {REPOSITORY} anew, with its large files (git lfs)"
                raise DataError(f"PyBullet found no shape for link {link} of {path}: its mesh cannot be read; {cure}.")

    def _drive(self, joints, targets, force, speed):
        """Let motors of the robot move joints towards targets."""
        for joint, target in zip(joints, targets):
            motor = dict(targetPosition=target, force=force, maxVelocity=speed)
            self.client.setJointMotorControl2(self.robot, joint, self.bullet.POSITION_CONTROL, **motor)

    def reset(self, poses):
        """Put everything to its start, the blocks at poses (21,); let 1/240 s pass. Returns the tool's pose before."""
        # Nothing of the last episode may remain: PyBullet's restoreState keeps forces inside its solver, so that on the
        # real scene the same episode again differed by 1e-7 m at once and by 1e-4 m at its end.
        self.load()
        client = self.client
        for joint in self.fixtures:
            client.resetJointState(self.table, joint, 0.0)
        for block, pose in zip(self.blocks, poses.reshape(3, 7)):
            client.resetBasePositionAndOrientation(block, pose[:3], pose[[4, 5, 6, 3]])  # quaternions end with w here
        for joint, angle in zip(self.arm, scene.HOME):
            client.resetJointState(self.robot, joint, angle)
        for joint in self.fingers:
            client.resetJointState(self.robot, joint, scene.FINGER_OPEN)
        self._drive(self.arm, scene.HOME, MOTOR_FORCE, ARM_SPEED)
        self._drive(self.fingers, [scene.FINGER_OPEN] * 2, MOTOR_FORCE, FINGER_SPEED)
        start = self.tool_pose()
        client.stepSimulation()
        return start

    def step(self, target, is_open):
        """Move the tool towards the pose target (6,) and open or close the gripper, for 1/30 s."""
        client = self.client
        orientation = client.getQuaternionFromEuler(target[3:])
        rest = [*scene.HOME, scene.FINGER_OPEN, scene.FINGER_OPEN]
        limits = [-NULL_SPACE] * 9, [NULL_SPACE] * 9, [NULL_SPACE] * 9, rest
        joints = client.calculateInverseKinematics(self.robot, self.tool, target[:3], orientation, *limits)
        self._drive(self.arm, np.clip(joints[:7], JOINT_LOW, JOINT_HIGH), MOTOR_FORCE, ARM_SPEED)
        opening, force = (scene.FINGER_OPEN, FINGER_FORCE) if is_open else (0.0, MOTOR_FORCE)
        self._drive(self.fingers, [opening] * 2, force, FINGER_SPEED)
        for _ in range(SUBSTEPS):
            client.stepSimulation()

    def tool_pose(self):
        """Return position and Euler angles (6,) of the tool; after a step PyBullet's value is 1/240 s old."""
        position, quaternion = self.client.getLinkState(self.robot, self.tool)[:2]
        return np.array([*position, *self.client.getEulerFromQuaternion(quaternion)])

    def qpos(self):
        """Return the positions (34,) of all joints and blocks, as data_tools.tasks.calvin_scene orders them."""
        qpos = np.empty(34)
        robot = (self.robot, self.arm, scene.ARM), (self.robot, self.fingers, scene.FINGERS)
        for body, joints, entries in (*robot, (self.table, self.fixtures, scene.FIXTURES)):
            qpos[entries] = [state[0] for state in self.client.getJointStates(body, joints)]
        poses = qpos[scene.BLOCKS].reshape(3, 7)
        for pose, block in zip(poses, self.blocks):
            pose[:3], quaternion = self.client.getBasePositionAndOrientation(block)
            pose[3:] = np.roll(quaternion, 1)
        return qpos

    def get_state(self):
        """Return all that PyBullet needs to continue, as text."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "world.bullet")
            self.client.saveBullet(str(path))
            return base64.b64encode(zlib.compress(path.read_bytes(), level=1)).decode()

    def set_state(self, text):
        """Continue from what `get_state` returned."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "world.bullet")
            path.write_bytes(zlib.decompress(base64.b64decode(text)))
            self.client.restoreState(fileName=str(path))


class BulletPhysics:
    """Robot, table, blocks, button and lights of E members; has what the environments use of MuJoCo's `Physics`."""

    def __init__(self, num_envs, root=None):
        """Raises DependencyNotInstalled without PyBullet, DataError without the checkout `root` (_data_folder)."""
        bullet, data = _pybullet(), _data_folder(root)
        self.worlds = [_World(bullet, data) for _ in range(num_envs)]
        self.qpos = np.zeros((num_envs, 34))  # copies of what PyBullet holds
        self.tool_position = np.zeros((num_envs, 3))
        self.tool_angles = np.zeros((num_envs, 3))
        self.target = np.zeros((num_envs, 6))  # pose that the actions move: position, Euler angles (never wrapped)
        self.gripper = np.ones(num_envs)  # last command: 1 open, -1 closed
        self.pressed = np.zeros(num_envs, dtype=bool)
        self.bulb = np.zeros(num_envs, dtype=bool)
        self.led = np.zeros(num_envs, dtype=bool)

    def reset(self, members, rngs):
        """Put the members (n,) int into a start state, with the lights off and the blocks drawn from rngs (n)."""
        for i, rng in zip(members, rngs, strict=True):
            self.target[i] = self.worlds[i].reset(scene.place_blocks(rng))
            self._read(i)
            self.pressed[i] = self.led[i] = self.bulb[i] = False

    def step(self, actions, members=None):
        """Apply actions (E, 7) for 1/30 s, to the members (n,) int (None: all).

        A member whose physics diverge keeps its last observation; its world is put to the start of an episode.
        Returns which did, (E,) bool.
        """
        stepped = np.zeros(len(self.worlds), dtype=bool)
        stepped[slice(None) if members is None else members] = True
        scale = np.repeat([scene.POSITION_SCALE, scene.ANGLE_SCALE], 3)
        unstable = np.zeros(len(self.worlds), dtype=bool)
        for i in np.flatnonzero(stepped):
            target = self.target[i] + scale * actions[i, :6]
            gripper = 1.0 if actions[i, 6] >= 0 else -1.0
            self.worlds[i].step(target, gripper > 0)
            unstable[i] = not self._read(i)
            if unstable[i]:
                self.worlds[i].reset(self.qpos[i, scene.BLOCKS])
            else:
                self.target[i], self.gripper[i] = target, gripper
        scene.switch_lights(self, stepped & ~unstable)
        return unstable

    def _read(self, member):
        """Copy what PyBullet holds of a member, unless it is not finite; return whether it is."""
        pose, qpos = self.worlds[member].tool_pose(), self.worlds[member].qpos()
        finite = bool(np.isfinite(pose).all() and np.isfinite(qpos).all())
        if finite:
            self.tool_position[member], self.tool_angles[member], self.qpos[member] = pose[:3], pose[3:], qpos
        return finite

    observations = scene.observations

    def _arrays(self):
        """Return the arrays (E, ...) that belong to the state besides what PyBullet holds."""
        poses = (self.qpos, self.tool_position, self.tool_angles, self.target)
        return (*poses, self.gripper, self.pressed, self.bulb, self.led)

    def get_state(self):
        """Return the state as a list of E dictionaries of numbers and text; `world` is PyBullet's file, compressed."""
        members = []
        for i, world in enumerate(self.worlds):
            arrays = [np.asarray(array[i], dtype=float).tolist() for array in self._arrays()]
            members.append({"world": world.get_state(), "arrays": arrays})
        return members

    def set_state(self, state):
        """Continue from what `get_state` returned. Raises ValueError for a state that is none of this physics."""
        if not all(isinstance(member, dict) and "world" in member for member in state):
            raise ValueError("the state is that of another simulator")
        if len(state) != len(self.worlds):
            raise ValueError(f"the state is that of {len(state)} members, this environment has {len(self.worlds)}")
        for i, member in enumerate(state):
            self.worlds[i].set_state(member["world"])
            for array, values in zip(self._arrays(), member["arrays"], strict=True):
                array[i] = values
