"""The published class Showo of Show-o (arXiv 2408.12528) and HermesFlow (arXiv 2502.12148), by our passes.

Source: models/modeling_showo.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hermesflow.drop_in.attention_masks import ImageFirst, ImageLast, Reading, read_masks
from hermesflow.drop_in.functional import draw_seeds
from hermesflow.drop_in.label_scoring import ScoredLabels, logprob_sums
from hermesflow.drop_in.published import (
    Acceleration,
    NotCoveredError,
    PublishedClass,
    check_text_settings,
)
from hermesflow.engine.answer_sampler import FAILED, GOES_ON, Answers, AnswerSampler, SamplingParams
from hermesflow.engine.device_graph import DeviceGraph
from hermesflow.engine.nan_cause import likely_cause
from hermesflow.engine.shared_transformer import SharedTransformer
from hermesflow.engine.token_layout import SPECIAL_TOKENS, TokenLayout
from hermesflow.engine.transformer import Embeds, Transformer, TransformerConfig
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import showo
from hermesflow.runtime.files import InputError

_OF_LOSSES = ("input_ids", "input_embeddings", "attention_mask", "labels", "label_smoothing")


def _generate_images(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    uncond_input_ids: Tensor | None,
    attention_mask: Tensor | None,
    temperature: float,
    timesteps: int,
    guidance_scale: float,
    noise_schedule: Callable[[Tensor], Tensor],
    generator: torch.Generator | None,
    config: Any,
    **_: Any,
) -> Tensor:
    """t2i_generate: codes int64 [B, N]. input_ids is not written to."""
    acceleration.check_forward(transformer)
    layout = _image_layout(acceleration.owner, transformer, config)
    is_guided = uncond_input_ids is not None and guidance_scale > 0
    rows = input_ids
    if is_guided:
        start = config.dataset.preprocessing.max_seq_length + 1
        rows = torch.cat([rows, torch.cat([uncond_input_ids[:, :start], input_ids[:, start:]], dim=1)])
    readings = read_masks(attention_mask, *rows.shape)
    prompts = [_prompt_of(ids, reading, layout) for ids, reading in zip(rows.tolist(), readings, strict=True)]
    count = len(input_ids)
    return acceleration.draw_images(
        acceleration.engine(layout),
        prompts[:count],
        prompts[count:],
        input_ids[:, -layout.num_image_tokens - 1 : -1],
        temperature=temperature,
        timesteps=timesteps,
        guidance_scale=guidance_scale,
        noise_schedule=noise_schedule,
        generator=generator,
    )


class _FramedLayout(TokenLayout):
    """Of prompts that come with their special tokens."""

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        return list(text_ids)


def _image_layout(owner: nn.Module, transformer: Transformer, config: Any) -> TokenLayout:
    """The vocabulary as t2i_generate's config has it."""
    sizes = config.model.showo
    code_offset = sizes.llm_vocab_size + sizes.num_new_special_tokens
    try:
        layout = _FramedLayout(
            text_vocab_size=code_offset - 1 - len(SPECIAL_TOKENS),
            num_image_tokens=sizes.num_vq_tokens,
            codebook_size=transformer.config.vocab_size - 1 - code_offset,
            sot=0,
            eot=0,
        )
    except ValueError as error:
        raise NotCoveredError(f"config.model.showo does not fit the model ({error})") from error
    if layout.mask_id != owner.config.mask_token_id:
        raise NotCoveredError(f"mask_token_id is {owner.config.mask_token_id}, not the last id {layout.mask_id}")
    return layout


def _prompt_of(ids: list[int], reading: Reading, layout: TokenLayout) -> list[int]:
    """What stands before the image in a generation sequence, without pads."""
    image = len(ids) - layout.num_image_tokens - 2
    if not isinstance(reading, ImageLast) or reading.image != image or reading.first == image:
        raise NotCoveredError("the attention_mask is not that of text and then an image of num_vq_tokens")
    if (ids[image], ids[-1]) != (layout.soi, layout.eoi):
        raise NotCoveredError(f"the image is not between the ids of soi and eoi, {layout.soi} and {layout.eoi}")
    return ids[reading.first : image]


