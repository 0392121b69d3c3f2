"""Single steps of a model at tiny shapes: their lines, their profiles, and attention by other blocks."""

import sys

import pytest
import torch

from hermesflow.benchmarks import attention_cases, lines, peers, steps
from hermesflow.kernels.span_attention import span_attention_reference
from hermesflow.runtime.files import InputError


def test_every_case(monkeypatch, tmp_path, capsys):
    out, folder = tmp_path / "lines.jsonl", tmp_path / "profiles"
    monkeypatch.setattr(sys, "argv", ["steps", "--out", str(out), "--profile", str(folder)])
    steps.main()
    written = lines.read_lines(out)
    cases = ["copy", "matmul", "image_step", "image_step", "decoding_step", "attention"]
    assert [line["case"] for line in written] == cases
    for line in written:
        assert line["bench"] == "steps" and line["baseline"] is None
        assert line["ms_p50"] > 0 and line["roof_fraction"] > 0
    small, large, decoding = (line["items_per_s"]["tokens"] * line["ms_p50"] / 1e3 for line in written[2:5])
    assert (small, large, decoding) == pytest.approx((32 * 18, 64 * 18, 64))
    table = (folder / "image_step-32-plain.txt").read_text()
    assert "linear_sample" in table and "step" in table.partition("phases")[2]
    assert "attention: " in capsys.readouterr().out


def test_shapes_are_checked():
    with pytest.raises(InputError, match="--case: expected attention, decoding, images, roof, got 'sleep'"):
        steps.Settings(shape="tiny", cases=["sleep"])


def test_attention_by_other_blocks():
    kernels = pytest.importorskip("hermesflow.kernels.span_attention.span_attention_triton")
    arguments = (torch.bfloat16, 64, 9)
    shipped = kernels._launches(*arguments)
    found = steps._by_blocks((16, 32, 2, 1))(lambda: kernels._launches(*arguments))()
    assert tuple(found.forward) == (16, 32, 2, 1) and found[1:] == shipped[1:]
    assert kernels._launches(*arguments) == shipped


def test_dense_spans_compute_what_attention_does(monkeypatch):
    tree = attention_cases._images(attention_cases.SHAPES["tiny"], torch.device("cpu"))
    q, k, v = (torch.randn(rows, 2, 16) for rows in (len(tree.token_ids), tree.capacity, tree.capacity))
    out = peers.dense_spans(q, k, v, tree, peers.SDPBackend.MATH)()
    torch.testing.assert_close(out, span_attention_reference(q, k, v, tree))
    with pytest.raises(peers.Unavailable, match="CUDNN_ATTENTION needs CUDA"):
        peers.dense_spans(q, k, v, tree, peers.SDPBackend.CUDNN_ATTENTION)


def test_a_module_that_a_library_dropped():
    with pytest.raises(peers.Unavailable, match=r"torch \S+ has no torch.nothing any more"):
        peers._load("torch.nothing", torch.device("cpu"), needs_cuda=False)
