"""Scores of captions and images."""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hermesflow.config import ANSWER_SCORERS, CAPTION_SCORERS, REWARDS, ConfigError, CurationConfig, GRPOConfig
from hermesflow.data.records import Question, Record
from hermesflow.data.wording import token_f1
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models import Model
from hermesflow.runtime.files import InputError, shown
from hermesflow.scoring.scorers import Scorers, find_rewards, score_entries
from hermesflow.scoring.self_answers import check_record, self_vqa
from hermesflow.scoring.text_models import TextEncoder
from hermesflow.worlds.pretraining import PROMPTS as TINY_PROMPTS

COLOR = Question("what color is it ?", ("red", "green", "blue", "yellow"), "green", "color", "green")
RED = Question("what color is the circle ?", COLOR.choices, "red", "color", "red")
YES_NO = Question("is there a circle ?", ("yes", "no"), "yes", "object", "circle")


@pytest.mark.parametrize(
    ("caption", "truth", "score"),
    [
        ("a red circle", "a red circle", 1.0),
        ("A red  circle.", "a red circle", 1.0),
        ("blue square", "a red circle", 0.0),
        ("", "a red circle", 0.0),
        ("a red circle", "", 0.0),
        ("", "", 0.0),
        ("a b c", "a b d", 2 * 3 / (5 + 5)),  # a, b and "a b" of 3 words and 2 pairs each
        ("red red red", "red", 2 * 1 / (5 + 1)),  # a word counts as often as the truth has it
        ("c b a", "a b c", 2 * 3 / (5 + 5)),  # all words, no pair
        ("red", "a red circle", 2 * 1 / (1 + 5)),
    ],
)
def test_token_f1_by_hand(caption: str, truth: str, score: float) -> None:
    assert token_f1(caption, truth) == pytest.approx(score)
    assert score_captions("token-f1", [caption, truth], truth) == [pytest.approx(score), token_f1(truth, truth)]


def test_token_f1_puts_a_wrong_fact_below_another_order_of_mention() -> None:
    truth = "a red circle and a blue square on a black background"
    other_order = "a blue square and a red circle on a black background"
    wrong = "a red circle and a red circle on a white background"
    assert 1 > token_f1(other_order, truth) > token_f1(wrong, truth) > 0


CAPTION = "a red circle above a blue square on a black background"


@pytest.mark.parametrize(
    ("scorer", "caption", "truth", "score"),
    [
        ("exact", "a red circle", "a red circle", 1),
        ("exact", "A red circle", "a red circle", 0),
        ("normalized", "The  red circle.", "a red circle", 1),
        ("normalised", "a theatre", "theatre", 1),  # an article inside a word stays
        ("normalised", "a red square", "a red circle", 0),
        # Facts: red circle is one, blue square is one, above, background; named: red, circle, blue, square.
        ("attribute-f1", CAPTION, CAPTION, 1),
        ("attribute-f1", "a blue square below a red circle on a black background", CAPTION, 1),
        ("attribute-f1", "a red circle", CAPTION, 2 * 3 / (3 + 8)),
        ("attribute-f1", CAPTION.replace("red", "green"), CAPTION, 2 * 5 / (8 + 8)),  # the shape still counts
        ("attribute-f1", CAPTION.replace("black", "white"), CAPTION, 2 * 7 / (8 + 8)),
        ("attribute-f1", "", CAPTION, 0),
    ],
)
def test_caption_scorers_by_hand(scorer: str, caption: str, truth: str, score: float) -> None:
    assert score_captions(scorer, [caption], truth) == [pytest.approx(score)]


def test_attribute_f1_refuses_a_truth_of_another_world() -> None:
    with pytest.raises(InputError, match="caption 'a fox': states no fact of the built-in world; choose another"):
        score_captions("attribute-f1", ["a red circle"], "a fox")


TRUTH = "a red circle on a black background"
TEXTS = [TRUTH, "a blue square", "", "a red circle above a blue square on a black background", "red " * 100]


