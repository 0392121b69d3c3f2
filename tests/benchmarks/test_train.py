"""The benchmark of a training step: its baseline is the packed pass's truth; its gate and its lines."""

import re
from dataclasses import replace

import pytest
import torch

from hermesflow import cli
from hermesflow.benchmarks import lines, naive_model, train
from hermesflow.benchmarks.measuring import Effort

EXTRA = {"mfu", "items_per_s", "baseline_reference"}


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(train, "EFFORT", Effort(seconds=0.0, min_rounds=1))


@pytest.fixture
def step():
    return train.Step("tiny", torch.device("cpu"), torch.float32)


def bench(*arguments):
    return cli.main(["bench", "train", "--shape", "tiny", *map(str, arguments)])


@pytest.mark.parametrize("case", train.CASES)
def test_loss_and_gradients_equal_the_published_algorithms(case, step):
    loss, gradients = step.results(lambda: step.run(case))
    naive_loss, naive_gradients = step.results(step.run_naive)
    assert loss.item() == pytest.approx(naive_loss.item(), rel=1e-5)
    assert abs(naive_loss.item() - 2 * torch.tensor(2.0).log().item()) > 0.01  # policy and reference differ
    for name, gradient in gradients.items():
        assert naive_gradients[name].norm() > 0
        torch.testing.assert_close(gradient, naive_gradients[name], rtol=1e-3, atol=1e-5, msg=name)


def test_several_passes_add_up_to_one(step):
    whole = step.results(lambda: step.run("step_live"))
    step.packer.config = replace(step.config, tokens_per_pass=max(map(step.packer.num_tokens, step.visits)))
    assert len(step.packer.passes(step.visits)) == 2
    assert step.compare(step.results(lambda: step.run("step_live")), whole) is None


def test_padded_sequences_hold_what_is_packed(step):
    batch, layout = step.packer.pack(step.visits), step.layout
    padded = naive_model.pad_pairs(layout, batch, 16)
    assert padded.ids.shape == padded.labels.shape == (2, 4, 16 + 16 + 3)
    pair = step.packer.pairs.slice(step.visits[0].pair, 1).to_pylist()[0]
    prompt = layout.text_prompt([int(figures) for figures in pair["caption"].split()])
    question = layout.question(step.packer.question_ids)
    for role, name in enumerate(("win", "lose")):
        ids, labels = padded.ids[role, 0], padded.labels[role, 0]
        scored = labels != naive_model.IGNORED
        assert ids[:-18].tolist() == [layout.pad] * (17 - len(prompt)) + prompt
        assert torch.where(scored, labels, ids)[-18:].tolist() == layout.image(pair[f"{name}_codes"])
        assert (ids[scored] == layout.mask_id).all() and scored.any()

        ids, labels = padded.ids[role, 2].tolist(), padded.labels[role, 2].tolist()
        caption = pair[f"{name}_caption_ids"]
        sequence = [*layout.image_prefix(pair["record_codes"]), *question, *caption]
        assert ids == sequence + [layout.pad] * (35 - len(sequence))
        first = len(sequence) - len(caption) - 1
        assert labels[first : first + len(caption) + 1] == [*caption, layout.eot]
        assert set(labels[:first] + labels[len(sequence) :]) <= {naive_model.IGNORED}
    assert (padded.labels[0, :2] != padded.labels[1, :2]).any()
    same_mask = (padded.labels[:, :2] != naive_model.IGNORED).all(0) | (padded.labels[:, :2] < 0).all(0)
    assert same_mask.all()


def test_every_case(tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    assert bench("--out", out) == 0
    written = lines.read_lines(out)
    assert [line["case"] for line in written] == list(train.CASES)
    for line in written:
        assert set(line) == {*lines.FIELDS, *EXTRA}
        assert (line["bench"], line["backend"], line["baseline"]) == ("train", "engine", "naive")
        assert line["speedup"] == pytest.approx(line["baseline_ms_p50"] / line["ms_p50"])
        assert 0 < line["peak_mib"] < line["baseline_peak_mib"]
        assert 0 < line["mfu"] < 1.0001 * line["roof_fraction"]
        assert line["items_per_s"]["pairs"] == pytest.approx(2e3 / line["ms_p50"])
    live, cached = written
    work = live["tflop_s"] * live["ms_p50"], cached["tflop_s"] * cached["ms_p50"]
    assert work[0] == pytest.approx(4 / 3 * work[1])
    # Gradients of all weights are part of the peak.
    step = train.Step("tiny", torch.device("cpu"), torch.float32)
    num_bytes = sum(parameter.nbytes for parameter in step.transformer.parameters())
    assert min(line["peak_mib"] for line in written) > num_bytes / 2**20
    assert "pairs/s, MFU" in capsys.readouterr().out


def test_profiles_without_the_baseline(tmp_path):
    out = tmp_path / "lines.jsonl"
    assert bench("--case", "step_live", "--no-naive", "--profile", tmp_path / "traces", "--out", out) == 0
    (line,) = lines.read_lines(out)
    assert line["baseline"] is None and line["ms_p50"] > 0
    table = (tmp_path / "traces" / "step_live.txt").read_text()
    assert "pass" in table.partition("phases")[2]


def test_readme_table(tmp_path, capsys):
    out, readme = tmp_path / "lines.jsonl", tmp_path / "README.md"
    assert bench("--case", "step_cached", "--dtype", "bfloat16", "--out", out) == 0
    readme.write_text("before\n<!-- results train -->\n<!-- /results -->\nafter\n")
    assert cli.main(["bench", "table", str(out), "--readme", str(readme)]) == 0
    row = r"\| step_cached \| tiny: 2 pairs, .* bfloat16 \| engine \| .* tokens/s, .*x \("
    assert re.search(row, readme.read_text())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss: loss + 0.01 * loss.detach(), "step_live: the loss is .*, by the published algorithm"),
        (lambda loss: 1.01 * loss - 0.01 * loss.detach(), "step_live: the gradient of .* differs"),
        (lambda loss: loss * float("nan"), "step_live: the loss is nan"),
    ],
    ids=["loss", "gradient", "nan"],
)
def test_a_wrong_step_gives_no_number(spoil, message, monkeypatch, tmp_path, capsys):
    right = train.pass_objective

    def wrong(*arguments):
        loss, shares = right(*arguments)
        return spoil(loss), shares

    monkeypatch.setattr(train, "pass_objective", wrong)
    out = tmp_path / "lines.jsonl"
    assert bench("--out", out) == 1
    assert lines.read_lines(out) == []
    assert re.search(f"not measured: {message}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "huge"], "--shape: expected .*tiny, got 'huge'"),
        (["--case", "step"], "--case: expected step_cached, step_live, got 'step'"),
        (["--out", "/dev/null/lines.jsonl"], "/dev/null"),
    ],
    ids=["shape", "case", "out"],
)
def test_bad_arguments(arguments, message, capsys):
    assert bench(*arguments) == 2
    text = capsys.readouterr().err
    assert re.search(message, text) and text.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_cuda(capsys):
    assert bench("--device", "cuda") == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err
