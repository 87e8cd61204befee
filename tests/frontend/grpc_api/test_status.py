"""The exception tree as gRPC statuses."""

import asyncio

import pytest
from grpc import StatusCode

from checkpoint.errors import CheckpointError
from frontend.grpc_api.status import MAX_DETAILS_BYTES, status_of
from router.errors import (
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    RequestError,
    ResourceExhausted,
    Unavailable,
)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidArgument("prompt", "is empty"), StatusCode.INVALID_ARGUMENT),
        (NotFound("no such model"), StatusCode.NOT_FOUND),
        (AlreadyExists("request a is under way already"), StatusCode.ALREADY_EXISTS),
        (ResourceExhausted("the queue is full"), StatusCode.RESOURCE_EXHAUSTED),
        (DeadlineExceeded("too late"), StatusCode.DEADLINE_EXCEEDED),
        (Unavailable("shard 1 is down"), StatusCode.UNAVAILABLE),
        (Internal("the model's logits are not finite numbers here"), StatusCode.INTERNAL),
        (CheckpointError("config.json: is missing"), StatusCode.FAILED_PRECONDITION),
    ],
)
def test_a_users_error_keeps_its_message(error: Exception, code: StatusCode) -> None:
    assert status_of(error) == (code, str(error))


def test_every_kind_of_request_error_has_a_status_of_its_own() -> None:
    codes = {status_of(kind.__new__(kind))[0] for kind in RequestError.__subclasses__()}
    assert len(codes) == len(RequestError.__subclasses__())


def test_any_other_error_is_logged_and_told_briefly(caplog: pytest.LogCaptureFixture) -> None:
    code, message = status_of(KeyError("internals"))
    assert code is StatusCode.INTERNAL
    assert "internals" not in message
    assert "internals" in caplog.text


def test_cancellation_is_not_swallowed() -> None:
    with pytest.raises(asyncio.CancelledError):
        status_of(asyncio.CancelledError())


def test_a_long_message_is_cut_to_fit_the_trailers() -> None:
    _, message = status_of(NotFound("ü" * 100_000))
    assert len(message.encode()) <= MAX_DETAILS_BYTES + 3
