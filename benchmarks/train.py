"""`hermesflow bench train`: a step of Pair-DPO, forward and backward, against the published algorithm.

    step_live     the reference computes beside the step
    step_cached   its log-probabilities were computed before, and lie in a file

Ours are the functions of training itself: pairs are packed, log-probabilities, objective and gradients of all weights
computed; no optimizer, whose time is the same for both sides. The baseline (naive_model.train_step) goes over wins and
loses, of policy and reference, in four passes of padded sequences under dense masks, with the whole vocabulary at every
position. It has no cached reference, so that it computes one in both cases; what it reads is padded before the clock
starts, what ours reads is packed while it runs. Weights are random (e2e.make_model), those of the policy a little
beside the reference's. Loss and gradients of both are compared before anything is timed.

Peak memory holds gradients and what the passes keep, no weights. A backward pass needs twice what a forward pass does
by ModelWork.tree.

Peers for the loss by itself (Liger, cut cross-entropy, TRL) are in `bench ops --op linear_logprob`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from hermesflow.algorithms.algorithm import batch_logprobs
from hermesflow.algorithms.batch import PairBatch, PairVisit
from hermesflow.algorithms.packers import make_packer
from hermesflow.algorithms.pair_dpo import pass_objective
from hermesflow.algorithms.references import LiveReference, Reference, cached_reference
from hermesflow.benchmarks import e2e, naive_model
from hermesflow.benchmarks.measuring import Call, Effort, Part
from hermesflow.benchmarks.profiling import write_profile
from hermesflow.benchmarks.runner import Contest, ModelSettings, Run
from hermesflow.config import PAPER_OBJECTIVE, TrainConfig
from hermesflow.data.pairs import PAIRS_SCHEMA
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.phases import phase
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.models.model import Model, PromptFormat
from hermesflow.runtime.files import make_folder

CASES = ("step_live", "step_cached")
EFFORT = Effort(seconds=20.0, min_rounds=5, max_rounds=50)
# Largest relative error of the loss and of a weight's gradient. In bfloat16 the roundings of both sides count: an
# image's log-probability is a sum over hundreds of tokens.
LIMITS = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 0.2)}
MOVED = 0.02
"""How far the policy's weights are from the reference's, relative to their size."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The pairs of a step; the model is that of e2e.SHAPES."""

    num_pairs: int
    prompt_len: int = 20
    question_len: int = 16
    caption_len: int = 20


