"""LoRA adapters: what they start from, what they change, how they are saved, merged, loaded and sharded."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hermesflow import load_model
from hermesflow.config import TrainConfig
from hermesflow.engine.engine import Engine
from hermesflow.engine.transformer import Linear
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models.lora import Adapters, load_adapter
from hermesflow.runtime.checkpointing import load_state, save_state
from hermesflow.runtime.distributed import shard, unshard
from hermesflow.runtime.files import InputError

TREE = SpanTree.build([([2, 5, 6, 7], -1, "causal"), (list(range(50, 66)), 0, "full"), ([9, 8], 0, "causal")])
CONFIG = TrainConfig(lora_rank=3, lora_alpha=6.0)
KINDS = ["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied", "relu2-no-rotary"]


@pytest.fixture(params=KINDS)
def transformer(request, naive):
    return naive.tiny_model(request.param)


def outputs(transformer, grad=False):
    with torch.set_grad_enabled(grad):
        hidden = transformer(TREE)
        return hidden @ transformer.head.weight.t()


def train(transformer, steps=3, lr=0.05):
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    for _ in range(steps):
        transformer(TREE)[3:9].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def adapted(transformer, config=CONFIG, seed=0):
    adapters = Adapters(transformer, config, seed)
    train(transformer)
    return adapters


def test_new_ones_come_from_the_seed_alone(naive):
    def initial(seed):
        transformer = naive.tiny_model()
        before = torch.get_rng_state()
        Adapters(transformer, CONFIG, seed)
        assert torch.equal(torch.get_rng_state(), before)
        return {name: value.clone() for name, value in transformer.state_dict().items() if "lora_A" in name}

    torch.manual_seed(1)
    first = initial(7)
    torch.manual_seed(2)
    again, other = initial(7), initial(8)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_new_ones_change_nothing_and_off_is_the_base_model(transformer):
    base = outputs(transformer)
    adapters = Adapters(transformer, CONFIG, 0)
    assert torch.allclose(outputs(transformer), base, rtol=0, atol=1e-5)
    fresh = outputs(transformer)
    train(transformer)
    assert (outputs(transformer) - base).abs().max() > 0.01
    with adapters.off():
        assert torch.equal(outputs(transformer), fresh)
    assert (outputs(transformer) - base).abs().max() > 0.01


def test_off_is_the_base_model_to_the_last_bit(naive):
    """Where GELU is not of the "tanh" kind: that one is fused into a plain layer and rounds otherwise there."""
    transformer = naive.tiny_model()
    base = outputs(transformer)
    adapters = adapted(transformer)
    with adapters.off():
        assert torch.equal(outputs(transformer), base)


def test_only_adapters_are_trained(transformer):
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    adapted(transformer)
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_" not in name:
            assert torch.equal(parameter, before[name.replace(".base_layer", "")]), name
    assert sum("lora_A" in name for name, _ in transformer.named_parameters()) == 4 * len(transformer.blocks)


def test_the_engine_runs_through_them(naive):
    """The scores of an adapted model are those of the merged one, and not the base model's."""
    transformer = naive.tiny_model()

    def scores():
        engine = Engine(transformer, naive.LAYOUT)
        return torch.tensor(engine.score_choices(torch.arange(16)[None], [[[3, 4]]], [[[[5], [6, 7]]]]))

    base = scores()
    adapters = adapted(transformer)
    changed = scores()
    adapters.merge()
    assert (changed - base).abs().min() > 1e-3
    torch.testing.assert_close(scores(), changed, rtol=0, atol=1e-4)


