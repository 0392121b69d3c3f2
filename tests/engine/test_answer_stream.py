"""Continuous batching: the same answers however they are batched, in less work than batch after batch."""

import itertools
import random
import sys
import weakref

import pytest
import torch

from hermesflow.engine import answer_stream
from hermesflow.engine.answer_stream import Pace
from hermesflow.engine.decoders.text import SamplingParams, TextDecoder
from hermesflow.kernels.span_tree import SpanTree

MIXED = [
    SamplingParams(temperature=0.0, max_new_tokens=9),
    SamplingParams(max_new_tokens=6),
    SamplingParams(temperature=0.7, top_k=3, max_new_tokens=12),
    SamplingParams(temperature=2.0, top_p=0.8, max_new_tokens=1),
    SamplingParams(temperature=1.5, min_p=0.05, max_new_tokens=4),
]
LENGTHS = [[3, 0, 7, 1, 2], [1, 1, 1, 1, 1], [12, 2, 0, 5, 4], [2, 9, 3, 3, 1]] * 2
LONG = [SamplingParams(max_new_tokens=40)]
"""Ends where eot is drawn, after one token or forty."""


@pytest.fixture(scope="module")
def model(naive):
    model = naive.tiny_model("parallel-gqa-partial-qknorm")
    model.head.bias.data[naive.LAYOUT.eot] += 3.5
    return model


@pytest.fixture(scope="module")
def images():
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def questions():
    numbers = random.Random(0)
    return [[[numbers.randrange(2, 40) for _ in range(length)] for length in of_image] for of_image in LENGTHS]


def seeds_of(num_samples):
    return torch.arange(8 * 5 * num_samples).view(8, 5, num_samples) * 7 + 2**40


@pytest.fixture
def fed(model):
    """Token ids of each pass."""
    passes = []
    handle = model.embed.register_forward_hook(lambda _, inputs, __: passes.append(inputs[0].tolist()))
    yield passes
    handle.remove()


@pytest.fixture(scope="module")
def alone(naive, model, images, questions):
    """200 samples, each drawn by itself."""
    text, seeds = TextDecoder(model, naive.LAYOUT), seeds_of(5)
    with torch.inference_mode():
        return [
            [
                [
                    text.extend(
                        images[image : image + 1], [[ids]], [params], seeds[image, question, sample].view(1, 1, 1)
                    )[0][0][0]
                    for sample, params in enumerate(MIXED)
                ]
                for question, ids in enumerate(of_image)
            ]
            for image, of_image in enumerate(questions)
        ]


@pytest.mark.parametrize("pace", [Pace(1, 0.0, False), Pace(3, 0.5, True)], ids=["as-on-the-cpu", "as-on-cuda"])
@pytest.mark.parametrize("max_tokens", [16384, 400, 130, 1])
@torch.inference_mode()
def test_two_hundred_samples_do_not_depend_on_the_batch(
    naive, model, images, questions, alone, monkeypatch, max_tokens, pace
):
    monkeypatch.setitem(answer_stream._PACE, "cpu", pace)
    got = TextDecoder(model, naive.LAYOUT).extend(images, questions, MIXED, seeds_of(5), max_tokens=max_tokens)
    assert got == alone
    assert len({tuple(ids) for of_image in got for samples in of_image for ids in samples}) > 100


@pytest.mark.parametrize("max_tokens", [16384, 200])
@torch.inference_mode()
def test_shuffled_samples_are_the_same(naive, model, images, questions, alone, max_tokens):
    numbers = random.Random(1)
    order, samples = numbers.sample(range(8), 8), numbers.sample(range(5), 5)
    asked = [numbers.sample(range(5), 5) for _ in order]
    shuffled = [[questions[image][q] for q in row] for image, row in zip(order, asked, strict=True)]
    seeds = torch.stack([seeds_of(5)[image, row][:, samples] for image, row in zip(order, asked, strict=True)])
    got = TextDecoder(model, naive.LAYOUT).extend(
        images[order], shuffled, [MIXED[sample] for sample in samples], seeds, max_tokens=max_tokens
    )
    assert got == [
        [[alone[image][q][sample] for sample in samples] for q in row] for image, row in zip(order, asked, strict=True)
    ]


@pytest.mark.parametrize("max_tokens", [16384, 300, 130, 1])
@pytest.mark.parametrize("sampling", [MIXED, LONG], ids=["mixed", "long"])
@torch.inference_mode()
def test_images_and_questions_are_computed_once(naive, model, images, questions, fed, sampling, max_tokens):
    text, seeds = TextDecoder(model, naive.LAYOUT), seeds_of(len(sampling))
    answers = text.extend(images, questions, sampling, seeds, max_tokens=max_tokens)
    prefills = [ids for ids in fed if naive.LAYOUT.sot in ids and len(ids) > 1]
    assert sum(ids.count(naive.LAYOUT.soi) for ids in fed) == len(images)
    # Then one token for each that an answer continues from, and never a finished one's.
    limits = [params.max_new_tokens for params in sampling]
    kept = [min(len(ids), limit - 1) for row in answers for of in row for ids, limit in zip(of, limits, strict=True)]
    asked = sum(1 + length for of_image in LENGTHS for length in of_image)
    assert sum(map(len, fed)) == 8 * (16 + 3) + asked + sum(kept)
    assert len(prefills) >= (1 if max_tokens == 16384 else 2)


