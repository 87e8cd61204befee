"""The fast attention on a CPU against its slow twin, which the parity tests hold against transformers."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from checkpoint.config import ModelConfig, parse_config
from kernels.choose import choose_kernels
from kernels.cores import Cores
from kernels.cpu.processor import this_processor
from kernels.kernels import TorchKernels
from router.model.cpu_heads import CpuHeads
from router.model.heads import HeadAttention, HeadRules, StepPlan, TorchHeads
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


def config_of(heads_per_kv: int, head_dim: int, chunk: int = CHUNK) -> ModelConfig:
    return replace(
        SCOUT,
        num_heads=2 * heads_per_kv,
        num_kv_heads=2,
        head_dim=head_dim,
        attention_chunk_size=chunk,
        layers=SCOUT.layers[:4],
    )


def torch_heads(config: ModelConfig, dtype: torch.dtype) -> HeadAttention:
    return TorchHeads(config, TorchKernels(CPU, dtype, Cores(1, "test")))


def cpu_heads(config: ModelConfig, dtype: torch.dtype, threads: int = 1, uses_tiles: bool = True) -> HeadAttention:
    processor = this_processor()
    return CpuHeads(config, choose_kernels(CPU, dtype, threads, replace(processor, amx=processor.amx and uses_tiles)))


def make_cache(config: ModelConfig, heads: HeadAttention, dtype: torch.dtype, block: int = BLOCK) -> KvCache:
    """For three sequences of at most 10 blocks, which lie in disorder."""
    layout = KvLayout.of(config, dtype.itemsize, block)
    units = iter(np.random.default_rng(0).permutation(500).tolist())
    cache = KvCache(layout, 3, heads.new_pools(layout, 500), CPU)
    for sequence in range(3):
        in_chunk = layout.blocks(layout.chunk_tokens)
        tables = [(0, layout.global_units, 10), (layout.global_units, layout.chunked_units, in_chunk)]
        for first_table, count, blocks in tables:
            entries = [TableEntry(first_table, i, tuple(next(units) for _ in range(count))) for i in range(blocks)]
            cache.assign(sequence, entries)
    return cache


def play(
    heads: HeadAttention,
    layer: int,
    rules: HeadRules,
    cache: KvCache,
    config: ModelConfig,
    steps: Sequence[Sequence[Span]] = STEPS,
) -> list[torch.Tensor]:
    """What the steps give, one after the other, from random projections."""
    generator = torch.Generator().manual_seed(1)
    dtype = cache.pools.keys[0].dtype
    frequencies = torch.rand(config.head_dim // 2, generator=generator)
    outs = []
    for spans in steps:
        positions = torch.cat([torch.arange(s.first_position, s.first_position + s.length) for s in spans])
        qkv_TJC = torch.randn(len(positions), config.num_heads + 4, config.head_dim, generator=generator).to(dtype)
        plan = StepPlan(spans, rotations(frequencies, positions), 1 + positions / 10, cache, cache.plan(spans))
        outs.append(heads.begin(plan).attend(qkv_TJC, layer, rules).clone())
    return outs


def stored(cache: KvCache, heads: HeadAttention) -> list[torch.Tensor]:
    """The pools' keys and values as [U, K, P, C], however the heads lay them out."""
    values = [pool.transpose(2, 3) if isinstance(heads, CpuHeads) else pool for pool in cache.pools.values]
    return [*cache.pools.keys, *values]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layer", [0, 3], ids=["chunked", "global"])
