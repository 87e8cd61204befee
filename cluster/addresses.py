"""What names a host, an address, a namespace, an operation. Plain Python: flags are checked with it, too."""

import re
import secrets

NAMESPACE = r"[A-Za-z0-9_-]{1,100}"
"""A namespace, as a regular expression. It becomes a part of file names."""
OPERATION_ID = r"[A-Za-z0-9._-]{1,64}"
TARGET = r"[A-Za-z0-9._:-]{1,253}"
"""What can be drained: a part or a node, before anybody has looked whether it exists."""
_LONGEST_HOST = 253


def new_operation_id(kind: str) -> str:
    """A name that no other operation has."""
    return f"{kind}-{secrets.token_hex(4)}"


def check_host(host: str) -> str:
    """The host, if it can be looked up. Raises ValueError, which says what is valid."""
    try:
        length = len(host.encode("idna"))  # as Python's sockets encode it
    except UnicodeError:
        length = 0
    if not 1 <= length <= _LONGEST_HOST or not host.isprintable() or " " in host:
        raise ValueError("it must be a host's name, or an IP address")
    return host


def split_address(address: str) -> tuple[str, int]:
    """Host and port of host:port; an IPv6 host may be in brackets. Raises ValueError, which says what is valid."""
    host, _, port = address.rpartition(":")
    if not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise ValueError("it must be host:port, with a port from 1 to 65535")
    return check_host(host.strip("[]")), int(port)