def _generate_text(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    idx: Tensor | None,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    eot_token: int | Tensor | None,
) -> list[Tensor]:
    """mmu_generate: tokens int64 0-dim, with eot if it came."""
    acceleration.check_forward(transformer)
    by_embeddings = bool(acceleration.owner.config.w_clip_vit)
    given, name = (input_embeddings, "input_embeddings") if by_embeddings else (idx, "idx")
    if given is None or (not by_embeddings and input_embeddings is not None):
        raise NotCoveredError(f"a model with w_clip_vit {by_embeddings} continues from {name} alone")
    if len(given) != 1:
        raise NotCoveredError(f"{name} holds {len(given)} sequences, not one")
    if isinstance(eot_token, Tensor) and eot_token.numel() == 1:
        eot_token = int(eot_token)
    check_text_settings(
        [
            ("max_new_tokens", max_new_tokens, max_new_tokens > 0),
            ("top_k", top_k, top_k is None or top_k > 0),
            ("temperature", temperature, 0 < temperature < math.inf),
            ("eot_token", eot_token, eot_token is None or isinstance(eot_token, int)),
        ]
    )
    length = given.shape[1]
    (reading,) = read_masks(attention_mask, 1, length)
    if not isinstance(reading, ImageFirst) or max(2, reading.end + 1) > length:
        raise NotCoveredError("the attention_mask is not that of an image, or features, and then text")
    # An image and the text after it, or text alone and its last token: two spans, and then the answer's.
    end, mode = (reading.end, reading.first) if reading.end else (length - 1, "causal")
    ids = [0] * length if by_embeddings else idx[0].tolist()
    tree = SpanTree.build([(ids[:end], -1, mode), (ids[end:], 0, "causal")], given.device)
    embeds = (torch.arange(length), input_embeddings[0]) if by_embeddings else None
    eot = transformer.config.vocab_size if eot_token is None else eot_token
    params = SamplingParams(temperature=float(temperature), top_k=top_k or 0, max_new_tokens=max_new_tokens)
    with torch.inference_mode():
        # There is one row, whose product with the head memory bounds; see SharedLinear.
        cache, head = transformer.new_cache(length + max_new_tokens), transformer.head
        sampler = AnswerSampler(transformer, cache, head, eot, backend=None, project=F.linear)
        rows = Answers.new(draw_seeds(1, None, given.device)[:, None], [params])
        tokens = _draw(acceleration.owner, sampler, tree, embeds, rows)
    if len(tokens) < max_new_tokens:
        tokens = [*tokens, eot]
    return list(torch.tensor(tokens, device=given.device).unbind())


def _draw(
    owner: nn.Module, sampler: AnswerSampler, prompt: SpanTree, embeds: Embeds | None, rows: Answers
) -> list[int]:
    """Tokens of the one answer, without eot, to the last span of a prompt."""
    device, limit = rows.seed.device, rows.tokens.shape[1] - 1
    last = torch.tensor([len(prompt.token_ids) - 1], device=device)
    sampler.draw(sampler.logits(sampler.transformer(prompt, sampler.cache, embeds, last)), rows)
    if rows.status.item() == GOES_ON:
        tree = prompt.extend([([0], prompt.num_spans - 1, "causal")], reserve=limit - 1)
        tree = tree.decode([prompt.num_spans], rows.last_token(), rows.length)
        step = DeviceGraph(functools.partial(sampler.advance, tree, rows), device)
        # On CUDA the check makes the host wait for the device. A few steps after the end cost less.
        steps_to_look = 1 if device.type == "cpu" else 8
        for number in range(1, limit):
            step()
            if number % steps_to_look == 0 and rows.status.item() != GOES_ON:
                break
    if rows.status.item() == FAILED:
        raise RuntimeError(
            f"mmu_generate: the model gives no distribution (NaN) at token {rows.length.item()}; {likely_cause(owner)}"
        )
    return rows.tokens[0, : rows.length.item()].tolist()


def _score_both(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    batch_size_t2i: int,
    batch_size_mmu: int,
    max_seq_length: int,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """loss_for_unidpo: the sums of images and of captions, fp32 0-dim. batch_size_mmu 0 is all sequences."""
    found, sequences = _labels(labels)
    groups = [
        ScoredLabels(found, sequences[:batch_size_t2i], max_seq_length + 1, shift=0),
        ScoredLabels(found, sequences[-batch_size_mmu:], 1, shift=1),
    ]
    return tuple(_sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, groups))


