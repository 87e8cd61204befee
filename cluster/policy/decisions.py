"""Decisions as rows: one JSON line each, bounded, and made again from what they say they rest on."""

import json
from collections import deque
from collections.abc import Iterable

from cluster.policy.autoscale import Decision
from cluster.policy.judgement import judge

KEPT = 1000


class DecisionLog:
    """The newest decisions: of each kind, those that differ from the one before."""

    def __init__(self, kept: int = KEPT) -> None:
        self._rows: deque[Decision] = deque(maxlen=kept)
        self._last: dict[str, tuple[str, int]] = {}

    def add(self, decisions: Iterable[Decision]) -> list[Decision]:
        """Keep those that are new, and return them."""
        new = []
        for decision in decisions:
            what = (decision.decision, decision.target)
            if decision.acts or self._last.get(decision.kind) != what:
                self._last[decision.kind] = what
                self._rows.append(decision)
                new.append(decision)
        return new

    def rows(self) -> list[Decision]:
        """The oldest first."""
        return list(self._rows)


def to_line(decision: Decision) -> str:
    """A row as JSON, without the placement that was proposed."""
    row = {
        "time_s": decision.time_s,
        "kind": decision.kind,
        "decision": decision.decision,
        "target": decision.target,
        "reason": decision.reason,
        "inputs": decision.inputs,
    }
    return json.dumps(row, allow_nan=False)


def from_line(line: str) -> Decision:
    """What `to_line` has written."""
    return Decision(**json.loads(line))


def replay(rows: Iterable[Decision]) -> list[Decision]:
    """The same decisions, made again from their inputs. Each row is enough by itself, so a log may begin anywhere."""
    again = []
    for row in rows:
        decision, target, reason = judge(row.kind, row.inputs)
        again.append(Decision(row.time_s, row.kind, decision, target, reason, row.inputs))
    return again
