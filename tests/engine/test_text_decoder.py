"""Text decoding against a loop that computes the whole sequence for each token."""

import dataclasses
import itertools

import pytest
import torch

from hermesflow.engine.decoders.text import SamplingParams, TextDecoder

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=9)
# One sampling setting a sample, as captions are drawn: filters, lengths and temperatures differ by row.
SAMPLING = [
    GREEDY,
    SamplingParams(max_new_tokens=7),
    SamplingParams(temperature=0.7, top_k=3, max_new_tokens=12),
    SamplingParams(temperature=2.0, top_p=0.8, min_p=0.02, max_new_tokens=1),
]
QUESTIONS = [[[5, 6, 7], [8], [9, 10, 11, 12]], [], [[5, 6, 7], []]]
CHOICES = [[[[5], [6, 7]], [[8, 9, 10]], []], [], [[[11], [12], [11, 12]], [[5]]]]
SEEDS = torch.arange(3 * 3 * 4).view(3, 3, 4) + 2**40


@pytest.fixture(scope="module", params=["codes", "features"])
def images(request):
    """Three images as 16 codes or as 9 features each."""
    generator = torch.Generator().manual_seed(0)
    if request.param == "codes":
        return torch.randint(0, 64, (3, 16), generator=generator)
    return torch.randn(3, 9, 32, generator=generator)


@pytest.fixture(params=["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied"])
def transformer(request, naive):
    return naive.tiny_model(request.param)


def decoder(transformer, naive):
    return TextDecoder(transformer, naive.FEATURE_LAYOUT)


def each(images):
    """The images as the naive module takes them."""
    return list(images) if images.is_floating_point() else images.tolist()


def expected_answers(naive, transformer, images, sampling, seeds, text_only=True):
    return [
        [
            [
                naive.answer(transformer, naive.FEATURE_LAYOUT, image, question, params, seed, text_only)
                for params, seed in zip(sampling, row, strict=True)
            ]
            for question, row in zip(questions, rows, strict=False)
        ]
        for image, questions, rows in zip(each(images), QUESTIONS, seeds.tolist(), strict=True)
    ]


@torch.inference_mode()
def test_greedy_answers_equal_the_naive_loop(naive, transformer, images):
    got = decoder(transformer, naive).extend(images, QUESTIONS, [GREEDY], SEEDS[..., :1])
    assert got == expected_answers(naive, transformer, images, [GREEDY], SEEDS[..., :1])
    assert [len(of_image) for of_image in got] == [3, 0, 2]


@pytest.mark.parametrize("text_only", [True, False], ids=["text", "joint"])
@torch.inference_mode()
def test_sampled_answers_equal_the_naive_loop(naive, transformer, images, text_only):
    got = decoder(transformer, naive).extend(images, QUESTIONS, SAMPLING, SEEDS, text_only=text_only)
    assert got == expected_answers(naive, transformer, images, SAMPLING, SEEDS, text_only)
    answers = list(itertools.chain.from_iterable(itertools.chain.from_iterable(got)))
    assert any(len(ids) == 12 for ids in answers[2::4]), "some answer reaches its limit"
    assert all(len(ids) <= 1 for ids in answers[3::4])
    joint = [token for ids in answers for token in ids if token >= naive.FEATURE_LAYOUT.text_vocab_size]
    assert bool(joint) is not text_only


@torch.inference_mode()
def test_answers_do_not_depend_on_the_batch(naive, images):
    transformer = naive.tiny_model()
    together = decoder(transformer, naive).extend(images, QUESTIONS, SAMPLING, SEEDS)
    for max_tokens in (1, 60, 150):
        cut = decoder(transformer, naive).extend(images, QUESTIONS, SAMPLING, SEEDS, max_tokens=max_tokens)
        assert cut == together
    for image, question, sample in [(0, 0, 2), (0, 2, 1), (2, 1, 0), (2, 0, 3)]:
        alone = decoder(transformer, naive).extend(
            images[image : image + 1],
            [[QUESTIONS[image][question]]],
            [SAMPLING[sample]],
            SEEDS[image, question, sample].view(1, 1, 1),
        )
        assert alone == [[[together[image][question][sample]]]]


@torch.inference_mode()
def test_eot_at_once(naive, images):
    transformer = naive.tiny_model("parallel-gqa-partial-qknorm")  # the one whose head has a bias
    transformer.head.bias[naive.FEATURE_LAYOUT.eot] = 100.0
    got = decoder(transformer, naive).extend(images, QUESTIONS, SAMPLING, SEEDS)
    assert got == [[[[]] * 4] * 3, [], [[[]] * 4] * 2]


@torch.inference_mode()
def test_limit_without_eot(naive, images):
    transformer = naive.tiny_model("parallel-gqa-partial-qknorm")
    transformer.head.bias[naive.FEATURE_LAYOUT.eot] = -100.0
    got = decoder(transformer, naive).extend(images, QUESTIONS, SAMPLING, SEEDS)
    assert [[[len(ids) for ids in of_question] for of_question in of_image] for of_image in got] == [
        [[9, 7, 12, 1]] * 3,
        [],
        [[9, 7, 12, 1]] * 2,
    ]


