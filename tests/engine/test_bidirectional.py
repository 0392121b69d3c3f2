"""Bidirectional models: text that is filled from masks, and images of whole sequences in graphs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams, MLCache
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import Ids, Layout, TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig, rotary_table
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


def test_scores_by_several_masks(transformer, decoder):
    """The mean over masks, each with its own count of hidden tokens, from the dense logits."""
    layout, choices = WholeLayout(), [[20], [21, 22, 23], [24, 25, 26]]
    found = decoder.score_choices(IMAGES[:1], [[[10, 11]]], [[choices]], num_masks=4, text_only=False)[0][0]
    before = layout.asked(IMAGES[0].tolist(), [10, 11])
    wanted, hidden_by_length = [], {}
    for choice in choices:
        answer, rng = [*choice, layout.eot], np.random.default_rng([len(choice) + 1, 4])
        hidden = [np.sort(rng.permutation(len(answer))[: 1 + int((n + 0.5) / 4 * len(answer))]) for n in range(4)]
        hidden_by_length.setdefault(len(answer), [part.tolist() for part in hidden])
        total = 0.0
        for part in hidden:
            region = [layout.mask_id if place in part else token for place, token in enumerate(answer)]
            tree = SpanTree.build([([*before, *region, *layout.after_answer], -1, "full")])
            logprob = transformer.head(transformer(tree)).log_softmax(1)
            total += sum(float(logprob[len(before) + place, answer[place]]) for place in part) * len(answer) / len(part)
        wanted.append(total / 4)
    assert found == pytest.approx(wanted, abs=1e-4)
    assert sorted(map(len, hidden_by_length[4])) == [1, 2, 3, 4]
    # A single mask hides all; and no batch changes a score.
    one = decoder.score_choices(IMAGES[:1], [[[10, 11]]], [[[[20]]]])[0][0]
    assert decoder.score_choices(IMAGES[:1], [[[10, 11]]], [[[[20]]]], num_masks=1)[0][0] == one
    small = {"num_masks": 4, "text_only": False, "max_tokens": 1}
    both = decoder.score_choices(IMAGES, QUESTIONS, [[choices, choices[:1]], [choices]], num_masks=4, text_only=False)
    again = decoder.score_choices(IMAGES, QUESTIONS, [[choices, choices[:1]], [choices]], **small)
    assert again[0] == [pytest.approx(scores, abs=1e-5) for scores in both[0]]
    assert again[1] == [pytest.approx(scores, abs=1e-5) for scores in both[1]]


# what is approximate


class StaleModel:
    """One sequence through the model's layers, whose keys and values stay where it is not computed."""

    def __init__(self, transformer):
        self.transformer, self.kept = transformer, [None] * len(transformer.blocks)

    def __call__(self, ids, rows):
        """Logits of the rows [R], which are computed anew; all of them at first."""
        x, rotary = self.transformer.embed(ids[rows]), rotary_table(rows, 16, self.transformer.config.rope_theta)
        for layer, block in enumerate(self.transformer.blocks):
            normed, q, *new = block.before_attention(x, rotary)
            if self.kept[layer] is None:
                self.kept[layer] = [torch.zeros(len(ids), *part.shape[1:]) for part in new]
            for kept, part in zip(self.kept[layer], new, strict=True):
                kept[rows] = part
            k, v = self.kept[layer]
            attended = F.scaled_dot_product_attention(*(part.transpose(0, 1)[None] for part in (q, k, v)))
            x = block.after_attention(x, normed, attended[0].transpose(0, 1))
        return self.transformer.head(self.transformer.norm(x))


