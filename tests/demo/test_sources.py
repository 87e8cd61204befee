"""The table of sources."""

import pytest

from demo.sources import KINDS, SOURCES, Source


def test_packages_and_titles_are_named_once() -> None:
    assert len({source.package for source in SOURCES}) == len({source.title for source in SOURCES}) == len(SOURCES)


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.package)
def test_every_source_names_its_licence_and_is_not_read_too_often(source: Source) -> None:
    assert source.licence.strip()
    assert 1 <= source.epochs <= 5


def test_every_kind_of_text_has_a_source() -> None:
    assert {source.kind for source in SOURCES} == set(KINDS)
