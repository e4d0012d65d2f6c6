"""skimo.py learns: replay, updates, pre-training, small problems with known optima."""

import copy
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_nets import noisy_copy
from skimo_tools import float_batch, pretraining_batch, tiny_args

import data_tools
import data_tools.tasks.maze
from algos import skimo
from data_tools.tasks import kitchen


@pytest.fixture
def short_episodes(monkeypatch):
    """Maze episodes of 20 steps instead of 2,000."""
    init = data_tools.tasks.maze.MazeVectorEnv.__init__

    def short(self, num_envs=1, max_episode_steps=20, *args, **kwargs):
        init(self, num_envs, 20, *args, **kwargs)

    monkeypatch.setattr(data_tools.tasks.maze.MazeVectorEnv, "__init__", short)


# -------------------------------------------------------------------------------------------------------- replay buffer
def filled_buffer(lengths, num_envs=2, num_skills=3):
    """Episodes one after the other in each environment; row t of episode k holds numbers made of (k, t)."""
    args = tiny_args(num_envs=num_envs, num_skills=num_skills)
    rb, added = skimo.ReplayBuffer(4, args), []
    clocks, upcoming = [[None, 0] for _ in range(num_envs)], iter(enumerate(lengths))
    for clock in clocks:
        clock[0] = next(upcoming)
    while any(clock[0] for clock in clocks):
        obs, next_obs = np.zeros((2, num_envs, 4), dtype=np.float32)
        z, rewards = np.zeros((num_envs, 3), dtype=np.float32), np.zeros(num_envs, dtype=np.float32)
        ended = np.zeros(num_envs, dtype=bool)
        for e, clock in enumerate(clocks):
            if clock[0] is None:
                obs[e] = -1
                continue
            (k, T), t = clock
            obs[e], next_obs[e], z[e], rewards[e] = (
                100 * k + t,
                100 * k + t + 1,
                (100 * k + t) / 1e4,
                1000 + 100 * k + t,
            )
            ended[e] = t == T - 1
            clock[1] += 1
            if ended[e]:
                added.append((k, T))
                clock[:] = next(upcoming, None), 0
        rb.add(obs, torch.from_numpy(z), rewards, ended, next_obs)
    return rb, added


def test_windows_hold_what_was_added_and_never_cross_episodes():
    lengths = [5, 3, 2, 7, 1, 4, 12, 3]
    rb, added = filled_buffer(lengths)
    assert sorted(added) == list(enumerate(lengths))
    kept = [(k, T) for k, T in added if T >= 3]
    assert rb.episodes[:, 1].tolist() == [T for _, T in kept]
    assert len(rb.columns["obs"]) == sum(T + 1 for _, T in kept)
    torch.manual_seed(0)
    obs, z, rewards, dones = rb.sample(5000)
    assert obs.shape == (5000, 4, 4) and z.shape == (5000, 3, 3) and rewards.shape == dones.shape == (5000, 3)
    assert all(x.dtype == torch.float32 for x in (obs, z, rewards, dones))
    number = obs[:, :, 0]
    assert torch.equal(number[:, 1:], number[:, :-1] + 1)  # consecutive, final observation included
    assert torch.equal(obs, number[..., None].expand_as(obs))
    torch.testing.assert_close(z, (number[:, :-1, None] / 1e4).expand_as(z))
    assert torch.equal(rewards, 1000 + number[:, :-1])
    episode, t = number[:, :-1] // 100, number[:, :-1] % 100
    T = torch.tensor(lengths)[episode.long()]
    assert torch.equal(dones, (t == T - 1).float()) and torch.all(t < T)
    assert set(episode[:, 0].tolist()) == {float(k) for k, _ in kept}
    counts = torch.bincount(episode[:, 0].long(), minlength=len(lengths))[[k for k, _ in kept]]
    expected = 5000 / len(kept)
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)  # episodes are uniform


