"""The pool's tensors: what a step stores is what later steps see through their block tables."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.config import ModelConfig, parse_config
from kernels.choose import choose_kernels
from kernels.cores import Cores
from kernels.kernels import TorchKernels
from router.model.cpu_heads import CpuHeads
from router.model.heads import HeadAttention, TorchHeads, gather, store
from router.model.kv_cache import KvCache, Span
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout

CPU = torch.device("cpu")
SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
CHUNK, BLOCK = 8, 2
TINY = replace(SCOUT, num_kv_heads=2, head_dim=3, attention_chunk_size=CHUNK, layers=SCOUT.layers[:4])
LAYOUT = KvLayout.of(TINY, bytes_per_value=4, max_block_tokens=BLOCK)  # table 0 is global, 1 to 3 are chunked
GLOBAL, CHUNKED = 0, 1


def make_cache(num_units: int = 60) -> KvCache:
    """With block tables for two sequences of 16 tokens; units of sequence 0 lie in order, those of 1 backwards."""
    heads = TorchHeads(TINY, TorchKernels(CPU, torch.float32, Cores(1, "test")))
    cache = KvCache(LAYOUT, 2, heads.new_pools(LAYOUT, num_units), CPU)
    for sequence, units in enumerate([range(30), range(59, 29, -1)]):
        rest = iter(units)
        cache.assign(sequence, [TableEntry(0, index, (next(rest),)) for index in range(8)])
        cache.assign(sequence, [TableEntry(1, index, (next(rest), next(rest), next(rest))) for index in range(4)])
    return cache


def values_of(row: int, positions: range, offset: float = 0.0) -> torch.Tensor:
    """[T, K, C], a number of its own for every row, position, head and column."""
    per_position = TINY.num_kv_heads * TINY.head_dim
    numbers = [torch.arange(per_position) + (1000 * row + place) * per_position + offset for place in positions]
    return torch.stack(numbers).view(-1, TINY.num_kv_heads, TINY.head_dim)


def store_pieces(cache: KvCache, table: int, *pieces: tuple[int, range]) -> None:
    """One step that computes these positions of these rows."""
    plan = cache.plan([Span(row, positions.start, len(positions)) for row, positions in pieces])[table]
    keys = torch.cat([values_of(row, positions) for row, positions in pieces])
    values = torch.cat([values_of(row, positions, offset=0.5) for row, positions in pieces])
    store(cache.pools.keys[0], plan, keys)
    store(cache.pools.values[0], plan, values)


def store_up_to(cache: KvCache, table: int, row: int, end: int) -> None:
    for first in range(0, end, CHUNK):
        store_pieces(cache, table, (row, range(first, min(first + CHUNK, end))))


def assert_sees(cache: KvCache, table: int, row: int, span: range, positions: range) -> None:
    """The span's last token sees these positions of its own row, in order."""
    plan = cache.plan([Span(row, span.start, len(span))])[table]
    assert plan.keys_N.tolist() == [len(positions)]
    k_KSC, v_KSC = gather(cache.pools.keys[0], plan, 0), gather(cache.pools.values[0], plan, 0)
    assert torch.equal(k_KSC, values_of(row, positions).transpose(0, 1))
    assert torch.equal(v_KSC, values_of(row, positions, offset=0.5).transpose(0, 1))


@pytest.mark.parametrize("span", [range(1), range(3), range(5, 6), range(4, 8), range(9, 12), range(15, 16)], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_a_global_layer_sees_everything_up_to_the_span(row: int, span: range) -> None:
    cache = make_cache()
    store_up_to(cache, GLOBAL, row, span.stop)
    assert_sees(cache, GLOBAL, row, span, range(span.stop))


@pytest.mark.parametrize("span", [range(1), range(3), range(5, 6), range(4, 8), range(9, 12), range(15, 16)], ids=str)
@pytest.mark.parametrize("row", [0, 1])
def test_a_chunked_layer_sees_nothing_before_its_chunk(row: int, span: range) -> None:
    cache = make_cache()
    store_up_to(cache, CHUNKED, row, span.stop)
    assert_sees(cache, CHUNKED, row, span, range(span.start - span.start % CHUNK, span.stop))


@pytest.mark.parametrize("table", [GLOBAL, CHUNKED])
def test_sequences_of_one_step_see_their_own(table: int) -> None:
    cache = make_cache()
    store_pieces(cache, table, (1, range(3)), (0, range(6)))
    store_pieces(cache, table, (0, range(6, 8)), (1, range(3, 4)))
    assert_sees(cache, table, 0, range(6, 8), range(8))
    assert_sees(cache, table, 1, range(3, 4), range(4))


def test_a_plan_says_what_each_span_of_a_step_sees() -> None:
    plans = make_cache().plan([Span(0, 9, 3), Span(1, 2, 1)])
    assert len(plans) == LAYOUT.num_tables
    assert [plan.keys_N.tolist() for plan in plans] == [[12, 3], [4, 3], [4, 3], [4, 3]]


def test_a_row_that_is_used_again_sees_what_it_was_last_told() -> None:
    cache = make_cache()
    store_up_to(cache, GLOBAL, 0, 4)
    store_up_to(cache, GLOBAL, 1, 4)
    plan = cache.plan([Span(1, 3, 1)])[GLOBAL]
    cache.assign(0, [TableEntry(0, index, (int(plan.blocks_NB[0, index]),)) for index in range(2)])
    shared = cache.plan([Span(0, 3, 1)])[GLOBAL]
    assert torch.equal(gather(cache.pools.keys[0], shared, 0), values_of(1, range(4)).transpose(0, 1))


@pytest.mark.parametrize("span", [range(6, 8), range(5, 6), range(4, 8)], ids=str)
def test_storing_a_span_again_is_harmless(span: range) -> None:
    """A step that failed half-way may be repeated: some layers then hold its tokens already."""
    cache = make_cache()
    store_pieces(cache, CHUNKED, (0, range(span.stop)))
    store_pieces(cache, CHUNKED, (0, span))
    assert_sees(cache, CHUNKED, 0, span, range(span.stop))


def test_a_span_across_the_chunk_border_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="crosses an attention chunk's border"):
        make_cache().plan([Span(0, 6, 3)])


def torch_heads(config: ModelConfig, dtype: torch.dtype) -> HeadAttention:
    return TorchHeads(config, TorchKernels(torch.device("meta"), dtype, Cores(1, "test")))


def cpu_heads(config: ModelConfig, dtype: torch.dtype) -> HeadAttention:
    return CpuHeads(config, choose_kernels(CPU, dtype, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make_heads", [torch_heads, cpu_heads])
def test_the_pools_take_the_units_bytes_and_no_more(
    make_heads: Callable[[ModelConfig, torch.dtype], HeadAttention], dtype: torch.dtype
) -> None:
    layout = KvLayout.of(SCOUT, dtype.itemsize)
    pools = make_heads(SCOUT, dtype).new_pools(layout, 100)
    tensors = [*pools.keys, *pools.values]
    assert {tensor.dtype for tensor in tensors} == {dtype}
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 100 * layout.unit_bytes


def test_pools_take_no_memory_before_they_are_written() -> None:
    """The pools may be as large as the memory; a start that touched it all would take long."""
    layout = KvLayout.of(SCOUT, 2)
    before = resident_bytes()
    pools = cpu_heads(SCOUT, torch.bfloat16).new_pools(layout, 2**30 // layout.unit_bytes)
    assert resident_bytes() - before < 2**26
    pools.keys[0][0, 0] = 1
    assert not pools.keys[0][1].any()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
