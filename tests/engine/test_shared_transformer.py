"""A Transformer over another model's modules: the same numbers, the same parameters, autocast's dtype."""

import copy

import pytest
import torch
from torch import nn

from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.engine.shared_transformer import SharedTransformer, is_hooked
from hermesflow.kernels.span_tree import SpanTree

SPANS = [([3, 4, 5], -1, "causal"), ([6, 7, 8, 9], 0, "full"), ([6, 3], 0, "causal")]


@pytest.fixture
def plain(naive):
    return naive.tiny_model("parallel-gqa-partial-qknorm")


def shared_with(transformer):
    """The tiny model's modules as another model has them: q, k and v apart."""
    config, modules = transformer.config, {"embed": [transformer.embed], "norm": [transformer.norm],
                                           "head": [transformer.head]}  # fmt: skip
    rows = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for layer, block in enumerate(transformer.blocks):
        at = f"blocks.{layer}"
        qkv = block.attention.qkv
        parts = []
        for weight, bias in zip(qkv.weight.split(rows), qkv.bias.split(rows), strict=True):
            part = nn.Linear(weight.shape[1], weight.shape[0])
            part.weight, part.bias = nn.Parameter(weight.detach().clone()), nn.Parameter(bias.detach().clone())
            parts.append(part)
        modules |= {
            f"{at}.attention_norm": [block.attention_norm],
            f"{at}.attention.qkv": parts,
            f"{at}.attention.out": [linear_of(block.attention.out)],
            f"{at}.mlp.up": [linear_of(block.mlp.up)],
            f"{at}.mlp.down": [linear_of(block.mlp.down)],
        }
        for name in ("q_norm", "k_norm"):
            if config.qk_norm:
                modules[f"{at}.attention.{name}"] = [getattr(block.attention, name)]
    return SharedTransformer(config, modules), modules


def linear_of(ours):
    """The same layer as plain nn.Linear."""
    layer = nn.Linear(ours.in_features, ours.out_features)
    layer.weight, layer.bias = ours.weight, ours.bias
    return layer


def run(transformer, dtype=None):
    tree = SpanTree.build(SPANS)
    if not isinstance(transformer, SharedTransformer):
        return transformer(tree)
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        with transformer.precision.of_caller(torch.device("cpu")):
            return transformer(tree)


def test_hidden_states_are_the_same(plain):
    shared, _ = shared_with(plain)
    with torch.inference_mode():
        torch.testing.assert_close(run(shared), run(plain), rtol=1e-5, atol=1e-5)
    assert not any(parameter.is_meta for parameter in shared.parameters())


def test_parameters_are_shared_and_receive_the_gradient(plain):
    shared, modules = shared_with(plain)
    owned = {id(parameter) for sources in modules.values() for source in sources for parameter in source.parameters()}
    assert {id(parameter) for parameter in shared.parameters()} == owned
    tree, rows = SpanTree.build(SPANS), torch.tensor([2, 3, 4])
    span_logprobs(shared, tree, rows, torch.tensor([6, 7, 8])).sum().backward()
    span_logprobs(plain, tree, rows, torch.tensor([6, 7, 8])).sum().backward()
    qkv = torch.cat([part.weight.grad for part in modules["blocks.0.attention.qkv"]])
    torch.testing.assert_close(qkv, plain.blocks[0].attention.qkv.weight.grad, rtol=1e-4, atol=1e-6)


def test_autocast_computes_linear_layers_and_head_in_its_dtype(plain):
    shared, _ = shared_with(plain)
    seen = {}
    shared.blocks[0].mlp.down.register_forward_hook(lambda _, args, out: seen.update(down=out.dtype))
    shared.blocks[0].attention_norm.register_forward_hook(lambda _, args, out: seen.update(norm=out.dtype))
    with torch.inference_mode():
        exact, rounded = run(plain), run(shared, torch.bfloat16)
    assert seen == {"down": torch.bfloat16, "norm": torch.float32} and rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16), shared.precision.of_caller(torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
        assert shared.head.weight.dtype == shared.new_cache(4).keys.dtype == torch.bfloat16
    assert shared.head.weight.dtype == torch.float32 and shared.precision.dtype is None


def test_a_weights_copy_is_made_once_where_no_gradient_needs_it(plain):
    shared, _ = shared_with(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16), shared.precision.of_caller(torch.device("cpu")):
        with torch.no_grad():
            assert shared.head.weight is shared.head.weight
        assert shared.head.weight is not shared.head.weight and shared.head.weight.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), shared.precision.of_caller(torch.device("cpu")), torch.no_grad():
        plain.head.weight.add_(1)
        assert (shared.head.weight - plain.head.weight).abs().max() < 0.01  # not the last block's copy


def test_what_is_checkpointed_is_computed_again_in_autocasts_dtype(plain):
    """The backward pass runs after the block that autocast was read in."""
    shared, modules = shared_with(plain)
    tree, rows, targets = SpanTree.build(SPANS), torch.tensor([2, 3, 4]), torch.tensor([6, 7, 8])
    gradients = []
    for checkpointed in (False, True):
        shared.prepare_training(compiled=False, checkpointed=checkpointed)
        with torch.autocast("cpu", dtype=torch.bfloat16), shared.precision.of_caller(torch.device("cpu")):
            total = span_logprobs(shared, tree, rows, targets).sum()
        total.backward(retain_graph=True)
        total.backward()  # what is computed again is so each time
        weight = modules["blocks.0.attention.qkv"][0].weight
        gradients.append(weight.grad.clone())
        weight.grad = None
    assert torch.equal(*gradients)


def test_a_layer_that_is_more_than_linear_is_called(plain):
    """Adapters."""
    shared, modules = shared_with(plain)
    assert shared.has_plain_layers

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    expected = copy.deepcopy(plain)
    with torch.inference_mode():
        expected.blocks[0].mlp.up.bias += 1
        (source,) = modules["blocks.0.mlp.up"]
        modules["blocks.0.mlp.up"] = [Adapted(source)]
        shared = SharedTransformer(plain.config, modules)
        torch.testing.assert_close(run(shared), run(expected), rtol=1e-5, atol=1e-5)
    assert not shared.has_plain_layers


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_are_seen(hook):
    layer = nn.Linear(2, 2)
    assert not is_hooked(layer)
    getattr(layer, hook)(lambda *_: None)
    assert is_hooked(layer)


def test_a_forward_of_its_own_is_seen():
    layer = nn.Linear(2, 2)
    layer.forward = lambda x: x
    assert is_hooked(layer)


def test_embeddings_in_place_of_all_tokens_leave_the_embedding_without_gradient(plain):
    shared, modules = shared_with(plain)
    tree = SpanTree.build(SPANS)
    values = plain.embed(tree.token_ids).detach().requires_grad_()
    rows = torch.tensor([2, 3, 4])
    given = shared(tree, embeds=(torch.arange(len(values)), values), rows=rows)
    torch.testing.assert_close(given, shared(tree, rows=rows), rtol=1e-5, atol=1e-5)
    given.square().sum().backward()
    assert values.grad.norm() > 0 and plain.embed.weight.grad is None
