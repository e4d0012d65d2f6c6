"""The kitchen tasks of SkiMo (https://arxiv.org/abs/2207.07560): a Franka arm, four sub-tasks in a given order.

Dynamics, noise, controller and reward are those of D4RL's FrankaKitchen (https://arxiv.org/abs/2004.07219, after
https://arxiv.org/abs/1910.11956) on current MuJoCo. Model and meshes come from the gymnasium-robotics package, whose
environment class differs (noise, observation, order of sub-tasks) and is not used.
Units: radians, metres, seconds; one environment step is 0.08 s. World frame: x right, y towards the wall, z up.
Shapes: E members of a vector environment, T steps.
"""

import hashlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import mujoco
import numpy as np
import torch

from data_tools.files import DataError
from data_tools.tasks.rendering import Painter
from data_tools.tasks.vector import MemberVectorEnv

MAX_EPISODE_STEPS = 280
PHYSICS_STEPS = 40  # of 0.002 s each, per environment step
STEP_TIME = 0.08  # s
MAX_JOINT_SPEED = 2.0  # rad/s (m/s for the fingers) asked for by an action of 1
UNSTABLE_REWARD = -100.0  # SPiRL's wrapper
COMPLETE_DISTANCE = 0.3

# Observation: arm 0-6, fingers 7-8, knobs and their burners 9-16, light switch and lamp 17-18, slide cabinet 19,
# left and right hinge cabinet 20-21, microwave 22, kettle 23-29 (position, quaternion). Goals as in D4RL.
ELEMENTS = {
    "microwave": ([22], [-0.75]),
    "kettle": ([23, 24, 25, 26, 27, 28, 29], [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]),
    "bottom_burner": ([11, 12], [-0.88, -0.01]),
    "top_burner": ([15, 16], [-0.92, -0.01]),
    "light_switch": ([17, 18], [-0.69, -0.05]),
    "slide_cabinet": ([19], [0.37]),
    "hinge_cabinet": ([20, 21], [0.0, 1.45]),
}
SUBTASKS = {
    "kitchen": ("microwave", "kettle", "bottom_burner", "light_switch"),
    "kitchen-misaligned": ("microwave", "light_switch", "slide_cabinet", "hinge_cabinet"),
}
# fmt: off
INITIAL_QPOS = np.array([  # every episode begins here, at rest
    1.48388023e-01, -1.76848573e00, 1.84390296e00, -2.47685760e00, 2.60252026e-01, 7.12533105e-01, 1.59515394e00,
    4.79267505e-02, 3.71350919e-02,
    -2.66279850e-04, -5.18043486e-05, 3.12877220e-05, -4.51199853e-05, -3.90842156e-06, -4.22629655e-05,
    6.28065475e-05, 4.04984708e-05, 4.62730939e-04, -2.26906415e-04, -4.65501369e-04, -6.44129196e-03,
    -1.77048263e-03, 1.08009684e-03,
    -2.69397440e-01, 3.50383255e-01, 1.61944683e00, 1.00618764e00, 4.06395120e-03, -6.62095997e-03, -2.68278933e-04,
])
# fmt: on
NOISE = 0.1  # D4RL's noise ratio: an observed value is off by up to 0.1 times its amplitude, uniformly
NOISE_AMPLITUDE = np.repeat([0.1, 0.005, 0.0005, 0.005, 0.1, 0.005, 0.1, 0.005], [9, 2, 6, 3, 3, 3, 3, 1])
TARGET_LOW = np.array([-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9, 0.0, 0.0])
TARGET_HIGH = np.array([2.9, 1.8, 2.9, 0.0, 2.9, 3.8, 2.9, 0.04, 0.04])


def elements_complete(obs) -> dict[str, np.ndarray]:
    """Return for each of the seven elements whether it is complete, (...) bool, in observations (..., 30 or 60)."""
    obs = np.asarray(obs)
    return {
        name: np.linalg.norm(obs[..., indices] - goal, axis=-1) < COMPLETE_DISTANCE
        for name, (indices, goal) in ELEMENTS.items()
    }


