"""Published checkpoints: every layout opens, what does not fit is listed, and what is saved opens again as it was."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from hermesflow import cli
from hermesflow.benchmarks.random_checkpoint import TINY, WEIGHTS, write_checkpoint, write_tokenizer
from hermesflow.config import CurationConfig, EvalConfig, load_config
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import load_model
from hermesflow.models.magvit import load_vq_tokenizer
from hermesflow.runs import Run, export_model
from hermesflow.runtime.files import InputError
from hermesflow.selfplay import run_selfplay


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with one file of safetensors; leave it alone."""
    folder = tmp_path_factory.mktemp("checkpoint") / "showo"
    write_checkpoint(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(str(checkpoint))


@pytest.fixture
def copied(checkpoint, tmp_path):
    """A copy of it to damage; files are copied when they are written anew."""
    folder = tmp_path / "copied"
    for path in checkpoint.rglob("*"):
        if path.is_file():
            target = folder / path.relative_to(checkpoint)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(path)
    return folder


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """The hub, at an address where nobody listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def rewrite(path, change):
    """Changes a JSON file of the copy, not what it links to."""
    values = json.loads(path.read_text())
    change(values)
    path.unlink()
    path.write_text(json.dumps(values))


def logits(model):
    """Of one prompt with a masked image and of one image with a question."""
    layout = model.layout
    tree = SpanTree.build(
        [
            (layout.text_prompt(model.image_prompt("a red circle")), -1, "causal"),
            (layout.image([-1] * layout.num_image_tokens), 0, "full"),
            (layout.image_prefix(range(layout.num_image_tokens)), -1, "full"),
            (layout.question(model.caption_prompt()), 2, "causal"),
        ]
    )
    with torch.no_grad():
        return model.transformer.head(model.transformer(tree))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_kind_of_weights_opens(model, tmp_path, weights):
    write_checkpoint(tmp_path, TINY, weights=weights)
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion_pytorch_model.safetensors"])
def test_other_tools_names_open(model, copied, name):
    (copied / "pytorch_model.safetensors").rename(copied / name)
    assert torch.equal(logits(load_model(str(copied))), logits(model))


def test_index_under_the_name_of_transformers(model, tmp_path):
    write_checkpoint(tmp_path, TINY, weights="sharded-safetensors")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").rename(tmp_path / "model.safetensors.index.json")
    assert torch.equal(logits(load_model(str(tmp_path))), logits(model))


def test_dtype_is_the_checkpoints_or_the_wanted_one(checkpoint, tmp_path):
    assert load_model(str(checkpoint)).engine.dtype == torch.float32
    assert load_model(str(checkpoint), dtype=torch.bfloat16).engine.dtype == torch.bfloat16
    write_checkpoint(tmp_path, TINY, dtype=torch.bfloat16)
    assert load_model(str(tmp_path)).engine.dtype == torch.bfloat16


def test_the_image_tokenizer_is_in_fp32(copied):
    """Whatever its file holds and the backbone is opened in."""
    path = copied / "magvitv2" / "pytorch_model.safetensors"
    state = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in load_file(path).items()}
    path.unlink()
    save_file(state, path)
    model = load_model(str(copied), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.vq_tokenizer.parameters()} == {torch.float32}


def test_everything_goes_to_the_device(checkpoint):
    """The meta device stands in for a GPU."""
    model = load_model(str(checkpoint), device="meta")
    assert {parameter.device.type for parameter in model.transformer.parameters()} == {"meta"}
    assert {parameter.device.type for parameter in model.vq_tokenizer.parameters()} == {"meta"}


def test_images_are_drawn_as_published_unless_settings_say_otherwise(model):
    """README of HermesFlow: guidance 5 and 50 steps; the temperature compounds, as in Show-o's t2i_generate."""
    published = ImageSamplingParams(num_steps=50, guidance_scale=5.0, mask_temperature=1.0, mask_decay="showo")
    for settings in (CurationConfig(), EvalConfig()):
        assert model.sampling == model.sampling_of(settings) == published
    chosen = CurationConfig(num_steps=7, guidance_scale=0.0, mask_temperature=0.5)
    assert model.sampling_of(chosen) == replace(published, num_steps=7, guidance_scale=0.0, mask_temperature=0.5)


def test_answers_follow_a_question_after_a_blank(model):
    assert model.answer_ids("red") == model.encode_text(" red")


@pytest.mark.parametrize("as_path", [lambda folder: str(folder), lambda folder: "phi"], ids=["folder", "other-name"])
def test_language_model_elsewhere(model, copied, tmp_path, as_path):
    elsewhere = tmp_path / "phi" if as_path(tmp_path) != "phi" else copied / "phi"
    (copied / "llm").rename(elsewhere)
    rewrite(copied / "config.json", lambda values: values.update(llm_model_path=as_path(elsewhere)))
    assert torch.equal(logits(load_model(str(copied))), logits(model))


def test_language_model_from_the_hub(model, copied, monkeypatch, tmp_path):
    (copied / "llm").rename(tmp_path / "snapshot")
    rewrite(copied / "config.json", lambda values: values.update(llm_model_path="microsoft/phi-1_5"))
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    opened = load_model(str(copied))
    assert torch.equal(logits(opened), logits(model))
    ((name, patterns),) = asked
    assert name == "microsoft/phi-1_5" and not any(pattern.endswith((".py", "*")) for pattern in patterns)
    opened.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["llm_model_path"] == "microsoft/phi-1_5"
    assert torch.equal(logits(load_model(str(tmp_path / "saved"))), logits(model)) and len(asked) == 1


def test_a_folder_named_like_the_built_in_model(model, checkpoint, tmp_path, monkeypatch):
    """ "tiny" is the built-in one; "./tiny" and "tiny/" are folders."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no model './tiny'"):
        load_model("./tiny")
    (tmp_path / "tiny").symlink_to(checkpoint)
    assert torch.equal(logits(load_model("./tiny")), logits(model))
    assert torch.equal(logits(load_model("tiny/")), logits(model))
    assert load_model("tiny").layout != model.layout


def test_a_whole_model_from_the_hub(model, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(checkpoint))
    assert torch.equal(logits(load_model("showlab/show-o")), logits(model))


def test_saved_it_is_the_published_layout(model, checkpoint, tmp_path):
    model.save(tmp_path)
    published, saved = (load_file(folder / "pytorch_model.safetensors") for folder in (checkpoint, tmp_path))
    assert published.keys() == saved.keys()
    assert all(torch.equal(published[name], saved[name]) for name in published)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((checkpoint / "config.json").read_text())
    again = load_model(str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    assert all(map(torch.equal, again.vq_tokenizer.parameters(), model.vq_tokenizer.parameters()))


def test_saved_in_another_dtype(model, tmp_path):
    model.save(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "pytorch_model.safetensors").values()} == {torch.bfloat16}


def test_export_takes_the_last_round_of_a_run(model, tmp_path, capsys):
    changed = load_model(str(model.folder))
    with torch.no_grad():
        changed.transformer.norm.bias += 1
    model.save(tmp_path / "run" / "round-2" / "model")
    changed.save(tmp_path / "run" / "round-10" / "model")
    assert cli.main(["export", str(tmp_path / "run"), "-o", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    exported = load_model(str(tmp_path / "out"))
    assert exported.engine.dtype == torch.bfloat16
    assert torch.equal(exported.transformer.norm.bias, changed.transformer.norm.bias.bfloat16())


@pytest.mark.parametrize(
    ("source", "message"),
    [("tiny", "tiny: its family has no published layout"), ("giant", "no model 'giant'")],
)
def test_export_of_what_cannot_be(source, message, tmp_path, capsys):
    assert cli.main(["export", source, "-o", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_export_replaces_nothing(model, copied, tmp_path):
    (tmp_path / "thesis.txt").write_text("of great worth")
    for folder in (tmp_path, tmp_path / "thesis.txt", copied):
        with pytest.raises(InputError, match="there is something already; choose another folder"):
            export_model(str(copied), folder)
    assert (tmp_path / "thesis.txt").exists()
    (tmp_path / "empty").mkdir()
    export_model(str(model.folder), tmp_path / "empty")
    assert torch.equal(logits(load_model(str(tmp_path / "empty"))), logits(model))


def test_export_of_a_run_that_is_not_trained(tmp_path):
    (tmp_path / "config.toml").touch()
    with pytest.raises(InputError, match="no round of this run is trained yet"):
        export_model(str(tmp_path), tmp_path / "out")


def test_the_language_models_path_survives_an_export(copied, tmp_path):
    """An absolute folder is what the original code finds from anywhere."""
    (copied / "llm").rename(tmp_path / "phi")
    rewrite(copied / "config.json", lambda values: values.update(llm_model_path=str(tmp_path / "phi")))
    export_model(str(copied), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["llm_model_path"] == str(tmp_path / "phi")


def test_others_may_read_what_is_written(model, tmp_path):
    model.save(tmp_path)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_buffers_of_old_versions_are_left_out(model, copied):
    state = load_file(copied / "pytorch_model.safetensors")
    state["showo.model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    (copied / "pytorch_model.safetensors").unlink()
    save_file(state, copied / "pytorch_model.safetensors")
    assert torch.equal(logits(load_model(str(copied))), logits(model))


def test_keys_that_do_not_fit_are_all_listed(copied):
    state = load_file(copied / "pytorch_model.safetensors")
    del state["showo.lm_head.bias"], state["showo.model.layers.1.mlp.fc1.weight"]
    state["showo.extra"] = torch.ones(1)
    state["showo.model.layers.0.self_attn.k_proj.weight"] = torch.ones(32, 31)
    state["showo.model.final_layernorm.bias"] = torch.ones(32, dtype=torch.int64)
    (copied / "pytorch_model.safetensors").unlink()
    save_file(state, copied / "pytorch_model.safetensors")
    with pytest.raises(InputError) as caught:
        load_model(str(copied))
    for message in (
        "missing showo.lm_head.bias",
        "missing showo.model.layers.1.mlp.fc1.weight",
        "unexpected showo.extra",
        r"self_attn.k_proj.weight: expected (32, 32), got (32, 31)",
        "final_layernorm.bias: expected floating point of 16 bits or more, got torch.int64",
    ):
        assert message in str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    write_checkpoint(tmp_path, TINY, weights="sharded-bin")
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(InputError, match=r"shards are missing \(pytorch_model-00002-of-00003.bin\); fetch them"):
        load_model(str(tmp_path))


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    write_checkpoint(tmp_path, TINY, weights="sharded-safetensors")
    first, second, _ = sorted(tmp_path.glob("pytorch_model-*"))
    state = load_file(second)
    save_file(load_file(first) | dict([state.popitem()]), first)
    with pytest.raises(InputError, match="stands in another shard too"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("shard", ["../other.bin", "/etc/passwd", "", ".hidden", 3])
def test_shards_lie_in_the_folder(tmp_path, shard):
    write_checkpoint(tmp_path, TINY, weights="sharded-bin")
    index = tmp_path / "diffusion_pytorch_model.bin.index.json"
    rewrite(index, lambda values: values["weight_map"].update({"showo.lm_head.bias": shard}))
    with pytest.raises(InputError, match="not an index of shards"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vocab_size", 376, "the vocabulary does not add up: llm_vocab_size 300 .* are 375, vocab_size is 376"),
        ("codebook_size", 65, "the vocabulary does not add up"),
        ("llm_vocab_size", 299, "does not add up: the tokenizer has 300 text ids .* llm_vocab_size is 299"),
        ("num_vq_tokens", 15, "num_vq_tokens: expected a square number, got 15"),
        ("num_vq_tokens", 0, "num_vq_tokens: expected a number from 1, got 0"),
        ("vocab_size", "many", "vocab_size: expected a number from 1, got 'many'"),
        ("vocab_size", None, "vocab_size: expected a number from 1, got None"),
        ("w_clip_vit", "no", "w_clip_vit: expected bool, got 'no'"),
        ("llm_model_path", None, "llm_model_path: expected str, got None"),
        ("_class_name", "Shower", "unknown _class_name 'Shower'; known: .*showo, show-o2, tiny"),
        ("_class_name", None, "unknown _class_name None; known: .*showo, show-o2, tiny"),
        ("w_clip_vit", True, "missing mm_projector.0.weight"),
    ],
)
def test_a_wrong_configuration_is_refused(copied, key, value, message):
    rewrite(copied / "config.json", lambda values: values.update({key: value}))
    with pytest.raises(InputError, match=message):
        load_model(str(copied))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "the language model is of type 'llama', a Showo checkpoint grows from 'phi'"),
        ("hidden_size", None, "gives hidden_size as None"),
        ("hidden_size", "wide", "gives hidden_size as 'wide'"),
        ("num_attention_heads", 3, "does not fit together"),
        ("num_attention_heads", 0, "does not fit together|gives num_heads"),
        ("num_hidden_layers", -1, r"num_layers must lie in \[1, 1024\], got -1"),
        ("hidden_act", "swishy", "activation must be one of"),
        ("rope_theta", [1], "gives rope_theta as"),
        ("intermediate_size", 65, r"mlp.fc1.weight: expected \(65, 32\), got \(64, 32\)"),
    ],
)
def test_a_wrong_language_model_is_refused(copied, key, value, message):
    rewrite(copied / "llm" / "config.json", lambda values: values.update({key: value}))
    with pytest.raises(InputError, match=message):
        load_model(str(copied))


def test_the_form_of_transformers_5_opens(model, copied):
    def nest(values):
        values["rope_parameters"] = {key: values.pop(key) for key in ("rope_theta", "partial_rotary_factor")}

    rewrite(copied / "llm" / "config.json", nest)
    assert torch.equal(logits(load_model(str(copied))), logits(model))


def test_a_tokenizer_of_another_size_is_refused(copied):
    for path in (copied / "llm").glob("tokenizer*"):
        path.unlink()
    write_tokenizer(copied / "llm", 310)
    with pytest.raises(InputError, match="the tokenizer has 310 text ids .* llm_vocab_size is 300; give the tokenizer"):
        load_model(str(copied))


def test_no_tokenizer_is_told(copied):
    for path in (copied / "llm").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(InputError, match="llm: holds no tokenizer"):
        load_model(str(copied))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("showlab/show-o-512x512", "no such folder, and the hub does not give it .*; check the name and the network"),
        ("no/such/folder", "give a folder, or a hub id"),
        ("nothing", "give 'tiny', 'tiny-ar' or 'tiny-flow', a folder that holds config.json, or a hub id"),
        ("", "give 'tiny', 'tiny-ar' or 'tiny-flow', a folder that holds config.json, or a hub id"),
        ("/no/such", "give a folder, or a hub id"),
        ("../tiny", "give a folder, or a hub id"),
    ],
)
def test_a_model_that_cannot_be_had(name, message):
    with pytest.raises(InputError, match=message):
        load_model(name)


def test_an_image_tokenizer_that_cannot_be_had_is_told_when_it_is_needed(copied, tmp_path):
    (copied / "magvitv2").rename(tmp_path / "away")
    opened = load_model(str(copied))
    with pytest.raises(InputError, match="no image tokenizer 'showlab/magvitv2'"):
        opened.encode_images(np.zeros((1, 64, 64, 3), np.uint8))
    opened = load_model(str(copied), vq_tokenizer=str(tmp_path / "away"))
    assert opened.encode_images(np.zeros((1, 64, 64, 3), np.uint8)).shape == (1, 16)


def test_an_image_tokenizer_of_another_model_is_refused(copied, tmp_path):
    other = replace(TINY, vq=replace(TINY.vq, code_bits=7))
    write_checkpoint(tmp_path / "other", other)
    with pytest.raises(InputError, match="has 128 codes, the model 64; give the model's own tokenizer"):
        load_model(str(copied), vq_tokenizer=str(tmp_path / "other" / "magvitv2")).vq_tokenizer  # noqa: B018


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "VQ"}, "not the configuration of a MAGVITv2"),
        ({"_class_name": "MAGVITv2", "code_bits": -1}, "code_bits is -1"),
        ({"_class_name": "MAGVITv2", "codes": 3}, "unexpected keyword"),
        ({"_class_name": "MAGVITv2"}, "does not fit the configuration"),
    ],
)
def test_a_wrong_image_tokenizer_is_refused(copied, values, message):
    path = copied / "magvitv2" / "config.json"
    path.unlink()
    path.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        load_vq_tokenizer(str(copied / "magvitv2"))


class Shout:
    """Unpickled by the usual pickle it would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return exec, (f"open({str(self.path)!r}, 'w').write('ran')",)


def test_code_in_a_bin_does_not_run(copied, tmp_path):
    (copied / "pytorch_model.safetensors").unlink()
    torch.save({"showo.lm_head.bias": Shout(tmp_path / "ran")}, copied / "pytorch_model.bin", pickle_protocol=2)
    with pytest.raises(InputError, match="holds more than tensors, and code in it is not run"):
        load_model(str(copied))
    (copied / "pytorch_model.bin").write_bytes(pickle.dumps(Shout(tmp_path / "ran")))
    with pytest.raises(InputError, match="pytorch_model.bin: "):
        load_model(str(copied))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_weights_that_are_no_numbers_are_refused(copied, value):
    state = load_file(copied / "pytorch_model.safetensors")
    state["showo.model.layers.1.self_attn.v_proj.bias"][3] = value
    (copied / "pytorch_model.safetensors").unlink()
    save_file(state, copied / "pytorch_model.safetensors")
    with pytest.raises(InputError, match="v_proj.bias holds NaN or infinity"):
        load_model(str(copied))


def test_tied_tensors_of_one_storage_both_arrive(copied):
    """Pages of a storage that a second name shares are not given back between the two."""
    state = load_file(copied / "pytorch_model.safetensors")
    state["showo.lm_head.weight"] = state["showo.model.embed_tokens.weight"]
    (copied / "pytorch_model.safetensors").unlink()
    torch.save(state, copied / "pytorch_model.bin")
    transformer = load_model(str(copied)).transformer
    assert torch.equal(transformer.head.weight, state["showo.lm_head.weight"])
    assert torch.equal(transformer.embed.weight, state["showo.lm_head.weight"])


@pytest.mark.parametrize("weights", ["bin", "safetensors"])
def test_memory_is_not_doubled(tmp_path, weights):
    """150 MiB of weights in one file: loading adds no more than they are and a fifth."""
    shape = replace(TINY, hidden_size=512, num_layers=12, num_heads=8, mlp_size=2048)
    write_checkpoint(tmp_path, shape, weights=weights)
    code = (
        "import re, torch\n"
        "from hermesflow import load_model\n"
        "from transformers import AutoTokenizer\n"
        # Not getrusage: what it says of a child begins with its parent's peak.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) * 1024\n"
        f"load_model({str(tmp_path / 'small')!r})\n"
        "before = peak()\n"
        f"model = load_model({str(tmp_path)!r})\n"
        "print(peak() - before)\n"
    )
    write_checkpoint(tmp_path / "small", TINY)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    size = (tmp_path / f"pytorch_model.{weights}").stat().st_size
    assert 100 << 20 < size and int(done.stdout) <= 1.2 * size


@pytest.mark.parametrize(("height", "width"), [(64, 64), (16, 80), (48, 32)])
def test_images_of_any_size_in_tokens(model, height, width):
    images = np.random.default_rng(0).integers(0, 256, (3, height, width, 3), dtype=np.uint8)
    codes = model.encode_images(images)
    assert codes.shape == (3, height // 16 * width // 16)
    assert model.decode_images(codes, height // 16, width // 16).shape == images.shape


def counted(passes, work):
    def call(batch, *rest):
        passes.append(len(batch))
        return work(batch, *rest)

    return call


def test_passes_of_the_image_tokenizer_are_bounded(model, monkeypatch):
    passes = []
    monkeypatch.setattr(model.vq_tokenizer, "images_per_pass", lambda height, width: 2)
    for name in ("encode", "decode"):
        work = getattr(model.vq_tokenizer, name)
        monkeypatch.setattr(model.vq_tokenizer, name, counted(passes, work))
    images = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    codes = model.encode_images(images)
    assert model.decode_images(codes).shape == images.shape and passes == [2, 2, 1] * 2


@pytest.mark.parametrize(("length", "kept"), [(0, 0), (125, 125), (126, 126), (127, 126), (500, 126)])
def test_prompts_are_cut_as_published(model, length, kept):
    """The original cuts [t2i, sot, text] at 128 ids and sets eot behind them."""
    ids = model.image_prompt("x" * length)
    assert ids == model.encode_text("x" * kept)
    assert len(model.layout.text_prompt(ids)) == kept + 3 <= 129


def test_a_prompt_that_starts_with_the_start_of_text_has_one(model):
    assert model.image_prompt("<|endoftext|>red") == model.encode_text("red")


def test_questions_stand_in_the_chat_form(model):
    assert model.decode_text(model.caption_prompt()) == "USER: \nGive a caption for this image. ASSISTANT:"
    asked = model.choices_prompt("what {color} is it?", ["red", "b'lue"])
    assert model.decode_text(asked) == "USER: \nQuestion:what {color} is it? Choice:['red', \"b'lue\"] ASSISTANT:"


def test_special_tokens_in_a_text_are_refused(model):
    with pytest.raises(InputError, match=r"<\|soi\|> in 'a <\|soi\|> b' is a special token of the model; leave it out"):
        model.encode_text("a <|soi|> b")


def test_text_that_is_no_unicode_is_refused(model):
    with pytest.raises(InputError, match=r"text: 'caf\\udce9 au lait' is not valid Unicode text; write it in UTF-8"):
        model.encode_text("caf\udce9 au lait")


def test_decoded_text_has_no_special_tokens(model):
    ids = [*model.encode_text(" hello there"), model.layout.eot, model.layout.soi, model.layout.mask_id]
    assert model.decode_text(ids) == "hello there"


def test_self_play_draws_in_the_checkpoints_dtype_and_trains_in_fp32(tmp_path):
    write_checkpoint(tmp_path / "showo", TINY, dtype=torch.bfloat16)
    settings = [
        f"model.name={tmp_path / 'showo'}", "run.name=run", f"run.folder={tmp_path}", "data.num_records=4",
        "curation.num_images=2", "curation.num_steps=2", "curation.threshold=0", "curation.margin=0",
        "curation.keep=any", "curation.caption_top_k=[4]", "train.num_steps=2", "train.pairs_per_step=2",
        "selfplay.num_rounds=2", "eval.num_prompts=2", "eval.num_understanding=2", "eval.num_steps=2",
    ]  # fmt: skip
    config = load_config(None, settings)
    run_selfplay(config)
    trained = load_file(tmp_path / "run" / "round-2" / "model" / "pytorch_model.safetensors")
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    assert {Run(config).model(number).engine.dtype for number in (0, 1, 2)} == {torch.bfloat16}
