"""An answer is the same whenever its router dies, hangs or stops: real engines, which a test steps by hand."""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.tokenizer import Tokenizer
from frontend.answer import Usage
from frontend.answer_params import AnswerParams
from frontend.generation import Generation, TokenPrompt
from frontend.router_pool import RouterPool
from router.model.llama4 import Model
from router.request import FinishReason
from tests.frontend.stepped_routers import MANY_STEPS, PROMPT, TOKENS, SteppedRouter, pool_of, turn
from tests.local_model import load_model
from tests.loopback import CARD
from tests.processes import PATIENCE_S
from tests.reference import make_served_reference

# A prompt takes several steps. A cache would tell of a request's own earlier attempt.
LIMITS = {"max_step_tokens": 10, "prefix_cache": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_served_reference(tmp_path_factory.mktemp("scout"), "scout").directory


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    return load_model(directory)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.open(directory)


@dataclass
class Told:
    """One answer as its client has it. logprobs, prompt_logprobs: the token, its logprob, and the most likely ids."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[int, float, list[int]]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, float, list[int]]] = field(default_factory=list)
    end: tuple[FinishReason | None, str | None, int | None, Usage | None] | None = None

    def assert_equals(self, other: "Told") -> None:
        assert (self.text, self.token_ids, self.end) == (other.text, other.token_ids, other.end)
        for mine, others in ((self.logprobs, other.logprobs), (self.prompt_logprobs, other.prompt_logprobs)):
            assert [(token_id, top) for token_id, _, top in mine] == [(token_id, top) for token_id, _, top in others]
            assert [logprob for _, logprob, _ in mine] == pytest.approx([value for _, value, _ in others], abs=1e-4)


Moment = Callable[[int], None]
"""Called before each step with its number."""


async def answers(
    pool: RouterPool, routers: list[SteppedRouter], tokenizer: Tokenizer, params: AnswerParams, moment: Moment
) -> tuple[list[Told], int]:
    """All answers to PROMPT, and the steps that they took."""
    told: dict[int, Told] = {}

    async def read() -> None:
        async with aclosing(Generation(CARD, tokenizer, None, pool).answer(TokenPrompt(PROMPT), params)) as deltas:
            async for delta in deltas:
                one = told.setdefault(delta.index, Told())
                one.text += delta.text
                one.token_ids += delta.token_ids
                one.logprobs += [(e.token_id, e.logprob, [name for name, _ in e.top]) for e in delta.logprobs]
                one.prompt_logprobs += [
                    (e.token_id, e.logprob or 0.0, [name for name, _ in e.top]) for e in delta.prompt_logprobs
                ]
                if delta.finish_reason is not None:
                    assert one.end is None
                    one.end = delta.finish_reason, delta.stop_string, delta.stop_token_id, delta.usage

    reading = asyncio.create_task(read())
    for step in range(MANY_STEPS):
        await turn()
        if reading.done():
            break
        moment(step)
        for router in routers:
            router.step()
    await asyncio.wait_for(reading, PATIENCE_S)
    return [told[index] for index in sorted(told)], step


def run(test: Awaitable[object]) -> None:
    async def bounded() -> None:
        await asyncio.wait_for(test, PATIENCE_S)

    asyncio.run(bounded())


FAVOURED = {77: 100.0, 78: 98.0, 79: 97.5}
LETTERS = dict.fromkeys(range(97, 107), 60.0)  # the model writes a few letters only, in an order of its own
CASES = {
    "greedy": AnswerParams(temperature=0.0),
    "a seed": AnswerParams(seed=5, top_k=50, top_p=0.95, min_p=0.001),
    "repetition penalty": AnswerParams(temperature=0.0, logit_bias=FAVOURED, repetition_penalty=1.02),
    "presence and frequency": AnswerParams(seed=1, logit_bias=LETTERS, presence_penalty=1.9, frequency_penalty=0.5),
    "min_tokens": AnswerParams(temperature=0.0, logit_bias={9: 100.0}, min_tokens=5, stop_token_ids=[9]),
    "three answers": AnswerParams(seed=3, n=3),
    "logprobs": AnswerParams(temperature=0.0, logprobs=2),
    "the prompt's logprobs": AnswerParams(temperature=0.0, prompt_logprobs=2, n=2),
    "text": AnswerParams(seed=7, logit_bias=LETTERS),
}


@pytest.fixture(scope="module")
def undisturbed(model: Model, tokenizer: Tokenizer) -> Callable[[AnswerParams], tuple[list[Told], int]]:
    known: dict[int, tuple[list[Told], int]] = {}

    def of(params: AnswerParams) -> tuple[list[Told], int]:
        async def answer() -> None:
            router = SteppedRouter("router-0", model, **LIMITS)
            known[id(params)] = await answers(pool_of(model, router), [router], tokenizer, params, lambda step: None)

        if id(params) not in known:
            run(answer())
        return known[id(params)]

    return of


def params_of(name: str, undisturbed: Callable[[AnswerParams], tuple[list[Told], int]]) -> AnswerParams:
    """The case's parameters; "a stop string" ends amid the text."""
    if name == "a stop string":
        [whole], _ = undisturbed(CASES["text"])
        return AnswerParams(seed=7, logit_bias=LETTERS, max_tokens=TOKENS, stop=(whole.text[5:7],))
    return CASES[name]


for name, case in CASES.items():
    CASES[name] = AnswerParams(**(vars(case) | {"max_tokens": TOKENS}))


def fault(router: SteppedRouter, how: str) -> None:
    match how:
        case "dies":
            router.die()
        case "dies with a step untold":
            router.step_unheard()
            router.die()
        case "hangs":
            router.hang()
        case "stops":
            router.draining = True
            router.beat()
            router.stop()


FAULTS = ("dies", "dies with a step untold", "hangs", "stops")


@dataclass(frozen=True)
class Faults:
    """how: one of FAULTS. at, second: the steps before which the busy router meets with it.

    back_after: steps until it answers again; one that stops never does.
    """

    how: str
    at: int
    second: int | None = None
    back_after: int = 1


@pytest.fixture(scope="module")
def check(
    model: Model, tokenizer: Tokenizer, undisturbed: Callable[[AnswerParams], tuple[list[Told], int]]
) -> Callable[[str, Callable[[int], Faults]], None]:
    """Ask of two routers what a case asks, amid faults that may depend on its number of steps."""

    def check_it(name: str, faults_in: Callable[[int], Faults]) -> None:
        params = params_of(name, undisturbed)
        expected, steps = undisturbed(params)
        faults = faults_in(steps)

        async def test() -> None:
            routers = [SteppedRouter(f"router-{n}", model, **LIMITS) for n in range(2)]
            away: dict[int, SteppedRouter] = {}

            def moment(step: int) -> None:
                if step in away:
                    away.pop(step).answer()
                if step in (faults.at, faults.second):
                    busy = max(routers, key=lambda router: (router.is_busy, router.answers))
                    fault(busy, faults.how)
                    if faults.how != "stops":
                        away[step + 1 + faults.back_after] = busy

            told, _ = await answers(pool_of(model, *routers), routers, tokenizer, params, moment)
            for one, other in zip(told, expected, strict=True):
                one.assert_equals(other)

        run(test())

    return check_it


@pytest.mark.parametrize("name", [*CASES, "a stop string"])
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_an_answer_is_the_same_whenever_its_router_goes(
    check: Callable[[str, Callable[[int], Faults]], None], name: str, data: st.DataObject
) -> None:
    def faults_in(steps: int) -> Faults:
        how, at = data.draw(st.sampled_from(FAULTS)), data.draw(st.integers(0, steps - 1))
        second = None if how == "stops" else data.draw(st.one_of(st.none(), st.integers(at + 1, at + steps)))
        return Faults(how, at, second, data.draw(st.integers(0, 4)))

    check(name, faults_in)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_was_told_of_a_prompt_before_its_first_token_is_not_told_again(
    check: Callable[[str, Callable[[int], Faults]], None], at: int
) -> None:
    check("the prompt's logprobs", lambda steps: Faults("dies", at))
