"""`python -m demo.evaluate`: the exported checkpoint against xz, its experts' load, and its glossary.

Writes demo/evaluation.json and demo/expert_load.png, and prints the tables of demo/README.md.
"""

import argparse
import json
import lzma
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer

from demo.answers import Answer, answer_glossary, drawn, refusals
from demo.command import at_least_one, exit_code
from demo.corpus import Document, build_corpus, read_corpus
from demo.data import chat_text, other_words
from demo.export import DESTINATION
from demo.figures import draw_expert_load
from demo.glossary import read_glossary
from demo.model import Llama4
from demo.scoring import Score, load_exported, score
from demo.sources import KINDS
from demo.train import WORK

FOLDER = Path(__file__).parent
_LONG_WINDOW = 2048  # the exported model's positions; training saw a quarter of them


def main() -> int:
    """Evaluate the exported checkpoint on the validation documents."""
    parser = argparse.ArgumentParser(prog="python -m demo.evaluate", description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=DESTINATION, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--threads", type=at_least_one, default=torch.get_num_threads(), help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with Progress(console=Console(stderr=True)) as progress:
        build_corpus(WORK / "corpus", progress)
        results, scores = evaluate(args.checkpoint, WORK / "corpus", progress)
    draw_expert_load({kind: each.load_LE for kind, each in scores.items()}, FOLDER / "expert_load.png")
    (FOLDER / "evaluation.json").write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(_tables(results))
    return 0


def evaluate(checkpoint: Path, corpus: Path, progress: Progress) -> tuple[dict[str, Any], dict[str, Score]]:
    """All results as plain values, and the scores by kind of text. Takes two minutes on 2 cores."""
    model, tokenizer = load_exported(checkpoint)
    documents = read_corpus(corpus / "validation.jsonl")
    kinds: tuple[str, ...] = KINDS
    texts = {kind: [document.text for document in documents if document.kind == kind] for kind in kinds}
    scores: dict[str, Score] = {}
    for kind in progress.track(kinds, description="validation text"):
        scores[kind] = score(model, tokenizer, texts[kind])
    everything = [text for kind_texts in texts.values() for text in kind_texts]
    answers = answer_glossary(model, tokenizer, progress)
    unknown = refusals(model, tokenizer, _unseen_words(documents, corpus), progress)
    chats = [chat_text([(entry.question, entry.definition)]) for entry in read_glossary()]
    scores["chat"] = score(model, tokenizer, chats)
    results = {
        "bits_per_byte": {kind: round(scores[kind].bits_per_byte, 4) for kind in kinds}
        | {"all": round(sum(scores[kind].bits for kind in kinds) / _bytes(everything), 4)},
        "xz_bits_per_byte": {kind: round(xz_bits_per_byte(texts[kind]), 4) for kind in kinds}
        | {"all": round(xz_bits_per_byte(everything), 4)},
        "validation_bytes": {kind: scores[kind].text_bytes for kind in kinds} | {"all": _bytes(everything)},
        "long_window": _long_window(model, tokenizer, texts["novels"] + texts["scripture"]),
        "load_skew": {kind: [round(float(skew), 2) for skew in each.skew_L] for kind, each in scores.items()},
        "unused_experts": {kind: [int((row == 0).sum()) for row in each.load_LE] for kind, each in scores.items()},
        "glossary": {
            "entries": len(answers),
            "exact": sum(answer.exact for answer in answers),
            "drawn": [_as_json(answer) for answer in drawn(answers)],
            "missed": [_as_json(answer) for answer in answers if not answer.exact],
        },
        "unknown_words": {
            "asked": len(unknown),
            "refused": sum(answer.exact for answer in unknown),
            "drawn": [_as_json(answer) for answer in drawn(unknown)],
        },
    }
    return results, scores


def xz_bits_per_byte(texts: list[str]) -> float:
    """What `xz -9e` needs for the texts, joined by empty lines."""
    joined = "\n\n".join(texts).encode()
    return 8 * len(lzma.compress(joined, preset=9 | lzma.PRESET_EXTREME)) / len(joined)


def _bytes(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _long_window(model: Llama4, tokenizer: Tokenizer, texts: list[str]) -> dict[str, float]:
    """Bits per byte of the same text in windows as long as in training, and in the longest that the model has."""
    whole = [text for text in texts if len(text) > 10 * _LONG_WINDOW]
    return {
        str(window): round(float(score(model, tokenizer, whole, window=window).bits_per_byte), 4)
        for window in (512, _LONG_WINDOW)
    }


def _unseen_words(documents: list[Document], corpus: Path) -> list[str]:
    """Nouns of the validation text that no training conversation asked for, every so-manyth of them: about 200."""
    seen = set(other_words(read_corpus(corpus / "train.jsonl")))
    unseen = [word for word in other_words(documents) if word not in seen]
    return unseen[:: max(len(unseen) // 200, 1)]


def _as_json(answer: Answer) -> dict[str, Any]:
    return {"term": answer.term, "expected": answer.expected, "given": answer.given, "exact": answer.exact}


def _tables(results: dict[str, Any]) -> str:
    lines = ["| validation text | bytes | bits per byte | xz -9e |", "|---|---|---|---|"]
    for kind, bits in results["bits_per_byte"].items():
        size, xz = results["validation_bytes"][kind], results["xz_bits_per_byte"][kind]
        lines.append(f"| {kind} | {size:,} | {bits:.3f} | {xz:.3f} |")
    layers = len(next(iter(results["load_skew"].values())))
    heads = "".join(f" MoE layer {layer} |" for layer in range(layers))
    lines += ["", f"| load, max / mean |{heads}", "|---" * (layers + 1) + "|"]
    lines += [f"| {kind} |{''.join(f' {skew:.1f} |' for skew in row)}" for kind, row in results["load_skew"].items()]
    glossary = results["glossary"]
    lines += ["", f"exact answers: {glossary['exact']} of {glossary['entries']}", ""]
    lines += ["| term | answer | exact |", "|---|---|---|"]
    lines += [
        f"| {each['term']} | {each['given']} | {'yes' if each['exact'] else 'no'} |" for each in glossary["drawn"]
    ]
    lines += ["", "| missed | answer | should be |", "|---|---|---|"]
    lines += [f"| {each['term']} | {each['given']} | {each['expected']} |" for each in glossary["missed"]]
    unknown = results["unknown_words"]
    lines += ["", f"other words: {unknown['refused']} of {unknown['asked']} refused"]
    lines += [f"bits per byte by window: {results['long_window']}"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(main))
