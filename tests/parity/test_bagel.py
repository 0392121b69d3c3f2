"""BAGEL checkpoints against outputs of the original code, through load_model, the engine and span trees.

The folders are those of tests/data and any given in HERMESFLOW_GOLDEN, as in test_autoregressive.py.
"""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from hermesflow import load_model
from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.flow_schedule import flow_times
from hermesflow.engine.latents import patchify, place_table, unpatchify
from hermesflow.kernels.span_tree import Place, SpanTree
from hermesflow.models.bagel import load_autoencoder

GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
KNOWN = [
    folder
    for given in [Path(__file__).parents[1] / "data", *GIVEN]
    for folder in (given, *sorted(given.iterdir()))
    if folder.is_dir()
]
FOLDERS = [folder for folder in KNOWN if (folder / "llm_config.json").is_file()]
AUTOENCODERS = [folder for folder in KNOWN if (folder / "ae_state_dict.json").is_file()]
PASS, SAMPLED, LOGITS, SUMS, GRADIENT = 2e-4, 1e-3, 2e-3, 1e-2, 1e-3
"""Tolerances that are stated with the golden data."""
PLACES = {
    "causal": Place(),
    "full": Place(stride=0, advance=1),
    "latent": Place(stride=0, advance=1, framed=(1, 1)),
    "noise": Place(stride=0, advance=0, framed=(1, 1)),
}


class Original:
    """A folder: the model, and what the original code made of it."""

    def __init__(self, folder):
        self.folder, self.golden = folder, load_file(folder / "golden.safetensors")
        self.meta = json.loads((folder / "meta.json").read_text())
        self.model = load_model(folder, dtype=torch.float32)
        self.transformer, self.layout = self.model.transformer, self.model.layout


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def original(request):
    return Original(request.param)


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def chain(lengths, kinds, ids, first=0):
    """Spans of one sample: each follows the last one that is not noise."""
    spans, parent, start = [], -1, 0
    for length, kind in zip(lengths, kinds, strict=True):
        mode = "causal" if kind == "causal" else "full"
        spans.append((ids[start : start + length], parent, mode, PLACES[kind]))
        start += length
        if kind != "noise":
            parent = first + len(spans) - 1
    return spans


def test_masks(original):
    lens, modes = original.meta["mask"]["lens"], original.meta["mask"]["modes"]
    tree = SpanTree.build(chain(lens, modes, [0] * sum(lens)))
    assert torch.equal(tree.allowed(), original.golden["mask.allowed"].bool())


def test_a_packed_pass_of_all_kinds(original):
    """Positions, features, velocities and logits of three samples, clean latents among what others see."""
    golden, meta, transformer = original.golden, original.meta["mixed"], original.transformer
    text, latent, seen = (golden[f"mixed.packed_{name}_indexes"].long() for name in ("text", "vae_token", "vit_token"))
    ids = torch.zeros(len(golden["mixed.packed_position_ids"]), dtype=torch.int64)
    ids[text] = golden["mixed.packed_text_ids"].long()
    spans, start = [], 0
    for lengths, modes in meta["splits"]:
        kinds, at = [], start
        for length, mode in zip(lengths, modes, strict=True):
            is_latent = mode == "full" and bool(((latent >= at) & (latent < at + length)).any())
            kinds.append("latent" if is_latent else mode)
            at += length
        spans += chain(lengths, kinds, ids[start:at].tolist(), len(spans))
        start = at
    tree = SpanTree.build(spans)
    assert torch.equal(tree.position_ids, golden["mixed.packed_position_ids"].long())

    vision = original.model.vision
    images = [golden[f"mixed.image{number}"][None] for number in range(len(meta["vit_lens"]))]
    with torch.no_grad():
        assert_close(torch.cat([vision.tower(image)[0] for image in images]), golden["mixed.vit_features"], PASS)
        features = torch.cat([vision(image)[0] for image in images])
        assert_close(features, golden["mixed.vit_embeds"], PASS)
        clean = torch.cat([patchify(golden[f"mixed.latent{n}"], 2) for n in range(len(meta["latent_shapes"]))])
        assert torch.equal(clean, golden["mixed.clean"])
        times = golden["mixed.t"]
        noised = (1 - times[:, None]) * clean + times[:, None] * golden["mixed.noise"]
        places = golden["mixed.packed_latent_position_ids"].long()
        embeds = torch.cat([transformer.latent_embeds(noised, times, places), features])
        hidden = transformer(tree, embeds=(torch.cat([latent, seen]), embeds))
        velocity = transformer.velocities(hidden[latent])
        assert_close(velocity, golden["mixed.velocity"], PASS)
        logits = transformer.head(hidden)
        assert_close(logits, golden["mixed.logits"], LOGITS)
    error = (velocity - (golden["mixed.noise"] - clean)) ** 2
    chosen = torch.isin(latent, golden["mixed.mse_loss_indexes"].long())
    assert_close(error[chosen], golden["mixed.mse"], 10 * PASS)
    loss = F.cross_entropy(
        logits[golden["mixed.ce_loss_indexes"].long()], golden["mixed.packed_label_ids"].long(), reduction="none"
    )
    assert_close(loss, golden["mixed.ce"], LOGITS)


