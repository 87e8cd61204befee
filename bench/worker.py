"""One system under measurement in a process of its own: it reads jobs from stdin and answers when each token came.

A job is a line of JSON, {"requests": [{"token_ids", "max_tokens", "at_s"}, ...]}; its answer is another, see Answer.
Every system speaks this, and all arithmetic on the times is done elsewhere, once. Standard library only, because the
peers' interpreters run it too.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    """at_s: when it is sent, seconds after the job began. Tokens are chosen greedily, and no token ends the text."""

    token_ids: list[int]
    max_tokens: int
    at_s: float = 0.0


@dataclass
class Stream:
    """What came of one request. token_s: when each token came, seconds after the job began; as long as token_ids."""

    token_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    error: str | None = None

    def add(self, token_ids: Sequence[int], now_s: float) -> None:
        self.token_ids += token_ids
        self.token_s += [now_s] * len(token_ids)


@dataclass(frozen=True)
class Answer:
    """streams: in the order of the requests. cpu_s: processor time of the answering process during the job.
    facts: what else the system knows of the job, by name."""

    streams: list[Stream]
    wall_s: float
    cpu_s: float
    facts: dict[str, float]


Run = Callable[[list[Request]], tuple[list[Stream], dict[str, float]]]


def serve_jobs(start: Callable[[], Run]) -> None:
    """Start the system, say that it is ready, and answer jobs until stdin ends.

    stdout is the answers' alone: what libraries print goes to stderr.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    run = start()
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        requests = [Request(**request) for request in json.loads(line)["requests"]]
        cpu_s, began_s = time.process_time(), time.perf_counter()
        streams, facts = run(requests)
        answer = Answer(streams, time.perf_counter() - began_s, time.process_time() - cpu_s, facts)
        print(json.dumps(asdict(answer)), file=answers)


def job_line(requests: Sequence[Request]) -> str:
    """A job as the worker reads it."""
    return json.dumps({"requests": [asdict(request) for request in requests]})


def parse_answer(raw: dict[str, Any]) -> Answer:
    """The answer that a worker's line holds."""
    return Answer([Stream(**stream) for stream in raw["streams"]], raw["wall_s"], raw["cpu_s"], raw["facts"])
