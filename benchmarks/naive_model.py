"""Whole models as the published code runs them, in eager torch: what the engine is compared with, end to end.

Whole sequences [B, L] under dense masks, logits over the full vocabulary at every position. Images: text padded on the
left, both guidance halves in full at each step. Text: one answer at a time, everything computed again for each token,
under a mask that grows by a row and a column. Training: win and lose in passes of their own, of the policy and of the
reference. The operations themselves are in naive.py.

The weights are those of our Transformer; the arithmetic is written out here, so that it stays what it is.
Sources: Show-o (arXiv 2408.12528) and HermesFlow (arXiv 2502.12148) with their code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import naive
from hermesflow.benchmarks.published_inputs import IGNORED, generation_ids
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import ACTIVATIONS, Block, Transformer, rotary_table, rotate
from hermesflow.kernels.span_tree import SpanTree


def all_logits(transformer: Transformer, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [B, L, V] of sequences [B, L] under a dense mask bool [B, 1, L, L] of what each token sees."""
    config = transformer.config
    x = F.embedding(ids, transformer.embed.weight)
    positions = torch.arange(ids.shape[1], device=ids.device)
    rotary = rotary_table(positions, config.rotary_dim, config.rope_theta)
    for block in transformer.blocks:
        normed = block.attention_norm(x)
        attended = _attention(block, normed, rotary, mask)
        if config.block == "parallel":
            x = x + attended + feed_forward(block, normed)
        else:
            x = x + attended
            x = x + feed_forward(block, block.mlp_norm(x))
    return F.linear(transformer.norm(x), transformer.head.weight, transformer.head.bias)


