"""The corpus: split by name, cleaned of repeats, built once or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import demo.corpus
from demo.corpus import HELD_OUT_NOVEL, HELD_OUT_SHARE, Document, build_corpus, is_held_out, read_corpus
from demo.readers import OSIS_BOOKS, Documents
from demo.sources import Kind, Source
from tests.demo.tiny import NO_PROGRESS

TRAINED = "page of the training text"
HELD_OUT = next(f"page {number}" for number in range(1000) if is_held_out(f"page {number}"))


def paragraph(subject: str) -> str:
    """Long enough that a repeat is a repeat, and that a document of it counts."""
    return f"This paragraph is about {subject} and about nothing else. " * 4 + f"That was {subject}."


class Shelf:
    """Sources that need no package; `times_read` counts how often one of them was opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.times_read = 0

    def hold(self, *sources: list[tuple[str, str]], kind: Kind = "documentation") -> None:
        def read(documents: list[tuple[str, str]]) -> Documents:
            self.times_read += 1
            yield from documents

        self._monkeypatch.setattr(
            demo.corpus,
            "SOURCES",
            tuple(
                Source(
                    f"Title {number}", f"package-{number}", "python", "none", kind, 1.0, lambda _, d=documents: read(d)
                )
                for number, documents in enumerate(sources)
            ),
        )


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    return Shelf(monkeypatch)


def built(folder: Path) -> tuple[list[Document], list[Document]]:
    """Training and validation documents."""
    folder.mkdir(exist_ok=True)
    build_corpus(folder, NO_PROGRESS)
    return read_corpus(folder / "train.jsonl"), read_corpus(folder / "validation.jsonl")


def test_whether_a_document_is_held_out_never_changes() -> None:
    """Were this list another one, the shipped model would have read what it is evaluated on."""
    assert [book for book in OSIS_BOOKS if is_held_out(f"scripture {book}")] == ["Gen", "Esth"]
    assert [number for number in range(100) if is_held_out(f"wordnet noun {number}")] == [22, 31, 47, 84, 87]


def test_about_the_stated_share_is_held_out() -> None:
    held_out = sum(is_held_out(f"page {number}") for number in range(20_000))
    assert held_out == pytest.approx(HELD_OUT_SHARE * 20_000, rel=0.1)


def test_one_novel_is_held_out() -> None:
    novels = ["Emma", "Persuasion", "Mansfield Park", "Northanger Abbey", "Pride & Prejudice", "Sense And Sensibility"]
    assert [novel for novel in novels if is_held_out(f"novel {novel}")] == [HELD_OUT_NOVEL.removeprefix("novel ")]


def test_a_book_of_the_bible_is_held_out_in_both_translations_or_in_neither(shelf: Shelf, tmp_path: Path) -> None:
    translations = [
        [(f"scripture {book}", paragraph(f"{book} {year}")) for book in OSIS_BOOKS] for year in ("1611", "2015")
    ]
    shelf.hold(*translations, kind="scripture")
    sides = [sorted(document.name for document in side) for side in built(tmp_path)]
    assert all(len(side) == 2 * len(set(side)) > 0 for side in sides)
    assert set(sides[0]).isdisjoint(sides[1])


def test_documents_come_back_as_they_were_written(shelf: Shelf, tmp_path: Path) -> None:
    text = paragraph('quotes " and \\, tabs\t, Ünïcode 🙂, \u2028 and \x85') + "\n\n" + paragraph("two") + "\n  verse"
    shelf.hold([(TRAINED, text), (HELD_OUT, paragraph("three"))])
    train, validation = built(tmp_path)
    assert train == [Document("package-0", "documentation", TRAINED, text)]
    assert validation == [Document("package-0", "documentation", HELD_OUT, paragraph("three"))]


