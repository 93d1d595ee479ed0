"""Text to token ids and back, for every checkpoint that `weights` reads: Hugging Face folders and GGUF files.

One class over the `tokenizers` library. A GGUF file carries a vocabulary and the *name* of the rule that cuts text before the merges;
the rule is rebuilt here, so that no torch and no second file is needed. An unknown rule is an error: a wrong one would still run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from radit_jax.errors import InputError
from radit_jax.weights.gguf import GgufFile
from radit_jax.weights.hf import read_json, resolve

NO_LIMIT = 1_000_000  # tokenizer_config.json writes "no limit" as a huge model_max_length


class Tokenizer:
    """`tokenizers.Tokenizer` with the special ids and conventions of its checkpoint.

    bos_id, eos_id, pad_id are None where the checkpoint has none (pad_id falls back on eos_id); `add_bos` says whether the checkpoint
    was trained with bos in front of every text; `max_tokens` is its own limit on encoder input, specials included, or None.
    `config` is what `save` writes as tokenizer_config.json.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], *, max_tokens: int | None = None):
        backend.no_truncation()  # some tokenizer.json files cut at 128 tokens and pad to them
        backend.no_padding()
        self.backend = backend
        self.config = dict(config)
        self.max_tokens = max_tokens
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        pad_id = self._id_of("pad_token")
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._prefix, self._suffix = _wrapping(backend)
        declared = self.config.get("add_bos_token")
        self.add_bos = bool(self._prefix and self._prefix[0] == self.bos_id) if declared is None else bool(declared)

    def _id_of(self, kind: str) -> int | None:
        text = _content(self.config.get(kind))
        return None if text is None else self.backend.token_to_id(text)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, nothing added; the text of a special token inside it becomes that token, as Hugging Face does it."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; special tokens are left out unless asked for."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def encode_with_specials(self, texts: Sequence[str], max_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Encoder input: ([CLS] text [SEP]) cut at the text's end to `max_tokens`, padded on the right to the longest of `texts`.

        Returns tokens_BxT int32 and mask_BxT bool. The checkpoint's own limit holds where it is smaller.
        """
        limit = min(max_tokens, self.max_tokens or max_tokens)
        room = limit - len(self._prefix) - len(self._suffix)
        if room < 1:
            raise InputError(f"max_tokens {limit} leaves no room for text beside {len(self._prefix) + len(self._suffix)} special tokens")
        rows = [self._prefix + ids[:room] + self._suffix for ids in self.encode_batch(texts)]
        width = max((len(row) for row in rows), default=0)
        tokens_BxT = np.full((len(rows), width), self.pad_id or 0, np.int32)
        mask_BxT = np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            tokens_BxT[i, : len(row)] = row
            mask_BxT[i, : len(row)] = True
        return tokens_BxT, mask_BxT

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
        self.backend.save(str(Path(folder) / "tokenizer.json"))
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (Path(folder) / "tokenizer_config.json").write_text(text, encoding="utf-8")


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a checkpoint: a folder, a GGUF file, a Hub id or package:MODULE/PATH. InputError where there is none."""
    path = resolve(name)
    if not path.is_file():
        return _from_folder(path)
    try:
        return _from_gguf(GgufFile(path))
    except InputError:
        raise
    except Exception as error:  # ids that are not there, merges of no pieces: the library raises bare Exception
        raise InputError(f"{path}: its header has no usable tokenizer ({str(error)[:200]!r})") from error


def _wrapping(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text."""
    plain = backend.encode("a", add_special_tokens=False).ids
    wrapped = backend.encode("a").ids
    for start in range(len(wrapped) - len(plain) + 1):
        if wrapped[start : start + len(plain)] == plain:
            return wrapped[:start], wrapped[start + len(plain) :]
    raise InputError(f"the tokenizer's post-processor turns {plain} into {wrapped}: expected ids before and after it only")


def _content(token: Any) -> str | None:
    """tokenizer_config.json writes a special token as its text or as a mapping with "content"."""
    return token.get("content") if isinstance(token, Mapping) else token


# -- Hugging Face folders -----------------------------------------------------------------------------------------------------------


def _from_folder(folder: Path) -> Tokenizer:
    config = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").exists() else {}
    if (folder / "special_tokens_map.json").exists():
        for key, token in read_json(folder / "special_tokens_map.json").items():
            config.setdefault(key, token)
    if (folder / "chat_template.jinja").exists():
        config.setdefault("chat_template", (folder / "chat_template.jinja").read_text(encoding="utf-8"))
    file = folder / "tokenizer.json"
    if not file.exists():
        backend, config = _from_old_format(folder, config)
    else:
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise InputError(f"{file}: not a tokenizer ({str(error)[:200]})") from error
    return Tokenizer(backend, config, max_tokens=_encoder_limit(folder, config))


def _from_old_format(folder: Path, config: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """vocab.txt, merges.txt or a SentencePiece model: converted by transformers (imported only here: it takes seconds)."""
    from transformers import AutoTokenizer

    try:
        loaded = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        backend = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    except Exception as error:  # one class per format and library version
        raise InputError(f"{folder}: no tokenizer.json, and no older tokenizer that transformers can convert") from error
    return backend, {**{key: str(token) for key, token in loaded.special_tokens_map.items()}, **config}


def _encoder_limit(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The smallest limit on tokens that the folder states: sentence-transformers' own, or the tokenizer's."""
    limits = [config.get("model_max_length")]
    if (folder / "sentence_bert_config.json").exists():
        limits.append(read_json(folder / "sentence_bert_config.json").get("max_seq_length"))
    stated = [int(limit) for limit in limits if isinstance(limit, (int, float)) and 0 < limit < NO_LIMIT]
    return min(stated, default=None)


# -- GGUF files ---------------------------------------------------------------------------------------------------------------------

CONTROL, USER_DEFINED = 3, 4  # tokenizer.ggml.token_type

_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split_words(digits: str) -> pre_tokenizers.PreTokenizer:
    """Words with at most one mark in front, runs of digits as `digits` says, marks, line ends, spaces."""
    pattern = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + _REST
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior="isolated"), _BYTES])