@pytest.mark.parametrize(("scorer", "pooling"), [("bert-cls", "cls"), ("sentence", "mean")])
def test_embeddings_are_those_of_one_text_at_a_time(tiny_encoder: str, scorer: str, pooling: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer, bert = AutoTokenizer.from_pretrained(tiny_encoder), AutoModel.from_pretrained(tiny_encoder).eval()
    states = []
    for text in [TRUTH, *TEXTS]:  # without padding
        with torch.no_grad():
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            state = bert(**inputs).last_hidden_state[0]
        states.append(state[0] if pooling == "cls" else state.mean(0))
    expected = [torch.cosine_similarity(states[0], state, dim=0).item() for state in states[1:]]
    scores = score_captions(scorer, TEXTS, TRUTH, bert_model=tiny_encoder, sentence_model=tiny_encoder)
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.999
    assert score_captions(scorer, [], TRUTH, bert_model=tiny_encoder, sentence_model=tiny_encoder) == []


def test_records_are_scored_together_as_alone(tiny_encoder: str) -> None:
    scorers = Scorers(CurationConfig(caption_scorer="sentence", sentence_model=tiny_encoder))
    alone = [score_captions("sentence", TEXTS[:n], truth, sentence_model=tiny_encoder) for n, truth in enumerate(TEXTS)]
    together = scorers.score_captions([TEXTS[:n] for n in range(len(TEXTS))], TEXTS)
    assert [len(row) for row in together] == [0, 1, 2, 3, 4]
    for mine, theirs in zip(together, alone, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def test_texts_are_embedded_once(tiny_encoder: str) -> None:
    encoder = TextEncoder(tiny_encoder, "mean", "choose another", cached_texts=3)
    embedded = []
    work = encoder._embed
    encoder._embed = lambda texts: embedded.extend(texts) or work(texts)
    first = encoder.encode(["red", "blue", "red"])
    assert sorted(embedded) == ["blue", "red"] and torch.equal(first[0], first[2])
    assert torch.equal(encoder.encode(["red", "green"])[0], first[0]) and embedded[2:] == ["green"]
    encoder.encode(["yellow"])  # the fourth text: blue was used longest ago
    encoder.encode(["red"])
    assert embedded[3:] == ["yellow"]
    assert len(encoder.encode(["one", "two", "three", "four"])) == 4  # more than are remembered
    embedded.clear()
    encoder.encode(["blue"])
    assert embedded == ["blue"]
    assert encoder.encode([]).shape == (0, 32)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_weights_in_a_bin_file_are_read(make_encoder, tiny_encoder: str, tmp_path: Path) -> None:
    make_encoder(tmp_path / "bin")
    torch.save(load_file(tmp_path / "bin" / "model.safetensors"), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    mine, theirs = (
        score_captions("bert-cls", TEXTS, TRUTH, bert_model=name) for name in (str(tmp_path / "bin"), tiny_encoder)
    )
    assert mine == pytest.approx(theirs)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("absent", "give a folder"),
        ("tokenizer", "it holds no tokenizer"),
        ("weights", "it lacks 1 weights, such as encoder.layer.1.output.dense.weight"),
        ("vocabulary", r"its tokenizer has \d+ tokens, the model 5"),
        ("pickle", "cannot be loaded"),
        ("nan", "this text model gives no finite numbers; its weights may be damaged"),
    ],
)
def test_a_model_that_cannot_be_used_is_named(tmp_path: Path, make_encoder, damage: str, reason: str) -> None:
    folder = tmp_path / "no-model"
    if damage != "absent":
        make_encoder(folder)
        path = folder / "model.safetensors"
        weights, name = load_file(path), "encoder.layer.1.output.dense.weight"
        if damage == "tokenizer":
            for file in ("tokenizer.json", "vocab.txt"):
                (folder / file).unlink(missing_ok=True)
        elif damage == "pickle":
            path.unlink()
            torch.save({"weight": Touch(tmp_path / "touched")}, folder / "pytorch_model.bin")
        elif damage == "weights":
            del weights[name]
        elif damage == "vocabulary":
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 5}))
            weights["embeddings.word_embeddings.weight"] = weights["embeddings.word_embeddings.weight"][:5].clone()
        else:
            weights[name] = weights[name] * math.nan
        if path.exists():
            save_file(weights, path, {"format": "pt"})
    named = re.escape(shown(str(folder)) if damage == "absent" else str(folder))
    with pytest.raises(InputError, match=f"{named}.*{reason}") as caught:
        score_captions("bert-cls", ["a"], "a", bert_model=str(folder))
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()
    assert damage == "nan" or "or set curation.bert_model to a folder, or" in str(caught.value)


