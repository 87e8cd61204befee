"""The actors as Ray knows them.

`ray.get_actor` imports the actor's class, in whatever process asks. So these classes import
nothing heavy: `drover status` and a frontend replica look actors up and need no torch. Only the
actor's own process imports the engine or the experts. Each method is that of the class behind it.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cluster.events import Event
from cluster.policy.wanted import Orders
from cluster.reports import (
    ActorState,
    Batch,
    ControllerStats,
    DrainProgress,
    HoldOrder,
    LoadView,
    OperationStatus,
    RebalanceReport,
    RouterLoad,
    RouterMetrics,
    RouterStats,
    ShardStats,
)
from experts.placement import Placement
from frontend.router_client import Readiness
from router.request import GenerationRequest

if TYPE_CHECKING:
    from cluster.actors.controller import ControllerSpec
    from cluster.actors.link_invitation import LinkInvitation
    from cluster.actors.router import RouterSpec
    from cluster.actors.shard import ShardSpec


class RemoteRouter:
    """A `RouterActor` in a process of its own: an asyncio actor."""

    def __init__(self, spec: "RouterSpec") -> None:
        from cluster.actors.failpoints import install_in_router
        from cluster.actors.router import RouterActor

        install_in_router(spec.name)
        self._router = RouterActor(spec)

    async def state(self) -> ActorState:
        return await self._router.state()

    async def readiness(self) -> Readiness:
        return await self._router.readiness()

    async def stats(self) -> RouterStats:
        return await self._router.stats()

    async def metrics(self) -> RouterMetrics:
        return await self._router.metrics()

    async def load(self) -> RouterLoad:
        return await self._router.load()

    async def slots_of(self, shard: str) -> HoldOrder:
        return await self._router.slots_of(shard)

    async def placement(self) -> Placement:
        return await self._router.placement()

    async def placements_in_use(self) -> tuple[Placement, ...]:
        return await self._router.placements_in_use()

    async def route(self, placement: Placement) -> None:
        await self._router.route(placement)

    async def follow(self, orders: Orders) -> None:
        await self._router.follow(orders)

    async def expect_frontend(self, secret: bytes) -> tuple[str, int]:
        return await self._router.expect_frontend(secret)

    async def submit(self, frontend_id: str, requests: Sequence[GenerationRequest]) -> None:
        await self._router.submit(frontend_id, requests)

    async def cancel(self, frontend_id: str, ending_of: Mapping[str, str]) -> None:
        await self._router.cancel(frontend_id, ending_of)

    async def release(self, keep_of: Mapping[str, str]) -> None:
        await self._router.release(keep_of)

    async def pull(self, frontend_id: str, receipt: int) -> Batch:
        return await self._router.pull(frontend_id, receipt)


class RemoteShard:
    """A `ShardActor` in a process of its own: calls run side by side, in threads."""

    def __init__(self, spec: "ShardSpec") -> None:
        from cluster.actors.failpoints import install_in_shard
        from cluster.actors.shard import ShardActor

        install_in_shard(spec.name)
        self._shard = ShardActor(spec)

    def state(self) -> ActorState:
        return self._shard.state()

    def stats(self) -> ShardStats:
        return self._shard.stats()

    def hold(self, order: HoldOrder) -> None:
        self._shard.hold(order)

    def join(self, invitation: "LinkInvitation") -> tuple[str, int]:
        return self._shard.join(invitation)


class RemoteController:
    """A `ControllerActor` in a process of its own: calls run side by side, in threads."""

    def __init__(self, spec: "ControllerSpec") -> None:
        from cluster.actors.controller import ControllerActor
        from cluster.actors.failpoints import install_in_controller
        from cluster.names import CONTROLLER

        install_in_controller(CONTROLLER)
        self._controller = ControllerActor(spec)

    def state(self) -> ActorState:
        return self._controller.state()

    def stats(self) -> ControllerStats:
        return self._controller.stats()

    def load(self) -> LoadView:
        return self._controller.load()

    def events_after(self, number: int, limit: int) -> list[Event]:
        return self._controller.events_after(number, limit)

    def operation(self, operation_id: str) -> OperationStatus | None:
        return self._controller.operation(operation_id)

    def part_names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._controller.part_names()

    def slots_of(self, shard: str) -> HoldOrder:
        return self._controller.slots_of(shard)

    def placement(self) -> Placement:
        return self._controller.placement()

    def change(self, operation_id: str, target: Placement, kind: str) -> str:
        return self._controller.change(operation_id, target, kind)

    def resize(
        self,
        operation_id: str,
        shards: int | None = None,
        routers: int | None = None,
        replicas: int | None = None,
        frontends: int | None = None,
    ) -> str:
        return self._controller.resize(operation_id, shards, routers, replicas, frontends)

    def rebalance(self, operation_id: str, is_dry_run: bool) -> RebalanceReport:
        return self._controller.rebalance(operation_id, is_dry_run)

    def abort(self, operation_id: str) -> str:
        return self._controller.abort(operation_id)

    def decisions(self) -> list[str]:
        return self._controller.decisions()

    def pause_autoscaling(self, is_paused: bool) -> str:
        return self._controller.pause_autoscaling(is_paused)

    def drain(self, target: str, grace_s: float) -> str:
        return self._controller.drain(target, grace_s)

    def undo_drain(self, target: str) -> str:
        return self._controller.undo_drain(target)

    def stop_serving(self) -> DrainProgress:
        return self._controller.stop_serving()

    def drain_progress(self, target: str) -> DrainProgress:
        return self._controller.drain_progress(target)
