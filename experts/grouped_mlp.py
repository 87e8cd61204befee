"""The experts' arithmetic: SwiGLU over rows that are already sorted by expert.

Legend: N rows (one per token and chosen expert), D model width, F expert width, E experts.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
import torch.nn.functional as F

from experts.linear import Linear, make_linear
from experts.streamed_mlp import MAX_ROWS, streamed_mlp, streams


@dataclass(frozen=True)
class Expert:
    """One expert's weights, laid out for the device: D -> 2F (gate first, then up) and F -> D.

    streams: `streamed_mlp` can read them.
    """

    gate_up: Linear
    down: Linear
    streams: bool


def make_expert(gate_up_DF2: torch.Tensor, down_FD: torch.Tensor) -> Expert:
    """From the checkpoint's layout, [in, out], to the device's."""
    gate_up, down = make_linear(gate_up_DF2.t()), make_linear(down_FD.t())
    return Expert(gate_up, down, streams(gate_up) and streams(down))


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate being the first half of the columns: [N, 2F] -> [N, F]."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


def grouped_mlp(x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
    """y_ND: the first counts[0] rows through experts[0], the next counts[1] through experts[1], and so on.

    sum(counts) must be N. Each expert's weights are streamed from memory once, however many rows it has.
    """
    assert sum(counts) == len(x_ND), f"{sum(counts)} rows in groups, {len(x_ND)} given"
    parts, row = [x_ND[:0]], 0
    by_kind = groupby(zip(experts, counts, strict=True), lambda pair: pair[0].streams and pair[1] <= MAX_ROWS)
    for is_streamed, pairs in by_kind:
        some, some_counts = zip(*pairs, strict=True)
        rows = sum(some_counts)
        parts.append((_streamed if is_streamed else _in_turn)(x_ND[row : row + rows], some, some_counts))
        row += rows
    return torch.cat(parts)


def _streamed(x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
    return streamed_mlp(x_ND, [expert.gate_up for expert in experts], [expert.down for expert in experts], counts)


def _in_turn(x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
    # What is done to each expert's few rows costs as much for one as for all: it is done for all at once.
    gate_up = [expert.gate_up(rows) for expert, rows in zip(experts, x_ND.split(list(counts)), strict=True)]
    h_NF = swiglu(torch.cat(gate_up))
    return torch.cat([expert.down(rows) for expert, rows in zip(experts, h_NF.split(list(counts)), strict=True)])


class GroupedMlp:
    """`grouped_mlp` on several processor cores.

    With many experts, each core takes some of them, so that no core waits for another at the end of each product. With
    few experts, all cores share each.
    """

    def __init__(self, threads: int) -> None:
        """threads: cores to use; must be torch's number of threads where this is called."""
        self._threads = threads
        self._others = ThreadPoolExecutor(max(1, threads - 1), "experts", torch.set_num_threads, (1,))

    def __call__(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        if self._threads == 1 or len(experts) < 3 * self._threads:
            return grouped_mlp(x_ND, experts, counts)
        bounds = even_parts([_EXPERT_COST_ROWS + count for count in counts], self._threads)
        parts, row = [], 0
        for begin, end in pairwise(bounds):
            rows = sum(counts[begin:end])
            parts.append((x_ND[row : row + rows], experts[begin:end], counts[begin:end]))
            row += rows
        others = [self._others.submit(_inference, grouped_mlp, *part) for part in parts[1:]]
        torch.set_num_threads(1)
        try:
            first = grouped_mlp(*parts[0])
        finally:
            torch.set_num_threads(self._threads)
        return torch.cat([first, *(other.result() for other in others)])


# Streaming one expert's weights takes as long as computing so many rows with them.
_EXPERT_COST_ROWS = 64


def even_parts(costs: Sequence[int], num_parts: int) -> list[int]:
    """Bounds of num_parts consecutive parts of about equal cost: [1, 1, 1, 3], 2 -> [0, 3, 4]."""
    total, so_far, bounds = sum(costs), 0, [0]
    for index, cost in enumerate(costs):
        # The next part begins where the part's share ends, to within half an item.
        if len(bounds) < num_parts and so_far + cost / 2 > total * len(bounds) / num_parts and index > bounds[-1]:
            bounds.append(index)
        so_far += cost
    return bounds + [len(costs)] * (num_parts + 1 - len(bounds))


@torch.inference_mode()
def _inference(work: Callable[..., torch.Tensor], *arguments: Any) -> torch.Tensor:
    return work(*arguments)  # a mode is a thread's own


def grouped_mlp_reference(
    x_ND: torch.Tensor, gate_up_EDF2: torch.Tensor, down_EFD: torch.Tensor, expert_N: torch.Tensor
) -> torch.Tensor:
    """The slow twin that `grouped_mlp` must match: every row through its own expert, in plain torch."""
    rows = [swiglu(x_D @ gate_up_EDF2[e]) @ down_EFD[e] for x_D, e in zip(x_ND, expert_N.tolist(), strict=True)]
    return torch.stack(rows)
