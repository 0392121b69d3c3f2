"""A model as lmms-eval asks it: answers, captions, likelihoods, and images where a task shows none.

    lmms_eval --model hermesflow --model_args model=showlab/show-o-512x512,dtype=bfloat16 --tasks pope

Requests are computed together by the engine, task by task. The harness's ways are met here: it takes the choice of the
smallest value, so that losses are returned; and it turns plain pairs into text, so that they are wrapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from torch import tensor, zeros

from hermesflow.config import DRAWING, DrawingConfig, ModelConfig
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.models import open_model
from hermesflow.runtime.files import InputError, atomic_write
from hermesflow.runtime.seeds import candidate_seed

_BATCH = 64
_IMAGE_MARK = "<image>"


class LmmsModel(lmms):
    """See the module."""

    is_simple = True

    def __init__(
        self,
        model: str = "tiny",
        device: str = "",
        dtype: str = "auto",
        family: str = "auto",
        seed: int = 0,
        output: str = "lmms_eval_images",
        batch_size: int | str = _BATCH,
        max_batch_size: int | None = None,
        **drawing: float,
    ) -> None:
        """
        Args:
            model, device, dtype, family: as hermesflow's settings of [model].
            seed: of what is drawn and sampled.
            output: folder of drawn images, OUTPUT/TASK/DOCUMENT.png.
            batch_size, max_batch_size: requests of one pass at most; the engine bounds them by memory.
            drawing: settings of [drawing], such as num_steps.
        Raises: InputError on a setting that is none.
        """
        super().__init__()
        unknown = sorted(drawing.keys() - set(DRAWING))
        if unknown:
            raise InputError(f"model_args: no setting {unknown[0]}; there are {', '.join(DRAWING)}")
        device = "" if device in ("cuda", "cuda:0") else str(device)  # the harness's own default
        self._model = open_model(ModelConfig(name=str(model), device=device or "auto", dtype=dtype, family=family))
        self._sampling = self._model.sampling_of(DrawingConfig(**drawing))
        self._seed, self._output = int(seed), Path(output)
        self._batch = int(batch_size) if str(batch_size).isdecimal() and int(batch_size) > 1 else _BATCH

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Text about an image; where a task shows none, {"text": "", "images": [path]} of one that is drawn."""
        found: list[str] = [""] * len(requests)
        asked: dict[tuple, list[tuple[int, Image.Image, str]]] = {}
        drawn: list[tuple[int, str, str, Any]] = []
        for number, request in enumerate(requests):
            context, options, show, document, task, split = request.args
            images = self._images(show, task, split, document)
            if not images:
                drawn.append((number, context, task, document))
                continue
            text = context.replace(_IMAGE_MARK, " ").strip()
            key = task, json.dumps(options, sort_keys=True, default=str)
            asked.setdefault(key, []).append((number, _only(images, task), text))
        for (_, options), items in asked.items():
            for batch in _batches(items, self._batch):
                for (number, _, _), text in zip(batch, self._answers(batch, json.loads(options)), strict=True):
                    found[number] = text
        for batch in _batches(drawn, self._batch):
            for (number, *_), path in zip(batch, self._draw(batch), strict=True):
                found[number] = json.dumps({"text": "", "images": [str(path)]})
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not there: a model answers one question about one image."""
        raise NotImplementedError("hermesflow: models answer one question about one image; leave out multi-round tasks")

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """(loss, whether it is the greedy answer) of each continuation."""
        found: list[GenerationResult | None] = [None] * len(requests)
        asked: dict[tuple, list[tuple[int, str]]] = {}
        for number, request in enumerate(requests):
            if len(request.args) < 6:
                raise NotImplementedError("hermesflow: likelihoods without an image (acc_mutual_info) are not there")
            context, target, show, document, task, split = request.args
            target = target if isinstance(target, str) else target(self.task_dict[task][split][document])
            asked.setdefault((task, split, document, context), []).append((number, str(target).strip()))
        questions = [
            (key, items, _only(self._images(requests[items[0][0]].args[2], key[0], key[1], key[2]), key[0]))
            for key, items in asked.items()
        ]
        for batch in _batches(questions, self._batch):
            prompts = [self._model.question_prompt(key[3].replace(_IMAGE_MARK, " ").strip()) for key, *_ in batch]
            choices = [[self._model.answer_ids(text) for _, text in items] for _, items, _ in batch]
            for numbers, seen, engine in self._model.views([image for *_, image in batch]):
                ids, given = [[prompts[row]] for row in numbers], [[choices[row]] for row in numbers]
                scores = engine.score_choices(seen, ids, given)
                longest = max(len(one) for row in numbers for one in choices[row])
                greedy = _greedy(longest)
                said = engine.generate_text(seen, ids, sampling=[greedy], seeds=zeros(len(ids), 1, 1).long())
                for row, of_row, answers in zip(numbers, scores, said, strict=True):
                    for (number, _), ids_of, logprob in zip(batch[row][1], choices[row], of_row[0], strict=True):
                        is_greedy = answers[0][0][: len(ids_of)] == ids_of
                        found[number] = GenerationResult(text=(-logprob, is_greedy))
        return found

    def _answers(self, batch: Sequence[tuple[int, Image.Image, str]], options: dict[str, Any]) -> list[str]:
        most = int(options.get("max_new_tokens") or self._model.prompts.max_answer_tokens)
        warm = float(options.get("temperature") or 0) if options.get("do_sample", True) else 0.0
        params = SamplingParams(
            temperature=warm, top_k=0, top_p=float(options.get("top_p") or 1), min_p=0.0, max_new_tokens=most
        )
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        found = [""] * len(batch)
        for numbers, seen, engine in self._model.views([image for _, image, _ in batch]):
            ids = [[self._model.question_prompt(batch[row][2])] for row in numbers]
            seeds = [[[candidate_seed(self._seed, batch[row][2], "answer", batch[row][0])]] for row in numbers]
            answers = engine.generate_text(seen, ids, sampling=[params], seeds=tensor(seeds))
            for row, of_row in zip(numbers, answers, strict=True):
                found[row] = _cut(self._model.decode_text(of_row[0][0]), until)
        return found

    def _draw(self, batch: Sequence[tuple[int, str, str, Any]]) -> Iterator[Path]:
        ids = [self._model.user_prompt(context, f"{task} {document}") for _, context, task, document in batch]
        seeds = [[candidate_seed(self._seed, f"{task}/{document}", "image", 0)] for _, _, task, document in batch]
        codes = self._model.engine.generate(ids, num_images=1, seeds=tensor(seeds), sampling=self._sampling)[:, 0]
        for row, (_, _, task, document) in enumerate(batch):
            path = self._output / task / f"{document}.png"
            with atomic_write(path) as temporary:
                Image.fromarray(self._model.decode_images(codes[row : row + 1])[0]).save(temporary, format="PNG")
            yield path

    def _images(self, show: Any, task: str, split: str, document: Any) -> list[Image.Image]:
        return [image for image in show(self.task_dict[task][split][document]) or [] if image is not None]


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    yield from (items[start : start + size] for start in range(0, len(items), size))


def _greedy(max_new_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=max_new_tokens)


def _only(images: list[Any], task: str) -> Image.Image:
    if len(images) != 1 or not isinstance(images[0], Image.Image):
        raise NotImplementedError(f"hermesflow: task {task} shows {len(images)} images, models see one; leave it out")
    return images[0]


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the words that end it."""
    places = [text.find(end) for end in until if end and end in text]
    return text[: min(places)] if places else text
