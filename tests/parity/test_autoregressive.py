"""Chameleon, Emu3 and Janus checkpoints against outputs of their original code, through load_model, engine and packing.

The folders are those of tests/data and any given in HERMESFLOW_GOLDEN (separated as in PATH), each with meta.json and
golden.safetensors; a folder of such folders will do. Nothing is known of a folder but what its meta.json says.
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
from PIL import Image
from safetensors.torch import load_file, save_file

from hermesflow import load_model
from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.batch import PairVisit
from hermesflow.algorithms.packing import PairPacker
from hermesflow.algorithms.pair_dpo import pass_objective
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.prompt_spans import PromptSpans
from hermesflow.engine.sequence_logprob import next_token_targets
from hermesflow.engine.weights import read_tensors
from hermesflow.kernels.linear_logprob import linear_logprob
from hermesflow.kernels.matmul import linear
from hermesflow.kernels.span_tree import SpanTree

FAMILIES = ("chameleon", "emu3", "janus")
LOGITS, PIXELS, SUMS, GRADIENT = 2e-4, 1e-3, 1e-3, 1e-3
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
        self.model = opened(folder, self.meta)
        self.family, self.layout = self.meta["family"], self.model.layout

    def has(self, *names):
        """Skips a test of entries that the folder does not have."""
        if missing := [name for name in names if name not in self.golden]:
            pytest.skip(f"{self.folder.name} has no {', '.join(missing)}")

    def numbered(self, pattern):
        """The numbers i for which the folder has an entry of this name."""
        return [number for number in range(10) if pattern.format(number) in self.golden]

    def grid(self, number):
        """Of the greedy image of that number."""
        codes = len(self.golden[f"greedy{number}.codes"])
        return self.layout.image_grid if codes == self.layout.num_image_tokens else tuple(self.meta["rect"])

    def prompt(self, number, grid=None):
        """Text ids of the greedy image's prompt, and the ids from which both branches start."""
        layout = self.layout.of_grid(grid or self.layout.image_grid)
        for text in self.meta["prompts"]:
            ids = self.model.image_prompt(text)
            starts = [
                [*start, *layout.before_image] for start in (layout.text_prompt(ids), layout.unguided_prompt(ids))
            ]
            if starts[0] == self.golden[f"greedy{number}.prompt_ids"].tolist():
                return ids, *starts
        pytest.fail(f"no prompt of meta.json gives greedy{number}.prompt_ids")

    def hidden(self, *spans, embeds=None):
        """Hidden states of causal spans, each the child of the one before it."""
        tree = SpanTree.build([(ids, number - 1, "causal") for number, ids in enumerate(spans)])
        return self.model.transformer(tree, embeds=embeds)

    def logits(self, hidden):
        """Of the joint vocabulary; Janus: of the text."""
        return self.model.transformer.head(hidden)

    def code_logits(self, hidden):
        """Of the image codes, in their order."""
        head = self.model.transformer.code_head(self.layout.code_ids)
        return linear(head.inputs(hidden), head.weight, head.bias)

    def image_logits(self, start, codes):
        """Of the codes, before each code of an image that follows the ids of start."""
        length = len(start) - len(self.layout.before_image)
        hidden = self.hidden(start[:length], self.layout.image(codes.tolist()))
        return self.code_logits(hidden[torch.from_numpy(length + self.layout.code_positions - 1)])

    def seen(self, number):
        """What the model sees in understanding sequence `number`."""
        if self.family == "janus":
            with torch.no_grad():
                return self.model.features(self.golden["und.pixel_values"][number : number + 1])
        return self.golden[f"und{number}.codes"][None]

    def question(self, number):
        """Text ids of its question."""
        return self.model.question_prompt(self.meta["questions"][number])


def opened(folder, meta):
    """The folder's model, with the negative prompt that its outputs were made with."""
    model = load_model(folder, dtype=torch.float32)
    if "negative_prompt" in meta:
        model.layout = replace(model.layout, negative_ids=tuple(model.encode_text(meta["negative_prompt"])))
    return model


@pytest.fixture(scope="module", params=FOLDERS, ids=lambda folder: folder.name)
def original(request):
    return Original(request.param)


