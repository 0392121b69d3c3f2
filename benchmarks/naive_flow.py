"""BAGEL as its published code runs it, in eager torch: what the engine is compared with.

    images     one at a time, its prompt prefilled for it; the guided and the unguided half in calls of their own, whose
               layers put the kept keys and values and the new ones into new tensors
    answers    one question at a time, its image seen and prefilled for it; then a call a token
    training   win and lose in sequences of their own, of the policy and of the reference, with logits at all positions
               of a text; there is no published code of preferences, so this is Diffusion-DPO on such sequences

Each expert's rows are gathered before its layers and put back behind them. The weights are those of our Transformer;
the arithmetic is written out here. Source: modeling/bagel and inferencer.py of BAGEL (arXiv 2505.14683).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.benchmarks.naive_model import feed_forward
from hermesflow.engine.decoders.flow import FlowSamplingParams
from hermesflow.engine.flow_schedule import flow_times
from hermesflow.engine.latents import LatentTransformer
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Block, rotary_table, rotate


class Context:
    """A sequence: keys and values [L, H, head_dim] of each layer, and the position of what comes next."""

    def __init__(self, transformer: LatentTransformer) -> None:
        self.transformer, self.position = transformer, 0
        self._kept: list[tuple[Tensor, Tensor] | None] = [None] * len(transformer.blocks)

    def text(self, ids: Sequence[int]) -> Tensor:
        """Hidden states [n, D] of causal text, which is kept."""
        x = self.transformer.embed(torch.tensor(ids, device=self.transformer.embed.weight.device))
        positions = self.position + torch.arange(len(ids), device=x.device)
        self.position += len(ids)
        return self._feed(x, positions, (), is_causal=True, keeps=True)

    def image(self, layout: Layout, features: Tensor) -> Tensor:
        """Likewise of an image that is seen: full, at one position."""
        return self._image(layout, features, (), keeps=True)

    def latents(self, layout: Layout, embeds: Tensor) -> Tensor:
        """Likewise of an image that is drawn, which is not kept; of its latents alone."""
        rows = torch.arange(1, 1 + len(embeds), device=embeds.device)
        return self._image(layout, embeds, rows, keeps=False)[1:-1]

    def _image(self, layout: Layout, embeds: Tensor, latent_rows: Tensor | tuple, keeps: bool) -> Tensor:
        around = self.transformer.embed(torch.tensor([*layout.before_image, *layout.after_image], device=embeds.device))
        x = torch.cat([around[:1], embeds, around[1:]])
        positions = torch.full((len(x),), self.position, device=x.device)
        self.position += keeps
        return self._feed(x, positions, latent_rows, is_causal=False, keeps=keeps)

    def _feed(self, x: Tensor, positions: Tensor, latent_rows: Tensor | tuple, is_causal: bool, keeps: bool) -> Tensor:
        model, config = self.transformer, self.transformer.config
        rotary = rotary_table(positions, config.rotary_dim, config.rope_theta)
        parts = _parts(len(x), latent_rows, x.device)
        mask = None
        if is_causal:
            before = 0 if self._kept[0] is None else len(self._kept[0][0])
            mask = torch.ones(len(x), before + len(x), dtype=torch.bool, device=x.device).tril(before)
        for layer, block in enumerate(model.blocks):
            q, k, v = _by_rows(lambda part, x, *rotary: _qkv(part, x, rotary), block, parts, x, *rotary)
            if self._kept[layer] is not None:
                k, v = (torch.cat(pair) for pair in zip(self._kept[layer], (k, v), strict=True))
            if keeps:
                self._kept[layer] = k, v
            groups = config.num_heads // config.num_kv_heads
            k, v = (part.repeat_interleave(groups, dim=1) for part in (k, v))
            attended = F.scaled_dot_product_attention(*(part.transpose(0, 1) for part in (q, k, v)), attn_mask=mask)
            (x,) = _by_rows(_after, block, parts, x, attended.transpose(0, 1))
        (x,) = _by_rows(lambda norm, part: (norm(part),), model.norm, parts, x, second=model.latent_norm)
        return x


def _parts(length: int, latent_rows: Tensor | tuple, device: torch.device) -> list[Tensor]:
    """Rows of the text's expert and of the latents'; empty ones are left out."""
    is_latent = torch.zeros(length, dtype=torch.bool, device=device)
    if len(latent_rows):
        is_latent[latent_rows] = True
    return [(~is_latent).nonzero()[:, 0], is_latent.nonzero()[:, 0]]


def _by_rows(
    half: Callable, block: torch.nn.Module, parts: list[Tensor], *values: Tensor, second: torch.nn.Module | None = None
) -> list[Tensor]:
    experts = (block, second or block.latent)
    found = [
        half(expert, *(value[rows] for value in values))
        for expert, rows in zip(experts, parts, strict=True)
        if len(rows)
    ]
    order = torch.cat([rows for rows in parts if len(rows)])
    joined = [torch.cat(each) for each in zip(*found, strict=True)]
    return [each.new_empty(each.shape).index_copy(0, order, each) for each in joined]


def _qkv(block: Block, x: Tensor, rotary: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    attention, config = block.attention, block.attention.config
    heads = F.linear(block.attention_norm(x), attention.qkv.weight, attention.qkv.bias)
    q, k, v = heads.view(len(x), -1, config.head_dim).split(
        [config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1
    )
    return rotate(attention.q_norm(q), rotary), rotate(attention.k_norm(k), rotary), v


def _after(block: Block, x: Tensor, attended: Tensor) -> tuple[Tensor]:
    out = block.attention.out
    x = x + F.linear(attended.flatten(1), out.weight, out.bias)
    return (x + feed_forward(block, block.mlp_norm(x)),)


@torch.inference_mode()
def draw_image(
    transformer: LatentTransformer, layout: Layout, prompt: Sequence[int], noise: Tensor, params: FlowSamplingParams
) -> Tensor:
    """Latents fp32 [N, C] of one image, from noise [N, C]."""
    times = flow_times(params.num_steps, params.shift)
    guided, unguided = Context(transformer), Context(transformer)
    guided.text(layout.text_prompt(prompt))
    x, places = noise, transformer.places_of(layout.image_grid)
    for time, following in zip(times, times[1:], strict=False):
        v = velocity(guided, layout, x, time, places)
        if params.guides(time):
            u = velocity(unguided, layout, x, time, places)
            both = u + (1 + params.guidance_scale) * (v - u)
            if params.renorm == "image":
                both = both * (v.norm() / (both.norm() + 1e-8)).clamp(params.renorm_least, 1.0)
            v = both
        x = x - v * (time - following)
    return x


def velocity(context: Context, layout: Layout, x: Tensor, time: float, places: Tensor) -> Tensor:
    """fp32 [N, C] of latents noised to a time, behind a context."""
    now = torch.full((len(x),), time, device=x.device)
    hidden = context.latents(layout, context.transformer.latent_embeds(x, now, places))
    return context.transformer.velocities(hidden)


@torch.inference_mode()
def answer_question(
    transformer: LatentTransformer, layout: Layout, see: Callable[[], Tensor], question: Sequence[int], num_tokens: int
) -> list[int]:
    """Greedy token ids of an answer of so many tokens; see gives the image's features [F, D], anew each time."""
    context = Context(transformer)
    context.image(layout, see())
    hidden, answer = context.text(layout.question(question)), []
    while len(answer) < num_tokens:
        logits = F.linear(hidden[-1], transformer.head.weight)
        answer.append(int(logits.argmax()))
        if answer[-1] == layout.eot:
            return answer[:-1]
        hidden = context.text(answer[-1:])
    return answer


def image_logprob(
    transformer: LatentTransformer, layout: Layout, prompt: Sequence[int], noised: Tensor, time: float, target: Tensor
) -> Tensor:
    """-1/2 of the mean square error of an image's velocities, 0-dim, behind its own prompt."""
    context = Context(transformer)
    context.text(prompt)
    found = velocity(context, layout, noised, time, transformer.places_of(layout.image_grid))
    return -(found - target).square().mean() / 2


def caption_logprob(
    transformer: LatentTransformer, layout: Layout, features: Tensor, question: Sequence[int], caption: Sequence[int]
) -> Tensor:
    """Sum of a caption's log-probabilities and its end's, 0-dim, behind its own image and question."""
    context = Context(transformer)
    context.image(layout, features)
    hidden = context.text([*question, *caption])
    logits = F.linear(hidden, transformer.head.weight).log_softmax(-1)
    targets = torch.tensor([*caption, layout.eot], device=hidden.device)
    return logits[len(question) - 1 :].gather(1, targets[:, None]).sum()
