"""What a round sends to its tracker, read back from the real TensorBoard, W&B (offline) and trackio (local files)."""

import json
import re
import shutil
import struct
import sys
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from hermesflow.config import load_config
from hermesflow.data.pairs import read_pairs
from hermesflow.runs import Run, samples
from hermesflow.runtime.files import InputError, write_json, write_parquet
from hermesflow.selfplay import evaluate_round, run_selfplay

SETTINGS = (
    "run.name=t", "data.num_records=12", "curation.num_images=2", "curation.num_steps=2", "curation.threshold=0",
    "curation.margin=0", "curation.keep=any", "train.num_steps=1", "eval.num_prompts=9", "eval.num_understanding=4",
    "eval.num_steps=2", "eval.samplers=[]", "selfplay.num_rounds=1",
)  # fmt: skip
HOSTILE = "<script>alert(1)</script> | *red* [link](http://x) ![i](http://x/y.png) &amp; \\ 1. `code`"
SCORES = {"evaluation/understanding", "evaluation/generation", "evaluation/gap"}


@pytest.fixture(scope="module")
def whole(shared_tiny_model, tmp_path_factory):
    """A run of one round without a tracker, whose first prompt and first caption are hostile."""
    folder = tmp_path_factory.mktemp("whole")
    shared_tiny_model.save(folder / "model")
    run_selfplay(load_config(None, [*SETTINGS, f"model.name={folder / 'model'}", f"run.folder={folder}"]))
    for number in (0, 1):
        path = folder / f"t/round-{number}/evaluation.json"
        evaluation = json.loads(path.read_text())
        evaluation["records"][0]["prompt"] = HOSTILE
        write_json(path, evaluation)
    path = folder / "t/round-1/pairs.parquet"
    rows = read_pairs(path).to_pylist()
    assert len(rows) > samples.NUM_SENT
    rows[0] |= dict.fromkeys(("win_caption", "caption"), HOSTILE)
    write_parquet(path, pa.Table.from_pylist(rows, read_pairs(path).schema))
    return folder


def settings(place, tracker):
    """Those of the run, with a tracker and the folder that it lies in now."""
    return load_config(place / "t/config.toml", [f"run.folder={place}", f"train.tracker={tracker}"])


@pytest.fixture
def place(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "place")
    return tmp_path / "place"


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Services that keep to this test's folder and this machine."""
    for variable in ("TRACKIO_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")


def read_tensorboard(folder):
    """{step: {name: a number, (width, height) of a picture, or Markdown}}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / "tensorboard"), {"images": 0, "tensors": 0, "scalars": 0}).Reload()
    found = {}
    tags = events.Tags()
    for kind, read in (
        ("scalars", lambda event: event.value),
        ("images", lambda event: (event.width, event.height)),
        ("tensors", lambda event: make_ndarray(event.tensor_proto).item().decode()),
    ):
        for tag in tags[kind]:
            for event in getattr(events, kind.title())(tag):
                at_step = found.setdefault(event.step, {})
                assert tag not in at_step  # once
                at_step[tag] = read(event)
    return found


def read_wandb(folder):
    """{step: {name: a number, or what the service gets of a picture or table}}."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in leveldb_records(path.read_bytes()):
            values = {}
            for item in Record.FromString(data).history.item:
                name, *key = item.nested_key
                value = json.loads(item.value_json)
                values[name] = values.get(name, {}) | {key[0]: value} if key else value
            if values:
                assert values["_step"] not in found  # once
                found[values["_step"]] = values
    return found


def leveldb_records(data):
    """The records of a log of W&B: 7 bytes of header, then blocks of 32 KiB with (crc, length, type) before a piece."""
    position, pieces = 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        length, kind = struct.unpack("<4xHB", data[position : position + 7])
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole or the last piece
            yield pieces
            pieces = b""


class Seen(HTMLParser):
    """All tags of a page, and the texts of its paragraphs and cells."""

    def __init__(self, markdown):
        from tensorboard.plugin_util import markdown_to_safe_html

        super().__init__()
        self.tags, self.texts, self._inside = set(), [], False
        self.feed(markdown_to_safe_html(markdown))

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag in ("td", "th", "p"):
            self._inside = True
            self.texts.append("")

    def handle_endtag(self, tag):
        self._inside &= tag not in ("td", "th", "p")

    def handle_data(self, data):
        if self._inside:
            self.texts[-1] += data


def send(place, tracker):
    config = settings(place, tracker)
    for _ in range(2):  # the second sends nothing
        run = Run(config)
        for number in (0, 1):
            evaluate_round(run, number)
        run._lock.close()
    assert json.loads((place / "t/round-1/sent.json").read_text()) == {"tracker": tracker}
    return place / "t"


def pictures(names):
    """How many pictures of each kind."""
    kinds = [name.partition("/")[0] for name in names]
    return kinds.count("drawings"), kinds.count("pairs")


def check_table(place, table):
    rows = read_pairs(place / "t/round-1/pairs.parquet").to_pylist()[:8]
    keys = ("caption", "win_caption", "win_caption_score", "lose_caption", "lose_caption_score")
    assert table["columns"] == ["caption", "win", "win score", "lose", "lose score"]
    assert table["data"] == [[row[key] for key in keys] for row in rows] and table["data"][0][1] == HOSTILE


