"""Finds stop strings in streamed text, and holds back what may be the beginning of one.

All strings are looked for at once, one step per character, however they overlap: the automaton of
Aho and Corasick (1975).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class _Node:
    """A node of the trie of all stop strings.

    The path from the root spells a beginning of one of them.

    fallback: the node of the path's longest proper suffix that is in the trie ("failure link").
    stop: the longest stop string that is a suffix of the path.
    held: length of the longest suffix of the path that a stop string continues.
    """

    next: dict[str, "_Node"] = field(default_factory=dict)
    fallback: "_Node | None" = None
    stop: str | None = None
    held: int = 0


class StopStrings:
    """The automaton of some stop strings, none of them empty; any number of matchers may share it."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.root = _Node()
        for stop in stops:
            node = self.root
            for letter in stop:
                node = node.next.setdefault(letter, _Node())
            node.stop = stop
        # Breadth first: a node's fallback is nearer to the root, and therefore finished before the
        # node.
        unfinished = deque((child, letter, self.root, 1) for letter, child in self.root.next.items())
        while unfinished:
            node, letter, parent, depth = unfinished.popleft()
            node.fallback = self.root if depth == 1 else self.next_node(parent.fallback or self.root, letter)
            node.stop = node.stop or node.fallback.stop
            node.held = depth if node.next else node.fallback.held
            unfinished.extend((child, letter, node, depth + 1) for letter, child in node.next.items())

    def next_node(self, node: _Node, letter: str) -> _Node:
        """The automaton's transition from `node` by one letter."""
        while letter not in node.next and node.fallback is not None:
            node = node.fallback
        return node.next.get(letter, self.root)


class StopMatcher:
    """Reads one text in pieces. The result does not depend on where the text is cut.

    The stop string that is complete first ends the text; of those complete at the same character,
    the longest.
    """

    def __init__(self, stops: StopStrings) -> None:
        self._stops = stops
        self._node = stops.root
        self._held = ""

    @property
    def held_chars(self) -> int:
        """Length of the text that is held back."""
        return len(self._held)

    def match(self, text: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Read the next piece: (text that no stop string can take back, the stop string that `text` completes).

        The returned text ends before the stop string, and no piece may follow one. may_stop: if
        false, stop strings that `text` completes do not count. Held back is the longest suffix
        that a stop string continues, no more.
        """
        whole, first_new, node = self._held + text, len(self._held), self._node
        for position, letter in enumerate(text, first_new):
            node = self._stops.next_node(node, letter)
            if may_stop and node.stop is not None:
                self._held = ""
                return whole[: position + 1 - len(node.stop)], node.stop
        self._node = node
        free = len(whole) - node.held
        self._held = whole[free:]
        return whole[:free], None

    def flush(self) -> str:
        """The text that is held back, once no piece follows."""
        rest, self._held = self._held, ""
        return rest
