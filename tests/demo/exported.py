"""A tiny model exported as the shipped one is, and a corpus for it to read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from demo.corpus import Document
from demo.export import export
from demo.model import Llama4
from demo.sources import KINDS
from tests.demo.tiny import ROOMY, byte_tokenizer, drawn_model


def export_tiny(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Llama4:
    """Export a model to `folder`/checkpoint, and let the shipped shape be its shape; the model as it was."""
    for module in ("export", "scoring"):
        monkeypatch.setattr(f"demo.{module}.SHIPPED", ROOMY)
    model = drawn_model(ROOMY)
    byte_tokenizer(folder / "tokenizer")
    export(model.state_dict(), folder / "tokenizer", folder / "checkpoint")
    return model


def write_corpus(folder: Path) -> Path:
    """Three documents of each kind as validation text, and one of nouns as training text."""
    texts = [f"{kind} number {number}. " * 60 for kind in KINDS for number in range(3)]
    validation = [
        Document("package", kind, f"{kind} {number}", texts[3 * place + number])
        for place, kind in enumerate(KINDS)
        for number in range(3)
    ]
    validation.append(Document("wordnet-base", "dictionary", "wordnet noun 1", nouns(range(20))))
    train = [Document("wordnet-base", "dictionary", "wordnet noun 0", nouns(range(5)))]
    folder.mkdir()
    for name, documents in (("train", train), ("validation", validation)):
        lines = "".join(json.dumps(asdict(document)) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(lines)
    return folder


def nouns(numbers: range) -> str:
    return "\n\n".join(f"made up word {number} (noun): nothing." for number in numbers)
