"""Which experts tokens go to."""

from pathlib import Path

import numpy as np
import pytest

from checkpoint.errors import DroverError
from cluster.simulation.routing import FEW_TOKENS, Routing, draw, read_trace, routing_of
from cluster.simulation.scenario import DEMO_TRACE, HotSection, ModelSection, RoutingSection

MODEL = ModelSection()


def drawn(section: RoutingSection, tokens: int, now_s: float = 0.0, model: ModelSection = MODEL) -> np.ndarray:
    routing: Routing = routing_of(section, model, seed=3)
    return routing.counts(now_s, np.arange(tokens), np.random.default_rng(5))


@pytest.mark.parametrize("tokens", [1, 7, FEW_TOKENS + 1])
@pytest.mark.parametrize("source", ["zipf", "uniform", "trace"])
def test_every_token_has_its_experts_in_every_layer(source: str, tokens: int) -> None:
    hot = (HotSection(from_s=0, until_s=1),)
    assert drawn(RoutingSection(source=source, hot=hot), tokens).sum(axis=1).tolist() == [tokens] * 4  # type: ignore[arg-type]


def test_several_experts_per_token() -> None:
    assert drawn(RoutingSection(), 10, model=ModelSection(experts_per_token=8)).sum(axis=1).tolist() == [80] * 4


def test_both_ways_of_drawing_follow_the_shares() -> None:
    share_LE = np.array([[0.7, 0.2, 0.1], [0.0, 0.5, 0.5]])
    rng = np.random.default_rng(0)
    few_LE = sum(draw(share_LE, 100, rng) for _ in range(200))
    many_LE = draw(share_LE, 20_000, rng)
    assert np.abs(few_LE / 20_000 - share_LE).max() < 0.02
    assert np.abs(many_LE / 20_000 - share_LE).max() < 0.02


def test_zipf_has_ranks_of_its_own_in_every_layer() -> None:
    rows_LE = drawn(RoutingSection(exponent=1.0), 100_000)
    assert len(set(rows_LE.argmax(axis=1).tolist())) > 1
    assert rows_LE.max(axis=1) / 100_000 == pytest.approx(1 / sum(1 / r for r in range(1, 129)), rel=0.05)


def test_drift_makes_the_second_hottest_the_hottest() -> None:
    section = RoutingSection(exponent=1.0, drift_s=10)
    before_LE, after_LE = drawn(section, 200_000, 9.9), drawn(section, 200_000, 10.0)
    assert before_LE.argmax(axis=1).tolist() == np.argsort(after_LE, axis=1)[:, -2].tolist()


def test_hot_experts_are_hot_for_their_time_only() -> None:
    section = RoutingSection(source="uniform", hot=(HotSection(experts=4, share=0.5, from_s=10, until_s=20),))
    assert [drawn(section, 10_000, now_s).max() > 1000 for now_s in (9.9, 10.0, 19.9, 20.0)] == [
        False,
        True,
        True,
        False,
    ]
    assert np.sort(drawn(section, 10_000, 10.0)[0])[::-1][:4].sum() == pytest.approx(5000 + 4 / 128 * 5000, rel=0.05)


def test_the_trace_is_replayed_in_its_order_and_begins_again() -> None:
    experts_TL = read_trace(DEMO_TRACE)
    routing = routing_of(RoutingSection(source="trace"), MODEL, 0)
    last = len(experts_TL) - 1
    rows_LE = routing.counts(0.0, np.array([last, last + 1]), np.random.default_rng(0))
    for layer in range(4):
        expected = np.bincount([experts_TL[last, layer], experts_TL[0, layer]], minlength=128)
        assert rows_LE[layer].tolist() == expected.tolist()


def test_kinds_of_text_choose_tokens() -> None:
    assert 0 < len(read_trace(DEMO_TRACE, ["chat"])) < len(read_trace(DEMO_TRACE))


def test_wrong_traces_are_named_with_the_fix(tmp_path: Path) -> None:
    bad = tmp_path / "bad.npz"
    bad.write_bytes(b"no zip")
    with pytest.raises(DroverError, match=r"does not exist; `python -m demo\.trace` makes one"):
        read_trace(tmp_path / "none.npz")
    with pytest.raises(DroverError, match="no routing trace"):
        read_trace(bad)
    with pytest.raises(DroverError, match=r"'poems'; .* has scripture, novels"):
        read_trace(DEMO_TRACE, ["poems"])
    with pytest.raises(DroverError, match="4 layers, experts up to 127"):
        routing_of(RoutingSection(source="trace"), ModelSection(moe_layers=48), 0)
