"""In fp32 a request's tokens and log-probabilities have the same bits whatever happens around it.

The embedded model, at 44 and at 257 requests at once: other engines' texts change there.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from router.model.dispatch import Dispatcher
from router.model.llama4 import Model
from router.request import GenerationRequest, TokenLogprobs
from tests.local_model import load_model
from tests.reference import prompt
from tests.router.engines import drawn, greedy, make_engine, run_to_end
from tests.router.faulty_shards import FakeTime, FaultyShard

EMBEDDED = Path(__file__).parent.parent.parent / "demo" / "drover-demo"
CPU = torch.device("cpu")
TOKENS = 5

Text = tuple[list[int], list[TokenLogprobs], list[TokenLogprobs]]
"""Tokens, their log-probabilities, and those of the prompt."""


@pytest.fixture(scope="module")
def embedded() -> Model:
    return load_model(EMBEDDED)


def requests(count: int) -> list[GenerationRequest]:
    """Greedy and drawn ones; of three, two begin as others do. So the prefix cache has something to give."""
    kinds: list[Callable[..., GenerationRequest]] = [drawn, greedy]
    return [
        kinds[n % 2](
            str(n),
            prompt(3 + n * 7 % 40, vocab_size=4000, seed=n % 5 if n % 3 else n),
            TOKENS,
            logprobs=2,
            prompt_logprobs=None if n % 4 else 1,
            ignore_eos=True,
        )
        for n in range(count)
    ]


def texts(
    model: Model, asked: Sequence[GenerationRequest], max_step_tokens: int = 512, prefix_cache: bool = True
) -> dict[str, Text]:
    """What each request gets when all of them run at once."""
    engine = make_engine(
        model,
        max_running=len(asked),
        max_waiting=len(asked),
        max_step_tokens=max_step_tokens,
        kv_positions=20_000,
        max_block_tokens=32,
        prefix_cache=prefix_cache,
    )
    for request in asked:
        engine.submit(request)
    found: dict[str, Text] = {request.request_id: ([], [], []) for request in asked}
    for delta in run_to_end(engine):
        assert delta.error is None
        for whole, part in zip(
            found[delta.request_id], (delta.token_ids, delta.logprobs, delta.prompt_logprobs), strict=True
        ):
            whole.extend(part)  # type: ignore[arg-type]
    return found


@pytest.fixture(scope="module")
def of_257(embedded: Model) -> dict[str, Text]:
    found = texts(embedded, requests(257))
    assert {len(token_ids) for token_ids, _, _ in found.values()} == {TOKENS}
    return found


def test_44_requests_at_once_get_what_they_get_among_257(embedded: Model, of_257: dict[str, Text]) -> None:
    assert texts(embedded, requests(44)).items() <= of_257.items()


def test_a_request_alone_gets_what_it_gets_among_257(embedded: Model, of_257: dict[str, Text]) -> None:
    for request in requests(257)[1::50]:
        assert texts(embedded, [request], max_step_tokens=7).items() <= of_257.items()


def test_prompts_in_pieces_and_without_a_prefix_cache_change_nothing(embedded: Model, of_257: dict[str, Text]) -> None:
    assert texts(embedded, requests(44), max_step_tokens=50, prefix_cache=False).items() <= of_257.items()


@pytest.mark.parametrize("num_shards", [2, 5])
def test_several_shards_change_nothing(num_shards: int, of_257: dict[str, Text]) -> None:
    assert texts(load_model(EMBEDDED, num_shards=num_shards), requests(44)).items() <= of_257.items()


def test_shards_that_die_change_nothing(of_257: dict[str, Text]) -> None:
    """One amid a step, of which replicas compute the rest; one for a while, for which the others' step waits."""
    checkpoint = Checkpoint.open(EMBEDDED)
    config, kernels, time = checkpoint.config, choose_kernels(CPU, torch.float32, 1), FakeTime()
    placement = even_placement(config.moe_layers, config.num_experts, 3, replicas=2)
    table = LinkTable(bell=time)
    shards = [
        FaultyShard(number, load_shard(checkpoint, placement.slots_of(number), kernels), table, time)
        for number in range(3)
    ]
    dispatcher = Dispatcher(placement, table, CPU, heal_s=20.0, clock=time)
    model = Model(config, WeightReader(checkpoint, torch.float32, CPU), dispatcher, kernels)
    shards[1].arm(6, lambda: shards[1].kill(None))
    shards[2].arm(11, lambda: shards[2].kill(back_after_s=3.0))
    assert texts(model, requests(44)).items() <= of_257.items()
    assert dispatcher.asker.retries["lost"] >= 2
