"""Ten thousand malformed inputs: each is used, refused in a line or rejected with its reason; nothing else happens.

Input `number` of a kind depends on SEED, the kind and the number alone. An input that fails is kept in the test's
folder; to make it again alone, give its number to fuzz.
"""

import asyncio
import base64
import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import random
import shutil
import socket
import struct
import tarfile
import threading
import time
import tomllib
import traceback
import zipfile
import zlib
from collections import Counter
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import load, save
from watch import TIME_LIMIT_S, TimeLimit, check_line, check_rejected, listing, nothing_happens

from hermesflow import tasks
from hermesflow.benchmarks.random_checkpoint import TINY, write_checkpoint
from hermesflow.config import Config, load_config, setting_names, to_toml
from hermesflow.data.pairs import PAIRS_SCHEMA, read_pairs
from hermesflow.data.published_pairs import read_published_pairs
from hermesflow.data.records import RecordFile, write_records
from hermesflow.data.sources import encode_records, read_source
from hermesflow.engine.nan_cause import NotFiniteError
from hermesflow.models import load_model
from hermesflow.models.family import ASSETS
from hermesflow.models.images import FORMATS, open_image, read_image
from hermesflow.runtime.files import InputError
from hermesflow.serving.server import Server

SEED = 0
NUM_INPUTS = {"records": 4000, "images": 2000, "checkpoints": 1500, "settings": 1500, "requests": 1000}
PUBLISHED = Path(__file__).parents[1] / "data"
PROMPT, QUESTION = "a large red circle in the top left on a white background", "is there a red circle ?"


@pytest.mark.soak
@pytest.mark.parametrize("kind", NUM_INPUTS)
def test_ten_thousand_malformed_inputs(kind, tmp_path):
    fuzz(kind, range(NUM_INPUTS[kind]), tmp_path)


