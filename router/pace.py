"""How many tokens of long prompts a step may carry, so that these do not hold up the streams that run beside them.

Plain Python without a clock of its own: the engine says how long each step took.
"""

from dataclasses import dataclass, field

# A step of prompts alone tells nothing about decoding, and one of both nothing about either: after so many steps in
# which prompts were mixed in, one step without them measures again.
REMEASURE_STEPS = 64
SMOOTHING = 0.25
MIN_PROMPT_TOKENS = 16


@dataclass
class PrefillPace:
    """Finds the number of prompt tokens with which a step takes `max_slowdown` times as long as without any.

    Example: decoding alone takes 10 ms, max_slowdown is 2. A step with 256 prompt tokens takes 50 ms; 40 ms went to
    prompts where 10 may, so the next one carries 64.
    max_step_tokens: of any step; while nothing decodes, prompts get all of it.
    """

    max_step_tokens: int
    max_slowdown: float
    _prompt_tokens: float = field(init=False)
    _decode_s: float | None = None
    _mixed_steps: int = 0

    def __post_init__(self) -> None:
        self._prompt_tokens = float(self.max_step_tokens)

    def prompt_tokens(self, decoding: int) -> int:
        """Prompt tokens that the next step may carry besides `decoding` tokens of running streams."""
        room = self.max_step_tokens - decoding
        if not decoding:
            return room
        if self._decode_s is None or self._mixed_steps >= REMEASURE_STEPS:
            return 0
        return min(room, int(self._prompt_tokens))

    def record(self, decoding: int, prompt_tokens: int, seconds: float, other_tokens: int = 0) -> None:
        """A step with so many decoding sequences and prompt tokens took so long.

        other_tokens: of prompts that are not paced. With these it tells nothing of the paced ones' share, and how long
        decoding takes at most.
        """
        if not decoding:
            return
        if other_tokens:
            self._mixed_steps += 1
            if not prompt_tokens and self._mixed_steps >= REMEASURE_STEPS:
                # Short prompts come all the time, so decoding is never seen alone: it takes at most so long.
                self._mixed_steps, self._decode_s = 0, self._decode_s or seconds
            return
        if not prompt_tokens:
            self._mixed_steps = 0
            known = self._decode_s
            self._decode_s = seconds if known is None else known + SMOOTHING * (seconds - known)
            return
        self._mixed_steps += 1
        assert self._decode_s is not None
        spent = max(seconds - self._decode_s, 1e-9)
        allowed = (self.max_slowdown - 1.0) * self._decode_s
        if spent < allowed and prompt_tokens < self._prompt_tokens / 2:
            return  # the rest of a prompt, quickly done: it does not tell what a full share would take
        # At most doubled or quartered at once: a single slow step says little.
        factor = min(2.0, max(0.25, allowed / spent * prompt_tokens / self._prompt_tokens))
        self._prompt_tokens = min(float(self.max_step_tokens), max(MIN_PROMPT_TOKENS, self._prompt_tokens * factor))
