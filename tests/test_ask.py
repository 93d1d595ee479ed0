"""A question to one system or to four: what is told of it, as JSON and on a terminal, and that streamed answers are the ensemble's."""

from __future__ import annotations

import functools
import json
import re
import signal
import unicodedata
import urllib.request
import zlib

import jax
import numpy as np
import processes
import pytest
import tiny
from flax import nnx
from ml_collections import ConfigDict
from torture import command, export_models

from radit_jax import ask, terminal
from radit_jax.errors import InputError
from radit_jax.evaluation.metrics import normalize
from radit_jax.inference import streaming
from radit_jax.inference.ensemble import Ensemble, passage_logweights

K, NEW_TOKENS, ASKED = 3, 4, 4
EVIL = "\x1b]0;x\x07\x9b2J\r\n\u202e\x00\u009d"
HISTORY = ("moss tern", "loch", "ruby vale", "oak")
WORDS = ("moss", "tern", "loch", "ruby", "vale", "iris", "dune", "wren")  # all as long, so that prompts are, and compiles few
PASSAGES = [ask.Passage(f"p{i}", WORDS[i % 8], f"{WORDS[(3 * i + 1) % 8]} {WORDS[(5 * i + i // 8) % 8]}.") for i in range(12)]


@functools.cache
def tuned_lm() -> nnx.Module:
    graphdef, params = nnx.split(tiny.lm())
    return nnx.merge(graphdef, jax.tree.map(lambda p: p * 1.2, params))


@functools.cache
def ensemble(tuned: bool = False) -> Ensemble:
    return Ensemble(tuned_lm() if tuned else tiny.lm(), tiny.maker(), batch_tokens=600, max_new_tokens=NEW_TOKENS)


class Workdir:
    """Stands for a Pipeline and its searcher and store: tiny models, and a list of what was loaded."""

    def __init__(self, folder, has=("lm_ft", "lsr_ft"), passages=None):
        tiny.tokenizer().save(folder)
        retriever = {"score_scale": 2.0, "max_query_tokens": 32, "query_encoder": str(folder)}
        self.config = ConfigDict({"evaluate": {"k": K, "batch_tokens": 600}, "retriever": retriever})
        self.held, self.loaded, self.queries = has, [], []
        self.passages = passages or PASSAGES
        self.store = self

    def has(self, stage: str) -> bool:
        return stage in self.held

    def ensemble(self, tuned: bool) -> Ensemble:
        self.loaded.append(f"LM {tuned}")
        return ensemble(tuned)

    def embed_queries(self, tuned: bool):
        self.loaded.append(f"encoder {tuned}")

        def embed(texts):
            self.queries += texts
            seeds = (zlib.crc32(f"{tuned} {text}".encode()) for text in texts)
            return np.stack([np.random.default_rng(seed).normal(size=tiny.ENCODER_CONFIG.width) for seed in seeds]).astype(np.float32)

        return embed

    def searcher_of(self, tuned: bool) -> "Workdir":
        return self

    def search(self, queries_BxE, k):
        scores_BxN = queries_BxE @ tiny.vectors().T
        rows_BxK = np.argsort(-scores_BxN, axis=-1)[:, :k]
        return rows_BxK, np.take_along_axis(scores_BxN, rows_BxK, -1)

    def read(self, rows):
        return [self.passages[row] for row in rows]


@pytest.fixture
def workdir(tmp_path) -> Workdir:
    return Workdir(tmp_path)


def prompted():
    ensemble().batch_tokens = 1  # a question at a time
    for n, word in enumerate(WORDS[:ASKED]):
        chosen = [PASSAGES[(n + step) % 12] for step in (0, 4, 9)]
        logw_K = passage_logweights(np.asarray([0.9, 0.7, 0.4]), 2.0)
        yield ensemble().prompted(word, f"Q: {word}?\nA:", [passage.content for passage in chosen], logw_K)


def same(found, expected) -> None:
    """Answers of two ways of computing them."""
    assert found.text == expected.text
    np.testing.assert_allclose(found.logprob, expected.logprob, atol=1e-4)


def same_own(found, expected) -> None:
    assert found.own_texts == expected.own_texts
    np.testing.assert_allclose(found.own_logprobs, expected.own_logprobs, atol=1e-4)


# -- streaming --------------------------------------------------------------------------------------------------------------------