@pytest.mark.parametrize("kind", NUM_INPUTS)
def test_two_hundred_malformed_inputs(kind, tmp_path):
    fuzz(kind, range(NUM_INPUTS[kind] // 50), tmp_path)


def fuzz(kind, numbers, folder):
    """Gives inputs to what reads them; at the end fails with what went wrong."""
    outcomes, failures, began = Counter(), {}, time.monotonic()
    canary, bench = folder / "ran", BENCHES[kind](folder / "originals")
    with contextlib.closing(bench):
        for number in numbers:
            place = folder / f"{kind}-{SEED}-{number}"
            place.mkdir()
            use = bench.make(random.Random(f"{SEED} {kind} {number}"), place, canary)
            before = listing(place)
            try:
                with nothing_happens():
                    outcomes[refused_or(use)] += 1
                assert listing(place) == before and not canary.exists()
            except (Exception, TimeLimit) as error:
                lines = traceback.format_exception(error, limit=-6, chain=False)
                failures.setdefault("".join(lines[:-1]), []).append(f"{place}: {lines[-1]:.400}")
            else:
                shutil.rmtree(place)
    print(f"{kind}: {len(numbers)} inputs, {dict(outcomes.most_common())}, {time.monotonic() - began:.0f} s")
    if failures:
        shown = [f"{len(found)} as {found[0]}{where}" for where, found in failures.items()]
        pytest.fail(f"of {len(numbers)} inputs of seed {SEED} failed\n" + "\n".join(shown), pytrace=False)


def refused_or(use):
    try:
        return use()
    except (InputError, NotFiniteError) as error:
        check_line(str(error), "")
        return "refused"


DEEP = 100_000
SNIPPETS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xe2\x80\xae", b"\xe2\x80\xa8", b"\r", b"\n", b'"', b"'",
    b"\\", b"\\ud800", b"\\u0000", b"NaN", b"-Infinity", b"nan", b"1e999", b"-", b"0x", b"9" * 5000, b"{", b"}", b"[",
    b"]", b"[" * DEEP, b'{"a":' * DEEP, b"=", b"#", b",", b":", b"null", b"true", b"../", b"%00", b"PAR1", b"\x1f\x8b",
)  # fmt: skip
NUMBERS = (0, 1, 127, 255, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)


def damage_bytes(data, draw):
    """The bytes with some places damaged, most of them near the start or the end."""
    for _ in range(draw.choice((1, 1, 2, 4, 16))):
        at = draw.choice((draw.randrange, lambda size: draw.randrange(min(size, 64))))(len(data) + 1)
        at = draw.choice((at, at, at, len(data) - at))
        size = draw.choice((1, 2, 4, 8, 64, draw.randrange(len(data) + 1)))
        piece, after = data[at : at + size], data[at + size :]
        kind = draw.randrange(9)
        if kind == 0 and piece:
            piece = bytes([piece[0] ^ 1 << draw.randrange(8)]) + piece[1:]
        elif kind == 1:
            piece = draw.randbytes(len(piece))
        elif kind == 2:
            piece = draw.choice((b"\0", b"\xff", b" ")) * len(piece)
        elif kind == 3:
            piece = b""
        elif kind == 4:
            piece = piece * draw.choice((2, 2, 3, max(1, 10_000 // (len(piece) + 1))))
        elif kind == 5:
            piece = draw.choice(SNIPPETS) + piece
        elif kind == 6:
            number = draw.choice(NUMBERS)
            length = draw.choice((2, 4, 8))
            piece = (number % 256**length).to_bytes(length, draw.choice(("big", "little"))) + piece[length:]
        elif kind == 7:
            after = b""
        elif kind == 8 and after:
            other = draw.randrange(len(after))
            piece = after[other : other + size]
        data = data[:at] + piece + after
    return data


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


ODD_VALUES = (
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -0.0, 1e-300, 1e308, float("nan"),
    float("inf"), float("-inf"), "", " ", "\0", "\ud800", "\udc80.png", "\u202egnp", "\u2028", "é" * 9, "a\n\x1b[2J",
    "x" * 100_000, "\U0001f600" * 100, "null", "1", "nan", [], {}, [[]], [None], [1], {"a": 1}, {"": {}}, deep(50),
    ["a", 1, None], "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "fifo", "loop", "device", "outside/passwd",
    "sub", ".", "~", "~root", "file:///etc/passwd", "http://127.0.0.1:9/a.png", "a" * 300, "x/" * 3000, "data", "|true",
    "$(touch ran)", "__import__('os').system('touch ran')", "{question}", "{0.__class__}", "%s", "<|soi|>", "good.png",
)  # fmt: skip


def spots(value):
    """(container, key) of all that lies in a value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items):
        yield value, key
        yield from spots(inner)


def damage_value(value, draw, odd=ODD_VALUES):
    """A JSON value with something odd in some places."""
    box = [copy.deepcopy(value)]
    for _ in range(draw.choice((1, 1, 1, 2, 5))):
        known = list(spots(box))
        container, key = draw.choice(known)
        kind = draw.randrange(8)
        if kind < 4:
            container[key] = copy.deepcopy(draw.choice(odd))
        elif kind == 4 and container is not box:
            del container[key]
        elif kind == 5:
            other, name = draw.choice(known)
            container[key] = copy.deepcopy(other[name])
        elif kind == 6:
            container[key] = [container[key]] * draw.choice((1, 2, 100))
        elif type(container[key]) is int:
            container[key] = draw.choice((container[key] + 1, container[key] - 1, 2 * container[key], -container[key]))
        elif isinstance(container, dict):
            container[draw.choice(("", "id", "x" * 1000, "\ud800", "__class__", f"{key} "))] = container.pop(key)
        if len(json.dumps(box)) > 1 << 22:
            break
    return box[0]


def json_bytes(value, draw):
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5, indent=draw.choice((None, None, 2)))
    return text.encode(draw.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig")), "surrogatepass")


class Bench:
    """Inputs of one kind and what reads them."""

    def __init__(self, originals):
        self.folder = originals
        originals.mkdir()

    def make(self, draw, place, canary):
        """Writes an input; gives what reads it and says what became of it, or raises InputError."""
        raise NotImplementedError

    def close(self):
        pass

    @cached_property
    def model(self):
        return load_model("tiny")


def picture(size=(20, 12), mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def image_file(kind, image=None, **options):
    buffer = io.BytesIO()
    (image or picture()).save(buffer, format=kind, **options)
    return buffer.getvalue()


class Records(Bench):
    """Sources of records, published pairs, and the Parquet files that runs write."""

    def __init__(self, originals):
        super().__init__(originals)
        codes = self.model.encode_images(np.stack([np.asarray(picture((64, 64)))]))[0].tolist()
        questions = [
            {
                "question": QUESTION,
                "choices": ["yes", "no"],
                "answer": "yes",
                "element_type": "object",
                "element": "red",
            },
            {"question": "what color is the circle ?", "choices": ["red", "blue"], "answer": "red"},
        ]
        caption = {"caption": PROMPT, "category": "colors", "questions": questions}
        self.rows = [
            {"id": "a", "image": "good.png"} | caption,
            {"id": 1, "img_path": "sub/good.png"} | caption,
            {"id": "c", "codes": codes} | caption,
            {"id": 2.0, "image": {"bytes": None, "path": "good.png"}, "caption": "a red circle"},
            {"id": "q", "image": "good.png", "caption": "a red circle"} | questions[0],
            {"id": "t", "image": "good.png", "caption": PROMPT, "questions": {
                "question": [QUESTION], "choices": [["yes", "no"]], "answer": ["no"],
            }},
        ]  # fmt: skip
        self.pairs = [
            {"id": number, "caption": "a red circle", "img_path": "good.png", "image_win": "good.png",
             "image_lose": "sub/good.png", "vqa_score_win": 0.9, "vqa_score_lose": 0.1, "caption_win": "a red circle",
             "caption_lose": "a blue circle", "bert_score_win": 0.9, "bert_score_lose": 0.1} for number in range(2)
        ]  # fmt: skip
        (originals / "source.json").write_text(json.dumps(self.rows[2:3]))
        write_records(originals / "records.parquet", read_source(originals / "source.json")[0])
        row = dict.fromkeys(PAIRS_SCHEMA.names) | {
            "record_id": "a", "category": "colors", "caption": "a red circle", "sides": "both", "record_codes": codes,
            "win_codes": codes, "lose_codes": codes, "win_image_score": 0.75, "lose_image_score": 0.5,
        }  # fmt: skip
        pq.write_table(pa.Table.from_pylist([row] * 3, PAIRS_SCHEMA), originals / "pairs.parquet")
        self.image = image_file("PNG")

    def make(self, draw, place, canary):
        (place / "sub").mkdir()
        for name in ("good.png", "sub/good.png"):
            (place / name).write_bytes(self.image)
        os.mkfifo(place / "fifo")
        for name, target in (("loop", "loop"), ("device", "/dev/zero"), ("outside", "/etc"), ("data", "sub")):
            (place / name).symlink_to(target)
        reader = draw.choice((self.source, self.source, self.source, self.published, self.own))
        return reader(draw, place)

    def source(self, draw, place):
        rows = draw.sample(self.rows, draw.randrange(1, 5))
        rows = damage_value(rows, draw) if draw.random() < 0.8 else rows
        rows = [*rows, self.rows[0] | {"id": "good"}] if isinstance(rows, list) and draw.random() < 0.6 else rows
        form = draw.choice(("json", "jsonl", "parquet", "parquet", "tar"))
        data = parquet(rows, draw, self.image) if form == "parquet" else json_of(rows, form, draw)
        data = tar_of(rows, draw, self.image) if form == "tar" else data or b"PAR1"
        path = place / f"source.{form}"
        path.write_bytes(self.packed(data, draw))
        given = draw.choice((path, path, path, place, str(place / "sour*")))
        need, questions = draw.random() < 0.5, draw.choice((None, None, None, path))

        def use():
            records, rejected = read_source(given, questions, need_questions=need)
            check_rejected(rejected)
            return self.encoded(records, "rejected" if rejected else "used")

        return use

    def encoded(self, records, outcome):
        for record, reason in encode_records(self.model, records, len(records)):
            if reason is not None:
                check_rejected([{"record_id": record.id, "reason": reason}])
                outcome = "rejected"
        return outcome

    def published(self, draw, place):
        pairs = damage_value(self.pairs, draw) if draw.random() < 0.8 else self.pairs
        pairs = [*pairs, self.pairs[0] | {"id": "good"}] if isinstance(pairs, list) else pairs
        (place / "pairs.json").write_bytes(self.packed(json_of(pairs, draw.choice(("json", "jsonl")), draw), draw))

        def use():
            pairs, rejected = read_published_pairs(self.model, place / "pairs.json")
            check_rejected(rejected.to_pylist())
            return "rejected" if len(rejected) else "used"

        return use

    def own(self, draw, place):
        name = draw.choice(("records", "pairs"))
        path = place / f"{name}.parquet"
        if draw.random() < 0.5:
            rows = pq.read_table(self.folder / path.name).to_pylist()
            path.write_bytes(parquet(damage_value(rows, draw), draw, self.image) or b"PAR1")
        else:
            path.write_bytes(damage_bytes((self.folder / path.name).read_bytes(), draw))

        def use():
            if name == "pairs":
                read_pairs(path)
                return "used"
            return self.encoded(list(RecordFile(path)), "used")

        return use

    def packed(self, data, draw):
        data = damage_bytes(data, draw) if draw.random() < 0.4 else data
        if draw.random() < 0.2:
            data = gzip.compress(data, 1)
            data = damage_bytes(data, draw) if draw.random() < 0.5 else data
        return data


def json_of(rows, form, draw):
    if form == "json" or not isinstance(rows, list):
        return json_bytes(rows, draw)
    return b"\n".join(json.dumps(row).encode() for row in rows)


def tar_of(rows, draw, image):
    """Samples in WebDataset's form."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=draw.choice((tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT))) as tar:
        for number, row in enumerate(rows if isinstance(rows, list) else [rows]):
            for end, data in (("json", json_bytes(row, draw)), ("txt", PROMPT.encode()), ("png", image)):
                names = (*[f"{number}.{end}"] * 9, f"../{number}.{end}", f"/etc/{end}", end)
                info = tarfile.TarInfo(draw.choice(names))
                info.size, info.linkname = len(data), "/etc/passwd"
                info.type = draw.choice((*[tarfile.REGTYPE] * 19, tarfile.SYMTYPE, tarfile.FIFOTYPE))
                tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def parquet(rows, draw, image):
    """Rows as Parquet, a column perhaps of another type; None where no table can hold them."""
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    columns = {}
    for key in {key: None for row in rows for key in row}:
        values = [row.get(key) for row in rows]
        try:
            columns[key.encode("utf-8", "replace").decode()] = pa.array(values)
        except (pa.ArrowException, ValueError, OverflowError, TypeError):
            columns[key.encode("utf-8", "replace").decode()] = pa.array([ascii(value) for value in values])
    if columns and draw.random() < 0.5:
        columns[draw.choice(list(columns))] = odd_column(len(rows), draw, image)
    if draw.random() < 0.2:
        columns["image"] = pa.array([damage_bytes(image, draw) for _ in rows], pa.binary())
    buffer = io.BytesIO()
    try:
        options = {"compression": draw.choice(("none", "snappy", "gzip", "zstd", "lz4", "brotli"))}
        options |= {"version": draw.choice(("1.0", "2.4", "2.6")), "row_group_size": draw.choice((1, 2, 1000))}
        options |= {"use_dictionary": draw.random() < 0.5, "data_page_version": draw.choice(("1.0", "2.0"))}
        pq.write_table(pa.table(columns), buffer, store_schema=draw.random() < 0.8, **options)
    except (pa.ArrowException, ValueError):
        return None
    return buffer.getvalue()


def odd_column(count, draw, image):
    values = draw.choice((
        pa.array([draw.randbytes(8) for _ in range(count)], pa.binary()),
        pa.array([2**62] * count, pa.timestamp(draw.choice(("s", "ms", "us", "ns")), draw.choice((None, "UTC")))),
        pa.array([2**40] * count, pa.duration("us")),
        pa.array([3] * count, pa.date32()),
        pa.array([2**40] * count, pa.date64()),
        pa.array([5] * count, pa.time64("ns")),
        pa.array([1] * count, pa.decimal128(20, 2)),
        pa.array([1.5] * count, pa.float16()),
        pa.array([2**64 - 1] * count, pa.uint64()),
        pa.nulls(count),
        pa.nulls(count, pa.string()),
        pa.array([[("a", 1)]] * count, pa.map_(pa.string(), pa.int32())),
        pa.array([[[1]]] * count, pa.large_list(pa.list_(pa.int8()))),
        pa.array([[1, 2]] * count, pa.list_(pa.float32(), 2)),
        pa.array(["a"] * count, pa.large_string()),
        pa.array([image] * count, pa.large_binary()),
        pa.array([{"bytes": image, "path": "good.png"}] * count),
        pa.array([{"bytes": image[:50], "path": None, "more": 1}] * count),
        pa.array(["good.png"] * count).dictionary_encode(),
        pa.array([b"x" * 16] * count, pa.binary(16)),
        pa.array([True] * count),
    ))  # fmt: skip
    return values


def png_chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(width, height, extra=b"", bits=1):
    """A PNG of zeros, which weighs next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    rows = zlib.compress(bytes(1 << 20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    )


SAVED = {
    "PNG": ({}, {"mode": "P"}, {"mode": "LA"}, {"mode": "1"}, {"mode": "I;16"}, {"save_all": True}, {"dpi": (1, 1)}),
    "JPEG": ({}, {"mode": "L"}, {"mode": "CMYK"}, {"progressive": True}, {"exif": 6}, {"icc_profile": b"x" * 500}),
    "WEBP": ({}, {"lossless": True}, {"mode": "RGBA"}, {"save_all": True}, {"exif": 3}),
    "AVIF": ({}, {"mode": "RGBA"}),
    "GIF": ({}, {"mode": "L"}, {"save_all": True}, {"interlace": 0}),
    "BMP": ({}, {"mode": "P"}, {"mode": "1"}, {"mode": "RGBA"}),
    "TIFF": ({}, {"compression": "tiff_deflate"}, {"compression": "tiff_lzw"}, {"compression": "jpeg"},
             {"compression": "packbits"}, {"compression": "group4", "mode": "1"}, {"mode": "F"}, {"mode": "CMYK"}),
    "PPM": ({}, {"mode": "L"}, {"mode": "1"}),
    "JPEG2000": ({}, {"mode": "RGBA"}, {"mode": "I;16"}),
    "ICO": ({}, {"bitmap_format": "bmp"}),
    "TGA": ({}, {"compression": "tga_rle"}, {"mode": "P"}),
    "PCX": ({}, {"mode": "P"}, {"mode": "1"}),
    "SGI": ({}, {"mode": "L"}),
    "QOI": ({}, {"mode": "RGBA"}),
}  # fmt: skip


class Images(Bench):
    """Image files of every format that is read."""

    def __init__(self, originals):
        super().__init__(originals)
        assert set(SAVED) == set(FORMATS)
        self.files = []
        for kind, ways in SAVED.items():
            for number, options in enumerate(ways):
                size, mode = (32, 32) if kind == "ICO" else (20, 12), options.get("mode", "RGB")
                image = Image.new(mode, size, 1) if mode in ("F", "I;16") else picture(size, mode)
                image.info.clear()
                options = {key: value for key, value in options.items() if key != "mode"}
                if "exif" in options:
                    exif = Image.Exif()
                    exif[274] = options["exif"]
                    options["exif"] = exif.tobytes()
                if "save_all" in options:
                    options["append_images"] = [picture()]
                with contextlib.suppress(KeyError):  # a format that this Pillow does not write
                    self.files.append((f"{kind}-{number}", image_file(kind, image, **options)))
        list(tasks.caption_images(self.model, [self.written(originals / "good.png", image_file("PNG"))]))

    def written(self, path, data):
        path.write_bytes(data)
        return path

    def make(self, draw, place, canary):
        name, data = draw.choice(self.files)
        if draw.random() < 0.03:
            side = draw.choice((2**15, 60_000, 9_000, 2**31 - 1))
            extra = png_chunk(draw.choice((b"zTXt", b"iCCP")), b"a\0\0" + zlib.compress(bytes(32 << 20), 1))
            data = png_bomb(side, draw.choice((1, side)), draw.choice((b"", extra)), draw.choice((1, 8)))
        for _ in range(draw.choice((0, 1, 1))):
            data = damage_bytes(data, draw)
        path = self.written(place / f"{name}.png", data)
        read = draw.choice((self.fitted, self.fitted, self.opened, self.captioned))
        return lambda: read(path)

    def fitted(self, path):
        assert read_image(path, 64).shape == (64, 64, 3)
        return "used"

    def opened(self, path):
        assert min(open_image(path).convert("RGB").size) > 0
        return "used"

    def captioned(self, path):
        [wording] = tasks.caption_images(self.model, [path])
        assert isinstance(wording["caption"], str)
        return "used"


class Call:
    """Unpickled by the usual pickle it would call the function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Checkpoints(Bench):
    """Folders of every family, one file of each damaged."""

    def __init__(self, originals):
        super().__init__(originals)
        write_checkpoint(originals / "showo", TINY)
        names = ["bagel", "chameleon", "dimoo", "emu3", "janus", "mmada", "seedx", "showo", "showo2"]
        sources = [ASSETS / name for name in ("tiny", "tiny-ar", "tiny-flow")]
        sources += [PUBLISHED / f"{name}-tiny" for name in names] + [PUBLISHED / "showo-tiny-sharded"]
        for source in sources:
            unused = shutil.ignore_patterns("golden*", "reference*", "meta.json", "original_names.json", "*.md")
            shutil.copytree(source, originals / source.name, ignore=unused)
        for name in ("tiny-ar", "tiny-flow"):
            os.link(originals / "tiny/vq_tokenizer.safetensors", originals / name / "vq_tokenizer.safetensors")
        (originals / "showo2-tiny/siglip").mkdir()
        (originals / "showo2-tiny/siglip/config.json").write_text('{"vision_config": {"num_attention_heads": 2}}')
        self.folders = sorted(originals.iterdir())
        self.sizes = {folder.name: sizes_of(load_model(folder)) for folder in self.folders}
        for folder in self.folders:
            self.use(folder, folder.name)

    def use(self, folder, name):
        model = load_model(folder)
        model.decode_text(model.encode_text(PROMPT))
        try:
            model.vq_tokenizer  # noqa: B018
        except InputError as error:  # that of some stands elsewhere
            check_line(str(error), "")
            return "used"
        if sizes_of(model) == self.sizes[name]:  # the published ones, which fill in for what is gone, take too long
            model.answer([picture()], QUESTION)
        return "used"

    def make(self, draw, place, canary):
        source = draw.choice(self.folders)
        folder = shutil.copytree(source, place / "model", copy_function=os.link)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()")
        weights = [path for path in files if path.suffix in (".safetensors", ".bin", ".pt")]
        path = draw.choice(draw.choice((files, weights)))
        data = path.read_bytes()
        path.unlink()
        if path in weights:
            data = self.damaged_weights(path, data, draw, canary)
        elif path.suffix == ".json" and draw.random() < 0.8:
            odd = (*ODD_VALUES, {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}, "evil.Evil")
            data = json_bytes(damage_value(json.loads(data), draw, odd), draw)
        else:
            data = damage_bytes(data, draw)
        path.write_bytes(data)
        return lambda: self.use(folder, source.name)

    def damaged_weights(self, path, data, draw, canary):
        kind = draw.randrange(4)
        if kind == 0:
            return damage_bytes(data, draw)
        if path.suffix == ".safetensors":
            end = 8 + struct.unpack("<Q", data[:8])[0]
            if kind == 1:
                header = damage_value(json.loads(data[8:end]), draw)
                head = json.dumps(header).encode()
                return struct.pack("<Q", len(head)) + head + data[end:]
            if kind == 2:
                return data[:8] + damage_bytes(data[8:end], draw) + data[end:]
            return save(damaged_state(load(data), draw))
        state = torch.load(io.BytesIO(data), weights_only=True)
        if kind == 1:
            code = f"open({str(canary)!r}, 'w').close()"
            call = draw.choice((Call(exec, code), Call(eval, code), Call(os.system, f"touch {canary}")))
            return draw.choice((bin_file({**state, "x": call}), bin_file(call), pickle.dumps(call)))
        if kind == 2:
            buffer, ending = io.BytesIO(), draw.choice(("data.pkl", "data.pkl", "data/0", "version", "byteorder"))
            with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
                for info in old.infolist():
                    entry = old.read(info)
                    new.writestr(info.filename, damage_bytes(entry, draw) if info.filename.endswith(ending) else entry)
            return buffer.getvalue()
        return bin_file(damaged_state(state, draw))


def sizes_of(model):
    """What says how large the images are that a model sees."""
    return model.image_size, getattr(model, "sizes", None), getattr(model, "bounds", None)


def bin_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def damaged_state(state, draw):
    """Named tensors, some of another shape, dtype, value or name."""
    state = {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    dtypes = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
    for _ in range(draw.choice((1, 1, 3))):
        name = draw.choice(sorted(state))
        tensor, kind = state[name], draw.randrange(7)
        if kind == 0:
            del state[name]
        elif kind == 1:
            state[name + draw.choice((".x", "\n", "\0", "x" * 1000))] = state.pop(name)
        elif kind == 2:
            state[name] = tensor.reshape(-1)[: draw.randrange(tensor.numel() + 1)].clone()
        elif kind == 3:
            state[name] = tensor.to(draw.choice(dtypes))
        elif kind == 4:
            value = draw.choice((float("nan"), float("inf"), 1e38, -1e38, 1e-40, 0.0, 1e5))
            state[name] = torch.full(tensor.shape, value).to(tensor.dtype)
        elif kind == 5:
            state[name] = tensor[None].clone()
        else:
            state = {name: tensor.to(draw.choice(dtypes)) for name, tensor in state.items()}
        if not state:
            break
    return state


ODD_TOML = (
    "nan", "inf", "-inf", "-1", "0", "1", "1e300", "1e-300", "9223372036854775808", "9" * 30, "9" * 5000, "0x10", "1e3",
    "0.5", "true", '""', '"a"', '"\\u0000"', '"../x"', '"~"', '"~nobody/x"', "[]", "[1]", '["a"]', "[[1]]", "{}",
    "{a = 1}", "1979-05-27", "07:32:00", '"""a\nb"""', "'a'", '"/dev/zero"', '"module:object"', '"os:system"', "[nan]",
    '"4/0.7"', "[0, 1]", "[-1, 1e9]", '"\u202e"', "[" * 1000, "é", "=", "", "'" * 3, f'"{"x" * 70_000}"', "1_000", ".5",
    "None", "False", '["4/0.7", "99999/1"]', "[1, 1]", "2147483648", "65537",
)  # fmt: skip


class Settings(Bench):
    """Settings files and values of --set."""

    def __init__(self, originals):
        super().__init__(originals)
        self.text = to_toml(Config())

    def make(self, draw, place, canary):
        lines, kind = self.text.splitlines(), draw.randrange(4)
        if kind:
            for _ in range(draw.choice((1, 1, 2, 5))):
                self.damage(lines, draw)
        data = "\n".join(lines).encode()
        if kind == 0 or draw.random() < 0.2:
            data = damage_bytes(data, draw)
        path = place / "mine.toml"
        path.write_bytes(data)
        given = [self.override(draw) for _ in range(draw.choice((0, 0, 1, 3)))]
        if draw.random() < 0.3:
            path = None

        def use():
            config = load_config(path, given)
            return "used" if list(config.each_round()) and tomllib.loads(to_toml(config)) else ""

        return use

    def damage(self, lines, draw):
        at = draw.choice([number for number, line in enumerate(lines) if " = " in line])
        key, value = lines[at].split(" = ", 1)
        odd, other = draw.choice(ODD_TOML), draw.choice(lines)
        lines[at] = draw.choice((
            f"{key} = {odd}", f"{key} = {odd}", f"{key} = {odd}", f"{key}{draw.choice('_x.')} = {value}",
            f"{key}.{key} = {value}", f"{key} = {other.split(' = ')[-1]}", other,
            f"[round.{draw.choice(NUMBERS)}.train]",
            f"[round.1.{draw.choice(('train', 'data', 'run', 'curation'))}]\n{key} = {odd}", f"[[{key}]]", f"{key} ",
            f"round = {odd}", f"round.1 = {odd}", f"round.1.train.lr = {odd}",
        ))  # fmt: skip

    def override(self, draw):
        name = draw.choice(setting_names())
        name = draw.choice((name, name, name, name, f"round.1.{name}", f"round.{draw.choice(NUMBERS)}.{name}", name[1:],
                            name.upper(), "", ".", "x" * 1000, "round", f" {name}", f"{name}.x"))  # fmt: skip
        value = draw.choice((*ODD_TOML, "\0", "\udc80", "a\nb = 1", "a # b", " ", "1\n[run]", "~", "\u2028"))
        return draw.choice(
            (f"{name}={value}", f"{name}={value}", f"{name} = {value}", name, f"--{name}={value}", value)
        )


class Requests(Bench):
    """Requests of the server, most of them given to its application, the others through a socket."""

    PATHS = (
        *("/v1/images/generations", "/v1/chat/completions") * 5, "/v1/models", "/health", "/metrics", "/", "/v1",
        "/v1//models", "/v1/images/generations/", "/../etc/passwd", "/%00",
    )  # fmt: skip
    HEADERS = [
        (name, value)
        for name in (b"host", b"content-type", b"content-encoding", b"accept", b"x" * 5000, b"cookie")
        for value in (
            b"",
            b"[::1",
            b"\xff\xfe",
            b"gzip",
            b"x" * 9000,
            b"a:b:c",
            b"text/html",
            b"\0",
            b"]/?#@",
            b"1:99999",
        )
    ]

    def __init__(self, originals):
        super().__init__(originals)
        self.server = Server(self.model, "tiny", max_waiting=64, max_batch=16, max_bytes=1 << 20)
        self.loop = asyncio.new_event_loop()
        config = uvicorn.Config(self.server.app, host="127.0.0.1", port=0, log_level="critical")
        self.listening = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.listening.run, daemon=True)
        self.thread.start()
        while not self.listening.started:
            time.sleep(0.01)
        self.address = self.listening.servers[0].sockets[0].getsockname()
        self.images = [image_file(kind, picture((64, 64))) for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP")]
        for path in ("/v1/images/generations", "/v1/chat/completions", "/v1/models", "/health", "/metrics"):
            body = self.body(path, random.Random(0), 0)
            assert self.asked("POST" if body else "GET", path, [], [json.dumps(body).encode()]) == "used"

    def close(self):
        self.listening.should_exit = True
        self.thread.join()
        self.server.worker.close()
        self.loop.close()

    def body(self, path, draw, damaged):
        if path == "/v1/images/generations":
            return {"prompt": PROMPT, "n": 1, "seed": 1, "num_steps": 1, "temperature": 1.0, "guidance_scale": 1.5,
                    "size": "64x64", "response_format": "b64_json", "user": "a", "model": "tiny"}  # fmt: skip
        if path == "/v1/chat/completions":
            data = draw.choice(self.images)
            data = damage_bytes(data, draw) if damaged else data
            url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            parts = [{"type": "text", "text": QUESTION}, {"type": "image_url", "image_url": {"url": url}}]
            messages = [{"role": "system", "content": "a"}, {"role": "user", "content": parts}][draw.randrange(2) :]
            return {"model": "tiny", "messages": messages, "max_tokens": 8, "temperature": 0, "top_p": 0.9, "seed": 3,
                    "n": 2, "stream": False, "stop": None, "user": "a"}  # fmt: skip
        return None

    def make(self, draw, place, canary):
        path = draw.choice(self.PATHS)
        body = self.body(path, draw, draw.random() < 0.3)
        body = damage_value(body, draw) if draw.random() < 0.7 else body
        data = json_bytes(body, draw)
        if draw.random() < 0.3:
            data = damage_bytes(data, draw)
        method = draw.choice(("POST",) * 20 + ("GET", "GET", "PUT", "HEAD", "OPTIONS", "DELETE", "X" * 100))
        headers = [draw.choice(self.HEADERS) for _ in range(draw.choice((0, 0, 1, 2)))]
        (place / "input").write_bytes(repr((method, path, headers, data)).encode())
        if draw.random() < 0.8:
            cuts = sorted(draw.randrange(len(data) + 1) for _ in range(draw.choice((0, 0, 1, 5))))
            parts = [data[start:end] for start, end in zip((0, *cuts), (*cuts, len(data)), strict=True)]
            return lambda: self.asked(method, path, headers, parts)
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n".encode()
        raw = head + b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        raw += draw.choice((
            b"Content-Length: %d\r\n\r\n%b" % (len(data), data),
            b"Content-Length: %d\r\n\r\n%b" % (draw.choice((*NUMBERS, len(data) // 2, 10**30)), data),
            b"Content-Length: -5\r\n\r\n" + data, b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n" + data,
            b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(data), data),
            b"Transfer-Encoding: chunked\r\n\r\n%b\r\n%b" % (draw.choice((b"zz", b"-1", b"f" * 40, b"")), data),
            b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n" + data, b"\r\n" + data, data,
        ))  # fmt: skip
        raw = damage_bytes(raw, draw) if draw.random() < 0.3 else raw
        connection = socket.create_connection(self.address)
        return lambda: self.sent(connection, raw)

    def asked(self, method, path, headers, parts):
        """Through the application."""
        messages, waiting = [], list(parts)

        async def receive():
            if waiting:
                return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}
            await asyncio.sleep(TIME_LIMIT_S)
            return {"type": "http.disconnect"}

        async def send(message):
            messages.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
            "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1),
        }  # fmt: skip
        self.loop.run_until_complete(self.server.app(scope, receive, send))
        return answered(messages[0]["status"], b"".join(message.get("body", b"") for message in messages), method)

    def sent(self, connection, raw):
        """Through the socket; the server must be well afterwards."""
        found = b""
        with connection:
            connection.settimeout(0.3)
            with contextlib.suppress(TimeoutError, ConnectionError):
                connection.sendall(raw)
                while part := connection.recv(1 << 16):
                    found += part
        assert self.asked("GET", "/health", [], [b""]) == "used"
        if not found:
            return "closed"
        assert found[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4"), found[:500]
        return "used" if found[9:10] == b"2" else "refused"


def answered(status, body, method):
    if status == 200:
        return "used"
    assert 400 <= status < 500, (status, body[:500])
    assert method == "HEAD" or json.loads(body)["error"]["message"].isprintable(), body[:500]
    return "refused"


BENCHES = {
    "records": Records, "images": Images, "checkpoints": Checkpoints, "settings": Settings, "requests": Requests,
}  # fmt: skip


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
