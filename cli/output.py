"""Prints answers to the terminal or as JSON, with their timing."""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from cli.interrupt import cancelled_by_ctrl_c
from client import Delta, DeltaStream, PromptLogprob, TokenLogprob

TOLD_GAP_S = 1.0  # shorter ones are not worth a word


class Answer:
    """One answer, collected from its deltas, with arrival times in seconds since construction."""

    def __init__(self) -> None:
        self._deltas: list[Delta] = []
        self._start_s = time.perf_counter()
        self._first_s: float | None = None
        self._last_s: float | None = None
        self._first_tokens = 0

    def append(self, delta: Delta) -> None:
        """Append the next delta, which has just arrived."""
        self._deltas.append(delta)
        if delta.token_ids:
            self._last_s = time.perf_counter() - self._start_s
            if self._first_s is None:
                self._first_s, self._first_tokens = self._last_s, len(delta.token_ids)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self._deltas)

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self._deltas for token_id in delta.token_ids]

    @property
    def ttft_ms(self) -> float | None:
        """Time to the first token; None if there was none."""
        return None if self._first_s is None else self._first_s * 1000

    @property
    def tokens_per_s(self) -> float | None:
        """Speed after the first delta; None where nothing followed it."""
        later = len(self.token_ids) - self._first_tokens
        if self._first_s is None or self._last_s is None or later == 0 or self._last_s == self._first_s:
            return None
        return later / (self._last_s - self._first_s)

    def as_json(self) -> dict[str, Any]:
        """The complete answer. ttft_ms: time to the first token. tokens_per_s: speed after it."""
        last = self._deltas[-1]
        return {
            "request_id": last.request_id,
            "index": last.index,
            "text": self.text,
            "token_ids": self.token_ids,
            "logprobs": [_as_json(entry) for delta in self._deltas for entry in delta.logprobs],
            "prompt_logprobs": [_as_json(entry) for delta in self._deltas for entry in delta.prompt_logprobs],
            "finish_reason": last.finish_reason,
            "stop_string": last.stop_string,
            "stop_token_id": last.stop_token_id,
            "usage": asdict(last.usage) if last.usage else None,
            "timing": {
                "ttft_ms": None if self._first_s is None else round(self._first_s * 1000, 3),
                "tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 3),
            },
        }

    def stats_line(self) -> str:
        """One line about size and speed, for the terminal."""
        last = self._deltas[-1]
        prompt = f"{last.usage.prompt_tokens} prompt tokens, " if last.usage else ""
        first = "" if self._first_s is None else f"; first after {self._first_s * 1000:.0f} ms"
        speed = "" if self.tokens_per_s is None else f", then {self.tokens_per_s:.1f} tokens/s"
        return f"[{prompt}{len(self.token_ids)} made ({last.finish_reason}){first}{speed}]"


def answers_for(args: argparse.Namespace) -> list[Answer]:
    """An empty Answer for each one that -n asks for."""
    return [Answer() for _ in range(args.n or 1)]


def show(start: Callable[[], DeltaStream], answers: Sequence[Answer], args: argparse.Namespace) -> None:
    """Start the stream, collect its deltas in `answers`, and print them as the flags ask.

    Several answers are printed one after the other, each below a line with its number. The first
    is streamed. The stream is closed in any case, and an unfinished line is ended. What follows on
    stderr are the times for which the connection was lost. Raises
    KeyboardInterrupt once the stream is closed.
    """
    shown = None if args.json else _Shown(len(answers))
    gaps_s: Sequence[float] = ()
    try:
        with cancelled_by_ctrl_c(start) as stream:
            gaps_s = stream.gaps_s
            for delta in stream:
                answers[delta.index].append(delta)
                if shown:
                    shown.append(delta)
    finally:
        if shown:
            shown.end_line()
        for gap_s in gaps_s:
            if gap_s > TOLD_GAP_S:
                print(f"[connection lost; resumed after {gap_s:.1f} s]", file=sys.stderr)
    if args.json:
        for answer in answers:
            print(json.dumps(answer.as_json(), allow_nan=False), flush=True)
    elif args.stats or sys.stderr.isatty():
        for answer in answers:
            print(answer.stats_line(), file=sys.stderr)


def _as_json(entry: TokenLogprob | PromptLogprob) -> dict[str, Any]:
    """JSON has neither NaN nor infinity: null stands for what a damaged server may send."""

    def finite(logprob: float | None) -> float | None:
        return logprob if logprob is not None and math.isfinite(logprob) else None

    top = [{"token_id": alternative.token_id, "logprob": finite(alternative.logprob)} for alternative in entry.top]
    return {"token_id": entry.token_id, "logprob": finite(entry.logprob), "top": top}


class _Shown:
    """Prints answers in order, though their deltas arrive interleaved."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._current = 0
        self._texts = [""] * count  # of each answer, not printed yet
        self._ended = [False] * count
        self._at_line_start = True
        self._begin()

    def append(self, delta: Delta) -> None:
        """Print the delta, or keep it until the answers before it are complete."""
        self._texts[delta.index] += delta.text
        self._ended[delta.index] = delta.finish_reason is not None
        self._print_waiting()
        while self._ended[self._current] and self._current + 1 < self._count:
            self.end_line()
            self._current += 1
            self._begin()
            self._print_waiting()

    def end_line(self) -> None:
        if not self._at_line_start:
            print(flush=True)
            self._at_line_start = True

    def _begin(self) -> None:
        if self._count > 1:
            print(f"[{self._current + 1} of {self._count}]", flush=True)

    def _print_waiting(self) -> None:
        text, self._texts[self._current] = self._texts[self._current], ""
        if text:
            self._at_line_start = text.endswith("\n")  # set first, because print may fail
            print(text, end="", flush=True)
