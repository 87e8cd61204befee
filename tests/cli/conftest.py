"""A scripted server for the command line's tests."""

from collections.abc import Iterator

import pytest

from tests.fake_router import FakeRouter, says
from tests.loopback import serving


@pytest.fixture(scope="module")
def router() -> FakeRouter:
    return FakeRouter()


@pytest.fixture(scope="module")
def address(router: FakeRouter) -> Iterator[str]:
    with serving(router) as address:
        yield address


@pytest.fixture(autouse=True)
def _fresh(router: FakeRouter) -> None:
    router.script = says("Hello!")
    router.requests.clear()
    router.closed.clear()
