"""The log of a deployment's events: bounded, numbered, and kept over a restart."""

from cluster.events import KEPT, EventLog
from cluster.reports import OperationStatus

DONE = OperationStatus("resize-1", "resize", "done", "3 shards", 2, 2, moved_bytes=10, total_bytes=10)


def texts(log: EventLog, after: int = 0) -> list[str]:
    return [event.text for event in log.after(after)]


def test_events_come_in_order_and_after_a_number() -> None:
    times = iter([10.0, 11.0])
    log = EventLog(clock=lambda: next(times))
    log.add("part", "shard-1", "died", restarts=2)
    log.add("decision", "copies", "hold")
    first, second = log.after(0)
    assert (first.kind, first.subject, first.text, first.time_s, first.data) == (
        "part", "shard-1", "died", 10.0, {"restarts": 2}
    )  # fmt: skip
    assert log.after(first.number) == [second]
    assert log.after(second.number) == []
    assert log.after(0, limit=1) == [second]


def test_the_log_is_bounded() -> None:
    log = EventLog()
    for number in range(KEPT + 3):
        log.add("part", "shard-0", f"{number}")
    assert texts(log) == [f"{number}" for number in range(3, KEPT + 3)]


def test_a_log_goes_on_where_the_stored_one_ended_and_its_numbers_rise() -> None:
    stored: list[str] = []
    log = EventLog(store=stored.append)
    log.add("part", "shard-1", "died")
    log.store()
    log.store()
    assert len(stored) == 1  # there was nothing new
    log.add("part", "shard-1", "was not stored")
    again = EventLog(stored[0], stored.append)
    again.store()
    assert len(stored) == 1
    again.add("part", "shard-1", "is ready")
    assert texts(again) == ["died", "is ready"]
    seen = log.after(0)[-1].number  # by somebody who follows the events
    assert texts(again, after=seen) == ["is ready"]


def test_what_could_not_be_stored_is_stored_with_the_next() -> None:
    stored: list[str] = []

    def store(text: str) -> None:
        if not stored:
            stored.append("")
            raise ConnectionError("the head is away")
        stored.append(text)

    log = EventLog(store=store)
    log.add("part", "shard-1", "died")
    log.store()
    log.store()
    assert texts(EventLog(stored[-1])) == ["died"]


def test_how_an_operation_ended_is_known_afterwards() -> None:
    stored: list[str] = []
    log = EventLog(store=stored.append)
    log.add("operation", "resize-1", "step 1 of 2 is committed", epoch=7)
    assert log.operation("resize-1") is None
    log.ended(DONE)
    log.ended(OperationStatus("resize-2", "resize", "aborted", "9 shards", reason="a slot cannot be read"))
    assert EventLog(stored[-1]).operation("resize-1") == DONE  # whatever happens to this process now
    assert texts(log)[1:] == ["resize to 3 shards done", "resize to 9 shards aborted: a slot cannot be read"]
