"""`python -m demo.trace`: which expert every token of some real text goes to, recorded for placement and scaling.

The trace is demo/routing_trace.npz (compressed; no pickle):

    ids_T        uint16 [T]     the tokens, in demo/drover-demo's vocabulary
    experts_TL   uint8 [T, L]   each token's expert in each MoE layer
    kind_T       uint8 [T]      index into `kinds`
    document_T   uint16 [T]     tokens of one document have one number, and follow each other from its beginning
    kinds        str [K]        scripture, novels, dictionary, documentation, chat

Read it with `read_trace`. Its skew is real: a router that was trained, reading text that it was not trained on.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress

from checkpoint.errors import DroverError
from demo.corpus import build_corpus, read_corpus
from demo.data import chat_text, framed_tokens
from demo.export import DESTINATION
from demo.glossary import read_glossary
from demo.scoring import chosen_experts, load_exported
from demo.sources import KINDS
from demo.train import WORK

TRACE = Path(__file__).parent / "routing_trace.npz"
TOKENS_PER_KIND = 8192
_DOCUMENT_TOKENS = 1024  # of one document at most, so that several are seen


@dataclass(frozen=True)
class RoutingTrace:
    """See the module's docstring."""

    ids_T: np.ndarray
    experts_TL: np.ndarray
    kind_T: np.ndarray
    document_T: np.ndarray
    kinds: tuple[str, ...]


def read_trace(path: Path = TRACE) -> RoutingTrace:
    """The recorded trace."""
    with np.load(path, allow_pickle=False) as stored:
        kinds = tuple(str(kind) for kind in stored["kinds"])
        return RoutingTrace(stored["ids_T"], stored["experts_TL"], stored["kind_T"], stored["document_T"], kinds)


def record(checkpoint: Path, corpus: Path, progress: Progress) -> RoutingTrace:
    """Read the beginnings of validation documents, and the glossary's chats, with the exported model."""
    model, tokenizer = load_exported(checkpoint)
    documents = read_corpus(corpus / "validation.jsonl")
    texts = {str(kind): [each.text for each in documents if each.kind == kind] for kind in KINDS}
    texts["chat"] = [chat_text([(entry.question, entry.definition)]) for entry in read_glossary()]
    read, experts, kinds, numbers = [], [], [], []
    document = 0
    for kind, kind_texts in progress.track(texts.items(), description="routing trace"):
        left = TOKENS_PER_KIND
        for text in kind_texts:
            # One token more than is kept: the last one of a window is a target only.
            ids = framed_tokens(tokenizer, [text[: 16 * _DOCUMENT_TOKENS]])[: min(_DOCUMENT_TOKENS, left) + 1]
            rows = chosen_experts(model, ids, _DOCUMENT_TOKENS)
            read.append(ids[:-1])
            experts.append(rows)
            kinds.append(np.full(len(rows), list(texts).index(kind), dtype=np.uint8))
            numbers.append(np.full(len(rows), document, dtype=np.uint16))
            document += 1
            left -= len(rows)
            if left <= 0:
                break
    return RoutingTrace(
        np.concatenate(read), np.concatenate(experts), np.concatenate(kinds), np.concatenate(numbers), tuple(texts)
    )


def main() -> int:
    """Record the trace anew."""
    parser = argparse.ArgumentParser(prog="python -m demo.trace", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DESTINATION, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--to", type=Path, default=TRACE, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args()
    try:
        with Progress(console=Console(stderr=True)) as progress:
            build_corpus(WORK / "corpus", progress)
            trace = record(args.checkpoint, WORK / "corpus", progress)
    except DroverError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    np.savez_compressed(
        args.to,
        ids_T=trace.ids_T,
        experts_TL=trace.experts_TL,
        kind_T=trace.kind_T,
        document_T=trace.document_T,
        kinds=np.array(trace.kinds),
    )
    print(f"{args.to}: {len(trace.experts_TL):,} tokens, {args.to.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
