"""Ctrl-C at the worst moments of a stream."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest

from cli.interrupt import cancelled_by_ctrl_c
from client import Client, ClientError
from router.errors import Unavailable
from tests.fake_router import FakeRouter, fails, says, says_then_waits
from tests.processes import PATIENCE_S

LOCKED = threading.Condition.__enter__


@contextmanager
def ctrl_c_in_the_next_lock() -> Iterator[None]:
    """Ctrl-C once this thread has taken a lock within gRPC, but before gRPC can know that it has."""
    due, here = True, threading.get_ident()

    def enter(condition: threading.Condition) -> bool:
        nonlocal due
        taken = LOCKED(condition)
        if due and threading.get_ident() == here:
            due = False
            signal.raise_signal(signal.SIGINT)
        return taken

    with patch.object(threading.Condition, "__enter__", enter):
        yield
    assert not due


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address) as client:
        yield client


def text_of(client: Client) -> str:
    return "".join(delta.text for delta in client.generate("Hi", timeout_s=PATIENCE_S))


def test_in_a_call_that_is_beginning(router: FakeRouter, client: Client) -> None:
    router.script = says_then_waits("Hel")

    def read() -> None:
        with ctrl_c_in_the_next_lock(), cancelled_by_ctrl_c(partial(client.generate, "Hi")) as stream:
            assert list(stream) == []

    with pytest.raises(KeyboardInterrupt):
        read()
    router.script = says("Hello!")
    assert text_of(client) == "Hello!"


def test_while_grpc_holds_a_lock_of_the_stream(router: FakeRouter, client: Client) -> None:
    router.script = says_then_waits("Hel")

    def read() -> None:
        with cancelled_by_ctrl_c(partial(client.generate, "Hi")) as stream:
            assert next(stream).text == "Hel"
            with ctrl_c_in_the_next_lock():
                assert list(stream) == []

    with pytest.raises(KeyboardInterrupt):
        read()
    assert router.closed.wait(PATIENCE_S)
    router.script = says("Hello!")
    assert text_of(client) == "Hello!"


def test_a_second_one_is_raised_at_once(router: FakeRouter, client: Client) -> None:
    router.script = says_then_waits("Hel")
    passed = []

    def press_twice() -> None:
        with cancelled_by_ctrl_c(partial(client.generate, "Hi")):
            for press in (1, 2):
                signal.raise_signal(signal.SIGINT)
                passed.append(press)

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert passed == [1]


def test_what_ctrl_c_did_before_it_does_again_after_a_stream(client: Client) -> None:
    before = signal.getsignal(signal.SIGINT)
    with cancelled_by_ctrl_c(partial(client.generate, "Hi")) as stream:
        assert signal.getsignal(signal.SIGINT) is not before
        assert "".join(delta.text for delta in stream) == "Hello!"
    assert signal.getsignal(signal.SIGINT) is before


def test_an_error_of_the_server_stays_an_error(router: FakeRouter, client: Client) -> None:
    router.script = fails(Unavailable("shard 3 is down"))
    with (
        pytest.raises(ClientError, match="shard 3 is down"),
        cancelled_by_ctrl_c(partial(client.generate, "Hi")) as stream,
    ):
        next(stream)


def test_where_it_is_ignored_it_stays_ignored(client: Client) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with cancelled_by_ctrl_c(partial(client.generate, "Hi")) as stream:
            signal.raise_signal(signal.SIGINT)
            assert "".join(delta.text for delta in stream) == "Hello!"
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
