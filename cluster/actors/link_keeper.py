"""Keeps a router linked to its shards: forms each link, and a new one whenever it has ended."""

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

import ray
import torch

from cluster.actors.link_invitation import LinkInvitation
from cluster.part_names import name_of_link, part_number
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


@dataclass
class _Kept:
    """A shard that is to be linked, for one thread. link: while it is linked. is_wanted: until it is forgotten."""

    link: GroupLink | None = None
    is_wanted: bool = True


class LinkKeeper:
    """One thread per shard: joining an absent peer blocks, and one absent shard must not keep another waiting.

    A new link gets a new name. Names never repeat, not even after a restart of the router: a shard
    may still have links of the process before.
    """

    def __init__(
        self,
        links: LinkTable,
        needed: Callable[[], Set[int]],
        find_actor: Callable[[str], ray.actor.ActorHandle],
        settings: LinkSettings,
        router_name: str,
        device: torch.device,
    ) -> None:
        """links: filled and emptied from here on. needed: the shards that the router cannot do without now."""
        self._links, self._needed, self._find_actor, self._settings = links, needed, find_actor, settings
        self._router_name, self._device = router_name, device
        self._row_store = None if settings.wire.rows_inline else RowStore(ray.util.get_node_ip_address())
        self._incarnation = secrets.token_hex(4)
        self._generations = itertools.count(1)
        self._changing = threading.Lock()  # of what is kept, and of the table with it
        self._kept: dict[int, _Kept] = {}
        self._were_linked: set[int] = set()
        self._were_loaded: set[int] = set()
        self._began = False

    def want(self, shard_names: Iterable[str]) -> None:
        """Keep a link to each of these shards from now on, and to no other. Does not wait for any."""
        names = {part_number(name): name for name in shard_names}
        with self._changing:
            for shard in [shard for shard in self._kept if shard not in names]:
                self._let_go(shard)
            for shard in [shard for shard in names if shard not in self._kept]:
                kept = self._kept[shard] = _Kept()
                name = names[shard]
                threading.Thread(target=self._keep, args=(shard, name, kept), name=f"keep {name}", daemon=True).start()

    @property
    def never_linked(self) -> frozenset[int]:
        """The needed shards that have not been linked so far; empty for good once it was.

        Nobody waits for those that are drained.
        """
        if not self._began:
            missing = frozenset(self._needed()) - self._were_linked - self._links.draining
            self._began = not missing
            return missing
        return frozenset()

    def wait_until_all_were_loaded(self) -> None:
        """Return once each needed shard that is not drained has had all that it should hold, at least once."""
        bell = self._links.bell
        while True:
            seen = bell.rings
            if self._needed() <= self._were_loaded | self._links.draining:
                return
            bell.wait(seen, JOIN_TIMEOUT_S)

    def _let_go(self, shard: int) -> None:
        """Under the lock. The shard's thread ends by itself, at the latest once its try to join has ended."""
        kept = self._kept.pop(shard)
        kept.is_wanted = False
        self._links.forget(shard)
        self._were_linked.discard(shard)
        self._were_loaded.discard(shard)
        if kept.link is not None:
            kept.link.end()

    def _keep(self, shard: int, shard_name: str, kept: _Kept) -> None:
        """Form the shard's link whenever it is down, for as long as it is wanted."""
        while kept.is_wanted:
            link_name = name_of_link(self._router_name, self._incarnation, shard_name, next(self._generations))
            try:
                self._keep_one(shard, shard_name, link_name, kept)
            except Exception as error:
                # Whatever it was, the shard must not stay unlinked for ever.
                logger.exception("keeping %s failed", link_name)
                self._is_down(shard, kept, repr(error))
                time.sleep(RETRY_S)

    def _keep_one(self, shard: int, shard_name: str, link_name: str, kept: _Kept) -> None:
        """Form a link, and return once it has ended; or once the shard is not wanted any more."""
        link = self._form(shard, shard_name, link_name, kept)
        if link is None:
            return
        logger.info("link %s formed", link_name)
        try:
            if self._is_up(shard, kept, link):
                reason = link.wait_until_down()
                self._is_down(shard, kept, reason, link.down_kind)
        finally:
            link.close()
            self._forget(link_name)

    def _is_up(self, shard: int, kept: _Kept, link: GroupLink) -> bool:
        """Put a new link into the table; False if nobody wants it any more."""
        with self._changing:
            if not kept.is_wanted:
                return False
            kept.link = link
            self._were_linked.add(shard)  # before the table changes, which wakes whoever waits for this
            self._links.replace(shard, link)
            return True

    def _is_down(self, shard: int, kept: _Kept, reason: str, kind: str = "") -> None:
        with self._changing:
            kept.link = None
            if kept.is_wanted:
                self._links.remove(shard, reason, kind)

    def _form(self, shard: int, shard_name: str, link_name: str, kept: _Kept) -> GroupLink | None:
        """Try until it works; meanwhile the table has the reason why it does not. None: it is not wanted any more."""
        while kept.is_wanted:
            try:
                return self._try_to_form(shard, shard_name, link_name, kept)
            except (ConnectionError, ray.exceptions.RayError) as error:
                reason = _short(error)
            except Exception as error:
                logger.exception("forming %s failed", link_name)
                reason = repr(error)
            self._is_down(shard, kept, reason)
            self._forget(link_name)
            time.sleep(RETRY_S)
        return None

    def _forget(self, link_name: str) -> None:
        if self._row_store is not None:
            self._row_store.forget(link_name)

    def _loaded(self, shard: int, kept: _Kept) -> None:
        with self._changing:
            if kept.is_wanted:
                self._were_loaded.add(shard)
                self._links.look_again()

    def _try_to_form(self, shard: int, shard_name: str, link_name: str, kept: _Kept) -> GroupLink:
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
            on_loaded=lambda: self._loaded(shard, kept),
        )


def _short(error: Exception) -> str:
    if isinstance(error, ray.exceptions.RayTaskError):
        return str(error.cause)
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return f"it did not answer within {JOIN_TIMEOUT_S:g} s"
    if isinstance(error, ray.exceptions.RayActorError):
        return "its process is gone; Ray starts it again"
    return str(error)
