"""R-ft as a stage, in the ways that the paper compares: both encoders, completion alone, questions over the texts of their own set."""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from torture import FIELDS, export_models

from configs import common
from radit_jax import inputs, sharding, trainings
from radit_jax.errors import InputError
from radit_jax.inputs import with_fields
from radit_jax.models.encoder import DualEncoder
from radit_jax.pipeline import Pipeline
from radit_jax.training import batches, steps, tune
from radit_jax.training.losses import LsrOptions
from radit_jax.training.optim import make_optimizer

MODEL_FIELDS = {"lm.checkpoint": "lm", "retriever.query_encoder": "encoder", "retriever.document_encoder": "encoder"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    models = export_models(tmp_path_factory.mktemp("models"))
    fields = FIELDS | {field: str(models / name) for field, name in MODEL_FIELDS.items()}
    return with_fields(common.base(), fields | {"lsr_ft.completion_share": 0.0})


def dual_source(width: int = 16) -> batches.LsrSource:
    return dataclasses.replace(tiny.lsr_source(), read_passages=trainings.passage_reader(tiny.tokenizer(), width))


@pytest.mark.parametrize("line", [False, True])
def test_a_step_of_both_encoders_embeds_the_passages_and_moves_both(line):
    batch, _ = next(batches.lsr_batches({"train": dual_source(width=32)}, shares={"train": 1.0}, batch=4, seed=0, line=line))
    assert (batch.passage_indices_N is not None) == line
    options, mesh = LsrOptions(score_scale=5.0), tiny.mesh(1, 1)
    graphdef, params = tiny.parts(DualEncoder(*(nnx.merge(*tiny.parts(tiny.encoder())) for _ in range(2))))
    before = tiny.leaves(params)
    tx = make_optimizer(tiny.OPTIMIZER, tiny.STEPS)
    state, step = steps.begin(steps.lsr_step, graphdef, tx, params, mesh, sharding.ENCODER_RULES, options=options)
    state, metrics = step(state, batch)

    encoder, batch = tiny.encoder(), jax.tree.map(lambda leaf: leaf[0], batch)
    B, K, T = batch.passage_tokens_BxKxT.shape
    embedded = encoder(jnp.asarray(batch.passage_tokens_BxKxT.reshape(B * K, T)), jnp.asarray(batch.passage_mask_BxKxT.reshape(B * K, T)))
    queries = encoder(jnp.asarray(batch.query_tokens_BxT), jnp.asarray(batch.query_mask_BxT))
    expected, _ = steps.lsr_objective(queries, batch, options, embedded.reshape(B, K, -1))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    stored, _ = steps.lsr_objective(queries, batch, options)
    assert abs(float(stored) - float(expected)) > 1e-3  # the stored vectors are not read

    moved = {path for path, array in tiny.leaves(state.params).items() if not np.array_equal(array, before[path])}
    assert {f"{side}/blocks/attention/q/kernel" for side in ("query", "document")} <= moved


@pytest.mark.parametrize("line", [False, True])
def test_a_batch_in_parts_makes_the_same_step(line):
    """Also where a part has shorter rows, so that its line is not full."""
    options, mesh = LsrOptions(score_scale=5.0, anchor=0.1), tiny.mesh(1, 1)
    tx, found = make_optimizer(tiny.OPTIMIZER, tiny.STEPS), []
    for parts in (1, 2, 4):
        data = batches.lsr_batches({"train": dual_source()}, shares={"train": 1.0}, batch=8, parts=parts, seed=0, line=line)
        graphdef, params = tiny.parts(DualEncoder(*(nnx.merge(*tiny.parts(tiny.encoder())) for _ in range(2))))
        state, step = steps.begin(steps.lsr_step, graphdef, tx, params, mesh, sharding.ENCODER_RULES, options=options)
        for batch, _ in itertools.islice(data, 2):
            assert batch.weights_B.shape == (parts, 8 // parts)
            state, metrics = step(state, batch)
        found.append((tiny.leaves(state.params), metrics))
    (whole, expected), *others = found
    for params, metrics in others:
        chex.assert_trees_all_close(metrics, expected, rtol=1e-4)
        chex.assert_trees_all_close(params, whole, atol=2e-5)


def test_a_batch_has_as_few_parts_as_it_may():
    one, two = (tiny.mesh(data, 1) for data in (1, 2))

    def of(batch: int, at_once: int):
        return with_fields(common.base(), {"lsr_ft.batch": batch, "lsr_ft.at_once": at_once}).lsr_ft

    assert [tune.lsr_parts(of(32, at_once), one) for at_once in (0, 64, 32, 8, 7, 1)] == [1, 1, 1, 4, 8, 32]
    assert tune.lsr_parts(of(6, 4), one) == 2 and tune.lsr_parts(of(7, 4), one) == 7
    assert tune.lsr_parts(of(6, 1), two) == 3  # a question a device
    with pytest.raises(InputError, match="lsr_ft.batch: a batch of 7 rows does not divide"):
        tune.lsr_parts(of(7, 4), two)


def test_the_document_encoder_gets_the_gradient_of_the_loss():
    batch, _ = next(batches.lsr_batches({"train": dual_source()}, shares={"train": 1.0}, batch=4, seed=0))
    batch, options = jax.tree.map(lambda leaf: leaf[0], batch), LsrOptions(score_scale=5.0)
    B, K, _ = batch.passage_tokens_BxKxT.shape
    rng = np.random.default_rng(0)
    queries, passages, direction = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((B, 8), (B, K, 8), (B, K, 8)))

    def loss(passages):
        return steps.lsr_objective(queries, batch, options, passages)[0]

    slope = jnp.vdot(jax.grad(loss)(passages), direction)
    step = 1e-3
    np.testing.assert_allclose(slope, (loss(passages + step * direction) - loss(passages - step * direction)) / (2 * step), rtol=2e-2)
    assert abs(float(slope)) > 1e-2


def test_with_both_encoders_tuned_the_corpus_is_embedded_anew_and_searched_there(config, tmp_path):
    pipeline = Pipeline(with_fields(config, {"lsr_ft.encoders": "both", "lsr_ft.optimizer.peak_lr": 1e-2}), tmp_path)
    artifact, found = pipeline.retrieved("test", pipeline.test_examples, 3, tuned=True)
    assert {path.name.rpartition("-")[0] for path in tmp_path.glob("vectors*")} == {"vectors", "vectors-tuned"}
    queries = pipeline.embed_queries(tuned=True)([example.query for example in pipeline.test_examples])
    vectors = np.asarray(pipeline.searcher_of(tuned=True).vectors[np.arange(len(pipeline.store))], np.float32)
    assert np.abs(vectors - np.asarray(pipeline.vectors[np.arange(len(pipeline.store))], np.float32)).max() > 1e-3
    for query, member in zip(queries, found):
        np.testing.assert_allclose(member.scores_K, np.sort(vectors @ query)[::-1][:3], atol=1e-5)
    untuned = Pipeline(config, tmp_path)
    assert untuned.retrieved("test", untuned.test_examples, 3, tuned=True)[0].path != artifact.path
    assert untuned.searcher_of(tuned=True) is untuned.searcher  # of the query encoder alone: the index stays


def test_completion_alone_is_trained_on_and_the_questions_choose_the_checkpoint(config, tmp_path):
    fields = {"lsr_ft.completion_share": 1.0, "lsr_ft.validation": 0.5}
    facts = Pipeline(with_fields(config, fields), tmp_path).tuned_retriever.facts
    assert facts["questions"] == 0 and facts["held_out"] > 0 and "best_mrr" in facts
    completions = config.lsr_ft.completion_examples
    assert facts["planned_steps"] == facts["steps"] == round(config.lsr_ft.epochs * completions / config.lsr_ft.batch)


def test_wrong_encoders_are_named(config, tmp_path):
    with pytest.raises(InputError, match="lsr_ft.encoders is 'document', expected query or both"):
        Pipeline(with_fields(config, {"lsr_ft.encoders": "document"}), tmp_path).tuned_retriever  # noqa: B018


# -- a corpus of a set's own texts --------------------------------------------------------------------------------------------------------


def pubmed_file(path: Path, count: int = 6) -> Path:
    decisions = ("yes", "no", "maybe")
    texts = [f"We gave {word} to ten. It helped. " * 3 for word in tiny.WORDS[:count]]
    records = {
        str(n): {
            "QUESTION": f"Does {tiny.WORDS[n]} help?",
            "CONTEXTS": [text],
            "LONG_ANSWER": "It did.",
            "final_decision": decisions[n % 3],
        }
        for n, text in enumerate(texts)
    }
    path.write_bytes(gzip.compress(json.dumps(records).encode()))
    return path


def test_the_texts_of_a_set_are_a_corpus_in_which_its_questions_find_their_own(config, tmp_path):
    source = f"pubmed_qa:{pubmed_file(tmp_path / 'ori_pqal.json.gz')}"
    fields = {"corpus.source": f"contexts:{source}", "corpus.max_words": 6, "train.source": f"{source}[2:]", "test.source": f"{source}[:2]"}
    pipeline = Pipeline(with_fields(config, fields), tmp_path / "run")
    assert [example.gold_id for example in pipeline.test_examples] == ["0", "1"] and len(pipeline.train_examples) == 4
    assert all(example.background is None and example.retrieve for example in pipeline.train_examples + pipeline.test_examples)
    documents = {pipeline.store.document_id(row, pipeline.store[row]) for row in range(len(pipeline.store))}
    assert documents == {str(n) for n in range(6)} and len(pipeline.store) > 6


def test_a_set_without_texts_is_no_corpus(tmp_path):
    (tmp_path / "asked.jsonl").write_text('{"question": "who?", "answers": ["moss"]}\n')
    with pytest.raises(InputError, match="the questions of asked have no texts that they are asked about"):
        inputs.contexts(f"contexts:{tmp_path / 'asked.jsonl'}", 0)
