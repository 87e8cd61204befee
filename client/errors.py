"""The errors of a call.

ClientError              any status that is not OK; `code` tells which
├── InvalidRequest       INVALID_ARGUMENT: a field is wrong; the message names it
├── NotFound             NOT_FOUND: no such model, or no such service
├── ResourceExhausted    RESOURCE_EXHAUSTED: the server is full, or the request can never fit
├── DeadlineExceeded     DEADLINE_EXCEEDED: the call's own timeout_s passed
└── ServerUnavailable    UNAVAILABLE: no server answers, or a part of it is down; try again
"""

import re
from collections.abc import Iterable
from typing import Any, Literal

import grpc


class ClientError(Exception):
    """A call failed. `str(error)` is a complete message for the user. code: the gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["ClientError"], tuple[grpc.StatusCode, str]]:
        return type(self), (self.code, self.message)


class InvalidRequest(ClientError):
    """A field of the request is wrong; the message names it."""


class NotFound(ClientError):
    """The server has no such model or service."""


class ResourceExhausted(ClientError):
    """The server is full, or the request can never fit.

    retry_after_s: seconds after which the server suggests to try again; None if it suggests none.
    """

    retry_after_s: float | None = None


class DeadlineExceeded(ClientError):
    """The call's own timeout_s passed."""


class ServerUnavailable(ClientError):
    """No server answers at the address, or a part of it is down. The same call may work later.

    connection: "none": none was made. "broken": it broke, or HAProxy broke the call off. "up": the
    server itself said that it is unavailable.
    """

    connection: Literal["none", "broken", "up"] = "up"


_ERROR_TYPES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED: ResourceExhausted,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.UNAVAILABLE: ServerUnavailable,
}
# grpc's messages when this process has cancelled the call.
_CANCELLED_HERE = ("Locally cancelled by application!", "Channel closed!")
# HAProxy's answers when it has no frontend replica for a call: it knows none, or none took the call.
_NO_REPLICA = {
    grpc.StatusCode.NOT_FOUND: "Ping /ray.serve.RayServeAPIService/ListApplications",
    grpc.StatusCode.UNKNOWN: "Received http2 header with status: 500",
}
# grpc's messages when no connection was made, and when it broke. Every other UNAVAILABLE comes from
# a server.
_NO_CONNECTION = ("failed to connect", "errors resolving", "DNS resolution failed", "Name resolution failure")
_BROKEN = ("Socket closed", "Connection reset", "recvmsg:", "sendmsg:", "Broken pipe", "GOAWAY", "Stream removed")


# Ray Serve 2.60 drops the trailing metadata of a failed stream, so the hint is also in the message.
_RETRY_HINT = re.compile(r"; try again in ([0-9.e+-]+) s$")


def _retry_after_s(metadata: Iterable[tuple[str, str]] | None, message: str) -> float | None:
    pushback_ms = dict(metadata or ()).get("grpc-retry-pushback-ms")
    if pushback_ms is not None:
        return int(pushback_ms) / 1e3
    hint = _RETRY_HINT.search(message)
    return float(hint[1]) if hint else None


def error_of(error: grpc.RpcError, address: str) -> ClientError:
    """The ClientError for an error that grpc raised during a call to `address`."""
    call: Any = error  # grpc raises objects that are both RpcError and Call, which its type stubs do not say
    code, message = call.code(), call.details() or ""
    connection: Literal["none", "broken", "up"] = "up"
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith(_NO_CONNECTION):
        connection, message = "none", f"no server answers at {address} ({message})"
    elif code is grpc.StatusCode.UNAVAILABLE and message.startswith(_BROKEN):
        connection = "broken"
    elif code is grpc.StatusCode.DEADLINE_EXCEEDED:
        message = f"{address} did not finish in time: {message}"
    elif _is_broken_off(code, message):
        connection = "broken"
        code, message = grpc.StatusCode.UNAVAILABLE, f"{address} broke the call off; try again ({message})"
    made = _ERROR_TYPES.get(code, ClientError)(code, message or f"{address} answered {code.name} without a message")
    if isinstance(made, ResourceExhausted):
        made.retry_after_s = _retry_after_s(call.trailing_metadata(), message)
    if isinstance(made, ServerUnavailable):
        made.connection = connection
    return made


def _is_broken_off(code: grpc.StatusCode, message: str) -> bool:
    """Whether HAProxy ended the call because a frontend replica died, or none is there.

    It resets the streams of a dead replica, which grpc shows as CANCELLED.
    """
    if code is grpc.StatusCode.CANCELLED:
        return not any(text in message for text in _CANCELLED_HERE)
    return code in _NO_REPLICA and _NO_REPLICA[code] in message
