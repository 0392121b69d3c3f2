"""The published class MMadaModelLM of MMaDA (arXiv 2505.15809), by our passes.

Its training losses stay: they return the logits of all rows and the whole vocabulary, and their attention is biased by
0 towards pads and by 1 towards all else, which is no matter of who sees whom.

Source: models/modeling_mmada.py of MMaDA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hermesflow.drop_in.functional import draw_seeds
from hermesflow.drop_in.published import (
    Acceleration,
    NotCoveredError,
    PublishedClass,
    check_text_settings,
    covered,
    is_number,
)
from hermesflow.engine.answer_sampler import SamplingParams
from hermesflow.engine.decoders.masked_text import MaskedRegion, MaskedTextDecoder
from hermesflow.engine.shared_transformer import SharedTransformer
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.models import llada
from hermesflow.models.mmada import MODEL_TYPE

_OF_IMAGES = (
    "input_ids", "uncond_input_ids", "attention_mask", "uncond_attention_mask", "temperature", "timesteps",
    "guidance_scale", "noise_schedule", "generator", "config", "seq_len", "mask_token_id", "resolution",
    "codebook_size", "kwargs",
)  # fmt: skip
_OF_TEXT = (
    "idx", "input_embeddings", "max_new_tokens", "steps", "block_length", "temperature", "top_k", "eot_token",
    "cfg_scale", "remasking", "mask_id", "attention_mask",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _FramedLayout(llada.LLaDALayout):
    """Of prompts that come with all that precedes the codes. last_id: behind the codes; eot is not read."""

    vocab_size: int
    codebook_size: int
    num_image_tokens: int
    code_offset: int
    mask_id: int
    last_id: int = 0
    eot: int = 0
    before_image = ()

    @property
    def image_grid(self) -> tuple[int, int]:
        """A single row: the order of the codes is the caller's."""
        return 1, self.num_image_tokens

    @property
    def after_image(self) -> tuple[int, ...]:
        """last_id."""
        return (self.last_id,)

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """As it is."""
        return list(text_ids)

    def image_prefix(self, codes: Sequence[int]) -> list[int]:
        """As it is."""
        return list(codes)

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """As it is."""
        return list(text_ids)


def _generate_images(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    *,
    input_ids: Tensor,
    uncond_input_ids: Tensor | None,
    attention_mask: Tensor,
    uncond_attention_mask: Tensor | None,
    guidance_scale: float,
    seq_len: int,
    mask_token_id: int,
    resolution: int,
    codebook_size: int,
    config: Any,
    kwargs: Mapping[str, Any],
    **sampling: Any,
) -> Tensor:
    """t2i_generate: codes int64 [B, N]. input_ids is not written to."""
    acceleration.check_forward(transformer)
    length = input_ids.shape[1]
    image = length - seq_len - 1
    if not len(input_ids):
        raise NotCoveredError("there are no sequences")
    if image < 1:
        raise NotCoveredError(f"seq_len is {seq_len}, in sequences of {length} tokens")
    rows, masks = [input_ids], [attention_mask]
    if uncond_input_ids is not None and guidance_scale > 0:
        start = resolution + 1
        if start > image:
            raise NotCoveredError(f"resolution is {resolution}, within the image that begins at token {image}")
        rows.append(torch.cat([uncond_input_ids[:, :start], input_ids[:, start:]], dim=1))
        masks.append(uncond_attention_mask)
    of_halves = [_without_pads(ids, mask) for ids, mask in zip(rows, masks, strict=True)]
    prompts, unguided = [[ids[: -seq_len - 1] for ids in half] for half in (*of_halves, [])][:2]
    if not all(prompts) or not all(unguided):
        raise NotCoveredError("the attention_mask hides tokens of the image")
    if (input_ids[:, -1] != input_ids[0, -1]).any():
        raise NotCoveredError("the images end with different ids")
    layout = _FramedLayout(
        vocab_size=transformer.config.vocab_size, codebook_size=codebook_size, num_image_tokens=seq_len,
        code_offset=len(kwargs["uni_prompting"].text_tokenizer), mask_id=mask_token_id, last_id=int(input_ids[0, -1]),
    )  # fmt: skip
    if layout.code_offset + codebook_size > layout.vocab_size:
        raise NotCoveredError(
            f"{layout.code_offset} ids of the tokenizer and {codebook_size} codes are more than the vocabulary's "
            f"{layout.vocab_size}"
        )
    engine = acceleration.engine(layout, text_decoder=MaskedTextDecoder)
    of_image = input_ids[:, -seq_len - 1 : -1]
    return acceleration.draw_images(engine, prompts, unguided, of_image, guidance_scale=guidance_scale, **sampling)


