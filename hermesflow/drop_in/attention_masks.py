"""Dense attention masks, as callers of the published code pass them, read back as who sees whom.

Three layouts are known. Of a sequence of L tokens:

    image last      pads [0, p), causal, seen by no other | text [p, s), causal | image [s, L), which sees all of [p, L)
    image first     each token sees [a, b), those before it and itself; a = 0: an image's codes (understanding), a > 0:
                    its features after a system prompt (clip-vit), b = 0: plain text

Source: create_attention_mask_predict_next, _for_mmu and _for_mmu_vit in training/prompting_utils.py of Show-o.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_UNSEEN = -1e4
"""A mask's value from which downwards a token is not seen; exp of it is 0 in every dtype."""


@dataclass(frozen=True)
class ImageLast:
    """Tokens before first are pads; from image on they are the image's, up to the end."""

    first: int
    image: int


@dataclass(frozen=True)
class ImageFirst:
    """Tokens in [first, end) are seen by all."""

    first: int
    end: int


Reading = ImageLast | ImageFirst


class UnknownMaskError(ValueError):
    """A mask that is none of the known layouts; the message says what it is instead."""


def read_masks(mask: Tensor | None, num_sequences: int, length: int) -> list[Reading]:
    """Who sees whom in each sequence of a batch; waits for the device once.

    Args:
        mask: additive [B or 1, 1, L, L] of a floating dtype: 0 where a row's token sees a column's, at most -10,000
            where it does not. Every entry is looked at.
        num_sequences: B.
        length: L.
    Returns: one reading a sequence.
    Raises: UnknownMaskError if the mask is missing, of another form, or none of the layouts.
    """
    if mask is None:
        raise UnknownMaskError("there is no attention_mask")
    if not mask.is_floating_point():
        raise UnknownMaskError(f"the attention_mask is of {mask.dtype}, not of numbers that are added to scores")
    expected = (1, length, length)
    if mask.dim() != 4 or tuple(mask.shape[1:]) != expected or mask.shape[0] not in (1, num_sequences):
        raise UnknownMaskError(
            f"the attention_mask is {list(mask.shape)}, not [{num_sequences}, 1, {length}, {length}]"
        )
    mask = mask.detach()[:, 0]
    seen = mask == 0
    in_numbers = (seen | (mask <= _UNSEEN)).flatten(1).all(1)
    last, first = _image_last(seen), _image_first(seen)
    facts = torch.stack([in_numbers.long(), *last, *first], dim=1).tolist()
    readings = [_reading(index, *values) for index, values in enumerate(facts)]
    return readings * num_sequences if len(readings) < num_sequences else readings


def _image_last(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of seen bool [B, L, L]: whether it is this layout, its first and its image [B], int64."""
    index = torch.arange(seen.shape[1], device=seen.device)
    first = seen[:, -1].byte().argmax(dim=1)  # the last token sees all but the pads
    # The image begins at the first token from there on that sees the last one.
    image = (seen[:, :, -1] & (index >= first[:, None])).byte().argmax(dim=1)
    row, column = index[:, None], index
    start, at = first[:, None, None], image[:, None, None]
    expected = ((column <= row) & ((column >= start) | (row < start))) | ((row >= at) & (column >= start))
    return (seen == expected).flatten(1).all(1).long(), first, image


def _image_first(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of seen bool [B, L, L]: whether it is this layout, its first and its end [B], int64."""
    length = seen.shape[1]
    index = torch.arange(length, device=seen.device)
    by_first = seen[:, 0] & (index > 0)  # what the first token sees after itself
    some = by_first.any(dim=1)
    first = torch.where(some, by_first.byte().argmax(dim=1), 0)
    end = torch.where(some, length - by_first.flip(1).byte().argmax(dim=1), 0)
    first = torch.where(first == 1, 0, first)  # it sees itself anyway
    row, column = index[:, None], index
    expected = (column <= row) | ((column >= first[:, None, None]) & (column < end[:, None, None]))
    return (seen == expected).flatten(1).all(1).long(), first, end


def _reading(
    index: int, in_numbers: int, is_last: int, pads: int, image: int, is_first: int, first: int, end: int
) -> Reading:
    if not in_numbers:
        raise UnknownMaskError(
            f"the attention_mask of sequence {index} has entries other than 0 and at most {_UNSEEN:g}"
        )
    if is_first:
        return ImageFirst(first, end)
    if is_last:
        return ImageLast(pads, image)
    raise UnknownMaskError(
        f"the attention_mask of sequence {index} is none of the known layouts: text and then an image (t2i), an image "
        "and then text (understanding), or features between texts (clip-vit)"
    )
