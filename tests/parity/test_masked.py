"""MMaDA and Lumina-DiMOO checkpoints against outputs of their original code, through load_model, engine and packing.

The folders are those of tests/data and any given in HERMESFLOW_GOLDEN, as in test_autoregressive.py.
"""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.packing import TokenMask
from hermesflow.algorithms.pair_dpo import pass_objective
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.engine.decoders.masked import MLCache
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.kernels.span_tree import SpanTree

FAMILIES = ("mmada", "dimoo")
LOGITS, SUMS, GRADIENT = 2e-4, 1e-3, 1e-3
LARGEST_VARIATION, MEAN_VARIATION = 0.045, 0.03
"""Tolerances that are stated with the golden data."""


def family_of(folder):
    meta = folder / "meta.json"
    return json.loads(meta.read_text()).get("family") if meta.is_file() else None


GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
FOLDERS = [
    folder
    for given in [Path(__file__).parents[1] / "data", *GIVEN]
    for folder in (given, *sorted(given.iterdir()))
    if family_of(folder) in FAMILIES
]


class Original:
    """A folder: the model, and what the original code made of it."""

    def __init__(self, folder):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.golden = load_file(folder / "golden.safetensors")
        self.family = self.meta["family"]
        self.model = self.opened(folder)
        self.layout = self.model.layout

    def opened(self, folder):
        """The folder's model, with the grid and the length of prompts that its outputs were made with."""
        model = load_model(folder, dtype=torch.float32)
        if self.family == "dimoo":
            model.layout = model.layout.of_grid(tuple(self.meta["grid"]))
        else:
            model.prompts = replace(model.prompts, max_prompt_tokens=self.meta["max_seq_length"] - 2)
        return model

    def logits(self, ids):
        tree = SpanTree.build([(ids, -1, "full")])
        with torch.no_grad():
            return self.model.transformer.head(self.model.transformer(tree))

    def codes_of(self, ids):
        """Of the image codes among ids, -1 where one is masked."""
        layout = self.layout
        found = [token for token in ids if token in layout.code_ids or token == layout.mask_id]
        return [-1 if token == layout.mask_id else int(layout.code_ids.numbers(torch.tensor(token))) for token in found]


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def original(request):
    return Original(request.param)


def assert_close(found, expected, tolerance=LOGITS):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_vocabulary(original):
    layout, meta = original.layout, original.meta
    assert layout.mask_id == meta["mask_id"] and layout.code_offset == meta["code_offset"]
    assert (layout.codebook_size, layout.vocab_size) == (meta["codebook_size"], meta["vocab_size"])
    assert layout.num_image_tokens == meta["num_image_tokens"]
    assert layout.mask_id not in layout.text_ids and layout.eot in layout.text_ids


def test_generation_sequences(original):
    """Ids of prompt and image, and logits at every place; MMaDA's also with the pads that it was trained with."""
    layout, model, golden = original.layout, original.model, original.golden
    for number, text in enumerate(original.meta["prompts"]):
        prompt = layout.text_prompt(model.image_prompt(text))
        if original.family == "dimoo":
            ids = golden[f"t2i{number}.input_ids"].tolist()
            codes = original.codes_of(ids[len(prompt) :])
            assert [*prompt, *layout.image(codes)] == ids
            assert_close(original.logits(ids), golden[f"t2i{number}.logits"])
            continue
        row, seen = golden["t2i.input_ids"][number], golden["t2i.attention_mask"][number].bool()
        ids = row[seen].tolist()
        codes = original.codes_of(ids[len(prompt) :])
        assert [*prompt, *layout.image(codes)] == ids
        logits = original.logits(ids)
        places = len(prompt) + torch.from_numpy(layout.code_positions)
        first, last = layout.code_ids[0], layout.code_ids[layout.codebook_size - 1] + 1
        assert_close(logits[places, first:last], golden["t2i.image_logits"][number])
        padded = replace(layout, padded_to=original.meta["max_seq_length"] + 1)
        whole = [*padded.text_prompt(model.image_prompt(text)), *layout.image(codes)]
        assert whole == row.tolist()
        if number < len(golden["t2i.logits"]):
            assert_close(logits, golden["t2i.logits"][number][seen])
            places = padded.padded_to + torch.from_numpy(layout.code_positions)
            assert_close(original.logits(whole)[places, first:last], golden["t2i.logits_with_pads_seen"][number])


