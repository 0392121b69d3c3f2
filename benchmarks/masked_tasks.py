"""`hermesflow bench e2e` and `bench train --family mmada|lumina-dimoo`: tasks, and a step of Pair-DPO, of bidirectional
families.

    images      the candidates of a prompt
    captions    ten of an image
    choices     questions about an image with two answers to choose from, against decoded answers

Each against the published loop (naive_masked.py) in the same run, on the same random weights. Greedy images and answers
of both are compared before anything is timed. What is approximate is measured against the engine's own exact way:

    threshold       captions of which a step keeps all tokens that are sure enough. Random weights are sure of nothing,
                    so the threshold is one that a quarter of the first step's tokens pass
    prefix-cache    captions in four blocks, whose steps compute the block and what follows it
    dual-cache      likewise, the block alone
    ml-cache        images whose steps compute the least sure tokens

The share of greedy tokens that are the exact ones says what it costs, on random weights.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hermesflow.algorithms.batch import PairBatch
from hermesflow.benchmarks import e2e, naive_masked, train
from hermesflow.benchmarks.causal_models import NUM_SPECIAL, SHAPES, ModelShape, fill_weights
from hermesflow.benchmarks.measuring import Part
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run, check_names
from hermesflow.engine.decoders.masked import ImageSamplingParams, MLCache
from hermesflow.engine.decoders.masked_text import MaskedTextDecoder
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.mask_schedule import num_to_mask
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer, TransformerConfig
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.models import lumina_dimoo, mmada

CASES = ("images", "captions", "choices", "threshold", "prefix-cache", "dual-cache", "ml-cache")


@dataclass(frozen=True, kw_only=True)
class TaskShape:
    """How much is asked of a model of causal_models.SHAPES; pads keep the proportion to images that they have at 8B."""

    num_images: int = 16
    """Of the prompt."""
    padded_to: int = 73
    """Tokens of MMaDA's prompts with their pads: 513 beside 1,024 codes."""
    num_questions: int = 8
    num_captions: int = 10
    caption_len: int = 32
    text_len: int = 15
    """Of prompts and questions."""


