"""Scripted demonstrations for the kitchen tasks: an arm that follows way-points, is disturbed and corrects itself.

The paper learns from 603 episodes of people's tele-operation (D4RL's kitchen-mixed). These are their stand-in where
that file cannot be had: the sets of sub-tasks that people demonstrated, in D4RL's layout, with variation in plan, pace,
way-points and actions. They lack people's detours, other grasps and idle stretches; label results as "scripted data".
Units and frame as in tasks/kitchen.py. Shapes: T steps; a position (3,) is that of the tip of the hand.
"""

import os
import pickle
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import mujoco
import numpy as np
from tqdm import tqdm

from data_tools.dataset import OfflineDataset
from data_tools.files import DataError, write_atomically
from data_tools.scripted import attributes_of, stream
from data_tools.tasks import kitchen as scene
from data_tools.tasks.vector import num_cores

NUM_EPISODES = 603  # paper, section 4.1

# The planned sets of sub-tasks of the real demonstrations (folders of relay-policy-learning's tele-operation logs), in
# the order in which people did them (but the top burner here comes before the bottom one, people's after it): an open
# hinge door is in the arm's way, hence last. Left out is {microwave, light switch, slide cabinet, hinge
# cabinet}, which would be the misaligned task itself. The letters are the elements' first ones; mbls stands twice.
PLANS = (
    "kbsh kbls klsh ktbs ktls kblh ktbh ktbl ktlh mbsh mbls mbls mkbh "
    "mkbs mksh mkls mkth mktl mklh mtbh mtbs mtbl mtlh tbls tbsh"
).split()
LETTERS = {name[0]: name for name in scene.ELEMENTS}

# Position actuators and force limits of the arm's seven joints. A joint goes 1 - exp(-0.08 KP / DAMPING) = 1 / LEAD of
# the way to its target in a step (half for the first four joints), so its target has to lie LEAD times as far away.
KP = np.repeat([870.0, 120.0], [4, 3])  # N m / rad
DAMPING = np.repeat([100.0, 10.0], [4, 3])  # N m s / rad
MAX_TORQUE = np.repeat([87.0, 12.0], [4, 3])  # N m
LEAD = 1 / (1 - np.exp(-scene.STEP_TIME * KP / DAMPING))


def _rotation(pitch, yaw):
    """Return the hand's orientation (3, 3): columns side, spread of the fingers, approach.

    Pitch 0, yaw 0 points at the wall; negative pitch points down, positive yaw to the left.
    """
    spread = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    approach = np.append(np.cos(pitch) * np.array([-np.sin(yaw), np.cos(yaw)]), np.sin(pitch))
    return np.stack([np.cross(spread, approach), spread, approach], axis=1)


def _rotation_vector(rotation):
    """Return axis times angle (3,) of a rotation (3, 3) by less than pi."""
    twice = rotation - rotation.T
    vector = np.array([twice[2, 1], twice[0, 2], twice[1, 0]])
    sine = np.linalg.norm(vector) / 2
    return vector / 2 if sine < 1e-9 else vector / (2 * sine) * np.arctan2(sine, (np.trace(rotation) - 1) / 2)


