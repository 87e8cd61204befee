"""What may be drained, where its parts go, and what the refusals say."""

import pytest

from cluster.policy.drain import NoRoom, matching_nodes, new_nodes, objection, spans
from cluster.policy.wanted import Found, Wanted
from experts.placement import even_placement
from tests.cluster.policy.test_reconcile import REPLICAS, TWO_SHARDS, running


def test_what_has_a_stand_in_may_be_drained() -> None:
    assert [objection(name, REPLICAS, running(REPLICAS)) for name in REPLICAS.parts] == [""] * 5


def test_the_only_holder_may_not_and_the_refusal_names_its_experts_and_the_fix() -> None:
    text = objection("shard-1", TWO_SHARDS, running(TWO_SHARDS))
    assert "shard-1 is the only shard that serves experts 2-3 of layer 0, and experts of 1 more layers" in text
    assert "placement.replicas" in text


@pytest.mark.parametrize("state", ["gone", "loading", "drained", "on a cleared node"])
def test_who_is_away_or_leaves_stands_in_for_nobody(state: str) -> None:
    found = running(REPLICAS)
    changes = {
        "gone": {name: part for name, part in found.items() if name != "router-1"},
        "loading": found | {"router-1": Found("a", is_ready=False)},
        "on a cleared node": found | {"router-1": Found("b")},
    }
    drained = {"router-1": 1.0} if state == "drained" else {}
    wanted = Wanted(REPLICAS.routers, REPLICAS.shards, REPLICAS.placement, drained, {"b": 1.0})
    assert "last router that serves" in objection("router-0", wanted, changes.get(state, found))
    assert objection("shard-0", wanted, changes.get(state, found)) == ""


def test_a_single_expert_and_gaps_read_well() -> None:
    assert spans([3]) == "expert 3"
    assert spans([0, 1, 2, 3, 7, 9, 10]) == "experts 0-3, 7, 9-10"
    alone = Wanted(("router-0",), ("shard-0",), even_placement([0], 1, 1))
    assert "expert 0 of layer 0; wait" in objection("shard-0", alone, running(alone))


def test_parts_go_to_the_emptiest_node_with_room_the_neediest_first() -> None:
    needs = {"shard-0": {"CPU": 1.0}, "router-0": {"CPU": 2.0}, "shard-1": {"CPU": 0.1, "GPU": 1.0}}
    free = {"a": {"CPU": 2.0}, "b": {"CPU": 1.0}, "c": {"CPU": 0.3 - 0.2, "GPU": 1.0}}
    assert new_nodes(needs, free) == {"router-0": "a", "shard-0": "b", "shard-1": "c"}


def test_without_room_the_part_and_its_needs_are_named() -> None:
    with pytest.raises(NoRoom, match=r"shard-1, which needs 1 CPU and 0\.5 GPU; add a node"):
        new_nodes({"shard-0": {"CPU": 1.0}, "shard-1": {"CPU": 1.0, "GPU": 0.5}}, {"a": {"CPU": 2.0}})


def test_a_node_is_named_by_address_host_or_the_beginning_of_its_id() -> None:
    nodes = [
        {"id": "abcdef0123", "address": "10.0.0.1", "host": "one"},
        {"id": "abcdef9876", "address": "10.0.0.2", "host": "two"},
    ]
    assert matching_nodes("10.0.0.2", nodes) == ["abcdef9876"]
    assert matching_nodes("one", nodes) == ["abcdef0123"]
    assert matching_nodes("abcdef", nodes) == ["abcdef0123", "abcdef9876"]
    assert matching_nodes("abcde", nodes) == []
    assert matching_nodes("shard-7", nodes) == []
