"""The one place where Drover's errors become gRPC statuses."""

import logging
import math

import grpc

from checkpoint.errors import DroverError
from router.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)

logger = logging.getLogger(__name__)

# A status travels in HTTP/2 trailers, which peers limit to 8 KiB, and there each byte may become
# three (%XX).
MAX_DETAILS_BYTES = 2_000

_CODES: tuple[tuple[type[Exception], grpc.StatusCode], ...] = (
    (InvalidArgument, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),
    (ResourceExhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded, grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (Internal, grpc.StatusCode.INTERNAL),
    (DroverError, grpc.StatusCode.FAILED_PRECONDITION),
)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """The status code and message with which a call that failed with `error` ends.

    An error that is no DroverError is a fault of the program: it is logged with its traceback, and
    the client learns only its type. CancelledError, KeyboardInterrupt and the like are raised
    again.
    """
    if not isinstance(error, Exception):
        raise error
    for error_type, code in _CODES:
        if isinstance(error, error_type):
            return code, _shortened(str(error))
    logger.error("a call failed", exc_info=error)
    return grpc.StatusCode.INTERNAL, f"internal error ({type(error).__name__}); the server's log has the details"


def metadata_of(error: BaseException) -> tuple[tuple[str, str], ...]:
    """Trailing metadata of a call that failed with `error`: when to try again, as gRPC's retry
    design (A6) has it."""
    if isinstance(error, ResourceExhausted) and error.retry_after_s is not None:
        return (("grpc-retry-pushback-ms", str(math.ceil(error.retry_after_s * 1e3))),)
    return ()


def _shortened(message: str) -> str:
    encoded = message.encode("utf-8", "replace")
    if len(encoded) <= MAX_DETAILS_BYTES:
        return message
    return encoded[:MAX_DETAILS_BYTES].decode("utf-8", "ignore") + "..."
