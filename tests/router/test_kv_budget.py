"""The KV cache's budget: bytes or a share, whole units, and a refusal that shows the arithmetic."""

from dataclasses import replace

import pytest

from checkpoint.config import parse_config
from router.kv_budget import RESERVE_BYTES, KvBudget, NoRoom
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import DEFAULT_KV_BYTES

SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
LAYOUT = KvLayout.of(replace(SCOUT, attention_chunk_size=8192), bytes_per_value=2)
GIB = 2**30


def test_bytes_are_taken_as_they_are_but_for_the_last_unit() -> None:
    kv_bytes = KvBudget(bytes=3 * GIB + 5).resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=GIB)
    assert kv_bytes == 3 * GIB // LAYOUT.unit_bytes * LAYOUT.unit_bytes


def test_a_share_is_of_what_is_free() -> None:
    kv_bytes = KvBudget(share=0.25).resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=GIB)
    assert 2 * GIB - LAYOUT.unit_bytes < kv_bytes <= 2 * GIB


def test_without_bytes_or_share_it_is_the_default() -> None:
    resolved = [b.resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=GIB) for b in (KvBudget(), KvBudget(GIB))]
    assert resolved[0] == resolved[1]
    assert DEFAULT_KV_BYTES == GIB


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        (KvBudget(bytes=9 * GIB), r"engine\.kv_bytes asks for 9\.00 GiB of KV cache, but 512\.00 MiB are free"),
        (KvBudget(), r"the default of engine\.kv_bytes asks for 1\.00 GiB of KV cache, but 512\.00 MiB are free"),
    ],
    ids=["bytes", "default"],
)
def test_more_than_is_free_is_refused_with_the_arithmetic(budget: KvBudget, asked: str) -> None:
    with pytest.raises(NoRoom, match=f"^{asked} beside 34\\.50 GiB of weights"):
        budget.resolve(LAYOUT, free_bytes=GIB // 2, weight_bytes=int(34.5 * GIB))


@pytest.mark.parametrize(
    ("budget", "asked"),
    [
        (KvBudget(bytes=1000), r"engine\.kv_bytes comes to 1000 bytes"),
        (KvBudget(share=0.25), r"engine\.kv_share of 0\.25 comes to 500 bytes"),
    ],
    ids=["bytes", "share"],
)
def test_less_than_one_block_is_refused_with_the_arithmetic(budget: KvBudget, asked: str) -> None:
    least = LAYOUT.units(1) * LAYOUT.unit_bytes
    assert least == 12 * 2**20  # of Scout's 48 layers, at 64 positions
    with pytest.raises(
        NoRoom,
        match=rf"^{asked} of KV cache; a single block of 64 tokens needs 12\.00 MiB, and 2000 bytes are free beside "
        r"1\.00 GiB of weights$",
    ):
        budget.resolve(LAYOUT, free_bytes=2000, weight_bytes=GIB)


def test_where_nobody_tells_what_is_free_bytes_are_believed_and_a_share_is_refused() -> None:
    assert KvBudget(bytes=LAYOUT.unit_bytes * 8).resolve(LAYOUT, None, weight_bytes=GIB) == LAYOUT.unit_bytes * 8
    with pytest.raises(NoRoom, match=r"engine\.kv_share is 0\.5, but .* set engine\.kv_bytes instead"):
        KvBudget(share=0.5).resolve(LAYOUT, None, weight_bytes=GIB)


def test_what_a_step_takes_stays_free_with_a_reserve() -> None:
    assert RESERVE_BYTES == GIB // 2
    kv_bytes = KvBudget(share=0.5).resolve(LAYOUT, 24 * GIB, weight_bytes=GIB, step_bytes=3 * GIB // 2)
    assert 11 * GIB - LAYOUT.unit_bytes < kv_bytes <= 11 * GIB
    with pytest.raises(NoRoom, match=r"0 bytes are free beside 1\.00 GiB of weights and 3\.50 GiB for a step"):
        KvBudget(bytes=GIB).resolve(LAYOUT, GIB, weight_bytes=GIB, step_bytes=3 * GIB)
