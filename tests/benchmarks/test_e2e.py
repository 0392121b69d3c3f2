"""The benchmark of whole tasks: its baseline is the engine's truth, its arithmetic, its lines and its profiles."""

import gzip
import json
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hermesflow import cli
from hermesflow.benchmarks import e2e, lines, naive_model, published_inputs
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.model_work import ModelWork
from hermesflow.kernels.span_tree import SpanTree

KINDS = ("sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied", "relu2-no-rotary")
PROMPTS = ([5, 9, 7], [11], [])
EXTRA = {"mfu", "items_per_s", "num_rounds", "baseline_rounds", "baseline_scaled"}


@pytest.fixture(params=KINDS)
def model(request, naive):
    """A random tiny transformer of each kind, and its layout."""
    return naive.tiny_model(request.param), naive.LAYOUT


def codes_of(layout, num_images):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(layout.codebook_size, (num_images, layout.num_image_tokens), generator=generator)


def assert_same_logits(transformer, tree, naive_logits, make_truth):
    """Logits [rows, V] of a tree and naive's: errors against fp64 within twice naive's, and four roundings."""
    ours = F.linear(transformer(tree), transformer.head.weight, transformer.head.bias)
    transformer.double()
    truth = make_truth()
    transformer.float()
    floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    naive_error = (naive_logits - truth).abs().max()
    assert naive_error < 1e-4 * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * naive_error + floor


@torch.no_grad()
def test_logits_of_images_equal_the_engines(model):
    transformer, layout = model
    prompts = [list(prompt) for prompt in PROMPTS]
    ids = published_inputs.generation_ids(layout, prompts, 8)
    generator = torch.Generator().manual_seed(1)
    ids[:, -10:-1] = layout.code_offset + torch.randint(layout.codebook_size, (len(ids), 9), generator=generator)
    mask, text = naive_model.image_mask(layout, ids), [layout.text_prompt(prompt) for prompt in prompts]

    def logits():
        every = naive_model.all_logits(transformer, ids, mask)
        span = layout.num_image_tokens + 2
        return torch.cat([row[-span - len(of_row) :] for row, of_row in zip(every, text, strict=True)])

    spans = []
    for row, of_row in zip(ids.tolist(), text, strict=True):
        assert row[: 9 - len(of_row)] == [layout.pad] * (9 - len(of_row))
        spans += [(of_row, -1, "causal"), (row[9:], len(spans), "full")]
    assert_same_logits(transformer, SpanTree.build(spans), logits(), logits)


@torch.no_grad()
def test_logits_of_answers_equal_the_engines(model):
    transformer, layout = model
    codes, question = codes_of(layout, 1)[0].tolist(), [4, 8, 15, 16]
    ids = naive_model.question_sequence(layout, codes, question, "cpu")

    def logits():
        return naive_model.all_logits(transformer, ids, naive_model.question_mask(layout, ids))[0]

    tree = SpanTree.build([(layout.image_prefix(codes), -1, "full"), (layout.question(question), 0, "causal")])
    assert_same_logits(transformer, tree, logits(), logits)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
@pytest.mark.parametrize("kind", KINDS[:-1])  # without positions masked tokens are equal, so that ties decide
def test_images_without_noise_equal_the_engines(kind, guidance_scale, naive):
    transformer, layout = naive.tiny_model(kind), naive.LAYOUT
    params = ImageSamplingParams(
        num_steps=5, guidance_scale=guidance_scale, mask_temperature=0.0, temperature=0.0, mask_decay="showo"
    )
    drawn = naive_model.draw_images(transformer, layout, PROMPTS, params, num_text_tokens=8)
    expected = Engine(transformer, layout).generate(
        PROMPTS,
        num_images=1,
        num_steps=5,
        guidance_scale=guidance_scale,
        mask_temperature=0.0,
        temperature=0.0,
        mask_decay="showo",
        seeds=torch.zeros(len(PROMPTS), 1, dtype=torch.int64),
    )
    assert drawn.tolist() == expected[:, 0].tolist()


def test_images_with_noise_differ_and_hold_codes_only(model):
    transformer, layout = model
    params = ImageSamplingParams(num_steps=5, guidance_scale=2.0, mask_temperature=1.0, mask_decay="showo")
    first, second = (naive_model.draw_images(transformer, layout, PROMPTS[:2], params) for _ in range(2))
    assert first.shape == (2, layout.num_image_tokens) and (first != second).any()
    assert 0 <= int(first.min()) <= int(first.max()) < layout.codebook_size


