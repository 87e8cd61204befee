"""The shipped results of the fault bench, and what the documents say of them."""

from pathlib import Path

from bench.chaos import readme
from bench.chaos.results import FIELDS, read
from bench.chaos.schedule import MODES
from bench.chaos.table import markdown

ROOT = Path(__file__).parents[3]
RUNS = read(ROOT / "bench" / "chaos.json")


def test_the_shipped_rows_are_complete_and_lose_nothing_unexpected() -> None:
    for run in RUNS:
        assert run["rows"]
        for row in run["rows"]:
            assert tuple(row) == FIELDS
            assert row["mode"] in MODES


def test_the_readme_states_the_shipped_results() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(readme.lines(RUNS)) > 6
    assert [line for line in readme.lines(RUNS) if line not in text] == []
    many = readme.deployments(RUNS, readme.MANY)
    assert many
    assert many[0]["date"][:10] in text


def test_the_full_table_is_in_the_documents() -> None:
    text = (ROOT / "docs" / "chaos.md").read_text()
    for run in RUNS:
        assert [line for line in markdown(run["rows"]) if line not in text] == []
