"""docs/your_data.md, followed to the letter: its commands run, in its order, on a folder of all four kinds of files (models are tiny)."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from pdfs import pdf
from processes import ROOT, finish, start
from torture import FIELDS, export_models

from radit_jax import inputs
from radit_jax.errors import InputError

PAGE = ROOT / "docs" / "your_data.md"
# What makes models tiny and steps few; everything else is the variant's own.
TINY = {
    **{field: FIELDS[field] for field in ("lm.dtype", "retriever.dtype", "retrieval.k", "evaluate.k")},
    **{field: FIELDS[field] for field in ("retriever.max_passage_tokens", "retriever.max_query_tokens", "evaluate.max_new_tokens")},
    "corpus.max_words": 20,
    "train.limit": 24,
    "lm.max_tokens": 256,
    "lm_ft.row_length": 192,
    "lm_ft.rows": 2,
    "lm_ft.steps": 2,
    "lsr_ft.batch": 4,
    "lsr_ft.epochs": 1,
    "lsr_ft.completion_examples": 8,
    "lsr_ft.validation": 0.5,
}
WORDS = ("moss", "tern", "loch", "ruby", "vale", "oak", "iris", "flint", "dune", "wren")


def sentences(seed: int, count: int = 9) -> list[str]:
    return [" ".join(WORDS[(seed + 3 * i * n + n) % len(WORDS)] for n in range(1, 9)).capitalize() + "." for i in range(count)]


def commands() -> list[str]:
    """The lines of the page's fences that run a launch script."""
    fences = re.findall(r"```\w*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return [line for fence in fences for line in fence.splitlines() if line.startswith("python ")]


def make_documents(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text(" ".join(sentences(0)))
    (folder / "sub" / "b.md").write_text("# The dunes\n\n" + " ".join(sentences(1)))
    paragraphs = "".join(f"<p>{sentence}</p>" for sentence in sentences(2))
    (folder / "c.html").write_text(f"<html><head><title>Lochs</title></head><body><article>{paragraphs}</article></body></html>")
    (folder / "d.pdf").write_bytes(pdf([sentences(3), sentences(4)], title="Wrens"))
    (folder / "picture.png").write_bytes(b"passed over")


@pytest.fixture
def config(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("configs.radit").get_config("own")


def test_without_questions_the_lm_alone_learns_from_generated_ones_with_their_passages(config):
    ((card, questions),) = inputs.sets(config, "train")
    assert len(questions) > 500 and card.in_lm_ft and not card.in_r_ft
    for example in card.training_examples(questions, seed=0)[:50]:
        assert example.answers[0] in example.background and not example.retrieve


@pytest.mark.parametrize(
    ("fields", "part", "says"),
    [
        ({}, "test", "test.source is empty"),
        ({"train.split": "test"}, "train", "only the train split may be trained on"),
        ({"train.source": "invented:passages=many"}, "train", "train.source is 'invented:passages=many'"),
    ],
)
def test_sets_that_cannot_be_are_refused(config, fields, part, says):
    with pytest.raises(InputError, match=says):
        inputs.sets(inputs.with_fields(config, fields), part)


def test_a_corpus_must_be_given(config, tmp_path):
    with pytest.raises(InputError, match="corpus.source is empty, expected --config.corpus.source=FOLDER"):
        inputs.claim(config, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.fixture(scope="module")
def followed(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """The folder in which the page was followed, and what each command printed."""
    here = tmp_path_factory.mktemp("followed")
    for name in ("launch", "configs"):
        (here / name).symlink_to(ROOT / name)
    make_documents(here / "my_docs")
    for name in ("train", "test"):
        lines = [{"question": f"{name} {word}?", "answers": [word]} for word in WORDS]
        (here / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    models = export_models(here / "tiny")
    checkpoints = {"lm.checkpoint": models / "lm", **{f"retriever.{side}_encoder": models / "encoder" for side in ("query", "document")}}
    overrides = [f"--config.{field}={value}" for field, value in {**checkpoints, **TINY}.items()]
    settings = {"JAX_COMPILATION_CACHE_DIR": str(here / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    printed = {}
    for line in commands():
        arguments = [*shlex.split(line)[1:], *(overrides if "--config=" in line else [])]
        ((code, stdout, stderr),) = finish(start(arguments, 1, cwd=here, **settings))
        assert code == 0, f"{line}\n{stderr[-3000:]}"
        printed[line] = stdout
    return here, printed


def of(printed: dict[str, str], *parts: str) -> str:
    """What the one command with these parts printed."""
    (found,) = [text for line, text in printed.items() if all(part in line for part in parts)]
    return found


def test_the_page_is_three_commands_without_questions_and_the_models_are_tuned(followed):
    here, printed = followed
    assert [line.split()[1] for line in commands()[:3]] == ["launch/train.py", "launch/ask.py", "launch/export.py"]
    folders = dict(line.split(": ") for line in of(printed, "launch/train.py", "runs/mine").splitlines())
    assert set(folders) == {"query encoder", "LM"}
    assert all((here / folder / "params").is_dir() for folder in folders.values())
    passages = json.loads(next((here / "runs" / "mine").glob("passages-*/manifest.json")).read_text())["facts"]
    assert passages["documents"] == 4 and passages["passages"] >= 11
    assert not (here / "runs" / "mine" / "table.json").exists()
    scored = json.loads(next((here / "runs" / "mine").glob("lsr_ft-*/manifest.json")).read_text())["facts"]
    assert scored["questions"] == 8 and scored["held_out"] == 0  # completions have no answers to be held out by


def test_what_it_prints_is_what_the_page_says(followed):
    _, printed = followed
    assert len(of(printed, "launch/ask.py").splitlines()) > TINY["evaluate.k"]  # an answer, and a line a passage
    assert len(of(printed, "launch/prepare.py").splitlines()) == 5
    table = of(printed, "launch/train.py", "runs/measured")
    assert all(name in table for name in ("no retrieval", "neither tuned", "R-ft only", "LM-ft only", "both"))


def test_the_exported_models_have_cards(followed):
    here, _ = followed
    libraries = {"lm": "transformers", "query_encoder": "sentence-transformers", "document_encoder": "sentence-transformers"}
    for kind, library in libraries.items():
        text = (here / "models" / kind / "README.md").read_text()
        front = yaml.safe_load(text.split("---\n")[1])
        assert front["library_name"] == library and str(here) not in text
    lm = (here / "models" / "lm" / "README.md").read_text()
    assert "invented: 24 examples" in lm and "plain text of the corpus" in lm and "## Measured" not in lm
    assert "completion of the corpus: 8 examples" in (here / "models" / "query_encoder" / "README.md").read_text()
