"""accelerate() on the interface of MMaDA's published class: every method against the class's own.

The class is the stand-in, tests/mmada_stand_in, and models.modeling_mmada.MMadaModelLM of each checkout of MMaDA in
HERMESFLOW_PUBLISHED_CODE. The weights, and what the published code made of them, are tests/data/mmada-tiny.
"""

import copy
import inspect
import json
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import hermesflow
from hermesflow.benchmarks.accelerated import load_class
from hermesflow.drop_in import AcceleratedMethod
from hermesflow.drop_in.functional import draw_seeds

TESTS = Path(__file__).parents[2]
STAND_IN = str(TESTS / "mmada_stand_in")
# Read here, since a fixture of all tests hides the variable.
GIVEN = [folder for folder in os.environ.get("HERMESFLOW_PUBLISHED_CODE", "").split(os.pathsep) if folder]
CHECKOUTS = [folder for folder in GIVEN if Path(folder, "models/modeling_mmada.py").is_file()]
FOLDER = TESTS / "data/mmada-tiny"
META = json.loads((FOLDER / "meta.json").read_text())
MASK, OFFSET, SIZE = META["mask_id"], META["code_offset"], META["codebook_size"]
TOKENIZER = SimpleNamespace(text_tokenizer=range(OFFSET))
METHODS = ("t2i_generate", "mmu_generate", "mmu_generate_fast")
IMAGES = {
    "seq_len": 16, "mask_token_id": MASK, "resolution": META["max_seq_length"], "codebook_size": SIZE,
    "uni_prompting": TOKENIZER,
}  # fmt: skip
TEXT = {"max_new_tokens": 16, "steps": 8, "block_length": 8, "mask_id": MASK}


@pytest.fixture(scope="module")
def golden():
    return load_file(FOLDER / "golden.safetensors")


@pytest.fixture(scope="module", params=[STAND_IN, *CHECKOUTS], ids=os.path.basename)
def make_model(request):
    """Makes the model; its class is importable by its name, as pickle needs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
            patch.delitem(sys.modules, name)
        kind = load_class(Path(request.param), "MMadaModelLM")
        module = sys.modules["models.modeling_mmada"]

        def make(**changes):
            settings = {**json.loads((FOLDER / "config.json").read_text()), "init_device": "cpu", **changes}
            model = kind(module.MMadaConfig(**settings))
            model.load_state_dict(load_file(FOLDER / "model.safetensors"))
            model.config.use_cache = False  # which the published class reads, and transformers 5 leaves out
            return model.eval()

        yield make
        for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
            del sys.modules[name]


def image_arguments(golden, rows=(0, 1), *, guidance_scale=0.0, image_ids=None, times=1, **others):
    """Arguments of t2i_generate as the published scripts pass them; the third row's text is empty."""
    ids, mask = (golden[f"t2i.{name}"].long() for name in ("input_ids", "attention_mask"))
    ids[:, -17:-1] = MASK
    given = ids[list(rows)]
    if image_ids is not None:
        given[:, -17:-1] = image_ids
    found = {"input_ids": given.repeat(times, 1), "attention_mask": mask[list(rows)].repeat(times, 1)}
    if guidance_scale:
        count = len(rows) * times
        found |= {"uncond_input_ids": ids[2:].repeat(count, 1), "uncond_attention_mask": mask[2:].repeat(count, 1)}
    return {**found, "guidance_scale": guidance_scale, "timesteps": 4, **IMAGES, **others}


def opened():
    """The model by load_model, with the length of prompts that the outputs were made with."""
    model = hermesflow.load_model(FOLDER, dtype=torch.float32)
    model.prompts = replace(model.prompts, max_prompt_tokens=META["max_seq_length"] - 2)
    return model


def known_half():
    """Joint ids [2, 16], every other one masked."""
    ids = torch.randint(OFFSET, OFFSET + SIZE, (2, 16), generator=torch.Generator().manual_seed(3))
    return ids.masked_fill(torch.arange(16) % 2 == 0, MASK)


# mmu_generate, mmu_generate_fast


