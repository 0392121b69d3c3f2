"""Driver of every backend of linear_logprob but torch: it walks blocks of the logits.

    z[t, v]  = x[t] . weight[v] + bias[v]                  lse[t] = log sum_v exp(z[t, v])
    dz[t, v] = grad_logprob[t] * ((v == target[t]) - exp(z[t, v] - lse[t]))
    grad_x[t] = sum_v dz[t, v] weight[v]      grad_weight[v] = sum_t dz[t, v] x[t]      grad_bias[v] = sum_t dz[t, v]

Forward: each block of z goes into four running values a row. Backward: each block becomes dz, from which two matmuls
make its part of the gradients. Saved in between are the inputs and lse; and on a GPU, of as many rows as KEPT_BYTES
hold, E = exp(z - maximum of its TILE ids) in x's dtype with those maxima, which spares a matmul: the blocks of further
rows are computed again. On a CPU writing and reading them takes as long as that matmul (two cores of an EPYC, T 2048, V
58498: 1,406 ms with them and 1,390 without at D 512). Every sum is fp32; dz is rounded to x's dtype for the matmuls,
save on the CPU, whose matmuls all take fp32, and a rounded E adds no more than that. A backend brings the steps
(Kernels).

Blocks of the vocabulary are the outer loop and blocks of rows the inner one, so a block of grad_weight is complete when
the inner loop ends, and only grad_x waits in fp32 to the end of the walk. What is held beside inputs, outputs,
gradients and some vectors of T and V values stays below WORKSPACE_BYTES, whatever T. With more than
WORKSPACE_BYTES / 8 / D rows the fp32 grad_x would not fit; then the rows go in several passes, and grad_weight waits in
fp32 from pass to pass: in itself where it is fp32, else in 4 V D further bytes, the one thing beyond the workspace.

Ignored rows take part in no matmul. How many rows remain is read from the device, once in each direction: these ops do
not go into a CUDA graph. torch.compile sees two opaque ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hermesflow.kernels.checks import wants_gradient
from hermesflow.kernels.matmul import logits_of, multiply, new_block

# A GPU's matmuls want thousands of rows and ids (a guess, unmeasured). A CPU's block of logits, 16 MiB, should stay in
# its last cache. On a Zen 5, T 2048, D 512, V 58498, blocks of 512, 1024 and 2048 ids take the same time on one core;
# on two that other processes use too 5.8, 4.5 and 3.7 s, since each block makes the threads wait for one another.
BLOCK_ROWS = {"cuda": 4096, "cpu": 2048}
BLOCK_IDS = {"cuda": 4096, "cpu": 2048}
WORKSPACE_BYTES = {"cuda": 512 << 20, "cpu": 128 << 20}
KEPT_BYTES = 4 << 30
"""Of E, from the forward pass to the backward pass; only where a gradient is wanted."""
TILE = 128
"""Ids whose z are kept by their distance to one maximum."""

LARGEST, TOTAL, WEIGHTED, CHOSEN = range(4)
"""Rows of the running state, fp32 [4, T]: the maximum of z; over y = z - maximum the sums of exp(y) and of y exp(y);
and z at the target (NaN until its block comes)."""


class Rows:
    """The labeled rows of x, handed out in contiguous blocks of the dtype that the matmuls take."""

    def __init__(self, x: Tensor, target: Tensor, ignore_index: int) -> None:
        kept = (target != ignore_index).nonzero().squeeze(1)
        self.x, self.kept = x, None if len(kept) == len(target) else kept
        self.count = len(kept)
        self.dtype = torch.float32 if x.device.type == "cpu" else x.dtype
        self._last: tuple[slice | None, Tensor | None] = None, None

    def block(self, rows: slice) -> Tensor:
        """The last block is kept: where one block holds all rows, each block of the vocabulary finds it again."""
        if self._last[0] != rows:
            block = self.x[rows] if self.kept is None else self.x.index_select(0, self.kept[rows])
            self._last = rows, block.to(self.dtype).contiguous()
        return self._last[1]

    def select(self, values: Tensor) -> Tensor:
        """The labeled rows' part of a vector [T], contiguous."""
        return values.contiguous() if self.kept is None else values.index_select(0, self.kept)

    def put(self, out: Tensor, start: int, values: Tensor) -> None:
        """Write the values of the labeled rows from start on to their places in out."""
        if self.kept is None:
            out[start : start + len(values)] = values
        else:
            out.index_copy_(0, self.kept[start : start + len(values)], values.to(out.dtype))


