"""Killed and resumed training ends bit for bit where the unkilled run ends; what a kill leaves half-written is not read."""

from __future__ import annotations

import json
import os
import signal
import threading

import jax
import numpy as np
import pytest
import tiny

from radit_jax import checkpoint, logbook, preemption, sharding
from radit_jax.checkpoint import Checkpoints, load_params, save_params
from radit_jax.errors import InputError
from radit_jax.training import loop, tune

# A killed process writes no more; here the saves of a "killed" run would go on beside its successor. And sums on a GPU have no fixed order.
pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="bit for bit, and saves that are waited for: on CPUs alone")

OPTIONS = loop.LoopOptions(steps=tiny.STEPS, checkpoint_every=2, evaluate_every=3)


class Killed(Exception):
    pass


class Mortal:
    """Batches that end the process, as far as the loop can tell, after `last` of them."""

    def __init__(self, data, last: int):
        self.data, self.left = data, last

    def __next__(self):
        if self.left == 0:
            raise Killed
        self.left -= 1
        return next(self.data)

    def get_state(self):
        return self.data.get_state()

    def set_state(self, state):
        self.data.set_state(state)


class Signalled(Mortal):
    """Batches before the last of which the machine gives notice."""

    def __next__(self):
        if self.left == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


def evaluate(params, step):
    return {"validation_size": float(sum(np.abs(leaf).sum() for leaf in tiny.leaves(params).values()))}


def train(kind: str, folder, last: int | None = None, evaluate=evaluate, ending=Mortal, **how):
    """A run with everything new but the folder and the compiled step."""
    state, step, data = {
        "lm": lambda: (tiny.lm_state(), tiny.lm_step(), tiny.lm_data()),
        "lsr": lambda: (tiny.lsr_state(), tiny.lsr_step(), tiny.lsr_data()),
    }[kind]()
    data = data if last is None else ending(data, last)
    place = loop.placer(sharding.make_mesh(1, 1), rows=4)
    return loop.run(kind, step, state, data, folder, OPTIONS, place=place, evaluate=evaluate, **how)


def written(folder) -> list[dict]:
    """The metrics of a run, without the time of day."""
    return [{key: value for key, value in line.items() if key != "time"} for line in logbook.read(folder / "metrics.jsonl")]


@pytest.fixture(scope="module", params=["lm", "lsr"])
def unkilled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    state, facts = train(request.param, folder)
    return request.param, folder, tiny.leaves(state), facts


@pytest.mark.parametrize("deaths", [(5,), (1, 3, 1)])
def test_killed_and_resumed_equals_unkilled_bit_for_bit(unkilled, deaths, tmp_path):
    kind, folder, expected, _ = unkilled
    for last in deaths:
        with pytest.raises(Killed):
            train(kind, tmp_path, last)
    state, _ = train(kind, tmp_path)
    found = tiny.leaves(state)
    assert found.keys() == expected.keys() and int(state.step) == tiny.STEPS
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)
    assert written(tmp_path) == written(folder)


@pytest.mark.parametrize("at", [3, 6])
def test_an_evaluation_that_was_killed_is_made_again(unkilled, at, tmp_path):
    kind, folder, _, _ = unkilled

    def killed(params, step):
        if step == at:
            raise Killed
        return evaluate(params, step)

    with pytest.raises(Killed):
        train(kind, tmp_path, evaluate=killed)
    train(kind, tmp_path)
    assert written(tmp_path) == written(folder)


def test_training_stops_after_an_evaluation_that_says_enough_and_is_not_taken_up_again(unkilled, tmp_path):
    kind, folder, _, _ = unkilled
    state, facts = train(kind, tmp_path, enough=lambda step: step >= 3)
    assert int(state.step) == 3 and written(tmp_path) == [line for line in written(folder) if line["step"] <= 3]
    again, _ = train(kind, tmp_path, last=0, enough=lambda step: step >= 3)  # asks for no batch
    assert int(again.step) == 3


