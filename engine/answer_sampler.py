"""How answers are sampled: a step of all answers under way, on the device alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.kv_cache import KVCache
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Ids
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.kernels.token_sample import token_sample

CACHES = ("", "prefix", "dual")
GOES_ON, ENDED, FAILED = range(3)
"""What became of an answer; failed: the model gave no distribution (NaN)."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How one answer is sampled; kernels/token_sample.py explains the filters.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 filter nothing. An answer ends with eot, or at max_new_tokens.
    The last five are read by MaskedTextDecoder alone. num_steps: for all of max_new_tokens; block_length: tokens of a
    block; 0 takes the decoder's defaults. guidance_scale g: logits (1 + g) * conditional - g * unconditional, whose
    half has masks in place of all but the answer. threshold: above 0 a step keeps every token of at least this
    probability, at least one, and num_steps is not read. cache: "prefix" keeps the keys and values of what precedes a
    block from its first step to its last, "dual" of what follows it too; "" keeps none. threshold and cache are those
    of Fast-dLLM (arXiv 2505.22618) and approximate.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int = 32
    num_steps: int = 0
    block_length: int = 0
    guidance_scale: float = 0.0
    threshold: float = 0.0
    cache: str = ""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": (0, float("inf")), "top_k": (0, float("inf")), "top_p": (0, 1), "min_p": (0, 1),
            "max_new_tokens": (1, float("inf")), "num_steps": (0, float("inf")), "block_length": (0, float("inf")),
            "guidance_scale": (-1e6, 1e6), "threshold": (0, 1),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not low <= value <= high or value == float("inf"):
                raise ValueError(f"SamplingParams: expected a finite {name} in [{low}, {high}], got {value}")
        if not (self.temperature == 0 or 1e-6 <= self.temperature <= 1e6):
            raise ValueError(f"SamplingParams: expected temperature of 0 or 1e-6 to 1e6, got {self.temperature}")
        if self.cache not in CACHES:
            raise ValueError(f"SamplingParams: expected cache as one of {list(CACHES)}, got {self.cache!r:.80}")


class Answers(NamedTuple):
    """Answers under way, on the device; tokens [R, limit + 1] has a last column for what is drawn after the end.

    seed, limit, top_k, status, length: int64 [R]; temperature, top_p, min_p: fp32 [R]; tokens: int64.
    """

    seed: Tensor
    limit: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    status: Tensor
    length: Tensor
    tokens: Tensor

    @classmethod
    def new(cls, seeds: Tensor, sampling: Sequence[SamplingParams]) -> Answers:
        """Answers that have drawn nothing yet, one for each of seeds [Q, S]."""
        device, num_questions = seeds.device, len(seeds)

        def setting(name: str, dtype: torch.dtype) -> Tensor:
            values = [getattr(params, name) for params in sampling]
            return torch.tensor(values, dtype=dtype, device=device).repeat(num_questions)

        seed = seeds.flatten()
        longest = max(params.max_new_tokens for params in sampling)
        return cls(
            seed,
            setting("max_new_tokens", torch.int64),
            setting("temperature", torch.float32),
            setting("top_k", torch.int64),
            setting("top_p", torch.float32),
            setting("min_p", torch.float32),
            torch.full_like(seed, GOES_ON),
            torch.zeros_like(seed),
            seed.new_zeros(len(seed), longest + 1),
        )

    def select(self, rows: np.ndarray) -> Answers:
        """Copies of these rows."""
        index = torch.from_numpy(rows).to(self.seed.device)
        return Answers(*(values[index] for values in self))

    def join(self, other: Answers) -> Answers:
        """These rows, then the other ones."""
        return Answers(*map(torch.cat, zip(self, other, strict=True)))

    def last_token(self) -> Tensor:
        """[R], of rows that have drawn one."""
        return self.tokens.gather(1, self.length[:, None] - 1)[:, 0]


@dataclass(frozen=True)
class AnswerSampler:
    """The model's part of a step; it waits for nothing."""

    transformer: Transformer
    cache: KVCache
    head: tuple[Tensor, Tensor | None]
    eot: int
    backend: str | None
    project: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    """Of the head; one whose rows do not depend on their number, if an answer must be the same in any batch."""
    ids: Ids | None = None
    """Token ids of the head's rows; None: their numbers."""

    def advance(self, tree: SpanTree, rows: Answers) -> None:
        """Feeds the last token of each row and draws the next one. Ended rows repeat their last step."""
        tree = tree.with_tokens(rows.last_token(), rows.length)
        with phase("step"):
            hidden = self.transformer(tree, self.cache)
        with phase("head"):
            self.draw(self.logits(hidden), rows)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> [R, V] over the ids that may be drawn."""
        return self.project(hidden, *self.head)

    def draw(self, logits: Tensor, rows: Answers) -> None:
        """Writes a token a row, in place, where the row has not ended."""
        key = RandomKey(rows.seed, rows.length, torch.zeros_like(rows.length))
        token, _ = token_sample(
            logits,
            temperature=rows.temperature,
            top_k=rows.top_k,
            top_p=rows.top_p,
            min_p=rows.min_p,
            key=key,
            backend=self.backend,
        )
        goes_on, failed = rows.status == GOES_ON, token < 0
        token = token if self.ids is None else self.ids.of(token.clamp(min=0))
        is_end = ~failed & (token == self.eot)
        adds = goes_on & ~failed & ~is_end
        column = torch.where(adds, rows.length, rows.tokens.shape[1] - 1)
        rows.tokens.scatter_(1, column[:, None], token[:, None])
        rows.length.add_(adds)
        ends = is_end | (rows.length >= rows.limit)
        rows.status.masked_fill_(goes_on & ends, ENDED).masked_fill_(goes_on & failed, FAILED)
