"""The documents: their file tree names every source file, and their links lead somewhere."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = ("checkpoint", "kernels", "experts", "router", "frontend", "cluster", "cli")
ROOMS = (*FLOORS, "client", "protos", "demo", "bench", "deploy")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def listed_files() -> set[str]:
    """The paths in the tree, whose indentation says in which folder a file is."""
    found, folders = set(), []
    for line in (ROOT / "docs" / "house.md").read_text().split("```")[1].splitlines():
        if entry := re.match(r"( *)(\S+) +\S", line):
            depth, name = len(entry[1]) // 2, entry[2]
            folders = folders[:depth]
            if name.endswith("/"):
                folders.append(name.removesuffix("/"))
            else:
                found.add("/".join([*folders, name]))
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


def test_the_tree_is_the_repository() -> None:
    assert {file for file in listed_files() if not file.startswith("tests/")} == source_files()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_the_links_lead_somewhere(document: Path) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", document.read_text()) if not t.startswith("http")]
    assert [target for target in targets if not (document.parent / target).exists()] == []
