"""`drover` and `drover generate` as a user runs them, against a real server on loopback."""

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cli import output
from router.errors import Internal, Unavailable
from router.request import FinishReason, GenerationRequest, TokenDelta, TokenLogprobs
from tests.command import ROOT, Screen, drover, drover_process, start
from tests.fake_router import BOS, EOS, FakeRouter, Script, fails, says, says_then_waits
from tests.processes import PATIENCE_S

NOBODY = "127.0.0.1:1"


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("drover")
    done = subprocess.run([command, "--help"], capture_output=True, timeout=PATIENCE_S, text=True)
    assert done.returncode == 0
    assert done.stdout == drover_process("--help").stdout


@pytest.mark.parametrize("run", [drover, drover_process])
def test_generate_prints_the_text_and_nothing_else(
    address: str, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run("generate", "Hi", "--address", address)
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello!\n", "")


def test_generate_streams(router: FakeRouter, address: str) -> None:
    router.script = says_then_waits("Hel")
    with start("generate", "Hi", "--address", address) as process:
        Screen(process.stdout.fileno()).read_until(b"Hel")
        process.kill()
    assert router.closed.wait(PATIENCE_S)


def test_generate_reads_the_prompt_from_stdin(router: FakeRouter, address: str) -> None:
    for arguments in ([], ["-"]):
        router.requests.clear()
        assert drover("generate", *arguments, "--address", address, stdin="two\nlines\n").returncode == 0
        assert router.requests[0].prompt_token_ids == (BOS, *b"two\nlines")


def test_generate_takes_token_ids(router: FakeRouter, address: str) -> None:
    assert drover("generate", "--token-ids", "1,2,257", "--address", address).returncode == 0
    assert router.requests[0].prompt_token_ids == (1, 2, EOS)


def test_generate_passes_every_sampling_flag_on(router: FakeRouter, address: str) -> None:
    flags = "--max-tokens 3 --temperature 0.5 --top-p 0.25 --top-k 7 --seed 11 --stop-token-ids 8,9 --logprobs 2 --json"
    assert drover("generate", "Hi", *flags.split(), "--address", address).returncode == 0
    sampling = router.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.top_k) == (3, 0.5, 0.25, 7)
    assert (sampling.seed, sampling.stop_token_ids, sampling.logprobs) == (11, {8, 9}, 2)


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_every_other_sampling_flag_arrives_too(router: FakeRouter, address: str, command: str) -> None:
    flags = (
        "--min-p 0.125 --presence-penalty -0.5 --frequency-penalty 0.25 --repetition-penalty 1.5 "
        "--logit-bias 5=-100,7=1.5 --min-tokens 2 --ignore-eos --prompt-logprobs 3 --json -n 2 --stop lo --stop never"
    )
    done = drover(command, *flags.split(), "--address", address, stdin="Hi\n")
    assert done.returncode == 0
    first, second = (request.sampling for request in router.requests)
    assert (first.min_p, first.presence_penalty, first.frequency_penalty) == (0.125, -0.5, 0.25)
    assert (first.repetition_penalty, first.logit_bias) == (1.5, ((5, -100.0), (7, 1.5)))
    assert (first.min_tokens, first.ignore_eos, first.prompt_logprobs) == (2, True, 3)
    assert (second.logit_bias, second.prompt_logprobs) == (first.logit_bias, None)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(answer["index"], answer["text"], answer["stop_string"]) for answer in answers] == [
        (0, "Hel", "lo"), (1, "Hel", "lo"),
    ]  # fmt: skip


def in_turns() -> Script:
    """Three answers whose tokens come in turns, the last one's first: 0 says aaa, 1 says bbb, 2 says ccc."""
    turn, said = asyncio.Condition(), []

    async def script(request: GenerationRequest):
        _, _, suffix = request.request_id.partition("-")
        index = int(suffix or 0)
        for place in range(3):
            async with turn:
                await turn.wait_for(lambda mine=3 * place + 2 - index: len(said) == mine)
                said.append(index)
                turn.notify_all()
            reason = FinishReason.LENGTH if place == 2 else None
            yield TokenDelta(request.request_id, (b"abc"[index],), finish_reason=reason, first=place)

    return script


