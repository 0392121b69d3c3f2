"""The page of a run: whole in itself, nothing of the data taken as HTML, and honest about what is not there."""

import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pytest

from hermesflow.config import load_config, to_toml
from hermesflow.curation import CANDIDATES_SCHEMA, curate
from hermesflow.data.pairs import PAIRS_SCHEMA, make_pairs, pair_statistics
from hermesflow.evaluation.builtin import agreement
from hermesflow.evaluation.evaluation import evaluate
from hermesflow.evaluation.metrics import measure, summarize
from hermesflow.report.charts import CategoryBars, Measured, Stage, category_chart, gap_chart
from hermesflow.report.page import write_report
from hermesflow.report.tables import ONE_SIDED, describe_data
from hermesflow.runtime.files import InputError, read_json, read_parquet, write_json, write_parquet, write_text

EVIL = "<script>alert('x')</script> & \"quoted\""
SETTINGS = (
    "run.name=t", "selfplay.num_rounds=1", "curation.num_images=3", "curation.num_steps=2", "curation.threshold=0",
    "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[4]", "eval.num_prompts=6",
    "eval.num_understanding=6", "eval.num_steps=2",
)  # fmt: skip


class Reader(HTMLParser):
    """Collects elements and texts, and fails where an element is closed that is not open."""

    VOID = ("meta", "img", "circle", "line", "path", "polygon", "polyline", "rect", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def finished(shared_tiny_model, tiny_records, tmp_path_factory):
    """A run of one round, its files made as self-play makes them, training aside."""
    folder = tmp_path_factory.mktemp("run")
    shared_tiny_model.save(folder / "model")
    config = load_config(None, [*SETTINGS, f"model.name={folder / 'model'}"])
    run, model = folder / "t", shared_tiny_model
    write_text(run / "config.toml", to_toml(config))
    [(_, candidates)] = curate(model, tiny_records, config.curation, seed=1, folder=run / "round-1" / "candidates")
    pairs, rejected = make_pairs(tiny_records, candidates, config.curation)
    assert len(pairs) > 3, "the tiny model must give pairs, or there is nothing to show"
    write_parquet(run / "round-1" / "rejected.parquet", rejected)
    write_parquet(run / "round-1" / "pairs.parquet", pairs)
    evaluations = [evaluate(model, config.eval), evaluate(model, config.eval)]
    evaluations[1]["agreement"] = agreement(model, [(tiny_records, candidates, pairs)])
    for number, evaluation in enumerate(evaluations):
        write_json(run / f"round-{number}" / "evaluation.json", evaluation)
        write_json(run / f"round-{number}" / "seconds.json", {"evaluation": 1.25})
    write_json(run / "round-1" / "training.json", {"loss": 0.6931})
    before, rounds = summarize(evaluations)
    rounds[0] |= {
        "pairs": pair_statistics(pairs, rejected) | {"rejected": {"generation: margin of images too small": 2}},
        "agreement": evaluations[1]["agreement"],
        "training": {"loss": 0.6931},
        "seconds": {"evaluation": 1.25},
    }
    write_json(run / "summary.json", {"settings": {}, "seed": 0, "before": before, "rounds": rounds})
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(finished, tmp_path / "t")


def read(run):
    path = write_report(run)
    assert path == run / "report" / "index.html"
    return Reader(path.read_text("utf-8"))


def change_rows(path, schema, **columns):
    rows = [row | columns for row in read_parquet(path).to_pylist()]
    write_parquet(path, pa.Table.from_pylist(rows, schema))


def test_the_page_is_whole_in_itself(finished):
    page = read(finished)
    text = (finished / "report" / "index.html").read_text("utf-8")
    assert not re.search(r"http|//|@import|url\(", re.sub(r'src="data:[^"]*"', "", text))
    assert not page.all("script") and not page.all("link") and not page.all("iframe")
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.all("img"))
    assert all(image["alt"] for image in page.all("img")) and all(svg["aria-label"] for svg in page.all("svg"))
    boxes = [page.elements[i - 1][1].get("class") for i, (tag, _) in enumerate(page.elements) if tag == "table"]
    assert set(boxes) == {"scroll"}, "a wide table scrolls in its box, the page does not"


