"""The mean of several models' weights: a model soup (Wortsman et al., arXiv 2203.05482).

Models that were trained from one start by different ways of learning keep in their mean most of what each has gained,
and less of what single runs lose by chance. Models of different starts have nothing in common that a mean would keep.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hermesflow.models.model import Model
from hermesflow.runtime.files import InputError


@torch.no_grad()
def merge_models(model: Model, others: Iterable[Model]) -> int:
    """Gives a model the mean of its backbone's weights and those of others, in place; sums are of float32 or wider.

    Args:
        model: the first; its image tokenizer and prompts stay.
        others: opened one after the other, if they come from a generator; of the same family and shape, and with the
            same image tokenizer. They may be on any device and in any dtype.
    Returns: how many models went in.
    Raises: InputError on another shape or image tokenizer, which names the place of the model that does not fit.
    """
    tensors = model.transformer.state_dict()
    sums, count = {name: tensor.to(_summed(tensor)) for name, tensor in tensors.items()}, 1
    for count, other in enumerate(others, start=2):
        _check_fits(model, other, count)
        for name, tensor in other.transformer.state_dict().items():
            sums[name] = sums[name] + tensor.to(sums[name])
    for name, tensor in tensors.items():
        tensor.copy_(sums[name] / count)
    return count


def _summed(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check_fits(model: Model, other: Model, place: int) -> None:
    shapes = [{name: tensor.shape for name, tensor in one.transformer.state_dict().items()} for one in (model, other)]
    if type(model) is not type(other) or shapes[0] != shapes[1]:
        raise InputError(f"model {place} of the merge is of another family or shape than the first; leave it out")
    of_images, of_other = (one.modules()[1:] for one in (model, other))
    for module, same in zip(of_images, of_other, strict=True):
        tensors, others = module.state_dict(), same.state_dict()
        if tensors.keys() != others.keys() or not all(
            torch.equal(tensor.cpu(), others[name].cpu()) for name, tensor in tensors.items()
        ):
            raise InputError(f"model {place} of the merge has another image tokenizer than the first; leave it out")
