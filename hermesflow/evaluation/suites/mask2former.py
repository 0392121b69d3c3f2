"""GenEval's judge by transformers: Mask2Former finds objects, CLIP names their colors; no mmdet.

It follows evaluate_images.py of djghosh13/geneval with its default options. The detector is another port of the same
weights, whose masks are made at 384 x 384: its scores differ a little from the published judge's, so results name it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.evaluation.suites.drawing import IMAGES, pictures_of, read_settings
from hermesflow.evaluation.suites.suite import Suite, SuitePrompt
from hermesflow.runtime.files import InputError, read_text, reason_of, shown, write_text
from hermesflow.runtime.progress import track

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
_TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
_COCO_NAMES = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
"""GenEval's names of objects -> COCO's, where they differ."""
_THRESHOLD, _COUNTING_THRESHOLD, _MOST_OBJECTS, _NEAR = 0.3, 0.9, 16, 0.1
_GRAY = "#999"


@dataclass(frozen=True)
class Found:
    """An object: box (left, top, right, bottom) in pixels, mask (height, width) as bool, and score."""

    box: tuple[float, float, float, float]
    mask: np.ndarray
    score: float


def write_results(suite: Suite, prompts: Sequence[SuitePrompt], folder: Path, checkpoint: Path, path: Path) -> None:
    """Judges what is not judged yet, and writes lines as GenEval's own judge does.

    Args:
        suite, prompts: GenEval's.
        folder: that of draw_suite.
        checkpoint: folder of Mask2Former as transformers keeps it, CLIP in its subfolder clip/ if prompts name colors.
        path: file of results; those that are there stay.
    Raises: InputError if a model cannot be loaded, or knows no such object.
    """
    if not all("include" in prompt.source for prompt in prompts):
        raise InputError(f"--judge mask2former:{checkpoint}: judges geneval alone; give another judge")
    lines = read_text(path).split("\n") if path.is_file() else []
    entries = [entry for entry in map(_entry, lines) if entry]
    done = {entry["filename"] for entry in entries}
    count = int(read_settings(folder)["num_images"])
    files = [(prompt, file) for row, prompt in enumerate(prompts) for file in suite.files_of(prompt, row, count)]
    left = [(prompt, file) for prompt, file in files if file.path not in done]
    if not left:
        return
    judge = Mask2FormerJudge(checkpoint)
    for prompt in prompts:
        judge.check(prompt.source)
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))  # without a line that a stop cut short
    with open(path, "a", encoding="utf-8") as out:
        for prompt, file in track(left, "judging", "files"):
            (picture,) = pictures_of(file, folder / IMAGES)
            is_right, reason = judge(picture, prompt.source)
            line = {"filename": file.path, "tag": prompt.source["tag"], "prompt": prompt.text, "correct": is_right}
            out.write(json.dumps(line | {"reason": reason}) + "\n")
            out.flush()


class Mask2FormerJudge:
    """Detector and color classifier."""

    def __init__(self, folder: Path) -> None:
        """See write_results. Raises: InputError if the detector cannot be loaded."""
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._folder = folder
        self._model = _load(Mask2FormerForUniversalSegmentation, folder).eval().to(self._device)
        self._processor = _load(AutoImageProcessor, folder, backend="pil")
        self._numbers = {name: number for number, name in self._model.config.id2label.items()}
        self._clip: tuple[Any, Any, Any] | None = None
        self._colors: dict[str, Tensor] = {}

    def check(self, entry: Mapping[str, Any]) -> None:
        """Raises: InputError if an object of an entry is none of the detector's, or CLIP is missing for its color."""
        for wanted in (*entry["include"], *entry.get("exclude", ())):
            self._number_of(wanted["class"])
            if "color" in wanted:
                if wanted["color"] not in COLORS:
                    raise InputError(f"geneval: {shown(wanted['color'])} is none of its colors; restore the prompts")
                self._load_clip()

    @torch.inference_mode()
    def detect(self, picture: Image.Image, threshold: float) -> dict[str, list[Found]]:
        """Objects by GenEval's names, the surest first, 16 of a name at most."""
        inputs = self._processor(images=picture, return_tensors="pt").to(self._device)
        (given,) = self._processor.post_process_instance_segmentation(
            self._model(**inputs), threshold=threshold, target_sizes=[picture.size[::-1]], return_binary_maps=True
        )
        names = self._model.config.id2label
        found: dict[str, list[Found]] = {}
        for mask, segment in zip(given["segmentation"], given["segments_info"], strict=False):
            inside = mask.cpu().numpy() > 0
            rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            found.setdefault(names[segment["label_id"]], []).append(Found(box, inside, segment["score"]))
        return {name: sorted(items, key=lambda item: -item.score)[:_MOST_OBJECTS] for name, items in found.items()}

    def __call__(self, picture: Image.Image, entry: Mapping[str, Any]) -> tuple[bool, str]:
        """Whether an image shows what an entry of evaluation_metadata.jsonl wants, and why not."""
        threshold = _COUNTING_THRESHOLD if entry["tag"] == "counting" else _THRESHOLD
        detected = self.detect(picture, threshold)
        seen = {wanted["class"]: detected.get(_COCO_NAMES.get(wanted["class"], wanted["class"]), [])
                for wanted in (*entry["include"], *entry.get("exclude", ()))}  # fmt: skip
        reasons: list[str] = []
        matched: list[list[Found]] = []
        for wanted in entry["include"]:
            found = seen[wanted["class"]][: wanted["count"]]
            reason = self._why_not(picture, wanted, found, matched)
            reasons += [reason] if reason else []
            matched.append([] if reason else found)
        for unwanted in entry.get("exclude", ()):
            name, number = unwanted["class"], len(seen[unwanted["class"]])
            reasons += (
                [f"{number} {name}, fewer than {unwanted['count']} wanted"] if number >= unwanted["count"] else []
            )
        return not reasons, "; ".join(reasons)

    def _why_not(
        self, picture: Image.Image, wanted: Mapping[str, Any], found: list[Found], matched: list[list[Found]]
    ) -> str:
        """Empty if the objects that were found are what is wanted."""
        name, count = wanted["class"], wanted["count"]
        if len(found) < count:
            return f"{len(found)} {name}, {count} wanted"
        if "color" in wanted:
            colors = self.colors_of(picture, found, name)
            if colors.count(wanted["color"]) < count:
                return f"{name} is {', '.join(colors)}, not {wanted['color']}"
        if wanted.get("position") is not None:
            relation, number = wanted["position"]
            if not matched[number]:
                return f"nothing that {name} could be {relation}"
            for item in found:
                for other in matched[number]:
                    if relation not in relations_of(item.box, other.box):
                        return f"{name} is not {relation} the other"
        return ""

    @torch.inference_mode()
    def colors_of(self, picture: Image.Image, found: Sequence[Found], name: str) -> list[str]:
        """The color of each object, cut out before gray, by CLIP's likeness to words."""
        model, processor, _ = self._load_clip()
        gray = Image.new("RGB", picture.size, _GRAY)
        crops = [Image.composite(picture, gray, Image.fromarray(item.mask)).crop(item.box) for item in found]
        inputs = processor(images=crops, return_tensors="pt").to(self._device)
        seen = nn.functional.normalize(_pooled(model.get_image_features(**inputs)), dim=-1)
        return [COLORS[number] for number in (seen @ self._words_of(name).T).argmax(1).tolist()]

    def _words_of(self, name: str) -> Tensor:
        """(colors, d): of each color, the direction of its three sentences."""
        if name not in self._colors:
            model, _, tokenizer = self._load_clip()
            texts = [template.format(color=color, name=name) for color in COLORS for template in _TEMPLATES]
            inputs = tokenizer(texts, padding=True, return_tensors="pt").to(self._device)
            features = nn.functional.normalize(_pooled(model.get_text_features(**inputs)), dim=-1)
            mean = features.view(len(COLORS), len(_TEMPLATES), -1).mean(1)
            self._colors[name] = nn.functional.normalize(mean, dim=-1)
        return self._colors[name]

    def _load_clip(self) -> tuple[Any, Any, Any]:
        if self._clip is None:
            from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

            folder = self._folder / "clip"
            model = _load(CLIPModel, folder).eval().to(self._device)
            self._clip = model, _load(AutoImageProcessor, folder, backend="pil"), _load(AutoTokenizer, folder)
        return self._clip

    def _number_of(self, name: str) -> int:
        number = self._numbers.get(_COCO_NAMES.get(name, name))
        if number is None:
            raise InputError(f"{self._folder}: knows no {shown(name)}; give a Mask2Former of COCO's instances")
        return number


