"""Roll-out statistics against traces with known answers; pictures are really drawn."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

import data_tools
from algos import skimo, supe
from benchmarks import pictures
from data_tools.tasks.calvin import BULB, DRAWER, LED, SLIDE
from data_tools.tasks.kitchen import INITIAL_QPOS
from data_tools.tasks.vector import MemberVectorEnv

HALF_CELL = 0.2  # the free space of cell c is centred at q = c - 0.2


def trace_of(positions):
    """Trace of E members from positions (T+1, E, 2), at rest, none of which ends."""
    positions = np.asarray(positions, dtype=np.float32)
    return np.concatenate([positions, np.zeros_like(positions)], -1), np.zeros(positions.shape[:2], dtype=bool)


def test_goal_approach_and_cells_of_known_paths():
    # Member 0 stays in the start cell (34 cells away); member 1 walks four cells down the column from (18, 8)'s row.
    start, path = np.full((5, 2), [10, 24.0]), np.array([[18, 12], [18, 11], [18, 10], [18, 9], [18, 8.0]])
    trace = trace_of(np.stack([start, path], 1) - HALF_CELL)
    statistics = pictures.rollout_statistics("maze", np.array([0.0, 100.0]), trace)
    assert statistics["mean_return"] == 50.0 and statistics["success"] == statistics["goal"] == 0.5
    assert statistics["approach_10"] == pytest.approx(3.4) and statistics["approach_50"] == 17.0
    assert statistics["cells"] == 3.0  # one and five


def test_shares_of_the_kitchens_elements():
    obs = np.zeros((4, 3, 30), dtype=np.float32) + np.float32(INITIAL_QPOS)
    obs[1, 0, 22] = -0.7  # the microwave of the first, for a moment
    obs[2:, 1, 22], obs[2:, 1, 19] = -0.75, 0.37
    obs[3, 2, 19] = 0.37  # after the third's end
    ended = np.zeros((4, 3), dtype=bool)
    ended[2:, 2] = True
    statistics = pictures.kitchen_statistics(None, obs, ended)
    assert statistics.pop("any_order") == pytest.approx(1.0)
    assert statistics.pop("microwave") == pytest.approx(2 / 3)
    assert statistics.pop("slide_cabinet") == pytest.approx(1 / 3)
    assert set(statistics) == {"kettle", "bottom_burner", "top_burner", "light_switch", "hinge_cabinet"}
    assert not any(statistics.values())
    ended[2:, 1] = True  # row 2 shows the second's last state
    assert pictures.kitchen_statistics(None, obs, ended)["any_order"] == pytest.approx(1.0)


def test_shares_of_calvins_sub_tasks():
    obs = np.zeros((5, 3, 21), dtype=np.float32)
    obs[2:, 0, DRAWER] = 0.2
    obs[3:, 0, LED] = 1
    obs[1:, 1, SLIDE] = 0.2
    obs[1:, 1, DRAWER] = 0.13
    obs[:, 1, BULB] = 1  # lit from the start
    obs[4, 2, BULB] = 1  # after the end of the third episode
    ended = np.zeros((5, 3), dtype=bool)
    ended[3:, 2] = True
    assert pictures.calvin_statistics(None, obs, ended) == {
        "drawer": pytest.approx(2 / 3),
        "bulb": 0.0,
        "slider": pytest.approx(1 / 3),
        "led": pytest.approx(1 / 3),
        "any_order": pytest.approx(4 / 3),
    }


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
    trace = obs, ended
    z = torch.full((4, 4, 1), 50.0)
    z[0, :3, 0] = torch.tensor([3.0, 3.0, 1.2])
    before = obs.copy()
    paths = pictures.open_loop_prediction(ShiftedDynamics(drift), trace, z, H)
    assert len(paths) == 4 and [len(real) for real, _ in paths] == [4, 3, 5, 5] and np.array_equal(obs, before)
    real, predicted = paths[0]
    assert real.dtype == np.float32 and real[:, 0].tolist() == [0, 3, 6, 7]
    visited = obs[:, 1:][~ended[:, 1:]]  # of the others
    expected = np.cumsum([0, 3 + drift, 3 + drift, 1.2 + drift])  # from the first state alone
    assert predicted[:, 0].tolist() == [float(min(visited[:, 0], key=lambda x, y=y: abs(x - y))) for y in expected]


def test_pictures_are_written(tmp_path):
    obs = np.random.default_rng(0).uniform(1, 40, (51, 4)).astype(np.float32)
    pictures.plot_visited("maze", obs, tmp_path / "visited.png")
    pictures.plot_prediction("maze", [(obs, obs + 1)] * 3, tmp_path / "prediction.png")
    pictures.plot_prediction("kitchen", [(obs, obs + 1)], tmp_path / "kitchen.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kitchen.png", "prediction.png", "visited.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in tmp_path.iterdir())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("env_id", ["maze", "kitchen"])
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_visited_states_are_drawn_however_few_they_are(env_id, rows, tmp_path):
    pictures.plot_visited(env_id, np.random.default_rng(0).random((rows, 30), np.float32), tmp_path / "visited.png")
    assert (tmp_path / "visited.png").read_bytes()[:4] == b"\x89PNG"


def test_states_of_many_numbers_are_drawn_along_their_principal_axes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.normal(size=(30, 30)))
    factors = rng.normal(size=(5000, 30)) * ([5.0, 2.0] + [0.01] * 28)  # (rows, O)
    drawn = []
    monkeypatch.setattr(pictures, "save", lambda figure, *args, **named: drawn.append(figure))
    pictures.plot_visited("kitchen", (factors @ axes.T + 3).astype(np.float32), tmp_path / "visited.png")
    plane = drawn[0].axes[0].collections[0].get_offsets()  # (rows, 2)
    for k in range(2):
        assert abs(np.corrcoef(plane[:, k], factors[:, k])[0, 1]) > 0.99


def test_a_task_without_statistics_or_map_has_returns_and_curves(tmp_path, monkeypatch):
    monkeypatch.setitem(data_tools.TASKS, "own", data_tools.Task(envs="nowhere:Env", max_return=1.0))
    trace = trace_of(np.zeros((3, 2, 2)))
    assert pictures.rollout_statistics("own", np.array([1.0, 3.0]), trace) == {"mean_return": 2.0, "success": 1.0}
    obs = np.random.default_rng(0).normal(size=(20, 5)).astype(np.float32)
    pictures.plot_visited("own", obs, tmp_path / "visited.png")
    pictures.plot_prediction("own", [(obs, obs)], tmp_path / "prediction.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prediction.png", "visited.png"]


def test_the_yardstick_is_the_guess_that_nothing_moves():
    real = np.array([[0, 0, 9], [3, 4, 9], [6, 8, 9]], dtype=np.float32)
    error, yardstick = pictures.prediction_errors("maze", real, real + np.float32([1, 0, 100]))
    assert error == 1.0 and yardstick == 7.5  # cells; of 5 and 10
    walk = np.float32([[0.0], [1.0], [2.0]])
    error, yardstick = pictures.prediction_errors("kitchen", walk, walk)
    assert error == 0.0 and yardstick == pytest.approx(1.5 / walk.std(), rel=1e-4)


@pytest.fixture
def tiny_run(tmp_path):
    """A run's folder with a checkpoint of an untrained agent, and its pre-trained model."""
    torch.manual_seed(0)
    args = skimo.Args(env_id="kitchen", latent_dim=8, hidden_dim=8, num_skills=2, skill_encoder="mlp")
    agent = skimo.Agent(args, skimo.make_networks(args))
    rb = skimo.ReplayBuffer(30, args)
    none, nothing = np.zeros((8, args.skill_dim)), np.zeros(8)
    for _ in range(3):
        rb.add(obs=np.random.rand(8, 30), z=none, rewards=nothing, dones=nothing > 0, next_obs=np.zeros((8, 30)))
    state = dict(script="skimo.py", args=asdict(args), rb=vars(rb), global_step=10_000)
    skimo.save(tmp_path / "checkpoint.pt", state, dict(agent=agent))
    return tmp_path


