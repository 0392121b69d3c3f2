"""Tokenizers with learned codes against the golden outputs and transformers' own classes, in every published layout."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    ChameleonVQVAE,
    ChameleonVQVAEConfig,
    Emu3VQVAE,
    Emu3VQVAEConfig,
    JanusVQVAE,
    JanusVQVAEConfig,
)

from hermesflow.engine.image_tokenizers.emu3 import Emu3Tokenizer
from hermesflow.engine.image_tokenizers.vqgan import VQGAN
from hermesflow.engine.weights import read_tensors, save_tensors
from hermesflow.models import vqgan

LATENT, PIXELS = 2e-4, 1e-3
"""Tolerances that are stated with the golden data."""
PARTS = {
    "chameleon": ("vqvae", vqgan.chameleon_config, vqgan.CHAMELEON, ""),
    "janus": (".", vqgan.janus_config, vqgan.JANUS, "model.vqmodel."),
    "emu3": (".", vqgan.emu3_config, vqgan.EMU3, "vqmodel."),
}
"""Family -> the folder with the whole tokenizer, its configuration, layout and prefix."""
ORIGINAL = {
    "chameleon": ("vqgan.ckpt", vqgan.CHAMELEON, ""),
    "janus": ("pytorch_model.bin", vqgan.JANUS_ORIGINAL, "gen_vision_model."),
    "emu3": ("model.safetensors", vqgan.EMU3_ORIGINAL, ""),
}


def family_of(folder):
    meta = folder / "meta.json"
    return json.loads(meta.read_text()).get("family") if meta.is_file() else None


GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
FOLDERS = [
    folder
    for given in [Path(__file__).parents[1] / "data", *GIVEN]
    for folder in (given, *sorted(given.iterdir()))
    if family_of(folder) in PARTS
]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def family(folder):
    return family_of(folder)


@pytest.fixture(scope="module")
def config(folder, family):
    return PARTS[family][1](json.loads((folder / "config.json").read_text())["vq_config"])


@pytest.fixture(scope="module")
def tokenizer(folder, family, config):
    inside, _, layout, prefix = PARTS[family]
    return vqgan.load_image_tokenizer(folder / inside, config, layout, prefix)


@pytest.fixture(scope="module")
def golden(folder):
    return load_file(folder / "golden.safetensors")


@torch.no_grad()
def test_encodes_as_the_original(tokenizer, golden):
    assert (tokenizer.encode_latent(golden["vq.image"]) - golden["vq.z"]).abs().max() < LATENT
    codes = tokenizer.encode(golden["vq.image"])
    assert torch.equal(codes, golden["vq.codes"])
    if "vq.codes_without_l2" in golden:  # what transformers gives for Janus, unlike the original
        assert not torch.equal(codes, golden["vq.codes_without_l2"])


@torch.no_grad()
def test_decodes_as_the_original(tokenizer, golden, folder):
    assert (tokenizer.decode(golden["vq.codes"]) - golden["vq.reconstruction"]).abs().max() < PIXELS
    if "vq.rect_codes" in golden:
        grid = json.loads((folder / "meta.json").read_text())["rect"]
        image = tokenizer.decode(golden["vq.rect_codes"], *grid)
        assert (image - golden["vq.rect_reconstruction"]).abs().max() < PIXELS


def test_saved_it_has_the_published_tensors(tokenizer, folder, family, tmp_path):
    inside, _, layout, prefix = PARTS[family]
    save_tensors(vqgan.tokenizer_tensors(tokenizer, layout, prefix), tmp_path / "model.safetensors", torch.bfloat16)
    saved = load_file(tmp_path / "model.safetensors")
    published = {name: part for name, part in read_tensors(folder / inside).items() if name.startswith(prefix)}
    assert saved.keys() == published.keys()
    assert all(saved[name].dtype == part.dtype and torch.equal(saved[name], part) for name, part in published.items())


def test_the_original_layout_gives_the_same_tensors(tokenizer, folder, family, config, tmp_path):
    file, layout, prefix = ORIGINAL[family]
    tensors = original_tensors(folder, prefix)
    write_original(tensors, tmp_path / file, prefix)
    shapes = {name: part.shape for name, part in tensors.items()}
    assert vqgan.config_of_shapes(shapes, prefix, normalized_codes=family == "janus") == config
    loaded = vqgan.load_image_tokenizer(tmp_path / file, config, layout, prefix)
    ours = tokenizer.state_dict()
    assert ours.keys() == loaded.state_dict().keys()
    assert all(torch.equal(part, ours[name]) for name, part in loaded.state_dict().items())
    exported = vqgan.tokenizer_tensors(loaded, layout, prefix)
    published = {name: part for name, part in tensors.items() if name.startswith(prefix)}
    assert exported.keys() == published.keys()
    assert all(torch.equal(exported[name], part.to(exported[name].dtype)) for name, part in published.items())


def original_tensors(folder, prefix):
    """The tokenizer as its authors published it, made from a golden folder by its original_names.json."""
    ours = read_tensors(folder)
    parts = [part for part in json.loads((folder / "original_names.json").read_text()).values() if type(part) is dict]
    names = next(part for part in parts if f"{prefix}quantize.embedding.weight" in part)
    made = {}
    for name, source in names.items():
        if isinstance(source, str):
            made[name] = ours[source]
        elif source["how"].startswith("reshape [C, C]"):
            made[name] = ours[source["from"]][:, :, None, None]
    if (folder / "vqvae").is_dir():
        made |= {name: part for name, part in read_tensors(folder / "vqvae").items() if name.startswith("decoder.")}
    return made


def write_original(tensors, path, prefix):
    """With what else such files hold."""
    if path.suffix == ".safetensors":
        save_tensors(tensors, path)
    elif path.suffix == ".ckpt":
        torch.save({"state_dict": {**tensors, "loss.logvar": torch.zeros(())}}, path)
    else:
        torch.save({**tensors, f"{prefix}quantize.codebook_used": torch.zeros(16)}, path)


@torch.no_grad()
@pytest.mark.parametrize(
    "folder", [folder for folder in FOLDERS if family_of(folder) == "chameleon"], ids=lambda folder: folder.name
)
def test_chameleon_without_its_decoder_sees(folder):
    """As facebook/chameleon-7b is published."""
    golden, prefix = load_file(folder / "golden.safetensors"), "model.vqmodel."
    shapes = {name: part.shape for name, part in read_tensors(folder).items()}
    config = vqgan.config_of_shapes(shapes, prefix)
    assert not config.has_decoder
    tokenizer = vqgan.load_image_tokenizer(folder, config, vqgan.CHAMELEON, prefix)
    assert torch.equal(tokenizer.encode(golden["vq.image"]), golden["vq.codes"])
    with pytest.raises(ValueError, match="no decoder; load one that has it"):
        tokenizer.decode(golden["vq.codes"])


# Three levels, latents of another width than the codes, attention where the golden folders have none, rectangles.
VQGAN_SIZES = {
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "num_embeddings": 300,
    "embed_dim": 6,
    "latent_channels": 24,
}
EMU3_SIZES = {
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "codebook_size": 300,
    "attn_resolutions": [1, 2],
    "hidden_size": 64,
    "temporal_downsample_factor": 2,
}
OTHERS = {
    "chameleon": (ChameleonVQVAE, ChameleonVQVAEConfig, {**VQGAN_SIZES, "resolution": 16, "attn_resolutions": [8]}),
    "janus": (JanusVQVAE, JanusVQVAEConfig, {**VQGAN_SIZES, "num_patches": 4}),
    "emu3": (Emu3VQVAE, Emu3VQVAEConfig, EMU3_SIZES),
}


@torch.no_grad()
@pytest.mark.parametrize("family", OTHERS)
def test_other_sizes_agree_with_transformers(family, tmp_path):
    kind, config_kind, sizes = OTHERS[family]
    torch.manual_seed(0)
    theirs = kind(config_kind(**sizes)).eval()
    for name, tensor in theirs.state_dict().items():
        if tensor.is_floating_point():
            tensor.add_(
                0.05 * torch.randn_like(tensor).abs() if "running_var" in name else 0.05 * torch.randn_like(tensor)
            )
    save_tensors(theirs.state_dict(), tmp_path / "model.safetensors")
    config = PARTS[family][1](theirs.config.to_dict())
    if family == "chameleon":  # transformers has no code for its decoder
        config = replace(config, has_decoder=False)
    ours = vqgan.load_image_tokenizer(tmp_path, config, PARTS[family][2])
    size = (16, 16) if family == "janus" else (16, 24)
    images = torch.rand(2, 3, *size) * 2 - 1
    codes = ours.encode(images)
    if family == "emu3":
        expected = theirs.encode(images, image_sizes=torch.tensor([size, size])).image_tokens
        assert torch.equal(codes, torch.stack(expected).flatten(1))
        reconstruction = theirs.decode(torch.stack(expected))
        assert (ours.decode(codes, 4, 6) - reconstruction).abs().max() < PIXELS
        return
    z = theirs.quant_conv(theirs.encoder(images))
    assert (ours.encode_latent(images) - z).abs().max() < LATENT
    if family == "janus":
        assert (ours.decode(codes) - theirs.decode(codes)).abs().max() < PIXELS
    else:
        assert torch.equal(codes.flatten(), theirs.quantize(z)[2])


@pytest.mark.parametrize("family", OTHERS)
def test_the_published_sizes_are_the_defaults(family):
    """Names and shapes of transformers' classes as they come; nothing is allocated."""
    kind, config_kind, _ = OTHERS[family]
    config = PARTS[family][1]({})
    with torch.device("meta"):
        theirs = kind(config_kind())
        ours = Emu3Tokenizer(config) if family == "emu3" else VQGAN(config)
    tensors = vqgan.tokenizer_tensors(ours, PARTS[family][2])
    if family == "chameleon":
        tensors = {name: part for name, part in tensors.items() if not name.startswith("decoder.")}
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert config.downsampling == (8 if family == "emu3" else 16)


@torch.no_grad()
def test_vq_model_of_diffusers():
    """Codes and pixels of diffusers 0.32.2's VQModel, whose images lie in [0, 1]; tests/data/vqmodel is its folder."""
    folder = Path(__file__).parents[1] / "data" / "vqmodel"
    golden = load_file(folder / "outputs.safetensors")
    config = vqgan.diffusers_config(json.loads((folder / "config.json").read_text()))
    tokenizer = vqgan.load_image_tokenizer(folder / "diffusion_pytorch_model.safetensors", config, vqgan.DIFFUSERS)
    assert torch.equal(tokenizer.encode(golden["images"] * 2 - 1), golden["codes"].long())
    height, width = (side // config.downsampling for side in golden["images"].shape[2:])
    pixels = (tokenizer.decode(golden["codes"].long(), height, width) + 1) / 2
    assert (pixels - golden["reconstruction"]).abs().max() <= 1e-4
