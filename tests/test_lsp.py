"""lsp.py: Dreamer where there are no skills, the mutual-information bound, the planner, and how long a skill lasts."""

import math

import numpy as np
import pytest
import torch
from numpy_nets import has_gradient
from test_dreamer import tiny_batch

from algos import dreamer, dreamer_skills, lsp, tdmpc

SIZES = dict(
    env_id="calvin", device="cpu", position_features=False, num_envs=2, deter_dim=12, stoch_dim=4,
    encoder_dim=16, hidden_dim=16, batch_size=6, batch_length=5, imagine_starts=20,
)  # fmt: skip


def tiny_args(**changes):
    small = dict(skill_horizon=4, num_skills=2, num_samples=8, num_elites=3, cem_iters=2)
    return lsp.Args(**(SIZES | small | changes))


def new_agent(args, seed=0, obs_dim=3, action_dim=2):
    torch.manual_seed(seed)
    return lsp.Agent(args, obs_dim, action_dim)


# ------------------------------------------------------------------------------------------------------- without skills
@pytest.mark.parametrize("continue_head", [False, True])
def test_without_skills_it_is_dreamer_bit_for_bit(continue_head):
    ours = tiny_args(skill_dim=0, random_skills=True, continue_head=continue_head)
    theirs = dreamer.Args(**SIZES, imagine_steps=4, continue_head=continue_head)
    one = new_agent(ours)
    torch.manual_seed(0)
    other = dreamer.Agent(theirs, 3, 2)
    memories = [one.new_memory(2), other.new_memory(2)]
    for k in range(4):
        metrics, actions = [], []
        for i, agent in enumerate((one, other)):
            torch.manual_seed(k)
            metrics.append(agent.update(*tiny_batch(ours, seed=k)))
            action, memories[i] = agent.act(np.full((2, 3), k, np.float32), memories[i], explore=True)
            actions.append(action)
        assert np.array_equal(*actions)
        for name in metrics[1].keys() - {"grad_norm"}:
            assert torch.equal(metrics[0][name], metrics[1][name]), name
        assert metrics[0]["skill_information"] == 0
    for name, value in other.state_dict().items():
        assert torch.equal(one.state_dict()[name], value), name


# --------------------------------------------------------------------------------------------------------------- losses
def test_information_is_the_difference_of_log_likelihoods():
    torch.manual_seed(0)
    predictor = lsp.SkillPredictor(tiny_args())
    start, feature, z = torch.randn(7, 16), torch.randn(4, 7, 16), torch.randn(7, 3)
    q = torch.distributions.Normal(*predictor(start, feature))
    p = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
    expected = (q.log_prob(z.expand(4, 7, 3)) - p.log_prob(z)).sum(-1)
    information = lsp.skill_information(predictor, start, feature, z)
    assert information.shape == (4, 7)
    torch.testing.assert_close(information, expected)
    loss = lsp.predictor_loss(predictor, start, feature, z)
    torch.testing.assert_close(loss, -expected.mean())
    # a predictor that knows nothing says N(0, I): no information; one that knows all is bounded by its least std
    with torch.no_grad():
        predictor.net[-1].weight.zero_()
        predictor.net[-1].bias.zero_()
        assert lsp.skill_information(predictor, start, feature, z).abs().max() == 0
        predictor.net[-1].bias[3:] = -1e6
    _, std = predictor(start, feature)
    torch.testing.assert_close(std, torch.full((4, 7, 3), math.exp(-5)))


def behave(agent, args, seed=3):
    torch.manual_seed(1)
    h, s = torch.randn(6, 5, 12), torch.randn(6, 5, 4)
    for frozen in (agent.model, agent.critic, agent.predictor):
        frozen.requires_grad_(False)
    torch.manual_seed(seed)
    return lsp.skill_loss(agent.model, agent.actor, agent.critic, agent.predictor, h, s, args)


