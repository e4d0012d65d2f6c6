"""How far the published maze model's predictions are from the simulator, in cells, with two yardsticks.

    python benchmarks/results/studies/maze_prediction/prediction_error.py     # half a minute

101 roll-outs of the prior, up to 50 skills each. The skills are then foretold from the first state alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path[:0] = [str(ROOT / "algos"), str(ROOT / "benchmarks")]
import pictures
import skimo

EPISODES = 101
SKILLS = 50

args = skimo.Args(env_id="maze", device="cpu", **skimo.TASK_DEFAULTS["maze"])
networks = skimo.make_networks(args, 4, 2)
skimo.load(ROOT / "benchmarks" / "results" / "skimo_maze_pretrained.pt", dict(networks=networks))
networks.requires_grad_(False)
model = networks["model"]

envs = skimo.data_tools.make_envs("maze", EPISODES)
torch.manual_seed(args.seed)
obs, _ = envs.reset(seed=args.seed)
ended = np.zeros(EPISODES, dtype=bool)
trace = []
chosen = []
for _ in range(SKILLS):
    z = skimo.sample_skill(skimo.gaussian_parameters(networks["prior"](model.encoder(torch.from_numpy(obs)))))
    chosen.append(z)
    for _ in range(args.skill_horizon):
        action = networks["skills"].act(torch.from_numpy(obs), z).numpy()
        trace.append((obs, action, ended))
        obs, _, terminations, truncations, _ = envs.step(action)
        ended = ended | terminations | truncations
trace.append((obs, action, ended))
z = torch.stack(chosen, 1)  # (E, skills, Z)

names = ("nearest encoding of a visited state", "decoder", "stays where it is", "nearest to the true encoding")
distances = {name: [] for name in names}
for e in range(EPISODES):
    order = np.r_[e, np.delete(np.arange(EPISODES), e)]  # each roll-out once as the first
    turned = [(obs[order], action[order], ended[order]) for obs, action, ended in trace]
    ((real, nearest),) = pictures.open_loop_prediction(model, turned, z[order], args.skill_horizon, 1)
    if len(real) <= SKILLS:
        continue  # reached the goal
    h = [model.encoder(torch.from_numpy(real[:1]))]
    for t in range(SKILLS):
        h.append(model.next(h[-1], z[e : e + 1, t]))
    decoded = (model.decode(torch.cat(h))[0] - model.encoder.shift) / model.encoder.scale
    others = np.concatenate([obs[order[1:]] for obs, _, _ in trace])
    index = torch.cdist(model.encoder(torch.from_numpy(real)), model.encoder(torch.from_numpy(others))).argmin(1)
    stays = np.repeat(real[:1], SKILLS + 1, axis=0)
    for name, path in zip(names, (nearest, decoded.numpy(), stays, others[index.numpy()])):
        distances[name].append(np.linalg.norm((path - real)[:, :2], axis=1))
for name, paths in distances.items():
    median = np.median(paths, axis=0)
    print(f"{name}: " + ", ".join(f"{median[t]:.2f} after {t}" for t in (1, 5, 10, 20, 30, 40, 50)))
print(f"cells off in the median of {len(paths)} roll-outs; skills foretold from the first state alone")
