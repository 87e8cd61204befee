"""DROVER_TEST_ISA, the highest level that whoever runs the tests says this machine has."""

import os
from collections.abc import Generator

import pytest

from kernels.cpu.processor import LEVELS, VARIABLE


def said_by_whoever_runs_this() -> set[str]:
    """That level and those below; empty if nothing is said."""
    level = os.environ.get("DROVER_TEST_ISA")
    if not level:
        return set()
    assert level in LEVELS, f"DROVER_TEST_ISA is {level!r}; it must be one of {', '.join(LEVELS)}"
    return set(LEVELS[: LEVELS.index(level) + 1])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where every instruction is there, and none is hidden, no kernel's test has a reason to be skipped."""
    report = yield
    if report.skipped and said_by_whoever_runs_this() == set(LEVELS) and not os.environ.get(VARIABLE):
        report.outcome = "failed"
        report.longrepr = f"skipped, though DROVER_TEST_ISA says that everything is there: {report.longrepr}"
    return report
