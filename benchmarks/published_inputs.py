"""Sequences, labels, dense masks and settings as the published scripts make them for the class Showo.

Source: Show-o (arXiv 2408.12528) and HermesFlow (arXiv 2502.12148) with their code.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor

from hermesflow.engine.token_layout import TokenLayout

IGNORED = -100
"""The label of what is not scored."""


def image_attention_mask(ids: Tensor, pad_id: int, soi_id: int, eoi_id: int) -> Tensor:
    """Mask [B, 1, L, L] of sequences [B, L] of one image each: its tokens see all but pads, text the text before it.

    Added to the scores, as all masks here. A pad sees the pads before it, so that no row is empty.
    """
    is_pad, is_end = ids == pad_id, ids == eoi_id
    in_image = (ids == soi_id).cumsum(1) - is_end.cumsum(1) + is_end.long() > 0
    at = torch.arange(ids.shape[1], device=ids.device)
    last_pad = torch.where(is_pad, at, -1).amax(dim=1)[:, None]
    after_pads = at > last_pad
    text = (at <= at[:, None]) & ~(after_pads[:, :, None] & ~after_pads[:, None, :])
    return additive_mask(torch.where(in_image[:, :, None], ~is_pad[:, None, :], text)[:, None])


def understanding_attention_mask(ids: Tensor, eoi_id: int) -> Tensor:
    """Mask [B, 1, L, L] of sequences [B, L]: all see the first one's image and what precedes it; text is causal."""
    batch, length = ids.shape
    at = torch.arange(length, device=ids.device)
    end = (ids == eoi_id).nonzero()[0, 1]
    return additive_mask(((at <= at[:, None]) | (at <= end)).expand(batch, 1, length, length))


def clip_attention_mask(embeddings: Tensor, system_prompt_len: int, num_features: int = 576) -> Tensor:
    """Mask [B, 1, L, L] of embeddings [B, L, D] of [mmu, system prompt, soi, features, ...]: all see the features."""
    batch, length = embeddings.shape[:2]
    at = torch.arange(length, device=embeddings.device)
    is_feature = (at >= system_prompt_len + 2) & (at < system_prompt_len + 2 + num_features)
    return additive_mask(((at <= at[:, None]) | is_feature).expand(batch, 1, length, length))


def additive_mask(sees: Tensor) -> Tensor:
    """0 where one token sees another; elsewhere the least int64 as a float, as published."""
    return torch.zeros(sees.shape, device=sees.device).masked_fill(~sees, torch.iinfo(torch.int64).min)


def generation_ids(
    layout: TokenLayout, prompts: Sequence[Sequence[int]], max_seq_length: int, image_ids: Tensor | None = None
) -> Tensor:
    """Sequences [B, max_seq_length + N + 3] of plain text ids: [pads, t2i, sot, text, eot, soi, image, eoi].

    Args:
        layout: the vocabulary; N is its num_image_tokens.
        prompts: [B] texts; what does not fit is cut, eot kept.
        max_seq_length: how many tokens sot, text and eot have room for.
        image_ids: joint ids [B, N]; None: all masked.
    """
    if image_ids is None:
        image_ids = torch.full((len(prompts), layout.num_image_tokens), layout.mask_id)
    rows = []
    for prompt, image in zip(prompts, image_ids.tolist(), strict=True):
        text = layout.text_prompt(prompt)
        text = text if len(text) <= max_seq_length + 1 else [*text[:max_seq_length], layout.eot]
        pads = [layout.pad] * (max_seq_length + 1 - len(text))
        rows.append([*pads, *text, layout.soi, *image, layout.eoi])
    return torch.tensor(rows)


def generation_labels(layout: TokenLayout, ids: Tensor, image_labels: Tensor) -> Tensor:
    """Labels of generation sequences in training: image_labels [B, N] in the image's place, IGNORED at pads."""
    labels = ids.clone()
    labels[:, -layout.num_image_tokens - 1 : -1] = image_labels
    return torch.where(labels == layout.pad, IGNORED, labels)


def understanding_ids(layout: TokenLayout, image_ids: Tensor, questions: Sequence[Sequence[int]]) -> Tensor:
    """Sequences [B, L] of images [B, N] in joint ids and questions of one length: [mmu, soi, image, eoi, sot, text]."""
    prefixes = (layout.image_prefix(codes) for codes in (image_ids - layout.code_offset).tolist())
    return torch.tensor([[*prefix, *layout.question(text)] for prefix, text in zip(prefixes, questions, strict=True)])


def caption_ids(
    layout: TokenLayout, image_ids: Tensor, captions: Sequence[Sequence[int]], max_seq_length: int
) -> tuple[Tensor, Tensor]:
    """Sequences [B, N + 3 + max_seq_length] for training, and their labels: sot, the caption and eot are scored.

    [mmu, soi, image, eoi, sot, caption, eot, pads]; what does not fit is cut, eot kept.
    """
    rows = []
    for image, caption in zip(image_ids, captions, strict=True):
        text = [layout.sot, *caption, layout.eot]
        text = text if len(text) <= max_seq_length else [*text[: max_seq_length - 1], layout.eot]
        prefix = layout.image_prefix((image - layout.code_offset).tolist())
        rows.append([*prefix, *text, *[layout.pad] * (max_seq_length - len(text))])
    ids = torch.tensor(rows)
    labels = torch.where(ids == layout.pad, IGNORED, ids)
    labels[:, : layout.num_image_tokens + 3] = IGNORED
    return ids, labels


def published_config(layout: TokenLayout, max_seq_length: int) -> SimpleNamespace:
    """What t2i_generate reads of the published training configuration."""
    showo = SimpleNamespace(
        num_vq_tokens=layout.num_image_tokens,
        llm_vocab_size=layout.text_vocab_size,
        num_new_special_tokens=layout.code_offset - layout.text_vocab_size,
    )
    return SimpleNamespace(
        model=SimpleNamespace(showo=showo),
        dataset=SimpleNamespace(preprocessing=SimpleNamespace(max_seq_length=max_seq_length)),
    )
