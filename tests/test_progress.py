"""The bar counts what this run did, and says how long the rest takes."""

from __future__ import annotations

import io

import pytest

from radit_jax import logbook, progress


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_lines_every_ten_seconds_with_rate_and_time_left():
    stream, clock = io.StringIO(), Clock()
    with progress.bar("embed", 1000, unit="passages", stream=stream, clock=clock) as advance:
        for _ in range(40):  # one second and ten passages each
            clock.now += 1
            advance(10)
    *lines, summary = stream.getvalue().splitlines()
    assert lines[0] == "embed: 100 of 1,000 (10 %) passages, 10 passages/s, 1 min 30 s left"
    assert len(lines) == 4
    assert summary == "embed: 400 passages in 40.0 s (10 passages/s)"
    clock.now += 1000
    assert (advance.rate, advance.elapsed) == (10.0, 40.0)  # the end is the end


def test_what_an_earlier_run_did_is_not_in_the_rate():
    stream, clock = io.StringIO(), Clock()
    with progress.bar("embed", 100, unit="passages", start=80, stream=stream, clock=clock) as advance:
        clock.now += 10
        advance(10)
        assert advance.rate == 1.0
        assert advance.seconds_left == 10.0
    assert stream.getvalue().splitlines()[-1] == "embed: 10 passages in 10.0 s (1 passages/s, 80 already there)"


def test_unknown_total_and_nothing_done():
    stream, clock = io.StringIO(), Clock()
    with progress.bar("read", None, unit="records", stream=stream, clock=clock) as advance:
        assert advance.seconds_left is None
        clock.now += 11
        advance()
        assert advance.seconds_left is None
    assert "left" not in stream.getvalue()
    with progress.bar("read", 0, unit="records", stream=stream, clock=clock) as advance:
        pass
    assert advance.rate == 0.0


def test_a_failure_is_not_reported_as_done():
    stream = io.StringIO()
    with pytest.raises(KeyError), progress.bar("score", 5, unit="questions", stream=stream, clock=Clock()) as advance:
        advance(2)
        raise KeyError
    assert stream.getvalue().startswith("score: stopped after 2 questions")


def test_a_terminal_gets_a_bar_and_the_summary():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with progress.bar("embed", 4, unit="passages", stream=stream) as advance:
        advance(4)
    assert "4/4" in stream.getvalue()
    assert "embed: 4 passages in" in stream.getvalue().splitlines()[-1]


@pytest.mark.parametrize(("seconds", "text"), [(4.24, "4.2 s"), (185, "3 min 05 s"), (7620, "2 h 07 min")])
def test_durations(seconds, text):
    assert progress.duration(seconds) == text


def test_quiet_says_nothing_and_counts_on(monkeypatch, capsys):
    monkeypatch.setenv(logbook.QUIET, "1")
    clock = Clock()
    with progress.bar("embed", 100, unit="passages", clock=clock) as advance:
        clock.now += 20
        advance(50)
    logbook.say("a stage begins")
    assert capsys.readouterr().err == "" and advance.rate == 2.5
    monkeypatch.delenv(logbook.QUIET)
    logbook.say("a stage begins")
    assert capsys.readouterr().err == "a stage begins\n"
