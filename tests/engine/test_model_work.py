"""The arithmetic of passes over span trees, against counts by hand and by torch, and the rate of a matmul."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from hermesflow.engine import model_work
from hermesflow.engine.model_work import ModelWork, matmul_rate
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels import matmul
from hermesflow.kernels.span_tree import SpanTree

LAYOUT = TokenLayout(text_vocab_size=40, codebook_size=64, num_image_tokens=16, sot=0, eot=1)
SHAPE = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "mlp_size": 48}
KINDS = {
    "plain": {"num_kv_heads": 4},
    "gated-gqa": {"num_kv_heads": 2, "gated": True, "activation": "silu"},
    "parallel-mqa": {"num_kv_heads": 1, "block": "parallel"},
}


def make_config(kind):
    return TransformerConfig(vocab_size=LAYOUT.vocab_size, **SHAPE, **KINDS[kind])


def make_work(config, dtype=torch.float32):
    return ModelWork(config=config, layout=LAYOUT, dtype=dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_tree_is_what_torch_counts(kind, monkeypatch):
    """Of full spans of equal shape: torch counts pads, and of a causal span the whole square."""
    # torch counts neither what oneDNN computes nor kernels of our own.
    monkeypatch.setattr(matmul, "_takes_onednn", lambda a: False)
    monkeypatch.setenv("HERMESFLOW_BACKEND", "span_attention=torch")
    config = make_config(kind)
    transformer = Transformer(config)
    tree = SpanTree.build([(range(9), -1, "full"), (range(5), 0, "full"), (range(5), 0, "full")])
    rows = torch.tensor([8, 8, 9, 12, 18])
    with FlopCounterMode(display=False) as counter:
        logits = F.linear(transformer(tree, rows=rows), transformer.head.weight)
        num_forward = counter.get_total_flops()
        logits.sum().backward()
    num_flops = make_work(config).tree(tree, len(rows)).num_flops
    assert num_flops == num_forward
    # A step is counted as three forward passes, and four with a live reference.
    assert 3 * num_flops == counter.get_total_flops()


def test_tree_by_hand():
    """A prompt of 3 with two images of 4, an image of 5 with a question of 2 and two captions of 3 and 1."""
    spans = [
        (range(3), -1, "causal"), (range(4), 0, "full"), (range(4), 0, "full"),
        (range(5), -1, "full"), (range(2), 3, "causal"), (range(3), 4, "causal"), (range(1), 4, "causal"),
    ]  # fmt: skip
    tree, head_rows = SpanTree.build(spans), 9
    seen = (1 + 2 + 3) + 2 * 4 * 7 + 5 * 5 + (6 + 7) + (8 + 9 + 10) + 8
    assert seen == int(tree.allowed().sum())
    qkv, out, mlp, head = 32 * 96, 32 * 32, 2 * 32 * 48, 32 * LAYOUT.vocab_size
    weights = 22 * (2 * qkv + out + mlp) + head_rows * (out + mlp + head)
    work = make_work(make_config("plain"), torch.bfloat16).tree(tree, head_rows)
    assert work.num_flops == 2 * weights + 4 * 2 * 32 * seen
    assert work.num_bytes == 2 * (2 * (qkv + out + mlp) + head + 2 * 2 * 32 * 22)


@pytest.fixture
def unmeasured():
    matmul_rate.cache_clear()
    yield
    matmul_rate.cache_clear()


def test_matmul_rate_is_that_of_the_fastest_call_and_is_measured_once(unmeasured, monkeypatch):
    seconds = itertools.chain([0.5, 0.25, 0.125], itertools.repeat(1.0))
    monkeypatch.setattr(model_work, "_seconds", lambda call, device: next(seconds))
    rate = matmul_rate(torch.device("cpu"), torch.float32)
    assert rate == 2 * 1024**3 / 0.125
    assert matmul_rate(torch.device("cpu"), torch.float32) == rate
    assert matmul_rate(torch.device("cpu"), torch.bfloat16) == 2 * 1024**3


def test_matmul_rate_leaves_the_random_numbers_alone(unmeasured):
    before = torch.get_rng_state()
    matmul_rate(torch.device("cpu"), torch.float32)
    assert torch.equal(torch.get_rng_state(), before)


def test_seconds_of_a_call_hold_its_work():
    called = []
    assert 0 < model_work._seconds(lambda: called.append(1), torch.device("cpu")) < 10
    assert called == [1]
