"""README and docs: every snippet of Python runs, and every command is one that the command line takes."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from hermesflow.arguments import make_parser, with_settings
from hermesflow.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOT_RUN = {
    "Showo.from_pretrained": "the published class, which is not installed here (tests/hermesflow/drop_in runs it)",
    "MMadaModelLM.from_pretrained": "likewise",
    "accelerate(reference_model)": "a script of the published code (tests/hermesflow/drop_in)",
}
"""Snippets that need what a test does not have: only their syntax is checked."""
SHORTER = {"train.num_steps=100": "train.num_steps=2", "num_steps=20": "num_steps=2"}
NO_COMMAND = {
    "hermesflow curate --caption-scorer bert-cls --answer-scorer sentence ...": "the dots stand for the rest",
}


def indented(page: Path) -> str:
    """Commands of a page: its indented lines outside code fences, those that a backslash carries on joined."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.sub(r"\\\n\s+", "", "\n".join(line for line in text.splitlines() if line.startswith("    ")))


def commands() -> list:
    found = []
    for page in PAGES:
        for line in indented(page).splitlines():
            for part in re.split(r"\s&&\s", re.sub(r"\s#\s.*", "", line).strip()):
                words = part.removeprefix("PYTHONSAFEPATH=1 ").removeprefix("$ ").removeprefix(".venv/bin/")
                words = re.sub(r"^torchrun .* -m (?=hermesflow )", "", words)
                if re.match(r"hermesflow [a-z]", words) and words not in NO_COMMAND:
                    found.append(pytest.param(words, id=f"{page.name}: {words[:60]}"))
    return found


@pytest.mark.parametrize("command", commands())
def test_every_command_is_one(command):
    words = shlex.split(command)[1:]
    arguments = make_parser().parse_args(with_settings(words))
    shown = (
        arguments.config if arguments.config and str(arguments.config).startswith(("docs/", "benchmarks/")) else None
    )
    load_config(ROOT / shown if shown else None, [*arguments.set, *arguments.shortcuts])


def snippets() -> list:
    found = []
    for page in PAGES:
        for number, code in enumerate(
            re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL), 1
        ):
            found.append(pytest.param(code, id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", snippets())
def test_every_snippet_runs(code, tmp_path, monkeypatch, capsys):
    compile(code, "snippet", "exec")
    if any(needed in code for needed in NOT_RUN):
        return
    monkeypatch.chdir(tmp_path)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    names = {}
    if "runs/first" in code:
        make_pairs_of_a_run(tmp_path / "runs/first/round-1/pairs.parquet")
    if "records.jsonl" in code:
        write_records_file(tmp_path)
    exec(compile(code, "snippet", "exec"), names)


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    notebook = json.loads((ROOT / "docs/quickstart.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in cells:
        exec(compile(cell, "cell", "exec"), names)
    assert "pairs of 32 records" in capsys.readouterr().out and 0 <= names["metrics"]["generation"] <= 1
    assert all(not cell.get("outputs") for cell in notebook["cells"])


def some_records():
    from hermesflow import load_model
    from hermesflow.data.sources import encode_records
    from hermesflow.worlds.shapes import training_records

    return [record for record, _ in encode_records(load_model("tiny"), training_records(3, 16), 16)]


def write_records_file(folder: Path) -> None:
    question = {"question": "what color is the circle ?", "choices": ["red", "blue"], "answer": "red"}
    lines = []
    for number in range(8):
        Image.new("RGB", (64, 64), (30 * number, 0, 0)).save(folder / f"{number}.png")
        entry = {"id": str(number), "caption": "a large red circle on a white background", "image": f"{number}.png"}
        lines.append(json.dumps(entry | {"questions": [question]}))
    (folder / "records.jsonl").write_text("\n".join(lines))


def make_pairs_of_a_run(path: Path) -> None:
    from hermesflow import CurationConfig, curate, load_model, make_pairs
    from hermesflow.runtime.files import write_parquet

    config = CurationConfig(num_images=2, threshold=0.0, margin=0.0, keep="any", batch_records=4)
    [(records, candidates)] = curate(
        load_model("tiny"), some_records()[:4], config, seed=0, folder=path.parent / "parts"
    )
    write_parquet(path, make_pairs(records, candidates, config)[0])


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 10_240
    assert len((ROOT / "CONTRIBUTING.md").read_bytes()) <= 8_192
