"""How a frontend hears at once that a router is gone: a TCP connection on which the router beats.

Ray takes more than a second to tell that a process was killed, and never tells that one is frozen.
The kernel closes the connection of a process that ends. One that hangs beats no more.

A thread of the router that does not compute sends a beat each heartbeat, with what the frontend's
choice depends on. It needs Python's lock, but not for long: beside 64 streams of the embedded model
on two cores, with other work for four, no beat came more than 4 ms late (Intel Xeon). So the
silence allowed is that of links. The ends meet as those of a link do (experts/connection.py).
"""

import logging
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import astuple

from experts.connection import Connection, Listener, connect
from frontend.router_connection import Pulse

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = 5.0
# A frontend that takes longer to answer a beat has gone without a word.
GONE_S = 60.0
_ANSWER = b"+"
_PULSE = struct.Struct("<??If")  # the fields of Pulse


class Heart:
    """The router's ends: one for each frontend that has asked for it."""

    def __init__(self, heartbeat_s: float, pulse: Callable[[], Pulse]) -> None:
        """pulse: called in several threads."""
        self._heartbeat_s, self._pulse = heartbeat_s, pulse
        self._lines: set[Connection] = set()

    @property
    def listeners(self) -> int:
        """Frontends that it beats for now."""
        return len(self._lines)

    def expect(self, host: str, secret: bytes) -> tuple[str, int]:
        """Wait in a thread for the frontend that knows the secret, and beat for it until it leaves.

        host: this node's address, where the frontend will reach it. Returns the address to connect
        to. Raises OSError.
        """
        listener = Listener(host)

        def serve() -> None:
            try:
                line = listener.accept(secret, JOIN_TIMEOUT_S)
            except ConnectionError as error:
                logger.info("a frontend did not come for its life line: %s", error)
                return
            self._lines.add(line)
            try:
                self._beat(line)
            except ConnectionError as error:
                logger.info("a frontend's life line ended: %s", error)
            finally:
                self._lines.discard(line)

        threading.Thread(target=serve, name="life line", daemon=True).start()
        return listener.address

    def _beat(self, connection: Connection) -> None:
        """Each beat but the first follows an answer. So if either direction is cut off, beats end."""
        connection.allow_silence(GONE_S)
        answer = memoryview(bytearray(len(_ANSWER)))
        while True:
            pulse = self._pulse()
            connection.send([memoryview(_PULSE.pack(*astuple(pulse)))])
            connection.read(answer)
            time.sleep(self._heartbeat_s)


class LifeLine:
    """The frontend's end. Both callbacks run in a thread of its own."""

    def __init__(
        self,
        address: tuple[str, int],
        secret: bytes,
        silence_s: float,
        on_beat: Callable[[Pulse], None],
        on_end: Callable[[bool, str], None],
    ) -> None:
        """silence_s: how long the router may be silent. on_end: called once, with whether it was, and the reason.

        Raises ConnectionError if the router is not there.
        """
        self._connection = connect(address, secret, JOIN_TIMEOUT_S)
        self._connection.allow_silence(silence_s)
        self._silence_s = silence_s
        self._on_beat, self._on_end = on_beat, on_end
        threading.Thread(target=self._listen, name="life line", daemon=True).start()

    def close(self) -> None:
        self._connection.close()

    def _listen(self) -> None:
        memory = bytearray(_PULSE.size)
        heard_s = time.monotonic()
        try:
            while True:
                self._connection.read(memoryview(memory))
                heard_s = time.monotonic()
                self._on_beat(Pulse(*_PULSE.unpack(memory)))
                self._connection.send([memoryview(_ANSWER)])
        except ConnectionError as error:
            self._on_end(time.monotonic() - heard_s >= self._silence_s, str(error))
