"""benchmarks/gpu_check.py: parts that fail are named and stop nothing else; the report and the JSON are written."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check


@pytest.fixture
def out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "OUT", tmp_path / "out")
    return tmp_path / "out"


def test_a_part_that_fails_is_named_and_the_others_run(out, monkeypatch, capsys):
    curve = [[500, 1.0, 0.1], [1000, 3.0, 0.2]]
    run = dict(env_id="maze", seed=2, env_steps=1000, rl_minutes=0.2, last_20_return=2.0, finished=False, curve=curve)
    row = dict(algo="skimo", name="RL update", size="kitchen", mode="eager", num_envs=None, ms=98.0)

    def broken(args):
        raise FileNotFoundError("no such thing")

    monkeypatch.setattr(gpu_check, "check_tests", broken)
    monkeypatch.setattr(gpu_check, "check_speed", lambda args: dict(status="spirl: exit code 1", rows=[row]))
    monkeypatch.setattr(gpu_check, "check_training", lambda args: dict(status="ok", how="2 runs at once", runs=[run]))
    with pytest.raises(SystemExit, match="error: tests, speed failed"):
        gpu_check.main(gpu_check.Args(cpu=True))
    table = (out / "gpu_check.txt").read_text()
    assert table in capsys.readouterr().out
    assert "tests: failed: FileNotFoundError: no such thing" in table and "speed: spirl: exit code 1" in table
    assert "maze, seed 2: 1,000 env steps in 0.2 minutes, return of the last 20 episodes 2.00 (stopped)" in table
    written = json.loads((out / "gpu_check.json").read_text())
    assert written["rehearsal"] and list(written["parts"]) == ["tests", "speed", "train"]
    assert written["parts"]["train"]["runs"][0]["curve"] == curve


@pytest.mark.parametrize("rehearsal", [True, False])
def test_parts_of_a_rehearsal_are_not_mixed_with_others(rehearsal, out, monkeypatch):
    gpu = gpu_check.speed.machine(gpu_check.speed.Args(device="cpu"))["gpu"]
    out.mkdir()
    old = dict(machine=dict(gpu=gpu), rehearsal=rehearsal, parts=dict(speed=dict(status="ok", rows=[], minutes=1.0)))
    (out / "gpu_check.json").write_text(json.dumps(old))
    monkeypatch.setattr(gpu_check, "check_tests", lambda args: dict(status="ok"))
    gpu_check.main(gpu_check.Args(part="tests", cpu=True))
    parts = json.loads((out / "gpu_check.json").read_text())["parts"]
    assert list(parts) == (["speed", "tests"] if rehearsal else ["tests"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_was_started_ends_with_it(number, tmp_path):
    code = f"""
        import os, signal, sys
        from pathlib import Path
        from benchmarks import gpu_check
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gpu_check.OUT = Path({str(tmp_path)!r})
        def check_tests(args):
            process = gpu_check.start(["sleep", "600"], gpu_check.OUT / "log")
            print(process.pid, flush=True)
            os.kill(os.getpid(), {int(number)})
            process.wait()
        gpu_check.check_tests = check_tests
        gpu_check.main(gpu_check.Args(part="tests", cpu=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=gpu_check.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    child = int(done.stdout.split()[-1])
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def test_failed_tests_are_counted_and_named(out, monkeypatch):
    lines = ["tests/test_cuda.py::test_a[skimo] PASSED", "[gw0] [ 50%] FAILED tests/test_cuda.py::test_b[spirl]"]
    lines += ["FAILED tests/test_cuda.py::test_b[spirl] - AssertionError", "ERROR tests/test_dataset.py"]
    out.mkdir()

    def start(command, log, **environment):
        log.write_text("\n".join(lines))

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(gpu_check, "wait", lambda *inputs: "exit code 1")
    result = gpu_check.check_tests(gpu_check.Args(cpu=True))
    assert result["passed"] == 1 and result["status"] == "exit code 1"
    assert result["failed"] == ["tests/test_cuda.py::test_b[spirl]", "tests/test_dataset.py"]


def test_a_program_that_takes_too_long_is_stopped(tmp_path):
    log = tmp_path / "log"
    assert gpu_check.wait(gpu_check.start(["sleep", "60"], log), 0.2) == "stopped after 0 s"
    assert gpu_check.wait(gpu_check.start(["true"], log), 20) == "ok"
    assert gpu_check.wait(gpu_check.start(["false"], log), 20) == "exit code 1"
    assert "=== sleep 60" in log.read_text()


def test_tests_that_are_stopped_say_what_failed(tmp_path):
    (tmp_path / "test_it.py").write_text("""
import time

def test_a():
    assert 1 == 2

def test_b():
    time.sleep(60)
""")
    log = tmp_path / "log"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as main does
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "-p", "no:cacheprovider", tmp_path / "test_it.py"]
    process = gpu_check.start(command, log)
    while "FAILED" not in log.read_text():
        assert process.poll() is None
        time.sleep(0.1)
    assert gpu_check.wait(process, 0.1, signal.SIGINT).startswith("stopped")
    assert "assert 1 == 2" in log.read_text()


def test_what_a_stopped_program_started_is_stopped_as_well(tmp_path):
    script = f"sleep 60 & echo $! > {tmp_path / 'child'}; wait"
    process = gpu_check.start(["bash", "-c", script], tmp_path / "log")
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        time.sleep(0.05)
    gpu_check.stop(process)
    state = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/stat")
    deadline = time.time() + 20
    while state.exists() and state.read_text().split()[2] != "Z":
        assert time.time() < deadline
        time.sleep(0.05)


def test_programs_are_stopped_side_by_side(tmp_path):
    started, first, second = tmp_path / "started", tmp_path / "first", tmp_path / "second"
    code = "import signal, sys, time\nfrom pathlib import Path\n"
    code += "def save(*_):\n    {}\n    Path(sys.argv[1]).touch()\n    sys.exit(0)\n"
    code += "signal.signal(signal.SIGTERM, save)\nPath(sys.argv[2]).touch()\ntime.sleep(60)"
    waits = code.format(f"while not Path({str(second)!r}).exists(): time.sleep(0.01)")
    processes = []
    for program, done in ((waits, first), (code.format("pass"), second)):
        command = [sys.executable, "-c", program, str(done), f"{started}{len(processes)}"]
        processes.append(gpu_check.start(command, tmp_path / "log"))
    deadline = time.time() + 60
    while not all(Path(f"{started}{i}").exists() for i in range(2)):
        assert time.time() < deadline
        time.sleep(0.02)
    gpu_check.stop(*processes)  # the first ends by itself only if the second was told, too
    assert first.exists() and second.exists()


def test_parts_that_were_run_before_stay_in_the_report(out, monkeypatch):
    monkeypatch.setattr(gpu_check, "check_tests", lambda args: dict(status="ok", passed=5, failed=[], measured=[]))
    monkeypatch.setattr(gpu_check, "check_speed", lambda args: dict(status="ok", rows=[]))
    gpu_check.main(gpu_check.Args(part="tests", cpu=True))
    gpu_check.main(gpu_check.Args(part="speed", cpu=True))
    assert list(json.loads((out / "gpu_check.json").read_text())["parts"]) == ["tests", "speed"]
    assert "TESTS: 5 passed, 0 failed" in (out / "gpu_check.txt").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_without_a_gpu_it_says_so(out):
    with pytest.raises(SystemExit, match="torch finds no CUDA device; --cpu is a rehearsal"):
        gpu_check.main(gpu_check.Args())
    assert not out.exists()
