"""What the README and docs/ say is there: scripts, flags, fields, files, names and messages."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest
from processes import ROOT

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
RUN_BY_A_TEST = {"your_data.md": "test_your_data.py"}
YOURS = ("my_docs", "train.jsonl", "test.jsonl")  # names of the reader's own
NOT_RUN = "<!-- not run by a test"
SOURCES = "\n".join(path.read_text() for folder in ("radit_jax", "docs") for path in sorted((ROOT / folder).rglob("*.py")))
SHARED_FLAGS = (ROOT / "radit_jax" / "command.py").read_text()


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(language, text, the line before) of the fenced blocks."""
    found = re.findall(r"([^\n]*)\n```(\w*)\n(.*?)```", page.read_text(), re.DOTALL)
    return [(language, text, before) for before, language, text in found]


def commands(page: Path) -> list[list[str]]:
    """The words of every call of a launch script, continued lines joined, what is optional taken in, comments left out."""
    found = []
    for _, text, _ in blocks(page):
        for line in text.replace("\\\n", " ").splitlines():
            if match := re.search(r"python (launch/\w+\.py.*)", line.partition("     #")[0]):
                found.append(shlex.split(re.sub(r"[\[\]…]", " ", match[1]) if match[1].count('"') % 2 == 0 else match[1].rstrip('"')))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_has_a_script_a_config_fields_and_flags_that_are_there(page):
    for script, *words in commands(page):
        source = (ROOT / script).read_text()
        config = next((word.partition("=")[2] for word in words if word.startswith("--config=")), "configs/radit.py")
        file, _, variant = (config or "configs/radit.py").partition(":")
        fields = importlib.import_module(file.removesuffix(".py").replace("/", ".")).get_config(*filter(None, [variant]))
        for word in (word for word in words if word.startswith("--")):
            name = word[2:].partition("=")[0]
            if name.startswith("config."):
                at = fields
                for part in name.split(".")[1:]:
                    assert part in at, f"{page.name}: {word}"
                    at = at[part]
            elif name != "config":
                assert f'"{name}"' in source or f'"{name}"' in SHARED_FLAGS or f'"{name.removeprefix("no")}"' in source, (
                    f"{page.name}: {word}"
                )


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_every_block_of_commands_is_run_by_a_test_or_says_why_not(page):
    if page.name in RUN_BY_A_TEST:
        assert page.name in (ROOT / "tests" / RUN_BY_A_TEST[page.name]).read_text()
        return
    for language, text, before in blocks(page):
        assert language in ("python", "json") or before.startswith(NOT_RUN), f"{page.name}: {text}"


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_names_in_the_docs_are_names_in_the_code(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    spoken = re.findall(r"`([^`\n]+)`", text)
    for name in spoken:
        if re.fullmatch(r"[\w/]+\.(py|md|sh)", name) and name not in YOURS:
            assert any((ROOT / folder / name).exists() for folder in ("", "radit_jax", "launch", "tests")), f"{page.name}: {name}"
        elif re.fullmatch(r"[A-Za-z_]+\w*", name) and name not in YOURS and ("_" in name or name[0].isupper() and not name.isupper()):
            assert re.search(rf"\b{name}\b", SOURCES + (ROOT / "configs" / "common.py").read_text()), f"{page.name}: {name}"


def test_the_error_lines_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    lines = re.findall(r"^\| (`.+?`) ", page, re.MULTILINE)
    assert len(lines) >= 20
    known = " ".join(re.sub(r'"\s*\n\s*f?"', "", SOURCES).split())
    for line in lines:
        phrases = [phrase.strip() for phrase in re.split(r"[^A-Za-z ]+", line) if len(phrase.split()) >= 2]
        names = re.findall(r"\b\w+(?:[._]\w+)+\b|\b\w+Error\b|\b[A-Z]\w+[A-Z]\w+\b", line)
        assert any(phrase in known for phrase in phrases) or any(name.split(".")[-1] in SOURCES for name in names), line
