"""A whole run against a real deployment: a crash of one shard with a replica loses nothing."""

import json
from pathlib import Path

import pytest

from bench.chaos.__main__ import main
from bench.chaos.results import FIELDS


@pytest.mark.slow
def test_a_crash_of_a_shard_with_a_replica_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "chaos.json"
    shape = ["--shards", "3", "--replicas", "2", "--routers", "1", "--frontends", "1"]
    run = ["--modes", "crash", "--targets", "shard", "--cycles", "1", "--no-points", "--quiet-s", "2"]
    assert main([*run, *shape, "--out", str(out)]) == 0
    [row] = json.loads(out.read_text())["rows"]
    assert list(row) == list(FIELDS)
    assert (row["faults"], row["requests_failed"], row["tokens_changed"]) == (1, 0, 0)
    assert "Ray restarted a shard" in row["recovered_by"]
    assert row["gap_ms_max"] > 0
