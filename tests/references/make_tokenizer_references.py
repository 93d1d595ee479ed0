"""Makes tokenizer_references.json: hashes of the ids of 10,000 mixed lines, for tests/test_tokenizer.py.

Needs transformers with torch, gguf and regex. From the repository root:

    python tests/references/make_tokenizer_references.py SMOLLM2_GGUF MINILM_FOLDER

Two references that share no code with ours. `by_hand` is byte-level BPE and SentencePiece BPE written out below. The other is
transformers: AutoTokenizer on the GGUF file, given the two pre-tokenizer steps of SmolLM2's published tokenizer.json, because
transformers (5.23) does not know tokenizer.ggml.pre = "smollm" and then leaves out the step that cuts numbers into single digits.
Both must agree before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

OUTPUT = Path(__file__).with_name("tokenizer_references.json")
LINES = 10_000

# -- the lines ----------------------------------------------------------------------------------------------------------------------

WORDS = (
    "the of and a in valley Bridge history WROTE first-born Theodora's river it's don't we'll they've I'm I'd you're mill 'quoted' "
    "extraordinary antidisestablishmentarianism X-ray e-mail iPhone HTTPServer snake_case camelCase kebab-case O'Neill rock'n'roll"
).split()
CODE = (
    "def f(x): return x**2", "for (int i=0; i<10; ++i) {", "}\t// end",
    "SELECT * FROM t WHERE a >= 3.5;", "x = {'a': [1, 2], \"b\": None}",
    "    if not self._cache:", "\t\treturn !ok && (a || b);", "<div class=\"x\">&nbsp;</div>", "#include <stdio.h>", "lambda _: ...",
    "https://example.org/a?b=c&d=%20#e", "$ grep -rn 'x' ./src | wc -l", "\\frac{1}{2}\\alpha_i",
    "0xDEADBEEF 1e-10 3.14f 0b1010", "a<b>c</b>",
)  # fmt: skip
NUMBERS = (
    "0",
    "7",
    "42",
    "1999",
    "2023-11-05",
    "3,141,592.65",
    "-17.5%",
    "1/2",
    "½",
    "²",
    "Ⅷ",
    "٣٤٥",
    "१२३",
    "12345678901234567890",
    "v1.2.3",
    "50km",
    "1st",
    "①",
)
EMOJI = ("🙂", "🚀🚀", "👩‍👩‍👧‍👦", "👍🏽", "🇫🇷", "❤️", "☕", "🤷‍♂️", "‼️", "✅")
SCRIPTS = (
    "東京は日本の首都です。", "你好，世界！", "서울은 한국의 수도이다", "Привет, мир", "مرحبا بالعالم", "नमस्ते दुनिया",
    "สวัสดีชาวโลก", "Ünïcödé", "naïve café",
    "cafe\u0301 A\u030angstro\u0308m", "ﬁne ﬀ", "Ελληνικά", "שלום", "ﷺ", "𝕄𝕒𝕥𝕙", "𠜎𠜱",
)  # fmt: skip
SPACES = (
    " ",
    " ",
    " ",
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\n\n",
    " \n ",
    "\r\n",
    "\u00a0",
    "\u2003",
    "\u3000",
    "\u200b",
    "",
    "      ",
    "\u2028",
    "\x0b",
    "\x85",
)
MARKS = (
    ".",
    ",",
    "!",
    "?!",
    "...",
    "—",
    "“",
    "”",
    "(",
    ")",
    "[",
    "]",
    "'",
    '"',
    ";",
    ":",
    "--",
    "***",
    "###",
    "@",
    "€",
    "§",
    "\\",
    "_",
    "\x00",
    "\x1b",
)
SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>", "<|im_start", "<unk>", "[CLS]", "[SEP]", "[MASK]")
KINDS = ((WORDS, 40), (CODE, 8), (NUMBERS, 18), (EMOJI, 6), (SCRIPTS, 10), (MARKS, 14), (SPECIALS, 1))


def mixed_lines(count: int = LINES) -> list[str]:
    """Code, numbers, emoji, many scripts, odd spaces and the texts of special tokens, in every order; the same lines everywhere."""
    draw = random.Random(20231)

    def pick(options: Sequence) -> str:  # random.random() is the one method whose stream is promised to stay
        return options[int(draw.random() * len(options))]

    kinds = [kind for kind, weight in KINDS for _ in range(weight)]
    return ["".join(pick(pick(kinds)) + pick(SPACES) for _ in range(1 + int(draw.random() * 16))) for _ in range(count)]


def digest(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 of the ids of all lines."""
    return hashlib.sha256("\n".join(" ".join(map(str, row)) for row in rows).encode()).hexdigest()


# -- GGUF files of other kinds, with the same vocabulary ----------------------------------------------------------------------------

RULES = ("smollm", "gpt-2", "llama-bpe", "qwen2")


