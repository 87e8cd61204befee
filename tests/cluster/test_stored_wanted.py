"""What a controller that is started again finds is what it had wanted."""

from dataclasses import replace

from cluster.policy.resize import Room, abort, begin
from cluster.policy.wanted import Resize
from cluster.stored_wanted import from_json, to_json
from tests.cluster.policy.test_reconcile import TWO_SHARDS, running

ROOM = Room(4, {"router": {}, "shard": {}}, {"a": {"CPU": 9.0}})


def test_an_operation_survives_with_all_that_it_changes_and_what_it_goes_back_to() -> None:
    wanted, refusal = begin(Resize("op", shards=3, routers=2), TWO_SHARDS, running(TWO_SHARDS), ROOM, 30.0)
    assert refusal == ""
    wanted = replace(wanted, drained={"router-0": 1.5}, cleared={"abc": 2.0})
    assert from_json(to_json(wanted, ["shard-1"]), TWO_SHARDS) == (wanted, {"shard-1"})
    aborted, _ = abort(wanted, "op", "as was asked for", 30.0)
    assert from_json(to_json(aborted, []), TWO_SHARDS) == (aborted, frozenset())