def asked(original, number):
    """(codes [1, N], text ids of the question, ids before the answer) of an understanding sequence."""
    codes, model = original.golden["mmu.codes"].long()[None], original.model
    question = model.question_prompt(original.meta[f"mmu{number}"]["question"])
    return codes, question, original.layout.asked(codes[0].tolist(), question)


@pytest.mark.parametrize("number", [0, 1])
def test_understanding_sequences(original, number):
    layout, golden, meta = original.layout, original.golden, original.meta[f"mmu{number}"]
    _, _, before = asked(original, number)
    length = meta.get("max_new_tokens") or meta["gen_length"]
    ids = [*before, *[layout.mask_id] * length, *layout.after_answer]
    given = golden[f"mmu{number}.input_ids"].tolist()
    assert (ids if original.family == "dimoo" else before) == given
    assert_close(original.logits(ids), golden[f"mmu{number}.logits"])


def drawn(original, number, **more):
    """The whole region of an answer as the decoder fills it, from the joint vocabulary."""
    meta, layout = original.meta[f"mmu{number}"], original.layout
    codes, question, _ = asked(original, number)
    length = meta.get("max_new_tokens") or meta["gen_length"]
    params = SamplingParams(
        temperature=0.0, max_new_tokens=length, num_steps=meta["steps"], block_length=meta["block_length"]
    )
    seeds = torch.zeros(1, 1, 1, dtype=torch.int64)
    decoder = MaskedTextDecoder(original.model.transformer, replace(layout, **more))
    with torch.inference_mode():
        return decoder.extend(codes, [[question]], [params], seeds, text_only=False)[0][0][0]


@pytest.mark.parametrize("number", [0, 1])
def test_greedy_answers(original, number):
    expected = original.golden[f"mmu{number}.greedy"].tolist()
    ids = drawn(original, number)
    end = original.layout.eot
    assert ids == (expected[: expected.index(end)] if end in expected else expected)


@pytest.mark.parametrize("number", [0, 1])
def test_drawing_ends_with_a_block(original, number):
    if original.family != "mmada":
        pytest.skip("Lumina-DiMOO's own early end fails")
    fast = original.golden[f"mmu{number}.fast"].tolist()
    end = original.meta[f"mmu{number}"]["fast_eot_token"]
    block = original.meta[f"mmu{number}"]["block_length"]
    assert fast[block - 1] == end and set(fast[block:]) == {original.layout.mask_id}
    assert drawn(original, number, eot=end) == fast[: fast.index(end)]


def assert_drawn_alike(ids, frequency):
    """Ids int64 [n, L] against the frequency [L, V] of each id at each place in as many draws of the original: by total
    variation, and all places together by the chi-square of two samples, over ids that come more than ten times in both.
    """
    ours = F.one_hot(ids, frequency.shape[1]).double().mean(0)
    variation = (ours - frequency).abs().sum(1) / 2
    assert variation.max() <= LARGEST_VARIATION and variation.mean() <= MEAN_VARIATION, variation
    counts, others = ours * len(ids), frequency * len(ids)
    is_common = counts + others > 10
    square = ((counts - others)[is_common] ** 2 / (counts + others)[is_common]).sum()
    freedom = is_common.sum() - is_common.any(1).sum()
    assert square < freedom + 5 * (2 * freedom) ** 0.5, (square, freedom)


