"""`hermesflow bench e2e`: images, captions, answers and whole records, against the published algorithm.

Weights are random, at the shape "tiny" those of the built-in model, and the head's bias keeps eot from being drawn, so
that every answer has its full length. Both sides run in turn on the same weights; captions are drawn in the ten
published ways. The published algorithm (naive_model.py) works at batch 1 for text and prompt by prompt for images, so
where there are several its time is that of one times their number, and the line's baseline_scaled says so.

From the passes of engine/model_work.py, which say what the exact algorithms need:

    mfu             FLOPs of all passes / time / matmul rate of this device in this dtype, measured in the same run
    roof_fraction   sum over the passes of max(FLOPs / matmul rate, bytes / copy bandwidth) / time
    projection      hours of the paper's protocol: for images, captions and answers each its FLOPs at the shape of
                    Show-o 1.3B / (FLOPs / time) of that case. At that shape itself this scales by the number of items.
"""

from __future__ import annotations

import gzip
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from hermesflow import load_model
from hermesflow.benchmarks import naive_model
from hermesflow.benchmarks.case import Call
from hermesflow.benchmarks.lines import Line, console_table, write_lines
from hermesflow.benchmarks.measuring import (
    MIB,
    Roof,
    check_device,
    check_names,
    measure_roof,
    peak_bytes,
    percentiles,
    run_facts,
)
from hermesflow.benchmarks.random_checkpoint import NUM_SPECIAL, CheckpointShape, language_model_config
from hermesflow.engine.decoders.masked import ImageSamplingParams
from hermesflow.engine.decoders.text import SamplingParams
from hermesflow.engine.engine import Engine
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.engine.transformer import Transformer
from hermesflow.models import showo
from hermesflow.runtime.files import atomic_write, make_folder, write_text

CASES = ("images", "captions", "answers", "score", "curation")
DTYPES = ("float32", "bfloat16")
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
MIN_ROUNDS, MAX_ROUNDS, MIN_SECONDS = 3, 50, 3.0
PARTS = ("transformer", "attention", "mlp")
"""Of the transformer, marked in profiles; attention and mlp lie in the first."""
NUM_PROFILED = 15
"""Operations in a profile's table."""


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
class Settings:
    """What to measure."""

    device: str = "cpu"
    shape: str = "small"
    """One of SHAPES."""
    dtype: str = "float32"
    """float32 or bfloat16."""
    cases: Sequence[str] = ()
    """Empty is all."""
    naive: bool = True
    """Measure the published algorithm too."""
    out: Path | None = None
    """File of JSON lines."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        check_names("--shape", [self.shape], SHAPES)
        check_names("--dtype", [self.dtype], DTYPES)
        check_names("--case", self.cases, CASES)
        check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class NaivePart:
    """A part of the published algorithm's work, and how many times the case holds it."""

    name: str
    run: Call
    peak: Call
    """A shorter call that needs as much memory at its worst moment."""
    times: int = 1


@dataclass(frozen=True, kw_only=True)
class Case:
    """One task."""

    name: str
    shape: str
    """Its sizes in words."""
    run: Call
    """Ours."""
    passes: list[Work]
    items: dict[str, int] = field(default_factory=dict)
    """What one call makes."""
    naive: list[NaivePart] = field(default_factory=list)

    @property
    def num_flops(self) -> int:
        return sum(work.num_flops for work in self.passes)


