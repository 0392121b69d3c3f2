"""The engine: what it refuses, what it hands on, and that its results are free of inference mode."""

import dataclasses
import logging

import pytest
import torch

from hermesflow.engine import memory_planner
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.nan_cause import NotFiniteError
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.kernels.registry import BackendError
from hermesflow.kernels.span_tree import SpanTree

GENERATE = {"num_images": 2, "num_steps": 4, "guidance_scale": 1.0, "mask_temperature": 1.0}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=4)


@pytest.fixture
def engine(naive):
    return Engine(naive.tiny_model(), naive.LAYOUT)


@pytest.fixture
def codes():
    return torch.arange(32).view(2, 16)


def seeds(*shape):
    return torch.arange(torch.Size(shape).numel()).view(shape)


def test_generate_equals_the_naive_loop(naive, engine):
    got = engine.generate([[5, 6], [7]], **GENERATE, seeds=seeds(2, 2))
    params = ImageSamplingParams(**{name: value for name, value in GENERATE.items() if name != "num_images"})
    for prompt, row, images in zip([[5, 6], [7]], seeds(2, 2).tolist(), got, strict=True):
        for seed, image in zip(row, images, strict=True):
            assert torch.equal(image, naive.draw_image(engine.transformer, naive.LAYOUT, prompt, seed, params))


@pytest.mark.parametrize(("num_tokens", "spans"), [(16, 910), (256, 64), (1024, 16), (65536, 2)])
def test_a_pass_is_bounded_by_the_tokens_that_speed_asks_for(naive, num_tokens, spans):
    layout = dataclasses.replace(naive.LAYOUT, num_image_tokens=num_tokens)
    assert Engine(naive.tiny_model(), layout).max_sequences == spans


def test_a_pass_is_bounded_by_free_memory_once(naive, monkeypatch, caplog):
    engine = Engine(naive.tiny_model(), naive.LAYOUT)
    each = memory_planner.token_bytes(engine.transformer.config, 4)
    monkeypatch.setattr(memory_planner, "free_bytes", lambda device: each * 18 * 10 / memory_planner.SHARE + 1)
    with caplog.at_level(logging.DEBUG, logger="hermesflow"):
        assert engine.max_sequences == 10
        assert 1 <= engine.max_tokens < 180
        monkeypatch.setattr(memory_planner, "free_bytes", lambda device: 0)
        assert engine.max_sequences == 10
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "images: up to 180 tokens a pass",
        f"text: up to {engine.max_tokens} tokens a pass",
    ]


def test_the_steps_of_each_pass_can_be_watched(engine):
    passes = []

    def progress(steps):
        passes.append(0)
        for step in steps:
            passes[-1] += 1
            yield step

    watched = engine.generate([[5, 6], [7]], **GENERATE, seeds=seeds(2, 2), max_sequences=4, progress=progress)
    assert passes == [4, 4]
    assert torch.equal(watched, engine.generate([[5, 6], [7]], **GENERATE, seeds=seeds(2, 2)))


def test_drawn_codes_can_be_trained_on(engine):
    """A tensor made in inference mode would be refused by autograd."""
    codes = engine.generate([[5]], **GENERATE, seeds=seeds(1, 2))
    engine.transformer.embed(codes.flatten()).sum().backward()


def test_extend_and_score(naive, engine, codes):
    questions = [[[5], [6, 7]], [[8]]]
    ids = engine.generate_text(codes, questions, sampling=[GREEDY], seeds=seeds(2, 2, 1))
    assert ids[1][0][0] == naive.answer(engine.transformer, naive.LAYOUT, codes[1].tolist(), [8], GREEDY, seed=2)
    scores = engine.score_choices(codes, questions, [[[[5], [6]], [[7]]], [[[8, 9]]]])
    truth = naive.choice_logprob(engine.transformer, naive.LAYOUT, codes[1].tolist(), [8], [8, 9])
    assert scores[1][0] == pytest.approx([truth], rel=1e-5)


def test_nothing_in_nothing_out(engine, codes):
    assert engine.generate([], **GENERATE, seeds=seeds(0, 2)).shape == (0, 2, 16)
    assert engine.generate_text(codes[:0], [], sampling=[GREEDY], seeds=seeds(0, 0, 1)) == []
    assert engine.generate_text(codes, [[], []], sampling=[GREEDY], seeds=seeds(2, 0, 1)) == [[], []]
    assert engine.score_choices(codes[:0], [], []) == []


