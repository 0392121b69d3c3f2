"""`hermesflow bench e2e|train --family janus|emu3|chameleon`: tasks and training of families that draw code by code.

    images-1    an image of a prompt
    images      the candidates of a prompt
    captions    ten of an image, in the ways of e2e.CAPTION_SAMPLING
    answers     to the questions about an image

Each against the published loop (naive_causal.py) in the same run, on the same random weights; the head's row of eot is
zero, so that every answer has its full length. Greedy images and answers of both are compared before anything is timed.
The vision tower of Janus is left out on both sides. Training is train.Step with the models and the baseline of here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import e2e, naive_causal, train
from hermesflow.benchmarks.causal_models import (
    FAMILIES,
    NUM_SPECIAL,
    SHAPES,
    FeatureModel,
    make_model,
    random_features,
)
from hermesflow.benchmarks.measuring import Part
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run, check_names
from hermesflow.engine.decoders.autoregressive import AutoregressiveDecoder, CodeSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer

CASES = ("images-1", "images", "captions", "answers")


@dataclass(frozen=True, kw_only=True)
class TaskShape:
    """How much is asked of a model of causal_models.SHAPES."""

    num_images: int = 16
    """Of the prompt, in the case images."""
    prompt_len: int = 20
    num_questions: int = 8
    question_len: int = 15
    """Of captions too."""


TASK_SHAPES = {"tiny": TaskShape(num_images=3, prompt_len=5, num_questions=2, question_len=4), "small": TaskShape()}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings(ModelSettings):
    """What to measure of the tasks."""

    family: str = "janus"
    """One of FAMILIES."""
    naive: bool = True
    """Measure the published loop too."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, CASES)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings(ModelSettings):
    """What to measure of a training step; the fields of TaskSettings."""

    family: str = "janus"
    naive: bool = True
    profile: Path | None = None

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, train.CASES)


def run_causal_e2e(settings: TaskSettings) -> int:
    """Measure the tasks, print a table, write lines and profiles.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if the engine's results are not those of the published loop.
    Raises: InputError if a file cannot be written.
    """
    run = Run(f"e2e-{settings.family}", settings, e2e.EFFORT, settings.torch_dtype)
    tasks = CausalTasks(settings.family, settings.shape, run.device, settings.torch_dtype)
    contests = (tasks.contest(name) for name in settings.cases or CASES)
    return 0 if e2e.measure_tasks(run, settings, contests, tasks.check, tasks.engine.transformer) else 1


def run_causal_train(settings: StepSettings) -> int:
    """Measure a step of Pair-DPO; see train.run_train."""
    run = Run(f"train-{settings.family}", settings, train.EFFORT, settings.torch_dtype)
    step = CausalStep(settings.family, settings.shape, run.device, settings.torch_dtype)
    return train.measure_step(run, settings, step)


