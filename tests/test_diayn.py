"""diayn.py against mutual information, NumPy, soft value iteration, a counting environment, and a small box."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from algos import diayn
from data_tools import TASKS, Task
from data_tools.tasks.vector import MemberVectorEnv


def tiny_args(**changes):
    small = dict(device="cpu", hidden_dim=16, controller_dim=16, skill_dim=3, num_envs=2)
    return diayn.Args(**(small | dict(batch_size=16, buffer_size=200) | changes))


class Table(torch.nn.Module):
    """In place of a network: a row of numbers for each state; observations (B, 1) hold the state's number."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.nn.Parameter(torch.as_tensor(rows, dtype=torch.float32))

    def forward(self, obs):
        return self.rows[obs[:, 0].long()]


class Twins(torch.nn.Module):
    """Two tables, as the controller is two networks."""

    def __init__(self, first, second):
        super().__init__()
        self.both = torch.nn.ModuleList([Table(first), Table(second)])

    def forward(self, obs):
        return [table(obs) for table in self.both]


# ------------------------------------------------------------------------------------------------------------- rewards
def test_rewards_average_to_the_mutual_information():
    """p(s | z) of four states and three skills at random, in exact proportions. With the true posterior as q the mean
    reward is I(S; Z); with any other q it is less (the bound of eq. 3)."""
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 30, (3, 4))
    counts[:, 3] += 40 - counts.sum(1).clip(max=40)  # (Z, S)
    counts[:, 0] += counts.sum(1).max() - counts.sum(1)  # skills are equally frequent
    joint = counts / counts.sum()
    information = (joint * np.log(joint / joint.sum(0) / joint.sum(1, keepdims=True))).sum()
    z, s = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.ravel(), axis=1)
    obs = torch.from_numpy(s[:, None]).float()
    one_hot = torch.from_numpy(np.eye(3, dtype=np.float32)[z])
    posterior = np.log(joint / joint.sum(0)).T  # (S, Z)
    loss, rewards, _ = diayn.discriminator_loss(Table(posterior), obs, one_hot, True)
    assert rewards.mean().item() == pytest.approx(information, rel=1e-4)
    np.testing.assert_allclose(rewards, posterior[s, z] - np.log(1 / 3), rtol=1e-5)
    assert loss.item() == pytest.approx(np.log(3) - information, rel=1e-4)
    other = torch.randn(4, 3, generator=torch.manual_seed(0)).log_softmax(-1)
    assert diayn.discriminator_loss(Table(other), obs, one_hot, True)[1].mean().item() < information


def test_rewards_lie_between_nothing_known_and_log_z():
    z = torch.eye(4)
    obs = torch.arange(4.0)[:, None]
    perfect = torch.where(torch.eye(4) > 0, 0.0, -50.0)
    assert torch.allclose(diayn.discriminator_loss(Table(perfect), obs, z, True)[1], torch.tensor(4.0).log())
    blind = torch.full((4, 4), 0.25).log()
    assert torch.allclose(diayn.discriminator_loss(Table(blind), obs, z, True)[1], torch.zeros(4))
    # The lecture's formula: never positive, so that the end of an episode is a relief
    assert torch.allclose(diayn.discriminator_loss(Table(blind), obs, z, False)[1], -torch.tensor(4.0).log())


@pytest.mark.parametrize(
    ("env_id", "disc_obs", "obs_dim", "seen"),
    [
        ("maze", "positions", 4, lambda obs: 8 * (obs[:, :2] / 40 - 0.5)),  # cells
        ("maze", "all", 4, lambda obs: torch.cat([obs[:, :2] / 40 - 0.5, obs[:, 2:] / 10], 1)),  # no sines
        ("kitchen", "positions", 30, lambda obs: obs[:, 9:]),  # what is no arm
        ("calvin", "positions", 21, lambda obs: 5 * obs[:, 15:]),  # slider, drawer, button, switch and lights
        ("calvin", "all", 21, lambda obs: obs),  # as in the release
    ],
)
def test_the_discriminator_sees_where_things_are_as_far_apart_as_matters(env_id, disc_obs, obs_dim, seen):
    discriminator = diayn.Discriminator(obs_dim, tiny_args(env_id=env_id, disc_obs=disc_obs))
    given = []
    discriminator.net.register_forward_pre_hook(lambda net, inputs: given.append(inputs[0]))
    obs = 40 * torch.rand(6, obs_dim)
    discriminator(obs)
    torch.testing.assert_close(given[0], seen(obs))


