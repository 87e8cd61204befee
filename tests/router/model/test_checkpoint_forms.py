"""The forms in which checkpoints come: each computes what transformers computes with the plain one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint.tensors import Checkpoint
from tests.local_model import greedy, load_model, prefill_logits
from tests.reference import Reference, make_reference, prompt
from tests.router.model.test_parity import TOLERANCE, relative_error

TOKENS = list(prompt(40))
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return make_reference(tmp_path_factory.mktemp("plain"), "maverick-4-experts")


def copy_of(reference: Reference, directory: Path, change: Callable[[Tensors], Tensors] = dict) -> Path:
    """The same model with other files; `change` makes its tensors of the plain ones."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text((reference.directory / "config.json").read_text())
    tensors = change(load_file(reference.directory / "model.safetensors"))
    save_file(tensors, directory / "model.safetensors")
    return directory


def same_logits(directory: Path, reference: Reference) -> None:
    theirs = reference.prefill_logits(TOKENS)
    for num_shards in (1, 3):
        ours = prefill_logits(load_model(directory, num_shards=num_shards), TOKENS)
        assert relative_error(ours, theirs) < TOLERANCE


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NAMINGS: dict[str, Callable[[str], str]] = {
    "of a multimodal class": lambda name: f"language_model.{name}",
    "of a multimodal class since transformers 4.52": lambda name: name.replace("model.", "model.language_model.", 1),
    "of a decoder alone": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS)
def test_tensors_may_have_any_of_the_names_in_use(
    naming: Callable[[str], str], reference: Reference, tmp_path: Path
) -> None:
    renamed = copy_of(reference, tmp_path, lambda tensors: {naming(name): t for name, t in tensors.items()})
    same_logits(renamed, reference)


def unfused(tensors: Tensors) -> Tensors:
    """Experts as llm-compressor and the fp8 release of Maverick have them: three linear layers each."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        for expert, weight in enumerate(tensor if ".experts." in name else ()):
            if kind == "gate_up_proj":
                gate_DF, up_DF = weight.chunk(2, dim=-1)
                made[f"{prefix}.{expert}.gate_proj.weight"] = gate_DF.t().contiguous()
                made[f"{prefix}.{expert}.up_proj.weight"] = up_DF.t().contiguous()
            else:
                made[f"{prefix}.{expert}.down_proj.weight"] = weight.t().contiguous()
        if ".experts." not in name:
            made[name] = tensor
    return made


def test_experts_need_not_be_fused(reference: Reference, tmp_path: Path) -> None:
    directory = copy_of(reference, tmp_path, unfused)
    same_logits(directory, reference)
    plain, ours = Checkpoint.open(reference.directory), Checkpoint.open(directory)
    layer = ours.config.moe_layers[0]
    assert ours.expert_bytes(layer) == plain.expert_bytes(layer)
    for expert in range(4):
        for left, right in zip(
            plain.read_expert(layer, expert, torch.float32), ours.read_expert(layer, expert, torch.float32), strict=True
        ):
            assert torch.equal(left, right)


def test_a_missing_part_of_an_unfused_expert_is_named(reference: Reference, tmp_path: Path) -> None:
    def without_one(tensors: Tensors) -> Tensors:
        made = unfused(tensors)
        del made["model.layers.3.feed_forward.experts.2.up_proj.weight"]
        return made

    with pytest.raises(Exception, match=r"model\.layers\.3\.feed_forward\.experts\.2\.up_proj\.weight is missing"):
        Checkpoint.open(copy_of(reference, tmp_path, without_one))


def in_two_files(reference: Reference, directory: Path) -> Path:
    copy_of(reference, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[:20], names[20:]), 1):
        save_file({name: tensors[name] for name in part}, directory / f"model-0000{number}-of-00002.safetensors")
    return directory


def test_numbered_files_need_no_index(reference: Reference, tmp_path: Path) -> None:
    directory = in_two_files(reference, tmp_path)
    same_logits(directory, reference)
    (directory / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(Exception, match=r"model-00001-of-00002\.safetensors is missing"):
        Checkpoint.open(directory)


def test_a_single_file_counts_before_an_index_and_the_second_set_is_reported(
    reference: Reference, tmp_path: Path
) -> None:
    directory = copy_of(reference, tmp_path)
    stale = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(stale))
    same_logits(directory, reference)
    [warning] = Checkpoint.open(directory).warnings
    assert "holds model.safetensors, which is loaded, and model.safetensors.index.json" in warning


def test_a_tensor_that_an_index_leaves_out_is_loaded_as_in_transformers(reference: Reference, tmp_path: Path) -> None:
    directory = in_two_files(reference, tmp_path)
    index = {}
    for path in directory.glob("model-*.safetensors"):
        index |= dict.fromkeys(load_file(path), path.name)
    del index["model.norm.weight"]
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    same_logits(directory, reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_without_a_dtype_in_the_config_the_files_say_it(
    reference: Reference, tmp_path: Path, dtype: torch.dtype
) -> None:
    def stored(tensors: Tensors) -> Tensors:
        return {name: t if "norm" in name else t.to(dtype) for name, t in tensors.items()}  # norms stay in fp32

    directory = copy_of(reference, tmp_path, stored)
    edit_config(directory, dtype=None, torch_dtype=None)
    assert Checkpoint.open(directory).config.dtype == str(dtype).removeprefix("torch.")


def test_a_dense_model_computes_what_transformers_computes(tmp_path: Path) -> None:
    """Like Llama Guard 4: no experts, and no chunks.

    transformers 5.23 cannot run `attention_chunk_size: null`. A chunk longer than the text means the same.
    """
    dense = make_reference(
        tmp_path, "maverick-4-experts", interleave_moe_layer_step=0, moe_layers=[], attention_chunk_size=512
    )
    edit_config(tmp_path, attention_chunk_size=None)
    same_logits(tmp_path, dense)
    assert greedy(load_model(tmp_path), TOKENS, 12)[0] == dense.greedy(TOKENS, 12)[0]
