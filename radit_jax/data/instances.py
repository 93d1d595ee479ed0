"""The one place where prompt and target become token ids: training, scoring and decoding all call it (SPEC trap 9).

Prompt and target are tokenized apart and joined as ids, so the tokens at their boundary never depend on who asks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from radit_jax.data.prompts import background_prompt
from radit_jax.errors import InputError
from radit_jax.types import Instance


@dataclasses.dataclass
class Truncations:
    """How many instances had their passage cut to fit the row, and the first few ids: reported by every stage that makes instances."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)

    def add(self, example_id: str) -> None:
        self.count += 1
        if len(self.first) < 3:
            self.first.append(example_id)

    def __str__(self) -> str:
        return f"{self.count} passages cut to fit the row" + (f" (first: {', '.join(self.first)})" if self.first else "")


@dataclasses.dataclass(frozen=True)
class InstanceMaker:
    """Turns (x, c, y) into ids for one LM: `bos? prompt target eos?`.

    `max_tokens` is the row length: a passage is cut from its end until the instance fits, prompt and target never are.
    """

    tokenizer: object  # data.tokenizer.Tokenizer
    max_tokens: int
    truncations: Truncations = dataclasses.field(default_factory=Truncations, compare=False)

    def prompt_ids(
        self, prompt: str, background: str | None, *, before: Sequence[str] = (), room_for: int = 0, example_id: str = ""
    ) -> list[int]:
        """Ids of `{before}Background: {background}\\n\\n{prompt}` (bos in front if the checkpoint's tokenizer has that convention).

        `before` holds in-context examples; the first of them are left out where all do not fit. Leaves `room_for` tokens of the row free.
        Raises InputError when even the bare prompt does not fit.
        """
        room = self.max_tokens - room_for
        ids = self._prompt(prompt, background, before)
        while len(ids) > room and before:
            before = before[1:]
            ids = self._prompt(prompt, background, before)
        if len(ids) <= room:
            return ids
        self.truncations.add(example_id)
        background_ids = self.tokenizer.encode(background) if background else []
        keep = len(background_ids)
        while len(ids) > room:
            if keep == 0:
                raise InputError(
                    f"{example_id or 'a prompt'}: {len(ids)} prompt tokens and {room_for} target tokens do not fit a row of "
                    f"{self.max_tokens}, even without a passage"
                )
            keep = max(0, keep - (len(ids) - room))
            ids = self._prompt(prompt, self.tokenizer.decode(background_ids[:keep]).rstrip("\ufffd"))
        return ids

    def bare_prompt_ids(self, prompt: str) -> list[int]:
        """Ids of the prompt without a passage, however long."""
        return self._prompt(prompt, None)

    def target_ids(self, target: str) -> list[int]:
        """Ids of y, tokenized on its own."""
        return self.tokenizer.encode(target)

    def instance(self, example_id: str, prompt: str, background: str | None, target: str, *, close: bool) -> Instance:
        """One row: prompt then target; `close` appends eos to the output (LM-ft), scoring leaves it out (Eq. 4 is p of y's own tokens)."""
        target_ids = self.target_ids(target) + ([self.tokenizer.eos_id] if close else [])
        if not target_ids:
            raise InputError(f"{example_id}: the target {target!r} has no tokens")
        prompt_ids = self.prompt_ids(prompt, background, room_for=len(target_ids), example_id=example_id)
        return Instance(example_id, np.asarray(prompt_ids + target_ids, np.int32), len(prompt_ids))

    def _prompt(self, prompt: str, background: str | None, before: Sequence[str] = ()) -> list[int]:
        ids = self.tokenizer.encode("".join(before) + background_prompt(background, prompt))
        first = self.tokenizer.bos_id if self.tokenizer.add_bos else None
        if first is None and not ids:  # an empty prompt still needs a token to predict from
            first = self.tokenizer.eos_id
        return ids if first is None else [first, *ids]
