"""The browser of pairs: what its filter reads of each pair, and text of the data as text."""

import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest

from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.report import browser
from hermesflow.report.browser import write_browser

EVIL = "\"'><script>alert(1)</script>&"


class Reader(HTMLParser):
    """Every tag with its attributes, and the text outside of scripts."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.text, self._open = [], "", ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_data(self, data):
        self.text += "" if self._open == "script" else data

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def pair(number, category="other", sides="both", caption="a red circle"):
    codes = np.random.default_rng(number).integers(0, 32, (3, 16)).tolist()
    row = dict.fromkeys(PAIRS_SCHEMA.names) | {
        "record_id": f"r{number}", "category": category, "caption": caption, "sides": sides, "record_codes": codes[0],
    }  # fmt: skip
    if sides != "understanding":
        row |= {"win_codes": codes[1], "lose_codes": codes[2], "win_image_score": 0.75, "lose_image_score": 0.5}
    if sides != "generation":
        row |= {"win_caption": caption, "lose_caption": caption, "win_caption_score": 1.0, "lose_caption_score": 0.25}
    return row


@pytest.fixture
def write(shared_tiny_model, tmp_path):
    def write(rows):
        path = write_browser(pa.Table.from_pylist(rows, PAIRS_SCHEMA), 2, shared_tiny_model, tmp_path / "pairs.html")
        return Reader(path.read_text("utf-8"))

    return write


def test_each_pair_says_what_the_filter_reads(write):
    page = write([pair(0), pair(1, "colors", "generation"), pair(2, "counting", "understanding")])
    data = [{key: value for key, value in attrs.items() if key.startswith("data-")} for attrs in page.all("article")]
    names = ("data-category", "data-image-win", "data-image-lose", "data-caption-win", "data-caption-lose")
    assert [tuple(item[name] for name in names) for item in data] == [
        ("other", "0.75", "0.5", "1.0", "0.25"), ("colors", "0.75", "0.5", "", ""), ("counting", "", "", "1.0", "0.25"),
    ]  # fmt: skip
    assert [attrs.get("value") for attrs in page.all("option")] == ["", "colors", "counting", "other", "", None, None]
    assert len(page.all("img")) == 3 + 3 + 1 and all(attrs["alt"] for attrs in page.all("img"))
    assert "Pairs of round 2" in page.text and "all 3." in page.text


def test_of_many_pairs_some_at_equal_distances(write, monkeypatch):
    monkeypatch.setattr(browser, "NUM_PAIRS", 4)
    page = write([pair(number) for number in range(11)])
    assert re.findall(r"r\d+", page.text) == ["r0", "r3", "r6", "r9"] and "4 of 11, at equal distances" in page.text


def test_text_of_the_data_is_no_html(write):
    page = write([pair(0, EVIL, caption=EVIL)])
    assert len(page.all("script")) == 1 and EVIL in page.text
    assert page.all("article")[0]["data-category"] == page.all("option")[1]["value"] == EVIL


def test_without_pairs(write):
    assert "all 0." in write([]).text
