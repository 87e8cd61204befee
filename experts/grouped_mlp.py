"""The experts' arithmetic: SwiGLU over rows that are already sorted by expert.

Legend: N rows (one per token and chosen expert), D model width, F expert width, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from experts.linear import Linear, make_linear


@dataclass(frozen=True)
class Expert:
    """One expert's weights, laid out for the device: D -> 2F (gate first, then up) and F -> D."""

    gate_up: Linear
    down: Linear


def make_expert(gate_up_DF2: torch.Tensor, down_FD: torch.Tensor) -> Expert:
    """From the checkpoint's layout, [in, out], to the device's."""
    return Expert(make_linear(gate_up_DF2.t()), make_linear(down_FD.t()))


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate being the first half of the columns: [N, 2F] -> [N, F]."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def grouped_mlp(x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
    """y_ND: the first counts[0] rows through experts[0], the next counts[1] through experts[1], and so on.

    sum(counts) must be N. Each expert's weights are streamed from memory once, however many rows it has.
    """
    assert sum(counts) == len(x_ND), f"{sum(counts)} rows in groups, {len(x_ND)} given"
    y_ND = torch.empty_like(x_ND)
    start = 0
    for expert, count in zip(experts, counts, strict=True):
        rows = slice(start, start + count)
        y_ND[rows] = expert.down(swiglu(expert.gate_up(x_ND[rows])))
        start += count
    return y_ND


def grouped_mlp_reference(
    x_ND: torch.Tensor, gate_up_EDF2: torch.Tensor, down_EFD: torch.Tensor, expert_N: torch.Tensor
) -> torch.Tensor:
    """The slow twin that `grouped_mlp` must match: every row through its own expert, in plain torch."""
    rows = [swiglu(x_D @ gate_up_EDF2[e]) @ down_EFD[e] for x_D, e in zip(x_ND, expert_N.tolist(), strict=True)]
    return torch.stack(rows)