def test_an_update_pays_by_the_discriminator_of_now_and_keeps_the_skill(monkeypatch):
    torch.manual_seed(0)
    agent = diayn.Agent(tiny_args(), 4, 2)
    seen = []

    soft_critic_loss = diayn.soft_critic_loss

    def critic_loss(critics, target, actor, state, action, rewards, next_state, discount, alpha):
        seen.append((state, rewards, next_state, alpha))
        return soft_critic_loss(critics, target, actor, state, action, rewards, next_state, discount, alpha)

    acting_on = []
    policy_loss = diayn.policy_loss
    monkeypatch.setattr(diayn, "soft_critic_loss", critic_loss)
    monkeypatch.setattr(diayn, "policy_loss", lambda *inputs: acting_on.append(inputs[2:]) or policy_loss(*inputs))
    obs, next_obs = torch.randn(2, 8, 4)
    z = torch.eye(3)[torch.randint(3, (8,))]
    task_rewards = torch.full((8,), torch.nan)  # nobody looks at them
    expected = []
    for _ in range(2):
        expected.append(agent.discriminator(obs).detach())
        agent.update(obs, torch.rand(8, 2), z, task_rewards, next_obs, torch.full((8,), 0.99))
    for (state, rewards, next_state, alpha), log_q in zip(seen, expected):
        assert torch.equal(state, torch.cat([obs, z], 1)) and torch.equal(next_state, torch.cat([next_obs, z], 1))
        assert torch.allclose(rewards, log_q[z.bool()] + np.log(3)) and alpha == 0.1
    assert all(torch.equal(state, torch.cat([obs, z], 1)) and alpha == 0.1 for state, alpha in acting_on)
    assert not torch.allclose(seen[0][1], seen[1][1])  # the same batch is paid otherwise after one step
    assert not any(value.isnan().any() for value in agent.state_dict().values())


# ------------------------------------------------------------------------------------------------------------- control
def test_soft_value():
    q = torch.tensor([[2.0, 2.0, 2.0], [1.0, 5.0, 3.0]])
    assert torch.allclose(diayn.soft_value(q, 0.3)[0], torch.tensor(2.0))  # equal skills are worth as much as one
    assert diayn.soft_value(q, 1e-3)[1].item() == pytest.approx(5.0, abs=2e-3)  # the maximum
    assert diayn.soft_value(q, 1e4)[1].item() == pytest.approx(3.0, abs=1e-3)  # the mean
    # max over policies of E[Q] - alpha KL(policy || uniform) is attained by softmax(Q / alpha)
    policy = np.exp(np.array([1.0, 5.0, 3.0]) / 0.7)
    policy /= policy.sum()
    expected = policy @ [1.0, 5.0, 3.0] - 0.7 * (policy * np.log(3 * policy)).sum()
    assert diayn.soft_value(q, 0.7)[1].item() == pytest.approx(expected, rel=1e-5)


def test_the_controller_finds_the_soft_optimum_of_a_chain():
    """Five states, left and right, reward 1 at the right end, where it ends: against soft value iteration."""
    alpha, gamma = 0.2, 0.9
    following = np.array([[max(s - 1, 0), s + 1] for s in range(5)])  # (S, Z); state 5 is the end
    ends = following == 5
    q = np.zeros((5, 2))
    for _ in range(300):
        value = np.append(alpha * np.log(np.exp(q / alpha).mean(1)), 0.0)
        q = ends + gamma * value[following]
    s, z = np.indices((5, 2)).reshape(2, -1)
    batch = dict(
        obs=torch.from_numpy(s[:, None]).float(),
        z=torch.eye(2)[z],
        rewards=torch.from_numpy(ends[s, z]).float(),
        next_obs=torch.from_numpy(following[s, z][:, None] % 5).float(),  # of the end: another state, with no weight
        discount=torch.from_numpy(gamma * (1.0 - ends[s, z])).float(),
    )
    controller = Twins(np.zeros((5, 2)), np.ones((5, 2)))
    target = Twins(np.zeros((5, 2)), np.ones((5, 2)))
    optimizer = torch.optim.SGD(controller.parameters(), lr=5.0)
    for _ in range(400):
        loss, _ = diayn.controller_loss(controller, target, **batch, alpha=alpha)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for slow, table in zip(target.both, controller.both):
                slow.rows.lerp_(table.rows, 0.5)
    for table in controller.both:
        np.testing.assert_allclose(table.rows.detach(), q, atol=1e-3)
    assert (q.argmax(1) == 1).all()


