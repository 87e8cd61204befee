"""From one placement to another, in steps that fit into the shards' slots.

A shard has room for `slots` experts of each MoE layer. Between two steps it holds at most slots - 1
of them. The last slot is for moving: within a step, new experts are loaded beside all old ones.

Legend: now, then: an expert's shards in the current placement and in the target.
"""

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import replace

from experts.placement import Placement, Slot

_Move = tuple[int, int]
"""(expert, the shard that is to load it)."""


def next_step(current: Placement, target: Placement, slots: int) -> Placement:
    """The placement to go to next: the target itself if all of it fits at once.

    All moves are loads that the target needs. An expert always has as many copies as in the current
    placement, or as in the target if these are fewer. Experts that gain most copies come first.
    `objection` must have passed the target: then each step gets nearer to it.

    Example: with 2 slots, 2 shards that hold one expert each can swap them in one step, as
    each loads the other's beside its own. Three experts that go round in a circle can, too.
    """
    layers = {
        layer: _Layer(now, target.shards_of[layer], slots).after_step() for layer, now in current.shards_of.items()
    }
    step = replace(
        current,
        epoch=current.epoch + 1,
        num_shards=max(current.num_shards, target.num_shards),
        shards_of=layers,
    )
    return replace(step, num_shards=target.num_shards) if same_slots(step, target) else step


def same_slots(one: Placement, other: Placement) -> bool:
    """Whether every shard holds the same in both."""
    return one.shards_of.keys() == other.shards_of.keys() and all(
        {*shards} == {*others}
        for layer, by_expert in one.shards_of.items()
        for shards, others in zip(by_expert, other.shards_of[layer], strict=True)
    )


def steps_to(current: Placement, target: Placement, slots: int) -> Iterator[Placement]:
    """Every step from here to the target."""
    while not same_slots(current, target):
        current = next_step(current, target, slots)
        yield current


def gains(current: Placement, step: Placement) -> dict[int, list[Slot]]:
    """shard -> what it has to load for the step, for the shards that have to load anything."""
    found: dict[int, list[Slot]] = {}
    for layer, by_expert in step.shards_of.items():
        for expert, (now, then) in enumerate(zip(current.shards_of[layer], by_expert, strict=True)):
            for shard in then:
                if shard not in now:
                    found.setdefault(shard, []).append((layer, expert))
    return found


def objection(target: Placement, current: Placement, slots: int, shards: Collection[int]) -> str:
    """Why the target cannot be gone to, and what would help; empty if it can.

    shards: the numbers of the deployment's shards.

    Example: with 3 slots, a target that gives shard 0 all 3 experts of layer 1 is answered by
    "shard 0 would hold 3 experts of layer 1; of its 3 slots one is for moving, so at most 2 fit".
    """
    if target.shards_of.keys() != current.shards_of.keys():
        return f"the target has MoE layers {[*target.shards_of]}, the model has {[*current.shards_of]}"
    for layer, by_expert in target.shards_of.items():
        if len(by_expert) != len(current.shards_of[layer]):
            return (
                f"the target has {len(by_expert)} experts in layer {layer}, the model has "
                f"{len(current.shards_of[layer])}"
            )
        if tuple(target.versions_of[layer]) != tuple(current.versions_of[layer]):
            return f"the target wants other versions of layer {layer}'s weights; a change of placement keeps them"
        for expert, holders in enumerate(by_expert):
            if not holders:
                return f"expert {expert} of layer {layer} would be on no shard; give it at least one"
            if len({*holders}) < len(holders):
                return f"expert {expert} of layer {layer} would be twice on one shard: {holders}; name each shard once"
            if unknown := {*holders}.difference(shards):
                known = ", ".join(map(str, sorted(shards)))
                return f"expert {expert} of layer {layer} would be on shard {min(unknown)}; shards are {known}"
        held = Counter(shard for holders in by_expert for shard in holders)
        for shard, count in sorted(held.items()):
            if count > slots - 1:
                return (
                    f"shard {shard} would hold {count} experts of layer {layer}; of its {slots} slots one is for "
                    f"moving, so at most {slots - 1} fit: serve with more shards, or with a higher shards.slots"
                )
    return ""


