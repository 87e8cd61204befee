"""The wire contract is documented, and its Python stubs are those that protoc makes today."""

import re
from pathlib import Path

import pytest

from protos.generate import PROTO_ROOT, generate

PROTOS = sorted(PROTO_ROOT.rglob("*.proto"))
# What a reader of the contract may ask about: what a line declares, and under which name.
DECLARATION = re.compile(
    r"^(?:(?:service|message|enum|oneof|rpc) (?P<thing>\w+)|"
    r"(?:optional |repeated )?(?:map<\w+, [\w.]+>|[\w.]+) (?P<field>\w+) = \d+;|"
    r"(?P<value>[A-Z_]+) = \d+;)"
)


def undescribed(proto: str) -> list[str]:
    """The declarations of a .proto file without a comment, above them or on their line; with their line numbers."""
    found, previous = [], ""
    for number, line in enumerate(map(str.strip, proto.splitlines()), start=1):
        match = DECLARATION.match(line)
        if match and "//" not in line and not previous.startswith("//"):
            found.append(f"{number}: {match['thing'] or match['field'] or match['value']}")
        previous = line
    return found


def test_the_check_sees_what_lacks_a_comment() -> None:
    proto = """
    // Described.
    message Described {
      // Described.
      string described = 1;
      uint32 also_described = 2;  // here
      repeated Other bare = 3;
      oneof bare_too { }
      map<uint32, float> bare_map = 4;
    }
    """
    assert undescribed(proto) == ["7: bare", "8: bare_too", "9: bare_map"]


@pytest.mark.parametrize("proto", PROTOS, ids=lambda proto: proto.stem)
def test_everything_in_the_contract_is_described(proto: Path) -> None:
    assert undescribed(proto.read_text()) == []


def test_the_stubs_are_current(tmp_path: Path) -> None:
    for fresh in generate(tmp_path):
        committed = PROTO_ROOT / fresh.relative_to(tmp_path)
        if fresh.read_text() != committed.read_text():
            pytest.fail(f"{committed.name} is not what its .proto says; run `make protos`")
