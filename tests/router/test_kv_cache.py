"""A sequence's keys and values: how many bytes, which positions are kept, and that repeating a step is harmless."""

from dataclasses import replace

import pytest
import torch

from checkpoint.config import ModelConfig, parse_config
from router.kv_cache import LayerCache, SequenceCache

CPU, META = torch.device("cpu"), torch.device("meta")
CHUNK = 4
SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
TINY = replace(SCOUT, num_kv_heads=2, head_dim=3, attention_chunk_size=CHUNK, layers=SCOUT.layers[:4])


def allocated_bytes(config: ModelConfig, positions: int, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes of all tensors behind a cache, seen through what storing the first token returns."""
    token = torch.empty(1, config.num_kv_heads, config.head_dim, dtype=dtype, device=device)
    cache = SequenceCache(config, positions, dtype, device)
    return sum(t.untyped_storage().nbytes() for layer in cache.layers for t in layer.append(0, token, token))


# facts/llama4.md, "Arithmetic": 4,096 bytes per token and layer, 12 global and 36 chunked layers of at most 8,192.
SCOUT_GB = {131_072: 7.65, 1_048_576: 52.7, 10_485_760: 516.6}


@pytest.mark.parametrize("positions", SCOUT_GB)
def test_a_scout_sequence_takes_what_the_arithmetic_says(positions: int) -> None:
    expected = 4096 * (12 * positions + 36 * min(positions, 8192))
    assert expected / 1e9 == pytest.approx(SCOUT_GB[positions], rel=1e-3)
    assert allocated_bytes(SCOUT, positions, torch.bfloat16, META) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("positions", [1, CHUNK - 1, CHUNK, CHUNK + 1, 100])
def test_the_reserved_bytes_are_those_allocated(positions: int, dtype: torch.dtype) -> None:
    assert allocated_bytes(TINY, positions, dtype, CPU) == TINY.kv_bytes(positions, dtype.itemsize)


def values_at(positions: range, offset: float = 0.0) -> torch.Tensor:
    """[T, K, C], a number of its own for every position, head and column."""
    per_position = TINY.num_kv_heads * TINY.head_dim
    numbers = [torch.arange(per_position) + position * per_position + offset for position in positions]
    return torch.stack(numbers).view(-1, TINY.num_kv_heads, TINY.head_dim)


def append(cache: LayerCache, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
    return cache.append(positions.start, values_at(positions), values_at(positions, offset=0.5))


def assert_holds(kept: tuple[torch.Tensor, torch.Tensor], positions: range) -> None:
    k_KSC, v_KSC = kept
    assert torch.equal(k_KSC, values_at(positions).transpose(0, 1))
    assert torch.equal(v_KSC, values_at(positions, offset=0.5).transpose(0, 1))


def make_cache(capacity: int) -> LayerCache:
    return LayerCache(TINY, capacity, torch.float32, CPU)


def test_a_span_sees_itself_and_all_that_came_before() -> None:
    cache = make_cache(10)
    assert_holds(append(cache, range(3)), range(3))
    assert_holds(append(cache, range(3, 4)), range(4))
    assert_holds(append(cache, range(4, 10)), range(10))


@pytest.mark.parametrize("piece", [1, 2, CHUNK])
def test_a_chunked_layer_sees_nothing_before_its_chunk(piece: int) -> None:
    cache = make_cache(CHUNK)
    for first in range(0, 5 * CHUNK, piece):
        chunk_start = first - first % CHUNK
        assert_holds(append(cache, range(first, first + piece)), range(chunk_start, first + piece))


def test_the_fourth_layer_keeps_everything_and_the_others_one_chunk() -> None:
    cache = SequenceCache(TINY, 100, torch.float32, CPU)
    for first in range(0, 40, CHUNK):
        kept = [append(layer, range(first, first + CHUNK))[0].shape[1] for layer in cache.layers]
    assert kept == [CHUNK, CHUNK, CHUNK, 40]


@pytest.mark.parametrize("span", [range(6, 8), range(5, 6), range(4, 8)], ids=str)
def test_storing_a_span_again_is_harmless(span: range) -> None:
    """A step that failed half-way is repeated: some layers then hold its tokens already."""
    once, twice = make_cache(CHUNK), make_cache(CHUNK)
    for cache in (once, twice):
        for first in range(span.start):
            append(cache, range(first, first + 1))
    append(twice, span)
    assert_holds(append(twice, span), range(4, span.stop))
    assert_holds(append(once, span), range(4, span.stop))


def test_a_span_across_the_chunk_border_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="span 2:5 crosses the border at 4"):
        append(make_cache(CHUNK), range(2, 5))