def run_e2e(settings: Settings) -> int:
    """Measure, print table and projection, write lines and profiles.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if the engine's results are not those of the published algorithm.
    Raises: InputError if a file cannot be written.
    """
    console = Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False)
    device, dtype, lines = torch.device(settings.device), getattr(torch, settings.dtype), []
    facts = run_facts(device)  # before the file is written, which may make the checkout dirty
    if settings.out:
        write_lines(settings.out, lines)  # a path that cannot be written shows now
    if settings.profile:
        make_folder(settings.profile)
    roof = measure_roof(device)
    console.print(
        f"{facts['device']}: copy {roof.bytes_per_s / 1e9:.3g} GB/s, matmul {settings.dtype} "
        f"{roof.flops_per_s(dtype) / 1e12:.3g} TFLOP/s"
    )
    tasks = Tasks(SHAPES[settings.shape], device, dtype)
    wrong = tasks.check()
    if wrong:
        console.print(f"not measured: {wrong}")
        return 1
    for name in settings.cases or CASES:
        case = getattr(tasks, name)()
        console.print(f"{case.name} [{settings.shape}: {case.shape}, {settings.dtype}]")
        lines.append(_measure(case, settings, roof, dtype) | facts)
        if settings.out:
            write_lines(settings.out, lines)
        if settings.profile:
            console.print(_profile(case, tasks.engine.transformer, settings.profile, device))
    title = f"e2e, {settings.shape}, {facts['device']}: median ms; times as fast as the baseline (its ms and peak MiB)"
    console.print(console_table(lines, title))
    console.print(_projection(lines, dtype))
    return 0


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
        answered = self.engine.extend(
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
        for name, (ours, theirs) in pairs.items():
            share = float((ours == theirs).double().mean())
            if share < LEAST_EQUAL[dtype]:
                return f"{name} have {share:.0%} of the tokens of the published algorithm"
        return None

    def images(self) -> Case:
        """Guided images of each prompt."""
        shape, tokens = self.shape, self.engine.layout.num_image_tokens
        num_images = shape.num_prompts * shape.num_images
        return Case(
            name="images",
            shape=f"{num_images} of {tokens} tokens, {shape.num_steps} steps, guidance {shape.guidance_scale:g}",
            run=self._draw,
            passes=self._image_work(),
            items={"images": num_images, "image tokens": num_images * tokens},
            naive=[self._naive_images()],
        )

    def captions(self) -> Case:
        """Ten captions of each image."""
        shape, samples, tokens = self.shape, len(CAPTION_SAMPLING), CAPTION_SAMPLING[0].max_new_tokens
        num_captions = shape.num_viewed * samples
        return Case(
            name="captions",
            shape=f"{samples} of {tokens} tokens for {_count(shape.num_viewed, 'image')}",
            run=partial(self._caption, self.viewed),
            passes=self.work.answers(shape.num_viewed, 1, shape.caption_question_len, samples, tokens),
            items={"captions": num_captions, "caption tokens": num_captions * tokens},
            naive=[self._naive_captions(shape.num_viewed)],
        )

    def answers(self) -> Case:
        """Greedy answers to the questions about each image."""
        shape = self.shape
        return Case(
            name="answers",
            shape=f"{shape.num_questions} of {ANSWER_SAMPLING.max_new_tokens} tokens "
            f"for {_count(shape.num_viewed, 'image')}",
            run=partial(self._answer, self.viewed),
            passes=self._answer_work(shape.num_viewed),
            items={"answers": shape.num_viewed * shape.num_questions},
            naive=[self._naive_answers(shape.num_viewed)],
        )

    def score(self) -> Case:
        """The log-probability of each choice of the questions about each image."""
        shape, viewed = self.shape, self.shape.num_viewed
        questions = self.questions
        return Case(
            name="score",
            shape=f"{shape.num_questions} questions of {shape.num_choices} choices for {_count(viewed, 'image')}",
            run=lambda: self.engine.score_choices(self.viewed, [questions] * viewed, [self.choices] * viewed),
            passes=self.work.choices(
                viewed, shape.num_questions, shape.question_len, shape.num_choices, shape.choice_len
            ),
            items={"answers": viewed * shape.num_questions},
            naive=[
                NaivePart(
                    name="one image", run=self._naive_score, peak=partial(self._naive_score, 1), times=viewed
                )
            ],
        )  # fmt: skip

    def curation(self) -> Case:
        """Whole records: images of the prompt with answers about each, captions of the record's own image."""
        shape = self.shape
        records, num_images = shape.num_prompts, shape.num_prompts * shape.num_images
        samples, tokens = len(CAPTION_SAMPLING), CAPTION_SAMPLING[0].max_new_tokens
        own = self._codes(records)

        def run() -> None:
            codes = self._draw()
            self._caption(own)
            self._answer(codes.flatten(0, 1))

        return Case(
            name="curation",
            shape=f"{_count(records, 'record')} of {shape.num_images} images, {samples} captions, "
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

    def _image_work(self) -> list[Work]:
        shape = self.shape
        return self.work.images(shape.num_prompts, shape.num_images, shape.num_steps, shape.prompt_len)

    def _answer_work(self, num_images: int) -> list[Work]:
        shape = self.shape
        return self.work.answers(
            num_images, shape.num_questions, shape.question_len, 1, ANSWER_SAMPLING.max_new_tokens
        )  # fmt: skip

    def _draw(self) -> Tensor:
        shape, params = self.shape, self.params
        seeds = torch.arange(shape.num_prompts * shape.num_images).view(shape.num_prompts, -1)
        return self.engine.generate(
            self.prompts, num_images=shape.num_images, seeds=seeds, num_steps=params.num_steps,
            guidance_scale=params.guidance_scale, mask_temperature=params.mask_temperature,
            mask_decay=params.mask_decay,
        )  # fmt: skip

    def _caption(self, images: Tensor) -> list:
        questions, seeds = [[self.caption_question]] * len(images), torch.arange(len(images) * len(CAPTION_SAMPLING))
        return self.engine.extend(
            images, questions, sampling=CAPTION_SAMPLING, seeds=seeds.view(len(images), 1, -1)
        )  # fmt: skip

    def _answer(self, images: Tensor) -> list:
        seeds = torch.zeros(len(images), len(self.questions), 1, dtype=torch.int64)
        return self.engine.extend(images, [self.questions] * len(images), sampling=[ANSWER_SAMPLING], seeds=seeds)

    def _naive_images(self) -> NaivePart:
        shape = self.shape
        prompts = [self.prompts[0]] * shape.num_images

        def run(params: ImageSamplingParams) -> Tensor:
            return naive_model.draw_images(
                self.engine.transformer, self.engine.layout, prompts, params, num_text_tokens=shape.num_text_tokens
            )

        short = replace(self.params, num_steps=1)
        return NaivePart(
            name=f"{shape.num_images} images", run=partial(run, self.params), peak=partial(run, short),
            times=shape.num_prompts,
        )  # fmt: skip

    def _naive_captions(self, num_images: int) -> NaivePart:
        def run() -> None:
            for params in CAPTION_SAMPLING:
                self._naive_answer(self.caption_question, params)

        peak = partial(self._naive_last_token, self.caption_question, CAPTION_SAMPLING[-1])
        return NaivePart(name="captions of one image", run=run, peak=peak, times=num_images)

    def _naive_answers(self, num_images: int) -> NaivePart:
        def run() -> None:
            for question in self.questions:
                self._naive_answer(question, ANSWER_SAMPLING)

        peak = partial(self._naive_last_token, self.questions[0], ANSWER_SAMPLING)
        return NaivePart(name="answers about one image", run=run, peak=peak, times=num_images)

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


def _measure(case: Case, settings: Settings, roof: Roof, dtype: torch.dtype) -> Line:
    """The case's line, without what all lines of a run share."""
    device, parts = roof.device, case.naive if settings.naive else []
    peak = peak_bytes(case.run, device) / MIB
    naive_peak = max((peak_bytes(part.peak, device) / MIB for part in parts), default=None)
    ours, theirs = _time_in_turn(case.run, [(part.run, part.times) for part in parts], device)
    mine = percentiles(ours)
    naive_ms, seconds = statistics.median(theirs) if parts else None, mine.ms_p50 / 1e3
    scaled = ", ".join(f"{part.name} x {part.times}" for part in parts if part.times > 1)
    return {
        "bench": "e2e", "case": case.name, "shape": f"{settings.shape}: {case.shape}", "dtype": settings.dtype,
        "backend": "engine", "baseline": "naive" if parts else None, "ms_p20": mine.ms_p20, "ms_p50": mine.ms_p50,
        "ms_p80": mine.ms_p80, "baseline_ms_p50": naive_ms, "speedup": naive_ms and naive_ms / mine.ms_p50,
        "peak_mib": peak, "baseline_peak_mib": naive_peak,
        "gb_s": sum(work.num_bytes for work in case.passes) / seconds / 1e9,
        "tflop_s": case.num_flops / seconds / 1e12,
        "roof_fraction": sum(roof.seconds(work.num_bytes, work.num_flops, dtype) for work in case.passes) / seconds,
        "mfu": case.num_flops / seconds / roof.flops_per_s(dtype),
        "items_per_s": {name: count / seconds for name, count in case.items.items()},
        "num_rounds": len(ours), "baseline_rounds": len(theirs), "baseline_scaled": scaled or None,
    }  # fmt: skip


def _time_in_turn(run: Call, naive: list[tuple[Call, int]], device: torch.device) -> tuple[list[float], list[float]]:
    """Milliseconds of each round of ours and of the published algorithm, which come in turn.

    At least MIN_ROUNDS of ours and one of theirs, more of both while they take less than MIN_SECONDS.
    """

    def time_one(call: Call) -> float:
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        return (time.perf_counter() - start) * 1e3

    ours, theirs, start = [], [], time.perf_counter()
    while len(ours) < MIN_ROUNDS or (time.perf_counter() - start < MIN_SECONDS and len(ours) < MAX_ROUNDS):
        ours.append(time_one(run))
        if naive and (not theirs or time.perf_counter() - start < MIN_SECONDS):
            theirs.append(sum(times * time_one(call) for call, times in naive))
    return ours, theirs


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _profile(case: Case, transformer: Transformer, folder: Path, device: torch.device) -> str:
    """Write a trace of one run and the table of its operations, which is returned.

    The trace opens in Perfetto or chrome://tracing. On the CPU the parts of the transformer are marked in it and summed
    up; on CUDA a captured graph runs without Python, so that only its kernels show.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its start and end on stderr otherwise
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with ExitStack() as stack:
        if not on_cuda:
            stack.enter_context(_marked_parts(transformer))
        recorded = stack.enter_context(profile(activities=activities))
        start = time.perf_counter()
        case.run()
        _wait(device)
        seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as outside, atomic_write(folder / f"{case.name}.json.gz") as temporary:
        trace = Path(outside) / "trace.json"
        recorded.export_chrome_trace(str(trace))
        temporary.write_bytes(gzip.compress(trace.read_bytes()))
    averages = recorded.key_averages()
    spent = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    # On CUDA an operation's row repeats the time of its kernels, which have rows of their own.
    here = [event for event in averages if (event.device_type == DeviceType.CUDA) == on_cuda]
    rows = [(event.key, getattr(event, spent) / 1e6, event.count) for event in here if event.key not in PARTS]
    rows = sorted(rows, key=lambda row: -row[1])[:NUM_PROFILED]
    lines = [f"{case.name}: {seconds:.3g} s under the profiler; own time of each operation"]
    lines += [
        f"  {spent_s:9.4f} s  {spent_s / seconds:6.1%}  {count:7d} x  {name[:90]}" for name, spent_s, count in rows
    ]
    if not on_cuda:
        total = {event.key: event.cpu_time_total / 1e6 for event in averages if event.key in PARTS}
        total["elsewhere"] = seconds - total["transformer"]
        lines += ["parts", *(f"  {total[name]:9.4f} s  {total[name] / seconds:6.1%}  {name}" for name in total)]
    text = "\n".join(lines) + "\n"
    write_text(folder / f"{case.name}.txt", text)
    return text


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
        text_vocab_size=shape.checkpoint.text_vocab_size, codebook_size=shape.checkpoint.vq.codebook_size,
        num_image_tokens=shape.checkpoint.num_image_tokens, sot=0, eot=0,
    )  # fmt: skip
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
