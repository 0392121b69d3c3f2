"""The cases of `hermesflow bench drop-in` for Show-o's class, and what those of all classes share."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hermesflow.benchmarks import e2e, published_inputs
from hermesflow.benchmarks.random_checkpoint import TINY, CheckpointShape, language_model_config
from hermesflow.drop_in import accelerate
from hermesflow.engine.model_work import ModelWork, Work
from hermesflow.engine.token_layout import TokenLayout
from hermesflow.models import showo

CASES = ("t2i_generate", "mmu_generate", "pair_dpo_step")
LEAST_EQUAL = {torch.float32: 0.98, torch.bfloat16: 0.1}
"""Share of tokens that must be equal: where rounding turns a near-tie, all that follows may differ."""
LIMITS = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (5e-2, 0.2)}
"""Largest relative error of the loss and of a weight's gradient."""
BETA = 0.2
SHARPENED = 1e4


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model, and how much is asked of it."""

    checkpoint: CheckpointShape
    max_seq_length: int = 128
    num_prompts: int = 8
    num_steps: int = 12
    guidance_scale: float = 5.0
    prompt_len: int = 20
    question_len: int = 16
    answer_len: int = 30
    num_pairs: int = 4
    caption_len: int = 36
    """Question and caption."""


SHAPES = {
    "tiny": Shape(checkpoint=TINY, max_seq_length=16, num_prompts=2, num_steps=3, prompt_len=8, question_len=4,
                  answer_len=6, num_pairs=2, caption_len=10),
    **{
        name: Shape(checkpoint=e2e.SHAPES[name].checkpoint)
        for name in ("small", "showo-1.3b-256", "showo-1.3b")
    },
}  # fmt: skip


class Calls:
    """The same calls on a policy before and after, and on a reference."""

    SIDES = ("accelerated", "original")
    CASES = CASES
    _side = SIDES[0]

    def __init__(self, published: type[nn.Module], shape_name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device = SHAPES[shape_name], device
        shape, sizes = self.shape, self.shape.checkpoint
        self.layout = TokenLayout(
            text_vocab_size=sizes.text_vocab_size,
            codebook_size=sizes.vq.codebook_size,
            num_image_tokens=sizes.num_image_tokens,
            sot=0,
            eot=0,
        )
        self.policy = self._model(published).to(device, dtype)
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.policy.parameters():
                noise = torch.randn(weight.shape, generator=generator).to(weight)
                weight += 0.02 * weight.abs().float().mean().to(weight) * noise
        for model in (self.policy, self.reference):
            accelerate(model)
        self.head = self.policy.showo.lm_head
        self.config = published_inputs.published_config(self.layout, shape.max_seq_length)
        config = showo.transformer_config(language_model_config(sizes), self.layout.vocab_size)
        self.work = ModelWork(config=config, layout=self.layout, dtype=dtype)
        self._make_inputs(torch.Generator().manual_seed(0))

    def has(self, name: str) -> bool:
        """Whether the class has the methods of a case."""
        return name != "pair_dpo_step" or hasattr(type(self.policy), "loss_for_unidpo")

    def run(self, name: str, side: str) -> object:
        """A call's result; gradients are let go, as a training loop does after its optimizer."""
        self._side = side
        result = getattr(self, f"_{name}")()
        self.policy.zero_grad(set_to_none=True)
        return result

    def compare(self, name: str) -> str | None:
        """None, or how the fast method's result differs from the original's."""
        if name == "pair_dpo_step":
            return self._compare_steps()
        results = []
        with _sharpened(self.head) if name == "t2i_generate" else nullcontext():
            for side in Calls.SIDES:
                self._side = side
                drawn = self._t2i_generate(1) if name == "t2i_generate" else torch.stack(self._mmu_generate())
                results.append(drawn)
        share = float((results[0] == results[1]).float().mean())
        return None if share >= LEAST_EQUAL[self.work.dtype] else f"{share:.0%} of the tokens are the original's"

    def passes(self, name: str) -> list[Work]:
        """What the exact algorithm needs at least."""
        shape = self.shape
        if name == "t2i_generate":
            return self.work.images(shape.num_prompts, 1, shape.num_steps, shape.prompt_len)
        if name == "mmu_generate":
            return self.work.answers(1, 1, shape.question_len, 1, shape.answer_len)
        seen: list[Work] = []
        with e2e.recorded_passes(seen, self.work, self.layout.vocab_size):
            self.run(name, "accelerated")
        of_policy = len(seen) // 2
        return [*seen, *seen[:of_policy], *seen[:of_policy]]  # a backward pass is two forward ones

    def items(self, name: str) -> dict[str, int]:
        """What a call makes."""
        shape = self.shape
        if name == "t2i_generate":
            return {"images": shape.num_prompts}
        return {"tokens": shape.answer_len} if name == "mmu_generate" else {"pairs": shape.num_pairs}

    def describe(self, name: str) -> str:
        """How much a call is."""
        shape, tokens = self.shape, self.layout.num_image_tokens
        return {
            "t2i_generate": f"{shape.num_prompts} prompts, {tokens} tokens, {shape.num_steps} steps, "
            f"guidance {shape.guidance_scale:g}",
            "mmu_generate": f"{shape.answer_len} tokens, one image of {tokens} tokens",
            "pair_dpo_step": f"{shape.num_pairs} pairs, {tokens} tokens an image",
        }[name]

    def _model(self, published: type[nn.Module]) -> nn.Module:
        layout = self.layout
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
            Path(folder, "config.json").write_text(json.dumps(language_model_config(self.shape.checkpoint)))
            torch.manual_seed(0)
            model = published(
                False, layout.vocab_size, layout.text_vocab_size, folder, layout.codebook_size, layout.num_image_tokens
            ).eval()
        with torch.no_grad():
            model.showo.lm_head.bias[layout.eot] = -100.0  # is never drawn
        return model

    def _make_inputs(self, generator: torch.Generator) -> None:
        shape, layout, device = self.shape, self.layout, self.device

        def texts(count: int, length: int) -> list[list[int]]:
            return torch.randint(1, layout.text_vocab_size, (count, length), generator=generator).tolist()

        def images(count: int) -> Tensor:
            size = (count, layout.num_image_tokens)
            return torch.randint(layout.codebook_size, size, generator=generator) + layout.code_offset

        length, prompts = shape.max_seq_length, texts(shape.num_prompts, shape.prompt_len)
        ids = published_inputs.generation_ids(layout, prompts, length)
        uncond = published_inputs.generation_ids(layout, [[]] * len(prompts), length)
        image_mask = partial(
            published_inputs.image_attention_mask, pad_id=layout.pad, soi_id=layout.soi, eoi_id=layout.eoi
        )
        understanding_mask = partial(published_inputs.understanding_attention_mask, eoi_id=layout.eoi)
        dtype = self.work.dtype
        self._t2i = [ids.to(device), uncond.to(device), image_mask(torch.cat([ids, uncond])).to(device, dtype)]
        asked = published_inputs.understanding_ids(layout, images(1), texts(1, shape.question_len))
        self._mmu = [asked.to(device), understanding_mask(asked).to(device, dtype)]

        captions, viewed = texts(shape.num_pairs, shape.prompt_len), images(shape.num_pairs)
        masked = torch.rand(shape.num_pairs, layout.num_image_tokens, generator=generator) < 0.6
        self._roles = []
        for _ in ("win", "lose"):
            codes = images(shape.num_pairs)
            ids = published_inputs.generation_ids(layout, captions, length, codes.masked_fill(masked, layout.mask_id))
            labels = published_inputs.generation_labels(
                layout, ids, codes.masked_fill(~masked, published_inputs.IGNORED)
            )
            about, of_caption = published_inputs.caption_ids(
                layout, viewed, texts(shape.num_pairs, shape.caption_len), length
            )
            # Image sequences are two tokens longer where both texts have room for as many.
            about, of_caption = (
                nn.functional.pad(part, (0, ids.shape[1] - part.shape[1]), value=value)
                for part, value in ((about, layout.pad), (of_caption, published_inputs.IGNORED))
            )
            mask = torch.cat([image_mask(ids), understanding_mask(about)]).to(device, dtype)
            both = torch.cat([ids, about]).to(device), torch.cat([labels, of_caption]).to(device)
            self._roles.append((*both, mask))

    def _t2i_generate(self, num_steps: int | None = None) -> Tensor:
        ids, uncond, mask = self._t2i
        with torch.no_grad():
            return self._method(self.policy, "t2i_generate")(
                ids.clone(),
                uncond,
                mask,
                timesteps=num_steps or self.shape.num_steps,
                guidance_scale=self.shape.guidance_scale,
                config=self.config,
            )

    def _mmu_generate(self) -> list[Tensor]:
        ids, mask = self._mmu
        return self._method(self.policy, "mmu_generate")(
            ids, attention_mask=mask, max_new_tokens=self.shape.answer_len, top_k=1, eot_token=self.layout.eot
        )

    def _pair_dpo_step(self) -> Tensor:
        """The published loss, in its stable form; the policy's weights receive the gradient."""
        policy = [self._sums(self.policy, role) for role in self._roles]
        with torch.no_grad():
            before = [self._sums(self.reference, role) for role in self._roles]
        loss = torch.zeros((), device=self.device)
        for side in (0, 1):
            win, lose = (policy[role][side] - before[role][side] for role in (0, 1))
            loss = loss - nn.functional.logsigmoid(BETA * (win - lose))
        loss.backward()
        return loss.detach()

    def _sums(self, model: nn.Module, role: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        ids, labels, mask = role
        return self._method(model, "loss_for_unidpo")(
            ids,
            attention_mask=mask,
            labels=labels,
            batch_size_t2i=self.shape.num_pairs,
            max_seq_length=self.shape.max_seq_length,
        )

    def _compare_steps(self) -> str | None:
        """By the sums, since a sigmoid of so many tokens may be flat."""
        loss_limit, gradient_limit = LIMITS[self.work.dtype]
        found = []
        for side in Calls.SIDES:
            self._side = side
            sums = [value for role in self._roles for value in self._sums(self.policy, role)]
            torch.stack(sums).sum().backward()
            found.append((sums, {name: weight.grad for name, weight in self.policy.named_parameters()}))
            self.policy.zero_grad(set_to_none=True)
        (ours, gradients), (theirs, expected) = found
        for mine, other in zip(ours, theirs, strict=True):
            if not (mine - other).abs() <= loss_limit * other.abs():  # NaN is wrong too
                return f"a sum of log-probabilities is {mine:.6g}, by the original method {other:.6g}"
        for name, right in expected.items():
            error = float((gradients[name].float() - right.float()).norm() / right.float().norm())
            if not error <= gradient_limit:
                return f"the gradient of {name} differs from the original's by {error:.2g} of its norm"
        return None

    def _method(self, model: nn.Module, name: str) -> Callable:
        method = getattr(model, name)
        return method if self._side == "accelerated" else method.original


@contextmanager
def _sharpened(head: nn.Module) -> Iterator[None]:
    """For the block: the head so large that the likeliest token has all the probability."""
    weights = [weight.data for weight in head.parameters()]
    before = [weight.clone() for weight in weights]
    for weight in weights:
        weight *= SHARPENED
    try:
        yield
    finally:
        for weight, old in zip(weights, before, strict=True):
            weight.copy_(old)