def test_streamed_tokens_are_the_answer_of_the_ensemble_at_token_level():
    questions, lengths = list(prompted()), set()
    expected = ensemble().generate(questions, level="token")
    alone = ensemble().generate(questions)
    for question, whole, own in zip(questions, expected, alone):
        heard = []
        answer = streaming.by_token(ensemble(), question, lambda text, logp: heard.append((text, logp)))  # noqa: B023
        same(answer, whole)
        same_own(answer, own)
        assert heard[-1][0] == answer.text if heard else answer.text == ""
        assert all(after.startswith(before) and p > q for (before, p), (after, q) in zip(heard, heard[1:]))
        lengths.add(len(heard))
    assert max(lengths) == NEW_TOKENS and len(lengths) > 1  # some end by themselves


def test_streamed_passages_end_with_the_answer_of_the_ensemble_at_sequence_level():
    questions = list(prompted())
    for question, expected in zip(questions, ensemble().generate(questions)):
        heard = []
        answer = streaming.by_passage(ensemble(), question, lambda k, text, logp: heard.append((k, text, logp)))  # noqa: B023
        same(answer, expected)
        same_own(answer, expected)
        assert sorted(heard) == [(k, *said) for k, said in enumerate(zip(answer.own_texts, answer.own_logprobs))]


# -- one system -------------------------------------------------------------------------------------------------------------------


def test_one_system_is_told_as_the_contract_says(workdir):
    told = ask.Asker(workdir).ask(ask.question(" moss? "))
    plain = ask.plain(told)
    assert set(plain) == {"question", "answer", "passages"} and plain["question"] == " moss? "
    assert [set(p) for p in plain["passages"]] == [{"id", "title", "text", "score", "weight", "answer", "logprob"}] * K
    scores_K = np.asarray([p["score"] for p in plain["passages"]])
    assert (np.diff(scores_K) <= 0).all()
    np.testing.assert_allclose([p["weight"] for p in plain["passages"]], np.exp(2 * scores_K) / np.exp(2 * scores_K).sum(), rtol=1e-5)
    assert workdir.loaded == ["encoder True", "LM True"] and workdir.queries == ["moss?"]
    untuned = ask.Asker(workdir).ask(ask.question("moss?"), untuned=True)
    assert workdir.loaded[2:] == ["encoder False", "LM False"] and untuned["logprob"] != told["logprob"]


def test_what_is_heard_ends_in_the_same_answer(workdir):
    asker, heard = ask.Asker(workdir), []
    asked = ask.question("tern?")
    quiet = asker.ask(asked)
    told = asker.ask(asked, heard=lambda title, text, logp: heard.append((title, text)))
    assert told["answer"] == quiet["answer"] and sorted(heard) == sorted((p["title"], p["answer"]) for p in told["passages"])
    by_token = asker.ask(asked, level="token", heard=lambda title, text, logp: heard.append((title, text)))
    assert heard[-1] == ("", by_token["answer"])
    assert asker.ask(asked, level="token") == by_token


def test_overruled_is_what_the_ensemble_does_not_say_whatever_case_and_articles(workdir):
    found = ask.Found(tuple(PASSAGES[:3]), np.zeros(3, np.float32), np.log(np.full(3, 1 / 3, np.float32)))
    answer = ask.Answer("The Moss.", -1.0, ("moss", "Moss?", "tern"), (-1.0, -2.0, -3.0))
    assert [p["overruled"] for p in ask._told(found, answer)["passages"]] == [False, False, True]
    for told in (ask.Asker(workdir).ask(ask.question(f"{word}?")) for word in WORDS[:4]):
        assert all(p["overruled"] == (normalize(p["answer"]) != normalize(told["answer"])) for p in told["passages"])


# -- four systems -----------------------------------------------------------------------------------------------------------------


def test_systems_are_those_whose_models_are_there(tmp_path):
    def held(*has):
        asker = ask.Asker(Workdir(tmp_path, has))
        return list(asker.systems), asker.missing

    assert held("lm_ft", "lsr_ft") == (["closed book", "neither tuned", "LM-ft only", "both"], {})
    assert held("lm_ft") == (["closed book", "neither tuned", "LM-ft only"], {"both": "no tuned query encoder"})
    assert held("lsr_ft")[1] == {"LM-ft only": "no tuned LM", "both": "no tuned LM"}
    assert held()[1]["both"] == "no tuned LM and no tuned query encoder"


