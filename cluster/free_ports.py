"""Ports that nobody uses, below 32768, where Linux does not pick ports for outgoing connections.

A port that the system picks (port 0) may be given to such a connection before its owner opens it.
"""

import random
import socket

from checkpoint.errors import DroverError

_SERVE = range(20_000, 32_000)
_OURS = range(32_000, 32_768)


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago, for a deployment's own listeners. Raises DroverError."""
    return _free_block(count, _OURS)


def free_serve_ports(count: int) -> list[int]:
    """The same, one after the other, for what Ray Serve opens; never one that `free_ports` gives."""
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
