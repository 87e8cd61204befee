"""Why one request cannot be answered; `frontend/status.py` maps each to its gRPC status.

RequestError
├── InvalidArgument      a field's value is wrong; the message names it
├── NotFound             the model is not served here
├── ResourceExhausted    the queue is full, or the request can never fit
└── Unavailable          a router or an expert shard is down; try again
"""

from checkpoint.errors import DroverError


class RequestError(DroverError):
    """One request cannot be answered; the server goes on."""


class InvalidArgument(RequestError):
    """A field of the request has a value that is not valid.

    field: its name in the .proto file.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self._message = message

    def __reduce__(self) -> tuple[type["InvalidArgument"], tuple[str, str]]:
        # Errors cross processes inside deltas; the default would call the constructor with the joined text alone.
        return type(self), (self.field, self._message)


class NotFound(RequestError):
    """The request names a model that is not served."""


class ResourceExhausted(RequestError):
    """The waiting queue is full, or the request needs more than the server has."""


class Unavailable(RequestError):
    """A part that the request needs is down; the same request may work later."""
