"""The load generator: an open loop at a fixed rate through the shipped client, in a process of its own.

python -m bench.chaos.load ADDRESS ASKS.json RATE OUT.json

A line on stdin is a new rate. It sends until stdin ends, waits for the streams that run, and writes
OUT.json. Meanwhile a line of
JSON on stdout, every STATE_S, says how many streams are active, how long the slowest of them has
had no token, how many have failed, and how often the client has resumed one.
"""

import itertools
import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.chaos import records
from bench.chaos.asks import Ask
from bench.chaos.records import Stream
from client import Client, ClientError

STATE_S = 0.1
DRAIN_S = 180.0
NUM_CLIENTS = 4
FIRST = 11
"""Streams that begin at once, so that as many run from the start as later."""


def hung(stream: Stream, now_s: float, timeout_s: float) -> Stream:
    """The stream as it is now; failed if it has no end. A copy: its thread may still write to the other."""
    if stream.ended_s is not None:
        return stream
    error = f"HUNG: no end within {timeout_s:.0f} s after the last request was sent"
    return replace(stream, pieces=list(stream.pieces), ended_s=now_s, error=error)


class Load:
    """Streams under way and ended. One thread each: that is how the shipped client is used."""

    def __init__(self, address: str, asks: list[Ask]) -> None:
        self._clients = [Client(address) for _ in range(NUM_CLIENTS)]
        self._asks = asks
        self.streams: list[Stream] = []
        self._last_s: dict[int, float] = {}
        """Of each active stream, by its place in `streams`: when its last token came."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def send(self, ask: int) -> None:
        """Begin a stream in a thread of its own."""
        stream, number = Stream(ask, time.monotonic()), len(self.streams)
        self.streams.append(stream)
        thread = threading.Thread(target=self._run, args=(number, stream), daemon=True)
        self._threads.append(thread)
        thread.start()

    def state(self) -> dict[str, Any]:
        now_s = time.monotonic()
        with self._lock:
            last_s = list(self._last_s.values())
        return {
            "at_s": now_s,
            "active": len(last_s),
            "stalled_s": now_s - min(last_s, default=now_s),
            "failed": sum(stream.error is not None for stream in self.streams),
            "sent": len(self.streams),
            "resumed": sum(len(stream.resumed_s) for stream in self.streams),
        }

    def wait(self, timeout_s: float) -> None:
        """Until every stream has ended, or the time is over. A stream that has not ended by then has failed."""
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self.streams = [hung(stream, time.monotonic(), timeout_s) for stream in self.streams]

    def _run(self, number: int, stream: Stream) -> None:
        ask = self._asks[stream.ask]
        client = self._clients[number % NUM_CLIENTS]
        try:
            deltas = client.generate(ask.token_ids, **ask.sampling)
            for delta in deltas:
                now_s = time.monotonic()
                if len(deltas.gaps_s) > len(stream.resumed_s):
                    stream.resumed_s.append(now_s)
                stream.pieces.append((now_s, delta.index, list(delta.token_ids)))
                if delta.token_ids:
                    with self._lock:
                        self._last_s[number] = now_s
        except ClientError as error:
            stream.error = f"{error.code.name}: {error.message}"
        finally:
            stream.ended_s = time.monotonic()
            with self._lock:
                self._last_s.pop(number, None)


def main() -> None:
    address, asks_file, rate, out = sys.argv[1:]
    asks = [Ask(**raw) for raw in json.loads(Path(asks_file).read_text())]
    load = Load(address, asks)
    stopped, interval_s = threading.Event(), [1 / float(rate)]

    def tell() -> None:
        while True:
            print(json.dumps(load.state()), flush=True)
            time.sleep(STATE_S)  # so often it is told

    def read() -> None:
        for line in sys.stdin:
            interval_s[0] = 1 / float(line)
        stopped.set()

    for work in (tell, read):
        threading.Thread(target=work, daemon=True).start()
    for ask in range(FIRST):
        load.send(ask % len(asks))
    due_s = time.monotonic()
    for ask in itertools.cycle(range(len(asks))):
        if stopped.wait(max(0.0, due_s - time.monotonic())):
            break
        load.send(ask)
        due_s += interval_s[0]
    load.wait(DRAIN_S)
    records.write(Path(out), load.streams)


if __name__ == "__main__":
    main()
