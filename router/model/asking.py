"""Rows that shards were asked for, until each is answered: by the first shard asked, or by others.

Computing experts is a pure function of weights and rows. So a reply that is lost costs nothing but
time: another shard that holds the experts is asked for the same rows, and the step goes on.

Legend: N rows of a message, D model width.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from experts.errors import ComputeFailed, LinkDown, NotHeld
from experts.link import ExpertRows, Link, Reply
from experts.link_table import LinkTable
from experts.placement import Placement
from router.model.replica_choice import choose_replicas, work_of
from router.model.routes import best_holders
from router.model.shard_speed import LEAST_DEADLINE_S, ShardSpeeds

REFUSED_S = 1.0
"""A shard that does not hold an expert is not asked for it again so soon."""
LOOK_S = 0.1
"""Nothing tells when a deadline has passed: the longest time between two looks."""
MAIL_S = 0.01
"""After so long a wait the router's mail is read, too."""


class RowsFailed(Exception):
    """These rows have no answer; others are not concerned. The message names a shard, and says why.

    rows_N: which of the sorted rows. is_away: no living shard has held an expert of theirs for
    heal_s. Else two shards could not compute them, or one shard twice.
    """

    def __init__(self, rows_N: torch.Tensor, reason: str, *, is_away: bool) -> None:
        super().__init__(reason)
        self.rows_N, self.is_away = rows_N, is_away


