"""The engine: token ids in, token ids out. It checks what comes in and leaves the work to the decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hermesflow.engine.decoders.masked import ImageDecoder, ImageRollout, Progress
from hermesflow.engine.decoders.text import QuestionIds, SamplingParams, TextDecoder
from hermesflow.engine.memory_planner import MemoryPlanner
from hermesflow.engine.nan_cause import NotFiniteError
from hermesflow.engine.rollout_logprob import RolloutStates, code_logprobs
from hermesflow.engine.sequence_logprob import span_logprobs
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.kernels.checks import triton_missing
from hermesflow.kernels.span_tree import SpanForest, SpanTree

# Where throughput stays level, if memory lasts. CUDA, not measured: 32 images of 1,026 tokens are 10 waves of matmul
# tiles on 132 multiprocessors; in decoding each further answer is nearly free until 64 images with 10 captions each.
# CPU: see LOG.md.
_MOST_IMAGE_TOKENS = {"cuda": 32_768, "cpu": 16_384}
_MOST_CODE_ROWS = {"cuda": 512, "cpu": 64}
"""Images that are drawn code by code at once, where throughput stays level: CUDA by arithmetic, a token of 300 rows
multiplies for as long as its weights take to be read."""
_MOST_TEXT_TOKENS = {"cuda": 98_304, "cpu": 16_384}
_TOKENS_PER_ANSWER = 16
"""At least as many tokens of a batch come with an answer: its own, and its share of image and question."""


class Engine:
    """Draws images, answers questions and scores answers with one model.

    The transformer is the caller's own, not a copy: device and dtype move it in place, and training it shows at once.
    On CUDA with Triton its layers run as fused_layers.py says.
    """

    answer_masks: int = 0
    """Of models that fill masks: num_masks of MaskedTextDecoder.score_choices."""

    def __init__(
        self,
        transformer: Transformer,
        layout: Layout,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
        image_decoder: type = ImageDecoder,
        text_decoder: type = TextDecoder,
    ) -> None:
        """
        Args:
            transformer: the model.
            layout: its vocabulary.
            device, dtype: where to move the model and what to convert it to; None leaves it.
            backend: of the sampling and log-probability ops; None takes the first that can run.
            image_decoder: the kind of decoder that draws the model's images: a class with the constructor, `params` and
                generate of ImageDecoder, and keeps_known_codes where it draws around known codes.
            text_decoder: likewise of its captions and answers: extend and score_choices of TextDecoder.
        Raises: ValueError if the model's vocabulary is not the layout's, or the layout does not fit itself.
        """
        if transformer.config.vocab_size != layout.vocab_size:
            raise ValueError(
                f"Engine: expected a transformer with the layout's vocab_size {layout.vocab_size}, "
                f"got {transformer.config.vocab_size}; load both from the same model"
            )
        _check_layout(layout)
        self.transformer, self.layout, self.backend = transformer.to(device=device, dtype=dtype), layout, backend
        if self.device.type == "cuda" and triton_missing() is None:
            transformer.fuse_layers()
        self.image_decoder = image_decoder(transformer, layout, backend)
        self._text = text_decoder(transformer, layout, backend)
        self._planner = MemoryPlanner(transformer)

    def of_grid(self, grid: tuple[int, int]) -> Engine:
        """An engine over the same model for images of so many rows and columns of codes. Raises: ValueError in a family
        that has one grid alone."""
        kinds = {"image_decoder": type(self.image_decoder), "text_decoder": type(self._text)}
        return Engine(self.transformer, self.layout.of_grid(grid), backend=self.backend, **kinds)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.transformer.embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the model's weights."""
        return self.transformer.embed.weight.dtype

    @property
    def max_sequences(self) -> int:
        """Image spans that one pass of generate computes: what free memory holds and speed asks for."""
        length = self.layout.image_length
        if self.layout.image_mode == "causal":  # a step computes one token of each image, and the rest is cached
            most = {device: rows * length for device, rows in _MOST_CODE_ROWS.items()}
            return max(2, self._planner.max_tokens("images", most, computed=False) // length)
        most = {device: max(2, round(tokens / length)) * length for device, tokens in _MOST_IMAGE_TOKENS.items()}
        return max(2, self._planner.max_tokens("images", most) // length)

    @property
    def max_tokens(self) -> int:
        """Tokens of a batch of generate_text or a pass of score_choices: what free memory holds and speed asks for."""
        return self._planner.max_tokens(
            "text", _MOST_TEXT_TOKENS, vocab_size=self.layout.vocab_size, tokens_per_row=_TOKENS_PER_ANSWER
        )

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_images: int,
        seeds: Tensor,
        sampling: Any = None,
        known_codes: Tensor | None = None,
        max_sequences: int | None = None,
        progress: Progress = iter,
        **fields: Any,
    ) -> Tensor:
        """Draw num_images images of each prompt. An image depends on its prompt, its known codes, its seed and the
        settings, on nothing else.

        Args:
            prompt_ids: P prompts of plain text ids.
            num_images: n, at least 1.
            seeds: int64 [P, n].
            sampling: how images are drawn, of the decoder's params, such as ImageSamplingParams; None: their defaults.
            known_codes: int64 [P, layout.code_length], codes that the prompt's images keep, -1 where one is to be
                drawn; None draws all. Where sampling has a grid of its own, it says how many tokens an image has.
            max_sequences: bound on the image spans of one pass (memory); a guided image is two. None takes the
                property of that name.
            progress: is given the steps of each pass, on CUDA the passes, and gives them back one by one, as a
                progress bar does.
            fields: fields of sampling that replace those of `sampling`, such as num_steps=8.
        Returns: codes int64 [P, n, layout.code_length] on the model's device.
        Raises: ValueError on arguments; RuntimeError if the model's logits hold NaN.
        """
        max_sequences = self._checked_drawing("generate", prompt_ids, num_images, seeds, max_sequences)
        params = self._params("generate", sampling, fields)
        if known_codes is not None:
            if not getattr(self.image_decoder, "keeps_known_codes", False):
                raise ValueError(
                    f"Engine.generate: {type(self.image_decoder).__name__} keeps no known_codes; pass None"
                )
            layout = self.layout.of_sampling(params)
            shape = (len(prompt_ids), layout.code_length)
            if known_codes.dtype != torch.int64 or tuple(known_codes.shape) != shape:
                raise ValueError(
                    f"Engine.generate: expected known_codes int64 [P, code_length] = {list(shape)}, "
                    f"got {known_codes.dtype} {list(known_codes.shape)}"
                )
            if layout.codebook_size:
                self._check_range("generate", "known_codes", known_codes, -1)
            elif known_codes.numel() and not -(2**31) <= int(known_codes.min()) <= int(known_codes.max()) < 2**31:
                raise ValueError("Engine.generate: expected known_codes of 32 bits, got larger ones; see pack_latents")
        with torch.inference_mode():
            codes = self.image_decoder.generate(
                prompt_ids, seeds, params, known_codes=known_codes, max_sequences=max_sequences, progress=progress
            )
        return codes.clone()  # a tensor made in inference mode cannot be used in training

    def rollout(
        self,
        prompt_ids: Sequence[Sequence[int]],
        *,
        num_images: int,
        seeds: Tensor,
        sampling: Any = None,
        max_sequences: int | None = None,
        progress: Progress = iter,
        **fields: Any,
    ) -> ImageRollout:
        """The images that generate draws, with the step and log-probability at which each code was drawn.

        Args: those of generate.
        Returns: codes [P, n, num_image_tokens] and how they were drawn; see ImageRollout.
        Raises: as generate; ValueError if the model's image decoder does not say how it draws.
        """
        max_sequences = self._checked_drawing("rollout", prompt_ids, num_images, seeds, max_sequences)
        if not hasattr(self.image_decoder, "rollout"):
            raise ValueError(
                f"Engine.rollout: {type(self.image_decoder).__name__} does not say how it draws; use a model of "
                "masked image tokens"
            )
        params = self._params("rollout", sampling, fields)
        with torch.inference_mode():
            drawn = self.image_decoder.rollout(
                prompt_ids, seeds, params, max_sequences=max_sequences, progress=progress
            )
        return ImageRollout(*(getattr(drawn, item.name).clone() for item in dataclasses.fields(drawn)))

    def rollout_logprobs(
        self,
        prompt_ids: Sequence[Sequence[int]],
        drawn: ImageRollout,
        *,
        sampling: Any = None,
        remasked: bool = False,
        **fields: Any,
    ) -> Tensor:
        """Log-probability of how images were drawn, by the law of the decoder that drew them, differentiable in the
        model's weights.

        Args:
            prompt_ids: P prompts, as they were given to rollout.
            drawn: from rollout.
            sampling, fields: as they were given to rollout.
            remasked: count the codes that were drawn and masked again too.
        Returns: fp32 [P, n, num_image_tokens], of each code summed over the steps that drew it; 0 where it was known.
        Raises: ValueError on a temperature of 0, which leaves nothing to chance.
        """
        params = self._params("rollout_logprobs", sampling, fields)
        forest = SpanForest()
        states = RolloutStates(self.layout, params, forest)
        codes, kept_at, tokens = (
            values.flatten(0, 1).cpu().numpy() for values in (drawn.codes, drawn.kept_at, drawn.drawn)
        )
        prompts = [ids for ids in prompt_ids for _ in range(drawn.codes.shape[1])]
        for image, ids in enumerate(prompts):
            states.add(ids, codes[image], kept_at[image], drawn=tokens[image] if remasked else None)
        found = states.drawn(self.device)
        hidden = self.transformer(forest.build(self.device), rows=torch.cat([found.guided, found.unguided]))
        guided, unguided = hidden.split([len(found.guided), len(found.unguided)])
        logprob = code_logprobs(
            self.transformer, self.layout, params, guided, unguided, found.targets, backend=self.backend
        )
        places = found.owners * codes.shape[1] + found.positions
        return logprob.new_zeros(codes.size).index_add(0, places, logprob).view(drawn.codes.shape)

    def generate_text(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        *,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        text_only: bool = True,
        max_tokens: int | None = None,
    ) -> list[list[list[list[int]]]]:
        """Captions and answers: each question is answered once for every entry of sampling.

        Args:
            images: codes int64 [B, num_image_tokens]; or features [B, F, D] of any floating dtype, D the model's
                hidden_size, in a model that understands images by features.
            question_ids: plain text ids [B][Q of the image].
            sampling: S settings, at least one.
            seeds: int64 [B, Q, S], Q at least the largest number of questions of an image.
            text_only: draw text ids only; False draws from the joint vocabulary, as published.
            max_tokens: bound on the tokens of a batch (memory); one question with its answers always fits. None takes
                the property of that name.
        Returns: ids [b][q][s], lists of token ids without eot.
        Raises: ValueError on arguments; RuntimeError if the model's logits hold NaN.
        """
        images, options = self._checked_asking("generate_text", images, question_ids, sampling, seeds, max_tokens)
        with torch.inference_mode():
            return self._text.extend(images, question_ids, sampling, seeds, text_only=text_only, **options)

    def rollout_text(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        *,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        max_tokens: int | None = None,
    ) -> list[list[list[Any]]]:
        """The answers that generate_text draws, with the step and log-probability at which each token was kept.

        Args: those of generate_text.
        Returns: MaskedRegion [b][q][s].
        Raises: as generate_text; ValueError if the model's text decoder does not say how it draws, or on settings that
            change its law.
        """
        if not hasattr(self._text, "rollout"):
            raise ValueError(
                f"Engine.rollout_text: {type(self._text).__name__} does not say how it draws; use a model that fills "
                "text from masks"
            )
        images, options = self._checked_asking("rollout_text", images, question_ids, sampling, seeds, max_tokens)
        with torch.inference_mode():
            return self._text.rollout(images, question_ids, sampling, seeds, **options)

    extend = generate_text
    """The former name of generate_text."""

    def score_choices(
        self,
        images: Tensor,
        question_ids: QuestionIds,
        choice_ids: Sequence[QuestionIds],
        *,
        text_only: bool = True,
        max_tokens: int | None = None,
    ) -> list[list[list[float]]]:
        """Log-probability of each given answer, its tokens and the eot after them.

        Args:
            images: codes or features, see generate_text.
            question_ids: plain text ids [B][Q of the image].
            choice_ids: plain text ids [B][Q][C of the question], none empty.
            text_only: normalize over the text ids; False over the joint vocabulary.
            max_tokens: bound on the tokens of one pass (memory); one question with its choices always fits. None takes
                the property of that name.
        Returns: log-probabilities [b][q][c].
        Raises: ValueError on arguments.
        """
        images = self._checked_images("score_choices", images)
        self._check_questions("score_choices", images, question_ids)
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        _check_bound("score_choices", "max_tokens", max_tokens)
        if [len(questions) for questions in question_ids] != [len(choices) for choices in choice_ids]:
            raise ValueError(
                "Engine.score_choices: expected a list of choices for each question; nest choice_ids as question_ids"
            )
        for image, of_image in enumerate(choice_ids):
            for question, choices in enumerate(of_image):
                for choice, ids in enumerate(choices):
                    name = f"choice {choice} of image {image}, question {question}"
                    self._check_text("score_choices", name, ids)
                    if len(ids) == 0:
                        raise ValueError(f"Engine.score_choices: {name} has no tokens; leave it out")
        more = {"num_masks": self.answer_masks} if self.answer_masks else {}
        with torch.inference_mode():
            return self._text.score_choices(
                images, question_ids, choice_ids, text_only=text_only, max_tokens=max_tokens, **more
            )

    def logprobs(self, tree: SpanTree, rows: Tensor, targets: Tensor) -> Tensor:
        """Log-probabilities fp32 [T] of targets at packed rows of the tree; see span_logprobs. Differentiable."""
        if rows.shape != targets.shape or rows.dim() != 1:
            raise ValueError(
                f"Engine.logprobs: expected rows and targets of one shape [T], got {list(rows.shape)} "
                f"and {list(targets.shape)}"
            )
        return span_logprobs(self.transformer, tree, rows, targets, backend=self.backend)

    def _params(self, function: str, sampling: Any, fields: dict[str, Any]) -> Any:
        kind = self.image_decoder.params
        known = [item.name for item in dataclasses.fields(kind)]
        if unknown := sorted(set(fields) - set(known)):
            raise ValueError(f"Engine.{function}: unknown {', '.join(unknown)}; images are drawn by {', '.join(known)}")
        if sampling is None:
            return kind(**fields)
        if not isinstance(sampling, kind):
            raise ValueError(
                f"Engine.{function}: expected sampling of {kind.__name__}, got {type(sampling).__name__}; give one, or "
                "its fields by name"
            )
        return dataclasses.replace(sampling, **fields)

    def _checked_drawing(
        self, function: str, prompt_ids: Sequence[Sequence[int]], num_images: int, seeds: Tensor, given: int | None
    ) -> int:
        """max_sequences, given or the planner's; what is drawn is checked."""
        _check_seeds(function, seeds, (len(prompt_ids), num_images), "[P, num_images]")
        _check_bound(function, "num_images", num_images)
        max_sequences = self.max_sequences if given is None else given
        _check_bound(function, "max_sequences", max_sequences)
        for index, ids in enumerate(prompt_ids):
            self._check_text(function, f"prompt {index}", ids)
        return max_sequences

    def _checked_asking(
        self,
        function: str,
        images: Tensor,
        question_ids: QuestionIds,
        sampling: Sequence[SamplingParams],
        seeds: Tensor,
        max_tokens: int | None,
    ) -> tuple[Tensor, dict[str, int]]:
        """The images as the decoder takes them, and max_tokens, given or the planner's; what is asked is checked."""
        images = self._checked_images(function, images)
        self._check_questions(function, images, question_ids)
        if len(sampling) == 0:
            raise ValueError(f"Engine.{function}: expected at least one SamplingParams in sampling, got none")
        num_questions = max((len(questions) for questions in question_ids), default=0)
        given = seeds.shape[1] if seeds.dim() == 3 else 0  # an image with fewer questions leaves seeds unused
        _check_seeds(function, seeds, (len(images), max(num_questions, given), len(sampling)), "[B, Q, S]")
        max_tokens = self.max_tokens if max_tokens is None else max_tokens
        _check_bound(function, "max_tokens", max_tokens)
        return images, {"max_tokens": max_tokens}

    def _checked_images(self, function: str, images: Tensor) -> Tensor:
        """The images as codes, or as features in the model's dtype."""
        num_tokens, hidden_size = self.layout.num_image_tokens, self.transformer.config.hidden_size
        images = torch.as_tensor(images)
        shape, by_features = list(images.shape), images.is_floating_point()
        if by_features:
            fits = len(shape) == 3 and shape[1] > 0 and shape[2] == hidden_size
        else:
            fits = len(shape) == 2 and shape[1] == num_tokens and not images.is_complex()
        if not fits:
            raise ValueError(
                f"Engine.{function}: expected images as codes int64 [B, {num_tokens}] or as features [B, F, "
                f"{hidden_size}] of a floating dtype, got {images.dtype} {shape}"
            )
        if not by_features:
            self._check_range(function, "codes", images, 0)
            return images
        images = images.to(self.dtype)
        if not images.isfinite().all():
            raise NotFiniteError(
                f"Engine.{function}: expected finite features, got NaN or infinity in {self.dtype}; "
                "check the vision encoder's weights"
            )
        return images

    def _check_range(self, function: str, name: str, codes: Tensor, lowest: int) -> None:
        size = self.layout.codebook_size
        if codes.numel() and not lowest <= int(codes.min()) <= int(codes.max()) < size:
            raise ValueError(
                f"Engine.{function}: expected {name} in [{lowest}, {size}), got {int(codes.min())} to "
                f"{int(codes.max())}; pass codes without the layout's code_offset"
            )

    def _check_questions(self, function: str, images: Tensor, question_ids: QuestionIds) -> None:
        if len(question_ids) != len(images):
            raise ValueError(
                f"Engine.{function}: expected a list of questions for each of {len(images)} images, "
                f"got {len(question_ids)} lists"
            )
        for image, questions in enumerate(question_ids):
            for question, ids in enumerate(questions):
                self._check_text(function, f"question {question} of image {image}", ids)

    def _check_text(self, function: str, name: str, ids: Sequence[int]) -> None:
        if any(token not in self.layout.text_ids for token in ids):
            raise ValueError(
                f"Engine.{function}: expected text ids in {self.layout.text_ids} in {name}, got {list(ids)}; "
                "leave special tokens to the layout"
            )


def _check_layout(layout: Layout) -> None:
    """Raises ValueError unless the layout fits itself."""
    framing = [*layout.before_image, *layout.row_end, *layout.after_image]
    framing += [] if layout.mask_id is None else [layout.mask_id]
    named = [("text_ids", layout.text_ids), ("code_ids", layout.code_ids or ()), ("ids around codes", framing)]
    for name, ids in named:
        if not all(0 <= id < layout.vocab_size for id in (min(ids, default=0), max(ids, default=0))):
            raise ValueError(f"Engine: expected the layout's {name} in [0, {layout.vocab_size}), got {ids}")
    if layout.eot not in layout.text_ids:
        raise ValueError(f"Engine: expected the layout's eot among its text ids, got {layout.eot}")
    if len(layout.code_ids or ()) != layout.codebook_size:
        raise ValueError(f"Engine: expected {layout.codebook_size} code_ids, got {len(layout.code_ids or ())}")
    ends = [layout.code_ids[0], layout.code_ids[layout.codebook_size - 1]] if layout.code_ids else []
    if any(code in layout.text_ids for code in ends):
        raise ValueError("Engine: expected ids of text and of codes apart, got codes among text_ids")
    if layout.image_grid[0] * layout.image_grid[1] != layout.num_image_tokens:
        raise ValueError(
            f"Engine: expected an image_grid of {layout.num_image_tokens} codes, got {list(layout.image_grid)}"
        )
    for mode in (layout.image_mode, layout.prefix_mode):
        if mode not in ("full", "causal"):
            raise ValueError(f"Engine: expected the layout's modes to be full or causal, got {mode!r}")


def _check_bound(function: str, name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"Engine.{function}: expected {name} of at least 1, got {value}")


def _check_seeds(function: str, seeds: Tensor, shape: tuple[int, ...], words: str) -> None:
    if seeds.dtype != torch.int64 or tuple(seeds.shape) != shape:
        raise ValueError(
            f"Engine.{function}: expected seeds int64 {words} = {list(shape)}, got {seeds.dtype} {list(seeds.shape)}"
        )
