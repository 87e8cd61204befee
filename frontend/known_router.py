"""A router as a pool of routers knows it."""

import math

from frontend.router_connection import Pulse, RouterConnection


class KnownRouter:
    """What was last heard of a router, and what it has of this frontend.

    up: it answers, and serves. own: requests of this frontend that it has. others: those of other
    frontends, at its last heartbeat. detail: why it is down; empty before it was heard of.
    draining, missing_s: see Pulse. well_since_s: since when it has been up and missed no expert;
    infinite while it is not so.
    """

    def __init__(self, connection: RouterConnection) -> None:
        self.connection = connection
        self.up = self.draining = False
        self.own = self.others = 0
        self.detail = ""
        self.missing_s, self.well_since_s = 0.0, math.inf

    @property
    def is_known(self) -> bool:
        return self.up or self.detail != ""

    @property
    def load(self) -> int:
        """Requests that it has, of all frontends."""
        return self.own + self.others

    def hear(self, pulse: Pulse, now_s: float) -> None:
        """Note a heartbeat."""
        self.others, self.draining, self.missing_s = max(0, pulse.load - self.own), pulse.draining, pulse.missing_s
        self.well_since_s = math.inf if pulse.missing_s else min(self.well_since_s, now_s)

    def fall(self) -> None:
        """Note that it cannot be reached."""
        self.up, self.well_since_s = False, math.inf