def test_int32_codes_are_welcome(engine, codes):
    """Records keep codes as int32."""
    wide, narrow = (engine.score_choices(given, [[[5]], []], [[[[6]]], []]) for given in (codes, codes.int()))
    assert wide == narrow


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_features_of_any_floating_dtype(naive, dtype):
    engine = Engine(naive.tiny_model(), naive.FEATURE_LAYOUT)
    features = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    scores = engine.score_choices(features, [[[5]], []], [[[[6, 7]]], []])
    truth = naive.choice_logprob(engine.transformer, naive.FEATURE_LAYOUT, features[0], [5], [6, 7])
    assert scores[0][0] == pytest.approx([truth], rel=1e-5)


def test_logprobs_follow_the_callers_gradient_mode(engine):
    tree = SpanTree.build([([1, 2, 3], -1, "causal")])
    rows, targets = torch.tensor([0, 1]), torch.tensor([2, 3])
    got = engine.logprobs(tree, rows, targets)
    assert got.requires_grad
    assert torch.equal(got, span_logprobs(engine.transformer, tree, rows, targets))
    with torch.no_grad():
        assert not engine.logprobs(tree, rows, targets).requires_grad
    with pytest.raises(ValueError, match=r"Engine.logprobs: expected rows and targets of one shape \[T\], got \[2\]"):
        engine.logprobs(tree, rows, targets[:1])


def test_engine_shares_the_model(naive):
    transformer = naive.tiny_model()
    engine = Engine(transformer, naive.LAYOUT, dtype=torch.bfloat16)
    assert engine.transformer is transformer
    assert (engine.dtype, engine.device) == (torch.bfloat16, torch.device("cpu"))
    drawn = engine.generate([[5]], **GENERATE, seeds=seeds(1, 2))
    assert ((drawn >= 0) & (drawn < 64)).all()
    assert engine.generate_text(drawn[0], [[[5]]] * 2, sampling=[GREEDY], seeds=seeds(2, 1, 1))


def test_training_shows_at_once(engine, codes):
    before = engine.score_choices(codes[:1], [[[5]]], [[[[6]]]])
    with torch.no_grad():
        engine.transformer.head.weight[6] += 1.0
    assert engine.score_choices(codes[:1], [[[5]]], [[[[6]]]]) != before


def test_named_backend(naive, codes):
    named = Engine(naive.tiny_model(), naive.LAYOUT, backend="torch")
    default = Engine(naive.tiny_model(), naive.LAYOUT)
    options = dict(**GENERATE, seeds=seeds(1, 2))
    assert torch.equal(named.generate([[5]], **options), default.generate([[5]], **options))
    wrong = Engine(naive.tiny_model(), naive.LAYOUT, backend="abacus")
    with pytest.raises(BackendError, match="abacus"):
        wrong.generate([[5]], **options)
    with pytest.raises(BackendError, match="abacus"):
        wrong.extend(codes, [[[5]], []], sampling=[GREEDY], seeds=seeds(2, 1, 1))
    with pytest.raises(BackendError, match="abacus"):
        wrong.score_choices(codes, [[[5]], []], [[[[5]]], []])