CHOICES = ["red", "green", "a blue square"]


@pytest.mark.parametrize(
    ("scorer", "answer", "index"),
    [
        ("exact", "green", 1),
        ("exact", "Green", -1),
        ("exact", "", -1),
        ("normalized", "Green.", 1),
        ("normalised", "the blue square", 2),
        ("normalised", "blue", -1),
        ("normalised", "the", -1),
        ("sentence", "green", 1),
        ("sentence", "a blue square", 2),
    ],
)
def test_answers_are_matched(tiny_encoder: str, scorer: str, answer: str, index: int) -> None:
    scorers = Scorers(CurationConfig(answer_scorer=scorer, sentence_model=tiny_encoder))
    assert scorers.match_answers([answer, "red"], [CHOICES, CHOICES[:1]]) == [index, 0]


def test_the_nearest_choice_is_taken(tiny_encoder: str) -> None:
    scorers = Scorers(CurationConfig(answer_scorer="sentence", sentence_model=tiny_encoder))
    likeness = score_captions("sentence", CHOICES, "a yellow square", sentence_model=tiny_encoder)
    assert scorers.match_answers(["a yellow square"], [CHOICES]) == [likeness.index(max(likeness))]


def score_captions(scorer: str, captions: list[str], truth: str, **models: str) -> list[float]:
    [scores] = Scorers(CurationConfig(caption_scorer=scorer, **models)).score_captions([captions], [truth])
    return scores


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch) -> Iterator[None]:
    """A module of a user's with functions right and wrong."""
    (tmp_path / "own_scorers.py").write_text(
        "number = 3\n"
        "def lengths(captions, truth): return [len(caption) / len(truth) for caption in captions]\n"
        "def short(captions, truth): return [1.0]\n"
        "def nan(captions, truth): return [float('nan')] * len(captions)\n"
        "def words(captions, truth): return captions\n"
        "def single(captions, truth): return 1.0\n"
        "def sums(images, record): return images.reshape(len(images), -1).sum(1) + len(record.caption)\n"
        "def none(images, record): return None\n"
        "def last(answer, choices): return len(choices) - 1\n"
        "def beyond(answer, choices): return len(choices)\n"
        "def text(answer, choices): return choices[0]\n"
        "def true(answer, choices): return True\n"
    )
    (tmp_path / "broken_scorers.py").write_text("import nothing_of_this_name\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_scorers", None)


def test_a_function_of_the_users(own_module: None) -> None:
    assert score_captions("own_scorers:lengths", ["ab", "abcd"], "abcd") == [0.5, 1.0]
    scorers = Scorers(CurationConfig(answer_scorer="own_scorers:last"))
    assert scorers.match_answers(["x", "y"], [["a", "b"], ["c"]]) == [1, 0]


def drawn(model: Model) -> tuple[torch.Tensor, list[Record]]:
    """Images int64 [2, 3, N] of two records."""
    shape = (2, 3, model.layout.num_image_tokens)
    codes = torch.randint(model.layout.codebook_size, shape, generator=torch.Generator().manual_seed(0))
    return codes, [Record("a", "a red circle", "colors", (RED,)), Record("b", "a circle", "colors", (RED, YES_NO))]


