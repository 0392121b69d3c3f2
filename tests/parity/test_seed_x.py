"""SEED-X against outputs of its own code, on every folder of its form: tests/data, and those of HERMESFLOW_GOLDEN."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.engine.decoders.features import FeatureNoise
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.sdxl import load_adapter
from hermesflow.models.seed_x import DETOKENIZER_FILE, _all_views, best_grid, cut_image

GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
KNOWN = [
    folder
    for given in [Path(__file__).parents[1] / "data", *GIVEN]
    for folder in (given, *sorted(given.iterdir()))
    if folder.is_dir()
]
FOLDERS = [folder for folder in KNOWN if (folder / "golden.safetensors").is_file() and (folder / "QwenViT").is_dir()]
PASS, SUMS, GAUSSIAN, LOSS, GRADIENT = 2e-4, 1e-3, 5e-3, 1e-4, 1e-3
"""Tolerances that are stated with the golden data."""


class Original:
    """A folder: the model, and what the original code made of it."""

    def __init__(self, folder):
        self.folder, self.golden = folder, load_file(folder / "golden.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.model = load_model(folder, dtype=torch.float32)
        self.transformer, self.layout = self.model.transformer, self.model.layout
        size = self.model.sizes.image_size
        files = (Image.fromarray(self.golden[f"image{number}.file"].numpy()) for number in (0, 1))
        self.cut = [cut_image(image, size) for image in files]
        first, count = self.layout.first_image_id, self.layout.num_image_tokens
        self.image_ids = range(first, first + count)

    def seen(self, number, model=None):
        """An image's vectors [F, D]."""
        view, (pieces, centers) = (model or self.model).parts["view"], self.cut[number]
        return view(self.model.look(pieces), torch.from_numpy(centers)).flatten(0, 1)

    def hidden(self, ids, features=None, model=None):
        """Of a sequence whose first image ids hold features."""
        rows = [row for row, token in enumerate(ids) if token in self.image_ids]
        embeds = None if features is None else (torch.tensor(rows[: len(features)]), features)
        return (model or self.model).transformer(SpanTree.build([(ids, -1, "causal")]), embeds=embeds)


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def original(request):
    return Original(request.param)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_texts(original):
    """White space beside added tokens is left out, and each piece encoded by itself, as transformers 4.30 does."""
    tokenizer = original.model.text_tokenizer
    for case in original.meta["tokenizer_cases"]:
        assert tokenizer.encode_with_tokens(case["text"]) == case["ids"]
    for number, asked in enumerate(original.meta["understanding"]):
        assert tokenizer.decode(original.golden[f"und{number}.greedy"].tolist()) == asked["text"]


def test_pieces(original):
    golden = original.golden
    for case in original.meta["anyres_at_448"]:
        assert best_grid(*case["size_wh"], 448) == tuple(case["grid_wh"])
    for number, (pieces, centers) in enumerate(original.cut):
        assert np.array_equal(pieces.transpose(0, 3, 1, 2), golden[f"image{number}.pieces"].numpy())
        assert_close(torch.from_numpy(centers), golden[f"image{number}.positions"], 1e-6)


@torch.no_grad()
def test_tower_and_resamplers(original):
    golden, model = original.golden, original.model
    blocks = model.tower.patches(golden["image0.pixels_of_whole"][None])
    assert_close(blocks[0, ::9], golden["vit.blocks"], PASS)
    assert_close(model.tower.attn_pool(blocks), golden["vit.attn_pool"], PASS)
    assert_close(model.look(original.cut[0][0]), golden["image0.features"], PASS)
    assert_close(model.look(original.cut[1][0])[-1], golden["image1.features_of_whole"], PASS)
    for number, (pieces, centers) in enumerate(original.cut):
        features = model.look(pieces)
        assert_close(model.pooled(features[-1:]), golden[f"image{number}.pooled"], PASS)
        resampled = model.parts["view"].input_resampler(features)
        assert_close(resampled, golden[f"image{number}.resampled"], PASS)
        expected = golden[f"image{number}.embeds"]
        assert_close(model._see(pieces, centers).view(expected.shape), expected, PASS)
    found = original.transformer.features(golden["output_resampler.input"])
    assert_close(found, golden["output_resampler.output"], PASS)
    assert_close(model.negative_features, golden["detokenizer.negative_features"][0], PASS)


