"""What the same requests answer in one process, without a cluster: the yardstick of every token.

fp32: each token must be the same. bf16: rounding depends on what else is in a batch, so each token
is fed back through one process, and must be within NEAR of the likeliest. Rounding also decides
between two experts whose gates are nearly equal, and then it moves a logit by far more: a text is
right, too, if one process without any fault says the same, alone or beside others.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from bench.chaos.asks import Ask
from bench.chaos.records import Stream
from bench.errors import BenchError
from bench.machine import describe
from bench.worst_requests import a_server
from checkpoint.read_file import read_json
from checkpoint.shape import write_json
from client import Client, ClientError

AT_ONCE = 16
NEAR = 1e-2
"""Between the logit of a token and the highest logit at its place. Log-probabilities differ by as much."""

Answers = Mapping[int, Sequence[int]]
"""Tokens by answer."""


def of_dtype(checkpoint: Path, dtype: str, work: Path) -> Path:
    """The checkpoint with another dtype in its config: a folder of links, remade each time. Files may be replaced."""
    folder = work / f"{checkpoint.resolve().name}-{dtype}"
    folder.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        file.unlink()
    for file in checkpoint.resolve().iterdir():
        (folder / file.name).symlink_to(file)
    config = read_json(checkpoint / "config.json")
    (folder / "config.json").unlink()
    write_json(folder / "config.json", config | {"dtype": dtype, "torch_dtype": dtype})
    return folder


def answers(checkpoint: Path, asks: Sequence[Ask], work: Path) -> Sequence[Answers]:
    """Each request's tokens, by one process. Kept in `work` for the next run of the same code. Raises BenchError."""
    what = json.dumps([[asdict(ask) for ask in asks], str(checkpoint), describe(work)["commit"]])
    kept = work / f"answers-{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    if kept.exists() and "dirty" not in what:
        return [{int(index): ids for index, ids in each.items()} for each in json.loads(kept.read_text())]
    with a_server(checkpoint) as (address, _), Client(address) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        made = list(threads.map(lambda ask: _answer(client, ask), asks))
    kept.write_text(json.dumps(made))
    return made


def far_tokens(checkpoint: Path, asks: Sequence[Ask], streams: Sequence[Stream]) -> dict[int, tuple[float, int]]:
    """Of each stream with tokens that are not near the likeliest: (when the first came, how many)."""
    texts = {(s.ask, tuple(ids)) for s in streams for ids in s.answers.values()}
    with a_server(checkpoint) as (address, _), Client(address) as client, ThreadPoolExecutor(AT_ONCE) as threads:
        judged = dict(zip(texts, threads.map(lambda text: _far(client, asks[text[0]], text[1]), texts), strict=True))
        doubtful = sorted({ask for (ask, _), far in judged.items() if far})
        alone = [_answer(client, asks[ask]) for ask in doubtful]
        beside = list(threads.map(lambda ask: _answer(client, asks[ask]), [*doubtful] * AT_ONCE))
    said = {ask: [tuple(ids) for ids in made.values()] for ask, made in zip(doubtful, alone, strict=True)}
    for ask, made in zip([*doubtful] * AT_ONCE, beside, strict=True):
        said[ask] += [tuple(ids) for ids in made.values()]
    judged = {
        (ask, ids): [] if any(whole[: len(ids)] == ids for whole in said.get(ask, ())) else far
        for (ask, ids), far in judged.items()
    }
    found = {}
    for number, stream in enumerate(streams):
        far = [judged[stream.ask, tuple(ids)] for ids in stream.answers.values()]
        if (wrong := first_wrong(stream, far, asks[stream.ask].max_tokens)) is not None:
            found[number] = wrong
    return found


def first_wrong(stream: Stream, far: Sequence[Sequence[int]], max_tokens: int) -> tuple[float, int] | None:
    """(when the first wrong token came, how many), from the places of far tokens; None if all is well.

    No token ends a text here, so a stream that finished with fewer than max_tokens lacks some.
    """
    came = [at_s for at_s, _, ids in stream.pieces for _ in ids]
    lacking = max_tokens - len(came) if stream.error is None and stream.ended_s is not None else 0
    if any(far):
        return min(came[places[0]] for places in far if places), sum(map(len, far)) + lacking
    return (stream.ended_s or stream.sent_s, lacking) if lacking else None


def _answer(client: Client, ask: Ask) -> dict[int, list[int]]:
    made: dict[int, list[int]] = {}
    try:
        for delta in client.generate(ask.token_ids, **ask.sampling):
            made.setdefault(delta.index, []).extend(delta.token_ids)
    except ClientError as error:
        raise BenchError(f"the reference failed: {error}") from None
    return made


def _far(client: Client, ask: Ask, token_ids: Sequence[int]) -> list[int]:
    """The places of tokens that are not near the likeliest. Raises BenchError."""
    try:
        deltas = list(client.generate([*ask.token_ids, *token_ids], max_tokens=1, temperature=0, prompt_logprobs=1))
    except ClientError as error:
        raise BenchError(f"teacher forcing failed: {error}") from None
    entries = [entry for delta in deltas for entry in delta.prompt_logprobs][len(ask.token_ids) :]
    return [
        place
        for place, entry in enumerate(entries)
        if entry.logprob is None or max(top.logprob for top in entry.top) - entry.logprob > NEAR
    ]
