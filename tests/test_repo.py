"""Every import is required, every algorithm file gives its help from any folder, shipped agents do their tasks."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data_tools

ROOT = Path(__file__).resolve().parents[1]
ALGOS = sorted((ROOT / "algos").glob("*.py"))
AGENTS = sorted((ROOT / "benchmarks" / "results" / "agents").glob("*.pt"))


def test_every_import_is_required():
    imports = r"^\s*(?:import|from) ([a-zA-Z0-9_]+)"
    folders = ("algos", "benchmarks", "data_tools", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {name for path in files for name in re.findall(imports, path.read_text(), re.MULTILINE)}
    own = {"data_tools", "algos", "benchmarks", "tests", *(path.stem for path in files)}
    own |= {"triton"}  # a part of torch's CUDA builds, imported only if it is there
    pinned = re.findall(r"^([A-Za-z0-9_.-]+)==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert not found - set(sys.stdlib_module_names) - own - {name.replace("-", "_") for name in pinned}


HELP = """
import runpy, sys

places = list(sys.path)
for path in sys.argv[1:]:
    sys.path[:] = places
    for name in [name for name in sys.modules if name.startswith("data_tools")]:
        del sys.modules[name]  # each file has to find it by itself
    sys.argv = [path, "--env-id", "maze", "--help"]
    print(f"[[{path}]]")
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as end:
        assert not end.code, (path, end)
"""


def test_help_from_another_folder_shows_the_task_defaults(tmp_path):
    """Of every file, in one process: most of the time goes into torch's import."""
    result = subprocess.run([sys.executable, "-c", HELP, *ALGOS], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path in ALGOS:
        shown = result.stdout.split(f"[[{path}]]")[1].split("[[/")[0]
        defaults = importlib.import_module(f"algos.{path.stem}").TASK_DEFAULTS["maze"]
        name, value = next((name, value) for name, value in defaults.items() if type(value) in (int, float))
        words = re.sub(r"[│\s]+", " ", shown)  # lines are wrapped inside a frame
        assert re.search(rf"--{name.replace('_', '-')} .*?\(default: {value}\)", words), path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_shipped_agents_do_their_tasks(path, tmp_path, capsys):
    """Without data and without a model of the user's; in two episodes most of the highest return."""
    name, task = path.stem.split("_", 1)
    algo = importlib.import_module(f"algos.{name}")
    flags = f"--evaluate published --env-id {task} --eval-episodes 2 --device cpu --no-cudagraphs"
    algo.evaluate(algo.parse_args([*flags.split(), "--data-dir", str(tmp_path / "none"), "--run-dir", str(tmp_path)]))
    mean = float(re.search(r"episodic_return ([\d.]+)", capsys.readouterr().out)[1])
    assert mean >= 0.6 * data_tools.TASKS[task].max_return
    assert not list(tmp_path.iterdir())
