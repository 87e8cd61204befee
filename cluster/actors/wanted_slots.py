"""What a shard that was restarted has to hold: it knows only who it is, and asks."""

import logging
import threading
from collections.abc import Iterable, Mapping

import ray

from cluster.names import CONTROLLER
from experts.placement import Slot

logger = logging.getLogger(__name__)

ASK_TIMEOUT_S = 2.0
"""For each that is asked. Ray restarts a shard only while its head is there, so looking up is quick."""


def wanted_slots(shard: str, namespace: str, routers: Iterable[str]) -> Mapping[Slot, int] | None:
    """Slots as the controller wants them, or else as any router routes; None if nobody answers."""
    for name in (CONTROLLER, *routers):
        answer: list[Mapping[Slot, int]] = []
        # Ray has no deadline for telling where an actor is.
        asking = threading.Thread(target=_ask, args=(name, namespace, shard, answer), name=f"ask {name}", daemon=True)
        asking.start()
        asking.join(2 * ASK_TIMEOUT_S)
        if answer:
            return answer[0]
    return None


def _ask(name: str, namespace: str, shard: str, answer: list[Mapping[Slot, int]]) -> None:
    try:
        actor = ray.get_actor(name, namespace=namespace)
        answer.append(ray.get(actor.slots_of.remote(shard), timeout=ASK_TIMEOUT_S))
    except (ValueError, ray.exceptions.RayError) as error:
        logger.warning("%s does not say what %s is to hold: %s", name, shard, error)
