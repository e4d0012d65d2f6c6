"""The maze's offline data: trajectories between random cells, by a planner and a way-point controller.

Rules and numbers are those of SPiRL's public script. Shapes: B trajectories of a chunk, T steps, W way-points.
"""

import itertools
from functools import cache

import numpy as np
from tqdm import tqdm

from data_tools.dataset import OfflineDataset
from data_tools.files import write_atomically
from data_tools.scripted import attributes_of, stream
from data_tools.tasks.maze import Physics, draw_maze, geodesic_distance, make_layout

NUM_EPISODES = 3046  # paper, section 4.1
MAX_TRAJECTORY_STEPS = 500  # cap of the public collector when it also records images, as for the published data
MIN_TRAJECTORY_STEPS = 50  # shorter (or equal) ones are dropped
MAX_WAYPOINTS = 100
MOVES = np.array([(0, 0), (0, -1), (0, 1), (-1, 0), (1, 0)])  # the planner's actions; the first of equals is taken
CHUNK = 128  # trajectories simulated together


@cache
def _policy(goal):
    """Return the planner's move (index into MOVES) in each cell on the way to cell `goal`, (42, 42) int.

    SPiRL's script runs 200 Q-iterations (discount 0.99, reward 1 in the goal cell). Values then depend on the path
    length alone, exactly, so their greedy policy is the first move that shortens the path; no-op if there is none.
    """
    layout = make_layout()
    distance = geodesic_distance(layout, goal)
    after = []  # distance after each move; bumping into a wall keeps the place
    for row, column in MOVES:
        blocked = np.roll(layout, (-row, -column), axis=(0, 1))
        after.append(np.where(blocked, distance, np.roll(distance, (-row, -column), axis=(0, 1))))
    return np.argmin(after, axis=0)


def _plan(seed, attempt):
    """Draw start and way-points of one trajectory: state (5,), way-points (W, 2), generator for its action noise."""
    rng = stream(seed, attempt)
    free = np.argwhere(~make_layout())
    start, goal = free[rng.integers(len(free), size=2)]
    state = np.zeros(5)
    state[1:3] = start + rng.uniform(-0.1, 0.1, 2)
    state[3:5] = rng.normal(0.0, 0.1, 2)
    cell = start
    cells = []
    while len(cells) < MAX_WAYPOINTS and tuple(cell) != tuple(goal):
        cell = cell + MOVES[_policy(tuple(goal))[tuple(cell)]]
        cells.append(cell)
    waypoints = np.array(cells, dtype=np.float64).reshape(-1, 2)
    # On average half of the way to the centre of the free space, which is at c - 0.2; the goal cell is not shifted.
    shift = 0.2 * rng.uniform(0.0, 1.0, waypoints.shape)
    shift[np.all(waypoints == goal, axis=1)] = 0.0
    return state, waypoints - shift, rng


def _simulate(physics, seed, attempts, noise):
    """Follow the way-points of the given attempts together; return [(obs (T, 4), actions (T, 2), reached), ...]."""
    plans = [_plan(seed, attempt) for attempt in attempts]
    size = len(plans)
    state = np.stack([plan[0] for plan in plans])  # (B, 5)
    num_waypoints = np.array([len(plan[1]) for plan in plans])
    waypoints = np.zeros((size, MAX_WAYPOINTS, 2))
    for i, plan in enumerate(plans):
        waypoints[i, : num_waypoints[i]] = plan[1]
    noises = noise * np.stack([plan[2].normal(size=(MAX_TRAJECTORY_STEPS, 2)) for plan in plans])

    observations = np.zeros((size, MAX_TRAJECTORY_STEPS, 4), dtype=np.float32)
    actions = np.zeros((size, MAX_TRAJECTORY_STEPS, 2), dtype=np.float32)
    lengths = np.full(size, MAX_TRAJECTORY_STEPS)
    reached = num_waypoints == 0  # started in the goal cell: an empty trajectory
    lengths[reached] = 0
    current = np.zeros(size, dtype=int)
    for t in range(MAX_TRAJECTORY_STEPS + 1):
        # The public script also asks for a move of less than 0.1 in the last step, which holds at any legal speed.
        near = np.square(waypoints[np.arange(size), current] - state[:, 1:3]).sum(axis=1) < 0.1**2
        arrived = near & (current == num_waypoints - 1) & ~reached
        reached |= arrived
        lengths[arrived] = t
        current += near & ~reached
        running = np.flatnonzero(~reached)
        if t == MAX_TRAJECTORY_STEPS or len(running) == 0:
            break
        position, velocity = state[running, 1:3], state[running, 3:5]
        action = np.clip(10.0 * (waypoints[running, current[running]] - position) - velocity, -1.0, 1.0)
        action = np.clip(action + noises[running, t], -1.0, 1.0)
        # Two decimals as in SPiRL's public roll-outs; applied as stored (float32), so that the file can be replayed.
        actions[running, t] = np.round(action, 2)
        observations[running, t] = state[running, 1:]
        state[running] = physics.step(state[running], actions[running, t])
    return [(observations[i, :n], actions[i, :n], bool(reached[i])) for i, n in enumerate(lengths)]


