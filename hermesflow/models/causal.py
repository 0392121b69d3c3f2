"""Shared by families that draw code by code."""

from __future__ import annotations

from collections.abc import Sequence

from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder
from hermesflow.engine.token_layout import Layout
from hermesflow.models.checkpoint import CheckpointModel


class CausalLayout(Layout):
    """Sequences as most such families have them; boi and eoi frame an image, bos begins."""

    bos: int
    boi: int
    eoi: int
    image_mode = prefix_mode = "causal"

    @property
    def num_image_tokens(self) -> int:
        """Of the grid."""
        return self.image_grid[0] * self.image_grid[1]

    @property
    def before_image(self) -> tuple[int, ...]:
        """boi."""
        return (self.boi,)

    @property
    def after_image(self) -> tuple[int, ...]:
        """eoi."""
        return (self.eoi,)

    def text_prompt(self, text_ids: Sequence[int]) -> list[int]:
        """Condition of an image: [bos, text]."""
        return [self.bos, *text_ids]

    def question(self, text_ids: Sequence[int]) -> list[int]:
        """A question about an image."""
        return list(text_ids)


class CausalModel(CheckpointModel):
    """A model that draws code by code."""

    image_decoder = AutoregressiveDecoder
