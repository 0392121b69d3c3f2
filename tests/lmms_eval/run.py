"""Runs three tasks of lmms-eval on the built-in model, offline, and holds them to what the model itself does.

make test-eval      (an environment of its own, for lmms-eval asks for much)
"""

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from hermesflow import load_model
from hermesflow.data.records import Question
from hermesflow.engine.image_tokenizers.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig
from hermesflow.engine.weights import save_tensors
from hermesflow.worlds import oracle, shapes

HERE = Path(__file__).parent
NUM_SCENES = 40
# PyPI's torchvision may be of another build than torch: where it cannot load, what it asks for is declared first.
START = """
import runpy, sys, torch
try:
    import torchvision
except Exception:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
sys.argv[0] = "lmms_eval"
runpy.run_module("lmms_eval", run_name="__main__")
"""
FAMILIES = (
    START.partition("sys.argv")[0]
    + """
sys.path.insert(0, HERE)
import families
families.check(sys.argv[1:])
"""
)


def write_data(folder: Path) -> None:
    """Questions about real images, and captions to draw."""
    rng, questions, captions = np.random.default_rng(0), [], []
    for number, scene in enumerate(shapes.sample_scenes("test", NUM_SCENES, seed=11)):
        record, buffer = shapes.make_record(scene, str(number), rng), io.BytesIO()
        Image.fromarray(record.image).save(buffer, format="PNG")
        for item in record.questions:
            row = {"question": item.question, "choices": json.dumps(item.choices), "answer": item.answer}
            questions.append(row | {"image": buffer.getvalue()})
        asked = [
            {"question": item.question, "choices": item.choices, "answer": item.answer, "element_type": "",
             "element": item.element}
            for item in record.questions
        ]  # fmt: skip
        captions += [{"caption": record.caption, "questions": json.dumps(asked)}] * 2
    pq.write_table(pa.Table.from_pylist(questions), folder / "questions.parquet")
    pq.write_table(pa.Table.from_pylist(captions), folder / "captions.parquet")


def known_figures(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """What the model does without lmms-eval: each metric's value and how far lmms-eval's may be from it.

    Answers must be the same. Drawings have other seeds: three standard errors of the difference over the scenes.
    """
    model = load_model("tiny", "cpu")
    asked, drawn = (pq.read_table(folder / f"{name}.parquet").to_pylist() for name in ("questions", "captions"))
    images = [Image.open(io.BytesIO(row["image"])).convert("RGB") for row in asked]
    said = model.answer(images, [row["question"] for row in asked])
    right = np.mean([text == row["answer"] for text, row in zip(said, asked, strict=True)])
    chosen = [
        model.answer([image], row["question"], json.loads(row["choices"]))[0]
        for image, row in zip(images, asked, strict=True)
    ]
    accuracy = np.mean([text == row["answer"] for text, row in zip(chosen, asked, strict=True)])
    pictures = model.generate([row["caption"] for row in drawn], seed=99)
    scores = []
    for row, seen in zip(drawn, oracle.read(np.stack([np.asarray(picture) for picture in pictures])), strict=True):
        questions = [Question(**(item | {"choices": tuple(item["choices"])})) for item in json.loads(row["questions"])]
        scores.append(oracle.score(questions, seen))
    of_scenes = np.array(scores, dtype=float).reshape(NUM_SCENES, -1, 2).mean(1)
    room = 3 * (2 * of_scenes.var(axis=0) / NUM_SCENES) ** 0.5
    return {
        ("shapes_vqa", "right,none"): (float(right), 1e-9),
        ("shapes_choices", "acc,none"): (float(accuracy), 1e-9),
        ("shapes_draw", "questions,none"): (float(of_scenes[:, 0].mean()), float(room[0])),
        ("shapes_draw", "strict,none"): (float(of_scenes[:, 1].mean()), float(room[1])),
    }


def write_checkpoints(folder: Path) -> list[str]:
    """Families of each kind: masked, code by code, by features, and latents; weights are random or built in."""
    data = HERE.parent / "data"
    bagel = shutil.copytree(data / "bagel-tiny", folder / "bagel")
    small = KLAutoencoderConfig(channels=8, channel_multipliers=(1, 1, 2, 2), num_res_blocks=1, num_groups=8)
    save_tensors(KLAutoencoder(small).state_dict(), bagel / "ae.safetensors")
    return ["tiny-ar", "tiny-flow", str(data / "emu3-tiny"), str(data / "janus-tiny"), str(bagel)]


def main() -> None:
    """Runs the tasks and checks their figures."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        tasks = shutil.copytree(HERE, folder / "tasks", ignore=shutil.ignore_patterns("run.py", "__pycache__"))
        for path in tasks.glob("*.yaml"):
            path.write_text(path.read_text().replace("DATA", str(folder)))
        command = [sys.executable, "-P", "-c", START, "--model", "hermesflow", "--model_args",
                   f"model=tiny,seed=3,output={folder / 'drawn'}", "--tasks", "shapes_vqa,shapes_choices,shapes_draw",
                   "--include_path", str(tasks), "--batch_size", "64", "--device", "cpu",
                   "--output_path", str(folder / "out")]  # fmt: skip
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
        subprocess.run(command, check=True, env=os.environ | offline | {"PYTHONSAFEPATH": "1"}, cwd=folder)
        (path,) = (folder / "out").rglob("*results.json")
        results = json.loads(path.read_text())["results"]
        known = known_figures(folder)
        checkpoints = write_checkpoints(folder / "families")
        start = FAMILIES.replace("HERE", repr(str(HERE)))
        subprocess.run([sys.executable, "-P", "-c", start, *checkpoints], check=True, cwd=folder)
    failed = []
    for (task, metric), (value, room) in known.items():
        found = results[task][metric]
        print(f"{task} {metric.partition(',')[0]}: {found:.3f}, without lmms-eval {value:.3f} +- {room:.3f}")
        failed += [task] if abs(found - value) > room else []
    if failed:
        raise SystemExit(f"not as without lmms-eval: {', '.join(failed)}")


if __name__ == "__main__":
    main()