@torch.no_grad()
def test_the_adapter_of_sdxl(original):
    """From what the model draws, from nothing, and from all of the tower's features."""
    golden, heads = original.golden, original.model.sizes.adapter_heads
    adapter, _ = load_adapter(original.folder / DETOKENIZER_FILE, heads)
    given = {
        "t2i0.": "t2i0.features",
        "t2i1.": "t2i1.features",
        "detokenizer.negative_": "detokenizer.negative_features",
    }
    for name, features in given.items():
        text, pooled = adapter(golden[features].view(1, *golden[features].shape[-2:]))
        assert_close(text[0], golden[f"{name}prompt_embeds"], PASS)
        assert_close(pooled[0], golden[f"{name}pooled_prompt_embeds"], PASS)
    text, pooled = adapter(golden["image1.features_of_whole"][None])
    assert_close(text[0], golden["detokenizer.of_all_queries.prompt_embeds"], PASS)
    assert_close(pooled[0], golden["detokenizer.of_all_queries.pooled_prompt_embeds"], PASS)


@torch.no_grad()
def test_understanding(original):
    golden, model, layout = original.golden, original.model, original.layout
    for number, asked in enumerate(original.meta["understanding"]):
        ids, features = golden[f"und{number}.input_ids"].tolist(), original.seen(asked["image"])
        hidden = original.hidden(ids, features)
        assert_close(hidden, golden[f"und{number}.hidden"], PASS)
        logits = golden[f"und{number}.logits"]
        assert_close(original.transformer.head(hidden[-len(logits) :]), logits, PASS)
        greedy = golden[f"und{number}.greedy"].tolist()
        for answered in range(len(greedy)):
            last = original.transformer.head(original.hidden([*ids, *greedy[:answered]], features)[-1])
            allowed = torch.tensor(list(layout.text_ids))
            assert int(allowed[last[allowed].argmax()]) == greedy[answered]
        if not asked["template"].startswith("[INST] {0}"):
            continue
        question, span = model.question_prompt(asked["question"]), layout.feature_span(len(features))
        assert [*span.before, *span.ids, *layout.question(question)] == ids
        params = SamplingParams(temperature=0.0, max_new_tokens=len(greedy))
        seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
        found = model.engine.generate_text(features[None], [[question]], sampling=[params], seeds=seeds)
        assert found[0][0][0] == greedy


@torch.no_grad()
def test_generation(original):
    """One pass gives what the original draws step by step; by the public path where the prompt is the model's own."""
    golden, model, layout = original.golden, original.model, original.layout
    for number, asked in enumerate(original.meta["generation"]):
        ids = golden[f"t2i{number}.input_ids"].tolist()
        assert model.text_tokenizer.encode_with_tokens(asked["text"]) == ids[1 : 1 - len(layout.image([]))]
        hidden = original.hidden(ids)[-layout.num_image_tokens :]
        assert_close(hidden, golden[f"t2i{number}.hidden"], PASS)
        assert_close(model.transformer.features(hidden[None])[0], golden[f"t2i{number}.features"], PASS)
        if asked["text"].startswith("[INST]"):
            prompt = model.image_prompt(asked["prompt"])
            assert [*layout.text_prompt(prompt), *layout.image([])] == ids
            found = model.engine.image_decoder.features([prompt, prompt[:5]])
            assert_close(found[0], golden[f"t2i{number}.features"], PASS)