def test_each_loss_moves_its_own_network_only():
    agent = new_agent(tiny_args())
    loss, _, for_critic, for_predictor = behave(agent, agent.args)
    loss.backward()
    assert has_gradient(agent.actor)
    assert not any(has_gradient(part) for part in (agent.model, agent.critic, agent.predictor))
    agent.predictor.requires_grad_(True)
    agent.actor_optimizer.zero_grad()
    lsp.predictor_loss(agent.predictor, *for_predictor).backward()
    assert has_gradient(agent.predictor) and not has_gradient(agent.actor)
    # The critic learns from returns alone: the information is not among them
    assert for_critic[0].shape == (3, 20, 16) and for_critic[1].shape == (3, 20)
    information = lsp.skill_information(agent.predictor, *for_predictor).mean()
    other, *rest = behave(agent, tiny_args(mi_coef=2.1))
    assert loss.item() - other.item() == pytest.approx(2.0 * information.item(), rel=1e-4)
    assert torch.equal(rest[1][1], for_critic[1])
    # The actor's gradient comes through the model alone
    agent.actor_optimizer.zero_grad()
    with torch.no_grad():
        agent.model.cell_input[0].weight[:, 4:] = 0  # actions change nothing
    behave(agent, agent.args)[0].backward()
    assert not has_gradient(agent.actor)


def test_a_start_has_one_skill_for_the_whole_imagination(monkeypatch):
    args = tiny_args(imagine_starts=7)
    agent = new_agent(args)
    seen, forward = [], agent.actor.forward
    agent.actor.forward = lambda feature, z: seen.append(z) or forward(feature, z)
    _, _, _, (start, feature, z) = behave(agent, args)
    assert len(seen) == 4 and all(torch.equal(other, z) for other in seen)
    assert z.shape == (7, 3) and len(z[:, 0].unique()) == 7 and feature.shape == (4, 7, 16)
    torch.manual_seed(1)
    h = torch.randn(6, 5, 12).flatten(0, 1)
    assert all((row[4:] == h).all(1).any() for row in start)  # starts are states of the batch


def test_skills_are_drawn_from_the_prior_that_the_bound_is_for():
    """N(0, I), in imagination and with --random-skills."""
    args = tiny_args(imagine_starts=2_000, random_skills=True)
    agent = new_agent(args)
    h, s = torch.randn(400, 5, 12), torch.randn(400, 5, 4)
    *_, (_, _, imagined) = lsp.skill_loss(agent.model, agent.actor, agent.critic, agent.predictor, h, s, args)
    _, memory = agent.act(np.zeros((2_000, 3), np.float32), agent.new_memory(2_000), explore=True)
    for z in (imagined, memory[3]):
        assert z.shape == (2_000, 3)
        np.testing.assert_allclose(z.mean(0), 0, atol=0.1)
        np.testing.assert_allclose(z.std(0), 1, atol=0.07)
        assert z.abs().max() > 2.5


def test_the_policy_makes_skills_tellable_apart():
    """Its gradient is that of the returns plus mi_coef times that of the information, through what is imagined."""
    gradients = []
    for mi_coef in (0.0, 1.0, 2.0):
        args = tiny_args(mi_coef=mi_coef)
        agent = new_agent(args)
        behave(agent, args)[0].backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in agent.actor.parameters()]))
    change = gradients[1] - gradients[0]
    assert change.norm() > 1e-3 * gradients[0].norm()
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * change, rtol=1e-3, atol=1e-6)


def test_information_rises_where_actions_can_be_seen():
    """o' = o + a: the model learns it, and then skills come to mean directions."""
    rates = dict(learning_rate=3e-3, actor_lr=3e-3, predictor_lr=3e-3)
    agent = new_agent(tiny_args(**rates, mi_coef=1.0, free_nats=0.5, batch_size=16, skill_dim=2), obs_dim=2)
    rng = np.random.default_rng(0)
    information = []
    for _ in range(300):
        action = rng.uniform(-1, 1, (16, 5, 2)).astype(np.float32)
        obs = torch.from_numpy(action.cumsum(1))
        nothing = torch.zeros(16, 5)
        metrics = agent.update(obs, torch.from_numpy(action), nothing, nothing)
        information.append(metrics["skill_information"].item())
    assert np.mean(information[:20]) < 0.2
    assert np.mean(information[-20:]) > 1


# -------------------------------------------------------------------------------------------------------------- planner
class Line:
    """A model whose s moves by the action and whose h counts steps; reward and value as given."""

    def __init__(self, reward):
        self.reward = reward
        self.continue_model = None

    def step(self, h, s, action):
        self.s = s + action
        return h + 1

    def prior(self, h):
        return self.s, torch.ones_like(self.s)


