"""Published families of unified models, each described by data: configuration, weights, vocabulary and prompts.

A further family whose backbone engine/transformer.py can express is one more Family in FAMILIES.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from hermesflow.engine.image_decoder import ImageSamplingParams
from hermesflow.engine.token_layout import SPECIAL_TOKENS, TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig

from .files import InputError, shown
from .prompting import PromptFormat


@dataclass(frozen=True, kw_only=True)
class Family:
    """One published family."""

    class_name: str
    """_class_name in the checkpoint's config.json."""
    language_model: str
    """model_type in the configuration of the language model that the backbone grew from."""
    transformer: Mapping[str, Any]
    """Fields of TransformerConfig: constants, or "@name" for a value of the language model's configuration."""
    activations: Mapping[str, str]
    """The language model's names of activations -> ours."""
    weights: Mapping[str, tuple[str, ...]]
    """Our parameters -> the published tensors that lie in them one below the other; {layer} counts the layers."""
    old_buffers: str
    """Regular expression of tensors that old checkpoints hold besides and that nothing needs."""
    projector: tuple[str, ...]
    """Published tensors of the variant that sees through CLIP, beside the weights."""
    special_tokens: tuple[str, ...]
    """[PAD] and the special tokens, in the order in which they follow the text vocabulary."""
    pixels_per_token: int
    """Pixels that an image token spans in each direction."""
    vq_tokenizer: str
    """Hub id of the image tokenizer."""
    vision_encoder: str
    """Hub id of the encoder of the variant that sees through CLIP."""
    system_prompt: str
    """What that variant reads before the image's features."""
    prompts: PromptFormat
    vision_prompts: PromptFormat
    """The prompts of that variant."""
    sampling: ImageSamplingParams
    """How images are drawn unless the caller says otherwise."""


# Sources: inference_mmu.py of Show-o, inference_mmu_vqa.py of HermesFlow; 128 tokens (max_seq_length in configs/) hold
# the text of a prompt with its start and its end.
_SHOWO_PROMPTS = PromptFormat(
    caption_question="Give a caption for this image.",
    question="USER: \n{question} ASSISTANT:",
    choices="Question:{question} Choice:{choices}",
    answer=" {answer}",
    max_prompt_tokens=126,
    max_caption_tokens=100,
    max_answer_tokens=100,
)
_PHI = "showo.model.layers.{layer}"

