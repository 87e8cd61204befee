"""How long whoever serves waits for Ray's head."""

import pytest

from checkpoint.errors import DroverError
from cluster.head_watch import HEAD_RETURNS_S, HeadWatch


class Ray:
    """Says what is wrong with it, and what time it is."""

    def __init__(self) -> None:
        self.fault: str | None = None
        self.now_s = 0.0

    def watch(self, *, is_local: bool) -> HeadWatch:
        return HeadWatch(is_local, lambda: self.fault, lambda: self.now_s)


def test_a_head_that_comes_back_in_time_is_told_of_once() -> None:
    ray = Ray()
    watch = ray.watch(is_local=False)
    assert watch.look() is None
    for _ in range(2):
        ray.fault = "Ray's head does not answer any more"
        told = watch.look()
        assert told is not None
        assert told.startswith("Ray's head does not answer any more; streams go on")
        ray.now_s += HEAD_RETURNS_S
        assert watch.look() == ""
        ray.fault = None
        assert watch.look() is None


def test_a_head_that_stays_away_ends_the_serving() -> None:
    ray = Ray()
    watch = ray.watch(is_local=False)
    ray.fault = "Ray's head does not answer any more"
    watch.look()
    ray.now_s += HEAD_RETURNS_S + 1
    with pytest.raises(DroverError, match="does not answer any more"):
        watch.look()


def test_a_ray_of_ones_own_does_not_come_back() -> None:
    ray = Ray()
    ray.fault = "Ray's raylet died"
    with pytest.raises(DroverError, match="raylet died"):
        ray.watch(is_local=True).look()