def assert_close(found, expected, tolerance=LOGITS):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance


def test_there_is_something_to_compare():
    assert {family_of(folder) for folder in FOLDERS} == set(FAMILIES)


def test_vocabulary(original):
    layout, meta = original.layout, original.meta
    theirs = {"eot": "eos", "turn": "eot"} if original.family == "chameleon" else {"eot": "eos"}
    special = {name: meta["special_ids"].get(theirs.get(name, name)) for name in vars(layout)}
    found = {name: id for name, id in special.items() if id is not None}
    assert {"bos", "eot", "boi", "eoi"} <= found.keys()
    assert {name: getattr(layout, name) for name in found} == found
    sizes = [layout.codebook_size, list(layout.image_grid), original.model.image_size]
    assert sizes == [meta["codebook_size"], meta["grid"], meta["grid"][0] * meta["pixels_per_token"]]
    if original.family == "janus":
        assert layout.text_vocab_size == meta["vocab"]
        return
    codes = meta.get("code_ids") or range(meta["code_offset"], meta["code_offset"] + meta["codebook_size"])
    assert (list(layout.code_ids), layout.vocab_size) == (list(codes), meta["vocab"])


def test_prompts(original):
    for number in original.numbered("greedy{}.prompt_ids"):
        _, _, negative = original.prompt(number, original.grid(number))
        assert negative == original.golden[f"greedy{number}.negative_ids"].tolist()


def test_greedy_images(original):
    golden, layout = original.golden, original.layout
    for number in original.numbered("greedy{}.codes"):
        grid = original.grid(number)
        ids, start, _ = original.prompt(number, grid)
        guidance = original.meta["guidance"] - 1
        settings = {"guidance_scale": guidance, "temperature": 0.0, "grid": grid}
        codes = original.model.engine.generate([ids], num_images=1, seeds=torch.tensor([[7]]), **settings)[0, 0]
        assert torch.equal(codes, golden[f"greedy{number}.codes"])
        if f"greedy{number}.sequence" in golden:
            before = start[: len(start) - len(layout.of_grid(grid).before_image)]
            check_sequence(
                [*before, *layout.of_grid(grid).image(codes.tolist())], number, original, "greedy{}.sequence"
            )


def check_sequence(ids, number, original, name):
    """Our ids are the golden ones, which may end with eos."""
    expected = original.golden[name.format(number)].tolist()
    assert expected[: len(ids)] == ids and expected[len(ids) :] in ([], [original.layout.eot])


def test_rectangles_are_drawn_and_decoded(original):
    """A grid of the draw is that of known codes and of the result; families of one grid refuse it."""
    ids, rect, seeds = original.prompt(0)[0], tuple(original.meta.get("rect", (1, 2))), torch.arange(2)[None]
    draw = {"num_images": 2, "seeds": seeds, "guidance_scale": 1.0, "grid": rect}
    if "rect" not in original.meta:
        with pytest.raises(ValueError, match=r"draws images of \d+ x \d+ codes alone, got a grid of 1 x 2"):
            original.model.engine.generate([ids], **draw)
        return
    known = torch.full((1, rect[0] * rect[1]), -1)
    known[0, 0] = 1
    codes = original.model.engine.generate([ids], known_codes=known, **draw)
    assert codes.shape == (1, 2, known.shape[1]) and (codes[..., 0] == 1).all()
    with pytest.raises(ValueError, match="expected known_codes"):
        original.model.engine.generate([ids], known_codes=known[:, :-1], **draw)
    drawn = original.model.generate(
        original.meta["prompts"][0], sampling=replace(original.model.sampling, temperature=0.0, grid=rect)
    )
    pixels = original.meta["pixels_per_token"]
    assert drawn[0].size == (rect[1] * pixels, rect[0] * pixels)


@torch.no_grad()
def test_logits_of_both_branches(original):
    golden, compared = original.golden, 0
    for number in original.numbered("greedy{}.codes"):
        names = (f"greedy{number}.cond_logits", f"greedy{number}.uncond_logits")
        if original.family == "janus":
            names = (f"t2i{number}.image_logits", f"t2i{number}.uncond_image_logits")
        if names[0] not in golden:
            continue
        codes = golden[f"t2i{number}.codes" if original.family == "janus" else f"greedy{number}.codes"]
        for start, name in zip(original.prompt(number)[1:], names, strict=True):
            assert_close(original.image_logits(start, codes), golden[name])
            compared += 1
    assert compared >= 2