# Of 1,024 tokens an image, the baseline's activations for two pairs take half of an 80 GB GPU.
SHAPES = {
    "tiny": Shape(num_pairs=2, prompt_len=10, question_len=4, caption_len=7),
    "small": Shape(num_pairs=4),
    "showo-1.3b-256": Shape(num_pairs=4),
    "showo-1.3b": Shape(num_pairs=2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings(ModelSettings):
    """What to measure."""

    naive: bool = True
    """Measure the published algorithm too; without it nothing is compared."""
    profile: Path | None = None
    """Folder of a trace and a table for each case."""

    def __post_init__(self) -> None:
        self.check(SHAPES, CASES)


def run_train(settings: Settings) -> int:
    """Measure, print a table, write lines.

    Args:
        settings: what to measure and where to write.
    Returns: 0, or 1 if loss or gradients are not those of the published algorithm.
    Raises: InputError if a file cannot be written.
    """
    run = Run("train", settings, EFFORT, settings.torch_dtype)
    return measure_step(run, settings, Step(settings.shape, run.device, settings.torch_dtype))


def measure_step(run: Run, settings: Any, step: Step) -> int:
    """Compare, measure, print a table.

    Args:
        run: where lines and tables go.
        settings: Settings, or those of another family, with the same fields.
        step: what is measured.
    Returns: see run_train.
    """
    names = settings.cases or CASES
    if settings.naive and not run.is_right(step.comparisons(names)):
        return 1
    contests = [step.contest(name) for name in names]
    run.measure(*(one if settings.naive else replace(one, baselines={}) for one in contests))
    if settings.profile:
        make_folder(settings.profile)
        for one in contests:
            run.console.print(write_profile(one.case, one.ours["engine"].run, run.device, settings.profile))
    run.print_table("the baseline")
    return 0


class Step:
    """One step of Pair-DPO by our packed passes and by the published algorithm, over the same pairs.

    Another family overrides model_kind, settings, draw_codes, make_model, pad, run_naive and pass_work.
    """

    model_kind: type[Model] = Model

    def __init__(self, shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.shape_name, shape = shape_name, SHAPES[shape_name]
        self.transformer, layout = self.make_model(device, dtype)
        self.device, self.layout = device, layout
        generator = torch.Generator().manual_seed(0)

        def draw_ids(limit: int, length: int) -> list[int]:
            return torch.randint(limit, (length,), generator=generator).tolist()

        def text_ids(length: int) -> list[int]:
            return [layout.text_ids[number] for number in draw_ids(len(layout.text_ids), length)]

        def text(length: int) -> str:
            return " ".join(map(str, text_ids(length)))

        prompts = PromptFormat(caption_question=text(shape.question_len))
        model = self.model_kind(self.transformer, None, _SpelledIds(), layout, 0, prompts, None)
        rows = [
            {
                "record_id": str(number),
                "caption": text(shape.prompt_len),
                "sides": "both",
                **{name: self.draw_codes(generator) for name in ("record_codes", "win_codes", "lose_codes")},
                "win_caption_ids": text_ids(shape.caption_len),
                "lose_caption_ids": text_ids(shape.caption_len),
            }
            for number in range(shape.num_pairs)
        ]
        self.config = TrainConfig(pairs_per_step=shape.num_pairs, **self.settings())
        self.packer = make_packer(model, pa.Table.from_pylist(rows, PAIRS_SCHEMA), self.config, seed=0)
        self.visits = self.packer.visits(0)
        self.totals = self.packer.num_pairs(self.visits)
        self.reference = copy.deepcopy(self.transformer)
        self._references = {"step_live": LiveReference(self.reference), "step_cached": self._cached()}
        _move(self.transformer.requires_grad_(), torch.Generator(device).manual_seed(1))
        self._padded = self.pad(self.packer.pack(self.visits, device))
        self.work = ModelWork(config=self.transformer.config, layout=layout, dtype=dtype)

    def settings(self) -> dict[str, Any]:
        """Of TrainConfig: the paper's objective."""
        return dict(PAPER_OBJECTIVE)

    def draw_codes(self, generator: torch.Generator) -> list[int]:
        """Of an image, at random."""
        return torch.randint(self.layout.codebook_size, (self.layout.num_image_tokens,), generator=generator).tolist()

    def make_model(self, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Layout]:
        """Random weights, and their layout."""
        return e2e.make_model(e2e.SHAPES[self.shape_name].checkpoint, device, dtype)

    def pad(self, batch: PairBatch) -> Any:
        """What run_naive reads of a pass over all pairs."""
        return naive_model.pad_pairs(self.layout, batch, e2e.SHAPES[self.shape_name].num_text_tokens)

    def run(self, case: str) -> Tensor:
        """Loss of our step, 0-dim; gradients are added to those of the weights."""
        total, reference = torch.zeros((), device=self.device), self._references[case]
        for chosen in self._passes():
            batch = self.packer.pack(chosen, self.device)
            with phase("pass"):
                logprob = batch_logprobs(self.transformer, batch)
                loss, _ = pass_objective(logprob, reference.logprobs(batch), batch, self.totals, self.packer.config)
                loss.backward()
            total += loss.detach()
        return total

    def run_naive(self) -> Tensor:
        """The published algorithm's, likewise."""
        return naive_model.train_step(self.transformer, self.reference, self.layout, self._padded, self.config.beta)

    def contest(self, case: str) -> Contest:
        """Our step against the published algorithm's."""
        num_pairs, num_tokens = len(self.visits), sum(map(self.packer.num_tokens, self.visits))
        return Contest(
            case=case,
            shape=f"{self.shape_name}: {num_pairs} pairs, {self.layout.num_image_tokens} tokens an image, "
            f"{num_tokens} packed",
            dtype=self.work.dtype,
            ours={"engine": Part(run=self.without_gradients(partial(self.run, case)))},
            baselines={"naive": [Part(run=self.without_gradients(self.run_naive))]},
            passes=self.passes(case),
            items={"tokens": num_tokens, "pairs": num_pairs},
            more={"baseline_reference": "computed in the step"},
        )

    def without_gradients(self, call: Call) -> Call:
        """The call; then the gradients are let go, as a training loop does after its optimizer."""

        def run() -> None:
            call()
            self.transformer.zero_grad(set_to_none=True)

        return run

    def results(self, call: Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and gradients of a call by name of the weight; they are let go."""
        loss = call()
        gradients = {name: parameter.grad for name, parameter in self.transformer.named_parameters()}
        self.transformer.zero_grad(set_to_none=True)
        return loss, gradients

    def comparisons(self, cases: Sequence[str]) -> Iterator[str]:
        """How cases differ from the published algorithm, of those that do."""
        expected = self.results(self.run_naive)
        for case in cases:
            wrong = self.compare(self.results(partial(self.run, case)), expected)
            if wrong:
                yield f"{case}: {wrong}"

    def compare(self, got: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> str | None:
        """None, or how ours differ from the published algorithm's."""
        loss_limit, gradient_limit = LIMITS[self.work.dtype]
        (loss, gradients), (naive_loss, naive_gradients) = got, expected
        if not (loss - naive_loss).abs() <= loss_limit * naive_loss.abs():  # NaN is wrong too
            return f"the loss is {loss:.6g}, by the published algorithm {naive_loss:.6g}"
        for name, gradient in gradients.items():
            ours, right = (
                torch.zeros(1, device=self.device) if each is None else each.float()  # it has no part in this side
                for each in (gradient, naive_gradients[name])
            )
            error = float((ours - right).norm() / right.norm().clamp(min=1e-12))
            if not error <= gradient_limit:
                return f"the gradient of {name} differs from the published algorithm's by {error:.2g} of its norm"
        return None

    def passes(self, case: str) -> list[Work]:
        """What a step needs at least."""
        num_forwards = 4 if case == "step_live" else 3
        batches = [self.packer.pack(chosen) for chosen in self._passes()]
        return [self.pass_work(batch) for batch in batches for _ in range(num_forwards)]

    def pass_work(self, batch: PairBatch) -> Work:
        """What a forward pass needs at least."""
        return self.work.tree(batch.tree, len(batch.rows))

    def _passes(self) -> list[list[PairVisit]]:
        return [chosen for chosen, counts in self.packer.passes(self.visits) if counts]

    def _cached(self) -> Reference:
        def logprobs(batch: PairBatch) -> Tensor:
            with torch.inference_mode():
                return batch_logprobs(self.transformer, batch)

        with tempfile.TemporaryDirectory() as folder:
            return cached_reference(Path(folder) / "reference.parquet", [], self.packer, self.visits, logprobs)


class _SpelledIds:
    """A text tokenizer whose texts are their ids in figures."""

    def encode(self, text: str) -> list[int]:
        return [int(figures) for figures in text.split()]


@torch.no_grad()
def _move(transformer: Transformer, generator: torch.Generator) -> None:
    """Changes the weights a little, so that policy and reference differ."""
    for weight in transformer.parameters():
        weight += (
            MOVED
            * weight.abs().float().mean()
            * torch.randn(weight.shape, generator=generator, device=weight.device).to(weight)
        )