def test_tensorboard_gets_pictures_and_text(place):
    pytest.importorskip("tensorboard")
    found = read_tensorboard(send(place, "tensorboard"))
    assert found.keys() == {0, 1} and found[0].keys() >= SCORES and found[1].keys() >= SCORES
    evaluation = json.loads((place / "t/round-1/evaluation.json").read_text())
    assert found[1]["evaluation/gap"] == pytest.approx(evaluation["metrics"]["gap"])
    for step, num_pairs in ((0, 0), (1, 8)):
        sizes = {name: value for name, value in found[step].items() if isinstance(value, tuple)}
        assert pictures(sizes) == (8, num_pairs)
        num_images = {
            name: 2 if name.startswith("pairs") else evaluation["settings"]["images_per_prompt"] for name in sizes
        }
        assert all(size[0] == num_images[name] * (128 + 8) + 8 and size[1] > 128 for name, size in sizes.items())
    page = Seen(found[1]["drawings/1/text_summary"])
    assert page.tags == {"p"} and page.texts == [HOSTILE]
    page = Seen(found[1]["pairs/1/text_summary"])
    [text] = page.texts
    assert page.tags == {"p"} and text.startswith(HOSTILE) and re.search(r" \(win \d\.\d\d, lose \d\.\d\d\)$", text)
    page = Seen(found[1]["captions/text_summary"])
    assert page.tags == {"table", "thead", "tbody", "tr", "th", "td"} and len(page.texts) == 5 * (1 + 8)
    assert page.texts[:5] == ["caption", "win", "win score", "lose", "lose score"]
    row = read_pairs(place / "t/round-1/pairs.parquet").to_pylist()[0]
    assert page.texts[5:10] == [HOSTILE, HOSTILE, str(row["win_caption_score"]), row["lose_caption"],
                                str(row["lose_caption_score"])]  # fmt: skip


def test_wandb_gets_pictures_and_a_table(place, offline):
    wandb = pytest.importorskip("wandb")
    folder = send(place, "wandb")
    wandb.teardown()
    found = read_wandb(folder)
    assert found.keys() == {0, 1} and found[0].keys() >= SCORES and found[1].keys() >= SCORES
    for step, num_pairs in ((0, 0), (1, 8)):
        sent = {name: value for name, value in found[step].items() if isinstance(value, dict) and "caption" in value}
        assert pictures(sent) == (8, num_pairs) and sent["drawings/1"]["caption"] == HOSTILE
        for value in sent.values():
            file, *_ = folder.glob(f"wandb/offline-run-*/files/{value['path']}")
            assert Image.open(file).size == (value["width"], value["height"])
    assert found[1]["pairs/1"]["caption"].startswith(f"{HOSTILE} (win ")
    [file] = folder.glob(f"wandb/offline-run-*/files/{found[1]['captions']['path']}")
    check_table(place, json.loads(file.read_text()))


@pytest.mark.filterwarnings("error:trackio")  # it warns of what it leaves out
def test_trackio_gets_pictures_and_a_table(place, offline, tmp_path):
    assert "trackio" not in sys.modules, "it reads its folder's name when it is imported"
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    folder = send(place, "trackio")
    [name] = SQLiteStorage.get_runs("hermesflow")
    logs = SQLiteStorage.get_logs("hermesflow", name)
    assert [log["step"] for log in logs] == [0, 1] and logs[0].keys() >= SCORES and logs[1].keys() >= SCORES
    assert name.startswith(str(folder).replace("/", " ").strip())
    for log, num_pairs in zip(logs, (0, 8), strict=True):
        sent = {key: value for key, value in log.items() if isinstance(value, dict) and "caption" in value}
        assert pictures(sent) == (8, num_pairs) and sent["drawings/1"]["caption"] == HOSTILE
        for value in sent.values():
            assert np.asarray(Image.open(tmp_path / "TRACKIO_DIR/media" / value["file_path"])).std() > 0
    assert logs[1]["pairs/1"]["caption"].startswith(f"{HOSTILE} (win ")
    table = logs[1]["captions"]["_value"]
    check_table(place, {"columns": list(table[0]), "data": [list(row.values()) for row in table]})


def test_a_service_that_fails_leaves_the_round_whole_and_is_tried_again(place, monkeypatch):
    pytest.importorskip("tensorboard")
    run = Run(settings(place, "tensorboard"))
    before = (place / "t/round-1/evaluation.json").read_bytes()

    def fail(*args, **kwargs):
        raise ConnectionError("gone")

    with monkeypatch.context() as patch:
        patch.setattr("torch.utils.tensorboard.SummaryWriter.add_image", fail)
        with pytest.raises(ConnectionError, match="gone"):
            evaluate_round(run, 1)
    assert not (place / "t/round-1/sent.json").exists()
    assert (place / "t/round-1/evaluation.json").read_bytes() == before
    evaluate_round(run, 1)
    assert pictures(name for name, value in read_tensorboard(place / "t")[1].items() if isinstance(value, tuple)) == (
        8,
        8,
    )


def test_no_tracker_sends_nothing(whole):
    assert not list((whole / "t").glob("round-*/sent.json")) and not (whole / "t/tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_refused_before_the_first_evaluation(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = load_config(
        None, [*SETTINGS, f"model.name={whole / 'model'}", f"run.folder={tmp_path}", "train.tracker=wandb"]
    )
    with pytest.raises(InputError, match="train.tracker wandb: it is not installed; run: pip install wandb"):
        run_selfplay(config)
    assert not list(tmp_path.iterdir())


def test_rows_of_a_users_evaluation_are_not_taken_for_drawings(place, monkeypatch):
    pytest.importorskip("tensorboard")
    run = Run(settings(place, "tensorboard"))
    object.__setattr__(run.config.eval, "suite", "my_module:MINE")
    rows = [{"id": "a", "prompt": "p", "codes": "my own", "drawn": 3, "scores": {}}]
    samples.send_round(run, 0, {"metrics": {"mine": 0.5}, "records": rows})
    assert read_tensorboard(place / "t") == {0: {"evaluation/mine": 0.5}}
