"""How well passages were found: ranks of documents against what is known to be relevant, as trec_eval measures them, and run files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from radit_jax.data.records import BadRecord, BadRecords, id_field, json_lines, text_field
from radit_jax.data.sources import table_rows
from radit_jax.errors import InputError
from radit_jax.evaluation import metrics
from radit_jax.types import Retrieved

BEIR = "beir:"  # beir:FOLDER[#SPLIT] names the questions of a BEIR folder
KS = (1, 5, 10, 20, 100)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A question with what is known of its passages: accepted answers, or graded documents, or both."""

    id: str
    text: str
    answers: tuple[str, ...] = ()
    relevant: Mapping[str, int] = dataclasses.field(default_factory=dict)  # document id → grade; 0 and less: not relevant


# -- measures ---------------------------------------------------------------------------------------------------------------------------


def recall(ranked: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """The share of the relevant documents that are among the first k."""
    wanted = {document for document, grade in relevant.items() if grade > 0}
    return len(wanted & set(ranked[:k])) / len(wanted) if wanted else 0.0


def reciprocal_rank(ranked: Sequence[str], relevant: Mapping[str, int]) -> float:
    """1 / rank of the first relevant document; 0 where there is none."""
    return next((1.0 / rank for rank, document in enumerate(ranked, 1) if relevant.get(document, 0) > 0), 0.0)


def ndcg(ranked: Sequence[str], relevant: Mapping[str, int], k: int) -> float:
    """Σ grade / log2(rank + 1) over the first k, divided by that of the best possible order (trec_eval's ndcg_cut)."""
    ideal = _dcg(sorted((grade for grade in relevant.values() if grade > 0), reverse=True)[:k])
    return _dcg([max(0, relevant.get(document, 0)) for document in ranked[:k]]) / ideal if ideal else 0.0


def _dcg(grades: Sequence[int]) -> float:
    return sum(grade / math.log2(rank + 1) for rank, grade in enumerate(grades, 1))


def measure(judged: Judged, found: Retrieved, k: int, documents: Sequence[str]) -> dict[str, float]:
    """The measures of one question: of its answers (a passage holds one) and of its graded documents, as far as there are any.

    `documents` are the documents of the passages, best first.
    """
    depths = [depth for depth in KS if depth <= k]
    row: dict[str, float] = {}
    if judged.answers:
        hit = metrics.first_hit([passage.content for passage in found.passages], judged.answers)
        row |= {f"answer {name}": value for name, value in metrics.retrieval_metrics(hit, ks=depths).items()}
    if judged.relevant:
        ranked = list(dict.fromkeys(documents))  # a document counts where its first passage stands
        row |= {f"gold recall@{depth}": recall(ranked, judged.relevant, depth) for depth in depths}
        row |= {"gold mrr": reciprocal_rank(ranked, judged.relevant), "gold ndcg@10": ndcg(ranked, judged.relevant, 10)}
    return row


# -- formats ----------------------------------------------------------------------------------------------------------------------------


def beir_questions(source: str, max_bad_records: int = 0) -> list[Judged]:
    """The questions of `beir:FOLDER[#SPLIT]` that its judgements name: queries.jsonl and qrels/SPLIT.tsv (by default test)."""
    name, _, split = source.removeprefix(BEIR).partition("#")
    folder = Path(name).expanduser()
    qrels = folder / "qrels" / f"{split or 'test'}.tsv"
    if not qrels.is_file():
        there = ", ".join(sorted(path.stem for path in folder.glob("qrels/*.tsv"))) or "none"
        raise InputError(f"{qrels}: no such file; the folder has judgements of {there}")
    bad = BadRecords(max_bad_records)
    relevant: dict[str, dict[str, int]] = {}
    for where, row in table_rows(qrels, "\t", quoted=False):
        try:
            relevant.setdefault(row["query-id"], {})[row["corpus-id"]] = int(row["score"])
        except (KeyError, ValueError) as problem:
            bad.add(where, BadRecord(f"{problem!r}, expected the columns query-id, corpus-id and score (a number)"))
    queries = json_lines(folder / "queries.jsonl", lambda record: (id_field(record, "_id"), text_field(record, "text").strip()), bad)
    found = [Judged(id, text, relevant=relevant[id]) for _, (id, text) in queries if id in relevant]
    if not found:
        raise InputError(f"{folder / 'queries.jsonl'}: no question that {qrels} judges")
    return found


def run_lines(judged: Sequence[Judged], ranked: Sequence[Sequence[tuple[str, float]]], tag: str) -> Iterator[str]:
    """A TREC run: `query Q0 document rank score tag`, each document once, best first."""
    for question, documents in zip(judged, ranked, strict=True):
        best: dict[str, float] = {}
        for document, score in documents:
            best.setdefault(document, score)
        for rank, (document, score) in enumerate(best.items(), 1):
            yield f"{question.id.replace(' ', '_')} Q0 {document.replace(' ', '_')} {rank} {score:.9g} {tag}\n"
