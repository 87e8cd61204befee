"""Ctrl-C while an answer streams: it cancels the call instead of being raised wherever the program stands."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from client import ClientError, DeltaStream


@contextmanager
def cancelled_by_ctrl_c(start: Callable[[], DeltaStream]) -> Iterator[DeltaStream]:
    """A stream that Ctrl-C cancels; only where the block ends is KeyboardInterrupt raised. Closes the stream.

    Raised at once it could strike inside gRPC, between the taking of a lock and the note that it is taken: the lock
    then stays taken, and the next call on the channel waits for ever. To cancel from the signal's handler is what
    gRPC's own examples do (examples/python/cancellation). Another Ctrl-C before the block has ended is raised at once,
    for who waits for something else there. Where Ctrl-C is ignored, as in a script's background, it stays so. For the
    main thread only, to which Python gives signals.
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
