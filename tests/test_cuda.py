"""What can only go wrong on a GPU: CUDA graphs that are replayed, tensors on two devices, waits, resume, memory.

    pytest tests/test_cuda.py                             # most are skipped without CUDA
    GPU_CHECK_DEVICE=cpu pytest tests/test_cuda.py        # rehearsal of the tests themselves, without graphs

GPU_CHECK_ALGOS names the files (default: all), GPU_CHECK_FACTS a file that gets a line of JSON for each measured fact.
"""

import contextlib
import copy
import importlib
import inspect
import json
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from benchmarks import speed
from tests import golden
from tests.numpy_nets import NO_SCORES
from tests.recording import buffer_of
from tests.second_device import second_device, tensors_in

ROOT = Path(__file__).resolve().parents[1]
DEVICE = os.environ.get("GPU_CHECK_DEVICE", "cuda")
ALGOS = os.environ.get("GPU_CHECK_ALGOS", "").split() or sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
CUDA = DEVICE == "cuda"
SIZES = dict(
    hidden_dim=16, latent_dim=8, skill_dim=3, model_dim=16, critic_dim=16, critic_blocks=1, num_envs=2,
    pretrain_skills=3, bc_chunks=2, batch_size=16, pretrain_batch_size=8, num_samples=16, num_policy_trajs=4,
    num_elites=6, cem_iters=2, horizon_steps=1, std_steps=1, pretrain_updates=4, pretrain_lr_decay=False,
    pretrain_eval_interval=10**9, buffer_size=1000, encoder_dim=16, num_steps=3, deter_dim=12, stoch_dim=4,
    batch_length=8, imagine_starts=32, imagine_steps=4, discover_steps=300, controller_dim=16,
    flow_dim=16, policy_dim=16, rollout_skills=5, updates_per_rollout=30,
    demo_rows=100, mppi_iters=2, policy_updates=2, flow_windows=100, flow_updates=6, warmup_steps=10,
    hidden_layers=1, flow_steps=2, num_candidates=3, skill_horizon=4,
)  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore")
needs_device = pytest.mark.skipif(CUDA and not torch.cuda.is_available(), reason="no CUDA device")
algorithms = pytest.mark.parametrize("name", ALGOS)
with_pretraining = pytest.mark.parametrize("name", [name for name in ALGOS if name not in golden.FLAT])


def fact(name: str, algo: str, value):
    """Keep a measured number for benchmarks/gpu_check.sh."""
    print(f"{name}, {algo}: {value}")
    if "GPU_CHECK_FACTS" in os.environ:
        with open(os.environ["GPU_CHECK_FACTS"], "a") as file:
            file.write(json.dumps(dict(fact=name, algo=algo, value=value)) + "\n")


def tiny_args(algo, cudagraphs: bool, device: str = DEVICE, **changes):
    """The file's arguments for the kitchen, with small networks; skills are encoded by the LSTM where there is one."""
    args = algo.parse_args(["--env-id", "kitchen"])
    num_skills = min(3, getattr(args, "num_skills", 1))
    small = dict(SIZES, num_skills=num_skills, device=device, cudagraphs=cudagraphs)
    return speed.replaced(args, small | changes)


def moved(before: dict, after: dict, other: dict) -> float:
    """How far two results of training are apart, as a share of the way that they went."""
    way = sum((after[name] - before[name]).square().sum() for name in before)
    apart = sum((after[name] - other[name]).square().sum() for name in before)
    return float((apart / way).sqrt())


def furthest(after: dict, other: dict) -> str:
    """The three weights or buffers in which two results differ most, for the report."""
    apart = {name: float((after[name] - other[name]).norm()) for name in after}
    names = sorted(apart, key=apart.get)[:-4:-1]
    return ", ".join(f"{name} {apart[name]:.2g}" for name in names)


def weights(module) -> dict:
    return {name: value.detach().cpu().double() for name, value in module.state_dict().items()}


def pretrained_weights(algo, args):
    """Weights before and after pre-training with random data, and the metrics of the last update."""
    torch.manual_seed(0)
    networks = algo.make_networks(args)
    before = weights(networks)
    writer = mock.MagicMock()
    speed.run_pretraining(algo, args, networks, mock.Mock(), writer)
    metrics = {call.args[0]: float(call.args[1]) for call in writer.add_scalar.call_args_list}
    return before, weights(networks), metrics


