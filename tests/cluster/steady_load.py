"""Streams all the time, as a deployment changes beneath them."""

import threading
from concurrent.futures import ThreadPoolExecutor

from client import Client
from tests.processes import PATIENCE_S, wait_until
from tests.reference import prompt

TOKENS = list(prompt(9))
LENGTH = 200
STREAMS = 4


class SteadyLoad:
    """Some streams at any time, each followed by the next, until the end of the block; then all their answers."""

    def __init__(self, client: Client, length: int = LENGTH, streams: int = STREAMS) -> None:
        """length: of each answer, in tokens."""
        self.answers: list[list[int]] = []
        self._client, self._length, self._streams = client, length, streams
        self._is_over = threading.Event()

    def __enter__(self) -> "SteadyLoad":
        self._threads = ThreadPoolExecutor(self._streams)
        self._reading = [self._threads.submit(self._read) for _ in range(self._streams)]
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        with self._threads:
            for future in self._reading:
                future.result(PATIENCE_S)

    def wait_for_more(self) -> None:
        """Return once every thread may have had another whole answer."""
        had = len(self.answers)
        wait_until(lambda: len(self.answers) >= had + 2 * self._streams)

    def _read(self) -> None:
        while not self._is_over.is_set():
            stream = self._client.generate(TOKENS, max_tokens=self._length, temperature=0, timeout_s=PATIENCE_S)
            self.answers.append([token_id for delta in stream for token_id in delta.token_ids])
