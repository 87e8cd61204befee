"""Overload for ten minutes: everything that clients do, more of it than fits, and nothing may break, leak or be lost.

SOAK_S in the environment makes it shorter or longer, for somebody who looks for a fault.
"""

import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from client import Client, DeadlineExceeded, ResourceExhausted
from cluster.launch import Deployment
from tests.cluster.deployment import SharedRay, pid_of, router_stats
from tests.processes import PATIENCE_S
from tests.reference import Reference, prompt

SOAK_S = float(os.environ.get("SOAK_S", "600"))
CLIENTS = 40
MAX_CONTEXT = 400
SHARED = list(prompt(70, seed=7))  # many prompts begin with these, over four chunk borders
CANARIES = [(SHARED[: 10 * i] + list(prompt(5, seed=i)), 12 + i) for i in range(8)]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SOAK_S + 300)]


@pytest.fixture(scope="module")
def deployment(shared_ray: SharedRay, reference_of: Callable[[str], Reference]) -> Deployment:
    # Memory for about three of the longest requests, so that running ones have to give way.
    engine = {"max_context_tokens": MAX_CONTEXT, "kv_bytes": 128 * 1500, "max_running": 8, "max_waiting": 6}
    return shared_ray.serve(reference_of("scout").directory, engine=engine)


class Soak:
    """Counts what became of every request; whatever is no expected outcome is in `faults`."""

    def __init__(self, address: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.faults: list[str] = []
        self._address = address
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._right = {i: self._canary(i) for i in range(len(CANARIES))}

    def run(self, seconds: float, look: Callable[[], None]) -> None:
        """Let all clients go at it, and call `look` when a third of the time is over."""
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(CLIENTS)]
        for thread in threads:
            thread.start()
        self._over.wait(seconds / 3)
        look()
        self._over.wait(seconds * 2 / 3)
        self._over.set()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        acts = [self._generate, self._cancel, self._disconnect, self._several, self._stop, self._give_up, self._check]
        while not self._over.is_set():
            act = rng.choice(acts)
            try:
                outcome = act(rng)
            except ResourceExhausted as error:
                outcome = "refused" if error.retry_after_s is not None else "refused without a hint"
                self._over.wait(min(error.retry_after_s or 0.1, 0.5))
            except DeadlineExceeded:
                outcome = "deadline"
            except Exception as error:
                outcome = f"{act.__name__}: {type(error).__name__}: {error}"
                with self._lock:
                    self.faults.append(outcome)
            with self._lock:
                self.outcomes[outcome] += 1

    def _prompt(self, rng: random.Random) -> list[int]:
        own = [rng.randrange(3, 199) for _ in range(rng.randrange(1, 60))]
        return SHARED[: rng.randrange(len(SHARED))] + own if rng.random() < 0.5 else own

    def _generate(self, rng: random.Random) -> str:
        max_tokens = rng.randrange(1, 150)
        with Client(self._address) as client:
            deltas = list(client.generate(self._prompt(rng), max_tokens=max_tokens, ignore_eos=True))
        made = sum(len(delta.token_ids) for delta in deltas)
        assert made == max_tokens, f"{made} tokens of {max_tokens}"
        return "whole"

    def _cancel(self, rng: random.Random) -> str:
        with Client(self._address) as client:
            stream = client.generate(self._prompt(rng), max_tokens=200, ignore_eos=True)
            for _ in range(rng.randrange(10)):
                next(stream)
            stream.close()
        return "cancelled"

    def _disconnect(self, rng: random.Random) -> str:
        client = Client(self._address)
        stream = client.generate(self._prompt(rng), max_tokens=200, ignore_eos=True)
        for _ in range(rng.randrange(1, 10)):
            next(stream)
        client.close()
        return "disconnected"

    def _several(self, rng: random.Random) -> str:
        n, max_tokens = rng.randrange(2, 4), rng.randrange(1, 60)
        with Client(self._address) as client:
            deltas = list(client.generate(self._prompt(rng), n=n, max_tokens=max_tokens, ignore_eos=True))
        made = Counter[int]()
        for delta in deltas:
            made[delta.index] += len(delta.token_ids)
        assert dict(made) == dict.fromkeys(range(n), max_tokens), f"{made} of {n} x {max_tokens}"
        return "several"

    def _stop(self, rng: random.Random) -> str:
        with Client(self._address) as client:
            deltas = list(client.generate(self._prompt(rng), max_tokens=100, stop=["e", "xy"], seed=rng.randrange(99)))
        assert "e" not in "".join(delta.text for delta in deltas)
        return "stopped"

    def _give_up(self, rng: random.Random) -> str:
        with Client(self._address) as client:
            list(client.generate(self._prompt(rng), max_tokens=200, ignore_eos=True, timeout_s=rng.random() / 2))
        return "in time"

    def _check(self, rng: random.Random) -> str:
        which = rng.randrange(len(CANARIES))
        assert self._canary(which) == self._right[which], f"canary {which} has changed its tune"
        return "the same as alone"

    def _canary(self, which: int) -> list[int]:
        token_ids, max_tokens = CANARIES[which]
        with Client(self._address) as client:
            deltas = list(client.generate(token_ids, max_tokens=max_tokens, temperature=0, ignore_eos=True))
        return [token_id for delta in deltas for token_id in delta.token_ids]


def resident_bytes() -> dict[str, int]:
    """Of the router, a shard and the frontend."""
    frontends = [
        pid for pid in os.listdir("/proc") if pid.isdigit() and "ServeReplica:drover.drover-test" in _name(pid)
    ]
    pids = {"router-0": pid_of("router-0"), "shard-0": pid_of("shard-0"), "frontend": int(frontends[0])}
    return {name: _resident(pid) for name, pid in pids.items()}


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def _resident(pid: int) -> int:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024


def test_overload_breaks_nothing_leaks_nothing_and_passes(deployment: Deployment) -> None:
    soak, early = Soak(deployment.address), dict[str, int]()
    soak.run(SOAK_S, lambda: early.update(resident_bytes()))
    print(dict(soak.outcomes))
    assert soak.faults == []
    expected = {"whole", "cancelled", "disconnected", "several", "stopped", "deadline", "the same as alone", "refused"}
    assert set(soak.outcomes) - {"in time"} == expected

    # What was left behind by clients that went away is gone within a step; the next request is served like the first.
    with Client(deployment.address) as client:
        assert len(list(client.generate(SHARED, max_tokens=5, ignore_eos=True, timeout_s=PATIENCE_S))) == 5
    deadline = time.monotonic() + PATIENCE_S
    while (stats := router_stats().engine) is None or stats.running + stats.waiting:
        assert time.monotonic() < deadline, stats
    assert stats.kv_bytes_used == 0

    late = resident_bytes()
    print({name: f"{early[name] >> 20} -> {late[name] >> 20} MiB" for name in early})
    # What a leak of one KV block or one request's tokens per request would add is far more than this.
    assert all(late[name] < early[name] * 1.1 + 30 * 2**20 for name in early), (early, late)
