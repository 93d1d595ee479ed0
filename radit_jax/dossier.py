"""Gathers what WORKDIR/report.html shows of a run. It reads the artifacts that the rows of the table were made from; nothing is made anew.

Every manifest names by fingerprint what its artifact was made from: that is the thread from the rows back to the corpus.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import itertools
import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from radit_jax import artifacts, distributed, logbook
from radit_jax.artifacts import Artifact
from radit_jax.errors import InputError
from radit_jax.evaluation import findings, metrics, page, paper
from radit_jax.evaluation.findings import AFTER, BEFORE
from radit_jax.inference.ensemble import passage_logweights
from radit_jax.inference.score import read_scores
from radit_jax.inputs import listed
from radit_jax.retrieval.retrieve import Retrieval
from radit_jax.training import optim, tune
from radit_jax.types import Retrieved

if TYPE_CHECKING:
    from radit_jax.pipeline import Pipeline

FILE = "report.html"
PAPER_ROWS = {"no retrieval": "LLaMA 65B", "neither tuned": "LLaMA 65B, retrieval", "both": "RA-DIT 65B"}
PAPER_EM = ("nq", "tqa", "hotpotqa", "zsre", "trex")  # its tasks that are measured by exact match, as the table is
PACKAGES = ("radit-jax", "jax", "jaxlib", "flax", "optax", "numpy")
PREFERENCES = 20_000  # training questions looked at for what the LM likes best


def write(pipeline: Pipeline, value: Mapping[str, Any], rows: Mapping[str, Artifact]) -> Path:
    """Writes the page of the table `value` and its rows' artifacts, and returns its path. Of several processes the leader calls this."""
    path = pipeline.workdir / FILE
    whole = page.html(gather(pipeline, value, rows))
    artifacts.write_whole(path, whole.encode("ascii", "xmlcharrefreplace").decode())  # the same bytes in every locale
    return path


def gather(pipeline: Pipeline, value: Mapping[str, Any], rows: Mapping[str, Artifact]) -> dict[str, Any]:
    """The data of evaluation/page.py, as far as this workdir has it."""
    shelf, config = Shelf(pipeline.workdir), pipeline.config
    stages = shelf.made_of(rows.values())
    lm_ft, r_ft = (next((one for one in stages if one.manifest["stage"] == name), None) for name in ("lm_ft", "lsr_ft"))
    return {
        "title": "RA-DIT: report of a run",
        "about": _about(config),
        "rows": value["rows"],
        "differences": value["differences"],
        "paper": _paper(config.test.source),
        "tasks": _tasks(pipeline.workdir),
        "trainings": [training(name, artifact) for name, artifact in (("LM-ft", lm_ft), ("R-ft", r_ft)) if artifact],
        **(_taught(pipeline, shelf, r_ft) if r_ft else {}),
        "questions": questions(pipeline, shelf, rows),
        "depth": max(
            (one.manifest["made_from"]["k"] for one in stages if one.manifest["stage"].startswith("retrieved-test")), default=None
        ),
        "by_k": {name: found for name, artifact in rows.items() if (found := by_k(shelf, artifact))},
        "stages": [{"stage": one.manifest["stage"], "folder": one.path.name, "facts": one.facts} for one in stages],
        "config": dict(flat(config)),
        "versions": versions(pipeline),
    }


class Shelf:
    """The whole artifacts of a workdir by fingerprint."""

    def __init__(self, workdir: Path):
        self.by_fingerprint: dict[str, Artifact] = {}
        for path in sorted(Path(workdir).glob(f"*/{artifacts.MANIFEST}")):
            with contextlib.suppress(InputError, KeyError):  # a folder that is no artifact is none of the run's
                if path.parent.suffix != ".partial":
                    artifact = artifacts.load(path.parent)
                    self.by_fingerprint[artifact.fingerprint] = artifact

    def get(self, fingerprint: str | None) -> Artifact | None:
        return self.by_fingerprint.get(fingerprint)

    def made_of(self, wanted: Iterable[Artifact]) -> list[Artifact]:
        """These and all that they were made from, what was made from nothing first."""
        found: dict[str, Artifact] = {}

        def visit(artifact: Artifact) -> None:
            if artifact.fingerprint not in found:
                for name in _strings(artifact.manifest["made_from"]):
                    if name in self.by_fingerprint:
                        visit(self.by_fingerprint[name])
                found[artifact.fingerprint] = artifact
                for index in self._indexes(artifact):
                    found[index.fingerprint] = index

        for artifact in wanted:
            visit(artifact)
        return list(found.values())

    def _indexes(self, vectors: Artifact) -> Iterator[Artifact]:
        """What was searched in their place; what is retrieved does not name it."""
        for one in self.by_fingerprint.values():
            if one.manifest["stage"].startswith("index") and one.manifest["made_from"]["vectors"] == vectors.fingerprint:
                yield one


