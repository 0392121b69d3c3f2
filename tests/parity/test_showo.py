"""Show-o checkpoints against outputs of the original code, through load_model, span trees and Pair-DPO's packed pass.

The folders are those of tests/data and any given in HERMESFLOW_GOLDEN (separated as in PATH), each with config.json,
weights, meta.json and golden.safetensors, or weights alone; a folder of such folders will do.
"""

import copy
import functools
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from hermesflow import load_model
from hermesflow.algorithms import packing
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.packing import PairPacker, TokenMask
from hermesflow.algorithms.pair_dpo import pass_objective
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA, SIDES
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.weights import load_weights
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import showo

DATA = Path(__file__).parents[1] / "data"
GIVEN = [Path(folder) for folder in os.environ.get("HERMESFLOW_GOLDEN", "").split(os.pathsep) if folder]
FOLDERS = [
    folder
    for given in [DATA, *GIVEN]
    for folder in (given, *sorted(given.iterdir()))
    if (folder / "config.json").is_file() and '"Showo"' in (folder / "config.json").read_text()
]
GOLDEN = [folder for folder in FOLDERS if (folder / "golden.safetensors").is_file()]
LOGITS, SUMS, GRADIENT = 2e-4, 1e-3, 1e-3
"""Tolerances that are stated with the golden data."""


class Original:
    """A folder: the model, and what the original code made of it."""

    def __init__(self, folder):
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.golden = load_file(folder / "golden.safetensors")
        self.model = load_model(str(folder))
        self.layout = self.model.layout
        # max_seq_length holds the text, its start and its end.
        self.model.prompts = replace(self.model.prompts, max_prompt_tokens=self.meta["max_seq_length"] - 2)

    def prompt(self, ids):
        """A generation sequence without its pads, cut in front of soi."""
        ids = [token for token in ids if token != self.layout.pad]
        return ids[: ids.index(self.layout.soi)]

    def image(self, ids):
        """[soi, image, eoi] of a generation sequence."""
        return ids[-(self.layout.num_image_tokens + 2) :]


@pytest.fixture(scope="module", params=GOLDEN, ids=lambda folder: folder.name)
def original(request):
    return Original(request.param)


@functools.cache
def loaded(folder):
    return load_model(str(folder))


def test_there_is_something_to_compare():
    assert GOLDEN and len(FOLDERS) > len(GOLDEN)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shards_hold_the_same_weights(folder):
    whole = folder.with_name(folder.name.removesuffix("-sharded"))
    if whole not in FOLDERS:
        pytest.skip(f"there is no {whole.name} beside it to compare with")
    ours, other = (loaded(each).transformer.state_dict() for each in (folder, whole))
    assert ours.keys() == other.keys() and all(torch.equal(ours[name], other[name]) for name in ours)


def test_special_ids(original):
    layout, special = original.layout, original.meta["special_ids"]
    assert {name: layout.special(name) for name in ("soi", "eoi", "sov", "eov", "t2i", "mmu", "t2v", "v2v", "lvg")} == {
        name.strip("<|>"): value for name, value in special.items() if name not in ("<|sot|>", "<|eot|>", "<|pad|>")
    }
    assert (layout.sot, layout.eot, layout.pad) == tuple(special[f"<|{name}|>"] for name in ("sot", "eot", "pad"))
    assert (layout.vocab_size, layout.text_vocab_size) == (original.meta["vocab"], original.meta["n_base"])


def test_prompts(original):
    layout, rows = original.layout, original.golden["t2i.input_ids"].tolist()
    for text, row in zip(original.meta["prompts"], rows, strict=True):
        prompt = layout.text_prompt(original.model.image_prompt(text))
        image = original.image(row)
        assert [layout.pad] * (len(row) - len(prompt) - len(image)) + [*prompt, *image] == row
        codes = [token - layout.code_offset for token in image[1:-1] if token != layout.mask_id]
        assert layout.image(codes)[0] == image[0] and layout.image(codes)[-1] == image[-1]


def test_questions(original):
    layout = original.layout
    for number, question in enumerate(original.meta["mmu_questions"]):
        row = original.golden[f"mmu{number}.input_ids"][0].tolist()
        prefix = layout.image_prefix([token - layout.code_offset for token in row[2 : 2 + layout.num_image_tokens]])
        assert [*prefix, *layout.question(original.model.encode_text(question))] == row