def test_several_answers_are_printed_one_after_the_other(router: FakeRouter, address: str) -> None:
    router.script = in_turns()
    done = drover("generate", "Hi", "-n", "3", "--stats", "--address", address)
    assert (done.returncode, done.stdout) == (0, "[1 of 3]\naaa\n[2 of 3]\nbbb\n[3 of 3]\nccc\n")
    assert done.stderr.count("3 made (length)") == 3


def test_the_first_of_several_answers_is_streamed(router: FakeRouter, address: str) -> None:
    router.script = says_then_waits("Hel")
    with start("generate", "Hi", "-n", "2", "--address", address) as process:
        Screen(process.stdout.fileno()).read_until(b"[1 of 2]\nHel")
        process.kill()
    assert router.closed.wait(PATIENCE_S)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_json_is_json_whatever_a_server_sends(router: FakeRouter, address: str, number: float) -> None:
    async def script(request: GenerationRequest):
        yield TokenDelta(request.request_id, prompt_logprobs=(None, TokenLogprobs(ord("H"), number, ((1, number),))))
        logprobs = (TokenLogprobs(ord("o"), number, ((2, number),)),)
        yield TokenDelta(request.request_id, (ord("o"),), logprobs, finish_reason=FinishReason.LENGTH)

    router.script = script
    flags = ("--json", "--logprobs", "1", "--prompt-logprobs", "1")
    done = drover("generate", "Hi", *flags, "--address", address)
    answer = json.loads(done.stdout, parse_constant=pytest.fail)
    [entry] = answer["logprobs"]
    assert entry == {"token_id": ord("o"), "logprob": None, "top": [{"token_id": 2, "logprob": None}]}
    assert answer["prompt_logprobs"][1] == {
        "token_id": ord("H"),
        "logprob": None,
        "top": [{"token_id": 1, "logprob": None}],
    }


def test_generate_as_json_is_one_object(router: FakeRouter, address: str) -> None:
    async def script(request: GenerationRequest):
        yield TokenDelta(request.request_id, prompt_logprobs=(None, TokenLogprobs(ord("H"), -0.5, ((1, -0.25),))))
        for first, (byte, reason) in enumerate(((ord("o"), None), (ord("k"), FinishReason.LENGTH))):
            logprobs = (TokenLogprobs(byte, -0.5, ((byte, -0.5),)),)
            yield TokenDelta(request.request_id, (byte,), logprobs, finish_reason=reason, first=first)

    router.script = script
    flags = ("--json", "--logprobs", "1", "--prompt-logprobs", "1")
    done = drover("generate", "Hi", *flags, "--address", address)
    answer = json.loads(done.stdout)
    timing = answer.pop("timing")
    assert answer == {
        "request_id": router.requests[0].request_id,
        "index": 0,
        "text": "ok",
        "token_ids": [*b"ok"],
        "logprobs": [
            {"token_id": byte, "logprob": -0.5, "top": [{"token_id": byte, "logprob": -0.5}]} for byte in b"ok"
        ],
        "prompt_logprobs": [
            {"token_id": BOS, "logprob": None, "top": []},
            {"token_id": ord("H"), "logprob": -0.5, "top": [{"token_id": 1, "logprob": -0.25}]},
        ],
        "finish_reason": "length",
        "stop_string": None,
        "stop_token_id": None,
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 0},
    }
    assert timing["ttft_ms"] > 0
    assert timing["tokens_per_s"] > 0
    assert done.stderr == ""


