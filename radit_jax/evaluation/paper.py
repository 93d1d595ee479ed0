"""The paper's results (SPEC section 8), to print beside ours: 65B, test sets, in percent."""

from __future__ import annotations

from collections.abc import Mapping

_KNOWLEDGE = ("mmlu", "nq", "tqa", "eli5", "hotpotqa", "fever", "aida", "zsre", "trex", "wow")
_COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "obqa")


def _rows(columns: tuple[str, ...], figures: Mapping[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {name: dict(zip(columns, row, strict=True)) for name, row in figures.items()}


# By the number of in-context examples, then by system.
ROWS: dict[int, dict[str, dict[str, float]]] = {
    0: _rows(
        _KNOWLEDGE,
        {
            "LLaMA 65B": (51.2, 5.2, 55.8, 19.5, 12.5, 59.3, 0.6, 6.7, 1.3, 15.6),
            "LLaMA 65B, retrieval": (59.7, 28.8, 72.6, 19.1, 32.0, 73.3, 41.8, 50.8, 36.3, 16.1),
            "RA-DIT 65B": (64.6, 35.2, 75.4, 21.2, 39.7, 80.7, 45.1, 73.7, 53.1, 16.4),
        },
    ),
    5: _rows(
        _KNOWLEDGE,
        {
            "LLaMA 65B": (63.4, 31.6, 71.8, 22.1, 22.6, 81.5, 48.2, 39.4, 52.1, 17.4),
            "LLaMA 65B, retrieval": (64.4, 42.3, 74.9, 22.8, 41.1, 89.4, 46.4, 60.4, 68.9, 16.8),
            "RA-DIT 65B": (64.9, 43.9, 75.1, 23.2, 40.7, 90.7, 55.8, 72.4, 68.4, 17.3),
        },
    ),
}
COMMONSENSE = _rows(
    _COMMONSENSE,
    {
        "LLaMA 65B": (85.3, 82.8, 52.3, 84.2, 77.0, 78.9, 56.0, 60.2),
        "RA-DIT 65B": (86.7, 83.7, 57.9, 85.1, 79.8, 83.7, 60.5, 58.8),
    },
)


def rows(shots: int) -> dict[str, dict[str, float]]:
    """{system: {task: percent}} of the paper with this many in-context examples; commonsense without any."""
    found = {name: dict(row) for name, row in ROWS.get(shots, {}).items()}
    for name, row in COMMONSENSE.items() if shots == 0 else ():
        found.setdefault(name, {}).update(row)
    return found
