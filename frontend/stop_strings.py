"""Finds stop strings in a text that comes in pieces, and never lets a part of one out before it is decided.

All strings are looked for at once, one step per character, however they overlap (Aho and Corasick 1975).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Node:
    """What the text's end may be the beginning of: a path from the root spells it.

    fallback: the longest proper ending of that path that is a path, too. stop: the longest stop string that ends here.
    held: length of the longest ending of the path that a stop string goes on from.
    """

    next: dict[str, "_Node"] = field(default_factory=dict)
    fallback: "_Node | None" = None
    stop: str | None = None
    held: int = 0


class StopStrings:
    """Some stop strings, none of them empty; may be shared by any number of matchers."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.root = _Node()
        for stop in stops:
            node = self.root
            for letter in stop:
                node = node.next.setdefault(letter, _Node())
            node.stop = stop
        unfinished = deque((child, letter, self.root, 1) for letter, child in self.root.next.items())
        while unfinished:  # by depth, so that fallbacks, which are shorter, are finished
            node, letter, parent, depth = unfinished.popleft()
            node.fallback = self.root if depth == 1 else self.step(parent.fallback or self.root, letter)
            node.stop = node.stop or node.fallback.stop
            node.held = depth if node.next else node.fallback.held
            unfinished.extend((child, letter, node, depth + 1) for letter, child in node.next.items())

    def step(self, node: _Node, letter: str) -> _Node:
        """Where the text's end is after one more letter."""
        while letter not in node.next and node.fallback is not None:
            node = node.fallback
        return node.next.get(letter, self.root)


class StopMatcher:
    """One text. Whatever pieces it comes in, the same stop string ends it at the same place.

    That is the one complete first; of those complete at the same character, the longest.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._node = stops.root
        self._held = ""

    @property
    def held_chars(self) -> int:
        """Length of what is held back."""
        return len(self._held)

    def push(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """(text that nothing can call back any more, the stop string that `text` completes).

        The text ends before the stop string; nothing may be pushed after it. may_stop: else those that `text`
        completes do not count. What is held back is no longer than it must be: the longest ending that a stop string
        goes on from.
        """
        whole, first_new, node = self._held + text, len(self._held), self._node
        for place, letter in enumerate(text, first_new):
            node = self._stops.step(node, letter)
            if may_stop and node.stop is not None:
                self._held = ""
                return whole[: place + 1 - len(node.stop)], node.stop
        self._node = node
        free = len(whole) - node.held
        self._held = whole[free:]
        return whole[:free], None

    def finish(self) -> str:
        """What was held back, once no text follows."""
        rest, self._held = self._held, ""
        return rest
