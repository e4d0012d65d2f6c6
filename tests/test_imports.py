"""data_tools is built in layers: environments below scripts, readers of files beside both; no circles."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import data_tools

ROOT = Path(data_tools.__file__).parent
MODULES = {}
for file in ROOT.rglob("*.py"):
    name = ".".join(file.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")
    MODULES[name] = file


def imports_of(name):
    """Return which modules of data_tools a module imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found


GRAPH = {name: imports_of(name) for name in MODULES}


def test_no_circles():
    assert len(GRAPH) > 15 and sum(map(len, GRAPH.values())) > 30
    TopologicalSorter(GRAPH).prepare()  # raises CycleError


def test_layers():
    for name, imported in GRAPH.items():
        for other in imported:
            if name.startswith("data_tools.tasks"):
                assert not other.startswith(("data_tools.scripted", "data_tools.formats")), (name, other)
            if name.startswith("data_tools.formats"):
                assert not other.startswith(("data_tools.scripted", "data_tools.tasks")), (name, other)
