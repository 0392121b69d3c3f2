"""The cases of every op but attention: inputs, what is timed, baselines, bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hermesflow.benchmarks import naive, peers
from hermesflow.benchmarks.case import (
    Case,
    agrees_with,
    draws_tokens,
    graded,
    some_rows,
    with_gradients,
    wrong_draws,
    wrong_values,
)
from hermesflow.benchmarks.measuring import Call
from hermesflow.kernels.guided_sample import guided_sample, guided_sample_reference
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.linear_sample import linear_sample, linear_sample_reference
from hermesflow.kernels.mask_topk import mask_topk, mask_topk_reference
from hermesflow.kernels.pair_dpo import pair_dpo, pair_dpo_reference
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_logprob import token_logprob
from hermesflow.kernels.token_sample import token_sample, token_sample_reference

GUIDANCE_SCALE = 5.0  # of HermesFlow's published generation
BETA = 0.2  # of its Pair-DPO
TEXT_VOCAB = 58_498  # Show-o's vocabulary as a whole
PADDED_VOCAB = 58_624  # the next multiple of 256
CODEBOOK = 8_192  # its image codes
FP32, BF16 = torch.float32, torch.bfloat16

# shape class -> op -> sizes. "tiny" is for tests, "small" the acceptance on a laptop, "showo-1.3b" the published model:
# 16 images of 1,024 tokens a prompt.
SHAPES: dict[str, dict[str, tuple]] = {
    "tiny": {
        "guided_sample": (8, 300, FP32),
        "linear_sample": (8, 16, 300, FP32),
        "mask_topk": (4, 32),
        "token_sample": (4, 500, FP32),
        "token_logprob": (8, 500, FP32),
        "linear_logprob": (12, 16, 300, True, FP32),
        "pair_dpo": (64, 2),
    },
    "small": {
        "guided_sample": (512, CODEBOOK, FP32),
        "linear_sample": (2048, 512, CODEBOOK, FP32),
        "mask_topk": (64, 1024),
        "token_sample": (64, TEXT_VOCAB, FP32),
        "token_logprob": (512, TEXT_VOCAB, FP32),
        "linear_logprob": (2048, 512, TEXT_VOCAB, True, FP32),
        "pair_dpo": (32_768, 16),
    },
    "showo-1.3b": {
        "guided_sample": (16 * 1024, CODEBOOK, BF16),
        "linear_sample": (32 * 1024, 2048, CODEBOOK, BF16),
        "mask_topk": (64, 1024),
        "token_sample": (64, TEXT_VOCAB, BF16),
        "token_logprob": (4096, TEXT_VOCAB, BF16),
        "linear_logprob": (16 * 1024, 2048, TEXT_VOCAB, True, BF16),
        "pair_dpo": (32_768, 16),
    },
    # A vocabulary that every peer takes, whatever its alignment, and no bias, which some do not have.
    "padded": {"linear_logprob": (16 * 1024, 2048, PADDED_VOCAB, False, BF16)},
    "tiny-padded": {"linear_logprob": (12, 16, 512, False, FP32)},
}


def _normal(*sizes: int, dtype: torch.dtype, device: torch.device, scale: float = 1.0) -> Tensor:
    return torch.randn(*sizes, dtype=dtype, device=device).mul_(scale)


def _key(num_rows: int, device: torch.device) -> RandomKey:
    rows = torch.arange(num_rows, device=device)
    return RandomKey(rows * 977 + 5, torch.tensor(3, device=device), rows)


def _at(key: RandomKey, rows: Tensor) -> RandomKey:
    return RandomKey(key.seed[rows], key.step, key.position[rows])


def guided_sample_case(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Image codes from a pair of logits."""
    cond, uncond = (_normal(num_rows, vocab_size, dtype=dtype, device=device, scale=2.0) for _ in range(2))
    key, rows = _key(num_rows, device), some_rows(num_rows, device)
    options = {"guidance_scale": GUIDANCE_SCALE, "temperature": 1.0}

    def run(backend: str) -> tuple[Tensor, Tensor]:
        return guided_sample(cond, uncond, **options, key=key, backend=backend)

    def check(backend: str) -> str | None:
        expected = guided_sample_reference(cond[rows], uncond[rows], **options, key=_at(key, rows))
        return wrong_draws(run(backend), expected, rows)

    inputs = (cond, uncond, GUIDANCE_SCALE)
    return Case(
        op="guided_sample",
        shape=f"R {num_rows}, V {vocab_size}",
        dtype=dtype,
        short=True,
        run=run,
        check=check,
        naive=partial(naive.guided_sample, *inputs),
        compiled=partial(torch.compile(naive.guided_sample), *inputs),
        peers={"flashinfer": partial(peers.flashinfer_guided, *inputs)},
        agrees=draws_tokens(num_rows, vocab_size),
        num_bytes=2 * cond.nbytes + 12 * num_rows,  # both logits; token and log-probability
        num_flops=8 * num_rows * vocab_size,  # guidance 3, scale, max, difference, exponential, sum
    )