@pytest.mark.parametrize("max_tokens", [250, 500])
@torch.inference_mode()
def test_leaving_and_entering_shortens_the_work(naive, model, images, questions, fed, max_tokens):
    """Fewer passes than batch after batch, each of which lasts as long as its longest answer."""
    answers = TextDecoder(model, naive.LAYOUT).extend(images, questions, LONG, seeds_of(1), max_tokens=max_tokens)
    flat = [
        (image, len(ids), len(answers[image][question][0]))
        for image, of_image in enumerate(questions)
        for question, ids in enumerate(of_image)
    ]
    batches, room = [], 0
    for image, length, answer in flat:
        size = 1 + length + 40
        needed = size if batches and batches[-1][-1][0] == image else size + 16 + 3
        if needed > room:
            batches.append([])
            needed, room = size + 16 + 3, max_tokens
        batches[-1].append((image, answer))
        room -= needed
    passes = sum(1 + min(39, max(answer for _, answer in batch)) for batch in batches)
    assert len(batches) > 3 and len(fed) < 0.8 * passes
    entered = [index for index, ids in enumerate(fed) if naive.LAYOUT.sot in ids and len(set(ids)) > 3]
    assert len(entered) > 3 and len(fed[entered[1] + 1]) > 1, "others were unfinished while these entered"


@pytest.mark.parametrize("sampling", [MIXED, LONG], ids=["mixed", "long"])
@torch.inference_mode()
def test_replayed_steps_draw_what_eager_ones_do(
    naive, model, images, questions, fed, monkeypatch, recorded_graphs, sampling
):
    """The step waits for nothing and takes nothing from the host: the recorder would refuse it."""
    monkeypatch.setitem(answer_stream._PACE, "cpu", answer_stream._PACE["cuda"])
    # On CUDA the op looks at no values.
    monkeypatch.setattr(sys.modules["hermesflow.kernels.token_sample"], "can_read_values", lambda device: False)
    text = TextDecoder(model, naive.LAYOUT)
    replayed = text.extend(images, questions, sampling, seeds_of(len(sampling)), max_tokens=400)
    num_recorded, num_called = len(recorded_graphs), len(fed)
    fed.clear()
    monkeypatch.undo()
    eager = text.extend(images, questions, sampling, seeds_of(len(sampling)), max_tokens=400)
    assert replayed == eager
    assert 0 < num_recorded and num_called < len(fed), "replays call no Python"


@torch.inference_mode()
def test_a_step_serves_later_batches_of_its_size(naive, model, images, questions, monkeypatch):
    """Where the attention plans fit (here: all do, for there is no graph to keep)."""
    steps, make = [], answer_stream._Step
    monkeypatch.setitem(answer_stream._PACE, "cpu", answer_stream._PACE["cuda"])
    monkeypatch.setattr(answer_stream, "_Step", lambda *args: steps.append(make(*args)) or steps[-1])
    text = TextDecoder(model, naive.LAYOUT)
    expected = text.extend(images, questions, LONG, seeds_of(1), max_tokens=400)
    num_without = len(steps)
    steps.clear()
    monkeypatch.setattr(SpanTree, "load_", lambda self, other: self.__dict__.update(other.__dict__) or True)
    assert text.extend(images, questions, LONG, seeds_of(1), max_tokens=400) == expected
    sizes = [len(step.rows.seed) for step in steps]
    assert len(set(sizes)) == len(sizes) < num_without
    assert set(sizes) <= {1, 2, 3, 4, 6, 8, 12, 16}


@torch.inference_mode()
def test_nan_at_a_later_step(naive, images):
    """A token with a broken embedding does harm where it is fed, in whichever pass that is."""
    model = naive.tiny_model()
    text, question = TextDecoder(model, naive.LAYOUT), [5, 6, 7]
    sampling = [SamplingParams(temperature=1.5, top_k=8, max_new_tokens=12)] * 3
    seeds = torch.arange(2 * 3).view(2, 1, 3)
    answers = text.extend(images[:2], [[question]] * 2, sampling, seeds)
    drawn = [(ids.index(token), sample, token) for sample, ids in enumerate(answers[1][0]) for token in ids]
    elsewhere = {token for ids in answers[0][0] for token in ids} | set(question)
    step, sample, token = min(entry for entry in drawn if entry[0] > 0 and entry[2] not in elsewhere)
    model.embed.weight[token] = float("inf")
    message = rf"image 1, question 0, sample {sample}, step {step + 1}; check its weights: embed.weight holds NaN"
    for max_tokens in (16384, 1):
        with pytest.raises(RuntimeError, match=message):
            text.extend(images[:2], [[question]] * 2, sampling, seeds, max_tokens=max_tokens)


