"""What the vector environments of maze, kitchen and CALVIN share: seeds, ends of episodes, resets, infos and states.

Shapes: E members of a vector environment, n of them.
"""

import json
import os
from typing import ClassVar

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from data_tools.files import NotFiniteError

FLAGS = ("terminations", "truncations", "successes", "unstable", "waiting")


class MemberVectorEnv(gymnasium.vector.VectorEnv):
    """E environments stepped together; member i after `reset(seed=s)` equals the single one after `reset(seed=s + i)`.

    Observations (E, O) float32, actions (E, A), rewards (E,) float32; infos in Gymnasium's vector form: `is_success`,
    `unstable` (the physics diverged) and those of the environment, (E,) each.
    A member that ended is reset as Gymnasium's `autoreset_mode` says: by the next step (NEXT_STEP), by the same step
    with `info["final_obs"]`, `info["final_info"]` (SAME_STEP), or never (DISABLED): then it stays frozen, with reward 0
    and its flags True, until `reset(options={"reset_mask": mask})` with mask (E,) bool.

    An environment adds its physics: `_begin`, `_advance`, `_observations`, `_get_physics`, `_set_physics`.
    """

    # Arrays (E, ...) that are saved beside the physics, each the attribute of that name after an underscore.
    saved: ClassVar[dict] = {"steps": np.int64, **dict.fromkeys(FLAGS, bool)}
    # The infos, and the attributes that hold their values.
    info_names: ClassVar[dict] = {"is_success": "_successes", "unstable": "_unstable"}

    def __init__(self, observation_space, action_space, num_envs, max_episode_steps, render_mode, autoreset_mode):
        """The spaces are those of one member. Raises ValueError for arguments out of range."""
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        check_render_mode(render_mode)
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self.autoreset_mode = AutoresetMode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_observation_space = observation_space
        self.single_action_space = action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self._rngs = None  # one generator per member, made by the first reset
        self._steps = np.zeros(num_envs, dtype=np.int64)
        # Waiting: the episode ended and the member was not reset yet.
        self._terminations, self._truncations, self._successes, self._unstable, self._waiting = np.zeros(
            (len(FLAGS), num_envs), dtype=bool
        )

    def _begin(self, members):
        """Put members (n,) int into a start state drawn from their generators."""
        raise NotImplementedError

    def _seeded(self, member):
        """Forget what outlives an episode, because the member got a seed."""

    def _advance(self, actions, running):
        """Apply the actions (E, A) to the running members, (E,) bool; leave the others as they are.

        Returns rewards (E,) float32, which members reached their goal and which diverged, (E,) bool: not the others.
        """
        raise NotImplementedError

    def _observations(self):
        """Return the observations (E, O) float32."""
        raise NotImplementedError

    def _get_physics(self):
        """Return the state of the physics as nested lists, one row per member."""
        raise NotImplementedError

    def _set_physics(self, state):
        """Continue from what `_get_physics` returned. Raises ValueError for a state of other physics."""
        raise NotImplementedError

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start new episodes, of all members or of those in `options["reset_mask"]` (E,) bool.

        A seed s gives member i the seed s + i; without a seed each member continues its own random stream.
        """
        if seed is None or isinstance(seed, int | np.integer):
            seeds = [None if seed is None else int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"expected one seed per member ({self.num_envs}), got {len(seeds)}")
        mask = np.ones(self.num_envs, dtype=bool)
        if options is not None and "reset_mask" in options:
            mask = np.asarray(options["reset_mask"])
            if mask.shape != (self.num_envs,) or mask.dtype != bool or not mask.any():
                raise ValueError(
                    f"reset_mask must be boolean with shape ({self.num_envs},) and at least one True, got {mask!r}"
                )
        if self._rngs is None and not mask.all():
            raise gymnasium.error.ResetNeeded("the first reset must start all members, without reset_mask")
        if self._rngs is None:
            self._rngs = [None] * self.num_envs
        for i in np.flatnonzero(mask):
            if self._rngs[i] is None or seeds[i] is not None:
                self._rngs[i] = seeding.np_random(seeds[i])[0]
                self._seeded(i)
        self._start_episodes(mask)
        return self._observations(), self._infos(mask)

    def step(self, actions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Apply one action (E, A) per member. Raises ValueError for a wrong shape or NaN."""
        self._check_started("step()")
        actions = checked_action(actions, self.action_space.shape)
        running = ~self._waiting
        rewards, successes, unstable = self._advance(actions, running)
        self._steps += running
        # A member that waits keeps its flags (DISABLED) or is reset below (NEXT_STEP).
        self._successes = np.where(running, successes, self._successes)
        self._unstable = np.where(running, unstable, self._unstable)
        self._terminations = np.where(running, successes | unstable, self._terminations)
        self._truncations = np.where(running, self._steps >= self.max_episode_steps, self._truncations)

        if self.autoreset_mode == AutoresetMode.NEXT_STEP:
            self._start_episodes(self._waiting)
        done = self._terminations | self._truncations
        terminations, truncations = self._terminations.copy(), self._truncations.copy()
        everyone = np.ones(self.num_envs, dtype=bool)
        infos = {}
        self._waiting = done
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            observations = self._observations()
            for i in np.flatnonzero(done):
                final_obs[i] = observations[i]
            infos = {"final_obs": final_obs, "_final_obs": done.copy()}
            infos |= {"final_info": self._infos(done), "_final_info": done.copy()}
            self._start_episodes(done)
        return self._observations(), rewards, terminations, truncations, infos | self._infos(everyone)

    def get_state(self) -> dict[str, list]:
        """Return all that the future depends on, as nested lists of plain values (`torch.load(weights_only=True)`).

        rng: one JSON string per member (its integers exceed 64 bits).
        """
        self._check_started("get_state()")
        arrays = {name: getattr(self, f"_{name}").tolist() for name in self.saved}
        return {"physics": self._get_physics(), **arrays, "rng": [rng_state(rng) for rng in self._rngs]}

    def set_state(self, state: dict[str, list]) -> np.ndarray:
        """Continue exactly where `get_state` was called; return the observations (E, O) of that moment.

        Raises ValueError for a state of another environment, or with NaN.
        """
        self._set_physics(state["physics"])
        for name, dtype in self.saved.items():
            setattr(self, f"_{name}", np.array(state[name], dtype=dtype))
        self._rngs = [rng_from_state(saved) for saved in state["rng"]]
        return self._observations()

    def _check_started(self, what):
        if self._rngs is None:
            raise gymnasium.error.ResetNeeded(f"call reset() before {what}")

    def _start_episodes(self, mask):
        """Reset the members in mask (E,) bool."""
        members = np.flatnonzero(mask)
        if len(members) == 0:
            return
        self._begin(members)
        self._steps[members] = 0
        for name in FLAGS:
            getattr(self, f"_{name}")[members] = False

    def _infos(self, mask):
        """Return Gymnasium's vector form of the members' infos: values (E,), and under `_key` whose values count."""
        infos = {}
        for key, attribute in self.info_names.items():
            values = getattr(self, attribute)
            infos[key] = np.where(mask, values, np.zeros_like(values))
            infos[f"_{key}"] = mask.copy()
        return infos


def checked_action(action, shape) -> np.ndarray:
    """Return the action(s) as a float64 array in [-1, 1]; ValueError if the shape is wrong, NotFiniteError for NaN."""
    message = f"expected finite numbers of shape {shape} in [-1, 1] as action"
    try:
        array = np.asarray(action, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{message}, got {type(action).__name__}: {error}") from error
    if array.shape != shape:
        raise ValueError(f"{message}, got shape {array.shape}")
    if not np.isfinite(array).all():
        cure = "if a network made it, lower its learning rate and go on from the last checkpoint (--resume)"
        raise NotFiniteError(f"{message}, got NaN or infinity; {cure}")
    return np.clip(array, -1.0, 1.0)


def check_render_mode(render_mode) -> None:
    """Raise ValueError for a render mode that is none."""
    if render_mode not in (None, "rgb_array"):
        raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")


def rng_state(rng) -> str:
    """Return the state of a generator as JSON."""
    return json.dumps(rng.bit_generator.state)


def rng_from_state(state: str) -> np.random.Generator:
    """Return a generator that continues where `rng_state` was called."""
    rng = seeding.np_random(0)[0]
    rng.bit_generator.state = json.loads(state)
    return rng


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
