"""Backends of linear_sample but torch: a library matmul per block of rows, guided_sample's kernel on its logits.

The kernel adds the bias where it reads the logits, so that they are written once and read once. A block's fp32 logits
are all the memory that is needed; on CUDA it is two blocks, and the draw of one runs beside the matmul of the next.
torch.compile sees one opaque op.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from hermesflow.kernels.matmul import logits_of, multiply, new_block
from hermesflow.kernels.philox import RandomKey

# A block's fp32 logits. CPU, [2048, 512] x [8192, 512] on 2 cores: 4 to 16 MiB take 55 ms, 64 MiB 69 ms. CUDA: not
# measured; large enough for the matmul, in reach of an H100's L2 cache.
WORKSPACE_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}

_KERNELS = {
    "extension": "hermesflow.kernels.extension_ops",
    "triton": "hermesflow.kernels.guided_sample_triton",
}
"""Where the guided_sample lies that takes a bias."""


@torch.no_grad()
def by_extension(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """Backends "cuda" and "cpu" of kernels/linear_sample.py."""
    return _linear_sample(hidden, weight, bias, temperature, *key, "extension")


@torch.no_grad()
def by_triton(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, temperature: float, key: RandomKey
) -> tuple[Tensor, Tensor]:
    """Backend "triton" of kernels/linear_sample.py."""
    return _linear_sample(hidden, weight, bias, temperature, *key, "triton")


@torch.library.custom_op("hermesflow::linear_sample", mutates_args=())
def _linear_sample(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperature: float,
    seed: Tensor,
    step: Tensor,
    position: Tensor,
    kernel: str,
) -> tuple[Tensor, Tensor]:
    guided_sample = import_module(_KERNELS[kernel]).guided_sample
    num_rows, vocab_size = hidden.shape[0], weight.shape[0]
    bias = None if bias is None else bias.float().contiguous()
    if hidden.device.type == "cpu":
        hidden, weight = hidden.float(), weight.float()  # CPU matmuls have no wider output than input
    token, logprob = _empty(hidden)
    block_rows = max(1, WORKSPACE_BYTES[hidden.device.type] // (4 * vocab_size))
    blocks = [slice(start, min(start + block_rows, num_rows)) for start in range(0, num_rows, block_rows)]

    def draw(rows: slice, logits: Tensor) -> None:
        key = RandomKey(seed[rows], step[rows] if step.dim() else step, position[rows])
        token[rows], logprob[rows] = guided_sample(
            logits, None, guidance_scale=0.0, temperature=temperature, key=key, bias=bias
        )

    with torch.autocast(hidden.device.type, enabled=False):
        if hidden.is_cuda and len(blocks) > 1:
            main, side = torch.cuda.current_stream(hidden.device), _side_stream(hidden.device)
            _draw_beside_matmuls(hidden, weight, blocks, draw, main, side)
        else:
            for rows in blocks:
                # No name for the logits: it would hold this block while the next one is made.
                draw(rows, logits_of(hidden[rows], weight))
    return token, logprob


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _draw_beside_matmuls(
    hidden: Tensor,
    weight: Tensor,
    blocks: list[slice],
    draw: Callable[[slice, Tensor], None],
    main: torch.cuda.Stream,
    side: torch.cuda.Stream,
) -> None:
    """Matmuls on the stream `main`, draws on `side`, each block in one of two workspaces.

    A matmul waits until the draw before last has read its workspace. In the end `main` waits for `side`, so that all
    memory may be freed by the order of `main`, and a CUDA graph of `main` holds both.
    """
    workspaces = [new_block(hidden[blocks[0]], weight, torch.float32) for _ in range(2)]
    drawn: list[torch.cuda.Event] = []
    try:
        for index, rows in enumerate(blocks):
            if index >= 2:
                main.wait_event(drawn[index - 2])
            logits = workspaces[index % 2][: rows.stop - rows.start]
            multiply(hidden[rows], weight.t(), logits)
            side.wait_stream(main)
            with torch.cuda.stream(side):
                draw(rows, logits)
            drawn.append(side.record_event())
    finally:  # also where memory runs out: what is freed then must not be written to any more
        main.wait_stream(side)


@_linear_sample.register_fake
def _linear_sample_fake(hidden, weight, bias, temperature, seed, step, position, kernel):
    return _empty(hidden)


def _empty(hidden: Tensor) -> tuple[Tensor, Tensor]:
    num_rows = hidden.shape[0]
    return hidden.new_empty(num_rows, dtype=torch.int64), hidden.new_empty(num_rows, dtype=torch.float32)
