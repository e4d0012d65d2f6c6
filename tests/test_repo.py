"""The repository keeps its promises: file sizes, exact pins, help from anywhere, the README's commands."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ALGOS = sorted((ROOT / "algos").glob("*.py"))


@pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)
def test_algorithm_file_is_short_enough_to_read(path):
    # The house style: 650 lines, never more than 750
    assert len(path.read_text().splitlines()) <= 750


def test_requirements_are_exact_pins():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")]
    assert lines
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9_.-]+==\d+(\.\d+)*", line), f"{line!r} is no exact pin"


def test_every_import_is_required():
    imports = r"^\s*(?:import|from) ([a-zA-Z0-9_]+)"
    files = [
        path for folder in ("algos", "benchmarks", "data_tools", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    found = {name for path in files for name in re.findall(imports, path.read_text(), re.MULTILINE)}
    own = {"data_tools", "algos", "benchmarks", "tests", *(path.stem for path in files)}
    own |= {"triton"}  # a part of torch's CUDA builds, imported only if it is there
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not found - set(sys.stdlib_module_names) - own - set(pinned)


@pytest.mark.parametrize("path", ALGOS, ids=lambda path: path.stem)
def test_help_from_another_folder_shows_the_task_defaults(path, tmp_path):
    command = [sys.executable, path, "--env-id", "maze", "--help"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    defaults = importlib.import_module(f"algos.{path.stem}").TASK_DEFAULTS["maze"]
    name, value = next((name, value) for name, value in defaults.items() if type(value) is int)
    assert re.search(rf"--{name.replace('_', '-')}\b.*?\(default: {value}\)", result.stdout, re.DOTALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    [
        "pip install -r requirements.txt && python algos/skimo.py --env-id maze",
        "pip install -r requirements.txt && pytest",
    ],
)
def test_readme_has_the_commands(command):
    assert command in (ROOT / "README.md").read_text()


def test_ci_runs_the_readme_test_command():
    assert re.search(r"^step pytest$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "chmod +x .ci/run"
    assert ".ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
