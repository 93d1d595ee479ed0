"""What reads input, given nearly anything: it returns a value or raises an InputError of one line; never anything else, and in bounds.

    RADIT_FUZZ=10000 python -m pytest tests/test_fuzz.py      (without: a few cases, always the same)

No case may take longer than SECONDS, hold more than MEMORY, or write beside the folder it was given.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import signal
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from absl import flags
from asgi import request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import config_flags
from pdfs import pdf
from processes import ROOT
from safetensors.numpy import save

from radit_jax import command, inputs, web
from radit_jax.data import corpus, prompts, training_sets
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecords, json_lines
from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.types import Passage
from radit_jax.weights.gguf import GgufFile, config_from_gguf
from radit_jax.weights.hf import Safetensors, read_json, resolve
from radit_jax.weights.lm import config_from_hf, load_lm

CASES = int(os.environ.get("RADIT_FUZZ", "25"))
SECONDS = 20
MEMORY = 64 << 20
LONGEST = 2_000  # characters of a message
KINDS = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
fuzzed = settings(
    max_examples=CASES,
    derandomize="RADIT_FUZZ" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(autouse=True)
def no_hang():
    def late(number: int, frame: Any) -> None:
        raise AssertionError(f"a case took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    logging.disable(logging.WARNING)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    logging.disable(logging.NOTSET)


def value_or_input_error(call: Callable[[], Any], given_name: str = "") -> Any:
    """What `call` returns, or None where it raises an InputError; anything else that it raises fails the test.

    The message is one line, and short but for a name that a person gave.
    """
    signal.alarm(SECONDS)
    try:
        return call()
    except InputError as error:
        said = str(error)
        assert said.strip() and len(said.splitlines()) == 1 and len(said) < LONGEST + 2 * len(given_name), said
        return None
    finally:
        signal.alarm(0)


def within_memory(call: Callable[[], Any]) -> Any:
    """The same, which may not allocate more than MEMORY."""
    tracemalloc.start()
    try:
        found = value_or_input_error(call)
        peak = tracemalloc.get_traced_memory()[1]
        assert peak < MEMORY, f"{peak:,} bytes were allocated"
        return found
    finally:
        tracemalloc.stop()


@contextlib.contextmanager
def folder_of(**files: bytes) -> Iterator[Path]:
    """A folder `in` with these files, in a folder where nothing else may appear; "__" in a name stands for its dot."""
    with tempfile.TemporaryDirectory() as name:
        inside = Path(name, "in")
        inside.mkdir()
        for file, content in files.items():
            (inside / file.replace("__", ".")).write_bytes(content)
        yield inside
        assert [path.name for path in Path(name).iterdir()] == ["in"]


# -- what files hold -----------------------------------------------------------------------------------------------------------------

FIELDS = ("id", "_id", "title", "text", "section", "question", "answers", "answer", "choices", "context", "reasoning", "history", "gold_id")
any_text = st.text(max_size=30)
half_pairs = st.text(st.characters(categories=["Cs", "L", "Zs", "Cc"]), max_size=8)  # lone surrogates among them
any_value = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.integers(-(2**70), 2**70), st.floats(), any_text, half_pairs),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS) | any_text, inner, max_size=4),
    max_leaves=8,
)
any_record = st.dictionaries(st.sampled_from(FIELDS) | any_text, any_value, max_size=6)
near_document = st.fixed_dictionaries(
    {"id": any_text | st.integers() | half_pairs, "title": any_text, "text": any_text | half_pairs}, optional={"section": any_value}
)
near_question = st.fixed_dictionaries(
    {"question": any_text, "answers": st.lists(any_text | any_value, max_size=3)},
    optional={name: any_value | any_text for name in ("id", "context", "choices", "history", "reasoning", "gold_id")},
)


def line_of(record: Any) -> bytes:
    return json.dumps(record).encode() + b"\n"


any_line = st.one_of(
    st.binary(max_size=40), (any_record | near_document | near_question).map(line_of), st.just(b"[" * 3_000), st.just(b"\n")
)
any_jsonl = st.lists(any_line, max_size=6).map(b"".join)


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """`whole`, cut short, with bytes or numbers written over it, or with bytes between."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(("cut", "byte", "bytes", "32", "64", "insert")))
        if how == "cut":
            del data[at:]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=9))
        else:
            number = draw(st.sampled_from((0, 1, 2**31, 2**32 - 1, 2**60, 2**63, 2**64 - 1)))
            new = {"32": struct.pack("<I", number % 2**32), "64": struct.pack("<Q", number)}.get(how)
            new = draw(st.binary(min_size=1, max_size=1 if how == "byte" else 9)) if new is None else new
            data[at : at + len(new)] = new
    return bytes(data)


