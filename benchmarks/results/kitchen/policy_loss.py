"""What keeps the kitchen's task policy at the prior: policy updates on the critics and data of a finished run.

    python benchmarks/results/kitchen/policy_loss.py RUN_FOLDER

RUN_FOLDER: a run of skimo.py on the kitchen, made with --alpha 0.5 --policy-latents imagined. From its checkpoint, 400
updates of the task policy alone for each variant of the loss, then 32 episodes in which that policy acts, unplanned.
`same`: the prior KL on the states where Q is, too (`policy_loss` has it on encoded ones).
"""

import dataclasses
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
import skimo

import data_tools

VARIANTS = [
    ("imagined", 0.5), ("h0", 0.5), ("encoded", 0.5), ("same", 0.5), ("same", 0.1), ("encoded", 0.1), ("encoded", 0.05),
]  # fmt: skip

run = Path(sys.argv[1])
start = skimo.Args(**json.loads((run / "args.json").read_text()))
state = data_tools.load_checkpoint(run / "checkpoint.pt", dict(kind="skimo run", env_id="kitchen"), "cpu")
rb = skimo.ReplayBuffer(30, start, torch.device("cpu"))
rb.set_state(state["rb"])
source = inspect.getsource(skimo.policy_loss)
if "task_policy(h[:, :-1])" not in source:
    sys.exit("error: policy_loss is not the one that this script was written for; check out the commit of the results")
source = source.replace("task_policy(h[:, :-1])", "task_policy(latents)")
same = dict(vars(skimo))
exec(source, same)


def latents(model):
    obs, z, _, _ = rb.sample(start.batch_size)
    with torch.no_grad():
        h = model.encoder(obs)  # (B, N+1, d)
        h_pred = [h[:, 0]]
        for t in range(z.shape[1]):
            h_pred.append(model.next(h_pred[-1], z[:, t]))
    return obs, h, torch.stack(h_pred, 1)


def episodes(learner, args):
    def choose_skill(obs, episode_start):
        return skimo.sample(skimo.tanh_normal(learner.task_policy(learner.model.encoder(torch.from_numpy(obs)))))

    return skimo.rollout(data_tools.make_envs("kitchen", 32), learner.skills, choose_skill, args, 77)[0]


for name, alpha in VARIANTS:
    args = dataclasses.replace(start, policy_latents="imagined" if name == "same" else name)
    learner = skimo.Learner(args, skimo.make_networks(args, 30, 9, "cpu"))
    learner.load_state_dict(state["learner"]["weights"])
    learner.policy_optimizer.load_state_dict(state["learner"]["optimizers"][1])
    loss_function = same["policy_loss"] if name == "same" else skimo.policy_loss
    torch.manual_seed(0)
    learner.model.requires_grad_(False)
    frozen = learner.prior_encoder, learner.skill_prior
    for _ in range(400):
        batch = latents(learner.model)
        loss, metrics = loss_function(learner.model, learner.task_policy, *frozen, *batch, torch.tensor(alpha), args)
        learner.policy_optimizer.zero_grad()
        loss.backward()
        learner.policy_optimizer.step()
    _, h, h_pred = batch
    with torch.no_grad():
        prior = skimo.tanh_normal(learner.skill_prior(learner.prior_encoder(batch[0])))
        kl = [skimo.kl_divergence(skimo.tanh_normal(learner.task_policy(x)), prior)[:, 1].mean() for x in (h, h_pred)]
    returns = episodes(learner, args)
    print(
        f"| {name} | {alpha} | {returns.mean():.2f} +- {returns.std() / np.sqrt(len(returns)):.2f} "
        f"| {kl[0]:.2f} | {kl[1]:.2f} |",
        flush=True,
    )