def test_patience_counts_validations_since_the_best(tmp_path):
    best = tune.Best(tmp_path, by="mean")
    assert not best.is_past(400, 1, 100)  # nothing yet
    for step, mean in ((100, 0.2), (200, 0.5), (300, 0.5), (400, 0.1)):
        best.keep({"mean": mean}, {"w": np.zeros(2)}, step)
    assert best.found == {"mean": 0.5, "step": 200}
    assert [best.is_past(at, 2, 100) for at in (200, 300, 400)] == [False, False, True] and not best.is_past(900, 0, 100)
    assert tune.Best(tmp_path, by="mean").found == best.found  # after a kill
    assert best.result() == {"best_mean": 0.5, "best_step": 200} and (tmp_path / tune.PARAMS).is_dir()


def test_every_step_is_in_the_metrics_once(unkilled):
    kind, folder, _, facts = unkilled
    lines = written(folder)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, tiny.STEPS + 1))
    assert [line["step"] for line in lines if "validation_size" in line] == [3, 6]
    assert len({line["loss"] for line in lines if "loss" in line}) == tiny.STEPS
    assert 0 <= facts["input_wait"] < 1
    assert facts["last_loss"] == round(next(line["loss"] for line in reversed(lines) if "loss" in line), 5)


def test_a_finished_run_is_not_trained_again(unkilled, capsys):
    kind, folder, expected, _ = unkilled
    state, _ = train(kind, folder, last=0)  # asks for no batch
    for path, array in tiny.leaves(state).items():
        np.testing.assert_array_equal(array, expected[path])


# -- notice is given ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def listening():
    """SIGTERM is a notice for the length of a test."""
    before = signal.getsignal(signal.SIGTERM)
    preemption.install()
    yield
    preemption.install()  # no notice is left for the next test
    signal.signal(signal.SIGTERM, before)


def equal(state, expected) -> None:
    found = tiny.leaves(state)
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


def test_sigterm_waits_for_the_step_saves_it_and_the_rest_is_trained_later(unkilled, tmp_path, listening):
    kind, folder, expected, _ = unkilled
    with pytest.raises(preemption.Preempted):
        train(kind, tmp_path, last=5, ending=Signalled)  # 5 is between two checkpoints
    saved = Checkpoints(tmp_path / "checkpoints")
    assert saved.latest == 5
    saved.close()
    preemption.install()  # the next process
    state, _ = train(kind, tmp_path)
    equal(state, expected)
    assert written(tmp_path) == written(folder)


def test_sigterm_ends_an_evaluation_at_once_and_costs_no_step(unkilled, tmp_path, listening):
    kind, folder, expected, _ = unkilled

    def signalled(params, step):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")

    with pytest.raises(preemption.Preempted):
        train(kind, tmp_path, evaluate=signalled)
    preemption.install()
    state, _ = train(kind, tmp_path)
    equal(state, expected)
    assert written(tmp_path) == written(folder)


def test_a_notice_that_falls_into_a_finalizer_is_given_again(listening):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(preemption.Preempted):
        Dying()  # Python drops what is raised there
        threading.Event().wait(60)


def test_a_held_notice_is_heard_behind_the_block(listening):
    told = []
    with pytest.raises(preemption.Preempted):
        with preemption.hold() as asked:
            told.append(asked())
            os.kill(os.getpid(), signal.SIGTERM)
            told.append(asked())
    assert told == [False, True]
    with pytest.raises(preemption.Preempted):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("went on")


# -- what a kill leaves ----------------------------------------------------------------------------------------------------------


