"""How a start looks on a terminal."""

import pytest

from cli.progress import StartProgress


@pytest.mark.parametrize("note", ["note: temperature is '[/bold]'; it is ignored", "/models/[/x]/[dim]"])
def test_brackets_in_a_stage_are_no_markup(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, note: str
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("COLUMNS", "120")
    StartProgress().stage(note)
    assert note in capsys.readouterr().err
