"""What people's demonstrations of the Kitchen hold: the noise in their actions, and the order of sub-tasks.

    python benchmarks/results/studies/kitchen_human/data_facts.py kitchen_human.hdf5

Noise: second differences of observed joints and of actions take the motion out. If an action is relative to the
observed joint, noise included, the slope of one on the other is -1 / 0.16 = -6.25.
"""

import collections
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))
from data_tools.tasks import kitchen

with h5py.File(sys.argv[1]) as file:
    obs = file["observations"][:, :30].astype(float)
    actions = file["actions"][:].astype(float)
    ends = np.flatnonzero(file["timeouts"][:]) + 1
episodes = [slice(start, end) for start, end in zip([0, *ends], ends)]


def roughness(x):
    return x[1:-1] - (x[:-2] + x[2:]) / 2


joints = np.concatenate([roughness(obs[rows, :9]) for rows in episodes])
asked = np.concatenate([roughness(actions[rows]) for rows in episodes])
slope = (joints * asked).sum(0) / (joints**2).sum(0)
print("slope of actions on the joints' noise, joints and fingers:", slope.round(2))

orders = []
for rows in episodes:
    done = {name: flags for name, flags in kitchen.elements_complete(obs[rows]).items() if flags.any()}
    orders.append(sorted(done, key=lambda name, done=done: done[name].argmax()))
print("begin with the microwave:", sum(order[:1] == ["microwave"] for order in orders), "of", len(orders))
pair = [order for order in orders if order[:2] == ["microwave", "kettle"]]
third = collections.Counter(order[2] if len(order) > 2 else "nothing" for order in pair)
print(f"after microwave, kettle ({len(pair)}):", dict(third.most_common()))
three = [order for order in orders if set(order[:3]) == {"microwave", "kettle", "bottom_burner"}]
fourth = collections.Counter(order[3] if len(order) > 3 else "nothing" for order in three)
print(f"after microwave, kettle, bottom burner in any order ({len(three)}):", dict(fourth.most_common()))
for first_two in (("kettle", "bottom_burner"), ("microwave", "bottom_burner")):
    begun = [order for order in orders if tuple(order[:2]) == first_two]
    third = collections.Counter(order[2] if len(order) > 2 else "nothing" for order in begun)
    print(f"after {', '.join(first_two)} ({len(begun)}):", dict(third.most_common()))
