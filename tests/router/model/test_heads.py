"""The fast attention on a CPU against its slow twin, which the parity tests hold against transformers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.config import parse_config
from kernels.cores import Cores
from kernels.cpu import tiles
from kernels.cpu.paged_attention import fits_tiles
from router.model.heads import CpuAttention, HeadAttention, HeadRules, PlainAttention, StepPlan
from router.model.kv_cache import KvCache, Span
from router.model.rope import rotations
from router.schedule.block_table import TableEntry
from router.schedule.kv_layout import KvLayout

CPU = torch.device("cpu")
CHUNK, BLOCK = 16, 4
SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
RULES = {
    "rope": HeadRules(uses_rope=True, qk_norm_eps=None, has_temperature=False),
    "rope and norm": HeadRules(uses_rope=True, qk_norm_eps=1e-5, has_temperature=False),
    "temperature": HeadRules(uses_rope=False, qk_norm_eps=None, has_temperature=True),
}
# Step after step: the beginnings of prompts, single tokens, both, a chunk's end and the next chunk's beginning.
STEPS = [
    [Span(0, 0, 7), Span(1, 0, 1), Span(2, 0, 16)],
    [Span(1, 1, 1), Span(0, 7, 1), Span(2, 16, 5)],
    [Span(0, 8, 1), Span(2, 21, 1), Span(1, 2, 9)],
    [Span(0, 9, 7), Span(2, 22, 10)],
    [Span(0, 16, 1), Span(1, 11, 1), Span(2, 32, 1)],
]
# The same in blocks that tiles of AMX fit, of several groups of 64 queries.
TILED_CHUNK, TILED_BLOCK = 128, 32
TILED_STEPS = [
    [Span(0, 0, 70), Span(1, 0, 1), Span(2, 0, 128)],
    [Span(1, 1, 1), Span(0, 70, 1), Span(2, 128, 45)],
    [Span(0, 71, 1), Span(2, 173, 1), Span(1, 2, 90)],
    [Span(0, 72, 56), Span(2, 174, 82)],
    [Span(0, 128, 1), Span(1, 92, 1), Span(2, 256, 1)],
]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def make_cache(heads_per_kv: int, dtype: torch.dtype, head_dim: int, chunk: int = CHUNK, block: int = BLOCK) -> KvCache:
    """For three sequences of at most 10 blocks, which lie in disorder."""
    config = replace(
        SCOUT,
        num_heads=2 * heads_per_kv,
        num_kv_heads=2,
        head_dim=head_dim,
        attention_chunk_size=chunk,
        layers=SCOUT.layers[:4],
    )
    layout = KvLayout.of(config, dtype.itemsize, block)
    units = iter(np.random.default_rng(0).permutation(500).tolist())
    cache = KvCache(config, layout, 500, 3, dtype, CPU)
    for row in range(3):
        tables = [(0, layout.global_units, 10), (layout.global_units, layout.chunked_units, chunk // block)]
        for first_table, count, blocks in tables:
            cache.assign(
                row, [TableEntry(first_table, i, tuple(next(units) for _ in range(count))) for i in range(blocks)]
            )
    return cache


def play(
    attention: HeadAttention,
    layer: int,
    rules: HeadRules,
    cache: KvCache,
    heads: int,
    steps: Sequence[Sequence[Span]] = STEPS,
) -> list[torch.Tensor]:
    """What the steps give, one after the other, from random projections."""
    generator = torch.Generator().manual_seed(1)
    head_dim, dtype = cache.k_UKPC[0].shape[-1], cache.k_UKPC[0].dtype
    frequencies = torch.rand(head_dim // 2, generator=generator)
    outs = []
    for spans in steps:
        positions = torch.cat([torch.arange(s.first_position, s.first_position + s.length) for s in spans])
        qkv_TJC = torch.randn(len(positions), heads + 4, head_dim, generator=generator).to(dtype)
        step = StepPlan(spans, rotations(frequencies, positions), 1 + positions / 10, cache, cache.plan(spans))
        outs.append(attention(qkv_TJC, rules, cache.layout.locations[layer], step).clone())
    return outs


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layer", [0, 3], ids=["chunked", "global"])
@pytest.mark.parametrize("heads_per_kv", [1, 3, 4, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_read_in_place_give_what_copied_ones_give(
    dtype: torch.dtype, rules: HeadRules, layer: int, heads_per_kv: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.model.heads.WORTH_A_THREAD", 1)
    played = []
    for attention in (PlainAttention(), CpuAttention(Cores(threads, "test"))):
        cache = make_cache(heads_per_kv, dtype, head_dim=8)
        outs = play(attention, layer, rules, cache, 2 * heads_per_kv)
        played.append([*outs, *cache.k_UKPC, *cache.v_UKCP])
    for plain, fast in zip(*played, strict=True):
        assert torch.allclose(plain.float(), fast.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("uses_tiles", [True, False], ids=["tiles", "vectors"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layer", [0, 3], ids=["chunked", "global"])
@pytest.mark.parametrize(("heads_per_kv", "head_dim"), [(1, 32), (5, 64), (3, 128)], ids=str)
def test_blocks_as_large_as_tiles_give_the_same(
    uses_tiles: bool, rules: HeadRules, layer: int, heads_per_kv: int, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not uses_tiles:
        monkeypatch.setattr("router.model.heads.fits_tiles", lambda *_: False)
    played = []
    for attention in (PlainAttention(), CpuAttention(Cores(2, "test"))):
        cache = make_cache(heads_per_kv, torch.bfloat16, head_dim, TILED_CHUNK, TILED_BLOCK)
        outs = play(attention, layer, rules, cache, 2 * heads_per_kv, TILED_STEPS)
        played.append([*outs, *cache.k_UKPC, *cache.v_UKCP])
    for plain, fast in zip(*played, strict=True):
        assert torch.allclose(plain.float(), fast.float(), atol=2e-2, rtol=2e-2)


@pytest.mark.skipif(not tiles.is_supported(), reason="a processor without AMX: the vectors' tests stand for all")
def test_blocks_as_large_as_tiles_take_tiles() -> None:
    assert fits_tiles(TILED_BLOCK, 64)
    assert not fits_tiles(BLOCK, 64)
    assert not fits_tiles(TILED_BLOCK, 8)


def test_the_two_are_told_apart_by_a_wrong_block() -> None:
    rules, heads = RULES["rope"], 8
    right, wrong = (make_cache(4, torch.float32, 8) for _ in range(2))
    for row in (0, 2):
        wrong.assign(row, [TableEntry(0, 1, (0,))])
    outs = [play(CpuAttention(Cores(1, "test")), 3, rules, cache, heads) for cache in (right, wrong)]
    assert not torch.allclose(outs[0][-1], outs[1][-1], atol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chunk", "block", "steps"),
    [(torch.float32, 8, CHUNK, BLOCK, STEPS), (torch.bfloat16, 64, TILED_CHUNK, TILED_BLOCK, TILED_STEPS)],
    ids=["vectors", "tiles"],
)
def test_a_weight_of_exactly_zero_does_not_let_garbage_through(
    dtype: torch.dtype, head_dim: int, chunk: int, block: int, steps: Sequence[Sequence[Span]]
) -> None:
    """A block's unused places may hold anything that another sequence left there."""
    clean, dirty = (make_cache(4, dtype, head_dim, chunk, block) for _ in range(2))
    for pool in (*dirty.k_UKPC, *dirty.v_UKCP):
        pool.fill_(float("nan"))
    outs = [play(CpuAttention(Cores(1, "test")), 0, RULES["rope"], cache, 8, steps) for cache in (clean, dirty)]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
