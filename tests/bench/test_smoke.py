"""The load generator against a real server of a tiny model, and the same model stepped in this process."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import load, one_process
from bench.checkpoint import BENCH_SHAPE, ensure_checkpoint
from bench.measure import check_complete
from bench.worker import Request
from bench.workload import closed_loop
from frontend.in_process.server import serve_checkpoint
from router.schedule.limits import SchedulerLimits
from tests.local_model import greedy, load_model

TINY = replace(
    BENCH_SHAPE,
    vocab_size=512,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    head_dim=8,
    intermediate_size=32,
    intermediate_size_mlp=64,
    num_local_experts=16,
)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    ensure_checkpoint(directory, TINY)
    return directory


def test_no_token_ends_a_text_of_the_benchmarks_model(directory: Path) -> None:
    written = (directory / "model.safetensors").stat().st_mtime_ns
    assert ensure_checkpoint(directory, TINY).eos_token_ids == ()
    assert (directory / "model.safetensors").stat().st_mtime_ns == written


def test_the_load_generator_gets_every_token(directory: Path) -> None:
    requests = [*closed_loop("smoke", 3, 8, 512), Request([1, 2, 3], 4, at_s=0.2)]
    with serve_checkpoint(directory, threads=1) as address:
        streams = asyncio.run(load.run(address, requests))
    check_complete("drover", requests, streams)
    assert streams[3].token_s[0] >= 0.2
    for stream in streams:
        assert stream.token_s == sorted(stream.token_s)
    expected, _ = greedy(load_model(directory, dtype=torch.bfloat16), requests[3].token_ids, 4)
    assert streams[3].token_ids == expected


def test_a_refusal_is_the_streams_error(directory: Path) -> None:
    with serve_checkpoint(directory, threads=1) as address:
        streams = asyncio.run(load.run(address, [Request([1, 2], 2), Request([9999], 2)]))
    assert streams[0].error is None
    assert streams[1].error is not None
    assert streams[1].error.startswith("INVALID_ARGUMENT: prompt.token_ids")


def test_one_process_makes_the_same_tokens_and_counts_experts(directory: Path) -> None:
    engine, link = one_process.load(directory, SchedulerLimits(8, 8, 512, 2**24))
    requests = [*closed_loop("smoke", 3, 8, 512), Request([1, 2, 3], 8, at_s=0.1)]
    streams, _ = one_process.run(engine, link, requests)
    check_complete("drover-one-process", requests, streams)
    expected, _ = greedy(load_model(directory, dtype=torch.bfloat16), requests[3].token_ids, 8)
    assert streams[3].token_ids == expected
    _, facts = one_process.run(engine, link, closed_loop("count", 3, 8, 512))
    assert 1 <= facts["experts_hit"] <= 3