def rounds(algo, args):
    """Rounds of update and choice on one batch. Returns weights before and after, and all numbers.

    Four, as a CUDA graph is recorded in the second, and only replayed from then on; HIRO's high level learns at each
    tenth, its policy at every other of those.
    """
    agent = speed.make_agent(algo, args)
    batch = speed.filled_replay(algo, args)()
    choose = speed.choosing(algo, args, 3)
    before = weights(agent)
    numbers = {}
    torch.manual_seed(1)
    for k in range(60 if algo.FILE.stem == "hiro" else 4):
        for name, value in agent.update(*batch).items():
            numbers[f"{name} {k}"] = torch.as_tensor(value).cpu().clone()
        numbers[f"chosen {k}"] = first_of(choose())
    return before, weights(agent), numbers


def first_of(chosen):
    """What was chosen, without what is remembered."""
    return torch.as_tensor(chosen[0] if isinstance(chosen, tuple) else chosen).clone()


@needs_device
@with_pretraining
def test_recorded_pretraining_is_eager_pretraining(name):
    """Bit for bit, as a replay draws the random numbers that eager code would."""
    algo = importlib.import_module(f"algos.{name}")
    before, eager, eager_metrics = pretrained_weights(algo, tiny_args(algo, False))
    _, recorded, metrics = pretrained_weights(algo, tiny_args(algo, CUDA))
    apart = moved(before, eager, recorded)
    fact("recorded pre-training is off by (share of the way)", name, apart)
    assert apart < 1e-5, furthest(eager, recorded)
    assert metrics == pytest.approx(eager_metrics, rel=1e-4, abs=1e-4)


@needs_device
@algorithms
def test_recorded_updates_and_plans_are_eager_ones(name):
    algo = importlib.import_module(f"algos.{name}")
    before, eager, eager_numbers = rounds(algo, tiny_args(algo, False))
    _, recorded, numbers = rounds(algo, tiny_args(algo, CUDA))
    apart = moved(before, eager, recorded)
    fact("recorded RL is off by (share of the way)", name, apart)
    assert apart < 1e-5, furthest(eager, recorded)
    for key in eager_numbers:
        torch.testing.assert_close(numbers[key], eager_numbers[key], atol=1e-4, rtol=1e-4, msg=key)


@needs_device
def test_a_replayed_graph_draws_new_numbers():
    algo = importlib.import_module("algos.skimo")
    args = tiny_args(algo, CUDA)
    choose = speed.choosing(algo, args, 3)
    plans = [first_of(choose()) for _ in range(6)]
    assert len({tuple(plan.flatten().tolist()) for plan in plans}) == 6

    networks = algo.make_networks(args)
    window = args.pretrain_skills * args.skill_horizon + 1
    batch = speed.random_dataset("kitchen", window).to(DEVICE).sample_windows(args.pretrain_batch_size, window)

    @torch.no_grad()
    def loss(*batch):
        return algo.pretrain_loss(*networks.values(), networks["model"], *batch, args)[0]

    loss = algo.Recorded(loss, args)
    assert len({float(loss(*batch)) for _ in range(6)}) == 6


@contextlib.contextmanager
def no_waiting():
    """Whatever makes the CPU wait for the GPU inside raises an error."""
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")


def sampler(algo, args):
    """Draws a batch from the replay buffer. On-policy data come from the CPU, once: theirs was drawn before."""
    draw = speed.filled_replay(algo, args)
    batch = draw()
    return (lambda: batch) if algo.FILE.stem == "option_critic" else draw


@needs_device
@algorithms
def test_an_rl_update_never_waits_for_the_device(name):
    algo = importlib.import_module(f"algos.{name}")
    args = tiny_args(algo, False)
    agent = speed.make_agent(algo, args)
    sample = sampler(algo, args)
    agent.update(*sample())
    with no_waiting():
        for _ in range(3):
            agent.update(*sample())


def some_pretraining(algo, args, watch):
    """Ten updates of pre-training; calls watch() after five."""
    calls = []

    def clock(n=1):
        calls.append(n)
        if len(calls) == 5:
            watch()
        if len(calls) == 10:
            raise speed.Enough

    speed.run_pretraining(algo, speed.replaced(args, dict(pretrain_updates=50)), algo.make_networks(args), clock)
    assert len(calls) == 10


