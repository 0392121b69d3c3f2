"""Families that draw code by code as their published code runs them, in eager torch: what the engine is compared with.

    Janus       a call of two rows an image for each token, the image head on both, the code's embedding fed back
    Emu3        two calls of one row for each token, image by image; head and log-softmax over the joint vocabulary
    Chameleon   a call of three rows an image for each token, of which two are the same without an image in the prompt;
                head over the joint vocabulary

Keys and values lie in dense tensors [B, H, L, head_dim], which grow by concatenation as transformers' cache does. Every
row computes and stores its own prompt. Captions and answers are sequences of their own, each with its image. Training:
win and lose in padded sequences of their own, of the policy and of the reference, with logits at all positions.

The weights are those of our Transformer; the arithmetic is written out here, so that it stays what it is.
Sources: generation_inference.py and inference.py of Janus, image_generation.py of Emu3 with generate of transformers,
text2image.py of Anole with the inference code of Chameleon.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import naive
from hermesflow.benchmarks.naive_model import dpo_step, feed_forward, sequence_to
from hermesflow.benchmarks.published_inputs import IGNORED
from hermesflow.engine.decoders.autoregressive import CodeSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import Ids, Layout
from hermesflow.engine.transformer import Block, Transformer, rotary_table, rotate

IMAGE_SCALE = 1.2
"""Chameleon's weight of the images in a prompt."""
Cache = list[tuple[Tensor, Tensor]]
"""Keys and values of each layer, [B, H, L, head_dim] each; empty before the first call."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How the published code of a family draws."""

    prompts: Callable[[Layout, Sequence[int]], list[list[int]]]
    """What the rows of an image begin with."""
    guide: Callable[[Sequence[Tensor], float], Tensor]
    """Logits [n, V] of each of those rows, and the published scale -> guided logits [n, V]."""
    one_call: bool = True
    """All rows of all images in a call; else a call a row, image by image."""
    own_head: bool = False
    """Codes have a table and a head of their own."""


def two_prompts(layout: Layout, prompt: Sequence[int]) -> list[list[int]]:
    """The prompt and what stands for it in the unconditional row."""
    return [[*ids, *layout.before_image] for ids in (layout.text_prompt(prompt), layout.unguided_prompt(prompt))]


def three_prompts(layout: Layout, prompt: Sequence[int]) -> list[list[int]]:
    """The prompt, its images alone, of which there are none, and nothing."""
    full, nothing = two_prompts(layout, prompt)
    return [full, nothing, nothing]


def guide_logits(rows: Sequence[Tensor], scale: float) -> Tensor:
    """Of conditional and unconditional logits."""
    cond, uncond = rows
    return uncond + scale * (cond - uncond)


def guide_logprobs(rows: Sequence[Tensor], scale: float) -> Tensor:
    """Of their log-softmax."""
    return guide_logits([row.log_softmax(dim=-1) for row in rows], scale)


def guide_three_ways(rows: Sequence[Tensor], scale: float) -> Tensor:
    """Of the whole prompt, its images and nothing."""
    full, images, nothing = rows
    return nothing + IMAGE_SCALE * (images - nothing) + scale * (full - images)


WAYS = {
    "janus": Way(prompts=two_prompts, guide=guide_logits, own_head=True),
    "emu3": Way(prompts=two_prompts, guide=guide_logprobs, one_call=False),
    "chameleon": Way(prompts=three_prompts, guide=guide_three_ways),
}


