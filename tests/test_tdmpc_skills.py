"""tdmpc_skills.py against independent NumPy versions, known optima, its defects, interruptions, its command line."""

import copy
import dataclasses
import inspect
import json
import math

import numpy as np
import pytest
import torch
from test_spirl import (
    DEVICES,
    SIZES,
    SMALL,
    Stop,
    assert_same,
    count_calls,
    csv_rows,
    final_state,
    has_gradient,
    noisy_copy,
    np_features,
    np_log_prob,
    np_net,
    np_prior,
    only_run,
    optimizer_state,
    random_obs,
    run_command,
    same_weights,
    short_episodes,
    statistics,
    stop,
)

from algos import skimo, spirl
from algos import tdmpc_skills as tdmpc

__all__ = ["short_episodes", "stop"]  # fixtures


def tiny_args(**changes):
    small = dict(
        device="cpu", compile=False, num_threads=1, hidden_dim=16, model_dim=16, latent_dim=8, skill_dim=3,
        skill_horizon=5, num_skills=3, num_envs=2, batch_size=8, num_samples=16, num_policy_trajs=4, num_elites=6,
        cem_iters=2, pretrain_batch_size=8, pretrain_updates=6, pretrain_eval_episodes=1, eval_episodes=2,
        total_timesteps=1200, warmup_steps=400,
    )  # fmt: skip
    return tdmpc.Args(**(small | changes))


def new_learner(args, double=False, seed=0):
    """A learner with all weights random, and a target and a prior of their own."""
    torch.manual_seed(seed)
    learner = tdmpc.Learner(args, noisy_copy(tdmpc.make_networks(args, 4, 2, "cpu"), seed + 1))
    if double:
        for k, name in enumerate(("model", "target", "task_policy", "skill_prior")):
            setattr(learner, name, noisy_copy(getattr(learner, name).double(), seed + 2 + k).eval())
    return learner


# ------------------------------------------------------------------------------------------------ what is spirl.py's


def test_pretraining_is_that_of_spirl():
    names = "Predictor Features SkillModel SkillPrior gaussian draw squash make_networks pretrain_loss prior_rollouts "
    for name in (names + "Pretrainer pretrain").split():
        assert inspect.getsource(getattr(tdmpc, name)) == inspect.getsource(getattr(spirl, name)), name
    for name in ("FILE_VERSION", "PRETRAINED", "MODEL_ARGS", "PRETRAIN_ARGS"):
        assert getattr(tdmpc, name) == getattr(spirl, name), name
    for env_id in SIZES:
        ours, theirs = (file.parse_args(["--env-id", env_id]) for file in (tdmpc, spirl))
        for name in (*spirl.MODEL_ARGS, *spirl.PRETRAIN_ARGS, "total_timesteps", "pretrain_eval_interval"):
            assert getattr(ours, name) == getattr(theirs, name), name


# --------------------------------------------------------------------------------------------------------------- losses


def test_squashed_kl_is_the_mean_of_the_releases_estimate():
    """The release draws 100 samples of the policy and scores them, scaled by 2, under the prior."""
    rng = np.random.default_rng(0)
    for scale in (0.05, 0.5):
        p = rng.normal(size=(4, 3)), np.full((4, 3), scale)
        q = rng.normal(size=(4, 3)), rng.uniform(0.3, 1.3, (4, 3))
        x = p[0] + p[1] * rng.normal(size=(100_000, 4, 3))
        log_slope = np.log(2 * (1 - np.tanh(x) ** 2)).sum(-1)
        estimates = np_log_prob(x, p) - log_slope - np_log_prob(2 * np.tanh(x), q)
        kl = tdmpc.squashed_kl(*([torch.from_numpy(v) for v in pair] for pair in (p, q))).numpy()
        assert np.all(np.abs(estimates.mean(0) - kl) < 5 * estimates.std(0) / math.sqrt(len(x)))
    far = torch.full((1, 3), 5.0), torch.full((1, 3), 0.05)  # where 1 - tanh(x)^2 would round to 0
    near = torch.zeros(1, 3), torch.ones(1, 3)
    assert torch.isfinite(tdmpc.squashed_kl(far, near)).all()


