"""The tokens that a row may draw with their probabilities, and the draw.

Temperature comes first, then top_k, then top_p over what top_k kept, then min_p relative to the
most likely token. This is the order of transformers' TemperatureLogitsWarper, TopKLogitsWarper,
TopPLogitsWarper and MinPLogitsWarper. Only equal logits at the border of top_k differ: exactly k
are kept, those with the lowest token ids.

A row's candidates depend on its own logits and parameters only.

Legend: R rows (sequences), V vocabulary, N tokens of a row that are looked at, B blocks of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels.upload import upload
from router.request import SamplingParams

_TINY = torch.finfo(torch.float32).tiny  # lowest temperature: float32 would round a lower one to zero
# How many of a row's most likely tokens are looked at first. They nearly always include all
# candidates, and finding them is faster than sorting the vocabulary.
_FIRST_LOOK = 128
_BLOCK = 256


@dataclass(frozen=True)
class Candidates:
    """The candidates of some rows. rows: their numbers in the batch.

    weight_RN: proportional to the probability, 0 for tokens that are left out.
    token_id_RN: the token of each weight; None if column n is token n.
    """

    rows: list[int]
    weight_RN: torch.Tensor
    token_id_RN: torch.Tensor | None


def candidates(logits_RV: torch.Tensor, params: Sequence[SamplingParams], rows: list[int]) -> Iterator[Candidates]:
    """The candidates of each of `rows`, in groups of rows. All their temperatures are above 0.

    Only rows with top_k or top_p are sorted; the others stay in the order of the vocabulary.
    """
    vocab = logits_RV.shape[-1]
    ordered = [row for row in rows if 0 < params[row].top_k < vocab or params[row].top_p < 1]
    in_order = set(ordered)
    plain = [row for row in rows if row not in in_order]
    if plain:
        plain_params = [params[row] for row in plain]
        min_p_R = np.array([p.min_p for p in plain_params], np.float32)
        temperature_R1, min_p_R1 = _columns(logits_RV.device, _temperatures(plain_params), min_p_R)
        weight_RV = weights(rows_of(logits_RV, plain), temperature_R1)
        if min_p_R.any():
            _leave_out_unlikely(weight_RV, min_p_R1)
        yield Candidates(plain, weight_RV, None)
    if ordered:
        yield from _likeliest(logits_RV, params, ordered)


def draw(found: Candidates, uniforms: Sequence[float]) -> list[int]:
    """One token per row: the first whose cumulative weight exceeds uniform (in [0, 1)) * total."""
    weight_RN = found.weight_RN
    device, width = weight_RN.device, weight_RN.shape[-1]
    # Find the block first, then the column in it. One float64 cumsum over the vocabulary takes ten
    # times as long.
    sum_RB = block_sums(weight_RN)
    sums_RB = sum_RB.cumsum(-1)
    [uniform_R1] = _columns(device, np.array(uniforms, np.float64))
    target_R1 = uniform_R1 * sums_RB[:, -1:]
    block_R1 = torch.searchsorted(sums_RB, target_R1, right=True)
    target_R1 = (target_R1 - (sums_RB - sum_RB).gather(1, block_R1)).clamp(min=0.0)
    column_RN = block_R1 * _BLOCK + torch.arange(_BLOCK, device=device)
    in_block_RN = weight_RN.gather(1, column_RN.clamp(max=width - 1)).double()
    within_RN = in_block_RN.where(column_RN < width, 0.0).cumsum(-1)
    # Rounding may put the target at the end of the block, where no column exceeds it. Keep it just
    # below.
    last_R1 = torch.nextafter(within_RN[:, -1:], torch.zeros_like(target_R1))
    chosen_R1 = column_RN.gather(1, torch.searchsorted(within_RN, target_R1.minimum(last_R1), right=True))
    if found.token_id_RN is not None:
        chosen_R1 = found.token_id_RN.gather(1, chosen_R1)
    return [int(token_id) for token_id in chosen_R1[:, 0].tolist()]


def _likeliest(logits_RV: torch.Tensor, params: Sequence[SamplingParams], rows: list[int]) -> Iterator[Candidates]:
    """The candidates of rows with top_k or top_p."""
    total_R1 = _totals(logits_RV, params, rows)
    nth = {row: i for i, row in enumerate(rows)}
    # The look must include the first token that top_k leaves out.
    looking = [row for row in rows if params[row].top_k < _FIRST_LOOK < logits_RV.shape[-1]]
    answered = set()
    if looking:
        logit_RN, token_id_RN = sorted_top(rows_of(logits_RV, looking), _FIRST_LOOK)
        looking_total_R1 = rows_of(total_R1, [nth[row] for row in looking])
        weight_RN = _kept(logit_RN, [params[row] for row in looking], looking_total_R1)
        # If a kept token equals the last one looked at, tokens beyond may equal it too. Then look
        # at the whole row.
        unclear_R = ((weight_RN > 0) & (logit_RN == logit_RN[:, -1:])).any(dim=-1).tolist()
        clear = [i for i, unclear in enumerate(unclear_R) if not unclear]
        if clear:
            answered = {looking[i] for i in clear}
            yield Candidates([looking[i] for i in clear], rows_of(weight_RN, clear), rows_of(token_id_RN, clear))
    rest = [row for row in rows if row not in answered]
    if rest:
        some_RV, some_params = rows_of(logits_RV, rest), [params[row] for row in rest]
        least_R1, count_R1 = _border(some_RV, some_params, rows_of(total_R1, [nth[row] for row in rest]))
        weight_RV = weights(some_RV, *_columns(some_RV.device, _temperatures(some_params)))
        yield Candidates(rest, weight_RV.masked_fill_(~largest(some_RV, least_R1, count_R1), 0.0), None)


def _border(
    logits_RV: torch.Tensor, params: Sequence[SamplingParams], total_R1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(smallest logit kept, number of logits kept), [R, 1]."""
    logit_RV = _sorted(logits_RV)
    count_R1 = (_kept(logit_RV, params, total_R1) > 0).sum(dim=-1, keepdim=True)
    return logit_RV.gather(1, count_R1 - 1), count_R1


