"""Finding the names of special tokens in a text."""

import re
from collections.abc import Iterable
from typing import Any

# As deep as a regular expression of names branches. Python's compiler of them is recursive.
_MAX_BRANCHING = 32


def longest_match_pattern(names: Iterable[str]) -> str:
    """A regular expression that matches the longest of `names` at an offset.

    At the beginning of names it branches letter by letter, which takes 0.02 us at every "<|" of a
    text. Trying 2048 names in turn takes 10 us, which is seconds for a hostile text.
    """
    tree: dict[str, Any] = {}
    tails: dict[str, set[str]] = {}
    for name in names:
        node, start = tree, name[:_MAX_BRANCHING]
        for letter in start:
            node = node.setdefault(letter, {})
        if len(start) == _MAX_BRANCHING:
            tails.setdefault(start, set()).add(name[_MAX_BRANCHING:])
        node[""] = {}  # a name ends here

    def pattern(node: dict[str, Any], start: str) -> str:
        if start in tails:  # the rest of long names is tried in turn, longest first
            return f"(?:{'|'.join(re.escape(tail) for tail in sorted(tails[start], key=len, reverse=True))})"
        branches = [re.escape(letter) + pattern(child, start + letter) for letter, child in node.items() if letter]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
        return f"(?:{joined})?" if "" in node else joined

    return pattern(tree, "") or r"(?!)"  # without names, nothing matches
