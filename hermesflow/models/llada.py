"""Backbones of LLaDA's kind (arXiv 2502.09992), from which MMaDA and Lumina-DiMOO grew: weight table and shape."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.models import loading
from hermesflow.runtime.files import InputError, shown

_BODY = "model.transformer"
_LAYER = f"{_BODY}.blocks.*"
WEIGHTS = {
    "embed": [f"{_BODY}.wte"],
    "blocks.*.attention_norm": [f"{_LAYER}.attn_norm"],
    "blocks.*.attention.qkv": [f"{_LAYER}.{name}_proj" for name in "qkv"],
    "blocks.*.attention.out": [f"{_LAYER}.attn_out"],
    "blocks.*.mlp_norm": [f"{_LAYER}.ff_norm"],
    "blocks.*.mlp.up": [f"{_LAYER}.{name}_proj" for name in ("ff", "up")],
    "blocks.*.mlp.down": [f"{_LAYER}.ff_out"],
    "norm": [f"{_BODY}.ln_f"],
    "head": [f"{_BODY}.ff_out"],
}
"""A WeightTable."""
_SETTINGS = {
    "hidden_size": "@d_model",
    "num_layers": "@n_layers",
    "num_heads": "@n_heads",
    "num_kv_heads": "@n_kv_heads",
    "mlp_size": "@mlp_hidden_size",
    "norm_eps": "@rms_norm_eps",
    "rope_theta": "@rope_theta",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated": True,
    "bias": False,
}
_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
_SUPPORTED = {
    "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False,
    "attention_layer_norm": False, "include_bias": False, "include_qkv_bias": False, "bias_for_layer_norm": False,
    "input_emb_norm": False, "scale_logits": False, "weight_tying": False, "multi_query_attention": None,
}  # fmt: skip
"""Options of LLaDA's configuration, each with the value that it must have, or be left out."""


class LLaDALayout(Layout):
    """[text, specials and the mask among it | codes from code_offset on]; bidirectional."""

    code_offset: int
    mask_id: int
    is_bidirectional = True

    @cached_property
    def text_ids(self) -> Ids:
        """What stands before the codes, without the mask."""
        return Ids([token for token in range(self.code_offset) if token != self.mask_id])

    @cached_property
    def code_ids(self) -> Ids:
        """Behind the tokenizer's vocabulary."""
        return Ids(range(self.code_offset, self.code_offset + self.codebook_size))


def published_tensors(parts: nn.ModuleDict) -> dict[str, Tensor]:
    """Of the part "transformer": the name of each published tensor -> the parameter, or the rows of one, that it is."""
    return loading.published_tensors(WEIGHTS, parts["transformer"])


def transformer_config(given: Mapping[str, Any], model_type: str, owner: str) -> TransformerConfig:
    """A backbone's shape from its configuration.

    Args:
        given: config.json.
        model_type: what it must be of.
        owner: the family, for messages.
    Raises: InputError on a damaged value, sizes that do not fit or an option that is not supported.
    """
    wrong = {
        name: given[name]
        for name, value in _SUPPORTED.items()
        if given.get(name, value) != value and not (value is None and given[name] is False)
    }
    if wrong:
        listed = ", ".join(f"{name} {shown(value)}" for name, value in wrong.items())
        raise InputError(f"{owner}: {listed} is not supported; give a checkpoint without it")
    known = {**_DEFAULTS, **given}
    if known.get("mlp_hidden_size") is None:
        ratio, width = given.get("mlp_ratio"), given.get("d_model")
        known["mlp_hidden_size"] = ratio * width if type(ratio) is int and type(width) is int else None
    vocab_size = given.get("embedding_size") or given.get("vocab_size")
    return loading.transformer_config(known, model_type, _SETTINGS, {}, vocab_size, owner)
