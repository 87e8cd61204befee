"""Finds free ports below 32768, where Linux does not pick ports for outgoing connections.

Asking the system for any free port (port 0) is not safe: an outgoing connection may take that port
before we open it.
"""

import random
import socket

from checkpoint.errors import DroverError

_SERVE = range(20_000, 32_000)
_OURS = range(32_000, 32_768)


def free_ports(count: int) -> list[int]:
    """`count` consecutive free ports for a deployment's own listeners. Raises DroverError."""
    return _free_block(count, _OURS)


def free_serve_ports(count: int) -> list[int]:
    """The same for Ray Serve's listeners, from a range that `free_ports` never uses."""
    return _free_block(count, _SERVE)


def _free_block(count: int, ports: range) -> list[int]:
    for _ in range(200):
        first = random.randrange(ports.start, ports.stop - count)
        block = list(range(first, first + count))
        if all(_is_free(port) for port in block):
            return block
    raise DroverError(f"no block of {count} free ports between {ports.start} and {ports.stop}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
