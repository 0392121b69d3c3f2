"""Malformed input of every kind ends in one line that names it and the fix, or in a rejected record.

While a public function reads what a table below damaged, no process starts, no connection opens, no file is written, no
time or memory to speak of is spent, and no code of the input runs.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import pickle
import runpy
import shutil
import socket
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPVisionConfig, CLIPVisionModel
from watch import check_line, check_rejected, listing, nothing_happens

from hermesflow import cli, tasks
from hermesflow.benchmarks.random_checkpoint import TINY, write_checkpoint
from hermesflow.config import load_config
from hermesflow.data.pairs import PAIRS_SCHEMA, read_pairs
from hermesflow.data.published_pairs import read_published_pairs
from hermesflow.data.records import RecordFile, records_to_table
from hermesflow.data.sources import encode_records, read_source
from hermesflow.models import load_model
from hermesflow.models.images import MAX_PIXELS, read_image
from hermesflow.models.magvit import load_vq_tokenizer
from hermesflow.models.vision import load_clip_encoder
from hermesflow.runtime.files import InputError, read_json

HUGE = 2**62


@pytest.mark.parametrize(
    "act",
    [
        lambda folder: os.system("true"),
        lambda folder: (folder / "new").touch(),
        lambda folder: (folder / "new").mkdir(),
        lambda folder: open(folder / "new", "ab").close(),
        lambda folder: socket.create_connection(("127.0.0.1", 9)),
    ],
    ids=["process", "file", "folder", "appended", "connection"],
)
def test_the_watch_sees(act, tmp_path):
    with pytest.raises(AssertionError), nothing_happens(), contextlib.suppress(OSError):
        act(tmp_path)


def check_refused(call, *names):
    """The call ends in an InputError of one line with one of the names and a fix."""
    with nothing_happens(), pytest.raises(InputError) as caught:
        call()
    check_line(str(caught.value), *names)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


VISION = CLIPVisionConfig(
    hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8
)


def clip_projector():
    return nn.Sequential(nn.Linear(24, 20), nn.GELU(), nn.Linear(20, 32)).requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small checkpoint with everything beside it, opened once, so that what is imported late is imported."""
    folder = tmp_path_factory.mktemp("checkpoint") / "showo"
    write_checkpoint(folder, TINY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPVisionModel(VISION).save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPImageProcessorPil(**size).save_pretrained(folder / "clip")
    load_model(str(folder)).vq_tokenizer  # noqa: B018
    load_clip_encoder(folder / "clip", clip_projector())
    return folder


@pytest.fixture
def folder(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "showo")


@pytest.fixture
def own_folder(shared_tiny_model, tmp_path):
    """A folder that Model.save wrote."""
    shared_tiny_model.save(tmp_path / "own")
    return tmp_path / "own"


OPENERS = {
    "": lambda folder: load_model(str(folder)),
    "magvitv2": lambda folder: load_vq_tokenizer(str(folder / "magvitv2")),
    "clip": lambda folder: load_clip_encoder(folder / "clip", clip_projector()),
}
WEIGHTS = {
    "": "pytorch_model.safetensors", "magvitv2": "pytorch_model.safetensors", "clip": "model.safetensors",
}  # fmt: skip


def check_checkpoint_refused(folder, part, *names):
    before = listing(folder)
    check_refused(lambda: OPENERS[part](folder), *(names or (str(folder / part),)))
    assert listing(folder) == before


JSON_TEXTS = {
    "empty": lambda text: b"",
    "cut": lambda text: text.encode()[: len(text) // 2],
    "UTF-16": lambda text: text.encode("utf-16"),
    "Latin-1": lambda text: text.encode()[:-2] + b', "x": "\xe9"}',
    "null bytes": lambda text: b"\0" * 100,
    "null": lambda text: b"null",
    "list": lambda text: b"[" + text.encode() + b"]",
    "text": lambda text: b'"config"',
    "number": lambda text: b"7",
    "empty object": lambda text: b"{}",
    "deep": lambda text: b'{"a":' * 200_000,
    "deep list": lambda text: b"[" * 200_000,
    "10 MB of spaces": lambda text: b" " * 10_000_000,
    "number of 5000 digits": lambda text: text.encode().rstrip()[:-1] + b', "x": ' + b"9" * 5000 + b"}",
    "HTML": lambda text: b"<!DOCTYPE html><html><body>404</body></html>",
    "Git LFS pointer": lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 300\n",
    "Python": lambda text: b"__import__('os').system('touch ran')",
}
JSON_FILES = {"config.json": "", "llm/config.json": "", "magvitv2/config.json": "magvitv2"}


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("damage", JSON_TEXTS.values(), ids=JSON_TEXTS.keys())
def test_json_that_is_no_configuration(damage, name, folder):
    path = folder / name
    path.write_bytes(damage(path.read_text()))
    check_checkpoint_refused(folder, JSON_FILES[name])


VALUES = {
    "missing": ..., "null": None, "text": "many", "negative": -1, "zero": 0, "huge": HUGE, "1e30": 10**30, "list": [1],
    "object": {"a": 1}, "NaN": float("nan"), "infinity": float("inf"), "long text": "x" * 10_000_000,
    "odd text": "a\n\0\x1b[2J\ud800", "upwards": "../../../..", "device": "/dev/zero",
}  # fmt: skip
NUMBERS = ["missing", "null", "text", "negative", "zero", "huge", "1e30", "list", "object", "NaN", "infinity"]
TEXTS = ["missing", "null", "zero", "list", "object", "NaN", "long text", "odd text", "upwards", "device"]
FIELDS = {
    "config.json": {
        "_class_name": [*TEXTS[1:], "text"], "vocab_size": NUMBERS, "llm_vocab_size": NUMBERS,
        "codebook_size": NUMBERS, "num_vq_tokens": NUMBERS, "llm_model_path": ["missing", "null", "zero", "list"],
        "w_clip_vit": ["missing", "null", "text", "zero", "list"],
    },
    "llm/config.json": {
        "model_type": TEXTS, "hidden_size": NUMBERS, "num_hidden_layers": NUMBERS, "num_attention_heads": NUMBERS,
        "num_key_value_heads": ["text", "negative", "huge", "list", "NaN"], "intermediate_size": NUMBERS,
        "hidden_act": TEXTS, "layer_norm_eps": NUMBERS[:4] + NUMBERS[7:], "rope_theta": NUMBERS[:5] + NUMBERS[7:],
        "partial_rotary_factor": NUMBERS[:4] + NUMBERS[5:],
    },
    "magvitv2/config.json": {
        "_class_name": ["missing", "null", "text", "list", "odd text"],
        **dict.fromkeys(("code_bits", "channels", "num_groups", "patch_size"), NUMBERS[1:]),
        **dict.fromkeys(("channel_multipliers", "num_res_blocks"), NUMBERS[1:]),
    },
    "clip/config.json": {
        name: ["text", "negative", "zero", "huge", "list", "NaN"]
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
                     "intermediate_size")
    },
    "clip/preprocessor_config.json": {
        "crop_size": ["text", "negative", "zero", "huge", "list", "NaN"],
        "size": ["text", "negative", "zero", "huge", "list", "NaN"],
        "image_mean": ["text", "list", "NaN"], "image_std": ["text", "zero", "list", "NaN"],
        "rescale_factor": ["text", "NaN"],
    },
}  # fmt: skip
FIELD_CASES = [(file, key, of) for file, keys in FIELDS.items() for key, kinds in keys.items() for of in kinds]


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("file", "key", "of"), FIELD_CASES, ids=[":".join(case) for case in FIELD_CASES])
def test_a_wrong_value_in_a_configuration(file, key, of, folder):
    path = folder / file
    values = json.loads(path.read_text())
    values.pop(key, None)
    path.write_text(json.dumps(values if of == "missing" else values | {key: VALUES[of]}))
    part = file.rpartition("/")[0]
    check_checkpoint_refused(folder, "" if part == "llm" else part)


