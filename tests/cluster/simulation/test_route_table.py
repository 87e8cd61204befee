"""The arrays choose what a router chooses."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.simulation.route_table import RouteTable
from experts.placement import even_placement, uniform_placement
from router.model.replica_choice import choose_replicas

EXPERTS, SHARDS = 12, 4
HOLDERS = st.lists(st.integers(0, SHARDS - 1), min_size=1, max_size=SHARDS, unique=True).map(tuple)
LAYER = st.lists(HOLDERS, min_size=EXPERTS, max_size=EXPERTS).map(tuple)
ROWS = st.lists(st.integers(0, 40), min_size=EXPERTS, max_size=EXPERTS)


@settings(deadline=None, max_examples=50)  # a busy machine takes long over any of them
@given(layers=st.lists(st.tuples(LAYER, ROWS), min_size=1, max_size=3))
def test_the_shards_work_is_that_of_choose_replicas(
    layers: list[tuple[tuple[tuple[int, ...], ...], list[int]]],
) -> None:
    placement = uniform_placement(SHARDS, dict(enumerate(holders for holders, _ in layers)))
    rows_LE = np.array([rows for _, rows in layers], np.int64)
    work = RouteTable(placement, set(range(SHARDS)), SHARDS).share_out(rows_LE)
    for layer, (holders, rows) in enumerate(layers):
        chosen = choose_replicas({expert: count for expert, count in enumerate(rows) if count}, holders, {})
        experts_S = np.bincount(list(chosen.values()), minlength=SHARDS)
        rows_S = [sum(rows[expert] for expert, shard in chosen.items() if shard == each) for each in range(SHARDS)]
        assert work.experts_LS[layer].tolist() == experts_S.tolist()
        assert work.rows_LS[layer].tolist() == rows_S


def test_an_expert_is_away_if_its_last_holder_is() -> None:
    table = RouteTable(even_placement([0], 4, 2), {1}, 2)
    assert table.is_away(np.array([[1, 0, 0, 0]]))
    assert not table.is_away(np.array([[0, 0, 1, 2]]))
    assert table.share_out(np.array([[0, 0, 1, 2]])).rows_LS.tolist() == [[0, 3]]


@pytest.mark.parametrize("living", [{0, 1}, {1}])
def test_living_replicas_stand_in(living: set[int]) -> None:
    table = RouteTable(even_placement([0], 4, 2, replicas=2), living, 2)
    work = table.share_out(np.array([[4, 3, 2, 1]]))
    assert work.rows_LS.sum() == 10
    assert (work.rows_LS[0] > 0).nonzero()[0].tolist() == sorted(living)
