"""Positive controls of algos/diayn.py: a box whose skills can be told apart, and a pendulum that may fall.

    python benchmarks/controls/diayn.py box --out benchmarks/results/studies/diayn/box_seed1.csv
    python benchmarks/controls/diayn.py box --reported --out box.csv    # with the settings of the runs in RESULTS
    python benchmarks/controls/diayn.py pendulum --out benchmarks/results/studies/diayn/pendulum_seed1.csv
    python benchmarks/controls/diayn.py pendulum --no-log-p-z --env-steps 5000 \\
        --out benchmarks/results/studies/diayn/pendulum_without_seed1.csv

box (the paper's appendix C): a point in [0, 1]^2 begins in the middle and moves by at most 0.1 along each axis in a
step; 100 steps. The csv has the path of each skill (no exploration); GATE is about its states, which the discriminator
must tell apart. The picture beside it is drawn from it. Then the controller learns to stay near a corner, by skills.
pendulum: Gymnasium's InvertedPendulum-v5, whose episodes end when it falls, and time out after 1,000 steps; discovery
alone. The csv has the training episodes; the picture shows those of both runs above. Without - log p(z) each reward is
negative, and falling early is the best that a skill can do.
Both run the whole file as any task of one's own. A JSON beside the csv tells command, commit, machine, arguments.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import diayn
from benchmarks.controls import frame
from benchmarks.plot import save
from data_tools import TASKS, Task, make_envs
from data_tools.tasks.vector import MemberVectorEnv

GATE = dict(bound=1.8, accuracy=0.9)  # nats of log 10 = 2.30, of more skills the same part; share of states
CORNER = np.array([1.0, 0.0])  # of the box; reward 1 for each step that ends less than 0.3 away from it
COMMON = dict(
    device="cpu", cudagraphs=False, num_envs=1, skill_dim=10, hidden_dim=128, updates_per_step=1.0, buffer_size=30_000,
    eval_interval=10**9, eval_episodes=1,
)  # fmt: skip
SETTINGS = {
    "box": dict(discover_steps=25_000, total_timesteps=30_000),
    "pendulum": dict(discover_steps=30_000, total_timesteps=30_000),
}


class BoxVectorEnv(MemberVectorEnv):
    """E points in a box; observation: position (2,), action: step / 0.1 (2,). Nothing ends an episode early."""

    saved = {"position": np.float64}

    def __init__(self, num_envs: int, max_episode_steps: int = 100, **options):
        super().__init__(num_envs, 2, 2, max_episode_steps, **options)
        self.position = np.zeros((num_envs, 2))

    def begin(self, members):
        self.position[members] = 0.5

    def advance(self, actions, running):
        self.position = np.clip(self.position + 0.1 * actions * running[:, None], 0, 1)
        near = np.linalg.norm(self.position - CORNER, axis=1) < 0.3
        return 1.0 * (near & running), np.zeros(self.num_envs, dtype=bool)

    def observations(self):
        return self.position.astype(np.float32)


TASKS["box"] = Task("benchmarks.controls.diayn:BoxVectorEnv", max_return=100.0)
pendulum = dict(env_id="InvertedPendulum-v5")
TASKS["pendulum"] = Task("data_tools.tasks.gym:GymVectorEnv", max_return=1_000.0, env_kwargs=pendulum)


def skill_paths(agent, args):
    """An episode of each skill without exploration: observations (T + 1, Z, O), and lengths (Z,) in env steps."""
    z = np.eye(args.skill_dim, dtype=np.float32)
    envs = make_envs(args.env_id, args.skill_dim)
    obs, _ = envs.reset(seed=10_000 + args.seed)
    path = [obs]
    while not envs.waiting.all():
        obs, *_ = envs.step(agent.act(obs, z, explore=False))
        path.append(obs)
    envs.close()
    return np.stack(path), envs.steps


@torch.no_grad()
def told_apart(agent, path):
    """Of paths (T + 1, Z, O): mean of log q(z | s) + log Z in nats, and the share of states that are guessed right.

    The start, which all skills share, is left out.
    """
    log_q = agent.discriminator(torch.from_numpy(path[1:]))  # (T, Z, Z)
    num_skills = log_q.shape[-1]
    own = log_q.diagonal(dim1=1, dim2=2)  # (T, Z)
    right = log_q.argmax(-1) == torch.arange(num_skills)
    return float(own.mean() + np.log(num_skills)), float(right.float().mean())


def draw_box(table: Path, out: Path, title: str):
    """The csv of a box -> a picture of the skills' paths."""
    rows = np.loadtxt(table, delimiter=",", skiprows=1)
    figure = Figure(figsize=(5, 5.2), layout="constrained")
    axes = figure.subplots()
    for skill in np.unique(rows[:, 0]):
        x, y = rows[rows[:, 0] == skill, 2:].T
        axes.plot(x, y, ".-", color=f"C{int(skill)}", lw=1, ms=4)
        axes.plot(x[-1], y[-1], "o", color=f"C{int(skill)}", ms=9)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal", xlabel="x", ylabel="y", title=title)
    save(figure, out)


