"""The process that renders chat templates. Run as a script: it imports nothing of ours.

A chat template is the checkpoint's program. It may loop for ever, or make gigabytes out of one
expression, even while it is compiled. So it runs in a process whose time and memory the system
bounds, whatever it does: SIGALRM ends it at the deadline, RLIMIT_AS makes large allocations fail.

It reads one JSON object per line, {"source", "variables", "now", "most_chars", "time_s"}, and
answers each with a line: {"text"}, or {"error", "line"}. It ends when its input does.
"""

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_BYTES = 2**30
_TOO_LARGE = {"error": f"it takes more than {MEMORY_BYTES >> 20} MiB of memory", "line": None}


class _GenerationBlocks(jinja2.ext.Extension):
    """`{% generation %}` marks what to train on; for a prompt, a block is just its content."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 declares it this way

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter would escape it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up for chat templates (transformers 5.23,
    `utils/chat_template_utils.py`)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlocks]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    return environment


def _answer(job: dict[str, Any], environment: jinja2.Environment, compiled: dict[str, jinja2.Template]) -> Any:
    """compiled: the last template, by its source; filled here."""
    source = job["source"]
    try:
        if source not in compiled:
            compiled.clear()
            compiled[source] = environment.from_string(source)
        if job["variables"] is None:  # only to be compiled
            return {"text": ""}
        now = datetime.fromtimestamp(job["now"])
        text = compiled[source].render(**job["variables"], strftime_now=now.strftime)
        if len(text) > job["most_chars"]:
            error = f"it makes {len(text)} characters of them; at most {job['most_chars']} fit into the context"
            return {"error": error, "line": None}
        return {"text": text}
    except jinja2.TemplateSyntaxError as error:
        return {"error": error.message or "cannot be parsed", "line": error.lineno}
    except MemoryError:
        return _TOO_LARGE
    except Exception as error:  # it can fail in any way that a program can
        return {"error": f"{error}"[:1000] or type(error).__name__, "line": None}


def main() -> None:
    """Answer jobs until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # which ends the process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the parent
    environment, compiled = _environment(), dict[str, jinja2.Template]()
    for line in sys.stdin:
        try:
            job = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, job["time_s"])
            answer = json.dumps(_answer(job, environment, compiled)).encode()
        except MemoryError:  # by the job itself, or by its text as JSON
            answer = json.dumps(_TOO_LARGE).encode()
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
