"""What carries the rows of messages beside the pair that announces them."""

from typing import Protocol

import torch


class RowChannel(Protocol):
    """Carries a message's rows beside the connection that carries its header.

    Legend: N rows, D model width.
    """

    def send(self, x_ND: torch.Tensor) -> None:
        """Send rows whose number the peer learns from the header. Raises ConnectionError."""
        ...

    def receive(self, rows: int) -> torch.Tensor:
        """x_ND, the caller's own, once it has arrived.

        However long that takes: only `close` ends the wait, with a ConnectionError.
        """
        ...

    def close(self) -> None:
        """End every send and receive. Harmless on a closed one."""
        ...
