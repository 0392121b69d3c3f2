"""What an H200 should reach: predictions from bytes, FLOPs, instructions and launches, for want of a measurement.

    python -m hermesflow.benchmarks.roof_model

An op's time is that of its slowest resource. Instructions of a loop were counted in SASS that Triton 3.9 and nvcc 13
made for sm_90(a), for 512 bytes of loads; the useful share of attention's tiles is that of its plan, by test.
Everything in Assumptions is a guess but for the two rates, which were measured on such a device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Of the device, and of how close to its rates kernels come."""

    copy: float = 4.3e12
    """Bytes a second, measured."""
    matmul: float = 790e12
    """FLOPs a second, bf16, 8,192 cubed, measured."""
    num_sms: int = 132
    clock: float = 1.98e9
    """Where memory binds."""
    issue: float = 0.82
    """Share of issue slots that a long loop fills: 0.75 to 0.9."""
    latency: float = 650e-9
    """Of a load under traffic: 550 to 800 ns."""
    gemm: float = 0.92
    """cuBLAS at the model's shapes, of `matmul`: 0.88 to 0.97."""
    gemv: float = 0.68
    """cuBLAS at 64 rows, of `copy` on the weights: 0.55 to 0.8."""
    elementwise: float = 0.85
    """Pointwise kernels and norms, of `copy`: 0.75 to 0.92."""
    attention: float = 0.58
    """Of what attention's parts sum up to: 0.48 to 0.68."""
    small_kernel: float = 2e-6
    """A tiny kernel in a graph, from start to start: 1.5 to 3 us."""
    gap: float = 2.5e-6
    """Between dependent kernels."""
    beside: float = 0.5
    """Share of the sampler that linear_sample's next matmul hides: 0.2 to 0.8."""


class Prediction(NamedTuple):
    """Of one case."""

    case: str
    roof: str
    """What binds in the end: copy, matmul, or the bytes that a step cannot do without."""
    share: float
    """Of that roof."""
    seconds: float
    limiter: str
    """The slowest resource, or the largest parts."""


class CodeModel(NamedTuple):
    """A model that draws code by code; every head has its own keys and values."""

    name: str
    layers: int
    width: int
    mlp_width: int
    """Of each of the MLP's three matrices."""
    code_width: int
    """Of the image head's inner layer."""


JANUS_PRO = (CodeModel("Janus-Pro 1B", 24, 2048, 5632, 2048), CodeModel("Janus-Pro 7B", 30, 4096, 11_008, 4096))


def predictions(of: Assumptions) -> list[Prediction]:
    """All cases: at the shapes of Show-o 1.3B, a step of images drawn code by code by both sizes of Janus-Pro, steps of
    images and captions of MMaDA 8B, and a step of images of BAGEL 7B."""
    ops = [*_samplers(of), _linear_sample(of), _linear_logprob(of), _attention(of)]
    steps = [_image_step(of), _caption_step(of), *(_code_step(of, size) for size in JANUS_PRO)]
    # A step's mean: 0.64 of an image's codes are masked, and half of a block of 32 tokens.
    images = _whole_step(of, "an image step, 16 guided images, MMaDA 8B", 32, 1056, int(16 * 1024 * 0.64), 8192)
    captions = _whole_step(of, "a caption step, 10 captions of 128, MMaDA 8B", 10, 1214, 160, 134_656)
    return [*ops, *steps, images, captions, _flow_step(of)]


def _streaming(
    of: Assumptions, case: str, num_bytes: float, *, slots: float, in_flight: float, warps: int, chain: float
) -> Prediction:
    """A kernel that reads num_bytes once. slots: warp instructions for 512 bytes; in_flight: bytes of loads that a warp
    has open; chain: seconds from a warp's load of 512 bytes to its next one."""
    each_sm = of.copy / of.num_sms
    shares = {
        "instructions": 512 / each_sm * of.clock * 4 * of.issue / slots,
        "loads in flight": warps * in_flight / of.latency / each_sm,
        "latency": warps * 512 / chain / each_sm,
        "memory": 0.95,
    }
    limiter = min(shares, key=shares.get)
    return Prediction(case, "copy", shares[limiter], num_bytes / (shares[limiter] * of.copy), limiter)


def _samplers(of: Assumptions) -> Iterator[Prediction]:
    pair, rows = 2 * 8192 * 2, 16 * 1024
    tile = of.latency + 900e-9
    yield _streaming(
        of, "guided_sample, cuda, bf16", rows * pair, slots=91, in_flight=4096, warps=32, chain=_row(of) / 8
    )
    yield _streaming(
        of, "guided_sample, triton, bf16", rows * pair, slots=151, in_flight=2048, warps=32, chain=tile / 4
    )
    logits = 16 * 1024 * 58_498 * 2
    yield _streaming(of, "token_logprob, cuda, bf16", logits, slots=95, in_flight=1024, warps=64, chain=tile / 2)


