"""benchmarks/speed.py runs end to end and writes what it measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_quick_run_writes_every_row(tmp_path):
    out = tmp_path / "folder" / "speed.json"
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--device", "cpu", "--out", out]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert [path.name for path in out.parent.iterdir()] == ["speed.json"]  # no half-written file left
    written = json.loads(out.read_text())

    names = [row["name"] for row in written["rows"]]
    assert len(names) == len(set(names)) == 12
    for start in ("pre-training update, release batch", "RL update", "plan, 2 envs", "act, 1 env", "step, 2 envs, no"):
        assert any(name.startswith(start) for name in names), start
    for row in written["rows"]:
        assert math.isfinite(row["ms"]) and row["ms"] > 0, row
        assert row["calls"] > 0, row
        assert row["name"] in result.stdout
        if row["name"].startswith(("step", "training")):
            assert math.isfinite(row["per_second"]) and row["per_second"] > 0, row
    shares = written["rows"][-1]["shares"]
    assert set(shares) == {"env", "plan", "update"}
    assert all(0 < share < 1 for share in shares.values())
    assert 0 < written["rows"][-1]["share_of_env_only_rate"] < 1
    assert {"cpu", "gpu", "torch", "device", "threads", "commit"} <= set(written["machine"])
    assert written["args"]["quick"] is True


def test_missing_algorithm_file_is_refused_with_a_sentence(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "speed.py", "--quick", "--algo", "nothing.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert "--algo nothing.py does not exist" in result.stderr
