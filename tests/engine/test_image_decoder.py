"""Image decoding against the published loop, and its independence of the batch."""

import dataclasses
import gc
import logging

import pytest
import torch

from hermesflow.engine.decoders import masked
from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams
from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.transformer import Transformer

PARAMS = ImageSamplingParams(num_steps=6, guidance_scale=1.5, mask_temperature=2.0)
PROMPTS = [[3, 4, 5], [], [6, 7, 8, 9, 10], [3, 4, 5]]
SEEDS = torch.tensor([[1, 2], [3, 2**62], [-5, 6], [1, 7]])


def decode(naive, transformer, prompts, seeds, params, layout=None, **options):
    with torch.inference_mode():
        return ImageDecoder(transformer, layout or naive.LAYOUT).generate(prompts, seeds, params, **options)


def expected_codes(naive, transformer, prompts, seeds, params, layout=None, known_codes=None):
    layout = layout or naive.LAYOUT
    known_codes = [None] * len(prompts) if known_codes is None else known_codes
    return torch.stack(
        [
            torch.stack([naive.draw_image(transformer, layout, prompt, seed, params, known) for seed in row])
            for prompt, row, known in zip(prompts, seeds.tolist(), known_codes, strict=True)
        ]
    )


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
    ids=[
        "default",
        "no-guidance",
        "negative-guidance",
        "argmax",
        "showo-decay",
        "no-noise",
        "one-step",
        "two-steps",
        "more-steps-than-tokens",
    ],
)
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
    assert torch.equal(
        decode(naive, transformer, PROMPTS, SEEDS, PARAMS, known_codes=nothing),
        decode(naive, transformer, PROMPTS, SEEDS, PARAMS),
    )


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


@pytest.fixture
def forward_calls(monkeypatch):
    """Tokens of every forward pass that Python runs; one of more than `limit` tokens finds no memory."""

    class Calls(list):
        limit = None

    calls, forward = Calls(), Transformer.forward

    def counted(self, tree, *args, **kwargs):
        calls.append(len(tree.token_ids))
        if calls.limit is not None and len(tree.token_ids) > calls.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return forward(self, tree, *args, **kwargs)

    monkeypatch.setattr(Transformer, "forward", counted)
    return calls


@pytest.mark.parametrize("backend", ["torch", None])
@pytest.mark.parametrize(
    "change",
    [{}, {"guidance_scale": 0.0, "temperature": 0.0}, {"mask_decay": "showo"}],
    ids=["default", "argmax", "showo-decay"],
)
def test_batches_of_one_shape_replay_one_graph_of_all_steps(naive, recorded_graphs, forward_calls, change, backend):
    """The steps wait for nothing; later batches run the prompts' pass alone in Python, and draw what they should."""
    transformer, params = naive.tiny_model("parallel-gqa-partial-qknorm"), dataclasses.replace(PARAMS, **change)
    prompts, seeds = [[3, 4, 5], [6, 7, 8], [9, 4, 1], [2, 2, 2]], torch.arange(8).view(4, 2)
    expected = expected_codes(naive, transformer, prompts, seeds, params)
    decoder = ImageDecoder(transformer, naive.LAYOUT, backend)
    max_sequences = 4 if params.guidance_scale else 2
    with torch.inference_mode():
        for calls in (2 * 6 + 2, 4):  # the first call runs its first batch, records its second and replays two
            forward_calls.clear()
            assert torch.equal(decoder.generate(prompts, seeds, params, max_sequences=max_sequences), expected)
            assert len(forward_calls) == calls
    assert len(recorded_graphs) == 1


def test_replay_with_known_codes_and_nan(naive, recorded_graphs):
    """What one batch leaves behind does not reach the next: known codes, a failed step."""
    transformer, known = naive.tiny_model(), some_known(9, 9, 9, 9, 9)
    transformer.embed.weight.data[7] = float("nan")
    prompts, seeds = [[3], [4], [5], [7], [6]], torch.arange(5).view(5, 1)
    decoder = ImageDecoder(transformer, naive.LAYOUT)
    with torch.inference_mode():
        kept = [0, 1, 2, 4]
        got = decoder.generate(
            [prompts[row] for row in kept], seeds[kept], PARAMS, known_codes=known[kept], max_sequences=2
        )
        expected = expected_codes(naive, transformer, prompts, seeds, PARAMS, known_codes=known)
        assert torch.equal(got, expected[kept])
        with pytest.raises(RuntimeError, match="for prompt 3, image 0, step 0"):
            decoder.generate(prompts, seeds, PARAMS, known_codes=known, max_sequences=2)
        got = decoder.generate(prompts[:3], seeds[:3], PARAMS, known_codes=known[:3], max_sequences=2)
        assert torch.equal(got, expected[:3])
    assert len(recorded_graphs) == 1


