"""Chameleon, Emu3 and Janus in every layout they are published in: opened to equal tensors, saved as they came, read by
transformers, and refused in one line that names the file and the fix where they are damaged."""

import json
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from hermesflow import load_model
from hermesflow.engine.token_layout import Ids
from hermesflow.engine.weights import read_tensors
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.images import as_image
from hermesflow.runtime.files import InputError

DATA = Path(__file__).parents[2] / "data"
NAMES = ["chameleon-tiny", "chameleon-swin-tiny", "emu3-tiny", "janus-tiny"]
CLASSES = {"chameleon": "Chameleon", "emu3": "Emu3", "janus": "Janus"}
VISION = "vision"
"""Folder of an original Emu3 image tokenizer in these tests."""


def family_of(name):
    return name.partition("-")[0]


def converted(how, parts, heads, shards):
    """A published tensor from those of transformers' layout, as original_names.json says it in words."""
    if how == "rows one below the other":
        return torch.cat(parts)
    (part,) = parts
    if how.startswith("row of any head"):  # from halves to pairs, one row a shard
        rows = part[:: len(part) // shards].unflatten(1, (2, -1)).transpose(1, 2).flatten(1)
        return rows if shards > 1 else rows[0]
    if how.startswith("rows of a head"):
        return part.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    if how.startswith("reshape"):
        return part[:, :, None, None]
    assert how == "with a first dimension of 1"
    return part[None]


def original_parts(name):
    """The published parts of a folder, in the order of original_names.json, each {published name: tensor}."""
    folder = DATA / name
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    heads, shards = config.get("num_attention_heads"), config.get("model_parallel_size", 1)
    parts = []
    for names in json.loads((folder / "original_names.json").read_text()).values():
        if not isinstance(names, dict):
            continue
        part = {}
        for published, source in names.items():
            if isinstance(source, str):
                part[published] = tensors[source].clone()
                continue
            sources = source["from"] if isinstance(source["from"], list) else [source["from"]]
            part[published] = converted(source["how"], [tensors[each] for each in sources], heads, shards).contiguous()
        parts.append(part)
    return parts, config


def write_meta(name, folder):
    """As Meta and GAIR publish Chameleon and Anole."""
    (weights, _), config = original_parts(name)
    model, tokenizer = folder / "models" / "7b", folder / "tokenizer"
    model.mkdir(parents=True)
    tokenizer.mkdir()
    torch.save(weights | {"rope.freqs": torch.ones(4)}, model / "consolidated.pth")
    args = {
        "dim": config["hidden_size"], "n_layers": config["num_hidden_layers"], "multiple_of": 8,
        "n_heads": config["num_attention_heads"], "norm_eps": config["rms_norm_eps"], "qk_normalization": True,
        "swin_norm": config["swin_norm"],
    }  # fmt: skip
    (model / "params.json").write_text(json.dumps({"model": args, "seed": 1}))
    (model / "consolidate_params.json").write_text(json.dumps({"model_parallel_size": config["model_parallel_size"]}))
    torch.save({"state_dict": load_file(DATA / name / "vqvae" / "model.safetensors")}, tokenizer / "vqgan.ckpt")
    resolution = config["vq_config"]["resolution"]
    (tokenizer / "vqgan.yaml").write_text(f"model:\n  params:\n    ddconfig:\n      resolution: {resolution}\n")
    shutil.copy(DATA / name / "tokenizer.json", tokenizer / "text_tokenizer.json")


def copy_tokenizer(name, folder):
    for file in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copy(DATA / name / file, folder / file)


def write_emu3(name, folder):
    """As BAAI publishes Emu3, with a tokenizer.json and the sizes of images beside it."""
    parts, config = original_parts(name)
    of_codes, weights = sorted(parts, key=lambda part: "lm_head.weight" in part)
    (folder / VISION).mkdir(parents=True)
    copy_tokenizer(name, folder)
    save_file(weights, folder / "model.safetensors")
    save_file(of_codes, folder / VISION / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config["text_config"] | {"model_type": "Emu3"}))
    vq = config["vq_config"]
    renamed = {"base_channels": "ch", "channel_multiplier": "ch_mult", "latent_channels": "z_channels"}
    vq = {renamed.get(key, key): value for key, value in vq.items()} | {"model_type": "Emu3VisionVQ"}
    (folder / VISION / "config.json").write_text(json.dumps(vq))