def test_merged_is_the_adapted_model_and_a_plain_one(transformer):
    names = list(transformer.state_dict())
    adapters = adapted(transformer)
    expected = outputs(transformer)
    adapters.merge()
    torch.testing.assert_close(outputs(transformer), expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert list(transformer.state_dict()) == names
    assert all(type(getattr(block.mlp, name)) is Linear for block in transformer.blocks for name in ("up", "down"))
    assert all(parameter.requires_grad for parameter in transformer.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_ones_load_with_peft_and_without(naive, tmp_path, kind):
    import peft

    transformer = naive.tiny_model(kind)
    adapted(transformer).save(tmp_path / "adapter")
    expected = outputs(transformer)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.suffix != ".md") == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    by_peft = peft.PeftModel.from_pretrained(naive.tiny_model(kind), tmp_path / "adapter").base_model.model
    torch.testing.assert_close(outputs(by_peft), expected, rtol=0, atol=0)
    loaded = naive.tiny_model(kind)
    load_adapter(loaded, tmp_path / "adapter")
    torch.testing.assert_close(outputs(loaded), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_model_with_adapters_is_not_saved(tmp_path):
    model = load_model("tiny")
    adapters = Adapters(model.transformer, CONFIG, 0)
    with pytest.raises(InputError, match="still has adapters around its layers; merge them"):
        model.save(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    adapters.merge()
    model.save(tmp_path / "model")


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("qkv", "q_proj"), "train.lora_targets: no layer 'q_proj'; there are down, out, qkv, up"),
        (("head",), "no layer 'head'; there are down, out, qkv, up"),
        ((), "train.lora_targets: no layer ''; there are"),
    ],
    ids=["unknown", "head", "none"],
)
def test_wrong_targets(naive, targets, message):
    transformer = naive.tiny_model()
    with pytest.raises(InputError, match=message):
        Adapters(transformer, TrainConfig(lora_rank=2, lora_targets=targets), 0)
    assert not any("lora_" in name for name, _ in transformer.named_parameters())


def test_some_targets(naive):
    transformer = naive.tiny_model()
    Adapters(transformer, TrainConfig(lora_rank=2, lora_targets=("qkv",)), 0)
    names = [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]
    assert len(names) == 4 and all(".qkv.lora_" in name for name in names)


def test_without_peft(naive, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="peft is not installed; run: pip install peft"):
        Adapters(naive.tiny_model(), CONFIG, 0)


