"""Image decoding against the published loop, and its independence of the batch."""

import dataclasses

import pytest
import torch

from hermesflow.engine.image_decoder import ImageDecoder, ImageSamplingParams

PARAMS = ImageSamplingParams(num_steps=6, guidance_scale=1.5, mask_temperature=2.0)
PROMPTS = [[3, 4, 5], [], [6, 7, 8, 9, 10], [3, 4, 5]]
SEEDS = torch.tensor([[1, 2], [3, 2**62], [-5, 6], [1, 7]])


def decode(naive, transformer, prompts, seeds, params, layout=None, **options):
    with torch.inference_mode():
        return ImageDecoder(transformer, layout or naive.LAYOUT).generate(prompts, seeds, params, **options)


def expected_codes(naive, transformer, prompts, seeds, params, layout=None, known_codes=None):
    layout = layout or naive.LAYOUT
    known_codes = [None] * len(prompts) if known_codes is None else known_codes
    return torch.stack([
        torch.stack([naive.draw_image(transformer, layout, prompt, seed, params, known) for seed in row])
        for prompt, row, known in zip(prompts, seeds.tolist(), known_codes, strict=True)
    ])  # fmt: skip


def some_known(*numbers):
    """A row of codes for each number, of which so many are known."""
    generator = torch.Generator().manual_seed(7)
    codes = torch.randint(0, 64, (len(numbers), 16), generator=generator)
    rank = torch.rand(codes.shape, generator=generator).argsort(1).argsort(1)
    return torch.where(rank < torch.tensor(numbers)[:, None], codes, -1)


@pytest.mark.parametrize("name", ["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"guidance_scale": 0.0},
        {"guidance_scale": -0.5, "temperature": 0.7},
        {"temperature": 0.0},
        {"mask_decay": "showo", "num_steps": 9},
        {"mask_temperature": 0.0},
        {"num_steps": 1},
        {"num_steps": 2},
        {"num_steps": 20},
    ],
    ids=["default", "no-guidance", "negative-guidance", "argmax", "showo-decay", "no-noise", "one-step", "two-steps",
         "more-steps-than-tokens"],
)  # fmt: skip
def test_codes_equal_the_published_loop(naive, name, change):
    transformer = naive.tiny_model(name)
    params = dataclasses.replace(PARAMS, **change)
    prompts, seeds = PROMPTS[:3], SEEDS[:3, :1]
    got = decode(naive, transformer, prompts, seeds, params)
    assert torch.equal(got, expected_codes(naive, transformer, prompts, seeds, params))


@pytest.mark.parametrize("name", ["sequential", "parallel-gqa-partial-qknorm"])
@pytest.mark.parametrize(
    "change",
    [{}, {"guidance_scale": 0.0}, {"num_steps": 1}, {"num_steps": 2}, {"num_steps": 20}, {"mask_decay": "showo"}],
    ids=["default", "no-guidance", "one-step", "two-steps", "more-steps-than-tokens", "showo-decay"],
)
def test_known_codes_are_kept_and_the_rest_equals_the_published_loop(naive, name, change):
    """As many known in two rows, which share a batch; others few, all but one, and all, which draws nothing."""
    transformer, known = naive.tiny_model(name), some_known(9, 9, 3, 15, 16)
    params = dataclasses.replace(PARAMS, **change)
    prompts, seeds = [*PROMPTS, [4]], torch.arange(10).view(5, 2)
    got = decode(naive, transformer, prompts, seeds, params, known_codes=known)
    assert torch.equal(got, expected_codes(naive, transformer, prompts, seeds, params, known_codes=known))
    assert torch.equal(torch.where(known[:, None] >= 0, got, -1), known[:, None].expand(-1, 2, -1))


def test_no_known_codes_are_none(naive):
    transformer = naive.tiny_model()
    nothing = torch.full((4, 16), -1)
    assert torch.equal(decode(naive, transformer, PROMPTS, SEEDS, PARAMS, known_codes=nothing),
                       decode(naive, transformer, PROMPTS, SEEDS, PARAMS))  # fmt: skip


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_image_with_known_codes_does_not_depend_on_its_batch(naive, guidance_scale):
    transformer, known = naive.tiny_model(), some_known(5, 12, 0, 5)
    params = dataclasses.replace(PARAMS, guidance_scale=guidance_scale)
    together = decode(naive, transformer, PROMPTS, SEEDS, params, known_codes=known)
    for row, prompt in enumerate(PROMPTS):
        for image in range(2):
            seed = SEEDS[row : row + 1, image : image + 1]
            alone = decode(naive, transformer, [prompt], seed, params, known_codes=known[row : row + 1])
            assert torch.equal(alone[0, 0], together[row, image])
    for max_sequences in (1, 3, 16):
        cut = decode(naive, transformer, PROMPTS, SEEDS, params, known_codes=known, max_sequences=max_sequences)
        assert torch.equal(cut, together)


