"""Positive control of algos/lsp.py: where actions can be seen, its skills come to mean directions, in seconds.

    python benchmarks/controls_lsp.py --out benchmarks/results/studies/controls/lsp_point_seed1.csv

A point in the plane moves by its action, o' = o + a, without reward. The agent of the file learns from windows of
random walks. The csv has the bound on the mutual information, in nats, over updates; the JSON beside it tells command,
commit, machine, arguments, whether the bound got above GATE, and the share of the end positions' variance that lies
between skills. The PNG shows where the policy's mode goes from the origin, one colour per skill.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from algos import lsp
from benchmarks.provenance import provenance

GATE = 1.0  # nats
REPEATS = 8  # paths of each skill
# In the task calvin networks see observations as they are, as a point needs it. Rates are higher than the file's.
SETTINGS = dict(
    env_id="calvin", device="cpu", compile=False, position_features=False, num_envs=2, deter_dim=64, stoch_dim=16,
    encoder_dim=64, hidden_dim=64, batch_size=16, batch_length=5, imagine_starts=80, mi_coef=1.0, learning_rate=1e-3,
    actor_lr=1e-3, predictor_lr=3e-3,
)  # fmt: skip


def learn(args, updates: int):
    """Returns the agent and the bound in nats of each update."""
    torch.manual_seed(args.seed)
    agent = lsp.Agent(args, 2, 2)
    rng = np.random.default_rng(args.seed)
    information = []
    for _ in range(updates):
        action = rng.uniform(-1, 1, (args.batch_size, args.batch_length, 2)).astype(np.float32)
        obs = torch.from_numpy(action.cumsum(1))
        nothing = torch.zeros(args.batch_size, args.batch_length)
        metrics = agent.update(obs, torch.from_numpy(action), nothing, nothing)
        information.append(metrics["skill_information"].item())
    return agent, information


def skill_paths(args, agent):
    """Skills (n, Z), plus and minus 2 along each axis, and positions (K + 1, n, REPEATS, 2) while they are held."""
    axes = 2 * torch.eye(args.skill_dim)
    skills = torch.cat([axes, -axes])
    z = skills.repeat_interleave(REPEATS, 0)  # (E, Z)
    policy = lsp.Filter(agent, len(z), 2, explore=False)
    policy.choose_skills = lambda due: None  # they stay
    policy.z = z
    torch.manual_seed(1)
    positions = [np.zeros((len(z), 2), np.float32)]
    for _ in range(args.skill_horizon):
        positions.append(positions[-1] + policy(positions[-1]))
    return skills, np.stack(positions).reshape(-1, len(skills), REPEATS, 2)


def explained(ends) -> float:
    """Share of the variance of end positions (n, REPEATS, 2) that lies between skills."""
    total = ends.reshape(-1, 2).var(0).sum()
    between = ends.mean(1).var(0).sum()
    return float(between / total)


def draw(skills, paths, information, share: float, path: Path):
    figure = Figure(figsize=(10, 4.5))
    left, right = figure.subplots(1, 2)
    left.plot(np.arange(1, len(information) + 1), information)
    left.axhline(GATE, color="grey", lw=0.8, ls="--")
    left.set_xlabel("gradient updates")
    left.set_title("bound on the mutual information, nats", fontsize="medium")
    for k, skill in enumerate(skills):
        name = ", ".join(f"{value:+.0f}" if value else "0" for value in skill.tolist())
        for r in range(paths.shape[2]):
            right.plot(*paths[:, k, r].T, color=f"C{k}", lw=1, alpha=0.7, label=f"z = {name}" if r == 0 else None)
    right.plot(0, 0, "ko", ms=4)
    right.legend(fontsize="small")
    right.set_aspect("equal")
    right.set_title(f"10 env steps of each skill\nskills explain {share:.0%} of where they end", fontsize="medium")
    figure.savefig(path, dpi=100, bbox_inches="tight")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="csv; JSON and PNG are put beside it")
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    args = lsp.Args(**SETTINGS, seed=given.seed)
    start = time.process_time()
    agent, information = learn(args, given.updates)
    minutes = (time.process_time() - start) / 60
    skills, paths = skill_paths(args, agent)
    share = explained(paths[-1])
    last = float(np.mean(information[-20:]))
    facts = dict(
        **origin,
        last_20_nats=last,
        gate=GATE,
        passed=last > GATE,
        explained=share,
        cpu_minutes=minutes,
        args=asdict(args),
    )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [f"{k + 1},{value:.4f}" for k, value in enumerate(information)]
    given.out.write_text("\n".join(["update,skill_information", *rows]) + "\n")
    given.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    draw(skills, paths, information, share, given.out.with_suffix(".png"))
    print(f"last 20 updates: {last:.2f} nats; skills explain {share:.0%} of where they end")


if __name__ == "__main__":
    main()
