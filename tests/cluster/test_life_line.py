"""A frontend hears at once that a router's process has ended, and soon that it hangs."""

import os
import queue
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.life_line import Heart, LifeLine
from experts.connection import connect
from frontend.router_connection import Pulse
from tests.processes import PATIENCE_S

HOST = "127.0.0.1"
BEAT_S, SILENCE_S = 0.02, 0.5


class Listener:
    """A frontend that notes what it hears."""

    def __init__(self) -> None:
        self.heard: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen(self, address: tuple[str, int], secret: bytes) -> LifeLine:
        return LifeLine(address, secret, SILENCE_S, self.heard.put, lambda *end: self.heard.put(end))

    def pulse(self) -> Pulse:
        heard = self.heard.get(timeout=PATIENCE_S)
        assert isinstance(heard, Pulse)
        return heard

    def was_silent(self) -> bool:
        """How it ended."""
        while isinstance(heard := self.heard.get(timeout=PATIENCE_S), Pulse):
            pass
        was_silent: bool = heard[0]
        return was_silent


def test_beats_tell_of_the_router_as_it_is_now() -> None:
    pulses = [Pulse(False, False, 0), Pulse(True, False, 3), Pulse(True, True, 2**32 - 1, 2.5)]
    left = iter(pulses)
    heart, secret, listener = Heart(BEAT_S, lambda: next(left, pulses[-1])), secrets.token_bytes(32), Listener()
    line = listener.listen(heart.expect(HOST, secret), secret)
    assert [listener.pulse() for _ in range(4)] == [*pulses, pulses[-1]]
    line.close()
    assert not listener.was_silent()


def test_beats_end_when_the_frontend_answers_none() -> None:
    """So a path that is cut in one direction is noticed, whichever it is."""
    heart, secret = Heart(BEAT_S, lambda: Pulse(True, False, 0)), secrets.token_bytes(32)
    line = connect(heart.expect(HOST, secret), secret, PATIENCE_S)
    line.allow_silence(SILENCE_S)
    beat = memoryview(bytearray(10))
    line.read(beat)
    with pytest.raises(ConnectionError, match="silent"):
        line.read(beat)
    line.send([memoryview(b"+")])
    line.read(beat)
    line.close()


def test_a_stranger_hears_nothing() -> None:
    heart, secret = Heart(BEAT_S, lambda: Pulse(True, False, 0)), secrets.token_bytes(32)
    address = heart.expect(HOST, secret)
    with pytest.raises(ConnectionError):
        Listener().listen(address, secrets.token_bytes(32))
    friend = Listener()
    friend.listen(address, secret).close()
    assert not friend.was_silent()


PROCESS = f"""
import sys
from cluster.life_line import Heart
from frontend.router_connection import Pulse
heart = Heart({BEAT_S}, lambda: Pulse(True, False, 1))
for line in sys.stdin:
    print(*heart.expect("{HOST}", bytes.fromhex(line)), flush=True)
"""


@pytest.fixture
def process() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", PROCESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def joined(process: "subprocess.Popen[str]") -> Listener:
    secret, listener = secrets.token_bytes(32), Listener()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(secret.hex() + "\n")
    process.stdin.flush()
    host, port = process.stdout.readline().split()
    listener.listen((host, int(port)), secret)
    listener.pulse()
    return listener


def test_a_frozen_router_is_silent_and_a_killed_one_is_gone_at_once(process: "subprocess.Popen[str]") -> None:
    frozen = joined(process)
    os.kill(process.pid, signal.SIGSTOP)
    assert frozen.was_silent()
    os.kill(process.pid, signal.SIGCONT)
    killed = joined(process)
    died_s = time.monotonic()
    process.kill()
    assert not killed.was_silent()
    assert time.monotonic() - died_s < SILENCE_S
