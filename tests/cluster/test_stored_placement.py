"""What a controller stores of placements comes back as it was."""

from dataclasses import replace

import pytest

from cluster.policy.change import Change, Ended, PlacementState
from cluster.stored_placement import from_json, to_json
from experts.placement import even_placement

NOW = even_placement([1, 3], 5, 2, epoch=7)
BEFORE = replace(NOW, epoch=6)
ENDED = Ended("last", "resize", "aborted: shard-1: the file is truncated", 2, 99)
CHANGE = Change("op", even_placement([1, 3], 5, 3), "rebalance", 1, 40)
STATES = {"settled": PlacementState(5, NOW), "amid a change": PlacementState(6, NOW, BEFORE, CHANGE, ENDED)}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_what_is_stored_comes_back(state: PlacementState) -> None:
    assert from_json(to_json(state)) == state
