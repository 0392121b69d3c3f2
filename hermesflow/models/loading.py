"""What families share to open published checkpoints: configurations, weight tables and shapes of backbones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from torch import Tensor

from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.runtime.files import InputError, shown

WeightTable = Mapping[str, Sequence[str]]
"""Our modules -> the published ones that lie in them one below the other, such as q, k and v in attention.qkv; * counts
the layers. Weight and bias go together."""


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Puts the file's name before the InputErrors of the block."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def published_tensors(table: WeightTable, transformer: Transformer) -> dict[str, Tensor]:
    """Of a backbone: the name of each published tensor -> the parameter, or the rows of one, that it is.

    Modules that a family's own backbone has beside a Transformer's, named code_..., flow_... or feature_..., are left
    to it.
    Raises: KeyError on another module that the table does not name.
    """
    config, parts = transformer.config, {}
    heads = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for name, tensor in transformer.state_dict(keep_vars=True).items():
        module, _, kind = name.rpartition(".")
        if (module == "head" and config.tie_embeddings) or module.startswith(("code_", "flow_", "feature_")):
            continue
        layer = re.search(r"\.(\d+)\.", name)
        published = table[re.sub(r"\.\d+\.", ".*.", module)]
        rows = heads if len(published) == 3 else [len(tensor) // len(published)] * len(published)
        for part, of_part in zip(published, tensor.detach().split(rows), strict=True):
            parts[f"{part.replace('*', layer[1] if layer else '*')}.{kind}"] = of_part
    return parts


def transformer_config(
    given: Any,
    model_type: str,
    settings: Mapping[str, Any],
    activations: Mapping[str, str],
    vocab_size: int,
    owner: str,
) -> TransformerConfig:
    """A backbone's shape from the configuration of the language model that it grew from.

    Args:
        given: a configuration of transformers as a dictionary.
        model_type: what it must be of.
        settings: fields of TransformerConfig: constants, or "@name" for a value of the configuration.
        activations: the configuration's names of activations -> ours.
        vocab_size: of the joint vocabulary.
        owner: the family, for messages.
    Raises: InputError on another model_type, a missing value, an unknown activation or sizes that do not fit.
    """
    if not isinstance(given, Mapping):
        raise InputError(f"the language model's configuration is {shown(given)}, no object; restore it")
    if given.get("model_type") != model_type:
        raise InputError(
            f"the language model is of type {shown(given.get('model_type'))}, a {owner} checkpoint grows from "
            f"{model_type!r}; correct llm_model_path in its config.json"
        )
    rope = given.get("rope_parameters")  # where transformers 5 keeps two of them
    known = {**(rope if isinstance(rope, Mapping) else {}), **given}
    values: dict[str, Any] = {"vocab_size": vocab_size}
    for name, value in settings.items():
        values[name] = known.get(value[1:]) if isinstance(value, str) and value.startswith("@") else value
    values["num_kv_heads"] = values.get("num_kv_heads") or values.get("num_heads")
    if "activation" in values:
        values["activation"] = activations.get(str(values["activation"]), values["activation"])
    kinds = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for item in fields(TransformerConfig):
        value = values.get(item.name, item.default)
        if type(value) not in kinds[item.type]:
            raise InputError(f"the language model's configuration gives {item.name} as {shown(value)}; restore it")
    try:
        return TransformerConfig(**values)
    except (ValueError, ArithmeticError) as error:
        raise InputError(f"the language model's configuration does not fit together ({error}); restore it") from error


def make_config(kind: type, values: Mapping[str, Any]) -> Any:
    """A configuration from JSON, whose values must have the types of its fields; no number is negative.

    Raises: ValueError that names the field, or as the configuration itself does.
    """
    hints = get_type_hints(kind)
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        fits = name not in hints or _is_of(value, hints[name])
        if not fits or any(type(item) in (int, float) and item < 0 for item in numbers):
            raise ValueError(f"{kind.__name__}: {name} is {shown(value)}")
    return kind(**values)


def _is_of(value: Any, expected: Any) -> bool:
    if get_origin(expected) is tuple:
        item = get_args(expected)[0]
        return isinstance(value, tuple) and all(_is_of(part, item) for part in value)
    if get_args(expected):  # a union
        return any(_is_of(value, one) for one in get_args(expected))
    return type(value) is expected or (expected is float and type(value) is int)
