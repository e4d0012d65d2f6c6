"""Roll-out statistics against traces with known answers; pictures, videos and curves are really drawn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_tools
from data_tools import runs

ROOT = Path(__file__).resolve().parents[1]
HALF_CELL = 0.2  # the free space of cell c is centred at q = c - 0.2


def trace_of(positions, velocities=None, actions=None, ended=None):
    """Trace of E members from positions (T+1, E, 2); velocities, actions default to 0, ended to never."""
    positions = np.asarray(positions, dtype=np.float32)
    velocities = np.zeros_like(positions) if velocities is None else np.asarray(velocities, dtype=np.float32)
    actions = np.zeros_like(positions) if actions is None else np.asarray(actions, dtype=np.float32)
    ended = np.zeros(positions.shape[:2], dtype=bool) if ended is None else ended
    return list(zip(np.concatenate([positions, velocities], -1), actions, ended))


def test_goal_approach_and_cells_of_known_paths():
    # Member 0 stays in the start cell (34 cells away); member 1 walks four cells down the column from (18, 8)'s row.
    start, path = np.full((5, 2), [10, 24.0]), np.array([[18, 12], [18, 11], [18, 10], [18, 9], [18, 8.0]])
    trace = trace_of(np.stack([start, path], 1) - HALF_CELL)
    statistics = data_tools.rollout_statistics("maze", np.array([0.0, 100.0]), trace)
    assert statistics["prior_return"] == 50.0 and statistics["goal"] == 0.5
    assert statistics["approach_10"] == pytest.approx(3.4) and statistics["approach_50"] == 17.0
    assert statistics["cells"] == 3.0  # one and five


def test_wall_contacts_are_the_steps_that_deviate_from_free_flight():
    envs = data_tools.make_envs("maze", 4)
    obs, _ = envs.reset(seed=3)
    state = envs.get_state()
    # Members 0 and 1 in the open, 2 and 3 touching the outer wall beyond row 1 and pressing against it
    state["physics"] = [[0, 22.5, 20, 0, 0], [0, 22.5, 25, 0, 0], [0, 0.45, 6, 0, 0], [0, 0.45, 8, 0, 0]]
    obs, trace = envs.set_state(state), []
    for _ in range(30):
        action = np.array([[0.3, 0], [0, 0.2], [-1, 0], [-1, 0]], dtype=np.float32)
        trace.append((obs, action, np.zeros(4, dtype=bool)))
        obs, *_ = envs.step(action)
    trace.append((obs, action, np.zeros(4, dtype=bool)))
    envs.close()
    open_space = [(o[:2], a[:2], e[:2]) for o, a, e in trace]
    against_wall = [(o[2:], a[2:], e[2:]) for o, a, e in trace]
    assert data_tools.rollout_statistics("maze", np.zeros(2), open_space)["wall"] == 0.0
    assert (
        data_tools.rollout_statistics("maze", np.zeros(2), against_wall)["wall"] > 0.6
    )  # the first steps fly up to it


def test_lateral_offset_is_measured_across_the_motion_of_running_members():
    # Fast along the first axis, 0.05 left and right of the line; the last member has ended and does not count.
    columns = np.array([20 - 0.1 + 0.05, 20 - 0.1 - 0.05, 20 + 0.3])
    positions = np.stack([np.stack([np.full(3, row), columns], -1) for row in (22.0, 22.4, 22.8)])
    velocities = np.broadcast_to([4.0, 0.0], positions.shape)
    ended = np.broadcast_to([False, False, True], positions.shape[:2])
    statistics = data_tools.rollout_statistics("maze", np.zeros(3), trace_of(positions, velocities, ended=ended))
    assert statistics["lateral"] == pytest.approx(0.05, abs=1e-5)


class ShiftedDynamics(torch.nn.Module):
    """Latent states are twice the observation; a skill moves the observation by z, and by a drift of its own."""

    def __init__(self, drift: float):
        super().__init__()
        self.drift = drift

    def encoder(self, obs):
        return 2 * obs

    def next(self, h, z):
        return h + 2 * (z + self.drift)


@pytest.mark.parametrize("drift", [0.0, 1.0])
def test_open_loop_prediction_is_read_from_the_other_roll_outs(drift):
    """Member 0 goes through 0, 3, 6 and ends at 7, in the midst of its third skill; the others have been everywhere."""
    H, T = 3, 10
    first = np.minimum(np.arange(T + 1), 7)
    others = np.random.default_rng(0).permutation(np.arange(-5, 28)).reshape(3, T + 1).T  # each whole number once
    obs = np.column_stack([first, others])[..., None].astype(np.float32)  # (T+1, 4, 1)
    ended = np.zeros((T + 1, 4), dtype=bool)
    ended[7:, 0] = True
    ended[5:, 1] = True  # what this one shows after its end was not visited
    trace = [(obs[t], np.zeros((4, 2)), ended[t]) for t in range(T + 1)]
    z = torch.full((4, 4, 1), 50.0)
    z[0, :3, 0] = torch.tensor([3.0, 3.0, 1.2])
    before = obs.copy()
    paths = data_tools.open_loop_prediction(ShiftedDynamics(drift), trace, z, H)
    assert len(paths) == 4 and [len(real) for real, _ in paths] == [4, 3, 5, 5] and np.array_equal(obs, before)
    real, predicted = paths[0]
    assert real.dtype == np.float32 and real[:, 0].tolist() == [0, 3, 6, 7]
    visited = obs[:, 1:][~ended[:, 1:]]  # of the others
    expected = np.cumsum([0, 3 + drift, 3 + drift, 1.2 + drift])  # from the first state alone
    assert predicted[:, 0].tolist() == [float(min(visited[:, 0], key=lambda x, y=y: abs(x - y))) for y in expected]


def test_pictures_are_written(tmp_path):
    obs = np.random.default_rng(0).uniform(1, 40, (51, 4)).astype(np.float32)
    data_tools.plot_visited("maze", obs, tmp_path / "visited.png")
    data_tools.plot_prediction("maze", [(obs, obs + 1)] * 3, tmp_path / "prediction.png")
    data_tools.plot_prediction("kitchen", [(obs, obs + 1)], tmp_path / "kitchen.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kitchen.png", "prediction.png", "visited.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("env_id", ["maze", "kitchen"])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_visited_states_are_drawn_however_few_they_are(env_id, rows, tmp_path):
    data_tools.plot_visited(env_id, np.random.default_rng(0).random((rows, 30), np.float32), tmp_path / "visited.png")
    assert (tmp_path / "visited.png").read_bytes()[:4] == b"\x89PNG"


def test_states_of_many_numbers_are_drawn_along_their_principal_axes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    factors = rng.normal(size=(5000, 30)) * ([5.0, 2.0] + [0.01] * 28)  # (rows, O)
    drawn = []
    monkeypatch.setattr(data_tools.diagnostics, "save_figure", lambda figure, *args: drawn.append(figure))
    data_tools.plot_visited("kitchen", (factors @ axes.T + 3).astype(np.float32), tmp_path / "visited.png")
    plane = drawn[0].axes[0].collections[0].get_offsets()  # (rows, 2)
    for k in range(2):
        assert abs(np.corrcoef(plane[:, k], factors[:, k])[0, 1]) > 0.99


def test_members_freeze_until_their_reset():
    envs = data_tools.make_envs("maze", 2)
    envs.reset(seed=0)
    state = envs.get_state()
    state["physics"][0] = [0, 18.0, 8.0, 0, 0]  # on the goal
    envs.set_state(state)
    zero = np.zeros((2, 2), dtype=np.float32)
    first, rewards, terminations, _, _ = envs.step(zero)
    assert rewards.tolist() == [100, 0] and terminations.tolist() == [True, False]
    second, rewards, terminations, _, _ = envs.step(zero + 1)
    assert rewards.tolist() == [0, 0] and terminations.tolist() == [True, False]
    assert (second[0] == first[0]).all() and (second[1] != first[1]).any()
    envs.close()


def test_a_video_is_recorded_when_the_environments_close(tmp_path):
    envs = data_tools.make_envs("maze", 1, tmp_path / "episode.mp4")
    envs.reset(seed=0)
    for _ in range(6):
        envs.step(np.ones((1, 2), dtype=np.float32))
    envs.close()
    assert [path.name for path in tmp_path.iterdir()] == ["episode.mp4"]
    assert (tmp_path / "episode.mp4").stat().st_size > 1000


def make_run(folder, success, env_id="maze"):
    """A run folder with one episode of 1,000 steps per entry of success."""
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps(dict(env_id=env_id, exp_name="skimo", seed=1)))
    rows = [f"{1000 * (i + 1)},{100.0 * s},1000,{i / 10}" for i, s in enumerate(success)]
    (folder / "episodes.csv").write_text("\n".join(["env_step,episodic_return,episodic_length,rl_minutes", *rows]))
    return folder


def plot(*arguments):
    command = [sys.executable, ROOT / "benchmarks" / "plot.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_plot_draws_curves_and_finds_when_the_task_was_solved(tmp_path):
    # 50 failures, then successes: 95 of the last 100 episodes succeed from episode 145 on.
    solved = make_run(tmp_path / "solved", [0] * 50 + [1] * 150)
    failed = make_run(tmp_path / "failed", [0] * 120)
    result = plot(solved, failed, "--out", tmp_path / "curves.png")
    assert result.returncode == 0, result.stderr
    rows = {
        line.split("|")[1].split("/")[-1].strip(): line for line in result.stdout.splitlines() if line.startswith("|")
    }
    assert "| 145,000 |" in rows["solved"] and "| 1.00 |" in rows["solved"]
    assert "not reached" in rows["failed"] and "| 0.00 |" in rows["failed"]
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_plot_refuses_what_is_no_run_or_another_task(tmp_path):
    run = make_run(tmp_path / "run", [0, 1])
    for other in (tmp_path / "nowhere", make_run(tmp_path / "kitchen", [0], env_id="kitchen")):
        result = plot(run, other, "--out", tmp_path / "curves.png")
        assert result.returncode == 1 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert not (tmp_path / "curves.png").exists()


def test_random_states_are_those_of_the_cpu_and_of_this_process_gpu_alone(monkeypatch):
    """On a machine with eight GPUs; torch's own defaults would start up all of them."""
    states, forked = {3: torch.arange(3)}, []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": states[device])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": states.update({device: state}))
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: forked.append(devices))
    data_tools.fork_rng()
    assert forked == [[3]]
    torch.manual_seed(0)
    saved, expected = runs.random_state(), torch.rand(2)
    assert len(saved) == 2
    states[3] = torch.zeros(3)
    runs.set_random_state(saved)
    assert torch.equal(torch.rand(2), expected) and states.keys() == {3} and states[3].tolist() == [0, 1, 2]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # --device cpu, or a machine without a GPU
    data_tools.fork_rng()
    assert forked == [[3], []] and len(runs.random_state()) == 1
    runs.set_random_state(saved)
    assert torch.equal(torch.rand(2), expected)


