"""Log-probabilities of the model itself: from its raw logits, before bias, penalties, temperature, top_k and top_p.

Legend: R rows (positions in a text), V vocabulary, N most likely tokens.
"""

from collections.abc import Sequence

import torch

from router.request import TokenLogprobs


def token_logprobs(logits_RV: torch.Tensor, token_ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprobs]:
    """For each row r the log-probability of token_ids[r], and of the tops[r] most likely tokens.

    For rows of a prompt, token_ids are the prompt's next tokens.
    """
    total_R1 = logits_RV.logsumexp(dim=-1, keepdim=True)
    token_R1 = torch.tensor(token_ids, device=logits_RV.device)[:, None]
    logprobs = (logits_RV.gather(1, token_R1) - total_R1)[:, 0].tolist()
    best_RN, best_id_RN = logits_RV.topk(min(max(tops), logits_RV.shape[-1]), dim=-1)
    best, best_ids = (best_RN - total_R1).tolist(), best_id_RN.tolist()
    result = []
    for row, (token_id, logprob, count) in enumerate(zip(token_ids, logprobs, tops, strict=True)):
        top = tuple(zip(best_ids[row][:count], best[row][:count], strict=True))
        if top and logprob == top[0][1]:
            # Among equally likely tokens the chosen one comes first, so that it is not cut off.
            others = tuple(entry for entry in top if entry[0] != token_id)
            top = ((token_id, logprob), *others)[:count]
        result.append(TokenLogprobs(token_id, logprob, top))
    return result
