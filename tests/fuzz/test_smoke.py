"""A short campaign, so that `make fuzz` cannot rot: the same code, a fixed seed."""

import asyncio
from pathlib import Path

from bench.worst_requests import a_server
from tests.fuzz.campaign import GOOD, fuzz, resident_bytes
from tests.fuzz.malformed import METHODS, malformed
from tests.reference import make_served_reference

PER_METHOD = 60


def test_malformed_requests_hurt_nobody(tmp_path: Path) -> None:
    make_served_reference(tmp_path, "maverick")
    with a_server(tmp_path) as (address, pid):
        report = asyncio.run(fuzz(address, PER_METHOD, seed=1, pid=pid))
        assert resident_bytes(pid) > 0  # it lives
    assert [(method, what) for method, what, _ in report.faults] == []
    assert report.good_streams > 0
    assert sum(report.statuses.values()) == PER_METHOD * len(METHODS)
    # It is no campaign if nothing is refused, or if nothing gets further than a check.
    assert {"INVALID_ARGUMENT", "OK", "read"} <= set(report.statuses)


def test_a_request_depends_on_seed_method_and_number_alone() -> None:
    method = next(iter(METHODS))
    made = [malformed(1, method, number) for number in range(50)]
    assert made == [malformed(1, method, number) for number in range(50)]
    assert len(set(made)) > 30
    assert made != [malformed(2, method, number) for number in range(50)]
    assert GOOD.SerializeToString() not in made
