"""The flow decoder: an image is a function of its prompt, seed and settings; guidance, noise, places and experts."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from hermesflow.engine.decoders.flow import FlowDecoder, FlowSamplingParams, guided_velocity
from hermesflow.engine.flow_schedule import flow_times, shifted
from hermesflow.engine.latents import (
    LatentConfig,
    LatentTransformer,
    pack_latents,
    patchify,
    place_table,
    time_waves,
    unpack_latents,
    unpatchify,
)
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Transformer, TransformerConfig, rotary_table, tree_attention
from hermesflow.kernels.philox import RandomKey, normal
from hermesflow.kernels.span_tree import Place, SpanTree


class LatentLayout(Layout):
    vocab_size, eot, codebook_size, code_ids, text_ids = 30, 29, 0, None, Ids(range(30))
    image_grid, num_image_tokens, before_image, after_image = (2, 3), 6, (1,), (2,)
    image_place, latent_size = Place(stride=0, advance=1, framed=(1, 1)), 4

    def text_prompt(self, text_ids):
        return [3, *text_ids, 4]

    def image_prefix(self, codes):
        raise NotImplementedError

    def question(self, text_ids):
        return [5, *text_ids]

    def unguided_prompt(self, text_ids):
        return []

    def image(self, codes):
        return [1, *[0] * len(codes), 2]


class PromptedLayout(LatentLayout):
    def unguided_prompt(self, text_ids):
        return [5, 6]


CONFIG = TransformerConfig(
    vocab_size=30, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_size=48, norm="rmsnorm", bias=False,
    qkv_bias=True, qk_norm=True, gated=True, activation="silu", experts=2,
)  # fmt: skip
PROMPTS, SEEDS = [[10, 11, 12], [13]], torch.tensor([[5, 6], [7, 5]])
PARAMS = FlowSamplingParams(num_steps=6, guidance_scale=2.0, shift=2.0, guidance_from=0.3, renorm="image")


def made(config=CONFIG):
    transformer = LatentTransformer(config, LatentConfig(size=4, side=4))
    generator = torch.Generator().manual_seed(0)
    for weight in transformer.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) * (0.3 if weight.dim() > 1 else 1.0)
    return transformer.requires_grad_(False)


@pytest.fixture(scope="module")
def transformer():
    return made()


def draw(transformer, params=PARAMS, prompts=PROMPTS, seeds=SEEDS, **more):
    with torch.inference_mode():
        return FlowDecoder(transformer, LatentLayout()).draw(prompts, seeds, params, **more)


def test_an_image_depends_on_nothing_else(transformer):
    """The published renorm, over a batch, fails this."""
    together = draw(transformer)
    assert together.shape == (2, 2, 6, 4) and together.isfinite().all()
    for row, prompt in enumerate(PROMPTS):
        for number in range(2):
            seeds = SEEDS[row : row + 1, number : number + 1]
            alone = draw(transformer, prompts=[prompt], seeds=seeds)
            assert torch.allclose(alone[0, 0], together[row, number], atol=1e-5)
    assert torch.allclose(draw(transformer, max_sequences=1), together, atol=1e-5)
    assert torch.allclose(draw(transformer, prompts=PROMPTS[::-1], seeds=SEEDS.flip(0)).flip(0), together, atol=1e-5)
    assert not torch.allclose(together[0, 0], together[0, 1], atol=1e-2)


def naive(transformer, prompt, noise, params, layout=None):
    """The algorithm, an image and a half at a time, without a cache."""
    layout, x = layout or LatentLayout(), noise.clone()
    places, times = transformer.places_of(layout.image_grid), flow_times(params.num_steps, params.shift)
    evaluations = 0
    for time, following in zip(times, times[1:], strict=False):

        def velocity(spans, x=x, time=time):
            tree = SpanTree.build(spans)
            rows = torch.arange(len(x)) + len(tree.token_ids) - len(x) - 1
            embeds = transformer.latent_embeds(x, torch.full((len(x),), time), places)
            return transformer.velocities(transformer(tree, embeds=(rows, embeds))[rows])

        image = layout.image([0] * len(x))
        v = velocity([(layout.text_prompt(prompt), -1, "causal"), (image, 0, "full", layout.image_place)])
        evaluations += 1
        if params.guidance_scale and params.guidance_from < time <= params.guidance_to:
            evaluations += 1
            empty = layout.unguided_prompt(prompt)
            before = [(empty, -1, "causal")] if empty else []
            u = velocity([*before, (image, len(before) - 1, "full", layout.image_place)])
            guided = u + (1 + params.guidance_scale) * (v - u)
            if params.renorm == "image":
                guided *= (v.norm() / (guided.norm() + 1e-8)).clamp(params.renorm_least, 1)
            elif params.renorm == "token":
                ratio = v.norm(dim=1, keepdim=True) / (guided.norm(dim=1, keepdim=True) + 1e-8)
                guided *= ratio.clamp(params.renorm_least, 1)
            v = guided
        x = x - v * (time - following)
    return x, evaluations


@pytest.mark.parametrize("renorm", ["none", "image", "token"])
def test_against_a_plain_loop(transformer, renorm):
    params, noise = replace(PARAMS, renorm=renorm, renorm_least=0.2), torch.randn(1, 1, 6, 4)
    found = draw(transformer, params, [PROMPTS[0]], SEEDS[:1, :1], noise=noise)
    assert torch.allclose(found[0, 0], naive(transformer, PROMPTS[0], noise[0, 0], params)[0], atol=1e-4)


def test_the_unguided_half_follows_the_layouts_prompt(transformer):
    layout, noise = PromptedLayout(), torch.randn(2, 1, 6, 4)
    with torch.inference_mode():
        found = FlowDecoder(transformer, layout).draw(PROMPTS, SEEDS[:, :1], PARAMS, noise=noise)
    for row, prompt in enumerate(PROMPTS):
        assert torch.allclose(found[row, 0], naive(transformer, prompt, noise[row, 0], PARAMS, layout)[0], atol=1e-4)
        assert not torch.allclose(found[row, 0], naive(transformer, prompt, noise[row, 0], PARAMS)[0], atol=1e-2)


def test_the_unguided_half_is_computed_where_it_counts(transformer, monkeypatch):
    """In the interval's half-open bounds, and never without guidance."""
    spans = []
    forward = Transformer.forward

    def noting(self, tree, *others, **more):
        spans.append(int((tree.num_new > 0).sum()))
        return forward(self, tree, *others, **more)

    monkeypatch.setattr(Transformer, "forward", noting)
    times = flow_times(6, 2.0)
    for low, high, expected in (
        (0.0, 1.0, [2] * 5),
        (times[2], 1.0, [2, 2, 1, 1, 1]),
        (0.0, times[1], [1, 2, 2, 2, 2]),
    ):
        spans.clear()
        draw(transformer, replace(PARAMS, guidance_from=low, guidance_to=high), [[9]], SEEDS[:1, :1])
        assert spans[1:] == expected
    spans.clear()
    draw(transformer, replace(PARAMS, guidance_scale=0.0), [[9]], SEEDS[:1, :1])
    assert spans[1:] == [1] * 5


