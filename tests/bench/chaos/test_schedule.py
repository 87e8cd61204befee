"""The schedule: the same faults for the same seed, enough of them, and each at a point that its target passes."""

import pytest

from bench.chaos.schedule import (
    ALLOWED,
    AT_RANDOM,
    COMPOSABLE,
    FAULTS_PER_MODE,
    MODES,
    ROUTER_POINTS,
    SHARD_POINTS,
    SHARD_TARGETS,
    TARGETS,
    minority,
    schedule,
)


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_faults_and_another_seed_others(mode: str) -> None:
    assert schedule(3, mode) == schedule(3, mode)
    assert schedule(3, mode) != schedule(4, mode)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_nine_faults_and_three_for_each_target(mode: str) -> None:
    faults = schedule(1, mode)
    assert len(faults) >= FAULTS_PER_MODE
    for target in MODES[mode].targets:
        assert sum(fault.target == target for fault in faults) >= 3


def test_targets_are_known() -> None:
    for mode in MODES.values():
        assert set(mode.targets) <= set(TARGETS)
    for mode, targets in ALLOWED.items():
        assert set(MODES[mode].targets) <= set(targets) <= set(TARGETS)
    for mode, targets in COMPOSABLE.items():
        assert mode in MODES
        assert set(targets) <= set(TARGETS)


def test_as_many_cycles_as_asked() -> None:
    assert len(schedule(1, "crash", ["shard", "router"], cycles=1)) == 2
    assert len(schedule(1, "random", cycles=100)) == 100


@pytest.mark.parametrize(("target", "points"), [*((t, SHARD_POINTS) for t in SHARD_TARGETS), ("router", ROUTER_POINTS)])
def test_a_crash_comes_to_every_point_of_its_target_in_time(target: str, points: tuple[str, ...]) -> None:
    faults = schedule(1, "crash", [target], cycles=len(points))
    assert {fault.parts[0].point for fault in faults} == set(points)


def test_without_points_all_comes_at_random() -> None:
    faults = schedule(1, "crash", cycles=20, points=False)
    assert {part.point for fault in faults for part in fault.parts} == {AT_RANDOM}


def test_a_composed_fault_has_two_modes_and_lasts_as_long_as_the_longer() -> None:
    for fault in schedule(1, "random", cycles=50):
        first, second = fault.parts
        assert first.mode != second.mode
        assert fault.hold_s == max(hold for part in fault.parts if (hold := MODES[part.mode].hold_s) is not None)


def test_a_minority_leaves_every_expert_a_shard_where_it_can() -> None:
    neighbours = [frozenset({shard, (shard + 1) % 5}) for shard in range(5)]
    for step in range(100):
        group = minority(5, neighbours, step / 100)
        assert len(group) == 2
        assert not any(shards <= set(group) for shards in neighbours)


def test_without_replicas_a_minority_is_what_it_is() -> None:
    assert len(minority(5, [frozenset({shard}) for shard in range(5)], 0.5)) == 2
    assert minority(1, [frozenset({0})], 0.5) == [0]


def test_a_cycle_of_resizes_ends_as_it_began_and_only_comes_when_asked_for() -> None:
    faults = schedule(1, "resize", cycles=2)
    assert [(fault.target, fault.parts[0].point) for fault in faults] == 2 * [
        ("shards", "4"),
        ("routers", "2"),
        ("shards", "3"),
        ("routers", "1"),
        ("shards", "2"),
    ]
    assert [mode for mode in MODES if not MODES[mode].by_default] == ["resize"]
