"""Single steps of a model, timed alone and by kernel.

usage: python -m hermesflow.benchmarks.steps CASE [...] [--device cuda] [--shape showo-1.3b] [--dtype bfloat16]
           [--plain] [--out FILE.jsonl] [--profile FOLDER]

    roof       the copy and matmul rates that the other lines are compared with
    images     a step of guided images, in passes of 32 and of 64 spans
    decoding   a step of 64 answers, 8 about each image; on CUDA a graph
    attention  a layer's attention in a step of images, by the sizes of its kernel's blocks

Weights are random (e2e.make_model). On CUDA layers are fused as in the engine; `--plain` leaves
them to torch, op by op.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch

from hermesflow.benchmarks import attention_cases, e2e
from hermesflow.benchmarks.measuring import MIB, Call, Effort, Part, peak_bytes, percentiles
from hermesflow.benchmarks.profiling import write_profile
from hermesflow.benchmarks.runner import DTYPES, Contest, ModelSettings, Run
from hermesflow.engine.answer_sampler import Answers, AnswerSampler, SamplingParams
from hermesflow.engine.decoders.masked import ImageDecoder, ImageSamplingParams
from hermesflow.engine.device_graph import DeviceGraph, captures
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.prompt_spans import PromptSpans
from hermesflow.kernels import registry
from hermesflow.kernels.checks import triton_missing
from hermesflow.kernels.span_tree import SpanTree
from hermesflow.runtime.files import InputError, make_folder

NUM_SPANS = (32, 64)
"""Of a pass; a guided image is two."""
NUM_STEPS = 3
"""Timed steps of images, after the first, which is another one."""
NUM_VIEWED, NUM_SAMPLES = 8, 8
SAMPLING = SamplingParams(temperature=0.7, top_k=4, max_new_tokens=30)
BLOCKS = {"128x64": (128, 64, 8, 3), "64x64": (64, 64, 4, 3), "128x128": (128, 128, 8, 3)}
"""Rows of a block, keys of a tile, warps, stages."""
EFFORT = Effort(seconds=1.0, min_rounds=3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(ModelSettings):
    """What to measure."""

    plain: bool = False
    """Leave the layers to torch, op by op."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        self.check(e2e.SHAPES, MEASURE)


def run_steps(settings: Settings) -> None:
    """Measure, print a table, write lines and profiles. Raises: InputError if a file cannot be written."""
    run = Run("steps", settings, EFFORT, settings.torch_dtype)
    if settings.profile:
        make_folder(settings.profile)
    for case in settings.cases or MEASURE:
        MEASURE[case](run, settings)
    run.print_table()


def measure_roof_again(run: Run, settings: Settings) -> None:
    """A copy and a matmul, as cases like any other."""
    dtype, size = settings.torch_dtype, 8192 if run.device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=run.device).to(dtype) for _ in range(2))
    source = torch.randn(1 << (28 if run.device.type == "cuda" else 25), device=run.device)
    target, product = torch.empty_like(source), torch.empty_like(a)
    for case, call, work in (
        ("copy", lambda: target.copy_(source), Work(num_flops=0, num_bytes=2 * source.nbytes)),
        ("matmul", lambda: torch.mm(a, b, out=product), Work(num_flops=2 * size**3, num_bytes=3 * a.nbytes)),
    ):
        run.measure(_contest(case, f"{work.num_bytes >> 20} MiB", dtype, {"torch": call}, work))