def test_graph_serves_prompts_of_other_lengths_or_is_made_anew(naive, recorded_graphs):
    transformer, params = naive.tiny_model(), PARAMS
    prompts = [[3, 4, 5], [6, 7, 8], [9], [3, 4, 5, 6, 7, 8, 9, 10, 11], [], [5, 4, 3], [3, 4, 5]]
    seeds = torch.arange(14).view(7, 2)
    got = decode(naive, transformer, prompts, seeds, params, max_sequences=4)
    assert torch.equal(got, expected_codes(naive, transformer, prompts, seeds, params))
    assert recorded_graphs


def test_last_batch_is_not_captured_and_the_graph_stays(naive, recorded_graphs, forward_calls):
    transformer, decoder = naive.tiny_model(), ImageDecoder(naive.tiny_model(), naive.LAYOUT)
    seeds = torch.arange(5).view(1, 5)
    expected = decode(naive, transformer, [[3, 4]], seeds, PARAMS)
    recorded_graphs.clear()
    with torch.inference_mode():
        for call in range(3):
            forward_calls.clear()
            assert torch.equal(decoder.generate([[3, 4]], seeds, PARAMS, max_sequences=4), expected)
            assert len(forward_calls) == (3 * 6 if call == 0 else 1 + 1 + 6)
    assert len(recorded_graphs) == 1


@pytest.mark.parametrize(("num_images", "sizes"), [(32, [16, 16]), (33, [11, 11, 11]), (17, [9, 8]), (3, [3])], ids=str)
def test_passes_are_even(naive, num_images, sizes):
    starts = [((3, 4), (-1,) * 4)] * num_images
    assert [len(rows) for rows in ImageDecoder._batches(starts, 16)] == sizes


def test_a_pass_that_hides_its_launches_has_no_graph(naive, recorded_graphs, monkeypatch):
    monkeypatch.setattr(masked, "_HIDES_LAUNCHES", 0)
    transformer, prompts, seeds = naive.tiny_model(), [[3, 4], [5], [3, 4, 6]], torch.arange(6).view(3, 2)
    got = decode(naive, transformer, prompts, seeds, PARAMS, max_sequences=4)
    assert torch.equal(got, expected_codes(naive, transformer, prompts, seeds, PARAMS)) and not recorded_graphs


def test_another_way_of_drawing_replaces_the_graph(naive, recorded_graphs):
    """Other steps, and weights that have moved, as a change of dtype moves them."""
    decoder, seeds = ImageDecoder(naive.tiny_model(), naive.LAYOUT), torch.arange(6).view(1, 6)
    with torch.inference_mode():
        for params, dtype in (
            (PARAMS, torch.float32),
            (dataclasses.replace(PARAMS, num_steps=3), torch.float32),
            (PARAMS, torch.bfloat16),
            (PARAMS, torch.float32),
        ):
            decoder.transformer.to(dtype)
            alone = decode(naive, decoder.transformer, [[3, 4]], seeds, params, max_sequences=12)
            assert torch.equal(decoder.generate([[3, 4]], seeds, params, max_sequences=4), alone)
    assert len(recorded_graphs) == 4


def test_kept_memory_is_given_back(naive, recorded_graphs):
    def caches():
        return [item for item in gc.get_objects() if type(item) is KVCache and all(item is not old for old in others)]

    others = []  # models of other tests may live yet
    decoder = ImageDecoder(naive.tiny_model(), naive.LAYOUT)
    gc.collect()
    others = caches()
    gc.disable()
    try:
        with torch.inference_mode():
            decoder.generate([[3, 4]], torch.arange(2).view(1, 2), PARAMS, max_sequences=2)
        assert caches()
        decoder.release()
        assert not caches()
    finally:
        gc.enable()


