"""The transformer over span trees against dense masked attention, and cached against uncached."""

import pytest
import torch

from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels.span_tree import SpanTree

TEXT, IMAGE, QUESTION = [3, 4, 5, 6], list(range(50, 68)), [7, 8, 9]
SPANS = [
    (TEXT, -1, "causal"), (IMAGE, 0, "full"), (IMAGE[::-1], 0, "full"),
    (IMAGE, -1, "full"), (QUESTION, 3, "causal"), ([1, 2], 4, "causal"), ([2, 1, 3], 4, "causal"),
    (TEXT + IMAGE, -1, 4), (QUESTION, 7, "causal"),
]  # fmt: skip
MODEL_NAMES = [
    "sequential",
    "parallel-gqa-partial-qknorm",
    "rmsnorm-gated-mqa-tied",
    "post-rmsnorm-headnorm",
    "relu2-no-rotary",
]


@pytest.fixture(params=MODEL_NAMES)
def transformer(request, naive):
    return naive.tiny_model(request.param, dtype=torch.float64)


def test_every_kind_of_model_is_tested(naive):
    assert list(naive.MODELS) == MODEL_NAMES


def test_forward_and_all_gradients_in_float64(naive, transformer):
    tree = SpanTree.build(SPANS)
    weight = torch.randn(len(tree.token_ids), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = naive.dense_hidden(transformer, tree.token_ids, tree.position_ids, tree.allowed())
    got = transformer(tree)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)

    names, parameters = zip(*transformer.named_parameters(), strict=True)
    options = {"allow_unused": True, "materialize_grads": True}  # the head of an untied model has no part in this
    mine = torch.autograd.grad((got * weight).sum(), parameters, **options)
    truth = torch.autograd.grad((expected * weight).sum(), parameters, **options)
    for name, got_gradient, true_gradient in zip(names, mine, truth, strict=True):
        label = lambda message, name=name: f"{name}: {message}"  # noqa: E731
        torch.testing.assert_close(got_gradient, true_gradient, rtol=1e-9, atol=1e-10, msg=label)


@pytest.mark.parametrize("branch", [(0, 1), (0, 2), (3, 4, 5), (3, 4, 6), (7, 8)], ids=str)
def test_branch_equals_its_sequence_alone(naive, transformer, branch):
    """Sharing a prefix changes nothing: each path from a root is a sequence of its own."""
    tree = SpanTree.build(SPANS)
    logits = transformer.head(transformer(tree))
    alone = naive.chain_logits(transformer, *((SPANS[span][0], SPANS[span][2]) for span in branch))
    shared = torch.cat([logits[tree.span_rows(span)] for span in branch])
    torch.testing.assert_close(shared, alone, rtol=0, atol=1e-10)


def nan_cache(transformer, capacity):
    """A cache that betrays every read of a slot that nobody wrote."""
    cache = transformer.new_cache(capacity)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    return cache


@torch.no_grad()
def test_cached_prefixes_equal_one_pass(transformer):
    whole = SpanTree.build(SPANS)
    expected = transformer(whole)
    branches = [(IMAGE, 0, "full"), (IMAGE[::-1], 0, "full"), ([1, 2], 2, "causal"), ([2, 1, 3], 2, "causal")]
    prefix = SpanTree.build([SPANS[0], SPANS[3], (QUESTION, 1, "causal")])
    leaves = prefix.extend(branches)
    cache = nan_cache(transformer, leaves.capacity + 5)
    got = torch.cat([transformer(prefix, cache), transformer(leaves, cache)])
    truth = torch.cat([expected[whole.span_rows(span)] for span in (0, 3, 4, 1, 2, 5, 6)])
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)
    # The next step of generation: other tokens on the same structure.
    swapped = leaves.with_tokens(leaves.token_ids.flip(0))
    tokens = iter(swapped.token_ids.tolist())
    again = prefix.extend([([next(tokens) for _ in ids], parent, mode) for ids, parent, mode in branches])
    fresh = nan_cache(transformer, again.capacity)
    transformer(prefix, fresh)
    torch.testing.assert_close(transformer(swapped, cache), transformer(again, fresh), rtol=0, atol=1e-11)