def largest(logits_RV: torch.Tensor, least_R1: torch.Tensor, count_R1: torch.Tensor) -> torch.Tensor:
    """A mask of the `count` largest logits; `least` is the smallest of them.

    Of its equals the lowest ids are kept.
    """
    keep_RV = logits_RV >= least_R1
    if bool((keep_RV.sum(dim=-1, keepdim=True) > count_R1).any()):
        larger_RV = logits_RV > least_R1
        room_R1 = count_R1 - larger_RV.sum(dim=-1, keepdim=True)
        equal_RV = logits_RV == least_R1
        keep_RV = larger_RV | (equal_RV & (equal_RV.cumsum(-1) <= room_R1))
    return keep_RV


def _kept(logit_RN: torch.Tensor, params: Sequence[SamplingParams], total_R1: torch.Tensor) -> torch.Tensor:
    """Weights of sorted logits, float64; 0 for tokens that top_k, top_p or min_p leave out.

    total_R1: the weight of each row's whole vocabulary; unused for rows with top_k.
    """
    device, size = logit_RN.device, logit_RN.shape[-1]
    min_p_R = np.array([p.min_p for p in params], np.float64)
    temperature_R1, top_k_R1, limited_R1, top_p_R1, min_p_R1 = _columns(
        device,
        _temperatures(params),
        np.array([min(p.top_k or size, size) for p in params], np.int64),
        np.array([p.top_k > 0 for p in params], np.bool_),
        np.array([p.top_p for p in params], np.float64),
        min_p_R,
    )
    weight_RN = weights(logit_RN, temperature_R1).double()
    weight_RN.masked_fill_(torch.arange(size, device=device) >= top_k_R1, 0.0)
    sum_RN = weight_RN.cumsum(-1)
    total_R1 = torch.where(limited_R1, sum_RN[:, -1:], total_R1)
    weight_RN.masked_fill_((sum_RN - weight_RN >= top_p_R1 * total_R1) & (top_p_R1 < 1), 0.0)
    if min_p_R.any():
        _leave_out_unlikely(weight_RN, min_p_R1)
    return weight_RN