class _Kinematics:
    """Where the tip of the hand is, and which joint positions put it where. The tip is 1 cm before the fingers' end."""

    def __init__(self):
        self.model = scene.compile_model()
        self.data = mujoco.MjData(self.model)
        self.link = self.model.body("panda0_link7").id
        self.low = np.maximum(self.model.jnt_range[:7, 0], scene.TARGET_LOW[:7]) + 0.02
        self.high = np.minimum(self.model.jnt_range[:7, 1], scene.TARGET_HIGH[:7]) - 0.02
        self.data.qpos[:] = scene.INITIAL_QPOS
        mujoco.mj_kinematics(self.model, self.data)
        site = self.data.site("end_effector").xmat.reshape(3, 3)
        self.hand = self.data.xmat[self.link].reshape(3, 3).T @ site  # from link 7 to the hand

    def tip(self, joints):
        """Return position (3,) and orientation (3, 3) of the tip for joint positions (7,)."""
        self.data.qpos[:7] = joints
        mujoco.mj_kinematics(self.model, self.data)
        link = self.data.xmat[self.link].reshape(3, 3)
        return self.data.xpos[self.link] + link @ (0.0, 0.0, 0.25), link @ self.hand

    def approach(self, joints, position, angles, iterations, rotation_weight=0.15, posture_gain=0.0):
        """Return joint positions (7,) that bring the tip closer to `position` (3,) and `angles` (pitch, yaw).

        Damped least squares. `posture_gain` draws the elbow towards its initial position, as far as the tip allows.
        """
        weights = np.repeat([1.0, rotation_weight], 3)
        jacobian = np.zeros((6, self.model.nv))
        goal = _rotation(*angles)
        for _ in range(iterations):
            tip, rotation = self.tip(joints)
            mujoco.mj_comPos(self.model, self.data)
            mujoco.mj_jac(self.model, self.data, jacobian[:3], jacobian[3:], tip, self.link)
            weighted = jacobian[:, :7] * weights[:, None]
            error = np.concatenate([position - tip, _rotation_vector(goal @ rotation.T)])
            if np.linalg.norm(error[:3]) < 1e-4 and np.linalg.norm(error[3:]) < 1e-3:
                break
            step = weighted.T @ np.linalg.solve(weighted @ weighted.T + 0.02**2 * np.eye(6), weights * error)
            if posture_gain:
                null_space = np.eye(7) - np.linalg.pinv(jacobian[:, :7]) @ jacobian[:, :7]
                step += posture_gain * null_space @ (scene.INITIAL_QPOS[:7] - joints)
            step *= min(1.0, 0.15 / np.abs(step).max())
            joints = np.clip(joints + step, self.low, self.high)
        return joints


class _TimeIsUp(Exception):
    """The demonstration has reached its longest permitted length."""


