"""What is said after a draw failed."""

import pytest
import torch

from hermesflow.engine.nan_cause import likely_cause


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_parameter_that_is_not_finite_is_named(naive, value):
    transformer = naive.tiny_model()
    transformer.blocks[1].mlp.down.weight.data[3, 2] = value
    assert likely_cause(transformer) == "check its weights: blocks.1.mlp.down.weight holds NaN or infinity"


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        (torch.float16, "overflowed float16: load it in bfloat16 or float32"),
        (torch.bfloat16, "its input is not, or its activations overflowed torch.bfloat16: try float32"),
        (torch.float32, "its input is not, or its activations overflowed: check both for huge values"),
    ],
)
def test_finite_weights(naive, dtype, advice):
    cause = likely_cause(naive.tiny_model(dtype=dtype))
    assert cause.startswith("its weights are finite, so ") and cause.endswith(advice)
