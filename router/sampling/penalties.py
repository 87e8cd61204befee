"""Changes a request makes to the logits: biases, penalties, and tokens that must not end the text yet.

The order is that of transformers' `GenerationMixin._get_logits_processor`: logit_bias,
repetition_penalty, [frequency and presence], min_tokens. Temperature, top_k, top_p and min_p
follow in router/sampling/candidates.py. Greedy rows get biases and penalties, too.

  logit_bias          l[t] + bias                           SequenceBiasLogitsProcessor, for sequences of one token
  repetition_penalty  l[t] / r where l[t] > 0, else l[t] r  RepetitionPenaltyLogitsProcessor (Keskar et al. 2019,
                      for t in prompt or completion         arXiv 1909.05858, equation 2)
  frequency_penalty   l[t] - f count[t]                     OpenAI's API reference; count in the completion
  presence_penalty    l[t] - p [count[t] > 0]               the same
  min_tokens          least for tokens that end the text    MinNewTokensLengthLogitsProcessor

Legend: R rows (sequences), V vocabulary, N changed logits of all rows together.
"""

from array import array
from collections.abc import Callable, Sequence

import numpy as np
import torch

from kernels.upload import upload
from router.sampling.state import SamplingState

# Not -inf: if every token were forbidden, or its logit overflowed, softmax would give NaN.
_LEAST = torch.finfo(torch.float32).min
_MOST = torch.finfo(torch.float32).max


def penalised(logits_RV: torch.Tensor, states: Sequence[SamplingState]) -> torch.Tensor:
    """The logits to choose tokens from: a changed copy, or `logits_RV` if no row asks for changes."""
    biased = [(row, s) for row, s in enumerate(states) if s.bias_ids]
    repeating = [(row, s) for row, s in enumerate(states) if s.seen_ids]
    counted = [(row, s) for row, s in enumerate(states) if s.made_ids]
    unready = [(row, s) for row, s in enumerate(states) if s.may_not_end and s.ending_ids]
    if not (biased or repeating or counted or unready):
        return logits_RV
    changed = _Logits(logits_RV)
    if biased:
        biases = np.concatenate([s.biases for _, s in biased])
        changed.change(_rows(biased), [s.bias_ids for _, s in biased], lambda logit_N, bias_N: logit_N + bias_N, biases)
    if repeating:
        seen = [s.seen_ids for _, s in repeating]
        penalties = _each([s.params.repetition_penalty for _, s in repeating], seen)
        changed.change(_rows(repeating), seen, _repeated, penalties)
    if counted:
        made = [s.made_ids for _, s in counted]
        counts = np.concatenate([s.made_counts for _, s in counted])
        frequencies = _each([s.params.frequency_penalty for _, s in counted], made)
        presences = _each([s.params.presence_penalty for _, s in counted], made)
        changed.change(_rows(counted), made, _used, counts, frequencies, presences)
    if unready:
        ending = [s.ending_ids for _, s in unready]
        changed.change(_rows(unready), ending, lambda logit_N: torch.full_like(logit_N, _LEAST))
    return changed.logits_RV


def _repeated(logit_N: torch.Tensor, penalty_N: torch.Tensor) -> torch.Tensor:
    return torch.where(logit_N < 0, logit_N * penalty_N, logit_N / penalty_N)


def _used(
    logit_N: torch.Tensor, count_N: torch.Tensor, frequency_N: torch.Tensor, presence_N: torch.Tensor
) -> torch.Tensor:
    return logit_N - frequency_N * count_N - presence_N


def _rows(chosen: Sequence[tuple[int, SamplingState]]) -> list[int]:
    return [row for row, _ in chosen]


def _each(of_rows: Sequence[float], ids_of_rows: Sequence["array[int]"]) -> np.ndarray:
    """Each row's number once for each of its ids, in float64: a penalty may be too small for float32."""
    return np.repeat(np.array(of_rows, np.float64), [len(ids) for ids in ids_of_rows])


class _Logits:
    """A copy of the logits in which single entries are changed, for all rows at once."""

    def __init__(self, logits_RV: torch.Tensor) -> None:
        self.logits_RV = logits_RV.clone(memory_format=torch.contiguous_format)

    def change(
        self,
        rows: Sequence[int],
        ids_of_rows: Sequence["array[int]"],
        new: Callable[..., torch.Tensor],
        *values_N: np.ndarray,
    ) -> None:
        """Replace the logits of tokens ids_of_rows[i] in row rows[i] by new(logit_N, *values_N).

        No id may appear twice in a row.
        """
        vocab = self.logits_RV.shape[-1]
        token_id_N = np.concatenate(ids_of_rows)
        # Below, an id outside the vocabulary would be a token of another row.
        assert 0 <= token_id_N.min() <= token_id_N.max() < vocab
        index = np.repeat(np.array(rows, np.int64), [len(ids) for ids in ids_of_rows]) * vocab + token_id_N
        index_N, *value_tensors_N = upload([index, *values_N], self.logits_RV.device)
        flat = self.logits_RV.view(-1)
        flat[index_N] = new(flat[index_N].double(), *value_tensors_N).clamp(_LEAST, _MOST).float()
