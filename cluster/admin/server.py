"""Serves drover.v1.Admin from a thread of the controller's process, to those that have the token."""

import asyncio
import hmac
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from grpc_reflection.v1alpha import reflection

from checkpoint.errors import DroverError
from cluster.admin.service import AdminService
from cluster.admin.token_file import default_token_file, read_token
from cluster.reports import AdminView
from frontend.grpc_api.server import NO_COMPRESSION, OWN_PORT, add_service, handlers_of, open_port
from protos.drover.v1 import admin_pb2

logger = logging.getLogger(__name__)

ADMIN = admin_pb2.DESCRIPTOR.services_by_name["Admin"]
MAX_REQUEST_BYTES = 64 * 2**10
MAX_CALLS = 32  # at once; those that follow events among them
RETRY_S = 5.0  # until a port may be free, or a file right
GRACE_S = 1.0


@dataclass(frozen=True)
class AdminSettings:
    """port: 0 takes any free one. token_file: None takes one in the user's private folder."""

    host: str = "127.0.0.1"
    port: int = 0
    token_file: Path | None = None


class AdminServer:
    """Listens as soon as it can, for as long as the process lives: what is wrong is in its view."""

    def __init__(self, service: AdminService, namespace: str, settings: AdminSettings) -> None:
        self._service, self._namespace, self._settings = service, namespace, settings
        self._loop, self._closed = asyncio.new_event_loop(), asyncio.Event()
        self._view = AdminView("", "", "is being opened")
        self._thread = threading.Thread(target=self._run, name="admin", daemon=True)
        self._thread.start()

    @property
    def view(self) -> AdminView:
        return self._view

    def close(self) -> None:
        """End all calls, and the port."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._keep_open())
        self._loop.close()

    async def _keep_open(self) -> None:
        while not self._closed.is_set():
            try:
                await self._serve()
            except DroverError as error:
                self._note(str(error))
            except Exception as error:
                logger.exception("serving Admin failed")
                self._note(f"{type(error).__name__}: {error}")
            try:
                await asyncio.wait_for(self._closed.wait(), RETRY_S)
            except asyncio.TimeoutError:
                continue

    def _note(self, problem: str) -> None:
        if problem != self._view.problem:
            logger.warning("Admin is not served: %s", problem)
        self._view = AdminView("", "", problem)

    async def _serve(self) -> None:
        """Until it is closed. Raises DroverError if it cannot listen."""
        path = self._settings.token_file or default_token_file(self._namespace)
        options = [
            ("grpc.max_receive_message_length", MAX_REQUEST_BYTES),
            ("grpc.compression_enabled_algorithms_bitset", NO_COMPRESSION),
            OWN_PORT,
        ]
        server = grpc.aio.server(
            interceptors=[_Guard(read_token(path), path)], options=options, maximum_concurrent_rpcs=MAX_CALLS
        )
        add_service(ADMIN, handlers_of(ADMIN, self._service), server)
        reflection.enable_server_reflection((ADMIN.full_name, reflection.SERVICE_NAME), server)
        address = open_port(server, self._settings.host, self._settings.port)
        await server.start()
        self._view = AdminView(address, str(path))
        logger.info("Admin is served on %s; its token is in %s", address, path)
        try:
            await self._closed.wait()
        finally:
            await server.stop(GRACE_S)


class _Guard(grpc.aio.ServerInterceptor):
    """Lets nobody in who has not the token, before a request is read."""

    def __init__(self, token: str, path: Path) -> None:
        self._expected = f"Bearer {token}".encode()

        async def refuse(requests: Any, context: Any) -> None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED,
                f"the token is missing or wrong; send metadata 'authorization: Bearer TOKEN' with the one in {path} "
                "on the controller's node",
            )

        # For a stream of requests a handler is called at once, before any has come. Otherwise calls without a token
        # that never send one would count among MAX_CALLS for as long as their senders like.
        self._refusal: Any = grpc.stream_stream_rpc_method_handler(refuse)

    async def intercept_service(self, continuation: Callable[[Any], Any], handler_call_details: Any) -> Any:
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        is_right = len(given) == 1 and hmac.compare_digest(str(given[0]).encode(), self._expected)
        return await continuation(handler_call_details) if is_right else self._refusal
