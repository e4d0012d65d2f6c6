"""The offline data of CALVIN: play recorded by scripts (calvin_play.py) on the table of data_tools.tasks.calvin.

Shapes: E trajectories recorded together, T steps.
"""

import itertools

import numpy as np
from tqdm import tqdm

from data_tools.dataset import OfflineDataset
from data_tools.files import DataError, write_atomically
from data_tools.scripted import attributes_of, calvin_play, stream
from data_tools.tasks.calvin import BULB, DRAWER, GRIPPER, LED, SLIDE, SUBTASKS, SWITCH, CalvinVectorEnv, Physics, draw
from data_tools.tasks.calvin_scene import BLOCKS
from data_tools.tasks.vector import num_cores

NUM_EPISODES = 1239  # paper, section 4.1
LOCKSTEP = 32  # trajectories recorded together
MAX_SKIPPED = 100  # attempts, and as many as trajectories


def view_of(physics, member):
    """Return what a script sees of a member."""
    blocks = physics.qpos[member, BLOCKS].reshape(3, 7).copy()
    return calvin_play.View(physics.observations()[member], physics.target[member].copy(), blocks)


def begin(physics, member, rng):
    """Put a member into the start state of an attempt."""
    fixtures, led = calvin_play.draw_fixtures(rng)
    physics.gripper[member] = calvin_play.OPEN
    physics.reset(np.array([member]), [rng], fixtures[None])
    physics.led[member] = led


def _script(view, rng, noise, rows):
    """Play, and append (obs (21,), action (7,)) to rows once the warm-up is over."""
    view = yield from calvin_play.warm_up(view, rng)
    player = calvin_play.play(view, rng, noise)
    action = next(player)
    while True:
        # Applied as stored (float32), so that the file can be replayed.
        action = action.astype(np.float32)
        rows.append((view.obs.astype(np.float32), action))
        view = yield action
        action = player.send(view)


