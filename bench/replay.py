"""What it costs to send a request again to another router: its prompt and the tokens so far are computed anew.

python -m bench.replay CHECKPOINT THREADS

One process, the engine alone, greedy. Each length half prompt, half completion.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from bench.machine import describe
from bench.one_process import load
from bench.workload import prompts
from router.engine import Engine
from router.request import GenerationRequest, SamplingParams
from router.schedule.limits import DEFAULT_LIMITS

LENGTHS = (256, 1024, 4096)
REPEATS = 5


def first_token_s(engine: Engine, request: GenerationRequest) -> float:
    """Seconds from the request's arrival to its next token."""
    began_s = time.perf_counter()
    engine.submit(request)
    while not any(delta.token_ids for delta in engine.step()):
        pass
    taken_s = time.perf_counter() - began_s
    engine.cancel(request.request_id, "cancelled")
    return taken_s


def measure(engine: Engine, length: int) -> float:
    """Milliseconds per 1,000 tokens that a router computes again: the fastest of some requests."""
    vocab_size, taken_s = engine.request_limits.vocab_size, []
    for repeat in range(REPEATS):
        [tokens] = prompts(f"replay {length} {repeat}", 1, [length], vocab_size)
        half = length // 2
        sampling = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(f"{length} {repeat}", tuple(tokens[:half]), sampling, made=tuple(tokens[half:]))
        taken_s.append(first_token_s(engine, request))
    return min(taken_s) * 1e6 / length


def main() -> None:
    directory, threads = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(threads)
    engine, _ = load(directory, replace(DEFAULT_LIMITS, prefix_cache=False))
    measure(engine, LENGTHS[0])  # what the first step of a process costs does not count
    cpu = describe(Path())["cpu"]
    print(f"{directory.name}, {threads} threads, {cpu}")
    for length in LENGTHS:
        print(f"{length:6} tokens: {measure(engine, length):7.0f} ms per 1,000 tokens")


if __name__ == "__main__":
    main()