def test_last_window_is_drawn_more_often():
    rb, _ = filled_buffer([10], num_envs=1)
    torch.manual_seed(0)
    start = rb.sample(20_000)[0][:, 0, 0]
    shares = torch.bincount(start.long(), minlength=10) / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.1] * 7 + [0.3] + [0.0] * 2), atol=0.015, rtol=0)


def test_unfinished_episodes_wait_and_survive_a_checkpoint(tmp_path):
    lengths = [4, 5, 6, 3]
    whole, _ = filled_buffer(lengths, num_envs=1)
    args = tiny_args(num_envs=1)
    rb = skimo.ReplayBuffer(4, args)
    for k, T in enumerate(lengths):
        for t in range(T):
            row = np.full((1, 4), 100 * k + t, dtype=np.float32)
            before = len(rb.episodes)
            z = torch.full((1, 3), (100 * k + t) / 1e4)
            rb.add(row, z, np.array([1000 + row[0, 0]]), np.array([t == T - 1]), row + 1)
            assert len(rb.episodes) == before + (t == T - 1)
            torch.save(rb.state_dict(), tmp_path / "rb.pt")  # as a checkpoint is written and read
            rb = skimo.ReplayBuffer(4, args)
            rb.load_state_dict(torch.load(tmp_path / "rb.pt", weights_only=True))
    for name, column in whole.columns.items():
        assert torch.equal(rb.columns[name], column), name
    assert torch.equal(rb.episodes, whole.episodes)


def test_update_moves_what_it_should():
    args = tiny_args()
    agent = skimo.Agent(args, skimo.make_networks(args, 4, 2))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in agent.model.parameters():
            value += 0.01 * torch.randn_like(value)  # online and target differ
    start = copy.deepcopy(agent.state_dict())
    agent.update(*float_batch(args))
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, start[name])}
    trained = ("model.encoder", "model.dynamics", "model.reward_model", "model.qf1", "model.qf2", "task_policy")
    weights = {name for name, _ in agent.named_parameters() if name.startswith(trained)}
    assert moved == weights | {"log_alpha"}  # not the skills, the prior and its encoder, the target, the decoder
    assert all(value.requires_grad for value in agent.model.parameters())