def np_encode(model, obs):
    return np_net(list(model.encoder)[1:], np_features(obs))


def np_policy(policy, h, std=0.05):
    mean = 5 * np.tanh(np_net(policy[:-1], h) / 5)
    return mean, np.full_like(mean, std)


def np_q(model, h, u):
    hu = np.concatenate([h, u], -1)
    return np_net(model.qf1, hu)[..., 0], np_net(model.qf2, hu)[..., 0]


def rl_batch(args, B=5):
    rng = np.random.default_rng(1)
    N = args.num_skills
    obs, u = random_obs(rng, B, N + 1), rng.uniform(-1, 1, (B, N, args.skill_dim))
    return obs, u, 3 * rng.normal(size=(B, N)), (rng.random((B, N)) < 0.4).astype(np.float64)


@pytest.mark.parametrize("release_defects", [False, True])
def test_model_loss_is_that_of_td_mpc(release_defects):
    args = tiny_args(
        gamma=0.9, rho=0.6, consistency_coef=1.9, reward_coef=0.35, value_coef=0.15, release_defects=release_defects
    )
    learner, N = new_learner(args, double=True), args.num_skills
    model, target, policy = learner.model, learner.target, learner.task_policy
    obs, u, rewards, dones = rl_batch(args)
    tensors = [torch.from_numpy(x) for x in (obs, u, rewards, dones)]
    torch.manual_seed(5)
    loss, metrics, h_out = tdmpc.model_loss(model, target, policy, *tensors, args)
    torch.manual_seed(5)
    noise = torch.randn(5, N, 3, dtype=torch.float64).numpy()

    h_pred = [np_encode(model, obs[:, 0])]
    consistency, reward_error, value_error = np.zeros((3, 5))
    for t in range(N):
        next_h = np_encode(model, obs[:, t + 1])
        mean, std = np_policy(policy, next_h)
        next_q = np.minimum(*np_q(target, next_h, np.tanh(mean + std * noise[:, t])))
        td_target = rewards[:, t] + 0.9 * (next_q if release_defects else np.where(dones[:, t], 0, next_q))
        hu = np.concatenate([h_pred[t], u[:, t]], -1)
        reward_error += 0.6**t * (np_net(model.reward_model, hu)[:, 0] - rewards[:, t]) ** 2
        value_error += 0.6**t * sum((q - td_target) ** 2 for q in np_q(model, h_pred[t], u[:, t]))
        h_pred.append(np_net(model.dynamics, hu))
        consistency += 0.6**t * np.square(h_pred[-1] - np_encode(target, obs[:, t + 1])).mean(-1)
    expected = dict(consistency_loss=consistency, reward_loss=reward_error, value_loss=value_error)
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.mean(), rel=1e-4), name
    total = (1.9 * consistency + 0.35 * reward_error + 0.15 * value_error).mean() / N
    assert loss.item() == pytest.approx(total, rel=1e-4)
    np.testing.assert_allclose(h_out.numpy(), np.stack(h_pred, 1), atol=1e-4)
    loss.backward()
    for module in (model.encoder, model.dynamics, model.reward_model, model.qf1, model.qf2):
        assert has_gradient(module)
    assert not has_gradient(target) and not has_gradient(policy) and not h_out.requires_grad


def test_policy_loss_takes_value_and_kl_on_imagined_states():
    args = tiny_args(rho=0.6, alpha=0.7, policy_std=0.2)
    learner, N = new_learner(args, double=True), args.num_skills
    rng = np.random.default_rng(2)
    obs, h_pred = random_obs(rng, 5, N + 1), rng.normal(size=(5, N + 1, 8))
    learner.model.requires_grad_(False)
    torch.manual_seed(6)
    nets = learner.model, learner.task_policy, learner.skill_prior
    loss, metrics = tdmpc.policy_loss(*nets, torch.from_numpy(obs), torch.from_numpy(h_pred), args)
    torch.manual_seed(6)
    noise = torch.randn(5, N + 1, 3, dtype=torch.float64).numpy()
    total, kls, samples = 0, [], rng.normal(size=(20_000, 5, 3))
    for t in range(N + 1):
        pi = np_policy(learner.task_policy, h_pred[:, t], std=0.2)
        q = np.minimum(*np_q(learner.model, h_pred[:, t], np.tanh(pi[0] + pi[1] * noise[:, t])))
        x, p = pi[0] + pi[1] * samples, np_prior(learner.skill_prior, obs[:, t])
        log_pi = np_log_prob(x, pi) - np.log(2 * (1 - np.tanh(x) ** 2)).sum(-1)
        kls.append(np.clip((log_pi - np_log_prob(2 * np.tanh(x), p)).mean(0), -100, 100))
        total += (0.7 * kls[-1] - 0.6**t * q).mean() / N
    assert metrics["prior_kl"].item() == pytest.approx(np.mean(kls), rel=0.02)
    assert loss.item() == pytest.approx(total, rel=0.03)
    loss.backward()
    assert has_gradient(learner.task_policy)
    assert not has_gradient(learner.model) and not has_gradient(learner.skill_prior)


