"""Measurement on a user's held-out records: known answers, negatives from others, the gap, and self-play on them."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from hermesflow.config import ConfigError, EvalConfig, load_config
from hermesflow.evaluation.evaluation import evaluate, find_evaluation
from hermesflow.evaluation.on_records import ON_RECORDS
from hermesflow.models import load_model
from hermesflow.report.tables import describe_data
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import run_selfplay
from hermesflow.worlds import shapes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twenty records of the world of shapes, as a user has them: what is there is asked for, and nothing else."""
    folder, rows, rng = tmp_path_factory.mktemp("data"), [], np.random.default_rng(0)
    for number, scene in enumerate(shapes.sample_scenes("test", 20, seed=5)):
        record = shapes.make_record(scene, f"r{number}", rng)
        Image.fromarray(record.image).save(folder / f"{number}.png")
        questions = [
            {"question": item.question, "choices": list(item.choices), "answer": item.answer, "element": item.element,
             "element_type": item.element_type}
            for item in record.questions
        ]  # fmt: skip
        rows.append({"id": record.id, "caption": record.caption, "img_path": f"{number}.png", "questions": questions,
                     "category": record.category})  # fmt: skip
    (folder / "mine.json").write_text(json.dumps(rows))
    return folder / "mine.json"


@pytest.fixture(scope="module")
def model():
    return load_model("tiny")


@pytest.fixture(scope="module")
def result(model, data):
    return evaluate(model, EvalConfig(data=str(data), num_prompts=12, images_per_prompt=2))


def test_it_is_the_evaluation_of_records_where_data_are_given(data):
    assert find_evaluation(EvalConfig(data=str(data))) is ON_RECORDS
    assert find_evaluation(EvalConfig()) is not ON_RECORDS


def test_the_gap_with_intervals(result):
    metrics = result["metrics"]
    assert metrics["num_understanding"] == 20 and metrics["num_prompts"] == 12 and metrics["num_images"] == 24
    assert metrics["gap"] == pytest.approx(metrics["understanding"] - metrics["generation"])
    low, high = metrics["gap_ci95"]
    assert low <= metrics["gap"] <= high
    assert metrics["understanding"] > 0.7
    assert metrics["understanding_by_kind"]["no"] > 0.5  # asked for things that other records have
    asked = [row for row in result["records"] if row["balanced"]]
    kinds = [kind for row in asked for kind in row["kinds"]]
    assert kinds.count("no") > 0.5 * kinds.count("yes")


def test_the_models_eyes_are_the_judge(model, data, result):
    """The marks of the first record's drawings are the model's own answers about them."""
    row, questions = result["records"][0], json.loads(data.read_text())[0]["questions"]
    views = model.view_codes(torch.tensor(row["codes"]))
    for digits, seen in zip(row["drawn"], views, strict=True):
        asked = [model.choice_prompt(item["question"], item["choices"]) for item in questions]
        [scores] = model.engine.score_choices(
            seen[None], [[item.question for item in asked]], [[item.choices for item in asked]]
        )
        answers = [item["choices"][int(np.argmax(of_item))] for item, of_item in zip(questions, scores, strict=True)]
        assert digits == "".join(
            str(int(said == item["answer"])) for said, item in zip(answers, questions, strict=True)
        )


def test_two_models_are_compared_on_the_same_draws(model, data, result):
    again = evaluate(model, EvalConfig(data=str(data), num_prompts=12, images_per_prompt=2))
    assert again == result


def test_selfplay_is_measured_on_them(data, tmp_path):
    settings = [
        f"data.source={data}", f"eval.data={data}", "data.num_records=6", "selfplay.num_rounds=1", "eval.num_prompts=4",
        "curation.num_images=2", "curation.threshold=0", "curation.margin=0", "curation.keep=any", "train.num_steps=1",
        "eval.num_understanding=6", "eval.images_per_prompt=1", f"run.folder={tmp_path}", "run.name=t",
    ]  # fmt: skip
    run_selfplay(load_config(None, settings))
    summary = json.loads((tmp_path / "t/summary.json").read_text())
    assert summary["before"]["num_understanding"] == 6 and "change" in summary["rounds"][0]
    (line, *_) = describe_data(summary)
    assert line == f"measured on {data}; whether drawings are right is the judge's word: self"
    assert (tmp_path / "t/report/index.html").is_file()


def test_settings_that_do_not_belong_are_refused(data, tmp_path, model):
    with pytest.raises(ConfigError, match="belongs to a file of records in eval.data"):
        EvalConfig(root="x")
    with pytest.raises(ConfigError, match='expected "self" or an address'):
        EvalConfig(data="x", judge="me")
    with pytest.raises(ConfigError, match='expected a file of records with eval.suite "records"'):
        EvalConfig(suite="records")
    with pytest.raises(InputError, match="missing.json"):
        evaluate(model, EvalConfig(data=str(tmp_path / "missing.json")))