class CausalTasks(e2e.FamilyTasks):
    """The cases of one family and shape, on one engine."""

    def __init__(self, family: str, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.shape = FAMILIES[family], TASK_SHAPES[shape_name]
        transformer, layout = make_model(self.family, SHAPES[shape_name], device, dtype)
        transformer.head.weight[layout.eot] = 0.0  # is never drawn
        self.engine = Engine(transformer, layout, image_decoder=AutoregressiveDecoder)
        self.work = ModelWork(config=transformer.config, layout=layout, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        lengths = [self.shape.prompt_len, *[self.shape.question_len] * (1 + self.shape.num_questions)]
        texts = [_plain_text(layout, length, generator) for length in lengths]
        self.prompt, self.caption_question, *self.questions = texts
        codes = torch.randint(layout.codebook_size, (1, layout.num_image_tokens), generator=generator)
        self.viewed = random_features(codes, transformer) if self.family.kind is FeatureModel else codes.to(device)

    def check(self) -> str | None:
        """None, or how the engine's greedy images and answers differ from those of the published loop."""
        params = replace(self.family.sampling, temperature=0.0)
        questions = self.questions[: e2e.NUM_CHECKED]
        answered = self.answer(questions, [e2e.ANSWER_SAMPLING])
        expected = [self.naive_answer(question, e2e.ANSWER_SAMPLING) for question in questions]
        pairs = {
            "greedy images": (self.draw(1, params), self.naive_draw(1, params)),
            "greedy answers": (torch.tensor(answered)[:, 0], torch.tensor(expected)),
        }
        return e2e.first_difference(pairs, self.work.dtype)

    def contest(self, name: str) -> Contest:
        """One of CASES."""
        make = {"captions": self._captions, "answers": self._answers}
        counts = {"images-1": 1, "images": self.shape.num_images}
        return make[name]() if name in make else self._images(name, counts[name])

    def naive_draw(self, num_images: int, params: CodeSamplingParams) -> Tensor:
        """The same of the published loop."""
        model = (self.engine.transformer, self.engine.layout, self.family.way)
        return naive_causal.draw_images(*model, self.prompt, num_images, params)

    def answer(self, questions: list[list[int]], sampling: Sequence[SamplingParams]) -> list[list[list[int]]]:
        """Ids [question][setting] of the engine."""
        seeds = torch.arange(len(questions) * len(sampling)).view(1, len(questions), -1)
        return self.engine.generate_text(self.viewed, [questions], sampling=sampling, seeds=seeds)[0]

    def naive_answer(self, question: list[int], params: SamplingParams) -> list[int]:
        """Ids of the published loop."""
        model = (self.engine.transformer, self.engine.layout)
        return naive_causal.answer_question(*model, self.viewed[0], question, params)

    def _images(self, name: str, num_images: int) -> Contest:
        tokens, params, way = self.engine.layout.num_image_tokens, self.family.sampling, self.family.way
        if way.one_call:
            naive = Part(run=partial(self.naive_draw, num_images, params))
        else:
            naive = Part(name="one image", run=partial(self.naive_draw, 1, params), times=num_images)
        images = "image" if num_images == 1 else "images of a prompt"
        return self.make_contest(
            name,
            f"{num_images} {images} of {tokens} tokens, guidance {1 + params.guidance_scale:g}",
            run=partial(self.draw, num_images, params),
            passes=self.work.images_by_code(num_images, self.shape.prompt_len),
            items={"images": num_images, "image tokens": num_images * tokens},
            baseline=naive,
        )

    def _captions(self) -> Contest:
        samples, tokens = len(e2e.CAPTION_SAMPLING), e2e.CAPTION_SAMPLING[0].max_new_tokens
        return self.make_contest(
            "captions",
            f"{samples} of {tokens} tokens for 1 image",
            run=partial(self.answer, [self.caption_question], e2e.CAPTION_SAMPLING),
            passes=self.work.answers(1, 1, self.shape.question_len, samples, tokens),
            items={"captions": samples, "caption tokens": samples * tokens},
            baseline=self._one_call_each([(self.caption_question, params) for params in e2e.CAPTION_SAMPLING]),
        )

    def _answers(self) -> Contest:
        count, params = len(self.questions), e2e.ANSWER_SAMPLING
        return self.make_contest(
            "answers",
            f"{count} of {params.max_new_tokens} tokens for 1 image",
            run=partial(self.answer, self.questions, [params]),
            passes=self.work.answers(1, count, self.shape.question_len, 1, params.max_new_tokens),
            items={"answers": count},
            baseline=self._one_call_each([(question, params) for question in self.questions]),
        )

    def _one_call_each(self, asked: list[tuple[list[int], SamplingParams]]) -> Part:
        def run() -> None:
            for question, params in asked:
                self.naive_answer(question, params)

        return Part(run=run, peak=partial(self.naive_answer, *asked[-1]))


class CausalStep(train.Step):
    """A step of Pair-DPO of one family."""

    def __init__(self, family: str, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.family = FAMILIES[family]
        self.model_kind = self.family.kind
        super().__init__(shape_name, device, dtype)

    def make_model(self, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Layout]:
        """See train.Step."""
        return make_model(self.family, SHAPES[self.shape_name], device, dtype)

    def pad(self, batch: PairBatch) -> naive_causal.PaddedPairs:
        """See train.Step."""
        return naive_causal.pad_pairs(self.layout, batch)

    def run_naive(self) -> Tensor:
        """See train.Step."""
        models = (self.transformer, self.reference, self.layout, self.family.way)
        return naive_causal.train_step(*models, self._padded, self.config.beta)

    def pass_work(self, batch: PairBatch) -> Work:
        """See train.Step; where a code is one among the codes, its rows need the codes' head alone."""
        work, vocab_size = super().pass_work(batch), self.layout.vocab_size
        if batch.code_ids is None:
            return work
        images, captions = (len(batch.sides[name].rows) for name in ("generation", "understanding"))
        unneeded = images * (vocab_size - self.layout.codebook_size)
        unneeded += captions * (vocab_size - len(self.transformer.head.weight))
        return replace(work, num_flops=work.num_flops - 2 * self.work.config.hidden_size * unneeded)


def _plain_text(layout: Layout, length: int, generator: torch.Generator) -> list[int]:
    numbers = torch.randint(NUM_SPECIAL, len(layout.text_ids), (length,), generator=generator)
    return [layout.text_ids[number] for number in numbers.tolist()]
