"""Why one request cannot be answered; `frontend/grpc_api/status.py` maps each to its gRPC status.

RequestError
├── InvalidArgument      a field's value is wrong; the message names it
├── NotFound             the model is not served here
├── AlreadyExists        a request with this id is under way already
│   └── Resumed              another call has resumed this one
├── ResourceExhausted    the queue is full, or the request can never fit
├── DeadlineExceeded     the client's deadline passed first
├── Unavailable          a router or an expert shard is down; try again
│   ├── RouterUnavailable    this router is ending; another may answer
│   │   └── NotTaken             it is loading or draining, and has not queued the request
│   └── ExpertsAway          this router has reached no shard with its experts for too long
└── Internal             computing this one request failed
"""

from checkpoint.errors import DroverError


class RequestError(DroverError):
    """One request cannot be answered; the server goes on."""


class InvalidArgument(RequestError):
    """A field of the request has a value that is not valid.

    field: its bare name, such as "max_tokens"; a protocol's edge adds the path that its clients know.
    reason: what is wrong with the value.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason

    def __reduce__(self) -> tuple[type["InvalidArgument"], tuple[str, str]]:
        # Errors cross processes inside deltas; the default would call the constructor with the
        # joined text alone.
        return type(self), (self.field, self.reason)


class NotFound(RequestError):
    """The request names a model that is not served."""


class AlreadyExists(RequestError):
    """A request with the same id is under way already; that one goes on."""


class Resumed(AlreadyExists):
    """Another call has resumed this one, and goes on in its place."""

    def __init__(self) -> None:
        super().__init__("another call has resumed this one, and goes on in its place")

    def __reduce__(self) -> tuple[type["Resumed"], tuple[()]]:
        return type(self), ()


class ResourceExhausted(RequestError):
    """The waiting queue is full, or the request needs more than the server has.

    retry_after_s: when it may be worth trying again; None: never.
    """

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        hint = "" if retry_after_s is None else f"; try again in {retry_after_s:.2g} s"
        super().__init__(message + hint)
        self.retry_after_s = retry_after_s
        self._message = message

    def __reduce__(self) -> tuple[type["ResourceExhausted"], tuple[str, float | None]]:
        return type(self), (self._message, self.retry_after_s)


class DeadlineExceeded(RequestError):
    """The client's deadline passed before the request was done."""


class Unavailable(RequestError):
    """A part that the request needs is down; the same request may work later."""


class ExpertsAway(Unavailable):
    """This router has reached no shard that holds some of the request's experts, for heal_s."""


class RouterUnavailable(Unavailable):
    """This router cannot answer: it is loading, draining or ending.

    The request did not cause it, so another router may answer.
    """


class NotTaken(RouterUnavailable):
    """This router is loading or draining. It has never queued the request, which is as new as before."""


class Internal(RequestError):
    """Computing this one request failed, through no fault of its own. Others are not concerned."""