@torch.no_grad()
def test_generation_sequences(original):
    """Logits at every position: of all ids, or of the codes."""
    golden, layout = original.golden, original.layout
    if original.family == "janus":
        pytest.skip("its parts are compared in test_janus_hidden_states")
    for number in original.numbered("t2i{}.input_ids"):
        _, start, _ = original.prompt(number)
        prompt = start[: len(start) - len(layout.before_image)]
        image = layout.image(golden[f"greedy{number}.codes"].tolist())
        check_sequence([*prompt, *image], number, original, "t2i{}.input_ids")
        ends = golden[f"t2i{number}.input_ids"].tolist()[len(prompt) + len(image) :]
        hidden = original.hidden(prompt, [*image, *ends])
        if f"t2i{number}.logits" in golden:
            assert_close(original.logits(hidden), golden[f"t2i{number}.logits"])
        if f"t2i{number}.code_logits" in golden:
            assert_close(original.code_logits(hidden), golden[f"t2i{number}.code_logits"])


@torch.no_grad()
def test_janus_hidden_states(original):
    original.has("t2i0.hidden")
    golden, layout = original.golden, original.layout
    for number in original.numbered("t2i{}.prompt_ids"):
        start = golden[f"t2i{number}.prompt_ids"].tolist()
        assert start == original.prompt(number)[1]
        codes = [layout.code_ids[code] for code in golden[f"t2i{number}.codes"].tolist()]
        hidden = original.hidden(start, codes[:-1])
        logits = golden[f"t2i{number}.prompt_logits"]
        assert_close(original.logits(hidden[: len(start)])[-len(logits) :], logits)
        if f"t2i{number}.hidden" in golden:
            assert_close(hidden, golden[f"t2i{number}.hidden"])


@torch.no_grad()
def test_understanding_sequences(original):
    """Ids and logits; und1.logits holds the last row alone."""
    for number in original.numbered("und{}.input_ids"):
        prompts = PromptSpans(original.layout, original.seen(number), [[original.question(number)]])
        image, question = prompts.image(0)[0], prompts.question(0, 0)
        expected = original.golden[f"und{number}.input_ids"]
        placeholder = original.meta["special_ids"].get("image_placeholder")
        if original.family == "janus":  # pads stand for what features replace
            expected = expected.masked_fill(expected == placeholder, original.layout.pad)
        assert expected.tolist() == [*image, *question]
        logits = original.logits(original.hidden(image, question, embeds=prompts.embeds([0], with_root=False)))
        wanted = original.golden[f"und{number}.logits"]
        assert_close(logits[-len(wanted) :], wanted)


@pytest.mark.parametrize(("entry", "text_only"), [("greedy", False), ("greedy_no_images", True)])
def test_greedy_answers(original, entry, text_only):
    """All questions at once, each about its own image."""
    numbers = original.numbered(f"und{{}}.{entry}")
    if not numbers:
        pytest.skip(f"{original.folder.name} has no {entry} answers")
    wanted = [original.golden[f"und{number}.{entry}"].tolist() for number in numbers]
    found = original.model.engine.generate_text(
        torch.cat([original.seen(number) for number in numbers]),
        [[original.question(number)] for number in numbers],
        sampling=[SamplingParams(temperature=0.0, max_new_tokens=max(map(len, wanted)))],
        seeds=torch.zeros(len(numbers), 1, 1, dtype=torch.int64),
        text_only=text_only,
    )
    eot = original.layout.eot
    for ((ids,),), greedy in zip(found, wanted, strict=True):
        assert ids[: len(greedy)] == greedy[: greedy.index(eot) if eot in greedy else None]


def sampled_cases():
    for folder in FOLDERS:
        for name, settings in json.loads((folder / "meta.json").read_text())["sampled"].items():
            yield pytest.param(folder, name, settings, id=f"{folder.name}-{name}")


