"""What a controller wants of its deployment, written into Ray's store before anybody acts on it."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.policy.wanted import Found, Wanted
from cluster.stored_wanted import read_wanted, write_wanted


class Desired:
    """What is wanted now: for any thread. A controller that was started again begins with what was stored."""

    def __init__(self, namespace: str, wanted: Wanted) -> None:
        """wanted: what the deployment began with."""
        self._namespace = namespace
        self._wanted, self._moved = read_wanted(namespace, wanted)
        self.lock = threading.RLock()
        """Held while something is judged and then wanted: one decision at a time."""
        self.changed = threading.Event()
        """Set when something else is wanted; whoever acts on it clears it."""

    @property
    def wanted(self) -> Wanted:
        return self._wanted

    @property
    def moved(self) -> frozenset[str]:
        """The parts that were created outside their bundle of the placement group."""
        return self._moved

    def want(self, wanted: Wanted) -> None:
        with self.lock:
            write_wanted(self._namespace, wanted, self._moved)
            self._wanted = wanted
        self.changed.set()

    def want_unstored(self, wanted: Wanted) -> None:
        """Want what is stored elsewhere, or is to be forgotten by a controller that is started again."""
        with self.lock:
            self._wanted = wanted
        self.changed.set()

    def note_move(self, part: str, *, is_moved: bool) -> None:
        """The part has been created: outside its bundle, or in it."""
        if is_moved != (part in self._moved):
            with self.lock:
                moved = self._moved ^ {part}
                write_wanted(self._namespace, self._wanted, moved)
                self._moved = moved


@dataclass(frozen=True)
class View:
    """What was found at one look, and what was wanted then. problems: actions that failed, by part."""

    wanted: Wanted
    found: Mapping[str, Found] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
