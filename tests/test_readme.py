"""The README's file tree names every source file, and nothing that is gone."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMS = ("checkpoint", "experts", "router", "frontend", "cluster", "client", "cli", "protos", "demo", "bench", "deploy")


def tree() -> str:
    _, _, house = (ROOT / "README.md").read_text().partition("## The house")
    return house.split("```")[1]


def listed_files() -> set[str]:
    found, room = set(), ""
    for line in tree().splitlines():
        if folder := re.match(r"(\w+)/ ", line):
            room = folder[1]
        elif file := re.match(r"  (\S+) +\S", line):
            found.add(f"{room}/{file[1]}")
    return found


def source_files() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    made = ("_pb2", "__init__.py")  # the demo's data has a README of its own
    return {
        name
        for name in listed
        if not any(part in name for part in made)
        and (name.endswith(".py") or not name.startswith("demo/"))
        and (ROOT / name).exists()
    }


def test_the_tree_is_the_repository() -> None:
    assert {file for file in listed_files() if not file.startswith("tests/")} == source_files()


def test_the_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text())
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
