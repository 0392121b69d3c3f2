"""torch.compile of the blocks: one graph on each side of attention, shared by all layers, for any number of tokens."""

import pytest
import torch
from torch._dynamo.utils import counters

from hermesflow.engine.span_tree import SpanTree
from hermesflow.engine.transformer import Transformer

MODEL_NAMES = ["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied", "relu2-no-rotary"]


@pytest.fixture
def num_graphs():
    """How many graphs torch.compile has made in this test."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


def trees(*lengths):
    return [SpanTree.build([([3, 4, 5], -1, "causal"), (list(range(length)), 0, "full")]) for length in lengths]


def run(transformer, tree, rows=None):
    with torch.inference_mode():
        return transformer(tree, transformer.new_cache(tree.capacity), rows=rows)


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_two_graphs_serve_all_layers_and_lengths(naive, num_graphs, name):
    transformer = naive.tiny_model(name)
    expected = [run(transformer, tree) for tree in trees(16, 7, 30)]
    some = run(transformer, trees(30)[0], rows=torch.arange(5, 12))
    transformer.compile_blocks("aot_eager")
    got = [run(transformer, tree) for tree in trees(16)]
    assert num_graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        got += [run(transformer, tree) for tree in trees(7, 30)]
        few = run(transformer, trees(30)[0], rows=torch.arange(5, 12))
    assert num_graphs() == 2
    for mine, truth in zip([*got, few], [*expected, some], strict=True):
        torch.testing.assert_close(mine, truth, rtol=0, atol=2e-5)


def test_number_of_graphs_does_not_grow_with_layers(naive, num_graphs):
    config = {**naive.tiny_model().config.to_dict(), "num_layers": 12}
    transformer = Transformer(type(naive.tiny_model().config)(**config)).eval()
    transformer.compile_blocks("aot_eager")
    run(transformer, trees(16)[0])
    assert num_graphs() == 2
