"""Starts the load generator, follows what it says, and takes its records when it ends."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.chaos import records
from bench.chaos.asks import Ask
from bench.chaos.load import DRAIN_S
from bench.chaos.records import Stream
from bench.errors import BenchError
from bench.process import ROOT, end, last_lines


@dataclass(frozen=True)
class LoadState:
    """active: streams that have had a token and have not ended. stalled_s: of the slowest, since its last token."""

    at_s: float = 0.0
    active: int = 0
    stalled_s: float = 0.0
    failed: int = 0
    sent: int = 0
    resumed: int = 0


class LoadProcess:
    """A running load. `finish` ends arrivals and returns what came of every stream; `close` just ends it."""

    def __init__(self, address: str, asks: Sequence[Ask], rate_per_s: float, work: Path) -> None:
        self._out, self._log = work / "streams.json", work / "chaos-load.log"
        asks_file = work / "asks.json"
        asks_file.write_text(json.dumps([asdict(ask) for ask in asks]))
        self._out.unlink(missing_ok=True)
        with self._log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "bench.chaos.load", address, str(asks_file), f"{rate_per_s:g}", str(self._out)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=ROOT,
                start_new_session=True,
            )
        self.state = LoadState()
        self._reader = threading.Thread(target=self._read, name="load", daemon=True)
        self._reader.start()

    def set_rate(self, rate_per_s: float) -> None:
        """Arrivals from now on."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{rate_per_s:g}\n".encode())
        self._process.stdin.flush()

    def check(self) -> None:
        """Raises BenchError if it has ended by itself."""
        if self._process.poll() is not None:
            raise BenchError(f"the load generator ended by itself; {last_lines(self._log)}")

    def finish(self) -> list[Stream]:
        """Send nothing more, wait for what runs, and return every stream. Raises BenchError."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
            self._process.wait(DRAIN_S + 30)
        except subprocess.TimeoutExpired:
            raise BenchError(f"streams did not end within {DRAIN_S:.0f} s after the last fault") from None
        finally:
            self.close()
        if not self._out.exists():
            raise BenchError(f"the load generator failed; {last_lines(self._log)}")
        return records.read(self._out)

    def close(self) -> None:
        end(self._process)
        self._reader.join()

    def _read(self) -> None:
        assert self._process.stdout is not None
        try:
            for line in self._process.stdout:
                self.state = LoadState(**json.loads(line))
        except ValueError:
            pass  # cut short by its end


def speed_tok_s(address: str, asks: Sequence[Ask], at_once: int, seconds: float) -> float:
    """Tokens per second with `at_once` streams always running: what a rate of arrivals must stay below."""
    from client import Client, ClientError

    made, stopped = [0] * at_once, threading.Event()

    def keep_asking(number: int) -> None:
        with Client(address) as client:
            for turn in range(number, 10**6):
                ask = asks[turn % len(asks)]
                try:
                    for delta in client.generate(ask.token_ids, **ask.sampling):
                        made[number] += len(delta.token_ids)
                        if stopped.is_set():
                            return
                except ClientError:
                    if stopped.wait(0.1):
                        return

    threads = [threading.Thread(target=keep_asking, args=(number,), daemon=True) for number in range(at_once)]
    for thread in threads:
        thread.start()
    stopped.wait(2.0)  # until all have begun
    began_s, before = time.monotonic(), sum(made)
    stopped.wait(seconds)
    speed = (sum(made) - before) / (time.monotonic() - began_s)
    stopped.set()
    for thread in threads:
        thread.join(10.0)
    return speed