@needs_device
@with_pretraining
def test_a_pretraining_update_never_waits_for_the_device(name):
    algo = importlib.import_module(f"algos.{name}")
    with contextlib.ExitStack() as stack:
        some_pretraining(algo, tiny_args(algo, False), lambda: stack.enter_context(no_waiting()))


def memory_in_use() -> int:
    """Bytes of live tensors on the GPU; in the rehearsal, of the process."""
    if CUDA:
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@needs_device
@algorithms
def test_memory_does_not_grow_over_300_updates(name):
    algo = importlib.import_module(f"algos.{name}")
    args = tiny_args(algo, CUDA)
    agent = speed.make_agent(algo, args)
    draw = speed.filled_replay(algo, args)
    choose = speed.choosing(algo, args, 3)
    used = []
    for k in range(330):
        metrics = agent.update(*draw())
        if k == 329:  # before the planner, whose graph may write over them
            assert all(np.isfinite(float(value)) for value in metrics.values())
        choose()
        if k in (29, 329):
            used.append(memory_in_use())
    fact("bytes more after 300 updates", name, used[1] - used[0])
    assert used[1] - used[0] < (2**20 if CUDA else 2**26)


RESUMED = sorted({"skimo", "spirl", "supe", "qc", "reskill", *golden.FLAT} & set(ALGOS))


@needs_device  # tests/test_runs.py resumes all on the CPU
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_as_the_uninterrupted_one(name, tmp_path):
    """Both end at the same weights; how far apart they are is a measured fact, 0 means bit for bit."""
    algo = importlib.import_module(f"algos.{name}")
    flags = f"{golden.TINY} {golden.TASKS['kitchen']} {golden.FLAGS[name]}".split()
    for flag in ("--device", "--warmup-steps", "--updates-per-step") if name in golden.NO_WARMUP else ("--device",):
        at = flags.index(flag)
        del flags[at : at + 2]
    flags += ["--env-id", "kitchen", "--device", DEVICE, "--cudagraphs" if CUDA else "--no-cudagraphs"]
    if name not in golden.FLAT:
        golden.make_data(tmp_path / "data.hdf5", 30, 9)
        flags += ["--data", str(tmp_path / "data.hdf5"), "--data-dir", str(tmp_path / "cache")]

    def run(*more):
        algo.train(algo.parse_args([*flags, *more]))

    run("--run-dir", str(tmp_path / "whole"))
    run("--run-dir", str(tmp_path / "halves"), "--total-timesteps", "2000")
    (whole,) = (tmp_path / "whole").iterdir()
    (halves,) = (tmp_path / "halves").iterdir()
    loaded = torch.load(halves / "checkpoint.pt", weights_only=True)
    algo.train(algo.parse_args(["--resume", str(halves), "--total-timesteps", "3000"]))
    one = torch.load(whole / "checkpoint.pt", weights_only=True, map_location="cpu")
    two = torch.load(halves / "checkpoint.pt", weights_only=True, map_location="cpu")
    assert one["progress"][1] == two["progress"][1] > loaded["progress"][1]  # updates
    apart = max(float((one["agent"][key].double() - two["agent"][key].double()).abs().max()) for key in one["agent"])
    fact("resumed run is off by (largest weight)", name, apart)
    assert apart == 0 or (CUDA and apart < 0.05)


# ------------------------------------------------------------------------------------ CUDA graphs, played on the CPU
class Overwriting:
    """Recorded, on the CPU: a call overwrites what the one before returned, first with NaN."""

    calls = 0

    def __init__(self, function, args):
        self.function = function
        self.outputs = None

    def __call__(self, *inputs):
        Overwriting.calls += 1
        for tensor in tensors_in([self.outputs]):
            tensor.fill_(float("nan"))
        outputs = copied(self.function(*(x.clone() for x in inputs)))
        if isinstance(self.outputs, dict):  # it stays the same one
            self.outputs.update(outputs)
        else:
            self.outputs = outputs
        return self.outputs


def copied(values):
    """Nested tuples and dicts with clones of their tensors."""
    if isinstance(values, torch.Tensor):
        return values.detach().clone()
    if isinstance(values, dict):
        return {name: copied(value) for name, value in values.items()}
    return tuple(copied(value) for value in values)