def test_model_of_another_layout(naive):
    layout = dataclasses.replace(naive.LAYOUT, codebook_size=32)
    with pytest.raises(ValueError, match="Engine: expected a transformer with the layout's vocab_size 83, got 115"):
        Engine(naive.tiny_model(), layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": seeds(1, 3)}, r"expected seeds int64 \[P, num_images\] = \[1, 2\], got torch.int64 \[1, 3\]"),
        ({"seeds": seeds(1, 2).int()}, r"expected seeds int64 .* got torch.int32"),
        ({"num_images": 0, "seeds": seeds(1, 0)}, "expected num_images of at least 1, got 0"),
        ({"max_sequences": 0}, "expected max_sequences of at least 1, got 0"),
        ({"prompt_ids": [[5, 40]]}, r"text ids in \[0, 40\) in prompt 0, got \[5, 40\]; leave special tokens"),
        ({"prompt_ids": [[-1]]}, "text ids .* in prompt 0"),
        ({"known_codes": seeds(1, 15)}, r"expected known_codes int64 .* = \[1, 16\], got torch.int64 \[1, 15\]"),
        ({"known_codes": torch.zeros(1, 16)}, "expected known_codes int64 .* got torch.float32"),
        ({"known_codes": torch.full((1, 16), -2)}, r"expected known_codes in \[-1, 64\), got -2 to -2"),
        ({"known_codes": seeds(2, 16)}, r"expected known_codes int64 .* = \[1, 16\], got torch.int64 \[2, 16\]"),
        ({"num_steps": 0}, "num_steps of 1 to 65536, got 0"),
        ({"schedule": "steep"}, "expected schedule .* got 'steep'"),
    ],
    ids=[
        "seeds-shape",
        "seeds-dtype",
        "images",
        "max-sequences",
        "ids",
        "negative-id",
        "known-shape",
        "known-dtype",
        "known-range",
        "known-rows",
        "steps",
        "schedule",
    ],
)
def test_bad_generate(engine, change, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(**(dict(prompt_ids=[[5]], **GENERATE, seeds=seeds(1, 2)) | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": seeds(2, 15)}, r"expected images as codes int64 \[B, 16\] .*, got torch.int64 \[2, 15\]"),
        ({"images": torch.zeros(2, 16)}, r"features \[B, F, 32\] of a floating dtype, got torch.float32 \[2, 16\]"),
        ({"images": torch.full((2, 16), 64)}, r"expected codes in \[0, 64\), got 64 to 64; .* code_offset"),
        ({"images": torch.zeros(2, 9, 31)}, r"features \[B, F, 32\] .*, got torch.float32 \[2, 9, 31\]"),
        ({"images": torch.zeros(2, 0, 32)}, r"features \[B, F, 32\] .*, got torch.float32 \[2, 0, 32\]"),
        ({"images": torch.zeros(2, 9, 32).long()}, r"features \[B, F, 32\] .*, got torch.int64 \[2, 9, 32\]"),
        ({"images": torch.full((2, 9, 32), float("nan"))}, r"expected finite features, got NaN .* vision encoder"),
        ({"images": torch.zeros(2, 9, 32).double() + 1e300}, "expected finite features, .* infinity in torch.float32"),
        ({"images": torch.zeros(1, 9, 32)}, "expected a list of questions for each of 1 images, got 2 lists"),
        ({"question_ids": [[[5]]]}, "expected a list of questions for each of 2 images, got 1 lists"),
        ({"question_ids": [[[5]], [[6], [99]]]}, r"in question 1 of image 1, got \[99\]"),
        ({"sampling": []}, "expected at least one SamplingParams in sampling, got none"),
        ({"seeds": seeds(2, 1)}, r"expected seeds int64 \[B, Q, S\] = \[2, 1, 1\], got torch.int64 \[2, 1\]"),
        ({"seeds": seeds(2, 0, 1)}, r"\[B, Q, S\] = \[2, 1, 1\], got torch.int64 \[2, 0, 1\]"),
        ({"seeds": seeds(2, 1, 2)}, r"\[B, Q, S\] = \[2, 1, 1\], got torch.int64 \[2, 1, 2\]"),
        ({"max_tokens": 0}, "expected max_tokens of at least 1, got 0"),
    ],
    ids=[
        "tokens",
        "float",
        "range",
        "width",
        "no-features",
        "integer-features",
        "nan",
        "overflow",
        "feature-questions",
        "questions",
        "ids",
        "sampling",
        "seeds-2d",
        "seeds-few",
        "seeds-many",
        "bound",
    ],
)
def test_bad_extend(engine, codes, change, message):
    arguments = {"images": codes, "question_ids": [[[5]], [[6]]], "sampling": [GREEDY], "seeds": seeds(2, 1, 1)}
    with pytest.raises((ValueError, NotFiniteError), match=f"Engine.generate_text: .*{message}"):
        engine.generate_text(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice_ids": [[[[5]]]]}, "expected a list of choices for each question; nest choice_ids as question_ids"),
        ({"choice_ids": [[[[5]]], [[[]]]]}, "choice 0 of image 1, question 0 has no tokens; leave it out"),
        ({"choice_ids": [[[[5]]], [[[6], [70]]]]}, r"in choice 1 of image 1, question 0, got \[70\]"),
        ({"images": torch.full((2, 16), -1)}, "expected codes in"),
        ({"images": torch.full((2, 9, 32), float("inf"))}, "expected finite features"),
        ({"question_ids": [[[5]]]}, "expected a list of questions for each of 2 images, got 1 lists"),
        ({"max_tokens": 0}, "expected max_tokens of at least 1, got 0"),
    ],
    ids=["nesting", "empty-choice", "ids", "codes", "features", "questions", "bound"],
)
def test_bad_score_choices(engine, codes, change, message):
    arguments = {"images": codes, "question_ids": [[[5]], [[6]]], "choice_ids": [[[[5]]], [[[6]]]]}
    with pytest.raises((ValueError, NotFiniteError), match=f"Engine.score_choices: .*{message}"):
        engine.score_choices(**(arguments | change))
