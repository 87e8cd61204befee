"""Whether a part may be drained, and where the parts of a node can go."""

from collections.abc import Iterable, Mapping

from cluster.part_names import part_number
from cluster.policy.wanted import Found, Wanted, can_stand_in, leaving, only_held_by

Resources = Mapping[str, float]
_ROUNDING = 1e-6


def objection(name: str, wanted: Wanted, found: Mapping[str, Found]) -> str:
    """Why the part cannot be drained, and what would help; empty if it can.

    Example: shard-1 alone holds experts 2 and 3 of layer 0. The answer is "shard-1 is the only
    shard that serves experts 2-3 of layer 0; ...".
    """
    leaves = leaving(wanted, found)
    others = {other for other, part in found.items() if part.is_ready and other not in leaves and other != name}
    if can_stand_in(others, name, wanted):
        return ""
    if name in wanted.routers:
        return (
            f"{name} is the last router that serves; wait for another to be ready, undo the drain of another, or "
            "serve with a higher router.count"
        )
    numbers = {part_number(other) for other in others.intersection(wanted.shards)}
    lonely = only_held_by(part_number(name), wanted.placement, numbers)
    layer, experts = next(iter(lonely.items()))
    more = f", and experts of {len(lonely) - 1} more layers" if len(lonely) > 1 else ""
    return (
        f"{name} is the only shard that serves {spans(experts)} of layer {layer}{more}; wait for another holder to be "
        "ready, undo the drain of one, or serve with placement.replicas of 2 or more"
    )


def spans(experts: list[int]) -> str:
    """ "expert 3", or "experts 0-3, 7" for [0, 1, 2, 3, 7]."""
    texts, begin = [], 0
    for end in range(1, len(experts) + 1):
        if end == len(experts) or experts[end] != experts[end - 1] + 1:
            first, last = experts[begin], experts[end - 1]
            texts.append(f"{first}" if first == last else f"{first}-{last}")
            begin = end
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(texts)}"


class NoRoom(Exception):
    """A part fits on no node that may be used. The message names the part and what it needs."""


def new_nodes(needs: Mapping[str, Resources], free: Mapping[str, Resources]) -> dict[str, str]:
    """A node for each part: the emptiest that has room, for the neediest part first.

    needs: what each part reserves, such as {"CPU": 1.0}. free: what is left on each node that may
    be used. Raises NoRoom.

    Example: needs {"shard-0": 1 CPU, "router-0": 2 CPUs}, free {"a": 2 CPUs, "b": 1 CPU} gives
    {"router-0": "a", "shard-0": "b"}.
    """
    left = {node: dict(resources) for node, resources in free.items()}
    chosen: dict[str, str] = {}
    for name in sorted(needs, key=lambda part: (-sum(needs[part].values()), part)):
        fitting = [node for node, resources in left.items() if _fits(needs[name], resources)]
        if not fitting:
            wants = " and ".join(f"{amount:g} {resource}" for resource, amount in needs[name].items())
            raise NoRoom(f"no other node has room for {name}, which needs {wants}; add a node")
        node = max(fitting, key=lambda candidate: (left[candidate].get("CPU", 0.0), candidate))
        chosen[name] = node
        for resource, amount in needs[name].items():
            left[node][resource] -= amount
    return chosen


def _fits(need: Resources, free: Resources) -> bool:
    return all(free.get(resource, 0.0) + _ROUNDING >= amount for resource, amount in need.items())


SHORTEST_ID = 6
"""Letters of a node's id that are enough to name it."""


def matching_nodes(target: str, nodes: Iterable[Mapping[str, str]]) -> list[str]:
    """Ids of the nodes that `target` names: by address, by host name, or by how an id begins.

    nodes: {"id": ..., "address": ..., "host": ...}.
    """
    return [
        node["id"]
        for node in nodes
        if target in (node["address"], node["host"]) or (len(target) >= SHORTEST_ID and node["id"].startswith(target))
    ]
