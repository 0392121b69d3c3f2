"""The predictions for a GPU: between nothing and the roof, and as docs/kernels.md has them."""

import dataclasses
from pathlib import Path

import pytest

from hermesflow.benchmarks.roof_model import Assumptions, predictions, table

DOCS = Path(__file__).resolve().parents[2] / "docs/kernels.md"


def test_no_case_beats_its_roof():
    for found in predictions(Assumptions()):
        assert 0 < found.share <= 1 and found.seconds > 0 and found.limiter, found.case


@pytest.mark.parametrize("name", ["copy", "matmul", "issue", "gemm", "gemv", "elementwise", "attention"])
def test_what_is_faster_makes_nothing_slower(name):
    faster = dataclasses.replace(Assumptions(), **{name: getattr(Assumptions(), name) * 1.05})
    before, after = predictions(Assumptions()), predictions(faster)
    assert all(new.seconds <= old.seconds * (1 + 1e-9) for old, new in zip(before, after, strict=True))
    assert any(new.seconds < old.seconds for old, new in zip(before, after, strict=True))


def test_the_page_shows_them():
    assert table(Assumptions()) in DOCS.read_text("utf-8")
