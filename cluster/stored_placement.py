"""The placement of a deployment and its change, kept by Ray's head: they outlive the controller's process."""

import json
from dataclasses import asdict
from typing import Any

from ray.experimental import internal_kv

from cluster.names import app_name
from cluster.policy.change import Change, Ended, PlacementState
from experts.placement import Placement


def read_placement(namespace: str) -> PlacementState | None:
    """What was stored last; None if nothing was."""
    stored = internal_kv._internal_kv_get(_key(namespace))
    return from_json(stored.decode()) if stored else None


def write_placement(namespace: str, state: PlacementState) -> None:
    """Replace what was stored."""
    internal_kv._internal_kv_put(_key(namespace), to_json(state))


def forget_placement(namespace: str) -> None:
    """The deployment has ended."""
    internal_kv._internal_kv_del(_key(namespace))


def to_json(state: PlacementState) -> str:
    """Keys of mappings become strings."""
    return json.dumps(asdict(state))


def from_json(text: str) -> PlacementState:
    """What `to_json` was given."""
    raw = json.loads(text)
    previous, change, ended = raw["previous"], raw["change"], raw["ended"]
    return PlacementState(
        raw["revision"],
        _placement(raw["current"]),
        previous and _placement(previous),
        change and Change(**{**change, "target": _placement(change["target"])}),
        ended and Ended(**ended),
    )


def _placement(raw: dict[str, Any]) -> Placement:
    shards_of = {int(layer): tuple(map(tuple, by_expert)) for layer, by_expert in raw["shards_of"].items()}
    versions_of = {int(layer): tuple(versions) for layer, versions in raw["versions_of"].items()}
    return Placement(raw["epoch"], raw["num_shards"], shards_of, versions_of)


def _key(namespace: str) -> str:
    return f"{app_name(namespace)}.placement"