class _Demonstrator:
    """Moves one kitchen's arm and keeps what it observed and did.

    It sees the true state, where a person would see the scene; its action removes the noise of the last observation,
    as the actions of people do, who steer by what the arm really does. `noise` disturbs the actions (`act`); all
    movements start from where the arm is, and so correct what the noise did to it.
    """

    def __init__(self, kitchen, kinematics, rng, noise, longest):
        self.kitchen = kitchen
        self.kinematics = kinematics
        self.rng = rng
        self.noise = noise
        self.longest = longest
        self.speed = 1.0
        self.angles = np.array([0.05, 0.05])  # pitch and yaw of the hand
        self.grip = 0.04  # distance of each finger from the middle
        self.disturbance = np.zeros(9)
        self.observations = [kitchen.observed]
        self.actions = []

    @property
    def qpos(self):
        return self.kitchen.data.qpos

    @property
    def joints(self):
        return self.qpos[:7].copy()

    @property
    def tip(self):
        return self.kinematics.tip(self.joints)[0]

    def act(self, joints, grip):
        """Do the step that brings the joints (7,) as close to the given positions as one step can."""
        if len(self.actions) == self.longest:
            raise _TimeIsUp
        sag = self.kitchen.data.qfrc_bias[:7] / KP  # gravity's
        target = np.append(self.joints + LEAD * (joints - self.joints) + sag, [grip, grip])
        # An Ornstein-Uhlenbeck process: a hand that wanders, rather than one that trembles. Fingers are spared.
        self.disturbance[:7] += -0.3 * self.disturbance[:7] + self.noise * self.rng.normal(size=7)
        action = (target - self.kitchen.observed[:9]) / (scene.MAX_JOINT_SPEED * scene.STEP_TIME) + self.disturbance
        action = np.clip(action, -1.0, 1.0).astype(np.float32)  # as stored
        self.kitchen.step(action.astype(np.float64))
        self.actions.append(action)
        self.observations.append(self.kitchen.observed)
        self.grip = grip

    def joint_limits(self):
        """Return how far each joint (7,) may go in a step: faster ones would fall behind and bend the tip's path."""
        bias = np.abs(self.kitchen.data.qfrc_bias[:7])
        torque = np.maximum(MAX_TORQUE - bias, 0.3 * MAX_TORQUE)
        return self.speed * np.minimum(0.15 / LEAD, 0.92 * scene.STEP_TIME * torque / DAMPING)

    def hold(self, steps, grip):
        """Keep the arm still while the fingers open or close."""
        joints = self.joints
        for _ in range(steps):
            self.act(joints, grip)

    def go(self, position, angles, grip):
        """Move in joint space to where the tip is near `position` (give or take 6 mm)."""
        position = np.array(position) + 0.006 * self.rng.normal(size=3)
        # From the initial pose, which keeps the elbow on its side
        goal = self.kinematics.approach(scene.INITIAL_QPOS[:7], position, angles, 150, 0.3, posture_gain=0.05)
        start = self.joints
        steps = max(1, int(np.ceil((np.abs(goal - start) / self.joint_limits()).max())))
        for step in range(1, steps + 1):
            self.act(start + (goal - start) * step / steps, grip)
        for _ in range(4):
            if np.abs(self.joints - goal).max() < 0.03:
                break
            self.act(goal, grip)
        self.angles = np.array(angles)

    def line(self, position, angles=None, grip=0.0, pace=0.03, tolerance=0.02, wait=3, until=lambda: False):
        """Move the tip on a straight line to `position`, at most `pace` per step, or until `until()`.

        The whole path slows down where a joint would exceed its limit, and halts while the arm is held up. At its end
        the arm gets `wait` steps to come within `tolerance`.
        """
        start = self.tip
        start_angles = self.angles
        change = np.array(position) - start
        turn = np.zeros(2) if angles is None else np.array(angles) - start_angles
        pace = 1 / max(1.0, np.linalg.norm(change) / (pace * self.speed), np.abs(turn).max() / 0.15)
        joints = self.joints
        progress = 0.0
        overtime = 0
        for step in range(1, 42):
            limits = self.joint_limits()
            held_up = (np.abs(joints - self.joints) / limits).max() > 1.5
            if not held_up:
                advance = min(pace, 1 - progress)
                for _ in range(3):
                    there = progress + advance
                    ahead = self.kinematics.approach(joints, start + there * change, start_angles + there * turn, 3)
                    excess = (np.abs(ahead - joints) / limits).max()
                    if excess <= 1.0:
                        break
                    advance *= max(0.2, 0.95 / excess)
                joints = ahead
                progress = there
            arrived = progress >= 1 - 1e-6
            overtime += arrived
            self.act(joints, grip)
            if until() or overtime > wait or (arrived and np.linalg.norm(self.tip - position) < tolerance):
                break
            if held_up and step > 1 / pace + 8:
                break
        self.angles = start_angles + progress * turn

    def servo(self, aim, until, steps, push, grip=0.0):
        """Aim the tip at `aim()`, a position and angles ahead of the object it pushes or pulls, until `until()`.

        The force grows with the lead and nothing winds up: a grasp that slips is simply aimed again. `push` limits the
        step, in units of `joint_limits`.
        """
        for _ in range(steps):
            position, self.angles = aim()
            joints = self.joints
            step = self.kinematics.approach(joints, position, self.angles, 4) - joints
            self.act(joints + step * min(1.0, push / (np.abs(step) / self.joint_limits()).max()), grip)
            if until():
                break


def _on_circle(centre, point, angle):
    """Return `point` (3,) turned by `angle` about the vertical axis through `centre` (3,)."""
    x, y, _ = np.subtract(point, centre)
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array([centre[0] + cosine * x - sine * y, centre[1] + sine * x + cosine * y, point[2]])


def _ahead(yaw):
    """Return the horizontal unit vector (3,) in which the hand points."""
    return np.array([-np.sin(yaw), np.cos(yaw), 0.0])


def _do_microwave(arm):
    """Grasp the bar and pull the door round its hinge; the servo aims 0.13 rad further open than the door is."""
    handle, hinge, pitch, yaw = np.array([-0.642, 0.493, 1.80]), (-1.128, 0.455, 1.80), -0.4, 0.25

    def aim():
        angle = arm.qpos[22] - 0.13
        turned = yaw + 0.35 * angle
        return _on_circle(hinge, handle, angle) + 0.032 * _ahead(turned), (pitch, turned)

    arm.go(handle - 0.11 * _ahead(yaw), (pitch, yaw), grip=0.04)
    arm.line(handle + 0.032 * _ahead(yaw), grip=0.04, tolerance=0.015)
    arm.hold(3, grip=0.0)
    arm.servo(aim, lambda: arm.qpos[22] < -0.74, steps=28, push=1.8)
    arm.hold(3, grip=0.04)
    arm.line(arm.tip - 0.09 * _ahead(arm.angles[1]) + (0.02, 0.0, 0.03), grip=0.04, pace=0.04, wait=1)


