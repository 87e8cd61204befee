"""The deltas of one call, however often its connection breaks."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from threading import Event, Lock, Timer
from typing import Any

import grpc

from client.errors import ClientError, DeadlineExceeded, ResourceExhausted, ServerUnavailable, error_of
from client.types import Delta, delta_of
from protos.drover.v1 import inference_pb2 as pb

RESUME_S = 30.0
FIRST_PAUSE_S, MAX_PAUSE_S = 0.05, 0.5  # between attempts
NAP_S = 0.02  # how soon a pause notices that the stream was closed


class DeltaStream(Iterator[Delta]):
    """The deltas of a call's answers, as they are made.

    If the stream breaks, it asks the server for the rest: see Resume in inference.proto. The reader
    notices nothing but a pause. `close`, or the end of its `with` block, cancels the rest.

    gaps_s: how long each of these pauses was.
    """

    def __init__(
        self,
        start: Callable[..., Any],
        request: pb.GenerateRequest | pb.ChatRequest,
        address: str,
        timeout_s: float | None,
        resume_s: float,
        reached: Event,
    ) -> None:
        """start: the stub's method. reached: set once the server has answered anything."""
        self._start, self._request, self._address = start, request, address
        self._deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        self._resume_s = resume_s
        self._reached = reached
        self._unfinished = request.sampling.n or 1  # answers whose last delta has not arrived
        self._received: defaultdict[int, list[int]] = defaultdict(list)  # tokens, by index
        self._prompt_logprobs = 0
        self._first: pb.GenerateResponse | None = None
        self._closed = False
        self.gaps_s: list[float] = []
        self._call: Any = start(request, timeout=timeout_s)

    def __next__(self) -> Delta:
        """The next delta.

        Each answer's last one has a finish_reason. Raises ClientError if the server failed. If the
        stream broke and cannot be resumed, it is the error with which it broke.
        """
        broken: ClientError | None = None
        broken_s, pause_s = 0.0, FIRST_PAUSE_S
        while not self._closed:
            try:
                response = next(self._call)
            except StopIteration:
                if self._unfinished <= 0:
                    raise
                message = f"{self._address} ended the answer without a finish reason"
                raise ClientError(grpc.StatusCode.DATA_LOSS, message) from None
            except grpc.RpcError as error:
                failure = error_of(error, self._address)
            except _Late:
                if self._is_over():
                    break
                assert broken is not None
                raise broken from None
            else:
                if broken is not None:
                    self.gaps_s.append(time.monotonic() - broken_s)
                return self._take(response)
            if self._is_over():
                break
            if broken is None:
                broken, broken_s = failure, time.monotonic()
            if isinstance(failure, DeadlineExceeded):
                raise failure
            if not self._may_resume(failure, failure is not broken, time.monotonic() - broken_s):
                raise broken from (None if failure is broken else failure)
            self._start_again(pause_s, broken_s + self._resume_s)
            pause_s = min(2 * pause_s, MAX_PAUSE_S)
        raise StopIteration

    def close(self) -> None:
        """Cancel the rest.

        The server frees the request's memory within one step. Harmless after the end.
        """
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> "DeltaStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, response: pb.GenerateResponse) -> Delta:
        if self._first is None:
            self._first = response
        self._reached.set()
        self._received[response.index] += response.token_ids
        self._prompt_logprobs += len(response.prompt_logprobs)
        delta = delta_of(response)
        self._unfinished -= delta.finish_reason is not None
        return delta

    def _is_over(self) -> bool:
        """Whether nothing more is wanted: only the end of the stream was lost, or it was closed."""
        return self._closed or self._unfinished <= 0

    def _may_resume(self, failure: ClientError, is_attempts: bool, broken_for_s: float) -> bool:
        """Whether to try again after `failure`. is_attempts: it is that of an attempt to resume."""
        if broken_for_s >= self._resume_s:
            return False
        if is_attempts and isinstance(failure, ResourceExhausted):
            return True  # a queue that is full now
        if not isinstance(failure, ServerUnavailable):
            return False
        if self._first is not None:
            return self._first.HasField("seed")  # else the server is too old
        # Nothing was begun. Where no server has ever answered, there may be none.
        return failure.connection == "broken" or (failure.connection == "none" and self._reached.is_set())

    def _rest(self) -> pb.GenerateRequest | pb.ChatRequest:
        """The request for what is missing; the same one if nothing has arrived."""
        if self._first is not None:
            resume = self._request.resume
            resume.Clear()
            resume.request_id = self._first.request_id
            for index in range(max(self._received, default=-1) + 1):
                resume.received.add(token_ids=self._received[index])
            resume.prompt_logprobs = self._prompt_logprobs
            self._request.sampling.seed = self._first.seed
        return self._request

    def _start_again(self, pause_s: float, first_by_s: float) -> None:
        # Not by an Event's wait: `close` may be called by a signal handler amid it.
        now_s = time.monotonic()
        while not self._closed and time.monotonic() < now_s + pause_s:
            time.sleep(NAP_S)
        left_s = None if self._deadline_s is None else max(self._deadline_s - time.monotonic(), 0.0)
        self._call = _Attempt(self._start(self._rest(), timeout=left_s), first_by_s - time.monotonic())
        if self._closed:
            self._call.cancel()


class _Late(Exception):
    """An attempt to resume has answered nothing in time."""


class _Attempt:
    """A call that is given up, with _Late, if its first response does not come within `first_s`.

    A server may accept a call and hang, while what stands before it answers grpc's pings.
    """

    def __init__(self, call: Any, first_s: float) -> None:
        self._call = call
        self._lock = Lock()  # not taken by `cancel`, which a signal handler may call amid `__next__`
        self._answers = self._gave_up = False
        self._timer = Timer(max(first_s, 0.0), self._give_up)
        self._timer.daemon = True
        self._timer.start()

    def __next__(self) -> Any:
        try:
            response = next(self._call)
        except grpc.RpcError:
            if self._gave_up:
                raise _Late from None
            raise
        finally:
            self._timer.cancel()
        if not self._answers:
            with self._lock:
                if self._gave_up:
                    raise _Late
                self._answers = True
        return response

    def cancel(self) -> None:
        self._call.cancel()

    def _give_up(self) -> None:
        with self._lock:
            if self._answers:
                return
            self._gave_up = True
        self._call.cancel()
