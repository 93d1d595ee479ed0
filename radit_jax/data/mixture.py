"""Which set the next example comes from (paper appendix: sizes capped at η, fixed shares for some sets, the rest by size)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grain

from radit_jax.errors import InputError


def shares(sizes: Mapping[str, int], *, fixed: Mapping[str, float] | None = None, cap: int = 7_500) -> dict[str, float]:
    """Share of draws of each set: `fixed` as given, the others divide the rest in proportion to min(size, cap); the paper's η is 7,500."""
    fixed = dict(fixed or {})
    if unknown := set(fixed) - set(sizes):
        raise InputError(f"mixture names {', '.join(sorted(unknown))}, expected one of {', '.join(sizes)}")
    if empty := [name for name, size in sizes.items() if size == 0]:
        raise InputError(f"mixture: {', '.join(empty)} has no examples")
    free = {name: min(size, cap) for name, size in sizes.items() if name not in fixed}
    rest = 1.0 - sum(fixed.values())
    if rest < -1e-9 or (not free and abs(rest) > 1e-9):
        raise InputError(f"mixture: the fixed shares sum to {sum(fixed.values()):g}, expected {'1' if not free else 'at most 1'}")
    total = sum(free.values())
    return {name: fixed[name] if name in fixed else rest * free[name] / total for name in sizes}


TEXT = "text"  # the name of plain text among the sets


def lm_ft_shares(sizes: Mapping[str, int], dialogues: Sequence[str], *, cap: int, dialogue: float, text: float) -> dict[str, float]:
    """Shares of LM-ft (SPEC section 3): `text` for plain text, `dialogue` for the dialogue sets together, the rest by capped size.

    Where there are dialogue sets alone, they get all that plain text leaves.
    """
    capped = {name: min(sizes[name], cap) for name in dialogues}
    of_dialogues = dialogue if len(dialogues) < len(sizes) else 1.0 - text
    fixed = {name: of_dialogues * size / sum(capped.values()) for name, size in capped.items()}
    if not text:
        return shares(sizes, fixed=fixed, cap=cap)
    return shares({**sizes, TEXT: 1}, fixed={**fixed, TEXT: text}, cap=cap)


def mix(sets: Sequence[grain.MapDataset], weights: Sequence[float], *, seed: int) -> grain.MapDataset:
    """Endless mixture: each set is shuffled anew in every epoch and repeated, then drawn from by its weight. Deterministic by seed."""
    endless = [dataset.shuffle(seed=seed + i).repeat() for i, dataset in enumerate(sets)]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights=list(weights))
