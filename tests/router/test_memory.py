"""The KV cache's budget: bytes or a share, whole units, and a refusal that shows the arithmetic."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoint.config import parse_config
from router.kv_layout import KvLayout
from router.memory import KvBudget, NoRoom, _cgroup_bytes_left, free_bytes

SCOUT = parse_config({"architectures": ["Llama4ForCausalLM"]}, "the defaults, which are Scout's")
LAYOUT = KvLayout.of(replace(SCOUT, attention_chunk_size=8192), bytes_per_value=2)
GIB = 2**30


def test_bytes_are_taken_as_they_are_but_for_the_last_unit() -> None:
    kv_bytes = KvBudget(bytes=3 * GIB + 5).resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=GIB)
    assert kv_bytes == 3 * GIB // LAYOUT.unit_bytes * LAYOUT.unit_bytes


def test_a_share_is_of_what_is_free() -> None:
    kv_bytes = KvBudget(share=0.25).resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=GIB)
    assert 2 * GIB - LAYOUT.unit_bytes < kv_bytes <= 2 * GIB


def test_more_than_is_free_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(
        NoRoom,
        match=r"engine\.kv_bytes asks for 9\.00 GiB of KV cache, but 8\.00 GiB are free beside the router's weights "
        r"\(34\.50 GiB\)",
    ):
        KvBudget(bytes=9 * GIB).resolve(LAYOUT, free_bytes=8 * GIB, weight_bytes=int(34.5 * GIB))


@pytest.mark.parametrize("budget", [KvBudget(bytes=1000), KvBudget(share=0.5)], ids=["bytes", "share"])
def test_less_than_one_block_is_refused_with_the_arithmetic(budget: KvBudget) -> None:
    least = LAYOUT.units(1) * LAYOUT.unit_bytes
    with pytest.raises(NoRoom, match=rf"a single block of 64 tokens needs {least} bytes"):
        budget.resolve(LAYOUT, free_bytes=2000, weight_bytes=GIB)


def test_this_machine_has_some_memory_left() -> None:
    assert 2**20 < free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize(
    ("limit", "used", "left"), [("3000", "1000", 2000), ("3000", "4000", 0), ("max", "1", 2**63 - 1)]
)
def test_a_cgroups_limit_counts(tmp_path: Path, limit: str, used: str, left: int) -> None:
    (tmp_path / "memory.max").write_text(limit + "\n")
    (tmp_path / "memory.current").write_text(used + "\n")
    assert _cgroup_bytes_left(tmp_path) == left


def test_without_a_cgroup_there_is_no_limit(tmp_path: Path) -> None:
    assert _cgroup_bytes_left(tmp_path) == 2**63 - 1
