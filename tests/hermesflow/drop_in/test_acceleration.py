"""accelerate() and restore() on the published class's interface: every method against the class's own.

The class is the stand-in, tests/showo_stand_in, and models.modeling_showo.Showo of each checkout of the published code
in HERMESFLOW_PUBLISHED_CODE (separated as in PATH). That code needs transformers 4.41.1 and diffusers 0.30.1.
"""

import copy
import functools
import inspect
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hermesflow
from hermesflow.benchmarks.accelerated import load_class
from hermesflow.benchmarks.published_inputs import (
    IGNORED,
    caption_ids,
    clip_attention_mask,
    generation_ids,
    generation_labels,
    image_attention_mask,
    published_config,
    understanding_attention_mask,
    understanding_ids,
)
from hermesflow.benchmarks.random_checkpoint import CheckpointShape, language_model_config
from hermesflow.drop_in import attention_masks as mask_reading
from hermesflow.drop_in import label_scoring
from hermesflow.engine.decoders.masked import ImageDecoder
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.kernels.span_tree import SpanTree

STAND_IN = str(Path(__file__).parents[2] / "showo_stand_in")
# Read here, since a fixture of all tests hides the variable.
GIVEN = [folder for folder in os.environ.get("HERMESFLOW_PUBLISHED_CODE", "").split(os.pathsep) if folder]
CHECKOUTS = [folder for folder in GIVEN if Path(folder, "models/modeling_showo.py").is_file()]
LAYOUT = TokenLayout(text_vocab_size=299, codebook_size=64, num_image_tokens=16, sot=0, eot=0)
SHAPE = CheckpointShape(
    hidden_size=64, num_layers=2, num_heads=4, mlp_size=128, text_vocab_size=299, num_image_tokens=16
)
MAX_SEQ_LENGTH = 14
CONFIG = published_config(LAYOUT, MAX_SEQ_LENGTH)
PROMPTS = [[17, 201, 5], [9, 40, 77, 130, 222, 8, 61, 290]]
LOSSES = ("loss_for_unidpo", "loss_for_dpo", "loss_for_dpo_understanding")
SUMS, GRADIENT = 1e-3, 1e-3
"""Tolerances of the golden data, tests/parity."""


@functools.cache
def published_modules(folder):
    """The modules of one checkout, by the names under which pickle looks for them."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.split(".")[0] == "models"]:
            patch.delitem(sys.modules, name)
        load_class(Path(folder))
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "models"}


@pytest.fixture(scope="module", params=[STAND_IN, *CHECKOUTS], ids=os.path.basename)
def showo_class(request):
    """The class under test, importable by its name, as pickle needs it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, module in published_modules(request.param).items():
            patch.setitem(sys.modules, name, module)
        yield sys.modules["models.modeling_showo"].Showo


@pytest.fixture(scope="module")
def make_model(showo_class, tmp_path_factory):
    """Makes a model of random weights, the same each time: make_model(w_clip_vit=False)."""
    folder = tmp_path_factory.mktemp("llm")
    (folder / "config.json").write_text(json.dumps(language_model_config(SHAPE)))

    def make(w_clip_vit=False):
        model = showo_class(w_clip_vit, LAYOUT.vocab_size, SHAPE.text_vocab_size, str(folder), 64, 16)
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            # Twice as wide a head as keeps hidden states their size: some tokens are then much likelier than others.
            spread = parameter.shape[-1] ** -0.5 * (2 if "lm_head" in name else 1) if parameter.dim() == 2 else 0.1
            parameter.data.normal_(0, spread, generator=generator).add_(float("norm.weight" in name))
        return model.eval()

    return make


def is_accelerated(model, showo_class):
    methods = [name for name in ("t2i_generate", "mmu_generate", *LOSSES) if hasattr(showo_class, name)]
    found = {getattr(getattr(model, name), "__func__", None) is not getattr(showo_class, name) for name in methods}
    assert len(found) == 1
    return found.pop()


def needs(showo_class, method):
    if not hasattr(showo_class, method):
        pytest.skip(f"this checkout's Showo has no {method}")


def t2i_mask(ids):
    return image_attention_mask(ids, LAYOUT.pad, LAYOUT.soi, LAYOUT.eoi)


def question(seed=0):
    """Arguments of mmu_generate: an image, a question and the mask."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(LAYOUT.code_offset, LAYOUT.mask_id, (1, 16), generator=generator)
    ids = understanding_ids(LAYOUT, image, [[12 + seed, 107, 33, 250]])
    return {"idx": ids, "attention_mask": understanding_attention_mask(ids, LAYOUT.eoi)}


def feature_question(model, seed=0):
    """The same of a model that sees through CLIP: 20 features between 5 ids of the system's and 6 ids of text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 299, (1, 11), generator=generator)
    features = torch.randn(1, 20, 64, generator=generator) / 8
    with torch.no_grad():
        before, after = model.showo.model.embed_tokens(ids).split([5, 6], dim=1)
    embeddings = torch.cat([before, features, after], dim=1)
    return {"input_embeddings": embeddings, "attention_mask": clip_attention_mask(embeddings, 3, 20)}


def image_arguments(prompts=PROMPTS, *, guidance_scale=0, negative=(), image_ids=None, **others):
    """Arguments of t2i_generate, as the published scripts pass them."""
    ids = generation_ids(LAYOUT, prompts, MAX_SEQ_LENGTH, image_ids)
    unguided = generation_ids(LAYOUT, [list(negative)] * len(prompts), MAX_SEQ_LENGTH, image_ids)
    guided = {"uncond_input_ids": unguided, "guidance_scale": guidance_scale} if guidance_scale else {}
    mask = t2i_mask(torch.cat([ids, unguided]) if guided else ids)
    return {"input_ids": ids, "attention_mask": mask, "timesteps": 3, "config": CONFIG} | guided | others


