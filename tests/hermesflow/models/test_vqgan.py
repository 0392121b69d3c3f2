"""Configurations and files of learned code books; tests/parity has the published ones."""

import re
from dataclasses import replace

import pytest
import torch

from hermesflow.engine.image_tokenizers.emu3 import Emu3Tokenizer, Emu3TokenizerConfig
from hermesflow.engine.image_tokenizers.vqgan import VQGANConfig
from hermesflow.engine.weights import save_tensors
from hermesflow.models import vqgan
from hermesflow.runtime.files import InputError

TINY = Emu3TokenizerConfig(
    codebook_size=16, channels=8, channel_multipliers=(1, 2), num_res_blocks=1, attention_levels=(1,), num_groups=4
)
COUNTED = "vq.encoder.time_res_stack.0.norm1.num_batches_tracked"


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return vqgan.tokenizer_tensors(Emu3Tokenizer(TINY), vqgan.EMU3, "vq.")


def test_other_names_of_the_published_configurations():
    """BAAI's of Emu3, and what attn_resolutions means to Chameleon: resolutions, not levels."""
    given = {"ch": 64, "ch_mult": [1, 2], "z_channels": 8, "embed_dim": 8, "double_z": False, "attn_resolutions": []}
    expected = Emu3TokenizerConfig(channels=64, channel_multipliers=(1, 2), embed_dim=8, attention_levels=())
    assert vqgan.emu3_config(given) == expected
    assert vqgan.chameleon_config({"attn_resolutions": [32, 256]}).attention_levels == (1, 4)
    assert vqgan.chameleon_config({"attn_resolutions": None}) == VQGANConfig()


@pytest.mark.parametrize(
    ("read", "given", "message"),
    [
        (vqgan.chameleon_config, None, "vq_config is None, no object"),
        (vqgan.chameleon_config, {"double_latent": True}, "double_latent is True, only False is supported"),
        (vqgan.chameleon_config, {"resolution": "512"}, "expected resolution as a multiple of 16 pixels"),
        (vqgan.janus_config, {"base_channels": "128"}, "channels is '128'"),
        (vqgan.janus_config, {"channel_multiplier": []}, "expected 1 to 8 channel_multipliers, got 0"),
        (vqgan.emu3_config, {"latent_channels": 8}, "latent_channels must be embed_dim, got 8 and 4"),
        (vqgan.emu3_config, {"num_attention_heads": 2}, "num_attention_heads is 2, only 1 is supported"),
    ],
)
def test_bad_configurations_are_named(read, given, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(given)


def test_weights_of_something_else_have_no_shape():
    with pytest.raises(InputError, match="the weights under 'vq.' are no image tokenizer's"):
        vqgan.config_of_shapes({"vq.encoder.conv_in.weight": torch.Size([8, 3, 3, 3])}, "vq.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: tensors.pop(COUNTED), f"missing {COUNTED}"),
        (lambda tensors: tensors.update({COUNTED: torch.zeros(())}), "expected torch.int64, got torch.float32"),
        (lambda tensors: tensors.update({"vq.other": torch.zeros(1)}), "unexpected vq.other"),
    ],
    ids=["missing", "dtype", "unexpected"],
)
def test_weights_that_do_not_fit_are_named(damage, message, tensors, tmp_path):
    path = tmp_path / "model.safetensors"
    save_tensors({**tensors, "other": torch.zeros(1, dtype=torch.int32)}, path)
    loaded = vqgan.load_image_tokenizer(path, TINY, vqgan.EMU3, "vq.")
    assert all(
        torch.equal(part, tensors[name]) for name, part in vqgan.tokenizer_tensors(loaded, vqgan.EMU3, "vq.").items()
    )
    damage(tensors)
    save_tensors(tensors, path)
    with pytest.raises(InputError, match=message):
        vqgan.load_image_tokenizer(path, TINY, vqgan.EMU3, "vq.")


def test_sizes_that_do_not_fit_together_are_named(tmp_path):
    with pytest.raises(InputError, match="not the shape of an image tokenizer"):
        vqgan.load_image_tokenizer(tmp_path, replace(TINY, num_groups=3), vqgan.EMU3)
