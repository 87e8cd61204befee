"""The closed loop: so many streams at once, each of a 128-token prompt and 128 tokens of output."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from bench.measure import Round, check_complete, round_of
from bench.worker import Answer, Request
from bench.workload import OUTPUT_TOKENS, closed_loop


class Asked(Protocol):
    """A system that runs and can be asked."""

    def ask(self, requests: Sequence[Request]) -> Answer: ...


@dataclass(frozen=True)
class ClosedRun:
    """One round. worker_cores: processor time over time of the answering process, which for `drover` is the load
    generator alone. experts_hit: distinct experts per MoE layer of a decoding step, where the system knows it.
    first_tokens: of each prompt, to compare what systems computed."""

    round: Round
    worker_cores: float
    experts_hit: float | None
    first_tokens: tuple[int, ...]


def rounds(concurrency: int) -> int:
    """How often a repeat does it: a few streams are over soon, and noisy."""
    return max(1, min(4, 32 // concurrency))


def closed_runs(system: Asked, name: str, concurrency: int, seed: str, vocab_size: int) -> Iterator[ClosedRun]:
    """The rounds of one system at one concurrency, on prompts that nothing has seen before. Raises BenchError."""
    warm_up = closed_loop(f"{seed} warm {concurrency}", concurrency, 4, vocab_size)
    check_complete(name, warm_up, system.ask(warm_up).streams)
    for number in range(rounds(concurrency)):
        short = closed_loop(f"{seed} prefill {concurrency} {number}", concurrency, 1, vocab_size)
        prefill = system.ask(short)
        check_complete(name, short, prefill.streams)
        requests = closed_loop(f"{seed} decode {concurrency} {number}", concurrency, OUTPUT_TOKENS, vocab_size)
        answer = system.ask(requests)
        check_complete(name, requests, answer.streams)
        yield ClosedRun(
            round_of(prefill.streams, requests, answer.streams),
            answer.cpu_s / answer.wall_s,
            answer.facts.get("experts_hit"),
            tuple(stream.token_ids[0] for stream in answer.streams),
        )