def linear_sample_case(num_rows: int, width: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Image codes from hidden states to which guidance was applied."""
    hidden = _normal(num_rows, width, dtype=dtype, device=device)
    weight = _normal(vocab_size, width, dtype=dtype, device=device, scale=2 / width**0.5)
    bias = _normal(vocab_size, dtype=dtype, device=device)
    key, rows = _key(num_rows, device), some_rows(num_rows, device)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        return linear_sample(hidden, weight, bias, temperature=1.0, key=key, backend=backend)

    def check(backend: str) -> str | None:
        expected = linear_sample_reference(hidden[rows], weight, bias, temperature=1.0, key=_at(key, rows))
        return wrong_draws(run(backend), expected, rows)

    inputs = (hidden, weight, bias)
    return Case(
        op="linear_sample",
        shape=f"R {num_rows}, D {width}, V {vocab_size}",
        dtype=dtype,
        short=False,
        run=run,
        check=check,
        naive=partial(naive.linear_sample, *inputs),
        compiled=partial(torch.compile(naive.linear_sample), *inputs),
        peers={"flashinfer": partial(peers.flashinfer_linear, *inputs)},
        agrees=draws_tokens(num_rows, vocab_size),
        num_bytes=hidden.nbytes + weight.nbytes + bias.nbytes + 12 * num_rows,
        num_flops=2 * num_rows * width * vocab_size,  # the head's product
    )


def mask_topk_case(num_rows: int, num_tokens: int, device: torch.device) -> Case:
    """Half of each image masked again, a third of it known."""
    logprob = -3 * torch.rand(num_rows, num_tokens, device=device)
    known = torch.rand(num_rows, num_tokens, device=device) < 1 / 3
    num_masked = torch.full((num_rows,), num_tokens // 2, device=device)
    # A temperature on the device, for a number would have to be copied there.
    options = {"temperature": torch.ones(num_rows, device=device), "key": _key(num_rows, device)}

    def run(backend: str) -> Tensor:
        return mask_topk(logprob, known, num_masked, **options, backend=backend)

    def check(backend: str) -> str | None:
        num_wrong = int((run(backend) != mask_topk_reference(logprob, known, num_masked, **options)).any(1).sum())
        return f"{num_wrong} of {num_rows} rows differ from the reference's" if num_wrong > 1 else None

    inputs = (logprob.exp(), known, num_masked, 1.0)
    return Case(
        op="mask_topk",
        shape=f"B {num_rows}, N {num_tokens}",
        dtype=FP32,
        short=True,
        run=run,
        check=check,
        naive=partial(naive.mask_topk, *inputs),
        compiled=partial(torch.compile(naive.mask_topk), *inputs),
        # A comparison with the cut masks fewer where confidences tie.
        agrees=lambda masked: bool((masked.sum(1) <= num_masked).all() and not (masked & known).any()),
        num_bytes=logprob.nbytes + 2 * known.nbytes,
        num_flops=8 * num_rows * num_tokens,  # noise 4, score 2, a comparison to select and one to mark
    )


def token_sample_case(num_rows: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Text tokens by top-k and top-p."""
    logits = _normal(num_rows, vocab_size, dtype=dtype, device=device, scale=3.0)
    temperature, top_p = (torch.full((num_rows,), value, device=device) for value in (0.8, 0.9))
    top_k = torch.full((num_rows,), 50, device=device)
    settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": torch.zeros_like(top_p)}
    key, rows = _key(num_rows, device), some_rows(num_rows, device)

    def run(backend: str) -> tuple[Tensor, Tensor]:
        return token_sample(logits, **settings, key=key, backend=backend)

    def check(backend: str) -> str | None:
        of_rows = {name: setting[rows] for name, setting in settings.items()}
        return wrong_draws(run(backend), token_sample_reference(logits[rows], **of_rows, key=_at(key, rows)), rows)

    inputs = (logits, temperature, top_k, top_p)
    return Case(
        op="token_sample",
        shape=f"R {num_rows}, V {vocab_size}",
        dtype=dtype,
        short=True,
        run=run,
        check=check,
        naive=partial(naive.token_sample, *inputs),
        compiled=partial(torch.compile(naive.token_sample), *inputs),
        peers={"flashinfer": partial(peers.flashinfer_token, *inputs)},
        agrees=draws_tokens(num_rows, vocab_size),
        num_bytes=logits.nbytes + 12 * num_rows,
        num_flops=6 * num_rows * vocab_size,  # scale, max, difference, exponential, sum, comparison
    )


def token_logprob_case(num_tokens: int, vocab_size: int, dtype: torch.dtype, device: torch.device) -> Case:
    """Log-probabilities from logits, forward and backward."""
    logits = _normal(num_tokens, vocab_size, dtype=dtype, device=device, scale=3.0).requires_grad_()
    target = torch.randint(vocab_size, (num_tokens,), device=device)
    rows = some_rows(num_tokens, device)
    upstream = _normal(num_tokens, dtype=FP32, device=device)

    def run(backend: str) -> tuple[Tensor, ...]:
        return with_gradients(lambda: token_logprob(logits, target, backend=backend), (logits,))()

    def check(backend: str) -> str | None:
        got = graded(lambda leaf: token_logprob(leaf, target, backend=backend), [logits], upstream)
        some = logits.detach()[rows]
        truth = graded(partial(token_logprob, target=target[rows], backend="torch"), [some.double()], upstream[rows])
        eager = graded(partial(naive.token_logprob, target=target[rows]), [some], upstream[rows])
        return wrong_values("logprob grad_logits", tuple(part[rows] for part in got), truth, eager)

    def baseline(function: Callable[..., Tensor]) -> Call:
        return with_gradients(partial(function, logits, target), (logits,))

    return Case(
        op="token_logprob",
        shape=f"T {num_tokens}, V {vocab_size}",
        dtype=dtype,
        short=False,
        run=run,
        check=check,
        naive=baseline(naive.token_logprob),
        compiled=baseline(torch.compile(naive.token_logprob)),
        peers={
            "liger": partial(peers.liger_logprob, logits, target),
            "quack": partial(peers.quack_logprob, logits, target),
            "trl": partial(peers.trl_logprob, logits, target),
        },
        agrees=agrees_with(baseline(naive.token_logprob)),
        num_bytes=3 * logits.nbytes + 20 * num_tokens,  # logits read by both passes, gradient; targets and results
        num_flops=7 * num_tokens * vocab_size,  # forward: max, difference, exponential, sum; backward 3
    )


def linear_logprob_case(
    num_tokens: int, width: int, vocab_size: int, has_bias: bool, dtype: torch.dtype, device: torch.device
) -> Case:
    """Log-probabilities from hidden states, forward and backward."""
    x = _normal(num_tokens, width, dtype=dtype, device=device).requires_grad_()
    weight = _normal(vocab_size, width, dtype=dtype, device=device, scale=2 / width**0.5).requires_grad_()
    bias = _normal(vocab_size, dtype=dtype, device=device).requires_grad_() if has_bias else None
    leaves = (x, weight, bias) if has_bias else (x, weight)
    target = torch.randint(vocab_size, (num_tokens,), device=device)
    rows, names = some_rows(num_tokens, device), ("logprob", "grad_x", "grad_weight", "grad_bias")
    # A gradient at these rows alone makes their truth the whole truth, also that of weight and bias.
    upstream = torch.zeros(num_tokens, device=device)
    upstream[rows] = _normal(len(rows), dtype=FP32, device=device)

    def on(backend: str) -> Callable[..., Tensor]:
        return lambda x, weight, bias=None: linear_logprob(x, weight, target, bias=bias, backend=backend)

    def naive_of(target: Tensor) -> Callable[..., Tensor]:
        return lambda x, weight, bias=None: naive.linear_logprob(x, weight, bias, target)

    def run(backend: str) -> tuple[Tensor, ...]:
        return with_gradients(partial(on(backend), *leaves), leaves)()

    def check(backend: str) -> str | None:
        logprob, grad_x, *grads = graded(on(backend), list(leaves), upstream)
        some = [x.detach()[rows], *leaves[1:]]
        truth = graded(
            lambda x, weight, bias=None: linear_logprob(x, weight, target[rows], bias=bias, backend="torch"),
            [leaf.double() for leaf in some],
            upstream[rows],
        )
        eager = graded(naive_of(target[rows]), some, upstream[rows])
        got = (logprob[rows], grad_x[rows], *grads)
        return wrong_values(" ".join(names[: len(got)]), got, truth, eager)

    def baseline(function: Callable[..., Tensor]) -> Call:
        return with_gradients(lambda: function(x, weight, bias, target), leaves)

    return Case(
        op="linear_logprob",
        shape=f"T {num_tokens}, D {width}, V {vocab_size}{'' if has_bias else ', no bias'}",
        dtype=dtype,
        short=False,
        run=run,
        check=check,
        naive=baseline(naive.linear_logprob),
        compiled=baseline(torch.compile(naive.linear_logprob)),
        peers={
            "liger": partial(peers.liger_linear, x, weight, bias, target),
            "cut_cross_entropy": partial(peers.cce_linear, x, weight, target),
            "quack": partial(peers.quack_linear, x, weight, target),
            "trl": partial(peers.trl_linear, x, weight, bias, target),
        },
        agrees=agrees_with(baseline(naive.linear_logprob)),
        num_bytes=3 * sum(leaf.nbytes for leaf in leaves),  # read by both passes, gradients
        num_flops=6 * num_tokens * width * vocab_size,  # logits, both gradients; making the logits again is extra
    )


def pair_dpo_case(num_tokens: int, num_pairs: int, device: torch.device) -> Case:
    """The loss of win and lose images of equal length, forward and backward."""
    policy = (-3 * torch.rand(num_tokens, device=device)).requires_grad_()
    reference = policy.detach() + 0.1 * torch.randn(num_tokens, device=device)
    segment = torch.arange(2 * num_pairs, device=device).repeat_interleave(num_tokens // (2 * num_pairs))
    options = {"beta": BETA, "loss_type": "sigmoid"}

    def with_gradient(function: Callable[..., Any], policy: Tensor, reference: Tensor) -> tuple[Tensor, ...]:
        result = function(policy, reference, segment, num_pairs, **options)
        return *(part.detach() for part in result), *torch.autograd.grad(result.loss, policy)

    def run(backend: str) -> tuple[Tensor, ...]:
        return with_gradient(partial(pair_dpo, backend=backend), policy, reference)

    def check(backend: str) -> str | None:
        truth = with_gradient(pair_dpo_reference, policy.detach().double().requires_grad_(), reference.double())
        eager = with_gradient(pair_dpo_reference, policy, reference)
        return wrong_values("loss win_reward lose_reward margin accuracy grad_policy", run(backend), truth, eager)

    batch = [part.view(num_pairs, 2, -1) for part in (policy, reference)]

    def baseline(function: Callable[..., Any]) -> Call:
        def call() -> tuple[Tensor, ...]:
            losses, *rewards = function(*batch, BETA)
            loss = losses.mean()
            return loss, *torch.autograd.grad(loss, policy), *rewards

        return call

    return Case(
        op="pair_dpo",
        shape=f"T {num_tokens}, P {num_pairs}",
        dtype=FP32,
        short=True,
        run=run,
        check=check,
        naive=baseline(naive.pair_dpo),
        compiled=baseline(torch.compile(naive.pair_dpo)),
        agrees=agrees_with(baseline(naive.pair_dpo)),
        num_bytes=3 * policy.nbytes + segment.nbytes,  # both log-probabilities, segments, gradient
        num_flops=4 * num_tokens,  # difference, sum, gradient 2
    )


BUILDERS: dict[str, Callable[..., Case]] = {
    "guided_sample": guided_sample_case,
    "linear_sample": linear_sample_case,
    "mask_topk": mask_topk_case,
    "token_sample": token_sample_case,
    "token_logprob": token_logprob_case,
    "linear_logprob": linear_logprob_case,
    "pair_dpo": pair_dpo_case,
}
