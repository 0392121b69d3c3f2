"""A case of `hermesflow bench ops`, and the rules by which a result counts as right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hermesflow.benchmarks.measuring import Call

NUM_CHECKED_ROWS = 256


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape.

    Bytes and FLOPs are the least that the op can do: each input read once a pass, each result written once; products
    at two operations each, elementwise work as the formulas beside the cases say. A gradient is that of the sum of the
    results.
    """

    op: str
    part: str = ""
    """Tells the cases of one op apart."""
    shape: str
    """Its sizes in words."""
    dtype: torch.dtype
    run: Callable[[str], Any]
    """One call on the named backend: what is timed."""
    check: Callable[[str], str | None]
    """A call on the named backend: None, or what is wrong with its result."""
    naive: Call
    """The published algorithm."""
    compiled: Call
    """The same by torch.compile."""
    agrees: Callable[[Any], bool]
    """Whether a baseline's result is of the same function; roughly, for it draws other random numbers."""
    peers: dict[str, Callable[[], Call]] = field(default_factory=dict)
    """Name -> what prepares the peer's call, or raises peers.Unavailable."""
    num_bytes: int
    num_flops: int
    short: bool
    """So short that launches matter: timed as a CUDA graph."""

    @property
    def name(self) -> str:
        """The op, or op/part."""
        return f"{self.op}/{self.part}" if self.part else self.op


def some_rows(num_rows: int, device: torch.device) -> Tensor:
    """The rows to check: evenly spread, first and last among them."""
    spread = torch.linspace(0, num_rows - 1, min(num_rows, NUM_CHECKED_ROWS), device=device, dtype=torch.float64)
    return spread.long().unique()


def wrong_draws(drawn: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], rows: Tensor) -> str | None:
    """What is wrong with tokens and log-probabilities [R], given the reference's at some rows; None if nothing."""
    token, logprob = (part[rows] for part in drawn)
    same = token == expected[0]
    num_wrong = int((~same).sum())
    # Rounding may turn a near-tie, which one row in 10,000 may have.
    if num_wrong > 1:
        return f"{num_wrong} of {len(rows)} tokens differ from the reference's"
    error = (logprob - expected[1])[same].abs()
    # Sums of fp32 in another order, over logits of some ten.
    return None if (error < 1e-4).all() else f"log-probability off by {float(error.max()):.2g}"


def wrong_values(names: str, *results: tuple[Tensor, ...]) -> str | None:
    """What is wrong with values and gradients by the tests' rule; None if nothing.

    An error against the fp64 truth may be twice that of eager torch in the same dtype, plus four roundings at the
    truth's scale.

    Args:
        names: of the tensors, separated by blanks.
        results: of the backend, the truth in fp64, eager torch; a tensor for each name.
    """
    for name, got, truth, eager in zip(names.split(), *results, strict=True):
        floor = 4 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1e-3)
        error, budget = (got.double() - truth).abs().max(), 2 * (eager.double() - truth).abs().max() + floor
        if not error <= budget:  # NaN is wrong too
            return f"{name}: error {float(error):.2g} above the budget {float(budget):.2g}"
    return None


def draws_tokens(num_rows: int, vocab_size: int) -> Callable[[Any], bool]:
    """An `agrees` for samplers: a token in range for each row, whether or not its probability comes with it."""

    def agrees(result: Any) -> bool:
        token = result[0] if isinstance(result, tuple) else result
        return token.shape == (num_rows,) and bool(((token >= 0) & (token < vocab_size)).all())

    return agrees


def agrees_with(eager: Call) -> Callable[[Any], bool]:
    """An `agrees` for values with gradients: the value's sum and the gradients' norms within 2 % of eager torch's.

    A loss has the other sign than its log-probabilities; a peer may lack the last gradients, as that of the bias.
    """

    def agrees(result: tuple[Tensor, ...]) -> bool:
        expected = eager()
        pairs = [(result[0].sum(), expected[0].sum())]
        for got, right in zip(result[1:], expected[1:], strict=False):
            pairs.append((torch.linalg.vector_norm(got.float()), torch.linalg.vector_norm(right.float())))
        return all(abs(abs(got) - abs(right)) <= 0.02 * abs(right) + 1e-6 for got, right in pairs)

    return agrees


def with_gradients(forward: Call, leaves: tuple[Tensor, ...]) -> Call:
    """forward, and the gradients of the sum of its result: (result, gradient of each leaf)."""

    def run() -> tuple[Tensor, ...]:
        result = forward()
        return result, *torch.autograd.grad(result, leaves, torch.ones_like(result))

    return run


def graded(function: Callable[..., Tensor], leaves: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    """function(*leaves) and, for an upstream gradient, the leaves' gradients; the leaves are taken as constants."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    result = function(*leaves)
    return result.detach(), *torch.autograd.grad(result, leaves, upstream.to(result.dtype))
