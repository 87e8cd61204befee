"""One router as a pool of routers reaches it, and what the pool hears of it.

Implemented over Ray by `cluster/router_client.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from frontend.delta_stream import RequestSink
from frontend.router_client import Readiness
from router.request import TokenDelta


@dataclass(frozen=True)
class Pulse:
    """What a router tells of itself with each heartbeat.

    serving: its model is loaded. draining: it takes no new requests. load: requests that run or
    wait there, of all frontends. missing_s: for how long it has reached no shard with some expert;
    0 while it reaches all.
    """

    serving: bool
    draining: bool
    load: int
    missing_s: float = 0.0


class RouterListener(Protocol):
    """Who hears of routers. Everything is told on one event loop."""

    def beat(self, router: str, pulse: Pulse) -> None:
        """The router answers. After `down`, it is back, and may have forgotten every request."""
        ...

    def down(self, router: str, cause: str, detail: str) -> None:
        """The router cannot be reached.

        It may still run: with the next `beat` it may have all requests.
        cause: one of REPLAY_REASONS. detail: what a client is told of it.
        """
        ...

    def deliver(self, router: str, deltas: Sequence[TokenDelta]) -> None:
        """The router has made these, for requests that were submitted to it."""
        ...


class RouterConnection(RequestSink, Protocol):
    """The way to one router.

    `submit` is for a router that answers. A request that the router has already goes on there.
    When the router goes down, requests that were not sent yet are forgotten. Cancellations are
    not: they are sent once it answers again.
    """

    name: str

    def start(self, listener: RouterListener) -> None:
        """Look for the router from now on, and tell `listener`. Needs a running event loop."""
        ...

    def release(self, call_id: str, keep: str) -> None:
        """See RouterClient.release. Like a cancellation, it is not forgotten while the router is down."""
        ...

    async def readiness(self) -> Readiness:
        """Whether every part that a request needs is up, as this router sees it. Never raises."""
        ...

    def close(self) -> None:
        """Look for the router no more, and tell its listener nothing from now on."""
        ...