# -------------------------------------------------------------------------------------------------------------- planner


def test_plan_is_that_of_skimo_with_the_releases_start():
    args = tiny_args(num_samples=40, cem_iters=3, temperature=0.7, momentum=0.2, gamma=0.8)
    shared = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    known = {field.name for field in dataclasses.fields(skimo.Args)}
    theirs = skimo.Args(**{name: value for name, value in shared.items() if name in known}, plan_start="wide")
    learner = new_learner(args)
    obs, mean = torch.rand(2, 4) * 30, torch.rand(2, 3, 3) - 0.5
    results = []
    for plan, chosen in ((tdmpc.plan, args), (skimo.plan, theirs)):
        torch.manual_seed(0)
        scalars = torch.tensor(0.3), torch.tensor(1.0)
        results.append(plan(learner.model, learner.task_policy, obs, mean.clone(), *scalars, chosen))
    (z, fitted), (u, expected) = results
    assert torch.equal(z, 2 * u) and torch.equal(fitted, expected)


class Stub:
    """A model whose latent state is (position, skills done), with a given reward of (h, u)."""

    def __init__(self, reward):
        self.reward = reward

    def encoder(self, obs):
        return torch.cat([obs, torch.zeros(len(obs), 1)], -1)

    def next(self, h, u):
        return torch.cat([h[..., :-1] + u, h[..., -1:] + 1], -1)

    def q(self, h, u):
        return (torch.zeros(h.shape[:-1]),) * 2


@pytest.mark.parametrize("K", [1, 3])
def test_plan_finds_the_best_skill_of_every_step(K):
    best = torch.tensor([[0.6, -0.4], [-0.7, 0.2], [0.1, 0.8]])

    def reward(h, u):
        return -20 * (u - best[h[..., -1].long()]).square().sum(-1)

    args = tiny_args(num_samples=2000, num_policy_trajs=10, num_elites=100, cem_iters=12, skill_dim=2)
    torch.manual_seed(0)
    obs, mean = torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.zeros(2, K, 2)
    scalars = torch.tensor(0.01), torch.tensor(0.0)
    first, mean = tdmpc.plan(Stub(reward), lambda h: torch.zeros(*h.shape[:-1], 4), obs, mean, *scalars, args)
    torch.testing.assert_close(mean, best[:K].expand(2, K, 2), atol=0.08, rtol=0)
    torch.testing.assert_close(first, 2 * best[:1].expand(2, 2), atol=0.4, rtol=0)  # z = 2 u


def test_policy_has_a_fixed_std_and_model_the_sizes_of_td_mpc():
    args = tdmpc.Args()
    policy = tdmpc.make_task_policy(args)
    mean, std = tdmpc.tanh_normal(policy(torch.randn(6, 50)))
    assert mean.shape == std.shape == (6, 10)
    torch.testing.assert_close(std, torch.full((6, 10), 0.05))
    model = tdmpc.WorldModel(30, tdmpc.Args(env_id="kitchen", position_features=False))

    def sizes(net):
        return [(layer.in_features, layer.out_features) for layer in net if isinstance(layer, torch.nn.Linear)]

    assert sizes(model.encoder) == [(30, 256), (256, 50)] and sizes(policy) == [(50, 512), (512, 512), (512, 10)]
    assert sizes(model.dynamics) == [(60, 512), (512, 512), (512, 50)]
    for head in (model.reward_model, model.qf1, model.qf2):
        assert sizes(head) == [(60, 512), (512, 512), (512, 1)]
    raw = tdmpc.WorldModel(4, tdmpc.Args(position_features=False)).encoder[0]
    torch.testing.assert_close(raw(torch.tensor([[40.0, 0, 10, -10]])), torch.tensor([[0.5, -0.5, 1, -1]]))


