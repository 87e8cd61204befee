"""Training windows: which text each step reads, fixed by the seed, so that a run that was cut off goes on the same."""

import random
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from tokenizers import Tokenizer

from checkpoint.make_tokenizer import BOS, write_trained_tokenizer
from demo.corpus import Document, read_corpus
from demo.glossary import conversation, read_glossary
from demo.sources import SOURCES

VOCAB_SIZE = 4096
WINDOW = 512  # positions
CHAT_SHARE = 0.08  # of all windows
END = "<|end_of_text|>"


@dataclass(frozen=True)
class TrainingText:
    """Every source's tokens in one row each, documents framed by <|begin_of_text|> and <|end_of_text|>."""

    tokens: dict[str, np.ndarray]  # by package, uint16
    epochs: dict[str, float]  # relative: how often each is read
    tokenizer: Tokenizer
    other_words: list[str]  # that the glossary lacks


def load_training_text(corpus: Path, tokenizer_folder: Path, progress: Progress) -> TrainingText:
    """Tokenize the corpus, learning the tokenizer first when `tokenizer_folder` has none. Takes half a minute."""
    documents = read_corpus(corpus / "train.jsonl")
    if not (tokenizer_folder / "tokenizer.json").exists():
        bar = progress.add_task("tokenizer", total=None)
        write_trained_tokenizer(tokenizer_folder, VOCAB_SIZE, (document.text for document in documents))
        progress.update(bar, total=1, completed=1)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    rows: dict[str, np.ndarray] = {}
    for source in progress.track(SOURCES, description="tokens"):
        texts = [document.text for document in documents if document.source == source.package]
        rows[source.package] = framed_tokens(tokenizer, texts)
    return TrainingText(rows, {source.package: source.epochs for source in SOURCES}, tokenizer, other_words(documents))


def framed_tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """The texts' ids one after another, each between <|begin_of_text|> and <|end_of_text|>, uint16."""
    end = [tokenizer.token_to_id(END)]
    encoded = tokenizer.encode_batch(texts)  # the tokenizer puts <|begin_of_text|> in front
    return np.concatenate([np.array(text.ids + end, dtype=np.uint16) for text in encoded])


def chat_text(turns: list[tuple[str, str]]) -> str:
    """A conversation in Llama 4's format, without the leading <|begin_of_text|>."""
    return "".join(
        f"<|header_start|>{role}<|header_end|>\n\n{content}<|eot|>"
        for turn in turns
        for role, content in zip(("user", "assistant"), turn, strict=True)
    )


class Windows:
    """All windows of a run, by number: `batch(step)` is the same whenever and wherever it is asked for."""

    def __init__(self, text: TrainingText, total: int, seed: int) -> None:
        self._text = text
        self._glossary = read_glossary()
        self._seed = seed
        rng = np.random.default_rng(seed)
        names = list(text.tokens)
        weights = np.array([len(text.tokens[name]) * text.epochs[name] for name in names])
        share = np.append(weights / weights.sum() * (1 - CHAT_SHARE), CHAT_SHARE)
        counts = np.floor(share * total).astype(int)
        counts[-1] += total - counts.sum()
        self._plan: list[tuple[str, int]] = [("", 0)] * total  # (package or "chat", where the window begins)
        places = rng.permutation(total)
        begun = 0
        for name, count in zip([*names, "chat"], counts, strict=True):
            starts = range(count) if name == "chat" else _starts(len(text.tokens[name]), count, rng)
            for place, start in zip(places[begun : begun + count], starts, strict=True):
                self._plan[place] = (name, int(start))
            begun += count

    def batch(self, step: int, size: int) -> torch.Tensor:
        """The step's windows [size, WINDOW + 1]: inputs and, one later, targets."""
        return torch.stack([self._window(*self._plan[i]) for i in range(step * size, (step + 1) * size)])

    def _window(self, name: str, start: int) -> torch.Tensor:
        ids = self._chat_ids(start) if name == "chat" else self._text.tokens[name][start : start + WINDOW + 1]
        return torch.from_numpy(ids.astype(np.int64))

    def _chat_ids(self, number: int) -> np.ndarray:
        rng = random.Random(f"{self._seed} {number}")
        ids: list[int] = []
        while len(ids) <= WINDOW:
            turns = conversation(self._glossary, self._text.other_words, rng)
            ids += self._text.tokenizer.encode(BOS + chat_text(turns), add_special_tokens=False).ids
        return np.array(ids[: WINDOW + 1])


def _starts(length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Where `count` windows begin: every epoch covers the row once, from another first place, in another order.

    length: of the row, more than WINDOW tokens.
    """
    starts = np.empty(0, dtype=np.int64)
    while len(starts) < count:
        first = rng.integers(0, min(WINDOW, length - WINDOW))
        starts = np.append(starts, rng.permutation(np.arange(first, length - WINDOW, WINDOW)))
    return starts[:count]


def other_words(documents: list[Document]) -> list[str]:
    """WordNet's nouns in these documents that are no term of the glossary."""
    known = {entry.term.lower() for entry in read_glossary()}
    words: set[str] = set()
    for document in documents:
        if document.name.startswith("wordnet noun"):
            words.update(re.findall(r"^([^,(\n]+?)(?:,[^(\n]*)? \(noun\):", document.text, flags=re.MULTILINE))
    return sorted(word for word in words if word.lower() not in known)
