"""Rows that shards were asked for, until each is answered: by the first shard asked, or by others.

Computing experts is a pure function of weights and rows. So a reply that is lost costs nothing but
time: another shard that holds the experts is asked for the same rows, and the step goes on.

Legend: N rows of a message, D model width.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from experts.errors import ComputeFailed, LinkDown, NotHeld
from experts.link import ExpertRows, Reply
from experts.link_table import LinkTable
from experts.placement import Placement
from router.model.replica_choice import choose_replicas, work_of
from router.model.routes import best_holders
from router.model.shard_speed import ShardSpeeds

REFUSED_S = 1.0
"""A shard that does not hold an expert is not asked for it again so soon."""


class ShardUnavailable(Exception):
    """A shard that this step needs cannot answer, and no other holds its experts.

    The message names it and says why.
    """


class RowsFailed(Exception):
    """Two shards could not compute these rows, or one shard twice. Others are not concerned.

    rows_N: which of the sorted rows.
    """

    def __init__(self, rows_N: torch.Tensor, reason: str) -> None:
        super().__init__(reason)
        self.rows_N = rows_N


@dataclass
class Part:
    """Rows that one shard was asked for, and what has become of it.

    The message is all it takes to ask it again, or another shard.

    rows_N: which of the step's sorted rows these are. reply: None if it was lost. late_s: when to
    ask others, too. pieces: the same rows, asked for elsewhere, each with its rows' places in this
    part. loss: why the reply was lost, and its kind, as it is counted. refused_until_s: shards that
    do not hold an expert of it. failed: the shards whose computing failed, in turn. asked: shards
    that may still be computing these rows.
    """

    shard: int
    rows_N: torch.Tensor
    message: ExpertRows
    asked_s: float
    reply: Reply | None = None
    late_s: float = math.inf
    pieces: "Sequence[tuple[Part, torch.Tensor]]" = ()
    answer_ND: torch.Tensor | None = None
    refused_until_s: dict[int, float] = field(default_factory=dict)
    failed: tuple[int, ...] = ()
    asked: frozenset[int] = frozenset()
    loss_kind: str = ""
    loss: str = ""

    @property
    def work(self) -> float:
        return work_of(len(self.message.experts), len(self.message.x_ND))


class Asker:
    """Asks shards for rows, and asks others for those that are lost or late. For one thread.

    heal_s: how long rows may wait for a shard to come back, if no living one holds their experts.
    """

    def __init__(
        self, placement: Placement, links: LinkTable, heal_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._placement, self._links, self._heal_s, self._clock = placement, links, heal_s, clock
        self.speeds = ShardSpeeds()
        self.rows_of_shard = [0] * placement.num_shards
        """(token, expert) pairs that each shard was asked for since the start."""
        self.retries: Counter[str] = Counter()
        """Parts asked for elsewhere, by reason: "lost", "not_held", "compute_failed", "late"."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called whenever a wait is woken, and ten times a second. What it raises ends the step."""
        self._lost_since_s: float | None = None

    def slowness(self) -> Mapping[int, float]:
        """See ShardSpeeds.slowness."""
        return self.speeds.slowness(self._clock())

    def ask(self, shard: int, rows_N: torch.Tensor, message: ExpertRows) -> Part:
        """Send the rows on their way. Never raises: if the shard is gone, the part is lost already."""
        part = Part(shard, rows_N, message, self._clock())
        try:
            part.reply = self._links.link(shard).request(message)
        except LinkDown as error:
            self._lose(part, "lost", str(error))
        else:
            part.late_s = part.asked_s + self.speeds.deadline_s(shard, part.work)
            self.rows_of_shard[shard] += len(message.x_ND)
        return part

    def wait(self, parts: Sequence[Part]) -> None:
        """Return once all parts have their answers. Raises ShardUnavailable, RowsFailed."""
        bell, waiting = self._links.bell, list(parts)
        self._lost_since_s = None
        while True:
            seen, now_s = bell.rings, self._clock()
            waiting = [part for part in waiting if not self._look(part, now_s)]
            if not waiting:
                return
            leaves = [leaf for part in waiting for leaf in _leaves(part)]
            self._check_lost([leaf for leaf in leaves if leaf.reply is None], now_s)
            next_late_s = min(leaf.late_s for leaf in leaves)
            bell.wait(seen, min(0.1, max(0.0, next_late_s - now_s)))
            if self._clock() - now_s > 0.01 or self._lost_since_s is not None:
                self.while_waiting()

    def _look(self, part: Part, now_s: float) -> bool:
        """Whether the part has its answer by now. Asks others for what is lost or late."""
        if part.answer_ND is None and part.reply is not None and part.reply.done:
            self._take(part, part.reply, now_s)
        if part.answer_ND is not None:
            return True
        if part.pieces:
            waiting = [piece for piece, _ in part.pieces if not self._look(piece, now_s)]
            if waiting:
                return False
            part.answer_ND = _put_together(part)
            return True
        if part.reply is None:
            part.pieces = self._ask_elsewhere(part, self._holders(part, now_s), now_s)
        elif now_s >= part.late_s:
            part.late_s = math.inf  # once
            self.speeds.is_late(part.shard, part.work, now_s - part.asked_s, now_s)
            part.asked |= {part.shard}
            holders = [[s for s in shards if s not in part.asked] for shards in self._holders(part, now_s)]
            if all(holders):
                part.loss_kind = "late"
                part.pieces = self._ask_elsewhere(part, holders, now_s)
        return False

    def _take(self, part: Part, reply: Reply, now_s: float) -> None:
        try:
            part.answer_ND = reply.take()
        except LinkDown as error:
            self._lose(part, "lost", str(error))
            self.speeds.forget(part.shard)
        except NotHeld as error:
            self._lose(part, "not_held", str(error))
            part.refused_until_s[part.shard] = now_s + REFUSED_S
        except ComputeFailed as error:
            self._lose(part, "compute_failed", str(error))
            part.failed += (part.shard,)
            if len(part.failed) == 2:
                raise RowsFailed(part.rows_N, f"expert shard {part.shard}: {error}") from error
        else:
            if reply.answered_s is not None:
                self.speeds.answered(part.shard, part.work, reply.answered_s - part.asked_s, now_s)

    def _lose(self, part: Part, kind: str, reason: str) -> None:
        part.reply, part.late_s, part.loss_kind, part.loss = None, math.inf, kind, reason

    def _holders(self, part: Part, now_s: float) -> list[Sequence[int]]:
        """For each expert of the part, the shards that may be asked; none if all are away."""
        use_of = {
            shard: use
            for shard, use in self._links.use_of.items()
            if part.refused_until_s.get(shard, now_s) <= now_s and self._links.down_reason(shard) is None
        }
        shards_of = self._placement.shards_of[part.message.layer]
        holders = [best_holders(shards_of[expert], use_of) for expert in part.message.experts]
        return [[shard for shard in shards if shard not in part.failed] or shards for shards in holders]

    def _ask_elsewhere(
        self, part: Part, holders: Sequence[Sequence[int]], now_s: float
    ) -> Sequence[tuple[Part, torch.Tensor]]:
        """Ask one of its holders for each expert. Empty if none has any; else those without are a lost piece."""
        if not any(holders):
            return ()
        self.retries[part.loss_kind] += 1
        count_of = {group: part.message.counts[group] for group, shards in enumerate(holders) if shards}
        chosen = choose_replicas(count_of, holders, self.speeds.slowness(now_s))
        pieces = []
        for shard in [*sorted(set(chosen.values())), None]:
            groups = [group for group in range(len(holders)) if chosen.get(group) == shard]
            if not groups:
                continue
            message, at_N = _selected(part.message, groups)
            rows_N = part.rows_N[at_N]
            if shard is None:
                piece = Part(part.shard, rows_N, message, now_s, loss_kind=part.loss_kind, loss=part.loss)
            else:
                piece = self.ask(shard, rows_N, message)
            piece.refused_until_s, piece.failed, piece.asked = dict(part.refused_until_s), part.failed, part.asked
            pieces.append((piece, at_N))
        return pieces

    def _check_lost(self, lost: Collection[Part], now_s: float) -> None:
        if not lost:
            return
        if self._lost_since_s is None:
            self._lost_since_s = now_s
        if now_s - self._lost_since_s >= self._heal_s:
            part = next(iter(lost))
            raise ShardUnavailable(f"expert shard {part.shard}: {part.loss}")


