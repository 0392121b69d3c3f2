"""Tables of benchmark lines in a Markdown file; test_ops.py and test_e2e.py have the lines themselves."""

import shutil
from pathlib import Path

import pytest

from hermesflow import cli
from hermesflow.benchmarks import lines

ROOT = Path(__file__).parents[2]
OP = {
    "bench": "ops", "case": "mask_topk", "shape": "B 64, N 1024", "dtype": "float32", "backend": "cpu",
    "baseline": "naive", "ms_p20": 0.9, "ms_p50": 1.0, "ms_p80": 1.2, "baseline_ms_p50": 4.0, "speedup": 4.0,
    "peak_mib": 0.0625, "baseline_peak_mib": 2.0, "gb_s": 0.393, "tflop_s": 0.000524, "roof_fraction": 0.0393,
    "device": "a CPU", "torch": "2.11.0", "triton": None, "commit": "0123456789", "date": "2025-01-01T00:00:00+00:00",
}  # fmt: skip
TASK = OP | {
    "bench": "e2e",
    "case": "images",
    "shape": "tiny: 4 images",
    "backend": "engine",
    "mfu": 0.25,
    "items_per_s": {"images": 3.0, "image tokens": 48.0},
    "num_rounds": 3,
    "baseline_rounds": 1,
    "baseline_scaled": None,
}
HEAD = "a CPU, torch 2.11.0, commit 0123456789, 2025-01-01\n\n| case | shape | backend | ms | of the roof |"


@pytest.fixture
def readme(tmp_path):
    """A file with both kinds of markers, and lines for them."""
    lines.write_lines(tmp_path / "ops.jsonl", [OP, OP | {"backend": "torch"}])
    lines.write_lines(tmp_path / "e2e.jsonl", [TASK])
    path = tmp_path / "README.md"
    end = "<!-- /results -->\n"
    path.write_text(f"# A\n\n<!-- results ops cpu -->\nold\n{end}B\n<!-- results e2e -->\n{end}")
    return path


def update(readme, *names):
    return cli.main(["bench", "table", "--readme", str(readme), *(str(readme.parent / name) for name in names)])


def test_tables_stand_between_the_markers(readme):
    assert update(readme, "ops.jsonl", "e2e.jsonl") == 0
    text = readme.read_text()
    assert text.startswith(f"# A\n\n<!-- results ops cpu -->\n\n{HEAD}") and text.endswith("|\n\n<!-- /results -->\n")
    assert "old" not in text and text.count("mask_topk") == 1 and "| torch |" not in text
    assert "| images | tiny: 4 images, float32 | engine | 1 | 3.9% | 3 images/s, 48 image tokens/s, MFU 25% |" in text
    assert "\n<!-- /results -->\nB\n<!-- results e2e -->\n" in text
    assert update(readme, "ops.jsonl", "e2e.jsonl") == 0
    assert readme.read_text() == text


@pytest.mark.parametrize(
    ("page", "names"),
    [("README.md", ("e2e",)), ("docs/benchmarks.md", ("e2e", "train")), ("docs/kernels.md", ("ops",))],
    ids=["readme", "benchmarks", "kernels"],
)
def test_pages_show_the_lines_in_benchmarks_results(page, names, tmp_path):
    copy = tmp_path / "page.md"
    shutil.copy(ROOT / page, copy)
    files = sorted(path for name in names for path in (ROOT / "benchmarks" / "results").glob(f"{name}-*.jsonl"))
    lines.update_readme(copy, [line for path in files for line in lines.read_lines(path)])
    command = f"hermesflow bench table --readme {page} benchmarks/results/{{{','.join(names)}}}-*.jsonl"
    assert copy.read_text() == (ROOT / page).read_text(), f"run: {command}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"no markers\n", "has no markers; add <!-- results ops -->"),
        (b"<!-- results train -->\n<!-- /results -->\n", "no lines for its marker results train; give the files"),
        (b"\xff", "not UTF-8 text; save it as UTF-8"),
    ],
    ids=["no_markers", "no_lines", "no_text"],
)
def test_a_readme_that_cannot_be_updated(text, message, readme, capsys):
    readme.write_bytes(text)
    assert update(readme, "ops.jsonl") == 2
    assert message in capsys.readouterr().err
    assert readme.read_bytes() == text