def split(data):
    """(header, bytes of the tensors) of a safetensors file."""
    end = 8 + struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8:end]), data[end:]


def joined(header, rest, length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + rest


def tensor_names(header):
    """Those that are needed: the tokenizer's code book is constant."""
    return [name for name in sorted(header) if name != "__metadata__" and not name.startswith("quantize")]


def with_entry(change):
    """Changes the header's entry of the first tensor."""

    def damage(data):
        header, rest = split(data)
        name = tensor_names(header)[0]
        header[name] = change(dict(header[name]))
        return joined(header, rest)

    return damage


def with_header(change):
    def damage(data):
        header, rest = split(data)
        return joined(change(header), rest)

    return damage


def overlapping(header):
    first, second = tensor_names(header)[:2]
    return header | {second: header[first]}


SAFETENSORS = {
    "empty": lambda data: b"",
    "7 bytes": lambda data: data[:7],
    "length alone": lambda data: data[:8],
    "cut in the header": lambda data: data[:300],
    "header alone": lambda data: joined(split(data)[0], b""),
    "cut in half": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "header of no bytes": lambda data: joined(b"", b""),
    "header of 2**63 bytes": lambda data: joined(*split(data), 2**63),
    "header of 2**64 - 1 bytes": lambda data: joined(*split(data), 2**64 - 1),
    "header beyond the file": lambda data: joined(*split(data), len(data)),
    "header of 99 MB": lambda data: joined(*split(data), 99_000_000),
    "header no JSON": lambda data: joined(b"{" * 64, b""),
    "header no UTF-8": lambda data: joined(b'{"\xff\xfe": 1}', b""),
    "header a list": lambda data: joined(b"[]", b""),
    "header deep": lambda data: joined(b'{"a":' * 10_000, b""),
    "header without tensors": lambda data: joined(b"{}", b""),
    "metadata a number": with_header(lambda header: header | {"__metadata__": 7}),
    "entry a list": with_entry(lambda entry: []),
    "entry null": with_entry(lambda entry: None),
    "no dtype": with_entry(lambda entry: {key: entry[key] for key in ("shape", "data_offsets")}),
    "unknown dtype": with_entry(lambda entry: entry | {"dtype": "F31"}),
    "dtype a number": with_entry(lambda entry: entry | {"dtype": 32}),
    "dtype of other size": with_entry(lambda entry: entry | {"dtype": "F64"}),
    "dtype I32": with_entry(lambda entry: entry | {"dtype": "I32"}),
    "negative offsets": with_entry(lambda entry: entry | {"data_offsets": [-4, 0]}),
    "reversed offsets": with_entry(lambda entry: entry | {"data_offsets": entry["data_offsets"][::-1]}),
    "offsets beyond the file": with_entry(lambda entry: entry | {"data_offsets": [2**40, 2**40 + 4]}),
    "huge offsets": with_entry(lambda entry: entry | {"data_offsets": [0, 2**64 - 1]}),
    "offsets over 64 bits": with_entry(lambda entry: entry | {"data_offsets": [0, 2**70]}),
    "three offsets": with_entry(lambda entry: entry | {"data_offsets": [0, 1, 2]}),
    "overlapping": with_header(overlapping),
    "negative shape": with_entry(lambda entry: entry | {"shape": [-1]}),
    "shape that overflows": with_entry(lambda entry: entry | {"shape": [2**32, 2**32, 2**32]}),
    "huge shape": with_entry(lambda entry: entry | {"shape": [2**40]}),
    "other shape": with_entry(lambda entry: entry | {"shape": [1, *entry["shape"]]}),
    "shape of fractions": with_entry(lambda entry: entry | {"shape": [1.5]}),
    "no size": with_entry(lambda entry: entry | {"shape": [0], "data_offsets": [0, 0]}),
    "name with control characters": with_header(
        lambda header: {f"\n\x1b[2J\0{name}": of for name, of in header.items()}
    ),
    "endless name": with_header(lambda header: {name * 20_000: of for name, of in header.items()}),
    "twice the same name": with_header(
        lambda header: json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:]
    ),
}


@pytest.mark.parametrize("part", WEIGHTS, ids=lambda part: part or "backbone")
@pytest.mark.parametrize("damage", SAFETENSORS.values(), ids=SAFETENSORS.keys())
def test_damaged_safetensors(damage, part, folder):
    path = folder / part / WEIGHTS[part]
    path.write_bytes(damage(path.read_bytes()))
    check_checkpoint_refused(folder, part)


def first_of(state):
    return next(name for name in tensor_names(state) if state[name].dim() >= 2)


def with_value(value):
    def damage(state):
        state[first_of(state)].view(-1)[5] = value

    return damage


def with_tensor(change):
    def damage(state):
        state[first_of(state)] = change(state[first_of(state)])

    return damage


def removed(state):
    del state[first_of(state)]


def with_all(change):
    return lambda state: state.update({name: change(tensor) for name, tensor in state.items()})


STATES = {
    "NaN": with_value(float("nan")),
    "infinity": with_value(float("inf")),
    "minus infinity": with_value(float("-inf")),
    "one missing": removed,
    "all missing": dict.clear,
    "transposed": with_tensor(lambda tensor: tensor.transpose(0, 1).reshape(-1)),
    "scalar": with_tensor(lambda tensor: torch.ones(())),
    "empty tensor": with_tensor(lambda tensor: torch.ones(0)),
    "int64": with_tensor(torch.Tensor.long),
    "bool": with_tensor(torch.Tensor.bool),
    "complex": with_tensor(lambda tensor: tensor.to(torch.complex64)),
    "fp8": with_all(lambda tensor: tensor.to(torch.float8_e4m3fn)),
    "one in fp8": with_tensor(lambda tensor: tensor.to(torch.float8_e5m2)),
    "all uint8": with_all(lambda tensor: tensor.to(torch.uint8)),
}


@pytest.mark.parametrize("part", WEIGHTS, ids=lambda part: part or "backbone")
@pytest.mark.parametrize("damage", STATES.values(), ids=STATES.keys())
def test_tensors_that_are_no_weights(damage, part, folder):
    path = folder / part / WEIGHTS[part]
    state = load_file(path)
    damage(state)
    save_file(state, path, metadata={"format": "pt"})
    check_checkpoint_refused(folder, part)


@pytest.mark.parametrize(
    ("value", "dtype", "fits"),
    [
        (1e30, torch.float16, False),
        (-7e4, torch.float16, False),
        (1e30, torch.bfloat16, True),
        (3e38, None, True),
        (1e-45, torch.float16, True),
        (1e-45, None, True),
        (3.4e38, torch.bfloat16, False),
    ],
    ids=str,
)
def test_values_at_the_edge_of_a_dtype(value, dtype, fits, folder):
    path = folder / WEIGHTS[""]
    state = load_file(path)
    with_value(value)(state)
    save_file(state, path)
    if fits:
        with nothing_happens():
            load_model(str(folder), dtype=dtype)
    else:
        check_refused(lambda: load_model(str(folder), dtype=dtype), "holds NaN or infinity")


