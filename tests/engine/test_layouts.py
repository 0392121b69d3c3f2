"""Layouts of other families: a vocabulary in any order, images of any grid with ids between their rows."""

import numpy as np
import pytest
import torch

from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.kernels.span_tree import SpanTree

GENERATE = {"num_images": 2, "num_steps": 3, "guidance_scale": 1.0, "mask_temperature": 1.0}
SEEDS = torch.arange(4).view(2, 2)


class Shuffled(Layout):
    """The layout of another one, whose token t has the id order[t]."""

    def __init__(self, layout, order):
        self.layout, self.order = layout, order
        self.vocab_size, self.codebook_size = layout.vocab_size, layout.codebook_size
        self.num_image_tokens, self.image_grid = layout.num_image_tokens, layout.image_grid
        self.eot, self.mask_id = order[layout.eot], order[layout.mask_id]
        self.text_ids = Ids([order[token] for token in range(layout.text_vocab_size)])
        self.code_ids = Ids([order[layout.code_offset + code] for code in range(layout.codebook_size)])
        self.before_image, self.after_image = ((order[token],) for token in (layout.soi, layout.eoi))
        self._back = {id: token for token, id in enumerate(order)}

    def _framed(self, frame, text_ids):
        return [self.order[token] for token in frame([self._back[id] for id in text_ids])]

    def text_prompt(self, text_ids):
        return self._framed(self.layout.text_prompt, text_ids)

    def question(self, text_ids):
        return self._framed(self.layout.question, text_ids)

    def image_prefix(self, codes):
        return [self.order[token] for token in self.layout.image_prefix(codes)]


@pytest.fixture
def engines(naive):
    """An engine, the same with its vocabulary shuffled, and the new id of each token."""
    plain, shuffled = naive.tiny_model(), naive.tiny_model()
    order = np.random.default_rng(0).permutation(naive.LAYOUT.vocab_size).tolist()
    with torch.no_grad():
        for mine, other in ((shuffled.embed, plain.embed), (shuffled.head, plain.head)):
            mine.weight[order] = other.weight
    return Engine(plain, naive.LAYOUT), Engine(shuffled, Shuffled(naive.LAYOUT, order)), order


def renamed(ids, order):
    return [[order[token] for token in of_one] for of_one in ids]


def test_images_are_the_same_in_any_order_of_the_vocabulary(engines):
    plain, shuffled, order = engines
    prompts = [[5, 6], [7]]
    known = torch.full((2, 16), -1)
    known[0, :5] = torch.tensor([3, 1, 4, 1, 5])
    for options in ({}, {"known_codes": known}):
        expected = plain.generate(prompts, **GENERATE, seeds=SEEDS, **options)
        assert torch.equal(shuffled.generate(renamed(prompts, order), **GENERATE, seeds=SEEDS, **options), expected)


def test_text_is_the_same_in_any_order_of_the_vocabulary(engines):
    plain, shuffled, order = engines
    images, questions = torch.arange(32).view(2, 16), [[[5, 6], [7]], [[8]]]
    sampling = [SamplingParams(temperature=temperature, max_new_tokens=6) for temperature in (0.0, 1.0)]
    seeds = torch.arange(8).view(2, 2, 2)
    expected = plain.generate_text(images, questions, sampling=sampling, seeds=seeds)
    asked = [renamed(of_image, order) for of_image in questions]
    answers = shuffled.generate_text(images, asked, sampling=sampling, seeds=seeds)
    assert answers == [[renamed(samples, order) for samples in of_image] for of_image in expected]

    choices = [[[[9], [10, 11]], [[12], [13]]], [[[14, 15], [16]]]]
    scores = plain.score_choices(images, questions, choices)
    given = [[renamed(of_question, order) for of_question in of_image] for of_image in choices]
    for mine, other in zip(shuffled.score_choices(images, asked, given), scores, strict=True):
        assert all(one == pytest.approx(two, abs=1e-5) for one, two in zip(mine, other, strict=True))


def test_ids_of_another_kind_are_refused(engines):
    _, shuffled, order = engines
    code = shuffled.layout.code_ids[0]
    with pytest.raises(ValueError, match=rf"expected text ids in 40 ids in prompt 0, got \[{code}\]"):
        shuffled.generate([[code]], **GENERATE, seeds=SEEDS[:1])
    with pytest.raises(ValueError, match="Shuffled: the model understands images by their codes, got features"):
        shuffled.generate_text(
            torch.zeros(1, 3, 32), [[[order[5]]]], sampling=[SamplingParams()], seeds=SEEDS[:1, :1, None]
        )


class InRows(Layout):
    """Three rows of four codes, an id after each row, two before the image."""

    vocab_size, codebook_size, num_image_tokens, image_grid = 60, 20, 12, (3, 4)
    eot, mask_id, text_ids, code_ids = 0, 59, Ids(range(20)), Ids(range(30, 50))
    before_image, row_end, after_image = (20, 21), (22,), (23,)

    def text_prompt(self, text_ids):
        return [24, *text_ids]

    def image_prefix(self, codes):
        return [25, *self.image(codes)]

    def question(self, text_ids):
        return [26, *text_ids]


def test_an_image_in_rows(naive):
    layout = InRows()
    image = layout.image([*range(8), -1, 9, 10, 11])
    assert image == [20, 21, 30, 31, 32, 33, 22, 34, 35, 36, 37, 22, 59, 39, 40, 41, 22, 23]
    assert len(image) == layout.image_length and [image[at] for at in layout.code_positions[:8]] == [*range(30, 38)]

    transformer = naive.tiny_model(layout=layout)
    greedy = {"num_images": 1, "num_steps": 1, "guidance_scale": 0.0, "mask_temperature": 0.0, "temperature": 0.0}
    drawn = Engine(transformer, layout).generate([[3, 4]], **greedy, seeds=SEEDS[:1, :1])
    tree = SpanTree.build([([24, 3, 4], -1, "causal"), (layout.image([-1] * 12), 0, "full")])
    with torch.inference_mode():
        logits = transformer.head(transformer(tree)[3 + layout.code_positions])
    assert torch.equal(drawn[0, 0], logits[:, 30:50].argmax(1))
