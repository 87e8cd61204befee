"""What the load generator notes of each stream. Times are time.monotonic, which all processes of a machine share."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass
class Stream:
    """One request and what came of it.

    ask: its number among the requests. pieces: (when, which answer, tokens) of each message.
    error: the status and its message, if it failed; ended_s is then when it did. resumed_s: when it
    went on after it had broken, and the client had called again.
    """

    ask: int
    sent_s: float
    pieces: list[tuple[float, int, list[int]]] = field(default_factory=list)
    ended_s: float | None = None
    error: str | None = None
    resumed_s: list[float] = field(default_factory=list)

    @property
    def times(self) -> list[float]:
        """When messages with tokens came."""
        return [at_s for at_s, _, token_ids in self.pieces if token_ids]

    @property
    def answers(self) -> dict[int, list[int]]:
        """The tokens of each answer."""
        answers: dict[int, list[int]] = {}
        for _, index, token_ids in self.pieces:
            answers.setdefault(index, []).extend(token_ids)
        return answers

    def is_active(self, at_s: float) -> bool:
        """Whether it had begun to answer then, and not ended."""
        times = self.times
        return bool(times) and times[0] <= at_s and (self.ended_s is None or self.ended_s > at_s)


def write(path: Path, streams: Sequence[Stream]) -> None:
    path.write_text(json.dumps([asdict(stream) for stream in streams]))


def read(path: Path) -> list[Stream]:
    streams = [Stream(**raw) for raw in json.loads(path.read_text())]
    for stream in streams:
        stream.pieces = [(at_s, index, token_ids) for at_s, index, token_ids in stream.pieces]
    return streams