def test_times():
    assert flow_times(3, 3.0) == pytest.approx([1.0, 0.75, 0.0])
    assert shifted(torch.tensor([0.2]), 1.0) == pytest.approx(0.2)
    for arguments in ((1, 1.0), (4, 0.0)):
        with pytest.raises(ValueError, match="flow_times: expected num_steps from 2"):
            flow_times(*arguments)


def test_noise_is_normal_and_a_function_of_seed_and_place():
    key = RandomKey(torch.arange(500), torch.tensor(0), torch.zeros(500, dtype=torch.int64))
    noise = normal(key, 999)
    assert noise.shape == (500, 999) and torch.equal(normal(key, 7), noise[:, :7])
    assert torch.equal(normal(RandomKey(torch.tensor([3]), torch.tensor(0), torch.tensor([0])), 999)[0], noise[3])
    values = noise.flatten().double()
    assert abs(values.mean()) < 0.006 and abs(values.var() - 1) < 0.01
    edges = torch.tensor([-2.0, -1.0, -0.3, 0.0, 0.3, 1.0, 2.0], dtype=torch.float64)
    shares = (values[:, None] < edges).double().mean(0)
    assert torch.allclose(shares, torch.distributions.Normal(0, 1).cdf(edges), atol=0.003)
    for lag in (1, 2, 3, 4):
        assert abs((noise[:, lag:] * noise[:, :-lag]).mean()) < 0.006


