"""The documents: their tree names every source file, their links lead somewhere, and their commands exist."""

import argparse
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from bench.__main__ import parser as bench_parser
from bench.chaos.__main__ import parser as chaos_parser
from cli.main import COMMANDS
from tests.cluster.commands import load_deployment

ROOT = Path(__file__).parent.parent
FLOORS = ("checkpoint", "kernels", "experts", "router", "frontend", "cluster", "cli")
ROOMS = (*FLOORS, "client", "protos", "demo", "bench", "deploy")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "demo" / "README.md"])
README_LINES, PROSE_COLUMNS = 170, 100


def name_of(document: Path) -> str:
    return str(document.relative_to(ROOT))


def listed_files() -> list[str]:
    """The paths in the tree, whose indentation says in which folder a file is."""
    found: list[str] = []
    folders: list[str] = []
    for line in (ROOT / "docs" / "house.md").read_text().split("```")[1].splitlines():
        if entry := re.match(r"( *)(\S+) +\S", line):
            depth, name = len(entry[1]) // 2, entry[2]
            folders = folders[:depth]
            if name.endswith("/"):
                folders.append(name.removesuffix("/"))
            else:
                found.append("/".join([*folders, name]))
    return found


def source_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    made = ("_pb2", "__init__.py")
    return {
        name
        for name in listed
        if not any(part in name for part in made)
        and (name.endswith(".py") or not name.startswith("demo/"))  # the demo's data has a README of its own
        and (ROOT / name).exists()
    }


def commands(document: Path) -> list[str]:
    """The command lines in a document's shell blocks: without comments, continued lines joined."""
    blocks = re.findall(r"^```sh\n(.*?)^```", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def words(command: str) -> list[str]:
    """Up to the first pipe, without variables set in front, and without the environment's folder."""
    parts = shlex.split(command.replace("$'", "'"), comments=True)
    parts = parts[: parts.index("|")] if "|" in parts else parts
    while parts and re.match(r"\w+=", parts[0]):
        parts = parts[1:]
    return [parts[0].removeprefix(".venv/bin/"), *parts[1:]] if parts else []


def calls_of(program: list[str]) -> list[list[str]]:
    """The arguments of every call of a program in the documents."""
    calls = [words(command) for document in DOCUMENTS for command in commands(document)]
    return [call[len(program) :] for call in calls if call[: len(program)] == program]


def drover_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("drover")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tree_is_the_repository() -> None:
    listed = [file for file in listed_files() if not file.startswith("tests/")]
    assert set(listed) == source_files()
    assert len(listed) == len(set(listed))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= README_LINES


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_of_prose_are_short(document: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith(("|", "!"))]
    assert [line for line in lines if len(line) >= PROSE_COLUMNS] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_document() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name_of(d) for d in DOCUMENTS if d.name != "README.md" and f"({name_of(d)}" not in text] == []


@pytest.mark.parametrize("arguments", calls_of(["drover"]), ids=" ".join)
def test_drover_takes_the_commands_that_are_printed(arguments: list[str]) -> None:
    args = drover_parser().parse_args(arguments)
    if args.command == "serve":
        load_deployment(ROOT / args.config, args.overrides)


@pytest.mark.parametrize("arguments", calls_of(["python", "-m", "bench"]), ids=" ".join)
def test_the_benchmark_takes_the_commands_that_are_printed(arguments: list[str]) -> None:
    bench_parser().parse_args(arguments)


@pytest.mark.parametrize("arguments", calls_of(["python", "-m", "bench.chaos"]), ids=" ".join)
def test_the_fault_bench_takes_the_commands_that_are_printed(arguments: list[str]) -> None:
    chaos_parser().parse_args(arguments)


def test_commands_are_found() -> None:
    assert len(calls_of(["drover"])) > 10
    assert calls_of(["python", "-m", "bench"])
    assert ["demo"] in calls_of(["make"])


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_make_targets_exist(document: Path) -> None:
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    inline = re.findall(r"`make ([a-z][a-z-]*)", document.read_text())
    in_blocks = [command.split()[1] for command in commands(document) if command.startswith("make ")]
    assert {*inline, *in_blocks} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_commands_named_in_the_text_exist(document: Path) -> None:
    named = re.findall(r"`drover ([a-z]+)", document.read_text())
    assert set(named) <= set(COMMANDS)
