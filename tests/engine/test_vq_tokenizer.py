"""The tokenizer's contract; tests/parity compares it with the original."""

import pytest
import torch

from hermesflow.engine.image_tokenizers.magvit import VQTokenizer, VQTokenizerConfig

TINY = VQTokenizerConfig(
    code_bits=6, channels=8, channel_multipliers=(1, 2), num_res_blocks=(1, 1), num_groups=4, patch_size=2
)


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
