"""From times to figures, with numbers small enough to check by hand."""

import numpy as np
import pytest

from bench.errors import BenchError
from bench.measure import Round, check_complete, itl_ms, percentile, round_of, summary, ttft_ms
from bench.worker import Request, Stream


@pytest.mark.parametrize("percent", [0, 1, 50, 99, 100])
@pytest.mark.parametrize("values", [[5.0], [10.0, 20.0, 30.0, 40.0], [3.0, 1.0, 2.0, 9.0, 9.0]])
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_round_by_hand() -> None:
    # Two streams of five tokens: the first tokens after 0.5 s and 1 s, then one each second.
    requests = [Request([1, 2, 3], 5), Request([4, 5, 6], 5)]
    prefill = [Stream([0.5], [7]), Stream([1.0], [8])]
    streams = [Stream([0.5, 2, 3, 4, 5], [1] * 5), Stream([1, 2, 3, 4, 5], [1] * 5)]
    figures = summary([round_of(prefill, requests, streams)])
    assert figures.decode_tok_s == pytest.approx(2 * 4 / (5 - 1))
    assert figures.prefill_tok_s == pytest.approx(6 / 1.0)
    assert (figures.ttft_ms_p50, figures.itl_ms_p50) == (pytest.approx(750), pytest.approx(1000))
    assert (figures.decode_tok_s_min, figures.decode_tok_s_max, figures.rounds) == (2, 2, 1)


def test_a_first_token_is_timed_from_its_own_request() -> None:
    assert ttft_ms([Request([1], 1, at_s=2.0)], [Stream([2.25], [1])]) == [pytest.approx(250)]


def test_tokens_that_come_together_have_no_time_between_them() -> None:
    stream = Stream()
    stream.add([1, 2], 1.0)
    stream.add([3], 1.5)
    assert itl_ms([stream]) == [0.0, 500.0]


def a_round(prefill_s: float, last_first_s: float = 1.0, total_s: float = 5.0) -> Round:
    return Round(256, 8, prefill_s, last_first_s, total_s, [1000.0], [1000.0])


def test_a_pause_in_one_prefill_does_not_flatter_decoding() -> None:
    assert summary([a_round(1.0), a_round(4.9), a_round(1.0)]).decode_tok_s_max == pytest.approx(2)
    assert summary([a_round(4.9)]).decode_tok_s == pytest.approx(2)


def test_streams_of_unequal_length_are_refused() -> None:
    requests = [Request([1], 3), Request([1], 3)]
    check_complete("x", requests, [Stream([1, 2, 3], [1, 2, 3])] * 2)
    with pytest.raises(BenchError, match="x ended 1 streams early: the first has 2 of 3 tokens"):
        check_complete("x", requests, [Stream([1, 2, 3], [1, 2, 3]), Stream([1, 2], [1, 2])])
    with pytest.raises(BenchError, match="x failed 1 requests: UNAVAILABLE: gone"):
        check_complete("x", requests, [Stream([1, 2, 3], [1, 2, 3]), Stream(error="UNAVAILABLE: gone")])
