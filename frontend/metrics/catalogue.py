"""Every metric that is told of a router: its name, what it means, and where its numbers come from.

Names and units follow vLLM's, with `drover_` for `vllm:`; Prometheus adds `_total` to counters. The number of time
series depends neither on the traffic nor on how many experts there are: the hottest few are named, and all together
are a distribution.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from router.counts.expert_load import HOTTEST, WINDOW_S, ExpertLoadSummary
from router.counts.requests import EngineSnapshot, Histogram


@dataclass(frozen=True)
class RouterReport:
    """snapshot: None if the router did not answer, or has not loaded its model. shard_names: by shard number.
    down: those that it has no working link to. losses: links lost so far, by kind.
    missing_experts: (layer, expert) pairs that no living shard holds. is_degraded: something is missing."""

    name: str
    snapshot: EngineSnapshot | None
    shard_names: Mapping[int, str]
    down: frozenset[str] = frozenset()
    losses: Mapping[str, int] = field(default_factory=dict)
    missing_experts: int = 0
    is_degraded: bool = False


Samples = Iterable[tuple[Sequence[str], float]]


@dataclass(frozen=True)
class Family:
    """labels: besides model_name and router. samples: values of these labels, and a number for them."""

    name: str
    help: str
    labels: tuple[str, ...]
    samples: Callable[[RouterReport, EngineSnapshot], Samples]


@dataclass(frozen=True)
class Distribution:
    """A histogram per router."""

    name: str
    help: str
    histogram: Callable[[EngineSnapshot], Histogram]


def _single(name: str, help: str, value: Callable[[EngineSnapshot], float]) -> Family:
    return Family(name, help, (), lambda _, snapshot: [((), value(snapshot))])


def _kv_bytes(_: RouterReport, snapshot: EngineSnapshot) -> Samples:
    stats = snapshot.stats
    free = stats.kv_bytes_total - stats.kv_bytes_used - stats.kv_bytes_cached
    return [(("used",), stats.kv_bytes_used), (("cached",), stats.kv_bytes_cached), (("free",), free)]


def _balancedness(load: ExpertLoadSummary | None) -> Samples:
    return [(("worst",), load.balance_worst), (("mean",), load.balance_mean)] if load else []


GAUGES = (
    _single(
        "drover_num_requests_running",
        "Requests being computed: a step makes a token for each, or computes a piece of its prompt.",
        lambda snapshot: snapshot.stats.running,
    ),
    _single(
        "drover_num_requests_waiting",
        "Requests that wait for a place (engine.max_running) or for KV cache. If it stays above 0, add capacity.",
        lambda snapshot: snapshot.stats.waiting,
    ),
    _single(
        "drover_kv_cache_usage_perc",
        "KV cache held by running requests, from 0 to 1 (the name is vLLM's). Near 1, requests are preempted. Kept "
        "prefixes do not count: they give way when memory is needed.",
        lambda snapshot: snapshot.stats.kv_bytes_used / max(1, snapshot.stats.kv_bytes_total),
    ),
    Family(
        "drover_kv_cache_bytes",
        "KV cache in bytes. used: by running requests; cached: prefixes of ended ones, kept until memory is needed; "
        "free: neither. Together they are all there is.",
        ("state",),
        _kv_bytes,
    ),
    Family(
        "drover_shard_linked",
        "1 if the router's link to the shard works, else 0.",
        ("shard",),
        lambda report, _: [((name,), float(name not in report.down)) for name in report.shard_names.values()],
    ),
    Family(
        "drover_degraded",
        "1 if a shard is away or still reads its experts, else 0. `drover status` says which, and why.",
        (),
        lambda report, _: [((), float(report.is_degraded))],
    ),
    Family(
        "drover_missing_experts",
        "(layer, expert) pairs that no living shard holds. Above 0, the router's streams wait, for heal_s at most.",
        (),
        lambda report, _: [((), report.missing_experts)],
    ),
    Family(
        "drover_shard_slowness",
        "How many times as long as the fastest a slow shard takes for the same work, as the router has measured. "
        "Shards that are not slow are not named. A slow shard gets only what no other holds.",
        ("shard",),
        lambda report, snapshot: [
            ((report.shard_names[n],), ratio) for n, ratio in snapshot.slowness.items() if n in report.shard_names
        ],
    ),
    Family(
        "drover_expert_load_tokens",
        f"Tokens in the last {WINDOW_S:g} s (exponentially weighted) of {HOTTEST} of the hottest experts. Who is shown "
        f"is chosen every {WINDOW_S:g} s and stays while among the hottest {2 * HOTTEST}, so that few new series come; "
        "all others are in drover_expert_load_ratio.",
        ("layer", "expert"),
        lambda _, snapshot: [
            ((str(hot.layer), str(hot.expert)), hot.recent_tokens)
            for hot in (snapshot.expert_load.hottest if snapshot.expert_load else ())
        ],
    ),
    Family(
        "drover_expert_balancedness",
        f"Mean over largest expert load of a layer in the last {WINDOW_S:g} s: 1 is even, 1 / experts is all on one. "
        "layers: of the worst layer, or the mean of all.",
        ("layers",),
        lambda _, snapshot: _balancedness(snapshot.expert_load),
    ),
)

COUNTERS = (
    _single(
        "drover_prompt_tokens",
        "Prompt tokens computed: not those found in the prefix cache, and again those of a preempted request.",
        lambda snapshot: snapshot.stats.prompt_tokens,
    ),
    _single(
        "drover_generation_tokens",
        "Tokens generated. Their rate is the throughput.",
        lambda snapshot: snapshot.stats.generated_tokens,
    ),
    _single(
        "drover_num_preemptions",
        "How often a running request gave its KV cache to an older one, to be computed again later. If it grows, "
        "there is too little KV cache for engine.max_running.",
        lambda snapshot: snapshot.stats.preemptions,
    ),
    _single(
        "drover_prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache. Hits over queries is the hit rate.",
        lambda snapshot: snapshot.stats.prefix_queried_tokens,
    ),
    _single(
        "drover_prefix_cache_hits",
        "Prompt tokens found in the prefix cache, which need not be computed.",
        lambda snapshot: snapshot.stats.prefix_hit_tokens,
    ),
    Family(
        "drover_request_success",
        "Requests that ended (the name is vLLM's; not each was a success). stop: an end token or a stop "
        "string; length: max_tokens; cancelled: the client left; moved: another router has it; deadline: the client's "
        "time was up; refused: no room, the client may try again; error: a shard or the router failed.",
        ("finished_reason",),
        lambda _, snapshot: [((ending,), count) for ending, count in snapshot.requests.ended.items()],
    ),
    Family(
        "drover_requests_replayed",
        "Requests that this router took over and that another one, or an earlier process, had begun. lost: its process "
        "ended; silent: it was silent for longer than links.dead_after_ms allows; unavailable: it said that it cannot "
        "go on; resumed: the client had lost its connection and came back. Clients notice a pause at most.",
        ("reason",),
        lambda _, snapshot: [((reason,), count) for reason, count in snapshot.requests.replayed.items()],
    ),
    Family(
        "drover_step_phase_seconds",
        "Where the time of steps went. schedule: choosing tokens; attention; dispatch: expert gates, sorting and "
        "sending rows (and the experts themselves where they are in the router's process); expert_wait: waiting for "
        "shards after the shared expert is done; sample: output head and sampler; other: embedding, dense and shared "
        "MLPs. On CUDA, queueing the work; the wait for it shows in dispatch and sample.",
        ("phase",),
        lambda _, snapshot: [((phase,), seconds) for phase, seconds in snapshot.phase_s.items()],
    ),
    Family(
        "drover_shard_down",
        "Links to shards that were lost. lost: the process or its machine ended; silent: nothing came for "
        "links.dead_after_ms, so it is frozen or cut off; broke: a defect, see the router's log.",
        ("reason",),
        lambda report, _: [((kind,), count) for kind, count in report.losses.items()],
    ),
    Family(
        "drover_dispatch_retries",
        "How often a shard's rows were asked for elsewhere. lost: it died, or its link; late: it took much longer "
        "than usual, and the first answer counted; not_held: it did not have the expert; compute_failed: computing "
        "failed.",
        ("reason",),
        lambda _, snapshot: [((reason,), count) for reason, count in snapshot.retries.items()],
    ),
    Family(
        "drover_shard_rows",
        "(token, expert) rows that the router has sent to a shard. Uneven rates mean uneven experts.",
        ("shard",),
        lambda report, snapshot: [
            ((name,), snapshot.rows_of_shard.get(shard, 0)) for shard, name in report.shard_names.items()
        ],
    ),
)

HISTOGRAMS = (
    Distribution(
        "drover_time_to_first_token_seconds",
        "From a request's arrival at the router to the end of the step that made its first token. The way through "
        "frontend and network is not in it.",
        lambda snapshot: snapshot.requests.first_token_s,
    ),
    Distribution(
        "drover_inter_token_latency_seconds",
        "From one token of a request to its next, as the router's steps made them; one observation per token after "
        "the first. Preemption and other requests' prompts show here.",
        lambda snapshot: snapshot.requests.inter_token_s,
    ),
    Distribution(
        "drover_e2e_request_latency_seconds",
        "From a request's arrival at the router to its end, however it ended; not of refused ones.",
        lambda snapshot: snapshot.requests.request_s,
    ),
    Distribution(
        "drover_request_queue_time_seconds",
        "From a request's arrival at the router to the first step that computes some of it.",
        lambda snapshot: snapshot.requests.queue_s,
    ),
    Distribution(
        "drover_request_prompt_tokens",
        "Prompt tokens of requests that were accepted.",
        lambda snapshot: snapshot.requests.prompt_length,
    ),
    Distribution(
        "drover_request_generation_tokens",
        "Generated tokens of requests that ended.",
        lambda snapshot: snapshot.requests.generation_length,
    ),
    Distribution(
        "drover_step_seconds",
        "Duration of a step: one pass of running requests through the model. The sum is the time the engine was busy; "
        "drover_step_phase_seconds_total splits it.",
        lambda snapshot: snapshot.step_s,
    ),
)

EXPERT_LOAD_RATIO = (
    "drover_expert_load_ratio",
    f"How many (layer, expert) pairs had at most `le` times the mean load of their layer in the last {WINDOW_S:g} s. A "
    "state, not a counter: use it without rate().",
)
UP = ("drover_up", "1 if this router or shard has loaded and answers, else 0.")
ROWS_COMPUTED = (
    "drover_shard_rows_computed",
    "(token, expert) rows that a shard has computed for all routers since it was started.",
)
