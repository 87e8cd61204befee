"""SwiGLU over rows sorted by expert, shared by processor cores.

Legend: N rows, D model width, F expert width.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch

from kernels.cores import Cores
from kernels.cpu.streamed_linear import MAX_ROWS
from kernels.cpu.streamed_mlp import streamed_mlp
from kernels.cpu.swiglu import swiglu_by_rows
from kernels.grouped_mlp import Activation, Expert, Group, StreamedWeights, compute_in_turn, groups_of, swiglu

# Streaming one expert's weights takes as long as computing so many rows with them.
_EXPERT_COST_ROWS = 64


class CpuGroupedMlp:
    """Reads each expert's weights from memory once, however many rows it has.

    Experts with up to MAX_ROWS rows use the streaming kernel, if it can read their weights.
    Many other experts are divided among the cores. Then no core waits at the end of each product.
    A few other experts are computed one by one, with all cores sharing each product.
    """

    def __init__(self, cores: Cores, dtype: torch.dtype) -> None:
        """cores: of as many threads as the calling thread's torch thread count.

        See `set_compute_threads`.
        """
        self._cores = cores
        self._shared_swiglu: Activation = swiglu
        self._own_swiglu: Activation = swiglu
        if dtype == torch.float32:
            self._shared_swiglu, self._own_swiglu = partial(swiglu_by_rows, cores=cores), swiglu_by_rows

    def __call__(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        streamed: list[tuple[StreamedWeights, Group]] = []
        others: list[Group] = []
        for group in groups_of(experts, counts, len(x_ND)):
            if group.count <= MAX_ROWS and group.expert.streamed is not None:
                streamed.append((group.expert.streamed, group))
            else:
                others.append(group)
        if len(others) == 1 and not streamed:
            expert = others[0].expert
            return expert.down(self._shared_swiglu(expert.gate_up(x_ND)))
        y_ND = torch.empty_like(x_ND)
        if streamed:
            firsts, lengths = [group.first for _, group in streamed], [group.count for _, group in streamed]
            streamed_mlp(self._cores, x_ND, [weights for weights, _ in streamed], firsts, lengths, y_ND)
        if others:
            self._compute(x_ND, others, y_ND)
        return y_ND

    def _compute(self, x_ND: torch.Tensor, groups: Sequence[Group], y_ND: torch.Tensor) -> None:
        threads = self._cores.threads
        if threads == 1 or len(groups) < 3 * threads:
            compute_in_turn(x_ND, groups, y_ND, self._shared_swiglu)
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
                compute_in_turn(x_ND, part, y_ND, self._own_swiglu)

        torch.set_num_threads(1)
        try:
            self._cores.run(work, len(parts))
        finally:
            torch.set_num_threads(threads)


def even_parts(costs: Sequence[int], num_parts: int) -> list[int]:
    """Bounds of num_parts consecutive parts of about equal cost: [1, 1, 1, 3], 2 -> [0, 3, 4]."""
    total, so_far, bounds = sum(costs), 0, [0]
    for index, cost in enumerate(costs):
        # The next part begins where the part's share ends, to within half an item.
        if len(bounds) < num_parts and so_far + cost / 2 > total * len(bounds) / num_parts and index > bounds[-1]:
            bounds.append(index)
        so_far += cost
    return bounds + [len(costs)] * (num_parts + 1 - len(bounds))