def measure_images(run: Run, settings: Settings) -> None:
    """The steps of a pass, each between two waits for the device."""
    transformer, layout = _model(run, settings)
    work = ModelWork(config=transformer.config, layout=layout, dtype=settings.torch_dtype)
    params = ImageSamplingParams(num_steps=1 + NUM_STEPS, guidance_scale=5.0, mask_temperature=1.0)
    prompt = list(range(1, 1 + e2e.SHAPES[settings.shape].prompt_len))
    for num_spans in NUM_SPANS:
        num_images, decoder, samples = num_spans // 2, ImageDecoder(transformer, layout), []
        seeds = torch.arange(num_images)[None]

        def timed(steps: list, samples: list[float] = samples) -> Iterator:
            for number, step in enumerate(steps):
                began = _now(run.device)
                yield step
                if number:
                    samples.append((_now(run.device) - began) * 1e3)

        draw = _inference(partial(decoder.generate, [prompt], seeds, params, max_sequences=num_spans))
        peak = peak_bytes(draw, run.device) / MIB  # this call also compiles kernels
        draw(progress=timed)
        if not samples:
            run.notes.append(f"steps of {num_spans} spans: the pass is one CUDA graph; take a larger shape")
            continue
        passes, backend = work.images(1, num_images, 1 + NUM_STEPS, len(prompt)), _mode(settings)
        shape = f"{settings.shape}: {num_spans} spans of {layout.image_length} tokens"
        tokens = {"tokens": num_spans * layout.image_length}
        contest = _contest("image_step", shape, work.dtype, {backend: draw}, passes[1 + NUM_STEPS // 2], tokens)
        run.record([contest], {("image_step", backend): percentiles(samples)}, {("image_step", backend): peak})
        run.console.print(f"image_step [{shape}]: {', '.join(f'{sample:.4g}' for sample in samples)} ms")
        _profile(run, settings, f"image_step-{num_spans}-{backend}", draw)


def measure_decoding(run: Run, settings: Settings) -> None:
    """A step of all answers, each of its full length but one token."""
    transformer, layout = _model(run, settings)
    shape, num_rows = e2e.SHAPES[settings.shape], NUM_VIEWED * NUM_SAMPLES
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(layout.codebook_size, (NUM_VIEWED, layout.num_image_tokens), generator=generator)
    prompts = PromptSpans(layout, codes, [[list(range(1, 1 + shape.caption_question_len))]] * NUM_VIEWED)
    spans = [prompts.image(image) for image in range(NUM_VIEWED)]
    spans += [(prompts.question(image, 0), image, "causal") for image in range(NUM_VIEWED)]
    asked = SpanTree.build(spans, run.device, fixed=captures(run.device))
    answers = [([0], NUM_VIEWED + row // NUM_SAMPLES, "causal") for row in range(num_rows)]
    tree = asked.extend(answers, reserve=SAMPLING.max_new_tokens - 1)
    cache, ids = transformer.new_cache(tree.capacity), layout.text_ids
    sampler = AnswerSampler(transformer, cache, ids.rows(transformer.head), layout.eot, None, ids=ids)
    seeds = torch.arange(num_rows, device=run.device).view(NUM_VIEWED, NUM_SAMPLES)
    rows = Answers.new(seeds, [SAMPLING] * NUM_SAMPLES)
    last = torch.from_numpy((asked.packed_starts + asked.num_new)[NUM_VIEWED:] - 1).to(run.device)
    with torch.inference_mode():
        sampler.draw(sampler.logits(transformer(asked, cache, rows=last)).repeat_interleave(NUM_SAMPLES, 0), rows)
        tree = tree.decode(range(asked.num_spans, tree.num_spans), rows.last_token(), rows.length)
    step = _inference(DeviceGraph(partial(sampler.advance, tree, rows), run.device))
    for _ in range(SAMPLING.max_new_tokens):  # what has ended repeats its last step
        step()
    seen = prompts.image_length + len(prompts.question(0, 0)) + SAMPLING.max_new_tokens - 1
    work = ModelWork(config=transformer.config, layout=layout, dtype=settings.torch_dtype)
    least = work.one_pass([(num_rows, 1, seen, True)], tree.capacity - num_rows, num_rows, len(ids))
    shape = f"{settings.shape}: {num_rows} rows of {NUM_VIEWED} images"
    backend, tokens = _mode(settings), {"tokens": num_rows}
    run.measure(_contest("decoding_step", shape, work.dtype, {backend: step}, least, tokens))
    _profile(run, settings, f"decoding_step-{backend}", lambda: [step() for _ in range(NUM_STEPS)])


def measure_attention(run: Run, settings: Settings) -> None:
    """As it is, and by blocks of other sizes where Triton runs; a wrong result is not timed."""
    sizes = attention_cases.SHAPES.get(settings.shape)
    if sizes is None:
        run.notes.append(f"attention: {settings.shape} has no case of its own")
        return
    case = next(attention_cases.span_cases(sizes, run.device))
    calls: dict[str, Call] = {"as it is": partial(case.run, None)}
    failed, missing = {}, registry.backends()["span_attention"]["triton"]
    for name, launch in {} if missing or run.device.type != "cuda" else BLOCKS.items():
        on_blocks = _by_blocks(launch)
        try:
            wrong = on_blocks(case.check)("triton")
        except Exception as error:  # such blocks may need more than the device has
            wrong = f"{type(error).__name__}: {error}"[:300]
        if wrong is None:
            calls[f"triton {name}"] = partial(on_blocks(case.run), "triton")
        else:
            failed[f"triton {name}"] = wrong
    work = Work(num_flops=case.num_flops, num_bytes=case.num_bytes)
    run.measure(_contest("attention", f"{settings.shape}: {case.shape}", case.dtype, calls, work, failed=failed))
    _profile(run, settings, "attention", calls["as it is"])


MEASURE: dict[str, Callable[[Run, Settings], None]] = {
    "roof": measure_roof_again,
    "images": measure_images,
    "decoding": measure_decoding,
    "attention": measure_attention,
}


def _by_blocks(launch: tuple[int, int, int, int]) -> Callable[[Callable], Callable]:
    """Wraps calls so that attention's forward kernel takes these blocks; it has no argument for them."""
    kernels = importlib.import_module("hermesflow.kernels.span_attention.span_attention_triton")
    shipped = kernels._launches

    def launches(*arguments: object) -> tuple:
        found = shipped(*arguments)
        return found._replace(forward=type(found.forward)(*launch))

    @contextmanager
    def exchanged() -> Iterator[None]:
        kernels._launches = launches
        try:
            yield
        finally:
            kernels._launches = shipped

    return lambda call: exchanged()(call)


def _model(run: Run, settings: Settings) -> tuple:
    transformer, layout = e2e.make_model(e2e.SHAPES[settings.shape].checkpoint, run.device, settings.torch_dtype)
    transformer.head.bias[layout.eot] = -100.0  # is never drawn
    if not settings.plain and run.device.type == "cuda" and triton_missing() is None:
        transformer.fuse_layers()
    return transformer, layout


def _mode(settings: Settings) -> str:
    return "fused" if settings.device == "cuda" and not settings.plain else "plain"


def _contest(
    case: str,
    shape: str,
    dtype: torch.dtype,
    calls: dict[str, Call],
    work: Work,
    items: dict[str, int] | None = None,
    failed: dict[str, str] | None = None,
) -> Contest:
    ours = {name: Part(run=call) for name, call in calls.items()}
    options = {"items": items or {}, "failed": failed or {}}
    return Contest(case=case, shape=shape, dtype=dtype, ours=ours, baselines={}, passes=[work], **options)


def _inference(call: Callable) -> Callable:
    return torch.inference_mode()(call)


def _now(device: torch.device) -> float:
    """Seconds, after the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _profile(run: Run, settings: Settings, name: str, call: Call) -> None:
    if settings.profile:
        run.console.print(write_profile(name, call, run.device, settings.profile), soft_wrap=True)


def main() -> int:
    """Returns: the exit code: 2 if a file cannot be written."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"{', '.join(MEASURE)} [all]")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", choices=e2e.SHAPES, default="tiny", help="of the model [tiny]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--plain", action="store_true", help="leave the layers to torch, op by op")
    parser.add_argument("--out", type=Path, help="file of JSON lines")
    parser.add_argument("--profile", type=Path, help="folder of a trace and a table for each case")
    arguments = parser.parse_args()
    try:
        run_steps(Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)}))
    except InputError as error:
        print(f"steps: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
