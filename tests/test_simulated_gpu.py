"""The simulated GPU does what CUDA does: it keeps devices apart, and waits where CUDA waits."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from tests.simulated_gpu import SimulatedGpu, simulated_gpu


@pytest.fixture
def gpu() -> Iterator[SimulatedGpu]:
    with simulated_gpu() as gpu:
        yield gpu


def on_gpu(*numbers: float) -> torch.Tensor:
    return torch.arange(10.0, device="cuda")[: len(numbers)].zero_() + torch.tensor(numbers, device="cuda")


def test_numbers_are_real_and_on_the_device(gpu: SimulatedGpu) -> None:
    x = on_gpu(3, 1, 2)
    assert x.device == torch.device("cuda:0")
    assert not x.is_cpu
    assert x.sort().values.tolist() == [1, 2, 3]
    x[1:].add_(10)
    assert x.cpu().numpy().tolist() == [3, 11, 12]
    assert torch.empty_like(x).is_cuda
    assert x.view(torch.int32).dtype == torch.int32
    assert torch.zeros(3).device.type == "cpu"


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3).add_(x),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: torch.ones(3)[x.long()],
        lambda x: x.__setitem__(slice(2), torch.ones(2)[:, None].flatten()[None] + x[:2]),
        lambda x: x.gather(0, torch.zeros(3, dtype=torch.int64)),
        lambda x: x.where(torch.ones(3) > 0, 0.0),
        lambda x: torch.nn.functional.linear(x[None], torch.ones(3, 3)),
        lambda x: torch.tensor(1.0).add_(x[0]),
    ],
)
def test_devices_do_not_mix(gpu: SimulatedGpu, mix: Callable[[torch.Tensor], object]) -> None:
    x = on_gpu(0, 1, 2)
    with pytest.raises(RuntimeError, match="same device"):
        mix(x)


def test_scalars_and_indices_on_the_host_do_mix(gpu: SimulatedGpu) -> None:
    x = on_gpu(3, 4, 5)
    before = len(gpu.syncs)
    assert (x * torch.tensor(2.0)).is_cuda
    assert len(gpu.syncs) == before
    assert x[torch.tensor([0, 2])].tolist() == [3, 5]
    assert [sync.why for sync in gpu.syncs[before:]] == ["index on the host", "copy to the host"]


SYNCHRONISE: list[tuple[Callable[[torch.Tensor], object], int]] = [
    (lambda x: x + 1, 0),
    (lambda x: x[x.long()], 0),
    (lambda x: x.sort(), 0),
    (lambda x: x.cumsum(0).masked_fill_(x > 1, 0.0), 0),
    (lambda x: torch.full_like(x, 3.0), 0),
    (lambda x: x.to("cuda"), 0),
    (lambda x: x.double(), 0),
    (lambda x: x.tolist(), 1),
    (lambda x: x.cpu().numpy(), 1),
    (lambda x: float(x[0]), 1),
    (lambda x: bool((x > 1).any()), 1),
    (lambda x: x.nonzero(), 1),
    (lambda x: x[x > 1], 1),
    (lambda x: x[[0, 1]], 1),
    (lambda x: x.__setitem__(x > 1, 0.0), 1),
    (lambda x: torch.tensor([1.0], device="cuda"), 1),
    (lambda x: torch.from_numpy(np.ones(3)).to("cuda"), 1),
    (lambda x: torch.from_numpy(np.ones(3)).to("cuda", non_blocking=True), 1),
    (lambda x: torch.ones(3).pin_memory().to("cuda"), 1),
    (lambda x: torch.ones(3).pin_memory().to("cuda", non_blocking=True), 0),
    (lambda x: torch.empty(3, pin_memory=True)[1:].to("cuda", non_blocking=True), 0),
    (lambda x: x.copy_(torch.ones(3)), 1),
    (lambda x: torch.ones(3).copy_(x), 1),
    (lambda x: x.repeat_interleave(x.long()), 1),
    (lambda x: x.repeat_interleave(x.long(), output_size=3), 0),
    (lambda x: torch.bincount(x.long()), 1),
]


@pytest.mark.parametrize(("act", "count"), SYNCHRONISE, ids=range(len(SYNCHRONISE)))
def test_the_host_waits_where_cuda_makes_it_wait(
    gpu: SimulatedGpu, act: Callable[[torch.Tensor], object], count: int
) -> None:
    x = on_gpu(0, 1, 2)
    before = len(gpu.syncs)
    act(x)
    assert len(gpu.syncs) - before == count
    assert all("test_simulated_gpu.py" in sync.place for sync in gpu.syncs)


def test_memory_is_pinned_only_where_it_was_asked_for(gpu: SimulatedGpu) -> None:
    assert torch.empty(3, pin_memory=True)[1:].is_pinned()
    assert torch.ones(3).pin_memory().is_pinned()
    assert not torch.ones(3).is_pinned()
    assert not on_gpu(1).is_pinned()
