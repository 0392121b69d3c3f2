"""One call makes an instance of a published class fast: accelerate(model), and restore(model) undoes it.

The caller's mask is read once and becomes a span tree, so that what the published methods compute again, or compute for
nothing (pads, the whole vocabulary at every position, all earlier tokens for each new one), is not computed. Weights,
signatures and what is returned stay as they are. A call that is none of the published ones goes to the original method,
and a warning says why, once.
"""

from __future__ import annotations

import functools

from torch import nn

from hermesflow.drop_in.mmada import MMADA
from hermesflow.drop_in.published import AcceleratedMethod, Acceleration, PublishedClass, definer
from hermesflow.drop_in.showo import SHOWO

CLASSES = (SHOWO, MMADA)
"""What accelerate knows."""
METHODS = tuple(dict.fromkeys(name for kind in CLASSES for name in kind.fast))
"""What it replaces, where a class has it."""


def accelerate(model: nn.Module) -> nn.Module:
    """Replaces METHODS of an instance of a published class by fast ones, in place.

    Args:
        model: the instance, or a wrapper around it: DistributedDataParallel, torch.compile, peft's PeftModel.
    Returns: model.
    Raises: ValueError if it is no such instance; the message says what was looked for and what was found.
    """
    owner = _unwrap(model, "accelerate")
    if any(isinstance(vars(owner).get(name), AcceleratedMethod) for name in METHODS):
        return model
    likely = [kind for kind in CLASSES if kind.body_of(owner) is not None]
    kind = (likely or CLASSES)[0]
    problems = kind.problems(owner)
    if problems:
        looked_for = " or ".join(f"{each.name} class ({each.marks})" for each in likely or CLASSES)
        raise ValueError(
            f"accelerate: looked for an instance of the published {looked_for}, found {type(owner).__name__}: "
            f"{'; '.join(problems)}; give the model that {_openers(likely or CLASSES)} returns"
        )
    acceleration = _Acceleration(owner)
    for name in kind.fast:
        if definer(owner, name):
            setattr(owner, name, AcceleratedMethod(acceleration, name))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Gives the original methods back; nothing happens to a model that has them. Returns: model."""
    owner = _unwrap(model, "restore")
    for name in METHODS:
        if isinstance(vars(owner).get(name), AcceleratedMethod):
            delattr(owner, name)
    return model


class _Acceleration(Acceleration):
    """Of a model whose class is known by its language model; pickles hold the model alone."""

    @functools.cached_property
    def kind(self) -> PublishedClass:
        """Looked for when it is needed: a model that is unpickled is empty at first."""
        return next(kind for kind in CLASSES if kind.body_of(self.owner) is not None)

    def __reduce__(self) -> tuple:
        return _Acceleration, (self.owner,)


def _unwrap(model: nn.Module, function: str) -> nn.Module:
    """The instance inside DistributedDataParallel (.module), torch.compile (._orig_mod), peft and the like."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"{function}: expected a model of a published class, got {type(model).__name__}; give the model that "
            f"{_openers(CLASSES)} returns"
        )
    while not hasattr(type(model), METHODS[0]):
        inner = vars(model)["_modules"].get("module") or vars(model)["_modules"].get("_orig_mod")
        if inner is None and hasattr(type(model), "get_base_model"):
            inner = model.get_base_model()
        if inner is None:
            break
        model = inner
    return model


def _openers(kinds: tuple | list) -> str:
    return " or ".join(f"{kind.name}.from_pretrained" for kind in kinds)
