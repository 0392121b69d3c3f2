"""Log-probabilities of a span tree's tokens: one pass, the head on the rows that predict a target and on no others."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from hermesflow.engine.token_layout import Ids
from hermesflow.engine.transformer import Embeds, Transformer
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.span_tree import SpanTree


def span_logprobs(
    transformer: Transformer,
    tree: SpanTree,
    rows: Tensor,
    targets: Tensor,
    *,
    codes: tuple[slice, Ids] | None = None,
    embeds: Embeds | None = None,
    backend: str | None = None,
) -> Tensor:
    """Log-probability of each target under the joint vocabulary, predicted by a packed row of the tree.

    Args:
        transformer: the model; its parameters receive the gradient.
        tree: a tree whose spans are all new.
        rows: int64 [T], packed rows of the tree (SpanTree.span_rows); a row may occur more than once.
        targets: int64 [T], token ids. A masked image token is predicted by its own row, a text token by the row before
            it (next_token_targets).
        codes: which of the targets are image codes that have their probability among these ids; None: none.
        embeds: see Transformer.forward.
        backend: of linear_logprob; None takes the first that can run.
    Returns: fp32 [T].
    """
    hidden = transformer(tree, embeds=embeds, rows=rows)
    # Only now: sharded weights are whole once the forward pass has begun.
    head = transformer.head
    if codes is None:
        return linear_logprob(hidden, head.weight, targets, bias=head.bias, backend=backend)
    place, ids = codes
    before, of_codes, after = slice(0, place.start), place, slice(place.stop, len(targets))
    code_head = transformer.code_head(ids)
    inputs, numbers = code_head.inputs(hidden[of_codes]), ids.numbers(targets[of_codes])
    parts = [
        linear_logprob(hidden[part], head.weight, targets[part], bias=head.bias, backend=backend)
        for part in (before, after)
    ]
    parts.insert(1, linear_logprob(inputs, code_head.weight, numbers, bias=code_head.bias, backend=backend))
    return torch.cat(parts)


def next_token_targets(tree: SpanTree, spans: int | Sequence[int], end: int | None = None) -> tuple[Tensor, Tensor]:
    """Rows and targets that score causal spans token by token; a span's first token is predicted by its parent's last.

    Args:
        tree: a tree in which the spans and their parents are new.
        spans: one span or several.
        end: a token that follows each span without being part of it (eot) and is scored too; None: no such token.
    Returns: rows and targets, int64 [T] on the tree's device, span after span: one entry a token, and one for end.
    Raises: ValueError if a span is not causal, or it or its parent is not new.
    """
    spans = np.atleast_1d(np.asarray(spans, dtype=np.int64))
    parents = tree.parents[spans]
    if not tree.causal[spans].all() or (parents < 0).any() or (tree.num_new[spans] < tree.lengths[spans]).any():
        raise ValueError(f"next_token_targets: expected new causal spans with a parent, got spans {spans.tolist()}")
    if (tree.num_new[parents] == 0).any():
        raise ValueError("next_token_targets: expected new parents, whose last rows predict; got cached ones")
    counts = tree.num_new[spans] + (end is not None)
    firsts = np.cumsum(counts) - counts
    offsets = np.arange(counts.sum()) - np.repeat(firsts, counts)
    target_rows = np.repeat(tree.packed_starts[spans], counts) + offsets
    rows = target_rows - 1
    rows[firsts] = tree.packed_starts[parents] + tree.num_new[parents] - 1
    device = tree.token_ids.device
    if end is None:
        targets = tree.token_ids[torch.from_numpy(target_rows).to(device)]
    else:
        is_end = offsets == np.repeat(counts, counts) - 1
        target_rows[is_end] = 0
        targets = tree.token_ids[torch.from_numpy(target_rows).to(device)]
        targets = targets.masked_fill(torch.from_numpy(is_end).to(device), end)
    return torch.from_numpy(rows).to(device), targets
