"""Muon: momentum whose every matrix is replaced by the nearest orthogonal one (Jordan et al. 2024).

Against AdamW at the same time it reached a lower loss here (README). The orthogonal matrix comes from five steps of
a quintic Newton-Schulz iteration with the coefficients of https://kellerjordan.github.io/posts/muon/.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """For matrices [rows, columns] and stacks of them [experts, rows, columns]; the rest goes to AdamW."""

    def __init__(self, weights: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(momentum, group["momentum"])  # Nesterov's
                update = orthogonalized(ahead)
                # As large as AdamW's update, whatever the matrix's shape (Liu et al. 2025, section 2.2).
                scale = 0.2 * max(weight.shape[-2:]) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonalized(matrix: Tensor) -> Tensor:
    """U V' of the matrix's singular value decomposition U S V', nearly: singular values end between 0.6 and 1.3."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = (matrix if wide else matrix.mT).bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * (gram @ gram)) @ x
    result: Tensor = (x if wide else x.mT).to(matrix.dtype)
    return result