def write_janus(name, folder):
    """As deepseek-ai publishes Janus."""
    (weights,), config = original_parts(name)
    folder.mkdir()
    copy_tokenizer(name, folder)
    left_over = {
        "gen_vision_model.quantize.codebook_used": torch.zeros(9),
        "vision_model.vision_tower.attn_pool.latent": torch.zeros(1, 1, 4),
    }
    torch.save(weights | left_over, folder / "pytorch_model.bin")
    vision = config["vision_config"]
    params = {
        "image_size": vision["image_size"], "model_name": "siglip_tiny", "select_layer": -1, "mlp_size": 128,
        "width": vision["hidden_size"], "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"], "patch_size": vision["patch_size"],
    }  # fmt: skip
    language = config["text_config"]
    vision = {"cls": "CLIPVisionTower", "params": params}
    config = {"model_type": "multi_modality", "language_config": language, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))


WRITERS = {"chameleon": write_meta, "emu3": write_emu3, "janus": write_janus}


def open_original(folder):
    beside = folder / VISION
    return load_model(folder, vq_tokenizer=beside if beside.is_dir() else None)


@pytest.fixture
def original_folder(request, tmp_path):
    WRITERS[family_of(request.param)](request.param, tmp_path / "original")
    return tmp_path / "original"


def layout_values(layout):
    """What was given to a layout; ids compare as lists."""
    values = {item.name: getattr(layout, item.name) for item in fields(layout) if item.name != "encode"}
    return {name: list(value) if isinstance(value, Ids) else value for name, value in values.items()}


def assert_same_model(ours, other):
    pairs = [(ours.parts, other.parts), (ours.vq_tokenizer, other.vq_tokenizer)]
    for tensors, others in (tuple(module.state_dict() for module in pair) for pair in pairs):
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
    assert layout_values(ours.layout) == layout_values(other.layout)
    assert ours.transformer.config == other.transformer.config and ours.image_size == other.image_size


@pytest.mark.parametrize(("name", "original_folder"), [(name, name) for name in NAMES], indirect=["original_folder"])
def test_the_original_layout_is_the_same_model_and_is_written_back(name, original_folder, tmp_path):
    published, original = load_model(DATA / name), open_original(original_folder)
    assert_same_model(published, original)
    original.save(tmp_path / "saved")
    weights = [file for file in original_folder.rglob("*") if file.suffix in (".pth", ".ckpt", ".bin", ".safetensors")]
    for file in weights:
        saved = tmp_path / "saved" / file.relative_to(original_folder)
        saved = saved.with_name("model.safetensors") if file.suffix == ".bin" else saved
        if VISION in file.parts:  # a checkpoint of its own
            assert not saved.exists()
            continue
        before, after = read_tensors(file), read_tensors(saved)
        assert before.keys() - after.keys() <= {
            "rope.freqs", "gen_vision_model.quantize.codebook_used", "vision_model.vision_tower.attn_pool.latent",
        }  # fmt: skip
        for key, tensor in after.items():  # image tokenizers are held in fp32
            assert tensor.shape == before[key].shape and torch.equal(tensor, before[key].to(tensor.dtype)), key
    beside = original_folder / VISION
    again = load_model(tmp_path / "saved", vq_tokenizer=beside if beside.is_dir() else None)
    assert_same_model(original, again)
    assert again.kept_files == original.kept_files


@pytest.mark.parametrize("original_folder", ["chameleon-tiny"], indirect=True)
def test_heads_whose_norms_were_trained_apart_keep_a_row_each(original_folder, tmp_path):
    model = load_model(original_folder)
    norm = model.transformer.blocks[1].attention.q_norm
    with torch.no_grad():
        norm.weight += torch.arange(norm.weight.numel()).view_as(norm.weight) / 8
    model.save(tmp_path / "saved")
    saved = read_tensors(tmp_path / "saved" / "models" / "7b" / "consolidated.pth")
    assert saved["layers.1.attention.q_normalization.weight"].shape == norm.weight.shape
    assert saved["layers.0.attention.q_normalization.weight"].dim() == 1
    assert_same_model(model, load_model(tmp_path / "saved"))


