"""llama.cpp as a worker, through llama-cpp-python's C functions: batched, greedy, every sequence its own tokens.

    python -m bench.peers.llama_cpp MODEL.gguf THREADS

As a program of one's own would use the library: prompts go first, as many as fit one batch of 2048 tokens, then all
sequences take a step at a time. No server, no network.
"""

import sys
import time
from typing import Any

import llama_cpp as llama
import numpy as np

from bench.worker import Request, Stream, serve_jobs

BATCH_TOKENS = 2048


class LlamaCpp:
    """A model, and the context for the last number of sequences asked for."""

    def __init__(self, path: str, threads: int) -> None:
        llama.llama_backend_init()
        self._model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
        if not self._model:
            sys.exit(f"llama.cpp does not load {path}")
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._threads = threads
        self._batch = llama.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._shape = (0, 0)
        self._context: Any = None

    def run(self, requests: list[Request]) -> tuple[list[Stream], dict[str, float]]:
        """One job; arrival times are not looked at."""
        streams = [Stream() for _ in requests]
        self._clear(len(requests), max(len(request.token_ids) + request.max_tokens for request in requests))
        began_s = time.perf_counter()

        def decode(entries: list[tuple[int, int, int, bool]], sequences: list[int]) -> None:
            """entries: (token, position, sequence, wants logits); sequences: whose logits are wanted, in order."""
            chosen = self._decode(entries, len(sequences))
            now_s = time.perf_counter() - began_s
            for sequence, token in zip(sequences, chosen, strict=True):
                streams[sequence].add([token], now_s)

        entries: list[tuple[int, int, int, bool]] = []
        sequences: list[int] = []
        for sequence, request in enumerate(requests):
            last = len(request.token_ids) - 1
            for position, token in enumerate(request.token_ids):
                entries.append((token, position, sequence, position == last))
                if position == last:
                    sequences.append(sequence)
                if len(entries) == BATCH_TOKENS:
                    decode(entries, sequences)
                    entries, sequences = [], []
        if entries:
            decode(entries, sequences)
        while True:
            going = [n for n, r in enumerate(requests) if len(streams[n].token_ids) < r.max_tokens]
            if not going:
                return streams, {}
            steps = [
                (streams[n].token_ids[-1], len(requests[n].token_ids) + len(streams[n].token_ids) - 1) for n in going
            ]
            decode([(token, place, n, True) for n, (token, place) in zip(going, steps, strict=True)], going)

    def _decode(self, entries: list[tuple[int, int, int, bool]], outputs: int) -> list[int]:
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wants_logits) in enumerate(entries):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, sequence, wants_logits
        if llama.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        llama.llama_synchronize(self._context)
        if not outputs:
            return []
        logits = np.ctypeslib.as_array(llama.llama_get_logits(self._context), shape=(outputs, self._vocab_size))
        chosen: list[int] = logits.argmax(axis=1).tolist()
        return chosen

    def _clear(self, sequences: int, positions: int) -> None:
        """An empty cache for so many sequences of at most so many positions; a context that is there is used again."""
        old_sequences, old_positions = self._shape
        if sequences == old_sequences and positions <= old_positions:
            llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
            return
        if self._context is not None:
            llama.llama_free(self._context)
        positions = max(256, positions)
        params = llama.llama_context_default_params()
        params.n_ctx, params.n_seq_max = sequences * positions, sequences
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = self._threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context")
        self._shape = (sequences, positions)


if __name__ == "__main__":
    serve_jobs(lambda: LlamaCpp(sys.argv[1], int(sys.argv[2])).run)
