"""How `drover status` looks."""

import json
from typing import Any

import pytest

from cli.status import _show
from cluster.reports import ActorState, ControllerStats, Phase, RouterStats, ShardStats
from cluster.status import DeploymentStatus, PartStatus, as_json

MIB = 2**20


def router(**engine: Any) -> dict[str, Any]:
    counted = {"running": 3, "waiting": 12, "generated_tokens": 1_234_567}
    counted |= {"kv_bytes_used": 512 * MIB, "kv_bytes_cached": 300 * MIB, "kv_bytes_total": 1024 * MIB}
    counted |= {"prefix_queried_tokens": 8000, "prefix_hit_tokens": 6000, "preemptions": 2, "replayed": 5}
    return {"name": "router-0", "phase": "ready", "error": "", "tokens_per_s": 1812.3, "engine": counted | engine}


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]) -> str:
    monkeypatch.setenv("COLUMNS", "120")
    _show({"routers": [part], "shards": []})
    return capsys.readouterr().out


def test_the_kv_cache_is_told_in_full(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(capsys, monkeypatch, router())
    [row] = [line for line in text.splitlines() if "MiB" in line]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "router-0", "512 MiB", "300 MiB", "212 MiB", "75% of 8000"
    ]  # fmt: skip


def test_requests_that_are_computed_again_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, monkeypatch, router())
    lines = text.splitlines()
    [head] = [place for place, line in enumerate(lines) if "computed again by" in line]
    assert [cell.strip() for cell in lines[head].split("┃")[2:-1]] == ["preemptions", "replayed", "retries", "restarts"]
    assert [cell.strip() for cell in lines[head + 2].split("│")[1:-1]] == ["router-0", "2", "5", "0", "0"]


def test_before_the_first_prompt_there_is_no_hit_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(capsys, monkeypatch, router(prefix_queried_tokens=0, prefix_hit_tokens=0, kv_bytes_used=3 * MIB // 2))
    assert "no prompts yet" in text
    assert "1.5 MiB" in text


def test_a_router_that_does_not_answer_has_no_cache_to_show(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    away = {"name": "router-0", "phase": "unreachable", "error": "is down; Ray restarts it"}
    text = shown(capsys, monkeypatch, away)
    assert "unreachable - is" in text
    assert "KV cache" not in text


@pytest.mark.parametrize("error", ["no [/models/x] here", "[enforce fail at alloc_cpu.cpp:117] no memory", "[dim]"])
def test_brackets_in_an_error_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    text = shown(capsys, monkeypatch, {"name": "router-0", "phase": "failed", "error": error})
    assert [word for word in error.split() if word not in text] == []


def test_links_tell_who_is_down_since_when_and_why(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shards = [{"name": f"shard-{number}", "phase": "ready", "error": ""} for number in range(4)]
    part = router() | {"down": {"shard-1": "lost: [Errno 104]"}, "down_s": {"shard-1": 12.3}}
    part |= {"drained": ["shard-3"], "slow": {"shard-0": 7.5}, "retries": {"lost": 3, "late": 1}, "restarts": 2}
    _show({"routers": [part], "shards": shards})
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "router-0 2 of 4 shard-1 for 12 s: lost: [Errno 104]; shard-3: drained; shard-0: 7.5 times as slow" in text
    assert "router-0 2 5 4 2" in text


PARTS = ("router-0", "router-1", "shard-0", "shard-1")
WANTED = ControllerStats(PARTS, {"router-1": 30.0, "shard-1": 30.0}, {}, {"shard-0": 64, "shard-1": 64}, {})


def test_what_is_wanted_but_not_there_is_listed_and_what_is_drained_says_so() -> None:
    ready = ActorState(7, Phase.READY, 1, 1)
    parts = [
        PartStatus("router-1", ready, RouterStats(None, 0.0, 0, 0, {}, {}, {}, open_requests=3, draining_s=1.0)),
        PartStatus("shard-0", ready, ShardStats(60, 0, ())),
    ]
    status = as_json(DeploymentStatus(parts, WANTED))
    phases = {part["name"]: part["phase"] for part in status["routers"] + status["shards"]}
    assert phases == {"router-0": "starting", "router-1": "draining", "shard-0": "ready", "shard-1": "drained"}
    assert json.loads(json.dumps(status))["controller"]["drained"] == {"router-1": 30.0, "shard-1": 30.0}


def test_held_of_wanted_and_left_requests_are_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ready = ActorState(7, Phase.READY, 1, 1)
    stats = RouterStats(None, 0.0, 0, 0, {}, {}, {}, open_requests=3, draining_s=1.0)
    parts = [PartStatus("router-1", ready, stats), PartStatus("shard-0", ready, ShardStats(60, 0, ()))]
    _show(as_json(DeploymentStatus(parts, WANTED)))
    text = capsys.readouterr().out
    assert "60 of 64" in text
    assert "draining - 3 requests" in " ".join(text.split())


def test_what_a_router_misses_is_told_in_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    degraded = "shard-1: has not read all of its experts yet"
    text = shown(capsys, monkeypatch, router() | {"degraded": degraded})
    assert f"router-0 is degraded: {degraded}\n" in text


def test_without_the_controller_what_runs_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _show(as_json(DeploymentStatus([PartStatus("shard-0", None, None, "is down; Ray restarts it")])))
    text = capsys.readouterr().out
    assert "The controller does not answer." in text
    assert "shard-0" in text
