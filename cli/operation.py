"""Follows an operation that a command has begun: bars on a terminal, or else a line for each change."""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from types import TracebackType
from typing import TYPE_CHECKING

from checkpoint.errors import DroverError, quoted

if TYPE_CHECKING:
    from cluster.controller_client import ControllerClient
    from cluster.reports import OperationStatus

LOOK_S = 0.25


def add_operation_options(parser: argparse.ArgumentParser) -> None:
    """Add the flags of commands that begin an operation."""
    parser.add_argument(
        "--operation-id",
        type=_operation_id,
        metavar="ID",
        help="name it; the same command with the same name goes on with it; default: a new name",
    )
    parser.add_argument("--no-wait", action="store_true", help="return as soon as it has begun")
    parser.add_argument("--json", action="store_true", help="print the operation as one JSON object")


def _operation_id(text: str) -> str:
    from cluster.addresses import OPERATION_ID

    if not re.fullmatch(OPERATION_ID, text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} must have from 1 to 64 letters, digits, '-', '_' and '.'")
    return text


@contextmanager
def going_on(operation_id: str) -> Iterator[None]:
    """Ctrl-C during the block ends the command alone, and says so."""
    try:
        yield
    except KeyboardInterrupt:
        print(
            f"\n{operation_id} goes on; drover status --watch shows it, drover abort {operation_id} ends it",
            file=sys.stderr,
        )
        raise


def finish(controller: "ControllerClient", operation_id: str, args: argparse.Namespace) -> int:
    """Wait for the end of an operation, unless the flags say not to, and print how it is; returns the exit code.

    Raises DroverError if it was aborted.
    """
    began_s = time.monotonic()
    with _Shown() as shown:
        while True:
            status = controller.operation(operation_id)
            if status is None:
                raise DroverError(f"{operation_id} is not known any more; drover events tells what has happened")
            if status.has_ended or args.no_wait:
                break
            shown.show(status)
            time.sleep(LOOK_S)  # the controller answers questions, and calls nobody
    if args.json:
        print(json.dumps(asdict(status)))
    if status.phase == "aborted":
        raise DroverError(f"{operation_id} was aborted: {status.reason}")
    if not args.json:
        print(_outcome(status, time.monotonic() - began_s))
    return 0


def _outcome(status: "OperationStatus", took_s: float) -> str:
    if not status.has_ended:
        return f"{words(status)}; drover status shows how far it is"
    moved = f", {mebibytes(status.moved_bytes)} moved" if status.moved_bytes else ""
    return f"{_what(status)}: done after {took_s:.1f} s{moved}"


def _what(status: "OperationStatus") -> str:
    return f"{status.operation_id} ({status.text})" if status.text else status.operation_id


def words(status: "OperationStatus") -> str:
    """An operation in one line."""
    step = f", step {status.step} of about {status.steps}" if status.steps else ""
    moved = f", {mebibytes(status.moved_bytes)} of {mebibytes(status.total_bytes)}" if status.total_bytes else ""
    waits = f": {status.waits_for}" if status.waits_for else ""
    return f"{_what(status)}: {status.phase}{step}{moved}{waits}"


def mebibytes(size: int) -> str:
    """A size in bytes, for people."""
    return f"{size / 2**20:.1f} MiB" if size < 100 * 2**20 else f"{size / 2**20:.0f} MiB"


class _Shown:
    """On stderr, since stdout is for the outcome."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.table import Column

        console = Console(stderr=True)
        self._is_live = console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TimeElapsedColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[detail]}", markup=False),  # wraps where the terminal is narrow
            console=console,
            transient=True,
        )
        self._told: tuple[object, ...] = ()

    def show(self, status: "OperationStatus") -> None:
        if self._is_live:
            done, total = (
                (status.moved_bytes, status.total_bytes) if status.total_bytes else (status.step, status.steps)
            )
            step = f" {status.step}/{status.steps}" if status.steps else ""
            bar = self._bars.task_ids[0] if self._bars.task_ids else self._bars.add_task("", detail="")
            self._bars.update(
                bar,
                description=f"{_what(status)} {status.phase}{step}",
                completed=done,
                total=total or None,
                detail=status.waits_for,
            )
            return
        state = (status.phase, status.step, status.waits_for)
        if state != self._told:
            self._told = state
            print(words(status), file=sys.stderr, flush=True)

    def __enter__(self) -> "_Shown":
        if self._is_live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._is_live:
            self._bars.stop()
