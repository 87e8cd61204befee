"""How a prompt is to be answered, as every protocol says it: plain data, with limits and defaults."""

import secrets
from collections.abc import Collection, Mapping, Sized
from dataclasses import dataclass, fields, replace

from router.errors import InvalidArgument
from router.request import MAX_BIASED_TOKENS, SamplingParams

MAX_ENTRIES = {"stop": 16, "stop_token_ids": 4096, "logit_bias": MAX_BIASED_TOKENS}  # of the lists
MAX_STOP_CHARS = 256
MAX_ANSWERS = 16


@dataclass(frozen=True)
class AnswerParams:
    """Each field means what inference.proto says of the field of the same name; one that is left out is None.

    n, stop and timeout_s are about answers, text and the client. The others are the router's
    SamplingParams.
    """

    n: int | None = None
    stop: tuple[str, ...] = ()
    timeout_s: float | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop_token_ids: Collection[int] | None = None
    logprobs: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None

    def num_answers(self) -> int:
        """n, or its default. Raises InvalidArgument."""
        n = 1 if self.n is None else self.n
        if not 1 <= n <= MAX_ANSWERS:
            raise InvalidArgument("n", f"is {n}; must be from 1 to {MAX_ANSWERS}")
        return n

    def check_lists(self) -> None:
        """Raise InvalidArgument if a list is too long, or a stop string is empty or too long."""
        check_lengths({name: getattr(self, name) or () for name in MAX_ENTRIES})
        for index, stop in enumerate(self.stop):
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise InvalidArgument(
                    f"stop[{index}]", f"has {len(stop)} characters; must have from 1 to {MAX_STOP_CHARS}"
                )

    def sampling(self, default: SamplingParams, room_tokens: int) -> SamplingParams:
        """What the router is told; `check_request` judges it.

        default: for the fields left out, but for max_tokens and seed. room_tokens: how many the
        context still holds. The seed is drawn here and not in the router, so that another router
        can continue with the same tokens.
        """
        given = {name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None}
        given.setdefault("max_tokens", min(default.max_tokens, room_tokens))
        given.setdefault("min_tokens", min(default.min_tokens, given["max_tokens"]))
        given.setdefault("seed", secrets.randbits(63))
        given["stop_token_ids"] = default.stop_token_ids.union(self.stop_token_ids or ())
        given["logit_bias"] = tuple(sorted((self.logit_bias or {}).items())) or default.logit_bias
        return replace(default, **given)


def check_lengths(lists: Mapping[str, Sized]) -> None:
    """Raise InvalidArgument if one of these fields of AnswerParams has too many entries.

    Looks at lengths alone: a protocol's edge asks before it reads the entries.
    """
    for name, entries in lists.items():
        if len(entries) > MAX_ENTRIES[name]:
            raise InvalidArgument(name, f"has {len(entries)} entries; at most {MAX_ENTRIES[name]} are taken")


_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
