"""What the sampler must know of one request: its parameters, and the tokens so far as far as they change the logits.

Plain Python. Lists of tokens are arrays of 64-bit integers, so that a step puts those of all rows into one tensor by
copying bytes, however long the texts are.
"""

from array import array
from collections.abc import Iterable, Sequence

from router.request import SamplingParams


class SamplingState:
    """Lives as long as its request. What a parameter does not need is not kept.

    seen_ids: every token of prompt and completion, each once, where there is a repetition penalty.
    made_ids, made_counts: every token of the completion and how often it is there, where presence or frequency counts.
    ending_ids: the tokens that end the text; they are not drawn while `made` is below min_tokens.
    prompt_logprobs_told: of how many of the prompt's positions; the engine counts them.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        eos_token_ids: Iterable[int],
        made: Sequence[int] = (),
    ) -> None:
        """made: tokens of the completion so far."""
        self.params = params
        self.made = 0
        self.prompt_logprobs_told = len(prompt_token_ids) if made else 0  # they come with the first token at the latest
        self.bias_ids = array("q", [token_id for token_id, _ in params.logit_bias])
        self.biases = array("d", [bias for _, bias in params.logit_bias])
        self.ending_ids = array("q")
        if params.min_tokens:
            self.ending_ids.extend(ending_token_ids(params, eos_token_ids))
        self.seen_ids = array("q")
        self._seen: set[int] = set()
        self._repeats_cost = params.repetition_penalty != 1.0
        if self._repeats_cost:
            self._seen.update(prompt_token_ids)
            self.seen_ids.extend(self._seen)
        self.made_ids, self.made_counts = array("q"), array("d")
        self._place_of: dict[int, int] = {}
        self._counts_cost = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        for token_id in made:
            self.push(token_id)

    @property
    def may_not_end(self) -> bool:
        """The next token may not end the text: min_tokens are not made yet."""
        return self.made < self.params.min_tokens

    def push(self, token_id: int) -> None:
        """Note a token that was made."""
        self.made += 1
        if self._repeats_cost and token_id not in self._seen:
            self._seen.add(token_id)
            self.seen_ids.append(token_id)
        if self._counts_cost:
            place = self._place_of.setdefault(token_id, len(self.made_ids))
            if place == len(self.made_ids):
                self.made_ids.append(token_id)
                self.made_counts.append(0.0)
            self.made_counts[place] += 1.0


def ending_token_ids(params: SamplingParams, eos_token_ids: Iterable[int]) -> frozenset[int]:
    """The tokens that end the text of a request with these parameters."""
    return params.stop_token_ids if params.ignore_eos else params.stop_token_ids.union(eos_token_ids)