# -------------------------------------------------------------------------------------------------------------- learner


def float_batch(args, B=8):
    return [torch.from_numpy(x).float() for x in rl_batch(args, B)]


def test_learner_update_moves_what_it_should():
    args = tiny_args(tau=0.1, target_update_interval=2)
    learner = new_learner(args)
    with torch.no_grad():
        for value in learner.model.parameters():
            value += 0.01 * torch.randn_like(value)
    start, batch = copy.deepcopy(learner), float_batch(args)
    learner.update(*batch)
    for name in ("skills", "skill_prior", "target"):
        assert same_weights(getattr(learner, name), getattr(start, name)), name
    for part in ("encoder", "dynamics", "reward_model", "qf1", "qf2"):
        assert not same_weights(getattr(learner.model, part), getattr(start.model, part)), part
    assert not same_weights(learner.task_policy, start.task_policy)
    learner.update(*batch)
    for now, old, online in zip(learner.target.parameters(), start.target.parameters(), learner.model.parameters()):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * online.detach(), atol=1e-7, rtol=1e-5)
    for module, before in ((learner.skill_prior, start.skill_prior), (learner.skills, start.skills)):
        assert same_weights(module, before) and not module.training
        assert_same(statistics(module), statistics(before))  # BatchNorm
    rates = [(o.param_groups[0]["lr"], o.param_groups[0]["eps"]) for o in learner.optimizers]
    assert rates == [(1e-3, 1e-7)] * 2


def test_warmup_explores_with_the_prior_as_spirl_does():
    learner = new_learner(tiny_args())
    obs = torch.rand(5, 4) * 30
    torch.manual_seed(0)
    z = learner.sample_prior(obs.numpy())
    torch.manual_seed(0)
    assert torch.equal(z, spirl.squash(spirl.draw(learner.skill_prior(obs))))


