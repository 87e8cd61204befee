"""Steps between placements: each fits, none leaves an expert alone, and they arrive."""

from collections import Counter
from collections.abc import Iterable, Sequence
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.policy.migration import gains, next_step, objection, same_slots, steps_to
from experts.placement import Placement, uniform_placement

Layer = tuple[tuple[int, ...], ...]


def placement(*by_layer: Layer, epoch: int = 1, num_shards: int = 8) -> Placement:
    return uniform_placement(num_shards, dict(enumerate(by_layer)), epoch=epoch)


def held(layer: Iterable[Iterable[int]]) -> Counter[int]:
    return Counter(shard for shards in layer for shard in shards)


def drawn_layer(rng: Random, experts: int, shards: Sequence[int], most: int) -> Layer:
    """A layer in which each expert has a copy, and no shard has more than `most`. There is room for it."""
    places = [shard for shard in shards for _ in range(most)]
    rng.shuffle(places)
    copies = [{places.pop()} for _ in range(experts)]
    for shard in places[: rng.randint(0, len(places))]:
        copies[rng.randrange(experts)].add(shard)
    return tuple(tuple(sorted(shards)) for shards in copies)


def journey(rng: Random) -> tuple[Placement, Placement, int]:
    """(current, target, slots); shards come and go, and often there is not a slot to spare."""
    num_layers, experts = rng.randint(1, 2), rng.randint(1, 9)
    before, after = (rng.sample(range(6), rng.randint(1, 6)) for _ in range(2))
    slots = max(-(-experts // len(shards)) for shards in (before, after)) + rng.randint(1, 3)
    current, target = (
        placement(*(drawn_layer(rng, experts, shards, slots - 1) for _ in range(num_layers)))
        for shards in (before, after)
    )
    return current, target, slots


@given(st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_every_step_fits_and_the_last_one_is_the_target(seed: int) -> None:
    first, target, slots = journey(Random(seed))
    current, loaded = first, Counter[tuple[int, int, int]]()
    assert objection(target, current, slots, range(8)) == ""
    while not same_slots(current, target):
        step = next_step(current, target, slots)
        assert not same_slots(step, current), "no step on the way"
        assert step.epoch == current.epoch + 1
        assert step.versions_of == first.versions_of
        for layer, by_expert in step.shards_of.items():
            now = current.shards_of[layer]
            both = [{*old, *new} for old, new in zip(now, by_expert, strict=True)]
            assert max(held(both).values()) <= slots
            assert max(held(by_expert).values()) <= slots - 1
            for expert, shards in enumerate(by_expert):
                assert len({*shards}) == len(shards)
                started, wanted = first.shards_of[layer][expert], target.shards_of[layer][expert]
                assert len(shards) >= min(len(now[expert]), len(wanted)) >= min(len(started), len(wanted)) >= 1
                assert {*shards} <= {*now[expert], *wanted}
                assert {*wanted} & {*now[expert]} <= {*shards}
        for shard, slots_gained in gains(current, step).items():
            loaded.update((shard, *slot) for slot in slots_gained)
        current = step
    needed = {(shard, *slot) for shard, gained in gains(first, target).items() for slot in gained}
    assert loaded == Counter(needed)
    assert current.num_shards == target.num_shards or current is first


def test_what_fits_at_once_is_one_step() -> None:
    current, target = placement(((0,), (0,), (1,), (1,))), placement(((0, 1), (1,), (0,), (1, 0)))
    [step] = steps_to(current, target, 5)
    assert step.shards_of == target.shards_of


@pytest.mark.parametrize("shards", [2, 3, 6])
def test_full_shards_hand_their_experts_round_in_one_step(shards: int) -> None:
    current = placement(tuple((shard,) for shard in range(shards)))
    target = placement(tuple(((shard + 1) % shards,) for shard in range(shards)))
    assert [same_slots(step, target) for step in steps_to(current, target, 2)] == [True]


def test_full_shards_swap_all_they_have_one_by_one() -> None:
    current, target = placement(((0,), (0,), (0,), (1,), (1,), (1,))), placement(((1,), (1,), (1,), (0,), (0,), (0,)))
    assert len(list(steps_to(current, target, 4))) == 3
    assert len(list(steps_to(current, target, 5))) == 2
    assert len(list(steps_to(current, target, 6))) == 1


def test_experts_that_gain_copies_come_first() -> None:
    current, target = placement(((0,), (0,), (2,))), placement(((1,), (0,), (2, 1, 0)))
    step = next_step(current, target, 3)
    assert {*step.shards_of[0][2]} == {0, 1, 2}


def test_a_copy_that_is_not_to_stay_goes_in_the_first_step() -> None:
    current, target = placement(((0, 1), (1,))), placement(((0,), (1,)))
    [step] = steps_to(current, target, 2)
    assert step.shards_of == target.shards_of


REFUSED = {
    "shard 0 would hold 3 experts of layer 0; of its 3 slots one is for moving, so at most 2 fit: ": ((0,), (0,), (0,)),
    "expert 1 of layer 0 would be on no shard; give it at least one": ((0,), (), (1,)),
    "expert 2 of layer 0 would be twice on one shard: (1, 1)": ((0,), (0,), (1, 1)),
    "expert 0 of layer 0 would be on shard 7; shards are 0, 1": ((7,), (0,), (1,)),
    "the target has 2 experts in layer 0, the model has 3": ((0,), (1,)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_target_that_cannot_be_is_refused_with_the_number(reason: str) -> None:
    current = placement(((0,), (0,), (1,)))
    assert objection(placement(REFUSED[reason]), current, 3, [0, 1]).startswith(reason)


def test_other_layers_and_other_weights_are_refused() -> None:
    current = placement(((0,),))
    assert objection(placement(((0,),), ((0,),)), current, 2, [0]).startswith("the target has MoE layers [0, 1], ")
    other = uniform_placement(8, current.shards_of, version=2)
    assert objection(other, current, 2, [0]).startswith("the target wants other versions of layer 0's weights")
