"""Are recombined demonstrations true? Replays their actions in the simulator.

python benchmarks/results/studies/kitchen_human/replay_recombined.py DATA.hdf5

An episode starts with the objects as data.recombined() has them; the controller reads the recorded joints. Counted are
sub-tasks that were shown and are done again, and moved objects that stay where they are (within .1 in every entry).
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT))
import data_tools
from data_tools.tasks import kitchen

data = data_tools.load_dataset("kitchen", data=sys.argv[1])
both = data.recombined(data_tools.TASKS["kitchen"].objects)
obs = both.observations.double().numpy()
actions = both.actions.numpy()
start_qpos = kitchen.INITIAL_QPOS


def replay(episode):
    first = int(both.episode_starts[episode])
    path = obs[first : first + int(both.episode_lengths[episode])]
    sim = kitchen.Kitchen(kitchen.SUBTASKS["kitchen"])
    sim.reset(np.random.default_rng(1))
    sim.data.qpos[:9] = start_qpos[:9]
    sim.data.qpos[9:] = np.where(np.abs(path[0, 9:] - start_qpos[9:]) > 0.05, path[0, 9:], start_qpos[9:])
    reached = []
    for t in range(len(path) - 1):
        sim.observed = path[t].copy()
        sim.step(actions[first + t])
        reached.append(sim.data.qpos.copy())
    return path, np.array(reached)


M = len(data.episode_starts)
shown = again = again_recombined = moved = 0
stayed = {name: [0, 0] for name in kitchen.ELEMENTS}
for episode in range(M):
    path, reached = replay(episode)
    other_path, other_reached = replay(M + episode)
    recorded = kitchen.elements_complete(path)
    for name, (indices, _) in kitchen.ELEMENTS.items():
        if recorded[name].any() and not recorded[name][:5].any():
            shown += 1
            again += kitchen.elements_complete(reached)[name].any()
            again_recombined += kitchen.elements_complete(other_reached)[name].any()
        elif np.abs(other_path[0, indices] - path[0, indices]).max() > 0.1:
            stayed[name][1] += 1
            stayed[name][0] += np.abs(other_reached[:, indices] - other_path[0, indices]).max() < 0.1
print(f"{M} episodes, {shown} sub-tasks shown")
print(f"done again in a replay: as recorded {again}, recombined {again_recombined}")
print("moved objects that stay:", ", ".join(f"{name} {n} of {total}" for name, (n, total) in stayed.items()))
