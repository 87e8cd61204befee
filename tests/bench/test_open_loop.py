"""Arrivals and what counts as good."""

from itertools import pairwise
from statistics import fmean

import pytest

from bench.open_loop import OUTPUT_LENGTHS, PROMPT_LENGTHS, Targets, goodput, is_good, open_loop, poisson_schedule
from bench.worker import Request, Stream
from bench.workload import closed_loop, prompts

TARGETS = Targets(ttft_ms=1000, itl_ms=100)


def test_a_seed_is_a_schedule() -> None:
    assert poisson_schedule("a", 3, 20) == poisson_schedule("a", 3, 20)
    assert poisson_schedule("a", 3, 20) != poisson_schedule("b", 3, 20)
    assert open_loop("a", 3, 20, 1000) == open_loop("a", 3, 20, 1000)


def test_arrivals_come_at_their_rate() -> None:
    arrivals = poisson_schedule("rate", 5, 2000)
    gaps = [after - before for before, after in pairwise(arrivals)]
    assert len(arrivals) == pytest.approx(10_000, rel=0.05)
    assert fmean(gap * gap for gap in gaps) == pytest.approx(2 / 5**2, rel=0.1)  # of an exponential
    assert arrivals == sorted(arrivals)
    assert 0 <= arrivals[0] < arrivals[-1] < 2000


def test_requests_have_the_lengths_that_are_stated() -> None:
    requests = open_loop("lengths", 20, 20, 1000)
    assert {len(request.token_ids) for request in requests} == set(PROMPT_LENGTHS)
    assert {request.max_tokens for request in requests} == set(OUTPUT_LENGTHS)


def test_no_two_runs_share_a_prompt() -> None:
    one, other = closed_loop("0 a", 8, 4, 1000), closed_loop("0 b", 8, 4, 1000)
    assert not {tuple(r.token_ids) for r in one} & {tuple(r.token_ids) for r in other}
    assert all(0 <= token < 10 for prompt in prompts("s", 20, [5, 6], 10) for token in prompt)


@pytest.mark.parametrize(
    ("stream", "good"),
    [
        (Stream([2.5, 2.55, 2.6], [1, 2, 3]), True),
        (Stream([3.1, 3.2, 3.3], [1, 2, 3]), False),  # its first token took 1.1 s
        (Stream([2.5, 2.7, 2.9], [1, 2, 3]), False),  # 200 ms between tokens
        (Stream([2.5, 2.6], [1, 2]), False),  # cut short
        (Stream(error="RESOURCE_EXHAUSTED: full"), False),
    ],
    ids=["in time", "late", "slow", "short", "refused"],
)
def test_good_is_in_full_and_in_time(stream: Stream, good: bool) -> None:
    assert is_good(Request([1], 3, at_s=2.0), stream, TARGETS) == good


def test_goodput_by_hand() -> None:
    requests = [Request([1], 2), Request([1], 2, at_s=1.0), Request([1], 2, at_s=1.0)]
    streams = [Stream([0.5, 0.55], [1, 2]), Stream([3.9, 4.0], [1, 2]), Stream(error="refused")]
    done = goodput(2.0, requests, streams, TARGETS)
    assert (done["requests"], done["good"], done["failed"], done["total_s"]) == (3, 1, 1, 4.0)
    assert (done["goodput_req_s"], done["goodput_tok_s"], done["output_tok_s"]) == (0.25, 0.5, 1.0)
