"""What the controller makes of parts that answer, and of those that do not."""

import time

from cluster.policy.wanted import Orders
from cluster.reports import ActorState, Phase, RouterStats
from cluster.running import Running

READY = ActorState(1, Phase.READY, 1, 1)


def draining(open_requests: int, draining_s: float) -> RouterStats:
    return RouterStats(None, 0.0, 1, 1, {}, {}, {}, open_requests=open_requests, draining_s=draining_s)


def test_a_draining_router_that_misses_a_look_keeps_its_requests_and_its_grace() -> None:
    running = Running("namespace")
    answered = running._found("router-0", "node", READY, draining(3, 5.0))
    assert (answered.is_idle, answered.orders) == (False, Orders(is_draining=True))
    began_s = time.monotonic()
    silent = running._found("router-0", "node", None, None)
    assert (silent.is_ready, silent.is_idle, silent.open_requests) == (False, False, 3)
    assert 5.0 <= silent.draining_s <= 5.0 + time.monotonic() - began_s + 1.0


def test_a_router_without_a_process_does_nothing() -> None:
    running = Running("namespace")
    running._found("router-0", "node", READY, draining(3, 5.0))
    assert running._found("router-0", None, None, None).is_idle
