"""Ctrl-C, as a real SIGINT to a process: what is there is whole, nothing else is left, and the work can be resumed."""

import signal
import subprocess
import sys
import time

from PIL import Image

from hermesflow.runtime.files import read_parquet

CURATION = (
    "data.num_records=60", "curation.num_images=2", "curation.num_steps=2", "curation.batch_records=2",
    "curation.threshold=0", "curation.margin=0", "curation.keep=any", "curation.caption_top_k=[4]", "run.name=t",
)  # fmt: skip


def start(*arguments):
    command = [sys.executable, "-P", "-m", "hermesflow", *arguments]
    # A shell's background jobs ignore SIGINT, and so would all processes below them.
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def interrupt(process, folder, pattern):
    """Sends SIGINT as soon as there is a first file; returns stderr."""
    while process.poll() is None and not list(folder.rglob(pattern)):
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    return stderr


def unfinished_files(folder):
    return [path for path in folder.rglob(".*") if path.name != ".lock"]


def test_an_interrupted_curation_goes_on_to_the_same_pairs(shared_tiny_model, tmp_path):
    model = tmp_path / "model"
    shared_tiny_model.save(model)

    def command(folder):
        settings = (*CURATION, f"model.name={model}", f"run.folder={folder}")
        return ["curate", *(item for setting in settings for item in ("--set", setting))]

    cut, whole = tmp_path / "cut", tmp_path / "whole"
    stderr = interrupt(start(*command(cut)), cut, "candidates/part-*.parquet")
    assert stderr.splitlines()[-1] == "hermesflow: stopped; the same command resumes where it stopped"
    assert "Traceback" not in stderr and not unfinished_files(cut)
    parts = sorted(cut.rglob("candidates/part-*.parquet"))
    assert 0 < len(parts) < 30
    assert all(len(read_parquet(part)) for part in parts)
    times = [part.stat().st_mtime_ns for part in parts]
    for folder in (cut, whole):
        process = start(*command(folder))
        assert process.communicate(timeout=120) and process.returncode == 0
    assert [part.stat().st_mtime_ns for part in parts] == times
    pairs = [read_parquet(folder / "t/round-1/pairs.parquet") for folder in (cut, whole)]
    assert len(pairs[0]) and pairs[0].equals(pairs[1])


def test_interrupted_pictures_are_whole(tmp_path):
    prompts = tmp_path / "pictures"
    process = start("generate", "a red circle", "--num-images", "5000", "-o", str(prompts))
    stderr = interrupt(process, tmp_path, "*.png")
    assert stderr.splitlines()[-1].startswith("hermesflow: stopped") and "Traceback" not in stderr
    pictures = list(prompts.glob("*.png"))
    assert 0 < len(pictures) < 5000 and not unfinished_files(prompts)
    for picture in pictures:
        with Image.open(picture) as image:
            image.load()
