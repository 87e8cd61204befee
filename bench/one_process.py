"""Drover without a cluster: router, experts and engine in this process, no Ray and no gRPC.

python -m bench.one_process CHECKPOINT THREADS MAX_STREAMS
"""

import dataclasses
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.worker import Request, Run, Stream, serve_jobs
from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.link import ExpertRows, Link, LocalLink, Reply
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from kernels.cores import set_compute_threads
from router.engine import Engine
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from router.request import GenerationRequest, SamplingParams
from router.schedule.limits import DEFAULT_LIMITS, SchedulerLimits

CPU = torch.device("cpu")


class CountingLink:
    """A link that counts the experts hit in steps of a given number of rows."""

    down_reason = None
    is_loaded = True

    def __init__(self, link: Link) -> None:
        self._link = link
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.experts: dict[int, list[int]] = {}
        """rows of a step -> distinct experts hit, one number for each layer and step."""

    def request(self, rows: ExpertRows) -> Reply:
        self.experts.setdefault(len(rows.x_ND), []).append(len(rows.experts))
        return self._link.request(rows)

    def close(self) -> None:
        self._link.close()


def load(directory: Path, limits: SchedulerLimits) -> tuple[Engine, CountingLink]:
    """The checkpoint behind one shard in this process. Raises CheckpointError."""
    checkpoint = Checkpoint.open(directory)
    config, dtype = checkpoint.config, getattr(torch, checkpoint.config.dtype)
    placement = even_placement(config.moe_layers, config.num_experts, 1)
    kernels = choose_kernels(CPU, dtype, torch.get_num_threads())
    link = CountingLink(LocalLink(load_shard(checkpoint, placement.slots_of(0), kernels)))
    dispatcher = Dispatcher(placement, LinkTable({0: link}))
    model = Model(config, WeightReader(checkpoint, dtype, CPU), dispatcher, kernels)
    return Engine(model, limits), link


def run(engine: Engine, link: CountingLink, requests: list[Request]) -> tuple[list[Stream], dict[str, float]]:
    """One job, stepped in this thread. The facts: experts_hit, the distinct experts per MoE layer of a whole step."""
    streams = {str(number): Stream() for number in range(len(requests))}
    waiting = sorted(((request.at_s, str(number), request) for number, request in enumerate(requests)), reverse=True)
    link.forget()
    began_s = time.perf_counter()
    while waiting or engine.has_work:
        now_s = time.perf_counter() - began_s
        while waiting and waiting[-1][0] <= now_s:
            _, request_id, request = waiting.pop()
            sampling = SamplingParams(request.max_tokens, temperature=0.0, ignore_eos=True)
            engine.submit(GenerationRequest(request_id, tuple(request.token_ids), sampling))
        if not engine.has_work:
            time.sleep(waiting[-1][0] - now_s)  # arrival times are the benchmark's input, not a wait for something
            continue
        deltas = engine.step()
        now_s = time.perf_counter() - began_s
        for delta in deltas:
            streams[delta.request_id].add(delta.token_ids, now_s)
            if delta.error is not None:
                streams[delta.request_id].error = str(delta.error)
    hits = link.experts.get(len(requests), [])  # of the steps in which every stream decoded
    return list(streams.values()), {"experts_hit": sum(hits) / len(hits)} if hits else {}


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    # But for the number of streams and the queue, what a deployment file's defaults say.
    limits = dataclasses.replace(DEFAULT_LIMITS, max_running=int(sys.argv[3]), max_waiting=4096)

    def start() -> Run:
        engine, link = load(Path(sys.argv[1]), limits)
        # As EngineThread does.
        thread = ThreadPoolExecutor(1, "engine", set_compute_threads, (torch.get_num_threads(),))
        return lambda requests: thread.submit(run, engine, link, requests).result()

    serve_jobs(start)


if __name__ == "__main__":
    main()