@dataclass
class Part:
    """Rows that one shard was asked for, and what has become of it.

    The message is all it takes to ask it again, or another shard.

    rows_N: which of the step's sorted rows these are. reply: None if it was lost. late_s: when to
    ask others, too. pieces: the same rows, asked for elsewhere, each with its rows' places in this
    part. is_split: each expert is to be a piece of its own. loss: why the reply was lost, when, and
    its kind, as it is counted. refused_until_s: when to ask a shard again that does not hold an
    expert of it. failed: the shards whose computing failed, in turn. asked: shards that may still
    be computing these rows.
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
    is_split: bool = False
    loss_kind: str = ""
    loss: str = ""
    lost_s: float = 0.0

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
        self.placement = placement
        """The newest one: whom to ask for rows that are lost or late, also amid a step that began with another."""
        self._links, self._heal_s, self._clock = links, heal_s, clock
        self.speeds = ShardSpeeds()
        self.rows_of_shard: Counter[int] = Counter()
        """(token, expert) pairs that each shard was asked for since the start."""
        self.retries: Counter[str] = Counter()
        """Parts asked for elsewhere, by reason: "lost", "not_held", "compute_failed", "late"."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called after each longer wait, at least every LOOK_S. What it raises ends the step."""
        self._refusals: dict[tuple[int, int, int], tuple[float, Link]] = {}
        """(shard, layer, expert) -> since when the shard does not hold it, and its link then."""

    def slowness(self) -> Mapping[int, float]:
        """See ShardSpeeds.slowness."""
        return self.speeds.slowness()

    def slowness_now(self) -> Mapping[int, float]:
        """See ShardSpeeds.slowness_now."""
        return self.speeds.slowness_now(self._clock())

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
        """Return once all parts have their answers. Raises RowsFailed, and what `while_waiting` raises."""
        bell, waiting = self._links.bell, list(parts)
        while True:
            seen, now_s = bell.rings, self._clock()
            waiting = [part for part in waiting if not self._look(part, now_s)]
            if not waiting:
                return
            leaves = [leaf for part in waiting for leaf in _leaves(part)]
            lost = [leaf for leaf in leaves if leaf.reply is None]
            self._check_lost(lost, now_s)
            timeout_s = min(LOOK_S, max(0.0, min(leaf.late_s for leaf in leaves) - now_s))
            bell.wait(seen, timeout_s)
            waited_s = self._clock() - now_s
            if waited_s - timeout_s > LEAST_DEADLINE_S:  # it was this process that was stopped
                for leaf in leaves:
                    leaf.asked_s, leaf.late_s = leaf.asked_s + waited_s, leaf.late_s + waited_s
            if waited_s > MAIL_S or lost:
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
            self.speeds.is_late(part.shard, now_s)
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
            part.is_split = len(part.message.experts) > 1  # of several, one alone may be missing
            if not part.is_split:
                part.refused_until_s[part.shard] = now_s + REFUSED_S
                self._note_refusal(part, now_s)
        except ComputeFailed as error:
            self._lose(part, "compute_failed", str(error))
            part.is_split = len(part.message.experts) > 1
            part.failed += (part.shard,)
            if len(part.failed) == 2:
                raise RowsFailed(part.rows_N, f"expert shard {part.shard}: {error}", is_away=False) from error
        else:
            if reply.answered_s is not None:
                self.speeds.answered(part.shard, part.work, max(0.0, reply.answered_s - part.asked_s), now_s)
            for slot in [slot for slot in self._refusals if slot[:2] == (part.shard, part.message.layer)]:
                if slot[2] in part.message.experts:
                    del self._refusals[slot]

    def _lose(self, part: Part, kind: str, reason: str) -> None:
        part.reply, part.late_s = None, math.inf
        part.loss_kind, part.loss, part.lost_s = kind, reason, self._clock()

    def _holders(self, part: Part, now_s: float) -> list[Sequence[int]]:
        """For each expert of the part, the shards that may be asked; none if all are away."""
        use_of = {
            shard: use
            for shard, use in self._links.use_of.items()
            if part.refused_until_s.get(shard, now_s) <= now_s and self._links.down_reason(shard) is None
        }
        shards_of = self.placement.shards_of[part.message.layer]
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
        chosen = choose_replicas(count_of, holders, self.speeds.slowness())
        pieces = []
        for shard, groups in _grouped(chosen, len(holders), apart=part.is_split):
            message, at_N = _selected(part.message, groups)
            rows_N = part.rows_N[at_N]
            if shard is None:
                piece = Part(part.shard, rows_N, message, now_s)
                piece.loss_kind, piece.loss, piece.lost_s = part.loss_kind, part.loss, part.lost_s
            else:
                piece = self.ask(shard, rows_N, message)
            piece.refused_until_s, piece.failed, piece.asked = dict(part.refused_until_s), part.failed, part.asked
            pieces.append((piece, at_N))
        return pieces

    def _check_lost(self, lost: Sequence[Part], now_s: float) -> None:
        gone = [part for part in lost if now_s - self._away_since_s(part) >= self._heal_s]
        if gone:
            reason = f"expert shard {gone[0].shard}: {gone[0].loss}"
            raise RowsFailed(torch.cat([part.rows_N for part in gone]), reason, is_away=True)

    def _away_since_s(self, part: Part) -> float:
        """Since when an expert of the part has had nobody who could be asked, in this wait or an earlier one."""
        layer = part.message.layer
        shards_of = self.placement.shards_of[layer]
        return min(
            max(self._cannot_answer_since_s(shard, layer, expert, part.lost_s) for shard in shards_of[expert])
            for expert in part.message.experts
        )

    def _cannot_answer_since_s(self, shard: int, layer: int, expert: int, lost_s: float) -> float:
        down_s = self._links.down_since_s(shard)
        if down_s is not None:
            return down_s
        refused_s, link = self._refusals.get((shard, layer, expert), (lost_s, None))
        if link is not None and link is self._link(shard):
            return refused_s
        return math.inf if self._links.down_reason(shard) is None else lost_s  # inf: it can be asked

    def _note_refusal(self, part: Part, now_s: float) -> None:
        [expert] = part.message.experts
        slot, link = (part.shard, part.message.layer, expert), self._link(part.shard)
        _, known = self._refusals.get(slot, (now_s, None))
        if link is not None and known is not link:
            self._refusals[slot] = now_s, link

    def _link(self, shard: int) -> Link | None:
        """The shard's link; None if it has just lost it."""
        try:
            return self._links.link(shard)
        except LinkDown:
            return None


def _grouped(chosen: Mapping[int, int], groups: int, *, apart: bool) -> Sequence[tuple[int | None, list[int]]]:
    """(shard, its groups), those without a shard last. apart: each group by itself."""
    if apart:
        return [(chosen.get(group), [group]) for group in range(groups)]
    of_shard: dict[int | None, list[int]] = {shard: [] for shard in [*sorted(set(chosen.values())), None]}
    for group in range(groups):
        of_shard[chosen.get(group)].append(group)
    return [(shard, members) for shard, members in of_shard.items() if members]


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
