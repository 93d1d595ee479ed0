"""Exact match, F1 and retrieval metrics per question, and bootstrap intervals over questions."""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Mapping, Sequence

import numpy as np

from radit_jax.types import Example, Passage

RESAMPLES = 2_000
DEPTH = 10  # passages among which a right one is looked for
_PUNCTUATION = str.maketrans("", "", string.punctuation)
SAYS_NOTHING = frozenset(("yes", "no", "maybe", "true", "false"))  # answers that no passage holds as such
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize(text: str) -> str:
    """The usual normalisation of open-domain QA: lower case, no punctuation, no English articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers after normalisation."""
    return float(any(normalize(prediction) == normalize(answer) for answer in answers))


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall against the best answer."""
    return max((_f1(normalize(prediction).split(), normalize(answer).split()) for answer in answers), default=0.0)


def _f1(predicted: list[str], expected: list[str]) -> float:
    if not predicted or not expected:
        return float(predicted == expected)
    common = sum((collections.Counter(predicted) & collections.Counter(expected)).values())
    return 2 * common / (len(predicted) + len(expected))


def rouge_l(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> list[float]:
    """ROUGE-L (F-measure, stemmed) of each prediction against its best answer, by rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer  # imports nltk: seconds

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return [float(scorer.score_multi(accepted, text)["rougeL"].fmeasure) for text, accepted in zip(predictions, answers)]


def contains_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a normalised answer stands in the normalised text as whole words."""
    padded = f" {normalize(text)} "
    return any(f" {answer} " in padded for answer in map(normalize, answers) if answer)


def first_right(passages: Sequence[Passage], example: Example) -> int | None:
    """Rank (from 0) of the first passage that is a right one: it contains an answer.

    Where all answers are words as "yes", which no passage holds as such: it is of the document that answers, where that is known.
    """
    if example.gold_id is None or not all(normalize(answer) in SAYS_NOTHING for answer in example.answers):
        return first_hit([passage.content for passage in passages], example.answers)
    piece = re.compile(re.escape(example.gold_id) + r"(#\d+)?")
    return next((rank for rank, passage in enumerate(passages) if piece.fullmatch(passage.id)), None)


def first_hit(texts: Sequence[str], answers: Sequence[str]) -> int | None:
    """Rank (from 0) of the first passage that contains an answer."""
    return next((rank for rank, text in enumerate(texts) if contains_answer(text, answers)), None)


def retrieval_metrics(rank: int | None, ks: Sequence[int] = (1, 5, 10)) -> dict[str, float]:
    """recall@k for each k and the reciprocal rank, from the rank of the first hit."""
    return {**{f"recall@{k}": float(rank is not None and rank < k) for k in ks}, "mrr": 0.0 if rank is None else 1.0 / (rank + 1)}


def summarize(per_question: Mapping[str, Sequence[float]], *, seed: int = 0) -> dict[str, dict]:
    """{metric: {"mean", "ci95": [lo, hi]}} in percent-free units; intervals by a bootstrap over questions."""
    return {name: {"mean": float(np.mean(values)), "ci95": bootstrap(values, seed=seed)} for name, values in per_question.items()}


def bootstrap(values: Sequence[float], *, seed: int = 0) -> list[float]:
    """The 2.5 and 97.5 percentiles of the mean over resampled questions."""
    values_N = np.asarray(values, np.float64)
    draws = np.random.default_rng(seed).integers(0, len(values_N), (RESAMPLES, len(values_N)))
    low, high = np.percentile(values_N[draws].mean(-1), [2.5, 97.5])
    return [float(low), float(high)]


def paired_difference(after: Sequence[float], before: Sequence[float], *, seed: int = 0) -> dict:
    """Mean of (after − before) on the same questions, with its bootstrap interval."""
    difference_N = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return {"mean": float(difference_N.mean()), "ci95": bootstrap(difference_N, seed=seed)}
