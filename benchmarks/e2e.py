"""`hermesflow bench e2e`: images, captions, answers and whole records, against the published algorithm.

Weights are random, at the shape "tiny" those of the built-in model, and the head's bias keeps eot from being drawn, so
that every answer has its full length. Both sides run in turn on the same weights; captions are drawn in the ten
published ways. The published algorithm (naive_model.py) works at batch 1 for text and prompt by prompt for images, so
where there are several its time is that of one times their number, and the line's baseline_scaled says so.

The passes of engine/model_work.py say what the exact algorithms need. The run ends with a projection, hours of the
paper's protocol: for images, captions and answers each its FLOPs at the shape of Show-o 1.3B / (FLOPs / time) of that
case. At that shape itself this scales by the number of items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from hermesflow import load_model
from hermesflow.benchmarks import naive_model
from hermesflow.benchmarks.lines import Line
from hermesflow.benchmarks.measuring import Call, Effort, Part
from hermesflow.benchmarks.profiling import write_profile
from hermesflow.benchmarks.random_checkpoint import NUM_SPECIAL, CheckpointShape, language_model_config
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer
from hermesflow.models import showo
from hermesflow.runtime.files import make_folder

CASES = ("images", "captions", "answers", "score", "curation")
# Greedy once, then each top-k with each temperature: HermesFlow's inference_mmu_caption.py.
CAPTION_SAMPLING = (
    SamplingParams(temperature=0.0, max_new_tokens=30),
    *(SamplingParams(top_k=k, temperature=t, max_new_tokens=30) for k in (2, 3, 4) for t in (0.1, 0.7, 2.0)),
)
ANSWER_SAMPLING = SamplingParams(temperature=0.0, max_new_tokens=8)
NUM_CHECKED = 2
"""Questions whose answers are compared before anything is timed."""
LEAST_EQUAL = {torch.float32: 0.9, torch.bfloat16: 0.1}
"""Share of greedy tokens that must be equal: where rounding turns a near-tie, all that follows may differ."""
EFFORT = Effort(seconds=3.0, min_rounds=3, max_rounds=50, baselines_once=True)
PARTS = ("transformer", "attention", "mlp")
"""Of the transformer, marked in profiles; attention and mlp lie in the first."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and how much is asked of it."""

    checkpoint: CheckpointShape | None
    """Sizes of a random Show-o; None is the built-in model."""
    num_text_tokens: int = 128
    """To which the published code pads prompts."""
    num_prompts: int = 1
    """Of the case images, and records of the case curation."""
    num_images: int = 16
    """Of each prompt."""
    num_steps: int = 12
    guidance_scale: float = 5.0
    prompt_len: int = 20
    num_viewed: int = 1
    """Images of the cases captions, answers and score."""
    caption_question_len: int = 16
    num_questions: int = 6
    """Of an image."""
    question_len: int = 24
    num_choices: int = 4
    choice_len: int = 3


SHAPES = {
    "tiny": Shape(
        checkpoint=None, num_text_tokens=16, num_images=4, num_steps=4, guidance_scale=0.5, prompt_len=10,
        caption_question_len=4, num_questions=3, question_len=6, choice_len=1,
    ),
    "small": Shape(checkpoint=CheckpointShape(hidden_size=512, num_layers=4, num_heads=8, mlp_size=2048)),
    "showo-1.3b-256": Shape(checkpoint=CheckpointShape(), num_prompts=2, num_steps=50, num_viewed=64),
    "showo-1.3b": Shape(
        checkpoint=CheckpointShape(num_image_tokens=1024), num_prompts=2, num_steps=50, num_viewed=64
    ),
}  # fmt: skip