@pytest.mark.parametrize("number", [0, 1])
def test_golden_answers(model, fast, golden, number):
    meta, ids = META[f"mmu{number}"], golden[f"mmu{number}.input_ids"].long()[None]
    given = {name: meta[name] for name in ("max_new_tokens", "steps", "block_length")} | {"mask_id": MASK}
    for each in (model, fast):
        found = each.mmu_generate(ids, **given)
        assert found.dtype == torch.int64
        assert found[0].tolist() == [*ids[0].tolist(), *golden[f"mmu{number}.greedy"].tolist()]
        found = each.mmu_generate_fast(ids, **given, eot_token=meta["fast_eot_token"])
        assert found[0, ids.shape[1] :].tolist() == golden[f"mmu{number}.fast"].tolist()


TEXT_CASES = {
    "one block": {"steps": 8, "block_length": 16},
    "a step a token": {"steps": 16, "block_length": 4},
    "more steps than tokens": {"steps": 32, "block_length": 4},
    "guided": {"cfg_scale": 1.5},
    "guided the other way": {"cfg_scale": -1.0},
    "arguments that are not read": {"top_k": 3, "eot_token": 11, "input_embeddings": torch.zeros(1)},
}


@pytest.mark.parametrize("case", TEXT_CASES)
def test_greedy_answers(model, fast, golden, case):
    ids = golden["mmu0.input_ids"].long()[None].repeat(2, 1)
    ids[1, 25:40] = ids[0, 25:40].flip(0)
    wanted, found = (each.mmu_generate(ids, **TEXT | TEXT_CASES[case]) for each in (model, fast))
    assert torch.equal(found, wanted) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_padded_prompts(model, fast, golden, cfg_scale):
    """With guidance the original lets pads be seen."""
    ids = golden["mmu1.input_ids"].long()[None]
    ids = torch.cat([F.pad(ids, (4, 0), value=130), F.pad(ids, (0, 4), value=9)])
    mask = torch.ones(2, ids.shape[1] + 16, dtype=torch.long)
    mask[0, :4] = 0
    wanted, found = (each.mmu_generate(ids, **TEXT, cfg_scale=cfg_scale, attention_mask=mask) for each in (model, fast))
    assert torch.equal(found, wanted)