def fill_buffer(args, rb, episodes, seed):
    """Random skills; the reward is best, 1, for the skill (0.8, -0.6) and falls with its distance."""
    rng = np.random.default_rng(seed)
    for _ in range(episodes // args.num_envs):
        obs = rng.uniform(5, 35, (args.num_envs, 4)).astype(np.float32)
        for t in range(4):
            u = rng.uniform(-1, 1, (args.num_envs, 2)).astype(np.float32)
            next_obs = rng.uniform(5, 35, obs.shape).astype(np.float32)
            ended = np.full(args.num_envs, t == 3)
            rb.add(obs, torch.from_numpy(u), reward_of(u).astype(np.float32), ended, next_obs)
            obs = next_obs


def reward_of(u):
    return 1 - np.square(u - [0.8, -0.6]).sum(-1)


def test_learner_and_planner_find_the_skills_that_pay(seed=0):
    args = tiny_args(
        skill_dim=2, num_skills=2, num_envs=10, batch_size=64, model_dim=32, alpha=0.0, gamma=0.5, num_samples=64,
        num_elites=16, cem_iters=4, temperature=5.0, learning_rate=3e-3, position_features=False, policy_std=0.3,
    )  # fmt: skip
    learner = new_learner(args, seed=seed)
    rb = tdmpc.ReplayBuffer(4, args, torch.device("cpu"))
    fill_buffer(args, rb, 300, seed)
    for _ in range(400):
        learner.update(*rb.sample(args.batch_size))
    obs = np.random.default_rng(seed + 9).uniform(5, 35, (200, 4)).astype(np.float32)
    with torch.no_grad():
        h = learner.model.encoder(torch.from_numpy(obs))
        policy = torch.tanh(tdmpc.tanh_normal(learner.task_policy(h))[0])
    planner = tdmpc.Planner(learner.model, learner.task_policy, args, learner.device)
    planned = planner(obs, np.ones(200, dtype=bool), 10**6, explore=False) / 2  # u
    assert reward_of(policy.numpy()).mean() > 0.7
    assert reward_of(planned.numpy()).mean() > 0.8


# --------------------------------------------------------------------------------------------- runs within this process

QUICK = (
    f"{SMALL} --skill-horizon 5 --total-timesteps 1200 --warmup-steps 400 --updates-per-step 0.05 --eval-interval 500 "
    "--model-dim 16 --latent-dim 8 --num-skills 3 --num-samples 16 --num-policy-trajs 4 --num-elites 6 --cem-iters 2 "
    "--horizon-steps 800 --std-steps 800"
)


@pytest.fixture
def run(short_episodes, data_dir, tmp_path):
    """run(flags, folder) starts main() on short episodes; returns results and run folder."""

    def start(flags="", folder="runs"):
        argv = [*QUICK.split(), "--data-dir", str(data_dir), "--run-dir", str(tmp_path / folder), *flags.split()]
        return tdmpc.main(tdmpc.parse_args(argv)), only_run(tmp_path / folder)

    return start


def test_spirl_and_tdmpc_skills_share_the_pretrained_model(run, data_dir, tmp_path, capsys):
    argv = [*SMALL.split(), "--skill-horizon", "5", "--data-dir", str(data_dir), "--run-dir", str(tmp_path / "spirl")]
    spirl.main(spirl.parse_args([*argv, "--total-timesteps", "100", "--warmup-skills", "10"]))
    (model,) = (data_dir / "pretrained").iterdir()
    capsys.readouterr()
    _, run_dir = run("--total-timesteps 400")
    assert f"pre-trained model: {model}" in capsys.readouterr().out
    assert list((data_dir / "pretrained").iterdir()) == [model]
    trained = torch.load(model, weights_only=True)["networks"]
    kept = final_state(run_dir)["learner"]["weights"]
    for name, value in trained.items():
        module, rest = name.split(".", 1)
        assert torch.equal(kept[("skills." if module == "skills" else "skill_prior.") + rest], value), name


@pytest.mark.parametrize("defects", [False, True])
def test_what_is_stored_planned_and_given_to_the_prior(run, monkeypatch, defects):
    """The four defects of the release, and that they are absent without the flag."""
    executed, stored, planner_steps, original = [], [], [], tdmpc.execute_skill
    whole_episodes = tdmpc.data_tools.rollout
    rng = np.random.default_rng(0)

    def execute_skill(*inputs):  # in training
        next_obs, rewards, ended, steps = original(*inputs)
        rewards = rng.normal(size=len(rewards)).astype(np.float32)
        executed.append((inputs[3] / 2, rewards, ended))
        return next_obs, rewards, ended, steps

    def rollout(executing, *inputs, **named):
        return whole_episodes(original, *inputs, **named)

    planned, add = tdmpc.Planner.__call__, tdmpc.ReplayBuffer.add

    def plan(self, obs, episode_start, global_step, explore):
        planner_steps.append(global_step)
        return planned(self, obs, episode_start, global_step, explore)

    def noted(self, obs, z, rewards, ended, next_obs):
        stored.append((z.clone(), rewards.copy()))
        add(self, obs, z, rewards, ended, next_obs)

    monkeypatch.setattr(tdmpc, "execute_skill", execute_skill)
    monkeypatch.setattr(tdmpc.data_tools, "rollout", rollout)
    monkeypatch.setattr(tdmpc.Planner, "__call__", plan)
    monkeypatch.setattr(tdmpc.ReplayBuffer, "add", noted)
    _, run_dir = run("--release-defects --eval-interval 0" if defects else "--no-release-defects --eval-interval 0")
    assert len(executed) == len(stored) == 120 and sum(ended.all() for *_, ended in executed) == 6
    last_z, last_rewards, started = torch.zeros(2, 3), np.zeros(2), True
    final_rewards = []
    for (u, rewards, ended), (z, kept) in zip(executed, stored):
        if defects:  # what led into the state, a dummy first, at twice the planner's scale
            assert torch.equal(z, torch.zeros(2, 3) if started else 2 * last_z)
            np.testing.assert_array_equal(kept, np.zeros(2) if started else last_rewards)
        else:
            assert torch.equal(z, u)
            np.testing.assert_array_equal(kept, rewards)
        last_z, last_rewards, started = u, rewards, ended.all()
        final_rewards += list(rewards) if ended.all() else []
    rows = final_state(run_dir)["rb"]["rows"]
    found = np.isin(np.float32(final_rewards), rows[:, 4 + 3].numpy())
    assert not found.any() if defects else found.all()  # the reward at an episode's end never reaches the learner
    assert (set(planner_steps) == {0}) if defects else (planner_steps[:3] == [400, 410, 420])
    learner, obs = new_learner(tiny_args(release_defects=defects)), torch.tensor([[40.0, 20, 10, 0]])
    expected = torch.tensor([[0.5, 0, 1, 0]]) if defects else obs
    torch.testing.assert_close(learner.prior_input(obs), expected)


def test_updates_keep_step_with_the_environments(run, monkeypatch):
    horizons, original = [], tdmpc.plan

    def plan(model, task_policy, obs, mean, *rest):
        horizons.append(mean.shape[1])
        return original(model, task_policy, obs, mean, *rest)

    monkeypatch.setattr(tdmpc, "plan", plan)
    results, run_dir = run("--updates-per-step 0.0333 --eval-interval 0")
    assert results["env_steps"] == 1200 and results["updates"] == int(1200 * 0.0333)
    assert csv_rows(run_dir) == [[str(180 * k), "0.0", "90"] for k in range(1, 7) for _ in range(2)]
    assert horizons[:80] == [1 + int(2 * min(1, step / 800)) for step in range(400, 1200, 10)]


@pytest.mark.parametrize("interrupt", ["in the warm-up", "while planning", "between updates", "by its length"])
def test_resumed_run_equals_an_uninterrupted_one(run, monkeypatch, stop, interrupt):
    flags = "--release-defects" if interrupt in ("while planning", "in the warm-up") else ""
    _, whole = run(flags, "whole")
    if interrupt == "by its length":
        _, part = run(f"{flags} --total-timesteps 600", "part")
        argv = ["--resume", str(part), "--total-timesteps", "1200"]
    else:
        if interrupt == "between updates":
            count_calls(monkeypatch, tdmpc.Learner, "update", at=27, then=stop)
        else:
            at = 17 if interrupt == "in the warm-up" else 77
            count_calls(monkeypatch, tdmpc.ReplayBuffer, "add", at=at, then=stop)
        with pytest.raises(SystemExit, match="stopped at env step .* go on with: .*--resume"):
            run(flags, "part")
        part = only_run(whole.parents[1] / "part")
        Stop.requested = False
        argv = ["--resume", str(part)]
    tdmpc.main(tdmpc.parse_args(argv))
    a, b = final_state(whole), final_state(part)
    if interrupt == "by its length":
        a["run"].pop("evaluations"), b["run"].pop("evaluations")
    assert_same(b, a)
    assert csv_rows(part) == csv_rows(whole)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--num-elites 21", ["--num-elites", "--num-samples"]),
        ("--num-skills 0", ["--num-skills"]),
        ("--policy-std 0", ["--policy-std"]),
    ],
)
def test_senseless_flags_are_refused_with_a_sentence(run, flags, words):
    with pytest.raises(SystemExit) as caught:
        run(flags)
    message = caught.value.code
    assert message.startswith("error: ") and "\n" not in message and all(word in message for word in words), message


