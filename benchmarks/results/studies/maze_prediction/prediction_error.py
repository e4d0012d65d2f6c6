"""How far the published maze model's predictions are from the simulator, in cells, with two yardsticks.

    python benchmarks/results/studies/maze_prediction/prediction_error.py     # half a minute

101 roll-outs of the prior, up to 50 skills each. The skills are then foretold from the first state alone.
"""

import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT / "algos"))
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
all_obs = [obs]
running = [~ended]
chosen = []
for _ in range(SKILLS):
    z = skimo.sample_skill(skimo.gaussian_parameters(networks["prior"](model.encoder(torch.from_numpy(obs)))))
    chosen.append(z)
    for _ in range(args.skill_horizon):
        action = networks["skills"].act(torch.from_numpy(obs), z).numpy()
        obs, _, terminations, truncations, _ = envs.step(action)
        ended = ended | terminations | truncations
        all_obs.append(obs)
        running.append(~ended)
obs = np.stack(all_obs)  # (T+1, E, O)
running = np.stack(running)  # (T+1, E)
encoded = model.encoder(torch.from_numpy(obs))  # (T+1, E, d)
names = ("nearest encoding of a visited state", "decoder", "stays where it is", "nearest to the true encoding")
distances = {name: [] for name in names}
for e in np.flatnonzero(running[-1]):  # those that did not reach the goal
    real = obs[:: args.skill_horizon, e]  # (skills + 1, O)
    h = [encoded[:1, e]]
    for t in range(SKILLS):
        h.append(model.next(h[-1], chosen[t][e : e + 1]))
    h = torch.cat(h)  # (skills + 1, d)
    others = running & (np.arange(EPISODES) != e)
    nearest = obs[others][torch.cdist(h, encoded[torch.from_numpy(others)]).argmin(1).numpy()]
    true = encoded[:: args.skill_horizon, e].contiguous()
    reread = obs[others][torch.cdist(true, encoded[torch.from_numpy(others)]).argmin(1).numpy()]
    decoded = ((model.decode(h)[0] - model.encoder.shift) / model.encoder.scale).numpy()
    stays = np.repeat(real[:1], SKILLS + 1, axis=0)
    for name, path in zip(names, (nearest, decoded, stays, reread)):
        distances[name].append(np.linalg.norm((path - real)[:, :2], axis=1))
for name, paths in distances.items():
    median = np.median(paths, axis=0)
    print(f"{name}: " + ", ".join(f"{median[t]:.2f} after {t}" for t in (1, 5, 10, 20, 30, 40, 50)))
print(f"cells off in the median of {len(paths)} roll-outs; skills foretold from the first state alone")