def _do_kettle(arm):
    """Push the kettle to the back burner, low (it tips otherwise) and with open fingers, which are two contacts."""
    x, y = arm.qpos[23:25]
    arm.go((x, y - 0.23, 1.73), (-0.45, -0.3), grip=0.04)
    arm.line((x, y - 0.17, 1.70), grip=0.04)
    arm.line((-0.235, 0.60, 1.70), (-0.6, -0.3), grip=0.04, pace=0.035, until=lambda: arm.qpos[24] > 0.72)
    arm.line(arm.tip + (0.0, -0.12, 0.06), grip=0.04, pace=0.045, wait=0)


def _do_knob(arm, height, index):
    """Push the upper half of the knob's bar from the left, on a circle 0.6 rad ahead of the knob."""

    def beside(angle, y, gap):  # of the bar, turned clockwise by angle
        cosine, sine = np.cos(angle), np.sin(angle)
        return np.array([-0.256 + 0.04 * sine - gap * cosine, y, height + 0.04 * cosine + gap * sine])

    def aim():
        return beside(min(1.3, max(0.0, -arm.qpos[index]) + 0.6), 0.63, 0.024), (-0.3, -0.1)

    left = np.array([0.012, 0.0, 0.0])
    arm.go(beside(-0.1, 0.52, 0.032) - left, (-0.3, -0.1), grip=0.0)
    arm.line(beside(-0.1, 0.63, 0.032) - left, tolerance=0.012)
    arm.servo(aim, lambda: arm.qpos[index] < -0.86, steps=30, push=2.5)
    x, _, z = arm.tip
    arm.line((x, 0.52, z), pace=0.045, wait=0)


def _do_light_switch(arm):
    """Push the lever to the left, aiming 3.6 cm right of where its tip is half a radian further on."""

    def aim():
        angle = max(-0.95, arm.qpos[17] - 0.5)
        lever = -0.40 + 0.0315 * np.cos(angle) + 0.075 * np.sin(angle)
        return np.array([lever + 0.036, 0.612, 2.28]), (-0.4, 0.0)

    arm.go((-0.315, 0.52, 2.28), (-0.4, 0.0), grip=0.0)
    arm.line((-0.315, 0.61, 2.28), tolerance=0.012)
    arm.servo(aim, lambda: arm.qpos[17] < -0.66, steps=18, push=2.0)
    x, _, z = arm.tip
    arm.line((x + 0.01, 0.51, z), pace=0.045, wait=0)


def _do_slide_cabinet(arm):
    """Push the bar to the right from behind it."""
    arm.go((-0.185, 0.54, 2.55), (-0.3, 0.0), grip=0.0)
    arm.line((-0.185, 0.645, 2.55), tolerance=0.015)
    arm.line((0.23, 0.645, 2.55), (-0.3, -0.3), pace=0.04, until=lambda: arm.qpos[19] > 0.36)
    x, _, z = arm.tip
    arm.line((x - 0.01, 0.53, z), pace=0.045, wait=0)


def _do_hinge_cabinet(arm):
    """Grasp the bar, pull the door round its hinge, and leave to a place from where other objects can be reached."""
    handle, hinge, pitch, yaw = np.array([-0.526, 0.583, 2.58]), (-0.224, 0.71, 2.58), -0.05, 0.2

    def aim():
        angle = arm.qpos[21] + 0.2
        turned = yaw - 0.3 * angle
        return _on_circle(hinge, handle, angle) + 0.03 * _ahead(turned), (pitch, turned)

    arm.go(handle - 0.11 * _ahead(yaw), (pitch, yaw), grip=0.04)
    arm.line(handle + 0.03 * _ahead(yaw), grip=0.04, tolerance=0.015)
    arm.hold(3, grip=0.0)
    arm.servo(aim, lambda: arm.qpos[21] > 1.42, steps=34, push=1.8)
    arm.hold(3, grip=0.04)
    arm.line(arm.tip - 0.10 * _ahead(arm.angles[1]), grip=0.04, pace=0.04, wait=1)
    arm.line((-0.34, 0.20, 2.45), (-0.2, 0.0), grip=0.02, pace=0.05, tolerance=0.05, wait=0)


