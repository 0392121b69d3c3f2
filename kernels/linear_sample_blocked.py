"""Backends "cuda" and "cpu" of linear_sample: a library matmul per block of rows, guided_sample's kernel on its logits.

The kernel adds the bias where it reads the logits, so that they are written once and read once. A block's fp32 logits
are all the memory that is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .extension_ops import guided_sample
from .matmul import logits_of
from .philox import RandomKey

# A block's fp32 logits. CPU, [2048, 512] x [8192, 512]: 64 MiB takes 1.1 times the bare matmul, 4 MiB twice, for the
# matmul lays the weight out anew in each block. CUDA: not measured yet.
WORKSPACE_BYTES = 64 << 20


@torch.no_grad()
def linear_sample(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """kernels/linear_sample.py states arguments and returns."""
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    bias = None if bias is None else bias.float()
    if hidden.device.type == "cpu":
        hidden, weight = hidden.float(), weight.float()  # CPU matmuls have no wider output than input
    token = torch.empty(num_rows, dtype=torch.int64, device=hidden.device)
    logprob = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
    block_rows = max(1, WORKSPACE_BYTES // (4 * vocab_size))
    for start in range(0, num_rows, block_rows):
        rows = slice(start, start + block_rows)
        step = key.step[rows] if key.step.dim() else key.step
        block_key = RandomKey(key.seed[rows], step, key.position[rows])
        with torch.autocast(hidden.device.type, enabled=False):
            logits = logits_of(hidden[rows], weight)
        token[rows], logprob[rows] = guided_sample(
            logits, None, guidance_scale=0.0, temperature=temperature, key=block_key, bias=bias
        )
    return token, logprob
