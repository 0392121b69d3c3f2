"""The commands that write a checkpoint of random weights and say what it takes to use it."""

import json
import sys

import pytest

from hermesflow.benchmarks import random_checkpoint

KINDS = [("tiny", "safetensors", 64), ("tiny", "sharded-bin", 64), ("tiny-janus", "safetensors", 48)]
KINDS += [("tiny-mmada", "safetensors", 64)]


@pytest.mark.parametrize(("shape", "weights", "size"), KINDS)
def test_a_checkpoint_is_written_and_used(shape, weights, size, tmp_path, monkeypatch, capsys):
    options = ["--shape", shape, "--weights", weights, "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["random_checkpoint", "make", str(tmp_path), *options])
    random_checkpoint.main()
    monkeypatch.setattr(sys, "argv", ["random_checkpoint", "use", str(tmp_path), "--num-steps", "2"])
    random_checkpoint.main()
    line = json.loads(capsys.readouterr().out)
    assert line["image_px"] == size and line["dtype"] == "float32" and line["caption_tokens"] <= 20
    assert line["peak_mib"] >= line["load_peak_mib"] >= line["before_mib"] > 100
