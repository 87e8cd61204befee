"""How every subcommand reads its arguments: mistakes that are one line, and numbers with a range."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """Answers wrong usage with one line, which names --help. Its subparsers do so too."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuses unknown arguments at once: the subcommand then names itself, and not `drover`."""
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: error: {message}; see `{self.prog} --help`\n")


def whole(minimum: int, maximum: int | None = None) -> Callable[[str], int]:
    """An argparse type: whole numbers from `minimum` to `maximum`."""
    valid = f"of at least {minimum}" if maximum is None else f"from {minimum} to {maximum}"

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum or (maximum is not None and number > maximum):
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number {valid}")
        return number

    return read


def real(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: finite numbers from `low`, or only above it, to `high`."""
    if high == math.inf:
        valid = f"finite number above {low:g}" if above else f"finite number of at least {low:g}"
    else:
        valid = f"number above {low:g} and at most {high:g}" if above else f"number from {low:g} to {high:g}"

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not math.isfinite(number) or not low <= number <= high or (above and number == low):
            raise argparse.ArgumentTypeError(f"{text!r} is no {valid}")
        return number

    return read
