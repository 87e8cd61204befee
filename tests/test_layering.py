"""The architecture's laws, read from the imports, transitively. A law about files is a law about a folder."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import itself and the rooms below it.
FLOORS = ("checkpoint", "kernels", "experts", "router", "frontend", "cluster", "cli")
FOLDERS_OF_PROCESSORS = ("kernels.cpu.", "kernels.cuda.")
BESIDES = {
    "protos": set[str](),
    "client": {"protos"},
    "cli": {"client", "protos"},
    "frontend": {"client", "protos"},
    "cluster": {"client", "protos"},
    "demo": {"checkpoint"},
    "bench": {*FLOORS[: FLOORS.index("frontend")], "cluster", "client", "protos"},
}
ROOMS = (*FLOORS, "client", "protos", "demo", "bench")


def allowed(room: str) -> set[str]:
    below = set(FLOORS[: FLOORS.index(room)]) if room in FLOORS else set()
    return {room} | below | BESIDES.get(room, set())


@cache
def sources() -> dict[str, Path]:
    """Every module of every room, by its import name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    names = [name for name in listed if name.endswith(".py") and (ROOT / name).exists()]
    return {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): ROOT / name for name in names}


def modules_in(folder: str) -> list[str]:
    """The modules of a folder such as "router/schedule"."""
    prefix = folder.replace("/", ".")
    return [name for name in sources() if name == prefix or name.startswith(prefix + ".")]


