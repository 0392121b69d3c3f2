"""Bidirectional models: text that is filled from masks, and images of whole sequences in graphs."""

import numpy as np
import pytest
import torch

from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import Ids, Layout, TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels.span_tree import SpanTree

TEXT, CODES, LENGTH = 40, 8, 12


class WholeLayout(Layout):
    """[text, eot and mask last of it | codes]."""

    vocab_size, eot, mask_id, is_bidirectional = TEXT + CODES, TEXT - 2, TEXT - 1, True
    text_ids, code_ids, codebook_size = Ids(range(TEXT - 1)), Ids(range(TEXT, TEXT + CODES)), CODES
    num_image_tokens, image_grid, before_image, after_image = 4, (2, 2), (1,), (2,)
    after_answer = (3,)

    def text_prompt(self, text_ids):
        return [4, *text_ids]

    def image_prefix(self, codes):
        return [5, *self.image(codes)]

    def question(self, text_ids):
        return [6, *text_ids, 7]


@pytest.fixture(scope="module")
def transformer():
    config = TransformerConfig(
        vocab_size=WholeLayout.vocab_size, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, mlp_size=48,
        norm="rmsnorm", activation="silu", gated=True, bias=False, head_bias=False,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(3), std=0.4).requires_grad_(False)


@pytest.fixture(scope="module")
def decoder(transformer):
    return MaskedTextDecoder(transformer, WholeLayout())


IMAGES = torch.tensor([[0, 1, 2, 3], [7, 6, 5, 4]])
QUESTIONS = [[[10, 11], [12]], [[13, 14, 15]]]


def answers(decoder, params, images=IMAGES, questions=QUESTIONS, **more):
    """With a seed a question, whatever else is asked."""
    seeds = torch.stack([image.sum() + torch.arange(2)[:, None] + torch.arange(len(params)) for image in images])
    with torch.inference_mode():
        return decoder.extend(images, questions, params, seeds, **more)


def plain_answer(transformer, codes, question, length, steps, block, guidance):
    """mmu_generate of MMaDA at temperature 0, over the text ids."""
    layout = WholeLayout()
    before = layout.asked(codes, question)
    x = torch.tensor([*before, *[layout.mask_id] * length, *layout.after_answer])
    first = len(before)
    for start in range(first, first + length, block):
        counts = [block // steps + (number < block % steps) for number in range(steps)]
        for count in counts:
            hidden = transformer(SpanTree.build([(x.tolist(), -1, "full")]))
            if guidance:
                without = x.clone()
                without[:first] = without[first + length :] = layout.mask_id
                unguided = transformer(SpanTree.build([(without.tolist(), -1, "full")]))
                hidden = torch.lerp(unguided, hidden, 1 + guidance)
            logits = transformer.head(hidden)
            logits[:, TEXT - 1 :] = float("-inf")
            confidence, token = logits.log_softmax(1).max(1)
            masked = x == layout.mask_id
            masked[start + block :] = False
            confidence[~masked] = float("-inf")
            kept = confidence.topk(count).indices
            x[kept] = token[kept]
        if layout.eot in x[first : start + block]:
            break
    region = x[first : first + length].tolist()
    region = region[: region.index(layout.eot)] if layout.eot in region else region
    return [token for token in region if token != layout.mask_id]


@pytest.mark.parametrize(("steps", "block", "guidance"), [(2, 4, 0.0), (4, 4, 0.0), (3, 12, 0.0), (3, 6, 1.5)])
def test_a_plain_loop_gives_the_same(transformer, decoder, steps, block, guidance):
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=LENGTH,
        num_steps=steps * LENGTH // block,
        block_length=block,
        guidance_scale=guidance,
    )
    found = answers(decoder, [params])
    for image, questions in enumerate(QUESTIONS):
        for number, question in enumerate(questions):
            codes = IMAGES[image].tolist()
            assert found[image][number][0] == plain_answer(transformer, codes, question, LENGTH, steps, block, guidance)


def test_answers_do_not_depend_on_their_batch(decoder):
    params = [
        SamplingParams(temperature=1.0, max_new_tokens=9, num_steps=5, block_length=4),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, max_new_tokens=12),
        SamplingParams(temperature=0.0, max_new_tokens=3, guidance_scale=0.5),
    ]
    together = answers(decoder, params)
    assert answers(decoder, params, max_tokens=1) == together
    for image, questions in enumerate(QUESTIONS):
        alone = answers(decoder, params, IMAGES[image : image + 1], [questions])
        assert alone[0] == together[image]


def test_a_threshold_ends_sooner(decoder):
    """At next to nothing a block is one step; at 1 each token is a step of its own."""
    for threshold, num_steps in ((1e-12, 3), (1.0, 12)):
        options = {"temperature": 0.0, "max_new_tokens": LENGTH, "block_length": 4}
        expected = answers(decoder, [SamplingParams(**options, num_steps=num_steps)])
        assert answers(decoder, [SamplingParams(**options, threshold=threshold)]) == expected


