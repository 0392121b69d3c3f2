"""Backbones of Llama's kind, which several families grow from: weight table, shape and defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hermesflow.engine.transformer import TransformerConfig
from hermesflow.models import loading
from hermesflow.runtime.files import InputError, shown

_SETTINGS = {
    "hidden_size": "@hidden_size",
    "num_layers": "@num_hidden_layers",
    "num_heads": "@num_attention_heads",
    "num_kv_heads": "@num_key_value_heads",
    "mlp_size": "@intermediate_size",
    "norm_eps": "@rms_norm_eps",
    "activation": "@hidden_act",
    "rope_theta": "@rope_theta",
    "tie_embeddings": "@tie_word_embeddings",
    "norm": "rmsnorm",
    "gated": True,
    "bias": False,
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
DEFAULTS = {
    "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 10_000.0, "tie_word_embeddings": False,
}  # fmt: skip
"""What transformers' LlamaConfig takes where a file leaves a value out."""
_UNSUPPORTED = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "pretraining_tp": 1}
"""Settings that must have this value, or be left out."""


def weight_table(body: str, head: str) -> dict[str, list[str]]:
    """A WeightTable; body is the published prefix of the layers' names, as "model.", head the name of the head."""
    layer = f"{body}layers.*"
    return {
        "embed": [f"{body}embed_tokens"],
        "blocks.*.attention_norm": [f"{layer}.input_layernorm"],
        "blocks.*.attention.qkv": [f"{layer}.self_attn.{name}_proj" for name in "qkv"],
        "blocks.*.attention.q_norm": [f"{layer}.self_attn.q_norm"],
        "blocks.*.attention.k_norm": [f"{layer}.self_attn.k_norm"],
        "blocks.*.attention.out": [f"{layer}.self_attn.o_proj"],
        "blocks.*.mlp_norm": [f"{layer}.post_attention_layernorm"],
        "blocks.*.mlp.up": [f"{layer}.mlp.{name}_proj" for name in ("gate", "up")],
        "blocks.*.mlp.down": [f"{layer}.mlp.down_proj"],
        "norm": [f"{body}norm"],
        "head": [head],
    }


def transformer_config(
    given: Any, model_type: str, defaults: Mapping[str, Any], vocab_size: int, owner: str, **more: Any
) -> TransformerConfig:
    """A backbone's shape from its configuration.

    Args:
        given: the language model's configuration as a dictionary.
        model_type: what it must be of.
        defaults: values that it may leave out, beside DEFAULTS.
        vocab_size: of the joint vocabulary.
        owner: the family, for messages.
        more: further fields of TransformerConfig, as in loading.transformer_config.
    Raises: InputError on another model_type, a damaged value, sizes that do not fit or a setting that is not supported.
    """
    head_dim = None
    if isinstance(given, Mapping):
        _check_supported(given, owner)
        head_dim = given.get("head_dim")
        rope = given.get("rope_parameters")  # where transformers 5 keeps rope_theta
        given = {**DEFAULTS, **defaults, **(rope if isinstance(rope, Mapping) else {}), **given}
    config = loading.transformer_config(given, model_type, _SETTINGS | more, _ACTIVATIONS, vocab_size, owner)
    if head_dim not in (None, config.head_dim):
        raise InputError(
            f"{owner}: head_dim {shown(head_dim)} is not hidden_size / num_attention_heads = {config.head_dim}, which "
            "is not supported; give a checkpoint where it is"
        )
    return config


def _check_supported(given: Mapping[str, Any], owner: str) -> None:
    wrong = {name: given[name] for name, value in _UNSUPPORTED.items() if given.get(name, value) != value}
    rope = given.get("rope_parameters")
    if isinstance(rope, Mapping) and rope.get("rope_type", "default") != "default":
        wrong["rope_type"] = rope["rope_type"]
    if wrong:
        listed = ", ".join(f"{name} {shown(value)}" for name, value in wrong.items())
        raise InputError(f"{owner}: {listed} is not supported; give a checkpoint without it")
