"""Log-probabilities of labels in whole sequences, as callers of the published code have them, from one packed pass.

A batch of sequences and their masks becomes a forest of spans: pads that nobody scores are left out, so is what follows
the last label of a causal text, equal spans are stored once, and the head runs on the scored rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.drop_in.attention_masks import ImageFirst, Reading
from hermesflow.engine.shared_transformer import Head, SharedTransformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import Span, SpanTree

IGNORED = -100
"""Label of what is not scored."""


class ScoredLabels:
    """Labels of a batch that are scored: sequences, positions whose logits score them, and targets, int64 [T] each."""

    def __init__(self, labels: np.ndarray, sequences: range, first: int, shift: int) -> None:
        """
        Args:
            labels: [B, L], IGNORED where there is none.
            sequences: those that count.
            first: position from which labels count.
            shift: how far before a label its position lies: 0 for masked tokens, 1 for next ones.
        """
        of_these = labels[sequences.start : sequences.stop, first:]
        sequence, position = np.nonzero(of_these != IGNORED)
        self.target = of_these[sequence, position]
        self.sequence, self.position = sequence + sequences.start, position + first - shift


def logprob_sums(
    transformer: SharedTransformer,
    input_ids: Tensor | None,
    input_embeddings: Tensor | None,
    readings: Sequence[Reading],
    groups: Sequence[ScoredLabels],
) -> list[Tensor]:
    """Of each group the sum of its labels' log-probabilities under the joint vocabulary.

    Args:
        transformer: whose weights receive the gradient.
        input_ids: int64 [B, L]; not read where there are embeddings.
        input_embeddings: [B, L, D] in place of the tokens'; they receive the gradient. None: the model's own.
        readings: of the sequences' masks.
        groups: labels, at least one among them; a label may stand in several.
    Returns: fp32 0-dim each.
    """
    given = input_ids if input_embeddings is None else input_embeddings
    forest = LabelSpans(given.shape[:2], None if input_embeddings is not None else input_ids.tolist())
    last = np.full(len(given), -1)
    first = np.full(len(given), given.shape[1])
    for group in groups:
        np.maximum.at(last, group.sequence, group.position)
        np.minimum.at(first, group.sequence, group.position)
    # Those with the most pads come first, for theirs begin with those of all others.
    for sequence in sorted(np.flatnonzero(last >= 0), key=lambda sequence: -readings[sequence].first):
        forest.add(int(sequence), readings[sequence], int(first[sequence]), int(last[sequence]))
    tree, embeds = SpanTree.build(forest.spans, given.device), None
    if input_embeddings is not None:
        sequence, position = (torch.from_numpy(part).to(given.device) for part in forest.packed_from())
        embeds = torch.arange(len(tree.token_ids), device=given.device), input_embeddings[sequence, position]
    rows = np.concatenate([forest.row_of[group.sequence, group.position] for group in groups])
    targets = np.concatenate([group.target for group in groups])
    rows, firsts, row_of_target = np.unique(rows, return_index=True, return_inverse=True)
    rows, firsts, row_of_target, targets = (
        torch.from_numpy(part).to(given.device) for part in (rows, firsts, row_of_target, targets)
    )
    hidden = transformer(tree, embeds=embeds, rows=rows)
    logprobs = _logprobs(hidden, transformer.head, targets, row_of_target, firsts)
    return [part.sum() for part in logprobs.split([len(group.target) for group in groups])]


def _logprobs(hidden: Tensor, head: Head, targets: Tensor, row_of_target: Tensor, firsts: Tensor) -> Tensor:
    """fp32 [T] of targets [T] under the logits of rows [T] of hidden [R, D]; firsts [R] is one target of each row.

    A row that has several targets, its own token and the next one, has one softmax: their log-probabilities differ by
    their logits.
    """
    first = targets[firsts]
    logprobs = linear_logprob(hidden, head.weight, first, bias=head.bias)[row_of_target]
    others = (firsts[row_of_target] != torch.arange(len(targets), device=targets.device)).nonzero()[:, 0]
    if not len(others):
        return logprobs
    row, target = row_of_target[others], targets[others]
    weight = F.embedding(target, head.weight).float() - F.embedding(first[row], head.weight).float()
    difference = (hidden[row].float() * weight).sum(dim=1)
    if head.bias is not None:
        difference = difference + (head.bias[target].float() - head.bias[first[row]].float())
    return logprobs.index_add(0, others, difference)


class LabelSpans:
    """Collects the spans of a batch's sequences, equal ones once, and where each token went."""

    def __init__(self, shape: tuple[int, int], ids: list[list[int]] | None) -> None:
        """
        Args:
            shape: (B, L).
            ids: tokens [B][L]; None where embeddings stand in their place, so that no two spans are known to be equal.
        """
        self.spans: list[Span] = []
        self.row_of = np.full(shape, -1)
        self._ids, self._length = ids, shape[1]
        self._found: dict[tuple, tuple[int, int]] = {}
        self._packed: list[tuple[int, range]] = []
        self._num_rows = 0

    def add(self, sequence: int, reading: Reading, first: int, last: int) -> None:
        """What the tokens from first to last of a sequence need."""
        if isinstance(reading, ImageFirst):
            root = -1
            if reading.end > reading.first:
                root = self._span(sequence, range(reading.end), -1, reading.first)
            start = reading.end if root >= 0 else 0
            self._span(sequence, range(start, last + 1), root, "causal")
            return
        if first < reading.first:  # a pad, whose next token is scored
            self._pads(sequence, range(min(last + 1, reading.first)))
        sees_image = last >= reading.image
        text = self._span(sequence, range(reading.first, reading.image if sees_image else last + 1), -1, "causal")
        if sees_image:
            self._span(sequence, range(reading.image, self._length), text, "full")

    def packed_from(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each packed row a sequence and a position that it is, int64 [Tq] each."""
        sequences = np.repeat([sequence for sequence, _ in self._packed], [len(part) for _, part in self._packed])
        return sequences, np.concatenate([np.array(part) for _, part in self._packed])

    def _span(self, sequence: int, part: range, parent: int, mode: str | int) -> int:
        """The index of the span, or the parent's where it has no tokens."""
        if not part:
            return parent
        ids = [0] * len(part) if self._ids is None else self._ids[sequence][part.start : part.stop]
        key = (tuple(ids), parent, mode, sequence if self._ids is None else None)
        if key not in self._found:
            self._found[key] = len(self.spans), self._num_rows
            self.spans.append((ids, parent, mode))
            self._packed.append((sequence, part))
            self._num_rows += len(part)
        index, start = self._found[key]
        self.row_of[sequence, part.start : part.stop] = np.arange(start, start + len(part))
        return index

    def _pads(self, sequence: int, part: range) -> None:
        """Pads are causal and nothing follows them, so shorter ones are the beginning of longer ones."""
        ids = None if self._ids is None else tuple(self._ids[sequence][: part.stop])
        for (known, parent, mode, _), (_, start) in self._found.items():
            if ids is not None and (parent, mode) == (-1, "causal") and known[: part.stop] == ids:
                self.row_of[sequence, : part.stop] = np.arange(start, start + part.stop)
                return
        self._span(sequence, part, -1, "causal")
