"""The prose of an HTML page: its headings, paragraphs and list items; no code blocks, tables, menus or scripts."""

from html.parser import HTMLParser

_BLOCKS = {"p", "h1", "h2", "h3", "h4", "h5", "li", "dd", "dt"}
_SKIPPED = {"pre", "script", "style", "table", "nav", "head", "form", "footer", "button", "svg"}
_SKIPPED_CLASSES = {
    *("related", "sphinxsidebar", "sphinxsidebarwrapper", "toctree-wrapper", "headerlink", "highlight"),  # Sphinx
    *("navheader", "navfooter", "toc"),  # DocBook
    *("sidebar", "menu-bar", "nav-chapters", "example-wrap"),  # mdBook, rustdoc
    *("menu", "searchbox", "contents", "footer", "bottomarea"),  # SQLite, Apache
}
_VOID = {"area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr"}


def prose_of_html(page: str) -> str:
    """Paragraphs, separated by an empty line. Damaged HTML yields what can be read of it."""
    reader = _Prose()
    reader.feed(page)
    reader.close()
    return "\n\n".join(reader.paragraphs)


class _Prose(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._words: list[str] = []
        self._tag = ""
        self._skipping: list[str] = []  # open elements inside the outermost skipped one

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in _VOID:
            return
        values = dict(attrs)
        names = {*(values.get("class") or "").split(), values.get("id")}
        if self._skipping or tag in _SKIPPED or names & _SKIPPED_CLASSES:
            self._skipping.append(tag)
        elif tag in _BLOCKS:
            self._end_paragraph()
            self._tag = tag

    def handle_endtag(self, tag: str) -> None:
        if self._skipping:
            if tag in self._skipping:
                while self._skipping.pop() != tag:
                    pass
        elif tag in _BLOCKS or tag in ("div", "ul", "ol", "section", "body"):
            self._end_paragraph()

    def handle_data(self, data: str) -> None:
        if self._tag and not self._skipping:
            self._words.append(data)

    def close(self) -> None:
        super().close()
        self._end_paragraph()

    def _end_paragraph(self) -> None:
        text = " ".join("".join(self._words).split()).rstrip("¶").strip()
        heading = self._tag.startswith("h")
        letters = sum(letter.isalpha() or letter.isspace() for letter in text)
        if letters > 0.85 * len(text) and (len(text) > 40 or heading):
            self.paragraphs.append(f"- {text}" if self._tag == "li" else text)
        self._words.clear()
        self._tag = ""
