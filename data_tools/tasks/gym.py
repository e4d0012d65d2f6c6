"""Environments that are registered with Gymnasium, as tasks: `--env-id Pendulum-v1`."""

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from data_tools.files import DataError
from data_tools.tasks.vector import MemberVectorEnv


class GymVectorEnv(MemberVectorEnv):
    """E environments of Gymnasium, flat Box observations (O,) and actions (A,); ours in [-1, 1] become theirs.

    A saved state is the seed of an episode and its actions so far: `set_state` plays them again. So nothing may outlive
    an episode, and all random numbers must come from its seed.
    """

    saved = {"seeds": np.int64, "actions": np.float64}

    def __init__(
        self, num_envs: int, env_id: str, max_episode_steps: int | None = None, render_mode: str | None = None
    ):
        """Raises DataError for an environment that cannot be made, or used here."""
        options = dict(max_episode_steps=max_episode_steps)
        if render_mode:  # not every class takes one
            options["render_mode"] = render_mode
        try:
            self.envs = [gymnasium.make(env_id, **options) for _ in range(num_envs)]
        except (gymnasium.error.Error, ImportError) as error:
            raise DataError(f"{env_id} cannot be made: {error}") from error
        first = self.envs[0]
        obs, action, limit = first.observation_space, first.action_space, first.spec.max_episode_steps
        if not isinstance(obs, Box) or len(obs.shape) != 1:
            raise DataError(f"{env_id} observes {obs}, not a flat Box: register it with FlattenObservation around it.")
        flat = isinstance(action, Box) and len(action.shape) == 1
        if not flat or not action.is_bounded() or action.dtype.kind != "f":  # integers would be cut off
            raise DataError(f"{env_id} takes actions in {action}: only a flat Box of floats with bounds can be used.")
        if limit is None:
            raise DataError(f"{env_id} has no time limit: register it with max_episode_steps.")
        super().__init__(num_envs, *obs.shape, *action.shape, limit, render_mode)
        self.metadata["render_fps"] = first.metadata.get("render_fps", 30)
        self.low, self.high = action.low, action.high
        self.obs = np.zeros((num_envs, *obs.shape), dtype=np.float32)
        self.seeds = np.zeros(num_envs, dtype=np.int64)  # of the episodes
        self.actions = np.zeros((num_envs, limit, *action.shape))  # of the episodes so far, then zeros

    def begin(self, members):
        for i in members:
            self.seeds[i] = self.rngs[i].integers(2**31)
            self.actions[i] = 0
            self.obs[i], _ = self.envs[i].reset(seed=int(self.seeds[i]))

    def advance(self, actions, running):
        rewards = np.zeros(self.num_envs)
        for i in np.flatnonzero(running):
            self.actions[i, self.steps[i]] = actions[i]
            self.obs[i], rewards[i], self.terminations[i], self.truncations[i], _ = self._step(i, actions[i])
        return rewards, np.zeros(self.num_envs, dtype=bool)

    def _step(self, member, action):
        scaled = self.low + (self.high - self.low) * (action + 1) / 2
        return self.envs[member].step(np.clip(scaled, self.low, self.high).astype(self.low.dtype))

    def observations(self):
        return self.obs

    def set_state(self, state):
        super().set_state(state)
        for i, env in enumerate(self.envs):
            self.obs[i], _ = env.reset(seed=int(self.seeds[i]))
            rewards = 0.0
            for action in self.actions[i, : self.steps[i]]:
                self.obs[i], reward, *_ = self._step(i, action)
                rewards += float(np.float32(reward))
            if rewards != self.returns[i]:
                name = env.spec.id
                print(f"warning: {name} does not repeat an episode by its seed: the resumed run differs.", flush=True)
        return self._observed()

    def draw(self, member):
        try:
            return self.envs[member].render()
        except gymnasium.error.Error as error:
            raise DataError(f"{self.envs[member].spec.id} has no pictures: {error}") from error

    def close_extras(self, **kwargs):
        for env in self.envs:
            env.close()
