"""Texts that are there twice, by content hash: against a dict of all of them."""

import random

import pytest

from radit_jax.retrieval.distinct import Distinct


@pytest.mark.parametrize("every", [1, 7, 1_000])
def test_the_first_row_of_a_text_is_what_a_dict_of_all_says(every):
    draw = random.Random(0)
    texts = [str(draw.randrange(150)) for _ in range(500)]
    distinct, rows, found, wanted = Distinct(), {}, [], []
    for row, text in enumerate(texts):
        found.append(distinct.first(row, text))
        wanted.append(rows.setdefault(text, row))
        if row % every == every - 1:
            distinct.settle()
    assert found == wanted and len(set(wanted)) < len(wanted)