# -- training ---------------------------------------------------------------------------------------------------------------------------


def training(name: str, artifact: Artifact) -> dict[str, Any]:
    """The curves of a training."""
    lines = logbook.read(artifact.path / "metrics.jsonl")
    return {"name": name, "lines": lines, "rates": _rates(artifact), "chosen": artifact.facts.get("best_step")}


def _rates(artifact: Artifact) -> list[tuple[int, float]]:
    """(step, learning rate) by the schedule of its options; none where the manifest is of another time and says less."""
    options, facts = artifact.manifest["made_from"]["options"], artifact.facts
    try:
        total = options["steps"] if artifact.manifest["stage"] == "lm_ft" else _lsr_steps(options, facts)
        schedule = optim.schedule(optim.OptimizerOptions(**options["optimizer"]), total)
        return list(enumerate(np.asarray(schedule(np.arange(facts["steps"])), np.float64).tolist(), 1))
    except (KeyError, TypeError):
        return []


def _lsr_steps(options: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    """The steps that its schedule is made for; patience may have ended it before."""
    if "planned_steps" in facts:
        return facts["planned_steps"]
    return tune.lsr_steps(options["epochs"], facts["questions"], 1.0 - options["completion_share"], options["batch"])


def _taught(pipeline: Pipeline, shelf: Shelf, r_ft: Artifact) -> dict[str, Any]:
    """k of the target, and whether p_R knew which of them the LM likes best: the weights are those before R-ft, as they are stored."""
    scored = shelf.get(r_ft.manifest["made_from"]["scores"].get("train"))
    retrieved = scored and shelf.get(scored.manifest["made_from"]["retrieved"])
    if not retrieved:
        return {}
    found = Retrieval(retrieved.path, (), pipeline.store).found
    scores = read_scores(scored.path)
    points: list[tuple[float, float]] = []
    for id, passage_ids, scores_K in itertools.islice(zip(found.example_ids, found.passage_ids, found.scores), PREFERENCES):
        listed_ids, logp_K, _ = scores.get(id.decode(), ((), (), 0))
        if list(listed_ids) == [one.decode() for one in passage_ids]:
            likes_K = np.arange(len(logp_K)) == np.argmax(logp_K)
            points += zip(np.exp(passage_logweights(scores_K, pipeline.config.retriever.score_scale)).tolist(), map(float, likes_K))
    return {"candidates": found.k, "favourite": findings.binned(points)}


# -- questions --------------------------------------------------------------------------------------------------------------------------


def questions(pipeline: Pipeline, shelf: Shelf, rows: Mapping[str, Artifact]) -> list[dict[str, Any]]:
    """Every question as evaluation/findings.py reads it."""
    examples = pipeline.test_examples
    made = [{"id": e.id, "question": e.query, "answers": list(e.answers), "systems": {}, "first": {}, "passages": {}} for e in examples]
    members: dict[str, list[Retrieved]] = {}
    for name, artifact in rows.items():
        records, per_question = (json.loads((artifact.path / file).read_text()) for file in ("answers.json", "per_question.json"))
        for question, record, right in zip(made, records, per_question["em"], strict=True):
            question["systems"][name] = {"answer": record["answer"], "logprob": record["logprob"], "em": right}
        if retrieved := shelf.get(artifact.manifest["made_from"]["retrieved"]):
            retriever = AFTER if retrieved.manifest["stage"].endswith("-tuned") else BEFORE
            if retriever not in members:
                members[retriever] = list(Retrieval(retrieved.path, examples, pipeline.store))
            lm = "tuned LM" if shelf.get(artifact.manifest["made_from"]["lm"]) else "untuned LM"
            for question, record, member in zip(made, records, members[retriever]):
                _add_passages(question, record, member, retriever, lm, artifact.manifest["made_from"])
    return [{**question, "passages": list(question["passages"].values())} for question in made]


def _add_passages(
    question: dict[str, Any], record: Mapping[str, Any], member: Retrieved, retriever: str, lm: str, made_from: Mapping[str, Any]
) -> None:
    """Rank, weights and what the LM says from each passage, beside what other systems have put there. Old records do not say the last."""
    k, answers = made_from["options"]["k"], question["answers"]
    if not member.passages:
        return
    question["first"][retriever] = metrics.first_right(member.passages, member.example)
    weights_K = np.exp(passage_logweights(member.scores_K[:k], made_from["score_scale"]))
    said = list(zip(record.get("own_texts", ()), record.get("own_logprobs", ())))
    apart = made_from["options"]["level"] == "sequence" and len(said) == k
    for at, (passage, weight) in enumerate(zip(member.passages[:k], weights_K)):
        holds = metrics.contains_answer(passage.content, answers)
        new = {"id": passage.id, "title": passage.title, "text": passage.text, "holds": holds, "weights": {}, "said": {}}
        entry = question["passages"].setdefault(passage.id, new)
        entry["weights"][retriever] = float(weight)
        if apart:
            answer, logprob = said[at]
            entry["said"][lm] = {"answer": answer, "logprob": logprob, "right": metrics.exact_match(answer, answers)}


def by_k(shelf: Shelf, artifact: Artifact) -> list[tuple[int, dict[str, Any]]]:
    """Exact match of this system by number of passages, from the rows that differ from this one in nothing else."""
    if not artifact.manifest["made_from"]["retrieved"]:
        return []
    same = _but_for_k(shelf, artifact)
    found: dict[int, dict[str, Any]] = {}
    for other in shelf.by_fingerprint.values():
        if other.manifest["stage"] == artifact.manifest["stage"] and _but_for_k(shelf, other) == same:
            k = other.manifest["made_from"]["options"]["k"]
            found[k] = json.loads((other.path / "row.json").read_text())["metrics"]["em"]
    return sorted(found.items())


def _but_for_k(shelf: Shelf, artifact: Artifact) -> dict[str, Any]:
    """What a row was made from, whatever its k and however many passages were retrieved for it."""
    made_from = artifact.manifest["made_from"]
    retrieved = shelf.get(made_from["retrieved"])
    options = {key: value for key, value in made_from["options"].items() if key != "k"}
    found = retrieved and {key: value for key, value in retrieved.manifest["made_from"].items() if key != "k"}
    return {**made_from, "options": options, "retrieved": found}


# -- the rest ---------------------------------------------------------------------------------------------------------------------------


def _about(c: ConfigDict) -> str:
    return f"Questions of {c.test.source} over {c.corpus.source}, answered by {c.lm.checkpoint} with {c.retriever.query_encoder}."


def _paper(source: str) -> dict[str, Any] | None:
    """The paper's figures of the task that these questions are of, by the name of their set, file or folder."""
    names = listed(source)
    place = "/".join(names[0].lower().split("/")[-2:]) if len(names) == 1 else ""
    task = next((task for task in PAPER_EM if re.search(rf"(?<![a-z0-9]){task}(?![a-z0-9])", place)), None)
    if task is None:
        return None
    rows = {ours: {shots: paper.ROWS[shots][theirs][task] for shots in paper.ROWS} for ours, theirs in PAPER_ROWS.items()}
    return {"task": task, "rows": rows}


def _tasks(workdir: Path) -> dict[str, Any] | None:
    """The last table of launch/evaluate.py --tasks, if there was one."""
    path = workdir / "tasks.json"
    return json.loads(path.read_text()) if path.exists() else None


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions(pipeline: Pipeline) -> dict[str, str]:
    """Of what wrote the page: packages, Python, platform and devices. No more: an environment may hold what is nobody's business."""
    devices = pipeline.mesh.devices
    shown = f"{devices.size} × {devices.flat[0].device_kind} ({devices.flat[0].platform}), {distributed.count()} process(es)"
    system = f"{platform.system()} {platform.machine()}"
    return {**package_versions(PACKAGES), "python": platform.python_version(), "platform": system, "devices": shown}


def flat(config: ConfigDict | Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field."""
    for key, value in config.items():
        if isinstance(value, (ConfigDict, Mapping)):
            yield from flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (name for one in value.values() for name in _strings(one))
    elif isinstance(value, Sequence):
        yield from (name for one in value for name in _strings(one))
