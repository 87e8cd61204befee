"""Scrapes of the metrics page while whoever is asked does not answer."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from cluster.metrics_reader import MetricsReader
from tests.processes import PATIENCE_S


class Slow:
    """Answers once it is let go; counts its readings."""

    def __init__(self) -> None:
        self.let_go = threading.Event()
        self.readings = 0

    def read(self) -> bytes:
        self.readings += 1
        assert self.let_go.wait(PATIENCE_S)
        return b"page %d" % self.readings


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.let_go.set()


def run(main: Callable[[], object]) -> None:
    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))  # type: ignore[arg-type]


def test_scrapes_that_time_out_take_no_thread_from_tokenizing(slow: Slow) -> None:
    async def main() -> None:
        reader = MetricsReader(slow.read, lambda: b"nobody", timeout_s=0.01)
        pages = [await reader.page() for _ in range(100)]  # asyncio's own executor has 32 threads at most
        assert set(pages) == {b"# Ray did not answer within 0.01 s\nnobody"}
        assert await asyncio.to_thread(lambda: "tokenized") == "tokenized"
        assert slow.readings == 1
        slow.let_go.set()
        while (page := await reader.page()).startswith(b"# Ray"):
            pass
        assert page in (b"page 1", b"page 2")

    run(main)


def test_scrapes_at_once_share_a_reading_and_one_that_leaves_does_not_end_it(slow: Slow) -> None:
    async def main() -> None:
        reader = MetricsReader(slow.read, lambda: b"nobody", timeout_s=PATIENCE_S)
        scrapes = [asyncio.create_task(reader.page()) for _ in range(3)]
        await asyncio.sleep(0)  # they have begun
        scrapes[0].cancel()
        slow.let_go.set()
        assert await asyncio.gather(*scrapes[1:]) == [b"page 1", b"page 1"]
        assert await reader.page() == b"page 2"

    run(main)


@pytest.mark.parametrize("kind", [RuntimeError, TimeoutError])
def test_a_reading_that_fails_fails_its_scrape_alone(kind: type[Exception]) -> None:
    pages = iter([kind("Ray is away"), b"page"])

    def read() -> bytes:
        page = next(pages)
        if isinstance(page, Exception):
            raise page
        return page

    async def main() -> None:
        reader = MetricsReader(read, lambda: b"nobody")
        with pytest.raises(kind):
            await reader.page()
        assert await reader.page() == b"page"

    run(main)