def test_the_page_tells_what_was_measured(finished):
    page, summary = read(finished), read_json(finished / "summary.json")
    assert "no significant change" in page.text  # both evaluations are of one model
    assert f"{100 * summary['before']['understanding']:.1f}" in page.text
    assert len(page.all("svg")) == 4
    for words in (
        "Before and after",
        "By category",
        "margin of images too small",
        "win truly better",
        "0.6931",
        "By sampler",
        "8/0.7, strict",
        "Understanding by what is asked",
        "balanced questions",
        "record questions",
        "win's caption less true",
    ):
        assert words in page.text
    assert "num_images = 3" in page.text  # the settings
    assert "not finished" not in page.text


def test_drawings_stand_side_by_side(finished):
    page, rows = read(finished), read_json(finished / "round-1" / "evaluation.json")["records"]
    before = read_json(finished / "round-0" / "evaluation.json")["records"]
    kept = [row for row in before + rows if "codes" in row]
    assert kept and "Drawings before and after" in page.text and "After round 1, same seeds" in page.text
    marks = [figure.get("class") for figure in page.all("figure")]
    digits = [image for row in kept for image in row["drawn"]]
    assert marks.count("right") == sum("0" not in image for image in digits)
    assert marks.count("wrong") == sum("0" in image for image in digits)
    assert all(row["prompt"] in page.text for row in kept)


@pytest.mark.parametrize(("source", "is_said"), [("shapes", False), ("own.jsonl", True)])
def test_data_that_is_not_measured_is_said(finished, source, is_said):
    summary = read_json(finished / "summary.json") | {"settings": {"data": {"source": source}}}
    assert any("measured on the built-in world of shapes, not on" in line for line in describe_data(summary)) == is_said


def test_a_run_of_before_kept_no_drawings(run):
    for path in run.glob("round-*/evaluation.json"):
        result = read_json(path)
        for row in result["records"]:
            row.pop("codes", None)
        path.write_text(json.dumps(result))
    assert "Drawings before and after" not in read(run).text


def test_the_pairs_are_shown_with_their_marks(finished):
    page, pairs = read(finished), read_parquet(finished / "round-1" / "pairs.parquet").to_pylist()
    assert all(pair["caption"] in page.text for pair in pairs)
    with_images = [pair for pair in pairs if pair["win_codes"]]
    for role in ("win", "lose"):
        assert [figure.get("class") for figure in page.all("figure")].count(role) == len(with_images)
        classes = [item.get("class", "").split() for item in page.all("li")]
        assert sum(role in names for names in classes) == sum(pair["win_caption"] is not None for pair in pairs)
    drawings = [figure.get("class") in ("right", "wrong") for figure in page.all("figure")]
    assert drawings.count(False) == 3 * len(pairs)  # num_images
    assert len(page.all("img")) == 4 * len(pairs) + sum(drawings)  # and the real one


def test_an_untrue_caption_is_no_plain_win(run):
    """Whoever has won, a caption that states other facts than the picture shows says so; a true one does not."""
    path, truth = run / "round-1" / "pairs.parquet", "a small red circle in the top left on a black background"
    change_rows(path, PAIRS_SCHEMA, caption=truth, win_caption=f"there is {truth}", lose_caption="a red square")
    page = read(run)
    kept = sum(pair["win_caption_ids"] is not None for pair in read_parquet(path).to_pylist())
    classes = [item.get("class") for item in page.all("li")]
    assert kept and classes.count("win") >= kept and classes.count("lose untrue") >= kept
    assert "win, but untrue" not in page.text
    change_rows(path, PAIRS_SCHEMA, win_caption="a small blue circle in the top left on a black background")
    page = read(run)
    classes = [item.get("class") for item in page.all("li")]
    assert "win" not in classes and classes.count("win untrue") >= kept and "win, but untrue" in page.text


