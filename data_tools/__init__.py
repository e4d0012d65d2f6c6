"""Tasks and offline data of SkiMo (https://arxiv.org/abs/2207.07560). All facts about a task are in TASKS, below.

A task of your own is one new file (copy tests/toy_walk.py) and one new entry in TASKS. The import registers the tasks
with Gymnasium, too: `gymnasium.make("skimo/KitchenMisaligned-v0")` gives one environment, `make_envs` several.
"""

import importlib
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import gymnasium
import numpy as np

from data_tools.augment import code_of, perturb, recombined
from data_tools.dataset import OfflineDataset, made_once
from data_tools.files import DataError, cache_dir, imported, write_atomically
from data_tools.runs import check_settings, command_line, cut_curves, read_state, saved_run, stop_event
from data_tools.tasks.vector import MemberVectorEnv
from data_tools.tasks.video import VideoRecorder
from data_tools.threads import fastest_threads

__all__ = ["TASKS", "DataError", "OfflineDataset", "Task", "cache_dir", "code_of", "env_sizes", "load_dataset"]
__all__ += ["check_settings", "command_line", "cut_curves", "fastest_threads", "make_envs", "perturb", "read_state"]
__all__ += ["recombined", "saved_run", "stop_event", "write_atomically"]


@dataclass(frozen=True)
class Task:
    """All facts about a task. A "module:name" is imported when it is needed, so that importing data_tools is quick."""

    envs: str  # "module:Class" of the vector environment, a MemberVectorEnv
    max_return: float  # of an episode in which everything was done; infinity: unknown, then success is 0
    env_kwargs: dict = field(default_factory=dict)  # of the vector environment
    obs_scale: tuple[float, ...] | None = None  # (O,): networks see obs * obs_scale + obs_shift; None: obs as it is
    obs_shift: tuple[float, ...] | None = None
    data: str | None = None  # name of the offline data, in file names; None: the task's own
    collect: str | None = None  # "module:function" of (noise, seed, progress) that makes scripted data
    noise: float = 0.0  # size of the disturbances in scripted data
    download: str | None = None  # "module:function" of (folder, progress): the path of published data, fetched once
    release: str | None = None  # Google Drive's id of the data of the authors' release, which are {data}.gz there
    facts: str | None = None  # "module:function" of observations (R, O): what -> (values (n,), lowest, highest)
    objects: tuple[tuple[int, ...], ...] = ()  # entries of an observation that belong to each object
    data_obs_dim: int | None = None  # numbers in the observations of data that append something, which is cut off
    draw_map: str | None = None  # "module:function" of (axes): a map, on which an observation is at (obs[1], obs[0])
    position_periods: tuple[tuple[float, ...], ...] = ()  # of sines and cosines, a row for each of the first entries
    arm: tuple[int, float] | None = None  # joints that observations and actions begin with; rad asked by an action of 1

    def __post_init__(self):
        for name in ("obs_scale", "obs_shift"):  # NumPy's numbers would make networks' inputs float64
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(map(float, value)))
        periods = np.array(self.position_periods) if len(self.position_periods) else np.zeros((0, 0))
        object.__setattr__(self, "position_periods", periods)

    def success(self, returns) -> float:
        """Share of episodes, by their returns, in which everything was done."""
        reached = np.asarray(returns) >= self.max_return - 1e-5 * abs(self.max_return)  # rewards are float32
        return float(reached.mean()) if len(returns) else 0.0


class Tasks(dict):
    """Tasks by name. What is registered with Gymnasium, as Name-v0 or module:Name-v0, is a task as well."""

    def __missing__(self, env_id: str) -> Task:
        """Raises DataError for an unknown name."""
        module, _, name = env_id.rpartition(":")
        try:
            if module:
                importlib.import_module(module)
            solved = gymnasium.spec(name).reward_threshold
        except (gymnasium.error.Error, ImportError) as error:
            known = f"known tasks: {', '.join(self)}, and what is registered with Gymnasium"
            raise DataError(f"there is no task {env_id!r}; {known} ({error}).") from error
        max_return = np.inf if solved is None else solved
        return Task("data_tools.tasks.gym:GymVectorEnv", max_return, env_kwargs=dict(env_id=env_id))