@torch.inference_mode()
def draw_images(
    transformer: Transformer,
    layout: Layout,
    way: Way,
    prompt: Sequence[int],
    num_images: int,
    params: CodeSamplingParams,
) -> Tensor:
    """Draw images of one prompt.

    Args:
        transformer, layout: the model.
        way: the family's.
        prompt: plain text ids.
        num_images: n.
        params: how to draw; temperature 0 takes the likeliest codes.
    Returns: codes int64 [n, num_image_tokens]; random draws are torch's own. What follows the last code is left out.
    """
    if not way.one_call and num_images > 1:
        images = [draw_images(transformer, layout, way, prompt, 1, params) for _ in range(num_images)]
        return torch.cat(images)
    prompts = way.prompts(layout, prompt)
    rows = [ids for ids in prompts for _ in range(num_images)]
    calls = [Rows(transformer, of_call) for of_call in ([rows] if way.one_call else [[ids] for ids in rows])]
    codes = _is_among(layout.code_ids, layout, transformer)
    drawn: list[Tensor] = []
    for forced in _forced_ids(layout):
        if drawn:
            for call in calls:
                call.feed(drawn[-1].repeat(len(call.last) // num_images)[:, None])
        hidden = torch.cat([call.last for call in calls])
        logits = (_code_logits if way.own_head else _joint_logits)(transformer, layout, hidden)
        guided = way.guide(logits.float().chunk(len(prompts)), 1 + params.guidance_scale)
        if way.own_head:
            drawn.append(layout.code_ids.of(_sample(guided, params)))
        else:
            allowed = codes if forced is None else torch.arange(len(codes), device=codes.device) == forced
            drawn.append(_sample(guided.masked_fill(~allowed, float("-inf")), params))
    is_code = torch.tensor([forced is None for forced in _forced_ids(layout)], device=hidden.device)
    return layout.code_ids.numbers(torch.stack(drawn, dim=1)[:, is_code])


def _forced_ids(layout: Layout) -> list[int | None]:
    """Of each place from an image's first code to its last: None for a code, else the id that stands there."""
    rows, columns = layout.image_grid
    return ([None] * columns + list(layout.row_end)) * (rows - 1) + [None] * columns


def _is_among(ids: Ids, layout: Layout, transformer: Transformer) -> Tensor:
    """Of each id of the joint vocabulary, bool [V]."""
    device = transformer.embed.weight.device
    allowed = torch.zeros(layout.vocab_size, dtype=torch.bool, device=device)
    allowed[ids.of(torch.arange(len(ids), device=device))] = True
    return allowed


def _code_logits(transformer: Transformer, layout: Layout, hidden: Tensor) -> Tensor:
    """By the image codes' own head."""
    inner = F.gelu(F.linear(hidden, transformer.code_hidden.weight, transformer.code_hidden.bias))
    return F.linear(inner, transformer.code_out.weight, transformer.code_out.bias)


def _joint_logits(transformer: Transformer, layout: Layout, hidden: Tensor) -> Tensor:
    return F.linear(hidden, transformer.head.weight, transformer.head.bias)


def _sample(logits: Tensor, params: CodeSamplingParams | SamplingParams) -> Tensor:
    """A token of each row [n]; filters in the published order: temperature, top_k, top_p."""
    if params.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / params.temperature
    if params.top_k:
        least = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(dim=-1)
    if params.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True)
        ordered[ordered.cumsum(dim=-1) - ordered > params.top_p] = 0.0
        probs = torch.zeros_like(probs).scatter_(1, order, ordered)
    return torch.multinomial(probs, 1)[:, 0]


class Rows:
    """Sequences of a call that grow by a token, padded on the left: their cache, and hidden states of the last one."""

    def __init__(self, transformer: Transformer, rows: Sequence[Sequence[int]], seen: Seen | None = None) -> None:
        """
        Args:
            transformer: the model.
            rows: ids of each sequence.
            seen: features in a single row.
        """
        self.transformer, self.cache, self.length = transformer, [], 0
        device, longest = transformer.embed.weight.device, max(map(len, rows))
        pads = [longest - len(ids) for ids in rows]
        self._pads = torch.tensor(pads, device=device)[:, None] if any(pads) else None
        ids = [[0] * count + list(row) for count, row in zip(pads, rows, strict=True)]
        self.feed(torch.tensor(ids, device=device), seen)

    def feed(self, ids: Tensor, seen: Seen | None = None) -> None:
        """Appends ids [B, L]; last is then [B, D]."""
        end = self.length + ids.shape[1]
        at = torch.arange(self.length, end, device=ids.device).expand(ids.shape)
        mask = None
        if self._pads is not None:
            keys = torch.arange(end, device=ids.device)
            # A pad sees itself, for a softmax over nothing is NaN; what it computes is seen by nobody.
            mask = (keys <= at[..., None]) & ((keys >= self._pads[..., None]) | (keys == at[..., None]))
            at, mask = (at - self._pads).clamp(min=0), mask[:, None]
        x = embedded(self.transformer, ids, seen)
        self.last = hidden_states(self.transformer, x, at, mask, self.cache)[:, -1]
        self.length = end


Seen = tuple[int, Tensor]
"""(place of the first feature, features [B, F, D]) of the images that sequences ask about."""


def embedded(transformer: Transformer, ids: Tensor, seen: Seen | None = None) -> Tensor:
    """[B, L, D] of ids [B, L]; features stand in place of what the ids there give."""
    table = transformer.embed.weight
    if len(table) == transformer.config.vocab_size:
        return F.embedding(ids, table)
    is_code = ids >= len(table)
    code_table, inner, _, outer = transformer.code_embed
    codes = F.embedding((ids - len(table)).clamp(min=0), code_table.weight)
    codes = F.linear(F.gelu(F.linear(codes, inner.weight, inner.bias)), outer.weight, outer.bias)
    x = torch.where(is_code[..., None], codes, F.embedding(ids.masked_fill(is_code, 0), table))
    if seen is None:
        return x
    first, features = seen
    return torch.cat([x[:, :first], features.to(x), x[:, first + features.shape[1] :]], dim=1)


def hidden_states(
    transformer: Transformer, x: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache | None = None
) -> Tensor:
    """Hidden states [B, L, D] after the final norm.

    Args:
        transformer: a model of sequential blocks.
        x: embedded tokens [B, L, D].
        positions: int64 [B, L].
        mask: bool [B, 1, L, Lk] of what each sees; None: of what is there all that is not after it.
        cache: what was computed before, to which keys and values are added; None keeps nothing.
    """
    config = transformer.config
    table = rotary_table(positions.flatten(), config.rotary_dim, config.rope_theta)
    rotary = tuple(part.unflatten(0, positions.shape) for part in table)
    is_first, cache = not cache, [] if cache is None else cache
    for layer, block in enumerate(transformer.blocks):
        q, k, v = _heads(block, block.attention_norm(x), rotary)
        if is_first:
            cache.append((k, v))
        else:
            cache[layer] = k, v = tuple(torch.cat(both, dim=2) for both in zip(cache[layer], (k, v), strict=True))
        k, v = (part.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1) for part in (k, v))
        is_causal = mask is None and is_first
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        out = block.attention.out
        x = x + F.linear(attended.transpose(1, 2).flatten(2), out.weight, out.bias)
        x = x + feed_forward(block, block.mlp_norm(x))
    return transformer.norm(x)