def test_equal_experts_are_one(transformer):
    """A mixture whose experts hold the same weights is the plain transformer, wherever its latents lie."""
    plain = made(replace(CONFIG, experts=1))
    twin = LatentTransformer(CONFIG, plain.latents)
    state = plain.state_dict()
    state |= {
        re.sub(r"^(blocks\.\d)", r"\1.latent", name): value
        for name, value in state.items()
        if name.startswith("blocks.")
    }
    state["latent_norm.weight"] = state["norm.weight"]
    twin.load_state_dict(state)
    latent, text = ([1, 7, 8, 9, 2], Place(stride=0, advance=1, framed=(1, 1))), ([3, 4, 5], Place())
    for order in ("lt", "tl", "tlt", "ll", "tll", "ltl"):
        pieces = [latent if kind == "l" else text for kind in order]
        spans = [(ids, number - 1, "full", place) for number, (ids, place) in enumerate(pieces)]
        with torch.no_grad():
            assert torch.allclose(twin(SpanTree.build(spans)), plain(SpanTree.build(spans)), atol=1e-4)


def test_each_row_has_its_expert(transformer):
    """Against both experts run over everything, row by row and layer by layer, gradients too."""
    place = Place(stride=0, advance=1, framed=(1, 1))
    spans = [([3, 4, 5], -1, "causal"), ([1, 7, 8, 2], 0, "full", place), ([6, 6], 1, "causal"),
             ([1, 9, 9, 9, 2], 2, "full", place), ([1, 9, 2], 2, "full", place)]  # fmt: skip
    tree = SpanTree.build(spans)
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 6, 6, 6, 6, 6, 6, 6]
    is_latent = torch.zeros(len(tree.token_ids), dtype=torch.bool)
    is_latent[[4, 5, 10, 11, 12, 15]] = True
    moved = made().requires_grad_()
    found = moved(tree)
    found.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in moved.named_parameters() if weight.grad is not None}
    moved.zero_grad(set_to_none=True)
    x = moved.embed(tree.token_ids)
    rotary = rotary_table(tree.position_ids, CONFIG.rotary_dim, CONFIG.rope_theta)
    for layer, block in enumerate(moved.blocks):
        pair = (block, block.latent)
        befores = [each.before_attention(x, rotary) for each in pair]
        normed, *qkv = (
            torch.where(is_latent.view(-1, *[1] * (text.dim() - 1)), latent, text)
            for text, latent in zip(*befores, strict=True)
        )
        attended = tree_attention(tree, None, layer, *qkv)
        text, latent = (each.after_attention(x, normed, attended) for each in pair)
        x = torch.where(is_latent[:, None], latent, text)
    expected = torch.where(is_latent[:, None], moved.latent_norm(x), moved.norm(x))
    assert torch.allclose(found, expected, atol=1e-4)
    expected.square().sum().backward()
    for name, gradient in gradients.items():
        right = dict(moved.named_parameters())[name].grad
        assert torch.allclose(gradient, right, atol=1e-3 * float(right.abs().max()) + 1e-6), name


