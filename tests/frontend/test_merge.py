"""Several streams as one: all of their items, the first error, and nothing left behind."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest

from frontend.merge import merged

PATIENCE_S = 60.0


def run(test: Coroutine[Any, Any, Any]) -> Any:
    async def bounded() -> Any:
        result = await asyncio.wait_for(test, PATIENCE_S)
        assert len(asyncio.all_tasks()) <= 2, "a reader was left behind"  # this one, and wait_for's on old Pythons
        return result

    return asyncio.run(bounded())


class Source:
    """A stream that says `items`, then fails, waits for ever, or ends. closed: it has ended or was closed."""

    def __init__(self, items: str, then: Exception | str = "end") -> None:
        self.closed = False
        self._items, self._then = items, then

    async def stream(self) -> AsyncGenerator[str, None]:
        try:
            for item in self._items:
                yield item
                await asyncio.sleep(0)
            if isinstance(self._then, Exception):
                raise self._then
            if self._then == "wait":
                await asyncio.Event().wait()
        finally:
            self.closed = True


async def read(*sources: Source, limit: int = 1000) -> list[str]:
    got: list[str] = []
    async with aclosing(merged([source.stream() for source in sources])) as items:
        async for item in items:
            got.append(item)
            if len(got) == limit:
                break
    return got


@pytest.mark.parametrize("texts", [["abc"], ["abc", "", "xy"], ["a"] * 16], ids=str)
def test_every_item_of_every_stream_comes_in_its_streams_order(texts: list[str]) -> None:
    sources = [Source(text) for text in texts]
    got = run(read(*sources))
    assert sorted(got) == sorted("".join(texts))
    for text in set(texts):
        assert [item for item in got if item in set(text)] == sorted(text * texts.count(text))
    assert all(source.closed for source in sources)


def test_no_stream_waits_for_another() -> None:
    silent, talking = Source("", "wait"), Source("abc", "wait")
    assert run(read(silent, talking, limit=3)) == ["a", "b", "c"]
    assert silent.closed
    assert talking.closed


@pytest.mark.parametrize("others", [0, 1, 5])
def test_the_first_error_ends_all(others: int) -> None:
    sources = [Source("ab", ValueError("broken")), *(Source("x", "wait") for _ in range(others))]
    with pytest.raises(ValueError, match="broken"):
        run(read(*sources))
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 3])
def test_cancelling_the_reader_closes_every_stream(count: int) -> None:
    sources = [Source("a", "wait") for _ in range(count)]

    async def test() -> None:
        reading = asyncio.create_task(read(*sources))
        for _ in range(10):
            await asyncio.sleep(0)  # lets everything start
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading

    run(test())
    assert all(source.closed for source in sources)
