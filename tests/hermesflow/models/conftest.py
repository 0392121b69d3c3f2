"""Shared by the tests of families: records of a user's own, and a run that is killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from hermesflow.config import load_config
from hermesflow.selfplay import run_selfplay
from hermesflow.worlds import shapes


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Eight images of shapes, wider than high, with their captions and questions."""
    folder, rows, rng = tmp_path_factory.mktemp("records"), [], np.random.default_rng(0)
    for number, scene in enumerate(shapes.sample_scenes("train", 8, seed=0)):
        record = shapes.make_record(scene, str(number), rng)
        Image.fromarray(record.image).resize((96, 64)).save(folder / f"{number}.png")
        questions = [
            {"question": item.question, "choices": list(item.choices), "answer": item.answer}
            for item in record.questions
        ]
        rows.append({"id": record.id, "caption": record.caption, "img_path": f"{number}.png", "questions": questions})
    (folder / "records.json").write_text(json.dumps(rows))
    return folder / "records.json"


@pytest.fixture(scope="module")
def settings(request, records):
    """Of a run of a checkpoint with the records in a folder: settings(checkpoint, folder); the module has the rest."""

    def make(checkpoint, folder):
        return [
            *request.module.SETTINGS, f"model.name={checkpoint}", f"data.source={records}", f"run.folder={folder}",
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def whole(checkpoint, settings, tmp_path_factory):
    """The folder of a run of the module's checkpoint, played to its end."""
    folder = tmp_path_factory.mktemp("whole")
    run_selfplay(load_config(None, settings(checkpoint, folder)))
    return folder / "t"


@pytest.fixture
def run_killed_once():
    """Runs self-play with settings, kills it at the first checkpoint in a folder, and runs it again to its end."""

    def run(settings, checkpoints):
        command = [sys.executable, "-m", "hermesflow", "selfplay", *settings]
        environment = os.environ | {"PYTHONSAFEPATH": "1"}
        running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        until = time.monotonic() + 120
        while not list(checkpoints.glob("step-*")) and running.poll() is None and time.monotonic() < until:
            time.sleep(0.01)
        running.send_signal(signal.SIGKILL)
        running.communicate()
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]

    return run