def test_foreign_checkpoints_are_refused(run):
    _, run_dir = run("--total-timesteps 400 --eval-interval 0")
    for flag in ("--num-skills 4", "--model-dim 32", "--release-defects"):
        with pytest.raises(SystemExit, match=flag[2:].split()[0].replace("-", "_")):
            tdmpc.main(tdmpc.parse_args(["--resume", str(run_dir), *flag.split()]))


# ------------------------------------------------------------------------------------------- runs as a user starts them


@pytest.mark.parametrize("env_id", list(SIZES))
def test_command_line_on_every_task(env_id, data_dir, tmp_path, capsys):
    steps = {"maze": 4200, "calvin": 800}.get(env_id, 600)
    flags = f"--total-timesteps {steps} --warmup-steps 200 --updates-per-step 0.03 --model-dim 16 --latent-dim 8 "
    flags += "--num-samples 16 --num-policy-trajs 4 --num-elites 6 --cem-iters 2 --num-skills 3"
    run_dir = run_command(tdmpc, env_id, flags, tmp_path, data_dir, capsys)
    assert run_dir.name.startswith(f"{env_id}__tdmpc_skills__")
    names = [path.name for path in run_dir.iterdir() if "tfevents" not in path.name]
    files = "args.json checkpoint.pt episodes.csv prediction.png results.json visited.png"
    assert sorted(names) == files.split()
    results = json.loads((run_dir / "results.json").read_text())
    assert results["env_steps"] >= steps and results["updates"] > 0 and len(csv_rows(run_dir)) >= 2


