"""An expert shard as a Ray actor. Restarted by Ray, it loads its experts again by itself.

It serves from its start: an expert that a router asks for is read before all others.
"""

import logging
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from checkpoint.errors import DroverError
from checkpoint.tensors import Checkpoint
from cluster.actors.link_invitation import LinkInvitation
from cluster.actors.load_progress import LoadProgress
from cluster.actors.start_orders import slots_to_hold
from cluster.reports import ActorState, HoldOrder, ShardStats
from experts.connection import Listener
from experts.errors import NotHeld
from experts.groups.nccl import SHARD_RANK
from experts.load_pace import LoadPace
from experts.placement import Slot
from experts.shard import ExpertShard, shard_bytes, slot_loader
from experts.shard_server import ShardServer
from experts.slot_loader import SlotLoader
from experts.slots import Slots
from kernels.choose import choose_kernels
from kernels.cores import share_of_cores

logger = logging.getLogger(__name__)

SWITCH_S = 5e-4
"""A thread that reads weights gives the interpreter to the one that computes after so long; 5 ms by default."""


@dataclass(frozen=True)
class ShardSpec:
    """What a shard actor is to hold.

    slots: (layer, expert) -> version of its weights, if nobody says anything else: what it is to hold
    changes. threads: None gives an equal share of its machine's cores.
    neighbours: how many shards share that machine, this one included. stuck_after_s: a computation
    that takes longer ends the process. load_bytes_per_s: how fast it reads beside streams; None: as
    fast as it can.
    """

    name: str
    namespace: str
    checkpoint: Path
    slots: Mapping[Slot, int]
    dtype: torch.dtype
    device: str
    threads: int | None
    neighbours: int = 1
    stuck_after_s: float | None = None
    load_bytes_per_s: float | None = None


class ShardActor:
    """Loads in a thread of its own, so that `state` answers meanwhile.

    Threaded: calls run side by side.
    """

    def __init__(self, spec: ShardSpec) -> None:
        self._threads = spec.threads or share_of_cores(spec.neighbours)
        torch.set_num_threads(self._threads)  # for the threads that begin later, too
        sys.setswitchinterval(SWITCH_S)
        self._spec = spec
        self._progress = LoadProgress()
        self._server: ShardServer | None = None
        self._loader: SlotLoader | None = None
        self._held = HoldOrder(0, spec.slots)
        self._holding = threading.Lock()  # while orders and the loader are brought together
        threading.Thread(target=self._load_and_keep, name="load", daemon=True).start()

    def state(self) -> ActorState:
        return self._progress.state()

    def stats(self) -> ShardStats:
        with self._holding:
            held, loader, server = self._held, self._loader, self._server
        if server is None or loader is None:
            return ShardStats(0, 0, (), held.order, len(held.slots))
        return ShardStats(
            len(server.shard.slots),
            server.shard.rows_computed,
            server.link_names,
            held.order,
            loader.missing,
            loader.problem,
            loader.failures,
            loader.bytes_read,
            server.shard.busy_s,
        )

    def hold(self, order: HoldOrder) -> None:
        """Hold exactly these slots from now on; an order that is older than the last one is ignored.

        What is new is read at a pace that leaves time to streams. Until then, who asks for it waits for it.
        """
        with self._holding:
            if order.order < self._held.order:
                return
            self._held = order
            if self._loader is not None:
                self._loader.hold(order.slots)

    def join(self, invitation: LinkInvitation) -> tuple[str, int]:
        """Begin to form this shard's end of a link; returns the address at which it waits for the router.

        Forming goes on in a thread. Raises DroverError, OSError.
        """
        server = self._server
        if server is None:
            raise DroverError(f"{self._spec.name} is not ready: {self.state().summary}")
        listener = Listener(ray.util.get_node_ip_address())

        def form() -> None:
            try:
                connection = listener.accept(invitation.secret, invitation.timeout_s)
                rows = invitation.row_channel(SHARD_RANK, torch.device(self._spec.device), connection)
                server.serve(connection, invitation.wire, invitation.liveness, invitation.name, rows)
            except ConnectionError as error:  # the router notices by itself
                logger.warning("link %s could not be formed: %s", invitation.name, error)

        threading.Thread(target=form, name=f"form {invitation.name}", daemon=True).start()
        return listener.address

    def _load_and_keep(self) -> None:
        if (order := slots_to_hold(self._spec.name, self._spec.namespace)) is not None:
            self.hold(order)
        self._progress.run(self._load)
        assert self._loader is not None
        self._loader.keep_filled()

    def _load(self) -> None:
        """Serve from the start, and read the experts meanwhile. May be called again after a failure."""
        spec = self._spec
        checkpoint, device = Checkpoint.open(spec.checkpoint), torch.device(spec.device)
        self._progress.expect(shard_bytes(checkpoint, self._held.slots))
        if self._server is None or self._loader is None:
            kernels, slots = choose_kernels(device, spec.dtype, self._threads), Slots()
            pace = None if spec.load_bytes_per_s is None else LoadPace(spec.load_bytes_per_s)
            with self._holding:
                loader = slot_loader(checkpoint, slots, self._held.slots, kernels, self._progress.add_bytes, pace)
                self._loader = loader
            shard = ExpertShard(slots, kernels, loader)
            # A shard that cannot compute is worth nothing; when its process ends, Ray starts a new one.
            self._server = ShardServer(
                shard,
                device,
                on_crash=lambda: os._exit(1),
                is_loaded=False,
                prepare=lambda: _warm_up(shard, loader, checkpoint),
                stuck_after_s=spec.stuck_after_s,
            )
        self._loader.load_all()
        self._server.loaded()


def _warm_up(shard: ExpertShard, loader: SlotLoader, checkpoint: Checkpoint) -> None:
    """Compile what computes, before routers wait for it."""
    if (first := next(iter(loader.wanted), None)) is not None:
        layer, expert = first
        try:
            loader.load_now(layer, [expert])
        except NotHeld:
            return  # it cannot be read; loading tells
    shard.warm_up(checkpoint.config.hidden_size, checkpoint.config.intermediate_size)
