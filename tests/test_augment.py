"""Success, more data from the same data, and the name of code, against NumPy and the simulator."""

import numpy as np
import pytest
import torch

from data_tools import TASKS, DataError, OfflineDataset, Task, code_of, perturb, recombined
from data_tools.tasks import kitchen

ARM = TASKS["kitchen"].arm


@pytest.mark.parametrize(
    ("best", "returns", "share"),
    [
        (100, [100, 99.9995, 99.99, 0], 0.5),  # sums of float32
        (-2, [-2.00001, -2.01, -1], 2 / 3),
        (4, [], 0),  # no episode has ended yet
    ],
)
def test_success_is_the_highest_return_but_for_rounding(best, returns, share):
    assert Task(envs="x:y", max_return=best).success(returns) == pytest.approx(share)


def test_comments_and_docstrings_do_not_change_the_name_of_code():
    code = "def f(x):\n    return x + 1\n"
    told = '"""A module."""\ndef f(x):\n    "one"\n    # more\n    return (x + 1)\n'
    assert code_of(code) == code_of(told)
    for other in ("x + 2", "x - 1", "x + 1.0", "'x + 1'"):
        assert code_of(code.replace("x + 1", other)) != code_of(code)


@pytest.mark.parametrize(
    "name",
    [f"OfflineDataset.{name}" for name in ("split", "sample_windows", "_window_table", "sample_pairs")]
    + ["perturb", "recombined"],
)
def test_code_that_draws_batches_is_part_of_it(name, monkeypatch):
    before = code_of("x = 1")
    monkeypatch.setattr(f"data_tools.augment.{name}", OfflineDataset.save)
    assert code_of("x = 1") != before


def test_shift_and_correction_cancel():
    """The position that an action asks for, observed + 0.16 action, stays; all else is left alone."""
    torch.manual_seed(0)
    obs = torch.rand(50, 7, 30).double()
    actions = 0.2 * torch.rand(50, 6, 9).double() - 0.1
    shifted, corrected = perturb(obs, actions, ARM, 0.03)
    shift = (shifted - obs)[..., :7].numpy()
    assert shift.std() == pytest.approx(0.03, rel=0.05) and abs(shift.mean()) < 0.001
    assert torch.equal(shifted[..., 7:], obs[..., 7:]) and torch.equal(corrected[..., 7:], actions[..., 7:])
    expected = np.clip(actions[..., :7].numpy() - shift[:, :-1] / 0.16, -1, 1)
    np.testing.assert_allclose(corrected[..., :7], expected, atol=1e-12)
    inside = np.abs(expected) < 1  # beyond that the arm is too slow
    asked = [(o[:, :-1, :7] + 0.16 * a[..., :7]).numpy()[inside] for o, a in ((obs, actions), (shifted, corrected))]
    np.testing.assert_allclose(*asked, atol=1e-12)
    assert inside.mean() > 0.9


def test_a_shifted_arm_gets_to_the_same_place():
    """In the simulator: it moves as demonstrated."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    obs = torch.tensor(np.tile(kitchen.INITIAL_QPOS, (1, 7, 1)) + 0.001 * rng.normal(size=(1, 7, 30)))
    actions = torch.tensor(rng.uniform(-0.2, 0.2, (1, 6, 9)))
    shifted, corrected = perturb(obs, actions, ARM, 0.03)
    inside = (corrected.abs() < 1).all(-1)[0].nonzero()[:, 0].tolist()
    assert len(inside) >= 3
    for t in inside:
        reached = []
        for observed, action in ((obs, actions), (shifted, corrected)):
            sim = kitchen.Kitchen(kitchen.SUBTASKS["kitchen"])
            sim.reset(np.random.default_rng(1))
            sim.observed = observed[0, t].numpy()  # what the controller adds the action to
            sim.step(action[0, t].numpy())
            reached.append(sim.data.qpos.copy())
        np.testing.assert_allclose(*reached, atol=1e-9)


def test_nothing_is_done_unasked_and_what_cannot_be_done_is_refused():
    obs, actions = torch.rand(2, 4, 30), torch.rand(2, 3, 9)
    same = perturb(obs, actions, ARM, 0.0)
    assert same[0] is obs and same[1] is actions
    with pytest.raises(DataError, match="--arm-noise"):
        perturb(obs, actions, TASKS["maze"].arm, 0.1)
    with pytest.raises(DataError, match="--recombine"):
        recombined(None, TASKS["maze"].objects)


def test_recombined_episodes_differ_in_untouched_objects_alone():
    """Column 0 is the arm, 1 and (2, 3) are objects: episode 0 moves the first, 1 the second, 2 and 3 nothing."""
    rng = np.random.default_rng(0)
    lengths = [20, 15, 30, 10]
    obs = rng.uniform(-0.01, 0.01, (75, 4)).astype(np.float32)
    obs[:, 0] = np.arange(75)
    obs[12:20, 1] += 2.0
    obs[30:35, 2:] += [1.0, -3.0]
    flags = np.zeros(75, dtype=bool)
    flags[np.cumsum(lengths)[:3] - 1] = True  # none at the data's end
    data = OfflineDataset(obs, rng.normal(size=(75, 2)), np.zeros(75), flags)
    left = {1: np.float32([2.0]), 2: np.float32([1.0, -3.0])}
    seen = set()
    for seed in range(30):
        both = recombined(data, [[1], [2, 3]], seed)
        assert both.episode_lengths.tolist() == 2 * lengths
        assert torch.equal(both.observations[:75], data.observations)
        assert torch.equal(both.actions, torch.cat([data.actions, data.actions]))
        again = both.observations[75:].numpy()
        assert np.array_equal(again[:, 0], obs[:, 0])
        assert np.array_equal(again[:20, 1], obs[:20, 1]) and np.array_equal(again[20:35, 2:], obs[20:35, 2:])
        for episode, rows in enumerate(np.split(np.arange(75), np.cumsum(lengths)[:3])):
            for entries in ([1], [2, 3]):
                if (episode, entries[0]) in ((0, 1), (1, 2)):
                    continue
                change = again[rows][:, entries] - obs[rows][:, entries]
                np.testing.assert_allclose(change, np.tile(change[0], (len(rows), 1)), atol=1e-6)  # noise stays
                if change.any():
                    np.testing.assert_allclose(again[rows][:, entries].mean(0), left[entries[0]], atol=0.02)
                seen.add((episode, entries[0], bool(change.any())))
    assert len(seen) == 12  # each was moved and was left alone