def with_rewards(agent_type):
    """Agents of this type that have seen rewards: both of HIRO's levels learn, DADS plans."""

    def rewarded(*inputs):
        agent = agent_type(*inputs)
        if hasattr(agent, "rewarded"):
            agent.rewarded.fill_(1)
        return agent

    return rewarded


def both_phases(algo, folder):
    """Pre-training, where there is one, and RL on the CPU, with logs and planner: checkpoint and all logged numbers."""
    args = tiny_args(
        algo, True, "cpu", pretrain_updates=6, total_timesteps=120, warmup_steps=10, warmup_skills=2,
        updates_per_step=0.15, updates_per_skill=1.0, updates_per_rollout=12, epochs=2, batch_length=2,
        discover_steps=100, eval_interval=10**9, run_dir=str(folder), data_dir=str(folder),
    )  # fmt: skip
    if algo.FILE.stem == "option_critic":  # on-policy: an update for every batch
        args.batch_size = 4
        args.total_timesteps = 25 * args.batch_size
    if algo.FILE.stem == "hiro":  # 20 updates and more, as at the 20th its high level's policy learns
        args.updates_per_step = 0.3
    logged = []
    writer = mock.MagicMock(log_dir=folder)
    writer.add_scalar = lambda name, value, step: name.startswith("charts") or logged.append((name, float(value), step))
    window = getattr(args, "pretrain_skills", 1) * getattr(args, "skill_horizon", 1) + 1
    with (
        mock.patch.dict(algo.data_tools.TASKS["kitchen"].env_kwargs, dict(max_episode_steps=13)),
        mock.patch.object(algo, "Agent", with_rewards(algo.Agent)),
        mock.patch.object(algo, "SummaryWriter", return_value=writer),
        mock.patch.object(algo, "rollout", return_value=NO_SCORES),
        mock.patch.object(algo.data_tools, "load_dataset", return_value=speed.random_dataset("kitchen", window)),
        mock.patch.object(torch.Tensor, "cpu", torch.Tensor.clone),  # as from a GPU
    ):
        results = algo.train(args)
    assert results["updates"] > 10
    (checkpoint,) = folder.glob("*/checkpoint.pt")
    return torch.load(checkpoint, weights_only=True), logged


@algorithms
def test_nothing_is_read_after_the_next_replay_overwrote_it(name, tmp_path, monkeypatch):
    algo = importlib.import_module(f"algos.{name}")
    logs_sooner = inspect.getsource(algo.train).replace("gradient_step % 100 ==", "gradient_step % 10 ==")
    monkeypatch.setattr(algo, "train", algo.train)  # put back after the test
    exec(logs_sooner, vars(algo))
    (tmp_path / "plain").mkdir()
    (tmp_path / "replayed").mkdir()
    expected, expected_logged = both_phases(algo, tmp_path / "plain")
    monkeypatch.setattr(algo, "Recorded", Overwriting)
    monkeypatch.setattr(Overwriting, "calls", 0)
    state, logged = both_phases(algo, tmp_path / "replayed")
    assert Overwriting.calls > 10
    assert logged == expected_logged and all(np.isfinite(value) for _, value, _ in logged)
    assert any(name.startswith("losses/") for name, *_ in logged)
    for one, other in zip(tensors_in(state), tensors_in(expected), strict=True):
        assert torch.equal(one, other)


# --------------------------------------------------------------------------------------------- a GPU, played on the CPU
def placed(values, device: str):
    """Nested values with their tensors on a device."""
    if isinstance(values, torch.Tensor):
        return values.to(device)
    if isinstance(values, dict):
        return {name: placed(value, device) for name, value in values.items()}
    return type(values)(placed(value, device) for value in values) if isinstance(values, list | tuple) else values


def not_waiting(gpu, method):
    """The method, which does not wait for the second device, but in the first call of each owner."""
    owners = set()

    def strict(owner, *inputs, **how):
        with mock.patch.object(gpu, "may_wait", owner not in owners):
            owners.add(owner)
            return method(owner, *inputs, **how)

    return strict