def understood(model, name):
    """Understanding ids of the folder, and what transformers' class takes beside them."""
    golden, config = (
        load_file(DATA / name / "golden.safetensors"),
        json.loads((DATA / name / "config.json").read_text()),
    )
    ids = golden["und0.input_ids"]
    if family_of(name) != "janus":
        return ids, {}
    ids = ids.masked_fill(ids == model.layout.pad, config["image_token_id"])
    return ids, {"pixel_values": golden["und.pixel_values"][:1]}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_transformers_opens_what_we_save(name, tmp_path):
    """With weights that were changed, so that nothing is a copy of the file."""
    model = load_model(DATA / name, dtype=torch.float32)
    for number, parameter in enumerate(model.parts.parameters()):
        parameter.mul_(1 + 0.01 * (number % 5))
    model.save(tmp_path / "saved")
    kind = getattr(transformers, f"{CLASSES[family_of(name)]}ForConditionalGeneration")
    theirs, report = kind.from_pretrained(tmp_path / "saved", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    ids, seen = understood(model, name)
    expected = theirs.eval()(input_ids=ids[None], **seen).logits[0]
    embeds = None
    if seen:
        rows = (ids == theirs.config.image_token_id).nonzero()[:, 0]
        embeds = (rows, model.features(seen["pixel_values"])[0])
    ours = model.transformer.head(model.transformer(SpanTree.build([(ids.tolist(), -1, "causal")]), embeds=embeds))
    text = list(model.layout.text_ids)  # transformers masks Chameleon's image codes
    assert (ours - expected)[:, text].abs().max() < 2e-4


@pytest.fixture
def folder(request, tmp_path):
    return shutil.copytree(DATA / request.param, tmp_path / "model")


def with_json(file, change):
    def damage(folder):
        path = folder / file
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    return damage


def without_token(token):
    """Takes a token's name away in tokenizer.json; its id stays."""

    def change(values):
        for added in values["added_tokens"]:
            if added["content"] == token:
                added["content"] = "<another>"
        if token in values["model"]["vocab"]:
            values["model"]["vocab"]["<another>"] = values["model"]["vocab"].pop(token)

    return with_json("tokenizer.json", change)


def with_weights(change):
    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damage


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


def spoiled(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


REFUSED = [
    ("chameleon-tiny", with_json("config.json", lambda values: values.update(attention_bias=True)), "attention_bias"),
    ("chameleon-tiny", with_json("config.json", lambda values: values.update(hidden_size=63)), "hidden_size|fit"),
    ("chameleon-tiny", with_json("config.json", lambda values: values.update(vocab_size=300)), "ids up to 346.*300"),
    ("chameleon-tiny", with_json("config.json", lambda values: values.update(vq_config=3)), "vq_config is 3.*restore"),
    ("chameleon-tiny", with_json("config.json", lambda values: values.update(model_type=[1])), "unknown model_type"),
    ("chameleon-tiny", without_token("<racm3:break>"), "no <racm3:break>; give"),
    ("chameleon-tiny", without_token("IMGIMGBZ"), "IMGIMG..Z.*gaps; restore"),
    ("chameleon-tiny", no_tokenizer, "no tokenizer.json; give"),
    ("chameleon-tiny", spoiled, "embed_tokens.weight holds NaN"),
    ("emu3-tiny", with_json("config.json", lambda values: values["text_config"].update(head_dim=8)), "head_dim 8"),
    (
        "emu3-tiny",
        with_json("config.json", lambda values: values["text_config"].update(rope_scaling={"type": "linear"})),
        "rope_scaling.*not supported",
    ),
    ("emu3-tiny", with_json("config.json", lambda values: values.update(text_config=7)), "is '?7.*restore"),
    ("emu3-tiny", with_json("preprocessor_config.json", lambda values: values.update(max_pixels="x")), "max_pixels"),
    ("emu3-tiny", lambda folder: (folder / "preprocessor_config.json").write_text("2"), "expected spatial_factor"),
    ("emu3-tiny", with_json("preprocessor_config.json", lambda values: values.update(min_pixels=0)), "min_pixels.* 0,"),
    ("emu3-tiny", without_token("<|extra_200|>"), "no <|extra_200|>; give"),
    ("emu3-tiny", without_token("<|visual token 000007|>"), "visual tokens are not the last.*give"),
    ("emu3-tiny", cut, "model.safetensors: not a readable"),
    ("janus-tiny", with_json("config.json", lambda values: values.pop("vision_config")), "vision_config.*restore"),
    (
        "janus-tiny",
        with_json("config.json", lambda values: values["vision_config"].update(use_qk_norm=True)),
        "use_qk_norm.*not supported",
    ),
    ("janus-tiny", with_json("config.json", lambda values: values["text_config"].update(vocab_size="x")), "vocab_size"),
    (
        "janus-tiny",
        with_json("config.json", lambda values: values["vision_config"].update(mlp_ratio=float("inf"))),
        "mlp_size as None; restore",
    ),
    (
        "janus-tiny",
        with_weights(lambda tensors: tensors.update({"model.generation_embeddings.weight": torch.zeros(3)})),
        r"generation_embeddings.weight: expected \(1, 1\), got \(3,\)|not the shape",
    ),
    ("janus-tiny", without_token("<begin_of_image>"), "no <begin_of_image>; give"),
    (
        "janus-tiny",
        with_weights(lambda tensors: tensors.pop("model.generation_head.vision_head.bias")),
        "missing model.generation_head.vision_head.bias.*restore",
    ),
    (
        "janus-tiny",
        with_weights(lambda tensors: tensors.update({"model.aligner.fc1.bias": torch.zeros(3)})),
        r"model.aligner.fc1.bias: expected \(64,\), got \(3,\).*restore",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("folder", "damage", "message"),
    REFUSED,
    ids=[f"{name}-{message[:24]}" for name, _, message in REFUSED],
    indirect=["folder"],
)
def test_damaged_folders_are_refused(folder, damage, message):
    damage(folder)
    check_refused(folder, message)


def check_refused(folder, message):
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert str(caught.value).isprintable() and str(caught.value).startswith(str(folder))


def no_resolution(folder):
    (folder / "tokenizer" / "vqgan.yaml").write_text("model: {}\n")


def more_than_tensors(folder):
    torch.save({"weights": Path("x")}, folder / "models" / "7b" / "consolidated.pth")


PARAMS = "models/7b/params.json"
META_REFUSED = {
    "no object": (lambda folder: (folder / PARAMS).write_text("7"), "params.json: unknown no family"),
    "no yaml": (no_resolution, "vqgan.yaml: says no resolution; restore"),
    "code": (more_than_tensors, "consolidated.pth: holds more than tensors"),
    "layers": (with_json(PARAMS, lambda values: values["model"].update(n_layers=4)), "missing layers.3.*restore"),
    "heads": (with_json(PARAMS, lambda values: values["model"].update(n_heads="x")), "num_heads as 'x'"),
    "no norms": (with_json(PARAMS, lambda values: values["model"].update(qk_normalization=False)), "qk_normalization"),
    "no ckpt": (lambda folder: (folder / "tokenizer" / "vqgan.ckpt").unlink(), "vqgan.ckpt: no such file"),
    "no weights": (lambda folder: (folder / "models/7b/consolidated.pth").unlink(), "consolidated.pth: no such file"),
}


@pytest.mark.parametrize("original_folder", ["chameleon-tiny"], indirect=True)
@pytest.mark.parametrize(("damage", "message"), META_REFUSED.values(), ids=META_REFUSED.keys())
def test_damaged_folders_of_metas_are_refused(original_folder, damage, message):
    damage(original_folder)
    check_refused(original_folder, message)


def test_an_image_tokenizer_of_another_model_is_refused():
    model = load_model(DATA / "chameleon-tiny", vq_tokenizer=DATA / "chameleon-swin-tiny" / "vqvae")
    with pytest.raises(InputError, match="image tokenizer has 16 codes and 1 pixels a token, the model 48 codes"):
        model.vq_tokenizer  # noqa: B018


def test_emu3_understands_images_of_any_aspect():
    """Those of one grid go together; each is answered as it is alone."""
    model = load_model(DATA / "emu3-tiny", dtype=torch.float32)
    pixels = np.random.default_rng(0).integers(256, size=(3, 40, 40, 3), dtype=np.uint8)
    images = [pixels[0, :24], pixels[1, :, :20], pixels[2, :24]]
    groups = {engine.layout.image_grid: tuple(numbers) for numbers, _, engine in model.views(map(as_image, images))}
    assert groups == {(3, 5): (0, 2), (5, 2): (1,)}
    assert model.caption(images) == [model.caption([image])[0] for image in images]
    questions, choices = ["what is there ?", "how many ?", "what is it ?"], ["one", "two"]
    together = model.score(images, questions, choices)
    for image, question, chances in zip(images, questions, together, strict=True):
        assert model.score([image], question, choices)[0] == pytest.approx(chances, rel=1e-4)
    with pytest.raises(InputError, match="image 2: Emu3 sees images of an aspect up to 5, got 40 x 4 pixels; crop it"):
        model.caption([pixels[0], pixels[0, :4]])


def test_a_layout_may_be_replaced():
    """As for another negative prompt; the engine follows."""
    model = load_model(DATA / "emu3-tiny", dtype=torch.float32)
    ids, draw = model.image_prompt("a cat"), {"num_images": 1, "seeds": torch.zeros(1, 1, dtype=torch.int64)}
    before = model.engine.generate([ids], guidance_scale=4.0, temperature=0.0, **draw)
    model.layout = replace(model.layout, negative_ids=tuple(model.encode_text("two green triangles")))
    after = model.engine.generate([ids], guidance_scale=4.0, temperature=0.0, **draw)
    assert model.engine.layout is model.layout and not torch.equal(before, after)
