"""From the times of tokens to what a fault cost. Pure arithmetic."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise

from bench.chaos.records import Stream
from bench.measure import percentile

MINUTE_S = 60.0


def longest_gap_s(stream: Stream, from_s: float, until_s: float) -> float | None:
    """The longest time between two tokens of a stream of which some lies in [from_s, until_s].

    None for a stream that had no token before from_s, or had ended. The last gap ends with the stream,
    or has no end. What lies after until_s does not count: it is the next fault's. Tokens at 1, 2,
    7, 8 and the interval [3, 9]: 5, from 2 to 7.
    """
    if not stream.is_active(from_s):
        return None
    times = stream.times
    times.append(until_s if stream.ended_s is None else stream.ended_s)
    gaps = [min(after, until_s) - before for before, after in pairwise(times) if after > from_s and before < until_s]
    return max(gaps, default=None)


def gap_figures(gaps_s: Sequence[float]) -> dict[str, float | None]:
    """gap_ms_p50, gap_ms_p99 and gap_ms_max, in milliseconds; None where no stream was watched."""
    if not gaps_s:
        return {"gap_ms_p50": None, "gap_ms_p99": None, "gap_ms_max": None}
    return {
        "gap_ms_p50": round(1e3 * percentile(gaps_s, 50), 1),
        "gap_ms_p99": round(1e3 * percentile(gaps_s, 99), 1),
        "gap_ms_max": round(1e3 * max(gaps_s), 1),
    }


def tokens_between(streams: Iterable[Stream], from_s: float, until_s: float) -> int:
    """Tokens that arrived in [from_s, until_s)."""
    return sum(len(ids) for stream in streams for at_s, _, ids in stream.pieces if from_s <= at_s < until_s)


def throughput_lost(streams: Sequence[Stream], rate_tok_s: float, at_s: float, until_s: float) -> float:
    """The share of a minute's tokens that a fault at at_s has cost by until_s, at most a minute later; 0 if none.

    At 100 tokens/s a fault that stops everything for 3 s and is made up for by nothing costs 300 of
    6,000 tokens: 0.05. What streams catch up before until_s is not lost.
    """
    until_s = min(until_s, at_s + MINUTE_S)
    expected = rate_tok_s * (until_s - at_s)
    lost = expected - tokens_between(streams, at_s, until_s)
    return max(0.0, lost / (rate_tok_s * MINUTE_S)) if rate_tok_s > 0 else 0.0


def tokens_per_s(streams: Sequence[Stream], from_s: float, until_s: float, bin_s: float) -> list[tuple[float, float]]:
    """(middle of each interval of bin_s, tokens per second in it)."""
    bins = [0] * max(1, int((until_s - from_s) / bin_s))
    for stream in streams:
        for at_s, _, token_ids in stream.pieces:
            index = int((at_s - from_s) / bin_s)
            if at_s >= from_s and index < len(bins):
                bins[index] += len(token_ids)
    return [(from_s + (index + 0.5) * bin_s, tokens / bin_s) for index, tokens in enumerate(bins)]


def first_change(stream: Stream, expected: Mapping[int, Sequence[int]]) -> float | None:
    """When the first token came that is not the expected one; None if every token is.

    A failed stream's tokens must be right as far as they go; a finished one's must be all.
    """
    so_far = dict.fromkeys(expected, 0)
    for at_s, index, token_ids in stream.pieces:
        if index not in expected:
            return at_s
        begin = so_far[index]
        if list(expected[index][begin : begin + len(token_ids)]) != token_ids:
            return at_s
        so_far[index] = begin + len(token_ids)
    is_short = (
        stream.error is None
        and stream.ended_s is not None
        and any(so_far[index] < len(tokens) for index, tokens in expected.items())
    )
    return stream.ended_s if is_short else None


def changed_tokens(stream: Stream, expected: Mapping[int, Sequence[int]]) -> int:
    """How many tokens differ from those expected at their place, with those that a finished stream lacks."""
    answers, changed = stream.answers, 0
    for index, tokens in answers.items():
        wanted = expected.get(index, ())
        changed += sum(got != want for got, want in zip(tokens, wanted, strict=False)) + max(
            0, len(tokens) - len(wanted)
        )
    if stream.error is None and stream.ended_s is not None:
        changed += sum(max(0, len(wanted) - len(answers.get(index, ()))) for index, wanted in expected.items())
    return changed
