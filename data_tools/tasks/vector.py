"""What all vector environments share: seeds, ends of episodes, resets, infos, states, pictures.

Shapes: E members of a vector environment, n of them; O numbers in an observation, A in an action.
"""

import json
import os
from dataclasses import replace

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode
from gymnasium.vector.utils import batch_space

from data_tools.files import DataError, NotFiniteError, imported

# (E,) bool each. successes: the goal was reached; unstable: the physics diverged; waiting: for a reset.
FLAGS = ("terminations", "truncations", "successes", "unstable", "waiting")


class MemberVectorEnv(gymnasium.vector.VectorEnv):
    """E environments stepped together; member i after `reset(seed=s)` equals a single one after `reset(seed=s + i)`.

    Observations (E, O) float32, actions (E, A) in [-1, 1], rewards (E,) float32; infos in Gymnasium's vector form:
    `is_success`, `unstable` (the physics diverged) and those of the environment, (E,) each.
    A member that ended stays frozen, with reward 0, until `reset(options={"reset_mask": mask})` with mask (E,) bool:
    Gymnasium's AutoresetMode.DISABLED. `flags_stay` until then, too, as in `make_envs`, or an end is told once.

    To make an environment of your own, write three methods: `begin`, `advance`, `observations`. Keep what changes in
    arrays with one row per member and name them in `saved`. `draw` is needed for videos only. tests/toy_walk.py is an
    example of 20 lines.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}
    # Attributes that make up the state, arrays (E, ...), and their types. The `saved` of an environment adds its own.
    saved = {"steps": np.int64, "returns": np.float64, **dict.fromkeys(FLAGS, bool)}
    # Names of the infos, and the attributes (E,) that hold their values.
    info_names = {"is_success": "successes", "unstable": "unstable"}
    flags_stay = False

    def __init_subclass__(cls):
        cls.saved = {**cls.saved, **super(cls, cls).saved}

    def __new__(cls, *arguments, **options):
        envs = super().__new__(cls)
        envs._made_with = arguments, options
        return envs

    def __reduce__(self):
        """For copies, also into other processes: a new one with this state, for physics cannot be copied."""
        state = None if self.rngs is None else self.get_state()
        return _made, (type(self), *self._made_with, state), dict(flags_stay=self.flags_stay)

    def __init__(
        self, num_envs: int, obs_dim: int, action_dim: int, max_episode_steps: int, render_mode: str | None = None
    ):
        """Raises ValueError for arguments out of range."""
        if num_envs < 1 or max_episode_steps < 1:
            raise ValueError(f"num_envs and max_episode_steps must be at least 1, got {num_envs}, {max_episode_steps}")
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode must be None or 'rgb_array', got {render_mode!r}")
        self.num_envs = num_envs
        self.max_episode_steps = max_episode_steps
        self.render_mode = render_mode
        self.metadata = {**self.metadata, "autoreset_mode": AutoresetMode.DISABLED}
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), np.float32)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (action_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.rngs = None  # one generator per member, made by the first reset
        self.steps = np.zeros(num_envs, dtype=np.int64)  # of the episode so far, and of an ended one until its reset
        self.returns = np.zeros(num_envs)  # sum of rewards, as long
        for name in FLAGS:
            setattr(self, name, np.zeros(num_envs, dtype=bool))

    # -------------------------------------------------------------------------------- what an environment has to write

    def begin(self, members: np.ndarray) -> None:
        """Put members (n,) int into a start state. What is random comes from their generators, self.rngs[member]."""
        raise NotImplementedError

    def advance(self, actions: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Apply actions (E, A) float64 in [-1, 1] to the running members, (E,) bool; leave the others as they are.

        Returns rewards (E,) and which members reached their goal in this step, (E,) bool, which ends their episodes;
        0 and False for those that do not run. An episode that ends otherwise: set its member in `self.unstable` (the
        physics diverged), `self.terminations` (no future) or `self.truncations` (it would go on) to True.
        """
        raise NotImplementedError

    def observations(self) -> np.ndarray:
        """Return what the members observe now, (E, O) float32."""
        raise NotImplementedError

    # ---------------------------------------------------------------------------------------- what it may write as well

    def seeded(self, member: int) -> None:
        """Forget what outlives an episode, because the member got a seed."""

    def draw(self, member: int) -> np.ndarray:
        """Return a picture of a member, (height, width, 3) uint8. Raises DataError where OpenGL is missing."""
        raise DataError(f"{type(self).__name__} has no pictures: write its method draw(member).")

    # ----------------------------------------------------------------------------------- Gymnasium's vector environment

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
                needed = f"boolean with shape ({self.num_envs},) and at least one True"
                raise ValueError(f"reset_mask must be {needed}, got {mask!r}")
        if self.rngs is None and not mask.all():
            raise gymnasium.error.ResetNeeded("the first reset must start all members, without reset_mask")
        members = np.flatnonzero(mask)
        # Before anything changes: a seed may be refused
        made = {i: seeding.np_random(seeds[i])[0] for i in members if self.rngs is None or seeds[i] is not None}
        self.rngs = [made.get(i, rng) for i, rng in enumerate(self.rngs or [None] * self.num_envs)]
        for i in made:
            self.seeded(i)
        self.begin(members)
        self.steps[members] = 0
        self.returns[members] = 0
        for name in FLAGS:
            getattr(self, name)[members] = False
        return self._observed(), self.infos(mask)

    def step(self, actions) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Apply one action (E, A) per member. Raises ValueError for a wrong shape, NotFiniteError for NaN."""
        self._check_started("step()")
        actions = checked_action(actions, self.action_space.shape)
        running = ~self.waiting
        rewards, successes = self.advance(actions, running)
        rewards = np.asarray(rewards, dtype=np.float32)
        successes = np.asarray(successes, dtype=bool)
        if rewards.shape != (self.num_envs,) or successes.shape != (self.num_envs,):
            found = f"{rewards.shape} and {successes.shape}"
            raise ValueError(f"advance() must return rewards and successes ({self.num_envs},), they are {found}")
        rewards = np.where(running, rewards, np.float32(0))
        self.steps += running
        self.returns += rewards
        self.successes = np.where(running, successes, self.successes)
        self.terminations = self.terminations | self.successes | self.unstable
        self.truncations = self.truncations | (self.steps >= self.max_episode_steps)
        self.waiting = self.terminations | self.truncations
        everyone = np.ones(self.num_envs, dtype=bool)
        told = running | self.flags_stay
        return self._observed(), rewards, self.terminations & told, self.truncations & told, self.infos(everyone)

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one picture per member, or None without a render mode. Raises DataError where OpenGL is missing."""
        if self.render_mode is None:
            return None
        self._check_started("render()")
        return tuple(self.draw(member) for member in range(self.num_envs))

    def infos(self, mask) -> dict:
        """Return Gymnasium's vector form of the members' infos: values (E,), and under `_key` whose values count."""
        infos = {}
        for key, attribute in self.info_names.items():
            values = getattr(self, attribute)
            infos[key] = np.where(mask, values, np.zeros_like(values))
            infos[f"_{key}"] = mask.copy()
        return infos

    def get_state(self) -> dict[str, list]:
        """Return all that the future depends on, as nested lists of plain values (`torch.load(weights_only=True)`).

        rng: one JSON string per member (its integers exceed 64 bits).
        """
        self._check_started("get_state()")
        state = {name: getattr(self, name).tolist() for name in self.saved}
        return {**state, "rng": [json.dumps(rng.bit_generator.state) for rng in self.rngs]}

    def set_state(self, state: dict[str, list]) -> np.ndarray:
        """Continue exactly where `get_state` was called; return the observations (E, O) of that moment.

        Raises ValueError for a state that does not fit, or with NaN.
        """
        arrays = self.check_state(state)
        rngs = [seeding.np_random(0)[0] for _ in state["rng"]]
        for rng, saved in zip(rngs, state["rng"]):
            rng.bit_generator.state = json.loads(saved)
        for name, array in arrays.items():
            setattr(self, name, array)
        self.rngs = rngs
        return self._observed()

    def check_state(self, state: dict[str, list]) -> dict[str, np.ndarray]:
        """Return the arrays of a state, by `saved`. Raises ValueError for one that does not fit, or with NaN."""
        missing = {"rng", *self.saved} - state.keys()
        if missing:
            raise ValueError(f"the state has no {', '.join(sorted(missing))}: another version of this program saved it")
        arrays = {name: np.array(state[name], dtype=dtype) for name, dtype in self.saved.items()}
        for name, array in arrays.items():
            expected = getattr(self, name).shape
            if array.shape != expected:
                whose = f"{len(array)} members, this environment has {self.num_envs}, or of another task"
                raise ValueError(f"the state is that of {whose}: {name} has shape {array.shape}, expected {expected}")
            if not np.isfinite(array).all():
                raise ValueError(f"{name} of the state contains NaN or infinity")
        if len(state["rng"]) != self.num_envs:
            raise ValueError(f"the state has random numbers for {len(state['rng'])} members, not {self.num_envs}")
        return arrays

    def _observed(self):
        """A copy of the observations: an environment may hand out an array that it goes on to change."""
        observations = np.array(self.observations(), dtype=np.float32)
        expected = self.observation_space.shape
        if observations.shape != expected:
            raise ValueError(f"observations() must have shape {expected}, they have {observations.shape}")
        return observations

    def _check_started(self, what):
        if self.rngs is None:
            raise gymnasium.error.ResetNeeded(f"call reset() before {what}")


