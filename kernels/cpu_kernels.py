"""The kernels of a CPU: packed weights, and compiled loops that several cores share."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.attention_loops import AttentionLoops
from kernels.cores import Cores
from kernels.cpu.streamed_linear import StreamedLinear, is_streamable
from kernels.cpu.streamed_mlp import streamed_weights
from kernels.cpu_grouped_mlp import CpuGroupedMlp
from kernels.grouped_mlp import Expert
from kernels.linear import Linear
from kernels.norm import Norm


class CpuKernels:
    """Made by `choose_kernels`, which knows what suits the processor and the dtype."""

    device = torch.device("cpu")

    def __init__(
        self,
        dtype: torch.dtype,
        cores: Cores,
        *,
        pack_layer: Callable[[torch.Tensor], Linear],
        pack_expert: Callable[[torch.Tensor], Linear],
        streams: bool,
        norm: Callable[[torch.Tensor, float], Norm],
        attention_loops: AttentionLoops | None,
    ) -> None:
        """Each pack makes a layer of a weight: pack_layer for `linear`, pack_expert for `expert`.

        streams: whether layers that suit the streaming kernel use it.
        """
        self.dtype, self.cores, self.attention_loops = dtype, cores, attention_loops
        self._pack_layer, self._pack_expert = pack_layer, pack_expert
        self._streams, self._norm = streams, norm
        self._grouped_mlp = CpuGroupedMlp(cores, dtype)

    def linear(self, weight_OI: torch.Tensor) -> Linear:
        packed = self._pack_layer(weight_OI)
        return StreamedLinear(packed, self.cores) if self._streams and is_streamable(packed) else packed

    def norm(self, weight_D: torch.Tensor, eps: float) -> Norm:
        return self._norm(weight_D, eps)

    def expert(self, gate_up_F2D: torch.Tensor, down_DF: torch.Tensor) -> Expert:
        gate_up, down = self._pack_expert(gate_up_F2D), self._pack_expert(down_DF)
        return Expert(gate_up, down, streamed_weights(gate_up, down) if self._streams else None)

    def grouped_mlp(self, x_ND: torch.Tensor, experts: Sequence[Expert], counts: Sequence[int]) -> torch.Tensor:
        return self._grouped_mlp(x_ND, experts, counts)

    def zeros(self, *shape: int) -> torch.Tensor:
        # NumPy takes pages that the system zeroes when they are first touched. torch would touch
        # them all now.
        return torch.from_numpy(np.zeros(math.prod(shape) * self.dtype.itemsize, np.uint8)).view(self.dtype).view(shape)
