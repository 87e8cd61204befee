"""Bits per byte and expert load, against loops over single tokens."""

from dataclasses import replace
from math import log2

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from checkpoint.make_tokenizer import BOS
from demo.data import framed_tokens
from demo.model import Llama4
from demo.scoring import Score, chosen_experts, score
from tests.demo.tiny import TINY, byte_tokenizer, drawn_model

TEXTS = ["A first text, which is long enough for several windows.", "Ein zweiter, größerer: 🙂🙂.", "x"]
MOE_LAYERS = 2


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def model() -> Llama4:
    return drawn_model()


@torch.no_grad()
def bits_by_hand(model: Llama4, tokenizer: Tokenizer, texts: list[str], window: int) -> float:
    """Each token from what stands before it in its window, one forward pass per token."""
    ids = framed_tokens(tokenizer, texts).astype(np.int64).tolist()
    bits = 0.0
    for place in range(1, len(ids)):
        if ids[place] == tokenizer.token_to_id(BOS):
            continue
        begin = (place - 1) // window * window
        hidden_NLD = model(torch.tensor([ids[begin:place]])).hidden_NLD
        bits -= model.lm_head(hidden_NLD[0, -1]).log_softmax(-1)[ids[place]].item() / np.log(2)
    return bits


@pytest.mark.parametrize("window", [4, 16])
def test_bits_are_those_of_one_token_at_a_time(model: Llama4, tokenizer: Tokenizer, window: int) -> None:
    expected = bits_by_hand(model, tokenizer, TEXTS, window)
    assert score(model, tokenizer, TEXTS, window=window).bits == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("window", [1, 8, 16, 32, 512])
def test_every_token_but_the_given_one_counts_once(tokenizer: Tokenizer, window: int) -> None:
    """A new model needs as many bits for any token, so the sum counts them; filling a window up adds none."""
    result = score(Llama4(TINY), tokenizer, TEXTS, window=window)
    predicted = len(framed_tokens(tokenizer, TEXTS)) - len(TEXTS)
    assert result.bits == pytest.approx(predicted * log2(TINY.vocab_size), rel=1e-6)


def test_bits_are_shared_out_over_the_bytes_of_the_text(model: Llama4, tokenizer: Tokenizer) -> None:
    result = score(model, tokenizer, TEXTS)
    assert result.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert result.tokens == len(framed_tokens(tokenizer, TEXTS))
    assert result.bits_per_byte == result.bits / result.text_bytes


@pytest.mark.parametrize("window", [8, 16, 512])
def test_load_counts_every_token_that_is_read(model: Llama4, tokenizer: Tokenizer, window: int) -> None:
    """Read are all but the last, which is only predicted; what fills a window up is not counted."""
    load_LE = score(model, tokenizer, TEXTS, window=window).load_LE
    assert load_LE.shape == (MOE_LAYERS, TINY.num_local_experts)
    assert load_LE.sum(-1).tolist() == [len(framed_tokens(tokenizer, TEXTS)) - 1] * MOE_LAYERS


@pytest.mark.parametrize("window", [8, 16, 512])
def test_chosen_experts_add_up_to_the_load(model: Llama4, tokenizer: Tokenizer, window: int) -> None:
    ids = framed_tokens(tokenizer, TEXTS)
    experts_TL = chosen_experts(model, ids, window)
    assert experts_TL.shape == (len(ids) - 1, MOE_LAYERS)
    assert experts_TL.dtype == np.uint8
    load_LE = np.stack([np.bincount(layer_T, minlength=TINY.num_local_experts) for layer_T in experts_TL.T])
    assert (load_LE == score(model, tokenizer, TEXTS, window=window).load_LE).all()


@torch.no_grad()
def test_chosen_experts_are_in_the_order_of_the_tokens(model: Llama4, tokenizer: Tokenizer) -> None:
    ids = framed_tokens(tokenizer, TEXTS)[:33]
    layers_NL = model(torch.from_numpy(ids[:-1].astype(np.int64))[None]).experts_NL
    assert chosen_experts(model, ids, 32).tolist() == torch.stack(layers_NL, -1)[0].tolist()


def test_a_model_without_experts_has_no_load(tokenizer: Tokenizer) -> None:
    result = score(drawn_model(replace(TINY, num_local_experts=0)), tokenizer, TEXTS)
    assert result.load_LE.size == 0
    assert result.bits > 0


def test_many_windows_are_read_in_batches(model: Llama4, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = score(model, tokenizer, TEXTS, window=8)
    monkeypatch.setattr("demo.scoring._BATCH", 0)  # one window at a time
    result = score(model, tokenizer, TEXTS, window=8)
    assert result.bits == pytest.approx(expected.bits, rel=1e-6)
    assert (result.load_LE == expected.load_LE).all()


def test_skew_is_the_fullest_expert_over_the_mean() -> None:
    score = Score(bits=1.0, text_bytes=1, tokens=9, load_LE=np.array([[2, 2, 2, 2], [8, 0, 0, 0], [4, 0, 4, 0]]))
    assert score.skew_L.tolist() == [1, 4, 2]
