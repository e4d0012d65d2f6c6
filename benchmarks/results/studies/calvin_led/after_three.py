"""Who lights the LED on CALVIN, once drawer, bulb and slider are done?

python benchmarks/results/studies/calvin_led/after_three.py EPISODES

The published agent of skimo.py does the first three (that of 279b962, from 300,000 env steps). From then on the frozen
prior, the task policy or the planner act, the planner with the exploration noise of training, with more, and as today
but without the iterations.
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
args = skimo.parse_args(["--env-id", "calvin", "--evaluate", "published"])
networks = skimo.make_networks(args, *data_tools.env_sizes("calvin"))
agent = skimo.Agent(args, networks)
step = int(skimo.load(Path(args.evaluate), dict(agent=agent))["global_step"])


def planner(**changes):
    """Observations -> skills of today's planner with other arguments."""
    changed = copy.copy(args)
    for name, value in changes.items():
        setattr(changed, name, value)
    choose = skimo.Planner(agent, changed, explore=True)
    return lambda obs: choose(obs, step)


@torch.no_grad()
def prior(obs):
    h = agent.prior_encoder(torch.from_numpy(obs))
    return skimo.sample_skill(skimo.gaussian_parameters(agent.skill_prior(h)))


@torch.no_grad()
def value(obs):
    """min Q of the task policy's own skills, (E,)."""
    h = agent.model.encoder(torch.from_numpy(obs))
    z = skimo.sample_skill(skimo.gaussian_parameters(agent.task_policy(h)))
    return torch.min(*agent.model.q(h, z)).numpy()


first_three = planner()
followers = {
    "prior": prior,
    "task policy": agent.sample_policy,
    "planner": planner(),
    "planner, noise .5": planner(min_std=0.5, min_std_end=0.5),
    "planner, 1 iteration": planner(cem_iters=1),
}
for name, follower in followers.items():
    envs = data_tools.make_envs("calvin", E)
    torch.manual_seed(11)
    obs, _ = envs.reset(seed=11)
    returns = np.zeros(E)
    ended = np.zeros(E, dtype=bool)
    z = torch.zeros(E, args.skill_dim)
    values = []
    while not ended.all():
        three_done = returns >= 300
        if three_done.any():
            z[three_done] = follower(obs[three_done])
            values.append(value(obs[three_done]).mean())
        if not three_done.all():
            z[~three_done] = first_three(obs[~three_done])
        obs, rewards, ended, _ = skimo.execute_skill(envs, agent.skills, obs, z, ended, args)
        returns += rewards
    envs.close()
    three = int((returns >= 300).sum())
    four = int((returns >= 400).sum())
    words = f"three done {three}, then the LED {four}, mean Q on the way {np.mean(values[-15:]):+.3f}"
    print(f"{name}: {E} episodes, {words}", flush=True)