def _without_pads(ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Each row's tokens that attention_mask [B, L] lets be seen. Raises: NotCoveredError unless pads come first."""
    if mask is None or mask.shape != ids.shape or mask.is_floating_point():
        given = None if mask is None else f"{mask.dtype} {list(mask.shape)}"
        raise NotCoveredError(f"an attention_mask is {given}, not one of whole numbers for {list(ids.shape)} tokens")
    seen = mask.to(ids.device)
    is_known = ((seen == 0) | (seen == 1)).all() & (seen[:, 1:] >= seen[:, :-1]).all()
    if not is_known:
        raise NotCoveredError("an attention_mask has more than pads on the left, which are 0, and then tokens, 1")
    firsts = (seen == 0).sum(1).tolist()
    return [row[first:] for row, first in zip(ids.tolist(), firsts, strict=True)]


def _generate_text(
    acceleration: Acceleration, transformer: SharedTransformer, *, eot_token: Any = None, **arguments: Any
) -> Tensor:
    """mmu_generate, which reads no eot_token."""
    return _fill(acceleration, transformer, "mmu_generate", lambda region: False, **arguments)


def _generate_text_fast(
    acceleration: Acceleration, transformer: SharedTransformer, *, eot_token: Any = None, **arguments: Any
) -> Tensor:
    """mmu_generate_fast, which ends after a block whose last token is eot_token in all rows."""
    if eot_token is not None and arguments["idx"] is not None and len(arguments["idx"]) > 1:
        raise NotCoveredError("several sequences end together")
    if isinstance(eot_token, Tensor) and eot_token.numel() == 1 and not eot_token.is_floating_point():
        eot_token = int(eot_token)
    if eot_token is not None and type(eot_token) is not int:
        raise NotCoveredError(f"eot_token is {eot_token!r}, no id")
    return _fill(acceleration, transformer, "mmu_generate_fast", lambda region: region[-1] == eot_token, **arguments)


def _fill(
    acceleration: Acceleration,
    transformer: SharedTransformer,
    method: str,
    ends: Callable[[np.ndarray], bool],
    *,
    idx: Tensor | None,
    input_embeddings: Tensor | None,
    max_new_tokens: int,
    steps: int,
    block_length: int,
    temperature: float,
    top_k: int | None,
    cfg_scale: float,
    remasking: str,
    mask_id: int,
    attention_mask: Tensor | None,
) -> Tensor:
    """int64 [B, L + max_new_tokens], the prompts and what was drawn. ends: see MaskedRegion."""
    acceleration.check_forward(transformer)
    blocks = max_new_tokens // block_length if block_length > 0 else 0
    check_text_settings([
        ("idx", None, idx is not None),
        ("block_length", block_length, blocks > 0 and max_new_tokens % block_length == 0),
        ("steps", steps, steps > 0 and blocks > 0 and steps % blocks == 0),
        ("temperature", temperature, is_number(temperature)),
        ("cfg_scale", cfg_scale, is_number(max(cfg_scale, 0.0))),
        ("remasking", remasking, remasking == "low_confidence"),
    ])  # fmt: skip
    if not len(idx):
        raise NotCoveredError("there are no sequences")
    if (idx == mask_id).any():
        raise NotCoveredError("the prompt holds the mask, which the original fills too")
    prompts = idx.tolist()
    # The original passes no mask on with guidance.
    if attention_mask is not None and cfg_scale <= 0 and (attention_mask == 0).any():
        region = torch.full((len(idx), max_new_tokens), mask_id).to(idx)
        both = _without_pads(torch.cat([idx, region], dim=1), attention_mask)
        prompts = [row[:-max_new_tokens] for row in both]
        if min(map(len, both)) <= max_new_tokens:
            raise NotCoveredError("the attention_mask hides a whole prompt")
    params = covered(
        SamplingParams, temperature=float(temperature), max_new_tokens=max_new_tokens, num_steps=steps,
        block_length=block_length, guidance_scale=max(float(cfg_scale), 0.0),
    )  # fmt: skip
    seeds = draw_seeds(len(idx), None, idx.device).tolist()
    regions = [
        MaskedRegion(tuple(prompt), params, seed, f"sequence {row}", mask_id=mask_id, ends=ends)
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
    ]
    layout = _FramedLayout(
        vocab_size=transformer.config.vocab_size, codebook_size=1, num_image_tokens=1, code_offset=1, mask_id=mask_id
    )
    with acceleration.explained_nan(method), torch.inference_mode():
        MaskedTextDecoder(transformer, layout).fill(regions, text_only=False)
    drawn = torch.from_numpy(np.stack([region.ids for region in regions]))
    return torch.cat([idx.long(), drawn.to(idx.device)], dim=1)


def _config(owner: nn.Module) -> TransformerConfig:
    given = owner.config.to_dict() | {"embedding_size": owner.model.transformer.wte.num_embeddings}
    return llada.transformer_config(given, MODEL_TYPE, "MMaDA")


MMADA = PublishedClass(
    name="MMadaModelLM",
    marks=".model.transformer with LLaDA's layers, t2i_generate, mmu_generate",
    body="model.transformer",
    weights=llada.WEIGHTS,
    config=_config,
    fast={
        "t2i_generate": _generate_images,
        "mmu_generate": _generate_text,
        "mmu_generate_fast": _generate_text_fast,
    },
    parameters={"t2i_generate": _OF_IMAGES, "mmu_generate": _OF_TEXT, "mmu_generate_fast": _OF_TEXT},
)