def relations_of(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where a box lies, seen from another: "left of", "right of", "above", "below"; none where they are too near."""
    first, second = np.reshape(box, (2, 2)), np.reshape(other, (2, 2))
    offset = first.mean(0) - second.mean(0)
    room = _NEAR * (np.abs(first[1] - first[0]) + np.abs(second[1] - second[0]))
    away = np.maximum(np.abs(offset) - room, 0) * np.sign(offset)
    if (np.abs(away) < 1e-3).all():
        return set()
    right, down = away / np.linalg.norm(offset)
    of_sides = {"left of": -right, "right of": right, "above": -down, "below": down}
    return {name for name, value in of_sides.items() if value > 0.5}


def _pooled(features: Any) -> Tensor:
    """What get_image_features and get_text_features give, a tensor or an output that holds it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _load(kind: Any, folder: Path, **options: Any) -> Any:
    """Of a local folder; a model from safetensors alone, whole. Raises: InputError."""
    is_model = issubclass(kind, nn.Module)
    if is_model:
        options = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
    if not folder.is_dir():
        raise InputError(f"--judge mask2former:{folder}: no such folder; give one with Mask2Former, and CLIP in clip/")
    try:
        loaded = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
        if is_model:
            loaded, keys = loaded
            if keys["missing_keys"]:
                raise ValueError(f"{min(keys['missing_keys'])} is missing")
    except ImportError as error:
        raise InputError(
            f"--judge mask2former: {kind.__name__} needs a package that is missing; give pip install "
            "'hermesflow[geneval]'"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"--judge mask2former:{folder}: cannot be loaded ({reason_of(error)}); give a folder with Mask2Former as "
            "transformers keeps it, and CLIP in its subfolder clip/"
        ) from error
    return loaded


def _entry(line: str) -> dict[str, Any]:
    try:
        given = json.loads(line)
    except ValueError:
        return {}
    return given if isinstance(given, dict) and isinstance(given.get("filename"), str) else {}
