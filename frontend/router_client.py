"""What a frontend needs of a router, and the router in the same process.

`cluster/router_client.py` implements the same over Ray.
"""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

from router.request import GenerationRequest, RequestLimits, TokenDelta


@dataclass(frozen=True)
class Readiness:
    """Whether the model can answer now, and if not, which part is missing."""

    ready: bool
    detail: str = ""


class RouterClient(Protocol):
    """One router, or several that look like one."""

    async def limits(self) -> RequestLimits: ...

    async def readiness(self) -> Readiness:
        """Whether every part that a request needs is up. Never raises."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        """The request's deltas, as they are made; ends after the one with a finish_reason.

        Closing or cancelling the generator frees the request's work within one step.
        Raises ResourceExhausted, Unavailable (see router/errors.py).
        """
        ...