def test_patches_and_places():
    latents = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6).float()
    rows = patchify(latents, 2)
    assert rows.shape == (2, 6, 12) and torch.equal(unpatchify(rows, (2, 3), 2), latents)
    # Of the second patch: row 0, columns 2 and 3, then row 1, with the channels side by side.
    assert rows[0, 1].tolist() == [latents[0, c, r, k].item() for r in (0, 1) for k in (2, 3) for c in range(3)]
    transformer = made()
    assert transformer.places_of((2, 3)).tolist() == [0, 1, 2, 4, 5, 6]
    with pytest.raises(ValueError, match="expected a grid of at most 4 x 4 latents, got 2 x 5"):
        transformer.places_of((2, 5))
    table = place_table(3, 8)
    assert table.shape == (9, 8) and torch.allclose(table[5], torch.tensor(
        [np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02), np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)]
    ).float())  # fmt: skip
    assert time_waves(torch.tensor([0.0])).tolist() == [[1.0] * 128 + [0.0] * 128]


def test_known_latents_are_kept(transformer):
    """They are noised to each step's time, so that the others see them; codes are latents of sixteen bits."""
    layout, size = LatentLayout(), 4
    known = torch.randn(2, 6, size).half().float()
    some = known.clone()
    some[0, 2:], some[1, 0] = float("nan"), float("nan")
    codes = pack_latents(known).masked_fill(some.isnan()[..., ::2].flatten(1), -1)
    with torch.inference_mode():
        drawn = FlowDecoder(transformer, layout).generate(PROMPTS, SEEDS, PARAMS, known_codes=codes)
        found = unpack_latents(drawn, size)
        free = unpack_latents(FlowDecoder(transformer, layout).generate(PROMPTS, SEEDS, PARAMS), size)
        whole = FlowDecoder(transformer, layout).generate(PROMPTS, SEEDS, PARAMS, known_codes=pack_latents(known))
    for row in range(2):
        is_known = ~some[row].isnan()
        for number in range(2):
            assert torch.equal(found[row, number][is_known], known[row][is_known])
            assert not torch.allclose(found[row, number][~is_known], free[row, number][~is_known], atol=1e-2)
    assert torch.equal(whole, pack_latents(known)[:, None].expand(-1, 2, -1))
    assert drawn.dtype == torch.int64 and drawn.shape == (2, 2, 12)


def test_a_model_that_gives_nan_says_where():
    transformer = made()
    transformer.latent_out.bias[0] = float("nan")
    where = (
        r"FlowDecoder: the model gives no finite velocity for prompt 0, image 0, step 0; .*latent_out.bias holds NaN"
    )
    with pytest.raises(RuntimeError, match=where):
        draw(transformer)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_steps": 1}, "num_steps from 2"),
        ({"shift": -1.0}, "a shift from 0.001 to 1000"),
        ({"guidance_scale": float("nan")}, "guidance_scale of at most"),
        ({"renorm": "batch"}, "renorm as one of"),
        ({"guidance_from": 1.5}, r"guidance_from in \[0, 1\]"),
        ({"grid": (0, 3)}, "expected grid as"),
    ],
)
def test_settings_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(PARAMS, **changes)


def test_a_model_without_latents_is_refused():
    with pytest.raises(ValueError, match="FlowDecoder: expected a FlowTransformer, got Transformer"):
        FlowDecoder(Transformer(CONFIG), LatentLayout())


def test_guidance_by_hand():
    c, u = torch.tensor([[[3.0, 4.0]]]), torch.tensor([[[0.0, 0.0]]])
    params = replace(PARAMS, guidance_scale=1.0)
    assert torch.allclose(guided_velocity(c, u, params), c, atol=1e-5)
    assert torch.allclose(guided_velocity(c, u, replace(params, renorm="none")), 2 * c)
    assert torch.allclose(guided_velocity(c, u, replace(params, renorm_least=0.8)), 1.6 * c)
