"""Real packets between two namespaces: cut one way only, both ways, late, lost, and well again."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from bench.chaos.network import LATE, LOSSY, RECEIVE, SEND, Network, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())

PORT, PATIENCE_S, CUT_S, MANY = 5000, 5.0, 0.1, 200
ECHO = """
import socket, sys
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as echo:
    echo.bind((sys.argv[1], int(sys.argv[2])))
    print("up", flush=True)
    while True:
        text, sender = echo.recvfrom(100)
        print(text.decode(), flush=True)
        echo.sendto(text, sender)
"""


class Echo:
    """Something on host 0 that answers, and tells what it hears; asked from this machine's end of the bridge."""

    def __init__(self, network: Network) -> None:
        command = network.inside(0, [sys.executable, "-c", ECHO, network.address(0), str(PORT)])
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.heard = self._process.stdout
        assert self.heard.readline() == "up\n"
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._address = (network.address(0), PORT)

    def answers(self, text: str, timeout_s: float = PATIENCE_S) -> bool:
        """Whether it answers this in time; an answer to something before may come in between."""
        deadline_s = time.monotonic() + timeout_s
        self.send(text)
        try:
            while (left_s := deadline_s - time.monotonic()) > 0:
                self._socket.settimeout(left_s)
                if self._socket.recv(100).decode() == text:
                    return True
        except TimeoutError:
            pass
        return False

    def send(self, text: str) -> None:
        self._socket.sendto(text.encode(), self._address)

    def close(self) -> None:
        self._socket.close()
        self._process.kill()
        self._process.communicate()


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(1) as network:
        yield network


@pytest.fixture
def echo(network: Network) -> Iterator[Echo]:
    echo = Echo(network)
    assert echo.answers("well")
    assert echo.heard.readline() == "well\n"
    yield echo
    network.heal(0)
    assert echo.answers("well again")
    echo.close()


def test_what_a_host_cannot_send_it_still_receives(network: Network, echo: Echo) -> None:
    network.cut(0, SEND)
    assert not echo.answers("half-open", CUT_S)
    assert echo.heard.readline() == "half-open\n"


def test_what_a_host_cannot_receive_never_reaches_it(network: Network, echo: Echo) -> None:
    network.cut(0, RECEIVE)
    assert not echo.answers("nobody hears this", CUT_S)
    network.heal(0)
    assert echo.answers("but this")
    assert echo.heard.readline() == "but this\n"


def ask(echo: Echo, text: str) -> str:
    assert echo.answers(text)
    return text


def test_packets_are_late_or_lost_on_a_bad_cable(network: Network, echo: Echo) -> None:
    network.replace_cable(0, LATE)
    began_s = time.monotonic()
    assert echo.answers("later")
    assert time.monotonic() - began_s > 2 * float(LATE[0]) / 1e3
    assert network.heal(0) >= 2
    network.replace_cable(0, LOSSY)
    for _ in range(MANY):
        echo.send("one of many")
    assert any(echo.answers(f"end {attempt}", 1.0) for attempt in range(20))
    assert network.heal(0) > 0
    heard = list(iter(echo.heard.readline, f"{ask(echo, 'the very end')}\n"))
    assert 0 < heard.count("one of many\n") < MANY