def test_skills_are_drawn_by_their_values_and_act_by_samples_or_their_mode():
    torch.manual_seed(0)
    agent = diayn.Agent(tiny_args(controller_alpha=0.5), 4, 2)
    obs, z = np.ones((3_000, 4), np.float32), np.eye(3, dtype=np.float32)[np.arange(3_000) % 3]
    with torch.no_grad():
        mean, std = (x.numpy() for x in agent.actor(torch.from_numpy(np.concatenate([obs[:3], z[:3]], 1))))
    np.testing.assert_allclose(agent.act(obs[:3], z[:3], explore=False), np.tanh(mean), atol=1e-6)
    drawn = np.arctanh(agent.act(obs, z, explore=True).astype(np.float64)).reshape(1_000, 3, 2)
    np.testing.assert_allclose(drawn.std(0), std, rtol=0.1)
    agent.controller = Twins([[0.0, 0.5, 3.0]] * 4, [[2.0, 0.7, 1.0]] * 4)  # the smaller counts: 0, .5, 1
    obs = np.zeros((20_000, 1), np.float32)
    drawn = agent.choose_skills(obs, explore=True)
    assert drawn.shape == (20_000, 3) and (drawn.sum(1) == 1).all()
    expected = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    np.testing.assert_allclose(drawn.mean(0), expected, atol=0.012)  # 3.5 standard errors
    assert (agent.choose_skills(obs[:2], explore=False) == [[0, 0, 1]] * 2).all()


# ------------------------------------------------------------------------------------------------------------ the loop
class CountVectorEnv(MemberVectorEnv):
    """Observation: member and step. Reward: the step squared. Member 0 ends at step 13, the others time out at 17."""

    def __init__(self, num_envs=1, max_episode_steps=17, render_mode=None):
        super().__init__(num_envs, 2, 1, max_episode_steps, render_mode)

    def begin(self, members):
        pass

    def advance(self, actions, running):
        now = self.steps + 1
        return running * now**2, running & (now == 13) & (np.arange(self.num_envs) == 0)

    def observations(self):
        return np.stack([np.arange(self.num_envs), self.steps], 1).astype(np.float32)


@pytest.fixture
def count_args(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "count", Task(envs="tests.test_diayn:CountVectorEnv", max_return=1.0))
    return tiny_args(
        env_id="count", total_timesteps=300, discover_steps=120, skill_horizon=5, num_envs=3, warmup_steps=60,
        updates_per_step=0.05, reward_scale=0.5, eval_episodes=2, gamma=0.9, run_dir=str(tmp_path),
    )  # fmt: skip