def test_generation_sequences(original):
    """Ids, who sees whom, and logits at the image, of all prompts in one forest."""
    golden, layout, transformer = original.golden, original.layout, original.model.transformer
    rows = golden["t2i.input_ids"].tolist()
    spans = [
        span
        for index, row in enumerate(rows)
        for span in ((original.prompt(row), -1, "causal"), (original.image(row), 2 * index, "full"))
    ]
    tree = SpanTree.build(spans)
    with torch.no_grad():
        hidden, allowed = transformer(tree), tree.allowed()
    first = layout.code_offset
    for index, row in enumerate(rows):
        text, image = tree.span_rows(2 * index), tree.span_rows(2 * index + 1)
        num_pads = row.count(layout.pad)
        own = allowed[text.start : image.stop, text.start : image.stop]
        assert torch.equal(own, golden["t2i.attention_allowed"][index][num_pads:, num_pads:].bool())
        assert allowed[text.start : image.stop].sum() == own.sum()
        with torch.no_grad():
            logits = transformer.head(hidden[image])
        assert (logits - golden["t2i.full_logits_last_rows"][index]).abs().max() <= LOGITS
        codes = logits[1:-1, first : first + layout.codebook_size]
        assert (codes - golden["t2i.image_logits"][index]).abs().max() <= LOGITS


def test_understanding_sequences(original):
    golden, transformer = original.golden, original.model.transformer
    prefix = original.layout.num_image_tokens + 3
    for number in range(len(original.meta["mmu_questions"])):
        row = golden[f"mmu{number}.input_ids"][0].tolist()
        with torch.no_grad():
            hidden = transformer(SpanTree.build([(row[:prefix], -1, "full"), (row[prefix:], 0, "causal")]))
            assert (transformer.head(hidden) - golden[f"mmu{number}.logits"][0]).abs().max() <= LOGITS


def test_greedy_answers(original):
    """All questions at once, each with the codes of its own image."""
    golden, layout = original.golden, original.layout
    numbers = range(len(original.meta["mmu_questions"]))
    rows = [golden[f"mmu{number}.input_ids"][0].tolist() for number in numbers]
    codes = torch.tensor([row[2 : 2 + layout.num_image_tokens] for row in rows]) - layout.code_offset
    questions = [[row[layout.num_image_tokens + 4 :]] for row in rows]
    wanted = [golden[f"mmu{number}.greedy"].tolist() for number in numbers]
    sampling = [SamplingParams(temperature=0.0, max_new_tokens=max(map(len, wanted)))]
    seeds = torch.zeros(len(rows), 1, 1, dtype=torch.int64)
    found = original.model.engine.generate_text(codes, questions, sampling=sampling, seeds=seeds, text_only=False)
    for ((ids,),), greedy in zip(found, wanted, strict=True):
        end = greedy.index(layout.eot) if layout.eot in greedy else len(greedy)
        assert ids[: len(greedy)] == greedy[:end]


def test_parallel_decoding(original):
    """Per position, code frequencies of as many samples of ours as of the original are of one distribution."""
    model, num_samples = original.model, original.meta["maskgit_samples"]
    prompt = model.image_prompt(original.meta["prompts"][0])
    seeds = torch.arange(num_samples)[None]
    found = [re.fullmatch(r"maskgit\.steps(\d+)\.w([\d.]+)\.marginal", name) for name in original.golden]
    cases = [match for match in found if match]
    assert cases
    for case in cases:
        codes = model.engine.generate(
            [prompt],
            num_images=num_samples,
            num_steps=int(case[1]),
            guidance_scale=float(case[2]),
            mask_temperature=1.0,
            mask_decay="showo",
            seeds=seeds,
        )[0]
        theirs = original.golden[case[0]].double() * num_samples
        ours = torch.nn.functional.one_hot(codes, theirs.shape[1]).sum(0).double()
        both = ours + theirs
        statistic = torch.where(both > 0, (ours - theirs) ** 2 / both.clamp(min=1), 0.0).sum(1)
        freedom = ((both > 0).sum(1) - 1).double()
        chance = torch.special.gammaincc(freedom / 2, statistic / 2)
        assert chance.min() > 1e-3 / len(chance), case[0]
        if theirs.shape[1] <= 64:  # with more codes the noise of 8,192 samples alone comes near to it
            assert ((ours - theirs).abs().sum(1) / 2 / num_samples).max() <= 0.06, case[0]