def old_form(evaluation):
    """An evaluation as it was before balanced questions were asked."""
    rows = [
        {name: value for name, value in row.items() if name not in ("balanced", "kinds", "samplers")}
        for row in evaluation["records"]
    ]
    metrics = measure(rows)
    for name in ("judge", "num_questions"):
        del metrics[name]
    return evaluation | {"records": rows, "metrics": metrics}


@pytest.mark.parametrize("finished_by", ["a summary", "its evaluations"])
def test_a_run_of_before_says_by_which_measure(run, finished_by):
    evaluations = [read_json(run / f"round-{number}" / "evaluation.json") for number in (0, 1)]
    old = [old_form(evaluation) for evaluation in evaluations]
    for number, evaluation in enumerate(old):
        write_json(run / f"round-{number}" / "evaluation.json", evaluation)
    before, rounds = summarize(old)
    trust = {name: value for name, value in evaluations[1]["agreement"].items() if "caption" not in name}
    summary = {"settings": {}, "seed": 0, "before": before, "rounds": [rounds[0] | {"agreement": trust}]}
    write_json(run / "summary.json", summary)
    if finished_by != "a summary":
        (run / "summary.json").unlink()
    page = read(run)
    assert ONE_SIDED in page.text and "record questions, which ask only of what is there" in page.text
    assert "balanced questions about" not in page.text and "By sampler" not in page.text


def test_text_of_the_data_is_no_html(run):
    change_rows(run / "round-1" / "pairs.parquet", PAIRS_SCHEMA, caption=EVIL, category=EVIL, win_caption=EVIL)
    answers = json.dumps([{"question": EVIL, "answer": EVIL, "expected": EVIL, "probability": 0.5}])
    for part in (run / "round-1" / "candidates").iterdir():
        change_rows(part, CANDIDATES_SCHEMA, text=EVIL, answers=answers)
    summary = read_json(run / "summary.json")
    for metrics in (summary["before"], *summary["rounds"]):
        metrics["by_category"] = {EVIL: next(iter(metrics["by_category"].values()))}
        metrics |= dict.fromkeys(("num_understanding", "num_images", "num_prompts", "num_questions"), EVIL)
        metrics["samplers"] = {EVIL: next(iter(metrics["samplers"].values()))}
        metrics["understanding_by_kind"] = {EVIL: 0.5, f"{EVIL}_ci95": [0.4, 0.6]}
    summary["rounds"][0]["pairs"]["rejected"] = {EVIL: 1}
    write_json(run / "summary.json", summary)
    page = read(run)
    assert not page.all("script")
    assert EVIL in page.text


@pytest.mark.parametrize(
    ("gone", "message", "shows"),
    [
        (["round-0", "round-1"], "Nothing has been measured yet", "No round has its pairs yet"),
        (["round-1"], "the pairs of round 1, the evaluation of round 1", "Before self-play the model answers"),
        (
            ["round-1/evaluation.json", "round-1/training.json"],
            "yet: the evaluation of round 1.",
            "Pairs of round 1",
        ),
        ([], "After 1 round", "the oracle's score, mean"),
    ],
    ids=["begun", "measured once", "curated", "all but the summary"],
)
def test_an_unfinished_run_says_what_is_missing(run, gone, message, shows):
    (run / "summary.json").unlink()
    for name in gone:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    page = read(run)
    assert message in page.text and shows in page.text
    assert ("time: 2 s (evaluation 2 s)" in page.text) == (gone == [])
    assert ("time: 1 s (evaluation 1 s)" in page.text) == (bool(gone) and "round-0" not in gone)
    assert ("This run is not finished" in page.text) == bool(gone)


def test_a_round_without_pairs(run):
    write_parquet(run / "round-1" / "pairs.parquet", PAIRS_SCHEMA.empty_table())
    assert "Round 1 kept no pair." in read(run).text


def test_candidates_that_were_deleted(run):
    shutil.rmtree(run / "round-1" / "candidates")
    assert "The candidates are not there any more." in read(run).text


