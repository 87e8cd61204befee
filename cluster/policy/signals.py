"""From what was measured to what a scaler decides on; the same for a deployment and for a simulated one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from cluster.policy.autoscale import Signals
from cluster.policy.balance import BalanceSettings, Proposal, ShardRoom, imbalance_of, propose
from cluster.policy.judgement import ScaleSettings
from cluster.policy.load import LoadWindow
from experts.placement import Placement


def signals_of(
    window: LoadWindow,
    now_s: float,
    settings: ScaleSettings,
    balance: BalanceSettings,
    placement: Placement,
    shards: Sequence[ShardRoom],
    counts: Mapping[str, int],
    loads: Mapping[str, float | None],
    in_flight: str = "",
) -> Signals:
    """window: of all routers. placement: that which is served now. counts, loads: see Signals."""

    def imbalance(over_s: float) -> float | None:
        measured = window.loads(now_s, over_s)
        return None if measured is None else imbalance_of(measured, placement, shards)

    def proposed(over_s: float, horizon_s: float) -> Proposal:
        measured = window.loads(now_s, over_s)
        assert measured is not None, "an imbalance was measured in this window"
        return propose(measured, placement, shards, replace(balance, horizon_s=horizon_s))

    return Signals(
        counts=counts,
        loads=loads,
        imbalance_stable=imbalance(settings.stable_window_s),
        imbalance_panic=imbalance(settings.panic_window_s),
        load_age_s=window.age_s(now_s),
        extra_copies=extra_copies(placement, shards, balance.replicas),
        in_flight=in_flight,
        propose=proposed,
    )


def extra_copies(placement: Placement, shards: Sequence[ShardRoom], replicas: int) -> int:
    """Copies beyond those that every expert keeps, over all layers."""
    usable = {shard.number for shard in shards if shard.is_usable}
    least = min(replicas, len(usable))
    copies = (len(usable.intersection(of)) for by_expert in placement.shards_of.values() for of in by_expert)
    return sum(max(0, count - least) for count in copies)