# -------------------------------------------------------------------------------------------------------------- physics

ASSETS_VERSION = "1.4.2"
ASSETS_HASH = "242d57bfcb92e72cc27edae4ad20b9fd07da8f4e8df9666aafa32ad76ed44114"


@cache
def _model_path():
    """Return the path of the kitchen's MJCF file, whose folder was checked to be the one this port was measured on."""
    package = importlib.util.find_spec("gymnasium_robotics")  # importing it would register its own environments
    cure = f"run `pip install gymnasium-robotics=={ASSETS_VERSION}`"
    if package is None:
        raise DataError(f"The kitchen's model is part of the package gymnasium-robotics, which is missing: {cure}.")
    folder = Path(package.origin).parent / "envs" / "assets" / "kitchen_franka"
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.suffix in (".xml", ".stl"):  # textures do not move anything
            digest.update(file.relative_to(folder).as_posix().encode())
            digest.update(file.read_bytes())
    if digest.hexdigest() != ASSETS_HASH:
        raise DataError(f"The kitchen's model in {folder} is not that of gymnasium-robotics {ASSETS_VERSION}: {cure}.")
    return folder / "kitchen_assets" / "kitchen_env_model.xml"


# Pairs of the arm's links that cannot touch in any pose, though their bounding boxes overlap in most: without this list
# every step of physics compares their meshes.
APART = ((0, 1), (0, 3), (1, 3), (2, 4), (3, 5))


@cache
def compile_model():
    """Return the compiled kitchen, shared by all threads: the package's motion up to rounding, in 2/3 of the time."""
    spec = mujoco.MjSpec.from_file(str(_model_path()))
    for geom in list(spec.geoms):
        # The robot's pedestal collides in the package's model, but not in the original one.
        pedestal = geom.type == mujoco.mjtGeom.mjGEOM_CYLINDER and np.allclose(geom.size[:2], (0.12, 0.9))
        visual = geom.contype == 0 and geom.conaffinity == 0
        if pedestal or (visual and geom.group not in (3, 4, 5)):  # these groups give the bodies their inertia
            spec.delete(geom)
    for first, second in APART:
        spec.add_exclude(bodyname1=f"panda0_link{first}", bodyname2=f"panda0_link{second}")
    # MuJoCo compares bounding boxes of whole bodies before it looks at their geoms. The one of "counters" reaches from
    # the left of the robot to the right, so that the fingers are always inside. What is on the right moves to the
    # empty body "counters1", which is at the same place.
    kept = "type size pos quat fromto group mass density contype conaffinity condim friction solref solimp margin gap"
    for geom in list(spec.body("counters").geoms):
        if geom.pos[0] > 0.0:
            spec.body("counters1").add_geom(**{name: getattr(geom, name) for name in kept.split()})
            spec.delete(geom)
    return spec.compile()


STATE = mujoco.mjtState.mjSTATE_INTEGRATION.value  # all that going on depends on
DIVERGED = [
    kind.value
    for kind in (mujoco.mjtWarning.mjWARN_BADQPOS, mujoco.mjtWarning.mjWARN_BADQVEL, mujoco.mjtWarning.mjWARN_BADQACC)
]


def facts(obs) -> dict:
    """Return what is known of observations (R, 30), for data_tools.formats.check_values: joints have ends."""
    margin = np.repeat([0.5, 0.1], [7, 16])  # the real arm's joints reach farther
    low, high = compile_model().jnt_range[:23].T + [[-1.0], [1.0]] * margin
    names = [f"arm joint {i}" for i in range(7)] + [f"entry {i}, a joint," for i in range(7, 23)]
    known = {name: (obs[:, i], low[i], high[i]) for i, name in enumerate(names)}
    known["entry 25, the kettle's height (no entry is a velocity),"] = (obs[:, 25], 1.3, 2.5)
    known["the length of entries 26-29, the kettle's quaternion,"] = (np.linalg.norm(obs[:, 26:30], axis=1), 0.8, 1.2)
    return known


