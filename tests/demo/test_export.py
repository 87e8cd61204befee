"""Training's weights as a checkpoint, and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import demo.export
from checkpoint.errors import CheckpointError
from checkpoint.inspect import inspect_checkpoint
from demo.errors import DemoError
from demo.export import export, trained_weights
from demo.scoring import load_exported
from tests.demo.exported import export_tiny
from tests.demo.tiny import ROOMY, drawn_model, token_ids


def test_an_exported_model_comes_back_rounded_to_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = export_tiny(tmp_path, monkeypatch)
    loaded, tokenizer = load_exported(tmp_path / "checkpoint")
    for name, weight in model.state_dict().items():
        assert loaded.state_dict()[name].equal(weight.bfloat16().float())
    assert tokenizer.get_vocab_size() == ROOMY.vocab_size


def test_an_exported_model_is_a_whole_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.export, "MAX_FILE_BYTES", 30_000)  # so that there are several files and an index
    export_tiny(tmp_path, monkeypatch)
    assert inspect_checkpoint(tmp_path / "checkpoint").problems == ()
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1


def test_an_export_replaces_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.export, "MAX_FILE_BYTES", 30_000)
    export_tiny(tmp_path, monkeypatch)
    monkeypatch.setattr(demo.export, "MAX_FILE_BYTES", 60_000)
    other = drawn_model(ROOMY, seed=1)
    export(other.state_dict(), tmp_path / "tokenizer", tmp_path / "checkpoint")
    loaded, _ = load_exported(tmp_path / "checkpoint")
    assert loaded.lm_head.weight.equal(other.lm_head.weight.bfloat16().float())


def test_a_damaged_export_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_tiny(tmp_path, monkeypatch)
    (file,) = (tmp_path / "checkpoint").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_exported(tmp_path / "checkpoint")


def test_the_weights_are_taken_out_of_a_runs_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo.export, "SHIPPED", ROOMY)
    weights = drawn_model(ROOMY).state_dict()
    save_file({**weights, "momentum/lm_head.weight": torch.ones(2)}, tmp_path / "state.safetensors")
    taken = trained_weights(tmp_path)
    assert list(taken) == list(weights)
    assert all(taken[name].equal(weight) for name, weight in weights.items())


def test_without_a_run_one_is_told_to_train(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match=r"state\.safetensors is missing; train first: python -m demo\.train"):
        trained_weights(tmp_path)


@torch.no_grad()
def test_a_loaded_model_is_ready_to_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export_tiny(tmp_path, monkeypatch)
    loaded, _ = load_exported(tmp_path / "checkpoint")
    assert not loaded.training
    assert loaded.lm_head(loaded(token_ids(1, 20)).hidden_NLD).isfinite().all()
