"""Reads a scenario file, and what replaces its values on the command line."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cluster.config import ConfigError
from cluster.deployment_file import mapping_of, read_deployment, set_key
from cluster.simulation.scenario import Scenario, parse_scenario

EXAMPLE, MEASURED = "deploy/simulation.yaml", "bench/simulation.json"


def load_scenario(path: Path | None, overrides: Sequence[str] = (), costs: Path | None = None) -> Scenario:
    """The scenario in a file; without one, all defaults. Raises ConfigError.

    costs: a file with measured costs, as bench/simulation.json. They replace the scenario's.

    A relative `routing.trace` in the file is relative to the file; in an override, to the working
    directory. overrides: "section.key=value" each, with the value in YAML.
    """
    raw: dict[str, Any] = {}
    if path is not None:
        text = read_deployment(path, "scenario", EXAMPLE)
        raw = mapping_of(text, path) if text.strip() else {}
        routing = raw.get("routing")
        if isinstance(routing, dict) and isinstance(routing.get("trace"), str):
            routing["trace"] = str(path.parent / os.path.expanduser(routing["trace"]))
    if costs is not None:
        measured = mapping_of(read_deployment(costs, "costs", MEASURED), costs)
        if not isinstance(measured.get("costs"), dict):
            raise ConfigError(f"{costs} has no costs; {MEASURED} is an example of a file with measured ones")
        raw["costs"] = measured["costs"]
    for override in overrides:
        set_key(raw, override)
    return parse_scenario(raw, "--set" if path is None else str(path))