def test_greedy_answers_equal_the_engines(model):
    transformer, layout = model
    codes, questions = codes_of(layout, 2), [[4, 8, 15], [16]]
    params = SamplingParams(temperature=0.0, max_new_tokens=8)
    expected = Engine(transformer, layout).extend(
        codes, [questions] * 2, sampling=[params], seeds=torch.zeros(2, 2, 1, dtype=torch.int64), text_only=False
    )
    for image, of_image in zip(codes.tolist(), expected, strict=True):
        for question, (answer,) in zip(questions, of_image, strict=True):
            assert naive_model.answer_question(transformer, layout, image, question, params) == answer


def test_answers_are_among_the_likeliest_tokens(naive):
    transformer, layout = naive.tiny_model(), naive.LAYOUT
    codes, question = codes_of(layout, 1)[0].tolist(), [4, 8]
    ids = naive_model.question_sequence(layout, codes, question, "cpu")
    with torch.no_grad():
        logits = naive_model.all_logits(transformer, ids, naive_model.question_mask(layout, ids))[0, -1]
    params = SamplingParams(temperature=2.0, top_k=3, max_new_tokens=1)
    drawn = {
        token for _ in range(60) for token in naive_model.answer_question(transformer, layout, codes, question, params)
    }
    assert 2 <= len(drawn) and drawn <= set(logits.topk(3).indices.tolist())


def test_scores_of_choices_equal_the_engines(model):
    transformer, layout = model
    codes, choices = codes_of(layout, 1), [[3], [7, 9]]
    (((*expected,),),) = Engine(transformer, layout).score_choices(codes, [[[4, 8]]], [[choices]], text_only=False)
    scores = [naive_model.score_choice(transformer, layout, codes[0].tolist(), [4, 8], choice) for choice in choices]
    assert scores == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_that_torch_counts(kind, naive):
    """Of one full span: where attention is causal torch counts the whole square."""
    transformer, layout = naive.tiny_model(kind), naive.LAYOUT
    work = ModelWork(config=transformer.config, layout=layout, dtype=torch.float32)
    ids = naive_model.question_sequence(layout, codes_of(layout, 1)[0].tolist(), [4, 8], "cpu")
    length = ids.shape[1]
    # Of the CPU's fused attention torch counts nothing.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        naive_model.all_logits(transformer, ids, torch.ones(1, 1, length, length, dtype=torch.bool))
    assert work.one_pass([(1, length, 0, False)], 0, length, layout.vocab_size).num_flops == counter.get_total_flops()


def test_work_of_tasks_counts_what_is_shared_once(naive):
    transformer, layout = naive.tiny_model(), naive.LAYOUT
    work = ModelWork(config=transformer.config, layout=layout, dtype=torch.float32)

    def flops(passes):
        return sum(one.num_flops for one in passes)

    # At step 0 the candidates of a prompt are one; each later step is linear in them.
    assert flops(work.images(1, 1, 1, 5)) == flops(work.images(1, 7, 1, 5))
    one, two, three = (flops(work.images(1, count, 4, 5)) for count in (1, 2, 3))
    assert three - two == two - one > 0
    assert len(work.images(1, 1, 4, 5)) == 4 and len(work.answers(1, 1, 5, 2, 6)) == 6
    # Two questions share their image, two answers their question.
    one_answer, two_questions = flops(work.answers(1, 1, 5, 1, 6)), flops(work.answers(1, 2, 5, 1, 6))
    assert flops(work.answers(1, 1, 5, 2, 6)) < two_questions < 2 * one_answer == flops(work.answers(2, 1, 5, 1, 6))
    assert flops(work.choices(1, 1, 5, 2, 3)) < flops(work.choices(1, 2, 5, 1, 3))


def test_the_papers_images_take_seven_hours_at_the_matmul_rate_of_an_h100():
    """80,000 images of 50 steps with guidance by 1.208 billion weights in the layers; 790 TFLOP/s were measured."""
    flops = e2e.paper_flops(torch.bfloat16)
    assert flops["images"] / 790e12 / 3600 == pytest.approx(7.6, rel=0.05)
    assert flops["captions"] < 0.02 * flops["images"] and flops["answers"] < 0.3 * flops["images"]


@pytest.fixture
def quick(monkeypatch):
    """Short answers and one round."""
    monkeypatch.setattr(e2e, "EFFORT", replace(e2e.EFFORT, seconds=0.0, min_rounds=1))
    sampling = SamplingParams(temperature=1.0, top_k=2, max_new_tokens=4)
    monkeypatch.setattr(e2e, "CAPTION_SAMPLING", (sampling, sampling))
    monkeypatch.setattr(e2e, "ANSWER_SAMPLING", SamplingParams(temperature=0.0, max_new_tokens=2))


