"""What the sampler knows of one request: its parameters, and which tokens so far change the logits.

Plain Python. Token lists are arrays of 64-bit integers. A step concatenates those of all rows into
one tensor by copying bytes, which stays fast for long texts.
"""

from array import array
from collections.abc import Iterable, Sequence

from router.request import SamplingParams


class SamplingState:
    """Lives as long as its request. Lists are kept only for parameters that are set.

    made: tokens of the completion so far.
    seen_ids: the distinct tokens of prompt and completion, for the repetition penalty.
    made_ids, made_counts: the distinct tokens of the completion and their counts, for presence and
    frequency penalty.
    ending_ids: tokens that end the text. They are not drawn while `made` is below min_tokens.
    prompt_logprobs_told: prompt positions whose log-probabilities were returned; the engine counts
    them.
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
        # Those of the prompt are returned with the first token at the latest.
        self.prompt_logprobs_told = len(prompt_token_ids) if made else 0
        self.bias_ids = array("q", [token_id for token_id, _ in params.logit_bias])
        self.biases = array("d", [bias for _, bias in params.logit_bias])
        self.ending_ids = array("q")
        if params.min_tokens:
            self.ending_ids.extend(params.ending_token_ids(eos_token_ids))
        self.seen_ids = array("q")
        self._seen: set[int] = set()
        self._repeats_cost = params.repetition_penalty != 1.0
        if self._repeats_cost:
            self._seen.update(prompt_token_ids)
            self.seen_ids.extend(self._seen)
        self.made_ids, self.made_counts = array("q"), array("d")
        self._index_of: dict[int, int] = {}
        self._counts_cost = params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        for token_id in made:
            self.append(token_id)

    @property
    def may_not_end(self) -> bool:
        """The next token may not end the text: fewer than min_tokens are made."""
        return self.made < self.params.min_tokens

    def append(self, token_id: int) -> None:
        """Add a sampled token to the completion."""
        self.made += 1
        if self._repeats_cost and token_id not in self._seen:
            self._seen.add(token_id)
            self.seen_ids.append(token_id)
        if self._counts_cost:
            index = self._index_of.setdefault(token_id, len(self.made_ids))
            if index == len(self.made_ids):
                self.made_ids.append(token_id)
                self.made_counts.append(0.0)
            self.made_counts[index] += 1.0
