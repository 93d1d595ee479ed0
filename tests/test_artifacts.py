"""Artifacts are whole or not there, found again by their inputs, and resumed where they were left."""

from __future__ import annotations

import fcntl
import json
import threading

import numpy as np
import pytest

from radit_jax import artifacts
from radit_jax.errors import InputError


def forbidden(folder):
    raise AssertionError("made again")


def test_the_same_inputs_find_the_folder_and_others_get_another(tmp_path):
    def write(folder):
        (folder / "made.txt").write_text("x")
        return {"count": 3, "rate": np.float32(0.5)}

    made = artifacts.make(tmp_path, "stage", {"k": 3, "lr": 0.1}, write)
    assert not made.reused and made.facts == {"count": 3, "rate": 0.5}
    assert made.path.name == f"stage-{made.fingerprint}" and made.manifest["made_from"] == {"k": 3, "lr": 0.1}
    again = artifacts.make(tmp_path, "stage", {"lr": 0.1, "k": 3}, forbidden)
    assert again.reused and again.path == made.path and again.facts == made.facts
    others = [
        artifacts.make(tmp_path, "stage", {"k": 4, "lr": 0.1}, write),
        artifacts.make(tmp_path, "other", {"k": 3, "lr": 0.1}, write),
    ]
    assert len({made.path, *(other.path for other in others)}) == 3
    assert made.path.exists()


def test_what_was_interrupted_is_not_an_artifact_and_is_gone_on_with(tmp_path):
    def interrupted(folder):
        (folder / "first").write_text("done")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.make(tmp_path, "stage", {"k": 1}, interrupted)
    (partial,) = tmp_path.iterdir()
    assert partial.suffix == ".partial"
    with pytest.raises(InputError, match="not a whole artifact"):
        artifacts.load(partial)

    def resumed(folder):
        assert folder == partial and (folder / "first").read_text() == "done"
        (folder / "second").write_text("done")

    made = artifacts.make(tmp_path, "stage", {"k": 1}, resumed)
    assert sorted(path.name for path in made.path.iterdir()) == ["first", artifacts.MANIFEST, "second"]
    assert list(tmp_path.iterdir()) == [made.path]


def test_of_two_runs_in_one_workdir_one_makes_an_artifact_and_the_other_waits_for_it(tmp_path, monkeypatch):
    found, waiting, lock = [], threading.Event(), fcntl.flock
    second = threading.Thread(target=lambda: found.append(artifacts.make(tmp_path, "stage", {"k": 1}, forbidden)))

    def flock(held, operation):
        if threading.current_thread() is second:
            waiting.set()
        lock(held, operation)

    def write(folder):
        second.start()
        assert waiting.wait(30)  # the second run asks for what this one is making
        return {"count": 1}

    monkeypatch.setattr(fcntl, "flock", flock)
    made = artifacts.make(tmp_path, "stage", {"k": 1}, write)
    second.join(30)
    (other,) = found
    assert other.reused and other.path == made.path and other.facts == {"count": 1}
    assert list(tmp_path.iterdir()) == [made.path]


def test_a_missing_or_damaged_manifest_is_an_input_error(tmp_path):
    for text in (None, "{"):
        if text:
            (tmp_path / artifacts.MANIFEST).write_text(text)
        with pytest.raises(InputError, match="not a whole artifact"):
            artifacts.load(tmp_path)


def test_identity_changes_with_any_file_and_not_with_the_place(tmp_path):
    def folder(name):
        made = tmp_path / name / "checkpoint"
        (made / "inner").mkdir(parents=True)
        (made / "a").write_bytes(b"0" * 10)
        (made / "inner" / "b").write_bytes(b"1" * 10)
        return made

    first, second = folder("one"), folder("two")
    same = artifacts.identity(first)
    assert same == artifacts.identity(second) and same.startswith("checkpoint:")
    (second / "inner" / "b").write_bytes(b"1" * 9 + b"2")
    changed = artifacts.identity(second)
    (second / "inner" / "b").rename(second / "inner" / "c")
    renamed = artifacts.identity(second)
    (second / "d").write_text("")
    assert len({same, changed, renamed, artifacts.identity(second)}) == 4
    assert artifacts.identity(first / "a") != artifacts.identity(first / "inner" / "b")


def test_identity_reads_both_ends_of_a_large_file(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "EDGE", 4)
    file = tmp_path / "weights"
    found = []
    for content in (b"aaaa----bbbb", b"aaaa----bbbc", b"caaa----bbbb", b"aaaa-----bbbb"):
        file.write_bytes(content)
        found.append(artifacts.identity(file))
    assert len(set(found)) == 4


def test_files_are_replaced_whole(tmp_path):
    path = tmp_path / "array.npy"
    artifacts.save_array(path, np.arange(3))
    with pytest.raises(ValueError):  # objects would need pickle
        artifacts.save_array(path, np.asarray([object()]))
    np.testing.assert_array_equal(np.load(path), np.arange(3))  # the old one is still whole
    artifacts.write_json(tmp_path / "value.json", {"mean": np.float64(0.5), "n": np.int64(2)})
    assert json.loads((tmp_path / "value.json").read_text()) == {"mean": 0.5, "n": 2}