class _Layer:
    """One layer amid a step that is being put together.

    after: where each expert will be. held: how many experts each shard will hold then. taken: how
    many slots of it the step takes, old and new ones.
    """

    def __init__(self, now: Sequence[Sequence[int]], then: Sequence[Sequence[int]], slots: int) -> None:
        self._now, self._then, self._slots = now, then, slots
        self._after = [set(shards) for shards in now]
        self._held = Counter(shard for shards in now for shard in shards)
        self._taken = self._held.copy()
        self._surplus: dict[int, set[int]] = {}
        """shard -> its experts that the target does not give it."""
        for expert, shards in enumerate(now):
            for shard in {*shards}.difference(then[expert]):
                self._surplus.setdefault(shard, set()).add(expert)

    def after_step(self) -> tuple[tuple[int, ...], ...]:
        changed = [expert for expert, now in enumerate(self._now) if {*now} != {*self._then[expert]}]
        for expert in changed:
            self._let_go(expert)
        for expert in sorted(changed, key=lambda expert: (-len(self._then[expert]) / len(self._now[expert]), expert)):
            for shard in self._then[expert]:
                if shard not in self._after[expert] and (chain := self._chain(expert, shard)):
                    self._take(chain)
        return tuple(map(_ordered, self._after, self._now, self._then))

    def _chain(self, expert: int, shard: int) -> list[_Move]:
        """Moves that must be made together so that `shard` can load `expert`; empty if it cannot now.

        A shard with slots - 1 experts gives one of those that it is not to keep to another shard,
        which may have to give one, too. Breadth first, so the fewest moves.
        """
        if self._taken[shard] >= self._slots:
            return []
        came_by: dict[int, tuple[_Move, int | None]] = {shard: ((expert, shard), None)}
        waiting = deque([shard])
        while waiting:
            full = waiting.popleft()
            if self._held[full] < self._slots - 1 or expert in self._surplus.get(full, ()):
                return _back(came_by, full)
            for other in sorted(self._surplus.get(full, ())):
                for taker in self._then[other]:
                    has_room = taker not in self._after[other] and self._taken[taker] < self._slots
                    if has_room and taker not in came_by:
                        came_by[taker] = (other, taker), full
                        waiting.append(taker)
        return []

    def _take(self, chain: Sequence[_Move]) -> None:
        for nth, (expert, shard) in enumerate(chain):
            self._after[expert].add(shard)
            self._held[shard] += 1
            self._taken[shard] += 1
            if nth:  # it comes from the shard that takes the one before
                self._drop(expert, chain[nth - 1][1])
        first, last = chain[0][0], chain[-1][1]
        if first in self._surplus.get(last, ()):  # the chain is a circle
            self._drop(first, last)
        self._let_go(first)

    def _let_go(self, expert: int) -> None:
        """Drop the copies that are not to stay, as long as enough others are there; of the fullest shards first."""
        least = min(len(self._now[expert]), len(self._then[expert]))
        surplus = self._after[expert].difference(self._then[expert])
        for shard in sorted(surplus, key=lambda shard: (-self._held[shard], shard)):
            if len(self._after[expert]) > least:
                self._drop(expert, shard)

    def _drop(self, expert: int, shard: int) -> None:
        self._after[expert].remove(shard)
        self._held[shard] -= 1
        self._surplus[shard].remove(expert)


def _back(came_by: Mapping[int, tuple[_Move, int | None]], end: int) -> list[_Move]:
    """The moves from the first to that which ends at shard `end`."""
    moves: list[_Move] = []
    shard: int | None = end
    while shard is not None:
        move, shard = came_by[shard]
        moves.append(move)
    return moves[::-1]


def _ordered(shards: Set[int], now: Sequence[int], then: Sequence[int]) -> tuple[int, ...]:
    """In the target's order, then in the current one."""
    return tuple(shard for shard in dict.fromkeys((*then, *now)) if shard in shards)
