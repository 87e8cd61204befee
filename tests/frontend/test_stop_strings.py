"""Stop strings are found wherever they are, and no part of one gets out before; however the text is cut."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontend.stop_strings import StopMatcher, StopStrings

# Two letters make overlaps, repetitions and strings within strings likely.
letters = st.text("ab", max_size=12)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=5), max_size=4)


def ended(text: str, stops: list[str], first_end: int = 0) -> tuple[str, str | None]:
    """The oracle: (text before the stop string, that string). first_end: no stop string may end before."""
    for end in range(max(first_end, 1), len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


def longest_beginning(text: str, stops: list[str]) -> int:
    """Length of the longest ending of `text` that a stop string goes on from."""
    return max(
        (n for n in range(len(text) + 1) if any(s.startswith(text[len(text) - n :]) and len(s) > n for s in stops)),
        default=0,
    )


@settings(max_examples=500, deadline=None)
@given(pieces=st.lists(letters, max_size=6), stops=stop_lists)
def test_the_text_ends_before_the_first_stop_string_however_it_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, out, seen, match = StopMatcher(StopStrings(stops)), "", "", None
    for piece in pieces:
        seen += piece
        certain, match = matcher.match(piece)
        out += certain
        if match is not None:
            break
        # Exactly what could begin a stop string is held back: no less, or a part gets out, and no more.
        assert out == seen[: len(seen) - longest_beginning(seen, stops)]
        assert matcher.held_chars == len(seen) - len(out)
    if match is None:
        out += matcher.flush()
    assert (out, match) == ended("".join(pieces), stops)


@pytest.mark.parametrize("stops", [["abab"], ["b", "ab"], ["aab", "ba"], ["abb", "bb", "b"], ["aaa", "ab"]], ids=str)
def test_every_way_to_cut_a_text_ends_it_at_the_same_place(stops: list[str]) -> None:
    text = "aabaabbababb"
    for cuts in range(2 ** (len(text) - 1)):
        matcher, out, start = StopMatcher(StopStrings(stops)), "", 0
        for end in range(1, len(text) + 1):
            if end == len(text) or cuts >> (end - 1) & 1:
                certain, match = matcher.match(text[start:end])
                out, start = out + certain, end
                if match is not None:
                    break
        else:
            out += matcher.flush()
        assert (out, match) == ended(text, stops)


@settings(max_examples=300, deadline=None)
@given(early=letters, late=letters, stops=stop_lists)
def test_what_ends_before_it_may_does_not_count(early: str, late: str, stops: list[str]) -> None:
    """A stop string that ends in the late part counts, though it may have begun in the early one."""
    matcher = StopMatcher(StopStrings(stops))
    first, nothing = matcher.match(early, may_stop=False)
    assert first == early[: len(early) - longest_beginning(early, stops)]
    second, match = matcher.match(late)
    assert nothing is None
    rest = "" if match else matcher.flush()
    assert (first + second + rest, match) == ended(early + late, stops, first_end=len(early) + 1)


def test_of_two_that_end_together_the_longer_one_counts() -> None:
    assert StopMatcher(StopStrings(["\n", "\n\n"])).match("a\n\n") == ("a", "\n")
    assert StopMatcher(StopStrings(["end", "The end"])).match("So. The end.") == ("So. ", "The end")


def test_without_stop_strings_nothing_is_held_back() -> None:
    matcher = StopMatcher(StopStrings([]))
    assert [matcher.match(piece) for piece in ("a", "", "bc")] == [("a", None), ("", None), ("bc", None)]


def test_hostile_texts_cost_no_more_than_others() -> None:
    """Almost the whole stop string again and again must not be compared again and again, 256 letters for each one."""
    stops = StopStrings(["a" * 255 + "b"])

    def seconds(text: str) -> float:
        matcher, began_s = StopMatcher(stops), time.process_time()
        for place in range(0, len(text), 8):
            matcher.match(text[place : place + 8])
        return time.process_time() - began_s

    seconds("x" * 1000)
    assert seconds("a" * 40_000) < 30 * seconds("x" * 40_000)
