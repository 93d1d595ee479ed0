"""Sorting in buckets is sorting at once."""

from __future__ import annotations

import numpy as np
import pytest

from radit_jax.data import id_index


@pytest.fixture(scope="module")
def parts():
    """Hashes over all 64 bits, each of the last part also in the first, with their rows."""
    rng = np.random.default_rng(0)
    hashes = [rng.integers(0, 2**64, size, dtype=np.uint64) for size in (400, 0, 300)]
    hashes.append(hashes[0][:50])
    rows = np.split(np.arange(750), np.cumsum([len(part) for part in hashes])[:-1])
    return [dict(zip(("hashes", "rows"), id_index.sorted_part(h.tolist(), r.tolist()))) for h, r in zip(hashes, rows)]


@pytest.mark.parametrize("bucket", [10_000, 100, 7])
def test_the_merged_index_is_sorted_and_equals_keep_their_order(parts, tmp_path, monkeypatch, bucket):
    monkeypatch.setattr(id_index, "BUCKET", bucket)
    sizes = []
    save_chunks = id_index.save_chunks

    def watched(path, dtype, count, chunks):
        save_chunks(path, dtype, count, (sizes.append(len(chunk)) or chunk for chunk in chunks))

    monkeypatch.setattr(id_index, "save_chunks", watched)
    id_index.merge(lambda name, i: parts[i][name], len(parts), tmp_path)
    hashes, rows = np.load(tmp_path / "hashes.npy"), np.load(tmp_path / "rows.npy")
    both = {name: np.concatenate([part[name] for part in parts]) for name in ("hashes", "rows")}
    order = np.argsort(both["hashes"], kind="stable")
    np.testing.assert_array_equal(hashes, both["hashes"][order])
    np.testing.assert_array_equal(rows, both["rows"][order])
    assert max(sizes) <= max(3 * bucket, 20)  # no more than a bucket at a time; buckets are even only on average
    pairs = list(id_index.equal_neighbours(hashes))
    assert pairs == np.flatnonzero(hashes[1:] == hashes[:-1]).tolist() and len(pairs) == 50
    assert all(rows[at] < 400 and rows[at + 1] >= 700 for at in pairs)
