"""What lmms-eval asks of a model, asked of families of each kind: the answers are those of the model itself."""

import json
import tempfile
from pathlib import Path

import numpy as np
from lmms_eval.api.instance import Instance
from PIL import Image

from hermesflow.evaluation.lmms_model import LmmsModel

TASK, SPLIT = "mine", "test"
QUESTION, CAPTION, CHOICES = "what color is the circle ?", "a red circle", ("red", "blue")
"""Words that the built-in models know."""


def ask(kind, model, rows):
    """The model's answers to requests, each (context, more, whether it sees the image)."""
    model.task_dict = {TASK: {SPLIT: [{}] * len(rows)}}
    picture = Image.fromarray(np.full((64, 64, 3), (200, 30, 30), dtype=np.uint8))
    requests = [
        Instance(
            request_type=kind, idx=0, metadata={"task": TASK, "doc_id": number, "repeats": 1},
            arguments=(context, more, lambda doc, shown=shown: [picture] if shown else [], number, TASK, SPLIT),
        )
        for number, (context, more, shown) in enumerate(rows)
    ]  # fmt: skip
    return picture, getattr(model, kind)(requests)


def check(names):
    """Raises: AssertionError that names the family."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model = LmmsModel(model=name, output=folder, num_steps=2 if "bagel" in name else 0)
            options = {"max_new_tokens": 4, "do_sample": False}
            picture, (said, drawn) = ask("generate_until", model, [(QUESTION, options, True), (CAPTION, {}, False)])
            (path,) = json.loads(drawn)["images"]
            assert Path(path).is_file() and Image.open(path).size == (model._model.image_size,) * 2, name
            assert isinstance(said, str), name
            # One question of two choices: the one of the smallest loss is the one that the model finds likeliest.
            _, losses = ask("loglikelihood", model, [(QUESTION, choice, True) for choice in CHOICES])
            (chances,) = model._model.score([picture], QUESTION, CHOICES)
            least = min(range(len(CHOICES)), key=lambda number: losses[number].text[0])
            assert CHOICES[least] == max(chances, key=chances.__getitem__), name
            print(f"{Path(name).name}: answers, draws and scores")