def test_images_are_scored_by_the_model_or_a_function(own_module: None, shared_tiny_model: Model) -> None:
    codes, records = drawn(shared_tiny_model)
    asked = self_vqa(shared_tiny_model, codes, records)
    for name in ("soft", "hard"):
        scored = Scorers(CurationConfig(score=name)).score_images(shared_tiny_model, codes, records)
        assert scored == [[(getattr(score, name), score.answers) for score in of_record] for of_record in asked]
    scores = Scorers(CurationConfig(score="own_scorers:sums")).score_images(shared_tiny_model, codes, records)
    for of_record, record, of_scores in zip(codes, records, scores, strict=True):
        images = shared_tiny_model.decode_images(of_record)
        assert of_scores == [(int(image.sum()) + len(record.caption), ()) for image in images]


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        ("caption_scorer", "no_such_module:f", "the module no_such_module cannot be imported .*set PYTHONPATH"),
        ("answer_scorer", "broken_scorers:f", r"broken_scorers cannot be imported \(No module named 'nothing_of_this"),
        ("caption_scorer", "own_scorers:f", "the module own_scorers has no f; check the name"),
        ("answer_scorer", "own_scorers:number", "number is 3, which is no function; name a function"),
        ("caption_scorer", "own_scorers:short", r"expected a list of 2 finite numbers for the captions of 't', got"),
        ("caption_scorer", "own_scorers:nan", r"expected a list of 2 finite numbers .*got \[nan, nan\]; correct"),
        ("caption_scorer", "own_scorers:words", r"expected a list of 2 finite numbers .*got \['a', 'b'\]; correct"),
        ("caption_scorer", "own_scorers:single", r"expected a list of 2 finite numbers .*got 1.0; correct"),
        ("score", "own_scorers:none", "expected a list of 3 finite numbers for the images of record 'a', got None"),
        ("score", "own_scorers:last", "raised TypeError"),
        ("answer_scorer", "own_scorers:beyond", "the index of one of 2 choices, or -1, for the answer 'x', got 2"),
        ("answer_scorer", "own_scorers:text", "the index of one of 2 choices, or -1, for the answer 'x', got 'a'"),
        ("answer_scorer", "own_scorers:true", "the index of one of 2 choices, or -1, for the answer 'x', got True"),
    ],
)
def test_a_wrong_function_of_the_users_is_named(
    own_module: None, shared_tiny_model: Model, key: str, name: str, message: str
) -> None:
    with pytest.raises(InputError, match=f"curation.{key} {name}: .*{message}"):
        scorers = Scorers(CurationConfig(**{key: name}))
        if key == "caption_scorer":
            scorers.score_captions([["a", "b"]], ["t"])
        elif key == "score":
            scorers.score_images(shared_tiny_model, *drawn(shared_tiny_model))
        else:
            scorers.match_answers(["x"], [["a", "b"]])


@pytest.mark.parametrize("key", ["score", "caption_scorer", "answer_scorer"])
@pytest.mark.parametrize("name", ["bleu", "token_f1", "module:", ":function", "a b:c", "module:f:g"])
def test_an_unknown_scorer_is_refused(key: str, name: str) -> None:
    with pytest.raises(ConfigError, match=f'{key}: expected .*, or "module:function", got "{name}"'):
        CurationConfig(**{key: name})


def test_every_name_can_be_used(tiny_encoder: str) -> None:
    for name in CAPTION_SCORERS:
        assert len(score_captions(name, TEXTS, TRUTH, bert_model=tiny_encoder, sentence_model=tiny_encoder)) == 5
    for name in ANSWER_SCORERS:
        scorers = Scorers(CurationConfig(answer_scorer=name, sentence_model=tiny_encoder))
        assert (scorers.match_answers is None) == (name == "likelihood")


def test_entries_are_scored() -> None:
    config = CurationConfig()
    captions = [{"id": 1, "caption": "a red circle", "truth": "a red circle"}, {"caption": "blue", "truth": "red"}]
    assert score_entries("token-f1", captions, config) == [captions[0] | {"score": 1.0}, captions[1] | {"score": 0.0}]
    answers = [{"answer": "Red!", "choices": ["red", "blue"]}, {"answer": "dark", "choices": ["red"]}]
    assert score_entries("normalised", answers, config) == [
        answers[0] | {"choice": "red"},
        answers[1] | {"choice": None},
    ]
    assert score_entries("exact", [], config) == []