def _totals(logits_RV: torch.Tensor, params: Sequence[SamplingParams], rows: Sequence[int]) -> torch.Tensor:
    """total_R1 of `rows`, float64: the weight of the whole vocabulary. Rows with top_k do not need it and get 0."""
    needing = [(nth, row) for nth, row in enumerate(rows) if params[row].top_k == 0]
    if not needing:
        return torch.zeros(len(rows), 1, dtype=torch.float64, device=logits_RV.device)
    temperatures = _temperatures([params[row] for _, row in needing])
    nths = np.array([nth for nth, _ in needing], np.int64)
    temperature_R1, nth_R1 = _columns(logits_RV.device, temperatures, nths)
    weight_RV = weights(rows_of(logits_RV, [row for _, row in needing]), temperature_R1)
    found_R1 = block_sums(weight_RV).sum(-1, keepdim=True)
    return found_R1 if len(needing) == len(rows) else found_R1.new_zeros(len(rows), 1).scatter_(0, nth_R1, found_R1)


def sorted_top(logits_RV: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `size` largest (logits, token ids), [R, size]; equal logits are in order of token id.

    Which tokens are taken among those equal to the last one is undefined.
    """
    found_RN, found_id_RN = logits_RV.topk(size, dim=-1)
    token_id_RN, by_id_RN = found_id_RN.sort(dim=-1)
    logit_RN, order_RN = found_RN.gather(1, by_id_RN).sort(dim=-1, descending=True, stable=True)
    return logit_RN, token_id_RN.gather(1, order_RN)


def _sorted(logits_RV: torch.Tensor) -> torch.Tensor:
    """All logits, largest first.

    On a CPU numpy is twenty times as fast as torch: it computes no indices.
    """
    if logits_RV.is_cpu:
        return torch.from_numpy(np.sort(logits_RV.numpy(), axis=-1)).flip(-1)
    return logits_RV.sort(dim=-1, descending=True).values


def block_sums(weight_RN: torch.Tensor) -> torch.Tensor:
    """Sums of _BLOCK weights each, float64. The last block holds the remainder and may be empty.

    torch spreads the sum of one long row over threads, which rounds differently than in a batch.
    Short blocks do not.
    """
    whole = weight_RN.shape[-1] // _BLOCK * _BLOCK
    full_RB = weight_RN[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)
    return torch.cat([full_RB, weight_RN[:, whole:].sum(-1, keepdim=True)], dim=1).double()


def weights(logits_RN: torch.Tensor, temperature_R1: torch.Tensor) -> torch.Tensor:
    """exp((logit - largest logit) / temperature): the most likely token has weight 1."""
    return torch.sub(logits_RN, logits_RN.amax(dim=-1, keepdim=True)).div_(temperature_R1).exp_()


def _temperatures(params: Sequence[SamplingParams]) -> np.ndarray:
    return np.array([max(p.temperature, _TINY) for p in params], np.float32)


def _leave_out_unlikely(weight_RN: torch.Tensor, min_p_R1: torch.Tensor) -> None:
    weight_RN.masked_fill_(weight_RN < min_p_R1, 0.0)


def rows_of(rows_RN: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """The chosen rows, in ascending order; not copied if all are chosen."""
    if len(rows) == len(rows_RN):
        return rows_RN
    [row_R] = upload([np.array(rows, np.int64)], rows_RN.device)
    return rows_RN[row_R]


def _columns(device: torch.device, *arrays: np.ndarray) -> list[torch.Tensor]:
    """Each array [R] as [R, 1]."""
    return [column_R[:, None] for column_R in upload(arrays, device)]