def test_stats_go_to_stderr(address: str) -> None:
    done = drover("generate", "Hi", "--stats", "--address", address)
    assert done.stdout == "Hello!\n"
    assert done.stderr.startswith("[3 prompt tokens, 7 made (stop); first after ")


def test_stats_come_by_themselves_on_a_terminal(address: str) -> None:
    leader, follower = pty.openpty()
    with start("generate", "Hi", "--address", address, stderr=follower) as process:
        assert b"7 made (stop)" in Screen(leader).read_until(b"]")
        assert process.wait(PATIENCE_S) == 0
    os.close(follower)
    os.close(leader)


@pytest.mark.parametrize("run", [drover, drover_process])
def test_an_error_is_one_line_and_exit_code_1(
    address: str, run: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    done = run("generate", "Hi", "--logit-bias", "5=101", "--address", address)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "drover: error: sampling.logit_bias: gives token 5 a bias of 101; must be from -100 to 100\n"
    )


def test_an_error_mid_stream_comes_after_the_text(router: FakeRouter, address: str) -> None:
    router.script = fails(Internal("its logits are not finite"), after="Hel")
    done = drover("generate", "Hi", "--address", address)
    assert (done.returncode, done.stdout, done.stderr) == (1, "Hel\n", "drover: error: its logits are not finite\n")


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(("told_gap_s", "note"), [(0.0, True), (1.0, False)])
def test_a_stream_that_breaks_goes_on_and_only_a_long_gap_is_told(
    command: str, told_gap_s: float, note: bool, router: FakeRouter, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "TOLD_GAP_S", told_gap_s)
    broken, whole = fails(Unavailable("a part died"), after="Hel"), says("Hello!")
    router.script = lambda request: whole(request) if request.made else broken(request)
    done = drover(command, "--address", address, stdin="Hi\n")
    assert (done.returncode, done.stdout) == (0, "Hello!\n")
    assert bool(re.fullmatch(r"\[connection lost; resumed after 0\.[0-9] s\]\n", done.stderr)) is note
    assert bool(done.stderr) is note


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_no_server_is_said_in_one_line(command: str) -> None:
    done = drover(command, "--address", NOBODY, stdin="Hi\n")
    assert done.returncode == 1
    assert done.stderr.startswith(f"drover: error: no server answers at {NOBODY} ")
    assert done.stderr.count("\n") == 1


def test_stdin_that_is_no_utf8_is_an_error(address: str) -> None:
    for command in ("generate", "chat"):
        done = drover(command, "--address", address, stdin=b"Gr\xfc\xdfe\n")
        assert done.returncode == 1
        assert done.stderr == "drover: error: standard input: is not valid UTF-8 (byte 0xfc at offset 2)\n"


WRONG_USAGE = {
    "": "the following arguments are required: COMMAND",
    "fly": "argument COMMAND: invalid choice: 'fly'",
    "chat Hi": "unrecognized arguments: Hi",
    "serve": "the following arguments are required: CONFIG",
    "demo --port 70000": "argument --port: '70000' is no whole number from 1 to 65535",
    "checkpoint make /nowhere --layers 0": "argument --layers: '0' is no whole number of at least 1",
    "generate Hi --token-ids 1,2": "argument --token-ids: not allowed with argument PROMPT",
    "generate --token-ids 1,x": "argument --token-ids: '1,x' is no list of token ids such as 1,2,3",
    "generate Hi --max-tokens many": "argument --max-tokens: 'many' is no whole number of at least 1",
    "generate Hi --max-tokens -3": "argument --max-tokens: '-3' is no whole number of at least 1",
    "generate Hi --max-tokens 1.5": "argument --max-tokens: '1.5' is no whole number of at least 1",
    "generate Hi -n 0": "argument -n: '0' is no whole number of at least 1",
    "generate Hi --seed -1": "argument --seed: '-1' is no whole number from 0 to 18446744073709551615",
    "generate Hi --temperature nan": "argument --temperature: 'nan' is no finite number of at least 0",
    "generate Hi --top-p 0": "argument --top-p: '0' is no number above 0 and at most 1",
    "generate Hi --presence-penalty 3": "argument --presence-penalty: '3' is no number from -2 to 2",
    "generate Hi --timeout-s inf": "argument --timeout-s: 'inf' is no finite number above 0",
    "generate Hi --logprobs 1": "--logprobs has nowhere to go without --json",
    "generate Hi --prompt-logprobs 1": "--prompt-logprobs has nowhere to go without --json",
    "generate Hi --logit-bias 5": "argument --logit-bias: '5' is no list of biases such as 5=-100,7=1.5",
    "generate Hi --logit-bias 5=1,5=2": "argument --logit-bias: '5=1,5=2' names a token twice",
    "generate Hi --logit-bias five=1": "argument --logit-bias: 'five=1' is no list of biases",
}


