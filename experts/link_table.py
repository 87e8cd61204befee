"""A router's links, by shard: formed and lost by whoever keeps them, used by its dispatcher."""

import threading
import time
from collections.abc import Mapping

from experts.errors import LinkDown
from experts.link import Link

NOT_LINKED = "not linked yet"


class LinkTable:
    """shard -> link, for the shards that have one; for the others, why not.

    Any thread may change it, and any may read it. Reading takes no lock: a change replaces the
    mapping as a whole.
    """

    def __init__(self, links: Mapping[int, Link] | None = None) -> None:
        self._changed = threading.Condition()
        self._links: Mapping[int, Link] = dict(links or {})
        self._reasons: dict[int, str] = {}
        self.alive = frozenset(self._links)
        """The shards that have a link; the same object until that set changes."""
        self.num_changes = 0
        """How often a link was put in place or taken away."""

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

    def replace(self, shard: int, link: Link) -> None:
        """Reach the shard by `link` from now on, whether it had another or none.

        The old one is not closed.
        """
        with self._changed:
            self._set({**self._links, shard: link})

    def remove(self, shard: int, reason: str) -> None:
        """The shard has no link any more, or still has none, for this reason."""
        with self._changed:
            self._reasons[shard] = reason  # before the link goes: then there is always a link or its reason
            if shard in self._links:
                self._set({other: link for other, link in self._links.items() if other != shard})

    def wait_for_change(self, seen: int, deadline_s: float) -> bool:
        """Return once num_changes is no longer `seen`; False if time.monotonic reaches deadline_s before.

        Read num_changes first, then look whether a wait is needed, then wait: no change can be
        missed.
        """
        with self._changed:
            return self._changed.wait_for(lambda: self.num_changes != seen, max(0.0, deadline_s - time.monotonic()))

    def _set(self, links: Mapping[int, Link]) -> None:
        self._links = links
        if links.keys() != self.alive:
            self.alive = frozenset(links)
        self.num_changes += 1
        self._changed.notify_all()
