"""Log-probabilities over span trees against dense sequences: values and the gradient of every parameter."""

import pytest
import torch

from hermesflow.engine.sequence_logprob import next_token_targets, span_logprobs
from hermesflow.kernels.span_tree import SpanTree


@pytest.fixture(params=["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied"])
def transformer(request, naive):
    return naive.tiny_model(request.param, dtype=torch.float64)


def image_tree(layout):
    """A prompt with a win and a lose image under one mask: the tree of a training step."""
    num_tokens, generator = layout.num_image_tokens, torch.Generator().manual_seed(0)
    masked = torch.arange(num_tokens) % 3 == 0
    images = torch.randint(0, layout.codebook_size, (2, num_tokens), generator=generator)
    prompt = layout.text_prompt([5, 6])
    leaves = []
    for codes in images:
        ids = torch.where(masked, layout.mask_id, codes + layout.code_offset)
        leaves.append([layout.soi, *ids.tolist(), layout.eoi])
    tree = SpanTree.build([(prompt, -1, "causal"), *[(leaf, 0, "full") for leaf in leaves]])
    where = torch.nonzero(masked).flatten()
    rows = torch.cat([tree.span_rows(span).start + 1 + where for span in (1, 2)])
    targets = images[:, masked].flatten() + layout.code_offset
    sequences = [((prompt, "causal"), (leaf, "full")) for leaf in leaves]
    return tree, rows, targets, sequences, len(prompt) + 1 + where


def test_masked_image_tokens_and_gradients(naive, layout, transformer):
    tree, rows, targets, sequences, positions = image_tree(layout)
    got = span_logprobs(transformer, tree, rows, targets)
    truth = torch.cat(
        [
            naive.chain_logits(transformer, *sequence)[positions].log_softmax(1).gather(1, part[:, None]).squeeze(1)
            for sequence, part in zip(sequences, targets.chunk(2), strict=True)
        ]
    )
    torch.testing.assert_close(got, truth, rtol=0, atol=1e-10)
    weight = torch.linspace(-1, 1, len(got), dtype=torch.float64)
    names, parameters = zip(*transformer.named_parameters(), strict=True)
    mine = torch.autograd.grad((got * weight).sum(), parameters)
    expected = torch.autograd.grad((truth * weight).sum(), parameters)
    for name, one, other in zip(names, mine, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("with_end", [False, True], ids=["eot-in-span", "eot-after-span"])
def test_captions(naive, layout, transformer, with_end):
    """Win and lose captions after one image and question; the question's last token predicts their first."""
    image, question = layout.image_prefix(range(layout.num_image_tokens)), layout.question([5, 6])
    captions = [[7, 8, 9, layout.eot], [10, layout.eot]]
    inputs = [ids[:-1] if with_end else ids for ids in captions]
    tree = SpanTree.build([(image, -1, "full"), (question, 0, "causal"), *[(ids, 1, "causal") for ids in inputs]])
    rows, targets = next_token_targets(tree, [2, 3], end=layout.eot if with_end else None)
    assert targets.tolist() == [token for ids in captions for token in ids]
    got = span_logprobs(transformer, tree, rows, targets)
    truth = []
    for ids in captions:
        logprobs = naive.chain_logits(transformer, (image, "full"), ([*question, *ids], "causal")).log_softmax(1)
        truth += [logprobs[len(image) + len(question) - 1 + index, token] for index, token in enumerate(ids)]
    torch.testing.assert_close(got, torch.stack(truth), rtol=0, atol=1e-10)


def test_fp32(naive, layout):
    tree, rows, targets, *_ = image_tree(layout)
    got = span_logprobs(naive.tiny_model(), tree, rows, targets)
    assert got.dtype == torch.float32
    truth = span_logprobs(naive.tiny_model(dtype=torch.float64), tree, rows, targets)
    torch.testing.assert_close(got, truth.float(), rtol=1e-5, atol=1e-5)


def test_one_span_and_none():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3, 4, 5], 0, "causal"), ([6], 1, "causal")])
    rows, targets = next_token_targets(tree, 1)
    assert (rows.tolist(), targets.tolist()) == ([1, 2, 3], [3, 4, 5])
    rows, targets = next_token_targets(tree, 2, end=9)
    assert (rows.tolist(), targets.tolist()) == ([4, 5], [6, 9])
    rows, targets = next_token_targets(tree, [])
    assert rows.shape == targets.shape == (0,)
    assert rows.dtype == targets.dtype == torch.int64


def test_messages():
    tree = SpanTree.build([([1, 2], -1, "causal"), ([3], 0, "full")])
    for span in (0, 1):
        with pytest.raises(ValueError, match=rf"expected new causal spans with a parent, got spans \[{span}\]"):
            next_token_targets(tree, span)
    later = tree.extend([([4], 0, "causal")])
    with pytest.raises(ValueError, match="expected new parents, whose last rows predict; got cached ones"):
        next_token_targets(later, 2)
