"""The experts' arithmetic: SwiGLU over rows that are already sorted by expert.

Legend: N rows (one per token and chosen expert), D model width, F expert width, E experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from kernels.cores import Cores
from kernels.cpu.streamed_linear import MAX_ROWS
from kernels.cpu.streamed_mlp import streamed_mlp, streams
from kernels.linear import Linear, make_linear


@dataclass(frozen=True)
class Expert:
    """One expert's weights, laid out for the device: D -> 2F (gate first, then up) and F -> D.

    streams: `streamed_mlp` can read them.
    """

    gate_up: Linear
    down: Linear
    streams: bool

    @classmethod
    def of(cls, gate_up_F2D: torch.Tensor, down_DF: torch.Tensor) -> "Expert":
        """From weights that lie as [out, in]."""
        gate_up, down = make_linear(gate_up_F2D), make_linear(down_DF)
        return cls(gate_up, down, streams(gate_up, down))


def swiglu(gate_up_NF2: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, gate being the first half of the columns: [N, 2F] -> [N, F]."""
    gate_NF, up_NF = gate_up_NF2.chunk(2, dim=-1)
    return F.silu(gate_NF) * up_NF


@dataclass(frozen=True)
class _Group:
    """Rows first..first+count-1 belong to `expert`."""

    expert: Expert
    first: int
    count: int

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + self.count)


class GroupedMlp:
    """y_ND: the first counts[0] rows of x_ND through experts[0], the next counts[1] through experts[1], and so on.

    Each expert's weights are streamed from memory once, however many rows it has. With many experts, each core takes
    some of them, so that no core waits for another at the end of each product; with few, all cores share each.
    """

    def __init__(self, cores: Cores) -> None:
        """cores: as many as torch has threads in the thread that calls this; see `settle`."""
        self._cores = cores

    def __call__(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        assert sum(counts) == len(x_ND), f"{sum(counts)} rows in groups, {len(x_ND)} given"
        few: list[_Group] = []
        many: list[_Group] = []
        row = 0
        for expert, count in zip(experts, counts, strict=True):
            if count:
                (few if expert.streams and count <= MAX_ROWS else many).append(_Group(expert, row, count))
            row += count
        if len(many) == 1 and not few:
            expert = many[0].expert
            return expert.down(swiglu(expert.gate_up(x_ND)))
        y_ND = torch.empty_like(x_ND)
        if few:
            streamed_mlp(
                self._cores,
                x_ND,
                [group.expert.gate_up for group in few],
                [group.expert.down for group in few],
                [group.first for group in few],
                [group.count for group in few],
                y_ND,
            )
        if many:
            self._compute_many(x_ND, many, y_ND)
        return y_ND

    def _compute_many(self, x_ND: torch.Tensor, groups: Sequence[_Group], y_ND: torch.Tensor) -> None:
        threads = self._cores.threads
        if threads == 1 or len(groups) < 3 * threads:
            _put(y_ND, groups, _in_turn(x_ND, groups))
            return
        bounds = even_parts([_EXPERT_COST_ROWS + group.count for group in groups], threads)
        parts = [groups[begin:end] for begin, end in pairwise(bounds) if begin < end]

        @torch.inference_mode()  # a mode is a thread's own
        def work() -> None:
            while parts:
                try:
                    part = parts.pop()
                except IndexError:  # another thread was faster
                    return
                _put(y_ND, part, _in_turn(x_ND, part))

        torch.set_num_threads(1)
        try:
            self._cores.run(work, len(parts))
        finally:
            torch.set_num_threads(threads)


def _in_turn(x_ND: torch.Tensor, groups: Sequence[_Group]) -> torch.Tensor:
    """The groups' results, one after the other."""
    # What is done to each expert's few rows costs as much for one as for all: it is done for all at once.
    h_NF = swiglu(torch.cat([group.expert.gate_up(x_ND[group.rows]) for group in groups]))
    split = h_NF.split([group.count for group in groups])
    return torch.cat([group.expert.down(rows) for group, rows in zip(groups, split, strict=True)])


def _put(y_ND: torch.Tensor, groups: Sequence[_Group], results_ND: torch.Tensor) -> None:
    for group, rows in zip(groups, results_ND.split([group.count for group in groups]), strict=True):
        y_ND[group.rows] = rows


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


def grouped_mlp_reference(
    x_ND: torch.Tensor, gate_up_EDF2: torch.Tensor, down_EFD: torch.Tensor, expert_N: torch.Tensor
) -> torch.Tensor:
    """The slow twin that `grouped_mlp` must match: every row through its own expert, in plain torch."""
    rows = [swiglu(x_D @ gate_up_EDF2[e]) @ down_EFD[e] for x_D, e in zip(x_ND, expert_N.tolist(), strict=True)]
    return torch.stack(rows)
