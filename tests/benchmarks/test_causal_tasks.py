"""The benchmark of families that draw code by code: the published loops are the engine's truth, and it writes lines."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hermesflow import cli, load_model
from hermesflow.benchmarks import causal_models, causal_tasks, e2e, lines, naive_causal, train
from hermesflow.benchmarks.measuring import Effort
from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder, CodeSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine

CPU, DATA = torch.device("cpu"), Path(__file__).parents[1] / "data"
OF_ITEMS = {"mfu", "items_per_s"}
PROMPTS = ([105, 103, 117], [110], [])


@pytest.fixture(params=causal_models.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def tasks(family):
    return causal_tasks.CausalTasks(family, "tiny", CPU, torch.float32)


def drawn_by_both(tasks, prompt, num_images, params, layout=None):
    """Codes [n, N] of the published loop, and of the engine."""
    layout = layout or tasks.engine.layout
    model = (tasks.engine.transformer, layout, tasks.family.way)
    engine = Engine(tasks.engine.transformer, layout, image_decoder=AutoregressiveDecoder)
    seeds = torch.arange(num_images)[None]
    ours = engine.generate([prompt], num_images=num_images, seeds=seeds, sampling=params)[0]
    return naive_causal.draw_images(*model, prompt, num_images, params), ours


@pytest.mark.parametrize("guidance_scale", [0.0, 3.0])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_images_equal_the_engines(prompt, guidance_scale, tasks):
    params = CodeSamplingParams(guidance_scale=guidance_scale, temperature=0.0)
    theirs, ours = drawn_by_both(tasks, prompt, 2, params)
    assert theirs.tolist() == ours.tolist()
    assert len(set(theirs[0].tolist())) > 1 and theirs.max() < tasks.engine.layout.codebook_size


def test_greedy_images_of_another_grid_equal_the_engines():
    tasks = causal_tasks.CausalTasks("emu3", "tiny", CPU, torch.float32)
    layout = tasks.engine.layout.of_grid((2, 4))
    theirs, ours = drawn_by_both(tasks, PROMPTS[0], 1, CodeSamplingParams(guidance_scale=2.0, temperature=0.0), layout)
    assert theirs.shape == (1, 8) and theirs.tolist() == ours.tolist()


@pytest.mark.parametrize("folder", ["janus-tiny", "emu3-tiny", "chameleon-tiny"])
def test_greedy_images_equal_the_original_codes(folder):
    """Those that the published code drew of the same weights."""
    meta = json.loads((DATA / folder / "meta.json").read_text())
    golden, model = load_file(DATA / folder / "golden.safetensors"), load_model(DATA / folder, dtype=torch.float32)
    layout, expected = model.layout, golden["greedy0.codes"]
    if "negative_prompt" in meta:
        layout = replace(layout, negative_ids=tuple(model.encode_text(meta["negative_prompt"])))
    prompt = model.image_prompt(meta["prompts"][0])
    way = naive_causal.WAYS[meta["family"]]
    assert way.prompts(layout, prompt)[0] == golden["greedy0.prompt_ids"].tolist()
    params = CodeSamplingParams(guidance_scale=meta["guidance"] - 1, temperature=0.0)
    drawn = naive_causal.draw_images(model.transformer, layout, way, prompt, 1, params)
    assert drawn[0].tolist() == expected.tolist()


@pytest.mark.parametrize("filters", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_filters_that_leave_one_code_draw_greedy_images(filters, tasks):
    params = CodeSamplingParams(guidance_scale=1.0, temperature=0.0)
    greedy = tasks.naive_draw(1, params)
    assert tasks.naive_draw(2, replace(params, **{"temperature": 1.0} | filters)).tolist() == 2 * greedy.tolist()


def test_images_by_the_published_settings_differ_and_hold_codes_alone(tasks):
    images = tasks.naive_draw(3, tasks.family.sampling)
    assert images.shape == (3, 9) and len({tuple(image) for image in images.tolist()}) > 1
    assert 0 <= images.min() and images.max() < tasks.engine.layout.codebook_size


def test_greedy_answers_equal_the_engines(tasks):
    params = SamplingParams(temperature=0.0, max_new_tokens=6)
    expected = tasks.answer(tasks.questions, [params])
    assert [tasks.naive_answer(question, params) for question in tasks.questions] == [ids for (ids,) in expected]
    assert {len(ids) for (ids,) in expected} == {6}  # eot is never drawn


def test_loss_and_gradients_equal_the_packed_passes(family):
    step = causal_tasks.CausalStep(family, "tiny", CPU, torch.float32)
    naive_loss, naive_gradients = step.results(step.run_naive)
    assert abs(naive_loss.item() - 2 * torch.tensor(2.0).log().item()) > 1e-3  # policy and reference differ
    for case in train.CASES:
        loss, gradients = step.results(lambda case=case: step.run(case))
        assert loss.item() == pytest.approx(naive_loss.item(), rel=1e-4)
        for name, gradient in gradients.items():
            right = naive_gradients[name]
            assert right.norm() > 0 and (gradient - right).norm() <= 1e-3 * right.norm(), name


def test_images_by_code_need_what_whole_sequences_do(tasks):
    """Of one image; of several, what they share is counted once."""
    work, layout, text = tasks.work, tasks.engine.layout, [0] * 5
    fed = layout.num_image_tokens - 1 + 2 * len(layout.row_end)
    lengths = [len(ids) + len(layout.before_image) for ids in (layout.text_prompt(text), layout.unguided_prompt(text))]

    def flops(num_images):
        return sum(one.num_flops for one in work.images_by_code(num_images, len(text)))

    spans = [(1, length + fed, 0, True) for length in lengths]
    assert flops(1) == work.one_pass(spans, 0, layout.num_image_tokens, layout.codebook_size).num_flops
    assert flops(3) - flops(2) == flops(2) - flops(1) < flops(1)


@pytest.fixture
def quick(monkeypatch):
    """Short answers and one round."""
    monkeypatch.setattr(e2e, "EFFORT", replace(e2e.EFFORT, seconds=0.0, min_rounds=1))
    monkeypatch.setattr(train, "EFFORT", Effort(seconds=0.0, min_rounds=1))
    monkeypatch.setattr(e2e, "CAPTION_SAMPLING", e2e.CAPTION_SAMPLING[:2])
    monkeypatch.setattr(e2e, "ANSWER_SAMPLING", SamplingParams(temperature=0.0, max_new_tokens=2))


def bench(name, family, *arguments):
    return cli.main(["bench", name, "--family", family, "--shape", "tiny", *map(str, arguments)])


def test_every_task_writes_its_line(quick, family, tmp_path, capsys):
    out, traces = tmp_path / "lines.jsonl", tmp_path / "traces"
    assert bench("e2e", family, "--out", out, "--profile", traces) == 0
    written = lines.read_lines(out)
    assert [line["case"] for line in written] == list(causal_tasks.CASES)
    for line in written:
        assert {*lines.FIELDS, *OF_ITEMS} <= set(line)
        assert (line["bench"], line["backend"], line["baseline"]) == (f"e2e-{family}", "engine", "naive")
        assert line["speedup"] == pytest.approx(line["baseline_ms_p50"] / line["ms_p50"])
        assert line["peak_mib"] > 0 and line["baseline_peak_mib"] > 0
        assert 0 < line["mfu"] < 1.0001 * line["roof_fraction"]
        assert (traces / f"{line['case']}.txt").is_file()
    scaled = "one image x 3" if family == "emu3" else None
    assert [line["baseline_scaled"] for line in written] == [None, scaled, None, None]
    assert written[1]["items_per_s"]["image tokens"] == pytest.approx(27e3 / written[1]["ms_p50"])
    assert "captions/s" in capsys.readouterr().out


def test_a_step_writes_its_lines(quick, family, tmp_path):
    out = tmp_path / "lines.jsonl"
    assert bench("train", family, "--out", out) == 0
    written = lines.read_lines(out)
    assert [line["case"] for line in written] == list(train.CASES)
    for line in written:
        assert (line["bench"], line["baseline"]) == (f"train-{family}", "naive")
        assert 0 < line["peak_mib"] < line["baseline_peak_mib"]
        assert 0 < line["mfu"] < 1.0001 * line["roof_fraction"]


@pytest.mark.parametrize(
    ("method", "spoil", "message"),
    [
        ("generate", lambda codes: codes.roll(1, -1), "greedy images have"),
        ("generate_text", lambda ids: [[[[t + 1 for t in a] for a in q] for q in i] for i in ids], "greedy answers"),
    ],
    ids=["images", "answers"],
)
def test_a_wrong_engine_gives_no_number(method, spoil, message, quick, monkeypatch, tmp_path, capsys):
    right = getattr(Engine, method)
    monkeypatch.setattr(Engine, method, lambda *arguments, **options: spoil(right(*arguments, **options)))
    out = tmp_path / "lines.jsonl"
    assert bench("e2e", "janus", "--out", out) == 1
    assert lines.read_lines(out) == []
    assert re.search(f"not measured: {message}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("e2e", ["--shape", "showo-1.3b"], "--shape: expected small, tiny, got 'showo-1.3b'"),
        ("e2e", ["--case", "score"], "--case: expected .*images-1, got 'score'"),
        ("train", ["--case", "images"], "--case: expected step_cached, step_live, got 'images'"),
    ],
    ids=["shape", "task", "step"],
)
def test_bad_arguments(name, arguments, message, capsys):
    assert bench(name, "emu3", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
