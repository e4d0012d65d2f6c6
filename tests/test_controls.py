"""benchmarks/controls.py: every flat file's agent goes through its loop; the committed logs are what they say."""

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import controls

LOGS = Path(controls.ROOT) / "benchmarks" / "results" / "studies" / "controls"


@pytest.mark.parametrize("algo", list(controls.SETTINGS))
def test_a_short_run(algo, tmp_path, monkeypatch):
    monkeypatch.setitem(controls.COMMON, "warmup_steps", 150)
    monkeypatch.setitem(controls.SETTINGS[algo], "updates_per_step", 0.05)
    out = tmp_path / "log.csv"
    monkeypatch.setattr(sys, "argv", ["controls.py", algo, "--out", str(out), "--env-steps", "420"])
    controls.main()
    facts = json.loads(out.with_suffix(".json").read_text())
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["env_step"] for row in rows] == ["200", "400"]  # the pendulum's episodes have 200 steps
    assert all(-2_000 < float(row["episodic_return"]) < 0 for row in rows)
    assert facts["passed"] is False and facts["args"]["seed"] == 1


@pytest.mark.parametrize("algo", list(controls.SETTINGS))
def test_the_committed_log_has_passed(algo):
    facts = json.loads((LOGS / f"{algo}_seed1.json").read_text())
    with (LOGS / f"{algo}_seed1.csv").open() as file:
        returns = [float(row["episodic_return"]) for row in csv.DictReader(file)]
    assert len(returns) == 75 and np.mean(returns[:5]) < -800
    assert np.mean(returns[-20:]) == pytest.approx(facts["last_20_return"], abs=0.1)
    assert facts["last_20_return"] > facts["gate"] == controls.GATE and facts["passed"]
