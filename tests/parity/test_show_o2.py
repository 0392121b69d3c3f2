"""Show-o2 against outputs of its own code, on every folder of its form: tests/data, and those of HERMESFLOW_GOLDEN."""

import json
import os
import shutil
import zlib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.image_tokenizers.wan import WanAutoencoder, WanAutoencoderConfig
from hermesflow.engine.latents import NoisedImages, patchify
from hermesflow.engine.weights import save_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.show_o2 import AUTOENCODER_FILE, load_autoencoder
from hermesflow.runtime.files import InputError

GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
DATA = Path(__file__).parents[1] / "data"
KNOWN = [folder for given in [DATA, *GIVEN] for folder in (given, *sorted(given.iterdir())) if folder.is_dir()]


def is_show_o2(folder):
    path = folder / "config.json"
    return path.is_file() and (folder / "golden.safetensors").is_file() and "Showo2" in path.read_text()


FOLDERS = [folder for folder in KNOWN if is_show_o2(folder)]
PASS, SAMPLED, LOGITS, GRADIENT = 2e-4, 1e-3, 2e-3, 1e-3
"""Tolerances that are stated with the golden data."""


class Original:
    """A folder, to which SigLIP's shape was added: the model, and what the original code made of it."""

    def __init__(self, folder, made):
        self.golden, self.meta = (
            load_file(folder / "golden.safetensors"),
            json.loads((folder / "meta.json").read_text()),
        )
        self.folder = shutil.copytree(folder, made / "model", copy_function=shutil.copyfile)
        self.folder.chmod(0o755)
        (self.folder / "siglip").mkdir()
        heads = {"vision_config": {"num_attention_heads": self.meta["siglip_heads"]}}
        (self.folder / "siglip/config.json").write_text(json.dumps(heads))
        self.model = load_model(self.folder, dtype=torch.float32)
        self.transformer, self.layout, self.grid = (
            self.model.transformer,
            self.model.layout,
            self.model.layout.image_grid,
        )

    def images(self, latents, times, num_spans, length):
        """In the last spans of a pass of so many tokens."""
        span = 1 + self.layout.num_image_tokens
        first = length - num_spans * span + span * torch.arange(num_spans)[:, None] + 1
        return NoisedImages(latents, times, self.grid, first + torch.arange(span - 1))


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def original(request, tmp_path_factory):
    return Original(request.param, tmp_path_factory.mktemp("made"))


def assert_close(found, expected, tolerance):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_velocities_and_logits_of_a_pass(original):
    """Two prompts and their unguided halves, at times of their own."""
    golden, meta, layout, transformer = original.golden, original.meta, original.layout, original.transformer
    ids = [original.model.image_prompt(prompt) for prompt in meta["prompts"]]
    assert ids == meta["prompt_ids"]
    framed = [*map(layout.text_prompt, ids), *map(layout.unguided_prompt, ids)]
    image = layout.image([0] * layout.num_image_tokens)
    spans = [(text, -1, "causal") for text in framed] + [(image, row, "full") for row in range(4)]
    tree, latents = SpanTree.build(spans), patchify(golden["t2i.latents"], 2)
    for row, (first, length) in enumerate(golden["t2i.positions"][:, 0].tolist()):
        assert golden["t2i.tokens"][row, :first].tolist() == framed[row] and length == len(image)
    total = len(tree.token_ids)
    images = original.images(latents.repeat(2, 1, 1), 1 - golden["t2i.t"], 4, total)
    with torch.no_grad():
        velocity, hidden = transformer.forward_images(tree, images, rows=torch.arange(total))
        logits = transformer.head(hidden)
    assert_close(velocity, -patchify(golden["t2i.velocity"], 2), PASS)
    for row, start in enumerate(tree.packed_starts[:4]):
        text, latent = len(framed[row]), total - (4 - row) * len(image)
        assert_close(logits[start : start + text], golden["t2i.logits"][row, :text], LOGITS)
        found = logits[latent : latent + len(image)]
        assert_close(found, golden["t2i.logits"][row, text : text + len(image)], LOGITS)


def test_drawn_latents(original):
    """Of each prompt among others, the text of the head in a cache."""
    golden, meta, model = original.golden, original.meta, original.model
    params = FlowSamplingParams(
        num_steps=meta["num_steps"], guidance_scale=meta["guidance"] - 1, shift=meta["time_shifting_factor"]
    )
    noise = patchify(golden["sample.noise"], 2)
    other = torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = model.engine.image_decoder.draw(
            meta["prompt_ids"], torch.zeros(2, 2, dtype=torch.int64), params, noise=torch.stack([noise, other], dim=1)
        )
    assert_close(found[:, 0], patchify(golden["sample.trajectory"][-1], 2), SAMPLED)


def test_understanding(original):
    """Logits under the mask of inference_mmu.py and under that of training, and the greedy answer by the engine."""
    golden, meta, model, layout = original.golden, original.meta["mmu"], original.model, original.layout
    with torch.no_grad():
        features, _ = model.vision(patchify(golden["mmu.latent"], 2), torch.zeros(1), original.grid)
    question = model.question_prompt(meta["question"])
    boi, eoi, *after = meta["after"]
    assert list(layout.before_seen[:-1]) == [*meta["before"], boi] and layout.question(question) == after
    greedy = golden["mmu.greedy"].tolist()
    params = SamplingParams(temperature=0.0, max_new_tokens=len(greedy))
    seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
    assert model.engine.generate_text(features, [[question]], sampling=[params], seeds=seeds)[0][0][0] == greedy

    seen = layout.feature_span(features.shape[1])
    published = [(seen.before, -1, "causal"), (seen.ids, 0, seen.mode), (after, 1, "causal")]
    trained = [
        (seen.before[:-1], -1, "causal"),
        ([layout.pad, *seen.ids[:-1]], 0, "full"),
        ([eoi, *after], 1, "causal"),
    ]
    rows = len(seen.before) - 1 + torch.arange(features.shape[1])
    for spans, name in ((published, "mmu.logits"), (trained, "mmu.logits_mask_on_image")):
        with torch.no_grad():
            hidden = original.transformer(SpanTree.build(spans), embeds=(rows, features[0]))
        assert_close(original.transformer.head(hidden), golden[name], LOGITS)