def test_draws_follow_the_law(transformer, decoder):
    """One token behind one mask: shares of 20,000 draws against softmax(logits / 0.8)."""
    layout, count = WholeLayout(), 20_000
    params = SamplingParams(temperature=0.8, max_new_tokens=1)
    codes, question = IMAGES[:1], [[[10, 11]]]
    with torch.inference_mode():
        drawn = decoder.extend(codes, question, [params] * count, torch.arange(count).view(1, 1, -1))[0][0]
        before = layout.asked(codes[0].tolist(), question[0][0])
        tree = SpanTree.build([([*before, layout.mask_id, *layout.after_answer], -1, "full")])
        logits = transformer.head(transformer(tree))[len(before), : TEXT - 1]
    expected = (logits / 0.8).softmax(0).double().numpy() * count
    counts = np.bincount([ids[0] if ids else layout.eot for ids in drawn], minlength=TEXT - 1)
    common = expected > 5
    square = ((counts - expected)[common] ** 2 / expected[common]).sum()
    assert square < common.sum() + 5 * np.sqrt(2 * common.sum())


def test_choices_are_scored_behind_one_mask(transformer, decoder):
    layout = WholeLayout()
    choices = [[[[20], [21, 22]], [[23]]], [[[24, 25, 26], [20]]]]
    with torch.inference_mode():
        scores = decoder.score_choices(IMAGES, QUESTIONS, choices)
        again = decoder.score_choices(IMAGES, QUESTIONS, choices, max_tokens=1)
        for of_image, others in zip(scores, again, strict=True):
            for of_question, of_other in zip(of_image, others, strict=True):
                assert of_question == pytest.approx(of_other, abs=1e-5)
        for image, questions in enumerate(QUESTIONS):
            for number, question in enumerate(questions):
                before = layout.asked(IMAGES[image].tolist(), question)
                length = max(map(len, choices[image][number])) + 1
                ids = [*before, *[layout.mask_id] * length, *layout.after_answer]
                logits = transformer.head(transformer(SpanTree.build([(ids, -1, "full")])))[:, : TEXT - 1]
                logprob = logits.log_softmax(1)[len(before) :]
                for choice, score in zip(choices[image][number], scores[image][number], strict=True):
                    targets = [*choice, layout.eot]
                    assert score == pytest.approx(float(logprob[range(len(targets)), targets].sum()), abs=1e-4)


def test_bad_models_and_layouts(transformer):
    with pytest.raises(ValueError, match="expected a bidirectional layout with a mask_id, got TokenLayout; give the"):
        MaskedTextDecoder(
            transformer, TokenLayout(text_vocab_size=20, codebook_size=8, num_image_tokens=4, sot=0, eot=1)
        )
    broken = Transformer(transformer.config).requires_grad_(False)
    broken.load_state_dict(transformer.state_dict())
    broken.head.weight[5] = float("nan")
    with pytest.raises(RuntimeError, match=r"no distribution \(NaN\) for question 0 of image 0, sample 0, step 0;"):
        answers(MaskedTextDecoder(broken, WholeLayout()), [SamplingParams(max_new_tokens=2)])
    with pytest.raises(ValueError, match="expected a finite threshold in \\[0, 1\\], got 2"):
        SamplingParams(threshold=2)


def test_images_of_whole_sequences_in_a_graph(transformer, recorded_graphs):
    """Batches of one shape replay one graph, whatever their prompts' tokens; known codes are kept."""
    params = ImageSamplingParams(num_steps=3, guidance_scale=1.5, mask_temperature=1.0)
    decoder, seeds = ImageDecoder(transformer, WholeLayout()), torch.arange(4).view(2, 2)
    known = torch.tensor([[3, -1, -1, -1], [-1, 5, -1, -1]])
    batches = [
        ([[10, 11], [12, 13]], None),
        ([[14, 15], [16, 17]], None),
        ([[18], [20, 21, 22]], None),
        ([[9], [8]], known),
    ]
    with torch.inference_mode():
        found = [decoder.generate(prompts, seeds, params, known_codes=codes) for prompts, codes in batches]
        assert recorded_graphs
        recorded_graphs.clear()
        for (prompts, codes), together in zip(batches, found, strict=True):
            for row, prompt in enumerate(prompts):
                options = {} if codes is None else {"known_codes": codes[row : row + 1]}
                alone = ImageDecoder(transformer, WholeLayout()).generate(
                    [prompt], seeds[row : row + 1], params, **options
                )
                assert torch.equal(alone[0], together[row])
    assert found[3][0, :, 0].tolist() == [3, 3] and found[3][1, :, 1].tolist() == [5, 5]