def draw_pendulum(folder: Path, out: Path, seed: int):
    """The csv files of both rewards, as far as they are there -> a picture of the lengths of episodes."""
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, colour, label in (("", "C3", "with - log p(z)"), ("_without", "C7", "without")):
        table = folder / f"pendulum{name}_seed{seed}.csv"
        if table.exists():
            steps, lengths, _ = np.loadtxt(table, delimiter=",", skiprows=1).T
            window = min(20, len(lengths))
            smooth = np.convolve(lengths, np.ones(window) / window, "valid")
            axes.plot(steps[window - 1 :], smooth, color=colour, label=label)
    axes.set(yscale="log", xlabel="env step", ylabel="steps until it falls", title="Mean of the last 20 episodes")
    axes.legend()
    save(figure, out)


def main():
    parser = frame.parser(__doc__, reported=True)
    parser.add_argument("name", choices=list(SETTINGS))
    parser.add_argument("--env-steps", type=int, help="stop early")
    parser.add_argument("--no-log-p-z", action="store_true", help="leave - log p(z) out of the reward")
    given = parser.parse_args()
    settings = COMMON | SETTINGS[given.name]
    if given.env_steps:
        settings["total_timesteps"] = given.env_steps
    args = diayn.Args(**settings, env_id=given.name, seed=given.seed)
    if given.reported:
        args = frame.reported_args(diayn, given.name, given.seed, given.env_steps)
    args.subtract_log_p_z = not given.no_log_p_z
    with frame.record(given.out) as facts:
        results, agent, episodes, _ = frame.train(diayn, args)
        path, lengths = skill_paths(agent, args)
        if given.name == "box":
            header = ("skill", "step", "x", "y")
            points = np.round(path.astype(float), 4).tolist()
            rows = [(k, t, *points[t][k]) for k in range(args.skill_dim) for t in range(len(path))]
            facts["bound"], facts["accuracy"] = told_apart(agent, path)
            in_control = [value for step, value, _, _ in episodes if step > args.discover_steps]
            facts |= dict(controller_return=results["evaluations"][-1][1], first_returns_in_control=in_control[:5])
            gate = GATE | dict(bound=GATE["bound"] * float(np.log(args.skill_dim) / np.log(10)))
            facts |= dict(gate=gate, passed=all(facts[key] > least for key, least in gate.items()))
        else:
            header = ("env_step", "episodic_length", "minutes")
            rows = [(int(step), int(length), minutes) for step, _, length, minutes in episodes]
            trained = episodes[:, 2]
            best = max(trained[i : i + 20].mean() for i in range(max(1, len(trained) - 19)))
            facts |= dict(last_20_length=float(trained[-20:].mean()), best_20_length=float(best))
            facts |= dict(longest_training_episode=int(trained.max()), skill_lengths=lengths.tolist())
        frame.write_csv(given.out, header, rows)
        facts |= dict(seed=given.seed, env=given.name, updates=results["updates"], args=vars(args))
    if given.name == "box":
        title = f"{args.skill_dim} skills: {facts['bound']:.2f} of {np.log(args.skill_dim):.2f} nats"
        draw_box(given.out, given.out.with_suffix(".png"), title)
    else:
        draw_pendulum(given.out.parent, given.out.with_name(f"pendulum_seed{given.seed}.png"), given.seed)
    print({key: value for key, value in facts.items() if key != "args"})


if __name__ == "__main__":
    main()