# tokenizer.ggml.pre -> how text is cut before the merges, as the tokenizer.json of these families has it.
_DIGITS_GPT2 = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
PRE_TOKENIZERS = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "mpt", "olmo"), _GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS_GPT2),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "smaug-bpe"), _split_words(r"\p{N}{1,3}")),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _split_words(r"\p{N}")),
}
NFC = ("qwen2", "deepseek-r1-qwen", "command-r")  # families that compose accents first
WHOLE_WORDS_FIRST = ("llama3", "llama-v3", "llama-bpe", "smaug-bpe")  # a piece that is a token is taken without merging


def _from_gguf(file: GgufFile) -> Tokenizer:
    kind = file.metadata("tokenizer.ggml.model")
    if kind not in BUILDERS:
        raise InputError(f"{file.where}: tokenizer.ggml.model is {kind!r}, expected one of {', '.join(BUILDERS)}")
    tokens: list[str] = file.metadata("tokenizer.ggml.tokens")
    backend = BUILDERS[kind](file, tokens)
    _mark_special(backend, tokens, file.metadata("tokenizer.ggml.token_type", []))
    config = _gguf_config(file, tokens, add_bos=bool(file.metadata("tokenizer.ggml.add_bos_token", kind == "llama")))
    if config["add_bos_token"]:
        _put_in_front(backend, config["bos_token"])
    return Tokenizer(backend, config)


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2, SmolLM, Llama 3, Qwen)."""
    rule = file.metadata("tokenizer.ggml.pre", "default")
    if rule not in PRE_TOKENIZERS:
        raise InputError(f"{file.where}: tokenizer.ggml.pre is {rule!r}, expected one of {', '.join(PRE_TOKENIZERS)}")
    merges = [tuple(pair.split(" ")) for pair in file.metadata("tokenizer.ggml.merges")]
    model = models.BPE(vocab=_vocabulary(tokens), merges=merges, ignore_merges=rule in WHOLE_WORDS_FIRST)
    backend = tokenizers.Tokenizer(model)
    if rule in NFC:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE (Llama 2, Mistral): pieces with scores; the best-scored merge of two neighbours goes first."""
    vocabulary = _vocabulary(tokens)
    unknown = tokens[int(file.metadata("tokenizer.ggml.unknown_token_id", 0))]
    merges = _merges_by_score(vocabulary, dict(zip(tokens, file.metadata("tokenizer.ggml.scores"), strict=True)))
    model = models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    space = normalizers.Replace(" ", "▁")
    unspace = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.metadata("tokenizer.ggml.add_space_prefix", True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), space])
        backend.decoder = decoders.Sequence([*unspace, decoders.Strip(" ", 1, 0)])
    else:
        backend.normalizer = space
        backend.decoder = decoders.Sequence(unspace)
    return backend


BUILDERS = {"gpt2": _byte_level, "llama": _sentencepiece}  # tokenizer.ggml.model -> backend


def _vocabulary(tokens: Sequence[str]) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens)}


def _merges_by_score(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to make a piece out of two others, best score first; between equals, longer parts first."""
    found = []
    for piece, score in scores.items():
        pairs = [(piece[:i], piece[i:]) for i in range(1, len(piece)) if piece[:i] in vocabulary and piece[i:] in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        found.extend((score, pair) for pair in pairs)
    found.sort(key=lambda item: (-item[0], -len(item[1][0]), -len(item[1][1])))
    return [pair for _, pair in found]


def _mark_special(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens (bos, eos, chat marks) are special; user-defined ones are taken whole from the text but are text."""
    kinds = list(zip(tokens, types, strict=False))  # an old file without types has no such tokens
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in kinds if kind == CONTROL])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token, kind in kinds if kind == USER_DEFINED])


def _gguf_config(file: GgufFile, tokens: Sequence[str], *, add_bos: bool) -> dict[str, Any]:
    """tokenizer_config.json for what the header says."""
    # The generic class keeps tokenizer.json as it is; a model's own class may rebuild it from the vocabulary alone.
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = file.metadata(f"tokenizer.ggml.{field}_token_id", None)
        if index is not None:
            config[f"{key}_token"] = tokens[int(index)]
    config["add_bos_token"] = add_bos and "bos_token" in config
    template = file.metadata("tokenizer.chat_template", None)
    if template:
        config["chat_template"] = template
    return config


def _put_in_front(backend: tokenizers.Tokenizer, token: str) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, backend.token_to_id(token))]
    )