def bench(*arguments):
    return cli.main(["bench", "e2e", "--shape", "tiny", *map(str, arguments)])


def test_every_case(quick, tmp_path, capsys):
    out, traces = tmp_path / "lines.jsonl", tmp_path / "traces"
    assert bench("--out", out, "--profile", traces) == 0
    written = lines.read_lines(out)
    assert [line["case"] for line in written] == list(e2e.CASES)
    for line in written:
        assert set(line) == {*lines.FIELDS, *EXTRA}
        assert (line["bench"], line["backend"], line["baseline"]) == ("e2e", "engine", "naive")
        assert 0 < line["ms_p20"] <= line["ms_p50"] <= line["ms_p80"]
        assert line["speedup"] == pytest.approx(line["baseline_ms_p50"] / line["ms_p50"])
        assert line["peak_mib"] > 0 and line["baseline_peak_mib"] > 0
        assert 0 < line["mfu"] < 1.0001 * line["roof_fraction"]
        trace = json.loads(gzip.decompress((traces / f"{line['case']}.json.gz").read_bytes()))
        assert {"transformer", "attention", "mlp"} <= {event.get("name") for event in trace["traceEvents"]}
        table = (traces / f"{line['case']}.txt").read_text()
        assert re.search(r"% +[0-9]+ x +aten::", table) and "elsewhere" in table
    images, captions, answers, score, curation = written
    seconds = images["ms_p50"] / 1e3
    assert images["items_per_s"] == pytest.approx({"images": 4 / seconds, "image tokens": 64 / seconds})
    assert captions["items_per_s"]["caption tokens"] == pytest.approx(8 / (captions["ms_p50"] / 1e3))
    assert answers["items_per_s"].keys() == score["items_per_s"].keys() == {"answers"}
    assert curation["items_per_s"]["records"] == pytest.approx(1e3 / curation["ms_p50"])
    assert curation["baseline_scaled"] == "answers about one image x 4" and images["baseline_scaled"] is None
    printed = capsys.readouterr().out
    assert "records/s" in printed and "MFU" in printed
    assert re.search(r"5,000 records .* hours on this device .*by FLOPs at the utilisation", " ".join(printed.split()))


def test_without_the_published_algorithm(quick, tmp_path):
    out = tmp_path / "lines.jsonl"
    assert bench("--case", "answers", "--no-naive", "--dtype", "bfloat16", "--out", out) == 0
    (line,) = lines.read_lines(out)
    assert line["dtype"] == "bfloat16" and line["ms_p50"] > 0
    assert line["baseline"] is line["baseline_ms_p50"] is line["speedup"] is line["baseline_peak_mib"] is None


def test_answers_have_their_full_length():
    tasks = e2e.Tasks(e2e.SHAPES["tiny"], torch.device("cpu"), torch.float32)
    answers = tasks._caption(tasks.viewed)
    assert {len(ids) for of_image in answers for of_question in of_image for ids in of_question} == {30}
    params = SamplingParams(temperature=2.0, max_new_tokens=30)
    assert len(tasks._naive_answer(tasks.caption_question, params)) == 30


@pytest.mark.parametrize(
    ("method", "spoil", "message"),
    [
        ("score_choices", lambda scores: [[[s + 0.1 for s in c] for c in q] for q in scores], "log-probability is"),
        (
            "generate_text",
            lambda ids: [[[[t + 1 for t in a] for a in q] for q in i] for i in ids],
            "greedy answers have 0%",
        ),
        ("generate", lambda codes: codes.roll(1, -1), "greedy images have"),
    ],
    ids=["score", "answers", "images"],
)
def test_a_wrong_engine_gives_no_number(method, spoil, message, quick, monkeypatch, tmp_path, capsys):
    right = getattr(Engine, method)
    monkeypatch.setattr(Engine, method, lambda *arguments, **options: spoil(right(*arguments, **options)))
    out = tmp_path / "lines.jsonl"
    assert bench("--out", out) == 1
    assert lines.read_lines(out) == []
    assert re.search(f"not measured: .*{message}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--case", "video"], "--case: expected .*, got 'video'"), (["--out", "/dev/null/lines.jsonl"], "/dev/null")],
    ids=["case", "out"],
)
def test_bad_arguments(arguments, message, capsys):
    assert bench(*arguments) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda(capsys):
    assert bench("--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
