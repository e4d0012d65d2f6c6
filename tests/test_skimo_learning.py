"""skimo.py: replay, updates, pre-training; tests/test_variants.py looks whether it learns."""

import copy
import math
import threading

import numpy as np
import pytest
import torch
from numpy_nets import NO_CURVES, NO_SCORES, rl_batch
from skimo_tools import Windows, floats, pretraining_batch, tiny_args

from algos import skimo


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
            number = 100 * k + t
            obs[e], next_obs[e], z[e], rewards[e] = number, number + 1, number / 1e4, 1000 + number
            ended[e] = t == T - 1
            clock[1] += 1
            if ended[e]:
                added.append((k, T))
                clock[:] = next(upcoming, None), 0
        rb.add(obs=obs, z=torch.from_numpy(z), rewards=rewards, dones=ended, next_obs=next_obs)
    return rb, added


def test_windows_hold_what_was_added_and_never_cross_episodes():
    lengths = [5, 3, 2, 7, 1, 4, 12, 3]
    rb, added = filled_buffer(lengths)
    assert sorted(added) == list(enumerate(lengths))
    kept = [(k, T) for k, T in added if T >= 3]
    assert rb.episodes[: rb.num_episodes, 1].tolist() == [T for _, T in kept]
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


def test_a_buffer_that_is_full_grows_and_keeps_what_it_holds():
    args = tiny_args(num_envs=2, num_skills=3)
    rb = skimo.ReplayBuffer(4, args)
    for number in range(3600):  # room for 1,024 skills of each environment and as many episodes
        rows = np.full((2, 4), [[number], [-number]], dtype=np.float32)
        rb.add(obs=rows, z=rows[:, :3], rewards=rows[:, 0], dones=np.full(2, number % 3 == 2), next_obs=rows)
    assert rb.num_episodes == 2400 and len(rb.columns["z"]) == 8192 and len(rb.episodes) == 4096
    obs, *_ = rb.sample(5000)
    assert set(obs[:, 0, 0].int().tolist()) <= set(range(-3597, 3598, 3)) and obs[:, 0, 0].abs().max() > 3500
    torch.testing.assert_close(obs[:, 2, 0], obs[:, 0, 0] + 2 * torch.where(obs[:, 1, 0] < 0, -1, 1))


def test_update_moves_what_it_should():
    args = tiny_args()
    agent = skimo.Agent(args, skimo.make_networks(args))
    torch.manual_seed(0)
    with torch.no_grad():
        for value in agent.model.parameters():
            value += 0.01 * torch.randn_like(value)  # online and target differ
    start = copy.deepcopy(agent.state_dict())
    agent.update(*floats(*rl_batch(args)))
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, start[name])}
    trained = ("model.encoder", "model.dynamics", "model.reward_model", "model.qf1", "model.qf2", "task_policy")
    weights = {name for name, _ in agent.named_parameters() if name.startswith(trained)}
    assert moved == weights | {"log_alpha"}  # not the skills, the prior and its encoder, the target, the decoder
    assert all(value.requires_grad for value in agent.model.parameters())


@pytest.mark.parametrize(("autotune", "target_kl", "direction"), [(True, 1e3, -1), (True, 0.0, 1), (False, 1e3, 0)])
def test_alpha_rises_while_the_kl_exceeds_its_target(autotune, target_kl, direction):
    args = tiny_args(autotune=autotune, target_kl=target_kl, alpha=0.5)
    agent = skimo.Agent(args, skimo.make_networks(args))
    for _ in range(3):
        metrics = agent.update(*floats(*rl_batch(args)))
    assert np.sign(round(agent.log_alpha.exp().item() - 0.5, 6)) == direction
    assert metrics["alpha"].item() == pytest.approx(0.5, rel=1e-2)


