"""A cable that delays keeps the order; one that loses loses its share; both count."""

import random

from bench.chaos.bad_cable import Cable


def cable(delay_s: float = 0.0, jitter_s: float = 0.0, loss: float = 0.0) -> Cable:
    return Cable(delay_s, jitter_s, loss, random.Random(1))


def test_a_good_cable_passes_frames_at_once_in_order() -> None:
    good = cable()
    for number in (2, 1, 3):
        good.take(bytes([number]), 1, 5.0)
    assert good.due(5.0) == [(1, b"\2"), (1, b"\1"), (1, b"\3")]
    assert (good.delayed, good.lost, good.wait_s(5.0)) == (0, 0, None)


def test_a_late_frame_leaves_after_its_delay() -> None:
    late = cable(delay_s=0.02)
    late.take(b"a", 0, 1.0)
    assert late.due(1.019) == []
    assert abs((late.wait_s(1.01) or 0) - 0.01) < 1e-9
    assert late.due(1.021) == [(0, b"a")]
    assert late.delayed == 1


def test_jitter_keeps_the_order_of_each_way() -> None:
    late = cable(0.01, 0.02)
    for number in range(100):
        late.take(bytes([number]), number % 2, number / 1000)
    left = [late.due(moment / 1000) for moment in range(300)]
    for side in (0, 1):
        frames = [frame[0] for frames in left for out, frame in frames if out == side]
        assert frames == [number for number in range(100) if number % 2 == side]


def test_a_lossy_cable_loses_its_share() -> None:
    lossy = cable(loss=0.1)
    for _ in range(1000):
        lossy.take(b"a", 0, 1.0)
    assert 60 < lossy.lost < 140
    assert len(lossy.due(1.0)) == 1000 - lossy.lost
