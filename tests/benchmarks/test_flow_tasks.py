"""The benchmark of models that draw latents: its baseline against the original's outputs, its runs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.benchmarks import flow_tasks, lines, naive_flow
from hermesflow.cli import main
from hermesflow.engine.decoders.flow import FlowSamplingParams

BAGEL = Path(__file__).parents[1] / "data/bagel-tiny"


@pytest.mark.parametrize("number", [0, 1])
def test_the_baseline_is_the_original(number):
    model, golden = load_model(BAGEL, dtype=torch.float32), load_file(BAGEL / "golden.safetensors")
    meta = json.loads((BAGEL / "meta.json").read_text())
    settings, prompt = meta["sampling"]["none"], meta[f"t2i{number}"]
    params = FlowSamplingParams(
        num_steps=settings["num_timesteps"],
        shift=settings["timestep_shift"],
        guidance_scale=settings["cfg_text_scale"] - 1,
    )
    layout = model.layout.of_grid(tuple(prompt["grid"]))
    noise = golden[f"t2i{number}.noise"]
    found = naive_flow.draw_image(model.transformer, layout, prompt["prompt_ids"], noise, params)
    assert (found - golden[f"t2i{number}.none.latent"]).abs().max() <= 1e-3
    asked, greedy = meta[f"mmu{number}"], golden[f"mmu{number}.greedy"].tolist()

    def see():
        return model.vision(golden[asked["image"]][None])[0]

    question = asked["question_ids"]
    assert naive_flow.answer_question(model.transformer, model.layout, see, question, len(greedy)) == greedy


@pytest.mark.parametrize(
    "bench, cases",
    [
        ("e2e", flow_tasks.CASES),
        ("train", [f"{side}_{case}" for side in flow_tasks.SIDES for case in ("live", "cached")]),
    ],
)
def test_a_run_writes_its_lines(bench, cases, tmp_path):
    """What both sides give is compared first, or nothing would be measured."""
    path = tmp_path / "lines.jsonl"
    assert main(["bench", bench, "--family", "bagel", "--shape", "tiny", "--out", str(path)]) == 0
    written = lines.read_lines(path)
    assert [line["case"] for line in written] == list(cases)
    assert all(line["bench"] == f"{bench}-bagel" and line["speedup"] > 0 for line in written)


def test_a_wrong_image_is_not_timed(monkeypatch):
    tasks = flow_tasks.FlowTasks("tiny", torch.device("cpu"), torch.float32)
    assert tasks.check() is None
    monkeypatch.setattr(tasks, "draw_latents", lambda count: torch.zeros(count, 9, 64))
    assert "images differ from the published algorithm's" in tasks.check()
