"""`hermesflow bench e2e` and `bench train --family bagel`: tasks, and steps of Pair-DPO, of a model that draws latents.

    images      eight candidates of a prompt, guided
    answers     ten questions about an image, greedy
    generation_live, generation_cached         a step of image pairs, its reference beside it or computed before
    understanding_live, understanding_cached   likewise of caption pairs

Each against the published loop (naive_flow.py) in the same run, on the same random weights. What both give is compared
before anything is timed. The image's features are random numbers; the tower that makes them is not measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import e2e, naive_flow, train
from hermesflow.benchmarks.causal_models import SHAPES, ModelShape, fill_weights
from hermesflow.benchmarks.measuring import Part
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run, check_names
from hermesflow.engine.decoders.flow import FlowDecoder
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.latents import LatentConfig, LatentTransformer, pack_latents
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.transformer import TransformerConfig
from hermesflow.models import bagel
from hermesflow.models.model import Model

CASES = ("images", "answers")
SIDES = ("generation", "understanding")
FAMILIES = ("bagel",)
_LATENT_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class TaskShape:
    """How much is asked of a model of causal_models.SHAPES."""

    num_images: int = 8
    num_steps: int = 13
    prompt_len: int = 20
    num_features: int = 196
    """Of an image that is seen: 1,369 beside 1,024 latents at 512 pixels."""
    num_questions: int = 10
    question_len: int = 16
    answer_len: int = 4


TASK_SHAPES = {
    "tiny": TaskShape(num_images=2, num_steps=4, prompt_len=5, num_features=7, num_questions=3, question_len=4),
    "small": TaskShape(),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings(ModelSettings):
    """What to measure of the tasks."""

    family: str = "bagel"
    naive: bool = True
    profile: Path | None = None

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, CASES)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings(TaskSettings):
    """What to measure of a training step."""

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, tuple(f"{side}_{case.removeprefix('step_')}" for side in SIDES for case in train.CASES))


def run_flow_e2e(settings: TaskSettings) -> int:
    """Measure the tasks, print a table, write lines and profiles; see masked_tasks.run_masked_e2e."""
    run = Run(f"e2e-{settings.family}", settings, e2e.EFFORT, settings.torch_dtype)
    tasks = FlowTasks(settings.shape, run.device, settings.torch_dtype)
    contests = (tasks.contest(name) for name in settings.cases or CASES)
    return 0 if e2e.measure_tasks(run, settings, contests, tasks.check, tasks.engine.transformer) else 1


def run_flow_train(settings: StepSettings) -> int:
    """Measure steps of each side alone; see masked_tasks.run_masked_train."""
    run = Run(f"train-{settings.family}", settings, train.EFFORT, settings.torch_dtype)
    for side in SIDES:
        names = {f"{side}_{case.removeprefix('step_')}": case for case in train.CASES}
        asked = [name for name in names if name in (settings.cases or names)]
        if not asked:
            continue
        step = FlowStep(settings.shape, run.device, settings.torch_dtype, side)
        if settings.naive and not run.is_right(step.comparisons([names[name] for name in asked])):
            return 1
        for name in asked:
            contest = replace(step.contest(names[name]), case=name)
            run.measure(contest if settings.naive else replace(contest, baselines={}))
    run.print_table("the baseline")
    return 0


class FlowTasks(e2e.FamilyTasks):
    """The cases of one shape, on one engine."""

    def __init__(self, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = TASK_SHAPES[shape_name]
        transformer, layout = make_model(SHAPES[shape_name], device, dtype)
        self.engine = Engine(transformer, layout, image_decoder=FlowDecoder)
        self.work = ModelWork(config=transformer.config, layout=layout, dtype=dtype)
        self.sampling = replace(bagel.SAMPLING, num_steps=self.shape.num_steps)
        generator = torch.Generator().manual_seed(0)

        def text(length: int) -> list[int]:
            return torch.randint(16, layout.vocab_size, (length,), generator=generator).tolist()

        self.prompt = text(self.shape.prompt_len)
        self.questions = [text(self.shape.question_len) for _ in range(self.shape.num_questions)]
        shape = (1, self.shape.num_features, transformer.config.hidden_size)
        self.features = torch.randn(shape, generator=generator).to(device, dtype)
        self.noise = torch.randn(self.shape.num_images, layout.num_image_tokens, _LATENT_SIZE, generator=generator)
        self.greedy = SamplingParams(temperature=0.0, max_new_tokens=self.shape.answer_len)

    def draw_latents(self, num_images: int) -> Tensor:
        """fp32 [num_images, N, C] of the engine, from given noise."""
        seeds = torch.zeros(1, num_images, dtype=torch.int64)
        noise = self.noise[None, :num_images]
        with torch.inference_mode():
            return self.engine.image_decoder.draw([self.prompt], seeds, self.sampling, noise=noise)[0]

    def naive_draw(self, num_images: int) -> Tensor:
        """The same of the published loop."""
        transformer, layout = self.engine.transformer, self.engine.layout
        device = transformer.embed.weight.device
        images = [
            naive_flow.draw_image(transformer, layout, self.prompt, noise.to(device), self.sampling)
            for noise in self.noise[:num_images]
        ]
        return torch.stack(images)

    def answer(self) -> list[list[int]]:
        """Ids of each question, of the engine."""
        seeds = torch.zeros(1, len(self.questions), 1, dtype=torch.int64)
        found = self.engine.generate_text(
            self.features, [self.questions], sampling=[self.greedy], seeds=seeds, text_only=False
        )
        return [ids for (ids,) in found[0]]

    def naive_answer(self, question: list[int]) -> list[int]:
        """Ids of the published loop."""
        model = (self.engine.transformer, self.engine.layout)
        return naive_flow.answer_question(*model, lambda: self.features[0], question, self.shape.answer_len)

    def check(self) -> str | None:
        """None, or how the engine's images and answers differ from those of the published loop."""
        ours, theirs = self.draw_latents(1), self.naive_draw(1)
        limit = 1e-3 if self.work.dtype == torch.float32 else 0.1
        if not float((ours - theirs).abs().max()) <= limit * float(theirs.abs().max()):
            return f"images differ from the published algorithm's by {float((ours - theirs).abs().max()):.2g}"
        found, expected = self.answer(), [self.naive_answer(question) for question in self.questions]
        pairs = {"greedy answers": (torch.tensor(sum(found, [])), torch.tensor(sum(expected, [])))}
        return e2e.first_difference(pairs, self.work.dtype)

    def contest(self, name: str) -> Contest:
        """One of CASES."""
        shape, layout = self.shape, self.engine.layout
        passes: list[Work] = []
        if name == "images":
            run, size = partial(self.draw_latents, shape.num_images), 1
            what = (
                f"{shape.num_images} images of a prompt of {layout.num_image_tokens} latents, {shape.num_steps} steps"
            )
            items, naive = {"images": shape.num_images}, Part(run=partial(self.naive_draw, shape.num_images))
        else:
            run, size = self.answer, layout.vocab_size
            what = f"{shape.num_questions} of {shape.answer_len} tokens for an image of {shape.num_features} features"

            def run_naive() -> None:
                for question in self.questions:
                    self.naive_answer(question)

            peak = partial(self.naive_answer, self.questions[0])
            items, naive = {"answers": shape.num_questions}, Part(run=run_naive, peak=peak)
        with e2e.recorded_passes(passes, self.work, size):
            run()
        return self.make_contest(name, what, run, passes, items, naive)


