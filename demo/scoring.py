"""What a trained model makes of text: bits per byte, and which experts its tokens go to."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor

from checkpoint.make_tokenizer import BOS
from checkpoint.tensors import Checkpoint
from demo.data import WINDOW, framed_tokens
from demo.errors import DemoError
from demo.model import Llama4
from demo.shapes import SHIPPED

_BATCH = 16


@dataclass(frozen=True)
class Score:
    """bits: of all tokens but the given <|begin_of_text|>; load_LE: tokens per MoE layer and expert."""

    bits: float
    text_bytes: int
    tokens: int
    load_LE: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        return self.bits / self.text_bytes

    @property
    def skew_L(self) -> np.ndarray:
        """The fullest expert's load over the mean load, per MoE layer; 1 is even, the number of experts the worst."""
        skew: np.ndarray = self.load_LE.max(-1) / self.load_LE.mean(-1)
        return skew


def load_exported(checkpoint: Path) -> tuple[Llama4, Tokenizer]:
    """The exported model with its bf16 weights in fp32, and its tokenizer.

    Raises CheckpointError when it is damaged, DemoError when it is another model.
    """
    files = sorted(Checkpoint.open(checkpoint).directory.glob("*.safetensors"))
    weights = {name: weight.float() for file in files for name, weight in load_file(file).items()}
    model = Llama4(SHIPPED)
    expected = {name: weight.shape for name, weight in model.state_dict().items()}
    if {name: weight.shape for name, weight in weights.items()} != expected:
        raise DemoError(f"{checkpoint} is not of the embedded model's shape (demo/shapes.py)")
    model.load_state_dict(weights)
    return model.eval(), Tokenizer.from_file(str(checkpoint / "tokenizer.json"))


def score(model: Llama4, tokenizer: Tokenizer, texts: list[str], *, window: int = WINDOW) -> Score:
    """Read the texts in windows that begin with no context, so that every token is predicted exactly once.

    A serving model sees more context than that; the bits are an upper bound of what it needs.
    """
    ids = torch.from_numpy(framed_tokens(tokenizer, texts).astype(np.int64))
    bos = tokenizer.token_to_id(BOS)
    bits, loads = 0.0, []
    for inputs_NL, targets_NL in _windows(ids, window):
        loss_NL, experts = _forward(model, inputs_NL, targets_NL)
        read_NL = targets_NL != _PAD
        bits += loss_NL[read_NL & (targets_NL != bos)].sum().item() / np.log(2)
        loads.append([np.bincount(layer_NL[read_NL].numpy(), minlength=_experts(model)) for layer_NL in experts])
    text_bytes = sum(len(text.encode()) for text in texts)
    return Score(bits, text_bytes, len(ids), np.sum(loads, axis=0))


def chosen_experts(model: Llama4, ids: np.ndarray, window: int) -> np.ndarray:
    """The expert of each token but the last in each MoE layer, [T - 1, L] uint8, in windows as `score` reads them."""
    rows = []
    for inputs_NL, targets_NL in _windows(torch.from_numpy(ids.astype(np.int64)), window):
        _, experts = _forward(model, inputs_NL, targets_NL)
        rows.append(torch.stack(experts, -1).flatten(0, 1)[(targets_NL != _PAD).flatten()].numpy())
    return np.concatenate(rows).astype(np.uint8)


_PAD = -100  # cross_entropy's own: such a target has no loss


def _windows(ids: Tensor, window: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of inputs and targets [N, window]; the last window is filled up, and its filling has no target."""
    num_windows = -(-(len(ids) - 1) // window)
    filling = num_windows * window - (len(ids) - 1)
    inputs = F.pad(ids[:-1], (0, filling)).view(num_windows, window)
    targets = F.pad(ids[1:], (0, filling), value=_PAD).view(num_windows, window)
    size = max(1, _BATCH * WINDOW // window)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


@torch.no_grad()
def _forward(model: Llama4, inputs_NL: Tensor, targets_NL: Tensor) -> tuple[Tensor, list[Tensor]]:
    device = model.lm_head.weight.device
    trunk = model(inputs_NL.to(device))
    logits_NLV = model.lm_head(trunk.hidden_NLD)
    loss_NL = F.cross_entropy(logits_NLV.transpose(1, 2), targets_NL.to(device), reduction="none")
    return loss_NL.cpu(), [layer_NL.cpu() for layer_NL in trunk.experts_NL]


def _experts(model: Llama4) -> int:
    return model.shape.num_local_experts