def _score_images(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    batch_size_t2i: int,
    max_seq_length: int,
    **_: Any,
) -> Tensor:
    """loss_for_dpo: the sum, fp32 0-dim."""
    found, sequences = _labels(labels)
    group = ScoredLabels(found, sequences[:batch_size_t2i], max_seq_length + 1, shift=0)
    return _sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, [group])[0]


def _score_captions(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    **_: Any,
) -> Tensor:
    """loss_for_dpo_understanding: the sum over all sequences, fp32 0-dim."""
    found, sequences = _labels(labels)
    group = ScoredLabels(found, sequences, 1, shift=1)
    return _sums(acceleration, transformer, input_ids, input_embeddings, attention_mask, labels, [group])[0]


def _labels(labels: Tensor | None) -> tuple[np.ndarray, range]:
    """Labels on the host, and the numbers of their sequences."""
    if labels is None:
        raise NotCoveredError("there are no labels")
    return labels.long().cpu().numpy(), range(len(labels))


def _sums(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    input_ids: Tensor,
    input_embeddings: Tensor | None,
    attention_mask: Tensor | None,
    labels: Tensor,
    groups: Sequence[ScoredLabels],
) -> list[Tensor]:
    """Each group's sum. Raises: NotCoveredError, UnknownMaskError."""
    shape = (input_ids if input_embeddings is None else input_embeddings).shape[:2]
    if labels.shape != shape:
        raise NotCoveredError(f"labels are {list(labels.shape)}, the sequences {list(shape)}")
    targets, positions = (np.concatenate([getattr(group, name) for group in groups]) for name in ("target", "position"))
    if not len(targets):
        raise NotCoveredError("no label is to be scored")
    size = transformer.config.vocab_size
    if not 0 <= targets.min() <= targets.max() < size or positions.min() < 0:
        raise NotCoveredError(f"labels lie outside of [0, {size}), or max_seq_length is negative")
    model = acceleration.owner.showo.model
    acceleration.free_images()
    is_checkpointed = bool(getattr(model, "gradient_checkpointing", False)) and model.training
    transformer.prepare_training(compiled=False, checkpointed=is_checkpointed)
    return logprob_sums(transformer, input_ids, input_embeddings, read_masks(attention_mask, *shape), groups)


def _config(owner: nn.Module) -> TransformerConfig:
    scaling = getattr(owner.showo.config, "rope_scaling", None) or {}
    if scaling.get("rope_type", scaling.get("type", "default")) != "default":
        raise InputError(f"rope_scaling {scaling} is not known")
    return showo.transformer_config(owner.showo.config.to_dict(), owner.showo.model.embed_tokens.num_embeddings)


SHOWO = PublishedClass(
    name="Showo",
    marks=".showo with Phi's layers, .config.mask_token_id, t2i_generate, mmu_generate",
    body="showo",
    settings=("mask_token_id", "w_clip_vit"),
    weights=showo.WEIGHTS,
    config=_config,
    fast={
        "t2i_generate": _generate_images,
        "mmu_generate": _generate_text,
        "loss_for_unidpo": _score_both,
        "loss_for_dpo": _score_images,
        "loss_for_dpo_understanding": _score_captions,
    },
    parameters={
        "t2i_generate": (
            "input_ids", "uncond_input_ids", "attention_mask", "temperature", "timesteps", "guidance_scale",
            "noise_schedule", "generator", "config", "kwargs",
        ),
        "mmu_generate": (
            "idx", "input_embeddings", "attention_mask", "max_new_tokens", "temperature", "top_k", "eot_token",
        ),
        "loss_for_unidpo": (*_OF_LOSSES, "batch_size_t2i", "batch_size_mmu", "max_seq_length"),
        "loss_for_dpo": (*_OF_LOSSES, "batch_size_t2i", "max_seq_length"),
        "loss_for_dpo_understanding": (
            *_OF_LOSSES, "batch_size_mmu", "max_seq_length", "labels_mask_text", "labels_mask_image", "kwargs",
        ),
    },
)  # fmt: skip
