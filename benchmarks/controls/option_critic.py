"""The figure of the Option-Critic paper: options and a plain actor-critic in four rooms, whose goal moves half-way.

    python benchmarks/controls/option_critic.py --out benchmarks/results/studies/option_critic/four_rooms_seed1.csv

Runs algos/option_critic.py's tables with four options and with one, which is a plain actor-critic. The csv has the mean
steps of each episode over all runs; the picture beside it shows them with the fewest possible, by value iteration; the
JSON has command, commit, machine and what is asked: under 20 steps before the goal moves, and at the end less than a
quarter of the steps that the one option takes.
"""

import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import option_critic
from benchmarks.controls import frame
from benchmarks.plot import save

WINDOWS = {
    "first 10": (0, 10),
    "last 100 before the goal moves": (900, 1_000),
    "first 10 after": (1_000, 1_010),
    "50 to 100 after": (1_050, 1_100),
    "last 100": (1_900, 2_000),
}


def draw(table: Path, out: Path, fewest):
    """The csv -> a picture: steps per episode, means over 20 episodes, and the fewest possible."""
    rows = np.genfromtxt(table, delimiter=",", names=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, colour, label in (("one_option", "C7", "1 option"), ("four_options", "C3", "4 options")):
        smooth = rows[name].reshape(-1, 20).mean(1)
        axes.plot(rows["episode"].reshape(-1, 20).mean(1), smooth, color=colour, label=label)
    axes.hlines(fewest, (0, 1_000), (1_000, 2_000), "black", "dotted", label="fewest possible")
    axes.set(yscale="log", xlabel="episode", ylabel="steps to the goal", title="Four rooms; the goal moves at 1,000")
    axes.legend()
    save(figure, out)


def main():
    parser = frame.parser(__doc__)
    parser.add_argument("--num-runs", type=int, default=20)
    given = parser.parse_args()
    args = option_critic.Args(seed=given.seed, num_runs=given.num_runs, four_rooms=True)
    transitions = option_critic.four_rooms(args.paper_slip)
    later = [option_critic.mean_fewest_steps(transitions, goal) for goal in option_critic.LATER_GOALS]
    fewest = option_critic.mean_fewest_steps(transitions, option_critic.FIRST_GOAL), float(np.mean(later))
    columns = []
    with frame.record(given.out) as facts:
        facts |= dict(fewest_before=fewest[0], fewest_after=fewest[1])
        for num_options, name in ((4, "four_options"), (1, "one_option")):
            start = time.time()
            steps, choices = option_critic.learn_four_rooms(args, num_options)
            columns.append(steps.mean(0))
            facts[name] = {label: float(steps[:, slice(*window)].mean()) for label, window in WINDOWS.items()}
            facts[name]["worst of the runs, last 100"] = float(steps[:, 1_900:].mean(1).max())
            facts[name]["mean option length"] = float(steps.sum() / choices.sum())
            facts[name]["minutes"] = (time.time() - start) / 60
            print(name, {key: round(value, 2) for key, value in facts[name].items()}, flush=True)
        before = facts["four_options"]["last 100 before the goal moves"]
        share = facts["four_options"]["last 100"] / facts["one_option"]["last 100"]
        facts |= dict(share_of_the_one_option=share, passed=before < 20 and share < 0.25, args=asdict(args))
        rows = zip(range(args.num_episodes), *columns)
        frame.write_csv(given.out, ("episode", "four_options", "one_option"), rows)
    draw(given.out, given.out.with_suffix(".png"), fewest)
    print(f"share of the one option's steps {share:.2f}; {'passed' if facts['passed'] else 'NOT passed'}")


if __name__ == "__main__":
    main()
