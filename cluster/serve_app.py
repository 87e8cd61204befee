"""The frontend as an ordinary Ray Serve application.

HAProxy, which Serve runs, takes each gRPC call straight to a replica. The replica calls the
deployment's method that has the RPC's name. All else is in frontend/: the same services run in one
process without Ray.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grpc_health.v1 import health_pb2
from ray import serve
from ray.serve._private import grpc_util
from starlette.requests import Request
from starlette.responses import Response

from checkpoint.config import read_config
from checkpoint.tokenizer import Tokenizer
from cluster.metrics_reader import deployment_reader
from cluster.part_directory import PartDirectory
from cluster.router_client import RayRouterConnection
from frontend.chat_template import ChatTemplate
from frontend.generation import Generation
from frontend.grpc_api.health import HealthService
from frontend.grpc_api.server import answer_stream, answer_unary, server_options
from frontend.grpc_api.service import InferenceService
from frontend.metrics.page import CONTENT_TYPE
from frontend.model_card import ModelCard
from frontend.router_pool import RouterPool
from protos.drover.v1 import inference_pb2 as pb
from router.request import request_limits

METRICS_PATH = "/metrics"
REPLICA_ENV = {
    # A leaving replica stays reachable for so long, for HAProxy to notice; Serve's 30 s delay every
    # stop.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # A stream is then asked for its next message only when the client has taken the last one. With
    # a thread of its own it runs ahead, and Serve queues its messages without bound.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
}
GRPC_SERVICER_FUNCTIONS = (
    "frontend.grpc_api.server.add_inference_services",
    "frontend.grpc_api.server.add_health_service",
)


@dataclass(frozen=True)
class FrontendSpec:
    """What a frontend replica serves, and where its routers are.

    router_names, shard_names: until the controller says which there are now. silence_s: a router
    that is silent for so long is down. heal_s: how long requests wait for a router when all are.
    """

    model_name: str
    checkpoint: Path
    dtype: str
    router_names: tuple[str, ...]
    shard_names: tuple[str, ...]
    namespace: str
    max_context_tokens: int | None
    silence_s: float
    heal_s: float


class Frontend:
    """One replica: tokenizing, chat templates, and the streams of its clients."""

    def __init__(self, spec: FrontendSpec) -> None:
        config = read_config(spec.checkpoint)
        card = ModelCard.of(spec.model_name, config, spec.dtype)
        limits = request_limits(config, spec.max_context_tokens)
        # Serve has no setting for these. Its server in this process takes them from this list, and
        # starts once this object is made.
        grpc_util.DEFAULT_GRPC_SERVER_OPTIONS[:] = server_options(limits.max_context_tokens)
        frontend_id = f"frontend-{uuid.uuid4().hex[:12]}"

        def connect(name: str) -> RayRouterConnection:
            return RayRouterConnection(name, spec.namespace, frontend_id, spec.silence_s)

        router = RouterPool(list(map(connect, spec.router_names)), limits, spec.heal_s)
        directory, loop = PartDirectory(spec.namespace, spec.router_names, spec.shard_names), asyncio.get_running_loop()
        directory.watch(lambda names: _call_soon(loop, router.follow, names, connect))
        tokenizer, chat_template = Tokenizer.open(spec.checkpoint), ChatTemplate.open(spec.checkpoint)
        self._inference = InferenceService(Generation(card, tokenizer, chat_template, router))
        self._health = HealthService(router)
        self._metrics = deployment_reader(spec.model_name, directory, spec.namespace)

    async def Generate(self, request: Any, grpc_context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(answer_stream(self._inference.Generate, request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def Chat(self, request: Any, grpc_context: Any) -> AsyncGenerator[pb.GenerateResponse, None]:
        async with aclosing(answer_stream(self._inference.Chat, request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def Tokenize(self, request: Any, grpc_context: Any) -> pb.TokenizeResponse:
        return await answer_unary(self._inference.Tokenize, request, grpc_context, pb.TokenizeResponse())

    async def Detokenize(self, request: Any, grpc_context: Any) -> pb.DetokenizeResponse:
        return await answer_unary(self._inference.Detokenize, request, grpc_context, pb.DetokenizeResponse())

    async def GetModelInfo(self, request: Any, grpc_context: Any) -> pb.GetModelInfoResponse:
        return await answer_unary(self._inference.GetModelInfo, request, grpc_context, pb.GetModelInfoResponse())

    async def Check(self, request: Any, grpc_context: Any) -> health_pb2.HealthCheckResponse:
        return await answer_unary(self._health.Check, request, grpc_context, health_pb2.HealthCheckResponse())

    async def Watch(self, request: Any, grpc_context: Any) -> AsyncGenerator[health_pb2.HealthCheckResponse, None]:
        async with aclosing(answer_stream(self._health.Watch, request, grpc_context)) as responses:
            async for response in responses:
                yield response

    async def List(self, request: Any, grpc_context: Any) -> health_pb2.HealthListResponse:
        return await answer_unary(self._health.List, request, grpc_context, health_pb2.HealthListResponse())

    async def __call__(self, request: Request) -> Response:
        """Serve's HTTP port: GET /metrics."""
        if request.url.path != METRICS_PATH:
            return Response(f"{request.url.path} is not here; {METRICS_PATH} is\n", 404, media_type="text/plain")
        if request.method not in ("GET", "HEAD"):
            return Response("only GET\n", 405, {"Allow": "GET, HEAD"}, media_type="text/plain")
        page = await self._metrics.page()
        # Also without a router: Prometheus drops a page with another status, and with it who is up
        # and who is not.
        return Response(page, headers={"Content-Type": CONTENT_TYPE})


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[..., object], *args: object) -> None:
    with suppress(RuntimeError):  # the event loop may have ended
        loop.call_soon_threadsafe(callback, *args)


def build(spec: FrontendSpec, replicas: int) -> serve.Application:
    """The application of one model: `replicas` frontends, none of which reserves a CPU (they wait,
    mostly)."""
    deployment = serve.deployment(
        Frontend,
        num_replicas=replicas,
        max_ongoing_requests=1024,
        graceful_shutdown_timeout_s=5,
        # Serve notices a dead replica at its next check only; its own 10 s are how long the port would
        # stay without one.
        health_check_period_s=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": REPLICA_ENV}},
    )
    return deployment.bind(spec)
