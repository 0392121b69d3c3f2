"""The cases of span_attention: trees as generation, answering and Pair-DPO grow them, against dense masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hermesflow.benchmarks import naive, peers
from hermesflow.benchmarks.case import Case, graded, with_gradients, wrong_values
from hermesflow.benchmarks.measuring import Call
from hermesflow.kernels.span_attention import span_attention, span_attention_reference
from hermesflow.kernels.span_tree import SpanTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Of a shape class; lengths in tokens."""

    num_heads: int
    head_dim: int
    text: int
    """A prompt, and in Pair-DPO a caption."""
    image: int
    """soi and eoi included."""
    num_images: int
    """Of one prompt, and images that are asked."""
    num_questions: int
    """Of each image."""
    question: int
    answer: int
    num_pairs: int
    dtype: torch.dtype


SHAPES = {
    "tiny": Sizes(
        num_heads=2, head_dim=16, text=5, image=18, num_images=3, num_questions=2, question=4, answer=2, num_pairs=1,
        dtype=torch.float32,
    ),
    "small": Sizes(
        num_heads=8, head_dim=64, text=33, image=258, num_images=4, num_questions=10, question=12, answer=12,
        num_pairs=1, dtype=torch.float32,
    ),
    # Show-o: 32 heads of 64, 1,024 tokens an image at 512 x 512, 128 text tokens.
    "showo-1.3b": Sizes(
        num_heads=32, head_dim=64, text=129, image=1026, num_images=16, num_questions=10, question=16, answer=24,
        num_pairs=4, dtype=torch.bfloat16,
    ),
}  # fmt: skip


def span_cases(sizes: Sizes, device: torch.device) -> Iterator[Case]:
    """The cases of a shape class, each made when it is asked for, so that only one holds its tensors."""
    yield _case("images", sizes, _images(sizes, device), device)
    asked = _asked(sizes, device)
    yield _case("questions", sizes, asked, device)
    yield _case("answers", sizes, _answered(sizes, asked), device)
    yield _case("pairs", sizes, _pairs(sizes, device), device, with_grad=True)


def _images(sizes: Sizes, device: torch.device) -> SpanTree:
    """A step of image generation: a cached prompt, all its images anew."""
    prompt = SpanTree.build([(range(sizes.text), -1, "causal")], device)
    return prompt.extend([(range(sizes.image), 0, "full")] * sizes.num_images)


def _asked(sizes: Sizes, device: torch.device) -> SpanTree:
    """Cached images, the questions about each anew."""
    images = SpanTree.build([(range(sizes.image), -1, "full")] * sizes.num_images, device)
    parents = np.repeat(np.arange(sizes.num_images), sizes.num_questions)
    return images.extend([(range(sizes.question), int(image), "causal") for image in parents])


def _answered(sizes: Sizes, asked: SpanTree) -> SpanTree:
    """One more token of every answer."""
    questions = range(sizes.num_images, asked.num_spans)
    tree = asked.extend([(range(sizes.answer - 1), question, "causal") for question in questions], reserve=1)
    answers = np.arange(asked.num_spans, tree.num_spans)
    return tree.grow(answers, torch.zeros(len(answers), dtype=torch.int64, device=asked.token_ids.device))


def _pairs(sizes: Sizes, device: torch.device) -> SpanTree:
    """Pair-DPO: text with two images; image and question with two captions."""
    spans = []
    for text in range(0, 7 * sizes.num_pairs, 7):
        spans += [(range(sizes.text), -1, "causal"), *[(range(sizes.image), text, "full")] * 2]
        spans += [(range(sizes.image), -1, "full"), (range(sizes.question), text + 3, "causal")]
        spans += [(range(sizes.text), text + 4, "causal")] * 2
    return SpanTree.build(spans, device)


