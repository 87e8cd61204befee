"""Tokens to shards and back: the sum over each token's experts, wherever those are."""

from collections.abc import Mapping

import pytest
import torch

from experts.link import LocalLink
from experts.link_table import NOT_LINKED, LinkTable, Use
from experts.placement import Placement, even_placement, uniform_placement
from router.model.dispatch import Dispatcher, TokensFailed
from router.model.routes import Routes
from tests.experts.ends import taken
from tests.router.model.clusters import (
    DEAD,
    EXPERTS,
    HIDDEN,
    LAYER,
    OTHER_LAYER,
    Cluster,
    DownLink,
    assert_plain,
    choose,
    even,
    make_dispatcher,
    make_shard,
    random,
    run,
    scores_for,
)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_every_token_gets_the_sum_of_its_experts(tokens: int, top_k: int, num_shards: int) -> None:
    dispatcher, _ = make_dispatcher(even(num_shards))
    assert_plain(dispatcher, choose(tokens, top_k))


@pytest.mark.parametrize("layer", [LAYER, OTHER_LAYER])
def test_each_layer_has_experts_of_its_own(layer: int) -> None:
    dispatcher, _ = make_dispatcher(even(2))
    assert_plain(dispatcher, choose(9, 1), layer)


@pytest.mark.parametrize("expert", [0, 4, EXPERTS - 1])
def test_all_tokens_may_choose_one_expert(expert: int) -> None:
    dispatcher, _ = make_dispatcher(even(3))
    assert_plain(dispatcher, torch.full((20, 1), expert))