def test_a_batch_ends_together(model, fast, golden, reasons):
    ids = golden["mmu0.input_ids"].long()[None].repeat(2, 1)
    wanted, found = (each.mmu_generate_fast(ids, **TEXT, eot_token=11) for each in (model, fast))
    assert torch.equal(found, wanted) and "end together" in reasons()[0]


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_tokens_are_drawn_from_the_softmax(model, fast, golden, temperature):
    """Over the joint vocabulary, the mask too."""
    count, ids = 4000, golden["mmu0.input_ids"].long()[None]
    with torch.no_grad():
        logits = model(F.pad(ids, (0, 1), value=MASK)).logits[0, -1].double()
    expected = (logits / temperature).softmax(0) * count
    torch.manual_seed(0)
    given = {"max_new_tokens": 1, "steps": 1, "block_length": 1, "mask_id": MASK, "temperature": temperature}
    drawn = torch.bincount(fast.mmu_generate(ids.repeat(count, 1), **given)[:, -1], minlength=len(expected))
    rare = expected < 5
    expected, drawn = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (expected, drawn.double()))
    statistic = ((drawn - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc((len(expected) - 1) / torch.tensor(2.0).double(), statistic / 2) > 1e-3


def test_answers_follow_the_default_generator(fast, golden):
    ids = golden["mmu0.input_ids"].long()[None].repeat(2, 1)

    def answers():
        return fast.mmu_generate(ids, **TEXT, temperature=1.0)

    torch.manual_seed(5)
    first, second = answers(), answers()
    torch.manual_seed(5)
    assert torch.equal(answers(), first) and not torch.equal(first, second) and not torch.equal(first[0], first[1])


# t2i_generate


@pytest.mark.parametrize("number", range(len(META["maskgit"])))
def test_golden_images(fast, golden, number):
    meta = META["maskgit"][number]
    row = META["prompts"].index(meta["prompt"])
    given = image_arguments(golden, (row,), guidance_scale=meta["guidance"], times=meta["samples"])
    torch.manual_seed(0)
    codes = fast.t2i_generate(**given | {"timesteps": meta["num_steps"]})
    variation = (F.one_hot(codes, SIZE).double().mean(0) - golden[meta["key"]]).abs().sum(1) / 2
    assert variation.max() <= 0.045 and variation.mean() <= 0.03


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
@pytest.mark.parametrize("image_ids", [None, known_half()], ids=["unknown", "known"])
def test_images_without_chance(model, fast, golden, guidance_scale, image_ids):
    """A head so sharp that nothing is random, and a single step, since confidences are equal then."""
    found = []
    for each in (model, fast):
        with torch.no_grad():
            each.model.transformer.ff_out.weight *= 1e5
        given = image_arguments(golden, guidance_scale=guidance_scale, image_ids=image_ids, timesteps=1)
        found.append(each.t2i_generate(**given))
    assert torch.equal(*found) and not torch.equal(found[0][0], found[0][1])


def test_images_are_the_engines(fast, golden):
    """Of a prompt in a batch of others, whose pads differ."""
    model = opened()
    given = image_arguments(golden, guidance_scale=1.5, temperature=0.8)
    before = given["input_ids"].clone()
    codes = fast.t2i_generate(**given, generator=torch.Generator().manual_seed(7))
    assert torch.equal(given["input_ids"], before)
    seeds = draw_seeds(2, torch.Generator().manual_seed(7), torch.device("cpu"))
    prompts = [model.image_prompt(text) for text in META["prompts"][:2]]
    params = replace(model.sampling, num_steps=4, guidance_scale=1.5, mask_temperature=0.8)
    assert torch.equal(model.engine.generate(prompts, num_images=1, seeds=seeds[:, None], sampling=params)[:, 0], codes)


def test_seen_pads(fast, golden):
    """A mask of ones is what the weights were trained with."""
    given = image_arguments(golden, (1,), guidance_scale=1.5)
    ones = {name: torch.ones_like(given["input_ids"]) for name in ("attention_mask", "uncond_attention_mask")}
    model = opened()
    model.layout = replace(model.layout, padded_to=META["max_seq_length"] + 1)
    codes = fast.t2i_generate(**given | ones, generator=torch.Generator().manual_seed(7))
    seeds = draw_seeds(1, torch.Generator().manual_seed(7), torch.device("cpu"))
    params = replace(model.sampling, num_steps=4, guidance_scale=1.5)
    prompt = model.image_prompt(META["prompts"][1])
    assert torch.equal(model.engine.generate([prompt], num_images=1, seeds=seeds[:, None], sampling=params)[0], codes)


def test_bf16_and_autocast(make_model, golden):
    for in_autocast in (False, True):
        fast = hermesflow.accelerate(make_model())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_autocast):
            fast = fast if in_autocast else fast.bfloat16()
            assert fast.t2i_generate(**image_arguments(golden, guidance_scale=1.0)).shape == (2, 16)
            assert fast.mmu_generate(golden["mmu0.input_ids"].long()[None], **TEXT).shape == (1, 78)


# what goes to the original


def of_images(**changes):
    return "t2i_generate", lambda golden: image_arguments(golden, guidance_scale=1.0) | changes


def of_text(**changes):
    return "mmu_generate", lambda golden: {"idx": golden["mmu0.input_ids"].long()[None]} | TEXT | changes


def holes(golden):
    given = image_arguments(golden)
    given["attention_mask"][0, -20] = 0
    return given


OTHER_CALLS = {
    "pads that are not on the left": (("t2i_generate", holes), "pads on the left"),
    "an image begins before resolution": (of_images(resolution=30), "resolution is 30"),
    "hot": (of_images(temperature=9.0), "temperature 9.0"),
    "known image": (
        ("t2i_generate", lambda golden: image_arguments(golden, image_ids=torch.full((16,), OFFSET))),
        "no token to draw",
    ),
    "lukewarm": (of_images(temperature=1e-7), "mask_temperature of 0 or 1e-06"),
    "much guidance": (of_images(guidance_scale=2e6, timesteps=1), "guidance_scale of at most"),
    "cold text": (of_text(temperature=1e-38), "temperature of 0 or 1e-6"),
    "hot text": (of_text(temperature=1e30), "temperature of 0 or 1e-6"),
    "no sequences": (of_text(idx=torch.zeros(0, 5, dtype=torch.int64)), "no sequences"),
    "a hidden prompt": (
        of_text(idx=torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, 0, 0] + [1] * 15])),
        "hides a whole prompt",
    ),
    "an end that is no id": (
        ("mmu_generate_fast", lambda golden: of_text()[1](golden) | {"eot_token": 183.5}),
        "eot_token is 183.5",
    ),
    "random": (of_text(remasking="random"), "remasking is 'random'"),
    "masks in the prompt": (of_text(idx=torch.tensor([[5, MASK, 7]])), "holds the mask"),
    "a mask of the prompt alone": (
        of_text(idx=torch.tensor([[5, 6]]), attention_mask=torch.tensor([[0, 1] + [1] * 15 + [0]])),
        "pads on the left",
    ),
}


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_other_calls_go_to_the_original(model, fast, golden, reasons, case):
    (method, make), reason = OTHER_CALLS[case]
    found = []
    for each in (model, fast):
        torch.manual_seed(3)
        found.append(getattr(each, method)(**make(golden)))
    assert torch.equal(*found)
    (message,) = reasons()
    assert message.startswith(f"{method}: ") and reason in message


