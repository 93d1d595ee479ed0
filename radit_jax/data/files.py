"""A person's own files as texts: .txt and .md as they are, .html without what stands around the article, .pdf page by page.

HTML and PDF are read by trafilatura and pypdf, the optional extra `documents`; neither is imported before there is such a file.
"""

from __future__ import annotations

import importlib
import logging
import re
from pathlib import Path
from types import ModuleType

from radit_jax.data.records import BadRecord, text_field
from radit_jax.errors import InputError

PLAIN, HTML, PDF = (".txt", ".md"), (".html", ".htm"), (".pdf",)
SUFFIXES = (*PLAIN, *HTML, *PDF)
EXTRA = "pip install -e '.[documents]'"
_HEADING = re.compile(r"\s*#{1,6}[ \t]+(.+?)[ \t#]*(?:\n|$)")
_CUT_WORD = re.compile(r"(?<=[a-z])-\n(?=[a-z])")  # a word that a printed line cuts


def read(path: Path) -> tuple[str, str]:
    """(title, text) of one file of SUFFIXES. The title is a Markdown heading on the first line, or what HTML and PDF say; else the name.

    Raises BadRecord for a file without text, a damaged one and a PDF with a password, InputError where the extra is not installed.
    """
    suffix = path.suffix.lower()
    if suffix in HTML:
        title, text = _html(path)
    elif suffix in PDF:
        title, text = _pdf(path)
    else:
        title, text = _plain(path)
    return text_field({"title": title.strip() or path.stem}, "title"), text_field({"text": text}, "text")


def _plain(path: Path) -> tuple[str, str]:
    text = path.read_text(encoding="utf-8-sig")
    heading = _HEADING.match(text) if path.suffix.lower() == ".md" else None
    return (heading[1], text[heading.end() :]) if heading else ("", text)


def _html(path: Path) -> tuple[str, str]:
    """The article of a page, without menus and footers; all of its text where there is no article to be told from the rest."""
    trafilatura = _extra("trafilatura", path)
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # what is wrong with a page is said by us, with its place
    page = path.read_bytes()
    try:
        found = trafilatura.bare_extraction(page, favor_recall=True, include_comments=False, with_metadata=True)
        text = found.text if found is not None else ""
        text = text or trafilatura.html2txt(page) or trafilatura.html2txt(b"<html><body>" + page)  # the last for a piece of a page
    except Exception as error:  # it raises whatever its parsers raise
        raise BadRecord(f"cannot be read as HTML ({_reason(error)})") from error
    return (found.title or "") if found is not None else "", text or ""


def _pdf(path: Path) -> tuple[str, str]:
    pypdf = _extra("pypdf", path)
    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        with open(path, "rb") as file:
            reader = pypdf.PdfReader(file)
            if reader.is_encrypted and not reader.decrypt(""):  # many are locked against changes only, and open without a password
                raise BadRecord("wants a password, expected a PDF that opens without one")
            text = "\n".join(page.extract_text() for page in reader.pages)
            title = str((reader.metadata or {}).get("/Title") or "")
    except (BadRecord, OSError):
        raise
    except Exception as error:  # a damaged file makes it raise nearly anything
        raise BadRecord(f"not a readable PDF ({_reason(error)})") from error
    if not text.strip():
        raise BadRecord("a PDF without text: if its pages are pictures, it needs text recognition first")
    return title, _CUT_WORD.sub("", text)


def _extra(module: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{path}: {path.suffix} files need the package {module}, which is not installed: {EXTRA}") from error


def _reason(error: Exception) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:120]