def test_images_of_the_round_before_are_known_by_their_codes(run):
    path = run / "round-1" / "candidates" / "part-00000.parquet"
    rows = read_parquet(path).to_pylist()
    pairs = [row for row in read_parquet(run / "round-1" / "pairs.parquet").to_pylist() if row["win_codes"]][:1]
    image = next(row for row in rows if row["record_id"] == pairs[0]["record_id"] and row["kind"] == "image")
    pairs[0] |= {"lose_image_index": -1, "lose_caption": "an older one", "lose_caption_score": 0.125}
    rows.append(image | {"kind": "previous_win", "token_ids": pairs[0]["lose_codes"]})
    write_parquet(path, pa.Table.from_pylist(rows, CANDIDATES_SCHEMA))
    write_parquet(run / "round-1" / "pairs.parquet", pa.Table.from_pylist(pairs, PAIRS_SCHEMA))
    page = read(run)
    assert [figure.get("class") for figure in page.all("figure")].count("lose") == 1
    assert any("previous win" in image["alt"] and "lose" in image["alt"] for image in page.all("img"))
    assert "an older one" in page.text and "previous round" in page.text


def test_a_data_set_of_ones_own_has_no_oracle(run):
    config = (run / "config.toml").read_text("utf-8").replace('source = "shapes"', 'source = "mine.parquet"')
    (run / "config.toml").write_text(config)
    page = read(run)
    assert not any("oracle" in image["alt"] for image in page.all("img"))


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no run .there is no config.toml.; give the folder of one"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["summary.json", "round-1/pairs.parquet", "round-1/candidates/part-00000.parquet"])
def test_a_damaged_file_is_named(run, name):
    (run / name).write_bytes(b"damaged")
    with pytest.raises(InputError, match=f"{name}: damaged"):
        write_report(run)
    assert not (run / "report").exists() or not list((run / "report").glob(".*"))


@pytest.mark.parametrize(
    "value", [{}, [], None, 7, {"before": {}, "rounds": []}, {"before": {"gap": "x"}, "rounds": [1]}]
)
@pytest.mark.parametrize("name", ["summary", "round-0/evaluation", "round-1/evaluation"])
def test_json_that_is_something_else_is_named(run, name, value):
    if name != "summary":
        (run / "summary.json").unlink()
    write_json(run / f"{name}.json", value)
    with pytest.raises(InputError, match=f"{name}.json: damaged (summary|evaluation) file .*; restore it"):
        write_report(run)


@pytest.mark.parametrize("value", [[], {"a": "x"}, {"a": []}], ids=["list", "text", "nested"])
@pytest.mark.parametrize("name", ["round-1/training", "round-1/seconds", "round-0/seconds"])
def test_numbers_of_a_round_that_are_something_else_are_named(run, name, value):
    (run / "summary.json").unlink()
    write_json(run / f"{name}.json", value)
    name = name.partition("/")[2]
    with pytest.raises(InputError, match=f"{name}.json: damaged {name} file"):
        write_report(run)


def test_a_kind_of_candidate_is_no_html(run):
    path = run / "round-1" / "candidates" / "part-00000.parquet"
    rows = [row | {"kind": "<script>"} if row["kind"] == "image" else row for row in read_parquet(path).to_pylist()]
    write_parquet(path, pa.Table.from_pylist(rows, CANDIDATES_SCHEMA))
    page = read(run)
    assert not page.all("script") and "<script>" in page.text


def test_charts_of_one_stage_and_of_missing_values():
    full, none = Measured(1.0, 1.0, 1.0), Measured(0.0, 0.0, 0.0)
    for stages in ([Stage("before", full, none)], [Stage("<a>", full, full), Stage("b", none, none)]):
        chart = Reader(gap_chart(stages))
        assert len(chart.all("circle")) == 2 * len(stages)
        for point in chart.all("circle"):
            assert 0 <= float(point["cy"]) <= 290 and 0 <= float(point["cx"]) <= 400
    rows = [CategoryBars("a", full, None), CategoryBars("b", None, none)]
    bars = Reader(category_chart("generation", rows, ("x", "y")))
    assert [bar["class"] for bar in bars.all("rect") if "bar" in bar["class"]] == [
        "bar generation before",
        "bar generation after",
    ]
