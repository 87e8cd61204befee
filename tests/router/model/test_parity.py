"""The router model and its shards compute what transformers' Llama 4 computes."""

from pathlib import Path

import pytest
import torch

from kernels.choose import choose_kernels
from kernels.cpu.processor import LEVELS, this_processor
from tests.local_model import greedy, load_model, prefill_logits
from tests.reference import TINY_MODELS, Reference, make_reference, prompt

CPU = torch.device("cpu")
TOLERANCE = 1e-4  # of the largest logit


@pytest.fixture(scope="module", params=sorted(TINY_MODELS))
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp(request.param), request.param)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_prefill_gives_the_reference_logits_at_every_position(reference: Reference) -> None:
    tokens = list(prompt(75))  # four chunk borders and nine floor_scale borders
    ours = prefill_logits(load_model(reference.directory), tokens)
    assert relative_error(ours, reference.prefill_logits(tokens)) < TOLERANCE


def test_decoding_gives_the_reference_tokens_and_logits(reference: Reference) -> None:
    tokens = list(prompt(11))
    chosen, logits = greedy(load_model(reference.directory), tokens, 64)
    reference_chosen, reference_logits = reference.greedy(tokens, 64)
    assert chosen == reference_chosen
    assert relative_error(logits, reference_logits) < TOLERANCE


def test_the_number_of_shards_changes_nothing(reference: Reference) -> None:
    num_shards = min(5, reference.model.config.num_local_experts)
    tokens = list(prompt(40))
    one = prefill_logits(load_model(reference.directory), tokens)
    several = prefill_logits(load_model(reference.directory, num_shards=num_shards), tokens)
    assert torch.equal(one, several)


def test_prefill_in_small_pieces_gives_the_same_logits(reference: Reference) -> None:
    tokens = list(prompt(50))
    model = load_model(reference.directory)
    assert relative_error(prefill_logits(model, tokens, limit=3), prefill_logits(model, tokens)) < TOLERANCE


@pytest.mark.parametrize("level", LEVELS)
def test_bfloat16_stays_close_to_transformers_in_bfloat16(level: str, tmp_path: Path) -> None:
    reference = make_reference(tmp_path, "scout-one-expert")  # one expert: rounding cannot change a token's expert
    tokens = list(prompt(40))
    exact = reference.prefill_logits(tokens)
    reference.model.to(torch.bfloat16)
    theirs = reference.prefill_logits(tokens).float()
    kernels = choose_kernels(CPU, torch.bfloat16, 1, this_processor().lowered_to(level))
    model = load_model(tmp_path, dtype=torch.bfloat16, kernels=kernels)
    # Both round at nearly the same places: ours may be no further from the exact logits than theirs, give or take.
    for step in (len(tokens), 1):
        ours = prefill_logits(model, tokens, limit=step)
        assert relative_error(ours, exact) < 1.5 * relative_error(theirs, exact)