def test_weights_that_overflow_are_told_of_in_one_line(own_folder, tmp_path, capsys):
    """Each is finite; what the model computes with them is not."""
    state = load_file(own_folder / "model.safetensors")
    save_file({name: torch.full_like(tensor, 1e38) for name, tensor in state.items()}, own_folder / "model.safetensors")
    picture().save(tmp_path / "mine.png")
    assert cli.main(["caption", str(tmp_path / "mine.png"), "--model", str(own_folder)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "no distribution (NaN)" in line and "check both for huge values" in line


class Call:
    """Unpickled by the usual pickle it would call the function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def calls(canary):
    touch = f"touch {canary}"
    write = f"open({str(canary)!r}, 'w').close()"
    inner = io.BytesIO()
    torch.save(Call(exec, write), inner)
    return {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(canary)]),
        "subprocess.getoutput": Call(subprocess.getoutput, touch),
        "exec": Call(exec, write),
        "eval": Call(eval, write),
        "compile": Call(compile, write, "x", "exec"),
        "__import__": Call(__import__, "os"),
        "getattr": Call(getattr, object, "__subclasses__"),
        "open": Call(open, str(canary), "w"),
        "shutil.rmtree": Call(shutil.rmtree, str(canary.parent / "showo")),
        "importlib.import_module": Call(importlib.import_module, "antigravity"),
        "runpy.run_path": Call(runpy.run_path, str(canary.parent / "evil.py")),
        "pickle.loads": Call(pickle.loads, pickle.dumps(Call(exec, write))),
        "torch.load": Call(torch.load, str(canary.parent / "other.bin")),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, inner.getvalue()),
        "torch.hub.load": Call(torch.hub.load, str(canary.parent), "evil"),
        "ctypes.CDLL": Call(ctypes.CDLL, str(canary.parent / "evil.so")),
        "numpy.load": Call(np.load, str(canary.parent / "evil.npy")),
        "bytearray of a terabyte": Call(bytearray, 2**40),
    }


CALLS = list(calls(Path("x")))


@pytest.mark.parametrize("part", WEIGHTS, ids=lambda part: part or "backbone")
@pytest.mark.parametrize("name", CALLS)
def test_pickled_calls_do_not_run(name, part, folder, tmp_path):
    (folder / part / WEIGHTS[part]).unlink()
    torch.save({"showo.lm_head.bias": calls(tmp_path / "ran")[name]}, folder / part / "pytorch_model.bin")
    check_checkpoint_refused(folder, part)
    assert not (tmp_path / "ran").exists()


def saved_bin(value, **options):
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def rezipped(data, change, compression=zipfile.ZIP_STORED):
    """The archive with change(name, bytes) of each entry; None leaves it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for info in old.infolist():
            entry = change(info.filename, old.read(info))
            if entry is not None:
                new.writestr(info.filename, entry)
    return buffer.getvalue()


def replaced(ending, entry):
    return lambda name, data: entry if name.endswith(ending) else data


def with_bin(change):
    """Changes the state dict."""

    def damage(state, call):
        changed = change(state, call)
        return saved_bin(state if changed is None else changed)

    return damage


def quantized(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


class Subclass(torch.Tensor):
    pass


BINS = {
    "empty": lambda state, call: b"",
    "text": lambda state, call: b"no weights",
    "zip signature alone": lambda state, call: b"PK\x03\x04",
    "cut in half": lambda state, call: saved_bin(state)[: len(saved_bin(state)) // 2],
    "cut at its end": lambda state, call: saved_bin(state)[:-30],
    "empty zip": lambda state, call: b"PK\x05\x06" + bytes(18),
    "zip of others": lambda state, call: rezipped(saved_bin(state), lambda name, data: b"x"),
    "no data.pkl": lambda state, call: rezipped(saved_bin(state), replaced("data.pkl", None)),
    "endless name": lambda state, call: rezipped(
        saved_bin(state), replaced("data.pkl", b"\x80\x02c" + b"x" * 500_000 + b"\ny\n.")
    ),
    "empty data.pkl": lambda state, call: rezipped(saved_bin(state), replaced("data.pkl", b"")),
    "deep data.pkl": lambda state, call: rezipped(saved_bin(state), replaced("data.pkl", b"\x80\x02" + b"(" * 10**5)),
    "no data": lambda state, call: rezipped(saved_bin(state), replaced("data/0", None)),
    "shorter data": lambda state, call: rezipped(saved_bin(state), replaced("data/0", b"xx")),
    "unknown byte order": lambda state, call: rezipped(saved_bin(state), replaced("byteorder", b"middle")),
    "compressed": lambda state, call: rezipped(saved_bin(state), lambda name, data: data, zipfile.ZIP_DEFLATED),
    "bomb": lambda state, call: rezipped(saved_bin(state), replaced("data.pkl", bytes(64 << 20)), zipfile.ZIP_DEFLATED),
    "TorchScript": lambda state, call: saved_bin(state).replace(b"data.pkl", b"code.pkl"),
    "legacy pickle": lambda state, call: saved_bin(state | {"x": call}, _use_new_zipfile_serialization=False),
    "bare pickle": lambda state, call: pickle.dumps(call),
    "bare pickle, protocol 0": lambda state, call: pickle.dumps(call, 0),
    "safetensors inside": lambda state, call: b"\x08\0\0\0\0\0\0\0{}      ",
    "code as a name": with_bin(lambda state, call: {call: torch.ones(1)}),
    "code for all": with_bin(lambda state, call: call),
    "code in a list": with_bin(lambda state, call: state | {"x": [torch.ones(1), {"y": call}]}),
    "code as state": with_bin(lambda state, call: state | {"x": nn.Parameter(torch.ones(1)), "y": (call, call)}),
    "module": with_bin(lambda state, call: nn.Linear(2, 2)),
    "nested in state_dict": with_bin(lambda state, call: {"state_dict": state}),
    "nested in model": with_bin(lambda state, call: {"model": state, "epoch": 3}),
    "list": with_bin(lambda state, call: list(state.values())),
    "tensor": with_bin(lambda state, call: torch.ones(3)),
    "None": with_bin(lambda state, call: {"none": None}),
    "numbered": with_bin(lambda state, call: dict(enumerate(state.values()))),
    "names in bytes": with_bin(lambda state, call: {name.encode(): tensor for name, tensor in state.items()}),
    "odd name": with_bin(lambda state, call: state | {"\n\x1b[2J\ud800": torch.ones(1)}),
    "sparse": with_bin(lambda state, call: with_tensor(lambda tensor: tensor.to_sparse())(state)),
    "quantized": with_bin(lambda state, call: with_tensor(quantized)(state)),
    "meta": with_bin(lambda state, call: with_tensor(lambda tensor: tensor.to("meta"))(state)),
    "subclass": with_bin(lambda state, call: with_tensor(lambda tensor: tensor.as_subclass(Subclass))(state)),
    "expanded to a terabyte": with_bin(lambda state, call: state | {"x": torch.ones(1).expand(2**38)}),
    "numpy": with_bin(lambda state, call: with_tensor(lambda tensor: tensor.float().numpy())(state)),
    "set": with_bin(lambda state, call: set(state)),
}


NOT_NEEDED = ("odd name", "expanded to a terabyte")  # CLIP's files hold other tensors besides
BIN_CASES = [(name, part) for name in BINS for part in WEIGHTS if not (part == "clip" and name in NOT_NEEDED)]


@pytest.mark.parametrize(("name", "part"), BIN_CASES, ids=[f"{name}-{part or 'backbone'}" for name, part in BIN_CASES])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_bin_that_is_no_state_dict(name, part, folder, tmp_path):
    path = folder / part / WEIGHTS[part]
    data = BINS[name](load_file(path), Call(exec, f"open({str(tmp_path / 'ran')!r}, 'w').close()"))
    path.unlink()
    (folder / part / "pytorch_model.bin").write_bytes(data)
    check_checkpoint_refused(folder, part)
    assert not (tmp_path / "ran").exists()


def changed_map(**changes):
    return lambda values: values | {"weight_map": values["weight_map"] | changes}


def all_in(shard):
    return lambda values: values | {"weight_map": dict.fromkeys(values["weight_map"], shard)}


BIAS = "showo.lm_head.bias"
INDICES = {
    "null": lambda values: None,
    "list": lambda values: [values],
    "no map": lambda values: {"metadata": {}},
    "map a list": lambda values: {"weight_map": list(values["weight_map"])},
    "map a text": lambda values: {"weight_map": "pytorch_model.bin"},
    "empty map": lambda values: {"weight_map": {}},
    "upwards": changed_map(**{BIAS: "../../../../etc/passwd"}),
    "absolute": changed_map(**{BIAS: "/etc/passwd"}),
    "device": changed_map(**{BIAS: "/dev/zero"}),
    "folder": changed_map(**{BIAS: "llm"}),
    "dot": changed_map(**{BIAS: "."}),
    "home": changed_map(**{BIAS: "~/weights.bin"}),
    "null byte": changed_map(**{BIAS: "weights\0.bin"}),
    "long name": changed_map(**{BIAS: "w" * 5000}),
    "number": changed_map(**{BIAS: 3}),
    "null name": changed_map(**{BIAS: None}),
    "list of names": changed_map(**{BIAS: ["a", "b"]}),
    "missing shard": changed_map(**{BIAS: "pytorch_model-00009-of-00003.bin"}),
    "the index itself": changed_map(**{BIAS: "diffusion_pytorch_model.bin.index.json"}),
    "code": changed_map(**{BIAS: "evil.py"}),
    "one shard alone": all_in("pytorch_model-00001-of-00003.bin"),
    "odd name": changed_map(**{BIAS: "a\n\x1b[2Jb"}),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "showo"
    write_checkpoint(folder, TINY, weights="sharded-bin")
    return folder


@pytest.fixture
def sharded_folder(sharded, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    return shutil.copytree(sharded, tmp_path / "showo")


@pytest.mark.parametrize("change", INDICES.values(), ids=INDICES.keys())
def test_a_wrong_index_of_shards(change, sharded_folder, tmp_path):
    path = sharded_folder / "diffusion_pytorch_model.bin.index.json"
    (sharded_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    check_checkpoint_refused(sharded_folder, "")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("damage", JSON_TEXTS.values(), ids=JSON_TEXTS.keys())
def test_an_index_that_is_no_index(damage, sharded_folder):
    path = sharded_folder / "diffusion_pytorch_model.bin.index.json"
    path.write_bytes(damage(path.read_text()))
    check_checkpoint_refused(sharded_folder, "")


def with_vocabulary(change):
    def damage(values):
        change(values["model"]["vocab"])

    return damage


def with_model(**changes):
    return lambda values: values["model"].update(changes)


def with_top(**changes):
    return lambda values: values.update(changes)


def with_token(**changes):
    return lambda values: values["added_tokens"][0].update(changes)


TOKENIZERS = {
    "no model": lambda values: values.pop("model"),
    "model null": with_top(model=None),
    "unknown model": with_model(type="Evil"),
    "model of words": with_top(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}),
    "empty vocabulary": with_model(vocab={}),
    "vocabulary a list": with_model(vocab=[]),
    "vocabulary of texts": with_model(vocab={"a": "b"}),
    "negative id": with_vocabulary(lambda vocabulary: vocabulary.update(a=-1)),
    "huge id": with_vocabulary(lambda vocabulary: vocabulary.update(a=2**31)),
    "id over 32 bits": with_vocabulary(lambda vocabulary: vocabulary.update(a=2**40)),
    "id of a special token": with_vocabulary(lambda vocabulary: vocabulary.update(a=305)),
    "gap": with_vocabulary(lambda vocabulary: vocabulary.update(a=5000)),
    "one less": with_vocabulary(lambda vocabulary: vocabulary.pop("a")),
    "one more": with_vocabulary(lambda vocabulary: vocabulary.update(more=300)),
    "merges of nothing": with_model(merges=[["x", "yy"]]),
    "merges a number": with_model(merges=3),
    "unknown pre-tokenizer": with_top(pre_tokenizer={"type": "Evil"}),
    "bad expression": with_top(pre_tokenizer={"type": "Split", "pattern": {"Regex": "(" * 50}, "behavior": "Removed"}),
    "added tokens null": with_top(added_tokens=None),
    "added token without id": lambda values: values["added_tokens"][0].pop("id"),
    "added token of huge id": with_token(id=2**32),
    "many added tokens": lambda values: values["added_tokens"].extend(
        {**values["added_tokens"][0], "id": 300 + number, "content": f"<{number}>"} for number in range(20)
    ),
    "special tokens taken": with_vocabulary(lambda vocabulary: vocabulary.update({"<|soi|>": vocabulary.pop("a")})),
    "unknown version": with_top(version="9.9"),
}


@pytest.mark.parametrize("change", TOKENIZERS.values(), ids=TOKENIZERS.keys())
def test_a_wrong_tokenizer(change, folder):
    path = folder / "llm" / "tokenizer.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    check_checkpoint_refused(folder, "")


TOKENIZER_TEXTS = [name for name in JSON_TEXTS if name != "number of 5000 digits"]


@pytest.mark.parametrize("name", TOKENIZER_TEXTS)
def test_a_tokenizer_that_is_no_tokenizer(name, folder):
    path = folder / "llm" / "tokenizer.json"
    path.write_bytes(JSON_TEXTS[name](path.read_text()))
    check_checkpoint_refused(folder, "")


TOKENIZER_CONFIGS = {
    "empty": b"", "cut": b'{"bos_token": ', "list": b"[]", "null": b"null",
    "UTF-16": '{"bos_token": "a"}'.encode("utf-16"),
    "start a number": b'{"bos_token": 3, "eos_token": 3}',
    "start null": b'{"bos_token": null, "eos_token": null}', "deep": b'{"a":' * 100_000,
    "new start": b'{"bos_token": "<new>", "eos_token": "<|endoftext|>"}',
    "length a list": b'{"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "model_max_length": [1]}',
}  # fmt: skip


@pytest.mark.parametrize("text", TOKENIZER_CONFIGS.values(), ids=TOKENIZER_CONFIGS.keys())
def test_a_wrong_tokenizer_configuration(text, folder):
    (folder / "llm" / "tokenizer_config.json").write_bytes(text)
    check_checkpoint_refused(folder, "")


EVIL = "import pathlib; pathlib.Path({canary!r}).touch()\nclass Evil: pass\n"
AUTO_MAP = {
    "auto_map": {name: f"evil.{name}" for name in (
        "AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor",
    )},
    "custom_pipelines": {"evil": {"impl": "evil.Evil"}},
    "trust_remote_code": True,
}  # fmt: skip
BAITS = {
    "auto_map": (AUTO_MAP, ["config.json", "llm/config.json", "magvitv2/config.json", "clip/config.json"]),
    "auto_map of the tokenizer": (
        AUTO_MAP | {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}, ["llm/tokenizer_config.json"],
    ),
    "classes of the tokenizer": ({"tokenizer_class": "evil.Evil"}, ["llm/tokenizer_config.json", "llm/config.json"]),
    "auto_map of the processor": (AUTO_MAP | {"image_processor_type": "evil.Evil"}, ["clip/preprocessor_config.json"]),
    "auto_map on the hub": (
        {"auto_map": {"AutoConfig": "someone/evil--evil.Evil", "AutoTokenizer": ["someone/evil--evil.Evil", None]}},
        ["config.json", "llm/config.json", "llm/tokenizer_config.json", "clip/config.json"],
    ),
    "kernels and quantization": (
        {"attn_implementation": "someone/evil", "_attn_implementation": "someone/evil",
         "quantization_config": {"quant_method": "evil"}, "use_kernels": True},
        ["config.json", "llm/config.json", "clip/config.json"],
    ),
    "chat template": ({"chat_template": "{{ ''.__class__.__mro__[1] }}"}, ["llm/tokenizer_config.json"]),
}  # fmt: skip
MODULES = ("evil", "torch", "numpy", "tokenizers", "json", "hermesflow", "modeling_phi", "configuration_phi", "Evil",
           "AutoTokenizer", "conftest", "sitecustomize", "setup", "kernels")  # fmt: skip


@pytest.mark.parametrize("bait", BAITS)
def test_bait_runs_nothing(bait, folder, tmp_path, monkeypatch):
    """Modules of many names lie in each folder, one of which is where the process runs."""
    for place in (folder, folder / "llm", folder / "magvitv2", folder / "clip"):
        for module in MODULES:
            (place / f"{module}.py").write_text(EVIL.format(canary=str(tmp_path / "ran")))
    changes, files = BAITS[bait]
    for name in files:
        values = read_json(folder / name)
        (folder / name).write_text(json.dumps(values | changes))
    monkeypatch.chdir(folder)
    before = listing(folder)
    with nothing_happens():
        for opener in OPENERS.values():
            try:
                opener(folder)
            except InputError as error:
                check_line(str(error), str(folder))
    assert not (tmp_path / "ran").exists() and listing(folder) == before


def fifo(path):
    os.mkfifo(path)


def loop(path):
    path.symlink_to(path.name)


def folder_of_that_name(path):
    path.mkdir()


def device(path):
    path.symlink_to("/dev/zero")


def dangling(path):
    path.symlink_to("nowhere")


def unreadable_text(path):
    path.symlink_to("/proc/self/mem")


KINDS = {"fifo": fifo, "loop of links": loop, "folder": folder_of_that_name, "device": device,
"dangling link": dangling,
         "process memory": unreadable_text}  # fmt: skip
SPECIAL = [
    "config.json", "pytorch_model.safetensors", "llm/config.json", "llm/tokenizer.json", "magvitv2/config.json",
    "magvitv2/pytorch_model.safetensors", "clip/config.json", "clip/model.safetensors", "clip/preprocessor_config.json",
]  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_files_that_are_no_files(kind, name, folder):
    (folder / name).unlink()
    KINDS[kind](folder / name)
    part = name.rpartition("/")[0]
    check_checkpoint_refused(folder, "" if part == "llm" else part, str(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vq_tokenizer.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_our_own_that_are_no_files(kind, name, own_folder):
    (own_folder / name).unlink()
    KINDS[kind](own_folder / name)
    check_refused(lambda: load_model(str(own_folder)), str(own_folder))


NAMES = {
    "empty": "", "null byte": "a\0b", "null byte in an id": "a/b\0", "long": "x" * 5000, "long id": "x/" + "y" * 5000,
    "deep": "x/" * 5000, "home": "~", "device": "/dev/zero", "upwards": "../../nowhere/at-all", "odd": "a\n\x1b[2J/b",
    "address": "http://127.0.0.1:9/a/b", "half a surrogate": "\udc80/a", "spaces": "  ", "file": "/etc/passwd",
    "asset upwards": "../assets/../nothing", "assets": ".", "option": "--help", "wild": "*/*",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_names_that_are_no_model(name):
    check_refused(lambda: load_model(name), "no model")


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_language_models_that_cannot_be_had(name, folder):
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | {"llm_model_path": name}))
    shutil.rmtree(folder / "llm")
    check_refused(lambda: load_model(str(folder)), "language model", str(folder))


OWN = {
    "transformer": {
        "vocab_size": NUMBERS, "num_layers": NUMBERS, "hidden_size": NUMBERS, "norm": TEXTS,
        "norm_eps": ["NaN", "text"],
        "rope_theta": ["NaN", "zero", "infinity"], "rotary_fraction": ["NaN", "huge"], "qk_norm": ["null", "zero"],
    },
    "vq_tokenizer": {"code_bits": NUMBERS, "channel_multipliers": NUMBERS[1:], "patch_size": NUMBERS},
    "layout": {"num_image_tokens": NUMBERS, "sot": ["negative", "huge", "text"], "system_ids": ["text", "null"]},
}  # fmt: skip
OWN_CASES = [(part, key, of) for part, keys in OWN.items() for key, kinds in keys.items() for of in kinds]
OWN_CASES = [case for case in OWN_CASES if case != ("transformer", "norm", "missing")]  # has a default


@pytest.mark.parametrize(("part", "key", "of"), OWN_CASES, ids=[":".join(case) for case in OWN_CASES])
def test_a_wrong_value_in_our_own_configuration(part, key, of, own_folder):
    path = own_folder / "config.json"
    values = read_json(path)
    values[part].pop(key, None)
    if of != "missing":
        values[part][key] = VALUES[of]
    path.write_text(json.dumps(values))
    check_refused(lambda: load_model(str(own_folder)), str(own_folder))


def test_our_own_configuration_allocates_nothing_that_the_weights_do_not_hold(own_folder):
    """8 GB of embeddings, which are small enough to be had."""
    path = own_folder / "config.json"
    values = read_json(path)
    values["transformer"] |= {"hidden_size": 2**15, "num_layers": 1}
    path.write_text(json.dumps(values))
    check_refused(lambda: load_model(str(own_folder)), "does not fit the configuration")


def picture(size=(40, 30)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def saved_as(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name, data, checksum=None):
    checksum = zlib.crc32(name + data) if checksum is None else checksum
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", checksum)


def png(width=4, height=4, depth=8, color=2, *, before=b"", data=None, after=b"", header=None):
    """A PNG by hand, its rows zero unless data says otherwise."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}.get(color, 3)
    rows = bytes((1 + width * channels) * height) if data is None else data
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0) if header is None else header
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + before
        + chunk(b"IDAT", zlib.compress(rows))
        + after
        + chunk(b"IEND", b"")
    )


def tiff(**tags):
    """A grey TIFF of 4 x 4 pixels with other values in some of its entries."""
    entries = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: 4, 279: 16}
    entries |= {int(tag.removeprefix("tag")): value for tag, value in tags.items()}
    data = b"II*\0" + struct.pack("<IH", 8, len(entries))
    data += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items())) + bytes(4)
    return data.ljust(200, b"\0") + bytes(16)


def tiff_in_a_circle():
    data = bytearray(tiff())
    data[10 + 9 * 12 : 14 + 9 * 12] = struct.pack("<I", 8)
    return bytes(data)


WHOLE_PNG, WHOLE_JPEG, WHOLE_WEBP = saved_as("PNG"), saved_as("JPEG"), saved_as("WEBP")
GARBAGE = bytes(range(256)) * 4
DATA = chunk(b"IDAT", zlib.compress(bytes(52)))
BOMB = zlib.compress(bytes(80 << 20), 1)


def jpeg_of(size):
    """The JPEG with another height, or height and width, in its frame's header."""
    place = WHOLE_JPEG.index(b"\xff\xc0") + 5
    return WHOLE_JPEG[:place] + size + WHOLE_JPEG[place + len(size) :]


SVG = b"""<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>
<svg xmlns="http://www.w3.org/2000/svg"><script>1</script><image href="http://127.0.0.1:9/a"/>&x;</svg>"""
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(%pipe%touch ran) (w) file\n"
BAD_IMAGES = {
    "EXIF garbage in a PNG": png(before=chunk(b"eXIf", GARBAGE)),
    "color profile bomb": png(before=chunk(b"iCCP", b"a\0\0" + BOMB)),
    "empty": b"", "one byte": b"\x89", "text": b"no image", "HTML": b"<!DOCTYPE html><html></html>", "SVG": SVG,
    "EPS": EPS,
    "EPS in DOS form": b"\xc5\xd0\xd3\xc6" + struct.pack("<IIIIII", 32, len(EPS), 0, 0, 0, 0) + b"\xff\xff" + EPS,
    "PDF": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(touch)>>>>endobj\n", "PostScript": b"%!PS\nshowpage\n",
    "ImageMagick's MVG": b"push graphic-context\nimage over 0,0 0,0 'https://127.0.0.1:9/x.jpg\"|touch \"ran'\n",
    "ImageMagick's MSL": b"<?xml version='1.0'?><image><read filename='/etc/passwd'/><write filename='ran'/></image>",
    "ICNS": b"icns" + struct.pack(">I", 8), "PSD": b"8BPS\0\1" + bytes(40),
    "script": b"#!/bin/sh\ntouch ran\n", "zip": b"PK\x03\x04" + bytes(50), "pickle": pickle.dumps(Call(exec, "1")),
    "PNG without pixels": png(0, 0), "PNG of no width": png(0, 4), "PNG of negative width": png(2**31, 4, data=b"\0"),
    "PNG of 100,000 x 100,000": png(100_000, 100_000, data=b"\0"), "PNG of 2**31 - 1": png(2**31 - 1, 1, data=b"\0"),
    "PNG just over the limit": png(MAX_PIXELS + 1, 1, data=b"\0"), "PNG of color 5": png(color=5),
    "PNG of depth 3": png(depth=3), "PNG without palette, cut": png(color=3, data=b"\0"),
    "PNG header short": png(header=b"\0\0\0\4"), "PNG header empty": png(header=b""),
    "PNG no header": b"\x89PNG\r\n\x1a\n" + chunk(b"IDAT", zlib.compress(bytes(60))) + chunk(b"IEND", b""),
    "PNG signature alone": WHOLE_PNG[:8], "PNG data no zlib": png().replace(zlib.compress(bytes(52)), b"x" * 11),
    "PNG text bomb": png(before=chunk(b"zTXt", b"a\0\0" + BOMB)),
    "PNG text in many bombs": png(before=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 80),
    "PNG international text bomb": png(before=chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "PNG unknown critical chunk": WHOLE_PNG[:33] + b"\0\0\0\0\0\0\0\0" + WHOLE_PNG[33:],
    **{f"PNG cut at {cut}": WHOLE_PNG[:cut] for cut in (10, 16, 24, 33, 41, 100, 1000, len(WHOLE_PNG) - 200)},
    "PNG bad checksum of the header": WHOLE_PNG[:29] + b"\0\0\0\0" + WHOLE_PNG[33:],
    **{f"JPEG cut at {cut}": WHOLE_JPEG[:cut] for cut in (2, 20, 200, 600, len(WHOLE_JPEG) // 2)},
    "JPEG of 65,500 x 65,500": jpeg_of(b"\xff\xdc\xff\xdc"),
    "JPEG of no height": jpeg_of(b"\0\0"),
    "JPEG markers alone": b"\xff\xd8" + b"\xff\xe1\xff\xff" * 1000, "JPEG start and end": b"\xff\xd8\xff\xd9",
    "GIF without frames": b"GIF89a" + struct.pack("<HHBBB", 4, 4, 0, 0, 0) + b";", "GIF signature alone": b"GIF89a",
    "GIF of no size": b"GIF89a" + bytes(7) + b",\0\0\0\0\0\0\0\0\0\2\0;",
    "GIF cut": saved_as("GIF")[:100],
    "GIF of 65,535 x 65,535": saved_as("GIF")[:6] + b"\xff\xff\xff\xff" + saved_as("GIF")[10:],
    "WebP cut": WHOLE_WEBP[: len(WHOLE_WEBP) // 2], "WebP header alone": WHOLE_WEBP[:12],
    "WebP damaged": WHOLE_WEBP[:20] + bytes(40) + WHOLE_WEBP[60:], "WebP of no kind": b"RIFF\x04\0\0\0WEBP",
    "TIFF of huge size": tiff(tag256=2**31 - 1, tag257=2**31 - 1),
    "TIFF of 100,000 x 100,000": tiff(tag256=100_000, tag257=100_000),
    "TIFF of no width": tiff(tag256=0), "TIFF of 65,535 samples": tiff(tag277=65_535),
    "TIFF strip beyond": tiff(tag273=2**31),
    "TIFF of unknown compression": tiff(tag259=31_337), "TIFF of unknown depth": tiff(tag258=77),
    "TIFF header alone": b"II*\0" + struct.pack("<I", 8), "TIFF entry far away": b"II*\0" + struct.pack("<I", 2**31),
    "TIFF of NaN": saved_as("TIFF", Image.fromarray(np.full((4, 4), np.nan, np.float32))),
    "BMP of negative size": saved_as("BMP")[:18] + struct.pack("<ii", -2, -2) + saved_as("BMP")[26:],
    "BMP of huge size": saved_as("BMP")[:18] + struct.pack("<ii", 2**31 - 1, 2**31 - 1) + saved_as("BMP")[26:],
    "BMP cut": saved_as("BMP")[:100], "PPM of huge size": b"P6 999999 999999 255\n", "PPM of letters": b"P6 a b 255\n",
    "PPM of 10**400": b"P6 " + b"9" * 400 + b" 1 255\n", "PPM without end": b"P3 4 4 255\n" + b"1" * 100_000,
    "PPM of depth 0": b"P6 4 4 0\n" + bytes(48), "PPM cut": b"P6 4 4 255\n" + bytes(9),
}  # fmt: skip
ODD_IMAGES = {
    "PNG huge chunk": WHOLE_PNG[:33] + struct.pack(">I", 2**32 - 1) + b"IDAT" + WHOLE_PNG[41:],
    "PNG bad checksum of the data": png().replace(DATA, DATA[:-4] + b"\0\0\0\7"),
    "EXIF garbage in a JPEG": saved_as("JPEG", exif=b"Exif\0\0" + GARBAGE[:500]),
    "EXIF in a circle": saved_as("PNG", exif=b"Exif\0\0" + tiff_in_a_circle()),
    "EXIF orientation 77": saved_as("JPEG", exif=b"Exif\0\0" + tiff(tag274=77)),
    "color profile garbage": saved_as("PNG", icc_profile=GARBAGE),
    "color profile garbage in a JPEG": saved_as("JPEG", icc_profile=GARBAGE),
    "color profile no zlib": png(before=chunk(b"iCCP", b"a\0\0" + b"x" * 30)),
    "text with markup": png(before=chunk(b"tEXt", b"parameters\0<script>alert(1)</script>")),
    "animated PNG": saved_as("PNG", save_all=True, append_images=[picture()]),
    "animation of unknown length": png(before=chunk(b"acTL", struct.pack(">II", 2**31, 0))),
    "bytes behind the end": WHOLE_PNG + b"<?php system('touch ran'); ?>", "1 x 1": png(1, 1),
    "one row of 100,000": png(100_000, 1), "one column of 100,000": png(1, 100_000),
    "small TIFF": tiff(), "palette without colors": png(color=3),
    "unknown chunk": png(before=chunk(b"abCd", GARBAGE)),
    "resolution of zero": png(before=chunk(b"pHYs", bytes(9))), "16 bits": png(depth=16, data=bytes((1 + 24) * 4)),
}  # fmt: skip


def record(path, **changes):
    return {"id": 1, "caption": "a red circle", "image": path.name} | changes


@pytest.mark.parametrize("data", BAD_IMAGES.values(), ids=BAD_IMAGES.keys())
def test_bad_images(data, shared_tiny_model, tmp_path, monkeypatch):
    """As a task's image they are refused; as a record's image, by path or in Parquet, the record is rejected."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.png"
    path.write_bytes(data)
    (tmp_path / "data.jsonl").write_text(json.dumps(record(path)))
    pq.write_table(pa.Table.from_pylist([record(path, image=data)]), tmp_path / "data.parquet")
    before = listing(tmp_path)
    for use in (
        lambda: list(tasks.caption_images(shared_tiny_model, [path])),
        lambda: list(tasks.inpaint_images(shared_tiny_model, path, path, "a red circle")),
        lambda: list(tasks.extrapolate_image(shared_tiny_model, path, "a red circle", ["left"])),
    ):
        check_refused(use, "mine.png")
    for name in ("data.jsonl", "data.parquet"):
        with nothing_happens():
            records, _ = read_source(tmp_path / name, need_questions=False)
            [(encoded, reason)] = encode_records(shared_tiny_model, records, 1)
        assert reason.startswith("damaged image: ")
        check_rejected([{"record_id": encoded.id, "reason": reason}])
    assert listing(tmp_path) == before


@pytest.mark.parametrize("data", ODD_IMAGES.values(), ids=ODD_IMAGES.keys())
def test_odd_images_are_read(data, shared_tiny_model, tmp_path):
    (tmp_path / "mine.png").write_bytes(data)
    with nothing_happens():
        pixels = read_image(tmp_path / "mine.png", 64)
        [wording] = tasks.caption_images(shared_tiny_model, [tmp_path / "mine.png"])
    assert pixels.shape == (64, 64, 3) and wording["caption"] is not None


PATHS = {
    "null byte": "a\0b", "long": "x" * 5000, "deep": "x/" * 3000, "upwards": "../../../../etc/passwd",
    "absolute": "/etc/passwd", "device": "/dev/zero", "random": "/dev/urandom", "home": "~/mine.png",
    "user": "~root/mine.png", "folder": "sub", "dot": ".", "fifo": "fifo", "loop": "loop", "link to a device": "device",
    "link out": "outside/passwd", "dangling": "dangling", "process": "/proc/self/environ", "terminal": "/dev/stdin",
    "address": "http://127.0.0.1:9/a.png", "file address": "file:///etc/passwd", "pipe": "|touch ran",
    "shell": "$(touch ran).png", "half a surrogate": "\udc80.png", "control characters": "a\n\x1b[2J.png",
    "Windows": "C:\\Windows\\win.ini", "network": "//127.0.0.1/share/a.png", "empty": "", "spaces": "   ",
    "ImageMagick": "msl:evil.xml", "upwards inside": "sub/../../mine.png",
}  # fmt: skip


@pytest.fixture
def maze(tmp_path):
    """A data set's folder with what is no image file."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    picture().save(folder / "good.png")
    os.mkfifo(folder / "fifo")
    for name, target in (("loop", "loop"), ("device", "/dev/zero"), ("outside", "/etc"), ("dangling", "nowhere")):
        (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_image_paths(path, shared_tiny_model, maze, monkeypatch):
    """Named by a record they are rejected and the next record is read; given to a task they are refused."""
    monkeypatch.chdir(maze)
    rows = [record(maze / "good.png", id=number, image=of) for number, of in enumerate((path, "good.png"))]
    (maze / "data.json").write_text(json.dumps(rows))
    pair = {
        "caption": "a red circle", "img_path": "good.png", "image_win": "good.png", "image_lose": path,
        "vqa_score_win": 0.9, "vqa_score_lose": 0.1, "caption_win": "a red circle", "caption_lose": "a blue circle",
        "bert_score_win": 0.9, "bert_score_lose": 0.1,
    }  # fmt: skip
    pairs = [pair | {"id": 0}, pair | {"id": 1, "image_lose": None, "image_win": None, "vqa_score_win": None,
                                       "vqa_score_lose": None}]  # fmt: skip
    (maze / "pairs.json").write_text(json.dumps(pairs))
    before = listing(maze)
    with nothing_happens():
        records, rejected = read_source(maze / "data.json", need_questions=False)
        kept, rejected_pairs = read_published_pairs(shared_tiny_model, maze / "pairs.json")
    assert [row.id for row in records] == ["1"] == kept["record_id"].to_pylist() and len(rejected) == 1
    check_rejected(rejected + rejected_pairs.to_pylist())
    if not path.startswith(("../", "/etc", "/proc", "outside")):  # the user may read what no image is
        check_refused(lambda: list(tasks.caption_images(shared_tiny_model, [path])), "")
    assert listing(maze) == before


QUESTION = {"question": "is there a circle ?", "choices": ["yes", "no"], "answer": "yes"}


def asked(**changes):
    return {"questions": [QUESTION | changes]}


ENTRIES = {
    "null": None, "number": 7, "text": "a", "list": [], "empty": {}, "NaN": float("nan"),
    **{f"id {of}": {"id": VALUES[of]} for of in ("null", "list", "object", "NaN", "odd text", "infinity")},
    "id true": {"id": True}, "id empty": {"id": ""}, "id of 4,000 digits": {"id": 10**4000, "caption": 1},
    **{f"caption {of}": {"caption": VALUES[of]} for of in ("null", "zero", "list", "object", "NaN", "odd text")},
    "caption empty": {"caption": " \n"}, "caption of unknown words": {"caption": "mauve"},
    "caption of an endless word": {"caption": "x" * 100_000},
    "caption with a special token": {"caption": "<|soi|> a red circle"},
    **{f"questions {of}": {"questions": VALUES[of]} for of in ("zero", "text", "list", "object", "NaN")},
    **{f"answer {of}": asked(answer=VALUES[of]) for of in ("null", "zero", "list", "NaN", "text")},
    **{f"choices {of}": asked(choices=VALUES[of]) for of in ("null", "text", "list", "object")},
    "choices of half a surrogate": asked(choices=["yes", "\ud800"]),
    "question missing": {"questions": [{"choices": ["yes"], "answer": "yes"}]},
    "question of unknown words": asked(question="is it mauve ?"),
    **{f"codes {of}": {"codes": VALUES[of]} for of in ("zero", "text", "object", "NaN")},
    "codes negative": {"codes": [-1] * 16}, "codes too large": {"codes": [32] * 16},
    "codes huge": {"codes": [2**70] * 16},
    "codes few": {"codes": [1]}, "codes of fractions": {"codes": [1.5] * 16}, "codes of truths": {"codes": [True] * 16},
    "codes nested": {"codes": [[1] * 16]}, "category a list": {"category": [1]},
    "element a number": asked(element=3), "image a list": {"image": [1]},
        "image an object": {"image": {"bytes": 1}},
    "image a number": {"image": 7}, "no image": {"image": None},
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES.keys())
def test_bad_entries_are_rejected(entry, shared_tiny_model, maze):
    good = record(maze / "good.png", id="good", questions=[QUESTION])
    bad = good | {"id": "bad"} | entry if isinstance(entry, dict) and entry else entry
    (maze / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, bad, good | {"id": "last"})))
    with nothing_happens():
        records, unread = read_source(maze / "data.jsonl")
        encoded = list(encode_records(shared_tiny_model, records, 3))
    done = [row.id for row, reason in encoded if reason is None]
    unusable = [{"record_id": row.id, "reason": reason} for row, reason in encoded if reason is not None]
    assert done == ["good", "last"] and len(unread + unusable) == 1
    check_rejected(unread + unusable)


PAIR_VALUES = {
    f"{key} {of}": {key: VALUES[of]}
    for key in ("caption", "img_path", "image_win", "vqa_score_win", "vqa_score_lose", "caption_lose", "bert_score_win")
    for of in ("null", "zero", "list", "object", "NaN", "infinity", "odd text")
    if (key, of) not in (("vqa_score_lose", "zero"), ("image_win", "zero")) or of != "zero"
} | {
    "score of 400 digits": {"vqa_score_win": 10**400},
    "score of minus 400 digits": {"bert_score_lose": -(10**400)},
    "score true": {"vqa_score_win": True},
    "id missing": {"id": None},
    "id the same": {"id": "good"},
    "id a list": {"id": []},
    "scores inverted": {"vqa_score_lose": 0.95},
    "image a number": {"image_lose": 3},
}


@pytest.mark.parametrize("change", PAIR_VALUES.values(), ids=PAIR_VALUES.keys())
def test_bad_pairs_are_rejected(change, shared_tiny_model, maze):
    picture((33, 44)).save(maze / "other.png")
    good = {
        "id": "good", "caption": "a red circle", "img_path": "good.png", "image_win": "good.png",
        "image_lose": "other.png", "vqa_score_win": 0.9, "vqa_score_lose": 0.1, "caption_win": "a red circle",
        "caption_lose": "a blue circle", "bert_score_win": 0.9, "bert_score_lose": 0.1,
    }  # fmt: skip
    (maze / "pairs.json").write_text(json.dumps([good, good | {"id": "bad"} | change, good | {"id": "last"}]))
    with nothing_happens():
        kept, rejected = read_published_pairs(shared_tiny_model, maze / "pairs.json")
    assert kept["record_id"].to_pylist() == ["good", "last"]
    assert {row["side"] for row in rejected.to_pylist()} == {"generation", "understanding"}
    check_rejected(rejected.to_pylist())


DATA_TEXTS = {name: damage("{}") for name, damage in JSON_TEXTS.items()} | {
    "unfinished list": b"[{}, ",
    "list and more": b"[] []",
    "two commas": b"[{},,{}]",
    "half an entry": b'{"id": 1',
    "text without end": b'["' + b"a" * 1_000_000,
    "escape cut": b'["\\u12',
    "binary": bytes(range(256)),
    "ten thousand brackets": b"[" * 10_000 + b"]" * 10_000,
    "CSV": b"id,caption\n1,a red circle\n",
    "Parquet": b"PAR1" + bytes(20) + b"PAR1",
    "gzip": b"\x1f\x8b\x08\0" + bytes(30),
    "comments": b'// x\n{"id": 1}',
}
READERS = {
    "records": lambda model, path: read_source(path, need_questions=False),
    "pairs": read_published_pairs,
}


@pytest.mark.parametrize("reader", READERS.values(), ids=READERS.keys())
@pytest.mark.parametrize("data", DATA_TEXTS.values(), ids=DATA_TEXTS.keys())
def test_json_that_holds_no_data(data, reader, shared_tiny_model, tmp_path):
    (tmp_path / "data.json").write_bytes(data)
    check_refused(lambda: reader(shared_tiny_model, tmp_path / "data.json"), "data.json")


def parquet(rows, **options):
    buffer = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), buffer, **options)
    return buffer.getvalue()


ROWS = [{"id": str(number), "caption": "a red circle", "category": "x", "codes": [1] * 16} for number in range(50)]
PARQUET = parquet(ROWS)
FOOTER = len(PARQUET) - 8 - struct.unpack("<I", PARQUET[-8:-4])[0]
PARQUETS = {
    "empty": b"", "text": b"no Parquet", "marks alone": b"PAR1PAR1", "zeros": bytes(1000), "footer too long":
    PARQUET[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1", "footer negative": PARQUET[:-8] + b"\xff" * 4 + b"PAR1",
    "footer of zeros": PARQUET[:FOOTER] + bytes(50) + PARQUET[FOOTER + 50 :], "start cut": PARQUET[100:],
    "JSON": json.dumps(ROWS).encode(),
    **{f"cut at {cut}": PARQUET[:cut] for cut in (3, 100, len(PARQUET) // 2, len(PARQUET) - 1)},
    "data overwritten": PARQUET[:4] + b"\xff" * 200 + PARQUET[204:], "other columns": parquet([{"a": 1}]),
    "no rows": parquet(pa.table({"id": pa.array([], pa.string())})), "no columns": parquet(pa.table({})),
    "ids of bytes": parquet([{"id": b"\xff", "caption": b"a"}]), "nulls": parquet([{"id": None, "caption": None}]),
    "text that is no text": parquet(pa.table({
        "id": pa.Array.from_buffers(pa.string(), 1, [None, *map(pa.py_buffer, (struct.pack("<ii", 0, 1), b"\xff"))]),
    })),
    "times that Python has not": parquet(pa.table({"id": ["a"], "caption": pa.array([5], pa.time64("ns"))})),
    "dates out of range": parquet(pa.table({"id": pa.array([2**62], pa.timestamp("us"))})),
    "rows without end": parquet(pa.table({"id": pa.DictionaryArray.from_arrays(
        pa.array(np.zeros(5_000_000, np.int8)), pa.array(["a"])
    )})),
    "nulls without end": parquet(pa.table({"id": pa.nulls(5_000_000, pa.string())})),
    "column's name no UTF-8": parquet([{"idid": "a"}], store_schema=False).replace(b"idid", b"id\xff\xfe"),
    "nulls in codes": parquet(pa.Table.from_pylist(
        [{"id": "a", "caption": "a", "category": "a", "questions": [], "codes": [None]}], records_to_table([]).schema,
    )),
    "maps": parquet(pa.table({
        name: pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32()))
        for name in ("id", "caption", "category", "questions")
    })),
}  # fmt: skip
PARQUET_READERS = {
    "source": lambda model, path: read_source(path, need_questions=False),
    "records": lambda model, path: list(RecordFile(path)),
    "pairs": lambda model, path: read_pairs(path),
}


@pytest.mark.parametrize("reader", PARQUET_READERS)
@pytest.mark.parametrize("data", PARQUETS.values(), ids=PARQUETS.keys())
def test_damaged_parquet(data, reader, shared_tiny_model, tmp_path):
    (tmp_path / "data.parquet").write_bytes(data)
    check_refused(lambda: PARQUET_READERS[reader](shared_tiny_model, tmp_path / "data.parquet"), "data.parquet")


def test_pairs_of_another_type(tmp_path):
    table = pa.table({name: pa.array(["x"]) for name in PAIRS_SCHEMA.names})
    pq.write_table(table, tmp_path / "pairs.parquet")
    check_refused(lambda: read_pairs(tmp_path / "pairs.parquet"), "pairs.parquet")


TOMLS = {
    "UTF-16": "[run]\n".encode("utf-16"), "Latin-1": b'[run]\nname = "\xe9"', "null bytes": bytes(50),
    "cut": b'[run]\nname = "',
    "JSON": b'{"run": {}}', "unknown section": b"[runs]\n", "unknown key": b"[run]\nnames = 3\n",
    "section a value": b"run = 3\n",
    "twice": b"[run]\nseed = 1\nseed = 2\n", "deep": b"x = " + b"[" * 100_000,
    "deep tables": b"[a" + b".a" * 5000 + b"]\n",
    "number of 5000 digits": b"[run]\nseed = " + b"9" * 5000, "seed huge": b"[run]\nseed = 99999999999999999999\n",
    "NaN": b"[train]\nlr = nan\n", "infinity": b"[train]\nlr = inf\n", "negative": b"[train]\nnum_steps = -1\n",
    "true for a number": b"[train]\nnum_steps = true\n", "text for a number": b'[train]\nnum_steps = "3"\n',
    "list for a text": b"[run]\nname = []\n", "date": b"[run]\nname = 1979-05-27\n",
    "name upwards": b'[run]\nname = "../x"\n',
    "name with null byte": b'[run]\nname = "a\\u0000"\n',
    "key with control characters": b'[run]\n"a\\n\\u001b[2J" = 1\n',
    "long key": b"[run]\n" + b"k" * 100_000 + b" = 1\n", "huge float": b"[train]\nlr = " + b"9" * 4000 + b"\n",
    "table of tables": b"[[run]]\n[[run]]\n", "root of no records": b'[eval]\nroot = "x"\n',
}  # fmt: skip


@pytest.mark.parametrize("text", TOMLS.values(), ids=TOMLS.keys())
def test_wrong_settings(text, tmp_path):
    (tmp_path / "mine.toml").write_bytes(text)
    check_refused(lambda: load_config(tmp_path / "mine.toml"), "mine.toml")


def test_an_endless_override():
    check_refused(lambda: load_config(None, [f"train.num_steps={'x' * 100_000}"]), "expected a whole number")


FILE_READERS = {
    "records": lambda path: read_source(path), "Parquet": lambda path: RecordFile(path),
    "settings": lambda path: load_config(path), "image": lambda path: read_image(path, 16),
}  # fmt: skip


@pytest.mark.parametrize("reader", FILE_READERS)
@pytest.mark.parametrize(
    "name",
    ["fifo", "loop", "device", "dangling", "sub", "a\0b", "x" * 5000, "/dev/zero", "\udc80"],
    ids=lambda name: ascii(name[:20]),
)
def test_files_that_are_no_files(name, reader, maze):
    check_refused(lambda: FILE_READERS[reader](maze / name), "")


def test_a_file_larger_than_the_memory(maze):
    """A sparse file of a terabyte, which a careless reader would fill the memory with."""
    with open(maze / "large.png", "wb") as file:
        file.truncate(2**40)
    check_refused(lambda: read_image(maze / "large.png", 16), "large.png")
