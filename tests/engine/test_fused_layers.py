"""The layers by Triton's kernels: the results of the plain ones, in few launches that move few bytes.

Without a GPU, Triton's interpreter runs them in a process of its own, since Triton must know before its first import.
"""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hermesflow.engine import engine as engine_module
from hermesflow.engine import fused_layers
from hermesflow.engine.engine import Engine
from hermesflow.engine.shared_transformer import SharedTransformer
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels import checks
from hermesflow.kernels.span_tree import SpanTree

RUNS = checks.triton_missing() is None
needs_triton = pytest.mark.skipif(not RUNS, reason="runs in the process that test_by_the_interpreter starts")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.skipif(RUNS, reason="the kernels run in this process")
def test_by_the_interpreter():
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"PYTHONSAFEPATH": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-8000:] + done.stderr[-2000:]


def fused(transformer):
    transformer.to(DEVICE).fuse_layers()
    return transformer


KINDS = ["sequential", "parallel-gqa-partial-qknorm", "rmsnorm-gated-mqa-tied", "relu2-no-rotary"]
TEXT, IMAGE = [3, 4, 5], [50, 60, 70, 80, 90]


@needs_triton
@pytest.mark.parametrize("kind", [*KINDS, "headnorm"])
@torch.inference_mode()
def test_results_are_those_of_the_plain_layers(naive, monkeypatch, kind):
    """Prefix and leaves through a cache, without one, and for some rows alone, in any order."""
    headnorm = naive.MODELS["post-rmsnorm-headnorm"] | {"block": "sequential"}
    monkeypatch.setitem(naive.MODELS, "headnorm", headnorm)
    plain, ours = naive.tiny_model(kind).to(DEVICE), fused(naive.tiny_model(kind))
    prefix = SpanTree.build([(TEXT, -1, "causal"), (IMAGE, -1, "full")], DEVICE)
    leaves = prefix.extend([(IMAGE, 0, "full"), (IMAGE[::-1], 0, "full"), (TEXT, 1, "causal")])
    rows = torch.tensor([11, 3, 3, 0], device=DEVICE)
    results = []
    for transformer in (plain, ours):
        cache = transformer.new_cache(leaves.capacity + 3)
        found = [transformer(prefix), transformer(prefix, cache), transformer(leaves, cache)]
        found += [transformer(leaves, cache, rows=rows), transformer(leaves, cache, rows=rows[:0])]
        found += [cache.keys.flatten(1), cache.values.flatten(1)]
        results.append(found)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@needs_triton
@pytest.mark.parametrize("few", [512, 0], ids=["joined", "apart"])
@torch.inference_mode()
def test_weights_in_one_matmul_or_two(naive, monkeypatch, few):
    """A training step later, and after the weights have moved apart."""
    monkeypatch.setattr(fused_layers, "_FEW", few)
    plain, ours = (naive.tiny_model("parallel-gqa-partial-qknorm").to(DEVICE) for _ in range(2))
    parameters = list(ours.parameters())
    fused(ours)
    assert all(a is b for a, b in zip(parameters, ours.parameters(), strict=True))
    tree = SpanTree.build([(TEXT, -1, "causal")], DEVICE)
    for change in (
        lambda weight: None,
        lambda weight: weight.mul_(0.5),
        lambda weight: setattr(weight, "data", weight.data * 2),
    ):
        for transformer in (plain, ours):
            change(transformer.blocks[0].mlp.up.weight)
        torch.testing.assert_close(ours(tree), plain(tree), rtol=2e-5, atol=2e-5)


@needs_triton
@torch.inference_mode()
def test_half_precision_errs_no_more_than_plain_layers(naive):
    kind = "parallel-gqa-partial-qknorm"
    tree = SpanTree.build([(IMAGE, -1, "full")], DEVICE)
    truth = naive.tiny_model(kind).to(DEVICE, torch.float16).double()(tree)
    plain, ours = (naive.tiny_model(kind).to(DEVICE, torch.float16) for _ in range(2))
    fused(ours)
    error, budget = ((model(tree).double() - truth).abs().max() for model in (ours, plain))
    assert error < 2 * budget


class Launches(TorchDispatchMode):
    """(name, bytes read and written) of each kernel that is launched under it; a view launches none."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = tensors((args, kwargs)), tensors(result)
        new = {x.untyped_storage().data_ptr() for x in made} - {x.untyped_storage().data_ptr() for x in given}
        if (func._schema.is_mutable or new) and "empty" not in func.name():
            self.add(func.name(), [*given, *made])
        return result

    def add(self, name, arguments):
        self.calls.append((name, sum({x.data_ptr(): x.nbytes for x in arguments}.values())))


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.fixture
def launches(monkeypatch):
    """launches(settings, takes_fused, decodes): of one layer in a pass of 16 tokens, or of 16 leaves of one."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    launch, seen = interpreter.GridExecutor.__call__, Launches()

    def counted(self, *args, **kwargs):
        seen.add(self.fn.__name__, tensors(args))
        with torch._C._DisableTorchDispatch():
            return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def of_pass(settings, takes_fused, decodes, num_layers):
        sizes = {"vocab_size": 50, "hidden_size": 64, "num_heads": 2, "num_kv_heads": 2, "mlp_size": 256}
        transformer = Transformer(TransformerConfig(**sizes, num_layers=num_layers, **settings))
        transformer.init_weights(torch.Generator().manual_seed(0))
        if takes_fused:
            transformer.fuse_layers()
        tree = SpanTree.build([([1] * 16, -1, "full")])
        if decodes:
            tree = SpanTree.build([([1] * 200, -1, "causal")]).extend([([2], 0, "causal")] * 16)
        cache = transformer.new_cache(tree.capacity)
        transformer(tree, cache)  # what is planned once
        seen.calls = []
        with seen:
            transformer(tree, cache)
        return list(seen.calls)

    def of_layer(settings, *, takes_fused=True, decodes=False):
        fewer, calls = (of_pass(settings, takes_fused, decodes, num_layers) for num_layers in (2, 3))
        for call in fewer:
            if call in calls:
                calls.remove(call)
        # The sums of all biases are made once, before the first layer.
        return [call for call in calls if call[0] not in ("aten::stack", "aten::cumsum")]

    return of_layer


