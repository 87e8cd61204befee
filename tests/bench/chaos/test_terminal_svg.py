"""Frames become one picture: each line once, for as long as it stays, and safe as XML."""

from xml.etree import ElementTree

from bench.chaos.terminal_svg import changes, svg

FRAMES = [(10.0, ["$ chat", ""]), (10.1, ["$ chat  ", ""]), (10.5, ["$ chat", "a < b & c"]), (11.5, ["$ chat", "gone"])]


def test_frames_that_look_alike_are_one() -> None:
    assert [at_s for at_s, _ in changes(FRAMES)] == [10.0, 10.5, 11.5]


def test_each_line_is_drawn_once_and_shown_in_its_time() -> None:
    picture = svg(FRAMES, 40, 2, highlight="gone")
    texts = [text.text for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert texts == ["$ chat", "a < b & c", "gone"]
    assert picture.count("@keyframes") == 2  # what always shows is not animated
    assert "14.29%, 42.86% { visibility: visible }" in picture  # from 0.5 s to 1.5 s of 3.5 s