def _row(of: Assumptions) -> float:
    """Seconds of the CUDA sampler's row of 32 KiB: its loads, its arithmetic, the winning tile once more."""
    return 2 * of.latency + 1500e-9


def _linear_sample(of: Assumptions) -> Prediction:
    """cuBLAS, and the CUDA sampler over fp32 logits of one head, 64 MiB at a time, in part beside the next matmul."""
    rows, width, ids = 32_768, 2048, 8192
    flops, logits = 2 * rows * width * ids, 4 * rows * ids
    sampler = _streaming(of, "", logits, slots=76, in_flight=4096, warps=32, chain=_row(of) / 8)
    gemm, blocks = flops / (of.matmul * of.gemm), logits / (64 << 20)
    seconds = gemm + (sampler.seconds + blocks * 2 * of.gap) * (1 - of.beside)
    return Prediction("linear_sample, cuda, bf16", "matmul", flops / of.matmul / seconds, seconds, "matmul, sampler")


def _linear_logprob(of: Assumptions) -> Prediction:
    """Forward and backward with E kept: three matmuls in blocks of 4,096 rows and ids; as 6 T D V."""
    rows, width, ids = 16_384, 2048, 58_498
    flops, logits = 2 * rows * width * ids, rows * ids
    blocks = (rows / 4096) * (ids / 4096)
    gemm = flops / (of.matmul * of.gemm)
    sums = blocks * 0.35 * 2 * 4096 * width * 4 / of.copy  # fp32 sums of both gradients, read and written
    forward = gemm + logits * (4 + 4 + 2) / (of.elementwise * of.copy) + blocks * 2 * of.gap
    backward = 2 * gemm + 2 * sums + logits * (2 + 2 + 2) / (of.elementwise * of.copy) + blocks * 4 * of.gap
    seconds = forward + backward
    parts = f"matmuls {3 * gemm * 1e3:.0f} ms, logits and sums {(seconds - 3 * gemm) * 1e3:.0f}"
    return Prediction("linear_logprob, triton, bf16, E kept", "matmul", 3 * flops / of.matmul / seconds, seconds, parts)


def attention_rate(of: Assumptions, slots: int = 330, useful: float = 0.94) -> float:
    """FLOPs a second on useful pairs, head size 64: two blocks of 128 x 64 share a multiprocessor and hide each other's
    softmax in part. slots: instructions of a warp for a tile."""
    own = 256 + 90 + slots * 8 / 4 * 0.62
    two_tiles = max(own + 0.35 * slots * 2, 2 * slots * 2 / of.issue, 2 * 34 * 8 * 2)
    return 2 * 512 / two_tiles * of.attention * 4096 * of.num_sms * 1.7e9 * useful


def _attention(of: Assumptions) -> Prediction:
    """A layer of a guided step of 32 images of 1,024 tokens."""
    sequences, length, seen, width = 64, 1026, 1046, 2048
    flops = 4 * width * sequences * length * seen
    rate = attention_rate(of)
    return Prediction(
        "span_attention, forward, a step's layer", "matmul", rate / of.matmul, flops / rate, "softmax, tiles"
    )


def _image_step(of: Assumptions) -> Prediction:
    """A guided step of 32 images of 1,024 tokens: 24 layers, D 2048."""
    layers, width, wide, ids, sequences, length = 24, 2048, 8192, 8192, 64, 1024
    tokens = sequences * (length + 2)
    linear = 2 * (4 * width * width + 2 * width * wide) * layers * tokens * (1 - 0.36 * 0.79 / layers)
    attention = 4 * layers * width * tokens * (length + 22)
    head = 2 * width * ids * sequences / 2 * length * 0.64
    moved = tokens * width * 2
    parts = {
        "matmuls": linear / (of.matmul * of.gemm),
        "attention": attention / attention_rate(of),
        # Norm 2, [q k v] read and written 6, x read by the matmuls that add to it 2.
        "norms, rotation, residual": layers * 10 * moved / (of.copy * of.elementwise),
        "head": head / (of.matmul * 0.6) + 60e-6,
    }
    return _step("an image step, 32 guided images", "matmul", (linear + attention + head) / of.matmul, parts)


def _caption_step(of: Assumptions) -> Prediction:
    """A token for 64 captions of 6.4 images of 1,024 tokens."""
    layers, width, wide, ids, rows, images = 24, 2048, 8192, 50_305, 64, 6.4
    weights, cached = (4 * width * width + 2 * width * wide) * 2, (images * 1027 + rows * 24) * 2 * width * 2
    head = ids * width * 2
    parts = {
        "matmuls": layers * (weights / (of.copy * of.gemv) + 3 * 1.2e-6),
        "small kernels": layers * 2 * of.small_kernel,
        "attention": layers * (cached / (of.copy * 0.75) + 2 * of.small_kernel),
        "head and sampling": head / (of.copy * 0.45) + 70e-6,
    }
    return _step("a caption step, 64 captions", "bytes", (layers * (weights + cached) + head) / of.copy, parts)


