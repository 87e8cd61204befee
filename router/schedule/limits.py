"""What bounds the scheduler, and the defaults of a deployment."""

from dataclasses import dataclass

GIB = 2**30
DEFAULT_KV_BYTES = GIB

# So much of a prompt is computed as fast as the step's budget allows; what follows is paced (see PrefillPace). Short
# prompts are then done without delay, and no long one holds up the others for long.
UNPACED_TOKENS = 4096


@dataclass(frozen=True)
class SchedulerLimits:
    """max_step_tokens: tokens in one step, prompts and decoding together; also the most rows a link must carry
    per expert chosen. kv_bytes: KV cache of all running sequences together. prefix_cache: keep the blocks of ended
    requests for others that begin the same. prefill_slowdown: how many times as long a step of decoding sequences may
    take because of long prompts (beyond UNPACED_TOKENS) that are computed beside them; none means that only
    max_step_tokens bounds prompts. Beside the beginning of another prompt, long ones get half of a step at most."""

    max_running: int
    max_waiting: int
    max_step_tokens: int
    kv_bytes: int
    prefix_cache: bool = True
    prefill_slowdown: float | None = None


# What a deployment file that says nothing else gets, and a checkpoint that is served without one.
DEFAULT_LIMITS = SchedulerLimits(
    max_running=64, max_waiting=256, max_step_tokens=1024, kv_bytes=DEFAULT_KV_BYTES, prefill_slowdown=1.6
)