def test_rows_of_both_phases(count_args, tmp_path, monkeypatch):
    """Discovery: 40 env steps of 3 members, a skill per episode. Control: 60 more, a skill for at most 5 env steps.

    The first 20 have uniform actions.
    """
    acted = []
    act = diayn.Agent.act
    noted = lambda agent, obs, z, explore: explore and acted.append(z.copy()) or act(agent, obs, z, explore)  # noqa: E731
    monkeypatch.setattr(diayn.Agent, "act", noted)
    diayn.train(count_args)
    assert len(acted) == 80
    acted = np.concatenate([np.full((20, 3, 3), np.nan), acted])  # (100, E, Z)
    (run_dir,) = tmp_path.iterdir()
    state = torch.load(run_dir / "checkpoint.pt", weights_only=True)

    names = "obs action z rewards next_obs discount".split()
    rb = {name: column.numpy() for name, column in zip(names, state["rb"]["columns"])}
    assert state["rb"]["added"] == 120
    expected, begin = set(), {}
    for t, member in np.ndindex(100, 3):
        length = 13 if member == 0 else 17
        before, after = t % length, t % length + 1
        end = member == 0 and after == 13
        if t < 40:  # discovery
            row = 3 * t + member
            assert rb["obs"][row].tolist() == [member, before] and rb["next_obs"][row].tolist() == [member, after]
            assert rb["discount"][row] == np.float32(0.0 if end else 0.9)
            assert before == 0 or (rb["z"][row] == rb["z"][row - 3]).all()  # the same skill as one step before
        if before % 5 == 0:
            begin[member] = before
        if t >= 40 and (after % 5 == 0 or after == length):
            rewards = sum(0.5 * k**2 for k in range(begin[member] + 1, after + 1))
            skill = int(acted[t, member].argmax())
            expected.add((member, begin[member], rewards, after, 0.0 if end else 0.9, skill, t))
        elif 40 <= t < 99:  # the skill goes on
            assert (acted[t + 1, member] == acted[t, member]).all()
    assert (rb["z"].sum(1) == 1).all() and (rb["z"].max(0) == 1).all()
    uniform = rb["action"][:60]
    assert np.abs(uniform).max() <= 1 and uniform.min() < -0.8 and uniform.max() > 0.8
    columns = [state["choices"]["columns"][k].numpy() for k in (0, 3, 4, 5, 2)]
    rows = np.concatenate([column.reshape(len(column), -1) for column in columns], 1)
    found = sorted((m, b, r, a, round(float(d), 6), z.index(1)) for m, b, r, _, a, d, *z in rows.tolist())
    assert found == sorted(row[:6] for row in expected)
    assert len({row[5] for row in expected}) == 3
    assert state["progress"][1] == int((300 - 60) * 0.05)  # updates


def test_long_episodes_are_cut_in_discovery_alone(count_args, tmp_path):
    """Discovery: time-outs after 8 steps, then others' skills may begin; control: the task's own 13 and 17."""
    count_args.discover_length = 8
    diayn.train(count_args)
    (run_dir,) = tmp_path.iterdir()
    obs, _, z, _, _, discount = torch.load(run_dir / "checkpoint.pt", weights_only=True)["rb"]["columns"]
    before = obs[:120, 1].reshape(40, 3)
    assert torch.equal(before, (torch.arange(40) % 8).float()[:, None].expand(40, 3))
    assert (discount[:120] == np.float32(0.9)).all()  # cut, not ended
    z = z[:120].reshape(40, 3, 3)
    same = (z[1:] == z[:-1]).all(-1)  # (39, 3)
    begins = torch.arange(1, 40) % 8 == 0
    assert same[~begins].all() and not same[begins].all()
    with (run_dir / "episodes.csv").open() as file:
        rows = [(int(row["env_step"]), int(row["episodic_length"])) for row in csv.DictReader(file)]
    assert {length for step, length in rows if step <= 120} == {8}
    assert {length for step, length in rows if step > 150} == {13, 17}


def test_skills_do_not_change_in_control(count_args):
    """The controller alone does, towards targets that are as soft as it acts."""
    torch.manual_seed(0)
    count_args.controller_alpha = 0.7
    agent = diayn.Agent(count_args, 2, 1)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    z = torch.eye(3)[torch.randint(3, (8,))]
    rewards, next_obs = torch.randn(8), torch.randn(8, 2)
    next_q = torch.minimum(*agent.controller_target(next_obs))  # of each skill the smaller value
    expected = rewards + 0.9 * diayn.soft_value(next_q, count_args.controller_alpha)
    metrics = agent.update_controller(torch.randn(8, 2), torch.zeros(8, 0), z, rewards, next_obs, torch.full((8,), 0.9))
    assert metrics["controller_target"].item() == pytest.approx(expected.mean().item(), rel=1e-5)
    changed = {name.split(".")[0] for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"controller", "controller_target"}
    for name, now in agent.controller.state_dict().items():
        slow = torch.lerp(before[f"controller_target.{name}"], now, count_args.tau)
        torch.testing.assert_close(agent.controller_target.state_dict()[name], slow)


