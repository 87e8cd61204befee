"""The architecture's laws, read from the imports. There is no list of exceptions."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import itself and the rooms below it.
FLOORS = ("checkpoint", "experts", "router", "frontend", "cluster", "cli")
BESIDES = {
    "protos": set[str](),
    "client": {"protos"},
    "cli": {"client", "protos"},
    "frontend": {"client", "protos"},
    "cluster": {"client", "protos"},
    "demo": {"checkpoint"},
    "bench": {*FLOORS, "client", "protos"},
}
ROOMS = (*FLOORS, "client", "protos", "demo", "bench")


def allowed(room: str) -> set[str]:
    below = set(FLOORS[: FLOORS.index(room)]) if room in FLOORS else set()
    return {room} | below | BESIDES.get(room, set())


def tracked_sources(room: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", room],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    return [ROOT / name for name in listed if name.endswith(".py") and (ROOT / name).exists()]


def imports_of(source: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Every module that a file imports; at_import_time leaves out what functions and TYPE_CHECKING blocks import."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if at_import_time:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    continue
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                    continue
            yield child
            yield from walk(child)

    for node in walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            assert node.module is not None
            yield node.module


def importers_of(*packages: str, at_import_time: bool = False) -> set[str]:
    """The files, relative to the root, that import one of the packages."""
    return {
        source.relative_to(ROOT).as_posix()
        for room in ROOMS
        for source in tracked_sources(room)
        for module in imports_of(source, at_import_time=at_import_time)
        if any(module == package or module.startswith(package + ".") for package in packages)
    }


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_downwards(room: str) -> None:
    assert tracked_sources(room)
    for source in tracked_sources(room):
        for module in imports_of(source):
            target = module.split(".")[0]
            if target in ROOMS:
                assert target in allowed(room), f"{source.relative_to(ROOT)} imports {module}"


def test_every_folder_with_code_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_only_the_cluster_imports_ray() -> None:
    assert {file.split("/")[0] for file in importers_of("ray")} == {"cluster"}


def test_the_command_line_reaches_the_cluster_only_inside_functions() -> None:
    assert any(file.startswith("cli/") for file in importers_of("cluster"))
    heavy = importers_of("cluster", "frontend", "router", "experts", "torch", at_import_time=True)
    assert not [file for file in heavy if file.startswith("cli/")]


def test_only_the_rooms_at_the_wire_import_grpc() -> None:
    rooms = {file.split("/")[0] for file in importers_of("grpc", "grpc_health", "grpc_reflection", "grpc_tools")}
    assert rooms <= {"frontend", "client", "cluster", "protos", "bench"}
    assert {"frontend", "client"} <= rooms


def test_the_client_needs_grpc_and_protos_only() -> None:
    roots = {module.split(".")[0] for source in tracked_sources("client") for module in imports_of(source)}
    assert roots - sys.stdlib_module_names == {"client", "protos", "grpc", "google", "grpc_health"}


def test_the_scheduler_and_policies_are_plain_python() -> None:
    names = ("scheduler", "sequence", "blocks", "block_table", "kv_layout", "pace", "end_rate")
    router = [ROOT / "router" / f"{name}.py" for name in names]
    plain = [*router, ROOT / "experts" / "placement.py", *tracked_sources("cluster/policy")]
    for source in plain:
        for module in imports_of(source):
            assert module.split(".")[0] not in ("torch", "numpy", "ray", "grpc", "time"), f"{source} imports {module}"


def test_process_groups_appear_in_one_file_only() -> None:
    mentions = {
        source.relative_to(ROOT).as_posix()
        for room in ROOMS
        for source in tracked_sources(room)
        if "torch.distributed" in source.read_text()
    }
    assert mentions == {"experts/process_group.py"}


def test_tokens_cross_ray_in_one_file_only() -> None:
    calling = {
        source.relative_to(ROOT).as_posix()
        for room in ROOMS
        for source in tracked_sources(room)
        if ".pull.remote(" in source.read_text() or ".submit.remote(" in source.read_text()
    }
    assert calling == {"cluster/router_client.py"}