def test_pair_dpo(original):
    """Errors, the loss and its gradients, win and lose as leaves of one prompt; all parts are trained here."""
    golden, meta, model = original.golden, original.meta["pairdpo"], original.model
    reference = load_model(original.folder, dtype=torch.float32)
    tensors = load_file(original.folder / "reference.safetensors")
    for name, tensor in reference.published_tensors().items():
        tensor.copy_(tensors[name].float())
    model.vision.requires_grad_(True)
    errors = errors_of(original, model, golden, meta)
    with torch.no_grad():
        before = errors_of(original, reference, golden, meta)
    assert errors.tolist() == pytest.approx(meta["policy_error"], abs=10 * PASS)
    assert before.tolist() == pytest.approx(meta["reference_error"], abs=10 * PASS)
    moved = errors - before
    inside = -meta["beta"] / 2 * (moved[0] - moved[1])
    loss = -F.logsigmoid(inside)
    assert inside.item() == pytest.approx(meta["inside"], abs=1e-3)
    assert loss.item() == pytest.approx(meta["loss"], abs=1e-3)
    loss.backward()
    kept = {name: weight for name, weight in model.parts.named_parameters() if weight.grad is not None}
    data = {name: weight.data for name, weight in kept.items()}
    for weight in kept.values():
        weight.data = weight.grad
    found = {name: tensor.clone() for name, tensor in model.published_tensors().items()}
    for name, weight in kept.items():
        weight.data, weight.grad = data[name], None
    model.vision.requires_grad_(False)
    for key in (name for name in golden if name.startswith("pairdpo.grad.")):
        gradient = found[key.removeprefix("pairdpo.grad.")]
        assert (gradient - golden[key]).abs().max() <= GRADIENT * golden[key].abs().max(), key


def errors_of(original, model, golden, meta):
    """Mean squared errors [2]."""
    layout, time = original.layout, 1 - meta["t"]
    image = (layout.image([0] * layout.num_image_tokens), 0, "full")
    tree = SpanTree.build([(layout.text_prompt(model.image_prompt(meta["prompt"])), -1, "causal"), image, image])
    pair = patchify(torch.cat([golden["pairdpo.win"], golden["pairdpo.lose"]]), 2)
    noise = patchify(golden["pairdpo.noise"], 2)
    images = original.images(torch.lerp(pair, noise, time), torch.full((2,), time), 2, len(tree.token_ids))
    velocity, _ = model.transformer.forward_images(tree, images)
    return (velocity - (noise - pair)).square().mean(dim=(1, 2))


def test_saved_files_are_those_that_were_read(original, autoencoder, tmp_path):
    shutil.copyfile(autoencoder, original.folder / AUTOENCODER_FILE)
    original.model.save(tmp_path / "saved", torch.bfloat16)
    ours, theirs = (
        torch.load(folder / "pytorch_model.bin", weights_only=True) for folder in (tmp_path / "saved", original.folder)
    )
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert again.layout == original.layout and again.vq_tokenizer.config == WanAutoencoderConfig(channels=8)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The file, with weights by the rule of the original's run (tests/data/wan-vae)."""
    state = {}
    for name, shape in json.loads((DATA / "wan-vae/vae_state_dict.json").read_text()).items():
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("gamma"):
            draw = 1 + 0.1 * draw
        else:
            draw *= (draw.numel() / shape[0]) ** -0.5 if len(shape) >= 2 else 0.1
        state[name] = draw
    path = tmp_path_factory.mktemp("vae") / AUTOENCODER_FILE
    save_tensors(state, path)
    return path


def test_autoencoder(autoencoder):
    """Of single images, against Wan2.1's code for videos."""
    golden, coder = load_file(DATA / "wan-vae/vae.safetensors"), load_autoencoder(autoencoder)
    with torch.no_grad():
        assert_close(coder.encode(golden["image"]), golden["latent"], PASS)
        assert_close(coder.decode(golden["latent"]), golden["reconstruction"], PASS)
    with pytest.raises(ValueError, match="H and W multiples of 8"):
        coder.encode(torch.zeros(1, 3, 12, 8))


def test_an_autoencoder_of_another_kind_is_named(tmp_path):
    save_tensors({"a": torch.zeros(2)}, tmp_path / AUTOENCODER_FILE)
    with pytest.raises(InputError, match="holds no autoencoder of Wan2.1's kind"):
        load_autoencoder(tmp_path / AUTOENCODER_FILE)
    sizes = WanAutoencoder(WanAutoencoderConfig(channels=8)).state_dict()
    del sizes["decoder.conv1.bias"]
    save_tensors(sizes, tmp_path / AUTOENCODER_FILE)
    with pytest.raises(InputError, match=r"missing decoder\.conv1\.bias"):
        load_autoencoder(tmp_path / AUTOENCODER_FILE)
