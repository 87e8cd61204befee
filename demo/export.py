"""`python -m demo.export`: the trained weights as a Hugging Face checkpoint in bf16, the one that Drover ships."""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from checkpoint.make_tokenizer import read_token_ids
from checkpoint.shape import config_json, split_into_files, token_id_fields, write_index, write_json
from checkpoint.staging import staging_directory
from demo.command import exit_code
from demo.errors import DemoError
from demo.model import Llama4
from demo.shapes import SHIPPED
from demo.train import WORK

DESTINATION = Path(__file__).parent / "drover-demo"
TEMPERATURE = 0.7  # what a server samples with when a request does not say; at 1 so small a model stumbles
MAX_FILE_BYTES = 9_000_000  # git keeps every version of a file
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def main() -> int:
    """Export the state of the last training run."""
    parser = argparse.ArgumentParser(prog="python -m demo.export", description=__doc__)
    parser.add_argument("--to", type=Path, default=DESTINATION, metavar="DIR", help="default: %(default)s")
    args = parser.parse_args()
    export(trained_weights(WORK / "training"), WORK / "tokenizer", args.to)
    print(f"{args.to}: {sum(file.stat().st_size for file in args.to.iterdir()) / 1e6:.1f} MB")
    return 0


def trained_weights(folder: Path) -> dict[str, Tensor]:
    """The model's fp32 weights in a training run's state. Raises DemoError when there is no run."""
    path = folder / "state.safetensors"
    if not path.exists():
        raise DemoError(f"{path} is missing; train first: python -m demo.train")
    with torch.device("meta"):
        names = list(Llama4(SHIPPED).state_dict())
    with safe_open(path, "pt") as state:
        return {name: state.get_tensor(name) for name in names}


def export(weights: dict[str, Tensor], tokenizer: Path, destination: Path) -> None:
    """Write config, tokenizer and weights, rounded to bf16, where a checkpoint may already be.

    The names are those that training uses, so this is a copy. Raises CheckpointError when it cannot be written.
    """
    rounded = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    sizes = {name: weight.nbytes for name, weight in rounded.items()}
    with staging_directory(destination, sum(sizes.values()), overwrite=True) as staging:
        for name in TOKENIZER_FILES:
            shutil.copy(tokenizer / name, staging)
        files = split_into_files(sizes, MAX_FILE_BYTES)
        for file_name, names in zip(write_index(staging, files, sum(sizes.values())), files, strict=True):
            data = save({name: rounded[name] for name in names}, {"format": "pt"})
            (staging / file_name).write_bytes(data)
        ids = read_token_ids(tokenizer)
        sampling = {"do_sample": True, "temperature": TEMPERATURE}
        write_json(staging / "generation_config.json", {**sampling, **token_id_fields(ids)})
        write_json(staging / "config.json", config_json(SHIPPED, "bfloat16", "Llama4ForCausalLM", ids))


if __name__ == "__main__":
    sys.exit(exit_code(main))