@pytest.mark.parametrize("way", ["plain", "none", "global", "channel", "text_channel"])
def test_drawn_latents(original, way):
    """Of each prompt alone, and of both in one batch, which the original's norm over the batch would change."""
    golden, meta, model = original.golden, original.meta, original.model
    given = meta["sampling"].get(way)
    if given is None:
        pytest.skip(f"{original.folder.name} has no {way}")
    low, high = given.get("cfg_interval", (0, 1))
    renorm = {"global": "image", "channel": "token", "text_channel": "token"}.get(given.get("cfg_renorm_type"), "none")
    params = FlowSamplingParams(
        num_steps=given["num_timesteps"],
        shift=given["timestep_shift"],
        guidance_scale=given["cfg_text_scale"] - 1,
        guidance_from=low,
        guidance_to=high,
        renorm=renorm,
        renorm_least=given.get("cfg_renorm_min", 0.0),
    )
    times = golden["t2i.timesteps"]
    if len(times) == params.num_steps and params.shift == 3.0:
        assert_close(torch.tensor(flow_times(params.num_steps, params.shift)), times, 1e-6)
    for number in range(2):
        of_prompt = meta[f"t2i{number}"]
        ids = model.image_prompt(of_prompt["prompt"])
        assert ids == of_prompt["prompt_ids"]
        noise, expected = golden[f"t2i{number}.noise"], golden[f"t2i{number}.{way}.latent"]
        grid = tuple(of_prompt["grid"])
        settings = params.__class__(**{**vars(params), "grid": grid})
        other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            found = model.engine.image_decoder.draw(
                [ids, [5, 6]], torch.zeros(2, 2, dtype=torch.int64), settings,
                noise=torch.stack([torch.stack([noise, other]), torch.stack([other, other])]),
            )  # fmt: skip
        assert_close(found[0, 0], expected, SAMPLED)


@pytest.mark.parametrize("number", [0, 1])
def test_understanding(original, number):
    """Logits of a forced answer, and the greedy one through the engine, text ids framed by the layout."""
    golden, meta, model = original.golden, original.meta[f"mmu{number}"], original.model
    image = golden[meta["image"]][None]
    question = model.question_prompt(meta["question"])
    assert question == meta["question_ids"]
    with torch.no_grad():
        features = model.vision(image)
    greedy = golden[f"mmu{number}.greedy"].tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=len(greedy))
    seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert model.engine.generate_text(features, [[question]], sampling=[params], seeds=seeds)[0][0][0] == greedy

    span, layout = model.layout.feature_span(features.shape[1]), model.layout
    text = [*layout.question(question), *greedy, layout.eot]
    assert [*(layout.soi, layout.eoi), *text] == golden[f"mmu{number}.input_ids"].tolist()
    tree = SpanTree.build([(span.ids, -1, span.mode, span.place), (text, 0, "causal")])
    rows = torch.arange(1, 1 + features.shape[1])
    with torch.no_grad():
        logits = original.transformer.head(original.transformer(tree, embeds=(rows, features[0])))
    assert_close(logits, golden[f"mmu{number}.logits"], LOGITS)


def test_pair_dpo(original):
    """Errors, sums of log-probabilities, both losses and their gradients, win and lose as leaves of one prompt."""
    golden, meta, layout = original.golden, original.meta["pairdpo"], original.layout
    reference = Original(original.folder)
    reference.transformer.load_state_dict(load_reference(original.folder, reference.model), strict=True)
    image = golden[meta["image"]][None]
    found = {}
    for name, who in (("policy", original.model), ("reference", reference.model)):
        with torch.set_grad_enabled(name == "policy"):
            found[name] = scores(who, golden, meta, layout, image)
    for name, (errors, sums) in found.items():
        assert errors.tolist() == pytest.approx(meta[f"{name}_error"], abs=PASS * 10)
        assert sums.tolist() == pytest.approx(meta[f"{name}_logprob"], abs=SUMS)
    (errors, sums), (errors_before, sums_before) = found["policy"], found["reference"]
    inside = -meta["beta"] / 2 * ((errors - errors_before)[0] - (errors - errors_before)[1])
    inside_text = meta["beta_und"] * ((sums - sums_before)[0] - (sums - sums_before)[1])
    loss = -F.logsigmoid(inside) - F.logsigmoid(inside_text)
    assert float(loss) == pytest.approx(meta["loss_gen"] + meta["loss_und"], abs=1e-3)
    loss.backward()
    tensors = gradients(original.model)
    for key in (name for name in golden if name.startswith("pairdpo.grad.")):
        name = key.removeprefix("pairdpo.grad.")
        assert (tensors[name] - golden[key]).abs().max() <= GRADIENT * golden[key].abs().max(), name
    original.transformer.zero_grad(set_to_none=True)
    original.model.vision.zero_grad(set_to_none=True)


