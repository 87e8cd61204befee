"""Streams of deltas: sorted by request, and whatever ends them early reaches the router with its reason."""

import asyncio
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from weakref import WeakSet

import pytest

from frontend.delta_stream import DeltaStream, DeltaStreams, bytes_of, released
from frontend.resume import Resume
from router.counts.requests import CANCELLED
from router.errors import AlreadyExists, ResourceExhausted, Unavailable
from router.request import FinishReason, GenerationRequest, SamplingParams, TokenDelta, TokenLogprobs
from tests.processes import PATIENCE_S


class Sink:
    """A router that notes what it is told."""

    def __init__(self) -> None:
        self.submitted: list[str] = []
        self.cancelled: dict[str, str] = {}

    def submit(self, request: GenerationRequest) -> None:
        self.submitted.append(request.request_id)

    def cancel(self, request_id: str, ending: str) -> None:
        assert request_id not in self.cancelled
        self.cancelled[request_id] = ending


def with_streams(test: Callable[[DeltaStreams, Sink], Awaitable[Any]]) -> None:
    async def bounded() -> None:
        sink = Sink()
        await asyncio.wait_for(test(DeltaStreams(sink), sink), PATIENCE_S)

    asyncio.run(bounded())


def new(streams: DeltaStreams, *names: str) -> DeltaStream:
    return streams.new_stream([GenerationRequest(name, (1,), SamplingParams(5)) for name in names])


async def begun(stream: DeltaStream) -> "asyncio.Task[list[TokenDelta]]":
    """A task that reads the stream to its end, and has submitted its requests."""

    async def read() -> list[TokenDelta]:
        return [delta async for delta in stream]

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    return task


def tokens(name: str, *token_ids: int, last: bool = False) -> TokenDelta:
    return TokenDelta(name, token_ids, finish_reason=FinishReason.STOP if last else None)


def made(deltas: Sequence[TokenDelta]) -> list[tuple[str, tuple[int, ...]]]:
    return [(delta.request_id, delta.token_ids) for delta in deltas]


def test_each_stream_gets_its_own_deltas_in_order() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        ab, c = await begun(new(streams, "a", "b")), await begun(new(streams, "c"))
        assert sink.submitted == ["a", "b", "c"]
        streams.deliver([tokens("b", 1), tokens("c", 2), tokens("a", 3, last=True), tokens("b", 4, last=True)])
        streams.deliver([tokens("c", 5, last=True)])
        assert made(await ab) == [("b", (1,)), ("a", (3,)), ("b", (4,))]
        assert made(await c) == [("c", (2,)), ("c", (5,))]
        assert not streams._stream_of
        assert sink.cancelled == {}

    with_streams(test)


def test_deltas_that_come_before_anybody_reads_are_kept() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a")
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.deliver([tokens("a", 1), tokens("a", 2), tokens("a", 3, last=True)])
        assert (await reading).token_ids == (1,)
        assert made([delta async for delta in stream]) == [("a", (2,)), ("a", (3,))]

    with_streams(test)


def test_deltas_of_a_closed_or_unknown_stream_are_dropped() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        closed, running = new(streams, "closed"), new(streams, "running")
        reading, staying = await begun(closed), await begun(running)
        closed.close(CANCELLED)
        streams.deliver([tokens("closed", 1), tokens("unknown", 2), tokens("running", 3, last=True)])
        assert made(await staying) == [("running", (3,))]
        assert await reading == []

    with_streams(test)


def test_an_error_is_raised_after_the_tokens_that_came_before_it() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a")
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.deliver([tokens("a", 1), TokenDelta("a", error=Unavailable("gone"))])
        assert (await reading).token_ids == (1,)
        with pytest.raises(Unavailable, match="gone"):
            await anext(stream)

    with_streams(test)


def test_an_error_ends_its_stream_and_closing_still_frees_the_work() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        both = [new(streams, "a", "b"), new(streams, "c")]
        reading = [await begun(stream) for stream in both]
        streams.deliver([TokenDelta(name, error=Unavailable("the router is down")) for name in "abc"])
        for stream, task in zip(both, reading, strict=True):
            with pytest.raises(Unavailable, match="the router is down"):
                await task
            stream.close(CANCELLED)
        assert sink.cancelled == dict.fromkeys("abc", CANCELLED)

    with_streams(test)


def test_nothing_is_submitted_before_the_first_delta_is_asked_for() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a")
        stream.close(CANCELLED)
        assert [delta async for delta in stream] == []
        assert (sink.submitted, sink.cancelled, streams._stream_of) == ([], {}, {})

    with_streams(test)


def test_closing_cancels_what_has_not_ended_and_says_why() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "ended", "stopped", "running")
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.deliver([tokens("ended", 1, last=True)])
        await reading
        stream.cancel("stopped", "stop")
        stream.cancel("ended", "stop")
        stream.close(CANCELLED)
        stream.close("stop")
        assert sink.cancelled == {"stopped": "stop", "running": CANCELLED}
        assert not streams._stream_of

    with_streams(test)


def test_no_delta_of_a_cancelled_request_follows() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a", "b")
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.deliver([tokens("a", 1), tokens("a", 2), TokenDelta("a", error=Unavailable("late")), tokens("b", 3)])
        await reading
        stream.cancel("a", "stop")
        streams.deliver([tokens("a", 4), tokens("b", 5, last=True)])
        assert made([delta async for delta in stream]) == [("b", (3,)), ("b", (5,))]

    with_streams(test)


def test_cancelling_the_waiting_reader_closes_the_stream() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        reading = await begun(new(streams, "a", "b"))
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert sink.cancelled == {"a": CANCELLED, "b": CANCELLED}

    with_streams(test)