@pytest.mark.parametrize(
    ("scorer", "entries", "message"),
    [
        ("token-f1", [{"answer": "a", "choices": ["a"]}], "token-f1: expected likelihood, .* for entries {.answer"),
        ("likelihood", [{"answer": "a", "choices": ["a"]}], "--scorer likelihood: needs a model and an image; choose"),
        ("exact", [{"caption": "a", "truth": "b"}, {"caption": "a"}], 'entries: entry 2: expected {"caption": text'),
        ("exact", [{"answer": "a", "choices": []}], 'entry 1: expected {"answer": text, "choices": .texts.}'),
        ("exact", [{"answer": "a", "choices": ["a", 1]}], "entry 1: expected"),
        ("exact", [3], "entry 1: expected .* got 3; correct it"),
    ],
)
def test_entries_of_another_kind_are_refused(scorer: str, entries: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score_entries(scorer, entries, CurationConfig())


class ScriptedModel(Model):
    """A model whose log-probabilities are given, and which keeps what it was asked."""

    def __init__(self, logprobs: list) -> None:
        self.logprobs, self.calls = logprobs, []
        self.engine = SimpleNamespace(score_choices=self._score_choices)

    prompts, engine = TINY_PROMPTS, None

    def encode_text(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def _score_choices(self, codes: torch.Tensor, question_ids: list, choice_ids: list) -> list:
        self.calls.append((codes, question_ids, choice_ids))
        return self.logprobs


def record(id: str, *questions: Question) -> Record:
    return Record(id, "a caption", "colors", questions)


def test_self_vqa_by_hand() -> None:
    logprobs = [
        [[math.log(x) for x in (0.1, 0.2, 0.05, 0.05)], [math.log(0.3), math.log(0.1)]],  # green and yes: both right
        [[math.log(x) for x in (0.2, 0.1, 0.05, 0.05)], [-5.0, -5.0]],  # red: wrong; of equals the first: right
        [[-1.0, -1.0]],
        [[-1000.0, -2000.0]],  # no underflow
    ]
    model = ScriptedModel(logprobs)
    codes = torch.arange(2 * 2 * 3).reshape(2, 2, 3)
    scores = self_vqa(model, codes, [record("a", COLOR, YES_NO), record("b", YES_NO)])
    assert [[image.soft for image in images] for images in scores] == [
        pytest.approx([(0.5 + 0.75) / 2, (0.25 + 0.5) / 2]),
        pytest.approx([0.5, 1.0]),
    ]
    assert [[image.hard for image in images] for images in scores] == [[1.0, 0.5], [1.0, 1.0]]
    assert [answer[:3] for answer in scores[0][1].answers] == [
        ("what color is it ?", "red", "green"),
        ("is there a circle ?", "yes", "yes"),
    ]
    assert [answer.probability for answer in scores[0][1].answers] == pytest.approx([0.25, 0.5])
    ((asked_codes, question_ids, choice_ids),) = model.calls  # everything in one call
    assert torch.equal(asked_codes, codes.reshape(4, 3))
    assert [len(questions) for questions in question_ids] == [2, 2, 1, 1]
    assert choice_ids[0] == [[[3], [5], [4], [6]], [[3], [2]]]


def test_self_vqa_equals_questions_asked_one_by_one(tiny_model: Model, tiny_records: list[Record]) -> None:
    generator = torch.Generator().manual_seed(1)
    records = tiny_records[:3]
    codes = torch.randint(tiny_model.layout.codebook_size, (3, 2, 16), generator=generator)
    scores = self_vqa(tiny_model, codes, records)
    softs = []
    for of_record, images, item in zip(scores, codes, records, strict=True):
        for score, image in zip(of_record, images, strict=True):
            rights, answered = [], []
            for question in item.questions:
                prompt = tiny_model.choice_prompt(question.question, question.choices)
                logprobs = [
                    tiny_model.engine.score_choices(image[None], [[prompt.question]], [[[choice]]])[0][0][0]
                    for choice in prompt.choices
                ]
                chances = torch.tensor(logprobs, dtype=torch.float64).softmax(0)
                rights.append(chances[question.choices.index(question.answer)].item())
                answered.append(question.choices[int(chances.argmax())])
            assert [answer.probability for answer in score.answers] == pytest.approx(rights, abs=1e-5)
            assert [answer.answer for answer in score.answers] == answered
            assert score.soft == pytest.approx(sum(rights) / len(rights), abs=1e-5)
            right = [answer == question.answer for answer, question in zip(answered, item.questions, strict=True)]
            assert score.hard == pytest.approx(sum(right) / len(right))
            softs.append(score.soft)
    assert len({round(soft, 4) for soft in softs}) > 3  # the images do make a difference


@pytest.mark.parametrize("scorer", ["exact", "normalised", "sentence"])
def test_self_vqa_by_free_answers(
    tiny_model: Model, tiny_records: list[Record], tiny_encoder: str, scorer: str, monkeypatch
) -> None:
    tiny_model.prompts = replace(tiny_model.prompts, choices="{question} {choices}", max_answer_tokens=3)
    encode = tiny_model.encode_text
    monkeypatch.setattr(tiny_model, "encode_text", lambda text: encode(" ".join(re.findall(r"[\w?.]+", text))))
    monkeypatch.setattr(tiny_model.engine, "score_choices", None)  # nothing but free answers is asked for
    config = CurationConfig(answer_scorer=scorer, sentence_model=tiny_encoder)
    codes = torch.randint(tiny_model.layout.codebook_size, (3, 2, 16), generator=torch.Generator().manual_seed(1))
    scores = self_vqa(tiny_model, codes, tiny_records[:3], Scorers(config).match_answers)
    greedy, seeds = [SamplingParams(temperature=0.0, max_new_tokens=3)], torch.zeros(1, 1, 1, dtype=torch.int64)
    match = Scorers(config).match_answers
    for of_record, images, item in zip(scores, codes, tiny_records, strict=False):
        for score, image in zip(of_record, images, strict=True):
            rights = []
            for question, answer in zip(item.questions, score.answers, strict=True):
                prompt = tiny_model.choices_prompt(question.question, question.choices)
                [[[ids]]] = tiny_model.engine.generate_text(image[None], [[prompt]], sampling=greedy, seeds=seeds)
                [index] = match([tiny_model.decode_text(ids)], [question.choices])
                assert answer.answer == (question.choices[index] if index >= 0 else tiny_model.decode_text(ids))
                assert answer.probability == (index >= 0 and question.choices[index] == question.answer)
                assert (answer.question, answer.expected) == (question.question, question.answer)
                rights.append(answer.probability)
            assert score.soft == score.hard == pytest.approx(sum(rights) / len(rights))


def test_free_answers_are_right_where_they_mean_the_right_choice() -> None:
    said = {"a": ["green", "Yes."], "b": ["maybe"]}
    model = ScriptedModel([])
    model.decode_text = lambda text: text
    model.engine.generate_text = lambda codes, *_, **__: [[[text] for text in said["ab"[int(row[0])]]] for row in codes]
    records = [record("a", COLOR, YES_NO), record("b", YES_NO)]
    codes = torch.tensor([[[0]], [[1]]])
    match = Scorers(CurationConfig(answer_scorer="exact")).match_answers
    [[a], [b]] = self_vqa(model, codes, records, match)
    assert a.soft == a.hard == 0.5 and b.soft == b.hard == 0
    assert [answer[1:] for answer in a.answers] == [("green", "green", 1.0), ("Yes.", "yes", 0.0)]
    assert b.answers[0].answer == "maybe"


def test_likelihood_decodes_nothing(tiny_model: Model, tiny_records: list[Record], monkeypatch) -> None:
    monkeypatch.setattr(tiny_model.engine, "generate_text", None)
    match = Scorers(CurationConfig()).match_answers
    assert len(self_vqa(tiny_model, torch.zeros(1, 2, 16, dtype=torch.int64), tiny_records[:1], match)[0]) == 2


def test_self_vqa_of_nothing(tiny_model: Model, tiny_records: list[Record]) -> None:
    assert self_vqa(tiny_model, torch.zeros(0, 2, 16, dtype=torch.int64), []) == []
    assert self_vqa(tiny_model, torch.zeros(1, 0, 16, dtype=torch.int64), tiny_records[:1]) == [[]]


def test_self_vqa_refuses_what_it_cannot_score(tiny_model: Model, tiny_records: list[Record]) -> None:
    codes = torch.zeros(2, 3, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"self_vqa: expected codes \[B, n, N\] for 1 records, got \[2, 3, 16\]"):
        self_vqa(tiny_model, codes, tiny_records[:1])
    with pytest.raises(ValueError, match=r"self_vqa: expected codes \[B, n, N\] for 3 records, got \[3, 16\]"):
        self_vqa(tiny_model, codes[0], tiny_records[:3])
    silent = replace(tiny_records[0], questions=())
    with pytest.raises(ValueError, match="self_vqa: expected questions in record 'train-0', got none"):
        self_vqa(tiny_model, codes, [silent, tiny_records[1]])
    question = Question("what is a unicorn ?", ("yes", "no"), "yes", "object", "unicorn")
    with pytest.raises(InputError, match="does not know the word 'unicorn'"):
        self_vqa(tiny_model, codes[:1], [replace(silent, questions=(question,))])


REPEATS = [("green", "green"), ("GREEN", "green"), (" green", "green "), ("Red", "red", "red ")]


@pytest.mark.parametrize("scorer", ["likelihood", "exact", "normalized"])
@pytest.mark.parametrize("more", REPEATS, ids=map(str, REPEATS))
def test_a_choice_that_stands_twice_changes_no_score(shared_tiny_model: Model, more: tuple, scorer: str) -> None:
    codes = torch.randint(
        shared_tiny_model.layout.codebook_size, (1, 3, 16), generator=torch.Generator().manual_seed(1)
    )
    match = Scorers(CurationConfig(answer_scorer=scorer)).match_answers
    asked = [RED, replace(RED, choices=(*more, *RED.choices)), replace(RED, choices=(*RED.choices, *more))]
    [plain], *others = (self_vqa(shared_tiny_model, codes, [record("a", question)], match) for question in asked)
    for [scores] in others:
        assert [score.hard for score in scores] == [score.hard for score in plain]
        assert [score.soft for score in scores] == pytest.approx([score.soft for score in plain], abs=1e-5)


def test_choices_that_are_all_one_to_the_model_are_refused(shared_tiny_model: Model) -> None:
    lone = record("a", YES_NO, replace(COLOR, choices=("green", "Green")))
    message = r"record a: the choices \['green', 'Green'\] of 'what color is it \?' are one to the model.*; give two"
    for call in (
        lambda: self_vqa(shared_tiny_model, torch.zeros(1, 1, 16, dtype=torch.int64), [lone]),
        lambda: check_record(shared_tiny_model, replace(lone, codes=np.zeros(16, np.int32))),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_self_vqa_stops_at_a_broken_model(bad: float) -> None:
    model = ScriptedModel([[[bad, -1.0]]])
    with pytest.raises(RuntimeError, match=r"of \['yes', 'no'\] are not finite for record 'a', question 'is there"):
        self_vqa(model, torch.zeros(1, 1, 3, dtype=torch.int64), [record("a", YES_NO)])


def test_prompts_are_the_plain_words(tiny_model: Model) -> None:
    assert tiny_model.decode_text(tiny_model.caption_prompt()) == "give a caption for this image ."
    prompt = tiny_model.choice_prompt("what color is the circle ?", COLOR.choices)
    assert tiny_model.decode_text(prompt.question) == "what color is the circle ?"
    assert [tiny_model.decode_text(ids) for ids in prompt.choices] == ["red", "green", "blue", "yellow"]


def test_the_prompt_and_the_mixed_score(shared_tiny_model, tiny_records):
    """Mixed is soft times the prompt's probability, a token; log is that of the answers, each at least 1e-3."""
    records = tiny_records[:3]
    codes = torch.randint(0, 32, (3, 2, 16), generator=torch.Generator().manual_seed(0))
    found = {
        name: np.array([[judged.score for judged in row] for row in score(shared_tiny_model, codes, records, None)])
        for name, [(score, _)] in (
            (name, find_rewards(GRPOConfig(rewards=(name,), reward_weights=(1.0,)))) for name in REWARDS
        )
    }
    question = shared_tiny_model.caption_prompt()
    for record, of_record, prompts, mixed, soft in zip(
        records, codes, found["prompt"], found["mixed"], found["soft"], strict=True
    ):
        caption = shared_tiny_model.encode_text(record.caption)
        alone = shared_tiny_model.engine.score_choices(of_record, [[question]] * 2, [[[caption]]] * 2)
        assert prompts == pytest.approx([row[0][0] for row in alone], abs=1e-4)
        assert mixed == pytest.approx(soft * np.exp(prompts / (len(caption) + 1)), rel=1e-4)
    answers = self_vqa(shared_tiny_model, codes, records)
    logs = [[sum(np.log(max(item.probability, 1e-3)) for item in score.answers) for score in row] for row in answers]
    assert found["log"] == pytest.approx(np.array(logs), rel=1e-5)
    assert found["hard"].tolist() == [[score.hard for score in row] for row in answers]
    scored = Scorers(CurationConfig(score="mixed")).score_images(shared_tiny_model, codes, records)
    assert np.array([[judged.score for judged in row] for row in scored]) == pytest.approx(found["mixed"])
    assert all(judged.answers for row in scored for judged in row)
