"""The routers and shards that a deployment wants now, as a frontend learns it."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import ray

from cluster.names import CONTROLLER

logger = logging.getLogger(__name__)

LOOK_S = 1.0
ANSWER_S = 3.0


class PartDirectory:
    """Asks the controller each second, in a thread; keeps what it has while nobody answers."""

    def __init__(self, namespace: str, routers: Sequence[str], shards: Sequence[str]) -> None:
        """routers, shards: those to begin with."""
        self._namespace = namespace
        self.routers, self.shards = tuple(routers), tuple(shards)

    def watch(self, on_answer: Callable[[tuple[str, ...]], None]) -> None:
        """Ask from now on. on_answer: gets the routers of each answer, in the thread."""
        threading.Thread(target=self._watch, args=(on_answer,), name="part directory", daemon=True).start()

    def _watch(self, on_answer: Callable[[tuple[str, ...]], None]) -> None:
        while True:
            try:
                self.routers, self.shards = self._ask()
                on_answer(self.routers)
            except (ValueError, ray.exceptions.RayError) as error:
                logger.debug("the controller does not say which parts there are: %s", error)
            except Exception:  # a defect, too, must not leave this frontend without new routers for ever
                logger.exception("looking for parts failed")
            time.sleep(LOOK_S)  # nobody tells when parts come or go

    def _ask(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of routers and shards. May block for as long as Ray's head is away."""
        controller = ray.get_actor(CONTROLLER, namespace=self._namespace)
        names: tuple[tuple[str, ...], tuple[str, ...]] = ray.get(controller.part_names.remote(), timeout=ANSWER_S)
        return names