def test_planner_finds_the_best_skills():
    """Actions are the tanh of skills; the best are 1.2 for K steps, then -.4. Plans of both environments are apart."""
    args = tiny_args(skill_dim=1, num_samples=400, num_elites=20, cem_iters=8, skill_horizon=3, gamma=0.9)
    best = torch.tensor([1.2, -0.4])

    def reward(feature):  # s, h: how far s is from where the best skills lead
        s, h = feature.unbind(-1)
        steps = torch.stack([h.clamp(max=3), (h - 3).clamp(min=0)], -1)
        return -((s - (steps * torch.tanh(best)).sum(-1)) ** 2) * 50

    def actor(feature, z):
        return z, None

    torch.manual_seed(0)
    nothing = torch.zeros(2, 1)
    inputs = Line(reward), actor, lambda feature: reward(feature)[..., None], nothing, nothing
    z, mean = lsp.plan_skills(*inputs, torch.zeros(2, 2, 1), 0.0, args)
    torch.testing.assert_close(mean[..., 0], best.expand(2, 2), atol=0.08, rtol=0)
    assert torch.equal(z, mean[:, 0])
    many = torch.zeros(500, 1)
    args = tiny_args(skill_dim=1, num_samples=4, num_elites=2, cem_iters=1, skill_horizon=3)
    noisy, mean = lsp.plan_skills(*inputs[:3], many, many, torch.zeros(500, 2, 1), 1.0, args)
    assert (noisy - mean[:, 0]).std().item() == pytest.approx(0.1, rel=0.15)
    # Planned skills are at most 3
    args = tiny_args(skill_dim=1, num_samples=50, num_elites=2, cem_iters=20, skill_horizon=3)
    inputs = Line(lambda feature: feature[..., 0]), actor, lambda feature: feature[..., :1], nothing, nothing
    _, mean = lsp.plan_skills(*inputs, torch.full((2, 2, 1), 2.9), 0.0, args)
    assert mean.max() == 3


