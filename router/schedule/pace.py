"""How many tokens of long prompts a step may carry without slowing the running streams too much.

The model is a line: step time = decode time + prompt tokens * time per prompt token. Both numbers
come from recent steps. Plain Python without a clock of its own: the engine reports how long each
step took.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median_low

# Mixed steps (decoding and prompts) cannot separate the two numbers. After this many, run a few
# decode-only steps.
REMEASURE_STEPS = 64
# The first decode-only step after prompts is not counted. Prompts evict the weights from the
# caches: that step took 8 ms where the next ones took 6.
MEASURING_STEPS = 3
# Recent decode-only steps, and recent pieces of prompts, from which the two numbers are taken.
DECODE_SAMPLES, PIECE_SAMPLES = 5, 8
# A piece counts as at most this many times its expected time, so one slow step of eight takes an
# eighth off the pace.
MAX_OUTLIER = 2
MIN_PROMPT_TOKENS = 16
# Until this many pieces are known, a piece stays small: a lucky step would make prompts look free.
FIRST_PIECES, FIRST_PROMPT_TOKENS = 4, 64


@dataclass
class PrefillPace:
    """Fits the line, and solves it for the prompt tokens with which a step takes `max_slowdown` times the decode time.

    Example: decoding alone takes 10 ms and max_slowdown is 2. A step with 64 prompt tokens takes
    50 ms. Prompts took 40 ms and may take 10, so the next step carries 16 tokens.

    max_step_tokens: upper limit for any step. While nothing decodes, prompts get all of it.

    Pieces are kept as (tokens, seconds of the step), so that a better decode time also corrects
    the time per token.
    """

    max_step_tokens: int
    max_slowdown: float
    _decode_s: deque[float] = field(default_factory=lambda: deque(maxlen=DECODE_SAMPLES))
    _pieces: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=PIECE_SAMPLES))
    _mixed_steps: int = 0  # since the decode time was last measured
    _decode_only_steps: int = 0  # since the last step with prompts

    def prompt_tokens(self, decoding: int) -> int:
        """Prompt tokens that the next step may carry besides `decoding` tokens of running streams."""
        room = self.max_step_tokens - decoding
        if not decoding:
            return room
        if not self._decode_s or self._mixed_steps >= REMEASURE_STEPS:
            return 0
        if not self._pieces:
            return min(room, FIRST_PROMPT_TOKENS)
        decode_s, token_s = self._fit()
        most = room if len(self._pieces) >= FIRST_PIECES else min(room, FIRST_PROMPT_TOKENS)
        tokens = max(MIN_PROMPT_TOKENS, round((self.max_slowdown - 1) * decode_s / token_s))
        return min(most, tokens)

    def record(self, decoding: int, prompt_tokens: int, seconds: float, other_tokens: int = 0) -> None:
        """Report a step: its decoding sequences, its paced prompt tokens, and how long it took.

        other_tokens: tokens of prompts that are not paced. They hide what paced tokens cost, so
        such a step is only an upper bound of the decode time.
        """
        if not decoding:
            return
        if not prompt_tokens and not other_tokens:
            self._record_decode_only(seconds)
            return
        self._mixed_steps, self._decode_only_steps = self._mixed_steps + 1, 0
        if not other_tokens:
            self._record_piece(prompt_tokens, seconds)
        elif not prompt_tokens and self._mixed_steps >= REMEASURE_STEPS:
            # Short prompts come in every step, so no decode-only step ever will. Use the upper bound.
            self._mixed_steps = 0
            if not self._decode_s:
                self._decode_s.append(seconds)

    def _record_decode_only(self, seconds: float) -> None:
        self._decode_only_steps += 1
        if self._decode_only_steps > 1 or not self._decode_s:
            self._decode_s.append(seconds)
        if self._decode_only_steps >= MEASURING_STEPS:
            self._mixed_steps = 0

    def _record_piece(self, prompt_tokens: int, seconds: float) -> None:
        if len(self._pieces) >= FIRST_PIECES and self._decode_s:
            decode_s, token_s = self._fit()
            seconds = min(seconds, decode_s + MAX_OUTLIER * token_s * prompt_tokens)
        self._pieces.append((prompt_tokens, seconds))

    def _fit(self) -> tuple[float, float]:
        """(decode time, time per prompt token) in seconds: a median, and total time / total
        tokens."""
        decode_s = median_low(self._decode_s)
        # A lucky step may be shorter than decoding alone. Prompts are not free: a piece takes at
        # least 1/32 of it.
        spent_s = sum(max(seconds - decode_s, decode_s / 32) for _, seconds in self._pieces)
        return decode_s, spent_s / sum(tokens for tokens, _ in self._pieces)
