"""Scores of captions and images."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from hermesflow.files import InputError
from hermesflow.models import TINY_PROMPTS, Model
from hermesflow.prompting import caption_prompt, choice_prompt
from hermesflow.records import Question, Record
from hermesflow.scoring import caption_scores, self_vqa, token_f1
from hermesflow.worlds import shapes

COLOR = Question("what color is it ?", ("red", "green", "blue", "yellow"), "green", "color", "green")
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
    assert caption_scores("token_f1", [caption, truth], truth) == [pytest.approx(score), token_f1(truth, truth)]


def test_token_f1_puts_a_wrong_fact_below_another_order_of_mention() -> None:
    truth = "a red circle and a blue square on a black background"
    other_order = "a blue square and a red circle on a black background"
    wrong = "a red circle and a red circle on a white background"
    assert 1 > token_f1(other_order, truth) > token_f1(wrong, truth) > 0


def test_an_unknown_scorer_is_refused() -> None:
    with pytest.raises(ValueError, match="caption_scores: expected scorer 'token_f1' or 'bert', got 'bleu'"):
        caption_scores("bleu", ["a"], "a")


@pytest.fixture
def tiny_bert(tmp_path):
    """The folder of a BERT of random weights."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *shapes.vocabulary()]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32, initializer_range=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(tmp_path)
    return tmp_path


def test_bert_scores_are_cosines_of_cls(tiny_bert) -> None:
    from transformers import AutoModel, AutoTokenizer

    truth = "a red circle on a black background"
    captions = [truth, "a blue square", "", "a red circle above a blue square on a black background"]
    scores = caption_scores("bert", captions, truth, bert_name=str(tiny_bert))
    tokenizer, bert = AutoTokenizer.from_pretrained(tiny_bert), AutoModel.from_pretrained(tiny_bert).eval()
    with torch.no_grad():  # one text at a time, so without padding
        states = [bert(**tokenizer(text, return_tensors="pt")).last_hidden_state[0, 0] for text in [truth, *captions]]
    expected = [torch.cosine_similarity(states[0], state, dim=0).item() for state in states[1:]]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] < 0.999
    assert caption_scores("bert", [], truth, bert_name=str(tiny_bert)) == []


def test_a_bert_that_is_not_there_is_an_input_error(tmp_path) -> None:
    name = str(tmp_path / "no-bert")
    with pytest.raises(InputError, match=r"no-bert: this BERT cannot be loaded \(.*set curation.caption_scorer to"):
        caption_scores("bert", ["a"], "a", bert_name=name)


class ScriptedModel:
    """A model whose log-probabilities are given, and which keeps what it was asked."""

    def __init__(self, logprobs: list) -> None:
        self.logprobs, self.calls = logprobs, []
        self.engine = SimpleNamespace(score_choices=self._score_choices)

    prompts = TINY_PROMPTS

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
        pytest.approx([(0.5 + 0.75) / 2, (0.25 + 0.5) / 2]), pytest.approx([0.5, 1.0])
    ]  # fmt: skip
    assert [[image.hard for image in images] for images in scores] == [[1.0, 0.5], [1.0, 1.0]]
    assert [answer[:3] for answer in scores[0][1].answers] == [
        ("what color is it ?", "red", "green"), ("is there a circle ?", "yes", "yes")
    ]  # fmt: skip
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
                prompt = choice_prompt(tiny_model, question)
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


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_self_vqa_stops_at_a_broken_model(bad: float) -> None:
    model = ScriptedModel([[[bad, -1.0]]])
    with pytest.raises(RuntimeError, match=r"of \['yes', 'no'\] are not finite for record 'a', question 'is there"):
        self_vqa(model, torch.zeros(1, 1, 3, dtype=torch.int64), [record("a", YES_NO)])


def test_prompts_are_the_plain_words(tiny_model: Model) -> None:
    assert tiny_model.decode_text(caption_prompt(tiny_model)) == "give a caption for this image ."
    prompt = choice_prompt(tiny_model, replace(COLOR, question="what color is the circle ?"))
    assert tiny_model.decode_text(prompt.question) == "what color is the circle ?"
    assert [tiny_model.decode_text(ids) for ids in prompt.choices] == ["red", "green", "blue", "yellow"]