class Kitchen:
    """One simulated kitchen: D4RL's controller, noise and ordered reward. Any thread may step it, one at a time.

    `state` (S,) float64 is MuJoCo's after the last step; `observed` (30,) float64 the last noisy observation, on which
    controller and reward work; `credited` how many sub-tasks have counted; `unstable` tells that the physics diverged,
    which ends the episode.
    """

    def __init__(self, subtasks, noise=NOISE):
        self.subtasks = subtasks
        self.noise = noise
        self.model = compile_model()
        self.data = mujoco.MjData(self.model)
        self.state = np.empty(mujoco.mj_stateSize(self.model, STATE))

    def reset(self, rng):
        """Start an episode whose noise comes from `rng`."""
        self.rng = rng
        self.unstable = False
        self.credited = 0
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = INITIAL_QPOS
        mujoco.mj_forward(self.model, self.data)
        self._observe()

    def step(self, action):
        """Apply one action (9,) float64 in [-1, 1] for 0.08 s and return the reward."""
        data = self.data
        # D4RL integrates the velocity from what it last *observed*: noise enters the motion.
        target = self.observed[:9] + MAX_JOINT_SPEED * STEP_TIME * action
        data.ctrl[:] = np.minimum(np.maximum(target, TARGET_LOW), TARGET_HIGH)  # np.clip takes twice as long
        mujoco.mj_step(self.model, data, PHYSICS_STEPS)
        # MuJoCo counts a diverged state as a warning and puts the state silently back to zero.
        finite = np.isfinite(data.qpos).all() and np.isfinite(data.qvel).all()
        self.unstable = not finite or data.warning.number[DIVERGED].any()
        if self.unstable:
            self.go_on(self.state, self.observed, self.credited)
            return UNSTABLE_REWARD
        self._observe()
        return self._credit()

    def go_on(self, state, observed, credited):
        """Continue from the attributes of these names."""
        mujoco.mj_resetData(self.model, self.data)  # the warnings, too
        mujoco.mj_setState(self.model, self.data, state, STATE)
        self.state[:] = state
        self.observed = observed
        self.credited = credited

    def _observe(self):
        mujoco.mj_getState(self.model, self.data, self.state, STATE)
        self.observed = self.data.qpos + self.noise * NOISE_AMPLITUDE * self.rng.uniform(-1.0, 1.0, 30)

    def _credit(self):
        """Return how many more sub-tasks count now: each that is complete while all before it are complete."""
        before = self.credited
        for name in self.subtasks[before:]:
            indices, goal = ELEMENTS[name]
            if np.linalg.norm(self.observed[indices] - goal) >= COMPLETE_DISTANCE:
                break
            self.credited += 1
        return float(self.credited - before)


# ------------------------------------------------------------------------------------------------------------ rendering

FRAME_SHAPE = (300, 400, 3)


@cache
def _painter():
    model = mujoco.MjModel.from_xml_path(str(_model_path()))  # with all the visual geometry
    # The file asks for so much that software OpenGL takes seconds per picture. Shadows cost most; only those of the
    # oven's light are needed: a lid over it is how the model switches it off.
    model.vis.quality.shadowsize, model.vis.quality.offsamples = 1024, 4
    model.light_castshadow[:] = np.arange(model.nlight) == model.light("ovenlight").id
    return Painter(model, FRAME_SHAPE, lookat=(-0.2, 0.5, 2.0), distance=2.2, azimuth=70, elevation=-35)


def draw(qpos) -> np.ndarray:
    """Return a picture (300, 400, 3) uint8 of the kitchen with joint positions (30,), e.g. an observation.

    Always call it from the same thread. Raises DataError where OpenGL is missing.
    """
    return _painter()(qpos)  # made when first needed, since most runs draw nothing


# ---------------------------------------------------------------------------------------------------------- environment


