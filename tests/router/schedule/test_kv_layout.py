"""How a model's cache is cut into units, and the memory that a Scout sequence holds as it grows."""

from dataclasses import replace

import pytest

from checkpoint.config import ModelConfig, parse_config
from router.schedule.block_table import BlockTable, PrefixKeys
from router.schedule.blocks import BlockPool
from router.schedule.kv_layout import KvLayout, LayerLocation

SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
SCOUT_LAYOUT = KvLayout.of(SCOUT, bytes_per_value=2)
CHUNK = 8192


def model_of(kinds: str, chunk: int = CHUNK) -> ModelConfig:
    """kinds: a letter per layer, `c`hunked or `g`lobal."""
    layers = tuple(replace(SCOUT.layers[0], is_chunked=kind == "c") for kind in kinds)
    return replace(SCOUT, layers=layers, attention_chunk_size=chunk)


def test_scout_takes_one_global_and_three_chunked_units_of_twelve_layers() -> None:
    layout = SCOUT_LAYOUT
    assert (layout.global_units, layout.chunked_units, layout.layers_per_unit) == (1, 3, 12)
    assert (layout.block_tokens, layout.unit_bytes) == (64, 64 * 12 * 4096)


@pytest.mark.parametrize(
    ("kinds", "units"),
    [("cccg", (1, 3, 1)), ("ccgcccgcc", (2, 7, 1)), ("cgcgcg", (1, 1, 3)), ("gggg", (1, 0, 4)), ("ccc", (0, 1, 3))],
)
def test_units_are_as_large_as_both_kinds_of_layers_allow(kinds: str, units: tuple[int, int, int]) -> None:
    layout = KvLayout.of(model_of(kinds), 2)
    assert (layout.global_units, layout.chunked_units, layout.layers_per_unit) == units


def test_layers_of_a_kind_fill_its_tables_in_order() -> None:
    locations = KvLayout.of(model_of("ccgccgccgccg"), 2).locations  # 4 global and 8 chunked layers: tables 0 and 1, 2
    assert locations[2] == LayerLocation(table=0, index=0)
    assert locations[11] == LayerLocation(table=0, index=3)
    assert [locations[layer] for layer in (0, 1, 3, 4)] == [LayerLocation(1, index) for index in range(4)]
    assert [locations[layer] for layer in (6, 7, 9, 10)] == [LayerLocation(2, index) for index in range(4)]


@pytest.mark.parametrize("kinds", ["cccg" * 12, "ccgcccgcc", "gggg", "ccc"])
def test_every_layer_has_a_location_of_its_own_and_none_is_left_over(kinds: str) -> None:
    layout = KvLayout.of(model_of(kinds), 2)
    locations = {(location.table, location.index) for location in layout.locations}
    assert locations == {
        (table, index) for table in range(layout.num_tables) for index in range(layout.layers_per_unit)
    }


@pytest.mark.parametrize(
    ("chunk", "wanted", "block"), [(8192, 64, 64), (16, 64, 16), (13, 4, 1), (24, 16, 12), (8192, 100, 64)]
)
def test_blocks_divide_the_attention_chunk(chunk: int, wanted: int, block: int) -> None:
    assert KvLayout.of(model_of("cccg", chunk), 2, max_block_tokens=wanted).block_tokens == block


@pytest.mark.parametrize(("positions", "blocks"), [(0, 0), (1, 1), (64, 1), (65, 2)])
def test_a_block_that_is_begun_counts(positions: int, blocks: int) -> None:
    assert SCOUT_LAYOUT.blocks(positions) == blocks


def test_a_million_tokens_take_what_the_docstring_says() -> None:
    assert SCOUT_LAYOUT.units(1_000_000) == 15_625 + 384


# 4,096 bytes per token and layer of Scout in bf16; 12 global layers and 36 chunked ones of at most 8,192 tokens.


def formula(tokens: int) -> int:
    return 4096 * (12 * tokens + 36 * min(tokens, CHUNK))


def bytes_held(tokens: int) -> tuple[int, int]:
    """What one sequence of `tokens` computed tokens really holds, and the most that it held on the way."""
    pool = BlockPool(SCOUT_LAYOUT.units(tokens))
    table = BlockTable(SCOUT_LAYOUT, pool, PrefixKeys(SCOUT_LAYOUT.block_tokens))
    token_ids, most = [7] * tokens, 0
    for first in range(0, tokens, CHUNK):
        length = min(CHUNK, tokens - first)
        assert table.grow(first, length) == length
        most = max(most, pool.used_units)
        table.mark_computed(token_ids, first + length)
    return pool.used_units * SCOUT_LAYOUT.unit_bytes, most * SCOUT_LAYOUT.unit_bytes


@pytest.mark.parametrize("tokens", [64, 4096, 8192, 3 * 8192, 131_072, 1_048_576])
def test_the_most_that_a_scout_sequence_holds_is_what_the_formula_says(tokens: int) -> None:
    _, most = bytes_held(tokens)
    assert most == formula(tokens)


@pytest.mark.parametrize("tokens", [1, 63, 65, 8191])
def test_a_block_that_is_not_full_is_all_that_a_sequence_holds_beyond_the_formula(tokens: int) -> None:
    _, most = bytes_held(tokens)
    assert formula(tokens) < most < formula(tokens + 64)


@pytest.mark.parametrize("tokens", [8192, 8192 + 64, 3 * 8192 + 4096, 131_072])
def test_chunked_layers_hold_only_the_chunk_that_goes_on(tokens: int) -> None:
    now, _ = bytes_held(tokens)
    assert now == 4096 * (12 * tokens + 36 * (tokens % CHUNK))


@pytest.mark.parametrize("tokens", [1, 64, 8191, 8192, 8193, 131_072, 10_485_760])
def test_what_a_request_is_admitted_by_is_the_formula_in_whole_blocks(tokens: int) -> None:
    whole_blocks = -(-tokens // 64) * 64
    assert SCOUT_LAYOUT.units(tokens) * SCOUT_LAYOUT.unit_bytes == formula(whole_blocks)