def loss_batch(num_images=2, num_captions=3):
    """Arguments of loss_for_unidpo: image sequences padded on the left, captions on the right."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(LAYOUT.code_offset, LAYOUT.mask_id, (num_images + num_captions, 16), generator=generator)
    drawn, seen = images.split([num_images, num_captions])
    hidden = torch.rand(drawn.shape, generator=generator) < 0.6
    parts, labels, masks = [], [], []
    if num_images:
        ids = generation_ids(LAYOUT, PROMPTS[:num_images], MAX_SEQ_LENGTH, torch.where(hidden, LAYOUT.mask_id, drawn))
        parts.append(ids)
        labels.append(generation_labels(LAYOUT, ids, torch.where(hidden, drawn, IGNORED)))
        masks.append(t2i_mask(ids))
    if num_captions:
        texts = [[31, 7, 150, 42, 9], [5], [77] * 20][:num_captions]
        ids, of_captions = caption_ids(LAYOUT, seen, texts, MAX_SEQ_LENGTH)
        parts.append(ids)
        labels.append(of_captions)
        masks.append(understanding_attention_mask(ids, LAYOUT.eoi))
    return {
        "input_ids": torch.cat(parts),
        "attention_mask": torch.cat(masks),
        "labels": torch.cat(labels),
        "batch_size_t2i": num_images,
        "batch_size_mmu": num_captions,
        "max_seq_length": MAX_SEQ_LENGTH,
    }


def arguments_of(method, batch):
    """A batch as the method takes it."""
    left_out = {"loss_for_dpo": {"batch_size_mmu"}, "loss_for_dpo_understanding": {"batch_size_t2i"}}
    return {name: value for name, value in batch.items() if name not in left_out.get(method, ())}


def sums_and_gradients(model, method, arguments):
    """The sums [1 or 2] that a method returns, and the gradient of their weighted total for each parameter."""
    model.zero_grad(set_to_none=True)
    found = method(**arguments)
    sums = torch.stack(found if isinstance(found, tuple) else (found,))
    assert sums.dim() == 1 and sums.dtype == torch.float32
    (sums * sums.new_tensor([0.7, -0.3])[: len(sums)]).sum().backward()
    return sums.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_gradients(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        wanted = torch.zeros(()) if wanted is None else wanted
        found = torch.zeros(()) if ours[name] is None else ours[name]
        assert (found - wanted).abs().max() <= GRADIENT * wanted.abs().max(), name


def assert_same_distribution(ours, theirs, num_values):
    """Two-sample chi-square test of each column of int64 [S, T]; rare values count as one."""
    ours, theirs = (nn.functional.one_hot(part, num_values).sum(0).double() for part in (ours, theirs))
    rare = ours + theirs < 10
    ours, theirs = (
        torch.cat([part.masked_fill(rare, 0), (part * rare).sum(1, keepdim=True)], 1) for part in (ours, theirs)
    )
    both = ours + theirs
    statistic = ((ours - theirs) ** 2 / both.clamp(min=1)).sum(1)
    freedom = ((both > 0).sum(1) - 1).clamp(min=1).double()
    chance = torch.special.gammaincc(freedom / 2, statistic / 2)
    assert chance.min() > 1e-3 / len(chance)


def assert_same_images(ours, theirs):
    """Codes [S, 16] at each place, and what each has to do with the next."""
    assert_same_distribution(ours, theirs, 64)
    joint = [codes[:, :-1] % 6 * 6 + codes[:, 1:] % 6 for codes in (ours, theirs)]
    assert_same_distribution(*joint, 36)


# mmu_generate


@pytest.mark.parametrize("eot_token", [None, "third"])
@pytest.mark.parametrize("w_clip_vit", [False, True], ids=["codes", "clip"])
def test_greedy_answers(make_model, w_clip_vit, eot_token):
    model, fast = make_model(w_clip_vit), hermesflow.accelerate(make_model(w_clip_vit))
    given = feature_question(model) if w_clip_vit else question()
    wanted = model.mmu_generate(**given, max_new_tokens=25, top_k=1)
    if eot_token:
        # The first answer's third token, so that both have to end with it.
        eot_token = int(wanted[2])
        wanted = model.mmu_generate(**given, max_new_tokens=25, top_k=1, eot_token=eot_token)
        assert int(wanted[-1]) == eot_token and len(wanted) <= 3
    found = fast.mmu_generate(**given, max_new_tokens=25, top_k=1, eot_token=eot_token)
    assert isinstance(found, list) and all(token.shape == () and token.dtype == torch.int64 for token in found)
    assert torch.stack(found).tolist() == torch.stack(wanted).tolist()


def test_one_feature_that_all_see(make_model):
    """No plain text, though no more than one token is seen from before it."""
    model, fast = make_model(True), hermesflow.accelerate(make_model(True))
    given = feature_question(model)
    given["attention_mask"] = clip_attention_mask(given["input_embeddings"], 3, 1)
    answers = [each.mmu_generate(**given, max_new_tokens=9, top_k=1) for each in (model, fast)]
    assert answers[0] == answers[1]


def test_answers_leave_their_arguments_alone(fast):
    given = question()
    before = copy.deepcopy(given)
    fast.mmu_generate(**given, max_new_tokens=3)
    assert all(torch.equal(given[name], before[name]) for name in given)


def test_answers_of_one_token(model, fast):
    wanted, found = (each.mmu_generate(**question(), max_new_tokens=1, top_k=1) for each in (model, fast))
    assert found == wanted and len(found) == 1


def test_arguments_by_place(model, fast):
    given = question()
    wanted, found = (
        each.mmu_generate(given["idx"], None, given["attention_mask"], 6, 1.0, 1, None) for each in (model, fast)
    )
    assert found == wanted


@pytest.mark.parametrize(
    "top_k, temperature",
    [(None, 1.0), (5, 1.0), (None, 0.6), (5, 1.7), (1000, 1.0)],
    ids=["all", "top-5", "cold", "hot-top-5", "top-of-more-than-all"],
)
def test_first_token_is_drawn_from_the_softmax(model, fast, top_k, temperature):
    given, num_draws = question(), 300
    with torch.no_grad():
        logits = model(given["idx"], attention_mask=given["attention_mask"])[0, -1].double() / temperature
    if top_k is not None:
        logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = float("-inf")
    wanted = logits.softmax(0) * num_draws
    torch.manual_seed(0)
    drawn = [
        fast.mmu_generate(**given, max_new_tokens=1, top_k=top_k, temperature=temperature)[0] for _ in range(num_draws)
    ]
    found = torch.bincount(torch.stack(drawn), minlength=len(wanted)).double()
    assert found[wanted == 0].sum() == 0
    rare = wanted < 5
    wanted, found = (torch.cat([part[~rare], part[rare].sum()[None]]) for part in (wanted, found))
    statistic = ((found - wanted) ** 2 / wanted.clamp(min=1e-9)).sum()
    assert torch.special.gammaincc((len(wanted) - 1) / torch.tensor(2.0).double(), statistic / 2) > 1e-3


def test_later_tokens_are_among_the_likeliest(model, fast):
    """Each token of answers with top_k 3 is one of the original's three likeliest there."""
    torch.manual_seed(0)
    for seed in range(5):
        given = question(seed)
        answer = torch.stack(fast.mmu_generate(**given, max_new_tokens=20, top_k=3, temperature=1.5))
        ids = torch.cat([given["idx"], answer[None]], dim=1)
        with torch.no_grad():
            logits = model(ids, attention_mask=understanding_attention_mask(ids, LAYOUT.eoi))[0, -len(answer) - 1 : -1]
        least = logits.topk(3).values[:, -1]
        assert (logits.gather(1, answer[:, None])[:, 0] >= least - 1e-4).all()


