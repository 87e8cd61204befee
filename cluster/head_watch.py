"""Watches the Ray that a deployment runs on: what ends it for good, and what may come back."""

import time
from collections.abc import Callable

from checkpoint.errors import DroverError
from cluster import ray_runtime

HEAD_RETURNS_S = 60.0
"""How long a head may be away. Ray waits for it as long: gcs_rpc_server_reconnect_timeout_s."""


class HeadWatch:
    """Asked now and then by whoever serves. Streams do not pass Ray's head, and go on without it."""

    def __init__(
        self,
        is_local: bool,
        fault: Callable[[], str | None] = ray_runtime.fault,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """is_local: the Ray is this process's own, and does not come back."""
        self._is_local, self._fault, self._clock = is_local, fault, clock
        self._away_since_s: float | None = None

    def look(self) -> str | None:
        """What to tell, once, of a head that is away; None while it is there; "" while it is still away.

        Raises DroverError once Ray is gone for good.
        """
        fault = self._fault()
        if fault is None:
            self._away_since_s = None
            return None
        now = self._clock()
        if self._away_since_s is None:
            self._away_since_s = now
            if not self._is_local:
                return f"{fault}; streams go on, and it has {HEAD_RETURNS_S:g} s to come back with its records"
        if self._is_local or now - self._away_since_s > HEAD_RETURNS_S:
            raise DroverError(fault)
        return ""