@torch.no_grad()
def test_images_that_the_model_asks_for(original):
    """The original's greedy sequence, token by token, image ids being forced; and editing."""
    golden, meta, layout = original.golden, original.meta["auto"], original.layout
    ids, greedy = golden["auto.input_ids"].tolist(), golden["auto.greedy"].tolist()
    hidden = original.hidden([*ids, *greedy])
    logits = original.transformer.head(hidden[len(ids) - 1 : -1])
    allowed = torch.tensor([*layout.text_ids, layout.boi])
    forced, rows = set(), []
    for place, token in enumerate(greedy):
        if token in original.image_ids or (token == layout.eoi and greedy[place - 1] == original.image_ids[-1]):
            forced.add(place)
        elif token != layout.eoi:
            assert int(allowed[logits[place][allowed].argmax()]) == token
        if token == original.image_ids[-1]:
            rows.append(len(ids) + place - layout.num_image_tokens + 1 + torch.arange(layout.num_image_tokens))
    assert greedy[meta["img_at"]] == layout.boi and len(rows) == meta["images"] and forced
    found = original.transformer.features(torch.stack([hidden[of_image] for of_image in rows]))
    assert_close(found, golden["auto.features"], PASS)

    edit = golden["edit0.input_ids"].tolist()
    edit += layout.image([])[1:] if edit[-1] == layout.boi else []
    hidden = original.hidden(edit, original.seen(original.meta["edit"]["image"]))[-layout.num_image_tokens :]
    assert_close(original.transformer.features(hidden[None])[0], golden["edit0.features"], PASS)


@torch.no_grad()
def test_training_losses(original):
    """Cross-entropy of the labelled tokens, and the regression of the drawn image's features."""
    golden, meta = original.golden, original.meta["loss"]
    losses, hidden = [], None
    for row, (ids, labels) in enumerate(zip(golden["loss.input_ids"], golden["loss.labels"], strict=True)):
        length = int((ids != 0).nonzero().max()) + 1
        ids, labels = ids[:length].tolist(), labels[1:length]
        hidden = original.hidden(ids, original.seen(0) if row == 0 else None)
        losses.append(F.cross_entropy(original.transformer.head(hidden[:-1]), labels, reduction="none")[labels != -100])
    assert torch.cat(losses).mean().item() == pytest.approx(meta["lm"], abs=LOSS)
    rows = [row for row, token in enumerate(ids) if token in original.image_ids]
    drawn = original.transformer.features(hidden[rows][None])
    target = golden["image1.pooled"]
    assert F.mse_loss(drawn, target).item() == pytest.approx(meta["mse"], abs=LOSS)
    cosine = 1 - F.cosine_similarity(drawn, target, dim=-1).mean()
    assert cosine.item() == pytest.approx(meta["cosine"], abs=LOSS)


