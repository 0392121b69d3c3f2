"""Internal ops of torch, which a version may lack: without them public ones give the same."""

import pytest
import torch

from hermesflow.engine.engine import Engine
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.kernels import matmul, registry, span_attention
from hermesflow.kernels.span_tree import SpanTree

IMAGES = {"num_steps": 3, "guidance_scale": 1.0, "mask_temperature": 1.0, "temperature": 0.8}


def outcome(naive):
    """Images, log-probabilities of a text, and the gradient of their sum."""
    model = naive.tiny_model()
    engine = Engine(model, naive.LAYOUT)
    codes = engine.generate([[5, 6], [7]], num_images=2, seeds=torch.arange(4).view(2, 2), **IMAGES)
    tree = SpanTree.build([([5, 6, 7, 5], -1, "causal"), ([6, 5], 0, "causal")])
    rows, targets = torch.arange(6), torch.tensor([6, 7, 5, 6, 5, 7])
    logprobs = span_logprobs(model, tree, rows, targets)
    logprobs.sum().backward()
    return codes, logprobs.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("without", ["flash", "onednn", "both"])
def test_public_ops_give_the_same(naive, without, monkeypatch):
    codes, logprobs, gradients = outcome(naive)
    monkeypatch.setattr(span_attention, "_HAS_FLASH", without == "onednn")
    monkeypatch.setattr(matmul, "_HAS_ONEDNN", without == "flash")
    if without != "onednn":
        zeros, tree = torch.zeros(1, 1, 8), SpanTree.build([([5], -1, "causal")])
        reasons = dict(registry.explain("span_attention", zeros, zeros, zeros, tree))
        assert "has no aten::" in reasons["cpu"]
    other_codes, other_logprobs, other_gradients = outcome(naive)
    assert torch.equal(codes, other_codes)
    assert torch.allclose(logprobs, other_logprobs, atol=1e-5)
    assert all(torch.allclose(*pair, atol=1e-4) for pair in zip(gradients, other_gradients, strict=True))
