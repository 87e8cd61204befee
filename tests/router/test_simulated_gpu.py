"""An engine on a simulated GPU: the tokens of a CPU, and few moments at which the host waits for the device."""

from typing import Any

import pytest
import torch

from checkpoint.tensors import Checkpoint
from kernels.cores import Cores
from kernels.kernels import TorchKernels
from router.local import load_model
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenDelta
from tests.reference import Reference, prompt
from tests.router.engines import NUM_SHARDS, drawn, greedy, make_engine, run_to_end
from tests.simulated_gpu import SimulatedGpu, Synchronisation, simulated_gpu


def model_on(device: str, reference: Reference) -> Model:
    checkpoint = Checkpoint.open(reference.directory)
    kernels = TorchKernels(torch.device(device), torch.float32, Cores(1, "test"))
    return load_model(checkpoint, checkpoint.config, torch.float32, num_shards=NUM_SHARDS, kernels=kernels)


def company() -> list[GenerationRequest]:
    """Every parameter, prompts in pieces and of one token, and chunks that end."""
    bias = ((5, 2.0), (9, -100.0))
    return [
        greedy("greedy", prompt(40, seed=1)),
        greedy("one token", prompt(1, seed=2), logprobs=3, logit_bias=bias),
        greedy("told", prompt(70, seed=3), prompt_logprobs=2, logprobs=0),
        greedy("penalised", prompt(9, seed=4), repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2),
        greedy("long", prompt(5, seed=5), min_tokens=8),
        drawn("plain", prompt(17, seed=6)),
        drawn("unlikely", prompt(17, seed=7), min_p=0.1, temperature=0.7),
        drawn("few", prompt(33, seed=8), top_k=5, logprobs=2),
        drawn("nucleus", prompt(12, seed=9), top_p=0.8, min_p=0.02, repetition_penalty=1.1),
        drawn("wide nucleus", prompt(12, seed=10), top_p=0.999, temperature=50.0),
        drawn("both", prompt(8, seed=11), top_k=150, top_p=0.9, logit_bias=bias, presence_penalty=1.0),
    ]


def told(model: Model) -> dict[str, list[TokenDelta]]:
    engine = make_engine(model, max_running=16, max_step_tokens=48)
    for request in company():
        engine.submit(request)
    deltas: dict[str, list[TokenDelta]] = {}
    for delta in run_to_end(engine):
        deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def test_a_gpu_gives_what_a_cpu_gives(reference: Reference, caplog: pytest.LogCaptureFixture) -> None:
    on_cpu = told(model_on("cpu", reference))
    with simulated_gpu() as gpu:
        on_gpu = told(model_on("cuda", reference))
    assert all(delta.error is None for deltas in on_cpu.values() for delta in deltas)
    assert on_gpu == on_cpu
    assert not [record for record in caplog.records if record.name.startswith("router")]  # nothing was tried twice
    assert gpu.syncs


ALL_WISHES: dict[str, Any] = {
    "top_k": 5,
    "top_p": 0.9,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "logit_bias": ((5, 1.0),),
    "min_tokens": 8,
    "logprobs": 2,
}


def waits_of_a_step(model: Model, gpu: SimulatedGpu, streams: int, **sampling: Any) -> list[Synchronisation]:
    """Of a step in which so many streams get a token each, and one more reads a piece of a prompt with a past."""
    engine = make_engine(model, max_running=16, max_step_tokens=32)
    for nth in range(streams):
        engine.submit(drawn(str(nth), prompt(3, seed=nth), **sampling))
    engine.step()
    engine.submit(greedy("long", prompt(120, seed=99)))
    engine.step()
    before = len(gpu.syncs)
    deltas = engine.step()
    assert len(deltas) == streams
    return gpu.syncs[before:]


@pytest.mark.parametrize(
    ("sampling", "of_sampling"), [({"temperature": 0.0}, 2), ({}, 2), (ALL_WISHES, 6)], ids=["greedy", "drawn", "all"]
)
def test_the_host_waits_once_per_moe_layer_and_for_the_tokens(
    reference: Reference, sampling: dict[str, Any], of_sampling: int
) -> None:
    """Each MoE layer's row counts are needed on the host, and so is what is drawn. Nothing else is."""
    with simulated_gpu() as gpu:
        model = model_on("cuda", reference)
        few, many = (waits_of_a_step(model, gpu, streams, **sampling) for streams in (1, 8))
    assert few == many
    of_layers = [sync for sync in many if sync.place == "router/model/dispatch.py:dispatch"]
    assert len(of_layers) == len(model.config.moe_layers)
    others = [sync for sync in many if sync not in of_layers]
    assert all(sync.place.startswith("router/sampling/") for sync in others), others
    assert len(others) == of_sampling


def test_a_step_takes_no_more_than_was_measured_before(reference: Reference) -> None:
    with simulated_gpu() as gpu:
        model = model_on("cuda", reference)
        few, many, long = (model.step_bytes(*asked) for asked in ((8, 16), (48, 16), (48, 300)))
        assert few is not None
        assert many is not None
        assert long is not None
        assert few < many < long
        engine = make_engine(model, max_step_tokens=48)
        engine.submit(greedy("long", prompt(300)))
        before = gpu.allocated_bytes
        torch.cuda.reset_peak_memory_stats()
        run_to_end(engine)
        assert few < gpu.peak_bytes - before <= long
    assert model_on("cpu", reference).step_bytes(8, 16) is None
