"""The law by which images are drawn, as a differentiable log-probability.

At each step the decoder draws every masked code from softmax(head(lerp(unguided, guided, 1 + g)) / temperature). The
state of a step is the image with the codes that were kept before it; all states of an image follow from its codes and
the steps at which they were kept. They lie in one span tree, so that one pass gives all their hidden states:

    prompt -> states of its images        empty prompt -> the same states, where there is guidance

States that are equal under one prompt, such as the first of all its images, are one span. Where images are drawn code
by code, the image itself is all states at once, a causal span of which each row predicts the next code; top_k and top_p
are refused. In a bidirectional layout a state is a span of its own, with its prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
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
            params: with which the images were drawn, ImageSamplingParams or CodeSamplingParams.
            forest: receives the spans; it may hold others.
            unguided_forest: receives those of the unguided half, so that its pass can be without a gradient; None: they
                are in the same forest.
        Raises: ValueError on a temperature of 0: argmax leaves nothing to chance.
        """
        if not params.temperature:
            raise ValueError("RolloutStates: expected a temperature above 0, got 0; draw with another temperature")
        if getattr(params, "top_k", 0) or getattr(params, "top_p", 1) != 1:
            raise ValueError(
                f"RolloutStates: expected top_k 0 and top_p 1, got {params.top_k} and {params.top_p}; a filtered law "
                "gives other codes no probability, set top_k to 0 and top_p to 1"
            )
        self.layout, self.params = layout.of_sampling(params), params
        self.guided = _States(self.layout, forest)
        self.unguided = self.guided if unguided_forest is None else _States(self.layout, unguided_forest)
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
        places, conditions = self.layout.code_positions, [self.layout.text_prompt(prompt_ids)]
        if self.params.guidance_scale:
            conditions.append(self.layout.unguided_prompt(prompt_ids))
        if self.layout.image_mode == "causal":
            of_steps = np.isin(kept_at, kept_at[kept_at >= 0] if steps is None else list(steps))
            self._add_found(conditions, image, places - 1, np.flatnonzero(of_steps), codes, kept_at)
            self._num_images += 1
            return
        for step in np.unique(kept_at[kept_at >= 0]).tolist() if steps is None else sorted(steps):
            targets = codes if drawn is None else drawn[step]
            chosen = np.flatnonzero(kept_at == step if drawn is None else targets >= 0)
            if not len(chosen):
                continue
            state = image.copy()
            state[places[kept_at >= step]] = self.layout.mask_id
            self._add_found(conditions, state, places, chosen, targets, np.full(len(codes), step))
        self._num_images += 1

    def add_masked(self, prompt_ids: Sequence[int], codes: np.ndarray, hidden: Sequence[np.ndarray]) -> None:
        """Adds an image under masks in place of the states of its steps: each hides codes at its places int64 [K],
        which are predicted without guidance. Masks are numbered as steps."""
        image, places = np.array(self.layout.image(codes.tolist())), self.layout.code_positions
        for number, chosen in enumerate(hidden):
            state = image.copy()
            state[places[chosen]] = self.layout.mask_id
            numbers = np.full(len(codes), number)
            self._add_found([self.layout.text_prompt(prompt_ids)], state, places, chosen, codes, numbers)
        self._num_images += 1

    def _add_found(
        self,
        conditions: list[list[int]],
        state: np.ndarray,
        places: np.ndarray,
        chosen: np.ndarray,
        targets: np.ndarray,
        steps: np.ndarray,
    ) -> None:
        """A state, of whose codes those chosen are predicted by rows at their places in it."""
        rows = [chosen[:0]] * 2
        for half, (states, condition) in enumerate(zip((self.guided, self.unguided), conditions, strict=False)):
            rows[half] = states.row_of(condition, state) + places[chosen]
        owner = np.full(len(chosen), self._num_images)
        self._found.append((*rows, targets[chosen], owner, chosen, steps[chosen]))

    def drawn(self, device: torch.device | str | None = None) -> DrawnCodes:
        """What the rows of the finished tree predict."""
        columns = zip(*self._found, strict=True) if self._found else [[np.zeros(0)]] * len(DrawnCodes._fields)
        return DrawnCodes(*(torch.from_numpy(np.concatenate(parts).astype(np.int64)).to(device) for parts in columns))


class _States:
    """Spans of states under their prompts, each once."""

    def __init__(self, layout: Layout, forest: SpanForest) -> None:
        self.layout, self.forest = layout, forest
        self._roots: dict[tuple[int, ...], int] = {}
        self._first_rows: dict[tuple[tuple[int, ...], bytes], int] = {}

    def add_condition(self, ids: Sequence[int]) -> int:
        """The span of a condition."""
        condition = tuple(ids)
        if condition not in self._roots:
            self._roots[condition] = self.forest.add(condition, -1, "causal")
        return self._roots[condition]

    def row_of(self, condition: Sequence[int], state: np.ndarray) -> int:
        """The packed row of a state's first token."""
        key = tuple(condition), state.tobytes()
        if key not in self._first_rows:
            before, root = [], -1
            if self.layout.is_bidirectional:
                before = list(condition)
            else:
                root = self.add_condition(condition)
            self._first_rows[key] = self.forest.packed + len(before)
            self.forest.add([*before, *state.tolist()], root, self.layout.image_mode)
        return self._first_rows[key]


def code_logprobs(
    transformer: Transformer,
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
        transformer: the model, whose head they are taken by.
        layout: of the model.
        params: with which the codes were drawn.
        guided, unguided: hidden states [T, D] of their rows; unguided is not read without guidance.
        codes: int64 [T].
        backend: of linear_logprob.
    Returns: fp32 [T]; differentiable.
    """
    head = transformer.code_head(layout.code_ids)
    hidden, bias = head.inputs(guided), head.bias
    if params.guidance_scale:
        hidden = torch.lerp(head.inputs(unguided), hidden, 1 + params.guidance_scale)
    if params.temperature != 1:
        hidden, bias = hidden / params.temperature, None if bias is None else bias / params.temperature
    return linear_logprob(hidden, head.weight, codes, bias=bias, backend=backend)
