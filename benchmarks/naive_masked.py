"""MMaDA and Lumina-DiMOO as their published code runs them, in eager torch: what the engine is compared with.

    images of MMaDA          all images of a call as 2 B rows, text padded on the left, under a dense mask
    images of Lumina-DiMOO   one at a time, its two halves in calls of their own
    text of both             one answer at a time; in each step the whole sequence, logits over the joint vocabulary at
                             all places, and in fp64 the softmax that gives the confidences
    a step of Pair-DPO       of masked images and captions, padded to one length, with logits at all places; neither
                             family published one, so this is HermesFlow's on sequences such as their training has

The weights are those of our Transformer; the arithmetic is that of naive_model.py.
Sources: t2i_generate and mmu_generate of MMaDA, generators/ of Lumina-DiMOO.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import naive
from hermesflow.benchmarks.naive_model import IGNORED, all_logits, dpo_step, sequence_to
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer


@torch.inference_mode()
def draw_images(
    transformer: Transformer,
    layout: Layout,
    prompt: Sequence[int],
    num_images: int,
    params: ImageSamplingParams,
    *,
    padded_to: int = 0,
) -> Tensor:
    """Draw images of one prompt.

    Args:
        transformer, layout: the model.
        prompt: plain text ids.
        num_images: n.
        params: how to draw; temperature 0 takes the likeliest codes.
        padded_to: tokens of a prompt with its pads, all images in one call; 0: one image at a time, without pads.
    Returns: codes int64 [n, num_image_tokens]; random draws are torch's own.
    """
    if not padded_to and num_images > 1:
        images = [draw_images(transformer, layout, prompt, 1, params) for _ in range(num_images)]
        return torch.cat(images)
    device, num_tokens = transformer.embed.weight.device, layout.num_image_tokens
    halves = []
    for text in (prompt, ()):
        ids = layout.text_prompt(text)
        pads = max(0, padded_to - len(ids))
        row = torch.tensor([[layout.mask_id] * pads + ids + layout.image([-1] * num_tokens)], device=device)
        halves.append((row.repeat(num_images, 1), pads + len(ids), _mask_of(row, pads).expand(num_images, -1, -1, -1)))
    codes = torch.full((num_images, num_tokens), -1, device=device)
    first, last = layout.code_ids[0], layout.code_ids[layout.codebook_size - 1] + 1
    places = torch.from_numpy(layout.code_positions).to(device)
    mask_temperature, unknown = params.mask_temperature, num_tokens
    for step in range(params.num_steps):
        image = torch.where(codes < 0, layout.mask_id, codes + first)
        for ids, start, _ in halves:
            ids[:, start + places] = image
        if padded_to:
            both = torch.cat([ids for ids, _, _ in halves]), torch.cat([mask for _, _, mask in halves])
            logits = all_logits(transformer, *both).chunk(2)
        else:
            logits = [all_logits(transformer, ids, mask) for ids, _, mask in halves]
        cond, uncond = (
            of_half[:, start + places, first:last].float()
            for of_half, (_, start, _) in zip(logits, halves, strict=True)
        )
        guided = (1 + params.guidance_scale) * cond - params.guidance_scale * uncond
        probs = guided.softmax(-1)
        drawn = (
            probs.argmax(-1) if params.temperature == 0 else torch.multinomial(probs.flatten(0, 1), 1).view_as(codes)
        )
        known = codes >= 0
        drawn = torch.where(known, codes, drawn)
        ratio = (step + 1) / params.num_steps
        count = math.floor(num_tokens * torch.cos(torch.tensor(ratio) * math.pi * 0.5).item())
        unknown = max(1, min(unknown - 1, count))
        if params.mask_decay == "showo":
            mask_temperature *= 1 - ratio
        confidence = probs.gather(2, drawn[..., None])[..., 0]
        masked = naive.mask_topk(confidence, known, torch.full((num_images,), unknown, device=device), mask_temperature)
        codes = torch.where(masked, -1, drawn)
    return drawn


@torch.inference_mode()
def answer_question(
    transformer: Transformer, layout: Layout, codes: Sequence[int], question: Sequence[int], params: SamplingParams
) -> list[int]:
    """Token ids of one answer, cut at eot; see MaskedTextDecoder. All steps are done, as published."""
    device, length, block = transformer.embed.weight.device, params.max_new_tokens, params.block_length
    before = layout.asked(codes, question)
    x = torch.tensor([[*before, *[layout.mask_id] * length, *layout.after_answer]], device=device)
    steps = params.num_steps * block // length
    mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool, device=device)
    for start in range(len(before), len(before) + length, block):
        for number in range(steps):
            logits = all_logits(transformer, x, mask)
            if params.temperature:
                noise = -torch.rand_like(logits, dtype=torch.float64).log()
                token = (logits.double().exp() / noise**params.temperature).argmax(-1)
            else:
                token = logits.argmax(-1)
            confidence = logits.double().softmax(-1).gather(2, token[..., None])[..., 0]
            is_masked = x == layout.mask_id
            confidence[:, start + block :] = float("-inf")
            confidence = confidence.masked_fill(~is_masked, float("-inf"))
            count = block // steps + (number < block % steps)
            kept = confidence[0].topk(count).indices
            x[0, kept] = token[0, kept]
    region = x[0, len(before) : len(before) + length].tolist()
    return region[: region.index(layout.eot)] if layout.eot in region else region


@dataclass(frozen=True)
class PaddedPairs:
    """Pairs as padded sequences, of each role (win, lose) P image sequences and then P caption sequences.

    ids, labels: int64 [2, 2 P, L], the label of each hidden token, elsewhere IGNORED. mask: bool [2, 2 P, 1, L, L].
    """

    ids: Tensor
    labels: Tensor
    mask: Tensor


def pad_pairs(layout: Layout, batch: PairBatch) -> PaddedPairs:
    """The sequences of a packed pass whose pairs all have both sides and one mask, with the same masks and labels."""
    tree, num_pairs = batch.tree, len(batch.visits)
    shape = (2, 2 * num_pairs, int(tree.lengths.max()))
    ids, labels = (torch.full(shape, value, device=tree.token_ids.device) for value in (layout.mask_id, IGNORED))
    mask = torch.zeros(*shape[:2], 1, shape[2], shape[2], dtype=torch.bool, device=ids.device)
    for first, name in ((0, "generation"), (num_pairs, "understanding")):
        side = batch.sides[name]
        for segment in range(2 * num_pairs):
            at, chosen = (segment % 2, first + segment // 2), side.segment == segment
            rows = side.rows[chosen]
            sequence = sequence_to(tree, int(rows[-1]))
            ids[at][: len(sequence)] = sequence
            labels[at][tree.position_ids[rows]] = side.targets[chosen]
            mask[at] = _mask_of(ids[at][None].flip(1), shape[2] - len(sequence))[0].flip(1, 2)
    return PaddedPairs(ids, labels, mask)


def train_step(transformer: Transformer, reference: Transformer, pairs: PaddedPairs, beta: float) -> Tensor:
    """Loss of one step of Pair-DPO, 0-dim, with its gradient; see naive_model.train_step."""
    return dpo_step(partial(_label_logprobs, pairs=pairs), transformer, reference, beta)


def _label_logprobs(transformer: Transformer, role: int, pairs: PaddedPairs) -> Tensor:
    """Log-probability of each label [2 P, L], 0 where there is none, by logits at all positions."""
    labels = pairs.labels[role]
    logits = all_logits(transformer, pairs.ids[role], pairs.mask[role])
    logprob = naive.token_logprob(logits.flatten(0, 1), labels.flatten().clamp(min=0)).view_as(labels)
    return torch.where(labels == IGNORED, 0.0, logprob)


def _mask_of(ids: Tensor, num_pads: int) -> Tensor:
    """Dense mask bool [1, 1, L, L]: pads neither see nor are seen but by themselves, lest a softmax be over nothing."""
    is_real = torch.arange(ids.shape[1], device=ids.device) >= num_pads
    mask = is_real[:, None] & is_real
    return (mask | torch.eye(len(is_real), dtype=torch.bool, device=ids.device))[None, None]