def test_pair_dpo(original):
    """Gaussian rows of win and lose, captions, losses and their gradients; and the forms that have a minimum."""
    golden, meta, model = original.golden, original.meta["dpo"], original.model
    reference = load_model(original.folder, dtype=torch.float32)
    tensors = load_file(original.folder / "reference.safetensors")
    for name, tensor in _all_views(reference.parts).items():
        if name in tensors:
            tensor.copy_(tensors[name].float())
    model.parts["view"].requires_grad_(True)
    noise, beta = FeatureNoise(golden["dpo.sigma"].view(1)), meta["beta"]
    losses, bounded = [], {"ipo": [], "kl": [], "quadratic": []}
    for number, pair in enumerate(meta["pairs"]):
        drawn = {}
        for name, who in (("policy", model), ("reference", reference)):
            with torch.set_grad_enabled(name == "policy"):
                images, captions, drawn[name] = scores(original, who, number, noise)
            assert images.tolist() == pytest.approx([pair[f"{name}_win"][0], pair[f"{name}_lose"][0]], abs=GAUSSIAN)
            assert captions.tolist() == pytest.approx([pair[f"{name}_win"][1], pair[f"{name}_lose"][1]], abs=SUMS)
            if name == "policy":
                now = images, captions
            for role, z in (("win", golden[f"dpo{number}.win"]), ("lose", golden[f"dpo{number}.lose"])):
                rows = noise.coordinates((drawn[name] - z)[:, None]).square().sum(1) / -2
                assert_close(rows.detach(), golden[f"dpo{number}.{name}_{role}_rows"], GAUSSIAN)
        (images_before, captions_before) = images, captions
        h_image = (now[0] - images_before)[0] - (now[0] - images_before)[1]
        h_caption = (now[1] - captions_before)[0] - (now[1] - captions_before)[1]
        assert h_image.item() == pytest.approx(pair["h_image"], abs=2 * GAUSSIAN)
        assert h_caption.item() == pytest.approx(pair["h_caption"], abs=2 * SUMS)
        losses.append(-F.logsigmoid(beta * h_image) - F.logsigmoid(beta * h_caption))
        kl = -noise.logprob(drawn["policy"], drawn["reference"])
        assert kl.item() == pytest.approx(pair["kl_policy_from_reference"], abs=GAUSSIAN)
        forms, moved = meta["bounded"], drawn["policy"] - drawn["reference"]
        apart = golden[f"dpo{number}.win"] - golden[f"dpo{number}.lose"]
        bounded["ipo"].append((h_image - 1 / (2 * forms["beta"])) ** 2)
        bounded["kl"].append(-F.logsigmoid(forms["beta"] * h_image) + forms["kl_weight"] * kl)
        bounded["quadratic"].append(-noise.logprob(moved, forms["eta"] * apart))
    loss = torch.stack(losses).mean()
    assert loss.item() == pytest.approx(meta["loss"], abs=LOSS)
    for name, gradient in gradients(model, loss).items():
        if f"dpo.grad.{name}" in golden:
            expected = golden[f"dpo.grad.{name}"]
            assert (gradient - expected).abs().max() <= GRADIENT * expected.abs().max(), name
    for name, parts in bounded.items():
        value = torch.stack(parts).mean()
        assert value.item() == pytest.approx(meta["bounded"][name], rel=LOSS)
        expected = golden[f"dpo.bounded.{name}.grad.output_resampler.query"]
        found = gradients(model, value)["output_resampler.query"]
        assert (found - expected).abs().max() <= GRADIENT * expected.abs().max(), name
    model.parts["view"].requires_grad_(False)


def scores(original, model, number, noise):
    """Log-probabilities [2] of win's and lose's features, sums [2] of their captions, and the features drawn [n, F]."""
    golden, layout = original.golden, original.layout
    ids = golden[f"t2i{number}.input_ids"].tolist()
    hidden = original.hidden(ids, model=model)[-layout.num_image_tokens :]
    drawn = model.transformer.features(hidden[None])[0]
    images = torch.stack([noise.logprob(drawn, golden[f"dpo{number}.{role}"]) for role in ("win", "lose")])
    question, sums = golden[f"dpo{number}.question_ids"].tolist(), []
    features = original.seen(number, model)
    for role in ("win", "lose"):
        caption = golden[f"dpo{number}.{role}_caption_ids"]
        hidden = original.hidden([*question, *caption.tolist()], features, model)
        logprob = model.transformer.head(hidden[len(question) - 1 : -1]).log_softmax(1)
        sums.append(logprob.gather(1, caption[:, None]).sum())
    return images, torch.stack(sums), drawn


def gradients(model, loss):
    """By published name; weights that have no part in the loss have none."""
    parts = torch.nn.ModuleDict({name: model.parts[name] for name in ("transformer", "view", "tower")})
    weights = [weight for weight in parts.parameters() if weight.requires_grad]
    found = torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True, allow_unused=True)
    kept = [weight.data for weight in weights]
    for weight, gradient in zip(weights, found, strict=True):
        weight.data = gradient
    named = {name: tensor.clone() for name, tensor in _all_views(parts).items()}
    for weight, data in zip(weights, kept, strict=True):
        weight.data = data
    return named
