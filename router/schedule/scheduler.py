"""Chooses the tokens of the next step.

Queues and block counts only: no tensors, no RPC, and the caller's clock.

Each decoding sequence gets one token per step. The rest of the step's token budget goes to prompts
in pieces, oldest first. Requests are admitted in order of arrival.

Sequences take KV blocks as they grow. When blocks run out, the youngest running sequence is
preempted: it gives its blocks back, and is computed again later. So the oldest always makes
progress, and no request fails for lack of memory.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from router.errors import AlreadyExists, ResourceExhausted
from router.request import LOST, SILENT, UNAVAILABLE, FinishReason, GenerationRequest
from router.schedule.block_table import BlockTable, PrefixKeys
from router.schedule.blocks import BlockPool
from router.schedule.end_rate import EndRate
from router.schedule.kv_layout import KvLayout
from router.schedule.limits import UNPACED_TOKENS, SchedulerLimits
from router.schedule.pace import PrefillPace
from router.schedule.sequence import SequenceState, Work


@dataclass
class SchedulerCounters:
    """Totals since the start.

    prefix_queried_tokens: prompt tokens looked up; prefix_hit_tokens: those found.
    """

    preemptions: int = 0
    prefix_queried_tokens: int = 0
    prefix_hit_tokens: int = 0


@dataclass
class Scheduler:
    """The queue of waiting requests, the running sequences, and the KV pool.

    layout: of the KV cache. The pool has as many units as fit into limits.kv_bytes. clock:
    monotonic seconds.
    """

    limits: SchedulerLimits
    layout: KvLayout
    clock: Callable[[], float]
    counters: SchedulerCounters = field(default_factory=SchedulerCounters)
    _waiting: "OrderedDict[str, SequenceState]" = field(default_factory=OrderedDict)
    _running: "OrderedDict[str, SequenceState]" = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.pool = BlockPool(self.limits.kv_bytes // self.layout.unit_bytes)
        self._pace = (
            PrefillPace(self.limits.max_step_tokens, self.limits.prefill_slowdown)
            if self.limits.prefill_slowdown is not None
            else None
        )
        self._free_table_rows = list(range(self.limits.max_running - 1, -1, -1))
        self._arrivals = 0
        self._being_computed: set[bytes] = set()  # keys of prompt blocks that running sequences will publish
        self._expiring: list[tuple[float, str]] = []  # a heap of (deadline, request id)
        self._ends = EndRate(self.clock())
        # The head of the queue when it did not fit, and the spare units then. It is tried again when
        # that number changes, not sooner: the prefix of a long prompt takes thousands of look-ups.
        self._found_no_room: tuple[SequenceState, int] | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def request_ids(self) -> list[str]:
        """All requests, running ones first."""
        return [*self._running, *self._waiting]

    @property
    def kv_bytes_used(self) -> int:
        return self.pool.used_units * self.layout.unit_bytes

    @property
    def kv_bytes_total(self) -> int:
        return self.pool.num_units * self.layout.unit_bytes

    @property
    def kv_bytes_cached(self) -> int:
        return self.pool.cached_units * self.layout.unit_bytes

    def enqueue(self, request: GenerationRequest) -> None:
        """Queue a request. One that another router had before goes ahead of those that are new.

        Raises ResourceExhausted if the queue is full or the request can never fit, AlreadyExists if
        its id is in use.
        """
        if request.request_id in self._running or request.request_id in self._waiting:
            raise AlreadyExists(f"request {request.request_id} is under way already; it goes on")
        positions = len(request.prompt_token_ids) + request.sampling.max_tokens
        units = self.layout.units(positions)
        if units > self.pool.num_units:
            raise ResourceExhausted(
                f"prompt and max_tokens come to {positions} tokens, whose KV cache needs "
                f"{units * self.layout.unit_bytes} bytes; the server has {self.limits.kv_bytes} "
                "(engine.kv_bytes or engine.kv_share)"
            )
        now_s = self.clock()
        goes_on = request.replayed in (LOST, SILENT, UNAVAILABLE)  # its client was not refused before
        if len(self._waiting) >= self.limits.max_waiting and not goes_on:
            raise ResourceExhausted(
                f"{len(self._waiting)} requests are waiting already (engine.max_waiting)",
                retry_after_s=self._ends.seconds_per_end(now_s),
            )
        if request.timeout_s is not None:
            self._forget_ended()
            heapq.heappush(self._expiring, (now_s + request.timeout_s, request.request_id))
        if not self._waiting and not self._running:
            self._ends.begin(now_s)
        keys = PrefixKeys(self.layout.block_tokens)
        self._arrivals += 1
        token_ids = [*request.prompt_token_ids, *request.made]
        self._waiting[request.request_id] = SequenceState(self._arrivals, request, token_ids, keys, goes_on=goes_on)
        if goes_on:
            ahead = [name for name, sequence in self._waiting.items() if sequence.goes_on]
            for name in reversed(ahead):
                self._waiting.move_to_end(name, last=False)

    def remove(self, request_id: str, *, unpublish: bool = False) -> bool:
        """Drop a waiting or running request and free its memory. Returns False if it is unknown.

        unpublish: its keys and values are worthless, so no later request may find them. A prefix
        that it shares with others is then computed again.
        """
        if self._waiting.pop(request_id, None) is not None:
            return True
        sequence = self._running.pop(request_id, None)
        if sequence is None:
            return False
        if unpublish and sequence.blocks is not None:
            sequence.blocks.unpublish(sequence.token_ids)
        self._release(sequence)
        self._ends.count(self.clock())
        return True

    def runs(self, sequence: SequenceState) -> bool:
        """Whether this very request is running: not ended, and no other has its id."""
        return self._running.get(sequence.request.request_id) is sequence

    def expired(self) -> list[str]:
        """Ids of requests whose timeout has passed. Each is returned once."""
        now_s, expired = self.clock(), []
        while self._expiring and self._expiring[0][0] <= now_s:
            _, request_id = heapq.heappop(self._expiring)
            if request_id in self._running or request_id in self._waiting:
                expired.append(request_id)
        return expired

    def schedule(self) -> list[Work]:
        """Choose the next step's work, decoding sequences first. Empty if there is nothing to do."""
        self._admit()
        plan = _Plan(self.limits.max_step_tokens)
        by_age = sorted(self._running.values(), key=lambda s: s.number)
        for sequence in [s for s in by_age if s.is_decoding]:
            if plan.tokens_left and sequence.table_row >= 0 and self._make_room(sequence, 1, plan):
                plan.put(sequence, 1)
        paced_left = plan.tokens_left
        if self._pace is not None:
            paced_left = min(paced_left, self._pace.prompt_tokens(len(plan.lengths)))
        prompts = [s for s in by_age if not s.is_decoding]
        if any(sequence.table_row >= 0 and sequence.computed < UNPACED_TOKENS for sequence in prompts):
            paced_left = min(paced_left, -(-plan.tokens_left // 2))  # leave half for prompts that begin
        for sequence in prompts:
            if plan.tokens_left and sequence.table_row >= 0:
                to_chunk_end = self.layout.chunk_tokens - sequence.computed % self.layout.chunk_tokens
                wanted = min(len(sequence.token_ids) - sequence.computed, plan.tokens_left, to_chunk_end)
                is_paced = sequence.computed >= UNPACED_TOKENS
                if is_paced:
                    wanted = min(wanted, paced_left)
                length = self._make_room(sequence, wanted, plan) if wanted else 0
                if length:
                    plan.put(sequence, length)
                    paced_left -= length if is_paced else 0
        return [self._work(sequence, length) for sequence, length in plan.lengths.items()]

    def advance(self, work: Work, token_id: int | None, eos_token_ids: frozenset[int]) -> FinishReason | None:
        """Record that `work` is computed, and the token it sampled, if any.

        A finished request is removed.
        """
        sequence, sampling = work.sequence, work.sequence.request.sampling
        assert sequence.blocks is not None
        assert work.samples == (token_id is not None)
        sequence.computed = work.first + work.length
        published = sequence.blocks.mark_computed(sequence.token_ids, sequence.computed)
        self._being_computed.difference_update(published)
        if token_id is None:
            return None
        sequence.token_ids.append(token_id)
        finish = None
        if token_id in sampling.stop_token_ids or (token_id in eos_token_ids and not sampling.ignore_eos):
            finish = FinishReason.STOP
        elif sequence.generated >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        if finish is not None:
            self.remove(sequence.request.request_id)
        return finish

    def record_step(self, works: list[Work], seconds: float) -> None:
        """Report how long the step took that computed `works`. Prompts are paced by it."""
        if self._pace is not None:
            prompts = [w for w in works if w.length > 1 or w.first < len(w.sequence.request.prompt_token_ids)]
            decoding = len(works) - len(prompts)
            paced = sum(work.length for work in prompts if work.first >= UNPACED_TOKENS)
            others = sum(work.length for work in works) - decoding - paced
            self._pace.record(decoding, paced, seconds, others)

    def _forget_ended(self) -> None:
        # Most requests end before their deadline, so their entries must be removed now and then.
        if len(self._expiring) > 2 * (len(self._running) + len(self._waiting)) + 16:
            alive = [(at_s, name) for at_s, name in self._expiring if name in self._running or name in self._waiting]
            heapq.heapify(alive)
            self._expiring = alive

    def _work(self, sequence: SequenceState, length: int) -> Work:
        assert sequence.blocks is not None
        entries = tuple(sequence.blocks.new_entries)
        sequence.blocks.new_entries.clear()
        return Work(sequence, sequence.computed, length, entries)

    def _admit(self) -> None:
        # First come, first served: while a large request at the head waits for room, nobody
        # overtakes it. The exception is a request whose prefix is being computed now. It steps
        # aside, and soon finds that prefix cached.
        for sequence in list(self._waiting.values()):
            if len(self._running) >= self.limits.max_running:
                return
            if sequence.awaited in self._being_computed:
                continue
            spare = self._spare_units()
            if self._running and self._found_no_room == (sequence, spare):
                return
            blocks, found = BlockTable(self.layout, self.pool, sequence.keys, publishes=self.limits.prefix_cache), 0
            if self._shares_prefixes(sequence):
                found = blocks.adopt_prefix(sequence.token_ids)
                sequence.awaited = self._key_to_await(sequence, found)
                if sequence.awaited is not None:
                    blocks.release()
                    continue
            # Admit with room for the whole prompt and the first new token. Blocks found are no
            # longer spare.
            needed = self.layout.units(len(sequence.token_ids) + 1) - blocks.units
            if self._running and self._spare_units() < needed:
                blocks.release()
                self._found_no_room = (sequence, spare)
                return
            self._start(sequence, blocks, found)

    def _spare_units(self) -> int:
        """Available units, less those that the running prompts will still take."""
        promised = sum(
            max(0, self.layout.units(len(s.token_ids)) - s.blocks.units)
            for s in self._running.values()
            if s.blocks is not None and not s.is_decoding
        )
        return self.pool.available_units - promised

    def _start(self, sequence: SequenceState, blocks: BlockTable, found: int) -> None:
        """Move a waiting sequence to the running ones.

        found: how many of its tokens are in `blocks` already.
        """
        sequence.computed = found
        if self._shares_prefixes(sequence):
            if sequence.cached_tokens is None:
                self.counters.prefix_queried_tokens += len(sequence.request.prompt_token_ids)
                self.counters.prefix_hit_tokens += min(found, len(sequence.request.prompt_token_ids))
            self._being_computed.update(self._keys_to_come(sequence))
        if sequence.cached_tokens is None:
            sequence.cached_tokens = min(found, len(sequence.request.prompt_token_ids))
        sequence.blocks, sequence.table_row = blocks, self._free_table_rows.pop()
        del self._waiting[sequence.request.request_id]
        self._running[sequence.request.request_id] = sequence

    def _shares_prefixes(self, sequence: SequenceState) -> bool:
        return self.limits.prefix_cache and sequence.request.sampling.prompt_logprobs is None

    def _keys_to_come(self, sequence: SequenceState) -> list[bytes]:
        done, full = (count // self.layout.block_tokens for count in (sequence.computed, len(sequence.token_ids)))
        return sequence.keys.of(sequence.token_ids, full)[done:]

    def _key_to_await(self, sequence: SequenceState, found: int) -> bytes | None:
        # The last such key, not the first: else each waiting request would look its prefix up
        # again after every block.
        done, full = (n // self.layout.block_tokens for n in (found, len(sequence.token_ids) - 1))
        awaited = None
        for key in sequence.keys.of(sequence.token_ids, full)[done:]:
            if key not in self._being_computed:
                break
            awaited = key
        return awaited

    def _make_room(self, sequence: SequenceState, length: int, plan: "_Plan") -> int:
        """Allocate blocks for the sequence's next `length` tokens, and preempt younger ones if needed.

        Returns how many of the tokens have room.
        """
        assert sequence.blocks is not None
        while True:
            room = sequence.blocks.grow(sequence.computed, length)
            if room:
                return room
            youngest = max(self._running.values(), key=lambda s: s.number)
            if youngest is sequence:
                return 0  # it waits, and keeps its blocks until an older one needs them
            self._preempt(youngest)
            plan.drop(youngest)

    def _preempt(self, sequence: SequenceState) -> None:
        request_id = sequence.request.request_id
        del self._running[request_id]
        self._release(sequence)
        sequence.computed = 0
        self._waiting[request_id] = sequence
        self._waiting.move_to_end(request_id, last=False)
        self.counters.preemptions += 1

    def _release(self, sequence: SequenceState) -> None:
        assert sequence.blocks is not None
        if self._shares_prefixes(sequence):
            self._being_computed.difference_update(self._keys_to_come(sequence))
        sequence.blocks.release()
        sequence.blocks = None
        self._free_table_rows.append(sequence.table_row)
        sequence.table_row = -1


class _Plan:
    """A step being planned.

    lengths: tokens of each sequence in it. tokens_left: how many more fit.
    """

    def __init__(self, max_tokens: int) -> None:
        self.lengths: dict[SequenceState, int] = {}
        self.tokens_left = max_tokens

    def put(self, sequence: SequenceState, length: int) -> None:
        self.lengths[sequence] = length
        self.tokens_left -= length

    def drop(self, sequence: SequenceState) -> None:
        self.tokens_left += self.lengths.pop(sequence, 0)
