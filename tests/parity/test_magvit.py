"""MAGVIT-v2 in its published layout against outputs of the original code, on weights made by the golden data's rule."""

import json
import os
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hermesflow.models.magvit import load_vq_tokenizer, save_vq_tokenizer

GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
FOLDERS = [
    folder
    for given in [Path(__file__).parents[1] / "data", *GIVEN]
    for folder in (given, given / "magvit")
    if (folder / "magvit.safetensors").is_file()
]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def shapes(folder):
    return {
        name: (shape, getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in json.loads((folder / "magvit_state_dict.json").read_text()).items()
    }


@pytest.fixture(scope="module")
def checkpoint(shapes, tmp_path_factory):
    """The published layout: config.json without sizes, and a .bin with the code book's constants."""
    made = tmp_path_factory.mktemp("magvitv2")
    state = {}
    for name, (shape, dtype) in shapes.items():
        if name.startswith("quantize."):
            state[name] = torch.zeros(shape, dtype=dtype)  # not read
            continue
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if len(shape) >= 2:
            draw *= (draw.numel() / shape[0]) ** -0.5
        else:
            draw = 1 + 0.1 * draw if name.endswith("weight") else 0.1 * draw
        state[name] = draw
    torch.save(state, made / "pytorch_model.bin")
    (made / "config.json").write_text('{"_class_name": "MAGVITv2", "_diffusers_version": "0.30.1"}')
    return made


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return load_vq_tokenizer(str(checkpoint))


@pytest.fixture(scope="module")
def golden(folder):
    return load_file(folder / "magvit.safetensors")


def test_encodes_as_the_original(tokenizer, golden):
    with torch.no_grad():
        z = tokenizer.encode_latent(golden["image"])
        assert (z - golden["z"]).abs().max() < 2e-4
        assert torch.equal(tokenizer.encode(golden["image"]), golden["codes"])


def test_decodes_as_the_original(tokenizer, golden):
    with torch.no_grad():
        assert (tokenizer.decode(golden["codes"]) - golden["reconstruction"]).abs().max() < 2e-4
        assert (tokenizer.decode(golden["rect_codes"], 2, 4) - golden["rect_image"]).abs().max() < 2e-4


def test_bf16_keeps_the_picture(checkpoint, golden):
    """bf16 rounds to 8 bits: a pixel's error is a few times 2 ** -8 of its range, and few signs of the latent flip."""
    tokenizer = load_vq_tokenizer(str(checkpoint)).to(torch.bfloat16)
    with torch.no_grad():
        image = tokenizer.decode(golden["codes"])
        z = tokenizer.encode_latent(golden["image"].bfloat16())
    assert image.dtype == z.dtype == torch.bfloat16
    truth = golden["reconstruction"]
    assert (image.float() - truth).abs().mean() < 0.02 * truth.abs().mean()
    assert ((z.float() > 0) == (golden["z"] > 0)).float().mean() > 0.99


def test_saved_it_has_the_published_keys_and_shapes(tokenizer, shapes, checkpoint, tmp_path):
    save_vq_tokenizer(tokenizer, tmp_path)
    saved = load_file(tmp_path / "pytorch_model.safetensors")
    assert {name: (list(tensor.shape), tensor.dtype) for name, tensor in saved.items()} == shapes
    code = 0b1000000000101
    assert saved["quantize.embedding"][code].tolist() == [1, *[-1] * 9, 1, -1, 1]
    assert saved["quantize.power_vals"].tolist() == [2**bit for bit in range(12, -1, -1)]
    again = load_vq_tokenizer(str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tokenizer.parameters(), strict=True))