def _heads(block: Block, x: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [B, H, L, head_dim], keys and values [B, Hkv, L, head_dim] of normed x [B, L, D]."""
    attention, config = block.attention, block.attention.config
    heads = F.linear(x, attention.qkv.weight, attention.qkv.bias).unflatten(-1, (-1, config.head_dim))
    q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=2)
    q, k = rotate(attention.q_norm(q), rotary).to(v.dtype), rotate(attention.k_norm(k), rotary).to(v.dtype)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


@torch.inference_mode()
def answer_question(
    transformer: Transformer, layout: Layout, image: Tensor, question: Sequence[int], params: SamplingParams
) -> list[int]:
    """Token ids of one answer without eot: image and question in one call, then a call a token.

    Args:
        transformer, layout: the model.
        image: codes int64 [num_image_tokens], or features [F, D].
        question: plain text ids.
        params: temperature (0: the likeliest token), top_k, top_p and max_new_tokens. Text is drawn from text ids
            alone, of the logits of all ids.
    """
    if image.is_floating_point():
        prefix, first = layout.feature_prefix(len(image))
        rows = Rows(transformer, [[*prefix, *layout.feature_question(question)]], (first, image[None]))
    else:
        rows = Rows(transformer, [[*layout.image_prefix(image.tolist()), *layout.question(question)]])
    is_text, answer = _is_among(layout.text_ids, layout, transformer), []
    while len(answer) < params.max_new_tokens:
        if answer:
            rows.feed(torch.tensor([answer[-1:]], device=is_text.device))
        logits = _joint_logits(transformer, layout, rows.last).float()
        token = _sample(logits.masked_fill(~is_text[: logits.shape[1]], float("-inf")), params).item()
        if token == layout.eot:
            break
        answer.append(token)
    return answer


@dataclass(frozen=True)
class PaddedPairs:
    """Pairs as sequences padded on the right, of each role (win, lose) P image sequences and then P caption sequences.

    ids, labels: int64 [2, 2 P, L]; the label of a position is the id after it if that is scored, else IGNORED.
    seen: features of the images that captions are of, where they are not codes.
    """

    ids: Tensor
    labels: Tensor
    seen: Seen | None


def pad_pairs(layout: Layout, batch: PairBatch) -> PaddedPairs:
    """The sequences of a packed pass whose pairs all have both sides, with the same labels."""
    tree, num_pairs, found = batch.tree, len(batch.visits), {}
    for first, name in ((0, "generation"), (num_pairs, "understanding")):
        side = batch.sides[name]
        for segment in range(2 * num_pairs):
            chosen = side.segment == segment
            rows = side.rows[chosen]
            sequence = sequence_to(tree, int(rows[-1]))
            labels = torch.full_like(sequence, IGNORED)
            labels[tree.position_ids[rows]] = side.targets[chosen]
            found[segment % 2, first + segment // 2] = sequence, labels
    shape = (2, 2 * num_pairs, max(len(sequence) for sequence, _ in found.values()))
    ids, labels = (torch.full(shape, value, device=tree.token_ids.device) for value in (0, IGNORED))
    for at, (sequence, of_sequence) in found.items():
        ids[at][: len(sequence)], labels[at][: len(sequence)] = sequence, of_sequence
    if batch.embeds is None:
        return PaddedPairs(ids, labels, None)
    features = batch.embeds[1].unflatten(0, (num_pairs, -1))
    return PaddedPairs(ids, labels, (layout.feature_prefix(features.shape[1])[1], features))


def train_step(
    transformer: Transformer, reference: Transformer, layout: Layout, way: Way, pairs: PaddedPairs, beta: float
) -> Tensor:
    """Loss of one step of Pair-DPO, 0-dim, with its gradient; see naive_model.train_step."""
    return dpo_step(partial(_label_logprobs, layout=layout, way=way, pairs=pairs), transformer, reference, beta)


def _label_logprobs(transformer: Transformer, role: int, layout: Layout, way: Way, pairs: PaddedPairs) -> Tensor:
    """Log-probability of each label [2 P, L], 0 where there is none, by logits at all positions."""
    images, captions = pairs.ids[role].chunk(2)
    of_images, of_captions = pairs.labels[role].chunk(2)
    x = torch.cat([embedded(transformer, images), embedded(transformer, captions, pairs.seen)])
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
    drawing, speaking = hidden_states(transformer, x, positions, None).chunk(2)
    if way.own_head:
        logits = _code_logits(transformer, layout, drawing)
        of_images = torch.where(of_images == IGNORED, IGNORED, layout.code_ids.numbers(of_images))
    else:
        logits = _joint_logits(transformer, layout, drawing)
        if layout.codes_apart:
            is_code = _is_among(layout.code_ids, layout, transformer)
            logits = logits.masked_fill(~is_code, float("-inf"))
    parts = [(logits, of_images), (_joint_logits(transformer, layout, speaking), of_captions)]
    return torch.cat([_of_labels(*part) for part in parts])


def _of_labels(logits: Tensor, labels: Tensor) -> Tensor:
    logprob = naive.token_logprob(logits.flatten(0, 1), labels.flatten().clamp(min=0)).view_as(labels)
    return torch.where(labels == IGNORED, 0.0, logprob)