@pytest.mark.parametrize("graphs", [False, True], ids=["steps", "batches"])
def test_progress_sees_steps_or_batches(naive, graphs, request):
    if graphs:
        request.getfixturevalue("recorded_graphs")
    seen = []

    def progress(items):
        for item in items:
            yield item
            seen.append(len(items))

    decode(naive, naive.tiny_model(), [[3]], torch.arange(6).view(1, 6), PARAMS, max_sequences=4, progress=progress)
    assert seen == ([3] * 3 if graphs else [6] * 18)


@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("guidance_scale", [0.0, 1.5])
def test_out_of_memory_halves_the_batch(naive, forward_calls, caplog, request, guidance_scale, graphs):
    """Six image spans of 18 tokens fit: eight images of one span become four and then two, with guidance one."""
    if graphs:
        request.getfixturevalue("recorded_graphs")
    transformer, params = naive.tiny_model(), dataclasses.replace(PARAMS, guidance_scale=guidance_scale)
    prompts, seeds = [[3, 4, 5], [6]], torch.arange(16).view(2, 8)
    expected = decode(naive, transformer, prompts, seeds, params)
    decoder, forward_calls.limit = ImageDecoder(transformer, naive.LAYOUT), 6 * 18
    spans = 32 if guidance_scale else 16
    halvings = [
        f"with {count} sequences in a pass; continuing with {count // 2}" for count in (32, 16, 8) if count <= spans
    ]
    with caplog.at_level(logging.WARNING, "hermesflow.engine.decoders.passes"), torch.inference_mode():
        assert torch.equal(decoder.generate(prompts, seeds, params), expected)
        assert [record.message.partition("memory ")[2] for record in caplog.records] == halvings
        forward_calls.clear()
        assert torch.equal(decoder.generate(prompts, seeds, params), expected)
    assert len(caplog.records) == len(halvings) and max(forward_calls) <= 6 * 18


def test_a_kept_session_goes_before_a_batch_is_halved(naive, recorded_graphs, forward_calls, caplog, monkeypatch):
    transformer, seeds = naive.tiny_model(), torch.arange(4).view(1, 4)
    decoder = ImageDecoder(transformer, naive.LAYOUT)
    with torch.inference_mode():
        expected = decoder.generate([[3, 4]], seeds, PARAMS)
        new_cache = Transformer.new_cache

        def no_room_for_two(self, capacity):
            if decoder._session is not None:
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 6442450944 bytes")
            return new_cache(self, capacity)

        monkeypatch.setattr(Transformer, "new_cache", no_room_for_two)
        assert torch.equal(decoder.generate([[3, 4]], seeds[:, :3], PARAMS), expected[:, :3])
    assert not caplog.records


@pytest.mark.parametrize(
    ("error", "name"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "memory"), (RuntimeError("a fault"), "fault")],
    ids=["one image does not fit", "another error"],
)
def test_other_errors_and_one_image_that_does_not_fit(naive, monkeypatch, error, name):
    def forward(*_, **__):
        raise error

    monkeypatch.setattr(Transformer, "forward", forward)
    with pytest.raises(type(error), match=name):
        decode(naive, naive.tiny_model(), [[3]], torch.arange(4).view(1, 4), PARAMS)


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
        ({"num_steps": 0}, "num_steps of 1 to 65536, got 0"),
        ({"temperature": -1.0}, "ImageSamplingParams: expected temperature of 0 or 1e-06 to .*, got -1"),
        (
            {"mask_temperature": float("nan")},
            "ImageSamplingParams: expected mask_temperature of 0 or 1e-06 to .*, got nan",
        ),
        ({"guidance_scale": float("inf")}, "ImageSamplingParams: expected a guidance_scale of at most .*, got inf"),
        ({"schedule": "cosin"}, "expected schedule .* got 'cosin'"),
        ({"mask_decay": "slow"}, "expected decay .* got 'slow'"),
    ],
    ids=["steps", "temperature", "mask-temperature", "guidance", "schedule", "decay"],
)
def test_bad_params(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PARAMS, **change)