def test_target_follows_slowly():
    args = tiny_args()
    online = skimo.WorldModel(4, args)
    target = noisy_copy(online)
    before = copy.deepcopy(target)
    skimo.update_target(target, online, 0.1)
    for now, old, new in zip(target.parameters(), before.parameters(), online.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * new, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(("autotune", "target_kl", "direction"), [(True, 1e3, -1), (True, -1.0, 1), (False, 1e3, 0)])
def test_alpha_rises_while_the_kl_exceeds_its_target(autotune, target_kl, direction):
    args = tiny_args(autotune=autotune, target_kl=target_kl, alpha=0.5)
    agent = skimo.Agent(args, skimo.make_networks(args, 4, 2))
    for _ in range(3):
        metrics = agent.update(*float_batch(args))
    assert np.sign(round(agent.log_alpha.exp().item() - 0.5, 6)) == direction
    assert metrics["alpha"].item() == pytest.approx(0.5, rel=1e-2)


def test_shifted_arm_with_corrected_actions_gets_to_the_same_place():
    """In the simulator: whatever is asked of the arm, it moves as demonstrated, and only its joints are touched."""
    args = tiny_args(env_id="kitchen", arm_noise=0.03)
    rng = np.random.default_rng(0)
    obs = torch.tensor(np.tile(kitchen.INITIAL_QPOS, (1, 7, 1)) + 0.001 * rng.normal(size=(1, 7, 30)))
    actions = torch.tensor(rng.uniform(-0.2, 0.2, (1, 6, 9)))
    torch.manual_seed(0)
    shifted, corrected = skimo.perturb(obs, actions, args)
    assert (shifted - obs)[..., :7].std().item() == pytest.approx(0.03, rel=0.3)
    assert torch.equal(shifted[..., 7:], obs[..., 7:]) and torch.equal(corrected[..., 7:], actions[..., 7:])
    inside = (corrected.abs() < 1).all(-1)[0]  # beyond that the arm is too slow
    assert inside.sum() >= 3
    for t in inside.nonzero()[:, 0].tolist():
        reached = []
        for observed, action in ((obs, actions), (shifted, corrected)):
            sim = kitchen.Kitchen(kitchen.SUBTASKS["kitchen"])
            sim.reset(np.random.default_rng(1))
            sim.observed = observed[0, t].numpy()  # what the controller adds the action to
            sim.step(action[0, t].numpy())
            reached.append(sim.data.qpos.copy())
        np.testing.assert_allclose(*reached, atol=1e-9)
    _, corrected = skimo.perturb(obs, 5 * actions, args)
    assert corrected.abs().max() == 1  # no policy can ask for more


def test_arm_noise_of_zero_and_tasks_without_arm_or_objects_leave_data_alone():
    obs = torch.randn(2, 4, 30)
    actions = torch.randn(2, 3, 9)
    same = skimo.perturb(obs, actions, tiny_args(env_id="kitchen"))
    assert same[0] is obs and same[1] is actions
    with pytest.raises(SystemExit, match="--arm-noise"):
        skimo.check_args(tiny_args(arm_noise=0.1))
    with pytest.raises(SystemExit, match="--recombine"):
        skimo.check_args(tiny_args(recombine=True))


def test_peoples_demonstrations_have_their_own_defaults_which_flags_and_the_release_beat():
    scripted = skimo.parse_args(["--env-id", "kitchen"])
    peoples = skimo.parse_args(["--env-id", "kitchen", "--data", "demonstrations.hdf5"])
    assert peoples.recombine and not scripted.recombine
    assert scripted.arm_noise == 0 < peoples.arm_noise and peoples.kl_coef < scripted.kl_coef
    chosen = skimo.parse_args(["--env-id", "kitchen", "--dataset", "d4rl", "--arm-noise", "0.05"])
    assert chosen.arm_noise == 0.05 and chosen.kl_coef == peoples.kl_coef
    assert skimo.parse_args(["--env-id", "kitchen", "--dataset", "d4rl", "--published"]).arm_noise == 0
    assert skimo.parse_args(["--env-id", "maze", "--data", "paths.hdf5"]).arm_noise == 0


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "kitchen-misaligned", "calvin", "a task of one's own"])
def test_published_takes_the_settings_of_the_release_and_flags_beat_them(env_id, monkeypatch):
    monkeypatch.setitem(data_tools.TASKS, env_id, data_tools.TASKS.get(env_id, data_tools.TASKS["maze"]))
    ours = vars(skimo.parse_args(["--env-id", env_id]))
    args = vars(skimo.parse_args(["--env-id", env_id, "--published", "--bc-coef", "3"]))
    release = skimo.PUBLISHED.get(env_id, skimo.RELEASE)
    assert args == ours | release | dict(published=True, bc_coef=3)
    chosen = skimo.parse_args(["--env-id", env_id, "--published", "--tau", "0.3"])
    assert chosen.tau == 0.3 != args["tau"]


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "kitchen-misaligned", "calvin"])
def test_pretrained_models_that_we_ship_fit_their_tasks(env_id):
    args = skimo.parse_args(["--env-id", env_id, "--pretrained", "published", "--device", "cpu"])
    path, data = skimo.find_pretrained(args)
    assert data is None
    networks = skimo.make_networks(args, *data_tools.env_sizes(env_id))
    assert skimo.load(path, dict(networks=networks))["facts"]["prior_return"] > 0


def test_learning_rate_of_pretraining():
    args = tiny_args(pretrain_updates=2000, pretrain_lr=0.01)
    rates = {update: skimo.pretrain_lr(update, args) for update in (0, 249, 499, 999, 1999)}
    expected = {0: 0.01 / 500, 249: 0.005 * math.sqrt(1751 / 2000), 499: 0.01 * math.sqrt(1501 / 2000)}
    assert rates == pytest.approx(expected | {999: 0.01 * math.sqrt(1001 / 2000), 1999: 0.01 * math.sqrt(1 / 2000)})
    args.pretrain_lr_decay = False
    assert [skimo.pretrain_lr(update, args) for update in (0, 249, 1999)] == [0.01] * 3