@pytest.mark.parametrize("arguments", WRONG_USAGE)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments: str) -> None:
    """Said before a model is loaded: that would be told in a line of its own."""
    done = drover(*arguments.split())
    words = arguments.split()[:2] if arguments.startswith("checkpoint") else arguments.split()[:1]
    command = " ".join(["drover", *(word for word in words if word != "fly")])
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{command}: error: {WRONG_USAGE[arguments]}")
    assert done.stderr.endswith(f"; see `{command} --help`\n")
    assert done.stderr.count("\n") == 1


def test_the_ends_of_a_range_are_valid(router: FakeRouter, address: str) -> None:
    flags = "--max-tokens 1 --top-p 1 --min-p 0 --top-k 0 --temperature 0 --presence-penalty -2 --frequency-penalty 2"
    done = drover("generate", "Hi", *flags.split(), "--seed", str(2**64 - 1), "--address", address)
    assert (done.returncode, done.stderr) == (0, "")
    sampling = router.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (-2, 2, 2**64 - 1)


def test_the_deadline_flag_ends_an_answer(router: FakeRouter, address: str) -> None:
    router.script = says_then_waits("Hel")
    done = drover("generate", "Hi", "--timeout-s", "0.5", "--address", address)
    assert (done.returncode, done.stdout) == (1, "Hel\n")
    assert "did not finish in time" in done.stderr


def test_ctrl_c_is_exit_code_130_without_a_trace(router: FakeRouter, address: str) -> None:
    router.script = says_then_waits("Hel")
    with start("generate", "Hi", "--address", address) as process:
        Screen(process.stdout.fileno()).read_until(b"Hel")
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130
        assert process.stderr.read() == b""
    assert router.closed.wait(PATIENCE_S)


def test_a_reader_that_goes_away_is_no_error_message(router: FakeRouter, address: str) -> None:
    router.script = says("x" * 300)
    with start("generate", "Hi", "--max-tokens", "400", "--address", address) as process:
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 141
        assert process.stderr.read() == b""


@pytest.mark.parametrize("command", ["", "generate", "chat"])
def test_help_teaches_with_an_example(command: str) -> None:
    done = drover(*command.split(), "--help")
    assert done.returncode == 0
    assert f"\n  drover {command}" in done.stdout or f"| drover {command}" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_while_the_command_is_still_being_imported_leaves_no_trace(number: signal.Signals) -> None:
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-c",
        "import sys; from cli.command import command; sys.exit(command())",
    ]
    with subprocess.Popen([*command, "serve", "nothing.yaml"], stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        while "checkpoint.errors" not in process.stderr.readline():  # what cli.main imports first
            assert process.poll() is None
        process.send_signal(number)
        assert process.wait(PATIENCE_S) == 130
        assert "Traceback" not in process.stderr.read()


def test_words_that_nobody_can_read_end_nobody() -> None:
    code = "from cli.say import say; say('a'); say('b'); import sys; print('still here', file=sys.stderr)"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=PATIENCE_S
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "still here\n")
