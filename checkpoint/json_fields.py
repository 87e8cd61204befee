"""Reads the fields of a JSON object that may hold anything, with errors that name the field and its value."""

import sys
from collections.abc import Mapping
from typing import Any

from checkpoint.errors import CheckpointError, quoted

MAX_SIZE = 2**40
_JSON_NAMES = {dict: "object", list: "array", str: "string", int: "whole number"}


class Fields:
    """A JSON object. Its fields are read with a type check; errors name the field with its path."""

    def __init__(self, raw: Mapping[str, Any], source: str) -> None:
        self.raw = raw
        self.source = source

    def fail(self, key: str, value: object, expected: str) -> None:
        raise CheckpointError(f"{self.source}: {key} is {quoted(value)}; it must be {expected}")

    def get(self, key: str, kind: type, default: Any) -> Any:
        value = self.raw.get(key, default)
        if value is not None and not isinstance(value, kind):
            self.fail(key, value, f"a JSON {_JSON_NAMES[kind]}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.fail(key, value, "true or false")
        return bool(value)

    def positive(self, key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        value = self.raw.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.fail(key, value, "a whole number of at least 1")
        assert isinstance(value, int)
        if value > most:
            self.fail(key, value, f"at most {most}")
        return value

    def between(self, key: str, low: float, high: float) -> float:
        value = self.raw.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, value, f"a number from {low:g} to {high:g}")
        assert isinstance(value, (int, float))
        return float(value)

    def whole(self, key: str, low: int, high: int) -> int:
        value = self.between(key, low, high)
        if value != int(value):
            self.fail(key, value, "a whole number")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
            self.fail(key, value, "a finite number above 0")
        assert isinstance(value, (int, float))
        return float(value)

    def token_ids(self, key: str, default: int | None = None) -> tuple[int, ...]:
        """One, several or none."""
        value = self.raw.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        for token_id in ids:
            if not isinstance(token_id, int) or isinstance(token_id, bool):
                self.fail(key, token_id, "a token id, or a list of them")
        return tuple(ids)