class Windows:
    """In place of offline data: `draw` gives observations (B, N*H+1, O) and actions (B, N*H, A)."""

    source = "test"

    def __init__(self, draw):
        self.draw = draw

    def to(self, device):
        self.device = device
        return self

    def split(self, fraction, length):
        return self, self

    def sample_windows(self, batch_size, length):
        obs, actions = self.draw()
        return obs.to(self.device), actions.to(self.device)


def run_pretraining(args, networks, draw, path, stop=None):
    """Phase 1, silent; networks learn in place."""
    writer = SimpleNamespace(add_scalar=lambda *values: None)
    skimo.pretrain(args, networks, path, Windows(draw), writer, stop or threading.Event())


@pytest.mark.parametrize("decay", [True, False])
def test_pretraining_uses_its_learning_rate_and_moves_its_target(decay, tmp_path):
    args = tiny_args(pretrain_updates=2000, pretrain_lr=0.01, pretrain_lr_decay=decay, pretrain_tau=0.1, tau=0.7)
    networks = skimo.make_networks(args, 4, 2)
    start = copy.deepcopy(networks["model"]).state_dict()
    batch = [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    stop = threading.Event()
    stop.set()  # after every update
    for updates in (1, 2, 3):
        with pytest.raises(SystemExit, match="stopped in pre-training"):
            run_pretraining(args, networks, lambda: batch, tmp_path / "model.pt", stop)
        state = torch.load(tmp_path / "model.unfinished", weights_only=True)
        expected = 0.01 * updates / 500 * math.sqrt(1 - (updates - 1) / 2000) if decay else 0.01
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected)
        if updates == 2:  # the target moves in every second update
            start = {name: torch.lerp(value, state["networks"][f"model.{name}"], 0.1) for name, value in start.items()}
        torch.testing.assert_close(dict(state["target"]), start)


def test_a_crash_in_pretraining_costs_2500_updates_at_most(tmp_path):
    args = tiny_args(pretrain_updates=3000)
    networks = skimo.make_networks(args, 4, 2)
    batch = [torch.from_numpy(x).float() for x in pretraining_batch(args)]
    path = tmp_path / "model.pt"
    stop = threading.Event()
    stop.set()
    with pytest.raises(SystemExit):
        run_pretraining(args, networks, lambda: batch, path, stop)
    unfinished = path.with_suffix(".unfinished")
    torch.save(torch.load(unfinished) | dict(updates=2498), unfinished)
    draws = iter([batch] * 3)
    with pytest.raises(StopIteration):  # at the fourth update
        run_pretraining(args, networks, lambda: next(draws), path)
    assert torch.load(unfinished)["updates"] == 2500


