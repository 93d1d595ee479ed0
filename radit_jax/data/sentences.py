"""Where sentences end: rules for text in Latin, Greek or Cyrillic script, no model (a passage should not stop in mid-sentence)."""

from __future__ import annotations

import re
from collections.abc import Iterator

# A blank line ends a sentence whatever stands before it, and so does a new line that starts a list item or a heading.
_BREAK = re.compile(r"\n\s*\n|\n(?=[ \t]*(?:[-*•]|#{1,6}|\d{1,3}[.)])[ \t])")
# In text with single spaces: closing marks, footnote numbers, quotes and brackets, then the space.
_END = re.compile(r"[.!?…]+(?:\[\d+\])*[\"'”’»)\]]*(?= )")
_OPENING = "\"'“‘«([¿¡"
_INITIALS = re.compile(r"(?:\w\.)*\w")  # "J", "U.S", "e.g": one letter at a time


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_NEVER_LAST = _words("mr mrs ms mx messrs dr prof st ste rev fr gen col maj lt sgt capt cmdr adm gov sen rep hon pres mt ft vs cf viz")
_BEFORE_NUMBERS = _words("no nos vol vols p pp fig figs ch sec art ca c approx jan feb mar apr jun jul aug sep sept oct nov dec op ver eq")
_SOMETIMES_LAST = _words("etc inc ltd co corp bros jr sr al ph.d est dept univ assn ave blvd rd")
# After an abbreviation or an initial only these words are taken to start a sentence: "in the U.S. The law", but "J. R. R. Tolkien".
_STARTERS = _words(
    "The A An In On At He She It They We You This That These Those There His Her Its Their Our As After Before When While For From "
    "By With However But And If During Since Although Some Many Most One Both Each According"
)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text in order, with single spaces for white space and no word lost."""
    for block in _BREAK.split(text):
        block = " ".join(block.split())
        start = 0
        for match in _END.finditer(block):
            if _ends(block, match):
                yield block[start : match.end()]
                start = match.end() + 1
        if start < len(block):
            yield block[start:]


def _ends(block: str, match: re.Match[str]) -> bool:
    """Whether the marks at `match` end a sentence, by the word before them and the word after."""
    stop = block.find(" ", match.end() + 1)
    following = block[match.end() + 1 : stop if stop >= 0 else None].lstrip(_OPENING)
    if following[:1].islower():
        return False
    if match[0][0] != "." or match[0].startswith(".."):
        return True
    word = block[block.rfind(" ", 0, match.start()) + 1 : match.start()].lstrip(_OPENING)
    lower = word.lower()
    if lower in _NEVER_LAST:
        return False
    if lower in _BEFORE_NUMBERS and following[:1].isdigit():
        return False
    if lower in _SOMETIMES_LAST or (_INITIALS.fullmatch(word) and not word.isdigit()):
        return following.rstrip(",;:") in _STARTERS
    return True