class FlowStep(train.Step):
    """A step of Pair-DPO of one side."""

    def __init__(self, shape_name: str, device: torch.device, dtype: torch.dtype, side: str) -> None:
        self.side, self.model_kind = side, partial(_FeatureModel, TASK_SHAPES[shape_name].num_features)
        super().__init__(shape_name, device, dtype)

    def settings(self) -> dict:
        """See train.Step."""
        other = SIDES[1 - SIDES.index(self.side)]
        return super().settings() | {f"{other}_weight": 0.0}

    def make_model(self, device: torch.device, dtype: torch.dtype) -> tuple[LatentTransformer, bagel.BagelLayout]:
        """See train.Step."""
        return make_model(SHAPES[self.shape_name], device, dtype)

    def draw_codes(self, generator: torch.Generator) -> list[int]:
        """See train.Step."""
        return pack_latents(torch.randn(self.layout.num_image_tokens, _LATENT_SIZE, generator=generator)).tolist()

    def pad(self, batch: PairBatch) -> PairBatch:
        """The batch itself, whose leaves are taken one by one."""
        return batch

    def run_naive(self) -> Tensor:
        """See train.Step."""
        logprobs = self._image_logprobs if self.side == "generation" else self._caption_logprobs
        policy = torch.stack([logprobs(self.transformer, role) for role in (0, 1)])
        with torch.no_grad():
            before = torch.stack([logprobs(self.reference, role) for role in (0, 1)])
        moved = policy - before
        beta = self.packer.config.generation_beta if self.side == "generation" else self.packer.config.beta
        loss = -F.logsigmoid(beta * (moved[0] - moved[1])).mean()
        loss.backward()
        return loss.detach()

    def _image_logprobs(self, transformer: LatentTransformer, role: int) -> Tensor:
        batch, count = self._padded, self.layout.num_image_tokens
        found = []
        for pair, visit in enumerate(batch.visits):
            rows = slice((2 * pair + role) * count, (2 * pair + role + 1) * count)
            prompt = self.packer._prompt_of(visit)
            leaf = batch.noised[rows], float(batch.times[rows][0]), batch.velocities[rows]
            found.append(naive_flow.image_logprob(transformer, self.layout, prompt, *leaf))
        return torch.stack(found)

    def _caption_logprobs(self, transformer: LatentTransformer, role: int) -> Tensor:
        question, found = self.layout.question(self.packer.question_ids), []
        for visit in self._padded.visits:
            caption = self.packer._tokens[("win", "lose")[role] + "_caption_ids"][visit.pair].tolist()
            features = self.packer._views(visit.pair).to(self.device)
            found.append(naive_flow.caption_logprob(transformer, self.layout, features, question, caption))
        return torch.stack(found)