@pytest.mark.parametrize(
    "changes, error",
    [({"block_length": 5}, AssertionError), ({"steps": 7}, AssertionError), ({"idx": None}, Exception)],
)
def test_wrong_calls_fail_as_before(model, fast, golden, reasons, changes, error):
    _, make = of_text(**changes)
    for each in (model, fast):
        with pytest.raises(error):
            each.mmu_generate(**make(golden))
    assert len(reasons()) == 1


def test_hooks_and_dropout(make_model, golden, reasons):
    fast = hermesflow.accelerate(make_model())
    seen = []
    fast.model.transformer.blocks[1].register_forward_hook(lambda *_: seen.append(1))
    fast.mmu_generate(golden["mmu0.input_ids"].long()[None], **TEXT)
    assert len(seen) == 8 and "hooks" in reasons()[0]
    fast = hermesflow.accelerate(make_model(attention_dropout=0.1)).train()
    fast.mmu_generate(golden["mmu0.input_ids"].long()[None], **TEXT)
    assert "dropout" in reasons()[0]


def test_a_model_that_gives_nan_says_where(fast, golden):
    with torch.no_grad():
        fast.model.transformer.blocks[0].up_proj.weight[0, 0] = float("nan")
    where = r"model.transformer.blocks.0.up_proj.weight holds NaN"
    with pytest.raises(RuntimeError, match=rf"^t2i_generate: the model gives no distribution \(NaN\).*{where}"):
        fast.t2i_generate(**image_arguments(golden))
    with pytest.raises(RuntimeError, match=rf"^mmu_generate: .*\(NaN\) for sequence 0, step 0; .*{where}"):
        fast.mmu_generate(golden["mmu0.input_ids"].long()[None], **TEXT)


# accelerate, restore and copies


def test_accelerate_and_restore(model):
    signatures = {name: inspect.signature(getattr(model, name)) for name in METHODS}
    assert hermesflow.accelerate(model) is model is hermesflow.accelerate(model)
    assert all(isinstance(getattr(model, name), AcceleratedMethod) for name in METHODS)
    assert {name: inspect.signature(getattr(model, name)) for name in METHODS} == signatures
    hermesflow.restore(model)
    assert not any(name in vars(model) for name in METHODS)


def test_copies_and_trained_weights(fast, golden):
    ids = golden["mmu0.input_ids"].long()[None]
    before = fast.mmu_generate(ids, **TEXT)
    twin, loaded = copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))
    with torch.no_grad():
        fast.model.transformer.ff_out.weight.neg_()
    assert torch.equal(twin.mmu_generate(ids, **TEXT), before) and torch.equal(loaded.mmu_generate(ids, **TEXT), before)
    assert not torch.equal(fast.mmu_generate(ids, **TEXT), before)


def with_config(**changes):
    def change(model):
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    return change


def subclass(**methods):
    def change(model):
        model.__class__ = type("Mine", (type(model),), methods)
        return model

    return change


def without_norm(model):
    del model.model.transformer.blocks[1].ff_norm
    return model


REFUSED = {
    "another block": (with_config(block_type="sequential"), "block_type 'sequential' is not supported"),
    "biases": (with_config(include_qkv_bias=True), "include_qkv_bias True is not supported"),
    "a method of its own": (subclass(t2i_generate=lambda self: None), "mmu_generate is not Mine's own"),
    "a forward of its own": (subclass(forward=lambda self: None), "forward is not MMadaModelLM's own"),
    "no norm": (without_norm, "no model.transformer.blocks.1.ff_norm.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_are_left_alone(model, case):
    change, message = REFUSED[case]
    model = change(model)
    before = set(vars(model))
    with pytest.raises(ValueError, match=rf"accelerate: .*published MMadaModelLM class .*{message}"):
        hermesflow.accelerate(model)
    assert set(vars(model)) == before
