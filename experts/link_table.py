"""A router's links, by shard: formed and lost by whoever keeps them, used by its dispatcher."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum

from experts.bell import Bell, ThreadBell
from experts.errors import LinkDown
from experts.link import Link

NOT_LINKED = "not linked yet"


class Use(IntEnum):
    """How gladly a shard is asked. Of the shards that hold an expert, the first kind here is asked.

    READY: it holds all that it should. DRAINING: it is to go soon. LOADING: it answers, but may
    have to read an expert first.
    """

    READY = 0
    DRAINING = 1
    LOADING = 2


class LinkTable:
    """shard -> link, for the shards that have one; for the others, why not.

    Any thread may change it, and any may read it. Reading takes no lock: a change replaces the
    mappings as a whole.
    """

    def __init__(
        self,
        links: Mapping[int, Link] | None = None,
        bell: Bell | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """bell: rung at each change; replies over these links should ring it, too."""
        self.bell = bell or ThreadBell()
        self._clock, self._began_s = clock, clock()
        self._down_since_s: dict[int, float] = {}
        self._changing = threading.Lock()
        self._links: Mapping[int, Link] = {}
        self._reasons: dict[int, str] = {}
        self.draining: frozenset[int] = frozenset()
        """The shards that are to go soon, or have gone for good."""
        self.use_of: Mapping[int, Use] = {}
        """The shards that can be asked, and how gladly; the same object until that changes."""
        self.losses: Counter[str] = Counter()
        """How many links were lost, by kind (Endpoint.down_kind)."""
        with self._changing:
            self._set(dict(links or {}))

    def link(self, shard: int) -> Link:
        """The shard's link. Raises LinkDown, with the reason, if it has none."""
        link = self._links.get(shard)
        if link is None:
            raise LinkDown(self._reasons.get(shard, NOT_LINKED))
        return link

    def down_reason(self, shard: int) -> str | None:
        """None while the shard can be reached; else why it cannot, for messages to users."""
        link = self._links.get(shard)
        return self._reasons.get(shard, NOT_LINKED) if link is None else link.down_reason

    def down_since_s(self, shard: int) -> float | None:
        """Since when the shard has had no link, by the table's clock; None: it has one."""
        return None if shard in self._links else self._down_since_s.get(shard, self._began_s)

    def replace(self, shard: int, link: Link) -> None:
        """Reach the shard by `link` from now on, whether it had another or none.

        The old one is not closed.
        """
        with self._changing:
            self._set({**self._links, shard: link})

    def remove(self, shard: int, reason: str, kind: str = "") -> None:
        """The shard has no link any more, or still has none, for this reason.

        kind: counted in `losses` if it had one.
        """
        with self._changing:
            self._reasons[shard] = reason  # before the link goes: then there is always a link or its reason
            if shard in self._links:
                self.losses[kind] += 1
                self._down_since_s[shard] = self._clock()
                self._set({other: link for other, link in self._links.items() if other != shard})

    def forget(self, shard: int) -> None:
        """The shard is no longer to be linked. That is no loss, and leaves nothing."""
        with self._changing:
            self._reasons.pop(shard, None)
            self._down_since_s.pop(shard, None)
            self._set({other: link for other, link in self._links.items() if other != shard})

    def drain(self, shards: Iterable[int]) -> None:
        """Ask these shards, and only these, for nothing that others hold, too."""
        with self._changing:
            self.draining = frozenset(shards)
            self._set(self._links)

    def look_again(self) -> None:
        """A link says something else of itself than before: see Link.is_loaded."""
        with self._changing:
            self._set(self._links)

    def _set(self, links: Mapping[int, Link]) -> None:
        self._links = links
        use_of = {shard: self._use(shard, link) for shard, link in links.items()}
        if use_of != self.use_of:
            self.use_of = use_of
        self.bell.ring()

    def _use(self, shard: int, link: Link) -> Use:
        if not link.is_loaded:
            return Use.LOADING
        return Use.DRAINING if shard in self.draining else Use.READY
