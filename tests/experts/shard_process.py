"""A real expert shard in a process of its own, to be linked, stopped, killed and slowed by tests."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection as Pipe
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch

from checkpoint.tensors import Checkpoint
from experts.bell import ThreadBell
from experts.connection import Listener, connect
from experts.endpoint import Liveness
from experts.group_link import GroupLink
from experts.placement import Placement
from experts.shard import ExpertShard, load_shard
from experts.shard_server import ShardServer
from experts.wire import WireFormat
from kernels.choose import choose_kernels
from tests.experts.ends import HOST, SECRET

CPU = torch.device("cpu")
KERNELS = choose_kernels(CPU, torch.float32, 1)
LIVENESS = Liveness(heartbeat_s=0.1, silence_s=3.0)
JOIN_TIMEOUT_S = 60.0


class GatedShard(ExpertShard):
    """Computes only while its gate is open: slow, but alive."""

    gate: Event

    def compute(self, *args: Any) -> torch.Tensor:
        self.gate.wait()
        return super().compute(*args)


def _serve(directory: Path, placement: Placement, shard: int, gate: Event, control: Pipe) -> None:
    torch.set_num_threads(1)
    checkpoint = Checkpoint.open(directory)
    loaded = load_shard(checkpoint, placement.slots_of(shard), KERNELS)
    gated = GatedShard(loaded.slots, KERNELS)
    gated.gate = gate
    server = ShardServer(gated, CPU)
    while True:
        name, wire, liveness = control.recv()
        listener = Listener(HOST)
        control.send(listener.address)
        server.serve(listener.accept(SECRET, JOIN_TIMEOUT_S), wire, liveness, name)


class ShardProcess:
    """Starts the process; `link` links it under a name. Use as a context manager."""

    def __init__(self, directory: Path, placement: Placement, shard: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self.gate = context.Event()
        self.gate.set()
        self._process = context.Process(
            target=_serve, args=(directory, placement, shard, self.gate, theirs), daemon=True
        )
        self._process.start()
        self._links: list[GroupLink] = []

    def link(
        self,
        name: str,
        wire: WireFormat,
        liveness: Liveness = LIVENESS,
        shard_liveness: Liveness = LIVENESS,
    ) -> GroupLink:
        self._control.send((name, wire, shard_liveness))
        assert self._control.poll(JOIN_TIMEOUT_S)
        connection = connect(self._control.recv(), SECRET, JOIN_TIMEOUT_S)
        link = GroupLink(connection, wire, liveness, ThreadBell(), CPU, name)
        self._links.append(link)
        return link

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self._process.join(60)

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def __enter__(self) -> "ShardProcess":
        return self

    def __exit__(self, *exception: object) -> None:
        for link in self._links:
            link.close()
        if self._process.is_alive():
            self.kill()


def wire_for(checkpoint: Checkpoint, max_rows: int = 64) -> WireFormat:
    return WireFormat(checkpoint.config.num_experts, max_rows, checkpoint.config.hidden_size, torch.float32)


def rows_like(experts: Sequence[int], counts: Sequence[int], hidden_size: int, seed: int = 0) -> torch.Tensor:
    assert len(experts) == len(counts)
    return torch.randn(sum(counts), hidden_size, generator=torch.Generator().manual_seed(seed))
