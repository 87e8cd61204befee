"""What actors answer: plain data, readable without torch by `drover status` and Serve replicas."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from experts.placement import Slot
from router.counts.expert_totals import ExpertTotals
from router.counts.requests import EngineSnapshot, EngineStats
from router.request import TokenDelta


class Phase(str, Enum):
    LOADING = "loading"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class ActorState:
    """bytes_done of bytes_total checkpoint bytes are read. pid: of the actor's process on its node.
    error: why the last try failed; empty once the phase is READY. retry_s: seconds until the next try, when FAILED.
    waits_for: what keeps an actor LOADING that has read its weights."""

    pid: int
    phase: Phase
    bytes_done: int
    bytes_total: int
    error: str = ""
    waits_for: str = ""
    retry_s: float | None = None

    @property
    def summary(self) -> str:
        if self.phase is Phase.FAILED:
            again = "" if self.retry_s is None else f"; next try in {self.retry_s:.0f} s"
            return f"failed: {self.error}{again}"
        if self.phase is Phase.LOADING:
            waiting = f", waiting for {self.waits_for}" if self.waits_for else ""
            return f"loading, {self.bytes_done} of {self.bytes_total} bytes{waiting}"
        return "ready"


RATE_WINDOW_S = 10


@dataclass(frozen=True)
class RouterStats:
    """tokens_per_s: generated, averaged over the last RATE_WINDOW_S seconds. down: shard name -> why.

    frontends: those that have asked for tokens lately. life_lines: those that can reach the router now.
    retries: parts of steps that another shard was asked for, by reason. slow: shard name -> how many
    times as long as the fastest it takes. down_s: shard name -> for how long it has been down.
    degraded: what is missing, in words; empty if nothing is.
    open_requests: those whose end has not been handed out. draining_s: for how long the router has
    drained; None: it does not. drained: names of shards that it leaves alone, as told.
    is_stopping: it refuses new requests, because the deployment is about to end. shard_names: the shards that it
    was told to link. epoch: of the oldest placement that its steps use.
    """

    engine: EngineStats | None
    tokens_per_s: float
    frontends: int
    life_lines: int
    down: dict[str, str]
    retries: dict[str, int]
    slow: dict[str, float]
    open_requests: int = 0
    draining_s: float | None = None
    drained: tuple[str, ...] = ()
    is_stopping: bool = False
    shard_names: tuple[str, ...] = ()
    down_s: dict[str, float] = field(default_factory=dict)
    degraded: str = ""
    epoch: int = 0


@dataclass(frozen=True)
class RouterMetrics:
    """engine: None while the model is being loaded. down: names of shards without a working link.

    losses: links lost since the start, by kind. missing_experts: (layer, expert) pairs that no living
    shard holds now. is_degraded: something is missing, though requests may not notice.
    """

    engine: EngineSnapshot | None
    down: tuple[str, ...]
    losses: dict[str, int]
    missing_experts: int
    is_degraded: bool


@dataclass(frozen=True)
class RouterLoad:
    """What autoscaling asks a router. totals: what it has computed of each expert.

    busy: how full it is, 1 at its limit: of running requests, or of the KV cache, whichever is more.
    With a queue it is more than 1. open_requests: those whose end has not been handed out.
    """

    totals: ExpertTotals
    busy: float
    open_requests: int


@dataclass(frozen=True)
class Batch:
    """The answer to one pull. A frontend names the number in its next pull, as a receipt.

    Numbers are never reused, also not after a router's restart. So a frontend that talks to a new router, or was
    forgotten by an old one, cannot mistake new tokens for ones that it has.
    """

    number: int
    deltas: list[TokenDelta]


@dataclass(frozen=True)
class HoldOrder:
    """What a shard is to hold: the version of each slot's weights. order: a newer one has a higher number."""

    order: int
    slots: Mapping[Slot, int]


@dataclass(frozen=True)
class ShardStats:
    """experts_held: (layer, expert) pairs. rows_computed: since the start.

    order: the newest that the shard follows. missing: (layer, expert) pairs that it has to read yet.
    problem: why it could not read one, failures times in a row. bytes_read: of weights. busy_s: spent
    computing since the start.
    """

    experts_held: int
    rows_computed: int
    links: tuple[str, ...]
    order: int = 0
    missing: int = 0
    problem: str = ""
    failures: int = 0
    bytes_read: int = 0
    busy_s: float = 0.0


@dataclass(frozen=True)
class OperationStatus:
    """A resize, rebalancing or other change of a deployment, under way or ended.

    kind: "resize", "rebalance" or "change". phase: "prepare", "commit", "retire", or "scale" while
    parts are started or ended; at last "done" or "aborted". text: what it does, such as "3 shards".
    step: number of the placement that is worked on, of `steps` or so. waits_for: the parts, and why;
    empty if nothing is late. moved_bytes, total_bytes: weights that shards have read for it, and
    what they are to read. reason: why it was aborted.
    """

    operation_id: str
    kind: str
    phase: str
    text: str = ""
    step: int = 0
    steps: int = 0
    waits_for: str = ""
    moved_bytes: int = 0
    total_bytes: int = 0
    reason: str = ""

    @property
    def has_ended(self) -> bool:
        return self.phase in ENDED


ENDED = ("done", "aborted")


@dataclass(frozen=True)
class RebalanceReport:
    """What rebalancing would do, or has begun to do.

    refusal: why nothing could be proposed, with what would help; then the rest is empty.
    operation_id: of what was begun; empty if nothing was. imbalance: the most loaded shard's load
    over the mean, averaged over layers. gain_tok_s: tokens per second that it is worth.
    is_accepted: it is worth its bytes. reason: why, in numbers. moves: what changes, in words.
    """

    refusal: str = ""
    operation_id: str = ""
    imbalance_before: float = 0.0
    imbalance_after: float = 0.0
    moved_bytes: int = 0
    gain_tok_s: float = 0.0
    is_accepted: bool = False
    reason: str = ""
    moves: tuple[str, ...] = ()


@dataclass(frozen=True)
class LoadView:
    """The load of experts, by layer; a value for each expert.

    age_s: how old the newest measurement is; None: there is none. load: work per second, as the
    balancing policy counts it. copies: shards that hold the expert.
    """

    age_s: float | None
    load: dict[int, list[float]]
    copies: dict[int, list[int]]


@dataclass(frozen=True)
class AdminView:
    """Where the Admin service listens, and the file with its token, on the controller's node.

    problem: why it does not listen, with what would help.
    """

    address: str
    token_file: str
    problem: str = ""


@dataclass(frozen=True)
class ControllerStats:
    """drained, cleared: parts that are to be gone, and ids of nodes that are to be empty, with grace_s.

    parts: all routers and shards, also those. slots: (layer, expert) pairs that each shard is to
    hold. problems: what could not be done, by part. operation: what changes now. autoscaling: "on",
    "paused" or "dry run"; empty where there is none. admin: None where it is not served.
    """

    parts: tuple[str, ...]
    drained: dict[str, float]
    cleared: dict[str, float]
    slots: dict[str, int]
    problems: dict[str, str]
    operation: OperationStatus | None = None
    autoscaling: str = ""
    admin: AdminView | None = None


@dataclass(frozen=True)
class DrainProgress:
    """left: the parts that are not gone yet, and what each does or waits for."""

    is_done: bool
    left: dict[str, str]
