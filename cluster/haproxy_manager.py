"""Serve's HAProxy, started again within milliseconds if its process dies.

Serve itself replaces the whole actor around HAProxy, after three failed health checks. That takes
about 3 s with checks four times a second. With its default, every 10 s, it takes half a minute.

The class and its parts are private to Ray Serve; tests/cluster/test_two_of_each.py sees whether they
are still what they were. `cluster/serve_callback.py` puts it in place.
"""

import logging
from typing import Any

from ray.serve._private import haproxy

logger = logging.getLogger("ray.serve")

_Manager: Any = haproxy.HAProxyManager.__ray_metadata__.modified_class


class HAProxyManager(_Manager):  # type: ignore[misc]
    """The actor that runs HAProxy on a node, and looks after its process."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._leaving = False
        self._watcher = self.event_loop.create_task(self._watch())

    async def shutdown(self) -> None:
        self._leaving = True
        await super().shutdown()

    async def _watch(self) -> None:
        """Start HAProxy again whenever it has ended and nothing else has taken its place."""
        await self._haproxy_start_task
        while not self._leaving:
            process = self._haproxy._proc
            status = await process.wait()
            async with self._reload_lock:  # a reload puts a new process in the place of the old one
                if self._haproxy._proc is not process or self._leaving:
                    continue
                logger.warning("HAProxy ended with status %s; it is started again", status)
                try:
                    await self._haproxy.start()
                except Exception:
                    logger.exception("HAProxy did not start; Serve will replace this actor")
                    return
