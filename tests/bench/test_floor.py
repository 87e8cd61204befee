"""The floor's arithmetic, by hand and on the benchmark's own model."""

import random

import pytest

from bench.checkpoint import BENCH_SHAPE
from bench.floor import ModelBytes, floor_tok_s, model_bytes, step_bytes, uniform_experts_hit
from checkpoint.config import parse_config
from checkpoint.layout import count_parameters
from checkpoint.shape import config_json

CONFIG = parse_config(config_json(BENCH_SHAPE, "bfloat16", "Llama4ForCausalLM", None), "the benchmark's shape")


def test_the_worked_example() -> None:
    model = ModelBytes(always=100, expert=10, moe_layers=4, embedding_row=1)
    assert step_bytes(model, 2, experts_hit=3, kv_bytes_per_stream=5) == 232
    assert floor_tok_s(2, 232, 464) == 4


def test_the_models_bytes_are_its_parameters() -> None:
    model, (total, _) = model_bytes(CONFIG, 2), count_parameters(CONFIG)
    embedding = CONFIG.vocab_size * CONFIG.hidden_size
    assert round(total / 1e6) == 862
    assert model.always // 2 + model.moe_layers * 128 * model.expert // 2 + embedding == total
    assert (model.moe_layers, model.expert, model.embedding_row) == (4, 3 * 512 * 1024 * 2, 1024)


def test_experts_hit_are_what_drawing_at_random_gives() -> None:
    rng = random.Random(0)
    drawn = [len({rng.randrange(128) for _ in range(32)}) for _ in range(4000)]
    assert uniform_experts_hit(128, 1, 32) == pytest.approx(28.4, abs=0.05)
    assert uniform_experts_hit(128, 1, 32) == pytest.approx(sum(drawn) / len(drawn), rel=0.01)
    assert uniform_experts_hit(128, 1, 1) == pytest.approx(1)