def load_reference(folder, model):
    """The reference's weights under our names, its tower too."""
    tensors = load_file(folder / "reference.safetensors")
    for name, tensor in model.published_tensors().items():
        tensor.copy_(tensors[name].float())
    return model.transformer.state_dict()


def gradients(model):
    """By published name."""
    kept = dict(model.parts.named_parameters())
    before = {name: parameter.data for name, parameter in kept.items()}
    try:
        for parameter in kept.values():
            parameter.data = torch.zeros_like(parameter.data) if parameter.grad is None else parameter.grad
        return {name: tensor.clone() for name, tensor in model.published_tensors().items()}
    finally:
        for name, parameter in kept.items():
            parameter.data = before[name]


def scores(model, golden, meta, layout, image):
    """Mean squared errors [2] of win and lose, and sums [2] of their captions' log-probabilities."""
    transformer, (win, lose) = model.transformer, (patchify(golden[f"pairdpo.{role}"], 2) for role in ("win", "lose"))
    side = int(len(win) ** 0.5)
    places, time, noise = transformer.places_of((side, side)), torch.tensor(meta["t"]), golden["pairdpo.noise"]
    leaf = layout.image([0] * len(win)), 0, "full", layout.image_place
    tree = SpanTree.build([(layout.text_prompt(meta["prompt_ids"]), -1, "causal"), leaf, leaf])
    rows = torch.cat([torch.arange(len(win)) + start + 1 for start in tree.packed_starts[1:]])
    embeds = torch.cat([transformer.latent_embeds((1 - time) * x + time * noise, time, places) for x in (win, lose)])
    velocity = transformer.velocities(transformer(tree, embeds=(rows, embeds), rows=rows)).chunk(2)
    errors = torch.stack([((v - (noise - x)) ** 2).mean() for v, x in zip(velocity, (win, lose), strict=True)])

    features = model.vision(image)[0]
    span = layout.feature_span(len(features))
    captions = [golden[f"pairdpo.{role}_caption"].tolist() for role in ("win", "lose")]
    asked = layout.question(meta["question_ids"])
    spans = [(span.ids, -1, span.mode, span.place), (asked[:-1], 0, "causal")]
    spans += [([layout.bos, *caption], 1, "causal") for caption in captions]
    tree = SpanTree.build(spans)
    hidden = transformer(tree, embeds=(torch.arange(1, 1 + len(features)), features))
    sums = []
    for start, caption in zip(tree.packed_starts[2:], captions, strict=True):
        logprob = transformer.head(hidden[start : start + len(caption) + 1]).log_softmax(1)
        sums.append(logprob.gather(1, torch.tensor([*caption, layout.eot])[:, None]).sum())
    return errors, torch.stack(sums)


def test_tables_of_places_follow_the_formula(original):
    for table in (original.transformer.latent_places, original.model.vision.places):
        made = place_table(int(len(table.weight) ** 0.5), table.weight.shape[1])
        assert_close(table.weight, made, 2**-8)


def test_saved_files_are_those_that_were_read(original, autoencoder_folder, tmp_path):
    model = load_model(original.folder, dtype=torch.float32, vq_tokenizer=autoencoder_folder)
    model.save(tmp_path / "saved", torch.bfloat16)
    ours, theirs = (load_file(folder / "ema.safetensors") for folder in (tmp_path / "saved", original.folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert again.layout == model.layout and again.vq_tokenizer.config == model.vq_tokenizer.config


@pytest.fixture(scope="module")
def autoencoder_folder(tmp_path_factory):
    """Weights by the golden data's rule."""
    (folder,) = AUTOENCODERS[:1]
    state = {}
    for name, (shape, _) in json.loads((folder / "ae_state_dict.json").read_text()).items():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) >= 2:
            draw *= (draw.numel() / shape[0]) ** -0.5
        else:
            draw = 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
        state[name] = draw
    made = tmp_path_factory.mktemp("ae")
    save_file(state, made / "ae.safetensors")
    return made


def test_autoencoder(autoencoder_folder):
    golden, coder = load_file(AUTOENCODERS[0] / "ae.safetensors"), load_autoencoder(autoencoder_folder)
    with torch.no_grad():
        mean, logvar = coder.moments(golden["image"])
        assert_close(mean, golden["mean"], PASS)
        assert_close(logvar, golden["logvar"], PASS)
        latents = coder.encode(golden["image"])
        assert_close(latents, golden["latent_mean"], PASS)
        assert_close(coder.decode(golden["latent_mean"]), golden["reconstruction"], 1e-3)
    rows = patchify(latents, 2)
    assert torch.equal(unpatchify(rows, (latents.shape[2] // 2, latents.shape[3] // 2), 2), latents)
