"""What carries the rows of messages beside the pair that announces them."""

from typing import Protocol

import torch


class RowChannel(Protocol):
    """Carries a message's rows beside the Pair that carries its header.

    Legend: N rows, D model width.
    """

    def send(self, x_ND: torch.Tensor) -> None:
        """Send rows whose number the peer learns from the header."""
        ...

    def receive(self, rows: int, timeout_s: float) -> torch.Tensor:
        """x_ND, valid until the next but one receive. Raises ConnectionError if it takes too long."""
        ...

    def close(self) -> None: ...
