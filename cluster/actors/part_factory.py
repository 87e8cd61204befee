"""Creates a deployment's parts: each in its bundle of the placement group, or where there is room."""

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from cluster.actors.creation import Blueprint
from cluster.actors.desired import Desired
from cluster.names import app_name
from cluster.policy.drain import Resources, new_nodes
from cluster.policy.wanted import Found, Wanted
from cluster.running import free_by_node, nodes


class PartFactory:
    """blueprints: of the parts that the deployment began with. Those that came later are made like the first of
    their kind, without a bundle: Ray finds them a node, and its autoscaler sees what they need."""

    def __init__(self, namespace: str, blueprints: Sequence[Blueprint], desired: Desired) -> None:
        self._namespace, self._desired = namespace, desired
        self._blueprints = {blueprint.name: blueprint for blueprint in blueprints}
        self._templates = {blueprint.is_shard: blueprint for blueprint in reversed(blueprints)}

    @property
    def with_bundles(self) -> frozenset[str]:
        """The parts for which the placement group keeps a place, whether they run or not."""
        return frozenset(self._blueprints)

    def needs_of(self, names: Iterable[str]) -> dict[str, Resources]:
        """What each of these parts reserves."""
        return {name: self._like(name).needs for name in names}

    @property
    def needs_of_new(self) -> dict[str, Resources]:
        """What a new router reserves, and a new shard."""
        return {"shard" if is_shard else "router": part.needs for is_shard, part in self._templates.items()}

    def create(self, name: str, wanted: Wanted) -> None:
        """Create a part, on no cleared node. Raises NoRoom."""
        blueprint = self._blueprint(name, wanted)
        group = ray.util.get_placement_group(app_name(self._namespace))
        home = None if blueprint.bundle is None else self._home(group, blueprint)
        node = None
        if home in wanted.cleared or (blueprint.bundle is None and wanted.cleared):
            node = new_nodes({name: blueprint.needs}, free_by_node(wanted.cleared))[name]
        blueprint.create(group, node)
        self._desired.note_move(name, is_moved=blueprint.bundle is not None and node is not None)

    def homeless(self, wanted: Wanted, found: Mapping[str, Found]) -> list[str]:
        """Moved parts for which Ray finds no node, though that of their bundle may be used."""
        lost = [name for name in self._desired.moved if name in found and found[name].node is None]
        if not lost:
            return []
        group = ray.util.get_placement_group(app_name(self._namespace))
        usable = {node["id"] for node in nodes()} - wanted.cleared.keys()
        return [name for name in lost if self._home(group, self._blueprints[name]) in usable]

    def _like(self, name: str) -> Blueprint:
        return self._blueprints.get(name) or self._templates[name.startswith("shard-")]

    def _blueprint(self, name: str, wanted: Wanted) -> Blueprint:
        if name in self._blueprints:
            return self._blueprints[name]
        template = self._like(name)
        alike = wanted.shards if template.is_shard else wanted.routers
        changes: dict[str, Any] = {"name": name, "neighbours": math.ceil(len(alike) / max(1, len(nodes())))}
        if template.is_shard:
            changes |= {"slots": {}}
        else:
            changes |= {"placement": wanted.placement}
        return replace(template, name=name, bundle=None, changes=pickle.dumps(changes))

    def _home(self, group: Any, blueprint: Blueprint) -> str | None:
        """The node of the part's bundle, as Ray has it."""
        home: str | None = ray.util.placement_group_table(group)["bundles_to_node_id"].get(blueprint.bundle)
        return home
