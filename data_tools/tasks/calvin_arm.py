"""The arm of the CALVIN task: its limits, rotations, and Bullet's inverse kinematics for E arms at once.

The rotations are not SciPy's, which go through quaternions: their last bits differ, and with them every trajectory.
"""

import mujoco
import numpy as np
from mujoco.batch import Batch

from data_tools.tasks.calvin_scene import ARM, HOME, arm_model

JOINT_LOW = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])  # rad
JOINT_HIGH = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])  # rad
MOTOR_FORCE = 200.0  # N m, N for the fingers when they close
OPENING_FORCE = 4.0  # N: twice the original's, for a finger of ours has .1 kg of armature beside its .1 kg of mass
SUBSTEPS = 8  # steps of physics per step


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


class InverseKinematics:
    """Bullet's damped least squares for E arms at once, with CALVIN's settings.

    Bullet makes up to 20 updates dq = J^T (J J^T + 0.36 I)^-1 (e - J n) + n, with e the error of the tool's pose (6)
    and n = 0.001 (home - q), which pulls towards the home pose. The damping is heavy: near the edge of reach the tool
    visibly stays behind its target, and that belongs to the task.
    Here J and n are kept for 5, 5 and 10 updates, so that only the error is iterated: with P = 0.36 (J J^T + 0.36 I)^-1
    an update turns e into P (e - J n). The result is within 0.011 rad of Bullet's, on average less than 0.0016.
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
        axis = self.axis
        arm = self.tool[:, None] - self.anchor  # (E, 7, 3)
        # The cross product axis x arm; np.cross takes five times as long.
        self.jacobian[:, :, 0] = axis[:, :, 1] * arm[:, :, 2] - axis[:, :, 2] * arm[:, :, 1]
        self.jacobian[:, :, 1] = axis[:, :, 2] * arm[:, :, 0] - axis[:, :, 0] * arm[:, :, 2]
        self.jacobian[:, :, 2] = axis[:, :, 0] * arm[:, :, 1] - axis[:, :, 1] * arm[:, :, 0]
        self.jacobian[:, :, 3:] = axis
        self.error[:, :3, 0] = position - self.tool
        self.error[:, 3:, 0] = _rotation_vector(rotation @ self.tool_matrix.transpose(0, 2, 1))
