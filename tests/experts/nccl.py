"""NCCL's rules without a GPU: streams, and communicators of two ranks, on tensors in host memory.

- Each rank of a communicator has one queue, for both directions. Only what is first in it goes on.
- A send of more than EAGER_BYTES is done when its receive is; a smaller one needs no receive.
- Nobody waits in `send`, `recv` or `wait`; a stream's mark tells what is done.
- It knows only where rows are in memory, and keeps them no longer than their owners do.
- Both sizes must match. abort ends all that is queued, and later calls raise.
"""

import threading
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

EAGER_BYTES = 32


@dataclass(eq=False)
class FakeWork:
    memory: "weakref.ref[torch.Tensor]"
    gpu: "FakeGpu"
    is_send: bool
    is_done: bool = False

    @property
    def tensor(self) -> torch.Tensor:
        tensor = self.memory()
        assert tensor is not None, "rows were freed while they travelled"
        return tensor

    def finish(self) -> None:
        self.is_done = True

    def wait(self) -> None:
        self.gpu.current.work.append(self)


@dataclass
class FakeStream:
    work: list[FakeWork] = field(default_factory=list)


@dataclass
class FakeMark:
    before: list[FakeWork]

    def query(self) -> bool:
        return all(work.is_done for work in self.before)


class Ends:
    """A communicator's two queues, and what small sends left for the other rank."""

    def __init__(self) -> None:
        self.queues: list[deque[FakeWork]] = [deque(), deque()]
        self._left_for: list[deque[torch.Tensor]] = [deque(), deque()]

    def step(self) -> bool:
        """Do one thing that can be done; False if there is none. Raises RuntimeError if sizes differ."""
        for rank in (0, 1):
            if not self.queues[rank]:
                continue
            first = self.queues[rank][0]
            if first.is_send and first.tensor.nbytes <= EAGER_BYTES:
                self._left_for[1 - rank].append(first.tensor.clone())
            elif not first.is_send and self._left_for[rank]:
                _copy(self._left_for[rank].popleft(), first.tensor)
            elif not first.is_send and self.queues[1 - rank] and self.queues[1 - rank][0].is_send:
                sent = self.queues[1 - rank][0]
                _copy(sent.tensor, first.tensor)
                self.queues[1 - rank].popleft().finish()
            else:
                continue
            self.queues[rank].popleft().finish()
            return True
        return False


def _copy(sent: torch.Tensor, received: torch.Tensor) -> None:
    if sent.shape != received.shape:
        raise RuntimeError(f"sent {list(sent.shape)}, received {list(received.shape)}")
    received.copy_(sent)


class Network:
    """What joins the two ranks of each communicator. While it is held, what is queued stays queued."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.ends: dict[str, Ends] = {}
        self.aborts: list[tuple[str, int]] = []
        self._is_held = False

    def hold(self) -> None:
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        for ends in self.ends.values():
            self.go_on(ends)

    def go_on(self, ends: Ends) -> None:
        with self.lock:
            while not self._is_held and ends.step():
                pass


class FakeCommunicator:
    def __init__(self, network: Network, name: str, rank: int, gpu: "FakeGpu") -> None:
        self._network, self._name, self._rank, self._gpu = network, name, rank, gpu
        self._is_aborted = False
        with network.lock:
            self._ends = network.ends.setdefault(name, Ends())

    def send(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeWork:
        [tensor] = tensors
        return self._queue(tensor, is_send=True)

    def recv(self, tensors: list[torch.Tensor], peer: int, tag: int) -> FakeWork:
        [tensor] = tensors
        return self._queue(tensor, is_send=False)

    def _queue(self, tensor: torch.Tensor, is_send: bool) -> FakeWork:
        assert tensor.is_contiguous()
        with self._network.lock:
            if self._is_aborted:
                raise RuntimeError("NCCL communicator was aborted")
            work = FakeWork(weakref.ref(tensor), self._gpu, is_send)
            self._ends.queues[self._rank].append(work)
            self._network.go_on(self._ends)
        return work

    def abort(self) -> None:
        with self._network.lock:
            self._is_aborted = True
            self._network.aborts.append((self._name, self._rank))
            while self._ends.queues[self._rank]:
                self._ends.queues[self._rank].popleft().finish()


class FakeGpu:
    """One rank's device."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._of_thread = threading.local()

    @property
    def current(self) -> FakeStream:
        """This thread's current stream."""
        stream: FakeStream = self._of_thread.__dict__.setdefault("stream", FakeStream())
        return stream

    def communicator(self, name: str, rank: int) -> FakeCommunicator:
        return FakeCommunicator(self._network, name, rank, self)

    def stream(self) -> FakeStream:
        return FakeStream()

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before, self._of_thread.stream = self.current, stream
        try:
            yield
        finally:
            self._of_thread.stream = before

    def mark(self) -> FakeMark:
        return FakeMark(list(self.current.work))

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return torch.full(tuple(shape), torch.nan, dtype=dtype)
