"""hermesflow.accelerate against outputs of the original code: a stand-in of its class with the golden weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import logsigmoid, one_hot

import hermesflow
from hermesflow.benchmarks import published_inputs
from hermesflow.benchmarks.accelerated import load_class
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.weights import read_tensors

FOLDER = Path(__file__).parents[1] / "data/showo-tiny"
SUMS, GRADIENT, TOTAL_VARIATION = 1e-3, 1e-3, 0.06
"""Tolerances that are stated with the golden data."""
CONFIG = json.loads((FOLDER / "config.json").read_text())
META = json.loads((FOLDER / "meta.json").read_text())
LAYOUT = TokenLayout(
    text_vocab_size=CONFIG["llm_vocab_size"],
    codebook_size=CONFIG["codebook_size"],
    num_image_tokens=CONFIG["num_vq_tokens"],
    sot=META["special_ids"]["<|sot|>"],
    eot=META["special_ids"]["<|eot|>"],
)


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


def accelerated(weights):
    model = load_class(FOLDER.parents[1] / "showo_stand_in")(
        CONFIG["w_clip_vit"],
        CONFIG["vocab_size"],
        CONFIG["llm_vocab_size"],
        FOLDER / "llm",
        CONFIG["codebook_size"],
        CONFIG["num_vq_tokens"],
    )
    model.load_state_dict(read_tensors(weights))
    return hermesflow.accelerate(model.eval())


@pytest.fixture(scope="module")
def policy():
    return accelerated(FOLDER)


@pytest.fixture(scope="module")
def reference():
    return accelerated(FOLDER / "reference.safetensors")


@pytest.fixture(autouse=True)
def no_original(caplog):
    yield
    assert not [record for record in caplog.get_records("call") if record.name == "hermesflow.drop_in"]


def image_mask(ids):
    return published_inputs.image_attention_mask(ids, LAYOUT.pad, LAYOUT.soi, LAYOUT.eoi)


@pytest.mark.parametrize("number", range(len(META["mmu_questions"])))
def test_greedy_answers(policy, golden, number):
    ids, wanted = golden[f"mmu{number}.input_ids"], golden[f"mmu{number}.greedy"]
    mask = published_inputs.understanding_attention_mask(ids, LAYOUT.eoi)
    found = policy.mmu_generate(ids, attention_mask=mask, max_new_tokens=len(wanted), top_k=1)
    assert torch.equal(torch.stack(found), wanted)


@pytest.mark.parametrize("case", [re.compile(r"maskgit\.steps1\.w0\.0"), re.compile(r"maskgit\.steps4\.w2\.0")])
def test_marginals(policy, golden, case):
    (name,) = (name for name in golden if case.match(name))
    num_steps, guidance_scale = re.fullmatch(r"maskgit\.steps(\d+)\.w([\d.]+)\.marginal", name).groups()
    num_samples, length = META["maskgit_samples"], META["max_seq_length"]
    first = golden["t2i.input_ids"][0].tolist()
    prompt = [token for token in first[: first.index(LAYOUT.soi)] if token != LAYOUT.pad][2:-1]
    ids = published_inputs.generation_ids(LAYOUT, [prompt], length)
    unguided = published_inputs.generation_ids(LAYOUT, [[]], length)
    both = [part.expand(num_samples, -1) for part in (ids, unguided)]
    mask = torch.cat([image_mask(part).expand(num_samples, -1, -1, -1) for part in (ids, unguided)])
    torch.manual_seed(0)
    codes = policy.t2i_generate(
        both[0],
        both[1],
        mask if float(guidance_scale) else mask[:num_samples],
        timesteps=int(num_steps),
        guidance_scale=float(guidance_scale),
        config=published_inputs.published_config(LAYOUT, length),
    )
    ours = one_hot(codes, LAYOUT.codebook_size).double().mean(0)
    assert ((ours - golden[name]).abs().sum(1) / 2).max() <= TOTAL_VARIATION


def sums(model, golden, role):
    """Of the pair's image and caption sequence, as the published training calls it with the sizes given."""
    images, captions = (golden[f"pairdpo.{kind}_input_ids"] for kind in (role, f"mmu_{role}"))
    mask = torch.cat([image_mask(images), published_inputs.understanding_attention_mask(captions, LAYOUT.eoi)])
    labels = torch.cat([golden[f"pairdpo.{kind}_labels"] for kind in (role, f"mmu_{role}")])
    return model.loss_for_unidpo(
        torch.cat([images, captions]),
        attention_mask=mask,
        labels=labels,
        batch_size_t2i=1,
        batch_size_mmu=1,
        max_seq_length=META["max_seq_length"],
    )


def test_pair_dpo(policy, reference, golden):
    """Sums, the published loss, and its gradients."""
    wanted, losses = META["pairdpo"], []
    now = {role: sums(policy, golden, role) for role in ("win", "lose")}
    with torch.no_grad():
        before = {role: sums(reference, golden, role) for role in ("win", "lose")}
    for role in ("win", "lose"):
        for found, name in ((now, "policy"), (before, "ref")):
            assert [float(value) for value in found[role]] == pytest.approx(wanted[f"{name}_{role}"], abs=SUMS)
    for side in (0, 1):
        win, lose = (now[role][side] - before[role][side] for role in ("win", "lose"))
        losses.append(-logsigmoid(wanted["beta"] * (win - lose)))
    assert [loss.item() for loss in losses] == pytest.approx([wanted["loss_t2i"], wanted["loss_mmu"]], abs=SUMS)
    sum(losses).backward()
    names = [name.removeprefix("pairdpo.grad.") for name in golden if name.startswith("pairdpo.grad.")]
    assert names
    for name in names:
        found, expected = policy.get_parameter(name).grad, golden[f"pairdpo.grad.{name}"]
        assert (found - expected).abs().max() <= GRADIENT * expected.abs().max(), name
