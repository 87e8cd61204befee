"""vLLM's CPU build as a worker: its offline engine, stepped by hand so that the time of each token is known.

    python -m bench.peers.vllm_cpu CHECKPOINT MAX_STREAMS

Its engine runs in this process: in one of its own, as by default, it is 1.8 times slower on 2 cores.
"""

import os
import sys
import time
from typing import Any

from bench.worker import Request, Stream, serve_jobs

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")


class Vllm:
    """vLLM as it comes, but for prefix caching, which no prompt here would profit from."""

    def __init__(self, checkpoint: str, max_streams: int) -> None:
        from vllm import LLM

        llm = LLM(
            checkpoint,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=1024,
            enable_prefix_caching=False,
            max_num_seqs=max_streams,
        )
        self._engine: Any = llm.llm_engine
        self._jobs = 0

    def run(self, requests: list[Request]) -> tuple[list[Stream], dict[str, float]]:
        """One job; arrival times are not looked at."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._jobs += 1
        streams = {f"{self._jobs}-{number}": Stream() for number in range(len(requests))}
        began_s = time.perf_counter()
        for request_id, request in zip(streams, requests, strict=True):
            params = SamplingParams(
                max_tokens=request.max_tokens,
                ignore_eos=True,
                temperature=0,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            self._engine.add_request(request_id, {"prompt_token_ids": request.token_ids}, params)
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            now_s = time.perf_counter() - began_s
            for output in outputs:
                streams[output.request_id].add(list(output.outputs[0].token_ids), now_s)
        return list(streams.values()), {}


if __name__ == "__main__":
    serve_jobs(lambda: Vllm(sys.argv[1], int(sys.argv[2])).run)