SKILLS = {
    "microwave": _do_microwave,
    "kettle": _do_kettle,
    "bottom_burner": partial(_do_knob, height=2.226, index=11),
    "top_burner": partial(_do_knob, height=2.34, index=15),
    "light_switch": _do_light_switch,
    "slide_cabinet": _do_slide_cabinet,
    "hinge_cabinet": _do_hinge_cabinet,
}


_kinematics = cache(_Kinematics)


def _demonstrate(subtasks, rng, noise, longest=scene.MAX_EPISODE_STEPS):
    """Do the sub-tasks in order: return obs (T + 1, 30) float64, actions (T, 9) float32, number credited in order."""
    simulation = scene.Kitchen(subtasks)
    simulation.reset(rng.spawn(1)[0])
    arm = _Demonstrator(simulation, _kinematics(), rng, noise, longest)
    pace = rng.uniform(0.85, 1.0)
    try:
        for name in subtasks:
            arm.speed = pace * rng.uniform(0.92, 1.05)
            if rng.random() < 0.25:  # hesitate
                arm.hold(int(rng.integers(1, 5)), arm.grip)
            SKILLS[name](arm)
            indices, goal = scene.ELEMENTS[name]
            if np.linalg.norm(arm.qpos[indices] - goal) > 0.25 and len(arm.actions) < longest - 30:
                SKILLS[name](arm)  # once more, like people
    except _TimeIsUp:
        pass
    return np.array(arm.observations), np.array(arm.actions), simulation.credited


def plan(seed, episode):
    """Return the sub-tasks of a demonstration in order, and the generator for all else that varies in it."""
    rng = stream(seed, episode)
    deal, place = divmod(episode, len(PLANS))  # each set of sub-tasks once, shuffled, and again
    shuffled = np.random.default_rng([seed, deal]).permutation(len(PLANS))
    letters = list(PLANS[shuffled[place]])
    if rng.random() < 0.15:
        i = rng.integers(2 if letters[-1] == "h" else 3)
        letters[i], letters[i + 1] = letters[i + 1], letters[i]
    if rng.random() < 0.05:
        letters.pop()
    return tuple(LETTERS[letter] for letter in letters), rng


def _episode(seed, episode, noise):
    """Return obs (T + 1, 30) float32, actions (T, 9) float32 and whether all was done, of one demonstration."""
    subtasks, rng = plan(seed, episode)
    obs, actions, num_done = _demonstrate(subtasks, rng, noise)
    return obs.astype(np.float32), actions, num_done == len(subtasks)


# -------------------------------------------------------------------------------------------------------- offline data


def _worker(seed, first, end, step, noise):
    """Make every `step`-th episode from `first` on and send each to `_make_episodes` in the parent process."""
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # anything printed must not get into the data
    for episode in range(first, end, step):
        pickle.dump(_episode(seed, episode, noise), channel)
        channel.flush()