TASK_SHAPES = {
    "tiny": TaskShape(num_images=2, padded_to=12, num_questions=2, num_captions=3, caption_len=8, text_len=4),
    "small": TaskShape(),
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family by data."""

    layout: Callable[[ModelShape], Layout]
    sampling: ImageSamplingParams
    """As published."""
    is_padded: bool
    """Whether its published code pads prompts, and draws all images in one call."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskSettings(ModelSettings):
    """What to measure."""

    family: str = "mmada"
    """One of FAMILIES."""
    naive: bool = True
    """Measure the published loop too."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, CASES)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSettings(train.Settings):
    """What to measure of a step of Pair-DPO."""

    family: str = "mmada"
    """One of FAMILIES."""

    def __post_init__(self) -> None:
        check_names("--family", [self.family], FAMILIES)
        self.check(SHAPES, train.CASES)


def run_masked_train(settings: StepSettings) -> int:
    """Measure a step, print a table, write lines.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if loss or gradients are not those of the published algorithm.
    Raises: InputError if a file cannot be written.
    """
    run = Run(f"train-{settings.family}", settings, train.EFFORT, settings.torch_dtype)
    return train.measure_step(
        run, settings, MaskedStep(settings.family, settings.shape, run.device, settings.torch_dtype)
    )


def run_masked_e2e(settings: TaskSettings) -> int:
    """Measure the tasks, print a table, write lines and profiles.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if the engine's results are not those of the published loop.
    Raises: InputError if a file cannot be written.
    """
    run = Run(f"e2e-{settings.family}", settings, e2e.EFFORT, settings.torch_dtype)
    tasks = MaskedTasks(FAMILIES[settings.family], settings.shape, run.device, settings.torch_dtype)
    contests = (tasks.contest(name) for name in settings.cases or CASES)
    return 0 if e2e.measure_tasks(run, settings, contests, tasks.check, tasks.engine.transformer) else 1


class MaskedTasks(e2e.FamilyTasks):
    """The cases of one family and shape, on one engine."""

    def __init__(self, family: Family, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.family, self.shape = family, TASK_SHAPES[shape_name]
        transformer, layout = _make_model(family, SHAPES[shape_name], device, dtype)
        self.engine = Engine(transformer, layout, text_decoder=MaskedTextDecoder)
        self.work = ModelWork(config=transformer.config, layout=layout, dtype=dtype)
        generator = torch.Generator().manual_seed(0)
        highest = SHAPES[shape_name].text_vocab_size
        texts = torch.randint(NUM_SPECIAL, highest, (1 + self.shape.num_questions, self.shape.text_len),
                              generator=generator)  # fmt: skip
        self.prompt, *self.questions = texts.tolist()
        self.viewed = torch.randint(layout.codebook_size, (1, layout.num_image_tokens), generator=generator)
        self.choices = torch.randint(NUM_SPECIAL, highest, (len(self.questions), 2, 1), generator=generator).tolist()
        length = self.shape.caption_len
        self.caption = SamplingParams(
            temperature=0.7, max_new_tokens=length, num_steps=length // 2, block_length=length
        )

    def check(self) -> str | None:
        """None, or how the engine's greedy images and answers differ from those of the published loop."""
        params = replace(self.family.sampling, num_steps=3, temperature=0.0, mask_temperature=0.0)
        greedy = replace(self.caption, temperature=0.0)
        questions = self.questions[: e2e.NUM_CHECKED]
        said = [self.answer([question], [greedy])[0][0] for question in questions]
        expected = [self.naive_answer(question, greedy) for question in questions]
        pairs = {
            "greedy images": (self.draw(1, params), self.naive_draw(1, params)),
            "greedy answers": (torch.tensor(sum(said, [])), torch.tensor(sum(expected, []))),
        }
        return e2e.first_difference(pairs, self.work.dtype)

    def contest(self, name: str) -> Contest:
        """One of CASES."""
        if name == "ml-cache":
            return self._ml_cache()
        if name in CASES[3:]:
            return self._approximate_captions(name)
        return {"images": self._images, "captions": self._captions, "choices": self._choices}[name]()

    def naive_draw(self, num_images: int, params: ImageSamplingParams) -> Tensor:
        """The same of the published loop."""
        model, padded_to = (self.engine.transformer, self.engine.layout), self.shape.padded_to
        options = {"padded_to": padded_to} if self.family.is_padded else {}
        return naive_masked.draw_images(*model, self.prompt, num_images, params, **options)

    def answer(self, questions: list[list[int]], sampling: list[SamplingParams]) -> list[list[list[int]]]:
        """Ids [question][setting] of the engine, from the joint vocabulary as published."""
        seeds = torch.arange(len(questions) * len(sampling)).view(1, len(questions), -1)
        options = {"sampling": sampling, "seeds": seeds, "text_only": False}
        return self.engine.generate_text(self.viewed, [questions], **options)[0]

    def naive_answer(self, question: list[int], params: SamplingParams) -> list[int]:
        """Ids of the published loop."""
        model = (self.engine.transformer, self.engine.layout)
        return naive_masked.answer_question(*model, self.viewed[0].tolist(), question, params)

    def _images(self) -> Contest:
        """Guided images of a prompt."""
        count, params, layout = self.shape.num_images, self.family.sampling, self.engine.layout
        if self.family.is_padded:
            naive = Part(run=partial(self.naive_draw, count, params))
        else:
            naive = Part(name="one image", run=partial(self.naive_draw, 1, params), times=count)
        lengths = [len(layout.text_prompt(text)) + layout.image_length for text in (self.prompt, ())]
        unknown = [layout.num_image_tokens, *num_to_mask(layout.num_image_tokens, params.num_steps)[:-1]]
        passes = [self._pass([(1, length) for length in lengths], unknown[0], layout.codebook_size)]
        for masked in unknown[1:]:
            passes.append(self._pass([(count, length) for length in lengths], count * masked, layout.codebook_size))
        tokens = layout.num_image_tokens
        shape = f"{count} images of a prompt of {tokens} tokens, {params.num_steps} steps"
        items = {"images": count, "image tokens": count * tokens}
        return self.make_contest("images", shape, partial(self.draw, count, params), passes, items, naive)

    def _captions(self) -> Contest:
        """Captions of an image."""
        count, params, layout = self.shape.num_captions, self.caption, self.engine.layout
        question, length = self.questions[0], self.shape.caption_len
        before = len(layout.asked(self.viewed[0].tolist(), question))
        span = before + length + len(layout.after_answer)
        masked = [length - 2 * step for step in range(params.num_steps)]
        rows = [(1 if step == 0 else count, left) for step, left in enumerate(masked)]
        passes = [self._pass([(spans, span)], spans * left, layout.vocab_size) for spans, left in rows]

        def run_naive() -> None:
            for _ in range(count):
                self.naive_answer(question, params)

        naive = Part(run=run_naive, peak=partial(self.naive_answer, question, params))
        shape = f"{count} of {length} tokens in {params.num_steps} steps for 1 image"
        items = {"captions": count, "caption tokens": count * length}
        run = partial(self.answer, [question], [params] * count)
        return self.make_contest("captions", shape, run, passes, items, naive)

    def _choices(self) -> Contest:
        """Questions with two choices: a pass for all, where the published code decodes an answer of each."""
        layout, count = self.engine.layout, len(self.questions)
        before = len(layout.asked(self.viewed[0].tolist(), self.questions[0]))
        passes = [self._pass([(count, before + 2 + len(layout.after_answer))], 4 * count, layout.vocab_size)]
        greedy = replace(self.caption, temperature=0.0)

        def run() -> None:
            self.engine.score_choices(self.viewed, [self.questions], [self.choices], text_only=False)

        def run_naive() -> None:
            for question in self.questions:
                self.naive_answer(question, greedy)

        naive = Part(run=run_naive, peak=partial(self.naive_answer, self.questions[0], greedy))
        shape = f"{count} questions of 2 choices for 1 image, decoded {self.shape.caption_len} tokens"
        return self.make_contest("choices", shape, run, passes, {"answers": count}, naive)

    def _approximate_captions(self, name: str) -> Contest:
        """Captions of an image in four blocks, against the exact ones."""
        count, length, question = self.shape.num_captions, self.shape.caption_len, self.questions[0]
        exact = replace(self.caption, block_length=length // 4)
        how = {"threshold": self._passed_by_a_quarter(question)} if name == "threshold" else {"cache": name[:-6]}
        near = replace(exact, **how)
        near_ids, exact_ids = (
            self.answer([question], [replace(params, temperature=0.0)])[0][0] for params in (near, exact)
        )
        same = sum(map(operator.eq, near_ids, exact_ids)) / max(len(near_ids), len(exact_ids))
        passes: list[Work] = []
        with e2e.recorded_passes(passes, self.work, self.engine.layout.vocab_size):
            self.answer([question], [near] * count)
        shape = f"{count} of {length} tokens, blocks of {length // 4}, {same:.0%} of greedy tokens exact"
        items = {"captions": count, "caption tokens": count * length}
        run, other = (partial(self.answer, [question], [params] * count) for params in (near, exact))
        return self.make_contest(name, shape, run, passes, items, Part(run=other), "exact")

    def _passed_by_a_quarter(self, question: list[int]) -> float:
        """The probability that a quarter of a caption's tokens reach in its first step."""
        layout, transformer = self.engine.layout, self.engine.transformer
        before = layout.asked(self.viewed[0].tolist(), question)
        ids = [*before, *[layout.mask_id] * self.shape.caption_len, *layout.after_answer]
        with torch.inference_mode():
            hidden = transformer(SpanTree.build([(ids, -1, "full")], self.engine.device))[len(before) :]
            likeliest = transformer.head(hidden[: self.shape.caption_len]).float().softmax(1).amax(1)
        return float(likeliest.quantile(0.75))

    def _ml_cache(self) -> Contest:
        """Guided images of a prompt, against the exact ones."""
        count, exact = self.shape.num_images, self.family.sampling
        near = replace(exact, ml_cache=MLCache())
        greedy = (replace(params, temperature=0.0, mask_temperature=0.0) for params in (near, exact))
        near_codes, exact_codes = (self.draw(1, params) for params in greedy)
        same = float((near_codes == exact_codes).double().mean())
        tokens = self.engine.layout.num_image_tokens
        passes: list[Work] = []
        with e2e.recorded_passes(passes, self.work, self.engine.layout.codebook_size):
            self.draw(count, near)
        shape = f"{count} images of {tokens} tokens, {exact.num_steps} steps, {same:.0%} of greedy codes exact"
        run, other = (partial(self.draw, count, params) for params in (near, exact))
        items = {"images": count, "image tokens": count * tokens}
        return self.make_contest("ml-cache", shape, run, passes, items, Part(run=other), "exact")

    def _pass(self, spans: list[tuple[int, int]], head_rows: int, head_size: int) -> Work:
        """Full root spans, as (count, length); the last layer's MLP counts for all rows."""
        return self.work.one_pass([(*span, 0, False) for span in spans], 0, head_rows, head_size)


class MaskedStep(train.Step):
    """A step of Pair-DPO of one family."""

    def __init__(self, family: str, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.family = FAMILIES[family]
        super().__init__(shape_name, device, dtype)

    def make_model(self, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Layout]:
        """See train.Step."""
        return _make_model(self.family, SHAPES[self.shape_name], device, dtype)

    def pad(self, batch: PairBatch) -> naive_masked.PaddedPairs:
        """See train.Step."""
        return naive_masked.pad_pairs(self.layout, batch)

    def run_naive(self) -> Tensor:
        """See train.Step."""
        return naive_masked.train_step(self.transformer, self.reference, self._padded, self.config.beta)


def _make_model(
    family: Family, shape: ModelShape, device: torch.device, dtype: torch.dtype
) -> tuple[Transformer, Layout]:
    layout = family.layout(shape)
    config = TransformerConfig(
        vocab_size=layout.vocab_size, hidden_size=shape.hidden_size, num_layers=shape.num_layers,
        num_heads=shape.num_heads, num_kv_heads=shape.num_heads, mlp_size=shape.mlp_size, norm="rmsnorm", gated=True,
        activation="silu", bias=False, rope_theta=500_000.0,
    )  # fmt: skip
    with torch.device(device):
        transformer = Transformer(config)
    fill_weights(transformer.to(dtype), torch.Generator(device).manual_seed(0))
    return transformer.eval().requires_grad_(False), layout


def _mmada_layout(shape: ModelShape) -> mmada.MMaDALayout:
    ids = dict(zip(mmada.TOKENS, range(len(mmada.TOKENS)), strict=True))
    return mmada.MMaDALayout(
        vocab_size=shape.text_vocab_size + shape.codebook_size, codebook_size=shape.codebook_size,
        num_image_tokens=shape.side**2, code_offset=shape.text_vocab_size, user_ids=(NUM_SPECIAL,),
        assistant_ids=(NUM_SPECIAL + 1,), line_ids=(NUM_SPECIAL + 2,), **ids,
    )  # fmt: skip


def _dimoo_layout(shape: ModelShape) -> lumina_dimoo.DiMOOLayout:
    ids = dict(zip(lumina_dimoo.TOKENS, range(len(lumina_dimoo.TOKENS)), strict=True))
    system = tuple(range(NUM_SPECIAL, NUM_SPECIAL + shape.system_len))
    return lumina_dimoo.DiMOOLayout(
        vocab_size=shape.text_vocab_size + shape.codebook_size, code_offset=shape.text_vocab_size,
        image_grid=(shape.side, shape.side), drawing_ids=system[: shape.system_len // 4], seeing_ids=system, **ids,
    )  # fmt: skip


FAMILIES = {
    "mmada": Family(layout=_mmada_layout, sampling=mmada.SAMPLING, is_padded=True),
    "lumina-dimoo": Family(
        layout=_dimoo_layout, sampling=replace(lumina_dimoo.SAMPLING, num_steps=16), is_padded=False
    ),
}