def maybe_zipped(data: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(data, data.map(gzip.compress), data.map(gzip.compress).flatmap(damaged))


# -- readers -------------------------------------------------------------------------------------------------------------------------


@fuzzed
@given(maybe_zipped(any_jsonl), st.integers(0, 3))
def test_jsonl_records(data, most):
    with folder_of(a__jsonl=data) as folder:
        value_or_input_error(lambda: list(json_lines(folder / "a.jsonl", lambda record: record, BadRecords(most))))


@fuzzed
@given(st.lists(near_document.map(line_of) | any_line, max_size=6).map(b"".join), st.sampled_from(("jsonl", "tsv")), st.integers(0, 6))
def test_a_corpus_becomes_passages(data, suffix, most):
    if suffix == "tsv":
        data = b"id\ttext\ttitle\n" + data.replace(b"{", b"\t").replace(b",", b"\t")
    with folder_of(**{f"a__{suffix}": data}) as folder:
        (folder / "store").mkdir()

        def build() -> list[Passage]:
            corpus.build_store(corpus.documents(folder / f"a.{suffix}", most), folder / "store", max_words=5)
            return list(corpus.PassageStore(folder / "store"))

        for passage in value_or_input_error(build) or ():
            assert passage.text.strip() and len(passage.text.split()) <= 5


HTML = "<html><head><title>T</title></head><body><article><p>Some words.</p><table><tr><td>1</td></tr></table></article></body></html>"
PDF = pdf([["Some words."], ["More of them."]], title="T")


@fuzzed
@given(st.binary(max_size=60), damaged(HTML.encode()), damaged(PDF), any_text.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_a_folder_of_files(plain, html, pdf_file, markdown):
    with folder_of(a__txt=plain, b__html=html, c__pdf=pdf_file, d__md=markdown) as folder:
        for document in value_or_input_error(lambda: list(corpus.documents(folder, 4))) or ():
            assert document.id and document.title.encode() and document.text.encode().strip()


@fuzzed
@given(
    maybe_zipped(st.lists(near_question.map(line_of) | any_line, max_size=6).map(b"".join) | any_value.map(line_of)),
    st.sampled_from(("jsonl", "json", "csv", "tsv", "jsonl.gz", "csv.gz", "parquet")),
    st.sampled_from(("", *sorted(training_sets.CARDS))),
    st.integers(0, 6),
)
def test_questions_become_examples(data, suffix, name, most):
    with folder_of(**{f"a__{suffix}": data}) as folder:

        def load() -> list[Any]:
            card = training_sets.card_for(f"{name}:{folder / f'a.{suffix}'}" if name else str(folder / f"a.{suffix}"))
            questions = training_sets.load_questions(card, max_bad_records=most)
            return card.training_examples(questions, 0) + card.evaluation_examples(questions)

        for example in value_or_input_error(load) or ():
            assert example.id and example.target.startswith(" ")


@fuzzed
@given(any_text, st.sampled_from(("", "~", "~no-such-user/", "tfds:", "hub:", "a" * 5000, "\0", "invented:passages=")), any_value)
def test_names_of_sources_and_checkpoints(text, start, value):
    name = start + text
    with folder_of():
        value_or_input_error(lambda: corpus.documents(name), name)  # not read: a name may be that of a folder here
        value_or_input_error(lambda: training_sets.card_for(name), name)
        value_or_input_error(lambda: training_sets.card_for(f"gsm8k:{name}"), name)
        value_or_input_error(lambda: inputs.invented(f"invented:passages={value}"))
        if start in ("~no-such-user/", "a" * 5000, "\0"):
            value_or_input_error(lambda: resolve(name), name)


# -- prompts -------------------------------------------------------------------------------------------------------------------------

said = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@fuzzed
@given(
    st.builds(
        Question,
        id=said,
        question=said,
        answers=st.lists(said, min_size=1, max_size=3).map(tuple),
        context=st.none() | said,
        choices=st.lists(said, max_size=30).map(tuple),
        reasoning=st.none() | said,
        history=st.lists(said, max_size=3).map(tuple),
    ),
    st.sampled_from(sorted(prompts.TRAINING_PROMPTS)),
    st.sampled_from((*prompts.RETRIEVAL_RULES, "another")),
    st.none() | said,
    st.lists(said, max_size=3).map(tuple),
    st.integers(1, 120),
)
def test_prompts_fit_their_row(question, category, rule, background, before, room):
    example = value_or_input_error(lambda: prompts.training_example(question, seed=0, category=category, rule=rule))
    value_or_input_error(lambda: prompts.evaluation_example(question, rule=rule))
    if example is None:
        return
    maker = tiny.maker(room)
    instance = value_or_input_error(lambda: maker.instance("one", example.prompt, background, example.target, close=True))
    ids = value_or_input_error(lambda: maker.prompt_ids(example.prompt, background, before=before))
    assert instance is None or 0 < instance.target_start < len(instance.tokens_T) <= room
    assert ids is None or 0 < len(ids) <= room


@fuzzed
@given(said, said, st.integers(1, 20), st.integers(1, 20), st.none() | st.integers(0, 40))
def test_completions_are_parts_of_their_passage(title, text, n_prompt, n_target, least):
    passage = Passage("p", title, text)
    how = {"n_prompt": n_prompt, "n_target": n_target, "min_tokens": least}
    example = value_or_input_error(lambda: prompts.completion_example(passage, tiny.tokenizer(), **how))
    if example is not None:
        whole = " ".join(passage.content.split())
        assert whole.startswith(example.prompt) and whole.endswith(example.target.strip()) and example.exclude == ("p",)


# -- checkpoints ---------------------------------------------------------------------------------------------------------------------


def whole_gguf() -> bytes:
    """A decoder of one layer with its tokenizer."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        writer = gguf.GGUFWriter(Path(folder, "a.gguf"), "llama")
        for add, value in (
            (writer.add_block_count, 1),
            (writer.add_embedding_length, 8),
            (writer.add_head_count, 2),
            (writer.add_head_count_kv, 1),
            (writer.add_feed_forward_length, 12),
            (writer.add_context_length, 32),
            (writer.add_layer_norm_rms_eps, 1e-5),
            (writer.add_tokenizer_model, "gpt2"),
            (writer.add_token_list, ["a", "b", "ab", "<s>"]),
            (writer.add_token_merges, ["a b"]),
            (writer.add_token_types, [1, 1, 1, 3]),
            (writer.add_bos_token_id, 3),
        ):
            add(value)
        shapes = {"token_embd": (4, 8), "output_norm": (8,), "blk.0.attn_norm": (8,), "blk.0.ffn_norm": (8,)}
        shapes |= {"blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8), "blk.0.attn_output": (8, 8)}
        shapes |= {"blk.0.ffn_gate": (12, 8), "blk.0.ffn_up": (12, 8), "blk.0.ffn_down": (8, 12)}
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Path(folder, "a.gguf").read_bytes()


GGUF = whole_gguf()
HEADER = GGUF.index(b"blk.0.ffn_down") + 50


def read_gguf(path: Path) -> bool:
    file = GgufFile(path)
    for name in file.shapes:
        file.read(name)
    config_from_gguf(file, KINDS)
    return True


@fuzzed
@given(
    damaged(GGUF[:HEADER]).map(lambda header: header + GGUF[HEADER:])
    | damaged(GGUF)
    | st.binary(max_size=80).map(lambda rest: GGUF[:24] + rest)
)
def test_gguf_files(data):
    with folder_of(a__gguf=data) as folder:
        within_memory(lambda: read_gguf(folder / "a.gguf"))
        value_or_input_error(lambda: load_tokenizer(str(folder / "a.gguf")))


def test_the_whole_gguf_file_is_read():
    with folder_of(a__gguf=GGUF) as folder:
        assert read_gguf(folder / "a.gguf") and load_tokenizer(str(folder / "a.gguf")).encode("ab") == [2]
        assert load_lm(str(folder / "a.gguf")).config.layers == 1


@pytest.mark.parametrize("place", ("tensors", "fields", "list", "text", "shape"))
def test_a_header_that_claims_2_to_the_60_is_refused_at_once(place):
    key = struct.pack("<Q", 1) + b"k"
    counts = {"tensors": (2**60, 0), "fields": (0, 2**60), "shape": (1, 0)}.get(place, (0, 1))
    rest = {
        "list": key + struct.pack("<IIQ", 9, 4, 2**60),
        "text": key + struct.pack("<IQ", 8, 2**60),
        "shape": key + struct.pack("<IQIQ", 1, 2**60, 0, 0),
    }.get(place, b"")
    with folder_of(a__gguf=b"GGUF" + struct.pack("<IQQ", 3, *counts) + rest) as folder:
        within_memory(lambda: GgufFile(folder / "a.gguf"))
        with pytest.raises(InputError, match="truncated or not a GGUF file"):
            GgufFile(folder / "a.gguf")


TENSORS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros((0, 4), np.float16)}
PLAIN = save(TENSORS)
any_number = st.sampled_from((-1, 0, 1, 2, 2**31, 2**60, 2**64, 1.5, None, "3"))


@st.composite
def safetensors_file(draw) -> bytes:
    """A whole file, damaged; or a header of any shapes, offsets and types over the same bytes."""
    if draw(st.booleans()):
        return draw(damaged(PLAIN))
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(("F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "X9", 4)),
            "shape": st.lists(any_number, max_size=3),
            "data_offsets": st.lists(any_number, min_size=1, max_size=3),
        }
    )
    header = json.dumps(draw(st.dictionaries(st.sampled_from(("a", "b", "__metadata__")), entry | any_value, max_size=3))).encode()
    length = draw(st.sampled_from((len(header), len(header) + 1, 2**60, 2**64 - 1)))
    return struct.pack("<Q", length) + header + bytes(24)


def read_safetensors(folder: Path) -> bool:
    tensors = Safetensors(folder)
    for name in tensors.shapes:
        tensors.read(name)
    return True


@fuzzed
@given(safetensors_file())
def test_safetensors_files(data):
    with folder_of(model__safetensors=data) as folder:
        within_memory(lambda: read_safetensors(folder))


@fuzzed
@given(any_value | st.fixed_dictionaries({"weight_map": any_value | st.dictionaries(any_text, any_value | any_text, max_size=3)}))
def test_an_index_of_shards(value):
    with folder_of(a__safetensors=PLAIN) as folder:
        (folder / "model.safetensors.index.json").write_bytes(line_of(value))
        within_memory(lambda: read_safetensors(folder))


HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 4,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100.0,
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "sliding_window": None,
    "use_sliding_window": True,
    "layer_types": None,
    "max_window_layers": 0,
    "max_position_embeddings": 32,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
}
any_field_of_it = any_number | any_value | st.sampled_from(("mistral", "qwen2", "qwen3"))
changes = st.dictionaries(st.sampled_from(sorted(HF_CONFIG)), any_field_of_it, max_size=3)


@fuzzed
@given(changes | any_value)
def test_config_json(value):
    with folder_of() as folder:
        (folder / "config.json").write_bytes(line_of({**HF_CONFIG, **value} if isinstance(value, dict) else value))
        value_or_input_error(lambda: read_json(folder / "config.json"))
        within_memory(lambda: config_from_hf(folder / "config.json", KINDS))


def test_more_layers_than_tensors_are_refused_at_once():
    with folder_of(model__safetensors=PLAIN) as folder:
        (folder / "config.json").write_bytes(line_of({**HF_CONFIG, "num_hidden_layers": 90_000}))
        with pytest.raises(InputError, match="2 tensors, expected those of 90,000 layers"):
            load_lm(str(folder))


# -- POST /ask -----------------------------------------------------------------------------------------------------------------------

long_text = st.builds(lambda text, times: text * times, any_text, st.integers(0, 300))
near_turn = st.fixed_dictionaries({"role": st.sampled_from(("user", "assistant")) | any_text, "content": long_text | half_pairs})
by_turns = st.lists(long_text, max_size=6).map(
    lambda said: [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]
)
near_request = st.fixed_dictionaries(
    {"question": long_text | half_pairs | any_value},
    optional={"history": by_turns | st.lists(near_turn | any_value, max_size=4) | any_value},
)
any_body = st.one_of(
    near_request.map(line_of), any_value.map(line_of), near_request.map(line_of).flatmap(damaged), st.binary(max_size=40), any_line,
    st.integers(0, 2 * web.BODY).map(lambda size: b" " * size),
)  # fmt: skip
any_header = st.text(st.characters(codec="latin-1"), max_size=30)


def asks(method: str, body: bytes, **how: Any) -> tuple[int, list[Question]]:
    """Status of POST /ask (or another method), and the questions that it put to the models."""
    pytest.importorskip("starlette", reason="the page needs starlette (pip install -e '.[web]')")
    heard: list[Question] = []

    def answer(asked):
        heard.extend(asked)
        return [{"systems": {}} for _ in asked]

    app = web.make_app(answer)
    status, headers, content = within_memory(lambda: request(app, method, "/ask", body, **how))
    assert headers.items() >= web.HEADERS.items()
    if "json" in headers.get("content-type", ""):
        value = json.loads(content)
        assert set(value) == ({"systems"} if status == 200 else {"error"})
        said = value.get("error", "x")
        assert said.strip() and len(said.splitlines()) == 1 and len(said) < LONGEST
    assert len(heard) == (status == 200)
    return status, heard


@fuzzed
@given(any_body, st.integers(1_000, 1 << 16))
def test_bodies_of_requests_to_the_page(body, part):
    status, heard = asks("POST", body, part=part)
    assert status in (200, 400, 413)
    for question in heard:
        assert 0 < len(question.question) <= web.QUESTION and sum(map(len, question.history)) <= web.HISTORY
        "".join((question.question, *question.history)).encode()  # no half characters


@fuzzed
@given(st.sampled_from(("POST", "GET", "HEAD", "PUT")), any_header, any_header, st.booleans())
def test_headers_of_requests_to_the_page(method, kind, host, known):
    status, _ = asks(method, b'{"question": "moss?"}', kind=kind, host="localhost" if known else host)
    assert status in (200, 400, 405, 415)


# -- configs -------------------------------------------------------------------------------------------------------------------------

KNOWN = ("seed", "goal", "lm.dtype", "lm_ft.steps", "lm_ft", "lm_ft.optimizer.peak_lr", "corpus.source", "train", "lsr_ft.tau")
any_path = st.lists(st.sampled_from(("lm", "lm_ft", "steps", "", "__class__")), max_size=4).map(".".join)
any_field = st.sampled_from(KNOWN) | any_text | any_path
deep = st.sampled_from(("(" * 500, "[" * 500, "1e999"))
any_given = st.one_of(any_text, st.integers().map(str), st.floats().map(str), any_value.map(repr), deep)


@fuzzed
@given(st.lists(st.tuples(any_field, any_given), max_size=3), st.sampled_from(("", ":nq_wiki", ":own", ":nope", ":")))
def test_config_overrides(overrides, variant):
    arguments = [f"--config={ROOT / 'configs' / 'radit.py'}{variant}", *(f"--config.{field}={value}" for field, value in overrides)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True)
    signal.alarm(SECONDS)
    try:
        values(["train", *arguments])
        config = values.config
    except Exception as error:  # what command.run catches
        line = command._usage(error)
        assert line.strip() and "\n" not in line and "Traceback" not in line
        return
    finally:
        signal.alarm(0)
    assert config.is_locked
    with folder_of() as folder:
        (folder / inputs.CONFIG_FILE).write_text(json.dumps(config.to_dict()))
        stored = value_or_input_error(lambda: inputs.stored_config(folder, config, config_flags.get_override_values(values["config"])))
        assert stored is None or json.dumps(stored.to_dict(), sort_keys=True) == json.dumps(config.to_dict(), sort_keys=True)


@fuzzed
@given(any_value)
def test_the_config_of_a_workdir(value):
    config = _base()
    with folder_of(config__json=line_of(value)) as folder:
        value_or_input_error(lambda: inputs.stored_config(folder, config, {}))


def _base() -> Any:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, flag_values=values, lock_config=True)
    values(["train", f"--config={ROOT / 'configs' / 'radit.py'}"])
    return values.config
