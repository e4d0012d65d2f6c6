"""Golden runs: every algorithm file, tiny, through both phases; prints a hash of each thing that must not change.

    python tests/golden.py                     # all files and cases, about two minutes on one core
    python tests/golden.py skimo spirl         # these files only

Run it before and after a change that should change nothing: weights, replay, random state and episodes are compared
bit for bit. A line that differs has to be explained in the commit. Hashes hold for one machine and one torch version.
"""

import csv
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
TINY = "--device cpu --seed 3 --hidden-dim 16 --num-envs 4 --batch-size 16 --eval-episodes 2"
PRETRAIN = """--skill-dim 3 --pretrain-batch-size 8 --pretrain-updates 60 --pretrain-eval-interval 30
    --pretrain-eval-episodes 2"""
SKIMO = f"{PRETRAIN} --latent-dim 8 --num-skills 3 --pretrain-skills 3 --bc-chunks 2"
PLANNER = "--num-samples 16 --num-policy-trajs 4 --num-elites 6 --cem-iters 2"
SPIRL = f"{PRETRAIN} --critic-dim 16 --critic-blocks 1 --warmup-skills 120 --updates-per-skill 0.2 --buffer-size 4000"
TDMPC = f"{PRETRAIN} --model-dim 16 --latent-dim 8 --num-skills 3 --updates-per-step 0.05"
FLAGS = {
    "skimo": f"{SKIMO} {PLANNER} --horizon-steps 8000",
    "skimo_no_cem": SKIMO,
    "skimo_no_joint": f"{SKIMO} {PLANNER} --horizon-steps 8000",
    "skimo_sac": SKIMO.replace("--num-skills 3", "--num-skills 1"),
    "skimo_single_step": f"{SKIMO} {PLANNER} --horizon-steps 8000",
    "spirl": SPIRL,
    "supe": f"{PRETRAIN} --critic-dim 16 --buffer-size 4000 --critic-steps 1 --offline-ratio 0.25",
    "reskill": f"""{PRETRAIN} --flow-dim 16 --flow-windows 1000 --flow-updates 6 --flow-batch-size 16 --policy-dim 16
        --rollout-skills 10 --updates-per-rollout 4 --residual-middle 600 --residual-slope 0.01""",
    "tdmpc_skills": f"{TDMPC} {PLANNER} --horizon-steps 8000",
    "qc": f"""{PRETRAIN.replace("--skill-dim 3", "--hidden-layers 2")} --buffer-size 2000 --num-samples 6
        --num-candidates 3""",
    "relay": """--skill-horizon 10 --low-window 10 --high-window 40 --demo-rows 100 --rollout-skills 6 --epochs 1
        --pretrain-batch-size 8 --pretrain-updates 60 --pretrain-eval-interval 30 --pretrain-eval-episodes 2""",
    "sac": "--buffer-size 4000 --repeat 4",
    "diayn": "--buffer-size 4000 --controller-dim 16 --skill-dim 3 --warmup-steps 1200 --discover-steps 2000",
    "hiro": "--buffer-size 1000",
    "option_critic": "--batch-size 400",
    "dreamer": """--deter-dim 12 --stoch-dim 4 --encoder-dim 16 --batch-length 8 --imagine-starts 32 --imagine-steps 4
        --updates-per-step 0.01""",
    "dreamer_skills": f"""{PRETRAIN} --model-dim 16 --deter-dim 12 --stoch-dim 4 --encoder-dim 16 --batch-length 4
        --imagine-starts 16 --imagine-steps 3""",
    "lsp": """--deter-dim 12 --stoch-dim 4 --encoder-dim 16 --batch-length 8 --imagine-starts 32 --skill-horizon 4
        --num-skills 2 --num-samples 6 --num-elites 2 --cem-iters 2 --updates-per-step 0.01""",
    "dads": """--buffer-size 4000 --policy-updates 2 --num-samples 8 --mppi-iters 2 --hold-steps 40 --warmup-steps 1200
        --discover-steps 2000""",
    "tdmpc": f"--encoder-dim 16 --latent-dim 8 --num-steps 3 {PLANNER} --horizon-steps 8000",
}
FLAT = ("sac", "diayn", "option_critic", "hiro", "dreamer", "tdmpc", "dads", "lsp")  # without skills and offline data
NO_WARMUP = ("spirl", "reskill", "relay", "option_critic")  # no warm-up in env steps
# Kitchen: LSTM, fixed alpha, encoded states. Its 280-step episodes are made of random data, which suffices here.
TASKS = {
    "maze": "--env-id maze --total-timesteps 10000 --warmup-steps 8000 --updates-per-step 0.01",
    "kitchen": "--env-id kitchen --total-timesteps 3000 --warmup-steps 1200 --updates-per-step 0.01",
}


