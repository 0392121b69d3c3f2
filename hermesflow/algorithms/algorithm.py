"""The seam of algorithms: what training asks of one.

An algorithm sees span trees and log-probabilities, never a family, so that each works with every model. It is one file,
and one line in ALGORITHMS of runtime/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hermesflow.algorithms.policy import Policy
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runtime.distributed import sum_over_ranks


class Batch(Protocol):
    """One forward pass: a tree, and which of its packed rows predict what."""

    tree: SpanTree
    rows: Tensor
    """int64 [T]."""
    targets: Tensor
    """Token ids, int64 [T]."""


class Pass(NamedTuple):
    """A pass of a step."""

    pack: Callable[[torch.device], Batch]
    """Makes its batch when its turn comes, so that one is in memory."""
    counts: bool
    """Whether it is part of the step: processes that share sharded layers all take as many passes."""


class Reference(Protocol):
    """What gives the frozen reference's log-probabilities."""

    is_live: bool
    """Whether it computes beside each step."""

    def logprobs(self, batch: Any) -> Tensor:
        """fp32 [T] of a batch's targets."""


class Algorithm(Protocol):
    """What a step learns from. A visit is what the algorithm counts a step by, such as a pair at one of its turns."""

    def visits(self, step: int) -> Sequence[Any]:
        """Of a step: a pure function of its number and the seed, so that a killed run goes on alike."""

    def passes(self, visits: Sequence[Any]) -> list[Pass]:
        """This process's passes over all processes' visits."""

    def metric_names(self, visits: Sequence[Any]) -> list[str]:
        """Of loss's metrics in a step of these visits, the same in all processes."""

    def reference(self, policy: Policy, visits: Sequence[Any], path: Path) -> Reference:
        """The reference, before the first step; path is where log-probabilities may be kept, visits all that come."""

    def loss(self, logprob: Tensor, reference: Tensor, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A pass's share of the step's loss, 0-dim with its gradient, and of its metrics, 0-dim each.

        Args:
            logprob: the policy's log-probabilities of the batch's targets, fp32 [T].
            reference: the reference's, likewise.
            batch: the pass.
        """


class StepSums:
    """Adds up the passes' shares, and those of all processes."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self._names = names
        self._sums = torch.zeros(1 + len(names), dtype=torch.float64, device=device)

    def add(self, loss: Tensor, shares: Mapping[str, Tensor]) -> None:
        """One pass's; nothing waits for the device."""
        zero = self._sums.new_zeros(())
        values = [loss.detach(), *(shares.get(name, zero) for name in self._names)]
        self._sums += torch.stack([value.double() for value in values])

    def metrics(self) -> dict[str, float]:
        """{"loss", *names} of the whole step; all processes must ask."""
        return dict(zip(["loss", *self._names], sum_over_ranks(self._sums).tolist(), strict=True))
