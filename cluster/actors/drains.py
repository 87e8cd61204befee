"""Letting parts go, or all parts of a node: whether that can be, and how far it is."""

from collections.abc import Mapping
from dataclasses import replace

from cluster.actors.desired import Desired, View
from cluster.actors.part_factory import PartFactory
from cluster.policy.drain import NoRoom, matching_nodes, new_nodes, objection
from cluster.policy.reconcile import going
from cluster.policy.wanted import leaving
from cluster.reports import DrainProgress
from cluster.running import Running, free_by_node, nodes


class Drains:
    """For any thread. It judges and notes; the controller's watch does what is noted."""

    def __init__(self, desired: Desired, running: Running, factory: PartFactory) -> None:
        self._desired, self._running, self._factory = desired, running, factory

    def drain(self, target: str, grace_s: float) -> str:
        """Let a part, or all parts of a node, go; returns why not, or an empty string."""
        with self._desired.lock:
            found = self._running.look()
            wanted = self._desired.wanted
            if target in wanted.parts:
                refusal = "" if target in wanted.drained else objection(target, wanted, found)
                if not refusal:
                    self._desired.want(replace(wanted, drained={**wanted.drained, target: grace_s}))
                return refusal
            node, refusal = self._living_node(target)
            if refusal:
                return refusal
            cleared = replace(wanted, cleared={**wanted.cleared, node: grace_s})
            leaves = leaving(cleared, found).keys() - wanted.drained.keys()
            try:
                new_nodes(self._factory.needs_of(leaves), free_by_node(cleared.cleared))
            except NoRoom as error:
                return str(error)
            self._desired.want(cleared)
            return ""

    def undo(self, target: str) -> str:
        """Want a drained part, or a cleared node, again; returns why not, or an empty string."""
        with self._desired.lock:
            wanted = self._desired.wanted
            if target in wanted.parts:
                if target not in wanted.drained:
                    return f"{target} is not drained"
                self._desired.want(replace(wanted, drained=_without(wanted.drained, target)))
                return ""
            node = self._cleared_node(target)
            if node is None:
                return f"{target} is not drained"
            self._desired.want(replace(wanted, cleared=_without(wanted.cleared, node)))
            return ""

    def progress(self, target: str, view: View) -> DrainProgress:
        """How far a drain was at the last look: what is left there, and what each of it waits for."""
        if target in view.wanted.parts:
            is_known, left = target in view.wanted.drained, {target} & view.found.keys()
        else:
            node = self._cleared_node(target)
            is_known = node in view.wanted.cleared
            left = {name for name, part in view.found.items() if is_known and part.node == node}
            left |= {name for name in view.wanted.parts if name not in view.found and name not in view.wanted.drained}
        return DrainProgress(is_known and not left, {name: _waits_for(view, name) for name in sorted(left)})

    def _living_node(self, target: str) -> tuple[str, str]:
        """The id of the node that `target` names, and why there is none."""
        alive = nodes()
        matching = matching_nodes(target, alive)
        if len(matching) == 1:
            return matching[0], ""
        if matching:
            return "", f"{target} names {len(matching)} nodes; name one by its id: {', '.join(matching)}"
        parts, known = ", ".join(self._desired.wanted.parts), ", ".join(node["address"] for node in alive)
        return "", f"{target} is neither a part nor a node; parts are {parts}; nodes are {known}"

    def _cleared_node(self, target: str) -> str | None:
        """The id of the cleared node that `target` names, also if that node is dead by now."""
        cleared = [node for node in nodes(also_dead=True) if node["id"] in self._desired.wanted.cleared]
        return next(iter(matching_nodes(target, cleared)), None)


def _waits_for(view: View, name: str) -> str:
    if name in view.problems:
        return view.problems[name]
    part = view.found.get(name)
    if part is None:
        return "is being started elsewhere"
    if name not in going(view.wanted, view.found):
        return "waits until its stand-ins are ready"
    if name in view.wanted.shards:
        return "is left alone by the routers"
    left_s = max(0.0, leaving(view.wanted, view.found)[name] - part.draining_s)
    return f"finishes its requests, for {left_s:.0f} s more at most"


def _without(mapping: Mapping[str, float], key: str) -> dict[str, float]:
    return {other: value for other, value in mapping.items() if other != key}
