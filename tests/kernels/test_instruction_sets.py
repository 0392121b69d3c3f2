"""The C++ kernels for instruction sets that this machine would not choose, in two threads; all the other tests take its
own, in one thread.

A process chooses when it starts, so this file is run in a process of its own for each set.
"""

import json
import os
import subprocess
import sys
import traceback

import pytest
import torch

from hermesflow.kernels import checks
from hermesflow.kernels.guided_sample import guided_sample
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.mask_topk import mask_topk
from hermesflow.kernels.philox import RandomKey
from hermesflow.kernels.token_logprob import token_logprob
from hermesflow.kernels.token_sample import token_sample

INSTRUCTIONS = {"default": "portable", "avx2": "avx2"}  # what the kernels call it, by torch's name for it
BACKENDS = ("cpu", "torch")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY = RandomKey(torch.arange(2000), torch.tensor(1), torch.arange(2000))


def check_guided_sample():
    for dtype in DTYPES:
        cond, uncond = torch.randn(2, 2000, 300, generator=torch.Generator().manual_seed(0)).to(dtype).unbind()
        for temperature in (0.0, 0.7):
            settings = {"guidance_scale": 1.0, "temperature": temperature, "key": KEY}
            check_samples(*(guided_sample(cond, uncond, backend=name, **settings) for name in BACKENDS))


def check_token_sample():
    settings = {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.4]).repeat(500), "top_p": torch.linspace(0, 1, 2000),
        "top_k": torch.tensor([0, 5, 150, 0, 20]).repeat(400), "min_p": torch.tensor([0.0, 0.05]).repeat(1000),
        "key": KEY,
    }  # fmt: skip
    for dtype in DTYPES:
        logits = torch.randn(2000, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
        check_samples(*(token_sample(logits, backend=name, **settings) for name in BACKENDS))


def check_samples(found, expected):
    same = found[0] == expected[0]
    assert (~same).sum() <= 1 and (found[1] - expected[1])[same].abs().max() < 1e-5


def check_mask_topk():
    generator = torch.Generator().manual_seed(0)
    logprob, known = torch.randn(2000, 150, generator=generator), torch.rand(2000, 150, generator=generator) < 0.3
    for temperature in (0.0, 2.0):
        case = logprob, known, torch.arange(2000) % 150
        settings = {"temperature": temperature, "key": KEY}
        found, expected = (mask_topk(*case, backend=name, **settings) for name in BACKENDS)
        assert (found != expected).any(dim=1).sum() <= (2 if temperature else 0)


def check_linear_logprob():
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*shape).requires_grad_() for shape in ((40, 16), (2100, 16), (2100,)))
    target, grad = torch.randint(2100, (40,)), torch.randn(40)
    results = []
    for name in BACKENDS:
        logprob, entropy = linear_logprob(x, weight, target, bias=bias, return_entropy=True, backend=name)
        results.append((logprob, entropy, *torch.autograd.grad(logprob, (x, weight, bias), grad)))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def check_token_logprob():
    generator = torch.Generator().manual_seed(0)
    for dtype, atol in zip(DTYPES, (1e-6, 8e-3, 1e-3), strict=True):
        logits = torch.randn(50, 3001, generator=generator).to(dtype)
        target = torch.randint(3001, (50,), generator=generator)
        results = []
        for name in BACKENDS:
            leaf = logits.clone().requires_grad_()
            logprob, entropy = token_logprob(leaf, target, return_entropy=True, backend=name)
            results.append([logprob, entropy, *torch.autograd.grad(logprob.sum(), leaf)])
        found, expected = results
        torch.testing.assert_close(found[:2], expected[:2], rtol=1e-6, atol=1e-5)
        torch.testing.assert_close(found[2], expected[2], rtol=1e-6, atol=atol)


CHECKS = {
    "guided_sample": check_guided_sample, "linear_logprob": check_linear_logprob, "mask_topk": check_mask_topk,
    "token_logprob": check_token_logprob, "token_sample": check_token_sample,
}  # fmt: skip


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def errors(request):
    """By op, what failed in a process of these instructions."""
    if checks.cpu_missing():
        pytest.skip(checks.cpu_missing())
    environment = os.environ | {"ATEN_CPU_CAPABILITY": request.param}
    command = [sys.executable, "-P", __file__, request.param]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", CHECKS)
def test_other_instruction_sets(op, errors):
    assert not errors[op], errors[op]


def check_all(capability):
    from hermesflow.kernels import _C

    chosen = _C.build_facts()["cpu_instructions"]
    if chosen not in (INSTRUCTIONS[capability], "portable"):
        raise SystemExit(f"got {chosen}")
    torch.set_num_threads(2)
    failed = dict.fromkeys(CHECKS)
    for op, check in CHECKS.items():
        try:
            check()
        except Exception:  # of whatever kind, for the test to show
            failed[op] = traceback.format_exc()
    print(json.dumps(failed))


if __name__ == "__main__":
    check_all(sys.argv[1])
