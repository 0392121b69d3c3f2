"""Answers about own drawings: what is drawn, kept and taught, and by what labels."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from hermesflow.algorithms.batch import REPLAY
from hermesflow.algorithms.own_drawings import OwnDrawings
from hermesflow.algorithms.pair_dpo import PairDPO
from hermesflow.algorithms.policy import Policy
from hermesflow.config import load_config
from hermesflow.models import load_model
from hermesflow.models.model import model_digest
from hermesflow.runtime.files import InputError
from hermesflow.runtime.seeds import candidate_seeds
from hermesflow.scoring.self_answers import self_vqa
from hermesflow.training import check_training, train_records
from hermesflow.worlds import shapes

SETTINGS = ("train.num_steps=12", "train.pairs_per_step=8", "train.lr=5e-5", "train.warmup_steps=1")


def config_of(*settings):
    return load_config(None, ["selfplay.algorithm=own-drawings", *SETTINGS, *settings])


@pytest.fixture(scope="module")
def relations():
    """Records whose captions state a relation, and some that do not, with their codes."""
    model = load_model("tiny")
    records = list(shapes.training_records(5, 40))
    codes = model.encode_images(np.stack([record.image for record in records])).numpy()
    return [replace(record, codes=of_record) for record, of_record in zip(records, codes, strict=True)]


@pytest.fixture(scope="module")
def learner(relations):
    return OwnDrawings(load_model("tiny"), relations, config_of(), 0)


def drawn_rows(learner, records):
    return learner.packer.pairs.to_pylist()[: -len(records)]


def test_relations_are_taught_of_drawings_as_their_captions_say(learner, relations):
    message = {record.id: {question.question: question.answer for question in record.questions} for record in relations}
    drawn, real = drawn_rows(learner, relations), learner.packer.pairs.to_pylist()[-len(relations) :]
    states = [record.id for record in relations if any(item.element_type == "spatial" for item in record.questions)]
    assert 0 < len(drawn) <= 2 * len(states) < 2 * len(relations)
    assert len({row["record_id"] for row in drawn}) == len(drawn)
    for row in drawn:
        name = row["record_id"].partition(",")[0]
        assert name in states and [message[name][question] for question in row["questions"]] == row["answers"]
        assert row["choices"] == [[answer] for answer in row["answers"]]
    codes = {record.id: record.codes.tolist() for record in relations}
    assert [row["record_codes"] for row in real] == [codes[row["record_id"]] for row in real]
    assert all(row["record_codes"] != codes[row["record_id"].partition(",")[0]] for row in drawn)


def test_the_model_answers_all_else_about_a_kept_drawing_as_the_caption_does(learner, relations):
    """The drawings are those that generate gives for the same seeds, and no drawing is missing."""
    model = load_model("tiny")
    asked = [record for record in relations if any(item.element_type == "spatial" for item in record.questions)]
    seeds = torch.from_numpy(candidate_seeds(0, [record.id for record in asked], "own drawing", 2))
    prompts = [model.image_prompt(record.caption) for record in asked]
    codes = model.engine.generate(prompts, num_images=2, seeds=seeds, **asdict(model.sampling))
    kept = [
        image.tolist()
        for record, of_record, scores in zip(asked, codes, self_vqa(model, codes, asked), strict=True)
        for image, score in zip(of_record, scores, strict=True)
        if all(
            answer.answer == question.answer
            for question, answer in zip(record.questions, score.answers, strict=True)
            if question.element_type != "spatial"
        )
    ]
    assert [row["record_codes"] for row in drawn_rows(learner, relations)] == kept


def test_half_of_a_step_is_of_drawings_with_certain_labels(learner, relations, tmp_path):
    num_own = len(drawn_rows(learner, relations))
    visits = learner.visits(3)
    assert [visit.pair < num_own for visit in visits] == [True] * 4 + [False] * 4 and learner.visits(3) == visits
    reference = learner.reference(Policy(load_model("tiny"), learner.config, 0), [3], tmp_path / "reference.parquet")
    [(make_batch, _)] = learner.passes(visits)
    batch = make_batch("cpu")
    parts = reference.logprobs(batch).split(batch.num_tokens_of[REPLAY])
    for visit, part in zip(batch.visits_of[REPLAY], parts, strict=True):
        assert (part == 0).all() if visit.pair < num_own else (part < 0).all()


def test_the_labels_are_learned_and_a_resumed_run_ends_alike(relations, tmp_path):
    digests = {}
    for name, stops in (("whole", ()), ("resumed", (8,))):
        for num_steps in (*stops, None):
            model = load_model("tiny")
            config = config_of("train.checkpoint_every=4")
            if num_steps:  # as if killed there: only the checkpoint is left
                with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
                    patch.setattr(OwnDrawings, "visits", _killed_at(num_steps, OwnDrawings.visits))
                    train_records(model, relations, config, seed=0, folder=tmp_path / name)
            else:
                train_records(model, relations, config, seed=0, folder=tmp_path / name)
        digests[name] = model_digest(model)
    assert digests["whole"] == digests["resumed"]
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["replay/kl"] < lines[0]["replay/kl"]  # at first of the labels alone


def test_bfloat16_learns_from_the_same_drawings(relations, learner, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(OwnDrawings, "passes", lambda self, visits: made.append(self) or PairDPO.passes(self, visits))
    train_records(
        load_model("tiny"),
        relations,
        config_of("train.dtype=bfloat16", "train.num_steps=2"),
        seed=0,
        folder=tmp_path,
    )
    assert made[0].packer.pairs.equals(learner.packer.pairs)


def _killed_at(last, visits):
    seen = []

    def killed(self, step):
        seen.append(step)
        if seen.count(step) > 1 and step >= last:  # the reference has asked for each step once
            raise KeyboardInterrupt
        return visits(self, step)

    return killed


def test_what_cannot_be_taught_is_refused(relations):
    model = load_model("tiny")
    with pytest.raises(
        InputError, match="no record asks for food and for something else; .* have: background, color, "
    ):
        OwnDrawings(model, relations, config_of('own_drawings.element_types=["food"]'), 0)
    with pytest.raises(InputError, match="has no questions to judge its images by"):
        OwnDrawings(model, [replace(relations[0], questions=())], config_of(), 0)
    wrong = [
        replace(
            record,
            questions=tuple(
                question
                if question.element_type == "spatial"
                else replace(question, answer=next(item for item in question.choices if item != question.answer))
                for question in record.questions
            ),
        )
        for record in relations
    ]
    with pytest.raises(InputError, match="answers no drawing as its caption does in all other questions"):
        OwnDrawings(model, wrong, config_of(), 0)
    with pytest.raises(InputError, match="own_drawings.element_types: expected at least one, got none"):
        config_of("own_drawings.element_types=[]")
    with pytest.raises(InputError, match="train.pairs_per_step 3: half of them are of drawings; give an even number"):
        check_training(config_of("train.pairs_per_step=3"))
    every = 'own_drawings.element_types=["background","color","count","location","object","size","spatial"]'
    with pytest.raises(InputError, match="and for something else"):  # nothing is left to judge a drawing by
        OwnDrawings(model, relations, config_of(every), 0)
    with pytest.raises(InputError, match="train.holdout_pairs: expected 0 with own-drawings"):
        check_training(config_of("train.holdout_pairs=2"))
