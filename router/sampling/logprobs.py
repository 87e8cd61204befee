"""Log-probabilities of the model itself: from its raw logits, before bias, penalties, temperature, top_k and top_p.

Legend: R rows (positions in a text), V vocabulary, N most likely tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.upload import upload
from router.request import TokenLogprobs
from router.sampling.candidates import block_sums, largest, sorted_top, weights

# Not -inf, which JSON cannot write; logits at both ends of float32 would give it.
_LEAST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class RowFailed:
    """Stands where a row's token or log-probabilities would; `reason` is for the request's client."""

    reason: str


NOT_FINITE = RowFailed(
    "the model's logits are not finite numbers here: its weights are damaged, or overflow in this dtype; "
    "check the checkpoint, or serve it in another dtype"
)


def finite_rows(logits_RV: torch.Tensor) -> tuple[torch.Tensor, dict[int, RowFailed]]:
    """The logits, with zeros in each row that has NaN or infinity; and these rows, by number.

    Whatever is computed of such a row afterwards is worthless, but harms no other row.
    """
    # A row with NaN or infinity has no finite sum, and summing is ten times as fast as asking each logit.
    if bool(logits_RV.sum(dim=-1).isfinite().all()):
        return logits_RV, {}
    finite_R1 = logits_RV.isfinite().all(dim=-1, keepdim=True)
    failed = [row for row, finite in enumerate(finite_R1[:, 0].tolist()) if not finite]
    return logits_RV.where(finite_R1, 0.0), dict.fromkeys(failed, NOT_FINITE)


def token_logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """For each row r the log-probability of token_ids[r], and of the tops[r] most likely tokens.

    Of equally likely tokens, those with the lowest ids come first, as in sampling. For rows of a
    prompt, token_ids are the prompt's next tokens.
    """
    total_R1 = _log_total(logits_RV)
    [token_R] = upload([np.array(token_ids, np.int64)], logits_RV.device)
    best_RN, best_id_RN = _most_likely(logits_RV, min(max(tops), logits_RV.shape[-1]))
    told_RN = torch.cat([logits_RV.gather(1, token_R[:, None]), best_RN], dim=1)
    told, best_ids = (told_RN - total_R1).clamp(min=_LEAST).tolist(), best_id_RN.tolist()
    return [
        TokenLogprobs(token_id, logprob, tuple(zip(ids[:count], best[:count], strict=True)))
        for token_id, (logprob, *best), ids, count in zip(token_ids, told, best_ids, tops, strict=True)
    ]


def _log_total(logits_RV: torch.Tensor) -> torch.Tensor:
    """logsumexp [R, 1]. torch's own rounds one long row otherwise than in a batch: see `block_sums`."""
    sum_R1 = block_sums(weights(logits_RV, logits_RV.new_ones(1, 1))).sum(dim=-1, keepdim=True)
    return logits_RV.amax(dim=-1, keepdim=True) + sum_R1.log().type_as(logits_RV)


def _most_likely(logits_RV: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest (logits, token ids), [R, N]; of equal logits the lowest ids are taken, and come first."""
    vocab = logits_RV.shape[-1]
    logit_RN, token_id_RN = sorted_top(logits_RV, min(size + 1, vocab))
    if 0 < size < vocab:
        # Where the first that is left out equals the last that is taken, look at the whole row.
        unclear_R = logit_RN[:, size - 1] == logit_RN[:, size]
        if bool(unclear_R.any()):
            some_RV, least_R1 = logits_RV[unclear_R], logit_RN[unclear_R, size - 1 : size]
            taken_RV = largest(some_RV, least_R1, torch.full_like(least_R1, size, dtype=torch.int64))
            ids_RN = taken_RV.nonzero()[:, 1].view(-1, size)
            values_RN, order_RN = some_RV.gather(1, ids_RN).sort(dim=-1, descending=True, stable=True)
            logit_RN[unclear_R, :size], token_id_RN[unclear_R, :size] = values_RN, ids_RN.gather(1, order_RN)
    return logit_RN[:, :size], token_id_RN[:, :size]
