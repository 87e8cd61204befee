"""From two looks at the parts of a deployment to what operators are told."""

import pytest

from cluster.policy.part_events import part_events
from cluster.policy.wanted import Found, Orders

RUNS = Found("a")
LINKED = Found("a", orders=Orders())
CUT_OFF = Found("a", orders=Orders(), unlinked={"shard-1": "reset by peer"})


@pytest.mark.parametrize(
    ("before", "after", "texts"),
    [
        (RUNS, RUNS, []),
        (None, RUNS, ["was created"]),
        (None, Found(None), ["was created, and waits for a node"]),
        (RUNS, None, ["is gone"]),
        (RUNS, Found("b", is_ready=False, restarts=1), ["died; Ray has started it again (restart 1)"]),
        (RUNS, Found("b", restarts=1), ["died; Ray has started it again (restart 1)", "is ready"]),
        (RUNS, Found(None, is_ready=False, restarts=1), ["died; Ray looks for a node for it (restart 1)"]),
        (RUNS, Found(None, is_ready=False), ["has no process any more"]),
        (Found(None, is_ready=False), RUNS, ["has a process again", "is ready"]),
        (RUNS, Found("a", is_ready=False), ["does not answer, or is loading"]),
        (Found("a", is_ready=False), RUNS, ["is ready"]),
        (LINKED, CUT_OFF, ["lost its link to shard-1: reset by peer"]),
        (CUT_OFF, CUT_OFF, []),
        (CUT_OFF, LINKED, ["is linked to shard-1 again"]),
        (Found("a", is_ready=False), CUT_OFF, ["is ready"]),
        (LINKED, Found("a", orders=Orders(is_draining=True)), ["drains"]),
        (Found("a", orders=Orders(is_draining=True)), LINKED, ["takes new requests again"]),
    ],
)
def test_what_happened_to_a_part(before: Found | None, after: Found | None, texts: list[str]) -> None:
    looks = [{} if found is None else {"router-0": found} for found in (before, after)]
    assert part_events(*looks) == [("router-0", text) for text in texts]


def test_parts_are_told_apart() -> None:
    before = {"router-0": RUNS, "shard-0": RUNS, "shard-1": RUNS}
    after = {"router-0": RUNS, "shard-1": Found("a", is_ready=False), "shard-2": RUNS}
    assert part_events(before, after) == [
        ("shard-0", "is gone"),
        ("shard-1", "does not answer, or is loading"),
        ("shard-2", "was created"),
    ]
