"""HTML made of text that strangers wrote: passages, questions and answers show as what they are, and never act."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

# Control characters, marks that turn the direction of what follows, halves of characters: each is named where it stands.
_ODD = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
VOID = ("meta", "input", "br")  # elements without an end


class Markup(str):
    """HTML that is whole. Any other string is text, and is escaped where it meets markup."""


def text(value: Any) -> Markup:
    """A value as HTML: itself if it is markup, else escaped, for elements and attributes alike."""
    return value if isinstance(value, Markup) else Markup(html.escape(_ODD.sub(lambda odd: f"[U+{ord(odd[0]):04X}]", str(value))))


def join(parts: Iterable[Any], between: str = "") -> Markup:
    return Markup(text(between).join(map(text, parts)))


def element(tag: str, /, *inside: Any, **attributes: Any) -> Markup:
    """`<tag attributes>inside</tag>`. Attributes that are None are left out; `class_` is class, `text_anchor` is text-anchor."""
    named = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    opened = f"<{tag}" + "".join(f' {key}="{text(value)}"' for key, value in named.items()) + ">"
    return Markup(opened if tag in VOID else f"{opened}{join(inside)}</{tag}>")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], *, words: int = 1) -> Markup:
    """A table that scrolls where the window is narrow; the first `words` columns hold words, the others numbers."""
    kinds = [None if column < words else "number" for column in range(len(head))]
    lines = (element("tr", *(element("td", cell, class_=kind) for cell, kind in zip(row, kinds))) for row in rows)
    top = element("tr", *(element("th", cell, scope="col", class_=kind) for cell, kind in zip(head, kinds)))
    return element("div", element("table", element("thead", top), element("tbody", *lines)), class_="wide")


# -- numbers ----------------------------------------------------------------------------------------------------------------------------


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def interval(value: Mapping[str, Any] | None) -> Markup | str:
    """{"mean", "ci95"} in percent, the interval below the mean."""
    if value is None:
        return "–"
    return join((percent(value["mean"]), element("small", " – ".join(map(percent, value["ci95"])))))


def logp(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