@pytest.fixture(scope="module")
def pair_dpo_step(original):
    """Sums of policy and reference by side, shares of the objective, and the gradient under published names.

    The pair is a table's, packed as in training. Two things are the original's: its mask, and what stands between image
    and caption. There the original data has no start of text and no question, but the first tokens of each caption,
    which are not scored; win and lose begin differently, so that each is packed with a beginning of its own.
    """
    golden, layout, model = original.golden, original.layout, original.model
    ids = {name: golden[f"pairdpo.{name}_input_ids"][0] for name in ("win", "lose", "mmu_win", "mmu_lose")}
    labels = {name: golden[f"pairdpo.{name}_labels"][0] for name in ids}
    prompt, num_image = original.prompt(ids["win"].tolist()), layout.num_image_tokens + 2
    prefix = ids["mmu_win"][: num_image + 1]
    assert original.prompt(ids["lose"].tolist()) == prompt
    assert torch.equal(ids["mmu_lose"][: len(prefix)], prefix)
    text = next(each for each in original.meta["prompts"] if layout.text_prompt(model.image_prompt(each)) == prompt)
    row = dict.fromkeys(PAIRS_SCHEMA.names) | {"caption": text, "sides": "both"}
    row["record_codes"] = (prefix[2:-1] - layout.code_offset).tolist()
    is_hidden, given = {}, {}
    for role in ("win", "lose"):
        image, wanted = ids[role][-num_image:], labels[role][-num_image:]
        is_hidden[role] = image == layout.mask_id
        # soi and eoi are scored in their own places, as the hidden tokens are.
        assert torch.equal(
            (wanted != -100).nonzero(),
            torch.cat([torch.tensor([[0]]), is_hidden[role].nonzero(), torch.tensor([[num_image - 1]])]),
        )
        row[f"{role}_codes"] = (torch.where(is_hidden[role], wanted, image)[1:-1] - layout.code_offset).tolist()
        wanted = labels[f"mmu_{role}"]
        *caption, end = wanted[wanted != -100].tolist()
        assert end == layout.eot
        first = (wanted != -100).nonzero()[0, 0]
        given[role] = ids[f"mmu_{role}"][len(prefix) : first].tolist()
        row[f"{role}_caption_ids"] = caption
    assert torch.equal(is_hidden["win"], is_hidden["lose"])
    mask = TokenMask(is_hidden["win"][1:-1].nonzero()[:, 0].numpy(), 1.0)
    config = TrainConfig(beta=original.meta["pairdpo"]["beta"], boundary_labels=True, **PAPER_OBJECTIVE)
    packer = PairPacker(model, pa.Table.from_pylist([row], PAIRS_SCHEMA), config, 0)
    visits, batches = [PairVisit(0, 0)], {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "draw_masks", lambda *_: [mask])
        patch.setattr(TokenLayout, "question", lambda _, text_ids: list(text_ids))
        for role, packer.question_ids in given.items():
            batches[role] = packer.pack(visits)
    batch, reference = batches["win"], copy.deepcopy(model).transformer
    load_weights(reference, original.folder / "reference.safetensors", showo.published_tensors)
    sides = {name: side.segment for name, side in batch.sides.items()}
    is_lose_caption = torch.cat([(segment == 1) & (name == "understanding") for name, segment in sides.items()])

    def logprobs(transformer):
        found = {role: batch_logprobs(transformer, each) for role, each in batches.items()}
        return torch.where(is_lose_caption, found["lose"], found["win"])

    now = logprobs(model.transformer)
    with torch.no_grad():
        before = logprobs(reference)
    loss, shares = pass_objective(now, before, batch, packer.num_pairs(visits), config)
    loss.backward()
    gradients = copy.deepcopy(model.transformer)
    for ours, parameter in zip(gradients.parameters(), model.transformer.parameters(), strict=True):
        ours.data = parameter.grad
    model.transformer.zero_grad(set_to_none=True)
    sums = [
        {side: torch.zeros(2).index_add(0, sides[side], values).tolist() for side, values in batch.split(each).items()}
        for each in (now.detach(), before)
    ]
    return sums, {"loss": loss.item()} | shares, showo.published_tensors(gradients)


def test_pair_dpo_sums_and_losses(original, pair_dpo_step):
    (policy, reference), losses, _ = pair_dpo_step
    meta = original.meta["pairdpo"]
    for number, side in enumerate(SIDES):
        for sums, who in ((policy, "policy"), (reference, "ref")):
            assert sums[side] == pytest.approx([meta[f"{who}_{role}"][number] for role in ("win", "lose")], abs=SUMS)
    found = [float(losses[name]) for name in ("generation/loss", "understanding/loss", "loss")]
    assert found == pytest.approx([meta["loss_t2i"], meta["loss_mmu"], meta["loss"]], abs=SUMS)


def test_pair_dpo_gradients(original, pair_dpo_step):
    names = [name.removeprefix("pairdpo.grad.") for name in original.golden if name.startswith("pairdpo.grad.")]
    assert names
    for name in names:
        wanted = original.golden[f"pairdpo.grad.{name}"]
        error = (pair_dpo_step[2][name] - wanted).abs().max() / wanted.abs().max()
        assert error <= GRADIENT, f"{name}: {error}"
