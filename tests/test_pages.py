"""The pages that one reads: their lengths, headings, links, commands and sentences."""

import importlib
import re
from dataclasses import fields
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
HEADINGS = ["Idea", "Run", "In the code", "What differs", "Result", "Watch"]
LINES = {
    "README.md": 90 + len(METHODS),
    "algos/README.md": 80 + len(METHODS),
    "data_tools/README.md": 150,
    "benchmarks/README.md": 90,
    "benchmarks/RESULTS.md": 220 + 4 * len(METHODS),  # a row for each task
    "benchmarks/FINDINGS.md": 90,
    "benchmarks/SPEED.md": 80,
}
LINES |= {f"algos/docs/{name}.md": 40 for name in METHODS}
GENERATED = [
    f"benchmarks/results/{name}/README.md"
    for name in ("maze", "kitchen", "kitchen-misaligned", "calvin", "held-out", "studies")
]
RESULT = re.compile(r"(<!-- results? ?\w*? -->\n).*?(<!-- /results? -->)", re.DOTALL)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """Without code, tables, headings, pictures and the targets of links."""
    text = re.sub(r"```.*?```", "", RESULT.sub(r"\1\2", text_of(page)), flags=re.DOTALL)
    lines = [line for line in text.split("\n") if not line.startswith(("|", "#", "!", "<!--", "    "))]
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


def sentences(page: str) -> list[str]:
    paragraphs = re.split(r"\n\s*\n|\n(?=\s*(?:[-*]|\d\.)\s)", prose(page))
    parts = [re.split(r"(?<=[.?!:])\s+(?=[A-Z`*\"\[])", " ".join(text.split())) for text in paragraphs]
    return [sentence for part in parts for sentence in part if sentence]


def words(text: str) -> list[str]:
    """What one reads: without the bars of tables."""
    return re.findall(r"\S*\w\S*", text)


def anchors(path: Path) -> set[str]:
    """Names that GitHub gives the headings of a page."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    names = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    names = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", name).lower() for name in names]
    return {re.sub(r"[^\w\- ]", "", name).strip().replace(" ", "-") for name in names}


def commands(page: str) -> list[tuple[str, str]]:
    """Name of the file and flags of each command `python algos/NAME.py ...`; a trailing \\ goes on."""
    text = re.sub(r"\\\n\s*", " ", text_of(page))
    return re.findall(r"python (algos/\w+\.py|benchmarks/\w+\.py)((?: +[^\s`#|&]+)*)", text)


@pytest.mark.parametrize("page", LINES)
def test_a_page_is_short_and_plain(page):
    text = text_of(page)
    assert len(text.splitlines()) <= LINES[page]
    lengths = [len(sentence.split()) for sentence in sentences(page)]
    assert sum(lengths) / len(lengths) <= 20
    told = words(re.sub(r"`[^`]*`", "x", re.sub(r"^\d+\. ", "", prose(page), flags=re.MULTILINE)))
    assert sum(bool(re.search(r"(?<!\w)\d", word)) for word in told) / len(told) <= 0.045  # numbers stand in tables
    assert not re.findall(r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,40}\b", prose(page)), "a commit hash"


def test_the_readme_is_short():
    assert len(text_of("README.md").split()) <= 1_000 + 10 * len(METHODS)


def test_all_pages_together_are_an_hour():
    """Those that one reads; RESULTS.md is made of tables."""
    told = sum(len(words(text_of(page))) for page in LINES if page != "benchmarks/RESULTS.md")
    assert told <= 8_000 + 200 * len(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_each_file_has_a_page_with_the_same_headings(name):
    text = text_of(f"algos/docs/{name}.md")
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == HEADINGS
    assert re.search(rf"^`algos/{name}\.py`", text, re.MULTILINE)
    assert f"<!-- result {name} -->\n" in text and "\n<!-- /result -->" in text
    assert f"(algos/docs/{name}.md)" in text_of("README.md") and f"(docs/{name}.md)" in text_of("algos/README.md")


@pytest.mark.parametrize("page", [*LINES, *GENERATED])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text_of(page), flags=re.DOTALL)):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            there = (ROOT / page).parent / path if path else ROOT / page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


@pytest.mark.parametrize("page", LINES)
def test_flags_of_commands_exist(page):
    for file, flags in commands(page):
        names = METHODS if file == "algos/NAME.py" else [Path(file).stem]
        names = [f"{Path(file).parent.name}.{name}" for name in names]
        names += [f"algos.{name}" for name in METHODS] * (file == "benchmarks/run.py")  # in its --args
        if file == "algos/my_idea.py":  # the reader's
            continue
        assert file == "algos/NAME.py" or (ROOT / file).is_file(), file
        for given in re.findall(r"--([a-z][\w-]*)", flags):
            known = {"help"}
            for name in names:
                args = getattr(importlib.import_module(name), "Args", None)
                known |= {field.name for field in fields(args)} if args else {given.replace("-", "_")}
            field = given.replace("-", "_")
            assert {field, field.removeprefix("no_")} & known, f"{file} --{given}"


def test_commands_are_found():
    assert ("algos/skimo.py", " --env-id maze") in commands("README.md")
    assert len(commands("algos/README.md")) > 6