def make_data(path: Path, obs_dim: int, action_dim: int):
    """Random episodes of 120 steps in D4RL's layout."""
    import h5py

    rng = np.random.default_rng(0)
    rows = 20 * 120
    observations = rng.normal(size=(rows, obs_dim))
    if obs_dim == 4:  # data of the maze have to lie between its walls
        observations[:, :2] = rng.uniform(0.8, 1.2, (rows, 2))
    with h5py.File(path, "w") as file:
        file["observations"] = observations.astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, (rows, action_dim)).astype(np.float32)
        file["terminals"] = np.zeros(rows, dtype=bool)
        file["timeouts"] = np.arange(1, rows + 1) % 120 == 0
        file["rewards"] = np.zeros(rows, dtype=np.float32)


def hash_of(values) -> str:
    """Hash of tensors, arrays and plain values, in order."""
    digest = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            value = value.detach().cpu().numpy()
        digest.update(value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return digest.hexdigest()[:12]


def by_episode(rb: dict) -> dict:
    """Replay of skills, a row per environment and skill: finished episodes back to back, with what they ended in."""
    rows, table, E = rb["columns"], [], len(rb["running"])
    found = {name: [] for name in rows if name != "next_obs"}
    for first, T in rb["episodes"][: rb["num_episodes"]].tolist():
        index = first + E * torch.arange(T)
        table.append([sum(T + 1 for _, T in table), T])
        for name in found:
            last = torch.zeros_like(rows[name][:1])
            if name == "obs":  # of a skill's env steps, where there are several, the first
                last.view(-1)[: rows["next_obs"].shape[1]] = rows["next_obs"][index[-1]]
            found[name].append(torch.cat([rows[name][index], last]))
    return dict({name: torch.cat(parts) for name, parts in found.items()}, episodes=torch.tensor(table))


def read_checkpoint(path: Path) -> dict:
    """Weights, optimizers, replay and random state of a checkpoint."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    optimizers = [value for value in state.values() if isinstance(value, dict) and "param_groups" in value]
    moments = [m for o in optimizers for p in o["state"].values() for m in (p["exp_avg"], p["exp_avg_sq"])]
    replay = state["rb"]
    if "columns" in replay:
        replay = by_episode(replay) if "num_episodes" in replay else dict(enumerate(replay["columns"]))
    replay = [value for value in replay.values() if isinstance(value, torch.Tensor)]
    return dict(weights=state["agent"].values(), optimizers=moments, replay=replay, random=state["rng"])


def golden(algo: str, task: str, folder: Path, script: Path) -> dict[str, str]:
    """Run one file on one task; returns name -> hash."""
    data = folder / f"{task}.hdf5"
    if not data.exists():
        make_data(data, *{"maze": (4, 2), "kitchen": (30, 9)}[task])
    flags = f"{TINY} {TASKS[task]} {FLAGS[algo]}"
    if algo in NO_WARMUP:
        words = flags.split()
        for flag in ("--warmup-steps", "--updates-per-step"):
            at = words.index(flag)
            del words[at : at + 2]
        flags = " ".join(words)
    runs = folder / f"{algo}_{task}"
    command = [sys.executable, script, *flags.split(), "--run-dir", runs]
    if algo not in FLAT:
        command += ["--data", data, "--data-dir", folder / algo]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{algo} on {task} failed:\n{done.stderr[-3000:]}")
    (run,) = runs.iterdir()
    facts = read_checkpoint(run / "checkpoint.pt")
    with (run / "episodes.csv").open() as file:
        facts["episodes"] = [row[:3] for row in csv.reader(file)]  # without the minutes
    results = json.loads((run / "results.json").read_text())
    facts["evaluations"] = results["evaluations"]
    return {name: hash_of(values) for name, values in facts.items()}


def main():
    algos = sys.argv[1:] or list(FLAGS)
    with tempfile.TemporaryDirectory() as folder:
        for algo in algos:
            script = Path(os.environ.get("GOLDEN_ALGOS", ROOT / "algos")) / f"{algo}.py"
            for task in TASKS:
                hashes = golden(algo, task, Path(folder), script)
                print(f"{algo:18} {task:8}", *(f"{name} {value}" for name, value in hashes.items()), flush=True)


if __name__ == "__main__":
    main()
