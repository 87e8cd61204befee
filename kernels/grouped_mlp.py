"""The experts' arithmetic: SwiGLU over rows that are already sorted by expert, in plain torch.

Legend: N rows (one per token and chosen expert), D model width, F expert width, E experts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kernels.linear import Linear


@dataclass(frozen=True)
class StreamedWeights:
    """Where an expert's two weights lie in memory, as streamed_mlp reads them.

    gate_up, down: addresses, valid as long as the expert lives. width: F.
    """

    gate_up: int
    down: int
    width: int


@dataclass(frozen=True)
class Expert:
    """One expert's weights, laid out for the device: D -> 2F (gate first, then up) and F -> D.

    streamed: for groups of few rows. None: streamed_mlp cannot read these weights.
    """

    gate_up: Linear
    down: Linear
    streamed: StreamedWeights | None = None


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate being the first half of the columns: [N, 2F] -> [N, F]."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


Activation = Callable[[torch.Tensor], torch.Tensor]
"""`swiglu`, or what computes the same."""


@dataclass(frozen=True)
class Group:
    """Rows first..first+count-1 belong to `expert`."""

    expert: Expert
    first: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


def groups_of(experts: Sequence[Expert], counts: Sequence[int], num_rows: int) -> list[Group]:
    """The groups of rows that are not empty: counts[0] rows for experts[0], the next counts[1] for
    experts[1], ..."""
    assert sum(counts) == num_rows, f"{sum(counts)} rows in groups, {num_rows} given"
    groups, first = [], 0
    for expert, count in zip(experts, counts, strict=True):
        if count:
            groups.append(Group(expert, first, count))
        first += count
    return groups


def compute_in_turn(x_ND: torch.Tensor, groups: Sequence[Group], y_ND: torch.Tensor, activate: Activation) -> None:
    """Put each group's result into its rows of y_ND, one expert after the other."""
    # Steps that cost as much for one expert's few rows as for all rows are taken once, for all.
    h_NF = activate(torch.cat([group.expert.gate_up(x_ND[group.rows]) for group in groups]))
    for group, rows_NF in zip(groups, h_NF.split([group.count for group in groups]), strict=True):
        y_ND[group.rows] = group.expert.down(rows_NF)


def grouped_mlp(x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
    """y_ND: the first counts[0] rows of x_ND through experts[0], the next counts[1] through
    experts[1], and so on."""
    y_ND = torch.empty_like(x_ND)
    if groups := groups_of(experts, counts, len(x_ND)):
        compute_in_turn(x_ND, groups, y_ND, swiglu)
    return y_ND


def grouped_mlp_reference(
    x_ND: torch.Tensor, gate_up_EDF2: torch.Tensor, down_EFD: torch.Tensor, expert_N: torch.Tensor
) -> torch.Tensor:
    """What every `grouped_mlp` must give: each row through its own expert, in plain torch."""
    rows = [swiglu(x_D @ gate_up_EDF2[e]) @ down_EFD[e] for x_D, e in zip(x_ND, expert_N.tolist(), strict=True)]
    return torch.stack(rows)
