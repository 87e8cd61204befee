"""A chat template is the checkpoint's program: whatever it does, it ends in time, in bounds, and alone."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint.errors import CheckpointError
from frontend import chat_template, template_process
from frontend.chat_template import ChatTemplate
from frontend.template_process import TemplateFailed, TemplateProcess
from router.errors import InvalidArgument, Unavailable
from tests.fake_router import byte_tokenizer
from tests.processes import PATIENCE_S, wait_until

PLENTY = 2**20
MESSAGES = {"messages": [{"role": "user", "content": "hello"}]}
NOW_S = 1_750_000_000.0


HOSTILE = {
    "loops": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "did not end within 1 s",
    ),
    "endless text": (
        "{% for a in range(99999) %}{% for b in range(999) %}x{% endfor %}{% endfor %}",
        "within 1 s|fit into",
    ),
    "one large product": ("{{ messages[0].content * 10**10 }}", "more than 1024 MiB of memory"),
    "a large constant": ("{{ 'a' * 10**10 }}", "more than 1024 MiB of memory"),
    "doubling": (
        "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "within 1 s|memory",
    ),
    "a wide field": ("{{ '%0999999999d' % 1 }}", "within 1 s|fit into|memory"),
    "a wide filter": ("{{ 'x'|center(999999999) }}", "within 1 s|fit into|memory"),
    "a power": ("{{ 9 ** (9 ** 9) }}", "did not end within 1 s|memory"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "more than fits": ("{{ 'abc' * 400000 }}", r"it makes 1200000 characters of them; at most 1048576 fit"),
    "a huge range": ("{{ range(10**9)|list }}", "range too big|Range too big"),
    "an attribute": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
}


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess(time_s=1.0)
    yield process
    process.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time_and_the_next_is_rendered(name: str, process: TemplateProcess) -> None:
    source, reason = HOSTILE[name]
    with pytest.raises(TemplateFailed, match=f"(?s){reason}") as caught:
        process.render(source, MESSAGES, NOW_S, PLENTY)
    assert len(str(caught.value)) < 1200
    assert process.render("{{ messages[0].content }}", MESSAGES, NOW_S, PLENTY) == "hello"


def test_a_process_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    assert process.render("a", MESSAGES, NOW_S, PLENTY) == "a"
    assert process._process is not None
    os.kill(process._process.pid, signal.SIGKILL)
    process._process.wait(PATIENCE_S)
    assert process.render("b", MESSAGES, NOW_S, PLENTY) == "b"


def test_a_process_that_is_killed_while_it_renders_is_replaced_too() -> None:
    process = TemplateProcess(PATIENCE_S)
    source = "{% for a in range(3000) %}{% for b in range(1000) %}x{% endfor %}{% endfor %}"

    def kill_once() -> None:
        first = process._process
        assert first is not None
        wait_until(lambda: cpu_ticks(first.pid) > before)
        os.kill(first.pid, signal.SIGKILL)

    assert process.render("a", MESSAGES, NOW_S, PLENTY) == "a"
    assert process._process is not None
    before = cpu_ticks(process._process.pid)
    killer = threading.Thread(target=kill_once)
    killer.start()
    assert process.render(source, MESSAGES, NOW_S, 2**22) == "x" * 3_000_000
    killer.join(PATIENCE_S)
    process.close()


def cpu_ticks(process_id: int) -> int:
    """The CPU time that it has used, in the kernel's unit."""
    fields = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11])


@pytest.mark.usefixtures("_impatient")
def test_a_process_that_is_always_killed_is_a_fault_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "_CHILD", Path(__file__).with_name("killed_child.py"))
    chat_template.TEMPLATE_PROCESS.close()
    with pytest.raises(Unavailable, match="the process that renders chat templates was killed; try again"):
        ChatTemplate("x").encode([("user", "hello")], byte_tokenizer())
    chat_template.TEMPLATE_PROCESS.close()


def test_a_text_that_is_too_large_as_json_is_refused(
    capfd: pytest.CaptureFixture[str],
) -> None:
    patient = TemplateProcess(PATIENCE_S)
    with pytest.raises(TemplateFailed, match="it takes more than 1024 MiB of memory"):
        patient.render("{{ x * n }}", {"x": "a", "n": 400_000_000}, NOW_S, 2**31)
    patient.close()
    assert capfd.readouterr().err == ""


def test_threads_get_their_own_texts(process: TemplateProcess) -> None:
    texts: dict[int, str] = {}

    def render(number: int) -> None:
        texts[number] = process.render(f"{{{{ {number} + 1 }}}}", MESSAGES, NOW_S, PLENTY)

    threads = [threading.Thread(target=render, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert texts == {number: str(number + 1) for number in range(20)}


@pytest.fixture
def _impatient(process: TemplateProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "TEMPLATE_PROCESS", process)


@pytest.mark.usefixtures("_impatient")
def test_a_conversation_that_the_template_loops_over_is_refused() -> None:
    loops = ChatTemplate(HOSTILE["loops"][0])
    with pytest.raises(InvalidArgument, match="messages: the checkpoint's chat template refuses them: it did not end"):
        loops.encode([("user", "hello")], byte_tokenizer())


@pytest.mark.usefixtures("_impatient")
def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    with pytest.raises(InvalidArgument, match=r"at most .* fit into the context"):
        ChatTemplate("{{ 'abc' * 100000 }}").encode([("user", "hello")], byte_tokenizer(), 1000)


@pytest.mark.usefixtures("_impatient")
@pytest.mark.parametrize("source", ["{% if %}", "{{ (" + "(" * 5000, "{% nonsense %}"])
def test_a_template_that_cannot_be_compiled_is_a_fault_of_the_checkpoint(source: str, tmp_path: object) -> None:
    directory = tmp_path
    (directory / "chat_template.jinja").write_text(source)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: .*chat template: .*; download the file again"):
        ChatTemplate.open(directory)  # type: ignore[arg-type]


@pytest.mark.usefixtures("_impatient")
def test_while_a_template_loops_the_event_loop_goes_on() -> None:
    """As a server has it: in a thread."""
    loops = ChatTemplate(HOSTILE["loops"][0])

    async def scenario() -> float:
        longest_s, last_s = 0.0, time.monotonic()
        encoding = asyncio.get_running_loop().run_in_executor(None, loops.encode, [("user", "hello")], byte_tokenizer())
        while not encoding.done():
            await asyncio.sleep(0.005)
            longest_s, last_s = max(longest_s, time.monotonic() - last_s), time.monotonic()
        assert isinstance(encoding.exception(), InvalidArgument)
        return longest_s

    assert asyncio.run(asyncio.wait_for(scenario(), PATIENCE_S)) < 0.5
