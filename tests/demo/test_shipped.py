"""What is in the repository: the checkpoint, its routing trace, and the figures that the README states."""

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoint.inspect import inspect_checkpoint
from checkpoint.tensors import Checkpoint
from checkpoint.tokenizer import Tokenizer
from checkpoint.weights import WeightReader
from demo.evaluate import FOLDER
from demo.export import DESTINATION
from demo.glossary import read_glossary
from demo.scoring import load_exported
from demo.trace import TOKENS_PER_KIND, RoutingTrace, read_trace
from experts.link import ExpertRows, LocalLink, Reply
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from router.local import CPU
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from tests.local_model import load_model, prefill_logits


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return read_trace()


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(DESTINATION)


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "evaluation.json").read_text())
    return loaded


def windows(trace: RoutingTrace, kind: str, count: int) -> list[np.ndarray]:
    """Places in the trace of the first `count` windows of a kind."""
    numbers = np.unique(trace.window_T[trace.kind_T == trace.kinds.index(kind)])[:count]
    return [np.flatnonzero(trace.window_T == number) for number in numbers]


def test_the_checkpoint_is_whole_and_small() -> None:
    assert inspect_checkpoint(DESTINATION).problems == ()
    sizes = [file.stat().st_size for file in DESTINATION.iterdir()]
    assert sum(sizes) < 24e6
    assert max(sizes) < 10e6


def test_it_has_mavericks_shape() -> None:
    config = Checkpoint.open(DESTINATION).config
    assert (config.num_experts, config.experts_per_token, config.moe_layers) == (128, 1, (1, 3, 5, 7))
    assert [index for index, layer in enumerate(config.layers) if not layer.uses_rope] == [3, 7]


def test_training_and_serving_compute_the_same_logits(model: Model, trace: RoutingTrace) -> None:
    exported, _ = load_exported(DESTINATION)
    for place_T in windows(trace, "novels", 2):
        ids = trace.ids_T[place_T[:512]].astype(np.int64)
        with torch.no_grad():
            trained = exported.lm_head(exported(torch.from_numpy(ids)[None]).hidden_NLD)[0]
        assert (prefill_logits(model, ids.tolist()) - trained).abs().max() < 1e-3


@pytest.mark.parametrize("kind", ["scripture", "novels", "dictionary", "documentation"])
def test_serving_needs_fewer_bits_than_xz(model: Model, trace: RoutingTrace, kind: str) -> None:
    """On validation text that the trace carries; xz gets it in one piece, at its best."""
    tokenizer = Tokenizer.open(DESTINATION)
    bits, texts = 0.0, []
    for place_T in windows(trace, kind, 4):
        ids = trace.ids_T[place_T].astype(np.int64).tolist()
        logprobs_TV = torch.log_softmax(prefill_logits(model, ids), dim=-1)[:-1]
        bits -= float(logprobs_TV.gather(1, torch.tensor(ids[1:])[:, None]).sum()) / np.log(2)
        bits += 12  # the first token, one of 4,096
        texts.append(tokenizer.decode(ids))
    text = "\n\n".join(texts).encode()
    assert bits / len(text) < 8 * len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) / len(text)


def test_the_trace_is_what_a_router_sends(trace: RoutingTrace) -> None:
    """Rows per expert that a serving model asks its shard for, against the recorded ones, expert by expert."""
    checkpoint = Checkpoint.open(DESTINATION)
    placement = even_placement(checkpoint.config.moe_layers, checkpoint.config.num_experts, 1)
    kernels = choose_kernels(CPU, torch.float32, 1)
    link = CountingLink(LocalLink(load_shard(checkpoint, placement.slots_of(0), kernels)))
    weights = WeightReader(checkpoint, torch.float32, CPU)
    model = Model(checkpoint.config, weights, Dispatcher(placement, LinkTable({0: link})), kernels)
    for kind in trace.kinds:
        (place_T,) = windows(trace, kind, 1)
        link.count_LE = np.zeros((checkpoint.config.num_layers, checkpoint.config.num_experts), dtype=int)
        prefill_logits(model, trace.ids_T[place_T].astype(np.int64).tolist())
        recorded_LE = np.stack([np.bincount(row, minlength=128) for row in trace.experts_TL[place_T].T])
        moved = np.abs(link.count_LE[list(checkpoint.config.moe_layers)] - recorded_LE).sum() // 2
        assert moved <= 2, "but for a tie, each token goes to the expert that the trace names"


