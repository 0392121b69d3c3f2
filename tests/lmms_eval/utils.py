"""What the tasks beside this file ask lmms-eval to do with the world of shapes."""

import io
import json

import numpy as np
from PIL import Image

from hermesflow.data.records import Question
from hermesflow.worlds import oracle


def images_of(doc):
    return [Image.open(io.BytesIO(doc["image"])).convert("RGB")]


def no_images(doc):
    return []


def choices_of(doc):
    return json.loads(doc["choices"])


def number_of_answer(doc):
    return choices_of(doc).index(doc["answer"])


def score_answer(doc, results):
    return {"right": float(results[0].strip() == doc["answer"])}


def score_drawing(doc, results):
    """The oracle's view of the image that was drawn."""
    (path,) = json.loads(results[0])["images"]
    (seen,) = oracle.read(np.asarray(Image.open(path).convert("RGB"))[None])
    questions = [Question(**(item | {"choices": tuple(item["choices"])})) for item in json.loads(doc["questions"])]
    fraction, strict = oracle.score(questions, seen)
    return {"questions": float(fraction), "strict": float(strict)}