def _case(part: str, sizes: Sizes, tree: SpanTree, device: torch.device, *, with_grad: bool = False) -> Case:
    def normal(num_rows: int) -> Tensor:
        return torch.randn(num_rows, sizes.num_heads, sizes.head_dim, dtype=sizes.dtype, device=device)

    every_q, k, v = (normal(tree.capacity) for _ in range(3))
    leaves = (every_q[tree.slots], k, v)
    upstream = normal(len(tree.token_ids))
    for leaf in leaves:
        leaf.requires_grad_(with_grad)

    def run(backend: str) -> Any:
        forward = partial(span_attention, *leaves, tree, backend=backend)
        return with_gradients(forward, leaves)() if with_grad else forward()

    def results(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], heads: list[int]) -> tuple[Tensor, ...]:
        """Output and gradients, those of the slots in use, of some heads."""
        if not with_grad:
            return (function(*inputs)[:, heads],)
        grad = upstream if inputs[0].shape == upstream.shape else upstream[:, checked]
        out, grad_q, *grads = graded(function, list(inputs), grad)
        return out[:, heads], grad_q[:, heads], *(grad[used][:, heads] for grad in grads)

    used = _used_slots(tree).to(device)
    checked = [0, sizes.num_heads - 1]  # heads do not meet, so that the truth of two is enough

    def check(backend: str) -> str | None:
        got = results(partial(span_attention, tree=tree, backend=backend), leaves, checked)
        reference, some = partial(span_attention_reference, tree=tree), [leaf.detach()[:, checked] for leaf in leaves]
        truth = results(reference, tuple(leaf.double() for leaf in some), [0, 1])
        eager = results(reference, tuple(some), [0, 1])
        return wrong_values("out grad_q grad_k grad_v" if with_grad else "out", got, truth, eager)

    slots, mask = (part.to(device) for part in _padded_sequences(tree))
    batch = tuple(part.detach()[slots].transpose(1, 2).requires_grad_(with_grad) for part in (every_q, k, v))

    def dense(function: Callable[..., Tensor]) -> Call:
        forward = partial(function, *batch, mask)
        return with_gradients(forward, batch) if with_grad else forward

    def flex() -> Call:
        forward = peers.flex_tree(*leaves, tree)
        return with_gradients(forward, leaves) if with_grad else forward

    libraries = {
        name: partial(peers.dense_spans, *leaves, tree, backend)
        for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION))
    }
    last_column = sum(int(tree.lengths[span]) for span in _lineage(tree, tree.num_spans - 1)) - 1

    def agrees(result: Any) -> bool:
        """The last token's output, which the dense batch has in its last sequence."""
        out = result[0] if isinstance(result, tuple) else result
        found = out[-1, :, last_column] if out.dim() == 4 else out[-1]
        expected = span_attention_reference(*(leaf.detach() for leaf in leaves), tree)[-1]
        return bool((found - expected).abs().max() < 0.05)

    num_tokens, num_queries = len(used), len(tree.token_ids)
    q_bytes, kv_bytes = leaves[0].nbytes, 2 * num_tokens * sizes.num_heads * sizes.head_dim * k.itemsize
    products = 4 * sizes.num_heads * sizes.head_dim * _num_attended(tree)  # q k^T and p v
    return Case(
        op="span_attention",
        part=part,
        dtype=sizes.dtype,
        short=part == "answers",
        run=run,
        check=check,
        shape=f"{num_queries} of {num_tokens} tokens, {tree.num_spans} spans, H {sizes.num_heads}, d {sizes.head_dim}",
        naive=dense(naive.dense_attention),
        compiled=dense(torch.compile(naive.dense_attention)),
        peers={"flex": flex} | (libraries if part == "images" else {}),
        agrees=agrees,
        # q, k, v and out; backward these and out's gradient again, three gradients.
        num_bytes=2 * q_bytes + kv_bytes + with_grad * (4 * q_bytes + 2 * kv_bytes),
        num_flops=products + with_grad * products * 5 // 2,  # five products backward
    )


def _used_slots(tree: SpanTree) -> Tensor:
    spans = zip(tree.starts, tree.lengths, strict=True)
    return torch.from_numpy(np.concatenate([np.arange(start, start + length) for start, length in spans]))


def _lineage(tree: SpanTree, span: int) -> list[int]:
    """The span's ancestors, root first, and itself."""
    lineage = [span]
    while tree.parents[lineage[0]] >= 0:
        lineage.insert(0, int(tree.parents[lineage[0]]))
    return lineage


def _num_attended(tree: SpanTree) -> int:
    """Pairs of a new token and a token that it attends to."""
    total = 0
    for span in np.flatnonzero(tree.num_new):
        new = int(tree.num_new[span])
        total += new * sum(int(tree.lengths[part]) for part in _lineage(tree, span))
        total -= 0 if tree.full[span] else new * (new - 1) // 2
    return total


def _padded_sequences(tree: SpanTree) -> tuple[Tensor, Tensor]:
    """What the published code runs: each leaf and its ancestors as one sequence, all padded to one length.

    Returns: slots int64 [B, L], 0 where padded, and the dense mask bool [B, 1, L, L].
    """
    leaves = sorted(set(range(tree.num_spans)) - set(tree.parents.tolist()))
    lineages = [_lineage(tree, leaf) for leaf in leaves]
    length = max(sum(int(tree.lengths[span]) for span in lineage) for lineage in lineages)
    slots = torch.zeros(len(leaves), length, dtype=torch.int64)
    mask = torch.zeros(len(leaves), 1, length, length, dtype=torch.bool)
    for row, lineage in enumerate(lineages):
        end = 0
        for span in lineage:
            start, end = end, end + int(tree.lengths[span])
            slots[row, start:end] = int(tree.starts[span]) + torch.arange(end - start)
            own = torch.ones(end - start, end - start, dtype=torch.bool)
            mask[row, 0, start:end, :start] = True
            mask[row, 0, start:end, start:end] = own if tree.full[span] else own.tril()
        mask[row, 0, end:, 0] = True  # a pad that sees nothing would have no softmax
    return slots, mask