class _FeatureModel(Model):
    """Sees an image as features at random, a function of its latents."""

    views_codes = False

    def __init__(self, num_features: int, *parts: object) -> None:
        super().__init__(*parts)
        self._num_features = num_features

    @property
    def num_features(self) -> int:
        """F."""
        return self._num_features

    def view_codes(self, codes: Tensor) -> Tensor:
        """[n, F, D]."""
        weight = self.transformer.embed.weight
        seeds = codes.sum(1).abs().tolist()
        shape = (self._num_features, weight.shape[1])
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]).to(
            weight
        )


def make_model(
    shape: ModelShape, device: torch.device, dtype: torch.dtype
) -> tuple[LatentTransformer, bagel.BagelLayout]:
    """A mixture of two transformers of random weights."""
    config = TransformerConfig(
        vocab_size=shape.text_vocab_size, hidden_size=shape.hidden_size, num_layers=shape.num_layers,
        num_heads=shape.num_heads, num_kv_heads=max(1, shape.num_heads // 4), mlp_size=shape.mlp_size, norm="rmsnorm",
        gated=True, activation="silu", bias=False, qkv_bias=True, qk_norm=True, experts=2, rope_theta=1e6,
    )  # fmt: skip
    with torch.device(device):
        transformer = LatentTransformer(config, LatentConfig(size=_LATENT_SIZE, side=shape.side))
    fill_weights(transformer.to(dtype), torch.Generator(device).manual_seed(0))
    layout = bagel.BagelLayout(
        vocab_size=shape.text_vocab_size, image_grid=(shape.side, shape.side), largest=shape.side, bos=0, eot=1, soi=2,
        eoi=3, latent_size=_LATENT_SIZE,
    )  # fmt: skip
    return transformer.eval().requires_grad_(False), layout