def _record(physics, seed, attempts, noise, bar):
    """Yield (attempt, rows) of the attempts (iterable of int), in any order; None for rows if its physics diverge.

    An attempt depends on seed, noise and its number alone. `bar` counts the steps.
    """
    waiting = iter(attempts)
    num_envs = len(physics.state)
    at_work = {}  # member -> attempt, rows so far, script
    actions = np.zeros((num_envs, 7))
    while True:
        for member in range(num_envs):
            if member not in at_work and (attempt := next(waiting, None)) is not None:
                rng = stream(seed, attempt)
                begin(physics, member, rng)
                rows = []
                script = _script(view_of(physics, member), rng, noise, rows)
                actions[member] = next(script)
                at_work[member] = attempt, rows, script
        if not at_work:
            return
        members = sorted(at_work)
        unstable = physics.step(actions, np.array(members) if len(members) < num_envs else None)
        for member in members:
            attempt, rows, script = at_work[member]
            bar.update(len(rows) > 0)
            if unstable[member] or len(rows) == calvin_play.TRAJECTORY_STEPS:
                del at_work[member]
                yield attempt, None if unstable[member] else rows
            else:
                actions[member] = script.send(view_of(physics, member))


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
    num_episodes: int = NUM_EPISODES,
    noise: float = 0.25,
    seed: int = 0,
    num_workers: int | None = None,
    progress: bool = True,
) -> OfflineDataset:
    """Record scripted play: trajectories of 490 steps, each of about a dozen behaviours in random order.

    `noise` is the greatest standard deviation of the disturbances of an action (calvin_play.follow); each behaviour has
    its own, uniform from 0. `num_workers` threads step the physics (None: one per core that this process may use); the
    result depends on `num_episodes`, `noise` and `seed` only. The data must not contain the task: an attempt in
    which the four sub-tasks happen in their order is left out, and the next one takes its place.
    `attributes["skipped"]` lists the attempts left out. Raises DataError for arguments without meaning.
    """
    attributes = attributes_of(__name__, num_episodes, noise, seed)
    physics = Physics(min(LOCKSTEP, num_episodes), num_workers or num_cores())
    kept = {}
    skipped = []
    first = 0
    total = num_episodes * calvin_play.TRAJECTORY_STEPS
    with tqdm(total=total, desc="calvin play", unit="step", unit_scale=True, disable=not progress) as bar:
        while len(kept) < num_episodes:
            missing = num_episodes - len(kept)
            for attempt, rows in _record(physics, seed, range(first, first + missing), noise, bar):
                observations, actions = (np.array(part) for part in zip(*rows)) if rows else (None, None)
                if rows is None or _does_the_task(observations):
                    skipped.append(attempt)
                    bar.total += calvin_play.TRAJECTORY_STEPS  # another takes its place
                else:
                    kept[attempt] = observations, actions, False
            first += missing
            if len(skipped) > MAX_SKIPPED + num_episodes:
                raise DataError(f"Recording with noise {noise} fails too often: use less --noise.")
    episodes = [kept[attempt] for attempt in sorted(kept)]
    return OfflineDataset.from_episodes(episodes, attributes | {"skipped": sorted(skipped)})


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

    `mean NAME` and `std NAME` of the entries of an observation, here and in the real data; how often a sub-task happens
    per trajectory; the share of pairs of successive sub-tasks, or of their opposites, that are NAME and NEXT; in how
    many trajectories the four sub-tasks happen in their order.
    """
    observations = dataset.observations.cpu().numpy()
    lengths = dataset.episode_lengths.tolist()
    figures = {"trajectories": len(lengths), "rows": len(observations), "mean length": float(np.mean(lengths))}
    for name, (entry, mean, std) in REAL_DATA.items():
        values = observations[:, entry].astype(np.float64)
        figures |= {f"mean {name}": float(values.mean()), f"std {name}": float(values.std())}
        figures |= {f"real mean {name}": mean, f"real std {name}": std}
    count, pairs, num_pairs, in_order = np.zeros(4), np.zeros(3), 0, 0
    for obs in np.split(observations, dataset.episode_starts[1:].tolist()):
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
    for name, number in zip(SUBTASKS, count / len(lengths), strict=True):
        figures[f"{name} per trajectory"] = float(number)
    for k in range(3):
        figures[f"{SUBTASKS[k]} then {SUBTASKS[k + 1]}, of pairs"] = float(pairs[k] / max(num_pairs, 1))
    return figures | {"all four in order": in_order}


def expert(num_episodes: int, noise: float = 0.0, seed: int = 0, **env_kwargs) -> tuple[np.ndarray, np.ndarray]:
    """Return returns (N,) and lengths (N,) of the scripted expert, which knows no noise; seeds seed, seed + 1, ..."""
    envs = CalvinVectorEnv(num_episodes, **env_kwargs)
    envs.reset(seed=seed)
    scripts = [calvin_play.expert(view_of(envs.physics, i)) for i in range(num_episodes)]
    actions = np.stack([next(script) for script in scripts])
    while not envs.waiting.all():
        envs.step(actions)
        for i in np.flatnonzero(~envs.waiting):
            actions[i] = scripts[i].send(view_of(envs.physics, i))
    return envs.returns, envs.steps


def plot(dataset: OfflineDataset, path) -> None:
    """Draw the scene and the tool's paths, from above and from the side, into the image file `path`.

    Raises DataError where OpenGL is missing.
    """
    from matplotlib.figure import Figure  # only plots need matplotlib; no pyplot, so no display either

    physics = Physics(1, 1)
    physics.reset(np.array([0]), [np.random.default_rng(0)], np.array([[0.14, 0.1, 0.0, 0.05]]))
    scene = draw(physics.qpos[0], bulb=True, led=True)
    figure = Figure(figsize=(14, 5), layout="constrained")
    picture, above, side = figure.subplots(1, 3, width_ratios=(1, 1.35, 1))
    picture.imshow(scene)
    picture.set(xticks=[], yticks=[], title="the scene")
    paths = np.split(dataset.observations[:, :3].cpu().numpy(), dataset.episode_starts[1:].tolist())
    chosen = np.unique(np.linspace(0, len(paths) - 1, 40).astype(int))
    for i in chosen:
        x, y, z = paths[i].T
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
    above.set(title=f"tool, {len(chosen)} of {len(paths)} trajectories, from above", xlabel="x (m)", ylabel="y (m)")
    side.set(title="from the side", xlabel="y (m)", ylabel="z (m)")
    above.set_aspect("equal")
    side.set_aspect("equal")
    write_atomically(path, lambda part: figure.savefig(part, dpi=110))