def _code_step(of: Assumptions, model: CodeModel) -> Prediction:
    """A code for each of 16 guided images of a prompt of 25 tokens, with half of the 576 codes drawn."""
    codes, rows = 16_384, 32
    weights = (4 * model.width**2 + 3 * model.width * model.mlp_width) * 2
    cached = (2 * 25 + rows * 288) * 2 * model.width * 2
    head = (model.width + codes) * model.code_width * 2
    parts = {
        "matmuls": model.layers * (weights / (of.copy * of.gemv) + 4 * 1.2e-6),
        # Two norms, rotation and storage, activation.
        "small kernels": model.layers * 4 * of.small_kernel,
        "attention": model.layers * (cached / (of.copy * 0.75) + 2 * of.small_kernel),
        # Guidance, sampling, the code's record and its embedding.
        "head and sampling": head / (of.copy * 0.45) + 70e-6,
    }
    ideal = (model.layers * (weights + cached) + head) / of.copy
    return _step(f"a code step, 16 guided images, {model.name}", "bytes", ideal, parts)


def _whole_step(of: Assumptions, case: str, sequences: int, length: int, head_rows: int, head_ids: int) -> Prediction:
    """Whole sequences of LLaDA 8B, the last layer's MLP and the head on head_rows rows: 32 layers, D 4096."""
    layers, width, wide, tokens = 32, 4096, 12_288, sequences * length
    after = width * width + 3 * width * wide
    linear = 2 * (layers * (3 * width * width + after) * tokens - after * (tokens - head_rows))
    attention = 4 * layers * width * tokens * length
    head = 2 * width * head_ids * head_rows
    moved = tokens * width * 2
    parts = {
        "matmuls": linear / (of.matmul * of.gemm),
        "attention": attention / attention_rate(of),
        # Two norms 4, [q k] read and written 4, both sums 6; gate and up read, their product written: 9 of the width.
        "norms, rotation, residual, gate": layers * 23 * moved / (of.copy * of.elementwise),
        "head": head / (of.matmul * 0.6) + 60e-6,
    }
    return _step(case, "matmul", (linear + attention + head) / of.matmul, parts)


def _flow_step(of: Assumptions) -> Prediction:
    """A guided step of 8 images of 1,024 latents behind prompts of 60 tokens: 28 layers, D 3584, 4 key heads of 28."""
    layers, width, wide, keys, sequences, length = 28, 3584, 18_944, 512, 16, 1026
    tokens = sequences * length
    linear = 2 * layers * (2 * width * width + 2 * width * keys + 3 * width * wide) * tokens
    attention = 4 * layers * width * tokens * (length + 30)  # half of the sequences have the prompt before them
    moved = tokens * width * 2
    parts = {
        "matmuls": linear / (of.matmul * of.gemm),
        "attention": attention / attention_rate(of),
        # Two norms 4, [q k] normed and rotated 5, both sums 6; gate and up read, their product written: 16 of a width.
        "norms, rotation, residual, gate": layers * 31 * moved / (of.copy * of.elementwise),
        # The text's expert for two rows an image reads its weights; its pieces are joined.
        "second expert": layers * (233e6 * 2 / (of.copy * of.gemv) + 4 * moved / (of.copy * of.elementwise)),
    }
    return _step("a flow step, 8 guided images, BAGEL 7B", "matmul", (linear + attention) / of.matmul, parts)


def _step(case: str, roof: str, ideal: float, parts: dict[str, float]) -> Prediction:
    seconds = sum(parts.values())
    largest = sorted(parts, key=parts.get, reverse=True)[:3]
    shown = ", ".join(f"{name} {parts[name] * 1e3:{'.0f' if seconds > 0.01 else '.2f'}} ms" for name in largest)
    return Prediction(case, roof, ideal / seconds, seconds, shown)


def table(of: Assumptions) -> str:
    """Markdown, a row a case, with the range over one guess at a time."""
    ranges = {"issue": (0.75, 0.9), "latency": (550e-9, 800e-9), "gemm": (0.88, 0.97), "gemv": (0.55, 0.8)}
    ranges |= {"elementwise": (0.75, 0.92), "attention": (0.48, 0.68), "small_kernel": (1.5e-6, 3e-6)}
    ranges["beside"] = (0.2, 0.8)
    others = [predictions(dataclasses.replace(of, **{name: x})) for name, both in ranges.items() for x in both]
    lines = ["| case | predicted | if one guess is off | roof | time | slowest | measured |", "| --- " * 7 + "|"]
    for index, found in enumerate(predictions(of)):
        shares = [each[index].share for each in others]
        low, high = min(shares), max(shares)
        cells = [
            found.case,
            f"{found.share:.0%}",
            f"{low:.0%} to {high:.0%}",
            found.roof,
            f"{found.seconds * 1e3:.3g} ms",
        ]
        lines.append(f"| {' | '.join([*cells, found.limiter, 'no'])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Assumptions()))