def test_answers_follow_the_default_generator(fast):
    def answers():
        return [int(token) for _ in range(3) for token in fast.mmu_generate(**question(), max_new_tokens=8)]

    torch.manual_seed(5)
    first, second = answers(), answers()
    torch.manual_seed(5)
    assert answers() == first != second
    assert len({tuple(first[start : start + 8]) for start in (0, 8, 16)}) == 3


# t2i_generate


def known_half():
    """Joint ids [2, 16], every other one masked."""
    ids = torch.randint(LAYOUT.code_offset, LAYOUT.mask_id, (2, 16), generator=torch.Generator().manual_seed(3))
    return ids.masked_fill(torch.arange(16) % 2 == 0, LAYOUT.mask_id)


IMAGE_CASES = {
    "unguided": {},
    "guided": {"guidance_scale": 2.0},
    "negative": {"guidance_scale": 1.5, "negative": [88, 3, 210, 64]},
    "temperature 0": {"temperature": 0},
    "hot": {"temperature": 4.5, "timesteps": 5},
    "one step": {"timesteps": 1},
    "own schedule": {"noise_schedule": lambda t: 1 - t},
    "schedule that masks nothing": {"noise_schedule": lambda t: 0 * t},
    "known": {"image_ids": known_half()},
    "known, guided": {"image_ids": known_half(), "guidance_scale": 2.0},
    "a prompt that is cut": {"prompts": [[44] * 30, []]},
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_images_are_of_one_distribution(model, fast, case):
    """Of both prompts in one batch, which have different numbers of pads."""
    given, num_images = dict(IMAGE_CASES[case]), 600
    given["prompts"] = given.get("prompts", PROMPTS) * 100
    if (known := given.get("image_ids")) is not None:
        given["image_ids"] = known.repeat(100, 1)
    torch.manual_seed(0)
    codes = {}
    for name, each in (("ours", fast), ("theirs", model)):
        with torch.no_grad():
            codes[name] = torch.cat([each.t2i_generate(**image_arguments(**given)) for _ in range(num_images // 100)])
    for prompt in (0, 1):
        ours, theirs = codes["ours"][prompt::2], codes["theirs"][prompt::2]
        assert ours.dtype == torch.int64 and ours.shape == theirs.shape == (num_images, 16)
        assert_same_images(ours, theirs)
        if known is not None:
            is_known = known[prompt] != LAYOUT.mask_id
            assert (ours[:, is_known] == known[prompt, is_known] - LAYOUT.code_offset).all()


@pytest.mark.parametrize(
    "others", [{"temperature": 4.5}, {"noise_schedule": lambda t: 1 - t}], ids=["hot", "own schedule"]
)
def test_images_are_unmasked_in_the_same_order(model, fast, others):
    """What is drawn later has seen more, so the order shows in how likely codes are without the others."""
    given, num_images = image_arguments(PROMPTS[:1]), 2400
    with torch.no_grad():
        logits = model(given["input_ids"], attention_mask=given["attention_mask"])
    logprobs = logits[0, -17:-1, LAYOUT.code_offset : -1].log_softmax(-1)
    torch.manual_seed(0)
    scores = []
    for each in (fast, model):
        batches = (image_arguments(PROMPTS[:1] * 200, timesteps=6, **others) for _ in range(num_images // 200))
        with torch.no_grad():
            codes = torch.cat([each.t2i_generate(**batch) for batch in batches])
        scores.append(logprobs[torch.arange(16), codes].sum(1))
    ours, theirs = scores
    assert (ours.mean() - theirs.mean()).abs() <= 3.3 * ((ours.var() + theirs.var()) / num_images).sqrt()


def test_one_image_and_other_keywords(fast):
    """As the published scripts call it, which pass two arguments more."""
    given = image_arguments(PROMPTS[:1], guidance_scale=1.0)
    codes = fast.t2i_generate(**given, seq_len=16, uni_prompting=None)
    assert codes.shape == (1, 16) and codes.dtype == torch.int64
    assert 0 <= codes.min() and codes.max() < LAYOUT.codebook_size


def test_guidance_without_unconditional_ids(fast, model):
    """guidance_scale alone does not guide; nor do unconditional ids with scale 0."""
    draws = []
    for each in (fast, model):
        torch.manual_seed(0)
        alone = [each.t2i_generate(**image_arguments(PROMPTS * 100) | {"guidance_scale": 5.0}) for _ in range(4)]
        unguided = generation_ids(LAYOUT, [[]] * 200, MAX_SEQ_LENGTH)
        alone += [each.t2i_generate(**image_arguments(PROMPTS * 100, uncond_input_ids=unguided)) for _ in range(4)]
        draws.append(torch.cat(alone))
    for prompt in (0, 1):
        assert_same_images(draws[0][prompt::2], draws[1][prompt::2])


@pytest.mark.parametrize("guidance_scale", [0, 2.0])
def test_images_follow_the_generator(fast, guidance_scale):
    def draw(generator):
        return fast.t2i_generate(**image_arguments(guidance_scale=guidance_scale, generator=generator)).tolist()

    generator, before = torch.Generator().manual_seed(7), torch.get_rng_state()
    state = generator.get_state()
    first, second = draw(generator), draw(generator)
    assert torch.equal(torch.get_rng_state(), before)
    generator.set_state(state)
    assert draw(generator) == first != second
    torch.manual_seed(7)
    first, second = draw(None), draw(None)
    torch.manual_seed(7)
    assert draw(None) == first != second


def test_equal_prompts_give_different_images(fast):
    codes = fast.t2i_generate(**image_arguments(PROMPTS[:1] * 4))
    assert len({tuple(row) for row in codes.tolist()}) == 4


# losses


def batch_cases():
    whole = loss_batch()
    unscored = whole["labels"].clone()
    unscored[:2] = IGNORED
    return {
        "both": whole,
        "all rows": {name: value for name, value in whole.items() if name != "batch_size_mmu"},
        "no scored image": whole | {"labels": unscored},
        "captions alone": loss_batch(num_images=0),
        "images alone": loss_batch(num_captions=0),
        "one pair": loss_batch(num_images=1, num_captions=1),
    }


@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
@pytest.mark.parametrize("case", batch_cases())
@pytest.mark.parametrize("method", LOSSES)
def test_losses_and_gradients(showo_class, model, fast, reasons, method, case, inputs):
    needs(showo_class, method)
    given = arguments_of(method, batch_cases()[case])
    found, at_inputs = [], []
    for each in (fast, model):
        own = dict(given)
        if inputs == "embeddings":
            own["input_embeddings"] = each.showo.model.embed_tokens(own["input_ids"]).detach().requires_grad_()
            at_inputs.append(own["input_embeddings"])
        found.append(sums_and_gradients(each, getattr(each, method), own))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= SUMS
    assert_same_gradients(our_gradients, their_gradients)
    if at_inputs:
        assert_same_gradients({"inputs": at_inputs[0].grad}, {"inputs": at_inputs[1].grad})
    nothing_scored = method == "loss_for_dpo" and case in ("no scored image", "captions alone")
    assert ["no label" in message for message in reasons()] == [True] * nothing_scored


@pytest.mark.parametrize("method", LOSSES)
def test_losses_without_gradients(showo_class, model, fast, method):
    """As references are scored."""
    needs(showo_class, method)
    given = arguments_of(method, loss_batch())
    with torch.no_grad():
        ours, theirs = (
            torch.stack([*torch.atleast_1d(getattr(each, method)(**given))])
            if method != LOSSES[0]
            else torch.stack(getattr(each, method)(**given))
            for each in (fast, model)
        )
    assert not ours.requires_grad and (ours - theirs).abs().max() <= SUMS


@pytest.mark.parametrize("trained", [(), ("lm_head",), ("layers.1.mlp",)], ids=["nothing", "head", "a block"])
def test_losses_of_frozen_weights(showo_class, model, fast, trained):
    needs(showo_class, "loss_for_unidpo")
    given, found = loss_batch(), []
    for each in (fast, model):
        for name, parameter in each.named_parameters():
            parameter.requires_grad_(any(part in name for part in trained))
        generation, understanding = each.loss_for_unidpo(**given)
        assert generation.requires_grad == understanding.requires_grad == bool(trained)
        if trained:
            (generation + understanding).backward()
        found.append({name: parameter.grad for name, parameter in each.named_parameters()})
        assert all((found[-1][name] is not None) == p.requires_grad for name, p in each.named_parameters())
    assert_same_gradients(*found)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_losses_in_training(showo_class, model, fast, checkpointed):
    needs(showo_class, "loss_for_unidpo")
    found = []
    for each in (fast, model):
        each.train()
        if checkpointed:
            each.showo.gradient_checkpointing_enable()
        found.append(sums_and_gradients(each, each.loss_for_unidpo, loss_batch()))
        assert each.training
    assert (found[0][0] - found[1][0]).abs().max() <= SUMS
    assert_same_gradients(found[0][1], found[1][1])


@pytest.mark.parametrize("half", ["weights", "autocast"])
@pytest.mark.parametrize("method", LOSSES)
def test_losses_in_bf16(showo_class, model, fast, method, half):
    """The error against fp32 of the same weights is at most twice the original's, plus a bf16 step for each label."""
    needs(showo_class, method)
    given, results = arguments_of(method, loss_batch()), {}
    truth = copy.deepcopy(model).bfloat16().float()
    results["truth"] = sums_and_gradients(truth, getattr(truth, method), given)
    for name, each in (("ours", fast), ("theirs", model)):
        each.bfloat16()
        if half == "autocast":
            each.float()

        def run(each=each, **arguments):
            with torch.autocast("cpu", torch.bfloat16, enabled=half == "autocast"):
                return getattr(each, method)(**arguments)

        results[name] = sums_and_gradients(each, run, given)
    floor = (given["labels"] != IGNORED).sum() * 2**-8
    ours, theirs = ((results[name][0] - results["truth"][0]).abs() for name in ("ours", "theirs"))
    assert (ours <= 2 * theirs + floor).all()
    errors = {"ours": 0.0, "theirs": 0.0}
    for name in errors:
        for parameter, wanted in results["truth"][1].items():
            found = results[name][1][parameter]
            assert found.dtype == (torch.bfloat16 if half == "weights" else torch.float32)
            errors[name] += ((found.float() - wanted).norm() / wanted.norm()).item()
    assert errors["ours"] <= 2 * errors["theirs"]


def test_generation_in_bf16(model, fast):
    model.bfloat16(), fast.bfloat16()
    torch.manual_seed(0)
    draws = [
        torch.cat([each.t2i_generate(**image_arguments(PROMPTS[:1] * 200)) for _ in range(5)]) for each in (fast, model)
    ]
    assert_same_images(*draws)
    given = question()
    answer = torch.stack(fast.mmu_generate(**given, max_new_tokens=20, top_k=1))
    ids = torch.cat([given["idx"], answer[None]], dim=1)
    with torch.no_grad():
        logits = model.float()(ids, attention_mask=understanding_attention_mask(ids, LAYOUT.eoi))[0]
    logits = logits[-len(answer) - 1 : -1]
    # A bf16 rounding may exchange two tokens that are nearly as likely.
    assert (logits.gather(1, answer[:, None])[:, 0] >= logits.amax(1) - 0.2).all()


# one set of weights


def test_weights_stay_the_models_own(make_model):
    model = make_model()

    def facts():
        return (
            [(name, id(parameter)) for name, parameter in model.named_parameters()],
            [(name, tensor.data_ptr()) for name, tensor in model.state_dict(keep_vars=True).items()],
            [(name, id(module)) for name, module in model.named_modules()],
            [(name, id(buffer)) for name, buffer in model.named_buffers()],
        )

    before = facts()
    assert hermesflow.accelerate(model) is model
    assert facts() == before
    model.mmu_generate(**question(), max_new_tokens=2)
    model.t2i_generate(**image_arguments())
    assert facts() == before
    assert hermesflow.restore(model) is model
    assert facts() == before


def test_training_steps(showo_class, model, fast):
    """Three steps of both, after which both have learnt the same and answer alike."""
    needs(showo_class, "loss_for_unidpo")
    for each in (fast, model):
        each.train()
        optimizer = torch.optim.SGD(each.parameters(), lr=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            generation, understanding = each.loss_for_unidpo(**loss_batch())
            (-generation - understanding).backward()
            optimizer.step()
        each.eval()
    wanted = dict(model.named_parameters())
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter, wanted[name], rtol=1e-4, atol=1e-4)
    answers = [
        torch.stack(each.mmu_generate(**question(), max_new_tokens=10, top_k=1)).tolist() for each in (fast, model)
    ]
    assert answers[0] == answers[1]


def nudged(tensor):
    return tensor + torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(tensor) * 0.1


def exchange_head(model):
    model.showo.lm_head = copy.deepcopy(model.showo.lm_head)
    model.showo.lm_head.weight.data = nudged(model.showo.lm_head.weight.data)


CHANGES = {
    "in place": lambda model: [p.data.copy_(nudged(p.data)) for p in model.parameters()],
    "data": lambda model: [setattr(p, "data", nudged(p.data)) for p in model.parameters()],
    "load_state_dict": lambda model: model.load_state_dict(
        {name: nudged(tensor) for name, tensor in model.state_dict().items()}
    ),
    "assign": lambda model: model.load_state_dict(
        {name: nudged(tensor) for name, tensor in model.state_dict().items()}, assign=True
    ),
    "a module": exchange_head,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_weights_are_seen(showo_class, fast, change):
    def results():
        found = {
            "answer": [torch.stack(method(**question(), max_new_tokens=10, top_k=1)).tolist() for method in (
                fast.mmu_generate, functools.partial(showo_class.mmu_generate, fast))]
        }  # fmt: skip
        if hasattr(showo_class, "loss_for_unidpo"):
            found["sums"] = [
                torch.stack(method(**loss_batch()))
                for method in (fast.loss_for_unidpo, functools.partial(showo_class.loss_for_unidpo, fast))
            ]
        return found

    before = results()
    CHANGES[change](fast)
    after = results()
    assert before["answer"][0] == before["answer"][1] != after["answer"][1] == after["answer"][0]
    if "sums" in after:
        assert (after["sums"][0] - after["sums"][1]).abs().max() <= SUMS
        assert (after["sums"][0] - before["sums"][0]).abs().max() > SUMS


# accelerate, restore and copies


def outcomes(model):
    """What the methods that draw and score give from one seed."""
    torch.manual_seed(11)
    found = [model.t2i_generate(**image_arguments(guidance_scale=1.0)).tolist()]
    found.append([int(token) for token in model.mmu_generate(**question(), max_new_tokens=12)])
    if hasattr(model, "loss_for_unidpo"):
        found.append([value.item() for value in model.loss_for_unidpo(**loss_batch())])
    return found


def test_restore_gives_back_the_original(showo_class, make_model):
    model = make_model()
    before, attributes = outcomes(model), dict(vars(model))
    hermesflow.accelerate(model)
    assert is_accelerated(model, showo_class)
    outcomes(model)
    assert hermesflow.restore(model) is model
    assert outcomes(model) == before
    assert not is_accelerated(model, showo_class)
    assert vars(model).keys() == attributes.keys() and type(model) is showo_class


def test_accelerate_twice(showo_class, make_model):
    model = make_model()
    before = outcomes(model)
    once = outcomes(hermesflow.accelerate(model))
    assert hermesflow.accelerate(model) is model and outcomes(model) == once
    hermesflow.restore(model)
    assert outcomes(model) == before and not is_accelerated(model, showo_class)
    assert outcomes(hermesflow.accelerate(model)) == once


def test_restore_of_a_model_as_it_was(showo_class, model):
    before = outcomes(model)
    assert hermesflow.restore(model) is model
    assert outcomes(model) == before and not is_accelerated(model, showo_class)


def test_methods_keep_their_signatures(showo_class, model, fast):
    for name in ("t2i_generate", "mmu_generate", *LOSSES):
        if hasattr(showo_class, name):
            assert inspect.signature(getattr(fast, name)) == inspect.signature(getattr(model, name))


def test_checkouts_without_losses_get_none(showo_class, fast):
    assert [hasattr(fast, name) for name in LOSSES] == [hasattr(showo_class, name) for name in LOSSES]


def test_copies_are_their_own(showo_class, fast):
    before = outcomes(fast)
    other = copy.deepcopy(fast)
    assert is_accelerated(other, showo_class) and outcomes(other) == before
    CHANGES["in place"](other)
    assert outcomes(fast) == before != outcomes(other)
    wanted = showo_class.mmu_generate(other, **question(), max_new_tokens=10, top_k=1)
    assert other.mmu_generate(**question(), max_new_tokens=10, top_k=1) == wanted
    hermesflow.restore(other)
    assert not is_accelerated(other, showo_class) and is_accelerated(fast, showo_class)
    assert outcomes(fast) == before


@pytest.mark.parametrize("way", ["pickle", "of an older version", "torch.save"])
def test_pickled_models_stay_accelerated(showo_class, fast, tmp_path, way):
    before = outcomes(fast)
    if way == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    elif way == "of an older version":  # protocol 0 names modules in lines of their own
        data = pickle.dumps(fast, protocol=0)
        old = data.replace(b"chermesflow.drop_in.acceleration\n", b"chermesflow.drop_in\n")
        assert old != data
        other = pickle.loads(old)
    else:
        torch.save(fast, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_accelerated(other, showo_class) and outcomes(other) == before
    CHANGES["in place"](other)
    assert outcomes(fast) == before != outcomes(other)
    assert not is_accelerated(hermesflow.restore(other), showo_class)


@pytest.mark.parametrize("safe_serialization", [True, False])
def test_saved_files_are_the_same(make_model, tmp_path, safe_serialization):
    model = make_model()
    model.save_pretrained(tmp_path / "before", safe_serialization=safe_serialization)
    outcomes(hermesflow.accelerate(model))
    model.save_pretrained(tmp_path / "after", safe_serialization=safe_serialization)
    before, after = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("before", "after")
    )
    assert len(before) == 2 and before == after


# wrappers


def test_distributed_data_parallel(showo_class, make_model, tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapper = nn.parallel.DistributedDataParallel(make_model())
        assert hermesflow.accelerate(wrapper) is wrapper
        assert is_accelerated(wrapper.module, showo_class)
        assert outcomes(wrapper.module) == outcomes(hermesflow.accelerate(make_model()))
        assert hermesflow.restore(wrapper) is wrapper
        assert not is_accelerated(wrapper.module, showo_class)
    finally:
        torch.distributed.destroy_process_group()


def test_compiled_model(showo_class, make_model):
    wrapper = torch.compile(make_model(), backend="eager")
    assert hermesflow.accelerate(wrapper) is wrapper
    assert is_accelerated(wrapper._orig_mod, showo_class)
    assert outcomes(wrapper) == outcomes(hermesflow.accelerate(make_model()))
    assert hermesflow.restore(wrapper) is wrapper
    assert not is_accelerated(wrapper._orig_mod, showo_class)


def test_prepared_by_accelerate(showo_class, make_model):
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    wrapper = accelerator.prepare(make_model())
    assert hermesflow.accelerate(wrapper) is wrapper
    inner = accelerator.unwrap_model(wrapper)
    assert is_accelerated(inner, showo_class)
    assert outcomes(inner) == outcomes(hermesflow.accelerate(make_model()))


# what goes to the original methods


def unseen_entry(mask):
    """The last row no longer sees the token before it."""
    mask = mask.clone()
    mask[0, 0, -1, -2] = mask.min()
    return mask


def seen_pad(mask):
    """The image of the first sequence sees its first pad; in a question the image sees the text."""
    mask = mask.clone()
    mask[0, 0, -2, 0] = 0 if mask[0, 0, -2, 0] != 0 else mask.min()
    return mask


MASKS = {
    "an entry more hidden": unseen_entry,
    "one more changed": seen_pad,
    "bool": lambda mask: mask == 0,
    "values between": lambda mask: torch.where(mask == 0, torch.linspace(0, 1, mask.shape[-1]), mask),
    "weakly hidden": lambda mask: mask.clamp(min=-2.0),
}


@pytest.mark.parametrize("change", MASKS)
def test_other_masks_go_to_the_original(make_model, reasons, change):
    """With its very results, and one warning for each method."""
    given = {"t2i_generate": image_arguments(guidance_scale=1.0), "mmu_generate": question() | {"max_new_tokens": 6}}
    given |= {name: arguments_of(name, loss_batch()) for name in LOSSES}
    model = make_model()
    fast = hermesflow.accelerate(make_model())
    for name, arguments in given.items():
        if not hasattr(model, name):
            continue
        arguments["attention_mask"] = MASKS[change](arguments["attention_mask"])
        found = []
        for each in (fast, fast, model):
            torch.manual_seed(0)
            found.append(getattr(each, name)(**copy.deepcopy(arguments)))
            if each is fast and len(found) == 1:
                assert len(messages := reasons()) == 1 and "attention_mask" in messages[0] and name in messages[0]
        assert reasons() == []
        for ours in found[:2]:
            assert str(ours) == str(found[2])
            assert torch.equal(
                *(
                    torch.stack([*torch.atleast_1d(each)] if torch.is_tensor(each) else [*each])
                    for each in (ours, found[2])
                )
            )


def with_image_ids(arguments, at, value):
    ids = arguments["input_ids"].clone()
    ids[:, at] = value
    return arguments | {"input_ids": ids}


def with_sizes(**sizes):
    return image_arguments(
        config=SimpleNamespace(
            model=SimpleNamespace(showo=SimpleNamespace(**vars(CONFIG.model.showo) | sizes)), dataset=CONFIG.dataset
        )
    )


def unscored():
    batch = loss_batch()
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


OTHER_CALLS = {
    "text in the image": ("t2i_generate", lambda: with_image_ids(image_arguments(), -5, 7), "neither codes"),
    "no end of image": ("t2i_generate", lambda: with_image_ids(image_arguments(), -1, 7), "soi and eoi"),
    "fewer image tokens": ("t2i_generate", lambda: with_sizes(num_vq_tokens=12), "num_vq_tokens"),
    "too many text tokens": ("t2i_generate", lambda: with_sizes(llm_vocab_size=364), "does not fit"),
    "an image all known": (
        "t2i_generate",
        lambda: image_arguments(image_ids=torch.arange(32).view(2, 16) + LAYOUT.code_offset),
        "no token to draw",
    ),
    "no steps": ("t2i_generate", lambda: image_arguments(timesteps=0), "timesteps"),
    "temperature below 0": ("t2i_generate", lambda: image_arguments(temperature=-1.0), "temperature"),
    "two questions": (
        "mmu_generate",
        lambda: question() | {"idx": torch.cat([question()["idx"], question(1)["idx"]]), "top_k": 1},
        "2 sequences",
    ),
    "embeddings without CLIP": (
        "mmu_generate",
        lambda: question() | {"input_embeddings": torch.ones(1, 24, 64), "max_new_tokens": 1},
        "idx alone",
    ),
    "no tokens": ("mmu_generate", lambda: question() | {"max_new_tokens": 0}, "max_new_tokens"),
    "temperature 0": ("mmu_generate", lambda: question() | {"temperature": 0.0}, "temperature"),
    "top_k 0": ("mmu_generate", lambda: question() | {"top_k": 0}, "top_k"),
    "text and an image": (
        "mmu_generate",
        lambda: {"idx": (ids := generation_ids(LAYOUT, PROMPTS[:1], MAX_SEQ_LENGTH)), "attention_mask": t2i_mask(ids)},
        "attention_mask",
    ),
    "shorter labels": (
        "loss_for_unidpo",
        lambda: loss_batch() | {"labels": loss_batch()["labels"][:, :-2]},
        "labels are",
    ),
    "labels of fewer sequences": (
        "loss_for_unidpo",
        lambda: loss_batch() | {"labels": loss_batch()["labels"][1:]},
        "labels are",
    ),
    "labels beyond the vocabulary": (
        "loss_for_unidpo",
        lambda: loss_batch() | {"labels": loss_batch()["labels"] + 200},
        "outside",
    ),
    "much noise": ("t2i_generate", lambda: image_arguments(temperature=20.0), "temperature"),
    "an end that is no token": (
        "mmu_generate",
        lambda: question() | {"eot_token": [1], "max_new_tokens": 2},
        "eot_token",
    ),
    "no labels": ("loss_for_unidpo", lambda: loss_batch() | {"labels": None}, "no labels"),
    "nothing scored": ("loss_for_unidpo", unscored, "no label"),
}


@pytest.mark.parametrize("case", OTHER_CALLS)
def test_other_calls_go_to_the_original(showo_class, model, fast, reasons, case):
    """With its results, or its error."""
    name, arguments, message = OTHER_CALLS[case]
    needs(showo_class, name)
    found = []
    for each in (model, fast):
        torch.manual_seed(0)
        try:
            found.append(str(getattr(each, name)(**arguments())))
        except Exception as error:
            found.append(type(error))
    assert found[0] == found[1]
    assert len(messages := reasons()) == 1 and name in messages[0] and message in messages[0]


def test_adapters_are_called(showo_class, make_model, reasons):
    """peft puts them in place of linear layers, before or after accelerate."""
    peft = pytest.importorskip("peft")
    model = make_model()
    hermesflow.accelerate(model)
    plain = model.mmu_generate(**question(), max_new_tokens=8, top_k=1)
    config = peft.LoraConfig(target_modules=["q_proj", "fc1", "dense"], r=2, lora_alpha=4)
    peft.inject_adapter_in_model(config, model)
    generator = torch.Generator().manual_seed(3)
    adapters = {name: weight for name, weight in model.named_parameters() if ".lora_" in name}
    for weight in adapters.values():
        weight.data.normal_(0, 0.5, generator=generator)
    assert len(adapters) == 12
    arguments = question() | {"max_new_tokens": 8, "top_k": 1}
    adapted = model.mmu_generate(**arguments)
    assert adapted == model.mmu_generate.original(**arguments) and adapted != plain
    if hasattr(model, "loss_for_unidpo"):
        found = []
        for method in (model.loss_for_unidpo, model.loss_for_unidpo.original):
            sums = method(**loss_batch())
            gradients = torch.autograd.grad(sum(sums), adapters.values())
            found.append((torch.stack(sums).detach(), *gradients))
        for ours, theirs in zip(*found, strict=True):
            assert (ours - theirs).norm() <= GRADIENT * theirs.norm()
    assert reasons() == []


HOOKED = (
    "showo", "showo.model", "showo.model.embed_tokens", "showo.model.layers.0", "showo.model.layers.0.self_attn.q_proj",
    "showo.model.layers.0.mlp", "showo.model.layers.1.mlp.fc1", "showo.model.layers.1.input_layernorm",
    "showo.model.final_layernorm", "showo.lm_head",
)  # fmt: skip


@pytest.mark.parametrize("path", HOOKED)
def test_hooks_go_to_the_original(model, fast, reasons, path):
    """They would see packed tokens, or nothing."""
    seen = []
    for each in (model, fast):
        each.get_submodule(path).register_forward_hook(lambda module, inputs, output: seen.append(0))
        count = len(seen)
        answers = each.mmu_generate(**question(), max_new_tokens=3, top_k=1)
        assert len(seen) - count == len(answers) == 3
    assert len(messages := reasons()) == 1 and "hooks" in messages[0]


def hooked(model):
    model.register_forward_hook(lambda module, inputs, output: -output)


def patched(model):
    forward = model.forward
    model.forward = lambda *args, **kwargs: -forward(*args, **kwargs)


@pytest.mark.parametrize("change", [hooked, patched])
def test_a_forward_of_the_callers_own_is_run(make_model, reasons, change):
    """The published generation methods call the model itself."""
    model, fast = make_model(), hermesflow.accelerate(make_model())
    before = torch.stack(model.mmu_generate(**question(), max_new_tokens=8, top_k=1))
    found = []
    for each in (model, fast):
        change(each)
        torch.manual_seed(0)
        tokens = torch.stack(each.mmu_generate(**question(), max_new_tokens=8, top_k=1))
        found.append((tokens, each.t2i_generate(**image_arguments())))
    assert not torch.equal(found[0][0], before)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert len(messages := reasons()) == 2 and all("forward of its own" in message for message in messages)


def test_a_forward_under_autocast_is_followed_where_the_caller_has_it_on(make_model, reasons):
    """accelerate's prepare puts such a forward in place, and keeps the old one under this name."""
    fast = hermesflow.accelerate(make_model())
    fast._original_forward = fast.forward
    fast.forward = torch.autocast("cpu", dtype=torch.bfloat16)(fast.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast.mmu_generate(**question(), max_new_tokens=2)
    assert reasons() == []
    fast.mmu_generate(**question(), max_new_tokens=2)
    assert len(reasons()) == 1


@pytest.mark.parametrize("shared", ["t2i", "mmu", "clip"])
def test_logits(make_model, shared):
    """At every token but pads, within the tolerance of the golden data."""
    model = make_model(w_clip_vit=shared == "clip")
    hermesflow.accelerate(model)
    if shared == "t2i":
        arguments = image_arguments()
        given = {"input_ids": arguments["input_ids"]}
    else:
        arguments = feature_question(model) if shared == "clip" else question()
        given = {"input_ids": arguments.get("idx"), "input_embeddings": arguments.get("input_embeddings")}
    with torch.no_grad():
        logits = model(**given, attention_mask=arguments["attention_mask"])
        transformer = model.mmu_generate.acceleration.transformer()
        batch, length = logits.shape[:2]
        forest = label_scoring.LabelSpans((batch, length), None if shared == "clip" else given["input_ids"].tolist())
        readings = mask_reading.read_masks(arguments["attention_mask"], batch, length)
        for sequence, reading in enumerate(readings):
            forest.add(sequence, reading, 0, length - 1)
        embeds = (torch.arange(length), given["input_embeddings"][0]) if shared == "clip" else None
        hidden = transformer(SpanTree.build(forest.spans), embeds=embeds)
        ours = nn.functional.linear(hidden, *transformer.head)[forest.row_of]
    assert (forest.row_of >= 0).all() and len(hidden) <= batch * length
    assert (ours - logits).abs().max() <= 2e-4


def test_no_mask(make_model, reasons):
    model, fast = make_model(), hermesflow.accelerate(make_model())
    codes = []
    for each in (fast, model):
        torch.manual_seed(0)
        codes.append(each.t2i_generate(**image_arguments() | {"attention_mask": None}))
    assert torch.equal(*codes)
    if hasattr(model, "loss_for_unidpo"):
        ours, theirs = (each.loss_for_unidpo(**loss_batch() | {"attention_mask": None}) for each in (fast, model))
        assert ours == theirs
    for each in (fast, model):
        with pytest.raises(AttributeError):
            each.mmu_generate(**question() | {"attention_mask": None})
    reasons()


@pytest.mark.parametrize("where", ["attention", "residual", "embedding"])
def test_dropout_in_training_goes_to_the_original(showo_class, make_model, reasons, where):
    needs(showo_class, "loss_for_unidpo")
    model, fast = make_model(), hermesflow.accelerate(make_model())
    found = []
    for each in (fast, fast, model):
        if where == "attention":
            each.showo.model.layers[1].self_attn.attention_dropout = 0.3
        elif where == "residual":
            each.showo.model.layers[0].resid_dropout.p = 0.3
        else:
            each.showo.model.embed_dropout.p = 0.3
        each.train()
        torch.manual_seed(0)
        found.append([value.item() for value in each.loss_for_unidpo(**loss_batch())])
        if each is fast and len(found) == 1:
            assert len(messages := reasons()) == 1 and "dropout" in messages[0]
    assert found[0] == found[1] == found[2]
    # Out of training nothing is dropped.
    ours, theirs = (torch.stack(each.eval().loss_for_unidpo(**loss_batch())) for each in (fast, model))
    assert (ours - theirs).abs().max() <= SUMS


# what cannot be accelerated


def without_t2i_generate(model, showo_class):
    other = nn.Module()
    other.showo, other.config = model.showo, SimpleNamespace(mask_token_id=373, w_clip_vit=False)
    return other


def without_mask_token(model, showo_class):
    class Showo(showo_class):
        config = property(lambda self: SimpleNamespace(w_clip_vit=False))

    model.__class__ = Showo
    return model


def without_clip_setting(model, showo_class):
    class Showo(showo_class):
        config = property(lambda self: SimpleNamespace(mask_token_id=373))

    model.__class__ = Showo
    return model


def with_further_parameter(model, showo_class):
    def t2i_generate(
        self,
        input_ids=None,
        uncond_input_ids=None,
        attention_mask=None,
        temperature=1.0,
        timesteps=18,
        guidance_scale=0,
        noise_schedule=None,
        generator=None,
        config=None,
        top_p=1.0,
        **kwargs,
    ):
        return None

    names = [name for name in ("forward", "mmu_generate", *LOSSES) if hasattr(showo_class, name)]
    return subclass(model, t2i_generate=t2i_generate, **{name: getattr(showo_class, name) for name in names})


def without_norm(model, showo_class):
    del model.showo.model.layers[1].self_attn.q_layernorm
    return model


def with_scaled_rope(model, showo_class):
    model.showo.config.rope_scaling = {"type": "linear", "factor": 2.0}
    return model


def subclass(model, **methods):
    model.__class__ = type("MyShowo", (type(model),), methods)
    return model


def with_own_attribute(model, showo_class):
    model.mmu_generate = lambda *args, **kwargs: "the caller's"
    return model


REFUSED = {
    "no .showo": (lambda model, _: delattr(model, "showo") or model, "accelerate: .*no .showo"),
    "no w_clip_vit": (without_clip_setting, "accelerate: .*no .config.w_clip_vit"),
    "a method of its own": (
        lambda model, _: subclass(model, t2i_generate=lambda self: None, forward=lambda self: None),
        "accelerate: .*mmu_generate is not MyShowo's own",
    ),
    "a forward of its own": (
        lambda model, _: subclass(model, forward=lambda self: None),
        "accelerate: .*forward is not Showo's own",
    ),
    "a replaced method": (with_own_attribute, "accelerate: .*mmu_generate is not Showo's own"),
    "a further parameter": (with_further_parameter, r"accelerate: .*t2i_generate takes \(.*top_p.*\), not \("),
    "unknown class": (lambda model, showo_class: nn.Linear(2, 2), "accelerate: .*Linear"),
    "no t2i_generate": (without_t2i_generate, "accelerate: .*t2i_generate"),
    "no mask token": (without_mask_token, "accelerate: .*mask_token_id"),
    "no norm of q": (without_norm, "accelerate: .*q_layernorm"),
    "scaled rope": (with_scaled_rope, "accelerate: .*rope_scaling.*linear"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_models_are_left_alone(model, showo_class, case):
    make, message = REFUSED[case]
    other = make(model, showo_class)
    before = set(vars(other))
    with pytest.raises(ValueError, match=message):
        hermesflow.accelerate(other)
    assert set(vars(other)) == before


def test_images_under_autocast_leave_no_graph_behind(model, monkeypatch):
    """Its copies of the weights are gone after the call, so nothing that was captured may be replayed."""
    kept = []
    monkeypatch.setattr(ImageDecoder, "_keep", lambda self, session: kept.append(self))
    hermesflow.accelerate(model)
    model.t2i_generate(**image_arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.t2i_generate(**image_arguments())
        model.t2i_generate(**image_arguments())
    model.t2i_generate(**image_arguments())
    plain, first, second, again = kept
    assert plain is again and len({id(plain), id(first), id(second)}) == 3


@pytest.mark.parametrize("max_new_tokens", [1, 2, 12])
def test_a_captured_step_gives_the_same_answer(fast, recorded_graphs, monkeypatch, max_new_tokens):
    """With a stand-in for CUDA graphs, which refuses what waits for the device."""
    # On CUDA the op looks at no values.
    monkeypatch.setattr(sys.modules["hermesflow.kernels.token_sample"], "can_read_values", lambda device: False)
    arguments = question() | {"max_new_tokens": max_new_tokens, "temperature": 1.3}
    torch.manual_seed(5)
    found = fast.mmu_generate(**arguments)
    assert len(recorded_graphs) == (max_new_tokens > 2) and len(found) == max_new_tokens
    monkeypatch.undo()
    torch.manual_seed(5)
    assert fast.mmu_generate(**arguments) == found


@pytest.mark.parametrize("name", ["mmu_generate", "t2i_generate"])
def test_a_model_that_gives_nan_says_where(fast, name):
    with torch.no_grad():
        fast.showo.model.layers[0].mlp.fc1.weight[0, 0] = float("nan")
    arguments = question() if name == "mmu_generate" else image_arguments()
    where = r"showo.model.layers.0.mlp.fc1.weight holds NaN"
    with pytest.raises(RuntimeError, match=rf"^{name}: the model gives no distribution \(NaN\).*{where}"):
        getattr(fast, name)(**arguments)


def test_labels_of_another_integer_dtype(showo_class, fast):
    needs(showo_class, "loss_for_unidpo")
    batch = loss_batch()
    wanted = fast.loss_for_unidpo(**batch)
    assert fast.loss_for_unidpo(**batch | {"labels": batch["labels"].int()}) == wanted


def test_double_precision_goes_to_the_original(make_model, reasons):
    model, fast = make_model().double(), hermesflow.accelerate(make_model().double())
    answers = [each.mmu_generate(**question(), max_new_tokens=4, top_k=1) for each in (model, fast)]
    assert answers[0] == answers[1]
    assert len(messages := reasons()) == 1 and "float64" in messages[0]


def test_peft_model(showo_class, make_model):
    peft = pytest.importorskip("peft")
    wrapper = peft.PeftModel(make_model(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    assert hermesflow.accelerate(wrapper) is wrapper
    inner = wrapper.get_base_model()
    assert is_accelerated(inner, showo_class) and "accelerated" in repr(inner.t2i_generate)
    hermesflow.restore(wrapper)
    assert not is_accelerated(inner, showo_class)


class Delegating(nn.Module):
    """Has what its model has, as wrappers do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)


def test_an_unknown_wrapper_is_named(model):
    with pytest.raises(ValueError, match="accelerate: .*found Delegating: no method t2i_generate"):
        hermesflow.accelerate(Delegating(model))
