"""A unified model as users hold it: backbone, image tokenizer, text tokenizer and their common token layout."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import string
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from hermesflow.config import DRAWING, DrawingConfig
from hermesflow.engine.decoders.masked import ImageDecoder
from hermesflow.engine.decoders.text import SamplingParams, TextDecoder
from hermesflow.engine.engine import Engine
from hermesflow.engine.image_tokenizers.blocks import ImageTokenizer
from hermesflow.engine.token_layout import Layout
from hermesflow.engine.transformer import Transformer
from hermesflow.models.images import ImageLike, as_image, fit_image
from hermesflow.models.text_tokenizers import PretrainedTokenizer, WordTokenizer
from hermesflow.runtime.files import InputError, StrPath, check_unicode, make_folder
from hermesflow.runtime.text import plain_text

_REMEMBERED_TEXTS, _MOST_TOKENS = 2**16, 2**16
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PromptFormat:
    """Prompt templates of a model family."""

    caption_question: str
    """Asks for a caption (HermesFlow, arXiv 2502.12148, section 3)."""
    question: str = "{question}"
    """Template of every question."""
    choices: str = "{question}"
    """A question whose answer is one of {choices}, for an answer in the model's own words."""
    answer: str = "{answer}"
    """An answer as it follows a question: tokenizers distinguish words after a blank from words that begin a text."""
    max_prompt_tokens: int | None = None
    """Text ids of an image's prompt; longer ones are cut. None: no limit."""
    max_caption_tokens: int = 64
    """Captions are cut here."""
    max_answer_tokens: int = 32
    """Answers in the model's own words are cut here."""

    def __post_init__(self) -> None:
        for name, known in (("question", ("question",)), ("choices", ("question", "choices")), ("answer", ("answer",))):
            template = getattr(self, name)
            for _, field, spec, conversion in string.Formatter().parse(template):
                if field is not None and (field not in known or spec or conversion):
                    raise ValueError(f"PromptFormat: {name} may hold {{{'} and {'.join(known)}}}, got {template!r:.80}")
        for name in ("max_prompt_tokens", "max_caption_tokens", "max_answer_tokens"):
            if not 1 <= (getattr(self, name) or (1 if name == "max_prompt_tokens" else 0)) <= _MOST_TOKENS:
                raise ValueError(f"PromptFormat: {name} must lie in [1, {_MOST_TOKENS}], got {getattr(self, name)}")


class ChoicePrompt(NamedTuple):
    """A question and its choices as text ids."""

    question: list[int]
    choices: list[list[int]]


