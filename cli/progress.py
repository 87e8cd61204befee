"""Shows the progress of a start: stages, and a bar of loaded bytes for each router and shard."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

if TYPE_CHECKING:
    from cluster.reports import ActorState


class StartProgress:
    """Bars on a terminal; if stderr is not one, a line per stage."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = self._console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<10} {task.fields[phase]:<8}"),
            BarColumn(),
            DownloadColumn(),
            TimeElapsedColumn(),
            console=self._console,
        )
        self._actor_bars: dict[str, TaskID] = {}
        self._began_s = time.monotonic()

    def stage(self, text: str) -> None:
        """A new stage begins."""
        if not self._live:
            print(f"[{time.monotonic() - self._began_s:5.1f} s] {text}", file=sys.stderr, flush=True)
            return
        # As Text: what looks like markup in a file's name or value is none.
        self._console.print(Text.assemble((f"{time.monotonic() - self._began_s:5.1f} s", "dim"), f"  {text}"))

    def loading(self, name: str, state: "ActorState | None") -> None:
        """Update the actor's bar. It swings until the actor's process answers."""
        if not self._live:
            return
        if name not in self._actor_bars:
            self._actor_bars[name] = self._bars.add_task(name, total=None, phase="starting")
        if state is not None:
            self._bars.update(
                self._actor_bars[name],
                phase=state.phase.value,
                completed=state.bytes_done,
                total=state.bytes_total or None,
            )

    def __enter__(self) -> "StartProgress":
        if self._live:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._bars.stop()