def test_a_paragraph_on_both_sides_is_left_to_the_validation_text(shelf: Shelf, tmp_path: Path) -> None:
    train_text = f"{paragraph('both')}\n\n{paragraph('one')}"
    shelf.hold([(TRAINED, train_text), (HELD_OUT, f"{paragraph('both')}\n\n{paragraph('two')}")])
    train, validation = built(tmp_path)
    assert [document.text for document in train] == [paragraph("one")]
    assert [document.text for document in validation] == [f"{paragraph('both')}\n\n{paragraph('two')}"]


def test_a_paragraph_is_the_same_however_it_is_spaced(shelf: Shelf, tmp_path: Path) -> None:
    spaced = paragraph("both").replace(" ", "\n ")
    shelf.hold([(TRAINED, f"{spaced}\n\n{paragraph('one')}"), (HELD_OUT, paragraph("both"))])
    assert [document.text for document in built(tmp_path)[0]] == [paragraph("one")]


def test_a_repeated_paragraph_stays_where_it_came_first(shelf: Shelf, tmp_path: Path) -> None:
    first, second = f"{paragraph('both')}\n\n{paragraph('one')}", f"{paragraph('two')}\n\n{paragraph('both')}"
    shelf.hold([(TRAINED, first), (f"{TRAINED}, continued", second), (HELD_OUT, paragraph("three"))])
    assert [document.text for document in built(tmp_path)[0]] == [first, paragraph("two")]


def test_a_heading_may_return(shelf: Shelf, tmp_path: Path) -> None:
    texts = [f"See also\n\n{paragraph(subject)}" for subject in ("one", "two")]
    shelf.hold([(TRAINED, texts[0]), (f"{TRAINED}, continued", texts[1]), (HELD_OUT, paragraph("three"))])
    assert [document.text for document in built(tmp_path)[0]] == texts


def test_a_document_of_which_little_is_left_is_dropped(shelf: Shelf, tmp_path: Path) -> None:
    shelf.hold(
        [(TRAINED, f"{paragraph('both')}\n\nThe end."), (HELD_OUT, paragraph("both"))], [("other", paragraph("x"))]
    )
    assert [document.name for document in built(tmp_path)[0]] == ["other"]


def test_a_corpus_that_is_there_is_not_built_again(shelf: Shelf, tmp_path: Path) -> None:
    shelf.hold([(TRAINED, paragraph("one")), (HELD_OUT, paragraph("two"))])
    assert built(tmp_path) == built(tmp_path)
    assert shelf.times_read == 1


@pytest.mark.parametrize("left", ["train.jsonl", "validation.jsonl", "train.jsonl.partial"])
def test_half_a_corpus_is_built_again(left: str, shelf: Shelf, tmp_path: Path) -> None:
    shelf.hold([(TRAINED, paragraph("one")), (HELD_OUT, paragraph("two"))])
    (tmp_path / left).write_text("cut off\n")
    train, validation = built(tmp_path)
    assert ([document.name for document in train], [document.name for document in validation]) == (
        [TRAINED],
        [HELD_OUT],
    )


def test_an_interrupted_build_leaves_nothing_that_counts(shelf: Shelf, tmp_path: Path) -> None:
    def interrupted() -> Iterator[tuple[str, str]]:
        yield TRAINED, paragraph("one")
        raise KeyboardInterrupt

    shelf.hold([(HELD_OUT, paragraph("two"))], interrupted())
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path, NO_PROGRESS)
    assert list(tmp_path.glob("*.jsonl")) == []


def test_a_build_that_fails_while_writing_is_not_taken_for_done(
    shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fills_the_disk(path: Path, text: str, **how: str) -> None:
        with path.open("w") as file:
            file.write(text[:10])
        raise OSError("disk full")

    shelf.hold([(TRAINED, paragraph("one")), (HELD_OUT, paragraph("two"))])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fills_the_disk)
        with pytest.raises(OSError, match="disk full"):
            build_corpus(tmp_path, NO_PROGRESS)
    assert [len(side) for side in built(tmp_path)] == [1, 1]
