"""`drover chat` as a user runs it: in a pipe, or on a terminal."""

import json
import os
import pty
import signal
import subprocess
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from router.errors import Unavailable
from router.request import GenerationRequest, TokenDelta
from tests.command import Screen, drover, start
from tests.fake_router import FakeRouter, echoes, fails, says, says_then_waits
from tests.loopback import serving
from tests.processes import PATIENCE_S


@contextmanager
def on_terminal(address: str) -> Iterator[tuple[subprocess.Popen[bytes], int, Screen]]:
    """`drover chat` on a terminal of its own, at its first prompt: the process, what types into it, what it shows."""
    leader, follower = pty.openpty()
    screen = Screen(leader)
    with start("chat", "--address", address, stdin=follower, stdout=follower, stderr=follower) as process:
        os.close(follower)
        screen.read_until(b"> ")
        yield process, leader, screen
    os.close(leader)


def test_chat_keeps_the_conversation(router: FakeRouter, address: str) -> None:
    done = drover("chat", "--system", "Be nice.", "--address", address, stdin="one\n\ntwo\n/reset\nthree\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n" * 3, "")
    prompts = [bytes(request.prompt_token_ids[1:]).decode() for request in router.requests]
    assert prompts == [
        "system: Be nice.\nuser: one\nassistant: ",
        "system: Be nice.\nuser: one\nassistant: Hello!\nuser: two\nassistant: ",
        "system: Be nice.\nuser: three\nassistant: ",
    ]


def test_of_several_answers_the_conversation_goes_on_with_the_first(router: FakeRouter, address: str) -> None:
    def script(request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        return says("other" if "-" in request.request_id else "first")(request)

    router.script = script
    done = drover("chat", "-n", "2", "--address", address, stdin="one\ntwo\n")
    assert done.stdout == "[1 of 2]\nfirst\n[2 of 2]\nother\n" * 2
    assert bytes(router.requests[-1].prompt_token_ids[1:]) == b"user: one\nassistant: first\nuser: two\nassistant: "


def test_chat_as_json_is_one_object_per_answer(address: str) -> None:
    done = drover("chat", "--json", "--address", address, stdin="one\ntwo\n")
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == ["Hello!", "Hello!"]


def test_chat_obeys_its_commands(router: FakeRouter, address: str) -> None:
    done = drover("chat", "--address", address, stdin="/help\n/quit\n/etc is a folder\n/exit\nnever said\n")
    assert (done.returncode, len(router.requests)) == (0, 1)
    help_line, unknown_line = done.stderr.splitlines()
    assert "/reset" in help_line
    assert unknown_line.startswith("unknown command /quit")


def test_ctrl_c_stops_an_answer_but_not_the_chat(router: FakeRouter, address: str) -> None:
    router.script = says_then_waits("Hel")
    with start("chat", "--address", address) as process:
        process.stdin.write(b"one\n")
        Screen(process.stdout.fileno()).read_until(b"Hel")
        router.script = echoes()
        process.send_signal(signal.SIGINT)
        assert router.closed.wait(PATIENCE_S)
        process.stdin.write(b"two\n")
        process.stdin.close()
        rest = process.stdout.read()
        assert process.wait(PATIENCE_S) == 0
        assert process.stderr.read() == b"[stopped]\n"
    assert rest == b"\nuser: one\nassistant: Hel\nuser: two\nassistant: \n"


def test_ctrl_d_leaves_an_interactive_chat(address: str) -> None:
    with on_terminal(address) as (process, leader, screen):
        os.write(leader, b"Hi\n")
        screen.read_until(b"Hello!")
        screen.read_until(b"> ")
        os.write(leader, b"\x04")
        assert process.wait(PATIENCE_S) == 0


def test_an_interactive_chat_survives_an_error(router: FakeRouter, address: str) -> None:
    router.script = fails(Unavailable("shard 3 is down"))
    with on_terminal(address) as (process, leader, screen):
        os.write(leader, b"Hi\n")
        screen.read_until(b"drover: error: shard 3 is down")
        router.script = says("Back.")
        screen.read_until(b"> ")
        os.write(leader, b"Hi again\n")
        screen.read_until(b"Back.")
        screen.read_until(b"> ")
        os.write(leader, b"/exit\n")
        assert process.wait(PATIENCE_S) == 0
    assert bytes(router.requests[1].prompt_token_ids[1:]) == b"user: Hi again\nassistant: "


def test_chat_without_a_template_says_what_to_do() -> None:
    with serving(FakeRouter(), with_chat_template=False) as address:
        done = drover("chat", "--address", address, stdin="Hi\n")
    assert done.returncode == 1
    assert done.stderr == "drover: error: tiny has no chat template, so it cannot chat; use `drover generate`\n"