SHOWO = Family(
    class_name="Showo",
    language_model="phi",
    transformer={
        "hidden_size": "@hidden_size",
        "num_layers": "@num_hidden_layers",
        "num_heads": "@num_attention_heads",
        "num_kv_heads": "@num_key_value_heads",
        "mlp_size": "@intermediate_size",
        "norm_eps": "@layer_norm_eps",
        "activation": "@hidden_act",
        "rotary_fraction": "@partial_rotary_factor",
        "rope_theta": "@rope_theta",
        "block": "parallel",
        "qk_norm": True,  # Show-o adds it to Phi, whatever qk_layernorm in Phi's configuration says
        "bias": True,
        "head_bias": True,
    },
    activations={"gelu_new": "gelu_tanh", "gelu": "gelu"},
    weights={
        "embed.weight": ("showo.model.embed_tokens.weight",),
        **{
            f"blocks.{{layer}}.{ours}.{kind}": tuple(f"{_PHI}.{name}.{kind}" for name in published)
            for kind in ("weight", "bias")
            for ours, published in (
                ("attention_norm", ("input_layernorm",)),
                ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                ("attention.q_norm", ("self_attn.q_layernorm",)),
                ("attention.k_norm", ("self_attn.k_layernorm",)),
                ("attention.out", ("self_attn.dense",)),
                ("mlp.up", ("mlp.fc1",)),
                ("mlp.down", ("mlp.fc2",)),
            )
        },
        "norm.weight": ("showo.model.final_layernorm.weight",),
        "norm.bias": ("showo.model.final_layernorm.bias",),
        "head.weight": ("showo.lm_head.weight",),
        "head.bias": ("showo.lm_head.bias",),
    },
    old_buffers=r"showo\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    projector=("mm_projector.0.weight", "mm_projector.0.bias", "mm_projector.2.weight", "mm_projector.2.bias"),
    special_tokens=("[PAD]", *(f"<|{name}|>" for name in SPECIAL_TOKENS)),
    pixels_per_token=16,
    vq_tokenizer="showlab/magvitv2",
    vision_encoder="openai/clip-vit-large-patch14-336",
    system_prompt=(
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    prompts=_SHOWO_PROMPTS,
    vision_prompts=replace(_SHOWO_PROMPTS, question="USER: {question} ASSISTANT:"),
    # README of HermesFlow: guidance 5 and 50 steps.
    sampling=ImageSamplingParams(num_steps=50, guidance_scale=5.0, mask_temperature=1.0, mask_decay="showo"),
)

FAMILIES = {family.class_name: family for family in (SHOWO,)}


def transformer_config(family: Family, language_model: Mapping[str, Any], vocab_size: int) -> TransformerConfig:
    """The backbone's shape from the language model's configuration.

    Args:
        family: the description.
        language_model: a configuration of transformers as a dictionary.
        vocab_size: of the joint vocabulary.
    Raises: InputError on another model_type, a missing value, an unknown activation or sizes that do not fit.
    """
    if not isinstance(language_model, Mapping):
        raise InputError(f"the language model's configuration is {shown(language_model)}, no object; restore it")
    if language_model.get("model_type") != family.language_model:
        raise InputError(
            f"the language model is of type {shown(language_model.get('model_type'))}, a {family.class_name} "
            f"checkpoint grows from {family.language_model!r}; correct llm_model_path in its config.json"
        )
    values: dict[str, Any] = {"vocab_size": vocab_size}
    rope = language_model.get("rope_parameters")  # where transformers 5 keeps two of them
    known = {**(rope if isinstance(rope, Mapping) else {}), **language_model}
    for name, value in family.transformer.items():
        if isinstance(value, str) and value.startswith("@"):
            value = known.get(value[1:])
        values[name] = value
    values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
    values["activation"] = family.activations.get(str(values["activation"]), values["activation"])
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for item in fields(TransformerConfig):
        value = values.get(item.name, item.default)
        if type(value) not in kinds[item.type]:
            raise InputError(f"the language model's configuration gives {item.name} as {shown(value)}; restore it")
    try:
        return TransformerConfig(**values)
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"the language model's configuration does not fit together ({error}); restore it") from error


def published_tensors(family: Family, transformer: Transformer) -> dict[str, Tensor]:
    """Of a backbone: the name of each published tensor -> the parameter, or the rows of one, that it is."""
    config = transformer.config
    own = {name: tensor.detach() for name, tensor in transformer.state_dict(keep_vars=True).items()}
    heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    parts: dict[str, Tensor] = {}
    for layer in range(config.num_layers):
        for name, published in family.weights.items():
            tensor = own[name.format(layer=layer)]
            rows = [count * config.head_dim for count in heads] if len(published) == 3 else [len(tensor)]
            for part, of_part in zip(published, tensor.split(rows), strict=True):
                parts[part.format(layer=layer)] = of_part
    return parts


def make_layout(
    family: Family, config: Mapping[str, Any], bos: int, eos: int, system_ids: Sequence[int] = ()
) -> TokenLayout:
    """The joint vocabulary of a checkpoint; system_ids stand before an image's features in the variant that has them.

    Raises: ValueError if its sizes do not add up.
    """
    text, codes, total = config["llm_vocab_size"], config["codebook_size"], config["vocab_size"]
    special = len(family.special_tokens)
    if total != text + special + codes + 1:
        raise ValueError(
            f"the vocabulary does not add up: llm_vocab_size {text} + {special} special tokens + codebook_size {codes} "
            f"+ 1 mask are {text + special + codes + 1}, vocab_size is {total}"
        )
    return TokenLayout(
        text_vocab_size=text, codebook_size=codes, num_image_tokens=config["num_vq_tokens"], sot=bos, eot=eos,
        system_ids=tuple(system_ids),
    )  # fmt: skip