def test_an_id_in_use_is_refused_and_the_stream_that_has_it_goes_on() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        reading = await begun(new(streams, "a"))
        second = new(streams, "a")
        with pytest.raises(AlreadyExists, match="request a is under way already"):
            await anext(second)
        second.close(CANCELLED)
        streams.deliver([tokens("a", 1, last=True)])
        assert made(await reading) == [("a", (1,))]
        assert (sink.submitted, sink.cancelled) == (["a"], {})

    with_streams(test)


def test_an_id_that_the_router_refuses_is_not_cancelled_for_the_one_that_has_it() -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a", "b")
        reading = await begun(stream)
        streams.deliver([TokenDelta("a", error=AlreadyExists("request a of another frontend is under way already"))])
        with pytest.raises(AlreadyExists, match="of another frontend"):
            await reading
        stream.close(CANCELLED)
        assert sink.cancelled == {"b": CANCELLED}
        assert not streams._stream_of

    with_streams(test)


@pytest.mark.parametrize("alternatives", [None, 0, 20])
def test_the_bytes_of_a_delta_are_about_what_python_takes(alternatives: int | None) -> None:
    def delta(index: int) -> TokenDelta:
        top = tuple((1000 * index + k, -0.5 - k) for k in range(alternatives or 0))
        logprobs = () if alternatives is None else (TokenLogprobs(1000 + index, -0.25 - index, top),)
        return TokenDelta("a", (1000 + index,), logprobs, first=index)

    taken = []
    for _ in range(5):  # threads that other tests have left may allocate, too
        tracemalloc.start()
        try:
            deltas = [delta(index) for index in range(1000)]
            taken.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert 0.5 < sum(map(bytes_of, deltas)) / min(taken) < 2


def test_unread_memory_is_bounded_and_the_stream_with_most_of_it_ends() -> None:
    async def test() -> None:
        sink = Sink()
        one = bytes_of(tokens("a", 1))
        streams = DeltaStreams(sink, max_unread_bytes=100 * one)
        unread, other = new(streams, "a", "b"), new(streams, "c")
        for stream in (unread, other):
            streams.deliver([])
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            streams.deliver([tokens("a", 0), tokens("c", 0)])
            await reading
        for _ in range(1000):
            streams.deliver([tokens("a", 1), tokens("b", 1), tokens("c", 1)])
            assert streams.unread_bytes <= 100 * one
            assert made([await anext(other)]) == [("c", (1,))]
        assert sink.cancelled == {"a": CANCELLED, "b": CANCELLED}
        with pytest.raises(ResourceExhausted, match="does not read"):
            await anext(unread)
        streams.deliver([tokens("c", 2, last=True)])
        assert made([await anext(other)]) == [("c", (2,))]
        assert not streams._stream_of
        assert streams.unread_bytes == 0

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


@pytest.mark.parametrize("end", ["close", "cancel", "overflow"])
def test_whatever_ends_a_stream_leaves_nothing_of_it_unread(end: str) -> None:
    async def test(streams: DeltaStreams, sink: Sink) -> None:
        stream = new(streams, "a", "b")
        reading = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        streams.deliver([tokens("a", 0)])
        await reading
        deltas = [tokens(name, index) for name in "ab" for index in range(3)]
        held = WeakSet(deltas)
        streams.deliver(deltas)
        del deltas
        if end == "cancel":
            stream.cancel("a", "stop")
            assert {delta.request_id for delta in held} == {"b"}
            assert streams.unread_bytes == sum(map(bytes_of, held))
            stream.cancel("b", "stop")
        elif end == "close":
            stream.close(CANCELLED)
        else:
            stream.overflow()
        assert (list(held), streams.unread_bytes) == ([], 0)

    with_streams(test)


def test_what_an_answer_left_unread_at_its_stop_string_ends_nobody_else() -> None:
    async def test() -> None:
        sink = Sink()
        one = bytes_of(tokens("a", 1))
        streams = DeltaStreams(sink, max_unread_bytes=100 * one)
        stopped, behind = new(streams, "stopped"), new(streams, "behind")
        for stream, name in ((stopped, "stopped"), (behind, "behind")):
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            streams.deliver([tokens(name, 0)])
            await reading
        streams.deliver([tokens("stopped", 1)] * 95)
        stopped.cancel("stopped", "stop")  # its client does not take the last message: it is not closed
        streams.deliver([tokens("behind", 1)] * 90)
        assert sink.cancelled == {"stopped": "stop"}
        streams.deliver([tokens("behind", 2)] * 20)
        assert sink.cancelled == {"stopped": "stop", "behind": CANCELLED}

    asyncio.run(asyncio.wait_for(test(), PATIENCE_S))


def test_a_release_ends_the_call_and_its_older_attempts_alone() -> None:
    ids = ["c", "c-1", "c+1-0", "c+1-1", "c+2-0", "c+2-10", "c+3-0", "another", "another+1-0"]
    assert released(ids, {"c": "c+2"}) == ["c", "c-1", "c+1-0", "c+1-1"]
    assert released(ids, {"c": "c+1", "another": "another+9"}) == ["c", "c-1", "another", "another+1-0"]


def test_attempts_are_in_the_order_of_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = []
    for now_ns in (0, 10**18, 10**18 + 10**6, 4 * 10**18):
        monkeypatch.setattr(time, "time_ns", lambda now_ns=now_ns: now_ns)
        ids.append(Resume("c").attempt_id)
    assert ids == sorted(ids)
    assert len({len(attempt) for attempt in ids}) == 1
