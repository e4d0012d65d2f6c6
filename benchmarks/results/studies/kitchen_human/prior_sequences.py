"""Which sub-tasks does a pre-trained prior do in the Kitchen, and what follows microwave and kettle?

python benchmarks/results/studies/kitchen_human/prior_sequences.py MODEL.pt ...     # 200 roll-outs of each
"""

import collections
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[4]
sys.path.insert(0, str(ROOT))
import data_tools
from algos import skimo
from data_tools.tasks import kitchen

for path in sys.argv[1:]:
    args = skimo.Args(env_id="kitchen", device="cpu", seed=77, **skimo.TASK_DEFAULTS["kitchen"])
    networks = skimo.make_networks(args, *data_tools.env_sizes("kitchen"))
    skimo.load(Path(path), dict(networks=networks))
    seen = []
    make_envs = data_tools.make_envs

    def watched(*inputs, make_envs=make_envs, seen=seen):
        envs = make_envs(*inputs)
        step = envs.step

        def keep(actions):
            result = step(actions)
            seen.append(result[0].copy())
            return result

        envs.step = keep
        return envs

    data_tools.make_envs = watched
    torch.manual_seed(0)
    returns = skimo.prior_rollouts(networks, args, 200)
    data_tools.make_envs = make_envs
    done = kitchen.elements_complete(np.stack(seen))  # name -> (T, E)
    orders = []
    for e in range(200):
        first = sorted((int(np.argmax(flags[:, e])), name) for name, flags in done.items() if flags[:, e].any())
        orders.append([name for _, name in first])
    print(f"{path}: sub-tasks in the Kitchen's order {returns.mean():.2f}, in any {np.mean([*map(len, orders)]):.2f}")
    print("   share of episodes:", ", ".join(f"{name} {flags.any(0).mean():.2f}" for name, flags in done.items()))
    third = collections.Counter(
        order[2] if len(order) > 2 else "nothing" for order in orders if order[:2] == ["microwave", "kettle"]
    )
    print("   after microwave, kettle:", ", ".join(f"{name} {count}" for name, count in third.most_common()))
