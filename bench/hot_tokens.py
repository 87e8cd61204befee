"""Prompts of the embedded model that all go to a few experts: one token, again and again.

Legend: T tokens, L MoE layers, V vocabulary, P tokens of a prompt.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from bench.errors import BenchError
from checkpoint.tensors import Checkpoint
from checkpoint.weights import WeightReader
from experts.link import LocalLink
from experts.link_table import LinkTable
from experts.placement import even_placement
from experts.shard import load_shard
from kernels.choose import choose_kernels
from router.engine import Engine
from router.model.dispatch import Dispatcher, DispatchHandle
from router.model.llama4 import Model
from router.request import GenerationRequest, SamplingParams
from router.schedule.limits import SchedulerLimits

Experts = npt.NDArray[np.int64]

CPU = torch.device("cpu")
STEP_TOKENS = 1024
LOOK_TOKENS = 16
"""Each token of the vocabulary is looked at in a prompt of so many."""
LEAST_SHARE = 0.75
"""Of a prompt's tokens that must go to its hot expert, in every layer."""


class RecordingDispatcher(Dispatcher):
    """Notes the experts of every token, by layer."""

    seen: dict[int, list[Experts]]

    def dispatch(
        self, layer: int, x_TD: torch.Tensor, expert_TA: torch.Tensor, score_TA: torch.Tensor
    ) -> DispatchHandle:
        self.seen.setdefault(layer, []).append(expert_TA[:, 0].numpy().astype(np.int64))
        return super().dispatch(layer, x_TD, expert_TA, score_TA)


class Recorder:
    """The model in this process."""

    def __init__(self, directory: Path) -> None:
        checkpoint = Checkpoint.open(directory)
        config, dtype = checkpoint.config, getattr(torch, checkpoint.config.dtype)
        self.config = config
        placement = even_placement(config.moe_layers, config.num_experts, 1)
        kernels = choose_kernels(CPU, dtype, torch.get_num_threads())
        link = LocalLink(load_shard(checkpoint, placement.slots_of(0), kernels))
        self._dispatcher = RecordingDispatcher(placement, LinkTable({0: link}))
        model = Model(config, WeightReader(checkpoint, dtype, CPU), self._dispatcher, kernels)
        limits = SchedulerLimits(STEP_TOKENS, 100_000, STEP_TOKENS, 2**28, prefix_cache=False)
        self._engine = Engine(model, limits)

    def experts(self, prompts: list[list[int]]) -> Experts:
        """experts_TL of all the prompts' tokens, one prompt after the other. All must have the same length."""
        self._dispatcher.seen = {}
        rows: list[Experts] = []
        per_step = STEP_TOKENS // len(prompts[0])
        for begin in range(0, len(prompts), per_step):  # a step each, in which no prompt is cut
            here = prompts[begin : begin + per_step]
            for number, prompt in enumerate(here):
                sampling = SamplingParams(1, temperature=0.0, ignore_eos=True)
                self._engine.submit(GenerationRequest(f"{begin} {number}", tuple(prompt), sampling))
            while self._engine.has_work:
                self._engine.step()
            layers = [np.concatenate(self._dispatcher.seen[layer]) for layer in self.config.moe_layers]
            self._dispatcher.seen = {}
            if any(len(expert_T) != len(here) * len(prompts[0]) for expert_T in layers):
                raise BenchError("a layer has not computed every token of the prompts, so their experts are unknown")
            rows.append(np.stack(layers, axis=1))
        return np.concatenate(rows)


def hot_prompts(recorder: Recorder, shards: int, count: int, prompt_tokens: int) -> tuple[list[list[int]], Experts]:
    """`count` prompts, each of one token, and their experts_TL. Raises BenchError if there are not as many.

    In an even placement on `shards` all their hot experts are on one shard, in every layer, and no
    two prompts have the same one: so `count` experts of each layer get hot.
    """
    config = recorder.config
    looked_PVL = _by_prompt(
        recorder.experts([[token] * LOOK_TOKENS for token in range(config.vocab_size)]), LOOK_TOKENS
    )
    hot_VL, share_VL = _dominant(looked_PVL)
    shard_VL = hot_VL * shards // config.num_experts
    steady_V = share_VL.min(axis=1) >= LEAST_SHARE
    for shard in range(shards):
        tokens = np.flatnonzero(steady_V & (shard_VL == shard).all(axis=1))
        tokens = tokens[np.argsort(-share_VL[tokens].min(axis=1), kind="stable")]
        chosen: list[int] = []
        for token in tokens.tolist():
            if all((hot_VL[token] != hot_VL[other]).all() for other in chosen):
                chosen.append(token)
            if len(chosen) == count:
                prompts = [[token] * prompt_tokens for token in chosen]
                return prompts, recorder.experts(prompts)
    raise BenchError(f"no {count} tokens go to different experts of one of {shards} shards in every layer")


def _by_prompt(experts_TL: Experts, prompt_tokens: int) -> Experts:
    """experts_PVL: position by position of all prompts."""
    experts_PVL: Experts = experts_TL.reshape(-1, prompt_tokens, experts_TL.shape[1]).transpose(1, 0, 2)
    return experts_PVL


def _dominant(experts_PVL: Experts) -> tuple[Experts, npt.NDArray[np.float64]]:
    """(hot_VL, share_VL): each prompt's most frequent expert in a layer, and its share of the positions.

    >>> hot_VL, share_VL = _dominant(np.array([[[3]], [[5]], [[5]], [[5]]]))
    >>> hot_VL.tolist(), share_VL.tolist()
    ([[5]], [[0.75]])
    """
    positions, prompts, layers = experts_PVL.shape
    hot_VL, share_VL = np.zeros((prompts, layers), np.int64), np.zeros((prompts, layers))
    for prompt in range(prompts):
        for layer in range(layers):
            counts = np.bincount(experts_PVL[:, prompt, layer])
            hot_VL[prompt, layer], share_VL[prompt, layer] = counts.argmax(), counts.max() / positions
    return hot_VL, share_VL