def test_unfinished_checkpoints_and_torn_lines_are_ignored(tmp_path):
    with pytest.raises(Killed):
        train("lsr", tmp_path / "run", 5)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["3", "4"]  # 3: before the evaluation
    (folder / "5.orbax-checkpoint-tmp").mkdir()
    (folder / "5.orbax-checkpoint-tmp" / "array_metadatas").write_text("torn")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    checkpoints = Checkpoints(folder)
    assert checkpoints.latest == 4
    checkpoints.close()
    resumed, _ = train("lsr", tmp_path / "run")
    straight, _ = train("lsr", tmp_path / "straight")
    for path, array in tiny.leaves(straight).items():
        np.testing.assert_array_equal(tiny.leaves(resumed)[path], array)
    assert written(tmp_path / "run") == written(tmp_path / "straight")


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [flip, cut, os.unlink], ids=["a flipped bit", "cut short", "gone"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(unkilled, tmp_path, capsys, damage):
    kind, folder, expected, _ = unkilled
    with pytest.raises(Killed):
        train(kind, tmp_path, 5)
    files = [path for path in (tmp_path / "checkpoints" / "4").rglob("*") if path.is_file()]
    damage(max(files, key=lambda path: path.stat().st_size))  # the arrays
    state, _ = train(kind, tmp_path)
    said = capsys.readouterr().err
    assert "checkpoints/4 is damaged" in said and "going on from step 3" in said
    equal(state, expected)
    assert written(tmp_path) == written(folder)


def test_what_other_processes_are_writing_is_not_summed(tmp_path):
    (tmp_path / "arrays").write_bytes(b"whole")
    for name in ("sums-1-of-2.json", "sums-3-of-4.json.tmp"):
        (tmp_path / name).write_text("{}")
    checkpoint._write_sums(tmp_path)
    (tmp_path / "sums-3-of-4.json.tmp").unlink()  # it has got its name
    assert checkpoint._wrong_file(tmp_path) is None
    flip(tmp_path / "arrays")
    assert "arrays is not what was written" in checkpoint._wrong_file(tmp_path)


def test_without_a_whole_checkpoint_training_begins_anew(unkilled, tmp_path, capsys):
    kind, _, expected, _ = unkilled
    with pytest.raises(Killed):
        train(kind, tmp_path, 5)
    for step in ("3", "4"):
        flip(max((tmp_path / "checkpoints" / step / "state").rglob("*"), key=lambda path: path.is_file() * path.stat().st_size))
    state, _ = train(kind, tmp_path)
    assert capsys.readouterr().err.count("is damaged") == 2
    equal(state, expected)


def test_only_the_last_checkpoints_are_kept(unkilled):
    _, folder, _, _ = unkilled
    assert sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.is_dir()) == [4, 6]


def test_parameters_come_back_from_their_folder_sharded(tmp_path):
    state = tiny.lm_state()
    save_params(tmp_path / "params", state.params)
    save_params(tmp_path / "params", state.params)  # over what a killed run wrote
    expected = tiny.leaves(state.params)
    found = load_params(tmp_path / "params", state.params)
    for path, array in tiny.leaves(found).items():
        np.testing.assert_array_equal(array, expected[path])


# -- the logbook -----------------------------------------------------------------------------------------------------------------


def test_a_resumed_logbook_drops_what_lies_past_the_checkpoint(tmp_path):
    book = logbook.Logbook(tmp_path)
    for step in (1, 2, 3):
        book.write(step, {"loss": step / 2})
    book.close()
    book = logbook.Logbook(tmp_path, resumed_at=2)
    book.write(3, {"loss": 9.0})
    book.close()
    assert [(line["step"], line["loss"]) for line in map(json.loads, book.path.read_text().splitlines())] == [(1, 0.5), (2, 1.0), (3, 9.0)]


def test_tensorboard_gets_what_the_logbook_gets(tmp_path):
    book = logbook.Logbook(tmp_path, loggers=["tensorboard"])
    book.write(1, {"loss": 0.5})
    book.close()
    assert any((tmp_path / "tensorboard").iterdir())


def test_a_logger_that_is_not_there_is_named():
    logbook.check_loggers(["tensorboard"])
    with pytest.raises(InputError, match="'tensorbord', expected some of tensorboard, wandb"):
        logbook.check_loggers(["tensorbord"])
