"""grpc.health.v1: whether the server answers at all, and whether its model does."""

import asyncio
from collections.abc import AsyncGenerator

from grpc_health.v1 import health_pb2

from frontend.router_client import RouterClient
from protos.drover.v1 import inference_pb2
from router.errors import NotFound

LIVE = ""  # the server as a whole: asks only whether the process can answer a call
INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
SERVICES = (LIVE, INFERENCE)

_Status = health_pb2.HealthCheckResponse


class HealthService:
    """The standard's methods, under its names.

    poll_interval_s: how often Watch looks for a change; nothing tells a frontend that a router
    became ready.
    """

    def __init__(self, router_client: RouterClient, *, poll_interval_s: float = 0.5) -> None:
        self._router = router_client
        self._poll_interval_s = poll_interval_s

    async def Check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """The service's status now; raises NotFound for an unknown one, as the standard asks."""
        if request.service not in SERVICES:
            raise NotFound(f"service: {request.service[:80]!r} is unknown; known are {LIVE!r} and {INFERENCE!r}")
        return _Status(status=await self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest
    ) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        """The service's status now and after each change; never ends by itself, not even for an
        unknown service."""
        told = None
        while True:
            status = await self._status(request.service)
            if status != told:
                yield _Status(status=status)
                told = status
            await asyncio.sleep(self._poll_interval_s)

    async def List(self, request: health_pb2.HealthListRequest) -> health_pb2.HealthListResponse:
        """The status of every service."""
        statuses = {service: _Status(status=await self._status(service)) for service in SERVICES}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service == LIVE:
            return _Status.SERVING
        if service == INFERENCE:
            return _Status.SERVING if (await self._router.readiness()).ready else _Status.NOT_SERVING
        return _Status.SERVICE_UNKNOWN
