"""A Python client for a Drover server.

Needs only grpc and the generated stubs, neither Ray nor torch.
"""

from client.client import DEFAULT_ADDRESS, Client
from client.delta_stream import DeltaStream
from client.errors import (
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    ServerUnavailable,
)
from client.types import (
    Delta,
    Message,
    ModelInfo,
    PromptLogprob,
    Sampling,
    TokenAlternative,
    TokenLogprob,
    Usage,
)

__all__ = [
    "DEFAULT_ADDRESS",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "Delta",
    "DeltaStream",
    "InvalidRequest",
    "Message",
    "ModelInfo",
    "NotFound",
    "PromptLogprob",
    "ResourceExhausted",
    "Sampling",
    "ServerUnavailable",
    "TokenAlternative",
    "TokenLogprob",
    "Usage",
]
