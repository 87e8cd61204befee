"""How many tokens of long prompts a step may carry, so that these do not hold up the streams that run beside them.

Plain Python without a clock of its own: the engine says how long each step took.
"""

from dataclasses import dataclass

# A step of prompts alone tells nothing about decoding, and one of both nothing about either: after so many steps in
# which prompts were mixed in, some steps without them measure again. The first of those does not count: what a long
# prompt read has pushed the weights out of the caches (it took 8 ms where the next ones took 6).
REMEASURE_STEPS = 64
MEASURING_STEPS = 3
SMOOTHING = 0.25
MIN_PROMPT_TOKENS = 16
# Until so many pieces have told how long a token takes, none is larger than this: a lucky step seems to cost nothing.
FIRST_PIECES, FIRST_PROMPT_TOKENS = 4, 64


@dataclass
class PrefillPace:
    """Finds the number of prompt tokens with which a step takes `max_slowdown` times as long as without any.

    Example: decoding alone takes 10 ms, max_slowdown is 2. A step with 64 prompt tokens takes 50 ms; 40 ms went to
    prompts where 10 may, so the next one carries 16.
    max_step_tokens: of any step; while nothing decodes, prompts get all of it.
    """

    max_step_tokens: int
    max_slowdown: float
    _decode_s: float | None = None
    _is_measured: bool = False  # else _decode_s is a first guess, of a cold step or one with short prompts
    _prompt_token_s: float | None = None
    _pieces: int = 0  # that told it
    _mixed_steps: int = 0
    _alone_steps: int = 0  # since the last mixed one

    def prompt_tokens(self, decoding: int) -> int:
        """Prompt tokens that the next step may carry besides `decoding` tokens of running streams."""
        room = self.max_step_tokens - decoding
        if not decoding:
            return room
        if self._decode_s is None or self._mixed_steps >= REMEASURE_STEPS:
            return 0
        return min(room, self._share(self._decode_s))

    def _share(self, decode_s: float) -> int:
        if self._prompt_token_s is None:
            return FIRST_PROMPT_TOKENS
        tokens = self._allowed_s(decode_s) / self._prompt_token_s
        most = self.max_step_tokens if self._pieces >= FIRST_PIECES else FIRST_PROMPT_TOKENS
        return max(MIN_PROMPT_TOKENS, round(min(float(most), tokens)))

    def _allowed_s(self, decode_s: float) -> float:
        return (self.max_slowdown - 1.0) * decode_s

    def record(self, decoding: int, prompt_tokens: int, seconds: float, other_tokens: int = 0) -> None:
        """A step with so many decoding sequences and prompt tokens took so long.

        other_tokens: of prompts that are not paced. With these it tells nothing of the paced ones' share, and how long
        decoding takes at most.
        """
        if not decoding:
            return
        if other_tokens:
            self._mixed_steps, self._alone_steps = self._mixed_steps + 1, 0
            if not prompt_tokens and self._mixed_steps >= REMEASURE_STEPS:
                # Short prompts come all the time, so decoding is never seen alone: it takes at most so long.
                self._mixed_steps, self._decode_s = 0, self._decode_s or seconds
        elif prompt_tokens:
            self._mixed_steps, self._alone_steps = self._mixed_steps + 1, 0
            self._record_mixed(prompt_tokens, seconds)
        else:
            self._alone_steps += 1
            if self._alone_steps >= MEASURING_STEPS:
                self._mixed_steps = 0
            if self._alone_steps == 1:
                self._decode_s = self._decode_s or seconds
            elif self._decode_s is not None and self._is_measured:
                self._decode_s = smoothed(self._decode_s, seconds)
            else:  # what a prompt's token takes was reckoned with the guess, if at all
                self._decode_s, self._is_measured = seconds, True
                self._prompt_token_s, self._pieces = None, 0

    def _record_mixed(self, prompt_tokens: int, seconds: float) -> None:
        assert self._decode_s is not None
        spent_s = max(seconds - self._decode_s, self._decode_s / 32)  # prompts are not free, however lucky a step was
        if prompt_tokens < self._share(self._decode_s) / 2 and spent_s <= self._allowed_s(self._decode_s):
            return  # the rest of a prompt: it does not tell what the tokens of a full share take
        self._pieces += 1
        token_s, known = spent_s / prompt_tokens, self._prompt_token_s
        if known is None:
            self._prompt_token_s = token_s
        elif self._pieces <= FIRST_PIECES:
            self._prompt_token_s = known + (token_s - known) / self._pieces
        else:
            self._prompt_token_s = smoothed(known, token_s)


def smoothed(known: float, seen: float) -> float:
    """What is known, a little nearer to what was just seen; of what is far off, as if it were half or double."""
    return known + SMOOTHING * (min(2 * known, max(known / 2, seen)) - known)