class Model:
    """Backbone, image tokenizer and text tokenizer with one token layout; a family adds how it is saved."""

    image_decoder: type = ImageDecoder
    """Draws the images; takes (transformer, layout, backend), and says in `params` what settings it takes."""
    text_decoder: type = TextDecoder
    """Writes captions and answers."""
    is_saved_whole = True
    """Whether save writes all that the model sees through, so that rounds of self-play can open what they saved."""
    flow_shift = 1.0
    """Of times towards the noise in training, in a family that draws latents; see engine/flow_schedule.py."""
    is_published = True
    """Whether save writes a layout that others read too."""

    def __init__(
        self,
        transformer: Transformer,
        vq_tokenizer: ImageTokenizer | None,
        text_tokenizer: WordTokenizer | PretrainedTokenizer,
        layout: Layout,
        image_size: int,
        prompts: PromptFormat,
        sampling: Any,
    ) -> None:
        """
        Args:
            transformer, text_tokenizer, layout: the parts.
            vq_tokenizer: likewise; None in a subclass that opens its own when it is needed.
            image_size: side of an image in pixels.
            prompts: how the family's models are asked.
            sampling: how images are drawn unless the settings say otherwise, of image_decoder.params.
        """
        self.transformer, self.text_tokenizer, self.layout = transformer, text_tokenizer, layout
        self.image_size, self.prompts, self.sampling = image_size, prompts, sampling
        self._engine: Engine | None = None
        self._answer_masks = 0
        if vq_tokenizer is not None:
            self.vq_tokenizer = vq_tokenizer

    @property
    def engine(self) -> Engine:
        """The engine over this model's backbone; it shares the weights, so training shows in it at once. It follows
        when transformer or layout is replaced."""
        parts = None if self._engine is None else (self._engine.transformer, self._engine.layout)
        if parts is None or parts[0] is not self.transformer or parts[1] is not self.layout:
            kinds = {"image_decoder": self.image_decoder, "text_decoder": self.text_decoder}
            self._engine = Engine(self.transformer, self.layout, **kinds)
            self._engine.answer_masks = self._answer_masks
        return self._engine

    @property
    def answer_masks(self) -> int:
        """Masks by which the log-probability of a given answer is estimated; 0: one, of all of it.

        Raises, when it is set: ValueError on no whole number of at least 0, or another than 0 in a model that fills no
        masks.
        """
        return self._answer_masks

    @answer_masks.setter
    def answer_masks(self, value: int) -> None:
        if type(value) is not int or value < 0:
            raise ValueError(f"expected a whole number of at least 0, got {value!r}")
        if value and not self.layout.is_bidirectional:
            raise ValueError(f"expected 0 in a model that answers token by token, got {value}")
        self._answer_masks, self._engine = value, None

    def set_image_size(self, size: int) -> None:
        """Images are drawn, and records fitted, at size pixels a side from now on. Raises: ValueError on a size that is
        no multiple of a token's pixels, or not the model's own in a family that draws one alone."""
        factor = self.image_size // self.layout.image_grid[1]
        if size < 1 or size % factor:
            raise ValueError(f"expected a multiple of {factor} pixels; give one")
        self.layout = self.layout.of_grid((size // factor, size // factor))
        self.image_size = size

    def generate(
        self, prompts: str | Sequence[str], *, num_images: int = 1, seed: int = 0, sampling: Any = None
    ) -> list[Image.Image]:
        """Draws images.

        Args:
            prompts: what they show; one text, or several.
            num_images: images of each prompt.
            seed: of the first image; each further one counts up, so that any can be drawn again alone.
            sampling: how they are drawn, such as replace(model.sampling, num_steps=8); None: the model's own way.
        Returns: RGB images of image_size pixels a side, or of sampling's grid, prompt by prompt.
        Raises: InputError on an empty prompt or a word that the model does not know; ValueError on the numbers.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if num_images < 1 or not 0 <= seed < 2**62:
            raise ValueError(
                f"generate: expected num_images from 1 and seed in [0, 2**62), got {num_images} and {seed}"
            )
        ids = [self.user_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        if not ids:
            return []
        seeds = seed + torch.arange(len(ids) * num_images).view(len(ids), num_images)
        sampling = sampling or self.sampling
        codes = self.engine.generate(ids, num_images=num_images, seeds=seeds, sampling=sampling).flatten(0, 1)
        grid = getattr(sampling, "grid", None) or self.layout.image_grid
        return [Image.fromarray(pixels) for pixels in self.decode_images(codes, *grid)]

    def caption(self, images: Sequence[ImageLike]) -> list[str]:
        """Says what images show, greedily.

        Args:
            images: paths, images of Pillow, or pixels (uint8 [H, W, 3] or [H, W]), of any size.
        Returns: a caption each.
        Raises: InputError if an image cannot be read.
        """
        _check_listed(images, "images")
        return self._say(images, [self.caption_prompt()] * len(images), self.prompts.max_caption_tokens)

    def answer(
        self, images: Sequence[ImageLike], questions: str | Sequence[str], choices: Sequence[str] | None = None
    ) -> list[str]:
        """Answers questions about images.

        Args:
            images: as in caption.
            questions: one for all images, or one for each.
            choices: the answers to choose from by their likelihood; None lets the model answer freely, greedily.
        Returns: an answer for each image.
        Raises: InputError on an image that cannot be read, an empty question, a word that the model does not know,
            choices that are fewer than two or not distinct, or another number of questions than of images.
        """
        if choices is not None:
            return [max(chances, key=chances.__getitem__) for chances in self.score(images, questions, choices)]
        asked = [self.question_prompt(question) for question in _one_each(questions, images)]
        return self._say(images, asked, self.prompts.max_answer_tokens)

    def score(
        self, images: Sequence[ImageLike], questions: str | Sequence[str], choices: Sequence[str]
    ) -> list[dict[str, float]]:
        """How likely the model finds each of several answers to questions about images.

        Args:
            images, questions: as in answer.
            choices: two or more answers that are distinct to the model, too; blanks around them do not count.
        Returns: for each image the probability of each choice; they sum to 1.
        Raises: as answer.
        """
        _check_listed(choices, "choices")
        choices = [choice.strip() for choice in choices]
        if len(set(choices)) < max(2, len(choices)) or "" in choices:
            raise InputError(
                f"choices {','.join(choices)}: expected two or more distinct answers, none empty, such as yes,no"
            )
        merged = self.merge_choices(choices)
        for choice in [choice for choice in choices if choice not in merged]:
            first = next(other for other in choices if len(self.merge_choices([other, choice])) == 1)
            raise InputError(f"choices {','.join(choices)}: {first} and {choice} are one to the model; leave one out")
        asked = [[self.question_prompt(question)] for question in _one_each(questions, images)]
        answers = [[[self.answer_ids(choice) for choice in choices]]] * len(images)
        found: list[dict[str, float]] = [{}] * len(asked)
        for numbers, seen, engine in self.views(map(as_image, images)):
            group = [asked[number] for number in numbers]
            scores = engine.score_choices(seen, group, answers[: len(group)])
            for number, of_image in zip(numbers, scores, strict=True):
                chances = torch.tensor(of_image[0], dtype=torch.float64).softmax(0).tolist()
                found[number] = dict(zip(choices, chances, strict=True))
        return found

    def _say(self, images: Sequence[ImageLike], questions: Sequence[list[int]], max_new_tokens: int) -> list[str]:
        """The greedy text after a question about each image."""
        greedy = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, max_new_tokens=max_new_tokens)
        said = [""] * len(questions)
        for numbers, seen, engine in self.views(map(as_image, images)):
            asked, seeds = (
                [[questions[number]] for number in numbers],
                torch.zeros(len(numbers), 1, 1, dtype=torch.int64),
            )
            ids = engine.generate_text(seen, asked, sampling=[greedy], seeds=seeds)
            for number, of_image in zip(numbers, ids, strict=True):
                said[number] = self.decode_text(of_image[0][0])
        return said

    def encode_text(self, text: str) -> list[int]:
        """Text ids without special tokens.

        Raises:
            InputError: a word that the model's closed vocabulary does not have.
        """
        return list(self._encode(text))

    @functools.cached_property
    def _encode(self) -> Any:
        """Remembers what it encoded: curation, scoring and training ask for the same prompts."""
        return functools.lru_cache(_REMEMBERED_TEXTS)(lambda text: tuple(self.text_tokenizer.encode(text)))

    def decode_text(self, ids: Sequence[int]) -> str:
        """Text of ids; ids that are no words of the text vocabulary (special tokens, image codes) are left out."""
        return self.text_tokenizer.decode([token for token in ids if int(token) in self.layout.text_ids])

    def image_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt, cut at the length that the model was trained with."""
        return self.whole_prompt(text)[: self.prompts.max_prompt_tokens]

    def whole_prompt(self, text: str) -> list[int]:
        """Text ids of an image's prompt before it is cut, with what the model expects around it."""
        return self.encode_text(text)

    def user_prompt(self, text: str, name: str) -> list[int]:
        """image_prompt of a text that a user wrote, called `name` in messages; warns if it is cut.

        Raises: InputError if it is empty, or on a word that the model does not know.
        """
        ids = self.image_prompt(check_words(text, name))
        if cut := self.describe_cut(text):
            _LOGGER.warning("%s, %r: %s; the model does not see its end", name, f"{text[:60]}...", cut)
        return ids

    def describe_cut(self, text: str) -> str:
        """How much of an image's prompt is cut, such as "cut from 7,089 to 126 tokens"; empty if nothing is."""
        length, most = len(self.whole_prompt(text)), self.prompts.max_prompt_tokens
        return f"cut from {length:,} to {most:,} tokens" if most and length > most else ""

    def question_prompt(self, question: str) -> list[int]:
        """Text ids of a question, with what the model expects around it."""
        return self.encode_text(self.prompts.question.format(question=question))

    def caption_prompt(self) -> list[int]:
        """Text ids of the question that asks for a caption."""
        return self.question_prompt(self.prompts.caption_question)

    def choices_prompt(self, question: str, choices: Sequence[str]) -> list[int]:
        """Text ids of a question together with its choices, to be answered in the model's own words."""
        return self.question_prompt(self.prompts.choices.format(question=question, choices=list(choices)))

    def answer_ids(self, answer: str) -> list[int]:
        """Text ids of an answer that follows a question."""
        return self.encode_text(self.prompts.answer.format(answer=answer))

    def choice_prompt(self, question: str, choices: Sequence[str]) -> ChoicePrompt:
        """Text ids of a question and of each of its choices, which are scored, so they are not part of the question.

        Raises: InputError on a word that the model does not know.
        """
        return ChoicePrompt(self.question_prompt(question), [self.answer_ids(choice) for choice in choices])

    def merge_choices(self, choices: Sequence[str], answer: str | None = None) -> list[str]:
        """Choices without repeats: those of equal token ids, or of the same text in another Unicode form, are one.

        Args:
            choices: in their order.
            answer: the one that stands for those that are one with it; else the first does.
        Raises: InputError on a word that the model does not know.
        """
        firsts: dict[Any, str] = {}
        for choice in choices:
            keys = (tuple(self.answer_ids(choice.strip())), plain_text(choice))
            first = next((firsts[key] for key in keys if key in firsts), choice)
            firsts |= dict.fromkeys((*keys, choice), first)
        kept = dict.fromkeys(firsts[choice] for choice in choices)
        return [answer if firsts.get(answer) == first else first for first in kept]

    def sampling_of(self, settings: DrawingConfig) -> Any:
        """How images are drawn under these settings: the model's own way where they leave it open.

        Raises: InputError on a setting that the family's way of drawing does not have.
        """
        known, given = [item.name for item in fields(self.sampling)], settings.drawing()
        usual = {item.name: item.default for item in fields(settings)}
        for name in [name for name in given if name not in known]:
            if given.pop(name) != usual[name]:  # a default that the user did not choose
                raise InputError(
                    f"{name} (of drawing, curation or eval): the model's images are not drawn by it, but by "
                    f"{', '.join(item for item in known if item in DRAWING)}; leave it as it is"
                )
        try:
            return replace(self.sampling, **given)
        except ValueError as error:
            raise InputError(f"drawing, curation or eval: {error}; set another value") from error

    @property
    def views_codes(self) -> bool:
        """Whether it sees images as their codes, and not as features of a vision encoder."""
        return True

    def views(self, images: Iterable[Image.Image]) -> Iterator[tuple[Sequence[int], Tensor, Engine]]:
        """What the model sees of images of any size, in groups of one shape.

        Yields: the images' numbers, what is seen of them (see view_pixels), and the engine that takes it.
        """
        images = list(images)
        if images:
            yield range(len(images)), self.view_images(images), self.engine

    def view_images(self, images: Iterable[Image.Image]) -> Tensor:
        """What the model sees of images of any size, ready for the engine; see view_pixels."""
        fitted = [self.fit(image) for image in images]
        return self.view_pixels(
            np.stack(fitted) if fitted else np.zeros((0, self.image_size, self.image_size, 3), "u1")
        )

    def view_pixels(self, images: np.ndarray) -> Tensor:
        """What the model sees of images that fit, uint8 [n, image_size, image_size, 3]: codes int64 [n, N], or features
        [n, F, D] where it does not see codes."""
        return self.encode_images(images)

    def view_codes(self, codes: Tensor) -> Tensor:
        """What the model sees of images given by their codes int64 [n, N], likewise."""
        return codes if self.views_codes else self.view_pixels(self.decode_images(codes))

    @property
    def num_features(self) -> int:
        """F, in a model that does not see codes."""
        raise NotImplementedError(f"{type(self).__name__}: sees codes")

    def fit(self, image: Image.Image) -> np.ndarray:
        """An image of any mode and size as the model sees it, uint8 [image_size, image_size, 3]; see fit_image."""
        return fit_image(image, self.image_size)

    @torch.no_grad()
    def encode_images(self, images: np.ndarray) -> Tensor:
        """uint8 [n, H, W, 3] with H and W multiples of a token's pixels -> codes int64 [n, h * w]."""
        if not len(images):
            return torch.zeros(0, self.layout.num_image_tokens, dtype=torch.int64)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2)
        tokenizer = self.vq_tokenizer
        batches = pixels.split(tokenizer.images_per_pass(*pixels.shape[2:]))
        return torch.cat(
            [tokenizer.encode(batch.to(tokenizer.device, tokenizer.dtype) / 127.5 - 1) for batch in batches]
        )

    @torch.no_grad()
    def decode_images(self, codes: Tensor, height: int | None = None, width: int | None = None) -> np.ndarray:
        """codes int64 [n, h * w] -> uint8 [n, H, W, 3]; height and width in tokens, else the layout's.

        Rounding by batch may move a pixel by a level.
        """
        rows, columns = self.layout.image_grid
        height, width = height or rows, width or columns
        tokenizer, factor = self.vq_tokenizer, self.vq_tokenizer.config.downsampling
        if not len(codes):
            return np.zeros((0, height * factor, width * factor, 3), dtype=np.uint8)
        batches = codes.split(tokenizer.images_per_pass(codes.shape[1] * factor, factor))
        images = torch.cat(
            [to_pixels(tokenizer.decode(batch.to(tokenizer.device), height, width)).cpu() for batch in batches]
        )
        return images.permute(0, 2, 3, 1).numpy()

    def save(self, folder: StrPath, dtype: torch.dtype | None = None) -> None:
        """Writes the folder that load_model opens.

        Args:
            folder: made if need be.
            dtype: of the weights; None keeps theirs.
        Raises: InputError while adapters stand around the transformer's layers, for no one could read the weights.
        """
        if any(".lora_" in name for name, _ in self.transformer.named_parameters()):
            raise InputError(f"{folder}: the model still has adapters around its layers; merge them before saving")
        self.write(make_folder(folder), dtype)

    def write(self, folder: Path, dtype: torch.dtype | None) -> None:
        """What save does, in the layout of the family, in a folder that is there."""
        raise NotImplementedError(f"{type(self).__name__}: its family does not say how it is saved")

    def modules(self) -> tuple[nn.Module, ...]:
        """All whose weights the model's results depend on; model_digest is theirs."""
        return self.transformer, self.vq_tokenizer


def check_words(text: str, name: str) -> str:
    """The text, which must have words and be valid Unicode. Raises: InputError that calls it by its name."""
    if not text.strip():
        raise InputError(f"{name}: expected words, got {text!r}; write what is meant")
    return check_unicode(text, name)


def _check_listed(values: Any, name: str) -> None:
    """Refuses one where several belong: an array would be taken for its rows, a text for its letters."""
    if isinstance(values, str | os.PathLike | Image.Image | np.ndarray):
        raise InputError(f"{name}: expected a list, got one {type(values).__name__}; put it in brackets")


def _one_each(questions: str | Sequence[str], images: Sequence[ImageLike]) -> list[str]:
    """A question for each image."""
    _check_listed(images, "images")
    listed = [questions] * len(images) if isinstance(questions, str) else list(questions)
    if len(listed) != len(images):
        raise InputError(f"questions: expected one, or one for each of {len(images)} images, got {len(listed)}")
    return [check_words(question, "question") for question in listed]


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] -> uint8 of the same shape."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def model_digest(model: Model) -> str:
    """A fingerprint of the weights of a model's modules."""
    return weights_digest(*model.modules())


def weights_digest(*modules: nn.Module) -> str:
    """A fingerprint of the weights of modules."""
    digest = hashlib.blake2b(digest_size=16)
    for module in modules:
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
