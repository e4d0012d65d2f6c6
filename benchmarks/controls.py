"""Positive controls: the agents of the flat files learn Gymnasium's pendulum, so a zero on a hard task says something.

    python benchmarks/controls.py sac --out benchmarks/results/studies/controls/sac_seed1.csv      # 15,000 env steps

The agent, buffer and acting are those of algos/NAME.py, in a loop of one environment. The csv has a row per training
episode; a JSON beside it tells command, commit, machine, arguments and the verdict: the mean return of the last 20
episodes must exceed GATE. Random actions get about -1,200, a good policy about -150. Episodes end by time-outs only.
"""

import argparse
import csv
import importlib
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import gymnasium
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.provenance import provenance

GATE = -250.0
# Sizes for minutes on one core. In the task calvin networks see observations as they are, as the pendulum needs it.
COMMON = dict(env_id="calvin", device="cpu", cudagraphs=False, num_envs=1, position_features=False, warmup_steps=1_000)
SETTINGS = {
    "sac": dict(updates_per_step=1.0, buffer_size=100_000),
    "dreamer": dict(
        deter_dim=64, stoch_dim=8, encoder_dim=64, hidden_dim=64, batch_size=16, batch_length=32, imagine_starts=128,
        learning_rate=1e-3, actor_lr=2e-4, critic_lr=4e-4, updates_per_step=0.5, reward_scale=0.1,
    ),
    "tdmpc": dict(
        hidden_dim=128, batch_size=128, num_samples=128, num_elites=32, cem_iters=3, updates_per_step=0.5,
        std_steps=5_000, horizon_steps=5_000,
    ),
}  # fmt: skip


def make(algo: str, seed: int):
    """Returns arguments, agent, buffer, a function (obs (1, 3), step) -> actions (1, 1), and one to call at ends."""
    module = importlib.import_module(f"algos.{algo}")
    args = module.Args(**COMMON, **SETTINGS[algo], seed=seed)
    torch.manual_seed(seed)
    agent = module.Agent(args, 3, 1)
    if algo == "sac":
        rb = module.ReplayBuffer(3, 1, args)
        return args, agent, rb, lambda obs, step: agent.act(obs, explore=True), lambda ended: None
    if algo == "dreamer":
        rb = module.SequenceBuffer(3, 1, args.batch_length, args)
        acting = module.Filter(agent, 1, 1, explore=True)
        return args, agent, rb, lambda obs, step: acting(obs), acting.forget
    rb = module.SequenceBuffer(3, 1, args.num_steps + 1, args)
    planner = module.Planner(agent, args, explore=True)
    return args, agent, rb, planner, planner.forget


def learn(algo: str, env_steps: int, seed: int):
    """One run; yields (env step, return) of each training episode, and first the arguments."""
    args, agent, rb, choose_action, forget = make(algo, seed)
    yield asdict(args)
    module = importlib.import_module(f"algos.{algo}")
    env = gymnasium.make("Pendulum-v1")
    obs, _ = env.reset(seed=seed)
    obs = obs[None].astype(np.float32)  # (1, 3)
    no = np.zeros(1, dtype=bool)
    begin = getattr(rb, "begin", lambda obs, members: None)
    begin(obs, ~no)
    total = 0.0
    updates = 0
    for step in range(1, env_steps + 1):
        action = 2 * torch.rand(1, 1).numpy() - 1
        if step > args.warmup_steps:
            action = choose_action(obs, step)
        next_obs, reward, _, truncated, _ = env.step(2 * action[0])
        next_obs = next_obs[None].astype(np.float32)
        total += float(reward)
        rewards = np.array([args.reward_scale * reward], dtype=np.float32)
        if algo == "sac":
            rb.add(obs, action, rewards, no, no | truncated, next_obs)
        else:
            rb.add(next_obs, action, rewards, no)
        obs = next_obs
        if truncated:
            yield step, total
            total = 0.0
            obs = env.reset()[0][None].astype(np.float32)
            begin(obs, ~no)
            forget(~no)
        while updates < (step - args.warmup_steps) * args.updates_per_step:
            batch = rb.sample(args.batch_size)
            if algo == "dreamer" and updates == 0:
                agent.model.start_decoder(batch[0])
            agent.update(*batch)
            updates += 1
            if algo == "tdmpc" and updates % args.target_update_interval == 0:
                module.update_target(agent.target, agent.model, args.tau)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("algo", choices=list(SETTINGS))
    parser.add_argument("--out", type=Path, required=True, help="csv of episodes; a JSON is put beside it")
    parser.add_argument("--env-steps", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    origin = provenance()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    start = time.time()
    cpu_start = time.process_time()
    run = learn(given.algo, given.env_steps, given.seed)
    args = next(run)
    returns = []
    with given.out.open("w", buffering=1, newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("env_step", "episodic_return", "minutes"))
        for step, value in run:
            returns.append(value)
            writer.writerow((step, round(value, 1), round((time.time() - start) / 60, 2)))
            print(f"{given.algo}: env step {step}: return {value:.0f}", flush=True)
    last = float(np.mean(returns[-20:]))
    facts = dict(
        **origin,
        env="Pendulum-v1",
        last_20_return=last,
        gate=GATE,
        passed=last > GATE,
        minutes=(time.time() - start) / 60,
        cpu_minutes=(time.process_time() - cpu_start) / 60,
        args=args,
    )
    given.out.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"{given.algo}: mean of the last 20 episodes {last:.0f}; {'learnt' if last > GATE else 'NOT learnt'}")


if __name__ == "__main__":
    main()
