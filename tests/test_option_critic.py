"""option_critic.py against exact gradients, a linear system, plain actor-critics, loops, and small problems.

The task "line", a point that moves left or right for 8 env steps, is that of test_diayn.py.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from algos import option_critic as oc
from data_tools import TASKS, Task


def tiny_args(**changes):
    small = dict(device="cpu", hidden_dim=8, num_envs=2, batch_size=12, num_options=3)
    return oc.Args(**(small | changes))


# ----------------------------------------------------------------------------------------------- theorems, in tables
class SmallProblem:
    """Three states, two options, two actions, at random; the best option is chosen anew where one ends."""

    gamma = 0.9

    def __init__(self, seed: int):
        rng = np.random.default_rng(seed)
        self.P = rng.dirichlet(np.ones(3), (3, 2))  # (S, A, S)
        self.r = rng.normal(size=(3, 2))
        self.preference = rng.normal(size=(3, 2, 2))  # (S, W, A)
        self.beta_logit = rng.normal(size=(3, 2))
        self.best = np.zeros(3, dtype=int)
        while not (self.best == self.q().argmax(1)).all():  # policy iteration over options
            self.best = self.q().argmax(1)
        self.start = 0, 1 - self.best[0]  # where the return is counted from: state 0, its worse option

    def matrices(self):
        """Of pairs (s, w): mean reward (6,), and gamma times the probability of the next pair (6, 6)."""
        pi = np.exp(self.preference)
        pi /= pi.sum(-1, keepdims=True)
        beta = 1 / (1 + np.exp(-self.beta_logit))
        rewards = np.einsum("swa,sa->sw", pi, self.r)
        following = np.zeros((3, 2, 3, 2))
        for s, w, a, n in np.ndindex(3, 2, 2, 3):
            p = pi[s, w, a] * self.P[s, a, n]
            following[s, w, n, w] += p * (1 - beta[n, w])
            following[s, w, n, self.best[n]] += p * beta[n, w]
        return rewards.ravel(), self.gamma * following.reshape(6, 6), pi

    def q(self):
        rewards, following, _ = self.matrices()
        return np.linalg.solve(np.eye(6) - following, rewards).reshape(3, 2)

    def slopes(self, table):
        """Central differences of the return from the start, in each entry of a table."""
        result = np.zeros_like(table)
        for index in np.ndindex(table.shape):
            values = []
            for change in (1e-5, -1e-5):
                table[index] += change
                values.append(self.q()[self.start])
                table[index] -= change
            result[index] = (values[0] - values[1]) / 2e-5
        return result


def every_step(problem, critic_lr):
    """All (s, w, a, s') as runs side by side that start with the exact tables; their discounted weight, and tables."""
    _, following, pi = problem.matrices()
    visits = np.linalg.solve(np.eye(6) - following.T, np.eye(6)[problem.start[1]]).reshape(3, 2)
    s, w, a, n = np.indices((3, 2, 2, 3)).reshape(4, -1)
    weight = visits[s, w] * pi[s, w, a] * problem.P[s, a, n]
    tables = oc.Tables(len(s), 3, 2, 2, problem.gamma)
    tables.temperature = 1.0
    tables.critic_lr, tables.policy_lr, tables.beta_lr = critic_lr, 1.0, 1.0
    q = problem.q()
    arrival = q + (q[range(3), problem.best][:, None] - q) / (1 + np.exp(-problem.beta_logit))  # (S, W), eq. 3
    tables.q[:] = q
    tables.q_action[:] = (problem.r[:, :, None] + problem.gamma * problem.P @ arrival).transpose(0, 2, 1)
    tables.preference[:] = problem.preference
    tables.beta_logit[:] = problem.beta_logit
    tables.learn(s, w, a, problem.r[s, a], n, np.zeros(len(s), dtype=bool))
    return weight, tables, (s, w, a)


@pytest.mark.parametrize("seed", [0, 1])
def test_both_theorems_are_the_slopes_of_the_return(seed):
    problem = SmallProblem(seed)
    weight, tables, _ = every_step(problem, critic_lr=0.0)
    policies = np.tensordot(weight, tables.preference - problem.preference, 1)
    ends = problem.gamma * np.tensordot(weight, tables.beta_logit - problem.beta_logit, 1)
    np.testing.assert_allclose(policies, problem.slopes(problem.preference), atol=1e-7)
    np.testing.assert_allclose(ends, problem.slopes(problem.beta_logit), atol=1e-7)
    assert np.abs(policies).max() > 0.05 and np.abs(ends).max() > 0.01


def test_the_exact_critic_is_the_fixed_point_of_the_targets():
    problem = SmallProblem(2)
    weight, tables, (s, w, a) = every_step(problem, critic_lr=1.0)  # tables become their targets
    q = np.zeros((3, 2))
    total = np.zeros((3, 2))
    np.add.at(q, (s, w), weight * tables.q_action[tables.runs, s, w, a])
    np.add.at(total, (s, w), weight)
    np.testing.assert_allclose(q / total, problem.q(), atol=1e-9)


def test_one_option_is_an_actor_critic():
    """Whatever its ends do: against a plain one, for 300 steps in a circle of five states."""
    rng = np.random.default_rng(0)
    tables = oc.Tables(1, 5, 1, 2, 0.9)
    tables.beta_logit[:] = rng.normal(size=(1, 5, 1))
    value = np.zeros(5)
    action_value = np.zeros((5, 2))
    preference = np.zeros((5, 2))
    s = 0
    one = np.array([0])
    for _ in range(300):
        a = rng.integers(2)
        n = (s + 2 * a - 1) % 5
        end = n == 3
        tables.learn(one + s, one, one + a, np.array([float(a)]), one + n, np.array([end]))
        target = a + 0.9 * (not end) * value[n]
        action_value[s, a] += 0.5 * (target - action_value[s, a])
        value[s] += 0.5 * (target - value[s])
        pi = np.exp(preference[s] / 0.01 - (preference[s] / 0.01).max())
        pi /= pi.sum()
        preference[s] += 0.25 * (action_value[s, a] - value[s]) * (np.eye(2)[a] - pi)
        s = n
    np.testing.assert_allclose(tables.q[0, :, 0], value)
    np.testing.assert_allclose(tables.preference[0, :, 0], preference)


# --------------------------------------------------------------------------------------------------------- four rooms
@pytest.mark.parametrize(("paper_slip", "fewest"), [(False, 8.4), (True, 12.1)])
def test_four_rooms_are_those_of_the_paper(paper_slip, fewest):
    """Size, goal and the best policy's steps; transitions against a simulation that walks on the map."""
    transitions = oc.four_rooms(paper_slip)
    assert transitions.shape == (104, 4, 104)
    rows = oc.FOUR_ROOMS.strip("\n").split("\n")
    cells = [(y, x) for y, row in enumerate(rows) for x, cell in enumerate(row) if cell == " "]
    assert cells[oc.FIRST_GOAL] == (7, 9)
    lower_right = [number for number, (y, x) in enumerate(cells) if y > 7 and x > 5]  # with a doorway, as the release
    assert oc.LATER_GOALS == lower_right and len(lower_right) == 21
    assert oc.mean_fewest_steps(transitions, oc.FIRST_GOAL) == pytest.approx(fewest, abs=0.05)

    rng = np.random.default_rng(0)
    moves = [(-1, 0), (1, 0), (0, -1), (0, 1)]

    def walk(cell, move):
        new = cell[0] + move[0], cell[1] + move[1]
        return new if new in cells else cell

    for s in (0, 25, 62):  # a corner, a doorway, the goal
        for a, move in enumerate(moves):
            counts = np.zeros(104)
            for _ in range(1_500):
                cell = cells[s]
                slips = rng.random() < 1 / 3
                new = walk(cell, move)
                if slips and (paper_slip or new != cell):
                    start = cell if paper_slip else new
                    free = [walk(start, m) for m in moves if walk(start, m) != start]
                    new = free[rng.integers(len(free))]
                counts[cells.index(new)] += 1
            np.testing.assert_allclose(counts / 1_500, transitions[s, a], atol=0.05)  # 4 standard errors


def test_it_learns_the_four_rooms_and_writes_how(tmp_path, capsys):
    args = tiny_args(num_runs=10, num_episodes=120, num_options=4, four_rooms=True, run_dir=str(tmp_path))
    results = oc.train(args)
    (table,) = tmp_path.iterdir()
    episode, steps, option_length = np.loadtxt(table, delimiter=",", skiprows=1).T
    assert (episode == range(120)).all() and (steps <= 1_000).all() and (steps >= option_length).all()
    assert (option_length >= 1).all() and steps[:3].mean() > 200 and steps[50:60].mean() < 80
    assert steps[60:63].mean() > 200  # the goal has moved
    assert results["at_the_end"] == pytest.approx(steps[-6:].mean(), rel=1e-4) and str(table) in capsys.readouterr().out


def test_episodes_of_the_four_rooms(monkeypatch):
    """Nobody learns, no option ends by itself, and choice n is option n modulo 4: what each run did, step by step."""
    chosen, seen = [], []

    def choose_option(tables, rng, s):
        chosen.append(len(chosen) % 4)
        return np.full(40, chosen[-1])

    tables = oc.Tables(2, 3, 2, 4, 0.99)
    tables.q[:, 1, 1] = 1.0
    assert tables.choose_option(np.random.default_rng(0), np.array([1, 1])).tolist() == [1, 1]  # the best one
    arrived = []
    monkeypatch.setattr(oc.Tables, "choose_option", choose_option)
    monkeypatch.setattr(oc.Tables, "beta", lambda tables, s, w: arrived.append(s) or np.zeros(len(s)))
    monkeypatch.setattr(oc.Tables, "learn", lambda tables, *step: seen.append(step))
    steps, choices = oc.learn_four_rooms(tiny_args(num_runs=40, num_episodes=6, seed=0), 4)
    assert (choices == 1).all() and steps.max() == 1_000  # who gets lost is put back
    s, w, _, rewards, next_s, ends = np.array(seen, dtype=int).transpose(1, 2, 0)  # (R, steps) each
    assert np.array_equal(rewards, ends) and len(chosen) == len(seen)
    assert np.array_equal(np.transpose(arrived), next_s)  # options end where they arrive
    all_goals = []
    for run in range(40):
        goals = []
        t = 0
        for length in steps[run]:
            own = slice(t, t + length)
            assert (w[run, own] == chosen[t]).all()
            assert np.array_equal(s[run, own][1:], next_s[run, own][:-1]) and not ends[run, own][:-1].any()
            assert ends[run, own][-1] or length == 1_000
            goals.append(int(next_s[run, own][-1]) if ends[run, own][-1] else None)
            assert goals[-1] is None or not (s[run, own] == goals[-1]).any()  # it begins elsewhere
            t += length
        assert set(goals[:3]) <= {oc.FIRST_GOAL, None}
        later = set(goals[3:]) - {None}
        assert len(later) <= 1 and later <= set(oc.LATER_GOALS)
        all_goals += goals
    assert all_goals.count(oc.FIRST_GOAL) > 3 and len(set(all_goals) & set(oc.LATER_GOALS)) > 3


# ------------------------------------------------------------------------------------------------- returns and losses
def random_batch(args):
    """Eight environments, six env steps, four numbers in an observation and two in an action."""
    torch.manual_seed(1)
    begins, terminations, truncations = torch.rand(3, 8, 6) < 0.25
    obs, next_obs = torch.randn(2, 8, 6, 4)
    batch = dict(obs=obs, action=torch.randn(8, 6, 2), option=torch.randint(args.num_options, (8, 6)), begins=begins)
    batch |= dict(rewards=torch.randn(8, 6), terminations=terminations, truncations=truncations)
    return batch | dict(next_obs=next_obs)


@pytest.mark.parametrize("ends", [True, False])
def test_with_one_option_the_gradient_is_that_of_an_actor_critic(ends):
    """beta = 1: the one-step form; beta = 0 and no choice: n steps. Without true ends and time-outs."""
    args = tiny_args(num_options=1, deliberation_cost=0.0)
    torch.manual_seed(0)
    model = oc.OptionModel(4, 2, args)
    torch.nn.init.constant_(model.beta.bias, 50.0 if ends else -50.0)
    batch = random_batch(args)
    no = torch.zeros(8, 6, dtype=torch.bool)
    batch |= dict(option=no.long(), begins=no | ends, terminations=no, truncations=no)
    loss, _ = oc.option_critic_loss(model, **batch, args=args)
    loss.backward()
    found = [model.net[0].weight.grad.clone(), model.q.weight.grad.clone(), model.log_std.grad.clone()]
    model.zero_grad()

    h = model.net(model.inputs(batch["obs"]))
    value, mean = model.q(h)[..., 0], model.mean(h)
    next_value = model.q(model.net(model.inputs(batch["next_obs"])))[..., 0].detach()
    target = batch["rewards"] + 0.99 * next_value
    if not ends:
        for t in reversed(range(5)):
            target[:, t] = batch["rewards"][:, t] + 0.99 * target[:, t + 1]
    std = model.log_std[0].exp()
    distance = (batch["action"] - mean) / std
    log_prob = (-0.5 * distance.square() - std.log() - 0.5 * np.log(2 * np.pi)).sum(-1)
    entropy = (std.log() + 0.5 * np.log(2 * np.pi * np.e)).sum()
    advantage = target - value
    plain = 0.5 * advantage.square().mean() - (advantage.detach() * log_prob).mean() - 0.01 * entropy
    plain.backward()
    for gradient, layer in zip(found, (model.net[0].weight, model.q.weight, model.log_std)):
        assert torch.allclose(gradient, layer.grad, atol=1e-6)
    assert found[0].abs().max() > 1e-3


def test_losses_of_critic_and_policies_against_a_loop_forward():
    """Three options of their own means and stds.

    What follows is U(w, s') where the batch or the time ends, V(s') - .3 where the option ends.
    """
    args = tiny_args(deliberation_cost=0.3, option_epsilon=0.2, gamma=0.9)
    torch.manual_seed(0)
    model = oc.OptionModel(4, 2, args)
    torch.nn.init.normal_(model.q.weight)
    torch.nn.init.normal_(model.log_std)
    torch.nn.init.normal_(model.mean.weight)
    batch = random_batch(args)
    q, _, mean = [x.detach().numpy() for x in model(batch["obs"])]
    std = model.log_std.exp().detach().numpy()
    next_q, next_beta, _ = [x.detach().numpy() for x in model(batch["next_obs"])]
    b = {name: value.numpy() for name, value in batch.items()}
    errors, log_probs, entropies = [], [], []
    for e, t in np.ndindex(8, 6):
        total = 0.0
        for k in range(t, 6):
            total += 0.9 ** (k - t) * b["rewards"][e, k]
            new = 0.8 * next_q[e, k].max() + 0.2 * next_q[e, k].mean() - 0.3
            w = b["option"][e, k]
            on = (1 - next_beta[e, k, w]) * next_q[e, k, w] + next_beta[e, k, w] * new
            stops = k == 5 or b["truncations"][e, k] or b["terminations"][e, k] or b["begins"][e, k + 1]
            if stops:
                own = k == 5 or b["truncations"][e, k]
                total += 0.9 ** (k - t + 1) * (not b["terminations"][e, k]) * (on if own else new)
                break
        w = b["option"][e, t]
        errors.append(total - q[e, t, w])
        distance = (b["action"][e, t] - mean[e, t, w]) / std[w]
        log_probs.append((-0.5 * distance**2 - np.log(std[w] * np.sqrt(2 * np.pi))).sum())
        entropies.append(np.log(std[w] * np.sqrt(2 * np.pi * np.e)).sum())
    _, metrics = oc.option_critic_loss(model, **batch, args=args)
    assert metrics["value_loss"].item() == pytest.approx(0.5 * np.mean(np.square(errors)), rel=1e-4)
    assert metrics["policy_loss"].item() == pytest.approx(-np.mean(np.multiply(errors, log_probs)), rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx(np.mean(entropies), rel=1e-4)


def test_ends_follow_their_advantage_and_nothing_else_follows_them():
    args = tiny_args(deliberation_cost=0.3, option_epsilon=0.2)
    torch.manual_seed(0)
    model = oc.OptionModel(4, 2, args)
    batch = random_batch(args)
    oc.option_critic_loss(model, **batch, args=args)[0].backward()
    q, beta, _ = [x.detach().numpy() for x in model(batch["next_obs"])]
    expected = np.zeros(3)
    for e, t in np.ndindex(8, 6):
        w = batch["option"][e, t]
        value = 0.8 * q[e, t].max() + 0.2 * q[e, t].mean()
        if not batch["terminations"][e, t]:  # an option that is better than a new choice and its cost ends less often
            expected[w] += beta[e, t, w] * (1 - beta[e, t, w]) * (q[e, t, w] - value + 0.3) / 48
    np.testing.assert_allclose(model.beta.bias.grad, expected, rtol=1e-4)
    # Features do not follow the ends: with other weights of beta, which is in no target here, their gradient stays
    batch |= dict(begins=torch.ones(8, 6, dtype=torch.bool), truncations=torch.zeros(8, 6, dtype=torch.bool))
    batch["terminations"][:, -1] = True
    gradients = []
    for _ in range(2):
        with torch.no_grad():
            model.beta.weight.mul_(-3)
        model.zero_grad()
        oc.option_critic_loss(model, **batch, args=args)[0].backward()
        gradients.append([p.grad.clone() for p in model.net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ------------------------------------------------------------------------------------------------------------- acting
def test_options_end_as_often_as_beta_says():
    """Three options that end never, always, and half of the time, with stds of their own."""
    torch.manual_seed(0)
    agent = oc.Agent(tiny_args(option_epsilon=0.3), 4, 2)
    torch.nn.init.zeros_(agent.model.beta.weight)
    agent.model.beta.bias.data[:] = torch.tensor([-50.0, 50.0, 0.0])
    agent.model.log_std.data[:] = torch.tensor([[-0.5], [0.0], [-1.0]])
    obs = np.ones((4_000, 4), np.float32)
    best = int(agent.model(torch.ones(1, 4))[0].argmax())
    before = np.arange(4_000) % 3
    first = np.arange(4_000) < 1_000  # these episodes begin
    action, option, begins = agent.act(obs, before, first, explore=True)
    shares = [begins[~first & (before == w)].mean() for w in range(3)]
    assert begins[first].all() and shares == pytest.approx([0, 1, 0.5], abs=0.05)
    assert np.array_equal(option[~begins], before[~begins])
    assert (option[begins] == best).mean() == pytest.approx(0.7 + 0.3 / 3, abs=0.04)  # at random it may be the best
    mean = agent.model(torch.ones(1, 4))[2][0].detach().numpy()
    for w, std in enumerate(np.exp([-0.5, 0.0, -1.0])):
        np.testing.assert_allclose((action - mean[option])[option == w].std(0), std, rtol=0.15)
    quiet, option, _ = agent.act(obs, before, first, explore=False)
    np.testing.assert_allclose(quiet, mean[option], atol=1e-6)
    assert (option[first] == best).all()


def test_every_env_step_is_learnt_from_once(tmp_path, monkeypatch):
    """Rows of two updates, that an episode begins where the environment's does, and that options go on until then."""
    monkeypatch.setitem(TASKS, "line", Task(envs="tests.test_diayn:LineVectorEnv", max_return=8.0))
    seen = []
    update = oc.Agent.update
    monkeypatch.setattr(oc.Agent, "update", lambda agent, *b: seen.append([x.clone() for x in b]) or update(agent, *b))
    args = tiny_args(env_id="line", total_timesteps=24, eval_episodes=1, run_dir=str(tmp_path))
    oc.train(args)
    obs, action, option, begins, _, terminations, truncations, next_obs = [torch.cat(parts, 1) for parts in zip(*seen)]
    assert len(seen) == 2 and obs.shape == (2, 12, 1) and action.shape == (2, 12, 1)
    assert truncations.nonzero()[:, 1].tolist() == [7, 7] and not terminations.any()  # episodes of 8 steps
    assert begins[:, [0, 8]].all() and (obs[:, [0, 8]] == 0).all()
    goes_on = ~begins[:, 1:]
    assert torch.equal(option[:, 1:][goes_on], option[:, :-1][goes_on]) and option[:, 1:][goes_on].any()
    same = next_obs[:, :-1] == obs[:, 1:]
    assert same[:, [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]].all()
    moved = (obs + 0.25 * action.clip(-1, 1)).clip(-1, 1)
    assert torch.allclose(next_obs, moved, atol=1e-6)


def test_it_learns_to_go_left(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "line", Task(envs="tests.test_diayn:LineVectorEnv", max_return=6.0))
    args = oc.Args(
        env_id="line", device="cpu", total_timesteps=12_000, num_options=2, batch_size=128,
        num_envs=16, learning_rate=5e-3, gamma=0.9, run_dir=str(tmp_path), seed=1,
    )  # fmt: skip
    results = oc.train(args)
    assert results["evaluations"][-1][1] >= 5.0  # of 6; standing still gives 0


# ------------------------------------------------------------------------------------------------- the committed logs
def test_the_committed_four_rooms_have_passed():
    table = Path(__file__).resolve().parents[1] / "benchmarks/results/studies/option_critic/four_rooms_seed1.csv"
    facts = json.loads(table.with_suffix(".json").read_text())
    episode, options, one = np.loadtxt(table, delimiter=",", skiprows=1).T
    assert (episode == np.arange(2_000)).all()
    for name, steps in (("four_options", options), ("one_option", one)):
        assert steps[900:1_000].mean() == pytest.approx(facts[name]["last 100 before the goal moves"])
        assert steps[1_900:].mean() == pytest.approx(facts[name]["last 100"])
    assert facts["fewest_before"] < options[900:1_000].mean() < 20
    assert facts["fewest_after"] < options[1_900:].mean() < 0.25 * one[1_900:].mean()
    assert facts["passed"] and facts["fewest_before"] == pytest.approx(8.4, abs=0.05)


def test_an_evaluation_keeps_its_option_until_it_ends(monkeypatch):
    """Options that hardly ever end: the first choice acts in states in which another one would be chosen."""
    monkeypatch.setitem(TASKS, "line", Task(envs="tests.test_diayn:LineVectorEnv", max_return=6.0))
    torch.manual_seed(0)
    args = tiny_args(env_id="line", num_options=2)
    agent = oc.Agent(args, 1, 1)

    def model(obs):  # at 0 option 0 is the better one, which goes left, where option 1 is
        q = torch.cat([torch.full_like(obs, 0.1), -obs], 1)
        return q, torch.full_like(q, 1e-9), torch.tensor([[-1.0], [1.0]]).expand(len(obs), 2, 1)

    agent.model.forward = model
    assert oc.rollout(agent, args, 3, seed=0)["episodic_return"] == 6.0  # at the left from the third step on