def test_systems_answer_many_questions_as_each_alone_and_load_a_model_once(workdir):
    asker = ask.Asker(workdir)
    asker.load()
    asked = [ask.question(f"{word}?") for word in ("moss", "tern")]
    together = asker.compare(asked)
    assert sorted(workdir.loaded) == ["LM False", "LM True", "encoder False", "encoder True"]
    for one, told in zip(asked, together):
        (alone,) = asker.compare([one])
        assert list(told) == ["question", "systems"] and list(told["systems"]) == list(ask.SYSTEMS)
        for name, system in told["systems"].items():
            assert list(system) == ["answer", "logprob", "passages"] and len(system["passages"]) == (0 if name == "closed book" else K)
            assert system["answer"] == alone["systems"][name]["answer"]
            np.testing.assert_allclose(system["logprob"], alone["systems"][name]["logprob"], atol=1e-4)
    # The best system is the one that is asked alone; the two with the untuned retriever have the same passages.
    assert asker.ask(asked[0])["passages"][0]["id"] == together[0]["systems"]["both"]["passages"][0]["id"]
    ids = {name: [p["id"] for p in of["passages"]] for name, of in together[0]["systems"].items()}
    assert ids["neither tuned"] == ids["LM-ft only"] != ids["both"]
    assert len(workdir.loaded) == 4


def test_a_single_question_is_not_computed_many_times(workdir):
    before = ensemble().computed
    asker = ask.Asker(workdir)
    asker.ask(ask.question("moss?"), untuned=True)
    assert ensemble().computed - before <= 600 / 3  # a call of the config's size would be filled with copies


# -- history ----------------------------------------------------------------------------------------------------------------------


def test_a_dialogue_has_the_prompt_of_training_on_dialogues():
    assert ask.example(ask.question(" dune? ")).prompt == "Q: dune?\nA:"
    assert ask.example(ask.question("dune?", HISTORY)).prompt == "Q: moss tern A: loch Q: ruby vale A: oak Q: dune? A:"


def test_a_question_that_is_none_is_refused():
    for text, expected in ((" \n", "empty"), ("caf\udce9", "not Unicode")):
        with pytest.raises(InputError, match=expected):
            ask.question(text)


def test_the_query_of_a_long_dialogue_keeps_the_question(workdir):
    asker = ask.Asker(workdir)
    whole, cut = (asker._query(ask.question("dune?", history)) for history in (HISTORY[2:], HISTORY * 9))
    assert whole == "ruby vale\noak\ndune?"
    assert cut.endswith("oak\ndune?") and len(tiny.tokenizer().encode(cut)) <= 32


def test_history_is_read_from_a_file_and_refused_with_file_and_line(tmp_path):
    path = tmp_path / "chat.jsonl"

    def read(*messages):
        path.write_text("".join(json.dumps(message) + "\n" for message in messages))
        return ask.read_history(path)

    user, assistant = {"role": "user", "content": " moss? "}, {"role": "assistant", "content": "tern"}
    assert read() == () and read(user, assistant) == ("moss?", "tern")
    for messages, expected in (
        ([assistant], ["chat.jsonl:1", "'assistant'", "'user'"]),
        ([user, user], ["chat.jsonl:2", "'assistant'"]),
        ([user], ["chat.jsonl:1", "last turn"]),
        ([user, {"role": "assistant"}], ["chat.jsonl:2", '"content"']),
        ([{"role": "system", "content": "x"}], ["chat.jsonl:1", "'system'"]),
    ):
        with pytest.raises(InputError) as error:
            read(*messages)
        assert all(part in str(error.value) for part in expected), error.value
    with pytest.raises(InputError, match="nowhere"):
        ask.read_history(tmp_path / "nowhere.jsonl")


# -- the terminal -----------------------------------------------------------------------------------------------------------------