class KitchenVectorEnv(MemberVectorEnv):
    """E kitchens: do sub-tasks in the given order within 280 steps of 0.08 s. Resets, infos: see MemberVectorEnv.

    Observation (30,) float32: joint positions of robot (9) and objects (21), with noise.
    Action (9,) in [-1, 1], clipped: joint velocities / 2 rad/s, fingers / 2 m/s.
    Every episode starts in the same state; the seed is that of the noise.
    Reward: the number of sub-tasks credited by this step. The next one (then the one after it, and so on) is credited
    as soon as its element is complete, even if it was moved there earlier; it may be undone later. The episode ends
    when none is left (terminated) or after `max_episode_steps` (truncated).
    `info`: `num_subtasks` credited so far and their names, `subtasks`; `is_success`, all of them; `unstable`, the
    physics diverged: the episode ends (terminated) with reward -100 and the last finite observation.
    `task`: a key of SUBTASKS, or the names of the elements in order. `noise`: 0.1 is D4RL's, 0 switches it off.
    As many threads as torch has step the kitchens; the result does not depend on their number. A step takes a
    millisecond outside Python's lock, so that two threads are 1.8 times as fast as one.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 12.5}
    saved = {"physics": float, "observed": float, "credited": int}
    info_names = {**MemberVectorEnv.info_names, "num_subtasks": "credited"}

    def __init__(
        self,
        num_envs: int = 1,
        task: str | tuple[str, ...] = "kitchen",
        noise: float = NOISE,
        max_episode_steps: int = MAX_EPISODE_STEPS,
        render_mode: str | None = None,
    ):
        """Raises ValueError for arguments out of range, DataError if the kitchen's model is not the known one."""
        super().__init__(num_envs, 30, 9, max_episode_steps, render_mode)
        self.subtasks = SUBTASKS.get(task, ()) if isinstance(task, str) else tuple(task)
        if not self.subtasks or not set(self.subtasks) <= set(ELEMENTS):
            known = f"one of {', '.join(SUBTASKS)} or names of {', '.join(ELEMENTS)}"
            raise ValueError(f"task must be {known}, got {task!r}")
        self.kitchens = [Kitchen(self.subtasks, noise) for _ in range(num_envs)]
        self.physics = np.zeros((num_envs, len(self.kitchens[0].state)))
        self.observed = np.zeros((num_envs, 30))
        self.credited = np.zeros(num_envs, dtype=np.int64)
        self.threads = min(torch.get_num_threads(), num_envs)
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def begin(self, members):
        for i in members:
            self.kitchens[i].reset(self.rngs[i])
            self._read(i)

    def advance(self, actions, running):
        rewards = np.zeros(self.num_envs)
        upcoming = iter(np.flatnonzero(running).tolist())  # shared by the threads: each takes the next member

        def step_members(_):
            for i in upcoming:
                rewards[i] = self.kitchens[i].step(actions[i])
                self._read(i)

        each = self.pool.map if self.pool else map
        list(each(step_members, range(self.threads)))  # list: raise errors here
        return rewards, self.credited == len(self.subtasks)

    def _read(self, member):
        kitchen = self.kitchens[member]
        self.physics[member] = kitchen.state
        self.observed[member] = kitchen.observed
        self.credited[member] = kitchen.credited
        self.unstable[member] = kitchen.unstable

    def observations(self):
        return self.observed.astype(np.float32)  # (E, 30)

    def draw(self, member):
        """Return (300, 400, 3) uint8."""
        return draw(self.kitchens[member].data.qpos)

    def infos(self, mask):
        names = np.full(self.num_envs, None)
        for i in np.flatnonzero(mask):
            names[i] = self.subtasks[: self.credited[i]]
        return {**super().infos(mask), "subtasks": names, "_subtasks": mask.copy()}

    def set_state(self, state):
        observations = super().set_state(state)
        for i, kitchen in enumerate(self.kitchens):
            kitchen.rng = self.rngs[i]
            kitchen.go_on(self.physics[i], self.observed[i].copy(), int(self.credited[i]))
        return observations

    def close_extras(self, **kwargs):
        """Stop the threads."""
        if self.pool is not None:
            self.pool.shutdown()
