"""Every command in README and docs: its options, modules and targets exist. Those in ```sh blocks are run elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from mopeq_edge.cli import cli

from .pages import ROOT, Line, lines, pages

ALL = [line for page in pages() for line in lines(page)]
PASSED_ON = ("run", "serve")
"""What follows their FILE is llama.cpp's."""
NOT_COMMANDS = {"…", "...", "A.json", "B.json"}


def commands(first: str) -> list[Line]:
    return [line for line in ALL if line.text.startswith(f"{first} ")]


def check(command: click.Command, words: list[str], parent: click.Context | None, name: str) -> None:
    if isinstance(command, click.Group):
        # its settings: click keeps the help option that a command is first asked with
        context = click.Context(command, info_name=name, parent=parent, **command.context_settings)
        child = command.get_command(context, words[0])
        assert child is not None, f"{name} {words[0]}: no such command"
        check(child, words[1:], context, words[0])
        return
    command.make_context(name, words, parent, resilient_parsing=False)


@pytest.mark.parametrize("line", commands("mopeq-edge"), ids=str)
def test_options_exist(line: Line) -> None:
    words = [word for word in line.words[1:] if word not in NOT_COMMANDS]
    if len(words) == 1 and words[0] in ("--help", "--version"):
        return
    if words[-1] == "--help":
        words = words[:-1]
        assert cli.get_command(click.Context(cli), words[0]) is not None or words == ["COMMAND"]
        return
    check(cli, words, None, "mopeq-edge")


def sources(module: str) -> str:
    """The text of a tool and of the tools that it imports: options that several share are declared in one."""
    path = ROOT / module.replace(".", "/")
    text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text()
    return text + "".join(sources(found) for found in re.findall(r"^from (tools\.[\w.]+) import", text, re.MULTILINE))


@pytest.mark.parametrize("line", commands("python -m tools"), ids=str)
def test_tools_exist_and_know_the_options(line: Line) -> None:
    declared = sources(line.words[2])
    for option in re.findall(r"(?<=\s)--[a-z][a-z0-9-]*", line.text):
        assert f'"{option}' in declared or f"/{option}" in declared, option


@pytest.mark.parametrize("line", commands("make"), ids=str)
def test_targets_exist(line: Line) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in line.words[1:]:
        assert "=" in word or re.search(rf"^{word}:", makefile, re.MULTILINE), word


@pytest.mark.parametrize("line", commands("pytest"), ids=str)
def test_the_suite_s_options_exist(line: Line) -> None:
    suite = (ROOT / "runtime_tests" / "conftest.py").read_text()
    assert line.words[1].startswith(("runtime_tests", "tests"))
    assert (ROOT / line.words[1]).exists()
    for option in re.findall(r"(?<=\s)--[a-z][a-z-]*", line.text):
        assert f'"{option}"' in suite or option.lstrip("-") in suite, option


def test_links_lead_somewhere() -> None:
    for page in pages():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    heads = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    slug: Callable[[str], str] = lambda head: re.sub(r"[^\w\- ]", "", head.strip().lower()).replace(" ", "-")  # noqa: E731
    return {slug(head) for head in heads}


def test_anchors_exist() -> None:
    for page in pages():
        for target, anchor in re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text(encoding="utf-8")):
            there = page if not target else page.parent / target
            if there.suffix == ".md":
                assert anchor in anchors(there), f"{page.name}: {target}#{anchor}"
