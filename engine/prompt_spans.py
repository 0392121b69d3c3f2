"""Images and the questions asked of them, as spans of a tree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Embeds
from hermesflow.kernels.span_tree import Span

QuestionIds = Sequence[Sequence[Sequence[int]]]
"""Plain text ids of each image's questions: [image][question][token]."""

Asked = tuple[int, int]
"""(image, question of that image)."""


class PromptSpans:
    """Frames images (codes int64 [B, N], or features [B, F, D]) and questions as the layout has them.

    root: ids of a causal root that all images follow, or none; its span comes before theirs.
    """

    root: tuple[int, ...] = ()

    def __init__(self, layout: Layout, images: Tensor, question_ids: QuestionIds) -> None:
        self._images, self._question_ids = images, question_ids
        self._codes: list[list[int]] | None = None
        if images.is_floating_point():
            self._features = layout.feature_span(images.shape[1])
            self._image, self._ask = None, layout.feature_question
            self.image_length, self.root = len(self._features.ids), self._features.before
        else:
            self._codes, self._image, self._ask = images.tolist(), layout.image_prefix, layout.question
            self._mode = layout.prefix_mode
            self.image_length = len(layout.image_prefix([0] * images.shape[1]))

    @property
    def pairs(self) -> list[Asked]:
        """Every question, image by image."""
        counts = enumerate(map(len, self._question_ids))
        return [(image, question) for image, count in counts for question in range(count)]

    @property
    def roots(self) -> list[Span]:
        """The root's span, if there is one."""
        return [(self.root, -1, "causal")] if self.root else []

    def image(self, image: int, root: int = -1) -> Span:
        """Span of an image below the root's; features take the place of its pads (embeds)."""
        if self._codes is None:
            return self._features.ids, root, self._features.mode, self._features.place
        return self._image(self._codes[image]), root, self._mode

    def question(self, image: int, question: int) -> list[int]:
        """Tokens of a question's causal span, whose parent is the image's."""
        return self._ask(self._question_ids[image][question])

    def embeds(self, images: Sequence[int], with_root: bool) -> Embeds | None:
        """The features of images whose spans come first, in this order, among a tree's new tokens, or behind the
        root's; None for codes."""
        if self._codes is not None or not images:
            return None
        shared, features = self._features.shared, self._images[list(images)]
        start, own = len(self.root) if with_root else 0, torch.tensor(self._features.rows)
        rows = start + torch.arange(len(images))[:, None] * self.image_length + own
        rows, values = rows.flatten(), features[:, shared:].flatten(0, 1)
        if with_root and shared:
            rows = torch.cat([torch.arange(start - shared, start), rows])
            values = torch.cat([features[0, :shared], values])
        return rows, values