@pytest.mark.parametrize("continue_head", [False, True])
def test_plans_count_each_discounted_reward_once_and_the_value_of_the_last_state(continue_head):
    """One plan is its own elite: compared with a walk by hand. The critic holds the reward of the state it sees.

    A model of the end that says .8 everywhere takes the place of gamma, .9.
    """
    sizes = dict(skill_dim=1, num_samples=2, num_elites=1, cem_iters=1, skill_horizon=3)
    args = tiny_args(**sizes, gamma=0.9, continue_head=continue_head)
    goes_on = 0.8 if continue_head else 0.9
    model = Line(lambda feature: feature[..., 0])
    model.continue_model = lambda feature: torch.full_like(feature[..., :1], math.log(4))
    values = []

    def critic(feature):
        values.append(feature[..., :1] * 7)
        return values[-1]

    real, seen = torch.Tensor.topk, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "topk", lambda value, *rest: seen.append(value) or real(value, *rest))
        torch.manual_seed(0)
        nothing = torch.zeros(1, 1)
        inputs = model, lambda feature, z: (z, None), critic, nothing, nothing
        lsp.plan_skills(*inputs, torch.zeros(1, 2, 1), 0.0, args)
        torch.manual_seed(0)
        plans = torch.randn(1, 2, 2, 1).clamp(-3, 3)
    for p in range(2):
        s, total = 0.0, 0.0
        for t in range(6):
            s += math.tanh(plans[0, p, t // 3, 0])
            total += goes_on**t * (s if t < 5 else 7 * s)
        assert seen[0][0, p].item() == pytest.approx(total, rel=1e-4)
    assert len(values) == 1


# --------------------------------------------------------------------------------------------------------------- acting
@pytest.mark.parametrize("random_skills", [False, True])
def test_a_skill_lasts_k_steps_or_to_the_end_of_the_episode(random_skills):
    agent = new_agent(tiny_args(skill_horizon=4, random_skills=random_skills))
    memory = agent.new_memory(2)
    rng = np.random.default_rng(0)
    skills, plans = [], []
    for t in range(13):
        _, memory = agent.act(rng.normal(size=(2, 3)).astype(np.float32), memory, explore=True)
        skills.append(memory[3])
        plans.append(memory[4])
        if t == 5:  # the second episode ends
            memory = [x * torch.tensor([[True], [False]]) for x in memory]
    for e, starts in enumerate(([0, 4, 8, 12], [0, 4, 6, 10])):
        changed = [t for t in range(13) if t == 0 or not torch.equal(skills[t][e], skills[t - 1][e])]
        assert changed == starts
        changed = [t for t in range(1, 13) if not torch.equal(plans[t][e], plans[t - 1][e])]
        assert changed == ([] if random_skills else starts[1:])  # who is in the midst of a skill keeps the plan


def test_plans_move_on_by_a_skill(monkeypatch):
    agent = new_agent(tiny_args())
    given = []

    def plan_skills(model, actor, critic, h, s, mean, noise_scale, args):
        given.append((mean, noise_scale))
        return torch.ones(2, 3), mean + torch.arange(1.0, 3.0)[:, None]

    monkeypatch.setattr(lsp, "plan_skills", plan_skills)
    memory = agent.new_memory(2)
    for _ in range(5):
        _, memory = agent.act(np.zeros((2, 3), np.float32), memory, explore=False)
    assert len(given) == 2 and given[0][1] == 0.0
    assert (given[0][0] == 0).all()
    assert (given[1][0][:, 0] == 2).all() and (given[1][0][:, 1] == 0).all()
    agent.act(np.zeros((2, 3), np.float32), agent.new_memory(2), explore=True)
    assert given[2][1] == 1.0


def test_noise_is_added_in_training_only_and_the_model_sees_it():
    agent = new_agent(tiny_args(random_skills=True))
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.raw_std = -50.0  # no std of the policy's own
    obs = np.zeros((2_000, 3), np.float32)
    action, memory = agent.act(obs, agent.new_memory(2_000), explore=True)
    assert action.std() == pytest.approx(0.3, rel=0.05) and np.array_equal(memory[2].numpy(), action)
    assert np.abs(agent.act(obs, agent.new_memory(2_000), explore=False)[0]).max() == 0
    agent.actor.raw_std = math.log(math.expm1(0.5))  # now the policy has a std of .5, before its tanh
    agent.args.explore_std = 0.0
    action, _ = agent.act(obs, agent.new_memory(2_000), explore=True)
    assert np.arctanh(action).std() == pytest.approx(0.5, rel=0.05)


def test_acting_filters_as_training_does(monkeypatch):
    """Observations, with the actions that were executed, through the buffer and `observe`: the same states."""
    args = tiny_args(batch_length=6)
    agent = new_agent(args)
    memory = agent.new_memory(2)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    rb = lsp.SequenceBuffer(3, 2, 6, args)
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(2, 3)).astype(np.float32)
    rb.begin(obs, np.ones(2, bool))
    for _ in range(6):
        action, memory = agent.act(obs, memory, explore=True)
        obs = rng.normal(size=(2, 3)).astype(np.float32)
        rb.add(obs, action, np.zeros(2), np.zeros(2))
    rows = rb.rows.unflatten(0, (-1, 2)).transpose(0, 1)[:, :6]  # (E, L, ...)
    h, s, _ = agent.model.observe(rows[..., :3], rows[..., 3:5])
    torch.testing.assert_close(h[:, -1], memory[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(s[:, -1], memory[1], atol=1e-6, rtol=1e-5)


def test_skills_of_the_picture_are_held_and_leave_random_numbers_alone():
    """Actions are twice the skill: the point goes where it says, also after a skill's usual end."""
    args = tiny_args(env_id="maze", skill_dim=2)
    agent = new_agent(args, obs_dim=4)
    agent.actor.forward = lambda feature, z: (2 * z, torch.ones_like(z))
    z = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]], np.float32)
    before = torch.get_rng_state()
    paths = lsp.skill_paths(agent, z, 3 * args.skill_horizon, args, seed=5)  # (T+1, N, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert paths.shape == (13, 4, 4) and np.ptp(paths[0], axis=0).max() == 0
    apart = paths[:, :, :2] - paths[:, :, :2].mean(1, keepdims=True)
    assert (np.sign(apart[-1]) == z).all()
    assert (np.diff(np.abs(apart).mean((1, 2))) > 0)[1:].all()  # further and further
    np.testing.assert_array_equal(lsp.skill_paths(agent, z, 12, args, seed=5), paths)


@pytest.mark.parametrize(("file", "rows"), [(lsp, 361), (dreamer, 361), (dreamer_skills, 37), (tdmpc, 361)])
def test_windows_longer_than_episodes_are_refused(file, rows, tmp_path):
    """Nothing could be learnt from them. An episode of CALVIN has 360 env steps, and a row more than steps."""
    window = dict(num_steps=rows) if file is tdmpc else dict(batch_length=rows + 1)  # a window of N steps has N+1 rows
    args = file.Args(env_id="calvin", device="cpu", num_envs=2, run_dir=str(tmp_path), **window)
    with pytest.raises(SystemExit, match="a window is longer than an episode"):
        file.train(args)
