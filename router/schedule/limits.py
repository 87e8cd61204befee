"""The scheduler's limits, and a deployment's defaults for them."""

from dataclasses import dataclass

GIB = 2**30
DEFAULT_KV_BYTES = GIB

# The first tokens of a prompt are computed as fast as the step's budget allows; the rest is paced
# (see PrefillPace). So short prompts are not delayed, and long ones do not delay running streams
# for long.
UNPACED_TOKENS = 4096


@dataclass(frozen=True)
class SchedulerLimits:
    """The scheduler's limits; all are upper bounds.

    max_running: sequences computed at once. max_waiting: requests in the queue.
    max_step_tokens: tokens in one step, prompts and decoding together. It also bounds a link's
    rows: this many for each expert that a token chooses.
    kv_bytes: KV cache of all running sequences together.
    prefix_cache: keep the blocks of ended requests for others with the same prefix.
    prefill_slowdown: step time with long prompts over step time without. It paces what a prompt
    has beyond UNPACED_TOKENS. With None, only max_step_tokens limits prompts. While another prompt
    is at its beginning, long ones get at most half of a step.
    """

    max_running: int
    max_waiting: int
    max_step_tokens: int
    kv_bytes: int
    prefix_cache: bool = True
    prefill_slowdown: float | None = None


# For deployment files that set nothing else, and for checkpoints served without a deployment file.
DEFAULT_LIMITS = SchedulerLimits(
    max_running=64, max_waiting=256, max_step_tokens=1024, kv_bytes=DEFAULT_KV_BYTES, prefill_slowdown=1.6
)
