"""sac.py against numerical Jacobians, hand-made targets, a loop over rewards, and Gymnasium's pendulum."""

import copy

import numpy as np
import pytest
import torch
from numpy_nets import NO_SCORES, np_features, np_net, random_obs

from algos import dads, diayn, sac
from data_tools.tasks.maze import MazeVectorEnv


def tiny_args(file=sac, **changes):
    small = dict(device="cpu", cudagraphs=False, hidden_dim=32, num_envs=2, batch_size=16, buffer_size=50)
    return file.Args(**(small | changes))


@pytest.mark.parametrize("file", [sac, dads, diayn])
def test_networks_against_numpy(file):
    """States of the maze, in dads.py and diayn.py with a skill behind them."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    skill_dim = 0 if file is sac else 3
    args = tiny_args(file) if file is sac else tiny_args(file, skill_dim=skill_dim)
    obs_dim = {sac: 4, dads: 4, diayn: 7}[file]  # diayn.py counts the skill
    actor, critics = file.Actor(obs_dim, 2, args).double(), file.TwinQ(obs_dim, 2, args).double()
    obs, z, action = random_obs(rng, 50), rng.normal(size=(50, skill_dim)), rng.uniform(-1, 1, (50, 2))
    x = np_features(obs)
    x = np.concatenate([x[:, :4], z, x[:, 4:]] if file is diayn else [x, z], -1)
    state = torch.from_numpy(np.concatenate([obs, z], -1))
    mean, raw = np.split(np_net(actor.net, x), 2, -1)
    found_mean, found_std = (value.detach().numpy() for value in actor(state))
    np.testing.assert_allclose(found_mean, mean, atol=1e-5)
    np.testing.assert_allclose(np.log(found_std), -5 + 7 * (np.tanh(raw) + 1) / 2, atol=1e-5)
    actor.net[-1].weight.data *= 1000
    log_std = actor(state)[1].log()  # far out it keeps to its bounds
    assert (log_std.min().item(), log_std.max().item()) == pytest.approx((-5, 2))
    inputs = np.concatenate([x, action], -1)
    for found, net in zip(critics(state, torch.from_numpy(action)), (critics.qf1, critics.qf2)):
        np.testing.assert_allclose(found.detach().numpy(), np_net(net, inputs)[:, 0], atol=1e-5)


def test_log_probability_is_that_of_the_squashed_gaussian():
    torch.manual_seed(0)
    actor = sac.Actor(4, 3, tiny_args()).double()
    actor.inputs.double()
    obs = torch.randn(4, dtype=torch.float64)
    mean, std = actor(obs)
    torch.manual_seed(1)
    expected_noise = torch.randn_like(mean)
    torch.manual_seed(1)
    action, log_prob = actor.sample(obs)
    x = mean + std * expected_noise
    jacobian = torch.autograd.functional.jacobian(torch.tanh, x)
    density = torch.distributions.Normal(mean, std).log_prob(x).sum() - torch.linalg.slogdet(jacobian)[1]
    assert torch.allclose(action, torch.tanh(x))
    assert torch.allclose(log_prob, density)
    # Far out, where 1 - tanh(x)^2 is 0 in floating point, it stays finite
    with torch.no_grad():
        actor.net[-1].bias[:3] = 50.0
    assert actor.sample(obs)[1].isfinite()


class Constant(torch.nn.Module):
    """In place of critics and actor: what they are told to return."""

    def __init__(self, *values):
        super().__init__()
        self.values = values

    def forward(self, *inputs):
        self.inputs = inputs
        return self.values if len(self.values) > 1 else self.values[0]

    def sample(self, obs):
        self.inputs = (obs,)
        return self.values


def test_targets_bootstrap_through_time_outs_only():
    log_prob = torch.tensor([-2.0, -2.0])
    actor = Constant(torch.zeros(2, 1), log_prob)
    target = Constant(torch.tensor([10.0, 10.0]), torch.tensor([12.0, 8.0]))  # the smaller one counts
    critics = Constant(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0]))
    discount = torch.tensor([0.9, 0.0])  # the second transition ends
    rewards = torch.tensor([3.0, 5.0])
    obs, action, next_obs = torch.randn(3, 2, 1)
    batch = obs, action, rewards, next_obs, discount
    loss, metrics = sac.soft_critic_loss(critics, target, actor, *batch, torch.tensor(0.5))
    assert critics.inputs == (obs, action)
    assert actor.inputs == (next_obs,) and target.inputs == (next_obs, actor.values[0])
    targets = np.array([3 + 0.9 * (10 + 0.5 * 2), 5.0])
    expected = 0.5 * np.mean((1 - targets) ** 2 + (2 - targets) ** 2)
    assert loss.item() == pytest.approx(expected)
    assert metrics["td_target"].item() == pytest.approx(targets.mean())


def test_actions_are_samples_in_training_and_modes_elsewhere():
    torch.manual_seed(0)
    agent = sac.Agent(tiny_args(), 4, 2)
    obs = torch.randn(5, 4)
    torch.manual_seed(1)
    action = agent.act(obs.numpy(), explore=True)
    torch.manual_seed(1)
    np.testing.assert_array_equal(action, agent.actor.sample(obs)[0].detach())
    np.testing.assert_array_equal(agent.act(obs.numpy(), explore=False), agent.actor(obs)[0].tanh().detach())


@pytest.mark.parametrize("n", [1, 3, 4])
def test_rows_hold_the_sums_of_n_rewards(n):
    """Against a loop over whole episodes: lengths 7 (a true end) and 5 (a time-out), with 2 rows still running."""
    gamma = 0.9
    args = tiny_args(n_step=n, gamma=gamma, num_envs=1)
    rb = sac.ReplayBuffer(1, 1, args)
    rng = np.random.default_rng(0)
    lengths = [(7, "end"), (5, "time-out"), (2, "running")]
    expected = []
    for length, how in lengths:
        first = rng.normal()
        rewards = rng.normal(size=length).astype(np.float32)
        for t in range(length):
            last = t == length - 1
            flags = np.array([last and how == "end"]), np.array([last and how == "time-out"])
            state = np.array([[first + t]], np.float32)
            following = np.array([[first + t + 1]], np.float32)
            rb.add(state, np.array([[t]], np.float32), rewards[t : t + 1], *flags, following)
        for t in range(length):
            m = min(n, length - t)
            if how == "running" and t + n > length:
                continue  # not complete yet
            ends = how == "end" and t + m == length
            total = sum(gamma**k * rewards[t + k] for k in range(m))
            expected.append((first + t, t, total, first + t + m, 0.0 if ends else gamma**m))
    assert len(rb) == len(expected)
    rows = torch.stack([column[: len(rb)].flatten() for column in rb.columns], 1).numpy()
    order = np.lexsort((rows[:, 1], rows[:, 0]))
    wanted = np.array(expected)
    wanted = wanted[np.lexsort((wanted[:, 1], wanted[:, 0]))]
    np.testing.assert_allclose(rows[order], wanted, rtol=1e-5)


def test_ring_keeps_the_last_rows_and_survives_a_checkpoint():
    args = tiny_args(buffer_size=10, n_step=2)
    rb = sac.ReplayBuffer(1, 1, args)
    no = np.zeros(2, dtype=bool)
    for t in range(13):
        state = np.full((2, 1), t, np.float32)
        rb.add(state, state, np.ones(2, np.float32), no, no, state + 1)
        if t == 3:  # nothing is drawn from what is not filled yet
            assert set(rb.sample(400)[3].flatten().tolist()) == {2, 3, 4}
    assert len(rb) == 10 and sorted(set(rb.columns[0].flatten().tolist())) == [7, 8, 9, 10, 11]
    other = sac.ReplayBuffer(1, 1, args)
    other.load_state_dict(copy.deepcopy(rb.state_dict()))
    end = np.array([True, False])
    for buffer in (rb, other):
        buffer.add(state, state, np.ones(2, np.float32), end, no, state + 1)
    assert all(map(torch.equal, rb.columns, other.columns))


@pytest.mark.parametrize("file", [sac, dads])
def test_alpha_rises_while_the_policy_is_not_random_enough(file):
    """Against the policy's entropy in NumPy: log alpha goes up by the rate if it is .1 below its target, else down.

    The target is -1 nat per entry of an action, in dads.py half of that; it is moved to where the policy is.
    """
    torch.manual_seed(0)
    agent = file.Agent(tiny_args(file, learning_rate=1e-3), 4, 2)
    torch.nn.init.normal_(agent.actor.net[-1].weight, std=0.1)  # stds and means of many sizes
    obs, next_obs = torch.randn(2, 10_000, 4)
    z = []
    if file is dads:  # the skill is a part of the state
        z = [2 * torch.rand(10_000, agent.args.skill_dim) - 1]
    with torch.no_grad():
        mean, std = (x.numpy() for x in agent.actor(torch.cat([obs, *z], 1)))
    noise = np.random.default_rng(0).normal(size=mean.shape)
    log_density = -0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi)
    log_density -= np.log(1 - np.tanh(mean + std * noise) ** 2 + 1e-12)
    entropy = -log_density.sum(1).mean()
    rest = [*z, next_obs] if file is dads else [torch.randn(10_000), next_obs]
    start = copy.deepcopy(agent)
    target = -2.0 if file is sac else -1.0
    for excess in (-0.1, 0.1):
        other = copy.deepcopy(start)
        other.alpha_optimizer = torch.optim.Adam([other.log_alpha], lr=1e-3)
        other.target_entropy += entropy - excess - target
        other.update(obs, torch.rand(10_000, 2), *rest, torch.full((10_000,), 0.9))
        assert other.log_alpha.item() - start.log_alpha.item() == pytest.approx(-0.01 * excess, rel=0.01)


def test_policy_loss_against_numpy():
    """alpha log pi - min(Q1, Q2) of 100,000 actions that NumPy draws; the critics disagree, alpha is not small."""

    class Critics(torch.nn.Module):
        def forward(self, obs, action):
            return action[:, 0] + obs[:, 0], 2 * action[:, 1] - obs[:, 1]

    torch.manual_seed(0)
    actor = sac.Actor(4, 2, tiny_args())
    torch.nn.init.normal_(actor.net[-1].weight, std=0.1)
    obs = torch.randn(100_000, 4)
    with torch.no_grad():
        loss, metrics = sac.policy_loss(Critics(), actor, obs, torch.tensor(0.5))
        mean, std = (x.numpy() for x in actor(obs))
    noise = np.random.default_rng(0).normal(size=mean.shape)
    action = np.tanh(mean + std * noise)
    log_density = -0.5 * noise**2 - np.log(std) - 0.5 * np.log(2 * np.pi) - np.log(1 - action**2 + 1e-12)
    log_density = log_density.sum(1)
    q_value = np.minimum(action[:, 0] + obs[:, 0].numpy(), 2 * action[:, 1] - obs[:, 1].numpy())
    assert loss.item() == pytest.approx((0.5 * log_density - q_value).mean(), abs=0.03)
    assert metrics["entropy"].item() == pytest.approx(-log_density.mean(), abs=0.03)
    assert metrics["policy_q"].item() == pytest.approx(q_value.mean(), abs=0.03)


def test_an_update_moves_the_slow_copies_by_tau_and_critics_and_policy_by_their_own_losses():
    torch.manual_seed(0)
    args = tiny_args(tau=0.1)
    agent = sac.Agent(args, 4, 2)
    for weight in agent.target.parameters():
        torch.nn.init.normal_(weight, std=0.3)
    reference = copy.deepcopy(agent)
    batch = torch.randn(8, 4), torch.rand(8, 2), torch.randn(8), torch.randn(8, 4), torch.full((8,), 0.9)
    torch.manual_seed(1)
    loss, _ = sac.soft_critic_loss(
        reference.critics, reference.target, reference.actor, *batch, reference.log_alpha.exp().detach()
    )
    loss.backward()
    # The first step of Adam is one learning rate against the gradient; the policy sees the critics of after theirs
    for weight in reference.critics.parameters():
        weight.data -= args.learning_rate * weight.grad / (weight.grad.abs() + 1e-8)
    reference.critics.requires_grad_(False)
    sac.policy_loss(reference.critics, reference.actor, batch[0], torch.ones(()))[0].backward()
    for weight in reference.actor.parameters():
        weight.data -= args.learning_rate * weight.grad / (weight.grad.abs() + 1e-8)
    torch.manual_seed(1)
    agent.update(*batch)
    groups = agent.critics, reference.critics, agent.target, reference.target
    for now, expected, slow, old in zip(*(group.parameters() for group in groups)):
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(slow, 0.9 * old + 0.1 * now)
    for now, expected in zip(agent.actor.parameters(), reference.actor.parameters()):
        torch.testing.assert_close(now, expected, rtol=1e-3, atol=1e-5)
    mean, _ = agent.actor(batch[0])
    np.testing.assert_allclose(agent.act(batch[0].numpy(), explore=False), torch.tanh(mean).detach().numpy())
    assert np.abs(agent.act(batch[0].numpy(), explore=True) - torch.tanh(mean).detach().numpy()).max() > 0.01


def test_actions_are_kept_for_repeat_env_steps(monkeypatch, tmp_path):
    """In the warm-up, where they are uniform, and after it."""
    seen = []
    step = MazeVectorEnv.step
    monkeypatch.setattr(MazeVectorEnv, "step", lambda envs, action: seen.append(action.copy()) or step(envs, action))
    monkeypatch.setattr(sac, "rollout", lambda *args: NO_SCORES)
    flags = f"--device cpu --num-envs 6 --repeat 3 --warmup-steps 70 --total-timesteps 144 --run-dir {tmp_path}"
    args = sac.parse_args([*flags.split(), "--hidden-dim", "8", "--updates-per-step", "0.03", "--batch-size", "4"])
    results = sac.train(args)
    actions = np.array(seen)  # (24, E, A)
    np.testing.assert_array_equal(actions, np.repeat(actions[::3], 3, axis=0))
    assert (np.diff(actions[::3], axis=0) != 0).all()
    assert actions[:12].min() < -0.7 and actions[:12].max() > 0.7
    assert results["updates"] == 2  # .03 per env step after the warm-up


def test_it_learns_the_pendulum(tmp_path):
    """Random actions get about -1,200 an episode, a good policy about -150."""
    flags = "--env-id Pendulum-v1 --device cpu --num-envs 4 --hidden-dim 64 --batch-size 128 --warmup-steps 800"
    flags += " --learning-rate 6e-3 --tau 0.02 --buffer-size 10000 --updates-per-step 0.25 --total-timesteps 4800"
    sac.train(sac.parse_args([*flags.split(), "--eval-episodes", "1", "--run-dir", str(tmp_path)]))
    (log,) = tmp_path.glob("*/episodes.csv")
    returns = np.loadtxt(log, delimiter=",", skiprows=1)[:, 1]
    assert np.mean(returns[:5]) < -800
    assert np.mean(returns[-5:]) > -400
