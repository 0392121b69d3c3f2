"""Arithmetic and memory traffic that the exact algorithms need, pass by pass, whoever runs them.

A pass is one run of the transformer and its head over packed tokens. With D the hidden size, M layers, H heads of
width d, V the ids that may be drawn:

    FLOPs   2 * weights of the layers for each new token
            + 4 * M * H * d for each new token and each token that it sees (q k^T and p v)
            + 2 * D * V for each row of the head that is needed
    bytes   weights of the layers and of the needed head once a pass, keys and values of what was cached read once,
            those of new tokens written once; activations count as nothing

What the exact algorithms share is counted once: prompts and the empty prompt, an image by its questions, a question by
its answers, at step 0 the image span of a prompt's candidates, and one head for both halves of guidance.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hermesflow.engine.mask_schedule import num_to_mask
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.kernels.matmul import logits_of
from hermesflow.kernels.span_tree import SpanTree

Spans = tuple[int, int, int, bool]
"""(how many, tokens of each, tokens before it that it sees, whether it is causal)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a pass needs at least."""

    num_flops: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """The passes of each task for one model."""

    config: TransformerConfig
    layout: Layout
    dtype: torch.dtype

    def images(self, num_prompts: int, num_images: int, num_steps: int, prompt_len: int) -> list[Work]:
        """Guided images by the cosine schedule, num_images of each prompt of prompt_len plain ids."""
        num_tokens, empty = self.layout.num_image_tokens, len(self.layout.text_prompt([]))
        prompt, span = empty + prompt_len, self.layout.image_length
        drawn, codes = num_prompts * num_images, self.layout.codebook_size
        prefill = [(num_prompts, prompt, 0, True), (1, empty, 0, True)]
        first = [(num_prompts, span, prompt, False), (1, span, empty, False)]
        passes = [self.one_pass([*prefill, *first], 0, num_prompts * num_tokens, codes)]
        step, cached = [(drawn, span, prompt, False), (drawn, span, empty, False)], num_prompts * prompt + empty
        counts = num_to_mask(num_tokens, num_steps)[:-1]
        return passes + [self.one_pass(step, cached, drawn * num_unknown, codes) for num_unknown in counts]

    def images_by_code(self, num_images: int, prompt_len: int) -> list[Work]:
        """Guided images of one prompt of prompt_len plain ids, drawn code by code. Of the head its last layer counts,
        once for both halves, and ids between rows of codes are computed with the code before them."""
        layout, text = self.layout, [0] * prompt_len
        prompts = [
            len(ids) + len(layout.before_image) for ids in (layout.text_prompt(text), layout.unguided_prompt(text))
        ]
        passes, drawn = [self.one_pass([(1, length, 0, True) for length in prompts], 0, 1, layout.codebook_size)], 0
        for number in range(1, layout.num_image_tokens):
            width = 1 + (len(layout.row_end) if number % layout.image_grid[1] == 0 else 0)
            spans = [(num_images, width, length + drawn, True) for length in prompts]
            cached = sum(prompts) + len(prompts) * num_images * drawn
            passes.append(self.one_pass(spans, cached, num_images, layout.codebook_size))
            drawn += width
        return passes

    def answers(
        self, num_images: int, num_questions: int, question_len: int, num_samples: int, num_tokens: int
    ) -> list[Work]:
        """num_samples answers of num_tokens to each of num_questions about each image: captions too."""
        asked, image, question = num_images * num_questions, self._image_prefix, self._question(question_len)
        passes = [self.one_pass(self._questions(num_images, asked, question), 0, asked, len(self.layout.text_ids))]
        rows, prefix = asked * num_samples, num_images * image + asked * question
        for step in range(num_tokens - 1):
            spans = [(rows, 1, image + question + step, True)]
            passes.append(self.one_pass(spans, prefix + rows * step, rows, len(self.layout.text_ids)))
        return passes

    def choices(
        self, num_images: int, num_questions: int, question_len: int, num_choices: int, choice_len: int
    ) -> list[Work]:
        """The log-probability of num_choices answers to each question, and of the eot after each, in one pass."""
        asked, question = num_images * num_questions, self._question(question_len)
        seen = self._image_prefix + question
        spans = [*self._questions(num_images, asked, question), (asked * num_choices, choice_len, seen, True)]
        return [self.one_pass(spans, 0, asked * (1 + num_choices * choice_len), len(self.layout.text_ids))]

    def tree(self, tree: SpanTree, head_rows: int, head_size: int | None = None) -> Work:
        """One forward pass over a tree of new spans, or of full roots that are new in part (SpanTree.only).

        The head runs on head_rows rows, for head_size ids; None: for the whole vocabulary.

        What follows the last layer's attention is needed for those rows alone too.
        """
        before = tree.first_positions() + tree.lengths - tree.num_new
        columns = (tree.num_new.tolist(), before.tolist(), tree.causal.tolist())
        spans = [(1, *span) for span in zip(*columns, strict=True)]
        work = self.one_pass(spans, 0, head_rows, head_size or self.config.vocab_size)
        saved = 2 * self._weights_after_attention() * (len(tree.token_ids) - head_rows)
        return Work(num_flops=work.num_flops - saved, num_bytes=work.num_bytes)

    def one_pass(self, spans: list[Spans], num_cached: int, head_rows: int, head_size: int) -> Work:
        """New spans after num_cached cached tokens; the head on head_rows rows, for head_size ids."""
        config = self.config
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        qkv = config.hidden_size * (width + 2 * kv_width)
        layers = config.num_layers * (qkv + self._weights_after_attention())
        head = config.hidden_size * head_size
        num_new = sum(count * length for count, length, _, _ in spans)
        num_seen = sum(
            count * length * (before + ((length + 1) / 2 if causal else length))
            for count, length, before, causal in spans
        )
        attention = 4 * config.num_layers * width * num_seen
        cached = 2 * config.num_layers * kv_width * (num_cached + num_new)
        return Work(
            num_flops=round(2 * layers * num_new + attention + 2 * head * head_rows),
            num_bytes=(layers + head + cached) * self.dtype.itemsize,
        )

    def _weights_after_attention(self) -> int:
        """Of one layer: its output projection and its MLP."""
        config = self.config
        out = config.hidden_size * config.num_heads * config.head_dim
        return out + config.hidden_size * config.mlp_size * (3 if config.gated else 2)

    def _questions(self, num_images: int, asked: int, question: int) -> list[Spans]:
        image = self._image_prefix
        return [(num_images, image, 0, self.layout.prefix_mode == "causal"), (asked, question, image, True)]

    @property
    def _image_prefix(self) -> int:
        """Tokens of an image that is asked about."""
        return len(self.layout.image_prefix([0] * self.layout.num_image_tokens))

    def _question(self, question_len: int) -> int:
        """Tokens of a question of question_len plain ids."""
        return len(self.layout.question([])) + question_len


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square matmul, the best of six, measured at the first call for a device and dtype."""
    size = 8192 if device.type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # a measurement leaves the caller's random numbers alone
    a, b = (torch.randn(size, size, device=device, generator=generator).to(dtype) for _ in range(2))
    out = torch.empty(size, size, device=device, dtype=dtype)
    calls = [lambda: torch.mm(a, b, out=out)]
    if device.type == "cpu" and dtype == torch.float32:
        # Which of torch's matmuls is the faster one depends on the processor (kernels/matmul.py).
        calls.append(lambda: logits_of(a, b))
    return 2 * size**3 / min(_seconds(call, device) for call in calls for _ in range(6))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of one call; what was queued before it is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