def constant_direction_data(seed, episodes=60, skills=12, H=5):
    """Each chunk of H actions pushes into one random direction, which is what a skill has to encode."""
    rng = np.random.default_rng(seed)
    length = skills * H
    actions = np.repeat(rng.uniform(-0.9, 0.9, (episodes, skills, 2)), H, 1)
    position = 20 + np.concatenate([np.zeros((episodes, 1, 2)), actions.cumsum(1)[:, :-1]], 1)
    obs = np.concatenate([position, np.zeros_like(position)], -1)
    ends = np.tile(np.arange(length) == length - 1, episodes)
    arrays = obs.reshape(-1, 4), actions.reshape(-1, 2), ends, np.zeros_like(ends)
    return data_tools.OfflineDataset(*(np.asarray(x) for x in arrays))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pretraining_learns_skills_and_their_dynamics(seed, short_episodes, tmp_path):
    H, N = 5, 2
    args = tiny_args(
        hidden_dim=32, latent_dim=16, skill_dim=3, num_skills=N, pretrain_skills=N, bc_chunks=N,
        pretrain_updates=700, kl_coef=1e-4,
        pretrain_batch_size=64, pretrain_lr=3e-3, position_features=False,
    )  # fmt: skip
    data = constant_direction_data(seed, H=H)
    torch.manual_seed(seed)
    networks = skimo.make_networks(args, 4, 2)

    def draw():  # windows that start with a chunk, so that its direction is one skill's business
        row = torch.randint(60, (64, 1)) * 60 + H * torch.randint(10, (64, 1)) + torch.arange(N * H + 1)
        return data.observations[row], data.actions[row[:, :-1]]

    run_pretraining(args, networks, draw, tmp_path / "model.pt")
    test = constant_direction_data(seed + 100, H=H)
    row = torch.arange(60)[:, None] * 60 + torch.arange(N * H + 1)
    obs, actions = test.observations[row], test.actions[row[:, :-1]]
    with torch.no_grad():
        chunks = obs[:, :-1].unflatten(1, (N, H))
        q = networks["skills"].encode_skill(chunks, actions.unflatten(1, (N, H)))
        z = torch.tanh(q[0])
        imitated = networks["skills"].act(chunks, z[:, :, None].expand(-1, -1, H, -1))
        bc_error = (imitated - actions.unflatten(1, (N, H))).square().mean().item()
        h = networks["model"].encoder(obs[:, 0])
        for i in range(N):
            h = networks["model"].next(h, z[:, i])
        predicted = networks["model"].decode(h)[0]
        scaled = networks["model"].encoder.scaled(obs)
        miss = (predicted - scaled[:, -1])[:, :2].square().mean().item()
        still = (scaled[:, 0] - scaled[:, -1])[:, :2].square().mean().item()
    assert bc_error < 0.1 * actions.var().item()  # of predicting the mean action
    assert miss < 0.3 * still  # of predicting that nothing moves


def skill_mdp(args, rb, episodes, seed):
    """Fill a buffer by random skills; the reward is best, 1, for the skill (0.8, -0.6) and falls with its distance."""
    rng = np.random.default_rng(seed)
    E = args.num_envs
    for _ in range(episodes // E):
        obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
        for t in range(4):
            z = rng.uniform(-1, 1, (E, 2)).astype(np.float32)
            next_obs = rng.uniform(5, 35, (E, 4)).astype(np.float32)
            rb.add(obs, torch.from_numpy(z), skill_reward(z).astype(np.float32), np.full(E, t == 3), next_obs)
            obs = next_obs


def skill_reward(z):
    return 1 - np.square(z - [0.8, -0.6]).sum(-1)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_agent_and_planner_find_the_skills_that_pay(seed):
    args = tiny_args(
        skill_dim=2, num_skills=2, bc_chunks=2, num_envs=10, batch_size=64, hidden_dim=32, latent_dim=8, alpha=0.01,
        autotune=False, gamma=0.5, num_samples=64, num_elites=16, cem_iters=4, temperature=5.0, learning_rate=3e-3,
        position_features=False, skill_horizon=5,
    )  # fmt: skip
    torch.manual_seed(seed)
    agent = skimo.Agent(args, skimo.make_networks(args, 4, 2))
    rb = skimo.ReplayBuffer(4, args)
    skill_mdp(args, rb, 300, seed)
    for _ in range(400):
        metrics = agent.update(*rb.sample(args.batch_size))
    assert metrics["reward_loss"].item() / args.num_skills < 0.2  # 0.8 is what predicting the mean reward costs
    obs = np.random.default_rng(seed + 9).uniform(5, 35, (200, 4)).astype(np.float32)
    with torch.no_grad():
        h = agent.model.encoder(torch.from_numpy(obs))
        prior = skimo.sample_skill(
            skimo.gaussian_parameters(agent.skill_prior(agent.prior_encoder(torch.from_numpy(obs))))
        )
        policy = skimo.sample_skill(skimo.gaussian_parameters(agent.task_policy(h)))
    planned = skimo.Planner(agent, args, explore=False)(obs, 10**6)
    assert skill_reward(prior.numpy()).mean() < 0.2
    assert skill_reward(policy.numpy()).mean() > 0.8
    assert skill_reward(planned.numpy()).mean() > 0.85
