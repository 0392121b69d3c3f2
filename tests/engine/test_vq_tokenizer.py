"""The tokenizer against the original MAGVIT-v2 (golden outputs on weights made by rule), and its own contract."""

import json
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hermesflow.engine.vq_tokenizer import VQTokenizer, VQTokenizerConfig

GOLDEN = Path(__file__).parents[1] / "data" / "magvit"
TINY = VQTokenizerConfig(
    code_bits=6, channels=8, channel_multipliers=(1, 2), num_res_blocks=(1, 1), num_groups=4, patch_size=2
)


@pytest.fixture(scope="module")
def magvit() -> VQTokenizer:
    shapes = json.loads((GOLDEN / "magvit_state_dict.json").read_text())
    state = {}
    for key, (shape, _) in shapes.items():
        if key.startswith("quantize."):
            continue
        draw = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))
        if len(shape) >= 2:
            draw *= (draw.numel() / shape[0]) ** -0.5
        else:
            draw = 1 + 0.1 * draw if key.endswith("weight") else 0.1 * draw
        state[key] = draw
    with torch.device("meta"):
        model = VQTokenizer(VQTokenizerConfig())
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def test_encodes_as_the_original(magvit):
    golden = load_file(GOLDEN / "magvit.safetensors")
    with torch.no_grad():
        z = magvit.encode_latent(golden["image"])
    assert (z - golden["z"]).abs().max() < 2e-4
    assert torch.equal(magvit.latent_to_codes(z), golden["codes"])


def test_decodes_as_the_original(magvit):
    golden = load_file(GOLDEN / "magvit.safetensors")
    with torch.no_grad():
        assert (magvit.decode(golden["codes"]) - golden["reconstruction"]).abs().max() < 2e-4
        assert (magvit.decode(golden["rect_codes"], 2, 4) - golden["rect_image"]).abs().max() < 2e-4


def test_codes_round_trip_through_the_latent():
    model = VQTokenizer(TINY)
    codes = torch.randint(64, (3, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.latent_to_codes(model.codes_to_latent(codes, 4, 4)), codes)
    images = model.decode(codes)
    assert images.shape == (3, 3, 16, 16)
    assert model.encode(images).shape == (3, 16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode(torch.zeros(1, 3, 15, 16)), "multiples of 4"),
        (lambda m: m.encode(torch.zeros(1, 1, 16, 16)), r"expected images \[B, 3, H, W\]"),
        (lambda m: m.decode(torch.zeros(1, 15, dtype=torch.long)), "do not make a"),
        (lambda m: m.decode(torch.full((1, 16), 64)), r"codes must lie in \[0, 64\)"),
    ],
    ids=["size", "channels", "grid", "code"],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(VQTokenizer(TINY))