class CountingLink:
    """A link that counts the rows for each layer and expert."""

    down_reason = None
    is_loaded = True

    def __init__(self, link: LocalLink) -> None:
        self._link = link
        self.count_LE = np.zeros((0, 0), dtype=int)

    def request(self, rows: ExpertRows) -> Reply:
        np.add.at(self.count_LE[rows.layer], list(rows.experts), list(rows.counts))
        return self._link.request(rows)

    def close(self) -> None:
        self._link.close()


def test_the_trace_reads_as_much_of_each_kind(trace: RoutingTrace) -> None:
    assert trace.kinds == ("scripture", "novels", "dictionary", "documentation", "chat")
    assert np.bincount(trace.kind_T).tolist() == [TOKENS_PER_KIND] * 5


def test_the_trace_is_skewed_and_differs_by_kind(trace: RoutingTrace) -> None:
    load_KLE = np.stack(
        [
            [np.bincount(row, minlength=128) for row in trace.experts_TL[trace.kind_T == kind].T]
            for kind in range(len(trace.kinds))
        ]
    )
    share_KLE = load_KLE / load_KLE.sum(-1, keepdims=True)
    assert (share_KLE.max(-1) > 2 / 128).all()
    for layer in range(share_KLE.shape[1]):
        overlap = np.minimum(share_KLE[0, layer], share_KLE[3, layer]).sum()
        assert overlap < 0.8, "scripture and documentation load the same experts"


def test_the_stated_results_are_better_than_xz(results: dict[str, Any]) -> None:
    for kind, bits in results["bits_per_byte"].items():
        assert bits < results["xz_bits_per_byte"][kind]


def test_the_readme_states_the_results(results: dict[str, Any]) -> None:
    readme = (FOLDER / "README.md").read_text()
    for kind, bits in results["bits_per_byte"].items():
        size, xz = results["validation_bytes"][kind], results["xz_bits_per_byte"][kind]
        assert f"| {kind} | {size:,} | {bits:.3f} | {xz:.3f} |" in readme
    for kind, row in results["load_skew"].items():
        assert f"| {kind} |{''.join(f' {skew:.1f} |' for skew in row)}" in readme
    glossary, unknown = results["glossary"], results["unknown_words"]
    assert glossary["entries"] == len(read_glossary())
    assert f"{glossary['exact']} of {glossary['entries']}" in readme
    assert f"{unknown['refused']} of {unknown['asked']}" in readme
    for each in glossary["drawn"]:
        assert f"| {each['term']} | {each['given']} | {'yes' if each['exact'] else 'no'} |" in readme


def test_the_readme_states_the_comparison() -> None:
    readme = (FOLDER / "README.md").read_text()
    comparison = json.loads((FOLDER / "comparison.json").read_text())
    assert len(comparison["seeds"]) == 3
    for pair in comparison["seeds"]:
        tokens = pair["equal_tokens"]
        assert f"| {tokens['tokens'] / 1e6:.1f} M | {tokens['mixture']:.3f} | {tokens['dense']:.3f} |" in readme
        for arm in pair["equal_time"].values():
            assert f"| {arm['bits_per_byte']:.3f} ({arm['tokens'] / 1e6:.1f} M) |" in readme


@pytest.mark.parametrize("picture", ["expert_load.png", "comparison.png"])
def test_the_pictures_are_there(picture: str) -> None:
    assert Path(FOLDER / picture).read_bytes().startswith(b"\x89PNG")
