"""The report of a run: what strangers wrote is text there, it fetches nothing, charts stand where numbers say, old workdirs have one."""

from __future__ import annotations

import html.parser
import json
import math
import re
import types
from pathlib import Path

import numpy as np
import pytest
import tiny

from configs import common
from radit_jax import artifacts, dossier
from radit_jax.data import corpus
from radit_jax.evaluation import charts, evaluate, findings, markup, metrics, page
from radit_jax.inference.ensemble import Answer
from radit_jax.logbook import Logbook
from radit_jax.retrieval.retrieve import Found, Retrieval, write_retrieval
from radit_jax.table import ROWS
from radit_jax.types import Example

K = 4
EVIL = "<script>alert(1)</script><img src='https://example.com/x.png' onerror=alert(2)> \x1b[31m\u202e\ud800 &amp; </summary></details>"


class Reader(html.parser.HTMLParser):
    """A page as elements and text. Raises where an element is closed that is not the last open one."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.attributes += attrs
        if tag not in markup.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.words.append(data)

    def values(self, *names: str) -> list[str | None]:
        return [value for name, value in self.attributes if name in names]

    @property
    def text(self) -> str:
        return "".join(self.words)


def question(number: int, right: dict[str, float], first: tuple[int | None, int | None] = (1, 0), text: str = "moss") -> dict:
    said = {"untuned LM": {"answer": text, "logprob": -1.5, "right": True}, "tuned LM": {"answer": "tern", "logprob": -2.0, "right": False}}
    passages = [
        {"id": f"p{n}", "title": text, "text": text, "holds": n == 1, "weights": {"untuned": w, "R-ft": 1 - w}, "said": said}
        for n, w in enumerate((0.7, 0.3))
    ]
    systems = {name: {"answer": text, "logprob": -1.0, "em": right.get(name, 0.0)} for name in ROWS}
    named = {"id": f"q{number}", "question": f"which {text}?", "answers": [text]}
    return {**named, "systems": systems, "first": dict(zip(("untuned", "R-ft"), first)), "passages": passages}


def data(text: str = "moss") -> dict:
    """All of it, small."""
    value = {"mean": 0.5, "ci95": [0.25, 0.75]}
    found = {"n": 3, "metrics": {"em": value, "f1": value, "recall@1": value}}
    steps = [{"step": n, "loss": 1 / n, "target_entropy": math.log(K), "retriever_entropy": 1.0, "top1_agrees": 0.5} for n in range(1, 41)]
    return {
        "title": f"a run {text}",
        "about": text,
        "rows": [{"name": name, **found} for name in ROWS],
        "differences": {"both − LM-ft only": {"em": value}},
        "paper": {"task": "nq", "rows": {"both": {0: 35.2, 5: 43.9}}},
        "tasks": {"rows": {"both": {"own": found}}, "metrics": {"own": "em"}, "shots": 0, "paper": {"RA-DIT 65B": {"own": 12.3}}},
        "trainings": [
            {"name": "LM-ft", "lines": steps[:5], "rates": [(1, 0.0), (2, 1e-5)], "chosen": None},
            {"name": "R-ft", "lines": [*steps, {"step": 20, "validation_mrr": 0.5}], "rates": [(1, 1e-5), (2, 1e-6)], "chosen": 20},
        ],
        "candidates": K,
        "questions": [
            question(0, dict.fromkeys(ROWS, 1.0), text=text),
            question(1, {"both": 1.0}, (None, 2), text=text),
            question(2, {"LM-ft only": 1.0}, (0, None), text=text),
        ],
        "favourite": [{"x": 0.25, "y": 0.5, "n": 8}],
        "by_k": {"both": [(1, value), (3, value)]},
        "stages": [{"stage": "lm_ft", "folder": "lm_ft-0", "facts": {"seconds": 61.0, "peak_memory_mib": 1234, "tokens_per_s": 5.0}}],
        "config": {"corpus.source": text},
        "versions": {"jax": "0"},
    }


def test_what_strangers_wrote_is_text():
    written = page.html(data(EVIL))
    read = Reader(written)
    assert not {"script", "img"} & set(read.names) and not read.values("src", "onerror")
    assert (
        "<script>alert(1)</script><img src='https://example.com/x.png' onerror=alert(2)>" in read.text and "&amp; </summary>" in read.text
    )
    assert not {"\x1b", "\u202e", "\ud800"} & set(written) and "[U+001B][31m[U+202E][U+D800]" in written
    assert Reader(page.html(data())).names == read.names  # no text adds an element


def test_it_fetches_nothing():
    read = Reader(page.html(data()))
    assert read.values("src", "srcset", "data", "action", "style") == [] and all(
        link.startswith("#") for link in read.values("href", "xlink:href")
    )
    assert "url(" not in read.text and "@import" not in read.text and not {"link", "script", "iframe", "object"} & set(read.names)
    assert "default-src 'none'; style-src 'unsafe-inline'" in read.values("content")


def test_links_lead_to_sections_and_names_are_used_once():
    read = Reader(page.html(data()))
    ids = read.values("id")
    assert len(ids) == len(set(ids)) and {link[1:] for link in read.values("href")} <= set(ids)
    assert {link[1:] for link in read.values("href")} == {name for name, *_ in page.SECTIONS}


def test_every_system_has_its_row_beside_the_paper():
    shown = page.html(data())
    rows = re.findall(r"<tr><td>([^<]*)</td><td class=\"number\">50\.0<small>25\.0 – 75\.0</small>", shown)
    assert [name for name in rows if name in ROWS][: len(ROWS)] == list(ROWS)
    assert '<td class="number">35.2</td><td class="number">43.9</td>' in shown and "paper: RA-DIT 65B" in shown and "12.3" in shown


PARTS = {
    "paper": (),
    "differences": (),
    "tasks": ("tasks",),
    "by_k": ("by-k",),
    "stages": ("stages",),
    "trainings": ("training", "entropy"),
    "candidates": ("entropy",),
    "questions": ("questions", "ranks"),
    "config": (),
    "versions": (),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_is_missing_is_left_out(part):
    whole = data()
    there = {name for name, *_ in page.SECTIONS}
    read = Reader(page.html({name: value for name, value in whole.items() if name != part}))
    assert there - set(read.values("id")) == set(PARTS[part])


def test_a_table_alone_is_a_page():
    read = Reader(page.html({"title": "t", "rows": data()["rows"]}))
    assert [link[1:] for link in read.values("href")] == ["systems"] and "both" in read.text


# -- charts -----------------------------------------------------------------------------------------------------------------------------


def heights(path: str) -> list[float]:
    """The y of every point of a path M x y L x y …"""
    return [float(pair.split()[1]) for pair in path.removeprefix("M").split("L")]


def test_a_flat_target_lies_on_the_line_at_log_k():
    figure = next(part for part in page.html(data()).split("<figure>") if "Entropy of the target" in part)
    drawn, rule = (heights(re.search(rf'<path d="([^"]*)" class="line {kind}">', figure)[1]) for kind in ("s0", "rule"))
    assert set(drawn) == set(rule) and len(rule) == 2
    assert f"log {K} = {math.log(K):.2f}" in figure
    own = heights(re.search(r'<path d="([^"]*)" class="line s1">', figure)[1])
    assert min(own) > rule[0]  # 1.0 nats is below log 4, and y goes down


def test_points_stand_where_the_numbers_say():
    frame = charts.Frame([0, 10], [0.0, 4.0])
    assert frame.x(0) == charts.LEFT and frame.x(10) == charts.WIDTH - charts.RIGHT
    assert frame.y(0) == charts.HEIGHT - charts.BOTTOM and frame.y(4) == charts.TOP and frame.y(2) == (frame.y(0) + frame.y(4)) / 2


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 340), (-0.3, 0.2), (1e-6, 1e-4), (5, 5), (0, 0), (-2, -2), (3, 1e7)])
def test_ticks_are_even_and_go_around_what_is_shown(low, high):
    found = charts.ticks(low, high)
    steps = np.diff(found)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 9
    np.testing.assert_allclose(steps, steps[0])


def test_labels_are_short():
    assert [charts.number(value) for value in (0, 0.5, 1500, -0.25, 2.5e-5, 1e-4)] == ["0", "0.5", "1,500", "−0.25", "2.5e−5", "1e−4"]


# -- findings ---------------------------------------------------------------------------------------------------------------------------


def test_won_lost_and_moved():
    asked = data()["questions"]
    found = findings.changed(asked, "both", "LM-ft only")
    assert [[q["id"] for q in found[kind]] for kind in ("won", "lost")] == [["q1"], ["q2"]]
    assert [q["id"] for q in findings.sample(asked, 2)] == ["q1", "q2"]
    moved = findings.moves([*asked, question(3, {}, (None, None)), question(4, {}, (2, 2))])
    assert moved == {(1, 0): 1, (None, 2): 1, (0, None): 1, (None, None): 1, (2, 2): 1}
    assert findings.directions(moved) == {"up": 2, "down": 1, "where it was": 1, "never found": 1}


def test_weights_are_compared_with_what_passages_are_good_for():
    asked = data()["questions"]
    bins = findings.calibration(asked, "untuned")
    assert list(bins) == ["it holds an answer", "the untuned LM is right from it", "the tuned LM is right from it"]
    assert [(round(one["x"], 6), one["y"], one["n"]) for one in bins["it holds an answer"]] == [(0.3, 1.0, 3), (0.7, 0.0, 3)]
    assert round(findings.mass(asked, "untuned"), 6) == 0.3 and round(findings.mass(asked, "R-ft"), 6) == 0.7
    assert findings.mass(asked, "another") is None and findings.binned([]) == []
    assert [one["n"] for one in findings.binned([(1.0, 1), (0.95, 0)])] == [2]  # 1 belongs to the last tenth


def test_curves_keep_their_mean_when_they_are_smoothed_and_thinned():
    points = [(n, 3.0 * n) for n in range(1000)]
    thin = findings.thinned(points, 100)
    assert len(thin) == 100 and all(y == pytest.approx(3 * x) for x, y in thin)
    inner = findings.smoothed(points)[100:-100]
    assert all(y == pytest.approx(3 * x) for x, y in inner) and findings.smoothed([(1, 2.0)]) == [(1, 2.0)]


# -- a workdir --------------------------------------------------------------------------------------------------------------------------


class Run:
    """A workdir as a run leaves it, without its models: 3 questions, 4 passages, all five systems, one of them at another k as well."""

    def __init__(self, workdir: Path):
        self.workdir, self.config, self.mesh = workdir, common.base(), tiny.mesh(1, 1)
        self.test_examples = [
            Example(f"q{n}", f"who {n}?", f"Q: who {n}?\nA:", f" {word}", (word,)) for n, word in enumerate(tiny.WORDS[:3])
        ]
        texts = [(f"d{n}", f"Title {n}", f"It was {word}.") for n, word in enumerate(tiny.WORDS[:K])]
        documents = [types.SimpleNamespace(id=id, title=title, text=text) for id, title, text in texts]
        passages = self.made("passages", {}, lambda folder: corpus.build_store(documents, folder, max_words=60))
        self.store = corpus.PassageStore(passages.path)
        vectors = self.made("vectors", {"passages": passages.fingerprint})
        self.made("index", {"vectors": vectors.fingerprint})
        before = self.retrieved("retrieved-test", vectors, [[1, 0, 2, 3], [1, 0, 2, 3], [0, 1, 3, 2]])
        train = self.retrieved("retrieved-train", vectors, [[0, 1, 2, 3]] * 3)
        scores = self.made("lm_scores-train", {"retrieved": train.fingerprint}, self.scores)
        optimizer = {"peak_lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 2, "decay": "linear"}
        options = {"steps": 6, "optimizer": optimizer}
        lm = self.made("lm_ft", {"retrieved": train.fingerprint, "options": options}, self.curves("loss"))
        options = {"epochs": 4, "completion_share": 0.25, "batch": 2, "optimizer": optimizer}
        r_ft = self.made("lsr_ft", {"scores": {"train": scores.fingerprint}, "options": options}, self.curves("target_entropy"))
        after = self.retrieved("retrieved-test-tuned", vectors, [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 3, 2]], encoder=r_ft.fingerprint)
        found = {None: None, False: before, True: after}
        self.rows = {name: self.row(name, lm.fingerprint if tuned else "lm:0", found[way]) for name, (tuned, way) in ROWS.items()}
        self.row("both", lm.fingerprint, after, k=3)
        self.row("both", "another", after, k=4)

    def made(self, stage: str, made_from: dict, write=lambda folder: {}) -> artifacts.Artifact:
        return artifacts.make(self.workdir, stage, made_from, lambda folder: {**(write(folder) or {}), "seconds": 1.0})

    def retrieved(self, stage: str, vectors: artifacts.Artifact, rows, encoder: str = "encoder:0") -> artifacts.Artifact:
        ids = np.array([example.id.encode() for example in self.test_examples])
        passage_ids = np.array([[self.store[row].id.encode() for row in of_one] for of_one in rows])
        found = Found(ids, passage_ids, np.array(rows), np.tile(np.float32([0.4, 0.3, 0.2, 0.1]), (3, 1)))
        made_from = {"vectors": vectors.fingerprint, "query_encoder": encoder, "k": K, "queries": stage}
        return self.made(stage, made_from, lambda folder: write_retrieval(folder, Retrieval(found, self.test_examples, self.store)))

    def scores(self, folder: Path) -> None:
        """The LM likes the second passage best, whatever the question."""
        columns = {
            "example_ids": ["q0", "q1", "q2"],
            "passage_ids": [[self.store[row].id for row in range(K)]] * 3,
            "target_lengths": [1] * 3,
        }
        for name, values in {**columns, "logp": np.float32([[-2, -1, -3, -4]] * 3)}.items():
            np.save(folder / f"{name}-00000.npy", np.asarray(values))

    def curves(self, key: str):
        def write(folder: Path) -> dict:
            book = Logbook(folder)
            for step in range(1, 7):
                book.write(step, {"loss": 1.0 / step, key: 1.0})
            book.close()
            return {"steps": 6, "questions": 3, "best_step": 4}

        return write

    def row(self, name: str, lm: str, retrieved: artifacts.Artifact | None, k: int = 2) -> artifacts.Artifact:
        way = None if retrieved is None else retrieved.fingerprint
        options = {"k": k, "level": "sequence", "max_new_tokens": 4}
        made_from = {"name": name, "lm": lm, "retrieved": way, "score_scale": 20.0, "options": options, "questions": "3"}

        def write(folder: Path) -> dict:
            found = None if retrieved is None else list(Retrieval(retrieved.path, self.test_examples, self.store))
            own = ("oak",) if found is None else ("moss", "tern", "oak", "oak")[:k]
            answers = [Answer("moss", -1.0, own, tuple(-1.0 - n for n in range(len(own)))) for _ in self.test_examples]
            evaluate.write_row(folder, name, self.test_examples, answers, found)
            return {}

        return self.made(f"row-{name.replace(' ', '_')}", made_from, write)

    def value(self) -> dict:
        rows = [json.loads((artifact.path / "row.json").read_text()) for artifact in self.rows.values()]
        return {"rows": rows, "differences": {}}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def test_a_workdir_is_read_from_its_rows_back_to_its_corpus(run):
    (run.workdir / "lm_ft-broken.partial").mkdir(exist_ok=True)
    (run.workdir / "lm_ft-broken.partial" / "manifest.json").write_text("{")
    found = dossier.gather(run, run.value(), run.rows)
    stages = [stage["stage"] for stage in found["stages"]]
    assert (
        stages.index("passages") < stages.index("vectors") < stages.index("index") < stages.index("retrieved-test") < stages.index("lsr_ft")
    )
    assert len(stages) == len(set(stages)) == 14  # the rows at another k are not of this table
    assert found["candidates"] == found["depth"] == K
    assert [(one["y"], one["n"]) for one in found["favourite"]] == [(0.0, 6), (1.0, 3), (0.0, 3)]  # it likes the one of weight 0.12


def test_passages_carry_weights_and_what_each_lm_says(run):
    first, second, _ = dossier.gather(run, run.value(), run.rows)["questions"]
    assert first["first"] == {"untuned": 1, "R-ft": 0} and second["first"] == {"untuned": 0, "R-ft": 2}
    by_title = {passage["title"]: passage for passage in first["passages"]}
    assert [by_title[title]["holds"] for title in ("Title 0", "Title 1")] == [True, False]
    weights = np.array([[passage["weights"][retriever] for passage in by_title.values()] for retriever in ("untuned", "R-ft")])
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    np.testing.assert_allclose(weights[0] / weights[1], [np.exp(2), np.exp(-2)], rtol=1e-5)  # (0.4 − 0.3) · 20, the other way round
    assert set(by_title["Title 1"]["said"]) == {"untuned LM", "tuned LM"}
    assert first["systems"]["both"]["em"] == 1.0 and second["systems"]["both"]["em"] == 0.0


def test_rows_that_differ_in_k_alone_are_a_curve(run):
    found = dossier.gather(run, run.value(), run.rows)["by_k"]
    assert {name: [k for k, _ in curve] for name, curve in found.items() if len(curve) > 1} == {"both": [2, 3]}


def test_learning_rates_are_those_of_the_schedule(run):
    lm_ft, r_ft = dossier.gather(run, run.value(), run.rows)["trainings"]
    steps, rates = zip(*lm_ft["rates"])
    np.testing.assert_allclose(rates, [0, 5e-3, 1e-2, 1e-2 - 9e-3 / 4, 1e-2 - 2 * 9e-3 / 4, 1e-2 - 3 * 9e-3 / 4], rtol=1e-5)
    assert steps == (1, 2, 3, 4, 5, 6) and r_ft["chosen"] == 4
    assert dict(r_ft["rates"])[6] == pytest.approx(1e-2 - 9e-3 * 3 / 6)  # 4 epochs of 3 questions at 0.75 of batches of 2: 8 steps


def test_the_page_of_a_workdir_and_of_an_old_one(run, tmp_path):
    path = dossier.write(run, run.value(), run.rows)
    assert path == run.workdir / "report.html" and path.read_bytes().isascii()
    read = Reader(path.read_text())
    assert {"systems", "by-k", "ranks", "calibration", "training", "entropy", "stages", "questions", "config"} <= set(read.values("id"))
    assert "the tuned LM is right from it" in read.text and "It was moss." in read.text
    old = Run(tmp_path)
    for answers in tmp_path.glob("row-*/answers.json"):
        records = [{key: value for key, value in one.items() if not key.startswith("own_")} for one in json.loads(answers.read_text())]
        answers.write_text(json.dumps(records))
    for file in tmp_path.glob("l*_ft-*/metrics.jsonl"):
        file.unlink()
    read = Reader(dossier.write(old, old.value(), old.rows).read_text())
    assert "the tuned LM is right from it" not in read.text and "it holds an answer" in read.text and "entropy" not in read.values("id")


def test_the_paper_stands_beside_its_own_questions_alone():
    assert dossier._paper("/data/nq_wiki/dev.jsonl")["rows"]["both"] == {0: 35.2, 5: 43.9}
    assert dossier._paper("trex:trex-dev.jsonl")["task"] == "trex"
    assert [dossier._paper(source) for source in ("invented", "/data/nqs/dev.jsonl", "nq:a.jsonl,tqa:b.jsonl", "")] == [None] * 4


def test_versions_say_nothing_of_the_environment(run, monkeypatch):
    monkeypatch.setenv("A_SECRET", "do not tell")
    found = dossier.versions(run)
    assert {"jax", "flax", "python", "platform", "devices"} <= set(found) and "do not tell" not in str(found)


def test_intervals_of_metrics_are_what_the_page_reads():
    found = metrics.summarize({"em": [1.0, 0.0]})
    assert "50.0" in markup.interval(found["em"])
