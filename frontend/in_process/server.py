"""A whole server in one process, without Ray: a checkpoint's experts and router, the engine, and gRPC on loopback.

The parts are the cluster's own; only the links differ (LocalLink), and who starts them.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from checkpoint.layout import tensor_specs
from checkpoint.tensors import Checkpoint
from checkpoint.tokenizer import Tokenizer
from frontend.chat_template import ChatTemplate
from frontend.generation import Generation
from frontend.grpc_api.health import HealthService
from frontend.grpc_api.server import serve_in_process
from frontend.grpc_api.service import InferenceService
from frontend.in_process.router import InProcessRouter
from frontend.model_card import ModelCard
from kernels.memory import free_bytes
from router.engine import Engine
from router.kv_budget import KvBudget
from router.local import CPU, load_model
from router.schedule.limits import DEFAULT_LIMITS

DEFAULT_BUDGET = KvBudget()
# Nothing can end the engine amid a step, and a large model's longest step takes a while.
STOP_S = 60.0


class _Left(Exception):
    """Whoever asked for the server has gone while the weights were read."""


@contextmanager
def serve_checkpoint(
    directory: Path, *, threads: int | None = None, kv_budget: KvBudget = DEFAULT_BUDGET
) -> Iterator[str]:
    """Load a Llama 4 directory and serve it from a thread of its own. Gives the address, "127.0.0.1:port".

    When the block ends, the thread finishes its step or read, cancels the calls that still run,
    and stops. So it does if an exception comes while weights are read. The model has the
    directory's name. threads: of torch, in the whole process; None keeps them as they are. Raises
    CheckpointError, NoRoom, DroverError.
    """
    address: Future[str] = Future()
    leaving: Future[None] = Future()
    with ThreadPoolExecutor(1, thread_name_prefix="serving") as thread:
        try:
            serving = thread.submit(lambda: asyncio.run(_serve(directory, threads, kv_budget, address, leaving)))
            either: tuple[Future[Any], ...] = (address, serving)
            wait(either, return_when=FIRST_COMPLETED)
            if not address.done():
                serving.result()  # raises what went wrong
            yield address.result()
        finally:
            leaving.set_result(None)
    serving.result()


async def _serve(
    directory: Path, threads: int | None, kv_budget: KvBudget, address: Future[str], leaving: "Future[None]"
) -> None:
    """Load, tell `address`, and serve until `leaving` is done."""

    def stay(_: int) -> None:
        if leaving.done():
            raise _Left

    if threads is not None:
        torch.set_num_threads(threads)
    checkpoint = Checkpoint.open(directory)
    # Before the weights, which take long: a tokenizer that is missing is then told at once.
    tokenizer, chat_template = Tokenizer.open(directory), ChatTemplate.open(directory)
    dtype: torch.dtype = getattr(torch, checkpoint.config.dtype)
    model = load_model(checkpoint, checkpoint.config, dtype, on_bytes=stay)
    weight_bytes = sum(checkpoint.entries[name].nbytes for name in tensor_specs(checkpoint.config))
    kv_bytes = kv_budget.resolve(model.kv_layout, free_bytes(CPU), weight_bytes)
    router = InProcessRouter(Engine(model, replace(DEFAULT_LIMITS, kv_bytes=kv_bytes)))
    try:
        card = ModelCard.of(directory.resolve().name, checkpoint.config, checkpoint.config.dtype)
        service = InferenceService(Generation(card, tokenizer, chat_template, router))
        # Not without grace: grpc prints a traceback if a call that its client has just cancelled
        # is cancelled twice.
        async with serve_in_process(service, HealthService(router)) as served_at:
            address.set_result(served_at)
            await asyncio.wrap_future(leaving)
    finally:
        router.stop(STOP_S)
