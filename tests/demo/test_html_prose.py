"""What is left of an HTML page: its prose."""

import pytest

from demo.html_prose import prose_of_html

PROSE = "A sentence that is long enough to be worth reading."
OTHER = "Another sentence, just as long, that comes later on."
# A paragraph needs more than forty characters, most of them letters.
CODE = "x[0] = {1: 2}; y[1] = (3, 4); z |= 0xff & ~0x0f; print(x, y)"


def test_paragraphs_are_separated_by_an_empty_line() -> None:
    assert prose_of_html(f"<p>{PROSE}</p><p>{OTHER}</p>") == f"{PROSE}\n\n{OTHER}"


def test_space_inside_a_paragraph_is_one_space() -> None:
    assert prose_of_html(f"<p>\n  {PROSE.replace(' ', chr(10) + chr(9))} </p>") == PROSE


@pytest.mark.parametrize("tag", ["h1", "h2", "h3", "h4", "h5"])
def test_headings_may_be_short(tag: str) -> None:
    assert prose_of_html(f"<{tag}>Loops</{tag}><p>{PROSE}</p>") == f"Loops\n\n{PROSE}"


def test_short_paragraphs_are_labels_and_dropped() -> None:
    assert prose_of_html("<p>Next page</p>") == ""


def test_list_items_get_a_dash() -> None:
    assert prose_of_html(f"<ul><li>{PROSE}</li><li>{OTHER}</li></ul>") == f"- {PROSE}\n\n- {OTHER}"


def test_an_inner_list_ends_the_outer_item() -> None:
    assert prose_of_html(f"<ul><li>{PROSE}<ul><li>{OTHER}</li></ul></li></ul>") == f"- {PROSE}\n\n- {OTHER}"


def test_inline_elements_do_not_cut_words() -> None:
    assert prose_of_html("<p>All of the <em>emphasiz</em>ed <a href='#'>words</a> stay in one paragraph.</p>") == (
        "All of the emphasized words stay in one paragraph."
    )


def test_text_outside_of_paragraphs_is_no_prose() -> None:
    assert prose_of_html(f"<div>{OTHER}<p>{PROSE}</p>{OTHER}</div>{OTHER}") == PROSE


@pytest.mark.parametrize("tag", ["pre", "script", "style", "table", "nav", "head", "form", "footer", "button", "svg"])
def test_elements_without_prose_are_skipped(tag: str) -> None:
    assert prose_of_html(f"<{tag}><p>{OTHER}</p></{tag}><p>{PROSE}</p>") == PROSE


@pytest.mark.parametrize("mark", ['class="sphinxsidebar"', 'class="wide navheader"', 'class="toc"', 'id="menu-bar"'])
def test_menus_are_skipped_by_class_and_id(mark: str) -> None:
    assert prose_of_html(f"<div {mark}><p>{OTHER}</p></div><p>{PROSE}</p>") == PROSE


def test_a_skipped_element_ends_where_it_began_not_where_an_inner_one_ends() -> None:
    page = f"<div class='toc'><div><div>menu</div></div><p>{OTHER}</p></div><p>{PROSE}</p>"
    assert prose_of_html(page) == PROSE


def test_skipped_elements_nest() -> None:
    page = f"<table><tr><td><table><tr><td>1</td></tr></table><p>{OTHER}</p></td></tr></table><p>{PROSE}</p>"
    assert prose_of_html(page) == PROSE


def test_a_paragraph_goes_on_after_a_skipped_element_inside_it() -> None:
    assert prose_of_html("<p>The sentence begins here<button>Copy it</button> and it ends over here.</p>") == (
        "The sentence begins here and it ends over here."
    )


@pytest.mark.parametrize("tag", ["br", "img", "input", "hr", "link", "wbr"])
def test_tags_that_have_no_end_do_not_keep_a_skipped_element_open(tag: str) -> None:
    assert prose_of_html(f"<nav><{tag}><{tag}/></nav><p>{PROSE}</p>") == PROSE


def test_the_mark_behind_a_heading_is_no_part_of_it() -> None:
    page = f"<h2>Loops<a class='headerlink' href='#loops'>¶</a></h2><h2>Ends ¶</h2><p>{PROSE}</p>"
    assert prose_of_html(page) == f"Loops\n\nEnds\n\n{PROSE}"


def test_code_in_a_paragraph_is_dropped() -> None:
    assert prose_of_html(f"<p>{CODE}</p><p>{PROSE}</p>") == PROSE


def test_entities_become_their_characters() -> None:
    assert prose_of_html("<p>Caf&eacute; &amp; bar: the place where everybody&#8217;s friends meet</p>") == (
        "Café & bar: the place where everybody\u2019s friends meet"
    )


@pytest.mark.parametrize(
    "page",
    [
        f"<p>{PROSE}",
        f"<p>{PROSE}<p></div></p></em>",
        f"</nav></table><p>{PROSE}</p>",
        f"<p>{PROSE}</p><p unfinished='",
        f"<nav><ul><li><b>open</nav><p>{PROSE}</p>",
        f"<!DOCTYPE html><!-- <p> --><![CDATA[x]]><body><p>{PROSE}</body>",
    ],
    ids=["no end", "stray ends", "ends without a start", "cut off in a tag", "open inside a menu", "declarations"],
)
def test_damaged_pages_yield_what_can_be_read(page: str) -> None:
    assert prose_of_html(page) == PROSE


@pytest.mark.parametrize("page", ["", "no markup at all", "<", "<html><head><title>T</title></head></html>"])
def test_a_page_without_prose_is_empty(page: str) -> None:
    assert prose_of_html(page) == ""