def test_sampled_answers(original):
    settings = original.meta["mmu0"].get("sampled")
    if settings is None:
        pytest.skip(f"{original.folder.name} has no sampled answers")
    expected = original.golden[settings["key"]].double()
    codes, question, _ = asked(original, 0)
    count = settings["samples"]
    params = SamplingParams(
        temperature=settings["temperature"],
        max_new_tokens=settings["max_new_tokens"],
        num_steps=settings["steps"],
        block_length=settings["block_length"],
    )
    seeds = 77 + torch.arange(count).view(1, 1, count)
    # An end is an id as any other here, and a mask that is drawn counts too.
    layout = original.layout
    decoder = MaskedTextDecoder(original.model.transformer, replace(layout, eot=layout.pad))
    with torch.inference_mode():
        ids = decoder.extend(codes, [[question]], [params] * count, seeds, text_only=False, max_tokens=65_536)[0][0]
    whole = [answer for answer in ids if len(answer) == params.max_new_tokens]
    assert len(whole) > 0.9 * count
    without = expected.clone()
    without[:, [layout.mask_id, layout.pad]] = 0
    assert_drawn_alike(torch.tensor(whole), without / without.sum(1, keepdim=True))


def test_sampled_images(original):
    for settings in original.meta["maskgit"]:
        expected = original.golden[settings["key"]].double()
        count = settings["samples"]
        params = replace(
            original.model.sampling,
            num_steps=settings["num_steps"],
            guidance_scale=settings["guidance"],
            temperature=settings["temperature"],
            mask_decay=settings["mask_decay"],
        )
        prompt, seeds = original.model.image_prompt(settings["prompt"]), torch.arange(count).view(1, -1) + 4321
        codes = original.model.engine.generate(
            [prompt], num_images=count, seeds=seeds, sampling=params, max_sequences=2048
        )[0]
        assert_drawn_alike(codes, expected)


def test_greedy_images(original):
    if original.family != "dimoo":
        pytest.skip("MMaDA's noise has no end at temperature 0")
    seeds = torch.zeros(1, 1, dtype=torch.int64)
    cases = [(settings["key"], settings) for settings in original.meta["greedy"]]
    of_cache = {"prompt": original.meta["prompts"][0], **original.meta["mlcache"]}
    cases.append(("image.mlcache.exact", {**of_cache, "use_cache": False}))
    cases.append(("image.mlcache.greedy", of_cache))
    for key, settings in cases:
        names = ("cache_ratio", "warmup_ratio", "refresh_interval")
        cache = MLCache(**{name: settings[name] for name in names}) if settings.get("use_cache") else None
        params = replace(
            original.model.sampling,
            num_steps=settings["num_steps"],
            guidance_scale=settings["guidance"],
            temperature=0.0,
            mask_temperature=0.0,
            ml_cache=cache,
        )
        prompt = original.model.image_prompt(settings["prompt"])
        codes = original.model.engine.generate([prompt], num_images=1, seeds=seeds, sampling=params)[0, 0]
        assert codes.tolist() == original.golden[key].tolist(), key


def test_scores_are_of_a_masked_region(original):
    """Those of given answers, from the logits of the original behind a region that is masked as a whole."""
    meta, layout = original.meta["mmu0"], original.layout
    codes, question, before = asked(original, 0)
    length = meta.get("max_new_tokens") or meta["gen_length"]
    logits = original.golden["mmu0.logits"][len(before) : len(before) + length]
    text = list(range(20, 20 + length - 1))
    (((score, of_one),),) = original.model.engine.score_choices(
        codes, [[question]], [[[text, text[:1]]]], text_only=False
    )
    logprob = logits.log_softmax(1)
    assert score == pytest.approx(float(logprob[range(length), [*text, layout.eot]].sum()), abs=SUMS)
    assert of_one == pytest.approx(float(logprob[0, text[0]] + logprob[1, layout.eot]), abs=SUMS)


