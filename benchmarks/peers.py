"""Public libraries that offer an op's function, each behind one small function.

Such a function takes the case's tensors and returns a call without arguments, ready to be timed; it raises Unavailable
with the reason where the library cannot run. Where a peer does less (no bias, the sum alone, no confidence of the draw)
its docstring says so: the difference is in the peer's favor.
"""

from __future__ import annotations

import importlib
import importlib.util
from importlib import metadata
from types import ModuleType
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from hermesflow.benchmarks.case import with_gradients
from hermesflow.benchmarks.measuring import Call

if TYPE_CHECKING:
    from hermesflow.kernels.span_tree import SpanTree


class Unavailable(Exception):
    """The peer cannot run here; the message is the reason."""


def _load(module: str, device: torch.device, *, needs_cuda: bool = True) -> ModuleType:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise Unavailable(f"{package} is not installed")
    if needs_cuda and device.type != "cuda":
        raise Unavailable(f"{package} needs CUDA")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise Unavailable(f"{module} does not load: {error}") from error
        raise Unavailable(f"{package} {metadata.version(package)} has no {module} any more") from error
    except ImportError as error:
        raise Unavailable(f"{module} does not load: {error}") from error


# Sampling: tokens [R], no confidence.


def flashinfer_guided(cond: Tensor, uncond: Tensor, guidance_scale: float) -> Call:
    """Guidance in torch, FlashInfer's draw from the logits."""
    sampling = _load("flashinfer.sampling", cond.device)
    return lambda: sampling.sampling_from_logits((1 + guidance_scale) * cond - guidance_scale * uncond)


def flashinfer_linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Call:
    """The head in torch, FlashInfer's draw from the logits."""
    sampling = _load("flashinfer.sampling", hidden.device)
    return lambda: sampling.sampling_from_logits(F.linear(hidden, weight, bias))


def flashinfer_token(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Call:
    """FlashInfer's rejection sampling, top-k first."""
    sampling, top_k = _load("flashinfer.sampling", logits.device), top_k.int()
    return lambda: sampling.top_k_top_p_sampling_from_logits(
        logits.float() / temperature[:, None], top_k, top_p, filter_apply_order="top_k_first"
    )


# Log-probabilities: value and gradients.


def trl_logprob(logits: Tensor, target: Tensor) -> Call:
    """TRL's selective_log_softmax."""
    utils = _load("trl.trainer.utils", logits.device, needs_cuda=False)
    return with_gradients(lambda: utils.selective_log_softmax(logits, target), (logits,))


def liger_logprob(logits: Tensor, target: Tensor) -> Call:
    """Liger's cross entropy, the sum. It writes the gradient over its input, so that it gets a copy of its own.

    From the second call on that copy holds the first call's gradient: the time does not depend on the values.
    """
    transformers = _load("liger_kernel.transformers", logits.device)
    loss = transformers.LigerCrossEntropyLoss(reduction="sum")
    logits = logits.detach().clone().requires_grad_()
    return with_gradients(lambda: loss(logits, target), (logits,))


def quack_logprob(logits: Tensor, target: Tensor) -> Call:
    """QuACK's cross entropy."""
    module = _load("quack.cross_entropy", logits.device)
    return with_gradients(lambda: module.cross_entropy(logits, target, reduction="none"), (logits,))


def trl_linear(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Call:
    """TRL's chunked log-probability with the chunk of its trainers; no entropy. Its newest versions do without it."""
    kernels = _load("trl.kernels", x.device)
    options = (1.0, 32768, None, 1.0, ())  # temperature, chunk_size, softcap, logit_scale, further outputs
    call = kernels.ChunkedLogProbFunction.apply
    leaves = (x, weight) if bias is None else (x, weight, bias)
    return with_gradients(lambda: call(x, weight, bias, target, *options)[0], leaves)


def liger_linear(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Call:
    """Liger's fused linear cross entropy, the sum, gradients accumulated in fp32 as ours are."""
    transformers = _load("liger_kernel.transformers", x.device)
    loss = transformers.LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    leaves = (x, weight) if bias is None else (x, weight, bias)
    return with_gradients(lambda: loss(weight, x, target, bias), leaves)


def cce_linear(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    """Apple's Cut Cross-Entropy, the sum, without bias; its gradient filter, which is not exact, is off."""
    module = _load("cut_cross_entropy", x.device)
    return with_gradients(
        lambda: module.linear_cross_entropy(x, weight, target, reduction="sum", filter_eps=None), (x, weight)
    )


def quack_linear(x: Tensor, weight: Tensor, target: Tensor) -> Call:
    """QuACK's chunked linear cross entropy, the sum, without bias."""
    module = _load("quack.linear_cross_entropy", x.device)
    return with_gradients(lambda: module.chunked_linear_cross_entropy(x, weight, target, reduction="sum"), (x, weight))


# Attention.


def dense_spans(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree, backend: SDPBackend) -> Call:
    """torch's attention by one of its libraries, forward: equal full spans behind one cached parent, without a mask."""
    if q.device.type != "cuda" and backend != SDPBackend.MATH:
        raise Unavailable(f"{backend.name} needs CUDA")
    prefix, length = int(tree.lengths[0]), int(tree.lengths[-1])
    own = slice(int(tree.starts[1]), int(tree.starts[1]) + len(q))

    def batch(shared: Tensor | None, rows: Tensor) -> Tensor:
        rows = rows.unflatten(0, (-1, length))
        rows = rows if shared is None else torch.cat([shared.expand(len(rows), -1, -1, -1), rows], dim=1)
        return rows.transpose(1, 2).contiguous()

    first = slice(int(tree.starts[0]), int(tree.starts[0]) + prefix)
    query, key, value = batch(None, q), batch(k[first], k[own]), batch(v[first], v[own])

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)

    return run


def flex_tree(q: Tensor, k: Tensor, v: Tensor, tree: SpanTree) -> Call:
    """FlexAttention over the packed tree, forward; its block mask is made once, outside the time."""
    if q.device.type != "cuda":
        raise Unavailable("FlexAttention trains and decodes on CUDA only")
    span_of_slot = torch.full((tree.capacity,), -1)
    for span, (start, length) in enumerate(zip(tree.starts, tree.lengths, strict=True)):
        span_of_slot[start : start + length] = span
    sees = torch.eye(tree.num_spans + 1, dtype=torch.bool)  # the last row and column stand for unused slots, -1
    sees[-1] = False
    for span, parent in enumerate(tree.parents):
        if parent >= 0:
            sees[span] |= sees[parent]
    span_of_slot, sees = span_of_slot.to(q.device), sees.to(q.device)
    full, slots = torch.from_numpy(tree.full).to(q.device), tree.slots

    def allowed(_batch: Tensor, _head: Tensor, row: Tensor, slot: Tensor) -> Tensor:
        own, other = span_of_slot[slots[row]], span_of_slot[slot]
        return sees[own, other] & ((own != other) | full[own] | (slot <= slots[row]))

    mask = create_block_mask(allowed, None, None, len(q), len(k), device=q.device)
    attend = torch.compile(flex_attention, dynamic=False)
    packed = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    return lambda: attend(*packed, block_mask=mask)[0].transpose(0, 1)
