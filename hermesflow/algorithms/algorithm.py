"""The seam of algorithms: what training asks of one.

An algorithm builds span trees by the model's layout and prompts, and its loss sees log-probabilities alone, so that it
works with every family. It is one file, and one line in ALGORITHMS of runtime/registry.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.policy import Policy
from hermesflow.config import TrainConfig
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.model import Model
from hermesflow.runtime.distributed import sum_over_ranks


class Batch(Protocol):
    """One forward pass: a tree, and which of its packed rows predict what.

    A batch whose targets are drawn by a law of their own has logprobs(transformer) -> fp32 [T] in place of targets.
    """

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
    """False for a pass that only keeps processes in step; its result is discarded."""


class Reference(Protocol):
    """What gives the frozen reference's log-probabilities."""

    is_live: bool
    """Whether it computes beside each step."""

    def logprobs(self, batch: Any) -> Tensor:
        """fp32 [T] of a batch's targets."""


class Algorithm(Protocol):
    """What a step learns from. A visit is one item of a step, such as a pair in one epoch.

    An online algorithm (is_online = True) learns from what the model draws as it learns. In place of pairs and
    TrainConfig it is given a round's records and the whole Config, and it has a static check(config), which raises
    InputError on settings that do not go together.
    """

    name: str
    """For progress bars and messages."""

    def __init__(self, model: Model, pairs: pa.Table, config: TrainConfig, seed: int) -> None:
        """
        Args:
            model: its layout and prompts build the trees.
            pairs: a round's, checked, or those that are held out.
            config: the settings.
            seed: of all draws.
        """

    def visits(self, step: int | None) -> Sequence[Any]:
        """Of a step: a pure function of its number, the seed and, online, the weights, so that a resumed run repeats
        it; all processes have the same. None: every item once, for the held-out loss."""

    def passes(self, visits: Sequence[Any]) -> list[Pass]:
        """This process's passes over all processes' visits."""

    def metric_names(self, visits: Sequence[Any]) -> list[str]:
        """Names of the metrics that loss returns, equal in all processes."""

    def reference(self, policy: Policy, steps: Iterable[int | None], path: Path) -> Reference:
        """The reference, before the first step.

        Args:
            policy: still with its first weights.
            steps: all whose visits will come.
            path: a file where log-probabilities may be kept.
        """

    def loss(self, logprob: Tensor, reference: Tensor, batch: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """A pass's share of the step's loss, 0-dim with its gradient, and of its metrics, 0-dim each.

        Args:
            logprob: the policy's log-probabilities of the batch's targets, fp32 [T].
            reference: the reference's, likewise.
            batch: the pass.
        """


def batch_logprobs(transformer: Transformer, batch: Batch) -> Tensor:
    """Log-probability fp32 [T] of everything that a pass must predict; the head runs on those rows alone."""
    if hasattr(batch, "logprobs"):
        return batch.logprobs(transformer)
    more = {name: getattr(batch, name, None) for name in ("codes", "embeds")}
    return span_logprobs(transformer, batch.tree, batch.rows, batch.targets, **more)


class StepSums:
    """Adds up the passes' shares, and those of all processes."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """
        Args:
            names: of the metrics.
            device: of the passes.
        """
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
