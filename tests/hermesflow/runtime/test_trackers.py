"""Trackers: TensorBoard's own files, and stand-ins for the services, which note how they are called."""

import importlib.machinery
import sys
import types
from dataclasses import asdict

import pytest

from hermesflow.config import TrainConfig
from hermesflow.runtime import trackers
from hermesflow.runtime.files import InputError
from hermesflow.runtime.trackers import check_tracker, open_tracker


def test_none_takes_metrics_and_keeps_nothing(tmp_path):
    with open_tracker("none", {}, tmp_path, 0) as log:
        log({"loss": 1.0}, 0)
    assert not list(tmp_path.iterdir())


def test_tensorboard_goes_on_without_the_steps_that_are_done_again(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrainConfig(tracker="tensorboard")
    for start, stop, value in ((0, 5, 1.0), (3, 6, 2.0)):  # the second resumes from a checkpoint after three steps
        with open_tracker(config.tracker, asdict(config), tmp_path, start) as log:
            for step in range(start, stop):
                log({"loss": value, "generation/margin": value}, step)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "generation/margin"}
    expected = [(0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected


def test_tensorboard_loses_nothing_to_a_kill(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with open_tracker("tensorboard", asdict(TrainConfig(tracker="tensorboard")), tmp_path, 0) as log:
        log({"loss": 1.0}, 0)
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()  # the writer is still open
        assert [event.value for event in events.Scalars("loss")] == [1.0]


@pytest.fixture
def service(monkeypatch):
    """service("wandb") puts a stand-in in the package's place; returns the calls that it will note."""

    def replace(name):
        module, calls = types.ModuleType(name), []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin=f"{name}/__init__.py")
        for function in ("init", "log", "finish"):
            setattr(module, function, lambda *args, of=function, **kwargs: calls.append((of, args, kwargs)))
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return replace


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_service_goes_on_in_the_same_run(service, tmp_path, name):
    calls, config = service(name), TrainConfig(tracker=name, num_steps=7)
    for start in (0, 2):
        with open_tracker(config.tracker, asdict(config), tmp_path, start) as log:
            log({"loss": 1.0}, start)
    assert [call[0] for call in calls] == ["init", "log", "finish"] * 2
    (_, _, first), (_, _, again) = calls[0], calls[3]
    assert first == again and first["project"] == "hermesflow" and first["resume"] == "allow"
    assert first["config"]["num_steps"] == 7 and f"{tmp_path} "[1:].replace("/", " ") in first["name"]
    assert ("id" in first) == ("dir" in first) == (name == "wandb")  # trackio takes neither
    assert calls[1] == ("log", ({"loss": 1.0},), {"step": 0}) and calls[4][2] == {"step": 2}


def test_another_folder_is_another_run(service, tmp_path):
    calls = service("wandb")
    for number in (1, 2):
        with open_tracker("wandb", asdict(TrainConfig(tracker="wandb")), tmp_path / f"round-{number}", 0):
            pass
    assert calls[0][2]["id"] != calls[2][2]["id"]


def test_a_service_is_finished_when_training_fails(service, tmp_path):
    calls = service("trackio")
    with pytest.raises(ZeroDivisionError), open_tracker("trackio", asdict(TrainConfig(tracker="trackio")), tmp_path, 0):
        _ = 1 / 0
    assert calls[-1][0] == "finish"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_only_the_first_process_opens_one(service, tmp_path, monkeypatch, name):
    calls = service(name)
    monkeypatch.setattr(trackers, "is_main", lambda: False)
    with open_tracker(name, asdict(TrainConfig(tracker=name)), tmp_path, 0) as log:
        log({"loss": 1.0}, 0)
    assert not calls and not list(tmp_path.iterdir())


@pytest.fixture
def not_installed(monkeypatch, tmp_path):
    """Packages are looked for in the test's folder alone."""
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])


def test_a_tracker_that_is_not_installed_is_refused(not_installed, tmp_path):
    with pytest.raises(InputError, match="train.tracker wandb: it is not installed; run: pip install wandb, or set it"):
        check_tracker("wandb")
    with pytest.raises(InputError, match="train.tracker wandb"):
        with open_tracker("wandb", asdict(TrainConfig(tracker="wandb")), tmp_path, 0):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_of_its_name_is_not_the_package(not_installed, tmp_path):
    (tmp_path / "wandb").mkdir()
    with pytest.raises(InputError, match="train.tracker wandb: it is not installed"):
        check_tracker("wandb")
