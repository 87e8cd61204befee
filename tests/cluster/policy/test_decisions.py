"""Decisions as rows: made again, they are the same."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.policy.autoscale import Scaler, Signals
from cluster.policy.decisions import DecisionLog, from_line, replay, to_line
from tests.cluster.policy.test_autoscale import DECLINED, PAYS, SETTINGS, SHEDS, Simulation

share = st.none() | st.floats(0.0, 3.0)
sample = st.fixed_dictionaries(
    {
        "loads": st.fixed_dictionaries(dict.fromkeys(("shards", "routers", "frontends"), share)),
        "imbalance_stable": st.none() | st.floats(1.0, 3.0),
        "imbalance_panic": st.none() | st.floats(1.0, 3.0),
        "load_age_s": st.none() | st.floats(0.0, 20.0),
        "extra_copies": st.integers(0, 5),
        "in_flight": st.sampled_from(["", "", "", "resize abc"]),
    }
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.1, 15.0), sample), max_size=40),
    st.sampled_from([PAYS, DECLINED, SHEDS]),
    st.booleans(),
    st.integers(0, 40),
)
def test_a_replay_of_any_part_of_a_log_gives_the_same_decisions(samples, proposal, dry_run, cut) -> None:  # type: ignore[no-untyped-def]
    scaler, log, now_s = Scaler(replace(SETTINGS, dry_run=dry_run)), DecisionLog(), 0.0
    counts = {"shards": 2, "routers": 1, "frontends": 1}
    for after_s, told in samples:
        now_s += after_s
        decisions = scaler.decide(now_s, Signals(counts, propose=lambda window_s, horizon_s: proposal, **told))
        log.add(decisions)
        acting = [decision for decision in decisions if decision.acts]
        assert len(acting) <= 1
        assert not (acting and (told["in_flight"] or dry_run))
        counts = counts | {decision.kind: decision.target for decision in acting if decision.kind in counts}
    rows = [from_line(to_line(decision)) for decision in log.rows()][cut:]
    assert replay(rows) == rows == log.rows()[cut:]


def test_only_what_differs_from_the_last_of_its_kind_is_kept() -> None:
    log, simulation = DecisionLog(), Simulation()
    counts = {"shards": 2, "routers": 1, "frontends": 1}
    kept = []
    for second in range(10):
        loads = {"shards": 0.9, "routers": 0.5, "frontends": 0.5}
        kept.append(len(log.add(simulation.scaler.decide(float(second), Signals(counts, loads)))))
    assert kept == [4, 0, 0, 0, 0, 1, 1, 0, 0, 0]


def test_the_log_is_bounded() -> None:
    log = DecisionLog(kept=3)
    for second in range(10):
        scaler = Scaler(SETTINGS)
        log.add(scaler.decide(float(second), Signals({"shards": second, "routers": 1, "frontends": 1}, {})))
    assert len(log.rows()) == 3
    assert log.rows()[-1].time_s == 9.0
