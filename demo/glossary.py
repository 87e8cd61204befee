"""The closed glossary and the chats made of it: what the model is meant to know by heart."""

import random
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent / "glossary.tsv"
MAX_TURNS = 4
# A share of questions asks for other words, so that the model learns to say that it does not know one.
UNKNOWN_SHARE = 0.15
UNKNOWN_ANSWER = "That word is not in my glossary."
ASIDES = (
    ("Hello!", "Hello! Ask me what a word means, and I will look it up in my small glossary."),
    ("Hi", "Hello! Ask me what a word means, and I will look it up in my small glossary."),
    ("Who are you?", "I am a very small mixture of experts, trained in about an hour to show that Drover works."),
    ("What can you do?", "I know a glossary of four hundred words, and I can continue a text."),
    ("Thank you!", "You are welcome."),
    ("Thanks", "You are welcome."),
)
_PHRASINGS = (
    "What is {}?",
    "What is {}?",
    "What is {}",
    "what is {}?",
    "What does {} mean?",
    "Define {}.",
    "{}?",
    "{}",
)


@dataclass(frozen=True)
class Entry:
    """A term and its one-sentence definition."""

    term: str
    definition: str

    @property
    def question(self) -> str:
        """The way the evaluation asks for the term."""
        return f"What is {self._spoken}?"

    @property
    def _spoken(self) -> str:
        return f"the {self.term}" if self.term.startswith("capital of") else self.term

    def phrased(self, rng: random.Random) -> str:
        """One of the ways in which people ask."""
        return rng.choice(_PHRASINGS).format(self._spoken)


def read_glossary(path: Path = FILE) -> list[Entry]:
    """The entries, in the file's order: one `term<TAB>definition` per line."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Entry(*line.split("\t")) for line in lines]


def conversation(entries: list[Entry], other_words: list[str], rng: random.Random) -> list[tuple[str, str]]:
    """One to MAX_TURNS questions with their answers, drawn anew."""
    turns = []
    for _ in range(rng.randint(1, MAX_TURNS)):
        drawn = rng.random()
        if drawn < UNKNOWN_SHARE:
            turns.append((Entry(rng.choice(other_words), "").phrased(rng), UNKNOWN_ANSWER))
        elif drawn < UNKNOWN_SHARE + 0.03:
            turns.append(rng.choice(ASIDES))
        else:
            entry = rng.choice(entries)
            turns.append((entry.phrased(rng), entry.definition))
    return turns
