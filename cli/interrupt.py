"""Ctrl-C while an answer streams: cancels the call, and raises KeyboardInterrupt afterwards."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from client import ClientError, DeltaStream


@contextmanager
def cancelled_by_ctrl_c(start: Callable[[], DeltaStream]) -> Iterator[DeltaStream]:
    """A stream that Ctrl-C cancels.

    KeyboardInterrupt is raised when the block ends. Closes the stream.

    If it were raised at once, it could strike inside gRPC just after a lock is taken. The lock
    would then never be released, and the next call on the channel would wait for ever. gRPC's own
    examples also cancel from the signal handler (examples/python/cancellation).

    A second Ctrl-C before the block ends is raised at once, in case the block waits for something
    else. Where Ctrl-C is ignored, as in a script's background job, it stays ignored. For the main
    thread only, which gets Python's signals.
    """
    pressed = False
    stream: DeltaStream | None = None

    def press(signum: int, frame: object) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True
        if stream is not None:
            stream.close()

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, press)
    try:
        stream = start()
        with stream:
            if pressed:
                stream.close()
            yield stream
    except ClientError:
        if not pressed:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
