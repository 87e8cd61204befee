"""Which of an expert's replicas computes its rows. Pure: no clock, no tensors.

While few rows go to each expert, reading an expert's weights takes longer than computing with them.
So all rows of an expert go to one shard: spread over two, both would read it. (METRO, arXiv
2512.09277, calls this balancing activated experts.)
"""

import math
from collections.abc import Mapping, Sequence

ROWS_PER_EXPERT = 16.0
"""Computing so many rows of an expert takes about as long as reading its weights once."""


def work_of(experts: int, rows: int) -> float:
    """What a message costs a shard: 1 for each expert that is read, and its rows in that unit."""
    return experts + rows / ROWS_PER_EXPERT


def choose_replicas(
    count_of: Mapping[int, int], holders_of: Sequence[Sequence[int]], slowness: Mapping[int, float]
) -> dict[int, int]:
    """expert -> the shard that computes its rows, so that the last shard finishes early.

    count_of: rows of each active expert. holders_of: of each expert, the shards that may be asked
    for it; at least one if it is active. slowness: how many times as long as the fastest a shard
    takes for the same work; 1 if not given.

    Greedy: the experts with fewest holders first, of those the largest, each to the shard that
    would finish first with it. Ties go to the holder named first.

    Example: expert 0 is on shard 0 alone, experts 1 and 2 on both. 0 goes to shard 0, then 1 to
    shard 1, and 2 to whoever has less to do:

    >>> choose_replicas({0: 1, 1: 1, 2: 1}, [[0], [0, 1], [0, 1]], {})
    {0: 0, 1: 1, 2: 0}
    >>> choose_replicas({0: 1, 1: 1, 2: 1}, [[0], [0, 1], [0, 1]], {0: 4.0})
    {0: 0, 1: 1, 2: 1}
    """
    cost: dict[int, float] = {}
    chosen = {}
    for _, less_rows, expert in sorted((len(holders_of[e]), -rows, e) for e, rows in count_of.items()):
        work, least, best = work_of(1, -less_rows), math.inf, -1
        for shard in holders_of[expert]:
            finish = cost.get(shard, 0.0) + work * slowness.get(shard, 1.0)
            if finish < least:
                least, best = finish, shard
        cost[best] = least
        chosen[expert] = best
    return chosen
