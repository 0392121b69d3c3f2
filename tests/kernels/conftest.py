"""What the kernels' tests share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@pytest.fixture
def check_error_budget() -> Callable[..., None]:
    """The tolerance rule of all ops: at most twice the error of plain torch in the same dtype, plus a floor."""

    def check(got: Tensor, truth: Tensor, plain: Tensor) -> None:
        """got and plain against the fp64 truth; the floor is four roundings of got's dtype at the truth's scale."""
        assert got.shape == truth.shape
        if not truth.numel():
            return
        floor = 4 * torch.finfo(got.dtype).eps * truth.abs().max().clamp(min=1e-3)
        error, budget = (got.double() - truth).abs().max(), 2 * (plain.double() - truth).abs().max() + floor
        assert error <= budget, f"error {error:.3g} above the budget {budget:.3g}"

    return check


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any result of the operations under it has."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(leaf.numel() for leaf in tree_leaves(result) if torch.is_tensor(leaf))])
        return result


@pytest.fixture
def largest_tensor() -> LargestTensor:
    """with largest_tensor as seen: ... afterwards seen.numel is the size of the largest tensor that was made."""
    return LargestTensor()
