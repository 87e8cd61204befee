"""What the model answers to the glossary's questions: the share of definitions that come out word for word."""

import random
from dataclasses import dataclass

import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from checkpoint.make_tokenizer import BOS
from demo.data import chat_text
from demo.glossary import UNKNOWN_ANSWER, Entry, read_glossary
from demo.model import Llama4

_LONGEST_ANSWER = 60  # tokens
SHOWN = 10
SHOWN_SEED = 4


@dataclass(frozen=True)
class Answer:
    """A question's answer as it came out, and what it should have been."""

    term: str
    expected: str
    given: str

    @property
    def exact(self) -> bool:
        return self.given == self.expected


def answer_glossary(model: Llama4, tokenizer: Tokenizer, progress: Progress) -> list[Answer]:
    """Ask `What is TERM?` for every term, each in a new conversation, and take the likeliest token each time."""
    entries = read_glossary()
    given = greedy_answers(model, tokenizer, [entry.question for entry in entries], progress)
    return [Answer(entry.term, entry.definition, text) for entry, text in zip(entries, given, strict=True)]


def refusals(model: Llama4, tokenizer: Tokenizer, words: list[str], progress: Progress) -> list[Answer]:
    """Ask for words that are in no glossary; right is to say so."""
    given = greedy_answers(model, tokenizer, [Entry(word, "").question for word in words], progress)
    return [Answer(word, UNKNOWN_ANSWER, text) for word, text in zip(words, given, strict=True)]


def drawn(answers: list[Answer]) -> list[Answer]:
    """SHOWN answers, good and bad as they fall, drawn by SHOWN_SEED."""
    return random.Random(SHOWN_SEED).sample(answers, SHOWN)


@torch.no_grad()
def greedy_answers(model: Llama4, tokenizer: Tokenizer, questions: list[str], progress: Progress) -> list[str]:
    """The answer to each question up to <|eot|>; questions of one length are answered together."""
    texts = [BOS + chat_text([(question, "")]).removesuffix("<|eot|>") for question in questions]
    prompts = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    end = tokenizer.token_to_id("<|eot|>")
    answers = [""] * len(questions)
    for length in progress.track(sorted({len(prompt) for prompt in prompts}), description="answers"):
        rows = [row for row, prompt in enumerate(prompts) if len(prompt) == length]
        ids_NL = torch.tensor([prompts[row] for row in rows])
        ended_N = torch.zeros(len(rows), dtype=torch.bool)
        for _ in range(_LONGEST_ANSWER):
            next_N = model.lm_head(model(ids_NL).hidden_NLD[:, -1]).argmax(-1)
            ids_NL = torch.cat((ids_NL, next_N[:, None]), 1)
            ended_N |= next_N == end
            if ended_N.all():
                break
        for row, ids in zip(rows, ids_NL[:, length:].tolist(), strict=True):
            answers[row] = tokenizer.decode(ids[: ids.index(end)] if end in ids else ids)
    return answers
