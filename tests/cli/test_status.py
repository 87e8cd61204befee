"""How `drover status` looks."""

from typing import Any

import pytest

from cli.status import _show

MIB = 2**20


def router(**engine: Any) -> dict[str, Any]:
    counted = {"running": 3, "waiting": 12, "generated_tokens": 1_234_567}
    counted |= {"kv_bytes_used": 512 * MIB, "kv_bytes_cached": 300 * MIB, "kv_bytes_total": 1024 * MIB}
    counted |= {"prefix_queried_tokens": 8000, "prefix_hit_tokens": 6000, "preemptions": 2, "replayed": 5}
    return {"name": "router-0", "phase": "ready", "error": "", "tokens_per_s": 1812.3, "engine": counted | engine}


def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, part: dict[str, Any]) -> str:
    monkeypatch.setenv("COLUMNS", "80")
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
    assert [cell.strip() for cell in lines[head].split("┃")[2:-1]] == ["preemptions", "replayed"]
    assert [cell.strip() for cell in lines[head + 2].split("│")[1:-1]] == ["router-0", "2", "5"]


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
