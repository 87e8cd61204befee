"""A shard reads its own experts and nothing else, and refuses what it does not hold."""

from collections.abc import Sequence

import pytest
import torch

from checkpoint.layout import TensorNames
from checkpoint.tensors import Checkpoint
from experts.errors import NotHeld
from experts.link import ExpertRows, LocalLink
from experts.placement import even_placement, uniform_placement
from experts.shard import ExpertShard, load_shard, shard_bytes
from kernels.choose import choose_kernels
from kernels.grouped_mlp import grouped_mlp_reference
from tests.experts.ends import taken
from tests.reference import make_reference

CPU = torch.device("cpu")
KERNELS = choose_kernels(CPU, torch.float32, 1)
VERSION = 3
HELD = dict.fromkeys([(1, 0), (1, 3), (3, 2), (7, 0), (7, 1), (7, 2), (7, 3)], VERSION)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_reference(tmp_path_factory.mktemp("maverick"), "maverick-4-experts").directory)


@pytest.fixture
def checkpoint(directory: str) -> Checkpoint:
    """Opened anew, so that nothing is read yet."""
    return Checkpoint.open(directory)


@pytest.fixture(scope="module")
def shard(directory: str) -> ExpertShard:
    return load_shard(Checkpoint.open(directory), HELD, KERNELS)


def rows(checkpoint: Checkpoint, count: int) -> torch.Tensor:
    return torch.randn(count, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(0))


def one_experts_bytes(checkpoint: Checkpoint) -> int:
    config = checkpoint.config
    return 3 * config.hidden_size * config.intermediate_size * torch.float32.itemsize


def test_exactly_its_experts_bytes_are_read(checkpoint: Checkpoint) -> None:
    load_shard(checkpoint, HELD, choose_kernels(CPU, torch.bfloat16, 1))
    assert checkpoint.bytes_read == 7 * one_experts_bytes(checkpoint)


def test_progress_ends_where_it_was_expected_to(checkpoint: Checkpoint) -> None:
    pieces: list[int] = []
    load_shard(checkpoint, HELD, KERNELS, pieces.append)
    assert sum(pieces) == shard_bytes(checkpoint, HELD) == 7 * one_experts_bytes(checkpoint)


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_all_shards_together_read_every_expert_once(checkpoint: Checkpoint, num_shards: int) -> None:
    config = checkpoint.config
    placement = even_placement(config.moe_layers, config.num_experts, num_shards)
    slots = [
        slot
        for number in range(num_shards)
        for slot in load_shard(checkpoint, placement.slots_of(number), KERNELS).slots.versions()
    ]
    assert sorted(slots) == [(layer, expert) for layer in config.moe_layers for expert in range(config.num_experts)]
    assert checkpoint.bytes_read == len(slots) * one_experts_bytes(checkpoint)


def test_a_shard_tells_what_it_holds(shard: ExpertShard) -> None:
    assert shard.slots.versions() == HELD
    assert len(shard.slots) == 7


@pytest.mark.parametrize(
    ("layer", "experts", "counts"),
    [(1, [0, 3], [2, 1]), (1, [3], [4]), (3, [2], [1]), (7, [0, 1, 2, 3], [1, 5, 0, 2]), (7, [2, 0], [1, 1])],
)
def test_rows_are_computed_with_the_checkpoints_weights(
    shard: ExpertShard, checkpoint: Checkpoint, layer: int, experts: Sequence[int], counts: Sequence[int]
) -> None:
    names, x_ND = TensorNames(checkpoint.config), rows(checkpoint, sum(counts))
    weights = [checkpoint.read(name, torch.float32) for name in (names.expert_gate_up(layer), names.expert_down(layer))]
    expert_N = torch.tensor(experts).repeat_interleave(torch.tensor(counts))
    y_ND = shard.compute(layer, experts, [VERSION] * len(experts), counts, x_ND)
    torch.testing.assert_close(y_ND, grouped_mlp_reference(x_ND, *weights, expert_N), rtol=1e-5, atol=1e-5)


def test_the_same_rows_give_the_same_answer_every_time(shard: ExpertShard, checkpoint: Checkpoint) -> None:
    x_ND = rows(checkpoint, 5)
    first, second = (shard.compute(7, [1, 2], [VERSION] * 2, [3, 2], x_ND) for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("version", "layer", "experts", "reason"),
    [
        (VERSION - 1, 1, [0], r"\(1, 0\) is held at version 3, not at version 2"),
        (VERSION + 1, 1, [0], r"\(1, 0\) is held at version 3, not at version 4"),
        (VERSION, 1, [0, 1], r"\(layer, expert\) \(1, 1\) is not held"),
        (VERSION, 5, [0], r"\(5, 0\) is not held"),
        (VERSION, 2, [0], r"\(2, 0\) is not held"),
    ],
    ids=["older weights", "newer weights", "another's expert", "a layer without experts here", "a dense layer"],
)
def test_what_it_does_not_hold_is_refused_not_computed(
    shard: ExpertShard, checkpoint: Checkpoint, version: int, layer: int, experts: list[int], reason: str
) -> None:
    before = shard.rows_computed
    with pytest.raises(NotHeld, match=reason):
        shard.compute(layer, experts, [version] * len(experts), [1] * len(experts), rows(checkpoint, len(experts)))
    assert shard.rows_computed == before


def test_computed_rows_are_counted(checkpoint: Checkpoint) -> None:
    counted = load_shard(checkpoint, HELD, KERNELS)
    for count in (4, 1):
        counted.compute(3, [2], [VERSION], [count], rows(checkpoint, count))
    assert counted.rows_computed == 5


def test_a_local_link_answers_what_its_shard_computes(shard: ExpertShard, checkpoint: Checkpoint) -> None:
    x_ND = rows(checkpoint, 3)
    link = LocalLink(shard)
    answer = taken(link.request(ExpertRows(7, [0, 2], [VERSION] * 2, [1, 2], x_ND)))
    assert link.down_reason is None
    assert torch.equal(answer, shard.compute(7, [0, 2], [VERSION] * 2, [1, 2], x_ND))


def test_a_replica_computes_the_same(directory: str, shard: ExpertShard, checkpoint: Checkpoint) -> None:
    placement = uniform_placement(2, {7: ((0,), (0, 1), (1,), (1,))}, version=VERSION)
    replica = load_shard(checkpoint, placement.slots_of(1), KERNELS)
    x_ND = rows(checkpoint, 2)
    assert torch.equal(replica.compute(7, [1], [VERSION], [2], x_ND), shard.compute(7, [1], [VERSION], [2], x_ND))
