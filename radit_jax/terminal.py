"""Answers as a person reads them on a terminal. What comes from a corpus or an LM is made harmless before it gets there."""

from __future__ import annotations

import json
import shutil
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from radit_jax import ask
from radit_jax.logbook import say
from radit_jax.pipeline import Pipeline

JOINERS = "\u200c\u200d"  # invisible, and part of how words and emoji are written
SPACES = "\t\n\v\f\r\x85\u2028\u2029"
TITLE = 80  # characters of a title that are shown


def answer(
    make_pipeline: Callable[[], Pipeline], text: str, *, history: str | None, compare: bool, untuned: bool, level: str, as_json: bool
) -> None:
    """Asks, and prints the answer; what a person got wrong about the question is told before models are loaded."""
    asked = ask.question(text, ask.read_history(history) if history else ())
    asker = ask.Asker(make_pipeline())
    if compare:
        (told,) = asker.compare([asked])
        for name, lacks in asker.missing.items():
            say(f"{name}: not in this workdir ({lacks})")
        print(json_line(told) if as_json else side_by_side(told))
        return
    listener = Listener()
    listens = not as_json and (level == "token" or sys.stderr.isatty())
    told = asker.ask(asked, untuned=untuned, level=level, heard=listener if listens else None)
    if as_json:
        print(json_line(ask.plain(told)))
    else:
        listener.end(told["answer"])
        print(one(told))


def harmless(text: str) -> str:
    """One line in which a terminal finds no command: line ends and tabs become spaces, other control characters U+FFFD.

    Among those are escape (colours, cursor, titles) and lone surrogates. Invisible marks are left out: some turn writing round.
    """
    return "".join(map(_harmless, text))


def _harmless(character: str) -> str:
    if character in SPACES:
        return " "
    return {"Cc": "\ufffd", "Cs": "\ufffd", "Cf": ""}.get(_control(character), character)


def _control(character: str) -> str:
    """Its Unicode category, if that is one of control characters: Cc, Cf, Cs, Zl or Zp."""
    category = unicodedata.category(character)
    return category if category in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in JOINERS else ""


def json_line(value: Any) -> str:
    """JSON in UTF-8 with every control character spelled out, also those that JSON takes as they are."""
    return "".join(_spelled(c) if _control(c) else c for c in json.dumps(value, ensure_ascii=False))


def _spelled(character: str) -> str:
    return json.dumps(character)[1:-1] if character > "\x7f" else f"\\u{ord(character):04x}"


class Listener:
    """Shows an answer while it is heard: its text on stdout as it grows, what each passage says on stderr."""

    def __init__(self) -> None:
        self.shown = ""

    def __call__(self, title: str, text: str, logprob: float) -> None:
        if title:
            say(f"  {_said(title, text, logprob)}")
        else:
            self._grow(text.removesuffix("\ufffd"))  # half a character waits for the rest

    def end(self, text: str) -> None:
        """The answer is whole."""
        self._grow(text)
        if self.shown != text:  # what was shown has changed since
            print(f"\n{harmless(text)}", end="")
        print(flush=True)

    def _grow(self, text: str) -> None:
        if text.startswith(self.shown):
            print(harmless(text[len(self.shown) :]), end="", flush=True)
            self.shown = text


def one(told: Mapping[str, Any]) -> str:
    """What is below an answer: its probability, and each passage with its weight p_R, its own answer, and whether it was overruled."""
    lines = [f"  log p {told['logprob']:.2f} by Eq. 2 over {len(told['passages'])} passages"]
    for passage in told["passages"]:
        said = _title(passage["title"]) if passage["answer"] is None else _said(passage["title"], passage["answer"], passage["logprob"])
        lines.append(f"  {passage['weight']:.3f}  {said}{', overruled' if passage['overruled'] else ''}")
    return "\n".join(lines)


def side_by_side(told: Mapping[str, Any], width: int | None = None) -> str:
    """The systems of a comparison as columns: their answers, then their passages by rank."""
    width = width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else 140)
    grid = Table(title=Text(harmless(told["question"])), title_justify="left", show_lines=True, expand=False)
    for name in told["systems"]:
        grid.add_column(Text(name), overflow="fold")
    systems = list(told["systems"].values())
    grid.add_row(*(Text(f"{harmless(of['answer'])}\nlog p {of['logprob']:.2f}") for of in systems))
    for rank in range(max((len(of["passages"]) for of in systems), default=0)):
        grid.add_row(*(Text(_cell(of["passages"][rank : rank + 1])) for of in systems))
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get().rstrip("\n")


def _cell(passage: Sequence[Mapping[str, Any]]) -> str:
    if not passage:
        return ""
    of = passage[0]
    verdict = "\noverruled" if of["overruled"] else ""
    return f"{of['weight']:.3f}  {_title(of['title'])}\n{harmless(of['answer'])!r}\nlog p {of['logprob']:.2f}{verdict}"


def _said(title: str, answer: str, logprob: float) -> str:
    return f"{_title(title)}: {harmless(answer)!r} (log p {logprob:.2f})"


def _title(title: str) -> str:
    title = harmless(title)
    return title if len(title) <= TITLE else title[: TITLE - 1] + "…"
