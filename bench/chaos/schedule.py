"""Which faults come, in which order: modes, targets, points, and a schedule from a seed. Pure; it starts nothing."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

LOCAL, HOSTS = "local", "hosts"
"""Layouts: everything on one Ray node, or Ray nodes in network namespaces, shards on other nodes than the router."""

SHARD_TARGETS = ("shard", "minority", "replicas")
TARGETS = {
    "shard": "one shard",
    "minority": "fewer than half of the shards; where replicas allow it, none of them the last of an expert",
    "replicas": "all shards that hold one expert",
    "router": "one router",
    "frontend": "one frontend replica",
    "haproxy": "the HAProxy that clients connect to",
    "controller": "the controller",
    "gcs": "Ray's head process",
    "raylet": "the raylet of a node with shards",
    "node": "a whole node with shards",
    "logs": "the file system of all logs",
    "any": "whatever the parts of a composed fault name",
    "shards": "the number of shards: 2, 4, 3, 2",
    "routers": "the number of routers: 1, 2, 1",
}
AT_RANDOM, DRAIN = "random", "drain"
SHARD_POINTS = (AT_RANDOM, "dispatch", "dispatched", "combine", "compute", "computed", DRAIN, "load", "join", "start")
ROUTER_POINTS = (AT_RANDOM, "dispatch", "dispatched", "combine", DRAIN, "load", "start")
DURING_RESTART = ("load", "join", "start")
"""Points that a part passes only when it starts: it is killed at random first, and there a second time."""


@dataclass(frozen=True)
class Mode:
    """A way to fail.

    help: for --help. targets: by default. hold_s: how long it lasts before it is healed; None if
    nothing is held. layout: where it can be done. needs_root: even on one node. by_default: also
    where no mode is named.
    """

    help: str
    targets: tuple[str, ...]
    hold_s: float | None = None
    layout: str = LOCAL
    needs_root: bool = False
    by_default: bool = True


CUT_S = 5.0
STUCK_S = 12.0
"""Longer than links.stuck_after_ms, after which a process ends itself."""
MODES = {
    "crash": Mode("SIGKILL, at random or at a named point", (*SHARD_TARGETS, "router", "frontend", "haproxy")),
    "stop": Mode("SIGSTOP, and SIGCONT later", ("shard", "minority", "router"), 3.0),
    "deadlock": Mode("the computing thread blocks; heartbeats go on", ("shard", "minority", "router"), STUCK_S),
    "slow": Mode("a shard computes 100 times as long", SHARD_TARGETS, CUT_S),
    "blackhole": Mode("no packet to or from the node of a shard", SHARD_TARGETS, CUT_S, HOSTS),
    "blackhole-send": Mode("no packet from the node of a shard", SHARD_TARGETS, CUT_S, HOSTS),
    "blackhole-recv": Mode("no packet to the node of a shard", SHARD_TARGETS, CUT_S, HOSTS),
    "delay": Mode("packets from the node of a shard are late", SHARD_TARGETS, CUT_S, HOSTS),
    "drop": Mode("some packets to and from the node of a shard are lost", SHARD_TARGETS, CUT_S, HOSTS),
    "node-loss": Mode("every process of a node killed, its network cut", ("node",), 8.0, HOSTS),
    "head-loss": Mode("SIGKILL of Ray's head or a raylet", ("gcs", "raylet", "controller"), 3.0, HOSTS),
    "disk-full": Mode("no room for logs", ("logs",), CUT_S, LOCAL, needs_root=True),
    "corrupt-slice": Mode("a shard restarts and finds its weights damaged", ("shard", "minority", "replicas"), 4.0),
    "random": Mode("two faults of the modes above at once", ("any",)),
    "resize": Mode(
        "other numbers of parts, and amid that SIGKILL of any; for --shards 2 --routers 1",
        ("shards", "routers"),
        by_default=False,
    ),
}
PROCESSES = (*SHARD_TARGETS, "router", "frontend", "haproxy", "controller")
ALLOWED = {mode: MODES[mode].targets for mode in MODES} | {
    "crash": PROCESSES,
    "stop": PROCESSES,
    "deadlock": (*SHARD_TARGETS, "router"),
    "corrupt-slice": SHARD_TARGETS,
}
"""The targets that a mode knows how to hit."""
COMPOSABLE = {
    "crash": ("shard", "minority", "router", "frontend", "haproxy"),
    "stop": ("shard", "router", "frontend"),
    "deadlock": ("shard",),
    "slow": ("shard",),
}
"""What a composed fault is made of, on any layout."""

RESIZES = (("shards", 4), ("routers", 2), ("shards", 3), ("routers", 1), ("shards", 2))
"""One cycle of the mode "resize"."""
CYCLES, FAULTS_PER_MODE = 3, 9
MOST_DELAY_S = 0.5


@dataclass(frozen=True)
class Part:
    """One fault of a composed one, or a fault by itself. draw: chooses among victims, from 0 to 1."""

    mode: str
    target: str
    point: str
    draw: float


@dataclass(frozen=True)
class Fault:
    """delay_s: how long the bench waits before it, so that it meets no particular moment of a step."""

    mode: str
    target: str
    cycle: int
    delay_s: float
    parts: tuple[Part, ...]

    @property
    def hold_s(self) -> float | None:
        holds = [hold for part in self.parts if (hold := MODES[part.mode].hold_s) is not None]
        return max(holds, default=None)


def schedule(
    seed: int, mode: str, targets: Sequence[str] | None = None, cycles: int = CYCLES, points: bool = True
) -> list[Fault]:
    """The faults of one mode: `cycles` rounds through its targets; more, where these are too few for 9 faults.

    Each target goes through its points in an order of its own, so that three cycles meet three
    different ones, and other seeds others. points: False leaves only faults at random.
    """
    rng = random.Random(f"{seed} {mode}")
    targets = tuple(targets or MODES[mode].targets)
    if mode == "resize":
        return [fault for cycle in range(cycles) for fault in _resizes(rng, targets, cycle)]
    if cycles == CYCLES:
        cycles = max(cycles, -(-FAULTS_PER_MODE // len(targets)))
    order = {target: _points(rng, mode, target, points) for target in targets}
    return [_fault(rng, mode, target, cycle, order[target]) for cycle in range(cycles) for target in targets]


def _fault(rng: random.Random, mode: str, target: str, cycle: int, points: Sequence[str]) -> Fault:
    delay_s, point = rng.uniform(0, MOST_DELAY_S), points[cycle % len(points)]
    if mode != "random":
        return Fault(mode, target, cycle, delay_s, (Part(mode, target, point, rng.random()),))
    parts = []
    for chosen in rng.sample(sorted(COMPOSABLE), 2):
        parts.append(Part(chosen, rng.choice(COMPOSABLE[chosen]), AT_RANDOM, rng.random()))
    return Fault(mode, target, cycle, delay_s, tuple(parts))


def _resizes(rng: random.Random, targets: Sequence[str], cycle: int) -> list[Fault]:
    """The point of each is the new number."""
    return [
        Fault(
            "resize", target, cycle, rng.uniform(0, MOST_DELAY_S), (Part("resize", target, f"{count}", rng.random()),)
        )
        for target, count in RESIZES
        if target in targets
    ]


def _points(rng: random.Random, mode: str, target: str, points: bool) -> list[str]:
    if mode != "crash" or not points:
        return [AT_RANDOM]
    known = {**dict.fromkeys(SHARD_TARGETS, SHARD_POINTS), "router": ROUTER_POINTS}.get(target, (AT_RANDOM,))
    shuffled = list(known)
    rng.shuffle(shuffled)
    return shuffled


def minority(count: int, replicas_of: Sequence[frozenset[int]], draw: float) -> list[int]:
    """Fewer than half of `count` shards, at least one; if it can be, without all shards of any expert.

    replicas_of: for each expert, the shards that hold it. Of 5 shards 2; among those pairs that
    leave every expert a shard, `draw` chooses.
    """
    from itertools import combinations

    size = max(1, (count - 1) // 2)
    groups = [frozenset(group) for group in combinations(range(count), size)]
    harmless = [group for group in groups if not any(shards <= group for shards in replicas_of)]
    chosen = harmless or groups
    return sorted(chosen[int(draw * len(chosen)) % len(chosen)])