def collect(
    num_episodes: int = NUM_EPISODES, noise: float = 0.5, seed: int = 0, progress: bool = True
) -> OfflineDataset:
    """Collect trajectories between random cells with a planner and a way-point controller (SPiRL's script).

    `noise` is the standard deviation of Gaussian action noise (then clipped); without it the data show no recovery and
    skills learned from them drift into walls. A trajectory has 51..500 steps. Its last row has `terminals` if it
    reached its last way-point, else `timeouts`. The last way-point is the goal, except where start or goal is the
    sealed cell (16, 20), as in four trajectories of the default data. Raises DataError for arguments without meaning.
    """
    attributes = attributes_of(__name__, num_episodes, noise, seed)
    # Chunks in lockstep, not processes or threads: 3,046 trajectories take 15 s on one core, and a script that calls
    # this needs no `__main__` guard and may already have started torch's threads.
    physics = Physics()
    kept = []
    with tqdm(total=num_episodes, desc="maze trajectories", unit="traj", disable=not progress) as bar:
        for first in itertools.count(step=CHUNK):
            for trajectory in _simulate(physics, seed, range(first, first + CHUNK), noise):
                if len(trajectory[1]) > MIN_TRAJECTORY_STEPS and len(kept) < num_episodes:
                    kept.append(trajectory)
                    bar.update()
            if len(kept) == num_episodes:
                break
    return OfflineDataset.from_episodes(kept, attributes)


def statistics(dataset: OfflineDataset) -> dict[str, float]:
    """Return the figures by which maze data are compared: lengths in steps, speed in cells / s, shares in [0, 1]."""
    lengths = dataset.episode_lengths.cpu().numpy()
    actions = dataset.actions.cpu().numpy()
    velocity = dataset.observations[:, 2:].cpu().numpy()
    return {
        "trajectories": len(lengths),
        "rows": int(lengths.sum()),
        "mean length": float(lengths.mean()),
        "shortest": int(lengths.min()),
        "share at cap": float((lengths == MAX_TRAJECTORY_STEPS).mean()),
        "mean |a|": float(np.abs(actions).mean()),
        "saturated share": float((np.abs(actions) >= 0.995).mean()),
        "mean speed": float(np.hypot(velocity[:, 0], velocity[:, 1]).mean()),
    }


def plot(dataset: OfflineDataset, path) -> None:
    """Draw evenly chosen trajectories into the image file `path`."""
    from matplotlib.figure import Figure  # only plots need matplotlib; no pyplot, so no display either

    figure = Figure(figsize=(8, 8.6), layout="constrained")
    ax = figure.subplots()
    draw_maze(ax)
    paths = np.split(dataset.observations[:, :2].cpu().numpy(), dataset.episode_starts[1:].tolist())
    chosen = np.unique(np.linspace(0, len(paths) - 1, 60).astype(int))
    for rows in [paths[i] for i in chosen]:
        (line,) = ax.plot(rows[:, 1], rows[:, 0], linewidth=1.2, alpha=0.8)
        ax.plot(rows[0, 1], rows[0, 0], ".", color=line.get_color(), markersize=7)
    ax.set_title(f"{len(chosen)} of {len(paths)} maze trajectories (dots: starts)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    write_atomically(path, lambda part: figure.savefig(part, dpi=120))
