"""Requests computed together are answered as if each had been computed alone."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.merged import Merged, can_join, is_sound
from experts.wire import Kind, Message
from tests.router.model.clusters import EXPERTS, HIDDEN, LAYER, even, make_shard, random

SHARD = make_shard(even(1), 0)
groups = st.dictionaries(st.integers(0, EXPERTS - 1), st.integers(1, 5), min_size=1)


def request(counts: dict[int, int], sequence: int, version: int = 1, layer: int = LAYER) -> Message:
    experts = sorted(counts)
    rows = [counts[expert] for expert in experts]
    return Message(
        Kind.ROWS, sequence, layer, experts, [version] * len(experts), rows, random(sum(rows), HIDDEN, seed=sequence)
    )


@settings(deadline=None)
@given(st.lists(groups, min_size=1, max_size=4))
def test_each_request_gets_the_bits_that_it_gets_alone(wanted: list[dict[int, int]]) -> None:
    requests = [request(counts, sequence) for sequence, counts in enumerate(wanted)]
    merged = Merged(requests)
    assert merged.experts == sorted(set().union(*wanted))
    answers = merged.split(SHARD.compute(merged.layer, merged.experts, merged.versions, merged.counts, merged.x_ND))
    for asked, answer_ND in zip(requests, answers, strict=True):
        assert asked.x_ND is not None
        alone_ND = SHARD.compute(asked.layer, asked.experts, asked.versions, asked.counts, asked.x_ND)
        assert torch.equal(answer_ND, alone_ND)


def test_only_one_layer_and_one_version_of_an_expert_is_computed_together() -> None:
    first = request({0: 1, 3: 2}, 1)
    assert can_join(request({0: 2, 4: 1}, 2), [first])
    assert can_join(request({4: 1}, 2, version=2), [first])
    assert not can_join(request({3: 1}, 2, version=2), [first])
    assert not can_join(request({0: 1}, 2, layer=LAYER + 1), [first])


def test_a_request_whose_counts_are_not_those_of_its_rows_is_computed_alone() -> None:
    sound = request({0: 1, 3: 2}, 1)
    assert is_sound(sound)
    assert not is_sound(Message(Kind.ROWS, 1, LAYER, [0], [1], [2], sound.x_ND))
    assert not is_sound(Message(Kind.ROWS, 1, LAYER, [0, 3], [1, 1], [0, 3], sound.x_ND))
    assert not is_sound(Message(Kind.ROWS, 1, LAYER, [0], [1], [2]))
