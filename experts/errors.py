"""What can go wrong between a router and an expert shard.

LinkDown            no answer came; the shard may or may not have computed
ShardRefused        the shard answered, but did not compute the rows
├── NotHeld         it does not hold an expert, or holds another version of its weights: route the rows anew
└── ComputeFailed   computing failed, and may fail on any shard: do not resend the rows for ever
"""

from enum import IntEnum


class RefusalCode(IntEnum):
    """Why a shard refuses, as it travels on the wire."""

    NOT_HELD = 1
    COMPUTE_FAILED = 2


class LinkDown(Exception):
    """No answer comes over the link to a shard: it has died, went silent, or was never reached.

    The message says which.
    """


class ShardRefused(Exception):
    """A shard answered that it did not compute the rows. code: why."""

    code: RefusalCode


class NotHeld(ShardRefused):
    """The shard does not hold an expert that was asked for, or not at that version."""

    code = RefusalCode.NOT_HELD


class ComputeFailed(ShardRefused):
    """The shard holds the experts, but computing with them failed: a defect, or memory that ran
    out."""

    code = RefusalCode.COMPUTE_FAILED


def refusal(code: RefusalCode, text: str) -> ShardRefused:
    """The error that a refusal with this code stands for."""
    return {RefusalCode.NOT_HELD: NotHeld, RefusalCode.COMPUTE_FAILED: ComputeFailed}[code](text)