@algorithms
def test_a_run_keeps_its_tensors_on_one_device_and_no_update_waits(name, tmp_path):
    """Pre-training, RL, evaluations and resume, with "cuda" as a device of its own."""
    algo = importlib.import_module(f"algos.{name}")
    args = tiny_args(
        algo, False, "cuda", total_timesteps=48, warmup_steps=10, warmup_skills=2, updates_per_step=0.2,
        updates_per_skill=1.0, batch_length=2, rollout_skills=2, updates_per_rollout=4, pretrain_eval_interval=2,
        pretrain_eval_episodes=1, eval_interval=10**9, eval_episodes=1, discover_steps=40, run_dir=str(tmp_path),
        data=str(tmp_path / "data.hdf5"), data_dir=str(tmp_path),
    )  # fmt: skip
    if name == "option_critic":
        args.batch_size = 8
    if name == "hiro":  # its high level learns at each tenth update, its policy at every other of those
        args.updates_per_step = 0.3
    if name not in golden.FLAT:
        golden.make_data(tmp_path / "data.hdf5", 30, 9)
    load = torch.load
    buffer = buffer_of(algo)
    updates = [each for each in ("update", "update_controller") if hasattr(algo.Agent, each)]
    on_policy = name == "option_critic"  # its data come from the CPU
    with (
        second_device() as gpu,
        mock.patch.multiple(algo.Agent, **{each: not_waiting(gpu, getattr(algo.Agent, each)) for each in updates}),
        mock.patch.object(buffer, "sample", buffer.sample if on_policy else not_waiting(gpu, buffer.sample)),
        mock.patch.object(torch, "load", lambda path, map_location, **_: placed(load(path), map_location)),
        mock.patch.dict(algo.data_tools.TASKS["kitchen"].env_kwargs, dict(max_episode_steps=13)),
        mock.patch.object(algo, "Agent", with_rewards(algo.Agent)),
    ):
        first = algo.train(args)
        (checkpoint,) = tmp_path.glob("*/checkpoint.pt")
        resumed = algo.train(speed.replaced(args, dict(resume=str(checkpoint.parent), total_timesteps=80)))
    assert 3 < first["updates"] < resumed["updates"]
    assert len(first["evaluations"]) < len(resumed["evaluations"])
    assert gpu.operations > 5_000


@pytest.mark.parametrize("name", ["skimo", "skimo_no_joint", "skimo_single_step", "spirl", "qc", "relay"])
def test_a_pretraining_update_waits_for_no_second_device(name):
    """The other files' `pretrain` and networks are copies of these (tests/test_copies.py)."""
    algo = importlib.import_module(f"algos.{name}")
    with second_device() as gpu:

        def watch():
            gpu.may_wait = False
            gpu.operations = 0

        some_pretraining(algo, tiny_args(algo, False, "cuda"), watch)
    assert gpu.operations > 100


def test_the_second_device_is_as_strict_as_a_gpu():
    with second_device() as gpu:
        x = torch.rand(3, 2)
        y = x.to("cuda")
        net = torch.nn.Linear(2, 4).to("cuda")
        other = copy.deepcopy(net)
        one_hot = torch.nn.functional.one_hot(torch.arange(3, device="cuda"), 4)
        made = y[1:], y + 1, torch.zeros_like(y), net(y), other.weight, one_hot, torch.cat([y, y]), y.double()
        for tensor in (y, *made):
            assert tensor.device.type == "cuda"
        for tensor in (x, y.cpu(), torch.rand(2), torch.zeros_like(x), torch.zeros(2, device=x.device)):
            assert tensor.device.type == "cpu"
        net(y).square().mean().backward()
        assert net.weight.grad.device.type == "cuda"
        assert torch.equal((y * torch.tensor(2.0)).cpu(), 2 * x)  # a single number may lie on the CPU
        for wrong in (lambda: y + x, lambda: net(x), lambda: y[torch.arange(2)], lambda: torch.cat([x, y])):
            with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
                wrong()
        for wrong in (y.numpy, lambda: np.asarray(y)):
            with pytest.raises(TypeError, match="can't convert cuda:0"):
                wrong()
        gpu.may_wait = False
        y.sum().add_(1.0)
        torch.full((2,), 3.0, device="cuda")
        for waits in (y.sum().item, y.cpu, lambda: x.to(y), lambda: y[y > 0], lambda: torch.tensor(1.0, device="cuda")):
            with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
                waits()
