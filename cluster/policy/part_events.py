"""What has happened to a deployment's parts between two looks, in words for its operators."""

from collections.abc import Mapping

from cluster.policy.wanted import Found


def part_events(before: Mapping[str, Found], after: Mapping[str, Found]) -> list[tuple[str, str]]:
    """(part, what happened), by part.

    Example: {"shard-1": Found("a", restarts=0)}, then {"shard-1": Found("b", is_ready=False,
    restarts=1)} gives [("shard-1", "died; Ray has started it again (restart 1)")].
    """
    names = sorted({*before, *after})
    return [(name, text) for name in names for text in _happened(before.get(name), after.get(name))]


def _happened(before: Found | None, after: Found | None) -> list[str]:
    if after is None:
        return ["is gone"]
    if before is None:
        return ["was created" if after.node else "was created, and waits for a node"]
    if after.restarts > before.restarts:
        again = f"(restart {after.restarts})"
        if after.node is None:
            return [f"died; Ray looks for a node for it {again}"]
        return [f"died; Ray has started it again {again}", *_now_ready(False, after)]
    if (before.node is None) != (after.node is None):
        return ["has no process any more"] if after.node is None else ["has a process again", *_now_ready(False, after)]
    return [*_links(before, after), *_now_ready(before.is_ready, after), *_drains(before, after)]


def _now_ready(was_ready: bool, after: Found) -> list[str]:
    if was_ready == after.is_ready:
        return []
    return ["is ready"] if after.is_ready else ["does not answer, or is loading"]


def _links(before: Found, after: Found) -> list[str]:
    if not before.is_ready or not after.is_ready:  # a router that starts has no links yet
        return []
    lost = [f"lost its link to {shard}: {why}" for shard, why in after.unlinked.items() if shard not in before.unlinked]
    return lost + [f"is linked to {shard} again" for shard in before.unlinked if shard not in after.unlinked]


def _drains(before: Found, after: Found) -> list[str]:
    if before.orders is None or after.orders is None or before.orders.is_draining == after.orders.is_draining:
        return []
    return ["drains" if after.orders.is_draining else "takes new requests again"]