def test_embeds_stand_in_for_tokens(naive, transformer):
    """The embeddings of other tokens at some rows, in any order and dtype, with their gradient."""
    tree = SpanTree.build([(TEXT + IMAGE, -1, 4), (QUESTION, 0, "causal")])
    rows = torch.arange(4, 4 + len(IMAGE)).flip(0)
    other = tree.token_ids.clone()
    other[rows] = torch.arange(len(IMAGE))
    values = transformer.embed.weight[: len(IMAGE)].detach().float().requires_grad_()
    transformer.embed.weight.data[: len(IMAGE)] = values.detach().double()
    got = transformer(tree, embeds=(rows, values))
    torch.testing.assert_close(got, transformer(tree.with_tokens(other)), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(got.square().sum(), values)
    assert gradient.dtype == torch.float32 and gradient.abs().sum(1).min() > 0


@pytest.mark.parametrize("inference", [False, True], ids=["gradients", "inference"])
def test_wanted_rows_are_those_of_all(naive, transformer, inference):
    """In any order, repeated or none; the last block's MLP sees no others."""
    tree, rows = SpanTree.build(SPANS), torch.tensor([40, 3, 3, 0, 70])
    counts = []
    for block in transformer.blocks:
        block.mlp.register_forward_hook(lambda _, inputs, __: counts.append(len(inputs[0])))
    with torch.inference_mode(inference):
        expected = transformer(tree)
        for wanted in (rows, rows[:0]):
            counts.clear()
            torch.testing.assert_close(transformer(tree, rows=wanted), expected[wanted], rtol=0, atol=1e-12)
            assert counts == [len(tree.token_ids), len(wanted)]


def test_gradients_of_wanted_rows_are_those_of_all(transformer):
    """Rows in any order, repeated and left out; the other rows' last MLP has no part in the loss."""
    tree, rows = SpanTree.build(SPANS), torch.tensor([40, 3, 3, 0, 70])
    parameters = list(transformer.parameters())

    def gradients(hidden):
        weight = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(0))
        return torch.autograd.grad((hidden * weight).sum(), parameters, allow_unused=True, materialize_grads=True)

    for got, expected in zip(gradients(transformer(tree, rows=rows)), gradients(transformer(tree)[rows]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def training_step(transformer, rows=None):
    """Loss, gradients, and the bytes that autograd keeps from the forward to the backward pass, weights aside."""
    tree = SpanTree.build(SPANS)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    parameters = {name: value for name, value in transformer.named_parameters() if not name.startswith("head.")}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = transformer(tree, rows=rows).square().sum()
    for parameter in parameters.values():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    return loss, torch.autograd.grad(loss, list(parameters.values())), sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [None, [40, 3, 0]], ids=["all rows", "some rows"])
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_checkpointed_layers_give_the_same_and_keep_less(naive, name, rows, dtype):
    """To the last bit; what is kept of a layer is its input."""
    transformer, rows = naive.tiny_model(name, dtype=dtype), rows and torch.tensor(rows)
    loss, gradients, kept = training_step(transformer, rows)
    transformer.prepare_training(compiled=False, checkpointed=True)
    same_loss, same_gradients, kept_less = training_step(transformer, rows)
    assert torch.equal(same_loss, loss)
    assert all(torch.equal(mine, truth) for mine, truth in zip(same_gradients, gradients, strict=True))
    inputs = len(transformer.blocks) * len(SpanTree.build(SPANS).token_ids) * 32 * dtype.itemsize
    assert kept_less + inputs < kept / 3
    transformer.prepare_training(compiled=False, checkpointed=False)
    assert training_step(transformer, rows)[2] == kept


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_policy_and_reference_round_alike(naive, name):
    """The layers around attention in fp32, with gradients, without them and in inference mode, to the last bit."""
    transformer, x = naive.tiny_model(name), torch.randn(37, 32, generator=torch.Generator().manual_seed(0))
    block, results = transformer.blocks[0], []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            normed = block.attention_norm(x)
            results.append(block.after_attention(x, normed, normed.unflatten(1, (4, 8))))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@torch.no_grad()
def test_growing_token_by_token_equals_one_pass(transformer):
    answers = [[11, 12, 13, 14], [21, 22], [31, 32, 33]]
    prefix = SpanTree.build([(IMAGE, -1, "full"), (QUESTION, 0, "causal")])
    tree = prefix.extend([(ids[:1], 1, "causal") for ids in answers], reserve=3)
    whole = prefix.extend([(ids, 1, "causal") for ids in answers])
    cache, other = nan_cache(transformer, tree.capacity), nan_cache(transformer, whole.capacity)
    transformer(prefix, cache)
    transformer(prefix, other)
    expected = transformer(whole, other)
    for step in range(4):
        active = [row for row, ids in enumerate(answers) if step < len(ids)]
        if step:
            tree = tree.grow([2 + row for row in active], torch.tensor([answers[row][step] for row in active]))
        hidden = transformer(tree, cache)
        for row, got in zip(active, hidden, strict=True):
            truth = expected[whole.span_rows(2 + row)][step]
            torch.testing.assert_close(got, truth, rtol=0, atol=1e-11)


def test_initial_weights_come_from_the_seed():
    config = TransformerConfig(vocab_size=20, hidden_size=16, num_layers=8, num_heads=2, num_kv_heads=2, mlp_size=64)
    one, same = (Transformer(config).init_weights(torch.Generator().manual_seed(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert one.blocks[0].mlp.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert one.blocks[0].mlp.up.bias.abs().max() == 0


def test_tied_head_is_the_embedding(naive):
    transformer = naive.tiny_model("rmsnorm-gated-mqa-tied")
    assert transformer.head.weight is transformer.embed.weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": "batchnorm"}, "norm must be one of .*, got 'batchnorm'"),
        ({"block": "serial"}, "block must be one of .*, got 'serial'"),
        ({"activation": "tanh"}, "activation must be one of .*, got 'tanh'"),
        ({"num_heads": 3}, "hidden_size 16 must be a multiple of num_heads 3"),
        ({"num_kv_heads": 3}, "that of num_kv_heads 3"),
    ],
    ids=["norm", "block", "activation", "heads", "kv-heads"],
)
def test_bad_config(change, message):
    shape = {"vocab_size": 20, "hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 4, "mlp_size": 16}
    with pytest.raises(ValueError, match=message):
        TransformerConfig(**(shape | change))