def _make_episodes(num_episodes, noise, seed, num_workers, progress):
    """Return [_episode(seed, 0, noise), _episode(seed, 1, noise), ...], made by `num_workers` processes."""
    bar = tqdm(range(num_episodes), desc="kitchen demonstrations", unit="episode", disable=not progress)
    if num_workers == 1:
        return [_episode(seed, i, noise) for i in bar]
    # Threads would wait for Python's lock half of the time. Plain processes rather than multiprocessing: those would
    # copy a process with running threads (fork) or run the caller's script again (spawn).
    paths = [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    options = dict(stdout=subprocess.PIPE, env=environment, start_new_session=True)  # Ctrl-C is for this process alone
    workers = []
    try:
        for first in range(num_workers):
            call = f"_worker({seed}, {first}, {num_episodes}, {num_workers}, {float(noise)!r})"
            code = f"from data_tools.scripted.kitchen import _worker; {call}"
            workers.append(subprocess.Popen([sys.executable, "-c", code], **options))
        return [pickle.load(workers[i % num_workers].stdout) for i in bar]
    except (EOFError, pickle.UnpicklingError) as error:
        raise DataError("A process that makes kitchen demonstrations ended early; see its message.") from error
    finally:
        for worker in workers:  # all have ended, unless something went wrong
            worker.kill()
            worker.wait()
            worker.stdout.close()


def collect(
    num_episodes: int = NUM_EPISODES,
    noise: float = 0.05,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> OfflineDataset:
    """Make demonstrations of the planned sets of three or four sub-tasks, at most 280 steps each.

    `noise`: standard deviation of what each step adds to the disturbance of the actions (which fades by 30 % per step:
    its own deviation is 1.4 times that). `num_workers` processes (None: one per core); the result depends on
    `num_episodes`, `noise` and `seed` only. Observations (60,) with the Kitchen task's goal block, as in D4RL's file.
    An episode's last row has `terminals` if all was done as planned, else `timeouts`.
    Raises DataError for arguments without meaning.
    """
    attributes = attributes_of(__name__, num_episodes, noise, seed)
    num_workers = min(num_workers or num_cores(), num_episodes)
    goal = np.zeros(30)  # D4RL's goal block
    for indices, values in map(scene.ELEMENTS.get, scene.SUBTASKS["kitchen"]):
        goal[indices] = values
    episodes = []
    for obs, actions, done in _make_episodes(num_episodes, noise, seed, num_workers, progress):
        episodes.append((np.concatenate([obs, np.tile(goal, (len(obs), 1))], axis=1), actions, done))
    return OfflineDataset.from_episodes(episodes, attributes)


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Return the figures by which kitchen data are compared: lengths in steps, shares in [0, 1].

    `has X`: episodes in which element X was complete at some time. `all of TASK`: episodes in which all sub-tasks of a
    target task were, in any order; zero in the scripted data. For scripted data also `X as planned`,
    the share of success among the episodes that were to do X, and `all as planned`.
    """
    starts, lengths = dataset.episode_starts.cpu().numpy(), dataset.episode_lengths.cpu().numpy()
    actions = np.abs(dataset.actions.cpu().numpy())
    complete = scene.elements_complete(dataset.observations.cpu().numpy())  # (R,) each
    has = {name: np.logical_or.reduceat(done, starts) for name, done in complete.items()}  # (M,) each
    figures = {
        "episodes": len(starts),
        "rows": int(lengths.sum()),
        "mean length": float(lengths.mean()),
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
        "mean |a|": float(actions.mean()),
        "saturated share": float((actions >= 0.99).mean()),
        "elements per episode": float(sum(has.values()).mean()),
    }
    figures |= {f"has {name}": float(done.mean()) for name, done in has.items()}
    for task, names in scene.SUBTASKS.items():
        figures[f"all of {task}"] = int(np.logical_and.reduce([has[name] for name in names]).sum())
    if "data_tools" in str(dataset.attributes.get("generator")):
        plans = [plan(dataset.attributes["seed"], i)[0] for i in range(len(starts))]
        for name, done in has.items():
            planned = np.array([name in names for names in plans])
            figures[f"{name} as planned"] = float(done[planned].mean()) if planned.any() else float("nan")
        figures["all as planned"] = float(np.mean([all(has[name][i] for name in plans[i]) for i in range(len(plans))]))
    return figures


def expert(num_episodes: int, noise: float, seed: int, task, max_episode_steps: int = scene.MAX_EPISODE_STEPS):
    """Return returns (N,) and lengths (N,) of the demonstrating arm on a task, a key of SUBTASKS or elements."""
    returns = np.zeros(num_episodes)
    lengths = np.zeros(num_episodes)
    for i in tqdm(range(num_episodes), desc=f"expert on {task}", unit="episode"):
        rng = np.random.default_rng(seed + i)
        _, actions, returns[i] = _demonstrate(scene.SUBTASKS.get(task, task), rng, noise, max_episode_steps)
        lengths[i] = len(actions)
    return returns, lengths


def plot(dataset: OfflineDataset, path) -> None:
    """Write the first episode of the data as a video file in real time. Raises DataError where OpenGL is missing."""
    import imageio.v2 as imageio  # ffmpeg is started only for videos

    observations = dataset.observations[: int(dataset.episode_lengths[0]), :30].cpu().numpy()
    frames = [scene.draw(obs) for obs in tqdm(observations, desc="pictures", unit="step")]
    fps = scene.KitchenVectorEnv.metadata["render_fps"]
    write_atomically(path, lambda part: imageio.mimwrite(part, frames, fps=fps, macro_block_size=1))