def test_peoples_demonstrations_have_their_own_defaults_which_flags_and_the_release_beat():
    scripted = skimo.parse_args(["--env-id", "kitchen"])
    peoples = skimo.parse_args(["--env-id", "kitchen", "--data", "demonstrations.hdf5"])
    assert peoples.recombine and not scripted.recombine
    assert scripted.arm_noise == 0 < peoples.arm_noise
    chosen = skimo.parse_args(["--env-id", "kitchen-misaligned", "--data", "d4rl", "--arm-noise", "0.05"])
    assert chosen.arm_noise == 0.05 and chosen.recombine
    for env_id in ("maze", "kitchen"):  # of its settings the task's beat those of all tasks
        published = vars(skimo.parse_args(["--env-id", env_id, "--data", "d4rl", "--published"]))
        assert published.items() >= (skimo.RELEASE["all"] | skimo.RELEASE[env_id]).items()
    assert skimo.parse_args(["--env-id", "maze", "--data", "paths.hdf5"]).arm_noise == 0


@pytest.mark.parametrize("env_id", ["maze", "kitchen", "kitchen-misaligned", "calvin"])
def test_pretrained_models_that_we_ship_fit_their_tasks(env_id):
    args = skimo.parse_args(["--env-id", env_id, "--pretrained", "published", "--device", "cpu"])
    assert skimo.pretrain(args, skimo.make_networks(args), None, None, threading.Event())["prior_return"] > 0


@pytest.fixture
def pretrain(monkeypatch, tmp_path):
    """pretrain(args, networks, draw, stop) is phase 1 on windows from draw(), silent and without roll-outs; networks
    learn in place. Returns the folder of models.
    """
    monkeypatch.setattr(skimo, "rollout", lambda *inputs: NO_SCORES)

    def run(args, networks, draw, stop=None):
        data = Windows(args.skill_horizon, 0)
        data.sample_windows = lambda *sizes: draw()
        args.data_dir = str(tmp_path)
        skimo.pretrain(args, networks, data, NO_CURVES, stop or threading.Event())

    run.folder = tmp_path / "pretrained"
    return run


@pytest.mark.parametrize("decay", [True, False])
def test_pretraining_uses_its_learning_rate_and_moves_its_target(decay, pretrain, monkeypatch):
    args = tiny_args(pretrain_updates=1000, pretrain_lr=0.01, pretrain_lr_decay=decay, tau=0.7)
    networks = skimo.make_networks(args)
    start = copy.deepcopy(networks["model"]).state_dict()
    batch = floats(*pretraining_batch(args))
    stop = threading.Event()
    stop.set()  # after every update
    for updates in (1, 2, 3, 700):
        for path in pretrain.folder.glob("*.unfinished"):
            torch.save(torch.load(path) | dict(progress=(updates - 1, 1.0)), path)
        with pytest.raises(SystemExit, match="stopped; go on with"):
            pretrain(args, networks, lambda: batch, stop)
        (path,) = pretrain.folder.glob("*.unfinished")
        state = torch.load(path, weights_only=True)
        assert state["progress"][0] == updates
        expected = 0.01 * min(1, updates / 500) * math.sqrt(1 - (updates - 1) / 1000) if decay else 0.01
        assert state["optimizer"]["param_groups"][0]["lr"] == pytest.approx(expected)
        if updates % 2 == 0:  # the target moves in every second update
            start = {name: torch.lerp(value, state["networks"][f"model.{name}"], 0.01) for name, value in start.items()}
        torch.testing.assert_close(dict(state["target"]), start)


def test_a_crash_in_pretraining_costs_2500_updates_at_most(pretrain):
    args = tiny_args(pretrain_updates=3000)
    networks = skimo.make_networks(args)
    batch = floats(*pretraining_batch(args))
    stop = threading.Event()
    stop.set()
    with pytest.raises(SystemExit):
        pretrain(args, networks, lambda: batch, stop)
    (unfinished,) = pretrain.folder.glob("*.unfinished")
    torch.save(torch.load(unfinished) | dict(progress=(2498, 1.0)), unfinished)
    draws = iter([batch] * 3)
    with pytest.raises(StopIteration):  # at the fourth update
        pretrain(args, networks, lambda: next(draws))
    assert torch.load(unfinished)["progress"][0] == 2500
