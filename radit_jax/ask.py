"""The `ask` command: questions through retriever and ensemble, by one system or by four, with what each passage contributed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from radit_jax.data.prompts import TRAINING_PROMPTS, dialogue_turns, evaluation_example
from radit_jax.data.questions import Question
from radit_jax.data.records import BadRecord, BadRecords, json_lines, text_field
from radit_jax.data.tokenizer import Tokenizer, load_tokenizer
from radit_jax.errors import InputError
from radit_jax.evaluation.metrics import normalize
from radit_jax.inference import streaming
from radit_jax.inference.ensemble import Answer, Ensemble, Prompted, passage_logweights
from radit_jax.logbook import say
from radit_jax.paths import named
from radit_jax.pipeline import Pipeline
from radit_jax.table import ROWS, System
from radit_jax.types import Example, Passage

# What is shown side by side.
SYSTEMS: dict[str, System] = {"closed book": ROWS["no retrieval"], **{name: ROWS[name] for name in ("neither tuned", "LM-ft only", "both")}}
PLAIN = ("id", "title", "text", "score", "weight", "answer", "logprob")  # of a passage in the JSON of one system
Heard = Callable[[str, str, float], None]  # the passage's title ("" is the ensemble), what it has said so far, the log-probability of that


def question(text: str, history: Sequence[str] = ()) -> Question:
    """What is asked, after a dialogue or none. InputError if it is blank, or not text (bytes of another encoding, half a character)."""
    if not text.strip():
        raise InputError("the question is empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"the question is not Unicode text: {text[:80]!r}")
    return Question("the question", text, ("",), history=tuple(history))


def read_history(path: str | Path) -> tuple[str, ...]:
    """The turns of a jsonl file of {"role", "content"}; InputError with file and line where they are none."""
    return turns((f"{path}:{number}", message) for number, message in json_lines(named(path), lambda record: record, BadRecords()))


def turns(messages: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """What user and assistant said by turns, the assistant last, of (where, {"role", "content"}). InputError names where it is not so."""
    said: list[str] = []
    where = "history"
    for where, message in messages:
        expected = ("user", "assistant")[len(said) % 2]
        try:
            role, content = text_field(message, "role"), text_field(message, "content")
        except BadRecord as problem:
            raise InputError(f"{where}: {problem}") from problem
        if role != expected:
            raise InputError(f"{where}: role {role[:20]!r}, expected {expected!r} (user and assistant take turns, the user begins)")
        said.append(content.strip())
    if len(said) % 2:
        raise InputError(f"{where}: the last turn is the user's, expected an answer to it (the question itself is not part of the history)")
    return tuple(said)


def example(asked: Question) -> Example:
    """A question alone has the prompt of evaluation, one after a dialogue that of training on dialogues."""
    asked = dataclasses.replace(asked, question=asked.question.strip())
    plain = evaluation_example(asked)
    if not asked.history:
        return plain
    return dataclasses.replace(plain, prompt=TRAINING_PROMPTS["dialogue"].format(turns=dialogue_turns([*asked.history, asked.question])))


@dataclasses.dataclass(frozen=True)
class Found:
    """The passages of a question, best first, with their scores and log p_R; for the closed book none, and one weight of 1."""

    passages: tuple[Passage, ...]
    scores_K: np.ndarray
    logw_K: np.ndarray


CLOSED = Found((), np.zeros(0, np.float32), np.zeros(1, np.float32))


class Asker:
    """The systems of a workdir. A model is loaded when it is first needed and then held: two LMs, where both are asked."""

    def __init__(self, pipeline: Pipeline):
        self.pipeline = pipeline
        self.has = (pipeline.has("lm_ft"), pipeline.has("lsr_ft"))  # a tuned LM, a tuned query encoder
        self._ensemble = functools.cache(pipeline.ensemble)
        self._embed = functools.cache(pipeline.embed_queries)

    @property
    def missing(self) -> dict[str, str]:
        """Those of SYSTEMS whose models the workdir does not hold, and what it lacks."""
        kinds = ("LM", "query encoder")
        lacks = {name: [kind for kind, tuned, has in zip(kinds, SYSTEMS[name], self.has) if tuned and not has] for name in SYSTEMS}
        return {name: " and ".join(f"no tuned {kind}" for kind in kinds) for name, kinds in lacks.items() if kinds}

    @property
    def systems(self) -> dict[str, System]:
        """Those of SYSTEMS that can be asked."""
        return {name: system for name, system in SYSTEMS.items() if name not in self.missing}

    def load(self) -> None:
        """Everything that the systems need, before the first question."""
        for lm_tuned, retriever_tuned in self.systems.values():
            self._ensemble(lm_tuned)
            if retriever_tuned is not None:
                self._embed(retriever_tuned)
            self.pipeline.searcher_of(bool(retriever_tuned))

    def ask(self, asked: Question, *, untuned: bool = False, level: str = "sequence", heard: Heard | None = None) -> dict[str, Any]:
        """{"question", "answer", "logprob", "passages"} by the best that the workdir holds (said on stderr), best passage first.

        `heard` is told of the answer as it comes: at token level the text so far, at sequence level what each passage says.
        """
        lm_tuned, retriever_tuned = (not untuned and has for has in self.has)
        say(f"ask: {'tuned' if lm_tuned else 'untuned'} LM, {'tuned' if retriever_tuned else 'untuned'} query encoder")
        (found,), ensemble = self._found([asked], retriever_tuned), self._ensemble(lm_tuned)
        prompted = self._prompted(ensemble, [asked], [found])
        if not streaming.possible(ensemble) or (level == "sequence" and heard is None):
            (answer,) = ensemble.generate(prompted, level=level)
        elif level == "token":
            answer = streaming.by_token(ensemble, prompted[0], lambda text, logp: heard and heard("", text, logp))
        else:
            answer = streaming.by_passage(ensemble, prompted[0], lambda k, text, logp: heard(found.passages[k].title, text, logp))
        return {"question": asked.question, **_told(found, answer)}

    def compare(self, asked: Sequence[Question]) -> list[dict[str, Any]]:
        """{"question", "systems": {name: {"answer", "logprob", "passages"}}} of each question, all of them asked at once."""
        systems = self.systems
        found = {retriever: self._found(asked, retriever) for retriever in dict.fromkeys(retriever for _, retriever in systems.values())}
        told = {}
        for name, (lm_tuned, retriever) in systems.items():
            ensemble = self._ensemble(lm_tuned)
            answers = ensemble.generate(self._prompted(ensemble, asked, found[retriever]))
            told[name] = [_told(*pair) for pair in zip(found[retriever], answers)]
        return [{"question": one.question, "systems": {name: of[n] for name, of in told.items()}} for n, one in enumerate(asked)]

    def _found(self, asked: Sequence[Question], retriever_tuned: bool | None) -> list[Found]:
        if retriever_tuned is None:
            return [CLOSED] * len(asked)
        c = self.pipeline.config
        queries_BxE = self._embed(retriever_tuned)([self._query(one) for one in asked])
        rows_BxK, scores_BxK = self.pipeline.searcher_of(retriever_tuned).search(queries_BxE, c.evaluate.k)
        return [
            Found(tuple(self.pipeline.store.read(rows_K)), scores_K, passage_logweights(scores_K, c.retriever.score_scale))
            for rows_K, scores_K in zip(rows_BxK, scores_BxK)
        ]

    def _query(self, asked: Question) -> str:
        """The dialogue as far back as the query encoder reads: it cuts a long text at its end, where the question is."""
        said, most = [*asked.history, asked.question.strip()], self.pipeline.config.retriever.max_query_tokens
        most = min(most, self._query_tokenizer.max_tokens or most)
        while len(said) > 1 and self._query_tokenizer.encode_with_specials(["\n".join(said)], most)[1].sum() >= most:
            said = said[1:]
        return "\n".join(said)

    @functools.cached_property
    def _query_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.pipeline.config.retriever.query_encoder)

    def _prompted(self, ensemble: Ensemble, asked: Sequence[Question], found: Sequence[Found]) -> list[Prompted]:
        """The prompts, and the ensemble's calls made small: it fills a call with copies of the last question."""
        made = []
        for one, of in zip(asked, found):
            backgrounds = [passage.content for passage in of.passages] if of.passages else [None]
            made.append(ensemble.prompted(one.id, example(one).prompt, backgrounds, of.logw_K))
        longest = max(len(ids) for prompted in made for ids in prompted.prompts)
        rows = 1 << (len(made) - 1).bit_length()  # a power of two: few compiles
        call = rows * len(made[0].prompts) * ensemble.width(longest)
        ensemble.batch_tokens = min(self.pipeline.config.evaluate.batch_tokens, call)
        return made


def _told(found: Found, answer: Answer) -> dict[str, Any]:
    """{"answer", "logprob", "passages"}. A passage is overruled where its own answer, normalised, is another than the ensemble's."""
    final, nothing = normalize(answer.text), (None,) * len(found.passages)
    own = zip(answer.own_texts or nothing, answer.own_logprobs or nothing)
    parts = zip(found.passages, found.scores_K, np.exp(found.logw_K), own)
    listed = [
        {
            **{"id": passage.id, "title": passage.title, "text": passage.text, "score": float(score), "weight": float(weight)},
            **{"answer": text, "logprob": logprob, "overruled": text is not None and normalize(text) != final},
        }
        for passage, score, weight, (text, logprob) in parts
    ]
    return {"answer": answer.text, "logprob": answer.logprob, "passages": listed}


def plain(told: Mapping[str, Any]) -> dict[str, Any]:
    """{"question", "answer", "passages": [{"id", "title", "text", "score", "weight", "answer", "logprob"}]}: the contract of --json."""
    passages = [{key: passage[key] for key in PLAIN} for passage in told["passages"]]
    return {"question": told["question"], "answer": told["answer"], "passages": passages}