TASKS = Tasks(
    maze=Task(
        envs="data_tools.tasks.maze:MazeVectorEnv",
        max_return=100.0,
        obs_scale=(1 / 40, 1 / 40, 1 / 10, 1 / 10),
        obs_shift=(-0.5, -0.5, 0.0, 0.0),
        collect="data_tools.scripted.maze:collect",
        noise=0.5,
        data="maze",
        release="1GWo8Vr8Xqj7CfJs7TaDsUA6ELno4grKJ",
        facts="data_tools.tasks.maze:facts",
        position_periods=((1.0, 2.0, 4.0, 8.0, 16.0, 32.0),) * 2,  # in cells
        draw_map="data_tools.tasks.maze:draw_maze",
    ),
    kitchen=Task(
        envs="data_tools.tasks.kitchen:KitchenVectorEnv",
        env_kwargs={"task": "kitchen"},
        max_return=4.0,
        data="kitchen",
        collect="data_tools.scripted.kitchen:collect",
        noise=0.05,
        download="data_tools.formats.d4rl:fetch_kitchen",
        release="1Fym9prOt5Cu_I73F20cdd3lXZPhrvEsd",
        facts="data_tools.tasks.kitchen:facts",
        objects=((11, 12), (15, 16), (17, 18), (19,), (20, 21), (22,), tuple(range(23, 30))),
        data_obs_dim=60,  # with the goal, which is constant
        # Arm joints in rad, fingers in m
        position_periods=((0.25, 0.5, 1.0, 2.0, 4.0),) * 7 + ((0.025, 0.05, 0.1, 0.2, 0.4),) * 2,
        arm=(7, 0.16),
    ),
    calvin=Task(
        envs="data_tools.tasks.calvin:CalvinVectorEnv",
        max_return=400.0,
        collect="data_tools.scripted.calvin:collect",
        noise=0.25,
        data="calvin",
        release="1g4ONf_3cNQtrZAo2uFa_t5MOopSr2DNY",
        facts="data_tools.tasks.calvin:facts",
        # Tool in m; angles, grip, joints in rad
        position_periods=((0.0625, 0.125, 0.25, 0.5, 1.0),) * 3 + ((0.25, 0.5, 1.0, 2.0, 4.0),) * 11,
        data_obs_dim=39,  # with the blocks
    ),
)
TASKS["kitchen-misaligned"] = replace(TASKS["kitchen"], env_kwargs={"task": "kitchen-misaligned"})
# Held out: harder, with the same data and pre-trained models. Never used to choose a setting, see benchmarks/suites.py.
SIX = "microwave", "kettle", "bottom_burner", "light_switch", "slide_cabinet", "hinge_cabinet"
TASKS["kitchen-6"] = replace(TASKS["kitchen"], max_return=6.0, env_kwargs={"task": SIX, "max_episode_steps": 420})
TASKS["maze-far"] = replace(TASKS["maze"], env_kwargs={"far": True}, draw_map="data_tools.tasks.maze:draw_far_maze")
SIX = "drawer", "bulb", "slider", "led", "slider_back", "drawer_shut"
TASKS["calvin-6"] = replace(TASKS["calvin"], max_return=600.0, env_kwargs={"order": SIX, "max_episode_steps": 540})


def make_envs(env_id: str, num_envs: int, video: Path | None = None) -> MemberVectorEnv | VideoRecorder:
    """E environments of a task stepped as one; a member freezes when its episode ends, until it is reset by mask.

    With `video`, the first member's episode is recorded into that MP4 file when the environments are closed.
    """
    task = TASKS[env_id]
    envs = imported(task.envs)(num_envs, **task.env_kwargs, **(dict(render_mode="rgb_array") if video else {}))
    if not isinstance(envs, MemberVectorEnv):
        raise DataError(f"{task.envs} is no MemberVectorEnv: see `Your own task` in data_tools/README.md.")
    envs.flags_stay = True
    return VideoRecorder(envs, video) if video else envs


def env_sizes(env_id: str) -> tuple[int, int]:
    """Numbers in an observation and in an action, O and A."""
    envs = make_envs(env_id, 1)
    envs.close()
    return envs.single_observation_space.shape[0], envs.single_action_space.shape[0]


def load_dataset(
    env_id: str,
    data_dir=None,
    data="scripted",
    share: float = 1.0,
    noise: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> OfflineDataset:
    """Return the offline data of a task. Raises DataError.

    data: "scripted": made on first use, then kept in `cache_dir(data_dir)`; "d4rl", "release": published data, from the
    cache or the network; else a file or folder in one of the formats of data_tools.formats.
    share: of the episodes, see OfflineDataset.share.
    noise: size of the disturbances in scripted data (None: the task's), seed: their random seed; progress: show bars.
    """
    from data_tools import formats  # not needed for tasks alone

    if not 0 < share <= 1:  # before data are made or fetched
        raise DataError(f"--data-share {share} does not work: give more than 0, at most 1.")
    task = TASKS[env_id]
    sizes = env_sizes(env_id)
    read = partial(formats.read_data, obs_dim=sizes[0], action_dim=sizes[1], data_obs_dim=task.data_obs_dim)
    read = partial(read, progress=progress, facts=imported(task.facts) if task.facts else None)
    if data == "d4rl":
        if task.download is None:
            raise DataError(f"D4RL has no data for {env_id}: use --data scripted.")
        data = imported(task.download)(cache_dir(data_dir), progress)
    if data == "release":
        if task.release is None:
            raise DataError(f"the SkiMo release has no data for {env_id}: use --data scripted.")
        data = formats.fetch_release(task.release, cache_dir(data_dir) / f"{task.data}.gz", read, progress)
    if data != "scripted":
        return read(data).share(share)
    if task.collect is None:
        raise DataError(f"{env_id} has no scripted data: give a file with --data PATH.")
    noise = task.noise if noise is None else noise
    path = cache_dir(data_dir) / f"{task.data or env_id}_noise{float(noise)}_seed{seed}_v1.hdf5"
    scripted = made_once(path, lambda: imported(task.collect)(noise=noise, seed=seed, progress=progress))
    found = scripted.observations.shape[1], scripted.actions.shape[1]
    if found not in (sizes, (task.data_obs_dim, sizes[1])):
        raise DataError(f"{path} has {found} numbers per observation and action, {env_id} {sizes}: delete the file.")
    return scripted.narrowed(sizes[0]).share(share)


for name, task in TASKS.items():  # as skimo/Maze-v0, skimo/KitchenMisaligned-v0, ...
    # The environments truncate by themselves: with `max_episode_steps` here, `make` would add a second time limit.
    gymnasium.register(
        id=f"skimo/{name.title().replace('-', '')}-v0",
        entry_point="data_tools.tasks.vector:SingleEnv",
        vector_entry_point="data_tools.tasks.vector:several",
        kwargs=dict(vector_class=task.envs, **task.env_kwargs),
    )