@pytest.mark.parametrize(("folder", "name", "settings"), list(sampled_cases()))
def test_sampled_images(folder, name, settings):
    """Share of each code at each position against the mean of the laws that the original drew from."""
    original = Original(folder)
    expected = original.golden[f"sampled.{name}.expected"].double()
    count, guidance = settings["samples"], settings["guidance"] - 1
    options = {key: value for key, value in settings.items() if key not in ("samples", "guidance")}
    seeds, prompt = torch.arange(count).view(1, -1) + 12_345, original.model.image_prompt(original.meta["prompts"][0])
    codes = original.model.engine.generate(
        [prompt], num_images=count, seeds=seeds, guidance_scale=guidance, max_sequences=4096, **options
    )[0]
    ours = F.one_hot(codes, expected.shape[1]).double().mean(0)
    variation = (ours - expected).abs().sum(1) / 2
    assert variation.max() <= LARGEST_VARIATION and variation.mean() <= MEAN_VARIATION, variation


@torch.no_grad()
def test_images_and_codes(original):
    """Codes of pixels, and uint8 pixels of codes, which are at most a level away."""
    golden, model = original.golden, original.model
    assert torch.equal(model.vq_tokenizer.encode(golden["vq.image"]), golden["vq.codes"])
    if "vq.codes_without_l2" in golden:
        assert not torch.equal(golden["vq.codes"], golden["vq.codes_without_l2"])
    cases = [("vq.codes", "vq.reconstruction", original.meta["grid"])]
    cases += [("vq.rect_codes", "vq.rect_reconstruction", original.meta["rect"])] if "rect" in original.meta else []
    for codes, expected, grid in cases:
        levels = ((golden[expected].clamp(-1, 1) + 1) * 127.5).permute(0, 2, 3, 1).numpy()
        assert np.abs(model.decode_images(golden[codes], *grid) - levels).max() <= 0.5 + 127.5 * PIXELS
    numbers = original.numbered("greedy{}.codes")
    squares = [number for number in numbers if original.grid(number) == original.layout.image_grid]
    drawn = model.decode_images(torch.stack([golden[f"greedy{number}.codes"] for number in squares]))
    again = model.encode_images(drawn)
    assert again.shape == (len(squares), original.layout.num_image_tokens)


