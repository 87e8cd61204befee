"""The placement for other shards, or another number of replicas: even, with the fewest moves from the present one."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from experts.placement import Placement


def spread(
    current: Placement, nodes: Mapping[int, str], replicas: int, slots: int, *, keep_extra: bool = True
) -> Placement:
    """Each expert on at least `replicas` of the shards, and about as many experts on each; `current` if that is so.

    nodes: of each shard that may hold anything, by its number; "" while it has none. slots: of each
    shard and layer, one of which stays free for moving. keep_extra: copies beyond `replicas` stay as
    long as there is room. Replicas are on different nodes where possible. Applied twice, it changes
    nothing more. There must be room, and as many shards as `replicas`:
    `cluster.policy.resize` sees to that.

    Example: 4 experts on shards 0 and 1 are 0 0 1 1. With shard 2 beside them they are 0 0 1 2 in the
    first layer and 0 2 1 1 in the second: one move each. Without shard 1 they are 0 0 0 0.
    """
    shards_of = {
        layer: _Layer(by_expert, nodes, turn).spread(replicas, slots - 1, keep_extra=keep_extra)
        for turn, (layer, by_expert) in enumerate(current.shards_of.items())
    }
    is_same = all(
        {*now} == {*then}
        for layer, by_expert in current.shards_of.items()
        for now, then in zip(by_expert, shards_of[layer], strict=True)
    )
    if is_same:
        return current
    return replace(current, epoch=current.epoch + 1, num_shards=max(nodes, default=-1) + 1, shards_of=shards_of)


class _Layer:
    """turn: another number prefers other shards where nothing else decides, so that all layers together are even."""

    def __init__(self, by_expert: Sequence[Sequence[int]], nodes: Mapping[int, str], turn: int) -> None:
        # A shard without a node yet will get one of its own, as far as can be known.
        self._node_of = {shard: node or f"of shard {shard}" for shard, node in nodes.items()}
        self._holders = [[shard for shard in shards if shard in nodes] for shards in by_expert]
        self._held = Counter(dict.fromkeys(nodes, 0))
        self._held.update(shard for shards in self._holders for shard in shards)
        numbers = sorted(nodes)
        self._turn = {shard: (place - turn) % len(numbers) for place, shard in enumerate(numbers)}

    def spread(self, replicas: int, room: int, *, keep_extra: bool) -> tuple[tuple[int, ...], ...]:
        self._drop(replicas, room if keep_extra else 0)
        self._add(replicas)
        self._drop(replicas, room)  # what was added may have taken the room of copies that were to stay
        while self._level(room):
            pass
        return tuple(map(tuple, self._holders))

    def _drop(self, replicas: int, room: int) -> None:
        """Drop copies beyond `replicas` where a shard holds more than `room`."""
        for expert, holders in enumerate(self._holders):
            while len(holders) > replicas:
                used = Counter(self._node_of[shard] for shard in holders)
                over = [shard for shard in holders if self._held[shard] > room]
                if not over:
                    break
                gone = max(over, key=lambda s: (used[self._node_of[s]], self._held[s], self._turn[s]))
                self._move(expert, gone, None)

    def _add(self, replicas: int) -> None:
        """Give those experts copies that have too few, first those that have none."""
        for expert in sorted(range(len(self._holders)), key=lambda expert: (len(self._holders[expert]), expert)):
            while len(holders := self._holders[expert]) < replicas:
                used = {self._node_of[shard] for shard in holders}
                others = [shard for shard in self._held if shard not in holders]
                self._move(
                    expert,
                    None,
                    min(others, key=lambda s: (self._node_of[s] in used, self._held[s], self._turn[s])),
                )

    def _level(self, room: int) -> bool:
        """Move one expert from a full shard to one that holds fewer by at least two; False if none can be moved.

        Two copies come onto one node only where a shard has no room else.
        """
        by_fullness = sorted(self._held, key=lambda shard: (self._held[shard], self._turn[shard]))
        for full in reversed(by_fullness):
            for empty in by_fullness:
                if self._held[full] - self._held[empty] < 2:
                    break
                for expert in reversed(range(len(self._holders))):
                    if self._can_move(expert, full, empty, keep_nodes=self._held[full] <= room):
                        self._move(expert, full, empty)
                        return True
        return False

    def _can_move(self, expert: int, source: int, target: int, *, keep_nodes: bool) -> bool:
        holders = self._holders[expert]
        if source not in holders or target in holders:
            return False
        if not keep_nodes:
            return True
        after = [*(shard for shard in holders if shard != source), target]
        return len({self._node_of[shard] for shard in after}) >= len({self._node_of[shard] for shard in holders})

    def _move(self, expert: int, source: int | None, target: int | None) -> None:
        holders = self._holders[expert]
        if source is not None:
            holders.remove(source)
            self._held[source] -= 1
        if target is not None:
            holders.append(target)
            self._held[target] += 1