def controls(text: str) -> set[str]:
    return {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n"}


def test_harmless_text_has_no_control_characters_and_keeps_what_people_write():
    assert controls(terminal.harmless(EVIL)) == set() and "\n" not in terminal.harmless(EVIL)
    assert terminal.harmless("a\x1b[31mb\tc\u2028d\u202ee\ud800") == "a\ufffd[31mb c de\ufffd"
    kept = "Zoë – 日本 نامه‌ای 👩‍🔬 ½ [bold]x[/bold]"
    assert terminal.harmless(kept) == kept


def test_nothing_of_an_evil_corpus_reaches_the_terminal(tmp_path, monkeypatch, capsys):
    evil = [ask.Passage(p.id, f"{EVIL}", p.title + EVIL) for p in PASSAGES]
    text_of = terminal.ask.Answer

    def says_evil(text, logprob, own_texts, own_logprobs):
        return text_of(f"{text}{EVIL}", logprob, tuple(f"{own}{EVIL}" for own in own_texts), own_logprobs)

    monkeypatch.setattr(streaming, "Answer", says_evil)
    monkeypatch.setattr("radit_jax.inference.ensemble.Answer", says_evil)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    how = {"history": None, "compare": False, "untuned": False, "level": "sequence", "as_json": False}
    for changes in ({}, {"level": "token"}, {"compare": True}, {"as_json": True}, {"compare": True, "as_json": True}):
        terminal.answer(lambda: Workdir(tmp_path, passages=evil), "moss?", **{**how, **changes})
        shown, said = capsys.readouterr()
        assert controls(shown + said) == set(), changes
        assert "]0;x" in shown
        if "as_json" in changes:
            told = json.loads(shown)
            passages = told["systems"]["both"]["passages"] if "compare" in changes else told["passages"]
            assert passages[0]["title"] == EVIL


def test_the_terminal_shows_the_answer_first_and_each_passage_below(workdir, capsys):
    how = {"history": None, "compare": False, "untuned": False, "as_json": False}
    for level in ("sequence", "token"):
        terminal.answer(lambda: workdir, "tern?", level=level, **how)
        lines = capsys.readouterr().out.splitlines()
        told = ask.Asker(workdir).ask(ask.question("tern?"), level=level)
        assert lines[0] == told["answer"] and len(lines) == 2 + K
        for line, passage in zip(lines[2:], told["passages"]):
            assert f"{passage['weight']:.3f}" in line and passage["title"] in line and repr(passage["answer"]) in line
            assert line.endswith(", overruled") == passage["overruled"]


def test_the_listener_prints_an_answer_once_also_where_its_characters_come_in_halves(capsys):
    for heard, whole in ((["Z", "Zo", "Zo\ufffd", "Zoë"], "Zoë"), (["a ", "b"], "c"), ([], "x")):
        listener = terminal.Listener()
        for text in heard:
            listener("", text, -1.0)
        listener.end(whole)
        assert capsys.readouterr().out.splitlines()[-1] == whole


def test_systems_stand_side_by_side_and_those_that_are_missing_are_named(tmp_path, capsys):
    how = {"history": None, "compare": True, "untuned": False, "level": "sequence", "as_json": False}
    terminal.answer(lambda: Workdir(tmp_path, has=("lm_ft",)), "[b]moss?", **how)
    shown, said = capsys.readouterr()
    assert all(name in shown for name in ("closed book", "neither tuned", "LM-ft only")) and "[b]moss?" in shown
    assert "both: not in this workdir (no tuned query encoder)" in said


# -- the launch script --------------------------------------------------------------------------------------------------------------------


def run(arguments: list[str]) -> tuple[int, str, str]:
    return processes.finish(processes.start(arguments, 1))[0]


@pytest.fixture(scope="module")
def tiny_workdir(tmp_path_factory) -> list[str]:
    """The arguments of the script for a corpus and tiny models that were never tuned."""
    folder = tmp_path_factory.mktemp("tiny")
    return command(export_models(folder / "models"), folder / "w", "ask")


def test_the_script_compares_after_a_dialogue(tiny_workdir, tmp_path):
    lines = [{"role": "user", "content": "moss?"}, {"role": "assistant", "content": "tern"}]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, shown, said = run([*tiny_workdir, "and then?", "--compare", "--json", f"--history={tmp_path / 'chat.jsonl'}"])
    assert code == 0, said[-3000:]
    told = json.loads(shown)
    assert told["question"] == "and then?" and list(told["systems"]) == ["closed book", "neither tuned"]
    assert len(told["systems"]["neither tuned"]["passages"]) == 2
    assert said.count("not in this workdir") == 2


def test_the_script_serves_the_page_until_it_is_stopped(tiny_workdir):
    pytest.importorskip("uvicorn")
    (server,) = processes.start([*tiny_workdir, "--web", "--port=0"], 1)
    try:
        said = next((line for line in server.stderr if "http://" in line), "")
        address = re.search(r"http://127\.0\.0\.1:\d+/", said)[0]
        asked = urllib.request.Request(f"{address}ask", b'{"question": "moss?"}', {"content-type": "application/json"})
        with urllib.request.urlopen(asked, timeout=120) as response:
            told = json.load(response)
        server.send_signal(signal.SIGINT)
    finally:
        ((code, shown, rest),) = processes.finish([server], timeout=60)
    assert list(told["systems"]) == ["closed book", "neither tuned"]
    assert code == 0 and shown == "" and "Traceback" not in rest, rest


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--web", "a question"], "no question with --web"),
        (["--compare", "--level=token", "x"], "--level=token"),
        (["two", "questions"], "found 2"),
        (["--level=word", "x"], "sequence"),
        (["--port=70000", "--web"], "65535"),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(flags, expected):
    code, _, said = run(["launch/ask.py", *flags])
    assert code == 2 and expected in said and said.startswith("error:") and said.count("\n") == 1
