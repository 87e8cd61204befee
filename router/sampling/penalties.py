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

import torch

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
        bias_N = changed.values([s.biases for _, s in biased])
        changed.change(_rows(biased), [s.bias_ids for _, s in biased], lambda logit_N, _: logit_N + bias_N)
    if repeating:
        penalty_R = changed.values([array("d", [s.params.repetition_penalty for _, s in repeating])])

        def repeated(logit_N: torch.Tensor, owner_N: torch.Tensor) -> torch.Tensor:
            penalty_N = penalty_R[owner_N]
            return torch.where(logit_N < 0, logit_N * penalty_N, logit_N / penalty_N)

        changed.change(_rows(repeating), [s.seen_ids for _, s in repeating], repeated)
    if counted:
        count_N = changed.values([s.made_counts for _, s in counted])
        frequency_R = changed.values([array("d", [s.params.frequency_penalty for _, s in counted])])
        presence_R = changed.values([array("d", [s.params.presence_penalty for _, s in counted])])

        def used(logit_N: torch.Tensor, owner_N: torch.Tensor) -> torch.Tensor:
            return logit_N - frequency_R[owner_N] * count_N - presence_R[owner_N]

        changed.change(_rows(counted), [s.made_ids for _, s in counted], used)
    if unready:
        ending = [s.ending_ids for _, s in unready]
        changed.change(_rows(unready), ending, lambda logit_N, _: torch.full_like(logit_N, _LEAST))
    return changed.logits_RV


def _rows(chosen: Sequence[tuple[int, SamplingState]]) -> list[int]:
    return [row for row, _ in chosen]


class _Logits:
    """A copy of the logits in which single entries are changed, for all rows at once."""

    def __init__(self, logits_RV: torch.Tensor) -> None:
        self.logits_RV = logits_RV.clone(memory_format=torch.contiguous_format)

    def values(self, of_rows: Sequence["array[float]"]) -> torch.Tensor:
        """The rows' numbers, concatenated, in float64: a penalty may be too small for float32."""
        return torch.frombuffer(bytearray().join(of_rows), dtype=torch.float64).to(self.logits_RV.device)

    def change(
        self,
        rows: Sequence[int],
        ids_of_rows: Sequence["array[int]"],
        new: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> None:
        """Replace the logits of tokens ids_of_rows[i] in row rows[i] by new(logit_N, owner_N).

        owner_N: for each logit the i it belongs to. No id may appear twice in a row.
        """
        device, vocab = self.logits_RV.device, self.logits_RV.shape[-1]
        token_id_N = torch.frombuffer(bytearray().join(ids_of_rows), dtype=torch.int64)
        # Below, an id outside the vocabulary would be a token of another row.
        assert len(token_id_N) == 0 or 0 <= int(token_id_N.min()) <= int(token_id_N.max()) < vocab
        token_id_N = token_id_N.to(device)
        counts = torch.tensor([len(ids) for ids in ids_of_rows], device=device)
        owner_N = torch.arange(len(rows), device=device).repeat_interleave(counts)
        index_N = torch.tensor(rows, device=device)[owner_N] * vocab + token_id_N
        flat = self.logits_RV.view(-1)
        flat[index_N] = new(flat[index_N].double(), owner_N).clamp(_LEAST, _MOST).float()
