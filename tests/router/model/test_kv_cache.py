"""The pool's tensors: what a step stores is what later steps see through their block tables."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from checkpoint.config import parse_config
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
    """With a block table for two sequences of 16 tokens; those of row 0 lie in order, those of row 1 backwards."""
    cache = KvCache(TINY, LAYOUT, num_units, 2, torch.float32, CPU)
    for row, units in enumerate([range(30), range(59, 29, -1)]):
        rest = iter(units)
        cache.assign(row, [TableEntry(0, index, (next(rest),)) for index in range(8)])
        cache.assign(row, [TableEntry(1, index, (next(rest), next(rest), next(rest))) for index in range(4)])
    return cache


def values_of(row: int, positions: range, offset: float = 0.0) -> torch.Tensor:
    """[T, K, C], a number of its own for every row, position, head and column."""
    per_position = TINY.num_kv_heads * TINY.head_dim
    numbers = [torch.arange(per_position) + (1000 * row + place) * per_position + offset for place in positions]
    return torch.stack(numbers).view(-1, TINY.num_kv_heads, TINY.head_dim)


def store(cache: KvCache, table: int, *pieces: tuple[int, range]) -> None:
    """One step that computes these positions of these rows."""
    plan = cache.plan([Span(row, positions.start, len(positions)) for row, positions in pieces])[table]
    keys = torch.cat([values_of(row, positions) for row, positions in pieces])
    values = torch.cat([values_of(row, positions, offset=0.5) for row, positions in pieces])
    cache.store(0, plan, keys, values)


def store_up_to(cache: KvCache, table: int, row: int, end: int) -> None:
    for first in range(0, end, CHUNK):
        store(cache, table, (row, range(first, min(first + CHUNK, end))))


def assert_sees(cache: KvCache, table: int, row: int, span: range, positions: range) -> None:
    """The span's last token sees these positions of its own row, in order."""
    plan = cache.plan([Span(row, span.start, len(span))])[table]
    assert plan.keys_N.tolist() == [len(positions)]
    k_KSC, v_KSC = cache.gather(0, plan, 0, len(positions))
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
    store(cache, table, (1, range(3)), (0, range(6)))
    store(cache, table, (0, range(6, 8)), (1, range(3, 4)))
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
    assert torch.equal(cache.gather(0, shared, 0, 4)[0], values_of(1, range(4)).transpose(0, 1))


@pytest.mark.parametrize("span", [range(6, 8), range(5, 6), range(4, 8)], ids=str)
def test_storing_a_span_again_is_harmless(span: range) -> None:
    """A step that failed half-way may be repeated: some layers then hold its tokens already."""
    cache = make_cache()
    store(cache, CHUNKED, (0, range(span.stop)))
    store(cache, CHUNKED, (0, span))
    assert_sees(cache, CHUNKED, 0, span, range(span.stop))


def test_a_span_across_the_chunk_border_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="crosses an attention chunk's border"):
        make_cache().plan([Span(0, 6, 3)])


def tensors_of(held: object) -> Sequence[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        return [held]
    return [tensor for each in held for tensor in tensors_of(each)] if isinstance(held, list | tuple) else []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_tensors_take_the_units_bytes_and_no_more(dtype: torch.dtype) -> None:
    layout = KvLayout.of(SCOUT, dtype.itemsize)
    cache = KvCache(SCOUT, layout, 1000, 4, dtype, torch.device("meta"))
    tensors = [tensor for held in vars(cache).values() for tensor in tensors_of(held)]
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == 1000 * layout.unit_bytes
