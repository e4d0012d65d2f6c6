"""What does a prior do next, once microwave, kettle and bottom burner are done?

python benchmarks/results/studies/kitchen_human/after_three.py RUN MODEL.pt ...

An agent that was trained without recombined demonstrations (RUN) does these three, which no prior does often enough.
From then on the prior and the skills of each MODEL act. 60 episodes each, of which those count that have 100 env steps
left.
"""

import collections
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT))
import data_tools
from algos import skimo
from data_tools.tasks import kitchen

E = 60
run = Path(sys.argv[1])
args = skimo.Args(**json.loads((run / "args.json").read_text()))
sizes = data_tools.env_sizes("kitchen")
agent = skimo.Agent(args, skimo.make_networks(args, *sizes))
skimo.load(run / "checkpoint.pt", dict(agent=agent))
first_three = skimo.Planner(agent, args, explore=True)

for path in sys.argv[2:]:
    networks = skimo.make_networks(args, *sizes)
    skimo.load(Path(path), dict(networks=networks))
    envs = data_tools.make_envs("kitchen", E)
    torch.manual_seed(7)
    obs, _ = envs.reset(seed=7)
    returns = np.zeros(E)
    since = np.full(E, -1)  # env step at which the third was done
    ended = np.zeros(E, dtype=bool)
    seen = []
    with torch.no_grad():
        while not ended.all():
            h = networks["model"].encoder(torch.from_numpy(obs))
            z = skimo.sample_skill(skimo.gaussian_parameters(networks["prior"](h)))
            agent_z = first_three(obs, 200_000)
            three_done = torch.from_numpy(since >= 0)[:, None]
            for _ in range(args.skill_horizon):
                x = torch.from_numpy(obs)
                action = torch.where(three_done, networks["skills"].act(x, z), agent.skills.act(x, agent_z))
                obs, rewards, terminations, truncations, _ = envs.step(action.numpy())
                returns += np.where(ended, 0, rewards)
                ended = terminations | truncations
                seen.append(obs.copy())
            since = np.where((since < 0) & (returns >= 3), len(seen), since)
    envs.close()
    done = kitchen.elements_complete(np.stack(seen))  # name -> (T, E)
    following = collections.Counter()
    for e in np.flatnonzero((since >= 0) & (since <= 180)):
        times = {name: int(np.argmax(flags[since[e] :, e])) for name, flags in done.items()}
        new = [name for name, flags in done.items() if flags[since[e] :, e].any() and not flags[: since[e], e].any()]
        following[min(new, key=times.get, default="nothing")] += 1
    words = ", ".join(f"{name} {count}" for name, count in following.most_common())
    print(f"{Path(path).name}: {following.total()} episodes, next: {words}", flush=True)