def fail_above(model, monkeypatch, where, tokens):
    """Memory for so many tokens in the cache or in a pass; gives the capacities that were allocated or tried."""
    tried, caches, forward, new_cache = [], [], model.forward, model.new_cache

    def limited_forward(tree, *args, **kwargs):
        if where == "forward" and len(tree.token_ids) > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return forward(tree, *args, **kwargs)

    def limited_cache(capacity):
        assert not any(cache() for cache in caches), "the failed batch holds its cache no more"
        tried.append(capacity)
        if where == "new_cache" and capacity > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        cache = new_cache(capacity)
        caches.append(weakref.ref(cache))
        return cache

    monkeypatch.setattr(model, "forward", limited_forward)
    monkeypatch.setattr(model, "new_cache", limited_cache)
    return tried


@pytest.mark.parametrize("where", ["new_cache", "forward"])
@torch.inference_mode()
def test_out_of_memory_halves_the_batch(naive, model, images, questions, alone, monkeypatch, caplog, where):
    tried = fail_above(model, monkeypatch, where, tokens=100)
    text = TextDecoder(model, naive.LAYOUT)
    assert text.extend(images, questions, MIXED, seeds_of(5)) == alone
    bounds = [capacity - 1 for capacity in tried]  # a slot more is for filling up
    assert bounds == [1590, 795, 397, 198, 99][: len(bounds)] and len(bounds) > 2
    assert caplog.messages == [
        f"TextDecoder.extend: out of memory with {before} tokens in a batch; continuing with {after}"
        for before, after in itertools.pairwise(bounds)
    ]
    tried.clear()
    assert text.extend(images, questions, MIXED, seeds_of(5)) == alone and tried == [bounds[-1] + 1], "it remembers"


@torch.inference_mode()
def test_out_of_memory_while_scoring(naive, model, images, questions, monkeypatch, caplog):
    choices = [[[[5], [6, 7]]] * 5] * 8
    text = TextDecoder(model, naive.LAYOUT)
    expected = text.score_choices(images, questions, choices)
    fail_above(model, monkeypatch, "forward", tokens=100)
    got = text.score_choices(images, questions, choices)
    assert torch.tensor(got).sub(torch.tensor(expected)).abs().max() < 1e-4
    first = "TextDecoder.score_choices: out of memory with 430 tokens in a batch; continuing with 215"
    assert len(caplog.messages) == 3 and caplog.messages[0] == first


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("not memory")])
@torch.inference_mode()
def test_errors_that_halving_does_not_mend(naive, model, images, questions, monkeypatch, error):
    calls = []

    def fail(capacity):
        calls.append(capacity)
        raise error

    monkeypatch.setattr(model, "new_cache", fail)
    with pytest.raises(type(error), match=str(error)):
        TextDecoder(model, naive.LAYOUT).extend(images, questions, MIXED, seeds_of(5))
    one = 16 + 3 + 12 + 1 + sum(params.max_new_tokens for params in MIXED)
    assert len(calls) == 1 if "not" in str(error) else one < calls[-1] <= one + 1 + 13


@torch.inference_mode()
def test_a_last_token_is_never_fed(naive, images, monkeypatch):
    """An answer at its limit waits for others to end; what its last token would do to the model is nobody's concern."""
    monkeypatch.setitem(answer_stream._PACE, "cpu", Pace(8, 0.9, False))
    model = naive.tiny_model()
    text, question = TextDecoder(model, naive.LAYOUT), [5, 6, 7]
    sampling = [SamplingParams(max_new_tokens=3), SamplingParams(max_new_tokens=12)]
    for seed in itertools.count():
        seeds = torch.tensor([[[seed, seed + 1000]]])
        [[[short, long]]] = answers = text.extend(images[:1], [[question]], sampling, seeds)
        if len(short) == 3 and len(long) == 12 and short[2] not in {*short[:2], *long[:-1], *question}:
            break
    model.embed.weight[short[2]] = float("nan")
    assert text.extend(images[:1], [[question]], sampling, seeds) == answers


@torch.inference_mode()
def test_a_long_question_fits_beside_its_image_wherever_that_lies(naive, model, images, fed):
    """The second image enters beside the first; its long question finds the room on either side of it."""
    questions, sampling = [[[5]], [[6], list(range(2, 40))]], [SamplingParams(max_new_tokens=2)]
    text, seeds = TextDecoder(model, naive.LAYOUT), seeds_of(1)
    expected = text.extend(images[:2], questions, sampling, seeds)
    fed.clear()
    assert text.extend(images[:2], questions, sampling, seeds, max_tokens=1) == expected
    assert [sum(token == naive.LAYOUT.soi for token in ids) for ids in fed if len(ids) > 2] == [2, 0]