class SingleEnv(gymnasium.Env):
    """One environment of any task: a vector of one, without the first axis. See the vector's class for the rest."""

    metadata = MemberVectorEnv.metadata
    _spec = None

    def __init__(self, vector_class: type[MemberVectorEnv] | str, **arguments):
        """`vector_class`: the class of the vector environment, or its name "module:Class"; `arguments`: its others."""
        if isinstance(vector_class, str):
            vector_class = imported(vector_class)
        self.envs = vector_class(num_envs=1, **arguments)
        self.envs.flags_stay = True
        self.metadata = vector_class.metadata
        self.render_mode = self.envs.render_mode
        self.observation_space = self.envs.single_observation_space
        self.action_space = self.envs.single_action_space

    @property
    def spec(self):
        """Gymnasium's, with the time limit, which is kept here: `make` has no need to put its own in front."""
        return self._spec and replace(self._spec, max_episode_steps=self.envs.max_episode_steps)

    @spec.setter
    def spec(self, spec):
        self._spec = spec

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Start an episode; `options` are not used."""
        observations, infos = self.envs.reset(seed=seed)
        self.np_random = self.envs.rngs[0]  # where Gymnasium looks for it
        return observations[0], self._info(infos)

    def step(self, action) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Apply one action (A,). Raises ValueError for a wrong shape, NotFiniteError for NaN."""
        observations, rewards, terminations, truncations, infos = self.envs.step(np.asarray(action)[None])
        ended = bool(terminations[0]), bool(truncations[0])
        return observations[0], float(rewards[0]), *ended, self._info(infos)

    def render(self) -> np.ndarray | None:
        """Return a picture (height, width, 3) uint8, or None without a render mode."""
        frames = self.envs.render()
        return None if frames is None else frames[0]

    def close(self):
        self.envs.close()

    def _info(self, infos):
        """Return the infos of the one member as plain Python values."""
        values = {key: value[0] for key, value in infos.items() if not key.startswith("_")}
        return {key: value.item() if isinstance(value, np.generic) else value for key, value in values.items()}


def _made(vector_class, arguments, options, state):
    envs = vector_class(*arguments, **options)
    if state is not None:
        envs.set_state(state)
    return envs


def several(num_envs: int, vector_class: str, **arguments) -> MemberVectorEnv:
    """The vector environment with the name "module:Class": what `gymnasium.make_vec` calls."""
    return imported(vector_class)(num_envs, **arguments)


def checked_action(action, shape) -> np.ndarray:
    """Return the action(s) as a float64 array in [-1, 1]; ValueError if the shape is wrong, NotFiniteError for NaN."""
    message = f"expected finite numbers of shape {shape} in [-1, 1] as action"
    array = np.asarray(action, dtype=np.float64)
    if array.shape != shape:
        raise ValueError(f"{message}, got shape {array.shape}")
    if not np.isfinite(array).all():
        cure = "if a network made it, lower its learning rate and go on from the last checkpoint (--resume)"
        raise NotFiniteError(f"{message}, got NaN or infinity; {cure}")
    return np.clip(array, -1.0, 1.0)


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
