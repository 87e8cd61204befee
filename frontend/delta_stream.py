"""The deltas of a call's requests as one stream, whichever router makes them.

A router's deltas arrive mixed. `DeltaStreams` sorts them by request; each `DeltaStream` queues
those of one call. Both live on one event loop.

A router does not wait for clients. What a client does not read waits here, since gRPC takes no more
messages than its flow control allows. All streams together hold MAX_UNREAD_BYTES. Beyond that, the
stream with most unread ends, and its requests with it.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from router.counts.requests import CANCELLED
from router.errors import AlreadyExists, RequestError, ResourceExhausted, Resumed
from router.request import GenerationRequest, TokenDelta

MAX_UNREAD_BYTES = 256 * 2**20

# Memory of CPython's objects, as tests/frontend/test_delta_stream.py measures it.
DELTA_BYTES = 250
LOGPROBS_BYTES = 200  # of one position
ALTERNATIVE_BYTES = 120


def released(request_ids: Iterable[str], keep_of: Mapping[str, str]) -> list[str]:
    """Those of `request_ids` that belong to older attempts than the one to keep.

    keep_of: by call id, the id of an attempt. A request's id is CALL, CALL-1, ... at first, and
    CALL+ATTEMPT-0, CALL+ATTEMPT-1, ... once the call is resumed; attempts are in the order of their
    text. Newer attempts go on, too: a release may be late.
    """
    found = []
    for request_id in request_ids:
        first, _, attempt = request_id.partition("+")
        keep = keep_of.get(first.partition("-")[0])
        if keep is not None and attempt < keep.partition("+")[2]:
            found.append(request_id)
    return found


def bytes_of(delta: TokenDelta) -> int:
    """About how much memory a delta takes."""
    told = [entry for entry in (*delta.logprobs, *delta.prompt_logprobs) if entry is not None]
    alternatives = sum(len(entry.top) for entry in told)
    return DELTA_BYTES + 36 * len(delta.token_ids) + LOGPROBS_BYTES * len(told) + ALTERNATIVE_BYTES * alternatives


class RequestSink(Protocol):
    """The way to a router.

    Neither method waits, so that a stream can be closed where nothing may be awaited.
    """

    def submit(self, request: GenerationRequest) -> None:
        """Queue a request. A refusal comes as a delta with an error."""
        ...

    def cancel(self, request_id: str, ending: str) -> None:
        """Free a request's work within one step.

        ending: how it is counted, see `DeltaStream.cancel`.
        """
        ...


@dataclass
class Unread:
    """Memory of what waits for readers, of all streams of a router client."""

    total_bytes: int = 0


class DeltaStream:
    """The deltas of one or several requests in the order of their arrival.

    It ends when all requests have ended.
    The requests are submitted when the first delta is asked for. Whoever reads the stream must
    close it.
    """

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        sink: RequestSink,
        stream_of: dict[str, "DeltaStream"],
        unread: Unread,
    ) -> None:
        """stream_of: by request id, which stream gets the deltas; this one enters its requests
        while they run. unread: this stream's part is counted in it."""
        self._unsubmitted = tuple(requests)
        self._sink, self._stream_of = sink, stream_of
        self._running: set[str] = set()
        self._queue: deque[tuple[TokenDelta, int]] = deque()  # with its bytes
        self._error: RequestError | None = None
        self._unread = unread
        self.unread_bytes = 0
        self._awake = asyncio.Event()

    def __aiter__(self) -> "DeltaStream":
        return self

    async def __anext__(self) -> TokenDelta:
        """The next delta.

        Raises a delta's error, such as ResourceExhausted or Unavailable (see router/errors.py).

        Raises AlreadyExists if another stream runs a request of the same id, here or at another
        frontend. That one goes on: closing this stream does not cancel it.

        If the reader is cancelled while it waits here, this closes the stream.
        """
        self._submit()
        while self._running or self._error is not None:
            if self._error is not None:
                raise self._error
            if not self._queue:
                self._awake.clear()
                try:
                    await self._awake.wait()
                except asyncio.CancelledError:
                    self.close(CANCELLED)
                    raise
                continue
            delta, delta_bytes = self._queue.popleft()
            self._count_unread(-delta_bytes)
            if isinstance(delta.error, AlreadyExists):
                self._forget(delta.request_id)  # the id belongs to another request, which closing must not cancel
                raise delta.error
            if delta.error is not None:
                # Not forgotten: if the router only seemed to be down, closing the stream must
                # still free the work.
                raise delta.error
            if delta.is_last:
                self._forget(delta.request_id)
            return delta
        raise StopAsyncIteration

    def put(self, delta: TokenDelta) -> None:
        """Queue a delta for the reader."""
        delta_bytes = bytes_of(delta)
        self._queue.append((delta, delta_bytes))
        self._count_unread(delta_bytes)
        self._awake.set()

    def cancel(self, request_id: str, ending: str) -> None:
        """End one request: no delta of it follows, and the router frees its work within one step.

        ending: why, as the router shall count it, one of router/counts/requests.py's ENDINGS. A
        request that has ended by itself stays counted as it was.
        """
        if request_id in self._running:
            self._forget(request_id)
            self._sink.cancel(request_id, ending)

    def overflow(self) -> None:
        """Cancel every request, forget what is unread, and tell the reader why, should one come."""
        self._error = ResourceExhausted(
            f"the client does not read its stream: {self.unread_bytes >> 20} MiB waited for it; read messages as they "
            "come, or ask for less"
        )
        self.close(CANCELLED)
        self._awake.set()

    def close(self, ending: str) -> None:
        """Cancel every request that has not ended, and forget what is unread.

        May be called at any time, again, and while a reader waits.
        """
        self._unsubmitted = ()
        self._drop_unread()  # all at once: each of the requests would look through the whole queue
        for request_id in tuple(self._running):
            self.cancel(request_id, ending)

    def _drop_unread(self, request_id: str | None = None) -> None:
        """Forget the deltas of one request, or of all."""
        kept = deque(entry for entry in self._queue if request_id not in (None, entry[0].request_id))
        self._count_unread(sum(delta_bytes for _, delta_bytes in kept) - self.unread_bytes)
        self._queue = kept

    def _count_unread(self, more_bytes: int) -> None:
        self.unread_bytes += more_bytes
        self._unread.total_bytes += more_bytes

    def _submit(self) -> None:
        requests, self._unsubmitted = self._unsubmitted, ()
        for request in requests:
            if request.request_id in self._stream_of:
                raise AlreadyExists(f"request {request.request_id} is under way already; it goes on")
            self._running.add(request.request_id)
            self._stream_of[request.request_id] = self
            self._sink.submit(request)

    def _forget(self, request_id: str) -> None:
        """End one request here, and drop what is unread of it.

        So a stream without requests holds no unread bytes. `DeltaStreams.deliver` relies on it: it
        looks for the stream with most unread among those with requests.
        """
        self._running.remove(request_id)
        del self._stream_of[request_id]
        self._drop_unread(request_id)
        self._awake.set()  # the last request may have ended under a reader that waits


