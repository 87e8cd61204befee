"""Keeps a router linked to its shards: forms each link, and a new one whenever it has ended."""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
import torch

from cluster.actors.link_invitation import LinkInvitation
from experts.connection import connect
from experts.endpoint import Liveness
from experts.group_link import GroupLink
from experts.groups.nccl import ROUTER_RANK, RowStore
from experts.link_table import LinkTable
from experts.wire import WireFormat

logger = logging.getLogger(__name__)

# Between two attempts to reach an absent shard. Ray tells nobody when it has restarted an actor.
RETRY_S = 0.1
JOIN_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class LinkSettings:
    """router_liveness, shard_liveness: how each end judges the other."""

    wire: WireFormat
    router_liveness: Liveness
    shard_liveness: Liveness


class LinkKeeper:
    """One thread per shard: joining an absent peer blocks, and one absent shard must not keep another waiting.

    A new link gets a new name. Names never repeat, not even after a restart of the router: a shard
    may still have links of the process before.
    """

    def __init__(
        self,
        links: LinkTable,
        shard_names: list[str],
        find_actor: Callable[[str], ray.actor.ActorHandle],
        settings: LinkSettings,
        router_name: str,
        device: torch.device,
    ) -> None:
        """links: filled and emptied from here on. shard_names: actor names, by shard number."""
        self._links, self._find_actor, self._settings = links, find_actor, settings
        self._router_name, self._device = router_name, device
        self._row_store = None if settings.wire.rows_inline else RowStore(ray.util.get_node_ip_address())
        self._incarnation = secrets.token_hex(4)
        self._shards = frozenset(range(len(shard_names)))
        self._were_linked: set[int] = set()
        self._were_loaded: set[int] = set()
        self._began = False
        for shard, name in enumerate(shard_names):
            threading.Thread(target=self._keep, args=(shard, name), name=f"keep {name}", daemon=True).start()

    @property
    def never_linked(self) -> frozenset[int]:
        """The shards that have not been linked so far; empty for good once it was.

        Nobody waits for those that are drained.
        """
        if not self._began:
            missing = self._shards - self._were_linked - self._links.draining
            self._began = not missing
            return missing
        return frozenset()

    def wait_until_all_were_loaded(self) -> None:
        """Return once each shard that is not drained has had all that it should hold, at least once."""
        bell = self._links.bell
        while True:
            seen = bell.rings
            if self._shards <= self._were_loaded | self._links.draining:
                return
            bell.wait(seen, JOIN_TIMEOUT_S)

    def _keep(self, shard: int, shard_name: str) -> None:
        """Form the shard's link whenever it is down, for as long as the process lives."""
        for generation in itertools.count(1):
            link_name = f"{self._router_name}-{self._incarnation}--{shard_name}--{generation}"
            try:
                self._keep_one(shard, shard_name, link_name)
            except Exception as error:
                # Whatever it was, the shard must not stay unlinked for ever.
                logger.exception("keeping %s failed", link_name)
                self._links.remove(shard, repr(error))
                time.sleep(RETRY_S)

    def _keep_one(self, shard: int, shard_name: str, link_name: str) -> None:
        """Form a link, and return once it has ended."""
        link = self._form(shard, shard_name, link_name)
        logger.info("link %s formed", link_name)
        self._were_linked.add(shard)  # before the table changes, which wakes whoever waits for this
        self._links.replace(shard, link)
        try:
            reason = link.wait_until_down()
            self._links.remove(shard, reason, link.down_kind)
        finally:
            link.close()
            self._forget(link_name)

    def _form(self, shard: int, shard_name: str, link_name: str) -> GroupLink:
        """Try until it works; meanwhile the table has the reason why it does not."""
        while True:
            try:
                return self._try_to_form(shard, shard_name, link_name)
            except (ConnectionError, ray.exceptions.RayError) as error:
                reason = _short(error)
            except Exception as error:
                logger.exception("forming %s failed", link_name)
                reason = repr(error)
            self._links.remove(shard, reason)
            self._forget(link_name)
            time.sleep(RETRY_S)

    def _forget(self, link_name: str) -> None:
        if self._row_store is not None:
            self._row_store.forget(link_name)

    def _loaded(self, shard: int) -> None:
        self._were_loaded.add(shard)
        self._links.look_again()

    def _try_to_form(self, shard: int, shard_name: str, link_name: str) -> GroupLink:
        settings = self._settings
        try:
            actor = self._find_actor(shard_name)
        except ValueError:
            raise ConnectionError("there is no such actor") from None
        invitation = LinkInvitation(
            link_name,
            secrets.token_bytes(32),
            settings.wire,
            settings.shard_liveness,
            JOIN_TIMEOUT_S,
            None if self._row_store is None else (self._row_store.host, self._row_store.port),
        )

        address = ray.get(actor.join.remote(invitation), timeout=JOIN_TIMEOUT_S)
        connection = connect(address, invitation.secret, JOIN_TIMEOUT_S)
        rows = invitation.row_channel(ROUTER_RANK, self._device, connection)
        return GroupLink(
            connection,
            settings.wire,
            settings.router_liveness,
            self._links.bell,
            self._device,
            link_name,
            rows,
            on_loaded=lambda: self._loaded(shard),
        )


def _short(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return str(error.cause)
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"it did not answer within {JOIN_TIMEOUT_S:g} s"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process is gone; Ray starts it again"
    return str(error)