@pytest.fixture
def saved(naive, tmp_path):
    adapted(naive.tiny_model()).save(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


A, B = (f"base_model.model.blocks.0.attention.qkv.lora_{part}.weight" for part in "AB")
BAD = {
    "no folder": (lambda path: path.rename(path.parent / "elsewhere"), "adapter_config.json: .*[Nn]o such file"),
    "no weights": (lambda path: (path / "adapter_model.safetensors").unlink(), "model.safetensors: no such file"),
    "config cut": (lambda path: (path / "adapter_config.json").write_text('{"r": 3'), "damaged JSON file"),
    "config a list": (lambda path: (path / "adapter_config.json").write_text("[]"), "not the configuration of LoRA"),
    "another method": (lambda path: edit_config(path, peft_type="IA3"), "not the configuration of LoRA adapters"),
    "rank 0": (lambda path: edit_config(path, r=0), "r is 0, lora_alpha 6.0"),
    "alpha a word": (lambda path: edit_config(path, lora_alpha="much"), "lora_alpha 'much'"),
    "DoRA": (lambda path: edit_config(path, use_dora=True), "use_dora is True, only plain LoRA is read"),
    "biases": (lambda path: edit_config(path, bias="all"), "bias is 'all', only plain LoRA is read"),
    "another rank": (lambda path: edit_config(path, r=4), r"lora_A \[3, 32\] and lora_B \[32, 3\], expected \[4, 32\]"),
    "weights cut": (
        lambda path: (path / "adapter_model.safetensors").write_bytes(
            (path / "adapter_model.safetensors").read_bytes()[:-9]
        ),
        "not a readable safetensors file",
    ),
    "a part missing": (lambda path: edit_weights(path, lambda weights: weights.pop(B)), "no adapter of a layer"),
    "another layer": (
        lambda path: edit_weights(path, lambda weights: weights.update({A.replace("0", "9"): weights.pop(A)})),
        "'blocks.0.attention.qkv' is no adapter of a layer|'blocks.9.attention.qkv' is no adapter of a layer",
    ),
    "more than adapters": (lambda path: edit_weights(path, lambda weights: weights.update(x=torch.ones(1))), "''|more"),
    "nothing": (lambda path: edit_weights(path, lambda weights: weights.clear()), "holds no adapters"),
    "another shape": (
        lambda path: edit_weights(path, lambda weights: weights.update({A: torch.ones(3, 31)})),
        r"blocks.0.attention.qkv has lora_A \[3, 31\] and lora_B \[96, 3\], expected \[3, 32\] and \[96, 3\]",
    ),
    "NaN": (lambda path: edit_weights(path, lambda weights: weights[B].fill_(float("nan"))), "holds NaN, infinity"),
    "integers": (
        lambda path: edit_weights(path, lambda weights: weights.update({A: torch.ones(3, 32, dtype=torch.int64)})),
        "holds NaN, infinity or integers",
    ),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_loaded(naive, saved, bad):
    spoil, message = BAD[bad]
    spoil(saved)
    transformer = naive.tiny_model()
    with pytest.raises(InputError, match=message) as error:
        load_adapter(transformer, saved)
    assert "\n" not in str(error.value)
    for mine, theirs in zip(transformer.parameters(), naive.tiny_model().parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_nowhere_to_save(naive, no_folder):
    with pytest.raises(InputError, match="cannot be written"):
        adapted(naive.tiny_model()).save(no_folder)


def test_a_checkpoint_holds_the_adapters_alone(naive, tmp_path):
    """And resumes to the same weights, to the last bit."""
    transformer = naive.tiny_model()
    Adapters(transformer, CONFIG, 0)
    optimizer = train(transformer)
    save_state(tmp_path / "state", transformer, optimizer, {"step": 3})
    stored = sum(path.stat().st_size for path in (tmp_path / "state").glob("*.safetensors"))
    trained = sum(value.nbytes for value in transformer.parameters() if value.requires_grad)
    assert stored < 3.5 * trained + 20_000

    resumed = naive.tiny_model()
    Adapters(resumed, CONFIG, 5)
    parameters = [parameter for parameter in resumed.parameters() if parameter.requires_grad]
    other = torch.optim.AdamW(parameters, lr=0.05)
    assert load_state(tmp_path / "state", resumed, other) == {"step": 3}
    for part, step in ((transformer, optimizer), (resumed, other)):
        part(TREE)[3:9].square().sum().backward()
        step.step()
    assert torch.equal(outputs(transformer), outputs(resumed))


@pytest.mark.parametrize("first", ["on", "off"])
def test_sharded_ones_train_save_and_merge_as_whole_ones(tmp_path, first):
    """Whatever runs first, the reference without them too."""
    results = []
    for is_sharded in (False, True):
        model = load_model("tiny")
        base = model.transformer
        adapters = Adapters(base, CONFIG, 0)
        if is_sharded:
            shard(base, torch.float32)
        if first == "off":
            with adapters.off(), torch.no_grad():
                base(TREE)
        train(base)
        with adapters.off(), torch.no_grad():
            reference = base(TREE).clone()
        adapters.save(tmp_path / f"adapter-{is_sharded}")
        adapters.merge()
        if is_sharded:
            model.transformer = unshard(model.transformer)
        results.append((reference, outputs(model.transformer), model.transformer.state_dict()))
    (reference, merged, weights), (sharded_reference, sharded, sharded_weights) = results
    torch.testing.assert_close(sharded_reference, reference, rtol=0, atol=1e-5)
    torch.testing.assert_close(sharded, merged, rtol=0, atol=1e-3)
    assert list(weights) == list(sharded_weights)
    files = [load_file(tmp_path / f"adapter-{name}" / "adapter_model.safetensors") for name in (False, True)]
    assert files[0].keys() == files[1].keys() and len(files[0]) == 8 * len(base.blocks)
    for name, value in files[0].items():
        torch.testing.assert_close(files[1][name], value, rtol=0, atol=1e-4)