@pytest.mark.parametrize("heads_per_kv", [1, 3, 4, 5])
@pytest.mark.parametrize("threads", [1, 2])
def test_blocks_read_in_place_give_what_copied_ones_give(
    dtype: torch.dtype, rules: HeadRules, layer: int, heads_per_kv: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kernels.attention_loops.WORTH_A_THREAD", 1)
    config, played = config_of(heads_per_kv, head_dim=8), []
    for heads in (torch_heads(config, dtype), cpu_heads(config, dtype, threads)):
        cache = make_cache(config, heads, dtype)
        outs = play(heads, layer, rules, cache, config)
        played.append([*outs, *stored(cache, heads)])
    for plain, fast in zip(*played, strict=True):
        assert torch.allclose(plain.float(), fast.float(), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("uses_tiles", [True, False], ids=["tiles", "vectors"])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("layer", [0, 3], ids=["chunked", "global"])
@pytest.mark.parametrize(("heads_per_kv", "head_dim"), [(1, 32), (5, 64), (3, 128)], ids=str)
def test_blocks_as_large_as_tiles_give_the_same(
    uses_tiles: bool, rules: HeadRules, layer: int, heads_per_kv: int, head_dim: int
) -> None:
    config, dtype, played = config_of(heads_per_kv, head_dim, TILED_CHUNK), torch.bfloat16, []
    for heads in (torch_heads(config, dtype), cpu_heads(config, dtype, 2, uses_tiles)):
        cache = make_cache(config, heads, dtype, TILED_BLOCK)
        outs = play(heads, layer, rules, cache, config, TILED_STEPS)
        played.append([*outs, *stored(cache, heads)])
    for plain, fast in zip(*played, strict=True):
        assert torch.allclose(plain.float(), fast.float(), atol=2e-2, rtol=2e-2)


def test_bf16_blocks_as_large_as_tiles_take_tiles_where_there_are_any() -> None:
    with_tiles = replace(this_processor(), amx=True)
    loops = choose_kernels(CPU, torch.bfloat16, 1, with_tiles).attention_loops
    assert loops is not None
    assert loops.uses_tiles(TILED_BLOCK, 64)
    assert not loops.uses_tiles(BLOCK, 64)
    assert not loops.uses_tiles(TILED_BLOCK, 8)
    for dtype, processor in ((torch.float32, with_tiles), (torch.bfloat16, replace(with_tiles, amx=False))):
        loops = choose_kernels(CPU, dtype, 1, processor).attention_loops
        assert loops is not None
        assert not loops.uses_tiles(TILED_BLOCK, 64)


def test_the_two_are_told_apart_by_a_wrong_block() -> None:
    config = config_of(4, 8)
    heads = cpu_heads(config, torch.float32)
    right, wrong = (make_cache(config, heads, torch.float32) for _ in range(2))
    for sequence in (0, 2):
        wrong.assign(sequence, [TableEntry(0, 1, (0,))])
    outs = [play(heads, 3, RULES["rope"], cache, config) for cache in (right, wrong)]
    assert not torch.allclose(outs[0][-1], outs[1][-1], atol=1e-3)


def test_steps_of_two_caches_may_overlap() -> None:
    """The heads remember no step: each has an object of its own."""
    config = config_of(4, 8)
    heads = cpu_heads(config, torch.float32)
    spans, frequencies = [Span(0, 0, 7)], torch.rand(4, generator=torch.Generator().manual_seed(0))
    qkv_TJC = torch.randn(7, config.num_heads + 4, 8, generator=torch.Generator().manual_seed(1))
    steps = []
    for positions in (torch.arange(7), torch.arange(7) + 100):
        cache = make_cache(config, heads, torch.float32)
        plan = StepPlan(spans, rotations(frequencies, positions), 1 + positions / 10, cache, cache.plan(spans))
        steps.append((heads, plan))
    alone = [heads.begin(plan).attend(qkv_TJC.clone(), 3, RULES["temperature"]) for heads, plan in steps]
    begun = [heads.begin(plan) for heads, plan in steps]
    both = [step.attend(qkv_TJC.clone(), 3, RULES["temperature"]) for step in begun]
    assert not torch.equal(*alone)
    assert all(torch.equal(a, b) for a, b in zip(alone, both, strict=True))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "chunk", "block", "steps"),
    [(torch.float32, 8, CHUNK, BLOCK, STEPS), (torch.bfloat16, 64, TILED_CHUNK, TILED_BLOCK, TILED_STEPS)],
    ids=["vectors", "tiles"],
)
def test_a_weight_of_exactly_zero_does_not_let_garbage_through(
    dtype: torch.dtype, head_dim: int, chunk: int, block: int, steps: Sequence[Sequence[Span]]
) -> None:
    """A block's unused positions may hold anything that another sequence left there."""
    config = config_of(4, head_dim, chunk)
    heads = cpu_heads(config, dtype)
    clean, dirty = (make_cache(config, heads, dtype, block) for _ in range(2))
    for pool in (*dirty.pools.keys, *dirty.pools.values):
        pool.fill_(float("nan"))
    outs = [play(heads, 0, RULES["rope"], cache, config, steps) for cache in (clean, dirty)]
    for a, b in zip(*outs, strict=True):
        assert torch.equal(a, b)