def test_an_evaluation_changes_the_skill_every_few_steps(count_args):
    """The controller is told to take skill n (modulo 3) when it is asked for the n-th time."""
    agent = diayn.Agent(count_args, 2, 1)
    asked = []

    def choose_skills(obs, explore):
        asked.append(obs[:, 1].tolist())
        return np.eye(3, dtype=np.float32)[np.full(len(obs), len(asked) % 3)]

    acted = []
    agent.choose_skills = choose_skills
    agent.act = lambda obs, z, explore: acted.append((z.argmax(1).tolist(), explore)) or np.zeros((2, 1))
    diayn.rollout(agent, count_args, 2, seed=0)
    assert asked[:3] == [[0, 0], [5, 5], [10, 10]]
    assert acted[:11] == 5 * [([1, 1], False)] + 5 * [([2, 2], False)] + [([0, 0], False)]


# ------------------------------------------------------------------------------------------------------------ learning
class LineVectorEnv(MemberVectorEnv):
    """A point on a line of length 2, begins in the middle, moves at most 0.25; 8 steps."""

    saved = {"position": np.float64}

    def __init__(self, num_envs=1, max_episode_steps=8, render_mode=None):
        super().__init__(num_envs, 1, 1, max_episode_steps, render_mode)
        self.position = np.zeros((num_envs, 1))

    def begin(self, members):
        self.position[members] = 0

    def advance(self, actions, running):
        self.position = np.clip(self.position + 0.25 * actions * running[:, None], -1, 1)
        return 1.0 * (self.position[:, 0] < -0.7), np.zeros(self.num_envs, dtype=bool)

    def observations(self):
        return self.position.astype(np.float32)


def test_it_learns_skills_that_part_and_then_the_task(tmp_path, monkeypatch):
    """Two skills of a line must part; the task, to be at the left, is then a choice between them."""
    monkeypatch.setitem(TASKS, "line", Task(envs="tests.test_diayn:LineVectorEnv", max_return=6.0))
    args = tiny_args(
        env_id="line", total_timesteps=2_800, discover_steps=2_000, skill_dim=2, skill_horizon=2, num_envs=4,
        warmup_steps=100, updates_per_step=0.4, alpha=0.03, learning_rate=3e-3, gamma=0.9, batch_size=64, hidden_dim=32,
        buffer_size=2_000, eval_interval=10_000, run_dir=str(tmp_path),
    )  # fmt: skip
    results = diayn.train(args)
    (run_dir,) = tmp_path.iterdir()
    agent = diayn.Agent(args, 1, 1)
    diayn.load(run_dir / "checkpoint.pt", dict(agent=agent))
    returns = []
    for z in np.eye(2, dtype=np.float32):
        agent.choose_skills = lambda obs, explore: z[None]  # noqa: B023
        returns.append(diayn.rollout(agent, args, 1, seed=0)["episodic_return"])
    assert min(returns) == 0 and max(returns) >= 2
    assert results["evaluations"][-1][1] == max(returns)


# ------------------------------------------------------------------------------------------------- the committed logs
LOGS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "studies" / "diayn"


def test_the_committed_box_has_passed():
    """Paths are possible ones, and skills end apart: so far that each end is told from all others."""
    facts = json.loads((LOGS / "box_seed1.json").read_text())
    assert facts["passed"] and facts["gate"]["bound"] < facts["bound"] < np.log(10)
    paths = np.loadtxt(LOGS / "box_seed1.csv", delimiter=",", skiprows=1)[:, 2:].reshape(10, 101, 2)
    assert (paths[:, 0] == 0.5).all() and paths.min() >= 0 and paths.max() <= 1
    assert np.abs(np.diff(paths, axis=1)).max() < 0.1001
    ends = paths[:, -1]
    apart = np.linalg.norm(ends[:, None] - ends, axis=-1)[~np.eye(10, dtype=bool)]
    assert apart.min() > 0.1


def test_the_committed_pendulums_differ():
    """With - log p(z) skills learn to balance; without it, where each step costs, all let the pole fall at once."""
    for name, least, most in (("pendulum", 40, 1_000), ("pendulum_without", 1, 4)):
        facts = json.loads((LOGS / f"{name}_seed1.json").read_text())
        lengths = np.loadtxt(LOGS / f"{name}_seed1.csv", delimiter=",", skiprows=1)[-20:, 1]
        assert least <= lengths.mean() <= most and lengths.mean() == pytest.approx(facts["last_20_length"])
        assert max(facts["skill_lengths"]) > 100 or name == "pendulum_without"
        assert max(facts["skill_lengths"]) < 5 or name == "pendulum"
