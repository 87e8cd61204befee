"""Several streams as one."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import TypeVar

Item = TypeVar("Item")


async def merged(streams: Sequence[AsyncGenerator[Item, None]]) -> AsyncGenerator[Item, None]:
    """The items of all streams as they come, until all have ended; all start at once.

    The first error of one ends them all and is raised. However this ends, every stream has then been closed.
    """
    if len(streams) == 1:  # most requests want one answer, and a task more for each would only cost
        async with aclosing(streams[0]) as only:
            async for sole in only:
                yield sole
        return
    items: asyncio.Queue[Item | Exception | None] = asyncio.Queue()  # None: one stream has ended

    async def read(stream: AsyncGenerator[Item, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    items.put_nowait(item)
        except Exception as error:
            items.put_nowait(error)
        else:
            items.put_nowait(None)

    readers = [asyncio.create_task(read(stream)) for stream in streams]
    try:
        running = len(readers)
        while running:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