# HermesFlow (arXiv 2502.12148) and its code: 5,000 records, 16 images of 50 steps, ten captions, all images questioned.
PAPER_RECORDS = 5000
PAPER_SHAPE = SHAPES["showo-1.3b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(ModelSettings):
    """What to measure."""

    naive: bool = True
    """Measure the published algorithm too."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        self.check(SHAPES, CASES)


def run_e2e(settings: Settings) -> int:
    """Measure, print table and projection, write lines and profiles.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if the engine's results are not those of the published algorithm.
    Raises: InputError if a file cannot be written.
    """
    run = Run("e2e", settings, EFFORT, settings.torch_dtype)
    tasks = Tasks(SHAPES[settings.shape], run.device, settings.torch_dtype)
    contests = (getattr(tasks, name)() for name in settings.cases or CASES)
    if not measure_tasks(run, settings, contests, tasks.check, tasks.engine.transformer):
        return 1
    run.console.print(_projection(run.lines, settings.torch_dtype))
    return 0


def measure_tasks(
    run: Run,
    settings: Any,
    contests: Iterable[Contest],
    check: Callable[[], str | None],
    transformer: Transformer,
) -> bool:
    """Check, then measure contests one by one and print their table.

    Args:
        run: where lines and tables go.
        settings: Settings, or those of another family, with the same fields.
        contests: made one by one.
        check: None, or how the engine's results are wrong.
        transformer: whose parts profiles mark.
    Returns: whether the results are right; if not, nothing is measured.
    """
    if settings.profile:
        make_folder(settings.profile)
    if not run.is_right([check()]):
        return False
    for contest in contests:
        baselines = contest.baselines if settings.naive else {}
        run.measure(replace(contest, shape=f"{settings.shape}: {contest.shape}", baselines=baselines))
        if settings.profile:
            run.console.print(_profile(contest, transformer, settings.profile, run.device))
    run.print_table("the baseline")
    return True


def first_difference(pairs: Mapping[str, tuple[Tensor, Tensor]], dtype: torch.dtype) -> str | None:
    """None, or which of pairs {name: (our tokens, the baseline's)} have too few equal ones, in a model of dtype."""
    for name, (ours, theirs) in pairs.items():
        share = float((ours == theirs).double().mean()) if ours.shape == theirs.shape else 0.0
        if share < LEAST_EQUAL[dtype]:
            return f"{name} have {share:.0%} of the tokens of the published algorithm"
    return None


@contextmanager
def recorded_passes(seen: list[Work], work: ModelWork, head_size: int) -> Iterator[None]:
    """Notes what each of our transformer's passes needs, with logits of head_size ids."""
    forward = Transformer.forward

    def noting(self, tree, cache=None, embeds=None, rows=None):
        seen.append(work.tree(tree, len(tree.token_ids) if rows is None else len(rows), head_size))
        return forward(self, tree, cache, embeds, rows)

    Transformer.forward = noting
    try:
        yield
    finally:
        Transformer.forward = forward


class FamilyTasks:
    """What the cases of a family share: contests of one engine with its published loop.

    A subclass sets engine, work and prompt.
    """

    engine: Engine
    work: ModelWork
    prompt: list[int]

    def draw(self, num_images: int, params: Any) -> Tensor:
        """Codes [num_images, N] of the engine for the prompt."""
        seeds = torch.arange(num_images)[None]
        return self.engine.generate([self.prompt], num_images=num_images, seeds=seeds, sampling=params)[0]

    def make_contest(
        self,
        case: str,
        shape: str,
        run: Call,
        passes: list[Work],
        items: dict[str, int],
        baseline: Part,
        name: str = "naive",
    ) -> Contest:
        """The engine's run against the published loop, or another baseline of that name."""
        return Contest(
            case=case,
            shape=shape,
            dtype=self.work.dtype,
            ours={"engine": Part(run=run)},
            baselines={name: [baseline]},
            passes=passes,
            items=items,
        )


class Tasks:
    """The cases of one shape, on one engine."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(0)
        transformer, layout = make_model(shape.checkpoint, device, dtype)
        transformer.head.bias[layout.eot] = -100.0  # is never drawn
        self.engine = Engine(transformer, layout)
        self.work = ModelWork(config=transformer.config, layout=layout, dtype=dtype)
        self.params = ImageSamplingParams(
            num_steps=shape.num_steps, guidance_scale=shape.guidance_scale, mask_temperature=1.0, mask_decay="showo"
        )
        self.caption_question = self._text(shape.caption_question_len)
        self.questions = [self._text(shape.question_len) for _ in range(shape.num_questions)]
        self.choices = [
            [self._text(shape.choice_len) for _ in range(shape.num_choices)] for _ in range(shape.num_questions)
        ]
        self.prompts = [self._text(shape.prompt_len) for _ in range(shape.num_prompts)]
        self.viewed = self._codes(shape.num_viewed)

    def check(self) -> str | None:
        """None, or how the engine's results differ from the published algorithm's.

        Compared are log-probabilities of choices, and what needs no random numbers: greedy answers and images.
        """
        transformer, layout, dtype = self.engine.transformer, self.engine.layout, self.work.dtype
        codes, questions = self.viewed[0].tolist(), self.questions[:NUM_CHECKED]
        scored = self.engine.score_choices(self.viewed[:1], [questions], [self.choices[:NUM_CHECKED]], text_only=False)
        for question, choices, scores in zip(questions, self.choices, scored[0], strict=False):
            for choice, score in zip(choices, scores, strict=True):
                truth = naive_model.score_choice(transformer, layout, codes, question, choice)
                # 20 roundings of a sum of log-probabilities; it is of the size of its largest terms.
                if not abs(score - truth) <= 20 * torch.finfo(dtype).eps * abs(truth):
                    return f"a choice's log-probability is {score}, by the published algorithm {truth}"

        seeds = torch.zeros(1, len(questions), 1, dtype=torch.int64)
        answered = self.engine.generate_text(
            self.viewed[:1], [questions], sampling=[ANSWER_SAMPLING], seeds=seeds, text_only=False
        )[0]
        expected = [self._naive_answer(question, ANSWER_SAMPLING) for question in questions]
        params = replace(self.params, num_steps=4, temperature=0.0, mask_temperature=0.0)
        drawn = self.engine.generate(self.prompts[:1], num_images=1, seeds=seeds[:, 0], **asdict(params))
        image = naive_model.draw_images(
            transformer, layout, self.prompts[:1], params, num_text_tokens=self.shape.num_text_tokens
        )
        pairs = {
            "greedy answers": (torch.tensor(answered)[:, 0], torch.tensor(expected)),
            "greedy images": (drawn[0], image),
        }
        return first_difference(pairs, dtype)

    def images(self) -> Contest:
        """Guided images of each prompt."""
        shape, tokens = self.shape, self.engine.layout.num_image_tokens
        num_images = shape.num_prompts * shape.num_images
        return self._contest(
            "images",
            f"{num_images} of {tokens} tokens, {shape.num_steps} steps, guidance {shape.guidance_scale:g}",
            run=self._draw,
            passes=self._image_work(),
            items={"images": num_images, "image tokens": num_images * tokens},
            naive=[self._naive_images()],
        )

    def captions(self) -> Contest:
        """Ten captions of each image."""
        shape, samples, tokens = self.shape, len(CAPTION_SAMPLING), CAPTION_SAMPLING[0].max_new_tokens
        num_captions = shape.num_viewed * samples
        return self._contest(
            "captions",
            f"{samples} of {tokens} tokens for {_count(shape.num_viewed, 'image')}",
            run=partial(self._caption, self.viewed),
            passes=self.work.answers(shape.num_viewed, 1, shape.caption_question_len, samples, tokens),
            items={"captions": num_captions, "caption tokens": num_captions * tokens},
            naive=[self._naive_captions(shape.num_viewed)],
        )

    def answers(self) -> Contest:
        """Greedy answers to the questions about each image."""
        shape = self.shape
        return self._contest(
            "answers",
            f"{shape.num_questions} of {ANSWER_SAMPLING.max_new_tokens} tokens for {_count(shape.num_viewed, 'image')}",
            run=partial(self._answer, self.viewed),
            passes=self._answer_work(shape.num_viewed),
            items={"answers": shape.num_viewed * shape.num_questions},
            naive=[self._naive_answers(shape.num_viewed)],
        )

    def score(self) -> Contest:
        """The log-probability of each choice of the questions about each image."""
        shape, viewed = self.shape, self.shape.num_viewed
        questions = self.questions
        return self._contest(
            "score",
            f"{shape.num_questions} questions of {shape.num_choices} choices for {_count(viewed, 'image')}",
            run=lambda: self.engine.score_choices(self.viewed, [questions] * viewed, [self.choices] * viewed),
            passes=self.work.choices(
                viewed, shape.num_questions, shape.question_len, shape.num_choices, shape.choice_len
            ),
            items={"answers": viewed * shape.num_questions},
            naive=[Part(name="one image", run=self._naive_score, peak=partial(self._naive_score, 1), times=viewed)],
        )

    def curation(self) -> Contest:
        """Whole records: images of the prompt with answers about each, captions of the record's own image."""
        shape = self.shape
        records, num_images = shape.num_prompts, shape.num_prompts * shape.num_images
        samples, tokens = len(CAPTION_SAMPLING), CAPTION_SAMPLING[0].max_new_tokens
        own = self._codes(records)

        def run() -> None:
            codes = self._draw()
            self._caption(own)
            self._answer(codes.flatten(0, 1))

        return self._contest(
            "curation",
            f"{_count(records, 'record')} of {shape.num_images} images, {samples} captions, "
            f"{shape.num_questions} answers an image",
            run=run,
            passes=[
                *self._image_work(),
                *self.work.answers(records, 1, shape.caption_question_len, samples, tokens),
                *self._answer_work(num_images),
            ],
            items={"records": records},
            naive=[self._naive_images(), self._naive_captions(records), self._naive_answers(num_images)],
        )

    def _contest(
        self, case: str, shape: str, run: Call, passes: list[Work], items: dict[str, int], naive: list[Part]
    ) -> Contest:
        return Contest(
            case=case,
            shape=shape,
            dtype=self.work.dtype,
            ours={"engine": Part(run=run)},
            baselines={"naive": naive},
            passes=passes,
            items=items,
        )

    def _image_work(self) -> list[Work]:
        shape = self.shape
        return self.work.images(shape.num_prompts, shape.num_images, shape.num_steps, shape.prompt_len)

    def _answer_work(self, num_images: int) -> list[Work]:
        shape = self.shape
        return self.work.answers(num_images, shape.num_questions, shape.question_len, 1, ANSWER_SAMPLING.max_new_tokens)

    def _draw(self) -> Tensor:
        shape, params = self.shape, self.params
        seeds = torch.arange(shape.num_prompts * shape.num_images).view(shape.num_prompts, -1)
        return self.engine.generate(
            self.prompts,
            num_images=shape.num_images,
            seeds=seeds,
            num_steps=params.num_steps,
            guidance_scale=params.guidance_scale,
            mask_temperature=params.mask_temperature,
            mask_decay=params.mask_decay,
        )

    def _caption(self, images: Tensor) -> list:
        questions, seeds = [[self.caption_question]] * len(images), torch.arange(len(images) * len(CAPTION_SAMPLING))
        return self.engine.generate_text(
            images, questions, sampling=CAPTION_SAMPLING, seeds=seeds.view(len(images), 1, -1)
        )

    def _answer(self, images: Tensor) -> list:
        seeds = torch.zeros(len(images), len(self.questions), 1, dtype=torch.int64)
        return self.engine.generate_text(
            images, [self.questions] * len(images), sampling=[ANSWER_SAMPLING], seeds=seeds
        )

    def _naive_images(self) -> Part:
        shape = self.shape
        prompts = [self.prompts[0]] * shape.num_images

        def run(params: ImageSamplingParams) -> Tensor:
            return naive_model.draw_images(
                self.engine.transformer, self.engine.layout, prompts, params, num_text_tokens=shape.num_text_tokens
            )

        short = replace(self.params, num_steps=1)
        return Part(
            name=f"{shape.num_images} images",
            run=partial(run, self.params),
            peak=partial(run, short),
            times=shape.num_prompts,
        )

    def _naive_captions(self, num_images: int) -> Part:
        def run() -> None:
            for params in CAPTION_SAMPLING:
                self._naive_answer(self.caption_question, params)

        peak = partial(self._naive_last_token, self.caption_question, CAPTION_SAMPLING[-1])
        return Part(name="captions of one image", run=run, peak=peak, times=num_images)

    def _naive_answers(self, num_images: int) -> Part:
        def run() -> None:
            for question in self.questions:
                self._naive_answer(question, ANSWER_SAMPLING)

        peak = partial(self._naive_last_token, self.questions[0], ANSWER_SAMPLING)
        return Part(name="answers about one image", run=run, peak=peak, times=num_images)

    def _naive_answer(self, question: list[int], params: SamplingParams) -> list[int]:
        codes = self.viewed[0].tolist()
        return naive_model.answer_question(self.engine.transformer, self.engine.layout, codes, question, params)

    def _naive_last_token(self, question: list[int], params: SamplingParams) -> None:
        given = [0] * (params.max_new_tokens - 1)
        self._naive_answer([*question, *given], replace(params, max_new_tokens=1))

    def _naive_score(self, num_questions: int | None = None) -> None:
        codes = self.viewed[0].tolist()
        for question, choices in list(zip(self.questions, self.choices, strict=True))[:num_questions]:
            for choice in choices:
                naive_model.score_choice(self.engine.transformer, self.engine.layout, codes, question, choice)

    def _text(self, length: int) -> list[int]:
        return torch.randint(self.engine.layout.text_vocab_size, (length,), generator=self.generator).tolist()

    def _codes(self, num_images: int) -> Tensor:
        layout = self.engine.layout
        return torch.randint(layout.codebook_size, (num_images, layout.num_image_tokens), generator=self.generator)


def make_model(
    checkpoint: CheckpointShape | None, device: torch.device, dtype: torch.dtype
) -> tuple[Transformer, TokenLayout]:
    """A model on the device, nothing written: random weights, or those of the built-in model."""
    if checkpoint is None:
        built_in = load_model("tiny")
        layout, config = built_in.layout, replace(built_in.transformer.config, head_bias=True)
    else:
        codes = checkpoint.vq.codebook_size
        text = checkpoint.text_vocab_size
        layout = TokenLayout(
            text_vocab_size=text, codebook_size=codes, num_image_tokens=checkpoint.num_image_tokens, sot=0, eot=0
        )
        vocab_size = text + NUM_SPECIAL + codes + 1
        config = showo.transformer_config(language_model_config(checkpoint), vocab_size)
    with torch.device(device):
        transformer = Transformer(config).to(dtype)
    transformer.init_weights(torch.Generator(device).manual_seed(0))
    if checkpoint is None:
        transformer.load_state_dict(built_in.transformer.state_dict(), strict=False)
    return transformer.eval().requires_grad_(False), layout


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(contest: Contest, transformer: Transformer, folder: Path, device: torch.device) -> str:
    """A profile of one run, whose table is returned. On the CPU it marks and sums up the parts of the transformer; on
    CUDA a captured graph runs without Python, so that only its kernels show."""
    is_cpu = device.type == "cpu"
    with _marked_parts(transformer) if is_cpu else nullcontext():
        return write_profile(contest.case, contest.ours["engine"].run, device, folder, PARTS if is_cpu else ())


@contextmanager
def _marked_parts(transformer: Transformer) -> Iterator[None]:
    """Names the transformer's parts in a profile."""
    marked: list[tuple[str, nn.Module]] = [("transformer", transformer)]
    for block in transformer.blocks:
        marked += [("attention", block.attention), ("mlp", block.mlp)]
    open_marks: list[record_function] = []

    def enter(name: str, module: nn.Module, inputs: tuple) -> None:
        open_marks.append(record_function(name))
        open_marks[-1].__enter__()

    def leave(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        open_marks.pop().__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(partial(enter, name)) for name, module in marked]
    handles += [module.register_forward_hook(leave) for _, module in marked]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _projection(lines: Sequence[Line], dtype: torch.dtype) -> str:
    """The paper's protocol on this device, in hours; see the module's docstring."""
    rates = {line["case"]: line["tflop_s"] * 1e12 for line in lines}
    parts = {name: work / rates[name] / 3600 for name, work in paper_flops(dtype).items() if name in rates}
    if len(parts) < 3:
        return "projection to the paper's protocol: needs the cases images, captions and answers"
    hours = ", ".join(f"{name} {value:.3g}" for name, value in parts.items())
    own_shape = lines[0]["shape"].startswith("showo-1.3b:")
    by = "measured at its shape" if own_shape else "by FLOPs at the utilisation measured at this shape"
    return (
        f"the paper's protocol ({PAPER_RECORDS:,} records at Show-o 1.3B with 1,024 tokens an image): "
        f"{sum(parts.values()):.3g} hours on this device ({hours}), {by}"
    )


def paper_flops(dtype: torch.dtype) -> dict[str, float]:
    """FLOPs of the paper's protocol by case: 80,000 images, captions of 5,000 and answers about all 80,000."""
    shape = PAPER_SHAPE
    layout = TokenLayout(
        text_vocab_size=shape.checkpoint.text_vocab_size,
        codebook_size=shape.checkpoint.vq.codebook_size,
        num_image_tokens=shape.checkpoint.num_image_tokens,
        sot=0,
        eot=0,
    )
    config = showo.transformer_config(language_model_config(shape.checkpoint), layout.vocab_size)
    work = ModelWork(config=config, layout=layout, dtype=dtype)
    samples, caption, answer = len(CAPTION_SAMPLING), CAPTION_SAMPLING[0], ANSWER_SAMPLING
    of_record = {
        "images": work.images(1, shape.num_images, shape.num_steps, shape.prompt_len),
        "captions": work.answers(1, 1, shape.caption_question_len, samples, caption.max_new_tokens),
        "answers": work.answers(
            shape.num_images, shape.num_questions, shape.question_len, 1, answer.max_new_tokens
        ),
    }  # fmt: skip
    return {name: PAPER_RECORDS * sum(one.num_flops for one in passes) for name, passes in of_record.items()}


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")
