"""What the engine remembers of each request to choose its tokens, and the log-probabilities of prompts."""

import pytest
import torch

from router.counts.requests import CANCELLED
from router.errors import Unavailable
from router.model.llama4 import Model
from router.request import FinishReason, TokenDelta, TokenLogprobs
from tests.reference import Reference, prompt
from tests.router.engines import COMPANY, alone, finish_of, greedy, make_engine, run_to_end, tokens_of


def test_a_bias_forces_and_bans_tokens(model: Model) -> None:
    free = alone(model, greedy("a", prompt(9), 6))
    assert alone(model, greedy("a", prompt(9), 6, logit_bias=((77, 100.0),))) == [77] * 6
    banned = alone(model, greedy("a", prompt(9), 6, logit_bias=tuple((token_id, -100.0) for token_id in set(free))))
    assert not set(free) & set(banned)


def test_penalties_know_what_the_request_has_made(model: Model) -> None:
    """The likeliest token falls behind the second once it was made, and that one behind it; company changes nothing."""
    engine = make_engine(model)
    penalised = greedy("a", [5, 6, 7], 6, logit_bias=((77, 100.0), (78, 50.0)), repetition_penalty=3.0)
    for request in (*COMPANY, penalised):
        engine.submit(request)
    tokens = tokens_of(run_to_end(engine), "a")
    assert tokens == [77, 78, 77, 77, 77, 77]
    assert tokens == alone(model, penalised)


def test_min_tokens_keeps_a_text_from_ending_before(model: Model) -> None:
    [eos] = model.config.eos_token_ids
    wanted = ((eos, 100.0), (9, 90.0))
    engine = make_engine(model)
    stop = frozenset({9})
    engine.submit(greedy("stops", prompt(5), logit_bias=wanted))
    engine.submit(greedy("goes on", prompt(5), logit_bias=wanted, min_tokens=4, stop_token_ids=stop))
    engine.submit(greedy("ignores", prompt(5), 5, logit_bias=wanted, ignore_eos=True))
    engine.submit(
        greedy("ignores but stops", prompt(5), logit_bias=((9, 100.0),), ignore_eos=True, stop_token_ids=stop)
    )
    deltas = run_to_end(engine)
    assert tokens_of(deltas, "stops") == [eos]
    *before, last = tokens_of(deltas, "goes on")
    assert (len(before), last, finish_of(deltas, "goes on")) == (4, eos, FinishReason.STOP)
    assert not {eos, 9} & set(before)
    assert (tokens_of(deltas, "ignores"), finish_of(deltas, "ignores")) == ([eos] * 5, FinishReason.LENGTH)
    assert tokens_of(deltas, "ignores but stops") == [9]


def prompt_logprobs_of(deltas: list[TokenDelta], name: str) -> list[TokenLogprobs | None]:
    return [entry for delta in deltas if delta.request_id == name for entry in delta.prompt_logprobs]


# 100 tokens are more than one slice of logits; steps of 7 cut the prompt into many pieces.
@pytest.mark.parametrize("max_step_tokens", [7, 512])
def test_the_prompts_logprobs_are_transformers(reference: Reference, model: Model, max_step_tokens: int) -> None:
    tokens = prompt(100)
    expected_TV = torch.log_softmax(reference.prefill_logits(list(tokens)), dim=-1)
    engine = make_engine(model, max_step_tokens=max_step_tokens)
    engine.submit(greedy("other", prompt(3), 4))
    engine.submit(greedy("a", tokens, 3, prompt_logprobs=4))
    engine.submit(greedy("b", tokens[:20], 3, prompt_logprobs=0))
    deltas = run_to_end(engine)
    first, *entries = prompt_logprobs_of(deltas, "a")
    assert first is None
    assert [entry.token_id for entry in entries if entry] == [*tokens[1:]]
    for place, entry in enumerate(entries):
        assert entry is not None
        values, token_ids = expected_TV[place].topk(4)
        assert entry.logprob == pytest.approx(float(expected_TV[place, entry.token_id]), abs=1e-3)
        assert [token_id for token_id, _ in entry.top] == token_ids.tolist()
        assert [logprob for _, logprob in entry.top] == pytest.approx(values.tolist(), abs=1e-3)
    of_b = prompt_logprobs_of(deltas, "b")
    assert [entry and (entry.token_id, entry.top) for entry in of_b] == [None, *((t, ()) for t in tokens[1:20])]
    assert prompt_logprobs_of(deltas, "other") == []


def test_the_prompts_logprobs_come_before_the_first_token_and_change_none(model: Model) -> None:
    engine = make_engine(model, max_step_tokens=10)
    engine.submit(greedy("a", prompt(25), 4, prompt_logprobs=2))
    deltas = run_to_end(engine)
    assert [len(delta.prompt_logprobs) for delta in deltas] == [11, 6, 8, 0, 0, 0]  # a chunk ends at 16
    assert [delta.prompt_first for delta in deltas[:3]] == [0, 11, 17]
    assert [len(delta.token_ids) for delta in deltas] == [0, 0, 1, 1, 1, 1]
    assert tokens_of(deltas, "a") == alone(model, greedy("a", prompt(25), 4))


def test_a_prompt_of_one_token_has_no_logprobs_to_tell(model: Model) -> None:
    engine = make_engine(model)
    engine.submit(greedy("a", prompt(1), 2, prompt_logprobs=2))
    assert [delta.prompt_logprobs for delta in run_to_end(engine)] == [(None,), ()]


def test_what_was_told_of_a_prompt_is_not_told_again(model: Model) -> None:
    """Should a prompt be computed anew, its log-probabilities go on where they were."""
    engine = make_engine(model, max_step_tokens=8)
    engine.submit(greedy("a", prompt(25), 1, prompt_logprobs=0))
    engine._sampling["a"].prompt_logprobs_told = 10
    entries = prompt_logprobs_of(run_to_end(engine), "a")
    assert [entry and entry.token_id for entry in entries] == [*prompt(25)[10:]]


def test_at_most_64_rows_of_a_prompts_logits_exist_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    logits = model.logits

    def counted(x_RD: torch.Tensor) -> torch.Tensor:
        asked.append(len(x_RD))
        return logits(x_RD)

    monkeypatch.setattr(model, "logits", counted)
    engine = make_engine(model, max_step_tokens=512)
    for name in "abcdefgh":
        engine.submit(greedy(name, prompt(16), 1, prompt_logprobs=0))
    run_to_end(engine)
    assert asked == [8, 64, 8 * 15 - 64]


def test_nothing_is_remembered_of_requests_that_are_over(model: Model) -> None:
    engine = make_engine(model, max_running=2)
    for name in ("finishes", "is cancelled", "waits and is cancelled", "fails", "waits and fails"):
        engine.submit(greedy(name, prompt(5), max_tokens=2 if name == "finishes" else 100, repetition_penalty=1.1))
    for _ in range(3):
        engine.step()
    engine.cancel("is cancelled", CANCELLED)
    engine.cancel("waits and is cancelled", CANCELLED)
    engine.step()
    assert set(engine._sampling) == {"fails", "waits and fails"}
    engine.fail_all(Unavailable("a test said so"))
    assert engine._sampling == {}
