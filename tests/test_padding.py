"""How many rows a call takes: what waits is computed with little padding, in few shapes."""

from __future__ import annotations

import numpy as np
import pytest

from radit_jax.data.padding import ALIKE, LEAST_TOKENS, bucket, longer, rows_of_call, whole_line


def calls(sizes: list[int], tokens: int) -> list[tuple[int, int, int]]:
    """(rows, length, tokens that are there) of every call until nothing waits."""
    found, left = [], sorted(sizes, reverse=True)
    while left:
        length = bucket(left[0], parts=8)
        rows = rows_of_call(left[: tokens // length], length, tokens // length, "cpu")
        found.append((rows, length, sum(left[:rows])))
        left = left[rows:]
    return found


@pytest.mark.parametrize(
    ("sizes", "length", "most", "expected"),
    [
        ([64] * 32, 64, 32, 32),
        ([64] * 24, 64, 32, 32),  # three quarters full
        ([64] * 23, 64, 32, 16),
        ([64] * 3 + [20] * 29, 64, 32, 4),  # the short ones wait for a shorter call
        ([64] * 1, 64, 32, 4),  # and no call is smaller than it pays
        ([64] * 1, 64, 3, 3),
    ],
)
def test_a_call_has_rows_that_are_about_as_long(sizes, length, most, expected):
    assert rows_of_call(sizes, length, most, "cpu") == expected
    assert rows_of_call(sizes, length, most, "gpu") == most  # there another shape costs more than padding


def test_all_are_computed_once_with_little_padding_in_few_shapes():
    sizes = np.random.default_rng(0).geometric(1 / 50, 400).clip(8, 400).tolist()
    found = calls(sizes, 2048)
    assert sum(tokens for *_, tokens in found) == sum(sizes)
    computed = sum(rows * length for rows, length, _ in found)
    assert computed <= 1.25 * sum(sizes)
    assert all(rows * length <= 2048 for rows, length, _ in found)
    whole = [2048 // length * length for _, length, _ in found]
    assert computed < 0.8 * sum(whole)  # what calls of one size would compute
    assert len({(rows, length) for rows, length, _ in found}) <= len(found) and 0 < ALIKE < 1 < LEAST_TOKENS


def test_a_whole_line_is_the_longest_that_no_bucket_pads():
    for tokens in range(64, 4097):
        line = whole_line(tokens)
        assert line == bucket(line, smallest=64) <= tokens < longer(line)
    assert whole_line(1) == 64
