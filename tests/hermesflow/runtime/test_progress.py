"""Progress without a terminal: few lines in the log, none of short work or of work inside other work."""

import logging

import pytest

from hermesflow.runtime import progress
from hermesflow.runtime.progress import track


@pytest.fixture
def clock(monkeypatch, caplog):
    """A clock that a test moves: clock[0] seconds."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, "hermesflow")
    return now


def test_each_tenth_is_told_with_the_note_and_the_time_left(clock, caplog):
    bar = track(range(20, 60), "Pair-DPO", "steps", completed=20)
    for step in bar:
        clock[0] += 2
        bar.note(f"loss {step}")
    assert len(caplog.messages) == 7
    assert caplog.messages[0] == "Pair-DPO: 24 of 60 steps, 0.5 steps/s, loss 23, 72 s left"
    assert caplog.messages[-1] == "Pair-DPO: 60 of 60 steps, 0.5 steps/s, loss 59, 0 s left"


def test_work_says_of_what_it_is_a_part(clock, caplog):
    with progress.stage("round 2 of 3, curation"):
        for _ in track(1, "images", "batches"):
            clock[0] += 10
    for _ in track(1, "images", "batches"):
        clock[0] += 10
    assert caplog.messages == [
        "round 2 of 3, curation: images: 1 of 1 batches, 0.1 batches/s, 0 s left",
        "images: 1 of 1 batches, 0.1 batches/s, 0 s left",
    ]


def test_a_long_phase_has_ten_lines(clock, caplog):
    for _ in track(1003, "images", "batches"):
        clock[0] += 60
    assert len(caplog.messages) == 10


def test_short_work_is_silent(clock, caplog):
    for _ in track(100, "images"):
        clock[0] += 0.01
    assert not caplog.messages


def test_work_inside_other_work_is_silent_and_what_follows_is_told_again(clock, caplog):
    for _ in track(2, "outer"):
        for _ in track(2, "inner"):
            clock[0] += 60
    for _ in track(1, "after"):
        clock[0] += 60
    assert [message.partition(":")[0] for message in caplog.messages] == ["outer", "outer", "after"]


def test_other_processes_are_silent(clock, caplog, monkeypatch):
    monkeypatch.setattr(progress, "is_main", lambda: False)
    for _ in track(2, "images"):
        clock[0] += 60
    assert not caplog.messages
