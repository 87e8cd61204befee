"""Answers to the glossary's questions: the likeliest token each time, until the turn ends."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import demo.answers
from checkpoint.make_tokenizer import BOS, LLAMA4_CHAT_TEMPLATE
from checkpoint.tokenizer import Tokenizer as ServingTokenizer
from demo.answers import SHOWN, Answer, answer_glossary, drawn, greedy_answers, refusals
from demo.data import chat_text
from demo.glossary import UNKNOWN_ANSWER, Entry
from demo.model import Llama4
from frontend.chat_template import ChatTemplate
from tests.demo.tiny import NO_PROGRESS, ROOMY, TINY, drawn_model

QUESTIONS = ["What is acid?", "Hi", "What is rain?", "Hi", "What is the capital of France?"]


class Reciter(nn.Module):
    """Stands in for a model: answers each prompt that it knows with its tokens, one after the other."""

    def __init__(self, tokenizer: Tokenizer, answers: dict[str, str]) -> None:
        super().__init__()
        self.lm_head = nn.Identity()
        self.longest = 0
        self._answers = {
            tuple(prompt_ids(tokenizer, question)): tokenizer.encode(answer, add_special_tokens=False).ids
            for question, answer in answers.items()
        }

    def forward(self, ids_NL: Tensor) -> SimpleNamespace:
        self.longest = max(self.longest, ids_NL.shape[1])
        next_ids = [self._next(tuple(ids)) for ids in ids_NL.tolist()]
        scores_NV = nn.functional.one_hot(torch.tensor(next_ids), TINY.vocab_size)
        return SimpleNamespace(hidden_NLD=scores_NV[:, None])

    def _next(self, ids: tuple[int, ...]) -> int:
        (prompt,) = (prompt for prompt in self._answers if ids[: len(prompt)] == prompt)
        return self._answers[prompt][(len(ids) - len(prompt)) % len(self._answers[prompt])]


def prompt_ids(tokenizer: Tokenizer, question: str) -> list[int]:
    asked = f"{BOS}{chat_text([(question, '')])}".removesuffix("<|eot|>")
    ids: list[int] = tokenizer.encode(asked, add_special_tokens=False).ids
    return ids


@torch.no_grad()
def answer_by_hand(model: Llama4, tokenizer: Tokenizer, prompt: list[int]) -> str:
    ids = list(prompt)
    while len(ids) < len(prompt) + demo.answers._LONGEST_ANSWER:
        ids.append(int(model.lm_head(model(torch.tensor([ids])).hidden_NLD[0, -1]).argmax()))
        if ids[-1] == tokenizer.token_to_id("<|eot|>"):
            ids.pop()
            break
    text: str = tokenizer.decode(ids[len(prompt) :])
    return text


def test_answers_are_those_of_one_question_at_a_time(
    folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompted as the serving side prompts; questions of one length are a batch."""
    monkeypatch.setattr(demo.answers, "_LONGEST_ANSWER", 12)
    model, template = drawn_model(ROOMY), ChatTemplate(LLAMA4_CHAT_TEMPLATE, {})
    prompts = [template.encode([("user", question)], ServingTokenizer.open(folder)) for question in QUESTIONS]
    given = greedy_answers(model, tokenizer, QUESTIONS, NO_PROGRESS)
    assert given == [answer_by_hand(model, tokenizer, prompt) for prompt in prompts]
    assert len(set(given)) == len(set(QUESTIONS))


def test_an_answer_ends_with_the_turn(tokenizer: Tokenizer) -> None:
    """Though the others of its batch, questions of as many tokens, go on."""
    answers = {"Q?": "It tastes sour, and more.<|eot|>", "X?": "Water.<|eot|>", "Z?": "<|eot|>", "Hello": "Hi!<|eot|>"}
    assert len({len(prompt_ids(tokenizer, question)) for question in ("Q?", "X?", "Z?")}) == 1
    given = greedy_answers(Reciter(tokenizer, answers), tokenizer, list(answers), NO_PROGRESS)
    assert given == ["It tastes sour, and more.", "Water.", "", "Hi!"]


def test_no_more_is_computed_than_the_longest_answer_needs(tokenizer: Tokenizer) -> None:
    reciter = Reciter(tokenizer, {"Hi": "Hello!<|eot|>"})
    greedy_answers(reciter, tokenizer, ["Hi"], NO_PROGRESS)
    answer = tokenizer.encode("Hello!", add_special_tokens=False).ids
    assert reciter.longest == len(prompt_ids(tokenizer, "Hi")) + len(answer)


def test_an_endless_answer_is_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.answers, "_LONGEST_ANSWER", 7)
    reciter = Reciter(tokenizer, {"Hi": "!"})
    assert greedy_answers(reciter, tokenizer, ["Hi"], NO_PROGRESS) == ["!" * 7]


def test_an_answer_is_exact_word_for_word(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.answers, "read_glossary", lambda: [Entry("acid", "It is sour."), Entry("rain", "Water.")])
    reciter = Reciter(tokenizer, {"What is acid?": "It is sour.<|eot|>", "What is rain?": "Waters.<|eot|>"})
    answers = answer_glossary(reciter, tokenizer, NO_PROGRESS)
    assert answers == [Answer("acid", "It is sour.", "It is sour."), Answer("rain", "Water.", "Waters.")]
    assert [answer.exact for answer in answers] == [True, False]


def test_refusing_other_words_is_right(tokenizer: Tokenizer) -> None:
    reciter = Reciter(tokenizer, {"What is zeppelin?": f"{UNKNOWN_ANSWER}<|eot|>", "What is yak?": "A cow.<|eot|>"})
    answers = refusals(reciter, tokenizer, ["zeppelin", "yak"], NO_PROGRESS)
    assert [(answer.term, answer.exact) for answer in answers] == [("zeppelin", True), ("yak", False)]


def test_the_answers_shown_are_drawn_once_and_for_all() -> None:
    answers = [Answer(f"term {number}", "", "") for number in range(400)]
    assert drawn(answers) == drawn(answers)
    assert len(set(drawn(answers))) == SHOWN
    assert drawn(answers) != answers[:SHOWN]
