"""What a part that starts is to do: it knows only who it is, and asks the controller, or else routers."""

import logging
import threading
from collections.abc import Callable
from typing import Any

import ray

from cluster.names import CONTROLLER, part_names
from cluster.reports import HoldOrder
from experts.placement import Placement

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
"""For each that is asked. Ray restarts a part only while its head is there, so looking up is quick."""


def slots_to_hold(shard: str, namespace: str) -> HoldOrder | None:
    """What the shard is to hold; None if nobody answers."""
    answer: HoldOrder | None = _first_answer(shard, namespace, "slots_of", shard)
    return answer


def placement_to_route(router: str, namespace: str) -> Placement | None:
    """What the router is to route; None if nobody answers."""
    answer: Placement | None = _first_answer(router, namespace, "placement")
    return answer


def _first_answer(asker: str, namespace: str, method: str, *arguments: Any) -> Any:
    """The controller's, or else any router's. A part that starts for the first time asks no routers: they know less."""
    answer = _within_time(lambda: _ask(CONTROLLER, namespace, method, *arguments))
    if answer is not None or not ray.get_runtime_context().was_current_actor_reconstructed:
        return answer
    names = _within_time(lambda: part_names(namespace)) or []
    for name in names:
        if name.startswith("router-") and name != asker:
            answer = _within_time(lambda name=name: _ask(name, namespace, method, *arguments))  # type: ignore[misc]
            if answer is not None:
                return answer
    return None


def _within_time(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or None. Ray has no deadline for telling where an actor is."""
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(ask()), name="ask", daemon=True)
    asking.start()
    asking.join(2 * ASK_TIMEOUT_S)
    return answers[0] if answers else None


def _ask(name: str, namespace: str, method: str, *arguments: Any) -> Any:
    try:
        actor = ray.get_actor(name, namespace=namespace)
        return ray.get(getattr(actor, method).remote(*arguments), timeout=ASK_TIMEOUT_S)
    except (ValueError, ray.exceptions.RayError) as error:
        logger.warning("%s does not answer %s: %s", name, method, error)
        return None