def _attention(block: Block, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
    attention, config = block.attention, block.attention.config
    heads = F.linear(x, attention.qkv.weight, attention.qkv.bias).unflatten(-1, (-1, config.head_dim))
    q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
    q, k = rotate(attention.q_norm(q), rotary).to(v.dtype), rotate(attention.k_norm(k), rotary).to(v.dtype)
    k, v = (part.repeat_interleave(config.num_heads // config.num_kv_heads, dim=2) for part in (k, v))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    attended = naive.dense_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return F.linear(attended, attention.out.weight, attention.out.bias)


def feed_forward(block: Block, x: Tensor) -> Tensor:
    """A block's MLP, for normed x [..., D]."""
    mlp, activation = block.mlp, ACTIVATIONS[block.attention.config.activation]
    x = F.linear(x, mlp.up.weight, mlp.up.bias)
    if mlp.gated:
        gate, x = x.chunk(2, dim=-1)
        x = activation(gate) * x
    else:
        x = activation(x)
    return F.linear(x, mlp.down.weight, mlp.down.bias)


def image_mask(layout: TokenLayout, ids: Tensor) -> Tensor:
    """Dense mask bool [B, 1, L, L]: text sees the text before it, the image all text and all of itself, none a pad."""
    length = ids.shape[1]
    is_pad = ids == layout.pad
    in_image = torch.arange(length, device=ids.device) >= length - layout.num_image_tokens - 2
    causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
    mask = (causal | in_image[:, None])[None] & ~is_pad[:, None, :]
    # A pad sees itself, for a softmax over nothing is NaN; what it computes is seen by nobody.
    return (mask | torch.eye(length, dtype=torch.bool, device=ids.device))[:, None]


@torch.inference_mode()
def draw_images(
    transformer: Transformer,
    layout: TokenLayout,
    prompts: Sequence[Sequence[int]],
    params: ImageSamplingParams,
    *,
    num_text_tokens: int = 128,
) -> Tensor:
    """Draw an image of each prompt by parallel decoding, all prompts in one batch.

    Args:
        transformer, layout: the model.
        prompts: plain text ids [B].
        params: how to draw; the schedule is the cosine, as published. temperature 0 takes the likeliest codes.
        num_text_tokens: to which text is padded.
    Returns: codes int64 [B, num_image_tokens]; random draws are torch's own.
    """
    device, num_tokens = transformer.embed.weight.device, layout.num_image_tokens
    ids = generation_ids(layout, prompts, num_text_tokens).to(device)
    guided = params.guidance_scale != 0
    unguided = generation_ids(layout, [[]] * len(prompts), num_text_tokens).to(device)
    mask = image_mask(layout, torch.cat([ids, unguided]) if guided else ids)
    image, codes_at = slice(-num_tokens - 1, -1), slice(layout.code_offset, layout.code_offset + layout.codebook_size)
    mask_temperature = params.mask_temperature
    for step in range(params.num_steps):
        if guided:
            unguided[:, image] = ids[:, image]
            cond, uncond = all_logits(transformer, torch.cat([ids, unguided]), mask).chunk(2)
            logits = (1 + params.guidance_scale) * cond - params.guidance_scale * uncond
        else:
            logits = all_logits(transformer, ids, mask)
        probs = _probabilities(logits[:, image, codes_at], params.temperature)
        drawn = torch.multinomial(probs.flatten(0, 1), 1).view(len(ids), num_tokens)
        known = ids[:, image] != layout.mask_id
        drawn = torch.where(known, ids[:, image] - layout.code_offset, drawn)

        ratio = (step + 1) / params.num_steps
        count = math.floor(num_tokens * torch.cos(torch.tensor(ratio) * math.pi * 0.5).item())
        num_masked = (known.logical_not().sum(1) - 1).clamp(max=count).clamp(min=1)
        mask_temperature = (mask_temperature if params.mask_decay == "showo" else params.mask_temperature) * (1 - ratio)
        confidence = probs.gather(2, drawn[..., None]).squeeze(2)
        masked = naive.mask_topk(confidence, known, num_masked, mask_temperature)
        ids[:, image] = torch.where(masked, layout.mask_id, drawn + layout.code_offset)
    return drawn


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """Softmax in fp32; of logits as they are at temperature 0, where the likeliest alone stays possible."""
    probs = (logits.float() / (temperature or 1)).softmax(dim=-1)
    return probs if temperature else torch.where(probs == probs.amax(-1, keepdim=True), probs, 0)


def question_sequence(layout: TokenLayout, codes: Sequence[int], text: Sequence[int], device: torch.device) -> Tensor:
    """Sequence [1, L] of an image and the text after it: [mmu, soi, codes, eoi, sot, text]."""
    return torch.tensor([[*layout.image_prefix(codes), *layout.question(text)]], device=device)


def question_mask(layout: TokenLayout, ids: Tensor) -> Tensor:
    """Dense mask bool [1, 1, L, L]: all tokens see the image, and text the text before it."""
    length = ids.shape[1]
    mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=ids.device).tril()
    mask[..., : layout.num_image_tokens + 3] = True
    return mask


@torch.inference_mode()
def answer_question(
    transformer: Transformer,
    layout: TokenLayout,
    codes: Sequence[int],
    question: Sequence[int],
    params: SamplingParams,
) -> list[int]:
    """Token ids of one answer without eot: the whole sequence anew for each token, drawn from the joint vocabulary.

    Args:
        transformer, layout: the model.
        codes: the image, [num_image_tokens].
        question: plain text ids.
        params: temperature (0: the likeliest token), top_k (0: all) and max_new_tokens; the published code has no more.
    """
    ids = question_sequence(layout, codes, question, transformer.embed.weight.device)
    mask, answer = question_mask(layout, ids), []
    for _ in range(params.max_new_tokens):
        logits = all_logits(transformer, ids, mask)[:, -1].float() / (params.temperature or 1)
        if top_k := 1 if params.temperature == 0 else params.top_k:
            logits[logits < logits.topk(top_k).values[:, -1:]] = float("-inf")
        token = torch.multinomial(logits.softmax(dim=-1), 1)
        if token.item() == layout.eot:
            break
        answer.append(token.item())
        ids = torch.cat([ids, token], dim=1)
        unseen = mask.new_zeros(1, 1, mask.shape[2], 1)
        mask = torch.cat([torch.cat([mask, unseen], dim=3), mask.new_ones(1, 1, 1, ids.shape[1])], dim=2)
    return answer


@torch.inference_mode()
def score_choice(
    transformer: Transformer,
    layout: TokenLayout,
    codes: Sequence[int],
    question: Sequence[int],
    choice: Sequence[int],
) -> float:
    """Log-probability of one choice and of its eot under the joint vocabulary, in a pass of its own.

    The published code does not score choices; this is how it would.
    """
    ids = question_sequence(layout, codes, [*question, *choice], transformer.embed.weight.device)
    logits = all_logits(transformer, ids, question_mask(layout, ids))[0, -len(choice) - 1 :]
    return naive.token_logprob(logits, torch.tensor([*choice, layout.eot], device=ids.device)).sum().item()


@dataclass(frozen=True)
class PaddedPairs:
    """Pairs as padded sequences, of each role (win, lose) P image sequences and then P caption sequences.

    ids, labels: int64 [2, 2 P, L], the label of each position that is scored, elsewhere IGNORED.
    """

    ids: Tensor
    labels: Tensor


def pad_pairs(layout: TokenLayout, batch: PairBatch, num_text_tokens: int) -> PaddedPairs:
    """The sequences of a packed pass whose pairs all have both sides, with the same masks and labels.

    All have the length of an image sequence; a caption's is [mmu, soi, image, eoi, sot, question, caption, pads].
    """
    tree, num_pairs = batch.tree, len(batch.visits)
    shape = (2, 2 * num_pairs, num_text_tokens + layout.num_image_tokens + 3)
    ids, labels = (torch.full(shape, value, device=tree.token_ids.device) for value in (layout.pad, IGNORED))
    for first, name in ((0, "generation"), (num_pairs, "understanding")):
        side = batch.sides[name]
        for segment in range(2 * num_pairs):
            at, chosen = (segment % 2, first + segment // 2), side.segment == segment
            rows = side.rows[chosen]
            sequence = sequence_to(tree, int(rows[-1]))
            start = shape[2] - len(sequence) if name == "generation" else 0
            ids[at][start : start + len(sequence)] = sequence
            labels[at][start + tree.position_ids[rows]] = side.targets[chosen]
    return PaddedPairs(ids, labels)


def sequence_to(tree: SpanTree, row: int) -> Tensor:
    """Token ids of the span that holds a packed row, after those of its ancestors."""
    span, parts = int(np.searchsorted(tree.packed_starts, row, side="right")) - 1, []
    while span >= 0:
        parts.insert(0, tree.token_ids[tree.span_rows(span)])
        span = int(tree.parents[span])
    return torch.cat(parts)


def train_step(
    transformer: Transformer, reference: Transformer, layout: TokenLayout, pairs: PaddedPairs, beta: float
) -> Tensor:
    """Loss of one step of Pair-DPO, 0-dim; the transformer's weights receive the gradient.

    Four passes: policy and reference, each over the wins and over the loses. The published code sums a batch before the
    sigmoid, which is a mistake (the method compares pair by pair); here it is as the method says.
    """
    return dpo_step(partial(_label_logprobs, layout=layout, pairs=pairs), transformer, reference, beta)


def dpo_step(
    logprobs: Callable[[Transformer, int], Tensor], transformer: Transformer, reference: Transformer, beta: float
) -> Tensor:
    """Loss of one step, 0-dim, with its gradient; logprobs of a model and a role (win 0, lose 1) are [2 P, L]."""
    policy = torch.stack([logprobs(transformer, role) for role in (0, 1)], dim=1)
    with torch.no_grad():
        before = torch.stack([logprobs(reference, role) for role in (0, 1)], dim=1)
    losses, _, _ = naive.pair_dpo(policy, before, beta)
    loss = losses.view(2, -1).mean(dim=1).sum()
    loss.backward()
    return loss.detach()


def _label_logprobs(transformer: Transformer, role: int, layout: TokenLayout, pairs: PaddedPairs) -> Tensor:
    """Log-probability of each label [2 P, L], 0 where there is none, by logits at all positions."""
    ids, labels = pairs.ids[role], pairs.labels[role]
    images, captions = ids.chunk(2)
    mask = torch.cat([image_mask(layout, images), question_mask(layout, captions).expand(len(captions), -1, -1, -1)])
    logits = all_logits(transformer, ids, mask)
    logprob = naive.token_logprob(logits.flatten(0, 1), labels.flatten().clamp(min=0)).view_as(labels)
    return logprob * (labels != IGNORED)