def write_gguf(path: Path, kind: str, tokens: Sequence[str], types: Sequence[int], **fields) -> None:
    """A GGUF file that holds a tokenizer and nothing else. `fields`: tokenizer.ggml.* keys by their last part."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(list(tokens))
    writer.add_token_types([int(t) for t in types])
    for key, value in fields.items():
        key = f"tokenizer.ggml.{key}"
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)]
        add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_vocabulary(tokens: Sequence[str], merges: Sequence[str], size: int = 6000) -> tuple[list[str], list[str]]:
    """The first tokens and the merges that lead to them: quick to write and read, and as good for telling rules apart."""
    kept = set(tokens[:size])
    return list(tokens[:size]), [merge for merge in merges if merge.replace(" ", "") in kept]


def spm_vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A small Llama 2-like vocabulary: tokens, scores, types (2 unknown, 3 control, 6 byte, 1 normal)."""
    text = " ".join(WORDS).replace(" ", "▁")
    pieces: dict[str, int] = {}
    for size in (2, 3, 4, 6):
        for start in range(0, len(text) - size):
            pieces[text[start : start + size]] = pieces.get(text[start : start + size], 0) + 1
    best = sorted(pieces, key=lambda piece: (-pieces[piece] * len(piece), piece))[:600]
    letters = sorted(set(text) | set("0123456789.,!?'\"()-"))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *best, *letters]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(tokens) - 259)]
    return tokens, scores, [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)


# -- by hand ------------------------------------------------------------------------------------------------------------------------


def byte_letters() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable Latin-1 stands for itself, the others follow from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def merged(symbols: list[str], ranks: dict[tuple[str, str], float]) -> list[str]:
    """Joins the neighbours of lowest rank, leftmost first, until none can be joined."""
    while len(symbols) > 1:
        rank, at = min((ranks.get(pair, float("inf")), i) for i, pair in enumerate(zip(symbols, symbols[1:])))
        if rank == float("inf"):
            break
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return symbols


class ByHand:
    """Byte-level BPE with the pre-tokenizer `rule`, in the plainest way."""

    def __init__(self, tokens: Sequence[str], merges: Sequence[str], specials: Sequence[str], rule: str):
        import regex

        self.ids = {token: i for i, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
        self.special = regex.compile("(" + "|".join(map(regex.escape, sorted(specials, key=len, reverse=True))) + ")")
        self.rule, self.letters, self.known = rule, byte_letters(), {}
        digits = {"llama-bpe": r"\p{N}{1,3}", "qwen2": r"\p{N}"}.get(rule)
        gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
        later = (
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        self.words = regex.compile(later if digits else gpt2)
        self.digit = regex.compile(r"(\p{N})")

    def encode(self, text: str) -> list[int]:
        return [i for part in self.special.split(text) if part for i in self._ids(part)]

    def _ids(self, part: str) -> Iterator[int]:
        if self.special.fullmatch(part):
            yield self.ids[part]
            return
        if self.rule == "qwen2":
            part = unicodedata.normalize("NFC", part)
        stretches = self.digit.split(part) if self.rule == "smollm" else [part]
        for word in (word for stretch in stretches for word in self.words.findall(stretch)):
            if word not in self.known:
                self.known[word] = self._word("".join(self.letters[byte] for byte in word.encode()))
            yield from self.known[word]

    def _word(self, spelled: str) -> list[int]:
        if self.rule == "llama-bpe" and spelled in self.ids:
            return [self.ids[spelled]]
        return [self.ids[symbol] for symbol in merged(list(spelled), self.ranks)]


def spm_by_hand(text: str) -> list[int]:
    """SentencePiece BPE over `spm_vocabulary`, a space in front; "<s>" and "</s>" in the text are those tokens."""
    import regex

    tokens, scores, _ = spm_vocabulary()
    ids = {token: i for i, token in enumerate(tokens)}
    ranks = {(t[:i], t[i:]): -s for t, s in zip(tokens[259:], scores[259:]) for i in range(1, len(t)) if t[:i] in ids and t[i:] in ids}
    out = []
    for part in filter(None, regex.split("(<s>|</s>)", text)):
        if part in ("<s>", "</s>"):
            out.append(ids[part])
            continue
        for symbol in merged(list("▁" + part.replace(" ", "▁")), ranks):
            out += [ids[symbol]] if symbol in ids else [ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]
    return out


# -- making -------------------------------------------------------------------------------------------------------------------------


def main(gguf_file: str, minilm: str) -> None:
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    lines = mixed_lines()
    fields = GGUFReader(gguf_file).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    specials = [token for token, kind in zip(tokens, types) if kind == 3]
    found = {"lines": digest([list(line.encode()) for line in lines])}
    for rule in RULES:
        vocabulary = (tokens, merges) if rule == "smollm" else small_vocabulary(tokens, merges)
        by_hand = ByHand(*vocabulary, specials, rule)
        found[rule] = digest([by_hand.encode(line) for line in lines])

    file = Path(gguf_file)
    theirs = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    unchanged = [theirs.encode(line, add_special_tokens=False) for line in lines]
    digits, words = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    published = [theirs.encode(line, add_special_tokens=False) for line in lines]
    if digest(published) != found["smollm"]:
        raise SystemExit("transformers and the tokenizer by hand disagree on smollm")
    apart = sum(a != b for a, b in zip(unchanged, published))
    print(f"smollm: by hand == transformers; without the digits step transformers differs on {apart} of {LINES} lines")

    found["spm"] = digest([spm_by_hand(line) for line in lines[:2000]])
    bert = AutoTokenizer.from_pretrained(minilm)
    found["minilm"] = digest([bert.encode(line, add_special_tokens=False) for line in lines])
    OUTPUT.write_text(json.dumps(found, indent=1) + "\n")
    print(OUTPUT.read_text())


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
