"""Several threads make what one does: every item once, the same numbers, and an end for all when one fails."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
import tiny

from radit_jax import sharding, streams
from radit_jax.inference.ensemble import Ensemble, Prompted
from radit_jax.inference.score import Scorer
from radit_jax.retrieval import embed, encode
from radit_jax.types import Instance

WAIT_S = 30  # for another thread: only a broken one takes so long


def test_every_item_comes_once_and_those_of_a_part_in_their_order():
    found = list(streams.merged([range(0, 50), range(100, 130), ()]))
    assert sorted(found) == [*range(50), *range(100, 130)]
    for low, high in ((0, 50), (100, 130)):
        own = [n for n in found if low <= n < high]
        assert own == sorted(own)
    assert list(streams.merged([])) == [] and list(streams.merged([[1, 2]])) == [1, 2]


def test_parts_are_read_at_the_same_time():
    both = threading.Barrier(2, timeout=WAIT_S)

    def part(n):
        both.wait()  # broken, if the other is not there
        yield n

    assert sorted(streams.merged([part(0), part(1)])) == [0, 1]


def test_one_part_is_read_here():
    assert list(streams.merged([(threading.current_thread() for _ in range(1))])) == [threading.current_thread()]


@pytest.mark.parametrize("failed", [ValueError("bad"), KeyboardInterrupt()])
def test_what_a_part_raises_ends_the_others(failed):
    begun, read = threading.Event(), []

    def fails():
        begun.wait(WAIT_S)
        yield 0
        raise failed

    def endless():
        for n in itertools.count():
            begun.set()
            read.append(n)
            yield n

    with pytest.raises(type(failed)):
        for _ in streams.merged([fails(), endless()]):
            pass
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_who_stops_reading_ends_the_parts():
    reading = streams.merged([itertools.count(), itertools.count()])
    next(reading)
    reading.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stream")]


def test_a_shared_iterator_gives_every_item_to_one():
    shared = streams.Shared(iter(range(1000)))
    assert sorted(streams.merged([shared, shared, shared])) == list(range(1000))


def test_a_mesh_of_several_devices_has_one_stream(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert streams.count(sharding.make_mesh(1, 1)) == streams.MOST
    assert streams.count(sharding.make_mesh(2, 1)) == streams.count(sharding.make_mesh(1, 2)) == 1
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    assert streams.count(sharding.make_mesh(1, 1)) == 1


# -- what they make ---------------------------------------------------------------------------------------------------------------------


def by_count(monkeypatch, make):
    """What `make` gives with one stream and with two."""
    found = []
    for count in (1, 2):
        monkeypatch.setattr(streams, "count", lambda mesh, count=count: count)
        found.append(make())
    return found


def test_vectors_are_the_same_bit_for_bit(monkeypatch):
    (graphdef, params), mesh, threads = tiny.parts(tiny.encoder()), sharding.make_mesh(1, 1), set()
    run = encode.on_mesh(graphdef, mesh)

    def encoded(*texts):
        threads.add(threading.current_thread())
        return run(params, *texts)

    texts = [" ".join(tiny.WORDS[: 1 + n % 6]) + str(n) for n in range(60)]
    sizes = {"batch_tokens": 32, "max_tokens": 30}
    one, two = by_count(monkeypatch, lambda: embed.embed_queries(encoded, tiny.tokenizer(), texts, **sizes, mesh=mesh))
    np.testing.assert_array_equal(one, two)
    assert threading.current_thread() in threads and len(threads) > 1


def test_scores_are_the_same_bit_for_bit(monkeypatch):
    rng = np.random.default_rng(0)
    instances = [Instance(f"i{n}", rng.integers(2, len(tiny.PIECES), 20 + n % 30), 15) for n in range(40)]

    def make():
        scorer = Scorer(tiny.lm(), batch_tokens=150)
        return scorer(instances), scorer.facts()

    (one_N, facts), (two_N, others) = by_count(monkeypatch, make)
    np.testing.assert_array_equal(one_N, two_N)
    assert facts == others and facts["compiles"] > 1


@pytest.mark.parametrize("level", ["sequence", "token"])
def test_answers_are_the_same(monkeypatch, level):
    rng = np.random.default_rng(1)
    logw_K = np.log(np.asarray([0.5, 0.3, 0.2], np.float32))
    asked = [Prompted(f"q{n}", tuple(rng.integers(2, len(tiny.PIECES), 8 + (n + k) % 20) for k in range(3)), logw_K) for n in range(17)]

    def make():
        ensemble = Ensemble(tiny.lm(), tiny.maker(), batch_tokens=200, max_new_tokens=5)
        told = []
        answers = ensemble.generate(asked, level=level, advance=told.append)
        assert sum(told) == len(asked)
        return answers, ensemble.choose(asked, [[[5, 6], [7]]] * len(asked)), ensemble.facts()

    (one, chosen, facts), (two, others, same_facts) = by_count(monkeypatch, make)
    assert [answer.text for answer in one] == [answer.text for answer in two] and facts == same_facts
    np.testing.assert_allclose([answer.logprob for answer in one], [answer.logprob for answer in two], atol=1e-5)
    np.testing.assert_allclose(np.stack(chosen), np.stack(others), atol=1e-5)
