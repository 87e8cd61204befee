"""The routing trace of a tiny model: recorded, written, and read again."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import demo.trace
from checkpoint.make_tokenizer import BOS
from demo.command import exit_code
from demo.corpus import Document, read_corpus
from demo.scoring import load_exported
from demo.sources import KINDS
from demo.trace import RoutingTrace, main, read_trace, record
from tests.demo.exported import export_tiny, write_corpus
from tests.demo.tiny import NO_PROGRESS, ROOMY

WINDOW_TOKENS = 64
TOKENS_PER_KIND = 100  # a window and a half


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an exported model and a corpus."""
    monkeypatch.setattr(demo.trace, "WINDOW_TOKENS", WINDOW_TOKENS)
    monkeypatch.setattr(demo.trace, "TOKENS_PER_KIND", TOKENS_PER_KIND)
    export_tiny(tmp_path, monkeypatch)
    write_corpus(tmp_path / "corpus")
    return tmp_path


def recorded(work: Path) -> RoutingTrace:
    return record(work / "checkpoint", work / "corpus", NO_PROGRESS)


def test_a_trace_is_read_as_it_was_recorded(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command, which writes it."""
    monkeypatch.setattr(demo.trace, "WORK", work)
    file = work / "trace.npz"
    monkeypatch.setattr(sys, "argv", ["trace", "--checkpoint", str(work / "checkpoint"), "--to", str(file)])
    assert main() == 0
    expected, trace = recorded(work), read_trace(file)
    assert trace.kinds == expected.kinds
    for name in ("ids_T", "experts_TL", "kind_T", "window_T"):
        assert np.array_equal(getattr(trace, name), getattr(expected, name))
        assert getattr(trace, name).dtype == getattr(expected, name).dtype


def test_the_file_holds_plain_numbers_and_names(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No pickle: nothing in it is a Python object, and nothing is executed to read it."""
    monkeypatch.setattr(demo.trace, "WORK", work)
    file = work / "trace.npz"
    monkeypatch.setattr(sys, "argv", ["trace", "--checkpoint", str(work / "checkpoint"), "--to", str(file)])
    main()
    with np.load(file, allow_pickle=False) as stored:
        dtypes = {name: stored[name].dtype.str for name in stored.files}
    kinds = dtypes.pop("kinds")
    assert dtypes == {"ids_T": "<u2", "experts_TL": "|u1", "kind_T": "|u1", "window_T": "<u2"}
    assert kinds.startswith("<U")


def test_every_kind_has_its_tokens(work: Path) -> None:
    trace = recorded(work)
    assert trace.kinds == (*KINDS, "chat")
    assert np.bincount(trace.kind_T).tolist() == [TOKENS_PER_KIND] * len(trace.kinds)
    assert len({len(trace.ids_T), len(trace.experts_TL), len(trace.kind_T), len(trace.window_T)}) == 1


def test_windows_are_numbered_and_go_on_in_one_document(work: Path) -> None:
    trace = recorded(work)
    _, tokenizer = load_exported(work / "checkpoint")
    firsts = np.flatnonzero(np.diff(trace.window_T, prepend=-1))
    assert trace.window_T[firsts].tolist() == list(range(len(firsts)))
    assert np.bincount(trace.window_T).max() == WINDOW_TOKENS
    for kind in range(len(trace.kinds)):
        assert trace.ids_T[trace.kind_T == kind][0] == tokenizer.token_to_id(BOS)
    texts = [document.text for document in read_corpus(work / "corpus" / "validation.jsonl")]
    for number in np.unique(trace.window_T[trace.kind_T < len(KINDS)]):
        read = tokenizer.decode(trace.ids_T[trace.window_T == number].tolist())
        assert any(read in text for text in texts)


def test_sources_and_documents_take_turns() -> None:
    documents = [Document(source, "novels", f"{source} {i}", f"{source}{i}") for source in "ab" for i in range(2)]
    assert demo.trace._in_turn(documents) == ["a0", "b0", "a1", "b1"]


def test_every_document_is_begun_before_one_is_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.trace, "WINDOW_TOKENS", 3)
    rows = [np.arange(0, 8), np.arange(10, 14), np.arange(20, 22)]
    found = [window.tolist() for window in demo.trace._windows(rows)]
    assert found == [[0, 1, 2, 3], [10, 11, 12, 13], [20, 21], [3, 4, 5, 6], [6, 7]]


@torch.no_grad()
def test_the_experts_are_the_models_choice_for_the_recorded_tokens(work: Path) -> None:
    trace = recorded(work)
    model, _ = load_exported(work / "checkpoint")
    for number in np.unique(trace.window_T):
        place_T = trace.window_T == number
        layers_NL = model(torch.from_numpy(trace.ids_T[place_T].astype(np.int64))[None]).experts_NL
        assert trace.experts_TL[place_T].tolist() == torch.stack(layers_NL, -1)[0].tolist()
    assert trace.experts_TL.max() < ROOMY.num_local_experts


def test_a_missing_checkpoint_is_named(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo.trace, "WORK", work)
    monkeypatch.setattr(sys, "argv", ["trace", "--checkpoint", str(work / "nothing")])
    assert exit_code(main) == 1
    assert "nothing is no directory" in capsys.readouterr().err