@torch.no_grad()
def test_preprocessed_images(original):
    """Within two levels."""
    fit = original.model.fit_whole if original.family == "emu3" else original.model.fit
    settings = json.loads((original.folder / "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(settings[name])[:, None, None] for name in ("image_mean", "image_std"))
    images = []
    for number in original.numbered("preprocess{}.image"):
        images.append(Image.fromarray(original.golden[f"preprocess{number}.image"].numpy()))
        fitted = torch.from_numpy(fit(images[-1])).permute(2, 0, 1)
        ours = (fitted * settings["rescale_factor"] - mean) / std
        assert_close(ours, original.golden[f"preprocess{number}.pixel_values"], 2 / 255)
    by_hand = original.model.features if original.family == "janus" else original.model.vq_tokenizer.encode
    seen = {}
    for numbers, views, _ in original.model.views(images):
        seen |= dict(zip(numbers, views, strict=True))
    for number, image in enumerate(images):
        pixels = torch.from_numpy(fit(image)).permute(2, 0, 1)[None]
        assert_close(seen[number], by_hand(pixels / 127.5 - 1)[0], 1e-5)


@torch.no_grad()
def test_janus_features(original):
    original.has("und.pixel_values")
    pixels = original.golden["und.pixel_values"]
    assert_close(original.model.parts["tower"](pixels), original.golden["und.vision_hidden"])
    assert_close(original.model.features(pixels), original.golden["und.features"])


class Pair:
    """The homologous pair of the golden data: a row of a table of pairs, the question, and what is seen."""

    def __init__(self, original):
        golden, layout, model = original.golden, original.layout, original.model
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {"sides": "both"}
        if original.family == "janus":
            start = golden["pairdpo.prompt_ids"].tolist()
            codes = {role: golden[f"pairdpo.{role}_codes"].tolist() for role in ("win", "lose")}
            captions = {role: golden[f"pairdpo.{role}_caption_ids"].tolist() for role in codes}
            row["sides"], self.pixels = "generation", golden["pairdpo.pixel_values"]
            asked = golden["pairdpo.question_ids"].tolist()
            self.question = asked[asked.index(layout.eoi) + 1 :]
        else:
            ids = {
                name: golden[f"pairdpo.{name}_ids"].tolist() for name in ("t2i_win", "t2i_lose", "mmu_win", "mmu_lose")
            }
            labels = {name: golden[f"pairdpo.{name}_labels"] for name in ids}
            start = ids["t2i_win"][: ids["t2i_win"].index(layout.boi) + len(layout.before_image)]
            codes, captions = {}, {}
            for role in ("win", "lose"):
                scored = labels[f"t2i_{role}"]
                codes[role] = layout.code_ids.numbers(scored[scored >= 0]).tolist()
                positions = len(start) - len(layout.before_image) + layout.code_positions
                assert (scored >= 0).nonzero()[:, 0].tolist() == positions.tolist()
                assert ids[f"t2i_{role}"][: len(start)] == start
                scored = labels[f"mmu_{role}"]
                captions[role] = scored[scored >= 0].tolist()
            row["record_codes"], self.question = self.understood(ids["mmu_win"], labels["mmu_win"], layout)
        for role in codes:
            *caption, end = captions[role]
            assert end == layout.eot
            row |= {f"{role}_codes": codes[role], f"{role}_caption_ids": caption}
        prompts = {text: (model.image_prompt(text), model.encode_text(text)) for text in original.meta["prompts"]}
        # Emu3's pair has no suffix; ours are trained under the prompt that they were drawn from.
        row["caption"], self.prompt = next(
            (text, ids)
            for text, either in prompts.items()
            for ids in either
            if [*layout.text_prompt(ids), *layout.before_image] == start
        )
        self.row, self.captions = row, captions

    @staticmethod
    def understood(ids, labels, layout):
        """Codes of the image and text ids of the question in an understanding sequence."""
        codes = [layout.code_ids.numbers(torch.tensor(id)).item() for id in ids if id in layout.code_ids]
        prefix, framed = layout.image_prefix(codes), ids[: (labels >= 0).nonzero()[0, 0]]
        assert framed[: len(prefix)] == prefix
        asked, around = framed[len(prefix) :], layout.question([])
        question = asked[: len(asked) - len(around)]
        assert layout.question(question) == asked
        return codes, question


@pytest.fixture(scope="module")
def reference(original, tmp_path_factory):
    """The frozen reference, opened from a copy of the folder with its tensors in place."""
    folder = shutil.copytree(original.folder, tmp_path_factory.mktemp("reference") / "model")
    tensors = read_tensors(original.folder) | load_file(folder / "reference.safetensors")
    for shard in [*folder.glob("model*.safetensors"), *folder.glob("*.index.json")]:
        shard.unlink()
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return opened(folder, original.meta)


class Step:
    """Sums of policy and reference and the losses of a side, the images' either way, and the gradient by name."""

    def __init__(self, original, reference, codes_only):
        self.original = original
        self.meta, self.pair = original.meta["pairdpo"], Pair(original)
        self.config = TrainConfig(beta=self.meta["beta"], **PAPER_OBJECTIVE)
        table = pa.Table.from_pylist([self.pair.row], PAIRS_SCHEMA)
        packer = PairPacker(original.model, table, self.config, 0)
        packer.question_ids, visits = self.pair.question, [PairVisit(0, 0)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(original.model, "image_prompt", lambda _: self.pair.prompt)
            batch = packer.pack(visits)
        assert (batch.codes is not None) == original.layout.codes_apart
        batch = replace(batch, code_ids=original.layout.code_ids if codes_only else None)
        now = batch_logprobs(original.model.transformer, batch)
        with torch.no_grad():
            before = batch_logprobs(reference.transformer, batch)
        loss, shares = pass_objective(now, before, batch, packer.num_pairs(visits), self.config)
        self.losses = {name.partition("/")[0]: share for name, share in shares.items() if name.endswith("/loss")}
        self.sums = [
            {name: batch.sides[name].pair_sums(part)[0].tolist() for name, part in batch.split(values.detach()).items()}
            for values in (now, before)
        ]
        if original.family == "janus":
            loss = loss + self.add_captions(reference)
        self.loss = loss.item()
        loss.backward()

    def add_captions(self, reference):
        """The side of a model that sees features, which our packing does not have: one tree by hand."""
        layout = self.original.layout
        sums = []
        for model in (self.original.model, reference):
            prompts = PromptSpans(layout, model.features(self.pair.pixels), [[self.pair.question]])
            spans = [prompts.image(0), (prompts.question(0, 0), 0, "causal")]
            spans += [(ids[:-1], 1, "causal") for ids in self.pair.captions.values()]
            tree = SpanTree.build(spans)
            rows, targets = next_token_targets(tree, [2, 3], end=layout.eot)
            hidden = model.transformer(tree, embeds=prompts.embeds([0], with_root=False), rows=rows)
            values = linear_logprob(hidden, model.transformer.head.weight, targets)
            sums.append(torch.stack([part.sum() for part in values.split(list(map(len, self.pair.captions.values())))]))
        (win, lose), (win_before, lose_before) = sums[0], sums[1].detach()
        loss = -F.logsigmoid(self.config.beta * ((win - win_before) - (lose - lose_before)))
        self.losses["understanding"] = loss.detach()
        for found, values in zip(self.sums, sums, strict=True):
            found["understanding"] = values.tolist()
        return loss

    def gradients(self, folder):
        """Under the names of the checkpoint's files, as a model that holds them is saved."""
        model = self.original.model
        holder = load_model(self.original.folder, dtype=torch.float32)
        for ours, theirs in zip(holder.parts.parameters(), model.parts.parameters(), strict=True):
            ours.data = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
        model.parts.zero_grad(set_to_none=True)
        holder.save(folder)
        return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("codes_only", [False, True], ids=["joint", "codes only"])
def test_pair_dpo(original, reference, codes_only, tmp_path):
    """Sums, losses and gradients, the images' log-probabilities normalized over the vocabulary or the codes."""
    meta, suffix = original.meta["pairdpo"], "_codes_only" if codes_only else ""
    if original.family == "janus":
        if not codes_only:
            pytest.skip("Janus's codes have a head of their own")
        suffix = ""
    step = Step(original, reference, codes_only)
    for sums, who in zip(step.sums, ("policy", "ref"), strict=True):
        expected = [meta[f"{who}_{role}"] for role in ("win", "lose")]
        images = (
            [meta[f"{who}_{role}{suffix}"] for role in ("win", "lose")] if suffix else [both[0] for both in expected]
        )
        assert sums["generation"] == pytest.approx(images, abs=SUMS)
        assert sums["understanding"] == pytest.approx([both[1] for both in expected], abs=SUMS)
    found = [step.losses["generation"].item(), step.losses["understanding"].item(), step.loss]
    assert found == pytest.approx([meta[f"loss_t2i{suffix}"], meta["loss_mmu"], meta[f"loss{suffix}"]], abs=SUMS)
    gradients, prefix = step.gradients(tmp_path), f"pairdpo.{suffix[1:] + '_' if suffix else ''}grad."
    names = [name for name in original.golden if name.startswith(prefix)]
    assert names
    for name in names:
        wanted = original.golden[name]
        error = (gradients[name.removeprefix(prefix)] - wanted).abs().max() / wanted.abs().max()
        assert error <= GRADIENT, f"{name}: {error}"


def test_scores_of_captions(original):
    """The captions' sums once more, as the engine scores choices."""
    pair = Pair(original)
    if original.family == "janus":
        with torch.no_grad():
            seen = original.model.features(pair.pixels)
    else:
        seen = torch.tensor([pair.row["record_codes"]])
    captions = [ids[:-1] for ids in pair.captions.values()]
    scores = original.model.engine.score_choices(seen, [[pair.question]], [[captions]], text_only=False)
    expected = [original.meta["pairdpo"][f"policy_{role}"][1] for role in ("win", "lose")]
    assert scores[0][0] == pytest.approx(expected, abs=SUMS)
