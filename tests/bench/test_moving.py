"""The figures of the bench that moves experts, by hand."""

import pytest

from bench.errors import BenchError
from bench.moving import Gaps, gaps_in, parser


def test_gaps_are_between_the_tokens_of_one_stream() -> None:
    gaps = gaps_in([[1.0, 1.5, 3.5], [9.0, 9.25], [20.0]])
    assert gaps == Gaps(median_ms=500.0, p99_ms=pytest.approx(2000.0, rel=0.05), longest_ms=2000.0)


def test_streams_without_gaps_are_no_measurement() -> None:
    with pytest.raises(BenchError, match="measure for longer"):
        gaps_in([[1.0], []])


def test_the_help_teaches() -> None:
    assert "python -m bench.moving --checkpoint" in parser().format_help()