SCATTERED = {
    "interleaved": uniform_placement(3, {LAYER: tuple((expert % 3,) for expert in range(EXPERTS))}),
    "backwards": uniform_placement(4, {LAYER: tuple((3 - expert // 2,) for expert in range(EXPERTS))}),
    "one shard without experts": uniform_placement(3, {LAYER: tuple((2 * (expert % 2),) for expert in range(EXPERTS))}),
    "layers placed differently": uniform_placement(
        2,
        {
            LAYER: tuple((expert % 2,) for expert in range(EXPERTS)),
            OTHER_LAYER: tuple((int(expert < 3),) for expert in range(EXPERTS)),
        },
    ),
    "replicated": uniform_placement(2, {LAYER: tuple((expert % 2, 1 - expert % 2) for expert in range(EXPERTS))}),
}


@pytest.mark.parametrize("placement", SCATTERED.values(), ids=SCATTERED)
@pytest.mark.parametrize("top_k", [1, 2])
def test_a_shards_experts_need_not_lie_together(placement: Placement, top_k: int) -> None:
    dispatcher, _ = make_dispatcher(placement)
    for layer in placement.shards_of:
        assert_plain(dispatcher, choose(30, top_k), layer)


def test_a_shard_gets_one_message_with_its_rows_sorted_by_expert() -> None:
    placement = SCATTERED["interleaved"]
    dispatcher, links = make_dispatcher(placement)
    run(dispatcher, random(4, HIDDEN), torch.tensor([[6], [1], [0], [6]]))
    carried = [[(rows.experts, rows.counts) for rows in link.carried] for link in links]
    assert carried == [[([0, 6], [1, 2])], [([1], [1])], []]


def test_rows_of_one_expert_keep_the_order_of_their_tokens() -> None:
    dispatcher, [link] = make_dispatcher(even(1))
    x_TD = random(3, HIDDEN)
    dispatcher.dispatch(LAYER, x_TD, torch.tensor([[2], [0], [2]]), torch.ones(3, 1))
    assert torch.equal(link.carried[0].x_ND, x_TD[[1, 0, 2]])


def test_rows_travel_with_their_scores_applied() -> None:
    dispatcher, [link] = make_dispatcher(even(1))
    x_TD = random(1, HIDDEN)
    dispatcher.dispatch(LAYER, x_TD, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]))
    assert torch.equal(link.carried[0].x_ND, torch.cat([x_TD * 0.5, x_TD * 0.25]))


def test_messages_name_the_layer_and_the_version_of_each_experts_weights() -> None:
    shards_of = {LAYER: ((1,), (0,), (1,), (0,))}
    cluster = Cluster(Placement(7, 2, shards_of, {LAYER: (10, 11, 12, 13)}))
    run(cluster.dispatcher, random(3, HIDDEN), torch.tensor([[3], [0], [1]]))
    carried = [[(rows.layer, rows.experts, rows.versions) for rows in link.carried] for link in cluster.links]
    assert carried == [[(LAYER, [1, 3], [11, 13])], [(LAYER, [0], [10])]]


def test_rows_keep_the_models_dtype() -> None:
    dispatcher, [link] = make_dispatcher(even(1))
    x_TD = random(2, HIDDEN).bfloat16()
    with pytest.raises(RuntimeError):  # the shard here has float32 weights
        dispatcher.dispatch(LAYER, x_TD, torch.tensor([[0], [1]]), torch.ones(2, 1, dtype=torch.bfloat16))
    assert link.carried[0].x_ND.dtype is torch.bfloat16


@pytest.mark.parametrize("takes_rows", [False, True], ids=["before it took the rows", "afterwards"])
def test_a_shard_that_died_is_named(takes_rows: bool) -> None:
    cluster = Cluster(even(2))
    cluster.table.replace(1, DownLink(takes_rows))
    with pytest.raises(TokensFailed, match=f"^expert shard 1: {DEAD}$"):
        run(cluster.dispatcher, random(2, HIDDEN), torch.tensor([[0], [7]]))


def test_a_shard_without_a_link_is_named() -> None:
    cluster = Cluster(even(2))
    cluster.table.remove(1, "its process is gone")
    with pytest.raises(TokensFailed, match=r"^expert shard 1: its process is gone$"):
        run(cluster.dispatcher, random(2, HIDDEN), torch.tensor([[0], [7]]))


def test_a_shard_that_refuses_is_named() -> None:
    cluster = Cluster(even(2))
    cluster.table.replace(1, LocalLink(make_shard(even_placement([LAYER], EXPERTS, 2, version=2), 1)))
    message = r"shard 1: \(layer, expert\) \(3, 7\) is held at version 2, not at version 1"
    with pytest.raises(TokensFailed, match=message):
        run(cluster.dispatcher, random(2, HIDDEN), torch.tensor([[0], [7]]))


def test_a_dead_shard_that_no_token_needs_is_not_missed() -> None:
    cluster = Cluster(even(2))
    cluster.table.replace(1, DownLink())
    assert_plain(cluster.dispatcher, choose(10, 2, among=range(4)))


def test_a_replaced_link_is_used_at_once() -> None:
    cluster = Cluster(even(2))
    cluster.table.replace(1, DownLink())
    assert cluster.dispatcher.down_reasons() == {1: DEAD}
    cluster.table.replace(1, cluster.links[1])
    assert cluster.dispatcher.down_reasons() == {}
    assert_plain(cluster.dispatcher, choose(10, 1))


def test_a_shard_that_was_never_linked_is_down() -> None:
    dispatcher = Dispatcher(even(2), LinkTable())
    assert dispatcher.down_reasons() == {0: NOT_LINKED, 1: NOT_LINKED}
    with pytest.raises(TokensFailed, match="expert shard 0: not linked yet"):
        run(dispatcher, random(2, HIDDEN), torch.tensor([[0], [7]]))


def test_once_a_shard_is_removed_its_replica_is_asked_and_it_again_once_it_is_back() -> None:
    cluster = Cluster(uniform_placement(2, {LAYER: ((0, 1),) * EXPERTS}))
    cluster.table.remove(0, DEAD)
    assert_plain(cluster.dispatcher, choose(6, 1))
    assert cluster.carried == [0, 6]
    cluster.table.replace(0, cluster.links[0])
    cluster.table.remove(1, DEAD)
    assert_plain(cluster.dispatcher, choose(7, 1))
    assert cluster.carried == [7, 6]


def test_routes_are_built_when_who_is_alive_changes_and_never_for_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[set[int]] = []

    def counted(placement: Placement, use_of: Mapping[int, Use], device: torch.device) -> Routes:
        built.append(set(use_of))
        return Routes(placement, use_of, device)

    monkeypatch.setattr("router.model.dispatch.Routes", counted)
    cluster = Cluster(even(2))
    for _ in range(3):
        assert_plain(cluster.dispatcher, choose(4, 1, among=range(4)))
    cluster.table.replace(1, cluster.links[1])
    cluster.table.remove(1, DEAD)
    cluster.table.remove(1, "still away")
    for _ in range(3):
        assert_plain(cluster.dispatcher, choose(4, 1, among=range(4)))
    assert built == [{0, 1}, {0}]


# What a handle keeps.


def test_a_handles_parts_cover_the_sorted_rows_and_can_be_sent_again() -> None:
    cluster = Cluster(even(3))
    x_TD, expert_TA = random(20, HIDDEN), choose(20, 2)
    handle = cluster.dispatcher.dispatch(LAYER, x_TD, expert_TA, scores_for(expert_TA))
    assert [part.shard for part in handle.parts] == [0, 1, 2]
    assert torch.cat([part.rows_N for part in handle.parts]).tolist() == [*range(40)]
    for part in handle.parts:
        elsewhere = LocalLink(make_shard(even(1), 0))
        assert part.reply is not None
        assert torch.equal(taken(elsewhere.request(part.message)), taken(part.reply))


# What it counts.


def test_tokens_are_counted_by_expert_and_rows_by_shard_wherever_the_experts_are() -> None:
    by_expert = ((1,), (0,), (2,), (1,), (0,), (2,), (2,), (0,))
    cluster = Cluster(uniform_placement(3, {LAYER: by_expert, OTHER_LAYER: by_expert[::-1]}))
    dispatcher = cluster.dispatcher
    expert_TA = torch.tensor([[7, 0], [7, 3], [7, 1], [2, 0]])
    x_TD = random(4, HIDDEN)
    for _ in range(2):
        dispatcher.combine(dispatcher.dispatch(OTHER_LAYER, x_TD, expert_TA, torch.ones(4, 2)))
    dispatcher.load.end_step()
    assert dispatcher.load.layers == (LAYER, OTHER_LAYER)
    assert dispatcher.load.tokens_LE.tolist() == [[0] * EXPERTS, [4, 2, 2, 2, 0, 0, 0, 6]]
    assert dispatcher.asker.rows_of_shard == dict(enumerate(cluster.carried))
