"""The benchmark of bidirectional families: its baseline against the original's outputs, its run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.benchmarks import lines, masked_tasks, naive_masked, train
from hermesflow.cli import main
from hermesflow.engine.decoders.text import SamplingParams

DATA = Path(__file__).parents[1] / "data"


@pytest.mark.parametrize("name", ["mmada-tiny", "dimoo-tiny"])
@pytest.mark.parametrize("number", [0, 1])
def test_the_baseline_answers_as_the_original(name, number):
    model, golden = load_model(DATA / name, dtype=torch.float32), load_file(DATA / name / "golden.safetensors")
    meta = json.loads((DATA / name / "meta.json").read_text())
    if "grid" in meta:
        model.layout = model.layout.of_grid(tuple(meta["grid"]))
    settings = meta[f"mmu{number}"]
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=settings.get("max_new_tokens") or settings["gen_length"],
        num_steps=settings["steps"],
        block_length=settings["block_length"],
    )
    question, codes = model.question_prompt(settings["question"]), golden["mmu.codes"].tolist()
    ids = naive_masked.answer_question(model.transformer, model.layout, codes, question, params)
    assert ids == golden[f"mmu{number}.greedy"].tolist()[: len(ids)] and len(ids) > 1


def test_the_baseline_draws_as_the_original():
    model, golden = (
        load_model(DATA / "dimoo-tiny", dtype=torch.float32),
        load_file(DATA / "dimoo-tiny/golden.safetensors"),
    )
    meta = json.loads((DATA / "dimoo-tiny/meta.json").read_text())
    model.layout = model.layout.of_grid(tuple(meta["grid"]))
    for settings in meta["greedy"]:
        params = replace(
            model.sampling, num_steps=settings["num_steps"], guidance_scale=settings["guidance"], temperature=0.0,
            mask_temperature=0.0,
        )  # fmt: skip
        prompt = model.image_prompt(settings["prompt"])
        codes = naive_masked.draw_images(model.transformer, model.layout, prompt, 1, params)
        assert codes[0].tolist() == golden[settings["key"]].tolist()


def test_padding_changes_no_image():
    tasks = masked_tasks.MaskedTasks(masked_tasks.FAMILIES["mmada"], "tiny", torch.device("cpu"), torch.float32)
    params = replace(tasks.family.sampling, num_steps=3, temperature=0.0, mask_temperature=0.0)
    model = (tasks.engine.transformer, tasks.engine.layout, tasks.prompt, 1, params)
    padded, plain = (naive_masked.draw_images(*model, padded_to=size) for size in (20, 0))
    assert torch.equal(padded, plain)


@pytest.mark.parametrize("family", masked_tasks.FAMILIES)
def test_a_run_writes_its_lines(family, tmp_path):
    path = tmp_path / "lines.jsonl"
    assert main(["bench", "e2e", "--family", family, "--shape", "tiny", "--out", str(path)]) == 0
    written = lines.read_lines(path)
    assert [line["case"] for line in written] == list(masked_tasks.CASES)
    assert all(line["bench"] == f"e2e-{family}" and line["speedup"] > 0 for line in written)


@pytest.mark.parametrize("family", masked_tasks.FAMILIES)
def test_a_step_writes_its_lines(family, tmp_path):
    """Loss and gradients are those of the padded sequences, or nothing would be measured."""
    path = tmp_path / "lines.jsonl"
    assert main(["bench", "train", "--family", family, "--shape", "tiny", "--out", str(path)]) == 0
    written = lines.read_lines(path)
    assert [line["case"] for line in written] == list(train.CASES)
    assert all(line["bench"] == f"train-{family}" and line["speedup"] > 0 for line in written)


def test_a_wrong_result_is_not_timed(monkeypatch):
    tasks = masked_tasks.MaskedTasks(masked_tasks.FAMILIES["mmada"], "tiny", torch.device("cpu"), torch.float32)
    assert tasks.check() is None
    monkeypatch.setattr(tasks, "draw", lambda *_: torch.zeros(1, 9, dtype=torch.int64))
    assert "greedy images have" in tasks.check()