def stale_answer(transformer, codes, question, length, tokens_per_step, block, guidance, cache):
    """Fast-dLLM's algorithm at temperature 0, over the text ids."""
    layout = WholeLayout()
    before = layout.asked(codes, question)
    x = torch.tensor([*before, *[layout.mask_id] * length, *layout.after_answer])
    first, everything = len(before), torch.arange(len(x))
    halves = [StaleModel(transformer) for _ in range(2 if guidance else 1)]
    for start in range(first, first + length, block):
        end = start + block
        for number in range(block // tokens_per_step):
            rows = everything[start:end] if cache == "dual" else everything[start:]
            rows = everything if number == 0 else rows
            logits = halves[0](x, rows)
            if guidance:
                without = x.clone()
                without[:first] = without[first + length :] = layout.mask_id
                logits = torch.lerp(halves[1](without, rows), logits, 1 + guidance)
            logits[:, TEXT - 1 :] = float("-inf")
            confidence, token = logits.log_softmax(1).max(1)
            is_open = (x[rows] == layout.mask_id) & (rows < end)
            kept = confidence.masked_fill(~is_open, float("-inf")).topk(tokens_per_step).indices
            x[rows[kept]] = token[kept]
        if layout.eot in x[first:end]:
            break
    ids = x[first : first + length].tolist()
    return [token for token in ids[: ids.index(layout.eot) if layout.eot in ids else length] if token != layout.mask_id]


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_kept_keys_and_values(transformer, decoder, cache, guidance):
    params = SamplingParams(
        temperature=0.0, max_new_tokens=LENGTH, num_steps=LENGTH // 2, block_length=4, guidance_scale=guidance,
        cache=cache,
    )  # fmt: skip
    found = answers(decoder, [params])
    for image, questions in enumerate(QUESTIONS):
        for question, ids in enumerate(questions):
            wanted = stale_answer(transformer, IMAGES[image].tolist(), ids, LENGTH, 2, 4, guidance, cache)
            assert found[image][question] == [wanted]
    # Any batch gives the same, and so do steps that leave nothing to keep.
    assert answers(decoder, [params], max_tokens=1) == found
    whole = replace(params, block_length=2)
    assert answers(decoder, [whole]) == answers(decoder, [replace(whole, cache="")])


def test_kept_keys_and_values_beside_exact_answers(decoder):
    exact = SamplingParams(temperature=1.0, max_new_tokens=LENGTH, num_steps=6, block_length=4)
    kept = replace(exact, cache="dual", guidance_scale=0.5)
    found = answers(decoder, [exact, kept])
    assert [[each[:1] for each in of_image] for of_image in found] == answers(decoder, [exact])


def test_an_unknown_cache_is_named():
    with pytest.raises(ValueError, match=r"expected cache as one of \['', 'prefix', 'dual'\], got 'all'"):
        SamplingParams(cache="all")


IMAGE = ImageSamplingParams(num_steps=6, guidance_scale=1.0, mask_temperature=1.0)
PROMPTS, SEEDS = [[10, 11, 12], [13]], torch.arange(4).view(2, 2)


def drawn(transformer, params, **more):
    with torch.inference_mode():
        return ImageDecoder(transformer, NineCodes()).generate(PROMPTS, SEEDS, params, **more)


class NineCodes(WholeLayout):
    num_image_tokens, image_grid = 9, (3, 3)


def test_an_ml_cache_that_refreshes_always_is_exact(transformer):
    exact = drawn(transformer, IMAGE)
    for always in (MLCache(warmup_ratio=1.0), MLCache(refresh_interval=1)):
        assert torch.equal(drawn(transformer, replace(IMAGE, ml_cache=always)), exact)
    # Nothing is left as it was: no logit lies above the largest.
    assert torch.equal(drawn(transformer, replace(IMAGE, ml_cache=MLCache(cache_ratio=0.0, warmup_ratio=0.0))), exact)


def test_an_ml_cache_computes_less_and_the_same_in_any_batch(transformer, monkeypatch):
    params = replace(IMAGE, ml_cache=MLCache(cache_ratio=0.8, warmup_ratio=0.0, refresh_interval=4))
    computed = []
    forward = Transformer.forward

    def noting(self, tree, *others, **more):
        computed.append(len(tree.token_ids))
        return forward(self, tree, *others, **more)

    monkeypatch.setattr(Transformer, "forward", noting)
    found = drawn(transformer, params)
    # Sequences of 4 + 11, 2 + 11 and 1 + 11 tokens, of which a fifth is computed in steps 1 to 3 and 5.
    counts = [int((length - 1) * 0.2) + 1 for length in (15, 13, 12)]
    whole = 2 * (15 + 13 + 12 + 12)
    part = 2 * (counts[0] + counts[1] + 2 * counts[2])
    assert computed == [whole, part, part, part, whole, part]
    assert torch.equal(drawn(transformer, params, max_sequences=1), found)
    assert not torch.equal(drawn(transformer, IMAGE), found)


def test_an_ml_cache_of_a_single_unknown_code(transformer):
    """Whose steps but the last change nothing, so that it is computed first in a step that would not compute all."""
    params = replace(IMAGE, ml_cache=MLCache(cache_ratio=0.5, warmup_ratio=0.0, refresh_interval=4))
    known = torch.tensor([[1] * 8 + [-1], [-1] * 9])
    with torch.inference_mode():
        decoder = ImageDecoder(transformer, NineCodes())
        found = decoder.generate(PROMPTS, SEEDS, params, known_codes=known)
        assert torch.equal(found[1], drawn(transformer, params)[1])
        exact = decoder.generate(PROMPTS, SEEDS, IMAGE, known_codes=known)
    assert torch.equal(found[0], exact[0])


def test_an_ml_cache_is_refused_where_it_means_nothing(transformer):
    params = replace(IMAGE, ml_cache=MLCache())
    with pytest.raises(ValueError, match="ml_cache draws by another law"):
        ImageDecoder(transformer, NineCodes()).rollout(PROMPTS, SEEDS, params)
    config = replace(transformer.config, vocab_size=60)
    layout = TokenLayout(text_vocab_size=40, codebook_size=9, num_image_tokens=4, sot=0, eot=0)
    with pytest.raises(ValueError, match="ml_cache is for models that attend to everything"):
        ImageDecoder(Transformer(config), layout).generate(PROMPTS, SEEDS, params)
    with pytest.raises(ValueError, match="MLCache: expected cache_ratio in"):
        MLCache(cache_ratio=1.0)
