"""Keeps a router linked to its shards: forms each link, and forms it anew whenever it has ended."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass

import ray
import torch

from cluster.actor_state import Phase
from cluster.link_invitation import LinkInvitation
from experts.endpoint import Liveness
from experts.errors import LinkDown
from experts.group_link import GroupLink
from experts.link import ExpertRows, Reply
from experts.process_group import ROUTER_RANK, LinkStore
from experts.wire import WireFormat
from router.dispatch import Dispatcher

logger = logging.getLogger(__name__)

RETRY_S = 0.25
JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LinkSettings:
    """router_liveness, shard_liveness: how each end judges the other. reply_deadline_s: see GroupLink."""

    wire: WireFormat
    router_liveness: Liveness
    shard_liveness: Liveness
    reply_deadline_s: float


class NoLink:
    """A link that is not formed yet, or whose shard is away."""

    def __init__(self, reason: str) -> None:
        self.down_reason: str | None = reason

    def request(self, rows: ExpertRows) -> Reply:
        raise LinkDown(self.down_reason)

    def close(self) -> None:
        pass


class LinkKeeper:
    """One thread per shard: joining an absent peer blocks, and one absent shard must not keep another waiting.

    A dead link is replaced by a new group under a new name; what the old one left in the store is deleted.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        shard_names: list[str],
        find_actor: Callable[[str], ray.actor.ActorHandle],
        settings: LinkSettings,
        router_name: str,
        device: torch.device,
    ) -> None:
        self._dispatcher, self._find_actor, self._settings = dispatcher, find_actor, settings
        self._router_name, self._device = router_name, device
        self._host = ray.util.get_node_ip_address()
        self._store = LinkStore(self._host)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(index, name), name=f"keep {name}", daemon=True)
            for index, name in enumerate(shard_names)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Close every link and end the threads."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * JOIN_TIMEOUT_S)

    def _keep(self, index: int, shard_name: str) -> None:
        generation, link_name = 0, ""
        while not self._stopping.is_set():
            if self._dispatcher.links[index].down_reason is not None:
                if link_name:
                    self._dispatcher.links[index].close()
                    self._store.forget(link_name)
                generation += 1
                link_name = f"{self._router_name}--{shard_name}--{generation}"
                try:
                    self._dispatcher.links[index] = self._form(shard_name, link_name)
                    logger.info("link %s formed", link_name)
                except (ConnectionError, ray.exceptions.RayError) as error:
                    reason = f"{shard_name} cannot be reached: {_short(error)}"
                    self._dispatcher.links[index] = NoLink(reason)
            self._stopping.wait(RETRY_S)
        self._dispatcher.links[index].close()

    def _form(self, shard_name: str, link_name: str) -> GroupLink:
        settings = self._settings
        try:
            shard = self._find_actor(shard_name)
        except ValueError:
            raise ConnectionError("there is no such actor") from None
        # A shard that is away or still loading says so at once; only one that is ready is waited for.
        state = ray.get(shard.state.remote(), timeout=JOIN_TIMEOUT_S)
        if state.phase is not Phase.READY:
            raise ConnectionError(state.summary)
        invitation = LinkInvitation(
            self._host, self._store.port, link_name, settings.wire, settings.shard_liveness, JOIN_TIMEOUT_S
        )
        joining = shard.join.remote(invitation)
        pair, rows = invitation.accept(ROUTER_RANK, self._device)
        try:
            ray.get(joining, timeout=JOIN_TIMEOUT_S)
        except ray.exceptions.RayError:
            pair.close()
            raise
        return GroupLink(
            pair, settings.wire, settings.router_liveness, settings.reply_deadline_s, self._device, link_name, rows
        )


def _short(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError) and error.cause is not None:
        return str(error.cause)
    return str(error).splitlines()[0] if str(error) else type(error).__name__
