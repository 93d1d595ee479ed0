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


def mix(sets: Sequence[grain.MapDataset], weights: Sequence[float], *, seed: int) -> grain.MapDataset:
    """Endless mixture: each set is shuffled anew in every epoch and repeated, then drawn from by its weight. Deterministic by seed."""
    endless = [dataset.shuffle(seed=seed + i).repeat() for i, dataset in enumerate(sets)]
    return endless[0] if len(endless) == 1 else grain.MapDataset.mix(endless, weights=list(weights))
