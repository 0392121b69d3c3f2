"""torch.compile of the blocks: one graph on each side of attention, shared by all layers, for any number of tokens."""

import dataclasses

import pytest
import torch
from torch._dynamo.utils import counters

from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.span_tree import SpanTree

WIDTHS = [32, 4, 8, 48]
"""Of a tiny model: hidden_size, num_heads, head_dim, mlp_size."""


@pytest.fixture
def num_graphs():
    """How many graphs torch.compile has made in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def training_step(transformer, num_tokens, rows=None):
    """Loss and gradients of a text with two branches."""
    spans = [(list(range(num_tokens)), -1, "causal"), ([5, 6, 7], 0, "full"), ([8, 9], 0, "causal")]
    parameters = [value for name, value in transformer.named_parameters() if not name.startswith("head.")]
    loss = transformer(SpanTree.build(spans), rows=rows).square().sum()
    return loss, torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize(
    ("name", "checkpointed"),
    [("sequential", True), ("parallel-gqa-partial-qknorm", False)],
    ids=["checkpointed", "parallel"],
)
def test_compiled_training_gives_the_same(naive, num_graphs, name, checkpointed):
    transformer, rows = naive.tiny_model(name), torch.tensor([3, 17, 3])
    cases = [(20, None), (31, rows)]
    expected = [training_step(transformer, *case) for case in cases]
    transformer.prepare_training(compiled=True, checkpointed=checkpointed, backend="aot_eager")
    for case, (loss, gradients) in zip(cases, expected, strict=True):
        same_loss, same_gradients = training_step(transformer, *case)
        torch.testing.assert_close(same_loss, loss, rtol=1e-5, atol=0)
        for mine, truth in zip(same_gradients, gradients, strict=True):
            torch.testing.assert_close(mine, truth, rtol=0, atol=2e-5 * truth.abs().max().item())
    transformer.prepare_training(compiled=False, checkpointed=False)
    made = num_graphs()
    training_step(transformer, 20)
    assert num_graphs() == made


@pytest.mark.parametrize(("backend", "checkpointed"), [("eager", False), ("aot_eager", True)], ids=["", "checkpointed"])
def test_compiled_training_takes_any_number_of_tokens(naive, num_graphs, backend, checkpointed):
    """After a step and a pass without gradients, which have graphs of their own."""
    transformer = naive.tiny_model()
    transformer.prepare_training(compiled=True, checkpointed=checkpointed, backend=backend)

    def without_gradients(num_tokens):
        with torch.no_grad():
            transformer(SpanTree.build([(list(range(num_tokens)), -1, "full")]), rows=torch.tensor([1, 2, 2]))

    training_step(transformer, 17, torch.tensor([3, 4]))
    without_gradients(17)
    warm = num_graphs()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for num_tokens in (19, 3, 40, *WIDTHS):
            training_step(transformer, num_tokens)
            training_step(transformer, num_tokens, torch.zeros(3, dtype=torch.int64))
            without_gradients(num_tokens)
    assert num_graphs() == warm


def test_graphs_of_training_do_not_grow_with_layers(naive, num_graphs):
    counts = []
    for num_layers in (2, 4):
        torch._dynamo.reset()
        before = num_graphs()
        transformer = Transformer(dataclasses.replace(naive.tiny_model().config, num_layers=num_layers))
        transformer.prepare_training(compiled=True, checkpointed=False, backend="eager")
        training_step(transformer, 17)
        counts.append(num_graphs() - before)
    assert counts[0] == counts[1]
