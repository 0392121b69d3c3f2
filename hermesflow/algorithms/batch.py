"""What a pass of preference training computes: visits of pairs, and what their sides must predict in a span tree."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hermesflow.engine.token_layout import Ids
from hermesflow.engine.transformer import Embeds
from hermesflow.kernels.span_tree import SpanTree

REPLAY = "replay"
"""Third side: answers about the real image, without win or lose."""


class PairVisit(NamedTuple):
    """A pair of the table at one of its turns."""

    pair: int
    visit: int


@dataclass(frozen=True)
class Side:
    """What one side of a pass must predict; tokens lie pair after pair.

    rows, targets: int64 [T], packed rows of the tree and the token ids that they predict.
    segment: int64 [T], 2 p for the win tokens of pair p, 2 p + 1 for its lose tokens; of the replay the
        number of the answer.
    token_weight: fp32 [T], of each log-probability in its pair's sum.
    pair_weight: fp32 [P], 1 for the pairs that have this side, else 0; of the replay fp32 [A], of each answer.
    """

    rows: Tensor
    targets: Tensor
    segment: Tensor
    token_weight: Tensor
    pair_weight: Tensor

    def pair_sums(self, values: Tensor) -> Tensor:
        """Sums of values [T] over the tokens of win and lose of each pair, [P, 2]."""
        return values.new_zeros(2 * len(self.pair_weight)).index_add(0, self.segment, values).view(-1, 2)

    def pair_means(self, values: Tensor) -> Tensor:
        """Means, likewise; 0 where there are no tokens."""
        return self.pair_sums(values) / self.pair_sums(torch.ones_like(values)).clamp(min=1)


@dataclass(frozen=True)
class PairBatch:
    """One pass: the forest of its pairs and what each side predicts in it; sides without tokens are left out.

    visits_of: by side, the visits that have it; on the host, so that nothing waits for the device.
    num_tokens_of: by side, how many of its T tokens each of those visits has.
    totals: by side, how many pairs the whole step has, of which this pass is a part.
    code_ids: of the image codes, where a code has its probability among them alone.
    embeds: features in place of tokens, in models that see them; see Transformer.forward.
    """

    visits: Sequence[PairVisit]
    tree: SpanTree
    sides: dict[str, Side]
    visits_of: dict[str, list[PairVisit]]
    num_tokens_of: dict[str, list[int]]
    totals: Mapping[str, int] = field(default_factory=dict)
    code_ids: Ids | None = None
    embeds: Embeds | None = None

    def further_metrics(self, logprob: Tensor) -> dict[str, Tensor]:
        """Of log-probabilities fp32 [T]: shares of metrics that this kind of batch has alone, by name."""
        return {}

    @property
    def rows(self) -> Tensor:
        """Rows of all sides, int64 [T], in the order of `sides`."""
        return torch.cat([side.rows for side in self.sides.values()])

    @property
    def targets(self) -> Tensor:
        """Targets of all sides, int64 [T]."""
        return torch.cat([side.targets for side in self.sides.values()])

    @property
    def codes(self) -> tuple[slice, Ids] | None:
        """See span_logprobs."""
        if self.code_ids is None or "generation" not in self.sides:
            return None
        before = itertools.takewhile(lambda name: name != "generation", self.sides)
        start = sum(len(self.sides[name].rows) for name in before)
        return slice(start, start + len(self.sides["generation"].rows)), self.code_ids

    def split(self, values: Tensor) -> dict[str, Tensor]:
        """Values [T] of all sides, side by side."""
        parts = values.split([len(side.rows) for side in self.sides.values()])
        return dict(zip(self.sides, parts, strict=True))
