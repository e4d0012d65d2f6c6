"""How far the published model's open-loop predictions are from the simulator, in cells: the README's numbers.

Run from the repository root: python benchmarks/results/maze/prediction_error.py
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = ["algos", "."]
import skimo

args = skimo.Args(env_id="maze", device="cpu", **skimo.TASK_DEFAULTS["maze"])
networks = skimo.make_networks(args, 4, 2, "cpu")
saved = torch.load(Path("benchmarks/results/skimo_maze_pretrained.pt"), weights_only=True)
networks.load_state_dict(saved["networks"])
model = networks["model"]
_, _, trace, z = skimo.prior_rollouts(networks, args, 101, max_skills=50)  # as `main` does for prediction.png

distances = {"nearest encoding of a visited state": [], "decoder": [], "visited state nearest to the true encoding": []}
for e in range(101):
    order = np.r_[e, np.delete(np.arange(101), e)]  # each roll-out once as the first
    turned = [(obs[order], action, ended[order]) for obs, action, ended in trace]
    ((real, nearest),) = skimo.data_tools.open_loop_prediction(model, turned, z[order], args.skill_horizon, 1)
    if len(real) < 51:
        continue  # reached the goal
    with torch.no_grad():
        h = [model.encoder(torch.from_numpy(real[:1]))]
        for t in range(50):
            h.append(model.next(h[-1], z[e : e + 1, t]))
        decoded = ((model.decode(torch.cat(h))[0] - model.encoder.shift) / model.encoder.scale).numpy()
        others = np.concatenate([obs[order[1:]] for obs, _, _ in trace])
        index = torch.cdist(model.encoder(torch.from_numpy(real)), model.encoder(torch.from_numpy(others))).argmin(1)
    for name, path in zip(distances, (nearest, decoded, others[index.numpy()])):
        distances[name].append(np.linalg.norm((path - real)[:, :2], axis=1))
for name, paths in distances.items():
    median = np.median(paths, 0)
    print(f"{name}: " + ", ".join(f"{median[t]:.2f} after {t}" for t in (1, 5, 10, 20, 30, 40, 50)))
print(f"medians of {len(paths)} roll-outs, skills foretold from the first state alone")
