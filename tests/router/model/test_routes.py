"""Which shard is asked for which expert, by hand."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from experts.link_table import Use
from experts.placement import Placement
from router.model.replica_choice import ROWS_PER_EXPERT, choose_replicas, work_of
from router.model.routes import LayerRoutes, Routes, best_holders

PLACEMENT = Placement(1, 3, {4: ((2,), (0, 1), (1, 2), (0,))}, {4: (10, 11, 12, 13)})
CPU = torch.device("cpu")
READY = Use.READY
EVERYBODY = {0: READY, 1: READY, 2: READY}


def layer_4(use_of: Mapping[int, Use], counts: list[int], slowness: dict[int, float] | None = None) -> LayerRoutes:
    return Routes(PLACEMENT, use_of, CPU).layer(4, np.array(counts), lambda: slowness or {})


def asked(layer: LayerRoutes) -> list[tuple[int, list[int]]]:
    return [(route.shard, route.experts) for route in layer.shards]


def test_experts_are_ranked_by_shard_then_expert() -> None:
    layer = layer_4({0: READY, 2: READY}, [1, 1, 1, 1])
    assert layer.shards == [(0, slice(0, 2), [1, 3], [11, 13]), (2, slice(2, 4), [0, 2], [10, 12])]
    assert layer.expert_of_rank.tolist() == [1, 3, 0, 2]
    assert layer.rank_E.tolist() == [2, 0, 3, 1]


def test_all_rows_of_an_expert_go_to_the_replica_that_has_least_to_do() -> None:
    assert asked(layer_4(EVERYBODY, [9, 1, 1, 0])) == [(0, [1]), (1, [2]), (2, [0])]
    assert asked(layer_4(EVERYBODY, [0, 1, 1, 90])) == [(0, [3]), (1, [1]), (2, [2])]


def test_a_slow_replica_gets_less() -> None:
    assert asked(layer_4(EVERYBODY, [0, 8, 8, 0])) == [(0, [1]), (1, [2])]
    assert asked(layer_4(EVERYBODY, [0, 8, 8, 0], {1: 30.0})) == [(0, [1]), (2, [2])]


def test_who_is_missing_is_the_first_shard_named() -> None:
    assert asked(layer_4({}, [1, 1, 1, 1])) == [(0, [1, 3]), (1, [2]), (2, [0])]


@pytest.mark.parametrize(
    ("use_of", "best"),
    [
        ({1: Use.LOADING, 2: READY, 3: READY}, [3, 2]),
        ({1: Use.LOADING, 2: Use.DRAINING}, [2]),
        ({1: Use.LOADING}, [1]),
        ({4: READY}, []),
    ],
)
def test_of_the_living_holders_those_of_the_best_use_are_asked(use_of: dict[int, Use], best: list[int]) -> None:
    assert best_holders((3, 1, 2), use_of) == best


def test_an_unloaded_layer_that_needs_no_choice_is_ranked_once() -> None:
    routes = Routes(PLACEMENT, {0: READY, 2: READY}, CPU)
    assert routes.layer(4, np.array([1, 0, 0, 0]), dict) is routes.layer(4, np.array([0, 1, 1, 0]), dict)


def test_reading_an_expert_costs_as_much_as_so_many_rows() -> None:
    assert work_of(2, int(ROWS_PER_EXPERT)) == 3.0
    few, many = {0: 1, 1: 1, 2: 1}, {0: 100, 1: 1, 2: 1}
    everywhere = [[0, 1]] * 3
    assert choose_replicas(few, everywhere, {}) == {0: 0, 1: 1, 2: 0}
    assert choose_replicas(many, everywhere, {}) == {0: 0, 1: 1, 2: 1}  # one expert more is read, and fewer rows