def bytes_between_matmuls(calls):
    return sum(size for name, size in calls if not any(word in name for word in ("mm", "linear", "_forward_kernel")))


SHOWO = {"block": "parallel", "activation": "gelu_tanh", "qk_norm": True, "rotary_fraction": 0.5}
LLAMA = {"norm": "rmsnorm", "activation": "silu", "gated": True, "bias": False}


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
@pytest.mark.parametrize(
    ("settings", "few", "decodes", "most"),
    [(SHOWO, 512, True, 7), (SHOWO, 512, False, 6), (SHOWO, 0, False, 7), (LLAMA, 512, True, 10), (LLAMA, 0, False, 9)],
    ids=["Show-o decoding", "Show-o, few tokens", "Show-o", "Llama decoding", "Llama"],
)
@torch.inference_mode()
def test_launches_of_a_layer(launches, monkeypatch, settings, few, decodes, most):
    """Decoding shares out the keys, and merging the shares is a launch."""
    monkeypatch.setattr(fused_layers, "_FEW", few)
    calls = launches(settings, decodes=decodes)
    assert len(calls) == most and decodes == any(name == "_merge_kernel" for name, _ in calls), calls
    assert not any("copy" in name or "aten::add." in name for name, _ in calls)


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda", reason="counts the interpreter's launches")
@pytest.mark.parametrize(("settings", "share"), [(SHOWO, 0.33), (LLAMA, 0.45)], ids=["Show-o", "Llama"])
@torch.inference_mode()
def test_bytes_of_a_layer_between_matmuls(launches, monkeypatch, settings, share):
    """Against the plain layers, op by op; those of Show-o are 36 KB here, of 116."""
    monkeypatch.setattr(fused_layers, "_FEW", 0)
    ours, plain = (bytes_between_matmuls(launches(settings, takes_fused=fused)) for fused in (True, False))
    assert ours < share * plain


@needs_triton
@torch.inference_mode()
def test_layers_of_another_model(naive):
    """Queries, keys and values are layers of their own; autocast and foreign norms leave the plain way."""
    plain = naive.tiny_model("parallel-gqa-partial-qknorm").to(DEVICE)
    shared = SharedTransformer(plain.config, modules_of(plain))
    tree = SpanTree.build([(TEXT, -1, "causal"), (IMAGE, 0, "full")], DEVICE)
    expected = plain(tree)
    shared.fuse_layers()
    assert shared._takes_fused()
    torch.testing.assert_close(shared(tree), expected, rtol=2e-5, atol=2e-5)
    with torch.autocast(DEVICE, dtype=torch.bfloat16), shared.precision.of_caller(torch.device(DEVICE)):
        assert not shared._takes_fused()
    shared.has_torch_norms = False
    assert not shared._takes_fused()


def modules_of(plain):
    """name -> modules, those of attention.qkv split into three layers."""
    modules = {"embed": [plain.embed], "norm": [plain.norm], "head": [plain.head]}
    config = plain.config
    widths = [count * config.head_dim for count in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    for index, block in enumerate(plain.blocks):
        for name, module in block.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                modules[f"blocks.{index}.{name}"] = [as_plain(module)] if isinstance(module, nn.Linear) else [module]
        qkv = block.attention.qkv
        parts = zip(qkv.weight.split(widths), qkv.bias.split(widths), strict=True)
        modules[f"blocks.{index}.attention.qkv"] = [layer_of(*part) for part in parts]
    return modules


def as_plain(layer):
    return layer_of(layer.weight, layer.bias)


def layer_of(weight, bias):
    layer = nn.Linear(*reversed(weight.shape), device=weight.device)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    return layer


@pytest.mark.parametrize(
    ("device", "missing", "expected"),
    [("cuda", None, True), ("cuda", "triton is not installed", False), ("cpu", None, False)],
    ids=["cuda", "cuda without Triton", "cpu"],
)
def test_engine_fuses_on_cuda(naive, monkeypatch, device, missing, expected):
    monkeypatch.setattr(Engine, "device", torch.device(device))
    monkeypatch.setattr(engine_module, "triton_missing", lambda: missing)
    assert Engine(naive.tiny_model(), naive.LAYOUT).transformer._is_fused == expected


def test_gradients_and_float64_take_the_plain_layers(naive):
    for transformer, mode in (
        (naive.tiny_model(), torch.no_grad()),
        (naive.tiny_model().double(), torch.inference_mode()),
    ):
        transformer.fuse_layers()
        with mode:
            assert not transformer._takes_fused()


def test_joined_weights_are_saved_and_trained_as_ever(naive, tmp_path):
    plain, ours = (naive.tiny_model("parallel-gqa-partial-qknorm") for _ in range(2))
    ours.fuse_layers()
    assert fused_layers._joined(ours.blocks[0]) is not None and fused_layers._joined(plain.blocks[0]) is None
    save_file(ours.state_dict(), tmp_path / "weights.safetensors")
    loaded = load_file(tmp_path / "weights.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in plain.state_dict().items())
    tree = SpanTree.build([(TEXT, -1, "causal")])
    for transformer in (plain, ours):
        optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-2)
        transformer(tree).square().sum().backward()
        optimizer.step()
    for mine, truth in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, truth)
    assert fused_layers._joined(ours.blocks[0]) is not None