def _leaves(part: Part) -> Sequence[Part]:
    """The parts below that wait for an answer themselves."""
    if part.answer_ND is not None:
        return ()
    if not part.pieces:
        return (part,)
    below = [leaf for piece, _ in part.pieces for leaf in _leaves(piece)]
    return below if part.reply is None else [part, *below]


def _selected(message: ExpertRows, groups: Sequence[int]) -> tuple[ExpertRows, torch.Tensor]:
    """The message of some of its experts, and where its rows are in the whole one."""
    ends = torch.tensor(message.counts).cumsum(0).tolist()
    at_N = torch.cat([torch.arange(ends[group] - message.counts[group], ends[group]) for group in groups])
    experts, versions, counts = (
        [of_groups[group] for group in groups] for of_groups in (message.experts, message.versions, message.counts)
    )
    x_ND = message.x_ND[at_N.to(message.x_ND.device)]
    return ExpertRows(message.layer, experts, versions, counts, x_ND), at_N


def _put_together(part: Part) -> torch.Tensor:
    answers = [(piece.answer_ND, at_N) for piece, at_N in part.pieces]
    y_ND = torch.empty_like(part.message.x_ND)
    for answer_ND, at_N in answers:
        assert answer_ND is not None
        y_ND[at_N.to(y_ND.device)] = answer_ND
    return y_ND
