"""Files of a person's own folder: what is read of each kind, and that what cannot be read is one bad record with its name."""

from __future__ import annotations

import io
import logging
import sys

import pypdf
import pytest
from pdfs import pdf

from radit_jax.data.corpus import documents
from radit_jax.data.files import read
from radit_jax.data.records import BadRecord
from radit_jax.errors import InputError

PAGE = """<html><head><title>Pump care</title></head><body>
<nav><ul><li><a href="/">Home</a></li><li><a href="/login">Log in</a></li></ul></nav>
<article><h1>Pump care</h1><p>The oil of the pump is changed every 500 hours, or once a year if it runs less than that.</p>
<p>Use the grade that the plate beside the motor names. Never mix two grades in one pump; drain it first.</p></article>
<footer><p>Copyright by nobody. Imprint. Cookies.</p></footer></body></html>"""


def locked(password: str) -> bytes:
    """A PDF that opens with this password alone; with "" for everyone, as one that is only locked against changes."""
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([["The oil is changed every 500 hours."]])))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="AES-128")
    buffer = io.BytesIO()
    writer.write(buffer)
    return buffer.getvalue()


def test_an_html_page_is_its_article(tmp_path):
    (tmp_path / "a.html").write_text(PAGE)
    title, text = read(tmp_path / "a.html")
    assert title == "Pump care" and "every 500 hours" in text and "Never mix two grades" in text
    assert "Log in" not in text and "Cookies" not in text


def test_an_html_page_without_an_article_is_all_its_text(tmp_path):
    (tmp_path / "short.htm").write_text("<p>Valve 7 is red.</p>")
    assert read(tmp_path / "short.htm") == ("short", "Valve 7 is red.")


def test_a_pdf_is_the_text_of_its_pages_with_cut_words_joined(tmp_path):
    (tmp_path / "a.pdf").write_bytes(pdf([["The oil of the pump is chan-", "ged every 500 hours."], ["Second page."]], title="Pump care"))
    title, text = read(tmp_path / "a.pdf")
    assert title == "Pump care" and text.split() == "The oil of the pump is changed every 500 hours. Second page.".split()
    (tmp_path / "untitled.pdf").write_bytes(pdf([["x"]]))
    assert read(tmp_path / "untitled.pdf")[0] == "untitled"


def test_a_pdf_that_opens_without_a_password_is_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(locked(""))
    assert "500 hours" in read(tmp_path / "a.pdf")[1]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("locked.pdf", locked("secret"), "wants a password"),
        ("damaged.pdf", b"%PDF-1.4\nnothing more", "not a readable PDF"),
        ("scanned.pdf", pdf([[], []]), "text recognition"),
        ("empty.html", b"<html></html>", "is empty"),
        ("empty.txt", b" \n", "is empty"),
        ("latin.txt", b"\xff", "utf-8"),
    ],
)
def test_what_cannot_be_read_is_a_bad_record_with_its_name(name, content, says, tmp_path, caplog):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "z.txt").write_text("good")
    with pytest.raises((BadRecord, UnicodeError), match=says):
        read(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: .*{says}"):
        list(documents(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert [document.id for document in documents(tmp_path, max_bad_records=1)] == ["z.txt"]
    assert name in caplog.text


@pytest.mark.parametrize(("name", "module"), [("a.pdf", "pypdf"), ("a.html", "trafilatura")])
def test_a_missing_package_names_what_to_install(name, module, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"x")
    (tmp_path / "b.txt").write_text("good")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=rf"{name}.*{module}.*pip install -e '\.\[documents\]'"):
        list(documents(tmp_path, max_bad_records=10))