def test_ctrl_c_before_the_run_is_one_sentence():
    with pytest.raises(SystemExit, match="^stopped before .* the same command begins again$"):
        with data_tools.errors_in_one_line():
            raise KeyboardInterrupt


def test_updates_of_a_gpu_count_as_updates(monkeypatch):
    """A GPU works behind the program: without waiting for it the planner, which has to, would get the updates' time."""
    run, waits = object.__new__(data_tools.Run), []
    monkeypatch.setattr(torch.cuda, "synchronize", waits.append)
    for device, expected in (("cpu", []), ("cuda:1", [torch.device("cuda:1")])):
        run.device, run.clock, run.seconds = torch.device(device), 0.0, {}
        for part in ("update", "plan", "env", "pretrain", None):
            run.lap(part)
        assert waits == expected and run.seconds.keys() == {"update", "plan", "env", "pretrain"}


def test_errors_of_the_gpu_are_not_taken_for_a_full_disk(tmp_path):
    def write(part):
        raise error

    for error in (torch.AcceleratorError("illegal memory access"), torch.OutOfMemoryError("of the GPU")):
        with pytest.raises(type(error)):
            data_tools.files.write_atomically(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_compiler_that_fails_is_one_sentence_and_other_errors_stay_what_they_are():
    function = torch.compile(lambda x: x.sin() + 1)
    missing = torch._inductor.config.patch({"cpp.cxx": (None, "/nonexistent/g++"), "force_disable_caches": True})
    with missing, pytest.raises(SystemExit) as stopped, data_tools.errors_in_one_line():
        function(torch.ones(7))
    sentence = str(stopped.value)
    assert sentence.startswith("error: torch.compile failed") and sentence.count("\n") == 0
    assert "--no-compile" in sentence and "/nonexistent/g++" in sentence
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), data_tools.errors_in_one_line():
        torch.ones(2, 3) @ torch.ones(2, 3)
