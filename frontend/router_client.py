"""What a frontend needs of a router.

Implemented over Ray by `cluster/router_client.py`, and within one process by
`frontend/in_process/router.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from frontend.delta_stream import DeltaStream
from router.request import GenerationRequest, RequestLimits


@dataclass(frozen=True)
class Readiness:
    """Whether requests are answered now, and if not, which part is missing.

    degraded: what is missing although they are: they may be slower, or wait.
    """

    ready: bool
    detail: str = ""
    degraded: str = ""


class RouterClient(Protocol):
    """One router, or several that look like one."""

    async def limits(self) -> RequestLimits: ...

    async def readiness(self) -> Readiness:
        """Whether every part that a request needs is up. Never raises."""
        ...

    def generate(self, requests: Sequence[GenerationRequest]) -> DeltaStream:
        """The deltas of the requests, which `check_request` has passed.

        The caller closes the stream.
        """
        ...

    def release(self, call_id: str, keep: str) -> None:
        """End what still runs of a call that is resumed, at whichever frontend and router.

        keep: the id of the attempt that goes on. Requests of the call and of its older attempts end:
        see `frontend/delta_stream.py:released`. A stream that reads them gets AlreadyExists. Does
        not wait; `generate` comes behind it.
        """
        ...
