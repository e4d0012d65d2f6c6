"""Positive controls: the flat files learn Gymnasium's pendulum, so a zero on a hard task says something.

    python benchmarks/controls/flat.py sac --out benchmarks/results/studies/controls/sac_seed1.csv    # 15,000 env steps
    python benchmarks/controls/flat.py sac --reported --out sac.csv    # 300,000, with the settings of RESULTS

The whole file runs as with `--env-id Pendulum-v1`, with one environment, or as reported (lsp, option_critic: only so).
The csv has a row per training episode; a JSON beside it tells command, commit, machine, arguments and the verdict: the
mean return of the last 20 episodes must exceed GATE. Random actions get about -1,200, a good policy about -150.
Episodes end by time-outs only.
"""

import importlib
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.controls import frame

GATE = -250.0
# Sizes for minutes on one core
COMMON = dict(
    env_id="Pendulum-v1", device="cpu", cudagraphs=False, num_envs=1, warmup_steps=1_000, eval_interval=10**9,
    eval_episodes=1,
)  # fmt: skip
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


def main():
    parser = frame.parser(__doc__, reported=True)
    parser.add_argument("algo", choices=[*SETTINGS, "lsp", "option_critic"])
    parser.add_argument("--env-steps", type=int)
    given = parser.parse_args()
    algo = importlib.import_module(f"algos.{given.algo}")
    if given.reported or given.algo not in SETTINGS:
        args = frame.reported_args(algo, COMMON["env_id"], given.seed, given.env_steps)
    else:
        env_steps = given.env_steps or 15_000
        args = algo.Args(**COMMON, **SETTINGS[given.algo], seed=given.seed, total_timesteps=env_steps)
    with frame.record(given.out) as facts:
        results, _, episodes, _ = frame.train(algo, args)
        rows = [(int(step), round(value, 1), round(minutes, 2)) for step, value, _, minutes in episodes]
        frame.write_csv(given.out, ("env_step", "episodic_return", "minutes"), rows)
        last = float(np.mean(episodes[-20:, 1]))
        facts |= dict(env=args.env_id, last_20_return=last, gate=GATE, passed=last > GATE)
        facts |= dict(updates=results.get("updates"), args=asdict(args))
    print(f"{given.algo}: mean of the last 20 episodes {last:.0f}; {'learnt' if last > GATE else 'NOT learnt'}")


if __name__ == "__main__":
    main()
