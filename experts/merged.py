"""Requests of several routers for one layer, computed in one go.

An expert that several routers ask for is then read from memory once. Each row's result is the same
as alone, because the rows of an expert do not mix.

Legend: N rows of all requests, D model width.
"""

from collections.abc import Sequence

import numpy as np
import torch

from experts.wire import Message


class Merged:
    """The rows of some requests, sorted by expert, and the way back."""

    def __init__(self, requests: Sequence[Message]) -> None:
        """requests: of one layer, with rows; see `can_join`."""
        version_of = {expert: version for request in requests for expert, version in _slots(request)}
        self.layer = requests[0].layer
        self.experts = sorted(version_of)
        self.versions = [version_of[expert] for expert in self.experts]
        expert_N = np.concatenate([np.repeat(request.experts, request.counts) for request in requests])
        self.counts = [int(count) for count in np.bincount(expert_N) if count]
        self._sort_N = torch.from_numpy(np.argsort(expert_N, kind="stable"))
        rows = [request.x_ND for request in requests if request.x_ND is not None]
        self._lengths = [len(x_ND) for x_ND in rows]
        self.x_ND = torch.cat(rows)[self._sort_N]

    def split(self, y_ND: torch.Tensor) -> Sequence[torch.Tensor]:
        """The answers to the requests, in their order, from that to all rows."""
        unsorted_ND = torch.empty_like(y_ND)
        unsorted_ND[self._sort_N.to(y_ND.device)] = y_ND
        answers: Sequence[torch.Tensor] = unsorted_ND.split(self._lengths)
        return answers


def can_join(request: Message, others: Sequence[Message]) -> bool:
    """Whether `request` may be merged with `others`: the same layer, and nobody wants other weights of an expert."""
    wanted = dict(slot for other in others for slot in _slots(other))
    return request.layer == others[0].layer and all(
        wanted.get(expert, version) == version for expert, version in _slots(request)
    )


def is_sound(request: Message) -> bool:
    """Whether its counts are those of its rows; one that is not must fail alone."""
    return request.x_ND is not None and min(request.counts, default=0) > 0 and sum(request.counts) == len(request.x_ND)


def _slots(request: Message) -> list[tuple[int, int]]:
    return list(zip(request.experts, request.versions, strict=True))
