"""How much of SkiMo's score in the Kitchen is its planner's, how much is less noise?

python benchmarks/results/studies/kitchen_acting/acting.py EPISODES [CHECKPOINT]

One agent of skimo.py, the Kitchen's published one or that of a run, acts in five ways: by its task policy's mode, by
samples of it, as SkiMo without CEM acts in training, planned one skill ahead, planned as in evaluation, and with the
noise of training.
"""

import copy
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT))
import data_tools
from algos import skimo

E = int(sys.argv[1])
chosen = ["--evaluate", *sys.argv[2:]] if sys.argv[2:] else ["--env-id", "kitchen", "--evaluate", "published"]
args = skimo.parse_args(chosen)
networks = skimo.make_networks(args, *data_tools.env_sizes(args.env_id))
agent = skimo.Agent(args, networks)
step = int(skimo.load(Path(args.evaluate), dict(agent=agent))["global_step"])


def planner(explore: bool, **changes):
    """Observations -> skills of the planner, with other arguments."""
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    choose = skimo.Planner(agent, changed, explore)
    return lambda obs: choose(obs, step)


@torch.no_grad()
def mode(obs):
    h = agent.model.encoder(torch.from_numpy(obs))
    return torch.tanh(skimo.gaussian_parameters(agent.task_policy(h))[0])


for name, choose_skill in {
    "mode of the policy": mode,
    "samples of the policy": agent.sample_policy,
    "planner, one skill ahead": planner(explore=False, horizon_steps=10**9),
    "planner": planner(explore=False),
    "planner, noise of training": planner(explore=True),
}.items():
    returns, lengths = skimo.rollout(choose_skill, agent.skills, E, args, 20_000)
    error = returns.std() / np.sqrt(E)
    shares = " / ".join(f"{(returns >= n).mean():.2f}" for n in (1, 2, 3, 4))
    words = f"{returns.mean():.2f} +- {error:.2f} sub-tasks, at least 1 / 2 / 3 / 4 in {shares}"
    print(f"{name}: {E} episodes, {words}, {lengths.mean():.0f} env steps", flush=True)