def nodes_of(module: str, *, deferred: bool) -> Iterator[ast.AST]:
    """The syntax tree's nodes, in order. deferred: also inside functions and in TYPE_CHECKING blocks."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            if not deferred:
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                    continue
                if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                    continue
            yield child
            yield from walk(child)

    return walk(ast.parse(sources()[module].read_text()))


def bound_by(node: ast.AST) -> dict[str, str]:
    """The names that an import statement binds: full names by names in the file."""
    if isinstance(node, ast.Import):
        # "import a.b" binds only a, but runs a.b: kept as a.b.
        return {alias.asname or alias.name: alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "a relative import"
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {}


def with_packages(name: str) -> list[str]:
    """ "a.b.c" -> "a", "a.b", "a.b.c": Python runs the __init__ of every package on the way."""
    parts = name.split(".")
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


@cache
def imports_of(module: str, *, deferred: bool) -> frozenset[str]:
    """What a module imports, with all packages on the way, also its own: ours by module, others by top package."""
    imported = [name for node in nodes_of(module, deferred=deferred) for name in bound_by(node).values()]
    ours = {package for name in (module, *imported) for package in with_packages(name)} & set(sources())
    others = {name.split(".")[0] for name in imported} - set(ROOMS)
    return frozenset((ours | others) - {module})


@cache
def names_used(module: str) -> frozenset[str]:
    """Every name that a module imports or reads, with its attributes, in full: `import torch as t; t.ops` is torch.ops.

    What follows a call or an index comes after a "?".
    """
    nodes = list(nodes_of(module, deferred=True))
    full = {name: target for node in nodes for name, target in bound_by(node).items()}

    def spelled(node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            return f"{spelled(node.value)}.{node.attr}"
        return full.get(node.id, node.id) if isinstance(node, ast.Name) else "?"

    read = {spelled(node) for node in nodes if isinstance(node, ast.Attribute | ast.Name)}
    return frozenset(package for name in {*read, *full.values()} for package in with_packages(name))


def who_uses(*names: str) -> set[str]:
    """The modules that import or read one of the names."""
    return {module for module in sources() if names_used(module) & set(names)}


def path_to(start: str, targets: set[str], *, deferred: bool) -> list[str]:
    """The shortest chain of imports from module `start` into one of the rooms or packages; empty if there is none."""
    chains, seen = [[start]], {start}
    for chain in chains:
        if chain[-1] != start and chain[-1].split(".")[0] in targets:
            return chain
        if chain[-1] in sources():
            following = sorted(imports_of(chain[-1], deferred=deferred) - seen)
            seen.update(following)
            chains += [[*chain, name] for name in following]
    return []


def who_reaches(targets: set[str], modules: list[str], *, deferred: bool) -> list[str]:
    """The chains of imports by which the modules get to the rooms or packages."""
    chains = [path_to(module, targets, deferred=deferred) for module in modules]
    return [" -> ".join(chain) for chain in chains if chain]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_flow_downwards(room: str) -> None:
    assert modules_in(room)
    for module in modules_in(room):
        for target in imports_of(module, deferred=True):
            if target in sources():
                assert target.split(".")[0] in allowed(room), f"{module} imports {target}"


def test_every_folder_with_code_is_a_room() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert folders == set(ROOMS)


def test_every_folder_of_a_room_is_a_package() -> None:
    folders = {path.parent for path in sources().values()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_the_kernels_know_nothing_of_ours() -> None:
    assert who_reaches(set(ROOMS) - {"kernels", "checkpoint"}, modules_in("kernels"), deferred=True) == []


def test_only_the_kernels_know_processors() -> None:
    compiling = {"numba", "llvmlite", "triton"}
    direct = [module for module in sources() if imports_of(module, deferred=True) & compiling]
    assert direct
    assert [module for module in direct if not module.startswith(FOLDERS_OF_PROCESSORS)] == []
    libraries = who_uses("torch.ops", "torch.backends")
    assert libraries
    assert [module for module in libraries if not module.startswith("kernels.")] == []


def test_only_the_kernels_import_the_folder_of_a_processor() -> None:
    direct = {
        module: {name for name in imports_of(module, deferred=True) if f"{name}.".startswith(FOLDERS_OF_PROCESSORS)}
        for module in sources()
    }
    assert any(direct.values())
    assert {module: names for module, names in direct.items() if names and not module.startswith("kernels.")} == {}


def test_every_import_can_be_read() -> None:
    """A name computed at run time would escape all laws of this file."""
    computing = ("__import__", "builtins.__import__", "runpy", "pkgutil", "importlib.util", "importlib.machinery")
    assert who_uses("importlib.import_module", "importlib.reload", "importlib.__import__", *computing) == set()


def test_only_the_cluster_reaches_ray_and_the_command_line_only_inside_functions() -> None:
    importing = {module for module in sources() if "ray" in imports_of(module, deferred=True)}
    assert importing
    assert [module for module in importing if not module.startswith("cluster.")] == []
    # A benchmark may start a cluster, and so reaches Ray through it.
    others = [module for room in ROOMS if room not in ("cluster", "bench", "cli") for module in modules_in(room)]
    assert who_reaches({"ray"}, others, deferred=True) == []
    assert who_reaches({"ray"}, modules_in("cli"), deferred=False) == []
    assert who_reaches({"ray"}, modules_in("cli"), deferred=True)


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = {"cluster", "frontend", "router", "experts", "kernels", "torch", "numpy"}
    assert who_reaches(heavy, modules_in("cli"), deferred=False) == []


def test_only_the_rooms_at_the_wire_reach_grpc() -> None:
    wire = {"grpc", "grpc_health", "grpc_reflection", "grpc_tools"}
    below = [module for room in ("checkpoint", "kernels", "experts", "router", "demo") for module in modules_in(room)]
    assert who_reaches(wire, below, deferred=True) == []
    rooms = {module.split(".")[0] for module in sources() if imports_of(module, deferred=True) & wire}
    assert {"frontend", "client"} <= rooms <= {"frontend", "client", "cluster", "protos", "bench"}


def test_what_protocols_share_knows_none_of_them() -> None:
    edges = (*modules_in("frontend/grpc_api"), *modules_in("frontend/in_process"))
    shared = [module for module in modules_in("frontend") if module not in edges]
    assert shared
    assert who_reaches({"grpc", "grpc_health", "grpc_reflection", "google", "protos"}, shared, deferred=True) == []


def test_the_client_needs_grpc_and_protos_only() -> None:
    imported = {name.split(".")[0] for module in modules_in("client") for name in imports_of(module, deferred=True)}
    with_grpc = {"grpc", "google", "grpc_health", "typing_extensions"}
    assert imported - sys.stdlib_module_names == {"client", "protos", *with_grpc}


def test_schedule_and_policies_are_plain_python_without_a_clock() -> None:
    foreign = {"torch", "ray", "grpc", "time", "datetime"}
    assert modules_in("router/schedule")
    assert who_reaches({*foreign, "numpy"}, modules_in("router/schedule"), deferred=True) == []
    assert modules_in("cluster/policy")  # a policy may compute with arrays
    assert who_reaches(foreign, modules_in("cluster/policy"), deferred=True) == []


def test_a_simulation_has_no_clock_and_no_machine_and_policies_do_not_know_of_it() -> None:
    assert modules_in("cluster/simulation")
    foreign = {"torch", "ray", "grpc", "time", "datetime", "threading", "kernels"}
    assert who_reaches(foreign, modules_in("cluster/simulation"), deferred=True) == []
    simulated = set(modules_in("cluster/simulation"))
    policies = [*modules_in("cluster/policy"), *modules_in("router"), *modules_in("experts")]
    assert [module for module in policies if imports_of(module, deferred=True) & simulated] == []


def test_a_placement_is_plain_data_because_routers_shards_and_policies_share_it() -> None:
    assert who_reaches({"torch", "numpy", "ray", "grpc"}, ["experts.placement"], deferred=True) == []


def test_the_frontend_needs_no_torch_unless_the_router_is_in_its_process() -> None:
    inside = modules_in("frontend/in_process")
    assert who_reaches({"torch"}, inside, deferred=True)
    thin = [module for module in modules_in("frontend") if module not in inside]
    assert who_reaches({"torch", "kernels"}, thin, deferred=True) == []


@pytest.mark.parametrize(
    "module",
    [
        "cluster.config",
        "cluster.serve_app",
        "cluster.actors.controller",
        "cli.status",
        "cli.drain",
        "cli.simulate",
        "cli.stop",
        "cli.main",
    ],
)
def test_what_only_looks_or_forwards_needs_no_torch(module: str) -> None:
    """The deployment file, a Serve replica, and the commands about a running deployment, whatever they import later."""
    if module in (
        "cli.main",
        "cluster.actors.controller",
    ):  # imports every command or actor, but not yet what they need
        assert who_reaches({"torch"}, [module], deferred=False) == []
    else:
        assert who_reaches({"torch", "kernels"}, [module], deferred=True) == []


def test_process_groups_appear_in_one_folder_only() -> None:
    assert who_uses("torch.distributed") == {"experts.groups.nccl"}


def test_tokens_cross_ray_in_one_file_only() -> None:
    remote = (".pull.remote", ".submit.remote")
    calling = {module for module in sources() if any(name.endswith(remote) for name in names_used(module))}
    assert calling == {"cluster.router_client"}