def test_defaults_are_those_of_the_release():
    for env_id in SIZES:
        args = tdmpc.parse_args(["--env-id", env_id])
        for name, value in dict(
            batch_size=128, updates_per_step=1.0, warmup_steps=5000, latent_dim=50, model_dim=512, alpha=1.0,
            consistency_coef=2.0, reward_coef=0.5, value_coef=0.1, learning_rate=1e-3, max_grad_norm=10.0, num_skills=5,
            explore_std=0.5, explore_std_end=0.05, policy_std=0.05, num_samples=512, num_elites=64, cem_iters=6,
            tau=0.01, target_update_interval=2, rho=0.5, gamma=0.99, reward_scale=1.0, release_defects=False,
        ).items():  # fmt: skip
            assert getattr(args, name) == value, name


def test_bool_flags_go_both_ways():
    bools = {"compile", "capture_video", "retrain", "pretrain_lr_decay", "position_features", "release_defects"}
    bools |= {"allow_pickle", "accept_any_data"}
    assert {field.name for field in dataclasses.fields(tdmpc.Args) if field.type is bool} == bools
    for name in bools:
        for given, value in ((f"--{name}", True), (f"--no-{name}", False)):
            assert getattr(tdmpc.parse_args([given.replace("_", "-")]), name) is value


# ---------------------------------------------------------------------------------------------------------- compilation


def few_updates(args, device):
    """Four rounds of RL and planner (two, and a CUDA graph is never replayed); returns all numbers on the way."""
    torch.manual_seed(0)
    learner, numbers = tdmpc.Learner(args, tdmpc.make_networks(args, 4, 2, device)), {}
    planner = tdmpc.Planner(learner.model, learner.task_policy, args, learner.device)
    obs = random_obs(np.random.default_rng(0), 3).astype(np.float32)
    for k in range(4):
        torch.manual_seed(k)
        metrics = learner.update(*(x.to(device) for x in float_batch(args, 4)))
        numbers |= {f"learner {name} {k}": value.cpu() for name, value in metrics.items()}
        for part, optimizer in zip(("model", "policy"), learner.optimizers):
            if k == 0:
                numbers |= {f"{part} {name}": value for name, value in optimizer_state(optimizer).items()}
        torch.manual_seed(k)
        numbers[f"skill {k}"] = planner(obs, np.array([False, True, False]), 10**6, explore=True)
        numbers[f"plan {k}"] = planner.last_mean.cpu().clone()
    return numbers


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_code_gives_the_numbers_of_eager_code(device, monkeypatch, eager_random):
    args = tiny_args(num_skills=2, hidden_dim=8, model_dim=8, latent_dim=4, cem_iters=1)
    eager = few_updates(args, device)
    compiled_functions = []
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: compiled_functions.append(f) or compile_function(f, **kw))
    compiled = few_updates(dataclasses.replace(args, compile=True), device)
    assert set(compiled_functions) == {tdmpc.model_loss, tdmpc.policy_loss, tdmpc.plan}
    assert compiled.keys() == eager.keys() and len(eager) > 40
    planned = () if torch.torch_version.TorchVersion(torch.__version__) >= "2.13" else ("skill", "plan")
    for name in (name for name in eager if not name.startswith(planned)):
        value = eager[name]
        torch.testing.assert_close(
            compiled[name], value, atol=1e-3, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
