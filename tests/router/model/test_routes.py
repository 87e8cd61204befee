"""Which shard is asked for which expert, by hand."""

import torch

from experts.placement import Placement
from router.model.routes import Routes

PLACEMENT = Placement(1, 3, {4: ((2,), (0, 1), (1, 2), (0,))}, {4: (10, 11, 12, 13)})
CPU = torch.device("cpu")
EVERYBODY = frozenset({0, 1, 2})


def test_experts_are_ranked_by_shard_then_expert() -> None:
    layer = Routes(PLACEMENT, EVERYBODY, CPU).layers[4]
    assert layer.shards == [
        (0, slice(0, 2), [1, 3], [11, 13]),
        (1, slice(2, 3), [2], [12]),
        (2, slice(3, 4), [0], [10]),
    ]
    assert layer.num_ranks == 4
    assert layer.rank_E.tolist() == layer.rank_of_expert.tolist() == [3, 0, 2, 1]


def test_an_experts_first_living_shard_is_asked() -> None:
    layer = Routes(PLACEMENT, frozenset({1, 2}), CPU).layers[4]
    assert [(asked.shard, asked.experts) for asked in layer.shards] == [(0, [3]), (1, [1, 2]), (2, [0])]


def test_who_is_missing_is_the_first_shard_named() -> None:
    layer = Routes(PLACEMENT, frozenset(), CPU).layers[4]
    assert [(asked.shard, asked.experts) for asked in layer.shards] == [(0, [1, 3]), (1, [2]), (2, [0])]