@pytest.mark.parametrize("num_steps", [1, 3])
def test_image_of_one_token(naive, num_steps):
    layout = dataclasses.replace(naive.LAYOUT, num_image_tokens=1)
    transformer = naive.tiny_model(layout=layout)
    params = dataclasses.replace(PARAMS, num_steps=num_steps)
    got = decode(naive, transformer, PROMPTS, SEEDS, params, layout)
    assert got.shape == (4, 2, 1)
    assert torch.equal(got, expected_codes(naive, transformer, PROMPTS, SEEDS, params, layout))


@pytest.mark.parametrize("schedule", ["linear", "sigmoid", "pow2"])
def test_other_schedules_draw_codes(naive, schedule):
    codes = decode(naive, naive.tiny_model(), PROMPTS, SEEDS, dataclasses.replace(PARAMS, schedule=schedule))
    assert ((codes >= 0) & (codes < naive.LAYOUT.codebook_size)).all()


@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_image_does_not_depend_on_its_batch(naive, guidance_scale):
    """Alone, in any order, and however the work is cut: the same codes for the same prompt and seed."""
    transformer = naive.tiny_model()
    params = dataclasses.replace(PARAMS, guidance_scale=guidance_scale)
    together = decode(naive, transformer, PROMPTS, SEEDS, params)
    for row, prompt in enumerate(PROMPTS):
        for image in range(2):
            alone = decode(naive, transformer, [prompt], SEEDS[row : row + 1, image : image + 1], params)
            assert torch.equal(alone[0, 0], together[row, image])
    reordered = decode(naive, transformer, PROMPTS[::-1], SEEDS.flip(0, 1), params)
    assert torch.equal(reordered.flip(0, 1), together)
    for max_sequences in (1, 3, 7, 16):
        cut = decode(naive, transformer, PROMPTS, SEEDS, params, max_sequences=max_sequences)
        assert torch.equal(cut, together)


def test_seeds_matter_and_equal_ones_agree(naive):
    codes = decode(naive, naive.tiny_model(), [[3, 4], [3, 4]], torch.tensor([[5, 6], [6, 5]]), PARAMS)
    assert torch.equal(codes[0], codes[1].flip(0))
    assert not torch.equal(codes[0, 0], codes[0, 1])


def test_no_prompts(naive):
    assert decode(naive, naive.tiny_model(), [], torch.zeros(0, 3, dtype=torch.int64), PARAMS).shape == (0, 3, 16)


def test_work_is_shared(naive):
    """Tokens computed: the prompts and one image each at first, then the images of both halves, nothing more."""
    transformer = naive.tiny_model()
    counts = []
    transformer.embed.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].numel()))
    decode(naive, transformer, [[3, 4, 5], [3, 4, 5], [6]], torch.arange(12).view(3, 4), PARAMS)
    prompts = sum(len(text) + 3 for text in ([3, 4, 5], [6], []))
    assert counts == [prompts + 3 * 18, *[2 * 12 * 18] * 5]

    counts.clear()
    decode(naive, transformer, [[3, 4, 5]], torch.arange(4).view(1, 4), dataclasses.replace(PARAMS, guidance_scale=0.0))
    assert counts == [6 + 18, *[4 * 18] * 5]

    counts.clear()  # one prompt with two sets of known codes: each set has a conditional and an unconditional image
    known = some_known(8, 8)[[0, 1, 1]]
    decode(naive, transformer, [[3, 4, 5]] * 3, torch.arange(12).view(3, 4), PARAMS, known_codes=known)
    assert counts == [6 + 3 + 2 * 2 * 18, *[2 * 12 * 18] * 5]


def test_nan_is_reported_with_image_and_step(naive):
    transformer = naive.tiny_model()
    with torch.no_grad():
        transformer.embed.weight[7] = float("nan")
    with pytest.raises(RuntimeError, match=r"NaN\) for prompt 2, image 0, step 0; check its weights"):
        decode(naive, transformer, PROMPTS, SEEDS, PARAMS)
    with torch.no_grad():  # a code that is drawn at the first step breaks the second
        transformer.embed.weight[7] = 0.0
        transformer.embed.weight[naive.LAYOUT.code_offset : -1] = float("nan")
    with pytest.raises(RuntimeError, match="for prompt 0, image 0, step 1"):
        decode(naive, transformer, PROMPTS, SEEDS, PARAMS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, "num_steps of at least 1, got 0"),
        ({"temperature": -1.0}, "ImageSamplingParams: expected temperature of at least 0, got -1"),
        ({"mask_temperature": float("nan")}, "ImageSamplingParams: expected mask_temperature of at least 0, got nan"),
        ({"guidance_scale": float("inf")}, "ImageSamplingParams: expected a finite guidance_scale, got inf"),
        ({"schedule": "cosin"}, "expected schedule .* got 'cosin'"),
        ({"mask_decay": "slow"}, "expected decay .* got 'slow'"),
    ],
    ids=["steps", "temperature", "mask-temperature", "guidance", "schedule", "decay"],
)
def test_bad_params(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **change)
