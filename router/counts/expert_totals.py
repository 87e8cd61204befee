"""What one router has computed of each expert, as plain data. Legend: L MoE layers, E experts."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ExpertTotals:
    """Counted since the process started; from one snapshot to the next they only grow.

    incarnation: another one counts from 0. tokens_LE: rows of each expert. reads_LE: steps in which
    it had any, so that its weights were read.
    """

    incarnation: str
    tokens_LE: Counts
    reads_LE: Counts