class DeltaStreams:
    """All streams of one router client."""

    def __init__(self, sink: RequestSink, max_unread_bytes: int = MAX_UNREAD_BYTES) -> None:
        self._sink = sink
        self._max_unread_bytes = max_unread_bytes
        self._unread = Unread()
        self._stream_of: dict[str, DeltaStream] = {}

    def new_stream(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        return DeltaStream(requests, self._sink, self._stream_of, self._unread)

    def deliver(self, deltas: Iterable[TokenDelta]) -> None:
        """Hand each delta to its stream; those of requests that have ended or were cancelled are
        dropped."""
        for delta in deltas:
            stream = self._stream_of.get(delta.request_id)
            if stream is not None:
                stream.put(delta)
        while self._unread.total_bytes > self._max_unread_bytes:
            max(self._stream_of.values(), key=lambda stream: stream.unread_bytes).overflow()

    def release(self, call_id: str, keep: str) -> None:
        """End the requests of a call that is resumed: see `RouterClient.release`."""
        for request_id in released(self._stream_of, {call_id: keep}):
            self._sink.cancel(request_id, CANCELLED)
            self.deliver([TokenDelta(request_id, error=Resumed())])

    @property
    def unread_bytes(self) -> int:
        """Memory of what waits for readers now."""
        return self._unread.total_bytes
