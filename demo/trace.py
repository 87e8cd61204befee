"""`python -m demo.trace`: which expert every token of some real text goes to, recorded for placement and scaling.

The trace is demo/routing_trace.npz (compressed; no pickle):

    ids_T        uint16 [T]     the tokens, in demo/drover-demo's vocabulary
    experts_TL   uint8 [T, L]   each token's expert in each MoE layer
    kind_T       uint8 [T]      index into `kinds`
    window_T     uint16 [T]     tokens of one number follow each other, and were read with no others before them
    kinds        str [K]        scripture, novels, dictionary, documentation, chat

Read it with `read_trace`. Its skew is real: a router that was trained, reading text that it was not trained on.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from demo.command import exit_code
from demo.corpus import Document, build_corpus, read_corpus
from demo.data import chat_text, framed_tokens
from demo.export import DESTINATION
from demo.glossary import read_glossary
from demo.scoring import chosen_experts, load_exported
from demo.sources import KINDS
from demo.train import WORK

TRACE = Path(__file__).parent / "routing_trace.npz"
TOKENS_PER_KIND = 8192
WINDOW_TOKENS = 1024  # at most
_MOST_CHARACTERS = 100_000  # of a document; more than is read of any


@dataclass(frozen=True)
class RoutingTrace:
    """See the module's docstring."""

    ids_T: np.ndarray
    experts_TL: np.ndarray
    kind_T: np.ndarray
    window_T: np.ndarray
    kinds: tuple[str, ...]


def read_trace(path: Path = TRACE) -> RoutingTrace:
    """The recorded trace."""
    with np.load(path, allow_pickle=False) as stored:
        kinds = tuple(str(kind) for kind in stored["kinds"])
        return RoutingTrace(stored["ids_T"], stored["experts_TL"], stored["kind_T"], stored["window_T"], kinds)


def record(checkpoint: Path, corpus: Path, progress: Progress) -> RoutingTrace:
    """Read TOKENS_PER_KIND tokens of each kind of validation text, and of the glossary's chats."""
    model, tokenizer = load_exported(checkpoint)
    documents = read_corpus(corpus / "validation.jsonl")
    texts = {str(kind): _in_turn([each for each in documents if each.kind == kind]) for kind in KINDS}
    texts["chat"] = [chat_text([(entry.question, entry.definition)]) for entry in read_glossary()]
    chunk = model.shape.attention_chunk_size
    read, experts, kinds, numbers = [], [], [], []
    number = 0
    for kind, kind_texts in progress.track(texts.items(), description="routing trace"):
        left = TOKENS_PER_KIND
        for ids in _windows([framed_tokens(tokenizer, [text[:_MOST_CHARACTERS]]) for text in kind_texts]):
            kept = ids[: left + 1]
            rows = chosen_experts(model, kept, -(-(len(kept) - 1) // chunk) * chunk)  # one window of whole chunks
            read.append(kept[:-1])
            experts.append(rows)
            kinds.append(np.full(len(rows), list(texts).index(kind), dtype=np.uint8))
            numbers.append(np.full(len(rows), number, dtype=np.uint16))
            number += 1
            left -= len(rows)
            if left == 0:
                break
    return RoutingTrace(
        np.concatenate(read), np.concatenate(experts), np.concatenate(kinds), np.concatenate(numbers), tuple(texts)
    )


def _in_turn(documents: list[Document]) -> list[str]:
    """The documents' texts, the sources taking turns."""
    by_source: dict[str, list[str]] = {}
    for document in documents:
        by_source.setdefault(document.source, []).append(document.text)
    turns = itertools.zip_longest(*by_source.values())
    return [text for turn in turns for text in turn if text is not None]


def _windows(rows: list[np.ndarray]) -> Iterator[np.ndarray]:
    """The first window of each document, then the second of each, and so on; one token more than is read, each."""
    for start in range(0, max(map(len, rows)), WINDOW_TOKENS):
        yield from (row[start : start + WINDOW_TOKENS + 1] for row in rows if len(row) > start + 1)


def main() -> int:
    """Record the trace anew."""
    parser = argparse.ArgumentParser(prog="python -m demo.trace", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DESTINATION, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=TRACE, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    with Progress(console=Console(stderr=True)) as progress:
        build_corpus(WORK / "corpus", progress)
        trace = record(args.checkpoint, WORK / "corpus", progress)
    np.savez_compressed(
        args.to,
        ids_T=trace.ids_T,
        experts_TL=trace.experts_TL,
        kind_T=trace.kind_T,
        window_T=trace.window_T,
        kinds=np.array(trace.kinds),
    )
    print(f"{args.to}: {len(trace.experts_TL):,} tokens, {args.to.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
