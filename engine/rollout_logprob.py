"""The law by which masked images are drawn, as a differentiable log-probability.

At each step the decoder draws every masked code from softmax(head(lerp(unguided, guided, 1 + g)) / temperature). The
state of a step is the image with the codes that were kept before it; all states of an image follow from its codes and
the steps at which they were kept. They lie in one span tree, so that one pass gives all their hidden states:

    prompt -> states of its images        empty prompt -> the same states, where there is guidance

States that are equal under one prompt, such as the first of all its images, are one span.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.token_layout import Layout
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import SpanForest


class DrawnCodes(NamedTuple):
    """Codes that rows of a tree predict, T in all.

    guided, unguided: int64 [T], packed rows of the tree, or of the unguided half's own; unguided is empty without
        guidance.
    targets: int64 [T], the codes.
    owners: int64 [T], of which image each is, by the order in which they were added.
    positions: int64 [T], where in its image it stands.
    steps: int64 [T], the step that drew it.
    """

    guided: Tensor
    unguided: Tensor
    targets: Tensor
    owners: Tensor
    positions: Tensor
    steps: Tensor


class RolloutStates:
    """Gathers the states of images in a forest, and the codes that were drawn in them."""

    def __init__(
        self,
        layout: Layout,
        params: ImageSamplingParams,
        forest: SpanForest,
        unguided_forest: SpanForest | None = None,
    ) -> None:
        """
        Args:
            layout: of the model.
            params: with which the images were drawn.
            forest: receives the spans; it may hold others.
            unguided_forest: receives those of the unguided half, so that its pass can be without a gradient; None: they
                are in the same forest.
        Raises: ValueError on a temperature of 0: argmax leaves nothing to chance.
        """
        if not params.temperature:
            raise ValueError("RolloutStates: expected a temperature above 0, got 0; draw with another temperature")
        self.layout, self.params = layout, params
        self.guided = _States(layout, forest)
        self.unguided = self.guided if unguided_forest is None else _States(layout, unguided_forest)
        self._num_images = 0
        self._found: list[tuple[np.ndarray, ...]] = []

    def add(
        self,
        prompt_ids: Sequence[int],
        codes: np.ndarray,
        kept_at: np.ndarray,
        *,
        drawn: np.ndarray | None = None,
        steps: Collection[int] | None = None,
    ) -> None:
        """Adds an image.

        Args:
            prompt_ids: plain text ids.
            codes, kept_at: int64 [N], see ImageRollout.
            drawn: int32 [num_steps, N], likewise: codes that were masked again are predicted too; None leaves them out.
            steps: the steps whose states are added; None: all.
        """
        image = np.array(self.layout.image(codes.tolist()))
        places = self.layout.code_positions
        for step in np.unique(kept_at[kept_at >= 0]).tolist() if steps is None else sorted(steps):
            targets = codes if drawn is None else drawn[step]
            chosen = np.flatnonzero(kept_at == step if drawn is None else targets >= 0)
            if not len(chosen):
                continue
            state = image.copy()
            state[places[kept_at >= step]] = self.layout.mask_id
            rows = [self.guided.row_of(prompt_ids, state) + places[chosen], chosen[:0]]
            if self.params.guidance_scale:
                rows[1] = self.unguided.row_of((), state) + places[chosen]
            owner, number = np.full(len(chosen), self._num_images), np.full(len(chosen), step)
            self._found.append((*rows, targets[chosen], owner, chosen, number))
        self._num_images += 1

    def drawn(self, device: torch.device | str | None = None) -> DrawnCodes:
        """What the rows of the finished tree predict."""
        columns = zip(*self._found, strict=True) if self._found else [[np.zeros(0)]] * len(DrawnCodes._fields)
        return DrawnCodes(*(torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for parts in columns))


class _States:
    """Spans of states under their prompts, each once."""

    def __init__(self, layout: Layout, forest: SpanForest) -> None:
        self.layout, self.forest = layout, forest
        self._roots: dict[tuple[int, ...], int] = {}
        self._first_rows: dict[tuple[int, bytes], int] = {}

    def add_prompt(self, prompt_ids: Sequence[int]) -> int:
        """The span of a prompt's condition."""
        prompt = tuple(prompt_ids)
        if prompt not in self._roots:
            self._roots[prompt] = self.forest.add(self.layout.text_prompt(prompt), -1, "causal")
        return self._roots[prompt]

    def row_of(self, prompt_ids: Sequence[int], state: np.ndarray) -> int:
        """The packed row of a state's first token."""
        root = self.add_prompt(prompt_ids)
        key = root, state.tobytes()
        if key not in self._first_rows:
            self._first_rows[key] = self.forest.packed
            self.forest.add(state, root, self.layout.image_mode)
        return self._first_rows[key]


def code_logprobs(
    head: nn.Module,
    layout: Layout,
    params: ImageSamplingParams,
    guided: Tensor,
    unguided: Tensor,
    codes: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of codes by the guided, tempered law of the decoder.

    Args:
        head: of the transformer.
        layout: of the model.
        params: with which the codes were drawn.
        guided, unguided: hidden states [T, D] of their rows; unguided is not read without guidance.
        codes: int64 [T].
        backend: of linear_logprob.
    Returns: fp32 [T]; differentiable.
    """
    weight, bias = layout.code_ids.rows(head)
    hidden = torch.lerp(unguided, guided, 1 + params.guidance_scale) if params.guidance_scale else guided
    if params.temperature != 1:
        hidden, bias = hidden / params.temperature, None if bias is None else bias / params.temperature
    return linear_logprob(hidden, weight, codes, bias=bias, backend=backend)
