"""The tokenizers' contract; tests/parity compares them with the originals."""

import pytest
import torch

from hermesflow.engine.image_tokenizers import blocks
from hermesflow.engine.image_tokenizers.blocks import Codebook
from hermesflow.engine.image_tokenizers.emu3 import Emu3Tokenizer, Emu3TokenizerConfig
from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig
from hermesflow.engine.image_tokenizers.vqgan import VQGAN, VQGANConfig

TINY = VQTokenizerConfig(
    code_bits=6, channels=8, channel_multipliers=(1, 2), num_res_blocks=(1, 1), num_groups=4, patch_size=2
)
SIZES = {"codebook_size": 64, "channels": 8, "channel_multipliers": (1, 2, 1), "num_res_blocks": 1, "num_groups": 4}
MAKERS = {
    "magvit": lambda: VQTokenizer(TINY),
    "vqgan": lambda: VQGAN(VQGANConfig(**SIZES, embed_dim=3, latent_channels=5, attention_levels=(2,))),
    "emu3": lambda: Emu3Tokenizer(Emu3TokenizerConfig(**SIZES, attention_levels=(1, 2))),
}
"""All with 4 pixels a token and 64 codes."""


@pytest.fixture(params=MAKERS)
def model(request):
    torch.manual_seed(0)
    return MAKERS[request.param]()


@torch.no_grad()
def test_codes_round_trip_through_the_latent(model):
    codes = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model.latent_to_codes(model.codes_to_latent(codes, 2, 6)), codes)
    images = model.decode(codes, 2, 6)
    assert images.shape == (3, 3, 8, 24)
    assert model.encode(images).shape == (3, 12)
    assert model.decode(codes[:, :4]).shape == (3, 3, 8, 8)


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch_or_the_mode(model):
    """Batch norms use running statistics, also in training mode."""
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    assert torch.equal(model.train().encode(images)[1:], model.eval().encode(images[1:]))
    assert not any("running_mean" in name and tensor.any() for name, tensor in model.state_dict().items())


@torch.no_grad()
def test_bf16(model):
    model.to(torch.bfloat16)
    assert (model.dtype, model.device.type) == (torch.bfloat16, "cpu")
    images = model.decode(model.encode(torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)))
    assert images.dtype == torch.bfloat16


def test_a_pass_holds_more_of_smaller_images(model):
    assert model.images_per_pass(2**14, 2**14) == 1
    assert model.images_per_pass(2**10, 2**10) == 16  # 2 ** 27 values of 8 channels


@pytest.mark.parametrize("normalized", [False, True])
def test_nearest_codes_are_those_of_all_distances(normalized, monkeypatch):
    monkeypatch.setattr(blocks, "_VALUES_PER_PASS", 50 * 7)  # 7 rows at once, and a ragged end
    book, z = Codebook(50, 4, normalized), torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(0))
    rows, codes = z.permute(0, 2, 3, 1).reshape(-1, 4).double(), book.embedding.weight.detach().double()
    if normalized:
        rows, codes = rows / rows.norm(dim=1, keepdim=True), codes / codes.norm(dim=1, keepdim=True)
    nearest = torch.cdist(rows, codes).argmin(1).view(2, 15)
    assert torch.equal(book.nearest(z), nearest)
    assert torch.allclose(book.lookup(nearest, 3, 5)[0, :, 1, 2].double(), codes[nearest[0, 7]])


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
def test_bad_input_is_named(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VQGANConfig(num_res_blocks=0), r"VQGANConfig: num_res_blocks must lie in \[1, 64\], got 0"),
        (lambda: VQGANConfig(channel_multipliers=(1,) * 9), "expected 1 to 8 channel_multipliers, got 9"),
        (lambda: Emu3TokenizerConfig(temporal_downsampling=3), "temporal_downsampling must be a power of two, got 3"),
    ],
    ids=["range", "levels", "time"],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