def test_one_command_for_a_run(tiny_run, capsys):
    statistics = pictures.main(pictures.Args(tiny_run, episodes=3))
    printed = capsys.readouterr().out
    names = {"checkpoint.pt", "visited.png", "prediction.png", "statistics.json"}
    assert {path.name for path in tiny_run.iterdir()} == names
    assert json.loads((tiny_run / "statistics.json").read_text()) == statistics
    assert {"mean_return", "success", "kettle", "any_order", "prediction_error", "stays_where_it_is"} <= set(statistics)
    assert all(name in printed for name in statistics)


def test_a_traced_roll_out_is_the_files_own(tiny_run, monkeypatch):
    actions, act = [], MemberVectorEnv.step
    monkeypatch.setattr(MemberVectorEnv, "step", lambda envs, action: actions.append(action) or act(envs, action))
    algo, args, agent, step, visited = pictures.load_run(tiny_run / "checkpoint.pt", None)
    assert visited.shape == (24, 30)
    returns, z, (obs, ended) = pictures.traced_rollout(algo, agent, args, 2, 7, step)
    scores = algo.rollout(agent, args, 2, 7, 10_000)
    assert returns.mean() == scores["episodic_return"]
    assert (~ended[:-1]).sum(0).mean() == scores["episodic_length"]
    assert obs.shape == (281, 2, 30) and z.shape == (2, 28, args.skill_dim)
    with torch.no_grad():  # the action is that of the recorded observation and skill
        action = agent.skills.act(torch.from_numpy(obs[13]), z[:, 1]).numpy()
    assert np.allclose(action, actions[13])


def test_a_run_of_supe_whose_ring_is_full(tmp_path):
    """The oldest state first; by the task policy, not by the prior, which acts until the warm-up's end."""
    args = supe.Args(env_id="kitchen", buffer_size=16, warmup_steps=500, hidden_dim=8, critic_dim=8)
    agent = supe.Agent(args, supe.make_networks(args))
    rb = supe.ReplayBuffer(30, args, None)
    for k in range(3):
        obs = np.repeat(8 * k + np.arange(8.0), 30).reshape(8, 30)
        rb.add(obs, torch.zeros(8, args.skill_dim), np.zeros(8), np.zeros(8), obs)
    state = dict(script="supe.py", args=asdict(args), global_step=1_000)
    supe.save(tmp_path / "checkpoint.pt", state, dict(agent=agent, rb=rb))
    _, _, loaded, step, visited = pictures.load_run(tmp_path, None)
    assert visited[:, 0].tolist() == list(range(8, 24))
    _, z, (obs, _) = pictures.traced_rollout(supe, loaded, args, 2, 7, step)
    with torch.no_grad():
        torch.testing.assert_close(z[:, 1], agent.task_policy(torch.from_numpy(obs[args.skill_horizon]))[0])


def test_a_pretrained_model_alone(tmp_path):
    model = skimo.SHIPPED / "skimo_kitchen_pretrained.pt"
    (tmp_path / "model.pt").write_bytes(model.read_bytes())
    pictures.main(pictures.Args(pretrained=tmp_path / "model.pt", env_id="kitchen", episodes=2))
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "prediction.png", "statistics.json"}


def test_runs_without_skills_are_refused_in_a_sentence(tiny_run):
    with pytest.raises(SystemExit, match="error: runs of sac.py hold no skills"):
        pictures.load_run(tiny_run, "sac")