class Kept(NamedTuple):
    """What is kept of the first rows' logits: values E [R, V], and tops fp32 [R, V / TILE], the maxima."""

    values: Tensor
    tops: Tensor

    def block(self, rows: slice, ids: slice) -> Kept | None:
        """Of a block; None where its rows are not kept."""
        if rows.stop > len(self.values):
            return None
        tiles = slice(ids.start // TILE, -(-ids.stop // TILE))
        return Kept(self.values[rows, ids], self.tops[rows, tiles])


class Kernels(NamedTuple):
    """The steps that a backend brings, for a block of fp32 logits whose ids begin at first_id; bias is fp32."""

    update: Callable[[Tensor, Tensor | None, Tensor, int, Tensor, Kept | None], None]
    """(logits, bias, target, first_id, state, kept): takes the block into the state, and keeps it."""
    gradient: Callable[[Tensor, Tensor | None, Tensor, Tensor, Tensor, int, Tensor], None]
    """(logits, bias, target, lse, grad_logprob, first_id, dz): fills dz, which may be the logits themselves."""
    kept_gradient: Callable[[Kept, Tensor, Tensor, Tensor, int, Tensor], None] | None = None
    """(kept, target, lse, grad_logprob, first_id, dz): likewise from what was kept. None: nothing is kept."""


KERNELS: dict[str, Kernels] = {}


def linear_logprob(
    kernels: str,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    return_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """The op with KERNELS[kernels]: logprob, differentiable in x, weight and bias, and the entropy or None."""
    keep = wants_gradient(x, weight, bias)
    logprob, _, entropy, _, _ = _forward(x, weight, bias, target, ignore_index, kernels, keep)
    return logprob, entropy if return_entropy else None


@torch.library.custom_op("hermesflow::linear_logprob", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, ignore_index: int, kernels: str, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logprob, lse and entropy, fp32 [T], 0 in ignored rows; and what is kept, of labeled rows."""
    rows, kept = Rows(x, target, ignore_index), _new_kept(x, weight, kernels, keep)
    kept.values[:, len(weight) :] = 0
    state = torch.tensor([float("-inf"), 0.0, 0.0, float("nan")], device=x.device)[:, None].repeat(1, rows.count)
    if rows.count:
        with torch.autocast(x.device.type, enabled=False):
            wide_bias = None if bias is None else bias.float().contiguous()
            _fill_state(KERNELS[kernels], rows, weight, wide_bias, rows.select(target), state, kept)
    log_total = state[TOTAL].log()
    outs = tuple(x.new_zeros(x.shape[0], dtype=torch.float32) for _ in range(3))
    rows.put(outs[0], 0, (state[CHOSEN] - state[LARGEST]) - log_total)
    rows.put(outs[1], 0, state[LARGEST] + log_total)
    rows.put(outs[2], 0, log_total - state[WEIGHTED] / state[TOTAL])
    return *outs, *kept


def _new_kept(x: Tensor, weight: Tensor, kernels: str, keep: bool) -> Kept:
    dtype, num_tiles = torch.float32 if x.device.type == "cpu" else x.dtype, -(-len(weight) // TILE)
    can_keep = KERNELS[kernels].kept_gradient is not None and block_sizes(x.device, x.shape[1]).ids % TILE == 0
    num_rows = min(len(x), KEPT_BYTES // (num_tiles * TILE * dtype.itemsize)) if keep and can_keep else 0
    return Kept(
        *(x.new_empty(num_rows, num_tiles * size, dtype=of) for size, of in ((TILE, dtype), (1, torch.float32)))
    )


def _fill_state(
    kernels: Kernels, rows: Rows, weight: Tensor, bias: Tensor | None, target: Tensor, state: Tensor, kept: Kept
) -> None:
    """Takes all blocks in; the rows that are kept end a block."""
    sizes = block_sizes(weight.device, weight.shape[1])
    for ids in slices(0, len(weight), sizes.ids):
        weight_block = weight[ids].to(rows.dtype).contiguous()
        bias_block = None if bias is None else bias[ids]
        for block in row_slices(0, rows.count, sizes.rows, len(kept.values)):
            logits = logits_of(rows.block(block), weight_block)
            kernels.update(logits, bias_block, target[block], ids.start, state[:, block], kept.block(block, ids))


@torch.library.custom_op("hermesflow::linear_logprob_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _backward(
    grad_logprob: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse: Tensor,
    kept_values: Tensor,
    kept_tops: Tensor,
    ignore_index: int,
    kernels: str,
    needed: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; empty where not needed."""
    rows, kept = Rows(x, target, ignore_index), Kept(kept_values, kept_tops)
    sizes = block_sizes(x.device, x.shape[1])
    gradients = _Gradients(rows, weight, needed, sizes)
    vectors = [rows.select(values) for values in (target, lse, grad_logprob)]
    wide_bias = None if bias is None else bias.float().contiguous()
    with torch.autocast(x.device.type, enabled=False):
        for in_pass in slices(0, rows.count, gradients.pass_rows):
            for ids in slices(0, len(weight), sizes.ids):
                weight_block = weight[ids].to(rows.dtype).contiguous()
                bias_block = None if wide_bias is None else wide_bias[ids]
                for block in row_slices(in_pass.start, in_pass.stop, sizes.rows, len(kept_values)):
                    x_block, of_block = rows.block(block), [vector[block] for vector in vectors]
                    kept_block = kept.block(block, ids)
                    dz = _dz(KERNELS[kernels], x_block, weight_block, bias_block, of_block, ids.start, kept_block)
                    gradients.add(dz, x_block, weight_block, block, ids)
                gradients.end_ids(ids)
            gradients.end_pass(in_pass)
    return gradients.x, gradients.weight, gradients.wide_bias.to(x.dtype)


class _Gradients:
    """The gradients that are needed, and the fp32 sums that become them block by block; the others are empty."""

    def __init__(self, rows: Rows, weight: Tensor, needed: list[bool], sizes: BlockSizes) -> None:
        self.rows = rows
        self.need_x, self.need_weight, self.need_bias = needed
        self.pass_rows = sizes.pass_rows if self.need_x else max(rows.count, 1)
        num_ids, width = weight.shape

        def new(needed: bool, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return weight.new_empty(shape if needed else (0,), dtype=dtype)

        self.x = new(self.need_x, *rows.x.shape, dtype=weight.dtype)
        self.weight = new(self.need_weight, num_ids, width, dtype=weight.dtype)
        self.wide_x = new(self.need_x, min(rows.count, self.pass_rows), width)
        self.wide_bias = new(self.need_bias, num_ids).zero_()
        # One block of ids is enough unless they wait from pass to pass.
        self.held_ids = sizes.ids if rows.count <= self.pass_rows else num_ids
        in_place = weight.dtype == torch.float32
        self.wide_weight = None if in_place else new(self.need_weight, min(self.held_ids, num_ids), width)
        if rows.kept is not None:
            self.x.zero_()
        if rows.count == 0:
            self.weight.zero_()

    def add(self, dz: Tensor, x: Tensor, weight: Tensor, rows: slice, ids: slice) -> None:
        """Add what one block contributes."""
        if self.need_x:
            first = rows.start % self.pass_rows
            multiply(dz, weight, self.wide_x[first : first + len(x)], add=ids.start > 0)
        if self.need_weight:
            multiply(dz.t(), x, self._weight_sum(ids), add=rows.start > 0)
        if self.need_bias:
            self.wide_bias[ids] += dz.sum(0, dtype=torch.float32)

    def end_ids(self, ids: slice) -> None:
        if self.need_weight and self.wide_weight is not None:
            self.weight[ids] = self._weight_sum(ids)

    def end_pass(self, rows: slice) -> None:
        if self.need_x:
            self.rows.put(self.x, rows.start, self.wide_x[: rows.stop - rows.start])

    def _weight_sum(self, ids: slice) -> Tensor:
        if self.wide_weight is None:
            return self.weight[ids]
        first = ids.start % self.held_ids
        return self.wide_weight[first : first + ids.stop - ids.start]


class BlockSizes(NamedTuple):
    rows: int
    ids: int
    pass_rows: int


def block_sizes(device: torch.device, width: int) -> BlockSizes:
    """Half of the workspace is for grad_x, a sixteenth for a block of x or weight in fp32, the rest for z and dz."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    in_half = max(1, WORKSPACE_BYTES[kind] // 2 // (4 * max(width, 1)))
    longest = max(1, in_half // 8)
    return BlockSizes(min(BLOCK_ROWS[kind], longest), min(BLOCK_IDS[kind], longest), in_half)


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def row_slices(start: int, stop: int, step: int, num_kept: int) -> Iterator[slice]:
    """slices, of which none has rows that are kept and others."""
    yield from slices(start, min(stop, num_kept), step)
    yield from slices(max(start, num_kept), stop, step)


def _dz(
    kernels: Kernels,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vectors: list[Tensor],
    first_id: int,
    kept: Kept | None,
) -> Tensor:
    """dz of a block in x's dtype, from what was kept or by the matmul again."""
    if kept is not None:
        dz = new_block(x, weight, x.dtype)
        kernels.kept_gradient(kept, *vectors, first_id, dz)
        return dz
    logits = logits_of(x, weight)
    dz = logits if x.dtype == torch.float32 else new_block(x, weight, x.dtype)
    kernels.gradient(logits, bias, *vectors, first_id, dz)
    return dz


@_forward.register_fake
def _forward_fake(x, weight, bias, target, ignore_index, kernels, keep):
    vectors = (x.new_empty(x.shape[0], dtype=torch.float32) for _ in range(3))
    return *vectors, *_new_kept(x, weight, kernels, keep)


@_backward.register_fake
def _backward_fake(grad_logprob, x, weight, bias, target, lse, kept_values, kept_tops, ignore_index, kernels, needed):
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(shape if wanted else (0,)) for shape, wanted in zip(shapes, needed, strict=True))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    x, weight, bias, target, ctx.ignore_index, ctx.kernels, _ = inputs
    _, lse, entropy, *kept = output
    ctx.save_for_backward(x, weight, bias, target, lse, *kept)
    ctx.mark_non_differentiable(lse, entropy, *kept)


def _differentiate(ctx: Any, grad_logprob: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    gradients = _backward(grad_logprob, *ctx.saved_tensors, ctx.ignore_index, ctx.kernels, needed)
    return *(grad if wanted else None for grad, wanted in zip(gradients, needed, strict=True)), *(None,) * 4


_forward.register_autograd(_differentiate, setup_context=_setup_context)