@torch.inference_mode()
def test_no_questions_and_no_images(naive, images):
    text = decoder(naive.tiny_model(), naive)
    assert text.extend(images[:0], [], [GREEDY], SEEDS[:0]) == []
    assert text.extend(images, [[], [], []], [GREEDY], SEEDS[:, :0]) == [[], [], []]
    assert text.score_choices(images[:0], [], []) == []
    assert text.score_choices(images, [[], [], []], [[], [], []]) == [[], [], []]
    assert text.score_choices(images[:1], [[[5]]], [[[]]]) == [[[]]]


@torch.inference_mode()
def test_work_is_shared(naive, images):
    """Image and questions once, whatever the samples; then one token for each unfinished answer."""
    transformer = naive.tiny_model("parallel-gqa-partial-qknorm")
    transformer.head.bias[naive.FEATURE_LAYOUT.eot] = -100.0
    counts = []
    transformer.embed.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    decoder(transformer, naive).extend(images[:1], QUESTIONS[:1], SAMPLING, SEEDS[:1])
    prefix = {16: 16 + 3, 9: 9 + 5}[images.shape[1]]
    prefill = prefix + sum(1 + len(question) for question in QUESTIONS[0])
    # Of the limits 9, 7, 12 and 1, those above step + 1 feed their token; the last token of an answer is never fed.
    assert counts == [prefill, *[3 * sum(limit > step + 1 for limit in (9, 7, 12, 1)) for step in range(11)]]

    counts.clear()
    decoder(transformer, naive).score_choices(images[:1], QUESTIONS[:1], CHOICES[:1])
    assert counts == [prefill + sum(len(ids) for choices in CHOICES[0] for ids in choices)]


@pytest.mark.parametrize("text_only", [True, False], ids=["text", "joint"])
@pytest.mark.parametrize("max_tokens", [16384, 50, 1])
@torch.inference_mode()
def test_choices_equal_the_naive_scores(naive, transformer, images, text_only, max_tokens):
    got = decoder(transformer, naive).score_choices(
        images, QUESTIONS, CHOICES, text_only=text_only, max_tokens=max_tokens
    )
    for image, questions, choices, scores in zip(each(images), QUESTIONS, CHOICES, got, strict=True):
        for question, of_question, row in zip(questions, choices, scores, strict=True):
            truth = [
                naive.choice_logprob(transformer, naive.FEATURE_LAYOUT, image, question, choice, text_only)
                for choice in of_question
            ]
            assert row == pytest.approx(truth, rel=1e-5)


@torch.inference_mode()
def test_nan_is_reported_with_answer_and_step(naive, images):
    transformer = naive.tiny_model()
    transformer.embed.weight[12] = float("nan")
    text = decoder(transformer, naive)
    with pytest.raises(RuntimeError, match=r"\(NaN\) for image 0, question 2, sample 0, step 0; check its weights"):
        text.extend(images, QUESTIONS, [GREEDY], SEEDS[..., :1])
    with pytest.raises(RuntimeError, match="for image 0, question 2"):  # whichever batch it rides in
        text.extend(images, QUESTIONS, [GREEDY], SEEDS[..., :1], max_tokens=1)


@torch.inference_mode()
def test_memory_bound_counts_features(naive):
    """A batch of two images by features needs their prefixes, questions and answers, and not a token more."""
    transformer = naive.tiny_model()
    counts = []
    transformer.embed.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    need = 2 * (naive.FEATURE_LAYOUT.num_image_tokens * 3 + 5 + 1 + 1 + 9)
    features = torch.randn(2, 3 * 16, 32)
    for max_tokens, first_pass in ((need, 2 * (48 + 5 + 2)), (need - 1, 48 + 5 + 2)):
        counts.clear()
        decoder(transformer, naive).extend(features, [[[5]]] * 2, [GREEDY], SEEDS[:2, :1, :1], max_tokens=max_tokens)
        assert counts[0] == first_pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": -0.1}, r"temperature in \[0, inf\], got -0.1"),
        ({"temperature": float("inf")}, "temperature in .*, got inf"),
        ({"top_k": -1}, "top_k in .*, got -1"),
        ({"top_p": 1.5}, r"top_p in \[0, 1\], got 1.5"),
        ({"min_p": float("nan")}, "min_p in .*, got nan"),
        ({"max_new_tokens": 0}, r"max_new_tokens in \[1, inf\], got 0"),
    ],
    ids=["temperature", "infinite", "top-k", "top-p", "min-p", "max-new-tokens"],
)
def test_bad_sampling_params(change, message):
    with pytest.raises(ValueError, match=f"SamplingParams: expected a finite {message}"):
        dataclasses.replace(GREEDY, **change)
