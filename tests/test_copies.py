"""Files of one family are copies: what an algorithm file does not say it changes is the text of the others.

The docstring says it in a line `Differs from skimo.py in: Args, plan, ...`, which may go on after a comma at its end.
Variants of SkiMo, skimo_*.py, are skimo.py to the letter but for the definitions named there, added and removed ones
included; other methods have definitions of their own, and agree in what they share with any file under the same name.
A definition's text is all from the end of the one before it, decorators and comments included, section lines left out.
"""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "algos"


@functools.cache
def definitions(text: str) -> dict[str, str]:
    """Name -> text of every top-level function, class, constant and of `if __name__ ...`, which is called __main__."""
    lines, found, last = text.splitlines(), {}, None
    for node in ast.parse(text).body:
        name = None
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target)
        elif isinstance(node, ast.If):
            name = "__main__"
        if name:  # docstring, imports and the path to data_tools are left out
            assert name not in found, f"{name} is defined twice"
            start = node.lineno - 1 if last is None else last
            text = [line for line in lines[start : node.end_lineno] if not line.startswith("# -----")]
            found[name] = "\n".join(text).strip("\n")
        last = node.end_lineno if name else None
    return found


@functools.cache
def differs(text: str) -> set[str] | None:
    """The names in the docstring's line, None without one."""
    line = re.search(
        r"^Differs from skimo\.py in: ((?:.*,\n)*.*)", ast.get_docstring(ast.parse(text)) or "", re.MULTILINE
    )
    return line and {name.strip() for name in line[1].rstrip(".").split(",")}


def complaints(files: dict[str, str]) -> list[str]:
    """What is wrong with files, name -> text, one of which is skimo.py."""
    found = {name: definitions(text) for name, text in files.items()}
    named, wrong = {name: differs(text) for name, text in files.items()}, []
    base = found["skimo.py"]
    for file, own in found.items():
        if named[file] is None:
            continue
        for name in named[file]:
            if own.get(name) == base.get(name):
                wrong.append(f"{file}: {name} is said to differ from skimo.py's, but does not")
        compared = own.keys() | base.keys() if file.startswith("skimo_") else own.keys() & base.keys()
        for name in compared - named[file]:
            if own.get(name) != base.get(name):
                wrong.append(
                    f"{file}: {name} differs from skimo.py's, but is not in the line `Differs from skimo.py in`"
                )
    for one, other in itertools.combinations(sorted(files), 2):
        allowed = (named[one] or set()) | (named[other] or set())
        for name in found[one].keys() & found[other].keys() - allowed:
            if found[one][name] != found[other][name]:
                wrong.append(f"{one} and {other}: {name} differs, and neither says so")
    return sorted(set(wrong))


def test_files_differ_where_they_say_so():
    assert complaints({path.name: path.read_text() for path in sorted(FOLDER.glob("*.py"))}) == []


# What some files share though all of them say that it differs from skimo.py's
ALIKE = [
    ("sac diayn dads", "policy_loss soft_critic_loss Actor TwinQ"),
    ("sac diayn dreamer hiro option_critic", "evaluate"),
    ("sac diayn dads hiro option_critic relay", "parse_args"),
    ("sac dreamer hiro lsp option_critic qc tdmpc", "Inputs"),
    ("dreamer tdmpc lsp", "parse_args SequenceBuffer"),
    ("dreamer lsp", "kl_divergence rollout"),
    ("dreamer dreamer_skills lsp", "RSSM rssm_loss lambda_return imagined_value_loss"),
    ("tdmpc tdmpc_skills", "scalar_head"),
    ("skimo skimo_no_cem skimo_sac", "PRETRAINED pretrain_loss pretrain"),
    ("spirl reskill supe tdmpc_skills dreamer_skills", "PRETRAINED SkillModel make_networks pretrain_loss pretrain"),
]


@pytest.mark.parametrize(("names", "shared"), ALIKE)
def test_files_that_differ_alike(names, shared):
    found = [definitions((FOLDER / f"{name}.py").read_text()) for name in names.split()]
    for definition in shared.split():
        assert len({own[definition] for own in found}) == 1, definition


VARIANTS = ["skimo_no_cem.py", "skimo_sac.py", "skimo_no_joint.py", "skimo_single_step.py"]


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("kl_divergence", "- 0.5).sum(-1)", "- 0.6).sum(-1)"),  # an equation
        ("log", "\ndef log(", "\n@torch.no_grad()\ndef log("),  # a decorator
        ("sample_skill", '"""One reparameterised', '"""A reparameterised'),  # a docstring
        ("mlp", "networks\ndef mlp(", "networks\n# builds\ndef mlp("),  # a comment in front
        ("save", "part.write_bytes(content)", "part.write_text(content)"),  # a helper
        ("helper", "", "\n\ndef helper():\n    pass\n"),  # one more
    ],
)
def test_a_shared_line_that_changes_in_one_file_only_is_found(name, old, new):
    files = {path.name: path.read_text() for path in sorted(FOLDER.glob("skimo*.py"))}
    assert set(VARIANTS) <= files.keys() and all(differs(files[variant]) is not None for variant in VARIANTS)
    for variant in VARIANTS:
        changed = files[variant].replace(old, new) if old else files[variant] + new
        assert changed != files[variant]
        wrong = complaints(files | {variant: changed})
        assert f"{variant}: {name} differs from skimo.py's, but is not in the line `Differs from skimo.py in`" in wrong
        line = re.search("^Differs from skimo.py in: ", files[variant], re.MULTILINE)[0]
        wrong = complaints(files | {variant: files[variant].replace(line, f"{line}mlp, ")})
        assert f"{variant}: mlp is said to differ from skimo.py's, but does not" in wrong