class Pair:
    """The pair of the golden data: a row of a table of pairs, and what its masks hide."""

    def __init__(self, original):
        golden, layout, meta = original.golden, original.layout, original.meta["pairdpo"]
        prompt = layout.text_prompt(original.model.image_prompt(meta["prompt"]))
        question = original.model.question_prompt(meta["question"])
        record = golden["mmu.codes"].tolist()
        before = layout.asked(record, question)
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {"sides": "both", "caption": meta["prompt"], "record_codes": record}
        hidden_codes = np.flatnonzero(golden["pairdpo.image_mask"].numpy())
        # Where its count begins, MMaDA's has the line break before the answer.
        ahead = len(before) - meta.get("caption_prompt_length", len(before))
        hidden_text = np.flatnonzero(golden["pairdpo.caption_mask"].numpy()) - ahead
        self.region = meta["answer_region"] - ahead
        for role in ("win", "lose"):
            row[f"{role}_codes"] = golden[f"pairdpo.{role}_codes"].tolist()
            masked = np.array(row[f"{role}_codes"])
            masked[hidden_codes] = -1
            given = golden[f"pairdpo.image_{role}.input_ids"].tolist()
            assert given[len(given) - len(prompt) - layout.image_length :] == [*prompt, *layout.image(masked)]
            text = meta["captions"][role == "lose"]
            row |= {f"{role}_caption": text, f"{role}_caption_ids": original.model.encode_text(text)}
            region = [*row[f"{role}_caption_ids"], layout.eot]
            region = np.array(region + [layout.filler] * (self.region - len(region)))
            if original.family == "mmada":
                assert golden[f"pairdpo.caption_{role}.target_ids"].tolist() == [*before, *region]
            region[hidden_text] = layout.mask_id
            assert golden[f"pairdpo.caption_{role}.input_ids"].tolist() == [*before, *region]
        self.row, self.question = row, question
        self.masks = {layout.num_image_tokens: hidden_codes, self.region: hidden_text}


@pytest.fixture(scope="module")
def reference(original, tmp_path_factory):
    folder = shutil.copytree(original.folder, tmp_path_factory.mktemp("reference") / "model")
    shutil.copy(original.folder / "reference.safetensors", folder / "model.safetensors")
    return original.opened(folder)


def test_pair_dpo(original, reference, monkeypatch, tmp_path):
    """Sums, losses and gradients under the masks of the golden data."""
    meta, pair = original.meta["pairdpo"], Pair(original)
    config = TrainConfig(beta=meta["beta"], **PAPER_OBJECTIVE | {"masks_per_pair": 1, "complementary_masks": False})
    packer = make_packer(original.model, pa.Table.from_pylist([pair.row], PAIRS_SCHEMA), config, 0)
    packer.question_ids, visits = pair.question, [PairVisit(0, 0)]
    regions = packer._regions(0)
    padded = [ids + [original.layout.filler] * (pair.region - len(ids)) for ids in regions]
    monkeypatch.setattr(packer, "_regions", lambda _: padded)
    monkeypatch.setattr(
        "hermesflow.algorithms.bidirectional_packing.draw_masks",
        lambda count, *_: [TokenMask(pair.masks[count], 1.0)],
    )
    batch = packer.pack(visits)
    now = batch_logprobs(original.model.transformer, batch)
    with torch.no_grad():
        before = batch_logprobs(reference.transformer, batch)
    loss, shares = pass_objective(now, before, batch, packer.num_pairs(visits), config)
    for values, who in ((now, "policy"), (before, "reference")):
        parts = batch.split(values.detach())
        for side, name in (("generation", "image"), ("understanding", "caption")):
            expected = [meta[name][f"{who}_{role}"] for role in ("win", "lose")]
            assert batch.sides[side].pair_sums(parts[side])[0].tolist() == pytest.approx(expected, abs=SUMS)
    found = [shares["generation/loss"].item(), shares["understanding/loss"].item(), loss.item()]
    assert found == pytest.approx([meta["loss_image"], meta["loss_caption"], meta["loss"]], abs=SUMS)
    loss.backward()
    holder = load_model(original.folder, dtype=torch.float32)
    for ours, theirs in zip(holder.parts.parameters(), original.model.parts.parameters(), strict=True):
        ours.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
    original.model.parts.zero_grad(set_to_none=True)
    gradients = holder.published_tensors()
    for name in meta["gradients"]:
        wanted = original.golden[f"pairdpo.grad.{name}"]
        error = (gradients[name] - wanted).abs().max() / wanted.abs().max()
        assert error <= GRADIENT, f"{name}: {error}"
